"""Databases as contextuate's own SQL files leave them, rebuilt from what they define."""

from __future__ import annotations

from typing import Any

import psycopg

from contextuate_persist import schema
from tests.conftest import Database

POSTGRESQL = """
CREATE TYPE session_status AS ENUM ('active', 'completed', 'error');
CREATE TYPE monitor_event_type AS ENUM (
    'session_start', 'session_end', 'tool_call', 'tool_result', 'message', 'notification',
    'thinking', 'error', 'agent_spawn', 'agent_complete'
);
CREATE TYPE claude_hook_type AS ENUM (
    'PreToolUse', 'PostToolUse', 'Notification', 'Stop', 'SubagentStop'
);
CREATE TABLE sessions (
    session_id VARCHAR(255) PRIMARY KEY, machine_id VARCHAR(255) NOT NULL,
    working_directory TEXT NOT NULL, start_time BIGINT NOT NULL, end_time BIGINT,
    status session_status NOT NULL DEFAULT 'active', parent_session_id VARCHAR(255),
    manual_parent_session_id VARCHAR(255), child_session_ids JSONB NOT NULL DEFAULT '[]',
    agent_type VARCHAR(50), is_user_initiated BOOLEAN NOT NULL DEFAULT TRUE,
    is_pinned BOOLEAN NOT NULL DEFAULT FALSE, hidden BOOLEAN NOT NULL DEFAULT FALSE,
    label VARCHAR(255), token_usage_input BIGINT NOT NULL DEFAULT 0,
    token_usage_output BIGINT NOT NULL DEFAULT 0,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(), updated_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT chk_end_time CHECK (end_time IS NULL OR end_time >= start_time),
    CONSTRAINT fk_parent_session FOREIGN KEY (parent_session_id)
        REFERENCES sessions (session_id) ON DELETE SET NULL
);
CREATE INDEX idx_sessions_status ON sessions (status);
CREATE INDEX idx_sessions_parent_session_id ON sessions (parent_session_id);
CREATE INDEX idx_sessions_start_time ON sessions (start_time DESC);
CREATE INDEX idx_sessions_machine_id ON sessions (machine_id);
CREATE INDEX idx_sessions_hidden_status ON sessions (hidden, status, start_time DESC);
CREATE INDEX idx_sessions_pinned ON sessions (is_pinned, start_time DESC);
CREATE INDEX idx_sessions_child_ids ON sessions USING GIN (child_session_ids);
CREATE INDEX idx_sessions_active ON sessions (start_time DESC) WHERE status = 'active';
CREATE INDEX idx_sessions_visible ON sessions (start_time DESC) WHERE hidden = FALSE;
CREATE TABLE events (
    id UUID PRIMARY KEY, session_id VARCHAR(255) NOT NULL, timestamp BIGINT NOT NULL,
    event_type monitor_event_type NOT NULL, hook_type claude_hook_type NOT NULL,
    parent_session_id VARCHAR(255), machine_id VARCHAR(255) NOT NULL,
    working_directory TEXT NOT NULL, data JSONB NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT fk_event_session FOREIGN KEY (session_id)
        REFERENCES sessions (session_id) ON DELETE CASCADE
);
CREATE INDEX idx_events_session_timestamp ON events (session_id, timestamp DESC);
CREATE INDEX idx_events_timestamp ON events (timestamp DESC);
CREATE INDEX idx_events_event_type ON events (event_type, timestamp DESC);
CREATE INDEX idx_events_machine_timestamp ON events (machine_id, timestamp DESC);
CREATE INDEX idx_events_data ON events USING GIN (data);
CREATE INDEX idx_events_parent_session ON events (parent_session_id, timestamp DESC)
    WHERE parent_session_id IS NOT NULL;
CREATE INDEX idx_events_errors ON events (timestamp DESC) WHERE event_type = 'error';
CREATE INDEX idx_events_tool_calls ON events (session_id, timestamp DESC)
    WHERE event_type IN ('tool_call', 'tool_result');
CREATE FUNCTION update_updated_at_column() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN NEW.updated_at = now(); RETURN NEW; END $$;
CREATE TRIGGER trigger_sessions_updated_at BEFORE UPDATE ON sessions
    FOR EACH ROW EXECUTE FUNCTION update_updated_at_column();
CREATE VIEW active_sessions AS
    SELECT session_id, start_time, jsonb_array_length(child_session_ids) AS child_count
    FROM sessions WHERE hidden = FALSE;
CREATE FUNCTION get_session_event_counts(sid VARCHAR(255))
    RETURNS TABLE (event_type monitor_event_type, event_count BIGINT) LANGUAGE sql AS
    $$ SELECT event_type, count(*) FROM events WHERE session_id = sid GROUP BY event_type $$;
CREATE FUNCTION prune_old_sessions(older_than_ms BIGINT) RETURNS INT LANGUAGE plpgsql AS
    $$ BEGIN RETURN 0; END $$;
"""

