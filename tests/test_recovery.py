"""The commands of the guide's chapter on backups do what it says: they are run from its text."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import open_store
from contextuate_persist.config import ENVIRONMENT_URL
from tests import servers
from tests.builders import T0, event, session
from tests.conftest import Database, make_store

GUIDE = Path(__file__).parents[1] / "schemas/README.md"
NAME = "contextuate_monitor"


def chapter(title: str) -> dict[str, list[str]]:
    """The blocks of commands, and of settings, below a heading."""
    text = GUIDE.read_text(encoding="utf-8")
    (found,) = re.findall(
        rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE
    )
    return {
        kind: re.findall(rf"^```{kind}\n(.*?)^```", found, re.DOTALL | re.MULTILINE)
        for kind in ("sh", "conf")
    }


def run(script: str, environment: Mapping[str, str], **options: Any) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def fails(script: str, program: str, environment: Mapping[str, str], place: Path) -> None:
    """Run it where a program writes half of its output and fails: no step after it must trust that.

    Without -e, as in a crontab.
    """
    (place / program).write_text("#!/bin/sh\necho half\nexit 2\n")
    (place / program).chmod(0o755)
    path = {"PATH": f"{place}:{environment['PATH']}"}
    argv = ["sh", "-c", script]
    assert subprocess.run(argv, env={**environment, **path}, check=False).returncode == 2


# Where the nights are, and where somebody recovers.
NEW_YORK, TOKYO = {"TZ": "EST5"}, {"TZ": "JST-9"}


def fill(url: str) -> None:
    with make_store(url) as store:
        store.save_session(session())
        store.save_event(event(data={"before": "the backup \0 \ud800"}))


def add(url: str) -> None:
    with make_store(url) as store:
        store.save_event(event(timestamp=T0 + 1, data={"after": "it \0 DELIMITER ;"}))


def spoil(url: str) -> None:
    with make_store(url) as store:
        store.save_event(event("later"))
        store.delete_session("s")


def check_recovered(url: str) -> None:
    """What there was at the last good moment, and nothing of what came after it."""
    with open_store(url) as store:
        payloads = [dict(one.data) for one in store.get_events("s")]
        assert payloads == [
            {"before": "the backup \0 \ud800"},
            {"after": "it \0 DELIMITER ;"},
        ]
        assert store.get_session("later") is None
        assert store.save_event(event("later")) is True


def pause() -> datetime:
    """A moment that is neither in the second of what came before nor of what comes after."""
    now = datetime.now(timezone.utc)
    moment = (now + timedelta(seconds=2)).replace(microsecond=0)
    time.sleep((moment - now).total_seconds() + 1.1)
    return moment


@pytest.fixture
def first(backend: str) -> Iterator[servers.Server]:
    start = servers.postgresql_server if backend == "postgresql" else servers.mysql_server
    made = start()
    if made.external_url is not None:
        pytest.skip("an external server: its settings are not ours to change")
    with made as server:
        yield server


@pytest.mark.only("postgresql")
def test_postgresql_is_recovered_to_a_moment_as_the_guide_has_it(
    first: servers.Server, tmp_path: Path
) -> None:
    blocks = chapter("Any moment: PostgreSQL")
    backup, switch, recover = blocks["sh"]
    # Below the server's own directory, which its account may enter, and which is removed with it.
    place = first.directory / "srv"
    user = first.setup.get("user")
    owner = {"user": user, "group": first.setup["group"], "extra_groups": []} if user else {}
    wal = place / "backup/wal"
    for path in (place, place / "backup", wal):
        path.mkdir()
        if user:
            os.chown(path, user, first.setup["group"])
    with (first.directory / "data/postgresql.conf").open("a") as file:
        file.write(blocks["conf"][0].replace("/srv/", f"{place}/"))
        # What starts the second server says no more than the guide does.
        file.write("unix_socket_directories = ''\nlisten_addresses = '127.0.0.1'\n")
    first.restart()
    first.create_database(NAME)
    url = first.url(NAME)
    make_store(url).apply_schema()
    fill(url)

    passwords = first.directory / "pgpass"
    passwords.write_text(f"*:*:*:*:{first.admin_password}\n")
    passwords.chmod(0o600)
    if user:
        os.chown(passwords, user, first.setup["group"])
    bindir = Path(first.argv(first)[0]).parent
    environment = {
        "PATH": f"{bindir}:{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(first.port),
        "PGUSER": first.admin_user,
        "PGPASSFILE": str(passwords),
        "HOME": str(first.directory),
        "LC_ALL": "C",
        **NEW_YORK,
    }

    def execute(script: str, **more: str) -> str:
        return run(
            script.replace("/srv/", f"{place}/"), {**environment, **more}, cwd=place, **owner
        )

    for _ in range(2):  # nights
        time.sleep(1.1)  # whose names have seconds
        execute(backup)
    for program in ("pg_basebackup", "pg_verifybackup"):
        (broken := tmp_path / program).mkdir()
        fails(backup.replace("/srv/", f"{tmp_path}/"), program, environment, broken)
    [new] = (tmp_path / "backup").iterdir()
    assert new.name.startswith("new-")
    archived = min(wal.iterdir())
    assert archived.suffix == ".gz"
    assert archived.stat().st_size < 4 * 2**20  # of 16
    (place / "again").write_bytes(gzip.decompress(archived.read_bytes()))
    (place / "other").write_bytes(b"another server's")
    for name in ("again", "other"):
        (place / name).chmod(0o644)
    (command,) = re.findall("^archive_command = '(.*)'$", blocks["conf"][0], re.MULTILINE)
    command = command.replace("%f", archived.stem)
    execute(command.replace("%p", "/srv/again"))  # as after a crash, before it was noted as done
    with pytest.raises(AssertionError):
        execute(command.replace("%p", "/srv/other"))
    add(url)
    moment = pause()
    spoil(url)
    execute(backup)  # before anybody noticed
    (place_in_log,) = re.findall("[0-9A-F]+/[0-9A-F]+", execute(switch))
    # The file before it: the one that begins there is not in use yet.
    query = f"""
        SELECT last_archived_wal >= pg_walfile_name('{place_in_log}'::pg_lsn - 1)
        FROM pg_stat_archiver
    """
    until = time.monotonic() + 60
    while not first.execute(query)[0][0]:
        assert time.monotonic() < until
        time.sleep(0.05)
    first.stop()

    port = servers._free_port()
    recover = recover.replace("5433", str(port))
    execute(recover, MOMENT=moment.isoformat(sep=" "), **TOKYO)
    try:
        recovered = url.replace(f":{first.port}/", f":{port}/")
        until = time.monotonic() + 60
        while True:  # it takes logins to read before it has ended recovery
            try:
                check_recovered(recovered)
                break
            except Exception:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
    finally:
        execute("pg_ctl --pgdata=/srv/restored --mode=immediate stop")


@pytest.mark.only("mysql")
def test_mysql_is_recovered_to_a_moment_as_the_guide_has_it(
    first: servers.Server, mysql_server: servers.Server, tmp_path: Path
) -> None:
    blocks = chapter("Any moment: MySQL")
    backup, copy, recover = blocks["sh"]
    tools = tmp_path / "tools"
    tools.mkdir()
    next(iter(servers.find_mysql())).write_tools(tools)
    for name, server in ((".my.cnf", first), ("restored.cnf", mysql_server)):
        lines = {
            "host": "127.0.0.1",
            "port": server.port,
            "user": server.admin_user,
            "password": server.admin_password,
        }
        file = tmp_path / name
        file.write_text("[client]\n" + "".join(f"{k}={v}\n" for k, v in lines.items()))
        file.chmod(0o600)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LC_ALL": "C",
        **NEW_YORK,
    }

    def execute(script: str, **more: str) -> str:
        return run(script.replace("/srv/", f"{tmp_path}/"), {**environment, **more})

    # The settings are what the server has by itself, or a name that it knows.
    names = re.findall(r"^(\w+) = (\w+)$", blocks["conf"][0], re.MULTILINE)
    assert len(names) == 2
    for name, value in names:
        first.execute(f"SET GLOBAL {name} = {value}")

    first.create_database(NAME)
    url = first.url(NAME)
    try:
        make_store(url).apply_schema()
        fill(url)
        for night in range(2):
            time.sleep(1.1)  # the names have seconds
            execute(backup)
            execute(copy)
            with make_store(url) as store:
                store.save_event(event("busy", T0 + night))
        bases = [*(tmp_path / "backup").glob("base-*.sql")]
        assert len(bases) == 2
        (broken := tmp_path / "broken").mkdir()
        time.sleep(1.1)
        fails(backup.replace("/srv/", f"{tmp_path}/"), "mysqldump", environment, broken)
        assert [*(tmp_path / "backup").glob("base-*.sql")] == bases
        assert {path.stat().st_mode & 0o777 for path in bases} == {0o600}
        add(url)
        moment = pause()
        spoil(url)
        execute(backup)  # before anybody noticed
        execute(copy)
        execute(recover, MOMENT=moment.strftime("%Y-%m-%d %H:%M:%S"), **TOKYO)
        check_recovered(mysql_server.url(NAME))
    finally:
        mysql_server.drop_database(NAME)


def test_the_commands_for_backups_work_as_the_guide_has_them(
    empty_database: Database,  # and no other test's: a restored schema is not the same to the byte
    backend: str,
    server: servers.Server,
    tmp_path: Path,
) -> None:
    first, encrypted = chapter("Backup and restore")["sh"]
    database = empty_database
    database.owner().apply_schema()
    with make_store(database.url) as store:
        store.load_sample()
    tools = tmp_path / "tools"
    tools.mkdir()
    if backend == "mysql":
        next(iter(servers.find_mysql())).write_tools(tools)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    places, make, verify, test, load = first.splitlines()

    def execute(script: str, url: str) -> str:
        script = script.replace("/srv/", f"{tmp_path}/")
        if made := sorted(
            (tmp_path / "backup").glob("*"), key=lambda file: file.stat().st_mtime_ns
        ):
            script = script.replace("BACKUP", str(made[-1]))
        return run(script, {**os.environ, "PATH": path, ENVIRONMENT_URL: url})

    execute(places, "")
    assert "4 sessions" in execute(make, database.url)
    assert "as it was written" in execute(verify, "")
    assert "dropped again" in execute(test, server.admin_url)
    database.clear()
    assert "the same" in execute(load, database.owner_url)
    *make, verify = encrypted.splitlines()
    assert "encrypted" in execute("\n".join(make), database.url)
    assert "as it was written" in execute(verify, "")
