"""Backup and restore: one file, made and loaded by the server's own programs, and verified.

What the file looks like is in backup_file.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlunsplit

from contextuate_persist import encryption, schema
from contextuate_persist.backup_file import (
    FORMAT,
    STRUCTURE,
    Backup,
    Counting,
    Parts,
    Progress,
    Reader,
    Writer,
    compressed,
    decompressed,
    json_line,
    read_lines,
)
from contextuate_persist.base import BaseStore
from contextuate_persist.config import open_store, split_url
from contextuate_persist.dumps import Contents, Load, Program, Snapshot, Sums
from contextuate_persist.errors import ConfigurationError, DamagedFile, SchemaError
from contextuate_persist.spool import sync_directory

_SHOWN = 5  # differences
#: What mysqldump writes when its snapshot is taken.
_BEGUN = b"-- Dumping data for table"

# --- Making one -----------------------------------------------------------------------------------


def backup(
    store: BaseStore,
    path: str | os.PathLike[str],
    *,
    recipients: Sequence[str] = (),
    progress: Progress | None = None,
) -> Backup:
    """Write everything that an open store holds into one new file; writers may go on meanwhile.

    The rows are those of one moment. With `recipients`, keys of age or files of them, the file is
    encrypted for these. A directory as `path` gets a file named after database and time. The file
    comes to its name when it is whole and on the disk; FileExistsError if there is one already. Any
    account that may read all tables will do.

    Raises ConfigurationError if the server's programs are missing, OSError for what is wrong with
    the disk, and what a store raises.
    """
    from contextuate_persist import __version__  # noqa: PLC0415  (it imports this)

    keys = encryption.recipients(recipients) if recipients else []
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about: dict[str, Any] = {"format": FORMAT, "backend": store.backend, "made": made}
    about["library"] = __version__
    store.require_all_events()
    with contextlib.ExitStack() as stack:
        snapshot = stack.enter_context(store.snapshot())
        contents = snapshot.contents()
        target = _target(store.backend, contents.database, Path(path), encrypted=bool(keys))
        counting = Counting(stack.enter_context(_new_file(target)), progress)
        stream: IO[bytes] = counting  # type: ignore[assignment]
        if keys:
            stream = stack.enter_context(encryption.encrypted(stream, keys))
        writer = stack.enter_context(Writer(stream))
        moving = _write(store, snapshot, contents, writer, about)
        store.require_all_events()  # some may have been taken aside before the dump came to them
        writer.finish()
    return Backup(
        path=str(target),
        backend=store.backend,
        database=contents.database,
        made=made,
        library=__version__,
        program=about["program"],
        encrypted=bool(keys),
        bytes=counting.count,
        contents=contents,
        moving=moving,
    )


def _write(
    store: BaseStore,
    snapshot: Snapshot,
    contents: Contents,
    writer: Writer,
    about: dict[str, Any],
) -> int:
    """Write all members; how many sessions moved."""
    dumper = store.dumper(contents.server)
    about["program"] = dumper.version
    about |= {name: getattr(contents, name) for name in ("database", "server", "version", "layout")}
    writer.add("backup.json", json_line(about))
    writer.add("schema.sql", _script(store.backend, contents.layout))
    writer.add(STRUCTURE[store.backend], dumper.structure(contents, snapshot))
    with contextlib.ExitStack() as stack:
        later = None
        with dumper.data(contents, snapshot) as program:
            if snapshot.name is not None:
                writer.add_parts("data", program.read())
            else:
                # The dump sees a moment after that of `snapshot`: what did not change between it
                # and another moment, after the dump has begun, is in the dump as well.
                head = _begin(program)
                later = stack.enter_context(store.snapshot())
                writer.add_parts("data", compressed(itertools.chain([head], program.read())))
            program.finish()
        lines = _Lines(snapshot.sums(), later.sums() if later is not None else None)
        manifest: dict[str, Any] = {"contents": contents.wire()}
        if later is not None:
            manifest["later"] = later.contents().wire()
        writer.add_parts("sessions", compressed(iter(lines)))
    writer.add("manifest.json", json_line({**about, **manifest, "moving": lines.moving}))
    return lines.moving


def _script(backend: str, layout: str) -> bytes:
    script = schema.schema_file(f"{backend}-schema.sql").read_bytes()
    if backend == "postgresql" and layout != "plain":  # it has a function of its own
        script += schema.schema_file(f"{backend}-{layout}.sql").read_bytes()
    return script


def _target(backend: str, database: str, path: Path, *, encrypted: bool) -> Path:
    if path.is_dir():
        now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        path /= f"{name_of(backend, database)}{now}.backup{'.age' if encrypted else ''}"
    if path.exists() or path.is_symlink():
        raise _is_there(path)
    return path


def name_of(backend: str, database: str) -> str:
    """How the names of a database's backups begin: several may have one directory."""
    return f"contextuate-{backend}-{re.sub('[^A-Za-z0-9_]', '_', database)}-"


