"""The inbox: a directory in which programs of any kind leave one file for each thing to keep.

Whoever leaves something writes it under a name that begins with a dot, flushes it and renames it:
so a file that can be seen is whole. Whoever takes it removes it once it is safe elsewhere: so after
a crash it is there again, and its contents must bear their own id.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import logging
import os
import re
import secrets
import stat
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from contextuate_persist.config import home_path
from contextuate_persist.errors import ConfigurationError, SpoolError
from contextuate_persist.spool import make_directory, sync_directory

log = logging.getLogger(__name__)

#: A larger file is set aside unread: base64 of the largest payload, and what is around it, is less.
MAX_FILE_BYTES = 64 * 2**20

ENVIRONMENT_INBOX = "CONTEXTUATE_INBOX"
_INBOX = "~/.contextuate/monitor/inbox"
_LOCK = ".lock"
_BAD = "bad"
_WHY = ".why"
# What was begun and lies unchanged for so long, its writer was killed. The taking side counts by a
# clock that stands still while the machine sleeps: a writer that slept with it goes on.
_UNFINISHED = 3600  # seconds
_BEGUN = re.compile(r"\.\d{20}-[0-9a-f]{32}\.json")
# A link, a socket, a directory, somebody else's. Any other error may pass: too many open files, a
# network's disk.
_LASTING = frozenset({errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EACCES})


def default_inbox() -> Path:
    """The inbox of this user: what CONTEXTUATE_INBOX names, else one in the home directory."""
    return home_path(os.environ.get(ENVIRONMENT_INBOX) or _INBOX)


def leave(directory: str | Path, body: bytes) -> str:
    """Leave a file in an inbox, on disk when this returns; its name.

    Raises OSError; it may then be there nevertheless, where only its name could not be flushed.
    """
    place = Path(directory)
    make_directory(place)
    name = f"{time.time_ns():020d}-{secrets.token_hex(16)}.json"
    hidden = place / f".{name}"
    descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        hidden.rename(place / name)
    except BaseException:
        with contextlib.suppress(OSError):
            hidden.unlink()
        raise
    sync_directory(place)
    return name


_inboxes: weakref.WeakSet[Inbox] = weakref.WeakSet()


class Inbox:
    """The taking side of an inbox: one process at a time, files in the order of their names."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(os.path.abspath(directory))  # wherever the process goes later
        self._locking: int | None = None
        self._taken: set[str] = set()
        self._waiting: set[str] = set()  # of which that was told
        self._unclear: dict[str, str] = {}  # to be set aside, and why
        self._begun: dict[str, tuple[float, tuple[int, int]]] = {}
        _inboxes.add(self)

    def open(self) -> None:
        """Take the inbox for this process; makes the directory.

        Raises ConfigurationError while another process has it, SpoolError if it cannot be used.
        """
        try:
            make_directory(self.directory)
            self._locking = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._locking, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigurationError(
                f"inbox: another process takes what comes to {self.directory}: stop it, or take "
                "another directory"
            ) from None
        except OSError as error:
            self.close()
            raise SpoolError(f"{self.directory}: {error.strerror or error}") from error

    def close(self) -> None:
        """Let go of the inbox. A second call does nothing."""
        if self._locking is not None:
            # In so many words: a child that is just being forked may have the file open, too.
            fcntl.flock(self._locking, fcntl.LOCK_UN)
        self._let_go()

    def _let_go(self) -> None:
        if self._locking is not None:
            os.close(self._locking)
            self._locking = None
        self._taken, self._waiting, self._unclear, self._begun = set(), set(), {}, {}

    def __enter__(self) -> Inbox:  # noqa: PYI034  (Self needs Python 3.11)
        """Call `open()`."""
        self.open()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Call `close()`."""
        self.close()

    def take(self, limit: int = 1000) -> Iterator[tuple[str, bytes]]:
        """The oldest files that are not taken yet, with their names; what is no such file goes.

        Each stays until `done` or `set_aside`, or comes again after `give_back`. What cannot be
        read just now is for a later look.
        """
        for name, reason in [*self._unclear.items()]:
            self.set_aside(name, reason)
        found = os.listdir(self.directory)
        self._remove_left([name for name in found if _BEGUN.fullmatch(name)])
        # Of the many that an outage has left, no more are put in order than are taken now.
        new = [name for name in found if self._is_new(name)]
        heapq.heapify(new)
        while new and limit:
            name = heapq.heappop(new)
            try:
                body = _read(self.directory / name)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno not in _LASTING:
                    self._tell_waiting(name, error)
                else:
                    self.set_aside(name, str(error))
                continue
            limit -= 1
            self._waiting.discard(name)
            self._taken.add(name)
            yield name, body

    def _tell_waiting(self, name: str, error: OSError) -> None:
        """Once: it is looked at many times a second."""
        if name not in self._waiting:
            self._waiting.add(name)
            log.warning("inbox %s: %s waits: %s", self.directory, ascii(name), error)

    def _remove_left(self, names: list[str]) -> None:
        """Remove what nobody has finished, or gone on with, since it was seen long ago."""
        now = time.monotonic()
        before, self._begun = self._begun, {}
        for name in names:
            since, state = before.get(name, (now, (-1, -1)))
            if name not in before or now - since > _UNFINISHED:
                with contextlib.suppress(OSError):  # finished meanwhile
                    found = (self.directory / name).lstat()
                    if state == (found.st_size, found.st_mtime_ns):
                        log.info("inbox %s: %s was never finished", self.directory, name)
                        (self.directory / name).unlink()
                        continue
                    since, state = now, (found.st_size, found.st_mtime_ns)
            self._begun[name] = since, state

    def _is_new(self, name: str) -> bool:
        return not name.startswith(".") and name != _BAD and name not in self._taken

    def done(self, name: str) -> None:
        """What was in this file is safe elsewhere: remove it."""
        with contextlib.suppress(FileNotFoundError):
            (self.directory / name).unlink()
        self._taken.discard(name)

    def give_back(self, name: str) -> None:
        """What was in this file is not safe yet: let it be taken again."""
        self._taken.discard(name)

    def set_aside(self, name: str, reason: str) -> None:
        """Nobody can make anything of this file: move it to `bad`, beside a note that says why.

        Where it cannot be moved, each later `take` tries that again.
        """
        bad = self.directory / _BAD
        try:
            bad.mkdir(mode=0o700, exist_ok=True)
            (self.directory / name).rename(bad / name)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._tell_waiting(name, error)
            self._taken.add(name)
            self._unclear[name] = reason
            return
        else:
            log.warning("inbox %s: %s is set aside: %s", self.directory, ascii(name), reason)
            with contextlib.suppress(OSError):  # a full disk; the log has the reason, too
                note = bad / f"{name}{_WHY}"
                note.write_text(reason + "\n", encoding="utf-8", errors="replace")
        self._taken.discard(name)
        self._unclear.pop(name, None)


def all_files(directory: str | Path, *, begun: bool = False) -> Iterator[tuple[Path, bytes | None]]:
    """Every file of an inbox with its content, None if that cannot be read; takes nothing.

    Also those that were set aside, and those that nobody has finished within an hour; with `begun`
    only those that somebody may still be writing.
    """
    place = Path(directory)
    for folder in (place, place / _BAD):
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            continue
        for name in names:
            path = folder / name
            is_note = folder != place and name.endswith(_WHY)
            if is_note or path in (place / _BAD, place / _LOCK):
                continue
            try:
                young = time.time() - path.lstat().st_mtime < _UNFINISHED
                if (young and name.startswith(".")) is begun:
                    yield path, _read(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                yield path, None


def counts(directory: str | Path) -> tuple[int, int]:
    """How many files wait in an inbox, and how many were set aside; takes nothing."""

    def files(folder: Path) -> int:
        names = os.listdir(folder) if folder.is_dir() else []
        return sum(not (one.startswith(".") or one.endswith(_WHY) or one == _BAD) for one in names)

    place = Path(directory)
    return files(place), files(place / _BAD)


def remove_file(path: Path) -> None:
    """Remove a file of an inbox, and the note beside one that was set aside."""
    path.with_name(path.name + _WHY).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    # Neither a link to somebody else's file nor a pipe that never ends.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no file")
        if found.st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has {found.st_size:,} bytes, at most {MAX_FILE_BYTES:,} fit")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _after_fork() -> None:  # pragma: no cover  (in a forked child)
    for inbox in _inboxes:
        inbox._let_go()  # noqa: SLF001  (the lock stays the parent's)


os.register_at_fork(after_in_child=_after_fork)
