"""Import: JSON lines of events, archives, and contextuate's file store, into any store.

A bad line costs that line only. Memory is bounded by the longest line and one batch, however long
the file, but for the ids of archived sessions that had no end, or that nobody had saved.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import orjson

from contextuate_persist import encryption
from contextuate_persist.errors import (
    ConfigurationError,
    DamagedFile,
    InvalidRecord,
    SessionNotFound,
)
from contextuate_persist.model import (
    MessageUsage,
    MonitorEvent,
    SessionMeta,
    TokenUsage,
    shown,
)
from contextuate_persist.payload import MAX_PAYLOAD_BYTES
from contextuate_persist.protocol import PersistenceStore

#: Called with the bytes done and the bytes in all, which a stream does not tell.
Progress = Callable[[int, "int | None"], None]

#: Escapes make JSON up to six times as long as the payload that they stand for: DEL is \u007f.
MAX_LINE_BYTES = 7 * MAX_PAYLOAD_BYTES
#: How many refusals are kept in words; all are counted.
REFUSALS_SHOWN = 1000

#: At the end of a file's name that is not whole yet.
PART = ".part"
#: Of the files that are read of a directory.
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.gz.age")
#: What lines of an archive are, beside the wire form of a record: the head of a file, its sessions,
#: each with its messages, its events and an end that counts them, and the end of the file.
ARCHIVE, SESSION, USAGE, EVENT, SESSION_END, ARCHIVE_END = (
    "archive",
    "session",
    "usage",
    "event",
    "sessionEnd",
    "archiveEnd",
)
#: What the line of a session has besides if nobody had saved it: events alone told of it.
OF_EVENTS = {"knownFrom": "event"}
ARCHIVE_VERSION = 1

_BATCH_EVENTS = 500
_BATCH_BYTES = 4 * 2**20
_SKIP_BYTES = 2**20
_REASON = 300  # characters
_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 1000  # an archive's first line has a tenth


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did.

    `lines` are the events that were read, empty lines not among them. `already_there` are those
    that changed nothing: stored before, twice in the files, or of a session that was deleted since.
    `refused` names each bad line as FILE:LINE: FIELD: REASON, the first thousand of them, and
    `refused_count` counts them all. `deleted` are sessions of archives that stay deleted, or whose
    past does, for want of `undelete`.
    """

    files: int
    lines: int
    stored: int
    already_there: int
    sessions: int
    refused: tuple[str, ...]
    refused_count: int
    deleted: int = 0


def import_path(
    store: PersistenceStore,
    path: str | os.PathLike[str] | BinaryIO,
    *,
    undelete: bool = False,
    identities: Sequence[Any] = (),
    progress: Progress | None = None,
) -> ImportReport:
    """Store the events of a file, a directory or a stream; `-` is standard input.

    A file holds one event a line, in its wire form, or is an archive (`archive.archive`): with its
    sessions, their events and their token ledger. Of a directory, contextuate's file store is
    recognised (all of it, its `sessions` directory, or the directory of one session): there each
    session is saved before its events, as `save_session` does it. Of any other directory, every
    *.jsonl, *.jsonl.gz and *.jsonl.gz.age below it is read, in the order of their names, but the
    archives among them the newest first. Those that end in .gz are unpacked, encrypted ones opened
    with `identities` (`encryption.identities`).

    A session of an archive is saved as it was, unless it is there: then only events and messages
    that are missing are added. So of a session that several archives of a directory have, the
    newest tells what it was, and all of them what it did.

    Every good line is stored and every bad one reported, in the file's order. An event that is
    stored already counts as such, so an import that failed half-way may be run again. Events of a
    deleted session are stored only with `undelete`. An empty file or directory gives an empty
    report; a missing one raises FileNotFoundError; what is wrong with the store raises what
    `save_events` raises. `progress` is called after each batch.
    """
    importer = _Importer(store, undelete, identities, progress)
    if not isinstance(path, (str, os.PathLike)):
        importer.read(str(getattr(path, "name", "stream")), path)
    elif os.fspath(path) == "-":
        if sys.stdin is None:  # closed by the caller
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), "stdin")
        importer.read("stdin", sys.stdin.buffer)
    elif not os.fspath(path):  # pathlib would take the working directory
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "''")
    elif (root := Path(path)).is_dir():
        importer.read_files(_files_below(root, importer.refuse, identities))
    else:
        importer.read_files([root], must_open=True)
    importer.flush()
    return importer.report()


