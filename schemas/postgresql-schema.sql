-- Schema of contextuate_persist for PostgreSQL 12 and newer.
--
-- Safe to run again: it creates what is missing and changes or removes nothing that holds data.
-- Apply it as the owner of the database, all or nothing:
--     contextuate-persist --url URL init
--     psql -v ON_ERROR_STOP=1 -1 -f postgresql-schema.sql DATABASE
-- The application's account needs SELECT, INSERT, UPDATE and DELETE on the tables, nothing else.
-- Times are Unix milliseconds. Ids compare byte for byte (collation "C").

-- Types -------------------------------------------------------------------------------------------

DO $$
BEGIN
    IF to_regtype('session_status') IS NULL THEN
        CREATE TYPE session_status AS ENUM ('active', 'completed', 'error');
    END IF;

    -- The set is open: a type that is no member is stored as 'other', its name beside it.
    IF to_regtype('monitor_event_type') IS NULL THEN
        CREATE TYPE monitor_event_type AS ENUM (
            'session_start', 'session_end', 'tool_call', 'tool_result', 'message', 'notification',
            'thinking', 'error', 'agent_spawn', 'agent_complete',
            'tool_error', 'subagent_start', 'subagent_stop', 'user_prompt', 'pre_compact',
            'permission_request',
            'turn_end', 'user_prompt_expansion', 'tool_batch', 'permission_denied', 'post_compact',
            'pre_model_switch', 'post_model_switch', 'task_created', 'task_completed',
            'teammate_idle', 'elicitation', 'elicitation_result', 'config_change',
            'instructions_loaded', 'worktree_create', 'worktree_remove', 'cwd_changed',
            'file_changed', 'directory_added', 'setup', 'message_display',
            'other'
        );
    END IF;

    IF to_regtype('claude_hook_type') IS NULL THEN
        CREATE TYPE claude_hook_type AS ENUM (
            'PreToolUse', 'PostToolUse', 'Notification', 'Stop', 'SubagentStop',
            'SessionStart', 'SessionEnd', 'PostToolUseFailure', 'UserPromptSubmit',
            'SubagentStart', 'PreCompact', 'PermissionRequest',
            'PostToolBatch', 'PermissionDenied', 'UserPromptExpansion', 'Setup', 'StopFailure',
            'PostCompact', 'PreModelSwitch', 'PostModelSwitch', 'TaskCreated', 'TaskCompleted',
            'TeammateIdle', 'Elicitation', 'ElicitationResult', 'ConfigChange',
            'InstructionsLoaded', 'WorktreeCreate', 'WorktreeRemove', 'CwdChanged',
            'FileChanged', 'DirectoryAdded', 'MessageDisplay',
            'other'
        );
    END IF;
END
$$;

COMMENT ON TYPE session_status IS 'Whether a session runs, has ended, or has failed';
COMMENT ON TYPE monitor_event_type IS 'What happened; other: see event_type_name';
COMMENT ON TYPE claude_hook_type IS 'The hook that told us; other: see hook_type_name';

-- Tables ------------------------------------------------------------------------------------------

-- Rules compare texts, not VARCHARs, whose casts a dump and its restoring would write otherwise.
CREATE TABLE IF NOT EXISTS schema_version (
    version     INTEGER      NOT NULL,
    name        VARCHAR(100) NOT NULL,
    layout      VARCHAR(20)  NOT NULL DEFAULT 'plain',
    checksum    VARCHAR(64),
    applied_at  TIMESTAMPTZ  NOT NULL DEFAULT now(),

    CONSTRAINT schema_version_pkey PRIMARY KEY (version),
    CONSTRAINT schema_version_layout CHECK (layout::text IN ('plain', 'partitioned'))
);

