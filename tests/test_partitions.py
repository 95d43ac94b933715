"""Partitions: converting while others write, once over all of them, dropping what is due."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mysql.connector
import psycopg
import pytest

from contextuate_persist import (
    MonitorEvent,
    StoreRefused,
    StoreUnavailable,
    doctor,
    partitions,
    records,
    schema,
)
from contextuate_persist.archive import archive
from contextuate_persist.backup import backup, restore
from contextuate_persist.base import BaseStore
from contextuate_persist.cli import main
from contextuate_persist.copying import copy_store
from contextuate_persist.doctor import Level
from contextuate_persist.errors import ConfigurationError, SchemaError, SessionNotFound
from contextuate_persist.maintenance import Tasks, maintain
from contextuate_persist.retention import RetentionPolicy, prune
from tests import servers
from tests.builders import T0, event, session
from tests.conftest import Database, make_store, new_database
from tests.shapes import shape

DAY = 86_400_000
#: So that a conversion makes few partitions.
RECENT = time.time_ns() // 1_000_000 - 60 * DAY
HEX_IDS = {"postgresql": "REPLACE(id::text, '-', '')", "mysql": "LOWER(HEX(id))"}


@pytest.fixture
def plain(server: servers.Server) -> Iterator[Database]:
    """A database of its own, whose events are one table yet."""
    database = new_database(server)
    database.owner().apply_schema()
    yield database
    database.drop()


@pytest.fixture
def room(server: servers.Server) -> Iterator[None]:
    """Memory for a million events: the servers of the tests are small."""
    if server.kind == "postgresql":
        yield
        return
    names = ("innodb_buffer_pool_size", "innodb_redo_log_capacity")
    small = server.execute("SELECT " + ", ".join(f"@@{name}" for name in names))[0]
    for name in names:
        server.execute(f"SET GLOBAL {name} = {512 * 2**20}")
    yield
    for name, value in zip(names, small, strict=True):
        server.execute(f"SET GLOBAL {name} = {value}")


@pytest.fixture
def converted(plain: Database) -> Database:
    """One with partitions by month, up to the next month; its old table is gone."""
    plain.owner().partition_events("month", ahead=1)
    plain.owner().discard_unpartitioned()
    return plain


@pytest.fixture
def partitioned(plain: Database) -> Database:
    """One with partitions for the half year that T0 begins."""
    with plain.owner()._partition_session(60) as session:
        session.prepare(partitions.periods("month", T0, T0 + 150 * DAY))
        session.switch(0)
    plain.owner().discard_unpartitioned()
    return plain


@contextlib.contextmanager
def killed(
    monkeypatch: pytest.MonkeyPatch, step: str, first: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """What runs is interrupted where it comes to this step."""

    def stop(*_: Any) -> Any:
        first()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(partitions, step, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def ids_of(database: Database, table: str = "events") -> list[str]:
    rows = database.execute(f"SELECT {HEX_IDS[database.backend]} FROM {table}")
    return sorted(row[0] for row in rows)


def check_whole(database: Database) -> list[str]:
    """Every event once, with its id and its session; their ids."""
    stored = ids_of(database)
    assert len(stored) == len(set(stored))
    assert stored == ids_of(database, "event_ids")
    same = database.execute(
        "SELECT count(*) FROM events e JOIN event_ids i "
        "ON i.id = e.id AND i.seq = e.seq AND i.timestamp = e.timestamp "
        "JOIN sessions s ON s.session_id = e.session_id"
    )
    assert same[0][0] == len(stored)
    return stored


def hexes(events: list[MonitorEvent]) -> list[str]:
    return sorted(one.id.replace("-", "") for one in events)


# --- Open stores ----------------------------------------------------------------------------------


def save_one_by_one(store: BaseStore, events: list[MonitorEvent]) -> int:
    return sum(map(store.save_event, events))


def save_few(store: BaseStore, events: list[MonitorEvent]) -> int:
    return sum(store.save_events(events[start : start + 3]) for start in range(0, len(events), 3))


def save_many(store: BaseStore, events: list[MonitorEvent]) -> int:
    return store.save_events(events)


def save_encoded(store: BaseStore, events: list[MonitorEvent]) -> int:
    return store.save_rows([store._encode(records.check_event(one)) for one in events]).stored


WAYS = [save_one_by_one, save_few, save_many, save_encoded]


@pytest.mark.parametrize("known", [True, False])
def test_an_open_store_goes_on_in_every_way_when_events_is_partitioned(
    plain: Database, known: bool
) -> None:
    before = [event("s", RECENT + number) for number in range(20)]
    stores = [make_store(plain.url) for _ in WAYS]
    for store in stores:
        store.init()
    stores[0].save_events(before)
    for store in stores:
        for _ in range(6):  # until statements are prepared
            store.save_event(before[0])
            store.get_event_by_id("s", before[0].id)
    plain.owner().partition_events()
    after: list[MonitorEvent] = []
    for number, (way, store) in enumerate(zip(WAYS, stores, strict=True)):
        name = "s" if known else f"new {number}"
        events = [event(name, RECENT + 40 * DAY * n) for n in range(12)]
        assert way(store, [*events, before[0]]) == 12
        assert way(store, events) == 0
        assert store.get_event_by_id(name, events[5].id) == events[5]
        assert store.get_events(name, after=RECENT)[-1] == events[-1]
        assert store.health().schema_layout == "partitioned"
        after += events
        store.close()
    assert check_whole(plain) == hexes(before + after)


def test_an_open_store_that_repeats_itself_notices_the_partitions(plain: Database) -> None:
    events = [event("s", RECENT + number) for number in range(30)]
    with make_store(plain.url) as store:
        store.save_events(events)
        store.save_events([*events, event("t")])  # a streak of repeats begins
        plain.owner().partition_events()
        assert store.save_events([*events, event("u")]) == 1
    check_whole(plain)


@pytest.mark.parametrize("delete", ["one", "all", "prune"])
def test_an_open_store_deletes_whole_sessions_also_from_partitions(
    plain: Database, delete: str
) -> None:
    with make_store(plain.url) as store:
        for name in ("a", "b"):
            store.save_session(
                session(name, start_time=RECENT, end_time=RECENT + DAY, status="completed")
            )
            store.save_events([event(name, RECENT + 20 * DAY * number) for number in range(6)])
        plain.owner().partition_events()
        if delete == "one":
            store.delete_session("a")
            store.delete_session("b")
        elif delete == "all":
            store.delete_all_sessions()
        else:
            store.prune_old_sessions(RECENT + 400 * DAY)
    for table in ("events", "event_ids", "events_unpartitioned", "sessions"):
        assert plain.execute(f"SELECT count(*) FROM {table}")[0][0] == 0


def test_events_come_once_whatever_comes_with_their_id(partitioned: Database) -> None:
    first = event("s", T0)
    others = [
        event("s", T0 + 1, id=first.id),
        event("s", T0 + 70 * DAY, id=first.id),
        event("t", T0 + 1000 * DAY, id=first.id),
        event("t", T0, id=first.id),
    ]
    with make_store(partitioned.url) as store:
        assert store.save_event(first) is True
        for other in others:
            assert store.save_event(other) is False
            assert store.save_events([other]) == 0
            assert store.save_events([other, *(event("u", T0) for _ in range(20))]) == 20
        assert store.get_session("t") is None
        assert store.get_events("s") == [first]
        assert store.get_event_by_id("t", first.id) is None
    check_whole(partitioned)


def test_deleters_and_writers_leave_no_event_and_no_id_behind(partitioned: Database) -> None:
    names = [f"s{number}" for number in range(4)]
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(act: Callable[[BaseStore, random.Random], Any], seed: int) -> None:
        chance = random.Random(seed)
        try:
            with make_store(partitioned.url, pool_size=1) as store:
                while not stop.is_set():
                    act(store, chance)
        except BaseException as error:
            failures.append(error)

    def now() -> int:  # newer than every deletion
        return time.time_ns() // 1_000_000 + 3_600_000

    def one(store: BaseStore, chance: random.Random) -> None:
        store.save_event(event(chance.choice(names), now()))

    def many(store: BaseStore, chance: random.Random) -> None:
        store.save_events(
            [event(chance.choice(names), now()) for _ in range(chance.choice([2, 20]))]
        )

    def delete(store: BaseStore, chance: random.Random) -> None:
        with contextlib.suppress(SessionNotFound):
            store.delete_session(chance.choice(names))
        time.sleep(0.01)

    acts = [one, one, many, many, delete, delete]
    threads = [threading.Thread(target=work, args=(act, seed)) for seed, act in enumerate(acts)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    check_whole(partitioned)


# --- Converting -----------------------------------------------------------------------------------


class Writers:
    """Threads that store, delete and store again, each in sessions of its own."""

    def __init__(self, database: Database, number: int = 3) -> None:
        self.database = database
        self.failures: list[BaseException] = []
        self.kept: list[MonitorEvent] = []
        self.longest = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(seed,)) for seed in range(number)
        ]

    def __enter__(self) -> Writers:  # noqa: PYI034 - Self needs Python 3.11
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, seed: int) -> None:
        try:
            with make_store(self.database.url, pool_size=1, lock_timeout=30.0) as store:
                turn = 0
                while not self._stop.is_set():
                    turn += 1
                    started = time.monotonic()
                    self._turn(store, f"{seed} {turn}", turn)
                    self.longest = max(self.longest, time.monotonic() - started)
        except BaseException as error:
            self.failures.append(error)

    def _turn(self, store: BaseStore, name: str, turn: int) -> None:
        events = [event(name, RECENT + DAY * (turn % 90) + n) for n in range((1, 4, 60)[turn % 3])]
        if len(events) == 1:
            store.save_event(events[0])
        else:
            store.save_events(events)
        if turn % 5 == 0:
            store.delete_session(name)
            if turn % 10 == 0:  # the same ids again
                assert store.save_events(events[::2], undelete=True) == len(events[::2])
                events = events[::2]
            else:
                events = []
        with self._lock:
            self.kept += events


def test_nothing_is_lost_or_doubled_while_events_is_partitioned(plain: Database) -> None:
    before = [event(f"old {n % 40}", RECENT + n * DAY // 50) for n in range(4000)]
    with make_store(plain.url) as store:
        store.save_events(before)
        with Writers(plain) as writers:
            time.sleep(0.5)
            seen: list[tuple[int, int]] = []
            done = plain.owner().partition_events(
                "week", progress=lambda reached, last: seen.append((reached, last))
            )
            time.sleep(0.5)
        assert writers.failures == []
        assert done.converted
        assert done.copied >= len(before)
        assert 0 < done.longest_wait_ms < 10_000
        assert seen[-1][0] <= seen[-1][1]
        assert check_whole(plain) == hexes(before + writers.kept)
        assert store.get_events("old 7") == sorted(
            (one for one in before if one.session_id == "old 7"), key=lambda one: one.timestamp
        )
    # What was stored before is in the old table, too, unless its session was deleted.
    assert set(ids_of(plain, "events_unpartitioned")) <= set(ids_of(plain))


@pytest.mark.only("postgresql")
def test_a_conversion_waits_for_who_reads_instead_of_building_its_index_again(
    plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextuate_persist.postgresql_store import PostgreSQLPartitions  # noqa: PLC0415

    prepare, tries = PostgreSQLPartitions.prepare, []

    def counted(session: PostgreSQLPartitions, spans: Any) -> None:
        tries.append(spans)
        prepare(session, spans)

    monkeypatch.setattr(PostgreSQLPartitions, "prepare", counted)
    with psycopg.connect(plain.url) as reader:
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1")
        leaving = threading.Timer(2.5, reader.rollback)
        leaving.start()
        try:
            with make_store(plain.owner_url, lock_timeout=1) as owner:
                assert owner.partition_events("month").converted
        finally:
            leaving.join()
    assert len(tries) == 1


@pytest.mark.only("postgresql")
def test_a_session_made_anew_while_its_events_are_copied_has_its_new_ones_only(
    plain: Database,
) -> None:
    """The copy of a chunk knows the events of a moment; what is deleted then must not come back."""
    events = [event("s", RECENT + n) for n in range(60)]
    with make_store(plain.url, lock_timeout=30.0) as store:
        store.save_events(events)
        with plain.owner()._partition_session(60) as session:
            session.prepare(partitions.periods("month", RECENT, RECENT + DAY))
            plain.execute(
                "CREATE FUNCTION wait_a_moment() RETURNS TRIGGER LANGUAGE plpgsql AS "
                "$$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$"
            )
            plain.execute(
                "CREATE TRIGGER trigger_slow BEFORE INSERT ON event_ids "
                "FOR EACH STATEMENT EXECUTE FUNCTION wait_a_moment()"
            )
            copying = threading.Thread(target=session.copy, args=(0, session.watermark(), 1000))
            copying.start()
            time.sleep(0.3)
            store.delete_session("s")
            assert store.save_events(events[::2], undelete=True) == 30
            copying.join()
            plain.execute("DROP TRIGGER trigger_slow ON event_ids")
            assert ids_of(plain, "events_partitioned") == []
            session.switch(0)
    assert check_whole(plain) == sorted(hexes(events[::2]))


@pytest.mark.only("postgresql")
def test_the_newest_events_are_planned_once_and_those_of_a_session_by_its_id(
    partitioned: Database,
) -> None:
    # With three sessions in a partition, a plan for any of them would go by time.
    with make_store(partitioned.url, pool_size=1) as store:
        store.save_events(event("old", T0 + n) for n in range(200))
        for day in range(1, 149):
            store.save_events(event(f"{day // 10} {n % 3}", T0 + day * DAY + n) for n in range(150))
        partitioned.execute("VACUUM ANALYZE events")
        for _ in range(20):
            assert len(store.get_events("old", limit=100)) == 100
            assert len(store.get_all_recent_events(50)) == 50
        planned = store._run(
            lambda connection: connection.execute(
                "SELECT statement LIKE '%session_id = %', generic_plans > 0, custom_plans > 0"
                " FROM pg_prepared_statements WHERE statement LIKE '%FROM events%LIMIT%'"
            ).fetchall()
        )
    assert sorted(planned) == [(False, True, False), (True, False, True)]


@pytest.mark.only("postgresql")
def test_who_may_read_events_may_read_each_partition_as_pg_dump_does(plain: Database) -> None:
    reader, stranger = f"{plain.user}_r", f"{plain.user}_s"
    for role in (reader, stranger):
        plain.execute(f"CREATE ROLE {role}")
    try:
        plain.execute(f"GRANT SELECT ON sessions, events TO {reader}")
        owner = plain.owner()
        owner.partition_events(timeout=60)
        owner.add_partitions(ahead=5)
        closed = (
            "SELECT i.inhrelid::regclass FROM pg_inherits AS i"
            " WHERE i.inhparent = 'events'::regclass"
            " AND {} has_table_privilege('{}', i.inhrelid, 'SELECT')"
        )
        assert plain.execute(closed.format("NOT", reader)) == []
        assert plain.execute(closed.format("", stranger)) == []
    finally:
        for role in (reader, stranger):
            plain.execute(f"DROP OWNED BY {role}")
            plain.execute(f"DROP ROLE {role}")


def wait_for_copies(database: Database, running: subprocess.Popen[bytes]) -> None:
    """Until a conversion that runs has copied events."""
    table = {"postgresql": "event_ids", "mysql": "event_ids_new"}[database.backend]
    while running.poll() is None:
        with contextlib.suppress(psycopg.Error, mysql.connector.Error):  # no such table yet
            if database.execute(f"SELECT 1 FROM {table} LIMIT 1"):
                return
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("count", "kills", "longest"),
    # The shorter one is through after some kills: those of its last step are among them.
    [(8000, 5, 2.5), pytest.param(150_000, 20, 1.5, marks=pytest.mark.soak)],
)
def test_a_conversion_that_is_killed_at_any_moment_goes_on_when_run_again(
    plain: Database, count: int, kills: int, longest: float
) -> None:
    before = [event(f"old {n % 40}", RECENT + n * 160 * DAY // count) for n in range(count)]
    command = [sys.executable, "-m", "contextuate_persist", "--url", plain.owner_url, "partition"]
    chance = random.Random()
    with make_store(plain.url) as store:
        store.save_events(before)
        with Writers(plain, 2) as writers:
            for number in range(kills):
                running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
                if number:
                    time.sleep(chance.uniform(0.4, longest))
                else:
                    wait_for_copies(plain, running)
                running.kill()
                assert running.wait() == -signal.SIGKILL or number
            while plain.owner().partition_events(timeout=60).converted:
                pass
        assert writers.failures == []
        assert check_whole(plain) == hexes(before + writers.kept)
        assert store.health().schema_layout == "partitioned"
        layouts = plain.execute("SELECT layout FROM schema_version ORDER BY version DESC")
        assert layouts[0][0] == "partitioned"


def test_what_was_deleted_by_hand_while_it_was_copied_stays_deleted(
    plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [event("s", RECENT + n) for n in range(50)]
    with make_store(plain.url) as store:
        store.save_events(events)
    copy = partitions._copy

    def copy_then_delete(*arguments: Any) -> int:
        copied = copy(*arguments)
        plain.execute(f"DELETE FROM events WHERE timestamp < {RECENT + 20}")
        return copied

    monkeypatch.setattr(partitions, "_copy", copy_then_delete)
    plain.owner().partition_events()
    assert check_whole(plain) == hexes(events[20:])


@pytest.mark.parametrize("again", [False, True])
def test_what_is_deleted_after_both_tables_were_compared_stays_deleted(
    plain: Database, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    events = [event("s", RECENT + n) for n in range(50)]
    others = [event("t", RECENT + n) for n in range(5)]
    left = events[::2] if again else []
    verify = partitions._verify
    with make_store(plain.url) as store:
        store.save_events([*events, *others])

        def verify_then_delete(session: partitions.PartitionSession) -> tuple[int, int]:
            verified = verify(session)
            store.delete_session("s")
            assert store.save_events(left, undelete=True) == len(left)
            return verified

        monkeypatch.setattr(partitions, "_verify", verify_then_delete)
        plain.owner().partition_events()
    assert check_whole(plain) == hexes(left + others)


@pytest.mark.only("mysql")
@pytest.mark.parametrize("meanwhile", ["nothing", "deleted", "anew"])
def test_the_last_step_is_repeated_while_somebody_is_idle_who_has_read_sessions(
    plain: Database, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """Such a lock lets the last events be copied, which is committed, and not the tables swapped.

    PostgreSQL does both in one transaction.
    """
    before = [event("s", RECENT + n) for n in range(20)]
    late = [event(name, RECENT + 100 + n) for name in "st" for n in range(5)]
    left = {"nothing": late, "deleted": late[:5], "anew": [*late[:5], *late[6:8]]}[meanwhile]
    verify = partitions._verify
    idle = plain.server._connect(plain.name)
    refused: list[Exception] = []
    with make_store(plain.url) as store:
        store.save_events(before)

        def verify_then_store(session: partitions.PartitionSession) -> tuple[int, int]:
            verified = verify(session)
            store.save_events(late)
            cursor = idle.cursor()
            cursor.execute("BEGIN")
            cursor.execute("SELECT COUNT(*) FROM sessions")
            cursor.fetchall()
            switch = session.switch

            def switch_or_let_go(after: int) -> int:
                try:
                    return switch(after)
                except Exception as error:
                    refused.append(error)
                    if meanwhile != "nothing":
                        store.delete_session("t")
                    if meanwhile == "anew":
                        store.save_events(late[6:8], undelete=True)
                    idle.close()
                    raise

            monkeypatch.setattr(session, "switch", switch_or_let_go)
            return verified

        monkeypatch.setattr(partitions, "_verify", verify_then_store)
        monkeypatch.setattr(partitions, "_PAUSE_PER_TRY", 0)
        done = plain.owner().partition_events()
        assert len(refused) == 1
        assert store.save_event(event("s", RECENT + 200, id=late[0].id)) is False
    assert done.copied == len(before) + len(late) + 2 * (meanwhile == "anew")
    assert check_whole(plain) == hexes(before + left)


def test_what_an_earlier_run_has_copied_of_a_session_that_is_gone_does_not_stay(
    plain: Database,
) -> None:
    spans = partitions.periods("month", RECENT, RECENT + DAY)
    others = [event("t", RECENT + n) for n in range(5)]
    with make_store(plain.url) as store:
        store.save_events([*(event("s", RECENT + n) for n in range(50)), *others])
        with plain.owner()._partition_session(60) as session:
            session.prepare(spans)
            session.copy(0, session.watermark(), 1000)
        store.delete_session("s")
    with plain.owner()._partition_session(60) as session:
        session.prepare(spans)
        session.switch(session.copied())
    assert check_whole(plain) == hexes(others)


def test_a_copy_that_lacks_something_changes_nothing(
    plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_store(plain.url) as store:
        store.save_events([event("s", RECENT + n) for n in range(50)])
        copy = partitions._copy

        def copy_then_lose(*arguments: Any) -> int:
            copied = copy(*arguments)
            plain.execute(f"DELETE FROM events_partitioned WHERE timestamp = {RECENT + 20}")
            return copied

        monkeypatch.setattr(partitions, "_copy", copy_then_lose)
        with pytest.raises(SchemaError, match="1 events of session s are missing from the copy"):
            plain.owner().partition_events()
        assert store.health().schema_layout == "plain"
        assert len(store.get_events("s")) == 50
        assert store.save_event(event("s"))


def test_partitioning_again_adds_what_is_missing_and_says_so(converted: Database) -> None:
    owner = converted.owner()
    again = owner.partition_events(ahead=3)
    assert (again.converted, again.by, len(again.added), again.copied) == (False, "month", 2, 0)
    assert owner.partition_events("month", ahead=3).added == ()
    with pytest.raises(ConfigurationError, match="partitioned by month, not by day"):
        owner.partition_events("day")


def test_another_unit_does_not_go_on_with_a_conversion_that_was_begun(
    plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed(monkeypatch, "_copy"):
        plain.owner().partition_events("week")
    with pytest.raises(ConfigurationError, match="half-way to being partitioned by week"):
        plain.owner().partition_events("day")
    assert plain.owner().partition_events().by == "week"


#: What others make on the table of events: how, what undoes it, and by what name it is told.
ATTACHED = {
    "policy": (
        "CREATE POLICY own ON events USING (machine_id = current_user)",
        "DROP POLICY own ON events",
        "policy own on table events",
    ),
    "row security": (
        "ALTER TABLE events ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE events DISABLE ROW LEVEL SECURITY",
        "row level security",
    ),
    "policy of another table": (
        "CREATE POLICY told ON sessions USING (EXISTS (SELECT seq FROM events))",
        "DROP POLICY told ON sessions",
        "policy told on table sessions",
    ),
    "trigger": (
        (
            "CREATE TRIGGER audit BEFORE UPDATE ON events FOR EACH ROW "
            "EXECUTE FUNCTION suppress_redundant_updates_trigger()"
        ),
        "DROP TRIGGER audit ON events",
        "trigger audit on table events",
    ),
    "rule": (
        "CREATE RULE quiet AS ON DELETE TO events DO INSTEAD NOTHING",
        "DROP RULE quiet ON events",
        "rule quiet on table events",
    ),
    "publication": (
        "CREATE PUBLICATION feed FOR TABLE events",
        "DROP PUBLICATION feed",
        "publication of table events in publication feed",
    ),
    "view": (
        "CREATE VIEW newest AS SELECT max(timestamp) FROM events",
        "DROP VIEW newest",
        "view newest",
    ),
    "foreign key": (
        "CREATE TABLE notes (id UUID CONSTRAINT of_event REFERENCES events (id))",
        "DROP TABLE notes",
        "constraint of_event on table notes",
    ),
    "function": (
        (
            "CREATE FUNCTION everything() RETURNS SETOF events LANGUAGE sql AS "
            "'SELECT * FROM events'"
        ),
        "DROP FUNCTION everything()",
        "function everything()",
    ),
    "function of an array": (
        "CREATE FUNCTION many(events[]) RETURNS int LANGUAGE sql AS 'SELECT cardinality($1)'",
        "DROP FUNCTION many(events[])",
        "function many(events[])",
    ),
    "statistics": (
        "CREATE STATISTICS tools ON machine_id, tool_name FROM events",
        "DROP STATISTICS tools",
        "statistics object tools",
    ),
    "column": (
        "ALTER TABLE events ADD COLUMN reviewed VARCHAR(20) DEFAULT 'yes'",
        "ALTER TABLE events DROP COLUMN reviewed",
        "column reviewed on table events",
    ),
    "check": (
        "ALTER TABLE events ADD CONSTRAINT no_teapots CHECK (tool_name <> 'Teapot')",
        "ALTER TABLE events DROP CONSTRAINT no_teapots",
        "constraint no_teapots on table events",
    ),
    "unique": (
        "ALTER TABLE events ADD CONSTRAINT one_a_moment UNIQUE (machine_id, timestamp)",
        "ALTER TABLE events DROP CONSTRAINT one_a_moment",
        "constraint one_a_moment on table events",
    ),
    "index": (
        "CREATE INDEX by_tool ON events ((lower(tool_name)))",
        "DROP INDEX by_tool",
        "index by_tool on table events",
    ),
}
ATTACHED_MYSQL = {
    "trigger": (
        "CREATE TRIGGER audit BEFORE INSERT ON events FOR EACH ROW SET @last = NEW.timestamp",
        "DROP TRIGGER audit",
        "trigger audit on table events",
    ),
    "foreign key": (
        (
            "CREATE TABLE notes "
            "(id BINARY(16), CONSTRAINT of_event FOREIGN KEY (id) REFERENCES events (id))"
        ),
        "DROP TABLE notes",
        "constraint of_event on table notes",
    ),
    "column": ATTACHED["column"],
    "check": (
        ATTACHED["check"][0],
        "ALTER TABLE events DROP CHECK no_teapots",
        "constraint no_teapots on table events",
    ),
    "unique": (
        ATTACHED["unique"][0],
        "ALTER TABLE events DROP INDEX one_a_moment",
        "constraint one_a_moment on table events",
    ),
    "index": (
        ATTACHED["index"][0],
        "DROP INDEX by_tool ON events",
        "index by_tool on table events",
    ),
}


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ATTACHED_MYSQL else pytest.param(kind, marks=pytest.mark.only("postgresql"))
        for kind in ATTACHED
    ],
)
def test_a_table_to_which_others_added_something_is_not_converted(
    plain: Database, kind: str
) -> None:
    attached = ATTACHED if plain.backend == "postgresql" else ATTACHED_MYSQL
    make, undo, told = attached[kind]
    with make_store(plain.url) as store:
        store.save_events([event("s", RECENT + n) for n in range(3)])
    plain.execute(make)
    wanted = rf"would stay with the old table: {re.escape(told)}; drop "
    with pytest.raises(ConfigurationError, match=wanted) as refused:
        plain.owner().partition_events()
    assert "\n" not in str(refused.value)
    with plain.owner()._partition_session(60) as session:
        assert session.read_partitions(aside=True) == []
    plain.execute(undo)
    assert plain.owner().partition_events().copied == 3
    check_whole(plain)


def test_what_others_make_while_events_is_copied_stops_the_conversion_until_it_is_gone(
    plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = ATTACHED if plain.backend == "postgresql" else ATTACHED_MYSQL
    make, undo, told = attached["trigger"]
    events = [event("s", RECENT + n) for n in range(3)]
    with make_store(plain.url) as store:
        store.save_events(events)
    copy = partitions._copy

    def copy_then_make(*arguments: Any) -> int:
        copied = copy(*arguments)
        plain.execute(make)
        return copied

    with monkeypatch.context() as patch:
        patch.setattr(partitions, "_copy", copy_then_make)
        with pytest.raises(ConfigurationError, match=told):
            plain.owner().partition_events()
    plain.execute(undo)
    assert plain.owner().partition_events().converted
    assert check_whole(plain) == hexes(events)


@pytest.mark.only("mysql")
def test_a_view_of_others_shows_the_partitions(plain: Database) -> None:
    plain.execute("CREATE VIEW newest AS SELECT MAX(timestamp) FROM events")
    plain.owner().partition_events()
    with make_store(plain.url) as store:
        store.save_event(event("s", RECENT))
    assert plain.execute("SELECT * FROM newest")[0][0] == RECENT


@pytest.mark.parametrize("bad", [{"by": "year"}, {"ahead": -1}, {"ahead": 1.5}, {"ahead": 10**6}])
def test_senseless_partitions_are_refused(plain: Database, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        plain.owner().partition_events(**bad)


def test_the_old_table_goes_only_when_nothing_is_in_it_alone(plain: Database) -> None:
    with make_store(plain.url) as store:
        store.save_events([event("s", RECENT + n) for n in range(3)])
    with pytest.raises(ConfigurationError, match="not partitioned: run"):
        plain.owner().discard_unpartitioned()
    plain.owner().partition_events()
    plain.execute(f"DELETE FROM events WHERE timestamp = {RECENT}")
    with pytest.raises(SchemaError, match="1 events are in events_unpartitioned only"):
        plain.owner().discard_unpartitioned()
    plain.execute(f"DELETE FROM events_unpartitioned WHERE timestamp = {RECENT}")
    assert plain.owner().discard_unpartitioned() is True
    assert plain.owner().discard_unpartitioned() is False


def test_what_is_forgotten_is_in_the_old_table_no_more(plain: Database) -> None:
    with make_store(plain.url) as store:
        store.save_session(session("stays", machine_id="m"))
        store.save_events(
            [
                event("stays", RECENT),
                event("stays", RECENT + 1, machine_id="gone"),
                event("stays", RECENT + 2, parent_session_id="also gone"),
                event("also gone", RECENT, machine_id="gone"),
            ]
        )
        plain.owner().partition_events()
        store.forget(session_id="also gone")
        store.forget(machine_id="gone")
        assert len(store.get_events("stays")) == 2
    for table in ("events", "events_unpartitioned"):
        rows = plain.execute(f"SELECT machine_id, parent_session_id FROM {table}")
        assert [tuple(row) for row in rows] == [("machine", None)] * 2
    assert len(check_whole(plain)) == 2


def test_forgetting_waits_for_a_conversion(
    plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_store(plain.url) as store:
        store.save_event(event("s", RECENT))
        with killed(monkeypatch, "_copy"):
            plain.owner().partition_events()
        with pytest.raises(StoreUnavailable, match="made or dropped"):
            store.forget(session_id="s")
        assert len(store.get_events("s")) == 1
        plain.owner().partition_events()
        store.forget(session_id="s")
    assert check_whole(plain) == []


@pytest.fixture
def tools(server: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that make and load a backup."""
    if server.kind == "mysql":
        directory = tmp_path / "tools"
        directory.mkdir()
        next(iter(servers.find_mysql())).write_tools(directory)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def bounds(database: Database) -> list[tuple[str, int | None, int | None]]:
    return [(one.name, one.start, one.end) for one in database.owner().partitions()]


