"""The guide in schemas/ is true: its commands and SQL run, its figures and messages are ours."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mysql.connector
import psycopg
import pytest

from contextuate_persist import PersistenceError, accounts, config, containers, embedded, open_store
from contextuate_persist.arguments import make_parser
from contextuate_persist.base import BaseStore
from contextuate_persist.cli import main
from contextuate_persist.config import ENVIRONMENT_CONFIG, ENVIRONMENT_URL
from contextuate_persist.mysql_store import parse_url
from contextuate_persist.schema import SCHEMA_VERSION
from tests import figures, guide, servers
from tests.builders import event
from tests.conftest import BACKENDS, Database, make_store, new_database
from tests.guide import DOCUMENTS, ROOT, Block, Shell, blocks, read, table

SOURCES = [*(ROOT / "contextuate_persist").glob("*.py"), ROOT / "examples" / "emit_event.py"]
LONGEST = {"INDEX.md": 120, "QUICK-START.md": 150, "README.md": 480}
RUN_BY_THESE_TESTS = {"sh", "sql"}
NOT_RUN = {"Docker", "systemd"}


def all_blocks(language: str, backend: str) -> list[Block]:
    return [
        block
        for document in DOCUMENTS
        for block in blocks(document)
        if block.language == language and block.runs_on(backend)
    ]


# --- The documents --------------------------------------------------------------------------------


def test_every_block_is_run_or_says_why_not() -> None:
    for document in DOCUMENTS:
        assert not re.search(r"^(?: {4}|\t)\S", _prose(document), re.MULTILINE), document
        for block in blocks(document):
            if "tested" in block.notes:
                assert (ROOT / block.notes["tested"]).is_file(), block
            elif "not run" in block.notes:
                assert block.notes["not run"] in NOT_RUN, block
            else:
                assert block.language in RUN_BY_THESE_TESTS, block


def _prose(document: str) -> str:
    return re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)


def test_every_link_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", _prose(document)):
            if target.startswith("https://"):
                continue
            file = ROOT / "schemas" / (target or document)
            assert file.exists(), f"{document}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
                anchors = {
                    re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings
                }
                assert anchor in anchors, f"{document}: #{anchor}"


def test_the_guide_is_one_that_people_read() -> None:
    for document, most in LONGEST.items():
        assert len(read(document).splitlines()) <= most, document


def test_every_command_and_option_in_the_text_is_one() -> None:
    [commands] = [
        action.choices for action in make_parser()._actions if isinstance(action.choices, dict)
    ]
    for document in DOCUMENTS:
        for line in re.findall(r"contextuate-persist ([^\n`|…]*)", read(document)):
            words = line.split("#")[0].split()
            names = [word for word in words if re.fullmatch("[a-z]+", word)]
            if not names or names[0] not in commands:
                assert words[:1] in ([], ["--help"]) or words[0].startswith("--"), line
                continue
            known = {one for action in commands[names[0]]._actions for one in action.option_strings}
            for word in words:
                if word.startswith("--"):
                    assert word.rstrip(".,;:)").partition("=")[0] in known, line


def test_no_file_of_the_directory_is_left_out() -> None:
    index = read("INDEX.md")
    for path in (ROOT / "schemas").iterdir():
        if path.name != "INDEX.md":
            assert path.name in index, path.name
    for path in (ROOT / "schemas" / "migrations").iterdir():
        assert f"migrations/{path.name}/" in index


# --- Figures --------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_catalogue(database: Database) -> None:
    column = 1 if database.backend == "postgresql" else 2
    rows = table("INDEX.md", "## What is in the schemas")
    told = {row[0]: int(row[column]) for row in rows}
    assert told == figures.counted(database), "python -m tests.figures"


def test_the_sizes_follow_from_what_was_measured() -> None:
    assert table("INDEX.md", "## Sizes") == figures.sizes(), "python -m tests.figures"


def test_the_versions_are_those_that_the_code_knows(store: BaseStore) -> None:
    rows = {row[0]: row[1:] for row in table("INDEX.md", "## Versions")}
    column = 0 if store.backend == "postgresql" else 1
    module = inspect.getmodule(type(store))
    oldest, newest = module.SUPPORTED  # type: ignore[union-attr]
    assert rows["minimum"][column].split(".")[0] == str(oldest)
    assert rows["the newest that is known to `check`"][column] == str(newest)
    assert f"or newer, MySQL {rows['minimum'][1]} or newer" in (ROOT / "README.md").read_text()
    assert SCHEMA_VERSION >= 1


# --- Configuration --------------------------------------------------------------------------------


def test_every_setting_is_in_the_reference() -> None:
    keys = {row[0] for row in table("README.md", "## Configuration") if "database" in row[0]}
    told = set(re.findall(r"`database\.([\w.]+)`", " ".join(keys)))
    expected = {key for key in config._DATABASE_KEYS if key != "tls"}
    assert told == expected | {"tls.mode", "tls.ca", "tls.cert", "tls.key"}
    source = "".join(path.read_text() for path in SOURCES)
    storage = re.findall(r"`storage\.(\w+)`", read("README.md"))
    assert f"is not known; known are {', '.join(storage)}" in source
    variables = set(re.findall(r'"(CONTEXTUATE_[A-Z_]+)"', source))
    assert variables == set(re.findall(r"^\| `(CONTEXTUATE_\w+)`", read("README.md"), re.MULTILINE))


def test_the_defaults_in_the_reference_are_the_codes() -> None:
    parameters = inspect.signature(BaseStore.__init__).parameters
    for name in ("pool_size", "connect_timeout", "pool_timeout", "statement_timeout"):
        found = re.search(rf"`{name}`\s+\((\d+)", read("README.md"))
        assert found, name
        assert float(found[1]) == parameters[name].default, name


def test_the_block_of_the_configuration_file_is_read(
    database: Database, store: BaseStore, tmp_path: Path
) -> None:
    [block] = [block for block in blocks("README.md") if block.language == "json"]
    content = json.loads(block.text)
    settings = content["persistence"]["database"]
    parts = urlsplit(database.url)
    secret = tmp_path / "password"
    secret.write_text(database.password + "\n")
    content["persistence"]["type"] = database.backend
    settings |= {
        "host": parts.hostname,
        "port": parts.port,
        "database": database.name,
        "user": database.user,
        "passwordFile": str(secret),
        "tls": {"mode": "prefer"},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    with open_store(config=file) as opened:
        assert opened.save_event(event()) is True


def test_what_check_wants_of_a_server_is_in_the_reference(store: BaseStore) -> None:
    told = read("README.md").partition("## Set-up")[2].partition("\n## ")[0]
    module: Any = inspect.getmodule(type(store))
    for name, values in (module.DURABLE | module.WANTED).items():
        if values and name != "time_zone":  # which the store sets for itself
            assert f"`{name.removeprefix('global ')}`" in told, name


def test_the_servers_know_the_settings_that_the_guide_names(server: servers.Server) -> None:
    query = "SELECT name FROM pg_settings" if server.kind == "postgresql" else "SHOW VARIABLES"
    known = {row[0] for row in server.execute(query)}
    column = 1 if server.kind == "postgresql" else 2
    for row in table("README.md", "## Tuning"):
        if row[column] == "nothing":  # the other server's alone
            continue
        [(name, since)] = re.findall(r"^`(\w+) = \S+`(?: since (\S+))?$", row[column])
        assert name in known or _numbers(server.version) < _numbers(since), row


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


# --- Commands -------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory for PATH: the servers' client programs."""
    directory = tmp_path / "programs"
    directory.mkdir()
    return directory


