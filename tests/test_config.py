"""Where a store comes from: URL, environment, configuration file, embedded default."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from contextuate_persist import ConfigurationError, StoreRefused, config, open_store
from contextuate_persist.base import BaseStore
from contextuate_persist.embedded import EmbeddedStore
from tests.builders import event
from tests.conftest import Database


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o600)
    return path


def block(database: Database, **changes: Any) -> dict[str, Any]:
    parts = urlsplit(database.url)
    settings = {
        "host": parts.hostname,
        "port": parts.port,
        "database": database.name,
        "user": database.user,
        "password": database.password,
    }
    settings = {k: v for k, v in (settings | changes).items() if v is not None}
    return {
        "mode": "local",
        "persistence": {"enabled": True, "type": database.backend, "database": settings},
        "socketPath": "/tmp/contextuate-monitor.sock",
    }


def works(store: BaseStore, database: Database) -> None:
    with store:
        assert store.backend == database.backend
        assert store.save_event(event()) is True


def test_the_file_of_contextuate_names_the_database(database: Database, home: Path) -> None:
    write(home / ".contextuate/monitor/config.json", block(database))
    works(open_store(), database)


def test_a_file_can_be_named_by_argument_and_by_environment(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mine.json", block(database))
    works(open_store(config=path), database)
    monkeypatch.setenv("CONTEXTUATE_CONFIG", str(path))
    with open_store() as store:
        assert len(store.get_events("s")) == 1


def test_the_first_that_is_given_decides(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(name: str) -> dict[str, Any]:
        return {"persistence": {"type": "mysql", "database": {"host": name, "user": "u"}}}

    assert isinstance(open_store(), EmbeddedStore)
    write(home / ".contextuate/monitor/config.json", named("of-home"))
    assert "of-home:3306, database contextuate_monitor" in repr(open_store())
    environment = write(tmp_path / "environment.json", named("of-environment"))
    monkeypatch.setenv("CONTEXTUATE_CONFIG", str(environment))
    assert "of-environment" in repr(open_store())
    monkeypatch.setenv("CONTEXTUATE_DATABASE_URL", "mysql://h-of-url/d")
    assert "h-of-url" in repr(open_store())
    argument = write(tmp_path / "argument.json", named("of-argument"))
    assert "of-argument" in repr(open_store(config=argument))
    assert "explicit" in repr(open_store("postgresql://explicit/d", config=argument))


def test_a_file_without_the_block_leaves_the_default(home: Path) -> None:
    write(home / ".contextuate/monitor/config.json", {"mode": "local"})
    assert isinstance(open_store(), EmbeddedStore)


def test_a_file_of_the_working_directory_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "repository/config.json", {"persistence": {"type": "file"}})
    write(tmp_path / "repository/.contextuate/monitor/config.json", "no json")
    monkeypatch.chdir(tmp_path / "repository")
    assert isinstance(open_store(), EmbeddedStore)


def test_the_password_may_come_from_the_environment_or_a_file(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = write(tmp_path / "secret", database.password + "\n")
    path = write(tmp_path / "c.json", block(database, password=None, passwordFile=str(secret)))
    works(open_store(config=path), database)
    monkeypatch.setenv("CONTEXTUATE_DATABASE_PASSWORD", database.password)
    path = write(tmp_path / "d.json", block(database, password="wrong"))
    with open_store(config=path) as store:
        assert len(store.get_events("s")) == 1


def test_a_password_file_that_others_can_read_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = write(tmp_path / "secret", "x\n")
    database = {"type": "postgresql", "database": {"passwordFile": str(secret)}}
    path = write(tmp_path / "c.json", {"persistence": database})
    for mode, more in ((0o600, 0), (0o640, 1), (0o604, 1)):
        secret.chmod(mode)
        caplog.clear()
        open_store(config=path)
        told = f"{secret} holds a password and others can read it: chmod 600 it"
        assert [record.getMessage() for record in caplog.records] == [told] * more
    caplog.clear()
    monkeypatch.setattr(config, "_SECRETS", tmp_path)  # as in a container
    open_store(config=path)
    assert caplog.records == []


@pytest.mark.only("postgresql")
def test_libpq_finds_the_password_in_pgpassfile(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv(
        "PGPASSFILE", str(write(tmp_path / "pgpass", f"*:*:*:*:{database.password}"))
    )
    works(open_store(config=write(tmp_path / "c.json", block(database, password=None))), database)


@pytest.mark.only("mysql")
def test_mysql_finds_the_password_in_an_option_file(
    database: Database, tmp_path: Path, backend: str
) -> None:
    option_file = write(
        tmp_path / "my.cnf", f"[client]\nuser={database.user}\npassword={database.password}\n"
    )
    content = block(database, password=None, user=None, optionFile=str(option_file))
    works(open_store(config=write(tmp_path / "c.json", content)), database)


@pytest.mark.only("mysql")
def test_an_option_file_gives_a_login_as_text_and_nothing_else(
    database: Database, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = urlsplit(database.url)
    url = f"mysql://{place.netloc.rpartition('@')[2]}{place.path}?option-file=my.cnf"
    login = f"user={database.user}\npassword={database.password}\n"
    others = "raw=True\nfailover=9\ntls_versions=x\nconverter_class=5\n"
    write(tmp_path / "my.cnf", f"[client]\n{login}{others}")
    works(open_store(url), database)
    quoted = f"user = '{database.user}'  \npassword = {database.password} # the secret\n"
    write(tmp_path / "my.cnf", f"[client]\n{quoted}")
    works(open_store(url), database)
    for user in ("007", "[1]", "__import__('os').system('touch owned')"):
        write(tmp_path / "my.cnf", f"[client]\nuser={user}\npassword=secret\n")
        with pytest.raises(StoreRefused, match=re.escape(f"'{user}'")), open_store(url):
            pass
    for text in ("[client\npassword=secret", "[client]\n=secret\n", "!include secret", "!include"):
        write(tmp_path / "my.cnf", text)
        with pytest.raises(ConfigurationError, match="^option-file: "):
            open_store(url)
    assert [path.name for path in tmp_path.iterdir()] == ["my.cnf"]


def test_a_unix_socket_can_be_named(database: Database, tmp_path: Path) -> None:
    socket = database.server.socket_path
    if socket is None:
        pytest.skip("an external server: its socket is not known")
    content = block(database, host=None, socket=str(socket))
    store = open_store(config=write(tmp_path / "c.json", content))
    works(store, database)
    assert str(socket) in repr(store)


def test_passwords_with_special_characters_survive_the_file(tmp_path: Path) -> None:
    for kind in ("postgresql", "mysql"):
        database = {"host": "::1", "user": "u@x", "password": "p:/?#[]@%é ", "database": "d/e"}
        path = write(tmp_path / "c.json", {"persistence": {"type": kind, "database": database}})
        settings = str(vars(open_store(config=path)))
        assert "p:/?#[]@%é " in settings
        assert "d/e" in settings


@pytest.mark.parametrize(
    ("tls", "postgresql", "mysql"),
    [
        ({"mode": "disable"}, "sslmode=disable", "'ssl_disabled': True"),
        ({"mode": "verify-full", "ca": "/ca.pem"}, "sslrootcert=/ca.pem", "'ssl_ca': '/ca.pem'"),
        ({"ca": "/ca.pem"}, "sslmode=verify-full", "'ssl_verify_identity': True"),
        ({"cert": "/c", "key": "/k"}, "sslcert=/c", "'ssl_key': '/k'"),
        ({"mode": "verify-ca"}, "sslmode=verify-ca", "'ssl_verify_identity': False"),
        ({"mode": "require"}, "sslmode=require", "'host'"),
    ],
)
def test_tls_has_one_meaning_for_both_databases(
    tmp_path: Path, tls: dict[str, str], postgresql: str, mysql: str
) -> None:
    for kind, expected in (("postgresql", postgresql), ("mysql", mysql)):
        database = {"host": "db.example.com", "tls": tls}
        path = write(tmp_path / "c.json", {"persistence": {"type": kind, "database": database}})
        assert expected in str(vars(open_store(config=path)))


GOOD = {"type": "mysql", "database": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: "),
        ("[]", "the file is not a JSON object"),
        ({"persistence": 5}, "persistence is not a JSON object"),
        ({"persistence": {"enabled": False, **GOOD}}, "persistence.enabled is not true: set it"),
        ({"persistence": {"enabled": "yes", **GOOD}}, "persistence.enabled is not true"),
        ({"persistence": {"type": "file"}}, "contextuate-persist import"),
        ({"persistence": {"type": "sqlite"}}, "one of \"postgresql\" and \"mysql\""),
        ({"persistence": {}}, "persistence.type is one of"),
        ({"persistence": {"type": "mysql", "database": []}}, "persistence.database is not a JSON"),
        (
            {"persistence": {"type": "mysql", "database": {"hots": "x"}}},
            "persistence.database.hots is not known; known are host, port",
        ),
        (
            {"persistence": {"type": "mysql", "database": {"port": "3306"}}},
            "persistence.database.port is not of type int",
        ),
        (
            {"persistence": {"type": "mysql", "database": {"tls": {"mode": "maybe"}}}},
            "persistence.database.tls.mode is one of disable, ",
        ),
        (
            {"persistence": {"type": "mysql", "database": {"passwordFile": "/nowhere/x"}}},
            "persistence.database.passwordFile cannot be read",
        ),
        (
            {"persistence": {"type": "postgresql", "database": {"optionFile": "x"}}},
            "optionFile is MySQL's: use passwordFile",
        ),
        (
            {"persistence": {"type": "mysql", "storage": {"onFull": "prune"}}},
            "persistence.storage.onFull needs a limit: set persistence.storage.limit",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_file_setting_and_fix(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = write(tmp_path / "c.json", content)
    with pytest.raises(ConfigurationError) as caught:
        open_store(config=path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_brackets_in_a_password_are_libpqs_to_judge() -> None:
    assert "PostgreSQL at db:5432" in repr(open_store("postgresql://u:p[ab]w@db/d"))


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("sqlite:///x", "sqlite://"),
        ("SQLite://u:s3cret[x]@h/d", "sqlite://"),
        ("h/d", "what was given"),
        ("host=h password=s3cret", "what was given"),
        ("u:s3cret@h/d", "what was given"),
        ("u:s3cret://h/d", "what was given"),
        ("mysql:/h/d", "what was given"),
    ],
)
def test_a_url_of_another_kind_is_refused_without_its_password(url: str, given: str) -> None:
    with pytest.raises(ConfigurationError, match=f", not with {given}$"):
        open_store(url)


def test_a_url_that_is_no_string_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="^database URL: a string is needed, not PosixPath"
    ):
        open_store(tmp_path)  # type: ignore[arg-type]


def test_a_named_file_that_is_missing_or_unreadable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such configuration file"):
        open_store(config=tmp_path / "missing.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    for name in ("bytes.json", "."):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            open_store(config=tmp_path / name)


def test_a_file_with_a_password_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = {"password": "s3cret"}
    path = write(tmp_path / "c.json", {"persistence": {"type": "mysql", "database": database}})
    with caplog.at_level(logging.WARNING, logger="contextuate_persist"):
        open_store(config=path)
        assert caplog.text == ""
        path.chmod(0o644)
        store = open_store(config=path)
    assert "chmod 600" in caplog.text
    assert "s3cret" not in caplog.text + repr(store)


def test_the_default_file_is_contextuates() -> None:
    assert str(config.CONFIG_FILE) == "~/.contextuate/monitor/config.json"
