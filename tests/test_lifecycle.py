"""What hooks tell about sessions, in whatever order and how often they come."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextuate_persist import MonitorEvent, SessionMeta, SessionNotFound, SessionStatus
from contextuate_persist.base import BaseStore
from contextuate_persist.hooks import hook_event, session_key
from contextuate_persist.lifecycle import SessionState, usage_path
from tests.builders import T0, session

ACTIVE, COMPLETED, ERROR = SessionStatus.ACTIVE, SessionStatus.COMPLETED, SessionStatus.ERROR
AGENT = "a0123456789abcdef"


def hook(name: str, at: int = 0, /, **fields: Any) -> MonitorEvent:
    base = {"session_id": "main", "transcript_path": "/t/main.jsonl", "cwd": "/w"}
    return hook_event(
        {**base, "hook_event_name": name, **fields}, captured_at=T0 + at, machine_id="m"
    )


def inside(name: str, at: int = 0, /, **fields: Any) -> MonitorEvent:
    return hook(name, at, agent_id=AGENT, agent_type="Explore", **fields)


def status(*events: MonitorEvent) -> tuple[SessionStatus | None, int | None]:
    """The same in whatever order the events come."""
    found = {
        (state.status, state.end_time)
        for order in itertools.permutations(events)
        for state in [SessionState.of(*order, order[0])]
    }
    (one,) = found
    return one


# --- Status ---------------------------------------------------------------------------------------


def test_only_the_end_of_a_session_ends_it() -> None:
    assert status(hook("SessionStart")) == (ACTIVE, None)
    assert status(hook("SessionStart"), hook("Stop", 1), hook("Stop", 2)) == (ACTIVE, None)
    assert status(hook("Stop", 1), hook("SessionEnd", 2, reason="clear")) == (COMPLETED, T0 + 2)


def test_any_event_after_its_end_reopens_a_session() -> None:
    ended = hook("SessionEnd", 5, reason="other")
    for name in ("SessionStart", "UserPromptSubmit", "Notification", "FileChanged", "BrandNew"):
        assert status(ended, hook(name, 6)) == (ACTIVE, None)
        assert status(ended, hook(name, 4)) == (COMPLETED, T0 + 5)
        assert status(ended, hook(name, 6), hook("SessionEnd", 7)) == (COMPLETED, T0 + 7)


def test_of_one_millisecond_the_end_decides() -> None:
    assert status(hook("Stop", 5), hook("SessionEnd", 5)) == (COMPLETED, T0 + 5)
    assert status(hook("Stop", 5), hook("StopFailure", 5)) == (ERROR, None)
    assert status(hook("Notification", 5), hook("SessionEnd", 5)) == (COMPLETED, T0 + 5)


def test_only_a_failed_turn_is_an_error_until_the_session_goes_on() -> None:
    failed = hook("StopFailure", 5, error="rate_limit")
    assert status(hook("PostToolUseFailure", 4, error="x")) == (ACTIVE, None)
    assert status(hook("Stop", 4), failed) == (ERROR, None)
    # A minute later it says that it waits.
    assert status(failed, hook("Notification", 9)) == (ERROR, None)
    assert status(failed, hook("UserPromptSubmit", 9)) == (ACTIVE, None)
    assert status(failed, hook("SessionEnd", 9), hook("Notification", 6)) == (COMPLETED, T0 + 9)


def test_the_stop_of_a_sub_agent_completes_its_session_which_may_go_on() -> None:
    started, stopped = inside("SubagentStart", 1), inside("SubagentStop", 3)
    assert started.session_id == stopped.session_id == AGENT
    assert status(started, inside("PreToolUse", 2), stopped) == (COMPLETED, T0 + 3)
    assert status(stopped, inside("PreToolUse", 4)) == (ACTIVE, None)
    assert status(stopped, inside("SubagentStop", 9)) == (COMPLETED, T0 + 9)


def test_the_stop_of_an_agent_without_a_name_completes_nothing() -> None:
    assert status(hook("SubagentStop", 1)) == (ACTIVE, None)


def test_without_an_event_nothing_is_told() -> None:
    assert SessionState.of() == SessionState()
    assert SessionState().status is None
    assert SessionState().updates(session(label="x", model="y")) == {}
    assert status(hook("Notification", 1)) == (ACTIVE, None)


# --- Fields ---------------------------------------------------------------------------------------


def test_the_newest_model_path_and_kind_are_told() -> None:
    state = SessionState.of(
        hook("PostModelSwitch", 5, from_model="opus", to_model="sonnet"),
        hook("SessionStart", 1, model="opus", agent_type="Reviewer"),
        hook("PreModelSwitch", 7, to_model="haiku"),
        hook("Stop", 8, transcript_path="/t/moved.jsonl", model=""),
    )
    assert state.updates(session("main")) == {
        "model": "sonnet",
        "agent_type": "Reviewer",
        "transcript_path": "/t/moved.jsonl",
    }


def test_a_sub_agent_has_a_kind_a_transcript_and_no_user() -> None:
    path = "/t/main/subagents/agent-a.jsonl"
    state = SessionState.of(
        inside("SubagentStart", 1),
        inside("PreToolUse", 2),
        hook("SubagentStop", 3, agent_id=AGENT, agent_type="", agent_transcript_path=path),
    )
    assert state.updates(session(AGENT, parent_session_id="main")) == {
        "status": COMPLETED,
        "end_time": T0 + 3,
        "is_user_initiated": False,
        "agent_type": "Explore",
        "transcript_path": path,
    }


@pytest.mark.parametrize("value", [None, 5, "", "x" * 20_000, ["a"]])
def test_what_a_session_cannot_hold_is_not_told(value: Any) -> None:
    state = SessionState.of(
        hook(
            "SessionStart",
            model=value,
            session_title=value,
            agent_type=value,
            transcript_path=value,
        )
    )
    assert state.updates(session("main")) == {}
    hidden = MonitorEvent(
        **{**fields_of(inside("Stop")), "data": {"agentId": AGENT, "subagent": 5}}
    )
    assert SessionState.of(hidden).agent_type is None


def fields_of(event: MonitorEvent) -> dict[str, Any]:
    return {name: getattr(event, name) for name in MonitorEvent.__dataclass_fields__}


def test_a_title_is_the_label_unless_a_person_gave_another() -> None:
    first = hook("SessionStart", 1, session_title="Fix it")
    second = hook("UserPromptSubmit", 5, prompt="p", session_title="Fix the total")
    both = SessionState.of(second, first)
    assert SessionState.of(first).updates(session("main"))["label"] == "Fix it"
    assert both.updates(session("main", label="Fix it"))["label"] == "Fix the total"
    assert "label" not in both.updates(session("main", label="Fix the total"))
    assert "label" not in both.updates(session("main", label="mine"))


def test_titles_without_end_do_not_fill_the_memory() -> None:
    titles = [hook("UserPromptSubmit", i, session_title=f"t{i}") for i in range(100)]
    state = SessionState.of(*titles)
    assert len(state.titles) == 20
    assert state.updates(session("main", label="t90"))["label"] == "t99"


def test_a_title_told_many_times_does_not_make_an_earlier_one_a_persons() -> None:
    before = hook("SessionStart", 0, session_title="A")
    since = [hook("UserPromptSubmit", i, prompt="p", session_title="B") for i in range(1, 30)]
    state = SessionState.of(before, *since)
    assert state.titles == {(T0, "A"), (T0 + 29, "B")}
    assert state.updates(session("main", label="A"))["label"] == "B"


def test_an_update_that_is_known_is_none() -> None:
    state = SessionState.of(inside("SubagentStart", 1), inside("SubagentStop", 3))
    known = session(AGENT, is_user_initiated=True)
    assert state.updates(known)["parent_session_id"] == "main"
    fields: dict[str, Any] = dict(state.updates(known))
    merged = SessionMeta(
        **{n: getattr(known, n) for n in SessionMeta.__dataclass_fields__} | fields
    )
    assert state.updates(merged) == {}


def test_the_transcript_is_read_at_the_end_of_turns() -> None:
    for name in ("Stop", "StopFailure", "SessionEnd", "PreCompact"):
        assert usage_path(hook(name)) == "/t/main.jsonl"
        # Within a sub-agent that path is its parent's.
        assert usage_path(inside(name)) is None
        assert usage_path(hook(name, transcript_path=None)) is None
    assert usage_path(inside("SubagentStop", agent_transcript_path="/t/a.jsonl")) == "/t/a.jsonl"
    assert usage_path(inside("SubagentStop")) is None
    assert usage_path(hook("PreToolUse")) is None


# --- Any order ------------------------------------------------------------------------------------

events = st.builds(
    lambda name, at, fields: hook(name, at, **fields),
    st.sampled_from(
        ["SessionStart", "Stop", "StopFailure", "SessionEnd", "Notification", "SubagentStop",
         "PostModelSwitch", "PreToolUse"]
    ),
    st.integers(0, 5),
    st.fixed_dictionaries(
        {},
        optional={
            "model": st.sampled_from(["a", "b"]),
            "to_model": st.sampled_from(["a", "b"]),
            "session_title": st.sampled_from(["x", "y", "\ud800"]),
            "transcript_path": st.sampled_from(["/1", "/2"]),
        },
    ),
)  # fmt: skip


@given(told=st.lists(events, max_size=8), chance=st.randoms())
def test_order_and_repetition_change_nothing(told: list[MonitorEvent], chance: Any) -> None:
    state = SessionState.of(*told)
    again = told * 2
    chance.shuffle(again)
    assert SessionState.of(*again) == state
    half = len(told) // 2
    assert SessionState.of(*told[half:]) | SessionState.of(*told[:half]) == state
    assert state | state == state


def test_sessions_in_a_store_become_what_hooks_tell_whatever_comes_first(store: BaseStore) -> None:
    main = [
        hook("SessionStart", 0, source="startup", model="opus", session_title="Fix it"),
        hook("PreToolUse", 1, tool_name="Agent", tool_input={}, tool_use_id="1"),
        hook("PostToolUse", 6, tool_name="Agent", tool_input={}, tool_use_id="1"),
        hook("Stop", 7),
        hook("SessionEnd", 8, reason="logout"),
    ]
    child = [
        inside("SubagentStart", 2),
        inside("PreToolUse", 3, tool_name="Read", tool_use_id="2"),
        inside("SubagentStop", 5, agent_transcript_path="/t/a.jsonl"),
    ]
    expected = None
    for order in itertools.islice(itertools.permutations([*main, *child]), 0, 40_320, 8_063):
        store.delete_all_sessions()
        states: dict[str, SessionState] = {}
        for event in [*order, order[3]]:
            store.save_events([event], undelete=True)
            state = states.get(event.session_id, SessionState()) | SessionState.of(event)
            states[event.session_id] = state
            known = store.get_session(event.session_id)
            assert known is not None
            store.update_session(event.session_id, **state.updates(known))
        found = store.session_tree("main")
        expected = expected or found
        assert found == expected
    assert expected is not None
    (top, _), (below, depth) = expected
    assert (top.status, top.end_time, top.start_time) == (COMPLETED, T0 + 8, T0)
    assert (top.label, top.model, top.transcript_path) == ("Fix it", "opus", "/t/main.jsonl")
    assert (below.session_id, depth) == (session_key("main", AGENT), 1)
    assert (below.status, below.end_time, below.start_time) == (COMPLETED, T0 + 5, T0 + 2)
    assert (below.agent_type, below.is_user_initiated) == ("Explore", False)
    with pytest.raises(SessionNotFound):
        store.update_session("gone", **SessionState.of(*main).updates(session("gone")))
