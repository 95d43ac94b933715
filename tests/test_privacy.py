"""`contextuate-persist forget`: what goes, wherever it lies, and what is said of the rest."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import EventWriter, inbox, queued
from contextuate_persist.base import BaseStore
from contextuate_persist.config import ENVIRONMENT_URL
from contextuate_persist.dead_letters import DeadLetters
from contextuate_persist.hooks import new_event_id
from contextuate_persist.privacy import REMAINS
from contextuate_persist.queued import Refused
from contextuate_persist.spool import Record, Spool, spool_state
from contextuate_persist.writer import ENVIRONMENT_SPOOL
from tests.asking import asked
from tests.builders import T0, event, session, usage
from tests.conftest import Database, make_store
from tests.test_cli import HOSTILE, Run, harmless, records, run
from tests.test_daemon import Daemon, daemon, eventually, file_of
from tests.test_forget import MARKER, rows, told

__all__ = ["daemon", "run"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the spool and the inbox."""
    monkeypatch.setenv(ENVIRONMENT_SPOOL, str(tmp_path / "spool"))
    monkeypatch.setenv("CONTEXTUATE_INBOX", str(tmp_path / "inbox"))
    return tmp_path


def nowhere() -> BaseStore:
    return make_store("postgresql://127.0.0.1:1/nobody", connect_timeout=1)


def left_waiting(writer: EventWriter) -> None:
    writer.close(0)


def capture(session_id: str, machine: str = "machine", **payload: Any) -> bytes:
    """A file as the hook command leaves it."""
    told = {
        "session_id": session_id,
        "cwd": "/work",
        "hook_event_name": "UserPromptSubmit",
        **payload,
    }
    return json.dumps(
        {
            "id": new_event_id(T0),
            "capturedAt": T0,
            "machineId": machine,
            "parentSession": None,
            "payload": base64.b64encode(json.dumps(told).encode()).decode(),
        }
    ).encode()


def files(home: Path) -> bytes:
    """All that lies on this machine, with the payloads of the hooks as they were."""
    held: list[bytes] = []
    for path in home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            held.append(content)
            if path.parent.name in ("inbox", "bad"):
                try:
                    held.append(base64.b64decode(json.loads(content)["payload"]))
                except ValueError:
                    continue
    return b"\n".join(held)


def fill(home: Path) -> None:
    """A queue of mixed sessions: s with its sub-agents, and their neighbours."""
    writer = EventWriter(nowhere())
    writer.init()
    for n in range(5):
        writer.put(told("s", timestamp=T0 + n))
        writer.put(event("neighbour", T0 + n))
        # Nobody but the queue knows that it worked for s.
        writer.put(told("agent", timestamp=T0 + n, parent_session_id="s"))
    writer.put_session(session("s", label=MARKER))
    writer.put_session(session("neighbour", child_session_ids=("s", "other"), label="kept"))
    writer.update_session("s", label=MARKER)
    writer.update_session("neighbour", child_session_ids=["s", "x"], hidden=True)
    writer.put(event("s", data={"x": float("nan"), "y": MARKER}))
    writer.put(event("neighbour", data={"x": float("nan")}))
    left_waiting(writer)
    letters = DeadLetters(home / "spool" / "dead")
    letters.add(Refused("event", told("s").to_wire(), "teapot"), T0)
    letters.add(Refused("session", session("agent", label=MARKER).to_wire(), "teapot"), T0)
    letters.add(Refused("update", ["s", {"label": MARKER}], "teapot"), T0)
    impossible = event("no id\0", parent_session_id="s", data={"x": MARKER}).to_wire()
    letters.add(Refused("event", impossible, "no id"), T0)
    letters.add(Refused("event", event("neighbour").to_wire(), "teapot"), T0)
    place = home / "inbox"
    inbox.leave(place, capture("s", prompt=MARKER))
    inbox.leave(place, capture("neighbour", prompt="kept"))
    inbox.leave(place, capture("s", prompt=MARKER, agent_id="a" * 16, agent_type="Explore"))
    hidden = place / ".00000000000000000001-unfinished.json"
    hidden.write_bytes(capture("s", prompt=MARKER))
    os.utime(hidden, (time.time() - 7200,) * 2)


