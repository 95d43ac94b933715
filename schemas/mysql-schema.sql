-- Schema of contextuate_persist for MySQL 8.0.17 and newer.
--
-- Safe to run again: it creates what is missing and changes or removes nothing that holds data.
-- Apply it as the owner of the database:
--     contextuate-persist --url URL init
--     mysql DATABASE < mysql-schema.sql
-- The application's account needs SELECT, INSERT, UPDATE and DELETE on the database, nothing else;
-- the procedures are for administrators. Times are Unix milliseconds. Everything compares byte for
-- byte (utf8mb4_0900_bin): other collations take some different ids for one.

-- Tables ------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS schema_version (
    version     INT          NOT NULL COMMENT 'Number of the schema or migration',
    name        VARCHAR(100) NOT NULL COMMENT 'What the version is about',
    layout      VARCHAR(20)  NOT NULL DEFAULT 'plain' COMMENT 'Whether events is one table or partitioned',
    checksum    VARCHAR(64)           COMMENT 'SHA-256 of the file that was applied, if known',
    applied_at  TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3) COMMENT 'When it was applied',

    PRIMARY KEY (version),
    CONSTRAINT schema_version_layout CHECK (layout IN ('plain', 'partitioned'))
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin
  COMMENT = 'Schema versions applied to this database; the highest counts';

CREATE TABLE IF NOT EXISTS sessions (
    session_id                VARCHAR(255) NOT NULL COMMENT 'Id of the session, compared byte for byte',
    machine_id                VARCHAR(255) NOT NULL COMMENT 'Machine on which the session runs',
    working_directory         TEXT         NOT NULL COMMENT 'Directory in which the session was started',
    start_time                BIGINT       NOT NULL COMMENT 'Start, Unix milliseconds',
    end_time                  BIGINT                COMMENT 'End, Unix milliseconds; NULL while it runs or if unknown',
    status                    VARCHAR(20)  NOT NULL DEFAULT 'active' COMMENT 'Whether it runs, has ended, or has failed',
    parent_session_id         VARCHAR(255)          COMMENT 'Parent as detected from the events',
    manual_parent_session_id  VARCHAR(255)          COMMENT 'Parent as set by a person; wins',
    -- VIRTUAL: a STORED column could not be made from one that a foreign key sets to NULL.
    effective_parent_id       VARCHAR(255)
        GENERATED ALWAYS AS (COALESCE(manual_parent_session_id, parent_session_id)) VIRTUAL
        COMMENT 'The parent that counts: manual, else detected',
    child_session_ids         JSON         NOT NULL DEFAULT (JSON_ARRAY()) COMMENT 'Children that callers listed, an array of ids',
    agent_type                VARCHAR(255)          COMMENT 'Kind of sub-agent, as it names itself',
    model                     VARCHAR(255)          COMMENT 'Language model that runs the session',
    transcript_path           TEXT                  COMMENT 'File with the transcript of the session',
    is_user_initiated         BOOLEAN      NOT NULL DEFAULT TRUE COMMENT 'Started by a person rather than by an agent',
    is_pinned                 BOOLEAN      NOT NULL DEFAULT FALSE COMMENT 'Shown first and never pruned',
    hidden                    BOOLEAN      NOT NULL DEFAULT FALSE COMMENT 'Left out of listings of visible sessions',
    label                     TEXT                  COMMENT 'Name given by a person',
    token_usage_input         BIGINT       NOT NULL DEFAULT 0 COMMENT 'Input tokens in total',
    token_usage_output        BIGINT       NOT NULL DEFAULT 0 COMMENT 'Output tokens in total',
    token_usage_cache_read    BIGINT                COMMENT 'Input tokens read from the cache; NULL: unknown',
    token_usage_cache_creation BIGINT               COMMENT 'Input tokens that made the cache; NULL: unknown',
    known_from                VARCHAR(10)  NOT NULL DEFAULT 'session' COMMENT 'session: saved; event: made from an event; reference: only named as a parent',
    exact                     JSON                  COMMENT 'Texts that their columns cannot hold (NUL, surrogates), base64 by column',
    created_at                TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3) COMMENT 'When the row was made',
    updated_at                TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3)
        ON UPDATE CURRENT_TIMESTAMP(3) COMMENT 'When the row last changed',

    PRIMARY KEY (session_id),

    -- get_sessions(status=)
    KEY idx_status (status, start_time DESC, session_id DESC),
    -- the foreign key: what must change when a parent is deleted
    KEY idx_parent_session_id (parent_session_id),
    -- the children of a session: get_session, get_sessions(parent_session_id=), session_tree
    KEY idx_effective_parent (effective_parent_id, start_time),
    -- get_sessions(), newest first
    KEY idx_start_time (start_time DESC, session_id DESC),
    -- get_sessions(machine_id=)
    KEY idx_machine_id (machine_id, start_time DESC, session_id DESC),
    -- get_sessions(hidden=, status=)
    KEY idx_hidden_status (hidden, status, start_time DESC, session_id DESC),

    CONSTRAINT sessions_parent_session_id_fkey FOREIGN KEY (parent_session_id)
        REFERENCES sessions (session_id) ON DELETE SET NULL,
    CONSTRAINT sessions_status CHECK (status IN ('active', 'completed', 'error')),
    CONSTRAINT sessions_known_from CHECK (known_from IN ('session', 'event', 'reference')),
    CONSTRAINT sessions_child_session_ids CHECK (JSON_TYPE(child_session_ids) = 'ARRAY')
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin
  COMMENT = 'Runs of agents: those of a user, or of a sub-agent with a parent';

