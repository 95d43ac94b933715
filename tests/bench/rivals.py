"""What a user would write instead of `save_events`: the opponents of the benchmark.

Each stores a batch the way its tool's documentation suggests, with the payload encoded by orjson
where the tool lets one choose. None does what the store does beside the INSERT: validate, keep
payloads that no JSON column holds, make missing sessions, order the commits.
"""

from __future__ import annotations

import contextlib
import uuid
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

import mysql.connector
import orjson
import psycopg
import sqlalchemy as sa
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb, set_json_dumps
from sqlalchemy import orm
from sqlalchemy.dialects import mysql as sa_mysql
from sqlalchemy.dialects import postgresql as sa_postgresql

from contextuate_persist import mysql_store
from contextuate_persist.model import MonitorEvent

if TYPE_CHECKING:
    from eventsourcing.postgres import PostgresApplicationRecorder
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import Checkpoint
    from langgraph.checkpoint.postgres import PostgresSaver

POSTGRESQL_INSERT = """
INSERT INTO events (
    id, session_id, timestamp, event_type, event_type_name, hook_type, hook_type_name,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact
)
VALUES (
    %(id)s, %(session_id)s, %(timestamp)s, %(event_type)s, %(event_type_name)s, %(hook_type)s,
    %(hook_type_name)s, %(parent_session_id)s, %(machine_id)s, %(working_directory)s,
    %(tool_name)s, %(tool_use_id)s, %(data)s, %(exact)s
)
ON CONFLICT (id) DO NOTHING
"""

MYSQL_INSERT = """
INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact
)
VALUES (
    %(id)s, %(session_id)s, %(timestamp)s, %(event_type)s, %(hook_type)s,
    %(parent_session_id)s, %(machine_id)s, %(working_directory)s, %(tool_name)s, %(tool_use_id)s,
    %(data)s, %(exact)s
)
ON DUPLICATE KEY UPDATE id = events.id
"""


class Rival(Protocol):
    """Another way to store events: `create`, then `save` as often as wanted, then `close`.

    The database holds our schema, and the sessions of the events.
    """

    name: str

    def create(self) -> None:
        """Connect, and make the tables that are needed beside ours; harmless if they exist."""

    def save(self, events: list[MonitorEvent]) -> None:
        """Store the events in one transaction, committed on return."""

    def close(self) -> None:
        """Disconnect; what was stored stays."""


def rivals(url: str) -> list[Rival]:
    """Those for the database of the URL."""
    if url.startswith("mysql:"):
        return [MySQLDriver(url), SQLAlchemyCore(url), SQLAlchemyORM(url)]
    return [
        PostgreSQLDriver(url),
        SQLAlchemyCore(url),
        SQLAlchemyORM(url),
        EventSourcing(url),
        LangGraph(url),
    ]


class Connected:
    """Base class: a URL, and what `close` has to close."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._opened = contextlib.ExitStack()

    def close(self) -> None:
        self._opened.close()


# --- The drivers ----------------------------------------------------------------------------------


class PostgreSQLDriver(Connected):
    """psycopg's executemany, which sends a batch as one pipeline."""

    name = "psycopg executemany"

    def create(self) -> None:
        connection = psycopg.connect(self._url, autocommit=True)
        self._connection = self._opened.enter_context(connection)

    def save(self, events: list[MonitorEvent]) -> None:
        rows = [
            {**postgresql_row(event), "data": Jsonb(event.data, dumps=orjson.dumps)}
            for event in events
        ]
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(POSTGRESQL_INSERT, rows)


class MySQLDriver(Connected):
    """mysql-connector-python's executemany, which makes one statement of many rows.

    It looks for the client command DELIMITER in the values, too, and so does SQLAlchemy through it:
    many payloads that hold the word raise an error, a few are stored altered, and nearly any batch
    with such payloads raises. It still is what a user would write.
    """

    name = "mysql-connector executemany"

    def create(self) -> None:
        connection = mysql.connector.connect(**mysql_arguments(self._url))
        self._connection = self._opened.enter_context(contextlib.closing(connection))

    def save(self, events: list[MonitorEvent]) -> None:
        rows = [{**mysql_row(event), "data": json_text(event.data)} for event in events]
        with contextlib.closing(self._connection.cursor()) as cursor:
            cursor.executemany(MYSQL_INSERT, rows)
        self._connection.commit()


# --- SQLAlchemy -----------------------------------------------------------------------------------


