"""Tests of `perfmodel.timeline`: queues are in order, what is shared is shared, nothing is lost."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.timeline import Task, simulate


def test_nothing_takes_no_time() -> None:
    timeline = simulate([])
    assert (timeline.duration_s, timeline.busy_s("host")) == (0, 0)


def test_a_queue_does_one_thing_after_the_other_and_queues_run_together() -> None:
    timeline = simulate([Task("host", 2), Task("device", 3), Task("host", 2)])
    assert timeline.begin_s == (0, 0, 2)
    assert timeline.end_s == (2, 3, 4)
    assert (timeline.duration_s, timeline.busy_s("host"), timeline.busy_s("device")) == (4, 4, 3)


def test_a_task_waits_for_those_before_it_and_holds_up_its_queue() -> None:
    timeline = simulate([Task("device", 3), Task("host", 1, after=(0,)), Task("host", 1)])
    assert timeline.begin_s == (0, 3, 4)


def test_what_is_shared_slows_down_all_that_use_it_alike() -> None:
    both = [
        Task("in", 1, uses=(("memory", 10.0),)),
        Task("out", 2, uses=(("memory", 10.0),)),
        Task("device", 2),
    ]
    assert simulate(both, {"memory": 15}).end_s == (1, 2, 2)
    # 15 a second are wanted of 7.5: half as fast, until the first has ended.
    assert simulate(both, {"memory": 7.5}).end_s == (2, 3, 2)
    assert simulate(both, {"memory": 7.5}).used("memory") == 20


def test_tasks_of_no_time_and_of_unknown_resources_pass() -> None:
    timeline = simulate([Task("a", 0), Task("b", 0, after=(0,)), Task("a", 1, uses=(("c", 1),))])
    assert timeline.end_s == (0, 0, 1)


@pytest.mark.parametrize(
    "task",
    [
        Task("a", -1),
        Task("a", math.nan),
        Task("a", math.inf),
        Task("a", 1, after=(1,)),
        Task("a", 1, after=(-1,)),
        Task("a", 0, uses=(("memory", 1.0),)),
    ],
)
def test_an_impossible_task_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="task 1 "):
        simulate([Task("a", 1), task])


@given(st.data())
def test_order_and_floors_hold_for_any_tasks(data: st.DataObject) -> None:
    tasks: list[Task] = []
    for number in range(data.draw(st.integers(1, 30))):
        after = data.draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else ()
        tasks.append(
            Task(
                queue=data.draw(st.sampled_from("abc")),
                seconds=data.draw(st.integers(1, 5)),
                after=tuple(after),
                uses=tuple((name, data.draw(st.integers(0, 9))) for name in ("x", "y")),
            )
        )
    per_s = {"x": data.draw(st.integers(1, 9)), "y": 3}
    timeline = simulate(tasks, per_s)
    for number, task in enumerate(tasks):
        assert timeline.end_s[number] - timeline.begin_s[number] >= task.seconds * (1 - 1e-9)
        assert all(timeline.begin_s[number] >= timeline.end_s[other] for other in task.after)
    for queue in "abc":
        spans = [
            span
            for task, *span in zip(tasks, timeline.begin_s, timeline.end_s, strict=True)
            if task.queue == queue
        ]
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    for name, rate in per_s.items():
        assert timeline.duration_s >= timeline.used(name) / rate * (1 - 1e-9)
