"""The models that `train_gpt.py` trains, in plain `torch.nn`; they know nothing of what moves.

Each maps a window of tokens and their successors to a loss, so that all are trained alike, and
runs every layer through `run(layer, *inputs)`, in which a caller may do more than call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.tokens import segmented_cross_entropy

__all__ = [
    "BERT",
    "GPT",
    "MODELS",
    "T5",
    "Llama",
    "ModelConfig",
    "Run",
    "call",
    "perceptrons",
    "recompute",
]

Run = Callable[..., Any]
MASKED = 0.15  # of the tokens, for BERT to guess


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model; raises ValueError where heads do not divide what they share."""

    vocab_size: int = 256
    seq_len: int
    num_layers: int
    hidden_size: int
    num_heads: int
    dropout: float = 0.0
    segment_tokens: int = 0
    """Whose logits are there at once; 0: all."""

    def __post_init__(self) -> None:
        """Check that every head gets the same number of channels."""
        if self.hidden_size % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide {self.hidden_size} channels")


def call(layer: Run, *inputs: Tensor) -> Tensor:
    """Run a layer and nothing else."""
    out: Tensor = layer(*inputs)
    return out


def recompute(layer: Run, *inputs: Tensor) -> Tensor:
    """Run a layer of which only the inputs are saved; the backward runs it again."""
    if not torch.is_grad_enabled():
        return call(layer, *inputs)
    out: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
    return out


# ---- What layers are made of ---------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Attention by whichever kernel `scaled_dot_product_attention` chooses."""

    def __init__(self, config: ModelConfig, *, causal: bool, bias: bool = True) -> None:
        super().__init__()
        self.num_heads, self.causal = config.num_heads, causal
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix [batch, position, channel] along positions; `causal`: each sees those before it."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3)
        q, k, v = heads.unbind(2)
        mixed: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Attention of a decoder to what an encoder made of its own window."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key_value = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, encoded: Tensor) -> Tensor:
        """Mix `encoded` [batch, other position, channel] into [batch, position, channel]."""
        q = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        pairs = self.key_value(encoded).unflatten(-1, (2, self.num_heads, -1)).transpose(1, 3)
        k, v = pairs.unbind(2)
        mixed: Tensor = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return out


class GroupedAttention(nn.Module):
    """Causal attention with rotary positions, in which groups of heads share keys and values."""

    rotation: Tensor
    placed = False
    """Whether it is told where its tokens stand, since it may be given some of a window's."""

    def __init__(self, config: ModelConfig, *, base: float = 10_000.0) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.group = next(n for n in (4, 3, 2, 1) if config.num_heads % n == 0)
        self.head_size = config.hidden_size // config.num_heads
        if self.head_size % 2:
            raise ValueError(f"heads of {self.head_size} channels cannot be rotated in pairs")
        shared = config.hidden_size // self.group
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, shared, bias=False)
        self.value = nn.Linear(config.hidden_size, shared, bias=False)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        frequencies = base ** -(torch.arange(0, self.head_size, 2) / self.head_size)
        angles = torch.outer(torch.arange(config.seq_len), frequencies).repeat(1, 2)
        self.register_buffer(
            "rotation", torch.stack((angles.cos(), angles.sin())), persistent=False
        )

    def rotate(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Turn pairs of channels of [batch, head, position, channel] by their position's angle."""
        of_all = (
            self.rotation[:, : x.shape[2]] if positions is None else self.rotation[:, positions]
        )
        cos, sin = of_all.to(x.dtype)
        one, other = x.chunk(2, -1)
        turned: Tensor = x * cos + torch.cat((-other, one), -1) * sin
        return turned

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Mix [batch, position, channel] along positions, each seeing only those before it.

        `position_ids` [1, position]: where they stand in the window; None: at its beginning.
        """
        at = None if position_ids is None else position_ids[0]
        q, k, v = (
            part(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        # Repeated, because not every kernel takes groups.
        k, v = (part.repeat_interleave(self.group, 1) for part in (self.rotate(k, at), v))
        mixed: Tensor = F.scaled_dot_product_attention(self.rotate(q, at), k, v, is_causal=True)
        out: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """A perceptron with a gate, of about as many parameters as one without has at 4 × hidden."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = -(-8 * config.hidden_size // 3 // 32) * 32
        self.gate = nn.Linear(config.hidden_size, width, bias=False)
        self.up = nn.Linear(config.hidden_size, width, bias=False)
        self.down = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, position, channel] to the same shape."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def perceptron(config: ModelConfig, activation: nn.Module, *, bias: bool = True) -> nn.Sequential:
    """Return two linear maps, four times as wide in between."""
    return nn.Sequential(
        nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=bias),
        activation,
        nn.Linear(4 * config.hidden_size, config.hidden_size, bias=bias),
    )


