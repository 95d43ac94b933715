"""Where a server is and who administers it: from a URL, the environment, MySQL's option files."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode

from contextuate_persist import display, tls
from contextuate_persist.accounts import Names
from contextuate_persist.base import BaseStore
from contextuate_persist.config import open_store, split_url
from contextuate_persist.errors import ConfigurationError, PersistenceError

_MAINTENANCE = {"postgresql": "postgres", "mysql": "information_schema"}
_ADMINISTRATORS = {"postgresql": "postgres", "mysql": "root"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a server is, and who administers it."""

    backend: str
    user: str
    password: str = field(default="", repr=False)
    host: str = "localhost"
    port: int | None = None
    database: str = ""  # where the administrator logs in, if not where all can
    parameters: Mapping[str, str] = field(default_factory=dict)

    def url(self, database: str, user: str, password: str = "") -> str:
        """A URL of this server for an account."""
        login = quote(user, safe="") + (f":{quote(password, safe='*')}" if password else "")
        host = f"[{self.host}]" if ":" in self.host else quote(self.host, safe="")
        parameters = dict(self.parameters)
        if self.host.startswith("/"):
            parameters["host" if self.backend == "postgresql" else "socket"] = self.host
            host = ""
        port = f":{self.port}" if self.port and (host or self.backend == "postgresql") else ""
        query = f"?{urlencode(parameters)}" if parameters else ""
        return f"{self.backend}://{login}@{host}{port}/{quote(database, safe='')}{query}"

    def administrator(self) -> BaseStore:
        try:
            database = self.database or _MAINTENANCE[self.backend]
            url = self.url(database, self.user, self.password)
        except UnicodeEncodeError:
            reason = "setup: a setting of the server holds bytes that are not UTF-8"
            raise ConfigurationError(reason) from None
        return open_store(url)


def find_server(args: argparse.Namespace, backend: str, database: str) -> Server:
    """The administrator's connection: URL, else environment, else (MySQL) option files.

    The URL's database is where the administrator logs in, unless it is the one to be set up.
    """
    words = {"mode": args.tls_mode, "ca": args.tls_ca, "cert": args.tls_cert, "key": args.tls_key}
    parameters = {tls.WORDS[name]: str(value) for name, value in words.items() if value}
    if args.url:
        return _server_of_url(args.url, backend, parameters, database)
    found = {name: os.environ.get(variable, "") for name, variable in variables(backend).items()}
    if backend == "mysql":
        from contextuate_persist.mysql_store import read_option_files  # noqa: PLC0415

        options = read_option_files()
        if "socket" in options and not found["host"] and options.get("host", "localhost") in (
            "localhost", "",
        ):  # fmt: skip
            options["host"] = options["socket"]
        found = {name: found[name] or options.get(name, "") for name in found}
        # As libpq does for the other: an authority that is named there is one to trust.
        if "ssl-ca" in options:
            parameters.setdefault("sslrootcert", options["ssl-ca"])
    else:
        for name in ("host", "port", "user"):  # libpq's own, after ours
            found[name] = found[name] or os.environ.get(f"PG{name.upper()}", "")
    return Server(
        backend=backend,
        user=found["user"] or _ADMINISTRATORS[backend],
        password=found["password"],
        host=found["host"] or "localhost",
        port=port_of(found["port"], backend),
        parameters=parameters,
    )


def variables(backend: str) -> dict[str, str]:
    """The environment variables that say where the server is, and who administers it."""
    prefix = "MYSQL" if backend == "mysql" else "PG"
    names = {name: f"{prefix}_{name.upper()}" for name in ("host", "port", "user")}
    return {**names, "password": "MYSQL_PWD" if backend == "mysql" else "PGPASSWORD"}


def port_of(text: str, backend: str) -> int | None:
    """The port that a variable names; raises ConfigurationError."""
    if text and not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536):
        raise ConfigurationError(f"{variables(backend)['port']}: {text!a} is no port")
    return int(text) if text else None


def _server_of_url(url: str, backend: str, parameters: dict[str, str], database: str) -> Server:
    parts = split_url(url)
    if parts.scheme not in (backend, backend.removesuffix("ql")):
        raise ConfigurationError(f"--url: {backend}:// is set up here")
    given = dict(parse_qsl(parts.query))
    host = given.pop("host" if backend == "postgresql" else "socket", "") or _host(parts)
    password = given.pop("password", "") or unquote(parts.password or "")
    if backend == "mysql" and not password:  # the other's driver looks for it by itself
        from contextuate_persist.mysql_store import read_option_files  # noqa: PLC0415

        password = os.environ.get("MYSQL_PWD") or read_option_files().get("password", "")
    path = unquote(parts.path.lstrip("/"))
    # What is left stands in the URLs of the accounts, too, which are shown.
    if unknown := given.keys() - set(tls.WORDS.values()):
        raise ConfigurationError(f"--url: {min(unknown)} is not for setting up; see --help")
    return Server(
        backend=backend,
        user=unquote(parts.username or _ADMINISTRATORS[backend]),
        password=password,
        host=host or "localhost",
        port=parts.port,
        # The one to be set up may not be there yet, and nobody drops the one that he is in.
        database="" if backend == "mysql" or path == database else path,
        parameters=given | parameters,
    )


def _host(parts: SplitResult) -> str:
    """The host of a URL, a socket's directory among them, whose letters keep their case."""
    quoted = parts.netloc.rpartition("@")[2]
    return unquote(quoted.partition(":")[0]) if "%2f" in quoted.lower() else parts.hostname or ""


def with_password(server: Server) -> Server:
    """The server, once its administrator can log in: on a terminal the password is asked for."""
    try:
        try_login(server)
    except PersistenceError as error:
        variable = variables(server.backend)
        # Where a distribution's package lets its administrator in by the name at the system alone.
        socket = f"{variable['host']}={_SOCKETS[server.backend]}"
        if getattr(error.__cause__, "errno", None) == _NO_USE or _NO_PEER in str(error):
            raise ConfigurationError(
                f"{server.user} logs in without a password, and only as the system's user of that "
                f"name: run this as {server.user} with {socket}"
            ) from None
        lacking = any(words in str(error) for words in _NO_PASSWORD)
        if server.password or not lacking:
            raise
        if not (sys.stdin and sys.stdin.isatty()):
            file = "~/.pgpass" if server.backend == "postgresql" else "~/.my.cnf"
            raise ConfigurationError(
                f"{server.user} needs a password: put it into {variable['password']} or {file}, or "
                "run this on a terminal, which asks for it; if the server knows the system's user, "
                f"it needs none with {socket}"
            ) from None
        try:
            asked = getpass.getpass(f"Password of {display.safe(server.user)}: ")
        except EOFError:
            reason = f"{server.user} has a password, and none was given"
            raise ConfigurationError(reason) from None
        server = replace(server, password=asked)
        try_login(server)
    return server


#: Where Debian's packages have their sockets.
_SOCKETS = {"postgresql": "/var/run/postgresql", "mysql": "/run/mysqld/mysqld.sock"}

#: What is said of an account that no password opens: MySQL's number, PostgreSQL's words.
_NO_USE, _NO_PEER = 1698, "Peer authentication failed"

#: What the drivers say of a login that lacks a password.
_NO_PASSWORD = ("no password supplied", "using password: NO")


def try_login(server: Server) -> None:
    """Log in as the administrator; raises what keeps from that."""
    with server.administrator().administer(Names()):
        pass
