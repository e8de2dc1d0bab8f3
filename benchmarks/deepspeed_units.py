"""Runs DeepSpeed's own unit tests with our `initialize` in place of DeepSpeed's, and with its own.

Takes a checkout of DeepSpeed, of about the version that is installed, and copies its tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.deepspeed_in_place import REFUSED
from benchmarks.record import (
    ROOT,
    Claim,
    Interval,
    Record,
    add_record_arguments,
    positive,
    table,
    write_record,
)
from benchmarks.spill_directory import add_path_argument, spill_directory

TESTS = (
    "checkpoint/test_latest_checkpoint.py",
    "checkpoint/test_lr_scheduler.py",
    "checkpoint/test_other_optimizer.py",
    "checkpoint/test_shared_weights.py",
    "checkpoint/test_zero_optimizer.py",
    "runtime/test_ds_initialize.py",
    "runtime/zero/test_ignore_unused_parameters.py",
    "runtime/zero/test_zero_context.py",
    "runtime/zero/test_zero_grad_clip.py",
    "runtime/zero/test_zero_tensor_fragment.py",
    "v1/zero/test_zero.py",
    "v1/zero/test_zero_user_backward.py",
)
"""Of `tests/unit`: ZeRO, checkpoints, and optimizers handed over."""
WAYS = ("stock", "stock on the host", "activations", "activations, optimizer")
"""DeepSpeed's fp32 partitions leave its device only with `offload_optimizer`, which changes what it
trains with; so that an optimizer of ours is held against that."""
OURS = {"activations": ("stock",), "activations, optimizer": ("stock", "stock on the host")}
"""Our ways, and those that a test has to pass for it to be held against ours."""
STATES = "is where the plan's optimizer has it"
"""What is said to a test that reaches into states that lie elsewhere: read whole, or not at all."""
Outcomes = dict[str, tuple[str, str]]
"""Of a test: passed, failed, skipped or refused, and why."""


def sections_of(directory: str) -> dict[str, dict[str, Any] | None]:
    """Return what stands in the config under each way."""
    path = [directory]
    moved = {"mode": "ssd", "path": path, "min_tensor_bytes": 64, "staging_bytes": 1 << 20}
    states = {"placement": "ssd", "path": path, "subgroup_params": 500, "staging_bytes": 1 << 20}
    return dict(
        zip(
            WAYS,
            (
                None,
                {"host": True},
                {"activations": moved},
                {"activations": moved, "optimizer": states},
            ),
            strict=True,
        )
    )


def copied(checkout: Path, section: dict[str, Any] | None, place: Path) -> Path:
    """Copy the checkout's tests, whose processes all begin with our `initialize` put in place."""
    tests = place / "tests"
    shutil.copytree(checkout / "tests", tests)
    (tests / "unit" / "__init__.py").write_text(
        "import json\n"
        "from benchmarks.deepspeed_in_place import put_in_place\n"
        f"put_in_place(json.loads({json.dumps(section)!r}))\n"
    )
    return tests


def outcomes_of(report: Path) -> Outcomes:
    """Return what came of each test, of pytest's report."""
    found: Outcomes = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome, why = "passed", ""
        for kind, called in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            for each in case.iter(kind):
                outcome, why = called, (each.get("message") or "").strip()
        if outcome == "failed" and STATES in why:
            outcome = "refused"
        if outcome == "skipped" and REFUSED in why:
            outcome, why = "refused", why.split(REFUSED, 1)[1]
        found[name] = (outcome, why.splitlines()[0][:300] if why else "")
    return found


def run(tests: Path, files: Sequence[str], every: int, seconds: int) -> Outcomes:
    """Run every Nth of the files' tests, each file by itself: one that hangs ends no other."""
    found: Outcomes = {}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(ROOT)]),
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "DS_UNITTEST_TIMEOUT": "120",
    }
    for file in tqdm(files, desc="files", leave=False):
        report = tests / "report.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "benchmarks.deepspeed_in_place", f"--every={every}"]
        command += [f"--junitxml={report}", f"unit/{file}"]
        try:
            done = subprocess.run(
                command,
                cwd=tests,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            found[file] = ("failed", f"not done in {seconds} s")
            continue
        if report.is_file():
            found |= outcomes_of(report)
        else:
            found[file] = ("failed", done.stdout[-300:])
    return found


def worse(found: Mapping[str, Outcomes], way: str) -> dict[str, str]:
    """Return the tests that pass with DeepSpeed's and fail so, with why."""
    return {
        name: why
        for name, (outcome, why) in found[way].items()
        if outcome == "failed"
        and all(found[each].get(name, ("passed", ""))[0] == "passed" for each in OURS[way])
    }


def make_record(found: Mapping[str, Outcomes], settings: Mapping[str, object]) -> Record:
    """Put the counts and the claims together."""
    claims = []
    for way in OURS:
        count = len(worse(found, way))
        interval = Interval(median=count, low=count, high=count, coverage=1.0, count=1)
        claims.append(
            Claim(
                name=f"tests that pass with stock and fail with ours: {way}",
                sense="at most",
                goal=0,
                interval=interval,
                exact=True,
            )
        )
    counts = {way: dict(Counter(each for each, _ in found[way].values())) for way in found}
    return Record(
        claim="DeepSpeed's own tests pass with our initialize in place of its own",
        goal="none fails that passes with stock",
        claims=claims,
        value=max(len(worse(found, way)) for way in OURS),
        floor=None,
        peers={},
        noise={},
        samples={"counts": counts, "worse": {way: worse(found, way) for way in OURS}},
        settings=settings,
        facts={"refused": reasons(found, "refused"), "skipped": reasons(found, "skipped")},
    )


def reasons(found: Mapping[str, Outcomes], kind: str) -> dict[str, int]:
    """Return why tests came to this, and how many for each reason."""
    said = (why for each in found.values() for outcome, why in each.values() if outcome == kind)
    return dict(Counter(said))


def main() -> None:
    """Run and record; exits with 0 whether all pass or not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=0)
    add_path_argument(parser)
    parser.add_argument("checkout", type=Path, metavar="DIR", help="of DeepSpeed, with its tests")
    parser.add_argument("--tests", nargs="*", default=TESTS, metavar="FILE", help="of tests/unit")
    parser.add_argument("--every", type=positive, default=1, metavar="N", help="Nth test (1)")
    parser.add_argument("--limit-s", type=positive, default=3600, metavar="N", help="a file (3600)")
    arguments = parser.parse_args()
    if not (arguments.checkout / "tests" / "unit").is_dir():
        parser.error(f"{arguments.checkout} has no tests/unit; give a checkout of DeepSpeed")
    found: dict[str, Outcomes] = {}
    with spill_directory(arguments.path, parser) as directory:
        for way, section in tqdm(sections_of(directory).items(), desc="ways"):
            with tempfile.TemporaryDirectory() as place:
                tests = copied(arguments.checkout, section, Path(place))
                found[way] = run(tests, arguments.tests, arguments.every, arguments.limit_s)
    kinds = ("passed", "failed", "skipped", "refused")
    counts = {way: Counter(each for each, _ in found[way].values()) for way in WAYS}
    print(table(["", *kinds], [[way, *(str(counts[way][kind]) for kind in kinds)] for way in WAYS]))
    for way in OURS:
        for name, why in worse(found, way).items():
            print(f"{way}: {name}: {why}")
    settings = {"tests": list(arguments.tests), "every": arguments.every}
    write_record(make_record(found, settings), arguments.json)


if __name__ == "__main__":
    main()