def fill_database(store: BaseStore) -> None:
    store.save_session(session("s", label=MARKER, is_pinned=True, transcript_path="/t/s.jsonl"))
    store.save_session(session("below", parent_session_id="s"))
    store.save_events([told("s"), told("below"), event("neighbour")])
    store.save_usage("s", [usage("m1")])


# --- Everything -----------------------------------------------------------------------------------


def test_a_session_is_found_nowhere_afterwards_and_its_neighbours_are_as_before(
    run: Run, home: Path, store: BaseStore, database: Database
) -> None:
    fill(home)
    fill_database(store)
    before = store.get_session("neighbour"), store.get_events("neighbour")
    assert MARKER.encode() in files(home)
    status, out, err = run("forget", "--session", "s", "--dry-run", "--json")
    assert (status, err) == (0, "")
    [dry] = records(out)
    status, out, err = run("forget", "--session", "s", "--yes", "--json")
    assert (status, err) == (0, "")
    [real] = records(out)
    assert dry | {"dryRun": False} == real
    assert real == {
        "session": "s",
        "dryRun": False,
        "removed": {
            "spool": 13,
            "inbox": 3,
            "deadLetters": 4,
            "sessions": 2,
            "events": 2,
            "messages": 1,
        },
        "left": [],
        "transcripts": ["/t/s.jsonl"],
        "mayRemain": REMAINS,
    }
    assert MARKER.encode() not in files(home)
    assert MARKER not in rows(database)
    assert (store.get_session("neighbour"), store.get_events("neighbour")) == before
    # What waits of the others is stored, once, in order, without naming s.
    assert run("spool", "replay")[0] == 0
    assert len(store.get_events("neighbour")) == 6
    neighbour = store.get_session("neighbour")
    assert neighbour is not None
    assert (neighbour.label, neighbour.hidden, neighbour.child_session_ids) == (
        "kept",
        True,
        ("x",),
    )
    assert len(list((home / "inbox").glob("0*.json"))) == 1
    letters = [*DeadLetters(home / "spool" / "dead")]
    assert [one.content.record["sessionId"] for one in letters] == ["neighbour"] * 2


@pytest.mark.parametrize(
    ("option", "value", "place"),
    [
        ("--machine", f"{MARKER}%_", {"machine_id": f"{MARKER}%_"}),
        ("--directory", f"/{MARKER}/%_", {"working_directory": f"/{MARKER}/%_"}),
        ("--directory", f"/{MARKER}", {"working_directory": f"/{MARKER}/\udcff\0"}),
    ],
)
def test_a_machine_and_a_directory_are_found_nowhere_afterwards(
    run: Run,
    home: Path,
    store: BaseStore,
    database: Database,
    option: str,
    value: str,
    place: dict[str, str],
) -> None:
    near = {name: text.replace(MARKER, "near") for name, text in place.items()}
    writer = EventWriter(nowhere())
    writer.init()
    for where in (place, near):
        writer.put(event("passing", **where))
        writer.put_session(session(f"own{where == near}", **where))
        writer.put(event(f"own{where == near}", data={"x": str(where == near)}))
        writer.put(event("below", parent_session_id=f"own{where == near}"))
        writer.update_session(f"updated{where == near}", **where)
        writer.put(event("bad", data={"x": float("nan")}, **where))
    left_waiting(writer)
    for where in (place, near):
        told_of = capture(
            "hooked", where.get("machine_id", "m"), cwd=where.get("working_directory", "/w")
        )
        inbox.leave(home / "inbox", told_of)
    store.save_session(session("stored", **place))
    store.save_event(event("stored"))
    status, out, err = run("forget", option, value, "--yes", "--json")
    assert (status, err) == (0, "")
    assert records(out)[0]["removed"] | {"messages": 0} == {
        "spool": 7,
        "inbox": 1,
        "deadLetters": 0,
        "sessions": 1,
        "events": 1,
        "messages": 0,
    }
    assert MARKER not in rows(database)
    assert MARKER.encode() not in files(home)
    assert run("spool", "replay")[0] == 0
    # "below" worked for both, and which of the two events came first told whom it belonged to.
    assert {one.session_id for one in store.get_sessions()} == {"passing", "ownTrue"}
    assert store.get_events("passing")[0].machine_id == near.get("machine_id", "machine")


