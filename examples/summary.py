"""What a training run shows, and the JSON that is kept of it."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from memory import process_peak_bytes

from offload import ActivationStats
from offload.config import Predicted

__all__ = ["Measured", "conclusion", "summarize"]

MIB = 1 << 20

# Taken as they are from the offload engine's counts; all 0 where nothing is offloaded.
COUNTED = (
    "offloaded_bytes",
    "reloaded_bytes",
    "forwarded_bytes",
    "deduplicated_bytes",
    "kept_bytes",
    "stall_s",
    "ssd_write_bytes",
)


@dataclass
class Measured:
    """What the steps showed; one of them was slow, because its memory was watched."""

    watched_step: int
    tokens_per_step: int
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    tensor_bytes: int = 0
    """Above the beginning of the watched step, at its worst moment."""
    native_bytes: int = 0
    """Buffers of the offload engine, and pages of its spill files in the page cache."""
    resident_bytes: int = 0
    """What stays between steps."""

    def note_native(self, stats: ActivationStats) -> None:
        """Take in what the offload engine holds after a step."""
        now = stats.native_peak_bytes + stats.page_cache_bytes
        self.native_bytes = max(self.native_bytes, now)

    def usual_step_s(self) -> float:
        """Return the median time of the steps that nobody watched."""
        usual = [s for step, s in enumerate(self.step_s) if step != self.watched_step]
        return statistics.median(usual or self.step_s)

    def peak_activation_bytes(self) -> int:
        """Return what a step takes at its worst moment above what stays."""
        return self.tensor_bytes + self.native_bytes

    def peak_device_bytes(self, device_type: str) -> int:
        """Return what the device holds at the worst moment; a GPU has no native buffers."""
        native_bytes = self.native_bytes if device_type == "cpu" else 0
        return self.resident_bytes + self.tensor_bytes + native_bytes


def summarize(
    measured: Measured,
    stats: ActivationStats | None,
    predicted: Predicted | None = None,
    *,
    device_type: str,
    command: str,
    framework: str = "torch",
) -> dict[str, object]:
    """Return the summary of a run; its bytes and stalls are those of one rank."""
    step_s = measured.usual_step_s()
    return {
        "losses": measured.losses,
        "step_s": step_s,
        "tokens_per_s": measured.tokens_per_step / step_s,
        "peak_activation_bytes": measured.peak_activation_bytes(),
        "peak_device_bytes": measured.peak_device_bytes(device_type),
        "peak_rss_bytes": process_peak_bytes(),
        **{key: getattr(stats, key) if stats else 0 for key in COUNTED},
        "framework": framework,
        "io_engine": stats.io_engine if stats else None,
        "predicted": None
        if predicted is None
        else {"step_s": predicted.step_s, "peak_device_bytes": predicted.peak_device_bytes},
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "offload")},
        },
        "command": command,
    }


def conclusion(
    summary: Mapping[str, Any],
    measured: Measured,
    stats: ActivationStats | None,
    memory_bytes: int | None = None,
) -> Iterator[str]:
    """Yield the lines that say what a run took."""
    yield (
        f"{summary['step_s']:.3f} s a step, {summary['tokens_per_s']:,.0f} tokens/s; at its worst "
        f"moment {summary['peak_activation_bytes'] / MIB:,.0f} MiB of activations, and "
        f"{summary['peak_device_bytes'] / MIB:,.0f} MiB with parameters, gradients and optimizer"
    )
    if said := summary["predicted"]:
        step, peak = (said[key] / summary[key] - 1 for key in ("step_s", "peak_device_bytes"))
        yield (
            f"predicted were {said['step_s']:.3f} s a step ({step:+.1%}) and "
            f"{said['peak_device_bytes'] / MIB:,.0f} MiB ({peak:+.1%})"
        )
    if stats is None:
        return
    kept = f"{stats.kept_bytes / MIB:,.0f} MiB had no room on the SSD, or no writes left; "
    yield (
        f"{stats.offloaded_bytes / MIB:,.0f} MiB were offloaded; "
        f"{kept if stats.kept_bytes else ''}"
        f"stalled for {stats.stall_s:.1f} s and planned for {stats.planning_s:.1f} s of "
        f"{sum(measured.step_s):.1f} s"
    )
    if memory_bytes is not None:
        needed = stats.predicted_peak_bytes
        verdict = "no schedule yet" if not needed else "met" if needed <= memory_bytes else "missed"
        yield (
            f"saved tensors and what of staging is in use need {needed / MIB:,.4g} MiB at once by "
            f"the last schedule, of {memory_bytes / MIB:,.4g} MiB (--memory-bytes): {verdict}; "
            f"layers ran again {stats.recomputed_blocks} times. Staging has "
            f"{measured.native_bytes / MIB:,.0f} MiB in all"
        )
    if stats.ssd_life_days is not None:
        yield (
            f"{stats.ssd_write_bytes_a_day / 1e12:.1f} TB would be written in a day like this by "
            f"each rank; a new drive of that rating, a rank's own, would last "
            f"{stats.ssd_life_days:,.0f} days"
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed, found on the path"
