"""The benchmark: what it tells, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from contextuate_persist.bench.load import Load
from contextuate_persist.bench.measure import Goal, rates
from contextuate_persist.bench.scratch import NAME
from contextuate_persist.bench.suite import GOALS
from contextuate_persist.cli import main
from tests.conftest import Database
from tests.servers import Server

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


def test_a_goal_is_met_at_its_limit_and_missed_behind_it() -> None:
    floor, ceiling = Goal(limit=2, at_least=True), Goal(limit=2, at_least=False)
    assert [floor.met(value) for value in (1.99, 2, 3)] == [False, True, True]
    assert [ceiling.met(value) for value in (1, 2, 2.01)] == [True, True, False]


def test_contenders_take_turns_and_nobody_is_always_first() -> None:
    turns: list[tuple[str, int]] = []
    contenders = {name: lambda r, n=name: turns.append((n, r)) for name in ("a", "b")}
    assert rates(contenders, rounds=3, events=10).keys() == {"a", "b"}
    assert turns == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