def test_what_is_below_it_in_the_database_is_removed_from_the_queue_too(
    run: Run, home: Path, store: BaseStore, database: Database
) -> None:
    store.save_session(session("s"))
    store.save_session(session("below", parent_session_id="s"))
    store.save_session(session("moved", parent_session_id="s", manual_parent_session_id="folder"))
    writer = EventWriter(nowhere())
    writer.init()
    writer.put(told("below"))
    writer.put(event("moved", parent_session_id="s"))
    left_waiting(writer)
    [told_of] = records(run("forget", "--session", "s", "--yes", "--json")[1])
    assert (told_of["removed"]["spool"], told_of["removed"]["sessions"]) == (1, 2)
    assert run("spool", "replay")[0] == 0
    assert [one.parent_session_id for one in store.get_events("moved")] == [None]
    assert store.get_session("s") is None


def test_what_waits_or_was_refused_of_neighbours_names_it_no_more_and_can_still_be_stored(
    run: Run, home: Path, store: BaseStore, database: Database
) -> None:
    gone = f"{MARKER} itself"
    store.save_session(session(gone))
    moved = session(
        "moved",
        parent_session_id=gone,
        manual_parent_session_id="folder",
        child_session_ids=(gone, "other"),
        label="kept",
    )
    store.save_session(replace(moved, child_session_ids=()))
    late = event("moved", parent_session_id=gone)
    update = {"child_session_ids": [gone, "more"], "manual_parent_session_id": gone}
    writer = EventWriter(nowhere())
    writer.init()
    writer.put_session(moved)
    writer.update_session("moved", parent_session_id=gone, is_pinned=True)
    left_waiting(writer)
    letters = DeadLetters(home / "spool" / "dead")
    refused = [
        Refused("event", late.to_wire(), "teapot"),
        Refused("session", moved.to_wire(), "teapot"),
        Refused("update", ["moved", {**update, "hidden": True}], "teapot"),
        Refused("update", ["moved", {"parent_session_id": gone}], "teapot"),
        Refused("event", event("other", data={"n": 2**70}).to_wire(), "teapot"),
        Refused("session", {"sessionId": "odd", "childSessionIds": [[], 1]}, "teapot"),
        Refused("update", ["odd", "no fields"], "teapot"),
    ]
    before = [letters.add(one, T0 + number) for number, one in enumerate(refused)]
    whole = (letters.directory / f"{before[4]}.json").read_bytes()
    [told_of] = records(run("forget", "--session", gone, "--yes", "--json")[1])
    assert (told_of["left"], told_of["removed"]["deadLetters"]) == ([], 0)
    assert MARKER.encode() not in files(home)
    assert MARKER not in rows(database, "deleted_sessions")
    assert letters.ids() == before
    assert (letters.directory / f"{before[4]}.json").read_bytes() == whole
    assert run("spool", "replay")[0] == 0
    status, out, _ = run("dead", "replay")
    assert (status, out) == (1, "5 stored, 0 there already, 2 still refused\n")
    assert store.get_events("moved") == [replace(late, parent_session_id=None)]
    kept = store.get_session("moved")
    assert kept is not None
    assert (kept.manual_parent_session_id, kept.parent_session_id) == ("folder", None)
    assert (kept.child_session_ids, kept.label) == (("more",), "kept")
    assert (kept.hidden, kept.is_pinned) == (True, True)
    assert MARKER not in rows(database, "deleted_sessions")