CREATE TABLE IF NOT EXISTS sessions (
    session_id                VARCHAR(255) COLLATE "C" NOT NULL,
    machine_id                VARCHAR(255) COLLATE "C" NOT NULL,
    working_directory         TEXT           NOT NULL,
    start_time                BIGINT         NOT NULL,
    end_time                  BIGINT,
    status                    session_status NOT NULL DEFAULT 'active',
    parent_session_id         VARCHAR(255) COLLATE "C",
    manual_parent_session_id  VARCHAR(255) COLLATE "C",
    effective_parent_id       VARCHAR(255) COLLATE "C"
        GENERATED ALWAYS AS (COALESCE(manual_parent_session_id, parent_session_id)) STORED,
    child_session_ids         JSONB          NOT NULL DEFAULT '[]',
    agent_type                VARCHAR(255),
    model                     VARCHAR(255),
    transcript_path           TEXT,
    is_user_initiated         BOOLEAN        NOT NULL DEFAULT TRUE,
    is_pinned                 BOOLEAN        NOT NULL DEFAULT FALSE,
    hidden                    BOOLEAN        NOT NULL DEFAULT FALSE,
    label                     TEXT,
    token_usage_input         BIGINT         NOT NULL DEFAULT 0,
    token_usage_output        BIGINT         NOT NULL DEFAULT 0,
    token_usage_cache_read    BIGINT,
    token_usage_cache_creation BIGINT,
    known_from                VARCHAR(10)    NOT NULL DEFAULT 'session',
    exact                     JSONB,
    created_at                TIMESTAMPTZ    NOT NULL DEFAULT now(),
    updated_at                TIMESTAMPTZ    NOT NULL DEFAULT now(),

    CONSTRAINT sessions_pkey PRIMARY KEY (session_id),
    CONSTRAINT sessions_parent_session_id_fkey FOREIGN KEY (parent_session_id)
        REFERENCES sessions (session_id) ON DELETE SET NULL,
    CONSTRAINT sessions_known_from CHECK (known_from::text IN ('session', 'event', 'reference')),
    CONSTRAINT sessions_child_session_ids CHECK (jsonb_typeof(child_session_ids) = 'array')
);

CREATE TABLE IF NOT EXISTS events (
    id                 UUID               NOT NULL,
    seq                BIGINT             NOT NULL GENERATED ALWAYS AS IDENTITY,
    session_id         VARCHAR(255) COLLATE "C" NOT NULL,
    timestamp          BIGINT             NOT NULL,
    event_type         monitor_event_type NOT NULL,
    event_type_name    VARCHAR(100) COLLATE "C",
    hook_type          claude_hook_type   NOT NULL,
    hook_type_name     VARCHAR(100) COLLATE "C",
    parent_session_id  VARCHAR(255) COLLATE "C",
    machine_id         VARCHAR(255) COLLATE "C" NOT NULL,
    working_directory  TEXT               NOT NULL,
    tool_name          VARCHAR(255) COLLATE "C",
    tool_use_id        VARCHAR(255) COLLATE "C",
    data               JSONB              NOT NULL,
    exact              BYTEA,
    commit_order       BIGINT             NOT NULL DEFAULT txid_current(),
    created_at         TIMESTAMPTZ        NOT NULL DEFAULT now(),

    CONSTRAINT events_pkey PRIMARY KEY (id),
    CONSTRAINT events_session_id_fkey FOREIGN KEY (session_id)
        REFERENCES sessions (session_id) ON DELETE CASCADE,
    CONSTRAINT events_type_name CHECK (event_type = 'other' OR event_type_name IS NULL),
    CONSTRAINT events_hook_name CHECK (hook_type = 'other' OR hook_type_name IS NULL),
    CONSTRAINT events_data CHECK (jsonb_typeof(data) = 'object')
);

-- ids are made by the client; the default is for INSERTs by hand (built in from PostgreSQL 13 on).
DO $$
BEGIN
    IF current_setting('server_version_num')::integer >= 130000 THEN
        ALTER TABLE events ALTER COLUMN id SET DEFAULT gen_random_uuid();
    END IF;
END
$$;

-- Where the server has it, lz4 doubles the insert rate at the same size as pglz, the default. In a
-- block of its own: where it has not, all of the block is undone.
DO $$
BEGIN
    IF current_setting('server_version_num')::integer >= 140000 THEN
        EXECUTE 'ALTER TABLE events ALTER COLUMN data SET COMPRESSION lz4';
        EXECUTE 'ALTER TABLE events ALTER COLUMN exact SET COMPRESSION lz4';
    END IF;
EXCEPTION
    WHEN feature_not_supported THEN
        RAISE NOTICE 'this server was built without lz4: payloads are compressed with pglz';
END
$$;

CREATE TABLE IF NOT EXISTS deleted_sessions (
    session_id  VARCHAR(255) COLLATE "C" NOT NULL,
    deleted_at  BIGINT       NOT NULL,

    CONSTRAINT deleted_sessions_pkey PRIMARY KEY (session_id)
);

