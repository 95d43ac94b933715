"""The monitor daemon: from hook payloads to rows, through kills of the daemon and the database."""

from __future__ import annotations

import asyncio
import base64
import errno
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import (
    AsyncStore,
    ConfigurationError,
    EventWriter,
    MonitorEvent,
    PersistenceError,
    StoreUnavailable,
    inbox,
    open_store,
)
from contextuate_persist.base import BaseStore
from contextuate_persist.dead_letters import DeadLetters
from contextuate_persist.hooks import hook_event, new_event_id, payload_of, session_key
from examples import monitor_daemon
from examples.monitor_daemon import Monitor
from tests.builders import T0
from tests.conftest import Database
from tests.test_poison import REFUSE, trigger

ROOT = Path(__file__).parent.parent
NOWHERE = "postgresql://127.0.0.1:1/nobody?connect_timeout=1"
#: Become the program, which ends with this process, however that ends (PR_SET_PDEATHSIG).
ENDS_WITH_US = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Daemon:
    """The program, on an inbox, a spool and a socket of its own."""

    def __init__(self, url: str, place: Path) -> None:
        self.url, self.place = url, place
        self.inbox, self.socket = place / "inbox", place / "s"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        places = {"--inbox": self.inbox, "--spool": self.place / "spool", "--socket": self.socket}
        arguments = [str(word) for option in places.items() for word in option]
        program = str(ROOT / "examples" / "monitor_daemon.py")
        with (self.place / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", ENDS_WITH_US, program, *arguments],
                env={**os.environ, "CONTEXTUATE_DATABASE_URL": self.url},
                stderr=log,
            )
        if wait:
            eventually(lambda: self.ask(do="health"))

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def ask(self, **request: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(self.socket))
            client.sendall(json.dumps(request).encode() + b"\n")
            with client.makefile("rb") as answers:
                answer: dict[str, Any] = json.loads(answers.readline())
                return answer

    def log(self) -> str:
        return (self.place / "log").read_text()


