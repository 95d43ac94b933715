"""The writer: takes at once, keeps what it took, stores each thing once and in order."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextuate_persist import (
    AsyncEventWriter,
    ConfigurationError,
    EventWriter,
    InvalidRecord,
    MonitorEvent,
    PayloadPolicy,
    Receipt,
    SessionStatus,
    SpoolError,
    SpoolFull,
    StoreClosed,
    StoreUnavailable,
    TokenUsage,
    WriterHealth,
    dead_letters,
    outbox,
    payload,
    queued,
    sender,
    spool,
)
from contextuate_persist import writer as writer_module
from contextuate_persist.base import BaseStore
from contextuate_persist.dead_letters import DeadLetters, replay
from contextuate_persist.payload import MAX_DEPTH
from contextuate_persist.queued import Refused, Update
from contextuate_persist.spool import spool_state
from tests.builders import T0, event, session
from tests.conftest import Database, make_store
from tests.test_aio import held_back

MODES = ("always", "on_failure")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(store: BaseStore, directory: Path, mode: str) -> Iterator[EventWriter]:
    with EventWriter(store, spool=mode, spool_directory=directory) as opened:  # type: ignore[arg-type]
        yield opened


def away(store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store answer nothing until `monkeypatch.undo()`."""

    def fail(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("the database is away")

    for name in ("save_rows", "save_sessions", "update_session", "init"):
        monkeypatch.setattr(store, name, fail)


def ready(one: MonitorEvent) -> queued.Value:
    return queued.ready(queued.Arrival(0, 0, queued.take(one), 0, 0)).value


def balanced(health: WriterHealth) -> bool:
    done = health.stored + health.duplicate + health.set_aside
    return health.accepted == done + health.pending


# --- Putting and storing --------------------------------------------------------------------------


def test_what_was_put_is_stored_once_and_in_order(writer: EventWriter, store: BaseStore) -> None:
    events = [event(f"s{i % 7}", T0 + i // 20) for i in range(2500)]
    receipts = [writer.put(one) for one in events]
    assert writer.flush(30) == 0
    for name in {one.session_id for one in events}:
        assert store.get_events(name, limit=9999) == [e for e in events if e.session_id == name]
    assert all(receipt.safe and receipt.stored for receipt in receipts)
    assert {receipt.refusal for receipt in receipts} == {None}
    health = writer.health()
    assert (health.accepted, health.stored, health.pending) == (2500, 2500, 0)
    assert (health.memory_bytes, health.duplicate, health.oldest_seconds) == (0, 0, None)
    for one in events[:10]:
        writer.put(one)
    assert writer.flush(30) == 0
    assert (writer.health().accepted, writer.health().duplicate) == (2510, 10)


@pytest.mark.parametrize(
    ("given", "changed", "kept"),
    [
        ({"n": 1, "list": []}, {"n": 2, "list": [1], "more": {}}, {"n": 1, "list": []}),
        ({"n": 1}, {"n": float("nan")}, {"n": 1}),
        ({"n": 1}, {"n": 2**70}, {"n": 1}),
        ({"n": 2**70, "x": 1e300}, {"n": 1}, {"n": 2**70, "x": 1e300}),
        ({"text": "\0", "n": 1}, {"text": "", "n": 2}, {"text": "\0", "n": 1}),
        ({"text": "x" * 2**21}, {"text": ""}, {"text": "x" * 2**21}),
        ({"toolName": "Bash"}, {"toolName": "Edit"}, {"toolName": "Bash"}),
        ({"n": float("nan")}, {"n": 1}, None),
    ],
)
def test_an_owner_may_change_his_payload_once_it_was_put(
    store: BaseStore,
    directory: Path,
    given: dict[str, Any],
    changed: dict[str, Any],
    kept: dict[str, Any] | None,
) -> None:
    data = dict(given)
    with EventWriter(store, spool_directory=directory, flush_seconds=0.1) as writer:
        receipt = writer.put(event(data=data))
        data.clear()
        data.update(changed)
        assert receipt.wait_stored(30)
        assert (receipt.refusal is None) == (kept is not None)
    assert [e.data for e in store.get_events("s")] == ([kept] if kept else [])
    tool = (kept or {}).get("toolName", "Bash")
    assert len(store.find_events(tool_name=tool)) == ("toolName" in given)


def test_sessions_updates_and_events_of_a_session_keep_their_order(
    writer: EventWriter, store: BaseStore
) -> None:
    for n in range(30):
        for name in ("a", "b", "c"):
            writer.put_session(session(name, label=f"saved {n}"))
            writer.put(event(name, T0 + n))
            writer.update_session(name, label=f"updated {n}", is_pinned=n % 2 == 0)
    writer.put_session(session("b", label="last"))
    assert writer.flush(30) == 0
    labels = {one.session_id: (one.label, one.is_pinned) for one in store.get_sessions()}
    assert labels == {"a": ("updated 29", False), "b": ("last", False), "c": ("updated 29", False)}
    assert sum(store.event_counts().values()) == 90


def test_an_update_of_a_session_that_is_not_there_is_ignored(writer: EventWriter) -> None:
    receipt = writer.update_session("nobody", label="x")
    assert receipt.wait_stored(30)
    assert writer.health().duplicate == 1


def test_what_was_accepted_before_a_deletion_does_not_undo_it(
    writer: EventWriter, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_session(session("gone"))
    away(store, monkeypatch)
    writer.put_session(session("gone", label="late"))
    writer.put(event("gone"))
    writer.update_session("gone", label="later")
    store.delete_session("gone")  # before the sender's next try, which may come at once
    monkeypatch.undo()
    assert writer.flush(30) == 0
    assert store.get_session("gone") is None
    assert store.get_events("gone") == []
    assert writer.health().duplicate == 3


@given(st.lists(st.tuples(st.sampled_from("ESU"), st.sampled_from("abc")), max_size=30))
def test_runs_keep_the_order_of_each_session(kinds: list[tuple[str, str]]) -> None:
    values: dict[str, Any] = {
        "E": lambda name: ready(event(name)),
        "S": session,
        "U": lambda name: Update(name, {}),
    }
    items = [queued.Item(n, 0, values[kind](name), 0) for n, (kind, name) in enumerate(kinds)]
    runs = queued.waves(items)
    assert all(len({type(item.value) for item in run}) == 1 for run in runs)
    flat = list(itertools.chain.from_iterable(runs))
    assert sorted(flat, key=lambda item: item.number) == items
    for name in "abc":
        numbers = [item.number for item in flat if queued.session_of(item.value) == name]
        assert numbers == sorted(numbers)


# --- In the spool ---------------------------------------------------------------------------------

ODD = event(
    "s\u00e9ance \U0001f600",
    working_directory="/nul\0/\udcff",
    parent_session_id="p",
    event_type="of tomorrow",
    data={
        "text": "\0\ud83d\udc4d",
        "n": [2**80, 1.5, None, {"x": "a\nb\\"}],
        "toolName": "x" * 300,
    },
)
SESSION = session(
    "s", label="\0\udc80", status=SessionStatus.ERROR, token_usage=TokenUsage(total_input=7),
    child_session_ids=("a", "b"), end_time=T0 + 1, is_pinned=False,
)  # fmt: skip
UPDATE = Update("s", {"label": None, "token_usage": TokenUsage(total_output=3), "status": "error"})


def test_every_kind_of_item_comes_out_of_the_spool_as_it_went_in() -> None:
    odd, large = ready(ODD), ready(event(data={"b": "b" * 2**21}))
    for value in (odd, large, SESSION, UPDATE, Refused("event", {"n": 2**80, "s": "\ud83d"}, "x")):
        assert queued.from_body(queued.to_body(value)) == value


@pytest.mark.parametrize("body", [b"", b"X", b"Exx", b"E[]\n", b"S{}", b"U[1]", b"R[]"])
def test_a_record_of_another_version_is_no_item(body: bytes) -> None:
    with pytest.raises(SpoolError, match="no record of this version"):
        queued.from_body(body)


def test_what_was_safe_is_stored_by_the_next_writer(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)
    writer = EventWriter(store, spool_directory=directory)
    writer.init()
    events = [event("s", T0 + i) for i in range(20)]
    receipts = [writer.put(one) for one in [*events, ODD]]
    receipts.append(writer.put_session(SESSION))
    receipts.append(writer.update_session(UPDATE.session_id, **UPDATE.fields))
    assert receipts[-1].wait_safe(30)
    assert all(receipt.safe and not receipt.stored for receipt in receipts)
    assert writer.close(0) == 23
    assert not receipts[0].wait_stored(30)  # at once: nobody stores it any more
    assert spool_state(directory).records == 23
    monkeypatch.undo()
    with EventWriter(store, spool_directory=directory) as again:
        assert again.flush(30) == 0
        health = again.health()
    assert (health.accepted, health.stored) == (23, 23)
    assert store.get_events("s") == events
    assert store.get_events(ODD.session_id) == [ODD]
    got = store.get_session("s")
    assert got is not None
    assert (got.status, got.label, got.token_usage.total_output) == ("error", None, 3)
    assert spool_state(directory) == (0, 0, None, ())


def test_without_failures_nothing_goes_to_disk_if_so_chosen(
    store: BaseStore, directory: Path
) -> None:
    with EventWriter(store, spool="on_failure", spool_directory=directory) as writer:
        receipts = [writer.put(event("s", T0 + i)) for i in range(500)]
        assert receipts[-1].wait_safe(30)
        assert receipts[-1].stored
        assert writer.health().spool_bytes == 0
    assert list(directory.glob("*.log")) == []


def test_memory_stays_bounded_whatever_the_backlog(
    store: BaseStore, directory: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)
    options: dict[str, Any] = {"spool": mode, "spool_directory": directory}
    with EventWriter(store, memory_bytes=2**20, **options) as writer:
        events = [event(f"s{i % 3}", T0 + i, data={"x": "x" * 5000}) for i in range(1500)]
        most = 0
        for one in events:
            writer.put(one)
            most = max(most, writer.health().memory_bytes)
        assert most <= 2**20 + 2 * 20_000
        health = writer.health()
        assert (health.pending, balanced(health)) == (1500, True)
        monkeypatch.undo()
        assert writer.flush(60) == 0
        assert writer.health().stored == 1500
    for name in ("s0", "s1", "s2"):
        assert store.get_events(name) == [one for one in events if one.session_id == name]


def test_a_full_spool_says_so_and_takes_again_later(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)
    with EventWriter(store, spool_directory=directory, spool_bytes=2**20) as writer:
        taken = 0
        message = r"no room for .* of the 1,048,576 that it may have; \d+ items wait"
        with pytest.raises(SpoolFull, match=message):  # noqa: PT012
            for taken in range(2000):
                writer.put(event("s", T0 + taken, data={"x": "x" * 2000})).wait_safe(30)
        assert 400 < taken < 500
        health = writer.health()
        assert (health.accepted, health.pending) == (taken, taken)
        monkeypatch.undo()
        assert writer.flush(30) == 0
        writer.put(event("s", T0 + taken))
        assert writer.flush(30) == 0
        assert len(store.get_events("s", limit=9999)) == taken + 1


@pytest.mark.parametrize("place", ["dead", "damaged"])
def test_what_lies_aside_counts_against_the_limit_until_it_is_removed(
    writer: EventWriter, directory: Path, place: str
) -> None:
    assert (writer.health().aside_bytes, writer.health().dead_letters) == (0, 0)
    aside = directory / place
    aside.mkdir()
    letter = aside / f"1700000000000-{'a' * 12}.json"
    letter.touch()
    os.truncate(letter, 2**30)  # the whole limit, and no room on the disk
    health = writer.health()
    assert (health.aside_bytes, health.dead_letters) == (2**30, place == "dead")
    with pytest.raises(SpoolFull, match=r"1,073,741,824 bytes lie aside in dead and damaged"):
        writer.put(event())
    letter.unlink()
    assert writer.put(event()).wait_stored(30)
    assert (writer.health().aside_bytes, writer.health().dead_letters) == (0, 0)


def test_dead_letters_are_counted_right_whoever_changes_them(
    writer: EventWriter, directory: Path
) -> None:
    letters = DeadLetters(directory / "dead")
    for wanted in (1, 2, 3):
        assert writer.put(event(data={"x": float("nan")})).wait_stored(30)
        assert writer.health().dead_letters == wanted
    size = sum(path.stat().st_size for path in letters.directory.iterdir())
    assert writer.health().aside_bytes == size
    time.sleep(2.1)  # from now on the count is believed
    for wanted in (3, 3):
        assert writer.health().dead_letters == wanted
    letters.remove(letters.ids()[0])
    assert writer.health().dead_letters == 2
    letters.remove(letters.ids()[0])
    assert writer.health().dead_letters == 1
    assert writer.put(event(data={"x": float("nan")})).wait_stored(30)
    assert writer.health().dead_letters == 2


def test_a_letter_that_was_never_finished_goes_when_the_next_writer_opens(
    store: BaseStore, directory: Path
) -> None:
    (directory / "dead").mkdir(parents=True, mode=0o700)
    directory.chmod(0o700)
    (directory / "dead" / "1700000000000-000000000000.tmp").write_bytes(b"{")
    with EventWriter(store, spool_directory=directory) as writer:
        assert writer.health().aside_bytes == 0
    assert not list((directory / "dead").iterdir())


def test_numbers_that_the_spool_has_lost_are_counted_not_waited_for(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)
    with EventWriter(store, spool_directory=directory, memory_bytes=2**20) as writer:
        for n in range(600):
            writer.put(event("s", T0 + n, data={"x": "x" * 5000})).wait_safe(30)
        for path in sorted(directory.glob("*.log"))[1:3]:
            path.unlink()
        monkeypatch.undo()
        assert writer.flush(60) == 0
        health = writer.health()
    assert balanced(health)
    assert health.stored == len(store.get_events("s", limit=9999)) < 600
    assert health.set_aside == 600 - health.stored
    assert len(health.damages) >= 2


def test_a_second_writer_needs_a_directory_of_its_own(store: BaseStore, directory: Path) -> None:
    with (
        EventWriter(store, spool_directory=directory),
        pytest.raises(ConfigurationError, match="directory of its own"),
    ):
        EventWriter(store, spool_directory=directory).init()


def test_the_default_spool_is_named_by_the_environment_or_in_the_home_directory(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTEXTUATE_SPOOL", str(tmp_path / "named"))
    assert str(tmp_path / "named") in repr(EventWriter(store))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CONTEXTUATE_SPOOL", "~/mine")
    assert str(tmp_path / "mine") in repr(EventWriter(store))
    monkeypatch.delenv("CONTEXTUATE_SPOOL")
    assert str(tmp_path / ".contextuate/monitor/spool") in repr(EventWriter(store))


def test_a_relative_spool_stays_where_it_was_when_the_process_goes_elsewhere(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    with EventWriter(store, spool_directory="spool") as writer:
        monkeypatch.chdir(elsewhere)
        assert writer.put(event(data={"x": float("nan")})).wait_stored(30)
        assert writer.health().dead_letters == 1
    assert len(DeadLetters(tmp_path / "spool" / "dead").ids()) == 1
    assert not list(elsewhere.iterdir())


def test_a_spool_that_cannot_be_read_for_a_moment_loses_nothing(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failures = Path.open, iter(range(3))

    def too_many(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.suffix == ".log" and next(failures, None) is not None:
            raise OSError(24, "Too many open files")
        return original(self, *arguments, **options)

    with EventWriter(store, spool_directory=directory, memory_bytes=2**20) as writer:
        with monkeypatch.context() as patch:
            away(store, patch)
            for n in range(300):
                writer.put(event("s", T0 + n, data={"x": "x" * 5000})).wait_safe(30)
            monkeypatch.setattr(Path, "open", too_many)
        assert writer.flush(30) == 0
        assert (writer.health().stored, writer.health().set_aside) == (300, 0)
        assert next(failures, None) is None


def test_when_the_last_of_the_spool_is_lost_nobody_waits_for_it(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)
    with EventWriter(store, spool_directory=directory, memory_bytes=2**20) as writer:
        for n in range(600):
            receipt = writer.put(event("s", T0 + n, data={"x": "x" * 5000}))
            receipt.wait_safe(30)
        for path in sorted(directory.glob("*.log"))[-2:]:
            path.unlink()
        monkeypatch.undo()
        assert writer.flush(60) == 0
        assert receipt.wait_stored(1)
        assert balanced(writer.health())
        assert writer.health().set_aside > 0


def test_a_spool_that_others_may_write_to_is_refused(
    store: BaseStore, directory: Path, tmp_path: Path
) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(SpoolError, match="others may write there"):
        EventWriter(store, spool_directory=directory).init()
    directory.chmod(0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (directory / "lock").symlink_to(victim)
    with pytest.raises(SpoolError, match="symbolic links"):
        EventWriter(store, spool_directory=directory).init()
    assert victim.read_text() == "precious"


# --- A disk that fails ----------------------------------------------------------------------------


def broken_disk(writer: EventWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._spool, "append", fail)


def test_without_a_disk_the_database_still_gets_everything(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EventWriter(store, spool_directory=directory, batch_seconds=0.01) as writer:
        broken_disk(writer, monkeypatch)
        receipts = [writer.put(event("s", T0 + i)) for i in range(300)]
        assert receipts[-1].wait_stored(30)
        assert receipts[-1].safe
        assert "No space left" in str(writer.health().last_error)
        monkeypatch.undo()
        writer.put(event("s", T0 + 300)).wait_stored(30)
        assert writer.health().stored == 301
    assert [e.timestamp for e in store.get_events("s")] == [T0 + i for i in range(301)]


def test_a_disk_that_goes_on_failing_is_told_once(
    store: BaseStore,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with EventWriter(store, spool_directory=directory) as writer:
        for told in (1, 2):
            with monkeypatch.context() as patch:
                broken_disk(writer, patch)
                until = time.monotonic() + 1.2  # some tries
                while time.monotonic() < until:
                    assert writer.put(event()).wait_stored(30)
            assert caplog.text.count("No space left") == told
            assert writer.put(event()).wait_stored(30)
            assert writer.health().spool_bytes > 0


def test_without_disk_and_database_memory_fills_and_closing_tells_what_is_lost(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = EventWriter(store, spool_directory=directory, memory_bytes=2**20, put_timeout=0.2)
    writer.init()
    away(store, monkeypatch)
    broken_disk(writer, monkeypatch)
    taken = 0
    with pytest.raises(SpoolError, match="device; memory is full"):  # noqa: PT012
        for taken in range(5000):
            receipt = writer.put(event("s", T0 + taken, data={"x": "x" * 1000}))
    assert not receipt.safe
    assert writer.health().memory_bytes <= 2**20
    with pytest.raises(SpoolError, match=f"{taken:,} items are neither stored nor on disk: No"):
        writer.close(0.1)
    assert writer.close() == 0


def test_what_memory_holds_goes_to_disk_first_once_that_works_again(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EventWriter(store, spool_directory=directory) as writer:
        away(store, monkeypatch)
        with monkeypatch.context() as patch:
            broken_disk(writer, patch)
            first = [writer.put(event("s", T0 + i)) for i in range(10)]
            time.sleep(0.1)
            assert not first[0].safe
        second = writer.put(event("s", T0 + 10))
        assert second.wait_safe(30)
        assert all(receipt.safe for receipt in first)
        monkeypatch.undo()
        assert writer.flush(30) == 0
    assert [e.timestamp for e in store.get_events("s")] == [T0 + i for i in range(11)]


def test_one_event_alone_is_kept_and_stored_whatever_the_disk_did_before(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without others behind it: the keeper must notice by itself, and go on."""
    with EventWriter(
        store, spool_directory=directory, flush_seconds=0.02, batch_seconds=0
    ) as writer:
        for n in range(10):
            with monkeypatch.context() as patch:
                broken_disk(writer, patch)
                assert writer.put(event("s", T0 + n)).wait_stored(30)
            time.sleep(0.02)
        assert writer.put(event("s", T0 + 99)).wait_stored(30)


def test_an_event_larger_than_memory_passes_a_broken_disk(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EventWriter(store, spool_directory=directory, memory_bytes=2**20) as writer:
        broken_disk(writer, monkeypatch)
        receipts = [writer.put(event(data={"x": "x" * 3_000_000})), writer.put(event())]
        assert all(receipt.wait_stored(30) for receipt in receipts)
        monkeypatch.undo()


def hung_disk(patch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Let nothing be flushed: once it is tried, the first event is set, until the second is."""
    original, entered, answers = os.fdatasync, threading.Event(), threading.Event()

    def hang(descriptor: int) -> None:
        entered.set()
        answers.wait(30)
        original(descriptor)

    patch.setattr(os, "fdatasync", hang)
    return entered, answers


def test_a_spool_whose_disk_hung_at_the_end_can_be_opened_once_it_answers(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_KEEPER_SECONDS", 0.2)
    entered, answers = hung_disk(monkeypatch)
    writer = EventWriter(store, spool_directory=directory)
    writer.init()
    events = [event("s", T0 + i) for i in range(2)]
    writer.put(events[0])
    assert entered.wait(30)
    writer.put(events[1])
    with pytest.raises(SpoolError, match="2 items .* the disk did not answer"):
        writer.close(0.1)
    for refused, message in ((writer, "still waits for its disk"), (None, "directory of its own")):
        with pytest.raises((SpoolError, ConfigurationError), match=message):
            (refused or EventWriter(store, spool_directory=directory)).init()
    keeper = writer._threads[0]
    answers.set()
    keeper.join(30)
    until = time.monotonic() + 30
    while writer._spool._locking is not None:
        assert time.monotonic() < until
        time.sleep(0.01)
    with writer:
        assert writer.flush(30) == 0
        assert writer.health().damages == ()
    assert store.get_events("s") == events


def test_what_a_hung_disk_loses_is_told_also_where_no_thread_can_be_had(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(writer_module, "_KEEPER_SECONDS", 0.2)
    writer = EventWriter(store, spool_directory=directory)
    writer.init()
    keeper = writer._threads[0]
    with monkeypatch.context() as patch:
        entered, answers = hung_disk(patch)
        writer.put(event("s"))
        assert entered.wait(30)
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(SpoolError, match="1 items .* the disk did not answer"):
            writer.close(0.1)
        answers.set()
        keeper.join(30)
    writer._spool.close()


@pytest.mark.parametrize("had", [0, 1, 2])
def test_a_writer_that_got_no_thread_can_be_opened_later(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch, had: int
) -> None:
    original, left = threading.Thread.start, iter(range(had))

    def start(self: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        original(self)

    writer = EventWriter(store, spool_directory=directory, metrics=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            writer.init()
    assert not any(thread.is_alive() for thread in writer._threads)
    with writer:
        assert writer.put(event()).wait_stored(30)


# --- Poison ---------------------------------------------------------------------------------------


def test_poison_is_set_aside_and_its_neighbours_are_stored(
    writer: EventWriter, store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [event(f"s{i % 5}", T0 + i) for i in range(500)]
    events[7] = event("s2", T0 + 7, data={"x": [1, float("nan")]})
    events[250] = event("s0", T0 + 250, data={"deep": {1: (2,)}})
    events[499] = event("s4", T0 + 499, data={"x": "x" * 17_000_000})
    receipts = [writer.put(one) for one in events]
    assert writer.flush(60) == 0
    health = writer.health()
    assert (health.stored, health.set_aside, health.dead_letters) == (497, 3, 3)
    assert balanced(health)
    reasons = {n: receipt.refusal for n, receipt in enumerate(receipts) if receipt.refusal}
    assert sorted(reasons) == [7, 250, 499]
    assert reasons[7] == "data.x[1]: JSON has no nan"
    assert reasons[250] == "data.deep[1]: JSON has no tuple (make it a list)"
    assert "at most 16,777,216 are kept" in str(reasons[499])
    letters = list(DeadLetters(directory / "dead"))
    assert {letter.content.reason for letter in letters} == set(reasons.values())
    by_id = {letter.content.record["id"]: letter.content.record for letter in letters}
    assert by_id[events[7].id]["data"] == {"x": [1, "nan"]}
    assert by_id[events[250].id]["data"] == {"deep": {"1": [2]}}
    assert len(by_id[events[499].id]["data"]["x"]) == 17_000_000


def test_what_only_the_server_refuses_is_found_and_can_be_tried_again(
    writer: EventWriter, store: BaseStore, directory: Path, database: Database
) -> None:
    check = "ALTER TABLE events ADD CONSTRAINT no_teapots CHECK (tool_name <> 'Teapot')"
    database.execute(check)
    try:
        teapots = [event("s", T0 + i, data={"toolName": "Teapot", "n": 2**70}) for i in (3, 50)]
        others = [event("s", T0 + i) for i in range(100, 200)]
        receipts = [writer.put(one) for one in [*others[:50], *teapots, *others[50:]]]
        assert writer.flush(30) == 0
        assert "no_teapots" in str(receipts[50].refusal)
        assert store.get_events("s") == others
    finally:
        verb = "CONSTRAINT" if database.backend == "postgresql" else "CHECK"
        database.execute(f"ALTER TABLE events DROP {verb} no_teapots")
    letters = DeadLetters(directory / "dead")
    assert len(letters.ids()) == 2
    for letter in letters:
        assert replay(letter, store)
        assert not replay(letter, store)
        letters.remove(letter.id)
    assert store.get_events("s") == sorted([*others, *teapots], key=lambda e: e.timestamp)
    assert letters.ids() == []


def test_sessions_and_updates_that_cannot_be_kept_are_set_aside(
    writer: EventWriter, store: BaseStore, directory: Path
) -> None:
    bad: list[Receipt] = [
        writer.put_session(session("s", working_directory="x" * 20_000)),
        writer.put_session(session("s", status="asleep", token_usage=None)),
        writer.update_session("s", label="x" * 20_000),
        writer.update_session("", label="x"),
    ]
    writer.put_session(session("s", label="good"))
    assert writer.flush(30) == 0
    assert all(receipt.refusal for receipt in bad)
    got = store.get_session("s")
    assert got is not None
    assert got.label == "good"
    letters = list(DeadLetters(directory / "dead"))
    assert sorted(letter.content.kind for letter in letters) == ["session"] * 2 + ["update"] * 2
    for letter in letters:
        with pytest.raises(InvalidRecord):
            replay(letter, store)


def test_good_letters_of_every_kind_can_be_tried_again(store: BaseStore, tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path / "dead")
    assert letters.ids() == []
    letters.add(queued.refused_input(SESSION, "then"), T0)
    letters.add(queued.refused_input(UPDATE, "then"), T0 + 1)
    letters.add(queued.refused_input(ODD, "then"), T0 + 2)
    letters.add(queued.unreadable(b"Z", "then"), T0 + 3)
    *good, strange = letters
    assert [replay(letter, store) for letter in good] == [True, True, True]
    assert store.get_events(ODD.session_id) == [ODD]
    got = store.get_session("s")
    assert got is not None
    assert (got.label, got.token_usage.total_output) == (None, 3)
    with pytest.raises(InvalidRecord, match="record: of another version"):
        replay(strange, store)
    with pytest.raises(SpoolError, match="no dead letter '../x'"):
        letters.read("../x")
    with pytest.raises(SpoolError, match="no dead letter 1700000000009-"):
        letters.read("1700000000009-" + "0" * 12)
    (tmp_path / "dead" / f"1700000000009-{'0' * 12}.json").write_text("[]")
    with pytest.raises(SpoolError, match="no dead letter can be read there"):
        list(letters)


def test_a_record_that_an_older_version_set_aside_is_stored_by_one_that_reads_it(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = queued.refused_input(event("s", T0 + 1), "then")
    with monkeypatch.context() as patch:
        away(store, patch)
        with EventWriter(store, spool_directory=directory) as writer:
            writer.put(ODD)
            writer.put_session(SESSION)
            assert writer.update_session(UPDATE.session_id, **UPDATE.fields).wait_safe(30)
            assert writer.close(0) == 3
        patch.undo()
        patch.setattr(queued, "_READERS", {})
        with EventWriter(store, spool_directory=directory) as older:
            assert older.flush(30) == 0
            assert older.health().set_aside == 3
    letters = DeadLetters(directory / "dead")
    letters.add(queued.unreadable(queued.to_body(refused), "then"), T0)
    found = [*letters]
    assert {letter.content.kind for letter in found} == {"record"}
    found.sort(key=lambda letter: base64.b64decode(letter.content.record))  # by kind: E R S U
    assert [replay(letter, store) for letter in found] == [True] * 4
    assert [replay(letter, store) for letter in found[:2]] == [False] * 2
    assert store.get_events(ODD.session_id) == [ODD]
    assert len(store.get_events("s")) == 1
    got = store.get_session("s")
    assert got is not None
    assert (got.label, got.token_usage.total_output) == (None, 3)


def test_a_record_that_the_server_refuses_or_somebody_has_edited_is_still_refused(
    store: BaseStore, tmp_path: Path, database: Database
) -> None:
    letters = DeadLetters(tmp_path / "dead")
    teapot = queued.to_body(ready(event(data={"toolName": "Teapot"})))
    letters.add(queued.unreadable(teapot, "then"), T0)
    letters.add(Refused("record", "no base64", "then"), T0 + 1)
    database.execute("ALTER TABLE events ADD CONSTRAINT no_teapots CHECK (tool_name <> 'Teapot')")
    try:
        for letter, message in zip(letters, ("no_teapots", "record: "), strict=True):
            with pytest.raises(InvalidRecord, match=message):
                replay(letter, store)
    finally:
        verb = "CONSTRAINT" if database.backend == "postgresql" else "CHECK"
        database.execute(f"ALTER TABLE events DROP {verb} no_teapots")


def test_a_defect_that_one_item_brings_to_light_costs_that_item_only(
    writer: EventWriter, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.save_rows

    def save_rows(rows: Any) -> Any:
        if any(row.event.timestamp == T0 + 13 for row in rows):
            raise ZeroDivisionError("a defect")
        return original(rows)

    monkeypatch.setattr(store, "save_rows", save_rows)
    receipts = [writer.put(event("s", T0 + i)) for i in range(40)]
    assert writer.flush(30) == 0
    assert receipts[13].refusal == "ZeroDivisionError: a defect"
    assert (writer.health().stored, writer.health().set_aside) == (39, 1)


def test_memory_that_is_short_for_a_moment_costs_no_event(
    writer: EventWriter, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failures = payload.encode_snapshot, iter(range(2))

    def encode_snapshot(text: bytes, working_directory: str) -> payload.Encoded:
        if next(failures, None) is not None:
            raise MemoryError
        return original(text, working_directory)

    monkeypatch.setattr(payload, "encode_snapshot", encode_snapshot)
    events = [event("s", T0 + i) for i in range(5)]
    receipts = [writer.put(one) for one in events]
    assert writer.flush(30) == 0
    assert {receipt.refusal for receipt in receipts} == {None}
    assert store.get_events("s") == events
    assert next(failures, None) is None


def test_an_event_that_a_defect_keeps_from_being_encoded_is_whole_in_its_letter(
    writer: EventWriter, store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = payload.encode_snapshot

    def encode_snapshot(text: bytes, working_directory: str) -> payload.Encoded:
        if b"odd" in text:
            raise ZeroDivisionError("a defect")
        return original(text, working_directory)

    monkeypatch.setattr(payload, "encode_snapshot", encode_snapshot)
    odd, good = event("s", T0, data={"odd": [1.5, "\0", None]}), event("s", T0 + 1)
    receipts = [writer.put(one) for one in (odd, good)]
    assert writer.flush(30) == 0
    assert [one.refusal for one in receipts] == ["ZeroDivisionError: a defect", None]
    monkeypatch.undo()
    [letter] = DeadLetters(directory / "dead")
    assert (letter.content.kind, letter.content.exact) == ("event", True)
    assert replay(letter, store)
    assert store.get_events("s") == [odd, good]


def test_a_defect_that_every_item_meets_blames_none(
    writer: EventWriter, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AttributeError("a package that was replaced under us")

    for name in ("_insert_events", "_upsert_sessions", "_update_session"):
        monkeypatch.setattr(store, name, fail)
    receipts = [writer.put(event(f"s{n}")) for n in range(3)]
    receipts.append(writer.put_session(session("s3", label="new")))
    receipts.append(writer.update_session("s3", label="newer"))
    assert writer.flush(3) == 5
    assert writer.health().set_aside == 0
    assert "replaced under us" in str(writer.health().last_error)
    monkeypatch.undo()
    assert writer.flush(30) == 0
    assert {receipt.refusal for receipt in receipts} == {None}
    assert writer.health().stored == 5


def test_letters_that_a_full_disk_does_not_take_hold_nobody_up(
    writer: EventWriter, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer._dead_letters, "add", fail)
        poison = writer.put(event(data={"x": float("inf")}))
        told: list[Receipt] = []
        poison.on_safe(told.append)
        good = writer.put(event())
        assert good.wait_stored(30)
        assert good.safe
        # In the spool it is safe, and comes again; in memory alone it is not.
        assert poison.safe == poison.stored == poison.wait_stored(0.1) == (mode == "always")
        assert len(told) == (mode == "always")
        assert "No space left" in str(writer.health().last_error)
        assert writer.health().failing_seconds is None
        assert (writer.health().set_aside, writer.health().dead_letters) == (1, 0)
    assert poison.wait_safe(30)
    assert poison.wait_stored(30)
    until = time.monotonic() + 30
    while not writer.health().dead_letters:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert told == [poison]


def test_letters_that_wait_for_a_full_disk_are_tried_and_told_now_and_then(
    writer: EventWriter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[Refused] = []

    def fail(content: Refused, *_: int) -> str:
        tries.append(content)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer._dead_letters, "add", fail)
        for _ in range(100):
            writer.put(event(data={"x": float("inf")}))
        for _ in range(10):  # a batch each
            assert writer.put(event()).wait_stored(30)
        assert 100 <= len(tries) < 120
        assert caplog.text.count("No space left") == 1
    until = time.monotonic() + 30
    while writer.health().dead_letters < 100:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_letter_that_the_disk_has_no_room_for_holds_no_smaller_one_up(
    writer: EventWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, full = writer._dead_letters.add, True

    def add(content: Refused, *place: int) -> str:
        if full or len(str(content)) > 5000:
            raise OSError(28, "No space left on device")
        return original(content, *place)

    with monkeypatch.context() as patch:
        patch.setattr(writer._dead_letters, "add", add)
        writer.put(event(data={"x": float("inf"), "large": "x" * 5000}))
        writer.put(event(data={"x": float("inf")}))
        assert writer.put(event()).wait_stored(30)
        assert writer._outbox is not None
        assert len(writer._outbox.letters) == 2
        full = False
        until = time.monotonic() + 30
        while len(writer._outbox.letters) > 1:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert writer.health().dead_letters == 1


def test_letters_that_no_disk_takes_are_told_when_the_writer_closes(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    writer = EventWriter(store, spool="on_failure", spool_directory=directory)
    writer.init()
    monkeypatch.setattr(writer._dead_letters, "add", fail)
    monkeypatch.setattr(writer._spool, "append", fail)
    poison = writer.put(event(data={"x": float("inf")}))
    good = writer.put(event())
    assert good.wait_stored(30)
    with pytest.raises(SpoolError, match="1 items are neither stored nor on disk"):
        writer.close(0.1)
    assert (poison.safe, good.safe) == (False, True)


def test_what_follows_a_letter_that_only_the_spool_has_comes_again_behind_it(
    store: BaseStore, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    store.save_session(session("s"))
    writer = EventWriter(store, spool="on_failure", spool_directory=directory)
    writer.init()
    monkeypatch.setattr(writer._dead_letters, "add", fail)
    with monkeypatch.context() as patch:
        away(store, patch)
        writer.put(event(data={"x": float("inf")}))
        older = writer.update_session("s", label="older")
        assert older.wait_safe(30)
    assert older.wait_stored(30)
    assert writer.update_session("s", label="newer").wait_stored(30)
    # What a kill leaves.
    shutil.copytree(directory, tmp_path / "left")
    with EventWriter(store, spool="on_failure", spool_directory=tmp_path / "left") as again:
        assert again.flush(60) == 0
    got = store.get_session("s")
    assert got is not None
    assert got.label == "newer"
    monkeypatch.undo()
    writer.close()


def test_a_letter_that_is_being_written_while_the_writer_closes_is_written_once(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_LETTER_SECONDS", 0.05)
    writer = EventWriter(store, spool_directory=directory)
    writer.init()
    original, entered, held = writer._dead_letters.add, threading.Event(), threading.Event()
    tries = itertools.count()

    def add(content: Refused, accepted: int, number: int) -> str:
        if not next(tries):
            raise OSError(28, "No space left on device")
        entered.set()
        held.wait(30)
        return original(content, accepted, number)

    monkeypatch.setattr(writer._dead_letters, "add", add)
    writer.put(event(data={"x": float("inf")}))
    assert entered.wait(30)
    threads = writer._threads
    closing = threading.Timer(0, writer.close)
    closing.start()
    closing.join(1.5)  # the sender is waited for for a moment
    held.set()
    for thread in (closing, *threads):
        thread.join(30)
    assert len(DeadLetters(directory / "dead").ids()) == 1
    with EventWriter(store, spool_directory=directory):
        pass


def test_a_defect_in_writing_letters_does_not_keep_the_spool(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = EventWriter(store, spool_directory=directory)
    writer.init()
    assert writer._sender is not None
    monkeypatch.setattr(writer._sender, "write_letters", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        writer.close()
    with EventWriter(store, spool_directory=directory):
        pass


def test_letters_that_no_disk_takes_do_not_fill_memory(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    with EventWriter(
        store, spool="on_failure", spool_directory=directory, memory_bytes=2**20, put_timeout=0.2
    ) as writer:

        def fill() -> None:
            for _ in range(5000):
                writer.put(event(data={"x": float("inf"), "y": "y" * 1000}))

        with monkeypatch.context() as patch:
            patch.setattr(writer._dead_letters, "add", fail)
            patch.setattr(writer._spool, "append", fail)
            with pytest.raises(SpoolError, match="memory is full"):
                fill()
            assert writer._outbox is not None
            held = sum(letter.size for letter in writer._outbox.letters)
            assert writer.health().memory_bytes + held < 2 * 2**20
        assert writer.flush(60) == 0
        until = time.monotonic() + 60
        while writer.health().dead_letters < writer.health().accepted:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_letter_that_is_written_nowhere_else_comes_again_from_the_spool(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    with EventWriter(store, spool_directory=directory) as writer:
        monkeypatch.setattr(writer._dead_letters, "add", fail)
        writer.put(event(data={"x": float("inf")}))
        writer.put(event("s", T0 + 1)).wait_stored(30)
    with EventWriter(store, spool_directory=directory) as writer:
        assert writer.flush(30) == 0
        health = writer.health()
        assert (health.set_aside, health.duplicate, health.dead_letters) == (1, 1, 1)


def test_a_letter_that_comes_again_after_a_restart_is_the_same_letter(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise StoreUnavailable("read-only")

    monkeypatch.setattr(store, "save_rows", fail)
    poison, good = event("s", data={"x": float("nan")}), event("s", T0 + 1)
    letters = DeadLetters(directory / "dead")
    for restart in range(4):
        with EventWriter(store, spool_directory=directory) as writer:
            for one in () if restart else (poison, good):
                writer.put(one)
            assert writer.flush(0.5) == 2
            assert writer.health().retries > 0
            assert writer.health().dead_letters == len(letters.ids()) == 1
            writer.close(0)
    monkeypatch.undo()
    with EventWriter(store, spool_directory=directory) as writer:
        assert writer.flush(30) == 0
        assert writer.health().dead_letters == len(letters.ids()) == 1


def test_a_letter_whose_name_may_not_last_is_the_same_letter_when_it_is_written_again(
    writer: EventWriter, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter(range(3))

    def sync(path: Path) -> None:
        if next(failures, None) is not None:
            raise OSError(5, "Input/output error")
        spool.sync_directory(path)

    monkeypatch.setattr(sender, "_LETTER_SECONDS", 0.05)
    monkeypatch.setattr(dead_letters, "sync_directory", sync)
    receipts = [writer.put(event(data={"x": float("nan")})) for _ in range(2)]
    assert all(receipt.wait_stored(30) for receipt in receipts)
    until = time.monotonic() + 30
    while writer._outbox is None or writer._outbox.letters:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert next(failures, None) is None
    health = writer.health()
    paths = list((directory / "dead").iterdir())
    assert (len(paths), health.dead_letters) == (2, 2)
    assert health.aside_bytes == sum(path.stat().st_size for path in paths)


def test_not_even_what_has_no_words_holds_anybody_up(writer: EventWriter, directory: Path) -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ValueError

        __hash__ = None  # type: ignore[assignment]

    for value in (10**5000, Odd(), {Odd: 1}, b"x"):
        writer.put(event(data={"x": value}))
    late = writer.put(event("s", 10**5000))
    assert writer.put(event("good")).wait_stored(30)
    assert late.refusal is not None
    assert (writer.health().stored, writer.health().set_aside) == (1, 5)
    assert writer.health().dead_letters == 5
    assert not any(letter.content.exact for letter in DeadLetters(directory / "dead"))


def test_what_contains_itself_is_told_in_few_words() -> None:
    endless: list[Any] = []
    endless.append(endless)
    wide: list[Any] = []
    for _ in range(200):
        wide = [wide, wide]
    for value in (endless, wide):
        told = queued.refused_input(event(data={"x": value}), "too much")
        assert not told.exact
        assert len(queued.to_body(told)) < 2_000_000


def test_when_the_first_of_two_with_one_id_is_refused_the_second_is_stored(
    writer: EventWriter, store: BaseStore, database: Database
) -> None:
    database.execute("ALTER TABLE events ADD CONSTRAINT no_teapots CHECK (tool_name <> 'Teapot')")
    try:
        first = event("s", data={"toolName": "Teapot", "secret": "hunter2"})
        second = event("s", id=first.id)
        receipts = [writer.put(first), writer.put(second)]
        assert writer.flush(30) == 0
    finally:
        verb = "CONSTRAINT" if database.backend == "postgresql" else "CHECK"
        database.execute(f"ALTER TABLE events DROP {verb} no_teapots")
    assert "no_teapots" in str(receipts[0].refusal)
    assert "hunter2" not in str(receipts[0].refusal)
    assert receipts[1].refusal is None
    assert store.get_events("s") == [second]


def test_what_a_trigger_refuses_is_set_aside(
    writer: EventWriter, store: BaseStore, database: Database
) -> None:
    if database.backend == "postgresql":
        database.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN IF NEW.tool_name = 'Teapot' THEN RAISE EXCEPTION 'no teapots'; END IF; "
            "RETURN NEW; END $$"
        )
        create = "FOR EACH ROW EXECUTE FUNCTION refuse()"
    else:
        create = (
            "FOR EACH ROW IF NEW.tool_name = 'Teapot' THEN "
            "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no teapots'; END IF"
        )
    database.execute(f"CREATE TRIGGER refusing BEFORE INSERT ON events {create}")
    try:
        receipt = writer.put(event("s", data={"toolName": "Teapot"}))
        good = writer.put(event("s"))
        assert writer.flush(30) == 0
    finally:
        on = " ON events" if database.backend == "postgresql" else ""
        database.execute(f"DROP TRIGGER refusing{on}")
        if on:
            database.execute("DROP FUNCTION refuse()")
    assert "no teapots" in str(receipt.refusal)
    assert (good.refusal, len(store.get_events("s"))) == (None, 1)


# --- Redaction and policy -------------------------------------------------------------------------


def test_what_redact_takes_out_reaches_neither_disk_nor_database(
    store: BaseStore, directory: Path, mode: Any
) -> None:
    def redact(one: MonitorEvent) -> MonitorEvent:
        text = json.dumps(one.data).replace("hunter2", "***")
        return event(one.session_id, one.timestamp, id=one.id, data=json.loads(text))

    with EventWriter(store, spool=mode, spool_directory=directory, redact=redact) as writer:
        writer.put(event("s", T0, data={"password": "hunter2"}))
        writer.put(event("s", 1, data={"password": "hunter2"}))
        assert writer.flush(30) == 0
        written = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    assert store.get_events("s")[0].data == {"password": "***"}
    assert written
    assert not any(b"hunter2" in text for text in written)


def test_an_event_that_redact_fails_on_is_not_taken(store: BaseStore, directory: Path) -> None:
    def fail(one: MonitorEvent) -> MonitorEvent:
        raise KeyError(one.data["secret"])

    with EventWriter(store, spool_directory=directory, redact=fail) as writer:
        with pytest.raises(InvalidRecord, match=r"^event: redact failed: KeyError$"):
            writer.put(event(data={"secret": "x"}))
        assert writer.health().accepted == 0
    with (
        EventWriter(store, spool_directory=directory, redact=lambda _: None) as writer,  # type: ignore[arg-type,return-value]
        pytest.raises(InvalidRecord, match="redact gave no MonitorEvent: NoneType"),
    ):
        writer.put(event())


def test_bulky_copies_are_trimmed_and_told(store: BaseStore, directory: Path) -> None:
    before, image = "line\n" * 1000, "QUJD" * 1000
    data = {
        "toolName": "Edit",
        "toolOutput": {"originalFile": before, "filePath": "/x", "newString": "n" * 5000},
        "images": [{"type": "base64", "data": image}, {"type": "url", "data": image}],
        "file": {"base64": image, "originalFile": "short"},
        "a/b~c": {"originalFile": "ü" * 1000},
    }
    policy = PayloadPolicy()
    with EventWriter(store, spool_directory=directory, policy=policy) as writer:
        sent = event(data=data)
        assert writer.put(sent).wait_stored(30)
    [got] = store.get_events("s")
    told = {one["path"]: one for one in got.data.pop("trimmed")}
    assert got.data == {
        **data,
        "toolOutput": {"originalFile": None, "filePath": "/x", "newString": "n" * 5000},
        "images": [{"type": "base64", "data": None}, {"type": "url", "data": image}],
        "file": {"base64": None, "originalFile": "short"},
        "a/b~c": {"originalFile": None},
    }
    assert set(told) == {
        "/toolOutput/originalFile", "/images/0/data", "/file/base64", "/a~1b~0c/originalFile",
    }  # fmt: skip
    digest = hashlib.sha256(before.encode()).hexdigest()
    assert told["/toolOutput/originalFile"]["sha256"] == digest
    assert told["/toolOutput/originalFile"]["bytes"] == 5000
    assert told["/a~1b~0c/originalFile"]["bytes"] == 2000


def test_a_payload_that_contains_itself_is_not_trimmed() -> None:
    endless: dict[str, Any] = {"a": "x" * 5000}
    endless["b"] = [endless, endless]
    assert PayloadPolicy(max_bytes=1024).apply(endless) is endless
    deep: Any = "x" * 5000
    for _ in range(MAX_DEPTH):
        deep = {"a": deep}
    assert PayloadPolicy(max_bytes=1024).apply(deep)["trimmed"][0]["bytes"] == 5000


def test_the_largest_texts_go_until_a_payload_has_its_size() -> None:
    data = {"a": "a" * 3000, "b": ["b" * 2000, {"c": "c" * 1500}], "d": "d" * 100}
    policy = PayloadPolicy(mirrors=False, max_bytes=4000)
    kept = policy.apply(data)
    assert kept["a"] is None
    assert kept["b"] == data["b"]
    assert [one["path"] for one in kept["trimmed"]] == ["/a"]
    assert data["a"] == "a" * 3000
    small = PayloadPolicy(max_bytes=1024).apply({**data, "trimmed": [{"path": "/before"}]})
    assert [one["path"] for one in small["trimmed"]] == ["/before", "/a", "/b/0", "/b/1/c"]
    assert small["d"] == "d" * 100
    assert policy.apply({"x": 1}) == {"x": 1}
    owned = {"trimmed": "mine", "x": "x" * 9000}
    assert policy.apply(owned) is owned
    many = PayloadPolicy(max_bytes=2**20).apply({f"k{n}": "é" * 300 for n in range(10_000)})
    assert len(json.dumps(many, ensure_ascii=False).encode()) < 1.3 * 2**20
    odd = {"big": 2**80, "s": "\ud800" * 5000}
    assert policy.apply(odd)["s"] is None
    # 37 kB of texts, and as much again around them; orjson does not write the second.
    items = [{"key": "x" * 5} for _ in range(2500)]
    for plain in ("a", "\ud83d"):
        data = {"items": items, "text": "t" * 30_000, "end": plain}
        assert PayloadPolicy(max_bytes=65_536).apply(data)["text"] is None
    with pytest.raises(ConfigurationError, match="max_bytes: 5 is not a number of bytes"):
        PayloadPolicy(max_bytes=5)


# --- Receipts, flush, close, health ---------------------------------------------------------------


def test_callbacks_come_once_and_a_failing_one_harms_nobody(
    writer: EventWriter, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)
    calls: list[str] = []
    receipt = writer.put(event())
    receipt.on_stored(lambda _: 1 / 0)
    receipt.on_stored(lambda r: calls.append(f"stored {r.stored}"))
    receipt.on_safe(lambda r: calls.append(f"safe {r.safe}"))
    assert repr(receipt).startswith("<Receipt 1: ")
    monkeypatch.undo()
    assert receipt.wait_stored(30)
    receipt.on_stored(lambda r: calls.append(f"late {r.stored}"))
    assert writer.flush(30) == 0
    assert sorted(calls) == ["late True", "safe True", "stored True"]


def test_a_callback_of_what_is_left_is_called_when_the_writer_closes(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)
    writer = EventWriter(store, spool_directory=directory)
    writer.init()
    receipt = writer.put(event())
    calls: list[bool] = []
    receipt.on_stored(lambda r: calls.append(r.stored))
    assert receipt.wait_stored(0.01) is False
    assert writer.close(0) == 1
    assert calls == [False]


def test_flush_tells_how_much_is_left_when_the_time_is_up(
    writer: EventWriter, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert writer.flush() == 0
    away(store, monkeypatch)
    for i in range(5):
        writer.put(event("s", T0 + i))
    assert writer.flush(0.2) == 5
    health = writer.health()
    assert health.retries > 0
    assert health.last_error == "StoreUnavailable: the database is away"
    assert health.failing_seconds is not None
    assert health.oldest_seconds is not None
    monkeypatch.undo()
    assert writer.flush() == 0
    assert writer.health().failing_seconds is None


def test_a_closed_writer_says_so(store: BaseStore, directory: Path) -> None:
    writer = EventWriter(store, spool_directory=directory)
    for call in (lambda: writer.put(event()), writer.flush, writer.health):
        with pytest.raises(StoreClosed, match="the writer is not open"):
            call()
    writer.init()
    writer.init()
    assert writer.close() == 0
    assert writer.close() == 0
    with pytest.raises(StoreClosed):
        writer.put(event())
    with writer:
        assert writer.put(event()).wait_stored(30)


def test_the_writer_opens_the_store_when_it_can_and_leaves_it_open(
    database: Database, directory: Path
) -> None:
    store = make_store(database.url)
    with EventWriter(store, spool_directory=directory) as writer:
        assert writer.put(event()).wait_stored(30)
    assert store.get_session("s") is not None
    store.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spool": "never"}, "spool: 'always' or 'on_failure', not 'never'"),
        ({"memory_bytes": 5}, "memory_bytes: 5 is not a number of bytes"),
        ({"spool_bytes": 1.5e9}, "spool_bytes: 1500000000.0 is not"),
        ({"batch_rows": 0}, "batch_rows: 0 is not a number of rows"),
        ({"batch_seconds": -1}, "batch_seconds: -1 is not a number of seconds"),
        ({"put_timeout": "1"}, "put_timeout: '1' is not a number of seconds"),
        ({"metrics_seconds": 0}, "metrics_seconds: 0 is not a number of seconds above 0"),
    ],
)
def test_senseless_settings_are_named(options: dict[str, Any], message: str) -> None:
    store = make_store("postgresql://localhost/x")
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        EventWriter(store, **options)


@pytest.mark.parametrize("place", [Path("/x"), None, 5])
def test_a_working_directory_that_is_no_text_is_set_aside(writer: EventWriter, place: Any) -> None:
    receipt = writer.put(event(working_directory=place))
    assert receipt.wait_stored(30)
    assert str(receipt.refusal).startswith("working_directory: ")


def test_what_is_no_event_is_an_error_at_once(writer: EventWriter) -> None:
    with pytest.raises(InvalidRecord, match="a MonitorEvent is needed, not dict"):
        writer.put({})  # type: ignore[arg-type]
    with pytest.raises(InvalidRecord, match="a SessionMeta is needed, not dict"):
        writer.put_session({})  # type: ignore[arg-type]
    with pytest.raises(InvalidRecord, match="colour: no field that update_session can set"):
        writer.update_session("s", colour=1)  # type: ignore[call-arg]


def test_metrics_are_told_now_and_then_and_at_the_end(store: BaseStore, directory: Path) -> None:
    told: list[WriterHealth] = []

    def metrics(health: WriterHealth) -> None:
        told.append(health)
        if len(told) == 1:
            raise ValueError

    with EventWriter(
        store, spool_directory=directory, metrics=metrics, metrics_seconds=0.05
    ) as writer:
        for i in range(20):
            writer.put(event("s", T0 + i))
            time.sleep(0.01)
        writer.flush(30)
    time.sleep(0.1)
    assert len(told) > 2
    assert all(balanced(health) for health in told)
    assert told[-1].stored == 20


def test_many_threads_share_transactions(
    store: BaseStore, directory: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    original = store.save_rows

    def save_rows(rows: Any) -> Any:
        batches.append(len(rows))
        return original(rows)

    monkeypatch.setattr(store, "save_rows", save_rows)
    with EventWriter(store, spool=mode, spool_directory=directory) as writer:

        def produce(number: int) -> None:
            chance = random.Random(number)
            for i in range(200):
                writer.put(event(f"t{number}", T0 + i))
                if chance.random() < 0.05:
                    time.sleep(0.001)

        threads = [threading.Thread(target=produce, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.flush(30) == 0
    assert sum(batches) == 1600
    assert len(batches) < 100
    for number in range(8):
        assert [e.timestamp for e in store.get_events(f"t{number}")] == [T0 + i for i in range(200)]


def test_two_writers_in_two_processes_store_the_same_events_once(
    database: Database, tmp_path: Path
) -> None:
    program = """
import sys
from contextuate_persist import EventWriter, MonitorEvent, open_store
store = open_store(sys.argv[1])
with EventWriter(store, spool_directory=sys.argv[2]) as writer:
    for n in range(600):
        writer.put(MonitorEvent(id=f"00000000-0000-4000-8000-{n:012d}", timestamp=1700000000000 + n,
            session_id=f"s{n % 3}", machine_id="m", working_directory="/", event_type="e",
            hook_type="h", data={"n": n}))
    assert writer.flush(60) == 0
    health = writer.health()
    print(health.stored, health.duplicate)
store.close()
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, database.url, str(tmp_path / name)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    counts = [
        [int(n) for n in process.communicate(timeout=120)[0].split()] for process in processes
    ]
    assert sum(stored for stored, _ in counts) == 600
    assert sum(duplicate for _, duplicate in counts) == 600
    with make_store(database.url) as store:
        assert sum(store.event_counts().values()) == 600


def test_a_forked_child_leaves_the_writer_to_its_parent(
    writer: EventWriter, store: BaseStore
) -> None:
    writer.put(event("s", T0)).wait_stored(30)
    child = os.fork()
    if child == 0:
        try:
            writer.put(event("s", T0 + 1))
        except StoreClosed:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert writer.put(event("s", T0 + 2)).wait_stored(30)
    assert [e.timestamp for e in store.get_events("s")] == [T0, T0 + 2]


def test_what_a_callback_does_ends_no_thread(writer: EventWriter) -> None:
    told: list[str] = []

    def leave(_: Receipt) -> None:
        raise SystemExit

    def wait(_: Receipt) -> None:
        for call in (writer.flush, writer.close):
            try:
                call()
            except RuntimeError as error:
                told.append(str(error))

    receipt = writer.put(event())
    receipt.on_stored(leave)
    receipt.on_stored(wait)
    assert receipt.wait_stored(30)
    receipt.on_stored(leave)
    assert writer.put(event()).wait_stored(30)
    assert told == ["a callback of the writer's cannot wait for the writer"] * 2


def test_who_gives_up_waiting_leaves_nothing_behind(
    writer: EventWriter, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)
    receipt = writer.put(event())
    for _ in range(5000):
        assert not receipt.wait_stored(0)
    assert writer._outbox is not None
    assert len(writer._outbox.done._order) < 200
    monkeypatch.undo()
    assert receipt.wait_stored(30)


def test_a_sender_that_comes_back_too_late_changes_nothing(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_session(session("s"))
    held, entered = threading.Event(), threading.Event()
    original = store.update_session

    def slow(session_id: str, **fields: Any) -> None:
        original(session_id, **fields)
        if fields == {"label": "a"}:
            entered.set()
            held.wait(30)

    monkeypatch.setattr(store, "update_session", slow)
    writer = EventWriter(store, spool_directory=directory)
    writer.init()
    for label in "abc":
        writer.update_session("s", label=label)
    assert entered.wait(30)
    assert writer.close(0) == 3
    monkeypatch.undo()
    with writer:
        assert writer.flush(30) == 0
        held.set()
        time.sleep(0.3)
    got = store.get_session("s")
    assert got is not None
    assert got.label == "c"


def test_ctrl_c_while_a_writer_closes_closes_it(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: None
) -> None:
    away(store, monkeypatch)
    writer = EventWriter(store, spool_directory=directory)
    writer.init()
    writer.put(event())
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        writer.close(60)
    monkeypatch.undo()
    with writer:
        assert writer.flush(30) == 0
    assert len(store.get_events("s")) == 1


class Full(list[Any]):
    """A list that cannot grow."""

    def __iadd__(self, _: Any) -> Any:
        raise MemoryError


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_interrupts_a_put_leaves_no_hole_in_the_numbers(
    writer: EventWriter, store: BaseStore, monkeypatch: pytest.MonkeyPatch, error: type
) -> None:
    def interrupted(*_: Any) -> Any:
        raise error

    writer.put(event("s", T0))
    assert writer.flush(30) == 0
    with monkeypatch.context() as patch:
        if error is MemoryError:
            patch.setattr(writer._outbox, "_arrivals", Full())
        else:
            patch.setattr(outbox, "Arrival", interrupted)
        with pytest.raises(error):
            writer.put(event("s", T0 + 1))
    assert writer.flush(30) == 0
    writer.put(event("s", T0 + 2))
    assert writer.flush(30) == 0
    assert [one.timestamp for one in store.get_events("s")] == [T0, T0 + 2]
    assert writer.health().accepted == 2


def test_large_updates_count_with_all_they_hold(
    writer: EventWriter, store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)
    children = [f"child-{n:0200}" for n in range(500)]
    writer.update_session("s", child_session_ids=children)
    children.clear()
    assert writer.health().memory_bytes > 100_000
    store.save_session(session("s"))  # before the sender's next try, which may come at once
    monkeypatch.undo()
    assert writer.flush(30) == 0
    got = store.get_session("s")
    assert got is not None
    assert len(got.child_session_ids) == 500


# --- For asyncio ----------------------------------------------------------------------------------


def test_the_asyncio_writer_does_the_same(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        inner = EventWriter(store, spool_directory=directory, memory_bytes=2**20)
        async with AsyncEventWriter(inner) as writer:
            assert "AsyncEventWriter" in repr(writer)
            receipt = await writer.put(event("s", T0))
            assert await receipt.wait_safe()
            assert await receipt.wait_stored()
            assert (receipt.safe, receipt.stored, receipt.refusal) == (True, True, None)
            assert repr(receipt) == f"<AsyncReceipt {receipt.number}: stored>"
            await writer.put_session(session("s"))
            await writer.update_session("s", label="x")
            refused = await writer.put(event(data={"x": float("nan")}))
            assert await refused.wait_stored()
            assert refused.refusal == "data.x: JSON has no nan"
            # Faster than the disk: waits for room in a thread, the loop goes on.
            many = [event("m", T0 + i, data={"x": "x" * 9000}) for i in range(600)]
            await asyncio.gather(*(writer.put(one) for one in many))
            assert await writer.flush(30) == 0
            health = writer.health()
            assert (health.stored, health.set_aside) == (603, 1)
            cancelled = asyncio.create_task((await writer.put(event("c"))).wait_stored())
            await asyncio.sleep(0)
            cancelled.cancel()
        with pytest.raises(StoreClosed):
            await writer.put(event())

    asyncio.run(main())
    got = store.get_session("s")
    assert got is not None
    assert got.label == "x"


def test_the_asyncio_writer_raises_what_the_other_does(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(store, monkeypatch)

    async def main() -> None:
        inner = EventWriter(store, spool_directory=directory, spool_bytes=2**20)
        async with AsyncEventWriter(inner) as writer:
            receipt = await writer.put(event())
            with pytest.raises(SpoolFull):  # noqa: PT012
                for i in range(1000):
                    await writer.put(event("s", T0 + i, data={"x": "x" * 4000}))
            left = asyncio.create_task(receipt.wait_stored())
            await asyncio.sleep(0.01)
            assert await writer.close(0) > 50
            assert await left is False

    asyncio.run(main())


def test_puts_that_wait_for_room_together_wait_no_longer_than_each_alone(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other they would take 20 s."""
    large = event("s", data={"x": "x" * 100_000})

    async def main() -> None:
        inner = EventWriter(store, spool_directory=directory, memory_bytes=2**20)
        async with AsyncEventWriter(inner) as writer:
            with monkeypatch.context() as patch:
                entered, answers = hung_disk(patch)
                with pytest.raises(SpoolError, match="memory is full"):  # noqa: PT012
                    while True:
                        await writer.put(large, timeout=0)
                assert entered.wait(30)
                begun = time.monotonic()
                found = await asyncio.gather(
                    *(writer.put(large, timeout=0.5) for _ in range(40)), return_exceptions=True
                )
                assert 0.5 <= time.monotonic() - begun < 8
                assert {str(error) for error in found} == {
                    f"{directory}: its disk does not keep up; memory is full"
                }
                small = asyncio.create_task(writer.put(event("s", T0 + 1), timeout=30))
                await asyncio.sleep(0.1)
                answers.set()
                assert await (await small).wait_stored()

    asyncio.run(main())


def test_a_cancelled_opening_leaves_no_asyncio_writer_open(
    store: BaseStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = EventWriter(store, spool_directory=directory)
    proceed = held_back(inner, "init", monkeypatch)

    async def main() -> None:
        writer = AsyncEventWriter(inner)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(writer.init(), 0.05)
        asyncio.get_running_loop().call_later(0.1, proceed.set)
        async with writer:  # waits for what was begun before
            assert await (await writer.put(event("s"))).wait_stored()
        proceed.clear()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(writer.init(), 0.05)
        proceed.set()

    asyncio.run(main())
    another, until = EventWriter(store, spool_directory=directory), time.monotonic() + 30
    while another._outbox is None:
        try:
            another.init()
        except ConfigurationError:  # the first one is just being closed
            assert time.monotonic() < until
            time.sleep(0.01)
    another.close()
