"""The load of the benchmark: the same events in each run, shaped like recorded ones.

Recorded payloads of Claude Code hooks: 2.35 kB of JSON on average, half of them below 1.3 kB, one
in ten above 4.9 kB, one in a hundred above 18.7 kB, single ones of 100 kB to 1.2 MB.
"""

from __future__ import annotations

import functools
import math
import random
import uuid
from collections.abc import Iterator
from typing import Any

from contextuate_persist.model import MonitorEvent, SessionMeta, SessionStatus

#: When the first event of a load happens, and how many follow in a second, if nothing else is said.
START = 1_750_000_000_000
EVENTS_PER_SECOND = 400
#: Events of one session, and sessions that run side by side.
SESSION_EVENTS = 1000
CONCURRENT_SESSIONS = 20
TOOLS = ("Bash", "Read", "Edit", "Grep", "Write", "Glob", "TodoWrite", "WebFetch", "Task")

_PAYLOADS = 4000
_HUGE = {1000: 100_000, 3000: 100_000, 3999: 700_000}  # sizes in bytes of some of them
_MEDIAN_BYTES, _SPREAD = 1450, 1.1
# How often a text goes on with so many of its own words: then payloads above 2 kB compress as
# recorded ones do, to 0.40 of their size by lz4, 0.36 by pglz (recorded: 0.38, 0.36).
_AGAIN, _AGAIN_WORDS = 0.1, 12

# What tools print and files hold: words that recur, names that do not, and what SQL and drivers
# stumble over.
_TEXT = (
    "the value of this function is not set when return self None import from def class if else "
    "for in test error warning expected actual line file path const let export async await type "
    "string number default config server client request response status session event payload "
    "data table index query SELECT INSERT INTO WHERE DELIMITER // DROP TABLE events; -- /* */ "
    'it\'s "quoted" C:\\temp \\n %s ? :name $1 {} [] () => ok FAILED passed 100% naïve 日本語 ✓'
)
_WORDS = _TEXT.split()
_TYPES = (
    # of a hundred events
    ("tool_call", "PreToolUse", 42),
    ("tool_result", "PostToolUse", 40),
    ("tool_error", "PostToolUseFailure", 2),
    ("user_prompt", "UserPromptSubmit", 4),
    ("notification", "Notification", 4),
    ("turn_end", "Stop", 4),
    ("session_start", "SessionStart", 1),
    ("subagent_stop", "SubagentStop", 2),
    ("error", "StopFailure", 1),
)


class Load:
    """Events by position: `events(first, count)` is the same in every run and process.

    `delimiter` is what stands for the word DELIMITER, on which mysql-connector's text cursors fail.
    The others say when the events happen and how many a session has, and with the times the ids.
    """

    def __init__(
        self,
        delimiter: str = "DELIMITER",
        *,
        start: int = START,
        events_per_second: float = EVENTS_PER_SECOND,
        session_events: int = SESSION_EVENTS,
    ) -> None:
        self._start = start
        self._events_per_second = events_per_second
        #: Events of the sessions that run side by side; then the next ones begin.
        self.round = session_events * CONCURRENT_SESSIONS
        self._kinds, self._payloads = _content(delimiter)

    def session_of(self, position: int) -> str:
        """Which session the event belongs to: some run side by side, and others follow them."""
        return session_id(self.session_number(position))

    def session_number(self, position: int) -> int:
        """The same by number: sessions are numbered as they follow each other."""
        past, offset = divmod(position, self.round)
        return past * CONCURRENT_SESSIONS + offset % CONCURRENT_SESSIONS

    def time_of(self, position: int) -> int:
        """When the event happens."""
        return self._start + int(position * 1000 / self._events_per_second)

    def sessions(self, first: int, count: int, *, now: int | None = None) -> list[SessionMeta]:
        """The sessions of `events(first, count)`; every tenth is a child of the one before.

        They run on; with a time `now` those have ended whose last event lies before it.
        """
        numbers = sorted(
            {self.session_number(position) for position in range(first, first + count)}
        )
        return [self._session(number, now) for number in numbers]

    def _session(self, number: int, now: int | None) -> SessionMeta:
        past, offset = divmod(number, CONCURRENT_SESSIONS)
        end = self.time_of((past + 1) * self.round - CONCURRENT_SESSIONS + offset)
        over = now is not None and end < now
        return SessionMeta(
            session_id=session_id(number),
            machine_id=f"machine-{number % 5}",
            working_directory=f"/home/dev/project-{number % 40}",
            start_time=self.time_of(past * self.round),
            end_time=end if over else None,
            status=SessionStatus.COMPLETED if over else SessionStatus.ACTIVE,
            parent_session_id=session_id(number - 1) if number % 10 == 9 else None,
            model="claude-opus-4-5",
        )

    def events(self, first: int, count: int) -> list[MonitorEvent]:
        """The events at these positions."""
        return list(self.iter_events(first, count))

    def iter_events(self, first: int, count: int) -> Iterator[MonitorEvent]:
        """The events at these positions, one by one."""
        for position in range(first, first + count):
            number = self.session_number(position)
            slot = (position * 2_654_435_761) % _PAYLOADS
            event_type, hook_type = self._kinds[slot]
            payload = self._payloads[slot]
            if "toolUseId" in payload:
                payload = {
                    **payload,
                    "toolUseId": f"toolu_01{_scrambled(position // 2, 4):032x}"[:30],
                }
            timestamp = self.time_of(position)
            yield MonitorEvent(
                id=event_id(position, timestamp),
                timestamp=timestamp,
                session_id=session_id(number),
                machine_id=f"machine-{number % 5}",
                working_directory=f"/home/dev/project-{number % 40}",
                event_type=event_type,
                hook_type=hook_type,
                data=payload,
            )


