"""Everything MySQL: the statements, the store, its connections, its errors."""

from __future__ import annotations

import contextlib
import ctypes
import re
import ssl
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, unquote, urlsplit

import mysql.connector
from mysql.connector.errors import Error as MySQLError

from contextuate_persist import base, payload, schema
from contextuate_persist.base import BaseStore, EventRow, Fault, Seed
from contextuate_persist.config import is_local
from contextuate_persist.errors import ConfigurationError, StoreUnavailable
from contextuate_persist.model import Health

try:
    # commit() and parameter conversion of the C extension raise this, which is no MySQLError.
    from _mysql_connector import MySQLInterfaceError  # type: ignore[import-not-found]
except ImportError:  # pragma: no cover  (the pure Python driver)
    MySQLInterfaceError = MySQLError

# Parameters stand as %(name)s. Statements go to the server prepared, or, in batches, as bytes with
# the values encoded by `literal`: never through the driver's text cursors, which look for DELIMITER
# commands in the values too and change them.

# --- Events ---------------------------------------------------------------------------------------

# The usual event: its session is known, and the event tells nothing new about it. One statement, so
# no transaction; it inserts nothing where the full way below has something to do.
INSERT_EVENT = """
INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact
)
SELECT
    UUID_TO_BIN(%(id)s), s.session_id, %(timestamp)s, %(event_type)s, %(hook_type)s,
    %(parent_session_id)s, %(machine_id)s, %(working_directory)s,
    %(tool_name)s, %(tool_use_id)s, CAST(%(data)s AS JSON), CAST(%(exact)s AS BINARY)
FROM sessions AS s
WHERE s.session_id = %(session_id)s
    AND (
        s.known_from = 'session'
        OR s.known_from = 'event'
            AND s.start_time <= %(timestamp)s
            AND (%(parent_session_id)s IS NULL OR s.parent_session_id IS NOT NULL)
    )
    AND NOT EXISTS (
        SELECT 1 FROM deleted_sessions AS d
        WHERE d.session_id = s.session_id AND d.deleted_at >= %(timestamp)s
    )
ON DUPLICATE KEY UPDATE id = events.id
"""

# First of all locks every session that a transaction touches, in the order of their ids: whoever
# writes holds them in this order, so nobody waits in a circle. A row that does not change is locked
# all the same. MySQL assigns from left to right: known_from and start_time are tested before they
# are set. VALUES() is deprecated, but what replaces it came with 8.0.19 only.
SEED_SESSIONS = """
INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, known_from, exact
)
VALUES %(rows)s
ON DUPLICATE KEY UPDATE
    machine_id = IF(
        VALUES(known_from) = 'event' AND (
            sessions.known_from = 'reference'
            OR sessions.known_from = 'event' AND VALUES(start_time) < sessions.start_time
        ),
        VALUES(machine_id), sessions.machine_id
    ),
    working_directory = IF(
        VALUES(known_from) = 'event' AND (
            sessions.known_from = 'reference'
            OR sessions.known_from = 'event' AND VALUES(start_time) < sessions.start_time
        ),
        VALUES(working_directory), sessions.working_directory
    ),
    exact = IF(
        VALUES(known_from) = 'event' AND (
            sessions.known_from = 'reference'
            OR sessions.known_from = 'event' AND VALUES(start_time) < sessions.start_time
        ),
        VALUES(exact), sessions.exact
    ),
    start_time = IF(
        VALUES(known_from) = 'event' AND (
            sessions.known_from = 'reference'
            OR sessions.known_from = 'event' AND VALUES(start_time) < sessions.start_time
        ),
        VALUES(start_time), sessions.start_time
    ),
    known_from = IF(
        VALUES(known_from) = 'event' AND sessions.known_from = 'reference',
        'event', sessions.known_from
    )
"""

LINK_PARENT = """
UPDATE sessions
SET parent_session_id = %(parent_id)s
WHERE session_id = %(child_id)s
    AND known_from <> 'session'
    AND parent_session_id IS NULL
"""

SELECT_DELETIONS = """
SELECT d.session_id, d.deleted_at
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS touched
JOIN deleted_sessions AS d ON d.session_id = touched.session_id
"""

UNDELETE_SESSIONS = """
DELETE FROM deleted_sessions
WHERE session_id IN (%(session_ids)s)
"""

INSERT_EVENTS = """
INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact
)
VALUES %(rows)s
ON DUPLICATE KEY UPDATE id = events.id
"""

SELECT_KNOWN_IDS = """
SELECT BIN_TO_UUID(e.id)
FROM JSON_TABLE(%(ids)s, '$[*]' COLUMNS (id CHAR(36) PATH '$')) AS given
JOIN events AS e ON e.id = UUID_TO_BIN(given.id)
"""

SELECT_EVENTS = """
SELECT
    BIN_TO_UUID(e.id), e.seq, e.timestamp, e.session_id, e.parent_session_id, e.machine_id,
    e.working_directory, e.event_type, e.hook_type, e.data, e.exact
FROM events AS e
"""

SELECT_EVENT = SELECT_EVENTS + "WHERE e.id = UUID_TO_BIN(%(id)s) AND e.session_id = %(session_id)s"

# Filters come as fixed clauses: one statement with `? IS NULL OR` for each would be planned for all
# of them and use no index. MySQL reads no range from `(timestamp, seq) < (?, ?)`.
EVENT_CLAUSES = {
    "session_id": "e.session_id = %(session_id)s",
    "machine_id": "e.machine_id = %(machine_id)s",
    "parent_session_id": "e.parent_session_id = %(parent_session_id)s",
    "event_type": "e.event_type = %(event_type)s",
    "hook_type": "e.hook_type = %(hook_type)s",
    "tool_name": "e.tool_name = %(tool_name)s",
    "tool_use_id": "e.tool_use_id = %(tool_use_id)s",
    # Where the column is a projection only the exact payload can tell.
    "contains": "(JSON_CONTAINS(e.data, CAST(%(contains)s AS JSON)) OR e.exact IS NOT NULL)",
    "before": (
        "e.timestamp <= %(before_timestamp)s"
        " AND (e.timestamp < %(before_timestamp)s OR e.seq < %(before_seq)s)"
    ),
    "after": (
        "e.timestamp >= %(after_timestamp)s"
        " AND (e.timestamp > %(after_timestamp)s OR e.seq > %(after_seq)s)"
    ),
}

