"""TLS on both databases: what is verified, what is refused, and in which words."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from contextuate_persist import ConfigurationError, StoreRefused, config, open_store, tls
from contextuate_persist.base import BaseStore
from tests import servers
from tests.authority import ELSEWHERE, Authority
from tests.builders import event
from tests.conftest import Database, make_store, new_database


@pytest.fixture(scope="module")
def _remote(tls_server: servers.Server) -> Iterator[Database]:
    database = new_database(tls_server)
    database.owner().apply_schema()
    yield database
    database.drop()


@pytest.fixture
def remote(_remote: Database, authority: Authority) -> Iterator[Database]:
    """A database on a server that shows the right certificate, at its end again."""
    yield _remote
    _remote.server.show(authority.right)


def url(database: Database, host: str = ELSEWHERE, **parameters: str) -> str:
    place = database.url.replace("127.0.0.1", host)
    return f"{place}?{urlencode(parameters)}" if parameters else place


def encrypted(store: BaseStore) -> bool:
    statement = (
        "SELECT ssl::text FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        if store.backend == "postgresql"
        else "SHOW SESSION STATUS LIKE 'Ssl_cipher'"
    )

    def ask(connection: object) -> bool:
        if store.backend == "postgresql":
            return bool(connection.execute(statement).fetchone()[0] == "true")  # type: ignore[attr-defined]
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute(statement)
        return bool(cursor.fetchall()[0][1])

    return store._run(ask)


def works(store: BaseStore) -> bool:
    """Whether a store takes an event; and whether that goes encrypted."""
    with store:
        assert store.save_event(event()) is True
        return encrypted(store)


def refusal(url: str) -> str:
    start = time.monotonic()
    with pytest.raises(StoreRefused) as caught:
        make_store(url).init()
    assert time.monotonic() - start < 4  # nothing is waited for: tomorrow it is the same
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


#: The driver of MySQL twice: its two implementations verify by two libraries.
PURE = [{}, {"use-pure": "1"}]


def variants(backend: str) -> list[dict[str, str]]:
    return PURE if backend == "mysql" else [{}]


def test_a_server_elsewhere_is_verified_by_the_authorities_of_this_machine(
    remote: Database, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    for more in variants(remote.backend):
        assert works(make_store(url(remote, **more))) is True
        assert works(make_store(url(remote, sslmode="verify-full", **more))) is True
    assert works(make_store(url(remote, sslrootcert="system"))) is True


def test_an_authority_of_ones_own_is_named(remote: Database, authority: Authority) -> None:
    assert "cannot be verified" in refusal(url(remote))
    for more in variants(remote.backend):
        assert works(make_store(url(remote, sslrootcert=str(authority.file), **more))) is True


@pytest.mark.parametrize(
    ("fault", "meaning"),
    [
        ("expired", "expired"),
        ("wrong host", "host name"),
        ("unknown CA", "cannot be verified"),
    ],
)
def test_a_certificate_that_cannot_be_verified_is_refused_in_one_line(
    remote: Database, authority: Authority, fault: str, meaning: str
) -> None:
    remote.server.show(authority.server(fault))
    for more in variants(remote.backend):
        given = {"sslrootcert": str(authority.file), **more}
        assert meaning in refusal(url(remote, **given))
        assert meaning in refusal(url(remote, sslmode="verify-full", **given))
        name_only = fault == "wrong host"
        for mode in ("verify-ca", "require"):  # with an authority, both look at the issuer only
            if name_only:
                assert works(make_store(url(remote, sslmode=mode, **given))) is True
            else:
                assert meaning in refusal(url(remote, sslmode=mode, **given))
        # In so many words, and then it is encrypted but not verified.
        assert works(make_store(url(remote, sslmode="require", **more))) is True


def test_a_local_server_is_verified_once_an_authority_is_named(
    remote: Database, authority: Authority
) -> None:
    assert works(make_store(url(remote, "127.0.0.1", sslrootcert=str(authority.file)))) is True
    remote.server.show(authority.server("unknown CA"))
    assert "cannot be verified" in refusal(
        url(remote, "127.0.0.1", sslrootcert=str(authority.file))
    )
    assert works(make_store(url(remote, "127.0.0.1"))) is True


def test_a_server_without_tls_is_refused_unless_plain_text_is_asked_for(
    backend: str, authority: Authority
) -> None:
    started = (
        servers.postgresql_server()
        if backend == "postgresql"
        else servers.mysql_server(options={"tls-version": ""})
    )
    with started as server:
        database = new_database(server)
        database.owner().apply_schema() if backend == "postgresql" else None
        for more in variants(backend):
            for mode in ("verify-full", "verify-ca", "require"):
                given = {"sslmode": mode, "sslrootcert": str(authority.file), **more}
                message = refusal(url(database, **given))
                if "use-pure" not in more:  # it says of a password it cannot send: access denied
                    assert "offers no TLS" in message
        assert "offers no TLS" in refusal(url(database))
        if backend == "postgresql":
            assert works(make_store(url(database, sslmode="disable"))) is False
            assert works(make_store(url(database, sslmode="prefer"))) is False
        else:
            # MySQL's accounts take no password in plain text that the server does not know yet.
            assert "plain text" in refusal(url(database, sslmode="disable"))


def test_a_server_that_takes_no_plain_text_says_what_to_do(remote: Database) -> None:
    if remote.backend == "postgresql":
        place = url(remote, sslmode="disable").replace(remote.user, "certified")
        assert "no encryption" in refusal(place)
        return
    remote.server.execute("SET GLOBAL require_secure_transport = ON")
    try:
        assert "sslmode=require" in refusal(url(remote, sslmode="disable"))
    finally:
        remote.server.execute("SET GLOBAL require_secure_transport = OFF")


def test_a_client_is_known_by_its_certificate(remote: Database, authority: Authority) -> None:
    remote.server.create_login("certified", "pw", remote.name)
    if remote.backend == "mysql":
        remote.server.execute("ALTER USER 'certified'@'%' REQUIRE X509")
    place = remote.server.url(remote.name, "certified", "pw").replace("127.0.0.1", ELSEWHERE)

    def with_certificate(**parameters: str) -> str:
        return f"{place}?{urlencode({'sslrootcert': str(authority.file), **parameters})}"

    try:
        for more in variants(remote.backend):
            shown = authority.client("certified") | more
            assert works(make_store(with_certificate(**shown))) is True
            for bad in (with_certificate(**more),):
                with pytest.raises(StoreRefused):
                    make_store(bad).init()
        if remote.backend == "postgresql":
            assert "sslcert=FILE" in refusal(with_certificate())
    finally:
        remote.server.drop_login("certified", remote.name)


def test_files_that_are_missing_are_named_before_anything_is_sent(remote: Database) -> None:
    for word in ("sslrootcert", "sslcert", "sslkey"):
        with pytest.raises(ConfigurationError, match=f"^{word}: /nowhere/x is not there$"):
            make_store(url(remote, sslmode="verify-full", **{word: "/nowhere/x"})).init()
        with pytest.raises(ConfigurationError, match=f"^{word}: /usr is a directory$"):
            make_store(url(remote, sslmode="verify-full", **{word: "/usr"})).init()


@pytest.mark.only("mysql")  # libpq looks for the other one below ~/.postgresql
@pytest.mark.parametrize("word", ["sslcert", "sslkey"])
def test_a_certificate_without_its_key_is_refused(remote: Database, word: str) -> None:
    with pytest.raises(ConfigurationError, match="both or neither"):
        make_store(url(remote, sslmode="require", **{word: "/dev/null"})).init()


def test_the_tls_block_of_the_file_means_the_same(
    remote: Database, authority: Authority, tmp_path: Path
) -> None:
    def opened(**block: str) -> BaseStore:
        database = {
            "host": ELSEWHERE,
            "port": remote.server.port,
            "database": remote.name,
            "user": remote.user,
            "password": remote.password,
            "tls": block,
        }
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"persistence": {"type": remote.backend, "database": database}}))
        path.chmod(0o600)
        return open_store(config=path)

    assert works(opened(ca=str(authority.file))) is True
    assert works(opened(mode="require")) is True
    with pytest.raises(StoreRefused, match="cannot be verified"):
        opened(mode="verify-full").init()
    with pytest.raises(StoreRefused, match="cannot be verified"):
        opened().init()


@pytest.mark.only("mysql")
def test_mysqls_own_words_are_understood(
    remote: Database, authority: Authority, backend: str
) -> None:
    own = {"ssl-mode": "VERIFY_IDENTITY", "ssl-ca": str(authority.file)}
    assert works(make_store(url(remote, **own))) is True
    assert works(make_store(url(remote, ssl_mode="required"))) is True
    with pytest.raises(ConfigurationError, match="sslmode is one of disable, "):
        make_store(url(remote, sslmode="maybe"))


def test_a_socket_needs_no_tls_whatever_is_asked(remote: Database, authority: Authority) -> None:
    socket = str(remote.server.socket_path)
    word = "host" if remote.backend == "postgresql" else "socket"
    login = remote.url.rpartition("@")[0]
    port = f":{remote.server.port}" if remote.backend == "postgresql" else ""
    place = f"{login}@{port}/{remote.name}?{word}={socket}"
    for mode in ("verify-full", "prefer", "disable"):
        works(make_store(f"{place}&sslmode={mode}&sslrootcert={authority.file}"))


@pytest.mark.only("postgresql")
def test_libpqs_own_variables_and_files_hold(
    remote: Database, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    backend: str,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setenv("PGSSLMODE", "disable")
        assert works(make_store(url(remote))) is False
    with monkeypatch.context() as patch:
        patch.setenv("PGSSLROOTCERT", str(authority.file))
        assert works(make_store(url(remote))) is True
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        (tmp_path / ".postgresql").mkdir()
        (tmp_path / ".postgresql/root.crt").write_bytes(authority.file.read_bytes())
        assert works(make_store(url(remote))) is True
        remote.server.show(authority.server("unknown CA"))
        # It says whom to trust, not that a server of this machine has to be verified: for one that
        # is not trusted libpq then prefers plain text.
        assert works(make_store(url(remote, "127.0.0.1"))) is False
        assert "cannot be verified" in refusal(url(remote))
    (tmp_path / "services").write_text("[there]\nsslmode=require\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    assert works(make_store(url(remote, service="there"))) is True


def test_a_machine_without_authorities_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    assert tls.authorities()  # another of the usual places
    monkeypatch.setattr(tls, "_BUNDLES", ())
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    with pytest.raises(ConfigurationError, match="^sslrootcert: .*install"):
        tls.authorities()


def test_words_of_other_faults_are_left_alone() -> None:
    for reason in ("Connection refused", "SSL error: unexpected eof while reading", ""):
        assert tls.refusal(reason) is None
    assert config.is_local(ELSEWHERE) is False
