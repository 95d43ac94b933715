"""Maintenance: what is to be done daily, weekly, monthly and quarterly, and what was found then.

Each item does what it can itself, and otherwise says in one line what a person has to do. Findings
are those of `doctor`.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextuate_persist import doctor, encryption, retention
from contextuate_persist.archive import archive
from contextuate_persist.backup import left_by_tests, name_of, restore_test, verify_backup
from contextuate_persist.backup_file import Reader
from contextuate_persist.doctor import Finding, Level
from contextuate_persist.errors import (
    ConfigurationError,
    DamagedFile,
    PersistenceError,
    SchemaError,
    StoreRefused,
    StoreUnavailable,
)
from contextuate_persist.retention import RetentionPolicy
from contextuate_persist.transfer import SUFFIXES

if TYPE_CHECKING:
    from contextuate_persist.base import BaseStore

CONNECTIONS_WARNING = 0.8  # of those that the server allows
CONNECTIONS_PROBLEM = 0.95
# A table is compacted where that frees so much of it.
GARBAGE_PART = 0.1
GARBAGE_BYTES = 16 * doctor.MiB
BACKUP_DAYS = 2.0
_AHEAD_DAYS = 0.1  # of another machine's clock
WORSE = 1.25  # a figure of the benchmark, by this factor

_OWNERS = ("statistics", "partitions", "room")  # what only the owner may do, at least on one server
_OWNER = "run it with the URL of the database's owner"
_WITHOUT_STORE = ("backup", "restore", "benchmark")  # what can be done while the database is away
_NAMED = re.compile("contextuate-(postgresql|mysql)-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """What the items need that no server tells; those that lack it say so."""

    backups: Path | None = None
    """The directory with backups, of which the newest is looked at."""
    identity: Path | None = None
    """The secret key of age that opens them."""
    administrator: str | None = None
    """The URL of an administrator, who can make a database to restore a backup into."""
    archives: Path | None = None
    """The directory to archive to what the policy gives up; without it nothing is deleted."""
    recipients: Sequence[Any] = ()
    """Whose keys open what is archived."""
    policy: RetentionPolicy = field(default_factory=RetentionPolicy)
    benchmarks: Path | None = None
    """The directory with figures that `bench --output` has written, of which two are compared."""


Item = Callable[["BaseStore", Tasks], Iterator[Finding]]


def maintain(store: BaseStore, period: str, tasks: Tasks | None = None) -> list[Finding]:
    """Do what a period asks for, one of PERIODS; what was found and done.

    Opens the store if need be; closing it is the caller's. Nothing is raised that is the server's,
    the disk's or the tasks' fault: it is a finding, and the other items go on. Raises KeyError for
    another period.
    """
    given, items = tasks or Tasks(), PERIODS[period]
    found: list[Finding] = []
    try:
        store.init()
    except SchemaError as error:
        found.append(Finding("schema", Level.PROBLEM, str(error)))
        items = tuple(item for item in items if item[0] in (*_WITHOUT_STORE, "migrations"))
    except (PersistenceError, OSError) as error:
        found.append(Finding("connection", Level.PROBLEM, str(error)))
        items = tuple(item for item in items if item[0] in _WITHOUT_STORE)
    return found + [one for name, item in items for one in _found(name, item, store, given)]


def _found(name: str, item: Item, store: BaseStore, tasks: Tasks) -> Iterator[Finding]:
    try:
        yield from item(store, tasks)
    except (PersistenceError, OSError) as error:
        if name in _OWNERS and isinstance(error, StoreRefused) and not error.to_all:
            yield Finding(name, Level.WARNING, f"not done: {error}", _OWNER)
        else:
            yield Finding(name, Level.PROBLEM, str(error))


def _ok(name: str, message: str) -> Iterator[Finding]:
    yield Finding(name, Level.OK, message)


def _warn(name: str, message: str, advice: str) -> Iterator[Finding]:
    yield Finding(name, Level.WARNING, message, advice)


def _checked(*names: str) -> Item:
    """What `check` finds under these names."""

    def item(store: BaseStore, _: Tasks) -> Iterator[Finding]:
        return (found for found in store.check() if found.check in (*names, "connection"))

    return item


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


# --- Daily ----------------------------------------------------------------------------------------


def _connections(store: BaseStore, _: Tasks) -> Iterator[Finding]:
    answers = store.survey()
    if not (rows := answers["connections"]):
        yield from _ok("connections", "not told to this account: how many there are")
    else:
        used, allowed = int(rows[0][0]), int(rows[0][1])
        message = f"{used:,} of the {allowed:,} that the server allows"
        part = used / max(1, allowed)
        if part < CONNECTIONS_WARNING:
            yield from _ok("connections", message)
        else:
            level = Level.WARNING if part < CONNECTIONS_PROBLEM else Level.PROBLEM
            advice = "find who keeps them, lower pool_size there, or raise max_connections"
            yield Finding("connections", level, message, advice)
    rows = answers["transactions"]
    if open_ones := [row for row in rows or () if row[1] is not None]:
        who = ", ".join(f"{one[0]} ({int(one[1]):,} s)" for one in open_ones[:4])
        advice = "find out what they wait for: they hold locks, and keep what is deleted"
        yield from _warn("transactions", f"open for long: {who}", advice)
    elif rows is None or rows:
        yield from _ok("transactions", "not told to this account: how long others take")
    else:
        yield from _ok("transactions", "none that is open for five minutes")


def _newest_backup(store: BaseStore, tasks: Tasks) -> Path | None:
    if tasks.backups is None:
        return None
    # Not what begins with a dot: a backup that is being made, or was killed.
    names = {*tasks.backups.glob("[!.]*.backup*"), *tasks.backups.glob("[!.]*.age")}
    found = [path for path in names if path.is_file() and not path.name.endswith(SUFFIXES)]
    database = _database(store)
    newest = sorted(found, key=_time_of, reverse=True)
    return next((path for path in newest if _is_of(path, store.backend, database, tasks)), None)


def _time_of(path: Path) -> float:
    """When a backup was made, as far as it can be told from outside: a copy of it may be later."""
    changed = path.stat().st_mtime
    named = re.search(r"-(\d{8}T\d{6}Z)\.", path.name)
    if named is None:
        return changed
    with contextlib.suppress(ValueError):  # what is no time
        moment = datetime.strptime(named[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
        return min(changed, moment.timestamp())
    return changed


def _database(store: BaseStore) -> str | None:
    """Its name; None while it is away: a backup can be looked at all the same."""
    try:
        rows = store.survey()["database"]
    except PersistenceError:
        return None
    return str(rows[0][0]) if rows else None


def _is_of(path: Path, backend: str, database: str | None, tasks: Tasks) -> bool:
    """Whether a backup is this database's, as it says itself, or as its name says.

    One that tells neither is taken for its, to be looked at.
    """
    if database is None:
        return True
    if not _is_locked(path, tasks):
        with contextlib.suppress(DamagedFile, ConfigurationError):  # also told where it is verified
            about = Reader(path, tasks.identity, None, None).about()
            return (about["backend"], about.get("database")) == (backend, database)
    return not _NAMED.match(path.name) or path.name.startswith(name_of(backend, database))


def _is_locked(path: Path, tasks: Tasks) -> bool:
    """Whether its key is not here, as on the machine that makes encrypted backups it should be."""
    with path.open("rb") as file:
        return tasks.identity is None and encryption.is_encrypted(file.read(64))


def _backup(store: BaseStore, tasks: Tasks) -> Iterator[Finding]:
    path = _newest_backup(store, tasks)
    if tasks.backups is None:
        return _warn("backup", "none is looked at", "name where they are with --backups DIRECTORY")
    if path is None:
        advice = "make one: `contextuate-persist backup`"
        message = f"{tasks.backups} has none of this database"
        return iter([Finding("backup", Level.PROBLEM, message, advice)])
    made = _time_of(path)
    if not (locked := _is_locked(path, tasks)):
        found = verify_backup(path, identity=tasks.identity)
        # The file may be a later copy of itself.
        made = min(made, datetime.fromisoformat(found.made).timestamp())
    age = (time.time() - made) / 86_400
    message = f"{path.name} is {'encrypted' if locked else 'whole'}, and {age:.1f} days old"
    if age < -_AHEAD_DAYS:
        advice = "set the clock, or rename it and touch it: it hides what is newer"
        return _warn("backup", f"{path.name} is dated in the future", advice)
    if age > BACKUP_DAYS:
        return _warn("backup", message, "see why there is no newer one")
    # Every night the same, and meant to be: no reason to warn.
    return _ok("backup", f"{message}: verify it where its key is" if locked else message)


# --- Weekly ---------------------------------------------------------------------------------------


def _statistics(store: BaseStore, _: Tasks) -> Iterator[Finding]:
    done = [str(name) for name, *_rest in store.survey()["sizes"] or ()]
    if done and "events" not in done:
        # Partitions: theirs come with those of the table, which autovacuum never makes.
        done = ["events", *(name for name in done if not name.startswith("events_"))]
    for name in done:
        store.refresh_statistics(name)
    return _ok("statistics", f"counted anew: {', '.join(done)}")


def _sizes(store: BaseStore, _: Tasks) -> Iterator[Finding]:
    for name, rows, table, indexes in store.survey()["sizes"] or ():
        count = max(0, int(rows or 0))
        message = f"{name}: about {count:,} rows, {_size(table)} and {_size(indexes)} of indexes"
        yield from _ok("sizes", message)


# --- Monthly --------------------------------------------------------------------------------------


def _compaction(store: BaseStore, _: Tasks) -> Iterator[Finding]:
    answers = store.survey()
    rows = answers["garbage"]
    if rows is None:
        yield from _ok("room", "not told to this account: what deleted rows have left")
        return
    worth = {
        str(name): int(whole or 0)
        for name, garbage, whole in rows
        if int(garbage or 0) >= max(GARBAGE_BYTES, GARBAGE_PART * int(whole or 0))
    }
    done = []
    for name, whole in worth.items():
        if _is_room_for_two(whole, answers["disk"]):
            store.compact(name)
            done.append(name)
    if left := [name for name in worth if name not in done]:
        message = f"deleted rows hold much of {', '.join(left)}, which new ones use again"
        advice = (
            f"to give it back, run OPTIMIZE TABLE {', '.join(left)} at a quiet time: it needs as "
            "much disk again, of which too little is free, or not seen from here"
        )
        yield from _warn("room", message, advice)
    if done:
        yield from _ok("room", f"made free what deleted rows had: {', '.join(done)}")
    elif not worth:
        yield from _ok("room", "deleted rows hold too little to make it free")


def _is_room_for_two(size: int, disk: doctor.Rows | None) -> bool:
    """Whether the server's disk is seen to have room for two more of this size, if any is needed.

    A full disk stops the server: that is not risked for a guess.
    """
    if disk == []:
        return True
    host, directory = map(str, (disk or [("", "")])[0])
    free = doctor.free_bytes(directory) if host == socket.gethostname() else None
    return free is not None and free > 2 * size


def _archive(store: BaseStore, tasks: Tasks) -> Iterator[Finding]:
    try:
        store.require_all_events()
    except StoreUnavailable:  # of an interrupted drop; this gives them back
        store.add_partitions()
    if tasks.archives is not None:
        report = archive(store, tasks.archives, tasks.policy, recipients=tasks.recipients)
        message = f"{report.sessions:,} sessions with {report.events:,} events archived"
        message += retention.left_words(report.spared - report.unfit)
        message += f"; {report.kept:,} are kept"
        if report.unfit:
            message += f", {report.unfit:,} of them cannot be archived: {report.problems[0]}"
            return _warn("archive", message, "mend or delete them; `archive` names them")
        return _ok("archive", message)
    due = retention.plan(store, tasks.policy)
    if not due.sessions:
        return _ok("archive", "nothing is due")
    advice = "archive them with --archive-to DIRECTORY, or delete them with `prune`"
    return _warn("archive", f"{due.sessions:,} sessions are due", advice)


def _partitions(store: BaseStore, tasks: Tasks) -> Iterator[Finding]:
    if store.health().schema_layout != "partitioned":
        return _ok("partitions", "events is one table: nothing to do")
    added = store.add_partitions()
    words = f"made {', '.join(added)}" if added else "those to come are there"
    if tasks.archives is not None:  # what became due since is in no archive yet
        dropped = retention.drop_partitions(store, tasks.policy, empty=True).partitions
        words += f"; dropped {', '.join(dropped)}" if dropped else ""
    return _ok("partitions", words)


# --- Quarterly ------------------------------------------------------------------------------------


def _restore(store: BaseStore, tasks: Tasks) -> Iterator[Finding]:
    for name in left_by_tests(tasks.administrator) if tasks.administrator is not None else ():
        advice = f"DROP DATABASE {name}, as an administrator, unless a test is still at work"
        yield from _warn("restore", f"nobody uses {name}, which a test has made", advice)
    path = _newest_backup(store, tasks)
    locked = path is not None and _is_locked(path, tasks)
    if path is None or tasks.administrator is None or locked:
        name = f"{path or 'FILE'}{' --identity KEY' if locked else ''}"
        advice = f"run `contextuate-persist restore --test {name}` with an administrator's URL"
        yield from _warn("restore", "no backup was restored to try it", advice)
        return
    restore_test(path, tasks.administrator, identity=tasks.identity)
    yield from _ok("restore", f"{path.name} was restored into a database of its own, and is right")


def _benchmark(_: BaseStore, tasks: Tasks) -> Iterator[Finding]:
    advice = "run `contextuate-persist bench --output FILE` there, and compare"
    if tasks.benchmarks is None:
        return _warn("benchmark", "no figures are compared", advice + " (--benchmarks DIRECTORY)")
    files = sorted(tasks.benchmarks.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if len(files) < 2:
        message = f"{tasks.benchmarks} has {len(files)} of the two files that can be compared"
        return _warn("benchmark", message, advice)
    before, after = map(_figures, files[-2:])
    both = sorted(before.keys() & after.keys())
    worse = [
        f"{name} {before[name]:,.3g} -> {after[name]:,.3g}"
        for name in both
        if _is_worse(name, before[name], after[name])
    ]
    message = f"{files[-2].name} and {files[-1].name}"
    if not both:
        return _warn("benchmark", f"{message} have no figure in common", advice)
    if worse:
        more = f" and {len(worse) - 4} more" if len(worse) > 4 else ""
        message = f"{message}: worse are {', '.join(worse[:4])}{more}"
        return _warn("benchmark", message, "see what has changed on the server since")
    return _ok("benchmark", f"{message}: no figure is worse by a quarter")


def _figures(path: Path) -> dict[str, float]:
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return {
            f"{one['backend']}: {one['name']} ({one['unit']})": float(one["value"])
            for one in figures
        }
    except (ValueError, LookupError, TypeError) as error:
        raise OSError(f"{path}: not written by `bench --output`: {error}") from None


def _is_worse(name: str, before: float, after: float) -> bool:
    """By the unit: rates fall, times and bytes rise. Ratios are in the figures they come from."""
    if name.endswith("(1/s)"):
        return after * WORSE < before
    return name.endswith(("(ms)", "(us)", "(s)", "(B)")) and after > before * WORSE


def _indexes(store: BaseStore, _: Tasks) -> Iterator[Finding]:
    rows = store.survey()["indexes"]
    if rows is None:
        yield from _ok("indexes", "not told to this account: how often each is used")
        return
    unused = [str(name) for name, _, scans in rows if not scans]
    whole = sum(int(size or 0) for _, size, _ in rows)
    message = f"{len(rows)} of {_size(whole)}"
    if unused:
        message += f"; not used since the server counts: {', '.join(unused)}"
    yield from _ok("indexes", message)


def _migrations(store: BaseStore, _: Tasks) -> Iterator[Finding]:
    if not (pending := store.upgrade_schema(dry_run=True)):
        return _ok("migrations", f"none: schema version {store.health().schema_version} is current")
    names = ", ".join(f"{one.version:04} {one.name}" for one in pending)
    return _warn("migrations", f"to apply: {names}", "`contextuate-persist upgrade`, as the owner")


#: What each period asks for, in this order.
PERIODS: dict[str, tuple[tuple[str, Item], ...]] = {
    "daily": (
        ("connections", _connections),
        ("check", _checked("statements", "prepared", "space", "partitions")),
        ("backup", _backup),
    ),
    "weekly": (
        ("statistics", _statistics),
        ("sizes", _sizes),
        ("check", _checked("indexes")),
    ),
    "monthly": (
        ("archive", _archive),
        ("partitions", _partitions),
        ("room", _compaction),
    ),
    "quarterly": (
        ("restore", _restore),
        ("benchmark", _benchmark),
        ("indexes", _indexes),
        ("check", _checked("indexes", "drift", "version", "driver")),
        ("migrations", _migrations),
    ),
}
