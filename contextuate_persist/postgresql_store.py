"""Everything PostgreSQL: the statements, the store, its connections, its errors."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import psycopg
import psycopg_pool
from psycopg import errors as pg
from psycopg import sql
from psycopg.abc import RV, Buffer, PQGen
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.json import Jsonb

from contextuate_persist import (
    base,
    doctor,
    model,
    partitions,
    payload,
    records,
    schema,
    tls,
)
from contextuate_persist.accounts import Names
from contextuate_persist.base import BaseStore, Event, Fault, Sliced
from contextuate_persist.config import check_quoting, is_local
from contextuate_persist.dumps import Contents, Dumper, PostgreSQLDumper, Sums
from contextuate_persist.errors import (
    ConfigurationError,
    InvalidRecord,
    SchemaError,
    StoreRefused,
    StoreUnavailable,
)
from contextuate_persist.model import Cursor, Health, MessageUsage
from contextuate_persist.partitions import OLDER, REST, Partition, Span
from contextuate_persist.records import Due, EventRow, Seed

if TYPE_CHECKING:
    from typing_extensions import LiteralString

# --- Events ---------------------------------------------------------------------------------------

# The usual event: its session is known, and the event tells nothing new about it. One statement, so
# no transaction; it inserts nothing where the full way below has something to do.
INSERT_EVENT = """
INSERT INTO events (
    id, session_id, timestamp, event_type, event_type_name, hook_type, hook_type_name,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact
)
SELECT
    %(id)s::uuid, s.session_id, %(timestamp)s::bigint,
    %(event_type)s::monitor_event_type, %(event_type_name)s::varchar,
    %(hook_type)s::claude_hook_type, %(hook_type_name)s::varchar,
    %(parent_session_id)s::varchar, %(machine_id)s::varchar, %(working_directory)s::text,
    %(tool_name)s::varchar, %(tool_use_id)s::varchar, %(data)s::jsonb, %(exact)s::bytea
FROM sessions AS s
WHERE s.session_id = %(session_id)s
    AND (
        s.known_from = 'session'
        OR s.known_from = 'event'
            AND s.start_time <= %(timestamp)s
            AND (%(parent_session_id)s::varchar IS NULL OR s.parent_session_id IS NOT NULL)
    )
    AND NOT EXISTS (
        SELECT FROM deleted_sessions AS d
        WHERE d.session_id = s.session_id AND d.deleted_at >= %(timestamp)s
    )
ON CONFLICT (id) DO NOTHING
"""

# First of all locks every session that a transaction touches, in the order of their ids: whoever
# writes holds them in this order, so nobody waits in a circle. Where the WHERE is false the row is
# locked all the same, but not rewritten.
SEED_SESSIONS = """
INSERT INTO sessions AS s (
    session_id, machine_id, working_directory, start_time, known_from, exact
)
SELECT session_id, machine_id, working_directory, start_time, known_from, exact::jsonb
FROM unnest(
    %(session_ids)s::text[], %(machine_ids)s::text[], %(working_directories)s::text[],
    %(start_times)s::bigint[], %(known_from)s::text[], %(exact)s::text[]
) AS seed (session_id, machine_id, working_directory, start_time, known_from, exact)
ON CONFLICT (session_id) DO UPDATE SET
    machine_id = EXCLUDED.machine_id,
    working_directory = EXCLUDED.working_directory,
    start_time = EXCLUDED.start_time,
    known_from = EXCLUDED.known_from,
    exact = NULLIF(
        COALESCE(s.exact, '{}') - 'working_directory' || COALESCE(EXCLUDED.exact, '{}'), '{}'
    )
WHERE EXCLUDED.known_from = 'event'
    AND (
        s.known_from = 'reference'
        OR s.known_from = 'event' AND EXCLUDED.start_time < s.start_time
    )
"""

LINK_PARENTS = """
UPDATE sessions AS s
SET parent_session_id = link.parent_id
FROM unnest(%(children)s::text[], %(parents)s::text[]) AS link (child_id, parent_id)
WHERE s.session_id = link.child_id
    AND s.known_from <> 'session'
    AND s.parent_session_id IS NULL
"""

SELECT_DELETIONS = """
SELECT session_id, deleted_at
FROM deleted_sessions
WHERE session_id = ANY(%(session_ids)s::text[])
"""

UNDELETE_SESSIONS = """
DELETE FROM deleted_sessions
WHERE session_id = ANY(%(session_ids)s::text[])
"""

INSERT_EVENTS = """
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

# The fast way in. It knows no ON CONFLICT: a repeat undoes the transaction.
COPY_EVENTS = """
COPY events (
    id, session_id, timestamp, event_type, event_type_name, hook_type, hook_type_name,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact
)
FROM STDIN (FORMAT BINARY)
"""
# How the values are written: an id is 16 bytes, a payload its version and its text.
COPY_TYPES = (
    "bytea", "text", "int8", "text", "text", "text", "text",
    "text", "text", "text", "text", "text", "bytea", "bytea",
)  # fmt: skip

SELECT_KNOWN_IDS = """
SELECT e.id::text
FROM events AS e
WHERE e.id = ANY(%(ids)s::uuid[])
"""

# Where events is partitioned, event_ids decides what is new and gives out seq. The single event
# still takes one statement.
INSERT_PARTITIONED_EVENT = (
    """
WITH new AS (
    INSERT INTO event_ids (id, timestamp)
    SELECT %(id)s::uuid, %(timestamp)s::bigint
    FROM sessions AS s
"""
    + INSERT_EVENT[INSERT_EVENT.index("WHERE s.session_id") :]
    + """
    RETURNING id, seq, timestamp
)
INSERT INTO events (
    id, seq, session_id, timestamp, event_type, event_type_name, hook_type, hook_type_name,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact
)
SELECT
    new.id, new.seq, %(session_id)s::varchar, new.timestamp,
    %(event_type)s::monitor_event_type, %(event_type_name)s::varchar,
    %(hook_type)s::claude_hook_type, %(hook_type_name)s::varchar,
    %(parent_session_id)s::varchar, %(machine_id)s::varchar, %(working_directory)s::text,
    %(tool_name)s::varchar, %(tool_use_id)s::varchar, %(data)s::jsonb, %(exact)s::bytea
FROM new
"""
)

# In the order given, which is that of seq then; returns those that are new.
INSERT_EVENT_IDS = """
INSERT INTO event_ids (id, timestamp)
SELECT given.id::uuid, given.timestamp
FROM unnest(%(ids)s::text[], %(timestamps)s::bigint[])
    WITH ORDINALITY AS given (id, timestamp, position)
ORDER BY given.position
ON CONFLICT (id) DO NOTHING
RETURNING id::text, seq
"""

INSERT_PARTITIONED_EVENTS = """
INSERT INTO events (
    id, seq, session_id, timestamp, event_type, event_type_name, hook_type, hook_type_name,
    parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data, exact
)
VALUES (
    %(id)s, %(seq)s, %(session_id)s, %(timestamp)s, %(event_type)s, %(event_type_name)s,
    %(hook_type)s, %(hook_type_name)s, %(parent_session_id)s, %(machine_id)s,
    %(working_directory)s, %(tool_name)s, %(tool_use_id)s, %(data)s, %(exact)s
)
"""

COPY_PARTITIONED_EVENTS = COPY_EVENTS.replace("data, exact", "data, exact, seq")

SELECT_KNOWN_PARTITIONED_IDS = SELECT_KNOWN_IDS.replace("FROM events", "FROM event_ids")

SELECT_EVENTS = """
SELECT
    e.id::text AS id, e.seq, e.timestamp, e.session_id, e.parent_session_id, e.machine_id,
    e.working_directory, COALESCE(e.event_type_name, e.event_type::text) AS event_type,
    COALESCE(e.hook_type_name, e.hook_type::text) AS hook_type, e.data, e.exact
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
WHERE e.session_id = ANY(%(session_ids)s::text[])
ORDER BY e.session_id, e.timestamp, e.seq
LIMIT %(limit)s
"""
)

SELECT_EVENT = SELECT_EVENTS + "WHERE e.id = %(id)s AND e.session_id = %(session_id)s"

# By way of event_ids to one row of one partition: there is no index of the ids in each.
SELECT_PARTITIONED_EVENT = (
    SELECT_EVENTS
    + """
WHERE e.session_id = %(session_id)s
    AND e.timestamp = (SELECT i.timestamp FROM event_ids AS i WHERE i.id = %(id)s)
    AND e.seq = (SELECT i.seq FROM event_ids AS i WHERE i.id = %(id)s)
"""
)

# Filters come as fixed clauses: one statement with `%s IS NULL OR` for each would, once prepared,
# be planned for all of them and use no index.
EVENT_CLAUSES = {
    "session_id": "e.session_id = %(session_id)s",
    "machine_id": "e.machine_id = %(machine_id)s",
    "parent_session_id": "e.parent_session_id = %(parent_session_id)s",
    "tool_name": "e.tool_name = %(tool_name)s",
    "tool_use_id": "e.tool_use_id = %(tool_use_id)s",
    "before": "(e.timestamp, e.seq) < (%(before_timestamp)s, %(before_seq)s)",
    "after": "(e.timestamp, e.seq) > (%(after_timestamp)s, %(after_seq)s)",
}
# A type is found by its member or by its name: rows of a new member may still be under 'other'. As
# two branches of a UNION, since with an OR no index gives the order any more.
TYPE_CLAUSES = {
    "event_type": (
        "e.event_type = %(event_type)s::monitor_event_type AND e.event_type_name IS NULL",
        "e.event_type_name = %(event_type)s::text",
    ),
    "hook_type": (
        "e.hook_type = %(hook_type)s::claude_hook_type AND e.hook_type_name IS NULL",
        "e.hook_type_name = %(hook_type)s::text",
    ),
}
# Where the column is a projection only the exact payload can tell.
CONTAINS_CLAUSES = ("e.exact IS NULL AND e.data @> %(contains)s", "e.exact IS NOT NULL")
# What idx_events_data leaves out, since nobody searches it and it is most of a payload.
BIG_KEYS = (
    "toolInput",
    "toolOutput",
    "toolCalls",
    "message",
    "assistantResponse",
    "thinking",
    "thinkingBlocks",
    "hook",
    "line",
)
CONTAINS_INDEXED = "(e.data - '{" + ",".join(BIG_KEYS) + "}'::text[]) @> %(contains_indexed)s AND "

# Of all but a few events from an index alone.
COUNT_EVENTS = """
SELECT e.event_type::text, count(*)
FROM events AS e
WHERE e.event_type <> 'other'
GROUP BY e.event_type
UNION ALL
SELECT COALESCE(e.event_type_name, 'other'), count(*)
FROM events AS e
WHERE e.event_type = 'other'
GROUP BY e.event_type_name
"""

COUNT_SESSION_EVENTS = """
SELECT COALESCE(e.event_type_name, e.event_type::text), count(*)
FROM events AS e
WHERE e.session_id = %(session_id)s
GROUP BY e.event_type, e.event_type_name
"""

SELECT_TYPES = """
SELECT t.typname, e.enumlabel
FROM pg_catalog.pg_enum AS e JOIN pg_catalog.pg_type AS t ON t.oid = e.enumtypid
WHERE t.oid IN (to_regtype('monitor_event_type'), to_regtype('claude_hook_type'))
"""

# --- Sessions -------------------------------------------------------------------------------------

# How a save merges is the protocol's to say; EXCLUDED is what was given, s what is known. A session
# that was deleted after its start, and is not there again, stays so.
SAVE_SESSION = """
INSERT INTO sessions AS s (
    session_id, machine_id, working_directory, start_time, end_time, status,
    parent_session_id, manual_parent_session_id, child_session_ids,
    agent_type, model, transcript_path, is_user_initiated, is_pinned, hidden, label,
    token_usage_input, token_usage_output, token_usage_cache_read, token_usage_cache_creation,
    known_from, exact
)
SELECT
    %(session_id)s::varchar, %(machine_id)s::varchar, %(working_directory)s::text,
    %(start_time)s::bigint, CASE WHEN %(status)s <> 'active' THEN %(end_time)s::bigint END,
    %(status)s::session_status, %(parent_session_id)s::varchar,
    %(manual_parent_session_id)s::varchar, %(child_session_ids)s::jsonb,
    %(agent_type)s::varchar, %(model)s::varchar, %(transcript_path)s::text,
    COALESCE(%(is_user_initiated)s::boolean, TRUE), COALESCE(%(is_pinned)s::boolean, FALSE),
    COALESCE(%(hidden)s::boolean, FALSE), %(label)s::text,
    %(token_usage_input)s::bigint, %(token_usage_output)s::bigint,
    %(token_usage_cache_read)s::bigint, %(token_usage_cache_creation)s::bigint,
    'session', NULLIF(jsonb_strip_nulls(%(exact)s::jsonb), '{}')
WHERE EXISTS (
    SELECT FROM sessions AS shown
    WHERE shown.session_id = %(session_id)s AND shown.known_from <> 'reference'
) OR NOT EXISTS (
    SELECT FROM deleted_sessions AS d
    WHERE d.session_id = %(session_id)s AND d.deleted_at >= %(start_time)s
)
ON CONFLICT (session_id) DO UPDATE SET
    machine_id = EXCLUDED.machine_id,
    working_directory = EXCLUDED.working_directory,
    start_time = EXCLUDED.start_time,
    end_time = EXCLUDED.end_time,
    status = EXCLUDED.status,
    parent_session_id = COALESCE(EXCLUDED.parent_session_id, s.parent_session_id),
    manual_parent_session_id =
        COALESCE(EXCLUDED.manual_parent_session_id, s.manual_parent_session_id),
    child_session_ids = s.child_session_ids || (
        SELECT COALESCE(jsonb_agg(given.child ORDER BY given.position), '[]')
        FROM jsonb_array_elements(EXCLUDED.child_session_ids)
            WITH ORDINALITY AS given (child, position)
        WHERE NOT s.child_session_ids @> given.child
    ),
    agent_type = COALESCE(EXCLUDED.agent_type, s.agent_type),
    model = COALESCE(EXCLUDED.model, s.model),
    transcript_path = COALESCE(EXCLUDED.transcript_path, s.transcript_path),
    is_user_initiated = COALESCE(%(is_user_initiated)s::boolean, s.is_user_initiated),
    is_pinned = COALESCE(%(is_pinned)s::boolean, s.is_pinned),
    hidden = COALESCE(%(hidden)s::boolean, s.hidden),
    label = COALESCE(EXCLUDED.label, s.label),
    (
        token_usage_input, token_usage_output, token_usage_cache_read, token_usage_cache_creation
    ) = (
        SELECT
            CASE WHEN ledger.decides THEN s.token_usage_input ELSE EXCLUDED.token_usage_input END,
            CASE WHEN ledger.decides THEN s.token_usage_output ELSE EXCLUDED.token_usage_output END,
            CASE
                WHEN ledger.decides THEN s.token_usage_cache_read
                ELSE COALESCE(EXCLUDED.token_usage_cache_read, s.token_usage_cache_read)
            END,
            CASE
                WHEN ledger.decides THEN s.token_usage_cache_creation
                ELSE COALESCE(EXCLUDED.token_usage_cache_creation, s.token_usage_cache_creation)
            END
        FROM (
            SELECT EXISTS (
                SELECT FROM token_ledger AS t WHERE t.session_id = s.session_id
            ) AS decides
        ) AS ledger
    ),
    known_from = 'session',
    exact = NULLIF(jsonb_strip_nulls(COALESCE(s.exact, '{}') || %(exact)s::jsonb), '{}')
"""

# Two columns are computed: the sessions whose effective parent this one is, and the ids that were
# listed although they are deleted or belong to another. OFFSET 0 keeps the two look-ups by key: for
# an array the planner assumes 100 rows and would read both tables whole (88 ms instead of 12 for
# 3,450 sessions).
SELECT_SESSIONS = """
SELECT
    s.session_id, s.machine_id, s.working_directory, s.start_time, s.end_time, s.status::text,
    s.parent_session_id, s.manual_parent_session_id, s.child_session_ids,
    s.agent_type, s.model, s.transcript_path, s.is_user_initiated, s.is_pinned, s.hidden, s.label,
    s.token_usage_input, s.token_usage_output, s.token_usage_cache_read,
    s.token_usage_cache_creation, s.exact,
    (
        SELECT jsonb_agg(jsonb_build_array(child.start_time, child.session_id))
        FROM sessions AS child
        WHERE child.effective_parent_id = s.session_id
    ) AS linked_children,
    (
        SELECT jsonb_agg(listed.session_id)
        FROM jsonb_array_elements_text(s.child_session_ids) AS listed (session_id)
        LEFT JOIN LATERAL (
            SELECT c.session_id, c.effective_parent_id
            FROM sessions AS c
            WHERE c.session_id = listed.session_id AND c.known_from <> 'reference'
            OFFSET 0
        ) AS child ON TRUE
        LEFT JOIN LATERAL (
            SELECT d.session_id
            FROM deleted_sessions AS d
            WHERE d.session_id = listed.session_id
            OFFSET 0
        ) AS gone ON TRUE
        WHERE child.effective_parent_id <> s.session_id
            OR child.session_id IS NULL AND gone.session_id IS NOT NULL
    ) AS strangers
FROM sessions AS s
"""