-- The primary key keeps the events of a session side by side: the main query reads few pages, and
-- inserts stay as fast as they began. A random UUID as the key loses two thirds of the insert rate on
-- the way to a million rows.
CREATE TABLE IF NOT EXISTS events (
    session_id         VARCHAR(255) NOT NULL COMMENT 'Session in which it happened',
    timestamp          BIGINT       NOT NULL COMMENT 'When it happened, Unix milliseconds',
    seq                BIGINT       NOT NULL AUTO_INCREMENT COMMENT 'Order of arrival; decides between equal timestamps',
    id                 BINARY(16)   NOT NULL COMMENT 'Id of the event: stored once, however often it is delivered',
    event_type         VARCHAR(100) NOT NULL COMMENT 'What happened: an open set',
    hook_type          VARCHAR(100) NOT NULL COMMENT 'The hook that told us: an open set',
    parent_session_id  VARCHAR(255)          COMMENT 'Parent of the session, as the event told',
    machine_id         VARCHAR(255) NOT NULL COMMENT 'Machine on which it happened',
    working_directory  TEXT         NOT NULL COMMENT 'Directory in which it happened',
    tool_name          VARCHAR(255)          COMMENT 'toolName of the payload, its first 255 characters',
    tool_use_id        VARCHAR(255)          COMMENT 'toolUseId of the payload, its first 255 characters',
    data               JSON         NOT NULL COMMENT 'The payload; if exact is filled, its closest queryable projection',
    exact              LONGBLOB              COMMENT 'JSON with what the columns cannot hold exactly; NULL mostly',
    commit_order       BIGINT                COMMENT 'Reserved for the order of commits; not filled',
    created_at         TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3) COMMENT 'When it was stored',

    -- get_events, iter_events(session_id=), the last event of a session; the foreign key
    PRIMARY KEY (session_id, timestamp, seq),
    -- get_event_by_id, and each event only once; the only unique key beside the primary one
    UNIQUE KEY uq_events_id (id),
    -- AUTO_INCREMENT needs it
    KEY idx_seq (seq),
    -- get_all_recent_events, iter_events()
    KEY idx_timestamp (timestamp, seq),
    -- find_events(event_type=)
    KEY idx_event_type (event_type, timestamp, seq),
    -- find_events(machine_id=)
    KEY idx_machine_timestamp (machine_id, timestamp, seq),
    -- find_events(parent_session_id=)
    KEY idx_parent_session (parent_session_id, timestamp, seq),
    -- find_events(tool_name=)
    KEY idx_tool_name (tool_name, timestamp, seq),
    -- find_events(tool_use_id=): a call and its result
    KEY idx_tool_use_id (tool_use_id),

    CONSTRAINT events_session_id_fkey FOREIGN KEY (session_id)
        REFERENCES sessions (session_id) ON DELETE CASCADE,
    CONSTRAINT events_event_type CHECK (event_type <> '' AND event_type = TRIM(event_type)),
    CONSTRAINT events_hook_type CHECK (hook_type <> '' AND hook_type = TRIM(hook_type)),
    CONSTRAINT events_data CHECK (JSON_TYPE(data) = 'OBJECT')
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin
  COMMENT = 'What happened in sessions; rows never change';

