"""The bytes that a step has in use, operator by operator, on the device that computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from perfmodel.tape import Operator, Tape, Value

__all__ = ["RANDOM_STATE_BYTES", "Moment", "StepBytes", "entering", "step_bytes"]

RANDOM_STATE_BYTES = 5056
"""What `torch.utils.checkpoint` keeps for a block that is run again: `torch.get_rng_state()`."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What is alive while an operator runs: tensors that autograd saved, and all others."""

    operator: str
    at: int
    """Its place in the tape."""
    backward: bool
    saved_bytes: int
    other_bytes: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.saved_bytes + self.other_bytes


@dataclass(frozen=True)
class StepBytes:
    """A forward and its backward."""

    moments: tuple[Moment, ...]
    saved_bytes: int
    """Left by the forward for the backward."""
    left_bytes: int
    """Left by both: gradients that stay."""

    @property
    def worst(self) -> Moment:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda moment: moment.nbytes)


def step_bytes(
    tape: Tape,
    recompute: Collection[int] = (),
    *,
    gradients_stay: bool = False,
    leaves: Callable[[Value], bool] = lambda _: False,
) -> StepBytes:
    """Go through a step, whose blocks with the numbers in `recompute` are run again.

    Counts what a step adds: tensors of the model and of the optimizer, and gradients that there are
    already, are none of it. `gradients_stay`: there are none before, so that those stay. `leaves`
    says which saved tensors go elsewhere, an operator after they were saved, and come back into
    memory that is counted elsewhere.
    """
    return _Step(tape, frozenset(recompute), gradients_stay, leaves).run()


def entering(tape: Tape, block: range) -> list[Value]:
    """Return the storages that a block reads and does not make."""
    made: set[Value] = set()
    inputs: dict[Value, None] = {}
    for at in block:
        operator = tape.operators[at]
        inputs.update(
            (value.storage, None) for value in operator.reads if value.storage not in made
        )
        made.update(value.storage for value in operator.writes)
    return list(inputs)


class _Gradient:
    """Memory of a gradient, which several values may have as theirs."""

    __slots__ = ("nbytes", "owners")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.owners = 0