COUNT_EVENTS = """
SELECT e.event_type, COUNT(*)
FROM events AS e
GROUP BY e.event_type
"""

COUNT_SESSION_EVENTS = """
SELECT e.event_type, COUNT(*)
FROM events AS e
WHERE e.session_id = %(session_id)s
GROUP BY e.event_type
"""

# --- Sessions -------------------------------------------------------------------------------------

# How a save merges is the protocol's to say; parameters are what was given, columns what is known.
SAVE_SESSION = """
INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, end_time, status,
    parent_session_id, manual_parent_session_id, child_session_ids,
    agent_type, model, transcript_path, is_user_initiated, is_pinned, hidden, label,
    token_usage_input, token_usage_output, token_usage_cache_read, token_usage_cache_creation,
    known_from, exact
)
VALUES (
    %(session_id)s, %(machine_id)s, %(working_directory)s, %(start_time)s,
    IF(%(status)s = 'active', NULL, %(end_time)s), %(status)s,
    %(parent_session_id)s, %(manual_parent_session_id)s, %(child_session_ids)s,
    %(agent_type)s, %(model)s, %(transcript_path)s,
    COALESCE(%(is_user_initiated)s, TRUE), COALESCE(%(is_pinned)s, FALSE),
    COALESCE(%(hidden)s, FALSE), %(label)s,
    %(token_usage_input)s, %(token_usage_output)s, %(token_usage_cache_read)s,
    %(token_usage_cache_creation)s,
    'session', NULLIF(CAST(JSON_MERGE_PATCH('{}', %(exact)s) AS CHAR), '{}')
)
ON DUPLICATE KEY UPDATE
    machine_id = %(machine_id)s,
    working_directory = %(working_directory)s,
    start_time = %(start_time)s,
    end_time = IF(%(status)s = 'active', NULL, %(end_time)s),
    status = %(status)s,
    parent_session_id = COALESCE(%(parent_session_id)s, sessions.parent_session_id),
    manual_parent_session_id =
        COALESCE(%(manual_parent_session_id)s, sessions.manual_parent_session_id),
    child_session_ids = JSON_MERGE_PRESERVE(sessions.child_session_ids, (
        SELECT COALESCE(JSON_ARRAYAGG(given.child), JSON_ARRAY())
        FROM JSON_TABLE(
            %(child_session_ids)s,
            '$[*]' COLUMNS (child VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
        ) AS given
        WHERE NOT JSON_CONTAINS(sessions.child_session_ids, JSON_QUOTE(given.child))
    )),
    agent_type = COALESCE(%(agent_type)s, sessions.agent_type),
    model = COALESCE(%(model)s, sessions.model),
    transcript_path = COALESCE(%(transcript_path)s, sessions.transcript_path),
    is_user_initiated = COALESCE(%(is_user_initiated)s, sessions.is_user_initiated),
    is_pinned = COALESCE(%(is_pinned)s, sessions.is_pinned),
    hidden = COALESCE(%(hidden)s, sessions.hidden),
    label = COALESCE(%(label)s, sessions.label),
    token_usage_input = IF(
        EXISTS (SELECT 1 FROM token_ledger AS t WHERE t.session_id = %(session_id)s),
        sessions.token_usage_input, %(token_usage_input)s
    ),
    token_usage_output = IF(
        EXISTS (SELECT 1 FROM token_ledger AS t WHERE t.session_id = %(session_id)s),
        sessions.token_usage_output, %(token_usage_output)s
    ),
    token_usage_cache_read = IF(
        EXISTS (SELECT 1 FROM token_ledger AS t WHERE t.session_id = %(session_id)s),
        sessions.token_usage_cache_read,
        COALESCE(%(token_usage_cache_read)s, sessions.token_usage_cache_read)
    ),
    token_usage_cache_creation = IF(
        EXISTS (SELECT 1 FROM token_ledger AS t WHERE t.session_id = %(session_id)s),
        sessions.token_usage_cache_creation,
        COALESCE(%(token_usage_cache_creation)s, sessions.token_usage_cache_creation)
    ),
    known_from = 'session',
    exact = NULLIF(
        CAST(JSON_MERGE_PATCH(COALESCE(sessions.exact, '{}'), %(exact)s) AS CHAR), '{}'
    )
"""

# Two columns are computed: the sessions whose effective parent this one is, and the ids that were
# listed although they are deleted or belong to another.
SELECT_SESSIONS = """
SELECT
    s.session_id, s.machine_id, s.working_directory, s.start_time, s.end_time, s.status,
    s.parent_session_id, s.manual_parent_session_id, s.child_session_ids,
    s.agent_type, s.model, s.transcript_path, s.is_user_initiated, s.is_pinned, s.hidden, s.label,
    s.token_usage_input, s.token_usage_output, s.token_usage_cache_read,
    s.token_usage_cache_creation, s.exact,
    (
        SELECT JSON_ARRAYAGG(JSON_ARRAY(child.start_time, child.session_id))
        FROM sessions AS child
        WHERE child.effective_parent_id = s.session_id
    ) AS linked_children,
    (
        SELECT JSON_ARRAYAGG(listed.session_id)
        FROM JSON_TABLE(
            s.child_session_ids,
            '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
        ) AS listed
        LEFT JOIN sessions AS child ON child.session_id = listed.session_id
        LEFT JOIN deleted_sessions AS gone ON gone.session_id = listed.session_id
        WHERE child.effective_parent_id <> s.session_id
            OR child.session_id IS NULL AND gone.session_id IS NOT NULL
    ) AS strangers
FROM sessions AS s
"""

