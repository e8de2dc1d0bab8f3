"""Child processes that are measured in turns: each answers one line of JSON per request.

A subject of its own process has its own allocator state, threads and libraries, cannot hang or
crash the benchmark, and waits without work while another one is measured.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, Protocol

from benchmarks.record import ROOT

__all__ = ["Subject", "Worker", "WorkerError", "number", "serve"]

_ANSWER_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 30.0

Answer = dict[str, object]


class WorkerError(RuntimeError):
    """A worker failed, died or hung; the message says which and how."""


class Subject(Protocol):
    """What a worker process measures."""

    def answer(self, request: str) -> Answer:
        """Do what `request` names and return what was measured."""

    def close(self) -> None:
        """Give back files and memory."""


class Worker:
    """A child that runs `python -m module SETTINGS`, owned by one parent thread.

    Raises WorkerError if the child has not said hello within `start_timeout_s`; its greeting is
    in `facts`.
    """

    def __init__(
        self,
        name: str,
        module: str,
        settings: Mapping[str, object],
        *,
        start_timeout_s: float = _ANSWER_TIMEOUT_S,
    ) -> None:
        self.name = name
        self._pending = b""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        # DeepSpeed builds its extension by calling `ninja`, which pip puts beside this interpreter.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            bufsize=0,
        )
        try:
            self.facts = self._receive(start_timeout_s)
        except BaseException:
            self.close()
            raise

    def ask(self, request: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> Answer:
        """Send one request and return its answer; raises WorkerError if there is none."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise WorkerError(self._last_words()) from error
        return self._receive(timeout_s)

    def close(self) -> None:
        """Let the child end, end it if it does not; idempotent."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.close()  # the child's loop ends with its input
        try:
            self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        stdout.close()
        self._stderr.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self, timeout_s: float) -> Answer:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                self._process.kill()
                raise WorkerError(f"{self.name}: no answer within {timeout_s:.0f} s")
            received = os.read(stdout.fileno(), 1 << 16)
            if not received:
                raise WorkerError(self._last_words())
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no message"
        if code == -signal.SIGKILL:
            last = "killed, maybe because memory ran out; make the sizes smaller"
        return f"{self.name}: ended with code {code}: {last}"


def serve(open_subject: Callable[[Mapping[str, object]], tuple[Subject, Answer]]) -> None:
    """Run the child's side: open the subject, greet with its facts, answer until input ends."""
    # Libraries print to standard output as they please, so the answers take it for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        subject, facts = open_subject(json.loads(sys.argv[1]))
    except Exception as error:  # whatever stops a peer is the reason for its absence
        say({"error": _one_line(error)})
        return
    say(facts)
    try:
        for line in sys.stdin:
            try:
                say(subject.answer(json.loads(line)))
            except Exception as error:
                say({"error": _one_line(error)})
    finally:
        subject.close()


def number(answer: Mapping[str, object], key: str) -> float:
    """Return one figure of an answer; raises WorkerError if it is none."""
    value = answer.get(key)
    if not isinstance(value, int | float):
        raise WorkerError(f"{key}: {value!r} is no number")
    return float(value)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
