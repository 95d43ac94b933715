"""Write the figures in schemas/INDEX.md anew: `python -m tests.figures`.

What a schema has is asked of a database that has it; how large databases get follows from the bytes
for each event that schemas/COMPARISON.md tells.
"""

from __future__ import annotations

import re

from tests import servers
from tests.conftest import Database, new_database
from tests.guide import ROOT, read

INDEX = ROOT / "schemas" / "INDEX.md"
EVENTS_A_DAY = (1000, 5000, 50_000)

#: What is counted, by the words that the table has for it.
COUNTS = {
    "postgresql": {
        "tables": """
            SELECT count(*) FROM pg_class AS c
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
        """,
        "columns of tables": """
            SELECT count(*)
            FROM information_schema.columns AS c JOIN information_schema.tables AS t
                USING (table_schema, table_name)
            WHERE table_schema = 'public' AND t.table_type = 'BASE TABLE'
        """,
        "views": """
            SELECT count(*) FROM pg_class AS c
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'v'
        """,
        "functions, procedures": """
            SELECT count(*) FROM pg_proc AS p
            WHERE p.pronamespace = 'public'::regnamespace AND p.prorettype <> 'trigger'::regtype
        """,
        "triggers": """
            SELECT count(*) FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
            WHERE c.relnamespace = 'public'::regnamespace AND NOT t.tgisinternal
        """,
        "ENUM types": """
            SELECT count(*) FROM pg_type AS t
            WHERE t.typnamespace = 'public'::regnamespace AND t.typtype = 'e'
        """,
        "indexes, with those of keys": """
            SELECT count(*) FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indrelid
            WHERE c.relnamespace = 'public'::regnamespace
        """,
        "partial indexes": """
            SELECT count(*) FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indrelid
            WHERE c.relnamespace = 'public'::regnamespace AND i.indpred IS NOT NULL
        """,
        "GIN indexes": """
            SELECT count(*) FROM pg_class AS c JOIN pg_am AS a ON a.oid = c.relam
            WHERE c.relnamespace = 'public'::regnamespace AND a.amname = 'gin'
        """,
        "primary and unique keys": """
            SELECT count(*) FROM pg_constraint AS c
            WHERE c.connamespace = 'public'::regnamespace AND c.contype IN ('p', 'u')
        """,
        "foreign keys": """
            SELECT count(*) FROM pg_constraint AS c
            WHERE c.connamespace = 'public'::regnamespace AND c.contype = 'f'
        """,
        "CHECK constraints": """
            SELECT count(*) FROM pg_constraint AS c
            WHERE c.connamespace = 'public'::regnamespace AND c.contype = 'c'
        """,
    },
    "mysql": {
        "tables": """
            SELECT COUNT(*) FROM information_schema.tables
            WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE'
        """,
        "columns of tables": """
            SELECT COUNT(*)
            FROM information_schema.columns AS c JOIN information_schema.tables AS t
                USING (table_schema, table_name)
            WHERE table_schema = DATABASE() AND t.table_type = 'BASE TABLE'
        """,
        "views": "SELECT COUNT(*) FROM information_schema.views WHERE table_schema = DATABASE()",
        "functions, procedures": """
            SELECT COUNT(*) FROM information_schema.routines WHERE routine_schema = DATABASE()
        """,
        "triggers": """
            SELECT COUNT(*) FROM information_schema.triggers WHERE trigger_schema = DATABASE()
        """,
        "ENUM types": "SELECT 0",
        "indexes, with those of keys": """
            SELECT COUNT(DISTINCT table_name, index_name) FROM information_schema.statistics
            WHERE table_schema = DATABASE()
        """,
        "partial indexes": "SELECT 0",
        "GIN indexes": "SELECT 0",
        "primary and unique keys": """
            SELECT COUNT(*) FROM information_schema.table_constraints
            WHERE table_schema = DATABASE() AND constraint_type IN ('PRIMARY KEY', 'UNIQUE')
        """,
        "foreign keys": """
            SELECT COUNT(*) FROM information_schema.table_constraints
            WHERE table_schema = DATABASE() AND constraint_type = 'FOREIGN KEY'
        """,
        "CHECK constraints": """
            SELECT COUNT(*) FROM information_schema.table_constraints
            WHERE table_schema = DATABASE() AND constraint_type = 'CHECK'
        """,
    },
}


def counted(database: Database) -> dict[str, int]:
    """How many of each there are in a database with the schema and nothing else."""
    counts = COUNTS[database.backend]
    return {words: int(database.execute(query)[0][0]) for words, query in counts.items()}


def bytes_per_event() -> tuple[int, int]:
    """What COMPARISON.md tells of PostgreSQL and MySQL."""
    [found] = re.findall(
        r"\| bytes per event \| ([\d,]+) B \| ([\d,]+) B \|", read("COMPARISON.md")
    )
    postgresql, mysql = (int(text.replace(",", "")) for text in found)
    return postgresql, mysql


def sizes() -> list[list[str]]:
    """Rows of the table of sizes: events a day, then for each database a day, a month, a year."""
    return [
        [
            f"{events:,}",
            *(
                " · ".join(_size(events * days * each) for days in (1, 30, 365))
                for each in bytes_per_event()
            ),
        ]
        for events in EVENTS_A_DAY
    ]


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def replaced(text: str, name: str, rows: list[list[str]]) -> str:
    """The text with the table's rows between the comments of that name."""
    begin, end = f"<!-- {name}: python -m tests.figures -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    head, _, after = rest.partition(end)
    lines = head.splitlines()[:3]  # an empty line, the names of the columns, dashes
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return before + begin + "\n".join(lines) + "\n\n" + end + after


def main() -> None:
    columns: list[dict[str, int]] = []
    for start in (servers.postgresql_server, servers.mysql_server):
        with start() as server:
            database = new_database(server)
            database.owner().apply_schema()
            columns.append(counted(database))
    postgresql, mysql = columns
    figures = [[words, str(count), str(mysql[words])] for words, count in postgresql.items()]
    text = replaced(INDEX.read_text(), "figures", figures)
    INDEX.write_text(replaced(text, "sizes", sizes()))


if __name__ == "__main__":
    main()
