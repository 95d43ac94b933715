"""The schema: applied by whoever comes first, never at the cost of data; its rules and views."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mysql.connector
import orjson
import psycopg
import pytest

from contextuate_persist import SchemaError, TokenUsage, schema
from contextuate_persist.base import BaseStore
from contextuate_persist.embedded import PostgreSQLBinaries, find_postgresql
from contextuate_persist.errors import PersistenceError, StoreUnavailable
from tests import servers
from tests.builders import T0, event, session
from tests.conftest import Database, make_store, new_database

SCHEMAS = schema.schema_file("sample-data.sql").parent
DAY = 86_400_000

# --- Tools ----------------------------------------------------------------------------------------


def schema_text(backend: str) -> str:
    return (SCHEMAS / f"{backend}-schema.sql").read_text(encoding="utf-8")


@contextlib.contextmanager
def owner_session(database: Database) -> Iterator[Any]:
    """A connection of the owner, with the store's own settings of a session."""
    connection = database.owner()._connect()
    try:
        yield connection
    finally:
        connection.close()


def query(connection: Any, statement: str) -> list[Any]:
    """The rows of a statement, or of the first result of a procedure."""
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
        rows = list(cursor.fetchall()) if cursor.description else []
        while cursor.nextset():
            pass
        return rows
    finally:
        cursor.close()


def run_by_hand(database: Database, script: str) -> None:
    """The whole script as an administrator's program would send it."""
    with owner_session(database) as connection:
        if database.backend == "postgresql":
            connection.execute(script)
        else:
            for statement in schema.split_script(script, "mysql"):
                query(connection, statement)


def run_by_client(database: Database, path: Path) -> None:
    """The file through psql or mysql, exactly as its own first lines say."""
    parts = urlsplit(database.owner_url)
    password = unquote(parts.password or "")
    user, host, port = parts.username or "", parts.hostname or "", str(parts.port)
    if database.backend == "postgresql":
        program = find_postgresql().bindir / "psql"
        if not program.exists():
            pytest.skip(f"no psql beside the server: {program}")
        argv = [str(program), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-1", "-f", str(path)]
        argv += ["-h", host, "-p", port, "-U", user, database.name]
        # Without the notices of what is there already.
        environment = {"PGPASSWORD": password, "PGOPTIONS": "-c client_min_messages=warning"}
        given = subprocess.DEVNULL
    else:
        argv = [*next(servers.find_mysql()).tool("mysql"), "--no-defaults", "--protocol=tcp"]
        if not Path(argv[-3]).exists():
            pytest.skip(f"no mysql client beside the server: {argv[-3]}")
        argv += [f"--host={host}", f"--port={port}", f"--user={user}", database.name]
        environment = {"MYSQL_PWD": password}
        given = path.open("rb")
    try:
        done = subprocess.run(
            argv,
            stdin=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **environment},
        )
    finally:
        if not isinstance(given, int):
            given.close()
    assert (done.returncode, done.stderr) == (0, "")


CATALOGUE = {
    "postgresql": """
        SELECT 'column', c.table_name, c.column_name, c.ordinal_position::text, c.data_type,
            c.udt_name, c.is_nullable, c.column_default, c.collation_name, c.generation_expression,
            c.is_identity
        FROM information_schema.columns AS c WHERE c.table_schema = 'public'
        UNION ALL
        SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid),
            NULL, NULL, NULL, NULL, NULL, NULL, NULL
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'index', tablename, indexname, indexdef, NULL, NULL, NULL, NULL, NULL, NULL, NULL
        FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL
        SELECT 'view', viewname, definition, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
        FROM pg_views WHERE schemaname = 'public'
        UNION ALL
        SELECT 'function', proname, pg_get_functiondef(oid), obj_description(oid, 'pg_proc'),
            NULL, NULL, NULL, NULL, NULL, NULL, NULL
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'trigger', tgrelid::regclass::text, tgname, pg_get_triggerdef(oid),
            NULL, NULL, NULL, NULL, NULL, NULL, NULL
        FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL
        SELECT 'member', enumtypid::regtype::text, enumlabel, enumsortorder::text,
            NULL, NULL, NULL, NULL, NULL, NULL, NULL
        FROM pg_enum
    """,
    "mysql": """
        SELECT 'column', table_name, column_name, ordinal_position, column_type, is_nullable,
            column_default, collation_name, generation_expression, extra, column_comment
        FROM information_schema.columns WHERE table_schema = DATABASE()
        UNION ALL
        SELECT 'constraint', t.table_name, t.constraint_name, t.constraint_type, c.check_clause,
            r.delete_rule, NULL, NULL, NULL, NULL, NULL
        FROM information_schema.table_constraints AS t
        LEFT JOIN information_schema.check_constraints AS c
            USING (constraint_schema, constraint_name)
        LEFT JOIN information_schema.referential_constraints AS r
            USING (constraint_schema, constraint_name)
        WHERE t.table_schema = DATABASE()
        UNION ALL
        SELECT 'index', table_name, index_name, seq_in_index, column_name, collation, non_unique,
            NULL, NULL, NULL, NULL
        FROM information_schema.statistics WHERE table_schema = DATABASE()
        UNION ALL
        SELECT 'view', table_name, view_definition, security_type,
            NULL, NULL, NULL, NULL, NULL, NULL, NULL
        FROM information_schema.views WHERE table_schema = DATABASE()
        UNION ALL
        SELECT 'function', routine_name, routine_definition, routine_comment, security_type,
            sql_data_access, NULL, NULL, NULL, NULL, NULL
        FROM information_schema.routines WHERE routine_schema = DATABASE()
        UNION ALL
        SELECT 'table', table_name, engine, table_collation, table_comment,
            NULL, NULL, NULL, NULL, NULL, NULL
        FROM information_schema.tables
        WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE'
    """,
}


def catalogue(database: Database) -> list[tuple[str | None, ...]]:
    """Everything that the schema made, in words that compare; without the database's own name."""
    rows = database.execute(CATALOGUE[database.backend])
    plain = [
        tuple(None if value is None else _text(value, database.name) for value in row)
        for row in rows
    ]
    return sorted(plain, key=lambda row: [value or "" for value in row])


def _text(value: Any, name: str) -> str:
    text = value.decode() if isinstance(value, bytes | bytearray) else str(value)
    return text.replace(f"`{name}`.", "")


def literal(value: object) -> str:
    if value is None:
        return "NULL"
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"


def insert(table: str, **columns: object) -> str:
    values = ", ".join(map(literal, columns.values()))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})"


def insert_session(session_id: str = "s", **columns: object) -> str:
    given = {"machine_id": "m", "working_directory": "/w", "start_time": T0, **columns}
    return insert("sessions", session_id=session_id, **given)


