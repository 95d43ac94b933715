#!/usr/bin/env python3
"""The hook command: leave what Claude Code tells on standard input as one file in the inbox.

In Claude Code's settings (`contextuate-persist hook install` puts it there):

    python3 -I -S emit_event.py || true

Python itself ends with status 2 if it cannot find this file, by which Claude Code would stop the
tool's use: hence the `|| true`. Everything else ends with status 0 here and prints nothing, since
Claude Code would read it; with CONTEXTUATE_DEBUG set, standard error says what went wrong.

The inbox is ~/.contextuate/monitor/inbox, or what CONTEXTUATE_INBOX names. A file is there whole or
not at all: {"id", "capturedAt", "machineId", "parentSession", "payload"}, the payload in base64, so
that it may be any bytes. Only modules that start in a moment are imported, and any Python from 3.8
on will do: the `python3` of the machine need not be the one that runs the rest.
"""

import binascii
import os
import time

INBOX = "~/.contextuate/monitor/inbox"


def capture(payload: bytes, now: int) -> bytes:
    """The content of the file."""
    number = (now // 1_000_000 & 2**48 - 1) << 80 | int.from_bytes(os.urandom(10), "big")
    digits = f"{number & ~(0xF << 76 | 3 << 62) | 7 << 76 | 2 << 62:032x}"  # a UUID of version 7
    told = {
        "id": quoted(
            "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
        ),
        "capturedAt": str(now // 1_000_000),
        "machineId": quoted(os.environ.get("HOSTNAME") or os.uname().nodename or "unknown"),
        "parentSession": quoted(os.environ.get("CONTEXTUATE_PARENT_SESSION")),
        "payload": '"' + binascii.b2a_base64(payload, newline=False).decode() + '"',
    }
    return ("{" + ", ".join(f'"{key}": {value}' for key, value in told.items()) + "}").encode()


def quoted(text: "str | None") -> str:
    """The text in JSON, null for none; importing json would take as long as all else together."""
    if not text:
        return "null"
    units = text.encode("utf-16-be", "surrogatepass")
    codes = [units[place] << 8 | units[place + 1] for place in range(0, len(units), 2)]
    plain = (
        chr(code) if 32 <= code < 127 and code not in b'"\\' else f"\\u{code:04x}" for code in codes
    )
    return '"' + "".join(plain) + '"'


def leave(content: bytes, now: int) -> None:
    """Write the file beside its place, then move it there."""
    inbox = os.path.expanduser(os.environ.get("CONTEXTUATE_INBOX") or INBOX)
    os.makedirs(inbox, mode=0o700, exist_ok=True)
    number = int.from_bytes(os.urandom(16), "big")
    name = f"{now:020}-{number & ~(0xF << 76 | 3 << 62) | 4 << 76 | 2 << 62:032x}.json"
    temporary = os.path.join(inbox, f".{name}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        # Its new name is not flushed: that takes about as long again, and an agent waits for it. A
        # power loss may so cost what hooks told in the seconds before it, but no half of anything.
        os.rename(temporary, os.path.join(inbox, name))
    except BaseException:
        os.unlink(temporary)
        raise


def read_input() -> bytes:
    """All of standard input; nothing if that is a terminal."""
    if os.isatty(0):
        return b""
    pieces = []
    while piece := os.read(0, 2**20):
        pieces.append(piece)
    return b"".join(pieces)


def main() -> None:
    """Never fail: an agent at work is worth more than a record of it."""
    now = time.time_ns()
    try:
        payload = read_input()
        if payload.strip():
            leave(capture(payload, now), now)
    except BaseException as error:
        if os.environ.get("CONTEXTUATE_DEBUG"):
            os.write(2, f"emit_event: {error!r}\n".encode(errors="replace"))


if __name__ == "__main__":
    try:
        main()
    finally:
        # Whatever was raised: without a word of it and without the interpreter's farewell.
        os._exit(0)
