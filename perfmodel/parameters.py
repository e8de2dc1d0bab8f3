"""The parameters that one rank has, tensor by tensor, and its share where ZeRO divides them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace
from itertools import chain
from math import prod

from perfmodel.model import Model
from perfmodel.workload import Workload

__all__ = ["Parameter", "flat_gradient_count", "rank_parameters", "zero_count"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor, or this rank's part of one. Raises ValueError for a size that is none."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True

    def __post_init__(self) -> None:
        """Check the shape."""
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape={self.shape} of {self.name!r} must have sizes above 0")

    @property
    def count(self) -> int:
        """How many elements."""
        return prod(self.shape)

    @property
    def layer(self) -> str:
        """Which layer it is of, as `layer 3` or `encoder 0`; empty: of none."""
        kind, _, rest = self.name.partition(" ")
        number = rest.partition(" ")[0]
        return f"{kind} {number}" if kind in ("layer", "encoder") and number.isdigit() else ""


@lru_cache(maxsize=64)  # a planner asks for the same one again and again
def rank_parameters(workload: Workload) -> tuple[Parameter, ...]:
    """Return what a rank has of the model, of the stage with the most, before ZeRO divides it.

    Of `tensor` ranks each has a part of every map and of the token table, by heads, channels or
    tokens; a map's bias with its outputs. Norms, positions and routers are whole on each. Stages
    have as many layers as others, or one fewer; a tied token table is in the first and in the last.
    With LoRA two matrices stand beside each map of a layer, routers left out, and they alone are
    trained. Queries, keys and values are one map, or three, as on a tape.
    """
    model, parallel = workload.model, workload.parallel
    extra = 1 if workload.plain == "bert" else 0  # what stands for a token to guess
    cut = _Cut(model, parallel.tensor, workload.lora_rank, extra)
    layers = [list(cut.layer(f"encoder {at}")) for at in range(model.encoder_layers)]
    cross = model.encoder_layers > 0
    layers += [list(cut.layer(f"layer {at}", cross=cross)) for at in range(model.num_layers)]
    num_parts = parallel.pipeline * parallel.chunks
    few, more = divmod(len(layers), num_parts)
    parts: list[list[Parameter]] = []
    for number in range(num_parts):
        begin = number * few + min(number, more)
        parts.append([*chain(*layers[begin : begin + few + (number < more)])])
    parts[0] = [*cut.embedding(), *parts[0]]
    parts[-1] += cut.head(last=parallel.pipeline > 1)
    stages = [[*chain(*parts[at :: parallel.pipeline])] for at in range(parallel.pipeline)]
    return tuple(max(stages, key=lambda stage: sum(each.count for each in stage)))


def zero_count(workload: Workload, params: Sequence[Parameter]) -> int:
    """Return how many elements of `params` one rank has where ZeRO, if there is any, divides them.

    That is the rank with the most.
    """
    parallel, total = workload.parallel, sum(each.count for each in params)
    stage, ranks = parallel.zero_stage, parallel.data * parallel.context
    if not stage:
        return total
    if workload.framework == "torch":
        if stage == 1:  # ZeroRedundancyOptimizer gives whole tensors to ranks
            return _most_of_whole([each.count for each in params], ranks)
        # FSDP2 divides each tensor by its rows.
        return sum(-(-each.shape[0] // ranks) * prod(each.shape[1:]) for each in params)
    if workload.framework == "deepspeed":
        if stage == 3:
            return sum(-(-each.count // ranks) for each in params)
        return _flat_part(total, ranks)
    return -(-total // ranks)


def flat_gradient_count(params: Sequence[Parameter], ranks: int) -> int:
    """Return the elements of gradients that a rank keeps under DeepSpeed's ZeRO-1 and 2.

    Those of the tensors that reach into its part of all of them, each whole; of the rank with the
    most.
    """
    part, begin = _flat_part(sum(each.count for each in params), ranks), 0
    loads: dict[int, int] = {}
    for each in params:
        # Parts between the first and the last have nothing else, and are no fuller than those.
        for at in {begin // part, (begin + each.count - 1) // part}:
            loads[at] = loads.get(at, 0) + each.count
        begin += each.count
    return max(loads.values(), default=0)


def _flat_part(count: int, ranks: int) -> int:
    """Return the elements of each of as many equal and even parts."""
    return -(-count // (2 * ranks)) * 2


def _most_of_whole(sizes: Sequence[int], ranks: int) -> int:
    """Return the most that a rank gets where the largest go first, each to who has the least."""
    loads = [0] * min(ranks, max(1, len(sizes)))
    heapify(loads)
    for size in sorted(sizes, reverse=True):
        heapreplace(loads, loads[0] + size)
    return max(loads)


class _Cut:
    """Parameters of a model of which each of some ranks has a part."""

    def __init__(self, model: Model, ranks: int, lora_rank: int, extra: int) -> None:
        self._model, self._rank = model, lora_rank
        self._query = model.query_size // ranks
        # Fewer heads of keys than ranks: several have the same one.
        self._kv = -(-model.num_kv_heads // ranks) * model.head_size
        self._ffn = model.ffn_size // ranks
        self._vocab = -(-model.vocab_size // ranks)
        self._tokens = -(-(model.vocab_size + extra) // ranks)

    def _whole(self, name: str, *shape: int) -> Parameter:
        return Parameter(name, shape, trained=not self._rank)

    def _map(self, name: str, channels: int, width: int, *, bias: bool) -> Iterator[Parameter]:
        yield self._whole(f"{name} weight", width, channels)
        if bias:
            yield self._whole(f"{name} bias", width)
        if self._rank:
            yield Parameter(f"{name} adapter in", (self._rank, channels))
            yield Parameter(f"{name} adapter out", (width, self._rank))

    def _norm(self, name: str) -> Iterator[Parameter]:
        yield self._whole(f"{name} weight", self._model.hidden_size)
        if self._model.norm == "layer":
            yield self._whole(f"{name} bias", self._model.hidden_size)

    def embedding(self) -> Iterator[Parameter]:
        """Yield what stands before the first layer."""
        model = self._model
        hidden, size = model.hidden_size, model.embedding_size
        yield self._whole("tokens", self._tokens, size)
        if model.positions == "learned" and model.max_positions:
            yield self._whole("positions", model.max_positions, hidden)
        if model.positions == "relative" and model.relative_buckets:
            for _ in range(2 if model.encoder_layers else 1):
                yield self._whole("relative positions", model.relative_buckets, model.num_heads)
        if model.token_types:
            yield self._whole("token types", model.token_types, hidden)
        if size != hidden:
            yield self._whole("into channels", hidden, size)
            yield self._whole("out of channels", size, hidden)
        if model.embedding_norm:
            yield from self._norm("embedding norm")

    def head(self, *, last: bool) -> Iterator[Parameter]:
        """Yield what stands behind the layers; `last`: in another stage than the token table."""
        model = self._model
        if model.final_norm:
            for _ in range(2 if model.encoder_layers else 1):
                yield from self._norm("final norm")
        if model.head_transform:
            yield self._whole("head transform weight", model.hidden_size, model.hidden_size)
            yield self._whole("head transform bias", model.hidden_size)
            yield from self._norm("head norm")
        if not model.tied:
            yield self._whole("head", self._vocab, model.hidden_size)
        elif last:
            yield self._whole("tokens again", self._tokens, model.embedding_size)
        if model.head_bias:
            yield self._whole("head bias", self._vocab)

    def layer(self, name: str, *, cross: bool = False) -> Iterator[Parameter]:
        """Yield the parameters of one layer; `cross`: with attention to an encoder."""
        model = self._model
        fused = model.positions != "rotary" if model.fused_heads is None else model.fused_heads
        yield from self._attention(f"{name} attention", fused=fused)
        if cross:
            yield from self._attention(f"{name} cross-attention", fused=False)
        yield from self._perceptrons(f"{name} perceptron")
        for _ in range(model.norms_per_layer or (3 if cross else 2)):
            yield from self._norm(f"{name} norm")

    def _attention(self, name: str, *, fused: bool) -> Iterator[Parameter]:
        model, hidden, bias = self._model, self._model.hidden_size, self._model.attention_bias
        if fused:
            yield from self._map(f"{name} qkv", hidden, self._query + 2 * self._kv, bias=bias)
        else:
            yield from self._map(f"{name} query", hidden, self._query, bias=bias)
        if not fused and name.endswith("cross-attention") and model.fused_heads is not False:
            yield from self._map(f"{name} keys and values", hidden, 2 * self._kv, bias=bias)
        elif not fused:
            yield from self._map(f"{name} key", hidden, self._kv, bias=bias)
            yield from self._map(f"{name} value", hidden, self._kv, bias=bias)
        output_bias = bias if model.output_bias is None else model.output_bias
        yield from self._map(f"{name} output", self._query, hidden, bias=output_bias)
        if model.head_norms:
            yield self._whole(f"{name} query norm", model.head_size)
            yield self._whole(f"{name} key norm", model.head_size)

    def _perceptrons(self, name: str) -> Iterator[Parameter]:
        model, hidden, bias = self._model, self._model.hidden_size, self._model.ffn_bias
        for _ in range(max(1, model.num_experts)):
            if model.gated:
                yield from self._map(f"{name} gate", hidden, self._ffn, bias=bias)
            yield from self._map(f"{name} up", hidden, self._ffn, bias=bias)
            yield from self._map(f"{name} down", self._ffn, hidden, bias=bias)
        if model.num_experts:
            yield self._whole(f"{name} router", model.num_experts, hidden)
