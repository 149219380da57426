"""Workers that join and leave: real elastic jobs, on several names of this machine and on several hosts of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, WORKERS, needs_horovod

from benchmarks import hosts as network
from infomcr_dist import checkpoint

pytestmark = needs_horovod
RECIPE = """
model: plain_net:build_slow
epochs: 60
data: {path: DATA, augmentation: crop1_flip, global_batch_size: 60}
schedule: {milestones: [2]}
optimizer: {learning_rate: 0.05}
regularizer: {sub_batch_size: 10, beta: 5}
metric: {trials: 0}
hang_timeout_seconds: 6
threads: 1
"""
STEPS = 5


class Job:
    """An elastic run, its workers and what it has recorded."""

    def __init__(self, folder: Path, name: str, hosts: list[str], command: list[str]) -> None:
        self.run, self.hosts = folder / name, folder / f"{name}-hosts"
        self.set_hosts(hosts)
        script = folder / f"{name}-discover.sh"
        noise = (
            "printf '\\n \\t\\n# all that are up\\r\\n'; sed 's/:1/ # one/' "
            if command[0].endswith("elastic.sh")
            else "cat "
        )
        script.write_text(f"#!/bin/sh\n{noise}{self.hosts}\n")
        script.chmod(0o755)
        self.log = folder / f"{name}.log"
        command = [part.replace("SCRIPT", str(script)) for part in command]
        environment = os.environ | {"PYTHONPATH": f"{WORKERS}:{ROOT}", "http_proxy": "http://127.0.0.1:9"}  # nobody
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def set_hosts(self, hosts: list[str]) -> None:
        beside = self.hosts.with_suffix(".new")
        beside.write_text("".join(f"{host}:1\n" for host in hosts))
        beside.replace(self.hosts)

    def records(self, kind: str = "step") -> list[dict[str, Any]]:
        try:
            lines = (self.run / "records.jsonl").read_text().splitlines(keepends=True)
        except OSError:
            return []
        return [r for r in map(json.loads, (x for x in lines if x.endswith("\n"))) if r["kind"] == kind]

    def size(self) -> int:
        steps = self.records()
        return steps[-1]["world_size"] if steps else 0

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                ended = f"ended with {self.process.poll()}" if self.process.poll() is not None else "not in time"
                pytest.fail(f"{what}: {ended}\n{self.text()[-6000:]}")
            time.sleep(0.1)

    def steps_more(self, count: int) -> None:
        before = len(self.records())
        self.wait_for(f"{count} more steps", lambda: len(self.records()) >= before + count)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def workers(self) -> dict[str, int]:
        """Process ids of the workers, by host."""
        found = {}
        for process in (int(p) for p in os.listdir("/proc") if p.isdigit()):
            try:
                words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
                host = environment_of(process).get("HOROVOD_HOSTNAME")
            except OSError:
                continue
            if host and words[0].endswith("python") and "-m" in words and f"run_dir={self.run}" in words:
                found[host] = process
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                raise


def environment_of(process: int) -> dict[str, str]:
    words = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    root = tmp_path_factory.mktemp("elastic")
    (root / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    return root


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[dict[str, Any]]:
    """The steps of the same run on one worker, never restarted."""
    command = [sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", "run_dir=undisturbed"]
    command += ["telemetry.port=null", "model=plain_net:build"]
    environment = os.environ | {"PYTHONPATH": f"{WORKERS}:{ROOT}"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    lines = (folder / "undisturbed" / "records.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "step"]


def check_against(steps: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> None:
    """Every global batch once, in order, with the same losses: the rate and the penalty's strength did not change."""
    undisturbed = undisturbed[: len(steps)]
    for field in ("step", "epoch", "phase", "global_samples", "learning_rate", "beta"):
        assert [s[field] for s in steps] == [s[field] for s in undisturbed], field
    for field, rel in (("loss", 1e-3), ("gradient_norm", 2e-3)):
        assert [s[field] for s in steps] == pytest.approx([s[field] for s in undisturbed], rel=rel, abs=1e-5), field


@pytest.fixture
def three_names(folder: Path) -> Iterator[tuple[Job, list[str]]]:
    names = ["localhost", "127.0.0.1", os.uname().nodename]
    command = [
        str(ROOT / "launch" / "elastic.sh"), "--min-np", "1", "--max-np", "3", "-np", "3", "--network-interface", "lo",
        "--blacklist-cooldown-range", "1", "3", "--host-discovery-script", "SCRIPT",
        sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", f"run_dir={folder / 'names'}", "resume=auto",
        "telemetry.port=null",
    ]  # fmt: skip
    job = Job(folder, "names", names, command)
    yield job, names
    job.end()


