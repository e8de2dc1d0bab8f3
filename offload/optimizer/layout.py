"""How parameters are cut into subgroups: what is updated, moved and stored as one."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from offload.optimizer.sharded import local_part

__all__ = [
    "ROWS",
    "Piece",
    "Subgroup",
    "flat_view",
    "lay_out",
    "needs_master",
    "require_as_laid_out",
    "rows_of",
]

STATE_NAMES = ("exp_avg", "exp_avg_sq")
ROWS = (*STATE_NAMES, "master_param")
"""The fp32 states of a subgroup, each as long as it has parameters; the last one only where these
are not fp32 themselves."""


def rows_of(param: torch.Tensor) -> tuple[str, ...]:
    """Return the names of a parameter's states in a checkpoint."""
    return ROWS if needs_master(param) else STATE_NAMES


def needs_master(param: torch.Tensor) -> bool:
    """Say whether a parameter is a rounded copy of what is trained."""
    return param.dtype != torch.float32


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return all elements in the order of memory; of a DTensor those that this rank has.

    Raises ValueError where there are gaps between them, or one is at several places.
    """
    tensor = local_part(tensor)
    if tensor.is_contiguous():
        return tensor.view(-1)
    if _is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    raise ValueError(
        f"a tensor of shape {tuple(tensor.shape)} with strides {tuple(tensor.stride())} has gaps "
        "or overlaps; make it contiguous"
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Say whether each element has its own place in one run of memory."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


Kind = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Shape, strides, type and device of a parameter."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Elements `begin` to `end` of a parameter, or of this rank's part, at `at` of its subgroup."""

    param: torch.nn.Parameter
    begin: int
    end: int
    at: int
    kind: Kind
    """Of the parameter when it was laid out."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the piece's part of what is like its parameter."""
        return flat_view(tensor)[self.begin : self.end]

    def inside(self, row: torch.Tensor) -> torch.Tensor:
        """Return the piece's part of a row of its subgroup."""
        return row[self.at : self.at + self.end - self.begin]


@dataclass(frozen=True, eq=False)
class Subgroup:
    """Parameters of one group of the optimizer, all with a master copy or all without."""

    group: int
    """The number of the optimizer's group."""
    pieces: tuple[Piece, ...]
    has_master: bool

    @property
    def count(self) -> int:
        """How many parameters."""
        return self.pieces[-1].at + self.pieces[-1].end - self.pieces[-1].begin

    def has_any(self, params: Container[torch.Tensor]) -> bool:
        """Say whether a piece is of one of `params`."""
        return any(piece.param in params for piece in self.pieces)

    @property
    def num_rows(self) -> int:
        """How many fp32 states each has."""
        return len(ROWS) - (not self.has_master)

    @property
    def nbytes(self) -> int:
        """What the states take."""
        return 4 * self.num_rows * self.count


def lay_out(
    group: int,
    params: Sequence[torch.nn.Parameter],
    subgroup_params: int,
    *,
    all_masters: bool = False,
) -> list[Subgroup]:
    """Cut the parameters of a group into subgroups of `subgroup_params`, in their order.

    Only the last one of each kind, with a master copy and without, may be smaller. `all_masters`:
    those of fp32 have one as well, where they and their states may lie apart.
    """
    found = []
    for has_master in (False, True):
        alike = [
            param
            for param in params
            if (needs_master(param) or all_masters) is has_master and local_part(param).numel()
        ]
        found += [
            Subgroup(group, tuple(pieces), has_master) for pieces in _cut(alike, subgroup_params)
        ]
    return found


def _cut(params: Sequence[torch.nn.Parameter], size: int) -> Iterator[list[Piece]]:
    pieces: list[Piece] = []
    at = 0
    for param in params:
        begin, count = 0, local_part(param).numel()
        while begin < count:
            end = min(count, begin + size - at)
            pieces.append(Piece(param, begin, end, at, _kind_of(param)))
            at += end - begin
            begin = end
            if at == size:
                yield pieces
                pieces, at = [], 0
    if pieces:
        yield pieces


def _kind_of(param: torch.Tensor) -> Kind:
    return param.shape, tuple(local_part(param).stride()), param.dtype, param.device


def require_as_laid_out(subgroups: Iterable[Subgroup], trained: Iterable[torch.Tensor]) -> None:
    """Raise RuntimeError where a parameter has become another since, by `.to()` or `.data` say.

    Also where one of `trained` is none that there are states of: put into `param_groups` by a
    framework that trains other tensors than it was given.
    """
    pieces = [piece for subgroup in subgroups for piece in subgroup.pieces]
    known = {piece.param for piece in pieces}
    for param in trained:
        if param not in known and local_part(param).numel():
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has been put into param_groups since "
                "this AdamW was made, so that it has no states: with DeepSpeed take "
                "offload.integrations.deepspeed.initialize, and else add_param_group()"
            )
    for piece in pieces:
        now = _kind_of(piece.param)
        if now != piece.kind:
            raise RuntimeError(
                f"a parameter that was {_said(piece.kind)} when its AdamW was made is now "
                f"{_said(now)}; change the model first, and make the AdamW of what it has become"
            )


def _said(kind: Kind) -> str:
    shape, strides, dtype, device = kind
    return f"{dtype} of shape {tuple(shape)} with strides {strides} on {device}"