def test_the_schema_file_may_be_run_again(converted: Database) -> None:
    before = INDEXES[converted.backend]
    found = converted.execute(before)
    assert found
    script = schema.schema_file(f"{converted.backend}-schema.sql").read_text()
    for statement in schema.split_script(script, converted.backend):
        converted.execute(statement)
    assert converted.execute(before) == found
    [drift] = [one for one in converted.owner().check() if one.check == "drift"]
    assert drift.level is Level.OK


INDEXES = {
    "postgresql": "SELECT indexrelid::regclass::text FROM pg_index "
    "WHERE indrelid = 'events'::regclass ORDER BY 1",
    "mysql": "SELECT DISTINCT index_name FROM information_schema.statistics "
    "WHERE table_schema = DATABASE() AND table_name = 'events' ORDER BY 1",
}


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("target", ["without a schema", "of other partitions"])
def test_a_backup_of_partitions_is_restored_and_goes_on_as_before(
    converted: Database, empty_database: Database, tmp_path: Path, target: str
) -> None:
    now = time.time_ns() // 1_000_000
    times = [T0, *(RECENT + n * DAY for n in range(60)), now, now + 100 * DAY, now + 4000 * DAY]
    events = [event(f"s{n % 3}", ms, data={"n": n}) for n, ms in enumerate(times)]
    with make_store(converted.url) as store:
        store.save_sessions([session("s0", label="saved"), session("gone")])
        store.save_events(events)
        store.save_event(event("gone", now + 1))
        [(last,)] = converted.execute("SELECT max(seq) FROM events")
        store.delete_session("gone")
        before = store.get_sessions(), [*store.iter_events()]
    file = tmp_path / "backup"
    with converted.owner() as owner:
        backup(owner, file)
    if target == "of other partitions":
        empty_database.owner().apply_schema()
        empty_database.owner().partition_events("week", ahead=3)
        empty_database.owner().discard_unpartitioned()
    wanted = bounds(empty_database if target == "of other partitions" else converted)
    restore(empty_database.owner(), file)
    assert bounds(empty_database) == wanted
    with make_store(empty_database.url) as store:
        assert store.health().schema_layout == "partitioned"
        assert (store.get_sessions(), [*store.iter_events()]) == before
        # What comes again is known, whatever comes with its id; what was deleted stays so.
        assert sum(map(store.save_event, events)) == 0
        assert store.save_events(events) == 0
        assert store.save_events([event("t", now, id=one.id) for one in events]) == 0
        assert store.save_event(event("gone", now - DAY)) is False
        assert store.save_events([*events, event("s1", now + 2)]) == 1
        assert store.save_event(event("s1", now + 3))
        found = store.get_events("s1", after=now)
        new = [one for one in found if one.timestamp in (now + 2, now + 3)]
        assert [one.seq > last for one in new if one.seq is not None] == [True, True]
    assert len(check_whole(empty_database)) == len(events) + 2
    # Partitions go on being made, and what lies in the rest moves into them.
    with empty_database.owner() as owner:
        assert owner.add_partitions(20)
        (told,) = [one for one in maintain(owner, "monthly", Tasks()) if one.check == "partitions"]
        assert told.level is Level.OK
        assert owner.partition_events(ahead=21).added
        assert [*owner.iter_events()][-1].id == events[-1].id
        assert owner.save_events(events) == 0
    spans = bounds(empty_database)
    assert [one[2] for one in spans[:-1]] == [one[1] for one in spans[1:]]
    assert len(check_whole(empty_database)) == len(events) + 2
    told_of = {one.check: one for one in make_store(empty_database.url).check()}
    assert [str(one) for one in told_of.values() if one.level is Level.PROBLEM] == []
    for check in ("schema", "drift", "partitions", "statistics"):
        assert told_of[check].level is Level.OK, str(told_of[check])


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("as_owner", [False, True])
@pytest.mark.parametrize("schema_first", [False, True])
def test_a_backup_during_a_conversion_is_one_of_the_plain_layout(
    plain: Database, empty_database: Database, tmp_path: Path, as_owner: bool, schema_first: bool
) -> None:
    events = [event("s", RECENT + n) for n in range(20)]
    with make_store(plain.url) as store:
        store.save_events(events)
    with plain.owner()._partition_session(60) as half_way:
        half_way.prepare(partitions.periods("month", RECENT, RECENT + DAY))
        half_way.copy(0, half_way.watermark(), 7)
    # The application's account may not ask a sequence.
    with make_store(plain.owner_url if as_owner else plain.url) as store:
        contents = backup(store, tmp_path / "backup").contents
    assert (contents.layout, contents.events, contents.ids) == ("plain", len(events), 0)
    if schema_first:
        empty_database.owner().apply_schema()
    restore(empty_database.owner(), tmp_path / "backup")
    new = event("s", RECENT + 100)
    with make_store(empty_database.url) as store:
        assert store.get_events("s") == events
        assert store.save_event(new)
        assert empty_database.owner().partition_events().copied == len(events) + 1
        assert store.save_events([*events, new]) == 0
    assert check_whole(empty_database) == hexes([*events, new])
    assert plain.owner().partition_events().converted
    assert check_whole(plain) == hexes(events)


