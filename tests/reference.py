"""A plain Python model of the store interface: what the protocol says, without a database."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from contextuate_persist import (
    Forgotten,
    MessageUsage,
    MonitorEvent,
    SessionMeta,
    SessionStatus,
    TokenUsage,
)
from contextuate_persist.model import MAX_TOKENS, USAGE_COUNTS
from contextuate_persist.subject import Subject

FLAGS = {"is_user_initiated": True, "is_pinned": False, "hidden": False}
LEFT_BY_NONE = (
    "parent_session_id",
    "manual_parent_session_id",
    "agent_type",
    "label",
    "model",
    "transcript_path",
    *FLAGS,
)


@dataclasses.dataclass
class Known:
    """A session and where the store has it from."""

    session: SessionMeta
    source: str  # session, event or reference


class ReferenceStore:
    """The interface on dictionaries; every method follows one paragraph of the protocol."""

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}
        self.events: list[MonitorEvent] = []  # in the order of arrival
        self.deleted: dict[str, int] = {}
        self.ledger: dict[str, tuple[str, MessageUsage]] = {}  # owner and usage of each message

    # --- Events -----------------------------------------------------------------------------------

    def save_event(self, event: MonitorEvent) -> bool:
        # One that tells its session nothing new goes the short way, which makes no reference of a
        # parent that is not there. Only pruning sees it.
        known = self.known.get(event.session_id)
        tells_nothing = known is not None and (
            known.source == "session"
            or (
                known.source == "event"
                and known.session.start_time <= event.timestamp
                and (event.parent_session_id is None or known.session.parent_session_id is not None)
            )
        )
        return bool(self.save_events([event], refer=not tells_nothing))

    def save_events(self, events: list[MonitorEvent], *, refer: bool = True) -> int:
        stored = {event.id for event in self.events}
        first: dict[str, MonitorEvent] = {}
        for event in events:
            first.setdefault(event.id, event)
        batch = [
            event
            for event in first.values()
            if event.id not in stored and event.timestamp > self.deleted.get(event.session_id, 0)
        ]
        for session_id in dict.fromkeys(event.session_id for event in batch):
            own = [event for event in batch if event.session_id == session_id]
            self._learn(session_id, min(own, key=lambda event: event.timestamp))
        for event in sorted(batch, key=lambda event: event.timestamp):
            if refer and event.parent_session_id is not None:
                self._refer(event.parent_session_id, event.timestamp)
        for event in batch:
            known = self.known[event.session_id]
            if known.source != "session" and known.session.parent_session_id is None:
                self._set(known, parent_session_id=event.parent_session_id)
        self.events += batch
        return len(batch)

    def _learn(self, session_id: str, event: MonitorEvent) -> None:
        known = self.known.get(session_id)
        facts: dict[str, Any] = {
            "machine_id": event.machine_id,
            "working_directory": event.working_directory,
            "start_time": event.timestamp,
        }
        if known is None:
            session = SessionMeta(session_id=session_id, **facts, **FLAGS)
            self.known[session_id] = Known(session, "event")
        elif known.source == "reference" or (
            known.source == "event" and event.timestamp < known.session.start_time
        ):
            self._set(known, **facts)
            known.source = "event"

    def _refer(self, session_id: str, start: int) -> None:
        if session_id not in self.known:
            session = SessionMeta(
                session_id=session_id, machine_id="?", working_directory="?", start_time=start,
                **FLAGS,
            )  # fmt: skip
            self.known[session_id] = Known(session, "reference")

    def get_events(self, session_id: str) -> list[MonitorEvent]:
        own = [event for event in self.events if event.session_id == session_id]
        return sorted(own, key=lambda event: event.timestamp)

    def event_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for event in self.events:
            counts[event.event_type] = counts.get(event.event_type, 0) + 1
        return counts

    # --- Sessions ---------------------------------------------------------------------------------

    def save_session(self, given: SessionMeta) -> bool:
        known = self.known.get(given.session_id)
        gone = self.deleted.get(given.session_id, 0) >= given.start_time
        if gone and (known is None or known.source == "reference"):
            return False
        if given.parent_session_id is not None:
            self._refer(given.parent_session_id, given.start_time)
        before = known.session if known else None
        merged = {
            name: getattr(given, name)
            if getattr(given, name) is not None
            else (getattr(before, name) if before else FLAGS.get(name))
            for name in LEFT_BY_NONE
        }
        usage, old = given.token_usage, before.token_usage if before else TokenUsage()
        if before and self._ledger_decides(given.session_id):
            usage = old
        listed = (before.child_session_ids if before else ()) + given.child_session_ids
        session = dataclasses.replace(
            given,
            **merged,
            end_time=None if given.status == SessionStatus.ACTIVE else given.end_time,
            child_session_ids=tuple(dict.fromkeys(listed)),
            token_usage=dataclasses.replace(
                usage,
                **{
                    name: getattr(old, name)
                    for name in ("total_cache_read", "total_cache_creation")
                    if getattr(usage, name) is None
                },
            ),
        )
        self.known[given.session_id] = Known(session, "session")
        return True

    def update_session(self, session_id: str, fields: dict[str, Any]) -> bool:
        known = self.known.get(session_id)
        if known is None or known.source == "reference":
            return False
        if fields.get("parent_session_id") is not None:
            self._refer(fields["parent_session_id"], known.session.start_time)
        if {"machine_id", "working_directory", "start_time", "parent_session_id"} & fields.keys():
            known.source = "session"
        if self._ledger_decides(session_id):
            fields = {name: value for name, value in fields.items() if name != "token_usage"}
        changes = {
            name: FLAGS[name] if value is None and name in FLAGS else value
            for name, value in fields.items()
        }
        self._set(known, **changes)
        return True

    def save_usage(self, session_id: str, usages: list[MessageUsage]) -> int | None:
        known = self.known.get(session_id)
        if known is None or known.source == "reference":
            return None
        before = dict(self.ledger)
        for usage in usages:
            owner, told = self.ledger.get(usage.message_id, (session_id, usage))
            larger = {n: max(getattr(told, n), getattr(usage, n)) for n in USAGE_COUNTS}
            self.ledger[usage.message_id] = (owner, dataclasses.replace(told, **larger))
        for owner in {owner for owner, _ in self.ledger.values()}:
            self._set(self.known[owner], token_usage=self._total(owner))
        return sum(before.get(name) != row for name, row in self.ledger.items())

    def _total(self, session_id: str) -> TokenUsage:
        counts = [usage.counts for owner, usage in self.ledger.values() if owner == session_id]
        total = [min(sum(column), MAX_TOKENS) for column in zip(*counts, strict=True)]
        return TokenUsage(
            total_input=total[0],
            total_output=total[1],
            total_cache_read=total[2],
            total_cache_creation=total[3],
        )

    def _ledger_decides(self, session_id: str) -> bool:
        return any(owner == session_id for owner, _ in self.ledger.values())

    def delete_session(self, session_id: str) -> bool:
        known = self.known.get(session_id)
        if known is None or known.source == "reference":
            return False
        self._remove([session_id])
        for other in self.known.values():
            if other.session.manual_parent_session_id == session_id:
                self._set(other, manual_parent_session_id=None)
        return True

    def delete_all_sessions(self) -> int:
        shown = len(self.get_sessions())
        self._remove(list(self.known))
        return shown

    def _remove(self, ids: list[str]) -> None:
        now = round(time.time() * 1000)
        # A mere reference leaves no trace: whoever lists its id goes on listing it.
        shown = {name for name in ids if self.known[name].source != "reference"}
        for session_id in ids:
            latest = [event.timestamp for event in self.get_events(session_id)][-1:]
            if session_id in shown:
                late = max([now, *(min(t, now + 86_400_000) for t in latest)])
                self.deleted[session_id] = max(late, self.deleted.get(session_id, 0))
            del self.known[session_id]
        self.events = [event for event in self.events if event.session_id not in ids]
        self.ledger = {name: row for name, row in self.ledger.items() if row[0] not in ids}
        for other in self.known.values():
            listed = tuple(c for c in other.session.child_session_ids if c not in shown)
            self._set(other, child_session_ids=listed)
            if other.session.parent_session_id in ids:
                self._set(other, parent_session_id=None)

    def forget(self, **given: str) -> Forgotten:
        subject = Subject.of(*map(given.get, ("session_id", "machine_id", "working_directory")))
        before = len(self.events), len(self.ledger)
        ids = {given["session_id"]} if "session_id" in given else set()
        for name, known in self.known.items():
            place = known.session.machine_id, known.session.working_directory
            if known.source != "reference" and subject.is_at(*place):
                ids.add(name)
        while below := {
            name
            for name, known in self.known.items()
            if known.session.effective_parent_id in ids and name not in ids
        }:
            ids |= below
        known_ids = ids & self.known.keys()
        shown = sum(self.known[name].source != "reference" for name in known_ids)
        paths = {self.known[name].session.transcript_path for name in known_ids} - {None, ""}
        for name in ids:  # those that were only named, or not even that, leave a trace, too
            if name not in self.known:
                self.known[name] = Known(
                    SessionMeta(session_id=name, machine_id="", working_directory="", start_time=0),
                    "session",
                )
            self.known[name].source = "session"
        self._remove(list(ids))
        self.events = [
            dataclasses.replace(event, parent_session_id=None)
            if event.parent_session_id in ids
            else event
            for event in self.events
            if not subject.is_at(event.machine_id, event.working_directory)
        ]
        return Forgotten(
            sessions=shown,
            events=before[0] - len(self.events),
            messages=before[1] - len(self.ledger),
            session_ids=tuple(sorted(known_ids)),
            transcript_paths=tuple(sorted(map(str, paths))),
        )

    def prune_old_sessions(self, older_than: int) -> int:
        trees = self._trees()
        due = [tree for tree in trees if all(self._due(node, older_than) for node in tree)]
        gone = [node for tree in due for node in tree if node in self.known]
        shown = sum(self.known[node].source != "reference" for node in gone)
        self._remove(gone)
        return shown

    def _due(self, session_id: str, older_than: int) -> bool:
        if session_id not in self.known:
            return True
        session = self.known[session_id].session
        latest = [event.timestamp for event in self.get_events(session_id)][-1:]
        last = session.end_time or [session.start_time, *latest][-1]
        return not session.is_pinned and last < older_than

    def _trees(self) -> list[set[str]]:
        trees: list[set[str]] = []
        for session_id, known in self.known.items():
            # Also a parent that is not stored holds its children together.
            linked = {session_id, known.session.effective_parent_id or session_id}
            touching = [tree for tree in trees if tree & linked]
            trees = [tree for tree in trees if not tree & linked]
            trees.append(linked.union(*touching))
        return trees

    def get_sessions(self) -> list[SessionMeta]:
        shown = [
            dataclasses.replace(k.session, child_session_ids=self._children(k.session))
            for k in self.known.values()
            if k.source != "reference"
        ]
        return sorted(shown, key=lambda s: (s.start_time, s.session_id), reverse=True)

    def _children(self, session: SessionMeta) -> tuple[str, ...]:
        own = session.session_id
        linked = [k.session for k in self.known.values() if k.session.effective_parent_id == own]
        linked.sort(key=lambda s: (s.start_time, s.session_id))
        listed = [
            child
            for child in session.child_session_ids
            if (
                self.known[child].session.effective_parent_id in (None, own)
                if child in self.known and self.known[child].source != "reference"
                else child not in self.deleted
            )
        ]
        return tuple(dict.fromkeys([*listed, *(s.session_id for s in linked)]))

    @staticmethod
    def _set(known: Known, **changes: Any) -> None:
        known.session = dataclasses.replace(known.session, **changes)
