"""Connections: absent servers, lost connections, full pools, forks, settings and secrets."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import mysql.connector
import psycopg
import pytest

from contextuate_persist import (
    ConfigurationError,
    SchemaError,
    StoreRefused,
    StoreUnavailable,
    mysql_store,
    open_store,
)
from contextuate_persist.base import BaseStore, Fault
from contextuate_persist.config import is_local
from contextuate_persist.postgresql_store import PostgreSQLStore
from tests import servers
from tests.builders import T0, event, session, usage
from tests.conftest import Database, make_store
from tests.proxy import Proxy

SECRET = "s3cret-pa55word"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_host(backend: str, host: str, port: int) -> str:
    return f"{backend}://someone:{SECRET}@{host}:{port}/nowhere"


def test_an_absent_server_is_named_within_the_connect_timeout_and_no_password(
    backend: str,
) -> None:
    port = free_port()
    store = open_store(with_host(backend, "127.0.0.1", port), connect_timeout=2)
    start = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        store.init()
    assert time.monotonic() - start < 4
    message = str(caught.value)
    assert f"127.0.0.1:{port}" in message
    assert "\n" not in message
    assert SECRET not in message
    assert SECRET not in repr(store)


def test_a_server_that_accepts_and_never_answers_is_given_up_in_time(backend: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        store = open_store(with_host(backend, "127.0.0.1", port), connect_timeout=2)
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port}"):
            store.init()
        assert time.monotonic() - start < 6


def test_a_wrong_password_is_said_without_the_password(database: Database) -> None:
    url = database.server.url(database.name, database.user, SECRET)
    with pytest.raises(StoreRefused) as caught:
        make_store(url).init()
    assert database.user in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_password_with_special_characters_works(database: Database, backend: str) -> None:
    user, password = f"odd_{database.name}"[:32], "p@:/?#[]%'\"\\ é"
    database.server.create_login(user, password, database.name)
    try:
        with make_store(database.server.url(database.name, user, password)) as store:
            assert store.save_event(event()) is True
    finally:
        database.server.drop_login(user, database.name)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///x.db",
        "localhost:5432",
        "mysql://host",
        "mysql://host/db?colour=red",
        "mysql://host:port/db",
        "mysql://host/db?ssl-mode=MAYBE",
        f"postgresql://u:{SECRET}@host:1/db?colour=red",
        "postgresql://[bad",
        f"postgresql://u:{SECRET}/x@h/x",
        f"mysql://u:{SECRET}@x@h/x",
        f"mysql://u:{SECRET}/x@h/x",
        f"postgresql://u:{SECRET}%zz@h/x",
        f"postgresql://u:{SECRET}@[::1]5432/x",
        f"mysql://u:{SECRET}",
        f"mysql://u:{SECRET}\N{FULLWIDTH SOLIDUS}w@h/x",
    ],
)
def test_a_malformed_url_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(ConfigurationError, match="^database URL: ") as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_malformed_connection_string_tells_nothing_of_the_password() -> None:
    for text in (f"host=h password=two {SECRET}", f"host=h password=two {SECRET}=x"):
        with pytest.raises(ConfigurationError, match="^database URL: malformed$"):
            PostgreSQLStore(text)


@pytest.mark.parametrize("host", ["", "localhost"])
def test_an_address_in_the_environment_of_libpq_decides_over_tls(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOSTADDR", "203.0.113.5")
    store = open_store(f"postgresql://{host}/db")
    assert "sslmode=verify-full" in str(vars(store))


def test_a_service_in_the_environment_leaves_a_named_host_its_tls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGSERVICE", "other")
    assert "sslmode=verify-full" in str(vars(open_store("postgresql://db.example.com/db")))
    assert "sslmode" not in str(vars(open_store("postgresql:///db")))


def test_the_environment_names_the_database(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTEXTUATE_DATABASE_URL", database.url)
    with open_store() as store:
        assert store.backend == database.backend
        assert store.save_event(event()) is True


def test_hosts_of_this_machine_need_no_tls_and_others_are_verified(backend: str) -> None:
    assert all(map(is_local, ("", "localhost", "127.0.0.1", "127.9.9.9", "::1", "/run/x")))
    assert not any(map(is_local, ("db.example.com", "10.0.0.1", "::2", "localhost.evil.example")))
    remote = open_store(with_host(backend, "db.example.com", 1))
    settings = str(vars(remote))
    if backend == "postgresql":
        assert "sslmode=verify-full" in settings
    else:
        assert "'ssl_verify_identity': True" in settings
        assert "'ssl_verify_cert': True" in settings
    local = open_store(with_host(backend, "127.0.0.1", 1))
    assert "verify" not in str(vars(local))


def kill_connections(database: Database) -> int:
    """Cut every connection of the application's account on the server."""
    if database.backend == "postgresql":
        rows = database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE usename = '{database.user}'"
        )
        return len(rows)
    there = database.connections()
    for number in there:
        with contextlib.suppress(mysql.connector.Error):  # gone by itself meanwhile
            database.execute(f"KILL {number}")
    return len(there)