@pytest.fixture
def fresh_server(server: servers.Server) -> Iterator[servers.Server]:
    """A server without the names that `setup` makes if none are given."""
    names = accounts.Names()
    logins = [names.application, f"{names.application}_2", names.reader, f"{names.reader}_2"]

    def remove() -> None:
        server.drop_database(names.database)
        for name in [*logins, names.owner]:
            if server.kind == "postgresql":
                server.execute(f'DROP ROLE IF EXISTS "{name}"')
            else:
                server.execute(f"DROP USER IF EXISTS `{name}`")

    remove()
    yield server
    remove()


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Iterator[Database | None]:
    """A database on another server, as the guide has it, to copy to."""
    if "postgresql" not in (request.config.getoption("backend") or BACKENDS):
        yield None
        return
    database = new_database(request.getfixturevalue("postgresql_server"))
    database.owner().apply_schema()
    yield database
    database.drop()


def test_the_commands_lead_from_a_server_to_a_database_that_is_looked_after(
    fresh_server: servers.Server, other: Database | None, tmp_path: Path, programs: Path
) -> None:
    server = fresh_server
    home = tmp_path / "home"
    home.mkdir()
    prefix, password = (
        ("PG", "PGPASSWORD") if server.kind == "postgresql" else ("MYSQL", "MYSQL_PWD")
    )
    (home / ".my.cnf").write_text(f'[client]\npassword="{server.admin_password}"\n')
    (home / ".my.cnf").chmod(0o600)
    shell = Shell(
        home,
        programs,
        OWNER_URL=_filled(owner_url(server.kind), server),
        **{f"{prefix}_PORT": str(server.port), password: server.admin_password},
    )
    found = all_blocks("sh", server.kind)
    assert len(found) >= 4
    for block in found:
        text = guide.without_installing(block.text)
        if "new.example.com" in text:
            if other is None:
                continue
            text = re.sub(r"\w+://\S+@new\.example\.com/\w+", other.url, text)
        output = shell.run(_filled(text, server))
        if block.output is not None:
            assert output == block.output, block


