"""The long form: a year of the largest deployment, partitioned by month, kept, read and pruned.

It ends now. With fewer events than YEAR_EVENTS it is the same year, but thinner.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from contextuate_persist.bench import load
from contextuate_persist.bench.load import Load
from contextuate_persist.bench.measure import Latency, batches_of, latencies, seconds
from contextuate_persist.bench.suite import BATCH, BEFORE, Suite
from contextuate_persist.model import MonitorEvent
from contextuate_persist.retention import DAY, RetentionPolicy, drop_partitions, prune

DAYS = 365
#: What 500 sessions of 100 events a day make in a year.
YEAR_EVENTS = 50_000 * DAYS
#: Retention keeps about so much of it.
KEPT_DAYS = 90
# Sessions that run side by side are over in a week at most: then most of a month is due as a whole.
_SESSION_DAYS = 7
_PARTS = 12
_MEASURED_EVERY = 3  # parts
_WARM_UP = 10  # calls
_SAMPLE = 200


@dataclass
class Year(Suite):
    """One year on one server; `run` fills `figures` and `curves`. It needs the owner's account.

    Nothing is measured of what is not proved: RuntimeError is raised if an event is missing, or if
    one is left that should be gone.
    """

    def _make_load(self) -> Load:
        self._now = time.time_ns() // 1_000_000
        events = self.scale.events
        at_once = events * _SESSION_DAYS // DAYS
        return Load(
            start=self._now - DAYS * DAY,
            events_per_second=events / (DAYS * 86_400),
            session_events=max(10, min(load.SESSION_EVENTS, at_once // load.CONCURRENT_SESSIONS)),
        )

    def run(self) -> None:
        self.tell(f"{self.store.backend}: year")
        self._partition()
        self._fill()
        self._prune()

    def bytes_per_event(self) -> float:
        """Store the events without measuring anything else; what each takes of the last two thirds.

        The first ones pay for what every partition takes, however little is in it.
        """
        self._partition()
        self._store(self.scale.events // 3 - self._stored)
        first, size = self._stored, self._size()
        self._store(self.scale.events - first)
        return (self._size() - size) / (self._stored - first)

    # --- Filling ----------------------------------------------------------------------------------

    def _partition(self) -> None:
        """Make the months from that of the first event on: so it has to be there."""
        self._store(1)
        self.store.partition_events("month")
        self.store.discard_unpartitioned()

    def _fill(self) -> None:
        """All events in batches, and at each quarter what single calls take."""
        events = self.scale.events
        self._figure(
            "year", "events kept", events, "", f"of {YEAR_EVENTS:,} in a year of 50,000 a day"
        )
        calls = self.scale.calls
        # So that each connection of the pool has prepared the statement.
        warm_up = min(8 * self.store.pool_size, calls)
        rates: list[float] = []
        saving, begun = 0.0, time.perf_counter()
        for part in range(1, _PARTS + 1):
            measured = part % _MEASURED_EVERY == 0
            until = events * part // _PARTS - (warm_up + calls if measured else 0)
            count = until - self._stored
            taken = self._store(count)
            saving += taken
            rates.append(count / taken)
            self._point("events a second", self._stored, rates[-1])
            self.tell(f"    at {self._stored:,} events: {rates[-1]:,.0f} a second")
            if measured:
                self._measure(calls, warm_up)
        # The condition lets MySQL count in an index; without one it reads all rows of the table.
        count = self.bare.fetch("SELECT COUNT(*) FROM events WHERE timestamp > 0")[0][0]
        if count != events:
            raise RuntimeError(f"the year has {count:,} events, not {events:,}")
        self._figure(
            "year",
            "hours for all of it",
            (time.perf_counter() - begun) / 3600,
            "h",
            f"{saving / 3600:.2f} of them in save_events of 1000",
        )
        self._figure("year", "events a second, first twelfth", rates[0], "1/s")
        self._figure("year", "events a second, last twelfth", rates[-1], "1/s")
        ratio = rates[-1] / rates[0]
        self._figure("year", "events a second, last twelfth / first twelfth", ratio, "x")
        note = f"sessions, event_ids and indexes in it; {len(self.store.partitions())} partitions"
        self._figure("year", "bytes per event", self._size() / events, "B", note)

    def _store(self, count: int) -> float:
        """The next events of the year, their sessions before them; seconds of saving events.

        They are made in between, in this process: a tenth of the time. From another process they
        would come as pickles, and to read those takes as long as to make the events.
        """
        first, self._stored = self._stored, self._stored + count
        self.store.save_sessions(self._load.sessions(first, count, now=self._now))
        return sum(
            seconds(lambda: self._save(batch))  # noqa: B023
            for batch in batches_of(self._load.iter_events(first, count), BATCH)
        )

    def _measure(self, calls: int, warm_up: int) -> None:
        """Single calls at this size; at the last of them figures, before that points of curves."""
        store = self.store
        # A year takes a year to come, not an hour.
        self.bare.settle()
        first, self._stored = self._stored, self._stored + warm_up + calls
        store.save_sessions(self._load.sessions(first, warm_up + calls, now=self._now))
        events = self._load.events(first, warm_up + calls)
        sessions = [self._any_session(self._stored) for _ in range(_WARM_UP + calls)]
        # Not those that were just updated: they are in memory.
        others = [self._any_session(self._stored) for _ in range(_WARM_UP + calls)]
        work: dict[str, tuple[Callable[[int], object], int]] = {
            "save_event": (lambda i: self._save_one(events[i]), warm_up),
            "update_session": (
                lambda i: store.update_session(sessions[i], label=f"label {i}"),
                _WARM_UP,
            ),
            "get_session": (lambda i: store.get_session(others[i]), _WARM_UP),
            "last 100 events": (lambda i: store.get_events(sessions[i], limit=100), _WARM_UP),
            "recent 100 events": (lambda _: store.get_all_recent_events(100), _WARM_UP),
            "last 100 events of a tool": (
                lambda i: store.find_events(tool_name=load.TOOLS[i % 9], limit=100),
                _WARM_UP,
            ),
        }
        for name, (call, before) in work.items():
            found = latencies({"store": call}, calls=calls, warm_up=before)["store"]
            self._point(f"{name}, p50 in ms", self._stored, found.p50)
            self._point(f"{name}, p95 in ms", self._stored, found.p95)
            if self._stored == self.scale.events:
                self._tell_latency(name, found)

    def _save_one(self, event: MonitorEvent) -> None:
        if not self.store.save_event(event):
            raise RuntimeError(f"the store knows event {event.id} already")

    def _tell_latency(self, name: str, found: Latency) -> None:
        self._latency("year", name, found)
        if self._stored < YEAR_EVENTS:
            points = self.curves[f"{name}, p95 in ms"]
            self._figure(
                "year",
                f"{name}, p95 extrapolated to {YEAR_EVENTS:,}",
                extrapolated(points, YEAR_EVENTS),
                "ms",
                "a line over the logarithm of the events, and no less than measured",
            )

    def _size(self) -> int:
        for table in ("events", "event_ids", "sessions"):
            self.store.refresh_statistics(table)  # MySQL tells sizes by them
        return self.store.size()

    # --- Pruning ----------------------------------------------------------------------------------

    def _prune(self) -> None:
        """Drop the months that are due, then the sessions that are left of what is due."""
        events, step = self.scale.events, self._load.round
        # Retention goes by whole sessions. None ends in the middle of those that run side by side,
        # so that what is due stays so while time goes on.
        due = events * (DAYS - KEPT_DAYS) // DAYS // step * step
        policy = self._policy((self._load.time_of(due) + self._load.time_of(due + step)) // 2)
        sessions = [self._any_session(events, first=due + step) for _ in range(64)]
        self._behind = batches_of(self._load.iter_events(events, YEAR_EVENTS), 10)
        size = self._size()
        self._figure("year", "bytes before pruning", size, "B")
        self.bare.settle()
        with self._counted_traffic(sessions) as before:
            time.sleep(BEFORE * self.scale.seconds)
        for call, was in before.items():
            self._figure("year", f"{call}, p95 before", was.p95, "ms")

        removed = self._drop(policy, sessions, before)
        self._prune_rest(policy, sessions, before, due - removed)
        self._prove(due)
        size = self._size()
        self._figure("year", "bytes after pruning", size, "B", f"{self._stored - due:,} events")

    def _drop(
        self, policy: RetentionPolicy, sessions: list[str], before: dict[str, Latency]
    ) -> int:
        """Drop the months whose sessions are all due; how many events went."""
        with self._counted_traffic(sessions) as during:
            start = time.perf_counter()
            dropped = drop_partitions(self.store, policy)
            taken = time.perf_counter() - start
        if not dropped.partitions:
            raise RuntimeError(f"no partition was dropped, of {dropped.kept} that are old enough")
        removed = self._stored - self._count("event_ids")
        count = len(dropped.partitions)
        note = f"{count} partitions, {dropped.sessions:,} sessions, {removed:,} events"
        self._figure("year", "drop_partitions: seconds", taken, "s", note)
        self._figure("year", "drop_partitions: ms a partition", taken * 1000 / count, "ms")
        self._figure("year", "drop_partitions: events removed a second", removed / taken, "1/s")
        wait = dropped.longest_wait_ms
        self._figure("year", "drop_partitions: longest wait of a writer", wait, "ms")
        self._meanwhile("year", "drop_partitions", during, before, "while dropping partitions")
        return removed

    def _prune_rest(
        self,
        policy: RetentionPolicy,
        sessions: list[str],
        before: dict[str, Latency],
        due: int,
    ) -> None:
        """Prune the sessions that are due in a month that stays: so many events."""
        with self._counted_traffic(sessions) as during:
            start = time.perf_counter()
            report = prune(self.store, policy)
            taken = time.perf_counter() - start
        if report.events != due:
            raise RuntimeError(f"prune tells of {report.events:,} events, not {due:,}")
        note = f"{report.sessions:,} sessions, {report.events:,} events of a month that stays"
        self._figure("year", "prune: seconds", taken, "s", note)
        self._meanwhile("year", "prune", during, before, "while pruning")

    @contextmanager
    def _counted_traffic(self, sessions: list[str]) -> Iterator[dict[str, Latency]]:
        """A writer goes on behind the year, where the one before it ended."""
        with self._traffic(sessions, self._behind) as found:
            yield found
        self._stored += 10 * len(found["save_events of 10"].times)

    def _count(self, table: str) -> int:
        return int(self.bare.fetch(f"SELECT COUNT(*) FROM {table}")[0][0])

    def _prove(self, first: int) -> None:
        """Whether all events from a position on are left, and no others: of them and their ids."""
        numbers = Counter(map(self._load.session_number, range(first, self._stored)))
        stay = sorted((load.session_id(number), count) for number, count in numbers.items())
        rows = self.bare.fetch(
            "SELECT e.session_id, COUNT(*), COUNT(i.id) FROM events AS e LEFT JOIN event_ids AS i "
            "ON i.id = e.id AND i.seq = e.seq AND i.timestamp = e.timestamp GROUP BY e.session_id"
        )
        left = [sorted((row[0], row[at]) for row in rows) for at in (1, 2)]
        ids = self._count("event_ids")
        if left != [stay, stay] or ids != self._stored - first:
            counts = [sum(count for _, count in one) for one in left]
            raise RuntimeError(
                f"of {self._stored - first:,} events that stay {counts[0]:,} are left, "
                f"{counts[1]:,} with their ids, of which there are {ids:,}"
            )
        for start, end in ((0, first), (first, self._stored)):
            for _ in range(_SAMPLE):
                position = self._random.randrange(start, end)
                [event] = self._load.events(position, 1)
                stored = self.store.get_event_by_id(event.session_id, event.id)
                if stored != (event if position >= first else None):
                    raise RuntimeError(f"event {event.id} of position {position:,} is not right")


def extrapolated(points: Sequence[tuple[float, float]], events: float) -> float:
    """A time at more events: the line nearest to the points, over the logarithm of the events.

    An index grows so; what a cache that is too small misses grows ever more slowly. Never less than
    the last that was measured.
    """
    logs = [math.log(at) for at, _ in points]
    times = [taken for _, taken in points]
    middle, mean = sum(logs) / len(logs), sum(times) / len(times)
    slope = sum((x - middle) * (y - mean) for x, y in zip(logs, times, strict=True))
    slope /= sum((x - middle) ** 2 for x in logs)
    return max(times[-1], mean + slope * (math.log(events) - middle))