def insert_event(backend: str, number: int = 1, session_id: str = "s", **columns: object) -> str:
    given = {
        "id": f"019b8d2c-1a80-7000-8000-{number:012x}",
        "session_id": session_id,
        "timestamp": T0,
        "event_type": "tool_call",
        "hook_type": "PreToolUse",
        "machine_id": "m",
        "working_directory": "/w",
        "data": "{}",
        **columns,
    }
    statement = insert("events", **given)
    if backend == "mysql" and given["id"] is not None:
        quoted = literal(given["id"])
        statement = statement.replace(quoted, f"UUID_TO_BIN({quoted})", 1)
    return statement


def refusal(database: Database, statement: str) -> str | int | None:
    """The server's code for why it does not take the statement; None if it does."""
    try:
        database.execute(statement)
    except psycopg.Error as error:
        return error.sqlstate
    except mysql.connector.Error as error:
        return error.errno
    return None


# --- Applying -------------------------------------------------------------------------------------


def test_applying_works_once_and_changes_nothing_again(empty_database: Database) -> None:
    owner = empty_database.owner()
    assert owner.apply_schema() is True
    with make_store(empty_database.url) as store:
        health = store.health()
    assert (health.schema_version, health.schema_layout) == (schema.SCHEMA_VERSION, "plain")
    versions = "SELECT version, name, layout, applied_at FROM schema_version"
    before = catalogue(empty_database), empty_database.execute(versions)
    assert len(before[1]) == 1
    assert owner.apply_schema() is False
    assert (catalogue(empty_database), empty_database.execute(versions)) == before


def test_the_file_run_by_hand_is_harmless_and_loses_no_data(empty_database: Database) -> None:
    script = schema_text(empty_database.backend)
    run_by_hand(empty_database, script)
    first = catalogue(empty_database)
    _check_nothing_is_lost(empty_database, lambda: run_by_hand(empty_database, script))
    assert catalogue(empty_database) == first
    assert empty_database.owner().apply_schema() is False


def test_the_servers_own_client_takes_the_file_twice(empty_database: Database) -> None:
    path = SCHEMAS / f"{empty_database.backend}-schema.sql"
    run_by_client(empty_database, path)
    first = catalogue(empty_database)
    _check_nothing_is_lost(empty_database, lambda: run_by_client(empty_database, path))
    assert catalogue(empty_database) == first
    run_by_client(empty_database, SCHEMAS / "sample-data.sql")
    run_by_client(empty_database, SCHEMAS / "sample-data.sql")
    assert empty_database.execute("SELECT COUNT(*) FROM events") == [(2 + 7,)]


@pytest.fixture
def applied(server: servers.Server) -> Iterator[Database]:
    """A database as `apply_schema` leaves it.

    Not the one that tests share: MySQL notes with a view the collation of whoever has last altered
    a table of it.
    """
    database = new_database(server)
    database.owner().apply_schema()
    yield database
    database.drop()


def test_by_hand_and_by_the_library_is_the_same_schema(
    empty_database: Database, applied: Database
) -> None:
    run_by_hand(empty_database, schema_text(empty_database.backend))
    assert catalogue(empty_database) == catalogue(applied)


def _check_nothing_is_lost(database: Database, action: Any) -> None:
    tables = ("sessions", "events", "deleted_sessions", "token_ledger", "schema_version")
    with make_store(database.url) as store:
        store.save_session(session("s", is_pinned=True, child_session_ids=("x", "y")))
        store.save_events([event("s"), event("other", T0 + 1, parent_session_id="s")])
        store.save_session(session("gone"))
        store.delete_session("gone")
    ledger = insert("token_ledger", message_id="m", session_id="s", timestamp=T0, input_tokens=7)
    database.execute(ledger)
    before = {table: database.execute(f"SELECT * FROM {table}") for table in tables}
    assert all(before.values())
    action()
    assert {table: database.execute(f"SELECT * FROM {table}") for table in tables} == before


_barrier: Any = None


def _meet(barrier: Any) -> None:
    global _barrier  # noqa: PLW0603
    _barrier = barrier


def _apply(url: str) -> bool:
    _barrier.wait(60)
    return make_store(url).apply_schema()


def test_of_eight_processes_that_apply_at_once_one_does_the_work(empty_database: Database) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(8)
    with ProcessPoolExecutor(8, context, initializer=_meet, initargs=(barrier,)) as pool:
        done = list(pool.map(_apply, [empty_database.owner_url] * 8))
    assert sorted(done) == [False] * 7 + [True]
    with make_store(empty_database.url) as store:
        assert store.save_event(event()) is True


@pytest.mark.only("mysql")
def test_an_interrupted_apply_is_completed(applied: Database, server: servers.Server) -> None:
    # MySQL commits each statement by itself, so a kill may leave any first part of the file.
    statements = schema.split_script(schema_text("mysql"), "mysql")
    whole = catalogue(applied)
    for count in range(1, len(statements) + 1):
        half = new_database(server)
        try:
            with owner_session(half) as connection:
                for statement in statements[:count]:
                    query(connection, statement)
            done = half.owner().apply_schema()
            assert (count, done) == (count, count < len(statements))
            assert (count, catalogue(half)) == (count, whole)
        finally:
            half.drop()


@pytest.mark.only("postgresql")
def test_a_failed_apply_leaves_nothing(empty_database: Database) -> None:
    # The name of a late index is taken, so the file fails when most of it has run.
    empty_database.execute("CREATE VIEW session_hierarchy AS SELECT 1 AS taken")
    before = catalogue(empty_database)
    with pytest.raises((PersistenceError, psycopg.Error), match="taken"):
        empty_database.owner().apply_schema()
    assert catalogue(empty_database) == before


def test_tables_of_another_origin_are_refused_and_untouched(empty_database: Database) -> None:
    for table in ("sessions", "events"):
        empty_database.execute(f"CREATE TABLE {table} (mine INT PRIMARY KEY)")
        empty_database.execute(f"INSERT INTO {table} (mine) VALUES (1)")
    before = catalogue(empty_database)
    with pytest.raises(SchemaError, match=r"of another origin: use an empty database$"):
        empty_database.owner().apply_schema()
    assert catalogue(empty_database) == before
    assert empty_database.execute("SELECT mine FROM sessions") == [(1,)]
    assert empty_database.execute("SELECT mine FROM events") == [(1,)]


@pytest.mark.parametrize("table", ["sessions", "events"])
def test_a_single_table_of_another_origin_is_refused(empty_database: Database, table: str) -> None:
    empty_database.execute(f"CREATE TABLE {table} (mine INT PRIMARY KEY)")
    before = catalogue(empty_database)
    with pytest.raises(SchemaError, match="another origin"):
        empty_database.owner().apply_schema()
    assert catalogue(empty_database) == before