SELECT_SHOWN = """
SELECT s.session_id
FROM sessions AS s
WHERE s.session_id = ANY(%(session_ids)s::text[]) AND s.known_from <> 'reference'
"""

SESSION_CLAUSES = {
    "session_id": "s.session_id = %(session_id)s",
    "session_ids": "s.session_id = ANY(%(session_ids)s::text[])",
    "status": "s.status = %(status)s::session_status",
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
    "status": "status = %(status)s::session_status",
    "parent_session_id": "parent_session_id = %(parent_session_id)s",
    "manual_parent_session_id": "manual_parent_session_id = %(manual_parent_session_id)s",
    "child_session_ids": "child_session_ids = %(child_session_ids)s::jsonb",
    "agent_type": "agent_type = %(agent_type)s",
    "model": "model = %(model)s",
    "transcript_path": "transcript_path = %(transcript_path)s",
    "is_user_initiated": "is_user_initiated = %(is_user_initiated)s",
    "is_pinned": "is_pinned = %(is_pinned)s",
    "hidden": "hidden = %(hidden)s",
    "label": "label = %(label)s",
    "exact": "exact = NULLIF(jsonb_strip_nulls(COALESCE(exact, '{}') || %(exact)s::jsonb), '{}')",
} | {
    column: f"{column} = CASE WHEN EXISTS ("
    "SELECT FROM token_ledger AS t WHERE t.session_id = sessions.session_id"
    f") THEN {column} ELSE %({column})s END"
    for column in (
        "token_usage_input",
        "token_usage_output",
        "token_usage_cache_read",
        "token_usage_cache_creation",
    )
}
# A parent that is not stored yet, made from what its child knows; locks both as SEED_SESSIONS does.
REFER_TO_PARENT = """
INSERT INTO sessions AS s (session_id, machine_id, working_directory, start_time, known_from)
SELECT
    named.session_id, child.machine_id, child.working_directory, child.start_time, 'reference'
FROM sessions AS child
CROSS JOIN unnest(%(session_ids)s::text[]) WITH ORDINALITY AS named (session_id, position)
WHERE child.session_id = %(session_id)s
ORDER BY named.position
ON CONFLICT (session_id) DO UPDATE SET known_from = s.known_from
WHERE FALSE
"""
# Once somebody has said where and when a session began, events correct that no more.
FIRM_COLUMNS = {"machine_id", "working_directory", "start_time", "parent_session_id"}

# A larger reading raises what is known of a message, whoever owns it; where the WHERE is false the
# row is locked all the same.
SAVE_USAGE = """
INSERT INTO token_ledger AS t (
    message_id, session_id, timestamp, model,
    input_tokens, output_tokens, cache_read, cache_creation
)
SELECT
    given.message_id, %(session_id)s::varchar, given.timestamp, given.model,
    given.input_tokens, given.output_tokens, given.cache_read, given.cache_creation
FROM unnest(
    %(message_ids)s::text[], %(timestamps)s::bigint[], %(models)s::text[],
    %(input_tokens)s::bigint[], %(output_tokens)s::bigint[], %(cache_read)s::bigint[],
    %(cache_creation)s::bigint[]
) AS given (
    message_id, timestamp, model, input_tokens, output_tokens, cache_read, cache_creation
)
ON CONFLICT (message_id) DO UPDATE SET
    input_tokens = GREATEST(t.input_tokens, EXCLUDED.input_tokens),
    output_tokens = GREATEST(t.output_tokens, EXCLUDED.output_tokens),
    cache_read = GREATEST(t.cache_read, EXCLUDED.cache_read),
    cache_creation = GREATEST(t.cache_creation, EXCLUDED.cache_creation)
WHERE EXCLUDED.input_tokens > t.input_tokens
    OR EXCLUDED.output_tokens > t.output_tokens
    OR EXCLUDED.cache_read > t.cache_read
    OR EXCLUDED.cache_creation > t.cache_creation
"""

SELECT_OWNERS = """
SELECT DISTINCT t.session_id
FROM token_ledger AS t
WHERE t.message_id = ANY(%(message_ids)s::text[])
"""

# A total is at most what a session may be saved with. The ids stand there twice, or the planner
# would read all sessions to join them.
SET_TOTALS = """
UPDATE sessions AS s
SET
    token_usage_input = total.input,
    token_usage_output = total.output,
    token_usage_cache_read = total.cache_read,
    token_usage_cache_creation = total.cache_creation
FROM (
    SELECT
        t.session_id,
        LEAST(sum(t.input_tokens), 9007199254740991)::bigint AS input,
        LEAST(sum(t.output_tokens), 9007199254740991)::bigint AS output,
        LEAST(sum(t.cache_read), 9007199254740991)::bigint AS cache_read,
        LEAST(sum(t.cache_creation), 9007199254740991)::bigint AS cache_creation
    FROM token_ledger AS t
    WHERE t.session_id = ANY(%(session_ids)s::text[])
    GROUP BY t.session_id
) AS total
WHERE s.session_id = total.session_id
    AND s.session_id = ANY(%(session_ids)s::text[])
    AND (
        s.token_usage_input, s.token_usage_output,
        s.token_usage_cache_read, s.token_usage_cache_creation
    ) IS DISTINCT FROM (total.input, total.output, total.cache_read, total.cache_creation)
"""

# Deleting takes three steps under locks taken in the order of ids: children lose their parent,
# lists lose the id, then the row goes, its events with it (foreign key).
LOCK_FAMILY = """
SELECT s.session_id
FROM sessions AS s
WHERE s.session_id = %(session_id)s
    OR s.parent_session_id = %(session_id)s
    OR s.effective_parent_id = %(session_id)s
    OR s.child_session_ids ? %(session_id)s
ORDER BY s.session_id
FOR UPDATE
"""

LOCK_SESSIONS = """
SELECT s.session_id
FROM sessions AS s
WHERE s.session_id = ANY(%(session_ids)s::text[])
ORDER BY s.session_id
FOR UPDATE
"""

# Against everybody who changes or deletes them; not against who stores a single event in one.
HOLD_SESSIONS = LOCK_SESSIONS.replace("FOR UPDATE", "FOR NO KEY UPDATE")

ORPHAN_CHILDREN = """
UPDATE sessions
SET
    parent_session_id = NULLIF(parent_session_id, %(session_id)s),
    manual_parent_session_id = NULLIF(manual_parent_session_id, %(session_id)s)
WHERE parent_session_id = %(session_id)s OR effective_parent_id = %(session_id)s
"""

# Those that stay, a while or for good; the foreign key sees to the detected parents.
ORPHAN_WARDS = """
UPDATE sessions
SET manual_parent_session_id = NULL
WHERE effective_parent_id = ANY(%(session_ids)s::text[])
    AND manual_parent_session_id IS NOT NULL
    AND session_id <> ALL(%(session_ids)s::text[])
"""

UNLIST_CHILDREN = """
UPDATE sessions
SET child_session_ids = child_session_ids - %(session_ids)s::text[]
WHERE child_session_ids ?| %(session_ids)s::text[]
"""

# Written as for MySQL, which for max() would read all events of the session.
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
CROSS JOIN (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now) AS clock
WHERE s.session_id = ANY(%(session_ids)s::text[])
ON CONFLICT (session_id) DO UPDATE SET
    deleted_at = GREATEST(deleted_sessions.deleted_at, EXCLUDED.deleted_at)
"""

DELETE_SESSIONS = """
DELETE FROM sessions
WHERE session_id = ANY(%(session_ids)s::text[])
"""

HAS_MANY_EVENTS = """
SELECT 1
FROM events AS e
WHERE e.session_id = ANY(%(session_ids)s::text[])
LIMIT 1
OFFSET %(many)s
"""

SELECT_SESSION_IDS = """
SELECT s.session_id
FROM sessions AS s
"""

FORGET_DELETIONS = """
DELETE FROM deleted_sessions
WHERE deleted_at < (extract(epoch FROM now()) * 1000)::bigint - %(age)s
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
    SELECT asked.session_id::varchar(255) COLLATE "C"
    FROM unnest(%(session_ids)s::text[]) AS asked (session_id)
    UNION
    SELECT child.session_id
    FROM subtree JOIN sessions AS child ON child.effective_parent_id = subtree.session_id
)
SELECT s.session_id, s.effective_parent_id, s.transcript_path, s.exact
FROM subtree JOIN sessions AS s ON s.session_id = subtree.session_id
"""

COUNT_BELONGINGS = """
SELECT
    (
        SELECT count(*)
        FROM sessions AS s
        WHERE s.session_id = ANY(%(session_ids)s::text[]) AND s.known_from <> 'reference'
    ),
    (SELECT count(*) FROM events AS e WHERE e.session_id = ANY(%(session_ids)s::text[])),
    (SELECT count(*) FROM token_ledger AS t WHERE t.session_id = ANY(%(session_ids)s::text[]))
"""

# As REMEMBER_DELETIONS does, but by what is asked for, whether it is there or not.
REMEMBER_FORGOTTEN = f"""
INSERT INTO deleted_sessions (session_id, deleted_at)
SELECT
    s.session_id,
    {DELETED_AT}
FROM unnest(%(session_ids)s::text[]) AS s (session_id)
CROSS JOIN (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now) AS clock
ON CONFLICT (session_id) DO UPDATE SET
    deleted_at = GREATEST(deleted_sessions.deleted_at, EXCLUDED.deleted_at)
"""

DELETE_SOME_EVENTS = """
DELETE FROM events
WHERE id = ANY(ARRAY(
    SELECT e.id
    FROM events AS e
    WHERE e.session_id = ANY(%(session_ids)s::text[])
    LIMIT %(limit)s
))
"""

UNNAME_PARENTS = """
UPDATE events
SET parent_session_id = NULL
WHERE id = ANY(ARRAY(
    SELECT e.id
    FROM events AS e
    WHERE e.parent_session_id = ANY(%(session_ids)s::text[])
    LIMIT %(limit)s
))
"""

LOCK_KIN = """
SELECT s.session_id
FROM sessions AS s
WHERE s.session_id = ANY(%(session_ids)s::text[])
    OR s.parent_session_id = ANY(%(session_ids)s::text[])
    OR s.child_session_ids ?| %(session_ids)s::text[]
ORDER BY s.session_id
FOR UPDATE
"""

SELECT_CHILDREN = """
SELECT child.session_id
FROM sessions AS child
WHERE child.effective_parent_id = ANY(%(session_ids)s::text[])
"""

SELECT_HEADS = """
SELECT e.id::text, e.session_id, e.timestamp, e.seq, e.machine_id, e.working_directory
FROM events AS e
"""

DELETE_EVENTS = """
DELETE FROM events
WHERE id = ANY(%(ids)s::uuid[])
"""

# Where events is partitioned, by way of event_ids: there is no index of the ids in each. What is
# forgotten is also in the table that a conversion leaves aside.
DELETE_PARTITIONED_EVENTS = """
DELETE FROM events AS e
USING event_ids AS i
WHERE i.id = ANY(%(ids)s::uuid[]) AND e.timestamp = i.timestamp AND e.seq = i.seq
"""

DELETE_SOME_PARTITIONED_EVENTS = """
DELETE FROM events AS e
USING event_ids AS i
WHERE i.id = ANY(ARRAY(
        SELECT e.id
        FROM events AS e
        WHERE e.session_id = ANY(%(session_ids)s::text[])
        LIMIT %(limit)s
    ))
    AND e.timestamp = i.timestamp
    AND e.seq = i.seq
"""

UNNAME_PARTITIONED_PARENTS = """
UPDATE events AS e
SET parent_session_id = NULL
FROM event_ids AS i
WHERE i.id = ANY(ARRAY(
        SELECT e.id
        FROM events AS e
        WHERE e.parent_session_id = ANY(%(session_ids)s::text[])
        LIMIT %(limit)s
    ))
    AND e.timestamp = i.timestamp
    AND e.seq = i.seq
"""

DELETE_UNPARTITIONED_EVENTS = DELETE_EVENTS.replace("events", "events_unpartitioned")
DELETE_SOME_UNPARTITIONED_EVENTS = DELETE_SOME_EVENTS.replace("events", "events_unpartitioned")
DELETE_SOME_PARTITIONED_COPIES = DELETE_SOME_PARTITIONED_EVENTS.replace(
    "events", "events_partitioned"
)
UNNAME_UNPARTITIONED_PARENTS = UNNAME_PARENTS.replace("events", "events_unpartitioned")

SELECT_BESIDE = """
SELECT t.name
FROM unnest(
    '{events_partitioned, events_retired, events_replaced, events_unpartitioned}'::text[]
) AS t (name)
WHERE to_regclass(t.name) IS NOT NULL
"""

SELECT_COPIES = """
SELECT s.session_id
FROM sessions AS s
WHERE s.known_from = 'reference' AND (s.machine_id <> '' OR s.working_directory <> '')
"""

EMPTY_COPIES = """
UPDATE sessions
SET machine_id = '', working_directory = '', exact = NULL
WHERE session_id = ANY(%(session_ids)s::text[]) AND known_from = 'reference'
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

SELECT_STATES_OF = STATE_OF_SESSION + "WHERE s.session_id = ANY(%(session_ids)s::text[])"

SELECT_LINKS = """
SELECT s.session_id, s.effective_parent_id
FROM sessions AS s
WHERE s.effective_parent_id = ANY(%(session_ids)s::text[])
"""

# How many events, and how long their values are as stored, which no payload has to be read for.
WEIGHT_OF_EVENT = """pg_column_size(e.data)
        + COALESCE(pg_column_size(e.exact), 0)
        + octet_length(e.working_directory)"""

SELECT_WEIGHTS = f"""
SELECT
    e.session_id,
    count(*),
    sum(
        {WEIGHT_OF_EVENT}
    )::bigint
FROM events AS e
WHERE e.session_id = ANY(%(session_ids)s::text[])
GROUP BY e.session_id
"""

# Every value of the session, of its events and of its messages counts, whoever changes it.
HASH_OF_EVENT = "md5(e::text)"

FINGERPRINT_OF_EVENTS = f"""(
        SELECT concat_ws(
            ' ', count(*), md5(string_agg({HASH_OF_EVENT}, '' ORDER BY e.timestamp, e.seq))
        )
        FROM events AS e
        WHERE e.session_id = s.session_id
    )"""

SELECT_FINGERPRINTS = f"""
SELECT
    s.session_id,
    md5(s::text),
    {FINGERPRINT_OF_EVENTS},
    (
        SELECT concat_ws(' ', count(*), md5(string_agg(md5(t::text), '' ORDER BY t.message_id)))
        FROM token_ledger AS t
        WHERE t.session_id = s.session_id
    )
FROM sessions AS s
WHERE s.session_id = ANY(%(session_ids)s::text[])
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
SELECT COALESCE(sum(pg_total_relation_size(c.oid)), 0)::bigint
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = current_schema()
    AND c.relkind = 'r'
    AND (
        c.relname IN ('sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger')
        OR c.oid IN (
            SELECT i.inhrelid FROM pg_inherits AS i WHERE i.inhparent = to_regclass('events')
        )
    )
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
WHERE table_schema = current_schema()
"""

RECORD_VERSION = """
INSERT INTO schema_version (version, name, checksum, layout)
VALUES (
    %(version)s, %(name)s, %(checksum)s,
    COALESCE((SELECT v.layout FROM schema_version AS v ORDER BY v.version DESC LIMIT 1), 'plain')
)
ON CONFLICT (version) DO UPDATE SET name = EXCLUDED.name, checksum = EXCLUDED.checksum
"""

# Nor is the connection to end while it waits for a program that dumps or loads. Only newer servers
# have all of these.
ALLOW_LONG_STATEMENTS = """
SELECT set_config(s.name, '0', FALSE)
FROM pg_settings AS s
WHERE s.name IN (
    'statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout',
    'idle_session_timeout'
)
"""

# Any number will do, as long as nobody else takes this one.
SCHEMA_LOCK = 7_206_338_812_094_461

LOCK_SCHEMA = "SELECT pg_try_advisory_lock(%(key)s)"

SET_SESSION = """
SELECT
    set_config('statement_timeout', %(statement)s, FALSE),
    set_config('lock_timeout', %(lock)s, FALSE),
    set_config('idle_in_transaction_session_timeout', %(statement)s, FALSE),
    set_config('default_transaction_isolation', 'read committed', FALSE),
    set_config('bytea_output', 'hex', FALSE)
"""

# --- Partitions -----------------------------------------------------------------------------------

