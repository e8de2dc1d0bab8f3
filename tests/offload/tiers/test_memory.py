"""How much memory there is, by the kernel's files, and no arena beyond it."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.tiers.memory import arena_of, available_bytes

GIB = 1 << 30


def system(root: Path, limit: str | None) -> Path:
    group = root / "sys/fs/cgroup/jobs/mine"
    for folder in (root / "proc/self", group):
        folder.mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {8 * GIB >> 10} kB\n")
    (root / "proc/self/cgroup").write_text("1:cpu:/other\n0::/jobs/mine\n")
    if limit is not None:
        (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{2 * GIB}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\nactive_file 7\n")
    return root


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max", 8 * GIB),
        (None, 8 * GIB),
        (str(4 * GIB), 3 * GIB + 7),
        (str(100 * GIB), 8 * GIB),
    ],
)
def test_what_a_control_group_allows_is_all_there_is(
    tmp_path: Path, limit: str | None, expected: int
) -> None:
    assert available_bytes(system(tmp_path, limit)) == expected


def test_without_the_kernels_files_there_is_what_the_system_says(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) > 0


def test_an_arena_beyond_what_is_available_is_refused_by_its_setting() -> None:
    assert arena_of(1 << 20, "staging_bytes").nbytes == 1 << 20
    beyond = 2 * available_bytes()  # address space there may be
    with pytest.raises(MemoryError, match=rf"^staging_bytes={beyond} is more memory .* available"):
        arena_of(beyond, "staging_bytes")
