"""What both stores do in the same way: validate, batch, retry, page, build trees. No SQL here."""

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
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, overload

import orjson

from contextuate_persist import model, payload, schema
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
    Health,
    MonitorEvent,
    SaveResult,
    SessionMeta,
    SessionNode,
    SessionStatus,
    TokenUsage,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from contextuate_persist.protocol import SessionFields
    from contextuate_persist.schema import Migration, SchemaSession

T = TypeVar("T")

#: Rows of one transaction; beyond a few hundred nothing is gained on either server.
CHUNK_ROWS = 1000
#: How long a deletion is remembered: longer than any spool of undelivered events is kept.
TOMBSTONE_DAYS = 90

_CONFLICT_ATTEMPTS = 12
_LOST_ATTEMPTS = 4
_PAGE_ROWS = 512
_PAGE_BYTES = 4 * 2**20
_DELETE_SESSIONS = 200
_LONGEST_TIMEOUT = 1_000_000  # seconds; in milliseconds it still fits the servers' settings


class Fault(Enum):
    """What an error of a driver means for the caller."""

    CONFLICT = "deadlock or serialization failure: try the transaction again"
    LOST = "the connection is gone: try again on another"
    STALE = "the connection holds an outdated plan: try again on another"
    TIMEOUT = "a wait is over"
    DATA = "a value that the server does not take"
    REFUSED = "the server says no"


class ServerRefusedData(InvalidRecord):
    """The server did not take a value: which one is found by bisection."""


class StartOver(Exception):
    """Undo a chunk and do it again with `remaining` only, or if that is None without repeats."""

    def __init__(self, remaining: list[EventRow] | None = None) -> None:
        self.remaining = remaining


# --- Rows -----------------------------------------------------------------------------------------


class EventRow(NamedTuple):
    """An event, validated and encoded."""

    position: int  # in the caller's batch
    event: MonitorEvent
    id: str
    working_directory: str
    tool_name: str | None
    tool_use_id: str | None
    data: bytes
    exact: bytes | None

    @property
    def size(self) -> int:
        """Bytes that the row adds to a statement, roughly."""
        return len(self.data) + len(self.exact or b"") + len(self.working_directory) + 300


class Seed(NamedTuple):
    """What events tell about a session, or about the parent that one names."""

    session_id: str
    machine_id: str
    working_directory: str
    start_time: int
    known_from: str
    exact: str | None


def event_row(event: MonitorEvent, position: int = 0) -> EventRow:
    """Validate and encode an event; raises InvalidRecord."""
    model.check_event(event)
    encoded = payload.encode(event.data, event.working_directory)
    return EventRow(
        position=position,
        event=event,
        id=model.canonical_event_id(event.id),
        working_directory=payload.column_text(event.working_directory),
        tool_name=_search_key(event.data.get("toolName")),
        tool_use_id=_search_key(event.data.get("toolUseId")),
        data=encoded.json,
        exact=encoded.exact,
    )


def _search_key(value: object) -> str | None:
    return payload.column_text(value[:255]) if isinstance(value, str) else None


#: The order in which the stores select an event's columns.
EVENT_FIELDS = (
    "id",
    "seq",
    "timestamp",
    "session_id",
    "parent_session_id",
    "machine_id",
    "working_directory",
    "event_type",
    "hook_type",
    "data",
    "exact",
)


def event_from_row(row: Sequence[Any]) -> MonitorEvent:
    """The event in a row of EVENT_FIELDS."""
    data, working_directory = payload.decode(row[9], row[10], row[6])
    return MonitorEvent(
        id=row[0],
        seq=row[1],
        timestamp=row[2],
        session_id=row[3],
        parent_session_id=row[4],
        machine_id=row[5],
        working_directory=working_directory,
        event_type=row[7],
        hook_type=row[8],
        data=data,
    )


