"""The commands about what waits for the database (`spool`) and what it has refused (`dead`)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from contextuate_persist import display
from contextuate_persist.base import BaseStore
from contextuate_persist.console import show, show_json, tell, terminal_width
from contextuate_persist.dead_letters import DeadLetter, DeadLetters, replay
from contextuate_persist.errors import (
    ConfigurationError,
    InvalidRecord,
    SpoolError,
    StoreRefused,
    StoreUnavailable,
)
from contextuate_persist.inbox import counts as inbox_counts
from contextuate_persist.inbox import default_inbox
from contextuate_persist.spool import Spool, spool_state
from contextuate_persist.writer import EventWriter, default_spool

OpenStore = Callable[[argparse.Namespace], BaseStore]


def _directory(args: argparse.Namespace) -> Path:
    given: Path | None = args.directory
    if given is None:
        return default_spool()
    # A slip of the pen would look like a spool in which nothing waits.
    if not given.is_dir():
        raise ConfigurationError(f"--directory: {given} is no directory")
    return given


def spool(args: argparse.Namespace, open_given: OpenStore) -> int:
    """What lies in a spool, and aside of it; or store it, if no daemon does."""
    if args.action == "replay":
        return _replay_spool(args, open_given)
    directory = _directory(args)
    state = spool_state(directory)
    for file in state.unreadable:
        tell(f"{file}; the next writer moves it to damaged")
    dead, damaged = DeadLetters(directory / "dead"), Spool(directory).damaged
    letters = len(dead.ids())
    for aside in (dead.aside, damaged):
        aside.look()
    size = dead.aside.bytes + damaged.bytes
    age = None if state.oldest is None else max(0.0, time.time() - state.oldest / 1000)
    inbox = default_inbox()
    files, bad = inbox_counts(inbox)
    if args.json:
        record: dict[str, object] = {"directory": str(directory)}
        record |= {"records": state.records, "bytes": state.bytes}
        record |= {"oldestSeconds": age, "deadLetters": letters, "asideBytes": size}
        show_json([{**record, "inbox": str(inbox), "inboxFiles": files, "inboxBad": bad}])
        return 0
    waiting = "nothing waits" if age is None else f"{state.records:,} wait, the oldest {age:,.0f} s"
    show(
        [
            f"{display.safe(str(directory))}: {waiting}; {state.bytes:,} bytes on disk",
            f"{letters:,} dead letters" + ("; see `dead list`" if letters else ""),
        ]
    )
    if size:
        show([f"{size:,} bytes lie aside in dead and damaged, and count against what may wait"])
    if files or bad:
        show([f"{display.safe(str(inbox))}: {files:,} files wait for a daemon, {bad:,} are in bad"])
    return 0


def _replay_spool(args: argparse.Namespace, open_given: OpenStore) -> int:
    with (
        open_given(args) as store,
        EventWriter(store, spool_directory=_directory(args)) as writer,
    ):
        left = writer.flush(args.timeout)
        health = writer.health()
    found = health.accepted  # what lay there: nobody puts anything
    counts = {"stored": health.stored, "duplicate": health.duplicate, "setAside": health.set_aside}
    if args.json:
        show_json([{"found": found, **counts, "left": left}])
    else:
        line = f"{found:,} found: {health.stored:,} stored, {health.duplicate:,} there already, "
        show([line + f"{health.set_aside:,} set aside, {left:,} left"])
    if left:
        tell(f"not all is stored: {health.last_error or 'the time is up'}")
    return 1 if left else 0


def dead(args: argparse.Namespace, open_given: OpenStore) -> int:
    """What was set aside: list it, show it, try it again, give it up."""
    letters = DeadLetters(_directory(args) / "dead")
    if args.action == "discard":
        return _discard(letters, args)
    if args.action == "replay":
        return _replay_letters(letters, args.ids or letters.ids(), args, open_given)
    found = map(letters.read, args.ids) if args.action == "show" else _readable(letters)
    if args.action == "show" or args.json:
        show_json(_wire(letter) for letter in found)
    else:
        show(display.table(_COLUMNS, map(_row, found), terminal_width()))
    return 0


def _discard(letters: DeadLetters, args: argparse.Namespace) -> int:
    if not args.ids:
        raise ConfigurationError("dead discard: name the letters; `dead list` has their ids")
    known = set(letters.ids())
    missing = [letter_id for letter_id in args.ids if letter_id not in known]
    for letter_id in missing:
        tell(f"{letters.directory}: no dead letter {letter_id!a}")
    for letter_id in known.intersection(args.ids):
        letters.remove(letter_id)
    discarded = len(known.intersection(args.ids))
    if args.json:
        show_json([{"discarded": discarded, "missing": len(missing)}])
    else:
        show([f"{discarded:,} discarded"])
    return 1 if missing else 0


def _readable(letters: DeadLetters) -> Iterator[DeadLetter]:
    for letter_id in letters.ids():
        try:
            yield letters.read(letter_id)
        except SpoolError as error:
            tell(str(error))


def _replay_letters(
    letters: DeadLetters, ids: list[str], args: argparse.Namespace, open_given: OpenStore
) -> int:
    stored = known = 0
    still: list[str] = []
    with open_given(args) as store:
        for letter_id in ids:
            try:
                new = replay(letters.read(letter_id), store)
            except (InvalidRecord, SpoolError, LookupError, StoreRefused, StoreUnavailable) as why:
                if isinstance(why, StoreRefused | StoreUnavailable) and not why.perhaps_one:
                    raise  # the next one would fare no better
                still.append(letter_id)
                tell(f"{letter_id}: {why}")
            else:
                letters.remove(letter_id)
                stored, known = stored + new, known + (not new)
    if args.json:
        show_json([{"stored": stored, "duplicate": known, "left": len(still)}])
    else:
        show([f"{stored:,} stored, {known:,} there already, {len(still):,} still refused"])
    return 1 if still else 0


_COLUMNS = (
    display.Column("ID", 26),
    display.Column("TAKEN", 24, optional=True),
    display.Column("KIND", 7),
    display.Column("REASON", 24),
)


def _row(letter: DeadLetter) -> tuple[str, ...]:
    return (
        letter.id,
        display.iso_time(letter.accepted),
        letter.content.kind,
        letter.content.reason,
    )


def _wire(letter: DeadLetter) -> dict[str, object]:
    return {"id": letter.id, "accepted": letter.accepted, **letter.content._asdict()}
