"""Choosing blocks: what is always kept is, shares hold, and nobody looks ahead."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.tokens.selection import choose_by_share, choose_by_threshold, kept_of

SCORES = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=200)
SHARES = st.floats(0.05, 1.0)


@given(SCORES, SHARES)
def test_the_best_are_kept_and_as_many_as_the_share_says(scores: list[float], share: float) -> None:
    kept = choose_by_share(scores, share, causal=False)
    assert sum(kept) == min(len(scores), math.ceil(share * len(scores)))
    worst = min(score for score, one in zip(scores, kept, strict=True) if one)
    assert all(score <= worst for score, one in zip(scores, kept, strict=True) if not one)


@given(SCORES, SHARES, st.data())
def test_a_causal_choice_does_not_depend_on_what_comes_later(
    scores: list[float], share: float, data: st.DataObject
) -> None:
    upto = data.draw(st.integers(0, len(scores)))
    other = scores[:upto] + [score + 1 for score in reversed(scores[upto:])]
    one, two = (choose_by_share(each, share, causal=True) for each in (scores, other))
    assert one[:upto] == two[:upto]


@given(SCORES, SHARES)
def test_every_beginning_of_a_causal_choice_has_about_the_share(
    scores: list[float], share: float
) -> None:
    kept = choose_by_share(scores, share, causal=True)

    for n in range(1, len(kept) + 1):
        assert abs(sum(kept[:n]) - share * n) <= 3 + 0.1 * share * n


def test_a_causal_choice_takes_those_that_stand_out() -> None:
    scores = [1.0 + 0.001 * (n % 7) for n in range(100)]
    for n in (33, 50, 71, 90):
        scores[n] = 9.0
    kept = choose_by_share(scores, 0.3, causal=True)
    assert all(kept[n] for n in (33, 50, 71, 90))


def test_a_threshold_keeps_what_is_over_it() -> None:
    assert choose_by_threshold([1.0, 2.0, 3.0], 2.0) == [False, False, True]


@given(st.data())
@settings(max_examples=60)
def test_kept_tokens_are_the_blocks_own_and_never_padding(data: st.DataObject) -> None:
    block = data.draw(st.sampled_from([1, 4, 16]))
    tokens = data.draw(st.integers(1, 150))
    count = math.ceil(tokens / block)
    batch = data.draw(st.integers(1, 3))
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    numbers = st.lists(st.floats(0, 9), min_size=count, max_size=count)
    chosen, must = ([data.draw(flags) for _ in range(batch)] for _ in range(2))
    scores = [data.draw(numbers) for _ in range(batch)]
    padding = [data.draw(st.integers(0, count - 1)) for _ in range(batch)]
    never = [[n < out for n in range(count)] for out in padding]
    always = [
        [m and not o for m, o in zip(*each, strict=True)] for each in zip(must, never, strict=True)
    ]
    kept = kept_of(
        chosen,
        scores,
        always=always,
        never=never,
        tokens=tokens,
        block_tokens=block,
        device=torch.device("cpu"),
    )
    for rows, blocks, wanted, asked, out in zip(
        kept.rows, kept.blocks, chosen, always, never, strict=True
    ):
        assert rows.tolist() == [at for at in range(tokens) if at // block in blocks]
        assert len(blocks) > 0
        expected = {n for n in range(count) if asked[n] or (wanted[n] and not out[n])}
        assert set(blocks) == expected or (not expected and len(blocks) == 1)
    assert 0 < kept.share <= 1
