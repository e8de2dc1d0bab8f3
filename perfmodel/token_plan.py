"""What a plan says of tokens that a long context has too many of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from perfmodel.plan import (
    require_choice,
    require_flag,
    require_known,
    require_number,
    require_whole,
)

__all__ = ["TOKEN_MODES", "SparsityRule", "TokensSection", "published_ratios"]

TOKEN_MODES = ("off", "exact", "sparse", "gradient")
_WITH_RULE = ("sparse", "gradient")
_MOST_TOKENS = 1 << 24
_MOST_BLOCK = 4096
_MOST_STEPS = 1 << 40


def published_ratios(layers: int, ratio: float) -> tuple[float, ...]:
    """Return the schedule of LeMo's published runs: first half less one and the last dense.

    Its code has it so, and not the paper: github.com/Pairshoe/Jenga-AE, models/modeling_llama.py.
    """
    half = max(1, layers // 2 - 1)
    return tuple(1.0 if n < half or n == layers - 1 else ratio for n in range(layers))


@dataclass(frozen=True, kw_only=True)
class SparsityRule:
    """Which blocks of tokens take part in which layer's attention."""

    block_tokens: int = 64
    """In a block, a power of two. Where they do not divide a sequence its last block is shorter."""
    ratio: float = 0.4
    """How much of a sequence stays, in the layers from the middle on but the last."""
    ratios: tuple[float, ...] | None = None
    """How much of it stays in each layer, by itself; 1: all."""
    thresholds: tuple[float, ...] | None = None
    """The score over which a block stays in each layer, in place of ratios; negative: all stay."""
    causal: bool = True
    """Whether blocks are chosen without a look at later ones."""
    pool_tokens: int = 16
    """Whose mean stands for them where scores are made; 1: each token by itself."""
    predictor: str | None = None
    """A file of predictors (`offload tokens train-predictor`) that foretell scores in place of
    means; null: means, which need no training."""
    first_blocks: int = 1
    """That always stay, of each document."""
    last_blocks: int = 1
    """That always stay, of each sequence."""
    keep_labels: bool = True
    """Whether blocks with labels always stay, where some tokens have none."""
    keep_token_ids: tuple[int, ...] = ()
    """Tokens whose blocks always stay."""
    sparse_mlp: bool = False
    """Whether perceptrons run for the same tokens alone, in layers that leave some out."""
    biased_mlp_columns: float | None = None
    """How much of their inner channels perceptrons save in layers that leave some out: frozen ones
    with a gate, whose gradients are then biased (what LeMo's code does); null: all."""
    group_tokens: int | None = None
    """Of the kept tokens each attends within groups of so many, half of the heads shifted by half
    a group; null: to all before it."""
    warm_up_steps: int = 0
    """First steps in which all tokens take part."""
    dense_from_step: int | None = None
    """The step from which on all tokens take part again, from 0; null: none."""
    meter_steps: int = 0
    """Between two looks of a Trainer at how far the loss is from a dense one; 0: none."""
    most_loss_gap: float = 0.01
    """By how much of a dense loss the sparse one may be larger or smaller where both are measured;
    past it all tokens take part from then on."""
    least_gradient_cosine: float = 0.0
    """Of both gradients where they are measured, -1 to 1; below it all tokens take part from then
    on. With `gradient`, whose losses are equal, it is the limit that counts; 0: not against dense
    ones."""

    def __post_init__(self) -> None:
        """Check each value; layers are counted in `of_layers`."""
        for key in ("ratios", "thresholds", "keep_token_ids"):
            value = getattr(self, key)
            if isinstance(value, list):
                object.__setattr__(self, key, tuple(value))
            elif value is not None and not isinstance(value, tuple):
                raise ValueError(f"{key}={value!r} is not a list")
        if self.predictor is not None and not (isinstance(self.predictor, str) and self.predictor):
            raise ValueError(f"predictor={self.predictor!r} is not a file's name")
        for key in ("causal", "keep_labels", "sparse_mlp"):
            require_flag(key, getattr(self, key))
        self._check_sizes()
        self._check_shares()
        for key in ("warm_up_steps", "meter_steps"):
            require_whole(key, getattr(self, key), 0, _MOST_STEPS)
        if self.dense_from_step is not None:
            require_whole("dense_from_step", self.dense_from_step, 0, _MOST_STEPS)
        require_number("most_loss_gap", self.most_loss_gap, 0, 1e6)
        require_number("least_gradient_cosine", self.least_gradient_cosine, -1, 1)

    def _check_sizes(self) -> None:
        require_whole("block_tokens", self.block_tokens, 1, _MOST_BLOCK)
        if self.block_tokens & (self.block_tokens - 1):
            raise ValueError(f"block_tokens={self.block_tokens} is not a power of two")
        require_whole("pool_tokens", self.pool_tokens, 1, _MOST_BLOCK)
        if self.block_tokens % self.pool_tokens:
            raise ValueError(
                f"pool_tokens={self.pool_tokens} does not divide block_tokens={self.block_tokens}"
            )
        for key in ("first_blocks", "last_blocks"):
            require_whole(key, getattr(self, key), 0, 1 << 16)
        if self.group_tokens is not None:
            require_whole("group_tokens", self.group_tokens, 2, _MOST_TOKENS)
            if self.group_tokens % 2:
                raise ValueError(f"group_tokens={self.group_tokens} is odd: half of it is a shift")
        for value in self.keep_token_ids:
            require_whole("keep_token_ids", value, 0, 1 << 31)

    def _check_shares(self) -> None:
        if self.ratios is not None and self.thresholds is not None:
            raise ValueError("ratios and thresholds exclude each other: give one of them")
        if self.predictor is not None and self.thresholds is not None:
            raise ValueError(
                "predictor and thresholds exclude each other: thresholds are scores of means, and "
                "what a predictor foretells has another scale in each layer; give ratios with it, "
                "or leave predictor out"
            )
        for key in ("ratios", "thresholds"):
            # The default is in every plan that was written, and says nothing beside them.
            if getattr(self, key) is not None and self.ratio != SparsityRule.ratio:
                raise ValueError(
                    f"ratio and {key} exclude each other, and ratio={self.ratio!r}: give one"
                )
        for key, values in (("ratio", (self.ratio,)), ("ratios", self.ratios or ())):
            for value in values:
                require_number(key, value, 0, 1)
                if value == 0:
                    raise ValueError(f"{key}=0 leaves nothing: give it over 0, and at most 1")
        if self.biased_mlp_columns is not None:
            require_number("biased_mlp_columns", self.biased_mlp_columns, 0, 1)
            if self.biased_mlp_columns == 0:
                raise ValueError("biased_mlp_columns=0 leaves nothing: give it over 0, at most 1")
            if self.sparse_mlp:
                raise ValueError("biased_mlp_columns and sparse_mlp exclude each other")
        for value in self.thresholds or ():
            require_number("thresholds", value, -1e30, 1e30)

    @property
    def always_tokens(self) -> int:
        """How long a sequence may be of which every block always stays, in tokens."""
        return self.block_tokens * max(1, self.first_blocks + self.last_blocks)

    def of_layers(self, layers: int) -> SparsityRule:
        """Return the same with what it says of each of so many layers. Raises ValueError."""
        for key in ("ratios", "thresholds"):
            given = getattr(self, key)
            if given is not None and len(given) != layers:
                raise ValueError(f"{key} has {len(given)} numbers, and the model {layers} layers")
        if self.ratios is not None or self.thresholds is not None:
            return self
        ratios = published_ratios(layers, self.ratio)
        return replace(self, ratio=SparsityRule.ratio, ratios=ratios)

    def is_dense(self, layer: int) -> bool:
        """Say whether a layer keeps every block."""
        if self.thresholds is not None:
            return self.thresholds[layer] < 0
        return self.ratios is not None and self.ratios[layer] >= 1

    def is_dense_step(self, step: int) -> bool:
        """Say whether all tokens take part in a step, counted from 0."""
        ends = self.dense_from_step
        return step < self.warm_up_steps or (ends is not None and step >= ends)


