"""The benchmark: what it tells, and that it leaves nothing behind."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import orjson
import pytest

from contextuate_persist.bench import year
from contextuate_persist.bench.load import Load
from contextuate_persist.bench.measure import Goal, rates
from contextuate_persist.bench.scratch import NAME
from contextuate_persist.bench.suite import GOALS
from contextuate_persist.bench.year import YEAR_EVENTS, extrapolated
from contextuate_persist.cli import main
from contextuate_persist.retention import DAY, prune
from tests.conftest import Database
from tests.servers import Server

# Goals that a year has, too.
OF_A_YEAR = {
    "get_session, p95",
    "last 100 events, p95",
    "recent 100 events, p95",
    "save_event, p95",
    "update_session, p95",
    "save_events of 10 while pruning, p95 / before",
}
# Goals that need the original's tables, or rivals, beside ours.
ELSEWHERE = ("original's", "SQLAlchemy")


@pytest.fixture
def administrator(server: Server, database: Database, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server whose administrator's URL the command line finds in the environment."""
    monkeypatch.setenv("CONTEXTUATE_DATABASE_URL", server.url(database.name))
    return server


def places(server: Server) -> list[str]:
    found = server.execute("SELECT schema_name FROM information_schema.schemata")
    return [name for (name,) in found]