# What lies in which partition; the columns of events that are copied, in this order.
EVENT_COLUMNS = """id, seq, session_id, timestamp, event_type, event_type_name, hook_type,
    hook_type_name, parent_session_id, machine_id, working_directory, tool_name, tool_use_id, data,
    exact, commit_order, created_at"""

SELECT_TABLES = """
SELECT c.relname
FROM pg_class AS c
WHERE c.relnamespace = to_regnamespace(quote_ident(current_schema()))
    AND c.relname = ANY(%(names)s::text[])
"""

# What is asked for in vain is no member of the owner, and would be told so table by table.
SELECT_EVENTS_OWNER = """
SELECT r.rolname, pg_has_role(r.oid, 'USAGE'), r.rolname = current_user
FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner
WHERE c.oid = to_regclass('events')
"""

SELECT_PARTITIONS = """
SELECT
    c.relname,
    substring(bound.text FROM 'FROM \\(.(\\d+)')::bigint,
    substring(bound.text FROM 'TO \\(.(\\d+)')::bigint,
    COALESCE(s.n_live_tup, 0),
    pg_total_relation_size(c.oid)
FROM pg_inherits AS i
JOIN pg_class AS c ON c.oid = i.inhrelid
CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid)) AS bound (text)
LEFT JOIN pg_stat_all_tables AS s ON s.relid = c.oid
WHERE i.inhparent = to_regclass(%(table)s)
ORDER BY 3 NULLS LAST
"""

SELECT_FIRST_EVENT = "SELECT min(e.timestamp) FROM events AS e"

# What refers to a table, or to the type of its rows, and not to its name; we make nothing of the
# kind but the foreign key with its internal triggers. A publication of all tables, or of a schema,
# takes the new one by itself.
SELECT_ATTACHED = """
SELECT DISTINCT
    CASE
        WHEN r.ev_class <> d.refobjid
            THEN pg_describe_object('pg_class'::regclass, r.ev_class, 0)
        ELSE pg_describe_object(d.classid, d.objid, 0)
    END
FROM pg_depend AS d
LEFT JOIN pg_rewrite AS r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
LEFT JOIN pg_trigger AS t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid
LEFT JOIN pg_constraint AS c ON d.classid = 'pg_constraint'::regclass AND c.oid = d.objid
WHERE d.refclassid = 'pg_class'::regclass
    AND d.refobjid = 'events'::regclass
    AND (
        d.classid IN (
            'pg_policy'::regclass, 'pg_rewrite'::regclass, 'pg_publication_rel'::regclass,
            'pg_proc'::regclass, 'pg_statistic_ext'::regclass
        )
        OR NOT t.tgisinternal
        OR c.confrelid = d.refobjid
    )
UNION
SELECT pg_describe_object(d.classid, d.objid, 0)
FROM pg_class AS c
JOIN pg_type AS t ON c.reltype IN (t.oid, t.typelem)
JOIN pg_depend AS d ON d.refclassid = 'pg_type'::regclass AND d.refobjid = t.oid
WHERE c.oid = 'events'::regclass AND d.classid = 'pg_proc'::regclass
UNION
SELECT 'row level security'
FROM pg_class AS c
WHERE c.oid = 'events'::regclass AND c.relrowsecurity
"""

# The accounts that may use events may use what comes in its place.
GRANT_AS_EVENTS = """
DO $$
DECLARE
    given RECORD;
BEGIN
    FOR given IN
        SELECT
            a.privilege_type AS privilege,
            CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END AS grantee
        FROM pg_class AS c
        CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        LEFT JOIN pg_roles AS r ON r.oid = a.grantee
        WHERE c.oid = 'events'::regclass AND a.grantee <> c.relowner
    LOOP
        EXECUTE format(
            'GRANT %s ON events_partitioned, event_ids TO %s', given.privilege, given.grantee
        );
    END LOOP;
END
$$
"""

# Who reads and writes events needs no rights on its partitions; pg_dump reads each by its name.
GRANT_READING = """
DO $$
DECLARE
    reader TEXT;
BEGIN
    FOR reader IN
        SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END
        FROM pg_class AS c
        CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        LEFT JOIN pg_roles AS r ON r.oid = a.grantee
        WHERE c.oid = 'events'::regclass
            AND a.grantee <> c.relowner
            AND a.privilege_type = 'SELECT'
    LOOP
        EXECUTE format('GRANT SELECT ON %I TO %s', {name}, reader);
    END LOOP;
END
$$
"""

# For the time of the copying; it goes with the old table.
SELECT_SEQ_INDEX = """
SELECT i.indisvalid
FROM pg_index AS i
WHERE i.indexrelid = to_regclass('idx_events_seq')
"""
CREATE_SEQ_INDEX = "CREATE INDEX CONCURRENTLY idx_events_seq ON events (seq)"
SEQ_INDEX = "index idx_events_seq on table events"  # as schema.additions tells of it
DROP_SEQ_INDEX = "DROP INDEX CONCURRENTLY IF EXISTS idx_events_seq"

SELECT_COPIED = "SELECT COALESCE(max(i.seq), 0) FROM event_ids AS i"

# A seq that was given out comes never again, not even that of a deleted event.
GO_ON_COUNTING = """
SELECT setval(
    pg_get_serial_sequence('event_ids', 'seq')::regclass,
    COALESCE(pg_sequence_last_value(pg_get_serial_sequence('events', 'seq')::regclass), 1)
)
"""

SELECT_LAST_SEQ = "SELECT COALESCE(max(e.seq), 0) FROM events AS e"

SELECT_CHUNK = """
SELECT count(*), max(chunk.seq)
FROM (
    SELECT e.seq
    FROM events AS e
    WHERE e.seq > %(after)s AND e.seq <= %(upto)s
    ORDER BY e.seq
    LIMIT %(rows)s
) AS chunk
"""

# Or one of them is deleted and made anew while the chunk is copied: the foreign key then lets the
# copies of events in that are gone.
LOCK_CHUNK = """
SELECT s.session_id
FROM sessions AS s
WHERE s.session_id IN (
    SELECT e.session_id FROM events AS e WHERE e.seq > %(after)s AND e.seq <= %(upto)s
)
ORDER BY s.session_id
FOR KEY SHARE
"""

# An id that is there already with the same seq was copied; with another, its event was deleted and
# stored anew.
COPY_CHUNK = f"""
WITH chunk AS (
    SELECT {EVENT_COLUMNS}
    FROM events
    WHERE seq > %(after)s AND seq <= %(upto)s
),
new AS (
    INSERT INTO event_ids AS i (id, seq, timestamp)
    SELECT c.id, c.seq, c.timestamp
    FROM chunk AS c
    ON CONFLICT (id) DO UPDATE SET seq = EXCLUDED.seq, timestamp = EXCLUDED.timestamp
    WHERE i.seq <> EXCLUDED.seq
    RETURNING i.seq AS new_seq
)
INSERT INTO events_partitioned ({EVENT_COLUMNS})
SELECT {EVENT_COLUMNS}
FROM chunk AS c JOIN new ON new.new_seq = c.seq
ORDER BY c.seq
"""

COMPARE_COPIES = """
SELECT session_id, COALESCE(old.events, 0), COALESCE(new.events, 0)
FROM (
    SELECT session_id, count(*) AS events FROM events WHERE seq <= %(upto)s GROUP BY session_id
) AS old
FULL JOIN (
    SELECT session_id, count(*) AS events
    FROM events_partitioned
    WHERE seq <= %(upto)s
    GROUP BY session_id
) AS new USING (session_id)
WHERE old.events IS DISTINCT FROM new.events
"""

# Only what was deleted by hand: with a session its copied events go by their own foreign key, and
# their ids by the trigger.
PURGE_COPIES = """
DELETE FROM events_partitioned AS p
WHERE p.session_id = ANY(%(session_ids)s::text[])
    AND NOT EXISTS (
        SELECT FROM events AS e
        WHERE e.session_id = p.session_id AND e.timestamp = p.timestamp AND e.seq = p.seq
    )
"""

# All names change at once. What an open store does then with the old ones ends in an error that
# tells it of the change.
SWAP_TABLES = """
DO $$
DECLARE
    old RECORD;
BEGIN
    FOR old IN
        SELECT c.relname AS name
        FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
        WHERE i.indrelid = 'events'::regclass
    LOOP
        EXECUTE format(
            'ALTER INDEX %I RENAME TO %I', old.name,
            replace(replace(old.name, 'idx_events_', 'idx_unpartitioned_'), 'events_pkey',
                'events_unpartitioned_pkey')
        );
    END LOOP;
    ALTER TABLE events RENAME TO events_unpartitioned;
    FOR old IN
        SELECT c.relname AS name
        FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
        WHERE i.indrelid = 'events_partitioned'::regclass
    LOOP
        EXECUTE format(
            'ALTER INDEX %I RENAME TO %I', old.name,
            replace(replace(old.name, 'idx_partitioned_', 'idx_events_'), 'events_partitioned_pkey',
                'events_pkey')
        );
    END LOOP;
    ALTER TABLE events_partitioned RENAME TO events;
END
$$
"""

RECORD_LAYOUT = """
UPDATE schema_version
SET layout = 'partitioned'
WHERE version = (SELECT max(v.version) FROM schema_version AS v) AND layout <> 'partitioned'
"""

SET_LOCK_TIMEOUT = "SELECT set_config('lock_timeout', %(lock)s, TRUE)"
SHORTEST_LOCK_MS, LONGEST_LOCK_MS = 100, 5000

# Of what stops nobody, but has to wait at its end for everybody who has begun to read: a backup.
WAIT_FOR_READERS = "SET lock_timeout = 0"
WAIT_AS_BEFORE = "SELECT set_config('lock_timeout', %(lock)s, FALSE)"

# The first is what the foreign key of a partition that comes or goes asks for.
LOCK_PARTITIONS: tuple[LiteralString, ...] = (
    "LOCK TABLE sessions IN SHARE ROW EXCLUSIVE MODE",
    "LOCK TABLE events IN ACCESS EXCLUSIVE MODE",
)
CREATE_PARTITION = "CREATE TABLE {name} PARTITION OF {table} FOR VALUES FROM ({start}) TO ({end})"
OLDEST, LAST = f"events_{OLDER}", f"events_{REST}"
IS_EMPTY = "SELECT NOT EXISTS (SELECT FROM {table})"

# Partitions cover all time, one after the other, and none is the DEFAULT: with that the planner
# would ask all of them for the latest events, instead of the last ones until there are enough (of
# any session of a year: 64 buffers instead of 45). So the first and the last are replaced when
# their bounds change: attaching one again would lock sessions against readers in the same step.
RENAME_REPLACED = "ALTER TABLE {name} RENAME TO events_replaced"
MOVE_REPLACED = f"""
INSERT INTO events ({EVENT_COLUMNS})
SELECT {EVENT_COLUMNS} FROM events_replaced
"""

# Session by session by the index: a partition has thousands of events of each.
SELECT_SESSIONS_OF = """
WITH RECURSIVE found (session_id) AS (
    (SELECT e.session_id FROM {table} AS e ORDER BY e.session_id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT e.session_id
        FROM {table} AS e
        WHERE e.session_id > f.session_id
        ORDER BY e.session_id
        LIMIT 1
    )
    FROM found AS f
    WHERE f.session_id IS NOT NULL
)
SELECT f.session_id FROM found AS f WHERE f.session_id IS NOT NULL
"""

DETACH_PARTITION = "ALTER TABLE events DETACH PARTITION {name}"
RENAME_RETIRED = "ALTER TABLE {name} RENAME TO events_retired"
# As long as it has the foreign key, what that deletes loses its ids.
GUARD_RETIRED = """
CREATE TRIGGER trigger_events_forget_ids AFTER DELETE ON events_retired
    REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION forget_event_ids()
"""
UNGUARD_RETIRED = "DROP TRIGGER trigger_events_forget_ids ON events_retired"
# Deleting the sessions would delete these events one by one.
FREE_RETIRED = "ALTER TABLE events_retired DROP CONSTRAINT {constraint}"
SELECT_FOREIGN_KEYS = """
SELECT c.conname
FROM pg_constraint AS c
WHERE c.conrelid = to_regclass(%(table)s) AND c.contype = 'f'
"""

SELECT_NEWEST_RETIRED = "SELECT COALESCE(max(r.timestamp), -1) FROM events_retired AS r"

# To the sessions that are still there, and were not deleted and made anew meanwhile. A deletion
# alone does not say so: a copy brings the source's, also of a session that the target keeps.
GIVE_BACK = f"""
WITH kept AS (
    DELETE FROM events_retired AS r
    USING sessions AS s
    WHERE r.session_id = s.session_id
        AND s.session_id = ANY(%(session_ids)s::text[])
        AND NOT EXISTS (
            SELECT FROM deleted_sessions AS d
            WHERE d.session_id = r.session_id
                AND d.deleted_at >= r.timestamp
                AND s.created_at > r.created_at
        )
    RETURNING r.*
)
INSERT INTO events ({EVENT_COLUMNS})
SELECT {EVENT_COLUMNS} FROM kept
"""

FORGET_IDS = """
WITH chunk AS (
    SELECT r.session_id, r.timestamp, r.seq, r.id
    FROM events_retired AS r
    WHERE (r.session_id, r.timestamp, r.seq) > (%(session_id)s, %(timestamp)s, %(seq)s)
    ORDER BY r.session_id, r.timestamp, r.seq
    LIMIT %(rows)s
),
forgotten AS (
    DELETE FROM event_ids AS i USING chunk AS c WHERE i.id = c.id AND i.seq = c.seq
)
SELECT c.session_id, c.timestamp, c.seq
FROM chunk AS c
ORDER BY c.session_id DESC, c.timestamp DESC, c.seq DESC
LIMIT 1
"""

SELECT_UNPARTITIONED_ONLY = """
SELECT count(*)
FROM events_unpartitioned AS u
WHERE NOT EXISTS (
    SELECT FROM events AS e
    WHERE e.session_id = u.session_id AND e.timestamp = u.timestamp AND e.seq = u.seq
)
"""

# --- Copies ---------------------------------------------------------------------------------------

# Enough to see which sessions two databases have in common, and read from indexes alone.
SELECT_TALLIES = """
SELECT
    s.session_id,
    s.known_from,
    (extract(epoch FROM s.updated_at) * 1000)::bigint,
    COALESCE(e.amount, 0),
    COALESCE(e.total, 0),
    COALESCE(t.amount, 0),
    COALESCE(t.total, 0)
FROM sessions AS s
LEFT JOIN (
    SELECT session_id, count(*) AS amount, sum(timestamp) AS total
    FROM events
    GROUP BY session_id
) AS e ON e.session_id = s.session_id
LEFT JOIN (
    SELECT
        session_id,
        count(*) AS amount,
        sum(input_tokens + output_tokens + cache_read + cache_creation) AS total
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
SELECT given.session_id, given.deleted_at
FROM unnest(%(session_ids)s::text[], %(deleted_at)s::bigint[]) AS given (session_id, deleted_at)
ON CONFLICT (session_id) DO UPDATE SET
    deleted_at = GREATEST(deleted_sessions.deleted_at, EXCLUDED.deleted_at)
"""

# --- Checks ---------------------------------------------------------------------------------------

SELECT_NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"

# Lines of schemas/postgresql-shape.txt. Left out is what differs between versions and builds of the
# server: the text of views, the compression of payloads, and the default that makes ids by hand.
SELECT_SHAPE = """
WITH relations AS (
    SELECT c.oid, c.relname AS name, c.relkind AS kind
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema()
        AND c.relname IN (
            'schema_version', 'sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger',
            'active_sessions', 'session_hierarchy'
        )
)
SELECT concat(
    'column ', r.name, '.', a.attname, ' ', format_type(a.atttypid, a.atttypmod),
    CASE WHEN a.attcollation <> t.typcollation THEN ' collate ' || k.collname END,
    CASE WHEN a.attnotnull THEN ' not null' END,
    CASE WHEN a.attidentity <> '' THEN ' identity' END,
    CASE
        WHEN r.name = 'events' AND a.attname = 'id' THEN NULL
        WHEN a.attgenerated <> '' THEN ' generated ' || pg_get_expr(d.adbin, d.adrelid)
        ELSE ' default ' || pg_get_expr(d.adbin, d.adrelid)
    END
)
FROM relations AS r
JOIN pg_attribute AS a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type AS t ON t.oid = a.atttypid
LEFT JOIN pg_collation AS k ON k.oid = a.attcollation
LEFT JOIN pg_attrdef AS d ON d.adrelid = r.oid AND d.adnum = a.attnum
UNION ALL
SELECT concat('constraint ', r.name, '.', c.conname, ' ', pg_get_constraintdef(c.oid))
FROM relations AS r JOIN pg_constraint AS c ON c.conrelid = r.oid
WHERE c.contype IN ('c', 'f', 'p', 'u')
UNION ALL
SELECT concat(
    'index ', r.name, '.', c.relname,
    CASE WHEN i.indisunique THEN ' unique' END,
    CASE WHEN NOT i.indisvalid THEN ' invalid' END,
    ' ', substring(pg_get_indexdef(i.indexrelid) FROM ' USING (.*)')
)
FROM relations AS r
JOIN pg_index AS i ON i.indrelid = r.oid
JOIN pg_class AS c ON c.oid = i.indexrelid
UNION ALL
SELECT concat('member ', t.typname, '.', e.enumlabel)
FROM pg_enum AS e JOIN pg_type AS t ON t.oid = e.enumtypid
WHERE t.oid IN (
    to_regtype('session_status'), to_regtype('monitor_event_type'), to_regtype('claude_hook_type')
)
UNION ALL
SELECT concat('trigger ', r.name, '.', g.tgname, CASE WHEN g.tgenabled <> 'O' THEN ' disabled' END)
FROM relations AS r JOIN pg_trigger AS g ON g.tgrelid = r.oid AND NOT g.tgisinternal
UNION ALL
SELECT concat('function ', p.proname, ' ', md5(p.prosrc))
FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
WHERE n.nspname = current_schema()
    AND p.proname IN (
        'get_recent_events', 'get_session_event_counts', 'prune_old_sessions',
        'update_updated_at_column', 'forget_event_ids'
    )
"""

