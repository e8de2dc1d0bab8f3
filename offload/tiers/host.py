"""The host tier: bytes of a device in pinned memory of this machine, and back."""

from __future__ import annotations

from offload.native import Buffer
from offload.tiers.memory import arena_of

__all__ = ["HostExtent", "HostTier"]


class HostExtent:
    """One run of bytes in the host tier. Dropping it frees them. Has what an `Extent` has."""

    __slots__ = ("_buffer",)

    ready = True

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self._buffer.nbytes

    def staged(self) -> Buffer:
        """Return where they are to be put."""
        return self._buffer

    def start_write(self) -> None:
        """Do nothing: they are where they belong."""

    def prefetch(self) -> bool:
        """Do nothing: they are here."""
        return True

    def fetch(self) -> Buffer:
        """Return where they are."""
        return self._buffer


class HostTier:
    """Holds up to `nbytes`; every byte counts as resident once the memory is pinned.

    Raises MemoryError where the machine has not so much memory.
    """

    direct_way = None  # there is none past host memory

    def __init__(self, nbytes: int) -> None:
        self.arena = arena_of(nbytes, "host_bytes")

    def stage(self, nbytes: int, lead: int) -> HostExtent | None:
        """Return room for `nbytes`, at an address equal to `lead` modulo 64; None when full."""
        buffer = self.arena.allocate(nbytes, lead)
        return None if buffer is None else HostExtent(buffer)

    def limit_bytes(self) -> int:
        """Return how many bytes it may hold."""
        return self.arena.nbytes

    def stats(self) -> dict[str, int]:
        """Return `used_bytes`, `peak_used_bytes` and what the memory itself takes."""
        return self.arena.stats()

    def close(self) -> None:
        """Give the memory back to the system, unless somebody still uses some of it."""
        self.arena.trim()
