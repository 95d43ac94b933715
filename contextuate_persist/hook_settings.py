"""The hook command in Claude Code's settings: put it in, take it out, leave all else as it is.

Claude Code ignores a whole settings file for one mistake in it, so nothing is written that was not
read as valid, and the file is replaced in one step, with a copy of the old one beside it.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import os
import re
import secrets
import shlex
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from contextuate_persist.config import home_path
from contextuate_persist.errors import ConfigurationError
from contextuate_persist.hooks import HOOKS, STREAMING

#: Hooks that every Claude Code of 2026 knows.
USUAL_HOOKS = (
    "SessionStart",
    "SessionEnd",
    "UserPromptSubmit",
    "PreToolUse",
    "PostToolUse",
    "PostToolUseFailure",
    "PermissionRequest",
    "Notification",
    "Stop",
    "SubagentStart",
    "SubagentStop",
    "PreCompact",
)
# A hook of this name does not watch a worktree being made: it has to make it.
_REPLACING = frozenset({"WorktreeCreate"})
#: Those of the newest version that can be watched. An older version that does not know one of these
#: names ignores the whole settings file.
ALL_HOOKS = tuple(name for name in HOOKS if name not in STREAMING | _REPLACING)

_TIMEOUT = 10  # seconds, after which Claude Code goes on without the command
_SCRIPT = "emit_event.py"
#: A comment to the shell, by which our entries are known.
_MARK = "# contextuate-persist"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a settings file would hold; nothing is written before `apply`."""

    path: Path
    before: bytes | None
    after: str

    @property
    def diff(self) -> list[str]:
        """What changes, as a unified diff of the hooks; empty if nothing does.

        Not of the whole file: beside the hooks may stand keys, and this is for terminals and logs.
        """
        lines = difflib.unified_diff(
            _hooks_of(self.path, self.before),
            _hooks_of(self.path, self.after.encode("utf-8")),
            str(self.path) if self.before is not None else "/dev/null",
            str(self.path),
            lineterm="",
        )
        return list(lines)

    def apply(self) -> Path | None:
        """Replace the file, keeping its mode; returns the copy of the old one, if there was one.

        Raises ConfigurationError if somebody else has changed the file meanwhile.
        """
        # A link to where somebody keeps their settings stays one.
        target = Path(os.path.realpath(self.path))
        if _read(target) != self.before:
            raise ConfigurationError(f"{self.path}: changed meanwhile; run the command again")
        status = target.stat() if self.before is not None else None
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        backup = None
        if self.before is not None:
            moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
            backup = target.with_name(f"{target.name}.{moment}-{secrets.token_hex(2)}.bak")
            _write(backup, self.before, status)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            _write(temporary, self.after.encode("utf-8"), status)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return backup


def default_settings() -> Path:
    """The user's own settings, for all projects; CLAUDE_CONFIG_DIR moves them."""
    directory = os.environ.get("CLAUDE_CONFIG_DIR") or "~/.claude"
    return home_path(directory) / "settings.json"


def default_command() -> str:
    """The command line that runs the hook command by this Python.

    Isolated and without site-packages it starts in a moment. Status 2 of a Python that does not
    find the script would make Claude Code stop every use of a tool: hence the `|| true`.
    """
    package = Path(__file__).resolve().parent
    places = (package / _SCRIPT, package.parent / "examples" / _SCRIPT)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigurationError(
            f"{_SCRIPT} is missing from this installation: install contextuate-persist again"
        )
    # Not what it is a link to: that has a version in its path, and goes with the next upgrade.
    return f"{shlex.join([sys.executable, '-I', '-S', str(found)])} || true"


def snippet(command: str, names: tuple[str, ...] = USUAL_HOOKS) -> dict[str, Any]:
    """The settings that have these hooks run the command."""
    return {"hooks": {name: [_group(command)] for name in names}}


def install(path: Path, command: str, names: tuple[str, ...] = USUAL_HOOKS) -> Change:
    """Have these hooks run the command, and those that ran another one for us.

    Raises ConfigurationError for a file that is not what Claude Code would read.
    """
    before = _read(path)
    settings = _parse(path, before)
    hooks = settings.setdefault("hooks", {})
    for handler in _ours(hooks.values()):
        handler["command"] = _marked(command)
    for name in names:
        groups = hooks.setdefault(name, [])
        if not _ours([groups]):
            groups.append(_group(command))
    return _change(path, before, settings)


