"""`setup`: from an empty server to accounts that work, with no secret to be seen on the way."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mysql.connector
import psycopg
import pytest

from contextuate_persist import (
    StoreRefused,
    accounts,
    open_store,
    partitions,
    postgresql_store,
    setup,
)
from contextuate_persist.accounts import Account, Names
from contextuate_persist.administrator import Server
from contextuate_persist.cli import main
from contextuate_persist.doctor import Level
from contextuate_persist.errors import ConfigurationError
from tests import servers
from tests.authority import ELSEWHERE, Authority
from tests.builders import event

ROOT = Path(__file__).parents[1]


@dataclass
class Setup:
    """The command, for one environment of a server that demands verified TLS of us."""

    server: servers.Server
    authority: Path
    passwords: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    environment: str = field(default_factory=lambda: secrets.token_hex(4))
    seen: list[str] = field(default_factory=list)  # every output of every run

    @property
    def backend(self) -> str:
        return self.server.kind

    @property
    def variables(self) -> dict[str, str]:
        prefix = "PG" if self.backend == "postgresql" else "MYSQL"
        return {
            f"{prefix}_HOST": ELSEWHERE,
            f"{prefix}_PORT": str(self.server.port),
            f"{prefix}_USER": self.server.admin_user,
            "PGPASSWORD" if prefix == "PG" else "MYSQL_PWD": self.server.admin_password,
        }

    @property
    def arguments(self) -> list[str]:
        return ["setup", self.backend, "--tls-ca", str(self.authority)]

    @property
    def database(self) -> str:
        return f"contextuate_monitor_{self.environment}"

    def __call__(self, *options: str, typed: str = "") -> tuple[int, str, str]:
        """Run it in this process; its exit status, output and error output."""
        with self.monkeypatch.context() as patch:
            for name, value in self.variables.items():
                patch.setenv(name, value)
            patch.setattr("sys.stdin", io.StringIO(typed))
            own = [] if "--environment" in options else ["--environment", self.environment]
            safe = [] if "--passwords" in options else ["--passwords", str(self.passwords)]
            try:
                status = main([*self.arguments, *own, *safe, *options])
            except SystemExit as error:
                status = int(error.code or 0)
        captured = self.capsys.readouterr()
        self.seen += [captured.out, captured.err]
        return status, captured.out, captured.err

    def accounts(self) -> list[dict[str, str]]:
        """What the file of passwords holds, the newest last."""
        return [json.loads(line) for line in self.passwords.read_text().splitlines()]

    def url(self, purpose: str = "application", index: int = -1) -> str:
        return [one["url"] for one in self.accounts() if one["purpose"] == purpose][index]

    def execute(self, statement: str) -> list[Any]:
        return self.server.execute(statement, self.database)


@pytest.fixture
def run(
    tls_server: servers.Server,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Setup]:
    monkeypatch.setenv("HOME", str(tmp_path))
    made = Setup(tls_server, authority.file, tmp_path / "passwords", monkeypatch, capsys)
    yield made
    tls_server.drop_database(made.database)


def refused(url: str, statement: str) -> bool:
    """Whether the server refuses the statement for want of a privilege."""
    try:
        store = open_store(url)
        connection = store._connect()  # type: ignore[attr-defined]
        try:
            cursor = connection.cursor()
            cursor.execute(statement)
        finally:
            connection.close()
    except psycopg.errors.InsufficientPrivilege:
        return True
    except mysql.connector.Error as error:
        return error.errno in (1044, 1045, 1142, 1227, 1370, 1410)
    return False


# --- The way to a working account -----------------------------------------------------------------


def test_one_command_goes_from_an_empty_server_to_a_working_account(run: Setup) -> None:
    status, out, err = run()
    assert (status, err) == (0, "")
    for words in ("owner", "created", "monitor_user", "verified", "reads, and cannot write"):
        assert words in out
    assert "check" not in out  # nothing that it would have to say
    assert f"monitor_user_{run.environment}:***@{ELSEWHERE}" in out
    store = open_store(run.url())
    assert [str(one) for one in store.check() if one.level is not Level.OK] == []
    [tls] = [one for one in store.check() if one.check == "tls"]
    assert "certificate verified" in tls.message
    with store:
        assert store.save_event(event()) is True
    with open_store(run.url("read-only")) as reader:
        assert len(reader.get_events("s")) == 1
        with pytest.raises(StoreRefused):
            reader.save_event(event())
        with pytest.raises(StoreRefused):
            reader.delete_all_sessions()


def test_what_is_not_well_with_the_server_is_said(run: Setup) -> None:
    if run.backend == "postgresql":
        change, undo = "SET synchronous_commit = off", "RESET synchronous_commit"
        change, undo = f"ALTER SYSTEM {change}", f"ALTER SYSTEM {undo}"
    else:
        change = "SET GLOBAL innodb_flush_log_at_trx_commit = 2"
        undo = change.replace("2", "1")
    reload = "SELECT pg_reload_conf()" if run.backend == "postgresql" else "SELECT 1"
    run.server.execute(change)
    run.server.execute(reload)
    time.sleep(0.3)
    try:
        status, out, _ = run()
        assert (status, "problem: " in out) == (0, True)
        assert "commit is " in out
    finally:
        run.server.execute(undo)
        run.server.execute(reload)


def test_the_printed_block_is_one_that_works(run: Setup, tmp_path: Path) -> None:
    assert run("--json")[0] == 0
    told = [json.loads(line) for line in run.seen[-2].splitlines()]
    assert [one["step"] for one in told[:3]] == ["owner", "database", "schema"]
    block = told[-1]["persistence"]
    secret = tmp_path / "password"
    secret.write_text(run.accounts()[0]["password"])
    assert block["database"]["passwordFile"] == "~/.contextuate/monitor/password"
    block["database"]["passwordFile"] = str(secret)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"persistence": block}))
    with open_store(config=config) as store:
        assert store.save_event(event()) is True


STATEMENTS = {
    "CREATE": ("CREATE TABLE more (x INTEGER)", "CREATE TABLE more (x INTEGER)"),
    "CREATE TEMPORARY": ("CREATE TEMP TABLE t (x INTEGER)", "CREATE TEMPORARY TABLE t (x INTEGER)"),
    "CREATE INDEX": ("CREATE INDEX more ON events (seq)", "CREATE INDEX more ON events (seq)"),
    "CREATE SCHEMA": ("CREATE SCHEMA more", "CREATE DATABASE more"),
    "ALTER": ("ALTER TABLE sessions ADD x INTEGER", "ALTER TABLE sessions ADD x INTEGER"),
    "DROP": ("DROP TABLE token_ledger", "DROP TABLE token_ledger"),
    "DROP VIEW": ("DROP VIEW active_sessions", "DROP VIEW active_sessions"),
    "TRUNCATE": ("TRUNCATE token_ledger", "TRUNCATE token_ledger"),
    "GRANT": ("GRANT contextuate_owner TO CURRENT_USER", "GRANT SELECT ON *.* TO CURRENT_USER()"),
    "GRANT table": (
        "GRANT SELECT ON events TO PUBLIC",
        "GRANT SELECT ON events TO CURRENT_USER()",
    ),
    "CREATE ROLE": ("CREATE ROLE more", "CREATE USER more"),
}


def test_the_accounts_are_refused_whatever_is_not_data(run: Setup) -> None:
    assert run()[0] == 0
    owner = f'"contextuate_owner_{run.environment}"'
    for purpose in ("application", "read-only"):
        for name, (postgresql, mysql_form) in STATEMENTS.items():
            statement = postgresql if run.backend == "postgresql" else mysql_form
            statement = statement.replace("contextuate_owner", owner)
            if name == "GRANT table" and run.backend == "postgresql":
                continue  # said with a warning, and nothing is granted: below
            assert refused(run.url(purpose), statement), (purpose, name)
    for change in ("UPDATE sessions SET hidden = TRUE", "DELETE FROM events"):
        assert refused(run.url("read-only"), change)
        assert not refused(run.url(), change)
    if run.backend == "postgresql":
        with contextlib.suppress(psycopg.Error):
            refused(run.url(), "GRANT SELECT ON events TO PUBLIC")
        held = run.execute("SELECT relacl::text FROM pg_class WHERE relname = 'events'")[0][0]
        assert "=r/" not in held.replace(f"monitor_reader_{run.environment}=r/", "")


def test_setting_up_again_changes_nothing_and_says_so(run: Setup) -> None:
    assert run()[0] == 0
    with open_store(run.url()) as store:
        store.save_event(event())
    before = run.passwords.read_text()
    status, out, err = run()
    assert (status, err) == (0, "")
    assert "nothing was changed" in out
    assert not any(line.startswith("+") for line in out.splitlines())
    assert run.passwords.read_text() == before
    with open_store(run.url()) as store:
        assert len(store.get_events("s")) == 1
    status, out, _ = run("--json")
    assert not any(json.loads(line).get("changed") for line in out.splitlines())


def test_what_is_missing_is_made_again(run: Setup) -> None:
    assert run()[0] == 0
    reader = f"monitor_reader_{run.environment}"
    if run.backend == "postgresql":
        run.execute(f'REVOKE SELECT ON events FROM "{reader}"')
    else:
        run.execute(
            f"REVOKE SELECT ON `contextuate\\_monitor\\_{run.environment}`.* FROM `{reader}`"
        )
    with pytest.raises(StoreRefused), open_store(run.url("read-only")) as store:
        store.get_events("s")
    status, out, _ = run()
    assert (status, "+ privileges" in out) == (0, True)
    with open_store(run.url("read-only")) as store:
        assert store.get_events("s") == []


def owner_url(run: Setup) -> str:
    """The administrator's, who acts as the owner where tables have one."""
    url = run.server.url(run.database)
    role = quote(f"-crole={Names().of(run.environment).owner}", safe="")
    return f"{url}?options={role}" if run.backend == "postgresql" else url


