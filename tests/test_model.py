"""The values: their wire form and what makes them valid; no database here."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import contextuate_persist
from contextuate_persist import (
    Cursor,
    InvalidBatch,
    InvalidRecord,
    MonitorEvent,
    PersistenceStore,
    Refusal,
    SessionMeta,
    SessionNotFound,
    SessionStatus,
    StoreClosed,
    TokenUsage,
    open_store,
)
from tests.builders import T0, event, session

EVENT: dict[str, Any] = {
    "id": "019b8d2c-1a80-7000-8000-000000000001",
    "timestamp": T0,
    "sessionId": "s",
    "parentSessionId": "p",
    "machineId": "m",
    "workingDirectory": "/w",
    "eventType": "tool_call",
    "hookType": "PreToolUse",
    "data": {"snake_case": 1, "camelCase": None},
}
SESSION: dict[str, Any] = {
    "sessionId": "s",
    "machineId": "m",
    "workingDirectory": "/w",
    "startTime": T0,
    "endTime": T0 + 1,
    "status": "completed",
    "parentSessionId": "p",
    "manualParentSessionId": "q",
    "childSessionIds": ["a", "b"],
    "tokenUsage": {
        "totalInput": 1,
        "totalOutput": 2,
        "totalCacheRead": 3,
        "totalCacheCreation": 4,
    },
    "agentType": "nexus",
    "isUserInitiated": False,
    "isPinned": True,
    "hidden": False,
    "label": "l",
    "model": "claude",
    "transcriptPath": "/t",
}


def test_an_event_keeps_its_wire_form() -> None:
    assert MonitorEvent.from_wire(EVENT).to_wire() == EVENT
    without = {key: value for key, value in EVENT.items() if key != "parentSessionId"}
    assert MonitorEvent.from_wire(without).to_wire() == without
    assert MonitorEvent.from_wire(EVENT | {"seq": 9, "future": 1}).to_wire() == EVENT


def test_a_session_keeps_its_wire_form() -> None:
    assert SessionMeta.from_wire(SESSION).to_wire() == SESSION
    small = {
        key: SESSION[key]
        for key in ("sessionId", "machineId", "workingDirectory", "startTime", "status")
    }
    assert SessionMeta.from_wire(small).to_wire() == small | {
        "childSessionIds": [],
        "tokenUsage": {"totalInput": 0, "totalOutput": 0},
    }
    nulls = dict.fromkeys(SESSION.keys() - small.keys())
    assert SessionMeta.from_wire(small | nulls) == SessionMeta.from_wire(small)


def test_a_session_from_the_wire_has_python_types() -> None:
    got = SessionMeta.from_wire(SESSION)
    assert got.status is SessionStatus.COMPLETED
    assert got.child_session_ids == ("a", "b")
    assert got.token_usage == TokenUsage(
        total_input=1, total_output=2, total_cache_read=3, total_cache_creation=4
    )
    assert got.effective_parent_id == "q"


@pytest.mark.parametrize("key", [key for key in EVENT if key != "parentSessionId"])
def test_a_missing_event_field_is_named_as_on_the_wire(key: str) -> None:
    wire = {name: value for name, value in EVENT.items() if name != key}
    with pytest.raises(InvalidRecord, match=f"^{key}: missing$"):
        MonitorEvent.from_wire(wire)


@pytest.mark.parametrize(
    "key", ["sessionId", "machineId", "workingDirectory", "startTime", "status"]
)
def test_a_missing_session_field_is_named_as_on_the_wire(key: str) -> None:
    wire = {name: value for name, value in SESSION.items() if name != key}
    with pytest.raises(InvalidRecord, match=f"^{key}: missing$"):
        SessionMeta.from_wire(wire)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", "x"), ("id", 7), ("id", "{019b8d2c-1a80-7000-8000-000000000001}"),
        ("timestamp", "1"), ("timestamp", 1.5), ("timestamp", True), ("timestamp", T0 // 1000),
        ("timestamp", 2**53), ("timestamp", -1), ("sessionId", "x" * 256), ("sessionId", " x"),
        ("sessionId", "a\u0085b"), ("machineId", []), ("workingDirectory", 1),
        ("eventType", "x" * 101), ("hookType", "\ud800"), ("parentSessionId", ""), ("data", [1]),
        ("data", "text"),
    ],
)  # fmt: skip
def test_a_wrong_event_value_is_named_as_on_the_wire(key: str, value: Any) -> None:
    with pytest.raises(InvalidRecord, match=f"^{key}: ") as caught:
        MonitorEvent.from_wire(EVENT | {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("startTime", "x"), ("endTime", 5), ("status", "paused"), ("childSessionIds", "ab"),
        ("childSessionIds", [1]), ("tokenUsage", [1]), ("tokenUsage", "x"), ("isPinned", "yes"),
        ("hidden", 1), ("label", 5), ("agentType", "x" * 256), ("manualParentSessionId", "\n"),
    ],
)  # fmt: skip
def test_a_wrong_session_value_is_named_as_on_the_wire(key: str, value: Any) -> None:
    with pytest.raises(InvalidRecord, match=f"^{key}: "):
        SessionMeta.from_wire(SESSION | {key: value})


@pytest.mark.parametrize("count", [-1, 1.0, "1", True, 2**63])
@pytest.mark.parametrize("key", ["totalInput", "totalCacheRead"])
def test_a_wrong_token_count_is_named_as_on_the_wire(key: str, count: Any) -> None:
    with pytest.raises(InvalidRecord, match=f"^{key}: a count is needed"):
        SessionMeta.from_wire(SESSION | {"tokenUsage": {key: count}})


@pytest.mark.parametrize("wire", [None, [], "x", 1])
def test_what_is_no_object_is_refused(wire: Any) -> None:
    for kind in (MonitorEvent, SessionMeta):
        with pytest.raises(InvalidRecord, match="^record: a JSON object is needed"):
            kind.from_wire(wire)


def test_event_ids_become_lower_case_with_hyphens() -> None:
    plain = EVENT["id"]
    for spelled in (plain.upper(), plain.replace("-", ""), plain.replace("-", "").upper()):
        assert MonitorEvent.from_wire(EVENT | {"id": spelled}).id == plain


def test_seq_takes_no_part_in_equality_or_wire_form() -> None:
    one = MonitorEvent.from_wire(EVENT)
    same = MonitorEvent(
        **{name: getattr(one, name) for name in one.__slots__ if name != "seq"}, seq=4
    )
    assert one == same
    assert hash(one) == hash(same)
    assert one.to_wire() == same.to_wire()
    assert same.cursor == Cursor(T0, 4)


@given(timestamp=st.integers(-(2**63), 2**63 - 1), seq=st.integers(-(2**63), 2**63 - 1))
def test_a_cursor_is_the_same_after_its_text(timestamp: int, seq: int) -> None:
    assert Cursor.parse(str(Cursor(timestamp, seq))) == Cursor(timestamp, seq)


@pytest.mark.parametrize(
    "text",
    ["", "1", "-1", "1-2-3", "a-b", "1 - 2", "１-２", "1-2\n", f"{2**63}-1", f"1-{2**63}"],  # noqa: RUF001
)
def test_a_malformed_cursor_is_refused(text: str) -> None:
    with pytest.raises(InvalidRecord, match="^cursor: "):
        Cursor.parse(text)


def test_records_are_frozen_and_take_no_positions() -> None:
    with pytest.raises(AttributeError):
        event().timestamp = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        TokenUsage(1, 2)  # type: ignore[misc]
    assert hash(session()) == hash(session())


def test_errors_survive_pickling() -> None:
    batch = InvalidBatch([Refusal(i, "id", "why") for i in range(25)], stored=3)
    for error in (batch, SessionNotFound("x"), StoreClosed()):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
    assert "and 5 more" in str(batch)
    assert isinstance(SessionNotFound("x"), LookupError)
    assert isinstance(batch, ValueError)


def test_the_stores_implement_the_protocol() -> None:
    for url in ("postgresql://h/d", "mysql://h/d"):
        store = open_store(url)
        assert isinstance(store, PersistenceStore)


def test_every_public_name_is_there() -> None:
    for name in contextuate_persist.__all__:
        assert getattr(contextuate_persist, name)
    assert sorted(contextuate_persist.__all__) == contextuate_persist.__all__


def test_recorded_events_keep_their_wire_form() -> None:
    corpus = os.environ.get("CONTEXTUATE_CORPUS")
    if not corpus:
        pytest.skip("CONTEXTUATE_CORPUS names no folder of recorded data")
    lines = (Path(corpus) / "emit-event-golden" / "pairs.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert len(events) == 32
    for wire in events:
        assert MonitorEvent.from_wire(wire).to_wire() == wire
