"""Maintenance: each period does what it can, with either account, and says what is left to do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import mysql.connector
import psycopg
import pytest

from contextuate_persist import (
    StoreUnavailable,
    backup,
    backup_file,
    doctor,
    encryption,
    maintenance,
    mysql_store,
    postgresql_store,
    schema,
)
from contextuate_persist.arguments import make_parser
from contextuate_persist.base import BaseStore
from contextuate_persist.cli import main
from contextuate_persist.config import ENVIRONMENT_ADMINISTRATOR, ENVIRONMENT_URL
from contextuate_persist.doctor import Finding, Level
from contextuate_persist.maintenance import PERIODS, Tasks, maintain
from tests import servers
from tests.builders import T0, event, session
from tests.conftest import Database, make_store

EXAMPLES = Path(__file__).parent.parent / "examples"
OLD = {"end_time": T0, "status": "completed"}


def by_check(findings: list[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for one in findings:
        found.setdefault(one.check, []).append(one)
    return found


@pytest.fixture(params=["owner", "application"])
def account(request: pytest.FixtureRequest, database: Database) -> Any:
    """A store of either account."""
    owner = request.param == "owner"
    with make_store(database.owner_url if owner else database.url) as opened:
        yield opened


def is_owner(store: BaseStore, database: Database) -> bool:
    place = getattr(store, "_conninfo", None) or getattr(store, "_url", "")
    return database.user not in place


def fill(store: BaseStore) -> None:
    store.save_session(session("old", **OLD))
    store.save_session(session("pinned", is_pinned=True, **OLD))
    store.save_events(event("old", T0 + i) for i in range(20))


# --- Every word -----------------------------------------------------------------------------------


def test_daily_looks_at_connections_statements_and_the_backup(account: BaseStore) -> None:
    found = by_check(maintain(account, "daily"))
    assert found.keys() >= {
        "connections", "transactions", "connection", "statements", "prepared", "space", "backup",
    }  # fmt: skip
    (connections,) = found["connections"]
    assert connections.level is Level.OK
    assert re.fullmatch(r"\d+ of the \d+ that the server allows", connections.message)
    (backup,) = found["backup"]
    assert backup.level is Level.WARNING
    assert backup.advice


def test_weekly_counts_anew_and_tells_sizes(account: BaseStore, database: Database) -> None:
    fill(account)
    found = by_check(maintain(account, "weekly"))
    (statistics,) = found["statistics"]
    if account.backend == "mysql" or is_owner(account, database):
        assert statistics.level is Level.OK
        assert {"events", "sessions", "token_ledger"} <= {
            word.strip(",") for word in statistics.message.split()
        }
    else:  # PostgreSQL lets only the owner
        assert statistics.level is Level.WARNING
        assert "not this account's" in statistics.message
        assert "the URL of the database's owner" in statistics.advice
    sizes = [one.message for one in found["sizes"]]
    assert len(sizes) == len(database.execute(TABLES[account.backend]))
    if statistics.level is Level.OK:
        told = r"events: about 20 rows, [\d.]+ MB and [\d.]+ MB of indexes"
        sizes = [one.message for one in by_check(maintain(account, "weekly"))["sizes"]]
        assert any(re.fullmatch(told, message) for message in sizes)
    assert "indexes" in found


TABLES = {
    "postgresql": "SELECT 1 FROM pg_tables WHERE schemaname = 'public' "
    "AND tablename <> 'schema_version'",
    "mysql": "SELECT 1 FROM information_schema.tables WHERE table_schema = DATABASE() "
    "AND table_type = 'BASE TABLE' AND table_name <> 'schema_version'",
}


def test_monthly_archives_only_where_it_is_told_to(account: BaseStore, tmp_path: Path) -> None:
    fill(account)
    (found,) = by_check(maintain(account, "monthly"))["archive"]
    assert (found.level, found.message) == (Level.WARNING, "1 sessions are due")
    assert account.get_session("old") is not None
    tasks = Tasks(archives=tmp_path / "archive")
    (found,) = by_check(maintain(account, "monthly", tasks))["archive"]
    assert found.level is Level.OK
    assert found.message == "1 sessions with 20 events archived; 1 are kept"
    assert account.get_session("old") is None
    assert len([*(tmp_path / "archive").glob("*.jsonl.gz")]) == 1
    (found,) = by_check(maintain(account, "monthly"))["archive"]
    assert (found.level, found.message) == (Level.OK, "nothing is due")
    (found,) = by_check(maintain(account, "monthly"))["partitions"]
    assert found.level is Level.OK


def test_monthly_names_what_cannot_be_archived(
    store: BaseStore, database: Database, tmp_path: Path
) -> None:
    fill(store)
    database.execute("UPDATE sessions SET machine_id = ' m' WHERE session_id = 'old'")
    tasks = Tasks(archives=tmp_path)
    (found,) = by_check(maintain(store, "monthly", tasks))["archive"]
    assert found.level is Level.WARNING
    assert "0 sessions with 0 events archived; 2 are kept, 1 of them cannot" in found.message
    assert "old: machineId: white space" in found.message


def test_monthly_makes_room_where_that_is_worth_it(
    account: BaseStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "GARBAGE_BYTES", 2**60)  # whatever other tests have left
    (found,) = by_check(maintain(account, "monthly"))["room"]
    assert (found.level, "too little" in found.message) == (Level.OK, True)
    monkeypatch.setattr(maintenance, "GARBAGE_BYTES", 0)
    monkeypatch.setattr(maintenance, "_is_room_for_two", lambda *_: True)
    monkeypatch.setattr(maintenance, "GARBAGE_PART", 0)
    (found,) = by_check(maintain(account, "monthly"))["room"]
    if account.backend == "mysql" or is_owner(account, database):
        assert found.level is Level.OK
        assert found.message.startswith("made free what deleted rows had: ")
        assert "events" in found.message
    else:
        assert found.level is Level.WARNING
        assert "the URL of the database's owner" in found.advice


@pytest.mark.only("mysql")
@pytest.mark.parametrize("why", ["", "another machine", "no directory", "full"])
def test_a_table_is_rebuilt_only_where_the_disk_is_seen_to_have_room_for_it(
    store: BaseStore, database: Database, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    answers = store.survey()
    [(host, directory)] = answers["disk"] or ()
    size = 10**9
    asked: list[str] = []

    def free(place: str) -> int | None:
        asked.append(place)
        return None if why == "no directory" else 2 * size + (why != "full")

    rebuilt: list[str] = []
    monkeypatch.setattr(store, "compact", rebuilt.append)
    monkeypatch.setattr(
        store,
        "survey",
        lambda: {**answers, "garbage": [("events", size, size), ("sessions", 0, 0)]},
    )
    there = "elsewhere" if why == "another machine" else host
    monkeypatch.setattr(maintenance.socket, "gethostname", lambda: there)
    monkeypatch.setattr(doctor, "free_bytes", free)
    (found,) = by_check(maintain(store, "monthly"))["room"]
    assert rebuilt == ([] if why else ["events"])
    assert asked == ([] if why == "another machine" else [directory])
    assert found.level is (Level.WARNING if why else Level.OK)
    assert bool(why) == ("OPTIMIZE TABLE events at" in found.advice)


def test_quarterly_reviews_and_plans(account: BaseStore, tmp_path: Path) -> None:
    found = by_check(maintain(account, "quarterly"))
    assert found.keys() >= {"restore", "benchmark", "indexes", "version", "driver", "migrations"}
    (migrations,) = found["migrations"]
    assert (migrations.level, migrations.message[:5]) == (Level.OK, "none:")
    (restore,) = found["restore"]
    assert "contextuate-persist restore --test" in restore.advice
    (benchmark,) = found["benchmark"]
    assert "bench --output FILE" in benchmark.advice


def test_an_item_that_fails_does_not_stop_the_others(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> Any:
        raise StoreUnavailable("away")

    monkeypatch.setattr(store, "survey", fail)
    (tmp_path / "file").write_text("")
    tasks = Tasks(archives=tmp_path / "file" / "archive")
    found = {one.check: one for one in maintain(store, "monthly", tasks)}
    assert found["room"] == Finding("room", Level.PROBLEM, "away")
    assert found["archive"].level is Level.PROBLEM
    assert found["partitions"].level is Level.OK


@pytest.mark.usefixtures("tools")
def test_what_needs_no_database_is_done_while_it_is_away(
    store: BaseStore, backend: str, tmp_path: Path
) -> None:
    backup.backup(store, tmp_path)
    away = make_store(f"{backend}://127.0.0.1:1/nobody", connect_timeout=1)
    connection, found = maintain(away, "daily", Tasks(backups=tmp_path))
    assert (connection.check, connection.level) == ("connection", Level.PROBLEM)
    assert "127.0.0.1:1" in connection.message
    assert (found.check, found.level) == ("backup", Level.OK)


def test_what_is_to_be_migrated_is_told_before_the_schema_fits(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_database.owner().apply_schema()
    pending = schema.Migration(2, "add_notes", True, (), None)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    monkeypatch.setattr(schema, "pending", lambda _: [pending])
    found = by_check(maintain(make_store(empty_database.owner_url), "quarterly"))
    assert found.keys() == {"schema", "restore", "benchmark", "migrations"}
    assert found["schema"][0].level is Level.PROBLEM
    assert found["migrations"][0].message == "to apply: 0002 add_notes"


ANSWERS: dict[str, Any] = {
    "database": [("test",)],
    "connections": [(10, 100)],
    "transactions": [],
    "sizes": [],
    "garbage": [],
    "disk": [],
    "scratch": [],
    "indexes": [],
}


@pytest.mark.parametrize(
    ("period", "answers", "check", "level", "words"),
    [
        ("daily", {"connections": [(80, 100)]}, "connections", Level.WARNING, "lower pool_size"),
        ("daily", {"connections": [(99, 100)]}, "connections", Level.PROBLEM, "99 of the 100"),
        ("daily", {"connections": None}, "connections", Level.OK, "not told to this account"),
        ("daily", {"transactions": None}, "transactions", Level.OK, "not told to this account"),
        ("daily", {"transactions": [("7", 4000)]}, "transactions", Level.WARNING, "7 (4,000 s)"),
        ("daily", {"transactions": [("7", None)]}, "transactions", Level.OK, "not told to this"),
        ("daily", {"transactions": [("7", 4000), ("8", None)]}, "transactions", Level.WARNING,
         "open for long: 7 (4,000 s)"),
        ("weekly", {"sizes": [("events", -1, 2e9, 5e6)]}, "sizes", Level.OK,
         "events: about 0 rows, 2.0 GB and 5.0 MB of indexes"),
        ("monthly", {"garbage": None}, "room", Level.OK, "not told to this account"),
        ("monthly", {"garbage": [("events", 10**7, 10**9)]}, "room", Level.OK, "too little"),
        ("monthly", {"garbage": [("events", 10**8, 10**9)]}, "room", Level.OK, "had: events"),
        ("monthly", {"garbage": [("events", 10**8, 10**9)], "disk": None}, "room", Level.WARNING,
         "run OPTIMIZE TABLE events at a quiet time"),
        ("quarterly", {"indexes": None}, "indexes", Level.OK, "not told to this account"),
        ("quarterly", {"indexes": [("a", 10**6, 5), ("b", 10**6, 0)]}, "indexes", Level.OK,
         "2 of 2.0 MB; not used since the server counts: b"),
    ],
)  # fmt: skip
def test_what_the_server_answers_is_judged(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch, period: str, answers: dict[str, Any],
    check: str, level: Level, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(store, "survey", lambda: {**ANSWERS, **answers})
    monkeypatch.setattr(store, "compact", lambda table: None)
    monkeypatch.setattr(store, "refresh_statistics", lambda table: None)
    found = by_check(maintain(store, period))[check][0]
    assert (found.level, words in str(found)) == (level, True), found


def test_both_servers_answer_the_owner_about_everything(database: Database) -> None:
    with make_store(database.owner_url) as store:
        answers = store.survey()
    assert answers.keys() == ANSWERS.keys()
    assert None not in answers.values()
    assert {row[0] for row in answers["sizes"] or ()} >= {"sessions", "events", "token_ledger"}
    assert any("idx_" in str(row[0]) for row in answers["indexes"] or ())


@pytest.mark.only("mysql")
def test_a_transaction_of_a_moment_is_not_long_where_the_machines_zone_is_not_utc(
    backend: str,
) -> None:
    server = servers.mysql_server()
    if server.external_url is not None:
        pytest.skip("an external server: its zone is not ours to choose")
    server.environment["TZ"] = "THERE5"
    with server, contextlib.closing(server._connect("mysql")) as connection:
        connection.cmd_query("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        assert make_store(server.url("mysql")).survey()["transactions"] == []


@pytest.mark.only("postgresql")
def test_others_connections_are_counted_and_their_transactions_not_taken_for_none(
    store: BaseStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = postgresql_store.SURVEY["transactions"].replace("'5 minutes'", "'0 s'")
    monkeypatch.setitem(postgresql_store.SURVEY, "transactions", at_once)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            other = stack.enter_context(database.server._connect(database.name))
            other.execute("BEGIN")
        found = by_check(maintain(store, "daily"))
        (connections,) = found["connections"]
        assert int(connections.message.split()[0]) >= 4
        (transactions,) = found["transactions"]
        assert transactions.message == "not told to this account: how long others take"
        with make_store(database.server.url(database.name)) as administrator:
            (transactions,) = by_check(maintain(administrator, "daily"))["transactions"]
        assert transactions.level is Level.WARNING
        assert str(other.info.backend_pid) in transactions.message


@pytest.mark.only("mysql")
def test_a_transaction_that_is_open_for_long_is_told_by_its_thread(
    database: Database, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = mysql_store.SURVEY["transactions"]
    at_once = query.replace("age > 300", "age >= 0")
    assert at_once != query
    monkeypatch.setitem(mysql_store.SURVEY, "transactions", at_once)
    with contextlib.closing(database.server._connect(database.name)) as connection:
        connection.cmd_query("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        told = make_store(database.owner_url).survey()["transactions"]
        assert str(connection.connection_id) in {row[0] for row in told or ()}


# --- Backups and benchmarks -----------------------------------------------------------------------


@pytest.fixture
def tools(
    backend: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MySQL's client programs, as on a machine that has them installed."""
    if backend == "mysql":
        directory = tmp_path_factory.mktemp("tools")
        next(iter(servers.find_mysql())).write_tools(directory)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("encrypted", [False, True])
