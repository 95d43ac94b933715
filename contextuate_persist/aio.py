"""The store and the writer for asyncio: the same methods, each done in threads of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from contextuate_persist.base import BaseStore
from contextuate_persist.errors import SpoolError, SpoolFull, StoreClosed
from contextuate_persist.model import (
    Cursor,
    Forgotten,
    Health,
    MessageUsage,
    MonitorEvent,
    SaveResult,
    SessionMeta,
    SessionNode,
    SessionStatus,
)
from contextuate_persist.outbox import Milestone, Outbox
from contextuate_persist.protocol import PersistenceStore
from contextuate_persist.receipts import Receipt, WriterHealth
from contextuate_persist.writer import EventWriter, Prepared

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from contextuate_persist.protocol import SessionFields

P = ParamSpec("P")
T = TypeVar("T")

#: How long `close()` waits for calls that are running before it closes the store under them.
CLOSE_SECONDS = 10.0
# A visit to a thread takes 40 us, as long as reading an event does: one for each would halve the
# speed. Whichever comes first ends it; large events reach the time, so that few are in memory.
_VISIT_EVENTS = 256
_VISIT_SECONDS = 0.01

_stores: weakref.WeakSet[AsyncStore] = weakref.WeakSet()
_lifetimes: weakref.WeakSet[_Lifetime] = weakref.WeakSet()


def _copied(given: Iterable[T]) -> Iterable[T]:
    """A list of its own; what is none is the store's to refuse."""
    return list(given) if isinstance(given, Iterable) else given


