"""Claude Code's settings: what is ours goes in and out, and nothing else ever changes."""

from __future__ import annotations

import json
import os
import pty
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contextuate_persist import ConfigurationError, hook_settings
from contextuate_persist.cli import main
from contextuate_persist.hook_settings import ALL_HOOKS, USUAL_HOOKS, install, uninstall
from tests.asking import asked

ROOT = Path(__file__).parent.parent
OTHERS = {
    "model": "opus",
    "hooks": {
        "PreToolUse": [
            {
                "matcher": "Bash",
                "hooks": [{"type": "command", "command": "/home/dev/emit_event.py"}],
            }
        ],
        "Stop": [],
    },
    "env": {"NAME": "\u00e9\ud83d"},
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "settings.json"


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_command(*arguments: str) -> tuple[int, str, str]:
        status = main(["hook", *arguments, "--settings", str(path)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def commands(settings: Any, hook: str) -> list[str]:
    return [one["command"] for group in settings["hooks"].get(hook, ()) for one in group["hooks"]]


# --- Changes --------------------------------------------------------------------------------------


def test_what_is_put_in_runs_the_command_at_each_hook(path: Path) -> None:
    change = install(path, "run me")
    assert not path.exists()
    assert change.apply() is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    group = {
        "hooks": [{"type": "command", "command": "run me # contextuate-persist", "timeout": 10}]
    }
    assert read(path) == {"hooks": {name: [group] for name in USUAL_HOOKS}}
    assert hook_settings.installed(path) == dict.fromkeys(
        USUAL_HOOKS, "run me # contextuate-persist"
    )


def test_other_peoples_hooks_and_settings_stay(path: Path) -> None:
    path.write_text(json.dumps(OTHERS, indent=4))
    install(path, "run me").apply()
    settings = read(path)
    assert settings["model"] == "opus"
    assert settings["env"] == OTHERS["env"]
    assert list(settings) == list(OTHERS)
    assert commands(settings, "PreToolUse")[0] == "/home/dev/emit_event.py"
    assert '\n    "model"' in path.read_text()
    uninstall(path).apply()
    # But for the empty list, which went with what was in it.
    assert read(path) == {**OTHERS, "hooks": {"PreToolUse": OTHERS["hooks"]["PreToolUse"]}}  # type: ignore[index]


@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_shown_of_a_change_has_no_keys_of_others(
    path: Path, run: Run, indent: int | None
) -> None:
    secret = "sk-" + "x" * 40
    path.write_text(json.dumps({"env": {"TOKEN": secret}, "hooks": {}, "x": secret}, indent=indent))
    for action in ("install", "uninstall"):
        status, out, err = run(action, "--yes")
        assert status == 0
        assert "SessionStart" in out
        assert secret not in out + err
        assert read(path)["env"] == {"TOKEN": secret}


def test_doing_it_twice_changes_nothing(path: Path) -> None:
    path.write_text('{"a": 1.0}')
    install(path, "run me").apply()
    again = install(path, "run me")
    assert again.diff == []
    assert again.after.encode() == again.before
    uninstall(path).apply()
    assert uninstall(path).diff == []
    assert path.read_text() == '{\n  "a": 1.0\n}\n'


def test_another_command_of_ours_is_replaced_where_it_stands(path: Path) -> None:
    install(path, "old", ALL_HOOKS).apply()
    settings = read(path)
    settings["hooks"]["Stop"][0]["hooks"].insert(0, {"type": "prompt", "prompt": "Done?"})
    settings["hooks"]["Setup"][0]["matcher"] = "init"
    path.write_text(json.dumps(settings))
    install(path, "new").apply()
    assert set(hook_settings.installed(path).values()) == {"new # contextuate-persist"}
    assert read(path)["hooks"]["Setup"][0]["matcher"] == "init"
    assert read(path)["hooks"].keys() == set(ALL_HOOKS)
    uninstall(path).apply()
    assert read(path) == {"hooks": {"Stop": [{"hooks": [{"type": "prompt", "prompt": "Done?"}]}]}}


def test_a_link_stays_a_link_and_a_mode_a_mode(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "dotfiles" / "claude.json"
    target.parent.mkdir()
    target.write_text("{}")
    target.chmod(0o640)
    path.symlink_to(target)
    backup = install(path, "run me").apply()
    assert path.is_symlink()
    assert len(read(target)["hooks"]) == len(USUAL_HOOKS)
    assert backup is not None
    assert (backup.parent, backup.read_text()) == (target.parent, "{}")
    assert re.fullmatch(r"claude\.json\.\d{8}T\d{6}Z-[0-9a-f]{4}\.bak", backup.name)
    for written in (target, backup):
        assert stat.S_IMODE(written.stat().st_mode) == 0o640
    assert len(list(target.parent.iterdir())) == 2


def test_what_changed_meanwhile_is_left_alone(path: Path) -> None:
    change = install(path, "run me")
    path.write_text('{"new": true}')
    with pytest.raises(ConfigurationError, match="changed meanwhile"):
        change.apply()
    assert path.read_text() == '{"new": true}'


def test_a_failure_leaves_the_old_file_and_nothing_half_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("{}")
    change = install(path, "run me")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        change.apply()
    assert path.read_text() == "{}"
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".bak"] == ["settings.json"]


def test_a_full_disk_leaves_no_part_of_a_copy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("{}")
    change = install(path, "run me")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        change.apply()
    assert [p.name for p in path.parent.iterdir()] == ["settings.json"]


BROKEN = {
    b"{": "not valid JSON",
    b'{"a": 1,}': "not valid JSON",
    b"// settings\n{}": "not valid JSON",
    b"\xff{}": "not valid JSON",
    b"\xef\xbb\xbf{}": "not valid JSON",
    b'{"a": NaN}': "NaN is not JSON",
    b'{"a": {"b": 1, "b": 2}}': 'the key "b" stands twice',
    b"[" * 100_000: "not valid JSON",
    b'{"a": 1e999}': "cannot be written",
    b"[]": "the whole is not an object",
    b'{"hooks": null}': "hooks is not an object",
    b'{"hooks": []}': "hooks is not an object",
    b'{"hooks": {"Stop": {}}}': "hooks.Stop is not a list",
    b'{"hooks": {"Stop": [5]}}': r"hooks.Stop\[0\] is not an object",
    b'{"hooks": {"Stop": [{"type": "command"}]}}': r"hooks.Stop\[0\].hooks is not a list",
    b'{"hooks": {"Stop": [{"hooks": ["x"]}]}}': r"an entry of hooks.Stop\[0\].hooks is not",
}


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:30])
def test_what_is_broken_is_refused_in_one_line_and_left_alone(
    path: Path, run: Run, content: bytes
) -> None:
    path.write_bytes(content)
    status, out, err = run("install", "--yes")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.search(f"settings.json: .*{BROKEN[content]}", err)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("content", ["", " \n", "{}"])
def test_an_empty_file_is_filled(path: Path, content: str) -> None:
    path.write_text(content)
    install(path, "run me").apply()
    assert read(path)["hooks"].keys() == set(USUAL_HOOKS)


def test_escapes_that_only_stand_for_half_a_character_stay(path: Path) -> None:
    path.write_text('{"a": "\\ud800", "b": 123456789012345678901234567890, "c": 0}')
    install(path, "run me").apply()
    assert read(path)["a"] == "\ud800"
    assert read(path)["b"] == 123456789012345678901234567890


def test_a_handler_without_a_command_is_not_ours(path: Path) -> None:
    path.write_text(json.dumps({"hooks": {"Stop": [{"hooks": [{"command": 5}, {}]}]}}))
    assert uninstall(path).diff == []
    assert hook_settings.installed(path) == {}


# --- The default ----------------------------------------------------------------------------------


def test_hooks_that_would_change_what_claude_does_are_not_watched() -> None:
    assert set(USUAL_HOOKS) <= set(ALL_HOOKS)
    assert "MessageDisplay" not in ALL_HOOKS
    # Whoever answers that hook has to make the worktree.
    assert "WorktreeCreate" not in ALL_HOOKS
    assert len(ALL_HOOKS) == 31


def test_the_settings_are_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CLAUDE_CONFIG_DIR", raising=False)
    assert hook_settings.default_settings() == tmp_path / ".claude" / "settings.json"
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "other"))
    assert hook_settings.default_settings() == tmp_path / "other" / "settings.json"
    assert main(["hook", "install", "--yes"]) == 0
    assert (tmp_path / "other" / "settings.json").is_file()
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o700


