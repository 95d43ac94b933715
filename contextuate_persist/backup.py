"""Backup and restore: one file, made and loaded by the server's own programs, and verified.

The file is a tar, which with keys is encrypted as a whole (`age`). Its members, in their order:

    backup.json        which database, when, by which programs
    schema.sql         the schema of schemas/, for what belongs to no table
    structure.dump     PostgreSQL: tables and indexes (custom format); MySQL: structure.sql
    data.NNNNNN        PostgreSQL: the rows (custom format); MySQL: SQL, compressed with gzip
    sessions.NNNNNN    a line for each session, its counts and sums, compressed with gzip
    manifest.json      counts of the whole
    SHA256SUMS         of all members before it, for `sha256sum -c`

Put together, data.* is what the program wrote: `cat data.*`. Memory is bounded by one member.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import secrets
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit, urlunsplit

from contextuate_persist import encryption, schema
from contextuate_persist.base import BaseStore
from contextuate_persist.config import open_store
from contextuate_persist.dumps import Contents, Load, Program, Sums
from contextuate_persist.errors import (
    ConfigurationError,
    DamagedFile,
    SchemaError,
)
from contextuate_persist.spool import sync_directory

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = 1
PART_BYTES = 8 * 2**20
_MEMBER_BYTES = 64 * 2**20  # of any member that is read
_SHOWN = 5  # differences
_STRUCTURE = {"postgresql": "structure.dump", "mysql": "structure.sql"}
#: What mysqldump writes when its snapshot is taken.
_BEGUN = b"-- Dumping data for table"

#: Called with the bytes written, or read, so far.
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """What a backup file holds.

    `moving` sessions were written to while a MySQL dump began: of these it is known what they held
    before and after that moment, and not at it.
    """

    path: str
    backend: str
    database: str
    made: str
    library: str
    program: str
    encrypted: bool
    bytes: int
    contents: Contents
    moving: int


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
    encrypted for these. A directory as `path` gets a file named after the time. The file comes to
    its name when it is whole and on the disk; FileExistsError if there is one already. Any account
    that may read all tables will do.

    Raises ConfigurationError if the server's programs are missing, OSError for what is wrong with
    the disk, and what a store raises.
    """
    from contextuate_persist import __version__  # noqa: PLC0415  (it imports this)

    keys = encryption.recipients(recipients) if recipients else []
    target = _target(store, Path(path), encrypted=bool(keys))
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_new_file(target))
        counting = _Counting(file, progress)
        stream: IO[bytes] = counting  # type: ignore[assignment]
        if keys:
            stream = stack.enter_context(encryption.encrypted(stream, keys))
        snapshot = stack.enter_context(store.snapshot())
        contents = snapshot.contents()
        dumper = store.dumper(contents.server)
        about = {
            "format": FORMAT,
            "backend": store.backend,
            "database": contents.database,
            "made": made,
            "library": __version__,
            "program": dumper.version,
            **{
                name: getattr(contents, name)
                for name in ("server", "version", "layout", "namespace")
            },
        }
        writer = stack.enter_context(_Writer(stream))
        writer.add("backup.json", _json(about))
        writer.add("schema.sql", _script(store.backend, contents.layout))
        writer.add(_STRUCTURE[store.backend], dumper.structure(contents, snapshot))
        with dumper.data(contents, snapshot) as program:
            if snapshot.name is not None:
                writer.add_parts("data", program.read())
                program.finish()
                lines, moving = _Lines(snapshot.sums()), None
            else:
                # The dump sees a moment after that of `snapshot`: what did not change between it
                # and another moment, after the dump has begun, is in the dump as well.
                head = _begin(program)
                later = stack.enter_context(store.snapshot())
                writer.add_parts("data", _compressed(itertools.chain([head], program.read())))
                program.finish()
                lines, moving = _Lines(snapshot.sums(), later.sums()), later.contents()
        writer.add_parts("sessions", _compressed(iter(lines)))
        manifest = {**about, "contents": contents.wire(), "moving": lines.moving}
        if moving is not None:
            manifest["later"] = moving.wire()
        writer.add("manifest.json", _json(manifest))
        writer.finish()
    return Backup(
        path=str(target),
        backend=store.backend,
        database=contents.database,
        made=made,
        library=__version__,
        program=dumper.version,
        encrypted=bool(keys),
        bytes=counting.count,
        contents=contents,
        moving=lines.moving,
    )


