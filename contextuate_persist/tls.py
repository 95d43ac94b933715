"""TLS, with one meaning for both databases: which words ask for it, and what its refusals mean.

The words are libpq's: sslmode, sslrootcert, sslcert, sslkey.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from contextuate_persist.errors import ConfigurationError

#: What the words of a configuration file's `tls` block are in a URL, of either database.
WORDS = {"mode": "sslmode", "ca": "sslrootcert", "cert": "sslcert", "key": "sslkey"}
#: Beside each mode what MySQL's own programs call it.
MODES = {
    "disable": "DISABLED",
    "prefer": "PREFERRED",
    "require": "REQUIRED",
    "verify-ca": "VERIFY_CA",
    "verify-full": "VERIFY_IDENTITY",
}
VERIFYING = ("verify-ca", "verify-full")

# Where distributions keep the authorities, for a Python that was built elsewhere.
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def settle(given: Mapping[str, str], *, local: bool, trusted: str = "") -> dict[str, str]:
    """The settings that hold: those given, and verification where nothing else was said.

    A server elsewhere is verified, and so is one whose authority is named. `require` with an
    authority checks the certificate, though not the name in it: so libpq understands it. `trusted`
    are the authorities if none are named, else those of this machine.
    """
    settled = {word: given[word] for word in WORDS.values() if given.get(word)}
    named = "sslrootcert" in settled
    mode = settled.setdefault("sslmode", "verify-full" if named or not local else "prefer")
    if mode == "require" and named:
        mode = settled["sslmode"] = "verify-ca"
    if mode in VERIFYING:
        settled.setdefault("sslrootcert", trusted or "system")
        if settled["sslrootcert"] == "system":
            settled["sslrootcert"] = authorities()
    return settled


def authorities() -> str:
    """The file of the certificate authorities that this machine trusts.

    Named, since drivers that bring an OpenSSL of their own look where it was built.
    """
    for file in (ssl.get_default_verify_paths().cafile, *_BUNDLES):
        if file and Path(file).is_file():
            return file
    raise ConfigurationError(
        "sslrootcert: this machine has no file of certificate authorities: install "
        "ca-certificates, or name the server's authority with sslrootcert=FILE"
    )


def check_files(settings: Mapping[str, str]) -> None:
    """Refuse files that cannot be read: the drivers say little about them, or nothing."""
    for word in ("sslrootcert", "sslcert", "sslkey"):
        file = settings.get(word)
        # libpq also knows "system" and keys on devices, "engine:key".
        if not file or file == "system" or ":" in file:
            continue
        path = Path(file)
        if not os.access(path, os.R_OK) or path.is_dir():
            there = "is a directory" if path.is_dir() else "cannot be read"
            raise ConfigurationError(f"{word}: {file} {there if path.exists() else 'is not there'}")


def refusal(reason: str, *, encrypted: bool = False) -> str | None:
    """What a driver's word about a handshake means and what helps; None if TLS is not the matter.

    The words are those of libpq, of MySQL's client library and of Python's ssl. MySQL's goes on in
    plain text where the server offers no TLS, and with `encrypted` that was not wanted.
    """
    for words, meaning in _REFUSALS.items():
        if any(word in reason for word in words):
            return NOT_OFFERED if encrypted and meaning is PLAIN_TEXT else meaning
    return None


NOT_OFFERED = (
    "the server offers no TLS, and a server elsewhere is reached in plain text only if that is "
    "asked for: turn TLS on there, or say sslmode=disable"
)
PLAIN_TEXT = "the server takes no login in plain text: say sslmode=require, or better verify-full"
_REFUSALS = {
    ("does not match host name", "Hostname mismatch", "IP address mismatch"): (
        "the server's certificate is for another host name: use the name that it is for, or have "
        "a certificate made for this one (sslmode=verify-ca does not check the name)"
    ),
    ("certificate has expired",): "the server's certificate has expired: have a new one made",
    ("certificate verify failed", "certificate in certificate chain"): (
        "the server's certificate cannot be verified: it has expired, or is for another host "
        "name, or comes from an authority unknown here, which sslrootcert=FILE makes known"
    ),
    ("does not support SSL", "doesn't support it"): NOT_OFFERED,
    (
        "requires a valid client certificate",
        "certificate required",
        "alert handshake failure",
    ): "the server wants a certificate of the client: name it with sslcert=FILE and sslkey=FILE",
    ("insecure transport", "requires secure connection"): PLAIN_TEXT,
}