def test_letters_that_a_version_before_could_not_read_go_where_this_one_can(
    run: Run, home: Path, store: BaseStore
) -> None:
    """As a record of a newer version is set aside by an older one, until that is gone."""
    gone = f"{MARKER} itself"
    letters = DeadLetters(home / "spool" / "dead")
    spooled = [
        session(gone, label="its own"),
        session("below", parent_session_id=gone),
        session("moved", parent_session_id=gone, manual_parent_session_id="folder"),
        queued.Update("other", {"parent_session_id": gone, "hidden": True}),
        queued.Refused("session", session(gone).to_wire(), "teapot"),
    ]
    for number, value in enumerate(spooled):
        letters.add(queued.unreadable(queued.to_body(value), "then"), T0 + number)
    store.save_session(session("other"))
    store.update_session("other", manual_parent_session_id="folder")
    strange = letters.add(queued.unreadable(b"Zzz", "then"), T0 + 9)
    status, out, _ = run("forget", "--session", gone, "--yes", "--json")
    [told_of] = records(out)
    assert (status, told_of["removed"]["deadLetters"]) == (1, 3)
    [left] = told_of["left"]
    assert f"{strange}.json: cannot be read" in left
    assert all(MARKER.encode() not in body for body in bodies(letters))
    (letters.directory / f"{strange}.json").unlink()
    assert run("dead", "replay")[:2] == (0, "2 stored, 0 there already, 0 still refused\n")
    assert {one.session_id: one.parent_session_id for one in store.get_sessions()} == {
        "moved": None,
        "other": None,
    }


def bodies(letters: DeadLetters) -> list[bytes]:
    return [base64.b64decode(letter.content.record) for letter in letters]


def test_nothing_is_made_where_nothing_is(run: Run, home: Path, store: BaseStore) -> None:
    for more in ("--dry-run", "--yes"):
        status, out, err = run("forget", "--directory", "/nobody", more)
        assert (status, err) == (0, "")
        assert "0 sessions, 0 events" in out
    assert list(home.iterdir()) == []


# --- What cannot be removed -----------------------------------------------------------------------


def test_a_daemon_that_works_on_the_spool_is_told_and_then_it_can_be_finished(
    run: Run, home: Path, store: BaseStore, database: Database
) -> None:
    fill(home)
    fill_database(store)
    spool = Spool(home / "spool")
    spool.open()
    taken = inbox.Inbox(home / "inbox")
    taken.open()
    before = spool_state(home / "spool")
    for option, value in (("--session", "s"), ("--machine", "machine")):
        status, _, err = run("forget", option, value, "--yes")
        assert status == 1
        assert "a daemon works on it" in err
        assert "a daemon takes what is there" in err
        assert ("may be stored yet" in err) == (option == "--machine")
        assert "forget again" in err
    assert spool_state(home / "spool") == before
    assert MARKER not in rows(database)
    assert DeadLetters(home / "spool" / "dead").ids() == []
    spool.close()
    taken.close()
    assert run("forget", "--session", "s", "--yes")[0] == 0
    assert MARKER.encode() not in files(home)
    assert run("spool", "replay")[0] == 0


def test_with_the_monitor_daemon_it_takes_two_runs(
    run: Run, home: Path, store: BaseStore, database: Database, daemon: Daemon
) -> None:
    daemon.start()
    payload = {"session_id": "s", "cwd": "/w", "hook_event_name": "UserPromptSubmit"}
    inside = {"agent_id": "a" * 16, "agent_type": "Explore"}
    for more in ({}, inside):
        inbox.leave(daemon.inbox, file_of({**payload, **more, "prompt": MARKER}, T0))
    inbox.leave(daemon.inbox, file_of({**payload, "session_id": "other", "prompt": "kept"}, T0))
    eventually(lambda: len(store.get_all_recent_events()) == 3)
    status, _, err = run("forget", "--session", "s", "--yes")
    assert (status, err.count("stop it and forget again")) == (1, 2)
    assert MARKER not in rows(database)
    assert daemon.stop() == 0
    assert run("forget", "--session", "s", "--yes")[0] == 0
    assert MARKER.encode() not in files(home)
    assert [one.session_id for one in store.get_sessions()] == ["other"]


