"""What a daemon waits for: a `put`, with the database up and away; and how fast a writer stores."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from contextuate_persist.bench.measure import Latency, rates
from contextuate_persist.model import MonitorEvent
from contextuate_persist.mysql_store import MySQLStore
from contextuate_persist.postgresql_store import PostgreSQLStore
from contextuate_persist.writer import EventWriter

#: What the producer of the paced measurements puts in a second.
PACE = 5000
SPOOLS: tuple[Literal["always", "on_failure"], ...] = ("always", "on_failure")

Store = PostgreSQLStore | MySQLStore
#: A port that is closed on every machine: a database that is away.
_NOWHERE = "127.0.0.1:1/away"


def put_times(
    store: Store, spool: Literal["always", "on_failure"], events: list[MonitorEvent], *, away: bool
) -> Latency:
    """The time of each `put` of one producer at PACE, in ms."""
    target = type(store)(f"{store.backend}://{_NOWHERE}") if away else store
    latency = Latency()
    with tempfile.TemporaryDirectory(prefix="contextuate-bench-") as directory:
        writer = EventWriter(target, spool=spool, spool_directory=directory)
        writer.init()
        # A daemon has no thousands of events in memory for the collector to look through.
        gc.collect()
        gc.freeze()
        start = time.perf_counter()
        for number, event in enumerate(events):
            due = start + number / PACE
            while (left := due - time.perf_counter()) > 0:
                time.sleep(left if left > 0.0005 else 0)
            latency.time(lambda: writer.put(event))  # noqa: B023
        gc.unfreeze()
        writer.close(0 if away else 60)
    return latency


@contextmanager
def _writers(store: Store) -> Iterator[dict[str, EventWriter]]:
    with tempfile.TemporaryDirectory(prefix="contextuate-bench-") as directory:
        writers: dict[str, EventWriter] = {
            spool: EventWriter(store, spool=spool, spool_directory=Path(directory) / spool)
            for spool in SPOOLS
        }
        for writer in writers.values():
            writer.init()
        try:
            yield writers
        finally:
            for writer in writers.values():
                writer.close()


def end_to_end(
    store: Store,
    fresh: Callable[[], list[list[MonitorEvent]]],
    save: Callable[[list[MonitorEvent]], object],
    *,
    rounds: int,
) -> dict[str, float]:
    """Events a second through a writer until they are stored, in turns with `save_events`.

    `fresh` gives the batches of one round, with events that nobody has stored.
    """
    with _writers(store) as writers:

        def write(writer: EventWriter, batches: list[list[MonitorEvent]]) -> None:
            for batch in batches:
                for event in batch:
                    writer.put(event)
            left = writer.flush(120)
            assert not left, f"{left} events were not stored in two minutes"  # noqa: S101

        work = {name: [fresh() for _ in range(rounds)] for name in ("save_events", *SPOOLS)}
        contenders: dict[str, Callable[[int], object]] = {
            "save_events": lambda i: [save(batch) for batch in work["save_events"][i]]
        }
        for name, writer in writers.items():
            contenders[name] = lambda i, n=name, w=writer: write(w, work[n][i])  # type: ignore[misc]
        events = sum(map(len, work["save_events"][0]))
        return rates(contenders, rounds=rounds, events=events)
