"""The address that this host's own name leads to: gloo, of either engine, listens there."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Listener:
    """A host, and where it listens, at the address its own name resolves to."""

    host: str
    address: str
    port: int
    server: socket.socket


def listen() -> Listener:
    """Listen where gloo would, at the address that this host's own name resolves to. ValueError if it cannot."""
    host = socket.gethostname()
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{host}, its own name, does not resolve ({reason}): add it to /etc/hosts") from None
    try:
        server = socket.create_server((address[0], 0), family=family, backlog=1024)
    except OSError as error:
        raise ValueError(
            f"{host} calls itself {address[0]}, which is not its address (errno {error.errno}): correct its /etc/hosts"
        ) from None
    return Listener(host, str(address[0]), server.getsockname()[1], server)


def check_own_name(environment: Mapping[str, str]) -> str | None:
    """Whether the worker that a launcher made of this process can listen, before the workers meet.

    Horovod's gloo crashes where it cannot; torch's takes the loopback address, which serves on one host.

    Args:
        environment: of this process; one that no launcher has started is not checked.

    Returns:
        A hint where the name leads to this host alone: the launcher may give another interface.

    Raises:
        ValueError: the name does not resolve, or to an address that is not this host's.
    """
    horovod = "HOROVOD_RANK" in environment
    if not horovod and not {"RANK", "MASTER_ADDR"} <= environment.keys():
        return None
    local, whole = ("HOROVOD_LOCAL_SIZE", "HOROVOD_SIZE") if horovod else ("LOCAL_WORLD_SIZE", "WORLD_SIZE")
    several_hosts = environment.get(local) != environment.get(whole)
    if not horovod and not several_hosts:
        return None
    own = listen()
    own.server.close()
    if several_hosts and is_loopback(own.address):
        return f"{own.host} calls itself {own.address}; if the workers do not meet, that is the cause"
    return None


def is_loopback(address: str) -> bool:
    """Whether an address leads to its own host alone."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
