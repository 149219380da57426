"""Several hosts on one machine: network namespaces on a bridge, each with a name, an address and an sshd of its own.

Needs root, iproute2 and openssh-server. For benchmarks and tests of networks; see `hosts`.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_INTERFACE, _PORT, _BRIDGE = "eth0", 2222, "imbridge"
_NAMESPACES, _MADE = Path("/run/netns"), Path("/etc/netns")
_LOCK = Path(tempfile.gettempdir()) / "infomcr_dist_hosts.lock"


def missing() -> str | None:
    """Why this machine cannot have such hosts, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("/usr/sbin/sshd", "openssh-server")):
        if shutil.which(program) is None:
            return f"{program} is missing (Debian, Ubuntu: apt-get install {package})"
    name = f"improbe{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"network namespaces cannot be made here: {probe.stderr.strip()}"
    _run("ip", "netns", "del", name)
    return None


@dataclass(frozen=True)
class Host:
    """A network namespace: its name is the host's name, which resolves to its address on every host."""

    name: str
    address: str

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        named = f'hostname {self.name}; exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", named, "sh", *command]


@dataclass(frozen=True)
class Hosts:
    hosts: list[Host]
    folder: Path

    def horovodrun(self, *command: str, options: tuple[str, ...] = (), slots: int = 1) -> list[str]:
        """The command line that starts a Horovod job over all hosts, from the first of them."""
        where = ",".join(f"{host.name}:{slots}" for host in self.hosts)
        launcher = str(Path(sys.executable).with_name("horovodrun"))
        count = ["-np", str(slots * len(self.hosts)), "-H", where] if not options else list(options)
        return self.hosts[0].command(
            launcher, *count, "--ssh-port", str(_PORT), "--ssh-identity-file", str(self.folder / "key"),
            "--network-interface", _INTERFACE, *command,
        )  # fmt: skip

    def torchrun(self, *command: str, options: tuple[str, ...] = ()) -> list[list[str]]:
        """The command lines that start a job of torchrun, one on each host; the hosts meet at the first of them."""
        launcher = str(Path(sys.executable).with_name("torchrun"))
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.hosts[0].name}:29400"]
        count = ["--nnodes", str(len(self.hosts)), "--nproc-per-node", "1"]
        return [host.command(launcher, *count, *meeting, *options, "--no-python", *command) for host in self.hosts]

    def set_rate(self, rate: str | None) -> None:
        """Limit what every host sends to a rate in tc's notation (100mbit); None: no limit."""
        for host in self.hosts:
            tc = ["ip", "netns", "exec", host.name, "tc", "qdisc"]
            subprocess.run([*tc, "del", "dev", _INTERFACE, "root"], capture_output=True, check=False)
            if rate is not None:
                _run(*tc, "add", "dev", _INTERFACE, "root", "tbf", "rate", rate, "burst", "128kb", "latency", "400ms")

    def cut(self, host: Host) -> None:
        """Take a host off the network; nothing is sent any more."""
        _run("ip", "link", "set", f"im{host.name}", "down")

    def mend(self, host: Host) -> None:
        _run("ip", "link", "set", f"im{host.name}", "up")


@contextmanager
def namespaces(count: int) -> Iterator[list[Host]]:
    """Make ``count`` hosts without a server; at the end they are removed, with everything that still runs on them.

    Waits until no other process of this machine has any: names and addresses are always the same. Removes those of a
    process that was killed.
    """
    names = [f"node{i}" for i in range(1, count + 1)]
    table = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{i} {name}\n" for i, name in enumerate(names, 1))
    with ExitStack() as stack:
        fcntl.flock(stack.enter_context(_LOCK.open("w")), fcntl.LOCK_EX)
        if Path("/sys/class/net", _BRIDGE).exists():
            for left in {path.name for folder in (_NAMESPACES, _MADE) for path in folder.glob("node[0-9]")}:
                _remove(left)
                shutil.rmtree(_MADE / left, ignore_errors=True)
            _run("ip", "link", "del", _BRIDGE)
        _run("ip", "link", "add", _BRIDGE, "type", "bridge")
        stack.callback(_run, "ip", "link", "del", _BRIDGE)
        _run("ip", "link", "set", _BRIDGE, "up")
        made = []
        for i, name in enumerate(names, 1):
            _run("ip", "netns", "add", name)
            stack.callback(_remove, name)
            etc = _MADE / name
            etc.mkdir(parents=True)
            stack.callback(shutil.rmtree, etc)
            (etc / "hosts").write_text(table)
            _run("ip", "link", "add", f"im{name}", "type", "veth", "peer", "name", _INTERFACE, "netns", name)
            _run("ip", "link", "set", f"im{name}", "master", _BRIDGE, "up")
            inside = ["ip", "netns", "exec", name, "ip"]
            _run(*inside, "addr", "add", f"10.77.0.{i}/24", "dev", _INTERFACE)
            _run(*inside, "link", "set", _INTERFACE, "up")
            _run(*inside, "link", "set", "lo", "up")
            made.append(Host(name, f"10.77.0.{i}"))
        yield made


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """Make ``count`` hosts, each with an sshd; they are removed at the end. ``folder`` gets keys and logs."""
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    Path("/run/sshd").mkdir(exist_ok=True)
    with namespaces(count) as made, ExitStack() as stack:
        for host in made:
            options = (
                f"HostKey={folder / 'host_key'}", f"AuthorizedKeysFile={folder / 'authorized_keys'}", "UsePAM=no",
                "StrictModes=no", "PidFile=none", "PermitRootLogin=yes", f"ListenAddress={host.address}:{_PORT}",
            )  # fmt: skip
            with open(folder / f"{host.name}.log", "wb") as log:
                server = subprocess.Popen(
                    host.command("/usr/sbin/sshd", "-D", "-e", *(f"-o{o}" for o in options)), stdout=log, stderr=log
                )
            stack.callback(server.wait)
            stack.callback(server.terminate)
        _wait_for_sshd(made)
        yield Hosts(made, folder)


def _remove(name: str) -> None:
    """Remove a namespace, after the processes in it, which would keep it and its link."""
    for process in subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=False).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    subprocess.run(["ip", "link", "del", f"im{name}"], capture_output=True, check=False)
    if (_NAMESPACES / name).exists():
        _run("ip", "netns", "del", name)


def _wait_for_sshd(made: list[Host]) -> None:
    for host in made:
        for _ in range(100):
            probe = ["ip", "netns", "exec", host.name, "bash", "-c", f"exec 3<>/dev/tcp/{host.address}/{_PORT}"]
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"sshd of {host.name} does not answer")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
