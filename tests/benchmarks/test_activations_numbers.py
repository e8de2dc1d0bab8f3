"""How the activations benchmark adds up memory, and that it refuses to time wrong numbers."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from benchmarks.activations import parts_of, peaks_of, ratio_to_both_nones, require_same_numbers
from benchmarks.activations_worker import Trainee, Training, live_tensor_bytes
from benchmarks.worker import Answer, Worker, WorkerError


class Digest:
    def __init__(self, loss: str, gradients: str) -> None:
        self.given: Answer = {"loss": loss, "gradients": gradients}

    def ask(self, request: str) -> Answer:
        assert request == "digest"
        return self.given


def workers(**digests: Digest) -> dict[str, Worker]:
    return cast(dict[str, Worker], digests)


def test_equal_bits_are_let_through() -> None:
    require_same_numbers(workers(none=Digest("0x1p0", "ab"), ssd=Digest("0x1p0", "ab")))


@pytest.mark.parametrize("wrong", [Digest("0x1.1p0", "ab"), Digest("0x1p0", "ac")])
def test_one_different_bit_stops_the_benchmark(wrong: Digest) -> None:
    with pytest.raises(WorkerError, match=r"^ssd: "):
        require_same_numbers(workers(none=Digest("0x1p0", "ab"), ssd=wrong))


def test_a_peak_counts_from_mode_none_at_rest_and_includes_what_is_not_torchs() -> None:
    def answer(resting: int, peak: int, native: int = 0, page_cache: int = 0) -> dict[str, Any]:
        return {
            "resting_bytes": resting,
            "torch_peak_bytes": peak,
            "native_peak_bytes": native,
            "page_cache_bytes": page_cache,
        }

    answers = {"none": answer(1000, 500), "ssd": answer(1007, 50, 30, 4)}
    assert peaks_of(answers) == {"none": 500, "ssd": 7 + 50 + 30 + 4}


def test_the_steps_without_offload_of_a_round_count_together() -> None:
    ones = [1.0] * 24
    samples = {
        "none": {"step_s": [0.5] * 24},
        "none again": {"step_s": [1.5] * 24},
        "ssd": {"step_s": ones},
    }
    found = ratio_to_both_nones(samples, "ssd")
    assert (found.low, found.median, found.high) == (1.0, 1.0, 1.0)


def test_a_storage_counts_once_and_gradients_count() -> None:
    before = live_tensor_bytes()
    parameter = torch.zeros(1000, requires_grad=True)
    parameter.grad = torch.zeros(1000)
    view = parameter.detach()[10:]
    assert live_tensor_bytes() - before == 2 * 4000
    del parameter, view
    assert live_tensor_bytes() == before


def training(threads: int) -> Training:
    return Training(
        model="gpt",
        dropout=0.1,
        optimizer="adamw",
        layers=2,
        hidden=32,
        heads=2,
        seq_len=16,
        micro_batch=2,
        vocab=64,
        threads=threads,
        directory="",
        staging_bytes=1 << 20,
        min_tensor_bytes=1,
        io_engine="auto",
        verify=True,
    )


def test_steps_of_two_trainees_are_the_same_and_each_is_new() -> None:
    threads = torch.get_num_threads()
    try:
        one, other = (Trainee(training(threads), mode) for mode in ("none", "recompute"))
        first, second = one.answer("digest"), one.answer("digest")
        assert first != second
        assert [other.answer("digest"), other.answer("digest")] == [first, second]
    finally:
        torch.set_num_threads(threads)


def test_a_digest_sees_every_gradient() -> None:
    trainee = Trainee(training(torch.get_num_threads()), "none")
    reference = Trainee(training(torch.get_num_threads()), "none")
    last = list(trainee._model.parameters())[-1]
    last.register_hook(lambda gradient: gradient + 2**-20)
    assert trainee.answer("digest")["gradients"] != reference.answer("digest")["gradients"]


@pytest.mark.parametrize(("pairs", "restarts"), [(24, 1), (24, 4), (7, 3), (6, 9)])
def test_restarts_share_all_pairs_among_them(pairs: int, restarts: int) -> None:
    parts = parts_of(pairs, restarts)
    assert sum(parts) == pairs
    assert len(parts) == min(pairs, restarts)
    assert max(parts) - min(parts) <= 1
