"""Sizes as people write them: `40GiB`, `64MiB`, `600TB`, or a number of bytes."""

from __future__ import annotations

import re

__all__ = ["UNITS", "format_bytes", "parse_bytes"]

UNITS = {
    "": 1,
    **{f"{prefix}iB": 1 << (10 * power) for power, prefix in enumerate("KMGTP", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", 1)},
    "B": 1,
}
_MOST_DIGITS = 30


def parse_bytes(text: str, key: str = "size") -> int:
    """Return the bytes that `text` stands for; ValueError names `key` where it is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    unit = _unit(found[2]) if found else None
    if found is None or unit is None:
        raise ValueError(
            f"{key}={text!r} is not a size; it is a number of bytes such as 4096, or one with "
            "KiB, MiB, GiB, TiB, or kB, MB, GB, TB"
        )
    if len(found[1]) > _MOST_DIGITS:
        raise ValueError(f"{key}={text[:20]}... has more than {_MOST_DIGITS} digits")
    return round(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


def _unit(text: str) -> int | None:
    # Nobody means another thing by a unit's other spellings, but Gb would be bits.
    exact = {name.lower() if name.endswith("iB") else name: size for name, size in UNITS.items()}
    return exact.get(text.lower() if text.lower().endswith("ib") else text)


def format_bytes(nbytes: float) -> str:
    """Return `nbytes` in the unit in which it is a number that people read."""
    for power, prefix in reversed([*enumerate("KMGTP", 1)]):
        if abs(nbytes) >= 1 << (10 * power):
            value = nbytes / (1 << (10 * power))
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {prefix}iB"
    return f"{nbytes:.0f} B"
