"""The writer through faults: what was *safe* reaches the database, once, in order; counts add up.

Servers, networks, disks and daemons really fail here. The short forms run always, the long ones in
`make soak`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import EventWriter, MonitorEvent
from contextuate_persist.base import BaseStore
from contextuate_persist.spool import spool_state
from tests.builders import T0, event
from tests.conftest import Database, make_store
from tests.proxy import Proxy
from tests.test_faults import COMMIT, ENOUGH, database_on_small_disk, through

IMPATIENT = {"connect_timeout": 2, "pool_timeout": 2, "statement_timeout": 5}


@pytest.fixture(autouse=True)
def _quiet_pool(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="psycopg.pool")


@contextlib.contextmanager
def opened(url: str, **options: Any) -> Iterator[BaseStore]:
    """A store that nobody has opened: the writer does."""
    store = make_store(url, **IMPATIENT | options)
    try:
        yield store
    finally:
        store.close()


class Producers:
    """Threads that put events of their own sessions until they are told to stop."""

    def __init__(self, writer: EventWriter, threads: int = 4, pause: float = 0.0005) -> None:
        self.writer = writer
        self.sent: dict[str, list[MonitorEvent]] = defaultdict(list)
        self.errors: list[BaseException] = []
        self._pause = pause
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._put, args=(n,)) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def _put(self, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            name = f"p{number}-{count % 3}"
            one = event(name, T0 + count // 5, data={"n": count, "x": "x" * (count % 7) * 300})
            try:
                self.writer.put(one)
            except BaseException as error:
                self.errors.append(error)
                return
            self.sent[name].append(one)
            time.sleep(self._pause)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def require_all(self, store: BaseStore) -> None:
        """Everything is stored, once, in the order of its session, and the counts say so."""
        assert self.errors == []
        assert self.writer.flush(120) == 0, self.writer.health()
        total = sum(map(len, self.sent.values()))
        assert total > 50
        for name, events in self.sent.items():
            assert [e.id for e in store.iter_events(session_id=name)] == [e.id for e in events]
        health = self.writer.health()
        assert (health.accepted, health.set_aside, health.pending) == (total, 0, 0)
        assert health.stored + health.duplicate == total


def until_it_says(writer: EventWriter, words: str) -> None:
    """Wait until that is the writer's last error: how soon its pool connects again is chance."""
    until = time.monotonic() + 60
    while words not in str(writer.health().last_error):
        assert time.monotonic() < until, writer.health()
        writer.flush(0.05)  # without its pauses between tries


# --- Databases that fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kills"),
    [
        ("always", 5),
        ("on_failure", 5),
        pytest.param("always", 10, marks=pytest.mark.soak),
        pytest.param("on_failure", 10, marks=pytest.mark.soak),
    ],
)
def test_a_database_killed_again_and_again_loses_nothing(
    own_database: Database, tmp_path: Path, mode: Any, kills: int
) -> None:
    with (
        opened(own_database.url) as store,
        EventWriter(store, spool=mode, spool_directory=tmp_path / "spool") as writer,
    ):
        producers = Producers(writer)
        chance = random.Random(kills)
        for _ in range(kills):
            stored, until = writer.health().stored, time.monotonic() + 60
            while writer.health().stored == stored:  # it works again: now it hurts
                assert time.monotonic() < until, writer.health()
                writer.flush(0.02)  # else it waits up to five seconds between tries
            time.sleep(chance.uniform(0, 0.3))
            own_database.server.kill()
            time.sleep(0.2)
            own_database.server.start()
        producers.stop()
        producers.require_all(store)


def test_a_database_that_is_away_for_longer_than_memory_lasts_gets_all_in_the_end(
    own_database: Database, tmp_path: Path
) -> None:
    own_database.server.stop()
    with (
        opened(own_database.url) as store,
        EventWriter(store, spool_directory=tmp_path / "spool", memory_bytes=2**20) as writer,
    ):
        producers = Producers(writer, pause=0)
        time.sleep(2)
        producers.stop()
        health = writer.health()
        assert health.pending == health.accepted
        assert health.spool_bytes > 2**20
        assert health.memory_bytes < 1.2 * 2**20
        own_database.server.start()
        producers.require_all(store)


