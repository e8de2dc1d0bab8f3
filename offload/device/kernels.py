"""The CUDA kernels of csrc/cuda: a library of their own, built where nvcc is."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

import torch

from offload.device.updates import Arrays
from offload.native import (
    NORM_BLOCK,
    AdamSettings,
    adam_constants,
    note_updated,
    update_addresses,
)

__all__ = ["LIBRARY", "NUMBERS", "Kernels", "open_library", "require"]

LIBRARY = Path(__file__).parents[1] / "_cuda_kernels.so"
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of the types that kernels take, as csrc's DType has them."""


def open_library(path: Path, needs: str) -> ctypes.CDLL:
    """Return the kernels' library. `needs` begins the error: what there is not without it.

    Raises ImportError where it was not built.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"{needs} {path.name}, which is built where nvcc is found when offload is installed: "
            f"{error}"
        ) from error
    library.offload_cuda_error.restype = c_char_p
    return library


def require(library: ctypes.CDLL, code: int, what: str) -> None:
    """Raise RuntimeError where a launch returned CUDA's number of an error."""
    if code:
        name = library.offload_cuda_error(code).decode()
        raise RuntimeError(f"CUDA does not take {what}: {name} ({code})")


class Kernels:
    """Launches the kernels on a stream, given by its address (`torch.cuda.Stream.cuda_stream`).

    Raises ImportError where the library was not built, or by another version.
    """

    def __init__(self, path: Path = LIBRARY) -> None:
        self._library = library = open_library(path, "the update on a GPU needs")
        library.offload_adam_update.argtypes = [
            *(c_char_p, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
            *(c_size_t, c_void_p),
        ]
        library.offload_block_sums.argtypes = [
            *(c_void_p, c_int, c_size_t, c_int, c_void_p, c_void_p),
        ]
        for about in (library.offload_constants_bytes, library.offload_norm_block):
            about.restype = c_size_t
        example = AdamSettings(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
        expected = len(adam_constants(example, 1, grad_scale=1.0, clip=1.0)), NORM_BLOCK
        found = library.offload_constants_bytes(), library.offload_norm_block()
        if found != expected:
            raise ImportError(f"{path} is of another version of offload; install it anew")

    def update(
        self, settings: AdamSettings, step: int, arrays: Arrays, *, clip: float, stream: int
    ) -> None:
        """Queue an update of arrays on the device.

        Raises ValueError for arrays that `adam_update` would not take were they on the host,
        RuntimeError where CUDA refuses.
        """
        grad, param = arrays.grad, arrays.param
        state = (arrays.master_param, arrays.exp_avg, arrays.exp_avg_sq)
        addresses = update_addresses(grad, *state, param, grad.device)
        code = self._library.offload_adam_update(
            adam_constants(settings, step, grad_scale=1.0, clip=clip),
            addresses["grad"],
            NUMBERS[grad.dtype],
            *(addresses[name] for name in ("master_param", "exp_avg", "exp_avg_sq", "param")),
            NUMBERS[torch.float32 if param is None else param.dtype],
            grad.numel(),
            stream,
        )
        require(self._library, code, f"an update of {grad.numel()} parameters")
        note_updated(*state, param)

    def block_sums(
        self, values: torch.Tensor, sums: torch.Tensor, *, squares: bool, stream: int
    ) -> None:
        """Queue the sums, of `squares` or plain, of each `NORM_BLOCK` elements; `sums` are fp64."""
        code = self._library.offload_block_sums(
            *(values.data_ptr(), NUMBERS[values.dtype], values.numel()),
            *(squares, sums.data_ptr(), stream),
        )
        require(self._library, code, f"the sum of {values.numel()} elements")
