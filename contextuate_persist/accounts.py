"""Databases and accounts, made by an administrator: what is there stays, what is missing comes.

The SQL is the stores' own: here it is an Administrator. Passwords are made here and handed to a
`Keeper` before any server knows them, so that none is lost half-way.
"""

from __future__ import annotations

import secrets
import string
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from contextuate_persist.errors import ConfigurationError, StoreRefused

if TYPE_CHECKING:
    from contextuate_persist.base import BaseStore

_PASSWORD_LENGTH = 32
# Nothing that a URL, a shell or an option file would take for something else.
_PASSWORD_SIGNS = string.ascii_letters + string.digits + "-_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What is set up: a database, the role that owns it, and two accounts that log in."""

    database: str = "contextuate_monitor"
    owner: str = "contextuate_owner"
    application: str = "monitor_user"
    reader: str = "monitor_reader"

    def of(self, environment: str | None) -> Names:
        """The names of an environment, which has all of its own."""
        if not environment:
            return self
        names = (self.database, self.owner, self.application, self.reader)
        database, owner, application, reader = (f"{name}_{environment}" for name in names)
        return Names(database=database, owner=owner, application=application, reader=reader)

    def check(self, *, longest_database: int, longest_account: int) -> None:
        """Refuse what the server would cut off or could not be told apart in a list."""
        roles = (self.owner, self.application, self.reader)
        for name in (self.database, *roles):
            limit = longest_account if name in roles else longest_database
            odd = any(unicodedata.category(sign) in ("Cc", "Cf", "Cs") for sign in name)
            size = len(name.encode(errors="replace"))
            if not 0 < size <= limit or odd or name != name.strip():
                raise ConfigurationError(
                    f"{ascii(name)[:80]}: a name has 1 to {limit} bytes, no control characters and "
                    "no space around it"
                )
        if len(set(roles)) < len(roles):
            raise ConfigurationError("the owner and the two accounts need three different names")


class Account(NamedTuple):
    """An account that logs in, as it was just made."""

    purpose: str  # "application" or "read-only"
    user: str
    password: str


class Step(NamedTuple):
    """One thing that was looked after, and whether anything had to be changed for it."""

    name: str
    message: str
    changed: bool


class Administrator(Protocol):
    """A connection of an administrator, for the database and the roles of `names`."""

    names: Names
    place: str

    def check_names(self) -> None:
        """Raise ConfigurationError for names that this server cannot have."""
        ...

    def has_database(self) -> bool: ...
    def check_owner(self) -> None:
        """Raise ConfigurationError if the database that is there is somebody else's."""
        ...

    def create_database(self) -> None:
        """Create it empty, for the owner, closed to everybody else."""
        ...

    def drop_database(self) -> None:
        """Drop it with all its data; refused while somebody is connected, where the server can."""
        ...

    def has_role(self, name: str) -> bool: ...
    def create_owner(self) -> None:
        """Make the role that owns the database; nobody logs in as it."""
        ...

    def create_login(self, name: str, password: str) -> None: ...
    def login_of(self, name: str) -> str:
        """Who logs in for an account with its newest password."""
        ...

    def next_login_of(self, name: str) -> str:
        """Who will, after the next rotation; raises ConfigurationError if that is another's."""
        ...

    def rotate(self, name: str, password: str) -> None:
        """Give a new password to `next_login_of`, while the newest until now goes on working.

        What was valid before that one ends: see `has_old`.
        """
        ...

    def has_old(self, name: str) -> bool:
        """Whether what was valid before the last rotation still is: the next would end it."""
        ...

    def discard_old(self, name: str) -> bool:
        """End what was valid before the last rotation; False if there was nothing."""
        ...

    def grant(self) -> bool:
        """Let the accounts do what they are for and nothing else; whether that was new."""
        ...

    def owner_store(self) -> BaseStore:
        """A store, not opened, that acts as the database's owner."""
        ...


class Keeper(Protocol):
    """Who keeps new passwords: a file, or the terminal that shows them at the end."""

    def require(self) -> None:
        """Raise ConfigurationError if there is no safe place for them."""
        ...

    def keep(self, account: Account) -> None: ...