def test_of_several_databases_backups_in_one_directory_each_looks_at_its_own(
    store: BaseStore, empty_database: Database, tmp_path: Path, *, encrypted: bool
) -> None:
    keys = [encryption.new_identity(tmp_path / "key")] if encrypted else []
    directory = tmp_path / "backups"
    directory.mkdir()
    empty_database.owner().apply_schema()
    tasks = Tasks(backups=directory)
    with make_store(empty_database.url) as other:
        mine = Path(backup.backup(store, directory, recipients=keys).path)
        os.utime(mine, (time.time() - 60,) * 2)
        for newest, opened in ((mine, store), (None, other)):
            (found,) = by_check(maintain(opened, "daily", tasks))["backup"]
            assert (found.level is Level.OK) == (newest is not None), found
        assert found.message == f"{directory} has none of this database"
        theirs = Path(backup.backup(other, directory, recipients=keys).path)
        for newest, opened in ((mine, store), (theirs, other)):
            (found,) = by_check(maintain(opened, "daily", tasks))["backup"]
            assert found.message.startswith(newest.name)


def test_what_a_killed_test_of_a_backup_has_left_is_told_and_not_dropped(
    store: BaseStore, database: Database
) -> None:
    server = database.server
    left, used, other = (f"contextuate_restore_{one}" for one in ("00c0ffee", "0ddba11a", "mine"))
    tasks = Tasks(administrator=server.admin_url)
    with contextlib.ExitStack() as stack:
        for name in (left, used, other):
            server.create_database(name)
            stack.callback(server.execute, f"DROP DATABASE {name}")
        with contextlib.closing(server._connect(used)):
            found, untried = by_check(maintain(store, "quarterly", tasks))["restore"]
            assert found.level is Level.WARNING
            assert found.message.startswith(f"nobody uses {left},")
            assert found.advice.startswith(f"DROP DATABASE {left},")
            assert "no backup was restored" in untried.message
    assert len(by_check(maintain(store, "quarterly", tasks))["restore"]) == 1


