"""The hook command as Claude Code runs it: one process for each payload, and never in its way."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shlex
import stat
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import hook_settings
from contextuate_persist.hooks import Capture, payload_of
from tests.test_hooks import payload

SCRIPT = Path(__file__).parent.parent / "examples" / "emit_event.py"
COMMAND = [os.path.realpath(sys.executable), "-I", "-S", str(SCRIPT)]

Emit = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    return tmp_path / "made" / "by" / "the" / "inbox"


@pytest.fixture
def emit(inbox: Path, tmp_path: Path) -> Emit:
    """Run the command; it has to be silent and content, whatever happened."""

    def run(given: bytes, *, silent: bool = True, **environment: str) -> Any:
        done = subprocess.run(
            COMMAND,
            input=given,
            capture_output=True,
            timeout=60,
            check=False,
            env={"HOME": str(tmp_path), "CONTEXTUATE_INBOX": str(inbox), **environment},
        )
        assert done.returncode == 0
        assert done.stdout == b""
        assert not silent or done.stderr == b""
        return done

    return run


def test_the_command_is_for_any_python_from_3_8_on() -> None:
    """What `python3` is on a machine that has another one for the rest."""
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    evaluated = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg)]
    evaluated += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert len(evaluated) > 8
    assert not [one for one in evaluated if isinstance(one, ast.BinOp | ast.Subscript)]
    assert "strict" not in {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}


def captures(inbox: Path) -> list[Capture]:
    return [Capture.parse(path.read_bytes()) for path in sorted(inbox.iterdir())]


def test_a_payload_becomes_one_file_that_only_its_owner_reads(emit: Emit, inbox: Path) -> None:
    before = time.time_ns()
    umask = os.umask(0)  # the worst one
    try:
        emit(json.dumps(payload("Stop")).encode(), HOSTNAME="laptop")
    finally:
        os.umask(umask)
    (path,) = inbox.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(inbox.stat().st_mode) == 0o700
    name = re.fullmatch(r"(\d{20})-([0-9a-f]{32})\.json", path.name)
    assert name
    assert before <= int(name[1]) <= time.time_ns()
    assert uuid.UUID(name[2]).version == 4
    wire = json.loads(path.read_bytes())
    assert list(wire) == ["id", "capturedAt", "machineId", "parentSession", "payload"]
    assert uuid.UUID(wire["id"]).version == 7
    assert uuid.UUID(wire["id"]).variant == uuid.RFC_4122
    assert uuid.UUID(wire["id"]).int >> 80 == wire["capturedAt"] == int(name[1]) // 1_000_000
    capture = Capture.parse(path.read_bytes())
    assert (capture.machine_id, capture.parent_session_id) == ("laptop", None)
    assert payload_of(capture.to_event()) == payload("Stop")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"session_id": "s"}\n',
        "\u20ac".encode() * 100_000,  # longer than a pipe holds, in characters of three bytes
        b"\xff\x00\xed\xa0\x80 no text",
        bytes(range(256)) * 40_000,
    ],
    ids=["small", "euros", "bytes", "megabytes"],
)
def test_any_bytes_arrive_as_they_were(emit: Emit, inbox: Path, raw: bytes) -> None:
    emit(raw)
    (capture,) = captures(inbox)
    assert capture.payload == raw


def test_the_environment_may_hold_anything(emit: Emit, inbox: Path) -> None:
    parent = 'p"\\\n\u00e9\U0001f600'
    emit(b"{}", HOSTNAME="m\u00e9\U0001f600", CONTEXTUATE_PARENT_SESSION=parent)
    emit(b"{}", HOSTNAME="\udcff", CONTEXTUATE_PARENT_SESSION="")
    (path, other) = sorted(inbox.iterdir())
    assert json.loads(path.read_bytes())["parentSession"] == parent
    assert Capture.parse(path.read_bytes()).machine_id == "m\u00e9\U0001f600"
    # With `-I -S` Python may still decode it; either way no event is lost for it.
    assert Capture.parse(other.read_bytes()).parent_session_id is None
    emit(b"{}")
    assert captures(inbox)[-1].machine_id == os.uname().nodename


@pytest.mark.parametrize("raw", [b"", b" \n\t"])
def test_without_a_payload_nothing_is_left(emit: Emit, inbox: Path, raw: bytes) -> None:
    emit(raw)
    assert not inbox.exists()


def test_the_inbox_is_in_the_home_directory(emit: Emit, tmp_path: Path) -> None:
    emit(b"{}", CONTEXTUATE_INBOX="")
    assert len(captures(tmp_path / ".contextuate" / "monitor" / "inbox")) == 1
    emit(b"{}", CONTEXTUATE_INBOX="~/here")
    assert len(captures(tmp_path / "here")) == 1


def test_what_goes_wrong_is_silent_unless_asked_for(emit: Emit, inbox: Path) -> None:
    inbox.parent.mkdir(parents=True)
    inbox.write_text("in the way")
    emit(b"{}")
    done = emit(b"{}", silent=False, CONTEXTUATE_DEBUG="1")
    assert done.stderr.startswith(b"emit_event: FileExistsError")
    assert done.stderr.count(b"\n") == 1
    emit(b"{}", CONTEXTUATE_INBOX="/proc/none")
    assert [path.name for path in inbox.parent.iterdir()] == ["inbox"]


def test_a_full_disk_leaves_no_half_of_a_file(inbox: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run(
        ["sh", "-c", f"trap '' XFSZ; exec {shlex.join(COMMAND)}"],
        input=b"x" * 100_000,
        capture_output=True,
        timeout=60,
        check=False,
        env={"CONTEXTUATE_INBOX": str(inbox), "CONTEXTUATE_DEBUG": "1"},
        preexec_fn=limit,
    )
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"File too large" in done.stderr
    assert list(inbox.iterdir()) == []


def test_a_closed_input_and_a_terminal_are_no_payload(inbox: Path) -> None:
    environment = {"CONTEXTUATE_INBOX": str(inbox)}
    closed = ["sh", "-c", f"exec {shlex.join(COMMAND)} <&- >&- 2>&-"]
    for more in ({}, {"CONTEXTUATE_DEBUG": "1"}):
        done = subprocess.run(closed, env=environment | more, timeout=60, check=False)
        assert done.returncode == 0
    master, slave = os.openpty()
    try:
        ended = subprocess.run(COMMAND, stdin=slave, env=environment, timeout=60, check=False)
    finally:
        os.close(master)
        os.close(slave)
    assert ended.returncode == 0
    assert not inbox.exists()


def test_many_at_once_leave_a_file_each(emit: Emit, inbox: Path) -> None:
    sent = [json.dumps({"session_id": "s", "n": n}).encode() for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(emit, sent))
    found = captures(inbox)
    assert sorted(capture.payload for capture in found) == sorted(sent)
    assert len({capture.id for capture in found}) == len(sent)


def test_the_command_in_the_settings_never_blocks_a_tool(tmp_path: Path, inbox: Path) -> None:
    command = hook_settings.default_command()
    gone = command.replace("emit_event.py", "gone.py")
    assert gone != command
    for line in (command, gone, "/no/such/python || true # x"):
        done = subprocess.run(
            ["sh", "-c", line],
            input=b"{}",
            capture_output=True,
            timeout=60,
            check=False,
            env={"CONTEXTUATE_INBOX": str(inbox)},
        )
        assert (done.returncode, done.stdout) == (0, b"")
    assert len(captures(inbox)) == 1


def test_it_takes_less_than_50_milliseconds_of_the_processor(emit: Emit, inbox: Path) -> None:
    """The fastest of some: what else the machine does is not the command's."""

    def used() -> float:
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return of_children.ru_utime + of_children.ru_stime

    def seconds() -> float:
        before = used()
        emit(json.dumps(payload("PreToolUse", tool_input="x" * 10_000)).encode())
        return used() - before

    taken = [seconds() for _ in range(15)]
    assert min(taken) < 0.05, statistics.median(taken)


def test_it_imports_little_and_nothing_that_is_not_pythons_own() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported == {"binascii", "os", "time"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
