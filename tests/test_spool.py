"""The local queue: what was appended is there after any end of the process, and only once."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextuate_persist import ConfigurationError, SpoolError, inbox
from contextuate_persist.dead_letters import DeadLetters
from contextuate_persist.queued import Refused
from contextuate_persist.spool import Record, Spool, spool_state, waiting_records
from tests.builders import T0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def opened(directory: Path, **options: int) -> Spool:
    spool = Spool(directory, **options)
    spool.open()
    return spool


def records(first: int, count: int, size: int = 20) -> list[Record]:
    return [Record(n, 1_000 + n, b"%d-" % n + b"x" * size) for n in range(first, first + count)]


def everything(spool: Spool, after: int = 0, most_bytes: int = 1000) -> list[Record]:
    found: list[Record] = []
    while more := spool.read(found[-1].number if found else after, most_bytes):
        found += more
    return found


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.log"))


def test_records_come_back_in_order_also_after_a_reopening(directory: Path) -> None:
    spool = opened(directory)
    spool.append(records(1, 10))
    spool.append(records(11, 5))
    assert everything(spool) == records(1, 15)
    assert everything(spool, after=12) == records(13, 3)
    spool.close()
    again = Spool(directory)
    assert again.open() == 15
    assert (again.last, again.acknowledged) == (15, 0)
    assert everything(again) == records(1, 15)
    again.append(records(16, 1))
    assert everything(again) == records(1, 16)
    again.close()


@given(
    st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=5), max_size=8),
    st.integers(1, 700),
)
def test_whatever_bytes_come_back_equal(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[bytes]], most: int
) -> None:
    directory = tmp_path_factory.mktemp("spool")
    spool = opened(directory, segment_bytes=500)
    number = 0
    expected: list[Record] = []
    for group in groups:
        part = [Record(number + i + 1, 7, body) for i, body in enumerate(group)]
        number += len(part)
        expected += part
        spool.append(part)
    assert everything(spool, most_bytes=most) == expected
    spool.close()
    again = opened(directory)
    assert everything(again, most_bytes=most) == expected
    again.close()


def test_what_is_acknowledged_does_not_come_again_and_its_files_go(directory: Path) -> None:
    spool = opened(directory, segment_bytes=1000)
    for first in range(1, 101, 10):
        spool.append(records(first, 10))
    before, size = len(segments(directory)), spool.size
    assert size == sum(path.stat().st_size for path in segments(directory))
    spool.acknowledge(75)
    assert len(segments(directory)) < before
    assert spool.size == sum(path.stat().st_size for path in segments(directory)) < size
    spool.close()
    again = Spool(directory)
    assert again.open() == 25
    assert everything(again, after=again.acknowledged) == records(76, 25)
    again.acknowledge(100)
    again.close()
    assert segments(directory) == []


def test_an_empty_spool_goes_on_counting(directory: Path) -> None:
    spool = opened(directory)
    spool.append(records(1, 3))
    spool.acknowledge(3)
    spool.close()
    again = Spool(directory)
    assert again.open() == 0
    assert again.last == 3
    again.close()


def test_a_torn_end_costs_what_was_never_safe(directory: Path) -> None:
    spool = opened(directory)
    spool.append(records(1, 5))
    spool.close()
    [path] = segments(directory)
    whole = path.read_bytes()
    for cut in (1, 10, 30, 40):
        path.write_bytes(whole[:-cut])
        again = Spool(directory)
        assert again.open() == 4
        assert everything(again) == records(1, 4)
        assert [damage.endswith("leaves it torn") for damage in again.damages] == [True]
        again.append(records(5, 1, size=5))
        assert everything(again) == [*records(1, 4), *records(5, 1, size=5)]
        again.close()
        for extra in segments(directory)[1:]:
            extra.unlink()


def test_a_lost_page_costs_its_records_and_lies_aside(directory: Path) -> None:
    spool = opened(directory)
    spool.append(records(1, 300, size=100))
    spool.close()
    [path] = segments(directory)
    data = bytearray(path.read_bytes())
    data[8192:12288] = bytes(4096)
    path.write_bytes(data)
    again = Spool(directory)
    count = again.open()
    found = everything(again)
    assert len(found) == count
    assert 260 < count < 300
    assert found == [one for one in records(1, 300, size=100) if one in found]
    [damage] = again.damages
    assert path.name in damage
    assert "torn" not in damage
    [aside] = (directory / "damaged").iterdir()
    assert bytes(4096) in aside.read_bytes()
    again.close()


def test_every_single_wrong_byte_costs_one_record_at_most(directory: Path) -> None:
    spool = opened(directory)
    spool.append(records(1, 4))
    spool.close()
    [path] = segments(directory)
    whole = path.read_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 0x55
        path.write_bytes(data)
        again = Spool(directory)
        again.open()
        found = everything(again)
        assert len(found) >= 3
        assert all(one in records(1, 4) for one in found)
        again.close()


def test_a_body_that_looks_like_records_is_no_record_even_where_one_is_lost(
    directory: Path, tmp_path: Path
) -> None:
    other = opened(tmp_path / "other")
    other.append([Record(66, 1, b"forged")])
    other.close()
    [forged] = segments(tmp_path / "other")
    spool = opened(directory)
    spool.append([Record(1, 1, forged.read_bytes()), Record(2, 1, b"good")])
    spool.close()
    [path] = segments(directory)
    data = bytearray(path.read_bytes())
    data[0] ^= 1  # the mark of the first: what is inside is read on its own
    path.write_bytes(data)
    again = Spool(directory)
    again.open()
    assert everything(again) == [Record(2, 1, b"good")]
    again.close()


@pytest.mark.parametrize("text", [b"", b"rubbish", b"-0000000000000000005\n"])
def test_without_a_readable_acknowledgement_everything_comes_again(
    directory: Path, text: bytes
) -> None:
    spool = opened(directory)
    spool.append(records(1, 3))
    spool.acknowledge(2)
    spool.close()
    (directory / "acknowledged").write_bytes(text)
    again = Spool(directory)
    assert again.open() == 3
    again.close()


def test_a_second_process_is_refused_while_the_first_works(directory: Path) -> None:
    spool = opened(directory)
    program = f"""
