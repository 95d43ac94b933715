"""Copies: all that a database holds comes to the other, of the same kind and of the other kind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from contextuate_persist import (
    ConfigurationError,
    SchemaError,
    StoreUnavailable,
    TokenUsage,
    base,
    copying,
)
from contextuate_persist.arguments import ENVIRONMENT_TARGET
from contextuate_persist.base import BaseStore
from contextuate_persist.cli import main
from contextuate_persist.config import ENVIRONMENT_URL
from contextuate_persist.copying import copy_store
from tests import servers
from tests.builders import T0, event, session, usage
from tests.conftest import BACKENDS, Database, make_store, new_database

BOTH_LAYOUTS = "copy_holds|second_copy|goes_on|at_a_time"

HOSTILE: dict[str, Any] = {
    "nul": "a\0b",
    "surrogate": "\ud800",
    "long": 2**70,
    "float": 1e16,
    "toolName": "DELIMITER ;;",
    "deep": [[[{}]]],
}


@pytest.fixture(scope="session")
def postgresql_target(postgresql_server: servers.Server) -> Iterator[Database]:
    yield from _made(postgresql_server)


@pytest.fixture(scope="session")
def mysql_target(mysql_server: servers.Server) -> Iterator[Database]:
    yield from _made(mysql_server)


def _made(server: servers.Server) -> Iterator[Database]:
    database = new_database(server)
    database.owner().apply_schema()
    yield database
    database.drop()


@pytest.fixture(params=["the same kind", "the other kind"])
def target_database(backend: str, request: pytest.FixtureRequest) -> Database:
    """An empty database with the schema, to copy to."""
    kind = backend
    if request.param == "the other kind":
        [kind] = set(BACKENDS) - {backend}
        if kind not in (request.config.getoption("backend") or BACKENDS):
            pytest.skip(f"{kind} was not asked for")
    database: Database = request.getfixturevalue(f"{kind}_target")
    database.clear()
    return database


@pytest.fixture
def target(target_database: Database) -> Iterator[BaseStore]:
    with make_store(target_database.url) as opened:
        yield opened


def contents(store: BaseStore) -> dict[str, Any]:
    """All that can be read of a store, in its order."""
    sessions = sorted(store.get_sessions(), key=lambda one: one.session_id)
    return {
        "sessions": [
            dataclasses.replace(one, child_session_ids=tuple(sorted(one.child_session_ids)))
            for one in sessions
        ],
        "events": {one.session_id: store.get_events(one.session_id) for one in sessions},
        "messages": {one.session_id: store.get_usage(one.session_id) for one in sessions},
        "deletions": store.deletions(),
    }


def fill(store: BaseStore) -> None:
    """Everything that a database can hold, in some sessions."""
    store.save_sessions(
        [
            session("root", label="Fix \0 it", is_pinned=True, child_session_ids=("b", "unknown")),
            session("b", parent_session_id="root", status="error", end_time=T0 + 9, model="m"),
            session("A", manual_parent_session_id="b", agent_type="nexus", hidden=True),
            session("a", working_directory="/caf\udce9", transcript_path="/t", is_pinned=False),
        ]
    )
    store.save_session(
        session("counted", token_usage=TokenUsage(total_input=7, total_cache_read=3))
    )
    store.save_events([event("root", T0 + n % 3, data={"n": n}) for n in range(40)])
    store.save_events(
        [
            event("a", data=HOSTILE, event_type="of tomorrow", hook_type="Tomorrow"),
            event("made by events", T0 + 5, parent_session_id="also only named"),
            event("made by events", T0 + 2, data={"big": "x" * 1_200_000}),
        ]
    )
    store.update_session("made by events", label="pinned later", is_pinned=True)
    store.save_usage("b", [usage("m1", 3, model="m"), usage("m2", 4, cache_read=2)])
    store.save_usage("made by events", [usage("m3", 5)])
    store.save_session(session("gone"))
    store.delete_session("gone")
    store.save_session(session("back again", start_time=T0))
    store.delete_session("back again")
    [(_, until)] = [one for one in store.deletions() if one[0] == "back again"]
    store.save_event(event("back again", until + 1))
    store.save_session(session("back again", start_time=T0, label="told again"))


def test_a_copy_holds_all_that_the_source_holds(store: BaseStore, target: BaseStore) -> None:
    fill(store)
    report = copy_store(store, target)
    assert contents(target) == contents(store)
    assert report.problems == ()
    assert (report.sessions, report.events, report.messages, report.deletions) == (7, 44, 3, 2)
    assert (report.stored, report.counted, report.kept) == (44, 3, 0)


def test_a_second_copy_finds_nothing_to_do(store: BaseStore, target: BaseStore) -> None:
    fill(store)
    copy_store(store, target)
    report = copy_store(store, target)
    assert (report.saved, report.stored, report.counted, report.problem_count) == (0, 0, 0, 0)
    assert contents(target) == contents(store)


def test_a_second_copy_brings_what_has_come_since(store: BaseStore, target: BaseStore) -> None:
    fill(store)
    copy_store(store, target)
    store.save_events([event("root", T0 + 50), event("new"), event("made by events", T0 + 60)])
    store.update_session("b", label="named since", end_time=None)
    store.save_usage("b", [usage("m2", 40)])
    store.delete_session("A")
    report = copy_store(store, target)
    assert (report.stored, report.counted, report.kept) == (3, 1, 1)
    there = contents(target)
    assert [one for one in there["sessions"] if one.session_id == "A"]
    found, given = target.get_session("b"), store.get_session("b")
    assert found is not None
    assert given is not None
    assert dataclasses.replace(found, child_session_ids=()) == given
    assert target.get_events("root") == store.get_events("root")


def test_a_second_copy_brings_an_event_to_a_session_that_has_another_one_there(
    store: BaseStore, target: BaseStore
) -> None:
    store.save_event(event("s"))
    copy_store(store, target)
    here, there = event("s", T0 + 50), event("s", T0 + 70)
    store.save_event(here)
    target.save_event(there)
    report = copy_store(store, target)
    assert (report.stored, report.problems) == (1, ())
    assert target.get_events("s")[1:] == [here, there]


def test_of_two_deletions_the_later_one_counts(store: BaseStore, target: BaseStore) -> None:
    target.add_deletions([("a", T0 + 100), ("b", T0 + 100)])
    store.add_deletions([("a", T0 + 50), ("b", T0 + 150)])
    copy_store(store, target)
    assert target.deletions() == [("a", T0 + 100), ("b", T0 + 150)]
    assert not target.save_event(event("a", T0 + 75))
    assert target.get_sessions() == []


def test_a_message_that_something_else_has_written_is_named_and_the_rest_comes(
    store: BaseStore, target: BaseStore, database: Database
) -> None:
    store.save_sessions([session("s"), session("t")])
    store.save_usage("s", [usage("m1")])
    store.save_usage("t", [usage("m2")])
    database.execute("UPDATE token_ledger SET timestamp = 5 WHERE session_id = 's'")
    report = copy_store(store, target)
    assert any("s: " in problem and "5 is no time" in problem for problem in report.problems)
    assert {one.session_id for one in target.get_sessions()} == {"s", "t"}
    assert len(target.get_usage("t")) == 1


@pytest.mark.parametrize("behind", [0, 60])
def test_what_was_changed_in_the_target_stays_also_if_its_clock_is_behind(
    store: BaseStore,
    target: BaseStore,
    database: Database,
    target_database: Database,
    monkeypatch: pytest.MonkeyPatch,
    behind: int,
) -> None:
    monkeypatch.setattr(store, "_statement_timeout", 600.0)  # as the command has it
    fill(store)
    redate(database, -100)
    copy_store(store, target)
    target.update_session("root", label="renamed there", is_pinned=False)
    target.update_session("made by events", label="this, too")
    target.save_event(event("root", T0 + 70))
    target.delete_session("a")
    redate(target_database, -behind)
    set_clock(target, -behind, monkeypatch)
    report = copy_store(store, target)
    assert report.problem_count == 0
    assert target.get_session("a") is None
    assert len(target.get_events("root")) == len(store.get_events("root")) + 1
    labels = {one.session_id: one.label for one in target.get_sessions()}
    assert (labels["root"], labels["made by events"]) == ("renamed there", "this, too")


def redate(database: Database, seconds: int) -> None:
    """Have all sessions changed so much later, or earlier."""
    if database.backend == "mysql":
        change = f"updated_at = updated_at + INTERVAL {seconds} SECOND"
        database.execute(f"UPDATE sessions SET {change}")
    else:
        change = f"updated_at = updated_at + INTERVAL '{seconds} seconds'"
        trigger = "TRIGGER trigger_sessions_updated_at"
        database.execute(
            f"ALTER TABLE sessions DISABLE {trigger};"
            f"UPDATE sessions SET {change};"
            f"ALTER TABLE sessions ENABLE {trigger}"
        )


def set_clock(store: BaseStore, seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the server's clock be so much ahead, or behind."""
    now = store._select_now
    monkeypatch.setattr(store, "_select_now", lambda connection: now(connection) + seconds * 1000)


