"""How much lies aside in a directory, until somebody has looked at it: files and bytes."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path

# Directories are dated by a coarse clock, of two seconds on some file systems: what has changed
# that lately may change again under the same date.
_DOUBT = 2 * 10**9


class Aside:
    """A directory's files, counted again only after it has changed, by whichever process."""

    def __init__(self, directory: Path, names: re.Pattern[str]) -> None:
        self.directory = directory
        self.count = 0  # of files with such names
        self.bytes = 0  # of all
        self._names = names
        self._lock = threading.Lock()
        self._seen: int | None = None  # the directory's date when it was counted

    def look(self) -> bool:
        """Count again if need be; whether there are fewer bytes now than there were."""
        with self._lock, contextlib.suppress(OSError):
            before = self.bytes
            try:
                dated = self.directory.stat().st_mtime_ns
                if dated != self._seen:
                    self._count()
                    self._seen = dated if 0 <= dated < time.time_ns() - _DOUBT else None
            except FileNotFoundError:
                self.count, self.bytes, self._seen = 0, 0, None
            return self.bytes < before
        return False

    def _count(self) -> None:
        count = size = 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    size += entry.stat(follow_symlinks=False).st_size
                    count += self._names.fullmatch(entry.name) is not None
        self.count, self.bytes = count, size

    def added(self, size: int) -> None:
        """A file of so many bytes is there, too."""
        with self._lock:
            self.count += 1
            self.bytes += size

    def forget(self) -> None:
        """In a forked child: another thread may have held the lock."""
        self._lock = threading.Lock()
