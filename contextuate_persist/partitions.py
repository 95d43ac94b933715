"""Partitions of events by time: their calendar, and the steps that make, add and drop them.

The SQL is the stores' own: here it is a PartitionSession. Every step can be killed: what it has
done is found again by the same command.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from contextuate_persist import trees
from contextuate_persist.errors import ConfigurationError, SchemaError
from contextuate_persist.records import Due

T = TypeVar("T")
#: What single events must not be changed or deleted during: tables beside would still have them.
HALF_WAY = (
    "partitions of events are being made or dropped: wait for `contextuate-persist partition`, "
    "prune or maintain, or run it again if it was interrupted"
)
#: What a conversion copies the events to, until it takes their place.
COPIES = "events_partitioned"
#: What a conversion leaves aside, until it is discarded.
UNPARTITIONED = "events_unpartitioned"
#: A partition that is being dropped: sessions that stay get their events back from it.
RETIRED = "events_retired"
#: How long a partition is; weeks begin on Monday, everything in UTC.
Unit: TypeAlias = Literal["month", "week", "day"]

#: Coming partitions: more than a month of them, since `maintain monthly` adds to them. For so long
#: it may fail, and every event is still where it belongs.
AHEAD: dict[str, int] = {"month": 3, "week": 10, "day": 75}
#: How far back a conversion makes partitions; what is older shares one.
_BACK: dict[str, int] = {"month": 60, "week": 104, "day": 92}
#: Names, behind `events_` or `p_`, of what lies before the first partition and beyond the last.
OLDER, REST = "older", "rest"

# Small enough that a session's delete waits for no chunk longer than a moment.
_CHUNK_ROWS = 2000
# What is left for the last step, while writers wait: a few hundredths of a second.
_FEW_ROWS = 500
_MOST_ROUNDS = 50
_NONE = Due(0)  # nothing is older
_PATIENCE_SECONDS = 300.0
# Whoever comes while a lock is asked for waits behind that: five sixths of the time are theirs.
_PAUSE_PER_TRY = 5
# For a try that has mostly done what stops nobody, as making an index.
_LONGEST_PAUSE_SECONDS = 60.0
_BATCH_SESSIONS = 200
_BATCH_IDS = 5000


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of events: from `start` to before `end`, Unix milliseconds; None is no bound.

    The first, for what is older, has no start, and the last, for the rest, no end. `rows` is the
    server's estimate.
    """

    name: str
    start: int | None
    end: int | None
    rows: int
    bytes: int


