"""Sessions and events as values: their fields, their wire form, and what makes them valid.

The wire form (JSON lines, the monitor protocol, contextuate's files) is camelCase; nothing else in
the package knows that. Constructors check nothing, so that a store can name every bad record of a
batch at once; `from_wire` and the stores check everything.
"""

# No `from __future__ import annotations`: the constructor of a NamedTuple would have types that
# nobody can resolve, the API reference neither.

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

from contextuate_persist.errors import InvalidRecord, Refusal

#: Unix milliseconds. The lower bound (3 March 1973) refuses seconds taken for milliseconds.
MIN_TIMESTAMP = 10**11
MAX_TIMESTAMP = 2**53 - 1
MAX_COUNT = 2**63 - 1
#: Of each kind; sums of them still fit a bigint.
MAX_TOKENS = 2**53 - 1
MAX_ID_LENGTH = 255
MAX_TYPE_LENGTH = 100
#: Characters. Four bytes each still fit MySQL's TEXT (65,535 bytes).
MAX_TEXT_LENGTH = 16_383
MAX_SHORT_TEXT_LENGTH = 255
USAGE_COUNTS = ("input_tokens", "output_tokens", "cache_read", "cache_creation")


class SessionStatus(str, Enum):
    """Whether a session runs, has ended, or has failed."""

    ACTIVE = "active"
    COMPLETED = "completed"
    ERROR = "error"


class Cursor(NamedTuple):
    """A position in the one order of events; `str()` and `parse()` carry it over a wire."""

    timestamp: int
    """Unix milliseconds."""
    seq: int
    """The order of events that have the same timestamp."""

    def __str__(self) -> str:
        return f"{self.timestamp}-{self.seq}"

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """Read what `str(cursor)` wrote; raises InvalidRecord for anything else."""
        match = _CURSOR.fullmatch(text) if isinstance(text, str) else None
        if not match:
            raise InvalidRecord(f"cursor: {shown(text)} is not of the form TIMESTAMP-SEQ")
        cursor = cls(int(match[1]), int(match[2]))
        check_cursor("cursor", cursor)
        return cursor


