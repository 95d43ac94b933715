"""Events and sessions on their way to and from rows: validated, encoded, packed, read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from contextuate_persist import model, payload
from contextuate_persist.errors import InvalidRecord
from contextuate_persist.model import (
    MessageUsage,
    MonitorEvent,
    SessionMeta,
    SessionStatus,
    TokenUsage,
)

# --- Events ---------------------------------------------------------------------------------------


class EventHead(NamedTuple):
    """An event without its payload, for those who keep that encoded; the id is canonical."""

    id: str
    timestamp: int
    session_id: str
    parent_session_id: str | None
    machine_id: str
    working_directory: str
    event_type: str
    hook_type: str


class CheckedEvent(NamedTuple):
    """An event whose fields are valid; whether its payload can be kept, encoding it tells."""

    position: int  # in the caller's batch
    event: MonitorEvent | EventHead
    id: str


class EventRow(NamedTuple):
    """An event, validated and encoded."""

    position: int
    event: MonitorEvent | EventHead
    id: str
    working_directory: str
    tool_name: str | None
    tool_use_id: str | None
    data: bytes
    exact: bytes | None
    size: int  # bytes that the row adds to a statement, roughly


class Seed(NamedTuple):
    """What events tell about a session, or about the parent that one names."""

    session_id: str
    machine_id: str
    working_directory: str
    start_time: int
    known_from: str
    exact: str | None


def check_event(event: MonitorEvent, position: int = 0) -> CheckedEvent:
    """Validate the fields of an event; raises InvalidRecord."""
    return CheckedEvent(position, event, model.check_event(event))


def encode_event(checked: CheckedEvent) -> EventRow:
    """Validate and encode the payload of an event that has one; raises InvalidRecord."""
    event = checked.event
    assert isinstance(event, MonitorEvent)  # noqa: S101  (a head has no payload)
    encoded = payload.encode(event.data, event.working_directory)
    return encoded_row(checked, encoded, *tool_keys(event.data))


def tool_keys(data: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """What `tool_name` and `tool_use_id` are of a payload."""
    return search_key(data.get("toolName")), search_key(data.get("toolUseId"))


def encoded_row(
    checked: CheckedEvent,
    encoded: payload.Encoded,
    tool_name: str | None,
    tool_use_id: str | None,
) -> EventRow:
    """The row of an event whose payload is encoded."""
    working_directory = checked.event.working_directory
    size = len(encoded.json) + len(encoded.exact or b"") + 4 * len(working_directory) + 600
    return EventRow(
        checked.position,
        checked.event,
        checked.id,
        payload.column_text(working_directory),
        tool_name,
        tool_use_id,
        encoded.json,
        encoded.exact,
        size,
    )


def search_key(value: object) -> str | None:
    return payload.column_text(value[:255]) if isinstance(value, str) else None


#: The order in which the stores select an event's columns.
EVENT_FIELDS = (
    "id",
    "seq",
    "timestamp",
    "session_id",
    "parent_session_id",
    "machine_id",
    "working_directory",
    "event_type",
    "hook_type",
    "data",
    "exact",
)


def event_from_row(row: Sequence[Any]) -> MonitorEvent:
    """The event in a row of EVENT_FIELDS."""
    data, working_directory = payload.decode(row[9], row[10], row[6])
    return MonitorEvent(
        id=row[0],
        seq=row[1],
        timestamp=row[2],
        session_id=row[3],
        parent_session_id=row[4],
        machine_id=row[5],
        working_directory=working_directory,
        event_type=row[7],
        hook_type=row[8],
        data=data,
    )


class Tally(NamedTuple):
    """What a database has of a session, in numbers by which two databases are compared."""

    session_id: str
    known_from: str
    updated_at: int  # by the server's clock, Unix milliseconds
    events: int
    event_times: int  # the sum of their timestamps
    messages: int
    tokens: int  # the sum of all their counts


def tally_from_row(row: Sequence[Any]) -> Tally:
    """The tally in a row of its fields; sums come as decimals."""
    session_id, known_from, *numbers = row
    return Tally(session_id, known_from, *map(int, numbers))


def seeds_of(rows: Iterable[CheckedEvent | EventRow]) -> list[Seed]:
    """One seed for each session that events touch, and for each parent, sorted by id.

    Sorted, since every writer must lock sessions in the same order.
    """
    earliest: dict[str, MonitorEvent | EventHead] = {}
    children: dict[str, MonitorEvent | EventHead] = {}
    for row in rows:
        event = row.event
        for ids, session_id in ((earliest, event.session_id), (children, event.parent_session_id)):
            if session_id is not None:
                known = ids.get(session_id)
                if known is None or event.timestamp < known.timestamp:
                    ids[session_id] = event
    return [
        _seed(session_id, earliest.get(session_id), children.get(session_id))
        for session_id in sorted(earliest.keys() | children.keys())
    ]


def _seed(
    session_id: str,
    own: MonitorEvent | EventHead | None,
    childs: MonitorEvent | EventHead | None,
) -> Seed:
    event = own or childs
    assert event is not None  # noqa: S101  (one of the two named the session)
    texts = {"working_directory": event.working_directory}
    return Seed(
        session_id=session_id,
        machine_id=event.machine_id,
        working_directory=payload.column_text(event.working_directory),
        start_time=event.timestamp,
        known_from="event" if own else "reference",
        exact=_packed_texts(texts),
    )


def links_of(rows: Iterable[CheckedEvent | EventRow]) -> dict[str, str]:
    """Parents as events tell them, by child; the first one counts."""
    links: dict[str, str] = {}
    for row in rows:
        if row.event.parent_session_id is not None:
            links.setdefault(row.event.session_id, row.event.parent_session_id)
    return links


# --- Sessions as parameters and rows --------------------------------------------------------------

_SESSION_TEXTS = ("working_directory", "label", "agent_type", "model", "transcript_path")
_FLAG_DEFAULTS = {"is_user_initiated": True, "is_pinned": False, "hidden": False}


def _packed_texts(texts: Mapping[str, str | None]) -> str | None:
    packed = {
        name: payload.pack_text(text)
        for name, text in texts.items()
        if text is not None and not payload.fits_text(text)
    }
    return orjson.dumps(packed).decode() if packed else None


def _exact_patch(texts: Mapping[str, str | None]) -> str:
    """A merge patch for `sessions.exact`: the given texts that need it, null for the others."""
    patch = {
        name: None if text is None or payload.fits_text(text) else payload.pack_text(text)
        for name, text in texts.items()
    }
    return orjson.dumps(patch).decode()


def session_parameters(session: SessionMeta) -> dict[str, Any]:
    """The values of a save, by column; `exact` is a merge patch over the texts that were given."""
    usage = session.token_usage
    texts = {name: getattr(session, name) for name in _SESSION_TEXTS}
    given = {name: text for name, text in texts.items() if text is not None}
    return {
        "session_id": session.session_id,
        "machine_id": session.machine_id,
        "start_time": session.start_time,
        "end_time": session.end_time,
        "status": SessionStatus(session.status).value,
        "parent_session_id": session.parent_session_id,
        "manual_parent_session_id": session.manual_parent_session_id,
        "child_session_ids": json_list(session.child_session_ids),
        "is_user_initiated": session.is_user_initiated,
        "is_pinned": session.is_pinned,
        "hidden": session.hidden,
        "token_usage_input": usage.total_input,
        "token_usage_output": usage.total_output,
        "token_usage_cache_read": usage.total_cache_read,
        "token_usage_cache_creation": usage.total_cache_creation,
        **{
            name: None if text is None else payload.column_text(text)
            for name, text in texts.items()
        },
        "exact": _exact_patch(given),
    }


def update_parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an update, by column, checked; `exact` is there if a text is."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "session_id" or name not in model.SESSION_CHECKS:
            raise InvalidRecord(f"{model.shown(name)[1:-1]}: no field that update_session can set")
        if value is None and name in _FLAG_DEFAULTS:
            values[name] = _FLAG_DEFAULTS[name]
            continue
        model.SESSION_CHECKS[name](name, value)
        if name == "token_usage":
            values["token_usage_input"] = value.total_input
            values["token_usage_output"] = value.total_output
            values["token_usage_cache_read"] = value.total_cache_read
            values["token_usage_cache_creation"] = value.total_cache_creation
        elif name == "child_session_ids":
            values[name] = json_list(value)
        elif name == "status":
            values[name] = SessionStatus(value).value
        elif name in _SESSION_TEXTS and value is not None:
            values[name] = payload.column_text(value)
        else:
            values[name] = value
    texts = {name: fields[name] for name in _SESSION_TEXTS if name in fields}
    if texts:
        values["exact"] = _exact_patch(texts)
    return values


def usage_rows(messages: Iterable[MessageUsage]) -> list[tuple[str | int | None, ...]]:
    """The rows of the token ledger, without their session."""
    return [
        (
            usage.message_id,
            usage.timestamp,
            None if usage.model is None else payload.column_text(usage.model),
            *usage.counts,
        )
        for usage in messages
    ]


def json_list(ids: Iterable[str]) -> str:
    return orjson.dumps(list(dict.fromkeys(ids))).decode()


#: The order in which the stores select a session's columns; the last two are computed: the sessions
#: whose effective parent it is, as [start_time, id] pairs, and the listed ids that are not its own.
SESSION_FIELDS = (
    "session_id",
    "machine_id",
    "working_directory",
    "start_time",
    "end_time",
    "status",
    "parent_session_id",
    "manual_parent_session_id",
    "child_session_ids",
    "agent_type",
    "model",
    "transcript_path",
    "is_user_initiated",
    "is_pinned",
    "hidden",
    "label",
    "token_usage_input",
    "token_usage_output",
    "token_usage_cache_read",
    "token_usage_cache_creation",
    "exact",
    "linked_children",
    "strangers",
)


def session_from_row(row: Sequence[Any]) -> SessionMeta:
    """The session in a row of SESSION_FIELDS."""
    values = dict(zip(SESSION_FIELDS, row, strict=True))
    linked = [child for _, child in sorted(_json(values.pop("linked_children")))]
    strangers = set(_json(values.pop("strangers")))
    listed = [child for child in _json(values["child_session_ids"]) if child not in strangers]
    values["child_session_ids"] = tuple(dict.fromkeys(listed + linked))
    values["status"] = SessionStatus(values["status"])
    values["token_usage"] = TokenUsage(
        total_input=values.pop("token_usage_input"),
        total_output=values.pop("token_usage_output"),
        total_cache_read=values.pop("token_usage_cache_read"),
        total_cache_creation=values.pop("token_usage_cache_creation"),
    )
    for flag in _FLAG_DEFAULTS:
        values[flag] = bool(values[flag])
    if exact := values.pop("exact"):
        values |= {name: payload.unpack_text(text) for name, text in orjson.loads(exact).items()}
    return SessionMeta(**values)


def exact_text(name: str, column: str | None, exact: bytes | str | None) -> str | None:
    """A text of a session, from its column and the session's exact texts."""
    packed = orjson.loads(exact).get(name) if exact else None
    return column if packed is None else payload.unpack_text(packed)


