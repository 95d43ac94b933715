"""Faults of servers and networks: nothing acknowledged is lost, nothing is stored twice."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit, urlunsplit

import pytest

from contextuate_persist import (
    MonitorEvent,
    PersistenceError,
    SessionNotFound,
    StoreRefused,
    StoreUnavailable,
)
from contextuate_persist.base import BaseStore
from tests import servers
from tests.builders import T0, event, session, usage
from tests.conftest import Database, make_store, new_database
from tests.proxy import Proxy


@pytest.fixture(autouse=True)
def _quiet_pool(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="psycopg.pool")


def through(proxy: Proxy, database: Database) -> str:
    """The database's URL by way of the proxy, unencrypted so that it can read."""
    parts = urlsplit(database.url)
    place = f"{parts.username}:{parts.password}@127.0.0.1:{proxy.port}"
    query = "sslmode=disable" if database.backend == "postgresql" else "ssl-mode=DISABLED"
    return urlunsplit((parts.scheme, place, parts.path, query, ""))


BOTH_LAYOUTS = "not_heard"

#: The statement as it goes over the wire; MySQL's connections also say READ-COMMITTED.
COMMIT = {"postgresql": b"COMMIT", "mysql": b"\x01COMMIT"}

# --- The ambiguous commit -------------------------------------------------------------------------


def test_a_batch_whose_commit_was_not_heard_is_stored_once(
    proxy: Proxy, database: Database
) -> None:
    events = [event(f"s{i % 3}", T0 + i, parent_session_id="p") for i in range(30)]
    with make_store(through(proxy, database)) as store:
        proxy.swallow_answer_to = COMMIT[database.backend]
        # The first try stored all, unheard; the second finds them there.
        assert store.save_events(events) == 0
        assert proxy.swallowed == 1
        assert sorted(e.id for e in store.iter_events()) == sorted(e.id for e in events)
        assert store.save_events(events) == 0


def test_a_single_event_whose_insert_was_not_heard_is_stored_once(
    proxy: Proxy, database: Database
) -> None:
    with make_store(through(proxy, database)) as store:
        store.save_event(event("s", T0))
        marked = event("s", T0 + 1, data={"mark": "swallow-this-answer"})
        proxy.swallow_answer_to = b"swallow-this-answer"
        # Between the two statements that it takes there, the first try is undone.
        undone = (database.backend, database.layout) == ("mysql", "partitioned")
        assert store.save_event(marked) is undone
        assert proxy.swallowed == 1
        assert [e.id for e in store.get_events("s")][1:] == [marked.id]
        assert store.save_event(marked) is False


@pytest.mark.only("mysql")
def test_a_single_event_whose_commit_was_not_heard_is_stored_once(
    proxy: Proxy, database: Database
) -> None:
    """Where events is partitioned it has one; elsewhere its one statement commits itself."""
    with make_store(through(proxy, database)) as store:
        store.save_event(event("s", T0))
        one = event("s", T0 + 1)
        proxy.swallow_answer_to = COMMIT["mysql"]
        has_one = database.layout == "partitioned"
        assert store.save_event(one) is not has_one
        assert proxy.swallowed == has_one
        assert [e.id for e in store.get_events("s")][1:] == [one.id]


def test_a_session_whose_save_was_not_heard_is_merged_once(
    proxy: Proxy, database: Database
) -> None:
    with make_store(through(proxy, database)) as store:
        proxy.swallow_answer_to = b"swallow-this-answer"
        store.save_session(session(label="swallow-this-answer", child_session_ids=("a", "b")))
        assert proxy.swallowed == 1
        got = store.get_session("s")
        assert got is not None
        assert got.child_session_ids == ("a", "b")


def test_a_deletion_whose_commit_was_not_heard_has_happened(
    proxy: Proxy, database: Database
) -> None:
    with make_store(through(proxy, database)) as store:
        store.save_session(session())
        proxy.swallow_answer_to = COMMIT[database.backend]
        store.delete_session("s")
        assert proxy.swallowed == 1
        assert store.get_session("s") is None
        with pytest.raises(SessionNotFound):
            store.delete_session("s")


