"""Arguments of the commands: flags that several have, and errors in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from perfmodel.plan import DTYPES, nearest
from perfmodel.units import parse_bytes
from perfmodel.workload import FRAMEWORKS

__all__ = [
    "Parser",
    "add_batch",
    "add_limits",
    "add_machine",
    "add_model",
    "add_ranks",
    "listed",
    "one_of",
    "parse_whole",
    "size",
    "whole",
]


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError where argparse would print how it is used, and exit."""

    def __init__(self, **settings: Any) -> None:
        """Take no abbreviations: a flag to come could make them mean another."""
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong."""
        raise ValueError(message)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the arguments; ValueError names the nearest flag to one that is not known."""
        flags = [each for action in self._actions for each in action.option_strings]
        for word in words:  # before what is missing is said: it may be what was meant
            name = word.partition("=")[0]
            if name.startswith("--") and name not in flags:
                raise ValueError(f"{name} is no argument of {self.prog}{nearest(name, flags)}")
        found, left = self.parse_known_args(words)
        if left:
            raise ValueError(f"{left[0]!r} is no argument of {self.prog}")
        return found


def _checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return `read` so that argparse passes on what its ValueError says."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def parse_whole(text: str) -> int:
    """Return a whole number from 0. Raises ValueError."""
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise ValueError(f"{text!r} is not a whole number from 0")
    return int(text)


whole = _checked(parse_whole)
size = _checked(lambda text: parse_bytes(text, "size"))


def one_of(*names: str) -> Callable[[str], str]:
    """Return what reads one of `names`."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} is not {' or '.join(names)}{nearest(text, names)}")
        return text

    return _checked(read)


def listed(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return what reads several, with commas between them."""
    return lambda text: tuple(read(each.strip()) for each in text.split(","))


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add what says which model is trained, with which batches."""
    add = parser.add_argument_group("what is trained").add_argument
    add(
        "--model",
        metavar="NAME|FILE",
        help="a published model (`perfmodel models`), a config.json or its folder, a file of "
        "Megatron-LM's arguments, or gpt, bert, t5 or llama of the numbers below",
    )
    add("--layers", type=whole, metavar="N", help="of gpt (the default), bert, t5 or llama")
    add("--hidden", type=whole, metavar="N", help="channels of the same")
    add("--heads", type=whole, metavar="N", help="of the same")
    add("--vocab", type=whole, metavar="N", help="of the same (default: 256, bytes)")
    add("--seq-len", type=whole, metavar="N", help="tokens of a sequence")
    add("--dtype", type=one_of(*DTYPES), help=f"{', '.join(DTYPES)} (default: bfloat16)")
    add(
        "--attention",
        type=one_of("fused", "plain"),
        help="fused, or plain with stored scores (default: fused)",
    )
    add("--framework", type=one_of(*FRAMEWORKS), help=f"{', '.join(FRAMEWORKS)} (default: torch)")


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Add how many sequences a step has."""
    add = parser.add_argument_group("batch").add_argument
    add("--micro-batch", type=whole, metavar="N", help="sequences of a forward, on each rank")
    add("--accumulation", type=whole, metavar="N", help="forwards of a step (default: 1)")
    add("--global-batch", type=whole, metavar="N", help="sequences of a step, on all ranks")
    add("--lora-rank", type=whole, metavar="R", help="train matrices of this rank (LoRA) alone")


def add_ranks(parser: argparse.ArgumentParser, *, data: bool = False) -> None:
    """Add how ranks share the work; `data`: their number is said, and not that of all."""
    add = parser.add_argument_group("ranks").add_argument
    if data:
        add("--data", type=whole, metavar="N", help="that have batches of their own (default: 1)")
    else:
        add("--gpus", type=whole, metavar="N", help="all; what is not said below shares data")
        add("--context", type=whole, metavar="N", help="that share each sequence (default: 1)")
    add("--zero-stage", type=whole, metavar="0-3", help="what ranks of data share (default: 0)")
    add("--tensor", type=whole, metavar="N", help="that share each matrix (default: 1)")
    add(
        "--sequence-parallel",
        action="store_true",
        default=None,
        help="ranks of tensor share what is between matrices as well",
    )
    add("--pipeline", type=whole, metavar="N", help="stages of layers (default: 1)")
    add("--chunks", type=whole, metavar="N", help="parts of each stage (default: 1)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the machine."""
    parser.add_argument(
        "--machine",
        required=True,
        metavar="NAME|FILE",
        help="one of `perfmodel machines`, or a machine.json of `offload calibrate`",
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add what a run may take."""
    add = parser.add_argument_group("limits (of a rank; of the SSD of all ranks)").add_argument
    for flag, what in (
        ("--device-memory", "of the device, as 40GiB"),
        ("--host-memory", "of the host"),
        ("--pinned-memory", "of the host that is pinned"),
        ("--ssd-space", "on each drive"),
        ("--ssd-write-bytes-per-day", "written to each drive in a day, as 5TB"),
    ):
        add(flag, type=size, metavar="SIZE", help=what)