def test_a_newer_schema_is_refused_with_the_way_out(empty_database: Database) -> None:
    owner = empty_database.owner()
    owner.apply_schema()
    empty_database.execute("INSERT INTO schema_version (version, name) VALUES (99, 'tomorrow')")
    before = catalogue(empty_database)
    message = "has schema version 99, this library knows 1: install a newer contextuate-persist"
    with pytest.raises(SchemaError, match=message):
        owner.apply_schema()
    with pytest.raises(SchemaError, match=message):
        make_store(empty_database.url).init()
    assert catalogue(empty_database) == before


def test_a_layout_of_later_versions_is_refused_with_the_way_out() -> None:
    found = schema.SchemaVersion(schema.SCHEMA_VERSION, "sharded")
    with pytest.raises(SchemaError, match="layout 'sharded'.* install a newer"):
        schema.require_version(found, "the database")


def test_whoever_changes_the_schema_is_waited_for_and_then_named(database: Database) -> None:
    with (
        database.owner()._schema_session(10),
        pytest.raises(StoreUnavailable, match="another process changes the schema"),
    ):
        database.owner().apply_schema(timeout=0.2)
    assert database.owner().apply_schema(timeout=0.2) is False


def test_another_database_is_neither_waited_for_nor_looked_into(
    database: Database, empty_database: Database
) -> None:
    with database.owner()._schema_session(10) as held:
        held.run("CREATE TABLE contextuate_original_events (id INTEGER)")
        try:
            assert empty_database.owner().apply_schema(timeout=0.2) is True
        finally:
            held.run("DROP TABLE contextuate_original_events")


@pytest.mark.only("postgresql")
def test_tables_of_another_schema_of_the_database_do_not_matter(
    empty_database: Database, backend: str
) -> None:
    empty_database.execute("CREATE SCHEMA elsewhere")
    empty_database.execute("CREATE TABLE elsewhere.events (id INTEGER)")
    assert empty_database.owner().apply_schema() is True


def test_a_file_that_is_missing_from_the_installation_is_named() -> None:
    with pytest.raises(SchemaError, match="no.sql is missing from this installation: install"):
        schema.schema_file("no.sql")


def test_a_missing_schema_is_refused_with_the_command(empty_database: Database) -> None:
    with pytest.raises(SchemaError, match="run `contextuate-persist init` as its owner"):
        make_store(empty_database.url).init()


# --- The files ------------------------------------------------------------------------------------

DESTRUCTIVE = re.compile(
    r"\b(DROP\s+(?:TABLE|DATABASE|SCHEMA|TYPE|COLUMN|PARTITION|OWNED)|TRUNCATE"
    r"|(?<!ON )(?<!AFTER )DELETE)\b",
    re.IGNORECASE,
)


def destructive(script: str) -> list[str]:
    """What a script would destroy by being run, as opposed to by what it defines."""
    code = re.sub(r"--[^\n]*|/\*(?!!).*?\*/", "", script, flags=re.DOTALL)
    bodies = r"(?:LANGUAGE \w+[^;]*?AS \$\$.*?\$\$)|(?:^CREATE PROCEDURE.*?^END //)"
    code = re.sub(bodies, "", code, flags=re.DOTALL | re.MULTILINE)
    code = re.sub(r"'(?:[^']|'')*'", "''", code)
    return [match[0] for match in DESTRUCTIVE.finditer(re.sub(r"\s+", " ", code))]


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("DROP TABLE IF EXISTS sessions;", ["DROP TABLE"]),
        ("truncate events;", ["truncate"]),
        ("DELETE FROM sessions;", ["DELETE"]),
        ("ALTER TABLE sessions DROP COLUMN label;", ["DROP COLUMN"]),
        ("DO $$ BEGIN DELETE FROM events; END $$;", ["DELETE"]),
        ("REFERENCES sessions (session_id) ON DELETE CASCADE -- DROP TABLE", []),
        ("CREATE TRIGGER t AFTER DELETE ON events FOR EACH STATEMENT EXECUTE FUNCTION f()", []),
        ("DROP TEMPORARY TABLE t; SELECT 'DELETE'", []),
    ],
)
def test_the_search_for_destructive_statements_finds_them(script: str, found: list[str]) -> None:
    assert destructive(script) == found


def test_no_file_destroys_data() -> None:
    files = sorted(SCHEMAS.rglob("*.sql"))
    assert len(files) >= 3
    assert {path.name: destructive(path.read_text(encoding="utf-8")) for path in files} == {
        path.name: [] for path in files
    }
    for path in files:  # in no function either: only rows go, one by one
        assert not re.search(
            r"\b(DROP\s+TABLE|TRUNCATE)\b", path.read_text(encoding="utf-8"), re.IGNORECASE
        )


# What the one has and the other does not, and why.
ONLY_POSTGRESQL = {
    # VARCHAR takes a type that is not known yet; an ENUM has it beside itself.
    ("events", "event_type_name"),
    ("events", "hook_type_name"),
}
ONLY_MYSQL_VIEWS = {"events_text"}  # its ids are 16 bytes
NULLABLE_ON_MYSQL_ONLY = {
    # PostgreSQL knows its transaction at once; here a later writer fills it in.
    ("events", "commit_order"),
}

COLUMNS = """
SELECT table_name, column_name, is_nullable
FROM information_schema.columns
WHERE table_schema = {schema}
"""
FOREIGN_KEYS = """
SELECT constraint_name, delete_rule
FROM information_schema.referential_constraints
WHERE constraint_schema = {schema}
"""


@pytest.fixture
def both(request: pytest.FixtureRequest) -> Iterator[dict[str, Database]]:
    """A database with the schema on each of the two servers."""
    if request.config.getoption("backend"):
        pytest.skip("--backend: the two files are compared where both servers run")
    made = {
        kind: new_database(request.getfixturevalue(f"{kind}_server"))
        for kind in ("postgresql", "mysql")
    }
    for database in made.values():
        database.owner().apply_schema()
    yield made
    for database in made.values():
        database.drop()


