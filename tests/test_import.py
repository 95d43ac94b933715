"""Import of JSON lines and of contextuate's file store: every good line in, every bad one named."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tracemalloc
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextuate_persist import InvalidRecord, MonitorEvent, SaveResult, StoreUnavailable, transfer
from contextuate_persist.base import BaseStore
from contextuate_persist.display import json_line
from contextuate_persist.payload import MAX_PAYLOAD_BYTES, exact_json
from contextuate_persist.transfer import import_path, parse_json
from tests.builders import T0, event, session


def wire(**fields: Any) -> dict[str, Any]:
    return event().to_wire() | fields


def line(**fields: Any) -> bytes:
    return json.dumps(wire(**fields)).encode()


def without(name: str) -> bytes:
    return json.dumps({key: value for key, value in wire().items() if key != name}).encode()


def with_data(text: bytes) -> bytes:
    return line(data="DATA").replace(b'"DATA"', text)


def write(path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines) + end)
    return path


class Recorder:
    """A store that only notes what it is given, in bounded memory."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.last: MonitorEvent | None = None

    def save_events(self, events: list[MonitorEvent], **options: Any) -> SaveResult:
        self.batches.append(len(events))
        self.last = events[-1]
        return SaveResult(stored=len(events))


# What stands in the line, and what the report says of it after FILE:LINE.
BAD_LINES = {
    "not JSON": (b"{nothing", "JSON: Expecting property name"),
    "cut off": (line()[:40], "JSON: "),
    "two values": (line() + line(), "JSON: Extra data"),
    "NUL bytes": (b"\0\0\0\0", "JSON: Expecting value (character 1)"),
    "not an object": (b'["session"]', "record: a JSON object is needed, not list"),
    "missing field": (without("sessionId"), "sessionId: missing"),
    "null field": (line(machineId=None), "machineId: missing"),
    "wrong type": (line(workingDirectory=5), "workingDirectory: a string is needed, not int"),
    "id not a UUID": (line(id="one"), "id: a UUID is needed, not 'one'"),
    "id of 300 characters": (line(sessionId="x" * 300), "sessionId: 300 characters, at most 255"),
    "control character in an id": (line(sessionId="a\x1bb"), "sessionId: control character"),
    "time in seconds": (line(timestamp=1_700_000_000), "timestamp: 1700000000 is no time in Unix"),
    "time as a float": (line(timestamp=T0 + 0.5), "timestamp: an integer (Unix milliseconds)"),
    "time as text": (line(timestamp="2026-01-01"), "timestamp: an integer (Unix milliseconds)"),
    "time beyond a float": (line(timestamp=10**400), "timestamp: "),
    "data a list": (line(data=[1]), "data: a JSON object is needed, not list"),
    "data a text": (line(data="text"), "data: a JSON object is needed, not str"),
    "empty type": (line(eventType=""), "eventType: empty"),
    "invalid UTF-8": (with_data(b'{"a": "\xff"}'), "JSON: invalid UTF-8 at byte "),
    "surrogate as bytes": (with_data(b'{"a": "\xed\xa0\x80"}'), "JSON: invalid UTF-8 at byte "),
    "UTF-16": ("{}".encode("utf-16"), "JSON: invalid UTF-8 at byte 1"),
    "raw control character": (with_data(b'{"a": "\x01"}'), "JSON: Invalid control character"),
    "NaN": (with_data(b'{"a": NaN}'), "JSON: NaN is not JSON"),
    "Infinity": (with_data(b'{"a": [Infinity]}'), "JSON: Infinity is not JSON"),
    "-Infinity": (with_data(b'{"a": -Infinity}'), "JSON: -Infinity is not JSON"),
    "a number past all floats": (with_data(b'{"a": 1e400}'), "data.a: JSON has no inf"),
    "an integer past Python's limit": (with_data(b'{"a": ' + b"1" * 5000 + b"}"), "JSON: Exceeds"),
    "600 deep": (with_data(b'{"a":' * 600 + b"1" + b"}" * 600), "data: nested more than 512 deep"),
    "100,000 deep": (with_data(b"[" * 100_000 + b"]" * 100_000), "JSON: nested too deep"),
}


