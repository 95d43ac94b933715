"""What hook events tell about their sessions: how they end, fail and re-open, and what they are.

Sessions themselves are made by saving their events. What is here goes beyond that, as plain values:

    state |= SessionState.of(event)
    store.update_session(event.session_id, **state.updates(session))

Hooks are delivered late, twice and out of order: a state is the same whatever the order, since it
keeps, of everything, what the newest event told. So the newest events of a session in a store tell
a process that has just started what it needs to know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from contextuate_persist import model
from contextuate_persist.model import MonitorEvent, SessionMeta, SessionStatus

if TYPE_CHECKING:
    from contextuate_persist.protocol import SessionFields

T = TypeVar("T", int, str)
#: A text and when it was told.
Told = tuple[int, str]

# Of events of one millisecond that which ends more decides.
_RANKS = (SessionStatus.ACTIVE, SessionStatus.ERROR, SessionStatus.COMPLETED)
# They happen around a session without it going on: what failed has not recovered by them.
_PASSIVE = frozenset(
    {
        "ConfigChange",
        "CwdChanged",
        "DirectoryAdded",
        "FileChanged",
        "InstructionsLoaded",
        "Notification",
    }
)
# After them the transcript holds usage that it did not hold before.
_TURN_ENDS = frozenset({"Stop", "StopFailure", "SessionEnd", "PreCompact"})
_MOST_TITLES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """What hooks have told about one session."""

    decided: tuple[int, int] | None = None
    """When the newest event came that decides the status, and the status as its rank."""
    noticed_at: int = 0
    """When the newest event came that only tells that the session is not over."""
    parent: Told | None = None
    model: Told | None = None
    agent_type: Told | None = None
    transcript_path: Told | None = None
    titles: frozenset[Told] = frozenset()
    """The newest titles, each with when it was told last."""

    @classmethod
    def of(cls, *events: MonitorEvent) -> SessionState:
        """What these events, of one session, tell about it."""
        state = cls()
        for event in events:
            state |= _told(event)
        return state

    def __or__(self, other: SessionState) -> SessionState:
        """What both tell."""
        return SessionState(
            decided=_newest((self.decided, other.decided)),
            noticed_at=max(self.noticed_at, other.noticed_at),
            parent=_newest((self.parent, other.parent)),
            model=_newest((self.model, other.model)),
            agent_type=_newest((self.agent_type, other.agent_type)),
            transcript_path=_newest((self.transcript_path, other.transcript_path)),
            titles=_latest(self.titles | other.titles),
        )

    @property
    def status(self) -> SessionStatus | None:
        """The session's status; None if no event has told."""
        if self.decided is None:
            return SessionStatus.ACTIVE if self.noticed_at else None
        status = _RANKS[self.decided[1]]
        reopened = status is SessionStatus.COMPLETED and self.noticed_at > self.decided[0]
        return SessionStatus.ACTIVE if reopened else status

    @property
    def end_time(self) -> int | None:
        """When the session ended; None while it goes on."""
        if self.status is SessionStatus.COMPLETED and self.decided is not None:
            return self.decided[0]
        return None

    def updates(self, known: SessionMeta) -> SessionFields:
        """What `update_session` has to set in the stored session; nothing if it knows it all.

        The newest title becomes the label of a session that has none or an earlier title: a label
        that a person gave stays.
        """
        fields: SessionFields = {}
        if (status := self.status) and (known.status, known.end_time) != (status, self.end_time):
            fields["status"], fields["end_time"] = status, self.end_time
        if self.parent:
            if known.is_user_initiated is not False:
                fields["is_user_initiated"] = False
            # Its events do not link a session that somebody has saved.
            if known.parent_session_id is None:
                fields["parent_session_id"] = self.parent[1]
        if self.model and known.model != self.model[1]:
            fields["model"] = self.model[1]
        if self.agent_type and known.agent_type != self.agent_type[1]:
            fields["agent_type"] = self.agent_type[1]
        if self.transcript_path and known.transcript_path != self.transcript_path[1]:
            fields["transcript_path"] = self.transcript_path[1]
        if title := _newest(self.titles):
            theirs = known.label is None or known.label in {text for _, text in self.titles}
            if theirs and known.label != title[1]:
                fields["label"] = title[1]
        return fields


def usage_path(event: MonitorEvent) -> str | None:
    """The transcript whose usage this event makes worth reading; None for most events.

    Its messages belong to the event's session.
    """
    own = event.hook_type in _TURN_ENDS and "agentId" not in event.data
    path = event.data.get("transcriptPath")
    return path if (own or event.hook_type == "SubagentStop") and _fits(path) else None


def _told(event: MonitorEvent) -> SessionState:
    data, when = event.data, event.timestamp
    is_agents = "agentId" in data
    passive = event.hook_type in _PASSIVE
    subagent = data.get("subagent")
    agent_type = data.get("agentType")
    if is_agents and isinstance(subagent, dict):
        agent_type = subagent.get("type")
    language_model = data.get("toModel" if event.hook_type == "PostModelSwitch" else "model")
    path = data.get("transcriptPath")
    # Within a sub-agent the path is its parent's, but where it ends.
    own_path = event.hook_type == "SubagentStop" or not is_agents
    title = data.get("sessionTitle")
    return SessionState(
        decided=None if passive else (when, _RANKS.index(_status(event))),
        noticed_at=when if passive else 0,
        parent=_text(when, event.parent_session_id),
        model=_text(when, language_model, model.MAX_SHORT_TEXT_LENGTH),
        agent_type=_text(when, agent_type, model.MAX_SHORT_TEXT_LENGTH),
        transcript_path=_text(when, path) if own_path else None,
        titles=frozenset({told} if (told := _text(when, title)) else ()),
    )


def _status(event: MonitorEvent) -> SessionStatus:
    # Old versions name no agent at its end: then it is not told whose session is over.
    over = event.hook_type == "SubagentStop" and "agentId" in event.data
    if over or event.hook_type == "SessionEnd":
        return SessionStatus.COMPLETED
    if event.hook_type == "StopFailure":
        return SessionStatus.ERROR
    return SessionStatus.ACTIVE


def _text(when: int, value: object, limit: int = model.MAX_TEXT_LENGTH) -> Told | None:
    return (when, value) if _fits(value, limit) and isinstance(value, str) else None


def _fits(value: object, limit: int = model.MAX_TEXT_LENGTH) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit


def _latest(told: Iterable[Told]) -> frozenset[Told]:
    # By text first: one that comes with every prompt must not push the others out.
    last = {text: when for when, text in sorted(told)}
    return frozenset(sorted((when, text) for text, when in last.items())[-_MOST_TITLES:])


def _newest(told: Iterable[tuple[int, T] | None]) -> tuple[int, T] | None:
    return max((one for one in told if one is not None), default=None)
