"""`contextuate-persist hook`: show what would change in Claude Code's settings, ask, change it."""

from __future__ import annotations

import argparse
import sys

from contextuate_persist import display, hook_settings
from contextuate_persist.console import ask, show, show_json, tell
from contextuate_persist.errors import ConfigurationError
from contextuate_persist.hook_settings import ALL_HOOKS, USUAL_HOOKS, Change


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    path = args.settings or hook_settings.default_settings()
    if args.action == "show":
        return _show(args, hook_settings.installed(path))
    if args.action == "install":
        command = args.command_line or hook_settings.default_command()
        change = hook_settings.install(path, command, ALL_HOOKS if args.all else USUAL_HOOKS)
    else:
        change = hook_settings.uninstall(path)
    return _apply(args, change)


def _show(args: argparse.Namespace, installed: dict[str, str]) -> int:
    names = [*ALL_HOOKS, *(name for name in installed if name not in ALL_HOOKS)]
    if args.json:
        show_json({"hook": name, "command": installed.get(name)} for name in names)
    else:
        show(f"{display.safe(name):22} {display.safe(installed.get(name, '-'))}" for name in names)
    # The agent does not tell: a hook that fails is not to be in its way.
    gone = {place for command in installed.values() for place in hook_settings.missing(command)}
    for place in sorted(gone):
        tell(f"{place} does not exist, but hooks run it: `contextuate-persist hook install` again")
    return 0


def _apply(args: argparse.Namespace, change: Change) -> int:
    backup = None
    if change.diff:
        if not args.json:
            show(map(display.safe, change.diff))
        if not args.yes and not _agreed(args, change):
            raise ConfigurationError(f"{change.path}: nothing was changed")
        backup = change.apply()
    if args.json:
        names = {"settings": str(change.path), "backup": str(backup) if backup else None}
        show_json([{**names, "changed": bool(change.diff)}])
    elif not change.diff:
        show([display.safe(f"{change.path}: nothing to do")])
    else:
        copy = f"; the old one is {backup}" if backup else ""
        show([display.safe(f"{change.path}: changed{copy}")])
    return 0


def _agreed(args: argparse.Namespace, change: Change) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigurationError(f"{change.path}: nothing was changed: give --yes to change it")
    if args.json:  # standard output is for the record alone
        for line in change.diff:
            tell(line)
    return ask(f"Change {change.path}? [y/N]")
