"""Saved activations leave for another tier in the forward and return for the backward."""

from offload.activations.offloader import ActivationOffload
from offload.activations.stats import ActivationStats

__all__ = ["ActivationOffload", "ActivationStats"]