SESSION_CLAUSES = {
    "session_id": "s.session_id = %(session_id)s",
    "status": "s.status = %(status)s",
    "machine_id": "s.machine_id = %(machine_id)s",
    "effective_parent_id": "s.effective_parent_id = %(effective_parent_id)s",
    "hidden": "s.hidden = %(hidden)s",
    "started_after": "s.start_time > %(started_after)s",
    "started_before": "s.start_time < %(started_before)s",
}

# By id and with UNION, so that a cycle ends where it began.
SELECT_SUBTREE = (
    """
WITH RECURSIVE subtree (session_id) AS (
    SELECT s.session_id
    FROM sessions AS s
    WHERE s.session_id = %(session_id)s AND s.known_from <> 'reference'
    UNION
    SELECT child.session_id
    FROM subtree JOIN sessions AS child ON child.effective_parent_id = subtree.session_id
)
"""
    + SELECT_SESSIONS
    + "JOIN subtree ON subtree.session_id = s.session_id"
)

UPDATE_CLAUSES = {
    "machine_id": "machine_id = %(machine_id)s",
    "working_directory": "working_directory = %(working_directory)s",
    "start_time": "start_time = %(start_time)s",
    "end_time": "end_time = %(end_time)s",
    "status": "status = %(status)s",
    "parent_session_id": "parent_session_id = %(parent_session_id)s",
    "manual_parent_session_id": "manual_parent_session_id = %(manual_parent_session_id)s",
    "child_session_ids": "child_session_ids = %(child_session_ids)s",
    "agent_type": "agent_type = %(agent_type)s",
    "model": "model = %(model)s",
    "transcript_path": "transcript_path = %(transcript_path)s",
    "is_user_initiated": "is_user_initiated = %(is_user_initiated)s",
    "is_pinned": "is_pinned = %(is_pinned)s",
    "hidden": "hidden = %(hidden)s",
    "label": "label = %(label)s",
    "exact": (
        "exact = NULLIF(CAST(JSON_MERGE_PATCH(COALESCE(exact, '{}'), %(exact)s) AS CHAR), '{}')"
    ),
} | {
    column: f"{column} = IF(EXISTS ("
    "SELECT 1 FROM token_ledger AS t WHERE t.session_id = %(session_id)s"
    f"), {column}, %({column})s)"
    for column in (
        "token_usage_input",
        "token_usage_output",
        "token_usage_cache_read",
        "token_usage_cache_creation",
    )
}
# A parent that is not stored yet, made from what its child knows.
REFER_TO_PARENT = """
INSERT INTO sessions (session_id, machine_id, working_directory, start_time, known_from)
SELECT %(parent_id)s, child.machine_id, child.working_directory, child.start_time, 'reference'
FROM sessions AS child
WHERE child.session_id = %(session_id)s
ON DUPLICATE KEY UPDATE known_from = sessions.known_from
"""
# Once somebody has said where and when a session began, events correct that no more.
FIRM_COLUMNS = {"machine_id", "working_directory", "start_time", "parent_session_id"}

# Deleting takes three steps under locks taken in the order of ids: children lose their parent,
# lists lose the id, then the row goes, its events with it (foreign key).
SELECT_FAMILY = """
SELECT s.session_id, s.parent_session_id, s.manual_parent_session_id
FROM sessions AS s
WHERE s.session_id = %(session_id)s
UNION
SELECT child.session_id, NULL, NULL
FROM sessions AS child
WHERE child.parent_session_id = %(session_id)s
UNION
SELECT child.session_id, NULL, NULL
FROM sessions AS child
WHERE child.effective_parent_id = %(session_id)s
"""

# Locks rows that are there, in the order of their ids, and changes nothing.
LOCK_SESSIONS = """
UPDATE sessions
SET known_from = known_from
WHERE session_id IN (%(session_ids)s)
ORDER BY session_id
"""

ORPHAN_CHILDREN = """
UPDATE sessions
SET
    parent_session_id = NULLIF(parent_session_id, %(session_id)s),
    manual_parent_session_id = NULLIF(manual_parent_session_id, %(session_id)s)
WHERE parent_session_id = %(session_id)s OR effective_parent_id = %(session_id)s
"""

# MySQL cannot find a JSON array by its element without a scan, so only the parents' lists lose the
# id at once. Elsewhere reading leaves it out, until FORGET_LISTED removes it for good.
UNLIST_CHILD = """
UPDATE sessions
SET child_session_ids = COALESCE(
    (
        SELECT JSON_ARRAYAGG(listed.session_id)
        FROM JSON_TABLE(
            child_session_ids,
            '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
        ) AS listed
        WHERE listed.session_id <> %(session_id)s
    ),
    JSON_ARRAY()
)
WHERE session_id IN (%(parent_id)s, %(manual_parent_id)s)
"""

# An event dated later than the server's clock must not bring its session back either.
REMEMBER_DELETIONS = """
INSERT INTO deleted_sessions (session_id, deleted_at)
SELECT
    s.session_id,
    GREATEST(
        CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED),
        COALESCE((SELECT MAX(e.timestamp) FROM events AS e WHERE e.session_id = s.session_id), 0)
    )
FROM sessions AS s
WHERE s.session_id IN (%(session_ids)s)
ON DUPLICATE KEY UPDATE deleted_at = VALUES(deleted_at)
"""

COUNT_VISIBLE = """
SELECT COUNT(*)
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS doomed
JOIN sessions AS s ON s.session_id = doomed.session_id
WHERE s.known_from <> 'reference'
"""

DELETE_SESSIONS = """
DELETE FROM sessions
WHERE session_id IN (%(session_ids)s)
"""

SELECT_SESSION_IDS = """
SELECT s.session_id
FROM sessions AS s
"""

