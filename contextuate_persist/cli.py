"""The command `contextuate-persist`: every command is a few calls of the library.

Exit status: 0; 1 for an error, told in one line; 2 for a wrong command line; 3 if `check` has
warnings and no problem; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from urllib.parse import parse_qs, urlsplit

from contextuate_persist import (
    config,
    copy_command,
    display,
    encryption,
    hook_command,
    privacy,
    queue_commands,
    retention_commands,
)
from contextuate_persist.arguments import ENVIRONMENT_TARGET, PROGRAM, make_parser
from contextuate_persist.base import BaseStore
from contextuate_persist.config import ENVIRONMENT_URL, open_store
from contextuate_persist.console import (
    ProgressBar,
    abandon_output,
    show,
    show_findings,
    show_json,
    tell,
    terminal_width,
    without_passwords,
)
from contextuate_persist.doctor import Level
from contextuate_persist.errors import ConfigurationError, PersistenceError, SessionNotFound
from contextuate_persist.model import MonitorEvent
from contextuate_persist.transfer import ImportReport, import_path
from contextuate_persist.watch import watch

# --- Commands -------------------------------------------------------------------------------------


def _store(args: argparse.Namespace) -> BaseStore:
    _warn_of_password(args)
    return open_store(args.url)


def _warn_of_password(args: argparse.Namespace) -> None:
    _warn_of_url(args.url, ENVIRONMENT_URL)


def _warn_of_url(url: str | None, variable: str) -> None:
    file = "~/.pgpass (or PGPASSFILE)"
    _warn(url, f"put the URL into {variable}, or for PostgreSQL the password into {file}")


def _warn(url: str | None, way_out: str) -> None:
    if url and _has_password(url):
        tell(
            "warning: a password on the command line can be seen by everybody on this machine; "
            f"{way_out}"
        )


def _has_password(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.password or parse_qs(parts.query).get("password"))
    except ValueError:
        return True


@contextmanager
def _owned_store(args: argparse.Namespace) -> Iterator[BaseStore]:
    """A store that is not opened, to change its schema."""
    from contextuate_persist.embedded import EmbeddedPostgreSQL, EmbeddedStore  # noqa: PLC0415

    store = _store(args)
    if isinstance(store, EmbeddedStore):
        # Opening it would apply the schema, and not tell whether it did.
        with EmbeddedPostgreSQL() as server:
            yield open_store(server.url)
    else:
        yield store


def _init(args: argparse.Namespace) -> int:
    with _owned_store(args) as store:
        changed = store.apply_schema()
    if args.json:
        show_json([{"changed": changed}])
    else:
        show(["schema applied" if changed else "the schema is there already: nothing to do"])
    return 0


def _upgrade(args: argparse.Namespace) -> int:
    with _owned_store(args) as store:
        migrations = store.upgrade_schema(dry_run=args.dry_run)
    if args.json:
        show_json(
            {"version": one.version, "name": one.name, "applied": not args.dry_run}
            for one in migrations
        )
    elif migrations:
        done = "to apply" if args.dry_run else "applied"
        show(f"{done}: {one.version:04} {one.name}" for one in migrations)
    else:
        show(["the schema is current: nothing to do"])
    return 0


def _sample(args: argparse.Namespace) -> int:
    with _store(args) as store:
        store.load_sample()
        if args.json:
            return 0
        show(["sample data stored: see `sessions`, `tree` and `events session-root-001`"])
    return 0


def _import(args: argparse.Namespace) -> int:
    failed = False
    keys = encryption.identities(args.identity) if args.identity else ()
    with _store(args) as store:
        for path in args.paths:
            bar = ProgressBar(path)
            try:
                report = import_path(
                    store, path, undelete=args.undelete, identities=keys, progress=bar
                )
            except OSError as error:
                bar.clear()
                error.filename = error.filename or path  # an error of reading names no file
                tell(_message(error))
                failed = True
                continue
            finally:
                bar.clear()
            _show_report(args, path, report)
            failed = failed or report.refused_count > 0 or report.files == 0
    return int(failed)


def _show_report(args: argparse.Namespace, path: str, report: ImportReport) -> None:
    for message in report.refused:
        tell(message)
    if (more := report.refused_count - len(report.refused)) > 0:
        tell(f"{path}: and {more:,} more were refused")
    if report.deleted:
        tell(
            f"{path}: {report.deleted:,} sessions, or their past, stay deleted; "
            "--undelete brings them back"
        )
    if report.files == 0 and not report.refused:
        tell(f"{path}: no session of contextuate and no *.jsonl file is below this directory")
    if args.json:
        names = ("files", "lines", "stored", "sessions")
        record = {name: getattr(report, name) for name in names}
        counts = {
            "alreadyThere": report.already_there,
            "refused": report.refused_count,
            "stayDeleted": report.deleted,
        }
        show_json([{"path": path, **record, **counts}])
    else:
        sessions = f", {report.sessions:,} sessions saved" if report.sessions else ""
        summary = (
            f"{path}: {report.lines:,} events read, {report.stored:,} stored, "
            f"{report.already_there:,} there already{sessions}, {report.refused_count:,} refused"
        )
        show([display.safe(summary)])


def _sessions(args: argparse.Namespace) -> int:
    with _store(args) as store:
        sessions = store.get_sessions(
            status=args.status,
            machine_id=args.machine,
            parent_session_id=args.parent,
            hidden=args.hidden,
            limit=args.limit,
        )
    if args.json:
        show_json(session.to_wire() for session in sessions)
    else:
        show(display.session_table(sessions, terminal_width()))
    if 0 < args.limit == len(sessions):
        tell(f"the newest {args.limit}; --limit asks for more")
    return 0


def _tree(args: argparse.Namespace) -> int:
    with _store(args) as store:
        nodes = store.session_tree(args.session)
    if args.json:
        show_json({**node.session.to_wire(), "depth": node.depth} for node in nodes)
    else:
        show(display.tree_lines(nodes, terminal_width()))
    return 0


def _events(args: argparse.Namespace) -> int:
    with _store(args) as store:
        events = store.get_events(
            args.session, limit=args.limit, before=args.before, after=args.after
        )
        if not events and store.get_session(args.session) is None:
            raise SessionNotFound(args.session)
    _show_events(args, events, with_session=False)
    if 0 < args.limit == len(events):
        onward = args.after is not None and args.before is None
        # With "=", since a negative one looks like an option.
        bound = f"--after={events[-1].cursor}" if onward else f"--before={events[0].cursor}"
        tell(f"{args.limit} events; {bound} goes on")
    return 0


def _find(args: argparse.Namespace) -> int:
    with _store(args) as store:
        events = store.find_events(
            session_id=args.session,
            machine_id=args.machine,
            parent_session_id=args.parent,
            event_type=args.type,
            hook_type=args.hook,
            tool_name=args.tool,
            tool_use_id=args.tool_use_id,
            contains=args.contains,
            before=args.before,
            after=args.after,
            newest_first=not args.oldest_first,
            limit=args.limit,
        )
    _show_events(args, events)
    if 0 < args.limit == len(events):
        bound = "after" if args.oldest_first else "before"
        tell(f"{args.limit} events; --{bound}={events[-1].cursor} goes on")
    return 0


def _recent(args: argparse.Namespace) -> int:
    with _store(args) as store:
        events = store.get_all_recent_events(args.limit)
    _show_events(args, events)
    return 0


def _show_events(
    args: argparse.Namespace, events: list[MonitorEvent], *, with_session: bool = True
) -> None:
    if args.json:
        show_json({**event.to_wire(), "cursor": str(event.cursor)} for event in events)
    else:
        show(display.event_table(events, terminal_width(), with_session=with_session))


def _status(args: argparse.Namespace) -> int:
    with _store(args) as store:
        health = dataclasses.asdict(store.health())
    if args.json:
        show_json([{_camel(name): value for name, value in health.items()}])
    else:
        named = {name.replace("_", " "): value for name, value in health.items()}
        show(f"{name:22} {display.safe(str(value))}" for name, value in named.items())
    return 0


def _check(args: argparse.Namespace) -> int:
    return show_findings(_store(args).check(), json=args.json)


def _partition(args: argparse.Namespace) -> int:
    bar = ProgressBar("partition", percent=True)
    with _owned_store(args) as store:
        if args.list:
            return _list_partitions(args, store)
        if args.discard_old:
            changed = store.discard_unpartitioned()
            if args.json:
                show_json([{"changed": changed}])
            else:
                show(["events_unpartitioned dropped" if changed else "there is no old table"])
            return 0
        try:
            done = store.partition_events(args.by, ahead=args.ahead, progress=bar)
        finally:
            bar.clear()
        found = [one for one in store.check() if one.check == "partitions"]
    for one in found:
        if one.level is not Level.OK:
            tell(f"warning: {one}")
    if args.json:
        show_json([{_camel(name): value for name, value in dataclasses.asdict(done).items()}])
        return 0
    waited = f"writers waited for {done.longest_wait_ms:,.0f} ms at most"
    if done.converted:
        show([f"events is partitioned by {done.by}, into {len(done.added)}: {waited}"])
        tell(
            "the old table stays aside as events_unpartitioned, without a use: "
            "`partition --discard-old` drops it"
        )
    elif done.added:
        show([f"events is partitioned by {done.by} already; added {', '.join(done.added)}"])
    else:
        show([f"events is partitioned by {done.by} already: nothing to do"])
    return 0


def _list_partitions(args: argparse.Namespace, store: BaseStore) -> int:
    found = store.partitions()
    if args.json:
        show_json(dataclasses.asdict(partition) for partition in found)
    else:
        show(display.partition_table(found, terminal_width()))
    return 0


def _setup(args: argparse.Namespace) -> int:
    # Who uses the library daily never needs it.
    from contextuate_persist import setup  # noqa: PLC0415

    # The variables of the database are the application's: this URL is read from none.
    _warn(
        args.url,
        "put the password into PGPASSWORD or ~/.pgpass, or for MySQL into MYSQL_PWD or ~/.my.cnf",
    )
    return setup.run(args)


def _bench(args: argparse.Namespace) -> int:
    # It imports what no other command needs.
    from contextuate_persist.bench.run import run  # noqa: PLC0415

    url = args.url or os.environ.get(ENVIRONMENT_URL)
    if not url:
        raise ConfigurationError(f"bench: no server is named: give --url or {ENVIRONMENT_URL}")
    _warn_of_password(args)
    table = run(
        url, events=args.events, full=args.full, json=args.output, curves=args.curves, tell=tell
    )
    show(table.split("\n"))
    return 0


def _copy(args: argparse.Namespace) -> int:
    target = args.target or os.environ.get(ENVIRONMENT_TARGET)
    if not target:
        raise ConfigurationError(f"copy: no target is named: give --to or {ENVIRONMENT_TARGET}")
    args.url = args.source or args.url
    _warn_of_password(args)
    _warn_of_url(args.target, ENVIRONMENT_TARGET)
    # Counting all events takes one statement.
    opened = (open_store(url, statement_timeout=600.0) for url in (args.url, target))
    return copy_command.run(args, *opened)


def _watch(args: argparse.Namespace) -> int:
    with _store(args) as store:
        watch(store, args.interval)
    return 0


def _spool(args: argparse.Namespace) -> int:
    return queue_commands.spool(args, _store)


def _dead(args: argparse.Namespace) -> int:
    return queue_commands.dead(args, _store)


def _forget(args: argparse.Namespace) -> int:
    return privacy.run(args, _store)


def _backup(args: argparse.Namespace) -> int:
    from contextuate_persist import backup_command  # noqa: PLC0415  (rarely needed)

    return backup_command.run_backup(args, _store)


def _restore(args: argparse.Namespace) -> int:
    from contextuate_persist import backup_command  # noqa: PLC0415

    return backup_command.run_restore(args, _owned_store)


def _prune(args: argparse.Namespace) -> int:
    return retention_commands.prune(args, _store)


def _archive(args: argparse.Namespace) -> int:
    return retention_commands.archive(args, _store)


def _maintain(args: argparse.Namespace) -> int:
    return retention_commands.maintain(args, _store)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "init": _init,
    "upgrade": _upgrade,
    "sample": _sample,
    "import": _import,
    "prune": _prune,
    "archive": _archive,
    "maintain": _maintain,
    "sessions": _sessions,
    "tree": _tree,
    "events": _events,
    "find": _find,
    "recent": _recent,
    "watch": _watch,
    "status": _status,
    "copy": _copy,
    "check": _check,
    "partition": _partition,
    "setup": _setup,
    "spool": _spool,
    "dead": _dead,
    "forget": _forget,
    "backup": _backup,
    "restore": _restore,
    "hook": hook_command.run,
    "bench": _bench,
}

# --- The program ----------------------------------------------------------------------------------


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).split("\n")
        return "\n".join(display.safe(without_passwords(line)) for line in lines)


def _configure_logging(verbose: bool) -> None:
    """Errors are told once, in one line; with -v, whatever the library and its drivers log."""
    handler: logging.Handler = logging.NullHandler()
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(_SafeFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        logging.getLogger("contextuate_persist").setLevel(logging.DEBUG)
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(handler)


class _Teller(logging.Handler):
    """Tells what is logged, and nothing twice."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._told:
            self._told.add(message)
            tell(f"warning: {message}")


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Tell who runs a command of the files with secrets that others can read.

    Whatever else the library warns of, the command's own words are about.
    """
    teller = _Teller()
    loggers = [logging.getLogger(module.__name__) for module in (config, encryption)]
    for logger in loggers:
        logger.addHandler(teller)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(teller)


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{PROGRAM}: error: {text or type(error).__name__}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's; returns the exit status."""
    args = make_parser().parse_args(argv)
    _configure_logging(args.verbose)
    if sys.stdout is None:  # closed by the caller: as good as /dev/null
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        with nullcontext() if args.verbose else _warnings_told():
            status = _COMMANDS[args.command](args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # its reader, `head` perhaps, has seen enough
        abandon_output()
        return 128 + signal.SIGPIPE
    except (PersistenceError, OSError) as error:
        if args.verbose:
            for line in traceback.format_exc().splitlines():
                tell(line)
        tell(_message(error))
        abandon_output()
        return 1
    else:
        return status
