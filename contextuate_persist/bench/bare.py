"""The opponent: the bare drivers, on the same server and tables, with as little work as can be.

What the client would have to do is done beforehand: rows come as prepared buffers or parameters.
The library itself never writes like this: nothing here survives a repeated event.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import mysql.connector
import orjson
import psycopg
from psycopg.types.json import Jsonb

from contextuate_persist import mysql_store, postgresql_store, records
from contextuate_persist.bench import load
from contextuate_persist.model import MonitorEvent, SessionMeta

COLUMNS = (
    "id",
    "session_id",
    "timestamp",
    "event_type",
    "hook_type",
    "parent_session_id",
    "machine_id",
    "working_directory",
    "tool_name",
    "tool_use_id",
    "data",
    "exact",
)
#: The original's columns, and where an event has them.
ORIGINAL_COLUMNS = (*COLUMNS[:8], "data")


class Bare(ABC):
    """One connection of a bare driver, in autocommit; to the original's tables if it says so."""

    backend: ClassVar[str]
    _read: ClassVar[str]  # what the store reads of an event; its payload last
    _read_original: ClassVar[str]
    _type: ClassVar[str]

    def __init__(self, *, original: bool = False) -> None:
        self._original = original
        self._columns = ORIGINAL_COLUMNS if original else COLUMNS

    @property
    @abstractmethod
    def limit_name(self) -> str:
        """The server's fastest way in."""

    @abstractmethod
    def prepare(self, events: Iterable[MonitorEvent]) -> Any:
        """A batch as the server's fastest way in takes it; not measured."""

    @abstractmethod
    def load(self, batch: Any) -> None:
        """Store a prepared batch in one transaction."""

    @abstractmethod
    def prepare_insert(self, event: MonitorEvent) -> Any:
        """The parameters of one INSERT; not measured."""

    @abstractmethod
    def insert(self, parameters: Any) -> None:
        """One event in one INSERT in autocommit."""

    @abstractmethod
    def fetch(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows; JSON as it comes."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes on disk of the events, under "table", and of each of their indexes."""

    @abstractmethod
    def settle(self) -> None:
        """Count anew, and wait until the server has done what it put off while events came."""

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """The server's version, and how safely and in how much memory it works."""

    @abstractmethod
    def another(self) -> Bare:
        """One more connection to the same place."""

    @abstractmethod
    def close(self) -> None: ...

    def add_sessions(self, sessions: Iterable[SessionMeta]) -> None:
        """What the events refer to; sessions that are there stay."""
        for session in sessions:
            self.fetch(
                "INSERT INTO sessions (session_id, machine_id, working_directory, start_time) "
                "SELECT %s, %s, %s, %s FROM (SELECT 1 AS one) AS new "
                "WHERE NOT EXISTS (SELECT 1 FROM sessions WHERE session_id = %s)",
                (
                    session.session_id,
                    session.machine_id,
                    session.working_directory,
                    session.start_time,
                    session.session_id,
                ),
            )

    def last_events(self, session_id: str, limit: int) -> list[Any]:
        return self._events("WHERE session_id = %s", (session_id,), limit)

    def recent_events(self, limit: int) -> list[Any]:
        return self._events("", (), limit)

    def tool_events(self, tool_name: str, limit: int) -> list[Any]:
        return self._events("WHERE tool_name = %s", (tool_name,), limit)

    def event(self, event_id: str) -> list[Any]:
        return self._events(f"WHERE id = {self._id}", (event_id,), 1, order="")

    def counts(self, session_id: str | None = None) -> list[Any]:
        where, parameters = ("WHERE session_id = %s", (session_id,)) if session_id else ("", ())
        return self.fetch(
            f"SELECT {self._type}, COUNT(*) FROM events {where} GROUP BY 1",
            parameters,
        )

    def session(self, session_id: str) -> list[Any]:
        return self.fetch(
            f"SELECT {SESSION_READ} FROM sessions WHERE session_id = %s",
            (session_id,),
        )

    def newest_sessions(self, limit: int) -> list[Any]:
        return self.fetch(
            f"SELECT {SESSION_READ} FROM sessions "
            f"ORDER BY start_time DESC, session_id DESC LIMIT {limit}"
        )

    def sessions_with_counts(self, limit: int) -> list[Any]:
        """Sessions joined with how many events they have."""
        return self.fetch(
            f"SELECT {SESSION_READ}, "
            "(SELECT COUNT(*) FROM events AS e WHERE e.session_id = s.session_id) "
            f"FROM sessions AS s ORDER BY start_time DESC, session_id DESC LIMIT {limit}"
        )

    _id: ClassVar[str]

    def _events(
        self, where: str, parameters: Sequence[Any], limit: int, order: str | None = None
    ) -> list[Any]:
        columns = self._read_original if self._original else self._read
        if order is None:
            order = "ORDER BY timestamp DESC" + ("" if self._original else ", seq DESC")
        rows = self.fetch(
            f"SELECT {columns} FROM events {where} {order} LIMIT {limit}",
            parameters,
        )
        return [(*row[:-1], orjson.loads(row[-1])) for row in rows]

    def _values(self, event: MonitorEvent) -> list[Any]:
        row = records.encode_event(records.check_event(event))
        found = {
            name: getattr(row, name) if hasattr(row, name) else getattr(event, name)
            for name in self._columns
        }
        if self._original:
            found["id"] = load.random_id(row.id)
            # Its types are fewer.
            found["event_type"] = ORIGINAL_TYPES.get(event.event_type, "message")
            found["hook_type"] = ORIGINAL_HOOKS.get(event.hook_type, "Notification")
        return list(found.values())


SESSION_READ = (
    "session_id, machine_id, working_directory, start_time, end_time, status, parent_session_id, "
    "manual_parent_session_id, child_session_ids, agent_type, model, transcript_path, "
    "is_user_initiated, is_pinned, hidden, label, token_usage_input, token_usage_output, "
    "token_usage_cache_read, token_usage_cache_creation, exact"
)
ORIGINAL_TYPES = {
    name: name for name in ("tool_call", "tool_result", "notification", "session_start", "error")
}
ORIGINAL_HOOKS = {
    name: name for name in ("PreToolUse", "PostToolUse", "Notification", "Stop", "SubagentStop")
}


class BarePostgreSQL(Bare):
    backend = "postgresql"
    _type = "event_type::text"
    _id = "%s::uuid"
    _read = (
        "id::text, seq, timestamp, session_id, parent_session_id, machine_id, working_directory, "
        "COALESCE(event_type_name, event_type::text), COALESCE(hook_type_name, hook_type::text), "
        "exact, data"
    )
    _read_original = (
        "id::text, timestamp, session_id, parent_session_id, machine_id, working_directory, "
        "event_type::text, hook_type::text, data"
    )

    def __init__(self, url: str, *, original: bool = False) -> None:
        super().__init__(original=original)
        self._url = url
        self._connection: psycopg.Connection[Any] = psycopg.connect(url, autocommit=True)
        self._connection.adapters.register_loader("jsonb", postgresql_store.RawJson)

    @property
    def limit_name(self) -> str:
        return "binary COPY"

    def prepare(self, events: Iterable[MonitorEvent]) -> Any:
        parts = [b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)]
        for event in events:
            parts.append(struct.pack("!h", len(self._columns)))
            for name, value in zip(self._columns, self._values(event), strict=True):
                raw = _binary(name, value)
                parts.append(b"\xff\xff\xff\xff" if raw is None else _sized(raw))
        parts.append(b"\xff\xff")
        return b"".join(parts)

    def load(self, batch: Any) -> None:
        statement = f"COPY events ({', '.join(self._columns)}) FROM STDIN (FORMAT BINARY)"
        with self._connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            copy.write(batch)

    def prepare_insert(self, event: MonitorEvent) -> Any:
        values = dict(zip(COLUMNS, self._values(event), strict=True))
        values["data"] = Jsonb(values["data"], dumps=bytes)
        return {**values, "event_type_name": None, "hook_type_name": None}

    def insert(self, parameters: Any) -> None:
        self._connection.execute(postgresql_store.INSERT_EVENTS.encode(), parameters)

    def fetch(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        cursor = self._connection.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def sizes(self) -> dict[str, int]:
        heap = self.fetch("SELECT pg_table_size('events'::regclass)")[0][0]
        indexes = self.fetch(
            "SELECT indexrelid::regclass::text, pg_relation_size(indexrelid) FROM pg_index "
            "WHERE indrelid = 'events'::regclass ORDER BY 2 DESC"
        )
        return {"table": heap, **dict(indexes)}

    def settle(self) -> None:
        # What autovacuum would do while others read.
        self.fetch("VACUUM (ANALYZE) sessions, event_ids, events")
        with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
            self.fetch("CHECKPOINT")

    def settings(self) -> dict[str, str]:
        names = (
            "server_version",
            "fsync",
            "synchronous_commit",
            "full_page_writes",
            "shared_buffers",
            "max_wal_size",
        )
        found = {name: self.fetch(f"SHOW {name}")[0][0] for name in names}
        compression = self.fetch(
            "SELECT attcompression FROM pg_attribute "
            "WHERE attrelid = 'events'::regclass AND attname = 'data'"
        )
        found["compression of data"] = {"l": "lz4", "p": "pglz"}.get(compression[0][0], "default")
        return found

    def another(self) -> Bare:
        return BarePostgreSQL(self._url, original=self._original)

    def close(self) -> None:
        self._connection.close()


def _sized(raw: bytes) -> bytes:
    return struct.pack("!i", len(raw)) + raw


def _binary(name: str, value: Any) -> bytes | None:
    if value is None:
        return None
    if name == "id":
        return uuid.UUID(value).bytes
    if isinstance(value, int):
        return struct.pack("!q", value)
    if name == "data":
        return b"\x01" + bytes(value)
    return value if isinstance(value, bytes) else str(value).encode()


PAGES = """
SELECT variable_value
FROM performance_schema.global_status
WHERE variable_name IN ('Innodb_buffer_pool_pages_dirty', 'Innodb_buffer_pool_pages_total')
ORDER BY variable_name
"""
# Of the buffer pool so much may wait for the disk; and a server that never gets there is measured
# as it is.
_SETTLED_PART = 0.01
_SETTLE_SECONDS = 300


class BareMySQL(Bare):
    backend = "mysql"
    _type = "event_type"
    _id = "UUID_TO_BIN(%s)"
    _read = (
        "BIN_TO_UUID(id), seq, timestamp, session_id, parent_session_id, machine_id, "
        "working_directory, event_type, hook_type, exact, data"
    )
    _read_original = (
        "id, timestamp, session_id, parent_session_id, machine_id, working_directory, "
        "event_type, hook_type, data"
    )

    def __init__(self, url: str, *, original: bool = False) -> None:
        super().__init__(original=original)
        self._url = url
        arguments, _, _ = mysql_store.parse_url(url)
        self._connection: Any = mysql.connector.connect(
            **arguments,
            charset="utf8mb4",
            collation="utf8mb4_0900_bin",
            autocommit=True,
            allow_local_infile=True,
        )
        self._cursors: dict[str, Any] = {}
        self._files: list[Any] = []
        self._local = self.fetch("SELECT @@local_infile")[0][0] == 1

    @property
    def limit_name(self) -> str:
        return "LOAD DATA LOCAL" if self._local else "one prepared INSERT (local_infile is off)"

    def prepare(self, events: Iterable[MonitorEvent]) -> Any:
        if not self._local:
            return self._prepared_insert(events)
        lines = [b"\t".join(map(_field, self._values(event))) + b"\n" for event in events]
        file = tempfile.NamedTemporaryFile(prefix="contextuate-bench-")  # noqa: SIM115
        file.write(b"".join(lines))
        file.flush()
        self._files.append(file)
        return file

    def _prepared_insert(self, events: Iterable[MonitorEvent]) -> bytes:
        rows = []
        for event in events:
            values = [mysql_store.literal(_text(value)) for value in self._values(event)]
            if not self._original:
                values[0] = b"UUID_TO_BIN(" + values[0] + b")"
            rows.append(b"(" + b", ".join(values) + b")")
        names = ", ".join(self._columns)
        return f"INSERT INTO events ({names}) VALUES ".encode() + b", ".join(rows)

    def load(self, batch: Any) -> None:
        if isinstance(batch, bytes):
            self._connection.cmd_query(batch)
            return
        names = ", ".join(self._columns)
        # Our id is 16 bytes; a file of text has it as text.
        into = f"({names})" if self._original else f"(@{names}) SET id = UUID_TO_BIN(@id)"
        done = self._connection.cmd_query(
            f"LOAD DATA LOCAL INFILE '{batch.name}' INTO TABLE events "
            f"CHARACTER SET utf8mb4 {into}".encode()
        )
        batch.close()
        if done["warning_count"]:  # it leaves out what it does not like, without an error
            raise RuntimeError(f"LOAD DATA: {done['warning_count']} warnings")

    def prepare_insert(self, event: MonitorEvent) -> Any:
        values = self._values(event)
        values[COLUMNS.index("data")] = bytes(values[COLUMNS.index("data")]).decode()
        values[0] = uuid.UUID(values[0]).bytes
        return tuple(values)

    def insert(self, parameters: Any) -> None:
        marks = ", ".join("?" * len(COLUMNS))
        self._executed(
            f"INSERT INTO events ({', '.join(COLUMNS)}) VALUES ({marks}) "
            "ON DUPLICATE KEY UPDATE id = events.id",
            parameters,
        )

    def fetch(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        cursor = self._executed(query.replace("%s", "?"), tuple(parameters))
        return list(cursor.fetchall()) if cursor.description else []

    def _executed(self, statement: str, parameters: tuple[Any, ...]) -> Any:
        if statement not in self._cursors:
            self._cursors[statement] = self._connection.cursor(prepared=True)
        self._cursors[statement].execute(statement, parameters)
        return self._cursors[statement]

    def _analyze(self) -> None:
        self._connection.cmd_query(b"ANALYZE TABLE events")
        self._connection.get_rows()

    def sizes(self) -> dict[str, int]:
        self._analyze()
        rows = self.fetch(
            "SELECT index_name, stat_value * @@innodb_page_size FROM mysql.innodb_index_stats "
            "WHERE database_name = DATABASE() AND table_name = 'events' AND stat_name = 'size'"
        )
        return {
            {"PRIMARY": "table"}.get(str(name), str(name)): int(size)
            for name, size in sorted(rows, key=lambda row: -int(row[1]))
        }

    def settle(self) -> None:
        self._analyze()
        end = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < end:
            dirty, pages = (int(value) for (value,) in self.fetch(PAGES))
            if dirty <= pages * _SETTLED_PART:
                break
            time.sleep(1)  # an idle server writes as fast as innodb_io_capacity allows

    def settings(self) -> dict[str, str]:
        names = (
            "version",
            "innodb_flush_log_at_trx_commit",
            "sync_binlog",
            "log_bin",
            "innodb_doublewrite",
            "innodb_buffer_pool_size",
        )
        row = self.fetch("SELECT " + ", ".join(f"@@{name}" for name in names))[0]
        return {name: str(value) for name, value in zip(names, row, strict=True)}

    def another(self) -> Bare:
        return BareMySQL(self._url, original=self._original)

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._connection.close()


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _field(value: Any) -> bytes:
    if value is None:
        return b"\\N"
    raw = value if isinstance(value, bytes) else str(value).encode()
    return raw.replace(b"\\", b"\\\\").replace(b"\t", b"\\t").replace(b"\n", b"\\n")


def bare(backend: str, url: str, *, original: bool = False) -> Bare:
    """The bare driver of a backend."""
    kind = {"postgresql": BarePostgreSQL, "mysql": BareMySQL}[backend]
    return kind(url, original=original)