def test_a_home_of_nobody_is_a_name_like_any_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", "~nosuchuser/x")
    assert hook_settings.default_settings() == Path("~nosuchuser/x/settings.json")
    assert main(["hook", "show"]) == 0


def test_the_command_names_python_as_it_was_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it is a link to now goes with the next upgrade."""
    python = tmp_path / "python3"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    command = hook_settings.default_command()
    assert command.startswith(f"{python} -I -S ")
    environment = {"HOME": str(tmp_path), "CONTEXTUATE_INBOX": str(tmp_path / "in")}
    payload = b'{"hook_event_name": "Stop", "session_id": "s"}'
    subprocess.run(["sh", "-c", command], input=payload, env=environment, check=True, timeout=60)
    assert len(list((tmp_path / "in").iterdir())) == 1


def test_an_installation_without_the_script_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook_settings, "_SCRIPT", "missing.py")
    with pytest.raises(ConfigurationError, match="^missing.py is missing"):
        hook_settings.default_command()


def test_the_example_has_the_hooks_that_every_version_knows() -> None:
    example = read(ROOT / "examples" / "claude_settings.json")
    (command,) = set(commands(example, "Stop"))
    assert example == hook_settings.snippet(command)
    assert re.fullmatch(r"python3 -I -S \S+/emit_event.py \|\| true # contextuate-persist", command)


# --- The command ----------------------------------------------------------------------------------


def test_it_shows_what_it_will_change_and_without_a_terminal_wants_to_be_told(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text('{\n  "model": "opus"\n}\n')
    for closed in (None, open(os.devnull)):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdin", closed)
        status, out, err = run("install")
        assert status == 1
        assert out.startswith(f"--- {path}\n+++ {path}\n@@ ")
        assert '\n+    "SessionStart": [\n' in out
        assert err == (
            f"contextuate-persist: error: {path}: nothing was changed: give --yes to change it\n"
        )
        if closed:
            closed.close()
    assert read(path) == {"model": "opus"}


def test_install_show_and_uninstall(path: Path, run: Run) -> None:
    status, out, err = run("install", "--yes")
    assert (status, err) == (0, "")
    assert out.startswith(f"--- /dev/null\n+++ {path}\n")
    assert out.endswith(f"{path}: changed\n")
    assert run("install", "--yes") == (0, f"{path}: nothing to do\n", "")
    _, out, _ = run("show")
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert shown.keys() == set(ALL_HOOKS)
    assert shown["Stop"].endswith("emit_event.py || true # contextuate-persist")
    assert shown["Setup"] == "-"
    status, out, _ = run("uninstall", "--yes")
    assert re.search(r"settings.json: changed; the old one is .*\.bak\n$", out)
    assert read(path) == {}
    assert run("uninstall") == (0, f"{path}: nothing to do\n", "")
    assert run("install", "--all", "--command", "mine", "--yes")[0] == 0
    assert set(hook_settings.installed(path).values()) == {"mine # contextuate-persist"}
    assert len(hook_settings.installed(path)) == 31


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_program_that_is_gone_is_told(
    path: Path, run: Run, tmp_path: Path, options: list[str]
) -> None:
    python = tmp_path / "3.12.1" / "python \x1b"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    command = f"'{python}' -I {path} || true"
    run("install", "--yes", "--command", command)
    _, out, err = run("show", *options)
    assert err == ""
    python.unlink()
    status, shown, err = run("show", *options)
    assert (status, shown) == (0, out)
    assert err == (
        f"{tmp_path}/3.12.1/python \\x1b does not exist, but hooks run it: "
        "`contextuate-persist hook install` again\n"
    )


@pytest.mark.parametrize(
    "command",
    ["it's", "", "emit >/nowhere/x", "python3 -c '/ 1'", "~/emit", "/no/$USER/emit", "/bin/sh; x"],
)
def test_a_command_that_only_a_shell_knows_is_shown_as_it_is(
    path: Path, run: Run, command: str
) -> None:
    run("install", "--yes", "--command", command)
    assert run("show")[::2] == (0, "")


def test_json_output_is_json_lines(path: Path, run: Run) -> None:
    def records(*arguments: str) -> list[dict[str, Any]]:
        status, out, err = run(*arguments, "--json")
        assert (status, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    assert records("install", "--yes") == [{"settings": str(path), "backup": None, "changed": True}]
    (again,) = records("install")
    assert again["changed"] is False
    shown = {record["hook"]: record["command"] for record in records("show")}
    assert shown["Setup"] is None
    assert "emit_event.py" in shown["Stop"]
    (removed,) = records("uninstall", "--yes")
    assert Path(removed["backup"]).is_file()


@pytest.mark.parametrize(("answer", "changed"), [("y", True), ("YES", True), ("", False)])
def test_a_terminal_is_asked(path: Path, answer: str, changed: bool) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "contextuate_persist", "hook", "install"]
    try:
        process = subprocess.Popen(
            [*command, "--settings", str(path)],
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.write(master, f"{answer}\n".encode())
        out, err = process.communicate(timeout=60)
    finally:
        os.close(master)
        os.close(slave)
    assert out.startswith("--- /dev/null")
    assert err.startswith(f"Change {path}? [y/N]\n")
    assert process.returncode == (0 if changed else 1)
    assert path.exists() is changed


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_will_change_is_seen_before_the_question(path: Path, options: list[str]) -> None:
    told, shown, out = asked("hook", "install", *options, "--settings", str(path))
    assert b'+    "SessionStart": [\n' in (told if options else shown)
    if options:
        (record,) = [json.loads(line) for line in (shown + out).splitlines()]
        assert record["changed"] is True


def test_names_that_would_control_the_terminal_are_only_shown(path: Path, run: Run) -> None:
    path.write_text(json.dumps({"hooks": {"\x1b[2J": [{"hooks": [{"command": "x"}]}]}}))
    settings = read(path)
    settings["hooks"]["\x1b[2J"][0]["hooks"][0]["command"] = "\x1b]0;x # contextuate-persist"
    path.write_text(json.dumps(settings, ensure_ascii=False))
    for action in (["show"], ["uninstall", "--yes"]):
        status, out, err = run(*action)
        assert status == 0
        assert "\x1b" not in out + err
