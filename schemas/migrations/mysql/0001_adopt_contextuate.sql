-- Adopts a database made by contextuate's own SQL file.
-- transactional: no
--
-- The old tables, with every row, stay as contextuate_original_sessions and _events: remove them when
-- you have seen that all is well. Their rows are copied into the new tables. Every statement can be run
-- again: MySQL commits each by itself.

-- unless: SELECT 1 FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = 'contextuate_original_events'
RENAME TABLE
    sessions TO contextuate_original_sessions,
    events TO contextuate_original_events;

-- include: mysql-schema.sql

INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, end_time, status,
    manual_parent_session_id, child_session_ids, agent_type, is_user_initiated, is_pinned,
    hidden, label, token_usage_input, token_usage_output, created_at, updated_at
)
SELECT
    o.session_id, o.machine_id, o.working_directory, o.start_time, o.end_time, LOWER(o.status),
    o.manual_parent_session_id,
    IF(JSON_TYPE(o.child_session_ids) = 'ARRAY' COLLATE utf8mb4_bin, o.child_session_ids, JSON_ARRAY()),
    o.agent_type, o.is_user_initiated, o.is_pinned, o.hidden, o.label, o.token_usage_input,
    o.token_usage_output, o.created_at, o.updated_at
FROM contextuate_original_sessions AS o
ON DUPLICATE KEY UPDATE known_from = sessions.known_from;

-- The old collation took an event of `ABC` for one of the session `abc`. Byte for byte it has none: its
-- session is made from its earliest event, and a parent spelled otherwise becomes a reference.
INSERT INTO sessions (session_id, machine_id, working_directory, start_time, known_from)
SELECT e.session_id, e.machine_id, e.working_directory, e.timestamp, 'event'
FROM (
    SELECT
        o.session_id, o.machine_id, o.working_directory, o.timestamp,
        ROW_NUMBER() OVER (
            PARTITION BY o.session_id COLLATE utf8mb4_0900_bin ORDER BY o.timestamp, o.id
        ) AS place
    FROM contextuate_original_events AS o
) AS e
WHERE e.place = 1
ON DUPLICATE KEY UPDATE known_from = sessions.known_from;

INSERT INTO sessions (session_id, machine_id, working_directory, start_time, known_from)
SELECT o.parent_session_id, o.machine_id, o.working_directory, o.start_time, 'reference'
FROM contextuate_original_sessions AS o
WHERE o.parent_session_id IS NOT NULL
ON DUPLICATE KEY UPDATE known_from = sessions.known_from;

UPDATE sessions AS s
JOIN contextuate_original_sessions AS o
    ON s.session_id = o.session_id COLLATE utf8mb4_0900_bin
SET s.parent_session_id = o.parent_session_id, s.updated_at = o.updated_at;

-- In the order of arrival, so that seq has it too. An id that is no UUID gets one made from it.
INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, parent_session_id, machine_id,
    working_directory, tool_name, tool_use_id, data, created_at
)
SELECT
    IF(IS_UUID(o.id), UUID_TO_BIN(o.id), UNHEX(LEFT(SHA2(CONCAT('contextuate:', o.id), 256), 32))),
    o.session_id, o.timestamp, o.event_type, o.hook_type, o.parent_session_id, o.machine_id,
    o.working_directory,
    IF(
        JSON_TYPE(JSON_EXTRACT(o.data, '$.toolName')) = 'STRING' COLLATE utf8mb4_bin,
        LEFT(JSON_UNQUOTE(JSON_EXTRACT(o.data, '$.toolName')), 255), NULL
    ),
    IF(
        JSON_TYPE(JSON_EXTRACT(o.data, '$.toolUseId')) = 'STRING' COLLATE utf8mb4_bin,
        LEFT(JSON_UNQUOTE(JSON_EXTRACT(o.data, '$.toolUseId')), 255), NULL
    ),
    IF(JSON_TYPE(o.data) = 'OBJECT' COLLATE utf8mb4_bin, o.data, JSON_OBJECT('data', o.data)),
    o.created_at
FROM contextuate_original_events AS o
ORDER BY o.created_at, o.timestamp, o.id
ON DUPLICATE KEY UPDATE id = events.id;