def test_both_files_describe_the_same_tables_and_columns(both: dict[str, Database]) -> None:
    columns: dict[str, dict[tuple[str, str], str]] = {}
    keys: dict[str, set[tuple[str, str]]] = {}
    views: dict[str, set[str]] = {}
    for kind, database in both.items():
        place = "'public'" if kind == "postgresql" else "DATABASE()"
        found = database.execute(
            "SELECT table_name FROM information_schema.views WHERE table_schema = " + place
        )
        views[kind] = {name for (name,) in found}
        columns[kind] = {
            (table, column): nullable
            for table, column, nullable in database.execute(COLUMNS.format(schema=place))
            if table not in ONLY_MYSQL_VIEWS and (table not in views[kind] or nullable)
        }
        keys[kind] = set(database.execute(FOREIGN_KEYS.format(schema=place)))
    assert views["mysql"] - views["postgresql"] == ONLY_MYSQL_VIEWS
    assert views["postgresql"] <= views["mysql"]
    assert columns["postgresql"].keys() - columns["mysql"].keys() == ONLY_POSTGRESQL
    assert columns["mysql"].keys() <= columns["postgresql"].keys()
    different = {
        name
        for name, nullable in columns["mysql"].items()
        if name[0] not in views["mysql"] and nullable != columns["postgresql"][name]
    }
    assert different == NULLABLE_ON_MYSQL_ONLY
    # NO ACTION and RESTRICT aside, which neither has, the rules have the same names.
    assert keys["postgresql"] == keys["mysql"]
    assert len(keys["mysql"]) == 3


UNCOMMENTED = {
    "postgresql": """
        SELECT c.relname, a.attname
        FROM pg_class AS c
        LEFT JOIN pg_attribute AS a
            ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND c.relkind = 'r'
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
            AND (obj_description(c.oid, 'pg_class') IS NULL
                OR c.relkind = 'r' AND col_description(c.oid, a.attnum) IS NULL)
    """,
    "mysql": """
        SELECT t.table_name, c.column_name
        FROM information_schema.tables AS t
        JOIN information_schema.columns AS c USING (table_schema, table_name)
        WHERE t.table_schema = DATABASE() AND t.table_type = 'BASE TABLE'
            AND (t.table_comment = '' OR c.column_comment = '')
    """,
}


def test_every_table_and_column_has_a_comment(database: Database) -> None:
    assert database.execute(UNCOMMENTED[database.backend]) == []
    # The query finds what is missing.
    database.execute("CREATE TABLE bare (mine INT)")
    try:
        assert database.execute(UNCOMMENTED[database.backend]) == [("bare", "mine")]
    finally:
        database.execute("DROP TABLE bare")


INDEXES = {
    "postgresql": "SELECT indexname FROM pg_indexes WHERE schemaname = 'public'",
    "mysql": """
        SELECT DISTINCT IF(index_name = 'PRIMARY', CONCAT(table_name, '_pkey'), index_name)
        FROM information_schema.statistics WHERE table_schema = DATABASE()
    """,
}


def test_every_index_says_in_the_file_what_it_is_for(database: Database) -> None:
    lines = [line.strip() for line in schema_text(database.backend).splitlines()]
    silent = []
    for (name,) in database.execute(INDEXES[database.backend]):
        if name.endswith("_pkey"):
            continue
        defined = re.compile(rf"(KEY|INDEX IF NOT EXISTS) {name}\b")
        (at,) = [i for i, line in enumerate(lines) if defined.search(line)]
        if not lines[at - 1].startswith("-- "):
            silent.append(name)
    assert silent == []


def test_applying_leaves_no_index_twice(database: Database) -> None:
    same = {
        "postgresql": """
            SELECT a.indexrelid::regclass, b.indexrelid::regclass
            FROM pg_index AS a JOIN pg_index AS b
                ON a.indrelid = b.indrelid AND a.indexrelid < b.indexrelid
                AND a.indkey = b.indkey AND a.indoption = b.indoption
                AND COALESCE(a.indpred::text, '') = COALESCE(b.indpred::text, '')
                AND COALESCE(a.indexprs::text, '') = COALESCE(b.indexprs::text, '')
            JOIN pg_class AS c ON c.oid = a.indrelid
            WHERE c.relnamespace = 'public'::regnamespace
        """,
        "mysql": """
            SELECT table_name, columns, COUNT(*)
            FROM (
                SELECT table_name, index_name,
                    GROUP_CONCAT(column_name, collation ORDER BY seq_in_index) AS columns
                FROM information_schema.statistics WHERE table_schema = DATABASE()
                GROUP BY table_name, index_name
            ) AS i
            GROUP BY table_name, columns HAVING COUNT(*) > 1
        """,
    }
    assert database.execute(same[database.backend]) == []


# --- Accounts -------------------------------------------------------------------------------------


def test_an_account_for_data_alone_does_everything_but_change_the_schema(
    database: Database, store: BaseStore
) -> None:
    first = event("s", T0, data={"toolName": "Bash", "n": 1})
    store.save_session(session("s", parent_session_id="p", is_pinned=True))
    assert store.save_event(first) is True
    assert store.save_events([first, event("t", T0 + 1, parent_session_id="s")]) == 1
    store.save_session(session("t"))
    assert len(store.find_events(contains={"n": 1}, session_id="s")) == 1
    assert store.event_counts() == {"tool_call": 2}
    assert len(store.session_tree()) == 2
    store.update_session("s", is_pinned=False, end_time=T0 + 5, status="completed")
    store.load_sample()
    store.delete_session("t")
    # Of the sample's four three hang together, and one of these is pinned.
    assert store.prune_old_sessions(T0 + 100 * 365 * DAY) == 2
    assert store.delete_all_sessions() == 3
    assert store.health().schema_version == 1
    connection = store._connect()
    try:
        for change in (
            "DROP TABLE sessions",
            "ALTER TABLE sessions ADD COLUMN mine INT",
            "CREATE INDEX mine ON events (machine_id)",
            "TRUNCATE TABLE events",
        ):
            with pytest.raises(
                (psycopg.errors.InsufficientPrivilege, mysql.connector.ProgrammingError),
                match=r"denied|must be owner",
            ):
                query(connection, change)
    finally:
        connection.close()


# --- Sample data ----------------------------------------------------------------------------------


def test_the_sample_loads_twice_and_is_what_the_file_says(store: BaseStore) -> None:
    store.load_sample()
    first = store.get_sessions(), list(store.iter_events())
    store.load_sample()
    assert (store.get_sessions(), list(store.iter_events())) == first
    sessions = {s.session_id: s for s in first[0]}
    assert {name: s.parent_session_id for name, s in sessions.items()} == {
        "session-root-001": None,
        "session-child-001": "session-root-001",
        "session-child-002": "session-root-001",
        "session-hidden-001": None,
    }
    root = sessions["session-root-001"]
    assert root.child_session_ids == ("session-child-001", "session-child-002")
    assert root.token_usage == TokenUsage(
        total_input=15400, total_output=3200, total_cache_read=182000, total_cache_creation=21000
    )
    assert {name for name, s in sessions.items() if s.hidden} == {"session-hidden-001"}
    assert [(e.session_id, e.event_type) for e in first[1]] == [
        ("session-root-001", "session_start"),
        ("session-root-001", "tool_call"),
        ("session-root-001", "tool_result"),
        ("session-root-001", "agent_spawn"),
        ("session-child-001", "tool_call"),
        ("session-child-002", "error"),
        ("session-root-001", "session_end"),
    ]
    assert {e.parent_session_id for e in first[1]} == {None, "session-root-001"}
    assert len(store.find_events(tool_use_id="toolu_sample_01")) == 2


