"""A command that asks on a terminal while its output goes into a pipe."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys


def asked(*words: str, **environment: str) -> tuple[bytes, bytes, bytes]:
    """Answer y: standard error up to the question, output before it, output after it."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "contextuate_persist", *words],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": ""},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        told = b""
        while b"[y/N]" not in told:
            told += process.stderr.readline()
        ready, _, _ = select.select([process.stdout], [], [], 0)
        shown = os.read(process.stdout.fileno(), 2**16) if ready else b""
        os.write(ours, b"y\n")
        out, _ = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    return told, shown, out
