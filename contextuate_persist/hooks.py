"""Hook payloads of Claude Code, Codex and Gemini CLI as monitor events, and back.

A payload is the JSON object that an agent hands to a hook command. Each of its fields goes to a
column or a named key of `data`, and what has no such place, or would not come back from it equal,
to `data.hook`: so `payload_of` rebuilds every payload, also of hooks that nobody has heard of yet.
What events do to their sessions is told in `lifecycle`, contextuate's own mapping in `compat`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from contextuate_persist import compat, model
from contextuate_persist.errors import InvalidRecord
from contextuate_persist.model import MonitorEvent
from contextuate_persist.transcripts import unix_ms
from contextuate_persist.transfer import parse_json

#: The hook type of a payload that does not name its hook.
UNKNOWN = "Unknown"
#: Hooks that are called for every few characters of an answer: nobody wants them stored.
STREAMING = frozenset({"MessageDisplay"})

# --- Mapping --------------------------------------------------------------------------------------


def _keys(*fields: str, **named: str) -> dict[str, str]:
    """Payload fields and their keys in `data`: camelCase, unless named."""
    return {
        field: re.sub("_(.)", lambda found: found[1].upper(), field) for field in fields
    } | named


# `model` and `turn_id` are Codex's, in every payload.
_COMMON = _keys("transcript_path", "permission_mode", "prompt_id", "effort", "model", "turn_id")
_CALL = _keys("tool_name", "tool_input", "tool_use_id", "mcp_server")
_RESULT = _CALL | _keys("duration_ms", "is_interrupt", tool_response="toolOutput")
_END = _keys(
    "stop_hook_active",
    "background_tasks",
    "session_crons",
    last_assistant_message="assistantResponse",
)
_MODEL_SWITCH = _keys(
    "from_model", "to_model", "requested_model", "source", "context_tokens", "prompt_cache_warm",
    "cache_ttl", "estimated_cache_write_usd", "pricing",
)  # fmt: skip
_TASK = _keys("task_id", "task_subject", "task_description", "teammate_name", "team_name")

#: The event type of each hook of Claude Code 2.1.330, and the keys of its own fields.
HOOKS: dict[str, tuple[str, dict[str, str]]] = {
    "SessionStart": ("session_start", _keys("source", "session_title")),
    "SessionEnd": ("session_end", _keys("reason")),
    "Setup": ("setup", _keys("trigger")),
    "Stop": ("turn_end", _END),
    "StopFailure": ("error", _keys(last_assistant_message="assistantResponse")),
    "UserPromptSubmit": ("user_prompt", _keys("source", "session_title", prompt="message")),
    "UserPromptExpansion": (
        "user_prompt_expansion",
        _keys(
            "expansion_type", "command_name", "command_args", "command_source", prompt="message"
        ),
    ),
    "PreToolUse": ("tool_call", _CALL),
    "PostToolUse": ("tool_result", _RESULT),
    "PostToolUseFailure": ("tool_error", _RESULT),
    "PostToolBatch": ("tool_batch", _keys("tool_calls")),
    "PermissionRequest": (
        "permission_request",
        _CALL | _keys(permission_suggestions="suggestions"),
    ),
    "PermissionDenied": ("permission_denied", _CALL | _keys("reason")),
    "Notification": ("notification", _keys("message", "title", "notification_type")),
    # There the transcript that counts is the sub-agent's; transcript_path is its parent's.
    "SubagentStart": ("subagent_start", _keys(agent_transcript_path="transcriptPath")),
    "SubagentStop": ("subagent_stop", _END | _keys(agent_transcript_path="transcriptPath")),
    "PreCompact": ("pre_compact", _keys("trigger", custom_instructions="message")),
    "PostCompact": ("post_compact", _keys("trigger", compact_summary="message")),
    "PreModelSwitch": ("pre_model_switch", _MODEL_SWITCH),
    "PostModelSwitch": ("post_model_switch", _MODEL_SWITCH),
    "TaskCreated": ("task_created", _TASK),
    "TaskCompleted": ("task_completed", _TASK),
    "TeammateIdle": ("teammate_idle", _keys("teammate_name", "team_name")),
    "Elicitation": (
        "elicitation",
        _keys("mcp_server_name", "message", "mode", "url", "elicitation_id", "requested_schema"),
    ),
    "ElicitationResult": (
        "elicitation_result",
        _keys("mcp_server_name", "elicitation_id", "mode", "action", "content"),
    ),
    "ConfigChange": ("config_change", _keys("source", "file_path")),
    "InstructionsLoaded": (
        "instructions_loaded",
        _keys(
            "file_path", "memory_type", "load_reason", "globs", "trigger_file_path",
            "parent_file_path",
        ),
    ),
    "WorktreeCreate": ("worktree_create", _keys("name")),
    "WorktreeRemove": ("worktree_remove", _keys("worktree_path")),
    "CwdChanged": ("cwd_changed", _keys("old_cwd", "new_cwd")),
    "FileChanged": ("file_changed", _keys("file_path", "event")),
    "DirectoryAdded": ("directory_added", _keys("directory", "source")),
    "MessageDisplay": ("message_display", _keys("message_id", "index", "final", "delta")),
}  # fmt: skip

#: Those of Gemini CLI that have names of their own.
GEMINI_HOOKS: dict[str, tuple[str, dict[str, str]]] = {
    "BeforeTool": ("tool_call", _CALL),
    "AfterTool": ("tool_result", _RESULT),
    "BeforeAgent": ("user_prompt", _keys(prompt="message")),
    "AfterAgent": (
        "turn_end",
        _keys("stop_hook_active", prompt="message", prompt_response="assistantResponse"),
    ),
    "PreCompress": ("pre_compact", _keys("trigger")),
}
_MAPPED = HOOKS | GEMINI_HOOKS
# Only its payloads tell the time. What else has a timestamp got it from a program that logs hooks.
_TIMED = GEMINI_HOOKS.keys() | {"SessionStart", "SessionEnd", "Notification"}
_SUBAGENT_TOOLS = ("Task", "Agent")  # its name before and since 2.1.72


def hook_event(
    payload: Mapping[str, Any],
    *,
    captured_at: int,
    machine_id: str,
    event_id: str | None = None,
    parent_session_id: str | None = None,
) -> MonitorEvent:
    """The event of a payload; raises InvalidRecord, naming the field, if it names no session.

    The id of a tool's use follows from its session, its `tool_use_id` and the hook, whoever tells
    of it. Anything else may happen twice alike: such an event is `event_id`, made when the payload
    was captured and kept with it, or without that a new id. `parent_session_id` is the session that
    started this one, as the environment has it; a sub-agent's parent is in its payload.
    """
    own_id = payload.get("session_id")
    model.check_id("session_id", own_id)
    assert isinstance(own_id, str)  # noqa: S101  (checked in the line above)
    agent_id = _valid(model.check_id, payload.get("agent_id"))
    session_id = session_key(own_id, agent_id)
    hook_type = _valid(model.check_type_name, payload.get("hook_event_name")) or UNKNOWN
    directory = _valid(model.SESSION_CHECKS["working_directory"], payload.get("cwd")) or ""
    parent = own_id if session_id != own_id else parent_session_id
    event = MonitorEvent(
        id=_event_id(payload, session_id, hook_type, event_id, captured_at),
        timestamp=_timestamp(payload, hook_type, captured_at),
        session_id=session_id,
        parent_session_id=parent if parent != session_id else None,
        machine_id=machine_id,
        working_directory=directory,
        event_type=_MAPPED[hook_type][0] if hook_type in _MAPPED else "message",
        hook_type=hook_type,
        data=_data(payload, hook_type, agent_id),
    )
    told = _told(event)
    # Identity, not equality: 1 is not True, and what passed through is the same object.
    rest = {
        field: value
        for field, value in payload.items()
        if field not in told or told[field] is not value
    }
    if rest:
        event.data["hook"] = rest
    model.check_event(event)
    return event


def payload_of(event: MonitorEvent) -> dict[str, Any]:
    """The payload that `hook_event` made this event of, equal to what was sent.

    An event of another origin gives the fields that it knows.
    """
    rest = event.data.get("hook")
    return _told(event) | (rest if isinstance(rest, dict) else {})


def session_key(session_id: str, agent_id: str | None = None) -> str:
    """The session in which something happened: the sub-agent's, or else the one that was named.

    Short ids of sub-agents (7 hexadecimal digits before 2.1.72, 6 of those that compact) come again
    sooner or later, so they stand behind their session's.
    """
    if not agent_id:
        return session_id
    return agent_id if len(agent_id) >= _UNIQUE else f"{session_id}:{agent_id}"


_UNIQUE = 16


def _valid(check: Callable[[str, object], None], value: object) -> str | None:
    try:
        check("", value)
    except InvalidRecord:
        return None
    return value if isinstance(value, str) else None


def _timestamp(payload: Mapping[str, Any], hook_type: str, captured_at: int) -> int:
    told = unix_ms(payload.get("timestamp")) if hook_type in _TIMED else None
    return captured_at if told is None else told


def _data(payload: Mapping[str, Any], hook_type: str, agent_id: str | None) -> dict[str, Any]:
    keys = _fields(hook_type)
    data = {keys[field]: value for field, value in payload.items() if field in keys}
    subagent: dict[str, Any] = {}
    if agent_id is not None:
        data["agentId"] = payload["agent_id"]
        if "agent_type" in payload:
            subagent["type"] = payload["agent_type"] or None  # '' is that of internal helpers
        subagent["agentId"] = agent_id
    elif "agent_type" in payload:  # the main thread of `claude --agent`
        data["agentType"] = payload["agent_type"]
    call = payload.get("tool_input")
    starts_one = hook_type == "PreToolUse" and payload.get("tool_name") in _SUBAGENT_TOOLS
    if starts_one and not subagent and isinstance(call, Mapping):
        names = {"subagent_type": "type", "prompt": "prompt", "description": "description"}
        subagent = {names[name]: value for name, value in call.items() if name in names}
    if subagent:
        data["subagent"] = subagent
    if error := _error(payload, hook_type):
        data["error"] = error
    return data


def _error(payload: Mapping[str, Any], hook_type: str) -> dict[str, Any]:
    """What went wrong, in contextuate's form: a code and a message."""
    if hook_type == "StopFailure":
        names = {"error": "code", "error_details": "message"}
        return {key: payload[field] for field, key in names.items() if field in payload}
    if hook_type != "PostToolUseFailure" or "error" not in payload:
        return {}
    code = "INTERRUPTED" if payload.get("is_interrupt") is True else "TOOL_ERROR"
    error = payload["error"]
    if isinstance(error, Mapping):
        return {"code": error.get("code", code), "message": error.get("message")}
    return {"code": code, "message": error}


