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
from contextuate_persist.errors import SpoolError, SpoolFull, StoreClosed
from contextuate_persist.queued import ITEM_BYTES, Arrival, Item
from contextuate_persist.spool import Record, Spool

log = logging.getLogger(__name__)


class Milestone:
    """How far the queue has come in one respect, and who wants to know when it passes a number."""

    def __init__(self, reached: int) -> None:
        self.reached = reached
        self._waiting: list[tuple[int, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def notify(self, number: int, callback: Callable[[], object]) -> bool:
        """Remember the callback; False if the number is passed already."""
        if number <= self.reached:
            return False
        heapq.heappush(self._waiting, (number, next(self._order), callback))
        return True

    def advance(self, number: int) -> list[Callable[[], object]]:
        """Come to a number; the callbacks that are due."""
        self.reached = max(self.reached, number)
        due = []
        while self._waiting and self._waiting[0][0] <= self.reached:
            due.append(heapq.heappop(self._waiting)[2])
        return due

    def give_up(self) -> list[Callable[[], object]]:
        """All callbacks that are left."""
        left, self._waiting = self._waiting, []
        return [callback for _, _, callback in left]


class Outbox:
    """The queue of one writer, on a spool that is open."""

    def __init__(
        self, spool: Spool, recovered: int, *, memory_bytes: int, spool_bytes: int, always: bool
    ) -> None:
        self._spool = spool
        # Half for what arrives, half for what is sent: neither can take the other's room.
        self._half = memory_bytes // 2
        self._spool_bytes = spool_bytes
        self._always = always
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._ready = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._passed = threading.Condition(self._lock)

        self._front: deque[Item] = deque()
        self._front_bytes = 0
        self._on_disk = recovered
        self._on_disk_to = spool.last
        self._taken_to = spool.acknowledged  # the last number that has come to the front
        self._arrivals: list[Arrival] = []
        self._arrived_bytes = 0
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

    def add(self, value: Any, size: int, timeout: float) -> int:
        """Queue a value of so many bytes; returns its number.

        Waits for room in memory, as long as the timeout says. Raises SpoolFull at the limit of the
        spool, SpoolError if its disk is what keeps memory full, StoreClosed after `close`.
        """
        size += ITEM_BYTES
        accepted = time.time_ns() // 1_000_000
        with self._lock:
            if self._closed or not self._has_room(size):
                self._wait_for_room(size, timeout)
            self._number += 1
            self._accepted += 1
            self._arrivals.append(Arrival(self._number, accepted, value, size))
            self._arrived_bytes += size
            if len(self._arrivals) == 1 or self._arrived_bytes > self._half // 2:
                self._arrived.notify()
            return self._number

    def _has_room(self, size: int) -> bool:
        arrived = self._arrived_bytes + size
        fits = arrived <= self._half or not self._arrivals  # one that is larger comes alone
        return fits and self._spool.size + arrived <= self._spool_bytes

    def _wait_for_room(self, size: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            if self._closed:
                raise StoreClosed("the writer is closed")
            if self._has_room(size):
                return
            if self._spool.size + self._arrived_bytes + size > self._spool_bytes:
                raise SpoolFull(
                    f"{self._spool.directory}: the {self._spool_bytes:,} bytes that it may have "
                    f"are used, {self._pending():,} items wait for the database"
                )
            left = deadline - time.monotonic()
            if left <= 0 or not self._room.wait(left):
                reason = self._spool_error or "its disk does not keep up"
                raise SpoolError(f"{self._spool.directory}: {reason}; memory is full")

    # --- The keeper -------------------------------------------------------------------------------

    def next_to_keep(self, linger: float) -> tuple[list[Arrival | Item], bool]:
        """Wait for items, and whether the spool must have them; none when all is over.

        `linger` is how long the first waits for company, in seconds.
        """
        with self._lock:
            while not self._arrivals and not self._front_must_be_kept():
                if self._over:
                    return [], False
                self._arrived.wait()
            if linger and not self._urgent:
                self._arrived.wait(linger)
            if self._spills():
                front = [item for item in self._front if item.number > self._spooled]
                return [*front, *self._arrivals], True
            return [*self._arrivals], False

    def _spills(self) -> bool:
        full = self._front_bytes + self._arrived_bytes > self._half
        return self._always or self._failing or self._over or self._on_disk > 0 or full

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
            self._spool.acknowledge(done)
        _call(due)

    def not_kept(self, items: Sequence[Item], reason: str) -> None:
        """The disk does not take them: let them be stored from memory, as far as it goes."""
        with self._lock:
            self._spool_error = reason
            if not self._on_disk:
                new = self._arrived_among(items)
                sizes = itertools.accumulate(item.size for item in new)
                room = self._half - self._front_bytes
                fitting = new[: sum(size <= room for size in sizes)]
                self._bring_to_front(fitting, sum(item.size for item in fitting))

    def _arrived_among(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those that do not come from the front, where the keeper may have found some, too."""
        first = self._arrivals[0].number if self._arrivals else items[-1].number + 1
        return items[max(0, len(items) - (items[-1].number + 1 - first)) :]

    def _take_arrivals(self, count: int) -> None:
        self._arrived_bytes -= sum(item.size for item in self._arrivals[:count])
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

    def next_to_send(self, rows: int, size: int, linger: float) -> list[Item]:
        """Wait for items to store, the oldest first; none when all is over.

        They stay in the queue until they are settled. `linger` is how long, in seconds, a few wait
        for more: until there are so many rows or bytes.
        """
        while True:
            with self._lock:
                while not (self._front or self._on_disk or self._over):
                    self._ready.wait()
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

    def _fetch(self, after: int, to: int) -> None:
        """Bring items that only the spool has to the front."""
        records = self._spool.read(after, self._half // 2, ITEM_BYTES)
        items = [_item(record) for record in records if record.number <= to]
        with self._lock:
            self._on_disk -= len(items)
            self._front.extend(items)
            self._front_bytes += sum(item.size for item in items)
            self._taken_to = items[-1].number if items else to
            if self._taken_to == self._on_disk_to and self._on_disk:
                # Records are missing; what could be read of them lies beside the spool.
                self._counts["set_aside"] += self._on_disk
                self._on_disk = 0

    def settle(self, items: Sequence[Item], counts: Counter[str], reasons: dict[int, str]) -> None:
        """These, the first ones, are done with: stored, known already, or set aside."""
        number = items[-1].number
        with self._lock:
            if self._ended:  # too late: they come again
                return
            for item in items:
                self._front.popleft()
                self._front_bytes -= item.size
            self._counts += counts
            self._reasons |= reasons
            while len(self._reasons) > REASONS:
                del self._reasons[next(iter(self._reasons))]
            self._failing = False
            due = self.done.advance(number) + self.safe.advance(number)
            self._room.notify_all()
            self._passed.notify_all()
        if self._spool.size:
            self._spool.acknowledge(number)
        _call(due)

    def not_sent(self) -> None:
        """The database does not take them: from now on the spool is to have everything."""
        with self._lock:
            self._failing = True
            self._arrived.notify_all()

    # --- Those who wait ---------------------------------------------------------------------------

    def notify(self, milestone: Milestone, number: int, callback: Callable[[], object]) -> None:
        """Call back when a number has passed a milestone, or nobody carries it there any more."""
        with self._lock:
            if not self._ended and milestone.notify(number, callback):
                return
        callback()

    def reason(self, number: int) -> str | None:
        """Why an item was set aside; None if it was not, or long ago."""
        with self._lock:
            return self._reasons.get(number)

    def wait_until_done(self, timeout: float | None) -> int:
        """Hurry everything that is here now; how many items are not done with in the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            number = self._number
            self._urgent += 1
            self._arrived.notify_all()
            self._ready.notify_all()
            while self.done.reached < number and not self._ended:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and (left <= 0 or not self._passed.wait(left)):
                    break
                if left is None:
                    self._passed.wait()
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
            self._arrived.notify_all()
            self._ready.notify_all()

    def end(self) -> int:
        """Nobody works any more; how many items would be lost, since no disk has them."""
        with self._lock:
            self._ended = True
            unspooled = sum(item.number > self._spooled for item in self._front)
            lost = unspooled + len(self._arrivals)
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
        except Exception:
            log.exception("a callback of a receipt failed")


#: Why items were set aside, for the last so many.
REASONS = 10_000
