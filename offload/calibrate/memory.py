"""What memory and updates of parameters take, a round at a time."""

from __future__ import annotations

import statistics
from collections import defaultdict
from functools import partial

import torch

from offload.calibrate.timing import Stopwatch, curve_of
from offload.native import AdamSettings, ThreadPool, adam_update
from perfmodel.machine import Curve

__all__ = ["PARAMS", "MemoryRounds"]

PARAMS = 8 << 20
"""That are updated at a time."""
_SETTINGS = AdamSettings(lr=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
_MOVED_MIB = (1, 8, 64)


class MemoryRounds:
    """Seconds of every round; rates are of their medians.

    What a machine's memory is worth changes from one moment to the next where it is shared, so that
    none of this is measured once. Raises KeyError for what no round has taken in.
    """

    def __init__(self, watch: Stopwatch, pool: ThreadPool) -> None:
        self._watch, self._pool = watch, pool
        self._on_host = Stopwatch(torch.device("cpu"))
        self._moved: dict[float, list[float]] = defaultdict(list)
        self._found: dict[str, list[float]] = {}

    def measure(self, *, torch_updates: bool) -> None:
        """Take a round; with `torch_updates` of torch's own AdamW as well, on the device."""
        for mib in _MOVED_MIB:
            count = (mib << 20) // 12
            x, y, z = (torch.ones(count, device=self._watch.device) for _ in range(3))
            self._moved[12.0 * count] += self._watch.seconds(partial(torch.add, x, y, out=z))
        if torch_updates:
            self._note("torch update", self._torch_update())
        states = torch.zeros(3, PARAMS)
        copied = self._on_host.seconds(lambda: states[0].copy_(states[1]))
        self._note("copy", copied)
        self._note("update", self._update(states))

    @property
    def moved_bytes_per_s(self) -> Curve:
        """Of an operator that reads two tensors and makes one, on the device."""
        return curve_of([(nbytes, nbytes, seconds) for nbytes, seconds in self._moved.items()])

    @property
    def torch_params_per_s(self) -> float:
        """Of torch's own AdamW, in fp32, on the device."""
        return PARAMS / self._median("torch update")

    @property
    def host_params_per_s(self) -> float:
        """Of ours, with gradients and parameters in bfloat16, on the host."""
        return PARAMS / self._median("update")

    @property
    def host_bytes_per_s(self) -> float:
        """Read and written by a copy on the host."""
        return 2.0 * 4 * PARAMS / self._median("copy")

    def _note(self, name: str, seconds: list[float]) -> None:
        self._found.setdefault(name, []).extend(seconds)

    def _median(self, name: str) -> float:
        return statistics.median(self._found[name])

    def _torch_update(self) -> list[float]:
        param = torch.nn.Parameter(torch.zeros(PARAMS, device=self._watch.device))
        param.grad = torch.ones_like(param)
        optimizer = torch.optim.AdamW([param], lr=0.0, fused=True)
        return self._watch.seconds(optimizer.step)

    def _update(self, states: torch.Tensor) -> list[float]:
        low = torch.zeros(2, PARAMS, dtype=torch.bfloat16)

        def update() -> None:
            adam_update(
                self._pool,
                _SETTINGS,
                1,
                grad=low[0],
                master_param=states[0],
                exp_avg=states[1],
                exp_avg_sq=states[2],
                param=low[1],
            )

        return self._on_host.seconds(update)
