"""Trains models of megatron-core, one rank of it: what the tests start, for all cases at once.

Reads {"cases": {name: case}} and writes {name: {"losses", "gradients", "parameters"}} for its rank.
A case has `model` (gpt, bert, t5), `tensor`, `pipeline`, `chunks` (interleaved), `micro_batches`,
`bf16`, `distributed` (the optimizer), `config` (more of TransformerConfig's), `plan` (None: nothing
moves, `offload.AdamW` on the device), and of checkpoints `load`, `save` (directories), `format` of
the distributed optimizer's, `first` (the step to begin with) and `fused` (as with Transformer
Engine).
"""

from __future__ import annotations

# ruff: noqa: E402 - the shim comes before whatever imports megatron-core
import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.offload.integrations.megatron_shim import Norm, install

install()

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import (
    get_t5_decoder_with_local_block_spec,
    get_t5_encoder_with_local_block_spec,
)
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from offload.integrations.megatron import (
    build_optimizer,
    close_optimizer,
    session_of,
    wrap_forward_step,
    wrap_model,
)

surprises: list[logging.LogRecord] = []
"""What was said of passes that were not expected."""
VOCAB, LENGTH, ROWS, WIDTH, LAYERS = 64, 16, 2, 32, 4
KEPT = {"version": 1, "optimizer": {"placement": "device"}}


def config_of(case: dict[str, Any]) -> TransformerConfig:
    """Return a tiny model's configuration, with what needs a GPU switched off."""
    dtype = torch.bfloat16 if case.get("bf16") else torch.float32
    pipeline, chunks = case.get("pipeline", 1), case.get("chunks", 1)
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=4,
        ffn_hidden_size=2 * WIDTH,
        use_cpu_initialization=True,
        tensor_model_parallel_size=case.get("tensor", 1),
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bool(case.get("bf16")),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        # Interleaved over gloo, Megatron frees outputs that are still being sent.
        deallocate_pipeline_outputs=chunks == 1,
        # Over gloo the other way has wrong gradients, and no word of it.
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
        **case.get("config", {}),
    )


def model_of(kind: str, config: TransformerConfig, chunk: int | None) -> Any:
    """Return one chunk of a model, on this rank."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk)
    given: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_sequence_length": LENGTH,
        "pre_process": first,
        "post_process": last,
    }
    if kind == "bert":
        return BertModel(config, 0, bert_layer_local_spec, **given, add_binary_head=False)
    if kind == "t5":
        encoder = get_t5_encoder_with_local_block_spec(LAYERS)
        decoder = get_t5_decoder_with_local_block_spec(LAYERS)
        if not (first and last):
            # A stage has the encoder and one the decoder, each with its own ends.
            given |= {"pre_process": True, "post_process": True}
            given |= {"add_encoder": first, "add_decoder": last}
        return T5Model(config, config, encoder, decoder, **given)
    experts = config.num_moe_experts
    spec: Any = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False)
    if config.sequence_parallel:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
        spec = TransformerBlockSubmodules(layer_specs=[spec] * LAYERS, layer_norm=Norm)
    return GPTModel(config, spec, vp_stage=chunk, **given)


def forward_of(kind: str) -> Callable[..., Any]:
    """Return the forward step of a kind of model, as a user of Megatron writes it."""

    def loss_of(output: torch.Tensor) -> Any:
        loss = output.float().mean()
        return loss, {"loss": loss.detach().clone()}

    def forward_step(data: Any, model: Any) -> Any:
        tokens = next(data)
        places = torch.arange(LENGTH)[None].expand(ROWS, LENGTH)
        hidden = torch.tril(torch.ones(1, 1, LENGTH, LENGTH)) < 0.5
        if kind == "gpt":
            return model(tokens[:, :-1], places, hidden, labels=tokens[:, 1:]), loss_of
        seen = torch.ones(ROWS, LENGTH, dtype=torch.long)
        if kind == "bert":
            found = model(tokens[:, :-1], seen, lm_labels=tokens[:, 1:])
            return (found[0] if isinstance(found, tuple) else found), loss_of
        wide = torch.zeros(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)
        inputs = tokens[:, :-1], tokens[:, :-1]
        return model(*inputs, wide, hidden.expand_as(wide), wide, tokens[:, 1:]), loss_of

    return forward_step


def digest(tensors: Any) -> str:
    """Return a hash of the bits of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def opened(case: dict[str, Any]) -> tuple[list[Any], Any, TransformerConfig]:
    """Return the model's chunks and the optimizer."""
    config, chunks = config_of(case), case.get("chunks", 1)
    model = []
    for chunk in range(chunks):
        one = model_of(case["model"], config, chunk if chunks > 1 else None)
        one = Float16Module(config, one) if config.bf16 else one
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.bf16,
            use_distributed_optimizer=bool(case.get("distributed")),
            overlap_grad_reduce=False,
        )
        model.append(DistributedDataParallel(config, settings, one))
    plan = case.get("plan") or KEPT
    wrap_model(model, plan)
    optimizer = build_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.1,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=bool(case.get("distributed")),
            clip_grad=0.1,
        ),
        model,
        plan,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = None
    return model, optimizer, config


