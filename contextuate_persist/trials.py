"""Whether a refusal is about one item or about everything: would the database take others now?

What is tried is undone, so no order changes and nobody sees it.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from typing import TypeAlias

from contextuate_persist import records
from contextuate_persist.base import BaseStore, trial_session
from contextuate_persist.errors import InvalidRecord, PersistenceError, StoreUnavailable
from contextuate_persist.model import SessionMeta
from contextuate_persist.outbox import Outbox
from contextuate_persist.payload import Encoded
from contextuate_persist.queued import Update, Value
from contextuate_persist.records import CheckedEvent, EventHead, EventRow

log = logging.getLogger(__name__)

#: What is tried before it is believed that the database refuses all.
_SESSIONS, _MACHINES, _WAITING = 10, 5, 1000

#: An event or a session to save, and columns of the session to set then.
Trial: TypeAlias = tuple[EventRow | SessionMeta, tuple[str, ...]]


class Trials:
    """Tries of one sender's, on its store."""

    def __init__(self, store: BaseStore, outbox: Outbox) -> None:
        self._store = store
        self._outbox = outbox
        self._stored: dict[type, EventRow | SessionMeta] = {}

    def stored(self, value: Value) -> None:
        """This was taken a moment ago: something like it may be again."""
        if isinstance(value, EventRow | SessionMeta):
            self._stored[type(value)] = value

    def fails_alone(self, value: Value) -> bool:
        """Whether it is not even taken where nothing is committed.

        Else it failed at its commit, as everything would: what is tried here commits nothing. A
        server that finds no room for its log waits there, and takes all else.
        """
        try:
            if isinstance(value, Update):
                self._store.try_updating(value.session_id, **value.fields)
            elif isinstance(value, EventRow | SessionMeta):
                self._store.try_writing(value)
        except InvalidRecord:
            return True
        except PersistenceError as error:
            return error.perhaps_one
        return False

    def others_pass(self, value: Value, error: Exception) -> bool:
        """Whether the database takes something of the same kind, while it does not take this.

        Raises nothing: where even that is not certain, the item is not to blame.
        """
        for record, columns in self._candidates(value, error):
            if self._outbox.over:
                return False
            try:
                if self._store.try_writing(record, columns):
                    return True
            except InvalidRecord:
                continue
            except PersistenceError as other:
                if isinstance(other, StoreUnavailable) or not other.perhaps_one:
                    return False
            except (OSError, MemoryError):
                return False
            except Exception:  # a defect of ours, as the item's may be
                log.debug("a trial met a defect", exc_info=True)
        return False

    def _candidates(self, value: Value, error: Exception) -> Iterator[Trial]:
        waiting = [item.value for item in self._outbox.waiting(_WAITING)]
        # What is lost or takes too long may be so for its size: only what is as large tells more.
        if not isinstance(error, StoreUnavailable):
            if stored := self._stored.get(type(value)):
                yield _again(stored), ()
            yield from _neighbours(value, waiting)
        machines = dict.fromkeys(map(_machine, [value, *waiting]))
        for machine in [machine for machine in machines if machine][:_MACHINES] or ["unknown"]:
            yield _alike(value, machine)


def _neighbours(value: Value, waiting: list[Value]) -> Iterator[Trial]:
    """What waits of the same kind, one of each session; of an item's own session the last."""
    found: dict[str, EventRow | SessionMeta] = {}
    own = ""
    if isinstance(value, EventRow | SessionMeta):
        own = _session(value)
        for other in waiting:
            if type(other) is type(value) and other is not value:
                assert isinstance(other, EventRow | SessionMeta)  # noqa: S101  (as the value is)
                found.setdefault(_session(other), other)
    same = found.pop(own, None)
    for other in [*[*found.values()][:_SESSIONS], *([same] if same else [])]:
        yield _again(other), ()


def _again(value: EventRow | SessionMeta) -> EventRow | SessionMeta:
    """The same for the database, but not known there: an event is, by its id."""
    return value._replace(id=str(uuid.uuid4())) if isinstance(value, EventRow) else value


def _alike(value: Value, machine_id: str) -> Trial:
    """Something of that kind and size which nobody has sent, of a session that is not there."""
    session = trial_session(machine_id)
    if isinstance(value, EventRow):
        head = value.event
        made = EventHead(
            str(uuid.uuid4()),
            head.timestamp,
            session.session_id,
            f"{session.session_id}-parent" if head.parent_session_id else None,
            machine_id,
            "/",
            head.event_type,
            head.hook_type,
        )
        filler = b'{"trial": "' + b"x" * (len(value.data) + len(value.exact or b"")) + b'"}'
        checked = CheckedEvent(0, made, made.id)
        return records.encoded_row(checked, Encoded(filler, None), value.tool_name, None), ()
    if isinstance(value, Update):
        return session, tuple(records.update_parameters(value.fields))
    return session, ()


def _session(value: EventRow | SessionMeta) -> str:
    return value.event.session_id if isinstance(value, EventRow) else value.session_id


def _machine(value: Value) -> str | None:
    if isinstance(value, EventRow):
        return value.event.machine_id
    return value.machine_id if isinstance(value, SessionMeta) else None