def test_the_sample_keeps_what_somebody_changed(store: BaseStore) -> None:
    store.load_sample()
    store.update_session("session-root-001", label="Mine", is_pinned=False)
    store.update_session("session-hidden-001", hidden=False)
    changed = store.get_sessions()
    store.load_sample()
    assert store.get_sessions() == changed
    assert next(s for s in changed if s.session_id == "session-root-001").label == "Mine"


# --- Rules ----------------------------------------------------------------------------------------

# PostgreSQL's SQLSTATE and MySQL's error number.
CHECKED, NULLED, UNKNOWN_SESSION, REPEATED = (
    ("23514", 3819),
    ("23502", 1048),
    ("23503", 1452),
    ("23505", 1062),
)


@pytest.mark.parametrize(
    ("columns", "codes"),
    [
        ({"status": "paused"}, ("22P02", 3819)),
        ({"status": "ACTIVE"}, ("22P02", 3819)),
        ({"status": "active "}, ("22P02", 3819)),
        ({"known_from": "rumour"}, CHECKED),
        ({"child_session_ids": "{}"}, CHECKED),
        ({"child_session_ids": '"a"'}, CHECKED),
        ({"child_session_ids": "null"}, CHECKED),
        ({"session_id": None}, NULLED),
        ({"machine_id": None}, NULLED),
        ({"working_directory": None}, NULLED),
        ({"start_time": None}, NULLED),
        ({"child_session_ids": None}, NULLED),
        ({"parent_session_id": "nobody"}, UNKNOWN_SESSION),
    ],
    ids=str,
)
def test_a_session_that_breaks_a_rule_is_refused(
    database: Database, columns: dict[str, object], codes: tuple[str, int]
) -> None:
    expected = codes[database.backend == "mysql"]
    assert refusal(database, insert_session(**columns)) == expected
    assert database.execute("SELECT COUNT(*) FROM sessions") == [(0,)]


@pytest.mark.parametrize(
    ("columns", "codes"),
    [
        ({"data": "[]"}, CHECKED),
        ({"data": "1"}, CHECKED),
        ({"data": "null"}, CHECKED),
        ({"data": None}, NULLED),
        ({"session_id": None}, NULLED),
        ({"timestamp": None}, NULLED),
        ({"event_type": None}, NULLED),
        ({"hook_type": None}, NULLED),
        ({"machine_id": None}, NULLED),
        ({"working_directory": None}, NULLED),
        ({"session_id": "nobody"}, UNKNOWN_SESSION),
        ({"event_type": ""}, ("22P02", 3819)),
        ({"event_type": " tool_call"}, ("22P02", 3819)),
        ({"hook_type": ""}, ("22P02", 3819)),
    ],
    ids=str,
)
def test_an_event_that_breaks_a_rule_is_refused(
    database: Database, columns: dict[str, object], codes: tuple[str, int]
) -> None:
    database.execute(insert_session())
    expected = codes[database.backend == "mysql"]
    assert refusal(database, insert_event(database.backend, **columns)) == expected
    assert database.execute("SELECT COUNT(*) FROM events") == [(0,)]


@pytest.mark.only("postgresql")
@pytest.mark.parametrize("kind", ["event", "hook"])
def test_a_name_stands_only_beside_the_member_other(database: Database, kind: str) -> None:
    database.execute(insert_session())
    named: dict[str, object] = {f"{kind}_type_name": "future_thing"}
    assert refusal(database, insert_event("postgresql", **named)) == "23514"
    named[f"{kind}_type"] = "other"
    assert refusal(database, insert_event("postgresql", **named)) is None


def test_an_event_id_is_there_once_in_all_sessions(database: Database) -> None:
    database.execute(insert_session("s"))
    database.execute(insert_session("t"))
    database.execute(insert_event(database.backend, 1, "s"))
    again = insert_event(database.backend, 1, "t", timestamp=T0 + 1)
    assert refusal(database, again) == REPEATED[database.backend == "mysql"]


def test_a_session_takes_its_events_and_ledger_along_and_leaves_its_children(
    database: Database,
) -> None:
    database.execute(insert_session("parent"))
    database.execute(insert_session("child", parent_session_id="parent"))
    for number, owner in enumerate(("parent", "parent", "child")):
        database.execute(insert_event(database.backend, number, owner))
        ledger = {"message_id": f"m{number}", "session_id": owner, "timestamp": T0}
        database.execute(insert("token_ledger", **ledger))
    database.execute("DELETE FROM sessions WHERE session_id = 'parent'")
    assert database.execute("SELECT session_id FROM events") == [("child",)]
    assert database.execute("SELECT session_id FROM token_ledger") == [("child",)]
    left = database.execute(
        "SELECT session_id, parent_session_id, effective_parent_id FROM sessions"
    )
    assert left == [("child", None, None)]


def test_the_manual_parent_wins(database: Database) -> None:
    database.execute(insert_session("a"))
    database.execute(insert_session("b", parent_session_id="a"))
    database.execute(insert_session("c", parent_session_id="a", manual_parent_session_id="lost"))
    rows = database.execute("SELECT session_id, effective_parent_id FROM sessions")
    assert sorted(rows) == [("a", None), ("b", "a"), ("c", "lost")]


ALIKE = [
    "resume",
    "Resume",
    "RESUME",
    "résumé",
    "re\u0301sume\u0301",
    "\uff52\uff45\uff53\uff55\uff4d\uff45",
    "resume ",
    "resume  ",
    "resume\t",
    "resume\u200b",
    "resume\u00ad",
    "resume-ß",
    "resume-ss",
    "resume-😀",
    "resume-😁",
    "resume-\u0131",
    "resume-i",
]


def test_ids_that_look_alike_are_different_ids(database: Database) -> None:
    with owner_session(database) as connection:
        _check_alike(database.backend, partial(query, connection))