# What the account lacks of what the library needs, and what it has beyond that.
SELECT_PRIVILEGES = """
WITH tables AS (
    SELECT c.oid, c.relname AS name, c.relowner AS owner
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema()
        AND c.relname IN (
            'schema_version', 'sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger'
        )
),
account AS (
    SELECT a.oid, a.rolsuper, a.rolcreaterole, a.rolcreatedb, a.rolreplication, a.rolbypassrls
    FROM pg_roles AS a
    WHERE a.rolname = current_user
)
SELECT 'missing', concat(p.privilege, ' on ', string_agg(t.name, ', ' ORDER BY t.name))
FROM tables AS t CROSS JOIN (VALUES ('SELECT'), ('INSERT'), ('UPDATE'), ('DELETE')) AS p (privilege)
WHERE (t.name <> 'schema_version' OR p.privilege = 'SELECT')
    AND NOT has_table_privilege(t.oid, p.privilege)
GROUP BY p.privilege
UNION ALL
SELECT 'excess', concat(p.privilege, ' on ', string_agg(t.name, ', ' ORDER BY t.name))
FROM tables AS t
CROSS JOIN (
    VALUES ('TRUNCATE'), ('REFERENCES'), ('TRIGGER'), ('SELECT WITH GRANT OPTION'),
        ('INSERT WITH GRANT OPTION'), ('UPDATE WITH GRANT OPTION'), ('DELETE WITH GRANT OPTION')
) AS p (privilege)
CROSS JOIN account AS a
WHERE NOT a.rolsuper
    AND NOT pg_has_role(t.owner, 'USAGE')
    AND has_table_privilege(t.oid, p.privilege)
GROUP BY p.privilege
UNION ALL
SELECT 'excess', concat('owner of ', string_agg(t.name, ', ' ORDER BY t.name))
FROM tables AS t CROSS JOIN account AS a
WHERE NOT a.rolsuper AND pg_has_role(t.owner, 'USAGE')
HAVING count(*) > 0
UNION ALL
SELECT 'excess', x.name
FROM account AS a
CROSS JOIN LATERAL (
    VALUES
        ('superuser', a.rolsuper),
        ('CREATEROLE', NOT a.rolsuper AND a.rolcreaterole),
        ('CREATEDB', NOT a.rolsuper AND a.rolcreatedb),
        ('REPLICATION', NOT a.rolsuper AND a.rolreplication),
        ('BYPASSRLS', NOT a.rolsuper AND a.rolbypassrls),
        (
            'CREATE in the schema',
            NOT a.rolsuper AND has_schema_privilege(current_schema(), 'CREATE')
        ),
        (
            'CREATE in the database',
            NOT a.rolsuper AND has_database_privilege(current_database(), 'CREATE')
        ),
        (
            'TEMPORARY tables in the database',
            NOT a.rolsuper AND has_database_privilege(current_database(), 'TEMPORARY')
        )
) AS x (name, given)
WHERE x.given
"""

# By name; each may be refused to an account, which is then said and no fault.
CHECKS = {
    "tls": """
        SELECT s.version, s.cipher
        FROM pg_stat_ssl AS s
        WHERE s.pid = pg_backend_pid() AND s.pid = %(pid)s AND s.ssl
    """,
    "shape": SELECT_SHAPE,
    "privileges": SELECT_PRIVILEGES,
    "settings": """
        SELECT s.name, s.setting
        FROM pg_settings AS s
        WHERE s.name IN (
            'fsync', 'full_page_writes', 'synchronous_commit', 'server_encoding',
            'standard_conforming_strings', 'TimeZone'
        )
    """,
    "packet": "SELECT WHERE FALSE",
    # The directory is told to administrators only.
    "size": """
        SELECT
            pg_database_size(current_database()),
            (SELECT s.setting FROM pg_settings AS s WHERE s.name = 'data_directory')
    """,
    # Where the last partition ends that is not the one for the rest; nothing for one table.
    "partitions": """
        SELECT max(substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \\(.(\\d+)')::bigint)
        FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
        WHERE i.inhparent = to_regclass('events')
        HAVING count(*) > 0
    """,
    # What a read of a session locks, since it may be of any time: each partition and the table they
    # are of, and all of their indexes. Then what the lock table is made for, and by what.
    "locks": """
        SELECT
            (count(*) + 1) * (
                SELECT count(*) + 1 FROM pg_index AS x WHERE x.indrelid = to_regclass('events')
            ),
            current_setting('max_locks_per_transaction')::integer,
            current_setting('max_connections')::integer
                + current_setting('max_prepared_transactions')::integer
        FROM pg_inherits AS i
        WHERE i.inhparent = to_regclass('events')
        HAVING count(*) > 0
    """,
    # The tables beside, and whether somebody who may be at work with them has the schema lock.
    "beside": f"""
        SELECT t.name, EXISTS (
            SELECT FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database
            WHERE d.datname = current_database()
                AND l.locktype = 'advisory'
                AND l.granted
                AND (l.classid::bigint << 32) + l.objid::bigint = {SCHEMA_LOCK}
        )
        FROM unnest(
            '{{events_partitioned, events_retired, events_replaced}}'::text[]
        ) AS t (name)
        WHERE to_regclass(t.name) IS NOT NULL
    """,
    "statistics": """
        SELECT s.relname, s.n_live_tup, s.n_mod_since_analyze
        FROM pg_stat_user_tables AS s
        WHERE s.schemaname = current_schema() AND s.relname IN ('sessions', 'events')
    """,
    "unused": """
        SELECT
            s.indexrelname, pg_relation_size(s.indexrelid),
            extract(epoch FROM now() - COALESCE(d.stats_reset, pg_postmaster_start_time()))::bigint
        FROM pg_stat_user_indexes AS s
        JOIN pg_index AS i ON i.indexrelid = s.indexrelid
        JOIN pg_stat_database AS d ON d.datname = current_database()
        WHERE s.schemaname = current_schema()
            AND s.relname IN ('sessions', 'events')
            AND s.idx_scan = 0
            AND NOT i.indisunique
    """,
    # Needs the extension, and its columns of PostgreSQL 13. Statements that set passwords stand in
    # it as they were sent: none but those on data are read. What a backup or an archive asks takes
    # long because it reads everything, and is known by its sums.
    "slow": """
        SELECT s.query, s.calls, s.mean_exec_time
        FROM pg_stat_statements AS s JOIN pg_database AS d ON d.oid = s.dbid
        WHERE d.datname = current_database()
            AND s.query ~* '^\\s*(select|insert|update|delete|with)\\y.*\\y(sessions|events)\\y'
            AND s.query !~* 'sha256'
        ORDER BY s.mean_exec_time DESC
        LIMIT 20
    """,
    "prepared": """
        SELECT p.gid, extract(epoch FROM now() - p.prepared)::bigint
        FROM pg_prepared_xacts AS p
        WHERE p.database = current_database()
    """,
}
SUPPORTED = (12, 18)
DURABLE = {
    "fsync": ("on",),
    "full_page_writes": ("on",),
    "synchronous_commit": ("on", "local", "remote_write", "remote_apply"),
}
WANTED = {"server_encoding": ("UTF8",), "standard_conforming_strings": ("on",), "TimeZone": ()}

# --- Backup ---------------------------------------------------------------------------------------

# The lock comes first, and takes no snapshot: where partitions change, events move as new rows,
# which a snapshot from before does not see, out of tables that do not belong to events any more.
BEGIN_SNAPSHOT: tuple[LiteralString, ...] = (
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
    "LOCK TABLE ONLY events IN ACCESS SHARE MODE",
)

EXPORT_SNAPSHOT = "SELECT pg_export_snapshot()"

#: What belongs to us, the partitions of a table not among them; what else is there is left alone.
OUR_TABLES = [
    "schema_version", "sessions", "events", "event_ids", "deleted_sessions", "token_ledger",
    "active_sessions", "session_hierarchy",
]  # fmt: skip

# As patterns for pg_dump, which takes what is in quotes literally.
SELECT_OURS = """
WITH RECURSIVE ours (oid) AS (
    SELECT c.oid
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema() AND c.relname = ANY(%(names)s)
    UNION
    SELECT i.inhrelid FROM pg_inherits AS i JOIN ours ON ours.oid = i.inhparent
)
SELECT
    '"' || replace(n.nspname, '"', '""') || '"."' || replace(c.relname, '"', '""') || '"',
    c.relkind = 'v'
FROM ours JOIN pg_class AS c USING (oid) JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v')
ORDER BY 1
"""

# Who may not use it is not told where it stands, and needs to know no more than what is in the
# table.
SELECT_SEQUENCE = """
SELECT
    '"' || replace(n.nspname, '"', '""') || '"."' || replace(c.relname, '"', '""') || '"',
    GREATEST((SELECT max(seq) FROM events), p.last_value, 0) + 1
FROM pg_depend AS d
JOIN pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
JOIN pg_class AS c ON c.oid = d.objid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pg_sequences AS p ON p.schemaname = n.nspname AND p.sequencename = c.relname
WHERE d.classid = 'pg_class'::regclass
    AND d.refobjid = to_regclass(%(table)s) AND a.attname = 'seq' AND c.relkind = 'S'
"""

SELECT_CONTENTS = """
SELECT
    current_setting('server_version'),
    current_database()::text,
    current_schema()::text,
    (SELECT count(*) FROM sessions),
    (SELECT count(*) FROM events),
    (SELECT count(*) FROM token_ledger),
    (SELECT count(*) FROM deleted_sessions),
    (SELECT sum({hash}) FROM deleted_sessions AS d)
"""

SELECT_IDS = "SELECT count(*), sum({hash}) FROM event_ids AS i"

# The first 60 bits of a SHA-256 over all columns. A row as text quotes what it must, so no two rows
# have the same; a large value in it is a hash already, or it would be written out thrice.
HASH = """
(
    'x' || left(encode(sha256(convert_to(ROW({columns})::text, 'UTF8')), 'hex'), 15)
)::bit(60)::bigint
"""
MICROSECONDS = "(extract(epoch FROM {column}) * 1000000)::bigint"

SELECT_SUMS = """
WITH e AS (
    SELECT e.session_id, count(*) AS amount, sum({event_hash}) AS total
    FROM events AS e
    GROUP BY e.session_id
),
l AS (
    SELECT l.session_id, count(*) AS amount, sum({message_hash}) AS total
    FROM token_ledger AS l
    GROUP BY l.session_id
)
SELECT
    s.session_id,
    {session_hash},
    COALESCE(e.amount, 0),
    COALESCE(e.total, 0),
    COALESCE(l.amount, 0),
    COALESCE(l.total, 0)
FROM sessions AS s
LEFT JOIN e ON e.session_id = s.session_id
LEFT JOIN l ON l.session_id = s.session_id
ORDER BY s.session_id
""".format(
    event_hash=HASH.format(
        columns="e.id, e.seq, e.session_id, e.timestamp, e.event_type, e.event_type_name, "
        "e.hook_type, e.hook_type_name, e.parent_session_id, e.machine_id, e.working_directory, "
        "e.tool_name, e.tool_use_id, sha256(convert_to(e.data::text, 'UTF8')), sha256(e.exact), "
        "e.commit_order, " + MICROSECONDS.format(column="e.created_at")
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
        "s.token_usage_cache_creation, s.known_from, s.exact, "
        + MICROSECONDS.format(column="s.created_at")
        + ", "
        + MICROSECONDS.format(column="s.updated_at")
    ),
)

HAS_ROWS = "SELECT FROM {table} LIMIT 1"

SELECT_LOCK_TIMEOUT = "SELECT current_setting('lock_timeout')"

# In the transaction that loads: whoever writes now waits, and fails on what is there then.
RESTORE_GUARD = """
SET LOCAL lock_timeout = '{timeout}';
LOCK TABLE {namespace}.sessions, {namespace}.events, {namespace}.deleted_sessions
    IN ACCESS EXCLUSIVE MODE;
DO $$
BEGIN
    IF EXISTS (SELECT FROM {namespace}.sessions)
        OR EXISTS (SELECT FROM {namespace}.deleted_sessions)
    THEN
        RAISE EXCEPTION 'somebody has written into the database meanwhile';
    END IF;
END
$$
"""

# pg_dump knows no order between partitions and what their foreign key refers to, and has the events
# first. So the key comes after all rows; where the tables were not there it has done so already.
UNTIE_EVENTS = "ALTER TABLE {namespace}.events DROP CONSTRAINT events_session_id_fkey"
TIE_EVENTS = """
DO $$
BEGIN
    ALTER TABLE {namespace}.events ADD CONSTRAINT events_session_id_fkey FOREIGN KEY (session_id)
        REFERENCES {namespace}.sessions (session_id) ON DELETE CASCADE;
EXCEPTION
    WHEN duplicate_object THEN
        NULL;
END
$$
"""

SET_SEQUENCE = "SELECT pg_catalog.setval('{sequence}', {next_seq}, FALSE)"

# Until it is analysed a table is thought to be small, and read by the wrong index.
ANALYZE = "ANALYZE {namespace}.{table}"

CREATE_SCRATCH = "CREATE DATABASE {database} TEMPLATE template0 ENCODING 'UTF8'"

# What a program that was killed has begun, as an index, goes on, and no database is dropped then.
FREE_SCRATCH = """
SELECT pg_terminate_backend(a.pid)
FROM pg_stat_activity AS a
WHERE a.datname = %(name)s AND a.usename = session_user AND a.backend_type = 'client backend'
"""

# --- Maintenance ----------------------------------------------------------------------------------

# By name; each may be refused to an account, which is then said and no fault.
SURVEY = {
    "database": "SELECT current_database()::text",
    # Of what is another account's nothing but its account and database is told, if not to those who
    # may read all: not even what kind of process it is.
    "connections": """
        SELECT
            (
                SELECT count(*)
                FROM pg_stat_activity AS a
                WHERE a.backend_type = 'client backend'
                    OR (a.backend_type IS NULL AND a.usesysid IS NOT NULL)
            ),
            current_setting('max_connections')::integer
    """,
    # Rows without seconds are others' connections.
    "transactions": """
        SELECT a.pid::text, extract(epoch FROM now() - a.xact_start)::bigint
        FROM pg_stat_activity AS a
        WHERE a.datname = current_database()
            AND (
                a.backend_type IS NULL
                OR (
                    a.backend_type = 'client backend'
                    AND a.xact_start < now() - interval '5 minutes'
                )
            )
        ORDER BY a.xact_start
    """,
    "sizes": """
        SELECT c.relname, c.reltuples::bigint, pg_table_size(c.oid), pg_indexes_size(c.oid)
        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = current_schema()
            AND c.relkind = 'r'
            AND (
                c.relname IN ('sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger')
                OR c.oid IN (
                    SELECT i.inhrelid
                    FROM pg_inherits AS i
                    WHERE i.inhparent = to_regclass('events')
                )
            )
        ORDER BY c.relname
    """,
    # What VACUUM would make free for rows to come.
    "garbage": """
        SELECT
            s.relname,
            trunc(
                s.n_dead_tup::numeric * pg_relation_size(s.relid)
                    / GREATEST(s.n_dead_tup + s.n_live_tup, 1)
            )::bigint,
            pg_relation_size(s.relid)
        FROM pg_stat_user_tables AS s
        WHERE s.schemaname = current_schema()
            AND (
                s.relname IN ('sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger')
                OR s.relid IN (
                    SELECT i.inhrelid
                    FROM pg_inherits AS i
                    WHERE i.inhparent = to_regclass('events')
                )
            )
        ORDER BY s.relname
    """,
    # Left by a test of restoring, or of one that has nobody connected just now.
    "scratch": """
        SELECT d.datname::text
        FROM pg_database AS d
        WHERE d.datname ~ '^contextuate_restore_[0-9a-f]{8}$'
            AND NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.datid = d.oid)
        ORDER BY d.datname
    """,
    # VACUUM needs no room.
    "disk": "SELECT WHERE FALSE",
    "indexes": """
        SELECT s.indexrelname, pg_relation_size(s.indexrelid), s.idx_scan
        FROM pg_stat_user_indexes AS s
        WHERE s.schemaname = current_schema()
            AND s.relname IN ('sessions', 'events', 'event_ids', 'deleted_sessions', 'token_ledger')
        ORDER BY s.indexrelname
    """,
}

