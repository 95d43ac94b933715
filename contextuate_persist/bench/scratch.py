"""A place of its own on somebody's server: a schema on PostgreSQL, a database on MySQL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import mysql.connector
import psycopg

from contextuate_persist import mysql_store
from contextuate_persist.config import open_store
from contextuate_persist.errors import ConfigurationError, StoreRefused

NAME = "contextuate_bench"
#: Where the tables lie that are compared with, while they are empty.
EMPTY_NAME = "contextuate_bench_empty"


@contextmanager
def scratch(backend: str, url: str, name: str = NAME) -> Iterator[str]:
    """Make an empty place, yield its URL, and remove it with all that is in it.

    Raises ConfigurationError where one of this name is left over, and StoreRefused where the
    server lets nobody in, or the account may not make one.
    """
    make = {"postgresql": _postgresql_schema, "mysql": _mysql_database}[backend]
    with contextlib.ExitStack() as stack:
        try:
            own_url = stack.enter_context(make(url, name))
        except (psycopg.Error, mysql.connector.Error) as error:
            reason = " ".join(str(error).split())
            raise StoreRefused(f"a place for the benchmark cannot be made: {reason}") from error
        yield own_url


@contextmanager
def scratch_store(
    backend: str, url: str, name: str = NAME, **options: Any
) -> Iterator[tuple[Any, str]]:
    """A store with empty tables in a place of its own, and the URL of that.

    `options` are those of open_store. Raises like `scratch`.
    """
    with scratch(backend, url, name) as own:
        store: Any = open_store(own, **options)
        if not store.apply_schema():
            raise ConfigurationError("the benchmark's place is not empty: nothing was measured")
        with store:
            yield store, own


@contextmanager
def _postgresql_schema(url: str, name: str) -> Iterator[str]:
    with psycopg.connect(url, autocommit=True) as connection:
        try:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        except psycopg.errors.DuplicateSchema:
            raise _left_over("schema", name) from None
        try:
            own_url = url + ("&" if "?" in url else "?") + f"options=-csearch_path%3D{name}"
            _require_schema(own_url, name)
            yield own_url
        finally:
            connection.execute(f"DROP SCHEMA {name} CASCADE".encode())


def _require_schema(url: str, name: str) -> None:
    # A pooler may swallow the option: everything would then go to somebody's own tables.
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT current_schema()").fetchone()
    if found != (name,):
        raise ConfigurationError(
            "the server, or a pooler before it, ignores search_path: connect to the server itself"
        )


@contextmanager
def _mysql_database(url: str, name: str) -> Iterator[str]:
    arguments, _, _ = mysql_store.parse_url(url)
    connection: Any = mysql.connector.connect(**arguments)
    try:
        try:
            connection.cmd_query(f"CREATE DATABASE {name}".encode())
        except mysql.connector.Error as error:
            if error.errno == mysql.connector.errorcode.ER_DB_CREATE_EXISTS:
                raise _left_over("database", name) from None
            raise
        try:
            yield urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
        finally:
            connection.cmd_query(f"DROP DATABASE {name}".encode())
    finally:
        connection.close()


def _left_over(kind: str, name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{kind} {name} exists: another benchmark runs, or one was killed; "
        f"then remove it with DROP {kind.upper()} {name}"
    )