def _is_there(path: Path) -> FileExistsError:
    return FileExistsError(17, "is there already: a backup overwrites nothing", str(path))


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[IO[bytes]]:
    """A file that has its name only when the block has ended well, and is on the disk then."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(partial, target)
        sync_directory(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _rename(partial: Path, target: Path) -> None:
    """Give a file its name; raises FileExistsError if another has it."""
    try:
        os.link(partial, target)  # which, unlike a rename, overwrites nothing
    except FileExistsError:
        raise _is_there(target) from None
    except OSError as error:
        # exFAT and many network mounts have no links.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        partial.replace(target)


def _begin(program: Program) -> bytes:
    """Read until the dump's first table: its snapshot is taken then."""
    head = b""
    for data in program.read():
        head += data
        if _BEGUN in head:
            break
    return head


class _Lines:
    """The lines of sessions.*: what a session held, or if it moved, before and after."""

    def __init__(self, sums: Iterator[Sums], later: Iterator[Sums] | None = None) -> None:
        self.moving = 0
        self._sums, self._later = sums, later

    def __iter__(self) -> Iterator[bytes]:
        if self._later is None:
            for one in self._sums:
                yield json_line([one])
            return
        for before, after in _paired(self._sums, self._later):
            if before == after:
                yield json_line([before])
            else:
                self.moving += 1
                yield json_line([before, after])


def _paired(
    left: Iterator[Sums], right: Iterator[Sums]
) -> Iterator[tuple[Sums | None, Sums | None]]:
    """Both in one pass, by session; None for one that only the other has."""
    ours, theirs = next(left, None), next(right, None)
    while ours is not None or theirs is not None:
        first = min(one.session_id.encode() for one in (ours, theirs) if one is not None)
        mine = ours if ours is not None and ours.session_id.encode() == first else None
        other = theirs if theirs is not None and theirs.session_id.encode() == first else None
        yield mine, other
        ours = next(left, None) if mine is not None else ours
        theirs = next(right, None) if other is not None else theirs


def verify_backup(
    path: str | os.PathLike[str],
    *,
    identity: str | os.PathLike[str] | None = None,
    passphrase_file: Path | None = None,
    progress: Progress | None = None,
) -> Backup:
    """Read a backup to its end, without any database: is it whole, and as it was written?

    Raises DamagedFile, naming it, if not; ConfigurationError if it is encrypted and `identity`, a
    file of secret keys, is missing or is another's; OSError if it cannot be read.
    """
    return Reader(path, identity, passphrase_file, progress).verify()


# --- Restoring ------------------------------------------------------------------------------------