def test_each_bad_line_is_one_message_and_every_good_line_is_stored(
    store: BaseStore, tmp_path: Path
) -> None:
    lines: list[bytes] = []
    for bad, _ in BAD_LINES.values():
        lines += [line(), bad]
    path = write(tmp_path / "events.jsonl", *lines, line())
    report = import_path(store, path)
    assert report.lines == 2 * len(BAD_LINES) + 1
    assert report.stored == len(BAD_LINES) + 1
    assert report.refused_count == len(BAD_LINES)
    assert len(store.get_events("s")) == report.stored
    for number, (name, message) in enumerate(zip(BAD_LINES, report.refused, strict=True), start=1):
        expected = f"{path}:{2 * number}: {BAD_LINES[name][1]}"
        assert message.startswith(expected), name
        assert "\n" not in message
        assert len(message) < len(str(path)) + 350, name


def test_what_is_over_the_limits_costs_its_line_only(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "MAX_LINE_BYTES", MAX_PAYLOAD_BYTES + 10_000)
    monkeypatch.setattr(transfer, "_SKIP_BYTES", 1000)
    path = write(
        tmp_path / "events.jsonl",
        line(),
        line(data={"a": "x" * MAX_PAYLOAD_BYTES}),
        b" " * (MAX_PAYLOAD_BYTES + 20_000) + line(),
        line(),
        b'"' + b"y" * (MAX_PAYLOAD_BYTES + 20_000),
        end=b"",
    )
    report = import_path(store, path)
    assert (report.lines, report.stored, report.refused_count) == (5, 2, 3)
    assert report.refused[0].startswith(f"{path}:2: data: 16,777,224 bytes of JSON, at most")
    assert report.refused[1].startswith(f"{path}:3: line: more than 16,787,216 bytes")
    assert report.refused[2].startswith(f"{path}:5: line: more than")


def test_payloads_come_through_exactly(store: BaseStore, tmp_path: Path) -> None:
    texts = {
        b'{"lone": "\\ud800", "low": "x\\udfff"}': {"lone": "\ud800", "low": "x\udfff"},
        b'{"pair": "\\ud83d\\ude00"}': {"pair": "\U0001f600"},
        b'{"nul": "a\\u0000b"}': {"nul": "a\0b"},
        b'{"n": 18446744073709551616, "m": -9223372036854775809}': {"n": 2**64, "m": -(2**63) - 1},
        b'{"text": "12345678901234567890", "f": 1.5, "z": -0.0}': {
            "text": "12345678901234567890",
            "f": 1.5,
            "z": -0.0,
        },
        b'{"big": ' + b"9" * 4000 + b"}": {"big": int("9" * 4000)},
        b'{"twice": 1, "twice": 2}': {"twice": 2},
        b'{"d":' * 500 + b"{}" + b"}" * 500: json.loads('{"d":' * 500 + "{}" + "}" * 500),
    }
    path = write(tmp_path / "events.jsonl", *map(with_data, texts))
    report = import_path(store, path)
    assert report.refused == ()
    found = [stored.data for stored in store.get_events("s")]
    assert found == list(texts.values())
    assert repr(found) == repr(list(texts.values()))  # ints as ints, the sign of -0.0


