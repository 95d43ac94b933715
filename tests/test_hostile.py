"""Input that would like to be executed: stored exactly or refused in one line, by every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from contextuate_persist import InvalidRecord, PersistenceError, TokenUsage
from contextuate_persist.base import BaseStore
from tests.builders import T0, event, session
from tests.conftest import Database

#: Each can be an id.
HOSTILE = [
    "'; DROP TABLE sessions; --",
    '" OR 1=1; DELETE FROM events; /*',
    "$(touch /tmp/owned) `id` && rm -rf / | sh",
    "%s %(session_id)s ? ?? :name $1 {0} @@version",
    "a\\'b\\\\\"c\\0\\x00\\u0000",
    "../../etc/passwd",
    "DELIMITER //",
    "$$; COMMIT; $$",
    "null",
    "NaN",
    "[]",
    '{"$gt": ""}',
    "\u202eevil\u2066",
    "%",
    "_",
    "*",
    "\\",
    "''",
]
#: None of these can.
NO_IDS = ["", " ", " a", "a\n", "\0", "a\x1b[2Jb", "\ud800", "x" * 256, "\x9b31m"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_goes_through_every_field_and_method(
    store: BaseStore, database: Database, text: str
) -> None:
    parent, child = f"p{text}p", f"c{text}c"
    given = session(
        text,
        machine_id=text,
        working_directory=text,
        parent_session_id=parent,
        child_session_ids=(child,),
        agent_type=text,
        label=text * 300,
        model=text,
        transcript_path=text,
        is_pinned=False,
        hidden=False,
        is_user_initiated=True,
        token_usage=TokenUsage(total_input=1),
    )
    store.save_session(given)
    assert store.get_session(text) == given
    assert store.get_sessions(machine_id=text, parent_session_id=parent) == [given]
    store.update_session(text, label=text, manual_parent_session_id=text)
    assert store.session_tree(text)[0].session.label == text

    name = f"t{text}"[:100].strip()
    data = {text: text, "toolName": text, "toolUseId": text, "list": [text, {text: text}]}
    sent = [
        event(text, T0 + i, event_type=name, hook_type=name, machine_id=text, data=data)
        for i in range(3)
    ]
    store.save_event(sent[0])
    assert store.save_events([*sent, sent[0]]) == 2
    assert store.get_events(text) == sent
    for filters in (
        {"event_type": name},
        {"hook_type": name},
        {"machine_id": text},
        {"tool_name": text},
        {"tool_use_id": text},
        {"session_id": text, "contains": {text: text}},
        {"session_id": text, "contains": {"list": [{text: text}]}},
    ):
        assert store.find_events(**filters, newest_first=False) == sent  # type: ignore[arg-type]
    assert store.event_counts(text) == {name: 3}
    store.delete_session(text)
    assert store.get_session(text) is None
    assert store.get_events(text) == []
    assert database.execute("SELECT COUNT(*) FROM deleted_sessions") == [(1,)]


@pytest.mark.parametrize("text", NO_IDS, ids=ascii)
def test_what_cannot_be_an_id_is_refused_in_one_line_by_every_method(
    store: BaseStore, text: str
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: store.save_event(event(text)),
        lambda: store.save_event(event(parent_session_id=text)),
        lambda: store.save_event(event(machine_id=text)),
        lambda: store.save_events([event(text)]),
        lambda: store.get_events(text),
        lambda: store.get_event_by_id(text, event().id),
        lambda: store.get_event_by_id("s", text),
        lambda: store.find_events(session_id=text),
        lambda: store.find_events(event_type=text),
        lambda: store.iter_events(machine_id=text),
        lambda: store.event_counts(text),
        lambda: store.save_session(session(text)),
        lambda: store.save_sessions([session(parent_session_id=text)]),
        lambda: store.save_session(session(child_session_ids=(text,))),
        lambda: store.get_session(text),
        lambda: store.get_sessions(parent_session_id=text),
        lambda: store.update_session(text, label="x"),
        lambda: store.update_session("s", manual_parent_session_id=text),
        lambda: store.delete_session(text),
        lambda: store.session_tree(text),
    ]
    for call in calls:
        with pytest.raises(InvalidRecord) as caught:
            call()
        assert str(caught.value).isprintable()
        assert str(caught.value).isascii()
        assert len(str(caught.value)) < 300
    assert store.get_sessions() == []


def test_megabytes_where_a_name_belongs_are_refused_in_one_line(store: BaseStore) -> None:
    megabyte = "x" * 2**20
    bad = session(label=megabyte)
    for field in ("working_directory", "transcript_path", "agent_type", "session_id", "model"):
        with pytest.raises(InvalidRecord, match=f"^{field}: 1048576 characters, at most "):
            store.save_session(dataclasses.replace(session(), **{field: megabyte}))
    with pytest.raises(InvalidRecord, match="^label: 1048576 characters, at most 16383 are kept$"):
        store.save_session(bad)
    with pytest.raises(PersistenceError, match="^event_type: "):
        store.save_event(event(event_type=megabyte))


def test_ten_thousand_children_are_kept(store: BaseStore) -> None:
    children = tuple(f"c{i:05}" for i in range(10_000))
    store.save_session(session("p", child_session_ids=children))
    store.save_session(session("p", child_session_ids=children, label="again"))
    got = store.get_session("p")
    assert got is not None
    assert got.child_session_ids == children
