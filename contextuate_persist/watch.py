"""What `contextuate-persist watch` shows: sessions as a tree and the newest events, ever anew."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator

from contextuate_persist import display, trees
from contextuate_persist.base import BaseStore
from contextuate_persist.console import fitted, terminal_width
from contextuate_persist.errors import PersistenceError
from contextuate_persist.model import SessionMeta, SessionNode

#: The newest sessions by start, of which as many are shown as fit.
_SESSIONS = 200
_ERRORS = ("error", "tool_error")


def watch(store: BaseStore, interval: float) -> None:
    """Draw what the store holds every `interval` seconds, until q or Ctrl-C is pressed.

    Where the output is no terminal, one view is printed. A database that is away meanwhile is told
    of, and looked for again.
    """
    if not sys.stdout.isatty():
        width, height = terminal_width(), 40
        sys.stdout.write("".join(f"{line}\n" for line in fitted(view(store, width, height))))
        return
    with _full_screen():
        while True:
            width, height = _size()
            try:
                lines = [*view(store, width, height)]
            except PersistenceError as error:
                lines = [display.cut(display.safe(f"trying again: {error}"), width)]
            # Drawn over, not cleared first: over a slow line that would flicker.
            body = "\x1b[K\n".join(fitted(lines[:height]))
            sys.stdout.write(f"\x1b[H{body}\x1b[K\x1b[J")
            sys.stdout.flush()
            if _quits(interval):
                return


def view(store: BaseStore, width: int, height: int) -> Iterator[str]:
    """The lines of one view, which fill a terminal of this size at most."""
    sessions = store.get_sessions(limit=_SESSIONS)
    events = store.get_all_recent_events(height)
    nodes = _newest_trees(sessions)[: max(1, (height - 4) // 2)]
    now = time.strftime("%H:%M:%SZ", time.gmtime())
    running = sum(session.status == "active" for session in sessions)
    title = f"{now}  {running} of the newest {len(sessions)} sessions run; q quits"
    yield display.cut(title, width)
    for node, line in zip(nodes, display.tree_lines(nodes, width), strict=True):
        note = _note(store, node.session)
        yield f"{display.cut(line, max(10, width - len(note) - 2))}  {note}"[:width]
    yield ""
    table = display.event_table(events, width)
    for line, _ in zip(table, range(height - len(nodes) - 2), strict=False):
        yield line


def _newest_trees(sessions: list[SessionMeta]) -> list[SessionNode]:
    """The forest, the tree whose session started last first."""
    found: list[list[SessionNode]] = []
    for node in trees.forest(sessions):
        if node.depth == 0:
            found.append([])
        found[-1].append(node)
    found.sort(key=lambda tree: max(node.session.start_time for node in tree), reverse=True)
    return [node for tree in found for node in tree]


def _note(store: BaseStore, session: SessionMeta) -> str:
    """The last event of a session and how long ago it was, and how many of its events are errors.

    In ASCII and short, so that it always fits behind the session.
    """
    counts = store.event_counts(session.session_id)
    errors = sum(counts.get(name, 0) for name in _ERRORS)
    last = store.get_events(session.session_id, limit=1)
    parts = [f"{errors} errors"] if errors else []
    if last:
        age = max(0, int(time.time() - last[0].timestamp / 1000))
        parts.append(f"{ascii(last[0].event_type)[1:-1][:20]} {_ago(age)} ago")
    return ", ".join(parts)


def _ago(seconds: int) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


# --- The terminal ---------------------------------------------------------------------------------


def _size() -> tuple[int, int]:
    """Columns and lines; a serial line that nobody has told its size has none."""
    columns, lines = os.get_terminal_size(sys.stdout.fileno())
    return columns or 80, lines or 24


@contextlib.contextmanager
def _full_screen() -> Iterator[None]:
    """The terminal's other screen, without cursor and echo; as it was before in the end.

    Also while Ctrl-Z has stopped the program, and after SIGTERM.
    """
    before = None
    if sys.stdin is not None and sys.stdin.isatty():
        before = termios.tcgetattr(sys.stdin)

    # Not by sys.stdout: a signal may come while that is writing, and it cannot be entered again.
    def enter() -> None:
        if before is not None:
            tty.setcbreak(sys.stdin)
        os.write(sys.stdout.fileno(), b"\x1b[?1049h\x1b[?25l")

    def leave() -> None:
        os.write(sys.stdout.fileno(), b"\x1b[?25h\x1b[?1049l")
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def stop(*_: object) -> None:
        leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # and goes on here
        signal.signal(signal.SIGTSTP, stop)
        enter()

    def end(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    handlers = {signal.SIGTERM: end, signal.SIGTSTP: stop}
    found = {number: signal.getsignal(number) for number in handlers}
    try:
        enter()
        for number, handler in handlers.items():
            if found[number] is not signal.SIG_IGN:  # a shell without job control ignores Ctrl-Z
                signal.signal(number, handler)
        yield
    finally:
        for number, former in found.items():
            signal.signal(number, former)
        sys.stdout.flush()
        leave()


def _quits(seconds: float) -> bool:
    """Wait; whether somebody pressed q meanwhile."""
    until = time.monotonic() + seconds
    left = seconds
    while True:
        if sys.stdin is None or not sys.stdin.isatty():
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0]:
            pressed = os.read(sys.stdin.fileno(), 100)
            if not pressed or b"q" in pressed.lower():  # nothing: the terminal is gone
                return True
        left = until - time.monotonic()
        if left <= 0:
            return False
