"""Predictors in a file: safetensors, with what they were made for and from."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from offload.tokens.predictor import BlockPredictor

__all__ = ["Provenance", "load_predictors", "save_predictors"]

_VERSION = 1
_KEY = "offload.predictors"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What predictors were made for, and from what."""

    channels: int
    heads: int
    block_tokens: int
    causal: bool
    """Whether they were chosen for a choice without a look at later tokens."""
    model: str
    data: str
    steps: int
    seq_len: int
    recalls: dict[str, float]
    """Of what scores of all tokens keep, how much they keep, by layer, on data not trained on."""


def save_predictors(
    path: str | os.PathLike[str], predictors: Mapping[int, BlockPredictor], made: Provenance
) -> None:
    """Write them. Raises ImportError without safetensors, OSError where it cannot be written."""
    named = {
        f"{layer}.{name}": each.contiguous()
        for layer, predictor in predictors.items()
        for name, each in predictor.weights().items()
    }
    told = json.dumps({"version": _VERSION, **asdict(made)})
    from safetensors import SafetensorError  # noqa: PLC0415 - optional
    from safetensors.torch import save_file  # noqa: PLC0415 - optional

    part = f"{os.fspath(path)}.part"  # an earlier file stays until this one is whole
    try:
        save_file(named, part, metadata={_KEY: told})
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot be written: {error}", os.fspath(path)) from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def load_predictors(
    path: str | os.PathLike[str], *, channels: int, heads: int, block_tokens: int
) -> tuple[dict[int, BlockPredictor], Provenance]:
    """Return them by layer, with where they come from.

    Raises ValueError for a file of something else or of predictors of other shapes, OSError for one
    that is not there, ImportError without safetensors.
    """
    told, named = _read(path)
    made = _provenance(path, told)
    expected = {"channels": channels, "heads": heads, "block_tokens": block_tokens}
    for key, value in expected.items():
        if getattr(made, key) != value:
            raise ValueError(
                f"{path}: was made with {key}={getattr(made, key)}, and here it is {value}: train "
                "one (offload tokens train-predictor), or leave tokens.sparse.predictor out"
            )
    parts: dict[int, dict[str, Tensor]] = {}
    for key, each in named.items():
        layer, _, name = key.partition(".")
        if not layer.isdecimal():
            raise ValueError(f"{path}: holds {key!r}, which is no map of a layer's: train it anew")
        parts.setdefault(int(layer), {})[name] = each
    found: dict[int, BlockPredictor] = {}
    for number in sorted(parts):
        found[number] = BlockPredictor(**expected)
        try:
            found[number].take(parts[number])
        except ValueError as error:
            raise ValueError(f"{path}: layer {number}: {error}") from None
    return found, made


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file tells of its predictors, and their maps by name."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - optional

    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, "No such file of predictors", os.fspath(path))
    try:
        with safe_open(os.fspath(path), framework="pt") as opened:
            told = json.loads((opened.metadata() or {})[_KEY])
            named = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: holds no predictors: {type(error).__name__}: {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path}: holds no predictors: its {_KEY} is {told!r}, and not an object")
    return told, named


def _provenance(path: str | os.PathLike[str], told: dict[str, Any]) -> Provenance:
    """Return what a file tells. Raises ValueError for another version's, or with keys amiss."""
    version = told.pop("version", None)
    if version != _VERSION:
        raise ValueError(f"{path}: has version {version}; this release reads version {_VERSION}")
    expected = {each.name for each in fields(Provenance)}
    for amiss, keys in (("lacks", expected - told.keys()), ("has", told.keys() - expected)):
        if keys:
            raise ValueError(
                f"{path}: its {_KEY} {amiss} {', '.join(sorted(keys))}: train it anew (offload "
                "tokens train-predictor)"
            )
    return Provenance(**told)
