"""What the layers of a transformer do in PyTorch, operator by operator, taken down on a tape.

Each function takes down one part as plain `torch.nn` code has it, with what autograd saves of it.
Sums of a residual stream, maps, norms and attention are those of PyTorch 2.13; what it saves was
read off its saved-tensor hooks, and the tests hold every part against them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from perfmodel.model import Model
from perfmodel.tape import Tape, TapeWriter, Value

__all__ = ["CPU", "CUDA", "Kernels", "Shape", "tape_of"]

_INDEX_BYTES = 8
# Sums along channels are kept in fp32.
_STATISTIC_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What PyTorch has one kernel for, and what it keeps there."""

    fused_attention: bool = True
    """Scores are not stored; without: as `softmax(q @ k) @ v` has it, with dropout between."""
    fused_rms_norm: bool = False
    mask_bytes: int = 0
    """Of an element that dropout chose; 0: as much as the element."""


CPU = Kernels()
CUDA = Kernels(fused_rms_norm=True, mask_bytes=1)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much of a model's input there is at once."""

    batch: int
    seq_len: int
    element_bytes: int = 4
    """Of an activation and of a parameter as it is computed with."""
    predicted_share: float = 1.0
    """Which part of all positions reaches the head: BERT's guesses 0.15 of them."""
    kernels: Kernels = CPU

    @property
    def tokens(self) -> int:
        """Positions of all sequences."""
        return self.batch * self.seq_len


def tape_of(model: Model, shape: Shape) -> Tape:
    """Return the operators of a forward from tokens to the mean loss.

    A model with an encoder has `shape.seq_len` tokens on either side. Raises ValueError for what a
    model has that no function here takes down.
    """
    unknown = {
        "num_experts": model.num_experts,
        "parallel_residual": model.parallel_residual,
        "head_norms": model.head_norms,
        "norms_per_layer": model.norms_per_layer,
        "head_transform": model.head_transform,
        "embedding_norm": model.embedding_norm,
        "relative positions": model.positions == "relative",
        "embedding_size": model.embedding_size != model.hidden_size,
        "token_types": model.token_types,
    }
    if found := [name for name, has in unknown.items() if has]:
        raise ValueError(f"the bytes of a model with {', '.join(found)} cannot be counted yet")
    return _Layers(model, shape).taken_down()


