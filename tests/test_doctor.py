"""`check`: what it finds on real servers of both kinds, and how it judges what it sees."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import psycopg
import pytest

from contextuate_persist import console, doctor, schema
from contextuate_persist.cli import main
from contextuate_persist.config import ENVIRONMENT_URL
from contextuate_persist.doctor import Finding, Level, Seen
from contextuate_persist.embedded import PostgreSQLBinaries
from contextuate_persist.mysql_store import _beyond_data
from tests import servers
from tests.authority import ELSEWHERE, Authority
from tests.conftest import Database, make_store, new_database
from tests.shapes import shape


def findings(url: str, check: str | None = None) -> list[Finding]:
    found = make_store(url).check()
    return [finding for finding in found if check in (None, finding.check)]


def only(url: str, check: str) -> Finding:
    [finding] = findings(url, check)
    return finding


@pytest.fixture
def modest(database: Database) -> Iterator[Database]:
    """A database whose application account may make no temporary tables either."""
    statement = f'REVOKE TEMPORARY ON DATABASE "{database.name}" FROM PUBLIC'
    if database.backend == "postgresql":
        database.execute(statement)
        database.execute("ANALYZE")  # other tests have stored and deleted a lot
    yield database
    if database.backend == "postgresql":
        database.execute(statement.replace("REVOKE", "GRANT").replace("FROM", "TO"))


@pytest.fixture
def altered(empty_database: Database) -> Database:
    """A database with the schema, to spoil."""
    empty_database.owner().apply_schema()
    return empty_database


# --- On real servers ------------------------------------------------------------------------------


def test_all_is_well_with_a_fresh_schema_and_the_application_account(modest: Database) -> None:
    found = findings(modest.url)
    assert [str(finding) for finding in found if finding.level is not Level.OK] == []
    assert len(found) == 16
    assert all(finding.advice == "" for finding in found)


def test_the_committed_shape_is_that_of_a_fresh_database(database: Database) -> None:
    committed = schema.schema_file(f"{database.backend}-shape.txt").read_text(encoding="utf-8")
    assert shape(database) == committed, "run `python -m tests.shapes`"


@pytest.mark.only("postgresql")
def test_an_older_server_makes_the_same_shape(backend: str) -> None:
    binaries = PostgreSQLBinaries.of(Path("/usr/lib/postgresql/15/bin"), "Debian")
    if binaries is None:
        pytest.skip("no PostgreSQL 15 in /usr/lib/postgresql/15/bin")
    with servers.postgresql_server(binaries=binaries) as server:
        database = new_database(server)
        database.owner().apply_schema()
        assert [str(one) for one in findings(database.url, "drift") if one.advice] == []
        assert only(database.url, "version").level is Level.OK


@pytest.mark.parametrize(
    ("postgresql", "mysql", "level", "message"),
    [
        (
            "DROP INDEX idx_events_timestamp",
            "DROP INDEX idx_timestamp ON events",
            Level.WARNING,
            "_timestamp is missing",
        ),
        (
            "ALTER TABLE token_ledger ALTER model TYPE text",
            "ALTER TABLE token_ledger MODIFY model VARCHAR(200)",
            Level.PROBLEM,
            "column token_ledger.model was changed, from",
        ),
        (
            "ALTER TABLE sessions ALTER is_pinned DROP NOT NULL",
            "ALTER TABLE sessions MODIFY is_pinned BOOLEAN DEFAULT FALSE",
            Level.PROBLEM,
            "column sessions.is_pinned was changed",
        ),
        (
            "ALTER TABLE events DROP exact CASCADE",
            "ALTER TABLE events DROP exact",
            Level.PROBLEM,
            "column events.exact is missing",
        ),
        (
            "ALTER TABLE events DROP CONSTRAINT events_data",
            "ALTER TABLE events DROP CHECK events_data",
            Level.PROBLEM,
            "constraint events.events_data is missing",
        ),
        (
            "ALTER TABLE events ADD CONSTRAINT more CHECK (timestamp > 0)",
            "ALTER TABLE events ADD CONSTRAINT more CHECK (timestamp > 0)",
            Level.WARNING,
            "constraint events.more is not of the schema",
        ),
        (
            "DROP VIEW active_sessions",
            "DROP VIEW active_sessions",
            Level.PROBLEM,
            "column active_sessions.agent_type is missing",
        ),
        (
            "DROP TRIGGER trigger_sessions_updated_at ON sessions",
            "ALTER TABLE events ENGINE = MyISAM",
            Level.PROBLEM,
            "",
        ),
    ],
)
def test_drift_is_found_and_named(
    altered: Database, postgresql: str, mysql: str, level: Level, message: str
) -> None:
    statement = postgresql if altered.backend == "postgresql" else mysql
    if "MyISAM" in statement:
        altered.execute("ALTER TABLE events DROP FOREIGN KEY events_session_id_fkey")
        statement = "ALTER TABLE events ROW_FORMAT = DYNAMIC"
    altered.execute(statement)
    found = findings(altered.url, "drift")
    assert level in {finding.level for finding in found}
    assert any(message in finding.message for finding in found)
    assert all(finding.advice for finding in found)


def test_an_index_more_is_nobodys_fault(altered: Database) -> None:
    altered.execute("CREATE INDEX more ON events (created_at)")
    assert only(altered.url, "drift").level is Level.OK


def test_a_unique_index_more_may_refuse_what_is_to_be_stored(altered: Database) -> None:
    altered.execute("CREATE UNIQUE INDEX more ON events (created_at, session_id)")
    finding = only(altered.url, "drift")
    assert finding.level is Level.WARNING
    assert finding.message.endswith(" events.more is not of the schema")


def test_a_unique_constraint_more_is_told_once(altered: Database) -> None:
    altered.execute("ALTER TABLE events ADD CONSTRAINT more UNIQUE (created_at, session_id)")
    assert only(altered.url, "drift").message == "constraint events.more is not of the schema"


def test_a_column_more_is_a_problem_if_it_has_to_be_given(altered: Database) -> None:
    always = "GENERATED ALWAYS AS (timestamp + 1) STORED"
    for column in ("a integer", "b integer NOT NULL DEFAULT 1", f"c bigint {always} NOT NULL"):
        altered.execute(f"ALTER TABLE events ADD COLUMN {column}")
    assert only(altered.url, "drift").level is Level.OK
    altered.execute("ALTER TABLE sessions ADD COLUMN more integer NOT NULL")
    finding = only(altered.url, "drift")
    assert finding.level is Level.PROBLEM
    assert "column sessions.more is not of the schema" in finding.message


def test_privileges_beyond_data_are_warned_of(database: Database) -> None:
    finding = only(database.owner_url, "privileges")
    assert finding.level is Level.WARNING
    assert "can do more than it needs" in finding.message
    assert "setup" in finding.advice


@pytest.mark.parametrize("granted", ["TRIGGER", "REFERENCES"])
def test_each_privilege_beyond_data_is_named(modest: Database, granted: str) -> None:
    login = f'"{modest.user}"' if modest.backend == "postgresql" else f"'{modest.user}'@'%'"
    table = "events" if modest.backend == "postgresql" else f"{modest.name}.events"
    modest.execute(f"GRANT {granted} ON {table} TO {login}")
    try:
        finding = only(modest.url, "privileges")
        assert finding.level is Level.WARNING
        assert granted in finding.message
    finally:
        modest.execute(f"REVOKE {granted} ON {table} FROM {login}")


def test_missing_privileges_are_a_problem_and_to_read_only_is_said(modest: Database) -> None:
    for privileges, level, message in (
        (["SELECT"], Level.WARNING, "to read only: no DELETE"),
        (["SELECT", "INSERT", "UPDATE"], Level.WARNING, "DELETE"),
    ):
        user = f"less_{modest.name}"[:32]
        modest.server.create_login(user, "pw", modest.name, privileges=privileges)
        if modest.backend == "postgresql":
            for privilege in privileges:
                modest.execute(f'GRANT {privilege} ON ALL TABLES IN SCHEMA public TO "{user}"')
        try:
            finding = only(modest.server.url(modest.name, user, "pw"), "privileges")
            assert (finding.level, message in finding.message) == (level, True)
        finally:
            modest.server.drop_login(user, modest.name)


def test_what_keeps_a_store_from_opening_is_a_finding(database: Database) -> None:
    wrong = database.server.url(database.name, database.user, "wrong")
    for url in (wrong, f"{database.backend}://127.0.0.1:1/nowhere"):
        [finding] = findings(url)
        assert (finding.check, finding.level) == ("connection", Level.PROBLEM)
        assert finding.message
    user = f"none_{database.name}"[:32]
    database.server.create_login(user, "pw", database.name, privileges=[])
    try:
        [finding] = findings(database.server.url(database.name, user, "pw"))
        assert finding.level is Level.PROBLEM
        assert "denied" in finding.message
    finally:
        database.server.drop_login(user, database.name)


def test_a_missing_and_a_newer_schema_are_problems(empty_database: Database) -> None:
    finding = only(empty_database.url, "schema")
    assert finding.level is Level.PROBLEM
    assert finding.advice.startswith("run `contextuate-persist init`")
    empty_database.owner().apply_schema()
    empty_database.execute("INSERT INTO schema_version (version, name) VALUES (99, 'later')")
    assert "newer" in only(empty_database.url, "schema").advice
    assert findings(empty_database.url, "drift") == []


def test_settings_that_lose_what_was_acknowledged_are_a_problem(database: Database) -> None:
    if database.backend == "postgresql":
        name, undo = "synchronous_commit", f'ALTER ROLE "{database.user}" RESET ALL'
        database.execute(f'ALTER ROLE "{database.user}" SET synchronous_commit = off')
    else:
        name = "innodb_flush_log_at_trx_commit"
        undo = f"SET GLOBAL {name} = 1"
        database.execute(f"SET GLOBAL {name} = 2")
    try:
        finding = only(database.url, "durability")
        assert finding.level is Level.PROBLEM
        assert name in finding.message
        assert "may be lost" in finding.advice
    finally:
        database.execute(undo)


@pytest.mark.parametrize("name", ["full_page_writes", "innodb_doublewrite"])
def test_what_some_storages_do_not_need_is_a_warning(
    database: Database, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen = make_store(database.url)._examine()
    answers = {**seen.answers, "settings": [(name, "OFF")]}
    judged = doctor.judge(dataclasses.replace(seen, answers=answers, durable={name: ("ON",)}))
    [finding] = [one for one in judged if one.check == "durability"]
    assert finding.level is Level.WARNING
    assert "unless the storage never writes half a page" in finding.advice


@pytest.mark.only("mysql")
def test_a_server_that_is_not_strict_is_a_problem(database: Database, backend: str) -> None:
    [(before,)] = database.execute("SELECT @@GLOBAL.sql_mode")
    database.execute("SET GLOBAL sql_mode = ''")
    try:
        assert "global sql_mode is not strict" in only(database.url, "modes").message
    finally:
        database.execute(f"SET GLOBAL sql_mode = '{before}'")


@pytest.mark.only("mysql")
def test_both_implementations_of_the_driver_see_the_same(database: Database, backend: str) -> None:
    for url in (database.url, database.owner_url):
        fast, pure = (findings(f"{url}{more}") for more in ("", "?use-pure=1"))
        told = ("connection", "driver", "space")
        assert [one for one in fast if one.check not in told] == [
            one for one in pure if one.check not in told
        ]
        [driver] = [one for one in pure if one.check == "driver"]
        assert driver.level is Level.WARNING


@pytest.mark.only("mysql")
@pytest.mark.parametrize("more", ["", "?use-pure=1"])
def test_what_is_refused_keeps_nothing_else_from_being_told(
    modest: Database, backend: str, more: str
) -> None:
    """Without PROCESS the statistics are refused, and only while their rows are read."""
    for table in ("performance_schema.*", "mysql.innodb_index_stats"):
        modest.server.execute(f"GRANT SELECT ON {table} TO '{modest.user}'@'%'")
    try:
        found = {one.check: str(one) for one in findings(modest.url + more)}
    finally:
        for table in ("performance_schema.*", "mysql.innodb_index_stats"):
            modest.server.execute(f"REVOKE SELECT ON {table} FROM '{modest.user}'@'%'")
    untold = [check for check, message in found.items() if "not told" in message]
    assert untold == ["statistics", "prepared"]
    assert make_store(modest.url + more).survey()["transactions"] is None


def test_an_index_that_is_never_used_is_told_to_the_owner(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_database.owner().apply_schema()
    prefix = "idx_events_" if empty_database.backend == "postgresql" else "idx_"
    answer = empty_database.owner()._examine().answers["unused"]
    assert f"{prefix}tool_use_id" in {row[0] for row in answer or ()}
    monkeypatch.setattr(doctor, "UNUSED_BYTES", 0)
    monkeypatch.setattr(doctor, "UNUSED_SECONDS", 0)
    finding = only(empty_database.owner_url, "indexes")
    assert finding.level is Level.WARNING
    assert "idx_" in finding.message


@pytest.mark.only("mysql")
def test_forgotten_xa_transactions_are_found(database: Database, backend: str) -> None:
    with_rows = database.server._connect(database.name)
    cursor = with_rows.cursor()
    try:
        for statement in ("XA START 'lost'", "XA END 'lost'", "XA PREPARE 'lost'"):
            cursor.execute(statement)
        for more in ("", "?use-pure=1"):
            finding = only(database.owner_url + more, "prepared")
            assert finding.level is Level.PROBLEM
            assert "lost" in finding.message
    finally:
        cursor.execute("XA ROLLBACK 'lost'")
        with_rows.close()


@pytest.mark.only("postgresql")
def test_prepared_transactions_and_slow_statements_are_found(backend: str) -> None:
    options = {"max_prepared_transactions": 5, "shared_preload_libraries": "pg_stat_statements"}
    with servers.postgresql_server(options=options) as server:
        database = new_database(server)
        database.owner().apply_schema()
        with psycopg.connect(database.owner_url) as connection:
            connection.execute("CREATE EXTENSION pg_stat_statements")
            connection.execute(f"ALTER ROLE \"{database.user}\" PASSWORD 'topsecret'")
            connection.commit()
            connection.tpc_begin("lost")
            connection.execute("UPDATE sessions SET hidden = TRUE")
            connection.tpc_prepare()
            seen = database.owner()._examine()
            assert seen.answers["prepared"] == [("lost", 0)]
            connection.tpc_rollback()
            # A backup reads everything, and is known by the sums that it makes.
            for made in ("''", "sha256('')"):
                whole = f"(SELECT count(*), {made} FROM sessions) x"
                for _ in range(12):
                    connection.execute(f"SELECT pg_sleep(0.11) FROM {whole}")
            connection.commit()
        finding = only(database.owner_url, "statements")
        assert finding.level is Level.WARNING
        assert "pg_sleep" in finding.message
        assert " and " not in finding.message
        assert finding.message.count("12 times") == 1
        assert "topsecret" not in str(seen)


def test_what_tls_gives_is_told(tls_server: servers.Server, authority: Authority) -> None:
    database = new_database(tls_server)
    try:
        database.owner().apply_schema()
        for parameters, level, message in (
            ({"sslrootcert": str(authority.file)}, Level.OK, "certificate verified"),
            (
                {"sslrootcert": str(authority.file), "sslmode": "verify-ca"},
                Level.OK,
                "host name not checked",
            ),
            ({"sslmode": "require"}, Level.WARNING, "anybody may pose"),
        ):
            place = database.url.replace("127.0.0.1", ELSEWHERE)
            finding = only(f"{place}?{urlencode(parameters)}", "tls")
            assert (finding.level, message in finding.message) == (level, True)
            assert finding.message.startswith("TLSv1") is (level is Level.OK)
        assert only(database.url, "tls").level is Level.OK
    finally:
        database.drop()


@contextlib.contextmanager
def pooler(port: int, certificate: Path | None) -> Iterator[int]:
    """For one connection, in front of a PostgreSQL: TLS on one side, plain text on the other."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)
    ask = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")  # whether there is TLS

    def serve() -> None:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", port))
        if certificate is not None:
            assert client.recv(8) == ask
            client.sendall(b"S")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            client = context.wrap_socket(client, server_side=True)
        else:
            server.sendall(ask)
            assert server.recv(1) == b"S"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.maximum_version = ssl.TLSVersion.TLSv1_2  # sends nothing unasked
            server = context.wrap_socket(server)
        with client, server:
            _pass_on(client, server)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        thread.join(20)
        listener.close()


