"""The whole benchmark on somebody's own server: `contextuate-persist bench --url URL`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from contextuate_persist.bench import report
from contextuate_persist.bench.bare import bare
from contextuate_persist.bench.scratch import EMPTY_NAME, scratch_store
from contextuate_persist.bench.suite import Scale, Suite
from contextuate_persist.bench.year import YEAR_EVENTS, Year
from contextuate_persist.config import open_store

#: Connections of the measured store.
POOL_SIZE = 20
#: Events of the short form: a minute or two.
EVENTS = 100_000


def run(
    url: str,
    *,
    events: int | None = None,
    full: bool = False,
    json: Path | None = None,
    curves: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> str:
    """Measure the server of a URL in a schema (MySQL: a database) of its own; returns the table.

    The account must be allowed to make that; it is removed in the end, and nothing else on the
    server is touched. With `full` it is the year of `bench.year`, of YEAR_EVENTS events unless
    `events` says how many. Raises ConfigurationError where one is left over.
    """
    backend = open_store(url).backend
    kind = Year if full else Suite
    with (
        scratch_store(backend, url, pool_size=POOL_SIZE) as (store, own),
        contextlib.closing(bare(backend, own)) as opponent,
    ):
        suite = kind(
            store,
            opponent,
            partial(scratch_store, backend, url, EMPTY_NAME),
            Scale.of(events or (YEAR_EVENTS if full else EVENTS)),
            tell=tell,
        )
        suite.run()
        server = described(suite)
    if json:
        report.write_json(json, suite.figures, {backend: suite.curves}, {backend: server})
    if curves:
        report.draw(curves, {backend: suite.curves})
    return f"{report.server_line(backend, server)}\n{report.table(suite.figures)}"


def described(suite: Suite) -> dict[str, str]:
    """The server and the driver that were measured."""
    health = suite.store.health()
    return {
        **suite.bare.settings(),
        "driver": f"{health.driver} ({health.driver_implementation})",
    }
