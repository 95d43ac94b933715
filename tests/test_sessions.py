"""Sessions: how a save merges, updates, trees, deletion, pruning; the contract of both stores."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from contextuate_persist import (
    InvalidBatch,
    InvalidRecord,
    SessionMeta,
    SessionNotFound,
    SessionStatus,
    StoreUnavailable,
    TokenUsage,
    retention,
)
from contextuate_persist.base import BaseStore
from contextuate_persist.records import Due
from tests.builders import T0, deadlock, event, session
from tests.conftest import Database

BOTH_LAYOUTS = "delet|prun"

DAY = 86_400_000

FULL = SessionMeta(
    session_id="full",
    machine_id="m",
    working_directory="/w",
    start_time=T0,
    end_time=T0 + 5,
    status=SessionStatus.COMPLETED,
    parent_session_id="parent",
    manual_parent_session_id="manual",
    child_session_ids=("c2", "c1"),
    token_usage=TokenUsage(
        total_input=1, total_output=2, total_cache_read=3, total_cache_creation=4
    ),
    agent_type="nexus",
    is_user_initiated=False,
    is_pinned=True,
    hidden=True,
    label="a label",
    model="claude",
    transcript_path="/t.jsonl",
)


def get(store: BaseStore, session_id: str) -> SessionMeta:
    found = store.get_session(session_id)
    assert found is not None
    return found


def listed(database: Database, session_id: str) -> list[str]:
    """The children of a session as they are stored, those included that are not shown."""
    [(children,)] = database.execute(
        f"SELECT child_session_ids FROM sessions WHERE session_id = '{session_id}'"
    )
    return list(children if isinstance(children, list) else json.loads(children))


# --- Merge rules ----------------------------------------------------------------------------------


def test_a_saved_session_comes_back_equal(store: BaseStore) -> None:
    store.save_session(FULL)
    assert get(store, "full") == FULL


def test_a_new_session_has_the_documented_defaults(store: BaseStore) -> None:
    store.save_session(session())
    assert get(store, "s") == dataclasses.replace(
        session(), is_user_initiated=True, is_pinned=False, hidden=False
    )


def test_saving_again_changes_nothing(store: BaseStore) -> None:
    store.save_session(FULL)
    store.save_session(FULL)
    store.save_sessions([FULL, FULL])
    assert get(store, "full") == FULL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start_time", T0 + 9),
        ("status", SessionStatus.ERROR),
        ("machine_id", "other"),
        ("working_directory", "/else"),
        ("end_time", T0 + 99),
        ("end_time", None),
    ],
)
def test_fields_that_are_stored_as_given(store: BaseStore, field: str, value: Any) -> None:
    store.save_session(FULL)
    changed = dataclasses.replace(FULL, **{field: value})
    store.save_session(changed)
    assert get(store, "full") == changed


@pytest.mark.parametrize("end_time", [None, T0 + 7])
def test_saving_status_active_clears_the_end(store: BaseStore, end_time: int | None) -> None:
    store.save_session(FULL)
    store.save_session(dataclasses.replace(FULL, status=SessionStatus.ACTIVE, end_time=end_time))
    store.save_session(session("new", status=SessionStatus.ACTIVE, end_time=end_time))
    for name in ("full", "new"):
        assert get(store, name).end_time is None
        assert get(store, name).status is SessionStatus.ACTIVE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("agent_type", "canvas"),
        ("model", "other"),
        ("transcript_path", "/u.jsonl"),
        ("parent_session_id", "p2"),
        ("manual_parent_session_id", "m2"),
        ("label", "another"),
        ("label", ""),
        ("is_pinned", False),
        ("hidden", False),
        ("is_user_initiated", True),
    ],
)
def test_fields_where_a_value_sets_and_none_leaves(
    store: BaseStore, field: str, value: Any
) -> None:
    store.save_session(FULL)
    store.save_session(dataclasses.replace(FULL, **{field: None}))
    assert get(store, "full") == FULL
    store.save_session(dataclasses.replace(FULL, **{field: value}))
    assert getattr(get(store, "full"), field) == value


def test_token_totals_are_stored_as_given_and_unknown_cache_totals_leave(
    store: BaseStore,
) -> None:
    store.save_session(FULL)
    store.save_session(
        dataclasses.replace(FULL, token_usage=TokenUsage(total_input=10, total_output=0))
    )
    assert get(store, "full").token_usage == TokenUsage(
        total_input=10, total_output=0, total_cache_read=3, total_cache_creation=4
    )
    store.save_session(dataclasses.replace(FULL, token_usage=TokenUsage(total_cache_read=0)))
    assert get(store, "full").token_usage.total_cache_read == 0


def test_once_the_token_ledger_has_rows_it_alone_decides(
    store: BaseStore, database: Database
) -> None:
    store.save_session(FULL)
    store.save_session(session("other"))
    database.execute(
        "INSERT INTO token_ledger (message_id, session_id, timestamp, input_tokens)"
        f" VALUES ('msg_1', 'full', {T0}, 7)"
    )
    more = TokenUsage(total_input=99, total_output=99, total_cache_read=99, total_cache_creation=99)
    store.save_session(dataclasses.replace(FULL, token_usage=more, label="moved"))
    store.save_sessions([dataclasses.replace(session("other"), token_usage=more)])
    store.update_session("full", token_usage=more)
    assert get(store, "full").token_usage == FULL.token_usage
    assert get(store, "full").label == "moved"
    assert get(store, "other").token_usage == more
    store.update_session("other", token_usage=TokenUsage(total_input=5))
    assert get(store, "other").token_usage == TokenUsage(total_input=5)


def test_a_save_replaces_what_events_had_told(store: BaseStore) -> None:
    store.save_event(event("s", T0 + 5, machine_id="guess", parent_session_id="p"))
    store.save_session(session("s", start_time=T0 + 50))
    store.save_event(event("s", T0))
    told = get(store, "s")
    assert (told.start_time, told.machine_id) == (T0 + 50, "machine")
    assert told.parent_session_id == "p"


def test_many_sessions_are_saved_at_once_the_last_save_of_an_id_counts(store: BaseStore) -> None:
    sessions = [session(f"s{i % 40}", start_time=T0 + i, label=f"l{i}") for i in range(100)]
    store.save_sessions(sessions)
    got = store.get_sessions()
    assert len(got) == 40
    assert [s.start_time for s in got] == list(range(T0 + 99, T0 + 59, -1))


def test_texts_that_no_column_holds_come_back_and_can_be_replaced(store: BaseStore) -> None:
    hard = session(
        working_directory="/bad\udcff\0dir", label="nul\0", transcript_path="\ud83d\ude00",
        agent_type="\0", model="\udfff",
    )  # fmt: skip
    store.save_session(hard)
    got = get(store, "s")
    for field in ("working_directory", "label", "transcript_path", "agent_type", "model"):
        assert getattr(got, field) == getattr(hard, field)
    # Plain texts replace them, None leaves them, an update clears them.
    store.save_session(session(working_directory="/plain", label="plain"))
    got = get(store, "s")
    assert (got.working_directory, got.label, got.model) == ("/plain", "plain", "\udfff")
    store.update_session("s", model=None, label="\ud800")
    got = get(store, "s")
    assert (got.model, got.label, got.agent_type) == (None, "\ud800", "\0")


def test_bad_sessions_are_named_and_nothing_is_stored(store: BaseStore) -> None:
    with pytest.raises(InvalidBatch) as caught:
        store.save_sessions([session("good"), session(" bad"), session(start_time=5)])
    assert [r.index for r in caught.value.refused] == [1, 2]
    assert store.get_sessions() == []


def test_what_is_no_session_is_refused(store: BaseStore) -> None:
    with pytest.raises(InvalidRecord, match="^session: a SessionMeta is needed, not dict"):
        store.save_session({"session_id": "s"})  # type: ignore[arg-type]
    with pytest.raises(InvalidBatch, match="session: a SessionMeta is needed, not MonitorEvent"):
        store.save_sessions([session(), event()])  # type: ignore[list-item]
    assert store.get_sessions() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session_id", "x" * 256),
        ("machine_id", None),
        ("working_directory", 7),
        ("start_time", 1_700_000_000),
        ("end_time", 1.5e12),
        ("status", "done"),
        ("status", ["active"]),
        ("parent_session_id", "a\nb"),
        ("manual_parent_session_id", ""),
        ("child_session_ids", "abc"),
        ("child_session_ids", ("ok", "not ok ")),
        ("agent_type", "x" * 256),
        ("is_user_initiated", 1),
        ("is_pinned", "yes"),
        ("hidden", 0),
        ("label", "x" * 16_384),
        ("transcript_path", b"/t"),
        ("token_usage", {"totalInput": 1}),
    ],
)
def test_a_bad_field_is_refused_by_its_name(store: BaseStore, field: str, value: Any) -> None:
    bad = dataclasses.replace(session(), **{field: value})
    with pytest.raises(InvalidRecord, match=f"^{field}: "):
        store.save_session(bad)
    if field != "session_id" and value is not None:
        store.save_session(session())
        with pytest.raises(InvalidRecord, match=f"^{field}: "):
            store.update_session("s", **{field: value})  # type: ignore[misc]


# --- Ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("abc", "ABC"),
        ("resume", "resumé"),
        ("strasse", "straße"),
        ("id1", "id１"),  # noqa: RUF001  (full width on purpose)
        ("😀", "😁"),
        ("a", "a\u0301"),
        ("é", "e\u0301"),
        ("1", "01"),
        ("a%", "a_"),
        ("a'b", 'a"b'),
        ("a\\", "a\\\\"),
    ],
)
def test_ids_compare_byte_for_byte(store: BaseStore, one: str, other: str) -> None:
    store.save_session(session(one, label="one"))
    store.save_session(session(other, label="other"))
    store.save_events([event(one, T0), event(other, T0 + 1)])
    assert get(store, one).label == "one"
    assert [e.session_id for e in store.get_events(other)] == [other]
    store.delete_session(one)
    assert get(store, other).label == "other"
    assert len(store.get_events(other)) == 1


def test_the_longest_ids_are_kept(store: BaseStore) -> None:
    long = "😀" * 255
    store.save_event(event(long, machine_id=long, parent_session_id=long[:-1]))
    assert get(store, long).machine_id == long
    assert store.find_events(machine_id=long, session_id=long)[0].parent_session_id == long[:-1]


# --- Listing --------------------------------------------------------------------------------------


def test_each_filter_lists_just_its_sessions(store: BaseStore) -> None:
    a = session("a", machine_id="m1", hidden=True, start_time=T0 + 1)
    b = session("b", status="completed", start_time=T0 + 2, parent_session_id="a")
    c = session("c", start_time=T0 + 3, parent_session_id="b", manual_parent_session_id="a")
    store.save_sessions([a, b, c])

    def ids(**filters: Any) -> list[str]:
        return [s.session_id for s in store.get_sessions(**filters)]

    assert ids() == ["c", "b", "a"]
    assert ids(machine_id="m1") == ["a"]
    assert ids(hidden=True) == ["a"]
    assert ids(hidden=False) == ["c", "b"]
    assert ids(status="completed") == ids(status=SessionStatus.COMPLETED) == ["b"]
    assert ids(parent_session_id="a") == ["c", "b"]
    assert ids(parent_session_id="b") == []
    assert ids(started_after=T0 + 1, started_before=T0 + 3) == ["b"]
    assert ids(limit=2) == ["c", "b"]
    assert ids(limit=0) == []
    with pytest.raises(InvalidRecord, match="^status: "):
        ids(status="finished")
    with pytest.raises(InvalidRecord, match="^limit: "):
        ids(limit=-5)


def test_sessions_of_the_same_start_are_listed_by_their_ids(store: BaseStore) -> None:
    store.save_sessions(session(name) for name in ("b", "a", "d", "c"))
    assert [s.session_id for s in store.get_sessions()] == ["d", "c", "b", "a"]
    assert [s.session_id for s in store.get_sessions(limit=2)] == ["d", "c"]


def test_an_unknown_session_is_none(store: BaseStore) -> None:
    assert store.get_session("nobody") is None


# --- Children -------------------------------------------------------------------------------------


def test_children_are_the_listed_ones_then_the_linked_ones_by_start(store: BaseStore) -> None:
    store.save_session(session("p", child_session_ids=("z", "y")))
    store.save_sessions(
        [
            session("late", start_time=T0 + 9, parent_session_id="p"),
            session("early", start_time=T0 + 1, parent_session_id="p"),
            session("y", parent_session_id="p"),
        ]
    )
    assert get(store, "p").child_session_ids == ("z", "y", "early", "late")


def test_listed_children_add_up_over_saves(store: BaseStore, database: Database) -> None:
    store.save_session(session("p", child_session_ids=("a", "b", "a")))
    store.save_session(session("p", child_session_ids=("c", "b")))
    store.save_session(session("p"))
    assert get(store, "p").child_session_ids == ("a", "b", "c")
    assert listed(database, "p") == ["a", "b", "c"]


def test_a_child_that_belongs_to_another_or_was_deleted_is_not_listed(store: BaseStore) -> None:
    store.save_sessions(
        [
            session("p", child_session_ids=("mine", "moved", "gone", "unknown", "free")),
            session("mine", parent_session_id="p"),
            session("moved", parent_session_id="p", manual_parent_session_id="q"),
            session("gone", parent_session_id="p"),
            session("free"),
            session("q"),
        ]
    )
    store.delete_session("gone")
    assert get(store, "p").child_session_ids == ("mine", "unknown", "free")
    assert get(store, "q").child_session_ids == ("moved",)


def test_an_update_replaces_the_listed_children(store: BaseStore) -> None:
    store.save_session(session("p", child_session_ids=("a", "b")))
    store.update_session("p", child_session_ids=["b", "x"])
    assert get(store, "p").child_session_ids == ("b", "x")
    store.update_session("p", child_session_ids=())
    assert get(store, "p").child_session_ids == ()


# --- Update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machine_id", "m2"),
        ("working_directory", "/x"),
        ("start_time", T0 + 1),
        ("end_time", T0 + 2),
        ("end_time", None),
        ("status", SessionStatus.ACTIVE),
        ("parent_session_id", "unheard-of"),
        ("parent_session_id", None),
        ("manual_parent_session_id", None),
        ("agent_type", None),
        ("agent_type", "x"),
        ("label", None),
        ("label", "x"),
        ("model", None),
        ("transcript_path", None),
        ("is_pinned", False),
        ("hidden", False),
        ("is_user_initiated", True),
        ("token_usage", TokenUsage(total_input=5)),
    ],
)
def test_an_update_sets_exactly_the_named_field(store: BaseStore, field: str, value: Any) -> None:
    store.save_session(FULL)
    store.update_session("full", **{field: value})  # type: ignore[misc]
    assert get(store, "full") == dataclasses.replace(FULL, **{field: value})
    store.update_session("full", **{field: value})  # type: ignore[misc]  (again is harmless)


def test_an_update_with_none_sets_flags_to_their_defaults(store: BaseStore) -> None:
    store.save_session(FULL)
    store.update_session("full", is_pinned=None, hidden=None, is_user_initiated=None)
    got = get(store, "full")
    assert (got.is_pinned, got.hidden, got.is_user_initiated) == (False, False, True)


def test_an_update_of_an_unknown_session_raises_and_leaves_nothing(store: BaseStore) -> None:
    store.save_event(event("child", parent_session_id="reference"))
    for session_id in ("nobody", "reference"):
        with pytest.raises(SessionNotFound, match=session_id):
            store.update_session(session_id, label="x")
        with pytest.raises(SessionNotFound):
            store.update_session(session_id)
        with pytest.raises(SessionNotFound):
            store.update_session(session_id, parent_session_id="new-parent")
    assert {s.session_id for s in store.get_sessions()} == {"child"}


def test_an_update_refuses_fields_that_it_does_not_know(store: BaseStore) -> None:
    store.save_session(session())
    with pytest.raises(InvalidRecord, match="^colour: "):
        store.update_session("s", colour="x")  # type: ignore[call-arg]


def test_a_parent_that_an_update_names_stays_what_it_was(store: BaseStore) -> None:
    store.save_session(session("saved", label="mine", start_time=T0 + 5))
    store.save_event(event("of an event", T0 + 5, machine_id="own"))
    before = store.get_sessions()
    store.save_session(session("c", start_time=T0, working_directory="\0"))
    for parent in ("of an event", "saved"):
        store.update_session("c", parent_session_id=parent)
    *after, _ = store.get_sessions()
    assert [dataclasses.replace(s, child_session_ids=()) for s in after] == before
    assert get(store, "saved").child_session_ids == ("c",)


def test_a_parent_that_only_an_update_names_is_not_shown_and_goes_with_its_child(
    store: BaseStore, database: Database
) -> None:
    for name in ("other", "s", "another"):
        start = T0 if name == "s" else T0 + DAY
        store.save_session(session(name, start_time=start, end_time=start, status="completed"))
    store.update_session("s", parent_session_id="p")
    assert store.get_session("p") is None
    assert store.prune_old_sessions(T0 + 1) == 1
    rows = database.execute("SELECT session_id FROM sessions ORDER BY session_id")
    assert rows == [("another",), ("other",)]


def test_a_pin_survives_the_next_save(store: BaseStore) -> None:
    store.save_session(session())
    store.update_session("s", is_pinned=True, label="mine", hidden=True)
    store.save_session(session(status="completed", end_time=T0 + 9))
    got = get(store, "s")
    assert (got.is_pinned, got.label, got.hidden, got.end_time) == (True, "mine", True, T0 + 9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start_time", T0 + 40),
        ("machine_id", "told"),
        ("working_directory", "/told"),
        ("parent_session_id", "told"),
        ("parent_session_id", None),
    ],
)
def test_what_an_update_says_of_the_beginning_is_not_undone_by_events(
    store: BaseStore, field: str, value: Any
) -> None:
    store.save_event(event("s", T0 + 50))
    store.update_session("s", **{field: value})  # type: ignore[misc]
    told = get(store, "s")
    assert getattr(told, field) == value
    store.save_event(event("s", T0, machine_id="x", working_directory="/x", parent_session_id="x"))
    assert get(store, "s") == told


# --- Trees ----------------------------------------------------------------------------------------


def tree(store: BaseStore, root: str | None = None) -> list[tuple[str, int]]:
    return [(node.session.session_id, node.depth) for node in store.session_tree(root)]


def test_a_tree_comes_parents_first_and_siblings_by_start(store: BaseStore) -> None:
    store.save_sessions(
        [
            session("grandchild", parent_session_id="b", start_time=T0 + 5),
            session("b", parent_session_id="root", start_time=T0 + 4),
            session("a", parent_session_id="root", start_time=T0 + 9),
            session("root", start_time=T0 + 1),
            session("alone", start_time=T0 + 2),
        ]
    )
    whole = [("root", 0), ("b", 1), ("grandchild", 2), ("a", 1), ("alone", 0)]
    assert tree(store) == whole
    assert tree(store, "root") == whole[:4]
    assert tree(store, "b") == [("b", 0), ("grandchild", 1)]
    with pytest.raises(SessionNotFound):
        store.session_tree("nobody")


def test_the_manual_parent_wins_over_the_detected_one(store: BaseStore) -> None:
    store.save_sessions(
        [session("p"), session("q"), session("c", parent_session_id="p", start_time=T0 + 1)]
    )
    store.update_session("c", manual_parent_session_id="q")
    assert tree(store) == [("p", 0), ("q", 0), ("c", 1)]
    assert tree(store, "p") == [("p", 0)]
    assert tree(store, "q") == [("q", 0), ("c", 1)]
    store.update_session("c", manual_parent_session_id=None)
    assert tree(store) == [("p", 0), ("c", 1), ("q", 0)]


def test_a_session_whose_parent_is_not_stored_begins_a_tree(store: BaseStore) -> None:
    store.save_session(session("c", parent_session_id="missing"))
    with pytest.raises(SessionNotFound):
        store.session_tree("missing")
    store.save_session(session("d", manual_parent_session_id="missing too", start_time=T0 + 1))
    assert tree(store) == [("c", 0), ("d", 0)]


def test_cycles_lose_nobody_and_repeat_nobody(store: BaseStore) -> None:
    store.save_sessions(
        [
            session("b", parent_session_id="a"),
            session("a", parent_session_id="c"),
            session("c", parent_session_id="b"),
            session("0-innocent", parent_session_id="b", start_time=T0 + 1),
            session("self", manual_parent_session_id="self", start_time=T0 + 2),
            session("own", parent_session_id="own", start_time=T0 + 3),
        ]
    )
    assert tree(store) == [
        ("a", 0), ("b", 1), ("c", 2), ("0-innocent", 2), ("self", 0), ("own", 0),
    ]  # fmt: skip
    assert tree(store, "c") == [("c", 0), ("a", 1), ("b", 2), ("0-innocent", 3)]
    store.delete_session("b")
    assert tree(store, "a") == [("a", 0)]
    store.delete_session("self")
    store.delete_session("own")
    assert {s.session_id for s in store.get_sessions()} == {"a", "c", "0-innocent"}


def test_chains_longer_than_a_thousand_are_walked(store: BaseStore) -> None:
    chain = [session("s0000")] + [
        session(f"s{i:04}", parent_session_id=f"s{i - 1:04}") for i in range(1, 1_500)
    ]
    store.save_sessions(reversed(chain))
    assert tree(store, "s0000") == [(f"s{i:04}", i) for i in range(1_500)]
    assert tree(store) == tree(store, "s0000")


# --- Deletion -------------------------------------------------------------------------------------


def test_deleting_removes_the_session_its_events_and_its_place(store: BaseStore) -> None:
    store.save_sessions(
        [
            session("p", child_session_ids=("s", "t")),
            session("s", parent_session_id="p"),
            session("c", parent_session_id="s"),
            session("d", parent_session_id="p", manual_parent_session_id="s"),
            session("e", parent_session_id="s", manual_parent_session_id="c"),
        ]
    )
    store.save_events([event("s", T0 + i) for i in range(5)] + [event("c")])
    store.delete_session("s")
    assert store.get_session("s") is None
    assert store.get_events("s") == []
    assert get(store, "p").child_session_ids == ("t", "d")
    assert get(store, "c").parent_session_id is None
    d, e = get(store, "d"), get(store, "e")
    assert (d.parent_session_id, d.manual_parent_session_id) == ("p", None)
    assert (e.parent_session_id, e.manual_parent_session_id) == (None, "c")
    assert len(store.get_events("c")) == 1
    with pytest.raises(SessionNotFound, match="'s'"):
        store.delete_session("s")


def test_a_deleted_session_is_taken_from_every_list(store: BaseStore, database: Database) -> None:
    """From the stored ones: what only is not shown would come back when deletions are forgotten."""
    ended: dict[str, Any] = {"end_time": T0, "status": "completed"}
    lists = {"1": ("a",), "2": ("x", "b", "B", "y"), "3": ("c",), "4": ("x", "C", "y")}
    store.save_sessions(
        session(name, start_time=T0 + DAY, child_session_ids=children)
        for name, children in lists.items()
    )
    store.save_sessions(session(name, **ended) for name in "abc")
    store.delete_session("a")
    assert [listed(database, name) for name in "12"] == [[], ["x", "b", "B", "y"]]
    assert store.prune_old_sessions(T0 + 1) == 2
    left = [[], ["x", "B", "y"], [], ["x", "C", "y"]]
    assert [listed(database, name) for name in lists] == left
    assert [list(get(store, name).child_session_ids) for name in lists] == left


@pytest.mark.parametrize("how", ["delete_session", "delete_all_sessions", "prune_old_sessions"])
def test_very_many_events_are_deleted_some_at_a_time_and_remembered(
    how: str, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("contextuate_persist.base.DELETE_ROWS", 10)
    now = round(time.time() * 1000)
    store.save_session(session("s", start_time=T0, end_time=T0, status="completed"))
    events = [event("s", T0 + n) for n in range(24)]
    last = event("s", now + DAY // 2)
    store.save_events([*events, last])
    delete_some, slices = store._delete_some_events, []

    def counted(*arguments: Any) -> int:
        slices.append(delete_some(*arguments))
        return slices[-1]

    monkeypatch.setattr(store, "_delete_some_events", counted)
    given = {"delete_session": ["s"], "prune_old_sessions": [T0 + 1]}
    getattr(store, how)(*given.get(how, []))
    assert slices == [10, 10, 5]
    assert store.get_sessions() == []
    assert store.save_events([*events, last]) == 0
    store.save_events(event("few", T0 + n) for n in range(10))
    store.delete_session("few")
    assert slices == [10, 10, 5], "ten are one statement's"


def test_late_deliveries_do_not_bring_a_deleted_session_back(store: BaseStore) -> None:
    old = [event("s", T0 + i) for i in range(5)]
    store.save_events(old)
    store.delete_session("s")
    assert store.save_events(old) == 0
    assert store.save_event(old[0]) is False
    assert store.save_event(event("s", T0 - 1)) is False
    other = event("t")
    assert store.save_events([*old, other], on_error="skip").stored == 1
    assert store.get_session("s") is None
    assert [s.session_id for s in store.get_sessions()] == ["t"]


def test_a_newer_event_brings_a_deleted_session_back_but_not_its_past(store: BaseStore) -> None:
    old = event("s", T0)
    store.save_event(old)
    store.delete_session("s")
    new = event("s", round(time.time() * 1000) + DAY)
    assert store.save_events([old, new]) == 1
    assert store.save_event(old) is False
    assert store.get_events("s") == [new]
    assert get(store, "s").start_time == new.timestamp


def test_a_deleted_event_of_the_future_does_not_bring_its_session_back(store: BaseStore) -> None:
    """As far as a clock may be wrong, a day; beyond that its session's future would be lost."""
    now = round(time.time() * 1000)
    ahead, far_ahead = event("s", now + DAY // 2), event("t", now + 3_000 * DAY)
    store.save_events([event("s"), ahead, far_ahead, event("u")])
    for name in ("s", "u", "t"):
        store.delete_session(name)
    assert store.save_event(ahead) is False
    assert store.get_session("s") is None
    assert store.save_event(event("t", now + 2 * DAY)) is True
    assert store.save_event(event("u", now + DAY // 4)) is True, "it had none of the future"


def test_of_several_deletions_of_a_session_the_latest_counts(
    store: BaseStore, database: Database
) -> None:
    now = round(time.time() * 1000)
    store.save_event(event("s", now + DAY // 2))
    store.delete_session("s")
    store.save_session(session("s", start_time=now + DAY))
    store.delete_session("s")
    assert store.save_event(event("s", now + DAY // 2)) is False
    database.execute(f"UPDATE deleted_sessions SET deleted_at = {T0}")
    assert store.save_event(event("s", T0 + 1)) is True
    store.delete_session("s")
    assert store.save_event(event("s", T0 + 1)) is False


def test_a_parent_that_was_only_named_leaves_no_deletion(store: BaseStore) -> None:
    store.save_event(event("c", T0, parent_session_id="p"))
    assert store.prune_old_sessions(T0 + 10) == 1
    assert store.save_event(event("p", T0 + 1)) is True
    assert store.save_event(event("c", T0 + 1)) is False


def test_exact_texts_survive_what_earlier_events_tell(store: BaseStore) -> None:
    store.save_event(event("s", T0 + 10, working_directory="/a\0"))
    store.update_session("s", label="a\0b", transcript_path="/x\udcff")
    store.save_event(event("s", T0 + 5, working_directory="/plain"))
    got = get(store, "s")
    assert (got.label, got.transcript_path) == ("a\0b", "/x\udcff")
    assert got.working_directory == "/plain"
    store.save_event(event("s", T0, working_directory="/b\0"))
    got = get(store, "s")
    assert (got.label, got.working_directory) == ("a\0b", "/b\0")


def test_a_deleted_child_that_somebody_names_again_stays_off_the_lists(store: BaseStore) -> None:
    store.save_sessions([session("p", child_session_ids=("c",)), session("c")])
    store.delete_session("c")
    store.save_session(session("p", child_session_ids=("c",)))
    store.save_event(event("grandchild", parent_session_id="c"))
    assert get(store, "p").child_session_ids == ()
    assert store.save_session(session("c"), undelete=True) is True
    assert get(store, "p").child_session_ids == ("c",)


def test_a_listed_child_that_came_back_after_its_deletion_is_listed_again(
    store: BaseStore,
) -> None:
    store.save_session(session("c"))
    store.delete_session("c")
    store.save_session(session("p", child_session_ids=("c",)))
    assert get(store, "p").child_session_ids == ()
    store.save_event(event("c", round(time.time() * 1000) + DAY))
    assert get(store, "p").child_session_ids == ("c",)


def test_thousands_of_listed_children_are_merged_in_time(store: BaseStore) -> None:
    children = tuple(f"child-{i:05}" for i in range(4_000))
    store.save_session(session("p", child_session_ids=children[:2_000]))
    store.save_session(session("p", child_session_ids=children))
    store.save_session(session("p", child_session_ids=children))
    assert get(store, "p").child_session_ids == children


@pytest.mark.parametrize("several", [False, True])
def test_what_happened_just_when_its_session_was_deleted_is_gone_too(
    store: BaseStore, database: Database, several: bool
) -> None:
    """To the millisecond, with the session there or not, alone or among others."""

    def save_event(timestamp: int) -> int:
        batch = [event("s", timestamp), event("t")] if several else [event("s", timestamp)]
        return store.save_events(batch) - several

    def save_session(start_time: int) -> int:
        batch = [session("s", start_time=start_time)] + [session("t")] * several
        return store.save_sessions(batch) - several

    store.save_session(session("s"))
    store.delete_session("s")
    database.execute(f"UPDATE deleted_sessions SET deleted_at = {T0 + 5}")
    assert save_event(T0 + 5) == save_session(T0 + 5) == 0
    assert store.get_session("s") is None
    assert save_event(T0 + 6) == 1
    assert save_event(T0 + 5) == 0
    assert store.save_event(event("s", T0 + 5)) is False
    assert save_session(T0 + 5) == 1, "it is there again"
    assert store.save_event(event("s", T0 + 5)) is False
    assert len(store.get_events("s")) == 1
    store.delete_session("s")
    database.execute(f"UPDATE deleted_sessions SET deleted_at = {T0 + 5}")
    assert save_session(T0 + 6) == 1
    assert save_event(T0 + 5) == 0


@pytest.mark.parametrize("of", ["events", "sessions"])
def test_undelete_is_for_the_given_sessions_alone(store: BaseStore, of: str) -> None:
    for name in ("given", "other"):
        store.save_session(session(name))
        store.delete_session(name)
    if of == "events":
        assert store.save_events([event("given")], undelete=True) == 1
    else:
        assert store.save_sessions([session("given")], undelete=True) == 1
    assert store.save_event(event("given", T0 + 1)) is True
    assert store.save_event(event("other", T0 + 1)) is False
    assert store.save_session(session("other")) is False


def test_undelete_stores_events_of_deleted_sessions(store: BaseStore) -> None:
    old = [event("s", T0 + i) for i in range(3)]
    store.save_events(old)
    store.delete_session("s")
    assert store.save_events(old[:2], undelete=True) == 2
    assert store.save_event(old[2]) is True
    assert store.get_events("s") == old


def test_a_late_save_does_not_bring_a_deleted_session_back(
    store: BaseStore, database: Database
) -> None:
    assert store.save_session(session("s", parent_session_id="p")) is True
    assert store.save_session(session("s", parent_session_id="p")) is True
    store.delete_session("s")
    assert store.save_session(session("s", label="late")) is False
    assert store.save_sessions([session("s"), session("t"), session("s")]) == 1
    assert store.save_sessions([session("c", parent_session_id="s")]) == 1  # only names it
    assert store.save_session(session("s", parent_session_id="late")) is False
    assert store.save_session(session("s")) is False
    assert {s.session_id for s in store.get_sessions()} == {"t", "c"}
    rows = database.execute("SELECT session_id FROM sessions ORDER BY session_id")
    assert rows == [("c",), ("p",), ("s",), ("t",)], "nothing of what only the late saves name"


def test_undelete_stores_a_deleted_session_and_its_events(store: BaseStore) -> None:
    old = event("s", T0 + 1)
    store.save_event(old)
    store.delete_session("s")
    assert store.save_session(session("s", label="again"), undelete=True) is True
    assert get(store, "s").label == "again"
    assert store.save_event(old) is True


def test_a_session_that_started_after_its_deletion_is_a_new_one(store: BaseStore) -> None:
    store.save_session(session())
    store.delete_session("s")
    now = round(time.time() * 1000) + DAY
    assert store.save_session(session(start_time=now)) is True
    assert store.save_event(event("s", T0)) is False


def test_after_a_newer_event_a_deleted_session_can_be_saved_again(store: BaseStore) -> None:
    store.save_session(session())
    store.delete_session("s")
    assert store.save_event(event("s", round(time.time() * 1000) + DAY)) is True
    assert store.save_session(session(label="back")) is True
    assert get(store, "s").label == "back"


def test_deleting_all_leaves_nothing_and_counts_sessions(store: BaseStore) -> None:
    store.save_events([event(f"s{i}", parent_session_id=f"p{i % 3}") for i in range(450)])
    assert store.delete_all_sessions() == 450
    assert store.get_sessions() == []
    assert list(store.iter_events()) == []
    assert store.delete_all_sessions() == 0
    assert store.save_event(event("s1")) is False


def test_deleting_all_that_fails_half_way_leaves_nothing_below_what_is_gone(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("contextuate_persist.base._DELETE_SESSIONS", 1)
    store.save_sessions([session("a"), session("b"), session("m")])
    for name, parent in (("x", "m"), ("y", None)):
        store.save_session(session(name, parent_session_id=parent, manual_parent_session_id="a"))
    delete, left = store._delete_sessions, iter("a")

    def fail(connection: Any, ids: list[str]) -> int:
        if ids != [next(left, None)]:
            raise StoreUnavailable("the rest is for the next call")
        return delete(connection, ids)

    monkeypatch.setattr(store, "_delete_sessions", fail)
    with pytest.raises(StoreUnavailable):
        store.delete_all_sessions()
    assert {s.session_id for s in store.get_sessions(parent_session_id="m")} == {"x"}
    assert get(store, "y").manual_parent_session_id is None
    assert store.get_sessions(parent_session_id="a") == []


@pytest.mark.parametrize("name", ["absent", "reference"])
def test_what_is_not_there_is_not_deleted_by_a_second_try_either(
    store: BaseStore, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_event(event("s", parent_session_id="reference"))
    delete, tries = store._delete_session, []

    def fail_first(connection: Any, session_id: str) -> bool:
        found = delete(connection, session_id)
        tries.append(found)
        if len(tries) == 1:
            raise deadlock(store.backend)
        return found

    monkeypatch.setattr(store, "_delete_session", fail_first)
    with pytest.raises(SessionNotFound):
        store.delete_session(name)
    assert tries == [False, False]
    assert get(store, "s").parent_session_id == "reference"


# --- Pruning --------------------------------------------------------------------------------------


def due(store: BaseStore, older_than: int) -> set[str]:
    """What a pruning, or a drop of partitions, begins with; locked, it is checked once more."""
    return set(retention.prunable(store.session_states(), Due(older_than)))


def test_pruning_goes_by_the_end_else_the_last_event_else_the_start(store: BaseStore) -> None:
    cut = T0 + 1000
    done = {"status": "completed"}
    store.save_sessions(
        [
            session("ended before", end_time=cut - 1, **done),
            session("ended at", end_time=cut, **done),
            session("ended before, new events", end_time=cut - 1, **done),
            session("never ended, old events"),
            session("never ended, new events"),
            session("never ended, no events"),
            session("started later", start_time=cut + 1),
            session("pinned", end_time=cut - 1, is_pinned=True, **done),
        ]
    )
    store.save_events(
        [
            event("ended before, new events", cut + 1),
            event("never ended, old events", cut - 1),
            event("never ended, new events", cut - 1),
            event("never ended, new events", cut),
        ]
    )
    everything = {s.session_id for s in store.get_sessions()}
    selected = due(store, cut)
    assert store.prune_old_sessions(cut) == 4
    assert {s.session_id for s in store.get_sessions()} == everything - selected
    assert everything - selected == {
        "ended at",
        "never ended, new events",
        "started later",
        "pinned",
    }
    assert store.prune_old_sessions(cut) == 0
    assert store.save_event(event("ended before", cut - 5)) is False


def test_a_tree_is_pruned_only_as_a_whole(store: BaseStore) -> None:
    cut = T0 + 1000
    old = {"end_time": T0 + 1, "status": "completed"}
    store.save_sessions(
        [
            session("root", **old),
            session("child", parent_session_id="root", **old),
            session("grandchild", manual_parent_session_id="child", end_time=cut + 1,
                    status="completed"),
            session("other root", **old),
            session("other child", parent_session_id="other root", **old),
            session("a", parent_session_id="b", **old),
            session("b", parent_session_id="a", **old),
            session("pin's child", parent_session_id="pin", **old),
            session("pin", is_pinned=True, **old),
            session("orphan", parent_session_id="never stored", **old),
            session("moved away", parent_session_id="root", manual_parent_session_id="x", **old),
        ]
    )  # fmt: skip
    everything = {s.session_id for s in store.get_sessions()}
    selected = due(store, cut)
    assert store.prune_old_sessions(cut) == 6
    assert {s.session_id for s in store.get_sessions()} == everything - selected
    assert everything - selected == {
        "root", "child", "grandchild", "pin", "pin's child",
    }  # fmt: skip
    store.update_session("grandchild", end_time=T0 + 2)
    assert store.prune_old_sessions(cut) == 3


def test_pruning_works_in_batches(store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    delete, sizes = store._delete_prunable, []

    def counted(connection: object, ids: list[str], due: Any) -> int:
        sizes.append(len(ids))
        return delete(connection, ids, due)

    monkeypatch.setattr(store, "_delete_prunable", counted)
    store.save_sessions(session(f"s{i}", end_time=T0, status="error") for i in range(650))
    store.save_sessions(
        session(f"c{i}", parent_session_id="s1", end_time=T0, status="error") for i in range(300)
    )
    assert store.prune_old_sessions(T0 + 1) == 950
    assert store.get_sessions() == []
    assert sum(sizes) == 950
    assert max(sizes) < 200 + 301, "a tree is not cut"


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.update_session("kept child", is_pinned=True),
        lambda store: store.update_session("kept child", end_time=T0 + 1),
        lambda store: store.save_event(event("kept runner", T0 + 1)),
        lambda store: store.save_session(session("new", parent_session_id="kept child")),
        lambda store: store.save_session(session("new", manual_parent_session_id="kept")),
        lambda store: (
            store.save_session(session("new")),
            store.update_session("kept", manual_parent_session_id="new"),
        ),
        lambda store: (
            store.save_session(session("new", manual_parent_session_id="absent")),
            store.update_session("kept", manual_parent_session_id="absent"),
        ),
    ],
    ids=[
        "pinned",
        "ended later",
        "went on",
        "has a child",
        "was made a parent",
        "has a parent",
        "has a sibling",
    ],
)
def test_pruning_spares_the_tree_of_what_changed_while_it_ran(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch, change: Callable[[BaseStore], object]
) -> None:
    for name in ("kept", "gone"):
        ended = {"end_time": T0, "status": "completed"}
        store.save_session(session(name, **ended))
        store.save_session(session(f"{name} child", parent_session_id=name, **ended))
        store.save_session(session(f"{name} runner", parent_session_id=name))
        store.save_event(event(f"{name} runner", T0))
    select = store.session_states

    def then_change() -> list[Any]:
        states = select()
        change(store)
        return states

    monkeypatch.setattr(store, "session_states", then_change)
    assert store.prune_old_sessions(T0 + 1) == 3
    left = {s.session_id for s in store.get_sessions()} - {"new"}
    assert left == {"kept", "kept child", "kept runner"}


def test_pruning_spares_siblings_of_an_absent_parent_together(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        ward = session(f"s{number}", manual_parent_session_id="absent", end_time=T0)
        store.save_session(ward)
        store.update_session(f"s{number}", status="completed", end_time=T0)
    select = store.session_states

    def then_pin() -> list[Any]:
        states = select()
        store.update_session("s2", is_pinned=True)
        return states

    monkeypatch.setattr(store, "session_states", then_pin)
    assert store.prune_old_sessions(T0 + 1) == 0
    assert len(store.get_sessions()) == 4


def test_pruning_waits_for_whoever_pins_a_session_and_spares_it(store: BaseStore) -> None:
    store.save_sessions(session(name, end_time=T0, status="error") for name in ("kept", "gone"))
    pruned: list[int] = []
    pruner = threading.Thread(target=lambda: pruned.append(store.prune_old_sessions(T0 + 1)))

    def pin(connection: Any) -> None:
        store._update_session(connection, "kept", {"is_pinned": True})
        pruner.start()
        pruner.join(0.3)
        assert pruner.is_alive()

    store._run(pin, transaction=True)
    pruner.join(20)
    assert pruned == [1]
    assert get(store, "kept").is_pinned


def test_old_deletions_are_forgotten(store: BaseStore, database: Database) -> None:
    store.save_session(session("lists", child_session_ids=("old", "young")))
    for name in ("old", "young"):
        store.save_session(session(name))
        store.delete_session(name)
    long_ago = round(time.time() * 1000) - 91 * DAY
    database.execute(f"UPDATE deleted_sessions SET deleted_at = {long_ago + 2 * DAY}")
    database.execute(
        f"UPDATE deleted_sessions SET deleted_at = {long_ago} WHERE session_id = 'old'"
    )
    assert store.prune_old_sessions(T0 - 1) == 0
    assert database.execute("SELECT session_id FROM deleted_sessions") == [("young",)]
    assert get(store, "lists").child_session_ids == ()
    assert store.save_event(event("old")) is True
    assert store.save_event(event("young")) is False
    store.delete_session("old")
    assert get(store, "lists").child_session_ids == ()


def test_pruning_takes_a_time_in_milliseconds(store: BaseStore) -> None:
    with pytest.raises(InvalidRecord, match="^older_than: .*seconds"):
        store.prune_old_sessions(1_700_000_000)


def test_pruning_what_is_only_referred_to_leaves_it_on_the_lists(store: BaseStore) -> None:
    store.save_session(session("keeper", is_pinned=True, child_session_ids=("unseen", "seen")))
    store.save_session(session("seen", end_time=T0 + 1, status="completed"))
    store.save_event(event("old", T0, parent_session_id="unseen"))
    store.delete_session("old")
    assert store.prune_old_sessions(T0 + 10) == 1
    kept = store.get_session("keeper")
    assert kept is not None
    assert kept.child_session_ids == ("unseen",)