def _fields(hook_type: str) -> dict[str, str]:
    own = _MAPPED[hook_type][1] if hook_type in _MAPPED else {}
    taken = set(own.values())
    return {field: key for field, key in _COMMON.items() if key not in taken} | own


def _told(event: MonitorEvent) -> dict[str, Any]:
    """The fields of the payload that the event has in places of their own."""
    data = event.data
    told = {field: data[key] for field, key in _fields(event.hook_type).items() if key in data}
    if event.hook_type != UNKNOWN:
        told["hook_event_name"] = event.hook_type
    if event.working_directory:
        told["cwd"] = event.working_directory
    told["session_id"] = event.session_id
    subagent = data.get("subagent")
    if "agentId" in data:
        told["agent_id"] = data["agentId"]
        if event.parent_session_id is not None:
            told["session_id"] = event.parent_session_id
        if isinstance(subagent, dict) and "type" in subagent:
            told["agent_type"] = subagent["type"]
    elif "agentType" in data:
        told["agent_type"] = data["agentType"]
    error = data.get("error")
    if isinstance(error, dict):
        if event.hook_type == "StopFailure":
            names = {"code": "error", "message": "error_details"}
            told |= {names[key]: value for key, value in error.items() if key in names}
        elif event.hook_type == "PostToolUseFailure" and "message" in error:
            told["error"] = error["message"]
    return told