def restore(
    store: BaseStore,
    path: str | os.PathLike[str],
    *,
    identity: str | os.PathLike[str] | None = None,
    passphrase_file: Path | None = None,
    progress: Progress | None = None,
    is_trial: bool = False,
) -> Backup:
    """Load a backup into an empty database, as its owner, and compare what is there then.

    The store need not be open. The database has no tables of ours, or the schema and no rows: then
    its privileges stay as they are. The whole file is verified before anything is changed, and rows
    come all or none: one that was killed may be run again. Counts, and the sums of every session,
    are compared with those that were taken with the backup. With `is_trial` MySQL leaves the rows
    out of its binary log, if the account may ask for that. A database that holds just what the
    backup does, as one that was killed while it compared has left it, is compared only.

    Raises what `verify_backup` raises; ConfigurationError for a database that holds data and for a
    backup of the other kind of server; SchemaError for another version of the schema; DamagedFile
    if what was loaded is not what was saved.
    """
    reader = Reader(path, identity, passphrase_file, progress)
    found = reader.verify()
    contents = found.contents
    if found.backend != store.backend:
        raise ConfigurationError(
            f"{path}: a backup of {found.backend}, and the database is {store.backend}: restore "
            f"into {found.backend}, then copy from there"
        )
    if contents.version != schema.SCHEMA_VERSION:
        raise SchemaError(
            f"{path}: has schema version {contents.version}, this library knows "
            f"{schema.SCHEMA_VERSION}: restore it with contextuate-persist {found.library}, which "
            "made it, then upgrade"
        )
    with store.schema_session() as session, reader.members() as members:
        if _holds_data(session):
            _recognize(store, session, reader, members)
            return found
        with_structure = _needs_structure(session, contents)
        dumper = store.dumper(contents.server, found.program)
        data = Parts(members, "data")
        rows = iter(data) if store.backend == "postgresql" else decompressed(iter(data))
        loaded = Load(
            contents=contents,
            with_structure=with_structure,
            script=_statements(reader.small.script, store.backend),
            structure=reader.small.structure,
            data=rows,
            is_trial=is_trial,
        )
        dumper.load(session, loaded)
        _compare(store, reader, data.rest())
    return found


def _statements(script: str, backend: str) -> list[str]:
    # The version is the structure's own to say.
    return [
        one
        for one in schema.split_script(script, backend)
        if not one.startswith("INSERT INTO schema_version")
    ]


def _holds_data(session: schema.SchemaSession) -> bool:
    columns = session.read_columns()
    return any(session.has_rows(name) for name in _OURS if name in columns)


def _recognize(
    store: BaseStore,
    session: schema.SchemaSession,
    reader: Reader,
    members: Iterable[tuple[str, bytes]],
) -> None:
    """Complete what was killed after all rows had come; raises for a database with other data."""
    refusal = ConfigurationError(
        f"{session.place} holds data, and restore overwrites nothing: make another database "
        "(`setup --database NAME` does) and restore into that"
    )
    before, after = _both_moments(reader)
    if session.read_version() != (before.version, before.layout):
        raise refusal
    with store.snapshot() as snapshot:
        now = snapshot.contents()
    for name in _COUNTED:
        bounds = sorted((getattr(before, name), getattr(after, name)))
        if not bounds[0] <= getattr(now, name) <= bounds[1]:
            raise refusal
    try:
        _compare(store, reader, members)
    except DamagedFile:
        raise refusal from None
    if store.backend == "mysql":  # whose rows are committed before these
        for statement in session.around(before)[1]:
            session.run(statement)


def _both_moments(reader: Reader) -> tuple[Contents, Contents]:
    """What there was right before and right after the rows were read; mostly the same."""
    manifest = reader.small.manifest
    before = Contents.of(manifest["contents"])
    return before, Contents.of(manifest.get("later", manifest["contents"]))


def _needs_structure(session: schema.SchemaSession, contents: Contents) -> bool:
    """Whether the database, which is empty, has no schema yet; raises if it has another."""
    version, columns = session.read_version(), session.read_columns()
    ours = [name for name in _OURS if name in columns]
    if version is None:
        if ours and "schema_version" not in columns:
            raise SchemaError(
                f"{session.place} has tables {', '.join(ours)} of another origin: use an empty "
                "database"
            )
        return True
    if version != (contents.version, contents.layout):
        way = "restore into a database without a schema"
        if contents.layout == "partitioned" and version.layout == "plain":
            way = "run `partition` and `partition --discard-old` there first, or " + way
        raise SchemaError(
            f"{session.place} has schema version {version.version} ({version.layout}), the backup "
            f"{contents.version} ({contents.layout}): {way}"
        )
    return False