def change_all(store: BaseStore) -> None:
    """Change sessions that somebody has saved, and one that only events have made."""
    store.update_session("root", label="named since", is_pinned=False)
    store.update_session("A", label="this, too")
    store.update_session("a", status="completed", end_time=T0 + 5)
    store.update_session("made by events", label=None, is_pinned=False, hidden=True)


def test_what_is_changed_after_a_copy_comes_though_the_targets_clock_is_ahead(
    store: BaseStore,
    target: BaseStore,
    target_database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(store)
    copy_store(store, target)
    redate(target_database, 60)
    set_clock(target, 60, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(copying, "_Copier", changing("compare", lambda: change_all(store)))
        report = copy_store(store, target)
    assert sorted(report.problems) == [
        "A: the session differs in label",
        "a: the session differs in end_time, status",
        "made by events: the session differs in is_pinned, hidden, label",
        "root: the session differs in is_pinned, label",
    ]
    report = copy_store(store, target)
    assert (report.saved, report.problems) == (3, ())
    assert contents(target) == contents(store)


def test_a_change_that_waited_for_a_lock_meanwhile_comes_with_the_next_copy(
    store: BaseStore, target: BaseStore
) -> None:
    """It is dated from before the copy that has not seen it."""
    fill(store)
    held, release = threading.Event(), threading.Event()

    def hold(connection: Any) -> None:
        store._lock_sessions(connection, ["root"])
        held.set()
        release.wait(20)

    holder = threading.Thread(target=lambda: store._run(hold, transaction=True))
    holder.start()
    assert held.wait(20)
    waiter = threading.Thread(target=lambda: store.update_session("root", label="waited"))
    waiter.start()
    time.sleep(0.3)
    copy_store(store, target)
    release.set()
    for thread in (holder, waiter):
        thread.join(20)
    assert copy_store(store, target).problems == ()
    assert contents(target) == contents(store)


def test_a_change_of_a_session_that_nobody_has_saved_comes_with_the_next_copy(
    store: BaseStore, target: BaseStore
) -> None:
    fill(store)
    copy_store(store, target)
    store.update_session("made by events", label="renamed", is_pinned=False)
    assert copy_store(store, target).problems == ()
    assert contents(target) == contents(store)


def test_an_interrupted_copy_goes_on(
    store: BaseStore, target: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    monkeypatch.setattr(copying, "CHUNK_ROWS", 7)
    monkeypatch.setattr(copying, "_SESSIONS", 2)

    def fail(kind: str, calls: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(target, kind, _failing(getattr(target, kind), calls))
            with pytest.raises(StoreUnavailable):
                copy_store(store, target)

    for kind in ("save_rows", "save_sessions", "save_usage", "update_session", "add_deletions"):
        fail(kind, 0)
    store.save_events([event("root", T0 + 50 + n) for n in range(20)])
    fail("save_rows", 1)
    fail("save_sessions", 1)
    assert copy_store(store, target).problem_count == 0
    assert contents(target) == contents(store)


def _failing(method: Any, calls: int) -> Any:
    """The method, which fails after so many calls."""
    count = itertools.count()

    def call(*arguments: Any, **options: Any) -> Any:
        if next(count) >= calls:
            raise StoreUnavailable("gone")
        return method(*arguments, **options)

    return call


def test_there_and_back_again_is_the_same(store: BaseStore, target: BaseStore) -> None:
    fill(store)
    before = contents(store)
    copy_store(store, target)
    store.delete_all_sessions()
    for session_id, _ in store.deletions():
        store._run(lambda connection, one=session_id: store._undelete(connection, [one]))
    copy_store(target, store)
    assert contents(store) == before


def test_what_the_target_cannot_take_is_named_and_the_rest_is_there(
    store: BaseStore, target: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    monkeypatch.setattr(target, "_row_bytes", 100_000, raising=False)
    report = copy_store(store, target)
    assert report.problem_count == 2
    assert report.problems[0].startswith("made by events: event ")
    assert "this server takes 100,000" in report.problems[0]
    assert report.problems[1] == "made by events: 1 of 2 events are missing"
    assert len(target.get_events("root")) == 40


def test_rows_that_break_our_rules_are_named_and_the_rest_is_there(
    store: BaseStore, target: BaseStore, database: Database
) -> None:
    store.save_session(session("good", label="fine"))
    store.save_session(session("bad"))
    store.save_event(event("made"))
    # As another program may have written them.
    database.execute("UPDATE sessions SET end_time = 5 WHERE session_id = 'bad'")
    database.execute("UPDATE sessions SET status = 'completed' WHERE session_id = 'bad'")
    database.execute("UPDATE sessions SET end_time = 5 WHERE session_id = 'made'")
    store.save_event(event("good", data={"a": 1}))
    database.execute("UPDATE events SET timestamp = 5 WHERE session_id = 'good'")
    report = copy_store(store, target)
    told = "\n".join(report.problems)
    assert "bad: end_time: 5 is no time in Unix milliseconds" in told
    assert "made: end_time: 5 is no time in Unix milliseconds" in told
    assert "timestamp: 5 is no time" in told
    labels = {one.session_id: one.label for one in target.get_sessions()}
    assert labels == {"good": "fine", "made": None}


def changing(moment: str, *changes: Callable[[], object]) -> type[copying._Copier]:
    """A copier that lets something else happen each time before it does this."""
    left = [*changes]

    def call(self: copying._Copier, *arguments: Any) -> Any:
        if left:
            left.pop(0)()
        return getattr(super(Changing, self), moment)(*arguments)

    class Changing(copying._Copier):
        pass

    setattr(Changing, moment, call)
    return Changing


@pytest.mark.parametrize("moment", ["_copy_messages", "_settle_all", "_save"])
def test_what_changes_between_reading_and_writing_comes_along(
    store: BaseStore, target: BaseStore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    fill(store)

    def change() -> None:
        store.update_session("root", label="renamed", is_pinned=False)
        store.update_session("made by events", label=None, is_pinned=False)
        store.save_session(
            session("a", status="completed", end_time=T0 + 5, child_session_ids=("listed",))
        )

    changes = (change, lambda: store.update_session("root", label="renamed again"))
    monkeypatch.setattr(copying, "_Copier", changing(moment, *changes))
    report = copy_store(store, target)
    assert (report.saved, report.problems) == (7, ())
    assert contents(target) == contents(store)


def test_what_changes_after_it_was_copied_is_named_and_comes_with_the_next_copy(
    store: BaseStore, target: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)

    def change() -> None:
        store.update_session("root", label="renamed", status="completed")
        store.save_usage("b", [usage("m1", 30), usage("m2", 4, cache_read=2), usage("m9", 1)])
        store.save_event(event("a"))

    with monkeypatch.context() as patch:
        patch.setattr(copying, "_Copier", changing("compare", change))
        report = copy_store(store, target)
    assert sorted(report.problems) == [
        "a: 1 of 2 events are missing",
        "b: 2 of 3 messages are missing",
        "root: the session differs in status, label",
    ]
    assert copy_store(store, target).problems == ()
    assert contents(target) == contents(store)


def test_messages_that_the_target_counts_to_another_session_are_there_and_count_once(
    store: BaseStore, target: BaseStore
) -> None:
    store.save_session(session("s"))
    store.save_usage("s", [usage("m1", 3), usage("m2", 4)])
    store.save_session(session("nothing of its own there"))
    store.save_usage("nothing of its own there", [usage("m3", 6, cache_read=2)])
    target.save_session(session("first"))
    target.save_usage("first", [usage("m1", 5), usage("m3", 7, cache_read=2)])
    for _ in range(2):
        assert copy_store(store, target).problems == ()
        totals = {one.session_id: one.token_usage for one in target.get_sessions()}
        assert totals.pop("first") == TokenUsage(
            total_output=12, total_cache_read=2, total_cache_creation=0
        )
        assert totals.pop("s").total_output == 4
        assert totals == {"nothing of its own there": TokenUsage()}
    assert target.get_usage("first") == [usage("m1", 5), usage("m3", 7, cache_read=2)]
    assert target.get_usage("s") == [usage("m2", 4)]


def test_totals_that_the_target_has_counted_twice_are_set_right(
    store: BaseStore, target: BaseStore
) -> None:
    store.save_session(session("s"))
    store.save_usage("s", [usage("m1", 3)])
    given = store.get_session("s")
    assert given is not None
    target.save_session(dataclasses.replace(given, label="as it was before"))
    target.save_session(session("first"))
    target.save_usage("first", [usage("m1", 3)])
    store.update_session("s", label="changed since")
    assert copy_store(store, target).problems == ()
    assert sum(one.token_usage.total_output for one in target.get_sessions()) == 3


def test_a_session_that_goes_meanwhile_does_no_harm(
    store: BaseStore, target: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)

    def gone(*_: Any) -> None:
        for one in store.get_sessions():
            store.delete_session(one.session_id)

    class Deleting(copying._Copier):
        def _copy_sessions(self, ids: Any) -> Any:
            found = super()._copy_sessions(ids)
            gone()
            return found

    monkeypatch.setattr(copying, "_Copier", Deleting)
    assert copy_store(store, target).problem_count == 0


def test_small_sessions_are_read_many_at_a_time(
    store: BaseStore, target: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_events([event(f"s{n:03}", T0 + 9 - n % 5) for n in range(2000)])
    store.save_sessions([session(f"s{n:03}", label="saved") for n in range(0, 1000, 2)])
    trips = mock.Mock(side_effect=store._run)
    monkeypatch.setattr(store, "_run", trips)
    assert copy_store(store, target).problem_count == 0
    assert trips.call_count < 80  # seven or so for 200 sessions
    monkeypatch.undo()
    assert contents(target) == contents(store)


def test_events_are_read_many_sessions_at_a_time_as_one_at_a_time(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_PAGE_BYTES", 40_000)
    sizes = {"a": 3, "b": 0, "c": 40, "d": 1, "e": 2, "f": 700, "g": 5, "Z": 4, "\u00e9": 3}
    store.save_events(
        [
            event(name, T0 + 50 - n % 7, data={"n": n, "x": "x" * (900 if name in "ce" else 9)})
            for name, size in sizes.items()
            for n in range(size)
        ]
    )
    store.save_events([event("d", data={"nul": "\0", "big": "x" * 100_000})])
    pages = mock.Mock(side_effect=store._select_events_of)
    monkeypatch.setattr(store, "_select_events_of", pages)
    asked = [*sizes, "not there"]
    wanted = {name: [*store.iter_events(session_id=name)] for name in asked}
    for counts in (sizes, dict.fromkeys(asked, 1), dict.fromkeys(asked, 10**6)):
        read: dict[str, list[Any]] = {name: [] for name in asked}
        order: list[str] = []
        for one in store.events_of({**counts, "not there": 0}):
            read[one.session_id].append(one)
            order += [one.session_id] if [one.session_id] != order[-1:] else []
        assert read == wanted
        assert len(order) == len(set(order))  # each session's are together
    assert pages.call_count > 3
    assert list(store.events_of({})) == []


def test_a_database_is_not_copied_onto_itself(store: BaseStore, database: Database) -> None:
    with make_store(database.url) as again, pytest.raises(ConfigurationError, match="the same"):
        copy_store(store, again)


# --- The command ----------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["copy", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_copies_and_tells(
    store: BaseStore,
    target: BaseStore,
    database: Database,
    target_database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill(store)
    monkeypatch.setenv(ENVIRONMENT_URL, database.url)
    monkeypatch.setenv(ENVIRONMENT_TARGET, target_database.url)
    status, out, err = run(capsys)
    assert (status, err) == (0, "compared: all is in the target\n")
    assert out.splitlines() == [
        "sessions   7 in the source, 7 saved",
        "events     44 in the source, 44 stored",
        "messages   3 in the source, 3 counted",
        "deletions  2 in the source",
    ]
    assert contents(target) == contents(store)
    status, out, _ = run(capsys, "--json")
    assert status == 0
    assert json.loads(out) == {
        "sessions": 7,
        "events": 44,
        "messages": 3,
        "deletions": 2,
        "saved": 0,
        "stored": 0,
        "counted": 0,
        "kept": 0,
        "problemCount": 0,
    }


def test_the_command_names_what_is_not_there(
    store: BaseStore,
    target_database: Database,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.save_event(event("made\u202e by", T0))
    database.execute("UPDATE events SET timestamp = 5")
    monkeypatch.setattr(copying, "PROBLEMS_SHOWN", 1)
    status, _, err = run(capsys, "--from", database.url, "--to", target_database.url)
    assert status == 1
    assert "\u202e" not in err
    assert database.password not in err
    assert target_database.password not in err
    assert err.count("a password on the command line") == 2
    assert err.splitlines()[-2] == "and 1 more"
    assert err.splitlines()[-1].startswith("not all is in the target: run it again")


def test_a_target_without_the_schema_is_told_what_to_do(
    database: Database, empty_database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "--from", database.url, "--to", empty_database.url)
    assert status == 1
    assert "init" in err.splitlines()[-1]
    with pytest.raises(SchemaError), make_store(empty_database.url):
        pass


def test_a_copy_needs_a_target(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(ENVIRONMENT_TARGET, raising=False)
    status, _, err = run(capsys, "--from", database.url)
    assert status == 1
    assert f"copy: no target is named: give --to or {ENVIRONMENT_TARGET}" in err


def test_progress_reaches_the_end(store: BaseStore, target: BaseStore) -> None:
    fill(store)
    for _ in range(2):
        progress = mock.Mock()
        copy_store(store, target, progress=progress)
        seen = [call.args for call in progress.call_args_list]
        assert seen[-1] == (44, 44)
        assert seen == sorted(seen)
