"""Archive: what retention deletes is first written to files, which are read back before that.

A file of an archive has whole trees, as compressed JSON lines: a head, then of each session the
session itself, its token ledger and its events in their wire form, and a line that counts them.
`transfer.import_path` brings all of it back.
"""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import hashlib
import importlib
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from contextuate_persist import display, encryption, payload, retention, transfer
from contextuate_persist.errors import (
    ConfigurationError,
    DamagedFile,
    InvalidRecord,
    PersistenceError,
)
from contextuate_persist.model import MessageUsage, MonitorEvent, SessionMeta
from contextuate_persist.records import SessionState, Weight
from contextuate_persist.retention import Progress, PruneReport, RetentionPolicy, Tree
from contextuate_persist.spool import make_directory, sync_directory

if TYPE_CHECKING:
    from contextuate_persist.base import BaseStore

# Of one file, unless a single tree has more. What is written is deleted once the file is whole: a
# run that is killed before that writes so much again.
FILE_BYTES = 64 * 2**20
FILE_SESSIONS = 500
_LEVEL = 6  # of compression
# What has more is hashed in several statements.
_SLICED_EVENTS = 20_000
_SLICED_BYTES = 64 * 2**20

_LOCK = ".lock"
_NAME = "contextuate"  # how the names of its files begin

#: How many of the sessions that cannot be archived are named; all are counted.
PROBLEMS_SHOWN = 1000
_REASON = 300  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveReport(PruneReport):
    """What an archiving did, or with a dry run would do, and the files it wrote.

    `unfit` of the `spared` sessions did not change: something in their tree breaks the rules by
    which sessions and events are saved, so that no line of an archive carries it. `problems` names
    the sessions that have it and what it is, the first thousand of them.
    """

    files: tuple[Path, ...]
    unfit: int = 0
    problems: tuple[str, ...] = ()


def archive(
    store: BaseStore,
    directory: str | os.PathLike[str],
    policy: RetentionPolicy,
    *,
    recipients: Sequence[Any] = (),
    dry_run: bool = False,
    rest: float = retention.REST,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> ArchiveReport:
    """Write what is due by the policy into files of a directory, verify these, then delete it.

    A file is written under a name that ends in .part, flushed to the disk, read back and compared
    with the database, record by record; then it gets its name, and only then is deleted what is in
    it. The deleting transaction sees to it that nothing of a tree has changed since it was read: if
    it has, the tree stays, and a later file will have it as it is by then, which an import of the
    directory prefers. A tree also stays, and the report names it, if another program has written
    into it what no line can carry; the others go.

    Between its deletions, and before the next file, it rests as `retention.prune` does. May be
    killed, or told to `stop`, at any moment: nothing is deleted that is not in a whole file, and
    running it again completes it. `recipients` (`encryption.recipients`) are those whose keys
    open the files. Raises DamagedFile, with nothing of that file deleted, if what is read back is
    not what is in the database; ConfigurationError while another process archives to the same
    directory; OSError for what its disk does not take; and what the store's calls raise.
    """
    if dry_run:
        told = retention.prune(store, policy, dry_run=True)
        return ArchiveReport(**dataclasses.asdict(told), files=())
    with _sole_archiver(Path(directory)) as place:
        store.require_all_events()
        found = retention.plan(store, policy)
        pace = retention.Pace(rest, stop)
        work = _Work(store, place, recipients, pace)
        done = 0
        for batch in _batches(retention.weighed(store, found.trees)):
            if not pace.goes_on():
                break
            work.archive(batch)
            done += sum(retention.shown(tree) for tree, _ in batch)
            if progress is not None:
                progress(done, found.sessions)
        store.forget_old_deletions()
    return ArchiveReport(
        sessions=work.sessions,
        events=work.events,
        size=work.size,
        spared=done - work.sessions,
        kept=found.kept + found.sessions - work.sessions,
        files=tuple(work.files),
        unfit=work.unfit,
        problems=tuple(work.problems),
    )


@contextmanager
def _sole_archiver(directory: Path) -> Iterator[Path]:
    """The directory, made if need be, for this process alone, and without half files."""
    make_directory(directory)
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"{directory}: another process archives to it") from None
        # Of one that was killed, and of nobody else: browsers and others use the same ending.
        for left in directory.glob(f"{_NAME}-*.jsonl.gz*{transfer.PART}"):
            if left.is_file():
                left.unlink()
        yield directory
    finally:
        os.close(descriptor)