def rights(run: Setup) -> list[Any]:
    """Who may do what to which table."""
    if run.backend == "postgresql":
        return run.execute("SELECT relname, relacl::text FROM pg_class ORDER BY relname, oid")
    return run.execute(
        "SELECT grantee, privilege_type FROM information_schema.schema_privileges "
        "WHERE grantee LIKE '%monitor%' ORDER BY grantee, privilege_type"
    )


def check_accounts(run: Setup, *owned: tuple[str, int]) -> None:
    """Each of these accounts does what it is for in a partitioned database."""
    for purpose, index in owned:
        with open_store(run.url(purpose, index)) as store:
            assert store.health().schema_layout == "partitioned"
            one = event(secrets.token_hex(4))
            if purpose == "application":
                assert store.save_event(one) is True
                assert store.save_events([one, event(one.session_id)]) == 1
                assert store.get_event_by_id(one.session_id, one.id) == one
                store.delete_session(one.session_id)
            else:
                assert store.get_event_by_id(one.session_id, one.id) is None
                with pytest.raises(StoreRefused):
                    store.save_event(one)
            found = {finding.check: finding for finding in store.check()}
            assert (found["drift"].level, found["drift"].advice) == (Level.OK, "")
            wanted = Level.OK if purpose == "application" else Level.WARNING  # to read only
            assert found["privileges"].level is wanted, str(found["privileges"])


def test_setting_up_a_partitioned_database_changes_only_what_is_asked_for(run: Setup) -> None:
    assert run()[0] == 0
    kept = event("kept")
    with open_store(run.url()) as store:
        store.save_event(kept)
    owner = open_store(owner_url(run))
    owner.partition_events("month")
    layout, allowed = owner.partitions(), rights(run)
    check_accounts(run, ("application", -1), ("read-only", -1))
    status, out, err = run()
    assert (status, err) == (0, "")
    assert "nothing was changed" in out
    status, out, err = run("--rotate")
    assert (status, err) == (0, "")
    changed = [line.split()[1] for line in out.splitlines() if line.startswith("+")]
    assert changed == ["account", "account"]
    assert rights(run) == allowed
    every = [(purpose, index) for purpose in ("application", "read-only") for index in (0, 1)]
    check_accounts(run, *every)
    others = ("--user", f"u_{run.environment}", "--reader", f"r_{run.environment}")
    status, out, err = run(*others)
    assert (status, err) == (0, "")
    changed = [line.split()[1] for line in out.splitlines() if line.startswith("+")]
    assert changed == ["account", "account", "privileges"]
    check_accounts(run, *every, ("application", 2), ("read-only", 2))
    with open_store(run.url()) as store:
        assert store.get_events("kept") == [kept]
        assert store.forget(session_id="kept").events == 1  # and in the old table
    assert [one.name for one in owner.partitions()] == [one.name for one in layout]
    forget_accounts(run)


