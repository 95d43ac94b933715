"""Hook payloads become events, and come back from them as they were sent."""

from __future__ import annotations

import base64
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextuate_persist import InvalidRecord, MonitorEvent, hooks
from contextuate_persist.base import BaseStore
from contextuate_persist.hooks import Capture, hook_event, payload_of, session_key
from tests.builders import T0, event

ROOT = Path(__file__).parent.parent
MAIN = "3f1c0a52-9d3e-4c55-8a53-0f6f3b1f7a10"
AGENT = "a0123456789abcdef"
BASE = {
    "session_id": MAIN,
    "transcript_path": f"/home/dev/.claude/projects/-shop/{MAIN}.jsonl",
    "cwd": "/home/dev/shop",
    "permission_mode": "default",
}


def payload(name: str | None, /, **fields: Any) -> dict[str, Any]:
    return {**BASE, **({"hook_event_name": name} if name else {}), **fields}


def event_of(given: dict[str, Any], **options: Any) -> MonitorEvent:
    defaults = {"captured_at": T0, "machine_id": "laptop"}
    return hook_event(given, **defaults | options)


def told(name: str, /, **fields: Any) -> dict[str, Any]:
    """The data of an event, without what every payload has."""
    event = event_of(payload(name, **fields))
    assert payload_of(event) == payload(name, **fields)
    return {k: v for k, v in event.data.items() if k not in ("transcriptPath", "permissionMode")}


def exactly(value: Any) -> str:
    """Text in which 1, 1.0 and True differ, and the order of keys does not matter."""
    return json.dumps(value, sort_keys=True)


# --- Mapping --------------------------------------------------------------------------------------

