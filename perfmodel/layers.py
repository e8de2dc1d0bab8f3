"""What a transformer does in PyTorch, operator by operator, taken down on a tape.

A whole model, a stage of a pipeline, one rank's share of either, or a model of which only adapters
are trained. Layers are made of `maps`, `attention` and `perceptron`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from perfmodel.attention import Attention
from perfmodel.maps import INDEX_BYTES, STATISTIC_BYTES, Maps
from perfmodel.model import Model
from perfmodel.perceptron import Perceptron
from perfmodel.shape import (
    CPU,
    CUDA,
    MEGATRON,
    TRANSFORMERS,
    TRANSFORMERS_CUDA,
    Kernels,
    Shape,
)
from perfmodel.tape import Tape, Value

__all__ = [
    "CPU",
    "CUDA",
    "MEGATRON",
    "TRANSFORMERS",
    "TRANSFORMERS_CUDA",
    "Kernels",
    "Shape",
    "stage_tape",
    "tape_of",
]


def tape_of(model: Model, shape: Shape, *, lora_rank: int = 0) -> Tape:
    """Return the operators of a forward from tokens to the mean loss, on one rank.

    A model with an encoder has `shape.seq_len` tokens on either side. With `lora_rank`, only a pair
    of matrices of that rank beside each map of a layer is trained. Raises ValueError where ranks
    cannot share the model.
    """
    return stage_tape(
        model, shape, range(model.num_layers), first=True, last=True, lora_rank=lora_rank
    )


def stage_tape(
    model: Model, shape: Shape, layers: range, *, first: bool, last: bool, lora_rank: int = 0
) -> Tape:
    """Return the operators of a pipeline's stage that has these `layers` of the model.

    `first`: it begins with tokens, and otherwise with what it is sent; `last`: it ends with the
    loss. What stages send each other is as large as the residual stream, and on no tape. Raises
    ValueError for layers that are not the model's, or a model with an encoder in several stages.
    """
    shape.check(model)
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= model.num_layers:
        raise ValueError(f"layers={layers} are not some of num_layers={model.num_layers} in a row")
    whole = first and last and len(layers) == model.num_layers
    if model.encoder_layers and not whole:
        raise ValueError(
            f"a pipeline cannot cut a model with encoder_layers={model.encoder_layers}; all "
            "of it is one stage (pipeline=1)"
        )
    return _Layers(Maps(model, shape, lora_rank)).taken_down(layers, first=first, last=last)


class _Layers:
    def __init__(self, maps: Maps) -> None:
        self._maps, self._model, self._shape = maps, maps.model, maps.shape
        self._writer = maps.writer
        self._attention, self._perceptron = Attention(maps), Perceptron(maps)

    def taken_down(self, layers: range, *, first: bool, last: bool) -> Tape:
        model, writer = self._model, self._writer
        inputs = [self._tokens("tokens")] if first or last else []
        encoded = None
        if model.encoder_layers:
            x = self._embedding(inputs[0], behind_head=False)
            self._attention.start(causal=False)
            for _ in range(model.encoder_layers):
                with writer.block():
                    x = self._layer(x, causal=False)
            self._attention.stop()
            encoded = self._maps.norm(x) if model.final_norm else x
            inputs.append(self._tokens("targets"))
        if first:
            x = self._embedding(inputs[-1], behind_head=last)
        else:
            x = self._maps.run("receive", [], self._maps.stream_bytes)
        self._attention.start(causal=model.causal)
        for _ in layers:
            with writer.block():
                x = self._layer(x, encoded, causal=model.causal)
        self._attention.stop()
        if last:
            self._head(x)
        writer.hold([x])
        return writer.tape(inputs)

    # ---- before and behind the layers --------------------------------------------------------

    def _tokens(self, name: str) -> Value:
        return self._writer.value(name, self._shape.rows * INDEX_BYTES, trained=False)

    def _embedding(self, tokens: Value, *, behind_head: bool) -> Value:
        model, maps, shape = self._model, self._maps, self._shape
        table = model.embedding_size
        params = maps.share(model.vocab_size) * table
        # The head's gradient is transposed, so that this one is not added to it in place.
        summed = params * shape.element_bytes if model.tied and behind_head else 0
        x = maps.run(
            "embedding",
            [tokens],
            maps.bytes(table),
            saves_for_params=[tokens],
            params=params,
            backward_workspace_bytes=summed,
            shared_params="tokens" if model.tied or model.encoder_layers else "",
        )
        x = maps.reduced(x)
        if table != model.hidden_size:
            x = maps.one_map(x, table, model.hidden_size, rows=shape.stream_rows)
        if model.token_types:
            x = self._looked_up(x, "types", model.token_types, workspace_bytes=x.nbytes)
        if model.positions == "learned":
            positions = shape.seq_len // shape.context
            x = self._looked_up(
                x,
                "positions",
                max(model.max_positions, shape.seq_len),
                backward_workspace_bytes=positions * model.hidden_size * shape.element_bytes,
                shared_params="positions" if model.encoder_layers else "",
            )
        if model.embedding_norm:
            x = maps.norm(x)
        return maps.dropout(x)

    def _looked_up(self, x: Value, name: str, count: int, **more: Any) -> Value:
        """Take down the sum of `x` and what a table has for each of its positions."""
        shape = self._shape
        made = shape.kernels.transformers and (name == "types" or not self._model.token_types)
        ids = INDEX_BYTES * shape.seq_len // shape.context if made else 0
        params = count * self._model.hidden_size
        return self._maps.run(
            f"add {name}", [x], params=params, keeps_bytes=ids, passes=True, **more
        )

    def _head(self, x: Value) -> Value:
        model, maps, shape = self._model, self._maps, self._shape
        share = shape.predicted_share
        if share < 1:
            x = maps.run("choose", [x], round(x.nbytes * share))
        if model.final_norm:
            x = maps.norm(x)
        tokens, stream_tokens = round(shape.rows * share), round(shape.stream_rows * share)
        hidden, table = model.hidden_size, model.embedding_size
        if model.head_transform:
            x = maps.one_map(x, hidden, hidden, bias=True, rows=stream_tokens)
            x = maps.norm(self._perceptron.activated(x))
        if table != hidden:
            x = maps.one_map(x, hidden, table, rows=stream_tokens)
        logits = maps.one_map(
            maps.gathered(x),
            table,
            maps.share(model.vocab_size),
            bias=model.head_bias,
            rows=tokens,
            shared_params="tokens" if model.tied else "",
        )
        if model.head_softcap:
            capped = maps.run("tanh", [maps.run("divide", [logits])], saves_output=True)
            logits = maps.run("multiply", [capped])
        return self._loss(logits, tokens)

    def _loss(self, logits: Value, tokens: int) -> Value:
        model, maps, written = self._model, self._maps, self._shape.kernels.transformers
        nbytes, labels_bytes, given = maps.wide_bytes(logits), 0, logits
        if written and (model.encoder_layers or not model.causal):
            nbytes = logits.nbytes  # T5's and BERT's do not go through fp32
        elif written:
            logits = maps.cast(logits, nbytes)
            labels_bytes = tokens * INDEX_BYTES  # of each token's successor
        # The largest, the sum and the right one of each position are those of all ranks.
        sent = maps.sent_bytes(3 * tokens * STATISTIC_BYTES, 2)
        likely = maps.run("log softmax", [logits], nbytes, saves_output=True, network_bytes=sent)
        loss = maps.run(
            "mean loss", [likely], STATISTIC_BYTES, saves=[likely], keeps_bytes=labels_bytes
        )
        if written:
            self._writer.hold([given])
        return loss

    # ---- layers ------------------------------------------------------------------------------

    def _layer(self, x: Value, encoded: Value | None = None, *, causal: bool) -> Value:
        parts: list[Callable[[Value], Value]] = [partial(self._attention.to_itself, causal=causal)]
        if encoded is not None:
            parts.append(partial(self._attention.to_other, encoded=encoded))
        parts.append(self._perceptron.mapped)
        given = x
        x = self._beside(x, parts) if self._model.parallel_residual else self._behind(x, parts)
        self._writer.hold([given])
        return x

    def _behind(self, x: Value, parts: list[Callable[[Value], Value]]) -> Value:
        """Take down parts that each read what those before have added."""
        maps, model = self._maps, self._model
        for part in parts:
            if model.norm_last:
                x = maps.norm(maps.add(x, maps.dropout(part(x))))
                continue
            normed = maps.norm(x)
            out = part(normed)
            self._writer.hold([normed])  # by whoever called the part with it
            if model.norms_per_layer == 2 * len(parts):
                out = maps.norm(out)
            x = maps.add(x, maps.dropout(out))
        return x

    def _beside(self, x: Value, parts: list[Callable[[Value], Value]]) -> Value:
        """Take down parts that all read the same, each through a norm of its own."""
        maps = self._maps
        outs: list[Value] = []
        for part in parts:
            normed = maps.norm(x)
            out = part(normed)
            self._writer.hold([normed])
            outs.append(maps.dropout(out))
        summed = maps.add(*reversed(outs))
        self._writer.hold(outs)
        return maps.add(summed, x)
