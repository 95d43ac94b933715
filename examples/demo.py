"""What `make demo` shows: a private PostgreSQL from nothing, filled and looked into.

    python examples/demo.py

Everything happens in a temporary directory that is removed at the end, the server with it. If
CONTEXTUATE_CORPUS names a folder of recorded data, its events are imported as well.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from contextuate_persist import MonitorEvent, PersistenceError, display, open_store
from contextuate_persist.base import BaseStore
from contextuate_persist.console import abandon_output, show, terminal_width
from contextuate_persist.embedded import EmbeddedPostgreSQL
from contextuate_persist.transfer import import_path

COLUMNS = terminal_width()
HERE = Path(__file__).parent


@contextmanager
def step(title: str) -> Iterator[None]:
    """Say what is done and how long it took."""
    begin = time.perf_counter()
    yield
    show([f"  {title:50} {(time.perf_counter() - begin) * 1000:8.1f} ms"])


def heading(text: str) -> None:
    show(["", text, "─" * len(text)])


def recorded_events() -> bytes:
    """The events of the recorded pairs of hook payload and event, one a line."""
    if not (corpus := os.environ.get("CONTEXTUATE_CORPUS")):
        return b""
    pairs = Path(corpus) / "emit-event-golden" / "pairs.jsonl"
    events = [json.loads(line)["event"] for line in pairs.read_bytes().splitlines()]
    return "\n".join(map(json.dumps, events)).encode()


def fill(store: BaseStore) -> None:
    with step("store the sample data"):
        store.load_sample()
    if recorded := recorded_events():
        with step("import recorded events"):
            report = import_path(store, BytesIO(recorded))
        with step("import them again: each counts once"):
            again = import_path(store, BytesIO(recorded))
        show([f"  {report.stored} of {report.lines} events stored; again: {again.stored}"])


def look(store: BaseStore) -> None:
    heading("contextuate-persist sessions --limit 8")
    with step("newest sessions"):
        sessions = store.get_sessions(limit=8)
    show(display.session_table(sessions, COLUMNS))

    heading("contextuate-persist tree session-root-001")
    with step("a session and all below it"):
        nodes = store.session_tree("session-root-001")
    show(display.tree_lines(nodes, COLUMNS))

    heading("contextuate-persist events session-root-001")
    with step("events of a session"):
        events = store.get_events("session-root-001")
    show(display.event_table(events, COLUMNS, with_session=False))

    heading("contextuate-persist recent --limit 8")
    with step("newest events over all sessions"):
        recent = store.get_all_recent_events(8)
    show(display.event_table(recent, COLUMNS))


def hooks(session: str, count: int) -> Iterator[bytes]:
    """What Claude Code hands to its hooks, in short."""
    common = {"session_id": session, "cwd": "/home/dev/webshop"}
    yield json.dumps({**common, "hook_event_name": "SessionStart", "source": "startup"}).encode()
    for number in range(count):
        call = {"tool_name": "Bash", "tool_use_id": f"toolu_{number}"}
        call["tool_input"] = {"command": f"make test-{number}"}  # type: ignore[assignment]
        yield json.dumps({**common, **call, "hook_event_name": "PreToolUse"}).encode()


def tell(payloads: Iterator[bytes], inbox: Path) -> int:
    """Run the hook command for each payload, one process each, as Claude Code does."""
    command = [sys.executable, "-I", "-S", str(HERE / "emit_event.py")]
    environment = {**os.environ, "CONTEXTUATE_INBOX": str(inbox)}
    count = 0
    for count, payload in enumerate(payloads, 1):  # noqa: B007
        subprocess.run(command, input=payload, env=environment, check=True)
    return count


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until:
            raise PersistenceError("nothing came in a minute")
        time.sleep(0.02)


def watch_pipeline(server: EmbeddedPostgreSQL, store: BaseStore, directory: Path) -> None:
    """Hook payloads by way of the daemon, with the database killed in the middle."""
    heading("Hooks, the daemon, and a database that is killed")
    place = directory / "daemon"
    place.mkdir(mode=0o700)
    arguments = ["--inbox", place / "inbox", "--spool", place / "spool", "--socket", place / "s"]
    environment = {**os.environ, "CONTEXTUATE_DATABASE_URL": server.url}
    command = [sys.executable, HERE / "monitor_daemon.py", *arguments]
    with (place / "log").open("wb") as log:
        daemon = subprocess.Popen(list(map(str, command)), env=environment, stderr=log)
    try:
        inbox = place / "inbox"
        with step("start the daemon; 21 hooks, one process each"):
            told = tell(hooks("first", 20), inbox)
            wait_until(lambda: len(store.get_events("first")) == told)
        with step("kill the database"):
            pid = int((server.data / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGKILL)
        with step("21 more hooks, all taken and safe on disk"):
            tell(hooks("second", 20), inbox)
            wait_until(lambda: not list(inbox.glob("*.json")))
        with step("start the database; wait until all is there"):
            server.start()
            wait_until(lambda: len(safely(store, "second")) == told)
        show(display.event_table(store.get_events("second", limit=3), COLUMNS))
        calls = sum(store.event_counts(name)["tool_call"] for name in ("first", "second"))
        show([f"  {calls} of 40 calls are there, each once"])
    finally:
        daemon.terminate()
        daemon.wait(30)


def safely(store: BaseStore, session: str) -> list[MonitorEvent]:
    try:
        return store.get_events(session)
    except PersistenceError:  # still on its way up
        return []


def demo(directory: Path) -> None:
    server = EmbeddedPostgreSQL(directory)
    heading("A private PostgreSQL")
    try:
        with step("create and start it"):
            server.start()
        store = open_store(server.url)
        with step("apply the schema"):
            store.apply_schema()
        with store:
            health = store.health()
            with step("one round trip"):
                store.health()
            show([f"  PostgreSQL {health.server_version}, {health.driver}"])
            fill(store)
            look(store)
            watch_pipeline(server, store, directory)
            heading("The end")
            with step("stop the server"):
                store.close()
                server.stop()
    finally:
        server.stop()


def main() -> int:
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # connections break here on purpose
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without stopping the server
    directory = Path(tempfile.mkdtemp(prefix="contextuate-demo-"))
    try:
        # As root, PostgreSQL runs under another account, which has to get in.
        directory.chmod(0o711)
        demo(directory)
    except BrokenPipeError:
        abandon_output()
        return 141
    except (PersistenceError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