MYSQL = """
CREATE TABLE sessions (
    session_id VARCHAR(255) PRIMARY KEY, machine_id VARCHAR(255) NOT NULL,
    working_directory TEXT NOT NULL, start_time BIGINT NOT NULL, end_time BIGINT,
    status VARCHAR(20) NOT NULL DEFAULT 'active', parent_session_id VARCHAR(255),
    manual_parent_session_id VARCHAR(255), child_session_ids JSON NOT NULL DEFAULT (JSON_ARRAY()),
    agent_type VARCHAR(50), is_user_initiated BOOLEAN NOT NULL DEFAULT TRUE,
    is_pinned BOOLEAN NOT NULL DEFAULT FALSE, hidden BOOLEAN NOT NULL DEFAULT FALSE,
    label VARCHAR(255), token_usage_input BIGINT NOT NULL DEFAULT 0,
    token_usage_output BIGINT NOT NULL DEFAULT 0,
    created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    updated_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP,
    CONSTRAINT chk_status CHECK (status IN ('active', 'completed', 'error')),
    CONSTRAINT chk_end_time CHECK (end_time IS NULL OR end_time >= start_time),
    CONSTRAINT fk_parent_session FOREIGN KEY (parent_session_id)
        REFERENCES sessions (session_id) ON DELETE SET NULL,
    INDEX idx_status (status), INDEX idx_parent_session_id (parent_session_id),
    INDEX idx_start_time (start_time DESC), INDEX idx_machine_id (machine_id),
    INDEX idx_hidden_status (hidden, status, start_time DESC),
    INDEX idx_pinned (is_pinned, start_time DESC)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_unicode_ci;
CREATE TABLE events (
    id VARCHAR(36) PRIMARY KEY, session_id VARCHAR(255) NOT NULL, timestamp BIGINT NOT NULL,
    event_type VARCHAR(50) NOT NULL, hook_type VARCHAR(50) NOT NULL,
    parent_session_id VARCHAR(255), machine_id VARCHAR(255) NOT NULL,
    working_directory TEXT NOT NULL, data JSON NOT NULL,
    created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    CONSTRAINT fk_event_session FOREIGN KEY (session_id)
        REFERENCES sessions (session_id) ON DELETE CASCADE,
    CONSTRAINT chk_event_type CHECK (event_type IN (
        'session_start', 'session_end', 'tool_call', 'tool_result', 'message', 'notification',
        'thinking', 'error', 'agent_spawn', 'agent_complete')),
    CONSTRAINT chk_hook_type CHECK (hook_type IN (
        'PreToolUse', 'PostToolUse', 'Notification', 'Stop', 'SubagentStop')),
    INDEX idx_session_timestamp (session_id, timestamp DESC), INDEX idx_timestamp (timestamp DESC),
    INDEX idx_event_type (event_type, timestamp DESC),
    INDEX idx_machine_timestamp (machine_id, timestamp DESC),
    INDEX idx_parent_session (parent_session_id, timestamp DESC)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_unicode_ci;
"""

DATA = """
INSERT INTO sessions (
    session_id, machine_id, working_directory, start_time, end_time, status, parent_session_id,
    manual_parent_session_id, child_session_ids, agent_type, is_pinned, label, token_usage_input
) VALUES
    ('root', 'm', '/w', 1700000000000, 1700000009000, 'completed', NULL, NULL, '["child"]', NULL,
     TRUE, 'Label', 7),
    ('child', 'm', '/w', 1700000001000, NULL, 'active', 'root', 'folder', '[]', 'nexus', FALSE,
     NULL, 0);
INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, parent_session_id, machine_id,
    working_directory, data, created_at
) VALUES
    ('0193aaaa-0000-7000-8000-000000000001', 'root', 1700000000000, 'session_start', 'Notification',
     NULL, 'm', '/w', '{"a": 1.5, "text": "it''s"}', '2024-01-01 00:00:01'),
    ('0193aaaa-0000-7000-8000-000000000003', 'child', 1700000001000, 'tool_call', 'PreToolUse',
     'root', 'm', '/w', '{"toolName": "Bash", "toolUseId": "t1"}', '2024-01-01 00:00:03'),
    ('0193aaaa-0000-7000-8000-000000000002', 'child', 1700000001000, 'tool_result', 'PostToolUse',
     'root', 'm', '/w', '{"toolName": 5}', '2024-01-01 00:00:04'),
    ('0193aaaa-0000-7000-8000-000000000004', 'root', 5, 'message', 'Stop', NULL, 'm', '/w',
     '["an array"]', '2024-01-01 00:00:05');
"""

# What only the case-insensitive collation of the original lets in.
MYSQL_DATA = """
INSERT INTO sessions (session_id, machine_id, working_directory, start_time, parent_session_id)
VALUES ('kid', 'm', '/w', 1700000002000, 'ROOT');
INSERT INTO events (
    id, session_id, timestamp, event_type, hook_type, machine_id, working_directory, data
) VALUES
    ('0193AAAA-0000-7000-8000-000000000005', 'ROOT', 1700000003000, 'message', 'Stop', 'M2', '/2',
     '{}'),
    ('no-uuid', 'Child', 1700000003000, 'message', 'Stop', 'm', '/w', '{}'),
    ('no-uuid-2', 'Child', 1700000002500, 'message', 'Stop', 'm', '/early', '{}');
"""


def make_original(database: Database) -> None:
    """Create contextuate's tables in an empty database, with data in them."""
    scripts = {"postgresql": [POSTGRESQL, DATA], "mysql": [MYSQL, DATA, MYSQL_DATA]}
    statements = [
        statement
        for script in scripts[database.backend]
        for statement in schema.split_script(script, database.backend)
    ]
    run_all(database, statements)


def run_all(database: Database, statements: list[str]) -> None:
    if database.backend == "postgresql":
        with psycopg.connect(database.owner_url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)
        return
    connection: Any = database.server._connect(database.name)
    try:
        for statement in statements:
            connection.cmd_query(statement.encode())
    finally:
        connection.close()
