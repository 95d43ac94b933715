"""The command line of `contextuate-persist`: its commands, their options and what these take."""

from __future__ import annotations

import argparse
import re
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NoReturn

from contextuate_persist import __version__, tls
from contextuate_persist.config import (
    ENVIRONMENT_ADMINISTRATOR,
    ENVIRONMENT_URL,
    parse_size,
)
from contextuate_persist.console import tell
from contextuate_persist.errors import InvalidRecord
from contextuate_persist.model import Cursor, SessionStatus, shown
from contextuate_persist.partitions import AHEAD
from contextuate_persist.retention import REST
from contextuate_persist.transfer import parse_json

PROGRAM = "contextuate-persist"
#: Where `copy` copies to.
ENVIRONMENT_TARGET = "CONTEXTUATE_TARGET_URL"
#: What `setup` sets up, in the words of contextuate's own script and a few more.
TARGETS = tuple(
    f"{docker}{name}"
    for docker in ("", "docker-")
    for name in ("mysql", "postgresql", "postgres", "both")
)

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

# An adopted event may have nearly any time; but who writes 2026-1 or 12-24 means a date.
_CURSOR = re.compile("(-[0-9]+|0|[0-9]{5,})-[0-9]+")


def _time(text: str) -> int | Cursor:
    """A bound: Unix milliseconds, ISO 8601, or a cursor."""
    try:
        if text.isascii() and text.isdigit():
            return int(text)
        if _CURSOR.fullmatch(text):
            return Cursor.parse(text)
        # Python 3.10 does not know the Z.
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return (moment - _EPOCH) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is neither milliseconds nor ISO 8601 (2026-01-31T12:00Z) nor a cursor"
        ) from None


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a count")
    return int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text.encode("utf-8", "surrogatepass"))
    except InvalidRecord as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            'a JSON object is needed, such as \'{"toolName": "Bash"}\''
        )
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As usual, but a URL among the arguments does not show its password."""
        self.print_usage(sys.stderr)
        tell(f"{self.prog}: error: {message}")
        sys.exit(2)


def _global_options(default: Any) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--url",
        default=default,
        help=f"the database, postgresql://... or mysql://... (environment: {ENVIRONMENT_URL}; "
        "else that of the configuration file, else a private PostgreSQL)",
    )
    options.add_argument(
        "--json",
        action="store_true",
        default=default or False,
        help="print JSON lines, in contextuate's own form, instead of tables",
    )
    options.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=default or False,
        help="log what happens, and show where an error came from",
    )
    return options


def make_parser() -> argparse.ArgumentParser:
    """The command line: one subparser for each command."""
    # A subparser's default would overwrite what stands before the command.
    suppressed = _global_options(argparse.SUPPRESS)
    parser: argparse.ArgumentParser = _Parser(
        prog=PROGRAM,
        description="Look into and fill a store of agent sessions and events.",
        epilog="Times are shown in UTC, and taken as UTC unless they name an offset.",
        parents=[_global_options(None)],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands: Any = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text, parents=[suppressed], allow_abbrev=False, **options
        )
        return added

    command("init", "create the schema in an empty database, as its owner")
    upgrade = command("upgrade", "bring an older schema up to date, as the database's owner")
    upgrade.add_argument("--dry-run", action="store_true", help="say what would be done, only")
    command("sample", "store a few sessions and events to try things out")
    _add_import(command("import", "store events from files; bad lines are reported"))
    _add_retention(command("prune", "delete old sessions, whole trees, in small steps"))
    _add_archive(
        command(
            "archive",
            "write old sessions to files, verify these, and then delete them",
            epilog="Exit status: 0, or 1 if some cannot be archived: these are named, and stay.",
        )
    )
    _add_maintain(
        command(
            "maintain",
            "do what is to be done each day, week, month or quarter, and say what is left to you",
            epilog="Exit status: 0 if all is well, 3 with warnings, 1 with a problem.",
        )
    )
    _add_sessions(command("sessions", "list sessions, newest start first"))
    tree = command("tree", "draw sessions below the sessions that started them")
    tree.add_argument("session", nargs="?", metavar="SESSION", help="only this one and below")
    _add_events(command("events", "show the newest events of a session, in order"))
    _add_find(command("find", "find events, newest first"))
    recent = command("recent", "show the newest events of all sessions, newest first")
    recent.add_argument("--limit", metavar="N", type=_limit, default=20, help="how many (20)")
    watch = command("watch", "sessions as a tree and the newest events, drawn again and again")
    watch.add_argument(
        "--interval", metavar="S", type=_seconds, default=1.0, help="seconds between views (1)"
    )
    command("status", "ask the database how it is")
    copy = command(
        "copy",
        "copy a database into another, of the same kind or not; run again, it goes on",
        epilog="Exit status: 0 if all of the source is in the target, 1 if not.",
    )
    copy.add_argument(
        "--from",
        dest="source",
        metavar="URL",
        help="the database to read (without it the one that all commands use)",
    )
    copy.add_argument(
        "--to",
        dest="target",
        metavar="URL",
        help=f"the one to add it to, whose schema is there (environment: {ENVIRONMENT_TARGET})",
    )
    command(
        "check",
        "look for what is wrong with a database: schema, privileges, TLS, settings, condition",
        epilog="Exit status: 0 if all is well, 3 with warnings, 1 with a problem.",
    )
    _add_setup(
        command(
            "setup",
            "make the database, its schema and its accounts, as the server's administrator",
            epilog=_SETUP_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_partition(
        command(
            "partition",
            "make the table of events one with partitions, as its owner, while writers go on",
        )
    )
    _add_spool(command("spool", "what waits on this machine for the database: see it, store it"))
    _add_dead(command("dead", "what was set aside since no database takes it: see it, try again"))
    _add_forget(
        command(
            "forget",
            "remove everything about a session, a machine or a directory, here and in the database",
            epilog=_FORGET_EPILOG,
        )
    )
    _add_backup(command("backup", "write everything into one file, while writers go on"))
    _add_restore(command("restore", "load a backup into an empty database, as its owner"))
    _add_hook(command("hook", "have Claude Code tell what it does: a command in its settings"))
    _add_bench(command("bench", "measure a server, in a schema or database of its own there"))
    return parser


def _add_partition(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by",
        choices=list(AHEAD),
        help="how long a partition is (month); on a partitioned database, what it is already",
    )
    coming = ", ".join(f"{number} for {unit}" for unit, number in AHEAD.items())
    parser.add_argument(
        "--ahead", metavar="N", type=_limit, help=f"how many coming ones to have ({coming})"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the partitions, only")
    what.add_argument(
        "--discard-old",
        action="store_true",
        help="drop the old table, if every event of it is in the partitions",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number of seconds")
    return seconds


def _directory(text: str) -> Path:
    # An empty variable of a shell's; to Path it is the directory where one happens to be.
    if not text:
        raise argparse.ArgumentTypeError("no directory is named")
    return Path(text)


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory",
        metavar="DIR",
        type=_directory,
        help="the writer's spool (environment: CONTEXTUATE_SPOOL; else below ~/.contextuate)",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a number of bytes, such as 500MB or 20GiB"
        ) from None


def _number(text: str, most: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= most:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {what}")
    return number


def _days(text: str) -> float:
    return _number(text, 100_000, "a number of days")


def _times(text: str) -> float:
    return _number(text, 1000, "a number of times from 0 to 1000")


def _add_retention(parser: argparse.ArgumentParser) -> None:
    _add_limits(parser)
    parser.add_argument(
        "--rest",
        metavar="N",
        type=_times,
        default=REST,
        help=f"between steps rest N times as long as one took, a minute at most ({REST:g})",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, only")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--days",
        metavar="N",
        type=_days,
        help="what was active within so many days stays (90, if no other limit is given)",
    )
    parser.add_argument(
        "--sessions", metavar="N", type=_limit, help="keep so many, those that were active last"
    )
    parser.add_argument(
        "--bytes",
        metavar="SIZE",
        type=_size,
        help="keep so much of events, such as 20GB, of those that were active last",
    )
    parser.add_argument(
        "--spare",
        metavar="N",
        type=_days,
        default=1.0,
        help="what was active within so many days stays in any case (1)",
    )


def _add_archive(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        metavar="DIRECTORY",
        type=Path,
        required=True,
        help="where the files go; `import` brings back what is in them",
    )
    _add_recipients(parser)
    _add_retention(parser)


def _add_maintain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "period",
        choices=["daily", "weekly", "monthly", "quarterly"],
        help="daily: connections, slow statements, the newest backup; weekly: ANALYZE, sizes, use "
        "of indexes; monthly: archive, partitions, VACUUM or OPTIMIZE where it helps; quarterly: "
        "restore test, benchmarks, indexes, migrations",
    )
    parser.add_argument(
        "--backups",
        metavar="DIRECTORY",
        type=Path,
        help="where the backups are, to verify the newest, and quarterly to restore it into a "
        f"database of its own (with an administrator's URL in {ENVIRONMENT_ADMINISTRATOR})",
    )
    parser.add_argument(
        "--identity", metavar="FILE", type=Path, help="the secret key of age for encrypted backups"
    )
    parser.add_argument(
        "--archive-to",
        metavar="DIRECTORY",
        type=Path,
        help="archive what is due by the options below; without it nothing is deleted",
    )
    parser.add_argument(
        "--benchmarks",
        metavar="DIRECTORY",
        type=Path,
        help="where `bench --output` has written figures, to compare the newest two",
    )
    _add_recipients(parser)
    _add_limits(parser)


def _add_recipients(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipient",
        metavar="AGE_KEY",
        action="append",
        default=[],
        help="encrypt for this public key of age, or those in this file; several times for several",
    )


def _add_spool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=["status", "replay"],
        help="say what lies there; or store it, while no daemon does",
    )
    _add_directory(parser)
    parser.add_argument(
        "--timeout", metavar="S", type=_seconds, default=600.0, help="for replay, seconds (600)"
    )


def _add_dead(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=["list", "show", "replay", "discard"],
        help="list them; show some whole, as JSON; store them, where the reason is gone; "
        "or remove some for ever",
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="which (replay: all without any)")
    _add_directory(parser)


_FORGET_EPILOG = """\
Pinned sessions go, too. A session takes along those below it in its tree; a machine or directory
its sessions, and what happened there inside others. The report says what may still hold them, such
as backups. Exit status: 0 if nothing is left here, 1 if something could not be looked at or
removed, above all since a daemon works on the spool."""


def _add_forget(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--session", metavar="ID", help="this session and those below it")
    what.add_argument("--machine", metavar="ID", help="what happened on this machine")
    what.add_argument(
        "--directory", metavar="PATH", help="what happened in this directory and below it"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would go, only")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--spool",
        metavar="DIR",
        type=Path,
        help="the writer's spool (environment: CONTEXTUATE_SPOOL; else below ~/.contextuate)",
    )
    parser.add_argument(
        "--inbox",
        metavar="DIR",
        type=Path,
        help="the hooks' inbox (environment: CONTEXTUATE_INBOX; else below ~/.contextuate)",
    )


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--identity", metavar="FILE", type=Path, help="secret keys of age that open the backup"
    )
    parser.add_argument(
        "--passphrase-file",
        metavar="FILE",
        type=Path,
        help="the passphrase of that file, if it has one (else it is asked for)",
    )


def _add_backup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        metavar="FILE",
        type=Path,
        default=Path(),
        help="a new file, or a directory for one named after database and time (here)",
    )
    parser.add_argument(
        "--recipient",
        metavar="KEY",
        action="append",
        default=[],
        help="encrypt for this public key of age (age1...), or a file of them; may be repeated",
    )
    parser.add_argument("--verify", action="store_true", help="read it back when it is made")
    parser.add_argument(
        "--make-key",
        metavar="FILE",
        type=Path,
        help="make no backup but a key pair: the secret key into FILE, the public one shown",
    )
    _add_keys(parser)


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="what `backup` made")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--verify-only", action="store_true", help="read it only; no database")
    how.add_argument(
        "--test",
        action="store_true",
        help="restore into a new database on the server of --url, an administrator's, and drop it",
    )
    _add_keys(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--events",
        metavar="N",
        type=_limit,
        help="how many to store (100,000: a minute or two; the goals have a million)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="instead, a year of 50,000 events a day, by month, kept and pruned: hours, "
        "and 50 to 100 GB of the server's disk, or less with --events",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write all figures as JSON")
    parser.add_argument(
        "--curves", metavar="FILE", type=Path, help="draw growth and latency (needs matplotlib)"
    )


def _add_hook(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=["install", "uninstall", "show"],
        help="change the settings, after showing how, or show which hooks run the command",
    )
    parser.add_argument(
        "--settings",
        metavar="FILE",
        type=Path,
        help="Claude Code's settings (~/.claude/settings.json)",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="all hooks that can be watched; a Claude Code that is too old to know one of them "
        "ignores the whole file",
    )
    parser.add_argument(
        "--command",
        dest="command_line",
        metavar="COMMAND",
        help="run this instead of the command that is part of this installation",
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")


_SETUP_EPILOG = """\
The server is that of MYSQL_HOST, MYSQL_PORT and MYSQL_USER, else of MySQL's option files; of
PG_HOST, PG_PORT and PG_USER, else of libpq's PGHOST, PGPORT and PGUSER; or of --url, which also
names the database that PostgreSQL's administrator logs in to (postgres). The administrator's
password comes from there (MYSQL_PWD, PGPASSWORD, ~/.pgpass), or is asked for on a terminal.

