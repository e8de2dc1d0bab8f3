"""What a long context has too many of: tokens, in parts, or left out where they matter least."""

from offload.tokens.block_attention import BlockAttention
from offload.tokens.exact import ExactTokens
from offload.tokens.loss import segment_tokens_for, segmented_cross_entropy
from offload.tokens.meter import Quality, measure_quality
from offload.tokens.plain import PlainTokens
from offload.tokens.sparse import SparseTokens
from offload.tokens.tiling import Tiled

__all__ = [
    "BlockAttention",
    "ExactTokens",
    "PlainTokens",
    "Quality",
    "SparseTokens",
    "Tiled",
    "measure_quality",
    "segment_tokens_for",
    "segmented_cross_entropy",
]
