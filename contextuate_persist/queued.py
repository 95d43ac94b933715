"""What waits in the queue of a writer: how it lies in the spool, and what of it goes together."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import replace
from enum import Enum
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
    """An event that was put a moment ago, with what its payload was then."""

    event: MonitorEvent  # all but its payload, which its owner may have changed since
    text: bytes
    tool_name: str | None
    tool_use_id: str | None


class Arrival(NamedTuple):
    """One thing that was put; `number` is its place in the one queue."""

    number: int
    accepted: int  # Unix ms
    value: Taken | Value
    size: int  # bytes in memory, roughly
    disk: int  # bytes in the spool, roughly


class Item(NamedTuple):
    """An arrival that is ready for the spool and the store."""

    number: int
    accepted: int
    value: Value
    size: int


def take(event: MonitorEvent) -> Taken | EventRow:
    """The event as it is now; its owner may change the payload after that.

    What takes time and not the payload itself, `ready` does later. Raises InvalidRecord.
    """
    data = event.data
    if isinstance(data, dict):
        text = payload.snapshot(data)
        if text is not None:
            return Taken(event, text, *records.tool_keys(data))
    checked = _checked(event)
    encoded = payload.encode(data, event.working_directory)
    return records.encoded_row(checked, encoded, *records.tool_keys(data))


def ready(arrival: Arrival | Item) -> Item:
    """The item as it goes to the spool and the store: an event is checked and encoded."""
    if isinstance(arrival, Item):
        return arrival
    number, accepted, taken, size, _ = arrival
    if not isinstance(taken, Taken):
        return Item(number, accepted, taken, size)
    event, text, *tool_keys = taken
    try:
        checked = _checked(event)
        encoded = payload.encode_snapshot(text, event.working_directory)
        value = records.encoded_row(checked, encoded, *tool_keys)
    except InvalidRecord as error:
        return refused_arrival(arrival, str(error))
    return Item(number, accepted, value, value.size + ITEM_BYTES)


def refused_arrival(arrival: Arrival | Item, reason: str) -> Item:
    """The item as it is set aside, with all that was put."""
    number, accepted, taken, size, *_ = arrival
    if not isinstance(taken, Taken):
        return Item(number, accepted, refused(taken, reason), size)
    value = refused_input(replace(taken.event, data=orjson.loads(taken.text)), reason)
    return Item(number, accepted, value, 3 * len(taken.text) + ITEM_BYTES)


def _checked(event: MonitorEvent) -> CheckedEvent:
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
    return CheckedEvent(0, head, event_id)


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
    if isinstance(children := plain.get("child_session_ids"), tuple):
        plain["child_session_ids"] = list(children)
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
    if isinstance(record, MonitorEvent):
        kind, given = "event", _fields(record, model.EVENT_WIRE)
    elif isinstance(record, SessionMeta):
        kind, given = "session", _fields(record, model.SESSION_WIRE)
    else:
        kind, given = "update", [record.session_id, _plain(record.fields)]
    words = _InWords()
    told = words.tell(given)
    return Refused(kind, told, reason, words.exact)


def _fields(record: MonitorEvent | SessionMeta, names: Mapping[str, str]) -> Any:
    values = ((wire, getattr(record, name)) for name, wire in names.items())
    fields = {wire: value for wire, value in values if value is not None}
    if isinstance(usage := fields.get("tokenUsage"), TokenUsage):
        fields["tokenUsage"] = {w: getattr(usage, n) for n, w in model.USAGE_WIRE.items()}
    if isinstance(children := fields.get("childSessionIds"), tuple):
        fields["childSessionIds"] = list(children)
    return fields


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


def reread(refused: Refused) -> Value:
    """What `unreadable` was given; raises as `from_body`, ValueError for what is no body at all."""
    return from_body(base64.b64decode(refused.record))


class _InWords:
    """Tells a value in JSON; what JSON does not have in words, and then it is not `exact`."""

    _DEEPEST = 200  # Python's own stack ends at 1,000, its caller's depth included
    _MOST = 100_000  # values; one that contains itself, or another very often, has no end

    def __init__(self) -> None:
        self.exact = True
        self._left = self._MOST

    def tell(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int and abs(value) < 10**400:  # Python itself writes no more than 4,300 digits
            return value
        if kind is float and math.isfinite(value):
            return value
        if depth < self._DEEPEST and self._left > 0:
            if kind is dict:
                return {self._key(key): self.tell(item, depth + 1) for key, item in value.items()}
            if kind is list or kind is tuple:
                self.exact = self.exact and kind is list
                return [self.tell(item, depth + 1) for item in value]
        if isinstance(value, str) and isinstance(value, Enum):
            return str.__str__(value)
        self.exact = False
        if isinstance(value, Sized) and not isinstance(value, str | bytes):
            return f"a {kind.__name__}"  # too deep, or too much; its repr() would be, too
        return model.shown(value)

    def _key(self, key: object) -> str:
        if type(key) is str:
            return key
        self.exact = False
        return model.shown(key)


def plain_refusal(number: int, reason: str) -> Refused:
    """What stands for an item that not even words can be found for."""
    return Refused("record", f"number {number}", reason, exact=False)