@pytest.mark.only("postgresql")
def test_a_backup_that_begins_while_partitions_are_added_has_the_events_that_move(
    partitioned: Database,
) -> None:
    """What moves is a new row, which a snapshot from before that would not see."""
    with make_store(partitioned.url) as store:
        store.save_events([event("s", T0), event("s", T0 + 200 * DAY)])
        found: list[int] = []

        def look() -> None:
            with store.snapshot() as snapshot:
                found.append(snapshot.contents().events)

        thread = threading.Thread(target=look)
        with partitioned.owner()._partition_session(60) as session:
            last = session.read_partitions()[-2].end
            with session._connection.transaction():
                session.add(partitions.periods("month", last, T0 + 200 * DAY))
                thread.start()
                until = time.monotonic() + 10
                waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
                while not partitioned.execute(waiting) and time.monotonic() < until:
                    time.sleep(0.01)
            thread.join()
    assert found == [2]


@pytest.mark.usefixtures("tools")
def test_a_backup_of_partitions_is_not_restored_into_one_table(
    converted: Database, empty_database: Database, tmp_path: Path
) -> None:
    with make_store(converted.url) as store:
        store.save_event(event("s"))
    with converted.owner() as owner:
        backup(owner, tmp_path / "backup")
    empty_database.owner().apply_schema()
    with pytest.raises(
        SchemaError, match=r"\(plain\), the backup 1 \(partitioned\): run `partition"
    ):
        restore(empty_database.owner(), tmp_path / "backup")
    with make_store(empty_database.url) as store:
        assert store.get_sessions() == []
        assert store.health().schema_layout == "plain"