_CURSOR = re.compile("(-?[0-9]{1,19})-(-?[0-9]{1,19})")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """Tokens of a session; a cache total that is None is not known."""

    total_input: int = 0
    total_output: int = 0
    total_cache_read: int | None = None
    total_cache_creation: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageUsage:
    """Tokens of one API message, by which every total counts it once."""

    message_id: str
    timestamp: int
    model: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read: int = 0
    cache_creation: int = 0

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Input, output, read from the cache, written to the cache."""
        return (self.input_tokens, self.output_tokens, self.cache_read, self.cache_creation)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "MessageUsage":
        """Build a valid usage from its wire form; keys this version does not know are ignored.

        Raises InvalidRecord, naming the wire field.
        """
        usage = cls(**_from_wire(wire, MESSAGE_WIRE, required=("message_id", "timestamp")))
        with _wire_names(MESSAGE_WIRE):
            check_message_usage(usage)
        return usage

    def to_wire(self) -> dict[str, Any]:
        """The wire form, without the session; `model` is left out when it is not known."""
        return _to_wire(self, MESSAGE_WIRE)

    def merged(self, later: "MessageUsage") -> "MessageUsage":
        """Two readings of one message: the larger count of each kind."""
        return replace(
            self,
            input_tokens=max(self.input_tokens, later.input_tokens),
            output_tokens=max(self.output_tokens, later.output_tokens),
            cache_read=max(self.cache_read, later.cache_read),
            cache_creation=max(self.cache_creation, later.cache_creation),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionMeta:
    """One run of an agent: a user's, or a sub-agent's with a parent. Times are Unix ms.

    In a save, None means "not said": what the store knows stays (`PersistenceStore.save_session`
    has the rules).
    """

    session_id: str
    machine_id: str
    working_directory: str
    start_time: int
    end_time: int | None = None
    status: SessionStatus = SessionStatus.ACTIVE
    parent_session_id: str | None = None
    manual_parent_session_id: str | None = None
    child_session_ids: tuple[str, ...] = ()
    token_usage: TokenUsage = field(default_factory=TokenUsage)
    agent_type: str | None = None
    is_user_initiated: bool | None = None
    is_pinned: bool | None = None
    hidden: bool | None = None
    label: str | None = None
    model: str | None = None
    transcript_path: str | None = None

    @property
    def effective_parent_id(self) -> str | None:
        """The parent that counts: the one set by hand, else the one detected."""
        return self.manual_parent_session_id or self.parent_session_id

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "SessionMeta":
        """Build a valid session from its wire form; keys this version does not know are ignored.

        Raises InvalidRecord, naming the wire field.
        """
        values = _from_wire(wire, SESSION_WIRE, required=_SESSION_REQUIRED)
        usage = _from_wire(
            _object(values.pop("token_usage", None) or {}, "tokenUsage"), USAGE_WIRE, required=()
        )
        children = values.pop("child_session_ids", None) or []
        if not isinstance(children, list | tuple):
            raise InvalidRecord(f"childSessionIds: a list is needed, not {_kind(children)}")
        session = cls(
            **values,
            child_session_ids=tuple(children),
            token_usage=TokenUsage(**usage),
        )
        with _wire_names(SESSION_WIRE | USAGE_WIRE):
            check_session(session)
        return cls(**{**_values(session), "status": SessionStatus(session.status)})

    def to_wire(self) -> dict[str, Any]:
        """The wire form; optional fields that are None are left out."""
        wire = _to_wire(self, SESSION_WIRE)
        wire["status"] = SessionStatus(self.status).value
        wire["childSessionIds"] = list(self.child_session_ids)
        wire["tokenUsage"] = _to_wire(self.token_usage, USAGE_WIRE)
        return wire


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorEvent:
    """One thing that happened in a session; immutable once stored.

    `data` is the payload: any JSON object. `seq` is given by the store, decides between equal
    timestamps, and takes no part in equality or in the wire form.
    """

    id: str
    timestamp: int
    session_id: str
    machine_id: str
    working_directory: str
    event_type: str
    hook_type: str
    data: dict[str, Any] = field(hash=False)
    parent_session_id: str | None = None
    seq: int | None = field(default=None, compare=False)

    @property
    def cursor(self) -> Cursor:
        """This event's position; raises InvalidRecord if no store has given it a `seq` yet."""
        if self.seq is None:
            raise InvalidRecord(f"cursor: event {self.id} was not read from a store")
        return Cursor(self.timestamp, self.seq)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "MonitorEvent":
        """Build a valid event from its wire form; keys this version does not know are ignored.

        Raises InvalidRecord, naming the wire field. What `data` holds is checked when it is saved.
        """
        event = cls(**_from_wire(wire, EVENT_WIRE, required=_EVENT_REQUIRED))
        with _wire_names(EVENT_WIRE):
            event_id = check_event(event)
        return cls(**{**_values(event), "id": event_id})

    def to_wire(self) -> dict[str, Any]:
        """The wire form; `parentSessionId` is left out when there is none, `seq` always."""
        return _to_wire(self, EVENT_WIRE)


class SessionNode(NamedTuple):
    """A session and its place in a tree."""

    session: SessionMeta
    """As `PersistenceStore.get_session` gives it."""
    depth: int
    """How many steps below the root of its tree; 0 is the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveResult:
    """What `save_events(..., on_error="skip")` did with a batch.

    `stored` counts the events that were new; `refused` names each that cannot be kept.
    """

    stored: int
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What `forget` has removed, or would."""

    sessions: int = 0
    events: int = 0
    """Those of the sessions, and those that happened inside others."""
    messages: int = 0
    """API messages of the token ledger."""
    session_ids: tuple[str, ...] = ()
    """The sessions, those that were only named as a parent included."""
    transcript_paths: tuple[str, ...] = ()
    """Where the agent itself keeps what they said: files that no store removes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How a store is doing; `latency_ms` is one round trip to the server."""

    backend: str
    server_version: str
    driver: str
    driver_implementation: str
    schema_version: int
    schema_layout: str
    latency_ms: float
    pool_size: int
    pool_in_use: int


# --- Wire form ------------------------------------------------------------------------------------

SESSION_WIRE = {
    "session_id": "sessionId",
    "machine_id": "machineId",
    "working_directory": "workingDirectory",
    "start_time": "startTime",
    "end_time": "endTime",
    "status": "status",
    "parent_session_id": "parentSessionId",
    "manual_parent_session_id": "manualParentSessionId",
    "child_session_ids": "childSessionIds",
    "token_usage": "tokenUsage",
    "agent_type": "agentType",
    "is_user_initiated": "isUserInitiated",
    "is_pinned": "isPinned",
    "hidden": "hidden",
    "label": "label",
    "model": "model",
    "transcript_path": "transcriptPath",
}
USAGE_WIRE = {
    "total_input": "totalInput",
    "total_output": "totalOutput",
    "total_cache_read": "totalCacheRead",
    "total_cache_creation": "totalCacheCreation",
}
MESSAGE_WIRE = {
    "message_id": "messageId",
    "timestamp": "timestamp",
    "model": "model",
    "input_tokens": "inputTokens",
    "output_tokens": "outputTokens",
    "cache_read": "cacheRead",
    "cache_creation": "cacheCreation",
}
EVENT_WIRE = {
    "id": "id",
    "timestamp": "timestamp",
    "session_id": "sessionId",
    "parent_session_id": "parentSessionId",
    "machine_id": "machineId",
    "working_directory": "workingDirectory",
    "event_type": "eventType",
    "hook_type": "hookType",
    "data": "data",
}
_SESSION_REQUIRED = ("session_id", "machine_id", "working_directory", "start_time", "status")
_EVENT_REQUIRED = tuple(name for name in EVENT_WIRE if name != "parent_session_id")