CREATE TABLE IF NOT EXISTS token_ledger (
    message_id      VARCHAR(255) COLLATE "C" NOT NULL,
    session_id      VARCHAR(255) COLLATE "C" NOT NULL,
    timestamp       BIGINT       NOT NULL,
    model           VARCHAR(255),
    input_tokens    BIGINT       NOT NULL DEFAULT 0,
    output_tokens   BIGINT       NOT NULL DEFAULT 0,
    cache_read      BIGINT       NOT NULL DEFAULT 0,
    cache_creation  BIGINT       NOT NULL DEFAULT 0,

    CONSTRAINT token_ledger_pkey PRIMARY KEY (message_id),
    CONSTRAINT token_ledger_session_id_fkey FOREIGN KEY (session_id)
        REFERENCES sessions (session_id) ON DELETE CASCADE
);

-- Indexes: each names the query that it serves ----------------------------------------------------

-- get_sessions(status=)
CREATE INDEX IF NOT EXISTS idx_sessions_status
    ON sessions (status, start_time DESC, session_id DESC);
-- the foreign key: what must change when a parent is deleted
CREATE INDEX IF NOT EXISTS idx_sessions_parent_session_id ON sessions (parent_session_id);
-- the children of a session: get_session, get_sessions(parent_session_id=), session_tree
CREATE INDEX IF NOT EXISTS idx_sessions_effective_parent ON sessions (effective_parent_id, start_time);
-- get_sessions(), newest first
CREATE INDEX IF NOT EXISTS idx_sessions_start_time ON sessions (start_time DESC, session_id DESC);
-- get_sessions(machine_id=)
CREATE INDEX IF NOT EXISTS idx_sessions_machine_id
    ON sessions (machine_id, start_time DESC, session_id DESC);
-- get_sessions(hidden=, status=)
CREATE INDEX IF NOT EXISTS idx_sessions_hidden_status
    ON sessions (hidden, status, start_time DESC, session_id DESC);
-- active_sessions: pinned first, newest first
CREATE INDEX IF NOT EXISTS idx_sessions_pinned ON sessions (is_pinned DESC, start_time DESC);
-- which sessions list a deleted one: delete_session
CREATE INDEX IF NOT EXISTS idx_sessions_child_ids ON sessions USING GIN (child_session_ids);
-- get_sessions(status='active'): stays small while old sessions pile up
CREATE INDEX IF NOT EXISTS idx_sessions_active ON sessions (start_time DESC, session_id DESC)
    WHERE status = 'active';
-- get_sessions(hidden=False)
CREATE INDEX IF NOT EXISTS idx_sessions_visible ON sessions (start_time DESC, session_id DESC)
    WHERE hidden = FALSE;

-- Those of events rise where time rises, and are read backwards for the newest: what comes in order
-- comes at their right end, where PostgreSQL leaves full pages behind. idx_events_timestamp takes 32
-- bytes for each event so; falling, it took 57.

-- Where events is partitioned, its primary key is this one.
DO $$
BEGIN
    IF (SELECT relkind FROM pg_class WHERE oid = to_regclass('events')) = 'r' THEN
        -- get_events, iter_events(session_id=), the last event of a session; the foreign key
        CREATE INDEX IF NOT EXISTS idx_events_session_timestamp
            ON events (session_id, timestamp, seq);
    END IF;
END
$$;
-- get_all_recent_events, iter_events()
CREATE INDEX IF NOT EXISTS idx_events_timestamp ON events (timestamp, seq);
-- find_events(event_type=)
CREATE INDEX IF NOT EXISTS idx_events_event_type
    ON events (event_type, timestamp, seq);
-- find_events(event_type=) for a type that the ENUM does not know
CREATE INDEX IF NOT EXISTS idx_events_event_type_name
    ON events (event_type_name, timestamp, seq) WHERE event_type_name IS NOT NULL;
-- find_events(hook_type=) for a hook that the ENUM does not know
CREATE INDEX IF NOT EXISTS idx_events_hook_type_name
    ON events (hook_type_name, timestamp, seq) WHERE hook_type_name IS NOT NULL;
-- find_events(machine_id=)
CREATE INDEX IF NOT EXISTS idx_events_machine_timestamp
    ON events (machine_id, timestamp, seq);
