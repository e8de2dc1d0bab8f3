"""Which blocks of tokens always take part, whatever their scores, and which never."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offload.tokens.loss import IGNORED
from perfmodel.token_plan import SparsityRule

__all__ = ["bounds_of"]


def bounds_of(
    given: Mapping[str, Any], rule: SparsityRule, batch: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Return which blocks are always kept, and which hold padding alone: bool, [batch, blocks]."""
    blocks = math.ceil(tokens / rule.block_tokens)
    mask = given.get("attention_mask")
    there = torch.ones(batch, tokens, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == (batch, tokens):
        there = mask.cpu().bool()
    always = torch.zeros(batch, blocks, dtype=torch.bool)
    filled = _by_block(there, rule.block_tokens)
    for index in range(batch):
        own = filled[index].nonzero().flatten().tolist()
        always[index, own[: rule.first_blocks]] = True
        always[index, own[len(own) - rule.last_blocks :] if rule.last_blocks else []] = True
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and rule.first_blocks:
        firsts = (positions.cpu() == 0).expand(batch, tokens) & there
        begins = _by_block(firsts, rule.block_tokens)
        for after in range(rule.first_blocks):
            always[:, after:] |= begins[:, : blocks - after]
    foretelling = _foretelling(given) if rule.keep_labels else None
    if foretelling is not None:
        # In each sequence by itself: elsewhere all tokens foretell one, and all would always stay.
        some = (~foretelling & there & ~_ends(there, given)).any(1, keepdim=True)
        told = torch.nn.functional.pad(foretelling, (1, 0))[:, :-1]
        always |= _by_block((foretelling | told) & some, rule.block_tokens)
    ids = given.get("input_ids")
    if rule.keep_token_ids and isinstance(ids, Tensor):
        wanted = torch.tensor(rule.keep_token_ids)
        always |= _by_block(torch.isin(ids.cpu(), wanted), rule.block_tokens)
    return always & filled, ~filled


def _by_block(tokens: Tensor, block_tokens: int) -> Tensor:
    """Say of each block whether it holds one of the tokens that are so."""
    over = -tokens.shape[1] % block_tokens
    padded = torch.nn.functional.pad(tokens, (0, over))
    return padded.view(len(tokens), -1, block_tokens).any(-1)


def _ends(there: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Say of each token whether no other of its document follows, so that it foretells none."""
    last = torch.ones(len(there), 1, dtype=torch.bool)
    ends = torch.cat([~there[:, 1:], last], dim=1)
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        begins = (positions.cpu() == 0).expand(there.shape)
        ends[:, :-1] |= begins[:, 1:]
    return ends


def _foretelling(given: Mapping[str, Any]) -> Tensor | None:
    """Say of each token whether the loss has it foretell one, [batch, tokens]; None: unknown."""
    ignored = given.get("ignore_index")
    ignored = IGNORED if ignored is None else ignored
    shifted, labels = given.get("shift_labels"), given.get("labels")
    if isinstance(shifted, Tensor):
        return shifted.cpu() != ignored
    if not isinstance(labels, Tensor):
        return None
    return torch.nn.functional.pad(labels.cpu() != ignored, (0, 1))[:, 1:]