def _from_wire(
    wire: object, names: Mapping[str, str], *, required: tuple[str, ...]
) -> dict[str, Any]:
    wire = _object(wire, "record")
    for name in required:
        if wire.get(names[name]) is None:
            raise InvalidRecord(f"{names[name]}: missing")
    return {name: wire[key] for name, key in names.items() if wire.get(key) is not None}


def _to_wire(record: object, names: Mapping[str, str]) -> dict[str, Any]:
    values = ((key, getattr(record, name)) for name, key in names.items())
    return {key: value for key, value in values if value is not None}


def _values(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRecord(f"{name}: a JSON object is needed, not {_kind(value)}")
    return value


class _wire_names:  # noqa: N801  (used as a statement, like contextlib's)
    """Let errors of the checks below name the field as the wire has it."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, InvalidRecord):
            name, colon, rest = str(error).partition(":")
            raise InvalidRecord(self._names.get(name, name) + colon + rest) from None


# --- Validity -------------------------------------------------------------------------------------

# Control characters (C0, DEL, C1) and surrogates: no id can be shown, typed or stored with them.
_NOT_IN_IDS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_session(session: SessionMeta) -> None:
    """Raise InvalidRecord, naming the field, unless the session can be kept."""
    if not isinstance(session, SessionMeta):
        raise InvalidRecord(f"session: a SessionMeta is needed, not {_kind(session)}")
    for name, check in SESSION_CHECKS.items():
        check(name, getattr(session, name))


def check_event(event: MonitorEvent) -> str:
    """The id of an event in canonical form; raises InvalidRecord, naming the field it refuses.

    The payload's content is the encoder's to check.
    """
    if not isinstance(event, MonitorEvent):
        raise InvalidRecord(f"event: a MonitorEvent is needed, not {_kind(event)}")
    event_id = canonical_event_id(event.id)
    check_timestamp("timestamp", event.timestamp)
    check_id("session_id", event.session_id)
    check_id("machine_id", event.machine_id)
    _check_text("working_directory", event.working_directory)
    check_type_name("event_type", event.event_type)
    check_type_name("hook_type", event.hook_type)
    if event.parent_session_id is not None:
        check_id("parent_session_id", event.parent_session_id)
    if not isinstance(event.data, dict):
        raise InvalidRecord(f"data: a JSON object is needed, not {_kind(event.data)}")
    return event_id


def check_message_usage(usage: MessageUsage) -> None:
    """Raise InvalidRecord, naming the field, unless the usage can be kept."""
    if not isinstance(usage, MessageUsage):
        raise InvalidRecord(f"usage: a MessageUsage is needed, not {_kind(usage)}")
    check_id("message_id", usage.message_id)
    check_timestamp("timestamp", usage.timestamp)
    if usage.model is not None:
        _check_short_text("model", usage.model)
    for name, count in zip(USAGE_COUNTS, usage.counts, strict=True):
        _check_tokens(name, count)


def canonical_event_id(value: object) -> str:
    """The event id as the stores keep it, a UUID in lower case; raises InvalidRecord for others."""
    if isinstance(value, str):
        if _CANONICAL_UUID.fullmatch(value):
            return value
        # uuid.UUID() alone would also take braces, "urn:uuid:" and hyphens anywhere.
        if _CANONICAL_UUID.fullmatch(value.lower()) or re.fullmatch("[0-9a-fA-F]{32}", value):
            return str(uuid.UUID(value))
    raise InvalidRecord(f"id: a UUID is needed, not {shown(value)}")


_CANONICAL_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def check_id(name: str, value: object) -> None:
    """Raise InvalidRecord unless `value` can be an id; ids are refused, never rewritten."""
    _check_name(name, value, MAX_ID_LENGTH)


def check_type_name(name: str, value: object) -> None:
    """Raise InvalidRecord unless `value` can name an event or hook type: an open set."""
    _check_name(name, value, MAX_TYPE_LENGTH)


def _check_name(name: str, value: object, limit: int) -> None:
    if type(value) is str and 0 < len(value) <= limit and _is_clean(value):
        return
    if not isinstance(value, str):
        raise InvalidRecord(f"{name}: a string is needed, not {_kind(value)}")
    if not value:
        raise InvalidRecord(f"{name}: empty")
    if len(value) > limit:
        raise InvalidRecord(f"{name}: {len(value)} characters, at most {limit} are kept")
    if found := _NOT_IN_IDS.search(value):
        raise InvalidRecord(f"{name}: control character or surrogate U+{ord(found[0]):04X}")
    if value != value.strip():
        raise InvalidRecord(f"{name}: white space around {shown(value)}")


# The same sessions, machines and types come again and again: to look at each anew took a third of
# the time that checking an event takes (2.3 us instead of 1.6).
@lru_cache(maxsize=4096)
def _is_clean(name: str) -> bool:
    return not _NOT_IN_IDS.search(name) and name == name.strip()


def check_timestamp(name: str, value: object) -> None:
    """Raise InvalidRecord unless `value` is a time in Unix milliseconds."""
    if type(value) is not int:
        raise InvalidRecord(f"{name}: an integer (Unix milliseconds) is needed, not {_kind(value)}")
    if not MIN_TIMESTAMP <= value <= MAX_TIMESTAMP:
        hint = "; is it in seconds?" if 0 <= value < MIN_TIMESTAMP else ""
        raise InvalidRecord(f"{name}: {shown(value)} is no time in Unix milliseconds{hint}")


def check_cursor(name: str, cursor: Cursor) -> None:
    """Raise InvalidRecord unless `cursor` can be a position: adopted events may have any time."""
    for part in cursor:
        if type(part) is not int or not -MAX_COUNT - 1 <= part <= MAX_COUNT:
            raise InvalidRecord(f"{name}: {shown(part)} in a cursor is no 64-bit integer")


def _check_text(name: str, value: object, limit: int = MAX_TEXT_LENGTH) -> None:
    if not isinstance(value, str):
        raise InvalidRecord(f"{name}: a string is needed, not {_kind(value)}")
    if len(value) > limit:
        raise InvalidRecord(f"{name}: {len(value)} characters, at most {limit} are kept")


def _check_short_text(name: str, value: object) -> None:
    _check_text(name, value, MAX_SHORT_TEXT_LENGTH)


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRecord(f"{name}: true or false is needed, not {_kind(value)}")


def _check_status(name: str, value: object) -> None:
    if not isinstance(value, str) or value not in list(SessionStatus):
        known = ", ".join(status.value for status in SessionStatus)
        raise InvalidRecord(f"{name}: {shown(value)} is none of {known}")


def _check_children(name: str, value: object) -> None:
    if not isinstance(value, tuple | list):
        raise InvalidRecord(f"{name}: a list is needed, not {_kind(value)}")
    for child in value:
        check_id(name, child)


def _check_usage(name: str, value: object) -> None:
    if not isinstance(value, TokenUsage):
        raise InvalidRecord(f"{name}: a TokenUsage is needed, not {_kind(value)}")
    for field_name in USAGE_WIRE:
        count = getattr(value, field_name)
        if count is None and field_name.startswith("total_cache"):
            continue
        _check_tokens(field_name, count)


def _check_tokens(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        raise InvalidRecord(f"{name}: a count is needed, not {shown(value)}")


def _optional(check: Any) -> Any:
    def check_unless_none(name: str, value: object) -> None:
        if value is not None:
            check(name, value)

    return check_unless_none


#: What each field of a session may hold; `update_session` uses the same table field by field.
SESSION_CHECKS: dict[str, Any] = {
    "session_id": check_id,
    "machine_id": check_id,
    "working_directory": _check_text,
    "start_time": check_timestamp,
    "end_time": _optional(check_timestamp),
    "status": _check_status,
    "parent_session_id": _optional(check_id),
    "manual_parent_session_id": _optional(check_id),
    "child_session_ids": _check_children,
    "token_usage": _check_usage,
    "agent_type": _optional(_check_short_text),
    "is_user_initiated": _optional(_check_flag),
    "is_pinned": _optional(_check_flag),
    "hidden": _optional(_check_flag),
    "label": _optional(_check_text),
    "model": _optional(_check_short_text),
    "transcript_path": _optional(_check_text),
}


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def shown(value: object) -> str:
    """The value in one short line of ASCII, for messages."""
    try:
        text = ascii(value)
    except Exception:  # an int of 5,000 digits, or whatever a __repr__ does
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