# A session that is not due keeps everything that hangs together with it, step by step.
SELECT_PRUNABLE = """
WITH RECURSIVE state AS (
    SELECT
        s.session_id,
        NOT s.is_pinned AND COALESCE(
            s.end_time,
            (SELECT MAX(e.timestamp) FROM events AS e WHERE e.session_id = s.session_id),
            s.start_time
        ) < %(older_than)s AS due
    FROM sessions AS s
),
links (session_id, neighbour_id) AS (
    SELECT session_id, effective_parent_id FROM sessions WHERE effective_parent_id IS NOT NULL
    UNION ALL
    SELECT effective_parent_id, session_id FROM sessions WHERE effective_parent_id IS NOT NULL
),
kept (session_id) AS (
    SELECT session_id FROM state WHERE NOT due
    UNION
    SELECT l.neighbour_id FROM kept AS k JOIN links AS l ON l.session_id = k.session_id
)
SELECT s.session_id, s.effective_parent_id
FROM sessions AS s
WHERE NOT EXISTS (SELECT 1 FROM kept AS k WHERE k.session_id = s.session_id)
"""

# The same for locked sessions: what came in between, a pin, an event or a child, keeps its tree.
RECHECK_PRUNABLE = """
SELECT
    s.session_id,
    s.effective_parent_id,
    NOT s.is_pinned
    AND COALESCE(
        s.end_time,
        (SELECT MAX(e.timestamp) FROM events AS e WHERE e.session_id = s.session_id),
        s.start_time
    ) < %(older_than)s
    AND NOT EXISTS (
        SELECT 1 FROM sessions AS child
        WHERE child.effective_parent_id = s.session_id
            AND NOT JSON_CONTAINS(%(session_ids)s, JSON_QUOTE(child.session_id))
    ) AS due
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS locked
JOIN sessions AS s ON s.session_id = locked.session_id
"""

FORGET_LISTED = """
UPDATE sessions
SET child_session_ids = COALESCE(
    (
        SELECT JSON_ARRAYAGG(listed.session_id)
        FROM JSON_TABLE(
            child_session_ids,
            '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
        ) AS listed
        WHERE NOT JSON_CONTAINS(%(session_ids)s, JSON_QUOTE(listed.session_id))
    ),
    JSON_ARRAY()
)
WHERE JSON_OVERLAPS(child_session_ids, %(session_ids)s)
"""

SELECT_OLD_DELETIONS = """
SELECT d.session_id
FROM deleted_sessions AS d
WHERE d.deleted_at < CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) - %(age)s
LIMIT 1000
"""

# --- Server ---------------------------------------------------------------------------------------

SELECT_VERSION = """
SELECT version, layout
FROM schema_version
ORDER BY version DESC
LIMIT 1
"""

SELECT_CHECKSUMS = """
SELECT version, checksum
FROM schema_version
"""

SELECT_COLUMNS = """
SELECT table_name, column_name
FROM information_schema.columns
WHERE table_schema = DATABASE()
"""

RECORD_VERSION = """
INSERT INTO schema_version (version, name, checksum)
VALUES (%(version)s, %(name)s, %(checksum)s)
ON DUPLICATE KEY UPDATE name = %(name)s, checksum = %(checksum)s
"""

SET_LOCK_TIMEOUT = "SET SESSION lock_wait_timeout = {seconds}"

LOCK_SCHEMA = """
SELECT GET_LOCK(CONCAT('contextuate_schema_', LEFT(SHA2(%(database)s, 256), 40)), %(seconds)s)
"""

SELECT_SERVER = "SELECT VERSION(), @@max_allowed_packet, DATABASE()"

# READ COMMITTED, since a reader that never commits would never see a new row, and since the locks
# of REPEATABLE READ reach between the rows. Chains of sessions may be longer than 1,000.
SET_SESSION = """
SET SESSION
    transaction_isolation = 'READ-COMMITTED',
    sql_mode = 'STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION',
    time_zone = '+00:00',
    cte_max_recursion_depth = 4294967295,
    innodb_lock_wait_timeout = {lock_seconds},
    max_execution_time = {statement_ms}
"""


