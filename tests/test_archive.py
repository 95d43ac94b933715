"""Archives: nothing is deleted that is not in a file that was read back; all of it comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from contextuate_persist import (
    ConfigurationError,
    DamagedFile,
    MessageUsage,
    MonitorEvent,
    SessionMeta,
    StoreUnavailable,
    TokenUsage,
    encryption,
    retention,
    transfer,
)
from contextuate_persist import archive as archives
from contextuate_persist.archive import archive
from contextuate_persist.base import BaseStore
from contextuate_persist.cli import main
from contextuate_persist.config import ENVIRONMENT_URL
from contextuate_persist.retention import RetentionPolicy
from contextuate_persist.transfer import import_path
from tests.builders import T0, event, session, usage
from tests.conftest import Database, make_store

BOTH_LAYOUTS = "comes_back|changes_meanwhile|in_slices"
NOW = time.time_ns() // 1_000_000
OLD = {"end_time": T0, "status": "completed"}
POLICY = RetentionPolicy()

Content = dict[str, tuple[SessionMeta, list[MessageUsage], list[MonitorEvent]]]


class KilledError(BaseException):
    """Instead of a kill, at a place of the test's choice."""


def content(store: BaseStore) -> Content:
    """Everything that a store has, by session."""
    return {
        one.session_id: (
            one,
            store.get_usage(one.session_id),
            [*store.iter_events(session_id=one.session_id)],
        )
        for one in store.get_sessions()
    }


def in_archives(directory: Path) -> Content:
    """Everything that the files of an archive have, each of which must be whole."""
    found: Content = {}
    for path in sorted(directory.glob("*.jsonl.gz")):
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        assert (lines[0]["kind"], lines[-1]["kind"]) == ("archive", "archiveEnd")
        for line in lines:
            if line["kind"] == "session":
                one = SessionMeta.from_wire(line)
                found[one.session_id] = (one, [], [])
            elif line["kind"] == "usage":
                found[line["sessionId"]][1].append(MessageUsage.from_wire(line))
            elif line["kind"] == "event":
                found[line["sessionId"]][2].append(MonitorEvent.from_wire(line))
    return found


def fill(store: BaseStore) -> None:
    """Old sessions of all kinds, among them all that is hard to keep."""
    store.save_sessions(
        [
            session("root", label="L\u00e4bel \ud800 \0", model="m", agent_type="nexus",
                    transcript_path="/t\0", child_session_ids=("listed",), hidden=True, **OLD),
            session("child", parent_session_id="root", token_usage=TokenUsage(
                total_input=7, total_output=8, total_cache_read=9), **OLD),
            session("by hand", manual_parent_session_id="child", is_user_initiated=False, **OLD),
            session("failed", start_time=T0 + 5, end_time=T0 + 9, status="error"),
            session("never ended", machine_id="M2", working_directory="/\ud800"),
            session("of a reference", parent_session_id="unseen", **OLD),
            session("kept", start_time=NOW),
            session("pinned", is_pinned=True, **OLD),
        ]
    )  # fmt: skip
    store.update_session("never ended", end_time=T0 + 3)
    hard = {
        "n": 2**70, "f": 1e16, "z": -1.5e-300, "nul": "\0", "lone": "\ud800", "deep": [[[[{}]]]],
        "del": "\x7f", "kind": "session", "text": "DELIMITER ;; \" '", "long": "x" * 70_000,
    }  # fmt: skip
    for name in ("root", "child", "failed", "never ended", "kept", "pinned"):
        first = NOW if name == "kept" else T0
        store.save_events(
            event(name, first + number // 3, data={**hard, "number": number},
                  event_type="of tomorrow" if number % 2 else "tool_call")
            for number in range(9)
        )  # fmt: skip
    store.save_event(event("from events", T0 - 5, parent_session_id="named"))
    store.save_usage("root", [usage("m1", 3, model="big"), usage("m2", 4, cache_read=2**40)])
    store.save_usage("never ended", [usage("m3", 0)])


def test_what_was_archived_and_deleted_comes_back_equal(store: BaseStore, tmp_path: Path) -> None:
    fill(store)
    before = content(store)
    report = archive(store, tmp_path / "new" / "archive", POLICY)
    old = before.keys() - {"kept", "pinned"}
    assert (report.sessions, report.spared, report.kept) == (len(old), 0, 2)
    assert content(store).keys() == {"kept", "pinned"}
    (path,) = report.files
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert in_archives(path.parent) == {name: before[name] for name in old}
    again = import_path(store, path, undelete=True)
    assert (again.sessions, again.refused, again.deleted) == (len(old), (), 0)
    assert again.stored == again.lines == report.events
    assert content(store) == before
    assert import_path(store, path.parent, undelete=True).stored == 0
    assert content(store) == before
    assert store.save_event(event("root", T0 + 10)) is True  # it is no deleted session any more


def test_lone_surrogates_side_by_side_come_back_as_two(store: BaseStore, tmp_path: Path) -> None:
    """Their escapes would be those of one character."""
    two, one = "\ud83d\ude00", "\U0001f600"
    store.save_session(
        session("s", label=two, transcript_path=f"/{two}", working_directory=two, **OLD)
    )
    given = [event("s", T0, data={"t": two, two: [one, {"\\": two}]}), event("s", data={"t": one})]
    store.save_events(given)
    store.save_session(session("other", label=one, **OLD))
    before = content(store)
    report = archive(store, tmp_path, POLICY)
    assert report.sessions == 2
    assert in_archives(tmp_path) == before
    # Only the lines that must be are other than they were.
    lines = gzip.decompress(report.files[0].read_bytes()).splitlines()
    hard = [line for line in lines if not line.isascii()]
    assert [json.loads(line)["kind"] for line in hard] == ["session", "event"]
    assert import_path(store, tmp_path, undelete=True).refused == ()
    assert content(store) == before