def test_accounts_that_are_made_half_way_have_all_rights_once_events_is_partitioned(
    run: Setup,
) -> None:
    assert run()[0] == 0
    owner = open_store(owner_url(run))
    with owner._partition_session(60) as session:  # as far as one comes that is killed then
        session.prepare(partitions._first_spans(session, "month", None))
    others = ("--user", f"u_{run.environment}", "--reader", f"r_{run.environment}")
    assert run(*others)[0] == 0
    owner.partition_events("month")
    check_accounts(run, *((one, index) for one in ("application", "read-only") for index in (0, 1)))
    forget_accounts(run)


def forget_accounts(run: Setup) -> None:
    for name in (f"u_{run.environment}", f"r_{run.environment}"):
        if run.backend == "postgresql":
            run.execute(f'DROP OWNED BY "{name}"')
        run.server.drop_login(name)


def test_environments_are_kept_apart(run: Setup) -> None:
    assert run()[0] == 0
    other = secrets.token_hex(4)
    assert run("--environment", other)[0] == 0
    mine, theirs = run.url(index=0), run.url(index=1)
    crossed = mine.replace(
        f"/contextuate_monitor_{run.environment}", f"/contextuate_monitor_{other}"
    )
    assert crossed != mine
    with pytest.raises(StoreRefused):
        open_store(crossed).init()
    with open_store(theirs) as store:
        assert store.get_sessions() == []
    run.server.drop_database(f"contextuate_monitor_{other}")


HOSTILE = {
    "--database": 'o\'d; DROP "x" --`%s%(x)s {y}',
    "--owner": "o\"w'n; -- \\x",
    "--user": "u'\"; --%s {z}",
    "--reader": "r`'; %(x)s",
}


def test_hostile_names_are_only_names(run: Setup) -> None:
    # Together with what makes them this test's own.
    names = {option: f"{name}{run.environment}" for option, name in HOSTILE.items()}
    options = [word for pair in names.items() for word in pair]
    for _ in range(2):
        assert run(*options)[0] == 0
    assert "nothing was changed" in run.seen[-2]
    assert run(*options, "--rotate")[0] == 0
    with open_store(run.url()) as store:
        assert store.save_event(event()) is True
        assert [one for one in store.check() if one.check == "privileges"][0].level is Level.OK  # noqa: RUF015
    status, _, err = run(*options, "--reset", typed=names["--database"] + "\n")
    assert (status, err.count("\n")) == (0, 1)
    name = names["--database"]
    quoted = '"' + name.replace('"', '""') + '"'
    if run.backend == "mysql":
        quoted = "`" + name.replace("`", "``") + "`"
    run.server.execute(f"DROP DATABASE {quoted}")


@pytest.mark.parametrize(
    "options",
    [
        ["--database", ""],
        ["--database", " x"],
        ["--database", "x" * 65],
        ["--user", "a\nb"],
        ["--user", "x" * 70],
        ["--user", "same", "--reader", "same"],
        ["--environment", "a b"],
        ["--environment", "x" * 60],
        ["--tls-ca", "/nowhere/ca"],
    ],
)
def test_names_and_files_that_cannot_be_are_refused_in_one_line(
    run: Setup, options: list[str]
) -> None:
    status, _, err = run(*options)
    assert status == 1
    assert err.startswith("contextuate-persist: error: ")
    assert err.count("\n") == 1
    assert not run.passwords.exists()


@pytest.mark.only("mysql")
def test_a_backslash_cannot_stand_in_mysqls_grants(run: Setup, backend: str) -> None:
    assert "no backslash" in run("--database", "a\\b")[2]


def test_an_administrators_statements_may_take_their_time(server: servers.Server) -> None:
    store: Any = open_store(server.url("mysql"), statement_timeout=0.2)
    sleep = "SELECT SLEEP(1.5)"
    if server.kind == "postgresql":
        store, sleep = (
            open_store(server.url("postgres"), statement_timeout=0.2),
            "SELECT pg_sleep(1)",
        )
    else:
        store._arguments["read_timeout"] = 1
    with store.administer(Names()) as administrator:
        cursor = administrator._connection.cursor()
        cursor.execute(sleep)
        assert cursor.fetchall()[0][0] in (0, "")  # MySQL's is 1 if it was ended


@pytest.mark.only("mysql")
def test_an_account_of_one_host_that_would_shadow_a_new_one_is_refused(
    run: Setup, backend: str
) -> None:
    name = f"monitor_reader_{run.environment}"
    run.server.execute(f"CREATE USER '{name}'@'localhost' IDENTIFIED BY 'theirs'")
    try:
        status, _, err = run()
        assert (status, err.count("\n")) == (1, 1)
        assert f"DROP USER '{name}'@'localhost'" in err
        assert "--reader" in err
        assert not run.passwords.exists()
        users = "SELECT user FROM mysql.user WHERE user LIKE '%{}'"
        assert run.server.execute(users.format(run.environment)) == [(name,)]
    finally:
        run.server.execute(f"DROP USER '{name}'@'localhost'")
    assert run()[0] == 0


@pytest.mark.only("mysql")
def test_where_grants_take_no_wildcards_names_are_not_escaped(run: Setup, backend: str) -> None:
    run.server.execute("SET GLOBAL partial_revokes = ON")
    try:
        assert run()[0] == 0
        with open_store(run.url()) as store:
            assert store.save_event(event()) is True
    finally:
        run.server.execute("SET GLOBAL partial_revokes = OFF")


@pytest.mark.only("postgresql")
def test_an_administrator_need_not_be_superuser(run: Setup, backend: str) -> None:
    admin = f"admin_{run.environment}"
    run.server.execute(f"CREATE ROLE {admin} LOGIN CREATEDB CREATEROLE PASSWORD 'pw'")
    place = f"postgresql://{admin}:pw@{ELSEWHERE}:{run.server.port}/postgres"
    for expected in ("created", "nothing was changed"):
        status, out, err = run("--url", place)
        assert (status, expected in out) == (0, True), err
    assert open_store(run.url()).check()[0].level is Level.OK