class MySQLStore(BaseStore):
    """A store in MySQL 8.0.17 or newer; implements PersistenceStore."""

    backend: ClassVar[str] = "mysql"
    _row_limit_setting = "max_allowed_packet"

    def __init__(self, url: str, **options: Any) -> None:
        """Take a URL: mysql://USER:PASSWORD@HOST:PORT/DATABASE?ssl-mode=...&socket=...

        Parameters: `socket`, `ssl-mode` (DISABLED, PREFERRED, REQUIRED, VERIFY_CA,
        VERIFY_IDENTITY; without it a server elsewhere is verified), `ssl-ca`, `ssl-cert`,
        `ssl-key`, `option-file` (its [client] group may hold user and password), and `use-pure=1`
        for the driver's pure Python implementation.
        """
        super().__init__(**options)
        self._arguments, self._place = _parse(url)
        self._arguments |= {
            "charset": "utf8mb4",
            "autocommit": True,
            "connection_timeout": max(1, round(self._connect_timeout)),
            "allow_local_infile": False,
        }
        if mysql.connector.version.VERSION >= (9, 2):
            # The server's own limit holds for SELECT only; this one ends the connection.
            self._arguments["read_timeout"] = round(self._statement_timeout) + 5
        self._chunk_bytes = self._row_bytes = 0  # the server's packet limit says
        self._pool: Pool | None = None
        self._schema: schema.SchemaVersion | None = None

    def __repr__(self) -> str:
        return f"<MySQLStore {self._place}>"

    # --- Connections ------------------------------------------------------------------------------

    def _open(self) -> None:
        connection = self._connect()
        try:
            self._schema = schema.require_version(_read_version(connection), self._place)
            packet = _execute(connection, SELECT_SERVER)[0][1]
        finally:
            _close_quietly(connection)
        # Escaping may double a payload, and the limit also holds for MySQL's own form of it.
        self._chunk_bytes = self._row_bytes = packet // 4
        if packet >= 4 * payload.MAX_PAYLOAD_BYTES:
            self._row_bytes = packet

    def _connect(self, **arguments: Any) -> Any:
        try:
            connection: Any = mysql.connector.connect(**self._arguments | arguments)
        except (MySQLError, MySQLInterfaceError) as error:
            raise StoreUnavailable(f"{self._place}: {_reason(error)}") from error
        try:
            _require_mysql(_execute(connection, SELECT_SERVER)[0][0], self._place)
            connection.set_charset_collation("utf8mb4", "utf8mb4_0900_bin")
            connection.cmd_query(
                SET_SESSION.format(
                    lock_seconds=max(1, round(self._lock_timeout)),
                    statement_ms=round(self._statement_timeout * 1000),
                ).encode()
            )
        except BaseException:
            _close_quietly(connection)
            raise
        return connection

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _abandon(self) -> None:
        # One reference too many, for ever: were the connections collected, even at the end of the
        # process, they would say goodbye on the parent's sockets.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._pool))
        self._pool = None

    def _living_pool(self) -> Pool:
        """The pool; a forked child makes its own when it first needs one."""
        with self._lock:
            self._check_open()
            if self._pool is None:
                self._pool = Pool(self._connect, self._pool_size, self._pool_timeout)
            return self._pool

    def _discard_dead(self) -> None:
        if self._pool is not None:
            self._pool.discard_idle()

    @contextlib.contextmanager
    def _connection(self, transaction: bool) -> Iterator[Any]:
        pool = self._living_pool()
        connection = pool.take(self._place)
        try:
            if transaction:
                connection.cmd_query(b"START TRANSACTION")
            yield connection
            if transaction:
                connection.cmd_query(b"COMMIT")
        except BaseException as error:
            # Always rolled back: after a lock wait MySQL has undone the last statement only.
            if not isinstance(error, Exception) or not _rolled_back(connection):
                pool.discard(connection)
                raise
            if isinstance(error, (MySQLError, MySQLInterfaceError)) and self._fault(error) in (
                Fault.LOST,
                Fault.STALE,
                Fault.REFUSED,
            ):
                pool.discard(connection)
            else:
                pool.give_back(connection)
            raise
        pool.give_back(connection)

    def _fault(self, error: Exception) -> Fault | None:
        if not isinstance(error, MySQLError | MySQLInterfaceError):
            return None
        number = getattr(error, "errno", None) or -1
        if number in FAULTS:
            return FAULTS[number]
        # 2000 to 2999 are the client library's own: of them only lost connections are left.
        return Fault.LOST if number < 0 or 2000 <= number < 3000 else Fault.REFUSED

    # --- Events -----------------------------------------------------------------------------------

    def _insert_event(self, connection: Any, row: EventRow) -> bool:
        event = row.event
        parameters = {
            "id": row.id,
            "session_id": event.session_id,
            "timestamp": event.timestamp,
            "event_type": event.event_type,
            "hook_type": event.hook_type,
            "parent_session_id": event.parent_session_id,
            "machine_id": event.machine_id,
            "working_directory": row.working_directory,
            "tool_name": row.tool_name,
            "tool_use_id": row.tool_use_id,
            "data": row.data.decode(),
            "exact": row.exact,
        }
        return _execute_write(connection, INSERT_EVENT, parameters) == 1

    def _insert_events(self, connection: Any, rows: list[EventRow], undelete: bool) -> int:
        changed = _send(connection, SEED_SESSIONS, {"rows": base.seeds_of(rows)})
        touched = list({row.event.session_id for row in rows})
        if undelete:
            _send(connection, UNDELETE_SESSIONS, {"session_ids": touched})
        elif deleted := dict(
            _execute(connection, SELECT_DELETIONS, {"session_ids": base.json_list(touched)})
        ):
            base.drop_deleted(rows, deleted)
        for child, parent in base.links_of(rows).items():
            link = {"child_id": child, "parent_id": parent}
            changed += _execute_write(connection, LINK_PARENT, link)
        inserted = _send(connection, INSERT_EVENTS, {"rows": map(_event_values, rows)})
        return base.accept_inserted(rows, inserted, changed)

    def _select_known_ids(self, connection: Any, rows: list[EventRow]) -> list[str]:
        ids = {"ids": base.json_list(row.id for row in rows)}
        return [row[0] for row in _execute(connection, SELECT_KNOWN_IDS, ids)]

    def _select_events(
        self, connection: Any, filters: Mapping[str, Any], newest_first: bool, limit: int
    ) -> list[Any]:
        clauses = [clause for name, clause in EVENT_CLAUSES.items() if name in filters]
        parameters: dict[str, Any] = {**filters, "limit": limit}
        if "contains" in filters:
            parameters["contains"] = payload.encode(dict(filters["contains"])).json.decode()
        for bound in ("before", "after"):
            if bound in filters:
                parameters[f"{bound}_timestamp"], parameters[f"{bound}_seq"] = filters[bound]
        direction = "DESC" if newest_first else "ASC"
        query = (
            SELECT_EVENTS
            + (f"WHERE {' AND '.join(clauses)} " if clauses else "")
            + f"ORDER BY e.timestamp {direction}, e.seq {direction} LIMIT %(limit)s"
        )
        return _execute(connection, query, parameters)

    def _select_event(self, connection: Any, session_id: str, event_id: str) -> Any:
        rows = _execute(connection, SELECT_EVENT, {"id": event_id, "session_id": session_id})
        return rows[0] if rows else None

    def _count_events(self, connection: Any, session_id: str | None) -> list[Any]:
        if session_id is None:
            return _execute(connection, COUNT_EVENTS)
        return _execute(connection, COUNT_SESSION_EVENTS, {"session_id": session_id})

    # --- Sessions ---------------------------------------------------------------------------------

    def _upsert_sessions(
        self, connection: Any, seeds: list[Seed], sessions: list[dict[str, Any]]
    ) -> None:
        if seeds:
            _send(connection, SEED_SESSIONS, {"rows": seeds})
        for session in sessions:
            _execute_write(connection, SAVE_SESSION, session)

    def _select_sessions(
        self, connection: Any, filters: Mapping[str, Any], limit: int | None
    ) -> list[Any]:
        clauses = ["s.known_from <> 'reference'", *(SESSION_CLAUSES[name] for name in filters)]
        query = (
            f"{SELECT_SESSIONS} WHERE {' AND '.join(clauses)} "
            "ORDER BY s.start_time DESC, s.session_id DESC"
        )
        if limit is not None:
            query += " LIMIT %(limit)s"
        return _execute(connection, query, {**filters, "limit": limit})

    def _select_subtree(self, connection: Any, session_id: str) -> list[Any]:
        return _execute(connection, SELECT_SUBTREE, {"session_id": session_id})

    def _update_session(self, connection: Any, session_id: str, values: dict[str, Any]) -> bool:
        clauses = [UPDATE_CLAUSES[name] for name in values]
        if FIRM_COLUMNS & values.keys():
            clauses.append("known_from = 'session'")
        if parent := values.get("parent_session_id"):
            _send(connection, LOCK_SESSIONS, {"session_ids": [session_id, parent]})
            referring = {"parent_id": parent, "session_id": session_id}
            _execute_write(connection, REFER_TO_PARENT, referring)
        where = "WHERE session_id = %(session_id)s AND known_from <> 'reference'"
        parameters = {**values, "session_id": session_id}
        if clauses:
            update = f"UPDATE sessions SET {', '.join(clauses)} {where}"
            if _execute_write(connection, update, parameters):
                return True
        # A row that has these values already does not count as updated.
        return bool(_execute(connection, f"SELECT session_id FROM sessions {where}", parameters))

    def _delete_session(self, connection: Any, session_id: str) -> bool:
        rows = _execute(connection, SELECT_FAMILY, {"session_id": session_id})
        parents = {row[0]: row[1:] for row in reversed(rows)}
        if session_id not in parents:
            return False
        detected, manual = parents[session_id]
        family = {*parents, *filter(None, (detected, manual))}
        _send(connection, LOCK_SESSIONS, {"session_ids": sorted(family)})
        _execute_write(connection, ORPHAN_CHILDREN, {"session_id": session_id})
        listing = {
            "session_id": session_id,
            "parent_id": detected,
            "manual_parent_id": manual,
        }
        _execute_write(connection, UNLIST_CHILD, listing)
        return self._delete_locked(connection, [session_id]) == 1

    def _delete_sessions(self, connection: Any, ids: list[str]) -> int:
        _send(connection, LOCK_SESSIONS, {"session_ids": ids})
        return self._delete_locked(connection, ids)

    def _delete_locked(self, connection: Any, ids: list[str]) -> int:
        visible = _execute(connection, COUNT_VISIBLE, {"session_ids": base.json_list(ids)})[0][0]
        _send(connection, REMEMBER_DELETIONS, {"session_ids": ids})
        _send(connection, DELETE_SESSIONS, {"session_ids": ids})
        return int(visible)

    def _select_session_ids(self, connection: Any) -> list[str]:
        return [row[0] for row in _execute(connection, SELECT_SESSION_IDS)]

    def _select_prunable(self, connection: Any, older_than: int) -> list[Any]:
        return _execute(connection, SELECT_PRUNABLE, {"older_than": older_than})

    def _delete_prunable(self, connection: Any, ids: list[str], older_than: int) -> int:
        _send(connection, LOCK_SESSIONS, {"session_ids": ids})
        parameters = {"session_ids": base.json_list(ids), "older_than": older_than}
        due = base.whole_trees(_execute(connection, RECHECK_PRUNABLE, parameters))
        return self._delete_locked(connection, due) if due else 0

    def _forget_deletions(self, connection: Any, age: int) -> None:
        while rows := _execute(connection, SELECT_OLD_DELETIONS, {"age": age}):
            ids = [row[0] for row in rows]
            _execute_write(connection, FORGET_LISTED, {"session_ids": base.json_list(ids)})
            _send(connection, UNDELETE_SESSIONS, {"session_ids": ids})

    # --- Server -----------------------------------------------------------------------------------

    def _health(self, connection: Any) -> Health:
        start = time.perf_counter()
        version = _read_version(connection)
        latency = time.perf_counter() - start
        found = schema.require_version(version, self._place)
        pure = isinstance(connection, mysql.connector.connection.MySQLConnection)
        return Health(
            backend=self.backend,
            server_version=_execute(connection, SELECT_SERVER)[0][0],
            driver=f"mysql-connector-python {mysql.connector.__version__}",
            driver_implementation="python" if pure else "c",
            schema_version=found.version,
            schema_layout=found.layout,
            latency_ms=round(latency * 1000, 3),
            pool_size=self._pool_size,
            pool_in_use=self._living_pool().in_use,
        )

    def _run_statements(self, connection: Any, statements: list[str]) -> None:
        for statement in statements:
            connection.cmd_query(statement.encode())

    @contextlib.contextmanager
    def _schema_session(self, timeout: float) -> Iterator[MySQLSchema]:
        connection = self._connect(read_timeout=None)  # a migration may take hours
        try:
            # The lock is the server's, so its name carries the database's; 64 characters at most.
            named = {"database": self._arguments["database"], "seconds": round(timeout)}
            if _execute(connection, LOCK_SCHEMA, named)[0][0] != 1:
                raise StoreUnavailable(f"{self._place}: another process changes the schema")
            # An ALTER that waits stops every later writer: better to give up and come again.
            seconds = max(1, round(self._lock_timeout))
            connection.cmd_query(SET_LOCK_TIMEOUT.format(seconds=seconds).encode())
            yield MySQLSchema(connection, self._place)
        except (MySQLError, MySQLInterfaceError) as error:
            raise self._error(self._fault(error) or Fault.REFUSED, error) from error
        finally:
            _close_quietly(connection)