class AsyncStore:
    """A store for asyncio: `async with AsyncStore(open_store(url)) as store:`.

    The methods are those of `PersistenceStore`, and so is what they do. The given store belongs to
    the facade, which opens and closes it.

    - Each call is done in one of as many threads as the store has connections, with the caller's
      context variables; more calls than that wait for their turn, without a limit of their own
      (`asyncio.timeout` sets one). What `save_events`, `save_sessions` and `save_usage` are given
      to iterate over is read before that, in the event loop.
    - A call that is cancelled returns at once. If it has begun, the thread goes on to its end: a
      write may be done or not, and may be sent again, as ever. If not, it is never done.
    - It is bound to no event loop: one may use it after the other. A process that forks may go on
      using an open store, in a loop of its own.
    """

    def __init__(self, store: BaseStore) -> None:
        """Take a store that is not open yet."""
        self._store = store
        self._threads: ThreadPoolExecutor | None = None
        self._lifetime = _Lifetime(store.init, store.close)
        _stores.add(self)

    def __repr__(self) -> str:
        return f"<AsyncStore of {self._store!r}>"

    async def init(self) -> None:
        await self._lifetime.begin()
        if self._threads is None:
            self._threads = self._new_threads()

    async def close(self) -> None:
        """Close every connection. A second call does nothing.

        Waits ten seconds at most for calls that are running; one that takes longer may then raise
        StoreClosed, as calls that wait for their turn do at once. Cancelled, it returns at once and
        closes all the same; an `init` after that waits for it.
        """
        threads, self._threads = self._threads, None
        await self._lifetime.end(partial(self._finish, threads))

    def _finish(self, threads: ThreadPoolExecutor | None) -> None:
        if threads is not None:
            # In a thread, since shutdown() itself waits without a limit.
            ending = threading.Thread(target=threads.shutdown, daemon=True)
            ending.start()
            ending.join(CLOSE_SECONDS)
        self._store.close()

    async def __aenter__(self) -> Self:
        await self.init()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # --- Events -----------------------------------------------------------------------------------

    async def save_event(self, event: MonitorEvent) -> bool:
        return await self._run(self._store.save_event, event)

    @overload
    async def save_events(
        self,
        events: Iterable[MonitorEvent],
        *,
        on_error: Literal["raise"] = "raise",
        undelete: bool = False,
    ) -> int: ...
    @overload
    async def save_events(
        self,
        events: Iterable[MonitorEvent],
        *,
        on_error: Literal["skip"],
        undelete: bool = False,
    ) -> SaveResult: ...
    async def save_events(
        self,
        events: Iterable[MonitorEvent],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        undelete: bool = False,
    ) -> int | SaveResult:
        # A copy: after a cancellation the caller goes on with its list while the thread reads.
        batch = _copied(events)
        return await self._run(
            lambda: self._store.save_events(batch, on_error=on_error, undelete=undelete)
        )

    async def get_events(
        self,
        session_id: str,
        *,
        limit: int = 1000,
        before: int | Cursor | None = None,
        after: int | Cursor | None = None,
    ) -> list[MonitorEvent]:
        return await self._run(
            self._store.get_events, session_id, limit=limit, before=before, after=after
        )

    async def get_event_by_id(self, session_id: str, event_id: str) -> MonitorEvent | None:
        return await self._run(self._store.get_event_by_id, session_id, event_id)

    async def get_all_recent_events(self, limit: int = 200) -> list[MonitorEvent]:
        return await self._run(self._store.get_all_recent_events, limit)

    async def find_events(
        self,
        *,
        session_id: str | None = None,
        machine_id: str | None = None,
        parent_session_id: str | None = None,
        event_type: str | None = None,
        hook_type: str | None = None,
        tool_name: str | None = None,
        tool_use_id: str | None = None,
        contains: Mapping[str, Any] | None = None,
        before: int | Cursor | None = None,
        after: int | Cursor | None = None,
        newest_first: bool = True,
        limit: int = 100,
    ) -> list[MonitorEvent]:
        return await self._run(
            self._store.find_events,
            session_id=session_id,
            machine_id=machine_id,
            parent_session_id=parent_session_id,
            event_type=event_type,
            hook_type=hook_type,
            tool_name=tool_name,
            tool_use_id=tool_use_id,
            contains=contains,
            before=before,
            after=after,
            newest_first=newest_first,
            limit=limit,
        )

    def iter_events(
        self,
        *,
        session_id: str | None = None,
        machine_id: str | None = None,
        parent_session_id: str | None = None,
        event_type: str | None = None,
        hook_type: str | None = None,
        tool_name: str | None = None,
        tool_use_id: str | None = None,
        contains: Mapping[str, Any] | None = None,
        before: int | Cursor | None = None,
        after: int | Cursor | None = None,
    ) -> AsyncGenerator[MonitorEvent, None]:
        """All events that `find_events` would find, for `async for`, in constant memory.

        Holds no thread and no connection in between, so an iteration may be left at any time.
        """
        # Checks the arguments; a store reads nothing before the first event is asked for.
        events = self._store.iter_events(
            session_id=session_id,
            machine_id=machine_id,
            parent_session_id=parent_session_id,
            event_type=event_type,
            hook_type=hook_type,
            tool_name=tool_name,
            tool_use_id=tool_use_id,
            contains=contains,
            before=before,
            after=after,
        )
        return self._visits(events)

    async def _visits(self, events: Iterator[MonitorEvent]) -> AsyncGenerator[MonitorEvent, None]:
        while visit := await self._run(_next_events, events):
            for event in visit:
                yield event

    async def event_counts(self, session_id: str | None = None) -> dict[str, int]:
        return await self._run(self._store.event_counts, session_id)

    # --- Sessions ---------------------------------------------------------------------------------

    async def save_session(self, session: SessionMeta, *, undelete: bool = False) -> bool:
        return await self._run(self._store.save_session, session, undelete=undelete)

    async def save_sessions(
        self, sessions: Iterable[SessionMeta], *, undelete: bool = False
    ) -> int:
        return await self._run(self._store.save_sessions, _copied(sessions), undelete=undelete)

    async def get_session(self, session_id: str) -> SessionMeta | None:
        return await self._run(self._store.get_session, session_id)

    async def get_sessions(
        self,
        *,
        status: SessionStatus | str | None = None,
        machine_id: str | None = None,
        parent_session_id: str | None = None,
        hidden: bool | None = None,
        started_after: int | None = None,
        started_before: int | None = None,
        limit: int | None = None,
    ) -> list[SessionMeta]:
        return await self._run(
            self._store.get_sessions,
            status=status,
            machine_id=machine_id,
            parent_session_id=parent_session_id,
            hidden=hidden,
            started_after=started_after,
            started_before=started_before,
            limit=limit,
        )

    async def update_session(self, session_id: str, **fields: Unpack[SessionFields]) -> None:
        await self._run(self._store.update_session, session_id, **fields)

    async def save_usage(self, session_id: str, usages: Iterable[MessageUsage]) -> int:
        return await self._run(self._store.save_usage, session_id, _copied(usages))

    async def delete_session(self, session_id: str) -> None:
        await self._run(self._store.delete_session, session_id)

    async def delete_all_sessions(self) -> int:
        return await self._run(self._store.delete_all_sessions)

    async def prune_old_sessions(self, older_than: int) -> int:
        return await self._run(self._store.prune_old_sessions, older_than)

    async def forget(
        self,
        *,
        session_id: str | None = None,
        machine_id: str | None = None,
        working_directory: str | None = None,
        dry_run: bool = False,
    ) -> Forgotten:
        return await self._run(
            self._store.forget,
            session_id=session_id,
            machine_id=machine_id,
            working_directory=working_directory,
            dry_run=dry_run,
        )

    async def session_tree(self, session_id: str | None = None) -> list[SessionNode]:
        return await self._run(self._store.session_tree, session_id)

    async def health(self) -> Health:
        return await self._run(self._store.health)

    # --- Threads ----------------------------------------------------------------------------------

    def _new_threads(self) -> ThreadPoolExecutor:
        # As many as there are connections: with more of them, some would only wait for one. Not the
        # loop's default executor, in which other code's work may sit in front.
        size = self._store.pool_size
        return ThreadPoolExecutor(size, "contextuate_persist-async")

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the work in a thread."""
        threads = self._threads
        if threads is None:
            raise StoreClosed

        def begin() -> T:
            if self._threads is not threads:  # closed while this waited for its turn
                raise StoreClosed
            return work(*args, **kwargs)

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(threads, copy_context().run, begin)


class AsyncReceipt:
    """A `Receipt` for asyncio."""

    __slots__ = ("_receipt",)

    def __init__(self, receipt: Receipt) -> None:
        self._receipt = receipt

    def __repr__(self) -> str:
        return repr(self._receipt).replace("<", "<Async", 1)

    @property
    def number(self) -> int:
        """Its place in the queue."""
        return self._receipt.number

    @property
    def safe(self) -> bool:
        return self._receipt.safe

    @property
    def stored(self) -> bool:
        return self._receipt.stored

    @property
    def refusal(self) -> str | None:
        return self._receipt.refusal

    async def wait_safe(self) -> bool:
        """Wait until it is safe; False if the writer is closed before that."""
        outbox = self._receipt._outbox  # noqa: SLF001  (its twin)
        await _called(outbox, outbox.safe, self.number)
        return self.safe

    async def wait_stored(self) -> bool:
        """Wait until it is stored; False if the writer is closed before that."""
        outbox = self._receipt._outbox  # noqa: SLF001
        await _called(outbox, outbox.done, self.number)
        return self.stored


class AsyncEventWriter:
    """An `EventWriter` for asyncio: `async with AsyncEventWriter(EventWriter(store)) as writer:`.

    The given writer belongs to the facade, which opens and closes it.
    """

    def __init__(self, writer: EventWriter) -> None:
        """Take a writer that is not open yet."""
        self._writer = writer
        self._lifetime = _Lifetime(writer.init, writer.close)
        self._order = asyncio.Lock()
        self._puts = 0

    def __repr__(self) -> str:
        return f"<AsyncEventWriter of {self._writer!r}>"

    async def init(self) -> None:
        self._order, self._puts = asyncio.Lock(), 0  # of this event loop
        await self._lifetime.begin()

    async def flush(self, timeout: float | None = None) -> int:
        return await _in_thread(partial(self._writer.flush, timeout))

    async def close(self, timeout: float | None = 10.0) -> int:
        return await self._lifetime.end(partial(self._writer.close, timeout))

    async def __aenter__(self) -> Self:
        await self.init()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def put(self, event: MonitorEvent, *, timeout: float | None = None) -> AsyncReceipt:
        return await self._put(self._writer._prepare(event), timeout)  # noqa: SLF001  (its twin)

    async def put_session(
        self, session: SessionMeta, *, timeout: float | None = None
    ) -> AsyncReceipt:
        prepared = self._writer._prepare_session(session)  # noqa: SLF001
        return await self._put(prepared, timeout)

    async def update_session(
        self, session_id: str, *, timeout: float | None = None, **fields: Unpack[SessionFields]
    ) -> AsyncReceipt:
        prepared = self._writer._prepare_update(session_id, dict(fields))  # noqa: SLF001
        return await self._put(prepared, timeout)

    async def _put(self, prepared: Prepared, timeout: float | None) -> AsyncReceipt:
        value, size, disk = prepared
        if timeout is None:
            timeout = self._writer._settings.put_timeout  # noqa: SLF001
        until = time.monotonic() + timeout

        def put(seconds: float) -> Receipt:
            return self._writer._put(value, size, disk, seconds)  # noqa: SLF001

        # Who waits for room does not let others pass; in line, too, nobody waits for longer.
        self._puts += 1
        try:
            if self._puts == 1:  # nobody is before it
                await self._order.acquire()
            else:
                await asyncio.wait_for(self._order.acquire(), timeout)
            try:
                return AsyncReceipt(put(0))
            except SpoolFull:
                raise
            except SpoolError:  # memory is full: the loop must not wait for room, a thread may
                left = max(0.0, until - time.monotonic())
                return AsyncReceipt(await _in_thread(partial(put, left)))
            finally:
                self._order.release()
        except asyncio.TimeoutError:
            raise self._writer._open_outbox().memory_is_full() from None  # noqa: SLF001
        finally:
            self._puts -= 1

    def health(self) -> WriterHealth:
        return self._writer.health()


class _Lifetime:
    """Opens what a facade stands for, and closes it, in threads that may outlive their callers."""

    def __init__(self, init: Callable[[], None], close: Callable[[], object]) -> None:
        self._init, self._close = init, close
        self._is_open = False
        # That go on, though nobody may wait for them.
        self._openings: set[Future[None]] = set()
        self._closings: set[Future[Any]] = set()
        self._beginning = 0  # calls of begin that do wait
        _lifetimes.add(self)

    async def begin(self) -> None:
        before = (*self._openings, *self._closings)
        opening = _start_thread(partial(self._open, before), "contextuate_persist-init")
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)
        self._beginning += 1
        try:
            await asyncio.wrap_future(opening)
        except BaseException:
            self._beginning -= 1
            if not self._is_open and not self._beginning:
                # Cancelled, most likely: what opens now is closed by nobody, `__aexit__` is not
                # called after this.
                self._start_closing(partial(self._undo, opening))
            raise
        self._beginning -= 1
        self._is_open = True

    async def end(self, work: Callable[[], T]) -> T:
        self._is_open = False
        return await asyncio.wrap_future(self._start_closing(work))

    def forget(self) -> None:
        """In a forked child, which has none of the parent's threads."""
        self._openings, self._closings = set(), set()
        self._beginning = 0

    def _open(self, before: Iterable[Future[Any]]) -> None:
        # Whose callers may have left. Closings would close what is opened here; an opening would
        # open again what is closed since this one's caller left, too.
        wait(before)
        self._init()

    def _undo(self, opening: Future[None]) -> None:
        # One that failed has opened nothing: what is open then is another's, as a store that an
        # EventWriter shares and has opened since.
        if opening.exception() is None:
            self._close()

    def _start_closing(self, work: Callable[[], T]) -> Future[T]:
        closing = _start_thread(work, "contextuate_persist-close")
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        return closing


