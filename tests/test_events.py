"""Events: stored once, in one order, in any order of arrival; the contract of both stores."""

from __future__ import annotations

import dataclasses
import random
import threading
import uuid
from typing import Any

import pytest

from contextuate_persist import Cursor, InvalidBatch, InvalidRecord, SaveResult, StoreClosed
from contextuate_persist.base import BaseStore
from tests.builders import T0, event, session
from tests.conftest import Database, make_store

BOTH_LAYOUTS = "save|stored|once|again|pag|order|by_id|bisection"

# --- Once -----------------------------------------------------------------------------------------


def test_a_saved_event_comes_back_equal(store: BaseStore) -> None:
    sent = event(parent_session_id="p", data={"toolName": "Bash", "n": [1, 2.5, None, True]})
    assert store.save_event(sent) is True
    got = store.get_event_by_id("s", sent.id)
    assert got == sent
    assert got is not None
    assert isinstance(got.seq, int)


def test_an_event_id_counts_once_whatever_comes_with_it(store: BaseStore) -> None:
    first = event("s", T0)
    again = event("other", T0 + 1, id=first.id, event_type="error", data={"other": True})
    assert store.save_event(first) is True
    assert store.save_event(first) is False
    assert store.save_event(again) is False
    assert store.save_events([again, first]) == 0
    assert store.get_events("s") == [first]
    assert store.get_events("other") == []


def test_a_repeated_id_leaves_the_first_event_as_it_was(store: BaseStore) -> None:
    first = event("s", T0)
    fields: dict[str, Any] = {"data": {"other": True}, "event_type": "error", "machine_id": "x"}
    again = event("s", T0 + 1, id=first.id, **fields)
    store.save_event(first)
    assert store.save_event(again) is False
    assert store.save_events([again]) == 0
    assert store.save_events([again, *(event("s", T0 + i) for i in range(30))]) == 30
    assert store.get_event_by_id("s", first.id) == first
    assert len(store.get_events("s")) == 31


def test_a_repeated_id_tells_nothing_about_sessions(store: BaseStore) -> None:
    first = event("s", T0 + 5, machine_id="m")
    store.save_event(first)
    before = store.get_session("s")
    lies = [
        event("phantom", T0, id=first.id),
        event("s", T0, id=first.id, machine_id="x", parent_session_id="p"),
    ]
    for lie in lies:
        assert store.save_event(lie) is False
        assert store.save_events([lie]) == 0
        assert store.save_events([lie, event("t", T0)]) == 1
    assert store.get_session("phantom") is None
    assert store.get_session("s") == before


def test_an_event_id_in_capitals_is_the_same_id(store: BaseStore) -> None:
    sent = event()
    shouted = event(id=sent.id.upper())
    assert store.save_event(sent) is True
    assert store.save_event(shouted) is False
    assert store.get_event_by_id("s", sent.id.upper()) == sent


def test_repeats_within_a_batch_are_stored_once_and_the_first_stays(store: BaseStore) -> None:
    first = event("s", T0)
    second = event("s", T0 + 1, id=first.id)
    other = event("s", T0 + 2)
    assert store.save_events([first, second, other, first]) == 2
    assert store.get_events("s") == [first, other]


def test_a_redelivered_batch_adds_only_what_is_new(store: BaseStore) -> None:
    old = [event(f"s{i % 5}", T0 + i) for i in range(100)]
    new = [event(f"s{i % 5}", T0 + i) for i in range(50)]
    assert store.save_events(old) == 100
    mixed = old + new
    random.Random(7).shuffle(mixed)
    assert store.save_events(mixed) == 50
    assert sum(store.event_counts().values()) == 150


