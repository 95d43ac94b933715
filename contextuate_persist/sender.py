"""The sender of a writer: stores what its queue holds, again and again until it is stored."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from contextuate_persist import queued
from contextuate_persist.base import BaseStore
from contextuate_persist.dead_letters import DeadLetters
from contextuate_persist.errors import (
    InvalidRecord,
    PersistenceError,
    SessionNotFound,
    StoreUnavailable,
)
from contextuate_persist.model import SessionMeta
from contextuate_persist.outbox import Outbox
from contextuate_persist.queued import Item, Refused, Update
from contextuate_persist.records import EventRow
from contextuate_persist.trials import Trials

log = logging.getLogger(__name__)

#: Between tries while the database is away; the first ones come sooner.
LONGEST_PAUSE = 5.0
_FIRST_PAUSE = 0.05
_LETTER_SECONDS = 1.0  # between tries to write dead letters to a disk that is full
# Of one item, each after it has failed: others pass their trial.
_STRIKES = 3  # for what may be a defect of ours
_TRIALS = 2


class BatchLimits(NamedTuple):
    """When a batch goes: whichever of the three comes first."""

    rows: int
    size: int  # bytes
    linger: float  # seconds


class Sender:
    """Stores the items of one outbox, in their order; `run` is its thread's."""

    def __init__(
        self, store: BaseStore, outbox: Outbox, dead_letters: DeadLetters, limits: BatchLimits
    ) -> None:
        self.retries = 0
        self.failing_since: float | None = None
        self.last_error: str | None = None
        self._store = store
        self._outbox = outbox
        self._dead_letters = dead_letters
        self._limits = limits
        self._trials = Trials(store, outbox)
        self._slice = limits.rows
        self._at_letters = threading.Lock()
        self._letters_at = 0.0  # when their disk is tried again; it is full until then

    def run(self) -> None:
        """Store the items in their order, until all is over."""
        if not self._persist(self._open_store):
            return
        while not self._outbox.over:
            if time.monotonic() >= self._letters_at:
                self.write_letters()
            if self._outbox.too_many_letters:  # memory is bounded, also for what is refused
                self._outbox.not_sent()
                self._outbox.pause(_LETTER_SECONDS)
                continue
            if items := self._next():
                delivery = _Delivery(items)
                while delivery.runs:
                    if not self._persist(lambda: self._deliver(delivery)):  # noqa: B023
                        return
                self._outbox.settle(items, delivery.counts, delivery.reasons, delivery.letters)

    def _next(self) -> list[Item]:
        """What to store next; nothing at the end, or when it is time for letters again."""
        failures = 0
        while True:
            patience = _LETTER_SECONDS if self._outbox.letters else None
            try:
                return self._outbox.next_to_send(*self._limits, patience)
            except OSError as error:  # the spool cannot be read just now
                failures += 1
                self.last_error = f"spool: {error}"
                log.warning("spool cannot be read: %s", error)
                self._outbox.pause(pause_after(failures))

    def write_letters(self) -> None:
        """Write what a full disk has not taken before, as far as it goes."""
        # Whoever closes the writer comes, too, while a slow disk may still hold this thread.
        if not self._at_letters.acquire(blocking=False):
            return
        try:
            # The smallest first: where it finds no room, none does.
            for letter in sorted(self._outbox.letters, key=lambda letter: letter.size):
                if not self._write_letter(letter):
                    break
                self._outbox.letter_written(letter)
        finally:
            self._at_letters.release()

    def _write_letter(self, letter: Item) -> bool:
        assert isinstance(letter.value, Refused)  # noqa: S101  (that is what letters are)
        try:
            self._dead_letters.add(letter.value, letter.accepted, letter.number)
        except OSError as error:
            self.last_error = f"{self._dead_letters.directory}: {error.strerror or error}"
            if not self._letters_at:  # once, not for each of them
                log.warning("dead letter %s", self.last_error)
            self._letters_at = time.monotonic() + _LETTER_SECONDS
            return False
        self._letters_at = 0.0
        return True

    def _open_store(self) -> None:
        self._store.init()

    def _persist(self, work: Callable[[], object]) -> bool:
        """Do some work, again and again while the database is away; False if there is no time."""
        failures = 0
        while not self._outbox.over:
            try:
                work()
            except (PersistenceError, OSError, MemoryError) as error:
                failures += 1
                self._failed(error)
                self._outbox.pause(pause_after(failures))
            else:
                if failures:
                    log.info("the database is back after %d tries", failures)
                self.failing_since = None
                return True
        return False

    def _failed(self, error: Exception) -> None:
        self.retries += 1
        self.last_error = f"{type(error).__name__}: {error}"
        if self.failing_since is None:
            self.failing_since = time.monotonic()
            log.warning("storing failed, trying again: %s", error)
        # A batch may be what takes too long: smaller ones get through where it does not.
        self._slice = max(1, self._slice // 2)
        self._outbox.not_sent()

    def _deliver(self, delivery: _Delivery) -> None:
        """Store the first run of what is left, or some of it."""
        run = delivery.runs[0]
        # One by one, what counts each time that it is done.
        part = run[: self._slice if isinstance(run[0].value, EventRow | SessionMeta) else 1]
        try:
            self._store_part(part, delivery)
        except InvalidRecord as error:
            self._isolate(part, delivery, str(error))
        except PersistenceError as error:
            if not error.perhaps_one:
                raise
            self._outbox.not_sent()  # before what may take a while
            value = part[0].value
            innocent = len(part) == 1 and not self._trials.fails_alone(value)
            if innocent or not self._trials.others_pass(value, error):
                delivery.strikes = 0
                raise
            self._suspect(part, delivery, error)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a defect of ours, which one item brings to light, perhaps
            log.exception("an item that cannot be stored")
            reason = f"{type(error).__name__}: {error}"
            if len(part) == 1:
                self._outbox.not_sent()  # before what may take a while
                passing = self._trials.others_pass(part[0].value, error)
                delivery.strikes = delivery.strikes + 1 if passing else 0
                if delivery.strikes < _STRIKES:
                    raise StoreUnavailable(reason) from error
            self._isolate(part, delivery, reason)
        else:
            delivery.done(len(part))
            delivery.strikes = 0
            self._slice = min(self._limits.rows, self._slice * 2)

    def _suspect(self, part: list[Item], delivery: _Delivery, error: PersistenceError) -> None:
        """Others of that kind pass at the moment: it is something in this part, then.

        What is alone fails and fails a trial, and others pass theirs, twice in a row, before it is
        to blame: a server that has just come to its senses, or is about to lose them, blames none.
        """
        self.retries += 1
        self.last_error = f"{type(error).__name__}: {error}"
        if len(part) == 1:
            delivery.strikes += 1
            if delivery.strikes < _TRIALS:
                return
            log.warning("set aside, since others pass: %s", error)
        self._isolate(part, delivery, str(error))

    def _isolate(self, part: list[Item], delivery: _Delivery, reason: str) -> None:
        """Come nearer to the item that is to blame; alone, it is set aside."""
        if len(part) > 1:
            self._slice = len(part) // 2
            return
        delivery.strikes = 0
        item = part[0]
        if isinstance(item.value, Refused):  # not even that can be written as it is
            item = item._replace(value=queued.plain_refusal(item.number, item.value.reason))
            delivery.letters.append(item)
            delivery.counts["set_aside"] += 1
        else:
            delivery.set_aside(item, reason)
        delivery.done(1)

    def _store_part(self, part: list[Item], delivery: _Delivery) -> None:
        values: list[Any] = [item.value for item in part]
        first = values[0]
        if isinstance(first, EventRow):
            result = self._store.save_rows(values)
            for refusal in result.refused:
                delivery.set_aside(part[refusal.index], refusal.reason)
            if not result.refused:
                self._trials.stored(values[-1])
            delivery.count(len(part) - len(result.refused), stored=result.stored)
        elif isinstance(first, SessionMeta):
            delivery.count(len(part), stored=self._store.save_sessions(values))
            self._trials.stored(values[-1])
        elif isinstance(first, Update):
            delivery.count(1, stored=self._update(first))
        else:
            if not self._write_letter(part[0]):
                delivery.letters.append(part[0])
            delivery.counts["set_aside"] += 1
            delivery.reasons[part[0].number] = first.reason

    def _update(self, update: Update) -> bool:
        try:
            self._store.update_session(update.session_id, **update.fields)
        except SessionNotFound:
            return False
        return True


class _Delivery:
    """A batch on its way: what of it is left, and how it went so far."""

    def __init__(self, items: list[Item]) -> None:
        self.runs = queued.waves(items)
        self.counts: Counter[str] = Counter()
        self.reasons: dict[int, str] = {}
        self.letters: list[Item] = []
        self.strikes = 0

    def done(self, count: int) -> None:
        """So many of the first run are."""
        del self.runs[0][:count]
        if not self.runs[0]:
            del self.runs[0]

    def count(self, count: int, *, stored: int) -> None:
        self.counts["stored"] += stored
        self.counts["duplicate"] += count - stored

    def set_aside(self, item: Item, reason: str) -> None:
        """Let an item be a dead letter, once the rest is stored."""
        self.runs.append([item._replace(value=queued.refused(item.value, reason))])


def pause_after(failures: int, longest: float = LONGEST_PAUSE) -> float:
    """How long to wait after so many failures in a row, with jitter: others wait, too."""
    seconds: float = min(longest, _FIRST_PAUSE * 2 ** min(failures, 20))
    return seconds * random.uniform(0.5, 1)  # noqa: S311  (no secret)