import sys
from contextuate_persist.spool import Spool
try:
    Spool({str(directory)!r}).open()
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"ConfigurationError: spool: process {os.getpid()} works on")
    spool.close()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0


def test_a_second_spool_of_one_process_is_refused_too(directory: Path) -> None:
    spool = opened(directory)
    with pytest.raises(ConfigurationError, match="directory of its own"):
        Spool(directory).open()
    spool.append(records(1, 1))
    spool.close()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match=r"file/spool: Not a directory"):
        Spool(tmp_path / "file" / "spool").open()
    with pytest.raises(SpoolError, match="file/x: Not a directory"):
        spool_state(tmp_path / "file" / "x")


def test_after_a_failed_write_the_same_records_go_to_another_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that failed may hold them nevertheless: they still come once."""
    spool = opened(directory)
    spool.append(records(1, 2))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        patch.setattr(os, "truncate", broken)
        with pytest.raises(OSError, match="No space"):
            spool.append(records(3, 2))
    assert everything(spool) == records(1, 2)
    spool.append(records(3, 3))
    assert everything(spool) == records(1, 5)
    spool.close()
    again = Spool(directory)
    assert again.open() == 5
    assert everything(again) == records(1, 5)
    again.close()


def test_what_is_done_with_takes_no_room_however_large_it_was(directory: Path) -> None:
    spool = opened(directory, segment_bytes=100)
    spool.append(records(1, 1, size=1000))
    assert spool.size > 1000
    spool.acknowledge(1)
    assert (spool.size, segments(directory)) == (0, [])
    spool.append(records(2, 1))
    assert everything(spool, after=1) == records(2, 1)
    spool.close()
    again = Spool(directory)
    again.open()
    assert (again.last, again.acknowledged) == (2, 1)
    assert everything(again, after=1) == records(2, 1)
    again.close()


def of_two_files(directory: Path) -> Spool:
    """A spool with five records in each."""
    spool = opened(directory, segment_bytes=100)
    spool.append(records(1, 5))
    spool.append(records(6, 5))
    return spool


def test_a_file_that_somebody_has_removed_is_reported(directory: Path) -> None:
    spool = of_two_files(directory)
    segments(directory)[0].unlink()
    assert everything(spool) == records(6, 5)
    assert "No such file" in spool.damages[0]
    spool.acknowledge(10)
    spool.close()


def test_the_state_tells_what_waits_without_taking_the_spool(directory: Path) -> None:
    assert spool_state(directory) == (0, 0, None, ())
    spool = opened(directory)
    spool.append(records(1, 5))
    spool.acknowledge(2)
    assert spool_state(directory) == (3, spool.size, 1003, ())
    spool.close()
    assert spool_state(directory).records == 3


def test_what_cannot_be_read_of_a_spool_is_told_beside_what_can(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = of_two_files(directory)
    spool.close()
    first, second = segments(directory)
    with monkeypatch.context() as patch:
        unreadable(first, patch)
        state = spool_state(directory)
        assert state[:3] == (5, second.stat().st_size, 1006)
        assert state.unreadable == (f"{first}: Permission denied",)
        left: list[str] = []
        assert [*waiting_records(directory, left)] == records(6, 5)
        assert left == [*state.unreadable]
        patch.setattr(Path, "read_bytes", failing(errno.EMFILE))
        with pytest.raises(SpoolError, match="Too many open files"):
            spool_state(directory)
    assert spool_state(directory).records == 10


def take(place: Path) -> None:
    with inbox.Inbox(place):
        pass


MAKERS: dict[str, Callable[[Path], object]] = {
    "spool": lambda place: opened(place).close(),
    "dead letter": lambda place: DeadLetters(place).add(Refused("event", {}, "why"), T0),
    "file in the inbox": lambda place: inbox.leave(place, b"x"),
    "inbox": take,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_the_name_of_each_new_directory_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: str
) -> None:
    flushed: set[str] = set()
    original = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    MAKERS[maker](tmp_path / "home" / "monitor" / "place")
    assert {str(tmp_path / part) for part in (".", "home", "home/monitor")} <= flushed


def test_the_files_are_for_their_owner_only(directory: Path) -> None:
    spool = opened(directory)
    spool.append(records(1, 1))
    spool.close()
    assert directory.stat().st_mode & 0o777 == 0o700
    for path in directory.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


# --- A disk that fails at one certain call --------------------------------------------------------


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_that_cannot_be_opened_costs_what_is_in_it(directory: Path) -> None:
    spool = opened(directory)
    spool.append(records(5, 3))
    spool.close()
    odd = directory / f"{1:020d}-{'ab' * 8}.log"
    odd.mkdir()
    again = Spool(directory)
    assert again.open() == 3
    assert again.damages == [f"{odd.name}: Is a directory"]
    assert everything(again) == records(5, 3)
    again.close()
    assert (directory / "damaged" / odd.name).is_dir()


def test_a_file_that_the_disk_does_not_read_is_kept_aside(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = of_two_files(directory)
    [first, _] = segments(directory)
    original = Path.open

    def broken(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == first:
            raise OSError(errno.EIO, "Input/output error")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    assert everything(spool) == records(6, 5)
    # Until all is done with: some of it may be in memory, and nowhere else.
    assert first.exists()
    size = first.stat().st_size
    spool.acknowledge(10)
    assert not first.exists()
    assert spool.size == sum(path.stat().st_size for path in segments(directory))
    assert spool.damaged.bytes == size
    spool.close()
    assert (directory / "damaged" / first.name).exists()


@pytest.mark.parametrize("files", [1, 2])
def test_what_was_unreadable_and_could_not_be_moved_is_there_after_a_restart(
    directory: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    """A file that is written to is not moved at once, either."""
    spool = opened(directory, segment_bytes=100)
    for n in range(files):
        spool.append(records(1 + 5 * n, 5))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing(errno.EIO))
        assert everything(spool) == []
        patch.setattr(Path, "mkdir", failing(errno.ENOSPC))
        spool.acknowledge(5 * files)
    spool.forget()  # killed
    again = Spool(directory)
    assert again.open() == 5 * files
    assert everything(again) == records(1, 5 * files)
    again.acknowledge(5 * files)
    again.close()
    third = Spool(directory)
    assert third.open() == 0
    assert third.last == 5 * files
    third.close()


def test_what_is_done_with_is_noted_also_if_only_closing_can_move_what_was_unreadable(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = of_two_files(directory)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing(errno.EIO))
        assert everything(spool) == []
        patch.setattr(Path, "mkdir", failing(errno.ENOSPC))
        spool.acknowledge(8)
    spool.close()
    again = Spool(directory)
    assert again.open() == 2
    assert everything(again, after=again.acknowledged) == records(9, 2)
    again.close()


def test_a_closed_spool_can_be_opened_although_a_child_of_its_process_has_its_files(
    directory: Path,
) -> None:
    """As for the moment between a fork and what runs in the child after it."""
    spool = opened(directory)
    assert spool._locking is not None
    held = os.dup(spool._locking)  # shares the lock, as a child's descriptor does
    spool.close()
    opened(directory).close()
    os.close(held)


def test_opening_in_vain_changes_nothing_of_what_is_done_with(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(directory)
    spool.append(records(1, 5))
    spool.acknowledge(3)
    spool.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing(errno.EIO))
        with pytest.raises(SpoolError, match="Input/output error"):
            Spool(directory).open()
    again = Spool(directory)
    assert again.open() == 2
    again.close()


def unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a spool that opens not read a file, whoever runs the tests."""
    original = Path.read_bytes

    def denied(self: Path) -> bytes:
        if self == path:
            raise OSError(errno.EACCES, "Permission denied")
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", denied)


