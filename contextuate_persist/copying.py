"""Copy a database into another, of the same kind or not: what `contextuate-persist copy` does.

It only adds. Sessions whose numbers are the same on both sides are passed over, so a copy that was
interrupted goes on where it was, and a second one brings what has come since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import ge
from typing import Any

from contextuate_persist import records
from contextuate_persist.base import (
    CHUNK_ROWS,
    LOCK_TIMEOUT,
    STATEMENT_TIMEOUT,
    BaseStore,
    milliseconds,
)
from contextuate_persist.errors import (
    ConfigurationError,
    InvalidBatch,
    InvalidRecord,
    SessionNotFound,
)
from contextuate_persist.model import SESSION_CHECKS, MessageUsage, SessionMeta, TokenUsage
from contextuate_persist.records import EventRow, Tally

#: Called with the events done and the events in all.
Progress = Callable[[int, int], None]

#: How many of the things that went wrong are kept in words; all are counted.
PROBLEMS_SHOWN = 1000

_SESSIONS = 200  # in one step
_BATCH_BYTES = 4 * 2**20
_ROUNDS = 10  # of what changes while it is written
_REASON = 300  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What the source holds, and what a copy did.

    `sessions`, `events`, `messages` and `deletions` are the source's. `saved` counts the sessions
    that were written, `stored` the events that were new to the target, `counted` the messages that
    were new there or raised. `kept` are sessions that the source has deleted and the target still
    shows. `problems` names what is not in the target and why, the first thousand of them, and
    `problem_count` counts them all; without any, everything is there but what the target has
    deleted or changed later.
    """

    sessions: int
    events: int
    messages: int
    deletions: int
    saved: int
    stored: int
    counted: int
    kept: int
    problems: tuple[str, ...]
    problem_count: int


def copy_store(
    source: BaseStore, target: BaseStore, *, progress: Progress | None = None
) -> CopyReport:
    """Copy everything that an open store holds into another open store, and compare them.

    Events keep their order within a session, and their ids, so what is there already is left
    alone. Of a session that the target knows, too, the later change counts, by the servers' clocks,
    which are compared first. A change is dated when its transaction begins, and may be seen as
    much later as that takes: the target's counts only if it is later by more than the source's
    `statement_timeout` and `lock_timeout` together. Deletions come along: what is late in the
    source will be late in the target; what the target has deleted stays deleted; and a session that
    the source has deleted since an earlier copy is kept. Writers need not stop, but only a copy
    that runs after they have stopped finds all. Raises ConfigurationError if both are one database,
    and what the stores raise; run again, it goes on.
    """
    if (source.backend, source._place) == (target.backend, target._place):  # noqa: SLF001
        raise ConfigurationError("copy: the source and the target are the same database")
    for store in (source, target):
        store.require_all_events()
    copier = _Copier(source, target, progress)
    copier.copy()
    copier.compare()
    source.require_all_events()  # some may have been taken aside meanwhile
    return copier.report()