def owner_url(backend: str) -> str:
    """The one that the reference has."""
    [url] = re.findall(rf"`({backend}://[^`]+)`", read("README.md").partition("## Schema")[0])
    assert isinstance(url, str)
    return url


#: What `setup` has kept of the application's account, at first and in the end.
KEPT = (
    '$(python -c "import json; '
    "print([one for one in map(json.loads, open('passwords.jsonl')) "
    "if one['purpose'] == 'application'][%d]['%s'])\")"
)


def _filled(text: str, server: servers.Server) -> str:
    """A block with what its reader puts into it: the server's place, and the password."""
    text = re.sub(r"db\.example\.com(?=/)", f"127.0.0.1:{server.port}", text)
    text = text.replace("setup postgresql ", f"setup {server.kind} ")
    step = "# Put the new ones where the programs find them"
    text = text.replace(step, f"export {ENVIRONMENT_URL}={KEPT % (-1, 'url')} {step}")
    return text.replace("db.example.com", "127.0.0.1").replace(
        ":PASSWORD@", f":{KEPT % (0, 'password')}@"
    )


def test_without_a_server_one_comes_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [block] = [block for block in blocks("QUICK-START.md") if block.notes.get("only") == "embedded"]
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o711)  # as root the server's account has to get in
        monkeypatch.setattr(embedded, "ROOT_DIRECTORY", Path(place) / "contextuate" / "postgresql")
        monkeypatch.setenv("HOME", place)
        for name in (ENVIRONMENT_URL, ENVIRONMENT_CONFIG):
            monkeypatch.delenv(name, raising=False)
        for line in guide.without_installing(block.text).splitlines():
            name, *arguments = shlex.split(line)
            assert name == "contextuate-persist"
            assert main(arguments) == 0
    assert "└── session-child-002  error" in capsys.readouterr().out


def test_the_docker_commands_are_those_of_the_program() -> None:
    ours = {
        command.split("   ")[0]
        for image in containers.IMAGES.values()
        for command in containers.hints(image).values()
    }
    quick_start = read("QUICK-START.md")
    for block in blocks("QUICK-START.md"):
        if block.notes.get("not run") == "Docker":
            for line in block.text.splitlines():
                command = line.split("   ")[0].strip()
                assert command in ours or command.startswith("contextuate-persist setup"), line
    for image in containers.IMAGES.values():
        assert f"`{image.container}`" in quick_start or f" {image.container}\n" in quick_start


# --- SQL ------------------------------------------------------------------------------------------


def query(database: Database, statement: str, *, administrator: bool) -> list[Any]:
    """The rows of a statement, for the application's account or an administrator's."""
    url = database.owner_url if administrator else database.url
    if database.backend == "postgresql":
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return list(cursor.fetchall()) if cursor.description else []
    arguments, _, _ = parse_url(url)
    with contextlib.closing(mysql.connector.connect(**arguments, autocommit=True)) as opened:
        cursor = opened.cursor()
        cursor.execute(statement)
        rows = list(cursor.fetchall()) if cursor.description else []
        while cursor.nextset():
            pass
        return rows


