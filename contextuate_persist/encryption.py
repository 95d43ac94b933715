"""Encrypted files in the age format: streams of any length in constant memory, through pyrage.

Who has the key needs nothing of ours to open them: `age -d -i KEY FILE`. The keys are those of
`age-keygen`, whose secret part may itself be encrypted under a passphrase (`age -p`).
"""

from __future__ import annotations

import getpass
import importlib
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from contextuate_persist.errors import ConfigurationError, DamagedFile
from contextuate_persist.spool import sync_directory

_PUBLIC = "age1"
_SECRET = "AGE-SECRET-KEY-1"  # noqa: S105  (how every secret key begins)
_HEAD = b"age-encryption.org/"
_ARMOUR = b"-----BEGIN AGE ENCRYPTED FILE-----"
_KEY_FILE_BYTES = 2**20

_logger = logging.getLogger(__name__)


def is_encrypted(head: bytes) -> bool:
    """Whether a file that begins so, with 64 bytes or more, is in the age format."""
    return head.startswith((_HEAD, _ARMOUR))


# --- Keys -----------------------------------------------------------------------------------------


def recipients(words: Sequence[str]) -> list[Any]:
    """The public keys to encrypt for, each named by itself (`age1...`) or by a file of them.

    A file has one key a line; empty lines and those with # are left out. Raises ConfigurationError
    for no key at all, for what is none, and without the library.
    """
    pyrage = _library()
    found: list[Any] = []
    for word in words:
        lines = [(word, word)] if word.startswith(_PUBLIC) else _key_lines(Path(word))
        for place, line in lines:
            if line.upper().startswith(_SECRET):  # never repeat it
                raise ConfigurationError(
                    f"{place if place != line else 'key'}: that is a secret key: encrypt for the "
                    "public one, which begins with age1"
                )
            try:
                found.append(pyrage.x25519.Recipient.from_str(line))
            except pyrage.RecipientError:
                raise ConfigurationError(
                    f"{place[:100]}: no public key of age, which begins with age1"
                ) from None
    if not found:
        raise ConfigurationError("encryption: no public key is given")
    return found


def identities(path: str | os.PathLike[str], passphrase_file: Path | None = None) -> list[Any]:
    """The secret keys of a file, to decrypt with; warns of a file that others can read.

    The passphrase of a file that has one is read from the first line of `passphrase_file`, else
    asked for on the terminal. Raises ConfigurationError for what is no key, a wrong passphrase, and
    without the library.
    """
    pyrage = _library()
    file = Path(path)
    content = _read(file)
    if is_encrypted(content):
        passphrase = _passphrase(file, passphrase_file)
        try:
            content = pyrage.passphrase.decrypt(content, passphrase)
        except pyrage.DecryptError:
            raise ConfigurationError(
                f"{file}: the passphrase is wrong, or the file is damaged"
            ) from None
    elif file.stat().st_mode & 0o077:
        _logger.warning("%s holds a secret key and others can read it: chmod 600 it", file)
    found: list[Any] = []
    for number, line in _lines(content):
        try:
            found.append(pyrage.x25519.Identity.from_str(line))
        except pyrage.IdentityError:
            raise ConfigurationError(
                f"{file}:{number}: no secret key of age, which begins with {_SECRET}"
            ) from None
    if not found:
        raise ConfigurationError(f"{file}: holds no secret key")
    return found


def new_identity(path: str | os.PathLike[str]) -> str:
    """Make a key pair: the secret key in a new file that only its owner reads; the public one.

    Raises FileExistsError: a key is never overwritten.
    """
    key = _library().x25519.Identity.generate()
    public = str(key.to_public())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"# public key: {public}\n{key}\n")
        file.flush()
        os.fsync(descriptor)
    sync_directory(Path(path).absolute().parent)  # what it will encrypt nobody else opens
    return public


def _library() -> Any:
    try:
        return importlib.import_module("pyrage")
    except ImportError:
        raise ConfigurationError(
            "encryption needs a library that is not installed: pip install "
            "'contextuate-persist[encryption]'"
        ) from None


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_KEY_FILE_BYTES)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        if _SECRET in str(file).upper():  # never repeat it
            raise ConfigurationError(
                "key: that is a secret key itself: to decrypt name its file, to encrypt give the "
                "public one, which begins with age1"
            ) from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"{str(file)[:200]}: cannot be read: {reason}") from None


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        if (text := line.strip()) and not text.startswith("#"):
            yield number, text


