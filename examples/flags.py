"""What the flags of the examples may say, and the one line that refuses anything else."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch.distributed as dist

from perfmodel.units import parse_bytes

__all__ = ["Parser", "at_least", "byte_size", "in_flags", "one_of"]


def one_of(
    *allowed: str, later: Sequence[str] = (), aliases: Mapping[str, str] | None = None
) -> Callable[[str], str]:
    """Make the type of a flag that takes a name; those in `later` are still to come."""

    def parse(text: str) -> str:
        text = (aliases or {}).get(text, text)
        if text in allowed:
            return text
        wrong = "is not available yet" if text in later else "is unknown"
        close = difflib.get_close_matches(text, allowed, n=1)
        hint = f", did you mean {close[0]}?" if close and text not in later else ""
        raise argparse.ArgumentTypeError(f"{text!r} {wrong}; allowed: {', '.join(allowed)}{hint}")

    return parse


def at_least(minimum: float, convert: Callable[[str], float] = int) -> Callable[[str], float]:
    """Make the type of a flag that takes a finite number from `minimum` up."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            number = convert(text)
            if minimum <= number < math.inf:
                return number
        kind = "a whole number" if convert is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {minimum} up")

    return parse


def byte_size(text: str) -> int:
    """Read `4096`, `64KiB`, `64MiB`, `2GiB`, `1TiB`, or `600TB`, as makers of drives count."""
    with contextlib.suppress(ValueError):
        if "." not in text:
            return parse_bytes(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a size; it must be a number of bytes such as 4096, 64MiB or 2GiB"
    )


def in_flags(problem: str, args: argparse.Namespace) -> str:
    """Return what the library says of its settings in the words of whoever gave flags."""
    problem = re.sub(r"\btier=", "--offload=", re.sub(r"\bpath=", "--offload-path=", problem))

    def flag(match: re.Match[str]) -> str:
        name = match[0]
        return f"--{name.replace('_', '-')}" if name in vars(args) else name

    return re.sub(r"\b[a-z]+(?:_[a-z]+)+\b", flag, problem)


class Parser(argparse.ArgumentParser):
    """Refuses in one line, printed once a machine, and with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit."""
        if dist.get_node_local_rank(fallback_rank=0) == 0:
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def parse_known_flags(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Read `argv` (None: the command line); for an unknown flag name the nearest known one."""
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists the flags"
            self.error(f"{flag} is not known here; {hint}")
        return arguments
