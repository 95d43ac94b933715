-- Sample data for PostgreSQL and MySQL: 4 sessions and 7 events, for trying things out.
--
-- One file for both: MySQL executes what stands in /*! */, PostgreSQL takes it for a comment. Safe to
-- run again: it adds what is missing, and changes or removes nothing.
--     contextuate-persist --url URL sample
--     psql -v ON_ERROR_STOP=1 -f sample-data.sql DATABASE
--     mysql DATABASE < sample-data.sql

-- Sessions: a root with two children, and a hidden one --------------------------------------------

INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, end_time, status, child_session_ids,
    model, is_user_initiated, is_pinned, label, token_usage_input, token_usage_output,
    token_usage_cache_read, token_usage_cache_creation
)
SELECT
    'session-root-001', 'sample-machine', '/home/dev/webshop', 1767603600000, 1767603780000,
    'completed', '["session-child-001", "session-child-002"]', 'claude-opus-4-5', TRUE, TRUE,
    'Fix the checkout total', 15400, 3200, 182000, 21000
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (SELECT 1 FROM sessions WHERE session_id = 'session-root-001');

INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, end_time, status, parent_session_id,
    agent_type, is_user_initiated, token_usage_input, token_usage_output
)
SELECT
    'session-child-001', 'sample-machine', '/home/dev/webshop', 1767603630000, 1767603690000,
    'completed', 'session-root-001', 'nexus', FALSE, 4100, 900
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (SELECT 1 FROM sessions WHERE session_id = 'session-child-001');

INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, end_time, status, parent_session_id,
    agent_type, is_user_initiated, token_usage_input, token_usage_output
)
SELECT
    'session-child-002', 'sample-machine', '/home/dev/webshop', 1767603700000, 1767603760000,
    'error', 'session-root-001', 'canvas', FALSE, 2700, 300
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (SELECT 1 FROM sessions WHERE session_id = 'session-child-002');

INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, status, hidden, label
)
SELECT
    'session-hidden-001', 'sample-machine', '/home/dev/scratch', 1767600000000, 'active', TRUE,
    'An experiment, hidden from lists'
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (SELECT 1 FROM sessions WHERE session_id = 'session-hidden-001');

-- Events: start, call, result, spawn, a call of the child, an error, end ---------------------------

INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, machine_id, working_directory, data
)
SELECT
    /*! UUID_TO_BIN( */ '019b8d2c-1a80-7000-8000-000000000001' /*! ) */,
    'session-root-001', 1767603600000, 'session_start', 'SessionStart', 'sample-machine',
    '/home/dev/webshop', '{"source": "startup", "model": "claude-opus-4-5"}'
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (
    SELECT 1 FROM events
    WHERE id = /*! UUID_TO_BIN( */ '019b8d2c-1a80-7000-8000-000000000001' /*! ) */
);

INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, machine_id, working_directory, tool_name,
    tool_use_id, data
)
SELECT
    /*! UUID_TO_BIN( */ '019b8d2c-41a8-7000-8000-000000000002' /*! ) */,
    'session-root-001', 1767603610000, 'tool_call', 'PreToolUse', 'sample-machine',
    '/home/dev/webshop', 'Bash', 'toolu_sample_01',
    '{"toolName": "Bash", "toolUseId": "toolu_sample_01", "toolInput": {"command": "make test"}}'
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (
    SELECT 1 FROM events
    WHERE id = /*! UUID_TO_BIN( */ '019b8d2c-41a8-7000-8000-000000000002' /*! ) */
);

INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, machine_id, working_directory, tool_name,
    tool_use_id, data
)
SELECT
    /*! UUID_TO_BIN( */ '019b8d2c-5d00-7000-8000-000000000003' /*! ) */,
    'session-root-001', 1767603617000, 'tool_result', 'PostToolUse', 'sample-machine',
    '/home/dev/webshop', 'Bash', 'toolu_sample_01',
    '{"toolName": "Bash", "toolUseId": "toolu_sample_01", "toolOutput": {"stdout": "1 failed"}}'
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (
    SELECT 1 FROM events
    WHERE id = /*! UUID_TO_BIN( */ '019b8d2c-5d00-7000-8000-000000000003' /*! ) */
);

INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, machine_id, working_directory, data
)
SELECT
    /*! UUID_TO_BIN( */ '019b8d2c-8fc8-7000-8000-000000000004' /*! ) */,
    'session-root-001', 1767603630000, 'agent_spawn', 'PreToolUse', 'sample-machine',
    '/home/dev/webshop',
    '{"subagent": {"type": "nexus", "prompt": "Find where the total is computed"}}'
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (
    SELECT 1 FROM events
    WHERE id = /*! UUID_TO_BIN( */ '019b8d2c-8fc8-7000-8000-000000000004' /*! ) */
);

INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, parent_session_id, machine_id,
    working_directory, tool_name, tool_use_id, data
)
SELECT
    /*! UUID_TO_BIN( */ '019b8d2c-b2f0-7000-8000-000000000005' /*! ) */,
    'session-child-001', 1767603639000, 'tool_call', 'PreToolUse', 'session-root-001',
    'sample-machine', '/home/dev/webshop', 'Grep', 'toolu_sample_02',
    '{"toolName": "Grep", "toolUseId": "toolu_sample_02", "toolInput": {"pattern": "total"}}'
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (
    SELECT 1 FROM events
    WHERE id = /*! UUID_TO_BIN( */ '019b8d2c-b2f0-7000-8000-000000000005' /*! ) */
);

INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, parent_session_id, machine_id,
    working_directory, data
)
SELECT
    /*! UUID_TO_BIN( */ '019b8d2e-8bb0-7000-8000-000000000006' /*! ) */,
    'session-child-002', 1767603760000, 'error', 'StopFailure', 'session-root-001',
    'sample-machine', '/home/dev/webshop',
    '{"error": {"code": "rate_limit", "message": "Too many requests"}}'
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (
    SELECT 1 FROM events
    WHERE id = /*! UUID_TO_BIN( */ '019b8d2e-8bb0-7000-8000-000000000006' /*! ) */
);

INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, machine_id, working_directory, data
)
SELECT
    /*! UUID_TO_BIN( */ '019b8d2e-d9d0-7000-8000-000000000007' /*! ) */,
    'session-root-001', 1767603780000, 'session_end', 'SessionEnd', 'sample-machine',
    '/home/dev/webshop', '{"reason": "prompt_input_exit"}'
FROM (SELECT 1 AS one) AS sample
WHERE NOT EXISTS (
    SELECT 1 FROM events
    WHERE id = /*! UUID_TO_BIN( */ '019b8d2e-d9d0-7000-8000-000000000007' /*! ) */
);
