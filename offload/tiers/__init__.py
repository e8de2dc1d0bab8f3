"""Where tensors' bytes can lie besides the device they are computed on."""

from offload.tiers.ssd import SsdTier

__all__ = ["SsdTier"]
