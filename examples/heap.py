"""Whether memory that tensors gave back stays with the process, for the next step's tensors.

glibc hands it to the system and asks for it again in the next layer, and the system clears every
page of it in between: on a CPU that is some percent of a step, more of it with some sizes than with
others. Where tensors lie on a GPU, PyTorch keeps its memory by itself.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>
_INT_MAX = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Have the process keep what it frees, from now on; False where the C library cannot.

    For the whole process, and so for a program to decide, not for a library. Its size stays at what
    it was at its worst moment.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _INT_MAX))
