"""Bytes of a step by hand, and what must hold of any tape."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from perfmodel.memory import RANDOM_STATE_BYTES, step_bytes
from perfmodel.tape import Tape, TapeWriter, Value

SEEDS = st.integers(0, 2**32)


def random_tape(rng: random.Random) -> Tape:
    """Operators in blocks, each reading what is there."""
    writer = TapeWriter()
    values: list[Value] = [writer.value("input", 8, trained=False)]
    inputs = [values[0]]
    for _ in range(rng.randint(1, 5)):
        with writer.block():
            for _ in range(rng.randint(1, 6)):
                reads = rng.sample(values, min(len(values), rng.randint(1, 2)))
                kind = rng.choice(["compute", "pass", "parts"])
                if kind == "parts":
                    half = reads[0].nbytes // 2
                    values += writer.view("parts", reads[0], half, reads[0].nbytes - half)
                    continue
                saves = [value for value in reads if rng.random() < 0.5]
                values.append(
                    writer.run(
                        kind,
                        reads,
                        rng.randint(1, 100),
                        saves=saves,
                        saves_output=rng.random() < 0.3,
                        keeps_bytes=rng.choice([0, 7]),
                        param_bytes=rng.choice([0, 30]),
                        shared_params=rng.choice(["", "shared"]),
                        workspace_bytes=rng.choice([0, 50]),
                        passes=kind == "pass",
                    )
                )
    values.append(writer.run("loss", values[-1:], 4))
    return writer.tape(inputs)


@given(SEEDS)
def test_a_step_counts_no_bytes_twice_and_forgets_none(seed: int) -> None:
    tape = random_tape(random.Random(seed))
    for again in ((), range(len(tape.blocks)), [0]):
        found = step_bytes(tape, again)
        assert all(moment.saved_bytes >= 0 <= moment.other_bytes for moment in found.moments)
        assert found.left_bytes == 0
        assert found.saved_bytes <= found.worst.nbytes


@given(SEEDS)
def test_what_a_whole_forward_saves_is_what_its_operators_say(seed: int) -> None:
    tape = random_tape(random.Random(seed))
    assert step_bytes(tape).saved_bytes == tape.saved_bytes()


def chain(*sizes: int) -> Tape:
    """Maps that each save what they read, of parameters as large."""
    writer = TapeWriter()
    x = writer.value("input", sizes[0], trained=False)
    inputs = [x]
    for size in sizes[1:]:
        with writer.block():
            x = writer.run("map", [x], size, saves=[x], param_bytes=size)
    return writer.tape(inputs)


def test_a_chain_of_maps_needs_what_a_person_counts() -> None:
    # Saved: 20 and 30. The last map's backward: its gradient 4, that of its input 30, and of its
    # parameters 4; the one before: the gradient 30 and 20, 30 of parameters, and 20 still saved.
    found = step_bytes(chain(10, 20, 30, 4))
    assert found.saved_bytes == 50
    backward = [moment for moment in found.moments if moment.backward]
    assert [moment.nbytes for moment in backward] == [50 + 38, 20 + 80, 20 + 20]
    assert found.worst is backward[1]


def test_blocks_that_are_run_again_save_what_they_read() -> None:
    found = step_bytes(chain(10, 20, 30, 4), range(3))
    assert found.saved_bytes == 20 + 30 + 3 * RANDOM_STATE_BYTES


def test_gradients_that_stay_are_counted_until_the_end() -> None:
    staying = step_bytes(chain(10, 20, 30, 4), gradients_stay=True)
    assert staying.moments[-1].nbytes == 4 + 30 + 20 + 20
    assert staying.left_bytes == 4 + 30 + 20
    # As often as it is used, yet once in memory: from the first use in the backward to the last.
    writer = TapeWriter()
    x = writer.value("input", 1, trained=False)
    one = writer.run("one", [x], 10, saves=[x], param_bytes=100, shared_params="w")
    two = writer.run("two", [one], 10, saves=[one])
    writer.run("three", [two], 1, saves=[two], param_bytes=100, shared_params="w")
    found = step_bytes(writer.tape([x]))
    backward = {moment.operator: moment.nbytes for moment in found.moments if moment.backward}
    assert backward == {"three": 20 + 1 + 10 + 100, "two": 10 + 10 + 10 + 100, "one": 10 + 200}
