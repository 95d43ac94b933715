"""What is measured, on one server: growth, reads, threads, single inserts, batches, retention."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from contextuate_persist.bench import load, writing
from contextuate_persist.bench.bare import Bare
from contextuate_persist.bench.load import Load
from contextuate_persist.bench.measure import (
    Figure,
    Goal,
    Latency,
    batches,
    batches_of,
    crowd,
    latencies,
    rates,
    seconds,
)
from contextuate_persist.model import MonitorEvent, SessionMeta, SessionStatus
from contextuate_persist.mysql_store import MySQLStore
from contextuate_persist.postgresql_store import PostgreSQLStore
from contextuate_persist.retention import DAY, RetentionPolicy, prune

BATCH = 1000
#: So many times as long as others is measured what traffic takes by itself: some hundred calls.
BEFORE = 5


def at_least(limit: float) -> Goal:
    return Goal(limit=limit, at_least=True)


def at_most(limit: float) -> Goal:
    return Goal(limit=limit, at_least=False)


#: What a figure has to reach, by its name: first on PostgreSQL, then on MySQL.
GOALS: dict[str, tuple[Goal, Goal]] = {
    "save_events of 1000 / limit": (at_least(0.85), at_least(0.70)),
    "save_events of 1000, 10% repeats / limit": (at_least(0.55), at_least(0.65)),
    "save_events of 1000 / SQLAlchemy Core": (at_least(1.5), at_least(1.4)),
    "save_events / original's limit, at the same size": (at_least(3), at_least(2)),
    "save_events of 1000, on top of all / into empty tables": (at_least(0.95), at_least(0.95)),
    "bytes per event / original's": (at_most(0.9), at_most(0.85)),
    "last 100, random sessions, time / original's": (at_most(0.85), at_most(0.3)),
    "last 1000 events, p50 / bare driver": (at_most(1.25), at_most(1.25)),
    "save_event, p50 / bare driver": (at_most(1.25), at_most(1.25)),
    "16 writers / 1": (at_least(1.9), at_least(2.8)),
    "get_session, p95": (at_most(5), at_most(5)),
    "last 100 events, p95": (at_most(8), at_most(10)),
    "recent 100 events, p95": (at_most(15), at_most(20)),
    "save_event, p95": (at_most(3), at_most(2)),
    "update_session, p95": (at_most(3), at_most(3)),
    "single inserts a second": (at_least(800), at_least(1000)),
    "put, p50": (at_most(20), at_most(20)),
    "put, p99": (at_most(200), at_most(200)),
    "put, database away, p50": (at_most(20), at_most(20)),
    "put, database away, p99": (at_most(200), at_most(200)),
    "writer / save_events of 1000": (at_least(0.7), at_least(0.7)),
    "queries a second": (at_least(3000), at_least(5000)),
    "save_events of 10 while pruning, p95 / before": (at_most(2), at_most(2)),
    "readers at once without an error": (at_least(200), at_least(100)),
}


class Rival(Protocol):
    """Something else that a user would store events with."""

    name: str

    def create(self) -> None: ...
    def save(self, events: list[MonitorEvent]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    events: int = 1_000_000  # stored in the end
    step: int = 100_000
    original: int = 700_000  # events in the original's tables
    rounds: int = 5
    blocks: int = 5  # batches in turn of each round
    calls: int = 300  # of each query
    seconds: float = 2.0  # for each number of threads
    pruned: int = 100_000

    @classmethod
    def of(cls, events: int) -> Scale:
        """The usual proportions for this many events."""
        part = max(2, min(10, events // 20_000))
        step = events // part // BATCH * BATCH or BATCH
        # With few events there is little to tell; with hardly any, only that everything works.
        rounds, blocks, calls, seconds = 5, 5, 300, 2.0
        if events < 100_000:
            rounds, calls, seconds = 3, 50, 0.5
        if events < 10_000:
            rounds, blocks, calls, seconds = 2, 1, 20, 0.1
        return cls(
            events=step * part,
            step=step,
            original=step * max(1, part * 7 // 10),
            rounds=rounds,
            blocks=blocks,
            calls=calls,
            seconds=seconds,
            pruned=step,
        )


@dataclass
class Suite:
    """One run on one server; `run` fills `figures` and `curves`."""

    store: PostgreSQLStore | MySQLStore
    bare: Bare
    #: Opens a store with empty tables in a place of its own on the same server.
    beginning: Callable[[], AbstractContextManager[tuple[PostgreSQLStore | MySQLStore, str]]]
    scale: Scale = field(default_factory=Scale)
    rivals: Sequence[Rival] = ()
    original: Bare | None = None
    tell: Callable[[str], None] = lambda _: None
    figures: list[Figure] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._load = self._make_load()
        self._random = random.Random(7)  # noqa: S311  (repeatable, not secret)
        self._stored = 0

    def _make_load(self) -> Load:
        return Load()

    def run(self) -> None:
        for chapter in (
            self.growth,
            # Before the pool has all its connections: a daemon's one caller needs but one.
            self.single,
            self.reads,
            self.threads,
            self.ingest,
            self.writing,
            self.retention,
        ):
            self.tell(f"{self.store.backend}: {chapter.__name__}")
            chapter()

    # --- Chapters ---------------------------------------------------------------------------------

    def growth(self) -> None:
        """From nothing to everything: do inserts, reads and bytes stay what they are?

        The original's tables grow first and alone: their random keys would keep the server's
        buffers busy while ours are measured. Side by side they are once they are equally large.
        """
        scale = self.scale
        if self.original is not None:
            for first in range(0, scale.original, scale.step):
                rate = scale.step / self._grow_original(self.original, first)
                self._point("events a second, original's schema", first + scale.step, rate)
        self.store.save_sessions(self._load.sessions(0, scale.events))
        ours: list[float] = []
        for first in range(0, scale.events, scale.step):
            taken = sum(
                seconds(lambda: self._save(batch))  # noqa: B023
                for batch in batches_of(self._load.iter_events(first, scale.step), BATCH)
            )
            ours.append(scale.step / taken)
            stored = first + scale.step
            read = Latency()
            for _ in range(min(scale.calls, 100)):
                session = self._any_session(stored)
                read.time(lambda: self.store.get_events(session, limit=100))  # noqa: B023
            self._point("events a second", stored, ours[-1])
            self._point("last 100 events, p95 in ms", stored, read.p95)
            if self.original is not None and stored == scale.original:
                self._compare_original(self.original, stored)
        self._stored = scale.events
        step = f"{scale.step:,} of {scale.events:,}"
        self._figure("growth", "events a second, first step", ours[0], "1/s", step)
        self._figure("growth", "events a second, last step", ours[-1], "1/s")
        self._compare_beginning()
        for name, size in self.bare.sizes().items():
            self._figure("growth", f"bytes per event: {name}", size / scale.events, "B")

    def reads(self) -> None:
        """Queries of the monitor against the bare driver, which fetches the same and decodes."""
        store, bare = self.store, self.bare
        sessions = [self._any_session(self._stored) for _ in range(64)]
        hot = sessions[0]
        events = [self._load.events(self._random.randrange(self._stored), 1)[0] for _ in range(64)]
        tree = self._tree(1000)
        pairs: list[tuple[str, Callable[[int], object], Callable[[int], object] | None, int]] = [
            (
                "get_session",
                lambda i: store.get_session(sessions[i % 64]),
                lambda i: bare.session(sessions[i % 64]),
                1,
            ),
            (
                "last 100 events, one session again and again",
                lambda _: store.get_events(hot, limit=100),
                lambda _: bare.last_events(hot, 100),
                1,
            ),
            (
                "last 100 events",
                lambda i: store.get_events(sessions[i % 64], limit=100),
                lambda i: bare.last_events(sessions[i % 64], 100),
                1,
            ),
            (
                "last 1000 events",
                lambda i: store.get_events(sessions[i % 8], limit=1000),
                lambda i: bare.last_events(sessions[i % 8], 1000),
                5,
            ),
            (
                "get_event_by_id",
                lambda i: store.get_event_by_id(events[i % 64].session_id, events[i % 64].id),
                lambda i: bare.event(events[i % 64].id),
                1,
            ),
            (
                "recent 100 events",
                lambda _: store.get_all_recent_events(100),
                lambda _: bare.recent_events(100),
                1,
            ),
            (
                "event_counts of a session",
                lambda i: store.event_counts(sessions[i % 64]),
                lambda i: bare.counts(sessions[i % 64]),
                1,
            ),
            ("event_counts of all", lambda _: store.event_counts(), lambda _: bare.counts(), 100),
            (
                "last 100 events of a tool",
                lambda i: store.find_events(tool_name=load.TOOLS[i % 9], limit=100),
                lambda i: bare.tool_events(load.TOOLS[i % 9], 100),
                1,
            ),
            (
                "100 sessions, newest first",
                lambda _: store.get_sessions(limit=100),
                lambda _: bare.newest_sessions(100),
                3,
            ),
            (
                "100 sessions and their event_counts",
                lambda _: [
                    store.event_counts(one.session_id) for one in store.get_sessions(limit=100)
                ],
                lambda _: bare.sessions_with_counts(100),
                20,
            ),
            ("session_tree of 1000", lambda _: store.session_tree(tree), None, 20),
        ]
        for name, ours, theirs, share in pairs:
            contenders = {"store": ours} | ({"bare": theirs} if theirs else {})
            calls = max(5, self.scale.calls // share)
            found = latencies(contenders, calls=calls, warm_up=min(10, calls))
            self._latency("reads", name, found["store"])
            if theirs:
                ratio = found["store"].p50 / found["bare"].p50
                self._figure("reads", f"{name}, p50 / bare driver", ratio, "x")

    def threads(self) -> None:
        """Readers through one store, more than it has connections."""
        sessions = [self._any_session(self._stored) for _ in range(256)]
        most, failed = 0, False
        for count in (8, 32, 100, 200):
            found = crowd(
                count,
                self.scale.seconds,
                lambda thread, number: self.store.get_events(
                    sessions[(thread * 31 + number) % 256], limit=100
                ),
            )
            name = f"{count} readers, last 100 events"
            note = f"{len(found.errors)} errors; calls of a thread {min(found.calls)}-" + str(
                max(found.calls)
            )
            self._figure("threads", f"{name}: a second", found.rate, "1/s", note)
            self._figure("threads", f"{name}: p95", found.latency.p95, "ms")
            failed = failed or bool(found.errors) or not min(found.calls)
            if not failed:
                most = count
        self._figure("threads", "readers at once without an error", most, "")
        found = crowd(
            8,
            self.scale.seconds,
            lambda thread, number: self.store.get_session(sessions[(thread + number) % 256]),
        )
        self._figure("threads", "queries a second", found.rate, "1/s", "8 threads, get_session")

    def single(self) -> None:
        """One durable event, alone and from many threads."""
        # So that the connection has prepared the statement, and the caches are warm.
        warm_up = 8 * self.store.pool_size
        events = self._more(2 * (warm_up + 2 * self.scale.calls))
        mine, theirs = events[::2], [self.bare.prepare_insert(one) for one in events[1::2]]
        found = latencies(
            {
                "store": lambda i: self.store.save_event(mine[i]),
                "bare": lambda i: self.bare.insert(theirs[i]),
            },
            calls=2 * self.scale.calls,
            warm_up=warm_up,
        )
        self._latency("single", "save_event", found["store"])
        self._latency("single", "the bare driver's INSERT", found["bare"])
        ratio = found["store"].p50 / found["bare"].p50
        self._figure("single", "save_event, p50 / bare driver", ratio, "x")
        self._figure(
            "single", "single inserts a second", 1000 / statistics.mean(found["store"].times), "1/s"
        )
        sessions = self._load.sessions(0, self._stored)[:64]
        update = Latency()
        for number in range(self.scale.calls):
            session = sessions[number % len(sessions)].session_id
            update.time(
                lambda: self.store.update_session(session, label=f"label {number}")  # noqa: B023
            )
        self._latency("single", "update_session", update)
        reached: dict[int, float] = {}
        for count in (1, 4, 16, 64):
            # As many as a thread could ever store in this time.
            each = int(self.scale.seconds * 12_000 / count) + 50
            work = [self._more(each) for _ in range(count)]
            some = crowd(
                count,
                self.scale.seconds,
                lambda thread, number: self.store.save_event(work[thread][number]),  # noqa: B023
            )
            reached[count] = some.rate
            plural = "s" if count > 1 else ""
            note = f"{len(some.errors)} errors" if some.errors else ""
            self._figure(
                "single", f"{count} writer{plural}: events a second", some.rate, "1/s", note
            )
            self._figure("single", f"{count} writer{plural}: p95", some.latency.p95, "ms")
        self._figure("single", "16 writers / 1", reached[16] / reached[1], "x")
        alone = self._bare_writers(1)
        self._figure("single", "bare driver, 1 writer: events a second", alone, "1/s")
        together = self._bare_writers(16) / alone
        self._figure("single", "bare driver, 16 writers / 1", together, "x")

    def ingest(self) -> None:
        """Batches, in turns with the server's limit and with what a user would write instead."""
        rounds, blocks = self.scale.rounds, self.scale.blocks
        events = blocks * BATCH

        def fresh(other: Load | None = None) -> list[list[list[MonitorEvent]]]:
            return [list(batches(self._more(events, other), BATCH)) for _ in range(rounds)]

        mine, mixed, seen = fresh(), fresh(), fresh()
        for batch in itertools.chain.from_iterable(seen):
            self.store.save_events(batch)
        repeated = [
            [[*batch[100:], *again[:100]] for batch, again in zip(*blocks, strict=True)]
            for blocks in zip(mixed, seen, strict=True)
        ]
        prepared = [[self.bare.prepare(batch) for batch in block] for block in fresh()]
        contenders: dict[str, Callable[[int], object]] = {
            self.bare.limit_name: lambda i: [self.bare.load(one) for one in prepared[i]],
            "save_events": lambda i: [self._save(one) for one in mine[i]],
            "save_events, 10% repeats": lambda i: [
                self._save(one, new=BATCH * 9 // 10) for one in repeated[i]
            ],
            "save_events, all repeats": lambda i: [self._save(one, new=0) for one in seen[i]],
        }
        # The driver of the rivals fails on the word DELIMITER, and then stores nothing.
        for rival in self.rivals:
            rival.create()
            work = fresh(Load("DELIMITED"))
            contenders[rival.name] = lambda i, r=rival, w=work: [r.save(one) for one in w[i]]  # type: ignore[misc]
        found = rates(contenders, rounds=rounds, events=events)
        found["save_events, 10% repeats"] *= 0.9  # only what was new counts
        limit = found[self.bare.limit_name]
        for name, rate in found.items():
            note = f"{rate / limit:.2f} of the limit"
            if "all repeats" in name:
                note = "events offered, none of them new"
            self._figure("ingest", f"{name}, batches of 1000", rate, "1/s", note)
        ours = found["save_events"]
        self._figure("ingest", "save_events of 1000 / limit", ours / limit, "x")
        self._figure(
            "ingest",
            "save_events of 1000, 10% repeats / limit",
            found["save_events, 10% repeats"] / limit,
            "x",
        )
        for rival in self.rivals:
            ratio = ours / found[rival.name]
            self._figure("ingest", f"save_events of 1000 / {rival.name}", ratio, "x")
            rival.close()
        for size in (1, 10, 100):
            few = [list(batches(self._more(size * 20), size)) for _ in range(rounds)]
            rate = rates(
                {"store": lambda i: [self._save(one) for one in few[i]]},  # noqa: B023
                rounds=rounds,
                events=size * 20,
            )["store"]
            self._figure("ingest", f"save_events, batches of {size}", rate, "1/s")

    def writing(self) -> None:
        """The writer: what a `put` costs its caller, and what reaches the database."""
        count = min(10_000, 40 * self.scale.calls)
        for spool in writing.SPOOLS:
            for away in (False, True):
                found = writing.put_times(self.store, spool, self._more(count), away=away)
                name = "put" + (", database away" if away else "")
                name += "" if spool == "always" else ", spool on failure"
                for percent in (50, 99):
                    value = found.percentile(percent) * 1000
                    self._figure("writing", f"{name}, p{percent}", value, "us")

        blocks = max(1, min(10, self.scale.step // BATCH))

        def fresh() -> list[list[MonitorEvent]]:
            return list(batches(self._more(blocks * BATCH), BATCH))

        reached = writing.end_to_end(self.store, fresh, self._save, rounds=self.scale.rounds)
        for spool in writing.SPOOLS:
            name = "writer" + ("" if spool == "always" else ", spool on failure")
            self._figure("writing", f"{name}: events a second", reached[spool], "1/s")
            ratio = reached[spool] / reached["save_events"]
            self._figure("writing", f"{name} / save_events of 1000", ratio, "x")

    def retention(self) -> None:
        """Old sessions go while a writer and a reader go on."""
        older = load.START + self.scale.pruned * 1000 // load.EVENTS_PER_SECOND
        sessions = [self._any_session(self._stored, first=self._stored // 2) for _ in range(64)]
        with self._traffic(sessions) as before:
            time.sleep(BEFORE * self.scale.seconds)
        # Half of what is due by `prune_old_sessions`, which knows no rest, half in small steps.
        middle = older - (older - load.START) // 2
        prunings: dict[str, Callable[[], int]] = {
            "prune_old_sessions": lambda: self.store.prune_old_sessions(middle),
            "prune": lambda: prune(self.store, self._policy(older)).sessions,
        }
        for pruning, work in prunings.items():
            with self._traffic(sessions) as during:
                start = time.perf_counter()
                pruned = work()
                taken = time.perf_counter() - start
            name = f"{pruning}: seconds for {pruned} sessions"
            self._figure("retention", name, taken, "s")
            words = "while pruning" if pruning == "prune" else None
            self._meanwhile("retention", pruning, during, before, words)
        for call, was in before.items():
            self._figure("retention", f"{call}, p95 before", was.p95, "ms")

    def _policy(self, older_than: int) -> RetentionPolicy:
        """What was active before a time goes, and nothing else."""
        now = time.time_ns() // 1_000_000
        return RetentionPolicy(max_age_days=(now - older_than) / DAY, spared_days=0)

    # --- Parts ------------------------------------------------------------------------------------

    def _grow_original(self, original: Bare, first: int) -> float:
        """Add a step of events to the original's tables; the seconds that its server took."""
        original.add_sessions(self._load.sessions(first, self.scale.step))
        taken = 0.0
        for batch in batches_of(self._load.iter_events(first, self.scale.step), BATCH):
            prepared = original.prepare(batch)
            taken += seconds(lambda: original.load(prepared))  # noqa: B023
        return taken

    def _compare_original(self, original: Bare, stored: int) -> None:
        """Both are equally large now: bytes, reads, and some thousand more events in turns."""
        note = f"at {stored:,} events"
        size = sum(self.bare.sizes().values()) / stored
        size_original = sum(original.sizes().values()) / stored
        self._figure("growth", "bytes per event", size, "B", note)
        self._figure("growth", "bytes per event, original's", size_original, "B")
        self._figure("growth", "bytes per event / original's", size / size_original, "x")
        # Ours were just stored, the original's long ago: without a warm-up its pages would be read
        # from where the server has not looked since. It takes other sessions than are measured.
        sessions = [self._any_session(stored) for _ in range(2 * self.scale.calls)]
        found = latencies(
            {
                "store": lambda i: self.store.get_events(sessions[i], limit=100),
                "original": lambda i: original.last_events(sessions[-1 - i], 100),
            },
            calls=self.scale.calls,
            warm_up=self.scale.calls,
        )
        ratio = sum(found["store"].times) / sum(found["original"].times)
        self._figure("growth", "last 100, random sessions, time / original's", ratio, "x")
        # Events of the same sessions, from far behind all that is measured.
        warm_up, events = 2, 2 * BATCH
        rounds = warm_up + self.scale.rounds
        first = 10 * self.scale.events
        more = [self._load.events(first + i * events, events) for i in range(rounds)]
        for some in (self.store.save_sessions, original.add_sessions):
            some(self._load.sessions(first, rounds * events))
        prepared = [[original.prepare(one) for one in batches(block, BATCH)] for block in more]
        rate = rates(
            {
                "store": lambda i: [self._save(one) for one in batches(more[i], BATCH)],
                "original": lambda i: [original.load(one) for one in prepared[i]],
            },
            rounds=self.scale.rounds,
            events=events,
            warm_up=warm_up,
        )
        name = "events a second, original's limit, at the same size"
        self._figure("growth", name, rate["original"], "1/s", note)
        ratio = rate["store"] / rate["original"]
        self._figure("growth", "save_events / original's limit, at the same size", ratio, "x")

    def _compare_beginning(self) -> None:
        """The same number of events into tables that hold all, and in turns into empty ones.

        Two moments minutes apart would compare the machine's neighbours as much as the tables.
        """
        count = max(BATCH, self.scale.step // 2)
        with self.beginning() as (empty, _):
            empty.save_sessions(self._load.sessions(0, count))
            more = batches(self._more(count), BATCH)
            first = batches_of(self._load.iter_events(0, count), BATCH)
            full_taken, empty_taken = 0.0, 0.0
            for ours, theirs in zip(more, first, strict=True):
                full_taken += seconds(lambda: self._save(ours))  # noqa: B023
                empty_taken += seconds(lambda: empty.save_events(theirs))  # noqa: B023
        name = "save_events of 1000, on top of all / into empty tables"
        self._figure("growth", name, empty_taken / full_taken, "x", f"{count:,} events each")

    def _bare_writers(self, count: int) -> float:
        """Events a second of this many bare connections that each insert one after the other."""
        each = int(self.scale.seconds * 12_000 / count) + 50
        work = [[self.bare.prepare_insert(one) for one in self._more(each)] for _ in range(count)]
        with contextlib.ExitStack() as stack:
            connections = [
                stack.enter_context(contextlib.closing(self.bare.another())) for _ in range(count)
            ]
            some = crowd(
                count,
                self.scale.seconds,
                lambda thread, number: connections[thread].insert(work[thread][number]),
            )
        if some.errors:
            raise some.errors[0]
        return some.rate

    def _save(self, events: list[MonitorEvent], new: int | None = None) -> int:
        """Save a batch, and do not believe that it was."""
        stored = self.store.save_events(events)
        if stored != (len(events) if new is None else new):
            raise RuntimeError(f"the store counted {stored} of {len(events)} events as new")
        return stored

    def _tree(self, size: int) -> str:
        """A tree of sessions, ten children each; its root."""
        ids = [load.session_id(10**9 + number) for number in range(size)]
        self.store.save_sessions(
            SessionMeta(
                session_id=session_id,
                machine_id="machine-tree",
                working_directory="/home/dev/tree",
                start_time=load.START + number,
                end_time=load.START + 10**10,
                status=SessionStatus.COMPLETED,
                parent_session_id=ids[(number - 1) // 10] if number else None,
            )
            for number, session_id in enumerate(ids)
        )
        return ids[0]

    def _meanwhile(
        self,
        chapter: str,
        pruning: str,
        during: dict[str, Latency],
        before: dict[str, Latency],
        words: str | None,
    ) -> None:
        """What a pruning did to those who went on; a ratio where there are words for it."""
        for call, found in during.items():
            if not found.times:
                continue
            self._figure(chapter, f"{pruning}: {call}, p95 meanwhile", found.p95, "ms")
            if words:
                ratio = found.p95 / before[call].p95
                self._figure(chapter, f"{call} {words}, p95 / before", ratio, "x")

    @contextmanager
    def _traffic(
        self, sessions: list[str], work: Iterator[list[MonitorEvent]] | None = None
    ) -> Iterator[dict[str, Latency]]:
        """A writer and a reader while the block runs, and the times of their calls."""
        write, read = Latency(), Latency()
        stop = threading.Event()
        if work is None:
            work = self._endless()
        turns = itertools.cycle(sessions)
        errors: list[BaseException] = []

        def go_on(latency: Latency, calls: Iterator[Callable[[], object]]) -> None:
            try:
                for call in calls:  # which are made outside of what is timed
                    latency.time(call)
                    if stop.wait(0.01):
                        break
            except BaseException as error:
                errors.append(error)

        calls: list[tuple[Latency, Iterator[Callable[[], object]]]] = [
            (write, (partial(self._save, some) for some in work)),
            (read, (partial(self.store.get_events, one, limit=100) for one in turns)),
        ]
        workers = [threading.Thread(target=go_on, args=pair) for pair in calls]
        for worker in workers:
            worker.start()
        try:
            yield {"save_events of 10": write, "last 100 events": read}
        finally:
            stop.set()
            for worker in workers:
                worker.join()
        if errors:
            raise errors[0]

    def _more(self, count: int, other: Load | None = None) -> list[MonitorEvent]:
        """Events that were not stored yet; their sessions are."""
        first, self._stored = self._stored, self._stored + count
        self.store.save_sessions(self._load.sessions(first, count))
        return (other or self._load).events(first, count)

    def _endless(self) -> Iterator[list[MonitorEvent]]:
        """The same by ten, made as they are needed, and more than anything goes on for."""
        first, count = self._stored, max(100_000, self.scale.events)
        self._stored += count
        self.store.save_sessions(self._load.sessions(first, count))
        return batches_of(self._load.iter_events(first, count), 10)

    def _any_session(self, stored: int, first: int = 0) -> str:
        return self._load.session_of(self._random.randrange(first, stored))

    def _point(self, curve: str, events: float, value: float) -> None:
        self.curves.setdefault(curve, []).append((events, value))

    def _latency(self, chapter: str, name: str, latency: Latency) -> None:
        self._figure(chapter, f"{name}, p50", latency.p50, "ms")
        self._figure(chapter, f"{name}, p95", latency.p95, "ms", f"p99 {latency.p99:.2f} ms")

    def _figure(self, chapter: str, name: str, value: float, unit: str, note: str = "") -> None:
        goals = GOALS.get(name)
        goal = goals[self.store.backend == "mysql"] if goals else None
        figure = Figure(
            backend=self.store.backend,
            chapter=chapter,
            name=name,
            value=value,
            unit=unit,
            goal=goal,
            note=note,
        )
        self.figures.append(figure)
        self.tell(f"    {name}: {value:,.3g} {unit}".rstrip())