@pytest.mark.usefixtures("tools")
def test_the_newest_backup_is_verified_and_restored(
    store: BaseStore, database: Database, tmp_path: Path
) -> None:
    fill(store)
    empty = Tasks(backups=tmp_path)
    (found,) = by_check(maintain(store, "daily", empty))["backup"]
    assert found.level is Level.PROBLEM
    made = Path(backup.backup(store, tmp_path).path)
    (found,) = by_check(maintain(store, "daily", empty))["backup"]
    assert (found.level, found.message) == (Level.OK, f"{made.name} is whole, and 0.0 days old")
    tasks = Tasks(backups=tmp_path, administrator=database.server.admin_url)
    (found,) = by_check(maintain(store, "quarterly", tasks))["restore"]
    assert found.level is Level.OK, found
    os.utime(made, (1, 1))
    (found,) = by_check(maintain(store, "daily", empty))["backup"]
    assert found.level is Level.WARNING
    made.write_bytes(made.read_bytes()[: made.stat().st_size // 2])
    (found,) = by_check(maintain(store, "daily", empty))["backup"]
    assert found.level is Level.PROBLEM


@pytest.mark.usefixtures("tools")
def test_a_backup_is_as_old_as_it_says_and_not_as_the_copy_of_its_file(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LastMonth(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> LastMonth:
            return super().now(tz) - timedelta(days=30)

    monkeypatch.setattr(backup, "datetime", LastMonth)
    made = Path(backup.backup(store, tmp_path).path)
    (found,) = by_check(maintain(store, "daily", Tasks(backups=tmp_path)))["backup"]
    assert (found.level, found.message) == (
        Level.WARNING,
        f"{made.name} is whole, and 30.0 days old",
    )


@pytest.mark.usefixtures("tools")
def test_the_name_of_a_copied_backup_tells_how_old_it_is(store: BaseStore, tmp_path: Path) -> None:
    directory = tmp_path / "backups"
    directory.mkdir()
    public = encryption.new_identity(tmp_path / "key")
    made = Path(backup.backup(store, directory, recipients=[public]).path)
    weeks_ago = datetime.now(timezone.utc) - timedelta(days=21)
    old = re.sub(r"\d{8}T\d{6}Z", f"{weeks_ago:%Y%m%dT%H%M%SZ}", made.name)
    made.rename(directory / old)
    (found,) = by_check(maintain(store, "daily", Tasks(backups=directory)))["backup"]
    assert (found.level, found.message) == (
        Level.WARNING,
        f"{old} is encrypted, and 21.0 days old",
    )


@pytest.mark.usefixtures("tools")
def test_a_backup_of_the_future_is_not_taken_for_a_new_one(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NextYear(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> NextYear:
            return super().now(tz) + timedelta(days=365)

    monkeypatch.setattr(backup, "datetime", NextYear)
    made = Path(backup.backup(store, tmp_path).path)
    later = time.time() + 365 * 86_400
    os.utime(made, (later, later))
    (found,) = by_check(maintain(store, "daily", Tasks(backups=tmp_path)))["backup"]
    assert (found.level, found.message) == (Level.WARNING, f"{made.name} is dated in the future")


@pytest.mark.usefixtures("tools")
def test_a_backup_that_cannot_be_loaded_is_a_problem(
    store: BaseStore, database: Database, tmp_path: Path
) -> None:
    """Whole as a file, but its rows are no server's."""
    made = backup.backup(store, tmp_path / "made")
    with tarfile.open(made.path) as tar, (tmp_path / "wrong.backup").open("wb") as stream:
        writer = backup_file.Writer(stream)
        for member in tar.getmembers()[:-1]:
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.startswith("data."):
                data = b"".join(backup_file.compressed([b"INSERT INTO nowhere VALUES (1);\n"]))
            writer.add(member.name, data)
        writer.finish()
    tasks = Tasks(backups=tmp_path, administrator=database.server.admin_url)
    (found,) = by_check(maintain(store, "daily", tasks))["backup"]
    assert found.level is Level.OK
    (found,) = by_check(maintain(store, "quarterly", tasks))["restore"]
    assert (found.level, found.advice) == (Level.PROBLEM, "")
    assert re.search("mysql|pg_restore", found.message)


def test_what_no_account_could_do_is_a_problem_and_not_the_owners_to_do(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: Exception = psycopg.errors.DiskFull("No space left on device")
    if store.backend == "mysql":
        full = mysql.connector.DatabaseError("The table is full", errno=1114)

    def fail(_: str) -> None:
        raise full

    monkeypatch.setattr(store, "_refresh_statistics", fail)
    (found,) = by_check(maintain(store, "weekly"))["statistics"]
    assert (found.level, found.advice) == (Level.PROBLEM, "")


@pytest.mark.usefixtures("tools")
def test_an_encrypted_backup_is_looked_at_as_far_as_its_key_is_here(
    store: BaseStore, database: Database, tmp_path: Path
) -> None:
    public = encryption.new_identity(tmp_path / "key")
    directory = tmp_path / "backups"
    directory.mkdir()
    path = directory / "tonight.age"
    backup.backup(store, path, recipients=[public])
    administrator = database.server.admin_url

    def look(**given: Any) -> list[Finding]:
        tasks = Tasks(backups=directory, administrator=administrator, **given)
        daily, quarterly = maintain(store, "daily", tasks), maintain(store, "quarterly", tasks)
        return [*by_check(daily)["backup"], *by_check(quarterly)["restore"]]

    whole, restored = look(identity=tmp_path / "key")
    assert (whole.level, restored.level) == (Level.OK, Level.OK)
    found, not_restored = look()
    assert (found.level, not_restored.level) == (Level.OK, Level.WARNING)
    assert found.message.startswith("tonight.age is encrypted, and 0.0 days old: verify it")
    assert "--identity" in not_restored.advice
    os.utime(path, (1, 1))
    (found, _) = look()
    assert (found.level, found.advice) == (Level.WARNING, "see why there is no newer one")


@pytest.mark.usefixtures("tools")
def test_what_is_no_whole_backup_is_not_the_newest(store: BaseStore, tmp_path: Path) -> None:
    made = Path(backup.backup(store, tmp_path).path)
    for name in (f".{made.name}.1234.partial", "contextuate-1-0001.jsonl.gz.age", "other"):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (2**31, 2**31))
    (found,) = by_check(maintain(store, "daily", Tasks(backups=tmp_path)))["backup"]
    assert found.level is Level.OK
    assert found.message.startswith(made.name)


def figures(path: Path, moment: int, **values: float) -> None:
    units = {"rate": "1/s", "time": "ms", "bytes": "B", "ratio": "x"}
    content = [
        {"backend": "mysql", "name": name, "unit": units[name], "value": value}
        for name, value in values.items()
    ]
    path.write_text(json.dumps({"figures": content}))
    os.utime(path, (moment, moment))


def test_figures_of_two_benchmarks_are_compared(store: BaseStore, tmp_path: Path) -> None:
    def benchmark() -> Finding:
        (found,) = by_check(maintain(store, "quarterly", Tasks(benchmarks=tmp_path)))["benchmark"]
        return found

    assert "has 0 of the two files" in benchmark().message
    figures(tmp_path / "b.json", 1000, rate=100, time=10, bytes=50, ratio=1)
    figures(tmp_path / "a.json", 2000, rate=90, time=12, bytes=50, ratio=5)
    assert benchmark().level is Level.OK
    figures(tmp_path / "c.json", 3000, rate=50, time=5, bytes=70, ratio=1)
    found = benchmark()
    assert found.level is Level.WARNING
    assert "a.json and c.json: worse are mysql: bytes (B) 50 -> 70, mysql: rate (1/s) 90 -> 50" in (
        found.message
    )
    (tmp_path / "d.json").write_text((tmp_path / "c.json").read_text().replace("mysql", "other"))
    os.utime(tmp_path / "d.json", (4000, 4000))
    assert benchmark().level is Level.WARNING
    assert benchmark().message == "c.json and d.json have no figure in common"
    (tmp_path / "d.json").unlink()
    (tmp_path / "c.json").write_text("[]")
    os.utime(tmp_path / "c.json", (3000, 3000))
    assert benchmark().level is Level.PROBLEM
    assert "not written by `bench --output`" in benchmark().message


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def run(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv(ENVIRONMENT_URL, database.url)
    monkeypatch.delenv(ENVIRONMENT_ADMINISTRATOR, raising=False)

    def run_command(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([*map(str, arguments)])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


@pytest.mark.parametrize("period", PERIODS)
def test_the_command_tells_what_it_found_and_did(
    run: Callable[..., tuple[int, str, str]], store: BaseStore, tmp_path: Path, period: str
) -> None:
    store.save_session(session("old\u202e", **OLD))
    status, out, err = run("maintain", period, "--archive-to", tmp_path / "a\x1b")
    assert status in (0, 1, 3)
    assert err == ""
    assert "\x1b" not in out
    words = {line.split()[0] for line in out.splitlines()}
    assert words <= {"ok", "warning", "problem"}
    assert status == (1 if "problem" in words else 3 if "warning" in words else 0)
    status, out, _ = run("maintain", period, "--json")
    findings = [json.loads(line) for line in out.splitlines()]
    assert all(one.keys() == {"check", "level", "message", "advice"} for one in findings)


def test_the_command_wants_a_period(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("maintain")[0] == 2
    assert run("maintain", "hourly")[0] == 2


# --- Examples -------------------------------------------------------------------------------------


def unit(name: str) -> dict[str, list[str]]:
    """The settings of a unit file, by section and name."""
    settings: dict[str, list[str]] = {}
    section = ""
    for line in (EXAMPLES / name).read_text().splitlines():
        if line.startswith("["):
            section = line
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert section
            assert equals
            settings.setdefault(f"{section}{key}", []).append(value)
    return settings


def accepts(command: str) -> None:
    """The options of a command line are those that the program has."""
    words = [
        word.replace("%i", "daily").replace("%h", "/home/dev") for word in shlex.split(command)
    ]
    args = make_parser().parse_args(words[words.index("contextuate-persist") + 1 :])
    assert args.command == "maintain"


def test_the_units_say_what_the_command_understands() -> None:
    service, timer = unit("contextuate-maintain@.service"), unit("contextuate-maintain@.timer")
    (command,) = service["[Service]ExecStart"]
    accepts(command)
    assert timer["[Timer]OnCalendar"] == ["%i"]
    assert timer["[Timer]Persistent"] == ["true"]
    assert timer["[Install]WantedBy"] == ["timers.target"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for period in PERIODS:
        command = ["systemd-analyze", "calendar", period]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
    names = []
    for kind in ("service", "timer"):
        text = (EXAMPLES / f"contextuate-maintain@.{kind}").read_text()
        (tmp_path / f"contextuate-maintain@.{kind}").write_text(text)
        names.append(str(tmp_path / f"contextuate-maintain@weekly.{kind}"))
        Path(names[-1]).write_text(text)
    for name in [*names, str(EXAMPLES / "contextuate-monitor.service")]:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", name],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        complaints = [line for line in done.stderr.splitlines() if "contextuate-m" in line]
        assert complaints == [], done.stderr


def test_the_lines_for_cron_say_what_the_command_understands() -> None:
    lines = (EXAMPLES / "contextuate-maintain.cron").read_text().splitlines()
    periods = []
    for line in lines:
        if line.startswith("#"):
            continue
        *moment, command = line.split(None, 5)
        assert all(re.fullmatch(r"\*|\d+(,\d+)*", word) for word in moment)
        accepts(command)
        periods.append(re.search(r"maintain (\w+)", command)[1])  # type: ignore[index]
    assert periods == [*PERIODS]


@pytest.mark.parametrize("given", ["CONTEXTUATE_DATABASE_URL='{url}'\n", None])
def test_a_line_for_cron_has_the_url_whatever_a_shell_would_make_of_it(
    given: str | None, tmp_path: Path
) -> None:
    url = "postgresql://u:p$a ss@h/db?sslmode=verify-full&sslrootcert=/x"
    monitor = tmp_path / ".contextuate" / "monitor"
    monitor.mkdir(parents=True)
    if given is not None:
        (monitor / "maintain-environment").write_text(given.format(url=url))
    program = tmp_path / "contextuate-persist"
    program.write_text('#!/bin/sh\necho "$1 ${CONTEXTUATE_DATABASE_URL-none}"\n')
    program.chmod(0o700)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.defpath}"}
    lines = (EXAMPLES / "contextuate-maintain.cron").read_text().splitlines()
    for line in lines:
        if not line.startswith("#"):
            command = ["/bin/sh", "-c", line.split(None, 5)[5]]
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
            assert done.stdout.decode() == f"maintain {url if given else 'none'}\n"
