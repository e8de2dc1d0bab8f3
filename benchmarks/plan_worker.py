"""The process that trains by a plan, a step at each request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

import offload
from benchmarks.activations_worker import Trainee, Training
from benchmarks.worker import Answer, Subject, Worker, serve
from examples.heap import keep_freed_memory
from examples.models import MODELS, ModelConfig
from offload.config import Plan

__all__ = ["PlannedTrainee", "open_planned"]


class PlannedTrainee(Trainee):
    """A model that trains by a plan: its tiers, layers that run again, micro-batches and states."""

    def __init__(self, training: Training, plan: Plan) -> None:
        torch.set_num_threads(training.threads)
        torch.manual_seed(0)
        self._training, self._num_steps = training, 0
        self._times = plan.accumulation or 1
        sessions: list[offload.Session] = []

        def run(layer: Any, *inputs: Any) -> Any:
            return sessions[0].block(layer, *inputs)

        config = ModelConfig(
            vocab_size=training.vocab,
            seq_len=training.seq_len,
            num_layers=training.layers,
            hidden_size=training.hidden,
            num_heads=training.heads,
        )
        self._model = MODELS[training.model](config, run)
        self._session = offload.Session(self._model, plan)
        sessions.append(self._session)
        self._act = self._session.activations
        self._parameters = list(self._model.parameters())
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = self._session.make_optimizer(self._parameters, lr=1e-4)

    def _backward(self, tokens: torch.Tensor) -> float:
        self._optimizer.zero_grad(set_to_none=False)
        total = 0.0
        for part in tokens.chunk(self._times):
            with self._session.forward():
                loss = self._model(part[:, :-1], part[:, 1:]) / self._times
            torch.autograd.backward(loss)
            total += float(loss.detach())
        return total


def open_planned(name: str, training: Training, plan: Plan) -> Worker:
    """Start the worker `name` that trains by `plan`; raises WorkerError if it cannot."""
    return Worker(name, __name__, {"plan": plan.to_json(), **asdict(training)})


def _open_subject(settings: Mapping[str, object]) -> tuple[Subject, Answer]:
    rest: dict[str, Any] = json.loads(json.dumps(settings))
    plan = Plan.from_mapping(rest.pop("plan"))
    kept = keep_freed_memory()
    trainee = PlannedTrainee(Training(**rest), plan)
    return trainee, {**trainee.facts(), "freed_memory_kept": kept}


if __name__ == "__main__":
    serve(_open_subject)