-- find_events(parent_session_id=)
CREATE INDEX IF NOT EXISTS idx_events_parent_session
    ON events (parent_session_id, timestamp, seq) WHERE parent_session_id IS NOT NULL;
-- find_events(tool_name=)
CREATE INDEX IF NOT EXISTS idx_events_tool_name
    ON events (tool_name, timestamp, seq) WHERE tool_name IS NOT NULL;
-- find_events(tool_use_id=): a call and its result
CREATE INDEX IF NOT EXISTS idx_events_tool_use_id
    ON events (tool_use_id) WHERE tool_use_id IS NOT NULL;
-- find_events(event_type='error'), over all sessions
CREATE INDEX IF NOT EXISTS idx_events_errors ON events (timestamp, seq)
    WHERE event_type = 'error';
-- find_events(contains=): without the big values, or it would cost more than all the others together
CREATE INDEX IF NOT EXISTS idx_events_data ON events USING GIN (
    (data - '{toolInput,toolOutput,toolCalls,message,assistantResponse,thinking,thinkingBlocks,hook,line}'::text[])
    jsonb_path_ops
);
-- find_events(contains=), the few rows whose data is a projection: their exact payload is searched
CREATE INDEX IF NOT EXISTS idx_events_exact ON events (timestamp, seq)
    WHERE exact IS NOT NULL;

-- the totals of a session from its messages; the foreign key
CREATE INDEX IF NOT EXISTS idx_token_ledger_session ON token_ledger (session_id);
-- forgetting old deletions: prune_old_sessions
CREATE INDEX IF NOT EXISTS idx_deleted_sessions_deleted_at ON deleted_sessions (deleted_at);

-- Trigger -----------------------------------------------------------------------------------------

-- Only for a change, as MySQL has it. The generated column is not computed yet, and what it is set to
-- here is ignored. *<> compares bytes: a column that somebody adds may have no equality.
CREATE OR REPLACE FUNCTION update_updated_at_column() RETURNS TRIGGER
LANGUAGE plpgsql AS $$
BEGIN
    NEW.effective_parent_id = OLD.effective_parent_id;
    IF NEW *<> OLD THEN
        NEW.updated_at = now();
    END IF;
    RETURN NEW;
END
$$;

DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_trigger
        WHERE tgrelid = 'sessions'::regclass AND tgname = 'trigger_sessions_updated_at'
    ) THEN
        CREATE TRIGGER trigger_sessions_updated_at BEFORE UPDATE ON sessions
            FOR EACH ROW EXECUTE FUNCTION update_updated_at_column();
    END IF;
END
$$;

-- Views -------------------------------------------------------------------------------------------

-- Sessions to show, with what a list of them needs. Children are counted as get_session lists them.
CREATE OR REPLACE VIEW active_sessions AS
SELECT
    s.session_id,
    s.machine_id,
    s.working_directory,
    s.start_time,
    s.end_time,
    s.status,
    s.parent_session_id,
    s.manual_parent_session_id,
    s.agent_type,
    s.model,
    s.label,
    s.is_pinned,
    s.is_user_initiated,
    s.token_usage_input,
    s.token_usage_output,
    s.token_usage_input + s.token_usage_output AS token_usage_total,
    (
        SELECT count(*) FROM sessions AS child WHERE child.effective_parent_id = s.session_id
    ) + (
        SELECT count(*)
        FROM jsonb_array_elements_text(s.child_session_ids) AS listed (session_id)
        WHERE NOT EXISTS (
            SELECT FROM sessions AS child
            WHERE child.session_id = listed.session_id AND child.effective_parent_id IS NOT NULL
        ) AND (
            EXISTS (
                SELECT FROM sessions AS child
                WHERE child.session_id = listed.session_id AND child.known_from <> 'reference'
            )
            OR NOT EXISTS (
                SELECT FROM deleted_sessions AS d WHERE d.session_id = listed.session_id
            )
        )
    ) AS child_count,
    GREATEST(
        COALESCE(s.end_time, (extract(epoch FROM now()) * 1000)::bigint) - s.start_time, 0
    ) AS duration_ms
FROM sessions AS s
WHERE s.hidden = FALSE AND s.known_from <> 'reference'
ORDER BY s.is_pinned DESC, s.start_time DESC;

