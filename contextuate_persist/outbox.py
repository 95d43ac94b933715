"""The queue between those who put and those who store: what is in memory, what only on disk.

In the order of their numbers: the items in front, which the sender takes; those that only the spool
holds, since memory was short; and the arrivals, which the keeper writes to the spool. No thread and
no SQL is here; every method may be called from any thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from contextuate_persist import queued
from contextuate_persist.aside import Aside
from contextuate_persist.errors import SpoolError, SpoolFull, StoreClosed
from contextuate_persist.queued import ITEM_BYTES, Arrival, Item, Taken, Value
from contextuate_persist.spool import Record, Spool

log = logging.getLogger(__name__)


class Milestone:
    """How far the queue has come in one respect, and who wants to know when it passes a number."""

    def __init__(self, reached: int) -> None:
        self.reached = reached
        self._held: dict[int, list[int]] = {}  # numbers with the tokens of who waits for them
        self._waiting: dict[int, Callable[[], object]] = {}
        self._order: list[tuple[int, int]] = []  # numbers with the tokens of who waits for them
        self._tokens = itertools.count(1)

    def wait_for(self, number: int, callback: Callable[[], object]) -> int:
        """Remember the callback, under a token; 0 if the number is passed already."""
        if self.passed(number):
            return 0
        token = next(self._tokens)
        self._waiting[token] = callback
        if number in self._held:
            self._held[number].append(token)
        else:
            heapq.heappush(self._order, (number, token))
        return token

    def passed(self, number: int) -> bool:
        """Whether this number is behind, and not held."""
        return number <= self.reached and number not in self._held

    def hold(self, number: int) -> None:
        """Go past this number without passing it, until `release`."""
        self._held[number] = []

    def release(self, number: int) -> list[Callable[[], object]]:
        """Pass a number, if it was held; the callbacks that are due."""
        tokens = self._held.pop(number, [])
        return [self._waiting.pop(token) for token in tokens if token in self._waiting]

    def forget(self, token: int) -> None:
        """Nobody waits for this any more."""
        self._waiting.pop(token, None)
        if len(self._order) > 2 * len(self._waiting) + 100:
            self._order = [entry for entry in self._order if entry[1] in self._waiting]
            heapq.heapify(self._order)

    def advance(self, reached: int) -> list[Callable[[], object]]:
        """Come to a number; the callbacks that are due."""
        self.reached = max(self.reached, reached)
        due = []
        while self._order and self._order[0][0] <= self.reached:
            number, token = heapq.heappop(self._order)
            if number in self._held:
                self._held[number].append(token)
            elif token in self._waiting:
                due.append(self._waiting.pop(token))
        return due

    def give_up(self) -> list[Callable[[], object]]:
        """All callbacks that are left."""
        left, self._waiting, self._order = [*self._waiting.values()], {}, []
        return left


class Outbox:
    """The queue of one writer, on a spool that is open."""

    def __init__(
        self,
        spool: Spool,
        dead: Aside,
        recovered: int,
        *,
        memory_bytes: int,
        spool_bytes: int,
        always: bool,
    ) -> None:
        self._spool = spool
        self._dead = dead
        # Half for what arrives, half for what is sent: neither can take the other's room.
        self._half = memory_bytes // 2
        self._spool_bytes = spool_bytes
        self._always = always
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._ready = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._passed = threading.Condition(self._lock)
        self._hurry = threading.Condition(self._lock)

        self._front: deque[Item] = deque()
        self._front_bytes = 0
        self._on_disk = recovered
        self._on_disk_to = spool.last
        self._taken_to = spool.acknowledged  # the last number that has come to the front
        self._arrivals: list[Arrival] = []
        self._arrived_bytes = 0
        self._arrived_disk = 0
        self._letters: dict[int, Item] = {}  # settled, but not on disk yet as dead letters
        self._number = spool.last
        self._spooled = spool.last
        self.safe = Milestone(spool.last)
        self.done = Milestone(spool.acknowledged)

        self._accepted = recovered
        self._counts: Counter[str] = Counter()
        self._reasons: dict[int, str] = {}
        self._urgent = 0  # callers of flush and close: nothing waits for company then
        self._failing = False
        self._spool_error = ""
        self._closed = False  # nothing more comes in
        self._over = False  # nothing more goes out
        self._ended = False  # nobody works here any more

    # --- Those who put ----------------------------------------------------------------------------

    def add(self, value: Taken | Value, size: int, disk: int, timeout: float) -> int:
        """Queue a value of so many bytes in memory and in the spool; returns its number.

        Waits for room in memory, as long as the timeout says. Raises SpoolFull at the limit of the
        spool, SpoolError if its disk is what keeps memory full, StoreClosed after `close`.
        """
        size += ITEM_BYTES
        accepted = time.time_ns() // 1_000_000
        with self._lock:
            if self._closed or not self._has_room(size, disk):
                self._wait_for_room(size, disk, timeout)
            if not self._arrivals or self._arrived_bytes + size > self._half // 2:
                self._arrived.notify()  # who waits goes on once the lock is free
            # A signal's exception comes behind a call, and this is the last one; memory may run out
            # until the list has grown. A number without its arrival, or two with one, lose events.
            arrival = Arrival(self._number + 1, accepted, value, size, disk)
            self._arrivals += [arrival]
            self._number += 1
            self._accepted += 1
            self._arrived_bytes += size
            self._arrived_disk += disk
            return self._number

    def _has_room(self, size: int, disk: int) -> bool:
        # One that is larger comes alone.
        fits = self._arrived_bytes + size <= self._half or not self._arrivals
        return fits and self._disk_after(disk) <= self._spool_bytes

    def _disk_after(self, disk: int) -> int:
        return (
            self._spool.size
            + self._dead.bytes
            + self._spool.damaged.bytes
            + (self._arrived_disk + disk)
        )

    def _wait_for_room(self, size: int, disk: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            if self._closed:
                raise StoreClosed("the writer is closed")
            if self._has_room(size, disk):
                return
            if self._disk_after(disk) > self._spool_bytes:
                aside = self._dead.bytes + self._spool.damaged.bytes
                raise SpoolFull(
                    f"{self._spool.directory}: has no room for {disk:,} bytes, of the "
                    f"{self._spool_bytes:,} that it may have; "
                    f"{self._pending():,} items wait for the database"
                    + (
                        f", {aside:,} bytes lie aside in dead and damaged: see "
                        "`contextuate-persist dead list`"
                        if aside
                        else ": raise spool_bytes, or see why it does not take them"
                    )
                )
            left = deadline - time.monotonic()
            if left <= 0 or not self._room.wait(left):
                raise self.memory_is_full()

    def memory_is_full(self) -> SpoolError:
        """What is raised where somebody has waited for room in vain."""
        reason = self._spool_error or "its disk does not keep up"
        return SpoolError(f"{self._spool.directory}: {reason}; memory is full")

    # --- The keeper -------------------------------------------------------------------------------

    def next_to_keep(self, linger: float) -> tuple[list[Arrival | Item], bool]:
        """Wait for items, and whether the spool must have them; none when all is over.

        `linger` is how long the first waits for company, in seconds.
        """
        with self._lock:
            while True:
                while not self._arrivals and not self._front_must_be_kept():
                    if self._over:
                        return [], False
                    self._arrived.wait()
                if linger and not self._urgent:
                    self._arrived.wait(linger)
                spills = self._spills()
                front = [i for i in self._front if i.number > self._spooled] if spills else []
                # Meanwhile the sender may have settled what was to be kept: then go on waiting.
                items: list[Arrival | Item] = [*front, *self._arrivals]
                if items:
                    return items, spills

    def _spills(self) -> bool:
        full = self._front_bytes + self._arrived_bytes > self._half
        # What lies in the spool with a letter comes again after a kill; then what followed, too.
        held = any(number <= self._spooled for number in self._letters)
        return self._always or self._failing or self._over or self._on_disk > 0 or full or held

    def _front_must_be_kept(self) -> bool:
        if not self._front or self._front[-1].number <= self._spooled:
            return False
        return self._always or self._failing or self._over

    def kept(self, items: Sequence[Item], *, on_disk: bool) -> None:
        """These may be sent now, and are on disk or need not be there."""
        with self._lock:
            new = self._arrived_among(items)
            if on_disk:
                self._spool_error = ""
                self._spooled = items[-1].number
            size = sum(item.size for item in new)
            full = bool(self._front) and self._front_bytes + size > self._half
            if on_disk and (self._on_disk or full):
                self._take_arrivals(len(new))
                self._on_disk += len(new)
                self._on_disk_to = self._spooled
            else:
                self._bring_to_front(new, size)
            done = self.done.reached
            due = self.safe.advance(max(self._spooled, done)) if on_disk else []
        if on_disk and items[0].number <= done:  # stored while they were written
            self._acknowledge()
        _call(due)

    def not_kept(self, items: Sequence[Item], reason: str) -> None:
        """The disk does not take them: let them be stored from memory, as far as it goes."""
        with self._lock:
            self._spool_error = reason
            if not self._on_disk:
                new = self._arrived_among(items)
                sizes = itertools.accumulate(item.size for item in new)
                room = self._half - self._front_bytes
                fitting = new[: sum(size <= room for size in sizes) or (not self._front)]
                self._bring_to_front(fitting, sum(item.size for item in fitting))

    def _arrived_among(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those that do not come from the front, where the keeper may have found some, too."""
        first = self._arrivals[0].number if self._arrivals else items[-1].number + 1
        return items[max(0, len(items) - (items[-1].number + 1 - first)) :]

    def _take_arrivals(self, count: int) -> None:
        for arrival in self._arrivals[:count]:
            self._arrived_bytes -= arrival.size
            self._arrived_disk -= arrival.disk
        del self._arrivals[:count]
        self._room.notify_all()
        self._ready.notify_all()

    def _bring_to_front(self, items: Sequence[Item], size: int) -> None:
        self._take_arrivals(len(items))
        self._front.extend(items)
        self._front_bytes += size
        if items:
            self._taken_to = items[-1].number

    # --- The sender -------------------------------------------------------------------------------

    def next_to_send(
        self, rows: int, size: int, linger: float, patience: float | None = None
    ) -> list[Item]:
        """Wait for items to store, the oldest first; none when all is over, or patience is.

        They stay in the queue until they are settled. `linger` is how long, in seconds, a few wait
        for more: until there are so many rows or bytes.
        """
        while True:
            with self._lock:
                while not (self._front or self._on_disk or self._over):
                    if not self._ready.wait(patience):
                        return []
                if self._over:
                    return []
                if self._front:
                    self._wait_for_company(rows, size, linger)
                    return [] if self._over else self._first(rows, size)
                after, to = self._taken_to, self._on_disk_to
            self._fetch(after, to)

    def _wait_for_company(self, rows: int, size: int, linger: float) -> None:
        until = time.monotonic() + linger
        while not (
            len(self._front) >= rows
            or self._front_bytes >= size
            or self._on_disk
            or self._urgent
            or self._over
        ):
            left = until - time.monotonic()
            if left <= 0 or not self._ready.wait(left):
                break

    def _first(self, rows: int, size: int) -> list[Item]:
        first: list[Item] = []
        for item in itertools.islice(self._front, rows):
            size -= item.size
            if first and size < 0:
                break
            first.append(item)
        return first

    def waiting(self, most: int) -> list[Item]:
        """The first so many of those that are in front, what is being sent among them."""
        with self._lock:
            return [*itertools.islice(self._front, most)]

    def _fetch(self, after: int, to: int) -> None:
        """Bring items that only the spool has to the front."""
        records = self._spool.read(after, self._half // 2, ITEM_BYTES)
        items = [_item(record) for record in records if record.number <= to]
        with self._lock:
            self._on_disk -= len(items)
            self._front.extend(items)
            self._front_bytes += sum(item.size for item in items)
            self._taken_to = items[-1].number if items else to
            due: list[Callable[[], object]] = []
            if self._taken_to == self._on_disk_to and self._on_disk:
                # Records are missing; what could be read of them lies beside the spool.
                self._counts["set_aside"] += self._on_disk
                self._on_disk = 0
                if not self._front:
                    due = self.done.advance(to) + self.safe.advance(to)
                    self._passed.notify_all()
        _call(due)

    def settle(
        self,
        items: Sequence[Item],
        counts: Counter[str],
        reasons: dict[int, str],
        letters: Sequence[Item] = (),
    ) -> None:
        """These, the first ones, are done with: stored, known already, or set aside.

        `letters` are those of them that no disk has yet as dead letters.
        """
        number = items[-1].number
        with self._lock:
            if self._ended:  # too late: they come again
                return
            for item in items:
                self._front.popleft()
                self._front_bytes -= item.size
            self._counts += counts
            self._reasons |= reasons
            self._letters |= {letter.number: letter for letter in letters}
            while len(self._reasons) > REASONS:
                del self._reasons[next(iter(self._reasons))]
            self._failing = False
            for letter in letters:
                # Neither the spool nor anybody else has it: it is not safe, nor done with.
                if letter.number > self._spooled:
                    for milestone in (self.safe, self.done):
                        milestone.hold(letter.number)
            due = self.done.advance(number) + self.safe.advance(number)
            self._room.notify_all()
            self._passed.notify_all()
        self._acknowledge()
        _call(due)

    def _acknowledge(self) -> None:
        with self._lock:
            # A letter that is written nowhere else comes again from the spool.
            number = min([self.done.reached, *(letter - 1 for letter in self._letters)])
        if self._spool.size:
            self._spool.acknowledge(number)

    @property
    def letters(self) -> list[Item]:
        """What is settled, but still has to be written as dead letters."""
        with self._lock:
            return [*self._letters.values()]

    @property
    def too_many_letters(self) -> bool:
        """Whether they take the room of what is to be sent."""
        with self._lock:
            return sum(letter.size for letter in self._letters.values()) > self._half // 2

    def letter_written(self, letter: Item) -> None:
        """One of `letters` is."""
        with self._lock:
            del self._letters[letter.number]
            due = self.safe.release(letter.number) + self.done.release(letter.number)
        self._acknowledge()
        _call(due)

    def not_sent(self) -> None:
        """The database does not take them: from now on the spool is to have everything."""
        with self._lock:
            self._failing = True
            self._arrived.notify_all()

    # --- Those who wait ---------------------------------------------------------------------------

    def notify(self, milestone: Milestone, number: int, callback: Callable[[], object]) -> int:
        """Call back when a number has passed a milestone, or nobody carries it there any more.

        Returns what `forget` takes; 0 if it was called at once.
        """
        with self._lock:
            token = 0 if self._ended else milestone.wait_for(number, callback)
        if not token:
            _call([callback])
        return token

    def forget(self, milestone: Milestone, token: int) -> None:
        """Nobody waits for this any more."""
        with self._lock:
            milestone.forget(token)

    def pause(self, seconds: float) -> None:
        """Wait a while before something is tried again, less if somebody waits for it."""
        with self._lock:
            if not self._over:
                self._hurry.wait(min(seconds, 0.1) if self._urgent else seconds)

    def reason(self, number: int) -> str | None:
        """Why an item was set aside; None if it was not, or long ago."""
        with self._lock:
            return self._reasons.get(number)

    def wait_until_done(self, timeout: float | None) -> int:
        """Hurry everything that is here now; how many items are not done with in the end."""
        until = time.monotonic() + (threading.TIMEOUT_MAX / 2 if timeout is None else timeout)
        with self._lock:
            number = self._number
            self._urgent += 1
            for condition in (self._arrived, self._ready, self._hurry):
                condition.notify_all()
            try:
                while self.done.reached < number and not self._ended:
                    left = until - time.monotonic()
                    if left <= 0 or not self._passed.wait(left):
                        break
            finally:
                self._urgent -= 1
            return 0 if self.done.reached >= number else self._pending()

    # --- The end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Take nothing more."""
        with self._lock:
            self._closed = True
            self._room.notify_all()

    def stop(self) -> None:
        """The sender is to end now, the keeper when everything is on disk."""
        with self._lock:
            self._over = True
            for condition in (self._arrived, self._ready, self._hurry):
                condition.notify_all()

    def wait_until_over(self, seconds: float) -> None:
        """Wait so long, or until the sender is to end."""
        until = time.monotonic() + seconds
        with self._lock:
            while not self._over and (left := until - time.monotonic()) > 0:
                self._hurry.wait(left)

    @property
    def over(self) -> bool:
        """Whether the sender is to end."""
        return self._over

    def forget_all(self) -> None:
        """In a forked child: nobody works here, and nobody will."""
        self._lock = threading.Lock()
        self._closed = self._over = self._ended = True

    def end(self) -> int:
        """Nobody works any more; how many items would be lost, since no disk has them."""
        with self._lock:
            self._ended = True
            lost = sum(item.number > self._spooled for item in self._front) + len(self._arrivals)
            lost += sum(not self.safe.passed(number) for number in self._letters)
            left = self.safe.give_up() + self.done.give_up()
            self._passed.notify_all()
        _call(left)
        return lost

    # --- How it is --------------------------------------------------------------------------------

    def _pending(self) -> int:
        return len(self._front) + self._on_disk + len(self._arrivals)

    def figures(self) -> dict[str, Any]:
        """Counts, bytes and the oldest item's time, all of one moment."""
        with self._lock:
            first: Sequence[Item | Arrival] = [*itertools.islice(self._front, 1)]
            oldest = next(iter(first or self._arrivals[:1]), None)
            return {
                "accepted": self._accepted,
                "stored": self._counts["stored"],
                "duplicate": self._counts["duplicate"],
                "set_aside": self._counts["set_aside"],
                "pending": self._pending(),
                "memory_bytes": self._front_bytes + self._arrived_bytes,
                "spool_bytes": self._spool.size,
                "spool_error": self._spool_error or None,
                "oldest": oldest.accepted if oldest else None,
            }


def _item(record: Record) -> Item:
    try:
        value = queued.from_body(record.body)
    except SpoolError as error:
        value = queued.unreadable(record.body, str(error))
    return Item(record.number, record.accepted, value, len(record.body) + ITEM_BYTES)


def _call(callbacks: Sequence[Callable[[], object]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except BaseException:  # whatever it is, it is not to end our thread
            log.exception("a callback of a receipt failed")


#: Why items were set aside, for the last so many.
REASONS = 10_000
