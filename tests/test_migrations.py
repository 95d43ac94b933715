"""Upgrades: what is pending is applied once, under a lock, and can be interrupted anywhere."""

from __future__ import annotations

import multiprocessing
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import Cursor, SchemaError, StoreUnavailable, schema
from contextuate_persist.base import BaseStore
from tests.builders import T0, event
from tests.conftest import Database, make_store, new_database
from tests.contextuate import make_original, run_all

CATALOGUE = {
    "postgresql": """
        SELECT 'column', table_name, column_name, data_type, is_nullable, column_default,
            character_maximum_length::text, collation_name, generation_expression, udt_name
        FROM information_schema.columns WHERE table_schema = 'public'
        UNION ALL
        SELECT 'index', tablename, indexname, indexdef, '', '', '', '', '', ''
        FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL
        SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '',
            '', '', '', ''
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
        UNION ALL
        SELECT 'function', proname, pg_get_functiondef(oid), '', '', '', '', '', '', ''
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'view', viewname, definition, '', '', '', '', '', '', ''
        FROM pg_views WHERE schemaname = 'public'
        UNION ALL
        SELECT 'enum', t.typname, e.enumlabel, '', '', '', '', '', '', ''
        FROM pg_enum AS e JOIN pg_type AS t ON t.oid = e.enumtypid
        WHERE t.typnamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'trigger', tgrelid::regclass::text, tgname, '', '', '', '', '', '', ''
        FROM pg_trigger AS g JOIN pg_class AS c ON c.oid = g.tgrelid
        WHERE NOT tgisinternal AND c.relnamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'storage', attrelid::regclass::text, attname, to_jsonb(a) ->> 'attcompression',
            attstorage::text,
            '', '', '', '', ''
        FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0
        UNION ALL
        SELECT 'comment', objoid::regclass::text, objsubid::text, description, '', '', '', '', '',
            ''
        FROM pg_description
        WHERE classoid = 'pg_class'::regclass
            AND objoid IN (
                SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace
            )
        """,
    "mysql": """
        SELECT 'column', table_name, column_name, column_type, is_nullable, column_default,
            collation_name, extra, generation_expression, column_comment
        FROM information_schema.columns
        WHERE table_schema = DATABASE() AND table_name NOT LIKE 'contextuate%'
        UNION ALL
        SELECT 'index', table_name, index_name, seq_in_index, column_name, collation, non_unique,
            expression, '', ''
        FROM information_schema.statistics
        WHERE table_schema = DATABASE() AND table_name NOT LIKE 'contextuate%'
        UNION ALL
        SELECT 'constraint', t.table_name, t.constraint_name, t.constraint_type, c.check_clause,
            r.delete_rule, r.referenced_table_name, '', '', ''
        FROM information_schema.table_constraints AS t
        LEFT JOIN information_schema.check_constraints AS c
            ON c.constraint_schema = t.table_schema AND c.constraint_name = t.constraint_name
        LEFT JOIN information_schema.referential_constraints AS r
            ON r.constraint_schema = t.table_schema AND r.constraint_name = t.constraint_name
        WHERE t.table_schema = DATABASE() AND t.table_name NOT LIKE 'contextuate%'
        UNION ALL
        SELECT 'routine', routine_name, REPLACE(routine_definition, DATABASE(), ''), '', '', '', '',
            '', '', ''
        FROM information_schema.routines WHERE routine_schema = DATABASE()
        UNION ALL
        SELECT 'view', table_name, REPLACE(view_definition, DATABASE(), ''), '', '', '', '', '', '',
            ''
        FROM information_schema.views WHERE table_schema = DATABASE()
        """,
}


def catalogue(database: Database) -> list[str]:
    return sorted(ascii(row) for row in database.execute(CATALOGUE[database.backend]))


def versions(database: Database) -> list[Any]:
    return database.execute("SELECT version, name, layout FROM schema_version ORDER BY version")


