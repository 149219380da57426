"""What scrapes a run, and what a run pushes to, never stops it or takes its time."""

import errno
import http.client
import math
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Gauge

from benchmarks.chaos import free_ports
from infomcr_dist import endpoint, telemetry
from infomcr_dist.config import TelemetrySettings
from infomcr_dist.endpoint import Endpoint
from infomcr_dist.telemetry import Telemetry


class Counting(CollectorRegistry):
    """Counts how often it is collected."""

    collected = 0

    def collect(self) -> Any:
        self.collected += 1
        return super().collect()


@pytest.fixture
def served() -> Iterator[tuple[Counting, int]]:
    registry, port = Counting(), free_ports()
    Gauge("infomcr_answer", "What is asked for", registry=registry).set(42)
    with closing(Endpoint(registry, "127.0.0.1", port)):
        yield registry, port


def scrape(port: int, address: str = "127.0.0.1", **headers: str) -> str:
    request = urllib.request.Request(f"http://{address}:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(response.read().decode())


@pytest.mark.parametrize(("seconds", "renders"), [(math.inf, 1), (0.0, 20)])
def test_a_page_is_rendered_once_for_all_who_ask_in_time(
    seconds: float, renders: int, served: tuple[Counting, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "RENDER_SECONDS", seconds)
    registry, port = served
    for _ in range(20):
        assert "infomcr_answer 42.0" in scrape(port)
    assert registry.collected == renders
    assert "# EOF" in scrape(port, Accept="application/openmetrics-text; version=1.0.0"), "another kind of request"


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01\x02\x00\x01\x00"])
def test_requests_that_do_not_come_are_given_up(
    sent: bytes, served: tuple[Counting, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint._Handler, "timeout", 0.5)
    threads = threading.active_count()
    clients = []
    for _ in range(3 * endpoint.MAX_CONNECTIONS):
        client = socket.create_connection(("127.0.0.1", served[1]), timeout=10)
        clients.append(client)
        with suppress(OSError):  # closed at once, beyond those that it takes
            client.sendall(sent)
        assert threading.active_count() <= threads + endpoint.MAX_CONNECTIONS
    for client in clients:
        with suppress(OSError):
            while client.recv(4096):
                pass  # the server closes each of them: reading ends
        client.close()
    answered = ""
    while not answered:
        with suppress(OSError, http.client.HTTPException):  # a thread that ends may still count
            answered = scrape(served[1])
    assert "infomcr_answer 42.0" in answered


def test_addresses() -> None:
    port = free_ports()
    with closing(Endpoint(Counting(), "::1", port)):
        scrape(port, "[::1]")
    for address, port in (("no-such-host.invalid", 9500), ("127.0.0.1", 70_000)):
        with pytest.raises(OSError, match=r"."):
            Endpoint(Counting(), address, port)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use") as refused:
        Endpoint(Counting(), "127.0.0.1", taken.getsockname()[1])
    assert refused.value.errno == errno.EADDRINUSE


def test_the_memory_of_a_rank_is_that_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the current device is of the thread that answers."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 1000.0 + (device.index if device else 0))
    port = free_ports()
    for device, expected in (("cpu", None), ("cuda:3", "infomcr_gpu_memory_bytes 1003.0")):
        settings = TelemetrySettings(port=port)
        run = Telemetry(
            settings, rank=3, local_rank=0, world_size=4, device=torch.device(device), info={"model": "cnn"}
        )
        text = scrape(port)
        run.close()
        assert (expected in text) if expected else ("gpu_memory" not in text)


def read_request(client: socket.socket) -> None:
    """Read one HTTP request to the end of its body."""
    with client.makefile("rb") as stream:
        headers = http.client.parse_headers(stream) if stream.readline() else {}
        stream.read(int(headers.get("Content-Length", 0)))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no answer in 1 s"),
        (b"", "closed"),
        (b"HTTP/1.1 500 Oh no\r\nContent-Length: 0\r\n\r\n", "500"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0"),
    ],
)
def test_a_pushgateway_that_is_none_costs_a_line(
    answer: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_PUSH_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        settings = TelemetrySettings(port=None, pushgateway=f"127.0.0.1:{listening.getsockname()[1]}")
        run = Telemetry(settings, rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), info={"model": "cnn"})
        run.begin(tmp_path / "records.jsonl", 10, 0)
        lines: list[str] = []
        monkeypatch.setattr(run, "message", lines.append)

        def serve() -> None:
            client, _ = listening.accept()
            read_request(client)  # all of it: to close with bytes unread is to reset the connection
            if answer is not None:
                client.sendall(answer)
                client.close()
            else:
                held.append(client)

        held: list[socket.socket] = []
        server = threading.Thread(target=serve)
        server.start()
        run.push()
        server.join()
        run.close()
        for client in held:
            client.close()
    (line,) = lines
    assert line.startswith(f"telemetry.pushgateway={settings.pushgateway} did not take the metrics: ")
    assert reason in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "address", ["gateway", "gateway:", ":9091", "http://gateway:9091", "u:p@gateway:9091", "a b:1"]
)
def test_a_pushgateway_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match=r"telemetry.pushgateway must be HOST:PORT"):
        TelemetrySettings(pushgateway=address)
