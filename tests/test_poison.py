"""One item that the server refuses for itself, beside a server that refuses all."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import EventWriter
from contextuate_persist.base import BaseStore
from contextuate_persist.dead_letters import DeadLetters, replay
from tests.builders import T0, event, session
from tests.conftest import Database, make_store
from tests.test_faults import ENOUGH, log_on_small_disk

__all__ = ["log_on_small_disk"]

BOTH_LAYOUTS = "policy"


@pytest.fixture(autouse=True)
def _quiet_pool(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="psycopg.pool")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(store: BaseStore, directory: Path) -> Iterator[EventWriter]:
    with EventWriter(store, spool_directory=directory) as opened:
        yield opened


@contextlib.contextmanager
def trigger(database: Database, table: str, when: str, act: dict[str, str]) -> Iterator[None]:
    """Before a row is inserted or, of sessions, updated: if it is such a row, this happens."""
    kinds = ["INSERT"] if table == "events" else ["INSERT", "UPDATE"]
    if database.backend == "postgresql":
        database.execute(
            "CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN IF {when} THEN {act['postgresql']}; END IF; RETURN NEW; END $$"
        )
    for kind in kinds:
        body = (
            "EXECUTE FUNCTION act()"
            if database.backend == "postgresql"
            else f"IF {when} THEN {act['mysql']}; END IF"
        )
        database.execute(
            f"CREATE TRIGGER acting_{kind} BEFORE {kind} ON {table} FOR EACH ROW {body}"
        )
    try:
        yield
    finally:
        on = f" ON {table}" if database.backend == "postgresql" else ""
        for kind in kinds:
            database.execute(f"DROP TRIGGER acting_{kind}{on}")
        if on:
            database.execute("DROP FUNCTION act()")


#: An error that says nothing about data: the server's own, and one of privileges.
REFUSE = {
    "postgresql": "RAISE 'out of my mind' USING ERRCODE = 'XX000'",
    "mysql": "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1142, MESSAGE_TEXT = 'out of my mind'",
}


@contextlib.contextmanager
def only_machine(database: Database, machine: str) -> Iterator[None]:
    """The application may store events of this machine only."""
    if database.backend == "postgresql":
        database.execute("ALTER TABLE events ENABLE ROW LEVEL SECURITY")
        database.execute("CREATE POLICY seen ON events FOR SELECT USING (TRUE)")
        database.execute("CREATE POLICY gone ON events FOR DELETE USING (TRUE)")
        check = f"WITH CHECK (machine_id = '{machine}')"
        database.execute(f"CREATE POLICY own ON events FOR INSERT {check}")
        try:
            yield
        finally:
            for policy in ("seen", "gone", "own"):
                database.execute(f"DROP POLICY {policy} ON events")
            database.execute("ALTER TABLE events DISABLE ROW LEVEL SECURITY")
    else:
        with trigger(database, "events", f"NEW.machine_id <> '{machine}'", REFUSE):
            yield


def test_rows_that_a_policy_refuses_are_set_aside_and_their_neighbours_stored(
    writer: EventWriter, store: BaseStore, database: Database, directory: Path
) -> None:
    with only_machine(database, "ours"):
        events = [
            event(f"s{n % 4}", T0 + n, machine_id="theirs" if n in (7, 8, 30) else "ours")
            for n in range(60)
        ]
        receipts = [writer.put(one) for one in events]
        assert writer.flush(60) == 0
    refused = [n for n, receipt in enumerate(receipts) if receipt.refusal]
    assert refused == [7, 8, 30]
    kept = [one for n, one in enumerate(events) if n not in refused]
    for name in ("s0", "s1", "s2", "s3"):
        assert store.get_events(name) == [one for one in kept if one.session_id == name]
    health = writer.health()
    assert (health.stored, health.duplicate, health.set_aside) == (57, 0, 3)
    for letter in DeadLetters(directory / "dead"):
        assert replay(letter, store)
    assert sum(store.event_counts().values()) == 60


def test_a_batch_is_stored_in_spite_of_a_policy(store: BaseStore, database: Database) -> None:
    events = [event("s", T0 + n, machine_id="ours") for n in range(20)]
    with only_machine(database, "ours"):
        assert store.save_events(events) == 20
        assert store.save_events([*events, event("s", machine_id="ours")]) == 1


def test_the_first_event_of_all_is_found_too_once_others_come(
    writer: EventWriter, store: BaseStore, database: Database
) -> None:
    with only_machine(database, "ours"):
        receipt = writer.put(event("s", machine_id="theirs"))
        assert writer.flush(1) == 1  # nothing shows yet that others would pass
        good = writer.put(event("s", machine_id="ours"))
        assert writer.flush(30) == 0
    assert receipt.refusal is not None
    assert (good.refusal, len(store.get_events("s"))) == (None, 1)


def test_what_only_the_server_itself_fails_on_is_set_aside(
    writer: EventWriter, store: BaseStore, database: Database
) -> None:
    with trigger(database, "events", "NEW.tool_use_id = 'bad'", REFUSE):
        receipt = writer.put(event("s", data={"toolUseId": "bad"}))  # alone: a trial shows it
        assert writer.flush(30) == 0
        good = writer.put(event("s"))
        assert writer.flush(30) == 0
    assert "out of my mind" in str(receipt.refusal)
    assert (good.refusal, len(store.get_events("s"))) == (None, 1)
    assert [one.session_id for one in store.get_sessions()] == ["s"]  # nothing of any trial


def test_sessions_and_updates_that_are_refused_for_themselves_are_set_aside(
    writer: EventWriter, store: BaseStore, database: Database
) -> None:
    with trigger(database, "sessions", "NEW.label = 'bad'", REFUSE):
        saved = [writer.put_session(session(f"s{n}", label=f"l{n}")) for n in range(5)]
        bad = writer.put_session(session("s9", label="bad"))
        update = writer.update_session("s1", label="bad")
        good = writer.update_session("s2", label="new")
        writer.put(event("s1"))
        assert writer.flush(60) == 0
    assert all(receipt.refusal is None for receipt in [*saved, good])
    assert "out of my mind" in str(bad.refusal)
    assert "out of my mind" in str(update.refusal)
    labels = {one.session_id: one.label for one in store.get_sessions()}
    assert labels == {"s0": "l0", "s1": "l1", "s2": "new", "s3": "l3", "s4": "l4"}
    assert len(store.get_events("s1")) == 1


SLEEP = {"postgresql": "PERFORM pg_sleep(20)", "mysql": "DO SLEEP(2.5)"}


def test_one_row_that_always_takes_too_long_is_set_aside(
    database: Database, directory: Path
) -> None:
    store = make_store(database.url, statement_timeout=0.6, lock_timeout=0.3)
    if database.backend == "mysql":  # its own limit for writes; the driver knows whole seconds
        store._arguments["read_timeout"] = 2  # type: ignore[attr-defined]
    with (
        trigger(database, "events", "NEW.tool_use_id = 'bad'", SLEEP),
        store,
        EventWriter(store, spool_directory=directory) as writer,
    ):
        bad = writer.put(event("bad", data={"toolUseId": "bad"}))
        good = writer.put(event("s"))
        assert writer.flush(60) == 0, writer.health()
        assert bad.refusal is not None
        assert (good.refusal, len(store.get_events("s"))) == (None, 1)


@pytest.mark.only("postgresql")
def test_one_row_that_always_ends_the_connection_is_set_aside(
    writer: EventWriter, store: BaseStore, database: Database
) -> None:
    end = {"postgresql": "PERFORM pg_terminate_backend(pg_backend_pid())"}
    with trigger(database, "events", "NEW.tool_use_id = 'bad'", end):
        bad = writer.put(event("bad", data={"toolUseId": "bad"}))
        good = writer.put(event("s"))
        assert writer.flush(60) == 0, writer.health()
    assert bad.refusal is not None
    assert (good.refusal, len(store.get_events("s"))) == (None, 1)


@pytest.mark.only("mysql")
def test_a_server_that_has_no_room_for_its_log_blames_nothing(
    log_on_small_disk: Database, directory: Path
) -> None:
    """It takes the statements, and says nothing when they are committed."""
    server = log_on_small_disk.server
    with (
        make_store(
            log_on_small_disk.url,
            connect_timeout=2,
            pool_timeout=2,
            statement_timeout=1,
            lock_timeout=0.5,
        ) as store,
        EventWriter(store, spool_directory=directory) as writer,
    ):
        store._arguments["read_timeout"] = 2  # type: ignore[attr-defined]
        store.save_session(session("p"))
        server.leave_free(40_000)
        receipts = [
            writer.put(event(f"s{n}", T0 + n, data={"x": secrets.token_hex(40_000)}))
            for n in range(4)
        ]
        receipts += [writer.update_session("p", label=f"l{n}") for n in range(3)]
        receipts += [writer.put_session(session(f"p{n}")) for n in range(3)]
        assert writer.flush(8) > 0
        server.leave_free(ENOUGH)
        server.kill()  # MySQL would look for room once a minute
        server.start()
        assert writer.flush(60) == 0
        assert {receipt.refusal for receipt in receipts} == {None}
        assert writer.health().set_aside == 0
        assert sum(store.event_counts().values()) == 4
        assert len(store.get_sessions()) == 8


@pytest.mark.only("postgresql")
def test_what_fails_only_when_it_is_committed_blames_nothing(
    writer: EventWriter, store: BaseStore, database: Database
) -> None:
    writer.put(event("s"))
    assert writer.flush(30) == 0
    database.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'no commits today' USING ERRCODE = 'XX000'; END $$"
    )
    try:
        database.execute(
            "CREATE CONSTRAINT TRIGGER failing AFTER INSERT ON events "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()"
        )
        for n in range(20):
            writer.put(event(f"s{n % 3}", T0 + n))
        assert writer.flush(2) == 20
        health = writer.health()
        assert "no commits today" in str(health.last_error)
        assert health.set_aside == 0
    finally:
        database.execute("DROP FUNCTION fail() CASCADE")
    assert writer.flush(30) == 0
    assert writer.health().stored == 21


def test_a_row_that_waits_for_somebodys_lock_is_not_to_blame(
    database: Database, directory: Path
) -> None:
    with (
        make_store(database.url, statement_timeout=5, lock_timeout=0.3) as store,
        make_store(database.url) as other,
        EventWriter(store, spool_directory=directory) as writer,
    ):
        store.save_session(session("s"))
        with other._connection(transaction=True) as connection:
            other._lock_sessions(connection, ["s"])
            receipt = writer.put(event("s"))
            writer.put(event("t"))
            time.sleep(2.5)
            assert not receipt.stored
            assert writer.health().retries > 0
        assert writer.flush(30) == 0
        assert receipt.refusal is None
        assert writer.health().stored == 2


@pytest.mark.parametrize("table", ["events", "sessions"])
def test_an_account_without_rights_gets_all_in_once_it_has_them(
    database: Database, directory: Path, table: str
) -> None:
    """Rights on each table: those on a database are looked up when a connection begins."""
    server, name = database.server, f"few_{database.name}"[:32]
    server.create_login(name, "secret", database.name, ())
    user = f"'{name}'@'%'" if database.backend == "mysql" else name
    schema = "current_schema()" if database.backend == "postgresql" else "database()"
    tables = database.execute(
        f"SELECT table_name FROM information_schema.tables WHERE table_schema = {schema}"
    )
    for (one,) in tables:
        database.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {one} TO {user}")
    known = [event(f"s{n % 3}", T0 + n) for n in range(6)]
    events = [event(f"s{n % 3}", T0 + 10 + n) for n in range(30)]
    try:
        with (
            make_store(server.url(database.name, name, "secret")) as store,
            EventWriter(store, spool_directory=directory) as writer,
        ):
            for one in known:
                writer.put(one)
            writer.put_session(session("p"))
            assert writer.flush(30) == 0
            database.execute(f"REVOKE INSERT ON {table} FROM {user}")
            receipts: list[Any] = [writer.put(one) for one in events]
            receipts += [writer.put_session(session(s, label="x")) for s in ("p", "q")]
            receipts.append(writer.update_session("p", label="y"))
            time.sleep(3)
            health = writer.health()
            assert "StoreRefused" in str(health.last_error)
            assert (health.set_aside, health.retries > 0) == (0, True)
            database.execute(f"GRANT INSERT ON {table} TO {user}")
            assert writer.flush(60) == 0
            assert {receipt.refusal for receipt in receipts} == {None}
            assert writer.health().set_aside == 0
            assert not DeadLetters(directory / "dead").ids()
            for n in range(3):
                wanted = [one for one in [*known, *events] if one.session_id == f"s{n}"]
                assert store.get_events(f"s{n}") == wanted
            assert {one.session_id: one.label for one in store.get_sessions()}["p"] == "y"
    finally:
        server.drop_login(name, database.name)
