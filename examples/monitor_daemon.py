"""A monitor daemon: stores what hooks tell, keeps sessions up to date, answers questions.

Hooks leave files in the inbox (`emit_event.py`). On the unix socket each line is a request in JSON,
and so is the answer: {"do": "sessions"}, {"do": "events", "session": ID, "limit": 50, "before":
CURSOR}, {"do": "event", "session": ID, "id": ID}, {"do": "recent"}, {"do": "tree"}, {"do":
"health"}, {"do": "set", "session": ID, "label": TEXT, "isPinned": true}, {"do": "delete",
"session": ID}, {"do": "hook", "payload": {...}, "id": UUID, "capturedAt": MS}. With the last
two a client may tell again what it got no answer to. After SIGTERM the next start goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from contextuate_persist import (
    AsyncEventWriter,
    AsyncReceipt,
    AsyncStore,
    ConfigurationError,
    Cursor,
    EventWriter,
    InvalidRecord,
    MonitorEvent,
    PersistenceError,
    SessionNotFound,
    StorageFull,
    StoreRefused,
    StoreUnavailable,
    open_store,
    payload,
)
from contextuate_persist.console import without_passwords
from contextuate_persist.hooks import STREAMING, Capture, hook_event
from contextuate_persist.inbox import Inbox, default_inbox
from contextuate_persist.lifecycle import SessionState, usage_path
from contextuate_persist.model import SESSION_WIRE
from contextuate_persist.spool import spool_state
from contextuate_persist.transcripts import UsageReading, read_usage
from contextuate_persist.writer import default_spool

T = TypeVar("T")
HOME = Path(os.path.expanduser("~/.contextuate/monitor"))
log = logging.getLogger("monitor_daemon")
LOOK_SECONDS = 0.1  # between looks into the inbox
AGAIN_SECONDS = 2.0  # between tries while the database is away, or the disk is full
DAY = 86_400_000  # ms
KNOWN_SESSIONS = 10_000  # whose state is kept in memory
CAUGHT_UP = 2_000  # sessions that run here, and events, which are looked at when it starts
TOLD_BY = 200  # events of a session at most that say what it has been told
PAGE = 50  # events at once, since each may have a payload of many megabytes
READ_SECONDS = 20.0  # for a transcript
# The database is away, full or unwilling, altogether or for one session.
PASSING = (StoreUnavailable, StoreRefused, StorageFull)
BY_PEOPLE = ("label", "is_pinned", "hidden", "manual_parent_session_id")
SETTABLE = {SESSION_WIRE[name]: name for name in BY_PEOPLE}

# What events tell their session once they are stored, and the transcripts to read then.
News = tuple[SessionState, frozenset[str]]
NO_NEWS: News = (SessionState(), frozenset())


def redact(event: MonitorEvent) -> MonitorEvent:
    """Say what may be kept of an event; schemas/README.md has one that takes secrets out."""
    return event


class Monitor:
    """The daemon's parts: an inbox, a writer, a store, and what it knows of sessions."""

    def __init__(
        self, url: str | None, inbox: Path, spool: Path, machines: Iterable[str] = ()
    ) -> None:
        store = open_store(url)
        self.store = AsyncStore(store)
        self.spool = spool
        self.writer = AsyncEventWriter(EventWriter(store, spool_directory=spool))
        self.inbox = Inbox(inbox)
        # What hooks call this machine, and containers that leave their files here.
        named = (os.environ.get("HOSTNAME"), socket.gethostname(), *machines)
        self._machines = {name for name in named if name}
        self._states: dict[str, SessionState] = {}
        self._offsets: dict[str, int] = {}
        self._stuck: set[str] = set()  # transcripts that are not read any more
        # Not the events: while the database is away, there may be more than fit into memory.
        self._news: dict[str, News] = {}
        self._last: AsyncReceipt | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, stop: asyncio.Event, path: Path) -> None:
        """Take what comes and answer on the socket until told to stop, then close in order.

        So it does where its work ends for another reason: a defect, and whoever started it should
        begin anew.
        """
        require_unused(path)
        with self.inbox:
            left = await asyncio.to_thread(spool_state, self.spool)
            async with self.writer:
                # Replaces a socket that is there, of a daemon that was killed, but no other file.
                server = await asyncio.start_unix_server(self.serve, path, limit=2**26)
                ours = path.stat().st_ino
                parts = (self._take_files(), self._follow(left.oldest))
                work = [self._begin(one) for one in parts]
                told = self._begin(stop.wait())
                await asyncio.wait([told, *work], return_when=asyncio.FIRST_COMPLETED)
                server.close()
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_ino == ours:
                        path.unlink()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.store.close()

    def _begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task failed", exc_info=error)

    # --- What hooks tell --------------------------------------------------------------------------

    async def _take_files(self) -> None:
        failing = False
        while True:
            try:
                for name, content in self.inbox.take():
                    await self._take_file(name, content)
            except (OSError, PersistenceError) as error:  # a full disk, a full spool
                if not failing:
                    log.warning("files stay in the inbox: %s", error)
                failing = True
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                failing = False
                await asyncio.sleep(LOOK_SECONDS)

    async def _take_file(self, name: str, content: bytes) -> None:
        try:
            await self.take(Capture.parse(content).to_event(), name)
        except InvalidRecord as error:
            self.inbox.set_aside(name, str(error))
        except PersistenceError:
            self.inbox.give_back(name)
            raise

    async def take(self, event: MonitorEvent, name: str | None = None) -> AsyncReceipt | None:
        """Hand an event over; a file's goes once the event is safe. None if nobody wants it."""
        if event.hook_type in STREAMING:
            if name is not None:
                self.inbox.done(name)
            return None
        # Not by the writer, which would not tell: a session has its title from events, too.
        event = _redacted(event)
        if name is not None:
            # A dead letter tells an endless payload in part; its file has all of it, and stays.
            payload.encode(event.data)
        self._last = receipt = await self.writer.put(event)
        self._note(event)
        if name is not None:
            self._begin(self._remove(name, receipt))
        return receipt

    async def _remove(self, name: str, receipt: AsyncReceipt) -> None:
        if await receipt.wait_safe():
            self.inbox.done(name)

    # --- Sessions follow their events -------------------------------------------------------------

    def _note(self, event: MonitorEvent) -> None:
        path = usage_path(event)
        self._add(event.session_id, (SessionState.of(event), frozenset({path} if path else ())))

    def _add(self, session_id: str, news: News) -> None:
        known = self._news.get(session_id, NO_NEWS)
        self._news[session_id] = (known[0] | news[0], known[1] | news[1])

    async def _follow(self, left_since: int | None) -> None:
        """Let sessions know what their events tell, once these are stored."""
        # A private database that is to be made on a full disk raises OSError.
        await _patiently(self.store.init, (PersistenceError, OSError))
        self._begin(self._catch_up(left_since))
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            news, self._news = self._news, {}
            if self._last is not None:
                await self._last.wait_stored()
            troubles = [error for one in news.items() if (error := await self._tell(*one))]
            if troubles:
                log.warning(
                    "%d sessions do not follow their events yet: %s", len(troubles), troubles[0]
                )
                await asyncio.sleep(AGAIN_SECONDS)

    async def _catch_up(self, left_since: int | None) -> None:
        """Note what an earlier process has stored, or left in the spool, and told no session."""
        await self.writer.flush()
        looks = [self._note_running, self._note_recent]
        if left_since is not None:
            # What was spooled then may have lain in the inbox before.
            looks.append(lambda: self._note_after(left_since - DAY))
        for look in looks:  # each on its own: a stored event that is damaged ends but one
            self._begin(_patiently(look, PASSING))

    async def _note_running(self) -> None:
        # Those of other machines are for the daemons there: each that starts would read them all.
        for machine in self._machines:
            for session in await self.store.get_sessions(
                status="active", machine_id=machine, limit=CAUGHT_UP
            ):
                self._add(session.session_id, NO_NEWS)

    async def _note_recent(self) -> None:
        await self._each(self._note, CAUGHT_UP)

    async def _each(self, take: Callable[[MonitorEvent], None], limit: int, **filters: Any) -> None:
        """Take the newest events that match, page by page."""
        for start in range(0, limit, PAGE):
            page = await self.store.find_events(limit=min(PAGE, limit - start), **filters)
            for event in page:
                take(event)
            if len(page) < PAGE:
                return
            filters["before"] = page[-1].cursor

    async def _note_after(self, when: int) -> None:
        async for event in self.store.iter_events(after=when):
            self._note(event)

    async def _tell(self, session_id: str, news: News) -> Exception | None:
        """Tell a session its news; what it cannot be told just now stays news, and this is why.

        One session's trouble is not another's.
        """
        state, paths = news
        try:
            session = await self.store.get_session(session_id)
            known = self._states.pop(session_id, None)
            if known is None:
                known, more = await self._stored_news(session_id)
                paths |= more
                # What a person, or another daemon, tells it while that is read is not taken back.
                if await self.store.get_session(session_id) != session:
                    self._add(session_id, (state, paths))
                    return None
            if session is None:  # deleted, and what it was told goes with it
                return None
            state |= known
            if len(self._states) >= KNOWN_SESSIONS:
                self._states.clear()  # what is needed again is read again
            self._states[session_id] = state
            if fields := state.updates(session):
                await self.store.update_session(session_id, **fields)
            for path in paths:
                await self._count_tokens(session_id, path)
        except SessionNotFound:  # deleted just now, and nothing newer came
            self._states.pop(session_id, None)
        except PASSING as error:
            self._add(session_id, (state, paths))
            return error
        except Exception:
            log.exception("session %s does not follow its events", ascii(session_id))
        return None

    async def _stored_news(self, session_id: str) -> News:
        """What the newest stored events of a session tell."""
        state, paths = NO_NEWS

        def take(event: MonitorEvent) -> None:
            nonlocal state, paths
            state |= SessionState.of(event)
            paths |= {path} if (path := usage_path(event)) else frozenset()

        await self._each(take, TOLD_BY, session_id=session_id)
        return state, paths

    async def _count_tokens(self, session_id: str, path: str) -> None:
        if path in self._stuck:
            return

        def read() -> UsageReading | None:
            with contextlib.suppress(OSError):  # somebody else's file: no reason to stumble
                return read_usage(path, self._offsets.get(path, 0))
            return None

        try:
            reading = await asyncio.wait_for(_apart(read), READ_SECONDS)
        except asyncio.TimeoutError:
            # Its file system does not answer, and a thread waits there for ever.
            self._stuck.add(path)
            log.warning("%s: no more usage is read: nothing came in time", ascii(path))
            return
        if reading is not None:
            await self.store.save_usage(session_id, reading.usages)
            self._offsets[path] = reading.offset

    # --- Questions --------------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the lines of one client."""
        with contextlib.suppress(ConnectionError, asyncio.LimitOverrunError, ValueError):
            while line := await reader.readline():
                try:
                    answer = await self._answer(json.loads(line))
                except (PersistenceError, ValueError, TypeError, KeyError, AttributeError) as error:
                    answer = {"error": f"{type(error).__name__}: {error}"}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        store, do, limit = self.store, request["do"], request.get("limit", 100)
        session_id = request.get("session", "")
        if do == "hook":
            event = hook_event(
                request["payload"],
                captured_at=request.get("capturedAt", time.time_ns() // 1_000_000),
                machine_id=socket.gethostname(),
                event_id=request.get("id"),
            )
            receipt = await self.take(event)
            return {"safe": receipt is None or await receipt.wait_safe()}
        if do == "sessions":
            return {"sessions": [one.to_wire() for one in await store.get_sessions(limit=limit)]}
        if do == "tree":
            nodes = await store.session_tree(request.get("session"))
            return {"tree": [{"depth": node.depth, **node.session.to_wire()} for node in nodes]}
        if do == "events":
            bounds = {k: Cursor.parse(request[k]) for k in ("before", "after") if k in request}
            return {"events": _listed(await store.get_events(session_id, limit=limit, **bounds))}
        if do == "recent":
            return {"events": _listed(await store.get_all_recent_events(limit))}
        if do == "event":
            one = await store.get_event_by_id(session_id, request["id"])
            return {"event": one and one.to_wire()}
        if do == "health":
            return dataclasses.asdict(self.writer.health())
        if do == "set":
            fields: Any = {SETTABLE[key]: request[key] for key in request.keys() & SETTABLE.keys()}
            await store.update_session(session_id, **fields)
        elif do == "delete":
            await store.delete_session(session_id)
            self._states.pop(session_id, None)
        else:
            raise ValueError(f"nobody knows how to do {do!r}")
        return {"done": True}


def _redacted(event: MonitorEvent) -> MonitorEvent:
    try:
        return redact(event)
    except Exception as error:  # without its words, which may be the event's
        raise InvalidRecord(f"event: redact failed: {type(error).__name__}") from None


async def _apart(work: Callable[[], T]) -> T:
    """As asyncio.to_thread, in a thread that waits for no other, nor anybody for it at the end."""
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(outcome)


async def _patiently(
    work: Callable[[], Awaitable[object]], passing: tuple[type[Exception], ...]
) -> None:
    """Do something with the database, again after errors that may pass."""
    while True:
        try:
            await work()
        except passing as error:
            log.warning("trying again: %s", error)
            await asyncio.sleep(AGAIN_SECONDS)
        else:
            return


def require_unused(path: Path) -> None:
    """Raise ConfigurationError if somebody answers on this socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            client.connect(str(path))
            raise ConfigurationError(f"{path}: another daemon answers there: stop it")


def _listed(events: list[MonitorEvent]) -> list[dict[str, Any]]:
    return [{**event.to_wire(), "cursor": str(event.cursor)} for event in events]


async def main(args: argparse.Namespace) -> int:
    os.umask(0o077)  # for the socket; while there are no threads yet, which would share a change
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    args.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    await Monitor(args.url, args.inbox, args.spool, args.machine).run(stop, args.socket)
    return 0 if stop.is_set() else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="the database; without it what open_store() takes")
    parser.add_argument(
        "--machine",
        action="append",
        default=[],
        metavar="ID",
        help="a container, for instance, whose hooks leave their files in this inbox; repeatable",
    )
    places = {
        "--inbox": default_inbox(),
        "--spool": default_spool(),
        "--socket": HOME / "daemon.sock",
    }
    for name, default in places.items():
        parser.add_argument(name, type=Path, default=default)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    given = parser.parse_args()
    if given.url and without_passwords(given.url) != given.url:
        log.warning("everybody can see the password: put the URL into CONTEXTUATE_DATABASE_URL")
    try:
        sys.exit(asyncio.run(main(given)))
    except (PersistenceError, OSError) as error:
        sys.exit(f"monitor_daemon: {error}")
