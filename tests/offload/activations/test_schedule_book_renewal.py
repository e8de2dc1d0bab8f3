"""When a plan is made anew: another drive than it was made for, or another step than recorded."""

from __future__ import annotations

from offload.activations.plan import Plan
from offload.activations.schedule_book import ScheduleBook
from tests.offload.activations.test_schedule_book import (
    MIB,
    REGIONS,
    SIZES,
    TOTAL,
    book,
    drive,
    learn,
    recorded,
    renewed,
    staying,
)


def test_a_drive_that_becomes_slow_makes_the_next_schedule_keep_more() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL * 2))
    fast = staying(it, SIZES)
    written = TOTAL * 2.0
    for step in range(1, 6):
        written += TOTAL
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
        it.observe(ssd=((written, 1 + step * 5), (written, 1 + step * 5)))  # a tenth of what it was
    assert staying(it, SIZES) > fast + REGIONS // 4
    planned = it.planned
    for _ in range(100):
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
    it.observe(ssd=((written + TOTAL, 31), (written + TOTAL, 31)))
    it.plan_like(SIZES)
    assert it.planned == planned, "no news, no new plan"


def test_a_plan_is_followed_for_a_while_before_it_is_made_anew() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL))
    it.plan_like(SIZES)
    seen = 1.0
    made = []
    for step in range(200):  # a drive that is never the same
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
        seconds = 3.0 if step % 2 else 0.3
        seen += seconds
        it.observe(ssd=((TOTAL * (step + 2), seen), (TOTAL * (step + 2), seen)))
        planned = it.planned
        it.plan_like(SIZES)
        if it.planned > planned:
            made.append(step)
    assert 1 <= len(made) <= 10


def slow_and_usual_steps(it: ScheduleBook) -> Plan:
    """Record a step that took ten times as long as the others, and plan for it."""
    order = list(reversed(range(REGIONS)))
    for seconds in (1.0, 10.0):
        it.learn(SIZES, order, recorded(REGIONS, seconds), 1)
        it.observe(ssd=drive(TOTAL * 0.2))
        plan = renewed(it, SIZES)
    assert plan.confirmed
    assert plan.tiers.count("ssd") > REGIONS // 2
    return plan


def test_a_step_unlike_the_others_is_recorded_again_once_its_plan_has_others_wait() -> None:
    it, order = book(), list(reversed(range(REGIONS)))
    plan = slow_and_usual_steps(it)
    for waited in (0.3, 0.0, 0.3, 0.005, 0.02):
        it.learn(SIZES, order, None, 1, None, waited)
        assert renewed(it, SIZES).confirmed, "now and then a step waits"
    it.learn(SIZES, order, None, 1, None, 0.02)
    assert not renewed(it, SIZES).confirmed
    it.learn(SIZES, order, recorded(), 1, None, 0.3)
    again = renewed(it, SIZES)
    assert again.confirmed
    assert again.tiers.count("ssd") < plan.tiers.count("ssd") / 2


def test_a_step_that_waits_whatever_is_planned_is_recorded_ever_more_rarely() -> None:
    it, order = book(), list(reversed(range(REGIONS)))
    for _ in range(2):
        learn(it, SIZES)
        it.observe(ssd=drive(TOTAL))
        renewed(it, SIZES)
    recordings = 0
    for _ in range(1000):
        anew = not renewed(it, SIZES).confirmed
        recordings += anew
        it.learn(SIZES, order, recorded() if anew else None, 1, None, 0.3)
    assert 5 <= recordings <= 25


def test_another_depth_than_the_recorded_one_is_recorded_as_well() -> None:
    it, order = book(), list(reversed(range(REGIONS)))
    for _ in range(2):
        learn(it, SIZES)
        it.observe(ssd=drive(TOTAL))
        renewed(it, SIZES)
    for _ in range(2):
        it.learn(SIZES, order, None, 4)
    assert not renewed(it, SIZES).confirmed
    learn(it, SIZES, depth=4)
    assert renewed(it, SIZES).depth == 4


def test_a_drive_that_turns_out_to_read_slowly_is_planned_for_again() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=((TOTAL * 4, 1), (0, 0)))  # all was handed over without reading
    before = staying(it, SIZES)
    for _ in range(2):
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
    it.observe(ssd=((TOTAL * 8, 2), (TOTAL * 0.5, 5)))
    assert staying(it, SIZES) > before


def test_a_drive_to_which_nothing_goes_is_tried_again() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=drive(1e4))
    assert staying(it, SIZES) == REGIONS
    seen = drive(1e4)
    for _ in range(16):
        assert it.probe_bytes == 0
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
        it.observe(ssd=seen)
    assert it.probe_bytes > 0, "nobody knows whether it still is so slow"
    nbytes, busy_s = 1e4 + TOTAL, 1 + 1 / 10
    it.observe(ssd=((nbytes, busy_s), (nbytes, busy_s)))
    assert staying(it, SIZES) < REGIONS // 2


def test_a_drive_that_changed_once_has_blocks_chosen_anew_once() -> None:
    it = book()
    kinds = [SIZES, (2 * MIB,) * REGIONS]
    seen = 1.0
    for kind in kinds:
        learn(it, kind)
        it.observe(ssd=drive(TOTAL * seen, seen))
        it.plan_like(kind)
    chosen = []
    it.blocks.drive_changed = lambda: chosen.append(1)  # type: ignore[method-assign]
    written = TOTAL * seen
    for step in range(1, 40):  # a tenth of what it was; one of the two kinds never comes again
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
        written += TOTAL
        it.observe(ssd=((written, seen + step * 10), (written, seen + step * 10)))
        it.plan_like(SIZES)
    assert 1 <= len(chosen) <= 6, "the mean needs some steps to come down"


def test_much_slower_is_noticed_long_before_a_little_slower() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL * 2))
    it.plan_like(SIZES)
    (entry,) = it._entries.values()
    entry.patience = 64
    noticed = {}
    for change in (1.5, 10.0):
        entry.stale, entry.uses = False, 0
        for step in range(1, 100):
            it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
            it.rates["ssd"].throughput = type(it.rates["ssd"].throughput)(
                *(rate / change for rate in entry.plan.rates["ssd"])  # type: ignore[union-attr]
            )
            it.observe()
            if entry.stale:
                noticed[change] = step
                break
    assert noticed == {1.5: 64, 10.0: 8}