def new_password() -> str:
    """A password of 190 random bits, with every class of characters that policies ask for."""
    while True:
        password = "".join(secrets.choice(_PASSWORD_SIGNS) for _ in range(_PASSWORD_LENGTH))
        classes = (string.ascii_lowercase, string.ascii_uppercase, string.digits, "-_")
        if all(set(password) & set(one) for one in classes) and password[0] not in "-_":
            return password


# --- Steps ----------------------------------------------------------------------------------------


def provide(
    administrator: Administrator, keeper: Keeper, *, rotate: bool = False, reset: bool = False
) -> Iterator[Step]:
    """Make what is missing: owner, database, schema, accounts, privileges. A step at a time.

    With `reset` the database is dropped first; with `rotate` accounts that are there get new
    passwords. Raises ConfigurationError before anything is done if a password could not be kept, or
    an account cannot get a new one without ending one that may be in use.
    """
    names = administrator.names
    administrator.check_names()
    logins = {"application": names.application, "read-only": names.reader}
    new = {purpose for purpose, user in logins.items() if not administrator.has_role(user)}
    if new or rotate:
        keeper.require()
    if rotate:  # before the first account has a new password
        for user in logins.values():
            administrator.next_login_of(user)
            # After a rotation that ended half-way it is the older one that programs use.
            if administrator.has_old(user):
                raise ConfigurationError(
                    f"--rotate: {user} has two valid passwords already, and one of them would end; "
                    "nothing was changed: once every program uses the newest, end the other with "
                    "--discard-old, then rotate"
                )
    if reset and administrator.has_database():
        administrator.drop_database()
        yield Step("database", f"{names.database} dropped with all its data", changed=True)
    yield _owner(administrator)
    yield _database(administrator)
    changed = administrator.owner_store().apply_schema()
    yield Step("schema", "created" if changed else "there already", changed)
    for purpose, user in logins.items():
        yield _login(administrator, keeper, purpose, user, new=purpose in new, rotate=rotate)
    changed = administrator.grant()
    data = f"{names.application} may SELECT, INSERT, UPDATE, DELETE; {names.reader} may SELECT"
    yield Step("privileges", data if changed else "as they should be", changed)


def _owner(administrator: Administrator) -> Step:
    owner = administrator.names.owner
    if administrator.has_role(owner):
        return Step("owner", f"role {owner} is there already", changed=False)
    administrator.create_owner()
    return Step("owner", f"role {owner} created, nobody logs in as it", changed=True)


def _database(administrator: Administrator) -> Step:
    database = administrator.names.database
    if administrator.has_database():
        administrator.check_owner()
        return Step("database", f"{database} is there already", changed=False)
    administrator.create_database()
    return Step("database", f"{database} created", changed=True)


def _login(
    administrator: Administrator,
    keeper: Keeper,
    purpose: str,
    user: str,
    *,
    new: bool,
    rotate: bool,
) -> Step:
    if new:
        account = Account(purpose, user, new_password())
        keeper.keep(account)
        administrator.create_login(user, account.password)
        return Step("account", f"{user} created ({purpose})", changed=True)
    if not rotate:
        message = f"{user} is there already ({purpose}), its password unchanged"
        return Step("account", message, changed=False)
    account = Account(purpose, administrator.next_login_of(user), new_password())
    keeper.keep(account)
    administrator.rotate(user, account.password)
    message = f"{account.user} has a new password ({purpose}); the one before stays valid"
    return Step("account", message, changed=True)


def verify(account: Account, store: BaseStore) -> Step:
    """Use a new account for what it is for, and for what it is not. Leaves nothing behind."""
    with store:
        store.get_sessions(limit=1)
        try:
            store.try_writing()
        except StoreRefused:
            if account.purpose == "application":
                raise
        else:
            if account.purpose != "application":
                raise StoreRefused(f"{account.user} should only read, and can write")
    does = "reads and writes" if account.purpose == "application" else "reads, and cannot write"
    return Step("verified", f"{account.user} logs in, {does}", changed=False)
