"""Certificates for the tests, each with what is right or wrong about it."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import trustme

from tests.servers import Material

#: A name of this machine that no rule takes for this machine: the server there counts as remote.
ELSEWHERE = "0.0.0.0"


class Authority:
    """An authority that clients know, one that nobody knows, and servers' certificates of both."""

    def __init__(self, directory: Path) -> None:
        self._known, self._unknown = trustme.CA(), trustme.CA()
        self._directory = directory
        self.file = directory / "known-authority.pem"
        self._known.cert_pem.write_to_path(str(self.file))
        self.right = self.server()

    def server(self, fault: str | None = None) -> Material:
        """What a server shows: right, or `expired`, of a `wrong host`, of an `unknown CA`."""
        begun = datetime(2020, 1, 1, tzinfo=timezone.utc)
        ended = datetime(2021, 1, 1, tzinfo=timezone.utc)
        issuer = self._unknown if fault == "unknown CA" else self._known
        names = ["db.example.com"] if fault == "wrong host" else [ELSEWHERE, "127.0.0.1"]
        dates = {"not_before": begun, "not_after": ended} if fault == "expired" else {}
        issued = issuer.issue_cert(*names, **dates)
        return Material(
            certificate=b"".join(pem.bytes() for pem in issued.cert_chain_pems),
            key=issued.private_key_pem.bytes(),
            authority=self._known.cert_pem.bytes(),
        )

    def client(self, name: str, *, known: bool = True) -> dict[str, str]:
        """The parameters of a URL that show a client's certificate for this name."""
        issued = (self._known if known else self._unknown).issue_cert(common_name=name)
        files = {"sslcert": issued.cert_chain_pems[0], "sslkey": issued.private_key_pem}
        for word, pem in files.items():
            path = self._directory / f"{name}-{known}-{word}.pem"
            pem.write_to_path(str(path))
            path.chmod(0o600)
        return {word: str(self._directory / f"{name}-{known}-{word}.pem") for word in files}
