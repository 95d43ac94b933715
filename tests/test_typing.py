"""The type checkers that users run accept code that uses the library as it is meant to be used."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).with_name("typing_example.py")

# Both read the installed package as a user's project does, with no configuration of ours.
MYPY = ("mypy", "--strict", "--cache-dir=cache", "--python-version={version}", "{file}")
PYRIGHT = ("pyright", "--pythonpath={python}", "--pythonversion={version}", "{file}")


def check(command: tuple[str, ...], file: Path, version: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        part.format(file=file.name, python=sys.executable, version=version) for part in command
    ]
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("version", ["3.10", "3.14"])
@pytest.mark.parametrize("command", [MYPY, PYRIGHT], ids=["mypy", "pyright"])
def test_user_code_passes_strict_checks(
    command: tuple[str, ...], version: str, tmp_path: Path
) -> None:
    done = check(command, Path(shutil.copy(EXAMPLE, tmp_path)), version)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [MYPY, PYRIGHT], ids=["mypy", "pyright"])
def test_the_checks_find_mistakes(command: tuple[str, ...], tmp_path: Path) -> None:
    """Without the package's types, py.typed included, nothing of this would be one."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if "# type: ignore[" in line]
    file = tmp_path / EXAMPLE.name
    file.write_text("\n".join(line.partition("  # type: ")[0] for line in lines), encoding="utf-8")
    done = check(command, file, "3.10")
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(wrong) > 5
    assert [n for n in wrong if f"{file.name}:{n}:" not in done.stdout] == []
