"""What a check of a database finds, from what its store saw there: no SQL here, only judgement.

Each finding says how it is and, where it is not well, what to do.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from contextuate_persist import partitions, payload, schema, tls
from contextuate_persist.errors import SchemaError

#: Rows of an answer; None where the server does not tell this account.
Rows = Sequence[Sequence[Any]]
MiB = 2**20

SLOW_MS = 100
SLOW_CALLS = 10
CLOCK_WARNING_MS = 1_000
CLOCK_PROBLEM_MS = 60_000
# An index that nobody has used is worth a word only if it is large, and was watched for a week.
UNUSED_BYTES = 64 * MiB
UNUSED_SECONDS = 7 * 86_400
STALE_ROWS = 10_000
STALE_PART = 0.3
PREPARED_SECONDS = 60
PARTITIONS_SECONDS = 2 * 86_400
LOCKS_STEP = 64  # what there is by default
# PostgreSQL makes room for two of them for each lock, by its lock.c. What shared memory is left can
# hold more: 17.10, by its defaults, refused the eighteenth of readers with 1,808 locks each.
LOCK_HOLDERS = 2
FREE_WARNING = 1024 * MiB
FREE_PROBLEM = 100 * MiB


class Level(str, Enum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: how it is, and what to do about it."""

    check: str
    level: Level
    message: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.message}: {self.advice}" if self.advice else self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a store saw of its server, for `judge`."""

    place: str
    local: bool
    tls: Mapping[str, str]
    server: str
    supported: tuple[int, int]  # the oldest and the newest major version that was tested
    driver: str
    implementation: str
    pool_size: int
    latency_ms: float
    clock_ms: float  # how far the server's clock is ahead of ours
    version: schema.SchemaVersion | None
    shape: frozenset[str]  # what the schema file makes
    durable: Mapping[str, Sequence[str]]  # settings without which an acknowledged row may be lost
    wanted: Mapping[str, Sequence[str]]  # others that have to be so, or without a value are told
    answers: Mapping[str, Rows | None]


def judge(seen: Seen) -> list[Finding]:
    """The findings, in a fixed order."""
    return [finding for check in _CHECKS for finding in check(seen)]


def _ok(check: str, message: str) -> Iterator[Finding]:
    yield Finding(check, Level.OK, message)


def _untold(check: str, what: str) -> Iterator[Finding]:
    yield Finding(check, Level.OK, f"not told to this account: {what}")


def _listed(words: Sequence[str], most: int = 4) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _megabytes(size: float) -> str:
    return f"{size / MiB:,.0f} MiB"


# --- Connection -----------------------------------------------------------------------------------


def _connection(seen: Seen) -> Iterator[Finding]:
    return _ok("connection", f"{seen.place} answers in {seen.latency_ms:.1f} ms")


def _tls(seen: Seen) -> Iterator[Finding]:
    cipher = " ".join(str(word) for row in seen.answers["tls"] or [] for word in row if word)
    mode = seen.tls.get("sslmode", "prefer")
    if cipher and mode in tls.VERIFYING:
        part = "" if mode == "verify-full" else ", its host name not checked"
        return _ok("tls", f"{cipher}, the server's certificate verified{part}")
    if seen.local:
        return _ok("tls", f"{cipher}, not verified" if cipher else "none, on this machine")
    advice = "say sslmode=verify-full, and sslrootcert=FILE for an authority of your own"
    message = "encrypted, but anybody may pose as the server" if cipher else "all is in plain text"
    return iter([Finding("tls", Level.WARNING if cipher else Level.PROBLEM, message, advice)])


def _server(seen: Seen) -> Iterator[Finding]:
    oldest, newest = seen.supported
    number = re.match(r"\d+", seen.server)
    major = int(number[0]) if number else 0
    if major < oldest:
        advice = f"move to {oldest} or newer"
        yield Finding("version", Level.PROBLEM, f"{seen.server} is too old", advice)
    elif major > newest:
        message = f"{seen.server} is newer than what this version was tested with ({newest})"
        yield Finding("version", Level.WARNING, message, "look for a newer contextuate-persist")
    else:
        yield from _ok("version", f"{seen.server}, supported are {oldest} to {newest}")


