"""What a long context has too many of: tokens, in parts, with the same loss and gradients."""

from offload.tokens.exact import ExactTokens
from offload.tokens.loss import segment_tokens_for, segmented_cross_entropy
from offload.tokens.tiling import Tiled

__all__ = ["ExactTokens", "Tiled", "segment_tokens_for", "segmented_cross_entropy"]
