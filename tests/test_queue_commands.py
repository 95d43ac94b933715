"""`contextuate-persist spool` and `dead`: what they show, what they do, what they never print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contextuate_persist import EventWriter, MonitorEvent, StoreUnavailable, inbox, queued
from contextuate_persist.base import BaseStore
from contextuate_persist.config import ENVIRONMENT_URL
from contextuate_persist.dead_letters import DeadLetters
from contextuate_persist.writer import ENVIRONMENT_SPOOL
from tests.builders import T0, event, session
from tests.conftest import Database, make_store
from tests.test_cli import HOSTILE, Run, run
from tests.test_poison import only_machine

__all__ = ["run"]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT_SPOOL, str(tmp_path / "spool"))
    monkeypatch.setenv(inbox.ENVIRONMENT_INBOX, str(tmp_path / "no inbox"))
    return tmp_path / "spool"


def fill(count: int) -> None:
    """Leave events in the spool, as a daemon does whose database is away."""
    store = make_store("postgresql://127.0.0.1:1/nobody", connect_timeout=1)
    writer = EventWriter(store)
    writer.init()
    for n in range(count):
        writer.put(event("s", T0 + n))
    assert writer.close(0) == count


def test_an_empty_spool_is_told_as_such(run: Run, directory: Path) -> None:
    status, out, err = run("spool", "status")
    assert (status, err) == (0, "")
    assert out == f"{directory}: nothing waits; 0 bytes on disk\n0 dead letters\n"
    status, out, _ = run("dead", "list")
    assert (status, out) == (0, "")


@pytest.mark.parametrize("command", [["spool", "status"], ["spool", "replay"], ["dead", "list"]])
def test_a_directory_that_is_none_is_refused(run: Run, tmp_path: Path, command: list[str]) -> None:
    place = tmp_path / "slip of the pen"
    status, out, err = run(*command, "--directory", str(place))
    assert (status, out) == (1, "")
    assert err == f"contextuate-persist: error: --directory: {place} is no directory\n"
    assert not place.exists()
    assert run(*command, "--directory", "")[0] == 2


def test_what_waits_in_the_inbox_is_told(
    run: Run, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "inbox"
    monkeypatch.setenv(inbox.ENVIRONMENT_INBOX, str(place))
    names = [inbox.leave(place, b"{}") for _ in range(3)]
    (place / ".begun").touch()
    with inbox.Inbox(place) as taking:
        taking.set_aside(names[0], "why")
    expected = f"{place}: 2 files wait for a daemon, 1 are in bad\n"
    status, out, _ = run("spool", "status")
    assert (status, out.endswith(expected)) == (0, True)
    [told] = map(json.loads, run("spool", "status", "--json")[1].splitlines())
    assert (told["inbox"], told["inboxFiles"], told["inboxBad"]) == (str(place), 2, 1)


def test_what_waits_is_told_and_stored(
    run: Run, directory: Path, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(5)
    status, out, _ = run("spool", "status")
    assert status == 0
    assert "5 wait, the oldest" in out
    with monkeypatch.context() as patch:
        patch.delenv(ENVIRONMENT_SPOOL)
        assert "5 wait, the oldest" in run("spool", "status", "--directory", str(directory))[1]
    [told] = map(json.loads, run("spool", "status", "--json")[1].splitlines())
    assert (told["records"], told["deadLetters"], told["directory"]) == (5, 0, str(directory))
    assert 0 <= told["oldestSeconds"] < 60
    status, out, err = run("spool", "replay")
    assert (status, err) == (0, "")
    assert out == "5 found: 5 stored, 0 there already, 0 set aside, 0 left\n"
    assert len(store.get_events("s")) == 5
    [told] = map(json.loads, run("spool", "replay", "--json")[1].splitlines())
    assert told == {"found": 0, "stored": 0, "duplicate": 0, "setAside": 0, "left": 0}


def test_what_is_stored_at_once_counts_as_found(
    run: Run, directory: Path, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = EventWriter.init

    def init(self: EventWriter) -> None:
        original(self)
        assert self.flush(30) == 0

    fill(5)
    monkeypatch.setattr(EventWriter, "init", init)
    status, out, _ = run("spool", "replay")
    assert (status, out) == (0, "5 found: 5 stored, 0 there already, 0 set aside, 0 left\n")


def test_what_lies_aside_is_told(run: Run, directory: Path, store: BaseStore) -> None:
    assert json.loads(run("spool", "status", "--json")[1])["asideBytes"] == 0
    with EventWriter(store) as writer:
        assert writer.put(event(data={"x": float("nan")})).wait_stored(30)
        aside = writer.health().aside_bytes
    (directory / "damaged").mkdir()
    (directory / "damaged" / "part").write_bytes(b"x" * 5000)
    lines = run("spool", "status")[1].splitlines()
    assert lines[1:] == [
        "1 dead letters; see `dead list`",
        f"{aside + 5000:,} bytes lie aside in dead and damaged, and count against what may wait",
    ]
    told = json.loads(run("spool", "status", "--json")[1])
    assert (told["deadLetters"], told["asideBytes"]) == (1, aside + 5000)


def test_a_file_that_cannot_be_read_is_named_beside_what_waits(run: Run, directory: Path) -> None:
    fill(5)
    odd = directory / f"{1:020d}-{'ab' * 8}.log"
    odd.mkdir()
    status, out, err = run("spool", "status")
    assert status == 0
    assert "5 wait, the oldest" in out
    assert err == f"{odd}: Is a directory; the next writer moves it to damaged\n"


def test_what_cannot_be_stored_in_time_stays(
    run: Run, directory: Path, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(3)
    status, out, err = run("spool", "replay", "--timeout", "0")
    assert (status, out.split(", ")[-1]) == (1, "3 left\n")
    assert err == "not all is stored: the time is up\n"
    assert run("spool", "replay")[0] == 0
    monkeypatch.setenv(ENVIRONMENT_URL, "postgresql://127.0.0.1:1/nobody?connect_timeout=1")
    status, out, err = run("spool", "replay")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1


def test_a_spool_that_a_daemon_works_on_is_refused(
    run: Run, directory: Path, store: BaseStore
) -> None:
    with EventWriter(store):
        status, out, err = run("spool", "replay")
    assert (status, out) == (1, "")
    assert "works on" in err


def test_dead_letters_are_listed_shown_and_stored_once_the_reason_is_gone(
    run: Run, directory: Path, store: BaseStore, database: Database
) -> None:
    database.execute("ALTER TABLE events ADD CONSTRAINT no_teapots CHECK (tool_name <> 'Teapot')")
    try:
        with EventWriter(store) as writer:
            teapot = event("s", data={"toolName": "Teapot", "n": 2**70})
            hostile = event("s", data={"x": float("nan")}, working_directory=HOSTILE)
            for one in (teapot, hostile):
                assert writer.put(one).wait_stored(30)
            writer.put_session(session(HOSTILE))
        status, out, err = run("dead", "list")
        assert (status, err) == (0, "")
        assert "refused by the server" in out
        assert "JSON has no nan" in out
        assert all(character.isprintable() for character in out.replace("\n", ""))
        letters = DeadLetters(directory / "dead")
        assert len(letters.ids()) == 3
        assert "3 dead letters; see `dead list`" in run("spool", "status")[1]
        listed = [json.loads(line) for line in run("dead", "list", "--json")[1].splitlines()]
        assert "no_teapots" in listed[0]["reason"]
        shown = json.loads(run("dead", "show", listed[0]["id"])[1])
        assert shown == listed[0]
        assert shown["record"]["data"] == {"toolName": "Teapot", "n": 2**70}
        status, out, err = run("dead", "replay")
        assert (status, out) == (1, "0 stored, 0 there already, 3 still refused\n")
        assert err.count("\n") == 3
    finally:
        verb = "CONSTRAINT" if database.backend == "postgresql" else "CHECK"
        database.execute(f"ALTER TABLE events DROP {verb} no_teapots")
    status, out, err = run("dead", "replay", listed[0]["id"], "--json")
    assert (status, json.loads(out)) == (0, {"stored": 1, "duplicate": 0, "left": 0})
    assert store.get_events("s") == [teapot]
    assert len(letters.ids()) == 2
    status, out, err = run("dead", "discard")
    assert (status, out) == (1, "")
    assert "name the letters" in err
    gone, kept = letters.ids()
    status, out, err = run("dead", "discard", gone, "../spool/lock")
    assert (status, out) == (1, "1 discarded\n")
    assert "no dead letter '../spool/lock'" in err
    assert letters.ids() == [kept]
    status, out, _ = run("dead", "discard", kept, "--json")
    assert (status, json.loads(out)) == (0, {"discarded": 1, "missing": 0})
    assert letters.ids() == []


def two_letters(directory: Path) -> tuple[MonitorEvent, MonitorEvent]:
    """Leave one of another machine, and a later one."""
    theirs, ours = event("s", machine_id="theirs"), event("s", T0 + 1, machine_id="ours")
    letters = DeadLetters(directory / "dead")
    for one in (theirs, ours):
        letters.add(queued.refused_input(one, "then"), one.timestamp)
    return theirs, ours


def test_a_letter_that_a_policy_still_refuses_holds_no_other_up(
    run: Run, directory: Path, store: BaseStore, database: Database
) -> None:
    theirs, ours = two_letters(directory)
    with only_machine(database, "ours"):
        status, out, err = run("dead", "replay")
    assert (status, out) == (1, "1 stored, 0 there already, 1 still refused\n")
    assert err.count("\n") == 1
    assert store.get_events("s") == [ours]
    assert run("dead", "replay")[1] == "1 stored, 0 there already, 0 still refused\n"
    assert store.get_events("s") == [theirs, ours]


@pytest.mark.parametrize(("perhaps_one", "stored"), [(True, 1), (False, 0)])
def test_a_letter_that_always_takes_too_long_holds_no_other_up_but_a_server_that_is_away_does(
    run: Run,
    directory: Path,
    store: BaseStore,
    monkeypatch: pytest.MonkeyPatch,
    perhaps_one: bool,
    stored: int,
) -> None:
    original = BaseStore.save_event

    def save_event(self: BaseStore, one: MonitorEvent) -> bool:
        if one.machine_id == "theirs":
            error = StoreUnavailable("no answer in time")
            error.perhaps_one = perhaps_one
            raise error
        return original(self, one)

    two_letters(directory)
    monkeypatch.setattr(BaseStore, "save_event", save_event)
    status, _, err = run("dead", "replay")
    assert (status, err.count("\n")) == (1, 1)
    assert "no answer in time" in err
    assert len(store.get_events("s")) == stored
    assert len(DeadLetters(directory / "dead").ids()) == 2 - stored


def test_a_letter_that_is_not_there_or_not_readable_is_named(
    run: Run, directory: Path, store: BaseStore
) -> None:
    status, out, err = run("dead", "show", "../../etc/passwd")
    assert (status, out) == (1, "")
    assert "no dead letter '../../etc/passwd'" in err
    (directory / "dead").mkdir(parents=True)
    (directory / "dead" / f"1700000000000-{'a' * 12}.json").write_bytes(b"\x1b[2J")
    status, out, err = run("dead", "list")
    assert (status, out) == (0, "")
    assert "no dead letter can be read there" in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "arguments",
    [("spool",), ("spool", "eat"), ("dead", "rise"), ("spool", "replay", "--timeout", "x")],
)
def test_a_wrong_command_line_is_told_as_such(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "error:" in err
