"""Starts `train_gpt.py` as it is, with the tests' shim of what megatron-core asks of CUDA."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests.offload.integrations.megatron_shim import install

install()
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
sys.argv[0] = str(EXAMPLES / "train_gpt.py")
runpy.run_path(sys.argv[0], run_name="__main__")