Setting up again changes nothing that is there. After --rotate the old passwords stay valid until
--discard-old, and until then --rotate is refused: MySQL's accounts have two passwords meanwhile; in
PostgreSQL the roles NAME and NAME_2 take turns, so the application's URL changes its user, too."""


def _add_setup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        choices=TARGETS,
        metavar="TARGET",
        help="mysql, postgresql (or postgres), both; docker-mysql, docker-postgresql "
        "(docker-postgres), docker-both start a server in Docker first",
    )
    parser.add_argument("--environment", metavar="NAME", help="names that end in _NAME, for each")
    parser.add_argument("--database", metavar="NAME", help="(contextuate_monitor)")
    parser.add_argument("--owner", metavar="NAME", help="role that owns it (contextuate_owner)")
    parser.add_argument("--user", metavar="NAME", help="account to read and write (monitor_user)")
    parser.add_argument("--reader", metavar="NAME", help="account to read (monitor_reader)")
    parser.add_argument(
        "--passwords",
        metavar="FILE",
        type=Path,
        help="append new passwords to this file, which only you can read, and show none",
    )
    parser.add_argument(
        "--sample", action=argparse.BooleanOptionalAction, help="load sample data, or do not ask"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rotate", action="store_true", help="give the accounts new passwords")
    what.add_argument(
        "--discard-old", action="store_true", help="end the passwords before the last --rotate"
    )
    what.add_argument(
        "--reset", action="store_true", help="drop the database first; its name must be typed"
    )
    parser.add_argument(
        "--tls-mode", metavar="MODE", choices=tls.MODES, help=f"one of {', '.join(tls.MODES)}"
    )
    parser.add_argument("--tls-ca", metavar="FILE", help="authority of the server's certificate")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate of the client")
    parser.add_argument("--tls-key", metavar="FILE", help="its key")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="FILE_OR_DIRECTORY",
        help="JSON lines of events (- is standard input), or an archive, or contextuate's file "
        "store, or a directory of *.jsonl and *.jsonl.gz files",
    )
    parser.add_argument(
        "--undelete", action="store_true", help="store events of deleted sessions, too"
    )
    parser.add_argument(
        "--identity", metavar="FILE", type=Path, help="the secret key of age for encrypted files"
    )