def seeds_of(rows: Iterable[EventRow]) -> list[Seed]:
    """One seed for each session that events touch, and for each parent, sorted by id.

    Sorted, since every writer must lock sessions in the same order.
    """
    earliest: dict[str, EventRow] = {}
    children: dict[str, EventRow] = {}
    for row in rows:
        event = row.event
        for ids, session_id in ((earliest, event.session_id), (children, event.parent_session_id)):
            if session_id is not None:
                known = ids.get(session_id)
                if known is None or event.timestamp < known.event.timestamp:
                    ids[session_id] = row
    return [
        _seed(session_id, earliest.get(session_id), children.get(session_id))
        for session_id in sorted(earliest.keys() | children.keys())
    ]


def _seed(session_id: str, own: EventRow | None, childs: EventRow | None) -> Seed:
    row = own or childs
    assert row is not None  # noqa: S101  (one of the two named the session)
    texts = {"working_directory": row.event.working_directory}
    return Seed(
        session_id=session_id,
        machine_id=row.event.machine_id,
        working_directory=row.working_directory,
        start_time=row.event.timestamp,
        known_from="event" if own else "reference",
        exact=_packed_texts(texts),
    )


def links_of(rows: Iterable[EventRow]) -> dict[str, str]:
    """Parents as events tell them, by child; the first one counts."""
    links: dict[str, str] = {}
    for row in rows:
        if row.event.parent_session_id is not None:
            links.setdefault(row.event.session_id, row.event.parent_session_id)
    return links


def drop_deleted(rows: list[EventRow], deleted: Mapping[str, int]) -> None:
    """Raise StartOver if events are not newer than the deletion of their session."""
    remaining = [row for row in rows if row.event.timestamp > deleted.get(row.event.session_id, 0)]
    if len(remaining) < len(rows):
        raise StartOver(remaining)


def accept_inserted(rows: list[EventRow], inserted: int, sessions_changed: int) -> int:
    """The number of new events; raises StartOver if repeats may have changed sessions.

    An event that is stored already is ignored with all it tells, but whether it is, only the insert
    finds out, after the sessions. Mostly they knew it all, and nothing has to be undone.
    """
    if inserted < len(rows) and sessions_changed:
        raise StartOver
    return inserted


# --- Sessions as parameters and rows --------------------------------------------------------------

_SESSION_TEXTS = ("working_directory", "label", "agent_type", "model", "transcript_path")
_FLAG_DEFAULTS = {"is_user_initiated": True, "is_pinned": False, "hidden": False}


def _packed_texts(texts: Mapping[str, str | None]) -> str | None:
    packed = {
        name: payload.pack_text(text)
        for name, text in texts.items()
        if text is not None and not payload.fits_text(text)
    }
    return orjson.dumps(packed).decode() if packed else None


def _exact_patch(texts: Mapping[str, str | None]) -> str:
    """A merge patch for `sessions.exact`: the given texts that need it, null for the others."""
    patch = {
        name: None if text is None or payload.fits_text(text) else payload.pack_text(text)
        for name, text in texts.items()
    }
    return orjson.dumps(patch).decode()


def session_parameters(session: SessionMeta) -> dict[str, Any]:
    """The values of a save, by column; `exact` is a merge patch over the texts that were given."""
    usage = session.token_usage
    texts = {name: getattr(session, name) for name in _SESSION_TEXTS}
    given = {name: text for name, text in texts.items() if text is not None}
    return {
        "session_id": session.session_id,
        "machine_id": session.machine_id,
        "start_time": session.start_time,
        "end_time": session.end_time,
        "status": SessionStatus(session.status).value,
        "parent_session_id": session.parent_session_id,
        "manual_parent_session_id": session.manual_parent_session_id,
        "child_session_ids": json_list(session.child_session_ids),
        "is_user_initiated": session.is_user_initiated,
        "is_pinned": session.is_pinned,
        "hidden": session.hidden,
        "token_usage_input": usage.total_input,
        "token_usage_output": usage.total_output,
        "token_usage_cache_read": usage.total_cache_read,
        "token_usage_cache_creation": usage.total_cache_creation,
        **{
            name: None if text is None else payload.column_text(text)
            for name, text in texts.items()
        },
        "exact": _exact_patch(given),
    }


