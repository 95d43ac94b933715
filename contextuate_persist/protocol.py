"""The store interface: what every backend does, documented here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, overload, runtime_checkable

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
    TokenUsage,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class SessionFields(TypedDict, total=False):
    """What `update_session` can set: every field of SessionMeta but the id."""

    machine_id: str
    working_directory: str
    start_time: int
    end_time: int | None
    status: SessionStatus | Literal["active", "completed", "error"]
    parent_session_id: str | None
    manual_parent_session_id: str | None
    child_session_ids: tuple[str, ...] | list[str]
    token_usage: TokenUsage
    agent_type: str | None
    is_user_initiated: bool | None
    is_pinned: bool | None
    hidden: bool | None
    label: str | None
    model: str | None
    transcript_path: str | None


@runtime_checkable
class PersistenceStore(Protocol):
    """Keeps sessions and events. What holds for all methods:

    - Synchronous and thread-safe. Nothing connects before `init()`; a method called before it, or
      after `close()`, raises StoreClosed. A process that forks may go on using an open store: the
      child connects anew and leaves the parent's connections alone.
    - A `save_*` that returns has committed. Every write may be sent again: it counts once.
    - Waiting is bounded (connect, pool, statement, lock). After a lost connection or a deadlock the
      call is tried again, a few times, then raises StoreUnavailable, as a wait that is over does;
      what the server refuses (privileges, full disk, read-only) raises StoreRefused, and at a limit
      that was set, calls that save may raise StorageFull (`open_store`); invalid arguments raise
      InvalidRecord, whose message begins with the field's name.
    - Times are Unix milliseconds, bounds are exclusive unless a method says otherwise.
    - Lists come back as lists, and nothing found is an empty one.
    """

    def init(self) -> None:
        """Connect and check that the schema is there and of the right version.

        Changes nothing in the database. Raises SchemaError, with the command to run, for a schema
        that is missing, older or newer; StoreUnavailable, naming host and port, if nothing answers
        within the connect timeout. A second call does nothing; after `close()` it opens again.
        """
        ...

    def close(self) -> None:
        """Close every connection. A second call does nothing."""
        ...

    def __enter__(self) -> Self:
        """Call `init()`."""
        ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Call `close()`."""
        ...

    # --- Events -----------------------------------------------------------------------------------

    def save_event(self, event: MonitorEvent) -> bool:
        """Store one event; True if it is new, False if it was ignored.

        Ignored is an id that is stored already, whatever comes with it (events are immutable, the
        first stays), and an event not newer than the deletion of its session. An unknown session is
        created from what its events tell, the earliest of them counting, and shown. Once a
        `save_session` has told about it, events change it no more: a parent that only they name
        is then for the caller to save.
        """
        ...

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
        self,
        events: Iterable[MonitorEvent],
        *,
        on_error: Literal["skip"],
        undelete: bool = False,
    ) -> SaveResult: ...
    def save_events(
        self,
        events: Iterable[MonitorEvent],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        undelete: bool = False,
    ) -> int | SaveResult:
        """Store many events, as `save_event` does each; returns how many were new.

        The caller's order decides between equal timestamps of a session. Transactions hold a
        thousand events each, fewer where they are large. `on_error="raise"` validates everything
        first and raises InvalidBatch, which names every bad index, with nothing stored; `"skip"`
        stores the rest and returns a SaveResult that says what was left out. What only the server
        refuses is found by bisection and reported the same way, with `raise` after its neighbours
        were stored. `undelete=True` also stores events of deleted sessions, and forgets the
        deletion. An empty batch touches nothing and returns 0.
        """
        ...

    def get_events(
        self,
        session_id: str,
        *,
        limit: int = 1000,
        before: int | Cursor | None = None,
        after: int | Cursor | None = None,
    ) -> list[MonitorEvent]:
        """Events of a session, always in ascending order.

        Bounds are exclusive, each a time or an `event.cursor`. With `after` alone the oldest
        `limit` after it, otherwise the newest `limit`; so paging back passes the first event's
        cursor as `before`, paging on the last one's as `after`. An unknown session has no events.
        """
        ...

    def get_event_by_id(self, session_id: str, event_id: str) -> MonitorEvent | None:
        """One event, or None if that session has no event with this id."""
        ...

    def get_all_recent_events(self, limit: int = 200) -> list[MonitorEvent]:
        """The newest events over all sessions, newest first."""
        ...

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
        """Events that match everything given, newest first unless told otherwise.

        `parent_session_id` is the parent as the events told it; `tool_name` and `tool_use_id` look
        at the payload's `toolName` and `toolUseId` (their first 255 characters). `contains` keeps
        events whose payload contains the given object, by the rule of PostgreSQL's `@>` on exact
        values; it reads payloads, so it needs a session, type, tool or `after` beside it and raises
        InvalidRecord without.
        """
        ...

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
        """All events that `find_events` would find, in ascending order, in constant memory.

        Reads page by page and holds no connection in between; events stored meanwhile are seen if
        they sort behind the current position.
        """
        ...

    def event_counts(self, session_id: str | None = None) -> dict[str, int]:
        """Events by type, of a session or of all, most frequent first."""
        ...

    # --- Sessions ---------------------------------------------------------------------------------

    def save_session(self, session: SessionMeta, *, undelete: bool = False) -> bool:
        """Store a session, merging it into what is known; the session need not be new.

        As given: machine_id, working_directory, start_time, status, and end_time (but status active
        always clears the end: sessions re-open). Token totals as given, until the token ledger has
        rows of the session: then that decides. Every other field: a value sets, None leaves (a new
        session starts unpinned, shown, user-initiated, without label). child_session_ids are added
        to those known. A parent that is not stored yet is held as a reference, which no listing
        shows until the parent itself is saved.

        A deleted session stays deleted, and False is returned, unless it has started after its
        deletion, or a newer event has brought it back, or `undelete` says so.
        """
        ...

    def save_sessions(self, sessions: Iterable[SessionMeta], *, undelete: bool = False) -> int:
        """Store many sessions in one transaction, as `save_session` does each, in their order.

        Returns how many saves counted, those of deleted sessions left out. Raises InvalidBatch,
        naming every bad index, with nothing stored.
        """
        ...

    def get_session(self, session_id: str) -> SessionMeta | None:
        """A session, or None.

        Its `child_session_ids` are those that callers listed, in their order, then the sessions
        whose effective parent (manual, else detected) it is, by start; without those that were
        deleted or have another effective parent.
        """
        ...

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
        """Sessions that match everything given, newest start first.

        `parent_session_id` is the effective parent. `limit=None` is no limit.
        """
        ...

    def update_session(self, session_id: str, **fields: Unpack[SessionFields]) -> None:
        """Set exactly the named fields, atomically; None clears (flags go to their default).

        The fields are those of SessionMeta but the id; `child_session_ids` replaces the listed
        ones. Raises SessionNotFound; no fields change nothing, but the session must exist.
        """
        ...

    def save_usage(self, session_id: str, usages: Iterable[MessageUsage]) -> int:
        """Count the tokens of API messages, each message once over all sessions.

        A message belongs to the session that told of it first. A later reading of it, also by
        another session, raises each of its counts that is smaller and changes nothing else. The
        token totals of the sessions are then the sums over their messages, whatever `save_session`
        and `update_session` say. Returns how many messages were new or raised.

        Works in transactions of a thousand messages. Raises InvalidBatch, naming every bad index,
        with nothing stored, and SessionNotFound for a session that is unknown, deleted, or only
        named as a parent. Deleting a session forgets its messages.
        """
        ...

    def delete_session(self, session_id: str) -> None:
        """Remove a session, its events and its place in its parent's list.

        Its children stay, without it as a parent. Raises SessionNotFound. Events that are delivered
        again later do not bring it back (for 90 days, by the server's clock); newer ones do.
        """
        ...

    def delete_all_sessions(self) -> int:
        """Remove every session, as `delete_session` does each; returns how many there were.

        Works in transactions of some hundred sessions; one that fails leaves the rest to a second
        call.
        """
        ...

    def prune_old_sessions(self, older_than: int) -> int:
        """Remove sessions that ended before `older_than`; returns how many.

        A session without an end goes by its last event, else its start. Pinned ones are kept, and a
        tree (linked by effective parents, also by one that is not stored) goes only as a whole.
        """
        ...

    def forget(
        self,
        *,
        session_id: str | None = None,
        machine_id: str | None = None,
        working_directory: str | None = None,
        dry_run: bool = False,
    ) -> Forgotten:
        """Remove everything about one of a session, a machine and a directory.

        A session goes with all below it, by effective parents: what sub-agents were told quotes it.
        A machine, or a directory and what is below it (byte for byte), goes with its sessions, each
        with all below, and with its events inside other sessions. Pinned ones go, too. Afterwards
        no list and no event names what is gone; nothing found is no error.

        What stays is the bare id of each session, so that what is delivered late does not bring it
        back, as after `delete_session`. Events that were removed from inside other sessions are not
        remembered: delivered again, they are stored again.

        Works in transactions of some hundred sessions, or some thousand events; one that fails
        leaves the rest to a second call. With `dry_run` nothing is changed. Raises InvalidRecord
        unless just one is given.
        """
        ...

    def session_tree(self, session_id: str | None = None) -> list[SessionNode]:
        """A session and all below it, or every session; parents before children, siblings by start.

        Follows the effective parent. A session whose parent is not stored begins a tree of its own;
        in a cycle the session with the smallest id does. No session is left out or shown twice.
        Raises SessionNotFound for an unknown session_id. Without one it reads every session.
        """
        ...

    def health(self) -> Health:
        """Ask the server how it is; raises StoreUnavailable if it does not answer."""
        ...
