"""`make bench`: both backends on servers of their own, beside the original's schema and rivals."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
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
from contextuate_persist.bench.year import YEAR_EVENTS, Year
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
# MySQL reads past the page cache, where PostgreSQL finds most of a year: it gets half the memory.
YEAR_MYSQL = {
    "innodb-buffer-pool-size": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
}
# Of a year so much of the free disk stays free, for logs, binary logs and others on this machine.
SPARED_PART, SPARED_BYTES = 0.15, 8 * 10**9
# By so many events is found what each of the year takes.
TRIED_EVENTS = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--backend", choices=["postgresql", "mysql"], help="one only")
    parser.add_argument("--events", type=int, help="how many to store (1,000,000)")
    parser.add_argument(
        "--full",
        action="store_true",
        help=f"a year of {YEAR_EVENTS:,} events instead, or as many as the free disk allows",
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--curves", type=Path, help="draw growth and latency here (PNG, SVG)")
    chosen = parser.parse_args()
    figures: list[Figure] = []
    curves: dict[str, report.Curves] = {}
    servers: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    for backend in [chosen.backend] if chosen.backend else ["postgresql", "mysql"]:
        with server_of(backend, full=chosen.full) as server, contextlib.ExitStack() as stack:
            suite: Suite
            if chosen.full:
                events = chosen.events or affordable(server)
                suite = stack.enter_context(measured_year(server, events))
            else:
                suite = stack.enter_context(measured(server, chosen.events or 1_000_000))
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


def server_of(backend: str, *, full: bool) -> Server:
    if backend == "postgresql":
        return postgresql_server(options=POSTGRESQL)
    return mysql_server(options=MYSQL | YEAR_MYSQL if full else MYSQL)


def affordable(server: Server) -> int:
    """How many events of the year the disk holds, by what a part of them takes."""
    if server.external_url is not None:
        return YEAR_EVENTS  # its disk is not here
    free = shutil.disk_usage(server.directory).free
    room = free - max(SPARED_PART * free, SPARED_BYTES)
    with measured_year(server, TRIED_EVENTS) as tried:
        size = tried.bytes_per_event()
    events = min(YEAR_EVENTS, int(room / size))
    say(
        f"{server.kind}: {size:,.0f} bytes an event, {free / 1e9:,.1f} GB free: "
        f"room for {events:,} of {YEAR_EVENTS:,}"
    )
    return max(TRIED_EVENTS, events)


@contextlib.contextmanager
def measured_year(server: Server, events: int) -> Iterator[Year]:
    with opened(server) as (store, opponent, _, empty):
        yield Year(store, opponent, empty, Scale.of(events), tell=say)


@contextlib.contextmanager
def measured(server: Server, events: int) -> Iterator[Suite]:
    with (
        opened(server) as (store, opponent, own, empty),
        scratch(server.kind, server.url("bench"), "contextuate_original") as original_url,
        open_original(server.kind, original_url) as original,
    ):
        yield Suite(store, opponent, empty, Scale.of(events), rivals(own), original, tell=say)


@contextlib.contextmanager
def opened(server: Server) -> Iterator[tuple[Any, Bare, str, Any]]:
    """In a database for the while: a store, the bare driver, their URL, what opens an empty one."""
    server.create_database("bench")
    place = partial(scratch_store, server.kind, server.url("bench"))
    with (
        place(pool_size=POOL_SIZE) as (store, own),
        contextlib.closing(bare(server.kind, own)) as opponent,
    ):
        yield store, opponent, own, partial(place, EMPTY_NAME)
    server.drop_database("bench")


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


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
