"""Schemas and migrations: find their files, split them, apply and upgrade under a lock, verify.

The SQL that asks and changes a catalogue is the stores' own: here it is a SchemaSession.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from contextuate_persist.errors import SchemaError

if TYPE_CHECKING:
    from contextuate_persist.dumps import Contents

#: The schema that this version of the library reads and writes.
SCHEMA_VERSION = 1
#: How the table of events may be laid out.
LAYOUTS = ("plain", "partitioned")


class SchemaVersion(NamedTuple):
    """What `schema_version` says of a database."""

    version: int
    layout: str


class SchemaSession(Protocol):
    """A connection of the owner that holds the schema lock of a database."""

    place: str
    backend: str

    def read_version(self) -> SchemaVersion | None:
        """The version, or None if no version is recorded."""
        ...

    def read_checksums(self) -> dict[int, str | None]:
        """The checksums of the applied files, by version."""
        ...

    def read_columns(self) -> dict[str, set[str]]:
        """The columns of each table of the database."""
        ...

    def holds(self, query: str) -> bool:
        """Whether a query gives a row."""
        ...

    def run(self, statement: str) -> None:
        """Execute one statement."""
        ...

    def has_rows(self, table: str) -> bool: ...

    def around(self, contents: Contents) -> tuple[list[str], list[str]]:
        """What to run before and after the rows of a backup are loaded."""
        ...

    def record(self, version: int, name: str, checksum: str | None) -> None:
        """Say that a version is there now."""
        ...

    def transaction(self) -> AbstractContextManager[object]:
        """All or nothing, where the server can: MySQL commits every DDL statement by itself."""
        ...


def schema_file(name: str) -> Path:
    """A file of schemas/, which lies in the installed package or, in a checkout, beside it."""
    package = Path(__file__).resolve().parent
    for directory in (package / "schemas", package.parent / "schemas"):
        if (directory / name).exists():
            return directory / name
    raise SchemaError(
        f"{name} is missing from this installation: install contextuate-persist again"
    )


def require_version(found: SchemaVersion | None, place: str) -> SchemaVersion:
    """Raise SchemaError, with what to do, unless the database has the version that we know."""
    if found is None:
        raise SchemaError(f"{place} has no schema yet: run `contextuate-persist init` as its owner")
    if found.version < SCHEMA_VERSION:
        raise SchemaError(
            f"{place} has schema version {found.version}, this library needs {SCHEMA_VERSION}: "
            "run `contextuate-persist upgrade` as its owner"
        )
    if found.version > SCHEMA_VERSION:
        raise SchemaError(
            f"{place} has schema version {found.version}, this library knows {SCHEMA_VERSION}: "
            "install a newer contextuate-persist"
        )
    if found.layout not in LAYOUTS:
        raise SchemaError(
            f"{place} has the layout {found.layout!r}, this library knows {', '.join(LAYOUTS)}: "
            "install a newer contextuate-persist"
        )
    return found


# --- Applying and upgrading -----------------------------------------------------------------------


def apply(session: SchemaSession) -> bool:
    """Create the current schema in an empty database; False if it is there already.

    Raises SchemaError for another version, and for a database with tables of another origin.
    """
    if found := session.read_version():
        require_version(found, session.place)
        return False
    origin = _origin(session.read_columns())
    if origin == "contextuate":
        raise SchemaError(
            f"{session.place} was made by contextuate's own SQL: run `contextuate-persist upgrade` "
            "to adopt it with all its data"
        )
    _refuse_foreign(origin, session.place)
    _run(session, base_migration(session.backend))
    return True


def pending(session: SchemaSession) -> list[Migration]:
    """The migrations that bring the database to the current version; none if it is there.

    Raises SchemaError for a newer database, a file that was altered after it was applied, and
    tables of another origin.
    """
    found = session.read_version()
    if found is None:
        origin = _origin(session.read_columns())
        _refuse_foreign(origin, session.place)
        if origin == "empty":
            return [base_migration(session.backend)]
    elif found.version >= SCHEMA_VERSION:
        require_version(found, session.place)
    migrations = load_migrations(session.backend)
    applied = session.read_checksums() if found else {}
    for migration in migrations:
        checksum = applied.get(migration.version)
        if checksum is not None and checksum != migration.checksum:
            raise SchemaError(
                f"{session.place}: migration {migration.version:04} was applied from another file "
                "than this installation's: install contextuate-persist again"
            )
    version = found.version if found else 0
    return [migration for migration in migrations if migration.version > version]


def upgrade(session: SchemaSession) -> list[Migration]:
    """Apply what is pending, one migration after the other; returns them."""
    migrations = pending(session)
    for migration in migrations:
        _run(session, migration)
    return migrations


def _run(session: SchemaSession, migration: Migration) -> None:
    with session.transaction() if migration.transactional else nullcontext():
        for step in migration.steps:
            if step.unless is None or not session.holds(step.unless):
                session.run(step.statement)
        # Last: where statements commit by themselves, a version that is recorded is complete.
        session.record(migration.version, migration.name, migration.checksum)


def _origin(columns: dict[str, set[str]]) -> str:
    """Who made the tables: nobody ("empty"), contextuate, or somebody else ("foreign").

    A half-made schema of ours (MySQL, interrupted) counts as empty: applying it goes on.
    """
    original = {"id", "session_id", "hook_type", "machine_id", "data"}
    if "contextuate_original_events" in columns:
        return "contextuate"
    if "schema_version" in columns:
        return "empty"
    if not {"sessions", "events"} & columns.keys():
        return "empty"
    events, sessions = columns.get("events", set()), columns.get("sessions", set())
    ours = "seq" not in events and events >= original and "manual_parent_session_id" in sessions
    return "contextuate" if ours else "foreign"


def _refuse_foreign(origin: str, place: str) -> None:
    if origin == "foreign":
        raise SchemaError(f"{place} has tables `sessions` or `events` of another origin: use an "
                          "empty database")  # fmt: skip


# --- Files ----------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A statement, and a query: if that gives a row, the statement has been run before."""

    statement: str
    unless: str | None = None


