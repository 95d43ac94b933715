"""Import: JSON lines of events, and contextuate's file store, into any store.

A bad line costs that line only. Memory is bounded by the longest line and one batch, however long
the file.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import orjson

from contextuate_persist.errors import InvalidRecord
from contextuate_persist.model import MonitorEvent, SessionMeta
from contextuate_persist.payload import MAX_PAYLOAD_BYTES
from contextuate_persist.protocol import PersistenceStore

#: Called with the bytes done and the bytes in all, which a stream does not tell.
Progress = Callable[[int, "int | None"], None]

#: Escapes make JSON up to three times as long as the payload that they stand for.
MAX_LINE_BYTES = 4 * MAX_PAYLOAD_BYTES
#: How many refusals are kept in words; all are counted.
REFUSALS_SHOWN = 1000

_BATCH_EVENTS = 500
_BATCH_BYTES = 4 * 2**20
_SKIP_BYTES = 2**20
_REASON = 300  # characters
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did.

    `lines` are the events that were read, empty lines not among them. `already_there` are those
    that changed nothing: stored before, twice in the files, or of a session that was deleted since.
    `refused` names each bad line as FILE:LINE: FIELD: REASON, the first thousand of them, and
    `refused_count` counts them all.
    """

    files: int
    lines: int
    stored: int
    already_there: int
    sessions: int
    refused: tuple[str, ...]
    refused_count: int


