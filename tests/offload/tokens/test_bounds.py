"""Blocks that always stay: each sequence's own labels say, whatever stands beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from offload.tokens.bounds import bounds_of
from perfmodel.token_plan import SparsityRule

RULE = SparsityRule(block_tokens=4, pool_tokens=1, first_blocks=1, last_blocks=1)
TOKENS = 32


def always(labels: Tensor, **given: Tensor) -> list[list[int]]:
    """Return the blocks of each sequence that always stay."""
    found, _ = bounds_of({"labels": labels, **given}, RULE, len(labels), labels.shape[1])
    return [each.nonzero().flatten().tolist() for each in found]


def test_padding_on_the_right_does_not_have_all_blocks_stay() -> None:
    labels = torch.ones(2, TOKENS, dtype=torch.long)
    mask = torch.ones(2, TOKENS)
    labels[1, -6:], mask[1, -6:] = -100, 0
    assert always(labels, attention_mask=mask) == [[0, 7], [0, 6]]


def test_documents_in_a_row_do_not_have_all_blocks_stay() -> None:
    labels = torch.ones(1, TOKENS, dtype=torch.long)
    labels[0, 14] = -100  # as transformers' DataCollatorWithFlattening has it
    positions = torch.cat([torch.arange(14), torch.arange(TOKENS - 14)])[None]
    assert always(labels, position_ids=positions) == [[0, 3, 7]]


def test_a_prompt_beside_a_sequence_changes_nothing_of_it() -> None:
    labels = torch.ones(2, TOKENS, dtype=torch.long)
    labels[1, :22] = -100
    assert always(labels) == [[0, 7], [0, 5, 6, 7]]


def test_a_prompt_among_documents_has_blocks_with_labels_stay() -> None:
    labels = torch.ones(1, TOKENS, dtype=torch.long)
    labels[0, :6] = labels[0, 16:26] = -100
    positions = torch.cat([torch.arange(16), torch.arange(16)])[None]
    # Tokens 5 to 15 and 25 to 31 foretell or are labels, and 0 and 4 are first blocks.
    assert always(labels, position_ids=positions) == [[0, 1, 2, 3, 4, 6, 7]]