class SQLAlchemyCore(Connected):
    """One INSERT with a list of rows, on an engine with its usual pool."""

    name = "SQLAlchemy Core"

    def create(self) -> None:
        self._row, self._engine = engine(self._url)
        self._opened.callback(self._engine.dispose)
        table = events_table(self._engine.dialect.name)
        self._insert: sa.Executable
        if self._engine.dialect.name == "mysql":
            self._insert = sa_mysql.insert(table).on_duplicate_key_update(id=table.c.id)
        else:
            # Goes to psycopg's executemany. A RETURNING would make it insertmanyvalues, a statement
            # of many rows: 0.14 ms an event instead of 0.09, in batches of 1,000.
            insert = sa_postgresql.insert(table)
            self._insert = insert.on_conflict_do_nothing(index_elements=[table.c.id])

    def save(self, events: list[MonitorEvent]) -> None:
        with self._engine.begin() as connection:
            connection.execute(self._insert, [self._row(event) for event in events])


class SQLAlchemyORM(Connected):
    """An object for each event, `add_all` and commit; an event that is stored already raises."""

    name = "SQLAlchemy ORM"

    def create(self) -> None:
        self._row, self._engine = engine(self._url)
        self._opened.callback(self._engine.dispose)
        table = events_table(self._engine.dialect.name)

        class Base(orm.DeclarativeBase):
            pass

        class Event(Base):
            __table__ = table

        self._event = Event

    def save(self, events: list[MonitorEvent]) -> None:
        with orm.Session(self._engine) as session, session.begin():
            session.add_all([self._event(**self._row(event)) for event in events])


def engine(url: str) -> tuple[Any, sa.Engine]:
    """How to make a row of an event, and the engine.

    The driver gets its arguments past SQLAlchemy's URLs, which say sockets and TLS otherwise.
    """
    if url.startswith("mysql:"):
        return mysql_row, sa.create_engine(
            "mysql+mysqlconnector://", connect_args=mysql_arguments(url), json_serializer=json_text
        )
    return postgresql_row, sa.create_engine(
        "postgresql+psycopg://", connect_args=conninfo_to_dict(url), json_serializer=json_text
    )


def events_table(dialect: str) -> sa.Table:
    """The columns of our table that are filled; `id` is what the ORM knows an event by."""
    on_mysql = dialect == "mysql"

    def kind(name: str) -> sa.types.TypeEngine[Any]:
        return sa.String(100) if on_mysql else sa_postgresql.ENUM(name=name, create_type=False)

    table = sa.Table(
        "events",
        sa.MetaData(),
        sa.Column(
            "id",
            sa_mysql.BINARY(16) if on_mysql else sa_postgresql.UUID(as_uuid=False),
            primary_key=True,
        ),
        sa.Column("session_id", sa.String(255)),
        sa.Column("timestamp", sa.BigInteger),
        sa.Column("event_type", kind("monitor_event_type")),
        sa.Column("hook_type", kind("claude_hook_type")),
        sa.Column("parent_session_id", sa.String(255)),
        sa.Column("machine_id", sa.String(255)),
        sa.Column("working_directory", sa.Text),
        sa.Column("tool_name", sa.String(255)),
        sa.Column("tool_use_id", sa.String(255)),
        sa.Column("data", sa.JSON if on_mysql else sa_postgresql.JSONB),
        sa.Column("exact", sa.LargeBinary),
    )
    if not on_mysql:
        table.append_column(sa.Column("event_type_name", sa.String(100)))
        table.append_column(sa.Column("hook_type_name", sa.String(100)))
    return table


# --- Event stores ---------------------------------------------------------------------------------


class EventSourcing(Connected):
    """The recorder of the eventsourcing library: `stored_events`, whose payloads are opaque bytes.

    A session is an aggregate, whose events are numbered without a gap: one writer for each session,
    and an event that comes again is stored again. Two indexes, to our dozen. The INSERT is in the
    library's database function, which does not lock the table as its other way does: a reader that
    follows can miss what commits late.
    """

    name = "eventsourcing"

    def create(self) -> None:
        from eventsourcing.postgres import (  # noqa: PLC0415  (turns the logging of psycopg down)
            PostgresApplicationRecorder,
            PostgresDatastore,
        )

        given = conninfo_to_dict(self._url)
        places = ("dbname", "host", "port", "user", "password")
        datastore = PostgresDatastore(
            *(str(given.get(place, "")) for place in places),
            # The other way waits for ever in psycopg's Pipeline.sync (3.3.9) once a socket does not
            # take a whole batch at once; a Unix socket did not take one of 100 events.
            enable_db_functions=True,
        )
        assert isinstance(datastore.pool.kwargs, dict)
        datastore.pool.kwargs |= given  # what else the URL says: the time-outs, TLS
        self._opened.callback(datastore.close)
        self._recorder: PostgresApplicationRecorder = PostgresApplicationRecorder(datastore)
        self._recorder.create_table()
        self._versions: dict[str, int] = {}

    def save(self, events: list[MonitorEvent]) -> None:
        from eventsourcing.persistence import StoredEvent  # noqa: PLC0415  (as above)

        self._recorder.insert_events(
            [
                StoredEvent(
                    originator_id=uuid.UUID(event.session_id),
                    originator_version=self._next_version(event.session_id),
                    topic=event.event_type,
                    state=orjson.dumps(event.to_wire()),
                )
                for event in events
            ]
        )

    def _next_version(self, session_id: str) -> int:
        version = self._versions.get(session_id)
        if version is None:
            last = self._recorder.select_events(uuid.UUID(session_id), desc=True, limit=1)
            version = last[0].originator_version if last else 0
        self._versions[session_id] = version + 1
        return version + 1