class MySQLSchema:
    """The catalogue of a database, under the schema lock; implements SchemaSession."""

    backend = MySQLStore.backend

    def __init__(self, connection: Any, place: str) -> None:
        self._connection = connection
        self.place = place

    def read_version(self) -> schema.SchemaVersion | None:
        return _read_version(self._connection)

    def read_checksums(self) -> dict[int, str | None]:
        return dict(_execute(self._connection, SELECT_CHECKSUMS))

    def read_columns(self) -> dict[str, set[str]]:
        return base.by_table(_execute(self._connection, SELECT_COLUMNS))

    def holds(self, query: str) -> bool:
        return bool(_execute(self._connection, query))

    def run(self, statement: str) -> None:
        self._connection.cmd_query(statement.encode())

    def record(self, version: int, name: str, checksum: str | None) -> None:
        row = {"version": version, "name": name, "checksum": checksum}
        _execute_write(self._connection, RECORD_VERSION, row)

    def transaction(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


# --- Statements and values ------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _positional(statement: str) -> tuple[str, tuple[str, ...]]:
    """The statement with ? for its parameters, and their names in order."""
    parts = statement.split("%(")
    names = [part.split(")s", 1)[0] for part in parts[1:]]
    return "?".join([parts[0], *(part.split(")s", 1)[1] for part in parts[1:])]), tuple(names)


def _prepared(connection: Any, statement: str, parameters: Mapping[str, Any] | None) -> Any:
    """A cursor that has executed the statement; kept, since a new one would prepare it again."""
    cursors: OrderedDict[str, Any] | None = getattr(connection, "_contextuate_cursors", None)
    if cursors is None:
        cursors = connection._contextuate_cursors = OrderedDict()  # noqa: SLF001
    text, names = _positional(statement)
    cursor = cursors.pop(text, None)
    if cursor is None:
        cursor = connection.cursor(prepared=True)
        if len(cursors) >= _MAX_PREPARED:
            cursors.popitem(last=False)[1].close()
    given = parameters or {}
    # ints for booleans, bytes for buffers: what both implementations of the driver take.
    values = tuple(int(v) if isinstance(v := given[name], bool) else v for name in names)
    cursor.execute(text, values)
    cursors[text] = cursor
    return cursor


_MAX_PREPARED = 100


def _execute(
    connection: Any, statement: str, parameters: Mapping[str, Any] | None = None
) -> list[Any]:
    cursor = _prepared(connection, statement, parameters)
    rows = list(cursor.fetchall())
    if rows and isinstance(connection, mysql.connector.connection.MySQLConnection):
        # The pure Python driver hands texts of binary collations over as bytes.
        texts = [column[1] != _JSON_TYPE and column[8] != _BINARY for column in cursor.description]
        rows = [
            tuple(
                bytes(value).decode() if text and isinstance(value, bytes | bytearray) else value
                for value, text in zip(row, texts, strict=True)
            )
            for row in rows
        ]
    return rows


_JSON_TYPE = 245  # of the protocol's column types
_BINARY = 63  # of the server's character sets


def _execute_write(connection: Any, statement: str, parameters: Mapping[str, Any]) -> int:
    return int(_prepared(connection, statement, parameters).rowcount)


def _send(connection: Any, statement: str, parameters: Mapping[str, Any]) -> int:
    """Execute a statement as bytes; lists become the items of an IN or the rows of a VALUES."""
    pieces: list[bytes] = []
    text, names = _positional(statement)
    for part, name in zip(text.split("?"), [*names, ""], strict=True):
        pieces.append(part.encode())
        if name == "rows":
            rows = (b"(" + b", ".join(map(literal, row)) + b")" for row in parameters[name])
            pieces.append(b",\n".join(rows))
        elif name:
            pieces.append(b", ".join(map(literal, parameters[name])))
    result = connection.cmd_query(b"".join(pieces))
    return int(result["affected_rows"])


class _Uuid(str):
    """A UUID that is stored as its 16 bytes."""

    __slots__ = ()


def literal(value: str | bytes | int | None) -> bytes:
    """The value as a literal of a session in utf8mb4 whose sql_mode leaves backslashes alone.

    Texts hold no lone surrogates: what comes here was validated. Inside quotes only the quote and
    the backslash mean something to the server, NUL and control characters do not.
    """
    if value is None:
        return b"NULL"
    if isinstance(value, int):
        return b"%d" % value
    if isinstance(value, _Uuid):
        return b"0x" + value.replace("-", "").encode()
    prefix, raw = (b"'", value.encode()) if isinstance(value, str) else (b"_binary'", value)
    return prefix + raw.replace(b"\\", b"\\\\").replace(b"'", b"\\'") + b"'"


def _event_values(row: EventRow) -> Iterable[str | bytes | int | None]:
    event = row.event
    return (
        _Uuid(row.id),
        event.session_id,
        event.timestamp,
        event.event_type,
        event.hook_type,
        event.parent_session_id,
        event.machine_id,
        row.working_directory,
        row.tool_name,
        row.tool_use_id,
        row.data.decode(),
        row.exact,
    )


# --- Connections ----------------------------------------------------------------------------------


class Pool:
    """Connections for many threads: waits for a free one, replaces dead ones, loses no slot.

    The driver's own pool does none of the three.
    """

    _TRUSTED_SECONDS = 5.0  # an idle connection that old is asked first whether it lives

    def __init__(self, connect: Callable[[], Any], size: int, timeout: float) -> None:
        self._connect = connect
        self._timeout = timeout
        self._slots = threading.BoundedSemaphore(size)
        self._idle: deque[tuple[float, Any]] = deque()
        self._closed = False
        self._lock = threading.Lock()
        self.in_use = 0

    def take(self, place: str) -> Any:
        if not self._slots.acquire(timeout=self._timeout):
            raise StoreUnavailable(f"{place}: no connection was free for {self._timeout:g} s")
        try:
            connection = self._living() or self._connect()
        except BaseException:
            self._slots.release()
            raise
        with self._lock:
            self.in_use += 1
        return connection

    def _living(self) -> Any:
        while True:
            try:
                since, connection = self._idle.pop()  # the last one used is the warmest
            except IndexError:
                return None
            if time.monotonic() - since < self._TRUSTED_SECONDS or connection.is_connected():
                return connection
            _close_quietly(connection)

    def give_back(self, connection: Any) -> None:
        self._idle.append((time.monotonic(), connection))
        self._release()
        if self._closed:
            self.discard_idle()

    def discard(self, connection: Any) -> None:
        _close_quietly(connection)
        self._release()

    def _release(self) -> None:
        with self._lock:
            self.in_use -= 1
        self._slots.release()

    def discard_idle(self) -> None:
        while self._idle:
            with contextlib.suppress(IndexError):
                _close_quietly(self._idle.pop()[1])

    def close(self) -> None:
        self._closed = True
        self.discard_idle()


def _rolled_back(connection: Any) -> bool:
    try:
        connection.cmd_query(b"ROLLBACK")
    except (MySQLError, MySQLInterfaceError):
        return False
    return True


def _close_quietly(connection: Any) -> None:
    # A connection that is broken already says so again when it is closed.
    with contextlib.suppress(MySQLError, MySQLInterfaceError, OSError):
        connection.close()


def _require_mysql(version: str, place: str) -> None:
    if "MariaDB" in version:
        raise ConfigurationError(
            f"{place} is MariaDB {version}, which is not supported: "
            "use MySQL 8.0.17 or newer, or PostgreSQL 12 or newer"
        )
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers < (8, 0, 17):
        raise ConfigurationError(f"{place} is MySQL {version}: use MySQL 8.0.17 or newer")


def _read_version(connection: Any) -> schema.SchemaVersion | None:
    try:
        rows = _execute(connection, SELECT_VERSION)
    except (MySQLError, MySQLInterfaceError) as error:
        if getattr(error, "errno", None) == _NO_SUCH_TABLE:
            return None
        raise
    return schema.SchemaVersion(*rows[0]) if rows else None


_NO_SUCH_TABLE = 1146

# --- Settings -------------------------------------------------------------------------------------

_SSL_MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")


def _parse(url: str) -> tuple[dict[str, Any], str]:
    """The driver's arguments, and the place in words."""
    try:
        parts = urlsplit(url)
        port = parts.port or 3306
    except ValueError as error:
        raise ConfigurationError(f"database URL: {error}") from None
    given = {name.replace("_", "-"): value for name, value in parse_qsl(parts.query)}
    database = unquote(parts.path.lstrip("/"))
    host = parts.hostname or "localhost"
    if not database:
        raise ConfigurationError(
            "database URL: names no database; mysql://USER@HOST/DATABASE is needed"
        )
    arguments: dict[str, Any] = {"host": host, "port": port, "database": database}
    if parts.username:
        arguments["user"] = unquote(parts.username)
    if parts.password:
        arguments["password"] = unquote(parts.password)
    place = f"MySQL at {host}:{port}, database {database}"
    if socket := given.pop("socket", ""):
        arguments["unix_socket"] = socket
        place = f"MySQL at {socket}, database {database}"
    if option_file := given.pop("option-file", ""):
        # The group that every MySQL client reads; the URL's own words win over it.
        arguments["option_files"] = str(Path(option_file).expanduser())
        arguments["option_groups"] = ["client"]
    if given.pop("use-pure", "") in ("1", "true"):
        arguments["use_pure"] = True
    arguments |= _tls(given, local=bool(socket) or is_local(host))
    if given:
        raise ConfigurationError(f"database URL: no parameter {', '.join(sorted(given))} is known")
    return arguments, place


def _tls(given: dict[str, str], *, local: bool) -> dict[str, Any]:
    """Verified TLS for a server elsewhere, unless the URL says otherwise in so many words."""
    mode = given.pop("ssl-mode", "PREFERRED" if local else "VERIFY_IDENTITY").upper()
    if mode not in _SSL_MODES:
        raise ConfigurationError(f"database URL: ssl-mode is one of {', '.join(_SSL_MODES)}")
    files = {name: given.pop(name) for name in ("ssl-ca", "ssl-cert", "ssl-key") if name in given}
    if mode == "DISABLED":
        return {"ssl_disabled": True}
    arguments: dict[str, Any] = {name.replace("-", "_"): path for name, path in files.items()}
    if mode.startswith("VERIFY"):
        arguments.setdefault("ssl_ca", ssl.get_default_verify_paths().cafile or "")
        arguments["ssl_verify_cert"] = True
        arguments["ssl_verify_identity"] = mode == "VERIFY_IDENTITY"
    return arguments


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "msg", None) or error).split())


