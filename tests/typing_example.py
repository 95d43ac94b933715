"""Code as users write it, never executed: test_typing.py has mypy and pyright read it.

A line with `type: ignore` is a mistake that both have to find: both are told to report an ignored
line that has nothing wrong with it.
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from typing_extensions import assert_type

from contextuate_persist import (
    AsyncEventWriter,
    AsyncReceipt,
    Cursor,
    EventWriter,
    Forgotten,
    Health,
    InvalidBatch,
    MessageUsage,
    MonitorEvent,
    PayloadPolicy,
    PersistenceError,
    PersistenceStore,
    Receipt,
    SaveResult,
    SessionMeta,
    SessionNode,
    SessionNotFound,
    SessionStatus,
    TokenUsage,
    WriterHealth,
    open_store,
)
from contextuate_persist.aio import AsyncStore
from contextuate_persist.embedded import EmbeddedStore
from contextuate_persist.mysql_store import MySQLStore
from contextuate_persist.postgresql_store import PostgreSQLStore

STORES: list[PersistenceStore] = [
    PostgreSQLStore("postgresql:///monitor", prepare_threshold=None, pool_size=4),
    MySQLStore("mysql://localhost/monitor", lock_timeout=2.5),
    EmbeddedStore(),
    open_store(),
]


def new_event(session_id: str, timestamp: int, data: dict[str, Any]) -> MonitorEvent:
    return MonitorEvent(
        id="6d2ae2c5-7a4c-4b3e-9f0e-0d5c1f1e2a3b",
        session_id=session_id,
        timestamp=timestamp,
        machine_id="laptop",
        working_directory="/home/dev/shop",
        event_type="tool_call",
        hook_type="PreToolUse",
        data=data,
    )


def new_session(session_id: str) -> SessionMeta:
    return SessionMeta(
        session_id=session_id,
        machine_id="laptop",
        working_directory="/home/dev/shop",
        start_time=1_700_000_000_000,
        token_usage=TokenUsage(total_input=3),
    )


def use(store: PersistenceStore) -> None:
    event = new_event("s", 1_700_000_000_000, {"toolName": "Bash"})
    assert_type(store.save_event(event), bool)
    assert_type(store.save_events([event]), int)
    assert_type(store.save_events((event,), on_error="raise", undelete=True), int)
    assert_type(store.save_events({event}, on_error="skip"), SaveResult)
    assert_type(store.get_events("s", limit=10, after=event.cursor), list[MonitorEvent])
    assert_type(store.get_event_by_id("s", event.id), MonitorEvent | None)
    assert_type(store.find_events(tool_name="Bash", contains={"a": [1]}), list[MonitorEvent])
    assert_type(store.iter_events(after=Cursor(1_700_000_000_000, 0)), Iterator[MonitorEvent])
    assert_type(store.event_counts(), dict[str, int])

    store.save_sessions(new_session(name) for name in ("a", "b"))
    store.update_session("a", status="completed", end_time=1_700_000_000_001, label=None)
    store.update_session("a", status=SessionStatus.ERROR, child_session_ids=["b"])
    assert_type(store.get_session("a"), SessionMeta | None)
    assert_type(store.get_sessions(status="active", hidden=False), list[SessionMeta])
    assert_type(store.session_tree(), list[SessionNode])
    assert_type(store.prune_old_sessions(older_than=1_700_000_000_000), int)
    assert_type(store.forget(machine_id="laptop", dry_run=True), Forgotten)
    usage = MessageUsage(message_id="msg_1", timestamp=1_700_000_000_000, output_tokens=5)
    assert_type(store.save_usage("a", [usage]), int)
    assert_type(store.health(), Health)
    for session, depth in store.session_tree("a"):
        print("  " * depth, session.effective_parent_id, session.token_usage.total_input + 1)

    store.save_event({"id": "1"})  # type: ignore[arg-type]
    store.save_events([event], on_error="ignore")  # type: ignore[call-overload]
    store.get_events("s", 10)  # type: ignore[call-arg]
    print(store.get_session("a").label)  # type: ignore[union-attr]
    store.update_session("a", lable="x")  # type: ignore[call-arg]
    store.update_session("a", status="done")  # type: ignore[arg-type]
    store.update_session("a", session_id="b")  # type: ignore[misc]
    event.timestamp = 0  # type: ignore[misc]


def report(url: str) -> int | None:
    try:
        with open_store(url, pool_size=2) as store:
            use(store)
            return store.delete_all_sessions()
    except SessionNotFound as error:
        print(error.session_id)
    except InvalidBatch as error:
        print([(refusal.index, refusal.id) for refusal in error.refused], error.stored)
    except PersistenceError as error:
        print(error)
    return None


async def use_async(store: AsyncStore) -> None:
    event = new_event("s", 1_700_000_000_000, {"toolName": "Bash"})
    assert_type(await store.save_event(event), bool)
    assert_type(await store.save_events([event]), int)
    assert_type(await store.save_events([event], on_error="skip"), SaveResult)
    assert_type(await store.get_event_by_id("s", event.id), MonitorEvent | None)
    assert_type(store.iter_events(session_id="s"), AsyncGenerator[MonitorEvent, None])
    await store.update_session("a", status="completed", is_pinned=True)
    async for found in store.iter_events(session_id="s"):
        assert_type(found, MonitorEvent)
    async with contextlib.aclosing(store.iter_events()) as events:
        print(await events.__anext__())
    counts, session = await asyncio.gather(store.event_counts(), store.get_session("s"))
    assert_type(counts, dict[str, int])
    assert_type(session, SessionMeta | None)

    await store.save_events([event], on_error="ignore")  # type: ignore[call-overload]
    await store.update_session("a", lable="x")  # type: ignore[call-arg]
    list(store.iter_events())  # type: ignore[call-overload]
    print(store.get_session("s").label)  # type: ignore[attr-defined]


def use_writer(store: MySQLStore) -> None:
    def redact(event: MonitorEvent) -> MonitorEvent:
        return event

    with EventWriter(
        store,
        spool="on_failure",
        redact=redact,
        policy=PayloadPolicy(max_bytes=10_000),
        metrics=lambda health: print(health.pending),
    ) as writer:
        receipt = writer.put(new_event("s", 1_700_000_000_000, {}))
        assert_type(receipt, Receipt)
        assert_type(receipt.wait_safe(1.5), bool)
        receipt.on_stored(lambda receipt: print(receipt.refusal))
        writer.update_session("s", label="x")
        assert_type(writer.flush(5), int)
        assert_type(writer.health(), WriterHealth)

        writer.update_session("s", lable="x")  # type: ignore[call-arg]
        writer.put({"id": "x"})  # type: ignore[arg-type]
    EventWriter(store, spool="never")  # type: ignore[arg-type]


async def main() -> None:
    async with AsyncStore(open_store()) as store:
        await use_async(store)
    async with AsyncEventWriter(EventWriter(MySQLStore("mysql://localhost/monitor"))) as writer:
        receipt = await writer.put(new_event("s", 1_700_000_000_000, {}))
        assert_type(receipt, AsyncReceipt)
        assert_type(await receipt.wait_stored(), bool)