-- Every session in its tree, cycles and orphans included: a tree begins where a parent is missing, and
-- in a cycle at the smallest id. `path` lists the ids from the root down to the session.
CREATE OR REPLACE VIEW session_hierarchy AS
WITH RECURSIVE shown AS (
    SELECT session_id, effective_parent_id FROM sessions WHERE known_from <> 'reference'
),
roots AS (
    SELECT s.session_id
    FROM shown AS s LEFT JOIN shown AS parent ON parent.session_id = s.effective_parent_id
    WHERE parent.session_id IS NULL
),
reached (session_id) AS (
    SELECT session_id FROM roots
    UNION
    SELECT s.session_id FROM reached AS r JOIN shown AS s ON s.effective_parent_id = r.session_id
),
ancestry (session_id, ancestor_id) AS (
    SELECT s.session_id, s.effective_parent_id
    FROM shown AS s
    WHERE NOT EXISTS (SELECT FROM reached AS r WHERE r.session_id = s.session_id)
    UNION
    SELECT a.session_id, s.effective_parent_id
    FROM ancestry AS a JOIN shown AS s ON s.session_id = a.ancestor_id
),
starts AS (
    SELECT session_id FROM roots
    UNION ALL
    SELECT session_id FROM ancestry GROUP BY session_id HAVING min(ancestor_id) = session_id
),
walk (session_id, depth, path) AS (
    SELECT session_id, 0, ARRAY[session_id::text] FROM starts
    UNION ALL
    SELECT s.session_id, w.depth + 1, w.path || s.session_id::text
    FROM walk AS w JOIN shown AS s ON s.effective_parent_id = w.session_id
    WHERE s.session_id <> w.path[1]  -- a cycle can only close at its start
)
SELECT
    s.session_id,
    s.parent_session_id,
    s.manual_parent_session_id,
    s.agent_type,
    s.start_time,
    s.status,
    w.depth,
    w.path
FROM walk AS w JOIN sessions AS s USING (session_id);

-- Functions ---------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION get_recent_events(max_events INTEGER DEFAULT 100)
RETURNS TABLE (
    id UUID, session_id VARCHAR, "timestamp" BIGINT, event_type TEXT, hook_type TEXT,
    machine_id VARCHAR, working_directory TEXT, data JSONB
)
LANGUAGE sql STABLE AS $$
    SELECT
        e.id, e.session_id, e.timestamp,
        COALESCE(e.event_type_name, e.event_type::text),
        COALESCE(e.hook_type_name, e.hook_type::text),
        e.machine_id, e.working_directory, e.data
    FROM events AS e
    ORDER BY e.timestamp DESC, e.seq DESC
    LIMIT COALESCE(max_events, 100)
$$;

CREATE OR REPLACE FUNCTION get_session_event_counts(of_session_id VARCHAR)
RETURNS TABLE (event_type TEXT, event_count BIGINT)
LANGUAGE sql STABLE AS $$
    SELECT COALESCE(e.event_type_name, e.event_type::text) AS name, count(*) AS amount
    FROM events AS e
    WHERE e.session_id = of_session_id
    GROUP BY name
    ORDER BY amount DESC, name
$$;

-- What the library's prune_old_sessions does, in one transaction; but only the library forgets old
-- deletions. Writers wait meanwhile, so that no pin, child or event of theirs goes unseen.
CREATE OR REPLACE FUNCTION prune_old_sessions(older_than_ms BIGINT) RETURNS INTEGER
LANGUAGE plpgsql AS $$
DECLARE
    doomed TEXT[];
    shown TEXT[];
