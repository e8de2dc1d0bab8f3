"""Traces of steps that have not run: the bytes are the tape's, the times its operators'."""

from __future__ import annotations

import pytest

from perfmodel.layers import tape_of
from perfmodel.machine import read_machine
from perfmodel.memory import step_bytes
from perfmodel.operator_times import operator_times
from perfmodel.plain_models import PLAIN_MODELS, plain_model, plain_shape
from perfmodel.schedules.blocks import freed_by
from perfmodel.step_trace import step_trace
from perfmodel.tape import Tape

DEVICE = read_machine("laptop").device


def tape_for(kind: str) -> Tape:
    model = plain_model(kind, num_layers=3, hidden_size=64, num_heads=4, seq_len=32)
    return tape_of(model, plain_shape(kind, batch=2, seq_len=32))


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_a_trace_has_the_bytes_that_its_tape_saves(kind: str) -> None:
    tape = tape_for(kind)
    found = step_trace(tape, operator_times(tape.operators, DEVICE, "float32"))
    assert found.trace.kept_peak_bytes == step_bytes(tape).saved_bytes
    assert found.small_bytes == 0


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_what_is_too_small_is_counted_and_left_out(kind: str) -> None:
    tape = tape_for(kind)
    times = operator_times(tape.operators, DEVICE, "float32")
    least = 1 << 14
    found = step_trace(tape, times, least)
    assert found.small_bytes
    assert min(tensor.nbytes for tensor in found.trace.tensors) >= least
    large = sum(tensor.nbytes for tensor in found.trace.tensors)
    assert large + found.small_bytes == step_bytes(tape).saved_bytes


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_a_step_lasts_as_long_as_its_operators(kind: str) -> None:
    tape = tape_for(kind)
    times = operator_times(tape.operators, DEVICE, "float32")
    found = step_trace(tape, times)
    assert found.duration_s == pytest.approx(times.total_s)
    forward_s = sum(times.forward_s)
    for tensor in found.trace.tensors:
        assert tensor.saved_s <= forward_s * 1.000001
        assert forward_s * 0.999999 <= tensor.needed_s <= found.duration_s * 1.000001


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_a_block_that_is_run_again_frees_all_but_what_enters_it(kind: str) -> None:
    tape = tape_for(kind)
    found = step_trace(tape, operator_times(tape.operators, DEVICE, "float32"))
    for number in range(len(found.blocks)):
        freed = sum(found.trace.tensors[index].nbytes for index in freed_by(found.blocks, number))
        saved = step_bytes(tape).saved_bytes - step_bytes(tape, [number]).saved_bytes
        # A random state is saved with what enters.
        assert freed == saved + 5056


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_blocks_that_are_run_again_stand_in_the_trace_with_what_enters_them(kind: str) -> None:
    tape = tape_for(kind)
    times = operator_times(tape.operators, DEVICE, "float32")
    plain, again = step_trace(tape, times), step_trace(tape, times, 0, [0, 2])
    # Their random states are no tensors of the trace.
    saved = step_bytes(tape, [0, 2]).saved_bytes - 2 * 5056
    assert again.trace.kept_peak_bytes == saved
    longer = sum(times.forward_s[at] for number in (0, 2) for at in tape.blocks[number])
    assert again.duration_s == pytest.approx(plain.duration_s + longer)
