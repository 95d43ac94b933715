"""Sessions and events as text: tables fitted to a width, trees, one-line summaries.

What is stored came from elsewhere: no character of it that could control a terminal, reverse the
direction of text or break a line leaves this module unescaped. Times are UTC.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from itertools import islice
from typing import Any, NamedTuple

from contextuate_persist.model import MonitorEvent, SessionMeta, SessionNode
from contextuate_persist.partitions import Partition

# C0, DEL, C1; invisible and bidirectional format characters; line separators; surrogates; tags.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# No terminal is wider, and a payload may hold megabytes of text.
_LONGEST = 1000
_GAP = 2
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

#: Our own signs, and what output that is not Unicode shows instead, one column each.
SIGNS = "…├└│─"
PLAIN_SIGNS = str.maketrans(SIGNS, "~|`|-")


def safe(text: str) -> str:
    """The text with everything escaped that a terminal would not show as a character."""
    return _UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON in ASCII: harmless to a terminal, the same in every locale.

    Exact, but that two lone surrogates side by side have the escapes of one character.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("\x7f", "\\u007f")


def iso_time(timestamp: int, precision: str = "milliseconds") -> str:
    """A time as ISO 8601 in UTC; the number itself where the calendar ends."""
    try:
        moment = _EPOCH + timedelta(milliseconds=timestamp)
    except OverflowError:
        return str(timestamp)
    return moment.isoformat(timespec=precision).replace("+00:00", "Z")


# --- Tables ---------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column: not narrower than `least`; where that is too wide, `optional` ones are left out."""

    title: str
    least: int
    optional: bool = False
    right: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int) -> Iterator[str]:
    """The lines of a table, its title first, none wider than `width`; nothing for no rows."""
    cells = [[safe(cell[:_LONGEST]) for cell in row] for row in rows]
    if not cells:
        return
    wanted = [
        max(len(column.title), *(_columns(row[i]) for row in cells))
        for i, column in enumerate(columns)
    ]
    least = [min(want, column.least) for want, column in zip(wanted, columns, strict=True)]
    shown = list(range(len(columns)))
    for i in reversed([i for i, column in enumerate(columns) if column.optional]):
        if sum(least[j] + _GAP for j in shown) - _GAP > width:
            shown.remove(i)
    # The last column, the one with the free text, gives way first.
    excess = sum(wanted[i] + _GAP for i in shown) - _GAP - width
    for i in reversed(shown):
        given = max(0, min(excess, wanted[i] - least[i]))
        wanted[i] -= given
        excess -= given
    for row in [[column.title for column in columns], *cells]:
        line = (" " * _GAP).join(_fit(row[i], wanted[i], right=columns[i].right) for i in shown)
        yield cut(line.rstrip(), width)


def cut(text: str, width: int) -> str:
    """The text, or its beginning and an ellipsis, in at most `width` columns."""
    if _columns(text) <= width:
        return text
    kept: list[str] = []
    left = width - 1
    for character in text:
        left -= _columns(character)
        if left < 0:
            break
        kept.append(character)
    return "".join(kept) + "…"


def _fit(text: str, width: int, *, right: bool) -> str:
    text = cut(text, width)
    padding = " " * (width - _columns(text))
    return padding + text if right else text + padding