def test_a_database_that_is_read_only_for_a_while_gets_all_in_the_end(
    own_database: Database, tmp_path: Path
) -> None:
    server, name = own_database.server, own_database.name
    read_only, writable = (
        (
            f"ALTER DATABASE {name} SET default_transaction_read_only = on",
            f"ALTER DATABASE {name} SET default_transaction_read_only = off",
        )
        if server.kind == "postgresql"
        else ("SET GLOBAL super_read_only = ON", "SET GLOBAL read_only = OFF")
    )
    with (
        opened(own_database.url) as store,
        EventWriter(store, spool_directory=tmp_path / "spool") as writer,
    ):
        producers = Producers(writer)
        try:
            server.execute(read_only)
            server.restart() if server.kind == "postgresql" else None
            until_it_says(writer, "read-only")
        finally:
            server.execute(writable)
        time.sleep(0.3)
        producers.stop()
        producers.require_all(store)


def test_a_database_whose_disk_is_full_for_a_while_gets_all_in_the_end(
    backend: str, tmp_path: Path
) -> None:
    part = "data/base" if backend == "postgresql" else "data"
    options = {} if backend == "postgresql" else {"log_bin": "../binlog"}
    with (
        database_on_small_disk(backend, part, **options) as database,
        opened(database.url) as store,
        EventWriter(store, spool_directory=tmp_path / "spool") as writer,
    ):
        assert writer.put(event("first")).wait_stored(30)
        database.server.leave_free(2_000_000)
        events = [
            event(f"s{i % 5}", T0 + i, data={"x": random.Random(i).randbytes(4000).hex()})
            for i in range(1500)
        ]
        for one in events:
            writer.put(one)
        assert writer.flush(2) > 0
        assert "StoreRefused" in str(writer.health().last_error)
        database.server.leave_free(ENOUGH)
        assert writer.flush(120) == 0
        assert writer.health().set_aside == 0
        for name in ("s0", "s1", "s2", "s3", "s4"):
            assert [e.id for e in store.get_events(name, limit=9999)] == [
                e.id for e in events if e.session_id == name
            ]


# --- Networks that fail ---------------------------------------------------------------------------


def test_connections_cut_anywhere_lose_nothing(
    proxy: Proxy, database: Database, tmp_path: Path
) -> None:
    with (
        opened(through(proxy, database)) as store,
        EventWriter(store, spool_directory=tmp_path / "spool") as writer,
    ):
        producers = Producers(writer)
        for _ in range(15):
            time.sleep(0.1)
            proxy.cut_all()
        producers.stop()
        producers.require_all(store)


def test_commits_that_are_not_heard_store_once(
    proxy: Proxy, database: Database, tmp_path: Path
) -> None:
    with (
        opened(through(proxy, database)) as store,
        EventWriter(store, spool_directory=tmp_path / "spool") as writer,
    ):
        producers = Producers(writer)
        for _ in range(5):
            time.sleep(0.15)
            proxy.swallow_answer_to = COMMIT[database.backend]
        time.sleep(0.3)
        producers.stop()
        producers.require_all(store)
        assert proxy.swallowed > 0
        assert writer.health().duplicate > 0


@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=pytest.mark.soak)])
def test_a_network_that_holds_everything_back_is_waited_for(
    proxy: Proxy, database: Database, tmp_path: Path, seconds: float
) -> None:
    with (
        opened(through(proxy, database), statement_timeout=1) as store,
        EventWriter(store, spool_directory=tmp_path / "spool") as writer,
    ):
        producers = Producers(writer)
        time.sleep(0.3)
        proxy.silent = True
        time.sleep(seconds)
        proxy.silent = False
        proxy.cut_all()
        producers.stop()
        with make_store(database.url) as patient:
            producers.require_all(patient)


# --- Daemons that are killed ----------------------------------------------------------------------

DAEMON = """
import os, sys, time
from contextuate_persist import EventWriter, MonitorEvent, SessionMeta, open_store
url, spool, safe, first, mode = sys.argv[1:]
told = os.open(safe, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
store = open_store(url, connect_timeout=2, pool_timeout=2)
writer = EventWriter(store, spool_directory=spool, spool=mode)
writer.init()
n = int(first)
while True:
    n += 1
    name = f"s{n % 4}"
    common = {"session_id": name, "machine_id": "m", "working_directory": "/"}
    if n % 21 == 3:
        receipt = writer.put_session(SessionMeta(start_time=1700000000000, label=str(n), **common))
    elif n % 21 == 4:
        receipt = writer.update_session(name, label=str(n))
    else:
        receipt = writer.put(MonitorEvent(
            id=f"00000000-0000-4000-8000-{n:012d}", timestamp=1700000000000 + n // 9,
            event_type="e", hook_type="h", data={"n": n, "x": "x" * (n % 11) * 200}, **common))
    receipt.on_safe(lambda r, n=n: os.write(told, b"%d\\n" % n) if r.safe else None)
    if n % 7 == 0:
        time.sleep(0.001)
"""


