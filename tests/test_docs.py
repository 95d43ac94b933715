"""The documents are true: their code runs, and no public name and no command is left out."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import contextuate_persist
from contextuate_persist.arguments import make_parser
from contextuate_persist.base import BaseStore
from contextuate_persist.config import ENVIRONMENT_URL
from contextuate_persist.privacy import REMAINS
from contextuate_persist.writer import ENVIRONMENT_SPOOL
from tests.conftest import Database

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "schemas" / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def public_names() -> Iterator[str]:
    """What `__all__` names, and the methods and properties of its classes."""
    for name in contextuate_persist.__all__:
        yield name
        value = getattr(contextuate_persist, name)
        for member, what in vars(value).items() if isinstance(value, type) else ():
            is_code = isinstance(what, FunctionType | classmethod | property)
            if is_code and not member.startswith("_"):
                yield f"{name}.{member}"


@pytest.fixture
def configured(
    database: Database, store: BaseStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> BaseStore:
    """A store that open_store() without arguments opens, too."""
    monkeypatch.setenv(ENVIRONMENT_URL, database.url)
    monkeypatch.setenv(ENVIRONMENT_SPOOL, str(tmp_path / "spool"))
    return store


def test_the_code_in_the_readme_runs(
    configured: BaseStore, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        assert len(block.splitlines()) <= 20
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == "['Fix it'] {'tool_call': 1}\n"


def test_the_code_in_the_guide_runs(
    configured: BaseStore, capsys: pytest.CaptureFixture[str]
) -> None:
    [block] = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(block, "schemas/README.md", "exec"), {})
    assert capsys.readouterr().out == "{'command': 'deploy TOKEN=[removed]'}\n1\n"


def test_the_guides_redaction_finds_secrets_as_they_are_written() -> None:
    [block] = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block.partition("\n\ndef redact")[0], "schemas/README.md", "exec"), names)
    for text, cleaned in {
        "GITHUB_TOKEN=ghp_abc make": "GITHUB_TOKEN=[removed] make",
        "AWS_SECRET_ACCESS_KEY=xyz": "AWS_SECRET_ACCESS_KEY=[removed]",
        "OPENAI_API_KEY: sk-1": "OPENAI_API_KEY: [removed]",
        '{"password": "hun ter2"}': '{"password": [removed]}',
        '{\\"password\\": \\"hunter2\\"}': '{\\"password\\": [removed]}',
        "Authorization: Bearer abc": "Authorization: Bearer [removed]",
        "token: Bearer abc": "token: Bearer [removed]",
        "mysql://u:pw@h/db": "mysql://u:[removed]@h/db",
        "x --db-password 'a b' -v": "x --db-password [removed] -v",
        "http://localhost:8080/path": "http://localhost:8080/path",
        "the token expired": "the token expired",
    }.items():
        assert names["cleaned"](text) == cleaned
    nested = {"api_key": "sk-1", "n": [{"refreshToken": ["x", 1], "y": "z"}]}
    removed = {"api_key": "[removed]", "n": [{"refreshToken": ["[removed]", 1], "y": "z"}]}
    assert names["cleaned"](nested) == removed


def test_the_guide_names_all_that_may_remain_after_forgetting() -> None:
    chapter = " ".join(GUIDE.partition("## Privacy")[2].partition("\n## ")[0].split())
    words = {
        "backups": "Backups, exports and archives",
        "server": "`VACUUM`",
        "otherMachines": "other machines",
        "agents": "transcripts",
        "quotes": "other payloads quote",
        "original": "moved them aside",
        "ids": "until the first pruning after 90 days",
    }
    assert words.keys() == REMAINS.keys()
    assert [word for word in words.values() if word not in chapter] == []


def test_the_quickstart_runs_twice(
    configured: BaseStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
        out = capsys.readouterr().out
        assert "stored 3 events; again: 0" in out
        assert "Bash: {'command': 'make test'}" in out
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) < 60


def test_the_demo_runs_and_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o711)  # as root the server's account has to get in
        environment = {name: v for name, v in os.environ.items() if name != ENVIRONMENT_URL}
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "demo.py")],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**environment, "TMPDIR": place},
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert list(Path(place).iterdir()) == []
    assert "└── session-child-002  error" in done.stdout
    assert "stop the server" in done.stdout


def test_every_command_is_in_the_readme_and_has_help() -> None:
    assert len(dict(commands())) >= 9
    for name, parser in commands():
        assert re.search(rf"`(contextuate-persist )?{name}\b", README), name
        assert parser.description, name
        for action in parser._actions:
            documented = action.help or action.choices or action.metavar == "SESSION"
            assert documented, f"{name} {action.option_strings}"


def test_every_public_name_is_in_the_readme() -> None:
    for name in contextuate_persist.__all__:
        assert f"`{name}`" in README, name
        assert getattr(contextuate_persist, name).__doc__, name


def test_the_reference_documents_all_that_is_public_and_nothing_else(tmp_path: Path) -> None:
    recipe = re.search(r"\$\(python\) (-W error -m pdoc .*)", MAKEFILE)
    assert recipe
    command = shlex.split(recipe[1])
    command[command.index("site")] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert pages.keys() == {"index.html", "contextuate_persist.html"}
    # A name's entry reaches to the next name.
    _, *parts = re.split(r'<(?:section|div) id="([\w.]+)"', pages["contextuate_persist.html"])
    entries = dict(zip(parts[::2], parts[1::2], strict=True))
    assert {name for name in entries if "." not in name} == set(contextuate_persist.__all__)
    public = set(public_names())
    assert {"PersistenceStore.save_event", "AsyncStore.save_event", "Cursor.parse"} <= public
    documented = {
        name for name, entry in entries.items() if re.search(r'"docstring">\s*<p>\S', entry)
    }
    assert public - documented == set()


def test_every_link_leads_somewhere() -> None:
    for name in ("README.md", "CHANGELOG.md", "schemas/README.md"):
        document = ROOT / name
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            found = target.startswith("https://") or (document.parent / target).exists()
            assert found, target


def test_the_readme_is_one_that_people_read() -> None:
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
