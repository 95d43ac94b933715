"""The file of a backup: what lies in it, written and read in constant memory.

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
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from contextuate_persist import encryption
from contextuate_persist.dumps import Contents, Sums
from contextuate_persist.errors import ConfigurationError, DamagedFile

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = 1
PART_BYTES = 8 * 2**20
_MEMBER_BYTES = 64 * 2**20  # of any member that is read
STRUCTURE = {"postgresql": "structure.dump", "mysql": "structure.sql"}

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


# --- Writing one ----------------------------------------------------------------------------------


def compressed(parts: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(3, wbits=31)
    for part in parts:
        if data := compressor.compress(part):
            yield data
    yield compressor.flush()


class Counting:
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


class Writer:
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


def json_line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


# --- Reading one ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Small:
    """The members that are read whole."""

    about: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    script: str = ""
    structure: bytes = b""


class Reader:
    """Reads a backup file, as often as it is needed."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: str | os.PathLike[str] | None,
        passphrase_file: Path | None,
        progress: Progress | None,
    ) -> None:
        self.path = Path(path)
        self.small = Small()
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

    def about(self) -> dict[str, Any]:
        """What it says of itself at its beginning; raises DamagedFile."""
        with self.members() as members:
            for name, data in members:
                self._keep(name, data)
                break
        return self.small.about

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
                if small.about["format"] != FORMAT or small.about["backend"] not in STRUCTURE:
                    raise self._damaged("a backup of a newer contextuate-persist")
            elif not small.about:
                raise self._damaged("no backup of contextuate-persist")
            elif name == "manifest.json":
                small.manifest = json.loads(data)
            elif name == "schema.sql":
                small.script = data.decode()
            elif name in STRUCTURE.values():
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


class Parts:
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


def decompressed(parts: Iterable[bytes]) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(wbits=31)
    for part in parts:
        data = decompressor.decompress(part, 2**20)
        while data:
            yield data
            data = decompressor.decompress(decompressor.unconsumed_tail, 2**20)
    yield decompressor.flush()


def read_lines(data: Iterable[bytes]) -> Iterator[list[Sums | None]]:
    rest = b""
    for piece in data:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield [Sums(*one) if one is not None else None for one in json.loads(line)]