# --- Cut and silent connections -------------------------------------------------------------------


def test_connections_cut_mid_statement_are_replaced(proxy: Proxy, database: Database) -> None:
    stored: list[MonitorEvent] = []
    errors: list[BaseException] = []
    stop = threading.Event()
    with make_store(through(proxy, database), pool_size=4) as store:

        def work(number: int) -> None:
            count = 0
            while not stop.is_set():
                batch = [event(f"s{number}", T0 + count + k) for k in range(20)]
                count += 20
                try:
                    store.save_events(batch)
                except StoreUnavailable:  # may be: not acknowledged, so not counted
                    continue
                except BaseException as error:
                    errors.append(error)
                    return
                stored.extend(batch)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            time.sleep(0.1)
            proxy.cut_all()
        stop.set()
        for thread in threads:
            thread.join(60)
        assert errors == []
        found = [e.id for e in store.iter_events()]
        assert len(found) == len(set(found))
        assert {e.id for e in stored} <= set(found)
        assert len(stored) > 100


@pytest.mark.parametrize("how", ["silent", "deaf"])
def test_a_server_that_stops_answering_is_given_up_and_found_again(
    proxy: Proxy, database: Database, how: str
) -> None:
    # More than the sockets hold: has to be waited for before any answer has.
    large = event("s", T0 + 1, data={"text": "x" * 15_000_000})
    with make_store(
        through(proxy, database), statement_timeout=1, connect_timeout=2, pool_timeout=2
    ) as store:
        store.save_event(event("s", T0))
        setattr(proxy, how, True)
        start = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.save_event(large)
        assert time.monotonic() - start < 30
        setattr(proxy, how, False)
        proxy.cut_all()
        wait_until_it_works(store)
        assert len(store.get_events("s")) >= 1


def wait_until_it_works(store: BaseStore, seconds: float = 40) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            store.save_event(event("works", T0))
        except (StoreUnavailable, StoreRefused):
            assert time.monotonic() < until
            time.sleep(0.1)
        else:
            return


# --- Servers that die, restart, refuse ------------------------------------------------------------


def test_a_server_killed_under_load_keeps_all_that_was_acknowledged(
    own_database: Database,
) -> None:
    hammer(own_database, kills=2)


@pytest.mark.soak
def test_a_server_killed_ten_times_under_load_keeps_all(own_database: Database) -> None:
    hammer(own_database, kills=int(os.environ.get("SOAK_KILLS", "10")))


def hammer(database: Database, kills: int) -> None:
    acknowledged: list[str] = []
    messages: list[str] = []
    saved: dict[str, int] = {}
    updated: dict[str, int] = {}
    stop = threading.Event()
    errors: list[BaseException] = []
    with make_store(database.url, connect_timeout=2, pool_timeout=2) as store:

        def work(number: int) -> None:
            count = 0
            while not stop.is_set():
                count += 1
                one = event(f"s{number}", T0 + count)
                many = [event(f"s{(number + k) % 4}", T0 + count) for k in range(8)]
                try:
                    store.save_event(one)
                    acknowledged.append(one.id)
                    store.save_events(many)
                    acknowledged.extend(e.id for e in many)
                    own = f"own{number}"
                    store.save_session(session(own, label=str(count)))
                    saved[own] = count
                    store.update_session(own, model=str(count))
                    updated[own] = count
                    store.save_usage(own, [usage(f"{own}-{count}")])
                    messages.append(f"{own}-{count}")
                except StoreUnavailable:
                    time.sleep(0.05)
                except BaseException as error:
                    errors.append(error)
                    return

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(kills):
            time.sleep(0.7)
            database.server.kill()
            time.sleep(0.2)
            database.server.start()
        time.sleep(0.7)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert errors == []
        wait_until_it_works(store)
        found = [e.id for e in store.iter_events()]
        assert len(found) == len(set(found))
        assert set(acknowledged) <= set(found)
        assert len(acknowledged) > 50
        counted = {row[0] for row in database.execute("SELECT message_id FROM token_ledger")}
        assert set(messages) <= counted
        assert len(saved) == 4
        for own, count in saved.items():
            kept = store.get_session(own)
            assert kept is not None
            assert int(kept.label or 0) >= count
            assert int(kept.model or 0) >= updated.get(own, 0)