def _pass_on(client: socket.socket, server: socket.socket) -> None:
    # What a client without TLS must not be offered, and what it is offered instead.
    bound, unbound = b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0", b"SCRAM-SHA-256\0\0"
    offers = [
        b"R" + (8 + len(one)).to_bytes(4, "big") + b"\0\0\0\n" + one for one in (bound, unbound)
    ]
    pair = {client: server, server: client}
    while True:
        held = [one for one in pair if isinstance(one, ssl.SSLSocket) and one.pending()]
        for one in held or select.select(list(pair), [], [], 20)[0]:
            data = one.recv(65536)
            if not data:
                return
            pair[one].sendall(data.replace(*offers))


@pytest.mark.only("postgresql")
def test_behind_a_pooler_the_link_to_it_is_told(
    backend: str,
    tls_server: servers.Server,
    database: Database,
    authority: Authority,
    tmp_path: Path,
) -> None:
    """Not the one from there to the server, which is what the server knows of."""

    def behind(place: str, certificate: Path | None, **parameters: str) -> Finding:
        host = str(urlsplit(place).netloc.rpartition("@")[2])
        with pooler(int(host.rpartition(":")[2]), certificate) as port:
            url = place.replace(host, f"{ELSEWHERE}:{port}")
            return only(f"{url}?{urlencode(parameters)}", "tls")

    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(authority.right.certificate + authority.right.key)
    finding = behind(database.url, certificate, sslrootcert=str(authority.file))
    assert str(finding) == "TLS, the server's certificate verified"
    encrypted = new_database(tls_server)
    try:
        finding = behind(encrypted.url, None, sslmode="disable")
        assert finding.message == "all is in plain text"
    finally:
        encrypted.drop()