def _script(backend: str, layout: str) -> bytes:
    script = schema.schema_file(f"{backend}-schema.sql").read_bytes()
    if backend == "postgresql" and layout != "plain":  # it has a function of its own
        script += schema.schema_file(f"{backend}-{layout}.sql").read_bytes()
    return script


def _target(store: BaseStore, path: Path, *, encrypted: bool) -> Path:
    if path.is_dir():
        now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        path /= f"contextuate-{store.backend}-{now}.backup{'.age' if encrypted else ''}"
    if path.exists() or path.is_symlink():
        raise FileExistsError(17, "is there already: a backup overwrites nothing", str(path))
    return path


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
        os.link(partial, target)  # which, unlike a rename, overwrites nothing
        sync_directory(target.parent)
    finally:
        partial.unlink()


def _begin(program: Program) -> bytes:
    """Read until the dump's first table: its snapshot is taken then."""
    head = b""
    for data in program.read():
        head += data
        if _BEGUN in head:
            break
    return head


def _compressed(parts: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(3, wbits=31)
    for part in parts:
        if data := compressor.compress(part):
            yield data
    yield compressor.flush()


class _Lines:
    """The lines of sessions.*: what a session held, or if it moved, before and after."""

    def __init__(self, sums: Iterator[Sums], later: Iterator[Sums] | None = None) -> None:
        self.moving = 0
        self._sums, self._later = sums, later

    def __iter__(self) -> Iterator[bytes]:
        if self._later is None:
            for one in self._sums:
                yield _json([one])
            return
        for before, after in _paired(self._sums, self._later):
            if before == after:
                yield _json([before])
            else:
                self.moving += 1
                yield _json([before, after])


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


class _Counting:
    """A stream that counts what is written to it."""

    def __init__(self, stream: IO[bytes], progress: Progress | None) -> None:
        self.count = 0
        self._stream, self._progress = stream, progress

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        self.count += len(data)
        if self._progress is not None:
            self._progress(self.count)
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


class _Writer:
    """Writes members into a tar, and their sums as the last."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._broken = False
        own = cast("IO[bytes]", self)
        self._tar = tarfile.open(fileobj=own, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._sums: list[str] = []

    def write(self, data: bytes) -> int:
        """For the tar, which writes what it still has when it is thrown away, too."""
        return len(data) if self._broken else self._stream.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._broken = kind is not None

    def add(self, name: str, data: bytes) -> None:
        self._sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
        self._put(name, data)

    def _put(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
        self._tar.addfile(info, io.BytesIO(data))

    def add_parts(self, name: str, data: Iterable[bytes]) -> None:
        numbers, part = itertools.count(), bytearray()
        for piece in data:
            part += piece
            while len(part) >= PART_BYTES:
                self.add(f"{name}.{next(numbers):06}", bytes(part[:PART_BYTES]))
                del part[:PART_BYTES]
        self.add(f"{name}.{next(numbers):06}", bytes(part))

    def finish(self) -> None:
        self._put("SHA256SUMS", "".join(self._sums).encode())
        self._tar.close()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


# --- Reading one ----------------------------------------------------------------------------------


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
    return _Reader(path, identity, passphrase_file, progress).verify()


@dataclass(slots=True)
class _Small:
    """The members that are read whole."""

    about: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    script: str = ""
    structure: bytes = b""


class _Reader:
    """Reads a backup file, as often as it is needed."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: str | os.PathLike[str] | None,
        passphrase_file: Path | None,
        progress: Progress | None,
    ) -> None:
        self.path = Path(path)
        self.small = _Small()
        self._progress = progress
        with self.path.open("rb") as file:
            self._encrypted = encryption.is_encrypted(file.read(64))
        if self._encrypted and identity is None:
            raise ConfigurationError(f"{path}: encrypted: give --identity FILE, its secret key")
        self._keys = (
            encryption.identities(identity, passphrase_file)
            if self._encrypted and identity is not None
            else []
        )

    def _damaged(self, reason: str) -> DamagedFile:
        return DamagedFile(f"{self.path}: {reason}")

    @contextlib.contextmanager
    def members(self) -> Iterator[Iterator[tuple[str, bytes]]]:
        with contextlib.ExitStack() as stack:
            stream: IO[bytes] = stack.enter_context(self.path.open("rb"))
            if self._encrypted:
                opened = encryption.decrypted(stream, self._keys, str(self.path))
                stream = stack.enter_context(opened)
            yield self._members(stream)

    def _members(self, stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
        done = 0
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for info in tar:
                    if not info.isreg() or info.size > _MEMBER_BYTES:
                        raise self._damaged("no backup, or damaged")
                    opened = tar.extractfile(info)
                    assert opened is not None  # noqa: S101  (a regular file)
                    yield info.name, opened.read()
                    done += info.size
                    if self._progress is not None:
                        self._progress(done)
            if self._encrypted:
                stream.read()  # to where the encryption says that it is whole
        except (tarfile.TarError, EOFError):
            reason = "no backup, or damaged or cut short" if not done else "damaged or cut short"
            raise self._damaged(reason) from None

    def verify(self) -> Backup:
        """Read all, compare with SHA256SUMS, keep the small members."""
        sums: list[str] = []
        stated: bytes | None = None
        with self.members() as members:
            for name, data in members:
                if stated is not None:
                    raise self._damaged("something follows its end")
                if name == "SHA256SUMS":
                    stated = data
                    continue
                sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
                self._keep(name, data)
        if stated is None or not self.small.manifest:
            raise self._damaged("cut short: its end is missing")
        if stated != "".join(sums).encode():
            raise self._damaged("damaged: a member is not as it was written")
        return self._summary()

    def _keep(self, name: str, data: bytes) -> None:
        small = self.small
        try:
            if name == "backup.json":
                small.about = json.loads(data)
                if small.about["format"] != FORMAT or small.about["backend"] not in _STRUCTURE:
                    raise self._damaged("a backup of a newer contextuate-persist")
            elif not small.about:
                raise self._damaged("no backup of contextuate-persist")
            elif name == "manifest.json":
                small.manifest = json.loads(data)
            elif name == "schema.sql":
                small.script = data.decode()
            elif name in _STRUCTURE.values():
                small.structure = data
        except (ValueError, KeyError, TypeError):
            raise self._damaged(f"damaged: {name} cannot be read") from None

    def _summary(self) -> Backup:
        about, manifest = self.small.about, self.small.manifest
        try:
            return Backup(
                path=str(self.path),
                backend=about["backend"],
                database=about["database"],
                made=about["made"],
                library=about["library"],
                program=about["program"],
                encrypted=self._encrypted,
                bytes=self.path.stat().st_size,
                contents=Contents.of(manifest["contents"]),
                moving=manifest["moving"],
            )
        except (KeyError, TypeError):
            raise self._damaged("damaged: manifest.json lacks what it should say") from None


# --- Restoring ------------------------------------------------------------------------------------


def restore(
    store: BaseStore,
    path: str | os.PathLike[str],
    *,
    identity: str | os.PathLike[str] | None = None,
    passphrase_file: Path | None = None,
    progress: Progress | None = None,
) -> Backup:
    """Load a backup into an empty database, as its owner, and compare what is there then.

    The store need not be open. The database has no tables of ours, or the schema and no rows: then
    its privileges stay as they are. The whole file is verified before anything is changed, and rows
    come all or none: one that was killed may be run again. Counts, and the sums of every session,
    are compared with those that were taken with the backup.

    Raises what `verify_backup` raises; ConfigurationError for a database that holds data and for a
    backup of the other kind of server; SchemaError for another version of the schema; DamagedFile
    if what was loaded is not what was saved.
    """
    reader = _Reader(path, identity, passphrase_file, progress)
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
    with store.schema_session() as session:
        with_structure = _needs_structure(session, contents)
        dumper = store.dumper(contents.server, found.program)
        with reader.members() as members:
            data = _Parts(members, "data")
            rows = iter(data) if store.backend == "postgresql" else _decompressed(iter(data))
            loaded = Load(
                contents=contents,
                with_structure=with_structure,
                script=_statements(reader.small.script, store.backend),
                structure=reader.small.structure,
                data=rows,
            )
            dumper.load(session, loaded)
            lines = _lines(_decompressed(itertools.chain(_Parts(data.rest(), "sessions"))))
            _compare(store, reader, lines)
    return found


def _statements(script: str, backend: str) -> list[str]:
    # The version is the structure's own to say.
    return [
        one
        for one in schema.split_script(script, backend)
        if not one.startswith("INSERT INTO schema_version")
    ]


def _needs_structure(session: schema.SchemaSession, contents: Contents) -> bool:
    """Whether the database has no schema yet; raises if it is not empty."""
    version, columns = session.read_version(), session.read_columns()
    ours = [name for name in _OURS if name in columns]
    if any(session.has_rows(name) for name in ours):
        raise ConfigurationError(
            f"{session.place} holds data, and restore overwrites nothing: make another database "
            "(`setup --database NAME` does) and restore into that"
        )
    if version is None:
        if ours and "schema_version" not in columns:
            raise SchemaError(
                f"{session.place} has tables {', '.join(ours)} of another origin: use an empty "
                "database"
            )
        return True
    if version != (contents.version, contents.layout):
        raise SchemaError(
            f"{session.place} has schema version {version.version} ({version.layout}), the backup "
            f"{contents.version} ({contents.layout}): restore into a database without a schema"
        )
    return False


_OURS = ("sessions", "events", "event_ids", "token_ledger", "deleted_sessions")


class _Parts:
    """The members of one name, and then what follows them."""

    def __init__(self, members: Iterable[tuple[str, bytes]], name: str) -> None:
        self._members = iter(members)
        self._name = name
        self._next: list[tuple[str, bytes]] = []

    def __iter__(self) -> Iterator[bytes]:
        seen = False
        for name, data in self._members:
            if name.startswith(f"{self._name}."):
                seen = True
                yield data
            elif seen:
                self._next = [(name, data)]
                return

    def rest(self) -> Iterator[tuple[str, bytes]]:
        return itertools.chain(self._next, self._members)


def _decompressed(parts: Iterable[bytes]) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(wbits=31)
    for part in parts:
        data = decompressor.decompress(part, 2**20)
        while data:
            yield data
            data = decompressor.decompress(decompressor.unconsumed_tail, 2**20)
    yield decompressor.flush()


def _lines(data: Iterable[bytes]) -> Iterator[list[Sums | None]]:
    rest = b""
    for piece in data:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield [Sums(*one) if one is not None else None for one in json.loads(line)]


def _compare(store: BaseStore, reader: _Reader, lines: Iterator[list[Sums | None]]) -> None:
    """Compare what is in the database with what the backup says; raises DamagedFile."""
    manifest = reader.small.manifest
    before = Contents.of(manifest["contents"])
    after = Contents.of(manifest.get("later", manifest["contents"]))
    wrong: list[str] = []
    count = 0
    with store.snapshot() as snapshot:
        now = snapshot.contents()
        for name in ("sessions", "events", "messages", "deletions", "ids"):
            bounds = sorted((getattr(before, name), getattr(after, name)))
            if not bounds[0] <= getattr(now, name) <= bounds[1]:
                wrong.append(f"{getattr(now, name):,} {name} instead of {bounds[0]:,}")
        if before == after:
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
    parts = urlsplit(url)
    if parts.scheme == "mysql" and not parts.path.strip("/"):
        url = urlunsplit(parts._replace(path="/mysql"))  # it needs one to connect to
    name = f"contextuate_restore_{secrets.token_hex(4)}"
    with open_store(url).scratch(name) as store:
        return restore(
            store, path, identity=identity, passphrase_file=passphrase_file, progress=progress
        )