def test_an_empty_database_is_upgraded_to_what_init_makes(
    server: Any, empty_database: Database
) -> None:
    fresh = new_database(server)
    try:
        fresh.owner().apply_schema()
        [done] = empty_database.owner().upgrade_schema()
        assert done.name == "base schema"
        assert catalogue(empty_database) == catalogue(fresh)
        assert versions(empty_database) == versions(fresh) == [(1, "base schema", "plain")]
        assert empty_database.owner().upgrade_schema() == []
    finally:
        fresh.drop()


def test_a_database_of_contextuate_is_adopted_and_equals_a_fresh_one(
    server: Any, empty_database: Database
) -> None:
    fresh = new_database(server)
    try:
        fresh.owner().apply_schema()
        make_original(empty_database)
        with pytest.raises(SchemaError, match="contextuate-persist upgrade"):
            empty_database.owner().apply_schema()
        [done] = empty_database.owner().upgrade_schema()
        assert done.name == "adopt_contextuate"
        assert catalogue(empty_database) == catalogue(fresh)
        assert versions(empty_database) == [(1, "adopt_contextuate", "plain")]
        assert empty_database.owner().upgrade_schema() == []
        assert empty_database.owner().apply_schema() is False
    finally:
        fresh.drop()


def test_adoption_keeps_every_session_and_event(empty_database: Database) -> None:
    make_original(empty_database)
    empty_database.owner().upgrade_schema()
    with make_store(empty_database.url) as store:  # the application's account may use it
        root, child = store.get_session("root"), store.get_session("child")
        assert root is not None
        assert child is not None
        assert (root.label, root.is_pinned, root.end_time) == ("Label", True, 1700000009000)
        assert root.token_usage.total_input == 7
        assert root.status.value == "completed"
        assert (child.parent_session_id, child.manual_parent_session_id) == ("root", "folder")
        assert child.agent_type == "nexus"
        first, second = store.get_events("child")
        assert first.data == {"toolName": "Bash", "toolUseId": "t1"}  # it came first
        assert second.data == {"toolName": 5}
        assert store.find_events(tool_name="Bash") == [first]
        assert store.find_events(tool_use_id="t1") == [first]
        old, start = store.get_events("root")
        assert (old.timestamp, old.data) == (5, {"data": ["an array"]})
        assert start.data == {"a": 1.5, "text": "it's"}
        assert store.save_event(event("root", T0 + 99)) is True


def test_adopted_events_of_any_time_are_paged_through(empty_database: Database) -> None:
    make_original(empty_database)
    times = [-(2**63), -1, 0, 0, 1_700_000_000, 2**63 - 1]  # the original's columns take them all
    rows = ", ".join(
        f"('{uuid.uuid4()}', 'child', {time}, 'message', 'Stop', 'm', '/w', '{{}}')"
        for time in times
    )
    columns = (
        "id, session_id, timestamp, event_type, hook_type, machine_id, working_directory, data"
    )
    run_all(empty_database, [f"INSERT INTO events ({columns}) VALUES {rows}"])
    empty_database.owner().upgrade_schema()
    with make_store(empty_database.url) as store:
        events = store.get_events("child")
        assert [e.timestamp for e in events if e.data == {}] == times
        assert [e for e in store.iter_events() if e.session_id == "child"] == events
        forward, back = store.get_events("child", limit=1, before=events[1].cursor), events[-1:]
        while got := store.get_events("child", limit=1, after=forward[-1].cursor):
            forward += got
        while got := store.get_events("child", limit=1, before=Cursor.parse(str(back[0].cursor))):
            back = got + back
        assert forward == back == events
        assert [*store.iter_events(session_id="child", after=events[2].cursor)] == events[3:]


@pytest.mark.only("mysql")
def test_adoption_parts_ids_that_differ_only_in_case(
    empty_database: Database, backend: str
) -> None:
    make_original(empty_database)
    empty_database.owner().upgrade_schema()
    with make_store(empty_database.url) as store:
        assert {s.session_id for s in store.get_sessions()} == {
            "root", "child", "kid", "ROOT", "Child",
        }  # fmt: skip
        upper, kid, odd = (store.get_session(name) for name in ("ROOT", "kid", "Child"))
        assert upper is not None
        assert kid is not None
        assert odd is not None
        assert (upper.machine_id, upper.working_directory) == ("M2", "/2")
        assert kid.parent_session_id == "ROOT"
        assert (odd.start_time, odd.working_directory) == (1700000002500, "/early")
        assert [e.id for e in store.get_events("ROOT")] == ["0193aaaa-0000-7000-8000-000000000005"]
        assert len({e.id for e in store.get_events("Child")}) == 2
        assert sum(store.event_counts().values()) == 7