def test_a_file_that_was_unreadable_once_is_not_removed_when_it_can_be_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = of_two_files(directory)
    spool.close()
    first, _ = segments(directory)
    whole = first.read_bytes()
    with monkeypatch.context() as patch:
        unreadable(first, patch)
        again = Spool(directory)
        assert again.open() == 5
        assert again.damages == [f"{first.name}: Permission denied"]
        assert again.damaged.bytes == len(whole)
        again.acknowledge(10)
        again.close()
    third = opened(directory)
    third.acknowledge(10)
    third.close()
    aside = directory / "damaged" / first.name
    assert aside.read_bytes() == whole
    alone = directory / "alone"
    alone.mkdir(mode=0o700)
    aside.rename(alone / aside.name)
    assert everything(opened(alone)) == records(1, 5)


def test_a_spool_whose_unreadable_file_cannot_be_put_aside_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(directory)
    spool.append(records(1, 5))
    spool.close()
    [path] = segments(directory)
    with monkeypatch.context() as patch:
        unreadable(path, patch)
        patch.setattr(Path, "rename", failing(errno.EROFS))
        with pytest.raises(SpoolError) as raised:
            Spool(directory).open()
    assert str(raised.value) == (
        f"{path}: cannot be read: Permission denied; nor moved to damaged: Read-only file system"
    )
    again = Spool(directory)
    assert again.open() == 5
    again.close()


