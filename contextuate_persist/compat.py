"""What contextuate's own hook script, emit-event.js, makes of a payload, bit for bit.

It loses most of a payload, as `hooks` does not; its defects are kept on purpose, for comparing.
Left out is what depends on its process: a payload names its session, no transcript is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contextuate_persist import model
from contextuate_persist.errors import InvalidRecord
from contextuate_persist.model import MonitorEvent

_EVENT_TYPES = {
    "SessionStart": "session_start",
    "SessionEnd": "session_end",
    "Stop": "session_end",
    "PreToolUse": "tool_call",
    "PostToolUse": "tool_result",
    "PostToolUseFailure": "tool_error",
    "SubagentStart": "subagent_start",
    "SubagentStop": "subagent_stop",
    "Notification": "notification",
    "UserPromptSubmit": "user_prompt",
    "PreCompact": "pre_compact",
    "PermissionRequest": "permission_request",
}
_OF_SUBAGENTS = ("SubagentStart", "SubagentStop")


def hook_event(
    payload: Mapping[str, Any],
    *,
    captured_at: int,
    machine_id: str,
    event_id: str,
    parent_session_id: str | None = None,
    working_directory: str = "",
) -> MonitorEvent:
    """The event of a payload; raises InvalidRecord for one on which the script would fail.

    `working_directory` is where the script ran, for payloads that name none.
    """
    hook_type = payload.get("hook_event_name") or payload.get("hook_type") or "Unknown"
    model.check_type_name("hook_event_name", hook_type)
    of_subagent = hook_type in _OF_SUBAGENTS
    session_id, parent = short_id(payload.get("session_id")), parent_session_id
    if of_subagent:
        session_id, parent = payload.get("agent_id") or session_id, session_id
    event = MonitorEvent(
        id=event_id,
        timestamp=captured_at,
        session_id=session_id,
        parent_session_id=parent,
        machine_id=machine_id,
        working_directory=payload.get("cwd") or working_directory,
        event_type=_EVENT_TYPES.get(hook_type, "message"),
        hook_type=hook_type,
        data=_data(payload, hook_type),
    )
    model.check_event(event)
    return event


def short_id(session_id: object) -> str:
    """The session id as contextuate's files have it: hyphens out, the first 16 characters."""
    if not isinstance(session_id, str) or not session_id:
        raise InvalidRecord(f"session_id: a string is needed, not {model.shown(session_id)}")
    return session_id.replace("-", "")[:16]


def _data(payload: Mapping[str, Any], hook_type: str) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if _truthy(payload.get("tool_name")):
        data["toolName"] = payload["tool_name"]
    for field, key in (("tool_input", "toolInput"), ("tool_output", "toolOutput")):
        if field in payload:
            data[key] = payload[field]
    for field in ("message", "prompt"):
        if _truthy(payload.get(field)):
            data["message"] = payload[field]
    if _truthy(error := payload.get("error")):
        data["error"] = {
            "code": _member(error, "code", "UNKNOWN"),
            "message": _member(error, "message", "Unknown error"),
        }
    if _truthy(used := payload.get("token_usage")):
        data["tokenUsage"] = _usage(used)
    if subagent := _subagent(payload):
        data["subagent"] = subagent
    if hook_type in ("Stop", "SubagentStop") and _truthy(payload.get("transcript_path")):
        data["transcriptPath"] = payload["transcript_path"]
    return data


def _usage(used: object) -> dict[str, Any]:
    usage = {
        "input": _member(used, "input_tokens", 0),
        "output": _member(used, "output_tokens", 0),
    }
    if isinstance(used, Mapping):
        for field, key in (
            ("cache_read_tokens", "cacheRead"),
            ("cache_write_tokens", "cacheWrite"),
        ):
            if field in used:
                usage[key] = used[field]
    return usage


def _subagent(payload: Mapping[str, Any]) -> dict[str, Any]:
    call = payload.get("tool_input")
    if _truthy(kind := payload.get("agent_type")):
        agent_id = payload.get("agent_id")
        return {"type": _lower(kind)} | ({"agentId": agent_id} if _truthy(agent_id) else {})
    if _truthy(subagent := payload.get("subagent")):
        kind = _lower(_member(subagent, "type", "unknown"))
        return {"type": kind, "prompt": _member(subagent, "prompt", "")}
    if payload.get("tool_name") == "Task" and _truthy(call):
        return {
            "type": _lower(_member(call, "subagent_type", "unknown")),
            "prompt": _member(call, "prompt", ""),
            "description": _member(call, "description", ""),
        }
    return {}


def _truthy(value: object) -> bool:
    """Whether JavaScript takes the value for true: empty lists and objects are."""
    return isinstance(value, dict | list) or bool(value)


def _member(value: object, name: str, otherwise: Any) -> Any:
    """JavaScript's `value.name || otherwise`."""
    found = value.get(name) if isinstance(value, Mapping) else None
    return found if _truthy(found) else otherwise


def _lower(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRecord(f"agent_type: a string is needed, not {model.shown(value)}")
    return value.lower()
