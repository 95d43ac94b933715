"""The command line: what goes where, with which exit status, and what never reaches a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from contextuate_persist import (
    MonitorEvent,
    SessionMeta,
    SessionNode,
    TokenUsage,
    display,
    encryption,
)
from contextuate_persist.base import BaseStore
from contextuate_persist.cli import main
from contextuate_persist.config import ENVIRONMENT_URL
from tests.builders import T0, event, session
from tests.conftest import Database

Run = Callable[..., tuple[int, str, str]]

#: What a terminal would obey or be confused by, and what ends a line.
HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x9b31m\x85 \u202egnp.exe\u2066 \u200b\u2028\ufeff \x7f\r\n\t\0 \ud800"
)


@pytest.fixture
def run(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command on the database; its exit status, output and error output."""
    monkeypatch.setenv(ENVIRONMENT_URL, database.url)
    monkeypatch.setenv("COLUMNS", "100")

    def run_command(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(arguments)
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


def program(
    arguments: Sequence[str], url: str, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, ENVIRONMENT_URL: url, "COLUMNS": "100", **options.pop("env", {})}
    command = [sys.executable, "-m", "contextuate_persist", *arguments]
    return subprocess.run(
        command, capture_output=True, timeout=60, check=False, env=environment, **options
    )


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def harmless(text: str) -> bool:
    """Whether the text holds only characters that are shown, and line ends."""
    forbidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return all(c == "\n" or unicodedata.category(c) not in forbidden for c in text)


# --- Commands -------------------------------------------------------------------------------------


def test_init_says_whether_there_was_something_to_do(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENVIRONMENT_URL, empty_database.owner_url)
    assert main(["sessions"]) == 1
    assert "run `contextuate-persist init`" in capsys.readouterr().err
    assert main(["init"]) == 0
    assert capsys.readouterr().out == "schema applied\n"
    assert main(["init"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["init", "--json"]) == 0
    assert records(capsys.readouterr().out) == [{"changed": False}]
    assert main(["sessions"]) == 0
    assert capsys.readouterr().out == ""


def test_upgrade_says_what_it_does_and_a_dry_run_does_nothing(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENVIRONMENT_URL, empty_database.owner_url)
    for _ in range(2):
        assert main(["upgrade", "--dry-run"]) == 0
        assert re.fullmatch(r"to apply: \d{4} .+\n", capsys.readouterr().out)
    assert main(["upgrade", "--json"]) == 0
    assert [record["applied"] for record in records(capsys.readouterr().out)] == [True]
    assert main(["upgrade"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_application_account_cannot_change_the_schema(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENVIRONMENT_URL, empty_database.url)
    assert main(["init"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert empty_database.password not in captured.err


def test_sample_data_can_be_listed_drawn_and_found(run: Run) -> None:
    assert run("sample")[0] == 0
    _, sessions, _ = run("sessions")
    assert sessions.startswith("SESSION ")
    assert "18.6k" in sessions
    assert "[pinned] Fix the checkout total" in sessions
    assert run("tree", "session-root-001")[1].splitlines()[1:] == [
        "├── session-child-001  completed  1m00s  5.0k tokens  nexus: /home/dev/webshop",
        "└── session-child-002  error  1m00s  3.0k tokens  canvas: /home/dev/webshop",
    ]
    _, events, _ = run("events", "session-root-001")
    assert re.search(r"2026-01-05T09:00:10.000Z +tool_call +Bash: make test", events)
    assert len(run("recent", "--limit", "3")[1].splitlines()) == 1 + 3
    assert len(run("find", "--tool", "Bash")[1].splitlines()) == 1 + 2
    assert "session-hidden-001" in run("sessions", "--hidden")[1]
    assert "session-hidden-001" not in run("sessions", "--visible")[1]


def test_json_output_is_the_wire_form_and_nothing_else(run: Run, store: BaseStore) -> None:
    saved = session("s", label="L\u00e4bel", token_usage=TokenUsage(total_input=5))
    happened = event("s", data={"n": 2**70, "lone": "\ud800", "nul": "\0", "del": "\x7f\x9b"})
    store.save_session(saved)
    store.save_event(happened)
    _, out, err = run("sessions", "--json")
    assert [SessionMeta.from_wire(record) for record in records(out)] == store.get_sessions()
    for command in (["events", "s"], ["recent"], ["find", "--session", "s"]):
        status, out, err = run(*command, "--json")
        (record,) = records(out)
        assert (status, err) == (0, "")
        assert record.pop("cursor") == str(store.get_events("s")[0].cursor)
        assert record == happened.to_wire()
        assert MonitorEvent.from_wire(record) == happened
    assert records(run("tree", "--json")[1])[0]["depth"] == 0
    (health,) = records(run("status", "--json")[1])
    assert health["backend"] == store.backend


def test_status_shows_the_server_and_the_drivers(run: Run, store: BaseStore) -> None:
    status, out, _ = run("status")
    assert status == 0
    assert re.search(f"^backend +{store.backend}$", out, re.MULTILINE)
    assert re.search("^driver +(psycopg|mysql-connector-python) [0-9]", out, re.MULTILINE)


def test_find_takes_every_filter(run: Run, store: BaseStore) -> None:
    wanted = event(
        "s",
        parent_session_id="p",
        data={"toolName": "Read", "toolUseId": "t1", "toolInput": {"file_path": "/a"}},
    )
    store.save_events([wanted, event("other", T0 + 5, machine_id="m2", event_type="message")])
    filters = {
        "--session": "s",
        "--machine": "machine",
        "--parent": "p",
        "--type": "tool_call",
        "--hook": "PreToolUse",
        "--tool": "Read",
        "--tool-use-id": "t1",
        "--contains": '{"toolInput": {"file_path": "/a"}}',
        "--before": str(T0 + 1),
        "--after": "2020-01-01",
    }
    arguments = [word for pair in filters.items() for word in pair]
    _, out, _ = run("find", "--json", *arguments)
    assert [record["id"] for record in records(out)] == [wanted.id]
    _, out, _ = run("find", "--json", "--oldest-first", "--limit", "1")
    assert [record["id"] for record in records(out)] == [wanted.id]


def test_sessions_takes_every_filter(run: Run, store: BaseStore) -> None:
    store.save_sessions(
        [session("a", status="completed", parent_session_id="p"), session("b", machine_id="m2")]
    )
    for arguments, expected in (
        (["--status", "completed"], ["a"]),
        (["--parent", "p"], ["a"]),
        (["--machine", "m2"], ["b"]),
        (["--limit", "0"], []),
    ):
        assert [
            r["sessionId"] for r in records(run("sessions", "--json", *arguments)[1])
        ] == expected


@pytest.mark.parametrize("bound", [str(T0 + 10), "2023-11-14T22:13:20.010Z", "cursor"])
def test_times_are_milliseconds_iso_8601_or_a_cursor(
    run: Run, store: BaseStore, bound: str
) -> None:
    store.save_events([event("s", T0 + 10 * n) for n in range(3)])
    if bound == "cursor":
        bound = str(store.get_events("s")[1].cursor)
    (before,) = records(run("events", "s", "--json", "--before", bound)[1])
    (after,) = records(run("events", "s", "--json", "--after", bound)[1])
    assert (before["timestamp"], after["timestamp"]) == (T0, T0 + 20)


def test_a_full_page_says_how_to_go_on(run: Run, store: BaseStore, database: Database) -> None:
    events = [event("s", T0 + n) for n in range(5)]
    store.save_events(events)
    # An adopted database may have any time; only what looks like a date is none here.
    database.execute(f"UPDATE events SET timestamp = timestamp - {T0 + 4}")
    seen: list[str] = []
    bound: list[str] = []
    while not seen or bound:
        _, out, err = run("events", "s", "--json", "--limit", "1", *bound)
        seen = [record["id"] for record in records(out)] + seen
        bound = re.findall(r"(--before=\S+) goes on", err)
    assert seen == [stored.id for stored in events]


def test_global_options_stand_before_or_after_the_command(
    run: Run, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT_URL)
    for arguments in (
        ["--url", database.url, "--json", "status"],
        ["status", "--json", "--url", database.url],
        ["--json", "status", "--url", database.url],
    ):
        status, out, _ = run(*arguments)
        assert status == 0
        assert records(out)[0]["backend"] == database.backend


# --- Import ---------------------------------------------------------------------------------------


def test_import_stores_the_good_lines_names_the_bad_ones_and_fails(
    run: Run, store: BaseStore, tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    good = json.dumps(event().to_wire())
    path.write_text(f"{good}\n{{}}\n\x1b[2Jbroken\n")
    status, out, err = run("import", str(path))
    assert status == 1
    assert out == f"{path}: 3 events read, 1 stored, 0 there already, 2 refused\n"
    lines = err.splitlines()
    assert lines[0] == f"{path}:2: id: missing"
    assert lines[1].startswith(f"{path}:3: JSON: ")
    assert len(lines) == 2
    assert len(store.get_events("s")) == 1
    path.write_text(good)
    status, out, err = run("import", "--json", str(path))
    assert (status, err) == (0, "")
    assert records(out)[0]["alreadyThere"] == 1


def test_import_reads_standard_input(
    run: Run, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = json.dumps(event().to_wire()).encode() + b"\nbad"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    status, out, err = run("import", "-")
    assert status == 1
    assert out.startswith("-: 2 events read, 1 stored")
    assert err.startswith("stdin:2: JSON: ")


def test_import_goes_on_after_a_missing_file_and_fails(
    run: Run, store: BaseStore, tmp_path: Path
) -> None:
    (tmp_path / "there.jsonl").write_text(json.dumps(event().to_wire()))
    status, out, err = run("import", str(tmp_path / "missing"), str(tmp_path / "there.jsonl"))
    assert status == 1
    assert err == f"contextuate-persist: error: {tmp_path}/missing: No such file or directory\n"
    assert "1 stored" in out


def test_import_of_a_directory_without_events_fails(run: Run, tmp_path: Path) -> None:
    status, _, err = run("import", str(tmp_path))
    assert status == 1
    assert "no *.jsonl file is below" in err


def test_import_refuses_an_empty_name_and_a_closed_input(
    run: Run, store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps(event().to_wire()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    error = "contextuate-persist: error: "
    assert run("import", "") == (1, "", f"{error}'': No such file or directory\n")
    assert run("import", "-") == (1, "", f"{error}stdin: Bad file descriptor\n")
    assert run("import", "/proc/self/mem") == (
        1,
        "",
        f"{error}/proc/self/mem: Input/output error\n",
    )
    assert store.get_events("s") == []


def test_import_undeletes_only_when_told(run: Run, store: BaseStore, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(event().to_wire()))
    run("import", str(path))
    store.delete_session("s")
    assert "0 stored" in run("import", str(path))[1]
    assert "1 stored" in run("import", str(path), "--undelete")[1]


# --- Errors ---------------------------------------------------------------------------------------


def test_a_user_error_is_one_line_and_status_1(run: Run, database: Database) -> None:
    unreachable = "postgresql://127.0.0.1:1/nowhere"
    for arguments in (
        ["events", "unknown"],
        ["tree", "unknown"],
        ["events", "s", "--before", "1700000000"],
        ["find", "--contains", "{}"],
        ["find", "--session", "x" * 300],
        ["status", "--url", unreachable],
        ["status", "--url", "sqlite:///file"],
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (1, ""), arguments
        assert err.startswith("contextuate-persist: error: ")
        assert err.count("\n") == 1, arguments


def test_a_wrong_command_line_is_status_2(run: Run) -> None:
    for arguments in (
        [],
        ["unknown"],
        ["events"],
        ["events", "s", "--before", "yesterday"],
        ["events", "s", "--before", "2026-01"],
        ["events", "s", "--after", "2026-1"],
        ["events", "s", "--after", "12-24"],
        ["events", "s", "--before", "9" * 5000],
        ["events", "s", "--before", "12345678901234567890-1"],
        ["events", "s", "--limit", "-1"],
        ["sessions", "--status", "asleep"],
        ["sessions", "--hidden", "--visible"],
        ["find", "--contains", "[1]"],
        ["find", "--contains", '{"a": NaN}'],
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), arguments
        assert "error: " in err.splitlines()[-1]
        assert "invalid _" not in err


def test_verbose_shows_where_an_error_came_from(run: Run) -> None:
    assert "Traceback" not in run("tree", "unknown")[2]
    assert "Traceback" in run("tree", "unknown", "-v")[2]


def test_no_password_is_ever_printed(run: Run, database: Database) -> None:
    host = urlsplit(database.url).netloc.rpartition("@")[2]
    scheme = database.backend
    secret = "topsecret"
    for arguments in (
        ["status", "--url", f"{scheme}://app:{secret}@{host}/nowhere"],
        ["status", "-v", "--url", f"{scheme}://app:{secret}@{host}/nowhere"],
        ["status", "--url", f"{scheme}://app:{secret}@127.0.0.1:1/nowhere"],
        ["status", "--url", f"{scheme}://app:a@{secret}@{host}/nowhere"],
        ["status", "--url", f"{scheme}://app:{secret}/b@{host}/nowhere"],
        ["status", "--url", f"{scheme}://app:{secret}?b@{host}/nowhere"],
        ["status", "--url", f"{scheme}://app:{secret}#b@{host}/nowhere"],
        ["status", "--url", f"{scheme}://app:{secret}%zz@{host}/nowhere"],
        ["status", "--url", f"{scheme}://app:[{secret}@{host}/nowhere"],
        ["status", "--url", f"{scheme}://app@{host}/nowhere?password={secret}&colour=red"],
        ["status", "--url", f"oracle://app:{secret}@{host}/nowhere"],
        ["status", f"{scheme}://app:{secret}@{host}/nowhere"],
        [f"{scheme}://app:{secret}@{host}/nowhere"],
        [f"{scheme}://app:my {secret}@{host}/nowhere"],
        [f"{scheme}://app:my\n{secret} @ b@{host}/nowhere"],
        [f"{scheme}://app@{host}/nowhere?sslpassword={secret}"],
        [f"{scheme}://app@{host}/nowhere?password=my {secret}&sslmode=disable"],
    ):
        status, out, err = run(*arguments)
        assert status in (1, 2), arguments
        assert secret not in out + err, arguments


def test_no_password_is_ever_logged() -> None:
    program = (
        "import logging; from contextuate_persist import cli; cli._configure_logging(True)\n"
        "logging.getLogger('x').error('to %s\\nthen', 'mysql://app:my topsecret@h/x')\n"
        "logging.getLogger('x').error('to %s', 'mysql://h/x?sslpassword=topsecret')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "mysql://app:***@h/x\nthen\n" in done.stderr
    assert "topsecret" not in done.stderr


@pytest.mark.parametrize("command", ["import", "maintain"])
def test_a_secret_key_that_others_can_read_is_warned_of_once(
    run: Run, store: BaseStore, tmp_path: Path, command: str
) -> None:
    key, backups = tmp_path / "key", tmp_path / "backups"
    keys = encryption.recipients([encryption.new_identity(key)])
    key.chmod(0o644)
    backups.mkdir()
    with (backups / "b.age").open("wb") as file:
        encryption.encrypt(io.BytesIO(b"no backup"), file, keys)
    (tmp_path / "events.jsonl").write_text(json.dumps(event().to_wire()) + "\n")
    arguments = {
        "import": ["import", str(tmp_path / "events.jsonl")],
        "maintain": ["maintain", "daily", "--backups", str(backups)],
    }[command]
    _, _, err = run(*arguments, "--identity", str(key))
    assert err == f"warning: {key} holds a secret key and others can read it: chmod 600 it\n"


def test_a_configuration_file_with_a_password_that_others_can_read_is_warned_of(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = {"host": "127.0.0.1", "port": 1, "password": "topsecret"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"persistence": {"type": "mysql", "database": database}}))
    path.chmod(0o644)
    monkeypatch.delenv(ENVIRONMENT_URL)
    monkeypatch.setenv("CONTEXTUATE_CONFIG", str(path))
    status, _, err = run("status")
    assert status == 1
    assert err.startswith(f"warning: {path} holds a password and others can read it: chmod 600 it")
    assert err.count("\n") == 2


def test_a_megabyte_is_told_in_a_short_line_without_delay_or_password(run: Run) -> None:
    begun = time.process_time()
    for word in ("://:" * 2**16, "x" * 2**20, f"mysql://app:{'secret' * 2**17}@host/x"):
        status, out, err = run("status", word)
        assert (status, out) == (2, "")
        assert len(err) < 6000
        assert "secret" not in err
    assert time.process_time() - begun < 5


def test_a_password_on_the_command_line_is_taken_with_a_warning(
    run: Run, database: Database
) -> None:
    status, _, err = run("status", "--url", database.url)
    assert status == 0
    assert err.startswith("warning: a password on the command line")
    assert ENVIRONMENT_URL in err
    assert database.password not in err
    assert run("status")[2] == ""


# --- The terminal ---------------------------------------------------------------------------------


def fill_with_hostile_text(store: BaseStore) -> None:
    store.save_session(session("s", label=HOSTILE, working_directory=HOSTILE, agent_type=HOSTILE))
    store.save_session(session("child", parent_session_id="s", working_directory=HOSTILE))
    for data in (
        {"toolName": HOSTILE, "toolInput": {"command": HOSTILE}},
        {"error": HOSTILE},
        {HOSTILE: {HOSTILE: [HOSTILE]}},
        {"message": HOSTILE},
    ):
        store.save_event(event("s", data=data, working_directory=HOSTILE))


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_stored_text_cannot_control_the_terminal(
    run: Run, store: BaseStore, json_option: list[str]
) -> None:
    fill_with_hostile_text(store)
    for command in (["sessions"], ["tree"], ["tree", "s"], ["events", "s"], ["recent"], ["find"]):
        status, out, _ = run(*command, *json_option)
        assert status == 0
        assert harmless(out), command
        rows = {"sessions": 2, "tree": 2}.get(command[0], 4)
        headings = 0 if json_option or command[0] == "tree" else 1
        assert len(out.splitlines()) == rows + headings, command


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1"])
def test_output_works_in_every_encoding(
    database: Database, store: BaseStore, encoding: str
) -> None:
    fill_with_hostile_text(store)
    store.save_session(session("wide", label="日本語 \u00e9 \U0001f600 " * 20))
    for command in (["sessions"], ["tree"], ["events", "s"], ["events", "s", "--json"]):
        environment = {"LC_ALL": "C", "PYTHONIOENCODING": f"{encoding}:strict"}
        done = program(command, database.url, env=environment)
        assert (done.returncode, done.stderr) == (0, b""), command
        assert harmless(done.stdout.decode(encoding))
    assert program(["sessions"], database.url, env={"LANG": "C", "LC_ALL": ""}).returncode == 0


@pytest.mark.parametrize("width", [20, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    label = "日本語のラベル " * 20
    sessions = [session(f"{n}" * 36, label=label, machine_id="m" * 255) for n in range(3)]
    nodes = [SessionNode(one, depth) for depth, one in enumerate(sessions)]
    events = [event("s" * 36, data={"error": label}), event(data={"message": "short"})]
    for lines in (
        display.session_table(sessions, width),
        display.tree_lines(nodes, width),
        display.event_table(events, width),
    ):
        for line in lines:
            wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
            assert len(line) + wide <= width


def test_trees_are_drawn_with_rails() -> None:
    depths = [0, 1, 2, 2, 1, 2, 0]
    nodes = [SessionNode(session(f"n{n}"), depth) for n, depth in enumerate(depths)]
    assert [line.partition("  active")[0] for line in display.tree_lines(nodes, 80)] == [
        "n0",
        "├── n1",
        "│   ├── n2",
        "│   └── n3",
        "└── n4",
        "    └── n5",
        "n6",
    ]


def test_a_chain_of_a_thousand_sessions_is_drawn() -> None:
    nodes = [SessionNode(session(f"n{n}"), n) for n in range(1000)]
    assert list(display.tree_lines(nodes, 80))[-1].startswith("… 999 deep: n999")


def test_summaries_are_short_whatever_the_payload() -> None:
    for data in (
        {},
        {"toolName": ["not", "a", "name"]},
        {"toolName": "T", "toolInput": {"command": "x" * 10**6}},
        {"error": {"message": {"deep": {"deeper": [1, 2, {}]}}}},
        {f"key{n}": "x" * 10**5 for n in range(100)},
        {"message": None, "text": "said"},
        {"n": 10**4000},
    ):
        summary = display.event_summary(event(data=data))
        assert len(summary) <= 1000
    assert summary == "n=" + "1" + "0" * 997
    assert display.event_summary(event(data={"message": None, "text": "said"})) == "said"


def test_times_beyond_the_calendar_are_shown_as_numbers() -> None:
    assert display.iso_time(2**53 - 1) == str(2**53 - 1)
    assert display.iso_time(T0) == "2023-11-14T22:13:20.000Z"


def test_a_progress_bar_is_drawn_on_a_terminal_only(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(event().to_wire()) + "\n" for _ in range(2000)))
    assert program(["import", str(path)], database.url).stderr == b""
    master, slave = pty.openpty()
    environment = {**os.environ, ENVIRONMENT_URL: database.url, "COLUMNS": "200"}
    command = [sys.executable, "-m", "contextuate_persist", "import", str(path)]
    with subprocess.Popen(
        command, stderr=slave, stdout=subprocess.PIPE, env=environment
    ) as process:
        os.close(slave)
        assert process.stdout is not None
        assert b"2,000 events read, 0 stored" in process.stdout.read()
    drawn = b""
    while select.select([master], [], [], 0)[0]:
        try:
            drawn += os.read(master, 65536)
        except OSError:
            break
    os.close(master)
    assert re.search(rb"\r.*\[#*\.*\] \d\.\d MB of", drawn)


def test_a_reader_that_leaves_ends_the_command_quietly(
    database: Database, store: BaseStore
) -> None:
    store.save_events([event(data={"text": "x" * 500}) for _ in range(1000)])
    command = [sys.executable, "-m", "contextuate_persist", "events", "s", "--limit", "1000"]
    environment = {**os.environ, ENVIRONMENT_URL: database.url, "COLUMNS": "600"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert errors == b""


def test_a_full_disk_is_one_line_and_status_1(database: Database, store: BaseStore) -> None:
    store.save_session(session())
    command = [sys.executable, "-m", "contextuate_persist", "sessions"]
    environment = {**os.environ, ENVIRONMENT_URL: database.url}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"contextuate-persist: error: No space left on device\n"


def test_ctrl_c_ends_with_status_130_and_no_traceback(
    database: Database, store: BaseStore, ctrl_c: None
) -> None:
    command = [sys.executable, "-m", "contextuate_persist", "-v", "import", "-"]
    environment = {**os.environ, ENVIRONMENT_URL: database.url}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin is not None
        for _ in range(1000):
            process.stdin.write(json.dumps(event().to_wire()).encode() + b"\n")
        process.stdin.flush()
        until = time.monotonic() + 30
        while not store.get_events("s", limit=1) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 130
    assert out == b""
    assert b"Traceback" not in errors


def test_version_and_help_need_no_database() -> None:
    done = program(["--version"], "nonsense")
    assert done.stdout.startswith(b"contextuate-persist ")
    assert ENVIRONMENT_URL.encode() in program(["--help"], "nonsense").stdout