def _check_alike(backend: str, execute: Callable[[str], list[Any]]) -> None:
    for number, name in enumerate(ALIKE):
        execute(insert_session(name, machine_id=name, start_time=T0 + number))
        execute(insert_event(backend, number, name, tool_name=name))
        ledger = {"message_id": name, "session_id": name, "timestamp": T0}
        execute(insert("token_ledger", **ledger))
        execute(insert("deleted_sessions", session_id=name, deleted_at=number))
    assert execute("SELECT COUNT(DISTINCT machine_id) FROM sessions") == [(len(ALIKE),)]
    assert execute("SELECT COUNT(DISTINCT tool_name) FROM events") == [(len(ALIKE),)]
    for number, name in enumerate(ALIKE):
        where = f"= {literal(name)}"
        start = f"SELECT start_time FROM sessions WHERE session_id {where}"
        assert execute(start) == [(T0 + number,)]
        by_tool = f"SELECT session_id FROM events WHERE tool_name {where}"
        assert execute(by_tool) == [(name,)]
        gone = f"SELECT deleted_at FROM deleted_sessions WHERE session_id {where}"
        assert execute(gone) == [(number,)]
    execute("DELETE FROM sessions WHERE session_id = 'RESUME'")
    for table in ("sessions", "events", "token_ledger"):
        left = {name for (name,) in execute(f"SELECT session_id FROM {table}")}
        assert left == set(ALIKE) - {"RESUME"}


def test_every_change_moves_updated_at(database: Database) -> None:
    database.execute(insert_session())
    read = "SELECT created_at, updated_at FROM sessions"
    ((created, first),) = database.execute(read)
    assert created == first
    time.sleep(0.01)
    database.execute("UPDATE sessions SET label = 'new'")
    ((same, second),) = database.execute(read)
    assert same == created
    assert second > first
    time.sleep(0.01)
    database.execute("UPDATE sessions SET is_pinned = TRUE")
    ((same, third),) = database.execute(read)
    assert same == created
    assert third > second
    time.sleep(0.01)
    database.execute("UPDATE sessions SET parent_session_id = session_id")
    ((same, fourth),) = database.execute(read)
    assert same == created
    assert fourth > third


def test_an_update_that_changes_nothing_leaves_updated_at(
    database: Database, store: BaseStore
) -> None:
    read = "SELECT session_id, updated_at FROM sessions ORDER BY session_id"
    whole = session(
        "s",
        end_time=T0 + 5,
        status="completed",
        parent_session_id="detected",
        manual_parent_session_id="parent",
        child_session_ids=("b", "a"),
        model="m",
        label="a label\0",
        is_pinned=True,
        token_usage=TokenUsage(total_input=1, total_output=2, total_cache_read=3),
    )
    store.save_session(whole)
    before = database.execute(read)
    time.sleep(0.01)
    store.save_session(whole)
    store.save_sessions([whole])
    store.update_session("s", label=whole.label)
    store.update_session("s", manual_parent_session_id="parent", child_session_ids=("b", "a"))
    database.execute("UPDATE sessions SET is_pinned = TRUE WHERE session_id = 's'")
    assert database.execute(read) == before


# --- Views ----------------------------------------------------------------------------------------


def test_active_sessions_shows_pinned_first_then_newest(
    database: Database, store: BaseStore
) -> None:
    store.save_session(session("old", start_time=T0))
    store.save_session(session("new", start_time=T0 + 2, status="completed", end_time=T0 + 9))
    store.save_session(session("pinned-old", start_time=T0 - 5, is_pinned=True))
    store.save_session(session("pinned-new", start_time=T0 + 1, is_pinned=True))
    store.save_session(session("hidden", start_time=T0 + 3, hidden=True))
    store.save_session(session("child", start_time=T0 + 1, parent_session_id="only-named"))
    store.save_event(event("from-event", T0 + 7))
    usage = TokenUsage(total_input=3, total_output=4, total_cache_read=50)
    store.update_session("old", token_usage=usage)
    rows = database.execute("SELECT session_id, token_usage_total, is_pinned FROM active_sessions")
    assert [row[0] for row in rows] == [
        "pinned-new",
        "pinned-old",
        "from-event",
        "new",
        "child",
        "old",
    ]
    assert {name: total for name, total, _ in rows} == dict.fromkeys(
        [row[0] for row in rows], 0
    ) | {"old": 7}


def test_active_sessions_counts_children_as_get_session_lists_them(
    database: Database, store: BaseStore
) -> None:
    store.save_sessions(
        [
            session("root", child_session_ids=("unknown", "deleted", "others", "by-hand", "free")),
            session("thief", child_session_ids=("linked",)),
            session("linked", parent_session_id="root"),
            session("others", parent_session_id="root", manual_parent_session_id="thief"),
            session("by-hand", manual_parent_session_id="root"),
            session("free"),
            session("deleted", parent_session_id="root"),
            session("hidden", parent_session_id="root", hidden=True),
            session("self", manual_parent_session_id="self", child_session_ids=("self",)),
            session("deleted-only-listed"),
            session("back"),
            session("keeper", child_session_ids=("deleted-only-listed", "back")),
        ]
    )
    store.save_event(event("late", T0, parent_session_id="root"))
    for name in ("deleted", "deleted-only-listed", "back"):
        store.delete_session(name)
    store.save_events([event("back", T0)], undelete=True)
    store.update_session("keeper", child_session_ids=["deleted-only-listed", "back", "never"])
    counts = dict(database.execute("SELECT session_id, child_count FROM active_sessions"))
    listed = {s.session_id: s.child_session_ids for s in store.get_sessions(hidden=False)}
    assert {name: len(ids) for name, ids in listed.items()} == counts
    assert set(listed["root"]) == {"unknown", "by-hand", "free", "linked", "hidden", "late"}
    assert listed["thief"] == ("others",)
    assert listed["keeper"] == ("back", "never")
    assert listed["self"] == ("self",)


@pytest.mark.parametrize(
    ("fields", "duration"),
    [
        ({"end_time": T0 + 1500}, 1500),
        ({"end_time": T0 - 1500}, 0),
        ({"end_time": T0}, 0),
        ({"start_time": 2**53 - 1, "status": "active"}, 0),
    ],
    ids=str,
)
def test_a_duration_is_never_negative(
    database: Database, store: BaseStore, fields: dict[str, Any], duration: int
) -> None:
    store.save_session(session("s", **{"status": "completed", **fields}))
    assert database.execute("SELECT duration_ms FROM active_sessions") == [(duration,)]


def test_a_running_session_lasts_until_now(database: Database, store: BaseStore) -> None:
    store.save_session(session("s", start_time=round(time.time() * 1000) - 60_000))
    ((duration,),) = database.execute("SELECT duration_ms FROM active_sessions")
    assert 59_000 <= duration <= 120_000


def hierarchy(database: Database) -> dict[str, tuple[int, list[str]]]:
    """Depth and path by id; fails if a session comes twice."""
    with owner_session(database) as connection:
        rows = query(connection, "SELECT session_id, depth, path FROM session_hierarchy")
    found = {row[0]: (row[1], _path(row[2])) for row in rows}
    assert len(found) == len(rows)
    return found


def _path(value: Any) -> list[str]:
    return value if isinstance(value, list) else orjson.loads(value)


