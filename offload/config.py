"""The settings a run is made with; they are defined once, in `perfmodel.plan`."""

from perfmodel.plan import TIERS, ActivationsConfig, OptimizerConfig, canonical_tier

__all__ = ["TIERS", "ActivationsConfig", "OptimizerConfig", "canonical_tier"]
