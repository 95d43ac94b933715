"""The guide in schemas/: its blocks of code, and what its readers' machine has, to run them on.

A comment above a block, which no reader sees, says what is special about it: `only: mysql`,
`as: administrator`, `not run: WHY`, `tested: FILE`. A `text` block is the output of the blocks
right above it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: In the order in which their blocks build on each other.
DOCUMENTS = ("INDEX.md", "QUICK-START.md", "COMPARISON.md", "README.md")

_BLOCK = re.compile(
    r"^(?:<!-- (?P<notes>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_NOTES = {"only", "as", "not run", "tested"}
#: Chapters whose blocks are run by the tests of what they are about.
_TESTED = {
    "Privacy": "tests/test_docs.py",
    "Backup and restore": "tests/test_recovery.py",
    "Any moment: PostgreSQL": "tests/test_recovery.py",
    "Any moment: MySQL": "tests/test_recovery.py",
}


@dataclass(frozen=True)
class Block:
    """A block of code: what it is in, what the comment above it says, and where it is."""

    document: str
    line: int
    language: str
    notes: Mapping[str, str]
    text: str
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def runs_on(self, backend: str) -> bool:
        return not {"not run", "tested"} & self.notes.keys() and (
            self.notes.get("only", backend) == backend
        )

    def statements(self) -> list[str]:
        return [part for part in self.text.split(";\n") if part.strip()]


def read(document: str) -> str:
    return (ROOT / "schemas" / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    """The blocks of a document, each with its output."""
    text = read(document)
    found: list[Block] = []
    ended = 0
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        notes = dict(
            note.strip().split(": ", 1) for note in (match["notes"] or "").split(";") if note
        )
        assert notes.keys() <= _NOTES, f"{document}:{line}"
        heading = re.findall(r"^#+ (.+)$", text[: match.start()], re.MULTILINE)[-1]
        if heading in _TESTED:
            notes["tested"] = _TESTED[heading]
        if match["language"] == "text":
            assert text[ended : match.start()].strip() == "", f"{document}:{line}: output of what?"
            # Also of the block for the other database, if that is right above.
            for back in range(len(found) - 1, -1, -1):
                found[back] = Block(**{**vars(found[back]), "output": match["text"]})
                if found[back].notes.get("only") is None or back == len(found) - 2:
                    break
        else:
            block = Block(document, line, match["language"], notes, match["text"])
            found.append(block)
        ended = match.end()
    return found


class Shell:
    """A shell that runs blocks one after the other, and keeps what they export."""

    def __init__(self, home: Path, programs: Path, **environment: str) -> None:
        self.home = home
        self._state = home / ".exported"
        self._state.write_text("")
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {
            "HOME": str(home), "PATH": path, "COLUMNS": "100", "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(ROOT), "TMPDIR": str(home), **environment,
        }  # fmt: skip

    def run(self, text: str) -> str:
        """The output of a block; fails if a command of it does."""
        done = subprocess.run(
            ["sh", "-euc", f". {self._state}\n{text}\nexport -p >{self._state}"],
            cwd=self.home,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def without_installing(text: str) -> str:
    """The block without its lines for pip, whose extras there are."""
    kept: list[str] = []
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for line in text.splitlines():
        if found := re.match(r"pip install 'contextuate-persist\[(\w+)\]'$", line):
            assert found[1] in extras, line
        else:
            kept.append(line)
    return "\n".join(kept)


def table(document: str, heading: str) -> list[list[str]]:
    """The rows of the table below a heading, without its head."""
    _, _, after = read(document).partition(f"\n{heading}\n")
    return list(rows(after))


def rows(text: str) -> Iterator[list[str]]:
    """The rows of the first table in a text, without its head."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("|--"):
            break
        assert not line.startswith("#"), "no table below this heading"
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
