"""`contextuate-persist backup` and `restore`: make a backup, look at it, load it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from contextuate_persist import display, encryption
from contextuate_persist.backup import backup, restore, restore_test, verify_backup
from contextuate_persist.backup_file import Backup
from contextuate_persist.base import BaseStore
from contextuate_persist.config import ENVIRONMENT_URL
from contextuate_persist.console import ProgressBar, show, show_json, tell
from contextuate_persist.errors import ConfigurationError

OpenStore = Callable[[argparse.Namespace], BaseStore]
OwnedStore = Callable[[argparse.Namespace], AbstractContextManager[BaseStore]]


def run_backup(args: argparse.Namespace, open_given: OpenStore) -> int:
    """Make a backup and say what is in it."""
    if args.make_key is not None:
        if args.recipient:
            raise ConfigurationError("--make-key: makes no backup, and so takes no --recipient")
        public = encryption.new_identity(args.make_key)
        if args.json:
            show_json([{"identity": str(args.make_key), "recipient": public}])
        else:
            show([public])
        return 0
    if args.verify and args.recipient and args.identity is None:
        raise ConfigurationError("--verify: give --identity FILE to read an encrypted backup back")
    bar = ProgressBar("backup")
    try:
        with open_given(args) as store:
            made = backup(
                store,
                args.to,
                recipients=args.recipient,
                progress=lambda done: bar(done, None),
            )
        if args.verify:
            verify_backup(made.path, identity=args.identity, passphrase_file=args.passphrase_file)
    finally:
        bar.clear()
    _show(args, made, "made, read back and found whole" if args.verify else "made")
    return 0


def run_restore(args: argparse.Namespace, owned: OwnedStore) -> int:
    """Load a backup, or only look whether that would work."""
    bar = ProgressBar(args.file)
    size = Path(args.file).stat().st_size

    def progress(done: int) -> None:
        bar(min(done, size), size)

    key = {"identity": args.identity, "passphrase_file": args.passphrase_file}
    try:
        if args.verify_only:
            found = verify_backup(args.file, **key, progress=progress)
            done = "whole, and as it was written"
        elif args.test:
            url = args.url or os.environ.get(ENVIRONMENT_URL)
            if not url:
                raise ConfigurationError(
                    f"--test: no server is named: give --url, or {ENVIRONMENT_URL}"
                )
            found = restore_test(args.file, url, **key, progress=progress)
            done = "restored into a database of its own, compared, and dropped again"
        else:
            with owned(args) as store:
                found = restore(store, args.file, **key, progress=progress)
            done = "restored, and compared with what was saved: counts and sums are the same"
    finally:
        bar.clear()
    _show(args, found, done)
    return 0


def _show(args: argparse.Namespace, found: Backup, done: str) -> None:
    contents = found.contents
    if args.json:
        record = {
            "path": found.path,
            "done": done,
            "database": found.backend,
            "name": found.database,
            "made": found.made,
            "server": contents.server,
            "schemaVersion": contents.version,
            "encrypted": found.encrypted,
            "bytes": found.bytes,
            "sessions": contents.sessions,
            "events": contents.events,
            "messages": contents.messages,
            "deletions": contents.deletions,
            "moving": found.moving,
        }
        show_json([record])
        return
    rows = f"{contents.sessions:,} sessions, {contents.events:,} events"
    show(
        [
            display.safe(f"{found.path}: {done}"),
            display.safe(
                f"{rows} of {found.backend} database {found.database}, {found.made}; "
                f"{found.bytes:,} bytes{', encrypted' if found.encrypted else ''}"
            ),
        ]
    )
    if found.moving:
        tell(
            f"{found.moving:,} sessions were written to while the dump began: of them bounds are "
            "known, not sums"
        )
