"""Sessions: a plan changes no bit, fits its model, and is made where none is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
import offload.session
from examples.models import MODELS, ModelConfig
from offload.config import Limits, Plan, read_plan
from perfmodel.machine import Machine, read_machine
from perfmodel.plain_models import plain_model
from perfmodel.workload import Parallel, Strategy, Workload
from tests.offload.tokens.sparse_llama import RULE, batch, made

LAYERS, HIDDEN, HEADS, SEQ, VOCAB = 4, 64, 4, 32, 256
LEAST = 4096


def workload_of(kind: str = "gpt", layers: int = LAYERS) -> Workload:
    model = plain_model(kind, num_layers=layers, hidden_size=HIDDEN, num_heads=HEADS, seq_len=SEQ)
    return Workload(model=model, seq_len=SEQ, micro_batch=4, dtype="float32", plain=kind)


def planned(tmp_path: Path, kind: str = "gpt", **chosen: Any) -> Plan:
    strategy = Strategy(**{"min_tensor_bytes": LEAST, "optimizer": "torch", **chosen})
    return Plan.of(workload_of(kind), strategy, path=(str(tmp_path),))


def trained(plan: Plan | Mapping[str, Any] | str, kind: str = "gpt") -> list[torch.Tensor]:
    """Return losses and parameters of three steps."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB, seq_len=SEQ, num_layers=LAYERS, hidden_size=HIDDEN, num_heads=HEADS
    )
    box: list[offload.Session] = []

    def run(layer: Any, *inputs: Any) -> Any:
        return box[0].block(layer, *inputs)

    model = MODELS[kind](config, run)
    losses = []
    with offload.Session(model, plan) as session:
        box.append(session)
        optimizer = session.make_optimizer(model.parameters(), lr=1e-2)
        for _ in range(3):
            tokens = torch.randint(VOCAB, (4, SEQ + 1))
            optimizer.zero_grad()
            with session.forward():
                loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if session.activations is not None:
            stats = session.stats()
            assert stats is not None
            assert stats.offloaded_bytes > 0
    return [*losses, *(param.detach().clone() for param in model.parameters())]


@pytest.mark.parametrize("kind", [*MODELS])
@pytest.mark.parametrize(
    "chosen",
    [
        {"activations": "recompute"},
        {"activations": "recompute", "recompute": (1, 3)},
        {"activations": "ssd", "memory_bytes": 100_000},
    ],
    ids=str,
)
def test_no_plan_changes_a_bit(tmp_path: Path, kind: str, chosen: dict[str, Any]) -> None:
    kept = trained(planned(tmp_path, kind), kind)
    assert all(map(torch.equal, trained(planned(tmp_path, kind, **chosen), kind), kept))


def test_states_lie_where_the_plan_has_them_with_the_same_bits(tmp_path: Path) -> None:
    host, ssd = (
        trained(planned(tmp_path, optimizer="offload", placement=place))
        for place in ("host", "ssd")
    )
    assert all(map(torch.equal, host, ssd))


def test_a_plan_is_read_from_its_file_and_from_what_that_says(tmp_path: Path) -> None:
    plan = planned(tmp_path, activations="recompute")
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()))
    kept = trained(plan)
    assert all(map(torch.equal, trained(str(file)), kept))
    assert all(map(torch.equal, trained(plan.to_json()), kept))
    with offload.Session(torch.nn.Identity(), replace(plan, workload=None)) as session:
        assert session.plan == replace(plan, workload=None)
    assert read_plan(file) == plan
    assert json.loads(file.read_text()) == read_plan(file).to_json()


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    plan = Plan.of(workload_of(layers=3), Strategy(optimizer="torch"))
    with pytest.raises(ValueError, match=r"made for a model of \d+ parameters, and this one has"):
        trained(plan)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="num_layers is 3 in the plan and 4 here"):
        offload.Session(model, plan, workload=workload_of())