# --- Judging --------------------------------------------------------------------------------------


@pytest.fixture
def seen(modest: Database) -> Seen:
    """What a real server shows, to change one thing of."""
    return make_store(modest.url)._examine()


def judged(seen: Seen, check: str, answer: Any = None, **changes: Any) -> Finding:
    if answer is not None:
        changes["answers"] = {**seen.answers, **answer}
    found = doctor.judge(dataclasses.replace(seen, **changes))
    [finding] = [finding for finding in found if finding.check == check]
    return finding


OLD = doctor.UNUSED_SECONDS


@pytest.mark.parametrize(
    ("check", "answer", "level", "message"),
    [
        ("statistics", {"statistics": [("events", 1, 200_000)]}, Level.WARNING, "events (200,"),
        ("statistics", {"statistics": [("events", 10**6, 200_000)]}, Level.OK, "as new as"),
        ("statistics", {"statistics": None}, Level.OK, "not told"),
        ("indexes", {"unused": [("idx", 2**28, OLD)]}, Level.WARNING, "idx (256 MiB)"),
        ("indexes", {"unused": [("idx", 2**28, 60)]}, Level.OK, "none"),
        ("indexes", {"unused": None}, Level.OK, "not told"),
        ("statements", {"slow": [("SELECT  1\nFROM", 50, 250.0)]}, Level.WARNING, "SELECT 1 FROM"),
        ("statements", {"slow": [("SELECT 1", 1, 250.0)]}, Level.OK, "none"),
        ("statements", {"slow": None}, Level.OK, "not told"),
        ("prepared", {"prepared": [("gid", 3600)]}, Level.PROBLEM, "gid"),
        ("prepared", {"prepared": [("gid", 1)]}, Level.OK, "no forgotten"),
        ("prepared", {"prepared": None}, Level.OK, "not told"),
        (
            "partitions",
            {"locks": [(1281, 64, 100)]},
            Level.WARNING,
            "1,281 locks, 10 at once 12,810",
        ),
        ("packet", {"packet": [(4 * 2**20,)]}, Level.WARNING, "payloads over 1 MiB"),
        ("packet", {"packet": [(2**26,)]}, Level.OK, "enough"),
        ("packet", {"packet": []}, Level.OK, "no limit"),
        ("privileges", {"privileges": None}, Level.OK, "not told"),
        ("privileges", {"privileges": [("missing", "SELECT on events")]}, Level.PROBLEM, "missing"),
        ("space", {"size": None}, Level.OK, "not told"),
        ("space", {"size": [(2**20, None)]}, Level.OK, "1 MiB; how much is free"),
        ("space", {"size": [(2**20, "/nowhere")]}, Level.OK, "does not tell"),
        ("tls", {"tls": []}, Level.OK, "none, on this machine"),
    ],
)  # fmt: skip
def test_answers_are_judged(
    seen: Seen, check: str, answer: Any, level: Level, message: str
) -> None:
    finding = judged(seen, check, answer)
    assert (finding.level, message in finding.message) == (level, True), finding
    assert bool(finding.advice) == (level is not Level.OK)