CREATE TABLE IF NOT EXISTS deleted_sessions (
    session_id  VARCHAR(255) NOT NULL COMMENT 'Id of the session',
    deleted_at  BIGINT       NOT NULL COMMENT 'When, Unix milliseconds; newer events are welcome',

    PRIMARY KEY (session_id),
    -- forgetting old deletions: prune_old_sessions
    KEY idx_deleted_at (deleted_at)
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin
  COMMENT = 'Deleted sessions, so that late deliveries do not bring them back';

CREATE TABLE IF NOT EXISTS token_ledger (
    message_id      VARCHAR(255) NOT NULL COMMENT 'Id of the API message',
    session_id      VARCHAR(255) NOT NULL COMMENT 'Session that it was first seen in',
    timestamp       BIGINT       NOT NULL COMMENT 'When, Unix milliseconds',
    model           VARCHAR(255)          COMMENT 'Language model that answered',
    input_tokens    BIGINT       NOT NULL DEFAULT 0 COMMENT 'Input tokens, without cached ones',
    output_tokens   BIGINT       NOT NULL DEFAULT 0 COMMENT 'Output tokens',
    cache_read      BIGINT       NOT NULL DEFAULT 0 COMMENT 'Input tokens read from the cache',
    cache_creation  BIGINT       NOT NULL DEFAULT 0 COMMENT 'Input tokens that made the cache',

    PRIMARY KEY (message_id),
    -- the totals of a session from its messages; the foreign key
    KEY idx_token_ledger_session (session_id),

    CONSTRAINT token_ledger_session_id_fkey FOREIGN KEY (session_id)
        REFERENCES sessions (session_id) ON DELETE CASCADE
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin
  COMMENT = 'Token usage per API message, each counted once over all sessions';

-- Views -------------------------------------------------------------------------------------------

-- The events with their ids as text.
CREATE OR REPLACE SQL SECURITY INVOKER VIEW events_text AS
SELECT
    BIN_TO_UUID(e.id) AS id,
    e.seq,
    e.session_id,
    e.timestamp,
    e.event_type,
    e.hook_type,
    e.parent_session_id,
    e.machine_id,
    e.working_directory,
    e.tool_name,
    e.tool_use_id,
    e.data,
    e.created_at
FROM events AS e;

-- Sessions to show, with what a list of them needs. Children are counted as get_session lists them.
CREATE OR REPLACE SQL SECURITY INVOKER VIEW active_sessions AS
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
        SELECT COUNT(*) FROM sessions AS child WHERE child.effective_parent_id = s.session_id
    ) + (
        -- Read apart: sorted with the rest, a list of 10,000 is more than the sort buffer takes.
        SELECT COUNT(*)
        FROM sessions AS own
        JOIN JSON_TABLE(
            own.child_session_ids,
            '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
        ) AS listed
        WHERE own.session_id = s.session_id AND NOT EXISTS (
            SELECT 1 FROM sessions AS child
            WHERE child.session_id = listed.session_id AND child.effective_parent_id IS NOT NULL
        ) AND (
            EXISTS (
                SELECT 1 FROM sessions AS child
                WHERE child.session_id = listed.session_id AND child.known_from <> 'reference'
            )
            OR NOT EXISTS (
                SELECT 1 FROM deleted_sessions AS d WHERE d.session_id = listed.session_id
            )
        )
    ) AS child_count,
    GREATEST(
        COALESCE(s.end_time, CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)) - s.start_time, 0
    ) AS duration_ms
