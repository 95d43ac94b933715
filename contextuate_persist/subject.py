"""Whom a `forget` is about: a session, a machine or a directory, and what lies there."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from contextuate_persist import model, payload
from contextuate_persist.errors import InvalidRecord

_WINDOWS = re.compile(r"[A-Za-z]:\\|\\\\")


class Subject(NamedTuple):
    """What is to be forgotten."""

    kind: Literal["session", "machine", "directory"]
    value: str

    @classmethod
    def of(
        cls, session_id: str | None, machine_id: str | None, working_directory: str | None
    ) -> Subject:
        """The one that is given; raises InvalidRecord for none, several, and impossible ones."""
        given = [session_id, machine_id, working_directory]
        if sum(value is not None for value in given) != 1:
            names = "session_id, machine_id or working_directory"
            raise InvalidRecord(f"forget: one of {names} is needed")
        if session_id is not None:
            model.check_id("session_id", session_id)
            return cls("session", session_id)
        if machine_id is not None:
            model.check_id("machine_id", machine_id)
            return cls("machine", machine_id)
        model.SESSION_CHECKS["working_directory"]("working_directory", working_directory)
        if not working_directory:
            raise InvalidRecord("working_directory: empty")
        return cls("directory", working_directory)

    def in_columns(self) -> Subject:
        """The same as the databases' columns tell it, where some texts are one."""
        return self._replace(value=payload.column_text(self.value))

    def is_at(self, machine_id: str, working_directory: str) -> bool:
        """Whether the machine is this one, or the directory this one or below it.

        Compared byte for byte; only that a path ends in slashes makes no difference.
        """
        if self.kind == "machine":
            return machine_id == self.value
        if self.kind == "session":
            return False
        slash = "\\" if _WINDOWS.match(self.value) else "/"
        path = self.value.rstrip(slash)
        below = working_directory.startswith(path + slash)
        return below or working_directory in (self.value, path or self.value)

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"