class _Copier:
    def __init__(self, source: BaseStore, target: BaseStore, progress: Progress | None) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._ahead, self._doubt = _clocks(source, target)
        self._there = target.tallies()
        self._given = source.tallies()
        self._deletions = source.deletions()
        self._total = sum(tally.events for tally in self._given.values())
        self._done = self._saved = self._stored = self._counted = self._kept = 0
        self._problems: list[str] = []
        self._problem_count = 0
        self._written: set[str] = set()
        self._rows: list[EventRow] = []
        self._size = 0

    def report(self) -> CopyReport:
        given = self._given.values()
        return CopyReport(
            sessions=sum(tally.known_from != "reference" for tally in given),
            events=sum(tally.events for tally in given),
            messages=sum(tally.messages for tally in given),
            deletions=len(self._deletions),
            saved=self._saved,
            stored=self._stored,
            counted=self._counted,
            kept=self._kept,
            problems=tuple(self._problems),
            problem_count=self._problem_count,
        )

    def copy(self) -> None:
        for ids in _portions(sorted(self._given), _SESSIONS):
            # Events first: they bring back a session that had been deleted, also in the target.
            self._copy_events(ids)
            written = self._settle(ids, self._copy_sessions(ids))
            # Messages last: what they set of a session is not to be settled.
            for session_id in ids:
                self._copy_messages(session_id)
            self._catch_up(written)
        self._target.add_deletions(self._deletions)

    def compare(self) -> None:
        """See that all that the source has now is in the target."""
        self._given, there = self._source.tallies(), self._target.tallies()
        self._there = there
        shown = {one for one, tally in there.items() if tally.known_from != "reference"}
        deleted = {session_id for session_id, _ in self._target.deletions()}
        for session_id, given in self._given.items():
            if given.known_from == "reference":
                continue
            if session_id not in shown:
                if session_id not in deleted:
                    self._tell(f"{session_id}: the session is not in the target")
                continue
            if _events_of(there[session_id]) != _events_of(given):
                self._compare_events(given)
            if given.messages and _messages_of(there[session_id]) != _messages_of(given):
                self._compare_messages(given)
        due = [one for one in self._given if one in self._written or self._is_to_settle(one)]
        for ids in _portions((one for one in due if one in shown), _SESSIONS):
            self._compare_sessions(ids)
        self._kept = sum(
            session_id in shown and session_id not in self._given
            for session_id, _ in self._deletions
        )

    # --- Events -----------------------------------------------------------------------------------

    def _copy_events(self, ids: Sequence[str]) -> None:
        wanted: dict[str, int] = {}
        for session_id in ids:
            given = self._given[session_id]
            if _events_of(self._there.get(session_id)) == _events_of(given):
                self._advance(given.events)
            else:
                wanted[session_id] = given.events
        for event in self._source.events_of(wanted):
            try:
                row = records.encode_event(records.check_event(event))
            except InvalidRecord as error:  # of a row that something else has written
                self._tell(f"{event.session_id}: event {event.id}: {error}")
                self._advance(1)
                continue
            self._rows.append(row)
            self._size += row.size
            if len(self._rows) >= CHUNK_ROWS or self._size > _BATCH_BYTES:
                self._flush()
        self._flush()

    def _flush(self) -> None:
        rows, self._rows, self._size = self._rows, [], 0
        if not rows:
            return
        result = self._target.save_rows(rows)
        self._stored += result.stored
        for refusal in result.refused:
            session_id = rows[refusal.index].event.session_id
            self._tell(f"{session_id}: event {refusal.id}: {refusal.reason}")
        self._advance(len(rows))

    def _advance(self, events: int) -> None:
        self._done += events
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _compare_events(self, given: Tally) -> None:
        absent = 0
        events = self._source.iter_events(session_id=given.session_id)
        for some in _portions(events, CHUNK_ROWS):
            absent += len(self._target.missing(some))
        if absent:
            self._tell(f"{given.session_id}: {absent:,} of {given.events:,} events are missing")

    def _compare_messages(self, given: Tally) -> None:
        usages = self._source.get_usage(given.session_id)
        absent = 0
        for some in _portions(usages, CHUNK_ROWS):
            # It may count them to another session, which named them first.
            owners = self._target.owners_of([usage.message_id for usage in some])
            there = {
                one.message_id: one for owner in owners for one in self._target.get_usage(owner)
            }
            absent += sum(not _has_counts(there.get(one.message_id), one) for one in some)
        if absent:
            self._tell(f"{given.session_id}: {absent:,} of {len(usages):,} messages are missing")

    # --- Sessions ---------------------------------------------------------------------------------

    def _copy_sessions(self, ids: Sequence[str]) -> dict[str, SessionMeta]:
        """Save those that are due and not the same already; all that are due, as they were read."""
        found = self._read([*filter(self._is_due, ids)])
        there = self._target.sessions_of([one for one in found if self._is_saved_there(one)])
        own = [found[session_id] for session_id in ids if session_id in found]
        self._saved += self._save(
            [session for session in own if self._is_to_save(session, there.get(session.session_id))]
        )
        return found

    def _is_to_save(self, own: SessionMeta, copied: SessionMeta | None) -> bool:
        if copied is None or self._to_set(own, copied):
            return True
        return not set(own.child_session_ids).issubset(copied.child_session_ids)

    def _read(self, ids: Sequence[str]) -> dict[str, SessionMeta]:
        """Sessions of the source, without totals that are the sums over their messages.

        Some of these may count to another session in the target: its ledger alone decides.
        """
        found = self._source.sessions_of(ids)
        for session_id, session in found.items():
            if self._given[session_id].messages:
                found[session_id] = replace(session, token_usage=TokenUsage())
        return found

    def _save(self, sessions: Sequence[SessionMeta]) -> int:
        try:
            return self._target.save_sessions(sessions)
        except InvalidBatch as error:
            for refusal in error.refused:
                self._tell(f"{refusal.id}: {refusal.reason}")
            bad = {refusal.index for refusal in error.refused}
            good = [session for index, session in enumerate(sessions) if index not in bad]
            return self._target.save_sessions(good)

    def _is_due(self, session_id: str) -> bool:
        """Whether somebody has saved the session, and the target has no later change of it."""
        if self._given[session_id].known_from != "session":
            return False
        return not self._is_saved_there(session_id) or not self._is_later_there(session_id)

    def _is_saved_there(self, session_id: str) -> bool:
        there = self._there.get(session_id)
        return there is not None and there.known_from == "session"

    def _is_later_there(self, session_id: str) -> bool:
        """Whether the target's session was changed after the source's without any doubt."""
        given, there = self._given[session_id], self._there[session_id]
        return there.updated_at - self._ahead - given.updated_at > self._doubt

    def _copy_messages(self, session_id: str) -> None:
        given = self._given[session_id]
        if not given.messages or _messages_of(self._there.get(session_id)) == _messages_of(given):
            return
        try:
            usages = self._source.get_usage(session_id)
            self._counted += self._target.save_usage(session_id, usages)
        except InvalidRecord as error:  # of a row that something else has written
            self._tell(f"{session_id}: {error}")
        except SessionNotFound:
            pass  # deleted in the target, or at this moment in the source

    def _settle(self, ids: Sequence[str], saved: dict[str, SessionMeta]) -> dict[str, SessionMeta]:
        """Set what saving leaves: what is empty by now, and all of sessions that nobody saved.

        Returns the source's sessions that were written so, as they were read.
        """
        due = [session_id for session_id in ids if self._is_to_settle(session_id)]
        own = saved | self._read([one for one in due if one not in saved])
        self._saved += self._settle_all(own)
        return own

    def _catch_up(self, written: dict[str, SessionMeta]) -> None:
        """Write what has changed in the source since it was read, until nothing has.

        What the target has would be the later change, for every copy to come.
        """
        self._written.update(written)
        for _ in range(_ROUNDS):
            now = self._read([*written])
            written = {one: session for one, session in now.items() if session != written[one]}
            if not written:
                return
            self._save([session for one, session in written.items() if self._is_due(one)])
            self._settle_all(written)

    def _settle_all(self, own: dict[str, SessionMeta]) -> int:
        copied = self._target.sessions_of([*own])
        return sum(self._settle_one(session, copied.get(one)) for one, session in own.items())

    def _is_to_settle(self, session_id: str) -> bool:
        if self._given[session_id].known_from == "reference":
            return False
        return not self._is_saved_there(session_id) or self._is_due(session_id)

    def _settle_one(self, own: SessionMeta, copied: SessionMeta | None) -> bool:
        """Set the rest of a session; whether it was new, and not made by saving it before."""
        session_id = own.session_id
        try:
            if copied is None:
                # Without events nothing has made it yet; or it was deleted in the target.
                return self._target.save_session(own)
            if fields := self._to_set(own, copied):
                self._target.update_session(session_id, **fields)
        except InvalidRecord as error:
            self._tell(f"{session_id}: {error}")
        except SessionNotFound:
            pass  # deleted in the target at this moment
        is_new = copied is not None and session_id not in self._there
        return is_new and self._given[session_id].known_from == "event"

    def _to_set(self, own: SessionMeta, copied: SessionMeta) -> dict[str, Any]:
        """What the target's session lacks, or has otherwise, where the source's decides."""
        given, there = self._given[own.session_id], self._there.get(own.session_id)
        fields = _differences(own, copied)
        if there is not None and there.messages:
            fields.pop("token_usage", None)  # its ledger decides
        if there is not None and given.known_from == "event":
            kept = fields if self._is_later_there(own.session_id) else _OF_EVENTS
            fields = {
                name: value
                for name, value in fields.items()
                if name not in kept or _is_empty(copied, name)
            }
        return fields

    def _compare_sessions(self, ids: Sequence[str]) -> None:
        own, copied = self._read(ids), self._target.sessions_of(ids)
        for session_id in ids:
            if session_id in own and session_id in copied:
                fields = self._to_set(own[session_id], copied[session_id])
                if fields:
                    self._tell(f"{session_id}: the session differs in {', '.join(fields)}")

    def _tell(self, problem: str) -> None:
        self._problem_count += 1
        if len(self._problems) < PROBLEMS_SHOWN:
            self._problems.append(problem[:_REASON])


