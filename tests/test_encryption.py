"""Encrypted streams: they come back equal, and what is not whole is never taken for whole."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyrage
import pytest

from contextuate_persist import ConfigurationError, DamagedFile, encryption
from tests.test_setup import Terminal

SIZES = [0, 1, 65_535, 65_536, 65_537, 3 * 65_536, 1_000_003]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    encryption.new_identity(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def public(key: Path) -> str:
    return key.read_text().split()[3]


def sealed(data: bytes, public: str) -> bytes:
    target = io.BytesIO()
    with encryption.encrypted(target, encryption.recipients([public])) as stream:
        stream.write(data)
    return target.getvalue()


def opened(data: bytes, key: Path) -> bytes:
    with encryption.decrypted(io.BytesIO(data), encryption.identities(key), "f.age") as stream:
        return stream.read()


def test_a_new_key_survives_a_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(encryption, "sync_directory", flushed.append)
    monkeypatch.chdir(tmp_path)
    encryption.new_identity("key")
    encryption.new_identity(tmp_path / "other")
    assert flushed == [tmp_path, tmp_path]


@pytest.mark.parametrize("size", SIZES)
def test_a_stream_comes_back_equal(size: int, key: Path, public: str) -> None:
    data = os.urandom(size)
    secret = sealed(data, public)
    assert encryption.is_encrypted(secret[:64])
    assert not encryption.is_encrypted(data[:64])
    assert opened(secret, key) == data
    target = io.BytesIO()
    encryption.decrypt(io.BytesIO(secret), target, encryption.identities(key))
    assert target.getvalue() == data


def test_the_library_itself_opens_what_was_encrypted(key: Path, public: str) -> None:
    line = key.read_text().splitlines()[1]
    assert pyrage.decrypt(sealed(b"content", public), [pyrage.x25519.Identity.from_str(line)]) == (
        b"content"
    )


def test_every_recipient_of_a_file_opens_it(tmp_path: Path) -> None:
    lines = [encryption.new_identity(tmp_path / f"key{n}") for n in range(2)]
    (tmp_path / "public").write_text("# ours\n\n" + "\n".join(lines) + "\n")
    secret = sealed(b"content", str(tmp_path / "public"))
    assert [opened(secret, tmp_path / f"key{n}") for n in range(2)] == [b"content"] * 2


def test_a_file_that_is_cut_anywhere_is_noticed(key: Path, public: str) -> None:
    secret = sealed(os.urandom(3 * 65_536), public)
    cuts = [0, 1, 20, 200, *range(len(secret) - 65_600, len(secret), 4_099), len(secret) - 1]
    for cut in cuts:
        with pytest.raises(DamagedFile, match=r"^f\.age: "):
            opened(secret[:cut], key)


def test_a_changed_bit_is_noticed(key: Path, public: str) -> None:
    secret = sealed(os.urandom(70_000), public)
    for place in (3, 250, 400, 66_000, len(secret) - 1):
        changed = bytearray(secret)
        changed[place] ^= 1
        with pytest.raises((DamagedFile, ConfigurationError), match=r"^f\.age: "):
            opened(bytes(changed), key)
    with pytest.raises(DamagedFile):
        opened(secret + b"more", key)


def test_another_key_is_named_as_the_reason(tmp_path: Path, public: str) -> None:
    encryption.new_identity(tmp_path / "other")
    with pytest.raises(ConfigurationError, match=r"^f\.age: not encrypted for this key$"):
        opened(sealed(b"content", public), tmp_path / "other")


def test_a_block_that_fails_leaves_nothing_that_looks_whole(key: Path, public: str) -> None:
    target = io.BytesIO()

    def fail() -> None:
        with encryption.encrypted(target, encryption.recipients([public])) as stream:
            stream.write(bytes(200_000))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(DamagedFile):
        opened(target.getvalue(), key)


class FullDisk(io.RawIOBase):
    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_is_told_as_what_it_is(size: int, key: Path, public: str) -> None:
    keys = encryption.recipients([public])

    def fill() -> None:
        with encryption.encrypted(FullDisk(), keys) as stream:  # type: ignore[arg-type]
            for _ in range(size // 10):
                stream.write(b"0123456789")

    with pytest.raises(OSError, match="No space left"):
        fill()
    with pytest.raises(OSError, match="No space left"):
        encryption.encrypt(io.BytesIO(bytes(size)), FullDisk(), keys)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space left"):
        encryption.decrypt(
            io.BytesIO(sealed(bytes(size), public)),
            FullDisk(),  # type: ignore[arg-type]
            encryption.identities(key),
        )


def test_a_reader_that_stops_early_leaves_no_thread_waiting(key: Path, public: str) -> None:
    secret = sealed(bytes(1_000_000), public)
    with encryption.decrypted(io.BytesIO(secret), encryption.identities(key)) as stream:
        assert stream.read(10) == bytes(10)


def test_memory_does_not_grow_with_the_stream(key: Path, public: str, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with (
            (tmp_path / "big").open("wb") as file,
            encryption.encrypted(file, encryption.recipients([public])) as stream,
        ):
            for _ in range(512):
                stream.write(bytes(65_536))
        with (
            (tmp_path / "big").open("rb") as source,
            encryption.decrypted(source, encryption.identities(key)) as stream,
        ):
            total = 0
            while data := stream.read(65_536):
                total += len(data)
        assert total == 512 * 65_536
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


# --- Keys -----------------------------------------------------------------------------------------


def test_a_new_key_is_its_owners_and_never_overwritten(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    with pytest.raises(FileExistsError):
        encryption.new_identity(key)
    assert key.read_bytes() == before


def test_a_key_under_a_passphrase_opens_with_it(key: Path, public: str, tmp_path: Path) -> None:
    secret = sealed(b"content", public)
    locked, word = tmp_path / "locked", tmp_path / "word"
    word.touch(0o600)
    locked.write_bytes(pyrage.passphrase.encrypt(key.read_bytes(), "öpen", armored=True))
    word.write_text("öpen\n")
    with encryption.decrypted(io.BytesIO(secret), encryption.identities(locked, word)) as stream:
        assert stream.read() == b"content"
    word.write_text("wrong\n")
    with pytest.raises(ConfigurationError, match="locked: the passphrase is wrong"):
        encryption.identities(locked, word)
    with pytest.raises(ConfigurationError, match="no terminal"):
        encryption.identities(locked)


def test_a_key_that_others_can_read_is_warned_of(
    key: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encryption.identities(key)
    assert not caplog.records
    key.chmod(0o644)
    encryption.identities(key)
    assert "chmod 600" in caplog.text


def test_what_is_no_key_is_one_clear_line_that_repeats_no_secret(key: Path, tmp_path: Path) -> None:
    secret = key.read_text().splitlines()[1]
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "bad").write_text("AGE-SECRET-KEY-1NOTAKEY\n")
    reads = [
        lambda: encryption.recipients([]),
        lambda: encryption.recipients(["age1wrong"]),
        lambda: encryption.recipients([str(key)]),
        lambda: encryption.recipients([str(tmp_path / "missing")]),
        lambda: encryption.recipients([str(tmp_path / "empty")]),
        lambda: encryption.recipients([str(tmp_path)]),
        lambda: encryption.recipients(["a\0b"]),
        lambda: encryption.identities(tmp_path / "missing"),
        lambda: encryption.identities(tmp_path / "empty"),
        lambda: encryption.identities(tmp_path / "bad"),
    ]
    for read in reads:
        with pytest.raises(ConfigurationError) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert secret[20:] not in str(caught.value)
        assert "NOTAKEY" not in str(caught.value)


@pytest.mark.parametrize("form", ["{}", " {}", "# created: 2026\n# public key: age1x\n{}"])
def test_a_secret_key_where_its_file_is_to_be_named_is_not_repeated(key: Path, form: str) -> None:
    secret = key.read_text().splitlines()[1]
    for read in (lambda word: encryption.recipients([word]), encryption.identities):
        for word in (secret, secret.lower()):
            with pytest.raises(ConfigurationError, match="that is a secret key") as caught:
                read(form.format(word))
            assert secret[16:].lower() not in str(caught.value).lower()


def test_nothing_typed_for_a_passphrase_is_one_line(key: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.write_bytes(pyrage.passphrase.encrypt(key.read_bytes(), "open", armored=True))
    command = [sys.executable, "-m", "contextuate_persist", "import", str(tmp_path)]
    terminal = Terminal([*command, "--identity", str(locked)], dict(os.environ))
    terminal.expect("Passphrase of locked: ")
    terminal.type("\x04")
    assert terminal.wait() == 1
    assert "Traceback" not in terminal.output
    assert terminal.output.count("\n") == 1
    assert "locked: has a passphrase, and none was given" in terminal.output


def test_without_the_library_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['pyrage'] = None\n"
        "from contextuate_persist import encryption\n"
        "try: encryption.recipients(['age1'])\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'contextuate-persist[encryption]'" in done.stdout
