"""`contextuate-persist watch`: what it draws, when it ends, and that nothing stored controls it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from contextuate_persist import watch
from contextuate_persist.base import BaseStore
from contextuate_persist.config import ENVIRONMENT_URL
from tests.builders import T0, event, session
from tests.conftest import Database
from tests.test_cli import HOSTILE, Run, run

__all__ = ["run"]

ROWS, COLUMNS = 20, 100


class Terminal:
    """The program in a terminal of its own."""

    def __init__(
        self, url: str, interval: str = "0.1", size: tuple[int, int] = (ROWS, COLUMNS)
    ) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "contextuate_persist", "watch", "--interval", interval],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, ENVIRONMENT_URL: url, "TERM": "xterm"},
            preexec_fn=self._prepare,  # noqa: PLW1509
        )
        self.slave = slave
        self.drawn = b""

    @staticmethod
    def _prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setpgrp()  # who has no job control above is not stopped by SIGTSTP

    def read(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([self.master], [], [], left)[0]:
                self.drawn += os.read(self.master, 65536)

    def wait_for(self, pattern: bytes, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        self.drawn = b""
        while not re.search(pattern, self.drawn, re.DOTALL):
            assert time.monotonic() < until, self.drawn[-2000:]
            assert self.process.poll() is None, self.drawn[-2000:]
            self.read(0.1)

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def ended(self) -> int:
        until = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < until
            self.read(0.05)
        self.read(0.2)
        assert self.drawn.endswith(b"\x1b[?25h\x1b[?1049l")
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for descriptor in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def terminal(database: Database) -> Iterator[Terminal]:
    opened = Terminal(database.url)
    yield opened
    opened.close()


def test_the_view_follows_what_happens_until_q_is_pressed(
    store: BaseStore, terminal: Terminal
) -> None:
    terminal.wait_for(rb"0 of the newest 0 sessions run")
    store.save_session(session("root", label="Fix the total"))
    store.save_session(session("child", parent_session_id="root", start_time=T0 + 1))
    store.save_events([event("child", T0 + 2), event("child", T0 + 3, event_type="tool_error")])
    terminal.wait_for(rb"2 of the newest 2 sessions run")
    terminal.wait_for("root  active  Fix the total.*└── child.*1 errors, tool_error".encode())
    now = time.time_ns() // 1_000_000
    store.save_event(event("root", now, data={"toolName": "Bash", "toolInput": {"command": "ls"}}))
    terminal.wait_for(rb"tool_call \ds ago")
    terminal.wait_for(rb"Bash: ls")
    terminal.press(b"xyz")
    terminal.read(0.3)
    assert terminal.process.poll() is None
    terminal.press(b"q")
    assert terminal.ended() == 0


def test_ctrl_c_leaves_the_terminal_as_it_was(store: BaseStore, terminal: Terminal) -> None:
    terminal.wait_for(rb"q quits")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.ended() == 130


def test_sigterm_leaves_the_terminal_as_it_was(store: BaseStore, terminal: Terminal) -> None:
    terminal.wait_for(rb"q quits")
    terminal.process.terminate()
    assert terminal.ended() == 128 + signal.SIGTERM


def test_while_it_is_stopped_the_terminal_is_as_it_was(
    store: BaseStore, terminal: Terminal
) -> None:
    terminal.wait_for(rb"q quits")
    for _ in range(2):
        terminal.process.send_signal(signal.SIGTSTP)
        until = time.monotonic() + 30
        while not os.WIFSTOPPED(os.waitpid(terminal.process.pid, os.WUNTRACED | os.WNOHANG)[1]):
            assert time.monotonic() < until
            terminal.read(0.05)
        terminal.read(0.2)
        assert terminal.drawn.endswith(b"\x1b[?25h\x1b[?1049l")
        assert termios.tcgetattr(terminal.slave) == terminal.before
        terminal.process.send_signal(signal.SIGCONT)
        terminal.wait_for(rb"\x1b\[\?1049h.*q quits")
    terminal.press(b"q")
    assert terminal.ended() == 0


def test_without_a_pause_q_ends_it_too(store: BaseStore, database: Database) -> None:
    with contextlib.closing(Terminal(database.url, "0")) as terminal:
        terminal.wait_for(rb"q quits")
        terminal.press(b"q")
        assert terminal.ended() == 0


def test_a_terminal_of_no_size_gets_a_view_of_the_usual_one(
    store: BaseStore, database: Database
) -> None:
    with contextlib.closing(Terminal(database.url, size=(0, 0))) as terminal:
        terminal.wait_for(rb"q quits")
        terminal.press(b"q")
        assert terminal.ended() == 0


def test_nothing_that_is_stored_controls_the_terminal(store: BaseStore, terminal: Terminal) -> None:
    store.save_session(session("s", label=HOSTILE, agent_type=HOSTILE))
    store.save_event(event("s", event_type="\u202eevil", data={"message": HOSTILE}))
    terminal.wait_for(rb"\\x1b\]0;owned")
    drawn = re.sub(rb"\x1b\[(?:H|K|J|\?1049h|\?25l)", b"", terminal.drawn)
    assert not re.search(rb"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]", drawn)
    assert "\u202e".encode() not in drawn


def test_without_a_terminal_one_view_is_printed(run: Run, store: BaseStore) -> None:
    for n in range(30):
        store.save_event(event(f"s{n}", T0 + n))
    status, out, err = run("watch")
    assert (status, err) == (0, "")
    assert "  30 of the newest 30 sessions run" in out
    assert "s29  active" in out
    assert out.count("\n") <= 40


def test_a_view_fits_any_terminal(store: BaseStore) -> None:
    store.save_sessions(
        session(f"s{n}", start_time=T0 + n, parent_session_id=f"s{n - 1}" if n % 9 else None)
        for n in range(1, 60)
    )
    store.save_events([event(f"s{n}", T0 + n, event_type="error") for n in range(1, 60)])
    for width, height in ((20, 5), (80, 24), (300, 100)):
        lines = list(watch.view(store, width, height))
        assert len(lines) <= height
        assert max(map(len, lines)) <= width


def test_ages_are_short() -> None:
    assert [watch._ago(n) for n in (5, 65, 7300, 90_000)] == ["5s", "1m", "2h", "1d"]
