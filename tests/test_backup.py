"""Backup and restore: all comes back, or nothing, and nobody sees a password."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlencode

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from contextuate_persist import (
    ConfigurationError,
    DamagedFile,
    SchemaError,
    StoreRefused,
    StoreUnavailable,
    accounts,
    backup_file,
    dumps,
    embedded,
    encryption,
    open_store,
)
from contextuate_persist import backup as backup_module
from contextuate_persist.accounts import Names
from contextuate_persist.backup import backup, restore, restore_test, verify_backup
from contextuate_persist.base import BaseStore
from contextuate_persist.cli import main
from contextuate_persist.config import ENVIRONMENT_URL
from contextuate_persist.doctor import Level
from contextuate_persist.dumps import Program
from contextuate_persist.schema import SchemaSession
from tests import servers
from tests.authority import ELSEWHERE, Authority
from tests.builders import T0, event, session, usage
from tests.conftest import Database, make_store, new_database

BOTH_LAYOUTS = "any_column"

PAYLOADS: list[dict[str, Any]] = [
    {},
    {"nul": "a\0b", "lone": "\ud800", "big": 10**40, "float": 1e22, "minus": -0.0},
    {"sql": "it''s \" delimiter ## q## some text ## '\nDELIMITER //\nDROP TABLE sessions //\n"},
    {"quotes": "\\'\\\"\\\\ \\. \\N \\! /*!50000 x */ -- \r\n\t\b\x1a\x7f", "ünï": "😀\u2028"},
    {"deep": {"a": [[[[{"b": None}]]]]}, "long": "x" * 2**20},
    {"copy": "\\.\n\\.\r\n", "psql": "\\! touch owned\n\\restrict\n:name :'x' $$ $1"},
    {"huge": "y" * (3 * 2**20)},
]


@pytest.fixture(scope="session")
def _mysql_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tools")
    next(iter(servers.find_mysql())).write_tools(directory)
    return directory


@pytest.fixture(autouse=True)
def _programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """MySQL's client programs on the PATH, as on a machine that has them installed."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "mysql":
        tools = request.getfixturevalue("_mysql_tools")
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


