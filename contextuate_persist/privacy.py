"""The command `forget`: first what is on this machine, then what is in the database, then a report.

In this order, since only the database and the queue together tell which sub-agents worked for a
session: a run that is killed leaves enough for the next one to find the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from contextuate_persist import display, inbox, payload, queued
from contextuate_persist.base import BaseStore
from contextuate_persist.console import ask, show, show_json, tell
from contextuate_persist.dead_letters import DeadLetters
from contextuate_persist.errors import ConfigurationError, InvalidRecord, SpoolError
from contextuate_persist.hooks import Capture
from contextuate_persist.model import Forgotten, MonitorEvent, SessionMeta
from contextuate_persist.queued import Refused, Update, Value
from contextuate_persist.records import EventRow
from contextuate_persist.spool import Spool, sync_directory, waiting_records
from contextuate_persist.subject import Subject
from contextuate_persist.writer import default_spool

#: Who else may still hold what was forgotten: no program can look there.
REMAINS = {
    "backups": "backups, exports and archives of the database, until they are deleted; whoever "
    "restores one has to forget again",
    "server": "the server: deleted rows until VACUUM or purge reuses their place, the WAL or the "
    "binary log and logs of statements until they rotate, replicas that lag",
    "otherMachines": "what waits on other machines (spool, inbox, dead letters): forget there, too",
    "agents": "the agents' own files, above all Claude Code's transcripts",
    "quotes": "other sessions whose payloads quote it",
    "original": "contextuate's own tables, if `upgrade` has moved them aside: contextuate_original",
    "ids": "the bare ids of the sessions, until the first pruning after 90 days: by them late "
    "deliveries are known; but what is new of a session that goes on is stored",
}

OpenStore = Callable[[argparse.Namespace], BaseStore]
_ABSOLUTE = re.compile(r"/|[A-Za-z]:[/\\]|\\\\")


def run(args: argparse.Namespace, open_given: OpenStore) -> int:
    """Do what the command line says; returns the exit status."""
    if args.directory is not None and not _ABSOLUTE.match(args.directory):
        raise ConfigurationError("--directory: give the whole path, as the sessions have it")
    subject = Subject.of(args.session, args.machine, args.directory)
    if not (args.dry_run or args.yes or (sys.stdin and sys.stdin.isatty())):
        raise ConfigurationError("forget: nothing was removed: give --yes to remove it, unasked")
    places = Places(spool=args.spool or default_spool(), inbox=args.inbox or inbox.default_inbox())
    with open_given(args) as store:
        survey = Survey(subject, store, places)
        found = survey.look()
        if args.dry_run:
            _report(args, subject, found, survey, done=False)
            return 0
        if not args.yes:
            lines = _lines(f"{subject}: found", found, places)
            if args.json:  # standard output is for the record alone
                for line in lines:
                    tell(line)
            else:
                show(lines)
            if not ask("Forget all this? Nothing brings it back. [y/N]"):
                raise ConfigurationError("forget: nothing was removed")
        removed = survey.remove()
    _report(args, subject, removed, survey, done=True)
    return 1 if survey.left else 0


# --- What waits on this machine -------------------------------------------------------------------


class About(NamedTuple):
    """What something that waits is about."""

    session_id: str
    parent_id: str | None = None
    machine_id: str = ""
    working_directory: str = ""
    whole: bool = False  # it tells where the session itself is, not only where something happened


class Places(NamedTuple):
    """The directories of this machine in which something may wait."""

    spool: Path
    inbox: Path

    @property
    def letters(self) -> DeadLetters:
        return DeadLetters(self.spool / "dead")


class Removed(NamedTuple):
    """What is gone, or would go."""

    database: Forgotten
    waiting: Counter[str]  # spool, inbox, deadLetters


@dataclass(slots=True)
class Survey:
    """Finds and removes what concerns a subject."""

    subject: Subject
    store: BaseStore
    places: Places
    #: The sessions that go whole, known to the database or not.
    ids: set[str] = field(default_factory=set)
    #: Of these, those that only the queue knows to belong here.
    more: list[str] = field(default_factory=list)
    #: What could not be looked at, or not be removed, and why.
    left: list[str] = field(default_factory=list)
    #: Records of the spool that this version cannot read.
    foreign: int = 0

    # --- Looking ----------------------------------------------------------------------------------

    def look(self) -> Removed:
        """Find out what would go; changes nothing."""
        found = [self._ask(self.subject)]
        self.ids.update(found[0].session_ids)
        if self.subject.kind == "session":
            self.ids.add(self.subject.value)
        waiting = Counter(self._waiting())
        new = [session_id for session_id in self._noted() if session_id not in self.ids]
        while new or (new := self._belonging(about for _, about in waiting)):
            for session_id in new:
                self.ids.add(session_id)
                with contextlib.suppress(InvalidRecord):  # a dead letter's, which no store has
                    found.append(self._ask(Subject("session", session_id)))
                    self.ids.update(found[-1].session_ids)
                    self.more.append(session_id)
            new = []
        counts: Counter[str] = Counter()
        for (place, about), count in waiting.items():
            counts[place] += count * self._concerns(about)
        return Removed(_sum(found), counts)

    def _ask(self, subject: Subject, *, dry_run: bool = True) -> Forgotten:
        kinds = {"session": "session_id", "machine": "machine_id", "directory": "working_directory"}
        given: dict[str, Any] = {kinds[subject.kind]: subject.value}
        return self.store.forget(**given, dry_run=dry_run)

    def _waiting(self) -> Iterator[tuple[str, About]]:
        """All that waits, by place."""
        for record in waiting_records(self.places.spool, self.left):
            if about := _about_body(record.body):
                yield "spool", about
        for _, content in inbox.all_files(self.places.inbox):
            if about := _about_file(content):
                yield "inbox", about
        for letter_id in self.places.letters.ids():
            if about := _about_letter(self.places.letters, letter_id):
                yield "deadLetters", about

    def _belonging(self, waiting: Iterable[About]) -> list[str]:
        """Sessions, not known to go yet, that are there or below one that goes."""
        new: dict[str, None] = {}
        for about in waiting:
            if about.session_id and about.session_id not in self.ids:
                there = about.whole and self._is_there(about)
                below = about.parent_id in self.ids and not self._is_elsewhere(about)
                if there or below:
                    new[about.session_id] = None
        return [*new]

    def _is_elsewhere(self, about: About) -> bool:
        """Whether the database knows better than an event to whom a session belongs."""
        if about.whole:
            return False
        with contextlib.suppress(InvalidRecord):  # as above
            known = self.store.get_session(about.session_id)
            parent = known and known.effective_parent_id
            return parent is not None and parent not in self.ids
        return False

    def _is_there(self, about: About) -> bool:
        return self.subject.is_at(about.machine_id, about.working_directory)

    def _concerns(self, about: About) -> bool:
        return about.session_id in self.ids or self._is_there(about)

    # --- Removing ---------------------------------------------------------------------------------

    def remove(self) -> Removed:
        """Remove what `look` has found, and what has come since."""
        self.left.clear()  # what could not be looked at is told of again, where it lies by then
        if self.more and self.places.spool.is_dir():
            self._note()
        found = [
            self._ask(Subject("session", session_id), dry_run=False) for session_id in self.more
        ]
        waiting = Counter(
            {
                "spool": self._remove_from_spool(),
                "inbox": self._remove_from_inbox(),
                "deadLetters": self._remove_letters(),
            }
        )
        found.append(self._ask(self.subject, dry_run=False))
        if not self.left:
            self._noting.unlink(missing_ok=True)
        return Removed(_sum(found), waiting)

    # What ties a sub-agent to its session may be removed before all that is to go with it. So the
    # ids are noted first: whoever is killed in between knows them again.

    @property
    def _noting(self) -> Path:
        name = hashlib.sha256(str(self.subject).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return self.places.spool / f"forgetting-{name}"

    def _noted(self) -> list[str]:
        try:
            return [*map(str, payload.loads_exact(self._noting.read_bytes()))]
        except (FileNotFoundError, ValueError):
            return []
        except OSError as error:
            raise SpoolError(f"{self._noting}: {error.strerror or error}") from error

    def _note(self) -> None:
        new = self._noting.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        try:
            with open(os.open(new, flags, 0o600), "wb") as file:
                file.write(payload.exact_json(sorted(self.ids)))
                file.flush()
                os.fsync(file.fileno())
            new.rename(self._noting)
            sync_directory(self.places.spool)
        except OSError as error:
            raise SpoolError(f"{self._noting}: {error.strerror or error}") from error

    def _remove_from_spool(self) -> int:
        directory = self.places.spool
        if not directory.is_dir():
            return 0
        spool = Spool(directory)
        try:
            spool.open()
        except ConfigurationError:
            kept_out = self.subject.kind == "session"
            fate = "is not stored any more, unless it is newer" if kept_out else "may be stored yet"
            self.left.append(
                f"{directory}: a daemon works on it: its files are left as they are, what waits in "
                f"them {fate}; stop it and forget again"
            )
            return 0
        try:
            gone = spool.rewrite(self._edited)
            for path in self.places.letters.directory.glob("*.tmp"):
                path.unlink()  # of a daemon that was killed: what was to be in it still waits
        except OSError as error:
            raise SpoolError(f"{directory}: {error.strerror or error}") from error
        finally:
            spool.close()
        if self.foreign:
            self.left.append(f"{directory}: {self.foreign:,} records of another version")
        damaged = directory / "damaged"
        unread = sorted(damaged.iterdir()) if damaged.is_dir() else []
        self.left += [f"{path}: cannot be read: look at it, and remove it" for path in unread]
        return gone

    def _edited(self, body: bytes) -> bytes | None:
        """The body without what names a session that goes; None if it is about one."""
        about = _about_body(body)
        if about is None:
            self.foreign += 1
            return body
        if self._concerns(about):
            return None
        value = queued.from_body(body)
        edited = self._without_names(value)
        return body if edited is value else queued.to_body(edited)

    def _without_names(self, value: Value) -> Value:
        if isinstance(value, EventRow) and value.event.parent_session_id in self.ids:
            head = value.event
            assert not isinstance(head, MonitorEvent)  # noqa: S101  (the spool has heads)
            return value._replace(event=head._replace(parent_session_id=None))
        if isinstance(value, SessionMeta):
            told = {name: getattr(value, name) for name in _NAMING}
            fields = self._without_ids(told)
            if fields != told:  # a parent that is gone is none
                return replace(value, **{**dict.fromkeys(told), **fields})
        if isinstance(value, Update):
            fields = self._without_ids(value.fields)
            return value if fields == value.fields else value._replace(fields=fields)
        if isinstance(value, Refused):
            return self._without_names_of(value)
        return value

    def _without_names_of(self, refused: Refused) -> Refused:
        """As far as it tells whom it names; what is left is as good to try again."""
        told = refused.record
        record: Any = told
        if refused.kind == "update" and isinstance(told, list) and len(told) == 2:
            record = [told[0], self._without_ids(told[1])]
        elif refused.kind in ("event", "session"):
            record = self._without_ids(told)
        elif refused.kind == "record":
            value = queued.reread(refused)
            edited = self._without_names(value)
            if edited is not value:
                return queued.unreadable(queued.to_body(edited), refused.reason)
        return refused if record == told else refused._replace(record=record)

    def _without_ids(self, told: Any) -> Any:
        """The fields without the ids of sessions that go; anything but fields as it is."""
        if not isinstance(told, dict):
            return told
        kept: dict[str, Any] = {}
        for name, value in told.items():
            if name in _PARENTS and isinstance(value, str) and value in self.ids:
                continue
            if name in _CHILDREN and isinstance(value, list | tuple):
                children = [one for one in value if not isinstance(one, str) or one not in self.ids]
                kept[name] = type(value)(children)
            else:
                kept[name] = value
        return kept

    def _remove_from_inbox(self) -> int:
        directory = self.places.inbox
        if not directory.is_dir():
            return 0
        try:
            with inbox.Inbox(directory):
                return self._remove_files()
        except ConfigurationError:
            self.left.append(f"{directory}: a daemon takes what is there; stop it and forget again")
            return 0

    def _remove_files(self) -> int:
        gone = 0
        for path, content in inbox.all_files(self.places.inbox):
            about = _about_file(content)
            if about is None:
                self.left.append(f"{path}: cannot be read: look at it, and remove it")
            elif self._concerns(about):
                inbox.remove_file(path)
                gone += 1
        for path, content in inbox.all_files(self.places.inbox, begun=True):
            about = _about_file(content)
            if about is not None and self._concerns(about):
                self.left.append(f"{path}: not finished yet, or left by a hook that was killed")
        return gone

    def _remove_letters(self) -> int:
        letters = self.places.letters
        gone = 0
        for letter_id in letters.ids():
            about = _about_letter(letters, letter_id)
            if about is None:
                path = letters.directory / letter_id
                self.left.append(f"{path}.json: cannot be read: look at it, and remove it")
            elif self._concerns(about):
                letters.remove(letter_id)
                gone += 1
            else:
                self._edit_letter(letter_id)
        return gone

    def _edit_letter(self, letter_id: str) -> None:
        """Leave a letter about a session that stays without what names one that goes."""
        letters = self.places.letters
        try:
            letter = letters.read(letter_id)
            edited = self._without_names_of(letter.content)
            if edited is not letter.content:
                letters.replace(letter._replace(content=edited))
        except SpoolError:
            pass  # somebody has tried it again, or given it up, at this moment
        except OSError as error:
            path = letters.directory / letter_id
            self.left.append(f"{path}.json: still names it: {error.strerror or error}")


def _sum(found: list[Forgotten]) -> Forgotten:
    return Forgotten(
        sessions=sum(one.sessions for one in found),
        events=sum(one.events for one in found),
        messages=sum(one.messages for one in found),
        session_ids=tuple(sorted({name for one in found for name in one.session_ids})),
        transcript_paths=tuple(sorted({path for one in found for path in one.transcript_paths})),
    )


# As fields are named here, and in the wire form.
_PARENTS = {
    "parent_session_id", "manual_parent_session_id", "parentSessionId", "manualParentSessionId",
}  # fmt: skip
_CHILDREN = {"child_session_ids", "childSessionIds"}
#: Of a session, what names others.
_NAMING = ("parent_session_id", "manual_parent_session_id", "child_session_ids")


# --- What it is about -----------------------------------------------------------------------------


def _about_body(body: bytes) -> About | None:
    """What a record of the spool is about; None for one that this version cannot read."""
    try:
        return _about(queued.from_body(body))
    except SpoolError:
        return None


def _about_file(content: bytes | None) -> About | None:
    try:
        return None if content is None else _about_event(Capture.parse(content).to_event())
    except InvalidRecord:
        return None


def _about_letter(letters: DeadLetters, letter_id: str) -> About | None:
    try:
        return _about(letters.read(letter_id).content)
    except SpoolError:
        return None


def _about(value: Value) -> About | None:
    if isinstance(value, EventRow):
        return _about_event(value.event)
    if isinstance(value, SessionMeta):
        parent = value.effective_parent_id
        return About(value.session_id, parent, value.machine_id, value.working_directory, True)
    if isinstance(value, Update):
        return _about_update(value.session_id, value.fields)
    return _about_refused(value)


def _about_event(event: Any) -> About:
    parent = event.parent_session_id
    return About(event.session_id, parent, event.machine_id, event.working_directory)


def _about_update(session_id: str, fields: dict[str, Any]) -> About:
    parent = fields.get("manual_parent_session_id") or fields.get("parent_session_id")
    machine_id, directory = _text(fields.get("machine_id")), _text(fields.get("working_directory"))
    return About(session_id, _text(parent), machine_id, directory, bool(machine_id or directory))


def _about_refused(value: Refused) -> About | None:
    """As far as what was refused tells it; it may be anything."""
    told = value.record
    if value.kind == "update" and isinstance(told, list) and len(told) == 2:
        return _about_update(_text(told[0]), told[1] if isinstance(told[1], dict) else {})
    if value.kind == "record":
        return _about_reread(value)
    if value.kind not in ("event", "session") or not isinstance(told, dict):
        return None
    parent = told.get("manualParentSessionId") or told.get("parentSessionId")
    return About(
        _text(told.get("sessionId")),
        _text(parent),
        _text(told.get("machineId")),
        _text(told.get("workingDirectory")),
        value.kind == "session",
    )


def _about_reread(value: Refused) -> About | None:
    """Of a record that an earlier version could not read, perhaps this one can."""
    try:
        return _about(queued.reread(value))
    except (SpoolError, ValueError, TypeError, AttributeError):  # it cannot, or it was edited
        return None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


# --- The report -----------------------------------------------------------------------------------


def _report(
    args: argparse.Namespace, subject: Subject, removed: Removed, survey: Survey, *, done: bool
) -> None:
    database, waiting = removed
    if args.json:
        counts = {name: waiting[name] for name in ("spool", "inbox", "deadLetters")}
        counts |= {name: getattr(database, name) for name in ("sessions", "events", "messages")}
        record = {
            subject.kind: subject.value,
            "dryRun": not done,
            "removed": counts,
            "left": survey.left,
            "transcripts": database.transcript_paths,
            "mayRemain": REMAINS,
        }
        show_json([record])
        return
    show(_lines(f"{subject}: {'removed' if done else 'found'}", removed, survey.places))
    if done:
        show(["What may still hold it:", *(f"  - {text}" for text in REMAINS.values())])
    show(f"  transcript    {display.safe(path)}" for path in database.transcript_paths)
    for line in survey.left:
        tell(f"not removed: {line}")


def _lines(heading: str, removed: Removed, places: Places) -> Iterator[str]:
    database, waiting = removed
    yield display.safe(heading)
    sessions = f"{database.sessions:,} sessions, {database.events:,} events"
    yield f"  database      {sessions}, {database.messages:,} messages in the token ledger"
    yield f"  spool         {waiting['spool']:,} records in {display.safe(str(places.spool))}"
    yield f"  inbox         {waiting['inbox']:,} files in {display.safe(str(places.inbox))}"
    yield f"  dead letters  {waiting['deadLetters']:,}"
