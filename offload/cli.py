"""The `offload` command."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from offload.calibrate import calibrate
from offload.calibrate.summary import machine_lines
from offload.config import markdown, schema
from offload.doctor import CHECKS, directory_problem, examine, system_line
from offload.integrations.deepspeed_config import read_config
from offload.integrations.deepspeed_migration import migrated

__all__ = ["main"]

_OF_TOKENS = {
    "train-predictor": ("predictor_command", "train_predictor"),
    "tune-thresholds": ("threshold_command", "tune"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="offload", description="Offloading for training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine can do, line by line, and why",
        description="Say what this machine can do for offloading, line by line, and why. Exits "
        "with 1 where something required is missing, or, with nothing required, where PATH cannot "
        "be written to.",
    )
    doctor.add_argument(
        "path", nargs="?", default=".", help="the directory to spill to (default: this one)"
    )
    doctor.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="CHECK",
        help=f"exit 1 unless this one is 'yes'; may be repeated: {', '.join(CHECKS)}",
    )
    described = commands.add_parser(
        "schema",
        help="print the JSON Schema of a plan",
        description="Print the JSON Schema (draft 2020-12) of a plan.",
    )
    described.add_argument(
        "--markdown", action="store_true", help="print the reference of its keys in Markdown"
    )
    measured = commands.add_parser(
        "calibrate",
        help="measure this machine for the performance model",
        description="Measure what this machine and the drive of PATH do in a second, in a minute "
        "or less, and write it as a machine.json for `perfmodel --machine`.",
    )
    measured.add_argument("path", help="a directory on the drive; 256 MiB are written to it")
    measured.add_argument("-o", "--output", required=True, metavar="FILE", help="the machine.json")
    measured.add_argument("--name", default="present", help="of the machine (default: present)")
    rewritten = commands.add_parser(
        "plan-from-ds",
        help="say a DeepSpeed config's offloading as a plan",
        description="Read a DeepSpeed config that offloads optimizer states, say what is done here "
        "instead, and print the config with the section `offload`.",
    )
    rewritten.add_argument("config", help="the ds_config.json")
    rewritten.add_argument("--path", default="", help="a directory on an SSD for activations")
    rewritten.add_argument("-o", "--output", metavar="FILE", help="write the new config there")
    _add_tokens(commands)
    return parser


def _add_tokens(commands: Any) -> None:
    """List the commands about tokens."""
    about = commands.add_parser("tokens", help="train what foretells which tokens matter")
    named = about.add_subparsers(dest="tokens_command", required=True, metavar="COMMAND")
    trained = named.add_parser(
        "train-predictor",
        help="train predictors beside a frozen model",
        description="Train, beside a frozen causal model of Hugging Face's, two small nets a layer "
        "that foretell which blocks of tokens its attention looks at, say how many of the true "
        "ones they find, and write them for `tokens.sparse.predictor` of a plan.",
    )
    _add_model_and_text(trained, "the predictors (safetensors)")
    _add_counts(trained, ("--steps", 400, "a sequence each"))
    _add_counts(trained, ("--judged", 20, "sequences for recall, at most"))
    add = trained.add_argument
    add("--ratio", type=float, default=0.4, help="of blocks that stay, for recall (0.4)")
    add("--lr", type=float, default=1e-3, help="learning rate (1e-3)")
    tuned = named.add_parser(
        "tune-thresholds",
        help="find the scores over which blocks stay",
        description="Find for each layer of a causal model of Hugging Face's the score over which "
        "blocks of tokens stay: from the mean of its scores, by LeMo's Algorithm 1 on a text, and "
        "write a plan with `tokens.sparse.thresholds`.",
    )
    _add_model_and_text(tuned, "the plan")
    _add_counts(tuned, ("--sequences", 8, "of the text, at most"))
    _add_counts(tuned, ("--rounds", 1, "of all layers"))
    add = tuned.add_argument
    add("--ratio", type=float, default=0.4, help="below 1: which layers leave blocks out (0.4)")
    cost = "what keeping all tokens costs, as a part of the loss (0.1)"
    add("--cost", type=_over_zero, default=0.1, help=cost)


def _add_model_and_text(parser: argparse.ArgumentParser, output: str) -> None:
    add = parser.add_argument
    add("model", help="a name or folder of a model, or a config.json: then bytes")
    add("--data", required=True, metavar="FILE", help="a text like that to be trained on")
    add("-o", "--output", required=True, metavar="FILE", help=output)
    _add_counts(parser, ("--seq-len", 4096, "tokens in a sequence"))
    _add_counts(parser, ("--block-tokens", 64, "in a block"))
    add("--sees-all", action="store_true", help="for a choice that sees later tokens")


def _add_counts(parser: argparse.ArgumentParser, count: tuple[str, int, str]) -> None:
    flag, default, said = count
    parser.add_argument(
        flag, type=_positive, default=default, metavar="N", help=f"{said} ({default})"
    )


def _over_zero(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number over 0")
    return found


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


def _tokens(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        print("offload tokens: needs transformers: pip install transformers", file=sys.stderr)
        return 2
    module, name = _OF_TOKENS[arguments.tokens_command]
    command = getattr(importlib.import_module(f"offload.integrations.{module}"), name)
    status: int = command(arguments)
    return status


def _schema(in_markdown: bool) -> int:
    print(markdown() if in_markdown else json.dumps(schema(), indent=2) + "\n", end="")
    return 0


def _doctor(path: str, required: Sequence[str]) -> int:
    for name in required:
        if name not in CHECKS:
            close = difflib.get_close_matches(name, CHECKS, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            print(
                f"offload doctor: --require {name} is no check{hint} (checks: {', '.join(CHECKS)})",
                file=sys.stderr,
            )
            return 2
    print(system_line())
    missing = []
    for finding in examine(path):
        print(f"{finding.name:<11} {'yes' if finding.ok else 'no ':<3}  {finding.why}")
        if not finding.ok and finding.name in required:
            missing.append(finding.name)
    problem = None if required else directory_problem(path)
    if problem:
        print(f"offload doctor: {problem}", file=sys.stderr)
        return 1
    if missing:
        print(f"offload doctor: required but missing: {', '.join(missing)}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _written(path: Path) -> Iterator[IO[str]]:
    """Open a file that takes the place of `path` when all is written; before, nothing changes."""
    if path.exists() and not path.is_file():  # a device's name would go to a file
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _progress(part: float) -> None:
    """Say on a terminal how far it is, in one line; elsewhere when it begins and when it ends."""
    if sys.stderr.isatty():
        end = "\n" if part == 1 else ""
        print(f"\rmeasuring: {part:4.0%}", end=end, file=sys.stderr, flush=True)
    elif part in (0, 1):
        print(f"measuring: {'done' if part else 'a minute or less'}", file=sys.stderr, flush=True)


def _calibrate(path: str, output: str, name: str) -> int:
    try:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "it is no directory", path)
        with _written(Path(output)) as file:  # before it takes a minute
            _progress(0)
            machine = replace(calibrate(path, progress=_progress), name=name)
            file.write(json.dumps(machine.to_json(), indent=1) + "\n")
    except (OSError, RuntimeError, ValueError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        print(f"offload calibrate: {' '.join(said.split())}", file=sys.stderr)
        return 2
    print("\n".join(machine_lines(machine)))
    return 0


def _plan_from_ds(config: str, path: str, output: str | None) -> int:
    try:
        Path(config).stat()  # raises for one that is not there
        given = read_config(config)
        if given is None:
            raise ValueError(f"{config}: is not a JSON object")
        found = migrated(given, path)
        text = json.dumps(found.config, indent=2) + "\n"
        if output is None:
            print(text, end="")
        else:
            with _written(Path(output)) as file:
                file.write(text)
    except (OSError, ValueError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        print(f"offload plan-from-ds: {said}", file=sys.stderr)
        return 2
    for line in found.lines:
        print(line, file=sys.stderr if output is None else sys.stdout)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (2 for arguments that cannot be used)."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "schema":
            status = _schema(arguments.markdown)
        elif arguments.command == "calibrate":
            status = _calibrate(arguments.path, arguments.output, arguments.name)
        elif arguments.command == "tokens":
            status = _tokens(arguments)
        elif arguments.command == "plan-from-ds":
            status = _plan_from_ds(arguments.config, arguments.path, arguments.output)
        else:
            status = _doctor(arguments.path, arguments.require)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough. What is still buffered must go somewhere at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
