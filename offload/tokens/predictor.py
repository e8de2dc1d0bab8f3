"""Two small nets a layer that foretell which blocks of tokens look at which.

LeMo (USENIX ATC '25), section 4.3: one of them for the blocks as queries and one as keys, three
low-rank maps each with ReLU between, and the score of a pair is a product (Eq. 3). Hidden units
that are zero nearly always are pruned while they are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BlockPredictor", "block_means"]

_LEAST_UNITS = 8
"""Of a hidden layer, which stay however often they are zero: without any there is no score."""


class _Net(nn.Module):
    """Three maps without biases, whose hidden units are counted by how often they are zero."""

    def __init__(self, channels: int, low: int, high: int, out: int) -> None:
        super().__init__()
        self.maps: Any = nn.ModuleList(
            nn.Linear(a, b, bias=False) for a, b in ((channels, low), (low, high), (high, out))
        )
        self._forget()

    def _forget(self) -> None:
        self._zeros = [torch.zeros(each.weight.shape[0]) for each in list(self.maps)[:2]]
        self._seen = 0

    def forward(self, x: Tensor) -> Tensor:
        for n, each in enumerate(self.maps):
            x = each(x)
            if n < 2:
                x = F.relu(x)
                if self.training:
                    self._zeros[n] += (x.detach() == 0).flatten(0, -2).sum(0).cpu()
        self._seen += x[..., 0].numel() if self.training else 0
        return x

    @torch.no_grad()
    def prune(self, most_zero: float) -> int:
        """Take out hidden units that were zero more often than `most_zero`; return how many.

        The least often zero ones stay all the same, 8 of each layer.
        """
        gone = 0
        for n in range(2 if self._seen else 0):
            into, out_of = self.maps[n], self.maps[n + 1]
            stays = self._zeros[n] <= most_zero * self._seen
            stays[self._zeros[n].argsort(stable=True)[:_LEAST_UNITS]] = True
            gone += int((~stays).sum())
            at = stays.nonzero().flatten().to(into.weight.device)
            self.maps[n] = _linear(into.weight[at])
            self.maps[n + 1] = _linear(out_of.weight[:, at])
        self._forget()
        return gone

    def take(self, weights: list[Tensor]) -> None:
        """Have these maps."""
        self.maps = nn.ModuleList(_linear(each) for each in weights)
        self._forget()


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    made.weight = nn.Parameter(weight.detach().clone())
    return made


class BlockPredictor(nn.Module):
    """Foretells the scores of pairs of blocks from what enters an attention.

    Channels are cut in `heads` parts, which share the weights. Raises ValueError where they cannot.
    """

    def __init__(
        self, *, channels: int, heads: int, block_tokens: int, low: int = 64, high: int = 256
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels={channels} are not {heads} heads of one size")
        self.channels, self.heads, self.block_tokens = channels, heads, block_tokens
        inner = block_tokens * (channels // heads)
        self.query, self.key = (_Net(inner, low, high, low) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [batch, blocks of queries, blocks of keys] of [batch, sequence, channels].

        Of whole blocks alone: what is behind the last one is left out.
        """
        batch, length, channels = hidden.shape
        x = hidden[:, : length // self.block_tokens * self.block_tokens]
        x = x.reshape(batch, -1, self.block_tokens, self.heads, channels // self.heads)
        x = x.permute(0, 1, 3, 2, 4).flatten(3).to(self.query.maps[0].weight.dtype)
        pairs = torch.einsum("bmhc,bnhc->bmn", self.query(x), self.key(x))
        return pairs / self.heads

    def prune(self, most_zero: float) -> int:
        """Take out hidden units that were zero more often since the last time; return how many."""
        return self.query.prune(most_zero) + self.key.prune(most_zero)

    def weights(self) -> dict[str, Tensor]:
        """Return its maps by name, of the widths that they were pruned to."""
        nets = {"query": self.query, "key": self.key}
        return {
            f"{name}.{n}": each.weight.detach()
            for name, net in nets.items()
            for n, each in enumerate(net.maps)
        }

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Take over maps of whatever widths. Raises ValueError for ones that do not fit."""
        expected = self.weights().keys()
        if weights.keys() != expected:
            given = ", ".join(sorted(weights)) or "none"
            raise ValueError(f"maps {given} are there, and not {', '.join(expected)}")
        for name, each in weights.items():
            if each.dim() != 2 or not each.is_floating_point():
                raise ValueError(f"{name} is {each.dtype} {list(each.shape)}, and no map")
        nets = {"query": self.query, "key": self.key}
        found = {name: [weights[f"{name}.{n}"] for n in range(3)] for name in nets}
        for name, maps in found.items():
            fits = all(one.shape[0] == other.shape[1] for one, other in pairwise(maps))
            wide = nets[name].maps[0].weight.shape[1]
            if maps[0].shape[1] != wide or not fits:
                shapes = [tuple(each.shape) for each in maps]
                raise ValueError(f"maps of {shapes} do not take blocks of {wide} channels")
        ends = [maps[-1].shape[0] for maps in found.values()]
        if ends[0] != ends[1]:
            raise ValueError(f"queries of {ends[0]} channels do not go with keys of {ends[1]}")
        for name, net in nets.items():
            net.take(found[name])


def block_means(pairs: Tensor, *, causal: bool, may_look: Tensor | None = None) -> Tensor:
    """Return each block's score, [batch, blocks], of [batch, blocks, blocks] of pairs.

    The mean over blocks at and behind it; `causal`: at and before it. `may_look`, of the same
    shape: which blocks have a token that sees one of which, where more than causality says.
    """
    blocks = pairs.shape[-1]
    counts = torch.ones(blocks, blocks, dtype=torch.bool, device=pairs.device)
    counts = counts.triu() if causal else counts.tril()
    counts = counts.expand(pairs.shape)
    if may_look is not None:  # asked about what is behind it, a block is as one that looks back
        counts = counts & ((may_look | may_look.mT) if causal else may_look)
    return (pairs.float().clamp(min=0) * counts).sum(1) / counts.sum(1).clamp(min=1)