def test_the_benchmark_says_for_every_goal_whether_it_is_met_and_tidies_up(
    administrator: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    assert main(["bench", "--events", "2000", "--output", str(output)]) == 0
    table = capsys.readouterr().out
    goals = [line for line in table.splitlines() if line.endswith(("met", "MISSED"))]
    for name in GOALS:
        told = [line for line in goals if f"  {name}  " in f"  {line[14:]}  "]
        assert len(told) == (not any(word in name for word in ELSEWHERE)), name
    written = orjson.loads(output.read_bytes())
    assert {figure["chapter"] for figure in written["figures"]} == {
        "growth", "reads", "threads", "single", "ingest", "writing", "retention"
    }  # fmt: skip
    assert all(figure["value"] > 0 for figure in written["figures"] if figure["goal"])
    server = written["servers"][administrator.kind]
    assert "driver" in server
    assert {"fsync", "sync_binlog"} & server.keys()
    assert not [name for name in places(administrator) if "bench" in name]


def test_a_year_is_kept_read_and_pruned_by_partition(
    administrator: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    assert main(["bench", "--full", "--events", "4000", "--output", str(output)]) == 0
    table = capsys.readouterr().out
    written = orjson.loads(output.read_bytes())
    figures = {figure["name"]: figure for figure in written["figures"]}
    assert len(figures) == len(written["figures"])
    assert {figure["chapter"] for figure in figures.values()} == {"year"}
    assert {name for name, figure in figures.items() if figure["goal"]} == OF_A_YEAR
    assert all(name in table for name in OF_A_YEAR)
    assert figures["events kept"]["value"] == 4000
    partitions, sessions = figures["drop_partitions: seconds"]["note"].split(", ")[:2]
    assert int(partitions.split()[0]) >= 6
    assert int(sessions.split()[0]) > 100
    assert figures["bytes after pruning"]["value"] < figures["bytes before pruning"]["value"]
    for name, points in written["curves"][administrator.kind].items():
        quarters = [1000, 2000, 3000, 4000]
        assert name == "events a second" or [at for at, _ in points] == quarters, name
    assert f"get_session, p95 extrapolated to {YEAR_EVENTS:,}" in figures
    assert not [name for name in places(administrator) if "bench" in name]


@pytest.mark.only("postgresql")  # one text for both, and it takes a while
def test_a_year_of_which_more_is_gone_than_was_due_has_no_figures(
    administrator: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prune_too_much(store: Any, policy: Any) -> Any:
        report = prune(store, policy)
        store.delete_session(store.get_sessions(limit=1)[0].session_id)
        return report

    monkeypatch.setattr(year, "prune", prune_too_much)
    with pytest.raises(RuntimeError, match=r"events that stay .* are left"):
        main(["bench", "--full", "--events", "2000"])
    assert capsys.readouterr().out == ""
    assert not [name for name in places(administrator) if "bench" in name]


def test_a_benchmark_that_was_killed_is_not_taken_for_somebodys_data(
    administrator: Server, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "SCHEMA" if administrator.kind == "postgresql" else "DATABASE"
    database.execute(f"CREATE {kind} {NAME}")
    try:
        assert main(["bench", "--events", "2000"]) == 1
        assert f"remove it with DROP {kind} {NAME}" in capsys.readouterr().err
    finally:
        database.execute(f"DROP {kind} {NAME}")


def test_an_account_that_may_make_no_place_is_told_so(
    database: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTEXTUATE_DATABASE_URL", database.url)
    assert main(["bench"]) == 1
    error = capsys.readouterr().err
    assert "a place for the benchmark cannot be made" in error
    assert error.count("\n") == 1


def test_without_a_server_the_benchmark_asks_for_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONTEXTUATE_DATABASE_URL", raising=False)
    assert main(["bench"]) == 1
    assert "give --url or CONTEXTUATE_DATABASE_URL" in capsys.readouterr().err


def test_the_load_is_the_same_in_every_run_and_shaped_like_recorded_events() -> None:
    events = Load().events(500, 4000)
    assert Load().events(500, 4000) == events
    assert Load().events(510, 1) == events[10:11]
    assert len({one.id for one in events}) == 4000
    assert [one.id for one in events] == sorted(one.id for one in events)
    sizes = sorted(len(orjson.dumps(one.data)) for one in events)
    assert 2000 < sum(sizes) / 4000 < 3000
    assert 15_000 < sizes[3960] < 25_000
    assert sizes[-1] > 700_000
    assert b"DELIMITER" in orjson.dumps([one.data for one in events])
    assert b"DELIMITER" not in orjson.dumps([one.data for one in Load("OTHER").events(0, 4000)])


def test_a_load_can_be_spread_over_a_year_whose_sessions_end() -> None:
    start = 1_700_000_000_000
    load = Load(start=start, events_per_second=7300 / (365 * 86_400), session_events=10)
    events = load.events(0, 7300)
    assert events[0].timestamp == start
    assert start + 364 * DAY < events[-1].timestamp < start + 365 * DAY
    assert [one.id for one in events] == sorted({one.id for one in events})
    now = events[5000].timestamp
    last = {one.session_id: one.timestamp for one in events}  # its last one
    for session in load.sessions(0, 7200, now=now):
        end = last[session.session_id]
        assert session.end_time == (end if end < now else None)
        assert (session.status == "active") == (end >= now)
    by_session = sorted(events[:7200], key=lambda one: one.session_id)
    sizes = {len(list(its)) for _, its in itertools.groupby(by_session, lambda o: o.session_id)}
    assert sizes == {10}


def test_a_time_at_more_events_lies_on_a_line_and_never_below_what_was_measured() -> None:
    grows = [(1000.0, 1.0), (10_000.0, 2.0), (100_000.0, 3.0)]
    assert extrapolated(grows, 10_000_000) == pytest.approx(5.0)
    assert extrapolated([(at, 4 - taken) for at, taken in grows], 10_000_000) == 1.0


def test_a_goal_is_met_at_its_limit_and_missed_behind_it() -> None:
    floor, ceiling = Goal(limit=2, at_least=True), Goal(limit=2, at_least=False)
    assert [floor.met(value) for value in (1.99, 2, 3)] == [False, True, True]
    assert [ceiling.met(value) for value in (1, 2, 2.01)] == [True, True, False]


def test_contenders_take_turns_and_nobody_is_always_first() -> None:
    turns: list[tuple[str, int]] = []
    contenders = {name: lambda r, n=name: turns.append((n, r)) for name in ("a", "b")}
    assert rates(contenders, rounds=3, events=10).keys() == {"a", "b"}
    assert turns == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
