"""Batches that take the fast way in: what holds for a few events holds for many, and when repeats,
faults and other writers come in between."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from enum import Enum
from typing import Any

import pytest

from contextuate_persist import InvalidBatch, MonitorEvent, SaveResult, StoreUnavailable
from contextuate_persist.base import CHUNK_ROWS, BaseStore, StartOver
from contextuate_persist.mysql_store import _Sending
from tests.builders import T0, deadlock, event, session
from tests.conftest import Database, make_store

BOTH_LAYOUTS = "once|repeats|deleted|refuses_is_found|ctrl_c|equal"

MANY = 300


def many(session_id: str = "s", count: int = MANY, **fields: Any) -> list[MonitorEvent]:
    return [event(session_id, T0 + number // 3, **fields) for number in range(count)]


def stored(store: BaseStore) -> list[str]:
    return [one.id for one in store.iter_events()]


def test_a_large_batch_comes_back_equal_whatever_its_events_hold(store: BaseStore) -> None:
    odd: list[dict[str, Any]] = [
        {"event_type": "of tomorrow", "hook_type": "Tomorrow"},
        {"parent_session_id": "p", "working_directory": "/nul\0"},
        {"data": {"text": "\0\ud83d", "large": 2**80, "float": 1e300, "DELIMITER": "it's \\ //"}},
        {"data": {"toolName": "x" * 300, "toolUseId": "\udcff"}},
        {"data": {}},
        {"data": {"big": "b" * 1_100_000}},
    ]
    events = [event(f"s{n % 7}", T0 + n, **odd[n % 60 % len(odd)]) for n in range(120)]
    assert store.save_events(events) == 120
    for sent in events:
        assert store.get_event_by_id(sent.session_id, sent.id) == sent
    assert store.event_counts()["of tomorrow"] == 20
    assert [e.id for e in store.get_events("s0")] == [e.id for e in events if e.session_id == "s0"]


def test_events_of_one_millisecond_keep_the_order_of_a_large_batch(store: BaseStore) -> None:
    events = many()
    store.save_events(events)
    assert [e.id for e in store.get_events("s", limit=MANY)] == [e.id for e in events]


def test_repeats_in_large_batches_count_once_and_new_events_are_stored(store: BaseStore) -> None:
    first, second, third = many(), many(), many()
    assert store.save_events(first) == MANY
    assert store.save_events([*first[:50], *second, *second[:50]]) == MANY
    for _ in range(2):
        assert store.save_events(first) == 0
    assert store.save_events(third) == MANY
    assert store.save_events([*third, *many("other")]) == MANY
    assert len(stored(store)) == len(set(stored(store))) == 4 * MANY


def test_repeats_in_a_large_batch_tell_nothing_about_sessions(store: BaseStore) -> None:
    first = many()
    store.save_events(first)
    before = store.get_sessions()
    for _ in range(3):
        lies = [event("phantom", T0 - 1, id=one.id, machine_id="liar") for one in first]
        assert store.save_events(lies) == 0
        earlier = [event("s", T0 - 1, id=one.id, machine_id="liar") for one in first]
        assert store.save_events(earlier) == 0
    assert store.get_sessions() == before


def test_deleted_sessions_stay_deleted_when_large_batches_come_late(store: BaseStore) -> None:
    events = many()
    store.save_events(events)
    store.delete_session("s")
    assert store.save_events([*events, *many("other")]) == MANY
    assert store.get_session("s") is None
    assert store.save_events(events, undelete=True) == MANY


def test_every_bad_event_of_a_large_batch_is_named_and_nothing_stored(store: BaseStore) -> None:
    events: list[Any] = many()
    events[100] = event("s", T0, data={"x": float("nan")})
    events[200] = event("s", T0, data={"x": (1,)})
    with pytest.raises(InvalidBatch) as caught:
        store.save_events(events)
    assert [refusal.index for refusal in caught.value.refused] == [100, 200]
    assert stored(store) == []
    assert store.get_sessions() == []
    events[7] = "no event"
    with pytest.raises(InvalidBatch) as caught:
        store.save_events(events)
    assert [refusal.index for refusal in caught.value.refused] == [7, 100, 200]
    assert stored(store) == []


def test_the_good_events_of_a_large_batch_are_stored_if_bad_ones_may_be_left_out(
    store: BaseStore,
) -> None:
    events = many()
    events[100] = event("s", T0, data={"x": float("nan")})
    result = store.save_events(events, on_error="skip")
    assert isinstance(result, SaveResult)
    assert result.stored == MANY - 1
    assert [(refusal.index, refusal.id) for refusal in result.refused] == [(100, events[100].id)]
    assert len(stored(store)) == MANY - 1


def test_an_event_that_comes_again_is_stored_if_only_the_first_of_them_is_bad(
    store: BaseStore,
) -> None:
    bad = event("s", T0, data={"x": float("nan")})
    good = event("s", T0, id=bad.id)
    result = store.save_events([bad, good, event("s", T0 + 1)], on_error="skip")
    assert isinstance(result, SaveResult)
    assert (result.stored, [refusal.index for refusal in result.refused]) == (2, [0])
    assert store.get_event_by_id("s", good.id) == good


def test_a_batch_of_several_transactions_stores_nothing_if_its_last_event_is_bad(
    store: BaseStore,
) -> None:
    events = [*many(count=CHUNK_ROWS + 1), event("s", T0, data={"x": float("inf")})]
    with pytest.raises(InvalidBatch) as caught:
        store.save_events(events)
    assert [refusal.index for refusal in caught.value.refused] == [CHUNK_ROWS + 1]
    assert stored(store) == []


def test_a_batch_with_more_bytes_than_a_transaction_should_have_is_cut(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, sizes = store._insert_events, []

    def counted(*arguments: Any, **options: Any) -> int:
        sizes.append(insert(*arguments, **options))
        return sizes[-1]

    monkeypatch.setattr(store, "_insert_events", counted)
    store._chunk_bytes = 100_000
    events = many("s", 60, data={"text": "x" * 5_000})
    assert store.save_events(events) == 60
    assert sum(sizes) == 60
    assert 15 < max(sizes) < 20
    assert [one.id for one in store.get_events("s")] == [one.id for one in events]


def test_an_event_that_the_server_refuses_is_found_in_a_large_batch(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = many()
    events[123] = event("s", T0, machine_id="x" * 300)
    monkeypatch.setattr("contextuate_persist.model.check_event", lambda event: event.id)
    result = store.save_events(events, on_error="skip")
    assert isinstance(result, SaveResult)
    assert result.stored == MANY - 1
    assert [refusal.index for refusal in result.refused] == [123]
    assert len(stored(store)) == MANY - 1


def test_writers_of_the_same_large_batches_store_them_once(database: Database) -> None:
    batches = [many(f"s{number % 3}", 60) for number in range(12)]
    counts: list[int] = []
    with make_store(database.url) as store:
        store.save_session(session("s0"))

        def write(order: list[list[MonitorEvent]]) -> None:
            counts.extend(store.save_events(batch) for batch in order)

        threads = [
            threading.Thread(target=write, args=(order,))
            for order in (batches, batches[::-1], batches[6:] + batches[:6], batches)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(counts) == 12 * 60
        assert sorted(stored(store)) == sorted(e.id for batch in batches for e in batch)


def test_writers_whose_batches_share_some_events_store_each_once(database: Database) -> None:
    common = many("shared", 40)
    counts: list[int] = []
    with make_store(database.url) as store:

        def write(number: int) -> None:
            mixed = ([*many(f"own{number}", 40), *common] for _ in range(5))
            counts.extend(map(store.save_events, mixed))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(counts) == 4 * 5 * 40 + 40
        assert len(stored(store)) == len(set(stored(store))) == sum(counts)


def test_repeats_that_keep_coming_are_asked_for_before_they_are_sent(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    undone = 0

    def count(*arguments: Any, **options: Any) -> None:
        nonlocal undone
        undone += 1
        original(*arguments, **options)

    original = StartOver.__init__
    monkeypatch.setattr(StartOver, "__init__", count)
    first = many(count=40)
    store.save_events(first)
    for _ in range(5):
        assert store.save_events([*first, *many(count=40)]) == 40
    assert undone <= 1
    for _ in range(3):
        assert store.save_events(many()) == MANY
    assert undone <= 1


def test_late_events_that_keep_coming_are_asked_for_before_anything_is_locked(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = many(count=20)
    store.save_events(late)
    store.delete_session("s")
    chunks = 0

    def count(*arguments: Any, **options: Any) -> int:
        nonlocal chunks
        chunks += 1
        return original(*arguments, **options)

    original = store._insert_events
    monkeypatch.setattr(store, "_insert_events", count)
    for _ in range(5):
        assert store.save_events(late) == 0
        assert store.save_event(late[0]) is False
    assert chunks == 1
    assert store.save_events([*late, event("other", T0)]) == 1
    assert store.save_events(late, undelete=True) == 20
    assert len(stored(store)) == 21


def test_who_gives_way_in_deadlocks_tries_as_long_as_who_waits_for_a_lock(
    backend: str, database: Database
) -> None:
    tries = 0

    def work(connection: Any) -> str:
        nonlocal tries
        tries += 1
        if tries < 20:
            raise deadlock(backend)
        return "through"

    with make_store(database.url) as patient:
        assert patient._run(work) == "through"
    tries = -100
    with (
        make_store(database.url, lock_timeout=0.1) as hasty,
        pytest.raises(StoreUnavailable, match=r"."),
    ):
        hasty._run(work)
    assert tries < 0


def test_a_large_batch_can_be_stored_while_the_interpreter_ends(database: Database) -> None:
    program = f"""
