"""The wheel by itself, on the oldest and the newest Python to be had."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import contextuate_persist
from tests.conftest import Database

ROOT = Path(__file__).parents[1]
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")


def run(*command: str | Path, **environment: str) -> str:
    """Run a command outside the checkout; its output."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd="/",
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


def works(python: str) -> bool:
    """Whether an interpreter is there, and not only a version manager's word for it."""
    found = shutil.which(python)
    done = found and subprocess.run([found, "-c", "import venv"], check=False, capture_output=True)
    return bool(done and done.returncode == 0)


@pytest.mark.soak
def test_the_wheel_runs_the_quickstart_on_the_oldest_and_newest_python(
    database: Database, tmp_path: Path
) -> None:
    there = [python for python in PYTHONS if works(python)] or [sys.executable]
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT)
    [wheel] = tmp_path.glob("*.whl")
    for python in dict.fromkeys((there[0], there[-1])):
        place = tmp_path / python
        run(python, "-m", "venv", place)
        run(place / "bin/pip", "install", "-q", f"contextuate-persist[binary] @ {wheel.as_uri()}")
        command = place / "bin/contextuate-persist"
        assert run(command, "--version").split()[-1] == contextuate_persist.__version__
        url = {"CONTEXTUATE_DATABASE_URL": database.url}
        assert "stored 3 events" in run(
            place / "bin/python", ROOT / "examples/quickstart.py", **url
        )
        assert "quickstart" in run(command, "tree", **url)
        settings = place / "settings.json"
        run(command, "hook", "install", "--yes", "--settings", settings)
        line = json.loads(settings.read_text())["hooks"]["Stop"][0]["hooks"][0]["command"]
        assert Path(shlex.split(line)[3]).is_file()


# A python3 that tells a version, notes what it is told, and becomes its own virtual environment.
PYTHON = """#!/bin/sh
echo "$*" >>"$PLACE/calls"
case "$*" in
*'*sys.version_info'*) cat "$PLACE/version" ;;
*'import pip'*) [ "$0" != .venv/bin/python ] || cmp -s "$PLACE/version" .venv/version ;;
*'-m venv'*) rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python &&
    cp "$PLACE/version" .venv/ ;;
esac
"""


def test_the_environment_is_made_once_for_each_version_of_python(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in (".ci/venv", "pyproject.toml"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)

    def make() -> list[str]:
        (tmp_path / "calls").write_text("")
        environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "PLACE": str(tmp_path)}
        command = ["./venv", "test"]  # from its own directory: it finds the checkout itself
        subprocess.run(command, cwd=checkout / ".ci", env=environment, check=True, timeout=60)
        calls = (tmp_path / "calls").read_text().splitlines()
        return [word for call in calls for word in ("-m venv", "--group test") if word in call]

    for version in ("3.13", "3.14"):  # of the system's, by an upgrade
        (tmp_path / "version").write_text(version)
        assert make() == ["-m venv", "--group test"]
        assert make() == []