def test_empty_lines_bom_crlf_and_a_missing_last_newline_are_tolerated(
    store: BaseStore, tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n\r\n  \n\n" + line() + b"\n" + line())
    report = import_path(store, path)
    assert (report.files, report.lines, report.stored, report.refused) == (1, 3, 3, ())


def test_an_empty_file_and_an_empty_directory_import_nothing(
    store: BaseStore, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty").mkdir()
    assert import_path(store, tmp_path / "empty.jsonl").files == 1
    report = import_path(store, tmp_path / "empty")
    assert (report.files, report.lines, report.stored) == (0, 0, 0)


def test_a_missing_file_raises(store: BaseStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        import_path(store, tmp_path / "missing.jsonl")


def test_importing_again_stores_nothing_and_counts_what_was_there(
    store: BaseStore, tmp_path: Path
) -> None:
    repeated = line()
    path = write(tmp_path / "events.jsonl", repeated, line(), repeated)
    first, second = import_path(store, path), import_path(store, path)
    assert (first.stored, first.already_there) == (2, 1)
    assert (second.stored, second.already_there) == (0, 3)


def test_equal_times_keep_the_order_of_the_file_over_batches(
    store: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_BATCH_EVENTS", 7)
    path = write(tmp_path / "events.jsonl", *(line(data={"n": n}) for n in range(50)))
    import_path(store, path)
    assert [found.data["n"] for found in store.get_events("s")] == list(range(50))


def test_a_stream_is_read_to_its_end(store: BaseStore) -> None:
    seen: list[tuple[int, int | None]] = []
    stream = io.BytesIO(line() + b"\n" + b"nonsense\n" + line())
    report = import_path(store, stream, progress=lambda *done: seen.append(done))
    assert report.stored == 2
    assert report.refused[0].startswith("stream:2: JSON: ")
    assert seen == [(len(stream.getvalue()), None)]


def test_events_of_a_deleted_session_return_only_with_undelete(
    store: BaseStore, tmp_path: Path
) -> None:
    path = write(tmp_path / "events.jsonl", line(), line())
    import_path(store, path)
    store.delete_session("s")
    assert import_path(store, path).already_there == 2
    assert store.get_events("s") == []
    assert import_path(store, path, undelete=True).stored == 2
    assert len(store.get_events("s")) == 2


def file_store(root: Path) -> Path:
    """contextuate's own layout: a session with a child, another with a broken meta.json."""
    parent = session("one", label="First", end_time=T0 + 5, status="completed", is_pinned=True)
    child = session("two", parent_session_id="one", agent_type="nexus")
    for meta in (parent, child):
        directory = root / "sessions" / meta.session_id
        write(directory / "meta.json", json.dumps(meta.to_wire(), indent=2).encode())
        lines = (line(sessionId=meta.session_id, timestamp=T0 + n) for n in range(3))
        write(directory / "events.jsonl", *lines)
    write(root / "sessions" / "three" / "meta.json", b'{"sessionId": "three", "status": "active"}')
    write(root / "sessions" / "three" / "events.jsonl", line(sessionId="three"))
    write(root / "sessions" / "four" / "events.jsonl", line(sessionId="four"))
    write(root / "raw" / "left-over.jsonl", b"not ours")
    return root


def test_a_file_store_is_imported_with_its_sessions(store: BaseStore, tmp_path: Path) -> None:
    report = import_path(store, file_store(tmp_path))
    assert (report.sessions, report.lines, report.stored) == (2, 8, 8)
    bad = tmp_path / "sessions" / "three" / "meta.json"
    assert report.refused == (f"{bad}:1: machineId: missing",)
    one = store.get_session("one")
    assert one is not None
    assert (one.label, one.is_pinned, one.end_time) == ("First", True, T0 + 5)
    assert one.child_session_ids == ("two",)
    assert len(store.get_events("three")) == len(store.get_events("four")) == 1


def test_the_sessions_directory_alone_and_one_session_alone_are_recognised(
    store: BaseStore, tmp_path: Path
) -> None:
    sessions = file_store(tmp_path) / "sessions"
    report = import_path(store, sessions / "two")
    assert (report.sessions, report.lines, report.stored) == (1, 3, 3)
    report = import_path(store, sessions)
    assert (report.sessions, report.lines, report.stored) == (2, 8, 5)


def test_other_directories_give_every_jsonl_file_below_them_in_order(
    store: BaseStore, tmp_path: Path
) -> None:
    for name in ("b/second.jsonl", "a/first.jsonl", "c.jsonl"):
        write(tmp_path / name, line(data={"file": name}))
    write(tmp_path / "notes.txt", b"not read")
    report = import_path(store, tmp_path)
    assert (report.files, report.sessions, report.stored) == (3, 0, 3)
    files = [found.data["file"] for found in store.get_events("s")]
    assert files == ["a/first.jsonl", "b/second.jsonl", "c.jsonl"]


def test_a_file_that_cannot_be_opened_costs_itself_only(store: BaseStore, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", line())
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    report = import_path(store, tmp_path)
    assert report.stored == 1
    assert report.refused == (f"{tmp_path / 'b.jsonl'}: file: No such file or directory",)


def test_a_session_that_cannot_be_looked_into_costs_itself_only(
    store: BaseStore, tmp_path: Path
) -> None:
    root = file_store(tmp_path)
    whole = import_path(store, root)
    store.delete_all_sessions()
    endless = root / "sessions" / "two" / "meta.json"
    endless.unlink()
    endless.symlink_to(endless)
    reasons = {str(endless): "file: Too many levels of symbolic links"}
    if os.geteuid() != 0:  # who may look everywhere
        (root / "sessions" / "four").chmod(0)
        reasons[str(root / "sessions" / "four" / "meta.json")] = "file: Permission denied"
    try:
        report = import_path(store, root, undelete=True)
    finally:
        (root / "sessions" / "four").chmod(0o700)
    told = [f"{path}: {why}" for path, why in sorted(reasons.items())]
    assert list(report.refused[: len(told)]) == told
    assert report.refused_count == whole.refused_count + len(reasons)
    assert report.sessions == 1
    assert len(store.get_events("one")) == 3


def test_a_line_has_room_for_any_payload() -> None:
    """By how much an escape is longer than what counts as a payload's size."""
    empty = len(json_line({"": ""}))
    longest = max(
        (len(json_line({"": chr(code)})) - empty) / (len(exact_json({"": chr(code)})) - empty)
        for code in range(0x11000)
    )
    assert 3 < longest < transfer.MAX_LINE_BYTES / MAX_PAYLOAD_BYTES


def test_the_report_keeps_a_bounded_number_of_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "REFUSALS_SHOWN", 10)
    path = write(tmp_path / "events.jsonl", *[b"bad"] * 1234)
    report = import_path(Recorder(), path)  # type: ignore[arg-type]
    assert len(report.refused) == 10
    assert report.refused_count == report.lines == 1234


def test_memory_stays_bounded_and_batches_are_cut_by_bytes(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("wb") as out:
        for _ in range(40):
            out.write(line(data={"text": "x" * 2**20}) + b"\n")
    store = Recorder()
    tracemalloc.start()
    try:
        report = import_path(store, path)  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.stored == 40
    assert max(store.batches) <= 5
    assert peak < 30 * 2**20


def test_an_error_of_the_store_ends_the_import(tmp_path: Path) -> None:
    class Down(Recorder):
        def save_events(self, events: list[MonitorEvent], **options: Any) -> SaveResult:
            raise StoreUnavailable("down")

    with pytest.raises(StoreUnavailable):
        import_path(Down(), write(tmp_path / "a.jsonl", line()))  # type: ignore[arg-type]


def test_recorded_events_are_all_stored(store: BaseStore) -> None:
    corpus = os.environ.get("CONTEXTUATE_CORPUS")
    if not corpus:
        pytest.skip("CONTEXTUATE_CORPUS names no folder of recorded data")
    pairs = Path(corpus, "emit-event-golden", "pairs.jsonl").read_bytes().splitlines()
    events = [json.loads(pair)["event"] for pair in pairs]
    report = import_path(store, io.BytesIO("\n".join(map(json.dumps, events)).encode()))
    assert (report.stored, report.refused) == (len(events), ())
    assert {found.id: found.to_wire() for found in store.iter_events()} == {
        wanted["id"]: wanted for wanted in events
    }


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@given(_JSON, st.booleans())
def test_json_is_parsed_as_the_standard_library_does(value: Any, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=True)
    if not escaped:
        try:
            raw = json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a lone surrogate, which only an escape can carry
            raw = text.encode()
    else:
        raw = text.encode()
    assert repr(parse_json(raw)) == repr(json.loads(raw))


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    with contextlib.suppress(InvalidRecord):
        assert repr(parse_json(raw)) == repr(json.loads(raw))


def test_ids_are_kept_in_canonical_form(store: BaseStore) -> None:
    event_id = str(uuid.uuid4())
    import_path(store, io.BytesIO(line(id=event_id.upper())))
    found = store.get_event_by_id("s", event_id)
    assert found is not None
    assert found.id == event_id
