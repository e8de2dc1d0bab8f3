"""The perceptron of a layer as the operators that autograd records, or the experts in its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from perfmodel.maps import INDEX_BYTES, STATISTIC_BYTES, Maps
from perfmodel.tape import Value

__all__ = ["Perceptron"]

_FUSED = ("gelu", "gelu_tanh", "silu")  # with a gate: Megatron's kernels
_OFFSET_BYTES = 4  # where each expert's tokens end


class Perceptron:
    """Takes down the perceptrons of a model's layers, on one rank."""

    def __init__(self, maps: Maps) -> None:
        self._maps, self._model, self._shape = maps, maps.model, maps.shape
        self._inner = maps.share(maps.model.ffn_size)

    def mapped(self, x: Value) -> Value:
        """Take down what stands behind attention in a layer."""
        if self._model.num_experts:
            return self._chosen(x)
        maps, hidden, inner = self._maps, self._model.hidden_size, self._inner
        bias = self._model.ffn_bias
        x = maps.gathered(x)
        active = maps.linear(x, hidden, inner, bias=bias)
        if self._model.gated:
            # Its map comes behind the activation.
            active = self._gated(active, lambda: maps.linear(x, hidden, inner, bias=bias))
        else:
            active = self.activated(active)
        if self._shape.kernels.transformers and self._model.positions == "relative":
            active = maps.dropout(active)  # T5's
        return maps.reduced(maps.linear(active, inner, hidden, bias=bias))

    def _gated(self, gate: Value, mapped: Callable[[], Value]) -> Value:
        """Take down an activated gate times the other part, which `mapped` takes down."""
        if self._shape.kernels.fused_gate and self._model.activation in _FUSED:
            both = [gate, mapped()]
        else:
            both = [self.activated(gate), mapped()]
        return self._maps.run("gate", both, saves=both)

    def activated(self, x: Value) -> Value:
        """Take down the activation of a model."""
        kind = self._model.activation
        if kind == "gelu_new":
            return self._gelu_by_its_formula(x)
        # ReLU's backward needs its output, which the next map saves as well.
        relu = kind == "relu"
        return self._maps.run(kind, [x], saves=[] if relu else [x], saves_output=relu)

    def _gelu_by_its_formula(self, x: Value) -> Value:
        run, add = self._maps.run, self._maps.add
        half = run("half", [x])
        cube = run("cube", [x], saves=[x], backward_workspace_bytes=x.nbytes)
        inner = run("multiply", [add(x, run("multiply", [cube]))])
        one_more = add(run("tanh", [inner], saves_output=True))
        return run("multiply", [half, one_more], saves=[half, one_more])

    # ---- experts -----------------------------------------------------------------------------

    def _chosen(self, x: Value) -> Value:
        """Take down experts that each map the tokens that chose them, sorted, and equally many."""
        maps, model, run = self._maps, self._model, self._maps.run
        weights = self._routed(x)
        x = maps.gathered(x)
        rows = self._shape.rows * model.experts_per_token
        channel_bytes = rows * self._shape.element_bytes
        index_bytes = rows * INDEX_BYTES
        weights = run("sort", [weights], rows * STATISTIC_BYTES, keeps_bytes=index_bytes)
        chosen = run(
            "choose",
            [x],
            channel_bytes * model.hidden_size,
            keeps_bytes=index_bytes + model.num_experts * _OFFSET_BYTES,
        )
        out = self._expert_maps(chosen, rows)
        # Weights in fp32 make a product that is.
        nbytes = maps.wide_bytes(out) if maps.upcasts else out.nbytes
        weighed = run("weigh", [out, weights], nbytes, saves=[out, weights])
        sorted_back = run("sort back", [weighed], keeps_bytes=index_bytes)
        summed = run("sum", [sorted_back], nbytes // model.experts_per_token)
        maps.writer.hold([chosen, out, weighed, sorted_back])
        return maps.reduced(maps.cast(summed, maps.bytes(model.hidden_size)))

    def _routed(self, x: Value) -> Value:
        """Take down how each token's experts are chosen; return their weights, in fp32."""
        maps, model, run = self._maps, self._model, self._maps.run
        rows = self._shape.stream_rows
        logits = maps.one_map(x, model.hidden_size, model.num_experts, rows=rows)
        likely = run(
            "softmax", [logits], rows * model.num_experts * STATISTIC_BYTES, saves_output=True
        )
        best_bytes = rows * model.experts_per_token * STATISTIC_BYTES
        best = run(
            "top k",
            [likely],
            best_bytes,
            keeps_bytes=rows * model.experts_per_token * INDEX_BYTES,
        )
        total = run("sum", [best], rows * STATISTIC_BYTES)
        return run("divide", [best, total], best_bytes, saves=[best, total])

    def _expert_maps(self, x: Value, rows: int) -> Value:
        maps, model, inner = self._maps, self._model, self._inner
        experts, hidden = model.num_experts, model.hidden_size
        one = partial(maps.linear, bias=model.ffn_bias, rows=rows, copies=experts)
        if not model.gated:
            active = self.activated(one(x, hidden, inner))
        elif maps.lora_rank:  # each has adapters of its own
            active = self._gated(one(x, hidden, inner), lambda: one(x, hidden, inner))
        else:
            both = one(x, hidden, 2 * inner)
            gate, other = maps.writer.view("parts", both, both.nbytes // 2, both.nbytes // 2)
            active = self._gated(gate, lambda: other)
        return one(active, inner, hidden)