class Layer(nn.Module):
    """Parts one after the other, each on top of the residual stream; norms before or behind."""

    def __init__(
        self,
        config: ModelConfig,
        parts: Sequence[nn.Module],
        norm: type[nn.Module],
        *,
        norm_last: bool = False,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(norm(config.hidden_size) for _ in parts)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_last = norm_last

    def forward(self, x: Tensor, *encoded: Tensor) -> Tensor:
        """Map [batch, position, channel] to the same shape."""
        for norm, part in zip(self.norms, self.parts, strict=True):
            other = encoded if isinstance(part, CrossAttention) else ()
            named = {}
            if isinstance(part, GroupedAttention) and part.placed:
                named["position_ids"] = torch.arange(x.shape[1], device=x.device)[None]
            if self.norm_last:
                x = norm(x + self.dropout(part(x, *other)))
            else:
                x = x + self.dropout(part(norm(x), *other, **named))
        return x


def perceptrons(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what treats every token alone."""
    for layer in model.modules():
        for part in layer.parts if isinstance(layer, Layer) else ():
            if isinstance(part, SwiGLU | nn.Sequential):
                yield part


class Embedding(nn.Module):
    """Tokens and, unless attention knows them, learned positions."""

    def __init__(self, config: ModelConfig, *, positions: bool = True, extra: int = 0) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size + extra, config.hidden_size)
        self.position = nn.Embedding(config.seq_len, config.hidden_size) if positions else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [batch, position] to [batch, position, channel]."""
        x = self.token(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        out: Tensor = self.dropout(x)
        return out


def initialise(module: nn.Module) -> None:
    """Give linear maps and embeddings small random weights."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def head_of(config: ModelConfig, norm: type[nn.Module]) -> nn.Sequential:
    """Return what makes logits of the last layer's output."""
    return nn.Sequential(
        norm(config.hidden_size), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    )


def loss_of(head: nn.Module, x: Tensor, targets: Tensor, segment_tokens: int) -> Tensor:
    """Return the mean loss of [..., channel], with all logits at once or a segment's at a time."""
    if not segment_tokens:
        return F.cross_entropy(head(x).flatten(0, -2), targets.flatten())
    params = [*head.parameters()]
    return segmented_cross_entropy(x, head, targets, params=params, segment_tokens=segment_tokens)


# ---- The models ----------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Layers that predict each token's successor; what they are made of, a subclass says."""

    def __init__(
        self, config: ModelConfig, run: Run, norm: type[nn.Module], *, positions: bool
    ) -> None:
        super().__init__()
        self.run, self.segment_tokens = run, config.segment_tokens
        self.embedding = Embedding(config, positions=positions)
        self.layers = nn.ModuleList(
            Layer(config, self.parts(config), norm) for _ in range(config.num_layers)
        )
        self.head = head_of(config, norm)
        self.apply(initialise)

    @staticmethod
    def parts(config: ModelConfig) -> list[nn.Module]:
        """Return what a layer consists of."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, successors: Tensor) -> Tensor:
        """Return the mean loss over [batch, position]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = self.run(layer, x)
        return loss_of(self.head, x, successors, self.segment_tokens)


class GPT(Decoder):
    """A decoder of layer norms, GELU and learned positions."""

    def __init__(self, config: ModelConfig, run: Run = call) -> None:
        super().__init__(config, run, nn.LayerNorm, positions=True)

    @staticmethod
    def parts(config: ModelConfig) -> list[nn.Module]:
        """Return attention and a perceptron."""
        return [SelfAttention(config, causal=True), perceptron(config, nn.GELU())]


class Llama(Decoder):
    """A decoder with RMSNorm, SwiGLU, rotary positions and grouped-query attention."""

    def __init__(self, config: ModelConfig, run: Run = call) -> None:
        super().__init__(config, run, nn.RMSNorm, positions=False)

    @staticmethod
    def parts(config: ModelConfig) -> list[nn.Module]:
        """Return attention and a gated perceptron."""
        return [GroupedAttention(config), SwiGLU(config)]


class BERT(nn.Module):
    """An encoder that guesses the tokens that were hidden from it."""

    def __init__(self, config: ModelConfig, run: Run = call) -> None:
        super().__init__()
        self.run, self.segment_tokens = run, config.segment_tokens
        self.hidden_token = config.vocab_size
        self.embedding = Embedding(config, extra=1)
        self.layers = nn.ModuleList(
            Layer(
                config,
                [SelfAttention(config, causal=False), perceptron(config, nn.GELU())],
                nn.LayerNorm,
                norm_last=True,
            )
            for _ in range(config.num_layers)
        )
        self.head = head_of(config, nn.LayerNorm)
        self.apply(initialise)

    def forward(self, tokens: Tensor, successors: Tensor) -> Tensor:
        """Return the mean loss over the hidden ones of `tokens`; their successors are not used."""
        hidden = torch.rand(tokens.shape, device=tokens.device) < MASKED
        hidden[:, 0] |= ~hidden.any(1)
        x = self.embedding(tokens.masked_fill(hidden, self.hidden_token))
        for layer in self.layers:
            x = self.run(layer, x)
        return loss_of(self.head, x[hidden], tokens[hidden], self.segment_tokens)


class T5(nn.Module):
    """An encoder of a window's first half, and a decoder that goes on with the second.

    Positions are learned vectors instead of T5's biases, for which no fused kernel has a gradient.
    """

    def __init__(self, config: ModelConfig, run: Run = call) -> None:
        super().__init__()
        self.run, self.segment_tokens = run, config.segment_tokens
        self.embedding = Embedding(config)
        self.encoder, self.decoder = (
            nn.ModuleList(
                Layer(config, self._parts(config, decoder=decoder), nn.RMSNorm)
                for _ in range(config.num_layers)
            )
            for decoder in (False, True)
        )
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = head_of(config, nn.RMSNorm)
        self.apply(initialise)

    @staticmethod
    def _parts(config: ModelConfig, *, decoder: bool) -> list[nn.Module]:
        return [
            SelfAttention(config, causal=decoder, bias=False),
            *([CrossAttention(config)] if decoder else []),
            perceptron(config, nn.ReLU(), bias=False),
        ]

    def forward(self, tokens: Tensor, successors: Tensor) -> Tensor:
        """Return the mean loss over the second half of [batch, position]."""
        middle = tokens.shape[1] // 2
        encoded = self.embedding(tokens[:, :middle])
        for layer in self.encoder:
            encoded = self.run(layer, encoded)
        encoded = self.norm(encoded)
        x = self.embedding(tokens[:, middle:])
        for layer in self.decoder:
            x = self.run(layer, x, encoded)
        return loss_of(self.head, x, successors[:, middle:], self.segment_tokens)


MODELS: dict[str, Callable[[ModelConfig, Run], nn.Module]] = {
    "gpt": GPT,
    "bert": BERT,
    "t5": T5,
    "llama": Llama,
}