#: What an error number means; whatever is missing here the server refuses.
FAULTS = {
    1053: Fault.LOST,  # the server shuts down
    1077: Fault.LOST,
    1152: Fault.LOST,
    1158: Fault.LOST,
    1159: Fault.LOST,
    1160: Fault.LOST,
    1161: Fault.LOST,
    1317: Fault.TIMEOUT,  # the statement was killed
    1927: Fault.LOST,  # the connection was killed
    4031: Fault.LOST,  # idle for too long
    1213: Fault.CONFLICT,
    1451: Fault.CONFLICT,
    1452: Fault.CONFLICT,  # the session was deleted while we inserted
    1243: Fault.STALE,
    1615: Fault.STALE,
    1205: Fault.TIMEOUT,  # innodb_lock_wait_timeout
    3024: Fault.TIMEOUT,  # max_execution_time
    1040: Fault.TIMEOUT,  # too many connections
    1048: Fault.DATA,
    1105: Fault.DATA,
    1153: Fault.DATA,  # over max_allowed_packet
    1264: Fault.DATA,
    1292: Fault.DATA,
    1300: Fault.DATA,
    1301: Fault.DATA,
    1366: Fault.DATA,
    1406: Fault.DATA,
    3140: Fault.DATA,
    3141: Fault.DATA,
    3144: Fault.DATA,
    3151: Fault.DATA,
    3157: Fault.DATA,
    3819: Fault.DATA,
}
