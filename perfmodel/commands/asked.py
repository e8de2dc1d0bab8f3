"""What is asked for: a workload, a machine and limits, out of a command's arguments."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perfmodel.cluster import accumulation_of
from perfmodel.known_models import known_models, read_known_model
from perfmodel.machine import Machine, read_machine
from perfmodel.megatron_arguments import ignored_of_megatron, workload_of_megatron
from perfmodel.model import Model
from perfmodel.model_configs import model_of_config
from perfmodel.plain_models import PLAIN_MODELS, plain_model
from perfmodel.plan import nearest
from perfmodel.plan_file import Limits
from perfmodel.states import held
from perfmodel.units import format_bytes
from perfmodel.workload import Parallel, Strategy, Workload

__all__ = [
    "Asked",
    "asked",
    "limits_of",
    "model_of",
    "parallel_of",
    "read_text",
    "require_modelled",
    "shared_machine",
]

NUMBERS = ("layers", "hidden", "heads", "vocab")
# Above these the model has nothing to say, and would take minutes to say it.
MOST_LAYERS = 2000
MOST_EXPERTS = 100_000
MOST_SEQUENCES = 1 << 20
MOST_PARAMS = 10**13
# Of Megatron's arguments, those that stand for a flag here. The last one said counts.
MEGATRON = {
    "seq_len": "seq-length",
    "micro_batch": "micro-batch-size",
    "global_batch": "global-batch-size",
    "tensor": "tensor-model-parallel-size",
    "pipeline": "pipeline-model-parallel-size",
    "context": "context-parallel-size",
}


@dataclass(frozen=True)
class Asked:
    """A step on a machine, within limits."""

    workload: Workload
    machine: Machine
    """As it is described, whatever part of it is used."""
    limits: Limits = field(default_factory=Limits)
    notes: tuple[str, ...] = ()
    """What is to be known beside."""

    @property
    def used_machine(self) -> Machine:
        """The machine with no more devices than there are ranks: they share what is the node's."""
        return shared_machine(self.machine, self.workload.parallel.ranks)


def shared_machine(machine: Machine, ranks: int) -> Machine:
    """Return `machine` with as many devices as `ranks` use of it."""
    return replace(machine, devices=min(machine.devices, ranks))


def read_text(path: Path) -> str:
    """Return a file's text. Raises ValueError for what is none, OSError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text") from None


def asked(arguments: argparse.Namespace) -> Asked:
    """Return what `plan` and `predict` are asked for. Raises ValueError by key, and OSError."""
    machine = read_machine(arguments.machine)
    given = _file_of(arguments.model)
    notes: tuple[str, ...] = ()
    if isinstance(given, Model) or given is None:
        workload = _workload(arguments, given)
    else:
        workload, notes = _of_megatron(arguments, given)
    notes += tuple(_positions(workload))
    require_modelled(workload)
    limits = limits_of(arguments)
    several = any(getattr(arguments, key, None) for key in ("zero_stages", "pipelines"))
    if limits.device_bytes is not None and not several:
        _require_room(workload, machine, limits.device_bytes)
    return Asked(workload, machine, limits, notes)


# ---- models ----------------------------------------------------------------------------------


def model_of(arguments: argparse.Namespace) -> Model:
    """Return the model alone; Megatron's arguments stand for the one that they describe."""
    given = _file_of(arguments.model)
    if given is None:
        return _plain(arguments)
    if isinstance(given, Model):
        _require_no_numbers(arguments)
        return given
    return workload_of_megatron(given).model