# --- Exact JSON -----------------------------------------------------------------------------------

# Every integer past 64 bits has 19 digits or more; orjson would make a float of it.
_DIGITS = bytes(0x30 if chr(byte) in "0123456789" else 0x20 for byte in range(256))
_LONG_NUMBER = b"0" * 19


def parse_json(line: bytes, *, surrogates: bool = False) -> Any:
    """The value of a JSON text in UTF-8, integers as integers; raises InvalidRecord.

    Lone surrogates are taken as escapes, where JSON allows them, and with `surrogates` also as
    bytes, which is how two that stand side by side are told from one character.
    """
    # Translating costs 0.8 ns a byte, a regular expression for the same 13; orjson itself costs 2.
    if _LONG_NUMBER not in line.translate(_DIGITS):
        try:
            return orjson.loads(line)
        except ValueError:
            pass  # bad JSON, or a lone surrogate: the standard parser tells which
    try:
        text = line.decode("utf-8", "surrogatepass" if surrogates else "strict")
        return json.loads(text, parse_constant=_refuse_constant)
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


def _files_below(
    root: Path, refuse: Callable[[str, str], None], identities: Sequence[Any]
) -> list[Path]:
    """The files to read, in order: of a file store, each session's meta.json before its events."""
    if _size(root / "meta.json") is not None:
        return _files_of_session(root)
    sessions = root / "sessions" if (root / "sessions").is_dir() else root
    found: list[Path] = []
    unreadable: list[OSError] = []
    for of_session in sorted(path for path in sessions.iterdir() if path.is_dir()):
        try:
            found += _files_of_session(of_session)
        except OSError as error:
            unreadable.append(error)
    if any(path.name == "meta.json" for path in found):
        for reason in unreadable:
            refuse(str(reason.filename), _reason(reason))
        return found

    found = []
    walk = os.walk(root, onerror=lambda error: refuse(str(error.filename), _reason(error)))
    for directory, _, names in walk:
        found += [Path(directory, name) for name in names if name.endswith(SUFFIXES)]
    return _newest_first(sorted(found), identities)


def _newest_first(paths: list[Path], identities: Sequence[Any]) -> list[Path]:
    """The same files, the archives among them in each other's places."""
    moments = {path: _archived_at(path, identities) for path in paths}
    archives = [path for path in paths if moments[path] is not None]
    newest = iter(sorted(archives, key=lambda path: (moments[path], path), reverse=True))
    return [path if moments[path] is None else next(newest) for path in paths]


def _archived_at(path: Path, identities: Sequence[Any]) -> int | None:
    """When an archive was begun; None for all else, and for what cannot be read."""
    # What is wrong with it is told when its turn has come.
    with suppress(OSError, ConfigurationError, InvalidRecord, *DAMAGE):
        if _size(path) is not None:  # what is taken of a named pipe is gone
            with opened(path, identities) as (stream, _):
                head = parse_json(_stripped(stream.readline(_HEAD_BYTES)))
            moment = head.get("createdAt") if _is_head(head) else None
            return moment if type(moment) is int else None
    return None


def _files_of_session(directory: Path) -> list[Path]:
    paths = (directory / "meta.json", directory / "events.jsonl")
    return [path for path in paths if _size(path) is not None]


def _size(path: Path) -> int | None:
    """The bytes of a file; None if there is none. Raises OSError if that cannot be seen.

    `Path.is_file` raises that before Python 3.14, and since then says no.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


@contextmanager
def opened(path: Path, identities: Sequence[Any] = ()) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file to read lines from, decrypted and unpacked as its beginning and its name tell.

    With it comes the file itself, which tells how far it is read. Raises OSError if it cannot be
    opened, ConfigurationError if it is encrypted and no key is given.
    """
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        stream: Any = file
        if encryption.is_encrypted(file.peek(64)):
            if not identities:
                raise ConfigurationError(f"{path}: is encrypted: name the key with --identity FILE")
            stream = stack.enter_context(encryption.decrypted(file, identities, str(path)))
        if path.name.removesuffix(PART).removesuffix(".age").endswith(".gz"):
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        yield stream, file


