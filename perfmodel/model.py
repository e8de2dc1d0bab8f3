"""The shape of a transformer, from which its parameters and activations are counted."""

from __future__ import annotations

from dataclasses import dataclass, fields

from perfmodel.plan import require_choice, require_flag, require_number, require_whole

__all__ = ["ACTIVATIONS", "NORMS", "POSITIONS", "Model"]

NORMS = ("layer", "rms")
POSITIONS = ("learned", "rotary", "relative")
ACTIVATIONS = ("gelu", "gelu_tanh", "gelu_new", "relu", "silu")
"""`gelu_new`: `gelu_tanh` as its formula says, step by step."""
_MOST = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder, an encoder, or both. Raises ValueError naming the key, the value and why.

    Layers have attention and a perceptron, a decoder's behind an encoder cross-attention as well.
    """

    name: str = ""
    num_layers: int
    """Of the decoder, or of the encoder where that is all."""
    encoder_layers: int = 0
    """Of the encoder before a decoder; 0: there is none."""
    hidden_size: int
    num_heads: int
    num_kv_heads: int = 0
    """Heads of keys and values, which groups of the others share; 0: as many as `num_heads`."""
    head_size: int = 0
    """Channels of a head; 0: `hidden_size / num_heads`."""
    ffn_size: int = 0
    """Channels inside of the perceptron; 0: four times `hidden_size`."""
    gated: bool = False
    """The perceptron multiplies what it activates with a second map of its input (SwiGLU)."""
    activation: str = "gelu"
    norm: str = "layer"
    norm_offset: bool = False
    """One is added to the weights of RMS norms (Gemma's), which multiply in fp32."""
    norm_last: bool = False
    """Norms stand behind the residual sum and not before attention and perceptron."""
    final_norm: bool = True
    """A norm stands before the head, and behind an encoder."""
    norms_per_layer: int = 0
    """0: one for each part of a layer."""
    head_norms: bool = False
    """Queries and keys have norms of their own."""
    parallel_residual: bool = False
    """Attention and perceptron read the same sum."""
    fused_heads: bool | None = None
    """One map makes queries, keys and values; None: unless they are rotated."""
    rotary_share: float = 1.0
    """Which part of a head's channels is rotated."""
    score_softcap: bool = False
    """Scores go through a tanh (Gemma 2's), for which no fused kernel is."""
    head_softcap: bool = False
    """Logits do."""
    attention_bias: bool = True
    """Of the maps to queries, keys and values."""
    output_bias: bool | None = None
    """Of the map behind attention; None: as `attention_bias`."""
    ffn_bias: bool = True
    causal: bool = True
    vocab_size: int
    max_positions: int = 0
    """Learned ones have a table; 0: as many as a sequence has."""
    positions: str = "learned"
    relative_buckets: int = 0
    token_types: int = 0
    embedding_norm: bool = False
    embedding_size: int = 0
    """Channels of the token table, if not `hidden_size`."""
    tied: bool = False
    """The head has the token table's parameters."""
    head_bias: bool = False
    head_transform: bool = False
    """A map and a norm stand before the head (BERT's)."""
    num_experts: int = 0
    """Perceptrons of a layer, between which a router chooses; 0: one, without a router."""
    experts_per_token: int = 1
    dropout: float = 0.0
    attention_dropout: float | None = None
    """Of scores; None: as `dropout`."""

    def __post_init__(self) -> None:
        """Check the values and fill in those that follow from others."""
        for one in fields(self):
            self._require(one.name, getattr(self, one.name))
        for key, otherwise in (
            ("num_kv_heads", self.num_heads),
            ("head_size", self.hidden_size // self.num_heads),
            ("ffn_size", 4 * self.hidden_size),
            ("embedding_size", self.hidden_size),
        ):
            if not getattr(self, key):
                if key == "head_size" and self.hidden_size % self.num_heads:
                    raise ValueError(
                        f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}"
                    )
                object.__setattr__(self, key, otherwise)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} are more than "
                f"num_experts={self.num_experts}"
            )

    def _require(self, key: str, value: object) -> None:
        if key in ("norm", "positions", "activation"):
            allowed = {"norm": NORMS, "positions": POSITIONS, "activation": ACTIVATIONS}[key]
            require_choice(key, value, allowed)
        elif key in ("dropout", "rotary_share") or (
            key == "attention_dropout" and value is not None
        ):
            require_number(key, value, 0, 1)
        elif key in ("num_layers", "hidden_size", "num_heads", "vocab_size", "experts_per_token"):
            require_whole(key, value, 1, _MOST)
        elif isinstance(self.__dataclass_fields__[key].default, bool):
            require_flag(key, value)
        elif isinstance(self.__dataclass_fields__[key].default, int):
            require_whole(key, value, 0, _MOST)

    @property
    def drops_scores(self) -> bool:
        """Whether attention leaves out some of what it has seen."""
        return bool(self.dropout if self.attention_dropout is None else self.attention_dropout)

    # ---- parameters --------------------------------------------------------------------------

    @property
    def query_size(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Channels of all heads of keys, or of values."""
        return self.num_kv_heads * self.head_size

    @property
    def norm_params(self) -> int:
        """Of one norm over the hidden channels."""
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    @property
    def attention_params(self) -> int:
        """Of one attention."""
        hidden, inner = self.hidden_size, self.query_size + 2 * self.kv_size
        output_bias = self.attention_bias if self.output_bias is None else self.output_bias
        biases = inner * self.attention_bias + hidden * output_bias
        norms = 2 * self.head_size if self.head_norms else 0
        return hidden * inner + self.query_size * hidden + biases + norms

    @property
    def perceptron_params(self) -> int:
        """Of one perceptron, or of all experts of a layer and their router."""
        hidden, inner, maps = self.hidden_size, self.ffn_size, 2 if self.gated else 1
        one = (maps + 1) * hidden * inner + (maps * inner + hidden) * self.ffn_bias
        return one * max(1, self.num_experts) + hidden * self.num_experts

    def layer_params(self, *, cross: bool = False) -> int:
        """Return the parameters of a layer; `cross`: with attention to an encoder."""
        attentions = 2 if cross else 1
        norms = self.norms_per_layer or attentions + 1
        return (
            attentions * self.attention_params + self.perceptron_params + norms * self.norm_params
        )

    @property
    def embedding_params(self) -> int:
        """Of what stands before the first layer."""
        hidden = self.hidden_size
        count = self.vocab_size * self.embedding_size + self.token_types * hidden
        if self.positions == "learned":
            count += self.max_positions * hidden
        if self.positions == "relative":  # of each stack, in its first layer
            count += self.relative_buckets * self.num_heads * (2 if self.encoder_layers else 1)
        if self.embedding_size != hidden:
            count += 2 * hidden * self.embedding_size
        return count + self.norm_params * self.embedding_norm

    @property
    def head_params(self) -> int:
        """Of what stands behind the last layer, and of a norm behind an encoder."""
        stacks = 2 if self.encoder_layers else 1
        count = stacks * self.norm_params * self.final_norm
        if self.head_transform:
            count += self.hidden_size * (self.hidden_size + 1) + self.norm_params
        count += self.vocab_size * self.head_bias
        return count + (0 if self.tied else self.vocab_size * self.hidden_size)

    @property
    def num_params(self) -> int:
        """All parameters, those that are tied counted once."""
        decoder = self.num_layers * self.layer_params(cross=self.encoder_layers > 0)
        encoder = self.encoder_layers * self.layer_params()
        return self.embedding_params + encoder + decoder + self.head_params