def _is_much(step: Sequence[tuple[Tree, Weight]]) -> bool:
    """Whether one statement would take too long to hash all that these trees have."""
    events = sum(weight.events for _, weight in step)
    return events > _SLICED_EVENTS or sum(weight.size for _, weight in step) > _SLICED_BYTES


def _batches(given: Iterable[tuple[Tree, Weight]]) -> Iterator[list[tuple[Tree, Weight]]]:
    """Trees for one file each time."""
    return retention.batches(given, FILE_SESSIONS, FILE_BYTES, lambda weight: weight.size)


class _Work:
    """Files of one archive, one after the other, and what has come of them."""

    def __init__(
        self,
        store: BaseStore,
        directory: Path,
        recipients: Sequence[Any],
        pace: retention.Pace,
    ) -> None:
        self._store = store
        self._directory = directory
        self._pace = pace
        self._recipients = list(recipients)
        self._identities: list[Any] = []
        if recipients:
            # To read back what only others can open: a key of this run, which nobody keeps.
            own = importlib.import_module("pyrage").x25519.Identity.generate()
            self._recipients.append(own.to_public())
            self._identities.append(own)
        # For the file that is written: its sessions, and why others cannot be in it.
        self._read: dict[str, SessionMeta] = {}
        self._unfit: dict[str, str] = {}
        self.sessions = self.events = self.size = self.unfit = 0
        self.files: list[Path] = []
        self.problems: list[str] = []

    def archive(self, batch: list[tuple[Tree, Weight]]) -> None:
        """Write a file, verify it, give it its name, and delete what is in it."""
        path, part = self._names()
        try:
            try:
                fingerprints = self._write(part, batch)
                while self._unfit:
                    batch = self._fit(batch)
                    part.unlink()
                    if not batch:
                        return
                    fingerprints = self._write(part, batch)
                forest = [tree for tree, _ in batch]
                changed = self._verify(part, forest, fingerprints)
            except OSError as error:
                error.filename = error.filename or str(part)
                raise
            part.rename(path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
        sync_directory(self._directory)
        self.files.append(path)
        # Read while it changed, or gone by then: nothing of that is deleted.
        whole = [
            (tree, weight)
            for tree, weight in batch
            if all(s.session_id in fingerprints and s.session_id not in changed for s in tree)
        ]
        for step in self._pace.steps(retention.steps(whole)):
            self._delete(step, fingerprints)

    def _fit(self, batch: list[tuple[Tree, Weight]]) -> list[tuple[Tree, Weight]]:
        """The trees that a file can have all of, when the others are told of."""
        fit: list[tuple[Tree, Weight]] = []
        for tree, weight in batch:
            if self._unfit.keys().isdisjoint(state.session_id for state in tree):
                fit.append((tree, weight))
            else:
                self.unfit += retention.shown(tree)
        room = PROBLEMS_SHOWN - len(self.problems)
        self.problems += [*self._unfit.values()][:room]
        return fit

    def _delete(self, step: list[tuple[Tree, Weight]], fingerprints: Mapping[str, str]) -> None:
        states = [state for tree, _ in step for state in tree]
        many = _is_much(step)
        gone = set(self._store.delete_unchanged(states, fingerprints, in_slices=many))
        for tree, weight in step:
            if tree[0].session_id in gone:
                self.sessions += retention.shown(tree)
                self.events += weight.events
                self.size += weight.size

    def _names(self) -> tuple[Path, Path]:
        """A name that no file has, with the one that it has until it is whole."""
        suffix = ".jsonl.gz.age" if self._recipients else ".jsonl.gz"
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        for number in itertools.count(len(self.files) + 1):
            path = self._directory / f"{_NAME}-{moment}-{number:04}{suffix}"
            if not path.exists():
                return path, path.with_name(path.name + transfer.PART)
        raise AssertionError("unreachable")  # pragma: no cover

    # --- Writing ------------------------------------------------------------------------------

    def _write(self, part: Path, batch: Sequence[tuple[Tree, Weight]]) -> dict[str, str]:
        """Write the trees, flushed to the disk; the fingerprints of what is in the file."""
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fingerprints: dict[str, str] = {}
        self._read.clear()
        self._unfit.clear()
        with os.fdopen(descriptor, "wb") as file:
            with ExitStack() as stack:
                stream: Any = file
                if self._recipients:
                    stream = stack.enter_context(encryption.encrypted(file, self._recipients))
                packed: Any = gzip.GzipFile("", "wb", _LEVEL, stream, mtime=0)
                lines = _Lines(stack.enter_context(packed))
                moment = time.time_ns() // 1_000_000
                head = {"version": transfer.ARCHIVE_VERSION, "createdAt": moment}
                lines.write(transfer.ARCHIVE, head)
                for some in retention.steps(batch):
                    # Before anything is read: whatever changes from here on, the deletion notices.
                    ids = [state.session_id for tree, _ in some for state in tree]
                    many = _is_much(some)
                    fingerprints |= self._store.fingerprints(ids, in_slices=many)
                    for tree, _ in some:
                        for state in tree:
                            if state.is_shown:
                                self._write_session(lines, state)
                lines.write(transfer.ARCHIVE_END, {"sessions": lines.sessions})
            file.flush()
            os.fsync(descriptor)
        return fingerprints

    def _write_session(self, lines: _Lines, state: SessionState) -> None:
        session_id = state.session_id
        lines.begin()
        try:
            for kind, record in self._records(session_id):
                if isinstance(record, SessionMeta):
                    self._read[session_id] = record
                lines.write_record(state, kind, record)
        except PersistenceError as error:
            # Of a row that something else has written; a payload that cannot be read has the base.
            if type(error) not in (InvalidRecord, PersistenceError):
                raise
            self._unfit[session_id] = f"{session_id}: {error}"[:_REASON]
        else:
            lines.end(session_id)

    def _records(self, session_id: str) -> Iterator[tuple[str, Record]]:
        """What the database has of a session, in the order of a file; nothing if it is gone."""
        session = self._store.get_session(session_id)
        if session is not None:
            yield transfer.SESSION, session
            for usage in self._store.get_usage(session_id):
                yield transfer.USAGE, usage
            for event in self._store.iter_events(session_id=session_id):
                yield transfer.EVENT, event

    # --- Reading back -------------------------------------------------------------------------

    def _verify(
        self, part: Path, forest: Sequence[Tree], fingerprints: Mapping[str, str]
    ) -> set[str]:
        """Compare a file with the database; the sessions that have changed there since.

        Raises DamagedFile if one that has not is not in the file as it is in the database.
        """
        wrong = {s.session_id: "is missing" for tree in forest for s in tree if s.is_shown}
        try:
            with transfer.opened(part, self._identities) as (stream, _):
                for session_id, reason in self._compared(stream):
                    if reason:
                        wrong[session_id] = reason
                    else:
                        wrong.pop(session_id, None)
        except (*transfer.DAMAGE, InvalidRecord) as error:
            raise DamagedFile(f"{part}: cannot be read back: {error}") from error
        now = self._store.fingerprints(sorted(wrong), in_slices=True) if wrong else {}
        for session_id, reason in wrong.items():
            same = session_id in now and now[session_id] == fingerprints.get(session_id)
            # Its list of children changes with these, not with itself.
            if same and self._store.get_session(session_id) == self._read.get(session_id):
                raise DamagedFile(f"{part}: session {session_id!r} {reason}: nothing is deleted")
        return set(wrong)

    def _compared(self, stream: IO[bytes]) -> Iterator[tuple[str, str]]:
        """Each session of a file, and in what it differs from the database, or nothing."""
        session_id = reason = ""
        expected: Iterator[tuple[str, Record]] = iter(())
        counts: Counter[str] = Counter()
        checksum = hashlib.sha256()
        ended = False
        for text in stream:
            wire = _wire_of(text)
            kind = wire["kind"]
            if kind == transfer.SESSION:
                session_id, reason = wire["sessionId"], ""
                expected = self._records(session_id)
                counts.clear()
                checksum = hashlib.sha256()
            if kind in _KINDS:
                counts[kind] += 1
                checksum.update(text)
                if (kind, _KINDS[kind].from_wire(wire)) != next(expected, None):
                    reason = reason or f"differs in {kind} {counts[kind]}"
            elif kind == transfer.SESSION_END:
                if next(expected, None) is not None:
                    reason = reason or "has more in the database"
                if wire != _end(session_id, counts, checksum.hexdigest()):
                    reason = reason or "has another checksum"
                yield session_id, reason
            ended = kind == transfer.ARCHIVE_END
        if not ended:
            raise EOFError("it has no end")


Record: TypeAlias = SessionMeta | MessageUsage | MonitorEvent
_KINDS: dict[str, type[SessionMeta | MessageUsage | MonitorEvent]] = {
    transfer.SESSION: SessionMeta,
    transfer.USAGE: MessageUsage,
    transfer.EVENT: MonitorEvent,
}


class _Lines:
    """The lines of one file."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._counts: Counter[str] = Counter()
        self._checksum = hashlib.sha256()
        self.sessions = 0

    def write(self, kind: str, wire: Mapping[str, Any]) -> None:
        self._put(kind, display.json_line({"kind": kind, **wire}).encode())

    def write_record(self, state: SessionState, kind: str, record: Record) -> None:
        """Write a record; raises InvalidRecord, naming it, if no line can bring it back."""
        own = {"sessionId": state.session_id} if kind == transfer.USAGE else {}
        if kind == transfer.SESSION and state.known_from == "event":
            own = transfer.OF_EVENTS
        try:
            if isinstance(record, MonitorEvent):
                payload.encode(record.data)  # what this refuses, an import would refuse
            line = _line({"kind": kind, **own, **record.to_wire()}, record)
        except (ValueError, RecursionError) as error:
            raise InvalidRecord(f"{_place(record)}{error}") from error
        self._put(kind, line)

    def _put(self, kind: str, line: bytes) -> None:
        line += b"\n"
        self._counts[kind] += 1
        self._checksum.update(line)
        self._stream.write(line)

    def begin(self) -> None:
        self._counts.clear()
        self._checksum = hashlib.sha256()

    def end(self, session_id: str) -> None:
        if not self._counts[transfer.SESSION]:
            return  # it is gone
        self.sessions += 1
        end = _end(session_id, self._counts, self._checksum.hexdigest())
        self._stream.write(display.json_line(end).encode() + b"\n")


def _line(wire: Mapping[str, Any], record: Record) -> bytes:
    """The line that reads back as the record: in ASCII, unless that reads back as another."""
    line = display.json_line(wire).encode()
    if type(record).from_wire(_wire_of(line)) != record:
        line = payload.exact_json(wire)
        if type(record).from_wire(_wire_of(line)) != record:
            raise InvalidRecord("it does not read back as it is")
    return line


def _wire_of(line: bytes) -> Any:
    return transfer.parse_json(line, surrogates=True)


def _place(record: Record) -> str:
    if isinstance(record, SessionMeta):
        return ""
    if isinstance(record, MessageUsage):
        return f"message {record.message_id}: "
    return f"event {record.id}: "


def _end(session_id: str, counts: Mapping[str, int], checksum: str) -> dict[str, Any]:
    """The line after a session, which tells whether all of it is there."""
    return {
        "kind": transfer.SESSION_END,
        "sessionId": session_id,
        "messages": counts.get(transfer.USAGE, 0),
        "events": counts.get(transfer.EVENT, 0),
        "sha256": checksum,
    }