def update_parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an update, by column, checked; `exact` is there if a text is."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "session_id" or name not in model.SESSION_CHECKS:
            raise InvalidRecord(f"{name}: no field that update_session can set")
        if value is None and name in _FLAG_DEFAULTS:
            values[name] = _FLAG_DEFAULTS[name]
            continue
        model.SESSION_CHECKS[name](name, value)
        if name == "token_usage":
            values["token_usage_input"] = value.total_input
            values["token_usage_output"] = value.total_output
            values["token_usage_cache_read"] = value.total_cache_read
            values["token_usage_cache_creation"] = value.total_cache_creation
        elif name == "child_session_ids":
            values[name] = json_list(value)
        elif name == "status":
            values[name] = SessionStatus(value).value
        elif name in _SESSION_TEXTS and value is not None:
            values[name] = payload.column_text(value)
        else:
            values[name] = value
    texts = {name: fields[name] for name in _SESSION_TEXTS if name in fields}
    if texts:
        values["exact"] = _exact_patch(texts)
    return values


def json_list(ids: Iterable[str]) -> str:
    return orjson.dumps(list(dict.fromkeys(ids))).decode()


#: The order in which the stores select a session's columns; the last two are computed: the sessions
#: whose effective parent it is, as [start_time, id] pairs, and the listed ids that are not its own.
SESSION_FIELDS = (
    "session_id",
    "machine_id",
    "working_directory",
    "start_time",
    "end_time",
    "status",
    "parent_session_id",
    "manual_parent_session_id",
    "child_session_ids",
    "agent_type",
    "model",
    "transcript_path",
    "is_user_initiated",
    "is_pinned",
    "hidden",
    "label",
    "token_usage_input",
    "token_usage_output",
    "token_usage_cache_read",
    "token_usage_cache_creation",
    "exact",
    "linked_children",
    "strangers",
)


def session_from_row(row: Sequence[Any]) -> SessionMeta:
    """The session in a row of SESSION_FIELDS."""
    values = dict(zip(SESSION_FIELDS, row, strict=True))
    linked = [child for _, child in sorted(_json(values.pop("linked_children")))]
    strangers = set(_json(values.pop("strangers")))
    listed = [child for child in _json(values["child_session_ids"]) if child not in strangers]
    values["child_session_ids"] = tuple(dict.fromkeys(listed + linked))
    values["status"] = SessionStatus(values["status"])
    values["token_usage"] = TokenUsage(
        total_input=values.pop("token_usage_input"),
        total_output=values.pop("token_usage_output"),
        total_cache_read=values.pop("token_usage_cache_read"),
        total_cache_creation=values.pop("token_usage_cache_creation"),
    )
    for flag in _FLAG_DEFAULTS:
        values[flag] = bool(values[flag])
    if exact := values.pop("exact"):
        values |= {name: payload.unpack_text(text) for name, text in orjson.loads(exact).items()}
    return SessionMeta(**values)


def _json(value: Any) -> Any:
    return orjson.loads(value) if value else []


