"""What is only MySQL's: literals, the pool, the pure Python driver, MariaDB."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextuate_persist import (
    ConfigurationError,
    Cursor,
    InvalidRecord,
    StoreRefused,
    StoreUnavailable,
)
from contextuate_persist.base import BaseStore
from contextuate_persist.mysql_store import (
    Pool,
    _execute,
    _plain,
    _require_mysql,
    _require_tls,
    literal,
)
from tests.builders import T0, event, session
from tests.conftest import Database, make_store
from tests.test_payloads import TRICKY, texts

pytestmark = pytest.mark.only("mysql")


@given(text=texts, raw=st.binary(max_size=60), number=st.integers(-(2**63), 2**63 - 1))
def test_a_literal_means_its_value_to_the_server(
    owner: BaseStore, text: str, raw: bytes, number: int
) -> None:
    text = text.encode("utf-8", "replace").decode()  # what comes to `literal` has no surrogates

    def read(connection: Any) -> Any:
        values = b", ".join(map(literal, (text, raw, number, None)))
        hexed = (
            b"SELECT HEX(t), HEX(b), n, z IS NULL, CHARSET(b) FROM (SELECT %s) AS v (t, b, n, z)"
        )
        connection.cmd_query(b"DROP TEMPORARY TABLE IF EXISTS literals")
        connection.cmd_query(b"CREATE TEMPORARY TABLE literals " + hexed % values)
        return _execute(connection, "SELECT * FROM literals")[0]

    text_hex, raw_hex, got, is_null, charset = owner._run(read)
    assert bytes.fromhex(_text(text_hex)) == text.encode()
    assert bytes.fromhex(_text(raw_hex)) == raw
    assert (got, is_null, _text(charset)) == (number, 1, "binary")


@pytest.fixture
def owner(database: Database, backend: str) -> Iterator[BaseStore]:
    with database.owner() as opened:
        yield opened


def _text(value: Any) -> str:
    return value if isinstance(value, str) else bytes(value).decode()


@pytest.mark.usefixtures("backend")
def test_the_connection_that_opens_a_store_serves_its_first_calls(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(database.url)
    connect, made = store._connect, []

    def counted() -> Any:
        made.append(connect())
        return made[-1]

    monkeypatch.setattr(store, "_connect", counted)
    with store:
        store.save_event(event("s"))
        assert len(store.get_events("s")) == 1
    assert len(made) == 1


def test_the_pure_python_driver_stores_and_reads_the_same(database: Database, backend: str) -> None:
    with make_store(database.url + "?use-pure=1") as pure, make_store(database.url) as c:
        assert pure.health().driver_implementation == "python"
        assert c.health().driver_implementation == "c"
        events = [
            event(f"s{i % 3}", T0 + i, data={t: [t, i]}, working_directory=t, event_type=f"new{i}")
            for i, t in enumerate(TRICKY)
        ]
        assert pure.save_events(events[::2]) == len(events[::2])
        for one in events[1::2]:
            assert pure.save_event(one) is True
        both = [list(store.iter_events()) for store in (pure, c)]
        assert both[0] == both[1]
        assert sorted(both[0], key=lambda e: e.timestamp) == events
        pure.save_session(session("s1", manual_parent_session_id="s2", label="\0", is_pinned=True))
        pure.update_session("s1", parent_session_id="s0", hidden=True)
        assert pure.get_sessions() == c.get_sessions()
        assert pure.session_tree() == c.session_tree()
        assert pure.event_counts() == c.event_counts()
        pure.delete_session("s2")
        assert pure.get_session("s1") == c.get_session("s1")
        assert pure.find_events(session_id="s1", contains={}) == c.get_events("s1")[::-1]
        assert pure.delete_all_sessions() == 2


def test_socket_connections_work(database: Database, backend: str) -> None:
    path = database.server.socket_path
    if path is None:
        pytest.skip("an external server: its socket is not known")
    url = f"mysql://{database.user}:{database.password}@localhost/{database.name}?socket={path}"
    with make_store(url) as store:
        assert store.save_event(event()) is True
        assert str(path) in repr(store)


@pytest.mark.parametrize(
    "version", ["10.11.19-MariaDB-1", "5.5.5-10.4.1-MariaDB", "8.0.16", "5.7.44-log"]
)
def test_servers_that_are_not_supported_are_named(version: str, backend: str) -> None:
    with pytest.raises(ConfigurationError, match=r"place is M.*use MySQL 8.0.17 or newer"):
        _require_mysql(version, "place")
    _require_mysql("8.0.17", "place")
    _require_mysql("9.7.4-2", "place")


@pytest.mark.parametrize("options", ["", "?use-pure=1"])
def test_a_known_statement_takes_one_round_trip(
    database: Database, options: str, backend: str
) -> None:
    def sent(connection: Any) -> dict[str, int]:
        told = _execute(connection, "SHOW SESSION STATUS LIKE 'Com_stmt%'")
        return {name.removeprefix("Com_stmt_"): int(number) for name, number in told}

    def work(connection: Any) -> None:
        sent(connection)
        before = sent(connection)
        for number in range(10):
            assert _execute(connection, "SELECT %(n)s, _binary 0x00", {"n": number}) == [
                (number, b"\0")
            ]
        after = sent(connection)
        assert after["execute"] - before["execute"] == 11
        assert after["reset"] == 0

    with make_store(database.url + options) as store:
        store._run(work)


def test_a_connection_keeps_a_hundred_prepared_statements_and_closes_the_oldest(
    store: BaseStore, database: Database, backend: str
) -> None:
    def count() -> int:
        [(_, number)] = database.execute("SHOW GLOBAL STATUS LIKE 'Prepared_stmt_count'")
        return int(number)

    def work(connection: Any) -> None:
        before = count()
        for _ in range(2):
            for number in range(130):
                assert _execute(connection, f"SELECT {number}") == [(number,)]
        assert count() - before <= 100

    store._run(work)


def test_what_the_servers_packet_limit_lets_through_is_known_beforehand(
    own_database: Database, backend: str
) -> None:
    own_database.execute("SET GLOBAL max_allowed_packet = 1048576")
    small, large = event("s", T0, data={"x": "'" * 250_000}), event("s", data={"x": "'" * 270_000})
    try:
        with make_store(own_database.url) as store:
            said = r"^data: 270,\d+ bytes with its row, this server takes 262,144 \(raise max_all"
            with pytest.raises(InvalidRecord, match=said):
                store.save_event(large)
            done = store.save_events([large, small], on_error="skip")
            assert (done.stored, [r.index for r in done.refused]) == (1, [0])
            assert store.get_events("s") == [small]
    finally:
        own_database.execute("SET GLOBAL max_allowed_packet = DEFAULT")


# --- The pool -------------------------------------------------------------------------------------


class Fake:
    """A connection that only knows whether it lives: what the pool asks."""

    def __init__(self) -> None:
        self.alive = True
        self.closed = False

    def is_connected(self) -> bool:
        return self.alive

    def close(self) -> None:
        self.closed = True


def test_the_pool_reuses_the_last_connection_and_makes_as_many_as_needed(backend: str) -> None:
    pool = Pool(Fake, size=3, timeout=1)
    first = pool.take("here")
    pool.give_back(first)
    assert pool.take("here") is first
    second = pool.take("here")
    assert second is not first
    assert pool.in_use == 2


def test_the_pool_waits_for_a_slot_and_then_says_where(backend: str) -> None:
    pool = Pool(Fake, size=1, timeout=0.2)
    held = pool.take("here")
    with pytest.raises(StoreUnavailable, match="^here: no connection was free for 0.2 s"):
        pool.take("here")
    threading.Timer(0.05, pool.give_back, (held,)).start()
    assert pool.take("here") is held


def test_a_failed_connect_gives_its_slot_back(backend: str) -> None:
    def fail() -> None:
        raise StoreUnavailable("no server")

    pool = Pool(fail, size=1, timeout=0.2)
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="no server"):
            pool.take("here")
    assert pool.in_use == 0


def test_an_old_idle_connection_is_asked_and_a_dead_one_replaced(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(Fake, size=2, timeout=1)
    old = pool.take("here")
    pool.give_back(old)
    old.alive = False
    assert pool.take("here") is old  # too fresh to ask
    pool.give_back(old)
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    new = pool.take("here")
    assert new is not old
    assert old.closed


def test_a_closed_pool_closes_what_comes_back(backend: str) -> None:
    pool = Pool(Fake, size=2, timeout=1)
    idle, used = pool.take("here"), pool.take("here")
    pool.give_back(idle)
    pool.close()
    assert idle.closed
    assert not used.closed
    pool.give_back(used)
    assert used.closed


def test_a_broken_connection_gives_its_slot_back(backend: str) -> None:
    class Stubborn(Fake):
        def close(self) -> None:
            raise SystemError("of the C extension")

    pool = Pool(Stubborn, size=1, timeout=0.2)
    for _ in range(3):
        pool.give_back(pool.take("here"), broken=True)
    assert pool.in_use == 0


def test_a_server_that_restarts_is_waited_for(backend: str) -> None:
    tries: list[int] = []

    def connect() -> Fake:
        tries.append(1)
        if len(tries) < 3:
            raise StoreUnavailable("not yet")
        return Fake()

    assert isinstance(Pool(connect, size=1, timeout=5).take("here"), Fake)
    assert len(tries) == 3


@pytest.mark.parametrize("value", [object(), 1.5, 2**63, [1], Cursor(1, 2)])
def test_odd_parameters_never_reach_the_driver(value: object, backend: str) -> None:
    with pytest.raises(InvalidRecord):
        _plain(value)
    with pytest.raises(UnicodeEncodeError):
        _plain("\ud800")
    assert _plain(True) == 1
    assert type(_plain(True)) is int


def test_a_server_without_tls_is_refused_where_the_url_requires_it(
    database: Database, backend: str
) -> None:
    with make_store(database.url + "?ssl-mode=REQUIRED") as store:
        assert store.health().backend == "mysql"
    with pytest.raises(StoreRefused, match="offers no TLS"):
        _require_tls("", "place")
