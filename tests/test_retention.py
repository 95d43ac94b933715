"""Retention: what a policy keeps, how it is deleted, and what happens at the limit of a disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import (
    ConfigurationError,
    EventWriter,
    StorageFull,
    StoreRefused,
    StoreUnavailable,
    base,
    open_store,
    retention,
)
from contextuate_persist.base import BaseStore
from contextuate_persist.config import ENVIRONMENT_URL, parse_size
from contextuate_persist.retention import PruneReport, RetentionPolicy, plan, prune
from tests.builders import T0, event, session, usage
from tests.conftest import Database, make_store
from tests.test_cli import Run, run

__all__ = ["run"]

DAY = 86_400_000
OLD = {"end_time": T0, "status": "completed"}
BOTH_LAYOUTS = "by_age|since_its_end|before_all_times|meanwhile_is_spared|steps_are_small|writers"
NOW = time.time_ns() // 1_000_000


def names(store: BaseStore) -> set[str]:
    return {found.session_id for found in store.get_sessions()}


def ended(name: str, age_days: float, **fields: Any) -> Any:
    end = NOW - round(age_days * DAY)
    return session(name, start_time=end - 5, end_time=end, status="completed", **fields)


def by_number(count: int) -> RetentionPolicy:
    return RetentionPolicy(max_sessions=count)


def by_bytes(size: int) -> RetentionPolicy:
    return RetentionPolicy(max_bytes=size)


# --- Policies -------------------------------------------------------------------------------------


def test_by_age_goes_what_prune_old_sessions_takes(store: BaseStore) -> None:
    store.save_sessions(
        [
            ended("old", 91),
            ended("young", 89),
            ended("pinned", 91, is_pinned=True),
            session("never ended, old events", start_time=NOW - 100 * DAY),
            session("never ended, young events", start_time=NOW - 100 * DAY),
            session("never ended, no events", start_time=NOW - 100 * DAY),
            ended("root", 91),
            ended("root's child", 95, parent_session_id="root"),
            ended("pin's parent", 91),
            ended("pin", 95, manual_parent_session_id="pin's parent", is_pinned=True),
            ended("a", 91, manual_parent_session_id="nobody"),
            ended("b", 10, manual_parent_session_id="nobody"),
        ]
    )
    store.save_events(
        [
            event("old", NOW - 91 * DAY),
            event("never ended, old events", NOW - 91 * DAY),
            event("never ended, young events", NOW - 89 * DAY),
        ]
    )
    gone = {"old", "never ended, old events", "never ended, no events", "root", "root's child"}
    everything = names(store)
    size = sum(weight.size for weight in store.weigh_sessions(sorted(gone)).values())
    assert 1_000 < size < 5_000
    assert prune(store, RetentionPolicy()) == PruneReport(
        sessions=5, events=2, size=size, spared=0, kept=7
    )
    assert names(store) == everything - gone
    assert prune(store, RetentionPolicy()).sessions == 0
    assert store.prune_old_sessions(NOW - 90 * DAY) == 0
    assert store.save_event(event("old", NOW - 91 * DAY)) is False


@pytest.mark.parametrize("whose", ["this machine's", "the server's"])
def test_a_clock_that_is_ahead_makes_nothing_due(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    store.save_session(ended("young", 20))
    ahead = NOW + 80 * DAY
    if whose == "the server's":
        monkeypatch.setattr(store, "clock", lambda: ahead)
    else:
        monkeypatch.setattr(time, "time_ns", lambda: ahead * 1_000_000)
    assert prune(store, RetentionPolicy()).sessions == 0
    assert names(store) == {"young"}


def test_by_number_go_the_trees_that_were_active_longest_ago(store: BaseStore) -> None:
    store.save_sessions(
        [
            *(ended(f"s{age}", age) for age in (9, 7, 5, 3)),
            ended("tree", 8),
            ended("branch", 20, parent_session_id="tree"),
            ended("pinned", 30, is_pinned=True),
            session("named only", start_time=NOW - 40 * DAY, parent_session_id="reference"),
        ]
    )
    assert prune(store, by_number(8)).sessions == 0
    assert prune(store, by_number(7)).sessions == 1  # what nobody ended goes by its start
    assert names(store) == {"s9", "s7", "s5", "s3", "tree", "branch", "pinned"}
    assert prune(store, by_number(5)).sessions == 3  # a tree goes as a whole
    assert names(store) == {"s7", "s5", "s3", "pinned"}
    assert prune(store, by_number(0)).kept == 1
    assert names(store) == {"pinned"}


def test_by_bytes_stay_those_that_fit(store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "size", lambda: 10**12)
    store.save_sessions(ended(f"s{age}", age) for age in range(2, 8))
    for age in range(2, 8):
        data = {"text": random.Random(age).randbytes(5000).hex()}
        store.save_events(event(f"s{age}", NOW - age * DAY - i, data=data) for i in range(4))
    store.update_session("s7", is_pinned=True)
    weights = store.weigh_sessions(sorted(names(store)))
    assert {weight.events for weight in weights.values()} == {4}
    assert all(20_000 < weight.size < 80_000 for weight in weights.values())
    room = weights["s7"].size + weights["s2"].size + weights["s3"].size
    assert prune(store, by_bytes(room + 100)).sessions == 3
    assert names(store) == {"s2", "s3", "s7"}
    assert prune(store, by_bytes(room + 100)).sessions == 0
    assert prune(store, by_bytes(0)).sessions == 2
    assert names(store) == {"s7"}


def test_what_only_the_exact_payload_holds_is_weighed(store: BaseStore) -> None:
    text = random.Random(1).randbytes(750_000).hex()
    store.save_event(event("s", data={"nul": "\0", "x": text}))
    assert store.weigh_sessions(["s"])["s"].size > 1_000_000


def test_nothing_is_weighed_where_all_the_tables_fit(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "weigh_sessions", None)
    assert 0 < store.size() < 10**8
    assert plan(store, by_bytes(10**9)).sessions == 0


def test_what_still_runs_stays_whatever_the_limit(store: BaseStore) -> None:
    store.save_sessions([session("runs", start_time=NOW - 50 * DAY), ended("yesterday", 0.5)])
    store.save_event(event("runs", NOW - 1000))
    assert prune(store, by_number(0)).sessions == 0
    policy = RetentionPolicy(max_age_days=0.25, spared_days=0)
    assert prune(store, policy).sessions == 1
    assert names(store) == {"runs"}


def test_what_got_an_event_since_its_end_stays_as_long(store: BaseStore) -> None:
    store.save_sessions([ended("goes on", 100), ended("child", 100, parent_session_id="goes on"),
                         ended("over", 100), ended("over for two days", 100)])  # fmt: skip
    store.save_events(
        [
            event("over", NOW - 100 * DAY),
            event("over for two days", NOW - 2 * DAY),
            event("goes on", NOW - 1000),
        ]
    )
    assert prune(store, RetentionPolicy(max_age_days=0, max_sessions=0)).sessions == 2
    assert names(store) == {"goes on", "child"}
    assert prune(store, RetentionPolicy(spared_days=0)).sessions == 2


def test_a_limit_before_all_times_takes_nothing(store: BaseStore) -> None:
    store.save_sessions([ended("a", 100), ended("b", 50)])
    policy = RetentionPolicy(max_age_days=100_000, max_sessions=1)
    assert prune(store, policy).sessions == 1
    assert names(store) == {"b"}


def test_limits_hold_together(store: BaseStore) -> None:
    store.save_sessions(ended(f"s{age}", age) for age in (100, 95, 50, 40))
    found = plan(store, RetentionPolicy(max_age_days=90, max_sessions=3))
    assert (found.sessions, found.kept) == (2, 2)
    found = plan(store, RetentionPolicy(max_age_days=97, max_sessions=2))
    assert [tree[0].session_id for tree in found.trees] == ["s100", "s95"]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_age_days": -1},
        {"max_age_days": "90"},
        {"max_sessions": 1.5},
        {"max_sessions": True},
        {"max_bytes": -5},
        {"spared_days": None},
        {"max_age_days": float("nan")},
    ],
)
def test_a_senseless_limit_is_named(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"^{next(iter(limits))}: "):
        RetentionPolicy(**limits)


def test_an_age_is_the_limit_only_where_none_is_given() -> None:
    assert RetentionPolicy().max_age_days == RetentionPolicy(spared_days=3).max_age_days == 90
    assert RetentionPolicy(max_sessions=5).max_age_days is None
    assert RetentionPolicy(max_bytes=5).max_age_days is None


def test_a_dry_run_tells_the_same_and_changes_nothing(store: BaseStore) -> None:
    store.save_sessions(ended(f"s{i}", 100, parent_session_id="s0") for i in range(5))
    store.save_events(event(f"s{i}", NOW - 100 * DAY - i) for i in range(5))
    store.save_usage("s1", [usage()])
    before = store.session_tree(), [*store.iter_events()], store.get_usage("s1")
    told = prune(store, RetentionPolicy(), dry_run=True)
    assert (store.session_tree(), [*store.iter_events()], store.get_usage("s1")) == before
    assert told == prune(store, RetentionPolicy())
    assert (told.sessions, told.events, told.kept) == (5, 5, 0)
    assert names(store) == set()


def test_references_go_with_their_tree_and_do_not_count(
    store: BaseStore, database: Database
) -> None:
    store.save_sessions([ended("child", 100, parent_session_id="unseen"), ended("kept", 5)])
    assert prune(store, RetentionPolicy()).sessions == 1
    assert database.execute("SELECT session_id FROM sessions") == [("kept",)]
    assert database.execute("SELECT session_id FROM deleted_sessions") == [("child",)]


# --- Deleting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.update_session("kept child", is_pinned=True),
        lambda store: store.save_event(event("kept runner", T0 + 1)),
        lambda store: store.save_event(event("kept", T0 + 1)),
        lambda store: store.save_session(session("new", parent_session_id="kept child")),
        lambda store: store.save_session(session("new", manual_parent_session_id="kept")),
        lambda store: store.save_session(session("absent", is_pinned=True)),
        lambda store: store.delete_session("kept child"),
    ],
    ids=[
        "pinned",
        "went on",
        "went on after its end",
        "has a child",
        "was made a parent",
        "has a parent now",
        "lost one",
    ],
)
def test_the_tree_of_what_changed_meanwhile_is_spared(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch, change: Callable[[BaseStore], object]
) -> None:
    for name in ("kept", "gone"):
        store.save_session(session(name, **OLD))
        store.save_session(session(f"{name} child", parent_session_id=name, **OLD))
        store.save_session(session(f"{name} runner", parent_session_id=name))
        store.save_event(event(f"{name} runner", T0))
    store.update_session("kept", manual_parent_session_id="absent")
    select = store.session_states
    before = names(store)

    def then_change() -> list[Any]:
        found = select()
        change(store)
        return found

    monkeypatch.setattr(store, "session_states", then_change)
    report = prune(store, RetentionPolicy())
    assert (report.sessions, report.spared) == (3, 3)
    assert {one for one in before if one.startswith("kept")} >= names(store) - {"new", "absent"}
    assert not any(name.startswith("gone") for name in names(store))
    assert "kept runner" in names(store)


@pytest.mark.parametrize("count", [4, 5])
def test_sessions_are_looked_at_page_by_page(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(base, "_STATES", 2)
    store.save_sessions([session(f"s{number}", **OLD) for number in range(count)])
    assert [one.session_id for one in store.session_states()] == [f"s{n}" for n in range(count)]
    assert store.prune_old_sessions(T0 * 2) == count
    assert store.session_states() == []


@pytest.mark.parametrize("link", ["parent_session_id", "manual_parent_session_id"])
def test_two_trees_of_one_step_that_are_one_meanwhile_are_spared(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    store.save_sessions([session(name, **OLD) for name in ("above", "below", "gone")])
    select = store.session_states

    def then_link() -> list[Any]:
        found = select()
        store.update_session("below", **{link: "above"})
        return found

    monkeypatch.setattr(store, "session_states", then_link)
    report = prune(store, RetentionPolicy())
    assert (report.sessions, report.spared, names(store)) == (1, 2, {"above", "below"})


def test_steps_are_small_and_a_large_tree_goes_alone_and_whole(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP_EVENTS", 10)
    monkeypatch.setattr(retention, "STEP_SESSIONS", 3)
    monkeypatch.setattr("contextuate_persist.base.DELETE_ROWS", 10)
    for number in range(10):
        count = 25 if number == 4 else 4
        store.save_session(session(f"s{number}", start_time=T0 + number, end_time=T0 + number))
        store.update_session(f"s{number}", status="completed", end_time=T0 + number)
        store.save_events(event(f"s{number}", T0 + number) for _ in range(count))
    delete = store.delete_unchanged
    steps: list[int] = []

    def counted(states: Any) -> list[str]:
        steps.append(len(states))
        return delete(states)

    delete_some, slices = store._delete_some_events, []

    def sliced(*arguments: Any) -> int:
        slices.append(delete_some(*arguments))
        return slices[-1]

    monkeypatch.setattr(store, "delete_unchanged", counted)
    monkeypatch.setattr(store, "_delete_some_events", sliced)
    seen: list[tuple[int, int | None]] = []
    report = prune(
        store, RetentionPolicy(), progress=lambda done, total: seen.append((done, total))
    )
    assert (report.sessions, report.events) == (10, 61)
    assert steps == [2, 2, 1, 2, 2, 1]
    assert slices == [10, 10, 5]
    assert seen == [(2, 10), (4, 10), (5, 10), (7, 10), (9, 10), (10, 10)]
    assert store.save_event(event("s4", T0 + 4)) is False


def test_a_pace_rests_between_steps_by_what_they_took_and_a_minute_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, waits = [1000.0], []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            now[0] += timeout
            return super().wait(0)

    stop = Stop()
    pace = retention.Pace(10, stop)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        for seconds in pace.steps([1, 2, 7, 0]):
            now[0] += seconds
        assert waits == [0, 10, 20, 60]
        # What lies between two works counts as rest.
        for _ in pace.steps([1]):
            now[0] += 2
        now[0] += 5
        assert [*pace.steps([1])] == [1]
        assert waits[4:] == [0, 15]

        def found_slowly() -> Iterator[int]:
            for number in range(2):
                now[0] += 3
                yield number

        assert [*pace.steps(found_slowly())] == [0, 1]
        assert waits[6:] == [30, 30]
        stop.set()
        assert [*pace.steps([1])] == []


def test_trees_are_weighed_a_few_thousand_events_at_a_time(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_WEIGHED_EVENTS", 20)
    counts = [4, 4, 4, 4, 4, 4, 30, 30, *[0] * 40]
    store.save_sessions(session(f"s{number:02}", **OLD) for number in range(len(counts)))
    for number, count in enumerate(counts):
        store.save_events(event(f"s{number:02}", T0) for _ in range(count))
    weigh, asked = store.weigh_sessions, []

    def counted(ids: Any) -> Any:
        asked.append(len(ids))
        return weigh(ids)

    monkeypatch.setattr(store, "weigh_sessions", counted)
    trees = sorted(((state,) for state in store.session_states()), key=lambda tree: tree[0])
    found = [*retention.weighed(store, trees)]
    assert [weight.events for _, weight in found] == counts
    assert [tree for tree, _ in found] == trees
    # By what the last ones had, and at most twice as many as before.
    assert asked == [1, 2, 4, 1, 1, 2, 4, 8, 16, 9]


def test_pruning_stops_when_told_to_and_goes_on_later(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP_SESSIONS", 2)
    store.save_sessions(session(f"s{i}", **OLD) for i in range(6))
    stop = threading.Event()
    report = prune(store, RetentionPolicy(), progress=lambda *_: stop.set(), stop=stop)
    assert (report.sessions, report.spared, report.kept) == (2, 0, 4)
    assert prune(store, RetentionPolicy()).sessions == 4


def test_writers_go_on_while_old_sessions_go(database: Database) -> None:
    with make_store(database.url) as store:
        for number in range(60):
            store.save_session(session(f"old{number}", **OLD))
            store.save_events(event(f"old{number}", T0 - i) for i in range(50))
        over = threading.Event()
        stored: list[int] = []

        def write() -> None:
            number = 0
            while not over.is_set():
                number += 1
                some = [event(f"new{number % 5}", NOW + number) for _ in range(5)]
                stored.append(store.save_events(some))

        writers = [threading.Thread(target=write) for _ in range(3)]
        for writer in writers:
            writer.start()
        try:
            report = prune(store, RetentionPolicy())
        finally:
            over.set()
            for writer in writers:
                writer.join(30)
        assert (report.sessions, report.events, report.spared) == (60, 3000, 0)
        assert set(stored) == {5}
        assert sum(store.event_counts().values()) == sum(stored)


# --- Killed ---------------------------------------------------------------------------------------


def prune_killed(store: BaseStore, database: Database, seconds: float) -> bool:
    """Kill a pruning so long after its first transaction; whether it still ran."""
    command = [sys.executable, "-m", "contextuate_persist", "prune", "--rest", "2"]
    before, others = store.deletions(), database.connections()
    running = subprocess.Popen(
        command, env={**os.environ, ENVIRONMENT_URL: database.url}, stdout=subprocess.DEVNULL
    )
    while running.poll() is None and store.deletions() == before:
        time.sleep(0.005)
    time.sleep(seconds)
    running.kill()
    return database.wait_for_end_of(running, others) == -signal.SIGKILL


def kill_prunes(database: Database, kills: int) -> None:
    chance = random.Random(5)
    with make_store(database.url) as store:
        trees = 40 * kills
        for number in range(trees):
            root = f"root{number}"
            store.save_sessions([session(root, **OLD), session(f"{root} child", **OLD,
                                 parent_session_id=root)])  # fmt: skip
            store.save_events(event(root, T0 - i) for i in range(20))
        store.save_session(session("kept"))
        store.save_event(event("kept", NOW))
        hits = 0
        for _ in range(kills):
            hits += prune_killed(store, database, chance.uniform(0, 0.1))
            left, there = names(store), store.event_counts()
            for number in range(trees):  # a tree is there as a whole, or not at all
                assert (f"root{number}" in left) == (f"root{number} child" in left)
            assert sum(there.values()) == 20 * (len(left) - 1) // 2 + 1
        assert hits > 0
        assert prune(store, RetentionPolicy(), rest=0).kept == 1
        assert names(store) == {"kept"}


def test_a_pruning_that_was_killed_is_completed_by_the_next(database: Database) -> None:
    kill_prunes(database, kills=2)


@pytest.mark.soak
def test_a_pruning_that_is_killed_again_and_again_leaves_whole_trees(database: Database) -> None:
    kill_prunes(database, kills=20)


# --- The valve ------------------------------------------------------------------------------------


def big(name: str, age_days: float, count: int = 10) -> list[Any]:
    """Events of 5 kB and what goes with them."""
    data = {"text": random.Random(name).randbytes(2500).hex()}
    return [event(name, NOW - round(age_days * DAY) - i, data=data) for i in range(count)]


def weight(store: BaseStore) -> int:
    return sum(one.size for one in store.weigh_sessions(sorted(names(store))).values())


def limited(database: Database, limit: int, on_full: str, **options: Any) -> BaseStore:
    return make_store(database.url, storage_limit=limit, on_full=on_full, **options)


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the tables are large, whatever is in them: then only what is in them counts."""
    monkeypatch.setattr(BaseStore, "size", lambda self: 10**12)


