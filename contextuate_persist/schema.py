"""The files in schemas/: where they are, which version they make, how to split and check them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from contextuate_persist.errors import SchemaError

#: The schema that this version of the library reads and writes.
SCHEMA_VERSION = 1


class SchemaVersion(NamedTuple):
    """What `schema_version` says of a database."""

    version: int
    layout: str


def schema_file(name: str) -> Path:
    """A file of schemas/, which lies in the installed package or, in a checkout, beside it."""
    package = Path(__file__).resolve().parent
    for directory in (package / "schemas", package.parent / "schemas"):
        if (directory / name).is_file():
            return directory / name
    raise SchemaError(
        f"{name} is missing from this installation: install contextuate-persist again"
    )


def require_version(found: SchemaVersion | None, place: str) -> SchemaVersion:
    """Raise SchemaError, with what to do, unless the database has the version that we know."""
    if found is None:
        raise SchemaError(f"{place} has no schema yet: run `contextuate-persist init` as its owner")
    if found.version < SCHEMA_VERSION:
        raise SchemaError(
            f"{place} has schema version {found.version}, this library needs {SCHEMA_VERSION}: "
            "run `contextuate-persist upgrade` as its owner"
        )
    if found.version > SCHEMA_VERSION:
        raise SchemaError(
            f"{place} has schema version {found.version}, this library knows {SCHEMA_VERSION}: "
            "install a newer contextuate-persist"
        )
    if found.layout != "plain":
        raise SchemaError(
            f"{place} has the layout {found.layout!r}, this library knows 'plain': "
            "install a newer contextuate-persist"
        )
    return found


# What may hold a delimiter that ends nothing: comments, quoted text, quoted names.
_OPAQUE = re.compile(
    r"""--(?=\s)[^\n]*|\#[^\n]*|/\*.*?\*/|'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`[^`]*`""",
    re.DOTALL,
)
_DELIMITER = re.compile(r"^[ \t]*DELIMITER[ \t]+(\S+)[ \t]*$", re.IGNORECASE | re.MULTILINE)


def split_mysql_script(script: str) -> Iterator[str]:
    """The statements of a script for the `mysql` client, without its DELIMITER commands.

    One statement for each call of the driver: of several in one call it reports only the errors of
    the first. Comments of the form -- and /* */ between statements go, /*! ones stay.
    """
    delimiter = ";"
    start = position = 0
    while position < len(script):
        command = _DELIMITER.match(script, position) if _at_line_start(script, position) else None
        if command and not _strip_comments(script[start:position]):
            delimiter = command[1]
            start = position = command.end()
        elif opaque := _OPAQUE.match(script, position):
            position = opaque.end()
        elif script.startswith(delimiter, position):
            if statement := _strip_comments(script[start:position]):
                yield statement
            start = position = position + len(delimiter)
        else:
            position += 1
    if statement := _strip_comments(script[start:]):
        yield statement


def _at_line_start(script: str, position: int) -> bool:
    return position == 0 or script[position - 1] == "\n"


def _strip_comments(text: str) -> str:
    """The text without leading comments: a statement must begin with its verb."""
    text = text.strip()
    while match := re.match(r"(?:--(?=\s)[^\n]*(?:\n|$)|/\*(?!!).*?\*/)", text, re.DOTALL):
        text = text[match.end() :].strip()
    return text
