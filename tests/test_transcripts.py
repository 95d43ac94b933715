"""Token usage in transcripts: once for each message, whatever else is in the file."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import MessageUsage, transcripts
from contextuate_persist.base import BaseStore
from contextuate_persist.transcripts import read_usage, unix_ms
from tests.builders import session
from tests.test_hooks import corpus

AT = "2026-03-01T10:00:00.250Z"
AT_MS = 1_772_359_200_250


def line(message_id: Any = "msg_1", **usage: Any) -> str:
    counts = {"input_tokens": 3, "output_tokens": 1} | usage
    message = {"id": message_id, "model": "opus", "usage": counts, "content": []}
    return json.dumps({"type": "assistant", "timestamp": AT, "message": message}) + "\n"


def usages(path: Path) -> list[MessageUsage]:
    return read_usage(path).usages


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "main.jsonl"


def test_a_line_that_grows_while_it_is_read_is_read_again_as_a_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = line("msg_1"), line("msg_2")
    path.write_text(first + second[:50])

    class Growing(io.BufferedReader):
        def readline(self, size: int | None = -1, /) -> bytes:
            found = super().readline(size)
            if not found.endswith(b"\n"):
                path.write_text(first + second)
            return found

    def growing(descriptor: int, _: str) -> Growing:
        return Growing(io.FileIO(descriptor))

    with monkeypatch.context() as patch:
        patch.setattr(transcripts, "open", growing, raising=False)
        reading = read_usage(path)
    assert [one.message_id for one in reading.usages] == ["msg_1"]
    assert reading.offset == len(first)
    assert [one.message_id for one in read_usage(path, reading.offset).usages] == ["msg_2"]


def test_a_message_of_several_lines_counts_once_with_its_largest_counts(path: Path) -> None:
    made = {"cache_read_input_tokens": 10, "cache_creation_input_tokens": 20}
    path.write_text(
        line(output_tokens=1, **made) + line("msg_2") + line(output_tokens=9) + line(input_tokens=1)
    )
    reading = read_usage(path)
    assert reading.offset == path.stat().st_size
    assert reading.usages == [
        MessageUsage(
            message_id="msg_1",
            timestamp=AT_MS,
            model="opus",
            input_tokens=3,
            output_tokens=9,
            cache_read=10,
            cache_creation=20,
        ),
        MessageUsage(
            message_id="msg_2", timestamp=AT_MS, model="opus", input_tokens=3, output_tokens=1
        ),
    ]


def test_what_made_the_cache_may_be_told_in_parts_only(path: Path) -> None:
    parts = {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 5, "x": "y"}
    path.write_text(
        line(cache_creation=parts)
        + line("msg_2", cache_creation=parts, cache_creation_input_tokens=9)
        + line("msg_3", cache_creation=5)
    )
    assert [usage.cache_creation for usage in usages(path)] == [9, 9, 0]


def test_reading_goes_on_where_it_was_and_a_torn_line_is_read_again(path: Path) -> None:
    first, second = line("msg_1"), line("msg_2", output_tokens=5)
    path.write_text(first + second[:40])
    reading = read_usage(path)
    assert ([u.message_id for u in reading.usages], reading.offset) == (["msg_1"], len(first))
    path.write_text(first + second[:-1])
    again = read_usage(path, reading.offset)
    # Whole, but perhaps not all that comes: told now, and once more when it has its end.
    assert ([u.message_id for u in again.usages], again.offset) == (["msg_2"], len(first))
    path.write_text(first + second + line("msg_3"))
    last = read_usage(path, again.offset)
    assert [u.message_id for u in last.usages] == ["msg_2", "msg_3"]
    assert read_usage(path, last.offset) == (last.offset, [])


@pytest.mark.parametrize("offset", [10_000, -1])
def test_a_file_that_was_written_anew_is_read_from_its_beginning(path: Path, offset: int) -> None:
    path.write_text(line())
    assert read_usage(path, offset) == read_usage(path)
    assert len(read_usage(path, offset).usages) == 1


def test_whatever_is_no_usage_is_passed_over(path: Path) -> None:
    junk: list[Any] = [
        '// a comment about the "usage" of an "assistant"',
        "",
        '{"type": "assistant", "usage": ',
        '["assistant", "usage"]',
        '"assistant usage"',
        "\x00\x01",
        {"type": "user", "message": {"role": "assistant", "id": "m", "usage": {"input_tokens": 1}}},
        {"type": "progress", "data": {"type": "assistant", "message": {"id": "m", "usage": {}}}},
        {"type": "assistant", "message": "usage"},
        {"type": "assistant", "message": {"id": "m", "usage": [1]}},
        {"type": "assistant", "message": {"usage": {"input_tokens": 1}}},
        {"type": "assistant", "message": {"id": 5, "usage": {"input_tokens": 1}}},
        {"type": "assistant", "message": {"id": "\ud800", "usage": {"input_tokens": 1}}},
        {"type": "assistant", "message": {"id": "made up", "usage": {"input_tokens": 0}}},
        {"type": "assistant", "message": {"id": "m", "usage": {"input_tokens": "1"}}},
    ]
    lines = [one if isinstance(one, str) else json.dumps(one) for one in junk]
    path.write_bytes("\n".join(lines).encode() + b'\n\xff\xfe"usage" "assistant"\n')
    with path.open("a") as file:
        file.write(line("msg_1", input_tokens=True, output_tokens=7, cache_read_input_tokens=-1))
    (only,) = usages(path)
    assert only.counts == (0, 7, 0, 0)


def test_a_line_without_a_time_has_that_of_the_one_before(path: Path) -> None:
    untimed = json.loads(line("msg_2"))
    del untimed["timestamp"]
    path.write_text(json.dumps(untimed) + "\n" + line("msg_1") + json.dumps(untimed) + "\n")
    os.utime(path, (1_700_000_000, 1_700_000_000))
    assert [usage.timestamp for usage in usages(path)] == [1_700_000_000_000, AT_MS]
    os.utime(path, (0, 0))
    assert usages(path)[0].timestamp == 10**11


def test_a_model_that_no_session_could_have_is_left_out(path: Path) -> None:
    for model in ("x" * 256, None, 5):
        entry = json.loads(line())
        entry["message"]["model"] = model
        path.write_text(json.dumps(entry) + "\n")
        assert usages(path)[0].model is None


def test_lines_that_are_too_long_are_passed_over_in_little_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcripts, "MAX_LINE_BYTES", 10_000)
    with path.open("w") as file:
        file.write(line("msg_1"))
        file.write('{"type": "assistant", "usage": "' + "x" * 30_000_000 + '"}\n')
        file.write("y" * 10_000 + "\n")
        file.write(line("msg_2"))
    whole = path.stat().st_size
    with path.open("a") as file:
        file.write("z" * 2_000_000)
    tracemalloc.start()
    reading = read_usage(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [usage.message_id for usage in reading.usages] == ["msg_1", "msg_2"]
    assert reading.offset == whole
    assert peak < 5_000_000


@pytest.mark.parametrize("name", ["missing", "missing/below", "\0", "\ud800", "x" * 300, "."])
def test_a_file_that_is_not_there_has_no_usage(tmp_path: Path, name: str) -> None:
    assert read_usage(f"{tmp_path}/{name}", 7) == (0, [])
    assert read_usage("") == (0, [])


def test_pipes_devices_and_loops_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", tmp_path / "loop", "/dev/zero"):
        assert read_usage(path) == (0, [])


def test_a_file_that_may_not_be_read_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        read_usage(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AT, AT_MS),
        ("2026-03-01T12:00:00.250+02:00", AT_MS),
        ("2026-03-01T10:00:00.250123Z", AT_MS),
        ("2026-03-01T10:00:00Z", AT_MS - 250),
        ("2026-03-01T10:00:00.250", None),
        ("2026-02-30T10:00:00Z", None),
        ("0001-01-01T00:00:00+23:59", None),
        ("1970-01-01T00:00:00Z", None),
        ("x", None),
        (None, None),
        (AT_MS, None),
    ],
)
def test_times_are_read_as_javascript_writes_them(text: object, expected: int | None) -> None:
    assert unix_ms(text) == expected


def test_a_resumed_session_repeats_messages_which_count_once(store: BaseStore, path: Path) -> None:
    path.write_text(line("msg_1", output_tokens=5) + line("msg_2", output_tokens=7))
    resumed = path.with_name("resumed.jsonl")
    resumed.write_text(path.read_text() + line("msg_3", output_tokens=11))
    store.save_sessions([session("first"), session("second")])
    assert store.save_usage("first", usages(path)) == 2
    assert store.save_usage("second", usages(resumed)) == 1
    found = {one.session_id: one.token_usage.total_output for one in store.get_sessions()}
    assert found == {"first": 12, "second": 11}


def test_recorded_transcripts_tell_each_message_once() -> None:
    files = sorted(corpus().glob("*/test/fixtures/transcripts/*.jsonl"))
    assert files
    for path in files:
        lines = [json.loads(one) for one in path.read_text(encoding="utf-8").splitlines()]
        messages = [one["message"] for one in lines if one.get("type") == "assistant"]
        read: dict[str, int] = {}
        for one in messages:
            used = one["usage"]["cache_read_input_tokens"]
            read[one["id"]] = max(used, read.get(one["id"], 0))
        reading = read_usage(path)
        assert sum(usage.cache_read for usage in reading.usages) == sum(read.values())
        half = read_usage(path, 0)
        assert read_usage(path, half.offset) == (half.offset, [])