def valve(store: BaseStore) -> retention.Valve:
    assert store._valve is not None
    return store._valve


def test_the_limit_is_told_once_and_again_only_after_a_tenth_is_free(
    store: BaseStore, database: Database, grown: None, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10):
        store.save_events(big(f"s{number}", 5))
    size = weight(store)
    with limited(database, size - 100, "warn") as warned, caplog.at_level("INFO"):
        for _ in range(3):
            valve(warned).check()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"{size - 100}" in caplog.text
        store.delete_session("s0")  # just below the limit
        valve(warned).check()
        assert valve(warned).full
        store.delete_session("s1")
        valve(warned).check()
        assert not valve(warned).full
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        store.save_events(big("s0", 4) + big("s1", 4))
        assert warned.save_event(event("more", NOW)) is True


def test_a_limit_that_cannot_be_watched_over_is_told_once(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [StoreRefused("not to you"), StoreRefused("not to you"), 1, StoreRefused("again")]

    def size(store: BaseStore) -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(BaseStore, "size", size)
    with limited(database, 10**9, "warn") as warned:
        for _ in range(4):
            valve(warned)._run()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [f"storage_limit is not watched over: {why}" for why in ("not to you", "again")]


def test_pruning_makes_room_by_deleting_what_was_active_longest_ago(
    store: BaseStore, database: Database, grown: None, rests: list[float]
) -> None:
    for number in range(10):
        store.save_events(big(f"s{number}", 20 - number))
    store.update_session("s0", is_pinned=True)
    store.save_events(big("now", 0))
    with limited(database, weight(store) - 100, "prune") as pruning:
        valve(pruning).check()
        assert names(store) == {"s0", *(f"s{i}" for i in range(3, 10)), "now"}
        assert not valve(pruning).full
        valve(pruning).check()
        assert len(names(store)) == 9
    everything = RetentionPolicy(max_age_days=10.5)
    with limited(database, weight(store) - 100, "prune", retention_policy=everything) as pruning:
        valve(pruning).check()
        assert names(store) == {"s0", "now"}
    with limited(database, 10, "prune") as pruning:  # nothing more may go
        valve(pruning).check()
        assert valve(pruning).full
        assert names(store) == {"s0", "now"}
        assert pruning.save_event(event("now", NOW)) is True
    assert set(rests) == {1.0}  # or writers would fill it faster


def test_refusing_says_what_to_do_and_ends_when_there_is_room(
    store: BaseStore, database: Database, grown: None
) -> None:
    for number in range(10):
        store.save_events(big(f"s{number}", 5))
    limit = weight(store) - 100
    with limited(database, limit, "refuse") as refusing:
        valve(refusing).check()
        calls: list[Callable[[], object]] = [
            lambda: refusing.save_event(event("s1")),
            lambda: refusing.save_events([event("s1")]),
            lambda: refusing.save_session(session("s1")),
            lambda: refusing.save_sessions([session("s1")]),
            lambda: refusing.save_usage("s1", [usage()]),
        ]
        for call in calls:
            with pytest.raises(StorageFull, match=f"storage_limit is {limit:,}.*prune --bytes"):
                call()
        refusing.update_session("s1", is_pinned=True)
        assert len(refusing.get_events("s1")) == 10
        refusing.delete_session("s0")
        valve(refusing).check()
        with pytest.raises(StorageFull):
            refusing.save_event(event("s1"))
        refusing.delete_session("s2")
        valve(refusing).check()
        assert refusing.save_event(event("s1")) is True


def test_a_writer_keeps_what_a_full_database_refuses(
    store: BaseStore, database: Database, grown: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store.save_events(big("old", 20, count=40))
    monkeypatch.setattr(retention, "CHECK_SECONDS", 0.05)
    with limited(database, weight(store) - 100, "refuse") as refusing:
        valve(refusing).check()
        with EventWriter(refusing, spool_directory=tmp_path / "spool") as writer:
            for number in range(50):
                writer.put(event("new", NOW + number))
            assert writer.flush(0.5) == 50
            assert "StorageFull" in str(writer.health().last_error)
            assert names(store) == {"old"}
            assert prune(store, RetentionPolicy(max_age_days=10)).sessions == 1
            assert writer.flush(20) == 0
            assert writer.health().stored == 50
    assert len(store.get_events("new")) == 50


def test_saves_ask_for_the_size_seldom_and_wait_for_no_answer(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    answer = threading.Event()
    queries: list[float] = []

    def size(self: BaseStore) -> int:
        queries.append(time.monotonic())
        asked.set()
        answer.wait(20)
        return 1

    monkeypatch.setattr(BaseStore, "size", size)
    with limited(database, 1000, "refuse") as store:
        for _ in range(50):
            store.save_event(event("s"))
        assert asked.wait(10)
        assert len(queries) == 1
        answer.set()
        for _ in range(50):
            store.save_event(event("s"))
        assert len(queries) == 1
    monkeypatch.setattr(retention, "CHECK_SECONDS", 0)
    with limited(database, 1000, "refuse") as store:
        for _ in range(20):
            store.save_event(event("s"))
            time.sleep(0.01)
    assert len(queries) > 2


def test_a_size_that_cannot_be_told_stops_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: BaseStore) -> int:
        raise StoreUnavailable("away")

    monkeypatch.setattr(BaseStore, "size", fail)
    monkeypatch.setattr(retention, "CHECK_SECONDS", 0)
    with limited(database, 1, "refuse") as store:
        for _ in range(5):
            assert store.save_event(event("s")) is True
            time.sleep(0.01)


def test_the_size_of_the_tables_is_the_servers(empty_database: Database) -> None:
    # In another one, what is deleted has left room.
    empty_database.owner().apply_schema()
    with make_store(empty_database.url) as store:
        before = store.size()
        assert before > 16_384
        for number in range(10):
            store.save_events(big(f"s{number}", 5, count=100))
        if store.backend == "mysql":
            empty_database.execute("ANALYZE TABLE events")
        assert store.size() > before + 2_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage_limit": 0}, "storage_limit: a number of bytes"),
        ({"storage_limit": "20GB"}, "storage_limit: a number of bytes"),
        ({"storage_limit": 5, "on_full": "stop"}, "on_full: 'warn', 'prune' or 'refuse'"),
        ({"on_full": "refuse"}, "on_full: it needs a limit"),
        ({"retention_policy": RetentionPolicy()}, "retention_policy: it needs a limit"),
    ],
)
def test_a_senseless_valve_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        open_store("postgresql://x@127.0.0.1/x", **options)


