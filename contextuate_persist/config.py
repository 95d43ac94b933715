"""From a URL, the environment, a configuration file or nothing at all to a store."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from contextuate_persist import tls
from contextuate_persist.errors import ConfigurationError

if TYPE_CHECKING:
    from contextuate_persist.base import BaseStore

ENVIRONMENT_URL = "CONTEXTUATE_DATABASE_URL"
ENVIRONMENT_ADMINISTRATOR = "CONTEXTUATE_ADMINISTRATOR_URL"
ENVIRONMENT_CONFIG = "CONTEXTUATE_CONFIG"
ENVIRONMENT_PASSWORD = "CONTEXTUATE_DATABASE_PASSWORD"  # noqa: S105  (a name, not a password)
#: contextuate's own file. Never one of the working directory: that may be somebody else's.
CONFIG_FILE = Path("~/.contextuate/monitor/config.json")

_logger = logging.getLogger(__name__)


def open_store(
    url: str | None = None, *, config: str | Path | None = None, **options: Any
) -> BaseStore:
    """A `PersistenceStore` for a database: `with open_store() as store:` opens and closes it.

    The first of these that is given decides: `url` (`postgresql://...` or `mysql://...`);
    CONTEXTUATE_DATABASE_URL, unless `config` is given; the `persistence` block of the configuration
    file (`config`, else CONTEXTUATE_CONFIG, else ~/.contextuate/monitor/config.json); the embedded
    default, a private PostgreSQL that needs no set-up. Connects to nothing yet. `options` go to the
    store: `pool_size`, and in seconds `connect_timeout`, `pool_timeout`, `statement_timeout` and
    `lock_timeout`. Raises ConfigurationError, naming the setting, for what cannot work.

    With `storage_limit`, in bytes, the database gets a limit, and `on_full` says what happens
    there, until a tenth of it is free again: "warn" logs a warning, once; "prune" also deletes what
    `retention_policy` (`retention.RetentionPolicy`) gives up and then the trees of sessions that
    were active longest ago, but no pinned ones, and none of the last day; "refuse" lets every call
    that stores something raise StorageFull, while updates, deletions and reading go on. An
    EventWriter takes that for a database that is away: it keeps what comes in its spool, and tries
    again. The size is looked at in the background, at most every 30 seconds, by one query
    (`retention.Valve`). In the file it is `"storage": {"limit": "20GB", "onFull": "prune"}` in the
    `persistence` block.

    With the database owner's URL the store also has `apply_schema`, `upgrade_schema` and
    `load_sample`, which do the work of the commands `init`, `upgrade` and `sample`.
    """
    if not url and config is None:
        url = os.environ.get(ENVIRONMENT_URL)
    if not url:
        url, settings = _read_file(config)
        options = settings | options
    if not url:
        from contextuate_persist.embedded import EmbeddedStore  # noqa: PLC0415  (only if needed)

        return EmbeddedStore(**options)
    if not isinstance(url, str):
        raise ConfigurationError(f"database URL: a string is needed, not {type(url).__name__}")
    # Not by urlsplit: what comes after the scheme is the driver's to judge.
    match = re.match(r"([a-z][a-z0-9+.-]*)://", url, re.IGNORECASE | re.ASCII)
    scheme = match[1].lower() if match else ""
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


def check_quoting(url: str) -> None:
    """Refuse a password with a bare @, / or %: drivers take its parts for others, and name them.

    And what no driver can send: NUL, and surrogates, which stand for bytes that are not UTF-8.
    """
    if re.search("[\0\ud800-\udfff]|%00", url):
        raise ConfigurationError("database URL: holds NUL, or bytes that are not UTF-8")
    after_scheme = url.partition("://")[2]
    if not after_scheme:
        return
    authority = re.split("[/?#]", after_scheme, maxsplit=1)[0]
    user, at, _ = authority.partition("@")
    has_rest = "@" in after_scheme[len(user) + 1 :].partition("?")[0]
    if ((at or ":" in user) and has_rest) or re.search("%(?![0-9a-fA-F]{2})", url):
        raise ConfigurationError(
            "database URL: a password's @ is written %40, / is %2F, ? is %3F, # is %23, % is %25"
        )


def split_url(url: str) -> SplitResult:
    """The parts of a URL; raises ConfigurationError, without a word of it: it may hold a password.

    Python's own errors quote what they could not read, which is the password where it has a bare
    sign or the host is missing.
    """
    check_quoting(url)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigurationError(
            "database URL: host or port cannot be read; USER:PASSWORD@HOST:PORT is the form, and "
            "whatever is no letter or digit of a password is written as %XX"
        ) from None
    return parts


def is_local(host: str) -> bool:
    """Whether a host is this machine: a socket directory, a loopback address, or nothing at all."""
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# --- The configuration file -----------------------------------------------------------------------

_DATABASE_KEYS = {
    "host": str,
    "port": int,
    "socket": str,
    "database": str,
    "user": str,
    "password": str,
    "passwordFile": str,
    "optionFile": str,
    "tls": dict,
}
_DEFAULT_DATABASE = "contextuate_monitor"
# Docker's and Podman's, inside of a container, where they are open to all that is in it.
_SECRETS = Path("/run/secrets")


def _read_file(config: str | Path | None) -> tuple[str | None, dict[str, Any]]:
    """The URL, None without a file or block, and the options that it stands for."""
    named = config or os.environ.get(ENVIRONMENT_CONFIG)
    path = home_path(named or CONFIG_FILE)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if named is None:
            return None, {}
        raise ConfigurationError(f"{path}: no such configuration file") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or NUL in the path
        raise ConfigurationError(f"{path}: cannot be read: {error}") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not JSON: {error}") from None
    block = _typed(content, "the file", path).get("persistence")
    if block is None:
        return None, {}
    block = _typed(block, "persistence", path)
    if block.get("enabled", True) is not True:
        raise ConfigurationError(
            f"{path}: persistence.enabled is not true: set it, or set {ENVIRONMENT_URL}"
        )
    kind = block.get("type")
    if kind == "file":
        raise ConfigurationError(
            f'{path}: persistence.type "file" is contextuate\'s own store: set it to "postgresql" '
            f'or "mysql" (`contextuate-persist import` takes the files over), or set '
            f"{ENVIRONMENT_URL}"
        )
    if kind not in ("postgresql", "mysql"):
        raise ConfigurationError(f'{path}: persistence.type is one of "postgresql" and "mysql"')
    database = _checked(block.get("database", {}), "persistence.database", _DATABASE_KEYS, path)
    if "password" in database:
        _warn_of_readers(path)
    try:
        return _url_of_block(kind, database, path), _options(block.get("storage", {}), path)
    except UnicodeEncodeError:
        reason = f"{path}: persistence.database, or the password, is not Unicode text"
        raise ConfigurationError(reason) from None


def _options(value: Any, path: Path) -> dict[str, Any]:
    """The store's options in a `storage` block."""
    options: dict[str, Any] = {}
    for key, given in _typed(value, "persistence.storage", path).items():
        if key == "limit":
            try:
                options["storage_limit"] = given if type(given) is int else parse_size(given)
            except (TypeError, ValueError):
                raise ConfigurationError(
                    f'{path}: persistence.storage.limit is a number of bytes, or "20GB"'
                ) from None
        elif key == "onFull":
            options["on_full"] = given
        else:
            raise ConfigurationError(
                f"{path}: persistence.storage.{key} is not known; known are limit, onFull"
            )
    if "on_full" in options and "storage_limit" not in options:
        raise ConfigurationError(
            f"{path}: persistence.storage.onFull needs a limit: set persistence.storage.limit"
        )
    return options


