"""The writer while another server takes the place of the one that it knew."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from contextuate_persist import EventWriter
from tests import servers
from tests.conftest import Database, new_database
from tests.proxy import Proxy
from tests.test_daemon import eventually
from tests.test_faults import through
from tests.test_writer_faults import Producers, opened, until_it_says


@pytest.fixture(autouse=True)
def _quiet_pool(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="psycopg.pool")


@contextlib.contextmanager
def a_database(server: servers.Server) -> Iterator[Database]:
    """A database of a server of its own, whose files we may copy."""
    if server.socket_path is None:
        pytest.skip("the server is external or in a container: its files are not ours to copy")
    with server:
        database = new_database(server)
        database.owner().apply_schema()
        yield database


def heir_of(server: servers.Server) -> servers.Server:
    """A server on another port that will start with a copy of this one's files."""
    new = servers.postgresql_server if server.kind == "postgresql" else servers.mysql_server
    heir = new()
    heir.admin_password = server.admin_password

    def copy(_: servers.Server) -> None:
        heir.directory.chmod(0o700)
        if heir.setup:
            shutil.chown(heir.directory, heir.setup["user"], heir.setup["group"])
        subprocess.run(["cp", "-a", server.directory / "data", heir.directory], check=True)
        (heir.directory / "data" / "postmaster.pid").unlink(missing_ok=True)

    heir.prepare = copy
    return heir


def test_an_heir_with_the_same_files_gets_the_rest_in_order_and_once(
    backend: str, tmp_path: Path
) -> None:
    new = servers.postgresql_server if backend == "postgresql" else servers.mysql_server
    with a_database(new()) as database:
        port = urlsplit(database.url).port
        assert port is not None
        heir = heir_of(database.server)
        with (
            opened(database.url) as warm,  # MySQL then knows the password without TLS
            Proxy(port) as proxy,
            opened(through(proxy, database)) as store,
            EventWriter(store, spool_directory=tmp_path / "spool") as writer,
        ):
            warm.init()
            producers = Producers(writer)
            time.sleep(1)
            database.server.kill()
            eventually(lambda: writer.health().retries > 0)  # it has noticed
            with heir:
                moved = Database(backend, heir, database.name, database.user, database.password)
                with opened(moved.url) as warm_too:
                    warm_too.init()
                    proxy.lead_to(heir.port)
                    time.sleep(1)
                    producers.stop()
                    producers.require_all(store)


@pytest.mark.only("postgresql")
@pytest.mark.parametrize("way", ["hosts", "proxy"])
def test_a_standby_that_is_promoted_gets_the_rest_in_order_and_once(
    backend: str, tmp_path: Path, way: str
) -> None:
    with a_database(servers.postgresql_server()) as database:
        primary = database.server
        standby = heir_of(primary)
        primary.stop()
        copy = standby.prepare

        def follow(_: servers.Server) -> None:
            copy(standby)
            data = standby.directory / "data"
            (data / "standby.signal").touch()
            with (data / "postgresql.auto.conf").open("a") as file:
                place = f"host=127.0.0.1 port={primary.port} user={primary.admin_user}"
                file.write(f"primary_conninfo = '{place} password={primary.admin_password}'\n")

        standby.prepare = follow
        primary.start()
        assert urlsplit(database.url).port == primary.port
        with standby, Proxy(primary.port) as proxy:
            attached = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
            primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.execute("SELECT pg_reload_conf()")
            until = time.monotonic() + 30
            while primary.execute(attached) != [(1,)]:
                assert time.monotonic() < until, standby.log_tail()
                time.sleep(0.05)
            hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
            url = (
                database.url.replace(f"127.0.0.1:{primary.port}", hosts)
                + "?target_session_attrs=read-write"
                if way == "hosts"
                else through(proxy, database)
            )
            with (
                opened(url) as store,
                EventWriter(store, spool_directory=tmp_path / "spool") as writer,
            ):
                producers = Producers(writer)
                time.sleep(1)
                primary.kill()
                proxy.lead_to(standby.port)  # read-only for a while
                if way == "proxy":
                    until_it_says(writer, "read-only")
                else:
                    time.sleep(1)
                standby.execute("SELECT pg_promote()")
                time.sleep(1)
                producers.stop()
                producers.require_all(store)