def test_the_old_tables_stay_with_every_row(empty_database: Database) -> None:
    make_original(empty_database)
    counts = [empty_database.execute(f"SELECT COUNT(*) FROM {t}") for t in ("sessions", "events")]
    empty_database.owner().upgrade_schema()
    kept = (
        ("contextuate_original.sessions", "contextuate_original.events")
        if empty_database.backend == "postgresql"
        else ("contextuate_original_sessions", "contextuate_original_events")
    )
    assert [empty_database.execute(f"SELECT COUNT(*) FROM {table}") for table in kept] == counts


def test_the_old_tables_can_still_be_changed(empty_database: Database) -> None:
    make_original(empty_database)
    empty_database.owner().upgrade_schema()
    old = (
        "contextuate_original.sessions"
        if empty_database.backend == "postgresql"
        else "contextuate_original_sessions"
    )
    of_child = f"FROM {old} WHERE session_id = 'child'"
    run_all(empty_database, [f"UPDATE {old} SET label = 'New' WHERE session_id = 'child'"])
    assert empty_database.execute(f"SELECT label {of_child}") == [("New",)]
    run_all(empty_database, [f"DELETE FROM {old} WHERE session_id = 'root'"])
    assert empty_database.execute(f"SELECT parent_session_id {of_child}") == [(None,)]
    with make_store(empty_database.url) as store:
        assert store.get_session("root") is not None


def test_a_dry_run_tells_the_statements_and_changes_nothing(empty_database: Database) -> None:
    make_original(empty_database)
    before = catalogue(empty_database)
    [migration] = empty_database.owner().upgrade_schema(dry_run=True)
    assert any("contextuate_original" in step.statement for step in migration.steps)
    assert any(step.statement.startswith("CREATE TABLE") for step in migration.steps)
    assert catalogue(empty_database) == before
    assert len(empty_database.owner().upgrade_schema()) == 1
    assert empty_database.owner().upgrade_schema(dry_run=True) == []


class Killed(BaseException):
    """Stands for the end of the process: no handler of the library may catch it."""


def run_until(store: BaseStore, statements: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Upgrade, but die before the statement of this number; True if it came so far."""
    done = 0

    def dying(run: Any) -> Any:
        def run_or_die(self: Any, *arguments: Any) -> None:
            nonlocal done
            if done == statements:
                raise Killed
            done += 1
            run(self, *arguments)

        return run_or_die

    from contextuate_persist.mysql_store import MySQLSchema  # noqa: PLC0415
    from contextuate_persist.postgresql_store import PostgreSQLSchema  # noqa: PLC0415

    with monkeypatch.context() as patch:
        for kind in (MySQLSchema, PostgreSQLSchema):
            patch.setattr(kind, "run", dying(kind.run))
            patch.setattr(kind, "record", dying(kind.record))
        try:
            store.upgrade_schema()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("original", [False, True])
def test_an_upgrade_killed_before_every_statement_goes_on_when_run_again(
    server: Any, original: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first statement, run again and killed before the second, and so on.

    The connection is cut there, so what was not committed is gone, as after a kill.
    """
    reference, database = new_database(server), new_database(server)
    try:
        for one in (reference, database):
            if original:
                make_original(one)
        reference.owner().upgrade_schema()
        kills = 0
        while run_until(database.owner(), kills, monkeypatch):
            kills += 1
            with pytest.raises(SchemaError):
                make_store(database.url).init()
        assert kills > 12
        assert catalogue(database) == catalogue(reference)
        assert all_rows(database) == all_rows(reference)
    finally:
        reference.drop()
        database.drop()


def all_rows(database: Database) -> list[Any]:
    events = "id, session_id, timestamp, event_type, tool_name, machine_id"
    sessions = "session_id, start_time, parent_session_id, known_from, label"
    return [
        sorted(map(ascii, database.execute(f"SELECT {columns} FROM {table}")))
        for columns, table in ((events, "events"), (sessions, "sessions"))
    ]


def upgrade_in_process(url: str, results: Any) -> None:
    results.put(len(make_store(url).upgrade_schema()))


@pytest.mark.parametrize("original", [False, True])
def test_of_eight_processes_one_upgrades_and_all_succeed(
    empty_database: Database, original: bool
) -> None:
    if original:
        make_original(empty_database)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=upgrade_in_process, args=(empty_database.owner_url, results))
        for _ in range(8)
    ]
    for process in processes:
        process.start()
    done = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    assert done == [0] * 7 + [1]
    results.close()
    results.join_thread()
    with make_store(empty_database.url) as store:
        assert store.save_event(event()) is True


