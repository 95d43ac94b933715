"""What waits in the queue of a writer: how it lies in the spool, and what of it goes together."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import orjson

from contextuate_persist import model, payload, records
from contextuate_persist.errors import InvalidRecord, SpoolError
from contextuate_persist.model import MonitorEvent, SessionMeta, TokenUsage
from contextuate_persist.records import CheckedEvent, EventHead, EventRow

#: What an item takes in memory beside its payload, roughly.
ITEM_BYTES = 1000


class Update(NamedTuple):
    """A call of `update_session`."""

    session_id: str
    fields: dict[str, Any]


class Refused(NamedTuple):
    """What cannot be kept, as near as JSON can tell it, and why."""

    kind: str  # event, session, update, or record: one that this version cannot read
    record: Any  # in the wire form; of an update its id and fields; of a record base64
    reason: str
    exact: bool = True  # False if JSON cannot tell what was given


#: What goes to the spool and to the store.
Value: TypeAlias = EventRow | SessionMeta | Update | Refused


class Taken(NamedTuple):
    """An event that was put a moment ago, and the JSON of its payload as it was then."""

    event: MonitorEvent
    text: bytes


class Arrival(NamedTuple):
    """One thing that was put; `number` is its place in the one queue."""

    number: int
    accepted: int  # Unix ms
    value: Taken | Value
    size: int  # bytes in memory, roughly


class Item(NamedTuple):
    """An arrival that is ready for the spool and the store."""

    number: int
    accepted: int
    value: Value
    size: int


def take(event: MonitorEvent) -> Taken | EventRow:
    """The event as it is now: its payload's JSON, if orjson can make it.

    That costs 3 µs, all that an event is checked for 15: `ready` does the rest, in its own time.
    Raises InvalidRecord for what orjson refuses and no store can keep.
    """
    try:
        return Taken(event, orjson.dumps(event.data))
    except TypeError:  # also integers past 64 bits and lone surrogates, which can be kept
        return _encoded(event, None)


def ready(arrival: Arrival | Item) -> Item:
    """The item as it goes to the spool and the store: an event is checked and encoded."""
    if isinstance(arrival, Item):
        return arrival
    number, accepted, taken, size = arrival
    if not isinstance(taken, Taken):
        return Item(number, accepted, taken, size)
    event, text = taken
    value: Value
    try:
        try:
            value = _encoded(event, text)
        except RuntimeError:  # its owner changes the payload that we look through
            value = _encoded(replace(event, data=orjson.loads(text)), text)
        size = value.size
    except InvalidRecord as error:
        value = refused_input(event, str(error))
        size = len(text)
    return Item(number, accepted, value, size + ITEM_BYTES)


def _encoded(event: MonitorEvent, text: bytes | None) -> EventRow:
    event_id = records.check_event(event).id
    head = EventHead(
        event_id,
        event.timestamp,
        event.session_id,
        event.parent_session_id,
        event.machine_id,
        event.working_directory,
        event.event_type,
        event.hook_type,
    )
    encoded = payload.encode(event.data, event.working_directory, text)
    keys = records.tool_keys(event.data)
    return records.encoded_row(CheckedEvent(0, head, event_id), encoded, *keys)


def waves(items: Iterable[Item]) -> list[list[Item]]:
    """The items in as few runs of one kind as keep the order of each session's own."""
    runs: list[list[Item]] = []
    kinds: list[type] = []
    last: dict[str, int] = {}
    for item in items:
        kind = type(item.value)
        session_id = session_of(item.value)
        run = last.get(session_id, 0)
        while run < len(runs) and kinds[run] is not kind:
            run += 1
        if run == len(runs):
            runs.append([])
            kinds.append(kind)
        runs[run].append(item)
        last[session_id] = run
    return runs


def session_of(value: Value) -> str:
    """The session that an item is about; what is refused is about none."""
    if isinstance(value, EventRow):
        return value.event.session_id
    return "" if isinstance(value, Refused) else value.session_id


# --- In the spool ---------------------------------------------------------------------------------


