"""What a benchmark measured: paired ratios with intervals, claims, and the JSON record of a run.

Peers are measured in alternation, so a claim compares the two timings of one round, and what the
machine did to both of them cancels. The interval of the median ratio comes from order statistics:
it assumes nothing about how timings are distributed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
CONFIDENCE = 0.95
PACKAGES = ("torch", "numpy", "deepspeed", "kvikio-cu13")

__all__ = [
    "ROOT",
    "Claim",
    "Interval",
    "Record",
    "add_json_argument",
    "add_record_arguments",
    "exactly",
    "hidden_by_layers",
    "median_interval",
    "paired_ratios",
    "positive",
    "quartiles_text",
    "round_order",
    "table",
    "write_record",
]


# --- Pairs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median and the order statistics around it; `coverage` is how surely they enclose it."""

    median: float
    low: float
    high: float
    coverage: float
    count: int


def exactly(value: float) -> Interval:
    """Return what was counted, not timed."""
    return Interval(median=value, low=value, high=value, coverage=1.0, count=1)


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the median of `samples` and its narrowest order-statistic interval.

    With too few samples to reach `confidence` (below six for 95 %) the interval is their whole
    range and `coverage` says what that is worth. Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("median_interval: no samples")
    ordered = sorted(samples)
    count = len(ordered)
    # The median lies below the k-th smallest with the probability of fewer than k heads.
    below, left_out = 0.0, 0
    for heads in range(count // 2):
        below += math.comb(count, heads) / 2**count
        if 1 - 2 * below < confidence:
            break
        left_out = heads
    tail = sum(math.comb(count, heads) for heads in range(left_out + 1)) / 2**count
    return Interval(
        median=statistics.median(ordered),
        low=ordered[left_out],
        high=ordered[count - 1 - left_out],
        coverage=max(0.0, 1 - 2 * tail),
        count=count,
    )


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return ours / theirs of every round. Raises ValueError where the rounds do not match."""
    if len(ours) != len(theirs):
        raise ValueError(f"paired_ratios: {len(ours)} rounds against {len(theirs)}")
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def round_order(names: Sequence[str], index: int) -> list[str]:
    """Return who goes when in round `index`: a Williams design.

    Everyone has every place, and follows everyone else, equally often: what one leaves behind in
    caches, heap and drive is shared out.
    """
    count = len(names)
    zigzag = [place // 2 if place % 2 == 0 else count - 1 - place // 2 for place in range(count)]
    order = [names[(place + index) % count] for place in zigzag]
    # An odd number needs the mirrored rows as well.
    return order[::-1] if count % 2 and (index // count) % 2 else order


# --- Claims ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One ratio and its goal. `interval` is None for a peer that is absent, `reason` says why.

    It is met when the median and its whole interval meet the goal, so noise cannot meet it; it is
    undecided (None) without the peer, or with too few rounds for an interval.
    """

    name: str
    sense: Literal["at least", "at most"]
    goal: float
    interval: Interval | None
    reason: str = ""
    exact: bool = False  # counted, not timed: one sample decides

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, None where this run cannot say."""
        if self.interval is None or not (self.exact or self.interval.coverage >= CONFIDENCE):
            return None
        return self._meets(self.interval.low if self.sense == "at least" else self.interval.high)

    def _meets(self, ratio: float) -> bool:
        return ratio >= self.goal if self.sense == "at least" else ratio <= self.goal

    def as_json(self) -> dict[str, object]:
        """Return the claim as it stands in the record."""
        interval = asdict(self.interval) if self.interval else None
        return {
            "name": self.name,
            "value": self.interval.median if self.interval else None,
            "interval": interval,
            "sense": self.sense,
            "goal": self.goal,
            "met": self.met,
            "reason": self.reason,
        }

    def row(self) -> list[str]:
        """Return the claim as a row of the printed table."""
        met = {True: "met", False: "NOT met", None: "undecided"}[self.met]
        goal = f"{'>=' if self.sense == 'at least' else '<='} {self.goal:g}"
        if self.interval is None:
            return [self.name, "-", "-", goal, f"{met}: {self.reason}"]
        spread = f"{self.interval.low:.3f} .. {self.interval.high:.3f}"
        if self.exact:
            spread = "exact"
        elif self.met is None:
            met += ": too few pairs"
        elif not self.met and self._meets(self.interval.median):
            met += " beyond noise: the median meets it, its interval reaches past it"
        return [self.name, f"{self.interval.median:.3f}", spread, goal, met]


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything one run of a benchmark says. `value` and `floor` are its headline ratios."""

    claim: str
    goal: str
    claims: Sequence[Claim]
    value: float | None
    floor: float | None
    peers: Mapping[str, float | None]
    noise: Mapping[str, Interval]  # the same thing against itself, in the same rounds
    samples: Mapping[str, object]
    settings: Mapping[str, object]
    absent: Mapping[str, str] = field(default_factory=dict)  # peer: why
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether every claim is met; None as soon as one of them is undecided."""
        verdicts = [claim.met for claim in self.claims]
        return None if None in verdicts else all(verdicts)

    def as_json(self, argv: Sequence[str]) -> dict[str, object]:
        """Return the object that --json writes; `argv` is the command that measured it."""
        return {
            "claim": self.claim,
            "goal": self.goal,
            "value": self.value,
            "met": self.met,
            "claims": [claim.as_json() for claim in self.claims],
            "peers": dict(self.peers),
            "absent": dict(self.absent),
            "floor": self.floor,
            "noise": {name: asdict(interval) for name, interval in self.noise.items()},
            "machine": machine_facts(),
            "versions": versions(),
            "commit": commit(),
            "command": command_line(argv),
            "settings": dict(self.settings),
            "facts": dict(self.facts),
            "samples": dict(self.samples),
        }

    def text(self) -> str:
        """Return the claims, the noise beside them and the verdict as a short table."""
        rows = [claim.row() for claim in self.claims]
        rows += [
            [name, f"{i.median:.3f}", f"{i.low:.3f} .. {i.high:.3f}", "", "noise"]
            for name, i in self.noise.items()
        ]
        verdict = {True: "met", False: "not met", None: "undecided"}[self.met]
        head = ["", "ratio", f"{CONFIDENCE:.0%} interval", "goal", ""]
        lines = [table(head, rows), *(f"{name}: {why}" for name, why in self.absent.items())]
        return "\n".join([*lines, f"{self.claim}: {verdict}"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text in aligned columns, the first to the left, the others to the right."""
    every = [head, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in {0, len(head) - 1} else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )


def quartiles_text(samples: Sequence[float], digits: int = 2) -> str:
    """Return median and quartiles as text, the median alone of fewer than four samples."""
    middle = f"{statistics.median(samples):.{digits}f}"
    if len(samples) < 4:
        return middle
    low, _, high = statistics.quantiles(samples)
    return f"{middle} ({low:.{digits}f}-{high:.{digits}f})"


def _finite(value: object) -> object:
    # JSON has no infinity; a ratio over nothing is no number.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


# --- Where and with what --------------------------------------------------------------------------


def machine_facts() -> dict[str, object]:
    """Return what the figures depend on: processor, memory, kernel, GPUs and the present load."""
    cpu = platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, check=False)
        gpus = listed.stdout.splitlines() if listed.returncode == 0 else []
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "gpus": gpus,
        "load_1min": os.getloadavg()[0],
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that take part, None for one absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Return the checked-out commit, marked where files differ from it; None outside of git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=False
        )
        if head.returncode != 0:
            return None
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def command_line(argv: Sequence[str]) -> str:
    """Return the command that repeats the run from the top of the repository.

    Where its record and its picture went is left out: that is a path of one machine.
    """
    script = Path(argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    rest = list(argv[1:])
    for flag in ("--json", "--picture"):
        if flag in rest:
            at = rest.index(flag)
            del rest[at : at + 2]
    return shlex.join(["python", name, *rest])


# --- Flags and files ------------------------------------------------------------------------------


def positive(text: str) -> int:
    """Parse a flag's whole number above zero."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def hidden_by_layers(text: str) -> tuple[int, int]:
    """Parse HIDDENxLAYERS."""
    hidden, _, layers = text.partition("x")
    try:
        return positive(hidden), positive(layers)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not HIDDENxLAYERS, as 8192x4") from error


def _new_file(text: str) -> Path:
    # Found out now: a run of many minutes should not end with a record that cannot be written.
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is no file in a writable directory")
    return path


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag every benchmark has."""
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="write the record here")


def add_record_arguments(parser: argparse.ArgumentParser, *, warm_up: int) -> None:
    """Add the flags of one that takes turns: --json, --pairs and --warm-up (its default given)."""
    add_json_argument(parser)
    parser.add_argument(
        "--pairs", type=positive, default=24, metavar="N", help="timed rounds (24; 6 at least)"
    )
    parser.add_argument(
        "--warm-up", type=positive, default=warm_up, metavar="N", help=f"rounds before ({warm_up})"
    )


def write_record(record: Record, path: Path | None) -> None:
    """Print the table of `record` and write it to `path`, where given, as one JSON object."""
    print(record.text())
    if path is not None:
        text = json.dumps(_finite(record.as_json(sys.argv)), indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"record: {path}")
