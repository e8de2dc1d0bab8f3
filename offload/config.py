"""The settings a run is made with; they are defined once, in `perfmodel`."""

from perfmodel.plan import TIERS, ActivationsConfig, OptimizerConfig, canonical_tier
from perfmodel.plan_file import Limits, Plan, Predicted, read_plan
from perfmodel.schema import markdown, schema

__all__ = [
    "TIERS",
    "ActivationsConfig",
    "Limits",
    "OptimizerConfig",
    "Plan",
    "Predicted",
    "canonical_tier",
    "markdown",
    "read_plan",
    "schema",
]