def test_a_newer_database_is_refused_with_what_to_do(database: Database) -> None:
    database.execute("INSERT INTO schema_version (version, name) VALUES (99, 'future')")
    try:
        for call in (
            lambda: make_store(database.url).init(),
            lambda: database.owner().upgrade_schema(),
            lambda: database.owner().upgrade_schema(dry_run=True),
            lambda: database.owner().apply_schema(),
        ):
            with pytest.raises(SchemaError, match="99.*install a newer contextuate-persist"):
                call()
    finally:
        database.execute("DELETE FROM schema_version WHERE version = 99")


def test_tables_of_another_origin_are_refused_and_untouched(empty_database: Database) -> None:
    empty_database.execute("CREATE TABLE events (id INTEGER, mine INTEGER)")
    for call in (
        empty_database.owner().upgrade_schema,
        empty_database.owner().apply_schema,
    ):
        with pytest.raises(SchemaError, match="another origin"):
            call()
    assert empty_database.execute("SELECT COUNT(*) FROM events") == [(0,)]


# --- The machinery, with migrations made for it ---------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> Path:
    """A directory of migrations, and a library that knows version 3."""
    directory = tmp_path / "migrations" / backend
    directory.mkdir(parents=True)
    original = schema.schema_file

    def find(name: str) -> Path:
        return directory if name == f"migrations/{backend}" else original(name)

    monkeypatch.setattr(schema, "schema_file", find)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    return directory


def write(files: Path, name: str, transactional: bool, text: str) -> None:
    head = f"-- transactional: {'yes' if transactional else 'no'}\n"
    (files / name).write_text(head + text)


def test_pending_migrations_are_applied_in_order_and_recorded(
    files: Path, empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 1)
    empty_database.owner().apply_schema()
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    with pytest.raises(SchemaError, match="version 1, this library needs 3.*upgrade"):
        make_store(empty_database.url).init()
    write(files, "0002_add_notes.sql", True, "CREATE TABLE notes (id INTEGER PRIMARY KEY);")
    concurrently = "CONCURRENTLY" if empty_database.backend == "postgresql" else ""
    write(
        files,
        "0003_index_notes.sql",
        False,
        "-- a comment\nINSERT INTO notes VALUES (1) /* ; */;\n"
        f"CREATE INDEX {concurrently} idx_notes ON notes (id);",
    )
    done = empty_database.owner().upgrade_schema()
    assert [m.name for m in done] == ["add_notes", "index_notes"]
    assert [v[0] for v in versions(empty_database)] == [1, 2, 3]
    assert empty_database.execute("SELECT id FROM notes") == [(1,)]
    assert empty_database.owner().upgrade_schema() == []
    with make_store(empty_database.url) as store:
        assert store.health().schema_version == 3

    (files / "0002_add_notes.sql").write_text("-- transactional: yes\nSELECT 1;")
    with pytest.raises(SchemaError, match="migration 0002 was applied from another file"):
        empty_database.owner().upgrade_schema()