# Others than the owner are told so by a warning only, and nothing is done.
SELECT_OWNS = """
SELECT pg_has_role(c.relowner, 'USAGE')
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = current_schema() AND c.relname = %(table)s
"""

REFRESH_STATISTICS = "ANALYZE {table}"

# What is free goes to rows to come: nobody waits for it, as for VACUUM FULL.
COMPACT = "VACUUM (ANALYZE) {table}"

# --- Accounts -------------------------------------------------------------------------------------

# Names of databases and roles cannot be parameters: they are put in as quoted identifiers, and
# passwords as what the server stores of them, so that no log of it ever holds one.

SELECT_DATABASE = "SELECT FROM pg_database WHERE datname = %(name)s"

SELECT_OWNER = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = %(name)s"

SELECT_ROLE = "SELECT FROM pg_roles WHERE rolname = %(name)s"

SELECT_SUPERUSER = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"

# When the password of a login was set, as its comment says, and whether it may log in. Another role
# with the name of the second login may be anybody's.
SELECT_LOGINS = """
SELECT r.rolname, COALESCE(shobj_description(r.oid, 'pg_authid'), ''), r.rolcanlogin
FROM pg_roles AS r
WHERE r.rolname = %(name)s
    OR (
        r.rolname = %(other)s
        AND EXISTS (
            SELECT
            FROM pg_auth_members AS m JOIN pg_roles AS a ON a.oid = m.roleid
            WHERE m.member = r.oid AND a.rolname = %(name)s
        )
    )
"""

CREATE_DATABASE = "CREATE DATABASE {database} OWNER {owner} TEMPLATE template0 ENCODING 'UTF8'"

DROP_DATABASE = "DROP DATABASE {database}"

CREATE_OWNER = "CREATE ROLE {owner} NOLOGIN"

# An administrator who is no superuser acts for the owner as its member.
JOIN_OWNER = "GRANT {owner} TO CURRENT_USER"

CREATE_LOGIN = "CREATE ROLE {login} LOGIN PASSWORD {password}"

SET_PASSWORD = "ALTER ROLE {login} LOGIN PASSWORD {password}"  # noqa: S105

END_LOGIN = "ALTER ROLE {login} NOLOGIN PASSWORD NULL"

# By the server's clock: administrators' own may differ, and the newest login would not be last.
SELECT_COMMENT = """
SELECT
    to_char(
        clock_timestamp() AT TIME ZONE 'UTC',
        '"password of "YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'
    )
"""

COMMENT_ON_LOGIN = "COMMENT ON ROLE {login} IS {text}"

# The other login of an account has its privileges as a member.
JOIN_ACCOUNT = "GRANT {account} TO {login}"

# Before PostgreSQL 15 everybody may create in the schema public, and its owner is not the
# database's.
CLOSED_SINCE = 150000
CLOSE_SCHEMA = (
    "GRANT USAGE, CREATE ON SCHEMA public TO {owner}",
    "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
)

# What there is besides once events is partitioned, or while it is being so. Who reads events needs
# no privilege on its partitions, but pg_dump reads each; those made later are open by themselves.
SELECT_PARTITIONED_TABLES = """
SELECT c.relname
FROM pg_class AS c
WHERE c.relnamespace = to_regnamespace(quote_ident(current_schema()))
    AND (
        c.relname IN (
            'event_ids', 'events_partitioned', 'events_retired', 'events_replaced',
            'events_unpartitioned'
        )
        OR c.oid IN (
            SELECT i.inhrelid
            FROM pg_inherits AS i
            WHERE i.inhparent IN (to_regclass('events'), to_regclass('events_partitioned'))
        )
    )
"""

# As the owner, who may grant nothing on what extensions have in the same schema. Tables of later
# migrations are open to the accounts by themselves.
GRANT_PARTITIONED_ACCESS: tuple[LiteralString, ...] = (
    "GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {application}",
    "GRANT SELECT ON {table} TO {reader}",
)
GRANT_ACCESS = (
    "REVOKE ALL ON DATABASE {database} FROM PUBLIC",
    "GRANT CONNECT ON DATABASE {database} TO {application}, {reader}",
    "GRANT USAGE ON SCHEMA public TO {application}, {reader}",
    """
    GRANT SELECT, INSERT, UPDATE, DELETE
        ON schema_version, sessions, events, deleted_sessions, token_ledger TO {application}
    """,
    "GRANT SELECT ON active_sessions, session_hierarchy TO {application}, {reader}",
    """
    GRANT SELECT
        ON schema_version, sessions, events, deleted_sessions, token_ledger TO {reader}
    """,
    """
    ALTER DEFAULT PRIVILEGES IN SCHEMA public
        GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {application}
    """,
    "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {reader}",
)

SELECT_ACCESS = """
SELECT d.datacl::text FROM pg_database AS d WHERE d.datname = current_database()
UNION ALL
SELECT n.nspacl::text FROM pg_namespace AS n WHERE n.nspname = 'public'
UNION ALL
SELECT c.relname || c.relacl::text
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = 'public' AND c.relkind IN ('r', 'p', 'v')
UNION ALL
SELECT a.defaclobjtype::text || a.defaclacl::text FROM pg_default_acl AS a
ORDER BY 1
"""

COPY_ROWS = 10

#: Of a lock that may be free, or a deadlock that may not come again.
PASSING_FAULTS = (Fault.CONFLICT, Fault.TIMEOUT, Fault.BUSY)


class RawJson(Loader):
    """Hands JSON over as the bytes that came, for orjson."""

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


class Abandoned(Exception):
    """The client ends a COPY. The server logs this name, and no word of what was refused."""


class NoAnswer(psycopg.OperationalError):
    """The server did not answer in time."""


class ImpatientConnection(psycopg.Connection[Any]):
    """A connection that gives up on a server which accepts and never answers.

    libpq waits for ever, and the server's own timeouts do not help when it is the server, or the
    network, that stands still.
    """

    patience: float = 60.0  # seconds for one answer

    def wait(self, gen: PQGen[RV], *arguments: Any, **options: Any) -> RV:
        return super().wait(self._within_patience(gen), *arguments, **options)

    def _within_patience(self, gen: PQGen[RV]) -> PQGen[RV]:
        deadline = time.monotonic() + self.patience
        try:
            state = next(gen)
            while True:
                ready = yield state
                if not ready and time.monotonic() > deadline:
                    self.pgconn.finish()  # what it may still say belongs to nobody
                    raise NoAnswer(f"the server did not answer for {self.patience:g} s")
                state = gen.send(ready)
        except StopIteration as end:
            return cast("RV", end.value)