@pytest.fixture
def filled(database: Database, store: BaseStore) -> BaseStore:
    """A store with everything that a store can hold."""
    store.save_session(session("root", label="nul \0 \ud800", child_session_ids=("kid", "gone")))
    store.save_session(session("kid", parent_session_id="root", is_pinned=True))
    store.save_session(session("päth 😀'\"\\"))
    store.save_session(session("gone"))
    events = [event("root", T0 + n // 2, data=data) for n, data in enumerate(PAYLOADS)]
    store.save_events([*events, event("orphan", event_type="of_tomorrow", hook_type="New")])
    store.save_usage("root", [usage("msg_1", 7), usage("msg_2", 8)])
    store.save_event(event("kid", T0 + 10_000))
    store.delete_session("gone")
    return store


def columns_of(database: Database, table: str) -> dict[str, str]:
    """The type of each column; the one that is left out follows from two others."""
    place = "current_schema()" if database.backend == "postgresql" else "DATABASE()"
    rows = database.execute(
        "SELECT column_name, CAST(data_type AS CHAR(40)) FROM information_schema.columns "
        f"WHERE table_name = '{table}' AND table_schema = {place}"
    )
    return {name: kind.strip() for name, kind in sorted(rows) if name != "effective_parent_id"}


def everything(database: Database) -> dict[str, list[Any]]:
    """All rows of all tables."""
    found = {}
    for table in ("sessions", "events", "token_ledger", "deleted_sessions", "schema_version"):
        names = ", ".join(columns_of(database, table))
        found[table] = sorted(map(repr, database.execute(f"SELECT {names} FROM {table}")))
    return found


def problems(store: BaseStore) -> list[str]:
    """What `check` says, but for the administrator's privileges, which tests use."""
    return [
        str(one)
        for one in store.check()
        if one.level is Level.PROBLEM or (one.level is Level.WARNING and one.check == "schema")
    ]


@pytest.fixture
def target(server: servers.Server) -> Iterator[Callable[[], Database]]:
    """Makes empty databases."""
    made: list[Database] = []

    def make() -> Database:
        made.append(new_database(server))
        return made[-1]

    yield make
    for database in made:
        database.drop()


@pytest.fixture
def key(tmp_path: Path) -> tuple[str, Path]:
    return encryption.new_identity(tmp_path / "key"), tmp_path / "key"


# --- There and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("schema_first", [False, True])
def test_everything_comes_back(
    filled: BaseStore,
    database: Database,
    target: Callable[[], Database],
    tmp_path: Path,
    schema_first: bool,
) -> None:
    made = backup(filled, tmp_path / "b")
    assert verify_backup(tmp_path / "b") == made
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    empty = target()
    if schema_first:
        empty.owner().apply_schema()
    assert restore(empty.owner(), tmp_path / "b") == made
    found, expected = everything(empty), everything(database)
    if schema_first:  # which then keeps when it was applied
        found["schema_version"] = expected["schema_version"]
    assert found == expected
    with make_store(empty.owner_url) as restored:
        assert restored.get_sessions() == filled.get_sessions()
        assert list(restored.iter_events()) == list(filled.iter_events())
        cursors = [[one.cursor for one in each.iter_events()] for each in (restored, filled)]
        assert cursors[0] == cursors[1]
        assert restored.save_event(event("gone", T0 - 1)) is False  # the deletion holds
        assert problems(restored) == []


def test_a_sequence_does_not_go_back_behind_what_was_given_out(
    filled: BaseStore, database: Database, target: Callable[[], Database], tmp_path: Path
) -> None:
    filled.save_event(event("newest", T0))
    (newest,) = filled.get_events("newest")
    filled.delete_session("newest")
    with make_store(database.owner_url) as owner:
        backup(owner, tmp_path / "b")
    for schema_first in (False, True):
        empty = target()
        if schema_first:
            empty.owner().apply_schema()
        restore(empty.owner(), tmp_path / "b")
        with make_store(empty.owner_url) as restored:
            restored.save_event(event("next", T0))
            assert restored.get_events("next")[0].cursor > newest.cursor


def test_an_empty_store_is_backed_up_and_restored(
    store: BaseStore, target: Callable[[], Database], tmp_path: Path
) -> None:
    backup(store, tmp_path / "b")
    empty = target()
    restore(empty.owner(), tmp_path / "b")
    with make_store(empty.owner_url) as restored:
        assert restored.get_sessions() == []
        assert restored.save_event(event()) is True


def test_tables_of_others_are_not_taken_along(
    filled: BaseStore, database: Database, target: Callable[[], Database], tmp_path: Path
) -> None:
    database.execute("CREATE TABLE theirs (secret INT)")
    database.execute("CREATE VIEW their_view AS SELECT * FROM theirs")
    try:
        backup(filled, tmp_path / "b")
    finally:
        database.execute("DROP VIEW their_view")
        database.execute("DROP TABLE theirs")
    empty = target()
    restore(empty.owner(), tmp_path / "b")
    rows = empty.execute(
        "SELECT table_name FROM information_schema.tables WHERE table_name LIKE 'their%' "
        + ("" if database.backend == "postgresql" else "AND table_schema = DATABASE()")
    )
    assert rows == []


@pytest.mark.only("postgresql")
def test_an_embedded_store_is_backed_up_and_restored_into(backend: str, tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="cxp-", dir="/tmp"))
    directory.chmod(0o755)
    try:
        with embedded.EmbeddedStore(directory / "one") as store:
            store.save_events([event(data=data) for data in PAYLOADS])
            backup(store, tmp_path / "b")
            events = store.get_events("s")
        with embedded.EmbeddedPostgreSQL(directory / "two") as server:
            restore(open_store(server.url), tmp_path / "b")
        with embedded.EmbeddedStore(directory / "two") as store:
            assert store.get_events("s") == events
    finally:
        shutil.rmtree(directory)


def test_a_hostile_database_name_is_only_a_name(
    server: servers.Server, database: Database, tmp_path: Path
) -> None:
    name = "--help=x' \"y\\ $(touch owned) \x1b[2J\u202e"
    quote = '"' if server.kind == "postgresql" else "`"
    quoted = quote + name.replace(quote, quote * 2) + quote
    server.execute(f"CREATE DATABASE {quoted}")
    try:
        make_store(server.url(name)).apply_schema()
        with make_store(server.url(name)) as store:
            store.load_sample()
            assert backup(store, tmp_path / "b").database == name
            store.delete_all_sessions()
        database.clear()
        restore(database.owner(), tmp_path / "b")
        with make_store(database.url) as store:
            assert backup(store, tmp_path / "b2").contents.sessions == 4
        server.execute(f"DROP DATABASE {quoted}")
        server.execute(f"CREATE DATABASE {quoted}")
        restore(make_store(server.url(name)), tmp_path / "b2")
    finally:
        server.execute(f"DROP DATABASE {quoted}")


class Keeper:
    def __init__(self) -> None:
        self.kept: dict[str, accounts.Account] = {}

    def require(self) -> None: ...

    def keep(self, account: accounts.Account) -> None:
        self.kept[account.purpose] = account


@pytest.fixture
def new_names(server: servers.Server) -> Iterator[Callable[[], Names]]:
    """Names for what `setup` makes, which is dropped in the end."""
    made: list[Names] = []

    def new() -> Names:
        made.append(Names().of(f"b{len(made)}_{random.randrange(10**6)}"))
        return made[-1]

    yield new
    for names in made:
        server.drop_database(names.database)
        for role in (names.application, names.reader, names.owner):
            server.drop_login(role)


def test_the_accounts_that_setup_makes_back_up_and_its_database_takes_it(
    server: servers.Server, new_names: Callable[[], Names], tmp_path: Path
) -> None:
    """The read-only account makes the backup; what a new set-up made is restored into."""
    for round_ in ("one", "two"):
        names = new_names()
        keeper = Keeper()
        url = server.url("postgres" if server.kind == "postgresql" else "mysql")
        with open_store(url).administer(names) as administrator:
            list(accounts.provide(administrator, keeper))
            owner = administrator.owner_store()
        urls = {
            purpose: server.url(names.database, account.user, account.password)
            for purpose, account in keeper.kept.items()
        }
        with make_store(urls["application"]) as application:
            if round_ == "one":
                application.save_events([event(data=data) for data in PAYLOADS])
                application.save_usage("s", [usage()])
                with make_store(urls["read-only"]) as reader:
                    backup(reader, tmp_path / "b")
                backup(application, tmp_path / "b2")
            else:
                restore(owner, tmp_path / "b")
                assert len(application.get_events("s")) == len(PAYLOADS)
                assert application.save_event(event()) is True
                assert problems(application) == []


def test_setup_after_a_partitioned_restore_lets_its_accounts_back_up(
    server: servers.Server, new_names: Callable[[], Names], tmp_path: Path
) -> None:
    """What was partitioned before there were privileges is open like what comes after."""
    for round_ in ("one", "two"):
        names = new_names()
        keeper = Keeper()
        url = server.url("postgres" if server.kind == "postgresql" else "mysql")
        with open_store(url).administer(names) as administrator:
            owner = administrator.owner_store()
            if round_ == "two":
                administrator.create_owner()
                administrator.create_database()
                restore(owner, tmp_path / "one")
            list(accounts.provide(administrator, keeper))
            if round_ == "one":
                owner.partition_events("month")
                owner.discard_unpartitioned()
            again = list(accounts.provide(administrator, keeper))
            assert not any(step.changed for step in again)
        account = keeper.kept["application"]
        with make_store(server.url(names.database, account.user, account.password)) as application:
            application.save_event(event(round_))
        account = keeper.kept["read-only"]
        with make_store(server.url(names.database, account.user, account.password)) as reader:
            backup(reader, tmp_path / round_)
        if server.kind == "postgresql":
            rights = (
                "SELECT DISTINCT relacl::text FROM pg_class "
                "WHERE relname LIKE 'events%' AND relkind IN ('r', 'p')"
            )
            owner.partition_events("month", ahead=24)
            assert len(server.execute(rights, names.database)) == 1


def test_a_backup_sees_one_moment_while_writers_go_on(
    database: Database, store: BaseStore, target: Callable[[], Database], tmp_path: Path
) -> None:
    """Each writer's events are there up to some point, without a gap."""
    stop = threading.Event()
    store.save_events([event(f"old{n}", data={"x": "y" * 2000}) for n in range(500)])

    def write(writer: int) -> None:
        with make_store(database.url) as own:
            number = 0
            while not stop.is_set():
                own.save_event(event(f"w{writer}", T0 + number, data={"n": number}))
                number += 1

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        made = backup(store, tmp_path / "b")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert made.moving <= 3
    empty = target()
    restore(empty.owner(), tmp_path / "b")
    with make_store(empty.owner_url) as restored:
        for n in range(3):
            numbers = [one.data["n"] for one in restored.get_events(f"w{n}", limit=100_000)]
            assert numbers == list(range(len(numbers)))
            assert numbers
            assert len(numbers) <= len(store.get_events(f"w{n}", limit=100_000))


def test_what_goes_and_comes_while_a_dump_begins_is_no_damage(
    store: BaseStore,
    target: Callable[[], Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fewer events in the dump than before it, and than after it."""
    store.save_events([event(f"s{n % 2}", T0 + n) for n in range(20)])
    snapshot = store.snapshot

    @contextlib.contextmanager
    def before() -> Iterator[dumps.Snapshot]:
        monkeypatch.setattr(store, "snapshot", after)
        with snapshot() as seen:
            store.delete_session("s0")
            yield seen

    def after() -> contextlib.AbstractContextManager[dumps.Snapshot]:
        store.save_events([event("s2", T0 + n) for n in range(5)])
        return snapshot()

    monkeypatch.setattr(store, "snapshot", before)
    made = backup(store, tmp_path / "b")
    assert made.moving == (2 if store.backend == "mysql" else 0)
    restore(target().owner(), tmp_path / "b")


@contextlib.contextmanager
def impatient(server: servers.Server) -> Iterator[None]:
    """A server that ends what is idle, or does not read, for a second."""
    if server.kind == "mysql":
        names = ["@@GLOBAL.wait_timeout", "@@GLOBAL.net_write_timeout"]
        before = server.execute(f"SELECT {', '.join(names)}")[0]
        impatience = [f"SET {name} = 1" for name in names]
        patience = [f"SET {name} = {value}" for name, value in zip(names, before, strict=True)]
    else:
        rows = server.execute(
            "SELECT name FROM pg_settings WHERE name IN ('idle_session_timeout', "
            "'idle_in_transaction_session_timeout', 'transaction_timeout')"
        )
        impatience = [f"ALTER ROLE ALL SET {name} = '1s'" for (name,) in rows]
        patience = [f"ALTER ROLE ALL RESET {name}" for (name,) in rows]
    try:
        for statement in impatience:
            server.execute(statement)
        yield
    finally:
        for statement in patience:
            server.execute(statement)


def test_a_server_that_ends_idle_connections_ends_no_backup_and_no_restore(
    store: BaseStore, database: Database, server: servers.Server
) -> None:
    """While a program works for long, our own connections have nothing to do."""
    before = databases(server)
    with impatient(server), contextlib.ExitStack() as stack:
        snapshot = stack.enter_context(store.snapshot())
        contents = snapshot.contents()
        session = stack.enter_context(database.owner().schema_session())
        stack.enter_context(
            open_store(server.url(database.name)).scratch("contextuate_restore_idle")
        )
        time.sleep(1.3)
        assert snapshot.contents() == contents
        assert session.has_rows("schema_version")
    assert databases(server) == before


@pytest.mark.only("mysql")
def test_a_server_waits_for_the_reader_of_the_sums(
    database: Database, store: BaseStore, server: servers.Server
) -> None:
    """The second sums of a backup are begun, and may take long, when the first are not read yet."""
    database.execute(
        "INSERT INTO sessions (session_id, machine_id, working_directory, start_time, status) "
        "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 80) "
        "SELECT CONCAT(a.n * 1000 + b.n, REPEAT('😀', 240)), 'm', '/', 1, 'active' "
        "FROM n AS a JOIN n AS b"
    )
    with impatient(server), store.snapshot() as snapshot:
        sums = snapshot.sums()
        next(sums)
        time.sleep(1.5)
        assert sum(1 for _ in sums) == 80 * 80 - 1


# --- Sums -----------------------------------------------------------------------------------------

#: Another value of a column, by its type.
OTHER_VALUES = {
    "postgresql": {
        "bigint": "COALESCE({0}, 0) + 1",
        "boolean": "NOT {0}",
        "bytea": "COALESCE({0}, '') || 'x'",
        "character varying": "COALESCE({0}, '') || 'x'",
        "jsonb": "COALESCE({0}, '{{}}') || '{{\"x\": 1}}'",
        "text": "COALESCE({0}, '') || 'x'",
        "timestamp with time zone": "{0} + interval '1 microsecond'",
        "USER-DEFINED": "enum_first({0})",
        "uuid": "md5({0}::text)::uuid",
    },
    "mysql": {
        "bigint": "COALESCE({0}, 0) + 1",
        "binary": "UNHEX(LEFT(SHA2({0}, 256), 32))",
        "json": "JSON_MERGE_PRESERVE(COALESCE({0}, JSON_OBJECT()), JSON_OBJECT('x', 1))",
        "longblob": "CONCAT(COALESCE({0}, ''), 'x')",
        "text": "CONCAT(COALESCE({0}, ''), 'x')",
        "timestamp": "{0} + INTERVAL 1000 MICROSECOND",
        "tinyint": "1 - {0}",
        "varchar": "CONCAT(COALESCE({0}, ''), 'x')",
    },
}


#: Of columns that take some values only.
OTHER_VALUE = {
    "sessions.known_from": "'event'",
    "sessions.parent_session_id": "'other'",
    "sessions.status": "'active'",
    "events.session_id": "'other'",
    "token_ledger.session_id": "'other'",
}


def change(database: Database, columns: dict[str, str], where: str) -> None:
    """Give columns, a type for each, another value, and no other column with them."""
    postgresql = database.backend == "postgresql"
    # Or a trigger sets updated_at.
    statements = ["SET session_replication_role = replica"] if postgresql else []
    for name, kind in columns.items():
        table, _, column = name.partition(".")
        value = OTHER_VALUES[database.backend][kind].format(column)
        if name == "events.seq" and postgresql and database.layout == "plain":
            value = "DEFAULT"  # GENERATED ALWAYS
        kept = ", updated_at = updated_at" if table == "sessions" and column != "updated_at" else ""
        statements.append(
            f"UPDATE {table} SET {column} = {OTHER_VALUE.get(name, value)}{kept} "
            + where.format(name)
        )
    database.server.execute_all(statements, database.name)


def test_a_change_of_any_column_is_in_the_sums_of_its_session(
    database: Database, store: BaseStore
) -> None:
    """A session for each column, so that each changes in its own.

    The row of schema_version has no sum: it comes with the structure, or was there before.
    """
    columns = {
        f"{table}.{column}": kind
        for table in ("sessions", "events", "token_ledger")
        for column, kind in columns_of(database, table).items()
    }
    store.save_sessions(
        session(name, end_time=T0, status="completed") for name in (*columns, "other")
    )
    for name in columns.keys() - {"sessions.session_id"}:  # rows that refer to it keep it
        store.save_event(event(name, event_type="other", hook_type="other"))
        store.save_usage(name, [usage(name)])

    def sums() -> dict[str, dumps.Sums]:
        with store.snapshot() as snapshot:
            return {one.session_id: one for one in snapshot.sums()}

    before = sums()
    assert sums() == before
    change(database, columns, "WHERE session_id = '{}'")
    after = sums()
    assert [name for name in columns if after.get(name) == before[name]] == []


def test_a_change_of_any_column_is_in_the_sums_of_deletions_and_ids(
    database: Database, store: BaseStore
) -> None:
    store.save_events([event("s"), event("gone")])
    store.delete_session("gone")

    def total(name: str) -> int:
        with store.snapshot() as snapshot:
            found: int = getattr(snapshot.contents(), name)
            return found

    for table, name in (("deleted_sessions", "deletions_sum"), ("event_ids", "ids_sum")):
        columns = columns_of(database, table)
        assert columns or database.layout == "plain"
        for column, kind in columns.items():
            before = total(name)
            change(database, {f"{table}.{column}": kind}, "")
            assert total(name) != before, column


def test_what_is_loaded_is_compared_with_the_sums(
    filled: BaseStore,
    target: Callable[[], Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backup(filled, tmp_path / "b")
    empty = target()
    compare = backup_module._compare

    def change_then_compare(*arguments: Any) -> None:
        empty.execute("UPDATE events SET tool_name = 'x' WHERE session_id = 'kid'")
        empty.execute("UPDATE deleted_sessions SET deleted_at = deleted_at + 1")
        compare(*arguments)

    monkeypatch.setattr(backup_module, "_compare", change_then_compare)
    with pytest.raises(DamagedFile, match="from the backup: another deletions_sum; session kid; "):
        restore(empty.owner(), tmp_path / "b")


# --- Files ----------------------------------------------------------------------------------------


@pytest.fixture
def made(filled: BaseStore, tmp_path: Path) -> Path:
    return Path(backup(filled, tmp_path / "made.backup").path)


def test_an_encrypted_backup_needs_its_key(
    filled: BaseStore,
    target: Callable[[], Database],
    tmp_path: Path,
    key: tuple[str, Path],
) -> None:
    public, identity = key
    path = tmp_path / "b.age"
    made = backup(filled, path, recipients=[public])
    assert made.encrypted
    assert b"backup.json" not in path.read_bytes()
    assert b"DROP TABLE" not in path.read_bytes()
    assert verify_backup(path, identity=identity) == made
    with pytest.raises(ConfigurationError, match="--identity"):
        verify_backup(path)
    encryption.new_identity(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="not encrypted for this key"):
        verify_backup(path, identity=tmp_path / "other")
    size = path.stat().st_size
    for cut in (0, 10, 500, size // 2, size - 1):
        damaged = tmp_path / f"cut{cut}"
        damaged.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(DamagedFile):
            verify_backup(damaged, identity=identity)
    empty = target()
    restore(empty.owner(), path, identity=identity)
    with make_store(empty.owner_url) as restored:
        assert list(restored.iter_events()) == list(filled.iter_events())


def test_what_is_damaged_or_cut_is_noticed_before_anything_is_changed(
    made: Path, target: Callable[[], Database], tmp_path: Path
) -> None:
    data = made.read_bytes()
    with tarfile.open(made) as tar:
        last = tar.getmember("SHA256SUMS")
    empty = target()
    chance = random.Random(1)
    for number in range(60):
        changed = bytearray(data)
        place = chance.randrange(last.offset_data + last.size)
        if number % 2:
            del changed[place:]
        else:
            changed[place] ^= 1 << chance.randrange(8)
        path = tmp_path / "damaged"
        path.write_bytes(changed)
        # Of what a tar says of a member nothing matters but its name, size and content.
        if number % 2 == 0 and content(path) == content(made):
            continue
        with pytest.raises((DamagedFile, ConfigurationError)) as caught:
            restore(empty.owner(), path)
        assert "\n" not in str(caught.value)
    assert empty.execute(
        "SELECT count(*) FROM information_schema.tables WHERE table_name = 'sessions'"
        + (" AND table_schema = DATABASE()" if empty.backend == "mysql" else "")
    ) == [(0,)]


def content(path: Path) -> list[tuple[str, bytes]] | None:
    try:
        with tarfile.open(path, mode="r|") as tar:
            return [(one.name, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]
    except (tarfile.TarError, AttributeError):
        return None


def test_what_is_no_backup_is_refused_in_one_line(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "tar", "w") as tar:
        info = tarfile.TarInfo("x")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    (tmp_path / "text").write_text("no backup\n" * 1000)
    (tmp_path / "empty").touch()
    (tmp_path / "age").write_bytes(b"age-encryption.org/v1\n-> X25519 x\n")
    encryption.new_identity(tmp_path / "key")
    for name in ("tar", "text", "empty", "age", "missing", "."):
        given = ["restore", str(tmp_path / name), "--url", database.owner_url]
        assert main([*given, "--identity", str(tmp_path / "key")]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = [one for one in captured.err.splitlines() if "warning: a password" not in one]
        assert len(lines) == 1


def test_a_backup_of_the_other_database_is_refused(
    made: Path, target: Callable[[], Database], tmp_path: Path, backend: str
) -> None:
    other = "mysql" if backend == "postgresql" else "postgresql"
    members = content(made)
    assert members is not None
    stream = (tmp_path / "other").open("wb")
    with stream:
        writer = backup_file.Writer(stream)
        for name, data in members[:-1]:
            changed = data.replace(
                f'"backend": "{backend}"'.encode(), f'"backend": "{other}"'.encode()
            )
            writer.add(name, changed if name.endswith(".json") else data)
        writer.finish()
    with pytest.raises(ConfigurationError, match=f"a backup of {other}, and the database is"):
        restore(target().owner(), tmp_path / "other")


def test_nothing_is_overwritten_and_a_directory_gets_a_new_file(
    store: BaseStore, tmp_path: Path
) -> None:
    (tmp_path / "there").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            backup(store, tmp_path / name)
    assert (tmp_path / "there").read_text() == "precious"
    (tmp_path / "directory").mkdir()
    made = Path(backup(store, tmp_path / "directory").path)
    assert list((tmp_path / "directory").iterdir()) == [made]
    with pytest.raises(FileNotFoundError):
        backup(store, tmp_path / "missing" / "b")


def test_a_disk_without_links_takes_a_backup_and_keeps_what_is_there(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exFAT and many network mounts, which nobody can mount here."""

    def no_links(source: Path, _: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(source))

    monkeypatch.setattr(os, "link", no_links)
    backup(store, tmp_path / "b")
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]
    assert verify_backup(tmp_path / "b")

    def somebody_comes_first() -> None:
        with backup_module._new_file(tmp_path / "late"):
            (tmp_path / "late").write_text("precious")

    with pytest.raises(FileExistsError):
        somebody_comes_first()
    assert (tmp_path / "late").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"b", "late"}


def test_a_full_disk_leaves_no_half_file(
    filled: BaseStore, database: Database, tmp_path: Path
) -> None:
    code = (
        "import resource, sys; from contextuate_persist.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "backup", "--to", str(tmp_path / "b")],
        env={**os.environ, ENVIRONMENT_URL: database.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "contextuate-persist: error: File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_part_never_needs_more_memory_than_it_should(
    filled: BaseStore, target: Callable[[], Database], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(backup_file, "PART_BYTES", 1000)
    backup(filled, tmp_path / "b")
    sizes = [len(data) for name, data in content(tmp_path / "b") or () if name.startswith("data.")]
    assert len(sizes) > 10
    assert max(sizes) == 1000
    restore(target().owner(), tmp_path / "b")


@pytest.mark.only("postgresql")
def test_how_a_database_shows_bytes_is_no_difference(
    made: Path, target: Callable[[], Database]
) -> None:
    empty = target()
    empty.execute(f"ALTER DATABASE {empty.name} SET bytea_output = 'escape'")
    restore(empty.owner(), made)


@pytest.mark.only("postgresql")
def test_a_tablespace_of_the_old_server_is_not_asked_for(
    filled: BaseStore, database: Database, target: Callable[[], Database], tmp_path: Path
) -> None:
    server, name = database.server, f"fast_{database.name}"
    place = server.directory / "fast"
    place.mkdir()
    if (owner := server.setup.get("user")) is not None:
        os.chown(place, owner, server.setup["group"])
    database.execute(f"CREATE TABLESPACE {name} LOCATION '{place}'")
    database.execute(f"ALTER TABLE events SET TABLESPACE {name}")
    try:
        backup(filled, tmp_path / "b")
    finally:
        database.execute("ALTER TABLE events SET TABLESPACE pg_default")
        database.execute(f"DROP TABLESPACE {name}")
        place.rmdir()
    restore(target().owner(), tmp_path / "b")


# --- Refusals -------------------------------------------------------------------------------------


def test_a_database_that_holds_anything_is_left_alone(
    made: Path, database: Database, target: Callable[[], Database]
) -> None:
    with make_store(database.url) as store:
        store.update_session("kid", label="of another time")
    before = everything(database)
    with pytest.raises(ConfigurationError, match="holds data.* make another database"):
        restore(database.owner(), made)
    with make_store(database.url) as store:
        store.save_event(event("kid", T0 + 77))
    with pytest.raises(ConfigurationError, match="holds data.* make another database"):
        restore(database.owner(), made)
    assert everything(database)["sessions"] == before["sessions"]
    foreign = target()
    foreign.execute("CREATE TABLE sessions (x INT)")
    with pytest.raises(SchemaError, match="of another origin"):
        restore(foreign.owner(), made)


@pytest.mark.parametrize("what", ["session", "deletion"])
def test_what_is_written_right_before_the_rows_are_loaded_is_left_alone(
    made: Path, target: Callable[[], Database], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = target()
    owner = empty.owner()
    owner.apply_schema()
    schema_session = owner.schema_session
    written: list[dict[str, list[Any]]] = []

    @contextlib.contextmanager
    def overtaken() -> Iterator[SchemaSession]:
        with schema_session() as schema:
            around = schema.around

            def late(contents: dumps.Contents) -> tuple[list[str], list[str]]:
                with make_store(empty.url) as store:
                    store.save_session(session("theirs"))
                    if what == "deletion":
                        store.delete_session("theirs")
                written.append(everything(empty))
                return around(contents)

            monkeypatch.setattr(schema, "around", late)
            yield schema

    monkeypatch.setattr(owner, "schema_session", overtaken)
    with pytest.raises(StoreRefused, match="somebody has written into the database meanwhile"):
        restore(owner, made)
    assert [everything(empty)] == written


LOCKED = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE relation = 'sessions'::regclass "
    "AND mode = 'AccessExclusiveLock' AND granted",
    "mysql": "SELECT COUNT(*) FROM performance_schema.metadata_locks "
    "WHERE object_schema = DATABASE() AND object_name = 'sessions' "
    "AND lock_type = 'SHARED_NO_READ_WRITE' AND lock_status = 'GRANTED'",
}


def test_who_writes_while_rows_are_loaded_has_to_wait(
    made: Path, database: Database, target: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = target()
    owner = empty.owner()
    owner.apply_schema()
    dumper = owner.dumper
    refused: list[StoreUnavailable] = []

    def write_late(data: Iterable[bytes]) -> Iterator[bytes]:
        yield from data
        until = time.monotonic() + 30
        while empty.execute(LOCKED[empty.backend]) == [(0,)]:
            assert time.monotonic() < until
            time.sleep(0.01)
        with make_store(empty.url, lock_timeout=1) as store:
            with pytest.raises(StoreUnavailable) as caught:
                store.save_session(session("theirs"))
            refused.append(caught.value)

    def slow(*given: str) -> dumps.Dumper:
        found = dumper(*given)
        load = found.load
        monkeypatch.setattr(
            found,
            "load",
            lambda schema, all_: load(schema, all_._replace(data=write_late(all_.data))),
        )
        return found

    monkeypatch.setattr(owner, "dumper", slow)
    restore(owner, made)
    assert len(refused) == 1
    assert everything(empty)["sessions"] == everything(database)["sessions"]


def test_a_restore_waits_for_locks_no_longer_than_it_is_told(
    made: Path, target: Callable[[], Database], server: servers.Server
) -> None:
    empty = target()
    empty.owner().apply_schema()
    reader = server._connect(empty.name)
    try:
        cursor = reader.cursor()
        cursor.execute("BEGIN")
        cursor.execute("SELECT session_id FROM sessions")
        assert cursor.fetchall() == []
        begun = time.monotonic()
        with pytest.raises(StoreRefused, match=r"(?i)lock (wait )?timeout"):
            restore(make_store(empty.owner_url, lock_timeout=1), made)
        assert time.monotonic() - begun < 20
        assert everything(empty)["sessions"] == []
    finally:
        reader.close()


def test_another_version_of_the_schema_names_who_restores_it(
    made: Path, target: Callable[[], Database], monkeypatch: Any
) -> None:
    old = target()
    old.owner().apply_schema()
    old.execute("UPDATE schema_version SET version = 0")
    with pytest.raises(SchemaError, match="restore into a database without a schema"):
        restore(old.owner(), made)
    monkeypatch.setattr("contextuate_persist.schema.SCHEMA_VERSION", 2)
    with pytest.raises(SchemaError, match=r"restore it with contextuate-persist 0\.1"):
        restore(target().owner(), made)


def test_an_account_that_may_not_is_told_so_in_one_line(
    made: Path, target: Callable[[], Database], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    empty = target()
    monkeypatch.setenv(ENVIRONMENT_URL, empty.url)
    assert main(["restore", str(made)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "denied" in line


def test_missing_or_old_programs_are_named_with_what_to_install(
    store: BaseStore, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded, "candidates", lambda: iter(()))
    package = "postgresql-client-" if backend == "postgresql" else "repo.mysql.com"
    with pytest.raises(ConfigurationError, match=f"not installed: .*{package}"):
        backup(store, tmp_path / "b")
    for version in ("pg_dump (PostgreSQL) 9.6.1", "mysqldump  Ver 10.11 Distrib MariaDB"):
        for name in ("pg_dump", "pg_restore", "psql", "mysqldump", "mysql"):
            (tmp_path / name).write_text(f"#!/bin/sh\necho '{version}'\n")
            (tmp_path / name).chmod(0o755)
        if ("mysql" in version) == (backend == "mysql"):
            with pytest.raises(ConfigurationError, match=f"(too old|MariaDB).*{package}"):
                backup(store, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_dump_that_fails_gives_its_reason_and_no_file(
    store: BaseStore,
    backend: str,
    server: servers.Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pg_dump ends in the middle, as a server that goes away would have it."""
    directory = tmp_path / "programs"
    directory.mkdir()
    name = "pg_dump" if backend == "postgresql" else "mysqldump"
    real = programs(server)
    for program in ("pg_dump", "pg_restore", "psql", "mysqldump", "mysql"):
        (directory / program).write_text(f'#!/bin/sh\nexec "{real / program}" "$@"\n')
        (directory / program).chmod(0o755)
    (directory / name).write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec "{real / name}" --version\n'
        f"echo half; echo '{name}: error: the server went away' >&2; exit 3\n"
    )
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    with pytest.raises(Exception, match="error: the server went away"):
        backup(store, tmp_path / "b")
    assert list(tmp_path.iterdir()) == [directory]


def programs(server: servers.Server) -> Path:
    if server.kind == "postgresql":
        return dumps._postgresql_programs(int(server.version.split()[1].split(".")[0]))[0]
    found = shutil.which("mysqldump")
    assert found is not None
    return Path(found).parent


def test_a_program_whose_end_is_heard_of_by_somebody_else_has_not_succeeded() -> None:
    """Of a status that is lost Popen makes a zero."""
    with Program(["/bin/sh", "-c", "exit 3"], environment=os.environ) as program:
        os.waitid(os.P_PID, program._process.pid, os.WEXITED)
        with pytest.raises(StoreRefused, match="sh: how it ended was lost, since this process"):
            program.finish()
    with (
        Program(["/bin/sh", "-c", "exit 3"], environment=os.environ) as program,
        pytest.raises(StoreRefused, match="sh: exit status 3"),
    ):
        program.finish()
    with Program(["/bin/true"], environment=os.environ) as program:
        program.finish()


# --- Secrets --------------------------------------------------------------------------------------


def test_no_password_is_on_any_command_line(
    filled: BaseStore,
    database: Database,
    backend: str,
    server: servers.Server,
    target: Callable[[], Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every program is run by one that looks at every command line of the machine first."""
    password = "pa ss'w\\o\"r:d#%"
    login = f"reader_{random.randrange(10**9)}"
    real = programs(server)
    directory = tmp_path / "programs"
    directory.mkdir()
    secret = directory / "secret"
    secret.write_text("ss'w\n")
    seen, looked = tmp_path / "seen", tmp_path / "looked"
    for name in ("pg_dump", "pg_restore", "psql", "mysqldump", "mysql"):
        (directory / name).write_text(
            "#!/bin/sh\n"
            f"echo {name} >> {looked}\n"
            "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' "
            f"| grep -aF -f {secret} >> {seen}\n"
            f'exec "{real / name}" "$@"\n'
        )
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    empty = target()
    logins = {each.name: f"{login}_{number}" for number, each in enumerate((database, empty))}
    for each, name in logins.items():
        server.create_login(name, password, each, ("ALL",))
    try:
        url = server.url(database.name, logins[database.name], password)
        monkeypatch.setenv(ENVIRONMENT_URL, url)
        assert main(["backup", "--to", str(tmp_path / "b"), "--verify", "-v"]) == 0
        own = server.url(empty.name, logins[empty.name], password)
        monkeypatch.setenv(ENVIRONMENT_URL, own)
        if backend == "postgresql":
            empty.execute(f'GRANT ALL ON SCHEMA public TO "{logins[empty.name]}"')
        assert main(["restore", str(tmp_path / "b"), "-v"]) == 0
    finally:
        for each, name in logins.items():
            server.drop_login(name, each)
    expected = (
        {"pg_dump", "pg_restore", "psql"} if backend == "postgresql" else {"mysqldump", "mysql"}
    )
    assert set(looked.read_text().split()) == expected
    assert seen.read_text() == ""
    captured = capsys.readouterr()
    assert "ss'w" not in captured.out + captured.err
    assert "ss%27w" not in captured.out + captured.err


@pytest.mark.only("mysql")
def test_a_login_path_does_not_lead_the_programs_elsewhere(
    made: Path, database: Database, target: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `mysql_config_editor set --host=...` leaves is read after all other option files."""
    monkeypatch.setenv("HOME", str(made.parent))
    login_path(made.parent / ".mylogin.cnf", "[client]", "host = nowhere.invalid", "port = 1")
    empty = target()
    restore(empty.owner(), made)
    assert everything(empty) == everything(database)


def login_path(path: Path, *lines: str) -> None:
    """Write a file as mysql_config_editor does."""
    key = os.urandom(20)
    short = bytes(key[n] ^ (key[n + 16] if n < 4 else 0) for n in range(16))
    content = bytes(4) + key
    for line in lines:
        padder = PKCS7(128).padder()
        plain = padder.update(f"{line}\n".encode()) + padder.finalize()
        encryptor = Cipher(algorithms.AES(short), modes.ECB()).encryptor()
        data = encryptor.update(plain) + encryptor.finalize()
        content += len(data).to_bytes(4, "little") + data
    path.write_bytes(content)
    path.chmod(0o600)


def test_the_urls_tls_settings_hold_for_the_programs(
    tls_server: servers.Server,
    backend: str,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that takes nobody without TLS; and a program that is told of another authority."""
    database = new_database(tls_server)
    try:
        database.owner().apply_schema()
        if backend == "mysql":
            database.execute(f"ALTER USER '{database.user}'@'%' REQUIRE SSL")
        place = database.url.replace("127.0.0.1", ELSEWHERE)
        right = urlencode({"sslmode": "verify-full", "sslrootcert": str(authority.file)})
        with make_store(f"{place}?{right}") as store:
            backup(store, tmp_path / "b")
            other = tmp_path / "other.pem"
            (tmp_path / "made").mkdir()
            other.write_bytes(Authority(tmp_path / "made").file.read_bytes())
            if backend == "postgresql":
                monkeypatch.setattr(
                    store,
                    "_conninfo",
                    store._conninfo.replace(str(authority.file), str(other)),  # type: ignore[attr-defined]
                )
            else:
                monkeypatch.setitem(store._tls, "sslrootcert", str(other))  # type: ignore[attr-defined]
            dumper = store.dumper("17" if backend == "postgresql" else "9")
            snapshot = open_snapshot(database)
            with pytest.raises(Exception, match="certificate|SSL"):
                dumper.structure(snapshot, _NoSnapshot())
    finally:
        database.drop()


class _NoSnapshot:
    name = None

    def contents(self) -> dumps.Contents:
        raise NotImplementedError

    def sums(self) -> Iterator[dumps.Sums]:
        raise NotImplementedError


def open_snapshot(database: Database) -> dumps.Contents:
    with make_store(database.owner_url) as store, store.snapshot() as snapshot:
        return snapshot.contents()


# --- Killed ---------------------------------------------------------------------------------------


def start(*arguments: str, url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "contextuate_persist", *arguments],
        env={**os.environ, ENVIRONMENT_URL: url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_and_restore(
    store: BaseStore, target: Callable[[], Database], tmp_path: Path, kills: int
) -> None:
    store.save_events(
        [event(f"s{n % 50}", T0 + n, data={"x": "y" * 1500, "n": n}) for n in range(6000)]
    )
    backup(store, tmp_path / "b")
    empty = target()
    begun = time.monotonic()
    whole = start("restore", str(tmp_path / "b"), url=empty.owner_url)
    assert whole.wait(120) == 0
    assert whole.stderr is not None
    whole.stderr.close()
    seconds = time.monotonic() - begun
    for number in range(kills):
        empty = target()
        if number % 2:
            empty.owner().apply_schema()
        process = start("restore", str(tmp_path / "b"), url=empty.owner_url)
        time.sleep(random.uniform(0.3, 1) * seconds)
        process.kill()
        process.communicate(timeout=60)
        for _ in range(100):
            try:
                restore(empty.owner(), tmp_path / "b")
                break
            except StoreUnavailable:
                time.sleep(0.1)  # the server has not yet seen that its client is gone
        with make_store(empty.owner_url) as restored:
            assert sum(restored.event_counts().values()) == 6000
            assert problems(restored) == []


def test_a_restore_that_was_killed_while_it_compared_is_run_again(
    filled: BaseStore,
    target: Callable[[], Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filled.save_event(event("passing", T0))
    filled.delete_session("passing")  # its seq is given to nobody else
    found = backup(filled, tmp_path / "b")
    half = target()
    with monkeypatch.context() as patch:
        patch.setattr(backup_module, "_compare", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            restore(half.owner(), tmp_path / "b")
    if half.backend == "mysql":  # where the kill may also have come before this was set
        half.execute(f"ALTER TABLE {found.contents.sequence} AUTO_INCREMENT = 1")
    before = everything(half)
    assert restore(half.owner(), tmp_path / "b") == found
    assert everything(half) == before
    with make_store(half.owner_url) as store:
        assert store.save_event(event("kid", T0 + 20_000))
        assert store.get_events("kid")[-1].seq == found.contents.next_seq


def test_a_restore_that_was_killed_is_run_again(
    store: BaseStore, target: Callable[[], Database], tmp_path: Path
) -> None:
    kill_and_restore(store, target, tmp_path, 2)


@pytest.mark.soak
def test_a_restore_that_was_killed_twenty_times_is_run_again_each_time(
    store: BaseStore, target: Callable[[], Database], tmp_path: Path
) -> None:
    kill_and_restore(store, target, tmp_path, 20)


def test_a_backup_that_was_killed_leaves_nothing_under_its_name(
    filled: BaseStore, database: Database, tmp_path: Path
) -> None:
    for _ in range(3):
        process = start("backup", "--to", str(tmp_path / "b"), url=database.url)
        until = time.monotonic() + 30
        while not list(tmp_path.glob(".b.*")) and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert not (tmp_path / "b").exists()
    assert verify_backup(backup(filled, tmp_path / "b").path)


# --- The commands ---------------------------------------------------------------------------------


def test_the_commands_say_what_was_done(
    filled: BaseStore,
    database: Database,
    server: servers.Server,
    target: Callable[[], Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, key = str(tmp_path / "b.age"), str(tmp_path / "key")
    monkeypatch.setenv(ENVIRONMENT_URL, database.url)

    def run(*arguments: str) -> list[str]:
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()

    (public,) = run("backup", "--make-key", key)
    lines = run("backup", "--to", path, "--recipient", public, "--verify", "--identity", key)
    assert re.fullmatch(r".*b\.age: made, read back and found whole", lines[0])
    assert re.match(r"4 sessions, 9 events of \w+ database test_", lines[1])
    assert run("restore", path, "--identity", key, "--verify-only")[0].endswith("as it was written")
    (record,) = map(json.loads, run("restore", path, "--identity", key, "--verify-only", "--json"))
    assert (record["sessions"], record["events"], record["messages"]) == (4, 9, 2)
    assert (record["deletions"], record["encrypted"], record["moving"]) == (1, True, 0)
    before = databases(server)
    monkeypatch.setenv(ENVIRONMENT_URL, server.admin_url)
    (record,) = map(json.loads, run("restore", path, "--identity", key, "--test", "--json"))
    assert "dropped again" in record["done"]
    assert databases(server) == before
    monkeypatch.setenv(ENVIRONMENT_URL, target().owner_url)
    assert "the same" in run("restore", path, "--identity", key)[0]


def databases(server: servers.Server) -> list[Any]:
    return server.execute(
        "SELECT datname FROM pg_database ORDER BY 1"
        if server.kind == "postgresql"
        else "SHOW DATABASES"
    )


def test_a_test_finds_what_the_files_own_sums_do_not(
    made: Path, server: servers.Server, tmp_path: Path
) -> None:
    """A backup whose list of sessions is another's: whole as a file, wrong as a backup."""
    assert restore_test(made, server.admin_url).path == str(made)
    members = content(made)
    assert members is not None
    with (tmp_path / "wrong").open("wb") as stream:
        writer = backup_file.Writer(stream)
        for name, data in members[:-1]:
            if name.startswith("sessions."):
                lines = b"".join(backup_file.decompressed([data])).splitlines(keepends=True)
                one = json.loads(lines[0])
                one[0][3] += 1
                changed = [backup_file.json_line(one), *lines[1:]]
                writer.add(name, b"".join(backup_file.compressed(changed)))
            else:
                writer.add(name, data)
        writer.finish()
    assert verify_backup(tmp_path / "wrong")
    with pytest.raises(DamagedFile, match="differs from the backup: session kid"):
        restore_test(tmp_path / "wrong", server.admin_url)


@pytest.mark.only("mysql")
@pytest.mark.parametrize("may", [True, False])
def test_what_is_restored_to_try_a_backup_stays_out_of_the_binary_log_if_it_may(
    filled: BaseStore,
    server: servers.Server,
    tmp_path: Path,
    may: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def logged() -> int:
        return sum(int(size) for _, size, *_ in server.execute("SHOW BINARY LOGS"))

    if not may:
        monkeypatch.setattr(dumps, "LEAVE_LOG", b"SET SESSION none_of_ours = 0;\n")
    backup(filled, tmp_path / "b")
    before = logged()
    restore_test(tmp_path / "b", server.admin_url)
    # The longest payload alone has three megabytes.
    assert (logged() - before < 2**20) is may


def test_a_test_that_is_interrupted_leaves_no_database(server: servers.Server) -> None:
    """What a killed program has begun goes on in the server, or is undone there, for a while."""
    before = databases(server)
    name = "contextuate_restore_left"
    url = server.url("postgres" if server.kind == "postgresql" else "mysql")

    def interrupted() -> None:
        with make_store(url, lock_timeout=1).scratch(name):
            connection = server._connect(name)
            if server.kind == "postgresql":
                connection.pgconn.send_query(b"SELECT pg_sleep(60)")
            else:
                connection.cmd_query("CREATE TABLE t (x INT)")
                connection.cmd_query("START TRANSACTION")
                connection.cmd_query("INSERT INTO t VALUES (1)")
            threading.Timer(1.5, connection.close).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert databases(server) == before
