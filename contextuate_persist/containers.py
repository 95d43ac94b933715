"""Servers in Docker: start one, wait until it answers, say how to stop, remove and enter it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from contextuate_persist.errors import ConfigurationError, StoreUnavailable

_COMMAND_SECONDS = 60
_PULL_SECONDS = 1800

# The servers look at a new password only while there is no data, and that outlives a container.
_PASSWORD_FILE = ".contextuate-password"  # noqa: S105  (a name, not a password)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A server's image, and the container that is made of it."""

    tag: str  # pinned: next year's run starts the same server
    container: str
    port: int
    port_variable: str
    user: str
    password_variable: str
    data: str  # where in the container its volume lies
    client: str


IMAGES = {
    "mysql": Image(
        tag="mysql:9.7.0",
        container="contextuate-mysql",
        port=3306,
        port_variable="MYSQL_PORT",
        user="root",
        password_variable="MYSQL_ROOT_PASSWORD",  # noqa: S106  (a name, not a password)
        data="/var/lib/mysql",
        client="sh -c 'MYSQL_PWD=\"$MYSQL_ROOT_PASSWORD\" mysql -u root'",
    ),
    "postgresql": Image(
        tag="postgres:17.10",
        container="contextuate-postgres",
        port=5432,
        port_variable="PG_PORT",
        user="postgres",
        password_variable="POSTGRES_PASSWORD",  # noqa: S106  (a name, not a password)
        data="/var/lib/postgresql/data",
        client="psql -U postgres",
    ),
}


def require_docker() -> None:
    """Raise ConfigurationError, with the way out, where no Docker runs."""
    way_out = "or use `contextuate-persist setup mysql` or `postgresql` for a server that is there"
    if shutil.which("docker") is None:
        raise ConfigurationError(f"docker is not installed: install it, {way_out}")
    try:
        _docker(["version", "--format", "{{.Server.Version}}"])
    except StoreUnavailable as error:
        raise ConfigurationError(f"docker does not run ({error}): start it, {way_out}") from None


def start(image: Image, port: int | None) -> tuple[bool, int]:
    """Start the container, on this machine's loopback only: whether it had to be, and its port.

    Raises ConfigurationError if the one that is there has another port than the given.
    """
    listed = ["ps", "--all", "--filter", f"name=^{image.container}$", "--format", "{{.State}}"]
    state = _docker(listed)
    if state == "created":  # its port could not be had: it never ran, and has no data
        _docker(["rm", image.container])
        state = ""
    if not state:
        return True, _run(image, port or image.port)
    # Not `docker port`, which tells nothing of one that is stopped.
    bound = f'(index (index .HostConfig.PortBindings "{image.port}/tcp") 0).HostPort'
    held = int(_docker(["inspect", "--format", f"{{{{{bound}}}}}", image.container]))
    if port not in (None, held):
        raise ConfigurationError(
            f"{image.port_variable}: {image.container} has port {held}; to give it another, first "
            f"docker rm --force {image.container} (its data stays)"
        )
    if state != "running":
        _docker(["start", image.container])
    return state != "running", held


def _run(image: Image, port: int) -> int:
    """Make the container and run it; its port."""
    # By the environment: whatever stands on a command line everybody on the machine can read.
    variable = image.password_variable
    try:
        _docker(
            [
                "run", "--detach", "--name", image.container,
                "--publish", f"127.0.0.1:{port}:{image.port}",
                "--volume", f"{image.container}:{image.data}",
                "--env", variable, image.tag,
            ],
            seconds=_PULL_SECONDS,
            **{variable: _kept_password(image) or secrets.token_urlsafe(24)},
        )  # fmt: skip
    except StoreUnavailable as error:
        # It is made even if it cannot run, and would be started later with the port that is taken.
        with contextlib.suppress(StoreUnavailable):
            _docker(["rm", image.container])
        if "port" in str(error) or "address" in str(error):
            reason = f"{error}; name another port with {image.port_variable}"
            raise StoreUnavailable(reason) from None
        raise
    return port


def administrator_password(image: Image) -> str:
    """The password that the container was made with; else it is kept in the volume alone."""
    return _docker(["exec", image.container, "printenv", image.password_variable])


def keep_password(image: Image) -> None:
    """Put the password beside the data: the next container of the volume has to have the same."""
    file = f"{image.data}/{_PASSWORD_FILE}"
    script = (
        f"umask 077; [ -s {file} ] || {{ printenv {image.password_variable} >{file}.new "
        f"&& chown --reference={image.data} {file}.new && mv {file}.new {file}; }}"
    )
    _docker(["exec", image.container, "sh", "-c", script])


def _kept_password(image: Image) -> str:
    """The password of the server whose data is in the volume; empty if there is none."""
    script = f"cat {image.data}/{_PASSWORD_FILE} 2>/dev/null || :"
    return _docker(
        [
            "run", "--rm", "--volume", f"{image.container}:{image.data}",
            "--entrypoint", "sh", image.tag, "-c", script,
        ],
        seconds=_PULL_SECONDS,
    )  # fmt: skip


def hints(image: Image) -> dict[str, str]:
    """What people want to do with a container next, and the commands for it."""
    return {
        "stop": f"docker stop {image.container}",
        "remove": f"docker rm --force {image.container}   (its data stays)",
        "remove the data": f"docker volume rm {image.container}",
        "shell": f"docker exec --interactive --tty {image.container} {image.client}",
    }


def _docker(arguments: Sequence[str], seconds: int = _COMMAND_SECONDS, **environment: str) -> str:
    try:
        done = subprocess.run(
            ["docker", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env={**os.environ, **environment},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StoreUnavailable(f"docker {arguments[0]}: {error}") from None
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise StoreUnavailable(f"docker {arguments[0]}: {reason}")
    return done.stdout.strip()
