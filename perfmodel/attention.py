"""Attention as the operators that autograd records: maps, rotation, scores or one kernel."""

from __future__ import annotations

from perfmodel.maps import INDEX_BYTES, STATISTIC_BYTES, Maps
from perfmodel.tape import Value

__all__ = ["Attention"]


class Attention:
    """Takes down the attention of a model's layers, on one rank."""

    def __init__(self, maps: Maps) -> None:
        model = maps.model
        self._maps, self._model, self._shape = maps, model, maps.shape
        heads = maps.share(model.num_heads)
        self._query = heads * model.head_size
        # Ranks of which several share a head of keys have all of it.
        self._kv = max(1, model.num_kv_heads // maps.shape.tensor) * model.head_size
        self._heads = heads
        self._tables: list[Value] = []
        self._bias: Value | None = None
        self._masks: list[Value] = []
        self._no_bias: list[Value] = []

    def start(self, *, causal: bool) -> None:
        """Take down what all layers of a stack have of positions: tables, or biases of scores."""
        maps, model, shape = self._maps, self._model, self._shape
        element_bytes, pairs = shape.element_bytes, shape.seq_len * shape.seq_len
        if model.positions == "rotary" and shape.kernels.transformers:
            channels = round(model.head_size * model.rotary_share)
            nbytes = 2 * shape.seq_len // shape.context * channels * element_bytes
            self._tables = [maps.writer.run("tables", [], nbytes, trained=False)]
        if shape.kernels.transformers and model.positions != "relative" and not self._fused(None):
            masks = 2 if model.score_softcap else 1  # of all positions, and of those in a window
            nbytes = masks * pairs * element_bytes
            self._masks = [maps.writer.run("masks", [], nbytes, trained=False)]
        if model.positions == "relative":
            self._bias = maps.run(
                "biases",
                [maps.writer.value("buckets", pairs * INDEX_BYTES, trained=False)],
                pairs * self._heads * element_bytes,
                keeps_bytes=pairs * INDEX_BYTES,
                params=model.relative_buckets * self._heads,
            )
            if causal and shape.kernels.transformers:  # zeros that cross-attention adds
                nbytes = pairs * self._heads * element_bytes
                self._no_bias = [maps.writer.run("no biases", [], nbytes, trained=False)]

    def stop(self) -> None:
        """Say that a stack ends, which held what all its layers have of positions."""
        held = [*self._tables, *self._masks, *([] if self._bias is None else [self._bias])]
        if held and self._shape.kernels.transformers:
            self._maps.writer.hold(held)

    def to_itself(self, x: Value, *, causal: bool) -> Value:
        """Take down attention of `x` to its own positions."""
        maps, model = self._maps, self._model
        x = maps.gathered(x)
        rotary = model.positions == "rotary"
        fused = not rotary if model.fused_heads is None else model.fused_heads
        sizes = (self._query, self._kv, self._kv)
        if fused:
            qkv = self._projected(x, sum(sizes))
            q, k, v = maps.writer.view("heads", qkv, *map(maps.bytes, sizes))
        else:
            q, k, v = (self._projected(x, size) for size in sizes)
        straight = q
        if model.head_norms:
            q, k = maps.norm(q, model.head_size), maps.norm(k, model.head_size)
        if rotary:
            k = self._rotated(k)
        if not self._takes_groups:
            k, v = (self._repeated(part) for part in (k, v))
        if rotary:
            q = self._rotated(q)
        out = self._attended(q, k, v, causal=causal, bias=self._bias)
        if straight is not q:
            maps.writer.hold([straight])
        return out

    def to_other(self, x: Value, encoded: Value) -> Value:
        """Take down attention of `x` to what an encoder made."""
        maps = self._maps
        q = self._projected(maps.gathered(x), self._query)
        encoded, size = maps.gathered(encoded), maps.bytes(self._kv)
        if self._model.fused_heads is False:
            k, v = (self._projected(encoded, self._kv) for _ in range(2))
        else:
            k, v = maps.writer.view("heads", self._projected(encoded, 2 * self._kv), size, size)
        if not self._takes_groups:
            k, v = (self._repeated(part) for part in (k, v))
        return self._attended(q, k, v, causal=False)

    # ---- parts -------------------------------------------------------------------------------

    def _projected(self, x: Value, width: int) -> Value:
        model = self._model
        return self._maps.linear(x, model.hidden_size, width, bias=model.attention_bias)

    def _fused(self, bias: Value | None) -> bool:
        kernels = self._shape.kernels
        taken = bias is None or kernels.biased_attention
        dropping = kernels.dropping_attention or not self._model.drops_scores
        return kernels.fused_attention and taken and dropping and not self._model.score_softcap

    @property
    def _takes_groups(self) -> bool:
        return self._shape.kernels.grouped_attention and self._fused(self._bias)

    def _repeated(self, x: Value) -> Value:
        nbytes = self._maps.bytes(self._query)
        return x if x.nbytes == nbytes else self._maps.run("repeat", [x], nbytes)

    def _rotated(self, x: Value) -> Value:
        maps, share = self._maps, self._model.rotary_share
        whole = x
        if share < 1:
            turning = round(x.nbytes * share)
            x, rest = maps.writer.view("rotated part", x, turning, x.nbytes - turning)
        cosine = maps.run("rotate", [x, *self._tables], saves=self._tables)
        one, other = maps.writer.view("halves", x, x.nbytes // 2, x.nbytes // 2)
        turned = maps.run("cat", [maps.run("negate", [other]), one], x.nbytes, passes=True)
        sine = maps.run("rotate", [turned, *self._tables], saves=self._tables)
        rotated = maps.add(cosine, sine)
        if share < 1:
            rotated = maps.run("cat", [rotated, rest], whole.nbytes, passes=True)
        return rotated

    def _attended(
        self, q: Value, k: Value, v: Value, *, causal: bool, bias: Value | None = None
    ) -> Value:
        maps, model, shape = self._maps, self._model, self._shape
        # Scores and their sum over values, of half of all pairs where each sees those before it.
        flops = 4.0 * shape.rows * shape.seq_len * self._query * (0.5 if causal else 1.0)
        added = [self._masked(bias, causal=causal)] if bias is not None else []
        if bias is None and not causal:
            added = self._no_bias
        if self._fused(bias):
            others = (shape.context - 1) * (k.nbytes + v.nbytes)  # keys and values of other ranks
            arriving = min(2, shape.context - 1) * (k.nbytes + v.nbytes)
            mixed = maps.run(
                "attention" if causal else "attention to all",
                [q, k, v, *added],
                q.nbytes,
                saves=[q, k, v, *added],
                saves_output=True,
                keeps_bytes=shape.rows * self._heads * STATISTIC_BYTES,
                matmul_flops=flops,
                network_bytes=float(others),
                backward_network_bytes=float(others),
                workspace_bytes=arriving,
                backward_workspace_bytes=2 * arriving,
            )
            if shape.kernels.attention_follows_queries and model.rotary_share < 1:
                mixed = maps.run("copy", [mixed])  # put together, its queries lie head by head
        else:
            mixed = self._plain(q, k, v, added if bias is not None else [])
        output_bias = model.attention_bias if model.output_bias is None else model.output_bias
        out = maps.linear(mixed, self._query, model.hidden_size, bias=output_bias)
        maps.writer.hold([q, k, v, mixed])
        return maps.reduced(out)

    def _masked(self, bias: Value, *, causal: bool) -> Value:
        """Take down biases where a position sees only those before it."""
        pairs = self._shape.seq_len * self._shape.seq_len
        return self._maps.run("mask", [bias], keeps_bytes=pairs) if causal else bias

    def _plain(self, q: Value, k: Value, v: Value, added: list[Value]) -> Value:
        maps, shape, run = self._maps, self._shape, self._maps.run
        pairs, element_bytes = shape.rows * shape.seq_len, shape.element_bytes
        flops = 2.0 * pairs * self._query
        if shape.kernels.transformers:  # batches of products are not taken of views
            q, k, v = (part if part.base is None else run("copy", [part]) for part in (q, k, v))
        # The kernel that adds biases computes in fp32.
        wide = maps.upcasts and bool(added)
        if wide:
            q, k, v = (maps.cast(part, maps.wide_bytes(part)) for part in (q, k, v))
            element_bytes = STATISTIC_BYTES
        nbytes = pairs * self._heads * element_bytes
        scores = run("scores", [q, k], nbytes, saves=[q, k], matmul_flops=flops)
        if shape.kernels.transformers and not added:
            scores = run("scale", [scores])
        if self._model.score_softcap:
            capped = run("tanh", [run("divide", [scores])], saves_output=True)
            scores = run("multiply", [capped])
        if self._masks:
            scores = run("mask", [scores, *self._masks], passes=True)
        for bias in added:
            scores = maps.add(scores, *maps.writer.view("expand", bias, nbytes))
        upcasts = maps.upcasts and not wide
        likely = run(
            "softmax", [scores], maps.wide_bytes(scores) if upcasts else nbytes, saves_output=True
        )
        chosen = maps.cast(likely, nbytes)
        if self._model.drops_scores:
            chosen = maps.dropped(chosen)
        mixed = run("mix", [chosen, v], q.nbytes, saves=[chosen, v], matmul_flops=flops)
        return maps.cast(mixed, maps.bytes(self._query))