#: What reading a damaged file raises.
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, DamagedFile)


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

    def __init__(
        self,
        store: PersistenceStore,
        undelete: bool,
        identities: Sequence[Any],
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._undelete = undelete
        self._identities = identities
        self._progress = progress
        self._archive: _Archive | None = None
        self._without_end: set[str] = set()
        self._of_events: set[str] = set()
        self._deleted = 0
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
            deleted=self._deleted,
        )

    def read_files(self, paths: list[Path], *, must_open: bool = False) -> None:
        sizes: list[int] = []
        for path in paths:
            with suppress(OSError):  # told of when it is opened
                if (size := _size(path)) is not None:  # of a named pipe there is none
                    sizes.append(size)
        self._bytes_total = sum(sizes) if len(sizes) == len(paths) else None
        for path in paths:
            done = self._bytes_done
            try:
                with opened(path, self._identities) as (stream, file):
                    if path.name == "meta.json" and not must_open:
                        self._read_session(str(path), stream)
                    elif stream is file:
                        self.read(str(path), stream)
                    else:
                        self.read(str(path), stream, lambda: done + file.tell())  # noqa: B023
            except OSError as error:
                if must_open:
                    raise
                self.refuse(str(path), _reason(error))

    def read(self, name: str, stream: BinaryIO, position: Callable[[], int] | None = None) -> None:
        """Store the events of a stream, one a line; `position` tells the bytes done, if not these.

        A stream that begins as an archive has other lines, too.
        """
        self._files += 1
        self._archive = None  # of the file before, which may have ended in an error of its disk
        number = 0
        try:
            for number, (text, size) in enumerate(_lines(stream), start=1):
                self._bytes_done = position() if position else self._bytes_done + size
                line = None if text is None else _stripped(text, first=number == 1)
                if line == b"":
                    continue
                try:
                    self._take_line(f"{name}:{number}", line, first=number == 1)
                except _NewerArchive as error:  # its events alone would be half of what it has
                    self.refuse(f"{name}:{number}", str(error))
                    break
                except InvalidRecord as error:
                    self.refuse(f"{name}:{number}", str(error))
                self._batch_bytes += size
                if self._position >= _BATCH_EVENTS or self._batch_bytes >= _BATCH_BYTES:
                    self.flush()
        except DAMAGE as error:
            self.refuse(f"{name}:{number + 1}", f"file: damaged or cut short: {error}")
        else:
            if self._archive is not None and not self._archive.ended:
                self.refuse(f"{name}:{number + 1}", "file: cut short: the archive has no end")
        if self._archive is not None:
            self._begin_session(self._archive)  # cut short after its line, but that was whole

    def _take_line(self, place: str, line: bytes | None, *, first: bool) -> None:
        if self._archive is None:
            self._read += 1
            self._position += 1
            record = _parse_line(line)
            if not first or not _is_head(record):
                self._events.append((self._position, place, MonitorEvent.from_wire(record)))
                return
            self._read -= 1
            self._archive = _Archive()
            return
        self._position += 1
        record = _parse_line(line, surrogates=True)
        self._archive.count(line or b"")
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind != USAGE:
            self._begin_session(self._archive)
        if kind == EVENT:
            self._read += 1
            event = MonitorEvent.from_wire(record)
            self._events.append((self._position, place, event))
            self._archive.last_event_id = event.id
        elif kind == SESSION:
            self.flush()
            self._archive.begin(line or b"", place)
            self._archive.session = SessionMeta.from_wire(record)
            self._archive.is_of_events = OF_EVENTS.items() <= record.items()
        elif kind == USAGE:
            self._archive.usages.append(MessageUsage.from_wire(record))
        elif kind == SESSION_END:
            self.flush()
            self._end_session(self._archive, record)
        elif kind == ARCHIVE_END:
            self._archive.ended = True
        else:
            raise InvalidRecord("kind: not one that this version knows in an archive")

    # --- Archives -----------------------------------------------------------------------------

    def _begin_session(self, archive: _Archive) -> None:
        """Save the session that waits, if one does, now that its messages are read."""
        session, archive.session = archive.session, None
        if session is None:
            return
        if archive.usages:
            # They may count to another session by now: the ledger alone decides the totals.
            session = replace(session, token_usage=TokenUsage())
        try:
            self._restore(session, is_of_events=archive.is_of_events)
            if archive.usages:
                # At once: of a file that is cut or damaged later the end does not come.
                with suppress(SessionNotFound):
                    self._store.save_usage(session.session_id, archive.usages)
        except InvalidRecord as error:
            self.refuse(archive.place, str(error))
        else:
            archive.session_id = session.session_id

    def _end_session(self, archive: _Archive, end: Mapping[str, Any]) -> None:
        session_id, usages = archive.session_id, archive.usages
        # Where the next session's line is refused, its messages must not count to this one.
        archive.session_id, archive.usages = "", []
        if session_id and end.get("sessionId") == session_id:
            try:
                # Again: its events may have brought it back.
                self._store.save_usage(session_id, usages)
            except SessionNotFound:  # it stays deleted
                self._deleted += 1
            else:
                # Or a newer event has brought it back, but not its past.
                last = archive.last_event_id
                if last and self._store.get_event_by_id(session_id, last) is None:
                    self._deleted += 1
        elif usages:
            raise InvalidRecord(f"sessionId: {len(usages)} messages of a session that was refused")
        if end.get("sha256") != archive.checksum:
            name = shown(end.get("sessionId"))
            raise InvalidRecord(f"sha256: the lines of session {name} are not those archived")

    def _restore(self, session: SessionMeta, *, is_of_events: bool) -> None:
        there = self._store.get_session(session.session_id)
        if there is None:
            if not self._store.save_session(session, undelete=self._undelete):
                return
            self._sessions += 1
        elif session.session_id in self._of_events and not is_of_events:
            # What somebody saved replaces what only events told, however much later these came.
            self._store.save_session(session)
        elif not self._is_half_restored(session, there):
            return
        if is_of_events:
            self._of_events.add(session.session_id)
        else:
            self._of_events.discard(session.session_id)
        if session.status == "active":
            if session.end_time is None:
                self._without_end.add(session.session_id)
            else:  # a save takes that for a session that goes on
                self._store.update_session(session.session_id, end_time=session.end_time)

    def _is_half_restored(self, session: SessionMeta, there: SessionMeta) -> bool:
        """Whether the session is as an import left it that was killed before it set the end."""
        if session.session_id in self._without_end:  # as a newer archive has it
            return False
        if there.status == "active" and there.end_time is None:
            self._without_end.add(session.session_id)
        return there == replace(session, end_time=None, child_session_ids=there.child_session_ids)

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