def test_workers_are_killed_leave_hang_and_join(
    three_names: tuple[Job, list[str]], undisturbed: list[dict[str, Any]]
) -> None:
    job, names = three_names
    job.wait_for("three workers train", lambda: job.size() == 3 and len(job.records()) > STEPS)
    lost = environment_of(job.workers()[names[0]])
    for number, (fault, host) in enumerate(
        [(signal.SIGKILL, names[0]), (signal.SIGTERM, names[1]), (signal.SIGSTOP, names[2])], 1
    ):
        os.kill(job.workers()[host], fault)
        job.wait_for(f"two continue after {fault.name}", lambda: job.size() == 2)
        job.steps_more(2)
        job.wait_for("the third comes back", lambda: job.size() == 3)
        job.steps_more(2)
        assert len([r for r in job.records("restart") if r["elastic_restarts"].get("worker_lost")]) >= number
    # A worker that was given up and comes back, as from a network that was cut, is not let in beside its successor.
    server = f"http://{lost['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{lost['HOROVOD_GLOO_RENDEZVOUS_PORT']}"
    asked = f"{server}/rank_and_size/{names[0]}:0:{lost['HOROVOD_START']}"
    assert urllib.request.urlopen(asked, timeout=20).read() == b"-1,-1,-1,-1,-1,-1"
    assert re.search(r"error: rank \d has hung for 6 s: killed", job.text())
    job.set_hosts(names[:2])
    job.wait_for("two continue without a host that left", lambda: job.size() == 2)
    job.set_hosts(names)
    job.wait_for("a host that joined takes part", lambda: job.size() == 3)
    assert job.records("restart")[-1]["elastic_restarts"]["hosts_changed"] >= 2
    job.wait_for("the end", lambda: job.process.poll() is not None or len(job.records()) == 60 * STEPS, seconds=240)
    assert job.process.wait(60) == 0, job.text()[-3000:]
    steps = job.records()
    assert {s["world_size"] for s in steps} == {2, 3}
    assert {(s["world_size"], s["samples"]) for s in steps if s["global_samples"] == 60} >= {(2, 30), (3, 20)}
    check_against(steps, undisturbed)


def test_settings_that_follow_the_number_of_workers_are_refused(folder: Path) -> None:
    command = [
        str(ROOT / "launch" / "elastic.sh"), "--min-np", "1", "-np", "1", "--network-interface", "lo",
        "--host-discovery-script", "SCRIPT", sys.executable, "-m", "infomcr_dist.train", "recipe.yaml",
        f"run_dir={folder / 'refused'}", "telemetry.port=null", "regularizer.sub_batch_size=null",
        "regularizer.sub_batches=2",
    ]  # fmt: skip
    job = Job(folder, "refused", ["localhost"], command)
    try:
        assert job.process.wait(60) != 0
        assert "error: regularizer.sub_batch_size must be given where the number of workers may change" in job.text()
    finally:
        job.end()


@pytest.fixture
def three_hosts(tmp_path: Path) -> Iterator[network.Hosts]:
    if reason := network.missing():
        pytest.skip(reason)
    with network.hosts(3, tmp_path) as made:
        yield made


def test_a_host_is_cut_from_the_network_and_comes_back(
    folder: Path, three_hosts: network.Hosts, undisturbed: list[dict[str, Any]]
) -> None:
    names = [host.name for host in three_hosts.hosts]
    command = three_hosts.horovodrun(
        sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", f"run_dir={folder / 'cut'}", "resume=auto",
        options=(
            "--min-np", "2", "--max-np", "3", "-np", "3", "--blacklist-cooldown-range", "1", "3",
            "--host-discovery-script", "SCRIPT",
        ),
    )  # fmt: skip
    job = Job(folder, "cut", names, command)
    try:
        job.wait_for("three hosts train", lambda: job.size() == 3 and len(job.records()) > STEPS)
        three_hosts.cut(three_hosts.hosts[2])
        job.set_hosts(names[:2])
        job.wait_for("two hosts continue", lambda: job.size() == 2, seconds=150)
        job.steps_more(STEPS)
        three_hosts.mend(three_hosts.hosts[2])
        job.set_hosts(names)
        job.wait_for("the third comes back", lambda: job.size() == 3, seconds=150)
        job.steps_more(2)
        page = subprocess.run(
            three_hosts.hosts[0].command("curl", "-s", "http://127.0.0.1:9500/metrics"), capture_output=True, text=True
        ).stdout
        value = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("infomcr_"))
        assert float(value["infomcr_world_size"]) == 3
        assert float(value['infomcr_elastic_restarts_total{reason="worker_lost"}']) >= 1
        check_against(job.records(), undisturbed)
    finally:
        job.end()


def test_workers_whose_launcher_is_gone_save_and_end(folder: Path, three_hosts: network.Hosts) -> None:
    """The launcher has no worker beside it, as on Kubernetes; sshd passes no signal to its workers."""
    command = three_hosts.horovodrun(
        sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", f"run_dir={folder / 'orphans'}", "resume=auto",
        "hang_timeout_seconds=60", options=("-np", "2", "-H", "node2:1,node3:1"),
    )  # fmt: skip
    job = Job(folder, "orphans", [], command)
    try:
        job.wait_for("two hosts train", lambda: job.size() == 2 and len(job.records()) > STEPS)
        job.process.terminate()
        job.process.wait(90)
        end = time.monotonic() + 60
        while job.workers() and time.monotonic() < end:
            time.sleep(0.1)
        assert not job.workers()
        newest = checkpoint.load_newest(job.run, pytest.fail)[1]
        assert newest["step"] == job.records()[-1]["step"]
    finally:
        job.end()