def uninstall(path: Path) -> Change:
    """Take out what `install` put in, whatever the command was.

    Raises ConfigurationError for a file that is not what Claude Code would read.
    """
    before = _read(path)
    settings = _parse(path, before)
    hooks = settings.get("hooks", {})
    for name, groups in list(hooks.items()):
        if not _ours([groups]):
            continue
        for group in groups:
            group["hooks"] = [one for one in group["hooks"] if not _is_ours(one)]
        hooks[name] = [group for group in groups if group["hooks"]]
        if not hooks[name]:
            del hooks[name]
            if not hooks:
                del settings["hooks"]
    return _change(path, before, settings)


def installed(path: Path) -> dict[str, str]:
    """The hooks that run a command for us, and the command."""
    hooks = _parse(path, _read(path)).get("hooks", {})
    return {
        name: handler["command"] for name, groups in hooks.items() for handler in _ours([groups])
    }


def missing(command: str) -> list[str]:
    """The program and script that a command names by their paths, as far as they are not there."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        named = [*itertools.takewhile(lambda word: word.startswith(("/", "-")), lexer)]
    except ValueError:  # the shell's affair, as variables are
        return []
    places = [word for word in named if word.startswith("/") and "$" not in word]
    return [place for place in places if not os.path.exists(place)]


def _marked(command: str) -> str:
    return command if command.endswith(_MARK) else f"{command} {_MARK}"


def _group(command: str) -> dict[str, Any]:
    handler = {"type": "command", "command": _marked(command), "timeout": _TIMEOUT}
    return {"hooks": [handler]}


def _ours(hooks: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        handler
        for groups in hooks
        for group in groups
        for handler in group["hooks"]
        if _is_ours(handler)
    ]


def _is_ours(handler: dict[str, Any]) -> bool:
    return str(handler.get("command", "")).endswith(_MARK)


# --- The file -------------------------------------------------------------------------------------


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(path: Path, content: bytes, like: os.stat_result | None) -> None:
    """A new file, on the disk, with the mode of the old one, and its owner where that can be.

    Nothing of it is left if that fails.
    """
    mode = stat.S_IMODE(like.st_mode) if like else 0o600
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            if like:
                with contextlib.suppress(OSError):
                    os.fchown(descriptor, like.st_uid, like.st_gid)
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _parse(path: Path, content: bytes | None) -> dict[str, Any]:
    """The settings; raises ConfigurationError, in one line, for what Claude Code would not read."""
    if content is None or not content.strip():
        return {}
    try:
        settings = json.loads(
            content.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not valid JSON, so left alone: {error}") from None
    _check(path, settings)
    assert isinstance(settings, dict)  # noqa: S101  (checked in the line above)
    return settings


def _hooks_of(path: Path, content: bytes | None) -> list[str]:
    """The lines of a file that has the hooks of these settings and nothing else."""
    hooks = {name: value for name, value in _parse(path, content).items() if name == "hooks"}
    return _text(hooks, 2).splitlines() if hooks else []


def _check(path: Path, settings: object) -> None:
    def require(kind: type, value: object, place: str) -> Any:
        if not isinstance(value, kind):
            needed = "an object" if kind is dict else "a list"
            raise ConfigurationError(f"{path}: {place} is not {needed}, so left alone")
        return value

    hooks = require(dict, settings, "the whole").get("hooks", {})
    for name, groups in require(dict, hooks, "hooks").items():
        for number, group in enumerate(require(list, groups, f"hooks.{name}")):
            place = f"hooks.{name}[{number}]"
            handlers = require(dict, group, place).get("hooks")
            for handler in require(list, handlers, f"{place}.hooks"):
                require(dict, handler, f"an entry of {place}.hooks")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {json.dumps(twice)} stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _change(path: Path, before: bytes | None, settings: dict[str, Any]) -> Change:
    text = "" if before is None else before.decode("utf-8")
    if settings == _parse(path, before):
        return Change(path=path, before=before, after=text)
    found = re.search(r"^[{\[]\r?\n([ \t]+)", text.lstrip())
    indent = found[1] if found else 2
    try:
        after = _text(settings, indent)
    except ValueError as error:  # a number past all floats
        raise ConfigurationError(f"{path}: cannot be written as it is: {error}") from None
    return Change(path=path, before=before, after=after)


def _text(settings: dict[str, Any], indent: int | str) -> str:
    text = json.dumps(settings, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which stood there as an escape
        text = json.dumps(settings, indent=indent, allow_nan=False) + "\n"
    return text
