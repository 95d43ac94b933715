"""What can go wrong, as one small tree.

PersistenceError
├── ConfigurationError    settings that cannot work: the message names the setting and the fix
├── InvalidRecord         a session, event or filter that cannot be kept (also a ValueError)
│   └── InvalidBatch      some records of a batch: `.refused` names each by its index
├── SessionNotFound       no such session (also a LookupError)
├── SchemaError           the database's schema is missing, too old, too new or altered
├── StoreClosed           the store was used before init() or after close()
├── StoreUnavailable      no answer in time: not reachable, connection lost, lock or pool wait over
├── StoreRefused          the server understood and said no: privileges, disk full, read-only
├── StorageFull           the database has reached the limit that its operator chose
├── DamagedFile           a file that was made to be read back is damaged or cut short
└── SpoolError            the local queue cannot keep what it is given: its disk fails
    └── SpoolFull         it has reached its limit: the database has been away for too long
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PersistenceError(Exception):
    """Base of every error that this library raises on purpose."""

    #: Whether the server may have meant one record of several, not all; the writer then looks.
    perhaps_one = False


class ConfigurationError(PersistenceError):
    """Settings that cannot work; the message names the setting and the fix."""


class InvalidRecord(PersistenceError, ValueError):
    """A session, event or filter that cannot be kept; the message begins with the field."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One record of a batch that cannot be kept: its place in the batch, its id and why."""

    index: int
    id: str
    reason: str


class InvalidBatch(InvalidRecord):
    """Some records of a batch cannot be kept: `.refused` says which, `.stored` how many were new.

    Nothing was stored, unless it was the server that refused them.
    """

    def __init__(self, refused: Sequence[Refusal], stored: int = 0) -> None:
        self.refused = tuple(refused)
        self.stored = stored
        shown = "; ".join(
            f"[{r.index}] {ascii(r.id[:60])[1:-1]}: {r.reason}" for r in self.refused[:20]
        )
        more = len(self.refused) - 20
        super().__init__(
            f"{len(self.refused)} refused, {stored or 'nothing'} stored: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )

    def __reduce__(self) -> tuple[type[InvalidBatch], tuple[tuple[Refusal, ...], int]]:
        return (type(self), (self.refused, self.stored))


class SessionNotFound(PersistenceError, LookupError):
    """No session with this id."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(f"no session {session_id!r}")

    def __reduce__(self) -> tuple[type[SessionNotFound], tuple[str]]:
        return (type(self), (self.session_id,))


class SchemaError(PersistenceError):
    """The schema is missing, too old, too new or altered; the message says what to run."""


class StoreClosed(PersistenceError):
    """The store is not open: call init() first, or use `with open_store(...) as store:`."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class StoreUnavailable(PersistenceError):
    """The database gave no answer in time; what was not acknowledged may be sent again safely."""


class StoreRefused(PersistenceError):
    """The server understood and said no: privileges, a full disk, a read-only server."""

    #: Whether it says so to every account: its disk is full, it is read-only.
    to_all = False


class StorageFull(PersistenceError):
    """The database has reached `storage_limit`; the message names it and the way out."""


class DamagedFile(PersistenceError):
    """A file that was made to be read back is damaged or cut short; the message names it."""


class SpoolError(PersistenceError):
    """The local queue cannot keep what it is given; the message names its directory and why."""


class SpoolFull(SpoolError):
    """The local queue has reached its limit: nothing is dropped, so nothing more is taken."""
