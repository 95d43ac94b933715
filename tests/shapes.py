"""Write schemas/*-shape.txt anew: `python -m tests.shapes`, after a schema file was changed.

`contextuate-persist check` compares live databases with these files.
"""

from __future__ import annotations

from contextuate_persist import schema
from tests import servers
from tests.conftest import Database, new_database

HEADING = (
    "# What {backend}-schema.sql makes, for `contextuate-persist check`: python -m tests.shapes\n"
)


def shape(database: Database) -> str:
    """The shape of a database, as its file has it."""
    rows = database.owner()._examine().answers["shape"] or []
    lines = sorted(f"{row[0]}\n" for row in rows)
    return HEADING.format(backend=database.backend) + "".join(lines)


def main() -> None:
    for start in (servers.postgresql_server, servers.mysql_server):
        with start() as server:
            database = new_database(server)
            database.owner().apply_schema()
            schema.schema_file(f"{server.kind}-shape.txt").write_text(shape(database))


if __name__ == "__main__":
    main()