# --- Ids ------------------------------------------------------------------------------------------

# Any would do, as long as it never changes.
_NAMESPACE = uuid.UUID("5d4d0b1e-0c4e-5b0a-9a53-2f6c1f0c7a11").bytes


def tool_event_id(session: str, tool_use_id: str, hook_type: str) -> str:
    """The id of a use of a tool, as every source gives it; `session` is that of `session_key`."""
    return _uuid5("tool", session, tool_use_id, hook_type)


def logged_event_id(log: str, ordinal: int, payload: Mapping[str, Any]) -> str:
    """The id of a payload in an old log that has none, the same whenever it is imported.

    `log` names the log, `ordinal` counts its payloads: identical ones may stand in it rightly.
    """
    return _uuid5("log", log, str(ordinal), json.dumps(payload, sort_keys=True))


def new_event_id(timestamp: int) -> str:
    """A new id, a UUID of version 7: those of later milliseconds are larger."""
    number = (timestamp & 2**48 - 1) << 80 | int.from_bytes(os.urandom(10), "big")
    number = number & ~(0xF << 76) | 7 << 76
    return str(uuid.UUID(int=number & ~(3 << 62) | 2 << 62))


def _uuid5(*names: str) -> str:
    # Not uuid.uuid5(), which takes no lone surrogates.
    name = json.dumps(names).encode()
    digest = hashlib.sha1(_NAMESPACE + name, usedforsecurity=False).digest()
    return str(uuid.UUID(bytes=digest[:16], version=5))


