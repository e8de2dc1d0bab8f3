"""The CUDA kernels of kept tokens: attention of blocks over blocks, their scores, kept rows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import Structure, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from offload.device.kernels import LIBRARY, NUMBERS, open_library, require
from offload.native import AttentionBlocks, note_updated

__all__ = ["TokenKernels", "kernels_for"]


class _Shape(Structure):
    _fields_ = (
        *((name, c_size_t) for name in ("batch", "heads", "key_heads", "length", "channels")),
        *(("block_tokens", c_size_t), ("scale", c_float)),
        *(("documents", c_void_p), ("window", c_size_t)),
    )


class _Blocks(Structure):
    _fields_ = (("numbers", c_void_p), ("count", c_size_t))


class _Rows(Structure):
    _fields_ = (
        ("data", c_void_p),
        *((f"{name}_stride", c_int64) for name in ("batch", "head", "row")),
    )


class _Attention(Structure):
    """As BlockAttentionArrays in csrc/cuda/block_attention_cuda.h; what is not named is null."""

    _fields_ = (
        *(("shape", _Shape), ("rows", _Blocks), ("columns", _Blocks), ("dtype", c_int)),
        *((name, _Rows) for name in ("query", "key", "value", "out")),
        *(("lse", c_void_p), ("grad_out", _Rows), ("delta", c_void_p)),
        *((name, _Rows) for name in ("grad_query", "grad_key", "grad_value")),
        ("scores", c_void_p),
    )


class _KeptRows(Structure):
    """As KeptRowsArrays in csrc/cuda/kept_rows_cuda.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("whole", "part", "rows", "out")),
        *((name, c_size_t) for name in ("tokens", "kept", "channels")),
        ("dtype", c_int),
    )


def kernels_for(*tensors: Tensor, channels: int = 0) -> TokenKernels | None:
    """Return the kernels for tensors on a GPU, None where they or their types are not there.

    `channels`: of a head, in attention. Raises ImportError for another version's library.
    """
    first = tensors[0]
    alike = all((each.dtype, each.device) == (first.dtype, first.device) for each in tensors)
    if not first.is_cuda or not alike or first.dtype not in NUMBERS:
        return None
    kernels = _built()
    return kernels if kernels is not None and channels <= kernels.most_channels else None


@lru_cache(maxsize=1)
def _built() -> TokenKernels | None:
    return TokenKernels() if LIBRARY.exists() else None


