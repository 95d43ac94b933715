"""Short ways to sessions and events in tests."""

from __future__ import annotations

import uuid
from typing import Any

import mysql.connector
import psycopg

from contextuate_persist import MessageUsage, MonitorEvent, SessionMeta

#: A time long before any test runs.
T0 = 1_700_000_000_000


def event(session_id: str = "s", timestamp: int = T0, **fields: Any) -> MonitorEvent:
    values: dict[str, Any] = {
        "id": str(uuid.uuid4()),
        "machine_id": "machine",
        "working_directory": "/work",
        "event_type": "tool_call",
        "hook_type": "PreToolUse",
        "data": {"toolName": "Bash", "toolInput": {"command": "ls"}},
    }
    return MonitorEvent(session_id=session_id, timestamp=timestamp, **values | fields)


def session(session_id: str = "s", **fields: Any) -> SessionMeta:
    values: dict[str, Any] = {
        "machine_id": "machine",
        "working_directory": "/work",
        "start_time": T0,
    }
    return SessionMeta(session_id=session_id, **values | fields)


def usage(message_id: str = "msg_1", output_tokens: int = 5, **fields: Any) -> MessageUsage:
    values: dict[str, Any] = {"timestamp": T0, "output_tokens": output_tokens}
    return MessageUsage(message_id=message_id, **values | fields)


def deadlock(backend: str) -> Exception:
    """As the driver raises it."""
    if backend == "postgresql":
        return psycopg.errors.DeadlockDetected()
    return mysql.connector.InternalError(errno=1213)