CALL = {"tool_name": "Bash", "tool_input": {"command": "ls"}, "tool_use_id": "toolu_1"}
TOLD_CALL = {"toolName": "Bash", "toolInput": {"command": "ls"}, "toolUseId": "toolu_1"}
SWITCH = {"from_model": "a", "to_model": "b", "requested_model": None, "source": "user"}
#: For each hook its event type, fields of a payload, and what the event has of them.
MAPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SessionStart": (
        "session_start",
        {"source": "startup", "model": "opus", "session_title": "Fix it", "context_tokens": 7},
        {
            "source": "startup",
            "model": "opus",
            "sessionTitle": "Fix it",
            "hook": {"context_tokens": 7},
        },
    ),
    "SessionEnd": ("session_end", {"reason": "clear"}, {"reason": "clear"}),
    "Setup": ("setup", {"trigger": "init"}, {"trigger": "init"}),
    "Stop": (
        "turn_end",
        {"stop_hook_active": False, "last_assistant_message": "", "background_tasks": []},
        {"stopHookActive": False, "assistantResponse": "", "backgroundTasks": []},
    ),
    "StopFailure": (
        "error",
        {"error": "rate_limit", "error_details": "later", "last_assistant_message": "x"},
        {"error": {"code": "rate_limit", "message": "later"}, "assistantResponse": "x"},
    ),
    "UserPromptSubmit": (
        "user_prompt",
        {"prompt": "", "source": "user"},
        {"message": "", "source": "user"},
    ),
    "UserPromptExpansion": (
        "user_prompt_expansion",
        {"expansion_type": "slash_command", "command_name": "go", "prompt": "p"},
        {"expansionType": "slash_command", "commandName": "go", "message": "p"},
    ),
    "PreToolUse": ("tool_call", CALL, TOLD_CALL),
    "PostToolUse": (
        "tool_result",
        {**CALL, "tool_response": ["a"], "duration_ms": 5},
        {**TOLD_CALL, "toolOutput": ["a"], "durationMs": 5},
    ),
    "PostToolUseFailure": (
        "tool_error",
        {**CALL, "error": "Exit code 1", "is_interrupt": False},
        {
            **TOLD_CALL,
            "error": {"code": "TOOL_ERROR", "message": "Exit code 1"},
            "isInterrupt": False,
        },
    ),
    "PostToolBatch": ("tool_batch", {"tool_calls": [CALL]}, {"toolCalls": [CALL]}),
    "PermissionRequest": (
        "permission_request",
        {"tool_name": "Bash", "tool_input": {}, "permission_suggestions": [1]},
        {"toolName": "Bash", "toolInput": {}, "suggestions": [1]},
    ),
    "PermissionDenied": (
        "permission_denied",
        {**CALL, "reason": "r"},
        {**TOLD_CALL, "reason": "r"},
    ),
    "Notification": (
        "notification",
        {"message": "waiting", "title": "t", "notification_type": "idle_prompt"},
        {"message": "waiting", "title": "t", "notificationType": "idle_prompt"},
    ),
    "SubagentStart": (
        "subagent_start",
        {"agent_id": AGENT, "agent_type": "Explore"},
        {
            "agentId": AGENT,
            "subagent": {"type": "Explore", "agentId": AGENT},
            "hook": {"transcript_path": BASE["transcript_path"]},
        },
    ),
    "SubagentStop": (
        "subagent_stop",
        {"agent_id": AGENT, "agent_type": "", "last_assistant_message": "done"},
        {
            "agentId": AGENT,
            "subagent": {"type": None, "agentId": AGENT},
            "assistantResponse": "done",
            "hook": {"agent_type": "", "transcript_path": BASE["transcript_path"]},
        },
    ),
    "PreCompact": (
        "pre_compact",
        {"trigger": "auto", "custom_instructions": None},
        {"trigger": "auto", "message": None},
    ),
    "PostCompact": (
        "post_compact",
        {"trigger": "auto", "compact_summary": "s"},
        {"trigger": "auto", "message": "s"},
    ),
    "PreModelSwitch": ("pre_model_switch", SWITCH, {
        "fromModel": "a", "toModel": "b", "requestedModel": None, "source": "user",
    }),
    "PostModelSwitch": ("post_model_switch", {"estimated_cache_write_usd": 0.5}, {
        "estimatedCacheWriteUsd": 0.5,
    }),
    "TaskCreated": ("task_created", {"task_id": "1"}, {"taskId": "1"}),
    "TaskCompleted": ("task_completed", {"task_subject": "s"}, {"taskSubject": "s"}),
    "TeammateIdle": ("teammate_idle", {"teammate_name": "n"}, {"teammateName": "n"}),
    "Elicitation": ("elicitation", {"requested_schema": {}}, {"requestedSchema": {}}),
    "ElicitationResult": ("elicitation_result", {"action": "accept"}, {"action": "accept"}),
    "ConfigChange": ("config_change", {"source": "skills"}, {"source": "skills"}),
    "InstructionsLoaded": ("instructions_loaded", {"load_reason": "r"}, {"loadReason": "r"}),
    "WorktreeCreate": ("worktree_create", {"name": "w"}, {"name": "w"}),
    "WorktreeRemove": ("worktree_remove", {"worktree_path": "/w"}, {"worktreePath": "/w"}),
    "CwdChanged": ("cwd_changed", {"new_cwd": "/b"}, {"newCwd": "/b"}),
    "FileChanged": ("file_changed", {"event": "add"}, {"event": "add"}),
    "DirectoryAdded": ("directory_added", {"directory": "/d"}, {"directory": "/d"}),
    "MessageDisplay": (
        "message_display",
        {"turn_id": "t", "index": 0, "delta": "x"},
        {"turnId": "t", "index": 0, "delta": "x"},
    ),
}  # fmt: skip


def test_every_hook_is_in_the_table_of_the_tests() -> None:
    assert MAPPED.keys() == hooks.HOOKS.keys()
    assert len(MAPPED) == 33


@pytest.mark.parametrize("name", MAPPED)
def test_a_hook_has_its_type_and_its_fields_have_their_places(name: str) -> None:
    event_type, fields, expected = MAPPED[name]
    event = event_of(payload(name, **fields))
    assert (event.event_type, event.hook_type) == (event_type, name)
    assert (event.timestamp, event.machine_id) == (T0, "laptop")
    assert event.working_directory == "/home/dev/shop"
    assert told(name, **fields) == expected


def test_every_type_is_one_that_the_schemas_know() -> None:
    schema = (ROOT / "schemas" / "postgresql-schema.sql").read_text(encoding="utf-8")
    known = {
        kind: set(re.findall(r"'(\w+)'", members))
        for kind, members in re.findall(r"CREATE TYPE (\w+) AS ENUM \((.*?)\);", schema, re.DOTALL)
    }
    types = {event_type for event_type, _ in (hooks.HOOKS | hooks.GEMINI_HOOKS).values()}
    assert types <= known["monitor_event_type"]
    assert hooks.HOOKS.keys() <= known["claude_hook_type"]


