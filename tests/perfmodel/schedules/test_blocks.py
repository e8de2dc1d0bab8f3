"""Tests of `perfmodel.schedules.blocks`: as few blocks are recomputed as a memory limit needs."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.schedules.activations import plan_activations
from perfmodel.schedules.blocks import (
    Block,
    cheapest_blocks,
    choose_blocks,
    leanest_blocks,
    recomputed,
)
from perfmodel.schedules.trace import Channel, Limits, SavedTensor, Trace

LIMITS = Limits()
DEAF = 1e-9  # a drive that moves nothing in the time of a step


def channel(rate: float) -> Channel:
    return Channel(tier="ssd", write_bytes_per_s=rate, read_bytes_per_s=rate)


def model(layers: int, inside: int = 3, nbytes: int = 100) -> tuple[Trace, list[Block]]:
    """A second a layer forward, two backward; each saves its input and `inside` more."""
    tensors, blocks = [], []
    for layer in range(layers):
        begun_s = layers + 2.0 * (layers - 1 - layer)
        enters = len(tensors)
        for number in range(1 + inside):
            share = number / (1 + inside)
            needed_s = begun_s + 2 * (1 - share) - 2 / (1 + inside)
            tensors.append(SavedTensor(nbytes, layer + share, needed_s, begun_s + 2 * (1 - share)))
        blocks.append(Block(1.0, range(enters, len(tensors)), (enters,)))
    return Trace(tuple(tensors)), blocks


def test_nothing_recomputed_is_the_same_trace() -> None:
    trace, blocks = model(4)
    assert recomputed(trace, blocks, ()) == trace


def test_a_recomputed_block_saves_its_input_and_delays_what_follows() -> None:
    trace, blocks = model(2)
    again = recomputed(trace, blocks, [1])
    # The last layer's backward begins at 2 s; its forward is repeated first.
    assert [tensor.saved_s for tensor in again.tensors] == [0, 0.25, 0.5, 0.75, 1, 2, 2, 2]
    entering = again.tensors[4]
    assert (entering.needed_s, entering.held) == (2, False), "repeating needs it"
    inside = again.tensors[5:]
    assert all(tensor.held for tensor in inside)
    assert sorted(tensor.needed_s for tensor in inside) == [3, 3.5, 4]
    before = [tensor.needed_s for tensor in trace.tensors[:4]]
    assert [tensor.needed_s for tensor in again.tensors[:4]] == [time_s + 1 for time_s in before]


def test_all_recomputed_keeps_the_inputs_and_one_block() -> None:
    layers, inside = 8, 3
    trace, blocks = model(layers, inside)
    assert trace.kept_peak_bytes == layers * (1 + inside) * 100
    again = recomputed(trace, blocks, range(layers))
    assert again.kept_peak_bytes == (layers + inside) * 100


def test_what_enters_a_later_block_is_saved_all_the_same() -> None:
    trace, blocks = model(2)
    later = Block(blocks[1].duration_s, blocks[1].saved, (*blocks[1].enters, 3))
    again = recomputed(trace, [blocks[0], later], [0])
    assert again.tensors[1].saved_s == 0.75, "of the first block, only this one and the input stay"
    assert sum(tensor.held for tensor in again.tensors) == 2


def test_a_fast_drive_makes_recomputing_needless() -> None:
    trace, blocks = model(8)
    choice = choose_blocks(trace, blocks, [channel(1e9)], LIMITS, 800)
    assert (choice.recompute, choice.extra_s) == (frozenset(), 0)
    assert choice.peak_bytes <= 800


def test_without_a_drive_as_many_blocks_are_recomputed_as_must() -> None:
    trace, blocks = model(8)
    for memory_bytes in range(1100, 3300, 100):
        choice = choose_blocks(trace, blocks, [channel(DEAF)], LIMITS, memory_bytes)
        assert choice.peak_bytes <= memory_bytes
        # Each block that is not the one being repeated frees three tensors.
        needed = -(-(3200 - memory_bytes) // 300)
        assert needed <= len(choice.recompute) <= needed + 1


def test_a_slow_drive_and_some_recomputing_fit_where_neither_does_alone() -> None:
    trace, blocks = model(8)
    slow = [channel(60)]
    alone = choose_blocks(trace, [], slow, LIMITS, 700)
    without = choose_blocks(trace, blocks, [], LIMITS, 700)
    both = choose_blocks(trace, blocks, slow, LIMITS, 700)
    assert alone.peak_bytes > 700 < without.peak_bytes
    assert both.peak_bytes <= 700
    assert 0 < len(both.recompute) < 8


def test_the_cheapest_blocks_come_first() -> None:
    trace, blocks = model(6)
    dear = [
        Block(5.0 if number % 2 else 1.0, block.saved, block.enters)
        for number, block in enumerate(blocks)
    ]
    choice = choose_blocks(trace, dear, [channel(DEAF)], LIMITS, 1800)
    assert all(number % 2 == 0 for number in choice.recompute)


def test_out_of_reach_is_the_least_peak_found() -> None:
    trace, blocks = model(8)
    choice = choose_blocks(trace, blocks, [channel(DEAF)], LIMITS, 1)
    assert choice.peak_bytes == 1100
    assert len(choice.recompute) >= 7


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_close_to_the_best_of_all_choices(seed: int) -> None:
    rng = random.Random(seed)
    layers = rng.randint(1, 6)
    trace, blocks = model(layers, rng.randint(1, 4), rng.randint(1, 500))
    blocks = [Block(rng.uniform(0.1, 2), block.saved, block.enters) for block in blocks]
    drive = [channel(rng.choice([DEAF, 30, 300, 3000]))]
    memory_bytes = rng.randint(0, trace.kept_peak_bytes)
    choice = choose_blocks(trace, blocks, drive, LIMITS, memory_bytes)
    outcomes = {}
    for count in range(layers + 1):
        for chosen in combinations(range(layers), count):
            again = recomputed(trace, blocks, chosen)
            peak = plan_activations(again, drive, LIMITS, memory_bytes, effort=0.0).peak_bytes
            outcomes[frozenset(chosen)] = peak
    assert choice.peak_bytes == outcomes[choice.recompute]
    fitting = [chosen for chosen, peak in outcomes.items() if peak <= memory_bytes]
    if not fitting:
        assert choice.peak_bytes <= 1.3 * min(outcomes.values())
        return
    assert choice.peak_bytes <= memory_bytes
    least_s = min(sum(blocks[number].duration_s for number in chosen) for chosen in fitting)
    assert choice.extra_s <= 2 * least_s + 2


@pytest.mark.parametrize("duration_s", [-1.0, float("nan")])
def test_a_negative_duration_is_refused(duration_s: float) -> None:
    with pytest.raises(ValueError, match="cannot take"):
        Block(duration_s, range(0))


def test_a_little_waiting_beats_a_block_that_takes_long() -> None:
    trace, blocks = model(8)
    limit = trace.kept_peak_bytes // 2
    for factor, waits in ((0.01, False), (30.0, True)):
        priced = [Block(block.duration_s * factor, block.saved, block.enters) for block in blocks]
        drive = [channel(160.0)]
        chosen = choose_blocks(trace, priced, drive, LIMITS, limit)
        assert chosen.recompute, "the drive alone is too slow"
        best = cheapest_blocks(trace, priced, drive, LIMITS, limit)
        assert best.peak_bytes <= limit
        assert best.extra_s <= chosen.extra_s
        assert (best.recompute == frozenset()) is waits


def test_a_thorough_plan_that_fits_recomputes_nothing() -> None:
    trace, blocks = model(6)
    drive = [channel(400.0)]
    plan = plan_activations(trace, drive, LIMITS)
    best = cheapest_blocks(trace, blocks, drive, LIMITS, plan.peak_bytes)
    assert best.recompute == frozenset()
    assert best.extra_s == 0


@pytest.mark.parametrize("rate", [DEAF, 20.0, 100.0, 1e9])
def test_a_step_that_may_be_longer_has_the_least_peak_for_that_time(rate: float) -> None:
    trace, blocks = model(8)  # 24 s
    peaks = []
    for slowdown in (0.0, 0.05, 0.1, 0.2, 0.4):
        choice = leanest_blocks(trace, blocks, [channel(rate)], LIMITS, slowdown)
        assert choice.extra_s <= 24 * slowdown
        assert (24 + choice.extra_s) * (1 + choice.slowdown) <= 24 * (1 + slowdown) * (1 + 1e-9)
        alone = plan_activations(
            trace, [channel(rate)], LIMITS, slowdown=slowdown, effort=0.0
        ).peak_bytes
        assert choice.peak_bytes <= alone
        peaks.append(choice.peak_bytes)
        if slowdown == 0:
            assert (choice.recompute, choice.peak_bytes) == (frozenset(), alone)
    assert peaks == sorted(peaks, reverse=True)
    if rate == DEAF:
        assert len(choice.recompute) == 8, "8 s of 24 are a third"
        assert peaks[-1] < peaks[0] / 2
    if rate == 1e9:
        assert not choice.recompute
