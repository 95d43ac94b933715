"""The commands for years of running: `prune`, `archive` and `maintain`."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable

from contextuate_persist import archive as archives
from contextuate_persist import display, encryption, retention
from contextuate_persist.base import BaseStore
from contextuate_persist.config import ENVIRONMENT_ADMINISTRATOR
from contextuate_persist.console import ProgressBar, show, show_findings, show_json, tell
from contextuate_persist.retention import PruneReport, RetentionPolicy

OpenStore = Callable[[argparse.Namespace], BaseStore]


def policy_of(args: argparse.Namespace) -> RetentionPolicy:
    """The policy of a command line."""
    return RetentionPolicy(
        max_age_days=args.days,
        max_sessions=args.sessions,
        max_bytes=args.bytes,
        spared_days=args.spare,
    )


def prune(args: argparse.Namespace, open_given: OpenStore) -> int:
    """Delete what is due, or say what would be."""
    policy = policy_of(args)
    bar = ProgressBar("prune", percent=True)
    with open_given(args) as store:
        try:
            report = retention.prune(
                store, policy, dry_run=args.dry_run, rest=args.rest, progress=bar
            )
        finally:
            bar.clear()
    _show(args, report, "deleted")
    return 0


def archive(args: argparse.Namespace, open_given: OpenStore) -> int:
    """Write what is due to files and delete it, or say what would be; 1 if some cannot go."""
    policy = policy_of(args)
    keys = encryption.recipients(args.recipient) if args.recipient else ()
    bar = ProgressBar("archive", percent=True)
    with open_given(args) as store:
        try:
            report = archives.archive(
                store,
                args.to,
                policy,
                recipients=keys,
                dry_run=args.dry_run,
                rest=args.rest,
                progress=bar,
            )
        finally:
            bar.clear()
    for problem in report.problems:
        tell(problem)
    files = [str(path) for path in report.files]
    _show(args, report, "archived and deleted", files, report.unfit)
    return int(report.unfit > 0)


def maintain(args: argparse.Namespace, open_given: OpenStore) -> int:
    """Do what is to be done each day, week, month or quarter."""
    from contextuate_persist import maintenance  # noqa: PLC0415  (with all that backups need)

    tasks = maintenance.Tasks(
        backups=args.backups,
        identity=args.identity,
        administrator=os.environ.get(ENVIRONMENT_ADMINISTRATOR),
        archives=args.archive_to,
        recipients=encryption.recipients(args.recipient) if args.recipient else (),
        policy=policy_of(args),
        benchmarks=args.benchmarks,
    )
    with contextlib.closing(open_given(args)) as store:
        return show_findings(maintenance.maintain(store, args.period, tasks), json=args.json)


def _show(
    args: argparse.Namespace,
    report: PruneReport,
    done: str,
    files: list[str] | None = None,
    unfit: int = 0,
) -> None:
    if args.json:
        more = {} if files is None else {"unfit": unfit, "files": files}
        show_json([{**wire(report), **more, "dryRun": args.dry_run}])
        return
    verb = f"would be {done}" if args.dry_run else done
    show([f"{words(report)} {verb}{spared(report, unfit)}; {report.kept:,} sessions are kept"])
    show(display.safe(file) for file in files or ())


def wire(report: PruneReport) -> dict[str, int]:
    """A report as a record of JSON."""
    return {
        "sessions": report.sessions,
        "events": report.events,
        "bytes": report.size,
        "spared": report.spared,
        "kept": report.kept,
    }


def words(report: PruneReport) -> str:
    """How much it was, in words."""
    size = f"{report.size / 1e6:,.1f} MB"
    return f"{report.sessions:,} sessions with {report.events:,} events ({size})"


def spared(report: PruneReport, unfit: int) -> str:
    """What else there is to say."""
    text = retention.left_words(report.spared - unfit)
    return text + (f", {unfit:,} cannot be archived and stay" if unfit else "")