def test_keys_of_one_hook_do_not_collide() -> None:
    for name in [*hooks.HOOKS, *hooks.GEMINI_HOOKS]:
        keys = list(hooks._fields(name).values())
        own = {"hook", "error", "subagent", "agentId", "agentType"}
        assert len(set(keys)) == len(keys), name
        assert not own & set(keys), name


def test_a_hook_that_nobody_has_heard_of_is_kept() -> None:
    event = event_of(payload("BrandNew", what={"a": [1]}, hook={"b": 2}))
    assert (event.event_type, event.hook_type) == ("message", "BrandNew")
    assert event.data["hook"] == {"what": {"a": [1]}, "hook": {"b": 2}}


@pytest.mark.parametrize("name", [None, "Unknown", "", " x", 5, "x" * 101, "\ud800"])
def test_a_payload_without_a_usable_name_is_kept(name: Any) -> None:
    sent = {**BASE} if name is None else {**BASE, "hook_event_name": name}
    event = event_of(sent)
    assert (event.event_type, event.hook_type) == ("message", "Unknown")
    assert exactly(payload_of(event)) == exactly(sent)


@pytest.mark.parametrize("tool", ["Task", "Agent"])
def test_the_call_that_starts_a_sub_agent_says_which(tool: str) -> None:
    call = {"subagent_type": "Explore", "prompt": "p", "description": "d", "model": "m"}
    subagent = {"type": "Explore", "prompt": "p", "description": "d"}
    assert told("PreToolUse", tool_name=tool, tool_input=call)["subagent"] == subagent
    assert "subagent" not in told("PreToolUse", tool_name="Read", tool_input=call)
    assert "subagent" not in told("PreToolUse", tool_name=tool, tool_input="text")
    inside = told("PreToolUse", tool_name=tool, tool_input=call, agent_id=AGENT, agent_type="x")
    assert inside["subagent"] == {"type": "x", "agentId": AGENT}


@pytest.mark.parametrize(
    ("error", "interrupt", "expected"),
    [
        ("text", True, {"code": "INTERRUPTED", "message": "text"}),
        ({"code": "E", "message": "m", "more": 1}, False, {"code": "E", "message": "m"}),
        ({}, False, {"code": "TOOL_ERROR", "message": None}),
        (None, False, {"code": "TOOL_ERROR", "message": None}),
        (5, 1, {"code": "TOOL_ERROR", "message": 5}),
    ],
)
def test_an_error_may_be_a_text_or_anything_else(
    error: Any, interrupt: Any, expected: dict[str, Any]
) -> None:
    sent = payload("PostToolUseFailure", error=error, is_interrupt=interrupt)
    event = event_of(sent)
    assert event.data["error"] == expected
    assert exactly(payload_of(event)) == exactly(sent)


def test_the_kind_of_agent_on_the_main_thread_makes_no_sub_agent() -> None:
    event = event_of(payload("SessionStart", agent_type="Reviewer"))
    assert event.data["agentType"] == "Reviewer"
    assert "subagent" not in event.data
    assert (event.session_id, event.parent_session_id) == (MAIN, None)


def test_codex_tells_its_turn_and_model_with_everything() -> None:
    event = event_of(
        {
            "session_id": "019f0bd1-a96e-7802-aeba-f7f8e1ec18f1",
            "turn_id": "t1",
            "transcript_path": None,
            "cwd": "/w",
            "hook_event_name": "PostToolUse",
            "model": "gpt",
            "tool_response": "text",
            "tool_use_id": "exec-1",
        }
    )
    assert event.data == {
        "turnId": "t1",
        "transcriptPath": None,
        "model": "gpt",
        "toolOutput": "text",
        "toolUseId": "exec-1",
    }


def test_gemini_has_names_of_its_own_and_tells_the_time() -> None:
    at = {"timestamp": "2026-03-01T10:00:00.250Z"}
    expected = 1_772_359_200_250
    for name, event_type in (
        ("BeforeTool", "tool_call"),
        ("AfterTool", "tool_result"),
        ("BeforeAgent", "user_prompt"),
        ("AfterAgent", "turn_end"),
        ("SessionStart", "session_start"),
        ("Notification", "notification"),
    ):
        event = event_of(payload(name, **at))
        assert (event.event_type, event.timestamp) == (event_type, expected)
        assert payload_of(event) == payload(name, **at)
    assert event_of(payload("AfterModel", **at)).event_type == "message"
    # The time that a program put into what it logged is not Claude's.
    assert event_of(payload("PreToolUse", **at)).timestamp == T0
    for wrong in ("yesterday", "2026-03-01", "2026-13-01T10:00:00Z", "1960-03-01T10:00:00Z", 5):
        assert event_of(payload("BeforeTool", timestamp=wrong)).timestamp == T0


