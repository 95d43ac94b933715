"""The token ledger: an API message counts once over all sessions, with its largest reading."""

from __future__ import annotations

import itertools
import random
import threading

import pytest

from contextuate_persist import (
    InvalidBatch,
    InvalidRecord,
    MessageUsage,
    SessionNotFound,
    StoreUnavailable,
    TokenUsage,
)
from contextuate_persist.base import BaseStore
from contextuate_persist.model import MAX_TOKENS, USAGE_COUNTS
from tests.builders import T0, event, session, usage
from tests.conftest import Database, make_store
from tests.test_concurrency import run

BOTH_LAYOUTS = "deleted"


def totals(store: BaseStore, session_id: str) -> tuple[int, int, int | None, int | None]:
    found = store.get_session(session_id)
    assert found is not None
    total = found.token_usage
    return (
        total.total_input,
        total.total_output,
        total.total_cache_read,
        total.total_cache_creation,
    )


def reading(message_id: str, *counts: int, **fields: object) -> MessageUsage:
    names = ("input_tokens", "output_tokens", "cache_read", "cache_creation")
    given = dict(zip(names, counts, strict=False))
    return MessageUsage(message_id=message_id, timestamp=T0, **given, **fields)  # type: ignore[arg-type]


def test_the_totals_of_a_session_are_those_of_its_messages(store: BaseStore) -> None:
    store.save_session(session("s", token_usage=TokenUsage(total_input=999)))
    assert store.save_usage("s", [reading("m1", 1, 20, 300, 4000), reading("m2", 5, 6, 7, 8)]) == 2
    assert totals(store, "s") == (6, 26, 307, 4008)
    assert store.save_usage("s", iter([reading("m3", 1)])) == 1
    assert totals(store, "s") == (7, 26, 307, 4008)


def test_readings_that_come_again_count_once(store: BaseStore) -> None:
    store.save_event(event("s"))
    given = [reading("m1", 1, 2), reading("m2", 3, 4)]
    assert store.save_usage("s", given) == 2
    assert store.save_usage("s", given[::-1]) == 0
    assert store.save_usage("s", [*given, *given, reading("m3", 1)]) == 1
    assert totals(store, "s")[:2] == (5, 6)


def test_a_larger_reading_replaces_a_smaller_one_count_by_count(store: BaseStore) -> None:
    store.save_session(session("s"))
    assert store.save_usage("s", [reading("m", 5, 1, 0, 9)]) == 1
    assert store.save_usage("s", [reading("m", 4, 7, 0, 9)]) == 1
    assert totals(store, "s") == (5, 7, 0, 9)
    assert store.save_usage("s", [reading("m", 1, 1, 0, 1)]) == 0
    assert totals(store, "s") == (5, 7, 0, 9)


@pytest.mark.parametrize("name", USAGE_COUNTS)
def test_a_reading_that_is_larger_in_one_count_alone_raises_that_alone(
    store: BaseStore, name: str
) -> None:
    counts = {"input_tokens": 5, "output_tokens": 1, "cache_read": 3, "cache_creation": 9}
    store.save_session(session("s"))
    store.save_usage("s", [usage("m", **counts)])
    assert store.save_usage("s", [usage("m", **{**dict.fromkeys(counts, 0), name: 10})]) == 1
    assert totals(store, "s") == tuple({**counts, name: 10}.values())
    assert store.save_usage("s", [usage("m", 0)]) == 0
    assert totals(store, "s") == tuple({**counts, name: 10}.values())


def test_lines_of_one_message_in_one_call_count_with_the_largest(store: BaseStore) -> None:
    store.save_session(session("s"))
    lines = [reading("m", 3, output, 10, 0) for output in (1, 9, 4)]
    assert store.save_usage("s", lines) == 1
    assert totals(store, "s") == (3, 9, 10, 0)


def test_a_message_stays_with_the_session_that_told_of_it_first(
    store: BaseStore, database: Database
) -> None:
    store.save_sessions([session("first"), session("second")])
    store.save_usage("first", [reading("m", 1, 1)])
    assert store.save_usage("second", [reading("m", 1, 50), reading("own", 2, 2)]) == 2
    assert totals(store, "first")[:2] == (1, 50)
    assert totals(store, "second")[:2] == (2, 2)
    owners = database.execute("SELECT message_id, session_id FROM token_ledger ORDER BY 1")
    assert owners == [("m", "first"), ("own", "second")]


