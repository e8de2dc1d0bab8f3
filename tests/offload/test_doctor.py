"""`offload doctor`: a line a capability, with its reason, and an exit status to build upon."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload.cli import main
from offload.doctor import CHECKS, examine


def test_every_check_gives_one_line_with_a_reason(
    spill_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(spill_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(CHECKS)
    for line in lines:
        name, answer, why = line.split(maxsplit=2)
        assert answer in ("yes", "no"), name
        assert len(why) > 5, name


def test_require_exits_1_when_the_answer_is_no(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    assert main(["doctor", missing, "--require", "o_direct"]) == 1
    assert "required but missing: o_direct" in capsys.readouterr().err
    assert main(["doctor", missing, "--require", "posix"]) == 0


def test_a_directory_that_cannot_be_used_is_an_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    assert main(["doctor", str(missing)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("gds")  # all the rest is still said
    assert err.startswith(f"offload doctor: {missing}: No such file or directory")
    assert err.count("\n") == 1


def test_require_of_a_typo_names_the_nearest_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", ".", "--require", "urring"]) == 2
    assert "did you mean uring?" in capsys.readouterr().err


def test_a_reader_that_leaves_early_gets_no_traceback(spill_dir: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "offload", "doctor", str(spill_dir)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_directory_in_ram_is_no_disk() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm here")
    (finding,) = examine(str(shm), only=["disk"])
    assert not finding.ok
    assert "RAM" in finding.why


def test_missing_directory_is_a_finding_not_an_exception(tmp_path: Path) -> None:
    findings = {f.name: f for f in examine(str(tmp_path / "nowhere"))}
    for name in ("disk", "o_direct", "free_space"):
        assert not findings[name].ok
        assert "No such file" in findings[name].why
    assert findings["posix"].ok


def test_unknown_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["docter"])
    assert stopped.value.code == 2
    assert "docter" in capsys.readouterr().err
