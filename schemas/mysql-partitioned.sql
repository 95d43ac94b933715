-- The partitioned layout of contextuate_persist for MySQL 8.0.17 and newer.
--
-- `contextuate-persist partition` runs this beside the table `events` of mysql-schema.sql, makes the
-- partitions, copies the events, and then swaps the tables in one RENAME: events_partitioned becomes
-- events, event_ids_new becomes event_ids. The old table stays as events_unpartitioned. Whether there
-- is a table event_ids tells which layout it is: MySQL could not change schema_version with the swap.

-- Every unique key of a partitioned table must contain the partition column, so none of events can see
-- an id again that comes with another time. This table does: it decides what is new, and gives out
-- seq. That events.seq has no default keeps everybody out who does not ask here first.
CREATE TABLE IF NOT EXISTS event_ids_new (
    id         BINARY(16) NOT NULL COMMENT 'Id of the event',
    seq        BIGINT     NOT NULL AUTO_INCREMENT COMMENT 'Order of arrival, given out here',
    timestamp  BIGINT     NOT NULL COMMENT 'When it happened, which leads to its partition',

    PRIMARY KEY (id),
    -- AUTO_INCREMENT needs it
    KEY idx_seq (seq)
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin
  COMMENT = 'Which events are stored: over all partitions each id once';

-- Partitioned tables have no foreign keys: whoever deletes a session deletes its events and their ids,
-- and whoever stores an event holds the lock of its session.
CREATE TABLE IF NOT EXISTS events_partitioned (
    session_id         VARCHAR(255) NOT NULL COMMENT 'Session in which it happened',
    timestamp          BIGINT       NOT NULL COMMENT 'When it happened, Unix milliseconds',
    seq                BIGINT       NOT NULL COMMENT 'Order of arrival; decides between equal timestamps',
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

    -- get_events, iter_events(session_id=), the last event of a session
    PRIMARY KEY (session_id, timestamp, seq),
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

    -- The names of the old table's rules are taken as long as that stays.
    CONSTRAINT partitioned_event_type CHECK (event_type <> '' AND event_type = TRIM(event_type)),
    CONSTRAINT partitioned_hook_type CHECK (hook_type <> '' AND hook_type = TRIM(hook_type)),
    CONSTRAINT partitioned_data CHECK (JSON_TYPE(data) = 'OBJECT')
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin
  COMMENT = 'What happened in sessions; rows never change'
PARTITION BY RANGE (timestamp) (PARTITION p_rest VALUES LESS THAN MAXVALUE);