def test_many_events_are_stored_in_several_transactions(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, sizes = store._insert_events, []

    def counted(connection: object, rows: list[Any], undelete: bool) -> int:
        sizes.append(len(rows))
        return insert(connection, rows, undelete)

    monkeypatch.setattr(store, "_insert_events", counted)
    events = [event(f"s{i % 3}", T0 + i) for i in range(2_500)]
    assert store.save_events(events) == 2_500
    assert sizes == [1_000, 1_000, 500]
    assert [e.id for e in store.iter_events()] == [e.id for e in events]


def test_saving_nothing_stores_nothing(store: BaseStore) -> None:
    assert store.save_events([]) == 0
    assert store.save_events([], on_error="skip") == SaveResult(stored=0)
    store.save_sessions([])
    assert store.get_sessions() == []


def test_a_generator_of_events_is_taken(store: BaseStore) -> None:
    assert store.save_events(event(timestamp=T0 + i) for i in range(3)) == 3


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("known", [True, False])
def test_every_field_is_kept_and_found_whichever_way_an_event_comes_in(
    store: BaseStore, known: bool, count: int
) -> None:
    """Alone or among others, to a session that is known or not: statements of their own."""
    if known:
        store.save_session(session("s"))
    sent = event(
        "s",
        machine_id="of the event",
        working_directory="/of the event",
        parent_session_id="p",
        event_type="quantum_leap",
        hook_type="Leap",
        data={"toolName": "Edit", "toolUseId": "toolu_1", "exact": "\0\ud800"},
    )
    if count == 1:
        assert store.save_event(sent) is True
    else:
        assert store.save_events([sent, *(event("s", T0 + i) for i in range(1, count))]) == count
    assert store.get_event_by_id("s", sent.id) == sent
    assert store.find_events(machine_id="of the event") == [sent]
    assert store.find_events(parent_session_id="p") == [sent]
    assert store.find_events(event_type="quantum_leap") == [sent]
    assert store.find_events(hook_type="Leap") == [sent]
    assert store.find_events(tool_name="Edit") == [sent]
    assert store.find_events(tool_use_id="toolu_1") == [sent]


# --- Order ----------------------------------------------------------------------------------------


def test_equal_timestamps_keep_the_order_of_the_caller(store: BaseStore) -> None:
    events = [event("s", T0) for _ in range(300)]
    store.save_events(events[:100])
    for one in events[100:120]:
        store.save_event(one)
    store.save_events(events[120:])
    assert [e.id for e in store.get_events("s")] == [e.id for e in events]


def test_order_within_a_session_survives_interleaving(store: BaseStore) -> None:
    events = [event(f"s{i % 7}", T0) for i in range(700)]
    store.save_events(events)
    for number in range(7):
        expected = [e.id for e in events if e.session_id == f"s{number}"]
        assert [e.id for e in store.get_events(f"s{number}")] == expected


def test_late_events_are_sorted_by_their_time(store: BaseStore) -> None:
    late, early = event("s", T0 + 10), event("s", T0 + 1)
    store.save_event(late)
    store.save_event(early)
    assert store.get_events("s") == [early, late]


@pytest.mark.parametrize("page", [1, 7, 100])
def test_pages_by_cursor_neither_skip_nor_repeat(store: BaseStore, page: int) -> None:
    events = [event("s", T0 + i // 40) for i in range(200)]  # forty share a millisecond
    store.save_events(events)
    expected = [e.id for e in events]

    forward: list[str] = []
    position: Cursor | int | None = T0 - 1
    while got := store.get_events("s", after=position, limit=page):
        forward += [e.id for e in got]
        position = got[-1].cursor
    assert forward == expected

    back: list[str] = []
    position = None
    while got := store.get_events("s", before=position, limit=page):
        back = [e.id for e in got] + back
        position = got[0].cursor
    assert back == expected


def test_time_bounds_are_exclusive(store: BaseStore) -> None:
    events = [event("s", T0 + i // 2) for i in range(10)]
    store.save_events(events)
    assert store.get_events("s", after=T0) == events[2:]
    assert store.get_events("s", before=T0 + 4) == events[:8]
    assert store.get_events("s", after=T0, before=T0 + 4) == events[2:8]
    assert (
        store.get_events("s", after=store.get_events("s")[4].cursor, before=T0 + 4) == events[5:8]
    )


def test_with_after_alone_the_oldest_come_otherwise_the_newest(store: BaseStore) -> None:
    events = [event("s", T0 + i) for i in range(10)]
    store.save_events(events)
    assert store.get_events("s", limit=3) == events[-3:]
    assert store.get_events("s", after=T0, limit=3) == events[1:4]
    assert store.get_events("s", before=T0 + 9, limit=3) == events[6:9]
    assert store.get_events("s", after=T0, before=T0 + 9, limit=3) == events[6:9]
    assert store.get_events("s", limit=0) == []


def test_a_cursor_survives_as_text(store: BaseStore) -> None:
    store.save_events([event("s", T0), event("s", T0)])
    first, second = store.get_events("s")
    assert store.get_events("s", after=Cursor.parse(str(first.cursor))) == [second]


def test_recent_events_come_newest_first_over_all_sessions(store: BaseStore) -> None:
    events = [event(f"s{i % 3}", T0 + i // 2) for i in range(12)]
    for one in events:
        store.save_event(one)
    assert store.get_all_recent_events(5) == events[:-6:-1]
    assert len(store.get_all_recent_events()) == 12
    assert store.get_all_recent_events(0) == []


# --- Finding --------------------------------------------------------------------------------------


def test_each_filter_finds_just_its_events(store: BaseStore) -> None:
    wanted = event(
        "a",
        T0 + 5,
        machine_id="m1",
        parent_session_id="p",
        event_type="tool_error",
        hook_type="PostToolUseFailure",
        data={"toolName": "Edit", "toolUseId": "toolu_1", "deep": {"list": [1, {"x": "y"}]}},
    )
    others = [event("b", T0 + i) for i in range(10)]
    store.save_events([*others, wanted])
    assert store.find_events(session_id="a") == [wanted]
    assert store.find_events(machine_id="m1") == [wanted]
    assert store.find_events(parent_session_id="p") == [wanted]
    assert store.find_events(event_type="tool_error") == [wanted]
    assert store.find_events(hook_type="PostToolUseFailure") == [wanted]
    assert store.find_events(tool_name="Edit") == [wanted]
    assert store.find_events(tool_use_id="toolu_1") == [wanted]
    assert {e.id for e in store.find_events(after=T0 + 4, before=T0 + 6)} == {
        others[5].id,
        wanted.id,
    }
    assert store.find_events(session_id="a", contains={"deep": {"list": [{"x": "y"}]}}) == [wanted]
    assert store.find_events(session_id="a", event_type="message") == []
    assert store.find_events(limit=2) == others[:-3:-1]
    assert store.find_events(limit=2, newest_first=False) == others[:2]


def test_an_unknown_type_is_stored_found_and_counted_by_its_name(store: BaseStore) -> None:
    new = event("s", event_type="quantum_leap", hook_type="Transcript:assistant/new")
    odd = event("s", T0 + 1, event_type="other", hook_type="other")
    known = event("s", T0 + 2, event_type="tool_call", hook_type="PreToolUse")
    store.save_events([new, odd, known])
    assert store.get_events("s") == [new, odd, known]
    assert store.find_events(event_type="quantum_leap") == [new]
    assert store.find_events(hook_type="Transcript:assistant/new") == [new]
    assert store.find_events(event_type="other") == [odd]
    assert store.find_events(hook_type="other") == [odd]
    counts = {"other": 1, "quantum_leap": 1, "tool_call": 1}
    assert store.event_counts() == store.event_counts("s") == counts


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({}, True),
        ({"a": 1}, True),
        ({"a": 1.0}, True),
        ({"a": True}, False),
        ({"flag": True}, True),
        ({"flag": 1}, False),
        ({"list": [3, 1]}, True),
        ({"list": 1}, False),  # jsonb's rule; MySQL's own would say yes
        ({"list": []}, True),
        ({"nothing": None}, True),
        ({"missing": None}, False),
        ({"text": "Ä"}, True),
        ({"text": "ä"}, False),
        ({"text": "A"}, False),
        ({"toolInput": {"command": "ls -l"}}, True),
        ({"toolInput": {"command": "ls"}}, False),
        ({"big": 2**70}, False),
    ],
)
def test_contains_follows_one_rule_on_both_backends(
    store: BaseStore, part: dict[str, object], found: bool
) -> None:
    data = {
        "a": 1,
        "flag": True,
        "list": [1, 2, 3],
        "nothing": None,
        "text": "Ä",
        "toolInput": {"command": "ls -l"},
    }
    one = event(data=data)
    store.save_event(one)
    assert store.find_events(session_id="s", contains=part) == ([one] if found else [])


def test_contains_sees_what_only_the_exact_payload_holds(store: BaseStore) -> None:
    hard = event(data={"nul": "a\0b", "big": 2**70, "half": "\ud800", "near": "a\ufffdb"})
    large = event(data={"text": "x" * 1_500_000, "deep": {"key": "needle"}})
    store.save_events([hard, large])
    assert store.find_events(session_id="s", contains={"nul": "a\0b"}) == [hard]
    assert store.find_events(session_id="s", contains={"big": 2**70}) == [hard]
    assert store.find_events(session_id="s", contains={"big": 2**70 + 1}) == []
    assert store.find_events(session_id="s", contains={"half": "\ud800"}) == [hard]
    assert store.find_events(session_id="s", contains={"nul": "a\ufffdb"}) == []
    assert store.find_events(session_id="s", contains={"text": "x" * 1_500_000}) == [large]


def test_contains_finds_an_event_once_and_by_one_rule_whatever_its_payload(
    store: BaseStore,
) -> None:
    data = {"n": 1, "list": [1, 2], "number": 5}
    plain, exact = event("s", T0, data=data), event("s", T0 + 1, data={**data, "big": 2**70})
    store.save_events([plain, exact])
    for part in ({"n": 1}, {"list": [2]}, {"number": 5}, {}):
        assert store.find_events(session_id="s", contains=part) == [exact, plain]
        assert list(store.iter_events(session_id="s", contains=part)) == [plain, exact]
    for part in ({"number": [5]}, {"list": 1}, {"n": {"x": 1}}, {"list": {}}):
        assert store.find_events(session_id="s", contains=part) == []


def test_a_large_payload_that_no_column_holds_is_kept_and_searched_exactly(
    store: BaseStore,
) -> None:
    deep: dict[str, Any] = {}
    for _ in range(20):
        deep = {"deeper": deep}
    numbers = list(range(200_000))
    sent = event(data={"big": 2**70, "deep": deep, "numbers": numbers, "last": "needle"})
    store.save_event(sent)
    assert store.get_events("s") == [sent]
    assert list(store.iter_events(session_id="s")) == [sent]
    assert store.find_events(session_id="s", contains={"last": "needle", "deep": deep}) == [sent]
    assert store.find_events(session_id="s", contains={"last": "hay"}) == []


def test_contains_looks_past_the_first_page_until_the_limit(store: BaseStore) -> None:
    events = [event("s", T0 + i, data={"n": i, "list": [i % 2]}) for i in range(200)]
    store.save_events(events)
    odd = [e for e in events if e.data["n"] % 2]
    assert store.find_events(session_id="s", contains={"list": [1]}, limit=90) == odd[:-91:-1]
    got = store.find_events(session_id="s", contains={"list": [1]}, limit=3, newest_first=False)
    assert got == odd[:3]


def test_contains_keeps_to_the_limit_and_loses_nothing_where_exact_payloads_alternate(
    store: BaseStore,
) -> None:
    data: list[dict[str, Any]] = [{"n": 1}, {"n": 1, "big": 2**70}]
    events = [event("s", T0 + i, data=data[i % 2]) for i in range(200)]
    store.save_events(events)
    part = {"n": 1}
    assert store.find_events(session_id="s", contains=part, limit=90) == events[:-91:-1]
    assert list(store.iter_events(session_id="s", contains=part)) == events


def test_contains_needs_a_bound_beside_it(store: BaseStore) -> None:
    with pytest.raises(InvalidRecord, match="^contains: give one of"):
        store.find_events(contains={"a": 1})
    assert store.find_events(contains={"a": 1}, after=T0) == []


def test_a_tool_name_is_found_by_its_first_255_characters(store: BaseStore) -> None:
    name = "mcp__" + "x" * 300 + "\0"
    one = event(data={"toolName": name, "toolUseId": ["not", "a", "string"]})
    store.save_event(one)
    assert store.find_events(tool_name=name) == [one]
    assert store.get_event_by_id("s", one.id) == one


def test_iteration_walks_all_pages_in_order(store: BaseStore) -> None:
    events = [event(f"s{i % 2}", T0 + i // 9) for i in range(1_500)]
    for start in range(0, 1_500, 9):  # as they came in time, so seq follows
        store.save_events(events[start : start + 9])
    walked = list(store.iter_events())
    assert [(e.timestamp, e.seq) for e in walked] == sorted((e.timestamp, e.seq) for e in walked)
    assert {e.id for e in walked} == {e.id for e in events}
    assert len(walked) == 1_500
    assert [e.id for e in store.iter_events(session_id="s1", after=T0 + 100)] == [
        e.id for e in events if e.session_id == "s1" and e.timestamp > T0 + 100
    ]


def test_iteration_over_large_payloads_takes_smaller_pages(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_events([event("s", T0 + i, data={"x": "y" * 300_000}) for i in range(80)])
    pages: list[int] = []
    select = store._select_events

    def spy(connection: object, *, limit: int, **arguments: object) -> list[object]:
        pages.append(limit)
        return select(connection, limit=limit, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_select_events", spy)
    assert sum(1 for _ in store.iter_events(session_id="s")) == 80
    assert pages[0] == 32
    assert min(pages) <= 16


def test_pages_leave_large_exact_payloads_out_and_fetch_them_one_by_one(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data: list[dict[str, Any]] = [{"n": 1}, {"nul": "\0"}, {"nul": "\0", "text": "x" * 70_000}]
    events = [event("s", T0 + i, data=one) for i, one in enumerate(data)]
    store.save_events(events)
    rows: list[Any] = []
    select = store._select_events

    def spy(connection: object, **arguments: object) -> list[Any]:
        rows.extend(found := select(connection, **arguments))  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(store, "_select_events", spy)
    assert list(store.iter_events(session_id="s")) == events
    assert [(row[10] is not None, (row[11] or 0) > 65_536) for row in rows] == [
        (False, False),
        (True, False),
        (False, True),
    ]


def test_events_stored_during_an_iteration_are_seen_behind_it(store: BaseStore) -> None:
    store.save_events([event("s", T0 + i) for i in range(40)])
    walk = store.iter_events(session_id="s")
    first = next(walk)
    later = event("s", T0 + 1000)
    store.save_event(later)
    assert [first, *walk][-1] == later


def test_counts_come_most_frequent_first(store: BaseStore) -> None:
    store.save_events(
        [event("a", event_type=t) for t in ("message", "error", "tool_call", "tool_call")]
        + [event("b", event_type="error")]
    )
    assert list(store.event_counts().items()) == [("error", 2), ("tool_call", 2), ("message", 1)]
    assert list(store.event_counts("a").items()) == [
        ("tool_call", 2),
        ("error", 1),
        ("message", 1),
    ]
    assert store.event_counts("none") == {}


# --- Arrival --------------------------------------------------------------------------------------


def test_an_event_makes_its_unknown_session(store: BaseStore) -> None:
    store.save_event(event("s", T0 + 5, machine_id="m", working_directory="/x"))
    made = store.get_session("s")
    assert made is not None
    assert (made.machine_id, made.working_directory, made.start_time) == ("m", "/x", T0 + 5)
    assert store.get_sessions() == [made]


def test_what_events_tell_of_a_session_does_not_depend_on_their_order(store: BaseStore) -> None:
    facts = [
        event("x", T0 + 9, machine_id="m9", working_directory="/9"),
        event("x", T0 + 1, machine_id="m1", working_directory="/1\0"),
        event("x", T0 + 5, machine_id="m5", working_directory="/5", parent_session_id="p"),
    ]
    seen = set()
    for number, order in enumerate(([0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1])):
        sid = f"s{number}"
        for index in order:
            f = facts[index]
            store.save_event(
                event(
                    sid,
                    f.timestamp,
                    machine_id=f.machine_id,
                    working_directory=f.working_directory,
                    parent_session_id=f.parent_session_id,
                )
            )
        made = store.get_session(sid)
        assert made is not None
        seen.add((made.machine_id, made.working_directory, made.start_time, made.parent_session_id))
    assert seen == {("m1", "/1\0", T0 + 1, "p")}


def test_a_batch_tells_the_same_of_a_session_as_single_events(store: BaseStore) -> None:
    store.save_events(
        [
            event("s", T0 + 9, machine_id="late"),
            event("s", T0 + 1, machine_id="early", parent_session_id="p"),
        ]
    )
    made = store.get_session("s")
    assert made is not None
    assert (made.machine_id, made.start_time, made.parent_session_id) == ("early", T0 + 1, "p")


def test_of_equally_early_events_and_of_two_parents_the_first_tells(store: BaseStore) -> None:
    store.save_events([event("s", T0, machine_id="first", parent_session_id="p")])
    for later in (
        [event("s", T0, machine_id="second")],
        [event("s", T0 + 1, parent_session_id="q")],
        [event("s", T0 + 2, parent_session_id="q"), event("new", T0)],
    ):
        store.save_events(later)
    told = store.get_session("s")
    assert told is not None
    assert (told.machine_id, told.parent_session_id) == ("first", "p")


def test_a_child_tells_nothing_about_a_parent_that_is_known(store: BaseStore) -> None:
    store.save_event(event("of its event", T0 + 50, machine_id="own", working_directory="/own\0"))
    store.save_session(session("saved", start_time=T0 + 50, working_directory="/own\0"))
    before = {s.session_id: s for s in store.get_sessions()}
    for number in range(2):
        store.save_events(
            [event(f"c{number}", T0, parent_session_id=p) for p in before]
            + [event(f"d{number}", T0, parent_session_id=p, working_directory="\0") for p in before]
        )
    for session_id, known in before.items():
        got = store.get_session(session_id)
        assert got is not None
        assert dataclasses.replace(got, child_session_ids=()) == known


def test_a_saved_session_is_not_changed_by_its_events(store: BaseStore) -> None:
    told = session("s", start_time=T0 + 100, machine_id="m", working_directory="/told")
    store.save_session(told)
    before = store.get_session("s")
    store.save_events([event("s", T0, machine_id="x", parent_session_id="p")])
    store.save_event(event("s", T0 + 1, machine_id="x", parent_session_id="p"))
    assert store.get_session("s") == before


def test_a_parent_that_only_a_child_names_is_not_listed(store: BaseStore) -> None:
    store.save_event(event("child", parent_session_id="parent"))
    assert store.get_session("parent") is None
    assert [s.session_id for s in store.get_sessions()] == ["child"]
    assert [n.session.session_id for n in store.session_tree()] == ["child"]
    store.save_event(event("parent", T0 + 50))
    parent = store.get_session("parent")
    assert parent is not None
    assert parent.child_session_ids == ("child",)
    assert parent.start_time == T0 + 50


# --- Refusal --------------------------------------------------------------------------------------

BAD_EVENTS = {
    "event": {"id": event().id},
    "id": event(id="no-uuid"),
    "timestamp": event(timestamp=T0 // 1000),
    "timestamp.huge": event(timestamp=10**5000),
    "session_id": event("s" * 300),
    "machine_id": event(machine_id=" m"),
    "parent_session_id": event(parent_session_id=""),
    "working_directory": event(working_directory="x" * 20_000),
    "event_type": event(event_type="two\nlines"),
    "hook_type": event(hook_type=""),
    "data": event(data=["no", "object"]),
    "data.nan": event(data={"nan": float("nan")}),
    "data.digits": event(data={"digits": 10**5000}),
}


@pytest.mark.parametrize("field", BAD_EVENTS)
def test_a_bad_event_is_refused_by_the_name_of_its_field(store: BaseStore, field: str) -> None:
    with pytest.raises(
        InvalidRecord, match=f"^{field.removesuffix('.huge').removesuffix('.digits')}: "
    ):
        store.save_event(BAD_EVENTS[field])
    assert store.get_sessions() == []


def test_raise_stores_nothing_and_names_every_bad_index(store: BaseStore) -> None:
    bad = list(BAD_EVENTS.values())
    with pytest.raises(InvalidBatch) as caught:
        store.save_events([event(), *bad, event()])
    assert [r.index for r in caught.value.refused] == list(range(1, len(bad) + 1))
    assert "session_id: 300 characters, at most 255 are kept" in str(caught.value)
    assert caught.value.stored == 0
    assert list(store.iter_events()) == []


def test_what_to_do_with_bad_events_is_raise_or_skip(store: BaseStore) -> None:
    with pytest.raises(InvalidRecord, match="^on_error: 'raise' or 'skip' is needed, not 'ignore'"):
        store.save_events([event()], on_error="ignore")  # type: ignore[call-overload]
    assert store.get_sessions() == []


def test_skip_stores_the_rest_and_says_what_was_left_out(store: BaseStore) -> None:
    good = [event(timestamp=T0 + i) for i in range(3)]
    result = store.save_events([good[0], event("s" * 300), good[1], event(id="x"), good[2]],
                               on_error="skip")  # fmt: skip
    assert result.stored == 3
    assert [r.index for r in result.refused] == [1, 3]
    assert store.get_events("s") == good


def test_what_only_the_server_refuses_is_found_by_bisection(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation is switched off here, so that bad rows reach a real server."""
    monkeypatch.setattr("contextuate_persist.model.check_event", lambda event: event.id)
    good = [event(f"s{i % 3}", T0 + i) for i in range(100)]
    poison = [
        event("s1", T0 + 500, machine_id="m" * 300),
        event("s2", T0 + 501, event_type="t" * 200),
    ]
    batch = [*good[:40], poison[0], *good[40:], poison[1]]
    result = store.save_events(batch, on_error="skip")
    assert result.stored == 100
    assert [r.index for r in result.refused] == [40, 101]
    with pytest.raises(InvalidBatch) as caught:
        store.save_events(batch, on_error="raise")
    assert [r.index for r in caught.value.refused] == [40, 101]
    assert sum(store.event_counts().values()) == 100


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"session_id": ""}, "session_id"),
        ({"session_id": "\ud800"}, "session_id"),
        ({"event_type": "a\0b"}, "event_type"),
        ({"tool_name": 7}, "tool_name"),
        ({"before": 17}, "before"),
        ({"after": "2026"}, "after"),
        ({"after": Cursor(T0, "\ud800")}, "after"),  # type: ignore[arg-type]
        ({"before": Cursor(T0, 2**63)}, "before"),
        ({"before": Cursor(-(2**63) - 1, 7)}, "before"),
        ({"session_id": "s", "contains": 5}, "contains"),
        ({"limit": -1}, "limit"),
        ({"limit": True}, "limit"),
        ({"limit": 10**5000}, "limit"),
        ({"session_id": "s", "contains": {"a": float("inf")}}, "data.a"),
    ],
)
def test_a_bad_filter_is_refused_by_its_name(
    store: BaseStore, arguments: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRecord, match=f"^{field}: "):
        store.find_events(**arguments)  # type: ignore[arg-type]


def test_what_is_no_list_is_refused(store: BaseStore) -> None:
    with pytest.raises(InvalidRecord, match="^events: a list is needed"):
        store.save_events(None)  # type: ignore[call-overload]
    with pytest.raises(InvalidRecord, match="^sessions: a list is needed"):
        store.save_sessions(5)  # type: ignore[arg-type]


def test_messages_about_odd_ids_stay_in_one_line(store: BaseStore) -> None:
    with pytest.raises(InvalidBatch) as caught:
        store.save_events([event(id="a\nb\ud800" * 100), event(id=10**5000)])  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 500


def test_contains_stops_looking_at_the_limit(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_events([event("s", T0 + i, data={"n": i}) for i in range(100)])
    calls: list[int] = []
    select = store._select_events

    def spy(connection: object, **arguments: object) -> list[object]:
        calls.append(1)
        return select(connection, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_select_events", spy)
    assert len(store.find_events(session_id="s", contains={}, limit=1)) == 1
    assert store.find_events(session_id="s", contains={}, limit=0) == []
    assert len(calls) == 1


def test_an_event_not_from_a_store_has_no_cursor() -> None:
    with pytest.raises(InvalidRecord, match="was not read from a store"):
        _ = event().cursor


# --- Life -----------------------------------------------------------------------------------------


def test_a_store_that_is_not_open_says_so(database: Database) -> None:
    store = make_store(database.url)
    for call in (
        lambda: store.get_events("s"),
        lambda: store.save_events([]),
        lambda: store.save_event(event()),
        lambda: store.iter_events(),
        lambda: store.get_sessions(limit=0),
    ):
        with pytest.raises(StoreClosed, match="init"):
            call()
    store.init()
    store.init()
    assert store.save_event(event()) is True
    store.close()
    store.close()
    with pytest.raises(StoreClosed):
        store.get_session("s")
    with store:
        assert len(store.get_events("s")) == 1


def test_a_new_store_finds_what_an_earlier_one_stored(database: Database) -> None:
    sent = event(data={"é": "\0"})
    with make_store(database.url) as first:
        first.save_event(sent)
    with make_store(database.url) as second:
        assert second.get_events("s") == [sent]


def test_an_unknown_event_is_none(store: BaseStore) -> None:
    store.save_event(event("s"))
    assert store.get_event_by_id("s", str(uuid.uuid4())) is None
    stored = store.get_events("s")[0]
    assert store.get_event_by_id("other", stored.id) is None
    with pytest.raises(InvalidRecord, match="^id: a UUID is needed"):
        store.get_event_by_id("s", "x")


def test_one_store_serves_many_threads(store: BaseStore) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(20):
                store.save_event(event(f"s{number}", T0 + i))
                store.get_events(f"s{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(24)]  # more than the pool
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert sum(store.event_counts().values()) == 24 * 20
