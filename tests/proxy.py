"""A TCP proxy that can go silent, cut connections, or swallow the answer to one statement."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from types import TracebackType


class Proxy:
    """Forwards to a port of this machine; what it does to the traffic is set while it runs."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._stop = False
        self.port: int = self._listener.getsockname()[1]
        #: Accept and read, but pass nothing on.
        self.silent = False
        #: Read nothing, so that whoever sends has to wait.
        self.deaf = False
        #: Cut a connection once a statement with these bytes has been sent and answered; once.
        self.swallow_answer_to: bytes | None = None
        self._swallowing: set[socket.socket] = set()
        self.swallowed = 0

    def __enter__(self) -> Proxy:  # noqa: PYI034  (Self needs Python 3.11)
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop = True
        self._thread.join(10)
        self.cut_all()
        self._listener.close()
        self._selector.close()

    def lead_to(self, port: int) -> None:
        """From now on forward to another port; connections that there are go on as they were."""
        self._target = port

    def cut_all(self) -> int:
        with self._lock:
            clients = list(self._clients)
            for client in clients:
                self._cut(client)
            return len(clients)

    def _serve(self) -> None:
        while not self._stop:
            if self.deaf:
                time.sleep(0.02)
                continue
            for key, _ in self._selector.select(0.02):
                source = key.fileobj
                assert isinstance(source, socket.socket)
                with self._lock:
                    if source is self._listener:
                        self._accept()
                    elif source in self._peers:
                        self._forward(source)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._target), 5)
        except OSError:
            client.close()
            return
        self._peers[client], self._peers[server] = server, client
        self._clients.add(client)
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        peer = self._peers[source]
        try:
            data = source.recv(65_536)
        except OSError:
            data = b""
        if not data:
            self._cut(source)
            return
        if self.silent:
            return
        if peer in self._swallowing:  # the server has answered: it has done what it was told
            self.swallowed += 1
            self._cut(source)
            return
        wanted = self.swallow_answer_to
        if wanted is not None and source in self._clients and wanted in data:
            self.swallow_answer_to = None
            self._swallowing.add(source)
        with contextlib.suppress(OSError):
            peer.sendall(data)

    def _cut(self, one: socket.socket) -> None:
        for end in (one, self._peers.pop(one, None)):
            if end is not None:
                self._peers.pop(end, None)
                self._clients.discard(end)
                self._swallowing.discard(end)
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(end)
                end.close()