BEGIN
    LOCK TABLE sessions IN EXCLUSIVE MODE;

    WITH RECURSIVE state AS (
        SELECT
            s.session_id,
            NOT s.is_pinned AND COALESCE(
                s.end_time,
                (SELECT max(e.timestamp) FROM events AS e WHERE e.session_id = s.session_id),
                s.start_time
            ) < older_than_ms AS due
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
        SELECT l.neighbour_id FROM kept AS k JOIN links AS l USING (session_id)
    )
    SELECT COALESCE(array_agg(s.session_id::text), '{}') INTO doomed
    FROM sessions AS s
    WHERE NOT EXISTS (SELECT FROM kept AS k WHERE k.session_id = s.session_id);

    -- A mere reference leaves no trace: whoever lists its id goes on listing it.
    SELECT COALESCE(array_agg(s.session_id::text), '{}') INTO shown
    FROM sessions AS s
    WHERE s.session_id = ANY(doomed) AND s.known_from <> 'reference';

    UPDATE sessions SET child_session_ids = child_session_ids - shown
    WHERE child_session_ids ?| shown;

    -- An event dated a little later than the server's clock must not bring its session back either;
    -- one with a year to go must not keep its future away.
    INSERT INTO deleted_sessions (session_id, deleted_at)
    SELECT
        s.session_id,
        GREATEST(
            clock.now,
            LEAST(
                clock.now + 86400000,
                COALESCE(
                    (SELECT max(e.timestamp) FROM events AS e WHERE e.session_id = s.session_id), 0
                )
            )
        )
    FROM sessions AS s
    CROSS JOIN (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now) AS clock
    WHERE s.session_id = ANY(shown)
    ON CONFLICT (session_id) DO UPDATE SET
        deleted_at = GREATEST(deleted_sessions.deleted_at, EXCLUDED.deleted_at);

    DELETE FROM sessions WHERE session_id = ANY(doomed);
    RETURN cardinality(shown);
END
$$;

-- Comments ----------------------------------------------------------------------------------------

COMMENT ON TABLE schema_version IS 'Schema versions applied to this database; the highest counts';
COMMENT ON COLUMN schema_version.version IS 'Number of the schema or migration';
COMMENT ON COLUMN schema_version.name IS 'What the version is about';
COMMENT ON COLUMN schema_version.layout IS 'Whether events is one table or partitioned';
COMMENT ON COLUMN schema_version.checksum IS 'SHA-256 of the file that was applied, if known';
COMMENT ON COLUMN schema_version.applied_at IS 'When it was applied';

COMMENT ON TABLE sessions IS 'Runs of agents: a user''s, or a sub-agent''s with a parent';
COMMENT ON COLUMN sessions.session_id IS 'Id of the session, compared byte for byte';
COMMENT ON COLUMN sessions.machine_id IS 'Machine on which the session runs';
COMMENT ON COLUMN sessions.working_directory IS 'Directory in which the session was started';
COMMENT ON COLUMN sessions.start_time IS 'Start, Unix milliseconds';
COMMENT ON COLUMN sessions.end_time IS 'End, Unix milliseconds; NULL while it runs or if unknown';
COMMENT ON COLUMN sessions.status IS 'Whether it runs, has ended, or has failed';
COMMENT ON COLUMN sessions.parent_session_id IS 'Parent as detected from the events';
COMMENT ON COLUMN sessions.manual_parent_session_id IS 'Parent as set by a person; wins';
COMMENT ON COLUMN sessions.effective_parent_id IS 'The parent that counts: manual, else detected';
COMMENT ON COLUMN sessions.child_session_ids IS 'Children that callers listed, an array of ids';
COMMENT ON COLUMN sessions.agent_type IS 'Kind of sub-agent, as it names itself';
COMMENT ON COLUMN sessions.model IS 'Language model that runs the session';
COMMENT ON COLUMN sessions.transcript_path IS 'File with the session''s transcript';
COMMENT ON COLUMN sessions.is_user_initiated IS 'Started by a person rather than by an agent';
COMMENT ON COLUMN sessions.is_pinned IS 'Shown first and never pruned';
COMMENT ON COLUMN sessions.hidden IS 'Left out of listings of visible sessions';
COMMENT ON COLUMN sessions.label IS 'Name given by a person';
COMMENT ON COLUMN sessions.token_usage_input IS 'Input tokens in total';
COMMENT ON COLUMN sessions.token_usage_output IS 'Output tokens in total';
COMMENT ON COLUMN sessions.token_usage_cache_read IS 'Input tokens read from the cache; NULL: unknown';
COMMENT ON COLUMN sessions.token_usage_cache_creation IS 'Input tokens that made the cache; NULL: unknown';
COMMENT ON COLUMN sessions.known_from IS 'session: saved; event: made from an event; reference: only named as a parent';
COMMENT ON COLUMN sessions.exact IS 'Texts that their columns cannot hold (NUL, surrogates), base64 by column';
COMMENT ON COLUMN sessions.created_at IS 'When the row was made';
COMMENT ON COLUMN sessions.updated_at IS 'When the row last changed';