class LangGraph(Connected):
    """LangGraph's checkpointer: a checkpoint for each event, whose one channel holds the event.

    Not like for like: a checkpoint is a row of `checkpoints` and one of `checkpoint_blobs` for each
    channel that changed, it is put with a round trip of its own, the blob is msgpack and cannot be
    queried, and nothing is indexed but the session. What it knows is the latest state of a session.
    """

    name = "langgraph checkpoint"

    def create(self) -> None:
        # A heavy import, which the other rivals need not carry.
        from langgraph.checkpoint.postgres import PostgresSaver  # noqa: PLC0415

        # As PostgresSaver.from_conn_string connects.
        connection: psycopg.Connection[DictRow] = psycopg.connect(
            self._url, autocommit=True, prepare_threshold=0, row_factory=dict_row
        )
        self._connection = self._opened.enter_context(connection)
        set_json_dumps(orjson.dumps, connection)
        self._saver: PostgresSaver = PostgresSaver(connection)
        self._saver.setup()
        self._latest: dict[str, RunnableConfig] = {}

    def save(self, events: list[MonitorEvent]) -> None:
        with self._connection.transaction():
            for event in events:
                self._put(event)

    def _put(self, event: MonitorEvent) -> None:
        thread: RunnableConfig = self._latest.get(event.session_id) or {
            "configurable": {"thread_id": event.session_id, "checkpoint_ns": ""}
        }
        # Versions and checkpoints grow with time, as the ids of events do.
        versions: dict[str, str | int | float] = {"event": event.id}
        checkpoint: Checkpoint = {
            "v": 4,
            "id": event.id,
            "ts": datetime.fromtimestamp(event.timestamp / 1000, timezone.utc).isoformat(),
            "channel_values": {"event": event.to_wire()},
            "channel_versions": versions,
            "versions_seen": {},
            "updated_channels": ["event"],
        }
        self._latest[event.session_id] = self._saver.put(
            thread, checkpoint, {"source": "update"}, versions
        )


# --- Rows -----------------------------------------------------------------------------------------


def postgresql_row(event: MonitorEvent) -> dict[str, Any]:
    """The columns that the store fills. The types are known ones, so that none needs a name."""
    return {
        "id": event.id,
        "session_id": event.session_id,
        "timestamp": event.timestamp,
        "event_type": event.event_type,
        "event_type_name": None,
        "hook_type": event.hook_type,
        "hook_type_name": None,
        "parent_session_id": event.parent_session_id,
        "machine_id": event.machine_id,
        "working_directory": event.working_directory,
        "tool_name": event.data.get("toolName"),
        "tool_use_id": event.data.get("toolUseId"),
        "data": event.data,
        "exact": None,
    }


def mysql_row(event: MonitorEvent) -> dict[str, Any]:
    """The columns that the store fills."""
    return {
        "id": uuid.UUID(event.id).bytes,
        "session_id": event.session_id,
        "timestamp": event.timestamp,
        "event_type": event.event_type,
        "hook_type": event.hook_type,
        "parent_session_id": event.parent_session_id,
        "machine_id": event.machine_id,
        "working_directory": event.working_directory,
        "tool_name": event.data.get("toolName"),
        "tool_use_id": event.data.get("toolUseId"),
        "data": event.data,
        "exact": None,
    }


def json_text(value: object) -> str:
    """JSON as text, where neither SQLAlchemy nor MySQL takes bytes for it."""
    return orjson.dumps(value).decode()


def mysql_arguments(url: str) -> dict[str, Any]:
    """The driver's arguments for a URL, as our store reads it."""
    arguments, _, _ = mysql_store.parse_url(url)
    return arguments