@dataclass(frozen=True, kw_only=True)
class TokensSection:
    """What becomes of tokens that a long context has too many of."""

    mode: str = "off"
    """`off`: nothing is done; `exact`: the loss in segments, perceptrons in tiles of the sequence,
    with the same loss and gradients but for the order of sums; `sparse`: beside it, attention over
    the blocks of tokens that matter to it, which is another loss; `gradient`: the loss of all
    tokens, and gradients through those blocks alone. For causal language models of Hugging
    Face's."""
    loss_segment_tokens: int | None = None
    """Of a segment; null: as many as have 16 MiB of logits in fp32."""
    mlp_tile_tokens: int | None = None
    """Of a tile; 0: perceptrons run whole; null: as many as the model has channels."""
    sparse: SparsityRule | None = None
    """With `sparse` and `gradient`: which blocks stay; null: LeMo's published schedule."""

    def __post_init__(self) -> None:
        """Check the mode, and that nothing is said which it has no use for."""
        require_choice("mode", self.mode, TOKEN_MODES)
        for key, least in (("loss_segment_tokens", 1), ("mlp_tile_tokens", 0)):
            if getattr(self, key) is not None:
                if self.mode == "off":
                    raise ValueError(f"{key} says nothing with mode='off': set mode='exact'")
                require_whole(key, getattr(self, key), least, _MOST_TOKENS)
        if self.sparse is not None and self.mode not in _WITH_RULE:
            raise ValueError(f"sparse says nothing with mode={self.mode!r}: set mode='sparse'")
        if self.mode == "gradient" and self.sparse is not None and self.sparse.group_tokens:
            raise ValueError(
                f"group_tokens={self.sparse.group_tokens} says nothing with mode='gradient', whose "
                "forward is of all tokens: leave it out"
            )

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> TokensSection:
        """Make it from JSON. Unknown keys raise ValueError, those of `sparse` too."""
        for key in section.keys() & {one.name for one in fields(SparsityRule)}:
            raise ValueError(f"{key} is a setting of tokens.sparse: put it in there")
        require_known("tokens", section, [one.name for one in fields(cls)])
        found = dict(section)
        rule = found.get("sparse")
        if rule is not None:
            if not isinstance(rule, Mapping):
                raise ValueError(f"sparse={rule!r} is not an object with keys, or null")
            require_known("tokens.sparse", rule, [one.name for one in fields(SparsityRule)])
            found["sparse"] = SparsityRule(**rule)
        return cls(**found)
