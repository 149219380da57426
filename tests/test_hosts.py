"""Hosts made of network namespaces, which whole-job tests and benchmarks of networks run on."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks.hosts import missing, namespaces

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def test_hosts_of_a_killed_process_are_removed() -> None:
    code = (
        "import os, signal\n"
        "from benchmarks.hosts import namespaces\n"
        "with namespaces(3): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    listen = "import socket; server = socket.create_server(('', 5000)); print(flush=True); server.accept()"
    with namespaces(2) as (one, other):
        with subprocess.Popen(one.command(sys.executable, "-c", listen), stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            server.stdout.readline()
            call = f"import socket; socket.create_connection(({one.name!r}, 5000), timeout=10)"
            subprocess.run(other.command(sys.executable, "-c", call), check=True)
        assert server.returncode == 0