def test_a_read_only_server_refuses_writes_and_is_used_again_when_writable(
    own_database: Database,
) -> None:
    server = own_database.server
    read_only, writable = (
        (
            f"ALTER DATABASE {own_database.name} SET default_transaction_read_only = on",
            f"ALTER DATABASE {own_database.name} SET default_transaction_read_only = off",
        )
        if server.kind == "postgresql"
        else ("SET GLOBAL super_read_only = ON", "SET GLOBAL read_only = OFF")
    )
    with make_store(own_database.url) as store:
        store.save_event(event("s", T0))
        server.execute(read_only)
        try:
            with make_store(own_database.url) as fresh:
                with pytest.raises(StoreRefused, match="read-only"):
                    fresh.save_event(event("s", T0 + 1))
                with pytest.raises(StoreRefused, match="read-only"):
                    fresh.save_session(session())
                assert len(fresh.get_events("s")) == 1
                server.execute(writable)
                wait_until_it_works(fresh)
        finally:
            server.execute(writable)


def test_two_hundred_threads_share_a_small_pool(database: Database) -> None:
    results: list[object] = []
    with make_store(database.url, pool_size=3, pool_timeout=30) as store:
        store.save_events([event("s", T0 + i) for i in range(20)])

        def work(number: int) -> None:
            try:
                store.save_event(event(f"t{number % 10}", T0 + number))
                results.append(len(store.get_events("s")))
            except BaseException as error:
                results.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert results == [20] * 200
        assert store.health().pool_in_use == 1


# --- Servers whose disk is full -------------------------------------------------------------------

ENOUGH = servers.DISK_BYTES
FULL = "No space left on device|The table '.*' is full"


@contextlib.contextmanager
def database_on_small_disk(backend: str, part: str, **options: str) -> Iterator[Database]:
    """A database of a server that has this part of its directory on a disk of its own."""
    start = servers.postgresql_server if backend == "postgresql" else servers.mysql_server
    server = start(disk=part, options=options)
    if server.disk is None:
        server.remove()
        pytest.skip("the server is external or in a container: its disk is not ours to fill")
    try:
        server.start()
    except servers.NoSmallDisk as reason:
        server.remove()
        pytest.skip(str(reason))
    with server:
        database = new_database(server)
        database.owner().apply_schema()
        yield database


@pytest.fixture
def tables_on_small_disk(backend: str) -> Iterator[Database]:
    if backend == "postgresql":
        with database_on_small_disk(backend, "data/base") as database:
            yield database
    else:
        with database_on_small_disk(backend, "data", log_bin="../binlog") as database:
            yield database


@pytest.fixture
def log_on_small_disk(backend: str) -> Iterator[Database]:
    if backend == "postgresql":
        with database_on_small_disk(backend, "data/pg_wal") as database:
            yield database
    else:
        with database_on_small_disk(backend, "log", log_bin="../log/binlog") as database:
            yield database


class Filling:
    """Three threads that save, each until a call fails; what was acknowledged and what was not."""

    def __init__(self, store: BaseStore) -> None:
        self.store = store
        self.acknowledged: list[MonitorEvent] = []
        self.refused: list[MonitorEvent] = []
        self.errors: list[PersistenceError] = []
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(self.save, range(3)))

    def save(self, thread: int) -> None:
        for number in itertools.count():
            events = [
                event(f"s{(thread + k) % 4}", T0 + number, data={"text": secrets.token_hex(2000)})
                for k in range(20 if number % 2 else 1)
            ]
            try:
                if len(events) == 1:
                    self.store.save_event(events[0])
                else:
                    self.store.save_events(events)
            except PersistenceError as error:
                self.refused += events
                self.errors.append(error)
                return
            self.acknowledged += events

    def stored(self) -> list[str]:
        """The ids of the events that are stored, as often as they are."""
        return [e.id for e in self.store.iter_events() if e.session_id != "works"]