def _columns(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


# --- Sessions -------------------------------------------------------------------------------------

_SESSION_COLUMNS = (
    Column("SESSION", 36),
    Column("STATUS", 9),
    Column("STARTED", 17),
    Column("TOKENS", 6, optional=True, right=True),
    Column("LENGTH", 6, optional=True, right=True),
    Column("MACHINE", 8, optional=True),
    Column("ABOUT", 32),
)


def session_table(sessions: Iterable[SessionMeta], width: int) -> Iterator[str]:
    """Sessions as a table, in the order given."""
    rows = (
        (
            session.session_id,
            str(session.status.value),
            iso_time(session.start_time, precision="minutes"),
            _tokens(session),
            _length(session),
            session.machine_id,
            _about(session),
        )
        for session in sessions
    )
    return table(_SESSION_COLUMNS, rows, width)


_PARTITION_COLUMNS = (
    Column("PARTITION", 16),
    Column("FROM", 17),
    Column("BEFORE", 17),
    Column("EVENTS", 14, right=True),
    Column("SIZE", 12, right=True),
)


def partition_table(partitions: Iterable[Partition], width: int) -> Iterator[str]:
    """Partitions as a table, in the order given; how many events is an estimate."""
    rows = (
        (
            partition.name,
            "" if partition.start is None else iso_time(partition.start, precision="minutes"),
            "" if partition.end is None else iso_time(partition.end, precision="minutes"),
            f"{partition.rows:,}",
            f"{partition.bytes / 2**20:,.1f} MiB",
        )
        for partition in partitions
    )
    return table(_PARTITION_COLUMNS, rows, width)


def tree_lines(nodes: Sequence[SessionNode], width: int) -> Iterator[str]:
    """Sessions as trees, from nodes in the order of `session_tree`."""
    # From the end: a node is the last of its siblings unless one of its depth was seen below it.
    open_depths: list[bool] = []
    last: list[bool] = []
    for node in reversed(nodes):
        del open_depths[node.depth + 1 :]
        open_depths += [False] * (node.depth + 1 - len(open_depths))
        last.append(not open_depths[node.depth])
        open_depths[node.depth] = True
    rails: list[str] = []
    for node, is_last in zip(nodes, reversed(last), strict=True):
        del rails[max(node.depth - 1, 0) :]
        branch = ("└── " if is_last else "├── ") if node.depth else ""
        indent = "".join(rails) + branch
        if len(indent) > width // 2:
            indent = f"… {node.depth} deep: "
        yield cut(indent + safe(_tree_text(node.session)), width)
        if node.depth:
            rails.append("    " if is_last else "│   ")


def _tree_text(session: SessionMeta) -> str:
    tokens = _tokens(session)
    parts = (
        session.session_id,
        session.status.value,
        _length(session),
        f"{tokens} tokens" if tokens != "0" else "",
        _about(session),
    )
    return "  ".join(part[:_LONGEST] for part in parts if part)


def _about(session: SessionMeta) -> str:
    flags = {"pinned": session.is_pinned, "hidden": session.hidden}
    marks = [name for name, is_set in flags.items() if is_set]
    agent = f"{session.agent_type}: " if session.agent_type else ""
    text = agent + (session.label or _directory(session.working_directory))
    return f"[{', '.join(marks)}] {text}" if marks else text


def _directory(path: str) -> str:
    """A path, of a long one its end: there the names differ."""
    end = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return path if len(path) <= 30 else f"…/{end}"


def _length(session: SessionMeta) -> str:
    if session.end_time is None:
        return ""
    seconds = max(0, session.end_time - session.start_time) // 1000
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def _tokens(session: SessionMeta) -> str:
    count = session.token_usage.total_input + session.token_usage.total_output
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


# --- Events ---------------------------------------------------------------------------------------


def event_table(
    events: Iterable[MonitorEvent], width: int, *, with_session: bool = True
) -> Iterator[str]:
    """Events as a table, in the order given; the session's column can be left out."""
    columns = [
        Column("TIME", 24),
        Column("SESSION", 12),
        Column("EVENT", 13),
        Column("SUMMARY", 24),
    ]
    shown = [0, 1, 2, 3] if with_session else [0, 2, 3]
    rows = (
        (
            iso_time(event.timestamp),
            event.session_id,
            event.event_type,
            event_summary(event),
        )
        for event in events
    )
    return table([columns[i] for i in shown], ([row[i] for i in shown] for row in rows), width)


# What says most about a tool's input, in this order.
_TELLING = ("command", "file_path", "notebook_path", "pattern", "query", "url", "description")
_TEXTS = ("error", "message", "prompt", "text", "content", "thinking")


def event_summary(event: MonitorEvent) -> str:
    """What happened in one short text, not yet escaped: the tool and its input, a message ..."""
    data = event.data
    parts: list[str] = []
    if tool := data.get("toolName"):
        said = _telling(data.get("toolInput")) or _brief(data.get("toolOutput"))
        parts.append(f"{_brief(tool)}: {said}" if said else _brief(tool))
    elif subagent := data.get("subagent"):
        parts.append(_brief(subagent))
    for name in _TEXTS:
        if text := _brief(data.get(name)):
            parts.append(f"error: {text}" if name == "error" else text)
            break
    return (" | ".join(parts) or _brief(data))[:_LONGEST]


def _telling(value: Any) -> str:
    if isinstance(value, dict):
        for name in _TELLING:
            if isinstance(text := value.get(name), str) and text:
                return text[:_LONGEST]
    return _brief(value)


def _brief(value: Any, depth: int = 0) -> str:
    """A value's beginning, whatever its size."""
    if value is None or value in ({}, []):
        return ""
    if isinstance(value, str):
        return value[:_LONGEST]
    if isinstance(value, dict):
        if depth > 1:
            return "{…}"
        items = islice(value.items(), 5)
        text = ", ".join(f"{key[:60]}={_brief(item, depth + 1)}" for key, item in items)
        return text + (", …" if len(value) > 5 else "")
    if isinstance(value, list):
        return _brief(value[0], depth + 1) if len(value) == 1 else f"[{len(value)} items]"
    return json.dumps(value)