# What is documented at the twins for threads is said there only: help() and the reference find it
# here, too.
for _class, _twin in (
    (AsyncStore, PersistenceStore),
    (AsyncEventWriter, EventWriter),
    (AsyncReceipt, Receipt),
):
    for _name, _method in vars(_class).items():
        if not _name.startswith("_"):
            _method.__doc__ = _method.__doc__ or getattr(_twin, _name).__doc__


async def _called(outbox: Outbox, milestone: Milestone, number: int) -> None:
    """Wait for a milestone, which is passed in another thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def done() -> None:
        if not future.done():  # cancelled, perhaps
            future.set_result(None)

    def called() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(done)

    token = outbox.notify(milestone, number, called)
    try:
        await future
    finally:
        outbox.forget(milestone, token)


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.wrap_future(_start_thread(work, "contextuate_persist-writer"))


def _start_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Do the work in a thread of its own, to its end even if nobody waits any more."""
    future: Future[T] = Future()
    # An executor's future could be cancelled before its thread has begun.
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=copy_context().run, args=(run,), name=name).start()
    return future


def _next_events(events: Iterator[MonitorEvent]) -> list[MonitorEvent]:
    """The next few events; none at the end."""
    until = time.monotonic() + _VISIT_SECONDS
    visit: list[MonitorEvent] = []
    for event in events:
        visit.append(event)
        if len(visit) == _VISIT_EVENTS or time.monotonic() > until:
            break
    return visit


def _after_fork() -> None:  # pragma: no cover  (in a forked child)
    for lifetime in _lifetimes:
        lifetime.forget()
    for store in _stores:
        if store._threads is not None:  # noqa: SLF001  (the child has none of the parent's)
            store._threads = store._new_threads()  # noqa: SLF001


os.register_at_fork(after_in_child=_after_fork)
