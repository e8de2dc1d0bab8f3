"""Every command and example of the README is run as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


# What the examples in Python print.
SAID = (
    r"[1-9]\d* bytes went to the SSD\n",
    r"clipped from a norm of \d+\.\d{3}, 0 steps skipped\n",
)
COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
# The two that contain this very test, or take minutes; continuous integration runs both.
LONG = ("make train", "make test")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    (ROOT / "build" / "spill").mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_there_are_commands_and_examples_to_run() -> None:
    assert len(COMMANDS) >= 6
    assert len(blocks("python")) == len(SAID)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in LONG])
def test_command_runs(command: str) -> None:
    words = command.split()
    # The interpreter that runs the tests stands in for .venv, which may lie elsewhere.
    program = words[0].replace(".venv/bin", str(Path(sys.executable).parent))
    done = run([program, *words[1:]])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", LONG)
def test_long_command_is_run_by_continuous_integration(command: str) -> None:
    assert command in COMMANDS
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("number", range(len(SAID)))
def test_python_example_runs(number: int) -> None:
    done = run([sys.executable, "-c", blocks("python")[number]])
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(SAID[number], done.stdout)


def test_files_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:examples|benchmarks|csrc|offload|docs)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