# --- Sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent_id", "expected"),
    [
        (None, MAIN),
        ("", MAIN),
        ("a0b1c2d", f"{MAIN}:a0b1c2d"),
        ("acompact-94c8fe", f"{MAIN}:acompact-94c8fe"),
        (AGENT, AGENT),
        ("019f12ec-9178-75f2-8cf1-3ec35b5dfc2a", "019f12ec-9178-75f2-8cf1-3ec35b5dfc2a"),
    ],
)
def test_a_sub_agent_has_a_session_of_its_own(agent_id: str | None, expected: str) -> None:
    assert session_key(MAIN, agent_id) == expected
    event = event_of(payload("PreToolUse", agent_id=agent_id), parent_session_id="env")
    assert event.session_id == expected
    assert event.parent_session_id == (MAIN if agent_id else "env")
    assert payload_of(event) == payload("PreToolUse", agent_id=agent_id)


@pytest.mark.parametrize("agent_id", [5, ["a"], " a", "x" * 300, "\0", True])
def test_an_impossible_agent_is_none_but_kept(agent_id: Any) -> None:
    event = event_of(payload("Stop", agent_id=agent_id))
    assert event.session_id == MAIN
    assert exactly(payload_of(event)) == exactly(payload("Stop", agent_id=agent_id))


def test_no_session_is_its_own_parent() -> None:
    assert event_of(payload("Stop"), parent_session_id=MAIN).parent_session_id is None
    same = payload("SubagentStop", agent_id=MAIN)
    assert event_of(same).parent_session_id is None
    assert payload_of(event_of(same)) == same
    assert payload_of(event_of(same, parent_session_id="env")) == same
    assert event_of({**BASE, "hook_event_name": "SubagentStop"}).session_id == MAIN


@pytest.mark.parametrize("session_id", [None, "", 5, " s", "\ud800", "x" * 256])
def test_a_payload_without_a_session_is_refused_by_name(session_id: Any) -> None:
    with pytest.raises(InvalidRecord, match="^session_id: "):
        event_of(payload("Stop", session_id=session_id))


@pytest.mark.parametrize("cwd", [None, 5, "", "x" * 20_000, "C:\\shop", "/\0\ud800"])
def test_any_working_directory_comes_back(cwd: Any) -> None:
    event = event_of(payload("Stop", cwd=cwd))
    assert event.working_directory == (cwd if cwd in ("C:\\shop", "/\0\ud800") else "")
    assert exactly(payload_of(event)) == exactly(payload("Stop", cwd=cwd))


# --- Ids ------------------------------------------------------------------------------------------


def test_a_use_of_a_tool_has_one_id_whoever_tells_of_it() -> None:
    one = event_of(payload("PreToolUse", **CALL))
    again = event_of(payload("PreToolUse", **CALL, cwd="/other"), event_id=str(uuid.uuid4()))  # type: ignore[arg-type]
    assert one.id == again.id == hooks.tool_event_id(MAIN, "toolu_1", "PreToolUse")
    assert uuid.UUID(one.id).version == 5
    others = [
        event_of(payload("PostToolUse", **CALL)),
        event_of(payload("PreToolUse", **CALL, agent_id=AGENT)),
        event_of(payload("PreToolUse", **{**CALL, "tool_use_id": "\ud800"})),
        event_of({**payload("PreToolUse", **CALL), "session_id": "other"}),
    ]
    assert len({event.id for event in [one, *others]}) == 5


def test_ids_do_not_change_between_versions() -> None:
    assert hooks.tool_event_id("s", "t", "PreToolUse") == "ce5e9536-100a-5199-aafc-ef4ee223abd6"
    assert hooks.logged_event_id("log", 1, {"a": 1}) == "d6086aad-3f8d-5a06-809d-5a8a9efa7f22"


