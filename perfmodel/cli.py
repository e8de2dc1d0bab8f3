"""The `perfmodel` command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from perfmodel.commands.arguments import Parser
from perfmodel.commands.tables import ascii_line
from perfmodel.plan import nearest

__all__ = ["main"]

# A command's module is imported when it is asked for: most of them take long beside a plan.
COMMANDS = {
    "plan": "what fits on a machine, the best of it, and its memory and step time",
    "predict": "what a plan.json comes to, beside what it says",
    "simulate": "a step on many devices, for several micro-batches",
    "validate": "what is predicted of others' published figures, and of records",
    "machines": "the machines that are known by name",
    "models": "the models that are known by name",
}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {said}" for name, said in COMMANDS.items()]
    return "\n".join(
        [
            "usage: perfmodel COMMAND ...",
            "",
            "How much memory and time a training step takes, before it is run.",
            "",
            *lines,
            "",
            "`perfmodel COMMAND --help` has a command's arguments.",
        ]
    )


def _run(words: Sequence[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    allowed = ", ".join(COMMANDS)
    if not words:
        raise ValueError(f"no command is given: {allowed}")
    name = words[0]
    if name not in COMMANDS:
        raise ValueError(f"{name!r} is no command{nearest(name, list(COMMANDS))}: {allowed}")
    command = importlib.import_module(f"perfmodel.commands.{name}")
    parser = Parser(prog=f"perfmodel {name}", description=COMMANDS[name])
    command.add_arguments(parser)
    status: int = command.run(parser.read(words[1:]))
    return status


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 for wrong arguments, 3 where nothing fits."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough. What is still buffered must go somewhere at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as done:  # of --help
        return int(done.code or 0)
    except (ValueError, OSError, RecursionError) as error:
        print(f"perfmodel: error: {ascii_line(_said(error))}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