def test_nothing_more_goes_into_a_file_that_the_disk_does_not_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(directory)
    spool.append(records(1, 5))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing(errno.EIO))
        assert everything(spool) == []
    spool.append(records(6, 5))
    assert len(segments(directory)) == 2
    assert everything(spool, after=5) == records(6, 5)
    assert spool.size == sum(path.stat().st_size for path in segments(directory))
    spool.close()
    again = Spool(directory)  # it was killed before anything was done with, and the disk reads
    assert again.open() == 10
    assert everything(again) == records(1, 10)
    again.acknowledge(10)
    again.close()


def test_what_passes_is_raised_not_taken_for_damage(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(directory)
    spool.append(records(1, 5))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing(errno.EMFILE))
        with pytest.raises(OSError, match="Too many open files"):
            spool.read(0, 1000)
    assert everything(spool) == records(1, 5)
    spool.close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing(errno.EMFILE))
        with pytest.raises(SpoolError, match="Too many open files"):
            Spool(directory).open()
    again = Spool(directory)
    assert again.open() == 5
    again.close()


def test_damage_while_a_spool_is_open_is_told_and_kept(directory: Path) -> None:
    spool = opened(directory)
    spool.append(records(1, 300, size=100))
    [path] = segments(directory)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))
    assert 260 < len(everything(spool, most_bytes=10**6)) < 300
    assert len(spool.damages) == 1
    assert len(list((directory / "damaged").iterdir())) == 1
    spool.close()


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_takes_no_copy_of_what_is_damaged_keeps_its_whole_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A full disk is emptied by storing what waits, so the spool has to open."""
    spool = opened(directory, segment_bytes=100)
    for first in range(1, 41, 10):
        spool.append(records(first, 10))
    spool.close()
    torn = segments(directory)[1]
    whole = torn.read_bytes()[:-5]
    torn.write_bytes(whole)
    original = getattr(os, call)

    def full(descriptor: int, *data: Any) -> Any:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, *data)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        again = Spool(directory)
        assert again.open() == 39
        assert len(again.damages) == 1
        assert len(everything(again)) == 39
        again.acknowledge(30)
    [aside] = (directory / "damaged").iterdir()
    assert (aside.name, aside.read_bytes()) == (torn.name, whole)
    assert len(segments(directory)) == 1
    assert again.size == segments(directory)[0].stat().st_size
    again.close()


def test_what_can_neither_be_copied_nor_moved_stays_and_holds_up_nothing_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(directory, segment_bytes=100)
    for first in range(1, 41, 10):
        spool.append(records(first, 10))
    spool.close()
    torn = segments(directory)[0]
    torn.write_bytes(torn.read_bytes()[:-5])
    original = Path.mkdir

    def full(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name == "damaged":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        again = Spool(directory)
        assert again.open() == 39
        with pytest.raises(SpoolError, match=f"{torn.name}: what is damaged in it has no copy"):
            again.rewrite(lambda body: body)
        again.acknowledge(30)
        assert [path == torn for path in segments(directory)] == [True, False]
    again.acknowledge(31)
    assert (directory / "damaged" / torn.name).exists()
    again.close()


def test_a_file_whose_name_may_not_last_is_not_written_to(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(directory)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            spool.append(records(1, 1))
    assert segments(directory) == []
    spool.append(records(1, 1))
    assert everything(spool) == records(1, 1)
    spool.close()


def test_failed_writes_leave_no_empty_files(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(directory)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(errno.ENOSPC))
        for _ in range(5):
            with pytest.raises(OSError, match="No space"):
                spool.append(records(1, 1))
    assert segments(directory) == []
    spool.close()


def test_files_go_although_the_acknowledgement_cannot_be_written(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(directory, segment_bytes=100)
    for first in range(1, 21, 5):
        spool.append(records(first, 5))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(errno.ENOSPC))
        spool.acknowledge(20)
    assert segments(directory) == []
    spool.append(records(21, 1))
    spool.close()
    again = Spool(directory)
    again.open()
    assert everything(again) == records(21, 1)
    again.close()


def test_a_dead_letter_that_cannot_be_written_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = DeadLetters(directory / "dead")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        letters.add(Refused("event", {}, "why"), 1_700_000_000_000)
    assert list((directory / "dead").iterdir()) == []


# --- Rewriting ------------------------------------------------------------------------------------


def several_files(directory: Path) -> list[Record]:
    """Records 1 to 30 in files of some; 1 to 8 are done with."""
    spool = opened(directory, segment_bytes=200)
    for n in range(1, 31, 3):
        spool.append(records(n, 3))
    spool.acknowledge(8)
    spool.close()
    assert len(segments(directory)) > 3
    return records(9, 22)


def test_records_are_removed_and_changed_in_their_places(directory: Path) -> None:
    waiting = several_files(directory)
    spool = opened(directory)

    def edit(body: bytes) -> bytes | None:
        number = int(body.split(b"-")[0])
        if number % 5 == 0 or 13 <= number <= 22:
            return None
        return b"%d-changed" % number if number % 2 else body

    assert spool.rewrite(edit) == 13
    expected = [one._replace(body=body) for one in waiting if (body := edit(one.body)) is not None]
    assert everything(spool, after=8) == expected
    assert spool.size == sum(path.stat().st_size for path in segments(directory))
    # What is done with is gone, too, although its file was not full of it.
    assert not any(b"-8-x" in path.read_bytes() for path in segments(directory))
    assert spool.rewrite(edit) == 0
    spool.append(records(31, 2))
    spool.close()
    again = Spool(directory)
    assert again.open() == len(expected) + 2
    assert everything(again) == [*expected, *records(31, 2)]
    again.acknowledge(29)
    again.close()
    assert spool_state(directory).records == 2


def test_all_can_be_removed(directory: Path) -> None:
    several_files(directory)
    spool = opened(directory)
    assert spool.rewrite(lambda body: None) == 22
    assert (segments(directory), spool.size, everything(spool)) == ([], 0, [])
    spool.append(records(31, 1))
    assert everything(spool) == records(31, 1)


@pytest.mark.parametrize("call", ["fsync", "rename", "unlink"])
def test_whoever_is_killed_while_he_removes_loses_nothing_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    waiting = several_files(directory)
    place = {"fsync": os, "rename": Path, "unlink": Path}[call]
    original, calls, limit = getattr(place, call), 0, 0
    done = False

    def killed(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    while not done:
        limit, calls = limit + 1, 0
        spool = opened(directory)
        kept = [one.number for one in everything(spool, after=8)]
        assert {9, *range(20, 31)} <= set(kept)
        assert kept == sorted(kept)
        with monkeypatch.context() as patch:
            patch.setattr(place, call, killed)
            try:
                spool.rewrite(lambda body: None if 10 <= int(body[:2].strip(b"-")) < 20 else body)
                done = True
            except KeyboardInterrupt:
                pass
        spool.close()
    assert limit > 1
    spool = opened(directory)
    assert everything(spool, after=8) == [one for one in waiting if not 10 <= one.number < 20]
    spool.close()
    assert {path.suffix for path in directory.iterdir()} == {"", ".log"}


def test_a_disk_that_fails_meanwhile_is_told(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = several_files(directory)
    spool = opened(directory)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SpoolError, match="No space left"):
            spool.rewrite(lambda body: None if b"12-" in body else body)
    assert everything(spool, after=8) == waiting
