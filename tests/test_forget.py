"""What `forget` removes from a database, and what it leaves alone."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import pytest

from contextuate_persist import (
    Forgotten,
    InvalidRecord,
    MonitorEvent,
    SessionMeta,
    SessionNotFound,
    base,
    mysql_store,
)
from contextuate_persist.base import BaseStore
from tests.builders import T0, event, session, usage
from tests.conftest import Database

BOTH_LAYOUTS = ""

MARKER = "mark-7f3a"
TABLES = {
    "sessions": "session_id, machine_id, working_directory, parent_session_id, "
    "manual_parent_session_id, child_session_ids, label, transcript_path, exact",
    "events": "session_id, parent_session_id, machine_id, working_directory, tool_name, "
    "tool_use_id, data, exact",
    "token_ledger": "message_id, session_id, model",
    "deleted_sessions": "session_id",
}


def rows(database: Database, *left_out: str) -> str:
    """All that the tables hold, in one text."""
    held: list[str] = []
    for table, columns in TABLES.items():
        if table not in left_out:
            for row in database.execute(f"SELECT {columns} FROM {table}"):
                held += [
                    value.decode("utf-8", "replace")
                    if isinstance(value, bytes | bytearray | memoryview)
                    else json.dumps(value)
                    if isinstance(value, dict | list)
                    else str(value)
                    for value in row
                ]
    return "\n".join(held)


def everything(store: BaseStore) -> tuple[list[SessionMeta], list[MonitorEvent]]:
    return store.get_sessions(), list(store.iter_events())


def told(session_id: str, **fields: Any) -> MonitorEvent:
    """An event whose payload quotes the marker."""
    return event(session_id, data={"toolName": f"{MARKER} tool", "x": [MARKER]}, **fields)


@pytest.fixture
def neighbours(store: BaseStore) -> tuple[list[SessionMeta], list[MonitorEvent]]:
    """Sessions whose names, machines and directories look like those that go."""
    for number, name in enumerate(("S", "s_", "s%", "s1", "t")):
        store.save_session(
            session(
                name,
                machine_id=f"machine{number}",
                working_directory=("/a/bc", "/a", "/a/b%", "/a/_", "/A/b")[number],
                label=f"label {number}",
            )
        )
        store.save_events(
            event(name, T0 + n, machine_id="machine%", working_directory="/a/bc/b")
            for n in range(3)
        )
        store.save_usage(name, [usage(f"msg_{name}", 7)])
    return everything(store)


Neighbours = tuple[list[SessionMeta], list[MonitorEvent]]


# --- A session ------------------------------------------------------------------------------------


def test_a_session_goes_with_all_below_it_and_is_found_nowhere(
    store: BaseStore, database: Database, neighbours: Neighbours
) -> None:
    store.save_session(
        session("s", label=MARKER, transcript_path=f"/{MARKER}.jsonl", is_pinned=True)
    )
    store.save_session(session("child", parent_session_id="s", label=f"{MARKER}\0"))
    store.save_session(session("below", manual_parent_session_id="child", hidden=True))
    for name in ("s", "child", "below"):
        store.save_events(
            [
                told(name, parent_session_id="t" if name == "s" else None),
                event(name, T0 + 1, data={"big": f"{MARKER}{2**70}\0", "n": 2**70}),
            ]
        )
        store.save_usage(name, [usage(f"{MARKER}{name}", model=MARKER)])
    assert MARKER in rows(database)
    dry = store.forget(session_id="s", dry_run=True)
    assert len(store.get_events("s")) == 2
    assert store.forget(session_id="s") == dry
    assert dry == Forgotten(
        sessions=3,
        events=6,
        messages=3,
        session_ids=("below", "child", "s"),
        transcript_paths=(f"/{MARKER}.jsonl",),
    )
    assert MARKER not in rows(database)
    assert everything(store) == neighbours
    assert store.forget(session_id="s") == Forgotten()


def test_nobody_names_a_forgotten_session_any_more(store: BaseStore, database: Database) -> None:
    gone = f"{MARKER}-session"
    store.save_session(session("lists", child_session_ids=("other", gone)))
    # Detected as a child of the session that goes, but put elsewhere by a person.
    store.save_session(session("moved", parent_session_id=gone))
    store.save_event(event("moved", parent_session_id=gone))
    store.save_session(session(gone))
    store.update_session("moved", manual_parent_session_id="lists")
    assert store.forget(session_id=gone).sessions == 1
    assert MARKER not in rows(database, "deleted_sessions")
    assert rows(database).count(MARKER) == 1  # what keeps late deliveries away
    moved, lists = store.get_session("moved"), store.get_session("lists")
    assert moved is not None
    assert (moved.parent_session_id, moved.manual_parent_session_id) == (None, "lists")
    assert [one.parent_session_id for one in store.get_events("moved")] == [None]
    assert lists is not None
    assert lists.child_session_ids == ("other", "moved")


def test_what_comes_late_does_not_bring_a_forgotten_session_back(store: BaseStore) -> None:
    late = event("s")
    store.save_session(session("s"))
    store.save_session(session("child", parent_session_id="s"))
    store.forget(session_id="s")
    # Of a session that is not there yet, but waits somewhere, too.
    store.forget(session_id="unknown")
    assert store.save_events([late, event("child"), event("unknown")]) == 0
    assert not store.save_session(session("s"))
    assert store.get_sessions() == []
    assert store.save_event(event("s", 4 * T0))  # it goes on


def test_a_parent_that_was_only_named_goes_and_takes_what_is_below_it(
    store: BaseStore, database: Database
) -> None:
    store.save_session(session("s", parent_session_id="p"))
    assert store.forget(session_id="p") == Forgotten(sessions=1, session_ids=("p", "s"))
    assert rows(database, "deleted_sessions") == ""
    assert not store.save_event(event("p"))


def test_what_is_below_a_session_that_was_never_here_goes_with_it(store: BaseStore) -> None:
    """Only a manual parent may be missing: nothing refers to it but its children."""
    store.save_session(session("child", manual_parent_session_id="absent"))
    store.save_session(session("grandchild", parent_session_id="child"))
    found = store.forget(session_id="absent", dry_run=True)
    assert (found.sessions, found.session_ids) == (2, ("child", "grandchild"))
    assert store.forget(session_id="absent") == found
    assert store.get_sessions() == []
    store.save_session(session("absent"))
    assert store.get_session("absent") is None


def test_what_a_named_parent_has_copied_from_its_child_goes(
    store: BaseStore, database: Database
) -> None:
    place = {"machine_id": f"{MARKER} machine", "working_directory": f"/{MARKER}"}
    store.save_session(session("s", parent_session_id="p", **place))
    store.save_event(event("s2", parent_session_id="p2", **place))
    store.save_event(event("s2", T0 + 1, parent_session_id="p3", **place))
    store.save_session(session("other", parent_session_id="p"))
    for name in ("s", "s2"):
        store.forget(session_id=name)
    assert MARKER not in rows(database)
    other = store.get_session("other")
    assert other is not None
    assert other.parent_session_id == "p"
    assert store.save_session(session("p", **place))
    assert store.get_session("p") == session("p", **place, **FLAGS, child_session_ids=("other",))


FLAGS = {"is_user_initiated": True, "is_pinned": False, "hidden": False}


def test_a_named_parent_that_is_saved_meanwhile_keeps_what_it_was_saved_with(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = session("p", machine_id="own", working_directory="/own\0\udcff", **FLAGS)
    store.save_session(session("s", parent_session_id="p"))
    select = store._select_copies

    def select_then_save(connection: Any) -> list[str]:
        found = select(connection)
        assert found == ["p"]
        store.save_session(own)
        return found

    monkeypatch.setattr(store, "_select_copies", select_then_save)
    store.forget(session_id="s")
    assert store.get_session("p") == own


def test_a_cycle_is_forgotten_whole(store: BaseStore) -> None:
    for name, parent in {"a": "c", "b": "a", "c": "b", "x": "c", "self": "self"}.items():
        store.save_session(session(name, manual_parent_session_id=parent))
    assert store.forget(session_id="b").session_ids == ("a", "b", "c", "x")
    assert store.forget(session_id="self").sessions == 1
    assert store.get_sessions() == []


def test_the_token_totals_of_others_stay_what_they_were(store: BaseStore) -> None:
    store.save_session(session("s"))
    store.save_session(session("resumed"))
    store.save_usage("s", [usage("shared", 5)])
    store.save_usage("resumed", [usage("shared", 9), usage("own", 3)])
    before = store.get_session("resumed")
    assert store.forget(session_id="s").messages == 1
    assert store.get_session("resumed") == before
    assert before is not None
    assert before.token_usage.total_output == 3
    assert store.save_usage("resumed", [usage("own", 4)]) == 1
    after = store.get_session("resumed")
    assert after is not None
    assert after.token_usage.total_output == 4


# --- A machine ------------------------------------------------------------------------------------


def test_a_machine_goes_with_its_sessions_and_with_its_events_inside_others(
    store: BaseStore, database: Database, neighbours: Neighbours
) -> None:
    gone = f"{MARKER}%"
    store.save_session(session("own", machine_id=gone, is_pinned=True))
    store.save_event(told("own", machine_id="machine0"))
    store.save_session(session("below", parent_session_id="own", machine_id="machine1"))
    store.save_event(told("below", machine_id="machine1"))
    store.save_event(told("known from events", machine_id=gone))
    store.save_events(told("S", timestamp=T0 + n, machine_id=gone) for n in range(5))
    dry = store.forget(machine_id=gone, dry_run=True)
    assert store.forget(machine_id=gone) == dry
    assert dry.session_ids == ("below", "known from events", "own")
    assert (dry.sessions, dry.events) == (3, 8)
    assert MARKER not in rows(database)
    assert everything(store) == neighbours


# --- A directory ----------------------------------------------------------------------------------

DIRECTORIES = [
    # what is forgotten, what goes with it, what does not
    ("/a/b", ["/a/b", "/a/b/", "/a/b/c"], ["/a/bc", "/a", "/A/b", "/a/B/c", "x/a/b", " /a/b"]),
    ("/a/b/", ["/a/b", "/a/b/c"], ["/a/bc"]),
    ("/%_/\\", ["/%_/\\", "/%_/\\/x"], ["/ab/\\", "/%a/\\/x", "/%_/\\\\"]),
    ("/n\0", ["/n\0", "/n\0/x"], ["/n\ufffd", "/n\ufffd/x", "/n\ud800", "/n"]),
    ("/n\ufffd", ["/n\ufffd", "/n\ufffd/x\0"], ["/n\0", "/n\ud800/x"]),
    ("/l\udcff", ["/l\udcff", "/l\udcff/\udcfe"], ["/l\udcfe", "/l\ufffd/x"]),
    ("/d", ["/d/\0", "/d/\udcff/x"], ["/d\0", "/d\udcff/x"]),
    ("C:\\x", ["C:\\x", "C:\\x\\y"], ["C:\\xy", "c:\\x\\y"]),
    ("/", ["/", "/x"], ["", "C:\\"]),
    ("/\u00e9", ["/\u00e9/x"], ["/e\u0301/x", "/e"]),
]


@pytest.mark.parametrize(("directory", "inside", "outside"), DIRECTORIES)
def test_a_directory_goes_with_what_is_below_it_byte_for_byte(
    store: BaseStore, directory: str, inside: list[str], outside: list[str]
) -> None:
    store.save_session(session("stays", working_directory="elsewhere"))
    for place in [*inside, *outside]:
        # One session begins there, another one came by.
        store.save_session(session(f"of {place!a}", working_directory=place))
        store.save_event(event(f"of {place!a}", working_directory="elsewhere"))
        store.save_event(event("stays", working_directory=place))
    dry = store.forget(working_directory=directory, dry_run=True)
    assert store.forget(working_directory=directory) == dry
    assert (dry.sessions, dry.events) == (len(inside), 2 * len(inside))
    left = {one.working_directory for one in store.get_sessions()}
    assert left == {*outside, "elsewhere"}
    assert {one.working_directory for one in store.get_events("stays")} == set(outside)


def test_a_directory_goes_with_sub_agents_that_worked_elsewhere(
    store: BaseStore, database: Database, neighbours: Neighbours
) -> None:
    store.save_session(session("s", working_directory="/a/b"))
    store.save_session(session("w", working_directory="/worktree", parent_session_id="s"))
    store.save_event(told("w", working_directory="/worktree"))
    assert store.forget(working_directory="/a/b").session_ids == ("s", "w")
    assert MARKER not in rows(database)
    assert everything(store) == neighbours


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "forget: one of"),
        ({"session_id": "s", "machine_id": "m"}, "forget: one of"),
        ({"session_id": ""}, "session_id: empty"),
        ({"machine_id": "a\0"}, "machine_id: control character"),
        ({"working_directory": ""}, "working_directory: empty"),
        ({"working_directory": 5}, "working_directory: a string is needed"),
        ({"working_directory": "x" * 20_000}, "working_directory: 20000 characters"),
    ],
)
def test_one_thing_is_to_be_named_and_in_a_possible_way(
    store: BaseStore, given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidRecord, match=reason):
        store.forget(**given)


# --- Many, interrupted, and others at work --------------------------------------------------------


def test_many_sessions_and_events_go_in_small_transactions(
    store: BaseStore, database: Database, neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_DELETE_EVENTS", 7)
    monkeypatch.setattr(base, "_DELETE_SESSIONS", 10)
    store.save_sessions(
        session(f"s{n:03}", machine_id="m", parent_session_id=f"s{n - 1:03}" if n else None)
        for n in range(64)
    )
    store.save_events(told(f"s{n % 3:03}", timestamp=T0 + n) for n in range(100))
    store.save_events(told("S", timestamp=T0 + n, machine_id="m") for n in range(50))
    dry = store.forget(machine_id="m", dry_run=True)
    assert store.forget(machine_id="m") == dry
    assert (dry.sessions, dry.events) == (64, 150)
    assert MARKER not in rows(database)
    assert everything(store) == neighbours


def test_events_of_sessions_that_stay_are_changed_some_at_a_time(
    store: BaseStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_DELETE_EVENTS", 10)
    store.save_sessions([session("s"), session("stays")])
    slices: dict[str, list[int]] = {"_unname_parents": [], "_select_heads": []}

    def count(name: str) -> None:
        do = getattr(store, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            done = do(*arguments, **options)
            slices[name].append(done if isinstance(done, int) else len(done))
            return done

        monkeypatch.setattr(store, name, counted)

    for name in slices:
        count(name)
    store.save_events(event("stays", T0 + n, parent_session_id="s") for n in range(25))
    store.forget(session_id="s")
    assert [one.parent_session_id for one in store.get_events("stays")] == [None] * 25
    assert slices == {"_unname_parents": [10, 10, 5], "_select_heads": []}
    database.execute("UPDATE events SET machine_id = 'm'")
    assert store.forget(machine_id="m").events == 25
    assert slices["_select_heads"] == [10, 10, 5]


@pytest.mark.parametrize("kind", ["session_id", "machine_id", "working_directory"])
def test_what_an_interrupted_call_has_left_the_next_one_finds(
    store: BaseStore,
    database: Database,
    neighbours: Neighbours,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(base, "_DELETE_EVENTS", 4)
    monkeypatch.setattr(base, "_DELETE_SESSIONS", 2)
    subject = {kind: {"session_id": "a", "machine_id": "m", "working_directory": "/m"}[kind]}
    # A cycle; what hangs below it is elsewhere.
    for name, parent in {"a": "c", "b": "a", "c": "b", "x": "c", "y": "x", "z": "y"}.items():
        place = {"machine_id": "m", "working_directory": "/m"} if name == "a" else {}
        store.save_session(session(name, manual_parent_session_id=parent, **place))
        store.save_events(told(name, timestamp=T0 + n) for n in range(9))
    place = {"machine_id": "m", "working_directory": "/m"}
    store.save_events(told("S", timestamp=T0 + n, **place) for n in range(9))
    if kind == "session_id":
        store.save_event(event("S", parent_session_id="z"))
    run, calls, limit = store._run, 0, 0

    def interrupted(work: Any, *, transaction: bool = False) -> Any:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt
        return run(work, transaction=transaction)

    monkeypatch.setattr(store, "_run", interrupted)
    done = False
    while not done:
        limit, calls = limit + 1, 0
        try:
            store.forget(**subject)
            done = True
        except KeyboardInterrupt:
            pass
    monkeypatch.setattr(store, "_run", run)
    assert limit > 5
    assert [one.session_id for one in store.get_sessions()] == [
        one.session_id for one in neighbours[0]
    ]
    if kind != "session_id":
        assert MARKER not in rows(database)
        assert everything(store) == neighbours


def test_a_child_that_comes_meanwhile_goes_too(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_session(session("s"))
    lock, came = store._lock_kin, []

    def late(connection: Any, ids: list[str]) -> None:
        if not came:
            came.append(True)
            store.save_session(session("late", manual_parent_session_id="s"))
        lock(connection, ids)

    monkeypatch.setattr(store, "_lock_kin", late)
    assert store.forget(session_id="s") == Forgotten(sessions=2, session_ids=("late", "s"))
    assert store.get_sessions() == []


def test_a_session_that_comes_while_it_is_deleted_leaves_no_event_behind(
    store: BaseStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = event("s", 4 * T0)
    came: list[bool] = []

    def then_come(name: str, after: bool) -> None:
        """Have its event stored before, or after, the last look at what is deleted."""
        original = getattr(mysql_store, name)

        def wrapped(connection: Any, statement: Any, *arguments: Any) -> Any:
            found = original(connection, statement, *arguments) if after else None
            if "sessions" in statement and statement in looks and not came:
                came.append(store.save_event(later))
            return found if after else original(connection, statement, *arguments)

        monkeypatch.setattr(mysql_store, name, wrapped)

    looks = {mysql_store.DELETE_SESSIONS, mysql_store.LOCK_THERE}
    then_come("_send", after=False)
    then_come("_execute", after=True)
    store.forget(session_id="s")
    orphans = "SELECT id FROM events WHERE session_id NOT IN (SELECT session_id FROM sessions)"
    assert database.execute(orphans) == []
    if store.backend == "mysql" and database.layout == "partitioned":
        assert came == [True]
        assert store.get_events("s") == [later]


def test_writers_and_who_forgets_do_not_stop_each_other(
    store: BaseStore, database: Database
) -> None:
    stop, failures = threading.Event(), []

    def write(number: int) -> None:
        try:
            n = 0
            while not stop.is_set():
                n += 1
                names = [f"s{(n + k) % 6}" for k in range(3)]
                store.save_events(
                    event(name, 4 * T0 + n, parent_session_id=f"s{(n + 1) % 6}" if n % 2 else None)
                    for name in names
                )
                with contextlib.suppress(SessionNotFound):
                    store.save_usage(names[0], [usage(f"m{n % 9}", n)])
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    try:
        for n in range(12):
            store.forget(session_id=f"s{n % 6}")
            store.forget(machine_id="machine", dry_run=True)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert failures == []
    for table in ("events", "token_ledger"):
        orphans = "session_id NOT IN (SELECT session_id FROM sessions)"
        assert database.execute(f"SELECT * FROM {table} WHERE {orphans}") == []
    for n in range(6):
        store.forget(session_id=f"s{n}")
    assert rows(database, "deleted_sessions") == ""
