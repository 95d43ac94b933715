"""AsyncStore: the same vocabulary as PersistenceStore, from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from contextuate_persist import (
    InvalidBatch,
    InvalidRecord,
    MonitorEvent,
    PersistenceStore,
    SessionNotFound,
    StoreClosed,
    StoreUnavailable,
    aio,
)
from contextuate_persist.aio import AsyncStore
from contextuate_persist.embedded import EmbeddedStore
from contextuate_persist.mysql_store import MySQLStore
from contextuate_persist.postgresql_store import PostgreSQLStore
from tests.builders import T0, event, session, usage
from tests.conftest import Database, make_store
from tests.test_connections import free_port, with_host

T = TypeVar("T")

EXAMPLE = Path(__file__).parents[1] / "examples" / "async_quickstart.py"


def run(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run; fails if an error went to the loop, since no caller asked for it any more."""
    reported: list[dict[str, Any]] = []

    async def watched() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        return await main

    result = asyncio.run(watched())
    gc.collect()
    assert reported == []
    return result


def open_async(database: Database, **options: Any) -> AsyncStore:
    return AsyncStore(make_store(database.url, **options))


def threads(name: str = "contextuate_persist") -> list[threading.Thread]:
    """Those of all stores: for calls, for opening and closing, of psycopg's pool."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


async def leave_and_open_again(
    store: AsyncStore, slow: Coroutine[Any, Any, None], proceed: threading.Event
) -> None:
    """Open a store while a call that nobody waits for any more goes on; it works, and is closed."""
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(slow, 0.05)
    again = asyncio.create_task(store.init())
    await asyncio.sleep(0.2)
    proceed.set()
    await again
    await asyncio.to_thread(wait_until, lambda: not threads("contextuate_persist-close"))
    assert await store.save_event(event()) is True
    await store.close()


@contextlib.contextmanager
def row_lock(database: Database, session_id: str) -> Iterator[Callable[[], None]]:
    """A session that others wait for until the lock ends, or the function that comes is called."""
    connection = database.server._connect(database.name)
    cursor = connection.cursor()
    cursor.execute("BEGIN")
    cursor.execute(f"UPDATE sessions SET label = 'held' WHERE session_id = '{session_id}'")
    released = threading.Lock()

    def release() -> None:
        if released.acquire(blocking=False):
            cursor.execute("ROLLBACK")

    try:
        yield release
    finally:
        release()
        connection.close()


# --- Signatures -----------------------------------------------------------------------------------

LIFE_CYCLE = {"__enter__": "__aenter__", "__exit__": "__aexit__"}


def public_methods(cls: type) -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_") or name in {*LIFE_CYCLE, *LIFE_CYCLE.values()}
    }


def shapes(function: Any) -> list[tuple[list[tuple[object, ...]], str]]:
    """Parameters (name, kind, default, annotation) and result, of the function and overloads."""
    # Before Python 3.11 overloads leave no trace at run time.
    overloads: list[Any] = getattr(typing, "get_overloads", lambda _: [])(function)
    signatures = map(inspect.signature, [function, *overloads])
    return [
        (
            [(p.name, p.kind, p.default, p.annotation) for p in signature.parameters.values()],
            re.sub(
                r"^Async(?:Generator\[(.*), None\])$", r"Iterator[\1]", signature.return_annotation
            ),
        )
        for signature in signatures
    ]


def test_the_async_store_has_the_same_methods_and_signatures_as_the_protocol() -> None:
    expected = {
        LIFE_CYCLE.get(name, name): shapes(function)
        for name, function in public_methods(PersistenceStore).items()
    }
    assert {name: shapes(f) for name, f in public_methods(AsyncStore).items()} == expected


def test_every_method_of_the_async_store_is_awaited_but_the_iteration() -> None:
    methods = public_methods(AsyncStore)
    assert not inspect.iscoroutinefunction(methods.pop("iter_events"))
    assert all(inspect.iscoroutinefunction(function) for function in methods.values())


@pytest.mark.parametrize("cls", [PostgreSQLStore, MySQLStore, EmbeddedStore])
def test_a_store_has_the_signatures_of_the_protocol(cls: type) -> None:
    own = public_methods(cls)
    for name, function in public_methods(PersistenceStore).items():
        assert shapes(own[name]) == shapes(function), name


def test_both_stores_have_the_same_methods() -> None:
    postgresql, mysql = public_methods(PostgreSQLStore), public_methods(MySQLStore)
    assert {n: shapes(f) for n, f in postgresql.items()} == {n: shapes(f) for n, f in mysql.items()}


# --- Calls ----------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(database: Database) -> None:
    async def main() -> None:
        async with open_async(database) as store:
            events = [event("s", T0 + i) for i in range(3)]
            assert await store.save_event(events[0]) is True
            assert await store.save_event(events[0]) is False
            assert await store.save_events(iter(events)) == 2
            result = await store.save_events([event("s", -1)], on_error="skip")
            assert (result.stored, len(result.refused)) == (0, 1)
            assert await store.get_events("s") == events
            assert await store.get_events("s", limit=1, before=events[2].timestamp) == [events[1]]
            assert await store.get_event_by_id("s", events[1].id) == events[1]
            assert await store.get_event_by_id("s", event().id) is None
            assert await store.get_all_recent_events(2) == [events[2], events[1]]
            assert await store.find_events(tool_name="Bash", newest_first=False) == events
            assert [found async for found in store.iter_events(session_id="s")] == events
            assert await store.event_counts("s") == {"tool_call": 3}

            await store.save_session(session("s", label="first"))
            await store.save_sessions(session(name, parent_session_id="s") for name in "ab")
            await store.update_session("s", is_pinned=True)
            got = await store.get_session("s")
            assert got is not None
            assert (got.label, got.is_pinned, got.child_session_ids) == ("first", True, ("a", "b"))
            children = await store.get_sessions(parent_session_id="s")
            assert {child.session_id for child in children} == {"a", "b"}
            tree = await store.session_tree("s")
            assert [(node.session.session_id, node.depth) for node in tree] == [
                ("s", 0),
                ("a", 1),
                ("b", 1),
            ]
            assert (await store.health()).backend == database.backend
            assert await store.save_usage("a", iter([usage("m"), usage("m")])) == 1
            await store.delete_session("a")
            assert await store.prune_old_sessions(T0) == 0
            assert await store.delete_all_sessions() == 2

    run(main())


def test_a_hundred_tasks_share_ten_connections(database: Database) -> None:
    async def task(store: AsyncStore, number: int) -> int:
        stored = 0
        for i in range(5):
            stored += await store.save_event(event(f"s{number % 7}", T0 + i))
            stored += await store.save_events([event(f"s{k}", T0 + i) for k in range(3)])
            await store.get_events(f"s{number % 7}", limit=5)
        return stored

    async def main() -> None:
        async with open_async(database, pool_size=10, pool_timeout=5) as store:
            assert sum(await asyncio.gather(*(task(store, n) for n in range(100)))) == 2000
            assert sum((await store.event_counts()).values()) == 2000
            assert 1 < len(threads("contextuate_persist-async")) <= 10
        wait_until(lambda: not threads())

    run(main())


def test_as_many_calls_as_connections_run_at_once(database: Database) -> None:
    async def main() -> None:
        async with open_async(database, pool_size=4) as store:
            all_at_once = threading.Barrier(4)
            await asyncio.gather(*(store._run(all_at_once.wait, 20) for _ in range(12)))

    run(main())


def test_other_code_that_fills_the_default_executor_holds_nothing_up(database: Database) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        leave = threading.Event()
        other = loop.run_in_executor(None, leave.wait, 30)
        async with open_async(database) as store:
            await store.save_event(event("s"))
            assert len([found async for found in store.iter_events()]) == 1
        assert not other.done()
        leave.set()
        await other

    run(main())


def test_the_loop_runs_on_while_the_database_waits(database: Database) -> None:
    async def main() -> None:
        async with open_async(database) as store:
            await store.save_session(session("s"))
            with row_lock(database, "s") as release:
                waiting = asyncio.create_task(store.update_session("s", label="mine"))
                for _ in range(20):
                    await asyncio.sleep(0.005)
                assert not waiting.done()
                release()
                await waiting

    run(main())


def test_context_variables_of_the_caller_are_seen(database: Database) -> None:
    variable = contextvars.ContextVar("variable", default="default")

    async def task(store: AsyncStore, value: str) -> bool:
        variable.set(value)
        return await store._run(variable.get) == value

    async def main() -> None:
        async with open_async(database, pool_size=2) as store:
            assert all(await asyncio.gather(*(task(store, str(n)) for n in range(10))))
            assert await store._run(variable.get) == "default"

    run(main())


def test_a_list_may_change_while_its_call_waits_for_its_turn(database: Database) -> None:
    async def main() -> None:
        async with open_async(database, pool_size=1) as store:
            proceed = threading.Event()
            running = asyncio.create_task(store._run(proceed.wait, 20))
            events, sessions = [event("s", T0 + i) for i in range(5)], [session("t")]
            saving = [
                asyncio.create_task(store.save_events(events)),
                asyncio.create_task(store.save_sessions(sessions)),
            ]
            await asyncio.sleep(0)
            events.clear()
            sessions.clear()
            proceed.set()
            await asyncio.gather(running, *saving)
            assert len(await store.get_events("s")) == 5
            assert await store.get_session("t") is not None

    run(main())


def test_errors_come_through_unchanged(database: Database) -> None:
    async def main() -> None:
        async with open_async(database) as store:
            with pytest.raises(SessionNotFound) as not_found:
                await store.update_session("nobody", label="x")
            assert not_found.value.session_id == "nobody"
            with pytest.raises(InvalidBatch) as bad:
                await store.save_events([event("s"), event("s", -1), event("")])
            assert [refusal.index for refusal in bad.value.refused] == [1, 2]
            with pytest.raises(InvalidRecord, match=r"^limit"):
                await store.get_events("s", limit=-1)
            with pytest.raises(InvalidRecord, match=r"^contains"):
                store.iter_events(contains={"a": 1})
            with pytest.raises(InvalidRecord, match=r"^events: a list is needed"):
                await store.save_events(5)  # type: ignore[call-overload]
            assert await store.event_counts() == {}

    run(main())


def test_an_absent_server_is_reported_and_nothing_stays_behind(backend: str) -> None:
    async def main() -> None:
        url = with_host(backend, "127.0.0.1", free_port())
        with pytest.raises(StoreUnavailable):
            async with AsyncStore(make_store(url, connect_timeout=2)):
                pytest.fail("it opened")

    run(main())
    wait_until(lambda: not threads())


# --- Cancellation ---------------------------------------------------------------------------------


def test_a_call_cancelled_in_the_middle_returns_at_once_and_the_store_goes_on(
    database: Database,
) -> None:
    async def main() -> None:
        async with open_async(database, pool_size=2) as store:
            await store.save_session(session("s"))
            with row_lock(database, "s"):
                update = asyncio.create_task(store.update_session("s", label="cancelled"))
                await asyncio.sleep(0.05)
                start = time.monotonic()
                update.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await update
                assert time.monotonic() - start < 0.5
                await store.save_event(event("t"))  # on the other connection
            await store.update_session("s", is_pinned=True)
            got = await store.get_session("s")
            assert got is not None
            assert got.is_pinned is True
            assert got.label in (None, "cancelled")
            # Both threads, and so both connections, are free again.
            both = threading.Barrier(2)
            await asyncio.gather(*(store._run(both.wait, 20) for _ in range(2)))
            assert (await store.health()).pool_in_use <= 1

    run(main())


def test_the_error_of_a_cancelled_call_is_reported_nowhere(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with open_async(database, lock_timeout=1) as store:
            await store.save_session(session("s"))
            with row_lock(database, "s"):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(store.update_session("s", label="x"), 0.05)
                await asyncio.sleep(1.5)  # meanwhile the lock timeout is over in the thread
            await store.update_session("s", label="y")

    run(main())
    assert caplog.records == []


def test_a_call_cancelled_before_its_turn_is_never_done(database: Database) -> None:
    async def main() -> None:
        async with open_async(database, pool_size=1) as store:
            await store.save_session(session("s"))
            with row_lock(database, "s"):
                first = asyncio.create_task(store.update_session("s", label="first"))
                second = asyncio.create_task(store.save_event(event("never")))
                await asyncio.sleep(0.05)
                second.cancel()
                # It must be gone before the lock is, or its turn may come first.
                with pytest.raises(asyncio.CancelledError):
                    await second
            await first
            assert await store.get_events("never") == []

    run(main())


def test_calls_cancelled_at_any_moment_lose_no_connection(database: Database) -> None:
    async def main() -> None:
        async with open_async(database, pool_size=3, pool_timeout=5) as store:
            for i in range(60):
                batch = [event(f"s{i % 5}", T0 + i) for _ in range(20)]
                task = asyncio.create_task(store.save_events(batch))
                await asyncio.sleep(0.0005 * (i % 12))
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                await store.save_events(batch)  # done or not, it may be sent again
            assert sum((await store.event_counts()).values()) == 1200
            assert (await store.health()).pool_in_use <= 1

    run(main())


def held_back(inner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let a method of a store or writer begin once the event is set."""
    proceed, method = threading.Event(), getattr(inner, name)

    def slow() -> None:
        proceed.wait(20)
        method()

    monkeypatch.setattr(inner, name, slow)
    return proceed