def test_the_limit_may_stand_in_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"

    def opened(storage: Any, **options: Any) -> BaseStore:
        block = {"type": "postgresql", "storage": storage}
        file.write_text(json.dumps({"persistence": block}))
        return open_store(config=file, **options)

    assert opened({})._valve is None
    found = valve(opened({"limit": "20GB", "onFull": "refuse"}))
    assert (found._limit, found._on_full) == (20 * 10**9, "refuse")
    assert valve(opened({"limit": 5000}))._on_full == "warn"
    assert valve(opened({"limit": 5000}, storage_limit=7000))._limit == 7000
    for wrong, message in (
        ({"limit": "much"}, 'storage.limit is a number of bytes, or "20GB"'),
        ({"limit": True}, "storage.limit is a number"),
        ({"limits": 5}, "storage.limits is not known"),
        ([], "persistence.storage is not a JSON object"),
        ({"limit": 5, "onFull": "x"}, "on_full: "),
    ):
        with pytest.raises(ConfigurationError, match=message):
            opened(wrong)


# --- The command ----------------------------------------------------------------------------------


def test_the_command_tells_what_it_would_do_and_does_it(run: Run, store: BaseStore) -> None:
    store.save_sessions([session("s", **OLD), ended("young", 5)])
    store.save_event(event("s", T0))
    status, out, _ = run("prune", "--dry-run")
    assert status == 0
    assert out.startswith("1 sessions with 1 events (0.0 MB) would be deleted; 1 sessions are kept")
    assert names(store) == {"s", "young"}
    assert run("prune", "--sessions", "5")[1].startswith("0 sessions")  # not also by age
    status, out, _ = run("prune", "--days", "30.5", "--json")
    (record,) = map(json.loads, out.splitlines())
    assert {key: record[key] for key in ("sessions", "events", "spared", "kept", "dryRun")} == {
        "sessions": 1, "events": 1, "spared": 0, "kept": 1, "dryRun": False,
    }  # fmt: skip
    assert names(store) == {"young"}
    assert run("prune", "--days", "0", "--spare", "0")[0] == 0
    assert names(store) == set()


def test_the_command_rests_as_long_as_it_is_told(
    run: Run, store: BaseStore, rests: list[float]
) -> None:
    for options in ((), ("--rest", "0"), ("--rest", "900")):
        store.save_session(session("s", **OLD), undelete=True)
        assert run("prune", *options)[0] == 0
    assert rests == [retention.REST, 0, 900]
    assert "'x' is not a number of times" in run("prune", "--rest", "x")[2]


def test_sizes_are_read_with_their_units(run: Run) -> None:
    assert parse_size("500") == 500
    assert parse_size("20GB") == 20 * 10**9
    assert parse_size("1.5 KiB") == 1536
    assert parse_size("2g") == 2 * 10**9
    assert parse_size("1TiB") == 2**40
    for wrong in ("", "GB", "-1", "5iB", "1e9", "5 PB", "٣"):
        status, _, err = run("prune", "--bytes", wrong)
        assert status == 2
        assert "not a number of bytes" in err
    for option in ("--days", "--spare"):
        assert "not a number of days" in run("prune", option, "-3")[2]
