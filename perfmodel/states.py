"""What a rank has in memory beside activations: each thing, its bytes, and the tier it lies on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import add

from perfmodel.parameters import Parameter, flat_gradient_count, rank_parameters, zero_count
from perfmodel.plan import (
    PAGE_BYTES,
    TIERS,
    OptimizerConfig,
    require_bytes,
    require_choice,
    update_schedule_of,
)
from perfmodel.schedules.subgroup_size import streamed_subgroup_params
from perfmodel.workload import DTYPE_BYTES, Strategy, Workload

__all__ = ["DEFAULTS", "PHASES", "Held", "held", "held_bytes"]

DEFAULTS = OptimizerConfig()
PHASES = ("", "backward", "update")

_FP32_BYTES = 4
_STEP_BYTES = 4  # of the count of steps that an optimizer has for each tensor
# DeepSpeed 0.19.8, in elements: reduce_bucket_size, and of ZeRO-3 sub_group_size and
# stage3_max_live_parameters.
_REDUCE_BUCKET = 500_000_000
_SUB_GROUP = 1_000_000_000
_MAX_LIVE_PARAMETERS = 1_000_000_000
# What `offload.AdamW` has beside a device: places on the host for gradients and parameters of three
# subgroups, each gradient's place aligned, and two buffers through which gradients are added.
_SLOTS = 3
_ALIGNMENT = 64
_GRADIENT_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Held:
    """Memory of one kind on one tier. Raises ValueError for another tier or phase, or no size."""

    name: str
    tier: str
    nbytes: int
    pinned: bool = False
    phase: str = ""
    """Held throughout a step, or only while the `backward` and its forward run, or the `update`."""

    def __post_init__(self) -> None:
        """Check the values."""
        require_choice("tier", self.tier, TIERS)
        require_choice("phase", self.phase, PHASES)
        require_bytes("nbytes", self.nbytes)


def held(
    workload: Workload,
    strategy: Strategy,
    *,
    device_is_host: bool = False,
    settings: OptimizerConfig = DEFAULTS,
) -> tuple[Held, ...]:
    """Return what the rank with the most parameters holds in a step, activations left out.

    Gradients are those at a backward's end. `settings` has the sizes of `offload.AdamW`; placement,
    schedule and early gradients are the strategy's. `device_is_host`: there is no device, all
    memory is one, and counts as the device's. What is moved only while it is updated, and what a
    framework allots in a step and gives back, has a phase of its own: the most that a step needs is
    that of the worse phase, activations counted to the backward. The optimizer has one group.

    With DeepSpeed and Megatron `offload` means that their fp32 states lie where the strategy places
    them. What allocators round up, and fixed workspaces of libraries, are none of it.
    """
    rank = _Rank(workload, strategy, settings, beside=not device_is_host)
    kinds = (rank.model(), rank.gradients(), rank.optimizer(), rank.communication(), rank.staging())
    found = [each for kind in kinds for each in kind if each.nbytes]
    if device_is_host:
        found = [
            replace(each, pinned=False, tier="ssd" if each.tier == "ssd" else "device")
            for each in found
        ]
    return tuple(found)


def held_bytes(items: Iterable[Held], tier: str, phase: str = "") -> int:
    """Return what a tier holds in a phase, of what is there throughout the step at least."""
    return sum(each.nbytes for each in items if each.tier == tier and each.phase in ("", phase))


class _Rank:
    """One rank; `beside`: there is a device, and a host beside it."""

    def __init__(
        self, workload: Workload, strategy: Strategy, settings: OptimizerConfig, *, beside: bool
    ) -> None:
        self._workload, self._strategy, self._settings = workload, strategy, settings
        self._beside = beside
        self._element_bytes = workload.element_bytes
        parallel = workload.parallel
        self._zero, self._sharers = parallel.zero_stage, parallel.data * parallel.context
        self._params = rank_parameters(workload)
        self._trained = [each for each in self._params if each.trained]
        self._deepspeed = workload.framework == "deepspeed"
        self._offloads = strategy.optimizer == "offload"
        self._shares = strategy.shares
        self._subgroup = (
            strategy.subgroup_params
            or settings.subgroup_params
            or streamed_subgroup_params(settings, from_ssd="ssd" in self._shares)
        )
        self._states = zero_count(workload, self._trained)

    # ---- parameters and gradients ------------------------------------------------------------

    def model(self) -> Iterator[Held]:
        """Yield parameters, and what a model holds beside them."""
        sharded = self._zero == 3 or (self._zero == 2 and self._workload.framework == "torch")
        count = zero_count(self._workload, self._params) if sharded else _count(self._params)
        yield Held("parameters", "device", count * self._element_bytes)
        model = self._workload.model
        if self._workload.plain == "llama":  # sines and cosines, in each layer
            rows = 2 * model.max_positions * model.head_size
            nbytes = model.num_layers * rows * self._element_bytes
            yield Held("rotations", "device", nbytes)

    def gradients(self) -> Iterator[Held]:
        """Yield gradients as they lie when the backward has ended."""
        framework = self._workload.framework
        if framework == "torch" and self._offloads:
            yield from self._own_gradients()
            return
        count = self._gradient_count
        dtype = self._workload.dtype
        if framework == "megatron":
            # Its training adds up in fp32 where it computes in bfloat16, and with float16 makes an
            # fp32 copy in the update.
            fp32 = dtype != "float16"
            yield Held("gradients", "device", count * (_FP32_BYTES if fp32 else 2))
            if not fp32:
                nbytes = self._states * _FP32_BYTES
                yield Held("fp32 gradients", "device", nbytes, phase="update")
            return
        if self._deepspeed and self._zero:
            yield from self._zero_gradients()
            return
        yield Held("gradients", "device", count * self._element_bytes)
        if self._deepspeed and self._element_bytes < _FP32_BYTES:
            nbytes = self._states * _FP32_BYTES
            yield Held("fp32 gradients", "device", nbytes, phase="update")

    def _zero_gradients(self) -> Iterator[Held]:
        """Yield those of DeepSpeed's ZeRO."""
        size, fp32 = self._element_bytes, self._states * _FP32_BYTES
        whole, mine = _count(self._trained), self._states
        if self._zero < 3:  # a rank keeps all of a tensor of which it updates any part
            mine = flat_gradient_count(self._trained, self._sharers)
        if self._zero == 1 and self._workload.accumulation > 1:  # reduced after the last backward
            yield Held("unreduced gradients", "device", (whole - mine) * size, phase="backward")
        if self._leaves:
            # ZeRO-Offload adds up in fp32 on the host; ZeRO-3 has those of the backward there too.
            yield Held("fp32 gradients", "host", fp32, pinned=True)
            if self._zero != 2:
                tier = "host" if self._zero == 3 else "device"
                yield Held("gradients", tier, mine * size, pinned=tier == "host")
            return
        yield Held("gradients", "device", mine * size)
        # Put one behind the other, and that in fp32, a part of so many elements at a time.
        count = min(self._states, _SUB_GROUP) if self._zero == 3 else self._states
        yield Held("flat gradients", "device", count * size, phase="update")
        if size < _FP32_BYTES:
            yield Held("fp32 gradients", "device", count * _FP32_BYTES, phase="update")

    @property
    def _leaves(self) -> bool:
        """Whether states lie elsewhere than on the device."""
        return self._offloads and self._beside and set(self._shares) != {"device"}

    def _own_gradients(self) -> Iterator[Held]:
        """Yield those of `offload.AdamW`: on the device, and on the host what leaves it early."""
        early, settings = self._strategy.early_gradients, self._settings
        dtype = settings.accumulate_dtype if early else None
        element_bytes = DTYPE_BYTES[dtype] if dtype else self._element_bytes
        scale = self._gradient_count / max(1, _count(self._trained))
        leaving_bytes, left_bytes = self._leaving(element_bytes, scale)
        stay = self._gradient_count * element_bytes
        if early:
            stay = max(0, stay - left_bytes)
        yield Held("gradients", "device", stay)
        yield Held("gradient copies", "host", leaving_bytes, pinned=True)
        if early and leaving_bytes:
            yield Held("gradient buffers", "host", self._gradient_buffer_bytes, pinned=True)

    @property
    def _gradient_count(self) -> int:
        return self._states if self._zero > 1 else _count(self._trained)

    @property
    def _gradient_buffer_bytes(self) -> int:
        """Of what is added to gradients on the host, as wide as the widest type."""
        count, most = self._subgroup, self._settings.gradient_bytes
        if most is not None:
            count = max(1, min(count, most // 32))
        return _FP32_BYTES * count * _GRADIENT_BUFFERS

    def _leaving(self, element_bytes: int, scale: float) -> tuple[int, int]:
        """Return what gradients take on the host that leave early, and took on the device.

        Those of which the host updates every piece. A schedule that is still to be planned counts
        as one that has the host update all; what a schedule moves counts as spread evenly.
        """
        if not self._beside:
            return 0, 0
        out, stays = _boundaries(self._subgroups(), _FP32_BYTES * self._rows, self._shares)
        limit, all_count = self._settings.gradient_bytes, True
        if limit is None:
            limit, all_count = self._settings.staging_bytes, False
        if all_count or out:
            limit -= self._gradient_buffer_bytes * self._strategy.early_gradients
        # What is on the SSD does not move.
        share = _host_share(self._strategy.update_schedule)
        on_host, on_device, at = 0.0, 0.0, 0
        for each in self._trained:
            count = round(each.count * scale)  # as ZeRO has cut them
            nbytes = -(-count * element_bytes // _ALIGNMENT) * _ALIGNMENT
            counts = nbytes if all_count or at < out else 0
            part = 1.0 if at + count <= out else share
            if part and at + count <= stays and counts <= limit:
                on_host, on_device = on_host + part * nbytes, on_device + part * count
                limit -= counts
            at += count
        return round(on_host), round(on_device) * element_bytes

    # ---- states ------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        """How many fp32 numbers the optimizer has of each parameter; 0: two of its own type."""
        half = self._element_bytes < _FP32_BYTES
        if self._workload.framework == "torch":
            # Beside a device master copies lie with the other states, those of fp32 as well.
            return (3 if half or self._beside else 2) if self._offloads else 0
        copies = self._deepspeed and self._zero  # of fp32 parameters, too
        return 3 if half or copies or (self._offloads and self._beside) else 2

    def _subgroups(self) -> list[int]:
        """Return how many parameters each subgroup of the optimizer has."""
        whole, rest = divmod(self._states, self._subgroup)
        return [self._subgroup] * whole + [rest] * (rest > 0)

    def optimizer(self) -> Iterator[Held]:
        """Yield states, and what is set aside for those that move."""
        if not self._rows:
            yield Held("optimizer states", "device", 2 * self._states * self._element_bytes)
        if self._workload.framework == "torch":
            nbytes = _STEP_BYTES * len(self._trained)
            yield Held("step counts", "host" if self._offloads else "device", nbytes)
        if not self._rows:
            return
        if not self._offloads:
            nbytes = _FP32_BYTES * self._rows * self._states
            yield Held("optimizer states", "device", nbytes)
            return
        rows = self._rows
        if self._deepspeed and self._zero and self._leaves:
            # On the host wherever the moments are, and its own master copy there.
            yield Held("optimizer states", "host", _FP32_BYTES * self._states, pinned=True)
            rows = 2
        sizes, row_bytes = self._subgroups(), _FP32_BYTES * rows
        out, stays = _boundaries(sizes, row_bytes, self._shares)
        yield Held("optimizer states", "ssd", out * row_bytes)
        yield Held("optimizer states", "host", (stays - out) * row_bytes, pinned=True)
        yield Held("optimizer states", "device", (self._states - stays) * row_bytes)
        if "ssd" in self._shares:
            on_ssd = [size * row_bytes for size in _first(sizes, out)]
            pages = sum(-(-nbytes // PAGE_BYTES) * PAGE_BYTES for nbytes in on_ssd)
            # The old version stays until the new one is there, and both are whole pages.
            yield Held("new versions of states", "ssd", 2 * pages - sum(on_ssd))
            yield Held("staging of states", "host", self._settings.staging_bytes)
        yield from self._moving(max(sizes, default=0))

    def _moving(self, most: int) -> Iterator[Held]:
        """Yield the buffers for subgroups of `most` parameters beside a device."""
        if self._deepspeed and self._leaves and self._zero:
            # Updated parameters on their way back, in their own precision.
            nbytes = self._states * self._element_bytes
            yield Held("update buffers", "host", nbytes, pinned=True)
            if self._strategy.update_schedule != "host" and "host" in self._shares:
                # A gradient and a parameter beside at most three states.
                yield Held("update buffers", "device", 2 * 5 * _FP32_BYTES * most)
        elif self._beside and (self._workload.framework == "torch" or self._leaves):
            kind, _ = update_schedule_of(self._strategy.update_schedule)
            buffers = 1 if kind == "stride" else 2
            yield Held("update buffers", "device", buffers * 3 * _FP32_BYTES * most)
            yield Held("update buffers", "host", _SLOTS * 2 * _FP32_BYTES * most, pinned=True)

    # ---- what goes between ranks and tiers ---------------------------------------------------

    def communication(self) -> Iterator[Held]:
        """Yield buckets of gradients, and parameters gathered from other ranks."""
        framework, count = self._workload.framework, _count(self._params)
        trained = _count(self._trained)
        if framework == "deepspeed":
            # One bucket, allotted whole: by ZeRO-1 and 2 in each backward, by ZeRO-3 for good.
            # Without ZeRO gradients are added up in flat copies.
            bucket = _REDUCE_BUCKET if self._zero else min(trained, _REDUCE_BUCKET)
            bucket = 0 if not self._zero and self._sharers == 1 else bucket
            phase = ("update", "backward", "backward", "")[self._zero]
            nbytes = bucket * self._element_bytes
            yield Held("gradient buckets", "device", nbytes, phase=phase)
            if self._zero == 3:
                live = min(count, _MAX_LIVE_PARAMETERS) * self._element_bytes
                yield Held("gathered parameters", "device", live, phase="backward")
        elif framework == "torch" and self._zero > 1:
            # FSDP2 gathers a layer while it computes with another, and reduces gradients likewise.
            # What is in no layer is a group of its own, the root's, which stays gathered until the
            # backward ends; at stage 2 everything does.
            # DistributedDataParallel's buckets are the gradients' own memory
            # (gradient_as_bucket_view), Megatron's contiguous buffer as well.
            gathered = count if self._zero == 2 else _count_at_once(self._params)
            nbytes = gathered * self._element_bytes
            yield Held("gathered parameters", "device", nbytes, phase="backward")
            nbytes = _count_at_once(self._trained) * self._element_bytes
            yield Held("gradient buckets", "device", nbytes, phase="backward")

    def staging(self) -> Iterator[Held]:
        """Yield what activations go through."""
        if self._strategy.activations in ("host", "ssd"):
            nbytes = self._strategy.staging_bytes
            yield Held("staging of activations", "host", nbytes, pinned=True)


def _count(params: Iterable[Parameter]) -> int:
    return sum(each.count for each in params)


def _count_at_once(params: Iterable[Parameter]) -> int:
    """Return the elements of what is in no layer, and of the two layers in a row with the most."""
    counts = {"": 0}
    for each in params:
        counts[each.layer] = counts.get(each.layer, 0) + each.count
    outside, *layers = counts.values()
    return outside + max(map(add, layers, [*layers[1:], 0]), default=0)


def _boundaries(sizes: Sequence[int], row_bytes: int, shares: dict[str, float]) -> tuple[int, int]:
    """Return where the parameters on the SSD end, the first ones, and where the device's begin.

    A subgroup lies where more than half of it is.
    """
    ends = [0, *accumulate(sizes)]
    total = ends[-1] * row_bytes
    on_ssd = shares.get("ssd", 0.0) * total
    on_device = (1 - shares.get("device", 0.0)) * total

    def middle(at: int) -> float:
        return (ends[at] + sizes[at] / 2) * row_bytes

    out, stays = (
        ends[bisect_right(range(len(sizes)), most, key=middle)] for most in (on_ssd, on_device)
    )
    return out, max(out, stays)


def _first(sizes: Sequence[int], count: int) -> Iterator[int]:
    """Yield the sizes of the subgroups that the first `count` parameters are in."""
    for size in sizes:
        if count <= 0:
            return
        yield size
        count -= size


def _host_share(schedule: str) -> float:
    """Return which part of what is not on the device for good the host updates."""
    kind, number = update_schedule_of(schedule)
    if kind == "share":
        return 1 - number
    return 1 - 1 / number if kind == "stride" and number else 1.0