@pytest.mark.only("postgresql")
def test_before_15_the_schema_public_is_closed(
    run: Setup, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the schema is there that an older server makes.
    assert run()[0] == 0
    run.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    assert not refused(run.url(), "CREATE TABLE more (x INTEGER)")
    monkeypatch.setattr(postgresql_store, "CLOSED_SINCE", 10**9)
    assert "+ privileges" in run()[1], run.seen[-1]
    assert refused(run.url(), "CREATE TABLE more2 (x INTEGER)")


# --- Rotation and reset ---------------------------------------------------------------------------


def test_passwords_rotate_without_an_outage(run: Setup) -> None:
    assert run()[0] == 0
    for turn in range(1, 4):  # whoever was discarded has a turn again
        with open_store(run.url(), pool_size=2) as running:
            status, out, err = run("--rotate")
            assert (status, err) == (0, "")
            assert "stays valid" in out
            # Connections that are open, new ones with the old password, and with the new.
            running.save_event(event("a"))
            for index in (-2, -1):
                with open_store(run.url(index=index)) as store:
                    assert len(store.get_events("a")) == turn
                    assert [one.level for one in store.check() if one.check == "privileges"] == [
                        Level.OK
                    ]
        status, out, _ = run()
        assert "nothing was changed" in out, out
        assert run.url().partition("//")[2].partition(":")[0] in run.seen[-2]  # who logs in now
        status, out, _ = run("--discard-old")
        assert (status, out.count("only its newest password")) == (0, 2)
        with pytest.raises(StoreRefused):
            open_store(run.url(index=-2)).init()
        open_store(run.url()).init()
        assert "none" in run("--discard-old")[1]


def test_rotating_again_ends_no_password_that_may_be_in_use(
    run: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run()[0] == 0
    keep = setup.Keeper.keep

    def end_half_way(self: setup.Keeper, account: Account) -> None:
        if account.purpose == "read-only":
            raise ConfigurationError("the disk is full")
        keep(self, account)

    with monkeypatch.context() as patch:
        patch.setattr(setup.Keeper, "keep", end_half_way)
        assert "disk is full" in run("--rotate")[2]
    held = run.passwords.read_text()
    for _ in range(2):
        status, out, err = run("--rotate")
        assert (status, err.count("\n"), "+" in out) == (1, 1, False)
        assert f"monitor_user_{run.environment} has two valid passwords" in err
        assert "--discard-old" in err
    assert run.passwords.read_text() == held
    for purpose, index in (("application", 0), ("application", 1), ("read-only", 0)):
        open_store(run.url(purpose, index)).init()
    # A new one that was lost, replaced as the guide says.
    lost = [one for one in run.accounts() if one["purpose"] == "application"][-1]
    change = "ALTER ROLE \"{}\" PASSWORD 'by-hand'"
    if run.backend == "mysql":
        change = "ALTER USER '{}'@'%' IDENTIFIED BY 'by-hand'"
    run.server.execute(change.format(lost["user"]))
    for url in (run.url(index=0), run.url().replace(lost["password"], "by-hand")):
        open_store(url).init()
    assert run("--discard-old")[1].count("only its newest password") == 1
    assert run("--rotate")[0] == 0
    for purpose in ("application", "read-only"):
        open_store(run.url(purpose)).init()


@pytest.mark.only("postgresql")
def test_a_rotation_that_ends_half_way_leaves_nothing_behind(
    run: Setup, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run()[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(postgresql_store, "JOIN_ACCOUNT", "GRANT nobody_at_all TO {login}")
        assert run("--rotate")[0] == 1
    assert "nothing was changed" in run()[1]
    assert f"//monitor_user_{run.environment}:" in run.seen[-2]
    with open_store(run.url(index=0)) as store:
        store.save_event(event())
    assert run("--rotate")[0] == 0
    assert run("--discard-old")[0] == 0
    with open_store(run.url()) as store:
        assert len(store.get_events("s")) == 1


@pytest.mark.only("postgresql")
def test_which_login_is_newest_is_told_by_the_servers_clock(
    run: Setup, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Late:
            return cls(2001, 1, 1, tzinfo=tz)

    assert run()[0] == 0
    with monkeypatch.context() as patch:  # another administrator's machine
        patch.setattr(postgresql_store, "datetime", Late, raising=False)
        assert run("--rotate")[0] == 0
    assert run("--discard-old")[0] == 0
    open_store(run.url()).init()
    comments = run.execute(
        "SELECT shobj_description(oid, 'pg_authid') FROM pg_roles "
        f"WHERE rolname LIKE 'monitor_user_{run.environment}%'"
    )
    for (comment,) in comments:
        told = datetime.fromisoformat(comment.removeprefix("password of "))
        assert abs(datetime.now(timezone.utc) - told) < timedelta(minutes=5)


@pytest.mark.only("postgresql")
def test_an_account_with_the_name_of_the_second_login_is_left_alone(
    run: Setup, backend: str
) -> None:
    other = f"monitor_user_{run.environment}_2"
    run.server.execute(f"CREATE ROLE \"{other}\" LOGIN PASSWORD 'theirs'")
    assert run()[0] == 0
    place = run.url().replace(run.accounts()[0]["password"], "theirs")
    theirs = place.replace(f"//monitor_user_{run.environment}:", f"//{other}:")
    held = run.passwords.read_text()
    status, _, err = run("--rotate")
    assert (status, f"{other} is there and no login of" in err, err.count("\n")) == (1, True, 1)
    assert run.passwords.read_text() == held
    assert run("--discard-old")[1].count("none") == 2
    for url in (run.url(), theirs.replace(run.database, "postgres")):
        open_store(url)._connect().close()  # type: ignore[attr-defined]
    run.server.drop_login(other)


@pytest.mark.only("postgresql")
def test_names_that_a_rotation_makes_are_nobodys(run: Setup, backend: str) -> None:
    for options in (["--environment", "2"], ["--environment", "eu_2"], ["--reader", "app_2"]):
        status, _, err = run(*options)
        assert (status, "end in _2" in err, err.count("\n")) == (1, True, 1), err
    assert not run.passwords.exists()


def test_a_reset_needs_the_name_to_be_typed(run: Setup) -> None:
    status, out, err = run("--reset")  # nothing is there to be dropped
    assert (status, err) == (0, "")
    with open_store(run.url()) as store:
        store.save_event(event())
    for typed in ("", "\n", "y\n", f"{run.database}x\n", f" {run.database}\n"):
        status, out, err = run("--reset", typed=typed)
        assert status == 1
        assert ", 1 events" in err
        assert "nothing was changed" in err
    with open_store(run.url()) as store:
        assert len(store.get_events("s")) == 1
    status, out, err = run("--reset", typed=f"{run.database}\n")
    assert (status, "dropped with all its data" in out) == (0, True)
    with open_store(run.url()) as store:
        assert store.get_events("s") == []


def test_a_reset_drops_also_what_is_no_schema_of_ours(run: Setup) -> None:
    run.server.create_database(run.database)
    run.execute("CREATE TABLE sessions (x INTEGER)")
    status, _, err = run()
    assert status == 1
    assert ("belongs to postgres" if run.backend == "postgresql" else "another origin") in err
    assert run("--reset", typed=f"{run.database}\n")[0] == 0
    with open_store(run.url()) as store:
        assert store.get_sessions() == []


def test_sample_data_is_loaded_when_asked_for(run: Setup) -> None:
    assert run("--no-sample")[0] == 0
    for loaded in (True, False):
        status, out, _ = run("--sample")
        assert (status, "+ sample" in out) == (0, loaded)
    with open_store(run.url()) as store:
        assert store.get_session("session-root-001") is not None


# --- Secrets --------------------------------------------------------------------------------------


def test_without_a_safe_place_for_passwords_nothing_is_done(run: Setup) -> None:
    with run.monkeypatch.context() as patch:
        patch.setattr(setup.Keeper, "__init__", _without_file(setup.Keeper.__init__))
        status, _, err = run()
    assert (status, "give --passwords FILE" in err) == (1, True)
    assert run.server.execute(
        "SELECT count(*) FROM "
        + ("pg_database WHERE datname" if run.backend == "postgresql" else
           "information_schema.schemata WHERE schema_name")
        + f" = '{run.database}'"
    ) == [(0,)]  # fmt: skip


def _without_file(init: Any) -> Any:
    return lambda self, file, **more: init(self, None, **more)


def test_a_file_of_passwords_that_others_read_is_refused(run: Setup, tmp_path: Path) -> None:
    open_file = tmp_path / "open"
    open_file.touch(0o644)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    for path in (open_file, link, tmp_path):
        status, _, err = run("--passwords", str(path))
        assert (status, err.count("\n")) == (1, 1)
    assert not (tmp_path / "elsewhere").exists()
    assert run()[0] == 0
    assert run.passwords.stat().st_mode & 0o777 == 0o600


def processes() -> str:
    """What everybody on this machine can see of what descends from this process.

    Not of all processes: tests beside this one give URLs of their own servers to commands, and the
    servers of one run share the administrator's password.
    """
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name before the state may hold anything, a bracket and a space among it.
            _, _, fields = path.read_text(errors="replace").rpartition(") ")
            parents[int(path.parent.name)] = int(fields.split()[1])
    ours = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= found
    lines = []
    for pid in ours:
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
    return "\n".join(lines)


def test_no_secret_is_seen_anywhere(run: Setup, caplog: pytest.LogCaptureFixture) -> None:
    if run.backend == "postgresql":
        run.server.execute("ALTER SYSTEM SET log_statement = 'all'")
        run.server.execute("SELECT pg_reload_conf()")
        log = run.server.log
    else:
        log = run.server.directory / "general.log"
        run.server.execute(f"SET GLOBAL general_log_file = '{log}'")
        run.server.execute("SET GLOBAL general_log = ON")
    time.sleep(0.3)
    watched: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            watched.append(processes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for options in (["-v"], ["-v", "--json", "--rotate"], ["-v", "--discard-old"]):
            command = [sys.executable, "-m", "contextuate_persist", *run.arguments]
            command += ["--environment", run.environment, "--passwords", str(run.passwords)]
            done = subprocess.run(
                [*command, *options],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
                env={**os.environ, **run.variables},
            )
            assert done.returncode == 0, done.stderr
            run.seen += [done.stdout, done.stderr]
        wrong = {name: "wr0ng-" + value for name, value in run.variables.items() if "P" in name}
        with run.monkeypatch.context() as patch:
            patch.setattr(Setup, "variables", {**run.variables, **{
                name: value for name, value in wrong.items() if name in ("PGPASSWORD", "MYSQL_PWD")
            }})  # fmt: skip
            status, _, err = run()
            assert (status, err.count("\n")) == (1, 1)
    finally:
        over.set()
        watcher.join()
        if run.backend == "postgresql":
            run.server.execute("ALTER SYSTEM RESET log_statement")
            run.server.execute("SELECT pg_reload_conf()")
        else:
            run.server.execute("SET GLOBAL general_log = OFF")
    passwords = [one["password"] for one in run.accounts()]
    assert len(passwords) == 4
    logged = log.read_text(errors="replace")
    assert "CREATE" in logged
    assert sum(run.environment in seen for seen in watched) > 10
    everything = "\n".join([*run.seen, *watched, caplog.text, logged])
    for secret in (*passwords, run.server.admin_password, "wr0ng"):
        assert secret not in everything
        assert quote(secret, safe="") not in everything


def test_generated_passwords_pass_policies_and_go_anywhere() -> None:
    made = {accounts.new_password() for _ in range(200)}
    assert len(made) == 200
    for password in made:
        assert len(password) == 32
        assert quote(password, safe="") == password
        assert any(sign.isdigit() for sign in password)
        assert any(sign.isupper() for sign in password)
        assert any(sign in "-_" for sign in password)
    assert "s3cret" not in repr(Server(backend="mysql", user="u", password="s3cret"))


# --- On a terminal --------------------------------------------------------------------------------


class Terminal:
    """The command on a terminal of its own, with somebody who types."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.output = ""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:  # pragma: no cover  (another process)
            os.execvpe(command[0], command, environment)

    def expect(self, words: str) -> None:
        until = time.monotonic() + 60
        while words not in self.output:
            assert time.monotonic() < until, self.output
            self._read()

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait(self) -> int:
        while self._read():
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 1)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other end is closed
            return False
        self.output += data.decode(errors="replace")
        return bool(data)


def test_a_terminal_is_asked_and_shown_passwords_once_in_colour(run: Setup) -> None:
    command = [sys.executable, "-m", "contextuate_persist", *run.arguments]
    variables = {
        name: value
        for name, value in run.variables.items()
        if name not in ("PGPASSWORD", "MYSQL_PWD")
    }
    environment = {**os.environ, **variables, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    terminal = Terminal([*command, "--environment", run.environment], environment)
    terminal.expect("Password of ")
    terminal.type(run.server.admin_password + "\n")
    terminal.expect("Load sample data")
    terminal.type("y\n")
    assert terminal.wait() == 0
    out = terminal.output
    assert run.server.admin_password not in out
    assert "\x1b[32m+\x1b[0m" in out
    assert "shown this once" in out
    shown = [line.split() for line in out.partition("shown this once")[2].splitlines()]
    [password] = [words[-1] for words in shown if "application" in words]
    assert out.count(password) == 1
    place = f"{run.backend}://monitor_user_{run.environment}:{password}@{ELSEWHERE}"
    place += f":{run.server.port}/{run.database}?sslrootcert={run.authority}"
    with open_store(place) as store:
        assert store.get_session("session-root-001") is not None
    for typed in ("wrong\n", "\x04"):
        again = Terminal([*command, "--environment", run.environment], environment)
        again.expect("Password of ")
        again.type(typed)
        assert again.wait() == 1
        assert "shown this once" not in again.output
        assert "Traceback" not in again.output
    assert "has a password, and none was given" in again.output


def test_no_password_stands_among_json_lines_on_a_terminal(run: Setup) -> None:
    command = [sys.executable, "-m", "contextuate_persist", *run.arguments, "--json"]
    terminal = Terminal(
        [*command, "--environment", run.environment], {**os.environ, **run.variables}
    )
    assert terminal.wait() == 1
    assert terminal.output.count("\n") == 1
    assert "--json shows none: give --passwords FILE" in terminal.output


def test_without_a_terminal_a_missing_password_is_said_with_its_places(run: Setup) -> None:
    without = {n: v for n, v in run.variables.items() if n not in ("PGPASSWORD", "MYSQL_PWD")}
    with run.monkeypatch.context() as patch:
        patch.setattr(Setup, "variables", without)
        status, _, err = run()
    assert status == 1
    assert ("~/.pgpass" if run.backend == "postgresql" else "~/.my.cnf") in err
    assert ("PG_HOST=/var/run/postgresql" if run.backend == "postgresql" else "MYSQL_HOST=/") in err


@pytest.mark.only("mysql")
def test_an_administrator_without_any_password_is_said_to_need_the_socket(
    run: Setup, backend: str
) -> None:
    name = f"socket_{run.environment}"
    run.server.execute("INSTALL PLUGIN auth_socket SONAME 'auth_socket.so'")
    try:
        run.server.execute(f"CREATE USER '{name}'@'%' IDENTIFIED WITH auth_socket")
        for password in ("", ":wrong"):
            place = f"mysql://{name}{password}@127.0.0.1:{run.server.port}/mysql"
            status, _, err = run("--url", place)
            assert (status, f"run this as {name} with MYSQL_HOST=/run" in err) == (1, True), err
        run.server.drop_login(name)
    finally:
        run.server.execute("UNINSTALL PLUGIN auth_socket")


# --- Where the server is --------------------------------------------------------------------------


def test_the_usual_files_and_variables_name_the_administrator(run: Setup, tmp_path: Path) -> None:
    server = run.server
    if run.backend == "postgresql":
        (tmp_path / ".pgpass").write_text(f"*:*:*:*:{server.admin_password}\n")
        (tmp_path / ".pgpass").chmod(0o600)
        variables = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": "postgres"}
        variables["PGPASSFILE"] = str(tmp_path / ".pgpass")
    else:
        option_file = tmp_path / ".my.cnf"
        option_file.write_text(
            f"[client]\nuser=root\npassword={server.admin_password}\nport={server.port}\n"
            f"host=127.0.0.1\nssl-ca={run.authority}\n"
        )
        option_file.chmod(0o600)
        variables = {}
    with run.monkeypatch.context() as patch:
        patch.setattr(Setup, "variables", variables)
        assert run()[0] == 0
    with open_store(run.url()) as store:
        assert store.save_event(event()) is True


def test_a_socket_is_used_where_it_is_named(run: Setup, tmp_path: Path) -> None:
    server = run.server
    assert server.socket_path is not None
    if run.backend == "postgresql":
        variables = {**run.variables, "PG_HOST": str(server.socket_path)}
    else:
        text = f"[client]\nsocket={server.socket_path}\npassword={server.admin_password}\n"
        (tmp_path / ".my.cnf").write_text(text)
        variables = {}
    with run.monkeypatch.context() as patch:
        patch.setattr(Setup, "variables", variables)
        status, out, _ = run()
    assert status == 0
    assert '"socket": "' in out
    with open_store(run.url()) as store:
        assert store.save_event(event()) is True


def test_a_url_names_the_administrator(run: Setup) -> None:
    place = run.server.url("postgres").replace("127.0.0.1", ELSEWHERE)
    status, _, err = run("--url", f"{place}?sslmode=require")
    assert status == 0
    assert "password on the command line" in err
    assert "CONTEXTUATE_DATABASE_URL" not in err  # which the command does not read
    assert ("~/.pgpass" if run.backend == "postgresql" else "~/.my.cnf") in err
    assert run.server.admin_password not in err
    assert "sslmode=require" in run.url()
    login, _, rest = place.partition("://")[2].rpartition("@")
    place = f"{run.backend}://{login.split(':')[0]}@{rest}?password={run.server.admin_password}"
    assert run("--url", place)[0] == 0
    assert run.server.admin_password not in "".join(run.seen)
    assert "colour is not for" in run("--url", f"{place}&colour=red")[2]


@pytest.mark.only("postgresql")
def test_a_url_names_the_administrators_database(run: Setup, backend: str) -> None:
    place = f"defaultdb_{run.environment}"
    status, _, err = run("--url", run.server.url(place))
    assert (status, f'"{place}" does not exist' in err) == (1, True)
    run.server.create_database(place)
    assert run("--url", run.server.url(place))[0] == 0
    run.server.drop_database(place)
    # The one to be set up is not it: it may not be there, and has to be dropped from elsewhere.
    options = ("--url", run.server.url(run.database))
    assert run(*options, "--reset", typed=run.database + "\n")[0] == 0
    run.server.drop_database(run.database)
    assert run(*options)[0] == 0


@pytest.mark.only("postgresql")
def test_a_url_may_name_a_socket_as_its_host(run: Setup, backend: str) -> None:
    assert run.server.socket_path is not None
    link = run.server.directory / "Here"  # a test's own directory is too deep for a socket
    link.symlink_to(run.server.socket_path)
    host = quote(str(link), safe="")
    place = run.server.url("postgres").replace("127.0.0.1", host)
    try:
        assert run("--url", place)[0] == 0
        with open_store(run.url()) as store:
            assert store.save_event(event()) is True
    finally:
        link.unlink()


@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_urls_password_comes_from_where_it_is_said_to(
    run: Setup, place: str, tmp_path: Path
) -> None:
    server = run.server
    variables = {}
    if place == "environment":
        name = "PGPASSWORD" if run.backend == "postgresql" else "MYSQL_PWD"
        variables[name] = server.admin_password
    else:
        name, text = ".pgpass", f"*:*:*:*:{server.admin_password}\n"
        if run.backend == "mysql":
            name, text = ".my.cnf", f"[client]\npassword={server.admin_password}\n"
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    url = f"{run.backend}://{server.admin_user}@{ELSEWHERE}:{server.port}/postgres"
    with run.monkeypatch.context() as patch:
        patch.setattr(Setup, "variables", variables)
        status, _, err = run("--url", url)
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"PG_PORT": "x", "MYSQL_PORT": "x"}, [], "is no port"),
        ({"PG_PORT": "99999999", "MYSQL_PORT": "0"}, [], "is no port"),
        ({}, ["--url", "oracle://h/x"], "is set up here"),
        ({}, ["--url", "mysql://h:port/x"], "host or port cannot be read"),
        ({"PG_PORT": "1", "MYSQL_PORT": "1"}, [], "127.0.0.1:1"),
    ],
)
def test_a_server_that_cannot_be_is_refused_in_one_line(
    run: Setup, variables: dict[str, str], options: list[str], message: str
) -> None:
    place = {"PG_HOST": "127.0.0.1", "MYSQL_HOST": "127.0.0.1"}
    with run.monkeypatch.context() as patch:
        patch.setattr(Setup, "variables", {**run.variables, **place, **variables})
        status, _, err = run(*options)
    assert (status, message in err, err.count("\n")) == (1, True, 1), err


@pytest.mark.parametrize(
    "login",
    [
        "root:s3cret/part",
        "root:s3cret#part",
        "root:s3cret?part",
        "root:s3cret\N{FULLWIDTH SOLIDUS}part",
        "root:s3cr[et]part",
    ],
)
def test_no_part_of_a_password_is_told_of_a_url_that_cannot_be_read(
    backend: str, login: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{backend}://{login}@nowhere.invalid/x"
    assert main(["setup", backend, "--url", place, "--passwords", str(tmp_path / "p")]) == 1
    err = capsys.readouterr().err.splitlines()[-1]  # after the warning of a password
    assert err.startswith("contextuate-persist: error: ")
    assert not [part for part in ("s3cr", "'et'", "part") if part in err], err


def test_urls_hold_every_kind_of_host() -> None:
    server = Server(backend="mysql", user="u", host="::1", port=3307)
    assert server.url("d b", "u@", "p") == "mysql://u%40:p@[::1]:3307/d%20b"


def test_an_account_that_should_only_read_and_can_write_is_an_error(run: Setup) -> None:
    assert run()[0] == 0
    account = Account("read-only", "x", "y")
    with pytest.raises(StoreRefused, match="should only read"):
        accounts.verify(account, open_store(run.url()))
    with pytest.raises(StoreRefused):
        accounts.verify(Account("application", "x", "y"), open_store(run.url("read-only")))
    with pytest.raises(ConfigurationError):
        Names(application="x", reader="x").check(longest_database=9, longest_account=9)


# --- Both, and Docker -----------------------------------------------------------------------------


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Setup) -> Path:
    """A `docker` that writes down what it is asked; its container is the server of the tests."""
    place = tmp_path / "bin"
    place.mkdir()
    (tmp_path / "admin").write_text(run.server.admin_password)
    (tmp_path / "state").touch()
    (tmp_path / "volume").touch()
    program = place / "docker"
    program.write_text(
        f"""#!/bin/sh
echo "$@" >>{tmp_path}/calls
case "$1" in
    version) cat {tmp_path}/broken 2>/dev/null && exit 1; echo 27.0 ;;
    ps) cat {tmp_path}/state ;;
    run) [ "$2" != --rm ] || {{ cat {tmp_path}/volume; exit; }}
        [ -n "$MYSQL_ROOT_PASSWORD$POSTGRES_PASSWORD" ] || exit 7
        echo "$MYSQL_ROOT_PASSWORD$POSTGRES_PASSWORD" >{tmp_path}/given
        echo created >{tmp_path}/state
        [ ! -e {tmp_path}/taken ] || {{ echo 'port is already allocated' >&2; exit 125; }}
        echo running >{tmp_path}/state ;;
    rm) : >{tmp_path}/state ;;
    inspect) echo {run.server.port} ;;
    start) echo running >{tmp_path}/state ;;
    exec) [ "$3" = printenv ] || {{ cp {tmp_path}/admin {tmp_path}/volume; exit; }}
        cat {tmp_path}/admin ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    variable = "PG_PORT" if run.backend == "postgresql" else "MYSQL_PORT"
    monkeypatch.setattr(Setup, "variables", {variable: str(run.server.port)})
    monkeypatch.setattr(Setup, "arguments", ["setup", f"docker-{run.backend}"])
    return tmp_path


