"""What no database took: one file each, with the reason, until somebody has looked at it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from contextuate_persist import payload, queued
from contextuate_persist.aside import Aside
from contextuate_persist.base import BaseStore
from contextuate_persist.errors import InvalidRecord, SpoolError
from contextuate_persist.model import MonitorEvent, SessionMeta, TokenUsage
from contextuate_persist.queued import Refused, Update, Value
from contextuate_persist.records import EventRow
from contextuate_persist.spool import make_directory, sync_directory

_NAME = re.compile(r"(\d{1,16}-[0-9a-f]{12})\.json")


class DeadLetter(NamedTuple):
    """Something that was set aside."""

    id: str
    accepted: int
    """When the writer took it, Unix ms."""
    content: Refused


class DeadLetters:
    """The files of a directory; it is made with the first of them."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.aside = Aside(self.directory, _NAME)

    def open(self) -> None:
        """Remove what a writer that was killed left half-written; only the next writer may."""
        with contextlib.suppress(OSError):
            for path in self.directory.glob("*.tmp"):
                path.unlink(missing_ok=True)
        self.aside.look()

    def add(self, content: Refused, accepted: int, number: int = 0) -> str:
        """Keep a letter, safe on disk; returns its id. Raises OSError.

        The same content with the same number in the queue is the same letter: it may come again
        after a restart, or where the disk has failed.
        """
        make_directory(self.directory)
        text = _told(content, accepted)
        letter_id = f"{accepted}-{hashlib.sha256(b'%d %b' % (number, text)).hexdigest()[:12]}"
        self._write(letter_id, text)
        return letter_id

    def replace(self, letter: DeadLetter) -> None:
        """Keep another content under the letter's id, safe on disk. Raises OSError."""
        self._write(letter.id, _told(letter.content, letter.accepted))

    def _write(self, letter_id: str, text: bytes) -> None:
        path = self.directory / f"{letter_id}.json"
        temporary = path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(text)
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(descriptor)
        is_new = not path.exists()
        temporary.rename(path)
        if is_new:
            self.aside.added(len(text))
        sync_directory(self.directory)

    def ids(self) -> list[str]:
        """The letters' ids, oldest first."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        return sorted(match[1] for name in names if (match := _NAME.fullmatch(name)))

    def read(self, letter_id: str) -> DeadLetter:
        """A letter; raises SpoolError if there is none of this id, or it cannot be read."""
        path = self._path(letter_id)
        try:
            kept = payload.loads_exact(path.read_bytes())
            content = Refused(kept["kind"], kept["record"], kept["reason"], kept["exact"])
            return DeadLetter(letter_id, kept["accepted"], content)
        except FileNotFoundError:
            raise SpoolError(f"{self.directory}: no dead letter {letter_id}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SpoolError(f"{path}: no dead letter can be read there: {error}") from error

    def __iter__(self) -> Iterator[DeadLetter]:
        """All letters, oldest first."""
        return map(self.read, self.ids())

    def remove(self, letter_id: str) -> None:
        """Forget a letter; one that is gone already is no error."""
        self._path(letter_id).unlink(missing_ok=True)

    def _path(self, letter_id: str) -> Path:
        if not _NAME.fullmatch(f"{letter_id}.json"):
            raise SpoolError(f"{self.directory}: no dead letter {letter_id!a}")
        return self.directory / f"{letter_id}.json"


def _told(content: Refused, accepted: int) -> bytes:
    return payload.exact_json({"accepted": accepted, **content._asdict()})


def replay(letter: DeadLetter, store: BaseStore) -> bool:
    """Try to store a letter again; False if it was known already, or its session is deleted.

    Raises InvalidRecord if it is still refused, and what the store raises.
    """
    kind, record, _, exact = letter.content
    if not exact:
        raise InvalidRecord(f"{kind}: was no JSON, and is here only as near as JSON can tell it")
    try:
        if kind == "event":
            return store.save_event(MonitorEvent.from_wire(record))
        if kind == "session":
            return store.save_session(SessionMeta.from_wire(record))
        if kind == "update":
            session_id, fields = record
            if isinstance(usage := fields.get("token_usage"), dict):
                fields = {**fields, "token_usage": TokenUsage(**usage)}
            store.update_session(session_id, **fields)
            return True
        if kind == "record":
            return _replay_value(queued.reread(letter.content), letter, store)
    except SpoolError as error:
        raise InvalidRecord("record: of another version, which this one cannot read") from error
    except (TypeError, AttributeError, ValueError) as error:  # somebody has edited the letter
        raise InvalidRecord(f"{kind}: {error}") from error
    raise InvalidRecord(f"{kind}: of another version, which this one cannot read")


def _replay_value(value: Value, letter: DeadLetter, store: BaseStore) -> bool:
    """What another version has spooled, and this one can read."""
    if isinstance(value, EventRow):
        result = store.save_rows([value])
        if result.refused:
            raise InvalidRecord(result.refused[0].reason)
        return result.stored > 0
    if isinstance(value, SessionMeta):
        return store.save_session(value)
    if isinstance(value, Update):
        store.update_session(value.session_id, **value.fields)
        return True
    return replay(letter._replace(content=value), store)
