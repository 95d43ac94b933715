"""Write schemas/*-shape.txt anew: `python -m tests.shapes`, after a schema file was changed.

`contextuate-persist check` compares live databases with these files.
"""

from __future__ import annotations

from contextuate_persist import schema
from tests import servers
from tests.conftest import Database, new_database

HEADING = "# What {made} makes, for `contextuate-persist check`: python -m tests.shapes\n"


def shape(database: Database) -> str:
    """The shape of a database, as its file has it."""
    rows = database.owner()._examine().answers["shape"] or []
    lines = sorted(f"{row[0]}\n" for row in rows)
    partitioned = any("event_ids" in line for line in lines)
    made = "`contextuate-persist partition`" if partitioned else f"{database.backend}-schema.sql"
    return HEADING.format(made=made) + "".join(lines)


def main() -> None:
    for start in (servers.postgresql_server, servers.mysql_server):
        with start() as server:
            database = new_database(server)
            database.owner().apply_schema()
            for layout in schema.LAYOUTS:
                if layout == "partitioned":
                    database.owner().partition_events()
                name = schema.shape_file(server.kind, layout)
                file = schema.schema_file("sample-data.sql").parent / name
                file.touch()
                file.write_text(shape(database))


if __name__ == "__main__":
    main()