CONTAINERS = {"postgresql": "contextuate-postgres", "mysql": "contextuate-mysql"}


def test_docker_starts_a_pinned_server_and_says_what_comes_next(run: Setup, docker: Path) -> None:
    status, out, err = run()
    assert (status, err) == (0, "")
    name = CONTAINERS[run.backend]
    for words in (f"docker stop {name}", f"docker rm --force {name}", "docker exec --interactive"):
        assert words in out
    calls = (docker / "calls").read_text().splitlines()
    [started] = [call for call in calls if call.startswith("run --detach")]
    assert f"--name {name}" in started
    assert f"127.0.0.1:{run.server.port}:" in started
    assert ":latest" not in started
    assert started.split()[-1].count(":") == 1
    assert "PASSWORD=" not in started
    with open_store(run.url()) as store:
        assert store.save_event(event()) is True
    for state, verb in (("running", None), ("exited", "start")):
        (docker / "state").write_text(state)
        (docker / "calls").unlink()
        assert "nothing was changed" in run()[1]
        verbs = [call.split()[0] for call in (docker / "calls").read_text().splitlines()]
        assert verbs == ["version", "ps", "inspect", *([verb] if verb else []), "exec", "exec"]
    assert run("--json")[0] == 0
    [json.loads(line) for line in run.seen[-2].splitlines()]