@pytest.mark.parametrize(
    ("mode", "kills"),
    [
        ("always", 5),
        ("on_failure", 5),
        pytest.param("always", 20, marks=pytest.mark.soak),
        pytest.param("on_failure", 20, marks=pytest.mark.soak),
    ],
)
def test_a_daemon_killed_at_any_point_keeps_what_was_safe(
    own_database: Database, tmp_path: Path, mode: Any, kills: int
) -> None:
    chance = random.Random(kills)
    spool, safe = tmp_path / "spool", tmp_path / "safe"
    server = own_database.server
    for number in range(kills):
        if number % 2:
            server.kill()  # every other daemon finds no database
        arguments = [own_database.url, str(spool), str(safe), str(number * 10**6), mode]
        daemon = subprocess.Popen([sys.executable, "-c", DAEMON, *arguments])
        # From the first that is safe on, and then at any moment.
        until = time.monotonic() + 30
        size = safe.stat().st_size if safe.exists() else 0
        while not (safe.exists() and safe.stat().st_size > size):
            assert time.monotonic() < until
            assert daemon.poll() is None
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.7))
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        server.start()
    # The last line may be torn: it was not told.
    told = [int(line) for line in safe.read_text().split("\n")[:-1]]
    with opened(own_database.url) as store:
        with EventWriter(store, spool=mode, spool_directory=spool) as writer:
            assert writer.flush(120) == 0
            health = writer.health()
            assert health.set_aside == 0
            # A kill in the middle of a write leaves the end of a file torn: it was not told.
            assert all(damage.endswith("leaves it torn") for damage in health.damages)
        found = [e.data["n"] for e in store.iter_events()]
        assert len(found) == len(set(found))
        assert {n for n in told if n % 21 not in (3, 4)} <= set(found)
        assert len(told) > 100
        for number in range(4):
            mine = [e.data["n"] for e in store.iter_events(session_id=f"s{number}")]
            assert mine == sorted(mine)
            # The label that was safe last is there, and whatever was put before the last event.
            begun = mine[-1] // 10**6 * 10**6
            put = [*told, *range(max(begun + 1, mine[-1] - 99), mine[-1])]
            labels = [n for n in put if n % 21 in (3, 4) and n % 4 == number]
            session = store.get_session(f"s{number}")
            assert session is not None
            assert int(session.label or 0) >= max(labels)
    assert spool_state(spool).records == 0


def test_a_clock_that_is_set_back_changes_nothing(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        opened(database.url) as store,
        EventWriter(store, spool_directory=tmp_path / "spool") as writer,
    ):
        real = time.time_ns
        for i in range(30):
            monkeypatch.setattr(time, "time_ns", lambda back=i: real() - back * 3600 * 10**9)
            writer.put(event("s", T0 + i))
        monkeypatch.undo()
        assert writer.flush(30) == 0
        assert [e.timestamp for e in store.get_events("s")] == [T0 + i for i in range(30)]


# --- Disks that fail ------------------------------------------------------------------------------

ON_SMALL_DISK = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.geteuid(), os.getegid()
if libc.unshare(0x00020000 | (0x10000000 if uid else 0)):
    sys.exit(77)
if uid:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                       ("gid_map", f"{gid} {gid} 1")):
        open(f"/proc/self/{name}", "w").write(text)
libc.mount(b"none", b"/", None, ctypes.c_ulong(0x44000), b"")
if libc.mount(b"none", sys.argv[1].encode(), b"tmpfs", ctypes.c_ulong(0), b"size=3000k"):
    sys.exit(77)