def test_a_cancelled_opening_leaves_nothing_open(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = make_store(database.url)
    proceed, opened = threading.Event(), threading.Event()
    init = inner.init

    def slow_init() -> None:
        proceed.wait(20)
        init()
        opened.set()

    monkeypatch.setattr(inner, "init", slow_init)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            async with contextlib.AsyncExitStack() as stack:
                await asyncio.wait_for(stack.enter_async_context(AsyncStore(inner)), 0.05)

    run(main())
    proceed.set()
    assert opened.wait(20)
    wait_until(lambda: not threads())
    with pytest.raises(StoreClosed):
        inner.get_events("s")


def test_an_opening_after_one_that_timed_out_stays_open(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = make_store(database.url)
    proceed = threading.Event()
    first = threading.Lock()
    init = inner.init

    def slow_at_first() -> None:
        if first.acquire(blocking=False):
            proceed.wait(20)
        init()

    monkeypatch.setattr(inner, "init", slow_at_first)

    async def main() -> None:
        store = AsyncStore(inner)
        await leave_and_open_again(store, store.init(), proceed)

    run(main())


def test_an_opening_that_failed_closes_nothing_that_another_has_opened_since(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EventWriter may share the store, and open it when the database is back."""
    inner = make_store(database.url)
    init = inner.init

    def too_early() -> None:
        init()
        raise StoreUnavailable("the database is away")

    monkeypatch.setattr(inner, "init", too_early)
    with pytest.raises(StoreUnavailable):
        run(AsyncStore(inner).init())
    wait_until(lambda: not threads("contextuate_persist-close"))
    assert inner.get_events("s") == []
    inner.close()


def test_a_cancelled_second_opening_leaves_the_store_open(database: Database) -> None:
    async def main() -> None:
        async with open_async(database) as store:
            again = asyncio.create_task(store.init())
            await asyncio.sleep(0)
            again.cancel()
            with pytest.raises(asyncio.CancelledError):
                await again
            await asyncio.sleep(0.05)
            assert await store.save_event(event()) is True

    run(main())


def test_of_two_openings_at_once_one_may_be_cancelled(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = make_store(database.url)
    proceed = held_back(inner, "init", monkeypatch)

    async def main(*, both: bool) -> None:
        proceed.clear()
        store = AsyncStore(inner)
        first, second = (asyncio.create_task(store.init()) for _ in range(2))
        await asyncio.sleep(0.05)
        for task in (first, second) if both else (first,):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        proceed.set()
        if both:
            return
        await second
        await asyncio.sleep(0.05)
        await store.save_event(event())
        await store.close()

    run(main(both=False))
    run(main(both=True))
    wait_until(lambda: not threads())
    with pytest.raises(StoreClosed):
        inner.get_events("s")


def test_a_cancelled_close_closes_all_the_same(database: Database) -> None:
    inner = make_store(database.url)

    async def main() -> None:
        store = AsyncStore(inner)
        await store.init()
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
        closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await closing

    run(main())
    wait_until(lambda: not threads())
    with pytest.raises(StoreClosed):
        inner.get_events("s")


def test_an_opening_after_a_cancelled_close_stays_open(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = make_store(database.url)
    proceed = held_back(inner, "close", monkeypatch)

    async def main() -> None:
        store = AsyncStore(inner)
        await store.init()
        await leave_and_open_again(store, store.close(), proceed)

    run(main())


# --- Iteration ------------------------------------------------------------------------------------


def test_an_iteration_gives_every_event_in_order(database: Database) -> None:
    async def main() -> None:
        async with open_async(database) as store:
            events = [event(f"s{i % 3}", T0 + i // 4) for i in range(1500)]
            await store.save_events(events)
            own = [e for e in events if e.session_id == "s1"]
            assert [e async for e in store.iter_events(session_id="s1")] == own
            every = [e.cursor async for e in store.iter_events()]
            assert len(every) == 1500
            assert every == sorted(every)
            assert [e async for e in store.iter_events(session_id="nobody")] == []

    run(main())


def test_an_iteration_may_be_left_at_any_time(database: Database) -> None:
    async def main() -> None:
        async with open_async(database, pool_size=1, pool_timeout=1) as store:
            await store.save_events([event("s", T0 + i) for i in range(600)])
            left = []
            for stop in (1, 32, 33, 599):
                iteration = store.iter_events()
                read = 0
                async for _ in iteration:
                    read += 1
                    if read == stop:
                        break
                assert len(await store.get_events("s", limit=3)) == 3  # nothing is held
                left.append(iteration)
            for iteration in left[:2]:
                await iteration.aclose()
                assert [e async for e in iteration] == []
            assert len([e async for e in left[2]]) == 600 - 33  # to leave it is not to end it
            async with contextlib.aclosing(store.iter_events()) as iteration:
                assert await iteration.__anext__()

    run(main())


def test_a_visit_to_a_thread_reads_few_events_and_fewer_where_they_are_large() -> None:
    assert len(aio._next_events(itertools.repeat(event()))) <= 256

    def large() -> Iterator[MonitorEvent]:
        while True:
            time.sleep(0.006)
            yield event()

    assert 1 <= len(aio._next_events(large())) <= 2
    assert aio._next_events(iter([])) == []


def test_an_iteration_cancelled_in_the_middle_of_a_page_leaves_the_store_working(
    database: Database,
) -> None:
    proceed = threading.Event()

    def slow() -> Iterator[MonitorEvent]:
        proceed.wait(20)
        yield event()

    async def main() -> None:
        async with open_async(database) as store:
            iteration = store._visits(slow())
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(iteration.__anext__(), 0.05)
            assert [e async for e in iteration] == []
            await store.save_event(event("s"))
            proceed.set()

    run(main())


def test_an_iteration_ends_with_store_closed_when_the_store_is_closed(database: Database) -> None:
    async def main() -> None:
        async with open_async(database) as store:
            await store.save_events([event("s", T0 + i) for i in range(600)])
            iteration = store.iter_events()
            await iteration.__anext__()
        with pytest.raises(StoreClosed):
            async for _ in iteration:
                pass

    run(main())


# --- Closing --------------------------------------------------------------------------------------


def test_a_store_that_is_not_open_says_so(database: Database) -> None:
    async def refused(store: AsyncStore) -> None:
        for call in (
            lambda: store.save_event(event()),
            lambda: store.save_events([]),
            lambda: store.get_session("s"),
            store.delete_all_sessions,
            store.health,
        ):
            with pytest.raises(StoreClosed):
                await call()
        with pytest.raises(StoreClosed):
            store.iter_events()

    async def main() -> None:
        store = open_async(database)
        await refused(store)
        await store.close()
        await store.init()
        await store.init()
        assert await store.save_event(event("s")) is True
        await store.close()
        await store.close()
        await refused(store)
        async with store:
            assert len(await store.get_events("s")) == 1
        await refused(store)

    run(main())


def test_constructing_connects_to_nothing_and_starts_no_thread() -> None:
    before = threading.active_count()
    store = AsyncStore(make_store("postgresql://someone:pa55word@127.0.0.1:1/nowhere"))
    assert threading.active_count() == before
    assert "127.0.0.1" in repr(store)
    assert "pa55word" not in repr(store)


def test_closing_waits_for_running_calls_and_refuses_those_that_wait(database: Database) -> None:
    async def main() -> None:
        store = open_async(database, pool_size=1)
        await store.init()
        await store.save_session(session("s"))
        with row_lock(database, "s") as release:
            running = asyncio.create_task(store.update_session("s", label="mine"))
            waiting = [asyncio.create_task(store.save_event(event("t"))) for _ in range(3)]
            await asyncio.sleep(0.05)
            asyncio.get_running_loop().call_later(0.3, release)
            await store.close()
            assert running.done()
            await running
            assert [type(e) for e in await asyncio.gather(*waiting, return_exceptions=True)] == [
                StoreClosed
            ] * 3

    run(main())
    with make_store(database.url) as store:
        got = store.get_session("s")
        assert got is not None
        assert got.label == "mine"
        assert store.get_events("t") == []


def test_closing_does_not_wait_for_ever(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "CLOSE_SECONDS", 0.2)

    async def main() -> None:
        store = open_async(database)
        await store.init()
        await store.save_session(session("s"))
        with row_lock(database, "s"):
            running = asyncio.create_task(store.update_session("s", label="mine"))
            await asyncio.sleep(0.05)
            start = time.monotonic()
            await store.close()
            assert time.monotonic() - start < 3
            assert not running.done()
        with contextlib.suppress(StoreClosed):
            await running

    run(main())
    wait_until(lambda: not threads())


# --- Loops and processes --------------------------------------------------------------------------


def test_an_open_store_serves_one_loop_after_the_other(database: Database) -> None:
    store = open_async(database)

    async def first() -> None:
        await store.init()
        assert await store.save_event(event("s", T0)) is True
        task = asyncio.create_task(store.save_event(event("s", T0 + 1)))
        await asyncio.sleep(0)  # left unfinished: the end of the loop cancels it
        del task

    async def second() -> None:
        async with store:
            assert await store.save_event(event("s", T0 + 2)) is True
            assert len(await store.get_events("s")) in (2, 3)

    run(first())
    run(second())

    async def third() -> None:
        async with open_async(database) as another:
            assert len(await another.get_events("s")) in (2, 3)

    run(third())


def test_a_forked_child_uses_threads_of_its_own(database: Database) -> None:
    store = open_async(database, pool_size=2)

    async def use(name: str, count: int) -> int:
        await asyncio.gather(*(store.save_event(event(name, T0 + i)) for i in range(count)))
        return len(await store.get_events(name))

    async def opened() -> int:
        await store.init()
        return await use("parent", 10)

    assert run(opened()) == 10
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover  (another process)
        verdict = b"failed"
        signal.alarm(30)  # ends it, should it hang
        try:
            verdict = b"%d" % asyncio.run(use("child", 20))
            asyncio.run(store.close())
        finally:
            os.write(write, verdict)
            os._exit(0)
    os.close(write)
    assert run(use("parent", 10)) == 20
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"20"
    os.waitpid(child, 0)
    assert run(use("parent", 10)) == 30
    run(store.close())
    wait_until(lambda: not threads())


def test_the_example_runs(database: Database) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE)],
        env={**os.environ, "CONTEXTUATE_DATABASE_URL": database.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "stored 100 events",
        *(f"{step} make step-{step}" for step in range(5)),
    ]
