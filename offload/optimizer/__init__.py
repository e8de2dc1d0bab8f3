"""Optimizer states in memory and on the SSD."""

from offload.optimizer.adamw import AdamW

__all__ = ["AdamW"]
