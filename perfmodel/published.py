"""Formulas that others have published, to be held against ours and against their own figures."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "DeepSpeedEstimate",
    "deepspeed_zero2_bytes",
    "deepspeed_zero3_bytes",
    "layer_activation_bytes",
]


def layer_activation_bytes(
    seq_len: int,
    batch: int,
    hidden_size: int,
    num_heads: int,
    tensor: int = 1,
    *,
    sequence: bool = False,
    recompute: str = "none",
) -> float:
    """Return what a layer saves in half precision with plain attention and dropout, of each rank.

    Korthikanti et al. (2022), table 2, equations 1 to 4 and section 5: `tensor` ranks share the
    maps, with `sequence` the rest as well; `recompute`: `none`, `selective` (the attention's
    scores) or `full`. Raises ValueError for another.
    """
    unit = seq_len * batch * hidden_size
    scores = 5 * num_heads * seq_len * seq_len * batch
    if recompute == "full":
        return 2 * unit
    if recompute not in ("none", "selective"):
        raise ValueError(f"recompute={recompute!r} is not none, selective or full")
    scores = 0 if recompute == "selective" else scores
    alone, shared = (0, 34) if sequence else (10, 24)
    return unit * alone + (unit * shared + scores) / tensor


@dataclass(frozen=True)
class DeepSpeedEstimate:
    """What DeepSpeed's estimators say that model states need."""

    host_bytes: int
    """Of a node."""
    device_bytes: int
    """Of each of its GPUs."""


def deepspeed_zero2_bytes(
    num_params: int,
    devices_per_node: int = 1,
    nodes: int = 1,
    *,
    cpu_offload: bool = True,
    buffer_factor: float = 1.5,
) -> DeepSpeedEstimate:
    """Return `estimate_zero2_model_states_mem_needs` of DeepSpeed 0.19.8 (stage_1_and_2.py)."""
    devices = nodes * devices_per_node
    if cpu_offload:
        host = num_params * max(4 * devices, 16) * buffer_factor
        return DeepSpeedEstimate(int(host), 2 * num_params)
    device = 2 * num_params + int(18 * num_params / devices)
    return DeepSpeedEstimate(int(num_params * 4 * devices_per_node * buffer_factor), device)


def deepspeed_zero3_bytes(
    num_params: int,
    largest_layer_params: int,
    devices_per_node: int = 1,
    nodes: int = 1,
    *,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    buffer_factor: float = 1.5,
) -> DeepSpeedEstimate:
    """Return `estimate_zero3_model_states_mem_needs` of DeepSpeed 0.19.8 (stage3.py)."""
    devices, share = nodes * devices_per_node, 1 / nodes
    largest = 4 * largest_layer_params
    if not cpu_offload:
        unit = largest_layer_params if zero_init else num_params
        host = unit * 4 * devices_per_node * buffer_factor
        return DeepSpeedEstimate(int(host), largest + int(18 * num_params / devices))
    held = 18 if cpu_offload_params else 16
    each = held * share if zero_init else max(4 * devices_per_node, held * share)
    device = largest if cpu_offload_params else largest + int(2 * num_params / devices)
    return DeepSpeedEstimate(int(num_params * each * buffer_factor), device)