_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


def parse_size(text: str) -> int:
    """Bytes, from a number that may have a unit: 500MB, 20GiB; raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(i?)B?", text, re.IGNORECASE | re.ASCII)
    if not match or (match[3] and not match[2]) or len(match[1]) > 18:
        raise ValueError(text)
    unit = _UNITS[match[2].upper()]
    power = len(str(unit)) // 3 if match[3] else 0
    return int(float(match[1]) * (1024**power if power else unit))


def home_path(name: str | Path) -> Path:
    """The path with ~ for a home directory; as it is where there is no such user."""
    # pathlib's own raises RuntimeError then.
    return Path(os.path.expanduser(name))


def _typed(value: Any, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path}: {name} is not a JSON object")
    return value


def _checked(value: Any, name: str, keys: Mapping[str, type], path: Path) -> dict[str, Any]:
    for key, given in _typed(value, name, path).items():
        if key not in keys:
            known = ", ".join(keys)
            raise ConfigurationError(f"{path}: {name}.{key} is not known; known are {known}")
        if type(given) is not keys[key]:
            raise ConfigurationError(f"{path}: {name}.{key} is not of type {keys[key].__name__}")
    return dict(value)


def _url_of_block(kind: str, database: dict[str, Any], path: Path) -> str:
    login = quote(database.get("user", ""), safe="")
    if password := _password(database, path):
        login += ":" + quote(password, safe="")
    host = database.get("host", "localhost")
    place = f"[{host}]" if ":" in host else quote(host, safe="")
    if "port" in database:
        place += f":{database['port']}"
    parameters = _tls_parameters(database.get("tls", {}), path)
    if "socket" in database:
        if kind == "postgresql":
            place = f":{database['port']}" if "port" in database else ""
            parameters["host"] = database["socket"]
        else:
            parameters["socket"] = database["socket"]
    if "optionFile" in database:
        if kind != "mysql":
            raise ConfigurationError(
                f"{path}: persistence.database.optionFile is MySQL's: use passwordFile, or "
                "PGPASSFILE in the environment"
            )
        parameters["option-file"] = database["optionFile"]
    name = quote(database.get("database", _DEFAULT_DATABASE), safe="")
    query = f"?{urlencode(parameters)}" if parameters else ""
    return f"{kind}://{login}{'@' if login else ''}{place}/{name}{query}"


def _warn_of_readers(path: Path) -> None:
    if path.stat().st_mode & 0o077:
        _logger.warning("%s holds a password and others can read it: chmod 600 it", path)


def _password(database: Mapping[str, Any], path: Path) -> str:
    """From the environment, else from a file of its own, else from the block."""
    if password := os.environ.get(ENVIRONMENT_PASSWORD):
        return password
    if "passwordFile" in database:
        file = home_path(database["passwordFile"])
        try:
            if file.parent != _SECRETS:
                _warn_of_readers(file)
            return file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = f"{path}: persistence.database.passwordFile cannot be read: {error}"
            raise ConfigurationError(reason) from None
    return str(database.get("password", ""))


def _tls_parameters(block: Any, path: Path) -> dict[str, str]:
    keys = dict.fromkeys(tls.WORDS, str)
    given = _checked(block, "persistence.database.tls", keys, path)
    if given.get("mode", "prefer") not in tls.MODES:
        modes = ", ".join(tls.MODES)
        raise ConfigurationError(f"{path}: persistence.database.tls.mode is one of {modes}")
    return {
        tls.WORDS[name]: value if name == "mode" else str(home_path(value))
        for name, value in given.items()
    }
