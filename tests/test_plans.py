"""Plans: each statement of the stores finds its rows by an index, and each index serves one.

The statements are taken from the stores while these run, and explained with the same parameters, on
the same connection, just before they are executed.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import psycopg
import pytest
from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer

from contextuate_persist import MonitorEvent, SessionMeta, TokenUsage, mysql_store
from contextuate_persist.base import BaseStore
from tests import servers
from tests.builders import T0, event, session, usage
from tests.conftest import Database, make_store, new_database

EVENTS = 50_000
SESSIONS = 400
QUIET = 2_600  # sessions whose events are not there
HOUR = 3_600_000

# --- Data -----------------------------------------------------------------------------------------

TOOLS = ("Bash", "Read", "Edit", "Grep", "Write", "Glob", "mcp__jira__search")
# Per thousand events; what is left are calls and results.
OTHER_TYPES = (
    ("message", "Notification", 80),
    ("thinking", "Notification", 60),
    ("user_prompt", "UserPromptSubmit", 30),
    ("session_start", "SessionStart", 4),
    ("error", "StopFailure", 2),
    ("future_thing", "Tomorrow", 1),
)


def sessions() -> Iterator[SessionMeta]:
    for number in range(QUIET + SESSIONS):
        start = T0 + number * HOUR
        running = number % 20 == 19
        yield session(
            name(number),
            machine_id=machine(number),
            start_time=start,
            end_time=None if running else start + HOUR,
            status="active" if running else "error" if number % 50 == 7 else "completed",
            is_pinned=number % 97 == 0,
            hidden=number % 15 == 0,
            parent_session_id=name(number - number % 10) if number % 10 in (3, 4, 5) else None,
            manual_parent_session_id=name(number - 1) if number % 40 == 6 else None,
            child_session_ids=(name(number + 3), name(number + 4)) if number % 10 == 0 else (),
            token_usage=TokenUsage(total_input=number, total_output=number),
        )


def name(number: int) -> str:
    return f"session-{number:04}"


def machine(number: int) -> str:
    return "laptop" if number == 26 else f"machine-{number % 7}"


def events() -> Iterator[MonitorEvent]:
    chosen = random.Random(3)
    # Some sessions are a hundred times as long as others.
    weights = [1 + 99 * (number % 13 == 0) + number % 10 for number in range(SESSIONS)]
    owners = sorted(chosen.choices(range(SESSIONS), weights, k=EVENTS))
    position: dict[int, int] = {}
    for count, owner in enumerate(owners):
        step = position[owner] = position.get(owner, -1) + 1
        fields: dict[str, Any] = {
            "id": str(uuid.UUID(int=chosen.getrandbits(128), version=4)),
            "machine_id": machine(owner),
            "parent_session_id": name(owner - owner % 10) if owner % 10 in (3, 4, 5) else None,
        }
        draw = chosen.randrange(1000)
        for event_type, hook_type, share in OTHER_TYPES:
            if draw < share:
                data: dict[str, Any] = {"message": "word " * 40, "n": count}
                fields |= {"event_type": event_type, "hook_type": hook_type}
                break
            draw -= share
        else:
            result = step % 2
            data = {
                "toolName": chosen.choices(TOOLS, (400, 250, 150, 100, 60, 39, 1))[0],
                "toolUseId": f"toolu_{owner}_{step // 2}",
                ("toolOutput" if result else "toolInput"): {"text": "line of text\n" * 12},
            }
            fields |= {
                "event_type": "tool_result" if result else "tool_call",
                "hook_type": "PostToolUse" if result else "PreToolUse",
            }
        if count % 5_000 == 0:
            data["rare"] = count
        if count % 9_999 == 0:
            data["text"] = "NUL \0, which no column holds"
        # Ten events share each millisecond.
        yield event(name(owner), T0 + owner * HOUR + step // 10, data=data, **fields)


@pytest.fixture(scope="module")
def filled(backend: str, server: servers.Server) -> Iterator[Database]:
    """A database with fifty thousand events; tests change only what they add to it."""
    database = new_database(server)
    database.owner().apply_schema()
    with make_store(database.url, statement_timeout=300) as store:
        store.save_sessions(sessions())
        assert store.save_events(events()) == EVENTS
        for number in range(500):
            store.save_session(session(f"gone-{number}"))
        for number in range(0, 500, 10):
            store.delete_session(f"gone-{number}")
    now = round(time.time() * 1000)
    deletions = [("old", T0 + i) for i in range(20)] + [("fresh", now - i) for i in range(2_000)]
    forgotten = ", ".join(f"('{kind}-{deleted}', {deleted})" for kind, deleted in deletions)
    database.execute(f"INSERT INTO deleted_sessions (session_id, deleted_at) VALUES {forgotten}")
    used = ", ".join(
        f"('message-{number}', '{name(number % SESSIONS)}', {T0 + number})"
        for number in range(4_000)
    )
    database.execute(f"INSERT INTO token_ledger (message_id, session_id, timestamp) VALUES {used}")
    tables = ("sessions", "events", "deleted_sessions", "token_ledger")
    for table in tables:
        database.execute(
            f"VACUUM ANALYZE {table}" if backend == "postgresql" else f"ANALYZE TABLE {table}"
        )
    yield database
    database.drop()


@pytest.fixture
def full(filled: Database) -> Iterator[BaseStore]:
    with make_store(filled.url) as store:
        yield store


# --- Plans ----------------------------------------------------------------------------------------


@dataclass
class Plan:
    """How the server would find the rows of one statement."""

    statement: str
    text: str
    indexes: set[str] = field(default_factory=set)
    scans: set[str] = field(default_factory=set)  # tables, by alias, read from end to end
    sorts: set[str] = field(default_factory=set)  # those of which an unbounded part is sorted

    def __str__(self) -> str:
        return f"{' '.join(self.statement.split())}\n{self.text}"


def postgresql_plan(connection: Any, statement: str, parameters: Any, generic: bool) -> Plan:
    """As for these values; `generic`, as the server may plan it once it is prepared."""
    if generic:
        parts = PostgresQuery(Transformer(connection))
        parts.convert(statement, parameters)
        explain = b"EXPLAIN (GENERIC_PLAN, FORMAT JSON) " + parts.query
        answer = connection.pgconn.exec_(explain)
        assert answer.status == psycopg.pq.ExecStatus.TUPLES_OK, answer.error_message
        root = orjson.loads(answer.get_value(0, 0))[0]["Plan"]
    else:
        explained = connection.cursor().execute(
            "EXPLAIN (FORMAT JSON) " + statement, parameters, prepare=False
        )
        root = explained.fetchone()[0][0]["Plan"]
    plan = Plan(statement, "")
    lines: list[str] = []

    def visit(node: Mapping[str, Any], depth: int, sorted_above: bool) -> None:
        kind, index = node["Node Type"], node.get("Index Name")
        # "child_1" is a second "child" of the statement.
        table = re.sub(r"_\d+$", "", node.get("Alias", "")) if "Relation Name" in node else ""
        lines.append(f"{'  ' * depth}{kind} {table} {index or ''} rows={node['Plan Rows']}")
        if index:
            plan.indexes.add(index)
        if kind == "Seq Scan":
            plan.scans.add(table)
        if kind == "Limit":
            sorted_above = False
        elif kind == "Sort":
            sorted_above = True
        if table and sorted_above:
            plan.sorts.add(table)
        for child in node.get("Plans", ()):
            # What is computed for a row is sorted with it, not itself.
            below = child.get("Parent Relationship") != "SubPlan"
            visit(child, depth + 1, sorted_above and below)

    visit(root, 0, False)
    plan.text = "\n".join(lines)
    return plan


# What MySQL names beside tables: results of its own. The rows of a JSON array it marks itself.
DERIVED = re.compile(r"<.*>|subtree|k|l|links|state|kept|clock")
# The tables by the names that the statements give them, for MySQL's index names.
TABLES = {
    "e": "events",
    "s": "sessions",
    "child": "sessions",
    "d": "deleted_sessions",
    "gone": "deleted_sessions",
    "t": "token_ledger",
}


def mysql_plan(statement: str, rows: list[Any]) -> Plan:
    lines = [
        tuple(v.decode() if isinstance(v, bytes | bytearray) else v for v in row) for row in rows
    ]
    plan = Plan(statement, "\n".join(str(line) for line in lines))
    for line in lines:
        alias, access, key, extra = line[2], line[4], line[6], line[11] or ""
        if alias is None or DERIVED.fullmatch(alias) or "Table function" in extra:
            continue
        for one in filter(None, (key or "").split(",")):
            plan.indexes.add(f"{TABLES.get(alias, alias)}.{one}" if one == "PRIMARY" else one)
        if access == "ALL" and line[1] != "INSERT":
            plan.scans.add(alias)
        if "Using filesort" in extra:
            plan.sorts.add(alias)
    return plan


class _Collector:
    """Stands for a connection, and keeps the bytes that would be sent."""

    sent = b""

    def cmd_query(self, statement: bytes) -> dict[str, int]:
        self.sent = statement
        return {"affected_rows": 0}


@contextmanager
def watched(store: BaseStore, generic: bool = False) -> Iterator[list[Plan]]:
    """The plans of all that the store executes meanwhile."""
    plans: list[Plan] = []
    # Not what a connection does for itself: new ones may open meanwhile.
    explainable = re.compile(
        r"[\s(]*(SELECT|WITH|INSERT|UPDATE|DELETE)\b(?!.*(set_config|pg_catalog|@@))", re.DOTALL
    )
    with pytest.MonkeyPatch.context() as patch:
        if store.backend == "postgresql":
            execute = psycopg.Connection.execute

            def postgresql(connection: Any, query: Any, params: Any = None, **more: Any) -> Any:
                if explainable.match(query):
                    plans.append(postgresql_plan(connection, query, params, generic))
                return execute(connection, query, params, **more)

            patch.setattr(psycopg.Connection, "execute", postgresql)
        else:
            prepared, send = mysql_store._prepared, mysql_store._send

            def point(connection: Any, statement: str, parameters: Any) -> Any:
                if explainable.match(statement):
                    explained = prepared(
                        connection, "EXPLAIN FORMAT=TRADITIONAL " + statement, parameters
                    )
                    plans.append(mysql_plan(statement, explained.fetchall()))
                return prepared(connection, statement, parameters)

            def batch(connection: Any, statement: str, parameters: Any) -> int:
                parameters = {key: list(values) for key, values in parameters.items()}
                collector = _Collector()
                send(collector, statement, parameters)
                connection.cmd_query(b"EXPLAIN FORMAT=TRADITIONAL " + collector.sent)
                rows = connection.get_rows()[0]
                connection.free_result()
                plans.append(mysql_plan(statement, rows))
                return send(connection, statement, parameters)

            patch.setattr(mysql_store, "_prepared", point)
            patch.setattr(mysql_store, "_send", batch)
        yield plans
    assert plans


# --- Reads ----------------------------------------------------------------------------------------

LONG = name(13)  # a session of some thousand events
Call = Callable[[BaseStore], Any]


def newest_id(store: BaseStore) -> str:
    return store.get_events(LONG, limit=1)[0].id


def read(
    call: Call,
    postgresql: str,
    mysql: str,
    *,
    sorts: str = "",
    scans: str = "",
) -> Any:
    """A call, the indexes that it must use, and what it may sort and scan (by alias)."""
    return (
        call,
        {"postgresql": postgresql, "mysql": mysql},
        set(sorts.split()),
        set(scans.split()),
    )


CHILDREN = "idx_sessions_effective_parent", "idx_effective_parent"
EVENT_READS = {
    "get_events": read(
        lambda s: s.get_events(LONG), "idx_events_session_timestamp", "events.PRIMARY"
    ),
    "get_events before": read(
        lambda s: s.get_events(LONG, before=T0 + 13 * HOUR + 90, limit=50),
        "idx_events_session_timestamp", "events.PRIMARY",
    ),
    "get_events after": read(
        lambda s: s.get_events(LONG, after=T0 + 13 * HOUR + 90, limit=50),
        "idx_events_session_timestamp", "events.PRIMARY",
    ),
    "get_events between": read(
        lambda s: s.get_events(
            LONG, after=T0 + 13 * HOUR + 9, before=T0 + 13 * HOUR + 90, limit=50
        ),
        "idx_events_session_timestamp", "events.PRIMARY",
    ),
    "get_event_by_id": read(
        lambda s: s.get_event_by_id(LONG, newest_id(s)), "events_pkey", "uq_events_id"
    ),
    "get_all_recent_events": read(
        lambda s: s.get_all_recent_events(), "idx_events_timestamp", "idx_timestamp"
    ),
    "iter_events": read(
        lambda s: next(s.iter_events()), "idx_events_timestamp", "idx_timestamp"
    ),
    "iter_events after": read(
        lambda s: next(s.iter_events(after=T0 + 200 * HOUR)),
        "idx_events_timestamp", "idx_timestamp",
    ),
    "iter_events session": read(
        lambda s: next(s.iter_events(session_id=LONG)),
        "idx_events_session_timestamp", "events.PRIMARY",
    ),
    "session": read(
        lambda s: s.find_events(session_id=LONG), "idx_events_session_timestamp", "events.PRIMARY"
    ),
    "machine": read(
        lambda s: s.find_events(machine_id="laptop", limit=20),
        "idx_events_machine_timestamp", "idx_machine_timestamp",
    ),
    "parent": read(
        lambda s: s.find_events(parent_session_id=name(10)),
        "idx_events_parent_session", "idx_parent_session",
    ),
    "rare type": read(
        lambda s: s.find_events(event_type="session_start"),
        "idx_events_event_type", "idx_event_type",
    ),
    "errors": read(
        lambda s: s.find_events(event_type="error"), "idx_events_errors", "idx_event_type"
    ),
    "unknown type": read(
        lambda s: s.find_events(event_type="future_thing"),
        "idx_events_event_type_name", "idx_event_type",
    ),
    # Hooks that the ENUM knows have no index: newest first, until there are enough of them.
    "frequent hook": read(
        lambda s: s.find_events(hook_type="PreToolUse"), "idx_events_timestamp", "idx_timestamp"
    ),
    "unknown hook": read(
        lambda s: s.find_events(hook_type="Tomorrow"),
        "idx_events_hook_type_name", "idx_timestamp",
    ),
    "tool": read(
        lambda s: s.find_events(tool_name="mcp__jira__search", limit=10),
        "idx_events_tool_name", "idx_tool_name",
    ),
    # A call and its result: two rows are sorted.
    "tool use": read(
        lambda s: s.find_events(tool_use_id="toolu_13_5"),
        "idx_events_tool_use_id", "idx_tool_use_id", sorts="e",
    ),
    "before": read(
        lambda s: s.find_events(before=T0 + 200 * HOUR), "idx_events_timestamp", "idx_timestamp"
    ),
    "after": read(
        lambda s: s.find_events(after=T0 + 200 * HOUR, newest_first=False),
        "idx_events_timestamp", "idx_timestamp",
    ),
    "session and call": read(
        lambda s: s.find_events(session_id=LONG, event_type="tool_call"),
        "idx_events_session_timestamp", "events.PRIMARY",
    ),
    "session and result": read(
        lambda s: s.find_events(session_id=LONG, event_type="tool_result"),
        "idx_events_session_timestamp", "events.PRIMARY",
    ),
    "session and message": read(
        lambda s: s.find_events(session_id=LONG, event_type="message", limit=10),
        "idx_events_session_timestamp", "events.PRIMARY",
    ),
    "session and tool": read(
        lambda s: s.find_events(session_id=LONG, tool_name="Bash"),
        "idx_events_session_timestamp", "events.PRIMARY",
    ),
    # The GIN index gives few rows, in no order: these are sorted.
    "session contains": read(
        lambda s: s.find_events(session_id=LONG, contains={"rare": 5_000}),
        "idx_events_data", "events.PRIMARY", sorts="e",
    ),
    "type contains": read(
        lambda s: s.find_events(event_type="session_start", contains={"rare": 5_000}),
        "idx_events_data", "idx_event_type", sorts="e",
    ),
    "tool contains": read(
        lambda s: s.find_events(tool_name="Bash", contains={"rare": 5_000}),
        "idx_events_data idx_events_exact", "idx_tool_name", sorts="e",
    ),
    "after contains": read(
        lambda s: s.find_events(after=T0, contains={"rare": 5_000}),
        "idx_events_data idx_events_exact", "idx_timestamp", sorts="e",
    ),
    "session contains a big value": read(
        lambda s: s.find_events(session_id=LONG, contains={"toolInput": {}}),
        "idx_events_session_timestamp", "events.PRIMARY",
    ),
    "event_counts session": read(
        lambda s: s.event_counts(LONG), "idx_events_session_timestamp", "events.PRIMARY"
    ),
}  # fmt: skip
SESSION_READS = {
    # Sorting one row by the whole order costs nothing.
    "get_session": read(
        lambda s: s.get_session(name(10)),
        "sessions_pkey idx_sessions_effective_parent",
        "sessions.PRIMARY idx_effective_parent", sorts="s",
    ),
    "get_sessions": read(
        lambda s: s.get_sessions(limit=50), "idx_sessions_start_time", "idx_start_time"
    ),
    "active": read(
        lambda s: s.get_sessions(status="active", limit=10), "idx_sessions_active", "idx_status"
    ),
    "failed": read(
        lambda s: s.get_sessions(status="error", limit=10), "idx_sessions_status", "idx_status"
    ),
    "machine": read(
        lambda s: s.get_sessions(machine_id="laptop", limit=10),
        "idx_sessions_machine_id", "idx_machine_id",
    ),
    # Rows of one parent are few.
    "parent": read(
        lambda s: s.get_sessions(parent_session_id=name(10)), *CHILDREN, sorts="s"
    ),
    "visible": read(
        lambda s: s.get_sessions(hidden=False, limit=10), "idx_sessions_visible", "idx_start_time"
    ),
    "hidden and status": read(
        lambda s: s.get_sessions(hidden=True, status="completed", limit=10),
        "idx_sessions_hidden_status", "idx_hidden_status",
    ),
    "started_after": read(
        lambda s: s.get_sessions(started_after=T0 + 2_980 * HOUR, limit=10),
        "idx_sessions_start_time", "idx_start_time",
    ),
    "started_before": read(
        lambda s: s.get_sessions(started_before=T0 + 20 * HOUR, limit=10),
        "idx_sessions_start_time", "idx_start_time",
    ),
    # PostgreSQL expects some hundred sessions below, of three thousand, and joins them all.
    "session_tree": read(
        lambda s: s.session_tree(name(10)),
        "sessions_pkey idx_sessions_effective_parent", "sessions.PRIMARY idx_effective_parent",
        scans="s",
    ),
}  # fmt: skip


def check(plans: list[Plan], indexes: str, sorts: set[str], scans: set[str]) -> None:
    shown = "\n\n".join(map(str, plans))
    used = set().union(*(plan.indexes for plan in plans))
    assert set(indexes.split()) <= used, shown
    assert set().union(*(plan.scans for plan in plans)) <= scans, shown
    assert set().union(*(plan.sorts for plan in plans)) <= sorts, shown


@pytest.mark.parametrize("case", EVENT_READS)
def test_a_read_of_events_goes_by_its_index(full: BaseStore, case: str) -> None:
    call, indexes, sorts, scans = EVENT_READS[case]
    with watched(full) as plans:
        call(full)
    check(plans, indexes[full.backend], sorts, scans)


@pytest.mark.parametrize("case", SESSION_READS)
def test_a_read_of_sessions_goes_by_its_index(full: BaseStore, case: str) -> None:
    call, indexes, sorts, scans = SESSION_READS[case]
    with watched(full) as plans:
        call(full)
    # What a list of children costs is for a test of its own.
    lists = {"child", "gone"}
    check(plans, indexes[full.backend], sorts, scans | lists)


def test_events_are_counted_in_an_index_of_their_types(full: BaseStore) -> None:
    with watched(full) as plans:
        full.event_counts()
    # Neither server needs the rows for that.
    assert plans[0].indexes | plans[0].scans == (
        {"idx_events_event_type"} if full.backend == "postgresql" else {"idx_event_type"}
    )


def test_listed_children_are_looked_up_by_id(full: BaseStore) -> None:
    with watched(full) as plans:
        assert full.get_sessions(limit=50)
    assert [plan.scans for plan in plans] == [set()], str(plans[0])


@pytest.mark.only("postgresql")
@pytest.mark.parametrize("case", [*EVENT_READS, *SESSION_READS])
def test_a_plan_for_any_values_reads_no_whole_table(full: BaseStore, case: str) -> None:
    # From the sixth execution of a prepared statement on the server may take such a plan.
    if full._run(lambda connection: connection.info.server_version) < 160000:
        pytest.skip("EXPLAIN (GENERIC_PLAN) came with PostgreSQL 16")
    call, _, _, scans = {**EVENT_READS, **SESSION_READS}[case]
    with watched(full, generic=True) as plans:
        call(full)
    assert [plan for plan in plans if plan.scans & {"e", "s"} - scans] == []


@pytest.mark.only("postgresql")
def test_a_search_that_is_repeated_keeps_its_plan(filled: Database) -> None:
    with make_store(filled.url, pool_size=1) as store:
        for _ in range(12):
            store.find_events(event_type="error", machine_id="machine-3")
        generic = store._run(
            lambda connection: connection.execute(
                "SELECT statement FROM pg_prepared_statements WHERE generic_plans > 0"
                " AND statement LIKE '%monitor_event_type%'"
            ).fetchall()
        )
    assert generic == []


# --- Writes ---------------------------------------------------------------------------------------


def test_a_usual_event_looks_up_its_session_and_deletion_by_key(full: BaseStore) -> None:
    with watched(full) as plans:
        assert full.save_event(event(name(399), T0 + 5_000 * HOUR)) is True
    assert len(plans) == 1
    keys = {
        "postgresql": "sessions_pkey deleted_sessions_pkey",
        "mysql": "sessions.PRIMARY deleted_sessions.PRIMARY",
    }
    check(plans, keys[full.backend], set(), set())


def test_an_event_of_a_new_session_looks_up_by_key_only(full: BaseStore) -> None:
    with watched(full) as plans:
        child = event(f"new-{uuid.uuid4()}", parent_session_id=f"new-{uuid.uuid4()}")
        assert full.save_event(child) is True
    expected = {"postgresql": "deleted_sessions_pkey", "mysql": "deleted_sessions.PRIMARY"}
    check(plans, expected[full.backend], set(), set())


def test_saving_a_session_asks_the_ledger_by_its_index(full: BaseStore) -> None:
    with watched(full) as plans:
        full.save_session(session("saved", parent_session_id=name(1)))
        full.update_session("saved", token_usage=TokenUsage(total_input=1), label="x")
        full.update_session("saved", parent_session_id=name(2))
    expected = {
        "postgresql": "idx_token_ledger_session sessions_pkey",
        "mysql": "idx_token_ledger_session sessions.PRIMARY",
    }
    check(plans, expected[full.backend], {"child"}, set())  # locks two rows in their order
    full.delete_session("saved")


def test_saving_usage_finds_owners_and_totals_by_indexes(full: BaseStore) -> None:
    with watched(full) as plans:
        assert full.save_usage(name(1), [usage("message-2"), usage("message-3")]) == 2
    expected = {
        "postgresql": "token_ledger_pkey sessions_pkey idx_token_ledger_session",
        "mysql": "token_ledger.PRIMARY sessions.PRIMARY idx_token_ledger_session",
    }
    check(plans, expected[full.backend], {"s", "t"}, set())  # of the few that were asked for


def family(store: BaseStore) -> None:
    store.save_sessions(
        [
            session("doomed", parent_session_id="above", child_session_ids=("below",)),
            session("below", parent_session_id="doomed"),
            session("above", child_session_ids=("doomed",)),
        ],
        undelete=True,
    )
    store.save_events(event("doomed", T0 + i) for i in range(20))


def test_deleting_a_session_finds_its_family_by_indexes(full: BaseStore) -> None:
    family(full)
    with watched(full) as plans:
        full.delete_session("doomed")
    expected = {
        "postgresql": "sessions_pkey idx_sessions_parent_session_id idx_sessions_effective_parent"
        " idx_sessions_child_ids idx_events_session_timestamp",
        "mysql": "sessions.PRIMARY idx_parent_session_id idx_effective_parent",
    }
    check(plans, expected[full.backend], {"s"}, set())  # locks few rows in their order
    for left in ("above", "below"):
        full.delete_session(left)


def test_pruning_reads_all_sessions_but_of_events_only_the_last(full: BaseStore) -> None:
    full.save_session(
        session("ancient", start_time=T0 - 9 * HOUR, end_time=T0 - 8 * HOUR, status="completed")
    )
    with watched(full) as plans:
        assert full.prune_old_sessions(T0 - HOUR) == 1
    expected = {
        "postgresql": "idx_events_session_timestamp idx_deleted_sessions_deleted_at",
        "mysql": "events.PRIMARY idx_deleted_at",
    }
    whole = {"s", "sessions"}
    check(plans, expected[full.backend], whole, whole)


@pytest.mark.parametrize("kind", ["session_id", "machine_id", "working_directory"])
def test_what_is_forgotten_is_found_by_indexes(full: BaseStore, kind: str) -> None:
    family(full)
    place = {"machine_id": "forgotten", "working_directory": "/forgotten"}
    full.update_session("doomed", **place)  # type: ignore[arg-type]
    with watched(full) as plans:
        subject: dict[str, Any] = {"session_id": "doomed", **place}
        assert full.forget(**{kind: subject[kind]}).sessions == 2
    expected = {
        "postgresql": "sessions_pkey idx_sessions_effective_parent idx_sessions_child_ids"
        " idx_events_session_timestamp idx_events_parent_session idx_token_ledger_session",
        "mysql": "sessions.PRIMARY idx_parent_session_id idx_effective_parent events.PRIMARY"
        " idx_parent_session idx_token_ledger_session",
    }
    named = {
        "session_id": ("", ""),
        "machine_id": ("idx_events_machine_timestamp", "idx_machine_timestamp"),
        "working_directory": ("idx_events_timestamp", "idx_timestamp"),
    }[kind][full.backend == "mysql"]
    # The mere references, and the sessions of a directory, are looked for among all.
    check(plans, f"{expected[full.backend]} {named}", {"s", "sessions"}, {"s"})
    full.delete_session("above")


def test_what_retention_asks_of_some_sessions_it_finds_by_indexes(full: BaseStore) -> None:
    ids = [name(number) for number in (1, 2, 350)]
    states = [state for state in full.session_states() if state.session_id in ids]
    with watched(full) as plans:
        full.weigh_sessions(ids)
        full.fingerprints(ids)
        full.fingerprints(ids, in_slices=True)
        full.get_usage(ids[0])
        full.delete_unchanged(states, dict.fromkeys(ids, "not as it is"))
    expected = {
        "postgresql": "sessions_pkey idx_sessions_effective_parent idx_events_session_timestamp"
        " idx_token_ledger_session",
        "mysql": "sessions.PRIMARY idx_effective_parent events.PRIMARY idx_token_ledger_session",
    }
    check(plans, expected[full.backend], {"s", "e", "t"}, set())  # a few are sorted, to lock them


def test_the_events_of_very_many_sessions_are_found_by_an_index(full: BaseStore) -> None:
    """MySQL has a limit of memory for that, above which it would read all events."""
    ids = [f"none {number}" for number in range(2000)]
    with watched(full) as plans:
        deleted = full._run(
            lambda connection: full._delete_some_events(connection, ids, 10), transaction=True
        )
    assert deleted == 0
    expected = {
        "postgresql": "idx_events_session_timestamp events_pkey",
        "mysql": "events.PRIMARY",
    }
    check(plans, expected[full.backend], set(), set())


def test_what_a_copy_reads_of_some_sessions_it_finds_by_indexes(full: BaseStore) -> None:
    ids = [name(number) for number in (1, 2, 2_990)]
    with watched(full) as plans:
        assert len(full.sessions_of(ids)) == 3
        assert list(full.events_of(dict.fromkeys(ids, 5)))
    expected = {
        "postgresql": "sessions_pkey idx_sessions_effective_parent idx_events_session_timestamp",
        "mysql": "sessions.PRIMARY idx_effective_parent events.PRIMARY",
    }
    check(plans, expected[full.backend], {"s", "e"}, set())  # a few are sorted


# --- Indexes --------------------------------------------------------------------------------------

# Those that serve no statement of the stores, and what they are for.
OTHER_USES = {
    "postgresql": {
        "schema_version_pkey": "one version is recorded once",
        "idx_sessions_pinned": "the view active_sessions",
    },
    "mysql": {
        "schema_version.PRIMARY": "one version is recorded once",
        "idx_seq": "AUTO_INCREMENT needs it",
    },
}
INDEXES = {
    "postgresql": "SELECT indexname FROM pg_indexes WHERE schemaname = 'public'",
    "mysql": """
        SELECT DISTINCT IF(index_name = 'PRIMARY', CONCAT(table_name, '.PRIMARY'), index_name)
        FROM information_schema.statistics WHERE table_schema = DATABASE()
    """,
}


def test_each_index_serves_a_statement(full: BaseStore, filled: Database) -> None:
    family(full)
    with watched(full) as plans:
        for call, *_ in [*EVENT_READS.values(), *SESSION_READS.values()]:
            call(full)
        full.save_event(event(name(399), T0 + 5_000 * HOUR))
        full.save_session(session("above"))
        full.save_usage("above", [usage("message-5")])
        full.delete_session("doomed")
        full.prune_old_sessions(T0 - HOUR)
    for left in ("above", "below"):
        full.delete_session(left)
    used = set().union(*(plan.indexes for plan in plans))
    there = {index for (index,) in filled.execute(INDEXES[full.backend])}
    others = OTHER_USES[full.backend].keys()
    assert others <= there
    assert there - used - others == set()


@pytest.mark.only("postgresql")
def test_the_list_of_active_sessions_comes_in_the_order_of_its_index(filled: Database) -> None:
    with make_store(filled.owner_url) as store:
        listed = "SELECT * FROM active_sessions LIMIT 20"
        plan = store._run(lambda connection: postgresql_plan(connection, listed, None, False))
    assert "idx_sessions_pinned" in plan.indexes, str(plan)
    assert plan.sorts == set(), str(plan)
