"""An instance is opened with checked settings, closed for good, and not taken along by fork."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import offload

SIZE = 64


def leaves(count: int) -> list[torch.Tensor]:
    return [torch.randn(SIZE, SIZE, requires_grad=True) for _ in range(count)]


def chain(act: offload.ActivationOffload, weights: list[torch.Tensor]) -> torch.Tensor:
    with act.forward():
        y = torch.ones(SIZE, SIZE)
        for weight in weights:
            y = (y * weight).sin()
        return y.sum()


def test_a_closed_instance_says_so(make: Any) -> None:
    act = make()
    loss = chain(act, leaves(2))
    step = act.forward()
    act.close()
    act.close()
    with pytest.raises(RuntimeError, match="close it after the last backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        act.forward()
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        step.__enter__()
    assert act.stats().spill_bytes == 0


def test_closing_inside_a_forward_is_an_error_and_not_a_crash(make: Any) -> None:
    act = make()
    w = torch.ones(SIZE, SIZE, requires_grad=True)

    def forward_that_closes() -> None:
        with act.forward():
            y = (w * 2).exp()
            act.close()
            y.exp().exp()

    with pytest.raises(RuntimeError, match="closed"):
        forward_that_closes()


def test_an_exception_closes_the_outer_context(make: Any) -> None:
    act = make()
    with pytest.raises(KeyError), act:
        raise KeyError
    with pytest.raises(RuntimeError, match="closed"):
        act.forward()


def test_a_forked_child_is_told_to_make_its_own(make: Any) -> None:
    act = make()
    weights = leaves(3)
    loss = chain(act, weights)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for deed in (act.forward, loss.backward):
            try:
                deed()
            except RuntimeError as error:
                said.append(str(error))
        del loss
        act.close()
        os.write(writer, "\n".join(said).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said_by_child:
        assert "has to make its own" in said_by_child.read().replace("\n", " ")
    assert os.waitpid(child, 0)[1] == 0
    loss.backward()
    assert weights[0].grad is not None


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"tier": "sdd"}, ValueError, r"tier='sdd'.*did you mean 'ssd'"),
        ({"tier": "host"}, ValueError, r"tier='host'.*needs a GPU"),
        ({"tier": "device"}, ValueError, r"tier='device'.*tier 'ssd'"),
        ({"path": ()}, ValueError, r"path=\(\)"),
        ({"staging_bytes": -1}, ValueError, r"staging_bytes=-1"),
        ({"io_engine": "urin"}, ValueError, r"io_engine='urin'.*did you mean 'uring'"),
        ({"path": "/nowhere/at/all"}, FileNotFoundError, "/nowhere/at/all"),
        ({"path": "/etc/hostname"}, NotADirectoryError, "/etc/hostname"),
        ({"stagin_bytes": 1}, TypeError, "stagin_bytes"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(
    make: Any, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make(**settings)


def test_an_unwritable_directory_is_refused() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root is kept out of nothing but /proc")
    with pytest.raises(OSError, match="/proc"):
        offload.ActivationOffload(path="/proc/self")
