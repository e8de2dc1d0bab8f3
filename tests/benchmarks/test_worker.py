"""Workers answer, fail, die and hang; whoever asks them is told which."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.worker import Worker, WorkerError, number

SUBJECT = """
import os, sys, time
from benchmarks.worker import serve

class Subject:
    def answer(self, request):
        print("noise on standard output")
        if request == "fail":
            raise OSError("no\\nspace")
        if request == "die":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        if request == "hang":
            time.sleep(600)
        return {"request": request}

    def close(self):
        open(sys.argv[0] + ".closed", "w").close()

def open_subject(settings):
    print("noise while opening")
    if settings.get("refuse"):
        raise RuntimeError("libexample.so is missing")
    return Subject(), {"size": settings["size"]}

serve(open_subject)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "subject_under_test.py"
    path.write_text(SUBJECT, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return path


def worker(settings: dict[str, object]) -> Worker:
    return Worker("subject", "subject_under_test", settings)


def test_answers_are_not_mixed_with_what_libraries_print(module: Path) -> None:
    with worker({"size": 5}) as subject:
        assert subject.facts == {"size": 5}
        assert [subject.ask(word) for word in ("a", "b")] == [{"request": "a"}, {"request": "b"}]
    assert Path(f"{module}.closed").exists()


@pytest.mark.usefixtures("module")
def test_a_failed_request_is_told_in_one_line_and_the_next_one_is_answered() -> None:
    with worker({"size": 5}) as subject:
        with pytest.raises(WorkerError, match=r"^OSError: no space$"):
            subject.ask("fail")
        assert subject.ask("next") == {"request": "next"}


@pytest.mark.usefixtures("module")
def test_a_subject_that_cannot_open_says_why() -> None:
    with pytest.raises(WorkerError, match=r"RuntimeError: libexample\.so is missing"):
        worker({"refuse": True})


@pytest.mark.usefixtures("module")
def test_a_killed_worker_is_told_with_what_may_have_killed_it() -> None:
    with worker({"size": 5}) as subject:
        subject._process.kill()
        with pytest.raises(WorkerError, match="code -9: killed, maybe because memory ran out"):
            subject.ask("next")


@pytest.mark.usefixtures("module")
def test_a_dead_worker_is_told_with_code_and_last_words() -> None:
    with worker({"size": 5}) as subject:
        with pytest.raises(WorkerError, match="subject: ended with code 3: the last words"):
            subject.ask("die")
        with pytest.raises(WorkerError, match="ended with code 3"):
            subject.ask("next")


@pytest.mark.usefixtures("module")
def test_a_hanging_worker_is_ended() -> None:
    with worker({"size": 5}) as subject:
        with pytest.raises(WorkerError, match="subject: no answer within 1 s"):
            subject.ask("hang", timeout_s=1)
        process = subject._process
    assert process.returncode == -9


@pytest.mark.usefixtures("module")
def test_closing_twice_is_harmless() -> None:
    subject = worker({"size": 5})
    subject.close()
    subject.close()
    assert subject._process.returncode == 0


def test_a_module_that_is_missing_is_told() -> None:
    with pytest.raises(WorkerError, match=r"ended with code 1: .*No module named"):
        Worker("subject", "no_such_subject", {})


def test_a_figure_that_is_none_is_refused() -> None:
    assert number({"wall_s": 2}, "wall_s") == 2.0
    with pytest.raises(WorkerError, match="cpu_s: None is no number"):
        number({"wall_s": 2}, "cpu_s")
