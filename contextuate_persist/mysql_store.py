"""Everything MySQL: the statements, the store, its connections, its errors."""

from __future__ import annotations

import configparser
import contextlib
import ctypes
import os
import re
import threading
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, ClassVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

import mysql.connector
from mysql.connector.errors import Error as MySQLError
from mysql.connector.optionfiles import MySQLOptionsParser

from contextuate_persist import base, doctor, partitions, payload, records, schema, tls
from contextuate_persist.accounts import Names
from contextuate_persist.base import BaseStore, Event, Fault, Sliced
from contextuate_persist.config import is_local, split_url
from contextuate_persist.dumps import Contents, Dumper, MySQLDumper, Sums
from contextuate_persist.errors import (
    ConfigurationError,
    InvalidRecord,
    PersistenceError,
    SchemaError,
    StoreRefused,
    StoreUnavailable,
)
from contextuate_persist.model import Cursor, Health, MessageUsage
from contextuate_persist.partitions import Partition, Span
from contextuate_persist.records import Due, EventRow, Seed

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
TELLS_MORE = """VALUES(known_from) = 'event' AND (
            sessions.known_from = 'reference'
            OR sessions.known_from = 'event' AND VALUES(start_time) < sessions.start_time
        )"""

SEED_SESSIONS = f"""
INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, known_from, exact
)
VALUES %(rows)s
ON DUPLICATE KEY UPDATE
    machine_id = IF({TELLS_MORE}, VALUES(machine_id), sessions.machine_id),
    working_directory = IF(
        {TELLS_MORE}, VALUES(working_directory), sessions.working_directory
    ),
    exact = IF(
        {TELLS_MORE},
        CAST(
            NULLIF(
                CAST(
                    JSON_MERGE_PATCH(
                        JSON_REMOVE(COALESCE(sessions.exact, '{{}}'), '$.working_directory'),
                        COALESCE(VALUES(exact), '{{}}')
                    ) AS CHAR
                ),
                '{{}}'
            ) AS JSON
        ),
        sessions.exact
    ),
    start_time = IF({TELLS_MORE}, VALUES(start_time), sessions.start_time),
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

# Where events is partitioned, event_ids decides what is new and gives out seq. No foreign key keeps
# the event of a deleted session out there: the lock of the session does, which batches hold, too.
INSERT_EVENT_ID = (
    """
INSERT INTO event_ids (id, timestamp)
SELECT UUID_TO_BIN(%(id)s), %(timestamp)s
FROM sessions AS s
"""
    + INSERT_EVENT[INSERT_EVENT.index("WHERE s.session_id") : INSERT_EVENT.index("ON DUPLICATE")]
    + """FOR SHARE OF s
ON DUPLICATE KEY UPDATE id = event_ids.id
"""
)

INSERT_PARTITIONED_EVENT = """
INSERT INTO events (
    id, seq, session_id, timestamp, event_type, hook_type,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact
)
SELECT
    i.id, i.seq, %(session_id)s, i.timestamp, %(event_type)s, %(hook_type)s,
    %(parent_session_id)s, %(machine_id)s, %(working_directory)s,
    %(tool_name)s, %(tool_use_id)s, CAST(%(data)s AS JSON), CAST(%(exact)s AS BINARY)
FROM event_ids AS i
WHERE i.id = UUID_TO_BIN(%(id)s)
"""

INSERT_EVENT_IDS = """
INSERT INTO event_ids (id, timestamp)
VALUES %(rows)s
ON DUPLICATE KEY UPDATE id = event_ids.id
"""

SELECT_SEQS = """
SELECT given.id, i.seq
FROM JSON_TABLE(%(ids)s, '$[*]' COLUMNS (id CHAR(36) PATH '$')) AS given
JOIN event_ids AS i ON i.id = UUID_TO_BIN(given.id)
"""

INSERT_PARTITIONED_EVENTS = """
INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact, seq
)
VALUES %(rows)s
"""

SELECT_KNOWN_PARTITIONED_IDS = SELECT_KNOWN_IDS.replace("JOIN events", "JOIN event_ids")

SELECT_EVENTS = """
SELECT
    BIN_TO_UUID(e.id), e.seq, e.timestamp, e.session_id, e.parent_session_id, e.machine_id,
    e.working_directory, e.event_type, e.hook_type, e.data, e.exact
FROM events AS e
"""

# For pages in bounded memory: a large exact payload is left out, its size tells that it is there.
SELECT_EVENTS_SMALL = SELECT_EVENTS.replace(
    "e.exact",
    "CASE WHEN OCTET_LENGTH(e.exact) <= 65536 THEN e.exact END, OCTET_LENGTH(e.exact)",
)

SELECT_EVENTS_OF = (
    SELECT_EVENTS_SMALL
    + """
JOIN JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked ON asked.session_id = e.session_id
ORDER BY e.session_id, e.timestamp, e.seq
LIMIT %(limit)s
"""
)

SELECT_EVENT = SELECT_EVENTS + "WHERE e.id = UUID_TO_BIN(%(id)s) AND e.session_id = %(session_id)s"

# By way of event_ids to one row of one partition: there is no index of the ids in each.
SELECT_PARTITIONED_EVENT = (
    SELECT_EVENTS
    + """
WHERE e.session_id = %(session_id)s
    AND e.timestamp = (SELECT i.timestamp FROM event_ids AS i WHERE i.id = UUID_TO_BIN(%(id)s))
    AND e.seq = (SELECT i.seq FROM event_ids AS i WHERE i.id = UUID_TO_BIN(%(id)s))
"""
)

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
# A session that was deleted after its start, and is not there again, stays so.
SAVE_SESSION = """
INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, end_time, status,
    parent_session_id, manual_parent_session_id, child_session_ids,
    agent_type, model, transcript_path, is_user_initiated, is_pinned, hidden, label,
    token_usage_input, token_usage_output, token_usage_cache_read, token_usage_cache_creation,
    known_from, exact
)
SELECT
    %(session_id)s, %(machine_id)s, %(working_directory)s, %(start_time)s,
    IF(%(status)s = 'active', NULL, %(end_time)s), %(status)s,
    %(parent_session_id)s, %(manual_parent_session_id)s, CAST(%(child_session_ids)s AS JSON),
    %(agent_type)s, %(model)s, %(transcript_path)s,
    COALESCE(%(is_user_initiated)s, TRUE), COALESCE(%(is_pinned)s, FALSE),
    COALESCE(%(hidden)s, FALSE), %(label)s,
    %(token_usage_input)s, %(token_usage_output)s, %(token_usage_cache_read)s,
    %(token_usage_cache_creation)s,
    'session', NULLIF(CAST(JSON_MERGE_PATCH('{}', %(exact)s) AS CHAR), '{}')