def eventually(check: Any, seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while True:
        try:
            if (found := check()) not in (False, None):
                return found
        except (OSError, ValueError, AttributeError, AssertionError):
            if time.monotonic() > until:
                raise
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def daemon(database: Database, tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(database.url, tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose database is away."""
    made = Daemon(NOWHERE, tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def file_of(payload: dict[str, Any], at: int) -> bytes:
    raw = json.dumps(payload, ensure_ascii=True).encode()
    told = {
        "id": new_event_id(at),
        "capturedAt": at,
        "machineId": "laptop",
        "parentSession": None,
        "payload": base64.b64encode(raw).decode(),
    }
    return json.dumps(told).encode()


def a_day(sessions: int = 3, tools: int = 10) -> list[dict[str, Any]]:
    """Payloads as Claude Code sends them: sessions with prompts, tools and a sub-agent each."""
    payloads: list[dict[str, Any]] = []
    for number in range(sessions):
        session = f"5c0e{number:04d}-0000-4000-8000-000000000000"
        agent = f"a{number:016x}"
        common = {"session_id": session, "cwd": f"/home/dev/p{number}", "transcript_path": "/t"}

        def add(name: str, **fields: Any) -> None:
            payloads.append({**common, "hook_event_name": name, **fields})  # noqa: B023

        add("SessionStart", source="startup", model="claude-opus-4-5")
        add("UserPromptSubmit", prompt="Fix the total \ud83d", session_title=f"Total {number}")
        add("SubagentStart", agent_id=agent, agent_type="Explore")
        for use in range(tools):
            call = {"tool_name": "Bash", "tool_use_id": f"toolu_{number}_{use}"}
            inside = {"agent_id": agent, "agent_type": "Explore"} if use % 2 else {}
            add("PreToolUse", **call, **inside, tool_input={"command": f"ls {2**70}"})
            add("PostToolUse", **call, **inside, tool_input={}, tool_response={"stdout": "\0"})
        add("SubagentStop", agent_id=agent, agent_type="Explore", stop_hook_active=False)
        add("Stop", stop_hook_active=False, last_assistant_message="Done")
        if number % 2 == 0:
            add("SessionEnd", reason="prompt_input_exit")
    return payloads


def require_all(store: BaseStore, payloads: list[dict[str, Any]]) -> None:
    """Every payload is there, equal, once; the sessions are what the hooks say."""
    events = list(store.iter_events())
    assert len({event.id for event in events}) == len(events)
    rebuilt = sorted(json.dumps(payload_of(event), sort_keys=True) for event in events)
    assert rebuilt == sorted(json.dumps(payload, sort_keys=True) for payload in payloads)
    expected: dict[str, str | None] = {}
    for payload in payloads:
        key = session_key(payload["session_id"], payload.get("agent_id"))
        expected[key] = payload["session_id"] if "agent_id" in payload else None
    found = {session.session_id: session.parent_session_id for session in store.get_sessions()}
    assert found == expected


def told(store: BaseStore, name: str) -> tuple[str | None, ...]:
    """What hooks have told about a session."""
    found = store.get_session(name)
    assert found is not None
    return (found.status.value, found.label, found.model, found.agent_type)


def test_a_day_of_hooks_becomes_sessions_and_events(daemon: Daemon, store: BaseStore) -> None:
    payloads = a_day()
    daemon.start()
    for n, payload in enumerate(payloads):
        inbox.leave(daemon.inbox, file_of(payload, T0 + n))
    eventually(lambda: daemon.ask(do="health")["stored"] == len(payloads))
    require_all(store, payloads)
    eventually(lambda: {s.status for s in store.get_sessions()} == {"active", "completed"})
    ended, running = (f"5c0e{n:04d}-0000-4000-8000-000000000000" for n in (0, 1))
    eventually(lambda: store.get_session(ended).status == "completed")  # type: ignore[union-attr]
    expected = ("active", "Total 1", "claude-opus-4-5", None)
    eventually(lambda: told(store, running) == expected)
    eventually(lambda: told(store, f"a{1:016x}") == ("completed", None, None, "Explore"))
    assert not [path for path in daemon.inbox.iterdir() if path.suffix == ".json"]
    assert daemon.stop() == 0
    assert "ERROR" not in daemon.log()


def test_questions_are_answered_and_people_may_change_sessions(
    daemon: Daemon, store: BaseStore
) -> None:
    daemon.start()
    for payload in a_day(sessions=1, tools=2):
        assert daemon.ask(do="hook", payload=payload) == {"safe": True}
    eventually(lambda: daemon.ask(do="health")["pending"] == 0)
    [root] = [s for s in daemon.ask(do="sessions")["sessions"] if "parentSessionId" not in s]
    name = root["sessionId"]
    eventually(lambda: told(store, name)[:2] == ("completed", "Total 0"))
    events = daemon.ask(do="events", session=name, limit=3)["events"]
    assert [event["eventType"] for event in events][-1] == "session_end"
    before = daemon.ask(do="events", session=name, limit=50, before=events[0]["cursor"])["events"]
    assert before[-1]["id"] != events[0]["id"]
    assert (
        daemon.ask(do="event", session=name, id=events[0]["id"])["event"]["id"] == events[0]["id"]
    )
    assert daemon.ask(do="event", session=name, id=new_event_id(T0)) == {"event": None}
    assert len(daemon.ask(do="recent", limit=4)["events"]) == 4
    assert [node["depth"] for node in daemon.ask(do="tree")["tree"]] == [0, 1]
    assert daemon.ask(do="set", session=name, label="Mine", isPinned=True) == {"done": True}
    daemon.ask(do="hook", payload={**a_day(1)[1], "session_title": "Another"})
    eventually(lambda: daemon.ask(do="health")["pending"] == 0)
    eventually(lambda: told(store, name)[0] == "active")
    found = store.get_session(name)
    assert found is not None
    assert (found.label, found.is_pinned) == ("Mine", True)
    assert daemon.ask(do="delete", session=name) == {"done": True}
    assert daemon.ask(do="delete", session=name)["error"].startswith("SessionNotFound")
    assert "nobody knows how" in daemon.ask(do="dance")["error"]
    assert daemon.ask(do="hook", payload={"session_id": ""})["error"].startswith("InvalidRecord")
    assert "KeyError" in daemon.ask(please="x")["error"]
    assert daemon.socket.stat().st_mode & 0o077 == 0


def test_a_hook_that_is_told_again_by_its_id_is_one_event(daemon: Daemon, store: BaseStore) -> None:
    daemon.start()
    name, when = new_event_id(T0), T0 + 7
    payload = {"session_id": "s", "hook_event_name": "UserPromptSubmit", "prompt": "x"}
    for given in (name, name.upper()):  # the first answer was lost
        told_of = daemon.ask(do="hook", payload=payload, id=given, capturedAt=when)
        assert told_of == {"safe": True}
    eventually(lambda: daemon.ask(do="health")["pending"] == 0)
    assert [(one.id, one.timestamp) for one in store.get_events("s")] == [(name, when)]
    for field, value in (("id", "mine"), ("id", 5), ("capturedAt", "today"), ("capturedAt", 1)):
        answer = daemon.ask(do="hook", payload=payload, **{field: value})
        assert answer["error"].startswith("InvalidRecord")


LINE = {
    "type": "assistant",
    "timestamp": "2026-01-05T09:00:00.000Z",
    "message": {"id": "m1", "usage": {"input_tokens": 10, "output_tokens": 5}},
}


def tokens(store: BaseStore, name: str) -> tuple[int, int]:
    found = store.get_session(name)
    assert found is not None
    return found.token_usage.total_input, found.token_usage.total_output


def test_tokens_of_a_transcript_are_counted_once_for_each_message(
    daemon: Daemon, store: BaseStore, tmp_path: Path
) -> None:
    transcript = tmp_path / "t.jsonl"
    second = {**LINE, "message": {"id": "m2", "usage": {"input_tokens": 1, "output_tokens": 1}}}
    transcript.write_text(2 * (json.dumps(LINE) + "\n"))
    daemon.start()
    stop = {"session_id": "s", "hook_event_name": "Stop", "transcript_path": str(transcript)}
    daemon.ask(do="hook", payload=stop)
    eventually(lambda: tokens(store, "s") == (10, 5))
    with transcript.open("a") as file:
        file.write(json.dumps(second) + "\n")
    daemon.ask(do="hook", payload=stop)
    eventually(lambda: tokens(store, "s") == (11, 6))


def at(when: int, session: str, name: str, **fields: Any) -> MonitorEvent:
    payload = {"session_id": session, "hook_event_name": name, **fields}
    return hook_event(payload, captured_at=when, machine_id="laptop")


def test_what_an_earlier_daemon_left_in_the_spool_reaches_its_sessions(
    daemon: Daemon, store: BaseStore
) -> None:
    transcript = daemon.place / "t.jsonl"
    transcript.write_text(json.dumps(LINE) + "\n")
    start = time.time_ns() // 1_000_000
    with EventWriter(open_store(NOWHERE), spool_directory=daemon.place / "spool") as writer:
        writer.put(at(start, "s", "SessionStart", model="m", session_title="Total"))
        writer.put(at(start + 1, "s", "SessionEnd", transcript_path=str(transcript)))
        for n in range(2500):
            writer.put(at(start + 2 + n, "other", "UserPromptSubmit", prompt="x"))
        assert writer.close(0) == 2502
    daemon.start()
    eventually(lambda: told(store, "s") == ("completed", "Total", "m", None))
    eventually(lambda: tokens(store, "s") == (10, 5))


def test_what_an_earlier_daemon_stored_last_reaches_its_sessions(
    daemon: Daemon, store: BaseStore
) -> None:
    transcript = daemon.place / "t.jsonl"
    transcript.write_text(json.dumps(LINE) + "\n")
    store.save_event(at(T0, "s", "SessionEnd", transcript_path=str(transcript)))
    daemon.start()
    eventually(lambda: tokens(store, "s") == (10, 5))
    assert told(store, "s")[0] == "completed"


def test_a_session_that_is_refused_keeps_no_other_from_following(
    daemon: Daemon, store: BaseStore, database: Database
) -> None:
    transcript = daemon.place / "t.jsonl"
    transcript.write_text(json.dumps(LINE) + "\n")
    daemon.start()
    refused = "NEW.session_id = 'refused' AND NEW.status = 'completed'"
    with trigger(database, "sessions", refused, REFUSE):
        for session in ("refused", "other"):
            for name in ("SessionStart", "SessionEnd"):
                payload = {"session_id": session, "transcript_path": str(transcript)}
                assert daemon.ask(do="hook", payload={**payload, "hook_event_name": name})["safe"]
        eventually(lambda: told(store, "other")[0] == "completed")
        assert told(store, "refused")[0] == "active"
        eventually(lambda: "1 sessions do not follow their events yet" in daemon.log())
    eventually(lambda: told(store, "refused")[0] == "completed")
    eventually(lambda: tokens(store, "refused")[0] + tokens(store, "other")[0] == 10)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("init", OSError(errno.ENOSPC, "No space left on device")),
        ("init", ConfigurationError("no binaries")),
        ("get_sessions", StoreUnavailable("away")),
        ("get_sessions", PersistenceError("a stored session cannot be read")),
    ],
)
def test_what_fails_when_a_daemon_starts_keeps_no_session_from_following(
    database: Database,
    store: BaseStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    error: Exception,
) -> None:
    store.save_event(at(T0, "s", "SessionEnd"))
    monkeypatch.setattr(monitor_daemon, "AGAIN_SECONDS", 0.05)
    original = getattr(AsyncStore, method)
    calls = 0

    async def fail_once(self: AsyncStore, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise error
        return await original(self, *arguments, **named)

    monkeypatch.setattr(AsyncStore, method, fail_once)

    async def follow() -> None:
        monitor = Monitor(database.url, tmp_path / "inbox", tmp_path / "spool")
        stop = asyncio.Event()
        running = asyncio.create_task(monitor.run(stop, tmp_path / "s"))
        try:
            await asyncio.to_thread(eventually, lambda: told(store, "s")[0] == "completed", 20)
        finally:
            stop.set()
            await running

    asyncio.run(follow())
    assert calls


def test_while_the_database_is_away_memory_holds_no_event_that_is_safe(tmp_path: Path) -> None:
    async def take_many() -> tuple[int, int]:
        monitor = Monitor(NOWHERE, tmp_path / "inbox", tmp_path / "spool")
        await monitor.writer.init()
        try:
            for n in range(500):
                receipt = await monitor.take(
                    at(T0 + n, f"away {n % 5}", "Stop", transcript_path="/t")
                )
                assert receipt is not None
                if n >= 498:  # the writer lets go of a group when the next one comes
                    assert await receipt.wait_safe()
            found = [one for one in gc.get_objects() if isinstance(one, MonitorEvent)]
            held = sum(one.session_id.startswith("away ") for one in found)
            return held, len(asyncio.all_tasks())
        finally:
            await monitor.writer.close(0)
            await monitor.store.close()

    events, tasks = asyncio.run(take_many())
    assert events < 10
    assert tasks < 10


def test_files_that_nobody_understands_are_set_aside(daemon: Daemon, store: BaseStore) -> None:
    names = [inbox.leave(daemon.inbox, body) for body in (b"", b"{}", b"\xff", b'{"id": 1}')]
    names.append(inbox.leave(daemon.inbox, file_of({"hook_event_name": "Stop"}, T0)))
    good = inbox.leave(daemon.inbox, file_of(a_day(1)[0], T0))
    daemon.start()
    eventually(lambda: sum(store.event_counts().values()) == 1)
    bad = daemon.inbox / "bad"
    assert {path.name for path in bad.glob("*.json")} == set(names)
    assert all((bad / f"{name}.why").read_text().strip() for name in names)
    assert not (daemon.inbox / good).exists()


def test_an_event_that_redaction_fails_on_is_set_aside_and_keeps_no_others_waiting(
    alone: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def redact(event: MonitorEvent) -> MonitorEvent:
        if event.hook_type == "UserPromptSubmit":
            raise RecursionError("too deep")
        return event

    monkeypatch.setattr(monitor_daemon, "redact", redact)
    _, second, _ = (
        inbox.leave(alone.inbox, file_of(payload, T0 + n)) for n, payload in enumerate(a_day(1)[:3])
    )

    async def take() -> int:
        monitor = Monitor(NOWHERE, alone.inbox, alone.place / "spool")
        stop = asyncio.Event()
        running = asyncio.create_task(monitor.run(stop, alone.socket))
        while [*alone.inbox.glob("*.json")]:
            await asyncio.sleep(0.05)
        accepted = monitor.writer.health().accepted
        stop.set()
        await running
        return accepted

    assert asyncio.run(take()) == 2
    assert [path.name for path in (alone.inbox / "bad").glob("*.json")] == [second]
    why = (alone.inbox / "bad" / f"{second}.why").read_text()
    assert why == "event: redact failed: RecursionError\n"


def test_a_payload_that_no_database_takes_stays_whole_in_its_file(alone: Daemon) -> None:
    deep = json.loads("[" * 600 + "]" * 600)
    odd = {**a_day(1)[1], "tool_input": deep}
    names = [inbox.leave(alone.inbox, file_of(one, T0)) for one in (odd, a_day(1)[0])]
    content = (alone.inbox / names[0]).read_bytes()
    alone.start()
    eventually(lambda: not [*alone.inbox.glob("*.json")])
    assert alone.stop() == 0
    bad = alone.inbox / "bad"
    assert (bad / names[0]).read_bytes() == content
    assert (bad / f"{names[0]}.why").read_text() == "data: nested more than 512 deep\n"
    assert not DeadLetters(alone.place / "spool" / "dead").ids()


def test_what_is_redacted_reaches_neither_events_nor_sessions(
    store: BaseStore, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session has its title from a payload."""

    def redact(event: MonitorEvent) -> MonitorEvent:
        told = json.dumps(event.data).replace("secret", "[removed]")
        return replace(event, data=json.loads(told))

    monkeypatch.setattr(monitor_daemon, "redact", redact)
    payloads = [{**one, "session_title": "deploy secret"} for one in a_day(1)[:2]]

    async def take() -> None:
        monitor = Monitor(database.url, tmp_path / "inbox", tmp_path / "spool")
        stop = asyncio.Event()
        running = asyncio.create_task(monitor.run(stop, tmp_path / "s"))
        for number, payload in enumerate(payloads):
            inbox.leave(tmp_path / "inbox", file_of(payload, T0 + number))
        while not (titled := store.get_sessions()) or not titled[0].label:
            await asyncio.sleep(0.05)
        stop.set()
        await running

    asyncio.run(asyncio.wait_for(take(), 60))
    [one] = store.get_sessions()
    assert one.label == "deploy [removed]"
    for stored in store.get_events(one.session_id):
        assert "secret" not in json.dumps(stored.data)


@pytest.mark.parametrize(("part", "method"), [(inbox.Inbox, "take"), (AsyncStore, "init")])
def test_a_daemon_whose_work_ends_is_over(
    alone: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    part: type,
    method: str,
) -> None:
    def broken(self: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(part, method, broken)
    alone.place.joinpath("spool").mkdir(mode=0o700)
    monitor = Monitor(NOWHERE, alone.inbox, alone.place / "spool")

    async def run() -> bool:
        stop = asyncio.Event()
        await asyncio.wait_for(monitor.run(stop, alone.socket), 60)
        return stop.is_set()

    assert asyncio.run(run()) is False
    assert "a task failed" in caplog.text


def test_sessions_that_ended_while_nobody_told_them_are_told_at_the_next_start(
    daemon: Daemon, store: BaseStore
) -> None:
    payloads = a_day(4, tools=1)
    ended = {p["session_id"] for p in payloads if p["hook_event_name"] == "SessionEnd"}
    store.save_events(
        hook_event(payload, captured_at=T0 + n, machine_id=socket.gethostname())
        for n, payload in enumerate(payloads)
    )
    busy = {"session_id": "busy", "hook_event_name": "Stop", "cwd": "/"}
    store.save_events(
        hook_event(busy, captured_at=T0 + 1000 + n, machine_id="laptop") for n in range(2000)
    )
    daemon.start()
    eventually(lambda: ended <= {one.session_id for one in store.get_sessions(status="completed")})


def with_monitor(
    url: str,
    place: Path,
    work: Callable[[Monitor], Awaitable[None]],
    machines: list[str] | None = None,
) -> None:
    """Have a daemon's parts do something, its store open and nothing of it running."""

    async def run() -> None:
        monitor = Monitor(url, place / "inbox", place / "spool", machines or ())
        await monitor.store.init()
        try:
            await work(monitor)
        finally:
            await monitor.store.close()

    asyncio.run(run())


TITLED = {"hook_event_name": "UserPromptSubmit", "prompt": "p", "session_title": "Early"}


def stops(session_id: str, machine_id: str, count: int, **fields: Any) -> list[MonitorEvent]:
    payload = {"session_id": session_id, "hook_event_name": "Stop", "cwd": "/", **fields}
    return [hook_event(payload, captured_at=T0 + n, machine_id=machine_id) for n in range(count)]


def test_a_start_looks_at_the_running_sessions_of_its_own_machine(
    store: BaseStore, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all its names: hooks take HOSTNAME first, and containers have another."""
    monkeypatch.setenv("HOSTNAME", "called so")
    for machine in (socket.gethostname(), "called so", "a container", "elsewhere"):
        store.save_events(stops(f"on {machine}", machine, 1))

    async def look(monitor: Monitor) -> None:
        await monitor._note_running()
        names = (socket.gethostname(), "called so", "a container")
        assert monitor._news.keys() == {f"on {name}" for name in names}

    with_monitor(database.url, tmp_path, look, ["a container"])


def test_what_a_session_was_told_is_read_page_by_page(
    store: BaseStore, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_events(stops("s", "m", 1, **TITLED))
    store.save_events(stops("s", "m", 130))
    pages: list[int] = []
    find = AsyncStore.find_events

    async def counted(self: AsyncStore, **asked: Any) -> list[MonitorEvent]:
        found = await find(self, **asked)
        pages.append(len(found))
        return found

    monkeypatch.setattr(AsyncStore, "find_events", counted)

    async def tell(monitor: Monitor) -> None:
        assert await monitor._tell("s", monitor_daemon.NO_NEWS) is None

    with_monitor(database.url, tmp_path, tell)
    assert told(store, "s") == ("active", "Early", None, None)
    assert pages == [50, 50, 31]


def test_what_a_session_is_told_meanwhile_is_not_taken_back(
    store: BaseStore, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another daemon, whose event this one has not read, or by a person."""
    store.save_events(stops("s", "m", 1, **TITLED))
    find, looks = AsyncStore.find_events, 0

    async def then_tell(self: AsyncStore, **asked: Any) -> list[MonitorEvent]:
        nonlocal looks
        looks += 1
        found = await find(self, **asked)
        if looks == 1:
            end = {"session_id": "s", "hook_event_name": "SessionEnd", "cwd": "/", "reason": "x"}
            store.save_event(hook_event(end, captured_at=T0 + 1, machine_id="m"))
            store.update_session("s", status="completed", end_time=T0 + 1, label="Mine")
        return found

    monkeypatch.setattr(AsyncStore, "find_events", then_tell)

    async def tell(monitor: Monitor) -> None:
        news = monitor_daemon.NO_NEWS
        for left in (True, False):
            assert await monitor._tell("s", news) is None
            assert told(store, "s")[:2] == ("completed", "Mine")
            assert bool(monitor._news) is left
            news = monitor._news.pop("s", news)

    with_monitor(database.url, tmp_path, tell)
    assert looks == 2


def test_a_transcript_that_does_not_answer_keeps_no_session_waiting(
    store: BaseStore,
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.save_events(stops("s", "m", 1))
    answers = threading.Event()
    asked: list[str] = []
    answered: list[bool] = []

    def hang(path: str, _: int) -> None:
        asked.append(path)
        answered.append(answers.wait(60))

    monkeypatch.setattr(monitor_daemon, "read_usage", hang)
    monkeypatch.setattr(monitor_daemon, "READ_SECONDS", 1.0)

    async def count(monitor: Monitor) -> None:
        for path in 2 * ["/net/gone/t.jsonl"]:
            await monitor._count_tokens("s", path)

    with_monitor(database.url, tmp_path, count)
    assert answered == []  # nor does the end of the daemon wait for it
    answers.set()
    assert asked == ["/net/gone/t.jsonl"]
    assert "/net/gone/t.jsonl" in caplog.text


@pytest.mark.parametrize(
    "url", ["postgresql://u:s3cret@127.0.0.1:1/x", f"{NOWHERE}&password=s3cret"]
)
def test_a_password_on_the_command_line_is_warned_of_and_not_repeated(
    tmp_path: Path, url: str
) -> None:
    # No directory can be made below a file, so that it ends at once.
    (tmp_path / "file").touch()
    places = {"inbox": tmp_path / "i", "spool": tmp_path / "p", "socket": tmp_path / "file" / "s"}
    options = [word for name, path in places.items() for word in (f"--{name}", str(path))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "monitor_daemon.py"), "--url", url, *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "WARNING everybody can see the password" in done.stderr
    assert "s3cret" not in done.stderr


def test_without_options_the_inbox_is_the_one_that_hooks_use(alone: Daemon) -> None:
    place = alone.place / "hooks"
    inbox.leave(place, file_of(a_day(1)[0], T0))
    options = ["--spool", str(alone.place / "spool"), "--socket", str(alone.socket)]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "monitor_daemon.py"), *options],
        env={
            **os.environ,
            "CONTEXTUATE_DATABASE_URL": NOWHERE,
            "CONTEXTUATE_INBOX": str(place),
        },
    ) as process:
        try:
            eventually(lambda: not list(place.glob("*.json")))
        finally:
            process.send_signal(signal.SIGTERM)


def test_a_file_that_cannot_be_set_aside_keeps_no_others_from_being_taken(alone: Daemon) -> None:
    name = inbox.leave(alone.inbox, b"nobody understands this")
    (alone.inbox / "bad").write_bytes(b"in the way")
    inbox.leave(alone.inbox, file_of(a_day(1)[0], T0))
    alone.start()
    eventually(lambda: alone.ask(do="health")["accepted"] == 1)
    (alone.inbox / "bad").unlink()
    eventually(lambda: (alone.inbox / "bad" / name).exists(), 10)


def test_a_spool_file_that_cannot_be_read_keeps_no_daemon_from_starting(alone: Daemon) -> None:
    odd = alone.place / "spool" / f"{1:020d}-{'ab' * 8}.log"
    for place in (odd.parent, odd):
        place.mkdir(mode=0o700)
    alone.start()
    assert alone.ask(do="hook", payload=a_day(1)[0]) == {"safe": True}
    assert f"unreadable: {odd.name}: Is a directory" in alone.log()


def test_while_the_spool_is_full_files_stay_in_the_inbox_which_is_told_once(alone: Daemon) -> None:
    dead = alone.place / "spool" / "dead"
    for place in (dead.parent, dead):
        place.mkdir(mode=0o700)
    with (dead / "large").open("wb") as file:
        file.truncate(2**31)
    for n, payload in enumerate(a_day(1)):
        inbox.leave(alone.inbox, file_of(payload, T0 + n))
    alone.start()
    eventually(lambda: "in the inbox" in alone.log())
    time.sleep(0.5)
    assert alone.log().count("in the inbox") == 1
    (dead / "large").unlink()
    eventually(lambda: alone.ask(do="health")["accepted"] == len(a_day(1)))
    eventually(lambda: not list(alone.inbox.glob("*.json")))


def fails_to_start(daemon: Daemon) -> bool:
    daemon.start(wait=False)
    assert daemon.process is not None
    try:
        return daemon.process.wait(60) != 0
    finally:
        daemon.kill()


def test_a_socket_is_taken_from_nobody(alone: Daemon, tmp_path: Path) -> None:
    alone.start()
    (tmp_path / "second").mkdir()
    second = Daemon(NOWHERE, tmp_path / "second")
    second.socket = alone.socket
    assert fails_to_start(second)
    assert "another daemon answers there" in second.log()
    assert "Traceback" not in second.log()
    assert "pending" in alone.ask(do="health")
    second.socket = tmp_path / "file"
    second.socket.write_bytes(b"somebody's")
    assert fails_to_start(second)
    assert second.socket.read_bytes() == b"somebody's"
    alone.socket.unlink()
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(alone.socket))
        assert alone.stop() == 0
        assert alone.socket.is_socket()


def test_what_streams_is_not_kept(daemon: Daemon, store: BaseStore) -> None:
    payload = {"session_id": "s", "hook_event_name": "MessageDisplay", "delta": "x"}
    inbox.leave(daemon.inbox, file_of(payload, T0))
    daemon.start()
    eventually(lambda: not list(daemon.inbox.glob("*.json")))
    assert daemon.ask(do="hook", payload=payload) == {"safe": True}
    assert daemon.ask(do="health")["accepted"] == 0


def test_a_folder_fed_twice_and_a_daemon_killed_in_the_middle_double_nothing(
    own_database: Database, tmp_path: Path
) -> None:
    daemon = Daemon(own_database.url, tmp_path)
    payloads = a_day(sessions=8, tools=12)
    files = [file_of(payload, T0 + n) for n, payload in enumerate(payloads)]
    try:
        daemon.start()
        for n, content in enumerate(files):
            inbox.leave(daemon.inbox, content)
            if n == len(files) // 3:
                time.sleep(0.15)
                daemon.kill()
                own_database.server.kill()
                daemon.start()  # without a database
                time.sleep(0.2)
                daemon.kill()
                daemon.start(wait=False)
                own_database.server.start()
        for content in files:
            inbox.leave(daemon.inbox, content)
        with open_store(own_database.url) as store:
            eventually(lambda: sum(store.event_counts().values()) == len(payloads))
            eventually(lambda: not list(daemon.inbox.glob("*.json")))
            eventually(lambda: daemon.ask(do="health")["pending"] == 0)
            require_all(store, payloads)
            eventually(lambda: sum(s.status == "completed" for s in store.get_sessions()) == 12)
    finally:
        daemon.kill()


def test_questions_while_the_database_is_away_are_answered_with_the_reason(tmp_path: Path) -> None:
    daemon = Daemon(NOWHERE, tmp_path)
    try:
        daemon.start()
        assert daemon.ask(do="hook", payload=a_day(1)[0]) == {"safe": True}
        assert daemon.ask(do="sessions")["error"].startswith("Store")
        health = daemon.ask(do="health")
        assert health["pending"] == 1
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def by_script(daemon: Daemon, payloads: list[dict[str, Any]]) -> None:
    """Hand each payload to the hook command, one process each, as Claude Code does."""
    command = [sys.executable, "-I", "-S", str(ROOT / "examples" / "emit_event.py")]
    environment = {**os.environ, "CONTEXTUATE_INBOX": str(daemon.inbox)}
    for payload in payloads:
        done = subprocess.run(
            command,
            input=json.dumps(payload).encode(),
            env=environment,
            capture_output=True,
            check=True,
        )
        assert (done.stdout, done.stderr) == (b"", b"")


def drained(daemon: Daemon) -> bool:
    return daemon.ask(do="health")["pending"] == 0 and not list(daemon.inbox.glob("*.json"))


@pytest.mark.soak
def test_two_thousand_hooks_one_process_each_become_events(
    daemon: Daemon, store: BaseStore
) -> None:
    payloads = a_day(sessions=80, tools=12)
    assert len(payloads) > 2000
    daemon.start()
    by_script(daemon, payloads)
    eventually(lambda: drained(daemon), 120)
    require_all(store, payloads)
    assert len(store.get_sessions()) == 160
    assert daemon.stop() == 0


@pytest.mark.skipif(
    not os.environ.get("CONTEXTUATE_CORPUS"),
    reason="CONTEXTUATE_CORPUS names no folder of recorded data",
)
def test_recorded_payloads_are_rebuilt_equal(daemon: Daemon, store: BaseStore) -> None:
    """By way of script, inbox, daemon and database, twice."""
    payloads: list[dict[str, Any]] = []
    for path in sorted(Path(os.environ["CONTEXTUATE_CORPUS"]).glob("*/logs/*.json")):
        if path.name != "chat.json":
            payloads += json.loads(path.read_bytes())
    assert len(payloads) > 100
    daemon.start()
    by_script(daemon, payloads)
    eventually(lambda: drained(daemon), 120)
    found = sorted(json.dumps(payload_of(e), sort_keys=True) for e in store.iter_events())
    # Of that time, no payload tells an agent's id: whatever happened is its session's.
    assert found == sorted(json.dumps(payload, sort_keys=True) for payload in payloads)
    sessions = {session.session_id: session for session in store.get_sessions()}
    assert sessions.keys() == {payload["session_id"] for payload in payloads}
    assert {session.parent_session_id for session in sessions.values()} == {None}
    assert {session.status.value for session in sessions.values()} == {"active"}