def to_body(value: Value) -> bytes:
    """The value as it lies in the spool: an event's payload as it goes to a database."""
    if isinstance(value, EventRow):
        assert isinstance(value.event, EventHead)  # noqa: S101  (`ready` makes them so)
        about = (value.tool_name, value.tool_use_id, len(value.data), value.exact is not None)
        head = _dumps([*value.event, *about])
        return b"".join((b"E", head, b"\n", value.data, value.exact or b""))
    if isinstance(value, SessionMeta):
        return b"S" + _dumps(value.to_wire())
    if isinstance(value, Update):
        return b"U" + _dumps([value.session_id, _plain(value.fields)])
    return b"R" + _dumps(value)


def from_body(body: bytes) -> Value:
    """The value that `to_body` wrote; raises SpoolError for anything else."""
    try:
        value: Value = _READERS[body[:1]](body[1:])
    except (ValueError, TypeError, KeyError) as error:
        raise SpoolError(f"no record of this version: {error}") from error
    return value


def _read_event(body: bytes) -> EventRow:
    head, _, rest = body.partition(b"\n")
    *fields, tool_name, tool_use_id, length, is_exact = _loads(head)
    event = EventHead(*fields)
    encoded = payload.Encoded(rest[:length], rest[length:] if is_exact else None)
    return records.encoded_row(CheckedEvent(0, event, event.id), encoded, tool_name, tool_use_id)


def _read_update(body: bytes) -> Update:
    session_id, fields = _loads(body)
    if "token_usage" in fields:
        fields["token_usage"] = TokenUsage(**fields["token_usage"])
    return Update(session_id, fields)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(fields)
    if isinstance(usage := plain.get("token_usage"), TokenUsage):
        plain["token_usage"] = {name: getattr(usage, name) for name in model.USAGE_WIRE}
    return plain


_READERS: dict[bytes, Any] = {
    b"E": _read_event,
    b"S": lambda body: SessionMeta.from_wire(_loads(body)),
    b"U": _read_update,
    # Its integers may have any size, which orjson would round.
    b"R": lambda body: Refused(*payload.loads_exact(body)),
}


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate, in a path for one
        return payload.exact_json(value)


def _loads(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except ValueError:
        return payload.loads_exact(text)


# --- What is set aside ----------------------------------------------------------------------------


def refused_input(record: MonitorEvent | SessionMeta | Update, reason: str) -> Refused:
    """Something that no store can keep."""
    given: Any
    if isinstance(record, MonitorEvent):
        kind, given = "event", record.to_wire()
    elif isinstance(record, SessionMeta):
        kind, given = "session", _session_wire(record)
    else:
        kind, given = "update", [record.session_id, _plain(record.fields)]
    told = _as_json(given)
    return Refused(kind, told, reason, told == given)


def _session_wire(session: SessionMeta) -> dict[str, Any]:
    try:
        return session.to_wire()
    except (ValueError, TypeError, AttributeError):  # a field of another type altogether
        return {wire: getattr(session, name) for name, wire in model.SESSION_WIRE.items()}


def refused(value: Value, reason: str) -> Refused:
    """Something that the database has not taken."""
    if isinstance(value, Refused):
        return value
    if isinstance(value, EventRow):
        head = value.event
        assert isinstance(head, EventHead)  # noqa: S101  (`ready` makes them so)
        data, _ = payload.decode(value.data, value.exact)
        event = MonitorEvent(**head._asdict(), data=data)
        return Refused("event", event.to_wire(), reason)
    if isinstance(value, SessionMeta):
        return Refused("session", value.to_wire(), reason)
    return Refused("update", [value.session_id, _plain(value.fields)], reason)


def unreadable(body: bytes, reason: str) -> Refused:
    """A record that this version does not know, perhaps one of a newer version."""
    return Refused("record", base64.b64encode(body).decode(), reason)


_DEEPEST = 200  # Python's own stack ends at 1,000, its caller's depth included


def _as_json(value: Any, depth: int = 0) -> Any:
    """The value, what JSON does not have in words."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if depth < _DEEPEST:
        if isinstance(value, Mapping):
            return {
                key if isinstance(key, str) else model.shown(key): _as_json(item, depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [_as_json(item, depth + 1) for item in value]
    return model.shown(value)