class Migration(NamedTuple):
    """A file of migrations/BACKEND/NNNN_name.sql, ready to run.

    Comment lines direct how: `-- transactional: yes` or `no`, once; `-- unless: QUERY` above a
    statement that cannot be run twice; `-- include: FILE` for all statements of another file.
    """

    version: int
    name: str
    transactional: bool
    steps: tuple[Step, ...]
    checksum: str | None


def base_migration(backend: str) -> Migration:
    """The whole current schema as one migration."""
    steps = tuple(_included(backend, f"{backend}-schema.sql"))
    return Migration(SCHEMA_VERSION, "base schema", backend == "postgresql", steps, None)


def layout_of(found: SchemaVersion | None) -> str:
    """The layout of a database, that of a new one if it has none yet or one that is unknown."""
    return found.layout if found and found.layout in LAYOUTS else LAYOUTS[0]


def shape_file(backend: str, layout: str) -> str:
    """The name of the file that says what a database of a layout looks like."""
    return f"{backend}-shape.txt" if layout == "plain" else f"{backend}-{layout}-shape.txt"


def read_shape(backend: str, layout: str = "plain") -> frozenset[str]:
    """What the current schema makes, a line for each column, index and rule, to compare with."""
    text = schema_file(shape_file(backend, layout)).read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


def shape_name(line: str) -> str:
    """What a line of a shape is about: `column events.data`."""
    return " ".join(line.split(" ", 2)[:2])