class Span(NamedTuple):
    """The bounds of a partition that is to be made."""

    start: int
    end: int

    @property
    def suffix(self) -> str:
        """Its first day, which names it."""
        return f"{_moment(self.start):%Y%m%d}"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `partition_events` did."""

    converted: bool  # False: events was partitioned already
    by: Unit
    added: tuple[str, ...]  # partitions
    copied: int  # events, by this run
    longest_wait_ms: float  # that a writer may have had to wait, measured


@dataclass(frozen=True, slots=True)
class Dropped:
    """What `drop_partitions` did."""

    partitions: tuple[str, ...]
    kept: dict[str, int]  # old enough, but with so many sessions that are not due
    sessions: int
    longest_wait_ms: float


class PartitionSession(Protocol):
    """A connection of the owner that holds the schema lock, for partitions of events.

    While a conversion runs, the new tables stand beside the old one under names of their own.
    """

    place: str
    longest_wait: float  # seconds that locks which stop writers were asked for and held

    def passing(self, error: Exception) -> bool:
        """Whether trying again may help: a lock was not free, a deadlock was undone."""
        ...

    def is_partitioned(self) -> bool: ...
    def read_partitions(self, *, aside: bool = False) -> list[Partition]:
        """Of events, or of the table that is being filled: by time, the rest last."""
        ...

    def first_event(self) -> int | None:
        """The time of the oldest event."""
        ...

    def attached(self) -> list[str]:
        """What others made for the table of events, or in it, that the new one would not have."""
        ...

    def prepare(self, spans: Sequence[Span]) -> None:
        """Create the new tables aside, all or nothing or again; tell the session what to watch."""
        ...

    def copied(self) -> int:
        """The seq up to which events were copied."""
        ...

    def watermark(self) -> int:
        """A seq up to which nobody is still storing; waits for who does."""
        ...

    def copy(self, after: int, upto: int, rows: int) -> tuple[int, int]:
        """Copy the next events in one transaction: how many, and the last one's seq."""
        ...

    def refresh(self) -> None:
        """Give the planner its statistics of the new tables."""
        ...

    def compare(self, upto: int) -> list[tuple[str, int, int]]:
        """Sessions with another number of events in the new table: id, old, new; in a snapshot."""
        ...

    def purge(self, ids: Sequence[str]) -> None:
        """Remove from the new tables what these sessions do not have any more."""
        ...

    def switch(self, after: int) -> int:
        """Lock writers out, copy and remove what is left, swap the tables; how many were copied."""
        ...

    def record_layout(self) -> None:
        """Say in schema_version what the layout is, and nothing else."""
        ...

    def tidy(self) -> None:
        """Drop what was replaced by adding or retiring a partition."""
        ...

    def add(self, spans: Sequence[Span]) -> None:
        """Add partitions behind the last, taking their events out of the rest."""
        ...

    def sessions_of(self, partition: str | None) -> list[str]:
        """The sessions that have events in a partition; None: in the one that was taken out."""
        ...

    def prunable(self, due: Due) -> dict[str, str | None]:
        """What may be pruned, by id, with the effective parents: whole trees."""
        ...

    def newest_retired(self) -> int | None:
        """When the last event happened that was taken out; -1 for none, None without the table."""
        ...

    def is_needed(self, partition: Partition) -> bool:
        """Whether there has to be a partition for its time, be it an empty one."""
        ...

    def retire(self, partition: Partition) -> None:
        """Take its events out, as a table of their own, and itself unless needed; in a moment."""
        ...

    def free_retired(self) -> None:
        """Have its events stay when their sessions are deleted: they go with their table."""
        ...

    def settle(self, ids: Sequence[str], due: Due) -> int:
        """Delete the sessions that are due; to those that are not give their events back."""
        ...

    def forget_ids(self, after: Any, rows: int) -> Any:
        """Remove the ids of the next of the events taken out; where to go on, or None."""
        ...

    def drop_retired(self) -> None: ...
    def unpartitioned_only(self) -> int | None:
        """How many events only the old table has; None without that table."""
        ...

    def drop_unpartitioned(self) -> None: ...


# --- The calendar ---------------------------------------------------------------------------------