def _add_sessions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--status", choices=[status.value for status in SessionStatus])
    parser.add_argument("--machine", metavar="ID", help="of this machine")
    parser.add_argument("--parent", metavar="SESSION", help="children of this session")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--hidden", action="store_true", default=None, help="hidden ones (without either: all)"
    )
    shown.add_argument(
        "--visible", dest="hidden", action="store_false", default=None, help="others only"
    )
    parser.add_argument("--limit", metavar="N", type=_limit, default=100, help="how many (100)")


def _add_bounds(parser: argparse.ArgumentParser, limit: int) -> None:
    form = "TIME"
    parser.add_argument(
        "--limit", metavar="N", type=_limit, default=limit, help=f"how many ({limit})"
    )
    parser.add_argument(
        "--before",
        type=_time,
        metavar=form,
        help="older than this: Unix milliseconds, ISO 8601, or a cursor",
    )
    parser.add_argument("--after", type=_time, metavar=form, help="newer than this")


def _add_events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("session", metavar="SESSION")
    _add_bounds(parser, 100)


def _add_find(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--session", metavar="ID", help="of this session")
    parser.add_argument("--machine", metavar="ID", help="of this machine")
    parser.add_argument("--parent", metavar="ID", help="of sessions with this parent")
    parser.add_argument("--type", metavar="NAME", help="event type, such as tool_call")
    parser.add_argument("--hook", metavar="NAME", help="hook type, such as PreToolUse")
    parser.add_argument("--tool", metavar="NAME", help="tool, such as Bash")
    parser.add_argument("--tool-use-id", metavar="ID", help="one use of a tool")
    parser.add_argument(
        "--contains",
        type=_json_object,
        metavar="JSON",
        help="payload contains this object; give a session, type, hook, tool or --after with it",
    )
    parser.add_argument("--oldest-first", action="store_true", help="the oldest, in their order")
    _add_bounds(parser, 100)
