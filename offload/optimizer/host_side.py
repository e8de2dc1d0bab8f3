"""The update of what lies on the host and the SSD alone, a subgroup after the other.

A device that was lent updates some of them meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from offload.native import ThreadPool, adam_update
from offload.optimizer.interruption import Uninterrupted
from offload.optimizer.layout import Subgroup
from offload.optimizer.lent_device import LentDevice
from offload.optimizer.placement import Placement
from offload.optimizer.states import States, renew_master
from offload.optimizer.update import Update

__all__ = ["HostSide"]


class HostSide:
    """Updates by the threads of `pool`, and by `lent`; `placement` keeps its owner's."""

    def __init__(
        self, pool: ThreadPool, placement: Placement, lent: LentDevice | None = None
    ) -> None:
        self._pool, self._placement, self.lent = pool, placement, lent
        # Of updates of a part of all: what came after which, by a number in it.
        self._after: dict[int, frozenset[int]] = {}
        self._last: int | None = None

    def finish(
        self,
        update: Update,
        subgroups: Sequence[tuple[Subgroup, States]],
        signals: Uninterrupted,
    ) -> None:
        """Do what is left of an update. Raises OSError where states cannot be read or written.

        Also what `signals` raise, between two subgroups, where nothing is lost.
        """
        order = self._placement.order([states for _, states in subgroups])
        flat = update.gradients.flat
        update.done |= {at for at in order if not subgroups[at][0].has_any(flat)}
        todo = [number for number in order if number not in update.done]
        try:
            if self.lent is not None:
                todo = self.lent.take(update, todo, subgroups)
            for place, number in enumerate(todo):
                signals.deliver()
                for near in todo[place : place + 1 + self._placement.ahead]:
                    subgroups[near][1].prefetch()
                self._update(number, *subgroups[number], update)
        finally:
            if self.lent is not None:
                self.lent.wait()
        self._placement.turn()
        if todo:
            self._read_ahead(frozenset(todo), subgroups)

    def _read_ahead(
        self, done: frozenset[int], subgroups: Sequence[tuple[Subgroup, States]]
    ) -> None:
        """Begin to read what was updated after these the last time, where that was another part.

        One subgroup, so that one that is not wanted after all takes no room from those that are.
        """
        key = min(done)
        if self._last is not None:
            self._after[self._last] = done
        self._last = key
        after = self._after.get(key, done)
        if after != done:
            order = self._placement.order([states for _, states in subgroups])
            subgroups[next(each for each in order if each in after)][1].prefetch()

    def _update(self, number: int, subgroup: Subgroup, states: States, update: Update) -> None:
        flat = update.gradients.flat
        pieces = [piece for piece in subgroup.pieces if piece.param in flat]
        rows = self._placement.begin(states)
        settings = update.settings[subgroup.group]
        for place, piece in enumerate(pieces):
            if (number, place) in update.pieces:
                continue
            param = piece.of(piece.param.detach())
            state = [piece.inside(row) for row in rows]
            if subgroup.has_master and piece.param in update.stale:
                renew_master(state[2], param)
            adam_update(
                self._pool,
                settings,
                update.steps[piece.param],
                grad=flat[piece.param][piece.begin : piece.end],
                master_param=state[2] if subgroup.has_master else param,
                exp_avg=state[0],
                exp_avg_sq=state[1],
                param=param if subgroup.has_master else None,
                clip=update.clip,
            )
            update.pieces.add((number, place))
            update.has_changed = True
        states.commit()
        update.done.add(number)
        self._placement.updated(states)
