"""Where tensors' bytes can lie besides the device they are computed on."""

from __future__ import annotations

from offload.tiers.gds import DirectExtent, DirectTransfer
from offload.tiers.host import HostExtent, HostTier
from offload.tiers.ssd import SsdTier, TierFacts
from offload.tiers.stores import Staged, Store, Stores

__all__ = [
    "DirectExtent",
    "DirectTransfer",
    "HostExtent",
    "HostTier",
    "SsdTier",
    "Staged",
    "Store",
    "Stores",
    "TierFacts",
]