def by_table(rows: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """The columns of each table, from pairs of table and column."""
    tables: dict[str, set[str]] = {}
    for table, column in rows:
        tables.setdefault(table, set()).add(column)
    return tables


# --- Trees ----------------------------------------------------------------------------------------


def forest(sessions: Iterable[SessionMeta], root: str | None = None) -> list[SessionNode]:
    """The sessions in tree order: from `root`, or from every root, siblings by start.

    Each session comes once, whatever cycles there are: a cycle begins at its smallest id.
    """
    ordered = sorted(sessions, key=lambda session: (session.start_time, session.session_id))
    by_id = {session.session_id: session for session in ordered}
    children: dict[str, list[SessionMeta]] = {}
    roots: list[SessionMeta] = []
    for session in ordered:
        parent = session.effective_parent_id
        if parent in by_id:
            children.setdefault(parent, []).append(session)
        else:
            roots.append(session)
    nodes: list[SessionNode] = []
    seen: set[str] = set()

    def walk(start: SessionMeta) -> None:
        stack = [SessionNode(start, 0)]
        while stack:
            node = stack.pop()
            if node.session.session_id in seen:
                continue
            seen.add(node.session.session_id)
            nodes.append(node)
            below = children.get(node.session.session_id, ())
            stack.extend(SessionNode(child, node.depth + 1) for child in reversed(below))

    if root is not None:
        walk(by_id[root])
        return nodes
    for session in roots:
        walk(session)
    for session in ordered:
        if session.session_id not in seen:
            walk(by_id[_cycle_start(session, by_id)])
    return nodes


def _cycle_start(session: SessionMeta, by_id: Mapping[str, SessionMeta]) -> str:
    """The smallest id of the cycle that this session hangs on."""
    path: dict[str, None] = {}
    session_id = session.session_id
    while session_id not in path:
        path[session_id] = None
        session_id = str(by_id[session_id].effective_parent_id)
    ids = list(path)
    return min(ids[ids.index(session_id) :])


def groups(links: Mapping[str, str | None]) -> list[list[str]]:
    """The ids that hang together through their parents, each group sorted."""
    leader: dict[str, str] = {}

    def find(node: str) -> str:
        while (above := leader.setdefault(node, node)) != node:
            leader[node] = leader.setdefault(above, above)
            node = above
        return node

    for child, parent in links.items():
        if parent is not None and parent in links:
            leader[find(child)] = find(parent)
    members: dict[str, list[str]] = {}
    for node in sorted(links):
        members.setdefault(find(node), []).append(node)
    return list(members.values())


def whole_trees(rows: Iterable[tuple[str, str | None, bool]]) -> list[str]:
    """The ids, of rows of id, effective parent and due, in whose tree everything is due."""
    parents: dict[str, str | None] = {}
    due: set[str] = set()
    for session_id, parent, is_due in rows:
        parents[session_id] = parent
        if is_due:
            due.add(session_id)
    return sorted(node for tree in groups(parents) if due.issuperset(tree) for node in tree)


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
        statement_timeout: float = 60.0,
        lock_timeout: float = 10.0,
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
        _stores.add(self)

    @property
    def pool_size(self) -> int:
        """How many connections, and so calls at once, there are at most."""
        return self._pool_size

    def init(self) -> None:
        with self._lock:
            if not self._opened:
                self._open()
                self._opened = True

    def close(self) -> None:
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
        self._check_open()
        row = event_row(event)
        self._check_row(row)
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
            raise InvalidRecord(f"on_error: 'raise' or 'skip' is needed, not {on_error!r}")
        self._check_open()
        rows: dict[str, EventRow] = {}
        refused: list[Refusal] = []
        for index, event in enumerate(events):
            try:
                row = event_row(event, index)
                self._check_row(row)
            except InvalidRecord as error:
                refused.append(Refusal(index, str(getattr(event, "id", "?")), str(error)))
            else:
                rows.setdefault(row.id, row)
        if refused and on_error == "raise":
            raise InvalidBatch(refused)
        stored = 0
        # By session, so that chunks touch few of them; stable, so that the caller's order is kept.
        for chunk in self._chunks(sorted(rows.values(), key=lambda row: row.event.session_id)):
            stored += self._bisect(chunk, undelete, refused)
        if on_error == "skip":
            refused.sort(key=lambda refusal: refusal.index)
            return SaveResult(stored=stored, refused=tuple(refused))
        if refused:
            raise InvalidBatch(refused, stored=stored)
        return stored

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
            return self._save_chunk(rows, undelete)
        except ServerRefusedData as error:
            if len(rows) == 1:
                refused.append(Refusal(rows[0].position, rows[0].id, str(error)))
                return 0
        middle = len(rows) // 2
        return self._bisect(rows[:middle], undelete, refused) + self._bisect(
            rows[middle:], undelete, refused
        )

    def _save_chunk(self, rows: list[EventRow], undelete: bool = False) -> int:
        while rows:
            try:
                return self._run(
                    partial(self._insert_events, rows=rows, undelete=undelete), transaction=True
                )
            except StartOver as again:
                if again.remaining is not None:
                    rows = again.remaining
                    continue
                known = set(self._run(partial(self._select_known_ids, rows=rows)))
                rows = [row for row in rows if row.id not in known]
        return 0

    def _check_row(self, row: EventRow) -> None:
        if row.size > self._row_bytes:
            raise InvalidRecord(
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
        return event_from_row(row) if row else None

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
        if contains is None:
            return self._find(filters, newest_first=newest_first, limit=limit)
        found: list[MonitorEvent] = []
        for event in self._pages(filters, newest_first=newest_first, most=limit):
            if len(found) >= limit:
                break
            found.append(event)
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
        return [event_from_row(row) for row in rows]

    def _pages(
        self, filters: dict[str, Any], *, newest_first: bool, most: int
    ) -> Iterator[MonitorEvent]:
        """Matching events page by page; pages shrink where payloads are large."""
        contains = filters.get("contains")
        rows_of_page = min(32, max(most, 1))
        while True:
            page = partial(
                self._select_events,
                filters=filters,
                newest_first=newest_first,
                limit=rows_of_page,
            )
            rows = self._run(page)
            full = len(rows) == rows_of_page
            size = sum(len(row[9]) + len(row[10] or b"") for row in rows)
            position = Cursor(rows[-1][2], rows[-1][1]) if rows else None
            for row in rows:
                event = event_from_row(row)
                if contains is None or payload.contains(event.data, contains):
                    yield event
            if not full:
                return
            filters = {**filters, "before" if newest_first else "after": position}
            if size > _PAGE_BYTES:
                rows_of_page = max(1, rows_of_page // 2)
            elif size < _PAGE_BYTES // 4:
                rows_of_page = min(_PAGE_ROWS, rows_of_page * 2)

    # --- Sessions ---------------------------------------------------------------------------------

    def save_session(self, session: SessionMeta) -> None:
        model.check_session(session)
        self._save_sessions([session])

    def save_sessions(self, sessions: Iterable[SessionMeta]) -> None:
        self._check_open()
        sessions = list(sessions)
        refused: list[Refusal] = []
        for index, session in enumerate(sessions):
            try:
                model.check_session(session)
            except InvalidRecord as error:
                refused.append(Refusal(index, str(getattr(session, "session_id", "?")), str(error)))
        if refused:
            raise InvalidBatch(refused)
        if sessions:
            self._save_sessions(sessions)

    def _save_sessions(self, sessions: list[SessionMeta]) -> None:
        parameters = [session_parameters(session) for session in sessions]
        seeds = self._reference_seeds(sessions)
        self._run(
            lambda connection: self._upsert_sessions(connection, seeds, parameters),
            # One row without a parent locks nothing else: it needs no order and no transaction.
            transaction=bool(seeds),
        )

    @staticmethod
    def _reference_seeds(sessions: list[SessionMeta]) -> list[Seed]:
        """What to lock first, sorted: the sessions and their parents, if there are several."""
        named: dict[str, SessionMeta] = {}
        for session in sessions:
            named.setdefault(session.session_id, session)
            if session.parent_session_id is not None:
                named.setdefault(session.parent_session_id, session)
        if len(named) == 1:
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
        return session_from_row(rows[0]) if rows else None

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
        return [session_from_row(row) for row in rows]

    def update_session(self, session_id: str, **fields: Unpack[SessionFields]) -> None:
        model.check_id("session_id", session_id)
        values = update_parameters(fields)

        def update(connection: Any) -> None:
            if not self._update_session(connection, session_id, values):
                raise SessionNotFound(session_id)

        # A new parent is locked, and perhaps made, first.
        self._run(update, transaction=fields.get("parent_session_id") is not None)

    def delete_session(self, session_id: str) -> None:
        model.check_id("session_id", session_id)

        def delete(connection: Any) -> None:
            if not self._delete_session(connection, session_id):
                raise SessionNotFound(session_id)

        self._run(delete, transaction=True)

    def delete_all_sessions(self) -> int:
        ids = sorted(self._run(self._select_session_ids))
        deleted = 0
        for start in range(0, len(ids), _DELETE_SESSIONS):
            batch = ids[start : start + _DELETE_SESSIONS]
            deleted += self._run(partial(self._delete_sessions, ids=batch), transaction=True)
        return deleted

    def prune_old_sessions(self, older_than: int) -> int:
        model.check_timestamp("older_than", older_than)
        due = dict(self._run(lambda connection: self._select_prunable(connection, older_than)))
        pruned = 0
        batch: list[str] = []
        trees = groups(due)
        for position, tree in enumerate(trees):
            batch += tree
            if len(batch) >= _DELETE_SESSIONS or position == len(trees) - 1:
                pruned += self._prune_batch(batch, older_than)
                batch = []
        self._run(
            lambda connection: self._forget_deletions(connection, TOMBSTONE_DAYS * 86_400_000),
            transaction=True,
        )
        return pruned

    def _prune_batch(self, ids: list[str], older_than: int) -> int:
        """Delete the trees of a batch that are still due once their sessions are locked."""
        return self._run(
            lambda connection: self._delete_prunable(connection, sorted(ids), older_than),
            transaction=True,
        )

    def session_tree(self, session_id: str | None = None) -> list[SessionNode]:
        if session_id is None:
            return forest(self.get_sessions())
        model.check_id("session_id", session_id)
        rows = self._run(lambda connection: self._select_subtree(connection, session_id))
        if not rows:
            raise SessionNotFound(session_id)
        return forest(map(session_from_row, rows), session_id)

    def health(self) -> Health:
        return self._run(self._health)

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

    def load_sample(self) -> None:
        """Store the sample data of schemas/sample-data.sql; what is there already stays."""
        script = schema.schema_file("sample-data.sql").read_text(encoding="utf-8")
        statements = schema.split_script(script, self.backend)
        self._run(lambda connection: self._run_statements(connection, statements), transaction=True)

    # --- Running ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._opened:
            raise StoreClosed

    def _run(self, work: Callable[[Any], T], *, transaction: bool = False) -> T:
        """Do the work on a connection, again where that is safe and can help.

        Safe it always is: every write is idempotent, and a transaction is done again as a whole.
        """
        attempt = 0
        while True:
            self._check_open()
            attempt += 1
            try:
                with self._connection(transaction) as connection:
                    return work(connection)
            except (PersistenceError, StartOver):
                raise
            except Exception as error:
                fault = self._fault(error)
                if fault is None:
                    raise
                if attempt >= _ATTEMPTS.get(fault, 1):
                    raise self._error(fault, error) from error
                if fault is Fault.LOST:
                    self._discard_dead()
            # Jitter keeps two that collided from colliding again.
            time.sleep(random.uniform(0.2, 1) * min(0.002 * 2**attempt, 0.2))  # noqa: S311

    def _error(self, fault: Fault, error: Exception) -> PersistenceError:
        reason = " ".join(str(error).split())
        if fault is Fault.DATA:
            return ServerRefusedData(f"record: refused by the server: {reason}")
        if fault is Fault.REFUSED:
            return StoreRefused(f"{self._place}: {reason}")
        return StoreUnavailable(f"{self._place}: {reason}")

    # --- Backend: the half with the SQL -----------------------------------------------------------

    _place: str  # the server in words, without secrets, for messages
    _chunk_bytes: int  # of one transaction
    _row_bytes: int  # of one event
    _row_limit_setting: str  # what the administrator would raise

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
    def _insert_events(self, connection: Any, rows: list[EventRow], undelete: bool) -> int:
        """Make or lock the sessions, insert the events; raises StartOver."""

    @abstractmethod
    def _select_known_ids(self, connection: Any, rows: list[EventRow]) -> list[str]:
        """The ids, among those of the rows, that are stored."""

    @abstractmethod
    def _select_events(
        self, connection: Any, filters: Mapping[str, Any], newest_first: bool, limit: int
    ) -> list[Any]:
        """Rows of EVENT_FIELDS; `contains` may let more through, never less."""

    @abstractmethod
    def _select_event(self, connection: Any, session_id: str, event_id: str) -> Any:
        """A row of EVENT_FIELDS or None."""

    @abstractmethod
    def _count_events(self, connection: Any, session_id: str | None) -> list[Any]:
        """Pairs of type and count; a type may come twice."""

    @abstractmethod
    def _upsert_sessions(
        self, connection: Any, seeds: list[Seed], sessions: list[dict[str, Any]]
    ) -> None:
        """Lock what the seeds name, in their order, then merge the sessions."""

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
    def _delete_session(self, connection: Any, session_id: str) -> bool:
        """Delete a session; False if there is no such session."""

    @abstractmethod
    def _delete_sessions(self, connection: Any, ids: list[str]) -> int:
        """Delete sessions that may be gone already; how many of them were visible."""

    @abstractmethod
    def _select_session_ids(self, connection: Any) -> list[str]:
        """Every session's id, references included."""

    @abstractmethod
    def _select_prunable(self, connection: Any, older_than: int) -> list[Any]:
        """Pairs of id and effective parent, of whole trees that are due."""

    @abstractmethod
    def _delete_prunable(self, connection: Any, ids: list[str], older_than: int) -> int:
        """Lock the sessions, delete the trees among them that are still due."""

    @abstractmethod
    def _forget_deletions(self, connection: Any, age: int) -> None:
        """Forget deletions older than so many milliseconds."""

    @abstractmethod
    def _run_statements(self, connection: Any, statements: list[str]) -> None:
        """Execute statements of schemas/, which have no parameters."""

    @abstractmethod
    def _schema_session(self, timeout: float) -> AbstractContextManager[SchemaSession]:
        """A connection of its own that holds the schema lock; raises StoreUnavailable."""

    @abstractmethod
    def _health(self, connection: Any) -> Health: ...


_ATTEMPTS = {Fault.CONFLICT: _CONFLICT_ATTEMPTS, Fault.LOST: _LOST_ATTEMPTS, Fault.STALE: 2}


def _after_fork() -> None:
    for store in _stores:
        store._lock = threading.Lock()  # noqa: SLF001  (another thread may have held it)
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
            filters[name] = _search_key(value)
        elif name in ("before", "after"):
            filters[name] = _bound(name, value)
    if "contains" in filters and not any(name in filters for name in _CONTAINS_BOUNDS):
        raise InvalidRecord(f"contains: give one of {', '.join(_CONTAINS_BOUNDS)} beside it")
    return filters


def _bound(name: str, value: object) -> Cursor:
    """A time as the cursor before, or after, everything of that millisecond."""
    if isinstance(value, Cursor):
        return value
    model.check_timestamp(name, value)
    assert isinstance(value, int)  # noqa: S101  (checked in the line above)
    return Cursor(value, 0 if name == "before" else model.MAX_COUNT)


def _limit(value: object) -> int:
    if type(value) is not int or not 0 <= value <= model.MAX_COUNT:
        raise InvalidRecord(f"limit: a count is needed, not {value!r}")
    return value