class TokenKernels:
    """Launches the kernels on the current stream of the device their tensors are on.

    They take float32, bfloat16 and float16, sum in float32, and give the same bits each time.
    All methods raise ValueError for tensors they do not take, RuntimeError where CUDA refuses.
    Raises ImportError where the library was not built, or by another version.
    """

    def __init__(self, path: Path = LIBRARY) -> None:
        self._library = library = open_library(path, "attention over blocks on a GPU needs")
        try:
            for name in ("block_attention", "block_attention_backward", "add_kept_rows"):
                getattr(library, f"offload_{name}").argtypes = [c_void_p, c_void_p]
            library.offload_take_kept_rows.argtypes = [c_void_p, c_void_p]
            library.offload_block_pair_scores.argtypes = [c_void_p, c_int, c_void_p]
            for name in ("attention_bytes", "attention_most_channels", "kept_rows_bytes"):
                getattr(library, f"offload_{name}").restype = c_size_t
        except AttributeError as error:
            raise ImportError(
                f"{path} is of another version of offload; install it anew: {error}"
            ) from error
        found = library.offload_attention_bytes(), library.offload_kept_rows_bytes()
        if found != (ctypes.sizeof(_Attention), ctypes.sizeof(_KeptRows)):
            raise ImportError(f"{path} is of another version of offload; install it anew")
        self.most_channels: int = library.offload_attention_most_channels()
        """Of a head, in attention."""

    def attend(
        self,
        blocks: AttentionBlocks,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Write attention as `offload.native.block_attention` does, with zeros beyond the end.

        All of it, `blocks` too, is on one device; `lse` is float32.
        """
        given = self._attention(blocks, query, key, value=value, out=out)
        given.lse = _address("lse", lse, query.device, torch.float32)
        self._launch("block_attention", given, query.device, "an attention")

    def attend_backward(
        self,
        blocks: AttentionBlocks,
        forward: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        grad_out: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Write gradients of query, key and value where the rows and columns are, nowhere else.

        `forward` is query, key, value, out and lse, as `attend` had them; `grads` are as the first
        three, whole.
        """
        query, key, value, out, lse = forward
        named = dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))
        given = self._attention(
            blocks, query, key, value=value, out=out, grad_out=grad_out, **named
        )
        delta = torch.empty_like(lse)
        for name, each in (("lse", lse), ("delta", delta)):
            setattr(given, name, _address(name, each, query.device, torch.float32))
        self._launch("block_attention_backward", given, query.device, "an attention's gradients")

    def pair_scores(
        self, blocks: AttentionBlocks, query: Tensor, key: Tensor, scores: Tensor, *, ahead: bool
    ) -> None:
        """Write scores, float32, as `offload.native.block_pair_scores` does."""
        given = self._attention(blocks, query, key)
        given.scores = _address("scores", scores, query.device, torch.float32)
        self._launch("block_pair_scores", given, query.device, "scores of blocks", int(ahead))

    def add_rows(self, residual: Tensor, part: Tensor, rows: Tensor, out: Tensor) -> None:
        """Write [tokens, channels] with `part` added at `rows`; `out` may be `residual` itself."""
        self._kept_rows("add_kept_rows", residual, part, rows, out)
        note_updated(out)

    def take_rows(self, whole: Tensor, rows: Tensor, out: Tensor) -> None:
        """Write the rows of [tokens, channels] that are at `rows`, int64 and ascending."""
        self._kept_rows("take_kept_rows", whole, out, rows, out)

    def _kept_rows(self, name: str, whole: Tensor, part: Tensor, rows: Tensor, out: Tensor) -> None:
        tokens, kept = len(whole), len(rows)
        channels = whole.numel() // tokens if tokens else 0
        if part.numel() != kept * channels or (out is not part and out.numel() != whole.numel()):
            raise ValueError(
                f"{list(part.shape)} and {list(out.shape)} are no {kept} rows of {channels}, and "
                f"{tokens} of them"
            )
        where = (whole.device, whole.dtype)
        given = _KeptRows(
            whole=_address("whole", whole, *where),
            part=_address("part", part, *where),
            rows=_address("rows", rows, whole.device, torch.int64),
            out=_address("out", out, *where),
            tokens=tokens,
            kept=kept,
            channels=channels,
            dtype=_number(whole),
        )
        self._launch(name, given, whole.device, f"{kept} kept rows")

    def _attention(
        self, blocks: AttentionBlocks, query: Tensor, key: Tensor, **more: Tensor
    ) -> _Attention:
        channels, device = query.shape[3], query.device
        if channels > self.most_channels:
            raise ValueError(
                f"heads have {channels} channels; the kernels take up to {self.most_channels}: "
                "use PyTorch's attention"
            )
        documents = blocks.documents
        shape = _Shape(
            *(*query.shape[:2], *key.shape[1:3], channels, blocks.block_tokens, blocks.scale),
            0 if documents is None else _address("documents", documents, device, torch.int32),
            blocks.window,
        )
        lists = {
            name: _Blocks(_address(name, each, device, torch.int32), each.shape[1])
            for name, each in (("rows", blocks.rows), ("columns", blocks.columns))
        }
        given = _Attention(shape=shape, dtype=_number(query), **lists)
        for name, each in {"query": query, "key": key, **more}.items():
            setattr(given, name, _rows(name, each, query))
        return given

    def _launch(
        self, name: str, given: Structure, device: torch.device, what: str, *more: int
    ) -> None:
        with _current_stream(device) as stream:
            launch = getattr(self._library, f"offload_{name}")
            require(self._library, launch(ctypes.byref(given), *more, stream), what)


@contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """Have `device` be the current one; yields the address of its stream."""
    if device.type != "cuda":  # CUDA refuses by itself, and what stands for it does not ask
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _number(tensor: Tensor) -> int:
    if tensor.dtype not in NUMBERS:
        allowed = ", ".join(str(dtype) for dtype in NUMBERS)
        raise ValueError(f"tensors are {tensor.dtype}; the kernels take {allowed}")
    return NUMBERS[tensor.dtype]


def _address(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> int:
    if (tensor.dtype, tensor.device) != (dtype, device) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device} with strides {tuple(tensor.stride())}; "
            f"it has to be {dtype} on {device}, its elements one after the other"
        )
    return tensor.data_ptr()


def _rows(name: str, tensor: Tensor, like: Tensor) -> _Rows:
    """Return address and strides of [batch, heads, rows, channels]."""
    alike = (tensor.dtype, tensor.device) == (like.dtype, like.device)
    if not alike or (tensor.stride(-1) != 1 and tensor.shape[-1] != 1):
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device} with strides {tuple(tensor.stride())}; "
            f"it has to be {like.dtype} on {like.device}, channels side by side"
        )
    return _Rows(tensor.data_ptr(), *tensor.stride()[:3])
