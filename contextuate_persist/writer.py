"""The writer between a daemon and a store: takes in microseconds, keeps, stores, loses nothing."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from contextuate_persist import model, queued, records
from contextuate_persist.base import BaseStore
from contextuate_persist.config import home_path
from contextuate_persist.dead_letters import DeadLetters
from contextuate_persist.errors import (
    ConfigurationError,
    InvalidRecord,
    SpoolError,
    SpoolFull,
    StoreClosed,
)
from contextuate_persist.model import MonitorEvent, SessionMeta
from contextuate_persist.outbox import Outbox
from contextuate_persist.policy import PayloadPolicy
from contextuate_persist.queued import Arrival, Item, Refused, Taken, Update, Value
from contextuate_persist.receipts import Receipt, WriterHealth
from contextuate_persist.records import EventRow
from contextuate_persist.sender import LONGEST_PAUSE, BatchLimits, Sender, pause_after
from contextuate_persist.spool import SEGMENT_BYTES, Record, Spool

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from contextuate_persist.protocol import SessionFields

log = logging.getLogger(__name__)

ENVIRONMENT_SPOOL = "CONTEXTUATE_SPOOL"
_SPOOL = "~/.contextuate/monitor/spool"

# Between tries of a disk that fails: what arrives meanwhile waits, though there may be a database.
_KEEPER_PAUSE = 0.3
# When a writer closes: for the disk to take what is left, for the database to end a statement.
_KEEPER_SECONDS, _SENDER_SECONDS = 10.0, 0.5


def default_spool() -> Path:
    """The spool of this user: what CONTEXTUATE_SPOOL names, else one in the home directory."""
    return home_path(os.environ.get(ENVIRONMENT_SPOOL) or _SPOOL)


class EventWriter:
    """Takes events and sessions in microseconds and stores them, whatever the database does.

    `with open_store(url) as store, EventWriter(store) as writer: writer.put(event)`; but a store
    that is not open yet may be given, while the database is away. Thread-safe. The writer opens
    the store when the database answers, and goes on trying until it does; closing the store is its
    owner's. What was put for one session is stored in that order, each event once.

    | `spool=` | "always" (the default) | "on_failure" |
    |---|---|---|
    | an item is *safe* | on this disk, milliseconds later | stored, or on disk once that fails |
    | `kill -9`, power loss | all that was safe is stored | what was neither is for its source |
    | the database is away | disk, up to `spool_bytes` | the same |
    | costs | a flush of the disk for each group | nothing while all is well |

    `spool_bytes` is what may lie in the directory altogether: what waits, the dead letters, and
    what of the spool could not be read. So a full `dead` stops `put`, too, rather than to fill the
    disk or to lose anything; `health().aside_bytes` tells long before, and `contextuate-persist
    dead` has it tried again or discarded.

    What lies in the spool is stored first when the writer opens. Where the process was killed
    between the database's commit and the note of it in the spool, the last batch comes again, and
    after a power loss what was noted in the half minute before: its events still count once, but
    its sessions are saved and updated again, perhaps after a change of somebody else.

    A deleted session stays deleted: what is stored later is compared with the deletion as if it had
    come at once, by its own time (`PersistenceStore.delete_session`), for as long as deletions are
    remembered, 90 days.
    """

    def __init__(
        self,
        store: BaseStore,
        *,
        spool: Literal["always", "on_failure"] = "always",
        spool_directory: str | Path | None = None,
        spool_bytes: int = 2**30,
        memory_bytes: int = 64 * 2**20,
        batch_rows: int = 1000,
        batch_bytes: int = 4 * 2**20,
        batch_seconds: float = 0.05,
        flush_seconds: float = 0.005,
        put_timeout: float = 5.0,
        redact: Callable[[MonitorEvent], MonitorEvent] | None = None,
        policy: PayloadPolicy | None = None,
        metrics: Callable[[WriterHealth], object] | None = None,
        metrics_seconds: float = 10.0,
    ) -> None:
        """Take a store and settings; nothing happens before `init()`.

        A batch goes to the database when it has `batch_rows` items, `batch_bytes`, or has waited
        for `batch_seconds`; a group goes to disk `flush_seconds` after its first item. At 1,000
        events a second that takes 0.2 of a core, and an event is safe after 4 ms, stored after 42
        (p50, PostgreSQL); without both waits 0.6 of a core, 1 ms and 7 ms. A `put` that
        finds memory full waits for `put_timeout` seconds at most. `redact` is given each event
        first of all and returns what may be kept; `policy` then trims it. `metrics` is called with
        the health every `metrics_seconds`, in a thread of its own.
        """
        self._settings = _Settings(
            always=_is_always(spool),
            directory=Path(spool_directory) if spool_directory is not None else default_spool(),
            spool_bytes=spool_bytes,
            memory_bytes=memory_bytes,
            batch_rows=batch_rows,
            batch_bytes=batch_bytes,
            batch_seconds=batch_seconds,
            flush_seconds=flush_seconds,
            put_timeout=put_timeout,
            metrics_seconds=metrics_seconds,
        )
        self._store = store
        self._redact, self._policy, self._metrics = redact, policy, metrics
        self._spool = Spool(self._settings.directory, self._settings.segment_bytes)
        self._dead_letters = DeadLetters(self._spool.directory / "dead")
        self._outbox: Outbox | None = None
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._sender: Sender | None = None
        _writers.add(self)

    def __repr__(self) -> str:
        return f"<EventWriter of {self._store!r}, spool {self._settings.directory}>"

    def init(self) -> None:
        """Open the spool and begin; the database need not be there. A second call does nothing.

        Raises ConfigurationError while another process works on the spool, SpoolError if it cannot
        be used.
        """
        with self._lock:
            if self._outbox is not None:
                return
            recovered = self._spool.open()
            settings = self._settings
            try:
                self._dead_letters.open()
                outbox = Outbox(
                    self._spool,
                    self._dead_letters.aside,
                    recovered,
                    memory_bytes=settings.memory_bytes,
                    spool_bytes=settings.spool_bytes,
                    always=settings.always,
                )
            except BaseException:
                self._spool.close()
                raise
            limits = BatchLimits(settings.batch_rows, settings.batch_bytes, settings.batch_seconds)
            self._sender = sender = Sender(self._store, outbox, self._dead_letters, limits)
            works = [partial(self._keep, outbox), sender.run]
            if self._metrics is not None:
                works.append(partial(self._tell, outbox, sender))
            self._threads = [
                threading.Thread(target=_work, args=(work, outbox, sender), daemon=True)
                for work in works
            ]
            try:
                for thread in self._threads:
                    thread.start()
            except RuntimeError:  # no thread can be had
                self._end(outbox)
                raise
            self._outbox = outbox

    def flush(self, timeout: float | None = None) -> int:
        """Store all that was put before, at once; how many items are not stored in the end.

        Waits for it, at most so many seconds. What is left goes on being tried, and is in the spool
        as its choice has it.
        """
        outbox = self._open_outbox()
        self._require_other_thread()
        return outbox.wait_until_done(timeout)

    def close(self, timeout: float | None = 10.0) -> int:
        """Take nothing more, store what there is, at most so many seconds; how many items are left.

        They are in the spool, for the next writer that opens it. Raises SpoolError if they are not,
        since its disk does not take them. A second call returns 0.
        """
        self._require_other_thread()
        with self._lock:
            outbox, self._outbox = self._outbox, None
            if outbox is None:
                return 0
            outbox.close()
            left = 0
            try:
                left = outbox.wait_until_done(timeout)
            finally:  # also after Ctrl-C
                lost = self._end(outbox)
        if lost:
            raise SpoolError(
                f"{self._settings.directory}: {lost:,} items are neither stored nor on disk: "
                f"{outbox.figures()['spool_error'] or 'the disk did not answer'}"
            )
        return left

    def _end(self, outbox: Outbox) -> int:
        """End the threads, the keeper when all is on disk; how many items would be lost."""
        outbox.stop()
        keeper, sender, *_ = self._threads
        # The sender may wait for a database that does not answer; what it then hears nobody needs.
        for thread, seconds in ((keeper, _KEEPER_SECONDS), (sender, _SENDER_SECONDS)):
            if thread.ident is not None:  # started
                thread.join(seconds)
        assert self._sender is not None  # noqa: S101  (made with the outbox)
        try:
            self._sender.write_letters()
        finally:
            lost = outbox.end()
            if keeper.is_alive():  # its disk does not answer: the spool is in use until it does
                closing = threading.Thread(target=self._close_after, args=(keeper,), daemon=True)
                try:
                    closing.start()
                except RuntimeError as error:  # then until this process ends
                    log.warning("spool %s stays open: %s", self._settings.directory, error)
            else:
                self._spool.close()
        return lost

    def _close_after(self, keeper: threading.Thread) -> None:
        keeper.join()
        self._spool.close()

    def _require_other_thread(self) -> None:
        if threading.current_thread() in self._threads:
            raise RuntimeError("a callback of the writer's cannot wait for the writer")

    def __enter__(self) -> Self:
        """Call `init()`."""
        self.init()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Call `close()`."""
        self.close()

    def _forget(self) -> None:
        """In a forked child: the writer is the parent's, with its threads and its spool."""
        self._lock = threading.Lock()
        if self._outbox is not None:
            self._outbox.forget_all()  # for receipts that the child has
        self._outbox, self._threads = None, []
        self._spool.forget()
        self._dead_letters.aside.forget()

    # --- Those who put ----------------------------------------------------------------------------

    def put(self, event: MonitorEvent, *, timeout: float | None = None) -> Receipt:
        """Take an event; it may be changed by its owner at once after that.

        What no database can keep is set aside, and its receipt says why. Waits only where memory is
        full, `timeout` seconds at most, else `put_timeout`.

        Raises SpoolFull at the spool's limit, and SpoolError if its disk fails or is slow while
        memory is full: the event is not taken then. Raises InvalidRecord for what is no
        MonitorEvent, or what `redact` fails on; StoreClosed after `close()`.
        """
        return self._put(*self._prepare(event), timeout)

    def put_session(self, session: SessionMeta, *, timeout: float | None = None) -> Receipt:
        """Take a session, to be saved as `PersistenceStore.save_session` does; see `put`."""
        return self._put(*self._prepare_session(session), timeout)

    def update_session(
        self, session_id: str, *, timeout: float | None = None, **fields: Unpack[SessionFields]
    ) -> Receipt:
        """Take an update, to be done as `PersistenceStore.update_session` does; see `put`.

        One of a session that is not there then counts as a duplicate. Raises InvalidRecord for a
        field that sessions do not have.
        """
        return self._put(*self._prepare_update(session_id, dict(fields)), timeout)

    def _prepare(self, event: MonitorEvent) -> Prepared:
        if not isinstance(event, MonitorEvent):
            raise InvalidRecord(f"event: a MonitorEvent is needed, not {type(event).__name__}")
        if self._redact is not None or self._policy is not None:
            event = self._cleaned(event)
        try:
            value = queued.take(event)
        except InvalidRecord as error:
            return _copied(queued.refused_input(event, str(error)))
        if isinstance(value, EventRow):
            return value, value.size, value.size
        # Until it is checked, the payload itself is in memory besides its JSON; and never less than
        # what it takes after that.
        place = event.working_directory  # which nobody has checked yet
        disk = len(value.text) + 4 * (len(place) if isinstance(place, str) else 0) + 600
        return value, disk + 2 * len(value.text), disk

    def _prepare_session(self, session: SessionMeta) -> Prepared:
        try:
            model.check_session(session)
        except InvalidRecord as error:
            if not isinstance(session, SessionMeta):
                raise
            return _copied(queued.refused_input(session, str(error)))
        return _copied(session)

    def _prepare_update(self, session_id: str, fields: dict[str, Any]) -> Prepared:
        for name in fields:
            if name not in model.SESSION_CHECKS:
                raise InvalidRecord(f"{name}: no field that update_session can set")
        update = Update(session_id, fields)
        try:
            model.check_id("session_id", session_id)
            records.update_parameters(fields)
        except InvalidRecord as error:
            return _copied(queued.refused_input(update, str(error)))
        return _copied(update)

    def _put(self, value: Taken | Value, size: int, disk: int, timeout: float | None) -> Receipt:
        outbox = self._open_outbox()
        patience = self._settings.put_timeout if timeout is None else timeout
        try:
            return Receipt(outbox, outbox.add(value, size, disk, patience))
        except SpoolFull:
            if not self._room_was_made():
                raise
        return Receipt(outbox, outbox.add(value, size, disk, patience))

    def _room_was_made(self) -> bool:
        """Whether somebody has removed what lay aside."""
        return self._dead_letters.aside.look() | self._spool.damaged.look()

    def _open_outbox(self) -> Outbox:
        outbox = self._outbox
        if outbox is None:
            raise StoreClosed("the writer is not open: call init(), or use it in a with statement")
        return outbox

    def _cleaned(self, event: MonitorEvent) -> MonitorEvent:
        if self._redact is not None:
            try:
                event = self._redact(event)
            except Exception as error:
                # Not set aside: what was to be redacted would lie on disk as it came. And not a
                # word of the error, which may hold it, too.
                raise InvalidRecord(f"event: redact failed: {type(error).__name__}") from None
            if not isinstance(event, MonitorEvent):
                raise InvalidRecord(f"event: redact gave no MonitorEvent: {type(event).__name__}")
        if self._policy is not None and isinstance(event.data, dict):
            data = self._policy.apply(event.data)
            if data is not event.data:
                event = replace(event, data=data)
        return event

    # --- The keeper -------------------------------------------------------------------------------

    def _keep(self, outbox: Outbox) -> None:
        """Check and encode what arrives, write it to the spool in groups, until all is over."""
        failures = 0
        while True:
            arrivals, spills = outbox.next_to_keep(self._settings.flush_seconds)
            if not arrivals:
                return
            items = list(map(_ready, arrivals))
            try:
                if spills:
                    self._spool.append(list(map(_record, items)))
            except OSError as error:
                failures += 1
                if failures == 1:  # not several times a second
                    log.warning("spool %s: %s", self._settings.directory, error)
                outbox.not_kept(items, error.strerror or str(error))
                if outbox.over:
                    return
                outbox.pause(pause_after(failures, _KEEPER_PAUSE))
            else:
                failures = 0
                outbox.kept(items, on_disk=spills)

    # --- How it is --------------------------------------------------------------------------------

    def health(self) -> WriterHealth:
        """How the writer is doing; raises StoreClosed if it is not open."""
        outbox, sender = self._open_outbox(), self._sender
        assert sender is not None  # noqa: S101  (made with the outbox)
        return self._health(outbox, sender)

    def _health(self, outbox: Outbox, sender: Sender) -> WriterHealth:
        figures = outbox.figures()
        oldest, spool_error = figures.pop("oldest"), figures.pop("spool_error")
        since = sender.failing_since
        dead, damaged = self._dead_letters.aside, self._spool.damaged
        dead.look()
        damaged.look()
        return WriterHealth(
            **figures,
            oldest_seconds=None if oldest is None else max(0.0, time.time() - oldest / 1000),
            retries=sender.retries,
            failing_seconds=None if since is None else time.monotonic() - since,
            last_error=spool_error or sender.last_error,
            dead_letters=dead.count,
            aside_bytes=dead.bytes + damaged.bytes,
            damages=tuple(self._spool.damages),
        )

    def _tell(self, outbox: Outbox, sender: Sender) -> None:
        """Hand the health over, now and then, and at the end."""
        assert self._metrics is not None  # noqa: S101  (or this thread would not be)
        over = False
        while not over:
            outbox.wait_until_over(self._settings.metrics_seconds)
            over = outbox.over
            try:
                self._metrics(self._health(outbox, sender))
            except Exception:
                log.exception("the metrics callback failed")


