"""A training step as the operators that autograd records: what each makes, keeps, and gives back.

A value is a tensor, or a view of one. Forward operators run in order; the backward runs them in
reverse. From a tape alone follow the bytes that are saved and the most that are alive at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Operator", "Tape", "TapeWriter", "Value"]


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor, or what looks at a part of one."""

    name: str
    nbytes: int
    """Of its elements; its gradient has as many."""
    base: Value | None = None
    """Whose memory it has, if not its own."""
    trained: bool = True
    """A gradient is wanted for it."""

    @property
    def storage(self) -> Value:
        """The value that has the memory."""
        return self if self.base is None else self.base.storage


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One operator of a forward, and what its backward does."""

    name: str
    reads: tuple[Value, ...] = ()
    writes: tuple[Value, ...] = ()
    saves: tuple[Value, ...] = ()
    """Of what it reads and writes, and what it makes for its backward alone."""
    param_bytes: int = 0
    """Of the parameters that its backward makes a gradient of."""
    shared_params: str = ""
    """What those are called, where other operators have them too: their gradients are added up
    before anybody gets them, so that the first waits for the last."""
    matmul_flops: float = 0.0
    """Of matrix products in the forward; each gradient of one takes as many."""
    matmul_gradients: int = 2
    """Of those products that the backward makes: of the input, of the parameters, or of both."""
    moved_bytes: float = 0.0
    """Read and written, where it is the memory that such an operator waits for."""
    network_bytes: float = 0.0
    """What this rank sends to those that share a map in the forward; the backward has the mirror of
    it, if not always in the same operator."""
    backward_network_bytes: float = 0.0
    """What it sends in the backward besides that mirror."""
    workspace_bytes: int = 0
    """What the forward has in use besides, for as long as it runs."""
    backward_workspace_bytes: int = 0
    passes: bool = False
    """The gradients of what it reads are those of what it wrote: the same memory."""


@dataclass(frozen=True)
class Tape:
    """The operators of one forward; `blocks` are the ranges that may be computed again."""

    operators: tuple[Operator, ...]
    blocks: tuple[range, ...] = ()
    inputs: tuple[Value, ...] = ()
    """What there is before, and stays."""

    def saved_bytes(self) -> int:
        """Return the bytes of all storages that a whole forward leaves for its backward."""
        storages = {value.storage for operator in self.operators for value in operator.saves}
        return sum(storage.nbytes for storage in storages - {*self.inputs})


@dataclass
class TapeWriter:
    """Takes operators down, one after the other."""

    operators: list[Operator] = field(default_factory=list)
    blocks: list[range] = field(default_factory=list)

    def value(self, name: str, nbytes: int, *, trained: bool = True) -> Value:
        """Return a new value with memory of its own."""
        return Value(name, nbytes, trained=trained)

    def run(
        self,
        name: str,
        reads: Iterable[Value],
        nbytes: int | None = None,
        *,
        saves: Iterable[Value] = (),
        saves_output: bool = False,
        keeps_bytes: int = 0,
        param_bytes: int = 0,
        shared_params: str = "",
        frozen_bytes: int = 0,
        matmul_flops: float = 0.0,
        matmul_gradients: int = 2,
        network_bytes: float = 0.0,
        backward_network_bytes: float = 0.0,
        workspace_bytes: int = 0,
        backward_workspace_bytes: int = 0,
        passes: bool = False,
        trained: bool = True,
    ) -> Value:
        """Take down an operator with one output of `nbytes`; without: as large as its first input.

        `keeps_bytes`: made for the backward and given to nobody else. `frozen_bytes`: of parameters
        that it reads and that get no gradient. `trained`: a gradient is wanted for the output.
        """
        reads = tuple(reads)
        out = Value(name, reads[0].nbytes if nbytes is None else nbytes, trained=trained)
        kept = [Value(f"{name} for its backward", keeps_bytes)] if keeps_bytes else []
        moved = sum(value.nbytes for value in reads) + out.nbytes + param_bytes + frozen_bytes
        self.operators.append(
            Operator(
                name,
                reads,
                (out, *kept),
                (*saves, *([out] if saves_output else []), *kept),
                param_bytes,
                shared_params,
                matmul_flops,
                matmul_gradients,
                moved,
                network_bytes,
                backward_network_bytes,
                workspace_bytes,
                backward_workspace_bytes,
                passes,
            )
        )
        return out

    def view(self, name: str, of: Value, *parts: int, network_bytes: float = 0.0) -> list[Value]:
        """Take down views that are so many bytes of a value each, or one that is all of it.

        The gradients of several are put together in new memory, and those of one that repeats a
        value are added up there; that of one that is all of it is looked at alike.
        """
        sizes = parts or (of.nbytes,)
        views = tuple(Value(f"{name} {at}", size, of, of.trained) for at, size in enumerate(sizes))
        whole = sizes == (of.nbytes,)
        self.operators.append(
            Operator(name, (of,), views, network_bytes=network_bytes, passes=whole)
        )
        return list(views)

    @contextmanager
    def block(self) -> Iterator[None]:
        """Take down operators that may be computed again together."""
        begin = len(self.operators)
        yield
        self.blocks.append(range(begin, len(self.operators)))

    def hold(self, values: Sequence[Value]) -> None:
        """Say that a function returns here, which held these until now."""
        self.operators.append(Operator("return", tuple(values)))

    def tape(self, inputs: Iterable[Value] = ()) -> Tape:
        """Return what was taken down."""
        return Tape(tuple(self.operators), tuple(self.blocks), tuple(inputs))