def require_clear(error: PersistenceError, database: Database, reason: str) -> None:
    text = str(error)
    kind = {"postgresql": "PostgreSQL", "mysql": "MySQL"}[database.backend]
    place = f"{kind} at 127.0.0.1:{database.server.port}, database {database.name}: "
    assert text.startswith(place)
    assert re.search(reason, text)
    assert "\n" not in text


def test_saves_that_meet_a_full_disk_are_refused_and_taken_again_when_there_is_space(
    tables_on_small_disk: Database,
) -> None:
    server = tables_on_small_disk.server
    with make_store(tables_on_small_disk.url) as store:
        store.save_session(session("s0", label="kept"))
        server.leave_free(4_000_000)
        filling = Filling(store)
        for error in filling.errors:
            assert type(error) is StoreRefused
            require_clear(error, tables_on_small_disk, FULL)
        # The files may have room left for a few small events; for this one they have not.
        large = event("s0", data={"text": secrets.token_hex(2_000_000)})
        with pytest.raises(StoreRefused, match=FULL):
            store.save_event(large)
        with pytest.raises(StoreRefused, match=FULL):
            store.save_events([*filling.refused, large], on_error="skip")

        acknowledged = sorted(e.id for e in filling.acknowledged)
        assert len(acknowledged) > 50
        assert sorted(filling.stored()) == acknowledged
        assert sum(store.event_counts().values()) == len(acknowledged)
        found = store.get_session("s0")
        assert found is not None
        assert found.label == "kept"
        assert store.health().pool_in_use == 1

        server.leave_free(ENOUGH)
        refused = [*filling.refused, large]
        assert store.save_events(refused) == len(refused)
        assert store.save_events(refused) == 0
        assert sorted(filling.stored()) == sorted([*acknowledged, *(e.id for e in refused)])


def test_a_server_whose_log_meets_a_full_disk_keeps_all_that_was_acknowledged(
    log_on_small_disk: Database,
) -> None:
    """PostgreSQL goes down, MySQL says nothing at all: neither holds a call for long."""
    server = log_on_small_disk.server
    with make_store(
        log_on_small_disk.url, statement_timeout=1, connect_timeout=2, pool_timeout=2
    ) as store:
        server.leave_free(1_000_000)
        filling = fill_log(store, log_on_small_disk)
        server.leave_free(ENOUGH)
        # MySQL would look for space once a minute and go on; see the next test.
        server.kill()
        server.start()
        wait_until_it_works(store)
        require_kept(filling)


@pytest.mark.soak
@pytest.mark.only("mysql")
def test_a_server_that_waits_for_space_for_its_log_goes_on_by_itself(
    log_on_small_disk: Database,
) -> None:
    with make_store(log_on_small_disk.url, statement_timeout=1) as store:
        log_on_small_disk.server.leave_free(1_000_000)
        filling = fill_log(store, log_on_small_disk)
        log_on_small_disk.server.leave_free(ENOUGH)
        wait_until_it_works(store, 90)
        require_kept(filling)


def fill_log(store: BaseStore, database: Database) -> Filling:
    """Save until the log is full: who meets it first may be told so, others meet with silence."""
    start = time.monotonic()
    filling = Filling(store)
    assert time.monotonic() - start < 30
    for error in filling.errors:
        assert type(error) in (StoreRefused, StoreUnavailable)
        silence = "the server did not answer within 1 s" if database.backend == "mysql" else "."
        require_clear(error, database, FULL if type(error) is StoreRefused else silence)
    if database.backend == "mysql":  # PostgreSQL is down, or recovers
        assert sorted(filling.stored()) == sorted(e.id for e in filling.acknowledged)
    return filling


def require_kept(filling: Filling) -> None:
    """All that was acknowledged is stored once; of the rest what is not yet can be saved."""
    stored = filling.stored()
    assert len(filling.acknowledged) > 20
    assert len(stored) == len(set(stored))
    assert {e.id for e in filling.acknowledged} <= set(stored)
    missing = [e for e in filling.refused if e.id not in stored]
    assert filling.store.save_events(filling.refused) == len(missing)
    everything = [*filling.acknowledged, *filling.refused]
    assert sorted(filling.stored()) == sorted(e.id for e in everything)