def additions(backend: str, table: str, live: Iterable[str]) -> set[str]:
    """The columns, rules and indexes that a table of the plain layout has beyond the schema's."""
    ours = {shape_name(line) for line in read_shape(backend)}
    more = {shape_name(line) for line in live} - ours
    added: set[str] = set()
    for kind in ("column", "constraint", "index"):
        names = {name.partition(".")[2] for name in more if name.startswith(f"{kind} {table}.")}
        if kind == "index":
            # Behind a constraint is an index of its name.
            names = {name for name in names if f"constraint {table}.{name}" not in more}
        added |= {f"{kind} {name} on table {table}" for name in names}
    return added


def load_migrations(backend: str) -> list[Migration]:
    """All migrations of a backend, by version."""
    files = schema_file(f"migrations/{backend}").glob("*.sql")
    return [_load(backend, file) for file in sorted(files)]


def _load(backend: str, file: Path) -> Migration:
    named = re.fullmatch(r"(\d{4})_([a-z0-9_]+)\.sql", file.name)
    text = file.read_text(encoding="utf-8")
    declared = re.search(r"^-- transactional: (yes|no)$", text, re.MULTILINE)
    if not named or not declared:
        raise SchemaError(f"{file.name}: NNNN_name.sql with `-- transactional: yes|no` is needed")
    steps: list[Step] = []
    for comments, statement in _pieces(text, backend):
        for name in re.findall(r"^-- include: (\S+)$", comments, re.MULTILINE):
            steps += _included(backend, name)
        if statement:
            unless = re.search(r"^-- unless: (.+)$", comments, re.MULTILINE)
            steps.append(Step(statement, unless[1] if unless else None))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return Migration(int(named[1]), named[2], declared[1] == "yes", tuple(steps), checksum)


def _included(backend: str, name: str) -> Iterator[Step]:
    # Without the version: whoever runs the steps records it, when everything is done.
    text = schema_file(name).read_text(encoding="utf-8")
    for statement in split_script(text, backend):
        if not statement.startswith("INSERT INTO schema_version"):
            yield Step(statement)


# What may hold a delimiter that ends nothing: comments, quoted text, quoted names.
_OPAQUE = {
    "mysql": re.compile(
        r"""--(?=\s)[^\n]*|\#[^\n]*|/\*.*?\*/|'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`[^`]*`""",
        re.DOTALL,
    ),
    "postgresql": re.compile(
        r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|\$(\w*)\$.*?\$\1\$""", re.DOTALL
    ),
}
_DELIMITER = re.compile(r"^[ \t]*DELIMITER[ \t]+(\S+)[ \t]*$", re.IGNORECASE | re.MULTILINE)
_COMMENT = re.compile(r"\s*(?:--(?=\s)[^\n]*(?:\n|$)|/\*(?!!).*?\*/)", re.DOTALL)


def split_script(script: str, backend: str) -> list[str]:
    """The statements of a script for `psql` or `mysql`, without their leading comments.

    One statement for each call: of several in one call MySQL's driver reports only the errors of
    the first. MySQL's DELIMITER commands are followed, its /*! comments stay.
    """
    return [statement for _, statement in _pieces(script, backend) if statement]


def _pieces(script: str, backend: str) -> Iterator[tuple[str, str]]:
    """Pairs of leading comments and statement; the last statement may be empty."""
    opaque, delimiter = _OPAQUE[backend], ";"
    start = position = 0
    while position < len(script):
        at_line_start = position == 0 or script[position - 1] == "\n"
        command = _DELIMITER.match(script, position) if at_line_start else None
        if command and not _parted(script[start:position])[1]:
            yield _parted(script[start:position])
            delimiter = command[1]
            start = position = command.end()
        elif hidden := opaque.match(script, position):
            position = hidden.end()
        elif script.startswith(delimiter, position):
            yield _parted(script[start:position])
            start = position = position + len(delimiter)
        else:
            position += 1
    yield _parted(script[start:])


def _parted(text: str) -> tuple[str, str]:
    end = 0
    while match := _COMMENT.match(text, end):
        end = match.end()
    return text[:end], text[end:].strip()
