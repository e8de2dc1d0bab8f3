"""`perfmodel simulate`: a step on many devices, for each of several micro-batches."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from perfmodel.cluster import ClusterStep, accumulation_of, simulate_cluster
from perfmodel.commands.arguments import Parser, add_machine, add_model, add_ranks, listed, whole
from perfmodel.commands.asked import model_of, parallel_of, require_modelled
from perfmodel.commands.described import heading
from perfmodel.commands.tables import days, digits, gib, json_text, table
from perfmodel.machine import Machine, read_machine
from perfmodel.network import sent_s
from perfmodel.pipeline_step import PipelineStep, chunk_costs, pipeline_step
from perfmodel.workload import Workload

__all__ = ["add_arguments", "run"]

HEADER = (
    "micro-batch",
    "forwards",
    "step s",
    "bubble",
    "tokens/s",
    "TFLOP/s a GPU",
    "activations GiB",
    "at once GiB",
    "SSD GB/s a GPU, in half a step",
    "SSD life",
)
PIPELINE_HEADER = (
    "micro-batch",
    "forwards",
    "step s",
    "bubble",
    "waited s",
    "activations at once GiB",
    "moved GiB",
    "SSD GB/s a GPU, in half a step",
)


def add_arguments(parser: Parser) -> None:
    """Add what a cluster's step is asked for with."""
    add_machine(parser)
    add_model(parser)
    add_ranks(parser, data=True)
    parser.add_argument(
        "--global-batch", type=whole, required=True, metavar="N", help="sequences of a step"
    )
    parser.add_argument(
        "--micro-batch",
        type=listed(whole),
        required=True,
        metavar="N,N...",
        help="sequences of a forward, on each rank of data; several with commas",
    )
    parser.add_argument("--recompute", action="store_true", help="run all layers again")
    parser.add_argument(
        "--activations",
        choices=("keep", "ssd"),
        help="also run all ranks' passes in their order, with what layers save kept or moved",
    )
    parser.add_argument("--json", action="store_true", help="print all as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Simulate and print. Raises ValueError and OSError for what cannot be used."""
    machine = read_machine(arguments.machine)
    model = model_of(arguments)
    if arguments.seq_len is None:
        raise ValueError("--seq-len is missing")
    parallel = parallel_of(arguments)
    found: list[tuple[Workload, ClusterStep]] = []
    for micro_batch in arguments.micro_batch:
        if not micro_batch:
            raise ValueError("--micro-batch 0 is not at least 1")
        workload = Workload(
            model=model,
            seq_len=arguments.seq_len,
            micro_batch=micro_batch,
            accumulation=accumulation_of(arguments.global_batch, micro_batch, parallel.data),
            dtype=arguments.dtype or "bfloat16",
            parallel=parallel,
            framework=arguments.framework or "megatron",
            fused_attention=arguments.attention != "plain",
        )
        require_modelled(workload)
        _require_parts(workload)
        found.append((workload, simulate_cluster(workload, machine, recompute=arguments.recompute)))
    pipelines = [_pipeline(each, machine, arguments) for each, _ in found]
    if arguments.json:
        rows = [{"micro_batch": each.micro_batch, **asdict(step)} for each, step in found]
        for row, pipeline in zip(rows, pipelines, strict=True):
            row |= {"pipeline": None if pipeline is None else asdict(pipeline)}
        print(json_text(rows))
        return 0
    print(heading(found[0][0], machine) + "\n")
    print("\n".join(table(HEADER, [_row(each, step) for each, step in found], left=0)))
    if arguments.activations:
        moved = "moved as far as the SSDs keep up"
        where = "kept" if arguments.activations == "keep" else moved
        print(f"\nPass by pass of all ranks, without gradients and update; activations {where}\n")
        shown = [
            _pipeline_row(each, pipeline)
            for (each, _), pipeline in zip(found, pipelines, strict=True)
            if pipeline is not None
        ]
        print("\n".join(table(PIPELINE_HEADER, shown, left=0)))
    return 0


def _require_parts(workload: Workload) -> None:
    """Raise ValueError for a pipeline that Megatron has no schedule for."""
    parallel, layers = workload.parallel, workload.model.num_layers
    if layers % (parallel.pipeline * parallel.chunks):
        raise ValueError(
            f"pipeline={parallel.pipeline} with chunks={parallel.chunks} do not divide "
            f"num_layers={layers}"
        )
    if parallel.chunks > 1 and workload.accumulation % parallel.pipeline:
        raise ValueError(
            f"{workload.accumulation} micro-batches are not a multiple of "
            f"pipeline={parallel.pipeline}, which chunks={parallel.chunks} need"
        )


def _pipeline(
    workload: Workload, machine: Machine, arguments: argparse.Namespace
) -> PipelineStep | None:
    if not arguments.activations:
        return None
    moves = arguments.activations == "ssd"
    costs = chunk_costs(workload, machine, recompute=arguments.recompute, moves=moves)
    # There and back, of each chunk.
    one_way_s = sent_s(workload, machine) / 2 / workload.parallel.chunks
    return pipeline_step(costs, workload.accumulation, sent_s=one_way_s)


def _pipeline_row(workload: Workload, step: PipelineStep) -> list[str]:
    return [
        f"{workload.micro_batch}",
        f"{workload.accumulation}",
        digits(step.duration_s),
        f"{step.bubble_share:.1%}",
        digits(step.waited_s),
        gib(max(step.device_bytes)),
        gib(max(step.written_bytes)),
        digits(step.write_bytes_per_s / 1e9),
    ]


def _row(workload: Workload, step: ClusterStep) -> list[str]:
    return [
        f"{workload.micro_batch}",
        f"{workload.accumulation}",
        digits(step.step_s),
        f"{step.bubble_share:.1%}",
        digits(step.tokens_per_s),
        digits(step.flops_per_s / 1e12),
        gib(step.activation_bytes),
        gib(step.in_flight_bytes),
        digits(step.write_bytes_per_s / 1e9),
        days(step.life_days),
    ]