def test_an_archive_is_no_way_around_a_deletion(store: BaseStore, tmp_path: Path) -> None:
    fill(store)
    report = archive(store, tmp_path, POLICY)
    left = content(store)
    again = import_path(store, report.files[0])
    assert (again.sessions, again.stored, again.deleted) == (0, 0, report.sessions)
    assert again.already_there == again.lines == report.events
    assert again.refused == ()
    assert content(store) == left


def test_a_session_that_is_there_only_gets_what_it_lacks(store: BaseStore, tmp_path: Path) -> None:
    store.save_session(session("s", label="old", **OLD))
    store.save_events(event("s", T0 + i) for i in range(3))
    store.save_usage("s", [usage("m", 5)])
    was = content(store)["s"]
    report = archive(store, tmp_path, POLICY)
    later = time.time_ns() // 1_000_000 + 600_000  # than the deletion, by the server's clock
    store.save_session(session("s", label="new", start_time=later))
    store.save_event(event("s", later))
    import_path(store, report.files[0], undelete=True)
    found, messages, events = content(store)["s"]
    assert (found.label, found.start_time, found.status) == ("new", later, "active")
    assert messages == was[1]
    assert events[:3] == was[2]
    assert len(events) == 4


def test_a_dry_run_writes_and_deletes_nothing(store: BaseStore, tmp_path: Path) -> None:
    fill(store)
    before = content(store)
    told = archive(store, tmp_path / "archive", POLICY, dry_run=True)
    assert content(store) == before
    assert not (tmp_path / "archive").exists()
    done = archive(store, tmp_path / "archive", POLICY)
    assert dataclasses.replace(done, files=()) == told


def test_nothing_due_makes_no_file(store: BaseStore, tmp_path: Path) -> None:
    store.save_session(session("young", start_time=NOW))
    assert archive(store, tmp_path, POLICY).files == ()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_files_are_cut_between_trees(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "FILE_SESSIONS", 3)
    monkeypatch.setattr(retention, "STEP_SESSIONS", 2)
    for number in range(4):
        store.save_sessions(
            [
                session(f"r{number}", **OLD),
                session(f"c{number}", parent_session_id=f"r{number}", **OLD),
            ]
        )
    before = content(store)
    seen: list[tuple[int, int | None]] = []
    report = archive(store, tmp_path, POLICY, progress=lambda *done: seen.append(done))
    assert len(report.files) == len({path.name for path in report.files}) == 4
    assert seen == [(2, 8), (4, 8), (6, 8), (8, 8)]
    assert in_archives(tmp_path) == before


def test_archiving_stops_when_told_to_and_goes_on_later(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "FILE_SESSIONS", 1)
    store.save_sessions(session(f"s{number}", **OLD) for number in range(3))
    before = content(store)
    stop = threading.Event()
    report = archive(store, tmp_path, POLICY, progress=lambda *_: stop.set(), stop=stop)
    assert (report.sessions, report.spared, report.kept, len(report.files)) == (1, 0, 2, 1)
    assert archive(store, tmp_path, POLICY).sessions == 2
    assert in_archives(tmp_path) == before


def test_archiving_stops_inside_a_file_and_the_next_deletes_what_is_left(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP_SESSIONS", 1)
    store.save_sessions(session(f"s{number}", **OLD) for number in range(3))
    before = content(store)
    stop = threading.Event()
    delete = store.delete_unchanged

    def then_stop(*arguments: Any, **options: Any) -> list[str]:
        stop.set()
        return delete(*arguments, **options)

    monkeypatch.setattr(store, "delete_unchanged", then_stop)
    report = archive(store, tmp_path, POLICY, stop=stop)
    assert (report.sessions, report.kept, len(report.files)) == (1, 2, 1)
    assert in_archives(tmp_path) == before
    assert archive(store, tmp_path, POLICY).sessions == 2
    assert in_archives(tmp_path) == before


def test_half_files_of_a_killed_archiving_are_removed(store: BaseStore, tmp_path: Path) -> None:
    for suffix in (".jsonl.gz.part", ".jsonl.gz.age.part"):
        (tmp_path / f"contextuate-20260101T000000Z-0001{suffix}").write_text("half")
    assert import_path(store, tmp_path).files == 0
    assert archive(store, tmp_path, POLICY).files == ()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_half_files_of_others_stay(store: BaseStore, tmp_path: Path) -> None:
    names = {"film.mkv.part", "contextuate.part", "contextuate-notes.txt.part"}
    for name in names:
        (tmp_path / name).write_text("half")
    (tmp_path / "contextuate-a.jsonl.gz.part").mkdir()
    assert archive(store, tmp_path, POLICY).files == ()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names, "contextuate-a.jsonl.gz.part", ".lock"}


# --- What no line can carry -----------------------------------------------------------------------