def test_a_session_whose_messages_all_belong_to_others_keeps_the_totals_given(
    store: BaseStore,
) -> None:
    store.save_sessions([session("a"), session("b", token_usage=TokenUsage(total_input=3))])
    store.save_usage("a", [reading("m", 1)])
    assert store.save_usage("b", [reading("m", 1)]) == 0
    assert totals(store, "b") == (3, 0, None, None)


def test_once_there_are_messages_no_save_changes_the_totals(store: BaseStore) -> None:
    store.save_session(session("s"))
    store.save_usage("s", [reading("m", 1, 2, 3, 4)])
    other = TokenUsage(total_input=9, total_output=9, total_cache_read=9, total_cache_creation=9)
    store.save_session(session("s", token_usage=other, label="x"))
    store.save_sessions([session("s", token_usage=other), session("t")])
    store.update_session("s", token_usage=other)
    assert totals(store, "s") == (1, 2, 3, 4)


def test_unknown_deleted_and_merely_named_sessions_have_no_usage(
    store: BaseStore, database: Database
) -> None:
    store.save_event(event("s", parent_session_id="named"))
    store.save_usage("s", [usage("gone")])
    store.delete_session("s")
    store.save_event(event("other", parent_session_id="named"))
    for session_id in ("unknown", "s", "named"):
        for usages in ([usage("m")], []):
            with pytest.raises(SessionNotFound):
                store.save_usage(session_id, usages)
    assert database.execute("SELECT COUNT(*) FROM token_ledger") == [(0,)]
    assert store.save_usage("other", []) == 0
    # Nobody owns it any more.
    assert store.save_usage("other", [usage("gone")]) == 1


def test_what_is_invalid_is_named_and_nothing_is_stored(store: BaseStore) -> None:
    store.save_session(session("s"))
    bad = [
        usage("ok"),
        usage(""),
        usage("m", -1),
        usage("m", True),
        usage("m", input_tokens=MAX_TOKENS + 1),
        usage("m", timestamp=1_700_000_000),
        usage("m", model="x" * 256),
        {"message_id": "m"},
    ]
    with pytest.raises(InvalidBatch) as caught:
        store.save_usage("s", bad)  # type: ignore[arg-type]
    assert [refusal.index for refusal in caught.value.refused] == [1, 2, 3, 4, 5, 6, 7]
    fields = [refusal.reason.partition(":")[0] for refusal in caught.value.refused]
    assert fields == [
        "message_id", "output_tokens", "output_tokens", "input_tokens", "timestamp", "model",
        "usage",
    ]  # fmt: skip
    assert totals(store, "s") == (0, 0, None, None)
    with pytest.raises(InvalidRecord, match="^usages: a list is needed, not int$"):
        store.save_usage("s", 5)  # type: ignore[arg-type]
    with pytest.raises(InvalidRecord, match="^session_id: "):
        store.save_usage("", [])


@pytest.mark.parametrize("name", USAGE_COUNTS)
def test_totals_end_where_a_session_could_not_be_saved_any_more(
    store: BaseStore, name: str
) -> None:
    store.save_session(session("s"))
    store.save_usage("s", [reading(f"m{i}", **{name: MAX_TOKENS}) for i in range(1500)])
    assert totals(store, "s")[USAGE_COUNTS.index(name)] == MAX_TOKENS
    found = store.get_session("s")
    assert found is not None
    assert store.save_session(found)


def test_ids_of_messages_differ_in_case_and_accents(store: BaseStore) -> None:
    store.save_session(session("s"))
    names = ["m", "M", "\u1e3f", "m\u0301", "\uff4d", "it's \\ DELIMITER ;", "%(message_ids)s"]
    assert store.save_usage("s", [usage(name) for name in names]) == len(names)
    assert store.save_usage("s", [usage(name, model="\0\ud800") for name in names]) == 0


def test_thousands_of_messages_are_counted_in_one_call(store: BaseStore) -> None:
    store.save_session(session("s"))
    many = [usage(f"msg_{i:05}", i % 7) for i in range(2500)]
    assert store.save_usage("s", many) == 2500
    assert store.save_usage("s", many) == 0
    assert totals(store, "s")[1] == sum(one.output_tokens for one in many)


# --- Many at once ---------------------------------------------------------------------------------