class PostgreSQLStore(BaseStore):
    """A store in PostgreSQL 12 or newer; implements PersistenceStore."""

    backend: ClassVar[str] = "postgresql"
    _chunk_bytes = 8 * 2**20  # no limit of the server: a COPY must end within statement_timeout
    _row_bytes = 4 * payload.MAX_PAYLOAD_BYTES  # nor for one row: a payload's own limit comes first
    _row_limit_setting = "the server's memory"
    _event_bytes = 900  # 60,000 events of the benchmark took 881 besides their values

    def __init__(self, url: str, *, prepare_threshold: int | None = 5, **options: Any) -> None:
        """Take a URL or a libpq connection string; behind PgBouncer set prepare_threshold=None."""
        super().__init__(**options)
        check_quoting(url)
        try:
            given = conninfo_to_dict(url)
        except (psycopg.ProgrammingError, UnicodeError) as error:
            # libpq quotes what it does not understand, the password in it included.
            reason = str(error).splitlines()[0]
            if not reason.startswith("invalid URI query parameter"):
                reason = "malformed"
            raise ConfigurationError(f"database URL: {reason}") from None
        defaults: dict[str, Any] = {
            "client_encoding": "utf8",
            "application_name": "contextuate_persist",
        }
        self._tls = _tls(given)
        self._conninfo = make_conninfo(**defaults | given | self._tls)
        self._connection_arguments: dict[str, Any] = {
            "autocommit": True,
            "prepare_threshold": prepare_threshold,
            "connect_timeout": max(2, round(self._connect_timeout)),  # libpq takes 1 for 2
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        }
        self._place = _place(given)
        self._pool: psycopg_pool.ConnectionPool[ImpatientConnection] | None = None
        self._in_use: set[psycopg.Connection[Any]] = set()
        self._copies = True  # whether the server takes a COPY into the events
        self._event_types: frozenset[str] = frozenset()
        self._hook_types: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<PostgreSQLStore {self._place}>"

    # --- Connections ------------------------------------------------------------------------------

    def _open(self) -> None:
        # Connect once beside the pool: the pool only ever says that its time is up, not why.
        with self._connect() as connection:
            found = schema.require_version(_read_version(connection), self._place)
            self._partitioned = found.layout == "partitioned"
            self._read_types(connection)
        self._open_pool()

    def _open_pool(self) -> None:
        self._pool = psycopg_pool.ConnectionPool(
            self._conninfo,
            connection_class=ImpatientConnection,
            kwargs=self._connection_arguments,
            configure=self._configure,
            min_size=1,
            max_size=self._pool_size,
            timeout=self._pool_timeout,
            name="contextuate_persist",
            open=True,
        )

    def _connect(self) -> ImpatientConnection:
        tls.check_files(self._tls)
        try:
            connection = ImpatientConnection.connect(self._conninfo, **self._connection_arguments)
        except psycopg.Error as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if refusal := tls.refusal(reason):
                raise StoreRefused(f"{self._place}: {refusal}") from error
            # FATAL is the server's word: it was reached, and mostly it will say the same again.
            refused = "FATAL" in reason and not any(word in reason for word in PASSING)
            kind = StoreRefused if refused else StoreUnavailable
            raise kind(f"{self._place}: {reason}") from error
        except UnicodeError as error:  # of psycopg's own look-up of the host
            raise ConfigurationError(f"{self._place}: no host name: {error}") from error
        try:
            self._configure(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _configure(self, connection: ImpatientConnection) -> None:
        connection.adapters.register_loader("jsonb", RawJson)
        timeouts = {
            "statement": str(base.milliseconds(self._statement_timeout)),
            "lock": str(base.milliseconds(self._lock_timeout)),
        }
        connection.execute(SET_SESSION, timeouts)
        # A little more than the server allows itself, so that it can speak first.
        connection.patience = self._statement_timeout + 5

    def _close(self) -> None:
        if self._pool is not None:  # pragma: no branch  (in a forked child it may be)
            self._pool.close()
            self._pool = None

    def _abandon(self) -> None:  # pragma: no cover  (in a forked child)
        # Kept alive: were the pool collected, it would say goodbye on the parent's sockets.
        _abandoned.append(self._pool)
        self._pool = None
        self._in_use = set()

    def _living_pool(self) -> psycopg_pool.ConnectionPool[ImpatientConnection]:
        """The pool; a forked child makes its own when it first needs one."""
        with self._lock:
            self._check_open()
            if self._pool is None:  # pragma: no cover  (in a forked child)
                self._open_pool()
            assert self._pool is not None  # noqa: S101  (just opened)
            return self._pool

    def _discard_dead(self) -> None:
        if (pool := self._pool) is not None:  # pragma: no branch  (closed meanwhile)
            pool.check()

    @contextmanager
    def _connection(self, transaction: bool) -> Iterator[psycopg.Connection[Any]]:
        # Not pool.connection(), whose commit of nothing costs as much as all else here.
        pool = self._living_pool()
        connection = pool.getconn()
        self._in_use.add(connection)
        try:
            if transaction:
                with connection.transaction():
                    yield connection
            else:
                yield connection
        except psycopg.Error as error:
            # Its prepared statements are outdated, or it leads to a standby: and will for ever.
            read_only = isinstance(error, pg.ReadOnlySqlTransaction)
            if read_only or self._fault(error) is Fault.STALE:
                connection.close()
            raise
        finally:
            self._in_use.discard(connection)
            pool.putconn(connection)

    def _fault(self, error: Exception) -> Fault | None:
        if isinstance(error, NoAnswer):
            return Fault.TIMEOUT
        if isinstance(error, psycopg_pool.PoolTimeout | psycopg_pool.TooManyRequests):
            return Fault.BUSY
        if not isinstance(error, psycopg.Error):
            return None
        if error.sqlstate is None:
            return Fault.DATA if isinstance(error, psycopg.DataError) else Fault.LOST
        # An event without seq, or an ON CONFLICT (id) that finds no such key: not any more.
        without_seq = error.sqlstate == "23502" and error.diag.column_name == "seq"
        if without_seq or error.sqlstate == "42P10":
            return Fault.LAYOUT
        return FAULTS.get(error.sqlstate) or FAULTS.get(error.sqlstate[:2], Fault.REFUSED)

    def _words(self, error: Exception) -> str:
        # The details of a refusal quote the whole row.
        primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
        return primary or str(error)

    # --- Events -----------------------------------------------------------------------------------

    def _insert_event(self, connection: psycopg.Connection[Any], row: EventRow) -> bool:
        statement = INSERT_PARTITIONED_EVENT if self._partitioned else INSERT_EVENT
        return connection.execute(statement, self._parameters(row)).rowcount == 1

    def _insert_events(
        self, connection: psycopg.Connection[Any], rows: list[Event], undelete: bool
    ) -> int:
        changed = self._seed(connection, records.seeds_of(rows))
        touched = {"session_ids": list({row.event.session_id for row in rows})}
        if undelete:
            self._undelete(connection, touched["session_ids"])
        elif deleted := self._select_deletions(connection, touched["session_ids"]):
            base.drop_deleted(rows, deleted)
        if links := records.links_of(rows):
            family = {"children": list(links), "parents": list(links.values())}
            changed += connection.execute(LINK_PARENTS, family).rowcount
        if self._partitioned:
            return self._insert_partitioned(connection, rows, changed)
        rows = self._drop_known(connection, rows, changed)
        if not rows:
            return 0
        # In the caller's order, mostly that of time: what the indexes that time orders take then
        # comes at their right end (5 % of the time for a batch, if session follows session).
        rows.sort(key=lambda row: row.position)
        with connection.cursor() as cursor:
            if len(rows) >= COPY_ROWS and self._copies:
                self._copy(cursor, rows)
                return len(rows)
            cursor.executemany(INSERT_EVENTS, list(map(self._parameters, self._encoded(rows))))
            return base.accept_inserted(rows, cursor.rowcount, changed)

    def _insert_partitioned(
        self, connection: psycopg.Connection[Any], rows: list[Event], changed: int
    ) -> int:
        """Insert the ids, which tells at once what is new, then the events that are."""
        ids = {
            "ids": [row.id for row in rows],
            "timestamps": [row.event.timestamp for row in rows],
        }
        seqs: dict[str, int] = dict(connection.execute(INSERT_EVENT_IDS, ids).fetchall())
        new = [row for row in rows if row.id in seqs]
        if len(new) < len(rows) and changed:
            raise base.StartOver(new, repeats=True)
        if not new:
            return 0
        with connection.cursor() as cursor:
            if len(new) >= COPY_ROWS and self._copies:
                self._copy(cursor, new, seqs)
            else:
                parameters = [
                    {**self._parameters(row), "seq": seqs[row.id]} for row in self._encoded(new)
                ]
                cursor.executemany(INSERT_PARTITIONED_EVENTS, parameters)
        return len(new)

    def _copy(
        self,
        cursor: psycopg.Cursor[Any],
        rows: list[Event],
        seqs: Mapping[str, int] | None = None,
    ) -> None:
        refusal: Exception | None = None
        try:
            with cursor.copy(COPY_EVENTS if seqs is None else COPY_PARTITIONED_EVENTS) as copy:
                copy.set_types(COPY_TYPES if seqs is None else (*COPY_TYPES, "int8"))
                try:
                    for row in self._encoded(rows):
                        values = self._copied(row)
                        copy.write_row(values if seqs is None else (*values, seqs[row.id]))
                except (InvalidRecord, base.Oversized) as error:
                    refusal = error
                    raise Abandoned from None
        except Abandoned:
            assert refusal is not None  # noqa: S101  (set where it is raised)
            raise refusal from None
        except pg.UniqueViolation as error:
            if error.diag.constraint_name != "events_pkey":
                raise
            raise base.StartOver(repeats=True) from None
        except pg.FeatureNotSupported:  # somebody has put policies for rows on the table
            self._copies = False
            raise base.StartOver(repeats=True) from None

    def _copied(self, row: EventRow) -> tuple[Any, ...]:
        event = row.event
        known_event = event.event_type in self._event_types
        known_hook = event.hook_type in self._hook_types
        return (
            bytes.fromhex(row.id.replace("-", "")),
            event.session_id,
            event.timestamp,
            event.event_type if known_event else "other",
            None if known_event else event.event_type,
            event.hook_type if known_hook else "other",
            None if known_hook else event.hook_type,
            event.parent_session_id,
            event.machine_id,
            row.working_directory,
            row.tool_name,
            row.tool_use_id,
            b"\x01" + row.data,
            row.exact,
        )

    def _select_known_ids(
        self, connection: psycopg.Connection[Any], rows: list[Event]
    ) -> list[str]:
        if not self._partitioned:
            # A store that does not know it yet would read all partitions.
            self._partitioned = _is_partitioned(connection)
        ids = {"ids": [row.id for row in rows]}
        statement = SELECT_KNOWN_PARTITIONED_IDS if self._partitioned else SELECT_KNOWN_IDS
        return [row[0] for row in connection.execute(statement, ids)]

    def _seed(self, connection: psycopg.Connection[Any], seeds: list[Seed]) -> int:
        columns = [list(column) for column in zip(*seeds, strict=True)]
        names = (
            "session_ids",
            "machine_ids",
            "working_directories",
            "start_times",
            "known_from",
            "exact",
        )
        return connection.execute(SEED_SESSIONS, dict(zip(names, columns, strict=True))).rowcount

    def _parameters(self, row: EventRow) -> dict[str, Any]:
        event = row.event
        known_event = event.event_type in self._event_types
        known_hook = event.hook_type in self._hook_types
        return {
            "id": row.id,
            "session_id": event.session_id,
            "timestamp": event.timestamp,
            "event_type": event.event_type if known_event else "other",
            "event_type_name": None if known_event else event.event_type,
            "hook_type": event.hook_type if known_hook else "other",
            "hook_type_name": None if known_hook else event.hook_type,
            "parent_session_id": event.parent_session_id,
            "machine_id": event.machine_id,
            "working_directory": row.working_directory,
            "tool_name": row.tool_name,
            "tool_use_id": row.tool_use_id,
            "data": Jsonb(row.data, dumps=bytes),
            "exact": row.exact,
        }

    def _select_events(
        self,
        connection: psycopg.Connection[Any],
        filters: Mapping[str, Any],
        newest_first: bool,
        limit: int,
        large_later: bool = False,
    ) -> list[Any]:
        clauses = [EVENT_CLAUSES[name] for name in filters if name in EVENT_CLAUSES]
        branches = [clauses]
        for name, types in (("event_type", "_event_types"), ("hook_type", "_hook_types")):
            if name in filters:
                member, by_name = TYPE_CLAUSES[name]
                if filters[name] not in getattr(self, types):
                    self._read_types(connection)  # an upgrade may have added it meanwhile
                known = filters[name] in getattr(self, types)
                choices = [member, by_name] if known else [by_name]
                branches = [[*branch, choice] for branch in branches for choice in choices]
        parameters: dict[str, Any] = {**filters, "limit": limit}
        # A limit that it does not know the server takes for a tenth of the rows, and so plans each
        # call anew: with the partitions of a year 0.6 of 2.5 ms, with a single table nothing to
        # speak of. For a session it must: where partitions have few, a plan for any session goes by
        # time, and of one that is not in the newest ones reads all of these.
        count = str(limit) if self._partitioned and not filters else "%(limit)s"
        if "contains" in filters:
            inside, outside = CONTAINS_CLAUSES
            contains = dict(filters["contains"])
            parameters["contains"] = Jsonb(payload.encode(contains).json, dumps=bytes)
            small = {key: value for key, value in contains.items() if key not in BIG_KEYS}
            if small:
                inside = CONTAINS_INDEXED + inside
                parameters["contains_indexed"] = Jsonb(payload.encode(small).json, dumps=bytes)
            branches = [[*branch, choice] for branch in branches for choice in (inside, outside)]
        for bound in ("before", "after"):
            if bound in filters:
                parameters[f"{bound}_timestamp"], parameters[f"{bound}_seq"] = filters[bound]
        direction = "DESC" if newest_first else "ASC"
        tail = f"ORDER BY timestamp {direction}, seq {direction} LIMIT {count}"
        select = SELECT_EVENTS_SMALL if large_later else SELECT_EVENTS
        queries = [
            select + (f"WHERE {' AND '.join(branch)} " if branch else "") + tail
            for branch in branches
        ]
        query = queries[0] if len(queries) == 1 else f"({') UNION ALL ('.join(queries)}) {tail}"
        # A plan made once for any value would, for a rare one, walk all events (20 ms instead of
        # 0.5 among 100,000), unless a session or a call bounds it.
        bounded = not filters or {"session_id", "tool_use_id"} & filters.keys()
        prepare = None if bounded else False
        return connection.execute(query, parameters, prepare=prepare).fetchall()

    def _select_events_of(
        self, connection: psycopg.Connection[Any], ids: list[str], limit: int
    ) -> list[Any]:
        asked = {"session_ids": ids, "limit": limit}
        return connection.execute(SELECT_EVENTS_OF, asked).fetchall()

    def _select_event(
        self, connection: psycopg.Connection[Any], session_id: str, event_id: str
    ) -> Any:
        parameters = {"id": event_id, "session_id": session_id}
        statement = SELECT_PARTITIONED_EVENT if self._partitioned else SELECT_EVENT
        return connection.execute(statement, parameters).fetchone()

    def _count_events(
        self, connection: psycopg.Connection[Any], session_id: str | None
    ) -> list[Any]:
        if session_id is None:
            return connection.execute(COUNT_EVENTS).fetchall()
        return connection.execute(COUNT_SESSION_EVENTS, {"session_id": session_id}).fetchall()

    def _read_types(self, connection: psycopg.Connection[Any]) -> None:
        rows = connection.execute(SELECT_TYPES).fetchall()
        self._event_types = frozenset(name for kind, name in rows if kind == "monitor_event_type")
        self._hook_types = frozenset(name for kind, name in rows if kind == "claude_hook_type")

    # --- Sessions ---------------------------------------------------------------------------------

    def _upsert_sessions(
        self, connection: psycopg.Connection[Any], sessions: list[dict[str, Any]]
    ) -> int:
        if len(sessions) == 1:
            return connection.execute(SAVE_SESSION, sessions[0]).rowcount
        with connection.cursor() as cursor:
            cursor.executemany(SAVE_SESSION, sessions)
            return cursor.rowcount

    def _select_deletions(
        self, connection: psycopg.Connection[Any], ids: list[str]
    ) -> dict[str, int]:
        return dict(connection.execute(SELECT_DELETIONS, {"session_ids": ids}).fetchall())

    def _select_shown(self, connection: psycopg.Connection[Any], ids: list[str]) -> list[str]:
        return [row[0] for row in connection.execute(SELECT_SHOWN, {"session_ids": ids})]

    def _undelete(self, connection: psycopg.Connection[Any], ids: list[str]) -> None:
        connection.execute(UNDELETE_SESSIONS, {"session_ids": ids})

    def _select_sessions(
        self, connection: psycopg.Connection[Any], filters: Mapping[str, Any], limit: int | None
    ) -> list[Any]:
        clauses = ["s.known_from <> 'reference'", *(SESSION_CLAUSES[name] for name in filters)]
        query = (
            f"{SELECT_SESSIONS} WHERE {' AND '.join(clauses)} "
            "ORDER BY s.start_time DESC, s.session_id DESC"
        )
        if limit is not None:
            query += " LIMIT %(limit)s"
        return connection.execute(query, {**filters, "limit": limit}).fetchall()

    def _select_subtree(self, connection: psycopg.Connection[Any], session_id: str) -> list[Any]:
        return connection.execute(SELECT_SUBTREE, {"session_id": session_id}).fetchall()

    def _update_session(
        self, connection: psycopg.Connection[Any], session_id: str, values: dict[str, Any]
    ) -> bool:
        clauses = [UPDATE_CLAUSES[name] for name in values]
        if FIRM_COLUMNS & values.keys():
            clauses.append("known_from = 'session'")
        if parent := values.get("parent_session_id"):
            named = {"session_id": session_id, "session_ids": sorted({session_id, parent})}
            connection.execute(REFER_TO_PARENT, named)
        where = "WHERE session_id = %(session_id)s AND known_from <> 'reference'"
        statement = (
            f"UPDATE sessions SET {', '.join(clauses)} {where}"
            if clauses
            else f"SELECT session_id FROM sessions {where}"
        )
        return connection.execute(statement, {**values, "session_id": session_id}).rowcount == 1

    def _lock_sessions(self, connection: psycopg.Connection[Any], ids: list[str]) -> list[str]:
        return [row[0] for row in connection.execute(LOCK_SESSIONS, {"session_ids": ids})]

    def _hold_sessions(self, connection: psycopg.Connection[Any], ids: list[str]) -> None:
        connection.execute(HOLD_SESSIONS, {"session_ids": ids})

    def _select_owners(self, connection: psycopg.Connection[Any], ids: list[str]) -> list[str]:
        return [row[0] for row in connection.execute(SELECT_OWNERS, {"message_ids": ids})]

    def _upsert_usage(
        self, connection: psycopg.Connection[Any], session_id: str, messages: list[MessageUsage]
    ) -> int:
        columns = [list(column) for column in zip(*records.usage_rows(messages), strict=True)]
        names = ("message_ids", "timestamps", "models", *model.USAGE_COUNTS)
        given = dict(zip(names, columns, strict=True))
        return connection.execute(SAVE_USAGE, {"session_id": session_id, **given}).rowcount

    def _set_totals(self, connection: psycopg.Connection[Any], ids: list[str]) -> None:
        connection.execute(SET_TOTALS, {"session_ids": ids})

    def _delete_session(self, connection: psycopg.Connection[Any], session_id: str) -> bool:
        family = connection.execute(LOCK_FAMILY, {"session_id": session_id}).fetchall()
        if (session_id,) not in family:
            return False
        connection.execute(ORPHAN_CHILDREN, {"session_id": session_id})
        return self._delete_locked(connection, [session_id]) == 1

    def _delete_sessions(self, connection: psycopg.Connection[Any], ids: list[str]) -> int:
        self._lock_sessions(connection, ids)
        connection.execute(ORPHAN_WARDS, {"session_ids": ids})
        return self._delete_locked(connection, ids)

    def _delete_locked(self, connection: psycopg.Connection[Any], ids: list[str]) -> int:
        # A mere reference leaves no trace: whoever lists its id goes on listing it.
        shown = self._select_shown(connection, ids)
        if shown:
            connection.execute(UNLIST_CHILDREN, {"session_ids": shown})
            connection.execute(REMEMBER_DELETIONS, {"session_ids": shown})
        self._delete_many_events(connection, ids)
        connection.execute(DELETE_SESSIONS, {"session_ids": ids})
        return len(shown)

    def _has_many_events(
        self, connection: psycopg.Connection[Any], ids: list[str], many: int
    ) -> bool:
        asked = {"session_ids": ids, "many": many}
        return connection.execute(HAS_MANY_EVENTS, asked).fetchone() is not None

    def _select_session_ids(self, connection: psycopg.Connection[Any]) -> list[str]:
        return [row[0] for row in connection.execute(SELECT_SESSION_IDS)]

    def _forget_deletions(self, connection: psycopg.Connection[Any], age: int) -> None:
        connection.execute(FORGET_DELETIONS, {"age": age})

    # --- Forgetting -------------------------------------------------------------------------------

    def _select_places(
        self, connection: psycopg.Connection[Any], filters: Mapping[str, Any]
    ) -> list[Any]:
        query = SELECT_PLACES + "".join(f"AND {SESSION_CLAUSES[name]} " for name in filters)
        return connection.execute(query, filters).fetchall()

    def _select_below(self, connection: psycopg.Connection[Any], ids: list[str]) -> list[Any]:
        return connection.execute(SELECT_BELOW, {"session_ids": ids}).fetchall()

    def _count_belongings(
        self, connection: psycopg.Connection[Any], ids: list[str]
    ) -> Counter[str]:
        [counts] = connection.execute(COUNT_BELONGINGS, {"session_ids": ids}).fetchall()
        return Counter(dict(zip(("sessions", "events", "messages"), counts, strict=True)))

    def _remember_forgotten(self, connection: psycopg.Connection[Any], ids: list[str]) -> None:
        connection.execute(REMEMBER_FORGOTTEN, {"session_ids": ids})

    def _delete_some_events(
        self, connection: psycopg.Connection[Any], ids: list[str], limit: int
    ) -> int:
        self._partitioned = self._partitioned or _is_partitioned(connection)
        statement = DELETE_SOME_PARTITIONED_EVENTS if self._partitioned else DELETE_SOME_EVENTS
        return connection.execute(statement, {"session_ids": ids, "limit": limit}).rowcount

    def _delete_some_copies(
        self, connection: psycopg.Connection[Any], ids: list[str], limit: int
    ) -> int:
        beside = self._select_beside(connection)
        parameters = {"session_ids": ids, "limit": limit}
        if partitions.UNPARTITIONED in beside:
            return connection.execute(DELETE_SOME_UNPARTITIONED_EVENTS, parameters).rowcount
        if partitions.COPIES in beside:
            return connection.execute(DELETE_SOME_PARTITIONED_COPIES, parameters).rowcount
        return 0

    def _unname_parents(
        self, connection: psycopg.Connection[Any], ids: list[str], limit: int
    ) -> int:
        parameters = {"session_ids": ids, "limit": limit}
        old = 0
        if self._has_old_table(connection):
            old = connection.execute(UNNAME_UNPARTITIONED_PARENTS, parameters).rowcount
        statement = UNNAME_PARTITIONED_PARENTS if self._partitioned else UNNAME_PARENTS
        return max(old, connection.execute(statement, parameters).rowcount)

    def _lock_kin(self, connection: psycopg.Connection[Any], ids: list[str]) -> None:
        connection.execute(LOCK_KIN, {"session_ids": ids})

    def _select_children(self, connection: psycopg.Connection[Any], ids: list[str]) -> list[str]:
        return [row[0] for row in connection.execute(SELECT_CHILDREN, {"session_ids": ids})]

    def _delete_kin(self, connection: psycopg.Connection[Any], ids: list[str]) -> None:
        connection.execute(UNLIST_CHILDREN, {"session_ids": ids})
        connection.execute(DELETE_SESSIONS, {"session_ids": ids})

    def _select_heads(
        self, connection: psycopg.Connection[Any], filters: Mapping[str, Any], limit: int
    ) -> list[Any]:
        clauses = [EVENT_CLAUSES[name] for name in filters]
        parameters: dict[str, Any] = {**filters, "limit": limit}
        if "after" in filters:
            parameters["after_timestamp"], parameters["after_seq"] = filters["after"]
        query = (
            SELECT_HEADS
            + (f"WHERE {' AND '.join(clauses)} " if clauses else "")
            + "ORDER BY e.timestamp, e.seq LIMIT %(limit)s"
        )
        return connection.execute(query, parameters).fetchall()

    def _delete_events(self, connection: psycopg.Connection[Any], ids: list[str]) -> int:
        if self._has_old_table(connection):
            connection.execute(DELETE_UNPARTITIONED_EVENTS, {"ids": ids})
        statement = DELETE_PARTITIONED_EVENTS if self._partitioned else DELETE_EVENTS
        return connection.execute(statement, {"ids": ids}).rowcount

    def _select_beside(self, connection: psycopg.Connection[Any]) -> set[str]:
        self._partitioned = self._partitioned or _is_partitioned(connection)
        return {row[0] for row in connection.execute(SELECT_BESIDE)}

    def _select_copies(self, connection: psycopg.Connection[Any]) -> list[str]:
        return [row[0] for row in connection.execute(SELECT_COPIES)]

    def _empty_copies(self, connection: psycopg.Connection[Any], ids: list[str]) -> None:
        self._lock_sessions(connection, ids)
        connection.execute(EMPTY_COPIES, {"session_ids": ids})

    # --- Retention --------------------------------------------------------------------------------

    def _select_states(
        self, connection: psycopg.Connection[Any], after: str, limit: int
    ) -> list[Any]:
        return connection.execute(SELECT_STATES, {"after": after, "limit": limit}).fetchall()

    def _select_states_of(self, connection: psycopg.Connection[Any], ids: list[str]) -> list[Any]:
        return connection.execute(SELECT_STATES_OF, {"session_ids": ids}).fetchall()

    def _select_links(self, connection: psycopg.Connection[Any], ids: list[str]) -> list[Any]:
        return connection.execute(SELECT_LINKS, {"session_ids": ids}).fetchall()

    def _select_weights(self, connection: psycopg.Connection[Any], ids: list[str]) -> list[Any]:
        return connection.execute(SELECT_WEIGHTS, {"session_ids": ids}).fetchall()

    def _select_fingerprints(
        self, connection: psycopg.Connection[Any], ids: list[str], with_events: bool
    ) -> list[Any]:
        query = SELECT_FINGERPRINTS if with_events else SELECT_FINGERPRINTS_BUT_EVENTS
        return connection.execute(query, {"session_ids": ids}).fetchall()

    def _select_slice(
        self,
        connection: psycopg.Connection[Any],
        what: Sliced,
        session_id: str,
        after: Cursor,
        limit: int,
    ) -> list[Any]:
        place = {"after_timestamp": after.timestamp, "after_seq": after.seq}
        asked = {"session_id": session_id, **place, "limit": limit}
        with connection.transaction():  # a savepoint in one: a timeout undoes no more than this
            return connection.execute(SELECT_SLICES[what], asked).fetchall()

    def _joined(self, hashes: Iterable[Any]) -> str:
        count = 0
        joined = hashlib.md5(usedforsecurity=False)
        for one in hashes:
            count += 1
            joined.update(one.encode())
        return f"{count} {joined.hexdigest()}" if count else "0"

    def _select_usage(self, connection: psycopg.Connection[Any], session_id: str) -> list[Any]:
        return connection.execute(SELECT_USAGE, {"session_id": session_id}).fetchall()

    def _select_size(self, connection: psycopg.Connection[Any]) -> int:
        return int(connection.execute(SELECT_SIZE).fetchall()[0][0])

    # --- Server -----------------------------------------------------------------------------------

    def _health(self, connection: psycopg.Connection[Any]) -> Health:
        start = time.perf_counter()
        version = _read_version(connection)
        latency = time.perf_counter() - start
        found = schema.require_version(version, self._place)
        self._partitioned = found.layout == "partitioned"
        return Health(
            backend=self.backend,
            server_version=connection.info.parameter_status("server_version") or "unknown",
            driver=f"psycopg {psycopg.__version__}",
            driver_implementation=psycopg.pq.__impl__,
            schema_version=found.version,
            schema_layout=found.layout,
            latency_ms=round(latency * 1000, 3),
            pool_size=self._pool_size,
            pool_in_use=len(self._in_use),  # the pool also counts connections that it still makes
        )

    def _examine(self) -> doctor.Seen:
        with self._connect() as connection:
            start = time.perf_counter()
            server_now = self._select_now(connection)
            latency = time.perf_counter() - start
            parameters = connection.info.get_parameters()
            version = _read_version(connection)
            return doctor.Seen(
                place=self._place,
                local=is_local(connection.info.hostaddr or connection.info.host),
                tls=parameters,
                server=connection.info.parameter_status("server_version") or "0",
                supported=SUPPORTED,
                driver=f"psycopg {psycopg.__version__}",
                implementation=psycopg.pq.__impl__,
                pool_size=self._pool_size,
                latency_ms=latency * 1000,
                clock_ms=server_now - (time.time() - latency / 2) * 1000,
                version=version,
                shape=schema.read_shape(self.backend, schema.layout_of(version)),
                durable=DURABLE,
                wanted=WANTED,
                answers={name: _answer(connection, query) for name, query in CHECKS.items()},
            )

    def _select_now(self, connection: psycopg.Connection[Any]) -> int:
        now: int = connection.execute(SELECT_NOW).fetchall()[0][0]
        return now

    def _select_tallies(self, connection: psycopg.Connection[Any]) -> list[Any]:
        return connection.execute(SELECT_TALLIES).fetchall()

    def _select_all_deletions(self, connection: psycopg.Connection[Any]) -> list[Any]:
        return connection.execute(SELECT_ALL_DELETIONS).fetchall()

    def _add_deletions(
        self, connection: psycopg.Connection[Any], deletions: list[tuple[str, int]]
    ) -> None:
        ids, times = map(list, zip(*deletions, strict=True))
        connection.execute(ADD_DELETIONS, {"session_ids": ids, "deleted_at": times})

    def _run_statements(self, connection: psycopg.Connection[Any], statements: list[str]) -> None:
        for statement in statements:
            connection.execute(statement)

    @contextmanager
    def _schema_session(self, timeout: float) -> Iterator[PostgreSQLSchema]:
        with self._connect() as connection:
            deadline = time.monotonic() + timeout
            # Polled, not waited for: a waiting lock is an open snapshot, and stops CREATE INDEX
            # CONCURRENTLY of whoever holds it.
            while not connection.execute(LOCK_SCHEMA, {"key": SCHEMA_LOCK}).fetchall()[0][0]:
                if time.monotonic() > deadline:
                    raise StoreUnavailable(f"{self._place}: another process changes the schema")
                time.sleep(0.05)
            # A migration may take hours; only its waiting for locks stays bounded, since an ALTER
            # that waits stops every later writer.
            connection.execute(ALLOW_LONG_STATEMENTS)
            connection.patience = float("inf")
            try:
                yield PostgreSQLSchema(connection, self._place)
            except psycopg.Error as error:
                raise self._error(self._fault(error) or Fault.REFUSED, error) from error

    @contextmanager
    def _partition_session(self, timeout: float) -> Iterator[PostgreSQLPartitions]:
        with self._schema_session(timeout) as session:
            connection = session.connection
            found = schema.require_version(_read_version(connection), self._place)
            owner, member, present = connection.execute(SELECT_EVENTS_OWNER).fetchall()[0]
            if not member:
                raise StoreRefused(
                    f"{self._place}: partitions are made by the owner of the table events, {owner}"
                )
            if not present:  # what is made belongs to the owner, too
                connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(owner)))
            self._partitioned = found.layout == "partitioned"
            yield PostgreSQLPartitions(connection, self)

    @contextmanager
    def _administration(self, names: Names) -> Iterator[PostgreSQLAdministrator]:
        def opened(role: str) -> PostgreSQLStore:
            # What libpq hands on word by word: spaces and backslashes would end a word.
            quoted = re.sub(r"([\\ ])", r"\\\1", role)
            options = {"options": f"-c role={quoted}"} if role else {}
            conninfo = make_conninfo(self._conninfo, dbname=names.database, **options)
            return PostgreSQLStore(conninfo)

        with self._connect() as connection:
            # A big database is made and dropped on a busy disk in more than a statement's time.
            connection.patience = float("inf")
            connection.execute(ALLOW_LONG_STATEMENTS)
            try:
                yield PostgreSQLAdministrator(connection, names, self._place, opened)
            except psycopg.Error as error:
                raise self._error(self._fault(error) or Fault.REFUSED, error) from error

    # --- Maintenance ------------------------------------------------------------------------------

    def _survey(self) -> dict[str, doctor.Rows | None]:
        with self._connect() as connection:
            return {name: _answer(connection, query) for name, query in SURVEY.items()}

    def _refresh_statistics(self, table: str) -> None:
        self._tend(REFRESH_STATISTICS, table)

    def _compact(self, table: str) -> None:
        self._tend(COMPACT, table)

    def _tend(self, statement: LiteralString, table: str) -> None:
        with self._connect() as connection:
            if connection.execute(SELECT_OWNS, {"table": table}).fetchall() != [(True,)]:
                raise StoreRefused(f"{self._place}: table {table} is not this account's")
            connection.execute(ALLOW_LONG_STATEMENTS)
            connection.patience = float("inf")
            connection.execute(sql.SQL(statement).format(table=sql.Identifier(table)))

    # --- Backup -----------------------------------------------------------------------------------

    @contextmanager
    def _snapshot(self) -> Iterator[PostgreSQLSnapshot]:
        with self._connect() as connection:
            connection.execute(ALLOW_LONG_STATEMENTS)
            connection.patience = float("inf")
            try:
                schema.require_version(_read_version(connection), self._place)
                for statement in BEGIN_SNAPSHOT:
                    connection.execute(statement)
                yield PostgreSQLSnapshot(connection, self._place)
            except psycopg.Error as error:
                raise self._error(self._fault(error) or Fault.REFUSED, error) from error

    def _dumper(self, server: str, made_by: str) -> Dumper:
        arguments = conninfo_to_dict(self._conninfo)
        public: dict[str, Any] = {
            name: text for name, text in arguments.items() if name != "password"
        }
        if arguments.get("password"):
            public.pop("passfile", None)
        return PostgreSQLDumper(arguments, make_conninfo(**public), server, made_by)

    @contextmanager
    def _scratch(self, name: str) -> Iterator[BaseStore]:
        names = {"database": sql.Identifier(name)}
        with self._connect() as connection:
            connection.patience = float("inf")
            connection.execute(ALLOW_LONG_STATEMENTS)
            try:
                connection.execute(sql.SQL(CREATE_SCRATCH).format(**names))
                try:
                    yield PostgreSQLStore(make_conninfo(self._conninfo, dbname=name))
                finally:
                    connection.execute(FREE_SCRATCH, {"name": name})
                    connection.execute(sql.SQL(DROP_DATABASE).format(**names))
            except psycopg.Error as error:
                raise self._error(self._fault(error) or Fault.REFUSED, error) from error