COMMENT ON TABLE events IS 'What happened in sessions; rows never change';
COMMENT ON COLUMN events.id IS 'Id of the event: stored once, however often it is delivered';
COMMENT ON COLUMN events.seq IS 'Order of arrival; decides between equal timestamps';
COMMENT ON COLUMN events.session_id IS 'Session in which it happened';
COMMENT ON COLUMN events.timestamp IS 'When it happened, Unix milliseconds';
COMMENT ON COLUMN events.event_type IS 'What happened; other: event_type_name says it';
COMMENT ON COLUMN events.event_type_name IS 'A type that the ENUM does not know';
COMMENT ON COLUMN events.hook_type IS 'The hook that told us; other: hook_type_name says it';
COMMENT ON COLUMN events.hook_type_name IS 'A hook that the ENUM does not know';
COMMENT ON COLUMN events.parent_session_id IS 'Parent of the session, as the event told';
COMMENT ON COLUMN events.machine_id IS 'Machine on which it happened';
COMMENT ON COLUMN events.working_directory IS 'Directory in which it happened';
COMMENT ON COLUMN events.tool_name IS 'toolName of the payload, its first 255 characters';
COMMENT ON COLUMN events.tool_use_id IS 'toolUseId of the payload, its first 255 characters';
COMMENT ON COLUMN events.data IS 'The payload; if exact is filled, its closest queryable projection';
COMMENT ON COLUMN events.exact IS 'JSON with what the columns cannot hold exactly; NULL mostly';
COMMENT ON COLUMN events.commit_order IS 'Transaction that stored it, for readers that follow the table';
COMMENT ON COLUMN events.created_at IS 'When it was stored';

COMMENT ON TABLE deleted_sessions IS 'Deleted sessions, so that late deliveries do not bring them back';
COMMENT ON COLUMN deleted_sessions.session_id IS 'Id of the session';
COMMENT ON COLUMN deleted_sessions.deleted_at IS 'When, Unix milliseconds; newer events are welcome';

COMMENT ON TABLE token_ledger IS 'Token usage per API message, each counted once over all sessions';
COMMENT ON COLUMN token_ledger.message_id IS 'Id of the API message';
COMMENT ON COLUMN token_ledger.session_id IS 'Session that it was first seen in';
COMMENT ON COLUMN token_ledger.timestamp IS 'When, Unix milliseconds';
COMMENT ON COLUMN token_ledger.model IS 'Language model that answered';
COMMENT ON COLUMN token_ledger.input_tokens IS 'Input tokens, without cached ones';
COMMENT ON COLUMN token_ledger.output_tokens IS 'Output tokens';
COMMENT ON COLUMN token_ledger.cache_read IS 'Input tokens read from the cache';
COMMENT ON COLUMN token_ledger.cache_creation IS 'Input tokens that made the cache';

COMMENT ON VIEW active_sessions IS 'Visible sessions with totals, pinned first, newest first';
COMMENT ON VIEW session_hierarchy IS 'Every session with its depth and path from the root';
COMMENT ON FUNCTION get_recent_events(INTEGER) IS 'The newest events over all sessions; NULL means 100';
COMMENT ON FUNCTION get_session_event_counts(VARCHAR) IS 'Events of a session by type, most first';
COMMENT ON FUNCTION prune_old_sessions(BIGINT) IS 'Delete old sessions, whole trees only, not pinned; returns how many';
COMMENT ON FUNCTION update_updated_at_column() IS 'Sets updated_at when a row changes';
COMMENT ON TRIGGER trigger_sessions_updated_at ON sessions IS 'Keeps updated_at';

-- Partitioning ------------------------------------------------------------------------------------
--
-- events is one table: every query above is an index range, and an id is unique by its primary key
-- alone. `contextuate-persist partition` makes it one with a partition for each month, week or day,
-- whose retention drops whole partitions; postgresql-partitioned.sql says how. A partitioned table's
-- keys must contain the partition column, so there PRIMARY KEY (id) is not possible, and an event
-- delivered again with another timestamp would be a second row: never partition this table by hand
-- with PARTITION BY RANGE (timestamp) alone. schema_version.layout tells the library which layout it
-- finds.

-- Version -----------------------------------------------------------------------------------------

INSERT INTO schema_version (version, name) VALUES (1, 'base schema') ON CONFLICT DO NOTHING;
