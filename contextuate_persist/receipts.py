"""What a writer tells: how far one thing has come, and how it is doing itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from contextuate_persist.outbox import Milestone, Outbox


class Receipt:
    """What a writer gives for what it was given: tells how far that has come.

    It comes to two milestones, in this order: *safe*, on the disk of this machine or in the
    database already, and *stored*, done with by the database: committed there, or known there
    before, or refused for good and set aside (`refusal` then says why). What is set aside while no
    disk takes its dead letter has come to neither.
    """

    __slots__ = ("_outbox", "number")

    def __init__(self, outbox: Outbox, number: int) -> None:
        self._outbox = outbox
        self.number = number

    def __repr__(self) -> str:
        state = "stored" if self.stored else "safe" if self.safe else "taken"
        return f"<Receipt {self.number}: {state}>"

    @property
    def safe(self) -> bool:
        """Whether it survives whatever happens to this process and to the power."""
        return self._outbox.safe.passed(self.number)

    @property
    def stored(self) -> bool:
        """Whether the database is done with it."""
        return self._outbox.done.passed(self.number)

    @property
    def refusal(self) -> str | None:
        """Why it was set aside; None if it was not (of the last 10,000 that were)."""
        return self._outbox.reason(self.number)

    def wait_safe(self, timeout: float | None = None) -> bool:
        """Wait, at most so many seconds, until it is safe; whether it is."""
        return self._wait(self._outbox.safe, timeout)

    def wait_stored(self, timeout: float | None = None) -> bool:
        """Wait, at most so many seconds, until it is stored; whether it is.

        False at once if the writer is closed before that.
        """
        return self._wait(self._outbox.done, timeout)

    def on_safe(self, callback: Callable[[Receipt], object]) -> None:
        """Call back, once, when it is safe, or the writer is closed before that.

        In a thread of the writer's, which waits meanwhile, or at once in this one. An exception is
        logged.
        """
        self._outbox.notify(self._outbox.safe, self.number, lambda: callback(self))

    def on_stored(self, callback: Callable[[Receipt], object]) -> None:
        """Call back, once, when it is stored, or the writer is closed before that: see `stored`."""
        self._outbox.notify(self._outbox.done, self.number, lambda: callback(self))

    def _wait(self, milestone: Milestone, timeout: float | None) -> bool:
        if not milestone.passed(self.number):
            passed = threading.Event()
            token = self._outbox.notify(milestone, self.number, passed.set)
            try:
                passed.wait(timeout)
            finally:
                self._outbox.forget(milestone, token)
        return milestone.passed(self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterHealth:
    """How a writer is doing; `accepted` = `stored` + `duplicate` + `set_aside` + `pending`, always.

    Counted from `init()` on, with what lay in the spool then as accepted.
    """

    accepted: int
    stored: int
    """New in the database."""
    duplicate: int
    """Known there before, or told of a deleted session, and ignored."""
    set_aside: int
    """Refused for good: dead letters, and records of the spool that could not be read."""
    pending: int
    memory_bytes: int
    """Of what is pending, roughly."""
    spool_bytes: int
    """On disk; a file goes when all in it is done with."""
    oldest_seconds: float | None
    """Age of the oldest pending item that is in memory; None if none is."""
    retries: int
    """Tries that failed since `init()`."""
    failing_seconds: float | None
    """How long the database has been away; None while it is not."""
    last_error: str | None
    """Of the database or of the spool, also when that is over."""
    dead_letters: int
    aside_bytes: int
    """On disk besides, until somebody removes it: dead letters, and what could not be read."""
    damages: tuple[str, ...]
    """What of the spool could not be read; its bytes lie beside it, in `damaged`.

    A whole file there that can be read again, moved to a directory of its own, is stored by
    `contextuate-persist spool replay --directory`.
    """