def test_a_migration_that_waits_for_a_lock_gives_up_and_lets_writers_on(
    files: Path, empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes after an ALTER TABLE that waits has to wait behind it."""
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 1)
    empty_database.owner().apply_schema()
    write(files, "0002_waits.sql", True, "ALTER TABLE sessions ADD COLUMN later INTEGER;")
    upgrading = make_store(empty_database.owner_url, lock_timeout=1)
    with make_store(empty_database.url) as store, ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
        with store._connection(True) as connection:
            assert store._select_session_ids(connection) == []
            upgrade = threads.submit(upgrading.upgrade_schema)
            with pytest.raises(StoreUnavailable, match="(?i)lock"):
                upgrade.result(15)
            assert store.save_event(event()) is True
    assert [v[0] for v in versions(empty_database)] == [1]
    assert [done.name for done in upgrading.upgrade_schema()] == ["waits"]


def test_a_failed_migration_is_not_recorded_and_says_why(
    files: Path, empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 1)
    empty_database.owner().apply_schema()
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    write(files, "0002_fails.sql", True, "CREATE TABLE half (id INTEGER); SELECT nothing_here;")
    with pytest.raises(Exception, match="nothing_here"):
        empty_database.owner().upgrade_schema()
    assert [v[0] for v in versions(empty_database)] == [1]
    tables = empty_database.owner()
    with tables._schema_session(5) as session:
        # MySQL commits each statement by itself, PostgreSQL undoes the whole file.
        assert ("half" in session.read_columns()) == (empty_database.backend == "mysql")


def test_a_statement_is_left_out_where_it_has_been_run(
    files: Path, empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 1)
    empty_database.owner().apply_schema()
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    empty_database.execute("CREATE TABLE notes (id INTEGER)")
    write(
        files,
        "0002_notes.sql",
        False,
        "-- unless: SELECT 1 FROM information_schema.tables WHERE table_name = 'notes'\n"
        "CREATE TABLE notes (id INTEGER);\nINSERT INTO notes VALUES (7);",
    )
    empty_database.owner().upgrade_schema()
    assert empty_database.execute("SELECT id FROM notes") == [(7,)]


@pytest.mark.parametrize("name", ["2_x.sql", "0002-x.sql", "0002_X.sql"])
def test_a_misnamed_migration_is_refused(
    files: Path, database: Database, name: str, backend: str
) -> None:
    write(files, name, True, "SELECT 1;")
    with pytest.raises(SchemaError, match="NNNN_name.sql"):
        schema.load_migrations(backend)


def test_both_backends_have_the_same_migrations() -> None:
    numbered = {
        backend: [(m.version, m.name) for m in schema.load_migrations(backend)]
        for backend in ("postgresql", "mysql")
    }
    assert numbered["postgresql"] == numbered["mysql"]
    assert [version for version, _ in numbered["mysql"]] == list(
        range(1, schema.SCHEMA_VERSION + 1)
    )


def test_scripts_are_split_where_statements_end() -> None:
    mysql = (
        "-- a; b\n/* c; */ SELECT ';', \"a;b\", `x;y`, 'it''s;', 'back\\';slash' # z;\n;\n"
        "DELIMITER //\nCREATE PROCEDURE p() BEGIN SELECT 1; SELECT '//'; END //\n"
        "delimiter ;\nSELECT 2 /*! + 1 */;;\n  -- the end"
    )
    split = schema.split_script(mysql, "mysql")
    assert [statement.split()[0] for statement in split] == ["SELECT", "CREATE", "SELECT"]
    assert split[1].endswith("END")
    assert split[2] == "SELECT 2 /*! + 1 */"
    postgresql = (
        "DO $$ BEGIN PERFORM 1; END $$; SELECT $x$ ; $$ ; $x$, 'a''b;\\'; -- ;\n"
        "SELECT \"a;b\"#>'{}'"
    )
    assert len(schema.split_script(postgresql, "postgresql")) == 3


def test_every_event_id_survives_as_a_uuid(empty_database: Database) -> None:
    make_original(empty_database)
    [(count,)] = empty_database.execute("SELECT COUNT(*) FROM events")
    empty_database.owner().upgrade_schema()
    with make_store(empty_database.url) as store:
        ids = {str(uuid.UUID(one.id)) for one in store.iter_events()}
        assert ids == {one.id for one in store.iter_events()}
        assert len(ids) == count > 0