def _event_id(
    payload: Mapping[str, Any],
    session_id: str,
    hook_type: str,
    event_id: str | None,
    captured_at: int,
) -> str:
    tool_use_id = payload.get("tool_use_id")
    if isinstance(tool_use_id, str) and tool_use_id:
        return tool_event_id(session_id, tool_use_id, hook_type)
    if event_id is not None:
        return model.canonical_event_id(event_id)
    model.check_timestamp("captured_at", captured_at)
    return new_event_id(captured_at)


# --- Inbox ----------------------------------------------------------------------------------------

_BOM = b"\xef\xbb\xbf"
_LONE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A payload as the hook command received it, byte by byte, and what it knew besides."""

    id: str
    captured_at: int
    machine_id: str
    parent_session_id: str | None
    payload: bytes

    @classmethod
    def parse(cls, content: bytes) -> Capture:
        """Read what is in a file of the inbox; raises InvalidRecord, naming the field.

        A machine or parent with an impossible name is left out: neither is worth an event.
        """
        wire = parse_json(content)
        if not isinstance(wire, dict):
            raise InvalidRecord("capture: a JSON object is needed")
        model.check_timestamp("capturedAt", wire.get("capturedAt"))
        try:
            payload = base64.b64decode(wire.get("payload") or "", validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise InvalidRecord("payload: base64 is needed") from None
        return cls(
            id=model.canonical_event_id(wire.get("id")),
            captured_at=wire["capturedAt"],
            machine_id=_valid(model.check_id, wire.get("machineId")) or "unknown",
            parent_session_id=_valid(model.check_id, wire.get("parentSession")),
            payload=payload,
        )

    def to_event(self, mapping: Literal["faithful", "compat"] = "faithful") -> MonitorEvent:
        """The event of the payload; raises InvalidRecord for one that is no JSON object."""
        event = compat.hook_event if mapping == "compat" else hook_event
        return event(
            parse_payload(self.payload),
            event_id=self.id,
            captured_at=self.captured_at,
            machine_id=self.machine_id,
            parent_session_id=self.parent_session_id,
        )


def parse_payload(raw: bytes) -> dict[str, Any]:
    """The object in a payload's bytes; raises InvalidRecord.

    Bytes that are no UTF-8, which hooks on Windows have sent, become lone surrogates.
    """
    raw = raw.removeprefix(_BOM)
    try:
        raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "surrogateescape")
        raw = _LONE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()
    payload = parse_json(raw)
    if not isinstance(payload, dict):
        raise InvalidRecord(f"payload: a JSON object is needed, not {type(payload).__name__}")
    return payload