def session_id(number: int) -> str:
    """The id of a session, as Claude Code makes them: a random UUID."""
    return str(uuid.UUID(int=_scrambled(number, 1), version=4))


def event_id(position: int, timestamp: int) -> str:
    """The id of an event: a UUID of version 7, which begins with the time."""
    random_part = _scrambled(position, 2) & ((1 << 74) - 1)
    value = timestamp << 80 | 7 << 76 | random_part >> 62 << 64 | 2 << 62
    return str(uuid.UUID(int=value | random_part & ((1 << 62) - 1)))


def random_id(of_event: str) -> str:
    """The id that the original would give an event: a UUID of version 4, with no order."""
    return str(uuid.UUID(int=_scrambled(uuid.UUID(of_event).int, 3), version=4))


def _scrambled(number: int, salt: int) -> int:
    # 128 bits; every position has its own, without a generator that must be run up to it.
    value = (number << 8 | salt) * 0x9E3779B97F4A7C15F39CC0605CEDC835
    value ^= value >> 64
    return value * 0xD1B54A32D192ED03A24BAED4963EE407 % (1 << 128)


@functools.cache  # two seconds of work
def _content(delimiter: str) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The kinds of events and their payloads, which come again and again."""
    words = [delimiter if word == "DELIMITER" else word for word in _WORDS]
    rng = random.Random(20_260_101)  # noqa: S311  (repeatable, not secret)
    kinds = [kind for *kind, weight in _TYPES for _ in range(weight)]
    chosen = [rng.choice(kinds) for _ in range(_PAYLOADS)]
    payloads = [
        _payload(rng, words, chosen[i][0], _HUGE.get(i) or _size(rng)) for i in range(_PAYLOADS)
    ]
    return chosen, payloads


def _size(rng: random.Random) -> int:
    return max(120, round(_MEDIAN_BYTES * math.exp(rng.gauss(0, _SPREAD))))


def _payload(rng: random.Random, words: list[str], event_type: str, size: int) -> dict[str, Any]:
    """A payload of about this size, with the keys that the hooks of Claude Code have."""

    def text(share: float) -> str:
        return _text(rng, words, round(share * (size - 450)))

    common = {
        "transcriptPath": f"/home/dev/.claude/projects/-p-{rng.randrange(40)}/{rng.random()}.jsonl",
        "permissionMode": rng.choice(("default", "acceptEdits", "plan")),
    }
    if not event_type.startswith("tool_"):
        return {"message": text(1), **common, "hook": {"stop_hook_active": False}}
    path = f"/home/dev/project-{rng.randrange(40)}/src/{rng.getrandbits(24):06x}.py"
    tool = rng.choice(TOOLS)
    called: dict[str, Any] = {"toolName": tool, "toolUseId": "", **common}
    hook = {"duration_ms": rng.randrange(10_000)}
    if event_type == "tool_error":
        return {**called, "error": {"message": text(1), "isInterrupt": False}, "hook": hook}
    result = event_type == "tool_result"
    given: dict[str, Any]
    if tool in ("Edit", "Write"):
        given = {"file_path": path, "old_string": text(0.2), "new_string": text(0.2)}
        lines = text(0.6).split("\n")
        patch = [{"oldStart": 1, "oldLines": 6, "newStart": 1, "newLines": 9, "lines": lines}]
        taken: dict[str, Any] = {"filePath": path, "structuredPatch": patch, "userModified": False}
    elif tool == "TodoWrite":
        todos = [
            {"content": line, "status": "pending", "activeForm": line[:30]}
            for line in text(0.5).split("\n")
        ]
        given, taken = {"todos": todos}, {"oldTodos": [], "newTodos": todos}
    elif tool in ("Read", "Grep", "Glob"):
        given = {"file_path": path, "pattern": text(0.02), "limit": 200}
        numbered = {"content": text(0.95), "numLines": 200, "startLine": 1, "totalLines": 900}
        taken = {"type": "text", "file": {"filePath": path, **numbered}}
    else:
        given = {"command": text(0.3 if result else 1), "description": text(0.02)}
        taken = {"stdout": text(0.7), "stderr": "", "interrupted": False, "isImage": False}
    if not result:
        return {**called, "toolInput": given, "hook": hook}
    return {**called, "toolInput": given, "toolOutput": taken, "hook": hook}


def _text(rng: random.Random, words: list[str], size: int) -> str:
    parts: list[str] = []
    left = size
    while left > 0:
        if len(parts) > _AGAIN_WORDS and rng.random() < _AGAIN:
            start = rng.randrange(len(parts) - _AGAIN_WORDS)
            again = parts[start : start + _AGAIN_WORDS]
        else:
            again = [f"{rng.getrandbits(40):x}" if rng.random() < 0.12 else rng.choice(words)]
            if rng.random() < 0.1:
                again.append("\n" + " " * rng.choice((0, 2, 4, 8)))
        parts += again
        left -= len(" ".join(again).encode()) + 1
    return " ".join(parts)