def import_path(
    store: PersistenceStore,
    path: str | os.PathLike[str] | BinaryIO,
    *,
    undelete: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Store the events of a file, a directory or a stream; `-` is standard input.

    A file holds one event a line, in its wire form. Of a directory, contextuate's file store is
    recognised (all of it, its `sessions` directory, or the directory of one session): there each
    session is saved before its events, as `save_session` does it. Of any other directory, every
    *.jsonl below it is read, in the order of their names.

    Every good line is stored and every bad one reported, in the file's order. An event that is
    stored already counts as such, so an import that failed half-way may be run again. Events of a
    deleted session are stored only with `undelete`. An empty file or directory gives an empty
    report; a missing one raises FileNotFoundError; what is wrong with the store raises what
    `save_events` raises. `progress` is called after each batch.
    """
    importer = _Importer(store, undelete, progress)
    if not isinstance(path, (str, os.PathLike)):
        importer.read(str(getattr(path, "name", "stream")), path)
    elif os.fspath(path) == "-":
        if sys.stdin is None:  # closed by the caller
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), "stdin")
        importer.read("stdin", sys.stdin.buffer)
    elif not os.fspath(path):  # pathlib would take the working directory
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "''")
    elif (root := Path(path)).is_dir():
        importer.read_files(_files_below(root, importer.refuse))
    else:
        importer.read_files([root], must_open=True)
    importer.flush()
    return importer.report()


# --- Exact JSON -----------------------------------------------------------------------------------

# Every integer past 64 bits has 19 digits or more; orjson would make a float of it.
_DIGITS = bytes(0x30 if chr(byte) in "0123456789" else 0x20 for byte in range(256))
_LONG_NUMBER = b"0" * 19


def parse_json(line: bytes) -> Any:
    """The value of a JSON text in UTF-8, integers as integers; raises InvalidRecord.

    Lone surrogates are taken as escapes, where JSON allows them, and nowhere else.
    """
    # Translating costs 0.8 ns a byte, a regular expression for the same 13; orjson itself costs 2.
    if _LONG_NUMBER not in line.translate(_DIGITS):
        try:
            return orjson.loads(line)
        except ValueError:
            pass  # bad JSON, or a lone surrogate: the standard parser tells which
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except InvalidRecord:
        raise
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"JSON: invalid UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(f"JSON: {error.msg} (character {error.pos + 1})") from None
    except RecursionError:
        raise InvalidRecord("JSON: nested too deep") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise InvalidRecord(f"JSON: {str(error).partition(';')[0]}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRecord(f"JSON: {name} is not JSON")


# --- Files ----------------------------------------------------------------------------------------


def _files_below(root: Path, refuse: Callable[[str, str], None]) -> list[Path]:
    """The files to read, in order: of a file store, each session's meta.json before its events."""
    if (root / "meta.json").is_file():
        return _files_of_session(root)
    sessions = root / "sessions" if (root / "sessions").is_dir() else root
    directories = sorted(path for path in sessions.iterdir() if path.is_dir())
    if any((directory / "meta.json").is_file() for directory in directories):
        return [path for directory in directories for path in _files_of_session(directory)]

    found: list[Path] = []
    walk = os.walk(root, onerror=lambda error: refuse(str(error.filename), _reason(error)))
    for directory, _, names in walk:
        found += [Path(directory, name) for name in names if name.endswith(".jsonl")]
    return sorted(found)


def _files_of_session(directory: Path) -> list[Path]:
    return [path for name in ("meta.json", "events.jsonl") if (path := directory / name).is_file()]


def _reason(error: OSError) -> str:
    return f"file: {error.strerror or error}"


def _lines(stream: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
    """Each line with the bytes read for it; None for one over the limit, which is skipped."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        size = len(line)
        if size <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line, size
            continue
        del line
        while rest := stream.readline(_SKIP_BYTES):
            size += len(rest)
            if rest.endswith(b"\n"):
                break
        yield None, size


# --- The import -----------------------------------------------------------------------------------


class _Importer:
    """Collects events into batches, and what becomes of them into a report."""

    def __init__(self, store: PersistenceStore, undelete: bool, progress: Progress | None) -> None:
        self._store = store
        self._undelete = undelete
        self._progress = progress
        self._bytes_done = 0
        self._bytes_total: int | None = None
        self._files = self._read = self._stored = self._already_there = self._sessions = 0
        self._refused: list[str] = []
        self._refused_count = 0
        # The batch: events and refusals, each with its position among the lines since the last one.
        self._position = 0
        self._events: list[tuple[int, str, MonitorEvent]] = []
        self._refusals: list[tuple[int, str]] = []
        self._batch_bytes = 0

    def report(self) -> ImportReport:
        return ImportReport(
            files=self._files,
            lines=self._read,
            stored=self._stored,
            already_there=self._already_there,
            sessions=self._sessions,
            refused=tuple(self._refused),
            refused_count=self._refused_count,
        )

    def read_files(self, paths: list[Path], *, must_open: bool = False) -> None:
        sizes = [path.stat().st_size for path in paths if path.is_file()]
        # A named pipe has no size.
        self._bytes_total = sum(sizes) if len(sizes) == len(paths) else None
        for path in paths:
            try:
                opened = path.open("rb")
            except OSError as error:
                if must_open:
                    raise
                self.refuse(str(path), _reason(error))
                continue
            with opened:
                if path.name == "meta.json" and not must_open:
                    self._read_session(str(path), opened)
                else:
                    self.read(str(path), opened)

    def read(self, name: str, stream: BinaryIO) -> None:
        """Store the events of a stream, one a line."""
        self._files += 1
        for number, (text, size) in enumerate(_lines(stream), start=1):
            self._bytes_done += size
            line = None if text is None else _stripped(text, first=number == 1)
            if line == b"":
                continue
            self._read += 1
            self._position += 1
            place = f"{name}:{number}"
            try:
                event = MonitorEvent.from_wire(_parse_line(line))
            except InvalidRecord as error:
                self.refuse(place, str(error))
            else:
                self._events.append((self._position, place, event))
            self._batch_bytes += size
            if self._position >= _BATCH_EVENTS or self._batch_bytes >= _BATCH_BYTES:
                self.flush()

    def _read_session(self, name: str, stream: BinaryIO) -> None:
        """Save the session of a meta.json; a broken one is one refusal."""
        self._files += 1
        text = stream.read(MAX_LINE_BYTES + 1)
        self._bytes_done += len(text)
        try:
            line = _stripped(text) if len(text) <= MAX_LINE_BYTES else None
            session = SessionMeta.from_wire(_parse_line(line))
            self._sessions += self._store.save_session(session, undelete=self._undelete)
        except InvalidRecord as error:
            self.refuse(f"{name}:1", str(error))

    def refuse(self, place: str, reason: str) -> None:
        self._refusals.append((self._position, f"{place}: {reason[:_REASON]}"))

    def flush(self) -> None:
        """Store the batch and begin a new one."""
        if self._events:
            result = self._store.save_events(
                [event for _, _, event in self._events],
                on_error="skip",
                undelete=self._undelete,
            )
            self._stored += result.stored
            self._already_there += len(self._events) - result.stored - len(result.refused)
            for refusal in result.refused:
                position, place, _ = self._events[refusal.index]
                self._refusals.append((position, f"{place}: {refusal.reason[:_REASON]}"))
        # The store's refusals come last, but may be of earlier lines.
        self._refusals.sort(key=lambda refusal: refusal[0])
        self._refused_count += len(self._refusals)
        room = REFUSALS_SHOWN - len(self._refused)
        self._refused += [message for _, message in self._refusals[:room]]
        self._position = self._batch_bytes = 0
        self._events, self._refusals = [], []
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)


def _stripped(line: bytes, *, first: bool = True) -> bytes:
    return (line.removeprefix(_BOM) if first else line).strip(b" \t\r\n")


def _parse_line(line: bytes | None) -> Any:
    if line is None:
        raise InvalidRecord(f"line: more than {MAX_LINE_BYTES:,} bytes")
    return parse_json(line)
