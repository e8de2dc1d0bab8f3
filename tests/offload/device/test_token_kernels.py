"""The door to the CUDA kernels of tokens: what they do not take is said before they see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.device.kernels import LIBRARY
from offload.device.token_kernels import TokenKernels, kernels_for
from offload.native import AttentionBlocks

built = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels are not built here")


def some_blocks() -> AttentionBlocks:
    rows = torch.tensor([[0, 1]], dtype=torch.int32)
    return AttentionBlocks(rows=rows, columns=rows, block_tokens=4, scale=0.5)


def attend(kernels: TokenKernels, query: Tensor, blocks: AttentionBlocks | None = None) -> None:
    out = torch.empty(query.shape, dtype=query.dtype)
    own = some_blocks() if blocks is None else blocks
    kernels.attend(own, query, query, query, out, torch.empty(query.shape[:3]))


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cudas_own_error_is_named() -> None:
    kernels, rows = TokenKernels(), torch.tensor([0])
    query = torch.zeros(1, 1, 8, 4)
    with pytest.raises(RuntimeError, match=r"an attention: cudaError\w+ \(\d+\)"):
        attend(kernels, query)
    with pytest.raises(RuntimeError, match=r"scores of blocks: cudaError\w+"):
        kernels.pair_scores(some_blocks(), query, query, torch.zeros(1, 2, 2), ahead=True)
    with pytest.raises(RuntimeError, match=r"1 kept rows: cudaError\w+"):
        kernels.add_rows(torch.zeros(2, 3), torch.zeros(1, 3), rows, torch.zeros(2, 3))


def test_a_missing_library_says_how_it_comes_to_be(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"attention over blocks on a GPU needs none\.so, which"):
        TokenKernels(tmp_path / "none.so")


def test_a_library_of_another_version_is_refused(
    emulated_kernels: TokenKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(emulated_kernels._library._name)
    monkeypatch.setattr("ctypes.sizeof", lambda _kind: 8)
    with pytest.raises(ImportError, match="is of another version of offload; install it anew"):
        TokenKernels(path)


def test_tensors_that_no_kernel_takes_go_another_way() -> None:
    host = torch.zeros(1, 1, 8, 4)
    assert kernels_for(host) is None


WRONG: list[tuple[Callable[[TokenKernels], None], str]] = [
    (
        lambda own: attend(own, torch.zeros(1, 1, 8, 257)),
        "257 channels; the kernels take up to 256",
    ),
    (lambda own: attend(own, torch.zeros(1, 1, 8, 4).double()), "float64; the kernels take"),
    (lambda own: attend(own, torch.zeros(1, 1, 4, 8).mT), "query is .* channels side by side"),
    (
        lambda own: attend(
            own,
            torch.zeros(1, 1, 8, 4),
            AttentionBlocks(torch.zeros(1, 1), torch.zeros(1, 1), 4, 1),
        ),
        "rows is torch.float32 .* has to be torch.int32",
    ),
    (
        lambda own: own.add_rows(
            torch.zeros(4, 3), torch.zeros(1, 3), torch.tensor([0, 1]), torch.zeros(4, 3)
        ),
        r"\[1, 3\] and \[4, 3\] are no 2 rows of 3",
    ),
    (
        lambda own: own.take_rows(torch.zeros(4, 3), torch.tensor([0]), torch.zeros(1, 3).half()),
        "part is torch.float16",
    ),
]


@pytest.mark.parametrize(("call", "said"), WRONG)
def test_what_does_not_fit_is_refused_before_a_kernel_sees_it(
    emulated_kernels: TokenKernels, call: Callable[[TokenKernels], None], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        call(emulated_kernels)


def test_what_a_launch_refuses_is_an_error(emulated_kernels: TokenKernels) -> None:
    none = torch.zeros(1, 0, dtype=torch.int32)
    blocks = AttentionBlocks(rows=none, columns=none, block_tokens=4, scale=0.5)
    with pytest.raises(RuntimeError, match="an attention: cudaErrorInvalidValue"):
        attend(emulated_kernels, torch.zeros(1, 1, 8, 4), blocks)