class PostgreSQLSnapshot:
    """A transaction that sees one moment; implements Snapshot."""

    def __init__(self, connection: psycopg.Connection[Any], place: str) -> None:
        self._connection = connection
        self._place = place
        # The first statement of the transaction that takes a snapshot.
        self.name: str | None = connection.execute(EXPORT_SNAPSHOT).fetchall()[0][0]

    def contents(self) -> Contents:
        found = schema.require_version(_read_version(self._connection), self._place)
        # A conversion that is not through yet has made event_ids, which the plain layout lacks.
        partitioned = found.layout == "partitioned"
        names = [name for name in OUR_TABLES if partitioned or name != "event_ids"]
        tables = self._connection.execute(SELECT_OURS, {"names": names}).fetchall()
        query = SELECT_CONTENTS.format(hash=HASH.format(columns="d.session_id, d.deleted_at"))
        row = self._connection.execute(query.encode()).fetchall()[0]
        table = {"table": "event_ids" if partitioned else "events"}
        sequence, next_seq = self._connection.execute(SELECT_SEQUENCE, table).fetchall()[0]
        ids: tuple[Any, ...] = (0, 0)
        if partitioned:
            query = SELECT_IDS.format(hash=HASH.format(columns="i.id, i.seq, i.timestamp"))
            ids = self._connection.execute(query.encode()).fetchall()[0]
        return Contents(
            server=row[0],
            database=row[1],
            version=found.version,
            layout=found.layout,
            namespace=row[2],
            tables=tuple(name for name, is_view in tables if not is_view),
            views=tuple(name for name, is_view in tables if is_view),
            sequence=sequence,
            next_seq=next_seq,
            sessions=row[3],
            events=row[4],
            messages=row[5],
            deletions=row[6],
            deletions_sum=int(row[7] or 0),
            ids=ids[0],
            ids_sum=int(ids[1] or 0),
        )

    def sums(self) -> Iterator[Sums]:
        with self._connection.cursor(name="sums") as cursor:
            cursor.itersize = 1000
            cursor.execute(SELECT_SUMS.encode())
            for session_id, row, events, total, messages, messages_total in cursor:
                yield Sums(session_id, row, events, int(total), messages, int(messages_total))


class PostgreSQLSchema:
    """The catalogue of a database, under the schema lock; implements SchemaSession."""

    backend = PostgreSQLStore.backend

    def __init__(self, connection: psycopg.Connection[Any], place: str) -> None:
        self.connection = connection
        self.place = place

    def read_version(self) -> schema.SchemaVersion | None:
        return _read_version(self.connection)

    def read_checksums(self) -> dict[int, str | None]:
        return dict(self.connection.execute(SELECT_CHECKSUMS).fetchall())

    def read_columns(self) -> dict[str, set[str]]:
        return base.by_table(self.connection.execute(SELECT_COLUMNS).fetchall())

    def holds(self, query: str) -> bool:
        return self.connection.execute(query).fetchone() is not None

    def run(self, statement: str) -> None:
        self.connection.execute(statement)

    def has_rows(self, table: str) -> bool:
        statement = sql.SQL(HAS_ROWS).format(table=sql.Identifier(table))
        return self.connection.execute(statement).fetchone() is not None

    def around(self, contents: Contents) -> tuple[list[str], list[str]]:
        words = {
            "timeout": self.connection.execute(SELECT_LOCK_TIMEOUT).fetchall()[0][0],
            "namespace": sql.Identifier(contents.namespace).as_string(None),
            "sequence": contents.sequence.replace("'", "''"),
            "next_seq": contents.next_seq,
        }
        before, after = [RESTORE_GUARD], [SET_SEQUENCE]
        if contents.layout == "partitioned":
            before.append(UNTIE_EVENTS)
            after.append(TIE_EVENTS)
        analyze = [ANALYZE.format(table=table, **words) for table in ("sessions", "events")]
        return (
            [one.format(**words) for one in before],
            [*(one.format(**words) for one in after), *analyze],
        )

    def record(self, version: int, name: str, checksum: str | None) -> None:
        row = {"version": version, "name": name, "checksum": checksum}
        self.connection.execute(RECORD_VERSION, row)

    def transaction(self) -> AbstractContextManager[object]:
        return self.connection.transaction()


