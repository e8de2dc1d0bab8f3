"""States of subgroups as a checkpoint has them: by parameter, in its shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from offload.optimizer.layout import ROWS, Piece, Subgroup, flat_view, needs_master, rows_of
from offload.optimizer.sharded import as_placed, local_part
from offload.optimizer.states import States

__all__ = ["Fill", "Saved", "assembled", "from_memory", "groups_of", "require_fitting", "spread"]

Saved = dict[torch.Tensor, dict[str, torch.Tensor]]
"""Of each parameter its states by name, as `torch.optim.AdamW` calls them."""
Fill = Callable[[Piece, str, torch.Tensor], None]
"""Fills the last with the elements of one state of a piece of a parameter."""


def assembled(
    subgroups: Sequence[tuple[Subgroup, States]], steps: Mapping[torch.Tensor, int]
) -> Saved:
    """Return the states of all parameters that have been updated, copied."""
    saved: Saved = {}
    for subgroup, states in subgroups:
        rows = None
        for piece in subgroup.pieces:
            if piece.param not in steps:
                continue
            if rows is None:
                rows = states.read()
            own = saved.setdefault(piece.param, {})
            for name, row in zip(rows_of(piece.param), rows, strict=False):
                if name not in own:
                    own[name] = _on_host(piece.param)
                piece.of(own[name]).copy_(piece.inside(row))
    for param in steps:  # one without elements is in no subgroup
        if param not in saved:
            saved[param] = {name: _on_host(param) for name in rows_of(param)}
    return saved


def _on_host(param: torch.Tensor) -> torch.Tensor:
    """Return room for a state of a parameter, in host memory: where states are, a device has none.

    Of a DTensor it is on the device of its mesh, on which ranks exchange it.
    """
    device = param.device if isinstance(param, DTensor) else torch.device("cpu")
    return torch.empty_like(param, dtype=torch.float32, device=device)


def spread(subgroups: Sequence[tuple[Subgroup, States]], saved: Saved, fill: Fill) -> None:
    """Take over the states that `saved` has, as `fill` brings them; all others become zero."""
    for subgroup, states in subgroups:
        rows = states.begin_anew()
        for piece in subgroup.pieces:
            for name, row in zip(ROWS, rows, strict=False):
                if name in saved.get(piece.param, {}):
                    fill(piece, name, piece.inside(row))
                elif name == ROWS[2]:  # until a step looks at it, it is what a checkpoint shows
                    piece.inside(row).copy_(piece.of(piece.param.detach()))
        states.commit()
        states.evict()


def from_memory(saved: Saved) -> Fill:
    """Return what brings states that are in memory.

    Those of a DTensor may be placed otherwise, or be whole; all ranks must call this alike.
    """
    placed = {
        param: {name: as_placed(states[name], param) for name in ROWS if name in states}
        for param, states in saved.items()
    }

    def fill(piece: Piece, name: str, elements: torch.Tensor) -> None:
        value = _like(local_part(piece.param), local_part(placed[piece.param][name]))
        elements.copy_(value[piece.begin : piece.end])

    return fill


def _like(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.stride() != param.stride():
        value = torch.empty_like(param, dtype=value.dtype).copy_(value)
    return flat_view(value)


def groups_of(state_dict: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the parameter groups of a checkpoint; ValueError where it is no optimizer's."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"load_state_dict({state_dict!r:.80}) takes what state_dict() returned; what save() "
            "wrote to a file comes back by load(path)"
        )
    for key in ("param_groups", "state"):
        if key not in state_dict:
            has = ", ".join(map(repr, list(state_dict)[:5])) or "nothing"
            raise ValueError(f"the checkpoint has no {key!r}, as an optimizer's has; it has {has}")
    groups: Sequence[Mapping[str, Any]] = state_dict["param_groups"]
    return groups


def _require_step(number: Any, step: Any) -> None:
    value = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    if not isinstance(value, (int, float)) or not 0 <= value < 2**53 or value != int(value):
        raise ValueError(f"step {number} of the checkpoint is {step!r}, and no count of steps")


def require_fitting(state_dict: Mapping[str, Any], params: Sequence[torch.Tensor]) -> Saved:
    """Return the states of a checkpoint, by parameter.

    Raises ValueError where it is of other parameters. Warns where master copies are missing.
    """
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    if len(numbers) != len(params):
        raise ValueError(
            f"the checkpoint has {len(numbers)} parameters, but there are {len(params)}"
        )
    saved: Saved = {}
    missing = 0
    for number, param in zip(numbers, params, strict=True):
        states = state_dict["state"].get(number)
        if states is None:
            continue
        for name in ("step", *ROWS[:2]):
            if name not in states:
                raise ValueError(
                    f"state {number} of the checkpoint has no {name!r}, as AdamW's have: give one "
                    "that torch.optim.AdamW or this class has made"
                )
        _require_step(number, states["step"])
        for name in ROWS:
            if name in states and not isinstance(states[name], torch.Tensor):
                raise ValueError(
                    f"{name} {number} of the checkpoint is a {type(states[name]).__name__}, "
                    "and no tensor"
                )
            if name in states and states[name].shape != param.shape:
                raise ValueError(
                    f"{name} {number} of the checkpoint has the shape {tuple(states[name].shape)}, "
                    f"but its parameter {tuple(param.shape)}"
                )
        saved[param] = {name: states[name] for name in ("step", *ROWS) if name in states}
        missing += needs_master(param) and "master_param" not in states
    if missing:
        warnings.warn(
            f"the checkpoint has no master_param for {missing} parameters of lower precision; "
            "they are taken as they are",
            UserWarning,
            stacklevel=4,
        )
    return saved
