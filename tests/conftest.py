"""Fixtures: private servers of both kinds, one database per test run, emptied for each test."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, settings

from contextuate_persist import open_store, retention, schema
from contextuate_persist.base import BaseStore
from contextuate_persist.mysql_store import MySQLStore
from contextuate_persist.partitions import Span
from contextuate_persist.postgresql_store import PostgreSQLStore
from tests import servers
from tests.authority import Authority
from tests.builders import T0
from tests.proxy import Proxy

BACKENDS = ("postgresql", "mysql")

# What a developer has set must not change what is tested.
for name in ("CONTEXTUATE_DATABASE_URL", "CONTEXTUATE_CONFIG", "PGSSLMODE", "PGPASSFILE"):
    os.environ.pop(name, None)

# Coverage measures the processes that tests run in, not those that they start: one that Ctrl-C
# interrupts there may wait for coverage's own lock for ever.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)

settings.register_profile(
    "default",
    deadline=None,  # a real server answers, now and then slowly
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=BACKENDS,
        action="append",
        help="run on this backend only; without it on both, and a missing server is a failure",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("backend") or BACKENDS
        metafunc.parametrize("backend", chosen, scope="session")
        # Where it matters, a test holds for both layouts of the table of events.
        names = getattr(metafunc.module, "BOTH_LAYOUTS", None)
        of_both = names is not None and re.search(names, metafunc.function.__name__)
        if of_both and "database" in metafunc.fixturenames:
            metafunc.parametrize("layout", schema.LAYOUTS, scope="session")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only(backend): the test is about this backend alone")
    marks = config.getoption("markexpr", "")
    if not marks:
        config.option.markexpr = "not soak"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop, not skip, the combinations that a test excludes."""
    kept, dropped = [], []
    for item in items:
        mark = item.get_closest_marker("only")
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("backend") if callspec else None
        (dropped if mark and backend not in (None, mark.args[0]) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Reports travel between processes as UTF-8, and hostile tests print what that cannot hold."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    return value


@dataclass(frozen=True)
class Database:
    """A database of a test server: the owner changes the schema, the application only data."""

    backend: str
    server: servers.Server
    name: str
    user: str
    password: str
    layout: str = "plain"

    @property
    def owner_url(self) -> str:
        return self.server.url(self.name)

    @property
    def url(self) -> str:
        return self.server.url(self.name, self.user, self.password)

    def owner(self) -> BaseStore:
        return make_store(self.owner_url)

    def execute(self, statement: str) -> list[Any]:
        return self.server.execute(statement, self.name)

    def connections(self) -> set[int]:
        """Those that the application's account has at the server by now."""
        rows = self.execute(
            f"SELECT pid FROM pg_stat_activity WHERE usename = '{self.user}'"
            if self.backend == "postgresql"
            else f"SELECT id FROM information_schema.processlist WHERE user = '{self.user}'"
        )
        return {number for (number,) in rows}

    def wait_for_end_of(self, process: subprocess.Popen[Any], others: set[int]) -> int:
        """Wait for a killed process, and until the server is through with its last statement.

        That may well be a commit. `others` are the connections that there were before it.
        """
        status = process.wait(20)
        until = time.monotonic() + 20
        while self.connections() - others:
            assert time.monotonic() < until, "the server goes on with a statement of the killed"
            time.sleep(0.005)
        return status

    def clear(self) -> None:
        tables: tuple[str, ...] = ("sessions", "deleted_sessions")
        if self.layout == "partitioned":  # MySQL's have no foreign key
            tables = ("event_ids", "events", *tables)
        self.server.execute_all([f"DELETE FROM {table}" for table in tables], self.name)

    def drop(self) -> None:
        self.server.drop_database(self.name)
        self.server.drop_login(self.user)


def make_store(url: str, **options: Any) -> BaseStore:
    return open_store(url, **options)


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each long work was told to rest between its steps; none of them does."""
    told: list[float] = []

    class Told(retention.Pace):
        def __init__(self, rest: float, stop: threading.Event | None = None) -> None:
            told.append(rest)
            super().__init__(0, stop)

    monkeypatch.setattr(retention, "Pace", Told)
    return told


_numbers = itertools.count()


def new_database(server: servers.Server) -> Database:
    """An empty database with an account that may select, insert, update and delete."""
    name = f"test_{secrets.token_hex(4)}_{next(_numbers)}"
    database = Database(server.kind, server, name, f"app_{name}"[:32], secrets.token_hex(8))
    server.create_database(name)
    server.create_login(database.user, database.password, name)
    return database


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[servers.Server]:
    with servers.postgresql_server() as server:
        yield server


@pytest.fixture(scope="session")
def mysql_server() -> Iterator[servers.Server]:
    with servers.mysql_server() as server:
        yield server


@pytest.fixture(scope="session")
def server(backend: str, request: pytest.FixtureRequest) -> servers.Server:
    """The server of the backend; a test that stops or kills it takes one of its own instead."""
    found: servers.Server = request.getfixturevalue(f"{backend}_server")
    return found


@pytest.fixture(scope="session")
def _shared_database(server: servers.Server) -> Iterator[Database]:
    database = new_database(server)
    database.owner().apply_schema()
    yield database
    database.drop()


@pytest.fixture(scope="session")
def _partitioned_database(server: servers.Server) -> Iterator[Database]:
    """One whose partitions are so short that every test has events in several."""
    database = replace(new_database(server), layout="partitioned")
    database.owner().apply_schema()
    bounds = [T0, T0 + 3, T0 + 10, T0 + 1000, T0 + 60_000]
    with database.owner()._partition_session(60) as session:
        session.prepare([ShortSpan(*span) for span in itertools.pairwise(bounds)])
        session.switch(0)
    yield database
    database.drop()


class ShortSpan(Span):
    """The bounds of a partition that is shorter than a day."""

    @property
    def suffix(self) -> str:
        return f"from_{self.start}"


@pytest.fixture(scope="session")
def layout() -> str:
    """The layout of the table of events. BOTH_LAYOUTS of a module names, as a regular
    expression, those of its tests that run on both.
    """
    return "plain"


@pytest.fixture
def database(_shared_database: Database, layout: str, request: pytest.FixtureRequest) -> Database:
    """A database with the schema and nothing in it."""
    # The shared one is an argument so that it is made before anything that a test replaces, such as
    # the version of the schema.
    found: Database = (
        _shared_database if layout == "plain" else request.getfixturevalue("_partitioned_database")
    )
    found.clear()
    return found


@pytest.fixture
def empty_database(server: servers.Server) -> Iterator[Database]:
    """A database without any schema."""
    database = new_database(server)
    yield database
    database.drop()


@pytest.fixture
def store(database: Database) -> Iterator[BaseStore]:
    """An open store of the application's account on an empty database."""
    with make_store(database.url) as opened:
        yield opened


@pytest.fixture
def proxy(database: Database) -> Iterator[Proxy]:
    port = urlsplit(database.url).port
    assert port is not None
    with make_store(database.url) as warm:  # MySQL then knows the password without TLS
        warm.get_events("s")
    with Proxy(port) as running:
        yield running


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where tests run as a job that would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def own_server(backend: str) -> Iterator[servers.Server]:
    """A second server that tests may stop and kill."""
    start = servers.postgresql_server if backend == "postgresql" else servers.mysql_server
    with start() as server:
        yield server


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who makes certificates for the servers of the tests, and for their clients."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def tls_server(backend: str, authority: Authority) -> Iterator[servers.Server]:
    """A server with a certificate; a PostgreSQL asks `certified` for one of the client, too."""
    right = authority.right
    if backend == "postgresql":
        access = [
            "hostssl all certified all scram-sha-256 clientcert=verify-ca",
            "hostnossl all certified all reject",
        ]
        started = servers.postgresql_server(tls=right, access=access)
    else:
        started = servers.mysql_server(tls=right)
    if started.external_url is not None:
        pytest.skip("an external server: its certificate is not ours to choose")
    with started as server:
        yield server


@pytest.fixture
def own_database(own_server: servers.Server) -> Iterator[Database]:
    own_server.start()
    database = new_database(own_server)
    database.owner().apply_schema()
    yield database
    own_server.start()
    with contextlib.suppress(Exception):
        database.drop()


__all__ = ["Database", "MySQLStore", "PostgreSQLStore"]