class _Step:
    def __init__(
        self,
        tape: Tape,
        recompute: frozenset[int],
        gradients_stay: bool,
        leaves: Callable[[Value], bool],
    ) -> None:
        self._tape, self._gradients_stay, self._leaves = tape, gradients_stay, leaves
        self._to_leave: list[Value] = []  # once the next operator has saved
        self._left: set[Value] = set()
        self._lingering: set[Value] = set()  # have left, and are still used
        self._block_of = {
            at: block
            for number, block in enumerate(tape.blocks)
            for at in block
            if number in recompute
        }
        self._moments: list[Moment] = []
        self._held = {value.storage for value in tape.inputs}  # outside of what is counted
        self._alive: dict[Value, int] = {}  # storages of the forward: how many savers
        self._saved_bytes = self._other_bytes = 0
        self._gradients: dict[Value, _Gradient] = {}
        names = [operator.shared_params for operator in tape.operators if operator.shared_params]
        self._users_left = Counter(names)
        self._waiting: dict[str, int] = {}  # the bytes of gradients that wait for others

    def run(self) -> StepBytes:
        operators, blocks = self._tape.operators, self._block_of
        last_use = self._last_uses(range(len(operators)))
        for at, operator in enumerate(operators):
            block = blocks.get(at)
            reads = {value.storage for value in operator.reads}
            saves_first = any(value.storage in reads for value in operator.saves)
            if saves_first and block is None:  # inputs are saved before the operator runs
                self._let_leave(at, last_use)
            self._forward(at, saves=block is None)
            if operator.saves and not saves_first and block is None:
                self._let_leave(at, last_use)
            if block is not None and at == block[0]:
                self._save(entering(self._tape, block))
                self._saved_bytes += RANDOM_STATE_BYTES
            self._let_go(at, last_use)
        self._let_leave(len(operators), last_use)
        self._to_leave.clear()
        saved_bytes = self._saved_bytes
        loss_at = max(at for at, operator in enumerate(operators) if operator.writes)
        for at in reversed(range(len(operators))):
            block = blocks.get(at)
            if block is not None and at == block[-1]:
                self._run_again(block)
            self._backward(at, loss=at == loss_at)
            if block is not None and at == block[0]:
                self._unsave(entering(self._tape, block))
                self._saved_bytes -= RANDOM_STATE_BYTES
        left_bytes = self._saved_bytes + self._other_bytes
        return StepBytes(tuple(self._moments), saved_bytes, left_bytes)

    # ---- forward -----------------------------------------------------------------------------

    def _last_uses(self, which: Iterable[int]) -> dict[Value, int]:
        """Return for each storage the last operator that makes, reads or looks at it."""
        found: dict[Value, int] = {}
        for at in which:
            operator = self._tape.operators[at]
            for value in (*operator.reads, *operator.writes):
                found[value.storage] = at
        return found

    def _forward(self, at: int, *, saves: bool) -> None:
        operator = self._tape.operators[at]
        for value in operator.writes:
            if value.base is None and value not in self._held:
                self._alive[value] = 0
                self._other_bytes += value.nbytes
        self._note(at, operator.workspace_bytes, backward=False)
        if saves:
            self._save(operator.saves)

    def _let_go(self, at: int, last_use: dict[Value, int]) -> None:
        operator = self._tape.operators[at]
        for storage in {value.storage for value in (*operator.reads, *operator.writes)}:
            if last_use[storage] > at:
                continue
            if storage in self._lingering:
                self._lingering.discard(storage)
                self._other_bytes -= storage.nbytes
            elif self._alive.get(storage) == 0:
                self._other_bytes -= storage.nbytes
                del self._alive[storage]

    def _let_leave(self, at: int, last_use: dict[Value, int]) -> None:
        """Have what was saved before the last operator leave; that one's may still be written."""
        saved = (
            {value.storage for value in self._tape.operators[at].saves}
            if at < len(self._tape.operators)
            else set()
        )
        for storage in [value for value in self._to_leave if value not in saved]:
            self._to_leave.remove(storage)
            self._left.add(storage)
            self._saved_bytes -= storage.nbytes
            if last_use[storage] >= at:
                self._lingering.add(storage)
                self._other_bytes += storage.nbytes

    def _save(self, values: Iterable[Value]) -> None:
        for value in values:
            storage = value.storage
            if storage not in self._alive:
                continue
            if not self._alive[storage]:
                self._other_bytes -= storage.nbytes
                self._saved_bytes += storage.nbytes
                self._to_leave.append(storage)
            self._alive[storage] += 1
            # A small part that stays keeps all of it.
            if not self._leaves(value) and storage in self._to_leave:
                self._to_leave.remove(storage)

    def _unsave(self, values: Iterable[Value]) -> None:
        for storage in [value.storage for value in values]:
            if storage in self._alive:
                self._alive[storage] -= 1
                if not self._alive[storage]:
                    self._saved_bytes -= storage.nbytes * (storage not in self._left)
                    del self._alive[storage]

    # ---- blocks that are run again -------------------------------------------------------------

    def _run_again(self, block: range) -> None:
        """Run a block for what its backward needs; it ends with the last that saves anything."""
        operators = self._tape.operators
        needed = max((at for at in block if operators[at].saves), default=block[0])
        again = range(block[0], needed + 1)
        last_use = self._last_uses(again)
        for at in again:
            self._forward(at, saves=True)
            self._let_go(at, last_use)
        # What the block's variables held goes with them.
        for storage in [value for value, savers in self._alive.items() if not savers]:
            self._other_bytes -= storage.nbytes
            del self._alive[storage]

    # ---- backward ----------------------------------------------------------------------------

    def _backward(self, at: int, *, loss: bool) -> None:
        operator = self._tape.operators[at]
        given = [self._gradients.pop(value, None) for value in operator.writes]
        if loss and operator.writes:
            given[0] = first = self._new_gradient(operator.writes[0].nbytes)
            first.owners = 1  # whoever began the backward
        taken = [gradient for gradient in given if gradient is not None]
        wanted = [value for value in operator.reads if value.trained]
        if not taken:
            self._unsave(operator.saves)
            self._give_params(operator, made=False)
            return
        if operator.passes:
            found = [(value, taken[0]) for value in wanted]
        else:
            found = [(value, self._new_gradient(value.nbytes)) for value in wanted]
        self._other_bytes += operator.param_bytes
        self._note(at, operator.backward_workspace_bytes, backward=True)
        for _, gradient in found:
            gradient.owners += 1
        self._unsave(operator.saves)
        for gradient in taken:
            self._drop(gradient)
        self._give_params(operator, made=True)
        for value, gradient in found:
            self._accumulate(value, gradient)

    def _give_params(self, operator: Operator, *, made: bool) -> None:
        """Have the gradients of parameters added where they belong, once all there are are made.

        `made`: this operator has made its own, and not been passed by since nothing needs it.
        """
        name, nbytes = operator.shared_params, operator.param_bytes
        if not name:
            self._other_bytes -= nbytes * (made and not self._gradients_stay)
            return
        self._users_left[name] -= 1
        if made and name in self._waiting:
            self._other_bytes -= nbytes  # added to the first
        elif made:
            self._waiting[name] = nbytes
        if not self._users_left[name] and not self._gradients_stay:
            self._other_bytes -= self._waiting.get(name, 0)

    def _accumulate(self, value: Value, gradient: _Gradient) -> None:
        before = self._gradients.get(value)
        if before is None:
            self._gradients[value] = gradient
        elif before.owners == 1:
            self._drop(gradient)
        else:
            self._drop(before)
            self._gradients[value] = gradient

    def _new_gradient(self, nbytes: int) -> _Gradient:
        self._other_bytes += nbytes
        return _Gradient(nbytes)

    def _drop(self, gradient: _Gradient) -> None:
        gradient.owners -= 1
        if gradient.owners <= 0:
            self._other_bytes -= gradient.nbytes

    def _note(self, at: int, workspace_bytes: int, *, backward: bool) -> None:
        name, other_bytes = self._tape.operators[at].name, self._other_bytes + workspace_bytes
        self._moments.append(Moment(name, at, backward, self._saved_bytes, other_bytes))
