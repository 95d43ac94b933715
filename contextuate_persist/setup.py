"""The command `setup`: from a server, or from Docker, to accounts that work; every step is said.

What is done is in accounts.py, where the server is in administrator.py; here is what is said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contextuate_persist import accounts, containers, display, tls
from contextuate_persist.accounts import Account, Administrator, Names, Step
from contextuate_persist.administrator import (
    Server,
    find_server,
    port_of,
    try_login,
    with_password,
)
from contextuate_persist.config import open_store
from contextuate_persist.console import ask, paint, show, show_json, tell
from contextuate_persist.doctor import Level
from contextuate_persist.errors import (
    ConfigurationError,
    PersistenceError,
    StoreRefused,
    StoreUnavailable,
)

#: How long a container may take until it answers: the first start makes a database cluster.
WAIT_SECONDS = 120.0
_TARGETS = {
    "mysql": ("mysql",),
    "postgresql": ("postgresql",),
    "postgres": ("postgresql",),
    "both": ("mysql", "postgresql"),
}


def run(args: argparse.Namespace) -> int:
    """Set up what the command line asks for; the exit status."""
    docker = args.target.startswith("docker-")
    backends = _TARGETS[args.target.removeprefix("docker-")]
    if args.url and (docker or len(backends) > 1):
        raise ConfigurationError("--url: only for the administrator of a server that is there")
    if docker:
        containers.require_docker()
    keeper = Keeper(args.passwords, may_show=not args.json)
    try:
        for backend in backends:
            _set_up(args, backend, keeper, docker=docker)
    finally:
        keeper.show()
    return 0


# --- Passwords ------------------------------------------------------------------------------------


class Keeper:
    """Keeps new passwords in a file that only its owner reads, or shows them once on a terminal."""

    def __init__(self, file: Path | None, *, may_show: bool) -> None:
        self._file = file
        self._may_show = may_show
        self._lines: list[str] = []
        self.made: list[Account] = []
        self.server: Server | None = None
        self.database = ""

    def require(self) -> None:
        if self._file is None and not self._may_show:
            raise ConfigurationError("passwords: --json shows none: give --passwords FILE")
        if self._file is None and not (sys.stdout and sys.stdout.isatty()):
            raise ConfigurationError(
                "passwords: the output is no terminal, and may be kept or read by others: give "
                "--passwords FILE"
            )
        if self._file is not None:
            os.close(self._open(self._file))

    def keep(self, account: Account) -> None:
        assert self.server is not None  # noqa: S101  (set before anything is made)
        self.made.append(account)
        if self._file is None:
            place = f"{self.server.backend:10}  {account.purpose:11}"
            self._lines.append(f"  {place}  {display.safe(account.user)}  {account.password}")
            return
        record = {
            "database": self.server.backend,
            "purpose": account.purpose,
            "user": account.user,
            "password": account.password,
            "url": self.server.url(self.database, account.user, account.password),
        }
        with os.fdopen(self._open(self._file), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def show(self) -> None:
        if self._lines:
            show(["", paint("Passwords, shown this once:", "bold"), *self._lines])

    @staticmethod
    def _open(file: Path) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        number = os.open(file, flags, 0o600)
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077 or found.st_uid != os.geteuid():
            os.close(number)
            raise ConfigurationError(f"{file}: others can read it: chmod 600 it, or name another")
        return number


# --- Doing it -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """One server to set up, and how to tell about it."""

    args: argparse.Namespace
    server: Server
    names: Names
    keeper: Keeper

    def say(self, step: Step) -> None:
        backend = self.server.backend
        if self.args.json:
            record = {"database": backend, "step": step.name, "message": step.message}
            show_json([{**record, "changed": step.changed}])
        else:
            mark = paint("+", "green") if step.changed else " "
            show([f"{mark} {step.name:12} {display.safe(step.message)}"])


def _names(args: argparse.Namespace) -> Names:
    if args.environment and not re.fullmatch("[A-Za-z0-9_-]+", args.environment):
        raise ConfigurationError("--environment: letters, digits, - and _ only")
    given = {
        "database": args.database,
        "owner": args.owner,
        "application": args.user,
        "reader": args.reader,
    }
    names = Names().of(args.environment)
    return replace(names, **{name: value for name, value in given.items() if value is not None})


def _set_up(args: argparse.Namespace, backend: str, keeper: Keeper, *, docker: bool) -> None:
    names = _names(args)
    if docker:
        server = _in_docker(args, backend)
    else:
        server = with_password(find_server(args, backend, names.database))
    if not args.json:
        show([paint(f"{backend}: {display.safe(names.database)}", "bold")])
    work = _Work(args=args, server=server, names=names, keeper=keeper)
    keeper.server, keeper.database = server, names.database
    before = len(keeper.made)
    with server.administrator().administer(names) as administrator:
        if args.discard_old:
            _discard_old(work, administrator)
            return
        reset = args.reset and _confirmed(administrator)
        changed = False
        for step in accounts.provide(administrator, keeper, rotate=args.rotate, reset=reset):
            work.say(step)
            changed = changed or step.changed
        changed = _sample(work, administrator) or changed
        user = administrator.login_of(names.application)
    for account in keeper.made[before:]:
        _verify(work, account)
    if not changed:
        work.say(Step("done", "everything was there already: nothing was changed", changed=False))
    _summarize(work, user)
    if docker and not args.json:
        hints = containers.hints(containers.IMAGES[backend])
        show(f"  to {purpose:16} {command}" for purpose, command in hints.items())


def _discard_old(work: _Work, administrator: Administrator) -> None:
    for user in (work.names.application, work.names.reader):
        ended = administrator.has_role(user) and administrator.discard_old(user)
        message = f"{user}: " + ("only its newest password is valid now" if ended else "none")
        work.say(Step("old password", message, changed=ended))


def _confirmed(administrator: Administrator) -> bool:
    """Whether a database that is there may be dropped: somebody has to type its name."""
    name = administrator.names.database
    if not administrator.has_database():
        return False
    events = _count_events(administrator)
    tell(f"--reset drops {name} and everything in it{events}. Type the database's name to go on:")
    typed = sys.stdin.readline().rstrip("\r\n") if sys.stdin else ""
    if typed != name:
        raise ConfigurationError("--reset: that is not the database's name; nothing was changed")
    return True


def _count_events(administrator: Administrator) -> str:
    try:
        with administrator.owner_store() as store:
            return f", {sum(store.event_counts().values()):,} events"
    except PersistenceError:  # no schema of ours, perhaps
        return ""


def _sample(work: _Work, administrator: Administrator) -> bool:
    """Load the sample data where that is asked for, or wanted for an empty database."""
    with administrator.owner_store() as store:
        if store.get_sessions(limit=1) and not work.args.sample:
            return False
        wanted = work.args.sample
        if wanted is None and sys.stdin and sys.stdin.isatty() and not work.args.json:
            wanted = ask("Load sample data, two handfuls of events? [y/N]")
        if not wanted or store.get_session("session-root-001") is not None:
            return False
        store.load_sample()
    work.say(Step("sample", "loaded", changed=True))
    return True


def _verify(work: _Work, account: Account) -> None:
    """Use a new account, and let `check` look at what it may do."""
    url = work.server.url(work.names.database, account.user, account.password)
    store = open_store(url)
    work.say(accounts.verify(account, store))
    if account.purpose == "application":
        for finding in store.check():
            if finding.level is not Level.OK:
                work.say(Step("check", f"{finding.level.value}: {finding}", changed=False))


def _summarize(work: _Work, user: str) -> None:
    """How to use what is there now; passwords are hidden."""
    server, names = work.server, work.names
    url = server.url(names.database, user, "***")
    database: dict[str, Any] = {"host": server.host}
    if server.host.startswith("/"):
        database = {"socket": server.host}
    if server.port:
        database["port"] = server.port
    database |= {"database": names.database, "user": user}
    words = {word: name for name, word in tls.WORDS.items()}
    block = {words[word]: text for word, text in server.parameters.items() if word in words}
    if block:
        database["tls"] = block
    database["passwordFile"] = "~/.contextuate/monitor/password"
    persistence = {"enabled": True, "type": server.backend, "database": database}
    if work.args.json:
        record = {"database": server.backend, "step": "use", "url": url}
        show_json([{**record, "persistence": persistence}])
        return
    show(["", "The application's URL, or its block of ~/.contextuate/monitor/config.json:"])
    show([f"  CONTEXTUATE_DATABASE_URL={display.safe(url)}"])
    show([f"  {json.dumps({'persistence': persistence})}", ""])


# --- Docker ---------------------------------------------------------------------------------------


def _in_docker(args: argparse.Namespace, backend: str) -> Server:
    """The server of a container that runs and answers."""
    image = containers.IMAGES[backend]
    given = port_of(os.environ.get(image.port_variable, ""), backend)
    started, port = containers.start(image, given)
    password = containers.administrator_password(image)
    server = Server(
        backend=backend, user=image.user, password=password, host="127.0.0.1", port=port
    )
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            try_login(server)
            break
        except StoreUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        except StoreRefused as error:
            raise ConfigurationError(
                f"{error}: the volume {image.container} has another password than its container; "
                f"if its data may go: docker rm --force {image.container}, "
                f"docker volume rm {image.container}"
            ) from None
    containers.keep_password(image)
    if not args.json:
        done = "started" if started else "runs already"
        show([f"  {'container':12} {image.container} {done} ({image.tag})"])
    return server