@pytest.mark.parametrize(
    ("check", "changes", "level"),
    [
        ("clock", {"clock_ms": 900.0}, Level.OK),
        ("clock", {"clock_ms": -5_000.0}, Level.WARNING),
        ("clock", {"clock_ms": 3_600_000.0}, Level.PROBLEM),
        ("version", {"server": "11.4 (Debian)"}, Level.OK),
        ("version", {"server": "5.7.44", "supported": (8, 9)}, Level.PROBLEM),
        ("version", {"server": "19beta1 x", "supported": (12, 18)}, Level.WARNING),
        ("driver", {"implementation": "python"}, Level.WARNING),
        ("tls", {"local": False, "tls": {"sslmode": "disable"}}, Level.PROBLEM),
    ],
)
def test_what_was_seen_is_judged(
    seen: Seen, check: str, changes: dict[str, Any], level: Level
) -> None:
    answer = {"tls": []} if check == "tls" else None
    if check == "version":
        changes = {"supported": (10, 12), **changes}
    assert judged(seen, check, answer, **changes).level is level


def test_each_driver_has_its_own_advice(seen: Seen) -> None:
    for driver, advice in (("psycopg 3", "contextuate-persist[binary]"), ("mysql-", "use-pure")):
        assert advice in judged(seen, "driver", None, implementation="python", driver=driver).advice


