"""A checkpoint of states in one file, written and read piece by piece, whatever fits in memory.

The format is safetensors: 8 bytes that say how long the header is, the header in JSON, then the
tensors' elements. The header's metadata has the optimizer's groups, the steps, a CRC32C of each
tensor, and one of the header itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from offload.native import crc32c, memory_of
from offload.optimizer.layout import Piece, Subgroup, flat_view, rows_of
from offload.optimizer.states import States

__all__ = ["CheckpointFile", "save_states"]

FORMAT = "offload.AdamW 1"
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # as safetensors has it
_CHUNK_BYTES = 16 << 20
_NO_SUM = "00000000"
_HEADER_SUM = '"header_crc32c": "{}"'


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Give the descriptor of a file that takes the place of `path` at the end, whole and synced.

    Until then `path` is as it was, whatever happens. A process that is killed leaves `path.part`,
    which the next one writes over. Raises OSError with the path, also where another one saves.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory; name a file in it", str(path))
    part = path.with_name(f"{path.name}.part")
    try:
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        where = f"{error.strerror}; name a file in a folder that exists and can be written to"
        raise OSError(error.errno, where, str(path)) from error
    try:
        _own(file, part, path)
        try:
            os.ftruncate(file, 0)
            yield file
            os.fsync(file)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        os.close(file)


def _own(file: int, part: Path, path: Path) -> None:
    """Have no one else write `part`, which `file` is; raises OSError where somebody does."""
    taken = OSError(errno.EBUSY, "another process is saving there; let one do it", str(path))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise taken from None
    # Whoever had it until just now may have made it the checkpoint meanwhile.
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file), os.stat(part)):
            return
    raise taken


class _Writer:
    """Writes a checkpoint's tensors in pieces, in any order of tensors, each from its beginning."""

    def __init__(self, file: int, path: Path, entries: Mapping[str, Any], metadata: Any) -> None:
        self._file, self._path = file, path
        self._entries, self._metadata = dict(entries), metadata
        self._sums = dict.fromkeys(entries, _NO_SUM)
        self._first_byte = len(self._header())
        needed_bytes = self._first_byte + _data_bytes(entries)
        space = os.statvfs(path.parent)
        if needed_bytes > space.f_bavail * space.f_frsize:
            raise OSError(
                errno.ENOSPC,
                f"the checkpoint needs {needed_bytes} bytes, but "
                f"{space.f_bavail * space.f_frsize} are free",
                str(path),
            )

    def write(self, name: str, first: int, elements: torch.Tensor) -> None:
        """Write the fp32 `elements` from element `first` on, the next ones of tensor `name`."""
        before = int(self._sums[name], 16)
        self._sums[name] = f"{crc32c(elements.data_ptr(), elements.nbytes, before):08x}"
        begin = self._first_byte + self._entries[name]["data_offsets"][0] + 4 * first
        self._write(memory_of(elements), begin)

    def finish(self) -> None:
        """Write the header, with the sums in it."""
        self._write(memoryview(self._header()), 0)

    def _header(self) -> bytes:
        sums = {"crc32c": json.dumps(self._sums), "header_crc32c": _NO_SUM}
        metadata = {**self._metadata, **sums}
        header = json.dumps({"__metadata__": metadata, **self._entries}).encode()
        header += b" " * (-len(header) % _LENGTH_BYTES)
        whole = len(header).to_bytes(_LENGTH_BYTES, "little") + header
        return _with_sum(whole, _NO_SUM, f"{_crc_of(whole):08x}")

    def _write(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def save_states(
    path: Path,
    groups: Sequence[Mapping[str, Any]],
    numbers: Mapping[torch.Tensor, int],
    steps: Mapping[torch.Tensor, int],
    subgroups: Sequence[tuple[Subgroup, States]],
    depth: int,
) -> None:
    """Write the states of all parameters that have been updated; `depth` are read ahead.

    `groups` are those of a `state_dict()`, `numbers` the parameters' in it. Raises OSError with the
    path, ValueError for a group with what JSON has no word for.
    """
    metadata = {
        "format": FORMAT,
        "param_groups": _in_json(groups),
        "steps": json.dumps({numbers[param]: step for param, step in steps.items()}),
    }
    with replacing(path) as file:
        writer = _Writer(file, path, _entries(numbers, steps), metadata)
        gathered: dict[str, torch.Tensor] = {}  # of tensors whose elements are in another order
        for place, (subgroup, states) in enumerate(subgroups):
            for other, near in subgroups[place : place + 1 + depth]:
                if other.has_any(steps):  # what is read ahead of nobody fills staging
                    near.prefetch()
            rows = None
            for piece in subgroup.pieces:
                if piece.param not in steps:
                    continue
                rows = states.read() if rows is None else rows
                for name, row in zip(rows_of(piece.param), rows, strict=False):
                    _put(writer, gathered, f"{numbers[piece.param]}.{name}", piece, row)
        writer.finish()


def _put(
    writer: _Writer, gathered: dict[str, torch.Tensor], name: str, piece: Piece, row: torch.Tensor
) -> None:
    if piece.param.is_contiguous():
        writer.write(name, piece.begin, piece.inside(row))
        return
    if not piece.begin:
        gathered[name] = torch.empty_like(piece.param, dtype=torch.float32)
    piece.of(gathered[name]).copy_(piece.inside(row))
    if piece.end == piece.param.numel():
        writer.write(name, 0, gathered.pop(name).contiguous().view(-1))


def _entries(
    numbers: Mapping[torch.Tensor, int], steps: Mapping[torch.Tensor, int]
) -> dict[str, Any]:
    """Return the header's word on each tensor: its type, its shape, where its elements are."""
    entries: dict[str, Any] = {}
    at = 0
    for param in steps:
        for name in rows_of(param):
            end = at + 4 * param.numel()
            entries[f"{numbers[param]}.{name}"] = {
                "dtype": "F32",
                "shape": list(param.shape),
                "data_offsets": [at, end],
            }
            at = end
    return entries


def _crc_of(data: bytes) -> int:
    held = bytearray(data)
    return crc32c(torch.frombuffer(held, dtype=torch.uint8).data_ptr(), len(held), 0)


def _with_sum(header: bytes, old: str, new: str) -> bytes:
    return header.replace(_HEADER_SUM.format(old).encode(), _HEADER_SUM.format(new).encode(), 1)


def _data_bytes(entries: Mapping[str, Any]) -> int:
    return max((entry["data_offsets"][1] for entry in entries.values()), default=0)


def _in_json(groups: Sequence[Mapping[str, Any]]) -> str:
    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return value.item()  # a learning rate, say
        raise ValueError(
            f"{value!r} of a parameter group cannot be saved; give numbers, strings and lists"
        )

    return json.dumps(groups, default=plain)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have an OSError name the file, as those of a descriptor do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class CheckpointFile:
    """A checkpoint on the drive, opened to be read; use as a context manager.

    Raises OSError with the path where there is none, ValueError where it is something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a directory; name a file in it", str(path))
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with _named(path):
                self._read_header()
        except BaseException:
            os.close(self._file)
            raise
        self._whole: tuple[str, torch.Tensor] | None = None  # read last, where order differs

    def _read_header(self) -> None:
        size = os.fstat(self._file).st_size
        length = int.from_bytes(os.pread(self._file, _LENGTH_BYTES, 0), "little")
        if not 0 < length <= min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
            raise self._unknown("has no header")
        try:
            raw = os.pread(self._file, _LENGTH_BYTES + length, 0)
            header = json.loads(raw[_LENGTH_BYTES:])
            metadata = header.pop("__metadata__")
            if metadata["format"] != FORMAT:
                raise self._unknown(f"has the format {metadata['format']!r}, not {FORMAT!r}")
            saved = metadata["header_crc32c"]
            found = f"{_crc_of(_with_sum(raw, saved, _NO_SUM)):08x}"
            if found != saved:
                said = f"its header has the CRC32C {found}, but {saved} was saved"
                raise OSError(errno.EBADMSG, said, str(self._path))
            self._sums = {
                name: int(crc, 16) for name, crc in json.loads(metadata["crc32c"]).items()
            }
            self._groups: list[dict[str, Any]] = json.loads(metadata["param_groups"])
            self._steps: dict[str, int] = json.loads(metadata["steps"])
            self._entries: dict[str, Any] = header
            data_bytes = _data_bytes(header)
        except (json.JSONDecodeError, UnicodeError) as error:
            raise self._unknown(f"has a header that is damaged ({error})") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise self._unknown(f"has a header without {error}") from error
        self._first_byte = _LENGTH_BYTES + length
        if self._first_byte + data_bytes != size:
            raise self._unknown(f"has {size} bytes, not {self._first_byte + data_bytes}")

    def _unknown(self, why: str) -> ValueError:
        return ValueError(f"{self._path} is no checkpoint that AdamW.save() wrote: it {why}")

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._file)

    def outline(self) -> dict[str, Any]:
        """Return it as a `state_dict()` whose tensors have shapes and no elements."""
        state: dict[int, dict[str, Any]] = {
            int(number): {"step": step} for number, step in self._steps.items()
        }
        for name, entry in self._entries.items():
            number, _, row = name.partition(".")
            state[int(number)][row] = torch.empty(entry["shape"], device="meta")
        groups = [{**group, "betas": tuple(group["betas"])} for group in self._groups]
        return {"state": state, "param_groups": groups}

    def verify(self) -> None:
        """Read all of it once. Raises OSError where an element is not what was saved."""
        buffer = torch.empty(_CHUNK_BYTES // 4)
        for name, entry in self._entries.items():
            left, crc, first = math.prod(entry["shape"]), 0, 0
            while left:
                chunk = buffer[: min(left, len(buffer))]
                self.read(name, first, chunk)
                crc = crc32c(chunk.data_ptr(), chunk.nbytes, crc)
                left, first = left - len(chunk), first + len(chunk)
            if crc != self._sums[name]:
                said = f"{name} has the CRC32C {crc:08x}, but {self._sums[name]:08x} was saved"
                raise OSError(errno.EBADMSG, said, str(self._path))

    def read(self, name: str, first: int, elements: torch.Tensor) -> None:
        """Fill the fp32 `elements` with those of tensor `name` from element `first` on."""
        data = memory_of(elements)
        offset = self._first_byte + self._entries[name]["data_offsets"][0] + 4 * first
        while data:
            with _named(self._path):
                read = os.preadv(self._file, [data], offset)
            if not read:
                raise OSError(errno.EIO, f"{name} ends at byte {offset}", str(self._path))
            data, offset = data[read:], offset + read

    def read_piece(self, name: str, piece: Piece, elements: torch.Tensor) -> None:
        """Fill `elements` with those of a piece of a parameter, in the order of its memory."""
        if piece.param.is_contiguous():
            self.read(name, piece.begin, elements)
            return
        if self._whole is None or self._whole[0] != name:
            logical = torch.empty(piece.param.shape)
            self.read(name, 0, logical.view(-1))
            self._whole = name, torch.empty_like(piece.param, dtype=torch.float32).copy_(logical)
        elements.copy_(flat_view(self._whole[1])[piece.begin : piece.end])