def _clocks(source: BaseStore, target: BaseStore) -> tuple[int, int]:
    """How far the target's clock is ahead, and by how much two changes may seem to be exchanged.

    Milliseconds, both. What changes a session is dated from before it waits for its locks: as long
    as a store lets it, and not this one, which may be patient for counting.
    """
    before, there, after = source.clock(), target.clock(), source.clock()
    wait = milliseconds(STATEMENT_TIMEOUT + LOCK_TIMEOUT)
    return there - (before + after) // 2, wait + after - before


def _events_of(tally: Tally | None) -> tuple[int, int]:
    return (tally.events, tally.event_times) if tally else (0, 0)


def _messages_of(tally: Tally | None) -> tuple[int, int]:
    return (tally.messages, tally.tokens) if tally else (0, 0)


def _has_counts(there: MessageUsage | None, given: MessageUsage) -> bool:
    return there is not None and all(map(ge, there.counts, given.counts))


#: Children are added by saving, and those that say so themselves are found.
_SETTLED = [name for name in SESSION_CHECKS if name not in ("session_id", "child_session_ids")]
#: What events tell of their session if nobody has saved it: as they do in the target.
_OF_EVENTS = ("machine_id", "working_directory", "start_time", "parent_session_id")
_NOTHING = SessionMeta(
    session_id="",
    machine_id="",
    working_directory="",
    start_time=0,
    is_user_initiated=True,
    is_pinned=False,
    hidden=False,
)


def _differences(given: SessionMeta, there: SessionMeta) -> dict[str, Any]:
    fields = {name: getattr(given, name) for name in _SETTLED}
    return {name: value for name, value in fields.items() if value != getattr(there, name)}


def _is_empty(session: SessionMeta, name: str) -> bool:
    return bool(getattr(session, name) == getattr(_NOTHING, name))


def _portions(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while portion := list(islice(iterator, size)):
        yield portion