def test_a_container_whose_port_is_taken_does_not_stay(run: Setup, docker: Path) -> None:
    variable = "PG_PORT" if run.backend == "postgresql" else "MYSQL_PORT"
    (docker / "taken").touch()
    status, _, err = run()
    assert (status, err.count("\n")) == (1, 1)
    assert f"already allocated; name another port with {variable}" in err
    assert (docker / "state").read_text() == ""
    (docker / "taken").unlink()
    (docker / "state").write_text("created")  # as one stays that is killed there
    (docker / "calls").unlink()
    assert run()[0] == 0
    verbs = [call.split()[0] for call in (docker / "calls").read_text().splitlines()]
    assert verbs == ["version", "ps", "rm", "run", "run", "exec", "exec"]


def test_a_volume_that_outlives_its_container_keeps_the_password(run: Setup, docker: Path) -> None:
    assert run()[0] == 0
    assert (docker / "given").read_text().strip() not in ("", run.server.admin_password)
    (docker / "state").write_text("")
    assert "nothing was changed" in run()[1]
    assert (docker / "given").read_text().strip() == run.server.admin_password
    (docker / "admin").write_text("another")  # of a volume that has none in it
    status, _, err = run()
    assert (status, err.count("\n")) == (1, 1)
    assert f"docker volume rm {CONTAINERS[run.backend]}" in err