def _key_lines(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in _lines(_read(file)):
        yield f"{file}:{number}", line


def _passphrase(file: Path, passphrase_file: Path | None) -> str:
    if passphrase_file is not None:
        if passphrase_file.exists() and passphrase_file.stat().st_mode & 0o077:
            _logger.warning(
                "%s holds a passphrase and others can read it: chmod 600 it", passphrase_file
            )
        return _read(passphrase_file).split(b"\n", 1)[0].rstrip(b"\r").decode("utf-8", "replace")
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigurationError(
            f"{file}: has a passphrase, and there is no terminal to ask for it"
        )
    try:
        return getpass.getpass(f"Passphrase of {file.name}: ")
    except EOFError:
        raise ConfigurationError(f"{file}: has a passphrase, and none was given") from None


# --- Streams --------------------------------------------------------------------------------------


def encrypt(source: IO[bytes], target: IO[bytes], keys: Sequence[Any]) -> None:
    """Write a stream's content encrypted; what reading or writing raises comes through."""
    library = _library()
    reader, writer = _Reader(source), _Writer(target)
    try:
        library.encrypt_io(reader, writer, list(keys))
    except (library.EncryptError, OSError):
        if not (reader.error or writer.error):
            raise
    # The library says nothing of a failure to write the last bytes.
    if cause := reader.error or writer.error:
        raise cause from None


def decrypt(source: IO[bytes], target: IO[bytes], keys: Sequence[Any], name: str = "file") -> None:
    """Write what an encrypted stream holds; what reading or writing raises comes through.

    Raises ConfigurationError if none of the keys opens it and DamagedFile, both with `name`, if it
    is damaged or cut short. What was written until then is right, but is not all.
    """
    library = _library()
    reader, writer = _Reader(source), _Writer(target)
    try:
        library.decrypt_io(reader, writer, list(keys))
    except (library.DecryptError, OSError) as error:
        if not (reader.error or writer.error):
            raise _refusal(str(error), name) from None
    if cause := reader.error or writer.error:
        raise cause from None


def _refusal(reason: str, name: str) -> ConfigurationError | DamagedFile:
    if "No matching keys" in reason:
        return ConfigurationError(f"{name}: not encrypted for this key")
    if "truncated" in reason or "fill whole buffer" in reason or "Incomplete" in reason:
        return DamagedFile(f"{name}: encrypted, and cut short")
    if "Header is invalid" in reason:
        return DamagedFile(f"{name}: not in the age format, or damaged")
    return DamagedFile(f"{name}: encrypted, and damaged")


@contextmanager
def encrypted(target: IO[bytes], keys: Sequence[Any]) -> Iterator[IO[bytes]]:
    """A stream to write to, whose content goes to `target` encrypted.

    Whole when the block ends. If the block raises, what `target` then has cannot be taken for a
    whole file; what writing to `target` raises comes out of the block.
    """
    into, out_of = _pipe()
    abandoned = threading.Event()

    def work() -> None:
        encrypt(_Unless(into, abandoned), target, keys)  # type: ignore[arg-type]

    worker = _Worker(work, into)
    try:
        yield out_of
        out_of.close()
    except BaseException as error:
        abandoned.set()
        with suppress(OSError):
            out_of.close()
        worker.join()
        # Writing to it failed because the thread had ended, whose reason is the better one.
        if isinstance(error, BrokenPipeError) and worker.error is not None:
            raise worker.error from None
        raise
    worker.join()
    if worker.error is not None:
        raise worker.error


@contextmanager
def decrypted(source: IO[bytes], keys: Sequence[Any], name: str = "file") -> Iterator[IO[bytes]]:
    """A stream to read what the encrypted `source` holds; reading raises what `decrypt` raises."""
    into, out_of = _pipe()
    worker = _Worker(lambda: decrypt(source, out_of, keys, name), out_of)
    try:
        yield io.BufferedReader(_Checked(into, worker))
    finally:
        into.close()
        worker.join()


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return os.fdopen(reading, "rb"), os.fdopen(writing, "wb")


class _Worker:
    """A thread that ends with closing its end of a pipe, and keeps what went wrong."""

    def __init__(self, work: Any, end: IO[bytes]) -> None:
        self.error: BaseException | None = None
        self._work, self._end = work, end
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
            self._end.flush()
        except BaseException as error:
            self.error = error
        with suppress(OSError):
            self._end.close()

    def join(self) -> None:
        self._thread.join()


class _Reader:
    """Reads for the library, which turns every exception into one of its own words."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.error: BaseException | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except BaseException as error:
            self.error = error
            raise


class _Writer:
    """Writes for the library, as `_Reader` reads."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BaseException as error:
            self.error = error
            raise


class _Unless:
    """A stream whose end counts only unless its writer gave up."""

    def __init__(self, stream: IO[bytes], abandoned: threading.Event) -> None:
        self._stream, self._abandoned = stream, abandoned

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        if not data and self._abandoned.is_set():
            raise ConnectionAbortedError  # not Interrupted: the library would read again
        return data


class _Checked(io.RawIOBase):
    """A stream whose end counts only if the thread that fills it did not fail."""

    def __init__(self, stream: Any, worker: _Worker) -> None:
        self._stream, self._worker = stream, worker

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        size: int = self._stream.readinto1(buffer)
        if not size:
            self._worker.join()
            if self._worker.error is not None:
                raise self._worker.error
        return size