def _moment(ms: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(milliseconds=ms)


def _milliseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(milliseconds=1)


def period(by: Unit, ms: int) -> Span:
    """The month, week or day that a time lies in."""
    day = _moment(ms).replace(hour=0, minute=0, second=0, microsecond=0)
    if by == "day":
        return Span(_milliseconds(day), _milliseconds(day + timedelta(days=1)))
    if by == "week":
        day -= timedelta(days=day.weekday())
        return Span(_milliseconds(day), _milliseconds(day + timedelta(days=7)))
    day = day.replace(day=1)
    following = (day + timedelta(days=31)).replace(day=1)
    return Span(_milliseconds(day), _milliseconds(following))


def periods(by: Unit, first: int, last: int) -> list[Span]:
    """All periods from that of one time to that of another; none if the second is earlier."""
    spans: list[Span] = []
    span = period(by, first)
    while span.start <= last:
        spans.append(span)
        span = period(by, span.end)
    return spans


def coming(by: Unit, now: int, ahead: int) -> int:
    """A time in the last of so many periods after the present one."""
    span = period(by, now)
    for _ in range(ahead):
        span = period(by, span.end)
    return span.start


def unit_of(partitions: Sequence[Partition]) -> Unit | None:
    """By what the partitions were made; None if there are only the two that always are."""
    for one in reversed(partitions):
        suffix = one.name[-8:]
        if one.end is None or not suffix.isdigit():
            continue
        # Not by its start: on MySQL that sinks when what lies before it is dropped.
        day = datetime.strptime(suffix, "%Y%m%d").replace(tzinfo=timezone.utc)
        days = (one.end - _milliseconds(day)) // 86_400_000
        return "day" if days == 1 else "week" if days == 7 else "month"
    return None


def _now() -> int:
    return time.time_ns() // 1_000_000


# --- Converting -----------------------------------------------------------------------------------


def convert(
    session: PartitionSession,
    by: Unit | None,
    ahead: int | None,
    progress: Callable[[int, int], None] | None,
) -> Conversion:
    """Make events a partitioned table, or add what is missing to one; see partition_events."""
    if session.is_partitioned():
        present = unit_of(session.read_partitions()) or by or "month"
        _refuse_another(session, by, present, "is partitioned")
        session.record_layout()
        return Conversion(
            converted=False,
            by=present,
            added=tuple(extend(session, ahead)),
            copied=0,
            longest_wait_ms=session.longest_wait * 1000,
        )
    begun = unit_of(session.read_partitions(aside=True))
    if begun:
        _refuse_another(session, by, begun, "is half-way to being partitioned")
    by = begun or by or "month"
    _refuse_attached(session)
    _patiently(session, partial(session.prepare, _first_spans(session, by, ahead)))
    copied = _copy(session, progress)
    session.refresh()
    after, rows = _verify(session)
    copied += rows
    _refuse_attached(session)  # again, for copying takes long
    copied += _patiently(session, partial(session.switch, after))
    # What was prepared may be old by now, if this run goes on where another was killed.
    extend(session, ahead)
    return Conversion(
        converted=True,
        by=by,
        added=tuple(one.name for one in session.read_partitions()),
        copied=copied,
        longest_wait_ms=session.longest_wait * 1000,
    )


def _refuse_another(session: PartitionSession, by: str | None, present: str, how: str) -> None:
    if by not in (None, present):
        raise ConfigurationError(
            f"{session.place}: events {how} by {present}, not by {by}: leave --by out"
        )


def _refuse_attached(session: PartitionSession) -> None:
    if found := session.attached():
        raise ConfigurationError(
            f"{session.place}: what others made for events would stay with the old table: "
            f"{', '.join(found)}; drop it (what a column holds, save first), partition, and make "
            "it again on the new table"
        )


def _first_spans(session: PartitionSession, by: Unit, ahead: int | None) -> list[Span]:
    now = _now()
    earliest = period(by, now)
    first = session.first_event()
    for _ in range(_BACK[by]):
        if first is None or first >= earliest.start:
            break
        earliest = period(by, earliest.start - 1)
    return periods(by, earliest.start, coming(by, now, AHEAD[by] if ahead is None else ahead))


def _copy(session: PartitionSession, progress: Callable[[int, int], None] | None) -> int:
    """Copy while writers go on, until little is left; how many events."""
    copied = 0
    after = session.copied()
    for _ in range(_MOST_ROUNDS):
        upto = _patiently(session, session.watermark)
        rows = _copy_round(session, after, upto, progress)
        copied += rows
        after = upto
        if rows < _FEW_ROWS:
            break
    return copied


def _copy_round(
    session: PartitionSession,
    after: int,
    upto: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    copied = 0
    while after < upto:
        rows, after = _patiently(session, partial(session.copy, after, upto, _CHUNK_ROWS))
        copied += rows
        if progress is not None:
            progress(after, upto)
    return copied


def _verify(session: PartitionSession) -> tuple[int, int]:
    """Compare both tables, remove what was deleted meanwhile, and copy what has come since.

    Outside of the last step, in which writers wait: that has to look only at what happened later.
    Returns the seq up to which all is copied, and how many events this has added.
    """
    upto = session.copied()
    if surplus := _differing(session, upto):
        for start in range(0, len(surplus), _BATCH_SESSIONS):
            batch = surplus[start : start + _BATCH_SESSIONS]
            _patiently(session, partial(session.purge, batch))
        _differing(session, upto)
    rows, after = 0, upto
    for _ in range(_MOST_ROUNDS):
        upto = _patiently(session, session.watermark)
        more = _copy_round(session, after, upto)
        rows, after = rows + more, upto
        if more < _FEW_ROWS:
            break
    return after, rows


def _differing(session: PartitionSession, upto: int) -> list[str]:
    """The sessions of which more was copied than is left."""
    surplus: list[str] = []
    for session_id, old, new in session.compare(upto):
        if new < old:
            raise SchemaError(
                f"{session.place}: {old - new} events of session {session_id} are missing from the "
                "copy, and nothing was changed: drop events_partitioned and its ids, and try again"
            )
        surplus.append(session_id)
    return surplus


def _patiently(session: PartitionSession, work: Callable[[], T]) -> T:
    """Do the work; again and again while others hold its locks, each time asked for a moment."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        begun = time.monotonic()
        try:
            return work()
        except Exception as error:
            if not session.passing(error) or time.monotonic() > deadline:
                raise
        pause = min(_PAUSE_PER_TRY * (time.monotonic() - begun), _LONGEST_PAUSE_SECONDS)
        time.sleep(max(pause, random.uniform(0.1, 0.6)))  # noqa: S311


# --- Adding and dropping --------------------------------------------------------------------------


def require(session: PartitionSession) -> None:
    """Raise ConfigurationError unless events is partitioned."""
    if not session.is_partitioned():
        raise ConfigurationError(
            f"{session.place}: events is not partitioned: run `contextuate-persist partition`"
        )


def extend(session: PartitionSession, ahead: int | None) -> list[str]:
    """Add the partitions that are missing up to so many after the present one; their names."""
    require(session)
    if session.newest_retired() is not None:  # of a drop that was killed: only the next deletes
        _finish(session, {}, _NONE)
    partitions = session.read_partitions()
    by = unit_of(partitions) or "month"
    now = _now()
    ends = [one.end for one in partitions if one.end is not None]
    first = max(ends, default=period(by, now).start)
    spans = periods(by, first, coming(by, now, AHEAD[by] if ahead is None else ahead))
    if spans:
        _patiently(session, session.tidy)  # of a run that was killed
        _patiently(session, partial(session.add, spans))
    try:
        session.tidy()
    except Exception as error:
        # As long as somebody reads, a backup perhaps: the next run does it.
        if not session.passing(error):
            raise
    before = {one.name for one in partitions}
    return [one.name for one in session.read_partitions() if one.name not in before]


def drop(session: PartitionSession, due: Due, *, empty: bool) -> Dropped:
    """Drop what is over and due; see drop_partitions."""
    require(session)
    sessions = 0
    dropped: list[str] = []
    kept: dict[str, int] = {}
    bounds = _NONE if empty else due
    # Of a run that was killed.
    _patiently(session, session.tidy)
    if (last := session.newest_retired()) is not None:
        # Taken out by bounds of its own: what these would keep gets its events back first, or its
        # last event would not be seen.
        own = bounds if last < bounds.older_than else _NONE
        sessions += _finish(session, _prunable(session, own), own)
    # Tombstones are dated now: they could not hold what is in the future away.
    limit = min(due.older_than, _now())
    prunable = _prunable(session, bounds)
    partitions = session.read_partitions()
    *_, newest, _ = partitions
    for partition in partitions:
        if partition.end is None or partition.end > limit:
            continue
        if partition is newest and partition.start is not None:
            continue  # it tells how long those to come are
        ids = session.sessions_of(partition.name)
        if not ids and session.is_needed(partition):
            continue
        if others := sum(session_id not in prunable for session_id in ids):
            kept[partition.name] = others
            continue
        _patiently(session, partial(session.retire, partition))
        sessions += _finish(session, prunable, bounds)
        dropped.append(partition.name)
    return Dropped(tuple(dropped), kept, sessions, session.longest_wait * 1000)


def _prunable(session: PartitionSession, due: Due) -> dict[str, str | None]:
    """Which sessions are due, by id, with the effective parents: a look at every session."""
    return {} if due == _NONE else session.prunable(due)


def _finish(session: PartitionSession, prunable: Mapping[str, str | None], due: Due) -> int:
    """Delete the sessions of the events that were taken out, then these; how many sessions.

    A session that is not due any more, for it was pinned or has gone on since it was `prunable`,
    gets its events back. Whole trees only, so that a tree is due or not as a whole.
    """
    _patiently(session, session.free_retired)
    _patiently(session, session.tidy)
    deleted = 0
    inside = set(session.sessions_of(None))
    batch: list[str] = []
    for tree in trees.linked_groups(prunable):
        if not inside.isdisjoint(tree):
            batch += tree
            inside.difference_update(tree)
        if len(batch) >= _BATCH_SESSIONS:
            deleted += _settle(session, batch, due)
            batch = []
    deleted += _settle(session, batch, due)
    for session_id in sorted(inside):
        # It only gets its events back; a transaction of its own, for there may be many thousands.
        _settle(session, [session_id], _NONE)
    place: Any = None
    while (
        place := _patiently(session, partial(session.forget_ids, place, _BATCH_IDS))
    ) is not None:
        pass
    _patiently(session, session.drop_retired)
    return deleted


def _settle(session: PartitionSession, ids: list[str], due: Due) -> int:
    return _patiently(session, partial(session.settle, sorted(ids), due)) if ids else 0


def discard(session: PartitionSession) -> bool:
    """Drop the old table; see discard_unpartitioned."""
    require(session)
    missing = session.unpartitioned_only()
    if missing is None:
        return False
    if missing:
        raise SchemaError(
            f"{session.place}: {missing:,} events are in events_unpartitioned only, it stays: "
            "move them to events, or drop the table by hand"
        )
    _patiently(session, session.drop_unpartitioned)
    return True