@pytest.mark.parametrize("tool_use_id", [None, "", 5])
def test_everything_else_has_the_id_of_its_capture(tool_use_id: Any) -> None:
    given = str(uuid.uuid4())
    sent = payload("PreToolUse", tool_use_id=tool_use_id)
    assert event_of(sent, event_id=given.upper()).id == given
    first, second = event_of(sent), event_of(sent)
    assert first.id != second.id
    assert uuid.UUID(first.id).version == 7
    assert uuid.UUID(first.id).variant == uuid.RFC_4122
    assert uuid.UUID(first.id).int >> 80 == T0
    with pytest.raises(InvalidRecord, match="^id: "):
        event_of(sent, event_id="x")
    with pytest.raises(InvalidRecord, match="^captured_at: "):
        event_of(sent, captured_at=5)


def test_a_payload_in_an_old_log_has_one_id_at_each_import() -> None:
    one = hooks.logged_event_id("log", 1, {"a": 1, "b": "\ud800"})
    assert one == hooks.logged_event_id("log", 1, {"b": "\ud800", "a": 1})
    assert one != hooks.logged_event_id("log", 2, {"a": 1, "b": "\ud800"})
    assert one != hooks.logged_event_id("other", 1, {"a": 1, "b": "\ud800"})


# --- Round trip -----------------------------------------------------------------------------------

texts = st.one_of(
    st.text(max_size=8),
    st.text(
        st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010, exclude_categories=()), max_size=4
    ),
)
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        texts,
        st.sampled_from([0, 1, 2**70, AGENT, "a0b1c2d", MAIN, "Task", "Agent", ""]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
fields = sorted(
    {field for name in [*hooks.HOOKS, *hooks.GEMINI_HOOKS] for field in hooks._fields(name)}
    | {"cwd", "hook_event_name", "agent_id", "agent_type", "error", "error_details", "timestamp"}
    | {"hook", "agentId", "subagent", "toolName", "logged_at"}
)
payloads = st.builds(
    lambda name, session_id, known, more: {**more, **known, **name, "session_id": session_id},
    st.sampled_from([*hooks.HOOKS, *hooks.GEMINI_HOOKS, "BrandNew", "Unknown", None]).map(
        lambda name: {"hook_event_name": name} if name else {}
    ),
    st.sampled_from([MAIN, AGENT, "s"]),
    st.dictionaries(st.sampled_from(fields), values, max_size=8),
    st.dictionaries(texts, values, max_size=2),
)


@given(sent=payloads, parent=st.sampled_from([None, MAIN, "env"]))
def test_every_payload_comes_back_from_its_event(sent: dict[str, Any], parent: str | None) -> None:
    before = exactly(sent)
    event = event_of(sent, parent_session_id=parent)
    assert exactly(payload_of(event)) == exactly(sent) == before
    assert event.parent_session_id != event.session_id
    assert MonitorEvent.from_wire(event.to_wire()) == event


@given(sent=payloads, ascii_only=st.booleans())
def test_every_payload_is_read_from_its_bytes(sent: dict[str, Any], ascii_only: bool) -> None:
    # Without escapes, lone surrogates are bytes that are no UTF-8: they become other text.
    text = json.dumps(sent, ensure_ascii=ascii_only)
    read = hooks.parse_payload(b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass"))
    if ascii_only or not re.search("[\ud800-\udfff]", text):
        assert exactly(read) == exactly(json.loads(text))
    assert read["session_id"] == sent["session_id"]


def test_payloads_come_back_from_both_databases(store: BaseStore) -> None:
    sent = [payload(name, **fields) for name, (_, fields, _) in MAPPED.items()]
    sent += [
        payload("BrandNew", deep=[{"a": 2**70, "b": [1, 1.0, True, None, "\0\ud800"]}]),
        payload("PreToolUse", cwd="/\0\ud800", tool_use_id="\ud800", tool_response=0),
        payload("Stop", agent_id="a0b1c2d", agent_type="\udfff"),
    ]
    events = [event_of(one, captured_at=T0 + i) for i, one in enumerate(sent)]
    assert store.save_events(events) == len(sent)
    assert (
        store.save_events([event_of(p, event_id=e.id) for p, e in zip(sent, events, strict=True)])
        == 0
    )
    stored = sorted(store.iter_events(), key=lambda event: event.timestamp)
    assert [exactly(payload_of(event)) for event in stored] == [exactly(one) for one in sent]


def test_an_event_of_another_origin_gives_the_fields_that_it_knows() -> None:
    other = event(data={"error": {"code": "E"}, "hook": 5, "subagent": 5, "toolName": "Bash"})
    assert payload_of(other) == {
        "hook_event_name": "PreToolUse",
        "session_id": "s",
        "cwd": "/work",
        "tool_name": "Bash",
    }
    failed = event(hook_type="PostToolUseFailure", data={"error": {}, "agentId": "a"})
    assert payload_of(failed).keys() == {"hook_event_name", "session_id", "cwd", "agent_id"}


# --- Inbox ----------------------------------------------------------------------------------------


def content(raw: bytes, **fields: Any) -> bytes:
    values = {
        "id": "01a2173d-00dc-7c6a-91a4-0640432a1089",
        "capturedAt": T0,
        "machineId": "laptop",
        "parentSession": None,
        "payload": base64.b64encode(raw).decode(),
    }
    return json.dumps(values | fields).encode()


def test_a_file_of_the_inbox_becomes_an_event() -> None:
    raw = json.dumps(payload("Notification", message="\u00e9\ud83d")).encode()
    capture = Capture.parse(content(raw, parentSession="env"))
    assert capture.payload == raw
    event = capture.to_event()
    assert event.id == capture.id
    assert (event.timestamp, event.machine_id, event.parent_session_id) == (T0, "laptop", "env")
    assert payload_of(event) == payload("Notification", message="\u00e9\ud83d")
    assert capture.to_event("compat").session_id == "3f1c0a529d3e4c55"


def test_what_the_environment_says_badly_does_not_cost_an_event() -> None:
    capture = Capture.parse(content(b"{}", machineId="\udc80", parentSession=" "))
    assert (capture.machine_id, capture.parent_session_id) == ("unknown", None)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (b"", "JSON"),
        (b"[]", "capture"),
        (b'{"id": ', "JSON"),
        (content(b"{}", id="x"), "id"),
        (content(b"{}", id=None), "id"),
        (content(b"{}", capturedAt="now"), "capturedAt"),
        (content(b"{}", payload="!"), "payload"),
        (content(b"{}", payload=5), "payload"),
        (content(b"{}", payload="\u00e9"), "payload"),
    ],
)
def test_a_broken_file_is_refused_by_field(bad: bytes, field: str) -> None:
    with pytest.raises(InvalidRecord, match=f"^{field}: "):
        Capture.parse(bad)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "JSON: "),
        (b"hello", "JSON: "),
        (b"[1]", "payload: a JSON object is needed, not list"),
        (b'{"session_id": NaN}', "JSON: NaN is not JSON"),
        (b"{}", "session_id: "),
    ],
)
def test_a_payload_that_is_no_hooks_is_refused_in_words(raw: bytes, reason: str) -> None:
    capture = Capture.parse(content(raw))
    with pytest.raises(InvalidRecord, match=f"^{reason}"):
        capture.to_event()


