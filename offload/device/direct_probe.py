"""`python -m offload.device.direct_probe DIR GPU`: exits with 0 where GPUDirect Storage works."""

from __future__ import annotations

import sys

from offload.device.direct import probe

if __name__ == "__main__":
    probe(sys.argv[1], int(sys.argv[2]))
