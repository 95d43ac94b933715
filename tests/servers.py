"""Private database servers for the tests: found or downloaded, started, killed, removed.

`python -m tests.servers mysql` (or `postgresql`) starts one, prints its administrator's URL and
removes it at Ctrl-C, SIGTERM or the end of its input. Nothing here knows pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import inspect
import json
import os
import platform
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import mysql.connector
import psycopg

from contextuate_persist.embedded import (
    ROOT_DIRECTORY,
    Account,
    PostgreSQLBinaries,
    find_postgresql,
    readable_binaries,
)
from contextuate_persist.errors import PersistenceError

READY_SECONDS = 60.0
STOP_SECONDS = 60.0
DOWNLOAD_SECONDS = 600.0
# Of a small disk while it is not to be full; it takes memory only for what is written.
DISK_BYTES = 2**30
# Docker is the last resort; the tags are pinned so that a run next year sees the same server.
POSTGRESQL_IMAGE = "postgres:17.10"
MYSQL_IMAGE = "mysql:9.7.0"


class ServerUnavailable(Exception):
    """No test server of this kind can be had; the message says what to do."""


class NoSmallDisk(ServerUnavailable):
    """This machine does not let us mount a small disk for a server; the message says why."""


class NotOwned(Exception):
    """The server is an external one: tests must not stop, kill or remove it."""


# ------------------------------------------------------------------- the supervisor process


class _Warden:
    """The supervisor: owns one server for a test process, and cleans up when that process dies.

    Its source runs alone in `python -I -S -c`. The end of stdin tells of the test process's death
    at once; a changed parent id does too when a forked child holds the pipe open.
    As a subreaper it inherits what a killed server leaves behind (PostgreSQL's backends outlive
    their postmaster for a moment), so "gone" means every one of them.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self.setup = setup
        self.server: subprocess.Popen[bytes] | None = None
        self.disk: str | None = None
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.prctl = self.libc.prctl
        self.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        self.ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in self.ends:
            signal.signal(number, signal.SIG_IGN)

    def die_with_me(self) -> None:
        """In the server before its exec: let it not survive this process, should that be killed."""
        for number in self.ends:
            signal.signal(number, signal.SIG_DFL)
        # Set after the change of user, which would clear it; the process has one thread only.
        self.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG

    def start(self, argv: list[str]) -> int:
        switch = self.setup["user"] is not None
        with open(self.setup["log"], "ab") as log:
            self.server = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.setup["directory"],
                env=self.setup["environment"],
                start_new_session=True,
                preexec_fn=self.die_with_me,  # noqa: PLW1509
                user=self.setup["user"],
                group=self.setup["group"],
                extra_groups=[] if switch else None,
            )
        return self.server.pid

    def signal(self, number: int, seconds: float) -> int | None:
        """Send a signal, then wait so long for the end; the exit status if it has ended."""
        if self.server is None or self.server.poll() is not None:
            return self.poll()
        self.server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.server.wait(seconds)
        return self.poll()

    def poll(self) -> int | None:
        return 0 if self.server is None else self.server.poll()

    def kill(self) -> int | None:
        self.command("kill")
        if self.server is not None and self.server.poll() is None:
            self.server.kill()
            self.server.wait(60)
        until = time.monotonic() + 30
        while (left := self.children()) and time.monotonic() < until:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.002)
        return self.poll()

    def insert_disk(self, path: str, size: int) -> int:
        """Mount a disk of so many bytes in place of a directory, with what that holds.

        The mount is this process's and its children's own: nobody else sees it, and it cannot be
        left behind. An ordinary user may mount too, in a user namespace where only he exists.
        """
        uid, gid = os.geteuid(), os.getegid()
        new_namespaces = 0x00020000 | (0x10000000 if uid else 0)  # CLONE_NEWNS, CLONE_NEWUSER
        self.check(self.libc.unshare(new_namespaces), "unshare")
        if uid:
            maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
            for name, text in maps.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        self.mount("/", None, 0x44000, "")  # MS_REC | MS_PRIVATE: nothing goes back out
        os.makedirs(path, exist_ok=True)
        before = f"{path}.before"
        os.rename(path, before)
        os.mkdir(path)
        self.mount(path, "tmpfs", 0, f"size={size}")
        self.disk = path
        subprocess.run(["cp", "-a", f"{before}/.", path], check=True, timeout=60)
        shutil.rmtree(before)
        return self.leave_free(size)

    def leave_free(self, size: int) -> int:
        """Make the disk so large that so many bytes of it are free; how many really are."""
        assert self.disk is not None
        now = os.statvfs(self.disk)
        used = (now.f_blocks - now.f_bfree) * now.f_frsize
        self.mount(self.disk, "tmpfs", 32, f"size={used + size}")  # MS_REMOUNT
        now = os.statvfs(self.disk)
        return now.f_bfree * now.f_frsize

    def mount(self, path: str, kind: str | None, flags: int, options: str) -> None:
        kind_bytes = None if kind is None else kind.encode()
        done = self.libc.mount(
            b"none", path.encode(), kind_bytes, ctypes.c_ulong(flags), options.encode()
        )
        self.check(done, f"mount {path}")

    def check(self, status: int, what: str) -> None:
        if status:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), what)

    def forget_memory(self) -> None:
        """Free the shared memory of a PostgreSQL that could not do so itself, being killed."""
        pid_file = os.path.join(self.setup["directory"], "data", "postmaster.pid")
        with contextlib.suppress(OSError, IndexError, ValueError), open(pid_file) as lines:
            key_and_id = lines.read().split("\n")[6]
            self.libc.shmctl(int(key_and_id.split()[1]), 0, None)  # IPC_RMID

    def command(self, name: str) -> None:
        if self.setup[name]:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(self.setup[name], capture_output=True, timeout=60, check=False)

    def children(self) -> list[int]:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
                if int(stat.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
        return found

    def answer(self, n: int, do: str, **arguments: Any) -> dict[str, Any]:
        try:
            return {"n": n, "result": getattr(self, do)(**arguments)}
        except Exception as exc:
            return {"n": n, "error": f"{type(exc).__name__}: {exc}"}

    def serve(self) -> None:
        pending = b""
        while os.getppid() == self.setup["parent"]:
            if not select.select([0], [], [], 0.5)[0]:
                continue
            if not (data := os.read(0, 65536)):
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                os.write(1, json.dumps(self.answer(**json.loads(line))).encode() + b"\n")

    def main(self) -> None:
        with contextlib.suppress(OSError):
            self.serve()
        self.kill()
        self.forget_memory()
        self.command("remove")
        if self.disk is not None:
            self.libc.umount2(self.disk.encode(), 2)  # MNT_DETACH; its directory can then go
        for _ in range(5):
            shutil.rmtree(self.setup["directory"], ignore_errors=True)
            if not os.path.exists(self.setup["directory"]):
                break
            time.sleep(0.1)


_WARDEN = """\
from __future__ import annotations
import contextlib, ctypes, json, os, select, shutil, signal, subprocess, sys, time
{source}
_Warden(json.loads(sys.argv[1])).main()
"""


class Supervisor:
    """The test process's end of a `_Warden`: one request, one answer."""

    def __init__(self, **setup: Any) -> None:
        self._lock = threading.Lock()
        source = _WARDEN.format(source=inspect.getsource(_Warden))
        setup = {"user": None, "group": None, "kill": None, "remove": None, **setup}
        setup["parent"] = os.getpid()
        self._asked = 0
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", source, json.dumps(setup)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the test process, which then cleans up
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            self._asked += 1
            request = {"n": self._asked, "do": do, **arguments}
            try:
                stdin.write(json.dumps(request).encode() + b"\n")
                reply: dict[str, Any] = {}
                # An earlier question that Ctrl-C cut short may still have its answer under way.
                while reply.get("n") != self._asked:
                    if not select.select([stdout], [], [], 180)[0]:
                        raise ServerUnavailable(f"the server's supervisor is silent ({do})")
                    reply = json.loads(stdout.readline() or b"{}") or {"n": self._asked}
            except OSError as exc:
                raise ServerUnavailable(f"the server's supervisor has died: {exc}") from exc
        if "result" not in reply:
            raise ServerUnavailable(str(reply.get("error", "the server's supervisor has died")))
        return reply["result"]

    def close(self) -> None:
        """Kill the server, remove its directory, and wait for both."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait(120)


# ------------------------------------------------------------------- what all servers share


@dataclass(frozen=True)
class Material:
    """What a server shows of itself over TLS, and whose clients it believes; all of it PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes

    def write(self, directory: Path, owner: tuple[int, int] | None) -> None:
        for name in ("certificate", "key", "authority"):
            path = directory / f"{name}.pem"
            path.write_bytes(getattr(self, name))
            path.chmod(0o600)
            if owner is not None:
                os.chown(path, *owner)


@dataclass
class Server:
    """One server; `start()` before use, `remove()` after it. Made by the functions below."""

    kind: str
    directory: Path
    port: int
    admin_user: str
    admin_password: str = field(repr=False)
    socket_path: Path | None
    argv: Callable[[Server], list[str]] = field(repr=False)
    prepare: Callable[[Server], None] = field(repr=False)
    setup: dict[str, Any] = field(default_factory=dict, repr=False)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    stop_signal: int = signal.SIGTERM
    disk: Path | None = None
    tls: Material | None = field(default=None, repr=False)
    external_url: str | None = field(default=None, repr=False)
    _supervisor: Supervisor | None = field(default=None, repr=False)
    _pid: int = field(default_factory=os.getpid, repr=False)

    # -- life

    def start(self) -> Server:
        """Start and wait until it takes logins; a no-op when it is up."""
        if self.alive:
            return self
        if self.external_url is not None:
            raise ServerUnavailable(f"the {self.kind} server of the environment: {self._problem()}")
        attempts = 1
        if self._supervisor is None:
            self.prepare(self)
            if self.tls is not None:
                self._write_material(self.tls)
            self._supervisor = Supervisor(
                directory=str(self.directory),
                log=str(self.log),
                environment={**self.environment, "LC_ALL": "C"},
                **self.setup,
            )
            attempts = 3
            self._insert_disk()
        for left in reversed(range(attempts)):
            self._supervisor.ask("start", argv=self.argv(self))
            try:
                self._wait_ready()
                break
            except ServerUnavailable:
                # The port was free a moment ago; later starts keep it, since URLs name it.
                if not left or "ddress already in use" not in self.log_tail(40):
                    raise
                self.port = _free_port()
        return self

    def show(self, material: Material) -> None:
        """Show another certificate from now on; the server was started with one."""
        self._owned("change the certificate of")
        if material != self.tls:
            self.tls = material
            self._write_material(material)
            self.restart()  # ALTER INSTANCE RELOAD TLS takes only certificates that are right

    def _write_material(self, material: Material) -> None:
        owner = (self.setup["user"], self.setup["group"]) if self.setup.get("user") else None
        material.write(self.directory, owner)

    def _insert_disk(self) -> None:
        if self.disk is None:
            return
        assert self._supervisor is not None
        try:
            self._supervisor.ask("insert_disk", path=str(self.disk), size=DISK_BYTES)
        except ServerUnavailable as exc:
            raise NoSmallDisk(f"a small disk cannot be mounted here: {exc}") from exc

    def leave_free(self, size: int) -> None:
        """Leave so many bytes free on the server's own disk, which then is full soon, or not."""
        supervisor = self._owned("fill the disk of")
        assert supervisor is not None
        supervisor.ask("leave_free", size=size)

    def _wait_ready(self) -> None:
        until = time.monotonic() + READY_SECONDS
        while (problem := self._problem()) is not None:
            if not self.alive:
                raise ServerUnavailable(f"{self.kind} did not start: {self.log_tail()}")
            if time.monotonic() > until:
                raise ServerUnavailable(
                    f"{self.kind} takes no logins ({problem}): {self.log_tail()}"
                )
            time.sleep(0.02)

    def _problem(self) -> str | None:
        """Log in; and be sure that it is ours which answers on this port, not another run's."""
        place = "@@pid_file" if self.kind == "mysql" else "current_setting('data_directory')"
        try:
            answer = Path(self.execute(f"SELECT {place}")[0][0])
        except (psycopg.Error, mysql.connector.Error, OSError) as exc:
            return str(exc)
        ours = self.socket_path is None or answer.is_relative_to(self.directory)
        return None if ours else f"another server answers on port {self.port}"

    def stop(self) -> None:
        """An orderly shutdown; a no-op when it is down."""
        supervisor = self._owned("stop")
        if supervisor is None or not self.alive:
            return
        if supervisor.ask("signal", number=int(self.stop_signal), seconds=STOP_SECONDS) is None:
            raise ServerUnavailable(f"{self.kind} does not stop: {self.log_tail()}")

    def kill(self) -> None:
        """SIGKILL, and wait until nothing of the server is left."""
        supervisor = self._owned("kill")
        if supervisor is not None:
            supervisor.ask("kill")

    def signal(self, number: int) -> None:
        """Send a signal, for example SIGSTOP and SIGCONT to freeze and thaw it."""
        supervisor = self._owned("signal")
        if supervisor is not None:
            supervisor.ask("signal", number=int(number), seconds=0.0)

    def restart(self) -> None:
        self.stop()
        self.start()

    def remove(self) -> None:
        """Stop at once and remove the directory; may be called twice."""
        if self.external_url is not None or os.getpid() != self._pid:  # a forked child owns nothing
            return
        if self._supervisor is not None:
            self._supervisor.close()
            self._supervisor = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def _owned(self, action: str) -> Supervisor | None:
        if self.external_url is not None:
            raise NotOwned(f"cannot {action} the {self.kind} server of the environment")
        return self._supervisor

    def __enter__(self) -> Server:  # noqa: PYI034 - Self needs Python 3.11
        try:
            return self.start()
        except BaseException:
            self.remove()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    # -- what it is

    @property
    def alive(self) -> bool:
        if self.external_url is not None:
            return self._problem() is None
        return self._supervisor is not None and self._supervisor.ask("poll") is None

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def log_tail(self, lines: int = 12) -> str:
        with contextlib.suppress(OSError):
            return " | ".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return "no log"

    @property
    def version(self) -> str:
        return str(self.execute("SELECT version()")[0][0])

    @property
    def admin_url(self) -> str:
        return self.url("postgres" if self.kind == "postgresql" else "")

    def url(self, database: str, user: str | None = None, password: str | None = None) -> str:
        """A URL over TCP; without a user, the administrator's."""
        if user is None:
            user, password = self.admin_user, self.admin_password
        if self.external_url is not None:
            parts = urlsplit(self.external_url)
            host = parts.netloc.rpartition("@")[2]
            query = parts.query
        else:
            host, query = f"127.0.0.1:{self.port}", ""
        login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
        return urlunsplit((self.kind, f"{login}@{host}", f"/{quote(database)}", query, ""))

    # -- databases and logins

    def create_database(self, name: str) -> None:
        if self.kind == "postgresql":
            self.execute(f"CREATE DATABASE {self._name(name)} TEMPLATE template0 ENCODING 'UTF8'")
        else:
            self.execute(f"CREATE DATABASE {self._name(name)} CHARACTER SET utf8mb4")

    def drop_database(self, name: str) -> None:
        # From version 13 on; it ends the sessions that are still in there.
        force = (
            " WITH (FORCE)"
            if self.kind == "postgresql"
            and int(self.execute("SHOW server_version_num")[0][0]) >= 130000
            else ""
        )
        self.execute(f"DROP DATABASE IF EXISTS {self._name(name)}{force}")

    def create_login(
        self,
        name: str,
        password: str,
        database: str,
        privileges: Sequence[str] = ("SELECT", "INSERT", "UPDATE", "DELETE"),
    ) -> None:
        """Create a login that has these privileges on all tables of a database, now and later."""
        granted = ", ".join(privileges)
        secret = password.replace("\\", "\\\\") if self.kind == "mysql" else password
        secret = secret.replace("'", "''")
        if self.kind == "mysql":
            login = f"'{name}'@'%'"
            self.execute(f"CREATE USER {login} IDENTIFIED BY '{secret}'")
            if privileges:
                self.execute(f"GRANT {granted} ON {self._name(database)}.* TO {login}")
            return
        login = self._name(name)
        self.execute(f"CREATE ROLE {login} LOGIN PASSWORD '{secret}'")
        statements = [f"GRANT USAGE ON SCHEMA public TO {login}"]
        if privileges:
            statements += [
                f"GRANT {granted} ON ALL TABLES IN SCHEMA public TO {login}",
                f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT {granted} ON TABLES TO {login}",
            ]
        for statement in statements:
            self.execute(statement, database)

    def drop_login(self, name: str, database: str | None = None) -> None:
        if self.kind == "mysql":
            self.execute(f"DROP USER IF EXISTS '{name}'@'%'")
            return
        if database is not None:
            self.execute(f"DROP OWNED BY {self._name(name)}", database)
        self.execute(f"DROP ROLE IF EXISTS {self._name(name)}")

    def execute(self, statement: str, database: str | None = None) -> list[Any]:
        """Run one statement as the administrator, committed; its rows if it has any."""
        return self.execute_all([statement], database)

    def execute_all(self, statements: Sequence[str], database: str | None = None) -> list[Any]:
        """The same of several, on one connection; the rows of the last."""
        connection = self._connect(database)
        try:
            cursor = connection.cursor()
            for statement in statements:
                cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()

    def _name(self, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
            raise ValueError(f"not a plain name: {name!r}")
        return f'"{name}"' if self.kind == "postgresql" else f"`{name}`"

    def _connect(self, database: str | None = None) -> Any:
        if self.kind == "postgresql":
            url = self.url(database or "postgres")
            return psycopg.connect(url, autocommit=True, connect_timeout=5)
        parts = urlsplit(self.url(database or ""))
        # Over the socket no TLS is needed, which takes 45 ms of each connection.
        place: dict[str, Any] = (
            {"unix_socket": str(self.socket_path), "ssl_disabled": True}
            if self.socket_path
            else {"host": parts.hostname, "port": parts.port or 3306}
        )
        return mysql.connector.connect(
            **place,
            user=self.admin_user,
            password=self.admin_password,
            database=database,
            autocommit=True,
            connection_timeout=5,
            use_pure=True,
        )


def _directory(directory: Path | None) -> Path:
    """An empty directory on a path short enough for a unix socket (107 bytes)."""
    if directory is None:
        base = tempfile.gettempdir()
        return Path(tempfile.mkdtemp(prefix="cxp-", dir=base if len(base) < 60 else "/tmp"))
    if len(os.fsencode(directory)) > 80:
        raise ValueError(f"{directory} is too long for a unix socket: pass no directory")
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty: a server wants a directory of its own")
    return directory


def _free_port() -> int:
    """A port below the range that outgoing connections take theirs from, so that it stays free."""
    chooser = random.SystemRandom()
    for _ in range(200):
        port = chooser.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerUnavailable("no free TCP port between 20000 and 32000 on 127.0.0.1")


def _external(kind: str, url: str) -> Server:
    parts = urlsplit(url)
    return Server(
        kind=kind,
        directory=Path(os.devnull),
        port=parts.port or (5432 if kind == "postgresql" else 3306),
        admin_user=unquote(parts.username or ("postgres" if kind == "postgresql" else "root")),
        admin_password=unquote(parts.password or ""),
        socket_path=None,
        argv=lambda _: [],
        prepare=lambda _: None,
        external_url=url,
    )


def _run(argv: Sequence[str | Path], what: str, timeout: float = 120.0, **more: Any) -> str:
    """Run a program to its end; its output, or a one-line ServerUnavailable."""
    try:
        done = subprocess.run(
            [str(part) for part in argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            **more,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ServerUnavailable(f"{what}: {exc}") from exc
    if done.returncode:
        tail = " | ".join(done.stdout.strip().splitlines()[-6:])
        raise ServerUnavailable(f"{what}: exit status {done.returncode}: {tail}")
    return str(done.stdout)


# ------------------------------------------------------------------- MySQL


@dataclass(frozen=True)
class MySQLInstallation:
    """A mysqld and how to run it: `command` is the program with its loader in front, if any."""

    command: tuple[str, ...]
    options: tuple[str, ...]
    version: str
    source: str

    def tool(self, name: str) -> list[str]:
        """How to run another program of the installation, such as mysqldump."""
        *loader, server = self.command
        if loader:
            return [*loader, str(Path(server).parents[1] / "bin" / name)]
        return [shutil.which(name) or name]

    def write_tools(self, directory: Path) -> None:
        """Put the client programs where PATH may find them, whatever loader they need."""
        for name in ("mysql", "mysqldump", "mysqlbinlog"):
            script = directory / name
            script.write_text(f'#!/bin/sh\nexec {shlex.join(self.tool(name))} "$@"\n')
            script.chmod(0o755)


def cache_directory() -> Path:
    default = Path.home() / ".cache" / "contextuate_persist-tests"
    return Path(os.environ.get("CONTEXTUATE_TEST_CACHE") or default)


@contextlib.contextmanager
def _cache_lock(name: str) -> Iterator[Path]:
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + DOWNLOAD_SECONDS
    with (cache / f"{name}.lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ServerUnavailable(f"another process holds {lock.name}") from None
                time.sleep(0.1)
        yield cache


def find_mysql() -> Iterator[MySQLInstallation]:
    """A real mysqld on PATH, then the one in the cache, downloaded when it is not there yet."""
    server = shutil.which("mysqld", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if server is not None:
        text = _run([server, "--no-defaults", "--version"], "mysqld --version")
        version = re.search(r"Ver (\d+\.\d+\.\d+)", text)
        if version and "MariaDB" not in text:
            yield MySQLInstallation((server,), (), version[1], "PATH")
    # The number rises when more of the packages is kept than an older cache has.
    root = cache_directory() / f"mysql-2-{platform.machine()}"
    _once(root, _download_mysql)
    yield _unpacked_mysql(root)


def _once(root: Path, download: Callable[[Path], None]) -> None:
    """Have a directory of the cache made, unless it is there."""
    if not root.is_dir():
        with _cache_lock(root.name.partition("-")[0]) as cache:
            if not root.is_dir():
                for stale in cache.glob(f"{root.name}.tmp*"):
                    shutil.rmtree(stale, ignore_errors=True)
                download(root)


def _ready_mysql(installations: Iterable[MySQLInstallation]) -> tuple[MySQLInstallation, Path]:
    """The first installation that can initialise a data directory, and that directory.

    A distribution's mysqld may be confined (AppArmor) to directories that are not ours.
    """
    problems: list[str] = []
    for installation in installations:
        try:
            return installation, _mysql_template(installation)
        except ServerUnavailable as exc:
            problems.append(str(exc))
    raise ServerUnavailable("; ".join(problems))


def _with_loader(root: Path, program: str) -> tuple[str, ...]:
    """How to run an unpacked program: its libraries are newer than the system's."""
    loaders = sorted(root.glob("usr/lib/*/ld-linux*.so*"))
    if not loaders:
        raise ServerUnavailable(f"{root} has no loader: remove it to download again")
    loader = loaders[0]
    return (str(loader), "--library-path", str(loader.parent), str(root / program))


def _unpacked_mysql(root: Path) -> MySQLInstallation:
    share = root / "usr/share/mysql"
    return MySQLInstallation(
        command=_with_loader(root, "usr/sbin/mysqld"),
        options=(
            f"--basedir={root / 'usr'}",
            f"--lc-messages-dir={share}",
            f"--character-sets-dir={share / 'charsets'}",
            f"--plugin-dir={root / 'usr/lib/mysql/plugin'}",
        ),
        version=(root / "VERSION").read_text().strip(),
        source=str(root),
    )


APT_CONFIGURATION = """\
Dir::State "{work}";
Dir::State::Lists "{work}/lists";
Dir::State::status "{work}/status";
Dir::Cache "{work}";
Dir::Cache::Archives "{work}/archives";
Dir::Etc::SourceList "{work}/sid.sources";
Dir::Etc::SourceParts "-";
Dir::Etc::Preferences "-";
Dir::Etc::PreferencesParts "-";
Dir::Log "{work}";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
"""
# apt checks sid's signature against Debian's own keyring, which its package keeps current.
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def _debian_mirror() -> str:
    """The mirror that this machine takes Debian from."""
    listing = _run(
        ["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)"], "apt-get indextargets"
    )
    for line in listing.splitlines():
        label, _, uri = line.partition("|")
        if label == "Debian":
            return str(uri)
    # On a machine that never ran `apt-get update` there are no index files to name.
    for uri in re.findall(r"'(\S+?)dists/", _run(["apt-get", "--print-uris", "update"], "apt-get")):
        if "security" not in uri and "debian" in uri:
            return str(uri)
    raise ServerUnavailable("apt names no Debian mirror")


def _download_mysql(root: Path) -> None:
    with _downloaded(root, "MySQL", ["mysql-server-core", "mysql-client-core"]) as work:
        _trim_mysql(work / "root")
        version = next((work / "archives").glob("mysql-server-core_*")).name.split("_")[1]
        (work / "root/VERSION").write_text(re.sub(r"^\d+%3a|-[^-]*$", "", version) + "\n")


@contextlib.contextmanager
def _downloaded(root: Path, name: str, packages: Sequence[str]) -> Iterator[Path]:
    """Unpack packages of Debian sid with the libraries they need; no root rights needed.

    Gives a directory whose `root` is what becomes `root` in the end.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise ServerUnavailable(f"no apt-get and dpkg to download {name} with")
    if not KEYRING.is_file():
        raise ServerUnavailable(f"{KEYRING} is missing: install debian-archive-keyring")
    work = root.with_name(f"{root.name}.tmp{os.getpid()}")
    try:
        for part in ("lists/partial", "archives/partial", "root"):
            (work / part).mkdir(parents=True)
        (work / "status").touch()
        (work / "apt.conf").write_text(APT_CONFIGURATION.format(work=work))
        (work / "sid.sources").write_text(
            f"Types: deb\nURIs: {_debian_mirror()}\nSuites: sid\nComponents: main\n"
            f"Signed-By: {KEYRING}\n"
        )
        for attempt in (1, 2):
            try:
                _apt_download(work, f"downloading {name} with apt-get", packages)
                break
            except ServerUnavailable:
                if attempt == 2:
                    raise
                time.sleep(2)
        for package in sorted((work / "archives").glob("*.deb")):
            _run(["dpkg", "-x", package, work / "root"], f"unpacking {package.name}")
        yield work
        (work / "root").rename(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _apt_download(work: Path, what: str, packages: Sequence[str]) -> None:
    apt = ["apt-get", "-q", "-c", str(work / "apt.conf")]
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    # Without Error-Mode an update that fetched nothing ends with status 0 and a warning.
    _run(
        [*apt, "-o", "APT::Update::Error-Mode=any", "update"],
        what,
        DOWNLOAD_SECONDS / 2,
        env=environment,
    )
    _run(
        [*apt, "-y", "--no-install-recommends", "--download-only", "install", *packages],
        what,
        DOWNLOAD_SECONDS,
        env=environment,
    )


def _trim_mysql(root: Path) -> None:
    """Leave what the server and the four client programs need: a third of the whole."""
    programs = {"mysql", "mysqldump", "mysqladmin", "mysqlbinlog"}
    for program in (root / "usr/bin").iterdir():
        if program.name not in programs:
            program.unlink()
    for pattern in (
        "etc",
        "usr/share/[!m]*",
        "usr/share/man",
        "usr/lib/*/perl*",
        "usr/lib/*/libperl*",
        "usr/lib/*/gconv",
        "usr/lib/mysql/plugin/*_client.so",
        "usr/lib/mysql/plugin/debug",
    ):
        for path in root.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


MYSQL_OPTIONS: Mapping[str, str | int] = {
    "bind-address": "127.0.0.1",
    "secure-file-priv": "NULL",
    "mysqlx": "OFF",
    "skip-name-resolve": "ON",
    "innodb-buffer-pool-size": "64M",
    "innodb-redo-log-capacity": "64M",
    "table-open-cache": 400,
}


def _mysql_arguments(
    installation: MySQLInstallation, data: Path, options: Mapping[str, str | int]
) -> list[str]:
    arguments = [*installation.command, "--no-defaults", *installation.options]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    arguments.append(f"--datadir={data}")
    if os.geteuid() == 0:
        # An unprivileged account could not read a cache below root's home.
        arguments.append("--user=root")
    return arguments


def _mysql_template(installation: MySQLInstallation) -> Path:
    """An initialised data directory to copy: making one takes seconds, copying it far less."""
    template = cache_directory() / f"mysql-data-{installation.version}-{platform.machine()}"
    if template.is_dir():
        return template
    with _cache_lock("mysql-data") as cache:
        if template.is_dir():
            return template
        for stale in cache.glob(f"{template.name}.tmp*"):
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f"{template.name}.tmp", dir=cache))
        password = secrets.token_hex(16)
        (work / "password").write_text(password)
        # skip-name-resolve: 127.0.0.1 is not `localhost`, so the administrator needs both.
        (work / "init.sql").write_text(
            f"ALTER USER 'root'@'localhost' IDENTIFIED BY '{password}';\n"
            f"CREATE USER 'root'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
            "GRANT ALL ON *.* TO 'root'@'127.0.0.1' WITH GRANT OPTION;\n"
        )
        try:
            options = {**MYSQL_OPTIONS, "init-file": str(work / "init.sql")}
            arguments = _mysql_arguments(installation, work / "data", options)
            _run([*arguments, "--initialize-insecure"], "mysqld --initialize", 300)
            # Each server makes an identity of its own.
            (work / "data/auto.cnf").unlink(missing_ok=True)
            work.rename(template)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return template


def mysql_server(
    directory: Path | None = None,
    *,
    options: Mapping[str, str | int] | None = None,
    installation: MySQLInstallation | None = None,
    disk: str | None = None,
    tls: Material | None = None,
) -> Server:
    """A MySQL server, not yet started; durable settings are the server's defaults.

    `disk` is what of the server's directory lies on a disk of its own, see `Server.leave_free`.
    Without `tls` it has a certificate that it made itself.
    """
    if installation is None and (url := os.environ.get("CONTEXTUATE_TEST_MYSQL_URL")):
        return _external("mysql", url)
    try:
        chosen, template = _ready_mysql([installation] if installation else find_mysql())
    except ServerUnavailable as exc:
        if installation is None and _docker_runs():
            return _docker_server("mysql", directory)
        raise ServerUnavailable(
            f"no MySQL for the tests ({exc}): install mysql-server, set CONTEXTUATE_TEST_MYSQL_URL "
            "to an administrator's URL, or let apt-get reach a Debian mirror"
        ) from exc
    home = _directory(directory)
    merged = {**MYSQL_OPTIONS, **{k.replace("_", "-"): v for k, v in (options or {}).items()}}
    if tls is not None:
        merged |= {f"ssl-{option}": str(home / file) for option, file in TLS_FILES.items()}

    def argv(server: Server) -> list[str]:
        return [
            *_mysql_arguments(chosen, home / "data", merged),
            f"--port={server.port}",
            f"--socket={server.socket_path}",
            f"--pid-file={home / 'mysqld.pid'}",
            f"--tmpdir={home}",
        ]

    def prepare(_: Server) -> None:
        copy: list[str | Path] = ["cp", "-a", "--reflink=auto", template / "data", home / "data"]
        _run(copy, "copying MySQL's data directory")

    return Server(
        kind="mysql",
        directory=home,
        port=_free_port(),
        admin_user="root",
        admin_password=(template / "password").read_text(),
        socket_path=home / "mysqld.sock",
        argv=argv,
        prepare=prepare,
        disk=home / disk if disk else None,
        tls=tls,
    )


TLS_FILES = {"cert": "certificate.pem", "key": "key.pem", "ca": "authority.pem"}

# ------------------------------------------------------------------- PostgreSQL

POSTGRESQL_OPTIONS: Mapping[str, str | int] = {
    "listen_addresses": "127.0.0.1",
    "shared_buffers": "32MB",
    "max_connections": 100,
    "max_wal_size": "256MB",
    # In files of its own directory, which go with it, also when it is killed.
    "dynamic_shared_memory_type": "mmap",
}


def postgresql_server(
    directory: Path | None = None,
    *,
    options: Mapping[str, str | int] | None = None,
    binaries: PostgreSQLBinaries | None = None,
    disk: str | None = None,
    tls: Material | None = None,
    access: Sequence[str] = (),
) -> Server:
    """A PostgreSQL server, not yet started; logins need a password, over TCP and socket alike.

    `disk` is what of the server's directory lies on a disk of its own, see `Server.leave_free`.
    Without `tls` it offers none. `access` are lines before those of its pg_hba.conf.
    """
    if binaries is None and (url := os.environ.get("CONTEXTUATE_TEST_POSTGRESQL_URL")):
        return _external("postgresql", url)
    try:
        account = Account.choose(Path(os.devnull))
        # As root the server's account must be able to read them, so never below root's home.
        copies = ROOT_DIRECTORY.parent / "binaries"
        chosen = readable_binaries(binaries or find_postgresql(), account, copies)
    except PersistenceError as exc:
        if binaries is None and _docker_runs():
            return _docker_server("postgresql", directory)
        raise ServerUnavailable(
            f"no PostgreSQL for the tests ({exc}); or set CONTEXTUATE_TEST_POSTGRESQL_URL to an "
            "administrator's URL"
        ) from exc
    home = _directory(directory)
    if (blocked := account.unreachable(*reversed(home.parents))) is not None:
        raise ValueError(f"{account.name} may not enter {blocked}: pass no directory")
    merged = {**POSTGRESQL_OPTIONS, **(options or {})}
    if tls is not None:
        files = {f"ssl_{option}_file": home / file for option, file in TLS_FILES.items()}
        merged |= {"ssl": "on", **{option: str(file) for option, file in files.items()}}
    password = secrets.token_hex(16)

    def argv(server: Server) -> list[str]:
        settings = {**merged, "port": server.port, "unix_socket_directories": home}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(chosen.bindir / "postgres"), "-D", str(home / "data"), *words]

    def prepare(_: Server) -> None:
        secret = home / "password"
        secret.write_text(password)
        home.chmod(0o700)
        if account.switch:
            for path in (home, secret):
                os.chown(path, account.uid, account.gid)
        done = account.run(
            [
                chosen.bindir / "initdb", "-D", home / "data", "-U", "postgres", "-E", "UTF8",
                "--no-locale", "--no-sync", "-A", "scram-sha-256", f"--pwfile={secret}",
            ]
        )  # fmt: skip
        secret.unlink()
        if done.returncode:
            raise ServerUnavailable(f"initdb: {done.stdout.strip()[-400:]}")
        rules = home / "data/pg_hba.conf"
        rules.write_text("".join(f"{line}\n" for line in access) + rules.read_text())

    return Server(
        kind="postgresql",
        directory=home,
        port=_free_port(),
        admin_user="postgres",
        admin_password=password,
        socket_path=home,
        argv=argv,
        prepare=prepare,
        setup={"user": account.uid, "group": account.gid} if account.switch else {},
        environment={k: v for k, v in os.environ.items() if not k.startswith("PG")},
        stop_signal=signal.SIGINT,
        disk=home / disk if disk else None,
        tls=tls,
    )


# ------------------------------------------------------------------- PgBouncer

PGBOUNCER_SETTINGS = """\
[databases]
* = host={host} port={server_port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {home}/users
pool_mode = transaction
default_pool_size = {size}
"""


def pgbouncer(server: Server, logins: Mapping[str, str], size: int) -> Server:
    """A PgBouncer before a PostgreSQL, in transaction mode, with `size` connections per account.

    Seen from outside it is the server, on another port. `logins` are passwords by account.
    """
    command = _find_pgbouncer()
    account = Account.choose(Path(os.devnull))
    home = _directory(None)
    place = urlsplit(server.admin_url)
    known = {**logins, server.admin_user: server.admin_password}

    def argv(pooler: Server) -> list[str]:
        settings = PGBOUNCER_SETTINGS.format(
            host=place.hostname, server_port=place.port, port=pooler.port, home=home, size=size
        )
        (home / "pgbouncer.ini").write_text(settings)
        (home / "pgbouncer.ini").chmod(0o644)
        # It refuses to be root; it has loaded its libraries, which only root may reach, by then.
        switch = ["--user", account.name] if account.switch else []
        return [*command, *switch, str(home / "pgbouncer.ini")]

    def prepare(_: Server) -> None:
        users = home / "users"
        users.write_text("".join(f'"{name}" "{word}"\n' for name, word in known.items()))
        users.chmod(0o600)
        if account.switch:
            for path in (home, users):
                os.chown(path, account.uid, account.gid)

    return Server(
        kind="postgresql",
        directory=home,
        port=_free_port(),
        admin_user=server.admin_user,
        admin_password=server.admin_password,
        socket_path=None,
        argv=argv,
        prepare=prepare,
    )


def _find_pgbouncer() -> Sequence[str]:
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is not None:
        return [found]
    root = cache_directory() / f"pgbouncer-1-{platform.machine()}"
    _once(root, _download_pgbouncer)
    return _with_loader(root, "usr/sbin/pgbouncer")


def _download_pgbouncer(root: Path) -> None:
    with _downloaded(root, "PgBouncer", ["pgbouncer"]) as work:
        for path in (work / "root").iterdir():
            if path.name != "usr" and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        for path in (work / "root/usr").iterdir():
            if path.name not in ("lib", "sbin"):
                shutil.rmtree(path)


# ------------------------------------------------------------------- Docker, the last resort


def _docker_runs() -> bool:
    if shutil.which("docker") is None:
        return False
    with contextlib.suppress(ServerUnavailable):
        _run(["docker", "version", "--format", "{{.Server.Version}}"], "docker version", 20)
        return True
    return False


def _docker_server(kind: str, directory: Path | None) -> Server:
    home = _directory(directory)
    name = f"contextuate-test-{secrets.token_hex(6)}"
    password = secrets.token_hex(16)
    image, inside, variable = (
        (POSTGRESQL_IMAGE, 5432, "POSTGRES_PASSWORD")
        if kind == "postgresql"
        else (MYSQL_IMAGE, 3306, "MYSQL_ROOT_PASSWORD")
    )

    def prepare(server: Server) -> None:
        _run(["docker", "pull", "-q", image], f"docker pull {image}", DOWNLOAD_SECONDS)
        publish = f"127.0.0.1:{server.port}:{inside}"
        create = ["docker", "create", "--name", name, "-p", publish, "-e", variable, image]
        _run(create, "docker create", env={**os.environ, variable: password})

    return Server(
        kind=kind,
        directory=home,
        port=_free_port(),
        admin_user="postgres" if kind == "postgresql" else "root",
        admin_password=password,
        socket_path=None,
        # The client passes signals on to the container and ends with it.
        argv=lambda _: ["docker", "start", "--attach", name],
        prepare=prepare,
        setup={"kill": ["docker", "kill", name], "remove": ["docker", "rm", "-f", "-v", name]},
        stop_signal=signal.SIGINT if kind == "postgresql" else signal.SIGTERM,
    )


# ------------------------------------------------------------------- for humans


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__)
    parser.add_argument("kind", choices=["mysql", "postgresql"])
    kind = parser.parse_args().kind

    received: list[int] = []

    def leave(number: int, _: object) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    with mysql_server() if kind == "mysql" else postgresql_server() as server:
        print(server.admin_url, flush=True)
        # The list too: an exception that a handler raises inside a __del__ is lost.
        while not received:
            if select.select([sys.stdin], [], [], 0.5)[0] and not os.read(sys.stdin.fileno(), 4096):
                break


if __name__ == "__main__":
    try:
        main()
    except ServerUnavailable as problem:
        sys.exit(f"tests.servers: {problem}")