def test_a_container_keeps_its_port(run: Setup, docker: Path) -> None:
    assert run()[0] == 0
    with run.monkeypatch.context() as patch:
        patch.setattr(Setup, "variables", {})
        assert run()[0] == 0
    with run.monkeypatch.context() as patch:
        patch.setattr(Setup, "variables", dict.fromkeys(("PG_PORT", "MYSQL_PORT"), "1"))
        status, _, err = run()
    assert (status, f"has port {run.server.port}; " in err, err.count("\n")) == (1, True, 1)


def test_without_docker_the_way_out_is_said(run: Setup, docker: Path) -> None:
    (docker / "broken").write_text("no daemon\n")
    status, _, err = run()
    assert (status, err.count("\n")) == (1, 1)
    assert "docker does not run" in err
    with run.monkeypatch.context() as patch:
        patch.setenv("PATH", str(docker / "nowhere"))
        status, _, err = run()
    assert (status, "docker is not installed" in err) == (1, True)
    assert "setup mysql" in err


def test_a_docker_that_fails_or_hangs_is_said(run: Setup, docker: Path) -> None:
    (docker / "bin/docker").write_text("#!/bin/sh\n[ $1 = version ] || { echo no >&2; exit 3; }\n")
    assert "docker ps: no" in run()[2]
    (docker / "bin/docker").write_text("#!/bin/sh\n[ $1 = version ] || exec sleep 9\n")
    with run.monkeypatch.context() as patch:
        patch.setattr("contextuate_persist.containers._COMMAND_SECONDS", 1)
        patch.setattr("contextuate_persist.containers._docker.__defaults__", (1,), raising=False)
        assert "timed out" in run()[2]