def sharded(model: list[Any], optimizer: Any, case: dict[str, Any], *, loading: bool) -> Any:
    """Return what Megatron's training saves, or is about to load."""
    kind = {
        "distrib_optim_sharding_type": case.get("format", "dp_reshardable"),
        "distrib_optim_fully_reshardable_mem_efficient": True,  # over gloo
    }
    chunks = {
        f"model{number}": chunk.sharded_state_dict()
        for number, chunk in enumerate(unwrap_model(model))
    }
    states = optimizer.sharded_state_dict(chunks, is_loading=loading, metadata=kind)
    return {**chunks, "optimizer": states}


@torch.no_grad()
def load(model: list[Any], optimizer: Any, case: dict[str, Any]) -> None:
    """Go on where a checkpoint was made."""
    asked = sharded(model, optimizer, case, loading=True)
    found = dist_checkpointing.load(asked, case["load"])
    for number, chunk in enumerate(unwrap_model(model)):
        chunk.load_state_dict(found[f"model{number}"], strict=False)
    optimizer.load_state_dict(found["optimizer"])


def save(model: list[Any], optimizer: Any, case: dict[str, Any]) -> None:
    """Make a checkpoint."""
    Path(case["save"]).mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(sharded(model, optimizer, case, loading=False), case["save"])


def states_of(optimizer: Any) -> list[Any]:
    """Return a hash of all states, and the steps that were counted."""
    hashes, steps = [], set()
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = each.optimizer
        found = inner.state_dict()["state"].values()
        hashes += [digest([states["exp_avg"], states["exp_avg_sq"]]) for states in found]
        steps |= {float(states["step"]) for states in found}
    return [hashes, sorted(steps)]


def data_of(step: int, count: int) -> list[torch.Tensor]:
    """Return this rank's micro-batches of a step."""
    generator = torch.Generator().manual_seed(step)
    rank = parallel_state.get_data_parallel_rank()
    return [
        torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
        for _ in range(count * (rank + 1))
    ][rank * count :]


def taken(
    step: int, model: list[Any], optimizer: Any, forward_step: Callable[..., Any], count: int
) -> tuple[list[float], str]:
    """Take a step; return its losses, and a hash of the gradients."""
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    tokens = data_of(step, count)
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(tokens) for _ in model],
        model=model,
        num_microbatches=count,
        seq_length=LENGTH,
        decoder_seq_length=LENGTH,
        micro_batch_size=ROWS,
        forward_only=False,
    )
    gradients = digest(p.main_grad for chunk in model for p in chunk.parameters())
    optimizer.step()
    return [float(each["loss"]) for each in found], gradients


def trained(case: dict[str, Any]) -> dict[str, Any]:
    """Train; return losses, and hashes of what came of it."""
    chunks = case.get("chunks", 1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.get("tensor", 1),
        pipeline_model_parallel_size=case.get("pipeline", 1),
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    )
    torch.manual_seed(1 + case.get("first", 0))
    model_parallel_cuda_manual_seed(123)
    surprises.clear()
    fused = bool(case.get("fused"))
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = fused
    model, optimizer, _ = opened(case)
    count, first = case.get("micro_batches", 2), case.get("first", 0)
    forward_step = wrap_forward_step(forward_of(case["model"]), lambda: count)
    if case.get("warm"):  # without Transformer Engine its own loads only what it has states of
        taken(0, model, optimizer, forward_step, count)
    if "load" in case:
        load(model, optimizer, case)
    steps = [
        taken(step, model, optimizer, forward_step, count)
        for step in range(first, first + case.get("steps", 2))
    ]
    if "save" in case:
        save(model, optimizer, case)
    return {
        "losses": [losses for losses, _ in steps],
        "gradients": [gradients for _, gradients in steps],
        "norms": [float(p.detach().double().norm()) for c in model for p in c.parameters()],
        "parameters": digest(p for chunk in model for p in chunk.parameters()),
        **({"states": states_of(optimizer)} if case.get("states") else {}),
        **closed(model, optimizer),
        "surprised": len(surprises),
    }


def closed(model: list[Any], optimizer: Any) -> dict[str, int]:
    """Give all back; return what moved."""
    session = session_of(model)
    moved = {}
    if session is not None:
        stats = session.stats()
        assert stats is not None
        moved = {"offloaded": stats.offloaded_bytes, "reloaded": stats.reloaded_bytes}
        session.close()
    close_optimizer(optimizer)
    return moved


def main() -> None:
    """Run all cases, each with a parallel state of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    expected = logging.getLogger("offload.integrations.pipeline")
    expected.setLevel(logging.INFO)
    expected.addFilter(lambda record: surprises.append(record) is not None)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, case in json.loads(arguments.cases.read_text())["cases"].items():
        try:
            found[name] = trained(case)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            found[name]["trace"] = traceback.format_exc()
        parallel_state.destroy_model_parallel()
    arguments.out.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()  # what wrote checkpoints, and would hold the output open
    os._exit(0)


if __name__ == "__main__":
    main()