def test_blocks_are_counted_anew_in_each_forward_and_left_alone_without_gradients(
    tmp_path: Path,
) -> None:
    calls: list[bool] = []

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            return x * x

    plan = Plan.of(
        workload_of(), Strategy(optimizer="torch", activations="recompute", recompute=(1,))
    )
    with offload.Session(torch.nn.Identity(), replace(plan, workload=None)) as session:
        x = torch.ones(2, requires_grad=True)
        for _ in range(2):
            calls.clear()
            with session.forward():
                out = session.block(Layer(), session.block(Layer(), x))
            out.sum().backward()
            assert len(calls) == 3  # the second one again
        calls.clear()
        with torch.no_grad(), session.forward():
            session.block(Layer(), session.block(Layer(), x))
        assert len(calls) == 2


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Stand in for this machine."""
    machine = replace(read_machine("laptop"), link=None)
    monkeypatch.setattr(offload.session, "present_machine", lambda path: machine)
    return machine


def test_without_a_plan_this_machine_is_planned_for(here: Machine, tmp_path: Path) -> None:
    model = MODELS["gpt"](
        ModelConfig(
            vocab_size=VOCAB, seq_len=SEQ, num_layers=LAYERS, hidden_size=HIDDEN, num_heads=HEADS
        )
    )
    session = offload.Session(model, workload=workload_of(), path=str(tmp_path))
    assert session.plan.activations.mode == "keep"
    assert session.predicted is not None
    assert session.predicted.step_s > 0
    assert session.plan.is_for_machine(here)
    assert session.plan.micro_batch == 4


def test_where_nothing_fits_it_says_what_would_do(here: Machine) -> None:
    with pytest.raises(ValueError, match=r"no plan fits: over device_bytes by .*device memory"):
        offload.Session(
            torch.nn.Identity(), workload=workload_of(), limits=Limits(device_bytes=1 << 20)
        )
    with pytest.raises(ValueError, match="plan='auto' needs workload="):
        offload.Session(torch.nn.Identity())


def test_ranks_without_a_device_share_its_memory_in_a_plan(
    here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Machine] = []
    search = offload.session.search_plan

    def spied(workload: Workload, machine: Machine, *rest: Any) -> Any:
        seen.append(machine)
        return search(workload, machine, *rest)

    monkeypatch.setattr(offload.session, "search_plan", spied)
    two = replace(workload_of(), parallel=Parallel(data=2))
    plans = [offload.session.plan_here(each) for each in (workload_of(), two)]
    assert [each.devices for each in seen] == [1, 2]
    assert seen[1].network_bytes_per_s > 0
    assert all(plan.is_for_machine(replace(here, drive=None)) for plan in plans)


def test_a_plan_that_asks_for_what_is_not_there_yet_is_refused(tmp_path: Path) -> None:
    plan = replace(planned(tmp_path), report="run.jsonl")
    with pytest.raises(ValueError, match=r"report='run.jsonl' is not written yet"):
        offload.Session(torch.nn.Identity(), plan)


@pytest.mark.parametrize("mode", ["sparse", "gradient"])
def test_blocks_that_run_again_keep_the_tokens_that_their_forward_kept(mode: str) -> None:
    pytest.importorskip("transformers")
    tokens = {"mode": mode, "sparse": {**RULE, "ratio": 0.3}}
    found = {}
    for how in ("keep", "recompute"):
        model, plan = made(), {"version": 1, "tokens": tokens, "activations": {"mode": how}}
        with offload.Session(model, plan) as session:
            layers = model.model.layers
            for layer in layers:
                whole = layer.forward

                def run(x: Any, *, whole: Any = whole, **named: Any) -> Any:
                    return session.block(lambda x: whole(x, **named), x)

                layer.forward = run
            loss = model(**batch()).loss
            loss.backward()
            assert session.sparsity is not None
            assert session.sparsity.kept_share < 0.9
            found[how] = [loss, *(each.grad for each in model.parameters())]
    assert all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))


def test_quality_is_due_every_so_many_steps_once_and_of_the_first_batch() -> None:
    pytest.importorskip("transformers")
    rule = {**RULE, "ratio": 0.3, "meter_steps": 2, "warm_up_steps": 1, "most_loss_gap": 1e6}
    model = made()
    with offload.Session(
        model, {"version": 1, "tokens": {"mode": "sparse", "sparse": rule}}
    ) as session:
        assert session.sparsity is not None
        steps = 0
        session.sparsity.follow(lambda: steps)
        due = []
        for steps in range(5):
            due.append(session.quality_is_due())
            if due[-1]:
                given = batch(1 + steps)
                found = session.quality_of_probe(given)
                assert not session.quality_is_due()
                model(**given).loss.backward()
                assert found.dense_loss == session.quality_of_probe(batch(9)).dense_loss
        assert due == [False, False, True, False, True]
        session.sparsity.fallen_back = True
        steps = 6
        assert not session.quality_is_due()
    with offload.Session(made(), {"version": 1, "tokens": {"mode": "exact"}}) as session:
        assert not session.quality_is_due()
        with pytest.raises(ValueError, match="no token is left out"):
            session.measure_quality(batch())