def test_accounts_of_the_application_are_refused_in_one_line(plain: Database) -> None:
    store = make_store(plain.url)
    with pytest.raises(StoreRefused, match="owner of the (table events|database)") as refusal:
        store.partition_events()
    assert "\n" not in str(refusal.value)


def test_the_partitioned_layout_is_the_committed_one_and_its_check_is_clean(
    converted: Database,
) -> None:
    name = schema.shape_file(converted.backend, "partitioned")
    committed = schema.schema_file(name).read_text(encoding="utf-8")
    assert shape(converted) == committed, "run `python -m tests.shapes`"
    found = make_store(converted.url).check()
    assert [one for one in found if one.check == "drift" and one.level is not Level.OK] == []
    assert [one for one in found if one.level is Level.PROBLEM] == []
    assert [one.level for one in found if one.check == "partitions"] == [Level.OK]
    owner = converted.owner()
    assert owner.apply_schema() is False
    assert owner.upgrade_schema() == []


def test_a_check_tells_when_no_partitions_are_left(
    converted: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.time() + 100 * 86_400
    with monkeypatch.context() as patch:
        patch.setattr(doctor.time, "time", lambda: later)
        found = [one for one in make_store(converted.url).check() if one.check == "partitions"]
    assert [one.level for one in found] == [Level.WARNING]
    assert "run `contextuate-persist partition`" in found[0].advice


@pytest.mark.only("mysql")
def test_the_layout_is_that_of_the_tables_if_it_was_not_recorded_yet(
    partitioned: Database,
) -> None:
    partitioned.execute("UPDATE schema_version SET layout = 'plain'")
    with make_store(partitioned.url) as store:
        assert store.health().schema_layout == "partitioned"
        store.save_event(event("s"))
    partitioned.owner().partition_events()
    assert partitioned.execute("SELECT layout FROM schema_version")[0][0] == "partitioned"


def test_the_sql_of_pruning_leaves_no_ids(partitioned: Database) -> None:
    with make_store(partitioned.url) as store:
        store.save_session(session("a", end_time=T0 + DAY, status="completed"))
        store.save_events([event("a", T0 + n * 40 * DAY) for n in range(3)])
        store.save_event(event("b", T0 + 900 * DAY))
        if partitioned.backend == "postgresql":
            partitioned.execute(f"SELECT prune_old_sessions({T0 + 500 * DAY})")
        else:
            partitioned.execute(f"CALL prune_old_sessions({T0 + 500 * DAY}, @pruned)")
        assert [one.session_id for one in store.get_sessions()] == ["b"]
    assert len(check_whole(partitioned)) == 1


class Clock:
    """Time that goes on only when it is slept or tried through."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Refusals:
    """A session whose tries all fail, for a reason that passes."""

    place = "here"

    def passing(self, error: Exception) -> bool:
        return isinstance(error, TimeoutError)


def test_others_have_most_of_the_time_in_which_a_lock_is_asked_for_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(partitions, "time", clock)
    session: Any = Refusals()

    def work(lasting: list[float]) -> str:
        if not lasting:
            return "done"
        clock.now += lasting.pop(0)
        raise TimeoutError

    left = [0.0, 0.01, 0.1, 1.0, 5.0, 5.0, 10.0]
    assert partitions._patiently(session, lambda: work(left)) == "done"
    assert all(0.1 <= pause <= 0.6 for pause in clock.pauses[:2])
    assert clock.pauses[3:] == pytest.approx([5.0, 25.0, 25.0, 50.0])
    # A long one is no reason for a pause of many minutes, and there is an end to all patience.
    begun = clock.now
    left = [100.0, 5.0] * 9
    with pytest.raises(TimeoutError):
        partitions._patiently(session, lambda: work(left))
    assert clock.pauses[7:] == pytest.approx([60.0, 25.0, 60.0])
    assert 300 < clock.now - begun < 400


# --- The calendar ---------------------------------------------------------------------------------


def test_periods_follow_each_other_without_a_gap() -> None:
    for by in partitions.AHEAD:
        spans = partitions.periods(by, T0, T0 + 800 * DAY)  # type: ignore[arg-type]
        assert spans[0].start <= T0 < spans[0].end
        assert spans[-1].start <= T0 + 800 * DAY < spans[-1].end
        assert all(one.end == other.start for one, other in itertools.pairwise(spans))
    assert [one.suffix for one in partitions.periods("month", T0, T0 + 80 * DAY)] == [
        "20231101", "20231201", "20240101", "20240201",
    ]  # fmt: skip
    assert partitions.periods("week", T0, T0)[0].suffix == "20231113"  # a Monday
    assert partitions.periods("day", T0, T0)[0].suffix == "20231114"
    assert partitions.periods("day", T0, T0 - DAY) == []


@pytest.mark.parametrize("by", ["month", "week", "day"])
def test_the_unit_is_told_by_the_partitions(plain: Database, by: partitions.Unit) -> None:
    with make_store(plain.url) as store:
        store.save_event(event("s", time.time_ns() // 1_000_000 - 40 * DAY))
    owner = plain.owner()
    assert owner.partitions() == []
    owner.partition_events(by)
    found = owner.partitions()
    assert partitions.unit_of(found) == by
    assert (found[0].start, found[-1].end) == (None, None)
    assert [one.start for one in found[1:]] == [one.end for one in found[:-1]]
    now = time.time_ns() // 1_000_000
    coming = [one for one in found[:-1] if one.start is not None and one.start > now]
    assert len(coming) == partitions.AHEAD[by]


# --- Adding and dropping --------------------------------------------------------------------------


def test_events_of_the_future_move_into_their_partition_when_it_comes(
    converted: Database,
) -> None:
    now = time.time_ns() // 1_000_000
    far = [event("s", now + days * DAY) for days in (10, 80, 100, 130, 4000)]
    old = event("s", 100_000_000_000)
    owner = converted.owner()
    with make_store(converted.url) as store:
        store.save_events([*far, old])
        added = owner.add_partitions(6)
        assert len(added) == 5
        assert owner.add_partitions(6) == []
        assert store.get_events("s") == [old, *far]
        for one in far:
            assert store.get_event_by_id("s", one.id) == one
            assert store.save_event(one) is False
    name = owner.partitions()[-1].name
    rest = name if converted.backend == "postgresql" else f"events PARTITION ({name})"
    assert converted.execute(f"SELECT count(*) FROM {rest}")[0][0] == 1
    check_whole(converted)


def test_what_is_not_partitioned_has_no_partitions_to_add_or_drop(plain: Database) -> None:
    with pytest.raises(ConfigurationError, match="not partitioned"):
        plain.owner().add_partitions()
    with pytest.raises(ConfigurationError, match="not partitioned"):
        plain.owner().drop_partitions(RECENT)


def month(days: float) -> int:
    """A time in the month so many days after that of T0 began."""
    return partitions.period("month", T0).start + round(days * DAY)


def ended(name: str, days: float, **fields: Any) -> Any:
    start = month(days)
    return session(name, start_time=start, end_time=start + 1000, status="completed", **fields)


def names_of(database: Database) -> set[str]:
    return {one.name.split("_")[-1] for one in database.owner().partitions()}


def test_a_partition_whose_sessions_are_all_due_is_dropped_with_them(
    partitioned: Database,
) -> None:
    with make_store(partitioned.url) as store:
        store.save_sessions([ended("a", 5), ended("b", 6), ended("c", 40)])
        store.save_events([event(name, month(6)) for name in "ab" for _ in range(50)])
        store.save_events([event("b", month(33)), *(event("c", month(40)) for _ in range(5))])
        late = store.get_events("a")[3]
        dropped = partitioned.owner().drop_partitions(month(32))
        assert [name.split("_")[-1] for name in dropped.partitions] == ["20231101"]
        assert (dropped.sessions, dropped.kept) == (2, {})
        assert dropped.longest_wait_ms > 0
        assert [one.session_id for one in store.get_sessions()] == ["c"]
        assert store.save_event(late) is False
        assert store.save_events([late, event("b", month(33))]) == 0
        assert store.save_event(event("c", month(4)))  # there is a place for it
        assert len(store.get_events("c")) == 6
    assert "20231101" not in names_of(partitioned)
    assert len(check_whole(partitioned)) == 6
    assert len(partitioned.execute("SELECT * FROM deleted_sessions")) == 2


def test_what_is_older_than_all_partitions_is_dropped_as_well(partitioned: Database) -> None:
    with make_store(partitioned.url) as store:
        store.save_session(ended("a", -400))
        store.save_events([event("a", month(-400)) for _ in range(5)])
        assert len(partitioned.owner().drop_partitions(month(0)).partitions) == 1
        assert store.get_sessions() == []
        assert store.save_event(event("b", month(-300)))
        assert partitioned.owner().drop_partitions(month(-10)).partitions == ()
    assert "older" in names_of(partitioned)
    check_whole(partitioned)


def test_pruning_as_the_owner_drops_whole_partitions_and_else_deletes_row_by_row(
    partitioned: Database,
) -> None:
    age = (time.time_ns() // 1_000_000 - month(32)) / DAY
    policy = RetentionPolicy(max_age_days=age)
    with make_store(partitioned.url) as store, partitioned.owner() as owner:
        for account, gone in ((store, set()), (owner, {"20231101"})):
            store.save_sessions([ended("a", 5), ended("c", 40)], undelete=True)
            events = [event("a", month(6)) for _ in range(50)]
            store.save_events([*events, event("c", month(40))], undelete=True)
            before = names_of(partitioned)
            report = prune(account, policy)
            assert (report.sessions, report.kept, report.spared) == (1, 1, 0)
            assert [one.session_id for one in store.get_sessions()] == ["c"]
            assert before - names_of(partitioned) == gone
    check_whole(partitioned)


def test_pruning_drops_no_partition_of_a_session_that_got_events_since_its_end(
    partitioned: Database,
) -> None:
    now = time.time_ns() // 1_000_000
    policy = RetentionPolicy(max_age_days=(now - month(32)) / DAY)
    with make_store(partitioned.url) as store, partitioned.owner() as owner:
        store.save_sessions([ended("a", 5), ended("goes on", 5)])
        store.save_events([event(name, month(6)) for name in ("a", "goes on")])
        store.save_event(event("goes on", now))
        before = names_of(partitioned)
        assert prune(owner, policy).sessions == 1
        assert [one.session_id for one in store.get_sessions()] == ["goes on"]
        assert len(store.get_events("goes on")) == 2
        assert names_of(partitioned) == before
        assert prune(owner, RetentionPolicy(max_age_days=36_500)).sessions == 0
    check_whole(partitioned)


def test_a_session_that_goes_on_long_after_its_end_while_its_partition_is_dropped_is_kept(
    partitioned: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns() // 1_000_000
    policy = RetentionPolicy(max_age_days=(now - month(32)) / DAY)
    events = [*(event("a", month(6)) for _ in range(5)), event("a", now)]
    settle = partitions._settle
    with make_store(partitioned.url) as store, partitioned.owner() as owner:
        store.save_session(ended("a", 5))
        store.save_events(events[:-1])

        def go_on_first(*arguments: Any) -> int:
            store.save_event(events[-1])
            return settle(*arguments)

        monkeypatch.setattr(partitions, "_settle", go_on_first)
        assert prune(owner, policy).sessions == 0
        assert store.get_events("a") == events
    check_whole(partitioned)


def test_the_ids_of_dropped_events_go_page_by_page(
    partitioned: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "_BATCH_IDS", 7)
    with partitioned.owner()._partition_session(60) as opened:
        kind = type(opened)
    forget, left = kind.forget_ids, []

    def forget_and_count(self: partitions.PartitionSession, after: Any, rows: int) -> Any:
        place = forget(self, after, rows)
        left.append(len(ids_of(partitioned, "event_ids")))
        return place

    monkeypatch.setattr(kind, "forget_ids", forget_and_count)
    with make_store(partitioned.url) as store:
        store.save_sessions([ended(name, 5) for name in "abc"])
        for n in range(60):  # not in the order of the pages, and some at the same time
            store.save_event(event("cab"[n % 3], month(6) - n // 6))
        assert partitioned.owner().drop_partitions(month(32)).sessions == 3
    assert left == [*range(53, 0, -7), 0, 0]
    assert check_whole(partitioned) == []


def test_where_an_archive_is_kept_only_empty_partitions_are_dropped(
    partitioned: Database, tmp_path: Path
) -> None:
    """What became due since the archiving is in no archive yet."""
    policy = RetentionPolicy(max_age_days=(time.time_ns() // 1_000_000 - month(32)) / DAY)
    with make_store(partitioned.url) as store, partitioned.owner() as owner:
        store.save_sessions([ended("a", 5), ended("c", 40)])
        store.save_events([event("a", month(6)), event("c", month(40))])
        kept = owner.drop_partitions(month(32), empty=True).kept
        assert [(name[-8:], sessions) for name, sessions in kept.items()] == [("20231101", 1)]
        assert len(store.get_events("a")) == 1
        found = maintain(owner, "monthly", Tasks(archives=tmp_path, policy=policy))
        (told,) = [one for one in found if one.check == "partitions"]
        assert "20231101" in told.message
        assert [one.session_id for one in store.get_sessions()] == ["c"]
        assert len(list(tmp_path.glob("*.jsonl.gz"))) == 1
    check_whole(partitioned)


@pytest.mark.parametrize("why", ["pinned", "parent", "going on"])
def test_a_partition_keeps_its_events_if_one_session_is_not_due(
    partitioned: Database, why: str
) -> None:
    with make_store(partitioned.url) as store:
        store.save_sessions([ended("a", 5), ended("b", 6)])
        store.save_events([event(name, month(6)) for name in "ab" for _ in range(5)])
        if why == "pinned":
            store.update_session("b", is_pinned=True)
        elif why == "parent":
            store.save_session(ended("p", 50))
            store.update_session("b", parent_session_id="p")
        else:
            store.update_session("b", status="active", end_time=None)
            store.save_event(event("b", month(60)))
        dropped = partitioned.owner().drop_partitions(month(32))
        assert dropped.partitions == ()
        assert list(dropped.kept.values()) == [1]
        assert len(store.get_events("a")) == 5
        # What is due of it goes row by row, as everywhere.
        assert store.prune_old_sessions(month(32)) == 1
    check_whole(partitioned)


def test_a_time_whose_partition_was_dropped_between_others_still_has_a_place(
    partitioned: Database,
) -> None:
    with make_store(partitioned.url) as store, partitioned.owner() as owner:
        store.save_sessions([ended("a", 5, is_pinned=True), ended("b", 35), ended("c", 65)])
        store.save_events([event(*one) for one in zip("abc", map(month, (5, 35, 65)), strict=True)])
        dropped = owner.drop_partitions(month(92))
        assert [name[-8:] for name in dropped.partitions] == ["20231201", "20240101"]
        late = [event("a", month(day)) for day in (-50, 5, 36, 66, 4000)]
        assert store.save_event(late[2])
        assert store.save_events(late) == 4
        assert owner.drop_partitions(month(92)).partitions == ()
        assert len(check_whole(partitioned)) == 6
        # Once nothing older is left, the empty ones go, too.
        store.delete_session("a")
        owner.drop_partitions(month(92))
        assert not {"20231101", "20231201", "20240101"} & names_of(partitioned)
        assert store.save_event(event("d", month(36)))
    assert len(check_whole(partitioned)) == 1


def test_partitions_come_and_go_while_others_write_and_read(converted: Database) -> None:
    with (
        make_store(converted.url) as store,
        converted.owner() as owner,
        Writers(converted) as writers,
    ):
        for ahead in (3, 6, 9):
            owner.add_partitions(ahead)
            # Nothing is so old: what the writers leave stays, and empty months go.
            owner.drop_partitions(RECENT - 90 * DAY)
            assert len(store.get_all_recent_events(50)) == 50
    assert writers.failures == []
    assert check_whole(converted) == hexes(writers.kept)


def test_what_a_killed_command_left_of_a_replaced_partition_is_dropped_by_the_next(
    partitioned: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    if partitioned.backend != "postgresql":
        pytest.skip("MySQL replaces no partition")
    from contextuate_persist.postgresql_store import PostgreSQLPartitions  # noqa: PLC0415

    def left() -> bool:
        return bool(partitioned.execute("SELECT to_regclass('events_replaced')")[0][0])

    tidy = PostgreSQLPartitions.tidy

    def stop_where_something_is_left(session: PostgreSQLPartitions) -> None:
        if left():
            raise KeyboardInterrupt
        tidy(session)

    now = time.time_ns() // 1_000_000
    events = [event("s", month(6)), event("t", now), event("t", now + 40 * DAY)]
    with make_store(partitioned.url) as store, partitioned.owner() as owner:
        store.save_events(events)
        store.save_session(ended("s", 6))
        for work in (lambda: owner.add_partitions(2), lambda: owner.drop_partitions(month(32))):
            with monkeypatch.context() as patch:
                patch.setattr(PostgreSQLPartitions, "tidy", stop_where_something_is_left)
                with pytest.raises(KeyboardInterrupt):
                    work()
            assert left()
            assert store.save_events(events, undelete=False) == 0
            with pytest.raises(StoreUnavailable, match="made or dropped"):
                store.forget(session_id="s")
            work()
            assert not left()
        assert store.get_events("t") == events[1:]
    assert len(check_whole(partitioned)) == 2


@pytest.mark.parametrize("what", ["pin", "kept", "event", "other", "delete", "anew"])
def test_a_session_that_changes_while_its_partition_is_dropped_keeps_its_events(
    partitioned: Database, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = partitions._finish
    with make_store(partitioned.url) as store:
        store.save_sessions([ended("a", 5), ended("b", 6)])
        store.update_session("b", status="active", end_time=None)
        events = [event("b", month(6)) for _ in range(5)]
        store.save_events([*events, *(event("a", month(6)) for _ in range(5))])
        new = event("b", month(6 if what == "other" else 5000 if what == "anew" else 500))
        if what == "kept":  # of a copy, whose source has deleted it
            store.add_deletions([("b", month(7))])

        def change_first(*arguments: Any) -> int:
            if what in ("pin", "kept"):
                store.update_session("b", is_pinned=True)
            elif what == "delete":
                store.delete_session("b")
            elif what == "anew":
                store.delete_session("b")
                store.save_event(new)
            else:
                store.save_event(new)
            return finish(*arguments)

        monkeypatch.setattr(partitions, "_finish", change_first)
        dropped = partitioned.owner().drop_partitions(month(32))
        assert len(dropped.partitions) == 1
        if what in ("pin", "kept"):
            assert store.get_events("b") == events
        elif what == "anew":
            assert store.get_events("b") == [new]
        elif what == "event":
            assert store.get_events("b") == [*events, new]
        else:
            assert store.get_sessions() == []
        assert store.save_events(events) == 0
    check_whole(partitioned)


@pytest.mark.parametrize("what", ["reader", "writer"])
def test_what_others_do_between_the_two_steps_of_a_drop_on_mysql_costs_no_event(
    partitioned: Database, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if partitioned.backend != "mysql":
        pytest.skip("PostgreSQL drops in one step")
    from contextuate_persist.mysql_store import MySQLPartitions, _execute  # noqa: PLC0415

    events = [event(name, month(6)) for name in "ab" for _ in range(5)]
    late = event("c", month(7))
    locked = MySQLPartitions._locked
    calls: list[bytes] = []
    with make_store(partitioned.url) as store, contextlib.ExitStack() as stack:
        store.save_sessions([ended("a", 5), ended("b", 6)])
        store.save_events(events)

        def come_between(session: MySQLPartitions, statement: bytes) -> Any:
            calls.append(statement)
            if len(calls) == 1:
                store.update_session("b", is_pinned=True)
                if what == "writer":
                    assert store.save_event(late)
                else:  # for longer than the lock is waited for
                    connection = stack.enter_context(store._connection(True))
                    _execute(connection, "SELECT e.seq FROM events AS e LIMIT 1")
            else:
                stack.close()
            return locked(session, statement)

        monkeypatch.setattr(MySQLPartitions, "_locked", come_between)
        monkeypatch.setattr(partitions, "_PAUSE_PER_TRY", 0)
        dropped = partitioned.owner().drop_partitions(month(32))
        assert len(dropped.partitions) == 1
        assert len(calls) == (1 if what == "writer" else 2)
        assert store.get_events("a") == []
        assert store.get_events("b") == events[5:]
        assert store.get_events("c") == ([late] if what == "writer" else [])
    check_whole(partitioned)


@pytest.mark.only("mysql")
def test_a_partition_is_taken_out_without_a_look_at_its_rows(
    partitioned: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EXCHANGE tries the rules of the table that takes it on each row, while nobody can write."""
    from contextuate_persist.mysql_store import MySQLPartitions, _unprepared  # noqa: PLC0415

    retire = MySQLPartitions.retire
    looked: list[int] = []

    def rows_read(session: MySQLPartitions) -> int:
        status = _unprepared(
            session._connection, "SHOW SESSION STATUS LIKE 'Handler_read_rnd_next'"
        )
        return int(status[0][1])

    def counted(session: MySQLPartitions, partition: partitions.Partition) -> None:
        before = rows_read(session)
        retire(session, partition)
        looked.append(rows_read(session) - before)

    monkeypatch.setattr(MySQLPartitions, "retire", counted)
    with make_store(partitioned.url) as store:
        store.save_session(ended("a", 5))
        store.save_events([event("a", month(6), data={"n": n}) for n in range(3000)])
        assert len(partitioned.owner().drop_partitions(month(32)).partitions) == 1
        assert store.get_session("a") is None
    assert len(looked) == 1
    assert looked[0] < 2000
    check_whole(partitioned)


def test_the_planner_gets_statistics_of_the_whole_table_every_week(converted: Database) -> None:
    if converted.backend != "postgresql":
        pytest.skip("MySQL counts partitions with their table")
    analyzed = "SELECT last_analyze FROM pg_stat_all_tables WHERE relname = 'events'"
    with converted.owner() as owner:
        owner.save_events([event("s", RECENT + n) for n in range(20)])
        (told,) = [one for one in maintain(owner, "weekly", Tasks()) if one.check == "statistics"]
    assert told.level is Level.OK
    assert "events_" not in told.message
    assert converted.execute(analyzed)[0][0] is not None
    counted = "SELECT sum(reltuples) FROM pg_class WHERE relname = 'events_older'"
    assert converted.execute(counted)[0][0] == 20


def test_the_last_dated_partition_stays_for_it_tells_how_long_they_are(plain: Database) -> None:
    with plain.owner()._partition_session(60) as session:
        session.prepare(partitions.periods("week", T0, T0 + 15 * DAY))
        session.switch(0)
    plain.owner().discard_unpartitioned()
    with make_store(plain.url) as store, plain.owner() as owner:
        store.save_events([event(f"s{n}", T0 + n * 7 * DAY) for n in range(3)])
        assert len(owner.drop_partitions(RECENT).partitions) == 2
        assert partitions.unit_of(owner.partitions()) == "week"
        assert [one.session_id for one in store.get_sessions()] == ["s2"]
    check_whole(plain)


def test_adding_partitions_fills_what_only_a_default_one_covered(partitioned: Database) -> None:
    """PostgreSQL's layout as it was: restored from a backup of that time, say."""
    if partitioned.backend != "postgresql":
        pytest.skip("MySQL has no DEFAULT partition")
    for statement in (
        "ALTER TABLE events DETACH PARTITION events_rest",
        "ALTER TABLE events ATTACH PARTITION events_rest DEFAULT",
        "ALTER TABLE events DETACH PARTITION events_20240101",
        "DROP TABLE events_20240101",
    ):
        partitioned.execute(statement)
    events = [event("s", month(days)) for days in (5, 70, 4000)]
    with make_store(partitioned.url) as store, partitioned.owner() as owner:
        store.save_events(events)
        owner.add_partitions(1)
        found = owner.partitions()
        assert [one.start for one in found[1:]] == [one.end for one in found[:-1]]
        assert store.get_events("s") == events
        assert store.save_event(event("s", month(71)))
    check_whole(partitioned)


def test_a_drop_that_was_killed_goes_on_when_run_again(
    partitioned: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_store(partitioned.url) as store:
        store.save_sessions([ended("a", 5), ended("b", 6), ended("c", 7)])
        store.save_events([event(name, month(6)) for name in "abc" for _ in range(5)])
        for step in ("_finish", "_settle"):
            with killed(monkeypatch, step):
                partitioned.owner().drop_partitions(month(32))
        # Its events are in a table beside.
        with pytest.raises(StoreUnavailable, match="made or dropped"):
            store.forget(machine_id="m")
        store.update_session("c", is_pinned=True)
        assert partitioned.owner().drop_partitions(month(32)).sessions == 2
        assert [one.session_id for one in store.get_sessions()] == ["c"]
        assert len(store.get_events("c")) == 5
    assert len(check_whole(partitioned)) == 5


def test_a_drop_that_waits_in_vain_leaves_nothing_aside(
    partitioned: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "_PATIENCE_SECONDS", 0)
    with make_store(partitioned.url) as store:
        store.save_session(ended("a", 5))
        store.save_event(event("a", month(6)))
        with contextlib.closing(partitioned.server._connect(partitioned.name)) as reader:
            cursor = reader.cursor()
            cursor.execute("BEGIN")
            cursor.execute("SELECT count(*) FROM events")
            assert cursor.fetchall() == [(1,)]
            with pytest.raises((StoreUnavailable, StoreRefused)):
                partitioned.owner().drop_partitions(month(32))
            store.require_all_events()
            assert len(store.get_events("a")) == 1
    assert partitioned.owner().drop_partitions(month(32)).sessions == 1


def test_a_drop_that_was_killed_goes_on_by_other_bounds_without_harm(
    partitioned: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions whose last events lie aside are judged with them."""

    with make_store(partitioned.url) as store:
        store.save_sessions([session("s", start_time=month(5)), ended("gone", 5)])
        store.save_events([event("s", month(5)), event("s", month(29)), event("gone", month(6))])
        with killed(monkeypatch, "_settle"):
            partitioned.owner().drop_partitions(month(60))
        assert store.get_events("s") == []
        states = store.session_states()
        with pytest.raises(StoreUnavailable, match="made or dropped"):
            store.prune_old_sessions(month(20))
        with pytest.raises(StoreUnavailable, match="made or dropped"):
            store.delete_unchanged([one for one in states if one.session_id == "s"])
        assert partitioned.owner().drop_partitions(month(20)).sessions == 0
        assert [one.timestamp for one in store.get_events("s")] == [month(5), month(29)]
        assert store.prune_old_sessions(month(20)) == 1
        assert [one.session_id for one in store.get_sessions()] == ["s"]
    assert len(check_whole(partitioned)) == 2


@pytest.mark.parametrize("call", ["prune_old_sessions", "forget"])
def test_many_events_go_in_slices_from_the_old_table_too(
    plain: Database, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("contextuate_persist.base.DELETE_ROWS", 10)
    monkeypatch.setattr("contextuate_persist.base._DELETE_EVENTS", 10)
    with make_store(plain.url) as store:
        store.save_session(ended("s", 5))
        store.save_events([event("s", T0 + n) for n in range(25)])
        plain.owner().partition_events("month", ahead=1)
        slices: dict[str, list[int]] = {}

        def sliced(name: str) -> Callable[..., int]:
            delete = getattr(store, name)

            def call(*args: Any, **rest: Any) -> int:
                slices.setdefault(name, []).append(delete(*args, **rest))
                return slices[name][-1]

            return call

        for name in ("_delete_some_events", "_delete_some_copies"):
            monkeypatch.setattr(store, name, sliced(name))
        if call == "forget":
            assert store.forget(session_id="s").events == 25
        else:
            assert store.prune_old_sessions(month(20)) == 1
    assert slices == {
        "_delete_some_events": [10, 10, 5],
        "_delete_some_copies": [10, 10, 5],
    }
    assert plain.execute("SELECT COUNT(*) FROM events_unpartitioned") == [(0,)]


def test_many_events_go_in_slices_from_what_a_conversion_has_copied(
    plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PostgreSQL's foreign key they would go in the statement that deletes the session."""
    monkeypatch.setattr("contextuate_persist.base.DELETE_ROWS", 10)
    copy = partitions._copy

    def copy_and_stop(*args: Any, **rest: Any) -> Any:
        copy(*args, **rest)
        raise KeyboardInterrupt

    with make_store(plain.url) as store:
        store.save_session(ended("s", 5))
        events = [event("s", T0 + n) for n in range(25)]
        store.save_events([*events, event("t", T0)])
        with monkeypatch.context() as patch:
            patch.setattr(partitions, "_copy", copy_and_stop)
            with pytest.raises(KeyboardInterrupt):
                plain.owner().partition_events("month", ahead=1)
        delete, slices = store._delete_some_copies, []

        def sliced(*args: Any) -> int:
            slices.append(delete(*args))
            return slices[-1]

        monkeypatch.setattr(store, "_delete_some_copies", sliced)
        store.delete_session("s")
        plain.owner().partition_events("month", ahead=1)
        assert store.save_events(events) == 0
        assert len(store.get_events("t")) == 1
    assert slices == ([10, 10, 5] if plain.backend == "postgresql" else [0])
    check_whole(plain)


def test_a_later_migration_leaves_the_layout_as_it_is(converted: Database) -> None:
    with converted.owner()._schema_session(60) as session:
        session.record(schema.SCHEMA_VERSION + 1, "more", None)
        found = session.read_version()
        assert found is not None
        assert (found.version, found.layout) == (schema.SCHEMA_VERSION + 1, "partitioned")


def test_no_seq_is_given_out_again_after_a_conversion(plain: Database) -> None:
    with make_store(plain.url) as store:
        store.save_event(event("kept"))
        store.save_events([event("deleted", T0 + n) for n in range(5)])
        last = store.get_events("deleted")[-1].cursor
        store.delete_session("deleted")
        plain.owner().partition_events("month", ahead=1)
        new = event("kept", last.timestamp)
        store.save_event(new)
        assert store.find_events(after=last, newest_first=False) == [new]


def test_nothing_is_archived_copied_or_backed_up_while_events_lie_aside(
    partitioned: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: servers.Server
) -> None:
    other = new_database(server)
    other.owner().apply_schema()
    with make_store(partitioned.url) as store, make_store(other.url) as target:
        store.save_sessions([ended("a", 5), ended("b", 6)])
        store.save_events([event(name, month(6)) for name in "ab" for _ in range(5)])
        with killed(monkeypatch, "_finish"):
            partitioned.owner().drop_partitions(month(32))
        states = store.session_states()
        refused: list[Callable[[], object]] = [
            lambda: archive(store, tmp_path / "archive", RetentionPolicy()),
            # What a run that had begun before it would go on with.
            lambda: store.delete_unchanged(states, store.fingerprints(["a", "b"])),
            lambda: backup(store, tmp_path / "file.backup"),
            lambda: copy_store(store, target),
            lambda: copy_store(target, store),
        ]
        for call in refused:
            with pytest.raises(StoreUnavailable, match="made or dropped"):
                call()
        store.update_session("a", is_pinned=True)
        assert partitioned.owner().drop_partitions(month(32)).sessions == 1
        assert copy_store(store, target).problem_count == 0
        assert len(target.get_events("a")) == 5
        assert target.get_sessions() == store.get_sessions()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix]
    other.drop()


@pytest.mark.only("postgresql")
def test_the_locks_of_a_read_are_counted_as_the_server_does(
    partitioned: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    with make_store(partitioned.url) as store:
        select = store._select_events

        def counted(connection: Any, *args: Any, **rest: Any) -> Any:
            with connection.transaction():
                found = select(connection, *args, **rest)
                held.append(connection.execute(HELD).fetchall()[0][0])
            return found

        monkeypatch.setattr(store, "_select_events", counted)
        store.get_events("s")
        [(each, _, _)] = store._examine().answers["locks"] or []
    assert held == [each]


HELD = """
SELECT count(*) FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation
WHERE l.pid = pg_backend_pid() AND c.relnamespace = current_schema()::regnamespace
"""


def test_more_partitions_than_the_server_has_locks_for_are_warned_of(
    plain: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_store(plain.url) as store:
        store.save_event(event("s", RECENT))
    assert main(["--url", plain.owner_url, "partition", "--by", "day"]) == 0
    told = capsys.readouterr().err
    if plain.backend == "mysql":
        assert "locks" not in told
        assert [level for level, _ in told_of_partitions(plain)] == [Level.OK]
        return
    [(slots, room, each)] = plain.execute(LOCKS)
    level, message = told_of_partitions(plain)[0]
    if each * 10 <= room * slots * 2:  # an external server that is set up for them
        assert level is Level.OK
        return
    assert level is Level.WARNING
    assert f"warning: {message}\n" in told
    enough = int(message.split("max_locks_per_transaction to ")[1].split(",")[0])
    assert enough * slots * 2 >= each * 10 > (enough - 64) * slots * 2


LOCKS = """
SELECT
    current_setting('max_connections')::integer
        + current_setting('max_prepared_transactions')::integer,
    current_setting('max_locks_per_transaction')::integer,
    (SELECT count(*) * 13 + 13 FROM pg_inherits WHERE inhparent = 'events'::regclass)
"""


def told_of_partitions(database: Database) -> list[tuple[Level, str]]:
    with make_store(database.url) as store:
        found = [one for one in maintain(store, "daily") if one.check == "partitions"]
    return [(one.level, str(one)) for one in found]


def told_after_a_kill(database: Database) -> tuple[Level, str]:
    """The first of them, once the server has noticed that the command is gone."""
    deadline = time.monotonic() + 10
    while "just now" in (told := told_of_partitions(database)[0])[1]:
        assert time.monotonic() < deadline
    return told


@pytest.mark.parametrize("again", ["partition", "maintain monthly", "prune"])
def test_a_drop_that_was_interrupted_is_a_problem_until_it_is_done_again(
    partitioned: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    meanwhile: list[tuple[Level, str]] = []

    def look() -> None:
        meanwhile.extend(told_of_partitions(partitioned))

    with make_store(partitioned.url) as store, partitioned.owner() as owner:
        store.save_sessions([ended("a", 5), ended("b", 6)])
        store.save_events([event(name, month(6)) for name in "ab" for _ in range(5)])
        with killed(monkeypatch, "_finish", look):
            partitioned.owner().drop_partitions(month(32))
        assert meanwhile[0] == (Level.OK, "they are being made or dropped just now")
        assert store.get_events("a") == []
        level, told = told_after_a_kill(partitioned)
        assert level is Level.PROBLEM
        assert "no reader sees them" in told
        assert "run `contextuate-persist partition` again, as the database's owner" in told
        if again == "prune":
            owner.drop_partitions(month(32))
        else:
            if again == "partition":
                owner.partition_events(ahead=1)
            else:
                # What lies aside is not missing in the archive of the same run.
                policy = RetentionPolicy(max_age_days=36_500)
                tasks = Tasks(archives=tmp_path / "archive", policy=policy)
                found = maintain(owner, "monthly", tasks)
                assert Level.PROBLEM not in [one.level for one in found]
            assert [len(store.get_events(name)) for name in "ab"] == [5, 5]
        assert Level.PROBLEM not in [level for level, _ in told_of_partitions(partitioned)]
    check_whole(partitioned)


def test_a_conversion_that_was_interrupted_is_warned_of(
    plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile: list[tuple[Level, str]] = []

    def look() -> None:
        meanwhile.extend(told_of_partitions(plain))

    with killed(monkeypatch, "_copy", look):
        plain.owner().partition_events("month", ahead=1)
    assert meanwhile == [(Level.OK, "they are being made or dropped just now")]
    level, told = told_after_a_kill(plain)
    assert level is Level.WARNING
    assert "events_partitioned: run `contextuate-persist partition` again" in told
    plain.owner().partition_events("month", ahead=1)
    # The old table, that is kept on purpose, is no reason to warn.
    assert [level for level, _ in told_of_partitions(plain)] == [Level.OK]


# --- Plans ----------------------------------------------------------------------------------------


def test_an_event_by_id_and_a_span_of_time_read_their_partitions_only(
    partitioned: Database,
) -> None:
    events = [event("s", month(35 * number)) for number in range(12)]
    with make_store(partitioned.url) as store:
        store.save_events(events)
        assert store.get_event_by_id("s", events[3].id) == events[3]
        asked = [store.get_events("s", limit=3), store.get_all_recent_events(3)]
        assert asked == [events[-3:], events[:-4:-1]]
    if partitioned.backend == "postgresql":
        from contextuate_persist import postgresql_store as module  # noqa: PLC0415

        # One after the other until there are enough.
        last = "ORDER BY timestamp DESC, seq DESC LIMIT 3"
        for query in (f"WHERE session_id = 's' {last}", last):
            plan = partitioned.execute(
                f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {module.SELECT_EVENTS} {query}"
            )
            assert not any("Merge Append" in line or "Sort" in line for (line,) in plan)
        by_id = module.SELECT_PARTITIONED_EVENT % {
            "id": f"'{events[3].id}'::uuid", "session_id": "'s'",
        }  # fmt: skip
        plan = partitioned.execute(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {by_id}")
        read = [line for (line,) in plan if " on events_" in line and "never executed" not in line]
        assert len(read) == 1
        query = f"SELECT * FROM events WHERE timestamp BETWEEN {month(36)} AND {month(40)}"
        plan = partitioned.execute(f"EXPLAIN (COSTS OFF) {query}")
        assert len([line for (line,) in plan if " on events_" in line]) == 1
        return
    from contextuate_persist import mysql_store  # noqa: PLC0415

    by_id = mysql_store.SELECT_PARTITIONED_EVENT.replace("%(id)s", f"'{events[3].id}'").replace(
        "%(session_id)s", "'s'"
    )
    query = f"SELECT * FROM events WHERE timestamp BETWEEN {month(36)} AND {month(40)}"
    for statement in (by_id, query):
        plan = partitioned.execute(f"EXPLAIN FORMAT=TRADITIONAL {statement}")
        read = [row[3] for row in plan if row[2] in ("e", "events")]
        assert read == ["p_20231201" if statement is query else "p_20240201"]


def test_pages_go_on_over_the_borders_of_partitions(partitioned: Database) -> None:
    events = [event(f"s{n % 3}", month(n * 4 // 8 * 8)) for n in range(60)]
    with make_store(partitioned.url) as store:
        store.save_events(events)
        found: list[MonitorEvent] = []
        before = None
        while page := store.find_events(before=before, limit=7):
            found += page
            before = page[-1].cursor
        assert len(found) == len({one.id for one in found}) == 60
        assert [one.timestamp for one in found] == sorted(
            (one.timestamp for one in events), reverse=True
        )
        assert [one.id for one in store.iter_events()] == [one.id for one in found[::-1]]


# --- The command ----------------------------------------------------------------------------------


def test_the_command_partitions_lists_and_discards(
    plain: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_store(plain.url) as store:
        store.save_event(event("s", RECENT))

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["--url", plain.owner_url, "partition", *words])
        return status, *capsys.readouterr()

    assert run("--list")[:2] == (0, "")
    status, out, err = run("--by", "month", "--ahead", "1")
    assert (status, "partitioned by month" in out, "ms at most" in out) == (0, True, True)
    assert "--discard-old" in err
    assert run()[1].startswith("events is partitioned by month already; added ")
    assert run()[1] == "events is partitioned by month already: nothing to do\n"
    record = json.loads(run("--json")[1])
    assert (record["converted"], record["by"], record["added"]) == (False, "month", [])
    listed = [json.loads(line) for line in run("--list", "--json")[1].splitlines()]
    assert set(listed[0]) == {"name", "start", "end", "rows", "bytes"}
    assert run("--list")[1].startswith("PARTITION")
    status, out, err = run("--by", "day")
    assert (status, out, err.count("\n")) == (1, "", 2)  # the other line warns of the password
    assert run("--discard-old")[1] == "events_unpartitioned dropped\n"
    assert run("--discard-old", "--json")[1] == '{"changed":false}\n'
    status = main(["--url", plain.url, "partition"])
    err = capsys.readouterr().err
    assert status == 1
    assert "owner" in err.splitlines()[-1]


# --- Soak -----------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.usefixtures("room")
def test_a_million_events_are_partitioned_while_writers_go_on(plain: Database) -> None:
    chance = random.Random(1)
    wanted = int(os.environ.get("SOAK_EVENTS", "1000000"))
    with make_store(plain.url) as store:
        for start in range(0, wanted, 5000):
            store.save_events(
                [
                    event(
                        f"old {chance.randrange(3000)}",
                        RECENT - (wanted - start - n) * 20_000,
                        data={"n": n},
                    )
                    for n in range(5000)
                ]
            )
        started = time.monotonic()
        with Writers(plain) as writers:
            done = plain.owner().partition_events("month")
        took = time.monotonic() - started
    assert writers.failures == []
    stored = check_whole(plain)
    assert len(stored) == wanted + len(writers.kept)
    assert set(hexes(writers.kept)) <= set(stored)
    print(
        f"{plain.backend}: {done.copied:,} events copied in {took:.0f} s; writers waited for "
        f"{done.longest_wait_ms:.0f} ms at most, their longest turn took {writers.longest:.2f} s"
    )


def test_sample_data_is_refused_where_events_is_partitioned(partitioned: Database) -> None:
    with (
        make_store(partitioned.url) as store,
        pytest.raises(ConfigurationError, match="events is partitioned, and the sample data is"),
    ):
        store.load_sample()