def test_a_disk_that_fills_up_is_warned_of(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, level in (
        (2**40, Level.OK),
        (500 * 2**20, Level.WARNING),
        (2**20, Level.PROBLEM),
    ):
        monkeypatch.setattr(doctor, "free_bytes", lambda _, free=free: free)
        assert judged(seen, "space", {"size": [(2**20, "/data")]}).level is level


@pytest.mark.parametrize(
    ("grants", "expected"),
    [
        (
            ["GRANT USAGE ON *.* TO `a`@`%`"],
            "missing DELETE,missing INSERT,missing SELECT,missing UPDATE",
        ),
        (["GRANT SELECT, INSERT, UPDATE, DELETE ON `d_b`.* TO `a`@`%`"], ""),
        (["GRANT SELECT, INSERT, UPDATE, DELETE ON `d\\_b`.* TO `a`@`%`"], ""),
        (["GRANT ALL PRIVILEGES ON `d%`.* TO `a`@`%`"], "excess ALL PRIVILEGES on `d%`.*"),
        (
            ["GRANT SELECT, INSERT, UPDATE, DELETE ON `d_b`.* TO `a`@`%` WITH GRANT OPTION"],
            "excess GRANT OPTION on `d_b`.*",
        ),
        (
            ["GRANT SELECT, INSERT, UPDATE, DELETE ON *.* TO `a`@`%`"],
            "excess DELETE, INSERT, SELECT, UPDATE on *.*",
        ),
        (
            [
                "GRANT SELECT, INSERT, UPDATE, DELETE ON `d_b`.* TO `a`@`%`",
                "GRANT `r`@`%` TO `a`@`%`",
                "GRANT PROXY ON ``@`` TO `a`@`%`",
                "GRANT ALTER ON `other`.* TO `a`@`%`",
                "GRANT SELECT, UPDATE (x) ON `d_b`.`t` TO `a`@`%`",
            ],
            "excess ALTER on `other`.*",
        ),
    ],
)  # fmt: skip
def test_grants_of_mysql_are_read(grants: list[str], expected: str) -> None:
    rows = _beyond_data([(grant,) for grant in grants], [("9", 0, "d_b")])
    assert ",".join(" ".join(row) for row in rows) == expected


# --- The command ----------------------------------------------------------------------------------


def test_the_exit_status_tells(
    modest: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    altered: Database,
) -> None:
    def run(url: str, *options: str) -> tuple[int, str]:
        monkeypatch.setenv(ENVIRONMENT_URL, url)
        status = main(["check", *options])
        captured = capsys.readouterr()
        assert captured.err == ""
        return status, captured.out

    status, out = run(modest.url)
    assert status == 0
    assert all(line.startswith("ok ") for line in out.splitlines())
    assert run(modest.owner_url)[0] == 3
    status, out = run(modest.owner_url, "--json")
    assert status == 3
    records = [json.loads(line) for line in out.splitlines()]
    assert all(set(record) == {"check", "level", "message", "advice"} for record in records)
    assert {record["level"] for record in records} == {"ok", "warning"}
    altered.execute("DROP VIEW active_sessions")
    assert run(altered.url)[0] == 1
    assert run(f"{modest.backend}://127.0.0.1:1/nowhere")[0] == 1


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console.paint("x", "red") == "x"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.paint("x", "red") == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.paint("x", "red") == "x"
