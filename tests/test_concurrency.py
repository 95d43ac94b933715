"""Many writers at once: nobody's work is lost, nothing counts twice, no deadlock surfaces."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from typing import Any

import pytest

from contextuate_persist import MessageUsage, SessionNotFound, TokenUsage
from contextuate_persist.base import BaseStore, Fault
from tests.builders import T0, event, session
from tests.conftest import Database, make_store

BOTH_LAYOUTS = "events|delet|late"

THREADS = 16
DAY = 86_400_000


def run(works: list[Callable[[], None]]) -> None:
    """Run all at once; fail with the first error."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        try:
            start.wait(30)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)


def test_the_same_events_from_sixteen_threads_are_stored_once(database: Database) -> None:
    """In shuffled order, in batches and one by one, from two stores, parents and children mixed."""
    events = [
        event(f"s{i % 9}", T0 + i // 20, parent_session_id=f"s{(i * 7 + 1) % 9}" if i % 3 else None)
        for i in range(600)
    ]
    stored: list[int] = []

    def deliver(store: BaseStore, number: int) -> None:
        own = events[:]
        chance = random.Random(number)
        chance.shuffle(own)
        while own:
            size = chance.choice([1, 3, 40])
            batch, own = own[:size], own[size:]
            stored.append(store.save_event(batch[0]) if size == 1 else store.save_events(batch))

    with make_store(database.url) as one, make_store(database.url) as two:
        run([lambda n=n: deliver(two if n % 2 else one, n) for n in range(THREADS)])  # type: ignore[misc]
        assert sum(stored) == 600
        assert {e.id for e in one.iter_events()} == {e.id for e in events}
        assert sum(one.event_counts().values()) == 600


def test_events_are_stored_however_often_another_writer_is_ahead_by_one(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other stores one of the batch before every attempt, for more than any count of tries."""
    batch = [event("s", T0 + i, parent_session_id=f"p{i}") for i in range(40)]
    with make_store(database.url) as store, make_store(database.url) as other:
        insert = store._insert_events
        ahead = iter(batch[::-1])

        def overtaken(*arguments: Any, **named: Any) -> int:
            for one in ahead:
                other.save_event(one)
                break
            return insert(*arguments, **named)

        monkeypatch.setattr(store, "_insert_events", overtaken)
        monkeypatch.setattr(
            BaseStore, "_drop_known", lambda _self, _connection, rows, _changed: rows
        )
        assert store.save_events(batch) < 40
        assert next(ahead, None) is None
        assert {e.id for e in other.iter_events()} == {e.id for e in batch}


def test_children_linked_at_once_are_all_listed(store: BaseStore) -> None:
    def link(number: int) -> None:
        for i in range(5):
            name = f"c{number}-{i}"
            store.save_session(session("parent", child_session_ids=(name,)))
            store.save_session(session(name, parent_session_id="parent"))
            store.save_session(session("mother", child_session_ids=(f"listed{name}",)))

    run([lambda n=n: link(n) for n in range(THREADS)])  # type: ignore[misc]
    names = {f"c{n}-{i}" for n in range(THREADS) for i in range(5)}
    parent, mother = store.get_session("parent"), store.get_session("mother")
    assert parent is not None
    assert mother is not None
    assert sorted(parent.child_session_ids) == sorted(names)
    assert sorted(mother.child_session_ids) == sorted(f"listed{name}" for name in names)


def test_the_ui_and_the_daemon_do_not_undo_each_other(store: BaseStore) -> None:
    """One saves the sessions over and over, the other sets pins, labels, parents."""
    names = [f"s{i}" for i in range(10)]
    store.save_sessions(session(name) for name in names)

    def daemon(number: int) -> None:
        chance = random.Random(number)
        for i in range(30):
            chosen = chance.sample(names, 4)
            store.save_sessions(
                session(name, parent_session_id="root", model=f"m{i}") for name in chosen
            )
            store.save_events([event(name, T0 + i) for name in chosen])

    def ui(number: int) -> None:
        for name in names[number::4]:
            store.update_session(name, is_pinned=True)
            store.update_session(name, label=f"label {name}")
            store.update_session(name, manual_parent_session_id="folder", hidden=True)

    run([lambda n=n: daemon(n) for n in range(12)] + [lambda n=n: ui(n) for n in range(4)])  # type: ignore[misc]
    for name in names:
        got = store.get_session(name)
        assert got is not None
        assert (got.is_pinned, got.label, got.hidden) == (True, f"label {name}", True)
        assert got.manual_parent_session_id == "folder"
        assert got.parent_session_id == "root"


def test_saves_in_every_order_and_with_cyclic_parents_never_deadlock_for_good(
    store: BaseStore,
) -> None:
    names = [f"s{i}" for i in range(8)]

    def work(number: int) -> None:
        chance = random.Random(number)
        for i in range(25):
            chosen = chance.sample(names, 5)
            store.save_sessions(
                session(name, parent_session_id=chance.choice(names)) for name in chosen
            )
            store.save_events(
                [event(n, T0 + i, parent_session_id=chance.choice(names)) for n in chosen]
            )
            store.update_session(chosen[0], parent_session_id=chance.choice(names))

    run([lambda n=n: work(n) for n in range(THREADS)])  # type: ignore[misc]
    assert sum(store.event_counts().values()) == THREADS * 25 * 5
    assert len(store.session_tree()) == len(names)


def test_deleting_while_others_write_leaves_no_orphan_and_no_error(
    store: BaseStore, database: Database
) -> None:
    names = [f"s{i}" for i in range(6)]

    def write(number: int) -> None:
        for i in range(30):
            store.save_event(event(names[(number + i) % 6], T0 + i, parent_session_id="s0"))
            store.save_events([event(name, T0 + i) for name in names])
            store.save_session(session(names[i % 6], parent_session_id=names[(i + 1) % 6]))

    def delete(number: int) -> None:
        for i in range(20):
            try:
                store.delete_session(names[(number + i) % 6])
            except SessionNotFound:
                continue
        store.prune_old_sessions(T0 + 5)

    run([lambda n=n: write(n) for n in range(10)] + [lambda n=n: delete(n) for n in range(6)])  # type: ignore[misc]
    [(orphans,)] = database.execute(
        "SELECT COUNT(*) FROM events WHERE session_id NOT IN (SELECT session_id FROM sessions)"
    )
    assert orphans == 0
    shown = {s.session_id for s in store.get_sessions()}
    for name in set(names) - shown:
        assert store.get_events(name) == []


def test_late_deliveries_race_with_a_deletion_and_lose(store: BaseStore) -> None:
    for attempt in range(15):
        name = f"race{attempt}"
        old = [event(name, T0 + i) for i in range(20)]
        store.save_events(old)
        run(
            [
                lambda name=name: store.delete_session(name),  # type: ignore[misc]
                lambda old=old: store.save_events(old),  # type: ignore[misc,list-item]
                lambda old=old: [store.save_event(e) for e in old],  # type: ignore[misc,list-item]
            ]
        )
        assert store.get_session(name) is None
        assert store.get_events(name) == []


def start(work: Callable[[], Any]) -> Callable[[], Any]:
    """Do work that has to wait in a thread; what then waits for its result."""
    future: futures.Future[Any] = futures.Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=do, daemon=True).start()
    with pytest.raises(futures.TimeoutError):
        future.result(0.3)
    return partial(future.result, 60)


def test_a_deletion_that_waits_for_a_batch_counts_its_events(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event from a clock that is ahead is no newer than the deletion that it goes with."""
    ahead = event("s", time.time_ns() // 1_000_000 + DAY // 2)
    store.save_session(session("s"))
    insert = store._insert_events
    waiting: list[Callable[[], Any]] = []

    def inserted(*arguments: Any, **named: Any) -> int:
        count = insert(*arguments, **named)
        waiting.append(start(lambda: store.delete_session("s")))
        return count

    with monkeypatch.context() as patch:
        patch.setattr(store, "_insert_events", inserted)
        assert store.save_events([ahead]) == 1
    waiting[0]()
    assert store.save_event(ahead) is False
    assert store.get_session("s") is None


def noted_faults(store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What the server refuses from now on, also where it is tried again."""
    faults: list[Exception] = []
    fault_of = store._fault

    def noted(error: Exception) -> Fault | None:
        faults.append(error)
        return fault_of(error)

    monkeypatch.setattr(store, "_fault", noted)
    return faults


@pytest.mark.parametrize("how", ["delete", "lock", "hold", "kin"])
def test_sessions_are_locked_in_the_order_of_their_ids(
    store: BaseStore, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server finds them as b, m, a; another has m, and one who comes last wants a and b."""
    names = ["b", "m", "a"]
    store.save_sessions(map(session, names))
    for name in names:
        store.update_session(name, manual_parent_session_id=None if name == "m" else "m")
    works: dict[str, Callable[[Any], Any]] = {
        "delete": lambda connection: store._delete_session(connection, "m"),
        "lock": lambda connection: store._lock_sessions(connection, names),
        "hold": lambda connection: store._hold_sessions(connection, names),
        "kin": lambda connection: store._lock_kin(connection, names),
    }
    faults = noted_faults(store, monkeypatch)
    with store._connection(True) as connection:
        store._lock_sessions(connection, ["m"])
        locking = start(lambda: store._run(works[how], transaction=True))
        storing = start(lambda: store.save_events([event("a"), event("b")]))
    locking()
    assert storing() == 2
    assert faults == []


@pytest.mark.only("postgresql")
def test_a_session_that_is_held_takes_single_events_meanwhile(database: Database) -> None:
    with make_store(database.url, lock_timeout=1) as store:
        store.save_session(session("s"))
        with store._connection(True) as connection:
            store._hold_sessions(connection, ["s"])
            assert store.save_event(event("s")) is True


@pytest.mark.parametrize("parent", [None, "p"])
def test_a_save_that_waits_for_a_deletion_does_not_undo_it(
    store: BaseStore, parent: str | None
) -> None:
    store.save_sessions([session("s"), session("p")])
    late = session("s", parent_session_id=parent)
    with store._connection(True) as connection:
        store._delete_session(connection, "s")
        saving = start(lambda: store.save_session(late))
    assert saving() is False
    assert store.get_session("s") is None
    assert [one.session_id for one in store.get_sessions()] == ["p"]


@pytest.mark.parametrize("how", ["save", "update", "try"])
@pytest.mark.parametrize("parent", ["new", "z"])  # before and behind it in the order of the locks
def test_what_links_a_session_while_it_is_deleted_leaves_no_reference(
    store: BaseStore, database: Database, how: str, parent: str
) -> None:
    store.save_sessions([session("s"), session("other")])
    works = {
        "save": lambda: store.save_session(session("s", parent_session_id=parent)),
        "update": lambda: store.update_session("s", parent_session_id=parent),
        "try": lambda: store.try_updating("s", parent_session_id=parent),
    }
    with store._connection(True) as connection:
        store._delete_session(connection, "s")
        linking = start(works[how])
    if how == "update":
        with pytest.raises(SessionNotFound):
            linking()
    else:
        assert linking() is False
    assert database.execute("SELECT session_id FROM sessions") == [("other",)]


@pytest.mark.parametrize("how", ["save", "update"])
def test_a_save_that_makes_a_parent_never_waits_in_a_circle(
    store: BaseStore, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both link b to a, which is not there yet; whoever has b last must have made a before."""
    store.save_session(session("b"))
    works = {
        "save": lambda: store.save_session(session("b", parent_session_id="a")),
        "update": lambda: store.update_session("b", parent_session_id="a"),
    }
    faults = noted_faults(store, monkeypatch)
    with store._connection(True) as connection:
        store._lock_sessions(connection, ["b"])
        linking = start(works[how])
        storing = start(lambda: store.save_events([event("b", parent_session_id="a")]))
    linking()
    assert storing() == 1
    assert faults == []
    found = store.get_session("b")
    assert found is not None
    assert found.parent_session_id == "a"


@pytest.mark.parametrize("how", ["save", "update"])
def test_totals_that_wait_for_the_first_usage_do_not_overwrite_it(
    store: BaseStore, how: str
) -> None:
    store.save_session(session("s"))
    zero = TokenUsage(total_input=0, total_output=0)
    usage = MessageUsage(message_id="m", timestamp=T0, input_tokens=3, output_tokens=5)
    works = {
        "save": lambda: store.save_session(session("s", token_usage=zero)),
        "update": lambda: store.update_session("s", token_usage=zero),
    }
    with store._connection(True) as connection:
        store._lock_sessions(connection, ["s"])
        store._upsert_usage(connection, "s", [usage])
        store._set_totals(connection, ["s"])
        waiting = start(works[how])
    waiting()
    found = store.get_session("s")
    assert found is not None
    assert (found.token_usage.total_input, found.token_usage.total_output) == (3, 5)


def test_readers_see_new_rows_at_once(store: BaseStore, database: Database) -> None:
    """No connection of the pool may hold an old snapshot."""
    with make_store(database.url) as reader:
        for i in range(30):
            assert len(reader.get_events("s")) == i
            store.save_event(event("s", T0 + i))