def test_a_container_that_does_not_answer_is_given_up(run: Setup, docker: Path) -> None:
    with run.monkeypatch.context() as patch:
        variable = "PG_PORT" if run.backend == "postgresql" else "MYSQL_PORT"
        patch.setattr(Setup, "variables", {variable: "1"})
        patch.setattr(setup, "WAIT_SECONDS", 1)
        status, _, err = run()
    assert (status, "127.0.0.1:1" in err) == (1, True)


def test_both_sets_up_one_after_the_other(
    run: Setup, docker: Path, postgresql_server: servers.Server, mysql_server: servers.Server
) -> None:
    admins = {
        "PGPASSWORD": postgresql_server.admin_password,
        "MYSQL_PWD": mysql_server.admin_password,
    }
    variables = {
        "PG_HOST": "127.0.0.1", "PG_PORT": str(postgresql_server.port),
        "MYSQL_HOST": "127.0.0.1", "MYSQL_PORT": str(mysql_server.port), **admins,
    }  # fmt: skip
    with run.monkeypatch.context() as patch:
        patch.setattr(Setup, "variables", variables)
        patch.setattr(Setup, "arguments", ["setup", "both"])
        status, _, err = run()
        assert (status, err) == (0, "")
        assert "nothing was changed" in run()[1]
        assert run("--url", "mysql://h/d")[0] == 1
    assert [one["database"] for one in run.accounts()] == ["mysql", "mysql"] + ["postgresql"] * 2
    for server in (postgresql_server, mysql_server):
        server.drop_database(run.database)


def test_the_script_takes_the_same_words(tmp_path: Path) -> None:
    program = tmp_path / "contextuate-persist"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    script = ROOT / "schemas" / "setup.sh"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words, expected in (
        (["mysql", "--rotate"], "setup mysql --rotate"),
        (["docker-both"], "setup docker-both"),
        (["help"], "setup --help"),
        ([], "setup --help"),
    ):
        command = [str(script), *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, timeout=60
        )
        assert done.stdout == f"{expected}\n"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(
        [str(script), "help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=60,
    )
    assert "docker-postgresql" in done.stdout
    assert "PG_HOST" in done.stdout
