"""Where tensors' bytes can lie besides the device they are computed on."""

from offload.tiers.ssd import SsdTier, TierFacts

__all__ = ["SsdTier", "TierFacts"]