def test_the_same_messages_from_many_threads_and_sessions_count_once(database: Database) -> None:
    """Resumed and forked sessions repeat messages; every thread gives them in its own order."""
    sessions = [f"s{i}" for i in range(6)]
    largest = {f"m{i}": i for i in range(120)}
    counted: list[int] = []

    def deliver(store: BaseStore, number: int) -> None:
        chance = random.Random(number)
        for _ in range(12):
            names = chance.sample(sorted(largest), 40)
            given = [usage(name, chance.randint(0, largest[name])) for name in names]
            counted.append(store.save_usage(chance.choice(sessions), given))

    def finish(store: BaseStore) -> None:
        store.save_usage("s0", [usage(name, count) for name, count in largest.items()])

    with make_store(database.url) as one, make_store(database.url) as two:
        one.save_sessions([session(name) for name in sessions])
        run([lambda n=n: deliver(two if n % 2 else one, n) for n in range(16)])  # type: ignore[misc]
        run([lambda: finish(one), lambda: finish(two)])
        assert sum(totals(one, name)[1] for name in sessions) == sum(largest.values())
        for name in sessions:
            own = f"FROM token_ledger WHERE session_id = '{name}'"
            rows = database.execute(f"SELECT COALESCE(SUM(output_tokens), 0) {own}")
            assert totals(one, name)[1] == rows[0][0]
        assert database.execute("SELECT COUNT(*) FROM token_ledger") == [(len(largest),)]
        assert sum(counted) >= len(largest)


def test_usage_comes_while_sessions_are_written_and_deleted(database: Database) -> None:
    over = threading.Event()

    def count(store: BaseStore, number: int) -> None:
        chance = random.Random(number)
        for _ in range(40):
            given = [usage(f"m{chance.randrange(30)}", chance.randrange(9)) for _ in range(8)]
            try:
                store.save_usage(f"s{chance.randrange(4)}", given)
            except SessionNotFound:
                continue

    def write(store: BaseStore, number: int) -> None:
        chance = random.Random(number)
        for _ in range(40):
            names = chance.sample(range(4), 2)
            store.save_events(event(f"s{name}", T0 + 10**12) for name in names)
            store.save_session(session(f"s{names[0]}", start_time=T0 + 10**12))

    def delete(store: BaseStore) -> None:
        chance = random.Random(7)
        while not over.is_set():
            try:
                store.delete_session(f"s{chance.randrange(4)}")
            except SessionNotFound:
                over.wait(0.005)

    with make_store(database.url) as store:
        store.save_sessions([session(f"s{i}") for i in range(4)])
        deleting = threading.Thread(target=delete, args=(store,))
        deleting.start()
        try:
            counters = [lambda n=n: count(store, n) for n in range(6)]  # type: ignore[misc]
            writers = [lambda n=n: write(store, n) for n in range(4)]  # type: ignore[misc]
            run([*counters, *writers])
        finally:
            over.set()
            deleting.join(60)
        store.save_session(session("s0", start_time=T0 + 10**12), undelete=True)
        count(store, 0)
        compared = 0
        for found in store.get_sessions():
            name = found.session_id
            rows = database.execute(
                f"SELECT SUM(output_tokens) FROM token_ledger WHERE session_id = '{name}'"
            )
            if rows[0][0] is not None:
                assert found.token_usage.total_output == rows[0][0]
                compared += 1
        assert compared > 0


def test_owners_that_never_stop_appearing_end_in_an_error(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_session(session("s"))
    asked = itertools.count()
    monkeypatch.setattr(store, "_select_owners", lambda connection, ids: [f"o{next(asked)}"])
    with pytest.raises(StoreUnavailable, match="the same messages$"):
        store.save_usage("s", [reading("m", 1)])
    assert totals(store, "s") == (0, 0, None, None)


def test_an_owner_that_appears_meanwhile_is_locked_before_its_totals_change(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_sessions([session("a"), session("b")])
    select = store._select_owners
    asked = 0

    def late(connection: object, ids: list[str]) -> list[str]:
        nonlocal asked
        asked += 1
        if asked == 1:  # before anything is locked, another process is faster
            monkeypatch.setattr(store, "_select_owners", select)
            store.save_usage("a", [reading("m", 1, 1)])
            monkeypatch.setattr(store, "_select_owners", late)
            return []
        return select(connection, ids)

    monkeypatch.setattr(store, "_select_owners", late)
    assert store.save_usage("b", [reading("m", 2, 2)]) == 1
    assert asked == 4
    assert totals(store, "a")[:2] == (2, 2)
    assert totals(store, "b")[:2] == (0, 0)