def link(store: BaseStore, parents: dict[str, str | None], **fields: Any) -> None:
    """Sessions with these parents, given by hand, so that any shape can be made."""
    sessions = [
        session(name, start_time=T0 + number, manual_parent_session_id=parent, **fields)
        for number, (name, parent) in enumerate(parents.items())
    ]
    store.save_sessions(sessions, undelete=True)


SHAPES: dict[str, dict[str, str | None]] = {
    "empty": {},
    "roots": {"a": None, "b": None},
    "tree": {"a": None, "b": "a", "c": "a", "d": "b", "e": "d", "f": None, "g": "f"},
    "orphans": {"a": "missing", "b": "a", "c": "missing", "d": "lost"},
    "self-parent": {"a": "a", "b": "a", "c": "b"},
    "two-cycle": {"a": "b", "b": "a", "c": "a", "d": "b", "e": "d", "f": "e"},
    "three-cycle": {"b": "a", "c": "b", "a": "c", "x": "c", "y": "x", "0": "y"},
    "several": {
        "r": None, "r1": "r", "m": "n", "n": "m", "0": "n", "1": "0", "z": "z", "zz": "z",
        "lonely": "gone", "l1": "lonely", "p": "q", "q": "s", "s": "p", "t": "s", "A": "t",
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_the_hierarchy_shows_each_session_once_where_the_tree_does(
    database: Database, store: BaseStore, shape: str
) -> None:
    parents = SHAPES[shape]
    link(store, parents)
    found = hierarchy(database)
    assert {name: depth for name, (depth, _) in found.items()} == {
        node.session.session_id: node.depth for node in store.session_tree()
    }
    assert found.keys() == parents.keys()
    for name, (depth, path) in found.items():
        assert (len(path), path[-1]) == (depth + 1, name)
        assert all(parents[below] == above for above, below in itertools.pairwise(path))


def test_the_hierarchy_follows_detected_parents_and_leaves_references_out(
    database: Database, store: BaseStore
) -> None:
    store.save_event(event("child", T0, parent_session_id="named"))
    store.save_event(event("grandchild", T0, parent_session_id="child"))
    store.save_session(session("moved", parent_session_id="child", manual_parent_session_id="home"))
    store.save_session(session("home", hidden=True))
    found = hierarchy(database)
    assert {name: path for name, (_, path) in found.items()} == {
        "child": ["child"],
        "grandchild": ["child", "grandchild"],
        "home": ["home"],
        "moved": ["home", "moved"],
    }
    assert {name: depth for name, (depth, _) in found.items()} == {
        node.session.session_id: node.depth for node in store.session_tree()
    }


@pytest.mark.parametrize("closed", [False, True], ids=["chain", "cycle"])
def test_the_hierarchy_follows_long_chains(
    database: Database, store: BaseStore, closed: bool
) -> None:
    # Longer than the thousand steps that MySQL allows a recursion by default.
    length = 1_500 if not closed else 400
    names = [f"c{number:04}" for number in range(length)]
    link(store, dict(zip(names, [names[-1] if closed else None, *names], strict=False)))
    found = hierarchy(database)
    assert {name: depth for name, (depth, _) in found.items()} == {
        name: number for number, name in enumerate(names)
    }
    assert found[names[-1]][1] == names


def test_random_forests_look_the_same_in_the_view_and_the_tree(
    database: Database, store: BaseStore
) -> None:
    chosen = random.Random(11)
    for _ in range(5):
        store.delete_all_sessions()
        names = [f"n{number:02}" for number in range(40)]
        chosen.shuffle(names)
        link(store, {name: chosen.choice([*names, None, "missing"]) for name in names})
        found = hierarchy(database)
        assert {name: depth for name, (depth, _) in found.items()} == {
            node.session.session_id: node.depth for node in store.session_tree()
        }
        assert len(found) == 40


@pytest.mark.only("mysql")
def test_events_text_shows_ids_as_text(database: Database, store: BaseStore) -> None:
    sent = event("s", data={"toolName": "Bash", "toolUseId": "t1"})
    store.save_event(sent)
    rows = database.execute(
        "SELECT id, session_id, timestamp, event_type, tool_name, tool_use_id FROM events_text"
    )
    assert rows == [(sent.id, "s", T0, "tool_call", "Bash", "t1")]
    found = f"SELECT seq FROM events_text WHERE id = '{sent.id}'"
    (stored,) = store.get_events("s")
    assert database.execute(found) == [(stored.seq,)]


# --- Functions and procedures ---------------------------------------------------------------------


def call(database: Database, name: str, *arguments: object) -> list[Any]:
    """What a function of PostgreSQL, or the procedure of MySQL, answers."""
    given = ", ".join(map(literal, arguments))
    with owner_session(database) as connection:
        if database.backend == "postgresql":
            return query(connection, f"SELECT * FROM {name}({given})")
        if name != "prune_old_sessions":
            return query(connection, f"CALL {name}({given})")
        query(connection, f"CALL {name}({given}, @pruned)")
        return query(connection, "SELECT @pruned")


def test_get_recent_events_gives_the_newest(database: Database, store: BaseStore) -> None:
    events = [event(f"s{i % 3}", T0 + i // 2, data={"n": i}) for i in range(130)]
    store.save_events(events)
    newest = [e.id for e in store.get_all_recent_events(130)]
    rows = call(database, "get_recent_events", None)
    assert [str(row[0]) for row in rows] == newest[:100]
    if database.backend == "postgresql":  # MySQL knows no default
        assert call(database, "get_recent_events") == rows
    assert [str(row[0]) for row in call(database, "get_recent_events", 7)] == newest[:7]
    assert call(database, "get_recent_events", 0) == []
    last = store.get_all_recent_events(1)[0]
    assert rows[0][1:7] == (
        last.session_id,
        last.timestamp,
        "tool_call",
        "PreToolUse",
        "machine",
        "/work",
    )


def test_get_session_event_counts_names_every_type(database: Database, store: BaseStore) -> None:
    for event_type, amount in (("message", 2), ("tool_call", 3), ("future", 3), ("newer", 1)):
        store.save_events(event("s", event_type=event_type) for _ in range(amount))
    store.save_events([event("other"), event("S", event_type="message")])
    counts = call(database, "get_session_event_counts", "s")
    assert counts == [("future", 3), ("tool_call", 3), ("message", 2), ("newer", 1)]
    assert dict(counts) == store.event_counts("s")
    assert call(database, "get_session_event_counts", "nobody") == []


def test_unknown_types_show_by_name_in_get_recent_events(
    database: Database, store: BaseStore
) -> None:
    store.save_event(event("s", event_type="future", hook_type="Tomorrow"))
    ((*_, event_type, hook_type, _, _, _),) = call(database, "get_recent_events", 5)
    assert (event_type, hook_type) == ("future", "Tomorrow")


def prunable_mix(store: BaseStore, seed: int) -> None:
    """Sessions of every kind that matters for pruning, around the limit T0, in random trees."""
    chosen = random.Random(seed)
    names = [f"s{number:02}" for number in range(60)]
    sessions = []
    for number, name in enumerate(names):
        ended = chosen.random() < 0.7
        sessions.append(
            session(
                name,
                start_time=T0 - chosen.choice([1, 5, 9]) * DAY,
                end_time=T0 - chosen.choice([1, 1, 1, 1, 1, 0, -2]) * DAY if ended else None,
                status="completed" if ended else "active",
                is_pinned=chosen.random() < 0.08,
                hidden=chosen.random() < 0.2,
                parent_session_id=chosen.choice(
                    [None, None, chosen.choice(names[: number + 1]), f"ref{number % 7}"]
                ),
                manual_parent_session_id=chosen.choice([None] * 9 + [chosen.choice(names)]),
                child_session_ids=tuple(chosen.sample(names, chosen.choice([0, 0, 2]))),
            )
        )
    store.save_sessions(sessions)
    store.save_events(
        event(name, T0 + chosen.choice([-3, -3, -3, -3, 0, 2]) * DAY)
        for name in chosen.sample(names, 30)
    )
    store.save_events(event(f"e{number}", T0 + (number - 2) * DAY) for number in range(5))


def leftovers(database: Database, store: BaseStore) -> tuple[Any, ...]:
    return (
        sorted(database.execute("SELECT session_id FROM sessions")),
        sorted(database.execute("SELECT session_id FROM deleted_sessions")),
        sorted(database.execute("SELECT session_id, timestamp FROM events")),
        store.get_sessions(),
    )


@pytest.mark.parametrize("seed", range(6))
def test_prune_old_sessions_does_what_the_library_does(
    database: Database, store: BaseStore, seed: int
) -> None:
    prunable_mix(store, seed)
    whole = leftovers(database, store)
    pruned = store.prune_old_sessions(T0)
    left = leftovers(database, store)
    assert 0 < len(left[0]) < len(whole[0])
    database.clear()
    prunable_mix(store, seed)
    assert call(database, "prune_old_sessions", T0) == [(pruned,)]
    assert leftovers(database, store) == left
    assert call(database, "prune_old_sessions", T0) == [(0,)]


def test_what_was_pruned_does_not_come_back(database: Database, store: BaseStore) -> None:
    # Also where an event is dated a little later than the server's clock.
    early = event("s", T0)
    late = event("s", round(time.time() * 1000) + DAY // 2)
    store.save_events([early, late])
    store.save_session(session("s", end_time=T0 + 1, status="completed"))
    assert call(database, "prune_old_sessions", T0 + 2) == [(1,)]
    assert store.save_event(early) is False
    assert store.save_event(late) is False
    assert store.get_session("s") is None


def test_pruning_waits_for_writers_and_sees_what_they_did(
    database: Database, store: BaseStore
) -> None:
    store.save_sessions(
        session(name, end_time=T0 + 1, status="completed") for name in ("pinned", "old")
    )
    with owner_session(database) as writer, ThreadPoolExecutor(1) as pool:
        query(writer, "START TRANSACTION")
        query(writer, "UPDATE sessions SET is_pinned = TRUE WHERE session_id = 'pinned'")
        pruning = pool.submit(call, database, "prune_old_sessions", T0 + DAY)
        with pytest.raises(futures.TimeoutError):
            pruning.result(0.5)
        query(writer, "COMMIT")
        assert pruning.result(30) == [(1,)]
    assert [s.session_id for s in store.get_sessions()] == ["pinned"]


@pytest.mark.only("postgresql")
def test_pruning_takes_ids_from_the_lists_of_other_sessions(
    database: Database, store: BaseStore
) -> None:
    # Deletions are forgotten some day, and an id that is still listed would count as unknown.
    store.save_session(session("old", end_time=T0 + 1, status="completed"))
    store.save_session(session("keeper", child_session_ids=("x", "old", "y")))
    store.save_event(event("keeper", T0 + 9 * DAY))
    assert call(database, "prune_old_sessions", T0 + DAY) == [(1,)]
    rows = database.execute("SELECT session_id, child_session_ids FROM sessions")
    assert rows == [("keeper", ["x", "y"])]


# --- PostgreSQL's own -----------------------------------------------------------------------------


@pytest.mark.only("postgresql")
def test_a_type_that_the_enum_does_not_know_is_other_with_its_name(
    database: Database, store: BaseStore
) -> None:
    store.save_events(
        [event("s", T0, event_type="future", hook_type="Tomorrow"), event("s", T0 + 1)]
    )
    rows = database.execute(
        "SELECT event_type::text, event_type_name, hook_type::text, hook_type_name"
        " FROM events ORDER BY timestamp"
    )
    assert rows == [
        ("other", "future", "other", "Tomorrow"),
        ("tool_call", None, "PreToolUse", None),
    ]


@pytest.mark.only("postgresql")
def test_payloads_are_compressed_with_lz4_where_the_server_has_it(
    database: Database, store: BaseStore
) -> None:
    ((has,),) = database.execute(
        "SELECT 'lz4' = ANY(enumvals) FROM pg_settings WHERE name = 'default_toast_compression'"
    ) or [(False,)]
    store.save_event(event("s", data={"text": "abcdefghij" * 2_000}))
    used = database.execute("SELECT pg_column_compression(data) FROM events")
    assert used == [("lz4" if has else "pglz",)]


@pytest.mark.only("postgresql")
def test_the_schema_applies_on_postgresql_15(backend: str) -> None:
    binaries = PostgreSQLBinaries.of(Path("/usr/lib/postgresql/15/bin"), "Debian")
    if binaries is None:
        pytest.skip("no PostgreSQL 15 in /usr/lib/postgresql/15/bin")
    with servers.postgresql_server(binaries=binaries) as server:
        database = new_database(server)
        assert database.owner().apply_schema() is True
        assert database.owner().apply_schema() is False
        run_by_hand(database, schema_text("postgresql"))
        with make_store(database.url) as store:
            store.load_sample()
            assert len(list(store.iter_events())) == 7
            link(store, SHAPES["several"])
            assert len(hierarchy(database)) == len(SHAPES["several"]) + 4
        assert len(call(database, "get_recent_events")) == 7
        # Of the sample's four three hang together, and one of these is pinned.
        pruned = call(database, "prune_old_sessions", T0 + 100 * 365 * DAY)
        assert pruned == [(len(SHAPES["several"]) + 1,)]
