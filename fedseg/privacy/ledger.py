"""The ledger of a site: one line of JSON for each thing that left it, chained by hashes.

A line carries the hash of the line before and its own, over its very bytes. So an edited, deleted,
moved or inserted line is found by whoever reads the file. The chain has no secret: who may write
the file can also write a whole new chain, or cut off its tail. That is found only where somebody
else holds a hash of the chain, as the server of a study does (Haber and Stornetta, How to
time-stamp a digital document, J. Cryptology 1991).

A line counts once it is whole and on disk. A process that is killed, or loses power, while it
writes leaves a torn last line; the next append cuts that off and says so in a line of its own.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedseg.errors import LedgerError

__all__ = ["MENDED", "Chain", "Entry", "append", "append_judged", "read", "verify"]

log = logging.getLogger(__name__)

Entry = dict[str, Any]

MENDED = "mended"
"""Kind of the line that tells of a torn one."""

_FIRST = "0" * 64
"""What the first line has as the hash before it."""

_HASH = b',"hash":"'
_BLOCK = 64 * 1024
_LONGEST = 16 * 1024 * 1024
"""Bytes a line may have; a line about an update of 10,000 arrays has 1 MB."""

_OWN = ("sequence", "time", "previous", "hash")


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A ledger that holds together.

    Attributes:
        entries: Its whole lines.
        torn: Bytes of a last line that isn't whole.
    """

    entries: Sequence[Entry]
    torn: int

    @property
    def head(self) -> str:
        """Hash of the last line."""
        return str(self.entries[-1]["hash"]) if self.entries else _FIRST


def append(path: Path, entry: Mapping[str, Any]) -> Entry:
    """Add a line; it is on disk when this returns.

    Args:
        path: The ledger; made, with its folder, where there is none.
        entry: What to write down; numbers must be finite.

    Returns:
        The line: the entry with `sequence`, `time` (UTC), `previous` and `hash`.

    Raises:
        LedgerError: It can't be written, or its last line is damaged.
    """
    with _opened(path, "append") as file:
        return _write(file, path, entry)


def append_judged(path: Path, judge: Callable[[Sequence[Entry]], Mapping[str, Any]]) -> Entry:
    """Add the line that `judge` makes of all lines before; no other process comes between.

    Args:
        path: The ledger.
        judge: Takes the lines; what it raises is passed on, and nothing is written.

    Raises:
        LedgerError: The ledger can't be written, or doesn't hold together.
    """
    with _opened(path, "append") as file:
        return _write(file, path, judge(_read_chain(file, path).entries))


def read(path: Path) -> list[Entry]:
    """All lines of a ledger, checked; none where there is no file yet.

    Raises:
        LedgerError: It can't be read, or doesn't hold together.
    """
    return list(verify(path).entries) if path.exists() else []


def verify(path: Path) -> Chain:
    """Check a ledger from its first line to its last.

    Raises:
        LedgerError: It can't be read, or doesn't hold together; the message has the line's number.
    """
    with _opened(path, "read") as file:
        return _read_chain(file, path)


@contextmanager
def _opened(path: Path, why: str) -> Iterator[int]:
    """Open and lock: one writer, or any number of readers; the lock goes with the process."""
    writes = why == "append"
    try:
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
        new = writes and not path.exists()
        flags = os.O_RDWR | os.O_CREAT if writes else os.O_RDONLY
        file = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if writes else fcntl.LOCK_SH)
            if new:
                _sync_folder(path.parent)
            yield file
        finally:
            os.close(file)
    except OSError as error:
        mend = "free space, or set ledger in site.toml" if writes else "check its path"
        raise LedgerError(f"{path}: can't {why} ({error.strerror or error}); {mend}") from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: int, path: Path, entry: Mapping[str, Any]) -> Entry:
    if clash := sorted(set(entry) & set(_OWN)):
        raise LedgerError(
            f"entry: got {', '.join(clash)}; expected keys that the ledger doesn't set"
        )
    last = _mended(file, path)
    return _write_line(file, path, last, entry)


def _mended(file: int, path: Path) -> Entry | None:
    """Cut off a torn line and tell of it in a line of its own; return the last line."""
    line, torn = _tail(file, path)
    last = None if line is None else _parse(line, f"{path}: last line")
    if not torn:
        return last
    size = os.fstat(file).st_size
    os.ftruncate(file, size - len(torn))
    log.warning("%s: last line was torn (%d bytes); mended", path, len(torn))
    note = {"kind": MENDED, "bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
    return _write_line(file, path, last, note)


def _write_line(file: int, path: Path, last: Entry | None, entry: Mapping[str, Any]) -> Entry:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    head = {"sequence": 1 if last is None else last["sequence"] + 1, "time": now}
    previous = _FIRST if last is None else last["hash"]
    try:
        body = json.dumps(
            {**head, **entry, "previous": previous}, separators=(",", ":"), allow_nan=False
        ).encode()
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"{path}: entry can't be written ({error}); expected plain JSON"
        ) from None
    digest = hashlib.sha256(body).hexdigest()
    line = body[:-1] + _HASH + digest.encode() + b'"}\n'
    if len(line) > _LONGEST:
        raise LedgerError(f"{path}: got an entry of {len(line)} bytes; expected {_LONGEST} at most")
    end = os.fstat(file).st_size
    try:
        written = 0
        while written < len(line):
            written += os.pwrite(file, line[written:], end + written)
        os.fsync(file)
    except OSError:
        os.ftruncate(file, end)
        raise
    return _parse(line[:-1], f"{path}: new line")


def _tail(file: int, path: Path) -> tuple[bytes | None, bytes]:
    """Last whole line, None where there is none, and what follows it."""
    start, found = os.fstat(file).st_size, b""
    while start and found.count(b"\n") < 2:
        if len(found) > 2 * _LONGEST:
            raise LedgerError(f"{path}: last line is longer than {_LONGEST} bytes; not a ledger")
        step = min(_BLOCK, start)
        start -= step
        found = os.pread(file, step, start) + found
    whole, newline, torn = found.rpartition(b"\n")
    return (whole.rpartition(b"\n")[2] if newline else None), torn


def _parse(line: bytes, where: str) -> Entry:
    """Read one line and check it against its own hash."""
    body, mark, end = line.rpartition(_HASH)
    digest = hashlib.sha256(body + b"}").hexdigest()
    if not mark or end != digest.encode() + b'"}':
        raise LedgerError(f"{where}: was changed: its hash isn't that of its content")
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    own = [entry.get(key) for key in _OWN] if isinstance(entry, dict) else []
    if [type(value) for value in own] != [int, str, str, str]:
        raise LedgerError(f"{where}: isn't a line of a ledger")
    assert isinstance(entry, dict)
    return entry


def _read_chain(file: int, path: Path) -> Chain:
    entries: list[Entry] = []
    previous, torn = _FIRST, 0
    with os.fdopen(os.dup(file), "rb") as lines:
        lines.seek(0)
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST + 1), b""), start=1):
            if not line.endswith(b"\n"):
                if len(line) > _LONGEST:
                    raise LedgerError(f"{path}: line {number}: too long; not a ledger")
                torn = len(line)
                break
            entry = _parse(line[:-1], f"{path}: line {number}")
            if entry["sequence"] != number or entry["previous"] != previous:
                raise LedgerError(
                    f"{path}: line {number}: doesn't follow the line before it (its number is "
                    f"{entry['sequence']}); a line was deleted, inserted or moved"
                )
            entries.append(entry)
            previous = entry["hash"]
    return Chain(entries=entries, torn=torn)
