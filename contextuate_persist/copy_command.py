"""The command `copy`: a database into another, and what came of it."""

from __future__ import annotations

import argparse

from contextuate_persist.base import BaseStore
from contextuate_persist.console import ProgressBar, show, show_json, tell
from contextuate_persist.copying import CopyReport, copy_store


def run(args: argparse.Namespace, source: BaseStore, target: BaseStore) -> int:
    """Copy, compare and tell; 1 if something is missing in the end."""
    bar = ProgressBar("copy", percent=True)
    with source, target:
        try:
            report = copy_store(source, target, progress=bar)
        finally:
            bar.clear()
    for problem in report.problems:
        tell(problem)
    if (more := report.problem_count - len(report.problems)) > 0:
        tell(f"and {more:,} more")
    if args.json:
        names = (
            "sessions",
            "events",
            "messages",
            "deletions",
            "saved",
            "stored",
            "counted",
            "kept",
        )
        record = {name: getattr(report, name) for name in names}
        show_json([{**record, "problemCount": report.problem_count}])
    else:
        _show(report)
    return int(report.problem_count > 0)


def _show(report: CopyReport) -> None:
    show(
        [
            f"sessions   {report.sessions:,} in the source, {report.saved:,} saved",
            f"events     {report.events:,} in the source, {report.stored:,} stored",
            f"messages   {report.messages:,} in the source, {report.counted:,} counted",
            f"deletions  {report.deletions:,} in the source",
        ]
    )
    if report.kept:
        tell(f"{report.kept:,} sessions that the source has deleted are still in the target")
    if report.problem_count:
        tell("not all is in the target: run it again when nothing writes into the source")
    else:
        tell("compared: all is in the target")
