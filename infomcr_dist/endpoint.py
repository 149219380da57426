"""A rank's HTTP endpoint, which Prometheus scrapes: whoever asks, and how often, training keeps its time.

The server shares Python's lock with the training. So a page is rendered at most once a second, a request that does not
come is given up, and connections beyond a few are closed at once.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import make_wsgi_app

MAX_CONNECTIONS = 16
REQUEST_SECONDS = 5.0
RENDER_SECONDS = 1.0


class Endpoint:
    """Serves a registry's metrics from a thread until `close`.

    Args:
        registry: what is served.
        address: IPv4 or IPv6 address to bind to.
        port: to listen on.

    Raises:
        OSError: the address or port cannot be bound; ``errno.EADDRINUSE`` where the port is taken.
    """

    def __init__(self, registry: CollectorRegistry, address: str, port: int) -> None:
        if not 0 < port < 65536:
            raise OSError(errno.EADDRNOTAVAIL, "ports are numbers from 1 to 65535")
        family, *_, bound = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        server_class = type("Server", (_Server,), {"address_family": family})
        self._server: WSGIServer = server_class(bound[:2], _Handler)
        self._server.set_app(_Cached(registry))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop and free the port."""
        self._server.shutdown()
        self._server.server_close()


class _Cached:
    """The WSGI app of `prometheus_client`, rendered at most once a second for each kind of request."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._app: Any = make_wsgi_app(registry)
        self._lock = threading.Lock()
        self._pages: dict[tuple[Any, ...], tuple[float, tuple[Any, ...], bytes]] = {}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        names = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "HTTP_ACCEPT", "HTTP_ACCEPT_ENCODING")
        key = tuple(environ.get(name) for name in names)
        with self._lock:
            now = time.monotonic()
            if key not in self._pages or now - self._pages[key][0] >= RENDER_SECONDS:
                self._pages = {other: page for other, page in self._pages.items() if now - page[0] < RENDER_SECONDS}
                started: list[tuple[Any, ...]] = []
                body = b"".join(self._app(environ, lambda *arguments: started.append(arguments)))
                self._pages[key] = (now, started[0], body)
            _, arguments, body = self._pages[key]
        start_response(*arguments)
        return [body]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def server_bind(self) -> None:
        """Without WSGIServer's look-up of the host's name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, *_: Any) -> None:
        """Nothing: a client that went away is no news."""


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, *_: Any) -> None:
        """Nothing: a scrape is no news."""