def _work(work: Callable[[], None], outbox: Outbox, sender: Sender) -> None:
    """Do a thread's work, again if it ends by a defect of ours: what is in the queue still is."""
    while True:
        try:
            work()
        except BaseException as error:
            sender.last_error = f"{type(error).__name__}: {error}"
            log.exception("the writer stumbled, and goes on")
            outbox.pause(LONGEST_PAUSE)
            if outbox.over:
                return
        else:
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    always: bool
    directory: Path
    spool_bytes: int
    memory_bytes: int
    batch_rows: int
    batch_bytes: int
    batch_seconds: float
    flush_seconds: float
    put_timeout: float
    metrics_seconds: float

    def __post_init__(self) -> None:
        for name in ("spool_bytes", "memory_bytes", "batch_bytes"):
            size = getattr(self, name)
            if type(size) is not int or size < 2**20:
                raise ConfigurationError(
                    f"{name}: {size!r} is not a number of bytes, 2**20 or more"
                )
        if type(self.batch_rows) is not int or self.batch_rows < 1:
            raise ConfigurationError(f"batch_rows: {self.batch_rows!r} is not a number of rows")
        for name in ("batch_seconds", "flush_seconds", "put_timeout", "metrics_seconds"):
            seconds = getattr(self, name)
            if type(seconds) not in (int, float) or not 0 <= seconds < threading.TIMEOUT_MAX:
                raise ConfigurationError(f"{name}: {seconds!r} is not a number of seconds")
        if not self.metrics_seconds:  # it would be called without a pause
            raise ConfigurationError("metrics_seconds: 0 is not a number of seconds above 0")

    @property
    def segment_bytes(self) -> int:
        """Of one file: small enough that a full spool has several, and memory room for one."""
        return min(SEGMENT_BYTES, self.spool_bytes // 8, self.memory_bytes // 4)


#: What goes into the queue, with its bytes in memory and in the spool.
Prepared: TypeAlias = tuple[Taken | Value, int, int]


def _copied(value: SessionMeta | Update | Refused) -> Prepared:
    """A copy that its owner cannot change any more."""
    body = queued.to_body(value)
    return queued.from_body(body), 3 * len(body), len(body)


def _ready(arrival: Arrival | Item) -> Item:
    try:
        return queued.ready(arrival)
    except MemoryError:  # it passes, and the arrivals are still in the queue
        raise
    except Exception as error:  # a defect of ours: one item is not to hold up all others
        log.exception("an item that cannot be encoded")
        return _refused(arrival, f"{type(error).__name__}: {error}")


def _refused(arrival: Arrival | Item, reason: str) -> Item:
    try:
        return queued.refused_arrival(arrival, reason)
    except MemoryError:
        raise
    except Exception:
        log.exception("an item that cannot be told")
        refusal = queued.plain_refusal(arrival.number, reason)
        return Item(arrival.number, arrival.accepted, refusal, arrival.size)


def _record(item: Item) -> Record:
    return Record(item.number, item.accepted, queued.to_body(item.value))


def _is_always(spool: str) -> bool:
    if spool not in ("always", "on_failure"):
        raise ConfigurationError(f"spool: 'always' or 'on_failure', not {model.shown(spool)}")
    return spool == "always"


_writers: weakref.WeakSet[EventWriter] = weakref.WeakSet()


def _after_fork() -> None:  # pragma: no cover  (in a forked child)
    for writer in _writers:
        writer._forget()  # noqa: SLF001


os.register_at_fork(after_in_child=_after_fork)
