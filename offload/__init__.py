"""Moves what training does not need right now to where there is room, and back in time."""

from offload.activations import ActivationOffload, ActivationStats
from offload.config import ActivationsConfig, OptimizerConfig
from offload.optimizer import AdamW
from offload.session import Session

__all__ = [
    "ActivationOffload",
    "ActivationStats",
    "ActivationsConfig",
    "AdamW",
    "OptimizerConfig",
    "Session",
]
