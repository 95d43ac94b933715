"""The stores against a plain Python model of their interface, after every step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from contextuate_persist import (
    Cursor,
    Forgotten,
    MessageUsage,
    MonitorEvent,
    SessionMeta,
    SessionNotFound,
    TokenUsage,
)
from contextuate_persist.base import BaseStore
from contextuate_persist.trees import forest
from tests.builders import T0
from tests.conftest import Database, make_store
from tests.reference import ReferenceStore

BOTH_LAYOUTS = "model_does"

AHEAD = round(time.time() * 1000) + 86_400_000

names = st.sampled_from(["a", "b", "A", "c", "ç", "d"])
# Old ones and ones later than any deletion.
times = st.one_of(st.integers(T0, T0 + 12), st.integers(AHEAD, AHEAD + 3))
texts = st.sampled_from(["x", "", "\0", "\ud800", "it's \\ DELIMITER"])
flags = st.sampled_from([None, True, False])
optional_names = st.one_of(st.none(), names)
optional_texts = st.one_of(st.none(), texts)
payloads = st.sampled_from([{}, {"toolName": "Bash"}, {"n": 2**70, "s": "\0"}, {"list": [1, 1.0]}])
usages = st.builds(
    TokenUsage,
    total_input=st.integers(0, 9),
    total_output=st.integers(0, 9),
    total_cache_read=st.sampled_from([None, 0, 5]),
    total_cache_creation=st.sampled_from([None, 7]),
)
counts = st.sampled_from([0, 1, 8, 2**53 - 1])
readings = st.builds(
    MessageUsage,
    message_id=st.sampled_from(["m1", "M1", "m2", "it's \\ DELIMITER"]),
    timestamp=times,
    model=optional_texts,
    input_tokens=counts,
    output_tokens=counts,
    cache_read=counts,
    cache_creation=counts,
)
# Few ids, so that they come again.
events = st.builds(
    MonitorEvent,
    id=st.integers(0, 40).map(lambda n: str(uuid.UUID(int=n))),
    timestamp=times,
    session_id=names,
    parent_session_id=optional_names,
    machine_id=st.sampled_from(["m1", "m2"]),
    working_directory=texts,
    event_type=st.sampled_from(["tool_call", "error", "brand_new"]),
    hook_type=st.sampled_from(["PreToolUse", "Invented"]),
    data=payloads,
)
sessions = st.builds(
    SessionMeta,
    session_id=names,
    machine_id=st.just("m"),
    working_directory=texts,
    start_time=times,
    end_time=st.one_of(st.none(), times),
    status=st.sampled_from(["active", "completed", "error"]),
    parent_session_id=optional_names,
    manual_parent_session_id=optional_names,
    child_session_ids=st.lists(names, max_size=3).map(tuple),
    token_usage=usages,
    agent_type=optional_texts,
    is_user_initiated=flags,
    is_pinned=flags,
    hidden=flags,
    label=optional_texts,
    model=optional_texts,
    transcript_path=optional_texts,
)
updates = st.fixed_dictionaries(
    {},
    optional={
        "start_time": times,
        "end_time": st.one_of(st.none(), times),
        "status": st.sampled_from(["active", "completed", "error"]),
        "parent_session_id": optional_names,
        "manual_parent_session_id": optional_names,
        "child_session_ids": st.lists(names, max_size=3, unique=True).map(tuple),
        "token_usage": usages,
        "is_pinned": flags,
        "hidden": flags,
        "label": optional_texts,
        "working_directory": texts,
    },
)
subjects = st.one_of(
    st.builds(dict, session_id=names),
    st.builds(dict, machine_id=st.sampled_from(["m", "m1", "m2"])),
    st.builds(dict, working_directory=texts.filter(bool)),
)


class StoreMachine(RuleBasedStateMachine):
    """Everything a caller can do, in any order."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.database.clear()
        self.store: BaseStore = make_store(self.database.url, pool_size=2)
        self.store.init()
        self.model = ReferenceStore()

    def teardown(self) -> None:
        self.store.close()

    @rule(event=events)
    def save_event(self, event: MonitorEvent) -> None:
        assert self.store.save_event(event) == self.model.save_event(event)

    @rule(batch=st.lists(events, max_size=12))
    def save_events(self, batch: list[MonitorEvent]) -> None:
        assert self.store.save_events(batch) == self.model.save_events(batch)

    @rule()
    def deliver_everything_again(self) -> None:
        assert self.store.save_events(self.model.events[::-1]) == 0

    @rule(session=sessions)
    def save_session(self, session: SessionMeta) -> None:
        assert self.store.save_session(session) == self.model.save_session(session)

    @rule(batch=st.lists(sessions, max_size=4))
    def save_sessions(self, batch: list[SessionMeta]) -> None:
        assert self.store.save_sessions(batch) == sum(map(self.model.save_session, batch))

    @rule(name=names, fields=updates)
    def update_session(self, name: str, fields: dict[str, Any]) -> None:
        with self._missing(self.model.update_session(name, fields)):
            self.store.update_session(name, **fields)

    @rule(name=names, usages=st.lists(readings, max_size=3))
    def save_usage(self, name: str, usages: list[MessageUsage]) -> None:
        expected = self.model.save_usage(name, usages)
        with self._missing(expected is not None):
            assert self.store.save_usage(name, usages) == expected

    @rule(name=names)
    def delete_session(self, name: str) -> None:
        with self._missing(self.model.delete_session(name)):
            self.store.delete_session(name)

    @rule()
    def delete_all_sessions(self) -> None:
        assert self.store.delete_all_sessions() == self.model.delete_all_sessions()

    @rule(subject=subjects)
    def forget(self, subject: dict[str, str]) -> None:
        # Who was only named has a row or not, by the way in which it was named.
        named = {name for name, known in self.model.known.items() if known.source == "reference"}
        dry = self.store.forget(**subject, dry_run=True)  # type: ignore[arg-type]
        done = self.store.forget(**subject)  # type: ignore[arg-type]
        assert done == dry
        assert self._but(named, done) == self._but(named, self.model.forget(**subject))

    @staticmethod
    def _but(named: set[str], forgotten: Forgotten) -> Forgotten:
        ids = tuple(one for one in forgotten.session_ids if one not in named)
        return dataclasses.replace(forgotten, session_ids=ids)

    @rule(older_than=times)
    def prune(self, older_than: int) -> None:
        pruned = self.store.prune_old_sessions(older_than)
        assert pruned == self.model.prune_old_sessions(older_than)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = make_store(self.database.url, pool_size=2)
        self.store.init()

    @rule(name=names, page=st.integers(1, 4), newest_first=st.booleans())
    def page_through(self, name: str, page: int, newest_first: bool) -> None:
        expected = self.model.get_events(name)
        got: list[MonitorEvent] = []
        position: Cursor | int = 2**53 - 1 if newest_first else 10**11
        while True:
            if newest_first:
                rows = self.store.get_events(name, limit=page, before=position)
                got = rows + got
            else:
                rows = self.store.get_events(name, limit=page, after=position)
                got += rows
            if not rows:
                break
            position = rows[0 if newest_first else -1].cursor
        assert got == expected

    @rule(name=names, kind=st.sampled_from(["error", "brand_new"]))
    def find(self, name: str, kind: str) -> None:
        expected = [e for e in self.model.get_events(name) if e.event_type == kind]
        assert self.store.find_events(session_id=name, event_type=kind) == expected[::-1]

    @invariant()
    def is_the_same(self) -> None:
        if not hasattr(self, "model"):
            return
        rows = self.database.execute("SELECT session_id, deleted_at FROM deleted_sessions")
        minutes = {name: deleted // 60_000 for name, deleted in rows}
        for name, deleted in self.model.deleted.items():
            assert abs(minutes.pop(name) - deleted // 60_000) <= 1
        assert minutes == {}
        expected = self.model.get_sessions()
        assert self.store.get_sessions() == expected
        assert self.store.session_tree() == forest(expected)
        assert self.store.event_counts() == self.model.event_counts()
        for name in {event.session_id for event in self.model.events}:
            assert self.store.get_events(name) == self.model.get_events(name)

    @staticmethod
    @contextlib.contextmanager
    def _missing(found: bool) -> Iterator[None]:
        if found:
            yield
        else:
            with pytest.raises(SessionNotFound):
                yield


def run_machine(database: Database, examples: int, steps: int) -> None:
    class Machine(StoreMachine):
        pass

    Machine.database = database
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            # Shrinking takes minutes; the steps of a failure are printed as they were.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
        ),
    )


def test_the_store_does_what_the_model_does(database: Database) -> None:
    run_machine(database, examples=25 if database.layout == "plain" else 10, steps=20)


@pytest.mark.soak
def test_the_store_does_what_the_model_does_for_thousands_of_steps(database: Database) -> None:
    run_machine(database, examples=int(os.environ.get("SOAK_EXAMPLES", "150")), steps=50)
