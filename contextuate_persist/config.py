"""From a URL, the environment or nothing at all to a store."""

from __future__ import annotations

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

from contextuate_persist.base import BaseStore
from contextuate_persist.errors import ConfigurationError

ENVIRONMENT_URL = "CONTEXTUATE_DATABASE_URL"


def is_local(host: str) -> bool:
    """Whether a host is this machine: a socket directory, a loopback address, or nothing at all."""
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def open_store(url: str | None = None, **options: Any) -> BaseStore:
    """A store for a database: `with open_store() as store:` opens and closes it.

    `url` (`postgresql://...` or `mysql://...`), else CONTEXTUATE_DATABASE_URL, else the embedded
    default, a private PostgreSQL that needs no set-up. Connects to nothing yet. `options` go to the
    store: `pool_size`, and in seconds `connect_timeout`, `pool_timeout`, `statement_timeout` and
    `lock_timeout`. Raises ConfigurationError for a URL that names no known database.
    """
    url = url or os.environ.get(ENVIRONMENT_URL)
    if not url:
        from contextuate_persist.embedded import EmbeddedStore  # noqa: PLC0415  (only if needed)

        return EmbeddedStore(**options)
    try:
        scheme = urlsplit(url).scheme.lower()
    except ValueError:
        scheme = ""
    if scheme in ("postgresql", "postgres"):
        from contextuate_persist.postgresql_store import PostgreSQLStore  # noqa: PLC0415

        return PostgreSQLStore(url, **options)
    if scheme == "mysql":
        from contextuate_persist.mysql_store import MySQLStore  # noqa: PLC0415

        return MySQLStore(url, **options)
    raise ConfigurationError(
        "database URL: it begins with postgresql:// or mysql://, "
        f"not with {scheme + '://' if scheme else 'what was given'}"
    )