def test_what_waits_in_a_daemon_does_not_bring_a_session_back(
    run: Run, home: Path, store: BaseStore
) -> None:
    with EventWriter(store, batch_seconds=2) as writer:
        receipt = writer.put(told("s"))
        assert run("forget", "--session", "s", "--yes")[0] == 1
        assert receipt.wait_stored(30)
        assert writer.health().stored == 0
    assert store.get_sessions() == []


def test_what_cannot_be_read_is_named(run: Run, home: Path, store: BaseStore) -> None:
    fill(home)
    spool = Spool(home / "spool")
    spool.open()
    spool.close()
    [path] = (home / "spool").glob("*.log")
    data = bytearray(path.read_bytes())
    data[-10] ^= 1  # a record that the disk has lost
    path.write_bytes(data)
    bad = home / "inbox" / "bad"
    bad.mkdir()
    (bad / "1.json").write_bytes(b"\x1b[2J")
    (bad / "1.json.why").write_text("it is no JSON")
    (bad / "2.json").write_bytes(capture("s", prompt=MARKER))
    (bad / "2.json.why").write_text("no reason")
    (bad / "3.json").symlink_to("/etc/passwd")
    (home / "spool" / "dead" / f"{T0}-{'a' * 12}.json").write_bytes(b"?")
    status, out, err = run("forget", "--session", "s", "--yes")
    assert status == 1
    assert out.count(" 4 files in ") == 1
    named = [line for line in err.splitlines() if "cannot be read" in line]
    assert [Path(line.split(": ")[1]).parent.name for line in named] == [
        "damaged",
        "bad",
        "bad",
        "dead",
    ]
    assert sorted(path.name for path in bad.iterdir()) == ["1.json", "1.json.why", "3.json"]
    assert MARKER.encode() not in files(home)


def test_a_spool_file_that_cannot_be_read_is_named_by_a_dry_run(
    run: Run, home: Path, store: BaseStore
) -> None:
    fill(home)
    path = home / "spool" / f"{1:020d}-{'0' * 16}.log"
    path.mkdir()
    status, _, err = run("forget", "--session", "s", "--dry-run")
    assert (status, f"{path}: Is a directory" in err) == (0, True)


def test_a_file_that_a_killed_hook_has_not_finished_is_named(
    run: Run, home: Path, store: BaseStore
) -> None:
    place = home / "inbox"
    inbox.leave(place, capture("neighbour"))
    for name, content in {
        "1": capture("s", prompt=MARKER),
        "2": capture("neighbour"),
        "3": capture("s")[:-20],
    }.items():
        (place / f".{name:0>20}-{'a' * 32}.json").write_bytes(content)
    status, _, err = run("forget", "--session", "s", "--yes")
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith(f"not removed: {place}/.{'1':0>20}-")
    assert len(list(place.glob(".*.json"))) == 3


def test_records_of_another_version_are_counted_and_kept(
    run: Run, home: Path, store: BaseStore
) -> None:
    spool = Spool(home / "spool")
    spool.open()
    spool.append([Record(1, T0, b"Zzz"), Record(2, T0, b"Yyy")])
    spool.close()
    status, _, err = run("forget", "--session", "s", "--yes")
    assert (status, err.count("\n")) == (1, 1)
    assert "2 records of another version" in err
    assert spool_state(home / "spool").records == 2