def _driver(seen: Seen) -> Iterator[Finding]:
    message = f"{seen.driver}, implementation {seen.implementation}"
    if seen.implementation != "python":
        return _ok("driver", message)
    advice = "it works, but slower: install contextuate-persist[binary]"
    if not seen.driver.startswith("psycopg"):
        advice = (
            "it works, but slower: take use-pure out of the URL, or install a "
            "mysql-connector-python with its C extension"
        )
    return iter([Finding("driver", Level.WARNING, message, advice)])


def _clock(seen: Seen) -> Iterator[Finding]:
    ahead = seen.clock_ms
    message = f"the server's is {abs(ahead) / 1000:.1f} s {'ahead' if ahead > 0 else 'behind'}"
    if abs(ahead) < CLOCK_WARNING_MS:
        return _ok("clock", "the same as this machine's, within a second")
    level = Level.WARNING if abs(ahead) < CLOCK_PROBLEM_MS else Level.PROBLEM
    advice = "synchronise both clocks: whether an event comes after a deletion is told by them"
    return iter([Finding("clock", level, message, advice)])


# --- Schema and privileges ------------------------------------------------------------------------


def _schema(seen: Seen) -> Iterator[Finding]:
    try:
        found = schema.require_version(seen.version, seen.place)
    except SchemaError as error:
        message, _, advice = str(error).rpartition(": ")
        yield Finding("schema", Level.PROBLEM, message, advice)
        return
    yield from _ok("schema", f"version {found.version}, layout {found.layout}")
    yield from _drift(seen)


def _drift(seen: Seen) -> Iterator[Finding]:
    live = {str(row[0]) for row in seen.answers["shape"] or []}
    wanted = {schema.shape_name(line): line for line in seen.shape}
    there = {schema.shape_name(line): line for line in live}
    drifted = False
    for name in sorted(wanted):
        if there.get(name) == wanted[name]:
            continue
        drifted = True
        kind = name.split(" ")[0]
        level = Level.WARNING if kind == "index" else Level.PROBLEM
        if name in there:
            was, now = wanted[name][len(name) :].strip(), there[name][len(name) :].strip()
            message = f"{name} was changed, from {was or 'nothing'} to {now or 'nothing'}"
            advice = "change it back, as the database's owner"
        else:
            message = f"{name} is missing"
            advice = "make it again, from the schema file, as the database's owner"
        yield Finding("drift", level, message, advice)
    for name in sorted(there.keys() - wanted.keys()):
        kind, _, whose = name.partition(" ")
        message = f"{name} is not of the schema"
        if kind == "column" and _has_to_be_given(there[name]):
            drifted = True
            message += ", and no row is stored without it"
            advice = "give it a default, or let it be NULL, as the database's owner"
            yield Finding("drift", Level.PROBLEM, message, advice)
        unique = kind == "index" and there[name].startswith(f"{name} unique ")
        # Behind a constraint is an index of its name.
        told = f"constraint {whose}" in there
        if kind in ("constraint", "trigger") or (unique and not told):
            drifted = True
            advice = "make sure that it refuses nothing that is to be stored"
            yield Finding("drift", Level.WARNING, message, advice)
    if not drifted:
        yield from _ok(
            "drift", f"{len(wanted)} tables, columns, indexes and rules as they should be"
        )


def _has_to_be_given(column: str) -> bool:
    filled = re.search(r" (default|identity|auto_increment|generated)\b", column, re.IGNORECASE)
    return " not null" in column and filled is None


def _privileges(seen: Seen) -> Iterator[Finding]:
    rows = seen.answers["privileges"]
    if rows is None:
        yield from _untold("privileges", "its own")
        return
    missing = [str(row[1]) for row in rows if row[0] == "missing"]
    excess = [str(row[1]) for row in rows if row[0] == "excess"]
    advice = "use the application's account, as `contextuate-persist setup` makes it"
    if excess:
        message = f"this account can do more than it needs: {_listed(excess)}"
        yield Finding("privileges", Level.WARNING, message, advice)
    if missing and all(not word.startswith("SELECT") for word in missing):
        yield Finding("privileges", Level.WARNING, f"to read only: no {_listed(missing)}", advice)
    elif missing:
        advice = "grant SELECT, INSERT, UPDATE and DELETE"
        yield Finding("privileges", Level.PROBLEM, f"missing: {_listed(missing)}", advice)
    elif not excess:
        yield from _ok("privileges", "SELECT, INSERT, UPDATE and DELETE, and nothing else")


