"""Attention over chosen blocks of whole sequences: the others are never read, copied or padded."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offload.device.token_kernels import TokenKernels, kernels_for
from offload.native import (
    AttentionBlocks,
    ThreadPool,
    block_attention,
    block_attention_backward,
    block_pair_scores,
)

__all__ = ["BlockAttention"]


class BlockAttention:
    """Causal attention of blocks of rows over blocks of columns, wherever those lie.

    By kernels of our own, which read the blocks where they lie and give the same bits each time: on
    the host in fp32, with `threads` of its own (by default as many as torch's); on a GPU in fp32,
    bf16 and fp16, up to 256 channels a head, where the CUDA kernels were built. All else goes
    PyTorch's way, over copies of the blocks and a mask of all their pairs. `path` says which.
    """

    def __init__(self, block_tokens: int, *, threads: int | None = None) -> None:
        if block_tokens < 1:
            raise ValueError(f"block_tokens={block_tokens} is not a whole number from 1 up")
        self.block_tokens = block_tokens
        self._pool = ThreadPool(threads or torch.get_num_threads())

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Tensor,
        columns: Tensor | None = None,
        *,
        scale: float | None = None,
        documents: Tensor | None = None,
        window: int = 0,
    ) -> Tensor:
        """Return [batch, heads, rows' tokens, channels], the rows' blocks side by side.

        `query`, `key` and `value` are [batch, heads, sequence, channels], of fewer heads of keys
        where groups share them. `rows` and `columns` are [batch, count], ascending numbers of
        blocks; columns are the rows if not given. Each token sees the columns' tokens at and before
        it, of its own document (`documents` [batch, sequence]), at most `window` of them (0: all).
        One that sees none gets zeros. Raises ValueError for other shapes and numbers.
        """
        columns = rows if columns is None else columns
        _check_heads(query, key, value, scale, documents)
        self._check_blocks(query, rows, columns)
        blocks = AttentionBlocks(
            rows=rows.to("cpu", torch.int32).contiguous(),
            columns=columns.to("cpu", torch.int32).contiguous(),
            block_tokens=self.block_tokens,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            documents=None if documents is None else documents.to("cpu", torch.int32).contiguous(),
            window=window,
        )
        out: Tensor
        kernels = _kernels_for(query, key, value)
        if kernels is not None:
            out = _DeviceBlocks.apply(query, key, value, blocks, kernels)  # type: ignore[no-untyped-call]
        elif _is_for_host(query):
            out = _Blocks.apply(query, key, value, blocks, self._pool)  # type: ignore[no-untyped-call]
        else:
            out = masked_attention(query, key, value, blocks)
        return out

    def path(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        """Name what these go through: `cuda` or `host`, kernels of our own, or `masked`."""
        if _kernels_for(query, key, value) is not None:
            return "cuda"
        return "host" if _is_for_host(query) else "masked"

    def pair_scores(
        self,
        query: Tensor,
        key: Tensor,
        *,
        ahead: bool,
        scale: float | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Return [batch, blocks, blocks]: how much the first's queries look at the second's keys.

        The largest, over pairs of tokens, of the mean over heads of scores' positive parts (LeMo,
        Eq. 2), and -1 where no pair counts: pairs of a query with an earlier key do; `ahead`: with
        a later one, or one of its own block. In fp32, and returned on the host; computed where the
        tensors are if kernels take them, and on the host otherwise.
        """
        _check_heads(query, key, key, scale, documents)
        blocks = -(-query.shape[2] // self.block_tokens)
        nothing = torch.empty(query.shape[0], 0, dtype=torch.int32)
        given = AttentionBlocks(
            rows=nothing,
            columns=nothing,
            block_tokens=self.block_tokens,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            documents=None if documents is None else documents.to("cpu", torch.int32).contiguous(),
        )
        scores = torch.empty(query.shape[0], blocks, blocks)
        kernels = _kernels_for(query, key)
        if kernels is not None:
            there = scores.to(query.device)
            q, k = (_plain(each.detach()) for each in (query, key))
            kernels.pair_scores(given.on(query.device), q, k, there, ahead=ahead)
            return there.cpu()
        q, k = (_plain(each.detach().float().cpu()) for each in (query, key))
        block_pair_scores(self._pool, given, q, k, scores, ahead=ahead)
        return scores

    def _check_blocks(self, query: Tensor, rows: Tensor, columns: Tensor) -> None:
        batch, length = query.shape[0], query.shape[2]
        last = -(-length // self.block_tokens) - 1
        for name, each in (("rows", rows), ("columns", columns)):
            if each.dim() != 2 or len(each) != batch or each.is_floating_point():
                raise ValueError(f"{name} of shape {tuple(each.shape)} are no [batch, count]")
            if not each.numel():
                raise ValueError(f"{name} are empty: attention needs a block")
            if int(each.min()) < 0 or int(each.max()) > last or not bool((each.diff() > 0).all()):
                raise ValueError(f"{name} are not ascending numbers of blocks from 0 to {last}")
            short = (each == last).any(1)
            if (last + 1) * self.block_tokens != length and bool(short.any() != short.all()):
                raise ValueError(
                    f"{name} have the last block, which is shorter, in some of a batch"
                )


def _kernels_for(*heads: Tensor) -> TokenKernels | None:
    return kernels_for(*heads, channels=heads[0].shape[-1])


def _is_for_host(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype == torch.float32


def _check_heads(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, documents: Tensor | None
) -> None:
    """Raise ValueError for what no kernel is to see."""
    named = {"query": query, "key": key, "value": value}
    sizes = {name: tuple(each.shape) for name, each in named.items()}
    if any(each.dim() != 4 for each in named.values()):
        raise ValueError(f"{sizes} are not [batch, heads, sequence, channels] each")
    batch, heads, length, channels = query.shape
    shared = key.shape[1] and heads % key.shape[1] == 0
    if key.shape != value.shape or key.shape[0] != batch or not shared:
        raise ValueError(f"{sizes} are no query, key and value of one attention")
    if key.shape[2:] != (length, channels):
        raise ValueError(f"{sizes}: keys have to be of the same tokens and channels as queries")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale} is not over 0")
    if documents is not None and documents.shape != (batch, length):
        raise ValueError(
            f"documents of shape {tuple(documents.shape)} are not one number for each of "
            f"{batch} x {length} tokens"
        )


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, pool: Any
    ) -> Tensor:
        query, key, value = (_plain(each) for each in (query, key, value))
        whole, lse = (each.zero_() for each in _room(query, blocks))  # beyond a sequence's end too
        block_attention(pool, blocks, query, key, value, whole, lse)
        ctx.blocks, ctx.pool = blocks, pool
        ctx.save_for_backward(query, key, value, whole, lse)
        return whole[:, :, : _tokens_of(blocks.rows, blocks, query.shape[2])]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        blocks: AttentionBlocks = ctx.blocks
        over = out.shape[2] - grads[0].shape[2]
        grad_out = _plain(F.pad(grads[0], (0, 0, 0, over)))
        width = blocks.columns.shape[1] * blocks.block_tokens
        parts = [
            torch.zeros_like(out),
            *(key.new_zeros(*key.shape[:2], width, key.shape[3]) for _ in range(2)),
        ]
        forward = (query, key, value, out, lse)
        found = (parts[0], parts[1], parts[2])
        block_attention_backward(ctx.pool, blocks, forward, grad_out, found)
        wholes = []
        for part, listed, like in zip(
            parts, (blocks.rows, blocks.columns, blocks.columns), (query, key, value), strict=True
        ):
            wholes.append(_spread(part, listed, blocks, like))
        return (*wholes, None, None)


class _DeviceBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: AttentionBlocks,
        kernels: TokenKernels,
    ) -> Tensor:
        query, key, value = (_plain(each) for each in (query, key, value))
        whole, lse = _room(query, blocks)  # all of which the kernel writes
        there = blocks.on(query.device)
        kernels.attend(there, query, key, value, whole, lse)
        ctx.blocks, ctx.kernels = there, kernels
        ctx.save_for_backward(query, key, value, whole, lse)
        return whole[:, :, : _tokens_of(blocks.rows, blocks, query.shape[2])]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        found = (torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value))
        forward = (query, key, value, out, lse)
        ctx.kernels.attend_backward(ctx.blocks, forward, _plain(grads[0]), found)
        return (*found, None, None)


def _room(query: Tensor, blocks: AttentionBlocks) -> tuple[Tensor, Tensor]:
    """Return what attention's output, and the logarithms of its rows' sums, are written to.

    The first is [batch, tokens, heads, channels] in memory, which is what an output map takes next.
    """
    batch, heads, _, channels = query.shape
    padded = blocks.rows.shape[1] * blocks.block_tokens
    out = query.new_empty(batch, padded, heads, channels).transpose(1, 2)
    return out, query.new_empty(batch, heads, padded, dtype=torch.float32)


def _plain(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tokens_of(listed: Tensor, blocks: AttentionBlocks, length: int) -> int:
    """Return how many tokens blocks of each of a batch have."""
    last = -(-length // blocks.block_tokens) - 1
    over = (last + 1) * blocks.block_tokens - length
    return listed.shape[1] * blocks.block_tokens - (over if int(listed[0, -1]) == last else 0)


def positions_of(listed: Tensor, blocks: AttentionBlocks, length: int) -> Tensor:
    """Return where the blocks' tokens stand, [batch, tokens]."""
    inside = torch.arange(blocks.block_tokens)
    found = (listed.long()[:, :, None] * blocks.block_tokens + inside).flatten(1)
    return found[:, : _tokens_of(listed, blocks, length)]


def _spread(part: Tensor, listed: Tensor, blocks: AttentionBlocks, like: Tensor) -> Tensor:
    """Return [batch, heads, sequence, channels]: zeros, and the blocks' tokens in their places."""
    whole = torch.zeros(like.shape, dtype=like.dtype)
    at = positions_of(listed, blocks, like.shape[2])
    for one, own, rows in zip(whole, part, at, strict=True):
        one[:, rows] = own[:, : len(rows)]
    return whole


def masked_attention(query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks) -> Tensor:
    """Return the same by PyTorch's attention, over copies of the blocks and a mask of all pairs."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    rows = positions_of(blocks.rows, blocks, length).to(query.device)
    columns = positions_of(blocks.columns, blocks, length).to(query.device)
    seen = columns[:, None, :] <= rows[:, :, None]
    if blocks.window:
        seen &= rows[:, :, None] - columns[:, None, :] < blocks.window
    if blocks.documents is not None:
        documents = blocks.documents.to(query.device).long()
        of_rows, of_columns = (documents.gather(1, at) for at in (rows, columns))
        seen &= of_rows[:, :, None] == of_columns[:, None, :]
    parts = []
    for one, at in ((query, rows), (key, columns), (value, columns)):
        index = at[:, None, :, None].expand(-1, one.shape[1], -1, one.shape[3])
        taken = one.gather(2, index)
        parts.append(taken if one is query else taken.repeat_interleave(groups, 1))
    q, k, v = parts
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=blocks.scale)
    return torch.where(seen.any(-1)[:, None, :, None], out, torch.zeros_like(out))