def test_a_run_that_is_killed_is_completed_by_the_next(
    home: Path, store: BaseStore, database: Database
) -> None:
    program = """
import os, sys
from contextuate_persist import cli, privacy
limit, calls = int(sys.argv[1]), 0
def counted(function):
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls == limit:
            os._exit(9)
        return function(*arguments, **named)
    return call
for place, name in (
    (privacy.Spool, "_replace"), (privacy.inbox, "remove_file"), (privacy.DeadLetters, "remove"),
    (privacy.Path, "rename"), (privacy.BaseStore, "_forget_sessions"),
    (privacy.BaseStore, "_forget_copies"),
):
    setattr(place, name, counted(getattr(place, name)))
sys.exit(cli.main(["forget", "--session", "s", "--yes"]))
"""
    fill(home)
    fill_database(store)
    environment = {**os.environ, ENVIRONMENT_URL: database.url}
    status, limit = 9, 0
    while status == 9:
        limit += 1
        done = subprocess.run(
            [sys.executable, "-c", program, str(limit)],
            capture_output=True,
            timeout=60,
            check=False,
            env=environment,
        )
        status = done.returncode
    assert (status, limit > 5) == (0, True), done.stderr
    assert MARKER.encode() not in files(home)
    assert MARKER not in rows(database)
    assert spool_state(home / "spool").records == 8
    assert len(store.get_events("neighbour")) == 1


# --- Asking and telling ---------------------------------------------------------------------------


def test_without_a_terminal_it_has_to_be_said(
    run: Run, home: Path, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_database(store)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    status, out, err = run("forget", "--session", "s")
    assert (status, out) == (1, "")
    assert err == (
        "contextuate-persist: error: forget: nothing was removed: "
        "give --yes to remove it, unasked\n"
    )
    status, out, err = run("forget", "--session", "s", "--dry-run")
    assert (status, err) == (0, "")
    assert "2 sessions, 2 events, 1 messages" in out
    assert out.splitlines()[0] == "session s: found"
    assert out.splitlines()[-1] == "  transcript    /t/s.jsonl"
    assert store.get_session("s") is not None


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_was_found_is_seen_before_the_question(
    home: Path, store: BaseStore, database: Database, options: list[str]
) -> None:
    fill_database(store)
    place = {ENVIRONMENT_URL: database.url}
    told_of, shown, out = asked("forget", "--session", "s", *options, **place)
    assert b"2 sessions, 2 events" in (told_of if options else shown)
    if options:
        (record,) = records((shown + out).decode())
        assert record["removed"]["sessions"] == 2


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_on_a_terminal_it_is_asked(
    home: Path, store: BaseStore, database: Database, answer: str
) -> None:
    fill_database(store)
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    done = subprocess.run(
        [sys.executable, "-m", "contextuate_persist", "forget", "--session", "s"],
        stdin=theirs,
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, ENVIRONMENT_URL: database.url},
    )
    os.close(ours)
    os.close(theirs)
    assert b"Forget all this? Nothing brings it back. [y/N]" in done.stderr
    assert b"2 sessions, 2 events" in done.stdout
    assert (done.returncode, store.get_session("s") is None) == (
        (0, True) if answer == "y" else (1, False)
    )


def test_hostile_names_do_no_harm(run: Run, home: Path, store: BaseStore) -> None:
    path = f"/{HOSTILE}"
    store.save_session(session("s", working_directory=path, transcript_path=path))
    store.save_event(event("t", working_directory=f"{path}/x"))
    status, out, err = run("forget", "--directory", path, "--yes")
    assert (status, err) == (0, "")
    assert harmless(out)
    assert "2 sessions, 1 events" in out
    assert all(text in out for text in REMAINS.values())
    [told_of] = records(run("forget", "--directory", path, "--yes", "--json")[1])
    assert told_of["directory"] == path
    status, out, err = run("forget", "--session", HOSTILE, "--yes")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert harmless(err)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((), 2),
        (("--session", "s", "--machine", "m"), 2),
        (("--session", "", "--yes"), 1),
        (("--directory", "here", "--yes"), 1),
        (("--directory", "", "--yes"), 1),
    ],
)
def test_a_wrong_command_line_is_told_as_such(
    run: Run, home: Path, arguments: tuple[str, ...], status: int
) -> None:
    found, out, err = run("forget", *arguments)
    assert (found, out) == (status, "")
    assert "error:" in err
