"""The terminal: what may be written to it, in which encoding, and how wide it is.

Data goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from contextuate_persist import display
from contextuate_persist.doctor import Finding, Level

_LOGIN = re.compile("://[^/@:]*:")
_PASSWORD = re.compile("(password=)[^&]+", re.IGNORECASE)  # sslpassword, too
# The longest path and what is wrong with it; but an argument may have megabytes.
_LONGEST = 5000


def show(lines: Iterable[str]) -> None:
    """Print lines of text; what the output's encoding lacks is replaced or escaped."""
    for line in fitted(lines):
        sys.stdout.write(line + "\n")


def fitted(lines: Iterable[str]) -> Iterator[str]:
    """Lines of text as standard output can show them."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        display.SIGNS.encode(encoding)
        signs: dict[int, int] = {}
    except UnicodeEncodeError:
        signs = display.PLAIN_SIGNS
    for line in lines:
        text = line.translate(signs)
        yield text.encode(encoding, "backslashreplace").decode(encoding)


def paint(text: str, colour: str) -> str:
    """The text in a colour, where standard output is a terminal that wants it."""
    wanted = "NO_COLOR" not in os.environ and os.environ.get("TERM") not in (None, "", "dumb")
    if sys.stdout is None or not sys.stdout.isatty() or not wanted:
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


_COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1}


def show_json(records: Iterable[Mapping[str, Any]]) -> None:
    """Print records as lines of JSON."""
    for record in records:
        sys.stdout.write(display.json_line(record) + "\n")


def show_findings(findings: Sequence[Finding], *, json: bool) -> int:
    """Print what was found; the exit status: 0, 3 with warnings, 1 with a problem."""
    if json:
        show_json(dataclasses.asdict(finding) for finding in findings)
    else:
        colours = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}
        show(
            f"{paint(one.level.value.ljust(8), colours[one.level])} {one.check:12} "
            f"{display.safe(str(one))}"
            for one in findings
        )
    levels = {finding.level for finding in findings}
    return 1 if Level.PROBLEM in levels else 3 if Level.WARNING in levels else 0


def tell(message: str) -> None:
    """Print one line on standard error, without passwords and without control characters."""
    line = without_passwords(message)
    if len(line) > _LONGEST:
        line = line[:_LONGEST] + "..."
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    text = display.safe(line).encode(encoding, "backslashreplace").decode(encoding)
    if sys.stderr is not None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def ask(question: str) -> bool:
    """Ask on standard error, and take y or yes for yes; what was shown before is seen before."""
    sys.stdout.flush()
    tell(question)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def without_passwords(text: str) -> str:
    """The text, without what stands between a URL's user and the last @, or after password=.

    A password that is not quoted may hold blanks, so rather too much is left out than too little.
    """
    # One expression for both ends would look for the @ again after each "://".
    login, _, rest = text.rpartition("@")
    if found := _LOGIN.search(login):
        text = f"{login[: found.end()]}***@{rest}"
    return _PASSWORD.sub(r"\1***", text)


def abandon_output() -> None:
    """If nobody takes the output any more, let the interpreter's flush at its end go nowhere."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def terminal_width() -> int:
    """The terminal's columns, COLUMNS, or 120 where the output is no terminal."""
    return shutil.get_terminal_size((120, 24)).columns


class ProgressBar:
    """A line on standard error that is drawn over again; nothing if that is no terminal."""

    def __init__(self, name: str, *, percent: bool = False) -> None:
        self._percent = percent  # what is counted are no bytes
        self._name = display.cut(display.safe(name), 40)
        self._active = sys.stderr is not None and sys.stderr.isatty()
        self._drawn = 0.0
        self._width = 0

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if not self._active or now - self._drawn < 0.1:
            return
        self._drawn = now
        bar = f"{done / 1e6:.1f} MB"
        if total:
            filled = min(done, total) * 30 // total
            amount = (
                f"{done * 100 // total} %" if self._percent else f"{bar} of {total / 1e6:.1f} MB"
            )
            bar = f"[{'#' * filled}{'.' * (30 - filled)}] {amount}"
        self._draw(f"{self._name} {bar}")

    def clear(self) -> None:
        if self._width:
            self._draw("")
            sys.stderr.write("\r")
            self._width = 0

    def _draw(self, text: str) -> None:
        text = display.cut(text, terminal_width() - 1).translate(display.PLAIN_SIGNS)
        encoding = sys.stderr.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)