def _file_of(name: str | None) -> Model | list[str] | dict[str, Any] | None:
    """Return the model that `name` stands for, or arguments of Megatron's; None: a plain one."""
    if name is None or name in PLAIN_MODELS:
        return None
    known = known_models()
    if name.lower() in known:
        return read_known_model(name.lower())
    path = Path(name)
    if not path.exists():
        if "/" in name or path.suffix:
            raise FileNotFoundError(2, "there is no such file", name)
        names = [*PLAIN_MODELS, *known]
        raise ValueError(
            f"--model {name!r} is not known: {', '.join(names)}, or the path of a config.json or "
            f"of Megatron-LM's arguments{nearest(name.lower(), names)}"
        )
    path = path / "config.json" if path.is_dir() else path
    text = read_text(path)
    if path.suffix != ".json" and not text.lstrip().startswith(("{", "[")):
        return _words(text, path)
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if isinstance(config, dict) and "model_type" not in config and "num_layers" in config:
        return config
    try:
        stem = path.parent.name if path.name == "config.json" else path.stem
        return model_of_config(config, stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _words(text: str, path: Path) -> list[str]:
    """Return the words of a command line or a shell script's, from its first flag on."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ValueError(f"{path} is no command line: {error}") from None
    first = next((at for at, word in enumerate(words) if word.startswith("--")), None)
    if first is None:
        raise ValueError(f"{path} is neither a config.json nor has it flags of Megatron-LM's")
    return words[first:]


def _plain(arguments: argparse.Namespace) -> Model:
    kind = arguments.model or "gpt"
    for key in ("layers", "hidden", "heads", "seq_len"):
        if getattr(arguments, key) is None:
            said = "" if arguments.model else ", or --model"
            raise ValueError(f"{_flag(key)} is missing for {kind}{said}")
    return plain_model(
        kind,
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_heads=arguments.heads,
        seq_len=arguments.seq_len,
        vocab_size=256 if arguments.vocab is None else arguments.vocab,
    )


def _require_no_numbers(arguments: argparse.Namespace) -> None:
    for key in NUMBERS:
        if getattr(arguments, key) is not None:
            raise ValueError(
                f"{_flag(key)} is for --model {', '.join(PLAIN_MODELS)}, not {arguments.model}"
            )


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


# ---- workloads -------------------------------------------------------------------------------


def parallel_of(arguments: argparse.Namespace) -> Parallel:
    """Return how ranks share the work: `--gpus` are all, what is left of them shares data."""
    shared = {
        key: getattr(arguments, key) or 1
        for key in ("tensor", "pipeline", "context", "chunks")
        if _not_zero(arguments, key)
    }
    of_one = Parallel(**shared, sequence=bool(arguments.sequence_parallel))
    data = getattr(arguments, "data", None)
    if data is None:
        gpus = getattr(arguments, "gpus", None)  # not of what simulates, which has --data
        ranks = of_one.ranks if gpus is None else gpus
        data, left = divmod(ranks, of_one.ranks)
        if left or not data:
            raise ValueError(
                f"--gpus {ranks} is not a multiple of the {of_one.ranks} ranks that share a model"
            )
    return replace(of_one, data=data, zero_stage=arguments.zero_stage or 0)


def _not_zero(arguments: argparse.Namespace, key: str) -> bool:
    if getattr(arguments, key, None) == 0:
        raise ValueError(f"{_flag(key)} 0 is not at least 1")
    return hasattr(arguments, key)


def _workload(arguments: argparse.Namespace, model: Model | None) -> Workload:
    plain = ""
    parallel = parallel_of(arguments)
    if model is None:
        model, plain = _plain(arguments), arguments.model or "gpt"
        if parallel.ranks > parallel.data:
            raise ValueError(
                f"ranks of {plain}, which is examples/train_gpt.py's, share data alone; give a "
                "config.json instead"
            )
    else:
        _require_no_numbers(arguments)
    for key in ("seq_len", "micro_batch"):
        if getattr(arguments, key) is None:
            raise ValueError(f"{_flag(key)} is missing")
        _not_zero(arguments, key)
    return Workload(
        model=model,
        seq_len=arguments.seq_len,
        micro_batch=arguments.micro_batch,
        accumulation=_accumulation(arguments, arguments.micro_batch, parallel.data),
        dtype=arguments.dtype or "bfloat16",
        parallel=parallel,
        framework=arguments.framework or "torch",
        fused_attention=arguments.attention != "plain",
        lora_rank=arguments.lora_rank or 0,
        plain=plain,
    )


def _accumulation(arguments: argparse.Namespace, micro_batch: int, data: int) -> int:
    if arguments.global_batch is None:
        return 1 if arguments.accumulation is None else int(arguments.accumulation)
    if arguments.accumulation is not None:
        raise ValueError("--accumulation and --global-batch say the same; give one of them")
    return accumulation_of(arguments.global_batch, micro_batch, data)


def _of_megatron(
    arguments: argparse.Namespace, given: list[str] | dict[str, Any]
) -> tuple[Workload, tuple[str, ...]]:
    """Return the workload of Megatron's arguments, with what is said beside them, and notes."""
    _require_no_numbers(arguments)
    said = {name: getattr(arguments, key) for key, name in MEGATRON.items()}
    said = {name: value for name, value in said.items() if value is not None}
    if isinstance(given, Mapping):
        given = {str(key).lstrip("-").replace("_", "-"): each for key, each in given.items()} | said
    else:
        given = [
            *given,
            *(word for key, value in said.items() for word in (f"--{key}", f"{value}")),
        ]
    workload = workload_of_megatron(given, world_size=arguments.gpus)
    shared = {
        "zero_stage": arguments.zero_stage,
        "sequence": arguments.sequence_parallel,
        "chunks": arguments.chunks,
    }
    shared = {key: value for key, value in shared.items() if value is not None}
    attention = {"fused": True, "plain": False}.get(arguments.attention or "")
    changes = {
        "accumulation": arguments.accumulation,
        "dtype": arguments.dtype,
        "framework": arguments.framework,
        "lora_rank": arguments.lora_rank,
        "fused_attention": attention,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    workload = replace(workload, parallel=replace(workload.parallel, **shared), **changes)
    ignored = ignored_of_megatron(given)
    notes = (f"not made use of in {arguments.model}: {', '.join(ignored)}",) if ignored else ()
    return workload, notes


# ---- sizes -----------------------------------------------------------------------------------


def limits_of(arguments: argparse.Namespace) -> Limits:
    """Return the limits that are given; a command without such flags has none."""
    flags = {
        "device_bytes": "device_memory",
        "host_bytes": "host_memory",
        "pinned_bytes": "pinned_memory",
        "ssd_bytes": "ssd_space",
        "ssd_write_bytes_per_day": "ssd_write_bytes_per_day",
    }
    return Limits(**{key: getattr(arguments, flag, None) for key, flag in flags.items()})


def require_modelled(workload: Workload) -> None:
    """Raise ValueError for more than is modelled."""
    model = workload.model
    if workload.lora_rank > model.hidden_size:
        raise ValueError(
            f"lora_rank={workload.lora_rank} is more than the {model.hidden_size} channels that "
            "an adapter is to have fewer than"
        )
    layers = model.num_layers + model.encoder_layers
    sequences = workload.micro_batch * workload.accumulation
    for what, number, most in (
        ("layers", layers, MOST_LAYERS),
        ("experts of all layers", layers * model.num_experts, MOST_EXPERTS),
        ("sequences of a rank", sequences, MOST_SEQUENCES),
        ("parameters", model.num_params, MOST_PARAMS),
    ):
        if number > most:
            raise ValueError(f"{number} {what} are more than the {most} that are modelled")


def _positions(workload: Workload) -> Iterator[str]:
    """Yield that a model has a table of fewer positions than a sequence has, if so."""
    model = workload.model
    if model.positions == "learned" and 0 < model.max_positions < workload.seq_len:
        yield (
            f"note: {model.name} has {model.max_positions:,} learned positions, fewer than a "
            f"sequence of {workload.seq_len:,}"
        )


def _require_room(workload: Workload, machine: Machine, device_bytes: int) -> None:
    """Raise ValueError where not even the parameters fit, which stay on the device."""
    alone = held(workload, Strategy(optimizer="torch"), device_is_host=machine.link is None)
    params = sum(each.nbytes for each in alone if each.name == "parameters")
    if device_bytes < params:
        raise ValueError(
            f"--device-memory of {format_bytes(device_bytes)} is below the {format_bytes(params)} "
            "of a rank's parameters, which stay there; share them with --zero-stage 3 or --tensor"
        )