class _Layers:
    def __init__(self, model: Model, shape: Shape) -> None:
        self._model, self._shape = model, shape
        self._writer = TapeWriter()

    def taken_down(self) -> Tape:
        model, writer = self._model, self._writer
        tokens = writer.value("tokens", self._shape.tokens * _INDEX_BYTES, trained=False)
        inputs = [tokens]
        encoded = None
        if model.encoder_layers:
            x = self._embedding(tokens)
            for _ in range(model.encoder_layers):
                with writer.block():
                    x = self._layer(x, causal=False)
            encoded = self._norm(x) if model.final_norm else x
            tokens = writer.value("targets", tokens.nbytes, trained=False)
            inputs.append(tokens)
        x = self._embedding(tokens)
        for _ in range(model.num_layers):
            with writer.block():
                x = self._layer(x, encoded, causal=model.causal)
        self._head(x)
        writer.hold([x])
        return writer.tape(inputs)

    # ---- operators ---------------------------------------------------------------------------

    def _bytes(self, channels: int) -> int:
        return self._shape.tokens * channels * self._shape.element_bytes

    def _params(self, count: int) -> int:
        return count * self._shape.element_bytes

    def _linear(self, x: Value, channels: int, width: int, *, bias: bool) -> Value:
        return self._writer.run(
            "linear",
            [x],
            self._bytes(width),
            saves=[x],
            param_bytes=self._params(channels * width + width * bias),
            matmul_flops=2.0 * self._shape.tokens * channels * width,
        )

    def _norm(self, x: Value) -> Value:
        layer = self._model.norm == "layer"
        if not layer and not self._shape.kernels.fused_rms_norm:
            return self._rms_norm(x)
        return self._writer.run(
            "layer norm" if layer else "rms norm",
            [x],
            saves=[x],
            keeps_bytes=(1 + layer) * self._statistic_bytes(x),
            param_bytes=self._params((1 + layer) * self._model.hidden_size),
        )

    def _statistic_bytes(self, x: Value) -> int:
        """Return what one number for each position of `x` takes."""
        channel_bytes = self._model.hidden_size * self._shape.element_bytes
        return x.nbytes // channel_bytes * _STATISTIC_BYTES

    def _rms_norm(self, x: Value) -> Value:
        """Without a kernel of its own it is what its formula says, step by step."""
        run, statistic_bytes = self._writer.run, self._statistic_bytes(x)
        square = run("square", [x], saves=[x], backward_workspace_bytes=x.nbytes)
        mean = run("mean", [square], statistic_bytes)
        scale = run("rsqrt", [mean], saves_output=True)
        normed = run(
            "scale", [x, scale], x.nbytes, saves=[x, scale], backward_workspace_bytes=x.nbytes
        )
        return run(
            "weigh",
            [normed],
            saves=[normed],
            param_bytes=self._params(self._model.hidden_size),
            backward_workspace_bytes=x.nbytes,
        )

    def _dropout(self, x: Value) -> Value:
        if not self._model.dropout:
            return x
        shape = self._shape
        mask_bytes = shape.kernels.mask_bytes or shape.element_bytes
        keeps_bytes = x.nbytes // shape.element_bytes * mask_bytes
        return self._writer.run("dropout", [x], keeps_bytes=keeps_bytes)

    def _add(self, *summands: Value) -> Value:
        return self._writer.run("add", summands, passes=True)

    def _embedding(self, tokens: Value) -> Value:
        model, writer = self._model, self._writer
        x = writer.run(
            "embedding",
            [tokens],
            self._bytes(model.hidden_size),
            saves=[tokens],
            param_bytes=self._params(model.vocab_size * model.hidden_size),
            shared_params="tokens" if model.tied or model.encoder_layers else "",
        )
        if model.positions == "learned":
            positions = max(model.max_positions, self._shape.seq_len)
            x = writer.run(
                "add positions",
                [x],
                param_bytes=self._params(positions * model.hidden_size),
                backward_workspace_bytes=self._params(self._shape.seq_len * model.hidden_size),
                shared_params="positions" if model.encoder_layers else "",
                passes=True,
            )
        return self._dropout(x)

    # ---- layers ------------------------------------------------------------------------------

    def _layer(self, x: Value, encoded: Value | None = None, *, causal: bool) -> Value:
        parts: list[Callable[[Value], Value]] = [partial(self._self_attention, causal=causal)]
        if encoded is not None:
            parts.append(partial(self._cross_attention, encoded=encoded))
        parts.append(self._perceptron)
        given = x
        for part in parts:
            if self._model.norm_last:
                x = self._norm(self._add(x, self._dropout(part(x))))
            else:
                normed = self._norm(x)
                out = part(normed)
                self._writer.hold([normed])  # by whoever called the part with it
                x = self._add(x, self._dropout(out))
        self._writer.hold([given])
        return x

    def _self_attention(self, x: Value, *, causal: bool) -> Value:
        model = self._model
        query, kv, bias = model.query_size, model.kv_size, model.attention_bias
        if model.positions != "rotary":
            qkv = self._linear(x, model.hidden_size, query + 2 * kv, bias=bias)
            q, k, v = self._writer.view("heads", qkv, *map(self._bytes, (query, kv, kv)))
            return self._attended(q, k, v, causal=causal)
        straight = self._linear(x, model.hidden_size, query, bias=bias)
        k = self._linear(x, model.hidden_size, kv, bias=bias)
        v = self._linear(x, model.hidden_size, kv, bias=bias)
        k = self._rotated(k)
        if kv < query:
            k, v = (self._writer.run("repeat", [part], straight.nbytes) for part in (k, v))
        out = self._attended(self._rotated(straight), k, v, causal=causal)
        self._writer.hold([straight])
        return out

    def _rotated(self, x: Value) -> Value:
        run = self._writer.run
        cosine = run("rotate", [x])
        one, other = self._writer.view("halves", x, x.nbytes // 2, x.nbytes // 2)
        turned = run("cat", [run("negate", [other]), one], x.nbytes, passes=True)
        return self._add(cosine, run("rotate", [turned]))

    def _cross_attention(self, x: Value, encoded: Value) -> Value:
        model = self._model
        q = self._linear(x, model.hidden_size, model.query_size, bias=model.attention_bias)
        pairs = self._linear(
            encoded, model.hidden_size, 2 * model.kv_size, bias=model.attention_bias
        )
        size = self._bytes(model.kv_size)
        k, v = self._writer.view("heads", pairs, size, size)
        return self._attended(q, k, v, causal=False)

    def _attended(self, q: Value, k: Value, v: Value, *, causal: bool) -> Value:
        model, shape = self._model, self._shape
        # Scores and their sum over values, of half of all pairs where each sees those before it.
        flops = 4.0 * shape.tokens * shape.seq_len * model.query_size * (0.5 if causal else 1.0)
        if shape.kernels.fused_attention:
            mixed = self._writer.run(
                "attention",
                [q, k, v],
                saves=[q, k, v],
                saves_output=True,
                keeps_bytes=shape.tokens * model.num_heads * _STATISTIC_BYTES,
                matmul_flops=flops,
            )
        else:
            mixed = self._plain_attention(q, k, v)
        output_bias = model.attention_bias if model.output_bias is None else model.output_bias
        out = self._linear(mixed, model.query_size, model.hidden_size, bias=output_bias)
        self._writer.hold([q, k, v, mixed])
        return out

    def _plain_attention(self, q: Value, k: Value, v: Value) -> Value:
        run, shape = self._writer.run, self._shape
        pairs = shape.tokens * shape.seq_len
        nbytes = pairs * self._model.num_heads * shape.element_bytes
        flops = 2.0 * pairs * self._model.query_size
        scores = run("scores", [q, k], nbytes, saves=[q, k], matmul_flops=flops)
        chosen = self._dropout(run("softmax", [scores], saves_output=True))
        return run("mix", [chosen, v], q.nbytes, saves=[chosen, v], matmul_flops=flops)

    def _perceptron(self, x: Value) -> Value:
        model, writer = self._model, self._writer
        hidden, inner, bias = model.hidden_size, model.ffn_size, model.ffn_bias
        up = self._linear(x, hidden, inner, bias=bias)
        # ReLU's backward needs its output, which the next map saves as well.
        active = writer.run(
            model.activation,
            [up],
            saves=[] if model.activation == "relu" else [up],
            saves_output=model.activation == "relu",
        )
        if model.gated:
            other = self._linear(x, hidden, inner, bias=bias)
            active = writer.run("gate", [active, other], saves=[active, other])
        return self._linear(active, inner, hidden, bias=bias)

    def _head(self, x: Value) -> Value:
        model, writer = self._model, self._writer
        share = self._shape.predicted_share
        if share < 1:
            x = writer.run("choose", [x], round(x.nbytes * share))
        if model.final_norm:
            x = self._norm(x)
        tokens = round(self._shape.tokens * share)
        logits = writer.run(
            "linear",
            [x],
            tokens * model.vocab_size * self._shape.element_bytes,
            saves=[x],
            param_bytes=self._params(model.vocab_size * (model.hidden_size + model.head_bias)),
            shared_params="tokens" if model.tied else "",
            matmul_flops=2.0 * tokens * model.hidden_size * model.vocab_size,
        )
        logits_bytes = tokens * model.vocab_size * _STATISTIC_BYTES
        likely = writer.run("log softmax", [logits], logits_bytes, saves_output=True)
        return writer.run("mean loss", [likely], _STATISTIC_BYTES, saves=[likely])