def _json(value: Any) -> Any:
    return orjson.loads(value) if value else []


# --- Retention ------------------------------------------------------------------------------------


class SessionState(NamedTuple):
    """What retention goes by: where a session hangs, whether it may go, and since when."""

    session_id: str
    parent_id: str | None  # the effective one, stored or not
    is_pinned: bool
    last_active: int  # its end, else its last event, else its start
    last_event: int | None  # also one that came after its end
    known_from: str

    @property
    def is_shown(self) -> bool:
        """Whether it is no mere reference."""
        return self.known_from != "reference"


class Due(NamedTuple):
    """What keeps a session from being pruned: a time of it that is at a bound, or after."""

    older_than: int  # of its last activity
    quiet_since: int | None = None  # of any event

    def takes(self, state: SessionState) -> bool:
        """Whether the session may go, if the others of its tree may, too."""
        is_quiet = (
            self.quiet_since is None
            or state.last_event is None
            or state.last_event < self.quiet_since
        )
        return is_quiet and state.last_active < self.older_than and not state.is_pinned


class Weight(NamedTuple):
    """How much a session takes."""

    events: int
    size: int  # bytes


def state_from_row(row: Sequence[Any]) -> SessionState:
    """The state in a row of its fields."""
    session_id, parent_id, is_pinned, start, end, last_event, known_from = row
    last_active = next(time for time in (end, last_event, start) if time is not None)
    return SessionState(session_id, parent_id, bool(is_pinned), last_active, last_event, known_from)


def usage_from_row(row: Sequence[Any]) -> MessageUsage:
    """The message in a row of the token ledger, without its session."""
    message_id, timestamp, name, *counts = row
    return MessageUsage(
        message_id=message_id,
        timestamp=timestamp,
        model=name,
        **dict(zip(model.USAGE_COUNTS, counts, strict=True)),
    )