class PostgreSQLPartitions:
    """The partitions of events, under the schema lock; implements PartitionSession."""

    def __init__(self, connection: psycopg.Connection[Any], store: PostgreSQLStore) -> None:
        self.place = store._place  # noqa: SLF001  (a store's other half)
        self.longest_wait = 0.0
        self._lock_ms = SHORTEST_LOCK_MS
        self._connection = connection
        self._store = store

    def passing(self, error: Exception) -> bool:
        return self._store._fault(error) in PASSING_FAULTS  # noqa: SLF001

    def is_partitioned(self) -> bool:
        return _is_partitioned(self._connection)

    def read_partitions(self, *, aside: bool = False) -> list[Partition]:
        table = {"table": "events_partitioned" if aside else "events"}
        return [Partition(*row) for row in self._connection.execute(SELECT_PARTITIONS, table)]

    def first_event(self) -> int | None:
        [(first,)] = self._connection.execute(SELECT_FIRST_EVENT).fetchall()
        return cast("int | None", first)

    def attached(self) -> list[str]:
        shape = [line for (line,) in self._connection.execute(SELECT_SHAPE)]
        added = schema.additions(PostgreSQLStore.backend, "events", shape) - {SEQ_INDEX}
        return sorted(added.union(told for (told,) in self._connection.execute(SELECT_ATTACHED)))

    # --- Converting -------------------------------------------------------------------------------

    def prepare(self, spans: Sequence[Span]) -> None:
        script = schema.schema_file("postgresql-partitioned.sql").read_text(encoding="utf-8")
        *tables, foreign_key = schema.split_script(script, PostgreSQLStore.backend)
        if not self._has("events_partitioned"):
            with self._connection.transaction():
                for statement in tables:
                    self._connection.execute(statement)
                table = "events_partitioned"
                self._create(OLDEST, None, spans[0].start, table)
                self._create_following(spans, table)
                self._connection.execute(GRANT_AS_EVENTS)
        if not self._foreign_keys("events_partitioned"):
            with self._locked("LOCK TABLE sessions IN SHARE ROW EXCLUSIVE MODE"):
                self._connection.execute(foreign_key)
        valid = self._connection.execute(SELECT_SEQ_INDEX).fetchone()
        if valid is None or not valid[0]:
            with self._unhurried():
                self._connection.execute(DROP_SEQ_INDEX)
                self._connection.execute(CREATE_SEQ_INDEX)

    def _create_following(self, spans: Sequence[Span], table: str = "events") -> None:
        for span in spans:
            self._create(_name_of(span), span.start, span.end, table)
        self._create(LAST, spans[-1].end, None, table)

    def _create(self, name: str, start: int | None, end: int | None, table: str = "events") -> None:
        self._execute(
            CREATE_PARTITION,
            name=sql.Identifier(name),
            table=sql.Identifier(table),
            start=sql.SQL("MINVALUE") if start is None else sql.Literal(start),
            end=sql.SQL("MAXVALUE") if end is None else sql.Literal(end),
        )
        self._execute(GRANT_READING, name=sql.Literal(name))

    def copied(self) -> int:
        return int(self._connection.execute(SELECT_COPIED).fetchall()[0][0])

    def watermark(self) -> int:
        # The lock waits for everybody who is storing: what is unseen afterwards has a higher seq.
        with self._locked("LOCK TABLE events IN SHARE MODE"):
            return int(self._connection.execute(SELECT_LAST_SEQ).fetchall()[0][0])

    def copy(self, after: int, upto: int, rows: int) -> tuple[int, int]:
        bounds = {"after": after, "upto": upto, "rows": rows}
        [(copied, last)] = self._connection.execute(SELECT_CHUNK, bounds).fetchall()
        if not copied:
            return 0, upto
        with self._connection.transaction():
            self._connection.execute(LOCK_CHUNK, {"after": after, "upto": last})
            self._copy_chunk(after, last)
        return copied, last

    def _copy_chunk(self, after: int, upto: int) -> int:
        return self._connection.execute(COPY_CHUNK, {"after": after, "upto": upto}).rowcount

    def refresh(self) -> None:
        with self._unhurried():
            self._connection.execute("VACUUM (ANALYZE) events_partitioned")
            self._connection.execute("VACUUM (ANALYZE) event_ids")

    def compare(self, upto: int) -> list[tuple[str, int, int]]:
        return self._connection.execute(COMPARE_COPIES, {"upto": upto}).fetchall()

    def purge(self, ids: Sequence[str]) -> None:
        self._connection.execute(PURGE_COPIES, {"session_ids": list(ids)})

    def switch(self, after: int) -> int:
        # Not sessions, which whoever stores an event locks before it or after it: a session that is
        # deleted meanwhile takes its events out of both tables, by a foreign key of each.
        with self._locked("LOCK TABLE events, events_partitioned IN ACCESS EXCLUSIVE MODE"):
            [(last,)] = self._connection.execute(SELECT_LAST_SEQ).fetchall()
            copied = self._copy_chunk(after, last)
            self._connection.execute(GO_ON_COUNTING)
            self._connection.execute(SWAP_TABLES)
            self._connection.execute(RECORD_LAYOUT)
        return copied

    def record_layout(self) -> None:
        """Nothing to do: it was recorded in the transaction that changed it."""

    # --- Adding and dropping ----------------------------------------------------------------------

    def tidy(self) -> None:
        # Alone: see free_retired.
        if self._has("events_replaced"):
            with self._locked("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE"):  # the foreign key's
                self._connection.execute("DROP TABLE events_replaced")

    def add(self, spans: Sequence[Span]) -> None:
        missing = [span for span in spans if not self._has(_name_of(span))]
        if missing:
            with self._locked(*LOCK_PARTITIONS):
                self._replace(LAST)
                self._fill_gaps()
                self._create_following(missing)
                self._connection.execute(MOVE_REPLACED)
        # autovacuum looks at partitions only, never at the table that they belong to.
        self._connection.execute("ANALYZE events")

    def _fill_gaps(self) -> None:
        # Of a time when a DEFAULT partition took what belonged nowhere else.
        for one, following in itertools.pairwise(self.read_partitions()):
            if one.end is not None and following.start is not None and one.end < following.start:
                span = Span(one.end, following.start)
                self._create(_name_of(span), *span)

    def _replace(self, name: str) -> None:
        self._execute(DETACH_PARTITION, name=sql.Identifier(name))
        self._execute(RENAME_REPLACED, name=sql.Identifier(name))

    def sessions_of(self, partition: str | None) -> list[str]:
        table = sql.Identifier(partition or "events_retired")
        query = sql.SQL(SELECT_SESSIONS_OF).format(table=table)
        return [row[0] for row in self._connection.execute(query)]

    def prunable(self, due: Due) -> dict[str, str | None]:
        return self._store._prunable(self._connection, due)  # noqa: SLF001

    def newest_retired(self) -> int | None:
        if not self._has("events_retired"):
            return None
        [(newest,)] = self._connection.execute(SELECT_NEWEST_RETIRED).fetchall()
        return int(newest)

    def is_needed(self, partition: Partition) -> bool:
        # The first one takes the time of the next, if that can be done without moving events.
        oldest = self.read_partitions()[0]
        if oldest.end != partition.start:
            return True
        return not self._is_empty(oldest.name)

    def retire(self, partition: Partition) -> None:
        name = sql.Identifier(partition.name)
        with self._locked(*LOCK_PARTITIONS):
            needed = self.is_needed(partition)
            self._execute(DETACH_PARTITION, name=name)
            self._execute(RENAME_RETIRED, name=name)
            self._connection.execute(GUARD_RETIRED)
            if needed:
                self._create(partition.name, partition.start, partition.end)
            else:
                self._replace(OLDEST)
                self._create(OLDEST, None, partition.end)

    def free_retired(self) -> None:
        # Alone, since this lock stops readers, too, and who stores an event asks for sessions last.
        for key in self._foreign_keys("events_retired"):
            with self._locked("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE"):
                self._execute(FREE_RETIRED, constraint=sql.Identifier(key))
                self._connection.execute(UNGUARD_RETIRED)

    def settle(self, ids: Sequence[str], due: Due) -> int:
        given = list(ids)
        with self._connection.transaction():
            store = self._store
            deleted = store._delete_prunable(self._connection, given, due)  # noqa: SLF001
            self._connection.execute(GIVE_BACK, {"session_ids": given})
        return deleted

    def forget_ids(self, after: Any, rows: int) -> Any:
        session_id, timestamp, seq = after or ("", 0, 0)
        place = {"session_id": session_id, "timestamp": timestamp, "seq": seq, "rows": rows}
        return self._connection.execute(FORGET_IDS, place).fetchone()

    def drop_retired(self) -> None:
        self._connection.execute("DROP TABLE events_retired")

    def unpartitioned_only(self) -> int | None:
        if not self._has("events_unpartitioned"):
            return None
        [(only,)] = self._connection.execute(SELECT_UNPARTITIONED_ONLY).fetchall()
        return int(only)

    def drop_unpartitioned(self) -> None:
        with self._locked("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE"):  # the foreign key's
            self._connection.execute("DROP TABLE events_unpartitioned")

    def _is_empty(self, table: str) -> bool:
        query = sql.SQL(IS_EMPTY).format(table=sql.Identifier(table))
        return bool(self._connection.execute(query).fetchall()[0][0])

    def _foreign_keys(self, table: str) -> list[str]:
        keys = self._connection.execute(SELECT_FOREIGN_KEYS, {"table": table}).fetchall()
        return [key for (key,) in keys]

    def _has(self, table: str) -> bool:
        return self._connection.execute(SELECT_TABLES, {"names": [table]}).fetchone() is not None

    def _execute(self, statement: LiteralString, **words: sql.Composable) -> None:
        self._connection.execute(sql.SQL(statement).format(**words))

    @contextmanager
    def _unhurried(self) -> Iterator[None]:
        """Wait for readers as long as they read: what stops no writer would be done in vain."""
        [(lock,)] = self._connection.execute(SELECT_LOCK_TIMEOUT).fetchall()
        self._connection.execute(WAIT_FOR_READERS)
        try:
            yield
        finally:
            if not self._connection.closed:
                self._connection.execute(WAIT_AS_BEFORE, {"lock": lock})

    @contextmanager
    def _locked(self, *locks: LiteralString) -> Iterator[None]:
        """A transaction that stops writers; how long, at most, is remembered.

        Whoever comes while a lock is waited for waits, too: a little longer each time in vain.
        """
        asked = time.monotonic()
        try:
            with self._connection.transaction():
                timeout = {"lock": f"{self._lock_ms}ms"}
                self._connection.execute(SET_LOCK_TIMEOUT, timeout)
                for lock in locks:
                    self._connection.execute(lock)
                yield
            self._lock_ms = SHORTEST_LOCK_MS
        except pg.LockNotAvailable:
            self._lock_ms = min(2 * self._lock_ms, LONGEST_LOCK_MS)
            raise
        finally:
            self.longest_wait = max(self.longest_wait, time.monotonic() - asked)


def _name_of(span: Span) -> str:
    return f"events_{span.suffix}"


class PostgreSQLAdministrator:
    """The roles and the database of some names; implements Administrator."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        names: Names,
        place: str,
        opened: Callable[[str], PostgreSQLStore],
    ) -> None:
        self.names = names
        self.place = place
        self._connection = connection
        self._opened = opened  # a store of the same server, for a role
        self._identifiers = {
            "database": sql.Identifier(names.database),
            "owner": sql.Identifier(names.owner),
            "application": sql.Identifier(names.application),
            "reader": sql.Identifier(names.reader),
        }

    def check_names(self) -> None:
        # Of 63 bytes two are left for the other login of an account.
        self.names.check(longest_database=63, longest_account=61)
        for name in (self.names.application, self.names.reader):
            if name.endswith("_2"):
                raise ConfigurationError(
                    f"{name}: a rotation calls the second login of {name[:-2]} so; choose a name, "
                    "or an --environment, that does not end in _2"
                )

    def has_database(self) -> bool:
        return self._found(SELECT_DATABASE, self.names.database)

    def check_owner(self) -> None:
        query = {"name": self.names.database}
        [(owner,)] = self._connection.execute(SELECT_OWNER, query).fetchall()
        if owner != self.names.owner:
            raise ConfigurationError(
                f"database {self.names.database} belongs to {owner}, not to {self.names.owner}: "
                "name that with --owner, or let ALTER DATABASE change it"
            )

    def create_database(self) -> None:
        self._run(CREATE_DATABASE)

    def drop_database(self) -> None:
        self._run(DROP_DATABASE)

    def has_role(self, name: str) -> bool:
        return self._found(SELECT_ROLE, name)

    def create_owner(self) -> None:
        self._run(CREATE_OWNER)
        if not self._connection.execute(SELECT_SUPERUSER).fetchall()[0][0]:
            self._run(JOIN_OWNER)

    def create_login(self, name: str, password: str) -> None:
        with self._connection.transaction():
            self._set_password(CREATE_LOGIN, name, password)

    def login_of(self, name: str) -> str:
        return max(self._logins(name), default=("", name))[1]

    def next_login_of(self, name: str) -> str:
        # A role has one password only: two roles take turns, and the one in use is left alone.
        other = f"{name}_2"
        logins = [login for _, login, _ in self._logins(name)]
        if other not in logins and self.has_role(other):
            raise ConfigurationError(
                f"--rotate: the role {other} is there and no login of {name}: DROP ROLE it if "
                "nobody uses it, or set up other names"
            )
        return other if self.login_of(name) == name else name

    def rotate(self, name: str, password: str) -> None:
        chosen = self.next_login_of(name)
        # Whole or not at all: a login that is no member has no privileges, and yet would count as
        # the newest, so that ending the older one would lock the application out.
        with self._connection.transaction():
            if self.has_role(chosen):
                self._set_password(SET_PASSWORD, chosen, password)
            else:
                self._set_password(CREATE_LOGIN, chosen, password)
                account, login = sql.Identifier(name), sql.Identifier(chosen)
                self._run(JOIN_ACCOUNT, account=account, login=login)

    def has_old(self, name: str) -> bool:
        return bool(self._old_logins(name))

    def discard_old(self, name: str) -> bool:
        old = self._old_logins(name)
        for login in old:
            self._run(END_LOGIN, login=sql.Identifier(login))
        return bool(old)

    def grant(self) -> bool:
        with self._opened("")._connect() as connection:  # noqa: SLF001  (a store's other half)
            before = connection.execute(SELECT_ACCESS).fetchall()
            if connection.info.server_version < CLOSED_SINCE:
                for statement in CLOSE_SCHEMA:
                    connection.execute(sql.SQL(statement).format(**self._identifiers))
            connection.execute(sql.SQL("SET ROLE {owner}").format(**self._identifiers))
            with connection.transaction():
                for statement in GRANT_ACCESS:
                    connection.execute(sql.SQL(statement).format(**self._identifiers))
                for (name,) in connection.execute(SELECT_PARTITIONED_TABLES).fetchall():
                    words = {**self._identifiers, "table": sql.Identifier(name)}
                    for statement in GRANT_PARTITIONED_ACCESS:
                        connection.execute(sql.SQL(statement).format(**words))
            return bool(before != connection.execute(SELECT_ACCESS).fetchall())

    def owner_store(self) -> PostgreSQLStore:
        return self._opened(self.names.owner)

    def _found(self, query: LiteralString, name: str) -> bool:
        return self._connection.execute(query, {"name": name}).fetchone() is not None

    def _run(self, statement: LiteralString, **more: sql.Composable) -> None:
        self._connection.execute(sql.SQL(statement).format(**self._identifiers, **more))

    def _set_password(self, statement: LiteralString, name: str, password: str) -> None:
        pgconn = self._connection.pgconn
        secret = pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256")
        login = sql.Identifier(name)
        self._run(statement, login=login, password=sql.Literal(secret.decode()))
        [(text,)] = self._connection.execute(SELECT_COMMENT).fetchall()
        self._run(COMMENT_ON_LOGIN, login=login, text=sql.Literal(text))

    def _old_logins(self, name: str) -> list[str]:
        older = sorted(self._logins(name))[:-1]
        return [login for _, login, may_log_in in older if may_log_in]

    def _logins(self, name: str) -> list[tuple[str, str, bool]]:
        """The roles that log in for an account, by when their password was set."""
        query = {"name": name, "other": f"{name}_2"}
        rows = self._connection.execute(SELECT_LOGINS, query).fetchall()
        return [(since, login, may_log_in) for login, since, may_log_in in rows]


def _read_version(connection: psycopg.Connection[Any]) -> schema.SchemaVersion | None:
    try:
        row = connection.execute(SELECT_VERSION).fetchone()
    except pg.UndefinedTable:
        return None
    except pg.UndefinedColumn:
        raise SchemaError(
            "schema_version is a table of another program: use an empty database"
        ) from None
    return schema.SchemaVersion(*row) if row else None


def _is_partitioned(connection: psycopg.Connection[Any]) -> bool:
    found = _read_version(connection)
    return found is not None and found.layout == "partitioned"


def _answer(connection: psycopg.Connection[Any], query: str) -> list[Any] | None:
    """The rows; None if the server does not give them to this account."""
    try:
        if query == CHECKS["tls"]:
            return _encryption(connection)
        return connection.execute(query).fetchall()
    except psycopg.Error:
        if connection.broken:
            raise
        return None


def _encryption(connection: psycopg.Connection[Any]) -> list[Any]:
    """How libpq's own link is encrypted: behind a pooler the server knows only of another one."""
    if not connection.pgconn.ssl_in_use:
        return []
    # A pooler makes a process number up, so that its other link's cipher is not told.
    rows = connection.execute(CHECKS["tls"], {"pid": connection.info.backend_pid}).fetchall()
    return rows or [("TLS",)]


def _place(given: Mapping[str, Any]) -> str:
    host = given.get("host") or _address(given) or os.environ.get("PGHOST") or "the local socket"
    port = given.get("port") or 5432
    return f"PostgreSQL at {host}:{port}, database {given.get('dbname') or given.get('user')}"


def _address(given: Mapping[str, Any]) -> Any:
    """The address that libpq connects to, whatever host is named."""
    return given.get("hostaddr") or os.environ.get("PGHOSTADDR")


def _tls(given: Mapping[str, Any]) -> dict[str, str]:
    """Verified TLS for a server elsewhere, unless the URL says otherwise in so many words."""
    named = str(_address(given) or given.get("host") or os.environ.get("PGHOST") or "")
    words = {word: str(given[word]) for word in tls.WORDS.values() if word in given}
    if mode := os.environ.get("PGSSLMODE"):
        words.setdefault("sslmode", mode)
    if "service" in given or ("PGSERVICE" in os.environ and "host" not in given):
        return words  # what else it names is its file's to say
    trusted = os.environ.get("PGSSLROOTCERT", "")
    if not trusted and OWN_AUTHORITIES.expanduser().is_file():
        trusted = str(OWN_AUTHORITIES.expanduser())
    return tls.settle(words, local=all(map(is_local, named.split(","))), trusted=trusted)


#: Where libpq looks for authorities if none are named.
OWN_AUTHORITIES = Path("~/.postgresql/root.crt")

#: What an SQLSTATE, or its class, means; whatever is missing here the server refuses.
FAULTS = {
    "08": Fault.LOST,
    "25P03": Fault.LOST,  # idle in a transaction for too long
    "25P04": Fault.LOST,  # a transaction for too long
    "57P04": Fault.LOST,  # the database was dropped
    "57P05": Fault.LOST,  # idle for too long
    "26000": Fault.STALE,  # a prepared statement is gone
    "42P05": Fault.STALE,  # or was there before: a pooler in between
    "57P01": Fault.LOST,  # the server shuts down
    "57P02": Fault.LOST,
    "57P03": Fault.LOST,  # it starts
    "40": Fault.CONFLICT,
    "23503": Fault.CONFLICT,  # the session was deleted while we inserted
    "0A000": Fault.STALE,
    "22": Fault.DATA,
    "23": Fault.DATA,
    "44": Fault.DATA,
    "54": Fault.DATA,
    "P0001": Fault.DATA,  # a trigger's own word
    "55P03": Fault.BUSY,  # lock_timeout
    "57014": Fault.TIMEOUT,  # statement_timeout
    "53300": Fault.BUSY,  # too many connections
    "25006": Fault.UNFIT,  # read-only
    "53": Fault.UNFIT,  # disk or memory full
    "57": Fault.UNFIT,
    "58": Fault.UNFIT,  # what the operating system says
}

#: In the words of a refused connection: what a moment's waiting may change.
PASSING = ("starting up", "shutting down", "recovery", "too many", "reserved", "slots")

_abandoned: list[Any] = []