import atexit
from contextuate_persist import open_store
from tests.test_batches import many
store = open_store({database.url!r})
store.init()
atexit.register(lambda: print(store.save_events(many(data={{"text": "x" * 3000}}))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == (f"{MANY}\n", "")


@pytest.mark.only("mysql")
def test_ctrl_c_waits_for_the_statement_that_is_on_its_way(store: BaseStore, ctrl_c: None) -> None:
    with store._connection(transaction=False) as connection:
        sending = _Sending(connection, b"DO SLEEP(1)")
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            sending.wait()
        assert sending._over.is_set()
        timer.join()


class Kind(str, Enum):
    CALL = "tool_call"


def test_a_text_that_is_an_enum_is_stored_by_its_value(store: BaseStore) -> None:
    sent = event("s", event_type=Kind.CALL)
    store.save_event(sent)
    store.save_events([event("s", event_type=Kind.CALL), event("s", event_type=Kind.CALL)])
    store.update_session("s", label=Kind.CALL)
    assert store.event_counts() == {"tool_call": 3}
    assert len(store.find_events(event_type=Kind.CALL)) == 3
    assert store.get_session("s").label == "tool_call"  # type: ignore[union-attr]


@pytest.mark.only("postgresql")
def test_what_another_unique_index_refuses_is_not_taken_for_a_repeat(
    database: Database, store: BaseStore
) -> None:
    database.execute("CREATE UNIQUE INDEX of_an_administrator ON events (tool_use_id)")
    try:
        events = many(count=20, data={"toolUseId": "the same"})
        result = store.save_events(events, on_error="skip")
    finally:
        database.execute("DROP INDEX of_an_administrator")
    assert isinstance(result, SaveResult)
    assert (result.stored, len(result.refused)) == (1, 19)
    assert "of_an_administrator" in result.refused[0].reason


def test_a_batch_that_others_keep_changing_is_given_up_in_the_end(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_over(*_: Any, **__: Any) -> int:
        raise StartOver(repeats=True)

    monkeypatch.setattr(store, "_insert_events", start_over)
    with pytest.raises(StoreUnavailable, match="others keep storing"):
        store.save_events(many(count=2))
