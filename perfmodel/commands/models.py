"""`perfmodel models`: those known by name."""

from __future__ import annotations

import argparse

from perfmodel.commands.arguments import Parser
from perfmodel.commands.tables import table
from perfmodel.known_models import known_models, read_known_model
from perfmodel.plain_models import PLAIN_MODELS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Add nothing."""


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each."""
    rows = []
    for name in known_models():
        model = read_known_model(name)
        layers = model.num_layers + model.encoder_layers
        count = f"{model.num_params:,}"
        rows.append([name, count, f"{layers}", f"{model.hidden_size}", f"{model.vocab_size}"])
    print("\n".join(table(("name", "parameters", "layers", "hidden", "vocabulary"), rows)))
    print(f"{', '.join(PLAIN_MODELS)}: examples/train_gpt.py's, of --layers --hidden --heads")
    return 0