# --- Settings -------------------------------------------------------------------------------------

#: What guards against pages that are written in part when the machine fails.
_TORN = frozenset({"full_page_writes", "innodb_doublewrite"})


def _settings(check: str, seen: Seen, expected: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    found = {str(row[0]): str(row[1]) for row in seen.answers["settings"] or []}
    wrong = {
        name: found[name]
        for name, good in expected.items()
        if good and found.get(name, good[0]) not in good
    }
    for name, value in wrong.items():
        level, advice = Level.PROBLEM, f"set it to {expected[name][0]}"
        if name in _TORN:  # some clouds do not let anybody change it
            level = Level.WARNING
            advice += ", unless the storage never writes half a page (ZFS, RDS Optimized Writes)"
        elif check == "durability":
            advice += ", or what was acknowledged may be lost when the machine fails"
        yield Finding(check, level, f"{name} is {value}", advice)
    if not wrong:
        yield from _ok(check, _listed([f"{name} {found.get(name, '?')}" for name in expected], 9))


def _durability(seen: Seen) -> Iterator[Finding]:
    return _settings("durability", seen, seen.durable)


def _modes(seen: Seen) -> Iterator[Finding]:
    return _settings("modes", seen, seen.wanted)


def _packet(seen: Seen) -> Iterator[Finding]:
    rows = seen.answers["packet"]
    if not rows:
        return _ok(
            "packet", f"no limit below that of payloads, {_megabytes(payload.MAX_PAYLOAD_BYTES)}"
        )
    limit, needed = int(rows[0][0]), 4 * payload.MAX_PAYLOAD_BYTES
    if limit >= needed:
        return _ok("packet", f"{_megabytes(limit)}, enough for every payload")
    message = f"{_megabytes(limit)}: payloads over {_megabytes(limit / 4)} may be refused"
    advice = f"set max_allowed_packet to {_megabytes(needed)}"
    return iter([Finding("packet", Level.WARNING, message, advice)])


# --- Condition ------------------------------------------------------------------------------------


def _space(seen: Seen) -> Iterator[Finding]:
    rows = seen.answers["size"]
    if not rows:
        yield from _untold("space", "the size of the database")
        return
    size, directory = int(rows[0][0] or 0), str(rows[0][1] or "")
    takes = f"the database takes {_megabytes(size)}"
    free = free_bytes(directory) if seen.local and directory else None
    if free is None:
        yield from _ok("space", f"{takes}; how much is free the server does not tell")
        return
    message = f"{_megabytes(free)} are free, {takes}"
    if free >= max(FREE_WARNING, size // 20):
        yield from _ok("space", message)
        return
    level = Level.PROBLEM if free < FREE_PROBLEM else Level.WARNING
    yield Finding("space", level, message, f"make room on the disk of {directory}")


def free_bytes(directory: str) -> int | None:
    """What is free on the disk of a directory; None if it is not on this machine."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None


def _beside(seen: Seen) -> Iterator[Finding]:
    """What a command that makes or drops partitions has aside, or has left there."""
    rows = seen.answers["beside"] or []
    if any(at_work for _, at_work in rows):
        yield from _ok("partitions", "they are being made or dropped just now")
        return
    advice = "run `contextuate-persist partition` again, as the database's owner"
    for name, _ in rows:
        if name == partitions.RETIRED:
            message = f"a drop was interrupted: its events lie in {name}, where no reader sees them"
            yield Finding("partitions", Level.PROBLEM, message, advice)
        else:
            message = f"making or dropping them was interrupted: it has left {name}"
            yield Finding("partitions", Level.WARNING, message, advice)


def _locks(seen: Seen) -> Iterator[Finding]:
    """Whether the server has room for the locks of as many reads at once as the pool allows."""
    for each, per_transaction, transactions in seen.answers["locks"] or []:
        needed, room = each * seen.pool_size, per_transaction * transactions * LOCK_HOLDERS
        if needed <= room:
            continue
        message = (
            f"a read of a session takes {each:,} locks, {seen.pool_size} at once {needed:,}: the "
            f"server has made room for {room:,}, and may refuse some"
        )
        enough = -(-needed // (transactions * LOCK_HOLDERS * LOCKS_STEP)) * LOCKS_STEP
        advice = f"set max_locks_per_transaction to {enough}, and restart it"
        yield Finding("partitions", Level.WARNING, message, advice)


def _partitions(seen: Seen) -> Iterator[Finding]:
    yield from _beside(seen)
    yield from _locks(seen)
    rows = seen.answers.get("partitions")
    if not rows:
        return  # one table
    end = int(rows[0][0] or 0)
    day = f"{datetime.fromtimestamp(end / 1000, tz=timezone.utc):%Y-%m-%d}"
    if end / 1000 > time.time() + PARTITIONS_SECONDS:
        yield from _ok("partitions", f"made for events before {day}")
        return
    advice = "run `contextuate-persist partition` as the database's owner, now and regularly"
    yield Finding("partitions", Level.WARNING, f"there are none for events from {day} on", advice)


def _statistics(seen: Seen) -> Iterator[Finding]:
    rows = seen.answers["statistics"]
    if rows is None:
        return _untold("statistics", "how old the planner's statistics are")
    stale = [
        f"{table} ({changed:,} changes since)"
        for table, count, changed in rows
        if changed > STALE_ROWS + STALE_PART * count
    ]
    if not stale:
        return _ok("statistics", "as new as the planner needs them")
    message = f"the planner's are old: {_listed(stale)}"
    return iter([Finding("statistics", Level.WARNING, message, "run ANALYZE on these tables")])


def _unused(seen: Seen) -> Iterator[Finding]:
    rows = seen.answers["unused"]
    if rows is None:
        return _untold("indexes", "which of them are used")
    unused = [
        f"{index} ({_megabytes(size)})"
        for index, size, seconds in rows
        if size >= UNUSED_BYTES and seconds >= UNUSED_SECONDS
    ]
    if not unused:
        return _ok("indexes", "none that is large and never used")
    message = f"not used for a week or more: {_listed(unused)}"
    advice = "schemas/COMPARISON.md says what each serves and costs; dropping one is your choice"
    return iter([Finding("indexes", Level.WARNING, message, advice)])


def _slow(seen: Seen) -> Iterator[Finding]:
    rows = seen.answers["slow"]
    if rows is None:
        return _untold("statements", "how long they take, or the server does not record it")
    slow = [
        f"{' '.join(str(text).split())[:60]} ({mean:,.0f} ms, {calls:,} times)"
        for text, calls, mean in rows
        if mean >= SLOW_MS and calls >= SLOW_CALLS
    ]
    if not slow:
        return _ok("statements", f"none that often takes more than {SLOW_MS} ms")
    advice = "look at its plan with EXPLAIN, at the drift above and at the load of the server"
    return iter([Finding("statements", Level.WARNING, f"slow: {_listed(slow, 2)}", advice)])


def _prepared(seen: Seen) -> Iterator[Finding]:
    rows = seen.answers["prepared"]
    if rows is None:
        return _untold("prepared", "whether prepared transactions are open")
    old = [str(name) for name, seconds in rows if seconds is None or seconds >= PREPARED_SECONDS]
    if not old:
        return _ok("prepared", "no forgotten prepared transaction")
    message = f"prepared transactions are open: {_listed(old)}"
    advice = "commit or roll them back: they hold locks, and keep what is deleted on the disk"
    return iter([Finding("prepared", Level.PROBLEM, message, advice)])


_CHECKS: tuple[Callable[[Seen], Iterator[Finding]], ...] = (
    _connection,
    _tls,
    _server,
    _driver,
    _clock,
    _schema,
    _privileges,
    _durability,
    _modes,
    _packet,
    _space,
    _partitions,
    _statistics,
    _unused,
    _slow,
    _prepared,
)