def test_the_sql_of_the_guide_runs(store: BaseStore, database: Database) -> None:
    store.load_sample()
    found = all_blocks("sql", database.backend)
    assert len(found) > 5
    for block in found:
        for statement in block.statements():
            administrator = block.notes.get("as") == "administrator"
            rows = query(database, statement, administrator=administrator)
        if block.output is not None:
            shown = [" | ".join("NULL" if v is None else str(v) for v in row) for row in rows]
            assert shown == block.output.splitlines(), block


def test_the_types_in_the_comparison_are_those_of_the_schemas(database: Database) -> None:
    column = 1 if database.backend == "postgresql" else 2
    shape = (ROOT / "schemas" / f"{database.backend}-shape.txt").read_text()
    rows = table("COMPARISON.md", "## Types and JSON")
    assert rows
    for row in rows:
        [name] = re.findall(r"^`([\w.]+)`", row[0])
        assert f"column {name} {row[column].strip('`')}" in shape, row


def test_the_json_in_the_comparison_means_the_same_on_both(
    store: BaseStore, database: Database
) -> None:
    store.load_sample()
    store.save_event(event(data={"error": None, "toolName": "Bash", "toolInput": {"command": "x"}}))
    column = 1 if database.backend == "postgresql" else 2
    _, _, second = read("COMPARISON.md").partition("| to get from a payload")
    found: dict[str, list[Any]] = {}
    for row in guide.rows(second):
        expression = row[column].strip("`")
        statement = f"SELECT {expression} FROM events ORDER BY timestamp, session_id DESC"
        rows = query(database, statement, administrator=False)
        found[row[0]] = [value for (value,) in rows]
    assert [*map(bool, found["whether it contains something"])].count(True) == 3
    assert found["a text"].count("Bash") == 3
    assert found["a text further down"].count("make test") == 1
    assert [*map(bool, found["whether there is a key"])].count(True) == 2
    assert [*map(bool, found["whether it says null"])].count(True) == 1
    assert [str(one).lower() for one in found["its type"]].count("object") == 3


# --- Messages -------------------------------------------------------------------------------------


def messages() -> Iterator[str]:
    """Those that the table of troubles has, … for what differs."""
    for row in table("README.md", "## Troubleshooting"):
        found = re.findall(r"`([^`]+)`", row[0])
        assert found, row
        yield from found


def ours() -> str:
    """Every text in the package, with … for what is put in."""
    texts: list[str] = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (one.value if isinstance(one, ast.Constant) else "…" for one in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts).replace("`", "…")


@pytest.fixture
def provoked(database: Database, store: BaseStore) -> Callable[[str], str]:
    """What the servers themselves say in some trouble, by the trouble."""
    parts = urlsplit(database.url)

    def provoke(trouble: str) -> str:
        url = database.url
        if trouble == "password":
            url = url.replace(f":{database.password}@", ":wrong@")
        elif trouble == "port":
            url = url.replace(f":{parts.port}/", ":9/")
        with pytest.raises(PersistenceError) as raised, make_store(url, pool_timeout=0.2) as opened:
            _do(opened, trouble)
        return str(raised.value)

    return provoke


def _do(opened: BaseStore, trouble: str) -> None:
    if trouble == "privilege":
        opened._run(lambda connection: opened._run_statements(connection, ["TRUNCATE events"]))
    elif trouble == "pool":
        with contextlib.ExitStack() as held:
            for _ in range(opened.pool_size):
                held.enter_context(opened._connection(False))
            opened.get_sessions()


def test_the_messages_are_those_that_people_get(provoked: Callable[[str], str]) -> None:
    known = ours()
    strange = {message for message in messages() if message not in known}
    # The servers' and drivers' own: each backend has one of its own.
    for trouble, words in {
        "password": {"password authentication failed", "Access denied"},
        "port": {"Connection refused", "Can't connect to MySQL server"},
        "privilege": {"permission denied", "command denied"},
        "pool": {"couldn't get a connection"},
    }.items():
        said = provoked(trouble)
        assert any(one in said for one in words) or "no connection was free" in said, said
        strange -= words
    assert strange == set()
