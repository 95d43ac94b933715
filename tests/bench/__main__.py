"""`make bench`: both backends on servers of their own, beside the original's schema and rivals."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from contextuate_persist.bench import report
from contextuate_persist.bench.bare import Bare, bare
from contextuate_persist.bench.measure import Figure
from contextuate_persist.bench.run import POOL_SIZE, described
from contextuate_persist.bench.scratch import EMPTY_NAME, scratch, scratch_store
from contextuate_persist.bench.suite import Scale, Suite
from tests import contextuate
from tests.bench.rivals import rivals
from tests.servers import Server, mysql_server, postgresql_server

# Room as on a small server of today; durability as the servers come: flushed at each commit.
# What is stored in the end is larger than these buffers.
POSTGRESQL = {"shared_buffers": "512MB", "max_wal_size": "4GB", "max_connections": 200}
MYSQL = {
    "innodb-buffer-pool-size": "1G",
    "innodb-redo-log-capacity": "1G",
    "local-infile": "ON",
    "max-binlog-size": "256M",
    "binlog-expire-logs-seconds": 60,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--backend", choices=["postgresql", "mysql"], help="one only")
    parser.add_argument("--events", type=int, default=1_000_000, help="how many to store")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--curves", type=Path, help="draw growth and latency here (PNG, SVG)")
    chosen = parser.parse_args()
    figures: list[Figure] = []
    curves: dict[str, report.Curves] = {}
    servers: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    for backend in [chosen.backend] if chosen.backend else ["postgresql", "mysql"]:
        with server_of(backend) as server, measured(server, chosen.events) as suite:
            suite.run()
            figures += suite.figures
            curves[backend] = suite.curves
            servers[backend] = described(suite)
    for backend, settings in servers.items():
        print(report.server_line(backend, settings))
    print(report.table(figures))
    print(f"\n{time.monotonic() - started:.0f} s in all")
    if chosen.json:
        report.write_json(chosen.json, figures, curves, servers)
    if chosen.curves:
        report.draw(chosen.curves, curves)


def server_of(backend: str) -> Server:
    if backend == "postgresql":
        return postgresql_server(options=POSTGRESQL)
    return mysql_server(options=MYSQL)


@contextlib.contextmanager
def measured(server: Server, events: int) -> Iterator[Suite]:
    backend = server.kind
    server.create_database("bench")
    url = server.url("bench")
    with (
        scratch_store(backend, url, pool_size=POOL_SIZE) as (store, own),
        scratch(backend, url, "contextuate_original") as original_url,
        open_original(backend, original_url) as original,
        contextlib.closing(bare(backend, own)) as opponent,
    ):
        yield Suite(
            store,
            opponent,
            partial(scratch_store, backend, url, EMPTY_NAME),
            Scale.of(events),
            rivals(own),
            original,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )


@contextlib.contextmanager
def open_original(backend: str, url: str) -> Iterator[Bare]:
    with contextlib.closing(bare(backend, url, original=True)) as connection:
        if backend == "postgresql":
            with psycopg.connect(url, autocommit=True) as owner:
                owner.execute(contextuate.POSTGRESQL.encode())
        else:
            for statement in contextuate.MYSQL.split(";"):
                if statement.strip():
                    connection.fetch(statement)
        yield connection


if __name__ == "__main__":
    main()
