"""The inbox: each file is taken once, and stays until it is safe elsewhere."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from contextuate_persist import ConfigurationError, SpoolError
from contextuate_persist import inbox as inbox_module
from contextuate_persist.inbox import Inbox, leave


def test_files_are_taken_in_the_order_in_which_they_were_left(tmp_path: Path) -> None:
    names = [leave(tmp_path / "in", b"%d" % n) for n in range(20)]
    with Inbox(tmp_path / "in") as inbox:
        assert list(inbox.take(15)) == [(name, b"%d" % n) for n, name in enumerate(names[:15])]
        assert [name for name, _ in inbox.take()] == names[15:]
        assert list(inbox.take()) == []
        inbox.done(names[0])
        inbox.done(names[0])
        inbox.give_back(names[1])
        assert [name for name, _ in inbox.take()] == [names[1]]
    with Inbox(tmp_path / "in") as inbox:  # after a crash: what was not done comes again
        assert [name for name, _ in inbox.take()] == names[1:]


def test_the_files_are_for_their_owner_only(tmp_path: Path) -> None:
    name = leave(tmp_path / "in", b"secret")
    assert (tmp_path / "in").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "in" / name).stat().st_mode & 0o777 == 0o600


def test_what_is_not_whole_yet_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / ".00001.json").write_bytes(b"half")
    with Inbox(tmp_path) as inbox:
        assert list(inbox.take()) == []


def test_what_a_killed_writer_left_goes_after_a_while_but_nothing_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "_UNFINISHED", 0.3)
    left, growing = (tmp_path / f".{n:020}-{'a' * 32}.json" for n in (1, 2))
    others = [tmp_path / name for name in (".nfs0001", ".note.json")]
    for path in (left, growing, *others):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))  # how old it looks does not count: a clock may have been wrong
    started = time.monotonic()
    with Inbox(tmp_path) as inbox:
        assert list(inbox.take()) == []
        assert left.exists()
        while time.monotonic() < started + 1:
            with growing.open("ab") as file:
                file.write(b".")
            assert list(inbox.take()) == []
            time.sleep(0.02)
        assert not left.exists()
        growing.rename(tmp_path / growing.name[1:])
        assert [name for name, _ in inbox.take()] == [growing.name[1:]]
        assert inbox._begun == {}
    assert all(path.exists() for path in others)


def test_a_file_that_could_not_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        leave(tmp_path / "in", b"x")
    assert list((tmp_path / "in").iterdir()) == []


def test_what_is_no_file_of_ours_is_set_aside_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_FILE_BYTES", 10)
    secret = tmp_path / "secret"
    secret.write_bytes(b"not ours")
    place = tmp_path / "in"
    good = leave(place, b"good")
    (place / "link").symlink_to(secret)
    os.mkfifo(place / "pipe")
    (place / "directory").mkdir()
    (place / "large").write_bytes(b"x" * 11)
    with Inbox(place) as inbox:
        before = os.listdir("/proc/self/fd")
        assert list(inbox.take()) == [(good, b"good")]
        assert os.listdir("/proc/self/fd") == before
        inbox.set_aside(good, "no JSON \udcff")
        assert list(inbox.take()) == []
        inbox.set_aside("gone", "it was there a moment ago")
    bad = {path.name for path in (place / "bad").iterdir()}
    assert {"link", "pipe", "directory", "large", good} <= bad
    assert (place / "bad" / "large.why").read_text() == "it has 11 bytes, at most 10 fit\n"
    assert secret.read_bytes() == b"not ours"
    assert "is set aside: it is no file" in caplog.text


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_just_now_waits_and_holds_up_nobody(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    first, second, third = (leave(tmp_path, b"%d" % n) for n in range(3))
    original = os.open

    def fail(path: str | Path, *arguments: int, **options: int) -> int:
        if Path(path).name in (first, second):
            raise OSError(number, os.strerror(number))
        return original(path, *arguments, **options)

    with Inbox(tmp_path) as inbox:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fail)
            assert list(inbox.take(1)) == [(third, b"2")]
            assert list(inbox.take()) == []
        assert [record.message.count(os.strerror(number)) for record in caplog.records] == [1, 1]
        assert list(inbox.take()) == [(first, b"0"), (second, b"1")]
    assert not (tmp_path / "bad").exists()


def test_a_file_whose_note_cannot_be_written_is_set_aside_nevertheless(tmp_path: Path) -> None:
    names = [leave(tmp_path, b"bad"), leave(tmp_path, b"good")]
    (tmp_path / "bad" / f"{names[0]}.why").mkdir(parents=True)
    with Inbox(tmp_path) as inbox:
        assert [name for name, _ in inbox.take()] == names
        inbox.set_aside(names[0], "no JSON")
        assert (tmp_path / "bad" / names[0]).read_bytes() == b"bad"
        assert inbox._taken == {names[1]}


def test_what_cannot_be_set_aside_holds_up_nobody_and_is_once_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0").mkdir()  # sorts before the others
    unclear, good = (leave(tmp_path, body) for body in (b"unclear", b"good"))
    (tmp_path / "bad").write_bytes(b"in the way")
    with Inbox(tmp_path) as inbox:
        assert [name for name, _ in inbox.take()] == [unclear, good]
        inbox.set_aside(unclear, "no JSON")
        for _ in range(3):
            assert list(inbox.take()) == []
        for name in ("0", unclear):
            assert caplog.text.count(f"{name!a} waits: ") == 1
        assert "is set aside" not in caplog.text
        (tmp_path / "bad").unlink()
        assert list(inbox.take()) == []
        assert inbox._taken == {good}
    notes = {path.name: path.read_text() for path in (tmp_path / "bad").glob("*.why")}
    assert notes == {"0.why": "it is no file\n", f"{unclear}.why": "no JSON\n"}


def test_an_inbox_stays_where_it_was_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = leave("in", b"x")
    (tmp_path / "elsewhere").mkdir()
    with Inbox("in") as inbox:
        monkeypatch.chdir("elsewhere")
        assert list(inbox.take()) == [(name, b"x")]
        inbox.done(name)
    assert not (tmp_path / "in" / name).exists()


def test_one_process_takes_at_a_time(tmp_path: Path) -> None:
    program = f"""
import sys
from contextuate_persist.inbox import Inbox
try:
    Inbox({str(tmp_path)!r}).open()
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""
    with Inbox(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr.startswith("ConfigurationError: inbox: another process takes")
        with pytest.raises(ConfigurationError):
            Inbox(tmp_path).open()
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 0


def test_a_forked_child_does_not_hold_the_inbox(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    inbox.open()
    waiting, ending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ending)
        os.read(waiting, 1)  # until the parent closes its end
        os._exit(0)
    try:
        with pytest.raises(ConfigurationError):
            Inbox(tmp_path).open()
        inbox.close()
        with Inbox(tmp_path):
            pass
    finally:
        for descriptor in (waiting, ending):
            os.close(descriptor)
        os.waitpid(child, 0)


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inbox = Inbox(tmp_path / "file" / "in")
    with pytest.raises(SpoolError, match="file/in: Not a directory"):
        inbox.open()
    inbox.close()


def test_a_file_that_goes_while_it_is_looked_for_is_no_error(tmp_path: Path) -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            (tmp_path / leave(tmp_path, b"x")).unlink(missing_ok=True)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        with Inbox(tmp_path) as inbox:
            for _ in range(200):
                for name, body in inbox.take():
                    assert body == b"x"
                    inbox.done(name)
    finally:
        stop.set()
        thread.join()