sys.argv = sys.argv[1:]
exec(sys.stdin.read())
"""

FILLS = """
from contextuate_persist import EventWriter, SpoolError, StoreUnavailable, open_store
from tests.builders import T0, event
spool, url = sys.argv
store = open_store(url)
real, store.init = store.init, lambda: (_ for _ in ()).throw(StoreUnavailable("away"))
writer = EventWriter(store, spool_directory=spool + "/spool", memory_bytes=2**20, put_timeout=0.5)
writer.init()
taken = 0
try:
    for taken in range(10**5):
        receipt = writer.put(event("s", T0 + taken, data={"x": "x" * 1000}))
except SpoolError as error:
    assert "No space left on device" in str(error), error
else:
    sys.exit("the disk did not fill")
assert writer.health().memory_bytes < 1.1 * 2**20
assert not receipt.safe
store.init = real
assert writer.flush(60) == 0, writer.health()
assert receipt.stored
assert [e.timestamp - T0 for e in store.get_events("s", limit=10**6)] == list(range(taken))
assert writer.put(event("s", T0 + taken)).wait_safe(30)
assert writer.close() == 0
store.close()
print("all", taken > 1000)
"""


def test_a_full_disk_under_the_spool_stops_nobody_who_has_a_database(
    database: Database, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_SMALL_DISK, str(tmp_path), database.url],
        input=FILLS,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    if done.returncode == 77:
        pytest.skip("this machine does not let us mount a small disk")
    assert (done.stdout, done.returncode) == ("all True\n", 0), done.stderr[-2000:]


def test_a_page_that_the_disk_has_lost_costs_its_events_only(
    database: Database, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    events = [event("s", T0 + i, data={"x": "x" * 500}) for i in range(200)]
    with opened("postgresql://127.0.0.1:1/nobody", connect_timeout=1) as nobody:
        writer = EventWriter(nobody, spool_directory=spool)
        writer.init()
        for one in events:
            receipt = writer.put(one)
        assert receipt.wait_safe(30)
        assert writer.close(0) == 200
    [path] = spool.glob("*.log")
    data = bytearray(path.read_bytes())
    data[40960:45056] = bytes(4096)
    path.write_bytes(data)
    with (
        opened(database.url) as store,
        EventWriter(store, spool_directory=spool) as writer,
    ):
        assert writer.flush(30) == 0
        health = writer.health()
        assert len(health.damages) == 1
        assert health.aside_bytes >= 4096
        assert health.accepted == health.stored
        found = store.get_events("s")
    assert 190 <= len(found) < 200
    assert found == [one for one in events if one in found]


# --- Much at once ---------------------------------------------------------------------------------


def spread(writer: EventWriter, sessions: int, each: int) -> list[str]:
    ids = []
    for n in range(each):
        for number in range(sessions):
            one = event(f"s{number}", T0 + n, id=str(uuid.UUID(int=number << 32 | n, version=4)))
            ids.append(one.id)
            writer.put(one)
    return ids


@pytest.mark.parametrize(
    ("sessions", "each"), [(1000, 3), pytest.param(10_000, 5, marks=pytest.mark.soak)]
)
def test_thousands_of_sessions_side_by_side(
    database: Database, tmp_path: Path, sessions: int, each: int
) -> None:
    with (
        opened(database.url, statement_timeout=60) as store,
        EventWriter(store, spool_directory=tmp_path / "spool") as writer,
    ):
        ids = spread(writer, sessions, each)
        assert writer.flush(600) == 0
        assert [e.id for e in store.get_events("s7")] == ids[7::sessions]
        assert sum(store.event_counts().values()) == sessions * each


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_many_events_from_eight_threads_keep_memory_bounded(
    database: Database, tmp_path: Path, count: int, record_property: Callable[[str, object], None]
) -> None:
    with (
        opened(database.url, statement_timeout=60) as store,
        EventWriter(store, spool_directory=tmp_path / "spool", memory_bytes=8 * 2**20) as writer,
    ):
        errors: list[BaseException] = []

        def produce(number: int) -> None:
            try:
                for n in range(count // 8):
                    key = str(uuid.UUID(int=number << 64 | n, version=4))
                    writer.put(event(f"t{number}-{n // 5000}", T0 + n, id=key))
            except BaseException as error:
                errors.append(error)

        started = time.monotonic()
        threads = [threading.Thread(target=produce, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, writer.health().memory_bytes)
            time.sleep(0.05)
        assert writer.flush(1800) == 0
        record_property("events a second", round(count / (time.monotonic() - started)))
        assert errors == []
        assert most < 8.1 * 2**20
        assert writer.health().stored == count
        assert sum(store.event_counts().values()) == count