FROM (SELECT 1 AS one) AS given
WHERE EXISTS (
    SELECT 1 FROM sessions AS shown
    WHERE shown.session_id = %(session_id)s AND shown.known_from <> 'reference'
) OR NOT EXISTS (
    SELECT 1 FROM deleted_sessions AS d
    WHERE d.session_id = %(session_id)s AND d.deleted_at >= %(start_time)s
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
    child_session_ids = IF(
        JSON_CONTAINS(sessions.child_session_ids, CAST(%(child_session_ids)s AS JSON)),
        sessions.child_session_ids,
        JSON_MERGE_PRESERVE(sessions.child_session_ids, (
            SELECT COALESCE(JSON_ARRAYAGG(given.child), JSON_ARRAY())
            FROM JSON_TABLE(
                %(child_session_ids)s,
                '$[*]' COLUMNS (child VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
            ) AS given
            WHERE given.child NOT IN (
                SELECT known.child
                FROM JSON_TABLE(
                    sessions.child_session_ids,
                    '$[*]' COLUMNS (child VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
                ) AS known
            )
        ))
    ),
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
        LEFT JOIN sessions AS child
            ON child.session_id = listed.session_id AND child.known_from <> 'reference'
        LEFT JOIN deleted_sessions AS gone ON gone.session_id = listed.session_id
        WHERE child.effective_parent_id <> s.session_id
            OR child.session_id IS NULL AND gone.session_id IS NOT NULL
    ) AS strangers
FROM sessions AS s
"""

# The server sorts no whole sessions: a list of 10,000 children is more than its sort buffer takes,
# and it refuses the statement. It sorts ids where it has to choose; what comes, the store sorts.
JOIN_PAGE = """
JOIN (
    SELECT s.session_id
    FROM sessions AS s
    {where}
    ORDER BY s.start_time DESC, s.session_id DESC
    LIMIT %(limit)s
) AS page ON page.session_id = s.session_id
"""

SELECT_SHOWN = """
SELECT s.session_id
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN sessions AS s ON s.session_id = asked.session_id
WHERE s.known_from <> 'reference'
"""

SESSION_CLAUSES = {
    "session_id": "s.session_id = %(session_id)s",
    "session_ids": """s.session_id IN (
        SELECT asked.session_id
        FROM JSON_TABLE(
            %(session_ids)s,
            '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
        ) AS asked
    )""",
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
# A parent that is not stored yet, made from what its child knows; locks both as SEED_SESSIONS does.
REFER_TO_PARENT = """
INSERT INTO sessions (session_id, machine_id, working_directory, start_time, known_from)
SELECT
    named.session_id, child.machine_id, child.working_directory, child.start_time, 'reference'
FROM sessions AS child
CROSS JOIN JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS named
WHERE child.session_id = %(session_id)s
ORDER BY named.session_id
ON DUPLICATE KEY UPDATE known_from = sessions.known_from
"""
# Once somebody has said where and when a session began, events correct that no more.
FIRM_COLUMNS = {"machine_id", "working_directory", "start_time", "parent_session_id"}

# Apart from the statement below, which counts a new row once and a raised one twice.
INSERT_USAGE = """
INSERT INTO token_ledger (
    message_id, session_id, timestamp, model,
    input_tokens, output_tokens, cache_read, cache_creation
)
VALUES %(rows)s
ON DUPLICATE KEY UPDATE message_id = token_ledger.message_id
"""

# A larger reading raises what is known of a message, whoever owns it; a row that does not change is
# locked all the same.
SAVE_USAGE = """
INSERT INTO token_ledger (
    message_id, session_id, timestamp, model,
    input_tokens, output_tokens, cache_read, cache_creation
)
VALUES %(rows)s
ON DUPLICATE KEY UPDATE
    input_tokens = GREATEST(token_ledger.input_tokens, VALUES(input_tokens)),
    output_tokens = GREATEST(token_ledger.output_tokens, VALUES(output_tokens)),
    cache_read = GREATEST(token_ledger.cache_read, VALUES(cache_read)),
    cache_creation = GREATEST(token_ledger.cache_creation, VALUES(cache_creation))
"""

SELECT_OWNERS = """
SELECT DISTINCT t.session_id
FROM JSON_TABLE(
    %(message_ids)s, '$[*]' COLUMNS (message_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS given
JOIN token_ledger AS t ON t.message_id = given.message_id
"""

# A total is at most what a session may be saved with. A row that has it already is not rewritten.
SET_TOTALS = """
UPDATE sessions AS s
JOIN (
    SELECT
        t.session_id,
        LEAST(SUM(t.input_tokens), 9007199254740991) AS input,
        LEAST(SUM(t.output_tokens), 9007199254740991) AS output,
        LEAST(SUM(t.cache_read), 9007199254740991) AS cache_read,
        LEAST(SUM(t.cache_creation), 9007199254740991) AS cache_creation
    FROM token_ledger AS t
    WHERE t.session_id IN (%(session_ids)s)
    GROUP BY t.session_id
) AS total ON total.session_id = s.session_id
SET
    s.token_usage_input = total.input,
    s.token_usage_output = total.output,
    s.token_usage_cache_read = total.cache_read,
    s.token_usage_cache_creation = total.cache_creation
"""

# Deleting takes three steps under locks taken in the order of ids: children lose their parent,
# lists lose the id, then the row goes, its events with it (foreign key).
SELECT_FAMILY = """
SELECT s.session_id
FROM sessions AS s
WHERE s.session_id = %(session_id)s
UNION
SELECT child.session_id
FROM sessions AS child
WHERE child.parent_session_id = %(session_id)s
UNION
SELECT child.session_id
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

LOCK_THERE = """
SELECT s.session_id
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN sessions AS s ON s.session_id = asked.session_id
FOR UPDATE OF s
"""

# Tells a session from another one that was made after it under the same id.
SELECT_CREATIONS = """
SELECT s.session_id, s.created_at
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN sessions AS s ON s.session_id = asked.session_id
"""

ORPHAN_CHILDREN = """
UPDATE sessions
SET
    parent_session_id = NULLIF(parent_session_id, %(session_id)s),
    manual_parent_session_id = NULLIF(manual_parent_session_id, %(session_id)s)
WHERE parent_session_id = %(session_id)s OR effective_parent_id = %(session_id)s
"""

# A list cannot be found by its element without a scan (20 ms among 50,000 sessions), so that is
# read without locks; only what is found is then locked and changed.
SELECT_LISTING = """
SELECT s.session_id
FROM sessions AS s
WHERE JSON_LENGTH(s.child_session_ids) > 0
    AND JSON_OVERLAPS(s.child_session_ids, CAST(%(session_ids)s AS JSON))
ORDER BY s.session_id
"""

# Those that stay, a while or for good; the foreign key sees to the detected parents.
ORPHAN_WARDS = """
UPDATE sessions
SET manual_parent_session_id = NULL
WHERE effective_parent_id IN (%(session_ids)s)
    AND manual_parent_session_id IS NOT NULL
    AND session_id NOT IN (%(session_ids)s)
"""

UNLIST_CHILDREN = """
UPDATE sessions
SET child_session_ids = COALESCE(
    (
        SELECT JSON_ARRAYAGG(listed.session_id)
        FROM JSON_TABLE(
            child_session_ids,
            '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
        ) AS listed
        WHERE listed.session_id NOT IN (
            SELECT gone.session_id
            FROM JSON_TABLE(
                %(session_ids)s,
                '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
            ) AS gone
        )
    ),
    JSON_ARRAY()
)
WHERE session_id = %(session_id)s
"""

# MAX() would read all events of the session: MySQL finds the last one alone only as the last row of
# an index, all of which is named.
LAST_EVENT = """(
            SELECT e.timestamp
            FROM events AS e
            WHERE e.session_id = s.session_id
            ORDER BY e.session_id DESC, e.timestamp DESC, e.seq DESC
            LIMIT 1
        )"""

# An event dated a little later than the server's clock must not bring its session back either; but
# one with a year to go must not keep the session's future away.
DELETED_AT = f"""GREATEST(
        clock.now,
        LEAST(
            clock.now + 86400000,
            COALESCE({LAST_EVENT}, 0)
        )
    )"""

REMEMBER_DELETIONS = f"""
INSERT INTO deleted_sessions (session_id, deleted_at)
SELECT
    s.session_id,
    {DELETED_AT}
FROM sessions AS s
CROSS JOIN (SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now) AS clock
WHERE s.session_id IN (%(session_ids)s)
ON DUPLICATE KEY UPDATE
    deleted_at = GREATEST(deleted_sessions.deleted_at, VALUES(deleted_at))
"""

# Where events is partitioned it has no foreign key.
DELETE_IDS_OF_SESSIONS = """
DELETE i
FROM events AS e
JOIN event_ids AS i ON i.id = e.id
WHERE e.session_id IN (%(session_ids)s)
"""

DELETE_EVENTS_OF_SESSIONS = """
DELETE FROM events
WHERE session_id IN (%(session_ids)s)
"""

DELETE_SESSIONS = """
DELETE FROM sessions
WHERE session_id IN (%(session_ids)s)
"""

HAS_MANY_EVENTS = """
SELECT 1
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN events AS e ON e.session_id = asked.session_id
LIMIT 1
OFFSET %(many)s
"""

SELECT_SESSION_IDS = """
SELECT s.session_id
FROM sessions AS s
"""

FORGET_DELETIONS = """
DELETE FROM deleted_sessions
WHERE deleted_at < CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) - %(age)s
"""

# --- Forgetting -----------------------------------------------------------------------------------

SELECT_PLACES = """
SELECT s.session_id, s.machine_id, s.working_directory, s.exact
FROM sessions AS s
WHERE s.known_from <> 'reference'
"""

# Mere references are walked through, and walked from, too.
# Also below what is not there: a manual parent need not be.
SELECT_BELOW = """
WITH RECURSIVE subtree (session_id) AS (
    SELECT asked.session_id
    FROM JSON_TABLE(
        %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
    ) AS asked
    UNION
    SELECT child.session_id
    FROM subtree JOIN sessions AS child ON child.effective_parent_id = subtree.session_id
)
SELECT s.session_id, s.effective_parent_id, s.transcript_path, s.exact
FROM subtree JOIN sessions AS s ON s.session_id = subtree.session_id
"""

# One statement for each: as bytes their lists would need another way to read an answer.
COUNT_BELONGINGS = {
    "sessions": """
SELECT COUNT(*)
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN sessions AS s ON s.session_id = asked.session_id
WHERE s.known_from <> 'reference'
""",
    "events": """
SELECT COUNT(*)
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN events AS e ON e.session_id = asked.session_id
""",
    "messages": """
SELECT COUNT(*)
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN token_ledger AS t ON t.session_id = asked.session_id
""",
}

# As REMEMBER_DELETIONS does, but by what is asked for, whether it is there or not.
REMEMBER_FORGOTTEN = f"""
INSERT INTO deleted_sessions (session_id, deleted_at)
SELECT
    s.session_id,
    {DELETED_AT}
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS s
CROSS JOIN (SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now) AS clock
WHERE TRUE  -- or ON would belong to the join
ON DUPLICATE KEY UPDATE
    deleted_at = GREATEST(deleted_sessions.deleted_at, VALUES(deleted_at))
"""

DELETE_SOME_EVENTS = """
DELETE FROM events
WHERE session_id IN (%(session_ids)s)
LIMIT {limit}
"""

UNNAME_PARENTS = """
UPDATE events
SET parent_session_id = NULL
WHERE parent_session_id IN (%(session_ids)s)
LIMIT {limit}
"""

SELECT_KIN = """
SELECT s.session_id
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN sessions AS s ON s.session_id = asked.session_id
UNION
SELECT child.session_id
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN sessions AS child ON child.parent_session_id = asked.session_id
"""

SELECT_CHILDREN = """
SELECT child.session_id
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN sessions AS child ON child.effective_parent_id = asked.session_id
"""

# By the index also where it seems cheaper to read the whole table, and to sort it for each page.
SELECT_HEADS = """
SELECT BIN_TO_UUID(e.id), e.session_id, e.timestamp, e.seq, e.machine_id, e.working_directory
FROM events AS e FORCE INDEX (idx_timestamp)
"""
SELECT_MACHINE_HEADS = SELECT_HEADS.replace("idx_timestamp", "idx_machine_timestamp")

DELETE_EVENTS = """
DELETE FROM events
WHERE id IN (%(ids)s)
"""

# Where events is partitioned, by way of event_ids: there is no index of the ids in each. What is
# forgotten is also in the table that a conversion leaves aside.
DELETE_PARTITIONED_EVENTS = """
DELETE i, e
FROM event_ids AS i
JOIN events AS e ON e.timestamp = i.timestamp AND e.seq = i.seq
WHERE i.id IN (%(ids)s)
"""

SELECT_SOME_IDS = """
SELECT BIN_TO_UUID(e.id)
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN events AS e ON e.session_id = asked.session_id
LIMIT %(limit)s
"""

DELETE_UNPARTITIONED_EVENTS = DELETE_EVENTS.replace("events", "events_unpartitioned")
DELETE_SOME_UNPARTITIONED_EVENTS = DELETE_SOME_EVENTS.replace("events", "events_unpartitioned")
UNNAME_UNPARTITIONED_PARENTS = UNNAME_PARENTS.replace("events", "events_unpartitioned")

SELECT_BESIDE = """
SELECT t.table_name
FROM information_schema.tables AS t
WHERE t.table_schema = DATABASE()
    AND t.table_name IN ('events_partitioned', 'events_retired', 'events_unpartitioned')
"""

SELECT_COPIES = """
SELECT s.session_id
FROM sessions AS s
WHERE s.known_from = 'reference' AND (s.machine_id <> '' OR s.working_directory <> '')
"""

EMPTY_COPIES = """
UPDATE sessions
SET machine_id = '', working_directory = '', exact = NULL
WHERE session_id IN (%(session_ids)s) AND known_from = 'reference'
"""

# --- Retention ------------------------------------------------------------------------------------

# What retention goes by: of every session, page by page, or of those that are locked.
STATE_OF_SESSION = f"""
SELECT
    s.session_id,
    s.effective_parent_id,
    s.is_pinned,
    s.start_time,
    s.end_time,
    {LAST_EVENT},
    s.known_from
FROM sessions AS s
"""

SELECT_STATES = (
    STATE_OF_SESSION
    + """
WHERE s.session_id > %(after)s
ORDER BY s.session_id
LIMIT %(limit)s
"""
)

SELECT_STATES_OF = (
    STATE_OF_SESSION
    + """
JOIN JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS locked ON locked.session_id = s.session_id
"""
)

SELECT_LINKS = """
SELECT s.session_id, s.effective_parent_id
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS locked
JOIN sessions AS s ON s.effective_parent_id = locked.session_id
"""

# How many events, and how long their values are as stored.
WEIGHT_OF_EVENT = """JSON_STORAGE_SIZE(e.data)
            + COALESCE(OCTET_LENGTH(e.exact), 0)
            + OCTET_LENGTH(e.working_directory)"""

SELECT_WEIGHTS = f"""
SELECT
    e.session_id,
    COUNT(*),
    CAST(
        SUM(
            {WEIGHT_OF_EVENT}
        ) AS SIGNED
    )
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN events AS e ON e.session_id = asked.session_id
GROUP BY e.session_id
"""

# Every value of the session, of its events and of its messages counts, whoever changes it. A list
# of checksums may grow longer than what GROUP_CONCAT holds: each is a number, all in one by XOR.
HASH_OF_EVENT = """CAST(CONV(LEFT(SHA2(
                CONCAT_WS(
                    ' ', e.seq, e.timestamp, HEX(e.id), SHA2(e.event_type, 256),
                    SHA2(e.hook_type, 256), COALESCE(SHA2(e.parent_session_id, 256), '-'),
                    SHA2(e.machine_id, 256), SHA2(e.working_directory, 256), SHA2(e.data, 256),
                    COALESCE(SHA2(e.exact, 256), '-'), COALESCE(SHA2(e.tool_name, 256), '-'),
                    COALESCE(SHA2(e.tool_use_id, 256), '-'), COALESCE(e.commit_order, '-'),
                    e.created_at
                ),
                256
            ), 16), 16, 10) AS UNSIGNED)"""

FINGERPRINT_OF_EVENTS = f"""(
        SELECT CAST(CONCAT_WS(' ', COUNT(*), BIT_XOR({HASH_OF_EVENT})) AS CHAR)
        FROM events AS e
        WHERE e.session_id = s.session_id
    )"""

SELECT_FINGERPRINTS = f"""
SELECT
    s.session_id,
    CAST(SHA2(
        JSON_ARRAY(
            s.session_id, s.machine_id, s.working_directory, s.start_time, s.end_time, s.status,
            s.parent_session_id, s.manual_parent_session_id, s.child_session_ids,
            s.agent_type, s.model, s.transcript_path, s.is_user_initiated, s.is_pinned,
            s.hidden, s.label, s.token_usage_input, s.token_usage_output,
            s.token_usage_cache_read, s.token_usage_cache_creation, s.known_from, s.exact,
            s.created_at, s.updated_at
        ),
        256
    ) AS CHAR),
    {FINGERPRINT_OF_EVENTS},
    (
        SELECT CAST(CONCAT_WS(' ', COUNT(*), BIT_XOR(CAST(CONV(LEFT(SHA2(
            JSON_ARRAY(
                t.message_id, t.timestamp, t.model,
                t.input_tokens, t.output_tokens, t.cache_read, t.cache_creation
            ),
            256
        ), 16), 16, 10) AS UNSIGNED))) AS CHAR)
        FROM token_ledger AS t
        WHERE t.session_id = s.session_id
    )
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS asked
JOIN sessions AS s ON s.session_id = asked.session_id
"""

SELECT_FINGERPRINTS_BUT_EVENTS = SELECT_FINGERPRINTS.replace(FINGERPRINT_OF_EVENTS, "NULL")

# Of sessions with too much for one statement, what the aggregates above take together.
SELECT_SLICES = {
    name: f"""
        SELECT e.timestamp, e.seq, {value}
        FROM events AS e
        WHERE e.session_id = %(session_id)s AND {EVENT_CLAUSES["after"]}
        ORDER BY e.timestamp, e.seq
        LIMIT %(limit)s
    """
    for name, value in {"fingerprint": HASH_OF_EVENT, "weight": WEIGHT_OF_EVENT}.items()
}

SELECT_USAGE = """
SELECT
    t.message_id, t.timestamp, t.model,
    t.input_tokens, t.output_tokens, t.cache_read, t.cache_creation
FROM token_ledger AS t
WHERE t.session_id = %(session_id)s
ORDER BY t.message_id
"""

SELECT_SIZE = """
SELECT CAST(COALESCE(SUM(t.data_length + t.index_length), 0) AS SIGNED)
FROM information_schema.tables AS t
WHERE t.table_schema = DATABASE()
    AND t.table_name IN ('sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger')
"""

# --- Server ---------------------------------------------------------------------------------------

# The layout is that of the tables: schema_version is told a moment after these were swapped.
SELECT_VERSION = """
SELECT v.version, IF(
    EXISTS (
        SELECT 1
        FROM information_schema.tables AS t
        WHERE t.table_schema = DATABASE() AND t.table_name = 'event_ids'
    ),
    'partitioned', v.layout
)
FROM schema_version AS v
ORDER BY v.version DESC
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

# Nor is the connection to end while it waits: for a program that dumps or loads, or, in the middle
# of a result, for another one that is read beside it.
ALLOW_LONG_STATEMENTS = b"""
SET SESSION max_execution_time = 0, wait_timeout = 31536000, net_write_timeout = 86400
"""

LOCK_SCHEMA = """
SELECT GET_LOCK(CONCAT('contextuate_schema_', LEFT(SHA2(%(database)s, 256), 40)), 0)
"""

SELECT_CIPHER = "SHOW SESSION STATUS LIKE 'Ssl_cipher'"

SELECT_SERVER = "SELECT VERSION(), @@max_allowed_packet, DATABASE()"

# READ COMMITTED, since a reader that never commits would never see a new row, and since the locks
# of REPEATABLE READ reach between the rows. Chains of sessions may be longer than 1,000. Sizes of
# tables are asked for seldom, and then a day-old answer is worth nothing. Deleting the events of a
# thousand sessions by an index takes more memory than the server allows by itself, and a look at
# each session, not an average; or else it reads, and locks, all events that there are. A client
# that stands still loses its locks after a while; by the server's own settings, after eight hours.
SET_SESSION = """
SET SESSION
    transaction_isolation = 'READ-COMMITTED',
    sql_mode = 'STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION',
    time_zone = '+00:00',
    cte_max_recursion_depth = 4294967295,
    information_schema_stats_expiry = 0,
    range_optimizer_max_mem_size = 0,
    eq_range_index_dive_limit = 0,
    wait_timeout = CAST(LEAST(@@wait_timeout, {idle_seconds}) AS UNSIGNED),
    innodb_lock_wait_timeout = {lock_seconds},
    lock_wait_timeout = {lock_seconds},
    max_execution_time = {statement_ms}
"""

# Of a connection, in a transaction or not: MySQL knows no difference. The pool asks those that were
# idle for seconds whether they live, and makes another for one that was ended: 40 ms with TLS.
IDLE_SECONDS = 300

# The driver's own limits for an answer, and for what is sent. Maintenance goes without them.
DRIVER_LIMITS = ("read_timeout", "write_timeout")

# --- Partitions -----------------------------------------------------------------------------------

# The columns of events that are copied, in this order.
COPIED_COLUMNS = """session_id, timestamp, seq, id, event_type, hook_type, parent_session_id,
    machine_id, working_directory, tool_name, tool_use_id, data, exact, commit_order, created_at"""

SELECT_TABLE = """
SELECT 1
FROM information_schema.tables AS t
WHERE t.table_schema = DATABASE() AND t.table_name = %(table)s
"""

# Or the server answers with what it knew up to a day ago.
READ_FRESH_STATISTICS = b"SET SESSION information_schema_stats_expiry = 0"

SELECT_PARTITIONS = """
SELECT
    p.partition_name, p.partition_description, p.table_rows,
    CAST(p.data_length + p.index_length AS SIGNED)
FROM information_schema.partitions AS p
WHERE p.table_schema = DATABASE() AND p.table_name = %(table)s AND p.partition_name IS NOT NULL
ORDER BY p.partition_ordinal_position
"""

SELECT_FIRST_EVENT = "SELECT MIN(e.timestamp) FROM events AS e"

# What follows a table when it is renamed; we make nothing of the kind. Views name it only.
SELECT_ATTACHED = """
SELECT CONCAT('trigger ', t.trigger_name, ' on table events')
FROM information_schema.triggers AS t
WHERE t.event_object_schema = DATABASE() AND t.event_object_table = 'events'
UNION
SELECT CONCAT('constraint ', k.constraint_name, ' on table ', k.table_name)
FROM information_schema.key_column_usage AS k
WHERE k.referenced_table_schema = DATABASE() AND k.referenced_table_name = 'events'
"""

# Of which sessions events were copied: of one that is gone in the end, or is another one then that
# was made under its id, what was copied goes, too.
CREATE_COPIED_SESSIONS = b"""
CREATE TEMPORARY TABLE IF NOT EXISTS copied_sessions (
    session_id  VARCHAR(255) NOT NULL,
    created_at  TIMESTAMP(3) NULL,

    PRIMARY KEY (session_id)
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin
"""

NOTE_SESSIONS_BEFORE = """
INSERT INTO copied_sessions (session_id, created_at)
SELECT copied.session_id, s.created_at
FROM (SELECT DISTINCT p.session_id FROM events_partitioned AS p) AS copied
LEFT JOIN sessions AS s ON s.session_id = copied.session_id
ON DUPLICATE KEY UPDATE session_id = copied_sessions.session_id
"""

NOTE_SESSIONS = """
INSERT INTO copied_sessions (session_id, created_at)
SELECT DISTINCT e.session_id, s.created_at
FROM events AS e
LEFT JOIN sessions AS s ON s.session_id = e.session_id
WHERE e.seq > %(after)s AND e.seq <= %(upto)s
ON DUPLICATE KEY UPDATE session_id = copied_sessions.session_id
"""

SELECT_COPIED = "SELECT COALESCE(MAX(i.seq), 0) FROM event_ids_new AS i"

# A seq that was given out comes never again, not even that of a deleted event.
GO_ON_COUNTING = "ALTER TABLE event_ids_new AUTO_INCREMENT = {next_seq}"

SELECT_LAST_SEQ = "SELECT COALESCE(MAX(e.seq), 0) FROM events AS e"

SELECT_CHUNK = """
SELECT COUNT(*), MAX(chunk.seq)
FROM (
    SELECT e.seq
    FROM events AS e
    WHERE e.seq > %(after)s AND e.seq <= %(upto)s
    ORDER BY e.seq
    LIMIT %(rows)s
) AS chunk
"""

# First the events, then their ids: what is deleted in between leaves events without an id, which
# are found again by their session.
COPY_CHUNK = f"""
INSERT INTO events_partitioned ({COPIED_COLUMNS})
SELECT {COPIED_COLUMNS}
FROM events
WHERE seq > %(after)s AND seq <= %(upto)s
"""

# An id that is there already with another seq: its event was deleted and stored anew.
COPY_IDS = """
INSERT INTO event_ids_new (id, seq, timestamp)
SELECT e.id, e.seq, e.timestamp
FROM events AS e
WHERE e.seq > %(after)s AND e.seq <= %(upto)s
ON DUPLICATE KEY UPDATE seq = VALUES(seq), timestamp = VALUES(timestamp)
"""

# From indexes, not from the rows themselves, as SELECT_TALLIES.
COMPARE_COPIES = """
SELECT counted.session_id, CAST(SUM(counted.old) AS SIGNED), CAST(SUM(counted.new) AS SIGNED)
FROM (
    SELECT e.session_id, COUNT(*) AS old, 0 AS new
    FROM events AS e IGNORE INDEX FOR GROUP BY (PRIMARY)
    WHERE e.seq <= %(upto)s
    GROUP BY e.session_id
    UNION ALL
    SELECT p.session_id, 0, COUNT(*)
    FROM events_partitioned AS p IGNORE INDEX FOR GROUP BY (PRIMARY)
    WHERE p.seq <= %(upto)s
    GROUP BY p.session_id
) AS counted
GROUP BY counted.session_id
HAVING SUM(counted.old) <> SUM(counted.new)
"""

SELECT_GONE_SESSIONS = """
SELECT c.session_id
FROM copied_sessions AS c
LEFT JOIN sessions AS s ON s.session_id = c.session_id
WHERE s.session_id IS NULL OR NOT s.created_at <=> c.created_at
"""

SELECT_GONE_EVENTS = """
SELECT p.session_id, p.timestamp, p.seq
FROM JSON_TABLE(
    %(session_ids)s, '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
) AS copied
JOIN events_partitioned AS p ON p.session_id = copied.session_id
LEFT JOIN events AS e
    ON e.session_id = p.session_id AND e.timestamp = p.timestamp AND e.seq = p.seq
WHERE e.seq IS NULL
"""

PURGE_ID = "DELETE FROM event_ids_new WHERE seq = %(seq)s"

PURGE_EVENT = """
DELETE FROM events_partitioned
WHERE session_id = %(session_id)s AND timestamp = %(timestamp)s AND seq = %(seq)s
"""

# Every table by every name that the last step uses.
LOCK_FOR_SWITCH = b"""
LOCK TABLES
    events WRITE, events AS e WRITE, events_partitioned WRITE, events_partitioned AS p WRITE,
    event_ids_new WRITE, event_ids_new AS i WRITE, sessions AS s READ, schema_version WRITE
"""

# In one step, so that at no moment, whoever is killed, a table is missing; and only now is there a
# table event_ids.
SWAP_TABLES = b"""
RENAME TABLE
    events TO events_unpartitioned, events_partitioned TO events, event_ids_new TO event_ids
"""

RECORD_LAYOUT = b"""
UPDATE schema_version
SET layout = 'partitioned'
WHERE layout <> 'partitioned'
ORDER BY version DESC
LIMIT 1
"""

# The rest is copied only where events lie in it: mostly it is empty.
ADD_PARTITIONS = """
ALTER TABLE {table} REORGANIZE PARTITION p_rest INTO (
    {partitions}, PARTITION p_rest VALUES LESS THAN MAXVALUE
)
"""

SELECT_SESSIONS_OF = "SELECT DISTINCT e.session_id FROM {table} AS e"

# CREATE TABLE LIKE would make all partitions, only to have them removed again: a second for twenty
# of them, where this takes 40 ms. The rules are left out: EXCHANGE would try them on each row, even
# without validation, while nobody can write (1.2 to 2.7 s for 125,000 events).
SHOW_EVENTS = "SHOW CREATE TABLE events"
NOT_OF_RETIRED = re.compile(
    r",\n *CONSTRAINT `[^`]+` CHECK [^\n]*?(?=,?\n)|/\*!\d+ PARTITION BY.*", re.DOTALL
)

IS_EMPTY = "SELECT NOT EXISTS (SELECT 1 FROM {table})"

RETIRE_PARTITION = """
ALTER TABLE events EXCHANGE PARTITION {partition} WITH TABLE events_retired WITHOUT VALIDATION
"""

SELECT_NEWEST_RETIRED = "SELECT COALESCE(max(r.timestamp), -1) FROM events_retired AS r"

# To the sessions that are still there, and were not deleted and made anew meanwhile. A deletion
# alone does not say so: a copy brings the source's, also of a session that the target keeps.
IS_GIVEN_BACK = """session_id IN (%(session_ids)s)
    AND EXISTS (
        SELECT 1 FROM sessions AS s
        WHERE s.session_id = events_retired.session_id
            AND NOT EXISTS (
                SELECT 1 FROM deleted_sessions AS d
                WHERE d.session_id = events_retired.session_id
                    AND d.deleted_at >= events_retired.timestamp
                    AND s.created_at > events_retired.created_at
            )
    )"""

GIVE_BACK = f"""
INSERT INTO events ({COPIED_COLUMNS})
SELECT {COPIED_COLUMNS}
FROM events_retired
WHERE {IS_GIVEN_BACK}
"""

DELETE_GIVEN_BACK = f"""
DELETE FROM events_retired
WHERE {IS_GIVEN_BACK}
"""

# From an index alone, page after page: the rows with their payloads are fifty times as large.
SELECT_RETIRED = """
SELECT r.timestamp, r.seq
FROM events_retired AS r FORCE INDEX (idx_timestamp)
WHERE r.timestamp >= %(timestamp)s
    AND (r.timestamp > %(timestamp)s OR r.seq > %(seq)s)
ORDER BY r.timestamp, r.seq
LIMIT %(rows)s
"""

FORGET_IDS = """
DELETE FROM event_ids
WHERE seq IN (%(seqs)s)
"""

SELECT_UNPARTITIONED_ONLY = """
SELECT COUNT(*)
FROM events_unpartitioned AS u
LEFT JOIN events AS e
    ON e.session_id = u.session_id AND e.timestamp = u.timestamp AND e.seq = u.seq
WHERE e.seq IS NULL
"""

# --- Copies ---------------------------------------------------------------------------------------

# Enough to see which sessions two databases have in common, and read from indexes alone: to save
# sorting for GROUP BY, the server would read all rows of the table.
SELECT_TALLIES = """
SELECT
    s.session_id,
    s.known_from,
    CAST(UNIX_TIMESTAMP(s.updated_at) * 1000 AS SIGNED),
    COALESCE(e.amount, 0),
    COALESCE(e.total, 0),
    COALESCE(t.amount, 0),
    COALESCE(t.total, 0)
FROM sessions AS s
LEFT JOIN (
    SELECT session_id, COUNT(*) AS amount, SUM(timestamp) AS total
    FROM events IGNORE INDEX FOR GROUP BY (PRIMARY)
    GROUP BY session_id
) AS e ON e.session_id = s.session_id
LEFT JOIN (
    SELECT
        session_id,
        COUNT(*) AS amount,
        SUM(input_tokens + output_tokens + cache_read + cache_creation) AS total
    FROM token_ledger
    GROUP BY session_id
) AS t ON t.session_id = s.session_id
"""

SELECT_ALL_DELETIONS = """
SELECT d.session_id, d.deleted_at
FROM deleted_sessions AS d
ORDER BY d.session_id
"""

ADD_DELETIONS = """
INSERT INTO deleted_sessions (session_id, deleted_at)
VALUES %(rows)s
ON DUPLICATE KEY UPDATE
    deleted_at = GREATEST(deleted_sessions.deleted_at, VALUES(deleted_at))
"""

# --- Checks ---------------------------------------------------------------------------------------

SELECT_NOW = "SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)"

# Lines of schemas/mysql-shape.txt. Left out are procedures, which only administrators see, and what
# differs between versions of the server: the text of views and rules, the width of integers.
SELECT_SHAPE = """
SELECT CONCAT('table ', t.table_name, ' ', t.engine, ' ', t.table_collation)
FROM information_schema.tables AS t
WHERE t.table_schema = DATABASE()
    AND t.table_name IN (
        'schema_version', 'sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger'
    )
UNION ALL
SELECT CONCAT(
    'column ', c.table_name, '.', c.column_name, ' ',
    REGEXP_REPLACE(c.column_type, '^(int|bigint)[(][0-9]+[)]', '$1'),
    COALESCE(CONCAT(' collate ', c.collation_name), ''),
    IF(c.is_nullable = 'NO', ' not null', ''),
    COALESCE(CONCAT(' default ', c.column_default), ''),
    IF(c.extra = '', '', CONCAT(' ', c.extra))
)
FROM information_schema.columns AS c
WHERE c.table_schema = DATABASE()
    AND c.table_name IN (
        'schema_version', 'sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger'
    )
UNION ALL
SELECT CONCAT('column ', c.table_name, '.', c.column_name)
FROM information_schema.columns AS c
WHERE c.table_schema = DATABASE()
    AND c.table_name IN ('active_sessions', 'session_hierarchy', 'events_text')
UNION ALL
SELECT CONCAT(
    'constraint ', c.table_name, '.', c.constraint_name, ' ', c.constraint_type,
    COALESCE(CONCAT(' to ', r.referenced_table_name, ', on delete ', r.delete_rule), '')
)
FROM information_schema.table_constraints AS c
LEFT JOIN information_schema.referential_constraints AS r
    ON r.constraint_schema = c.constraint_schema AND r.constraint_name = c.constraint_name
WHERE c.table_schema = DATABASE()
    AND c.table_name IN (
        'schema_version', 'sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger'
    )
UNION ALL
SELECT CONCAT(
    'index ', i.table_name, '.', i.index_name,
    IF(MAX(i.non_unique), '', ' unique'),
    IF(MAX(i.is_visible) = 'NO', ' invisible', ''),
    ' (',
    GROUP_CONCAT(
        COALESCE(i.column_name, i.expression), IF(i.collation = 'D', ' desc', '')
        ORDER BY i.seq_in_index SEPARATOR ', '
    ),
    ')'
)
FROM information_schema.statistics AS i
WHERE i.table_schema = DATABASE()
    AND i.table_name IN (
        'schema_version', 'sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger'
    )
GROUP BY i.table_name, i.index_name
"""

# Shows also what comes from roles, which no table does.
SHOW_GRANTS = "SHOW GRANTS"

# By name; each may be refused to an account, which is then said and no fault.
CHECKS = {
    "tls": "SHOW SESSION STATUS WHERE variable_name IN ('Ssl_version', 'Ssl_cipher')",
    "shape": SELECT_SHAPE,
    "privileges": SHOW_GRANTS,
    "settings": """
        SELECT 'innodb_flush_log_at_trx_commit',
            CAST(@@GLOBAL.innodb_flush_log_at_trx_commit AS CHAR)
        UNION ALL
        SELECT 'sync_binlog', IF(@@GLOBAL.log_bin, CAST(@@GLOBAL.sync_binlog AS CHAR), '1')
        UNION ALL
        SELECT 'innodb_doublewrite', CAST(@@GLOBAL.innodb_doublewrite AS CHAR)
        UNION ALL
        SELECT 'time_zone', @@SESSION.time_zone
        UNION ALL
        SELECT 'sql_mode', IF(
            FIND_IN_SET('STRICT_TRANS_TABLES', @@SESSION.sql_mode)
            AND NOT FIND_IN_SET('NO_BACKSLASH_ESCAPES', @@SESSION.sql_mode),
            'strict', @@SESSION.sql_mode
        )
        UNION ALL
        SELECT 'global sql_mode', IF(
            FIND_IN_SET('STRICT_TRANS_TABLES', @@GLOBAL.sql_mode)
            OR FIND_IN_SET('STRICT_ALL_TABLES', @@GLOBAL.sql_mode),
            'strict', CONCAT('not strict: ', @@GLOBAL.sql_mode)
        )
    """,
    "packet": "SELECT @@GLOBAL.max_allowed_packet",
    "size": """
        SELECT CAST(SUM(t.data_length + t.index_length) AS SIGNED), @@GLOBAL.datadir
        FROM information_schema.tables AS t
        WHERE t.table_schema = DATABASE()
    """,
    # Where the last partition ends that is not the one for the rest; nothing for one table.
    "partitions": """
        SELECT MAX(CAST(NULLIF(p.partition_description, 'MAXVALUE') AS SIGNED))
        FROM information_schema.partitions AS p
        WHERE p.table_schema = DATABASE()
            AND p.table_name = 'events'
            AND p.partition_name IS NOT NULL
        HAVING COUNT(*) > 0
    """,
    "locks": "SELECT 1 WHERE FALSE",
    # The tables beside, and whether somebody who may be at work with them has the schema lock.
    "beside": """
        SELECT
            t.table_name,
            IS_USED_LOCK(
                CONCAT('contextuate_schema_', LEFT(SHA2(DATABASE(), 256), 40))
            ) IS NOT NULL
        FROM information_schema.tables AS t
        WHERE t.table_schema = DATABASE()
            AND t.table_name IN ('events_partitioned', 'events_retired')
    """,
    # Needs PROCESS. The names are as in the file system, so of plain databases only.
    "statistics": """
        SELECT SUBSTRING_INDEX(t.name, '/', -1), t.num_rows, t.modified_counter
        FROM information_schema.innodb_tablestats AS t
        WHERE t.name IN (CONCAT(DATABASE(), '/sessions'), CONCAT(DATABASE(), '/events'))
    """,
    # idx_seq is AUTO_INCREMENT's, which does not count as use.
    "unused": """
        SELECT u.index_name, s.stat_value * @@GLOBAL.innodb_page_size, (
            SELECT CAST(g.variable_value AS UNSIGNED)
            FROM performance_schema.global_status AS g
            WHERE g.variable_name = 'Uptime'
        )
        FROM performance_schema.table_io_waits_summary_by_index_usage AS u
        JOIN mysql.innodb_index_stats AS s
            ON s.database_name = u.object_schema
            AND s.table_name = u.object_name
            AND s.index_name = u.index_name
            AND s.stat_name = 'size'
        WHERE u.object_schema = DATABASE()
            AND u.object_name IN ('sessions', 'events')
            AND u.index_name NOT IN ('PRIMARY', 'uq_events_id', 'idx_seq')
            AND u.count_star = 0
    """,
    # What a backup or an archive asks takes long because it reads everything, and is known by its
    # sums, or as mysqldump's.
    "slow": """
        SELECT d.digest_text, d.count_star, d.avg_timer_wait / 1000000000
        FROM performance_schema.events_statements_summary_by_digest AS d
        WHERE d.schema_name = DATABASE()
            AND REGEXP_LIKE(d.digest_text, '^(SELECT|INSERT|UPDATE|DELETE|WITH).*(sessions|events)')
            AND NOT REGEXP_LIKE(d.digest_text, 'SHA2|SQL_NO_CACHE')
        ORDER BY d.avg_timer_wait DESC
        LIMIT 20
    """,
    "prepared": "XA RECOVER",
}
SUPPORTED = (8, 9)
DURABLE = {
    "innodb_flush_log_at_trx_commit": ("1",),
    "sync_binlog": ("1",),
    "innodb_doublewrite": ("ON", "1", "DETECT_AND_RECOVER"),
}
WANTED = {"time_zone": ("+00:00",), "sql_mode": ("strict",), "global sql_mode": ("strict",)}

# --- Backup ---------------------------------------------------------------------------------------

BEGIN_SNAPSHOT = (
    b"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
    b"START TRANSACTION WITH CONSISTENT SNAPSHOT",
)

#: What belongs to us; what else is there is left alone.
OUR_TABLES = [
    "schema_version", "sessions", "events", "event_ids", "deleted_sessions", "token_ledger",
]  # fmt: skip

SELECT_OURS = """
SELECT t.table_name
FROM information_schema.tables AS t
WHERE t.table_schema = DATABASE() AND t.table_type = 'BASE TABLE'
"""

# It tells where AUTO_INCREMENT stands, as information_schema does not before it is refreshed.
SHOW_TABLE = "SHOW CREATE TABLE {table}"

SELECT_CONTENTS = """
SELECT
    VERSION(),
    DATABASE(),
    (SELECT COUNT(*) FROM sessions),
    (SELECT COUNT(*) FROM events),
    (SELECT COUNT(*) FROM token_ledger),
    (SELECT COUNT(*) FROM deleted_sessions),
    (SELECT CAST(SUM({hash}) AS CHAR) FROM deleted_sessions AS d)
"""

SELECT_IDS = "SELECT COUNT(*), CAST(SUM({hash}) AS CHAR) FROM event_ids AS i"

# The first 60 bits of a SHA-256 over all columns. A JSON array quotes what it must, so no two rows
# have the same; a large value in it is a hash already, or it would be written out thrice.
HASH = "CAST(CONV(LEFT(SHA2(CAST(JSON_ARRAY({columns}) AS CHAR), 256), 15), 16, 10) AS UNSIGNED)"

SELECT_SUMS = """
WITH e AS (
    SELECT e.session_id, COUNT(*) AS amount, SUM({event_hash}) AS total
    FROM events AS e
    GROUP BY e.session_id
),
l AS (
    SELECT l.session_id, COUNT(*) AS amount, SUM({message_hash}) AS total
    FROM token_ledger AS l
    GROUP BY l.session_id
)
SELECT
    s.session_id,
    CAST({session_hash} AS CHAR),
    CAST(COALESCE(e.amount, 0) AS CHAR),
    CAST(COALESCE(e.total, 0) AS CHAR),
    CAST(COALESCE(l.amount, 0) AS CHAR),
    CAST(COALESCE(l.total, 0) AS CHAR)
FROM sessions AS s
LEFT JOIN e ON e.session_id = s.session_id
LEFT JOIN l ON l.session_id = s.session_id
ORDER BY s.session_id
""".format(
    event_hash=HASH.format(
        columns="HEX(e.id), e.seq, e.session_id, e.timestamp, e.event_type, e.hook_type, "
        "e.parent_session_id, e.machine_id, e.working_directory, e.tool_name, e.tool_use_id, "
        "SHA2(CAST(e.data AS CHAR), 256), SHA2(e.exact, 256), e.commit_order, "
        "UNIX_TIMESTAMP(e.created_at)"
    ),
    message_hash=HASH.format(
        columns="l.message_id, l.session_id, l.timestamp, l.model, l.input_tokens, "
        "l.output_tokens, l.cache_read, l.cache_creation"
    ),
    session_hash=HASH.format(
        columns="s.session_id, s.machine_id, s.working_directory, s.start_time, s.end_time, "
        "s.status, s.parent_session_id, s.manual_parent_session_id, s.child_session_ids, "
        "s.agent_type, s.model, s.transcript_path, s.is_user_initiated, s.is_pinned, s.hidden, "
        "s.label, s.token_usage_input, s.token_usage_output, s.token_usage_cache_read, "
        "s.token_usage_cache_creation, s.known_from, s.exact, UNIX_TIMESTAMP(s.created_at), "
        "UNIX_TIMESTAMP(s.updated_at)"
    ),
)

HAS_ROWS = "SELECT 1 FROM {table} LIMIT 1"

SELECT_LOCK_TIMEOUT = "SELECT @@lock_wait_timeout"

# In the session that loads: whoever writes now waits, until it has ended, and fails on what is
# there then. Of all functions it is this one whose error quotes a text of ours.
LOCK_EMPTY = """
SET lock_wait_timeout = {timeout};
LOCK TABLES {tables}
"""
RESTORE_GUARD = """
SELECT UUID_TO_BIN('somebody has written into the database meanwhile')
FROM (SELECT 1 AS one) AS given
WHERE {found}
"""

# It never goes back behind what the rows hold.
SET_SEQUENCE = "ALTER TABLE {table} AUTO_INCREMENT = {next_seq}"

CREATE_SCRATCH = "CREATE DATABASE {database} CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin"

# What a program that was killed has stored is undone first, which takes as long as storing it did.
FREE_SCRATCH = b"SET SESSION lock_wait_timeout = 86400"

# --- Maintenance ----------------------------------------------------------------------------------

# By name; each may be refused to an account, which is then said and no fault.
SURVEY = {
    "database": "SELECT DATABASE()",
    "connections": """
        SELECT CAST(g.variable_value AS SIGNED), @@GLOBAL.max_connections
        FROM performance_schema.global_status AS g
        WHERE g.variable_name = 'Threads_connected'
    """,
    # Needs PROCESS. InnoDB tells the time of the machine's zone, whatever the session's is.
    "transactions": """
        SELECT
            CAST(x.trx_mysql_thread_id AS CHAR),
            TIMESTAMPDIFF(
                SECOND, x.trx_started, CONVERT_TZ(UTC_TIMESTAMP(), '+00:00', 'SYSTEM')
            ) AS age
        FROM information_schema.innodb_trx AS x
        HAVING age > 300
        ORDER BY age DESC
    """,
    "sizes": """
        SELECT t.table_name, t.table_rows, t.data_length, t.index_length
        FROM information_schema.tables AS t
        WHERE t.table_schema = DATABASE()
            AND t.table_name IN (
                'sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger'
            )
        ORDER BY t.table_name
    """,
    # What OPTIMIZE TABLE would give back to the disk.
    "garbage": """
        SELECT t.table_name, t.data_free, t.data_length + t.index_length + t.data_free
        FROM information_schema.tables AS t
        WHERE t.table_schema = DATABASE()
            AND t.table_name IN (
                'sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger'
            )
        ORDER BY t.table_name
    """,
    # Left by a test of restoring, or of one that has nobody connected just now.
    "scratch": """
        SELECT s.schema_name
        FROM information_schema.schemata AS s
        WHERE REGEXP_LIKE(s.schema_name, '^contextuate_restore_[0-9a-f]{8}$')
            AND CAST(s.schema_name AS BINARY) NOT IN (
                SELECT CAST(p.db AS BINARY)
                FROM information_schema.processlist AS p
                WHERE p.db IS NOT NULL
            )
        ORDER BY s.schema_name
    """,
    # Where OPTIMIZE TABLE needs room for a second copy.
    "disk": "SELECT @@GLOBAL.hostname, @@GLOBAL.datadir",
    "indexes": """
        SELECT
            IF(u.index_name = 'PRIMARY', CONCAT(u.object_name, '.PRIMARY'), u.index_name),
            s.stat_value * @@GLOBAL.innodb_page_size, u.count_star
        FROM performance_schema.table_io_waits_summary_by_index_usage AS u
        JOIN mysql.innodb_index_stats AS s
            ON s.database_name = u.object_schema
            AND s.table_name = u.object_name
            AND s.index_name = u.index_name
            AND s.stat_name = 'size'
        WHERE u.object_schema = DATABASE()
            AND u.object_name IN (
                'sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger'
            )
        ORDER BY 1
    """,
}

REFRESH_STATISTICS = "ANALYZE TABLE {table}"

# Rebuilds the table, while writers go on but for its last moment; it needs as much disk again.
COMPACT = "OPTIMIZE TABLE {table}"

# --- Accounts -------------------------------------------------------------------------------------

# Names of databases and accounts cannot be parameters: they are put in quoted. Passwords the server
# hides in its logs by itself. Every account may come from everywhere: who may reach the server at
# all is the network's to say.

SELECT_DATABASE = """
SELECT 1
FROM information_schema.schemata AS s
WHERE CAST(s.schema_name AS BINARY) = CAST(%(name)s AS BINARY)
"""

SELECT_ROLE = "SELECT 1 FROM mysql.user AS u WHERE u.user = %(name)s AND u.host = '%'"

# The server takes the account whose host fits best, and looks at the password only then.
SELECT_NARROWER = """
SELECT u.host FROM mysql.user AS u WHERE u.user = %(name)s AND u.host <> '%' ORDER BY u.host
"""

# With it on, _ and % in the database's name of a grant mean themselves.
SELECT_PARTIAL_REVOKES = "SELECT @@GLOBAL.partial_revokes"

CREATE_DATABASE = "CREATE DATABASE {database} CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin"

DROP_DATABASE = "DROP DATABASE {database}"

CREATE_OWNER = "CREATE ROLE {owner}"

CREATE_LOGIN = "CREATE USER {login} IDENTIFIED BY {password}"

SET_PASSWORD = "ALTER USER {login} IDENTIFIED BY {password} RETAIN CURRENT PASSWORD"  # noqa: S105

SELECT_DOUBLE_LOGIN = """
SELECT 1
FROM mysql.user AS u
WHERE u.user = %(name)s
    AND u.host = '%'
    AND JSON_EXTRACT(u.user_attributes, '$.additional_password') IS NOT NULL
"""

DISCARD_OLD_PASSWORD = "ALTER USER {login} DISCARD OLD PASSWORD"  # noqa: S105

GRANT_ACCESS = (
    "GRANT ALL PRIVILEGES ON {pattern}.* TO {owner}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON {pattern}.* TO {application}",
    "GRANT SELECT ON {pattern}.* TO {reader}",
)

SHOW_ACCESS = (
    "SHOW GRANTS FOR {owner}",
    "SHOW GRANTS FOR {application}",
    "SHOW GRANTS FOR {reader}",
)


class MySQLStore(BaseStore):
    """A store in MySQL 8.0.17 or newer; implements PersistenceStore."""

    backend: ClassVar[str] = "mysql"
    _row_limit_setting = "max_allowed_packet"
    _event_bytes = 2400  # 60,000 events of the benchmark took 2,383 besides their values

    def __init__(self, url: str, **options: Any) -> None:
        """Take a URL: mysql://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=...&socket=...

        Parameters: `socket`, `sslmode` (disable, prefer, require, verify-ca, verify-full; without
        it a server elsewhere is verified), `sslrootcert`, `sslcert`, `sslkey`, or for these MySQL's
        own `ssl-mode` (DISABLED ... VERIFY_IDENTITY), `ssl-ca`, `ssl-cert`, `ssl-key`;
        `option-file` (its [client] group may hold user and password), and `use-pure=1` for the
        driver's pure Python implementation.
        """
        super().__init__(**options)
        self._url = url
        self._arguments, self._tls, self._place = parse_url(url)
        # The driver itself goes on in plain text where a server, or a liar, offers no TLS.
        self._encrypted = self._tls["sslmode"] not in ("disable", "prefer")
        self._arguments |= {
            "charset": "utf8mb4",
            "autocommit": True,
            "connection_timeout": max(1, round(self._connect_timeout)),
            "allow_local_infile": False,
        }
        # The server's own limit holds for SELECT only; these end the connection. Without the second
        # a server that reads nothing keeps whoever sends more than the sockets hold for ever.
        self._arguments |= dict.fromkeys(DRIVER_LIMITS, round(self._statement_timeout) + 5)
        self._chunk_bytes = self._row_bytes = 0  # the server's packet limit says
        self._pool: Pool | None = None

    def __repr__(self) -> str:
        return f"<MySQLStore {self._place}>"

    # --- Connections ------------------------------------------------------------------------------

    def _open(self) -> None:
        connection = self._connect()
        try:
            found = schema.require_version(_read_version(connection), self._place)
            self._partitioned = found.layout == "partitioned"
            packet = _execute(connection, SELECT_SERVER)[0][1]
        except BaseException:
            _close_quietly(connection)
            raise
        # Escaping may double a payload, and the limit also holds for MySQL's own form of it.
        self._chunk_bytes = packet // 4
        self._row_bytes = packet if packet >= 4 * payload.MAX_PAYLOAD_BYTES else packet // 4
        # Another would take 40 ms, most of it for TLS.
        self._pool = self._new_pool()
        self._pool.add(connection)

    def _connect(self, *, patient: bool = False) -> Any:
        arguments = dict(self._arguments)
        if patient:
            for name in DRIVER_LIMITS:
                arguments.pop(name)
        tls.check_files(self._tls)
        if ("sslcert" in self._tls) != ("sslkey" in self._tls):
            raise ConfigurationError("sslcert, sslkey: MySQL takes both or neither: name the other")
        try:
            connection: Any = mysql.connector.connect(**arguments)
        except (MySQLError, MySQLInterfaceError) as error:
            if refusal := tls.refusal(_reason(error), encrypted=self._encrypted):
                raise StoreRefused(f"{self._place}: {refusal}") from error
            refused = getattr(error, "errno", None) in REFUSED_LOGINS
            kind = StoreRefused if refused else StoreUnavailable
            raise kind(f"{self._place}: {_reason(error)}") from error
        # The driver resets a statement before each execution, a round trip of its own. It would
        # drop what is open or half sent of the last one: of ours, nothing ever is.
        connection.cmd_stmt_reset = _nothing
        try:
            if self._encrypted:
                _require_tls(_execute(connection, SELECT_CIPHER)[0][1], self._place)
            _require_mysql(_execute(connection, SELECT_SERVER)[0][0], self._place)
            connection.set_charset_collation("utf8mb4", "utf8mb4_0900_bin")
            connection.cmd_query(
                SET_SESSION.format(
                    idle_seconds=max(IDLE_SECONDS, round(self._statement_timeout)),
                    lock_seconds=max(1, round(self._lock_timeout)),
                    statement_ms=base.milliseconds(self._statement_timeout),
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

    def _abandon(self) -> None:  # pragma: no cover  (in a forked child)
        # One reference too many, for ever: were the connections collected, even at the end of the
        # process, they would say goodbye on the parent's sockets.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._pool))
        self._pool = None

    def _living_pool(self) -> Pool:
        """The pool; a forked child makes its own when it first needs one."""
        with self._lock:
            self._check_open()
            if self._pool is None:
                self._pool = self._new_pool()
            return self._pool

    def _new_pool(self) -> Pool:
        return Pool(self._connect, self._pool_size, self._pool_timeout)

    def _discard_dead(self) -> None:
        if self._pool is not None:  # pragma: no branch  (closed meanwhile)
            self._pool.discard_idle()

    @contextlib.contextmanager
    def _connection(self, transaction: bool) -> Iterator[Any]:
        pool = self._living_pool()
        connection = pool.take(self._place)
        broken = True
        try:
            if transaction:
                connection.cmd_query(b"START TRANSACTION")
            yield connection
            if transaction:
                connection.cmd_query(b"COMMIT")
            broken = False
        except Exception as error:
            # Always rolled back: after a lock wait MySQL has undone the last statement only.
            fault = self._fault(error)
            broken = fault in UNUSABLE_AFTER or not _rolled_back(connection)
            raise
        finally:
            pool.give_back(connection, broken=broken)

    def _fault(self, error: Exception) -> Fault | None:
        if not isinstance(error, MySQLError | MySQLInterfaceError):
            return None
        number = getattr(error, "errno", None) or -1
        if number in FAULTS:
            return FAULTS[number]
        # 2000 to 2999 are the client library's own: of them only lost connections are left.
        return Fault.LOST if number < 0 or 2000 <= number < 3000 else Fault.REFUSED

    def _error(self, fault: Fault, error: Exception) -> PersistenceError:
        if fault is Fault.TIMEOUT and self._fault(error) is Fault.LOST:
            # The driver calls it a lost connection that we gave up. So waits a server whose log is
            # on a full disk: it says nothing until somebody makes room.
            reason = f"the server did not answer within {self._statement_timeout:g} s"
            raised = StoreUnavailable(f"{self._place}: {reason}")
            raised.perhaps_one = self._may_mean_one(fault)
            return raised
        return super()._error(fault, error)

    # --- Events -----------------------------------------------------------------------------------

    def _insert_event(self, connection: Any, row: EventRow) -> bool:
        parameters = dict(zip(EVENT_COLUMNS, _event_values(row), strict=True))
        if not self._partitioned:
            return _execute_write(connection, INSERT_EVENT, parameters) == 1
        # Two statements here; an error undoes both, as it does wherever a connection is used.
        connection.cmd_query(b"START TRANSACTION")
        new = _execute_write(connection, INSERT_EVENT_ID, parameters) == 1
        if new:
            _execute_write(connection, INSERT_PARTITIONED_EVENT, parameters)
        connection.cmd_query(b"COMMIT")
        return new

    def _insert_events(self, connection: Any, rows: list[Event], undelete: bool) -> int:
        changed = self._seed(connection, records.seeds_of(rows))
        touched = list({row.event.session_id for row in rows})
        if undelete:
            self._undelete(connection, touched)
        elif deleted := self._select_deletions(connection, touched):
            base.drop_deleted(rows, deleted)
        for child, parent in records.links_of(rows).items():
            link = {"child_id": child, "parent_id": parent}
            changed += _execute_write(connection, LINK_PARENT, link)
        rows = self._drop_known(connection, rows, changed)
        if not rows:
            return 0
        # In the caller's order, mostly that of time: it fills the pages of the indexes that time
        # orders (680 bytes for each event in all of them; 1,040 if session follows session).
        rows.sort(key=lambda row: row.position)
        if self._partitioned:
            return self._insert_partitioned(connection, rows)
        inserted = _send_rows(connection, INSERT_EVENTS, map(_event_literal, self._encoded(rows)))
        if inserted < len(rows):
            self._repeating = True
        return base.accept_inserted(rows, inserted, changed)

    def _insert_partitioned(self, connection: Any, rows: list[Event]) -> int:
        """Insert the ids, then the events with what they were given; raises StartOver."""
        ids = [
            b"(0x%b, %d)" % (row.id.replace("-", "").encode(), row.event.timestamp) for row in rows
        ]
        if _send_rows(connection, INSERT_EVENT_IDS, ids) < len(rows):
            raise base.StartOver(repeats=True)
        asked = {"ids": records.json_list(row.id for row in rows)}
        seqs = dict(_execute(connection, SELECT_SEQS, asked))
        literals = (
            b"%b, %d)" % (_event_literal(row)[:-1], seqs[row.id]) for row in self._encoded(rows)
        )
        return _send_rows(connection, INSERT_PARTITIONED_EVENTS, literals)

    def _select_known_ids(self, connection: Any, rows: list[Event]) -> list[str]:
        statement = (
            SELECT_KNOWN_PARTITIONED_IDS if self._sees_partitions(connection) else SELECT_KNOWN_IDS
        )
        ids = {"ids": records.json_list(row.id for row in rows)}
        return [row[0] for row in _execute(connection, statement, ids)]

    def _sees_partitions(self, connection: Any) -> bool:
        """Whether events is partitioned, asked where not knowing it would end in no error."""
        self._partitioned = self._partitioned or _is_partitioned(connection)
        return self._partitioned

    def _seed(self, connection: Any, seeds: list[Seed]) -> int:
        return _send_rows(connection, SEED_SESSIONS, map(_row_literal, seeds))

    def _select_events(
        self,
        connection: Any,
        filters: Mapping[str, Any],
        newest_first: bool,
        limit: int,
        large_later: bool = False,
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
            (SELECT_EVENTS_SMALL if large_later else SELECT_EVENTS)
            + (f"WHERE {' AND '.join(clauses)} " if clauses else "")
            + f"ORDER BY e.timestamp {direction}, e.seq {direction} LIMIT %(limit)s"
        )
        return _execute(connection, query, parameters)

    def _select_events_of(self, connection: Any, ids: list[str], limit: int) -> list[Any]:
        asked = {"session_ids": records.json_list(ids), "limit": limit}
        return _execute(connection, SELECT_EVENTS_OF, asked)

    def _select_event(self, connection: Any, session_id: str, event_id: str) -> Any:
        statement = SELECT_PARTITIONED_EVENT if self._partitioned else SELECT_EVENT
        rows = _execute(connection, statement, {"id": event_id, "session_id": session_id})
        return rows[0] if rows else None

    def _count_events(self, connection: Any, session_id: str | None) -> list[Any]:
        if session_id is None:
            return _execute(connection, COUNT_EVENTS)
        return _execute(connection, COUNT_SESSION_EVENTS, {"session_id": session_id})

    # --- Sessions ---------------------------------------------------------------------------------

    def _upsert_sessions(self, connection: Any, sessions: list[dict[str, Any]]) -> int:
        return sum(
            # A row that has these values already does not count as written.
            _execute_write(connection, SAVE_SESSION, session) > 0
            or bool(self._select_shown(connection, [session["session_id"]]))
            for session in sessions
        )

    def _select_deletions(self, connection: Any, ids: list[str]) -> dict[str, int]:
        return dict(_execute(connection, SELECT_DELETIONS, {"session_ids": records.json_list(ids)}))

    def _select_shown(self, connection: Any, ids: list[str]) -> list[str]:
        asked = {"session_ids": records.json_list(ids)}
        return [row[0] for row in _execute(connection, SELECT_SHOWN, asked)]

    def _undelete(self, connection: Any, ids: list[str]) -> None:
        _send(connection, UNDELETE_SESSIONS, {"session_ids": ids})

    def _select_sessions(
        self, connection: Any, filters: Mapping[str, Any], limit: int | None
    ) -> list[Any]:
        clauses = ["s.known_from <> 'reference'", *(SESSION_CLAUSES[name] for name in filters)]
        where = f"WHERE {' AND '.join(clauses)}"
        query = SELECT_SESSIONS + (where if limit is None else JOIN_PAGE.format(where=where))
        parameters = {**filters, "limit": limit}
        if "session_ids" in filters:
            parameters["session_ids"] = records.json_list(filters["session_ids"])
        rows = _execute(connection, query, parameters)
        return sorted(rows, key=_session_order, reverse=True)

    def _select_subtree(self, connection: Any, session_id: str) -> list[Any]:
        return _execute(connection, SELECT_SUBTREE, {"session_id": session_id})

    def _update_session(self, connection: Any, session_id: str, values: dict[str, Any]) -> bool:
        clauses = [UPDATE_CLAUSES[name] for name in values]
        if FIRM_COLUMNS & values.keys():
            clauses.append("known_from = 'session'")
        if parent := values.get("parent_session_id"):
            ids = records.json_list([session_id, parent])
            named = {"session_id": session_id, "session_ids": ids}
            _execute_write(connection, REFER_TO_PARENT, named)
        where = "WHERE session_id = %(session_id)s AND known_from <> 'reference'"
        parameters = {**values, "session_id": session_id}
        if clauses:
            update = f"UPDATE sessions SET {', '.join(clauses)} {where}"
            if _execute_write(connection, update, parameters):
                return True
        # A row that has these values already does not count as updated.
        return bool(self._select_shown(connection, [session_id]))

    def _lock_sessions(self, connection: Any, ids: list[str]) -> list[str]:
        # A locking SELECT would tell which they are, but if a deadlock undoes it while it is read,
        # the driver only says "Unread result found". What was there before and is there still,
        # unchanged, was there to be locked.
        asked = {"session_ids": records.json_list(ids)}
        before = _execute(connection, SELECT_CREATIONS, asked)
        if before:
            _send(connection, LOCK_SESSIONS, {"session_ids": [row[0] for row in before]})
        after = _execute(connection, SELECT_CREATIONS, asked)
        return [row[0] for row in before if row in after]

    def _hold_sessions(self, connection: Any, ids: list[str]) -> None:
        _send(connection, LOCK_SESSIONS, {"session_ids": ids})

    def _select_owners(self, connection: Any, ids: list[str]) -> list[str]:
        rows = _execute(connection, SELECT_OWNERS, {"message_ids": records.json_list(ids)})
        return [row[0] for row in rows]

    def _upsert_usage(self, connection: Any, session_id: str, messages: list[MessageUsage]) -> int:
        rows = [
            _row_literal((message_id, session_id, *values))
            for message_id, *values in records.usage_rows(messages)
        ]
        inserted = _send_rows(connection, INSERT_USAGE, rows)
        if inserted == len(rows):
            return inserted
        return inserted + _send_rows(connection, SAVE_USAGE, rows) // 2

    def _set_totals(self, connection: Any, ids: list[str]) -> None:
        _send(connection, SET_TOTALS, {"session_ids": ids})

    def _delete_session(self, connection: Any, session_id: str) -> bool:
        own = {"session_id": session_id}
        family = {row[0] for row in _execute(connection, SELECT_FAMILY, own)}
        if session_id not in family:
            return False
        listing = self._select_listing(connection, [session_id])
        _send(connection, LOCK_SESSIONS, {"session_ids": sorted(family.union(listing))})
        _execute_write(connection, ORPHAN_CHILDREN, own)
        return self._delete_locked(connection, [session_id]) == 1

    def _delete_sessions(self, connection: Any, ids: list[str]) -> int:
        _send(connection, LOCK_SESSIONS, {"session_ids": ids})
        _send(connection, ORPHAN_WARDS, {"session_ids": ids})
        return self._delete_locked(connection, ids)

    def _delete_locked(self, connection: Any, ids: list[str]) -> int:
        # A mere reference leaves no trace: whoever lists its id goes on listing it.
        shown = self._select_shown(connection, ids)
        if shown:
            listed = records.json_list(shown)
            for session_id in self._select_listing(connection, shown):
                parameters = {"session_ids": listed, "session_id": session_id}
                _execute_write(connection, UNLIST_CHILDREN, parameters)
            _send(connection, REMEMBER_DELETIONS, {"session_ids": shown})
        self._delete_many_events(connection, ids)
        self._delete_rows(connection, ids)
        return len(shown)

    def _delete_rows(self, connection: Any, ids: list[str]) -> None:
        # Asked under the locks: whoever partitions events waits for these.
        if self._sees_partitions(connection):
            # No foreign key is there: of a session that comes only now, the row would go without
            # the events that came with it.
            asked = {"session_ids": records.json_list(ids)}
            ids = [row[0] for row in _execute(connection, LOCK_THERE, asked)]
            if not ids:
                return
            _send(connection, DELETE_IDS_OF_SESSIONS, {"session_ids": ids})
            _send(connection, DELETE_EVENTS_OF_SESSIONS, {"session_ids": ids})
        _send(connection, DELETE_SESSIONS, {"session_ids": ids})

    def _has_many_events(self, connection: Any, ids: list[str], many: int) -> bool:
        asked = {"session_ids": records.json_list(ids), "many": many}
        return bool(_execute(connection, HAS_MANY_EVENTS, asked))

    def _select_listing(self, connection: Any, ids: list[str]) -> list[str]:
        rows = _execute(connection, SELECT_LISTING, {"session_ids": records.json_list(ids)})
        return [row[0] for row in rows]

    def _select_session_ids(self, connection: Any) -> list[str]:
        return [row[0] for row in _execute(connection, SELECT_SESSION_IDS)]

    def _forget_deletions(self, connection: Any, age: int) -> None:
        _execute_write(connection, FORGET_DELETIONS, {"age": age})

    # --- Forgetting -------------------------------------------------------------------------------

    def _select_places(self, connection: Any, filters: Mapping[str, Any]) -> list[Any]:
        query = SELECT_PLACES + "".join(f"AND {SESSION_CLAUSES[name]} " for name in filters)
        return _execute(connection, query, filters)

    def _select_below(self, connection: Any, ids: list[str]) -> list[Any]:
        return _execute(connection, SELECT_BELOW, {"session_ids": records.json_list(ids)})

    def _count_belongings(self, connection: Any, ids: list[str]) -> Counter[str]:
        asked = {"session_ids": records.json_list(ids)}
        return Counter(
            {
                name: _execute(connection, statement, asked)[0][0]
                for name, statement in COUNT_BELONGINGS.items()
            }
        )

    def _remember_forgotten(self, connection: Any, ids: list[str]) -> None:
        asked = {"session_ids": records.json_list(ids)}
        _execute_write(connection, REMEMBER_FORGOTTEN, asked)

    def _delete_some_events(self, connection: Any, ids: list[str], limit: int) -> int:
        if not self._sees_partitions(connection):
            return _send(connection, DELETE_SOME_EVENTS.format(limit=limit), {"session_ids": ids})
        asked = {"session_ids": records.json_list(ids), "limit": limit}
        some = [uuid.UUID(row[0]).bytes for row in _execute(connection, SELECT_SOME_IDS, asked)]
        # Two rows of each.
        return _send(connection, DELETE_PARTITIONED_EVENTS, {"ids": some}) // 2 if some else 0

    def _delete_some_copies(self, connection: Any, ids: list[str], limit: int) -> int:
        # Not of what is copied to: partitions have no foreign key.
        if partitions.UNPARTITIONED not in self._select_beside(connection):
            return 0
        statement = DELETE_SOME_UNPARTITIONED_EVENTS.format(limit=limit)
        return _send(connection, statement, {"session_ids": ids})

    def _unname_parents(self, connection: Any, ids: list[str], limit: int) -> int:
        named = {"session_ids": ids}
        old = 0
        if self._has_old_table(connection):
            old = _send(connection, UNNAME_UNPARTITIONED_PARENTS.format(limit=limit), named)
        return max(old, _send(connection, UNNAME_PARENTS.format(limit=limit), named))

    def _lock_kin(self, connection: Any, ids: list[str]) -> None:
        asked = {"session_ids": records.json_list(ids)}
        kin = {row[0] for row in _execute(connection, SELECT_KIN, asked)}
        kin.update(self._select_listing(connection, ids))
        if kin:
            _send(connection, LOCK_SESSIONS, {"session_ids": sorted(kin)})

    def _select_children(self, connection: Any, ids: list[str]) -> list[str]:
        rows = _execute(connection, SELECT_CHILDREN, {"session_ids": records.json_list(ids)})
        return [row[0] for row in rows]

    def _delete_kin(self, connection: Any, ids: list[str]) -> None:
        listed = records.json_list(ids)
        for session_id in self._select_listing(connection, ids):
            parameters = {"session_ids": listed, "session_id": session_id}
            _execute_write(connection, UNLIST_CHILDREN, parameters)
        self._delete_rows(connection, ids)

    def _select_heads(self, connection: Any, filters: Mapping[str, Any], limit: int) -> list[Any]:
        clauses = [EVENT_CLAUSES[name] for name in filters]
        parameters: dict[str, Any] = {**filters, "limit": limit}
        if "after" in filters:
            parameters["after_timestamp"], parameters["after_seq"] = filters["after"]
        query = (
            (SELECT_MACHINE_HEADS if "machine_id" in filters else SELECT_HEADS)
            + (f"WHERE {' AND '.join(clauses)} " if clauses else "")
            + "ORDER BY e.timestamp, e.seq LIMIT %(limit)s"
        )
        return _execute(connection, query, parameters)

    def _delete_events(self, connection: Any, ids: list[str]) -> int:
        listed = {"ids": [uuid.UUID(one).bytes for one in ids]}
        if self._has_old_table(connection):
            _send(connection, DELETE_UNPARTITIONED_EVENTS, listed)
        if self._partitioned:
            return _send(connection, DELETE_PARTITIONED_EVENTS, listed) // 2  # two rows of each
        return _send(connection, DELETE_EVENTS, listed)

    def _select_beside(self, connection: Any) -> set[str]:
        self._sees_partitions(connection)
        return {row[0] for row in _execute(connection, SELECT_BESIDE)}

    def _select_copies(self, connection: Any) -> list[str]:
        return [row[0] for row in _execute(connection, SELECT_COPIES)]

    def _empty_copies(self, connection: Any, ids: list[str]) -> None:
        _send(connection, LOCK_SESSIONS, {"session_ids": ids})
        _send(connection, EMPTY_COPIES, {"session_ids": ids})

    # --- Retention --------------------------------------------------------------------------------

    def _select_states(self, connection: Any, after: str, limit: int) -> list[Any]:
        return _execute(connection, SELECT_STATES, {"after": after, "limit": limit})

    def _select_states_of(self, connection: Any, ids: list[str]) -> list[Any]:
        return _execute(connection, SELECT_STATES_OF, {"session_ids": records.json_list(ids)})

    def _select_links(self, connection: Any, ids: list[str]) -> list[Any]:
        return _execute(connection, SELECT_LINKS, {"session_ids": records.json_list(ids)})

    def _select_weights(self, connection: Any, ids: list[str]) -> list[Any]:
        return _execute(connection, SELECT_WEIGHTS, {"session_ids": records.json_list(ids)})

    def _select_fingerprints(self, connection: Any, ids: list[str], with_events: bool) -> list[Any]:
        query = SELECT_FINGERPRINTS if with_events else SELECT_FINGERPRINTS_BUT_EVENTS
        return _execute(connection, query, {"session_ids": records.json_list(ids)})

    def _select_slice(
        self, connection: Any, what: Sliced, session_id: str, after: Cursor, limit: int
    ) -> list[Any]:
        place = {"after_timestamp": after.timestamp, "after_seq": after.seq}
        asked = {"session_id": session_id, **place, "limit": limit}
        return _execute(connection, SELECT_SLICES[what], asked)

    def _joined(self, hashes: Iterable[Any]) -> str:
        count = joined = 0
        for one in hashes:
            count += 1
            joined ^= one
        # The C extension reads an unsigned number of a prepared statement as a signed one.
        return f"{count} {joined & 2**64 - 1}"

    def _select_usage(self, connection: Any, session_id: str) -> list[Any]:
        return _execute(connection, SELECT_USAGE, {"session_id": session_id})

    def _select_size(self, connection: Any) -> int:
        return int(_execute(connection, SELECT_SIZE)[0][0])

    # --- Server -----------------------------------------------------------------------------------

    def _health(self, connection: Any) -> Health:
        start = time.perf_counter()
        version = _read_version(connection)
        latency = time.perf_counter() - start
        found = schema.require_version(version, self._place)
        self._partitioned = found.layout == "partitioned"
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

    def _examine(self) -> doctor.Seen:
        connection = self._connect()
        try:
            start = time.perf_counter()
            server_now = self._select_now(connection)
            latency = time.perf_counter() - start
            version = _read_version(connection)
            pure = isinstance(connection, mysql.connector.connection.MySQLConnection)
            return doctor.Seen(
                place=self._place,
                local="unix_socket" in self._arguments or is_local(self._arguments["host"]),
                tls=self._tls,
                server=_execute(connection, SELECT_SERVER)[0][0],
                supported=SUPPORTED,
                driver=f"mysql-connector-python {mysql.connector.__version__}",
                implementation="python" if pure else "c",
                pool_size=self._pool_size,
                latency_ms=latency * 1000,
                clock_ms=server_now - (time.time() - latency / 2) * 1000,
                version=version,
                shape=schema.read_shape(self.backend, schema.layout_of(version)),
                durable=DURABLE,
                wanted=WANTED,
                answers={name: _answer(connection, query) for name, query in CHECKS.items()},
            )
        finally:
            _close_quietly(connection)

    def _select_now(self, connection: Any) -> int:
        now: int = _execute(connection, SELECT_NOW)[0][0]
        return now

    def _select_tallies(self, connection: Any) -> list[Any]:
        return _execute(connection, SELECT_TALLIES)

    def _select_all_deletions(self, connection: Any) -> list[Any]:
        return _execute(connection, SELECT_ALL_DELETIONS)

    def _add_deletions(self, connection: Any, deletions: list[tuple[str, int]]) -> None:
        _send_rows(connection, ADD_DELETIONS, map(_row_literal, deletions))

    def _run_statements(self, connection: Any, statements: list[str]) -> None:
        for statement in statements:
            connection.cmd_query(statement.encode())

    @contextlib.contextmanager
    def _schema_session(self, timeout: float) -> Iterator[MySQLSchema]:
        connection = self._connect(patient=True)
        try:
            deadline = time.monotonic() + timeout
            # The lock is the server's, so its name carries the database's; 64 characters at most.
            named = {"database": self._arguments["database"]}
            while _execute(connection, LOCK_SCHEMA, named)[0][0] != 1:
                if time.monotonic() > deadline:
                    raise StoreUnavailable(f"{self._place}: another process changes the schema")
                time.sleep(0.05)
            # A migration may take hours; only its waiting for locks stays bounded, since an ALTER
            # that waits stops every later writer.
            connection.cmd_query(ALLOW_LONG_STATEMENTS)
            yield MySQLSchema(connection, self._place)
        except (MySQLError, MySQLInterfaceError) as error:
            raise self._error(self._fault(error) or Fault.REFUSED, error) from error
        finally:
            _close_quietly(connection)

    @contextlib.contextmanager
    def _partition_session(self, timeout: float) -> Iterator[MySQLPartitions]:
        with self._schema_session(timeout) as session:
            connection = session.connection
            found = schema.require_version(_read_version(connection), self._place)
            self._partitioned = found.layout == "partitioned"
            try:
                yield MySQLPartitions(connection, self)
            except (MySQLError, MySQLInterfaceError) as error:
                if getattr(error, "errno", None) not in DENIED:
                    raise
                reason = f"partitions are made by the owner of the database: {_reason(error)}"
                raise StoreRefused(f"{self._place}: {reason}") from error

    @contextlib.contextmanager
    def _administration(self, names: Names) -> Iterator[MySQLAdministrator]:
        def opened() -> MySQLStore:
            path = "/" + quote(names.database, safe="")
            return MySQLStore(urlunsplit(urlsplit(self._url)._replace(path=path)))

        # A big database is dropped on a busy disk in more than a statement's time.
        connection = self._connect(patient=True)
        try:
            connection.cmd_query(ALLOW_LONG_STATEMENTS)
            yield MySQLAdministrator(connection, names, self._place, opened)
        except (MySQLError, MySQLInterfaceError) as error:
            raise self._error(self._fault(error) or Fault.REFUSED, error) from error
        finally:
            _close_quietly(connection)

    # --- Maintenance ------------------------------------------------------------------------------

    def _survey(self) -> dict[str, doctor.Rows | None]:
        connection = self._connect()
        try:
            return {name: _answer(connection, query) for name, query in SURVEY.items()}
        finally:
            _close_quietly(connection)

    def _refresh_statistics(self, table: str) -> None:
        self._tend(REFRESH_STATISTICS, table)

    def _compact(self, table: str) -> None:
        self._tend(COMPACT, table)

    def _tend(self, statement: str, table: str) -> None:
        connection = self._connect(patient=True)
        try:
            connection.cmd_query(ALLOW_LONG_STATEMENTS)
            # What goes wrong comes as rows, among others that only tell how it is done.
            for row in _unprepared(connection, statement.format(table=_identifier(table))):
                if row[2].lower() == "error":
                    refused = StoreRefused(f"{self._place}: table {table}: {row[3]}")
                    refused.to_all = True  # an account that may not is refused before
                    raise refused
        finally:
            _close_quietly(connection)

    # --- Backup -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[MySQLSnapshot]:
        connection = self._connect(patient=True)
        try:
            connection.cmd_query(ALLOW_LONG_STATEMENTS)
            for statement in BEGIN_SNAPSHOT:
                connection.cmd_query(statement)
            yield MySQLSnapshot(connection, self._place)
        except (MySQLError, MySQLInterfaceError) as error:
            raise self._error(self._fault(error) or Fault.REFUSED, error) from error
        finally:
            _close_quietly(connection)

    def _dumper(self, server: str, made_by: str) -> Dumper:  # noqa: ARG002  (any will do)
        return MySQLDumper(self._arguments, self._tls)

    @contextlib.contextmanager
    def _scratch(self, name: str) -> Iterator[BaseStore]:
        connection = self._connect(patient=True)
        try:
            connection.cmd_query(ALLOW_LONG_STATEMENTS)
            connection.cmd_query(CREATE_SCRATCH.format(database=_identifier(name)).encode())
            try:
                yield MySQLStore(urlunsplit(urlsplit(self._url)._replace(path=f"/{quote(name)}")))
            finally:
                connection.cmd_query(FREE_SCRATCH)
                connection.cmd_query(DROP_DATABASE.format(database=_identifier(name)).encode())
        except (MySQLError, MySQLInterfaceError) as error:
            raise self._error(self._fault(error) or Fault.REFUSED, error) from error
        finally:
            _close_quietly(connection)


class MySQLSnapshot:
    """A transaction that sees one moment; implements Snapshot."""

    name: str | None = None

    def __init__(self, connection: Any, place: str) -> None:
        self._connection = connection
        self._place = place

    def contents(self) -> Contents:
        found = schema.require_version(_read_version(self._connection), self._place)
        there = {row[0] for row in _execute(self._connection, SELECT_OURS)}
        query = SELECT_CONTENTS.format(hash=HASH.format(columns="d.session_id, d.deleted_at"))
        row = _execute(self._connection, query)[0]
        partitioned = "event_ids" in there
        sequence = "event_ids" if partitioned else "events"
        next_seq = _next_seq(self._connection, sequence)
        ids: tuple[Any, ...] = (0, 0)
        if partitioned:
            query = SELECT_IDS.format(hash=HASH.format(columns="HEX(i.id), i.seq, i.timestamp"))
            ids = _execute(self._connection, query)[0]
        return Contents(
            server=row[0],
            database=row[1],
            version=found.version,
            layout=found.layout,
            namespace=row[1],
            tables=tuple(name for name in OUR_TABLES if name in there),
            views=(),
            sequence=sequence,
            next_seq=next_seq,
            sessions=row[2],
            events=row[3],
            messages=row[4],
            deletions=row[5],
            deletions_sum=int(row[6] or 0),
            ids=ids[0],
            ids_sum=int(ids[1] or 0),
        )

    def sums(self) -> Iterator[Sums]:
        # Unbuffered, and no values of ours in the text: nothing for the driver to rewrite.
        cursor = self._connection.cursor(buffered=False)
        try:
            cursor.execute(SELECT_SUMS)
            for row in cursor:
                session_id, *numbers = (
                    bytes(value).decode() if isinstance(value, bytes | bytearray) else value
                    for value in row
                )
                yield Sums(session_id, *map(int, numbers))
        finally:
            cursor.close()


class MySQLSchema:
    """The catalogue of a database, under the schema lock; implements SchemaSession."""

    backend = MySQLStore.backend

    def __init__(self, connection: Any, place: str) -> None:
        self.connection = connection
        self.place = place

    def read_version(self) -> schema.SchemaVersion | None:
        return _read_version(self.connection)

    def read_checksums(self) -> dict[int, str | None]:
        return dict(_execute(self.connection, SELECT_CHECKSUMS))

    def read_columns(self) -> dict[str, set[str]]:
        return base.by_table(_execute(self.connection, SELECT_COLUMNS))

    def holds(self, query: str) -> bool:
        return bool(_execute(self.connection, query))

    def run(self, statement: str) -> None:
        self.connection.cmd_query(statement.encode())

    def has_rows(self, table: str) -> bool:
        return bool(_execute(self.connection, HAS_ROWS.format(table=_identifier(table))))

    def around(self, contents: Contents) -> tuple[list[str], list[str]]:
        filled = [name for name in contents.tables if name != "schema_version"]
        words = {
            "timeout": _execute(self.connection, SELECT_LOCK_TIMEOUT)[0][0],
            "tables": ", ".join(f"{name} WRITE" for name in filled),
            "found": " OR ".join(f"EXISTS (SELECT 1 FROM {name})" for name in filled),
            "table": contents.sequence,
            "next_seq": contents.next_seq,
        }
        before = [one.format(**words) for one in (LOCK_EMPTY, RESTORE_GUARD)]
        return before, [SET_SEQUENCE.format(**words)]

    def record(self, version: int, name: str, checksum: str | None) -> None:
        row = {"version": version, "name": name, "checksum": checksum}
        _execute_write(self.connection, RECORD_VERSION, row)

    def transaction(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class MySQLPartitions:
    """The partitions of events, under the schema lock; implements PartitionSession."""

    def __init__(self, connection: Any, store: MySQLStore) -> None:
        self.place = store._place  # noqa: SLF001  (a store's other half)
        self.longest_wait = 0.0
        self._connection = connection
        self._store = store
        # What stops writers while it waits must not wait for long.
        connection.cmd_query(b"SET SESSION lock_wait_timeout = 1")
        connection.cmd_query(READ_FRESH_STATISTICS)
        self._left = 0  # what was copied last of all
        # At once, since it is refused to every account that should not do this either.
        connection.cmd_query(CREATE_COPIED_SESSIONS)

    def passing(self, error: Exception) -> bool:
        return self._store._fault(error) in PASSING_FAULTS  # noqa: SLF001

    def is_partitioned(self) -> bool:
        return _is_partitioned(self._connection)

    def read_partitions(self, *, aside: bool = False) -> list[Partition]:
        table = {"table": "events_partitioned" if aside else "events"}
        found: list[Partition] = []
        start: int | None = None
        for name, below, rows, size in _execute(self._connection, SELECT_PARTITIONS, table):
            text = below.decode() if isinstance(below, bytes | bytearray) else str(below)
            end = int(text) if text.isdigit() else None
            found.append(Partition(name, start, end, rows, size))
            start = end
        return found

    def first_event(self) -> int | None:
        first: int | None = _execute(self._connection, SELECT_FIRST_EVENT)[0][0]
        return first

    def attached(self) -> list[str]:
        shape = [line for (line,) in _execute(self._connection, SELECT_SHAPE)]
        added = schema.additions(MySQLStore.backend, "events", shape)
        return sorted(added.union(told for (told,) in _execute(self._connection, SELECT_ATTACHED)))

    # --- Converting -------------------------------------------------------------------------------

    def prepare(self, spans: Sequence[Span]) -> None:
        script = schema.schema_file("mysql-partitioned.sql").read_text(encoding="utf-8")
        for statement in schema.split_script(script, MySQLStore.backend):
            self._connection.cmd_query(statement.encode())
        if len(self.read_partitions(aside=True)) == 1:
            older = Span(0, spans[0].start)
            self._add("events_partitioned", {"p_older": older, **_named(spans)})
        _execute_write(self._connection, NOTE_SESSIONS_BEFORE, {})

    def _add(self, table: str, partitions: Mapping[str, Span]) -> None:
        listed = ", ".join(
            f"PARTITION {name} VALUES LESS THAN ({span.end})" for name, span in partitions.items()
        )
        statement = ADD_PARTITIONS.format(table=table, partitions=listed)
        self._connection.cmd_query(statement.encode())

    def copied(self) -> int:
        return int(_execute(self._connection, SELECT_COPIED)[0][0])

    def watermark(self) -> int:
        # The lock waits for everybody who is storing: what is unseen afterwards has a higher seq.
        with self._locked(b"LOCK TABLES events AS e READ"):
            return int(_execute(self._connection, SELECT_LAST_SEQ)[0][0])

    def copy(self, after: int, upto: int, rows: int) -> tuple[int, int]:
        bounds = {"after": after, "upto": upto, "rows": rows}
        [(copied, last)] = _execute(self._connection, SELECT_CHUNK, bounds)
        if not copied:
            return 0, upto
        _execute_write(self._connection, NOTE_SESSIONS, {"after": after, "upto": last})
        with self._transaction():
            self._copy_chunk(after, last)
        return copied, last

    def _copy_chunk(self, after: int, upto: int) -> int:
        chunk = {"after": after, "upto": upto}
        copied = _execute_write(self._connection, COPY_CHUNK, chunk)
        _execute_write(self._connection, COPY_IDS, chunk)
        return copied

    def refresh(self) -> None:
        _unprepared(self._connection, "ANALYZE TABLE events_partitioned, event_ids_new")

    def compare(self, upto: int) -> list[tuple[str, int, int]]:
        return _execute(self._connection, COMPARE_COPIES, {"upto": upto})

    def purge(self, ids: Sequence[str]) -> None:
        with self._transaction():
            self._purge(ids)

    def _purge(self, ids: Sequence[str]) -> None:
        asked = {"session_ids": records.json_list(ids)}
        for session_id, timestamp, seq in _execute(self._connection, SELECT_GONE_EVENTS, asked):
            _execute_write(self._connection, PURGE_ID, {"seq": seq})
            gone = {"session_id": session_id, "timestamp": timestamp, "seq": seq}
            _execute_write(self._connection, PURGE_EVENT, gone)

    def switch(self, after: int) -> int:
        # Not START TRANSACTION, which would unlock the tables.
        self._connection.cmd_query(b"SET autocommit = 0")
        try:
            with self._locked(LOCK_FOR_SWITCH):
                # What is copied stays if the swap has to wait for who reads sessions, which are
                # not locked against that: the next try goes on behind it.
                after = max(after, self.copied())
                last = int(_execute(self._connection, SELECT_LAST_SEQ)[0][0])
                _execute_write(self._connection, NOTE_SESSIONS, {"after": after, "upto": last})
                copied = self._copy_chunk(after, last)
                gone = [row[0] for row in _execute(self._connection, SELECT_GONE_SESSIONS)]
                if gone:
                    self._purge(gone)
                self._connection.cmd_query(b"COMMIT")
                self._left += copied
                go_on = GO_ON_COUNTING.format(next_seq=_next_seq(self._connection, "events"))
                self._connection.cmd_query(go_on.encode())
                self._connection.cmd_query(SWAP_TABLES)
                self._connection.cmd_query(RECORD_LAYOUT)
                self._connection.cmd_query(b"COMMIT")
        finally:
            self._connection.cmd_query(b"SET autocommit = 1")
        return self._left

    def record_layout(self) -> None:
        self._connection.cmd_query(RECORD_LAYOUT)

    # --- Adding and dropping ----------------------------------------------------------------------

    def tidy(self) -> None:
        """Nothing to do: no partition is replaced by another."""

    def add(self, spans: Sequence[Span]) -> None:
        with self._waiting():
            self._add("events", _named(spans))

    def sessions_of(self, partition: str | None) -> list[str]:
        table = f"events PARTITION ({partition})" if partition else "events_retired"
        query = SELECT_SESSIONS_OF.format(table=table)
        return [row[0] for row in _execute(self._connection, query)]

    def prunable(self, due: Due) -> dict[str, str | None]:
        return self._store._prunable(self._connection, due)  # noqa: SLF001

    def newest_retired(self) -> int | None:
        if not self._has("events_retired"):
            return None
        [(newest,)] = _execute(self._connection, SELECT_NEWEST_RETIRED)
        return int(newest)

    def is_needed(self, partition: Partition) -> bool:
        return partition.start is None

    def retire(self, partition: Partition) -> None:
        [(_, events)] = _unprepared(self._connection, SHOW_EVENTS)
        retired = events.replace("TABLE `events`", "TABLE IF NOT EXISTS `events_retired`", 1)
        self._connection.cmd_query(NOT_OF_RETIRED.sub("", retired).encode())
        # Again if the partition could not be dropped then: what was taken out must not go back.
        if self._is_empty("events_retired"):
            try:
                with self._waiting():
                    exchange = RETIRE_PARTITION.format(partition=partition.name)
                    self._connection.cmd_query(exchange.encode())
            except Exception:
                # Or all pruning would be refused on account of a table that holds nothing.
                if self._is_empty("events_retired"):
                    self.drop_retired()
                raise
        if not self.is_needed(partition):
            with self._locked(b"LOCK TABLES events WRITE"):
                # Or somebody has stored an event of its time in between: it stays.
                if self._is_empty(f"events PARTITION ({partition.name})"):
                    drop = f"ALTER TABLE events DROP PARTITION {partition.name}"
                    self._connection.cmd_query(drop.encode())

    def free_retired(self) -> None:
        """Nothing to do: partitions have no foreign keys."""

    def settle(self, ids: Sequence[str], due: Due) -> int:
        given = list(ids)
        with self._transaction():
            store = self._store
            deleted = store._delete_prunable(self._connection, given, due)  # noqa: SLF001
            _send(self._connection, GIVE_BACK, {"session_ids": given})
            _send(self._connection, DELETE_GIVEN_BACK, {"session_ids": given})
        return deleted

    def forget_ids(self, after: Any, rows: int) -> Any:
        timestamp, seq = after or (0, 0)
        place = {"timestamp": timestamp, "seq": seq, "rows": rows}
        some = _execute(self._connection, SELECT_RETIRED, place)
        if not some:
            return None
        _send(self._connection, FORGET_IDS, {"seqs": [row[1] for row in some]})
        return some[-1]

    def drop_retired(self) -> None:
        self._connection.cmd_query(b"DROP TABLE events_retired")

    def unpartitioned_only(self) -> int | None:
        if not self._has("events_unpartitioned"):
            return None
        return int(_execute(self._connection, SELECT_UNPARTITIONED_ONLY)[0][0])

    def drop_unpartitioned(self) -> None:
        with self._waiting():
            self._connection.cmd_query(b"DROP TABLE events_unpartitioned")

    def _is_empty(self, table: str) -> bool:
        return bool(_execute(self._connection, IS_EMPTY.format(table=table))[0][0])

    def _has(self, table: str) -> bool:
        return bool(_execute(self._connection, SELECT_TABLE, {"table": table}))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.cmd_query(b"START TRANSACTION")
        try:
            yield
            self._connection.cmd_query(b"COMMIT")
        except BaseException:
            _rolled_back(self._connection)
            raise

    @contextlib.contextmanager
    def _locked(self, statement: bytes) -> Iterator[None]:
        """Locks that stop writers; how long, at most, is remembered."""
        with self._waiting():
            try:
                self._connection.cmd_query(statement)
                yield
            finally:
                _rolled_back(self._connection)
                with contextlib.suppress(Exception):
                    self._connection.cmd_query(b"UNLOCK TABLES")

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        asked = time.monotonic()
        try:
            yield
        finally:
            self.longest_wait = max(self.longest_wait, time.monotonic() - asked)


def _named(spans: Iterable[Span]) -> dict[str, Span]:
    return {f"p_{span.suffix}": span for span in spans}


class MySQLAdministrator:
    """The roles and the database of some names; implements Administrator."""

    def __init__(
        self, connection: Any, names: Names, place: str, opened: Callable[[], MySQLStore]
    ) -> None:
        self.names = names
        self.place = place
        self._connection = connection
        self._opened = opened  # a store of the same server
        pattern = names.database
        if not _execute(connection, SELECT_PARTIAL_REVOKES)[0][0]:
            pattern = re.sub("([_%])", r"\\\1", pattern)
        self._identifiers = {
            "database": _identifier(names.database),
            "pattern": _identifier(pattern),
            "owner": _account(names.owner),
            "application": _account(names.application),
            "reader": _account(names.reader),
        }

    def check_names(self) -> None:
        self.names.check(longest_database=64, longest_account=32)
        if "\\" in self.names.database:
            raise ConfigurationError("the database's name: no backslash can stand in a grant")
        for option, name in (("--user", self.names.application), ("--reader", self.names.reader)):
            for (host,) in _execute(self._connection, SELECT_NARROWER, {"name": name}):
                account = f"{literal(name).decode()}@{literal(host).decode()}"
                raise ConfigurationError(
                    f"{account}: is there, and who comes from that host would log in as that one; "
                    f"name another with {option}, or DROP USER {account}"
                )

    def has_database(self) -> bool:
        return self._found(SELECT_DATABASE, self.names.database)

    def check_owner(self) -> None:
        """Nothing to check: MySQL's databases belong to nobody."""

    def create_database(self) -> None:
        self._run(CREATE_DATABASE)

    def drop_database(self) -> None:
        self._run(DROP_DATABASE)

    def has_role(self, name: str) -> bool:
        return self._found(SELECT_ROLE, name)

    def create_owner(self) -> None:
        self._run(CREATE_OWNER)

    def create_login(self, name: str, password: str) -> None:
        self._run(CREATE_LOGIN, login=_account(name), password=literal(password).decode())

    def login_of(self, name: str) -> str:
        return name

    def next_login_of(self, name: str) -> str:
        return name

    def rotate(self, name: str, password: str) -> None:
        self._run(SET_PASSWORD, login=_account(name), password=literal(password).decode())

    def has_old(self, name: str) -> bool:
        return self._found(SELECT_DOUBLE_LOGIN, name)

    def discard_old(self, name: str) -> bool:
        if not self.has_old(name):
            return False
        self._run(DISCARD_OLD_PASSWORD, login=_account(name))
        return True

    def grant(self) -> bool:
        before = self._access()
        for statement in GRANT_ACCESS:
            self._run(statement)
        return before != self._access()

    def owner_store(self) -> MySQLStore:
        # MySQL's tables belong to nobody: the administrator has every privilege that the owner has.
        return self._opened()

    def _access(self) -> list[Any]:
        shown = [statement.format(**self._identifiers) for statement in SHOW_ACCESS]
        return [_unprepared(self._connection, statement) for statement in shown]

    def _found(self, query: str, name: str) -> bool:
        return bool(_execute(self._connection, query, {"name": name}))

    def _run(self, statement: str, **more: str) -> None:
        self._connection.cmd_query(statement.format(**self._identifiers, **more).encode())


def _session_order(row: tuple[Any, ...]) -> tuple[int, str]:
    """The start of a row of SELECT_SESSIONS, and its id, in whose collation bytes count."""
    return row[3], row[0]


def _identifier(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _account(name: str) -> str:
    return f"{literal(name).decode()}@'%'"


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
    values = tuple(map(_plain, (given[name] for name in names)))
    try:
        cursor.execute(text, values)
    except BaseException:
        # Or the server would keep its statement as long as the connection lives.
        with contextlib.suppress(Exception):
            cursor.close()
        raise
    cursors[text] = cursor
    return cursor


def _plain(value: Any) -> str | bytes | int | None:
    """The value as both implementations of the driver take it.

    Others, the C extension answers with a crash of the process: better an error more than that.
    """
    if isinstance(value, bool | int):
        if -(2**63) <= value < 2**63:
            return int(value)
    elif value is None or isinstance(value, bytes):
        return value
    elif isinstance(value, str):
        value.encode()
        return str.__str__(value)  # of an Enum its value, not its name
    raise InvalidRecord(f"parameter: {type(value).__name__} out of range or of no SQL type")


_MAX_PREPARED = 100


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


def _execute(
    connection: Any, statement: str, parameters: Mapping[str, Any] | None = None
) -> list[Any]:
    cursor = _prepared(connection, statement, parameters)
    try:
        rows = list(cursor.fetchall())
    except (MySQLError, MySQLInterfaceError):
        # Refused, or given up, only while its rows were read. The C extension has freed them, but
        # does not note it: every statement to come would end with "Unread result found".
        connection._unread_result = False  # noqa: SLF001
        raise
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


def _unprepared(connection: Any, statement: str) -> list[tuple[str, ...]]:
    """The rows, as texts, of a statement that cannot be prepared, or whose % would be misread."""
    connection.cmd_query(statement.encode())
    return [
        tuple(
            bytes(value).decode(errors="replace")
            if isinstance(value, bytes | bytearray)
            else str(value)
            for value in row
        )
        for row in connection.get_rows()[0]
    ]


def _execute_write(connection: Any, statement: str, parameters: Mapping[str, Any]) -> int:
    return int(_prepared(connection, statement, parameters).rowcount)


def _send(connection: Any, statement: str, parameters: Mapping[str, Any]) -> int:
    """Execute a statement as bytes, its lists as the items of an IN; how many rows it affected."""
    text, names = _positional(statement)
    pieces: list[bytes] = []
    for part, name in zip(text.split("?"), [*names, None], strict=True):
        pieces.append(part.encode())
        if name is not None:
            pieces.append(b", ".join(map(literal, parameters[name])))
    return _affected(connection, b"".join(pieces))


def _send_rows(connection: Any, statement: str, rows: Iterable[bytes]) -> int:
    """Insert rows in statements of some size; how many rows these affected.

    While the server works on one statement, the next is made: alone, each would wait for the other
    (14,000 events a second instead of 19,000).
    """
    head, tail = statement.encode().split(b"%(rows)s")
    statements = (head + values + tail for values in _values_lists(rows))
    first, second = next(statements), next(statements, None)
    if second is None:
        return _affected(connection, first)
    sending = _Sending(connection, first)
    affected = 0
    try:
        for following in chain([second], statements):
            affected += sending.result()
            sending = _Sending(connection, following)
        return affected + sending.result()
    finally:
        sending.wait()


class _Sending:
    """A statement that is executed in a thread of its own."""

    def __init__(self, connection: Any, statement: bytes) -> None:
        self._connection = connection
        self._statement = statement
        self._affected = 0
        self._error: BaseException | None = None
        # Not Thread.join(): interrupted, Python 3.11's takes a running thread for one that is over.
        self._over = threading.Event()
        try:
            threading.Thread(target=self._execute, daemon=True).start()
        except RuntimeError:  # no thread can be had, at the end of the process for one
            self._execute()

    def _execute(self) -> None:
        try:
            self._affected = _affected(self._connection, self._statement)
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()

    def wait(self) -> None:
        """Wait for the end, also through Ctrl-C: to close a connection in use ends the process."""
        interrupted: BaseException | None = None
        while not self._over.is_set():
            try:
                self._over.wait()
            except KeyboardInterrupt as interrupt:
                interrupted = interrupt
        if interrupted is not None:
            raise interrupted

    def result(self) -> int:
        """How many rows it affected; raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._affected


def _affected(connection: Any, statement: bytes) -> int:
    return int(connection.cmd_query(statement)["affected_rows"])


def _values_lists(rows: Iterable[bytes]) -> Iterator[bytes]:
    texts: list[bytes] = []
    size, limit = 0, _FIRST_STATEMENT_BYTES
    for text in rows:
        if texts and size + len(text) > limit:
            yield b",\n".join(texts)
            texts, size, limit = [], 0, _STATEMENT_BYTES
        texts.append(text)
        size += len(text)
    yield b",\n".join(texts)


# The server has nothing to do until the first comes: a few events. Then some fifty of the usual
# ones. A batch of 1,000 takes 11 % less time so than in statements of 256 kB.
_FIRST_STATEMENT_BYTES = 2**14
_STATEMENT_BYTES = 2**17


#: The columns of an event, as the two INSERTs name them.
EVENT_COLUMNS = (
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


def literal(value: str | bytes | int | None) -> bytes:
    """The value as a literal of a session in utf8mb4 whose sql_mode leaves backslashes alone.

    Texts hold no lone surrogates: what comes here was validated. Inside quotes only the quote and
    the backslash mean something to the server, NUL and control characters do not.
    """
    if value is None:
        return b"NULL"
    if isinstance(value, int):
        return b"%d" % value
    prefix, raw = (b"'", value.encode()) if isinstance(value, str) else (b"_binary'", value)
    return prefix + raw.replace(b"\\", b"\\\\").replace(b"'", b"\\'") + b"'"


def _row_literal(values: Iterable[str | bytes | int | None]) -> bytes:
    return b"(" + b", ".join(map(literal, values)) + b")"


# Ids, types and tools come again and again; they have at most 255 characters.
_short_literal = lru_cache(maxsize=4096)(literal)


def _event_literal(row: EventRow) -> bytes:
    """The row of an event, of EVENT_COLUMNS; what most of the client's time goes into."""
    event = row.event
    return b"(0x%b, %b, %d, %b, %b, %b, %b, %b, %b, %b, '%b', %b)" % (
        row.id.replace("-", "").encode(),
        _short_literal(event.session_id),
        event.timestamp,
        _short_literal(event.event_type),
        _short_literal(event.hook_type),
        _short_literal(event.parent_session_id),
        _short_literal(event.machine_id),
        literal(row.working_directory),
        _short_literal(row.tool_name),
        literal(row.tool_use_id),
        row.data.replace(b"\\", b"\\\\").replace(b"'", b"\\'"),
        literal(row.exact),
    )


def _event_values(row: EventRow) -> tuple[str | bytes | int | None, ...]:
    """The values of EVENT_COLUMNS."""
    event = row.event
    return (
        row.id,
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
    _RETRY_SECONDS = 0.1

    def __init__(self, connect: Callable[[], Any], size: int, timeout: float) -> None:
        self._connect = connect
        self._timeout = timeout
        self._slots = threading.BoundedSemaphore(size)
        self._idle: deque[tuple[float, Any]] = deque()
        self._closed = False
        self._lock = threading.Lock()
        self.in_use = 0

    def add(self, connection: Any) -> None:
        """Keep a connection that was made elsewhere, and is free."""
        self._idle.append((time.monotonic(), connection))

    def take(self, place: str) -> Any:
        """A connection that lives; raises StoreUnavailable if there is none in time."""
        deadline = time.monotonic() + self._timeout
        if not self._slots.acquire(timeout=self._timeout):
            raise StoreUnavailable(f"{place}: no connection was free for {self._timeout:g} s")
        try:
            connection = self._living() or self._connected(deadline)
        except BaseException:
            self._slots.release()
            raise
        with self._lock:
            self.in_use += 1
        return connection

    def _living(self) -> Any:
        try:
            since, connection = self._idle.pop()  # the last one used is the warmest
        except IndexError:
            return None
        if time.monotonic() - since < self._TRUSTED_SECONDS or connection.is_connected():
            return connection
        _close_quietly(connection)
        self.discard_idle()  # the others have waited longer, for the same server
        return None

    def _connected(self, deadline: float) -> Any:
        """A new connection; a server that restarts is waited for."""
        while True:
            try:
                return self._connect()
            except StoreUnavailable:
                if time.monotonic() + self._RETRY_SECONDS > deadline:
                    raise
                time.sleep(self._RETRY_SECONDS)

    def give_back(self, connection: Any, *, broken: bool = False) -> None:
        try:
            if broken or self._closed:
                _close_quietly(connection)
            else:
                self._idle.append((time.monotonic(), connection))
        finally:
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
    except Exception:  # the C extension has errors of its own
        return False
    return True


def _close_quietly(connection: Any) -> None:
    # A connection that is broken already says so again when it is closed, in many ways.
    with contextlib.suppress(Exception):
        connection.close()


def _require_tls(cipher: str, place: str) -> None:
    if not cipher:
        raise StoreRefused(f"{place}: {tls.NOT_OFFERED}")


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
        number = getattr(error, "errno", None)
        if number == _NO_SUCH_TABLE:
            return None
        if number == _NO_SUCH_COLUMN:
            reason = "schema_version is a table of another program: use an empty database"
            raise SchemaError(reason) from None
        raise
    return schema.SchemaVersion(*rows[0]) if rows else None


def _next_seq(connection: Any, table: str) -> int:
    """The seq that the next row of a table gets."""
    text = _unprepared(connection, SHOW_TABLE.format(table=table))[0][1]
    found = re.search(r"AUTO_INCREMENT=(\d+)", text)
    return int(found[1]) if found else 1


def _is_partitioned(connection: Any) -> bool:
    found = _read_version(connection)
    return found is not None and found.layout == "partitioned"


_NO_SUCH_TABLE = 1146
_NO_SUCH_COLUMN = 1054


def _answer(connection: Any, query: str) -> list[Any] | None:
    """The rows; None if the server does not give them to this account."""
    try:
        if query == SHOW_GRANTS:
            return _beyond_data(_execute(connection, query), _execute(connection, SELECT_SERVER))
        if query == CHECKS["tls"]:
            return [tuple(value for _, value in sorted(_execute(connection, query), reverse=True))]
        if query.startswith("XA"):  # cannot be prepared
            return [(row[3], None) for row in _unprepared(connection, query)]
        return _execute(connection, query)
    except (MySQLError, MySQLInterfaceError):
        if not connection.is_connected():
            raise
        return None


def _beyond_data(grants: Iterable[tuple[str]], server: list[Any]) -> list[tuple[str, str]]:
    """What an account lacks of what the library needs, and what it has beyond that."""
    database = server[0][2]
    needed = {"SELECT", "INSERT", "UPDATE", "DELETE"}
    found: set[str] = set()
    excess: list[str] = []
    for (grant,) in grants:
        match = re.match(r"GRANT (.+) ON (\*|`(?:[^`]|``)*`)\.(\*|`(?:[^`]|``)*`) TO ", grant)
        if match is None:
            continue  # a role, whose privileges are shown too, or PROXY
        privileges = set(re.sub(r" ?\([^)]*\)", "", match[1]).replace(", ", ",").split(","))
        privileges -= {"USAGE"}
        here = _pattern(match[2]).fullmatch(database) is not None
        if here and match[3] == "*":
            found |= needed if "ALL PRIVILEGES" in privileges else privileges
        beyond = privileges - needed if here and match[2] != "*" else privileges
        if "WITH GRANT OPTION" in grant:
            beyond.add("GRANT OPTION")
        if beyond:
            excess.append(f"{', '.join(sorted(beyond)[:4])} on {match[2]}.{match[3]}")
    return [("missing", word) for word in sorted(needed - found)] + [
        ("excess", text) for text in excess
    ]


def _pattern(quoted: str) -> re.Pattern[str]:
    """The databases that a grant names: with % and _ as wildcards, unless these are escaped."""
    if quoted == "*":
        return re.compile(".*", re.DOTALL)
    words = {"%": ".*", "_": "."}
    parts = re.findall(r"\\[%_]|.", quoted[1:-1].replace("``", "`"), re.DOTALL)
    return re.compile("".join(words.get(part) or re.escape(part[-1]) for part in parts), re.DOTALL)


# --- Settings -------------------------------------------------------------------------------------


def parse_url(url: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """The driver's arguments, the TLS settings among them as they hold, the place in words."""
    parts = split_url(url)
    port = parts.port or 3306
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
        arguments = _login_of_file(os.path.expanduser(option_file)) | arguments
    if given.pop("use-pure", "") in ("1", "true"):
        arguments["use_pure"] = True
    settings = _tls(given, socket=bool(socket), local=is_local(host))
    arguments |= _tls_arguments(settings)
    if given:
        raise ConfigurationError(f"database URL: no parameter {', '.join(sorted(given))} is known")
    return arguments, settings, place


def _login_of_file(path: str) -> dict[str, str]:
    """User and password of the group that every MySQL client reads; the URL's own words win.

    The driver would take all else from there, too, and evaluate it: before 9.2 as Python, so that a
    user `__import__("os")...` runs, and since then as a literal, so that the user 007 is a number.
    """
    group = _client_group(path)
    return {name: _option(group[name]) for name in ("user", "password") if group.get(name)}


def _client_group(path: str) -> dict[str, str]:
    try:
        group: dict[str, str] = MySQLOptionsParser([path]).get_groups("client")
    except ValueError as error:
        raise ConfigurationError(f"option-file: {error}") from None
    except configparser.Error:  # whose words quote the file, which may hold a password
        raise ConfigurationError(f"option-file: {path} is no option file of MySQL") from None
    return group


#: Where MySQL's own programs look, in their order.
OPTION_FILES = ("/etc/my.cnf", "/etc/mysql/my.cnf", "~/.my.cnf")


def read_option_files() -> dict[str, str]:
    """The [client] group of the option files that every MySQL client reads; the last one wins."""
    options: dict[str, str] = {}
    for file in map(os.path.expanduser, OPTION_FILES):
        if os.access(file, os.R_OK):
            group = _client_group(file)
            options |= {name.replace("_", "-"): _option(text) for name, text in group.items()}
    return options


def _option(text: str) -> str:
    """A value as MySQL's own programs read it from an option file."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    else:
        text = re.split(r"\s#", text, maxsplit=1)[0].rstrip()
    escapes = {"b": "\b", "t": "\t", "n": "\n", "r": "\r", "s": " ", "\\": "\\"}
    return re.sub(r"\\([btnrs\\])", lambda match: escapes[match[1]], text)


def _tls(given: dict[str, str], *, socket: bool, local: bool) -> dict[str, str]:
    """Verified TLS for a server elsewhere, unless the URL says otherwise in so many words."""
    words = {word: given.pop(word) for word in tls.WORDS.values() if word in given}
    for name, word in tls.WORDS.items():
        if f"ssl-{name}" in given:
            words[word] = given.pop(f"ssl-{name}")
    mode = words.get("sslmode", "prefer")
    modes = {theirs: ours for ours, theirs in tls.MODES.items()}
    if modes.setdefault(mode.upper(), mode) not in tls.MODES:
        known = ", ".join(tls.MODES)
        raise ConfigurationError(f"database URL: sslmode is one of {known}")
    if "sslmode" in words:
        words["sslmode"] = modes[mode.upper()]
    if socket:  # as in libpq: nobody is in between, and there is no host name
        words = {"sslmode": "disable" if words.get("sslmode") == "disable" else "prefer"}
    return tls.settle(words, local=local or socket)


def _tls_arguments(settings: Mapping[str, str]) -> dict[str, Any]:
    mode = settings["sslmode"]
    if mode == "disable":
        return {"ssl_disabled": True}
    names = {"sslrootcert": "ssl_ca", "sslcert": "ssl_cert", "sslkey": "ssl_key"}
    arguments: dict[str, Any] = {
        name: settings[word] for word, name in names.items() if word in settings
    }
    if mode in tls.VERIFYING:
        arguments["ssl_verify_cert"] = True
        arguments["ssl_verify_identity"] = mode == "verify-full"
    return arguments


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "msg", None) or error).split())


#: Faults after which a connection is not used again; the last might be a server gone read-only.
UNUSABLE_AFTER = (Fault.LOST, Fault.STALE, Fault.REFUSED, Fault.UNFIT)

#: Wrong password, no access to the database, no such database: the same tomorrow.
REFUSED_LOGINS = {1044, 1045, 1049, 1698}

#: Of a lock that may be free, or a deadlock that may not come again.
PASSING_FAULTS = (Fault.CONFLICT, Fault.TIMEOUT, Fault.BUSY)

#: An account that may not do this to a table, a database, the server.
DENIED = {1044, 1142, 1227}

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
    3101: Fault.CONFLICT,  # a group of servers undid the transaction
    1451: Fault.CONFLICT,
    1452: Fault.CONFLICT,  # the session was deleted while we inserted
    1243: Fault.STALE,
    1615: Fault.STALE,
    1205: Fault.BUSY,  # innodb_lock_wait_timeout
    3024: Fault.TIMEOUT,  # max_execution_time
    1040: Fault.BUSY,  # too many connections
    1461: Fault.BUSY,  # too many prepared statements
    3: Fault.UNFIT,  # what the operating system says, up to 28
    20: Fault.UNFIT,
    28: Fault.UNFIT,
    1021: Fault.UNFIT,  # disk full
    1026: Fault.UNFIT,
    1030: Fault.UNFIT,  # the storage engine's own word
    1037: Fault.UNFIT,  # memory full
    1038: Fault.UNFIT,
    1041: Fault.UNFIT,
    1114: Fault.UNFIT,  # table, and so disk, full
    1290: Fault.UNFIT,  # read-only
    1792: Fault.UNFIT,
    1836: Fault.UNFIT,
    3100: Fault.UNFIT,  # a group of servers takes nothing
    1364: Fault.LAYOUT,  # an event without seq: that has no default any more
    1048: Fault.DATA,
    1153: Fault.DATA,  # over max_allowed_packet
    1264: Fault.DATA,
    1292: Fault.DATA,
    1300: Fault.DATA,
    1301: Fault.DATA,
    1366: Fault.DATA,
    1369: Fault.DATA,
    1406: Fault.DATA,
    1644: Fault.DATA,  # a trigger's own word
    3140: Fault.DATA,
    3141: Fault.DATA,
    3144: Fault.DATA,
    3151: Fault.DATA,
    3157: Fault.DATA,
    3819: Fault.DATA,
}
