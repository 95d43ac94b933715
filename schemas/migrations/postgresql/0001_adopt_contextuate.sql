-- Adopts a database made by contextuate's own SQL file, also as `psql -f` leaves it: without the view
-- and the function whose statements fail.
-- transactional: yes
--
-- The old tables, with every row, move to the schema contextuate_original and stay there: remove it
-- when you have seen that all is well. Their rows are copied into the new tables.

CREATE SCHEMA contextuate_original;

DROP VIEW IF EXISTS session_hierarchy;
DROP VIEW IF EXISTS active_sessions;
DROP FUNCTION IF EXISTS get_recent_events(INTEGER);
DROP FUNCTION IF EXISTS get_session_event_counts(VARCHAR);
DROP FUNCTION IF EXISTS prune_old_sessions(BIGINT);

ALTER TABLE sessions SET SCHEMA contextuate_original;
ALTER TABLE events SET SCHEMA contextuate_original;
ALTER TYPE session_status SET SCHEMA contextuate_original;
ALTER TYPE monitor_event_type SET SCHEMA contextuate_original;
ALTER TYPE claude_hook_type SET SCHEMA contextuate_original;

-- The trigger of the old table keeps the function that it knows: ours needs a column of ours.
DO $$
BEGIN
    IF to_regprocedure('update_updated_at_column()') IS NOT NULL THEN
        ALTER FUNCTION update_updated_at_column() SET SCHEMA contextuate_original;
    END IF;
END
$$;

-- include: postgresql-schema.sql

INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, end_time, status,
    parent_session_id, manual_parent_session_id, child_session_ids, agent_type,
    is_user_initiated, is_pinned, hidden, label, token_usage_input, token_usage_output,
    created_at, updated_at
)
SELECT
    session_id, machine_id, working_directory, start_time, end_time, status::text::session_status,
    parent_session_id, manual_parent_session_id,
    CASE WHEN jsonb_typeof(child_session_ids) = 'array' THEN child_session_ids ELSE '[]' END,
    agent_type, is_user_initiated, is_pinned, hidden, label, token_usage_input,
    token_usage_output, created_at, updated_at
FROM contextuate_original.sessions;

-- In the order of arrival, so that seq has it too.
INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, parent_session_id, machine_id,
    working_directory, tool_name, tool_use_id, data, created_at
)
SELECT
    id, session_id, timestamp, event_type::text::monitor_event_type,
    hook_type::text::claude_hook_type, parent_session_id, machine_id, working_directory,
    CASE WHEN jsonb_typeof(data -> 'toolName') = 'string' THEN left(data ->> 'toolName', 255) END,
    CASE WHEN jsonb_typeof(data -> 'toolUseId') = 'string' THEN left(data ->> 'toolUseId', 255) END,
    CASE WHEN jsonb_typeof(data) = 'object' THEN data ELSE jsonb_build_object('data', data) END,
    created_at
FROM contextuate_original.events
ORDER BY created_at, timestamp, id;

-- Who could use the old tables can use the new ones.
DO $$
DECLARE
    account TEXT;
    privilege TEXT;
BEGIN
    FOR account, privilege IN
        SELECT DISTINCT grantee, privilege_type
        FROM information_schema.role_table_grants
        WHERE table_schema = 'contextuate_original'
            AND table_name IN ('sessions', 'events')
            AND grantee NOT IN (current_user, 'PUBLIC')
            AND privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    LOOP
        EXECUTE format(
            'GRANT %s ON schema_version, sessions, events, deleted_sessions, token_ledger, '
            'active_sessions, session_hierarchy TO %I', privilege, account
        );
    END LOOP;
END
$$;

ANALYZE sessions;
ANALYZE events;