#: What other programs may set, where, and what is said of it.
BROKEN = {
    "end": ("sessions SET end_time = 5", "child: endTime: 5 is no time"),
    "machine": ("sessions SET machine_id = ' m'", "child: machineId: white space"),
    "tokens": ("sessions SET token_usage_input = -1", "child: totalInput: a count is needed"),
    "id": ("sessions SET session_id = 'child '", "child : session_id: white space"),
    "message": ("token_ledger SET timestamp = 5", "child: message m1: timestamp: 5 is no time"),
    "event": ("events SET timestamp = 5", "child: event {id}: timestamp: 5 is no time"),
    "unreadable": ("events SET exact = 'x'", "child: a stored payload cannot be read"),
    "no number": (
        """events SET exact = '{"data": {"n": NaN}}'""",
        "child: event {id}: data.n: JSON has no nan",
    ),
    "deep": (
        f"""events SET exact = '{{"data": {{"n": {"[" * 600 + "]" * 600}}}}}'""",
        "child: event {id}: data: nested more than 512 deep",  # which no import takes
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_tree_that_no_line_can_carry_stays_and_is_named_and_the_others_go(
    store: BaseStore,
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    monkeypatch.setattr(archives, "FILE_SESSIONS", 3)
    store.save_session(session("root", start_time=T0 - 9, end_time=T0 - 5, status="completed"))
    store.save_session(session("child", start_time=T0 - 9, parent_session_id="root"))
    happened = event("child", T0 - 5)
    store.save_events([event("root"), event("other"), event("third")])
    store.save_sessions([session("other", **OLD), session("third", **OLD)])
    good = content(store)
    change, said = BROKEN[what]
    if change.startswith("token_ledger"):
        store.save_usage("child", [usage("m1")])
    elif change.startswith("events"):
        store.save_event(happened)
    database.execute(f"UPDATE {change} WHERE session_id = 'child'")
    left = store.session_states()
    report = archive(store, tmp_path, POLICY)
    assert (report.sessions, report.events) == (2, 2)
    assert (report.spared, report.unfit, report.kept) == (2, 2, 2)
    named = said.format(id=happened.id)
    assert any(problem.startswith(named) for problem in report.problems)
    assert store.session_states() == [
        state for state in left if state.session_id not in ("other", "third")
    ]
    assert in_archives(tmp_path) == {name: good[name] for name in ("other", "third")}
    again = archive(store, tmp_path, POLICY)
    assert (again.sessions, again.spared, again.files) == (0, 2, ())
    assert again.problems == report.problems
    assert len([*tmp_path.iterdir()]) == 1 + len(report.files)


# --- What changes meanwhile -----------------------------------------------------------------------

CHANGES: dict[str, Callable[[BaseStore], object]] = {
    "pinned": lambda store: store.update_session("child", is_pinned=True),
    "renamed": lambda store: store.update_session("child", label="renamed"),
    "a new event": lambda store: store.save_event(event("child", T0 - 5)),
    "a new message": lambda store: store.save_usage("child", [usage("new", 5)]),
    "a larger reading": lambda store: store.save_usage("root", [usage("m1", 500)]),
    "a new child": lambda store: store.save_session(session("new", parent_session_id="child")),
    "deleted": lambda store: store.delete_session("child"),
}


@pytest.mark.parametrize("moment", ["_verify", "_delete"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_tree_that_changes_meanwhile_is_left_alone(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, moment: str
) -> None:
    store.save_sessions([session("root", **OLD), session("child", parent_session_id="root", **OLD),
                         session("other", **OLD)])  # fmt: skip
    store.save_events(event(name, T0 + i) for name in ("root", "child", "other") for i in range(3))
    store.save_usage("root", [usage("m1", 1)])
    go_on = getattr(archives._Work, moment)
    changed: list[Content] = []

    def change_before(self: Any, *arguments: Any) -> Any:
        if not changed:
            CHANGES[change](store)
            changed.append(content(store))
        return go_on(self, *arguments)

    monkeypatch.setattr(archives._Work, moment, change_before)
    report = archive(store, tmp_path, POLICY)
    assert report.sessions == 1
    (expected,) = changed
    del expected["other"]
    assert content(store) == expected
    left = archive(store, tmp_path, POLICY)  # and the next time it goes, if it may
    assert left.spared == 0
    assert (content(store) == {}) == (change != "pinned")
    import_path(store, tmp_path, undelete=True)
    if change == "deleted":
        store.delete_session("child")  # which was in the first file, with the other
    again = content(store)
    assert again.pop("other")
    assert again == expected


#: What somebody may set by hand, each value on its own.
BY_HAND = {
    "events": {
        "timestamp": f"{T0 + 1}",
        "event_type": "'error'",
        "hook_type": "'PostToolUse'",
        "parent_session_id": "'parent'",
        "machine_id": "'other'",
        "working_directory": "'/other'",
        "tool_name": "'Other'",
        "tool_use_id": "'other'",
        "data": """'{"n": 2}'""",
        "exact": """'{"n": 2}'""",
        "commit_order": "5",
        "created_at": "'2020-02-02'",
    },
    "token_ledger": {
        "message_id": "'other'",
        "timestamp": f"{T0 + 1}",
        "model": "'other'",
        "input_tokens": "71",
        "output_tokens": "72",
        "cache_read": "73",
        "cache_creation": "74",
    },
}
NEW_ID = {"postgresql": "md5('other')::uuid", "mysql": "UUID_TO_BIN(UUID())"}


@pytest.mark.parametrize("in_slices", [False, True])
def test_whichever_value_was_changed_by_hand_its_session_is_not_deleted(
    store: BaseStore, database: Database, in_slices: bool
) -> None:
    store.save_session(session("s", **OLD))
    store.save_event(event("s"))
    store.save_usage("s", [usage()])
    by_hand = {**BY_HAND, "events": {**BY_HAND["events"], "id": NEW_ID[store.backend]}}
    for table, values in by_hand.items():
        for column, value in values.items():
            before = store.fingerprints(["s"], in_slices=in_slices)
            database.execute(f"UPDATE {table} SET {column} = {value}")
            assert store.fingerprints(["s"], in_slices=in_slices) != before, column
            states = store.session_states()
            assert store.delete_unchanged(states, before, in_slices=in_slices) == [], column


def test_a_file_that_is_not_what_the_database_has_is_noticed_and_nothing_is_deleted(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    before = content(store)
    write = archives._Work._write

    def flipped(text: bytes) -> bytes:
        middle = len(text) // 2
        return text[:middle] + bytes([text[middle] ^ 1]) + text[middle + 1 :]

    def edited(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
        return lambda text: gzip.compress(gzip.decompress(text).replace(old, new, 1))

    def without_a_session(text: bytes) -> bytes:
        lines = gzip.decompress(text).splitlines(keepends=True)
        ends = [i for i, line in enumerate(lines) if b'"kind":"sessionEnd"' in line]
        return gzip.compress(b"".join(lines[: ends[0] + 1] + lines[ends[1] + 1 :]))

    damages: list[Callable[[bytes], bytes]] = [
        flipped,
        lambda text: text[:-20],
        lambda text: b"",
        edited(b'"number":3', b'"number":4'),
        edited(b'"outputTokens":3', b'"outputTokens":4'),
        edited(b'"label":', b'"lable":'),
        edited(b'"kind":"archiveEnd"', b'"kind":"?"'),
        without_a_session,
    ]
    for damage in damages:

        def write_damaged(self: Any, part: Path, forest: Any) -> Any:
            fingerprints = write(self, part, forest)
            part.write_bytes(damage(part.read_bytes()))  # noqa: B023
            return fingerprints

        monkeypatch.setattr(archives._Work, "_write", write_damaged)
        with pytest.raises(DamagedFile, match=r"\.part: "):
            archive(store, tmp_path, POLICY)
        assert content(store) == before
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_leaves_everything_where_it_is(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    before = content(store)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(archives.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        archive(store, tmp_path, POLICY)
    assert str(caught.value.filename).endswith(".part")
    assert content(store) == before
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_fingerprint_in_slices_is_the_same(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    store.save_events([event("many", T0 + n % 13, data={"n": n}) for n in range(1000)])
    store.save_usage("many", [usage()])
    store.save_session(session("without events"))
    ids = [one.session_id for one in store.get_sessions()]
    monkeypatch.setattr("contextuate_persist.base._SLICE_ROWS", 128)
    whole = store.fingerprints([*ids, "not there"])
    assert store.fingerprints([*ids, "not there"], in_slices=True) == whole
    assert set(whole) == set(ids)
    store.save_event(event("many", T0 + 5))
    after = store.fingerprints(["many"], in_slices=True)
    assert after == store.fingerprints(["many"]) != {"many": whole["many"]}


#: What makes each event take some 10 ms or 20 where its payload is read.
SLOW = {
    "postgresql": {
        "md5(e::text)": "md5(e::text || pg_sleep(0.01)::text)",
        "pg_column_size(e.data)": "length(pg_sleep(0.01)::text) + pg_column_size(e.data)",
    },
    "mysql": {
        "SHA2(e.machine_id, 256)": "SHA2(CONCAT(e.machine_id, "
        "LEFT('', BENCHMARK(80000, SHA2('x', 256)))), 256)",
        "JSON_STORAGE_SIZE(e.data)": "BENCHMARK(80000, SHA2('x', 256)) + JSON_STORAGE_SIZE(e.data)",
    },
}


def test_what_takes_too_long_for_one_statement_is_archived_in_slices(
    store: BaseStore, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_session(session("large", **OLD))
    store.save_events([event("large", T0 + n % 7, data={"n": n}) for n in range(120)])
    before = content(store)
    weights = store.weigh_sessions(["large"])
    module = importlib.import_module(f"contextuate_persist.{store.backend}_store")

    def slowed(text: str) -> str:
        for quick, slow in SLOW[store.backend].items():
            text = text.replace(quick, slow)
        return text

    for name in ("SELECT_WEIGHTS", "SELECT_FINGERPRINTS"):
        monkeypatch.setattr(module, name, slowed(getattr(module, name)))
    slices = {name: slowed(text) for name, text in module.SELECT_SLICES.items()}
    monkeypatch.setattr(module, "SELECT_SLICES", slices)
    with make_store(database.url, statement_timeout=0.5) as hasty:
        with pytest.raises(StoreUnavailable):
            hasty.fingerprints(["large"])
        assert hasty.weigh_sessions(["large"]) == weights
        monkeypatch.setattr(archives, "_SLICED_BYTES", weights["large"].size - 1)
        assert archive(hasty, tmp_path, POLICY).sessions == 1
    assert store.get_sessions() == []
    assert in_archives(tmp_path) == before


def test_two_do_not_archive_to_one_directory(store: BaseStore, tmp_path: Path) -> None:
    with (
        archives._sole_archiver(tmp_path),
        pytest.raises(ConfigurationError, match="another process archives to it"),
    ):
        archive(store, tmp_path, POLICY)


# --- Encrypted ------------------------------------------------------------------------------------


def test_an_encrypted_archive_is_read_back_all_the_same_and_opened_by_its_key(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    before = content(store)
    public = encryption.new_identity(tmp_path / "key")
    keys = encryption.recipients([public])
    write = archives._Work._write

    def damaged(self: Any, part: Path, forest: Any) -> Any:
        fingerprints = write(self, part, forest)
        part.write_bytes(part.read_bytes()[:-1])
        return fingerprints

    with monkeypatch.context() as patch:
        patch.setattr(archives._Work, "_write", damaged)
        with pytest.raises(DamagedFile):
            archive(store, tmp_path / "archive", POLICY, recipients=keys)
    assert content(store) == before
    (path,) = archive(store, tmp_path / "archive", POLICY, recipients=keys).files
    assert path.name.endswith(".jsonl.gz.age")
    assert b"never ended" not in path.read_bytes()
    with pytest.raises(ConfigurationError, match="--identity"):
        import_path(store, path, undelete=True)
    encryption.new_identity(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="not encrypted for this key"):
        import_path(
            store, path, undelete=True, identities=encryption.identities(tmp_path / "other")
        )
    own = encryption.identities(tmp_path / "key")
    assert import_path(store, path.parent, undelete=True, identities=own).refused == ()
    assert content(store) == before


# --- Import ---------------------------------------------------------------------------------------


def test_a_damaged_archive_gives_what_can_be_read_and_says_so(
    store: BaseStore, tmp_path: Path
) -> None:
    fill(store)
    before = content(store)
    (path,) = archive(store, tmp_path, POLICY).files
    text = gzip.decompress(path.read_bytes())
    edited = tmp_path / "edited.jsonl.gz"
    edited.write_bytes(gzip.compress(text.replace(b'"number":3', b'"number":4', 1)))
    report = import_path(store, edited, undelete=True)
    assert report.refused_count == 1
    assert "sha256: the lines of session " in report.refused[0]
    assert content(store).keys() == before.keys()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(text)[:-9])
    (refusal,) = import_path(store, cut, undelete=True).refused
    assert "file: damaged or cut short" in refusal
    unpacked = tmp_path / "unpacked.jsonl"
    unpacked.write_bytes(text)
    assert import_path(store, unpacked, undelete=True).refused == ()
    unpacked.write_bytes(b"".join(text.splitlines(keepends=True)[:-1]))
    (refusal,) = import_path(store, unpacked, undelete=True).refused
    assert "the archive has no end" in refusal


def test_a_session_whose_line_is_the_last_of_a_cut_archive_comes_back(
    store: BaseStore, tmp_path: Path
) -> None:
    store.save_session(session("s", label="kept", **OLD))
    (path,) = archive(store, tmp_path, POLICY).files
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(gzip.decompress(path.read_bytes()).splitlines(keepends=True)[:2]))
    (refusal,) = import_path(store, cut, undelete=True).refused
    assert "the archive has no end" in refusal
    assert [one.label for one in store.get_sessions()] == ["kept"]


@pytest.mark.parametrize("last", ["message", "event"])
def test_messages_come_back_from_an_archive_that_is_cut_behind_them(
    store: BaseStore, tmp_path: Path, last: str
) -> None:
    store.save_session(session("s", **OLD))
    store.save_usage("s", [usage("m1"), usage("m2")])
    store.save_event(event("s", T0))
    (before,), messages = store.get_sessions(), store.get_usage("s")
    (path,) = archive(store, tmp_path, POLICY).files
    cut = tmp_path / "cut.jsonl"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[: 4 if last == "message" else 5]))
    (refusal,) = import_path(store, cut, undelete=True).refused
    assert "the archive has no end" in refusal
    (found,) = store.get_sessions()
    assert (found.token_usage, store.get_usage("s")) == (before.token_usage, messages)


def test_of_an_archive_of_a_newer_version_nothing_is_stored(
    store: BaseStore, tmp_path: Path
) -> None:
    """Its events alone would keep the sessions from being restored by whoever knows it."""
    fill(store)
    (path,) = archive(store, tmp_path, POLICY).files
    text = gzip.decompress(path.read_bytes())
    newer = tmp_path / "newer.jsonl"
    newer.write_bytes(text.replace(b'"version":1', b'"version":2'))
    left = content(store)
    (refusal,) = import_path(store, newer, undelete=True).refused
    assert refusal == f"{newer}:1: version: a newer contextuate-persist has written this archive"
    assert content(store) == left


def test_an_error_of_the_disk_inside_an_archive_costs_the_rest_of_that_file_only(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    (path,) = archive(store, tmp_path, POLICY).files
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    one = event("s", T0)
    second.write_text(json.dumps(one.to_wire()))
    lines = transfer._lines

    def failing(stream: Any) -> Any:
        found = lines(stream)
        yield next(found)
        if stream.name == str(first):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        yield from found

    monkeypatch.setattr(transfer, "_lines", failing)
    report = import_path(store, tmp_path)
    assert report.refused == (f"{first}: file: Input/output error",)
    assert store.get_events("s") == [one]


def test_a_session_that_a_newer_event_brought_back_is_told_to_lack_its_past(
    store: BaseStore, tmp_path: Path
) -> None:
    store.save_session(session("s", **OLD))
    old = event("s", T0)
    store.save_event(old)
    (path,) = archive(store, tmp_path, POLICY).files
    new = event("s", round(time.time() * 1000) + 1000)
    store.save_event(new)
    assert import_path(store, path).deleted == 1
    assert store.get_events("s") == [new]
    report = import_path(store, path, undelete=True)
    assert (report.deleted, report.stored) == (0, 1)
    assert import_path(store, path).deleted == 0
    assert store.get_events("s") == [old, new]


@pytest.mark.parametrize(
    "damage", [(b'"kind":"session"', b'"kind":"session'), (b'"completed"', b'"of tomorrow"')]
)
def test_the_messages_of_a_session_that_is_refused_are_counted_to_no_other(
    store: BaseStore, tmp_path: Path, damage: tuple[bytes, bytes]
) -> None:
    for name in ("first", "second", "third"):
        store.save_session(session(name, **OLD))
        store.update_session(name, end_time=T0 + len(name) + ord(name[0]) * 10)
        store.save_usage(name, [usage(f"of {name}")])
    before = content(store)
    (path,) = archive(store, tmp_path, POLICY).files
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    assert b'"second"' in lines[4]
    lines[4] = lines[4].replace(*damage)
    unpacked = tmp_path / "unpacked.jsonl"
    unpacked.write_bytes(b"".join(lines))
    report = import_path(store, unpacked, undelete=True)
    assert [line.split(": ")[0] for line in report.refused] == [f"{unpacked}:5", f"{unpacked}:7"]
    assert "1 messages of a session that was refused" in report.refused[1]
    assert content(store) == {name: before[name] for name in ("first", "third")}
    assert import_path(store, path, undelete=True).refused == ()
    assert content(store) == before


#: What becomes of a session after it was first archived.
LATER: dict[str, dict[str, Any]] = {
    "renamed": {"label": "new", "token_usage": TokenUsage(total_input=9)},
    "emptied": {"label": None, "agent_type": None, "model": None, "end_time": None},
    "goes on": {"end_time": None},
    "ended": {"status": "error", "end_time": T0 + 9},
}


@pytest.mark.parametrize("form", ["as written", "encrypted", "renamed", "in directories"])
@pytest.mark.parametrize("later", LATER)
def test_of_a_directory_the_newest_copy_of_a_session_decides_and_the_others_add(
    store: BaseStore, tmp_path: Path, later: str, form: str
) -> None:
    encryption.new_identity(tmp_path / "key")
    identities = encryption.identities(tmp_path / "key") if form == "encrypted" else ()
    recipients = [one.to_public() for one in identities]
    directory = tmp_path / "archive"
    store.save_sessions(
        [
            session("s", label="old", agent_type="nexus", model="m", parent_session_id="root"),
            session("root", label="old", hidden=True),
            session("only once", **OLD),
        ]
    )
    for name in ("s", "root"):
        store.update_session(name, end_time=T0 + 5)
    store.save_events(event(name, T0 + i // 2) for i in range(5) for name in ("s", "only once"))
    store.save_usage("root", [usage("m1", 5)])
    first = archive(store, directory, POLICY, recipients=recipients)
    import_path(store, directory, undelete=True, identities=identities)
    for name in ("s", "root"):
        store.update_session(name, **LATER[later])
    store.save_events(event("s", T0 + 2) for _ in range(3))
    store.save_usage("root", [usage("m1", 50), usage("m2")])
    store.delete_session("only once")
    before = content(store)
    last = archive(store, directory, POLICY, recipients=recipients)
    assert content(store) == {}
    for number, path in enumerate([*first.files, *last.files]):
        if form == "renamed":
            text = gzip.decompress(path.read_bytes())
            (directory / f"{2 - number}.jsonl").write_bytes(text)
            path.unlink()
        elif form == "in directories":
            (directory / f"{2 - number}").mkdir()
            path.rename(directory / f"{2 - number}" / path.name)
    for _ in range(2):
        report = import_path(store, directory, undelete=True, identities=identities)
        assert (report.files, report.refused) == (2, ())
        there = content(store)
        assert there.pop("only once")
        assert there == before


def test_what_came_after_a_session_was_archived_and_what_was_archived_come_together(
    store: BaseStore, tmp_path: Path
) -> None:
    store.save_sessions(
        [session("root", **OLD), session("s", parent_session_id="root", label="kept", **OLD)]
    )
    old = event("s", T0)
    store.save_event(old)
    store.save_usage("s", [usage("m1")])
    first = content(store)
    archive(store, tmp_path, POLICY)
    new = event("s", time.time_ns() // 1_000_000 + 100, parent_session_id="root")
    store.save_event(new)
    time.sleep(0.2)
    archive(store, tmp_path, RetentionPolicy(max_age_days=0, spared_days=0))
    assert content(store) == {}
    import_path(store, tmp_path, undelete=True)
    there = content(store)
    assert there["root"] == first["root"]
    # Somebody had saved it once: more than what later events alone tell of it.
    assert there["s"] == (*first["s"][:2], [old, new])


def test_an_import_of_a_directory_that_was_killed_is_completed_by_the_next(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_sessions([session("s"), session("t")])
    for name, end in (("s", T0 + 5), ("t", None), ("s", T0 + 7), ("t", T0 + 7)):
        store.update_session(name, end_time=end, label=f"{end}")
        if name == "t":
            store.save_event(event(name, T0))
            before = content(store)
            archive(store, tmp_path, POLICY)
            import_path(store, tmp_path, undelete=True)
            assert content(store) == before
    store.delete_all_sessions()

    for method in ("save_session", "update_session", "save_events", "save_usage"):
        for calls in range(4):
            call, done = getattr(store, method), iter(range(calls))

            def kill(*arguments: Any, **options: Any) -> Any:
                if next(done, None) is None:  # noqa: B023
                    raise KilledError
                return call(*arguments, **options)  # noqa: B023

            with monkeypatch.context() as patch:
                patch.setattr(store, method, kill)
                with contextlib.suppress(KilledError):
                    import_path(store, tmp_path, undelete=True)
            import_path(store, tmp_path, undelete=True)
            assert content(store) == before
            store.delete_all_sessions()


def test_archives_are_read_in_each_other_s_places_and_all_else_in_its_own(
    store: BaseStore, tmp_path: Path
) -> None:
    files = []
    for name in ("old", "new"):
        store.save_session(session(name, **OLD))
        files += archive(store, tmp_path / "archive", POLICY).files
    place = tmp_path / "mixed"
    place.mkdir()
    files[0].rename(place / "b.jsonl.gz")
    files[1].rename(place / "e.jsonl.gz")
    text = gzip.decompress((place / "b.jsonl.gz").read_bytes())
    (place / "d.jsonl").write_bytes(text.replace(b'"version":1', b'"version":2'))
    (place / "a.jsonl").write_text("x" * 100_000)
    (place / "c.jsonl.gz").write_bytes(gzip.compress(text)[:20])
    (place / "f.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(place / "g.jsonl")
    (place / "h.jsonl").touch()
    found = transfer._files_below(place, lambda *_: None, ())
    assert [path.name[0] for path in found] == [*"aecdbfgh"]


def test_lines_of_events_may_be_compressed_too(store: BaseStore, tmp_path: Path) -> None:
    given = [event("s", T0 + i) for i in range(3)]
    lines = [json.dumps(one.to_wire()) for one in given]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    done: list[tuple[int, int | None]] = []
    report = import_path(store, tmp_path, progress=lambda *at: done.append(at))
    assert (report.lines, report.stored) == (3, 3)
    size = (tmp_path / "a.jsonl.gz").stat().st_size
    assert done == [(size, size)]
    assert store.get_events("s") == given


def test_lines_may_be_encrypted_without_being_compressed(store: BaseStore, tmp_path: Path) -> None:
    public = encryption.new_identity(tmp_path / "key")
    given = [event("s", T0 + i, data={"long": "x" * 100_000}) for i in range(3)]
    path = tmp_path / "events.jsonl.age"
    with (
        path.open("wb") as file,
        encryption.encrypted(file, encryption.recipients([public])) as stream,
    ):
        stream.write("\n".join(json.dumps(one.to_wire()) for one in given).encode())
    keys = encryption.identities(tmp_path / "key")
    assert import_path(store, path, identities=keys).stored == 3
    assert store.get_events("s") == given
    path.write_bytes(path.read_bytes()[:-1])
    (refusal,) = import_path(store, path, identities=keys).refused
    assert "file: damaged or cut short" in refusal


def test_an_import_that_was_killed_within_a_session_is_completed_by_the_next(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_sessions([session("root", label="root"), session("s", parent_session_id="root")])
    for name in ("root", "s"):
        store.update_session(name, end_time=T0 + 5)
    before = content(store)
    (path,) = archive(store, tmp_path, POLICY).files

    update = store.update_session
    for name in ("root", "s"):

        def kill(session_id: str, **fields: Any) -> None:
            if session_id == name:  # noqa: B023
                raise KilledError
            update(session_id, **fields)

        with monkeypatch.context() as patch:
            patch.setattr(store, "update_session", kill)
            with pytest.raises(KilledError):
                import_path(store, path, undelete=True)
    import_path(store, path, undelete=True)
    assert content(store) == before
    store.update_session("s", label="goes on", end_time=None)
    before = content(store)
    import_path(store, path, undelete=True)
    assert content(store) == before


def import_killed(store: BaseStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import, up to the messages of the first session."""
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_usage", mock.Mock(side_effect=KilledError))
        with pytest.raises(KilledError):
            import_path(store, path, undelete=True)


def test_messages_that_count_to_another_session_by_now_are_not_counted_twice(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_session(session("first", label="kept", **OLD))
    store.save_usage("first", [usage("m1", 10)])
    store.save_event(event("first"))
    (path,) = archive(store, tmp_path, POLICY).files
    # Its transcript begins with that of the session which it goes on with.
    store.save_session(session("resumed", start_time=NOW))
    store.save_usage("resumed", [usage("m1", 10)])

    import_killed(store, path, monkeypatch)
    for _ in range(2):
        totals = {one.session_id: one.token_usage.total_output for one in store.get_sessions()}
        assert totals == {"first": 0, "resumed": 10}
        assert import_path(store, path, undelete=True).refused == ()
    assert [one.label for one in store.get_sessions()] == [None, "kept"]


def test_an_import_that_was_killed_before_it_counted_is_completed_by_the_next(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_session(session("s", **OLD))
    store.save_usage("s", [usage("m1", 10), usage("m2", 1)])
    before = content(store)
    (path,) = archive(store, tmp_path, POLICY).files

    import_killed(store, path, monkeypatch)
    import_path(store, path, undelete=True)
    assert content(store) == before


# --- Killed ---------------------------------------------------------------------------------------


def archive_killed(database: Database, directory: Path, seconds: float) -> bool:
    """Kill an archiving so long after it began to write; whether it still ran."""
    before, others = {*directory.glob("*.gz*")}, database.connections()
    running = subprocess.Popen(
        [sys.executable, "-m", "contextuate_persist", "archive", "--to", str(directory)],
        env={**os.environ, ENVIRONMENT_URL: database.url},
        stdout=subprocess.DEVNULL,
    )
    while running.poll() is None and {*directory.glob("*.gz*")} <= before:
        time.sleep(0.001)
    time.sleep(seconds)
    running.kill()
    return database.wait_for_end_of(running, others) == -signal.SIGKILL


def kill_archives(database: Database, directory: Path, kills: int) -> None:
    chance = random.Random(11)
    with make_store(database.url) as store:
        for number in range(20 * kills):
            root = f"root{number}"
            store.save_sessions(
                [session(root, **OLD), session(f"{root} child", parent_session_id=root, **OLD)]
            )
            store.save_events(event(root, T0 + i, data={"i": i}) for i in range(20))
            store.save_usage(root, [usage(f"m{number}", number)])
        before = content(store)
        hits = 0
        for _ in range(kills):
            hits += archive_killed(database, directory, chance.uniform(0, 0.1))
            there, archived = content(store), in_archives(directory)
            assert there.keys() | archived.keys() == before.keys()
            for name, was in before.items():
                assert there.get(name, was) == was
                assert archived.get(name, was) == was
                assert (name in there) == (name.removesuffix(" child") in there)
        assert hits > 0
        report = archive(store, directory, POLICY, rest=0)
        assert report.spared == 0
        assert content(store) == {}
        assert in_archives(directory) == before
        assert [*directory.glob("*.part")] == []
        assert import_path(store, directory, undelete=True).refused == ()
        assert content(store) == before


def test_an_archiving_that_was_killed_is_completed_by_the_next(
    database: Database, tmp_path: Path
) -> None:
    kill_archives(database, tmp_path, kills=2)


@pytest.mark.soak
def test_an_archiving_that_is_killed_again_and_again_loses_nothing(
    database: Database, tmp_path: Path
) -> None:
    kill_archives(database, tmp_path, kills=20)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def run(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    monkeypatch.setenv(ENVIRONMENT_URL, database.url)

    def run_command(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([*map(str, arguments)])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


def test_the_command_archives_and_import_brings_it_back(
    run: Callable[..., tuple[int, str, str]], store: BaseStore, tmp_path: Path
) -> None:
    fill(store)
    before = content(store)
    status, out, _ = run("archive", "--to", tmp_path / "a\x1b[31m", "--dry-run")
    assert (status, "would be archived and deleted" in out) == (0, True)
    status, out, _ = run("archive", "--to", tmp_path / "a\x1b[31m")
    assert status == 0
    assert "sessions with 37 events" in out
    assert "\x1b" not in out
    status, _, err = run("import", tmp_path / "a\x1b[31m")
    assert (status, "stay deleted; --undelete brings them back" in err) == (0, True)
    status, out, _ = run("import", tmp_path / "a\x1b[31m", "--undelete")
    assert (status, "37 events read, 37 stored" in out) == (0, True)
    assert content(store) == before


def test_the_command_rests_as_long_as_it_is_told(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, rests: list[float]
) -> None:
    assert run("archive", "--to", tmp_path)[0] == 0
    assert run("archive", "--to", tmp_path, "--rest", "7")[0] == 0
    assert rests == [retention.REST, 7]


def test_the_command_encrypts_for_who_is_named(
    run: Callable[..., tuple[int, str, str]], store: BaseStore, tmp_path: Path
) -> None:
    fill(store)
    before = content(store)
    public = encryption.new_identity(tmp_path / "key")
    status, out, _ = run("archive", "--to", tmp_path / "a", "--recipient", public, "--json")
    (record,) = map(json.loads, out.splitlines())
    assert (status, len(record["files"]), record["dryRun"]) == (0, 1, False)
    status, _, err = run("import", tmp_path / "a", "--undelete")
    assert (status, "--identity FILE" in err) == (1, True)
    assert run("import", tmp_path / "a", "--undelete", "--identity", tmp_path / "key")[0] == 0
    assert content(store) == before
    assert run("archive", "--to", tmp_path / "a", "--recipient", "age1nonsense")[0] == 1
    assert run("archive")[0] == 2


def test_the_command_names_what_it_cannot_archive(
    run: Callable[..., tuple[int, str, str]],
    store: BaseStore,
    database: Database,
    tmp_path: Path,
) -> None:
    store.save_sessions(session(name, **OLD) for name in ("good", "bad"))
    database.execute("UPDATE sessions SET end_time = 5 WHERE session_id = 'bad'")
    status, out, err = run("archive", "--to", tmp_path)
    assert (status, "1 sessions with 0 events" in out) == (1, True)
    assert ", 1 cannot be archived and stay; 1 sessions are kept" in out
    assert "changed meanwhile" not in out
    assert err == "bad: endTime: 5 is no time in Unix milliseconds; is it in seconds?\n"
    status, out, _ = run("archive", "--to", tmp_path, "--json")
    (record,) = map(json.loads, out.splitlines())
    assert (status, record["spared"], record["unfit"], record["files"]) == (1, 1, 1, [])


def test_a_number_that_is_none_is_no_event(store: BaseStore, tmp_path: Path) -> None:
    """What JSON cannot hold was never stored: an archive has nothing to invent."""
    given = event("s", data={"x": 1.5, "id": str(uuid.uuid4())})
    store.save_event(given)
    (path,) = archive(store, tmp_path, POLICY).files
    text = gzip.decompress(path.read_bytes())
    assert not any(word in text for word in (b"NaN", b"Infinity"))
    assert math.isclose(in_archives(tmp_path)["s"][2][0].data["x"], 1.5)
