"""An HTTP server of a folder on the loopback, with byte ranges, and with faults when they are asked for."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """`faults` are spent one a request (of a path that matches `faulty`); `requests` are those that came.

    Requests that "meet" are answered once they are there together, as many as `meeting` takes.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.faulty = ""
        self.tags = True
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.meeting = threading.Barrier(1)

    def fault(self, line: str) -> str:
        with self.lock:
            self.requests.append(line)
            return self.faults.pop(0) if self.faults and re.search(self.faulty, line) else ""

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that gave up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        asked = self.headers.get("Range", "")
        fault = self.server.fault(f"{self.command} {self.path} {asked}".strip())
        file = self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if fault.isdigit() or not file.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "meet":
            self.server.meeting.wait(20)
        if fault == "stall":
            self.server.over.wait(20)
        size = file.stat().st_size
        match = None if fault == "whole" else re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        start, stop = (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, size)
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(stop - start))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        if self.server.tags:
            self.send_header("ETag", f'"{file.stat().st_mtime_ns}-{size}"')
        self.end_headers()
        if body:
            with file.open("rb") as content:
                content.seek(start)
                data = content.read(stop - start)
            if fault in ("cut", "stall in the middle"):
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if fault != "cut":
                    self.server.over.wait(20)
                self.close_connection = True
                self.connection.close()
            else:
                self.wfile.write(data)


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """The folder at `server.url`."""
    os.makedirs(folder, exist_ok=True)
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