FROM sessions AS s
WHERE s.hidden = FALSE AND s.known_from <> 'reference'
ORDER BY s.is_pinned DESC, s.start_time DESC;

-- Every session in its tree, cycles and orphans included: a tree begins where a parent is missing, and
-- in a cycle at the smallest id. `path` lists the ids from the root down to the session. Chains longer
-- than 1,000 need SET SESSION cte_max_recursion_depth first.
CREATE OR REPLACE SQL SECURITY INVOKER VIEW session_hierarchy AS
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
    WHERE NOT EXISTS (SELECT 1 FROM reached AS r WHERE r.session_id = s.session_id)
    UNION
    SELECT a.session_id, s.effective_parent_id
    FROM ancestry AS a JOIN shown AS s ON s.session_id = a.ancestor_id
),
starts AS (
    SELECT session_id FROM roots
    UNION ALL
    SELECT session_id FROM ancestry GROUP BY session_id HAVING MIN(ancestor_id) = session_id
),
walk (session_id, start_id, depth, path) AS (
    SELECT session_id, session_id, 0, CAST(JSON_ARRAY(session_id) AS JSON) FROM starts
    UNION ALL
    SELECT s.session_id, w.start_id, w.depth + 1, JSON_ARRAY_APPEND(w.path, '$', s.session_id)
    FROM walk AS w JOIN shown AS s ON s.effective_parent_id = w.session_id
    WHERE s.session_id <> w.start_id  -- a cycle can only close at its start
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
FROM walk AS w JOIN sessions AS s ON s.session_id = w.session_id;

-- Procedures, for administrators ------------------------------------------------------------------

-- CREATE PROCEDURE IF NOT EXISTS came with 8.0.29 only; dropping a procedure loses no data.
DROP PROCEDURE IF EXISTS get_recent_events;
DROP PROCEDURE IF EXISTS get_session_event_counts;
DROP PROCEDURE IF EXISTS prune_old_sessions;

DELIMITER //

CREATE PROCEDURE get_recent_events(IN max_events INT)
    READS SQL DATA SQL SECURITY INVOKER
    COMMENT 'The newest events over all sessions; NULL means 100'
BEGIN
    SET max_events = COALESCE(max_events, 100);
    SELECT
        BIN_TO_UUID(e.id) AS id, e.session_id, e.timestamp, e.event_type, e.hook_type,
        e.machine_id, e.working_directory, e.data
    FROM events AS e
    ORDER BY e.timestamp DESC, e.seq DESC
    LIMIT max_events;
END //

CREATE PROCEDURE get_session_event_counts(
    IN of_session_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin
)
    READS SQL DATA SQL SECURITY INVOKER
    COMMENT 'Events of a session by type, most first'
BEGIN
    SELECT e.event_type, COUNT(*) AS event_count
    FROM events AS e
    WHERE e.session_id = of_session_id
    GROUP BY e.event_type
    ORDER BY event_count DESC, e.event_type;
END //

-- What the library's prune_old_sessions does, in one transaction; but only the library forgets old
-- deletions. The ids are collected first, since MySQL cannot delete from a table that the same
-- statement reads. Writers wait meanwhile, so that no pin, child or event of theirs goes unseen.
CREATE PROCEDURE prune_old_sessions(IN older_than_ms BIGINT, OUT pruned INT)
    MODIFIES SQL DATA SQL SECURITY INVOKER
    COMMENT 'Delete old sessions, whole trees only, not pinned'
BEGIN
    DECLARE EXIT HANDLER FOR SQLEXCEPTION
    BEGIN
        ROLLBACK;
        RESIGNAL;
    END;

    SET SESSION cte_max_recursion_depth = 4294967295;
    DROP TEMPORARY TABLE IF EXISTS sessions_to_prune;
    CREATE TEMPORARY TABLE sessions_to_prune (
        session_id VARCHAR(255) NOT NULL PRIMARY KEY,
        shown      BOOLEAN      NOT NULL
    ) DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin;

    SET TRANSACTION ISOLATION LEVEL SERIALIZABLE;
    START TRANSACTION;
    INSERT INTO sessions_to_prune (session_id, shown)
    WITH RECURSIVE state AS (
        SELECT
            s.session_id,
            NOT s.is_pinned AND COALESCE(
                s.end_time,
                (
                    -- MAX() would read, and lock, all events of the session.
                    SELECT e.timestamp
                    FROM events AS e
                    WHERE e.session_id = s.session_id
                    ORDER BY e.session_id DESC, e.timestamp DESC, e.seq DESC
                    LIMIT 1
                ),
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
        SELECT l.neighbour_id FROM kept AS k JOIN links AS l ON l.session_id = k.session_id
    )
    SELECT s.session_id, s.known_from <> 'reference'
    FROM sessions AS s
    WHERE NOT EXISTS (SELECT 1 FROM kept AS k WHERE k.session_id = s.session_id);

    SELECT COUNT(*) INTO pruned FROM sessions_to_prune AS p WHERE p.shown;
    -- A mere reference leaves no trace: whoever lists its id goes on listing it.
    UPDATE sessions
    SET child_session_ids = COALESCE(
        (
            SELECT JSON_ARRAYAGG(listed.session_id)
            FROM JSON_TABLE(
                child_session_ids,
                '$[*]' COLUMNS (session_id VARCHAR(255) COLLATE utf8mb4_0900_bin PATH '$')
            ) AS listed
            WHERE listed.session_id NOT IN (
                SELECT p.session_id FROM sessions_to_prune AS p WHERE p.shown
            )
        ),
        JSON_ARRAY()
    )
    WHERE JSON_LENGTH(child_session_ids) > 0;
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
                    (
                        SELECT e.timestamp
                        FROM events AS e
                        WHERE e.session_id = s.session_id
                        ORDER BY e.session_id DESC, e.timestamp DESC, e.seq DESC
                        LIMIT 1
                    ),
                    0
                )
            )
        )
    FROM sessions_to_prune AS p
    JOIN sessions AS s ON s.session_id = p.session_id
    CROSS JOIN (SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now) AS clock
    WHERE p.shown
    ON DUPLICATE KEY UPDATE
        deleted_at = GREATEST(deleted_sessions.deleted_at, VALUES(deleted_at));
    -- Where events is partitioned it has no foreign key.
    IF EXISTS (
        SELECT 1 FROM information_schema.tables AS t
        WHERE t.table_schema = DATABASE() AND t.table_name = 'event_ids'
    ) THEN
        DELETE i
        FROM sessions_to_prune AS p
        JOIN events AS e ON e.session_id = p.session_id
        JOIN event_ids AS i ON i.id = e.id;
        DELETE e
        FROM sessions_to_prune AS p JOIN events AS e ON e.session_id = p.session_id;
    END IF;
    DELETE s FROM sessions AS s JOIN sessions_to_prune AS p ON p.session_id = s.session_id;
    COMMIT;
    DROP TEMPORARY TABLE sessions_to_prune;
END //

DELIMITER ;

-- Partitioning ------------------------------------------------------------------------------------
--
-- events is one table. `contextuate-persist partition` makes it one with a partition for each month,
-- week or day, whose retention drops whole partitions; mysql-partitioned.sql says how. MySQL's
-- partitioned tables have no foreign keys, and each unique key of theirs must contain the partition
-- column, so an event delivered again with another timestamp would be a second row: never partition
-- this table by hand.

-- Version -----------------------------------------------------------------------------------------

INSERT INTO schema_version (version, name) VALUES (1, 'base schema')
ON DUPLICATE KEY UPDATE version = schema_version.version;
