"""Published models by their names, as the `config.json` that each has beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from perfmodel.model import Model
from perfmodel.model_configs import model_of_config

__all__ = ["known_models", "read_known_model"]


def known_models() -> Sequence[str]:
    """Return the names of the models that are described here."""
    folder = resources.files("perfmodel") / "models"
    return sorted(
        entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name[-5:] == ".json"
    )


def read_known_model(name: str) -> Model:
    """Return one of `known_models`. Raises OSError for another."""
    text = (resources.files("perfmodel") / "models" / f"{name}.json").read_text("utf-8")
    config: dict[str, Any] = json.loads(text)
    return model_of_config(config, name)
