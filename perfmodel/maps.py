"""What every layer is made of, taken down on a tape: maps, norms, dropout, sums.

As plain `torch.nn` code or Megatron's has it, with what autograd saves of each. It was read off
the saved-tensor hooks of PyTorch 2.13, and the tests hold every part against them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from perfmodel.model import Model
from perfmodel.shape import Shape
from perfmodel.tape import TapeWriter, Value

__all__ = ["INDEX_BYTES", "STATISTIC_BYTES", "Maps"]

INDEX_BYTES = 8
STATISTIC_BYTES = 4
"""Sums along channels are kept in fp32."""


class Maps:
    """Takes down parts of a model as one rank of `shape` has them.

    With `lora_rank`, nothing is trained but a pair of matrices of that rank beside each map.
    """

    def __init__(self, model: Model, shape: Shape, lora_rank: int = 0) -> None:
        self.model, self.shape, self.lora_rank = model, shape, lora_rank
        self.writer = TapeWriter()
        self._shards: dict[Value, Value] = {}  # of what was gathered

    # ---- sizes -------------------------------------------------------------------------------

    def share(self, channels: int) -> int:
        """Return what a rank has of channels that ranks share."""
        return -(-channels // self.shape.tensor)

    def bytes(self, channels: int) -> int:
        """Return the size of an activation between the maps of a layer."""
        return self.shape.rows * channels * self.shape.element_bytes

    @property
    def stream_bytes(self) -> int:
        """The size of the residual stream."""
        return self.shape.stream_rows * self.model.hidden_size * self.shape.element_bytes

    def wide_bytes(self, x: Value) -> int:
        """Return the size of a value in fp32."""
        return x.nbytes // self.shape.element_bytes * STATISTIC_BYTES

    @property
    def upcasts(self) -> bool:
        """Transformers compute norms, softmax and the loss in fp32, of copies."""
        return self.shape.kernels.transformers and self.shape.element_bytes < STATISTIC_BYTES

    def sent_bytes(self, nbytes: int, times: int = 1) -> float:
        """Return what a rank of a ring sends of so many bytes; an all-reduce goes round twice."""
        ranks = self.shape.tensor
        return times * nbytes * (ranks - 1) / ranks

    # ---- operators ---------------------------------------------------------------------------

    def run(
        self,
        name: str,
        reads: Iterable[Value],
        nbytes: int | None = None,
        *,
        params: int = 0,
        adapter: bool = False,
        saves: Iterable[Value] = (),
        saves_for_params: Iterable[Value] = (),
        shared_params: str = "",
        **more: Any,
    ) -> Value:
        """Take down an operator with `params` parameters, of which only an `adapter`'s need train.

        It saves nothing where no gradient is wanted of anything, and `saves_for_params` only for
        that of parameters.
        """
        reads = tuple(reads)
        param_bytes = params * self.shape.element_bytes
        learns = bool(params) and (adapter or not self.lora_rank)
        wanted = learns or not reads or any(value.trained for value in reads)
        if not wanted:
            more |= {"saves_output": False, "keeps_bytes": 0}
        gradients = learns + any(value.trained for value in reads) if params else 2 * wanted
        return self.writer.run(
            name,
            reads,
            nbytes,
            saves=(*saves, *(saves_for_params if learns else ())) if wanted else (),
            param_bytes=param_bytes if learns else 0,
            frozen_bytes=0 if learns else param_bytes,
            shared_params=shared_params if learns else "",
            matmul_gradients=gradients,
            trained=wanted,
            **more,
        )

    def add(self, *summands: Value) -> Value:
        """Take down a sum, whose gradient is that of each."""
        return self.run("add", summands, passes=True)

    def cast(self, x: Value, nbytes: int) -> Value:
        """Take down a copy in another precision, or nothing if it is the same."""
        return x if x.nbytes == nbytes else self.run("cast", [x], nbytes)

    def gathered(self, x: Value) -> Value:
        """Take down what ranks that each have a part of `x` put together before a map.

        The map saves the part; the backward gathers it once more.
        """
        if not self.shape.sequence or self.shape.tensor == 1:
            return x
        nbytes = x.nbytes * self.shape.tensor
        sent = self.sent_bytes(nbytes)
        whole = self.run("gather", [x], nbytes, network_bytes=sent, backward_network_bytes=sent)
        self._shards[whole] = x
        return whole

    def linear(
        self, x: Value, channels: int, width: int, *, bias: bool, rows: int = 0, copies: int = 1
    ) -> Value:
        """Take down a map from a rank's `channels` to its `width`, and what is trained beside it.

        `copies`: so many of them have a part of the `rows` each.
        """
        rows, rank = rows or self.shape.rows, self.lora_rank
        one = partial(self.one_map, rows=rows, copies=copies)
        out = one(x, channels, width, bias=bias)
        if not rank:
            return out
        inner = one(x, channels, rank, adapter=True)
        return self.add(out, self.run("scale", [one(inner, rank, width, adapter=True)]))

    def one_map(
        self,
        x: Value,
        channels: int,
        width: int,
        *,
        bias: bool = False,
        rows: int = 0,
        copies: int = 1,
        adapter: bool = False,
        shared_params: str = "",
    ) -> Value:
        """Take down a map with nothing beside it."""
        shard, rows = self._shards.get(x), rows or self.shape.rows
        return self.run(
            "linear",
            [x],
            rows * width * self.shape.element_bytes,
            saves_for_params=[x if shard is None else shard],
            params=copies * width * (channels + bias),
            adapter=adapter,
            shared_params=shared_params,
            matmul_flops=2.0 * rows * channels * width,
            backward_workspace_bytes=0 if shard is None else x.nbytes,
        )

    def reduced(self, x: Value) -> Value:
        """Take down how ranks add up what each has made of its channels."""
        if self.shape.tensor == 1:
            return x
        if self.shape.sequence:
            part = x.nbytes // self.shape.tensor
            return self.run("scatter", [x], part, network_bytes=self.sent_bytes(x.nbytes))
        [whole] = self.writer.view("reduce", x, network_bytes=self.sent_bytes(x.nbytes, 2))
        return whole

    def dropout(self, x: Value) -> Value:
        """Take down what a model drops of `x`, if anything."""
        return self.dropped(x) if self.model.dropout else x

    def dropped(self, x: Value) -> Value:
        """Take down dropout."""
        mask_bytes = self.shape.kernels.mask_bytes or self.shape.element_bytes
        keeps_bytes = x.nbytes // self.shape.element_bytes * mask_bytes
        return self.run("dropout", [x], keeps_bytes=keeps_bytes)

    # ---- norms -------------------------------------------------------------------------------

    def norm(self, x: Value, channels: int = 0) -> Value:
        """Take down the norm of a model's kind, over `channels` if not the hidden ones."""
        channels, kernels = channels or self.model.hidden_size, self.shape.kernels
        layer = self.model.norm == "layer"
        statistic_bytes = x.nbytes // (channels * self.shape.element_bytes) * STATISTIC_BYTES
        if not layer and (kernels.transformers or not kernels.fused_rms_norm):
            return self._rms_norm(x, channels, statistic_bytes)
        return self.run(
            "layer norm" if layer else "rms norm",
            [x],
            saves=[x],
            keeps_bytes=(1 + layer) * statistic_bytes,
            params=(1 + layer) * channels,
        )

    def _rms_norm(self, x: Value, channels: int, statistic_bytes: int) -> Value:
        """Without a kernel of its own it is what its formula says, step by step."""
        nbytes = self.wide_bytes(x) if self.upcasts else x.nbytes
        wide = self.cast(x, nbytes)
        copies = 2 if self.shape.kernels.transformers else 1  # of which the power makes one more
        square = self.run("square", [wide], saves=[wide], backward_workspace_bytes=copies * nbytes)
        mean = self.run("mean", [square], statistic_bytes)
        scale = self.run("rsqrt", [mean], saves_output=True)
        # T5's multiplies what came in, not its copy.
        scaled = x if self.model.positions == "relative" else wide
        normed = self.run(
            "scale", [scaled, scale], nbytes, saves=[scaled, scale], backward_workspace_bytes=nbytes
        )
        if not self.model.norm_offset:
            normed = self.cast(normed, x.nbytes)
        weighed = self.run(
            "weigh",
            [normed],
            saves_for_params=[normed],
            keeps_bytes=channels * STATISTIC_BYTES if self.model.norm_offset else 0,
            params=channels,
            backward_workspace_bytes=normed.nbytes,
        )
        return self.cast(weighed, x.nbytes)