def test_killed_idle_connections_are_replaced_unnoticed(
    store: BaseStore, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="psycopg.pool")
    warm = [threading.Thread(target=lambda: store.get_events("s")) for _ in range(8)]
    for thread in warm:
        thread.start()
    for thread in warm:
        thread.join(30)
    for i in range(3):
        assert kill_connections(database) >= 1
        assert store.save_event(event(timestamp=T0 + i)) is True
        assert store.save_events([event("t", T0 + i)]) == 1
        assert len(store.get_events("s")) == i + 1


def test_connections_killed_under_load_lose_and_double_nothing(
    store: BaseStore, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="psycopg.pool")
    acknowledged: list[str] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(60):
                one = event(f"s{number}", T0 + i)
                many = [event(f"s{(number + k) % 6}", T0 + i) for k in range(10)]
                store.save_event(one)
                acknowledged.append(one.id)
                store.save_events(many)
                acknowledged.extend(e.id for e in many)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        time.sleep(0.08)
        kill_connections(database)
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert sorted(e.id for e in store.iter_events()) == sorted(acknowledged)


def test_no_slot_of_the_pool_is_lost_to_errors(database: Database) -> None:
    with make_store(database.url, pool_size=2, pool_timeout=5) as store:
        for _ in range(20):
            kill_connections(database)
            with contextlib.suppress(StoreUnavailable):
                store.save_event(event())
        barrier = threading.Barrier(2)
        run = store._run

        def both(connection: object) -> int:
            barrier.wait(10)  # two connections at once, or this fails
            return 1

        results: list[int] = []
        threads = [threading.Thread(target=lambda: results.append(run(both))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert results == [1, 1]


def test_an_exhausted_pool_waits_then_says_so(database: Database) -> None:
    with make_store(database.url, pool_size=1, pool_timeout=0.3) as store:
        entered, leave = threading.Event(), threading.Event()

        def hold(connection: object) -> None:
            entered.set()
            leave.wait(20)

        holder = threading.Thread(target=lambda: store._run(hold))
        holder.start()
        assert entered.wait(10)
        with pytest.raises(StoreUnavailable):
            store.get_events("s")
        threading.Timer(0.1, leave.set).start()
        time.sleep(0.05)
        store.get_events("s")  # waited for the free connection
        holder.join(20)


STRANGERS = [b"PREPARE _pg3_%d AS SELECT 1" % n for n in range(100)]


@pytest.mark.only("postgresql")
@pytest.mark.parametrize("statements", [[b"DEALLOCATE ALL"], STRANGERS], ids=["lost", "strangers"])
def test_a_pooler_that_mixes_up_prepared_statements_costs_one_more_try(
    database: Database, statements: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PgBouncer gives each transaction a connection that may have served others before."""
    with make_store(database.url, pool_size=1) as store:
        store.save_event(event("s", T0))
        if statements is not STRANGERS:
            for _ in range(7):
                store.get_events("s")
        with store._connection(False) as connection:
            for statement in statements:
                connection.pgconn.exec_(statement)
        faults: list[Fault | None] = []
        fault_of = store._fault
        monkeypatch.setattr(
            store, "_fault", lambda error: faults.append(fault_of(error)) or faults[-1]
        )
        for _ in range(7):
            assert len(store.get_events("s")) == 1
        assert set(faults) == {Fault.STALE}


@pytest.mark.only("postgresql")
def test_many_threads_share_the_few_connections_of_a_pooler(database: Database) -> None:
    """Of PgBouncer, in transaction mode: each transaction comes to another connection."""
    events = [event(f"s{n % 9}", T0 + n) for n in range(100)]
    new: list[int] = []
    errors: list[BaseException] = []

    def work(store: BaseStore, own: str) -> None:
        try:
            for n in range(0, len(events), 20):
                new.append(store.save_event(events[n]))
                new.append(store.save_events(events[n : n + 20]))
                store.save_session(session(own, label=f"{n}"))
                store.save_usage(own, [usage(f"{own}-{n}")])
                store.update_session(own, model="m")
                found = store.get_session(own)
                assert found is not None
                assert (found.label, found.model) == (f"{n}", "m")
            store.delete_session(own)
        except BaseException as error:
            errors.append(error)

    logins = {database.user: database.password}
    with servers.pgbouncer(database.server, logins, size=3) as pooler:
        url = pooler.url(database.name, database.user, database.password)
        with make_store(url, prepare_threshold=None, pool_size=16) as store:
            threads = [threading.Thread(target=work, args=(store, f"own{n}")) for n in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert errors == []
            assert sum(new) == len(events)
            assert {one.id for one in store.iter_events()} == {one.id for one in events}
            assert len(store.get_sessions()) == 9
            assert database.execute("SELECT count(*) FROM token_ledger") == [(0,)]


@pytest.mark.only("postgresql")
def test_without_prepared_statements_the_server_keeps_none(database: Database) -> None:
    with make_store(database.url, pool_size=1, prepare_threshold=None) as store:
        for n in range(7):
            store.save_session(session(f"s{n}", parent_session_id="p"))
            assert store.save_event(event(f"s{n}", T0)) is True
            assert store.save_events(event(f"s{n}", T0 + i) for i in range(60)) == 60
            assert store.save_usage(f"s{n}", [usage(f"m{n}")]) == 1
            store.update_session(f"s{n}", label="x")
            assert len(store.get_events(f"s{n}")) == 61
            assert len(store.find_events(tool_name="Bash", session_id=f"s{n}")) == 61
            assert len(store.get_sessions()) == 1
            assert len(store.session_tree()) == 1
            store.delete_session(f"s{n}")
        with store._connection(False) as connection:
            kept = connection.execute("SELECT statement FROM pg_prepared_statements").fetchall()
            assert kept == []


def test_a_lock_held_by_another_ends_the_wait_and_the_store_goes_on(database: Database) -> None:
    with make_store(database.url, lock_timeout=1) as store, make_store(database.url) as other:
        store.save_session(session("s"))
        entered, leave = threading.Event(), threading.Event()

        def hold(connection: object) -> None:
            other._update_session(connection, "s", {"label": "held"})
            entered.set()
            leave.wait(20)

        holder = threading.Thread(target=lambda: other._run(hold, transaction=True))
        holder.start()
        assert entered.wait(10)
        start = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.update_session("s", label="mine")
        assert time.monotonic() - start < 5
        leave.set()
        holder.join(20)
        store.update_session("s", label="mine")
        got = store.get_session("s")
        assert got is not None
        assert got.label == "mine"


def test_a_client_that_stands_still_in_a_transaction_loses_its_locks(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mysql_store, "IDLE_SECONDS", 1)
    with make_store(database.url) as other, make_store(database.url, statement_timeout=1) as still:
        other.save_session(session("s"))
        gone: list[str] = []

        def stand_still(connection: object) -> None:
            still._lock_sessions(connection, ["s"])
            other.delete_session("s")
            gone.append("s")

        with pytest.raises(StoreUnavailable):
            still._run(stand_still, transaction=True)
        assert gone == ["s"]
        assert still.get_session("s") is None


def test_a_locked_schema_ends_the_wait_of_init(database: Database, backend: str) -> None:
    lock, unlock = {
        "postgresql": ("LOCK TABLE schema_version", "SELECT 1"),
        "mysql": ("LOCK TABLES schema_version WRITE", "UNLOCK TABLES"),
    }[backend]
    store = make_store(database.url, lock_timeout=1)
    with database.owner() as owner:

        def lock_out(connection: Any) -> None:
            owner._run_statements(connection, [lock])
            start = time.monotonic()
            with pytest.raises(StoreUnavailable, match="(?i)lock"):
                store.init()
            assert time.monotonic() - start < 5
            owner._run_statements(connection, [unlock])

        owner._run(lock_out, transaction=True)
    with store:
        assert store.save_event(event()) is True


def test_a_connection_lost_while_it_is_set_up_is_said_and_closed(database: Database) -> None:
    parts = urlsplit(database.url)
    assert parts.port is not None
    with make_store(database.url) as warm:  # MySQL then knows the password without TLS
        warm.get_events("s")
    query = "sslmode=disable" if database.backend == "postgresql" else "ssl-mode=DISABLED"
    with Proxy(parts.port) as proxy:
        place = f"{parts.username}:{parts.password}@127.0.0.1:{proxy.port}"
        store = make_store(urlunsplit((parts.scheme, place, parts.path, query, "")))
        proxy.swallow_answer_to = b"lock_"  # of the statement that sets the timeouts
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{proxy.port}"):
            store.init()
        assert proxy.swallowed == 1
        with store:
            assert store.save_event(event()) is True


def test_an_error_that_is_not_the_databases_comes_through_and_costs_no_connection(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="psycopg")
    with make_store(database.url, pool_size=1, pool_timeout=5) as store:

        def fail(connection: object) -> None:
            raise ZeroDivisionError

        def fail_on_a_lost_connection(connection: object) -> None:
            assert kill_connections(database) >= 1
            raise ZeroDivisionError

        for work in (fail, fail_on_a_lost_connection):
            for transaction in (False, True):
                with pytest.raises(ZeroDivisionError):
                    store._run(work, transaction=transaction)
                assert store.get_events("s") == []


def test_a_missing_privilege_is_refused_by_name(database: Database) -> None:
    user = f"ro_{database.name}"[:32]
    database.server.create_login(user, "pw", database.name, privileges=["SELECT"])
    try:
        with make_store(database.server.url(database.name, user, "pw")) as store:
            assert store.get_events("s") == []
            with pytest.raises(StoreRefused, match="denied"):
                store.save_session(session())
            assert store.get_events("s") == []
    finally:
        database.server.drop_login(user, database.name)


def test_a_forked_child_uses_connections_of_its_own(store: BaseStore) -> None:
    store.save_event(event("parent", T0))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover  (another process)
        verdict = b"failed"
        try:
            store.save_events([event("child", T0 + i) for i in range(5)])
            verdict = b"%d" % len(store.get_events("child"))
        finally:
            os.write(write, verdict)
            os._exit(0)
    os.close(write)
    for i in range(20):
        store.save_event(event("parent", T0 + i + 1))
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"5"
    os.waitpid(child, 0)
    assert len(store.get_events("parent")) == 21
    assert len(store.get_events("child")) == 5


def test_a_restarted_server_is_found_again_without_reopening(
    own_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="psycopg.pool")
    with make_store(own_database.url, connect_timeout=2, pool_timeout=3) as store:
        first, second = event("s", T0), event("s", T0 + 1)
        store.save_event(first)
        own_database.server.kill()
        with pytest.raises(StoreUnavailable):
            store.save_event(second)
        own_database.server.start()
        until = time.monotonic() + 30
        while True:
            try:
                store.save_event(second)
                break
            except StoreUnavailable:
                assert time.monotonic() < until
        assert store.get_events("s") == [first, second]


def test_health_tells_server_driver_and_schema(store: BaseStore, backend: str) -> None:
    health = store.health()
    assert health.backend == backend
    assert health.server_version[0].isdigit()
    assert health.driver_implementation in ("binary", "c", "python")
    assert (health.schema_version, health.schema_layout) == (1, "plain")
    assert 0 < health.latency_ms < 5_000
    assert health.pool_in_use == 1
    assert health.pool_size == 10


def test_what_is_committed_meanwhile_is_seen_whatever_the_servers_default(
    empty_database: Database,
) -> None:
    if empty_database.backend == "postgresql":  # MySQL's is that by itself
        default = "default_transaction_isolation TO 'repeatable read'"
        empty_database.execute(f"ALTER ROLE {empty_database.user} SET {default}")
    empty_database.owner().apply_schema()
    with make_store(empty_database.url) as store, store._connection(True) as connection:
        assert store._select_states(connection, "", 9) == []
        store.save_session(session("s"))
        assert len(store._select_states(connection, "", 9)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"pool_size": 0},
        {"pool_size": "3"},
        {"connect_timeout": None},
        {"lock_timeout": 0},
        {"statement_timeout": float("inf")},
        {"pool_timeout": -1},
    ],
)
def test_senseless_options_are_refused(backend: str, options: dict[str, object]) -> None:
    [name] = options
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        open_store(with_host(backend, "127.0.0.1", 1), **options)


def test_a_table_of_another_program_is_named(empty_database: Database) -> None:
    empty_database.execute("CREATE TABLE schema_version (installed_rank INTEGER)")
    with pytest.raises(SchemaError, match="another program"):
        make_store(empty_database.url).init()


@pytest.mark.only("postgresql")
def test_connection_strings_of_libpq_are_taken(database: Database, backend: str) -> None:
    parts = urlsplit(database.url)
    from contextuate_persist.postgresql_store import PostgreSQLStore  # noqa: PLC0415

    text = psycopg.conninfo.make_conninfo(
        host=parts.hostname,
        port=parts.port,
        user=database.user,
        password=database.password,
        dbname=database.name,
    )
    with PostgreSQLStore(text) as store:
        assert store.save_event(event()) is True


@pytest.mark.only("postgresql")
def test_a_type_added_to_the_enum_is_found_under_its_old_and_new_rows(
    empty_database: Database, backend: str
) -> None:
    empty_database.owner().apply_schema()
    both = [event("s", T0 + n, event_type="quantum_leap") for n in range(80)]
    with make_store(empty_database.url) as store:
        store.save_events(both[::2])
        empty_database.execute("ALTER TYPE monitor_event_type ADD VALUE 'quantum_leap'")
        with make_store(empty_database.url) as newer:
            newer.save_events(both[1::2])
            assert newer.find_events(event_type="quantum_leap") == both[::-1]
            assert newer.event_counts() == {"quantum_leap": 80}
        assert store.find_events(event_type="quantum_leap", limit=30) == both[:-31:-1]
        assert list(store.iter_events(event_type="quantum_leap")) == both
