"""Token usage from Claude Code's transcripts: files of JSON lines that grow while a session runs.

A message is written as several lines, one for each block of its content, and each repeats the
usage: here a message is told of once, with its largest counts. Whatever else is in such a file,
broken lines included, is passed over.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any, BinaryIO, NamedTuple

from contextuate_persist import model
from contextuate_persist.errors import InvalidRecord
from contextuate_persist.model import MessageUsage
from contextuate_persist.transfer import MAX_LINE_BYTES, parse_json

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_SKIP_BYTES = 2**20


class UsageReading(NamedTuple):
    """What a transcript told, and from where to read on."""

    offset: int
    """Behind the last line that was whole: for the next `read_usage` of this file."""
    usages: list[MessageUsage]
    """The messages in the order of their first lines, each once."""


def read_usage(path: str | os.PathLike[str], offset: int = 0) -> UsageReading:
    """The usage in a transcript from `offset` on; a file that is not there has none.

    A last line without its end is read if it can be, and again the next time: `save_usage` counts
    it once. A file that is shorter than `offset` was written anew and is read from its beginning.
    Only regular files are read, so that a path out of a payload cannot make the caller wait. Raises
    OSError for a file that may not be read.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError:  # NUL, or what no file is called
        return UsageReading(0, [])
    except OSError as error:
        if error.errno in _NOT_THERE:
            return UsageReading(0, [])
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        return UsageReading(0, [])
    with open(descriptor, "rb") as file:
        if not 0 <= offset <= status.st_size:
            offset = 0
        file.seek(offset)
        usages: dict[str, MessageUsage] = {}
        timestamp = min(max(status.st_mtime_ns // 1_000_000, model.MIN_TIMESTAMP), _LATEST)
        for line, end in _lines(file, offset):
            if line.endswith(b"\n"):
                offset = end
            entry = _entry(line)
            timestamp = unix_ms(entry.get("timestamp")) or timestamp
            if usage := _usage(entry, timestamp):
                known = usages.get(usage.message_id)
                usages[usage.message_id] = known.merged(usage) if known else usage
    return UsageReading(offset, list(usages.values()))


_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}


def unix_ms(value: object) -> int | None:
    """A time in ISO 8601 with its offset, as JavaScript writes it, in Unix ms; None for others."""
    if not isinstance(value, str) or not _ISO.fullmatch(value):
        return None
    try:
        # Python 3.10 does not know the Z.
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        timestamp = (moment - _EPOCH) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        return None
    return timestamp if timestamp >= model.MIN_TIMESTAMP else None


_ISO = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.(?:\d{3}|\d{6}))?(?:Z|[+-]\d\d:\d\d)", re.ASCII
)
_LATEST = model.MAX_TIMESTAMP


def _lines(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int]]:
    """Lines with the offset behind each; of one that is too long only its end."""
    while line := file.readline(MAX_LINE_BYTES):
        end += len(line)
        too_long = False
        while not line.endswith(b"\n") and len(line) >= (1 if too_long else MAX_LINE_BYTES):
            too_long = True
            line = file.readline(_SKIP_BYTES)
            end += len(line)
        yield (b"\n" if too_long and line else line), end
        if not line.endswith(b"\n"):
            return  # or the rest of it, written by now, would be taken for a line


def _entry(line: bytes) -> dict[str, Any]:
    # Most lines are about something else, and parsing is what takes the time.
    if b'"usage"' not in line or b'"assistant"' not in line:
        return {}
    try:
        entry = parse_json(line)
    except InvalidRecord:
        return {}
    return entry if isinstance(entry, dict) else {}


def _usage(entry: dict[str, Any], timestamp: int) -> MessageUsage | None:
    message = entry.get("message")
    if entry.get("type") != "assistant" or not isinstance(message, dict):
        return None
    used, name = message.get("usage"), message.get("model")
    if not isinstance(used, dict):
        return None
    made = used.get("cache_creation")
    parts = made.values() if isinstance(made, dict) else ()
    usage = MessageUsage(
        message_id=message.get("id", ""),
        timestamp=timestamp,
        model=name if isinstance(name, str) and len(name) <= model.MAX_SHORT_TEXT_LENGTH else None,
        input_tokens=_count(used.get("input_tokens")),
        output_tokens=_count(used.get("output_tokens")),
        cache_read=_count(used.get("cache_read_input_tokens")),
        cache_creation=_count(used.get("cache_creation_input_tokens")) or sum(map(_count, parts)),
    )
    try:
        model.check_message_usage(usage)
    except InvalidRecord:
        return None
    return usage if any(usage.counts) else None  # one made up by the client has none


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value <= model.MAX_TOKENS else 0