_OURS = ("sessions", "events", "event_ids", "token_ledger", "deleted_sessions")
_COUNTED = ("sessions", "events", "messages", "deletions", "ids")


def _compare(store: BaseStore, reader: Reader, members: Iterable[tuple[str, bytes]]) -> None:
    """Compare what is in the database with what the backup says; raises DamagedFile."""
    before, after = _both_moments(reader)
    lines = read_lines(decompressed(Parts(members, "sessions")))
    wrong: list[str] = []
    count = 0
    with store.snapshot() as snapshot:
        now = snapshot.contents()
        # Between two moments there may be fewer than at both: what is pruned goes in large steps.
        if before == after:
            wrong += [
                f"{getattr(now, n):,} {n} instead of {getattr(before, n):,}"
                for n in _COUNTED
                if getattr(now, n) != getattr(before, n)
            ]
            sums = ("deletions_sum", "ids_sum")
            wrong += [f"another {n}" for n in sums if getattr(now, n) != getattr(before, n)]
        for expected, found in _matched(lines, snapshot.sums()):
            if not _fits(expected, found):
                count += 1
                if count <= _SHOWN:
                    one = next(one for one in (found, *expected) if one is not None)
                    wrong.append(f"session {one.session_id[:80]}")
    if wrong:
        more = f" and {count - _SHOWN:,} more sessions" if count > _SHOWN else ""
        raise DamagedFile(
            f"{reader.path}: loaded, but the database differs from the backup: "
            f"{'; '.join(wrong)}{more}; does somebody write into it?"
        )


def _matched(
    lines: Iterator[list[Sums | None]], found: Iterator[Sums]
) -> Iterator[tuple[list[Sums | None], Sums | None]]:
    expected, one = next(lines, None), next(found, None)
    while expected is not None or one is not None:
        names = [_session_of(expected)] if expected is not None else []
        names += [one.session_id.encode()] if one is not None else []
        first = min(names)
        theirs = expected if expected is not None and _session_of(expected) == first else []
        ours = one if one is not None and one.session_id.encode() == first else None
        yield theirs, ours
        expected = next(lines, None) if theirs else expected
        one = next(found, None) if ours is not None else one


def _session_of(line: list[Sums | None]) -> bytes:
    return next(one.session_id for one in line if one is not None).encode()


def _fits(expected: list[Sums | None], found: Sums | None) -> bool:
    if found in expected:
        return True
    if len(expected) < 2 or found is None:
        return len(expected) == 2 and None in expected
    bounds = [one if one is not None else Sums("", 0, 0, 0, 0, 0) for one in expected]
    return all(
        min(getattr(one, name) for one in bounds)
        <= getattr(found, name)
        <= max(getattr(one, name) for one in bounds)
        for name in ("events", "messages")
    )


def restore_test(
    path: str | os.PathLike[str],
    url: str,
    *,
    identity: str | os.PathLike[str] | None = None,
    passphrase_file: Path | None = None,
    progress: Progress | None = None,
) -> Backup:
    """Restore a backup into a new database on the server of an administrator, and drop that again.

    What a backup is good for, no other check can tell. Raises what `restore` raises.
    """
    name = f"contextuate_restore_{secrets.token_hex(4)}"
    with _of_administrator(url).scratch(name) as store:
        return restore(
            store,
            path,
            identity=identity,
            passphrase_file=passphrase_file,
            progress=progress,
            is_trial=True,
        )


def left_by_tests(url: str) -> list[str]:
    """The databases on an administrator's server that tests of restoring have, and nobody uses.

    A test that is killed leaves its own.
    """
    return [str(name) for (name,) in _of_administrator(url).survey()["scratch"] or ()]


def _of_administrator(url: str) -> BaseStore:
    if url.partition("://")[0] == "mysql" and not (parts := split_url(url)).path.strip("/"):
        url = urlunsplit(parts._replace(path="/mysql"))  # it needs one to connect to
    return open_store(url)
