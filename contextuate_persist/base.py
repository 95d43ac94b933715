"""What both stores do in the same way: check, batch, retry, page. There is no SQL here."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar, overload

from contextuate_persist import (
    doctor,
    model,
    partitions,
    payload,
    records,
    retention,
    schema,
    trees,
)
from contextuate_persist.doctor import Finding, Level, Seen
from contextuate_persist.errors import (
    ConfigurationError,
    InvalidBatch,
    InvalidRecord,
    PersistenceError,
    Refusal,
    SessionNotFound,
    StoreClosed,
    StoreRefused,
    StoreUnavailable,
)
from contextuate_persist.model import (
    Cursor,
    Forgotten,
    Health,
    MessageUsage,
    MonitorEvent,
    SaveResult,
    SessionMeta,
    SessionNode,
    SessionStatus,
)
from contextuate_persist.records import (
    CheckedEvent,
    Due,
    EventRow,
    Seed,
    SessionState,
    Tally,
    Weight,
)
from contextuate_persist.subject import Subject

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from contextuate_persist.accounts import Administrator, Names
    from contextuate_persist.dumps import Dumper, Snapshot
    from contextuate_persist.partitions import Conversion, Dropped, Partition, PartitionSession
    from contextuate_persist.protocol import SessionFields
    from contextuate_persist.schema import Migration, SchemaSession

T = TypeVar("T")
E = TypeVar("E", CheckedEvent, EventRow)
#: An event on its way in, encoded already or just before it is sent.
Event: TypeAlias = CheckedEvent | EventRow

#: What is asked of each event of a session that has too much for one statement.
Sliced: TypeAlias = Literal["fingerprint", "weight"]

#: Rows of one transaction at most; more gain nothing on either server.
CHUNK_ROWS = 1000
#: Events that one statement deletes at most, of sessions that have very many.
DELETE_ROWS = 20_000
#: How long a deletion is remembered: longer than any spool of undelivered events is kept.
TOMBSTONE_DAYS = 90
#: Seconds, for who does not say otherwise.
STATEMENT_TIMEOUT, LOCK_TIMEOUT = 60.0, 10.0

_CONFLICT_ATTEMPTS = 12
_LOST_ATTEMPTS = 6
_PAGE_ROWS = 128
_PAGE_OF_MANY = 512  # of many sessions
_PAGE_BYTES = 4 * 2**20
_SLICE_ROWS = 1024
_DELETE_SESSIONS = 200
_DELETE_EVENTS = 1000
# Of each the last event is looked up, in every partition: at worst in some dozen pages on the disk.
_STATES = 1000
_LONGEST_TIMEOUT = 1_000_000  # seconds; in milliseconds it still fits the servers' settings


class Fault(Enum):
    """What an error of a driver means for the caller."""

    CONFLICT = "deadlock or serialization failure: try the transaction again"
    LOST = "the connection is gone: try again on another"
    STALE = "the connection holds an outdated plan: try again on another"
    LAYOUT = "the table of events was partitioned meanwhile: try again in the other way"
    TIMEOUT = "the server took too long"
    BUSY = "a wait for others is over: for a lock, for a free connection"
    DATA = "a value that the server does not take"
    REFUSED = "the server says no, perhaps to one row only"
    UNFIT = "the server says no to all: its disk is full, it is read-only"


class ServerRefusedData(InvalidRecord):
    """The server did not take a value: which one is found by bisection."""


class StartOver(Exception):
    """Undo a chunk and do it again with `remaining` only, or if that is None without repeats."""

    def __init__(self, remaining: list[Event] | None = None, *, repeats: bool) -> None:
        self.remaining = remaining
        self.repeats = repeats  # whether it is repeats that are to blame


class Oversized(Exception):
    """Undo a chunk: it has more bytes than a transaction should, and must be cut."""


class _Undo(Exception):
    """Undo a transaction that has shown what it was to show."""


def trial_session(machine_id: str) -> SessionMeta:
    """A session that is saved to see whether one can be, and never kept."""
    return SessionMeta(
        session_id="contextuate-persist",
        machine_id=machine_id,
        working_directory="/",
        start_time=time.time_ns() // 1_000_000,
    )


def is_newer(row: Event, deleted: Mapping[str, int]) -> bool:
    """Whether the event happened after its session was deleted, if it was."""
    return row.event.timestamp > deleted.get(row.event.session_id, 0)


def drop_deleted(rows: list[Event], deleted: Mapping[str, int]) -> None:
    """Raise StartOver if events are not newer than the deletion of their session."""
    remaining = [row for row in rows if is_newer(row, deleted)]
    if len(remaining) < len(rows):
        raise StartOver(remaining, repeats=False)


def accept_inserted(rows: list[Event], inserted: int, sessions_changed: int) -> int:
    """The number of new events; raises StartOver if repeats may have changed sessions.

    An event that is stored already is ignored with all it tells, but whether it is, only the insert
    finds out, after the sessions. Mostly they knew it all, and nothing has to be undone.
    """
    if inserted < len(rows) and sessions_changed:
        raise StartOver(repeats=True)
    return inserted


def by_table(rows: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """The columns of each table, from pairs of table and column."""
    tables: dict[str, set[str]] = {}
    for table, column in rows:
        tables.setdefault(table, set()).add(column)
    return tables


def milliseconds(seconds: float) -> int:
    """For settings of the servers, to which 0 means for ever."""
    return max(1, round(seconds * 1000))


# --- The store ------------------------------------------------------------------------------------

_stores: weakref.WeakSet[BaseStore] = weakref.WeakSet()


class BaseStore(ABC):
    """The backend-free half of a store; the methods below `Backend` are the other half."""

    backend: ClassVar[str]

    def __init__(
        self,
        *,
        pool_size: int = 10,
        connect_timeout: float = 5.0,
        pool_timeout: float = 10.0,
        statement_timeout: float = STATEMENT_TIMEOUT,
        lock_timeout: float = LOCK_TIMEOUT,
        storage_limit: int | None = None,
        on_full: retention.OnFull = "warn",
        retention_policy: retention.RetentionPolicy | None = None,
    ) -> None:
        """Take settings only; times are seconds. Raises ConfigurationError for senseless ones."""
        if type(pool_size) is not int or pool_size < 1:
            raise ConfigurationError(f"pool_size: {pool_size!r} is not a number of connections")
        timeouts = {
            "connect_timeout": connect_timeout,
            "pool_timeout": pool_timeout,
            "statement_timeout": statement_timeout,
            "lock_timeout": lock_timeout,
        }
        for name, seconds in timeouts.items():
            if type(seconds) not in (int, float) or not 0 < seconds < _LONGEST_TIMEOUT:
                raise ConfigurationError(f"{name}: {seconds!r} is not a number of seconds")
        self._pool_size = pool_size
        self._connect_timeout = connect_timeout
        self._pool_timeout = pool_timeout
        self._statement_timeout = statement_timeout
        self._lock_timeout = lock_timeout
        self._lock = threading.Lock()
        self._opened = False
        self._repeating = False  # the events that came last were stored already, some of them
        self._late = False  # some of them were older than the deletion of their session
        self._partitioned = False  # whether the table of events is, which may change at any moment
        self._valve: retention.Valve | None = None
        if storage_limit is not None:
            self._valve = retention.Valve(self, storage_limit, on_full, retention_policy)
        elif on_full != "warn" or retention_policy is not None:
            word = "retention_policy" if on_full == "warn" else "on_full"
            raise ConfigurationError(f"{word}: it needs a limit: give storage_limit, in bytes")
        _stores.add(self)

    @property
    def pool_size(self) -> int:
        """How many connections, and so calls at once, there are at most."""
        return self._pool_size

    def init(self) -> None:
        with self._lock:
            if not self._opened:
                try:
                    self._open()
                except PersistenceError:
                    raise
                except Exception as error:
                    fault = self._fault(error)
                    if fault is None:  # pragma: no cover  (a defect, not the database's word)
                        raise
                    raise self._error(fault, error) from error
                if self._valve is not None:
                    self._valve.reset()
                self._opened = True

    def close(self) -> None:
        if self._valve is not None:
            self._valve.close()
        with self._lock:
            if self._opened:
                self._opened = False
                self._close()

    def __enter__(self) -> Self:
        self.init()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- Events -----------------------------------------------------------------------------------

    def save_event(self, event: MonitorEvent) -> bool:
        self._check_room()
        row = self._encode(records.check_event(event))
        # Most events belong to a session that is known: one statement, no transaction around it.
        if self._run(lambda connection: self._insert_event(connection, row)):
            return True
        return self._save_chunk([row]) == 1

    @overload
    def save_events(
        self,
        events: Iterable[MonitorEvent],
        *,
        on_error: Literal["raise"] = "raise",
        undelete: bool = False,
    ) -> int: ...
    @overload
    def save_events(
        self, events: Iterable[MonitorEvent], *, on_error: Literal["skip"], undelete: bool = False
    ) -> SaveResult: ...
    def save_events(
        self,
        events: Iterable[MonitorEvent],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        undelete: bool = False,
    ) -> int | SaveResult:
        if on_error not in ("raise", "skip"):
            message = f"on_error: 'raise' or 'skip' is needed, not {model.shown(on_error)}"
            raise InvalidRecord(message)
        self._check_room()
        if not isinstance(events, Iterable):
            raise InvalidRecord(f"events: a list is needed, not {type(events).__name__}")
        checked: dict[str, CheckedEvent] = {}
        again: list[CheckedEvent] = []
        refused: list[Refusal] = []
        for index, event in enumerate(events):
            try:
                row = records.check_event(event, index)
            except InvalidRecord as error:
                refused.append(Refusal(index, _name(event, "id"), str(error)))
            else:
                if checked.setdefault(row.id, row) is not row:
                    again.append(row)
        # By session, so that chunks touch few of them; stable, so that the caller's order is kept.
        rows = sorted(checked.values(), key=lambda row: row.event.session_id)
        if not refused and len(rows) <= CHUNK_ROWS:
            # Mostly all is well: one transaction, encoded while the server takes what came before.
            try:
                stored = self._save_chunk([*rows], undelete)
            except (InvalidRecord, Oversized):
                pass  # nothing is stored yet, and which event it was is found below
            else:
                return SaveResult(stored=stored) if on_error == "skip" else stored
        return self._save_carefully(rows, again, refused, on_error == "skip", undelete)

    def _save_carefully(
        self,
        checked: list[CheckedEvent],
        again: list[CheckedEvent],
        refused: list[Refusal],
        skip: bool,
        undelete: bool,
    ) -> int | SaveResult:
        """Encode all before anything is stored; cut by bytes; find what the server refuses."""
        rows = self._encodable(checked, refused)
        refused.sort(key=lambda refusal: refusal.index)
        if refused and not skip:
            raise InvalidBatch(refused)
        stored = 0
        for chunk in self._chunks(rows):
            stored += self._bisect(chunk, undelete, refused)
        for row in self._encodable(_refused_before(again, refused), refused):
            stored += self._bisect([row], undelete, refused)
        refused.sort(key=lambda refusal: refusal.index)
        if skip:
            return SaveResult(stored=stored, refused=tuple(refused))
        if refused:
            raise InvalidBatch(refused, stored=stored)
        return stored

    def _encodable(self, checked: list[CheckedEvent], refused: list[Refusal]) -> list[EventRow]:
        """The rows of those that can be encoded; the others are refused."""
        rows: list[EventRow] = []
        for row in checked:
            try:
                rows.append(self._encode(row))
            except InvalidRecord as error:
                refused.append(Refusal(row.position, row.id, str(error)))
        return rows

    def save_rows(self, rows: Sequence[EventRow]) -> SaveResult:
        """Store events that are encoded already, in their order; `refused` has their positions.

        For the writer, which encodes an event when it takes it.
        """
        self._check_room()
        wanted: dict[str, EventRow] = {}
        again: list[EventRow] = []
        refused: list[Refusal] = []
        for position, row in enumerate(rows):
            placed = row._replace(position=position)
            if row.size > self._row_bytes:
                refused.append(Refusal(position, row.id, self._too_large(row)))
            elif wanted.setdefault(row.id, placed) is not placed:
                again.append(placed)
        stored = 0
        for chunk in self._chunks([*wanted.values()]):
            stored += self._bisect(chunk, False, refused)
        for row in _refused_before(again, refused):
            stored += self._bisect([row], False, refused)
        return SaveResult(stored=stored, refused=tuple(refused))

    def _chunks(self, rows: list[EventRow]) -> Iterator[list[EventRow]]:
        chunk: list[EventRow] = []
        size = 0
        for row in rows:
            if chunk and (len(chunk) >= CHUNK_ROWS or size + row.size > self._chunk_bytes):
                yield chunk
                chunk, size = [], 0
            chunk.append(row)
            size += row.size
        if chunk:
            yield chunk

    def _bisect(self, rows: list[EventRow], undelete: bool, refused: list[Refusal]) -> int:
        try:
            return self._save_chunk([*rows], undelete)
        except ServerRefusedData as error:
            if len(rows) == 1:
                refused.append(Refusal(rows[0].position, rows[0].id, str(error)))
                return 0
        middle = len(rows) // 2
        return self._bisect(rows[:middle], undelete, refused) + self._bisect(
            rows[middle:], undelete, refused
        )

    def _save_chunk(self, rows: list[Event], undelete: bool = False) -> int:
        repeats = False
        attempts = 0
        while attempts < _CONFLICT_ATTEMPTS:
            if rows and self._late and not undelete:
                rows = self._without_late(rows)
            if not rows:
                return 0
            tried = len(rows)
            try:
                stored = self._run(
                    partial(self._insert_events, rows=rows, undelete=undelete), transaction=True
                )
            except StartOver as again:
                repeats = repeats or again.repeats
                self._late = self._late or not again.repeats
                if again.remaining is not None:
                    rows = again.remaining
                else:
                    known = set(self._run(partial(self._select_known_ids, rows=rows)))
                    rows = [row for row in rows if row.id not in known]
            else:
                return stored
            finally:
                if repeats:
                    self._repeating = True
            # Whoever stores the same events at the same time may be ahead by a few at every turn.
            # While there are fewer left each time it ends; only turns that gain nothing count.
            attempts = 0 if len(rows) < tried else attempts + 1
        raise StoreUnavailable(f"{self._place}: others keep storing and deleting the same events")

    def _without_late(self, rows: list[Event]) -> list[Event]:
        """The events that no deletion forbids, asked before anything is locked.

        Only a hint, and only while late events come: a session may be deleted at any moment until
        its lock is held. But to find them only then undoes sessions that others wait for, and on
        MySQL each of those waits then ends in a deadlock: 400 among 1,020 calls of 16 threads
        that write and delete the same six sessions, instead of 4.
        """
        ids = list({row.event.session_id for row in rows})
        deleted = self._run(partial(self._select_deletions, ids=ids))
        self._late = bool(deleted)
        return [row for row in rows if is_newer(row, deleted)]

    def _drop_known(self, connection: Any, rows: list[Event], changed: int) -> list[Event]:
        """In a transaction, once the sessions are locked: the events that are not stored yet.

        Asked only while repeats come, and they come in streaks: finding them costs less than a
        transaction that has to be undone, or sending them once more. Raises StartOver.
        """
        if not self._repeating:
            return rows
        known = set(self._select_known_ids(connection, rows))
        self._repeating = bool(known)
        new = [row for row in rows if row.id not in known]
        if known and changed:
            raise StartOver(new, repeats=True)
        return new

    def _encoded(self, rows: Iterable[Event]) -> Iterator[EventRow]:
        """The rows of a chunk, encoded when they are needed; raises InvalidRecord and Oversized."""
        size = 0
        for row in rows:
            if isinstance(row, EventRow):
                yield row
                continue
            encoded = self._encode(row)
            if size and size + encoded.size > self._chunk_bytes:
                raise Oversized
            size += encoded.size
            yield encoded

    def _encode(self, checked: CheckedEvent) -> EventRow:
        row = records.encode_event(checked)
        if row.size > self._row_bytes:
            raise InvalidRecord(self._too_large(row))
        return row

    def _too_large(self, row: EventRow) -> str:
        return (
            f"data: {row.size:,} bytes with its row, this server takes {self._row_bytes:,} "
            f"(raise {self._row_limit_setting})"
        )

    def get_events(
        self,
        session_id: str,
        *,
        limit: int = 1000,
        before: int | Cursor | None = None,
        after: int | Cursor | None = None,
    ) -> list[MonitorEvent]:
        newest = before is not None or after is None
        filters = _event_filters(session_id=session_id, before=before, after=after)
        events = self._find(filters, newest_first=newest, limit=_limit(limit))
        return events[::-1] if newest else events

    def get_event_by_id(self, session_id: str, event_id: str) -> MonitorEvent | None:
        model.check_id("session_id", session_id)
        event_id = model.canonical_event_id(event_id)
        row = self._run(lambda connection: self._select_event(connection, session_id, event_id))
        return records.event_from_row(row) if row else None

    def get_all_recent_events(self, limit: int = 200) -> list[MonitorEvent]:
        return self._find({}, newest_first=True, limit=_limit(limit))

    def find_events(
        self,
        *,
        session_id: str | None = None,
        machine_id: str | None = None,
        parent_session_id: str | None = None,
        event_type: str | None = None,
        hook_type: str | None = None,
        tool_name: str | None = None,
        tool_use_id: str | None = None,
        contains: Mapping[str, Any] | None = None,
        before: int | Cursor | None = None,
        after: int | Cursor | None = None,
        newest_first: bool = True,
        limit: int = 100,
    ) -> list[MonitorEvent]:
        filters = _event_filters(
            session_id=session_id,
            machine_id=machine_id,
            parent_session_id=parent_session_id,
            event_type=event_type,
            hook_type=hook_type,
            tool_name=tool_name,
            tool_use_id=tool_use_id,
            contains=contains,
            before=before,
            after=after,
        )
        limit = _limit(limit)
        if contains is None or limit == 0:
            return self._find(filters, newest_first=newest_first, limit=limit)
        found: list[MonitorEvent] = []
        for event in self._pages(filters, newest_first=newest_first, most=limit):
            found.append(event)
            if len(found) == limit:
                break
        return found

    def iter_events(
        self,
        *,
        session_id: str | None = None,
        machine_id: str | None = None,
        parent_session_id: str | None = None,
        event_type: str | None = None,
        hook_type: str | None = None,
        tool_name: str | None = None,
        tool_use_id: str | None = None,
        contains: Mapping[str, Any] | None = None,
        before: int | Cursor | None = None,
        after: int | Cursor | None = None,
    ) -> Iterator[MonitorEvent]:
        filters = _event_filters(
            session_id=session_id,
            machine_id=machine_id,
            parent_session_id=parent_session_id,
            event_type=event_type,
            hook_type=hook_type,
            tool_name=tool_name,
            tool_use_id=tool_use_id,
            contains=contains,
            before=before,
            after=after,
        )
        self._check_open()
        return self._pages(filters, newest_first=False, most=_PAGE_ROWS)

    def event_counts(self, session_id: str | None = None) -> dict[str, int]:
        if session_id is not None:
            model.check_id("session_id", session_id)
        rows = self._run(lambda connection: self._count_events(connection, session_id))
        counts: Counter[str] = Counter()
        for name, count in rows:
            counts[name] += count
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def _find(
        self, filters: dict[str, Any], *, newest_first: bool, limit: int
    ) -> list[MonitorEvent]:
        self._check_open()
        if limit == 0:
            return []
        rows = self._run(
            lambda connection: self._select_events(connection, filters, newest_first, limit)
        )
        return [records.event_from_row(row) for row in rows]

    def _pages(
        self, filters: dict[str, Any], *, newest_first: bool, most: int
    ) -> Iterator[MonitorEvent]:
        """Matching events page by page, in bounded memory.

        Pages shrink where payloads are large, and the largest are fetched one by one.
        """
        contains = filters.get("contains")
        rows_of_page = min(32, max(most, 1))
        while True:
            page = partial(
                self._select_events,
                filters=filters,
                newest_first=newest_first,
                limit=rows_of_page,
                large_later=True,
            )
            rows = self._run(page)
            full = len(rows) == rows_of_page
            position = Cursor(rows[-1][2], rows[-1][1]) if rows else None
            for row in rows:
                event = self._complete(row)
                if event and (contains is None or payload.contains(event.data, contains)):
                    yield event
            if not full:
                return
            filters = {**filters, "before" if newest_first else "after": position}
            rows_of_page = _next_page(rows_of_page, rows, _PAGE_ROWS)

    def _complete(self, row: Sequence[Any]) -> MonitorEvent | None:
        """The event of a page's row; None if it had to be fetched and was deleted meanwhile."""
        event_id, session_id, exact, exact_size = row[0], row[3], row[10], row[11]
        if exact is None and exact_size is not None:
            return self.get_event_by_id(session_id, event_id)
        return records.event_from_row(row)

    # --- Sessions ---------------------------------------------------------------------------------

    def save_session(self, session: SessionMeta, *, undelete: bool = False) -> bool:
        model.check_session(session)
        self._check_room()
        return self._save_sessions([session], undelete) == 1

    def save_sessions(self, sessions: Iterable[SessionMeta], *, undelete: bool = False) -> int:
        self._check_room()
        if not isinstance(sessions, Iterable):
            raise InvalidRecord(f"sessions: a list is needed, not {type(sessions).__name__}")
        sessions = list(sessions)
        refused: list[Refusal] = []
        for index, session in enumerate(sessions):
            try:
                model.check_session(session)
            except InvalidRecord as error:
                refused.append(Refusal(index, _name(session, "session_id"), str(error)))
        if refused:
            raise InvalidBatch(refused)
        return self._save_sessions(sessions, undelete) if sessions else 0

    def _save_sessions(self, sessions: list[SessionMeta], undelete: bool) -> int:
        several = len(self._named(sessions)) > 1

        def save(connection: Any) -> int:
            # A late save leaves nothing, not even a reference. That is asked before anything is
            # made, and again when nobody can delete them any more; one alone the SQL refuses.
            wanted = sessions
            if several and not undelete:
                wanted = self._without_deleted(connection, sessions)
            if not wanted:
                return 0
            # What a deletion or the ledger decides is read by the statements that follow: one that
            # began before would go by what was, however long it then waits.
            if seeds := self._reference_seeds(wanted):
                self._seed(connection, seeds)
            else:
                self._hold_sessions(connection, [wanted[0].session_id])
            if undelete:
                self._undelete(connection, [session.session_id for session in wanted])
            elif seeds and len(self._without_deleted(connection, wanted)) < len(wanted):
                raise StartOver(repeats=False)
            parameters = [records.session_parameters(session) for session in wanted]
            return self._upsert_sessions(connection, parameters)

        for _ in range(_CONFLICT_ATTEMPTS):
            try:
                return self._run(save, transaction=True)
            except StartOver:
                continue
        raise StoreUnavailable(f"{self._place}: others keep deleting the same sessions")

    def _without_deleted(self, connection: Any, sessions: list[SessionMeta]) -> list[SessionMeta]:
        deleted = self._select_deletions(connection, [s.session_id for s in sessions])
        if not deleted:
            return sessions
        shown = set(self._select_shown(connection, list(deleted)))
        kept: list[SessionMeta] = []
        for session in sessions:
            session_id = session.session_id
            if session_id in shown or session.start_time > deleted.get(session_id, 0):
                shown.add(session_id)
                kept.append(session)
        return kept

    @staticmethod
    def _named(sessions: list[SessionMeta]) -> dict[str, SessionMeta]:
        """The sessions and their parents, each with the session that first names it."""
        named: dict[str, SessionMeta] = {}
        for session in sessions:
            named.setdefault(session.session_id, session)
            if session.parent_session_id is not None:
                named.setdefault(session.parent_session_id, session)
        return named

    @classmethod
    def _reference_seeds(cls, sessions: list[SessionMeta]) -> list[Seed]:
        """What to lock or make first, sorted: the sessions and their parents, if several."""
        named = cls._named(sessions)
        if len(named) <= 1:
            return []
        return [
            Seed(
                session_id=session_id,
                machine_id=session.machine_id,
                working_directory=payload.column_text(session.working_directory),
                start_time=session.start_time,
                known_from="reference",
                exact=None,
            )
            for session_id, session in sorted(named.items())
        ]

    def get_session(self, session_id: str) -> SessionMeta | None:
        model.check_id("session_id", session_id)
        rows = self._run(
            lambda connection: self._select_sessions(connection, {"session_id": session_id}, None)
        )
        return records.session_from_row(rows[0]) if rows else None

    def get_sessions(
        self,
        *,
        status: SessionStatus | str | None = None,
        machine_id: str | None = None,
        parent_session_id: str | None = None,
        hidden: bool | None = None,
        started_after: int | None = None,
        started_before: int | None = None,
        limit: int | None = None,
    ) -> list[SessionMeta]:
        checks = model.SESSION_CHECKS
        filters = {
            "status": status,
            "machine_id": machine_id,
            "effective_parent_id": parent_session_id,
            "hidden": hidden,
            "started_after": started_after,
            "started_before": started_before,
        }
        filters = {name: value for name, value in filters.items() if value is not None}
        names = {
            "effective_parent_id": "parent_session_id",
            "started_after": "start_time",
            "started_before": "start_time",
        }
        for name, value in filters.items():
            checks[names.get(name, name)](name, value)
        if "status" in filters:
            filters["status"] = SessionStatus(filters["status"]).value
        self._check_open()
        if limit is not None and _limit(limit) == 0:
            return []
        rows = self._run(lambda connection: self._select_sessions(connection, filters, limit))
        return [records.session_from_row(row) for row in rows]

    def update_session(self, session_id: str, **fields: Unpack[SessionFields]) -> None:
        model.check_id("session_id", session_id)
        values = records.update_parameters(fields)
        linked = fields.get("parent_session_id") is not None
        counts = fields.get("token_usage") is not None

        def update(connection: Any) -> None:
            # Or the ledger may decide, as in a save. With a new parent both are locked in order.
            if counts and not linked:
                self._hold_sessions(connection, [session_id])
            if not self._update_session(connection, session_id, values):
                raise SessionNotFound(session_id)

        # A new parent is locked, and perhaps made, first.
        self._run(update, transaction=counts or linked)

    def save_usage(self, session_id: str, usages: Iterable[MessageUsage]) -> int:
        model.check_id("session_id", session_id)
        self._check_room()
        messages = _messages(usages)
        return sum(
            self._save_usage(session_id, messages[start : start + CHUNK_ROWS])
            # Also without any message it is asked whether the session is there.
            for start in range(0, max(1, len(messages)), CHUNK_ROWS)
        )

    def _save_usage(self, session_id: str, messages: list[MessageUsage]) -> int:
        ids = [usage.message_id for usage in messages]

        def save(connection: Any) -> int:
            locked = self._lock_sessions(connection, sorted(touched))
            if session_id not in locked or not self._select_shown(connection, [session_id]):
                raise SessionNotFound(session_id)
            if not messages:
                return 0
            counted = self._upsert_usage(connection, session_id, messages)
            owners = self._select_owners(connection, ids)
            if not set(locked).issuperset(owners):
                raise StartOver(repeats=False)
            self._set_totals(connection, owners)
            return counted

        for _ in range(_CONFLICT_ATTEMPTS):
            # Every writer locks sessions before all else; but whose the messages are is only
            # certain once they are locked themselves.
            touched = {session_id, *self._run(partial(self._select_owners, ids=ids))}
            try:
                return self._run(save, transaction=True)
            except StartOver:
                continue
        raise StoreUnavailable(f"{self._place}: others keep storing and deleting the same messages")

    def delete_session(self, session_id: str) -> None:
        model.check_id("session_id", session_id)

        deleted = False

        def delete(connection: Any) -> None:
            nonlocal deleted
            found = self._delete_session(connection, session_id)
            # Not there any more at a second try: the first has deleted it, and was not heard.
            if not found and not deleted:
                raise SessionNotFound(session_id)
            deleted = True

        self._run(delete, transaction=True)

    def delete_all_sessions(self) -> int:
        ids = sorted(self._run(self._select_session_ids))
        deleted = 0
        for start in range(0, len(ids), _DELETE_SESSIONS):
            batch = ids[start : start + _DELETE_SESSIONS]
            deleted += self._run(partial(self._delete_sessions, ids=batch), transaction=True)
        return deleted

    def _delete_many_events(self, connection: Any, ids: list[str]) -> None:
        """Delete the events of sessions first, where there are too many for a single statement.

        Two hundred sessions of 27,000 events each are more than MySQL deletes within its limit.
        """
        if self._has_many_events(connection, ids, DELETE_ROWS):
            for delete_some in (self._delete_some_events, self._delete_some_copies):
                while delete_some(connection, ids, DELETE_ROWS) == DELETE_ROWS:
                    pass

    def prune_old_sessions(self, older_than: int) -> int:
        model.check_timestamp("older_than", older_than)
        due = Due(older_than)

        def prune(connection: Any, ids: list[str]) -> int:
            deleted = self._delete_prunable(connection, ids, due)
            # The last event of a session, by which it was due, may lie aside. Behind the locks,
            # without which none gets events back.
            if deleted:
                self._require_all_events(connection)
            return deleted

        pruned = 0
        batch: list[str] = []
        found = trees.linked_groups(retention.prunable(self.session_states(), due))
        for position, tree in enumerate(found):
            batch += tree
            if len(batch) >= _DELETE_SESSIONS or position == len(found) - 1:
                pruned += self._run(partial(prune, ids=sorted(batch)), transaction=True)
                batch = []
        self.forget_old_deletions()
        return pruned

    def _delete_prunable(self, connection: Any, ids: list[str], due: Due) -> int:
        """Lock the sessions, whole trees, and delete those of which all is still due."""
        self._lock_sessions(connection, ids)
        states = [*map(records.state_from_row, self._select_states_of(connection, ids))]
        known = set(ids)
        above = sorted({one.parent_id for one in states if one.parent_id is not None} - known)
        # What hangs on a tree now, or what it hangs on, keeps it: nobody knew it, or it was in
        # another tree. A parent that is not stored keeps nothing by itself.
        held = {row[0] for row in self._select_states_of(connection, above)} if above else set()
        links = self._select_links(connection, [*ids, *above])
        held.update(parent for child, parent in links if child not in known)
        whole = sorted(retention.prunable(states, due, held=held))
        return self._delete_locked(connection, whole) if whole else 0

    def forget(
        self,
        *,
        session_id: str | None = None,
        machine_id: str | None = None,
        working_directory: str | None = None,
        dry_run: bool = False,
    ) -> Forgotten:
        subject = Subject.of(session_id, machine_id, working_directory)
        self._check_open()
        self._run(self._has_old_table)  # refused while events is copied
        counts: Counter[str] = Counter()
        paths: dict[str, str | None] = {}  # of the transcripts, by session
        for _ in range(_CONFLICT_ATTEMPTS):
            ids, found = self._concerned(subject)
            paths |= found
            try:
                for start in range(0, len(ids), _DELETE_SESSIONS):
                    batch = sorted(ids[start : start + _DELETE_SESSIONS])
                    if dry_run:
                        counts += self._run(partial(self._count_belongings, ids=batch))
                    else:
                        self._forget_sessions(batch, set(ids), counts)
            except StartOver:
                continue  # there is more below them now
            break
        else:
            raise StoreUnavailable(f"{self._place}: others keep adding to the same sessions")
        self._forget_inside(subject, set(ids) if dry_run else set(), counts, dry_run=dry_run)
        if not dry_run:
            self._forget_copies()
        return Forgotten(
            **counts,
            session_ids=tuple(sorted(paths)),
            transcript_paths=tuple(sorted({path for path in paths.values() if path})),
        )

    def _has_old_table(self, connection: Any) -> bool:
        """Whether a conversion has left its table aside; raises StoreUnavailable during one."""
        beside = self._select_beside(connection)
        if beside - {partitions.UNPARTITIONED}:
            raise StoreUnavailable(f"{self._place}: {partitions.HALF_WAY}")
        return bool(beside)

    def _concerned(self, subject: Subject) -> tuple[list[str], dict[str, str | None]]:
        """The sessions that go whole, what is below before what is above; and their transcripts.

        In this order a second call finds what the first, interrupted, has left.
        """
        roots = [subject.value]
        if subject.kind != "session":
            filters = {"machine_id": subject.value} if subject.kind == "machine" else {}
            places = self._run(partial(self._select_places, filters=filters))
            roots = [
                session_id
                for session_id, machine, directory, exact in places
                if subject.is_at(
                    machine, records.exact_text("working_directory", directory, exact) or ""
                )
            ]
        rows = self._run(partial(self._select_below, ids=roots)) if roots else []
        # A session that is not here, or not yet, is one of them: what comes late is not welcome.
        ids = trees.deepest_first({row[0]: row[1] for row in rows}, roots)
        paths = {
            session_id: records.exact_text("transcript_path", path, exact)
            for session_id, _, path, exact in rows
        }
        return ids, paths

    def _forget_sessions(self, ids: list[str], all_ids: set[str], counts: Counter[str]) -> None:
        """Forget sessions, below which only others of `all_ids` are; raises StartOver."""

        def begin(connection: Any) -> int:
            self._lock_sessions(connection, ids)
            self._remember_forgotten(connection, ids)
            return self._delete_some_events(connection, ids, _DELETE_EVENTS)

        def end(connection: Any) -> Counter[str]:
            self._lock_kin(connection, ids)
            if not all_ids.issuperset(self._select_children(connection, ids)):
                raise StartOver(repeats=False)
            left = self._count_belongings(connection, ids)
            self._remember_forgotten(connection, ids)
            self._delete_kin(connection, ids)
            return left

        delete_copies = partial(self._delete_some_copies, ids=ids, limit=_DELETE_EVENTS)
        # One session may have a million events, too many for one transaction.
        deleted = _DELETE_EVENTS
        while deleted == _DELETE_EVENTS:
            deleted = self._run(begin, transaction=True)
            counts["events"] += deleted
        while self._run(delete_copies, transaction=True) == _DELETE_EVENTS:
            pass
        unname = partial(self._unname_parents, ids=ids, limit=_DELETE_EVENTS)
        while self._run(unname) == _DELETE_EVENTS:
            pass
        counts += self._run(end, transaction=True)

    def _forget_inside(
        self, subject: Subject, whole: set[str], counts: Counter[str], *, dry_run: bool
    ) -> None:
        """Forget the events of a machine or directory inside sessions that stay."""
        if subject.kind == "session":
            return
        filters: dict[str, Any] = {}
        if subject.kind == "machine":
            filters["machine_id"] = subject.value
        while True:
            heads = self._run(partial(self._select_heads, filters=filters, limit=_DELETE_EVENTS))
            found = [head for head in heads if head[1] not in whole and self._is_at(subject, head)]
            if found and not dry_run:
                delete = partial(self._delete_found, found)
                counts["events"] += self._run(delete, transaction=True)
            else:
                counts["events"] += len(found)
            if len(heads) < _DELETE_EVENTS:
                return
            filters["after"] = Cursor(heads[-1][2], heads[-1][3])

    def _is_at(self, subject: Subject, head: Sequence[Any]) -> bool:
        event_id, session_id, _, _, machine, directory = head
        in_columns = subject.in_columns()
        if not in_columns.is_at(machine, directory):
            return False
        if "\ufffd" not in in_columns.value:
            return True
        # The column may hold this sign instead of what it cannot hold.
        event = self.get_event_by_id(session_id, event_id)
        return event is not None and subject.is_at(machine, event.working_directory)

    def _delete_found(self, heads: list[Any], connection: Any) -> int:
        self._lock_sessions(connection, sorted({head[1] for head in heads}))
        return self._delete_events(connection, [head[0] for head in heads])

    def _forget_copies(self) -> None:
        """Empty what a parent that was only named has copied from its child: nobody reads it."""
        ids = self._run(self._select_copies)
        for start in range(0, len(ids), _DELETE_SESSIONS):
            batch = sorted(ids[start : start + _DELETE_SESSIONS])
            self._run(partial(self._empty_copies, ids=batch), transaction=True)

    def session_tree(self, session_id: str | None = None) -> list[SessionNode]:
        if session_id is None:
            return trees.forest(self.get_sessions())
        model.check_id("session_id", session_id)
        rows = self._run(lambda connection: self._select_subtree(connection, session_id))
        if not rows:
            raise SessionNotFound(session_id)
        return trees.forest(map(records.session_from_row, rows), session_id)

    def health(self) -> Health:
        return self._run(self._health)

    def check(self) -> list[Finding]:
        """Look at the connection, the server, the schema and the account: what is well, what not.

        The store need not be open, and nothing is raised: that the server cannot be reached is a
        finding, too.
        """
        try:
            return doctor.judge(self._examine())
        except PersistenceError as error:
            reason = str(error)
        except Exception as error:
            fault = self._fault(error)
            if fault is None:  # pragma: no cover  (a defect, not the database's word)
                raise
            reason = str(self._error(fault, error))
        return [Finding("connection", Level.PROBLEM, reason)]

    # --- Retention: what `retention` and `archive` are made of ------------------------------------

    def session_states(self) -> list[SessionState]:
        """What retention goes by, of every session, also of those that are only referred to.

        Read page by page, so not of one moment: who deletes by it looks again under its locks.
        """
        return [*self._states(self._run)]

    def _states(self, run: Callable[[Callable[[Any], list[Any]]], list[Any]]) -> Iterator[Any]:
        """The states of all sessions, by one statement for each page: all might take too long."""
        after: str | None = ""
        while after is not None:
            rows = run(partial(self._select_states, after=after, limit=_STATES))
            yield from map(records.state_from_row, rows)
            after = rows[-1][0] if len(rows) == _STATES else None

    def _prunable(self, connection: Any, due: Due) -> dict[str, str | None]:
        """What may be pruned, by id, with the effective parents."""
        return retention.prunable(self._states(lambda page: page(connection)), due)

    def weigh_sessions(self, ids: Sequence[str]) -> dict[str, Weight]:
        """How many events each session has and how many bytes these take, roughly.

        That is their payloads and paths as the server stores them, compressed or not, and for the
        rest of an event and its entries in the indexes a fixed number.
        """

        def weigh(connection: Any) -> list[Any]:
            try:
                return self._select_weights(connection, list(ids))
            except Exception as error:
                if self._fault(error) is not Fault.TIMEOUT:
                    raise
            return [(one, *_weight(self._slices(connection, "weight", one))) for one in ids]

        rows = self._run(weigh)
        found = {row[0]: Weight(row[1], row[2] + row[1] * self._event_bytes) for row in rows}
        return {session_id: found.get(session_id, Weight(0, 0)) for session_id in ids}

    def fingerprints(self, ids: Sequence[str], *, in_slices: bool = False) -> dict[str, str]:
        """A checksum over everything that is stored of a session, for those that are there.

        The same `in_slices`, which is for sessions with so much that one statement would take too
        long.
        """
        return self._run(partial(self._fingerprints, ids=list(ids), in_slices=in_slices))

    def _fingerprints(self, connection: Any, ids: list[str], in_slices: bool) -> dict[str, str]:
        found: dict[str, str] = {}
        for row in self._select_fingerprints(connection, ids, with_events=not in_slices):
            session_id, own, events, messages = row
            if in_slices:
                events = self._joined(self._slices(connection, "fingerprint", session_id))
            found[session_id] = f"{own} {events} {messages}"
        return found

    def _slices(self, connection: Any, what: Sliced, session_id: str) -> Iterator[Any]:
        """A value of each event of a session, in their order, by statements that each end in time.

        What this takes the size of payloads and the disk decide: the time of the last slice tells
        how long the next one may be, and one that takes too long is cut.
        """
        rows_of_slice, after = 64, Cursor(-(2**63), -(2**63))
        while True:
            started = time.monotonic()
            try:
                rows = self._select_slice(connection, what, session_id, after, rows_of_slice)
            except Exception as error:
                if self._fault(error) is not Fault.TIMEOUT or rows_of_slice == 1:
                    raise
                rows_of_slice = max(1, rows_of_slice // 8)
                continue
            yield from (value for _, _, value in rows)
            if len(rows) < rows_of_slice:
                return
            after = Cursor(rows[-1][0], rows[-1][1])
            part = (time.monotonic() - started) / self._statement_timeout
            if part > 1 / 8:
                rows_of_slice = max(1, rows_of_slice // 2)
            elif part < 1 / 32:
                rows_of_slice = min(_SLICE_ROWS, rows_of_slice * 2)

    def get_usage(self, session_id: str) -> list[MessageUsage]:
        """The messages that the token ledger has of a session, by their ids."""
        model.check_id("session_id", session_id)
        rows = self._run(partial(self._select_usage, session_id=session_id))
        return [records.usage_from_row(row) for row in rows]

    def require_all_events(self) -> None:
        """Raise StoreUnavailable if events lie aside that their sessions may get back.

        So it is while partitions are dropped, and until it is done again if that was interrupted.
        Whoever copies a session then would take what is left for all of it.
        """
        self._run(self._require_all_events)

    def _require_all_events(self, connection: Any) -> None:
        if partitions.RETIRED in self._select_beside(connection):
            raise StoreUnavailable(f"{self._place}: {partitions.HALF_WAY}")

    def delete_unchanged(
        self,
        states: Sequence[SessionState],
        fingerprints: Mapping[str, str] | None = None,
        *,
        in_slices: bool = False,
    ) -> list[str]:
        """Delete trees, in one transaction, that are still as these states have them; the ids.

        A tree of which one session has changed, is gone, or has a child besides, is left alone, and
        with `fingerprints` also where these are not the same any more; they are asked for again,
        `in_slices` or not. Refused as `require_all_events` says: states are of a part then, too.
        """
        planned = trees.linked_groups({state.session_id: state.parent_id for state in states})
        known = {state.session_id: state for state in states}

        def delete(connection: Any) -> list[str]:
            ids = sorted(known)
            self._lock_sessions(connection, ids)
            above = {state.parent_id for state in states if state.parent_id is not None}
            family = sorted(above.union(ids))
            found = [*map(records.state_from_row, self._select_states_of(connection, family))]
            same = {state.session_id for state in found if state == known.get(state.session_id)}
            # Behind the locks, without which no session gets events back or loses them for good.
            self._require_all_events(connection)
            if fingerprints is not None:
                now = self._fingerprints(connection, ids, in_slices)
                same = {one for one in same if now.get(one, "") == fingerprints.get(one)}
            # A parent that was not stored, or a child that stays: nobody knew it, or it was in
            # another tree.
            strangers = {state.session_id for state in found if state.session_id not in known}
            children = self._select_links(connection, family)
            strangers.update(parent for child, parent in children if child not in same)
            due = [
                session_id
                for tree in planned
                if same.issuperset(tree)
                and strangers.isdisjoint(tree)
                and strangers.isdisjoint(known[one].parent_id for one in tree)
                for session_id in tree
            ]
            if due:
                self._delete_locked(connection, sorted(due))
            return due

        return self._run(delete, transaction=True) if states else []

    def forget_old_deletions(self) -> None:
        """Forget deletions older than TOMBSTONE_DAYS."""
        self._run(
            lambda connection: self._forget_deletions(connection, TOMBSTONE_DAYS * 86_400_000)
        )

    def size(self) -> int:
        """How many bytes the tables and their indexes take on the server's disk.

        With what is free in them: deleting makes room for rows to come, and seldom a file smaller.
        One query, whatever the size.
        """
        return self._run(self._select_size)

    # --- Maintenance: what `maintenance` is made of -----------------------------------------------

    def survey(self) -> dict[str, doctor.Rows | None]:
        """What the server tells of its condition, by name; None where not to this account."""
        return self._translated(self._survey)

    def refresh_statistics(self, table: str) -> None:
        """Count the rows of a table anew for the planner; raises StoreRefused if not the owner."""
        self._translated(partial(self._refresh_statistics, table))

    def compact(self, table: str) -> None:
        """Make the room that deleted rows of a table had free; raises StoreRefused."""
        self._translated(partial(self._compact, table))

    def _translated(self, work: Callable[[], T]) -> T:
        """Do work on a connection of its own, whose errors are told in our words."""
        try:
            return work()
        except PersistenceError:
            raise
        except Exception as error:
            fault = self._fault(error)
            if fault is None:  # pragma: no cover  (a defect, not the database's word)
                raise
            raise self._error(fault, error) from error

    # --- Schema: the owner's account, by explicit command -------------------------------------

    def apply_schema(self, timeout: float = 60.0) -> bool:
        """Create the schema in an empty database; False if it is there already.

        Needs the owner's account; the store need not be open. Safe in several processes at once:
        one works, the others wait, at most `timeout` seconds, then raise StoreUnavailable. Raises
        SchemaError for a database of another version, or with tables of another origin.
        """
        with self._schema_session(timeout) as session:
            return schema.apply(session)

    def upgrade_schema(self, *, dry_run: bool = False, timeout: float = 60.0) -> list[Migration]:
        """Bring the schema to the current version; returns the migrations that were needed.

        As safe as `apply_schema`, and an interrupted upgrade goes on where it was. Adopts a
        database made by contextuate's own SQL. With `dry_run` nothing is changed. Raises
        SchemaError for a newer database and for tables of another origin.
        """
        with self._schema_session(timeout) as session:
            return schema.pending(session) if dry_run else schema.upgrade(session)

    # --- Partitions: the owner's account, by explicit command -------------------------------------

    def partition_events(
        self,
        by: partitions.Unit | None = None,
        *,
        ahead: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        timeout: float = 60.0,
    ) -> Conversion:
        """Make events a table with a partition for each month, week or day, while writers go on.

        Stores that are open notice by themselves. Needs the owner's account; the store need not be
        open. A run that was killed goes on where it was. The old table stays aside, as
        events_unpartitioned. If events is partitioned already, only the partitions are added that
        are missing up to `ahead` coming ones (`partitions.AHEAD`). `progress` is called with the
        seq that was reached and the one to reach. Raises ConfigurationError for another unit than
        the present one, and for what others made that would stay with the old table: columns,
        rules, indexes, triggers, and on PostgreSQL policies, publications, views, functions;
        StoreRefused for an account that is not the owner's.
        """
        if by not in (None, *partitions.AHEAD):
            raise ConfigurationError(f"by: month, week or day is needed, not {model.shown(by)}")
        with self._partition_session(timeout) as session:
            return partitions.convert(session, by, _ahead(ahead), progress)

    def partitions(self, timeout: float = 60.0) -> list[Partition]:
        """The partitions of events by time, the rest last; none if events is one table."""
        with self._partition_session(timeout) as session:
            return session.read_partitions() if session.is_partitioned() else []

    def add_partitions(self, ahead: int | None = None, *, timeout: float = 60.0) -> list[str]:
        """Add what is missing up to so many partitions after the present one; their names.

        Raises ConfigurationError if events is not partitioned.
        """
        with self._partition_session(timeout) as session:
            return partitions.extend(session, _ahead(ahead))

    def drop_partitions(
        self,
        older_than: int,
        *,
        quiet_since: int | None = None,
        empty: bool = False,
        timeout: float = 60.0,
    ) -> Dropped:
        """Drop every partition that ends before, if all of its sessions are due.

        What is due says `prune_old_sessions(older_than)`, which is for the sessions that are left:
        pinned ones, and those that reach beyond, keep their partition. Sessions are deleted whole,
        with the events they have elsewhere; if one gets a pin or an event meanwhile, it keeps its
        events. With `quiet_since`, which is no earlier, sessions with an event since then are kept,
        too. Writers wait only while a partition is taken out. With `empty` only partitions go that
        have no events at all, and no session. Raises ConfigurationError if events is not
        partitioned.
        """
        model.check_timestamp("older_than", older_than)
        with self._partition_session(timeout) as session:
            return partitions.drop(session, Due(older_than, quiet_since), empty=empty)

    def discard_unpartitioned(self, timeout: float = 60.0) -> bool:
        """Drop the table that `partition_events` left aside; False if there is none.

        Raises SchemaError, and keeps it, if it has an event that events has not.
        """
        with self._partition_session(timeout) as session:
            return partitions.discard(session)

    def load_sample(self) -> None:
        """Store the sample data of schemas/sample-data.sql; what is there already stays.

        Raises ConfigurationError where events is partitioned: the file's INSERTs give no `seq`.
        """
        if self.health().schema_layout == "partitioned":
            raise ConfigurationError(
                f"{self._place}: events is partitioned, and the sample data is for a database that "
                "is not: try it in one of its own"
            )
        script = schema.schema_file("sample-data.sql").read_text(encoding="utf-8")
        statements = schema.split_script(script, self.backend)
        self._run(lambda connection: self._run_statements(connection, statements), transaction=True)

    # --- Copies: what copying.py is made of -------------------------------------------------------

    def clock(self) -> int:
        """What time the server has, in Unix milliseconds."""
        return self._run(self._select_now)

    def tallies(self) -> dict[str, Tally]:
        """What there is of each session, references included, by id; one query over all."""
        rows = self._run(self._select_tallies)
        return {row[0]: records.tally_from_row(row) for row in rows}

    def sessions_of(self, ids: Sequence[str]) -> dict[str, SessionMeta]:
        """Those of some sessions that are there, by id, as `get_session` gives them."""
        select = partial(self._select_sessions, filters={"session_ids": list(ids)}, limit=None)
        found = map(records.session_from_row, self._run(select) if ids else [])
        return {session.session_id: session for session in found}

    def owners_of(self, message_ids: Sequence[str]) -> list[str]:
        """The sessions to which the token ledger counts some messages."""
        return self._run(partial(self._select_owners, ids=list(message_ids)))

    def events_of(self, counts: Mapping[str, int]) -> Iterator[MonitorEvent]:
        """The events of some sessions, each session's together and as `iter_events` gives them.

        `counts` says how many each had a moment ago: small sessions are read many at a time, in
        bounded memory. Sessions that are not there have none.
        """
        self._check_open()
        waiting = dict(counts)
        rows_of_page = 32
        while waiting:
            ids: list[str] = []
            expected = 0
            for session_id, count in waiting.items():
                expected += count
                if ids and expected > rows_of_page:
                    break
                ids.append(session_id)
            select = partial(self._select_events_of, ids=ids, limit=rows_of_page + 1)
            rows = self._run(select) if len(ids) > 1 else []
            if len(ids) == 1 or len(rows) > rows_of_page:  # or more have come meanwhile
                yield from self._pages({"session_id": ids[0]}, newest_first=False, most=_PAGE_ROWS)
                del waiting[ids[0]]
                continue
            for event in map(self._complete, rows):
                if event:
                    yield event
            for session_id in ids:
                del waiting[session_id]
            rows_of_page = _next_page(rows_of_page, rows, _PAGE_OF_MANY)

    def deletions(self) -> list[tuple[str, int]]:
        """The deletions that are remembered: the session's id, and until when it is not welcome."""
        return [(session_id, until) for session_id, until in self._run(self._select_all_deletions)]

    def add_deletions(self, deletions: Sequence[tuple[str, int]]) -> None:
        """Remember deletions of another database, too; sessions that are there stay."""
        for start in range(0, len(deletions), CHUNK_ROWS):
            some = [*deletions[start : start + CHUNK_ROWS]]
            self._run(partial(self._add_deletions, deletions=some), transaction=True)

    def missing(self, events: Sequence[MonitorEvent]) -> list[MonitorEvent]:
        """Those of some events that are not stored, although no deletion forbids them."""
        rows: list[Event] = [CheckedEvent(0, event, event.id) for event in events]
        known = set(self._run(partial(self._select_known_ids, rows=rows))) if rows else set()
        absent = [event for event in events if event.id not in known]
        ids = list({event.session_id for event in absent})
        deleted = self._run(partial(self._select_deletions, ids=ids)) if ids else {}
        return [one for one in absent if one.timestamp > deleted.get(one.session_id, 0)]

    # --- Accounts: an administrator's, by explicit command ----------------------------------------

    def administer(self, names: Names) -> AbstractContextManager[Administrator]:
        """Act as the server's administrator, whose URL this store was made with."""
        return self._administration(names)

    def try_writing(
        self, record: EventRow | SessionMeta | None = None, fields: Iterable[str] = ()
    ) -> bool:
        """Save a session, or a new event, set fields of the session, and undo all that.

        False if there was nothing to undo: an event of a deleted session leaves nothing. Raises
        what saving and updating raise.
        """
        if isinstance(record, EventRow):
            row = record

            def write(connection: Any) -> None:
                if self._insert_events(connection, [row], False):
                    raise _Undo

        else:
            session = record or trial_session("contextuate-persist")
            values = records.session_parameters(session)

            def write(connection: Any) -> None:
                self._upsert_sessions(connection, [values])
                if fields:
                    columns = {name: values[name] for name in fields}
                    self._update_session(connection, session.session_id, columns)
                raise _Undo

        return self._undone(write)

    def try_updating(self, session_id: str, **fields: Unpack[SessionFields]) -> bool:
        """Update a session and undo that; False if there is none. Raises what updating raises."""
        values = records.update_parameters(fields)

        def update(connection: Any) -> None:
            if not self._update_session(connection, session_id, values):
                raise StartOver(repeats=False)  # which undoes it, too
            raise _Undo

        return self._undone(update)

    def _undone(self, work: Callable[[Any], None]) -> bool:
        """Do some work in a transaction; whether it raised _Undo, and so was undone."""
        try:
            self._run(work, transaction=True)
        except _Undo:
            return True
        except StartOver:
            pass
        return False

    # --- Backup: what backup.py asks of a database ------------------------------------------------

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """See the database as it is at this moment, over a connection of its own."""
        return self._snapshot()

    def dumper(self, server: str, made_by: str = "") -> Dumper:
        """The server's programs; raises ConfigurationError where they are missing or too old."""
        return self._dumper(server, made_by)

    def schema_session(self, timeout: float = 60.0) -> AbstractContextManager[SchemaSession]:
        """Hold the schema lock of the database; raises StoreUnavailable if another does."""
        return self._schema_session(timeout)

    def scratch(self, name: str) -> AbstractContextManager[BaseStore]:
        """Make an empty database on the administrator's server, and drop it afterwards."""
        return self._scratch(name)

    # --- Running ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._opened:
            raise StoreClosed

    def _check_room(self) -> None:
        """Before something is stored; raises StoreClosed and StorageFull."""
        self._check_open()
        if self._valve is not None:
            self._valve.pass_through()

    def _run(self, work: Callable[[Any], T], *, transaction: bool = False) -> T:
        """Do the work on a connection, again where that can help.

        It is always safe: every write is idempotent, and a transaction is done again as a whole.
        Only what a call returns may then tell too little: a commit that was not heard has stored,
        or deleted, what the second try finds done.
        """
        attempt = 0
        first = time.monotonic()
        while True:
            self._check_open()
            attempt += 1
            started = time.monotonic()
            try:
                with self._connection(transaction) as connection:
                    return work(connection)
            except (PersistenceError, StartOver, Oversized):
                raise
            except Exception as error:
                fault = self._fault(error)
                if fault is None:
                    raise
                if fault is Fault.LOST and time.monotonic() - started > self._statement_timeout:
                    fault = Fault.TIMEOUT  # it was given up: once is enough to wait that long
                # Whoever is chosen to give way must come through as surely as who waits for a lock.
                patient = fault is Fault.CONFLICT and started - first < self._lock_timeout
                if attempt >= _ATTEMPTS.get(fault, 1) and not patient:
                    raise self._error(fault, error) from error
                if fault is Fault.LOST:
                    self._discard_dead()
                if fault is Fault.LAYOUT:
                    self._partitioned = True  # the other way in exists in this layout only
            # Jitter keeps two that collided from colliding again.
            time.sleep(random.uniform(0.2, 1) * min(0.002 * 2**attempt, 0.2))  # noqa: S311

    def _error(self, fault: Fault, error: Exception) -> PersistenceError:
        reason = " ".join(self._words(error).split())
        if fault is Fault.DATA:
            return ServerRefusedData(f"record: refused by the server: {reason}")
        kind = StoreRefused if fault in (Fault.REFUSED, Fault.UNFIT) else StoreUnavailable
        raised = kind(f"{self._place}: {reason}")
        raised.perhaps_one = self._may_mean_one(fault)
        if isinstance(raised, StoreRefused):
            raised.to_all = fault is Fault.UNFIT
        return raised

    def _may_mean_one(self, fault: Fault) -> bool:
        """Whether it may be the row: a trigger that is slow for it, a server that dies of it."""
        if fault is Fault.TIMEOUT:  # else it may have been a wait for somebody's lock
            return self._lock_timeout < self._statement_timeout
        return fault in (Fault.REFUSED, Fault.LOST)

    def _words(self, error: Exception) -> str:
        """What an error says, without what may be a payload."""
        return str(error)

    # --- Backend: the half with the SQL -----------------------------------------------------------

    _place: str  # the server in words, without secrets, for messages
    _chunk_bytes: int  # of one transaction
    _row_bytes: int  # of one event
    _row_limit_setting: str  # what the administrator would raise
    _event_bytes: int  # what an event takes beside its payload and path, with its index entries

    @abstractmethod
    def _open(self) -> None:
        """Connect, verify the schema, be ready."""

    @abstractmethod
    def _close(self) -> None:
        """Close every connection."""

    @abstractmethod
    def _abandon(self) -> None:
        """After a fork, in the child: forget the parent's connections without touching them."""

    @abstractmethod
    def _connection(self, transaction: bool) -> AbstractContextManager[Any]:
        """A connection of the pool, in autocommit or in one transaction."""

    @abstractmethod
    def _discard_dead(self) -> None:
        """A connection was lost: let no other dead one be handed out."""

    @abstractmethod
    def _fault(self, error: Exception) -> Fault | None:
        """What an error means; None for one that is not the database's."""

    @abstractmethod
    def _insert_event(self, connection: Any, row: EventRow) -> bool:
        """Insert an event of a session that is known; False if it was not inserted."""

    @abstractmethod
    def _insert_events(self, connection: Any, rows: list[Event], undelete: bool) -> int:
        """Make or lock the sessions, insert the events; raises StartOver."""

    @abstractmethod
    def _select_known_ids(self, connection: Any, rows: list[Event]) -> list[str]:
        """The ids, among those of the rows, that are stored."""

    @abstractmethod
    def _select_events(
        self,
        connection: Any,
        filters: Mapping[str, Any],
        newest_first: bool,
        limit: int,
        large_later: bool = False,
    ) -> list[Any]:
        """Rows of EVENT_FIELDS; `contains` may let more through, never less.

        With `large_later` a row has the size of `exact` behind it, and no `exact` if that is large.
        """

    @abstractmethod
    def _select_events_of(self, connection: Any, ids: list[str], limit: int) -> list[Any]:
        """Rows as with `large_later`, by session, and within it in the order of its events."""

    @abstractmethod
    def _select_event(self, connection: Any, session_id: str, event_id: str) -> Any:
        """A row of EVENT_FIELDS or None."""

    @abstractmethod
    def _count_events(self, connection: Any, session_id: str | None) -> list[Any]:
        """Pairs of type and count; a type may come twice."""

    @abstractmethod
    def _seed(self, connection: Any, seeds: list[Seed]) -> int:
        """Lock the sessions or make them, in their order; how many were made or changed."""

    @abstractmethod
    def _upsert_sessions(self, connection: Any, sessions: list[dict[str, Any]]) -> int:
        """Merge the sessions; how many counted."""

    @abstractmethod
    def _select_deletions(self, connection: Any, ids: list[str]) -> dict[str, int]:
        """When those of the sessions were deleted that were, by id."""

    @abstractmethod
    def _select_shown(self, connection: Any, ids: list[str]) -> list[str]:
        """Those of the ids whose sessions are there and no mere references."""

    @abstractmethod
    def _undelete(self, connection: Any, ids: list[str]) -> None:
        """Forget that these sessions were deleted."""

    @abstractmethod
    def _select_sessions(
        self, connection: Any, filters: Mapping[str, Any], limit: int | None
    ) -> list[Any]:
        """Rows of SESSION_FIELDS, newest start first."""

    @abstractmethod
    def _select_subtree(self, connection: Any, session_id: str) -> list[Any]:
        """Rows of SESSION_FIELDS: the session and all below it."""

    @abstractmethod
    def _update_session(self, connection: Any, session_id: str, values: dict[str, Any]) -> bool:
        """Set columns; False if there is no such session."""

    @abstractmethod
    def _lock_sessions(self, connection: Any, ids: list[str]) -> list[str]:
        """Lock those of the sessions that are there, in the order of their ids; which they are."""

    @abstractmethod
    def _hold_sessions(self, connection: Any, ids: list[str]) -> None:
        """Lock those that are there against changes and deletions."""

    @abstractmethod
    def _select_owners(self, connection: Any, ids: list[str]) -> list[str]:
        """The sessions to which those of the messages belong that are stored."""

    @abstractmethod
    def _upsert_usage(self, connection: Any, session_id: str, messages: list[MessageUsage]) -> int:
        """Store or raise messages, and lock them all; how many were new or raised."""

    @abstractmethod
    def _set_totals(self, connection: Any, ids: list[str]) -> None:
        """Set the token totals of those of the sessions that have messages."""

    @abstractmethod
    def _delete_session(self, connection: Any, session_id: str) -> bool:
        """Delete a session; False if there is no such session."""

    @abstractmethod
    def _delete_sessions(self, connection: Any, ids: list[str]) -> int:
        """Delete sessions that may be gone already; how many of them were visible."""

    @abstractmethod
    def _delete_locked(self, connection: Any, ids: list[str]) -> int:
        """Delete sessions that are locked; how many of them were visible."""

    @abstractmethod
    def _has_many_events(self, connection: Any, ids: list[str], many: int) -> bool:
        """Whether the sessions have more than so many events, together."""

    @abstractmethod
    def _select_session_ids(self, connection: Any) -> list[str]:
        """Every session's id, references included."""

    @abstractmethod
    def _forget_deletions(self, connection: Any, age: int) -> None:
        """Forget deletions older than so many milliseconds."""

    @abstractmethod
    def _select_places(self, connection: Any, filters: Mapping[str, Any]) -> list[Any]:
        """Rows of id, machine, directory and `exact`, of sessions that are no mere references."""

    @abstractmethod
    def _select_below(self, connection: Any, ids: list[str]) -> list[Any]:
        """Rows of id, effective parent, transcript path and `exact`: these and all below them."""

    @abstractmethod
    def _count_belongings(self, connection: Any, ids: list[str]) -> Counter[str]:
        """How many of the sessions are visible, how many events and messages they have."""

    @abstractmethod
    def _remember_forgotten(self, connection: Any, ids: list[str]) -> None:
        """Remember that these sessions are deleted, also if they are not there."""

    @abstractmethod
    def _delete_some_events(self, connection: Any, ids: list[str], limit: int) -> int:
        """Delete so many events of the sessions; how many there were."""

    @abstractmethod
    def _delete_some_copies(self, connection: Any, ids: list[str], limit: int) -> int:
        """The same of what a conversion has beside, if its foreign key deletes there; or 0."""

    @abstractmethod
    def _select_beside(self, connection: Any) -> set[str]:
        """The tables that a conversion or a drop of partitions has beside that of events."""

    @abstractmethod
    def _unname_parents(self, connection: Any, ids: list[str], limit: int) -> int:
        """Let so many events name these sessions as their parents no more; how many there were."""

    @abstractmethod
    def _lock_kin(self, connection: Any, ids: list[str]) -> None:
        """Lock the sessions, and what names them as parent or child, in the order of the ids."""

    @abstractmethod
    def _select_children(self, connection: Any, ids: list[str]) -> list[str]:
        """The sessions whose effective parents these are."""

    @abstractmethod
    def _delete_kin(self, connection: Any, ids: list[str]) -> None:
        """Delete the locked sessions, and their places in all lists."""

    @abstractmethod
    def _select_heads(self, connection: Any, filters: Mapping[str, Any], limit: int) -> list[Any]:
        """Rows of id, session, timestamp, seq, machine and directory of events, in their order."""

    @abstractmethod
    def _delete_events(self, connection: Any, ids: list[str]) -> int:
        """Delete events by their ids; how many there were."""

    @abstractmethod
    def _select_copies(self, connection: Any) -> list[str]:
        """The mere references that have a machine or directory."""

    @abstractmethod
    def _empty_copies(self, connection: Any, ids: list[str]) -> None:
        """Empty the machine and directory of those that are mere references."""

    @abstractmethod
    def _select_states(self, connection: Any, after: str, limit: int) -> list[Any]:
        """Rows of SessionState, of the next sessions behind one, by id."""

    @abstractmethod
    def _select_states_of(self, connection: Any, ids: list[str]) -> list[Any]:
        """Rows of SessionState, of these sessions."""

    @abstractmethod
    def _select_links(self, connection: Any, ids: list[str]) -> list[Any]:
        """Pairs of id and effective parent, of the sessions below these."""

    @abstractmethod
    def _select_weights(self, connection: Any, ids: list[str]) -> list[Any]:
        """Rows of id, number of events and the bytes of their values; none without events."""

    @abstractmethod
    def _select_fingerprints(self, connection: Any, ids: list[str], with_events: bool) -> list[Any]:
        """A checksum of each session that is there, with its events and messages."""

    @abstractmethod
    def _select_slice(
        self, connection: Any, what: Sliced, session_id: str, after: Cursor, limit: int
    ) -> list[Any]:
        """Rows of timestamp, seq and a value, of the events after a place in their order.

        One that takes too long leaves a transaction as it was.
        """

    @abstractmethod
    def _joined(self, hashes: Iterable[Any]) -> str:
        """What a fingerprint has of events, from the hash of each."""

    @abstractmethod
    def _select_usage(self, connection: Any, session_id: str) -> list[Any]:
        """Rows of the session's messages, by their ids."""

    @abstractmethod
    def _select_size(self, connection: Any) -> int:
        """The bytes of the tables and indexes that are in use."""

    @abstractmethod
    def _run_statements(self, connection: Any, statements: list[str]) -> None:
        """Execute statements of schemas/, which have no parameters."""

    @abstractmethod
    def _schema_session(self, timeout: float) -> AbstractContextManager[SchemaSession]:
        """A connection of its own that holds the schema lock; raises StoreUnavailable."""

    @abstractmethod
    def _partition_session(self, timeout: float) -> AbstractContextManager[PartitionSession]:
        """The same, for partitions of events; raises StoreRefused."""

    @abstractmethod
    def _administration(self, names: Names) -> AbstractContextManager[Administrator]:
        """A connection of its own that makes databases and roles; raises StoreRefused."""

    @abstractmethod
    def _snapshot(self) -> AbstractContextManager[Snapshot]: ...

    @abstractmethod
    def _dumper(self, server: str, made_by: str) -> Dumper: ...

    @abstractmethod
    def _scratch(self, name: str) -> AbstractContextManager[BaseStore]: ...

    @abstractmethod
    def _select_now(self, connection: Any) -> int:
        """The time of the server's clock, in Unix milliseconds."""

    @abstractmethod
    def _select_tallies(self, connection: Any) -> list[Any]:
        """Rows of Tally, one for each session."""

    @abstractmethod
    def _select_all_deletions(self, connection: Any) -> list[Any]:
        """Pairs of session and time."""

    @abstractmethod
    def _add_deletions(self, connection: Any, deletions: list[tuple[str, int]]) -> None:
        """Remember deletions; of two of one session the later."""

    @abstractmethod
    def _examine(self) -> Seen:
        """What a check looks at, over a connection of its own."""

    @abstractmethod
    def _survey(self) -> dict[str, doctor.Rows | None]:
        """Answers about the condition, over a connection of its own."""

    @abstractmethod
    def _refresh_statistics(self, table: str) -> None:
        """ANALYZE, over a connection of its own that may take its time."""

    @abstractmethod
    def _compact(self, table: str) -> None:
        """VACUUM or OPTIMIZE, likewise."""

    @abstractmethod
    def _health(self, connection: Any) -> Health: ...


_ATTEMPTS = {
    Fault.CONFLICT: _CONFLICT_ATTEMPTS,
    Fault.LOST: _LOST_ATTEMPTS,
    Fault.STALE: 2,
    Fault.LAYOUT: _CONFLICT_ATTEMPTS,
}


def _refused_before(again: Sequence[E], refused: Iterable[Refusal]) -> list[E]:
    """What has not got in with the first of its id, and may get in with the second."""
    missing = {refusal.id for refusal in refused}
    return [row for row in again if row.id in missing]


def _after_fork() -> None:  # pragma: no cover  (in a forked child)
    for store in _stores:
        store._lock = threading.Lock()  # noqa: SLF001  (another thread may have held it)
        if store._valve is not None:  # noqa: SLF001
            store._valve.reset()  # noqa: SLF001
        if store._opened:  # noqa: SLF001
            store._abandon()  # noqa: SLF001


os.register_at_fork(after_in_child=_after_fork)


# --- Arguments ------------------------------------------------------------------------------------

_FILTER_CHECKS: dict[str, Callable[[str, object], None]] = {
    "session_id": model.check_id,
    "machine_id": model.check_id,
    "parent_session_id": model.check_id,
    "event_type": model.check_type_name,
    "hook_type": model.check_type_name,
}
_CONTAINS_BOUNDS = ("session_id", "event_type", "hook_type", "tool_name", "tool_use_id", "after")


def _event_filters(**given: Any) -> dict[str, Any]:
    filters = {name: value for name, value in given.items() if value is not None}
    for name, value in filters.items():
        if name in _FILTER_CHECKS:
            _FILTER_CHECKS[name](name, value)
        elif name in ("tool_name", "tool_use_id"):
            if not isinstance(value, str):
                raise InvalidRecord(f"{name}: a string is needed, not {type(value).__name__}")
            filters[name] = records.search_key(value)
        elif name in ("before", "after"):
            filters[name] = _bound(name, value)
        else:  # contains
            if not isinstance(value, Mapping):
                raise InvalidRecord(f"contains: an object is needed, not {type(value).__name__}")
            payload.encode(dict(value))  # raises for what no payload can hold
    if "contains" in filters and not any(name in filters for name in _CONTAINS_BOUNDS):
        raise InvalidRecord(f"contains: give one of {', '.join(_CONTAINS_BOUNDS)} beside it")
    return filters


def _weight(sizes: Iterable[int]) -> tuple[int, int]:
    """How many, and how much together."""
    events = size = 0
    for one in sizes:
        events, size = events + 1, size + one
    return events, size


def _next_page(rows_of_page: int, rows: Sequence[Sequence[Any]], most: int) -> int:
    """How many rows the page after these may have: fewer where payloads are large."""
    size = sum(len(row[9]) + len(row[10] or b"") for row in rows)
    if size > _PAGE_BYTES:
        return max(1, rows_of_page // 2)
    return min(most, rows_of_page * 2) if size < _PAGE_BYTES // 4 else rows_of_page


def _messages(usages: Iterable[MessageUsage]) -> list[MessageUsage]:
    """The readings, one for each message, sorted, since every writer locks them in one order."""
    if not isinstance(usages, Iterable):
        raise InvalidRecord(f"usages: a list is needed, not {type(usages).__name__}")
    merged: dict[str, MessageUsage] = {}
    refused: list[Refusal] = []
    for index, usage in enumerate(usages):
        try:
            model.check_message_usage(usage)
        except InvalidRecord as error:
            refused.append(Refusal(index, _name(usage, "message_id"), str(error)))
        else:
            known = merged.get(usage.message_id)
            merged[usage.message_id] = known.merged(usage) if known else usage
    if refused:
        raise InvalidBatch(refused)
    return [merged[message_id] for message_id in sorted(merged)]


def _bound(name: str, value: object) -> Cursor:
    """A time as the cursor before, or after, everything of that millisecond."""
    if isinstance(value, Cursor):
        model.check_cursor(name, value)
        return value
    model.check_timestamp(name, value)
    assert isinstance(value, int)  # noqa: S101  (checked in the line above)
    return Cursor(value, 0 if name == "before" else model.MAX_COUNT)


def _name(record: object, field: str) -> str:
    name = getattr(record, field, "?")
    return name if isinstance(name, str) else model.shown(name)


def _ahead(value: object) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value <= _MOST_AHEAD):
        raise ConfigurationError(f"ahead: 0 to {_MOST_AHEAD} is needed, not {model.shown(value)}")
    return value


_MOST_AHEAD = 400  # more than a year of days


def _limit(value: object) -> int:
    if type(value) is not int or not 0 <= value <= model.MAX_COUNT:
        raise InvalidRecord(f"limit: a count is needed, not {model.shown(value)}")
    return value
