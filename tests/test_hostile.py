"""Input that would like to be executed: stored exactly or refused in one line, by every method
and every command; and what a command prints leaves the terminal alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from contextuate_persist import (
    InvalidRecord,
    MonitorEvent,
    PersistenceError,
    SessionMeta,
    TokenUsage,
)
from contextuate_persist.arguments import make_parser
from contextuate_persist.base import BaseStore
from contextuate_persist.cli import main
from contextuate_persist.config import ENVIRONMENT_CONFIG, ENVIRONMENT_URL
from tests.builders import T0, event, session, usage
from tests.conftest import Database
from tests.servers import Server

#: Each can be an id.
HOSTILE = [
    "'; DROP TABLE sessions; --",
    '" OR 1=1; DELETE FROM events; /*',
    "$(touch owned) `touch owned` && touch owned | sh",
    "'; COPY (SELECT 1) TO PROGRAM 'touch owned'; --",
    "%s %(session_id)s ? ?? :name $1 {0} @@version",
    "a\\'b\\\\\"c\\0\\x00\\u0000",
    "../../etc/passwd",
    "DELIMITER //",
    "$$; COMMIT; $$",
    "null",
    "NaN",
    "[]",
    '{"$gt": ""}',
    "\u202eevil\u2066",
    "%",
    "_",
    "*",
    "\\",
    "''",
    "-x",
    "--json",
]
#: None of these can.
NO_IDS = ["", " ", " a", "a\n", "\0", "a\x1b[2Jb", "\ud800", "x" * 256, "\x9b31m"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_goes_through_every_field_and_method(
    store: BaseStore, database: Database, text: str
) -> None:
    parent, child = f"p{text}p", f"c{text}c"
    given = session(
        text,
        machine_id=text,
        working_directory=text,
        parent_session_id=parent,
        child_session_ids=(child,),
        agent_type=text,
        label=text * 300,
        model=text,
        transcript_path=text,
        is_pinned=False,
        hidden=False,
        is_user_initiated=True,
        token_usage=TokenUsage(total_input=1),
    )
    store.save_session(given)
    assert store.get_session(text) == given
    assert store.get_sessions(machine_id=text, parent_session_id=parent) == [given]
    store.update_session(text, label=text, manual_parent_session_id=text)
    assert store.session_tree(text)[0].session.label == text

    name = f"t{text}"[:100].strip()
    data = {text: text, "toolName": text, "toolUseId": text, "list": [text, {text: text}]}
    sent = [
        event(text, T0 + i, event_type=name, hook_type=name, machine_id=text, data=data)
        for i in range(3)
    ]
    store.save_event(sent[0])
    assert store.save_events([*sent, sent[0]]) == 2
    assert store.get_events(text) == sent
    for filters in (
        {"event_type": name},
        {"hook_type": name},
        {"machine_id": text},
        {"tool_name": text},
        {"tool_use_id": text},
        {"session_id": text, "contains": {text: text}},
        {"session_id": text, "contains": {"list": [{text: text}]}},
    ):
        assert store.find_events(**filters, newest_first=False) == sent  # type: ignore[arg-type]
    assert store.event_counts(text) == {name: 3}
    assert store.save_usage(text, [usage(text, model=text), usage(f"m{text}m")]) == 2
    assert store.save_usage(text, [usage(text, 7, model=text), usage(f"m{text}m")]) == 1
    assert store.session_tree(text)[0].session.token_usage.total_output == 12
    store.delete_session(text)
    assert store.get_session(text) is None
    assert store.get_events(text) == []
    assert database.execute("SELECT COUNT(*) FROM deleted_sessions") == [(1,)]


@pytest.mark.parametrize("text", NO_IDS, ids=ascii)
def test_what_cannot_be_an_id_is_refused_in_one_line_by_every_method(
    store: BaseStore, text: str
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: store.save_event(event(text)),
        lambda: store.save_event(event(parent_session_id=text)),
        lambda: store.save_event(event(machine_id=text)),
        lambda: store.save_events([event(text)]),
        lambda: store.get_events(text),
        lambda: store.get_event_by_id(text, event().id),
        lambda: store.get_event_by_id("s", text),
        lambda: store.find_events(session_id=text),
        lambda: store.find_events(event_type=text),
        lambda: store.iter_events(machine_id=text),
        lambda: store.event_counts(text),
        lambda: store.save_session(session(text)),
        lambda: store.save_sessions([session(parent_session_id=text)]),
        lambda: store.save_session(session(child_session_ids=(text,))),
        lambda: store.get_session(text),
        lambda: store.get_sessions(parent_session_id=text),
        lambda: store.update_session(text, label="x"),
        lambda: store.update_session("s", manual_parent_session_id=text),
        lambda: store.save_usage(text, [usage()]),
        lambda: store.save_usage("s", [usage(text)]),
        lambda: store.delete_session(text),
        lambda: store.session_tree(text),
    ]
    for call in calls:
        with pytest.raises(InvalidRecord) as caught:
            call()
        assert str(caught.value).isprintable()
        assert str(caught.value).isascii()
        assert len(str(caught.value)) < 300
    assert store.get_sessions() == []


def test_megabytes_where_a_name_belongs_are_refused_in_one_line(store: BaseStore) -> None:
    megabyte = "x" * 2**20
    bad = session(label=megabyte)
    store.save_session(session(label="kept"))
    for field in ("working_directory", "transcript_path", "agent_type", "session_id", "model"):
        with pytest.raises(InvalidRecord, match=f"^{field}: 1048576 characters, at most "):
            store.save_session(dataclasses.replace(session(), **{field: megabyte}))
    with pytest.raises(InvalidRecord, match="^label: 1048576 characters, at most 16383 are kept$"):
        store.save_session(bad)
    with pytest.raises(InvalidRecord, match=r"^1 refused, nothing stored: \[1\] s: label: "):
        store.save_sessions([session("other"), bad])
    with pytest.raises(InvalidRecord, match="^label: 1048576 characters, at most 16383 are kept$"):
        store.update_session("s", label=megabyte)
    assert [one.label for one in store.get_sessions()] == ["kept"]
    with pytest.raises(PersistenceError, match="^event_type: "):
        store.save_event(event(event_type=megabyte))


def test_megabytes_in_a_payload_are_kept(store: BaseStore) -> None:
    sent = event(data={"toolName": "x" * 2**20, CONTROLS: ["\ud800" * 2**20]})
    store.save_event(sent)
    assert store.get_events("s") == [sent]
    assert store.find_events(tool_name="x" * 2**20) == [sent]


def test_ten_thousand_children_are_kept(store: BaseStore, database: Database) -> None:
    children = tuple(f"c{n:04}" for n in range(10_000))
    store.save_session(session("p", child_session_ids=children))
    store.save_session(session("p", child_session_ids=children, label="again"))
    got = store.get_session("p")
    assert got is not None
    assert got.child_session_ids == children
    # Now the children themselves, by one statement: saving them takes MySQL many seconds.
    digit = "(" + " UNION ALL ".join(f"SELECT {n} AS n" for n in range(10)) + ")"
    database.execute(
        "INSERT INTO sessions (session_id, machine_id, working_directory, start_time, "
        "status, parent_session_id) SELECT CONCAT('c', a.n, b.n, c.n, d.n), machine_id, "
        "working_directory, start_time, status, session_id "
        f"FROM sessions, {digit} AS a, {digit} AS b, {digit} AS c, {digit} AS d"
    )
    assert store.get_session("p") == got
    assert len(store.get_sessions(parent_session_id="p")) == 10_000
    assert [node.depth for node in store.session_tree("p")] == [0] + [1] * 10_000
    store.delete_session("p")
    assert [node.depth for node in store.session_tree()] == [0] * 10_000


def test_a_session_with_thousands_of_children_is_sorted_among_others(
    store: BaseStore, database: Database
) -> None:
    """By any filter: its list alone is more than MySQL's sort buffer takes."""
    # PostgreSQL, which has no such limit, has an index of the lists to keep.
    children = tuple(f"{n:036}" for n in range(10_000 if database.backend == "mysql" else 1_000))
    store.save_session(session("p", child_session_ids=children))
    store.save_sessions(
        session(f"s{n}", start_time=T0 + n // 2, parent_session_id="p") for n in range(10, 60)
    )
    expected = [f"s{n}" for n in range(59, 9, -1)] + ["p"]
    filters: list[dict[str, Any]] = [
        {},
        {"machine_id": "machine"},
        {"status": "active"},
        {"hidden": False},
        {"started_after": T0 - 1},
        {"started_before": T0 + 100},
        {"status": "active", "hidden": False, "machine_id": "machine"},
    ]
    for given in filters:
        for limit in (None, 7):
            found = store.get_sessions(**given, limit=limit)
            assert [one.session_id for one in found] == expected[:limit], (given, limit)
            assert all(one.child_session_ids == () for one in found if one.session_id != "p")
    under = {node.session.session_id: node.depth for node in store.session_tree("p")}
    assert under == dict.fromkeys(expected, 1) | {"p": 0}
    assert len(store.session_tree()) == 51
    assert set(store.sessions_of(expected)) == set(expected)
    shown = database.execute("SELECT session_id, child_count FROM active_sessions")
    assert [row[1] for row in shown if row[0] == "p"] == [len(children) + 50]
    assert len(shown) == 51


def test_cyclic_parents_go_through_every_method(store: BaseStore) -> None:
    store.save_events([event("a", parent_session_id="b"), event("b", parent_session_id="a")])
    store.save_event(event("self", parent_session_id="self"))
    loop = [
        session("a", parent_session_id="b", child_session_ids=("b", "a")),
        session("b", parent_session_id="a", child_session_ids=("a",)),
        session("self", parent_session_id="self", child_session_ids=("self",)),
    ]
    assert store.save_sessions(loop) == 3
    for one in loop:
        store.save_session(one)
        store.update_session(one.session_id, manual_parent_session_id=one.parent_session_id)
        assert store.save_usage(one.session_id, [usage(one.session_id)]) == 1
        assert len(store.find_events(parent_session_id=one.parent_session_id)) == 1
    tree = [(node.session.session_id, node.depth) for node in store.session_tree()]
    assert tree == [("a", 0), ("b", 1), ("self", 0)]
    assert [node.session.session_id for node in store.session_tree("b")] == ["b", "a"]
    assert {one.session_id for one in store.get_sessions(parent_session_id="self")} == {"self"}
    for session_id in ("a", "self", "b"):
        store.delete_session(session_id)
    assert store.get_sessions() == []


# --- Commands -------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]

#: What no output may hold: C0 but the line's end, DEL, C1, directions, line ends, surrogates.
OBEYED = re.compile(
    "[\0-\t\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
#: All of that, and what a terminal obeys most gladly.
CONTROLS = (
    "".join(map(chr, [*range(32), *range(0x7F, 0xA0), *range(0x2028, 0x202F)]))
    + "\u061c\u200e\u200f\u2066\u2067\u2068\u2069\ufeff\U000e0041\udcff\ud800"
    + " \x1b]0;owned\x07 \x1b]52;c;b3duZWQ=\x07 \x1b]8;;http://x\x1b\\ \x1b[6n \x1b[2J"
)
#: An id, and a name of anything else, that many would take for their own.
MIXED = "'; DROP TABLE sessions; -- $(touch owned) `touch owned` \\! %s \u202eevil\u2028x"
#: What every option gets; the first is an id. No system passes NUL, nor what it did not decode.
ARGUMENTS = [MIXED, re.sub("[\0\ud800]", "", CONTROLS), "x" * 2**20]


def check_told(arguments: Sequence[str], status: int, out: str, err: str) -> None:
    """A command ends as documented, says at most one line about it, and prints text only."""
    told = [line for line in err.splitlines() if not line.startswith("warning: a password")]
    findings = arguments[0] == "maintain" and out != ""  # which its status sums up
    assert status in ((0, 1, 3) if findings else (0, 1, 2))
    assert not OBEYED.search(out + err), (OBEYED.search(out + err), arguments[:3])
    assert "Traceback" not in err
    assert len(err) < 50_000
    if status == 2:
        *usage, error = told
        assert usage[0].startswith("usage: contextuate-persist")
        assert all(line.startswith("  ") for line in usage[1:])
        told = [error]
    if findings or (arguments[0] == "import" and status == 1):
        return  # it has a line for each finding, and each line that it refuses
    assert len(told) == 1 if status else len(told) <= 1
    if status:
        assert re.match("contextuate-persist( [a-z]+)?: error: ", told[0])


@pytest.fixture
def run(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Iterator[Run]:
    """Run commands in an empty directory; afterwards, nothing of what they were given was run."""
    monkeypatch.setenv(ENVIRONMENT_URL, database.url)
    monkeypatch.setenv("COLUMNS", "100")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(arguments)
        except SystemExit as error:
            status = int(error.code or 0)
        out, err = capsys.readouterr()
        check_told(arguments, status, out, err)
        return status, out, err

    yield run_command
    assert list(empty.iterdir()) == []
    # All tables are there, or this raises.
    database.execute("SELECT 1 FROM sessions, events, deleted_sessions, schema_version LIMIT 1")


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def commands() -> dict[str, list[argparse.Action]]:
    """Every command with its options and arguments that take a value."""
    (found,) = make_parser()._subparsers._group_actions  # type: ignore[union-attr]
    parsers: dict[str, argparse.ArgumentParser] = found.choices  # type: ignore[assignment]
    return {
        name: [action for action in parser._actions if action.nargs != 0]
        for name, parser in parsers.items()
    }


def test_every_option_of_every_command_takes_hostile_text_or_refuses_it_in_one_line(
    run: Run, store: BaseStore, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_session(session())
    required = {
        "events": ["s"],
        "import": ["/dev/null"],
        "hook": ["show"],
        "setup": [backend],
        "spool": ["status"],
        "dead": ["list"],
        "backup": ["--recipient", "/dev/null"],
        "restore": ["/dev/null"],
        # They would do what they are asked to.
        "prune": ["--dry-run"],
        "archive": ["--dry-run", "--to", "nowhere"],
        "maintain": ["daily"],
    }
    for variable in ("PG_PORT", "MYSQL_PORT"):
        monkeypatch.setenv(variable, "1")  # where no server is
    for command, actions in commands().items():
        for action, text in itertools.product(actions, ARGUMENTS):
            if action.option_strings:
                given = [*required.get(command, []), f"{action.option_strings[0]}={text}"]
            else:
                given = ["--", text]
            status, out, _ = run(command, *given)
            assert out == "" or status == 0 or command == "maintain"
    assert store.get_session("s") is not None


def test_words_that_are_no_option_are_refused_in_one_line(run: Run) -> None:
    without_arguments = [
        command
        for command, actions in commands().items()
        if all(action.option_strings for action in actions)
    ]
    assert {"init", "upgrade", "sample", "status"} <= set(without_arguments)
    for text in [*ARGUMENTS, *HOSTILE]:
        for command in without_arguments:
            assert run(command, "--", text)[0] == 2
        assert run(text)[0] == 2
        assert run("find", "--session", text, "--limit", text)[0] == 2


@pytest.fixture
def full(store: BaseStore) -> BaseStore:
    """A store of hostile text, in every field that may hold it."""
    texts = {text: text for text in [*HOSTILE, MIXED]} | {"controls": CONTROLS}
    loop = {"controls": MIXED, MIXED: "%", "%": "controls", "_": "controls"}
    children = {MIXED: tuple(f"c{n:05}" for n in range(10_000))}
    store.save_sessions(
        session(
            session_id,
            machine_id=session_id,
            working_directory=text,
            agent_type=text,
            label=(text * 2**14)[: 2**14 - 1],
            model=text,
            transcript_path=text,
            parent_session_id=loop.get(session_id),
            child_session_ids=children.get(session_id, (session_id,)),
        )
        for session_id, text in texts.items()
    )
    store.save_session(session("unlabelled", working_directory=CONTROLS))
    events = [event("megabyte", data={"toolInput": CONTROLS * 2**13})]
    for session_id, text in texts.items():
        payloads: list[dict[str, Any]] = [
            {"toolName": text, "toolUseId": text, "toolInput": {"command": text}},
            {"subagent": text, "error": {text: [text, {text: None}]}},
            {text: {text: [text]}, "message": text},
            {text: text},
        ]
        names = {"event_type": MIXED, "hook_type": MIXED, "machine_id": session_id}
        events += [
            event(session_id, data=data, working_directory=text, **names) for data in payloads
        ]
    store.save_events(events)
    return store


def test_a_store_of_hostile_text_is_shown_line_by_line_and_never_obeyed(
    run: Run, full: BaseStore
) -> None:
    sessions = len(full.get_sessions())
    events = len(full.get_all_recent_events(1000))
    for command, rows in (
        (["sessions"], 1 + sessions),
        (["sessions", "--parent", "controls"], 1 + 2),
        (["tree"], sessions),
        (["tree", MIXED], 4),
        (["events", MIXED], 1 + 4),
        (["events", "controls"], 1 + 4),
        (["find", "--limit", "1000"], 1 + events),
        (["recent", "--limit", "1000"], 1 + events),
        (["status"], 9),
    ):
        status, out, _ = run(*command)
        assert (status, len(out.splitlines())) == (0, rows), command
        assert max(map(len, out.splitlines())) <= 100


def test_json_gives_hostile_text_back_exactly(run: Run, full: BaseStore) -> None:
    sessions = records(run("sessions", "--json")[1])
    assert [SessionMeta.from_wire(one) for one in sessions] == full.get_sessions()
    nodes = records(run("tree", "--json")[1])
    assert [(SessionMeta.from_wire(one), one["depth"]) for one in nodes] == full.session_tree()
    kept = full.get_all_recent_events(1000)
    shown = records(run("recent", "--limit", "1000", "--json")[1])
    assert [MonitorEvent.from_wire(one) for one in shown] == kept
    assert [one["cursor"] for one in shown] == [str(one.cursor) for one in kept]
    assert records(run("find", "--limit", "1000", "--json")[1]) == shown


@pytest.mark.parametrize("text", ['{"$gt": ""}', "-x", MIXED])
def test_hostile_text_finds_what_holds_it_and_nothing_else(
    run: Run, store: BaseStore, text: str
) -> None:
    data = {"toolName": text, "toolUseId": text, text: [text]}
    names = {"machine_id": text, "parent_session_id": text, "event_type": text, "hook_type": text}
    wanted = event(text, data=data, **names)
    store.save_events([wanted, event("other")])
    store.save_session(session(text, machine_id=text, manual_parent_session_id=text))
    options = ("session", "machine", "parent", "type", "hook", "tool", "tool-use-id")
    given = [f"--{name}={text}" for name in options]
    given.append(f"--contains={json.dumps({text: [text]})}")
    for command in (["find", *given], ["events", "--", text], ["find", given[0]]):
        (found,) = records(run("--json", *command)[1])
        assert MonitorEvent.from_wire(found) == wanted
    for command in (["sessions", f"--parent={text}", f"--machine={text}"], ["tree", "--", text]):
        (found,) = records(run("--json", *command)[1])
        assert found["sessionId"] == text


def hostile_files(root: Path) -> tuple[list[SessionMeta], MonitorEvent, int]:
    """Write a file store of hostile text; what of it can be kept, and how much cannot."""
    flags = {"is_pinned": False, "hidden": False, "is_user_initiated": True}
    texts = dict.fromkeys(("label", "model", "agent_type", "transcript_path"), CONTROLS)
    sessions = [
        session(MIXED, parent_session_id="../etc", child_session_ids=("../etc",), **flags),
        session("../etc", parent_session_id=MIXED, child_session_ids=(MIXED,), **flags, **texts),
    ]
    refused = [
        session("label", label="x" * 2**20),
        session("\x1b[2J", working_directory=CONTROLS),
        session("child", child_session_ids=(CONTROLS,)),
    ]
    sent = event(MIXED, data={CONTROLS: CONTROLS * 2**13, "toolName": MIXED})
    lines = [
        json.dumps(event(CONTROLS).to_wire()).encode(),
        json.dumps(event(event_type="\u202e" * 2**20).to_wire()).encode(),
        json.dumps({"id": CONTROLS}).encode(),
        CONTROLS.replace("\n", "").encode("utf-8", "surrogatepass"),
        json.dumps(sent.to_wire()).encode(),
        b'{"\xff": 1}',
        b'{"data": NaN}',
        b"9" * 5000,
        b"[" * 10**5,
        b"\0",
    ]
    for n, one in enumerate([*sessions, *refused]):
        directory = root / "sessions" / f"{n}\x1b[2J\r\u202e\udcff"
        directory.mkdir(parents=True)
        (directory / "meta.json").write_text(json.dumps(one.to_wire()))
    (directory / "events.jsonl").write_bytes(b"\n".join(lines))
    return sessions, sent, len(refused) + len(lines) - 1


def test_an_import_of_hostile_files_names_what_it_refuses_and_keeps_the_rest(
    run: Run, store: BaseStore, tmp_path: Path
) -> None:
    root = tmp_path / "\x1b]0;owned\x07\n\u2066\udcff $(touch owned)"
    sessions, sent, refused = hostile_files(root)
    status, out, err = run("import", str(root))
    assert status == 1
    assert f"2 sessions saved, {refused} refused" in out
    assert err.count("\n") == refused
    assert "meta.json:1: label: 1048576 characters, at most 16383 are kept\n" in err
    for _ in range(2):
        assert [store.get_session(one.session_id) for one in sessions] == sessions
        assert store.get_events(MIXED) == [sent]
        (report,) = records(run("import", "--json", "--undelete", str(root))[1])
        assert (report["path"], report["alreadyThere"]) == (str(root), 1)


@pytest.mark.parametrize(
    "text",
    [MIXED, "\x1b[2J\x9b31m", "x" * 2**16, "\udcff", "..", "~nobody-here/x", "[" * 2**16, "%ff%00"],
    ids=lambda text: ascii(text[:9]),
)
def test_hostile_settings_are_refused_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, text: str
) -> None:
    word = quote(text, safe="%", errors="surrogateescape")
    for url in (
        text,
        f"{backend}://127.0.0.1:1/{word}",
        f"{backend}://{word}@127.0.0.1:1/x",
        f"{backend}://u:{word}@127.0.0.1:1/x",
        f"{backend}://{word}/x",
        f"{backend}://127.0.0.1:{word}/x",
        f"{backend}://127.0.0.1:1/{text}",
        f"{backend}://127.0.0.1:1/x?option-file={word}",
        f"{backend}://127.0.0.1:1/x?host={word}",
        f"{backend}://127.0.0.1:1/x?{word}={word}",
        f"{backend}://127.0.0.1:1/x?{'socket' if backend == 'mysql' else 'host'}=/{word}",
    ):
        assert run("sessions", f"--url={url}")[:2] == (1, "")
        monkeypatch.setenv(ENVIRONMENT_URL, url)
        assert run("sessions")[:2] == (1, "")
    monkeypatch.delenv(ENVIRONMENT_URL)
    monkeypatch.setenv(ENVIRONMENT_CONFIG, text)
    assert run("sessions")[:2] == (1, "")
    file = tmp_path / "config.json"
    file.touch(0o600)
    monkeypatch.setenv(ENVIRONMENT_CONFIG, str(file))
    here = {"host": "127.0.0.1", "port": 1}
    for block in (
        {"type": text},
        {"type": backend, text: text},
        {"type": backend, "database": {text: text}},
        {"type": backend, "database": {"passwordFile": text}},
        *(
            {"type": backend, "database": here | {key: text}}
            for key in ("user", "database", "host", "socket", "optionFile")
        ),
        {"type": backend, "database": here | {"password": text, "tls": {"mode": text}}},
        {"type": backend, "database": here | {"tls": {"mode": "verify-ca", "ca": text}}},
    ):
        file.write_text(json.dumps({"persistence": block}))
        assert run("sessions")[:2] == (1, ""), block
    file.write_text(text, errors="surrogateescape")
    assert run("sessions")[:2] == (1, "")


@pytest.fixture
def named_database(server: Server) -> Iterator[str]:
    """An empty database whose name would like to be executed; its owner's URL."""
    name = "'; DROP TABLE sessions; -- $(touch owned) \x1b[2J\u202e"
    quoted = f'"{name}"' if server.kind == "postgresql" else f"`{name}`"
    server.execute(f"CREATE DATABASE {quoted}")
    yield server.url(name)
    server.execute(f"DROP DATABASE {quoted}")


def test_a_hostile_database_name_is_only_a_name(run: Run, named_database: str) -> None:
    assert run("sessions", "--url", named_database)[0] == 1
    assert run("upgrade", "--dry-run", "--url", named_database)[0] == 0
    for command in ("init", "upgrade", "sample", "sessions", "tree", "recent", "status"):
        assert run(command, "--url", named_database)[0] == 0
    assert len(run("sessions", "--json", "--url", named_database)[1].splitlines()) == 4


# --- A real terminal ------------------------------------------------------------------------------


def on_terminals(
    commands: Sequence[Sequence[str | bytes]], url: str, directory: Path
) -> list[tuple[int, str]]:
    """Run commands beside one another, each on a terminal of its own: exit status, all it got."""
    environment = {**os.environ, ENVIRONMENT_URL: url, "COLUMNS": "100", "TERM": "xterm-256color"}
    running: list[tuple[subprocess.Popen[bytes], int]] = []
    done: list[tuple[int, str]] = []
    for command in commands:
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "contextuate_persist", *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=directory,
            env=environment,
        )
        os.close(slave)
        running.append((process, master))
    for process, master in running:
        with process, open(master, "rb", buffering=0) as terminal:
            got = b""
            with contextlib.suppress(OSError):  # so Linux says that the other side has left
                while part := terminal.read(2**16):
                    got += part
            done.append((process.wait(60), got.decode()))
    return done


def test_a_real_terminal_gets_text_only(
    full: BaseStore, database: Database, tmp_path: Path
) -> None:
    root = tmp_path / "\x1b]0;owned\x07\n\u2066\udcff"
    hostile_files(root)
    (tmp_path / "empty").mkdir()
    commands: list[tuple[int, Sequence[str | bytes]]] = [
        (0, ["sessions"]),
        (0, ["recent", "--limit", "1000", "--json"]),
        (1, ["events", b"\xff\x1b[2J\x9b31m"]),
        (1, ["tree", "-v", "\u202e\u2028x"]),
        (1, ["import", "-v", str(root)]),
    ]
    done = on_terminals([command for _, command in commands], database.url, tmp_path / "empty")
    for (expected, command), (status, got) in zip(commands, done, strict=True):
        assert status == expected
        assert not OBEYED.search(got.replace("\r", "")), command  # the progress bar goes back
        assert ("Traceback" in got) == ("tree" in command and "-v" in command)
        assert "\\u202e" in got or "U+DCFF" in got
    assert list((tmp_path / "empty").iterdir()) == []