class _Archive:
    """An archive on its way in, and its session of which lines come just now."""

    def __init__(self) -> None:
        self.ended = False
        self.session: SessionMeta | None = None  # until its messages are read
        self.is_of_events = False  # nobody had saved it
        self.session_id = self.last_event_id = self.place = ""
        self.usages: list[MessageUsage] = []
        self._checksum = self._before = hashlib.sha256()

    def begin(self, line: bytes, place: str) -> None:
        """A session begins, with this line; which one, its fields tell if they are good."""
        self.session_id, self.last_event_id, self.usages = "", "", []
        self.place = place
        self._checksum = self._before = hashlib.sha256()
        self.count(line)

    def count(self, line: bytes) -> None:
        """A line of the session, whose last one is not in the checksum."""
        self._before = self._checksum.copy()
        self._checksum.update(line + b"\n")

    @property
    def checksum(self) -> str:
        """Over all lines but the last."""
        return self._before.hexdigest()


class _NewerArchive(InvalidRecord):
    """The archive has what this version does not know."""


def _is_head(record: Any) -> bool:
    """Whether a file's first line is that of an archive; raises _NewerArchive for a newer one."""
    if not isinstance(record, dict) or record.get("kind") != ARCHIVE:
        return False
    if record.get("version") != ARCHIVE_VERSION:
        raise _NewerArchive("version: a newer contextuate-persist has written this archive")
    return True


def _stripped(line: bytes, *, first: bool = True) -> bytes:
    return (line.removeprefix(_BOM) if first else line).strip(b" \t\r\n")


def _parse_line(line: bytes | None, *, surrogates: bool = False) -> Any:
    if line is None:
        raise InvalidRecord(f"line: more than {MAX_LINE_BYTES:,} bytes")
    return parse_json(line, surrogates=surrogates)