def test_bytes_that_are_no_text_become_lone_surrogates() -> None:
    raw = b'{"session_id": "s", "cwd": "C:\\\\caf\xe9", "a\xff": "\xed\xa0\x80"}'
    read = hooks.parse_payload(raw)
    assert read["cwd"] == "C:\\caf\udce9"
    assert read["a\udcff"] == "\udced\udca0\udc80"
    assert event_of(read).working_directory == "C:\\caf\udce9"


# --- Recorded -------------------------------------------------------------------------------------


def corpus() -> Path:
    folder = os.environ.get("CONTEXTUATE_CORPUS")
    if not folder:
        pytest.skip("CONTEXTUATE_CORPUS names no folder of recorded data")
    return Path(folder)


def recorded() -> Iterator[dict[str, Any]]:
    golden = corpus() / "emit-event-golden" / "pairs.jsonl"
    for line in golden.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["payload"]
    for path in sorted(corpus().glob("*/logs/*.json")):
        if path.name != "chat.json":
            yield from json.loads(path.read_bytes())


def test_recorded_payloads_come_back() -> None:
    sent = list(recorded())
    assert len(sent) > 100
    for one in sent:
        event = event_of(hooks.parse_payload(json.dumps(one).encode()))
        assert exactly(payload_of(event)) == exactly(one)
        assert event.hook_type == one["hook_event_name"]
        assert event.session_id == session_key(one["session_id"], one.get("agent_id"))
