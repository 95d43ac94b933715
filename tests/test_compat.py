"""contextuate's own mapping, bit for bit: what its script made of payloads, and its defects."""

from __future__ import annotations

import json
from typing import Any

import pytest

from contextuate_persist import InvalidRecord, compat
from tests.builders import T0
from tests.test_hooks import corpus

ID = "0fcd0a4c-52ab-4f4c-9c0b-0d9a2f6a0b11"
FULL = "c0329279-8834-4553-8e2e-6f413d62d3be"


def made(payload: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The event of a payload as the script would write it, without what all have."""
    event = compat.hook_event(
        {"session_id": FULL, **payload},
        captured_at=T0,
        machine_id="m",
        event_id=ID,
        working_directory="/pwd",
        **options,
    )
    wire = event.to_wire()
    assert (wire.pop("id"), wire.pop("timestamp"), wire.pop("machineId")) == (ID, T0, "m")
    return wire


def event(hook_type: str, event_type: str, data: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "sessionId": "c032927988344553",
        "workingDirectory": "/pwd",
        "eventType": event_type,
        "hookType": hook_type,
        "data": data,
        **fields,
    }


def test_ids_are_cut_and_a_cwd_replaces_the_process_s() -> None:
    expected = event("SessionStart", "session_start", {}, workingDirectory="/w")
    assert made({"hook_event_name": "SessionStart", "cwd": "/w", "source": "x"}) == expected
    assert made({"hook_type": "Stop"}) == event("Stop", "session_end", {})
    assert made({"hook_event_name": ""}) == event("Unknown", "message", {})
    parent = made({"hook_event_name": "Stop"}, parent_session_id="env")
    assert parent["parentSessionId"] == "env"


def test_results_are_lost_and_so_are_the_words_of_errors() -> None:
    call = {"tool_name": "Bash", "tool_input": None, "tool_use_id": "t"}
    data = {"toolName": "Bash", "toolInput": None}
    assert made({"hook_event_name": "PreToolUse", **call}) == event("PreToolUse", "tool_call", data)
    result = {"hook_event_name": "PostToolUse", **call, "tool_response": "x"}
    assert made(result) == event("PostToolUse", "tool_result", data)
    assert made({**result, "tool_output": 0})["data"] == {**data, "toolOutput": 0}
    for error, expected in (
        ("no such file", {"code": "UNKNOWN", "message": "Unknown error"}),
        ({"code": 5}, {"code": 5, "message": "Unknown error"}),
        ({"code": 0, "message": "m"}, {"code": "UNKNOWN", "message": "m"}),
        ([], {"code": "UNKNOWN", "message": "Unknown error"}),
    ):
        assert made({"error": error})["data"] == {"error": expected}
    assert made({"error": ""})["data"] == {}


def test_empty_texts_are_dropped_and_a_prompt_wins_over_a_message() -> None:
    assert made({"message": "", "prompt": "", "tool_name": ""})["data"] == {}
    assert made({"message": "m", "prompt": "p"})["data"] == {"message": "p"}
    assert made({"message": "m", "prompt": ""})["data"] == {"message": "m"}


def test_only_start_and_stop_of_a_sub_agent_have_its_session() -> None:
    agent = {"agent_id": "a1", "agent_type": "Explore"}
    subagent = {"subagent": {"type": "explore", "agentId": "a1"}}
    inside = {"sessionId": "a1", "parentSessionId": "c032927988344553"}
    expected = event("SubagentStart", "subagent_start", subagent, **inside)
    assert made({"hook_event_name": "SubagentStart", **agent}) == expected
    assert made({"hook_event_name": "Stop", **agent}) == event("Stop", "session_end", subagent)
    # An old version names no agent: its session becomes its own parent.
    alone = made({"hook_event_name": "SubagentStop", "transcript_path": "/t"})
    assert alone["sessionId"] == alone["parentSessionId"] == "c032927988344553"
    assert alone["data"] == {"transcriptPath": "/t"}
    assert made({"agent_type": "X", "agent_id": ""})["data"] == {"subagent": {"type": "x"}}


def test_sub_agents_are_described_as_far_as_they_are() -> None:
    call = {"tool_name": "Task", "tool_input": {"subagent_type": "Plan", "prompt": "p"}}
    told = {"type": "plan", "prompt": "p", "description": ""}
    assert made(call)["data"]["subagent"] == told
    unknown = {"type": "unknown", "prompt": "", "description": ""}
    assert made({"tool_name": "Task", "tool_input": "text"})["data"]["subagent"] == unknown
    assert "subagent" not in made({"tool_name": "Agent", "tool_input": {}})["data"]
    assert "subagent" not in made({"tool_name": "Task", "tool_input": ""})["data"]
    assert made({"subagent": {"type": "A"}})["data"]["subagent"] == {"type": "a", "prompt": ""}
    assert made({"subagent": {}})["data"]["subagent"] == {"type": "unknown", "prompt": ""}


def test_token_usage_that_no_payload_has_is_taken() -> None:
    used = {"input_tokens": 5, "cache_read_tokens": 0}
    expected = {"input": 5, "output": 0, "cacheRead": 0}
    assert made({"token_usage": used})["data"] == {"tokenUsage": expected}
    assert made({"token_usage": True})["data"] == {"tokenUsage": {"input": 0, "output": 0}}


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"session_id": None}, "session_id"),
        ({"session_id": ""}, "session_id"),
        ({"agent_type": 5}, "agent_type"),
        ({"hook_event_name": ["x"]}, "hook_event_name"),
        ({"cwd": 5}, "working_directory"),
    ],
)
def test_where_the_script_would_fail_the_payload_is_refused(
    payload: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRecord, match=f"^{field}: "):
        made(payload)


def test_recorded_payloads_become_what_the_script_made_of_them() -> None:
    golden = corpus() / "emit-event-golden" / "pairs.jsonl"
    pairs = [json.loads(line) for line in golden.read_text(encoding="utf-8").splitlines()]
    assert len(pairs) == 32
    for pair in pairs:
        theirs = pair["event"]
        ours = compat.hook_event(
            pair["payload"],
            captured_at=theirs["timestamp"],
            machine_id="golden-host",
            event_id=theirs["id"],
            working_directory="/golden/pwd",
        )
        assert ours.to_wire() == theirs
