"""The scripts of launch/, what every shell script has to pass, and Horovod's patches."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, needs_horovod

from benchmarks import hosts as network

LAUNCH = ROOT / "launch"
PATCHES = sorted((LAUNCH / "horovod").iterdir())


def is_shell_script(path: Path) -> bool:
    if not path.is_file() or "node_modules" in path.parts:
        return False
    with path.open("rb") as file:
        return path.suffix == ".sh" or (file.read(2) == b"#!" and b"sh" in file.readline())


FOLDERS = (".ci", "benchmarks", "k8s", "launch")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if is_shell_script(path))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    checked = subprocess.run(["shellcheck", script], env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(("on_term", "code"), [("lambda *_: sys.exit(75)", 0), ("signal.SIG_IGN", 1)])
def test_prestop_signals_and_waits_for_the_workers(tmp_path: Path, on_term: str, code: int) -> None:
    program = f"import signal, sys; signal.signal(15, {on_term}); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        (tmp_path / "rank-0.pid").write_text(f"{worker.pid}\n")
        ended = subprocess.run([str(LAUNCH / "prestop.sh"), str(tmp_path), "2"], check=False)
        assert ended.returncode == code
        worker.kill()


DISCOVERED = "--host-discovery-script"


@pytest.fixture
def elastic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What launch/elastic.sh gives to horovodrun."""
    launcher = tmp_path / "horovodrun"
    launcher.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    launcher.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("INTERFACE", "eth7")

    def given(*arguments: str) -> list[str]:
        done = subprocess.run([str(LAUNCH / "elastic.sh"), *arguments], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.split("\0")[:-1]

    return given


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["--min-np", "2", "--max-np", "8"], ["--blacklist-cooldown-range", "10", "60", "-np", "2"]),
        (["-np", "3", "--min-np", "2"], ["--blacklist-cooldown-range", "10", "60"]),
        (["--min-np", "2", "-np", "3"], ["--blacklist-cooldown-range", "10", "60"]),
        (["--blacklist-cooldown-range", "1", "3", "--min-np", "1"], ["-np", "1"]),
    ],
)
def test_elastic_adds_to_the_options_and_leaves_the_command(
    elastic: Callable[..., list[str]], arguments: list[str], added: list[str]
) -> None:
    command = ["env", "A=1 2", "/x/python3", "-m", "x", "--min-np", "9", DISCOVERED, "y", "--network-interface", "z"]
    assert elastic(*arguments, *command) == [*added, "--network-interface", "eth7", *arguments, *command]
    found = elastic(*arguments, "--network-interface", "lo", "infomcr", "train")
    assert found == [*added, *arguments, "--network-interface", "lo", "infomcr", "train"]


@pytest.mark.parametrize(
    ("printed", "hosts"),
    [
        ("a:2\nb:1\n", "a:2\nb:1\n"),
        ("\na:2\n \n\t\n\nb\n\n", "a:2\nb\n"),
        ("# all\r\n a:2 # up\r\n\r\n", "a:2\n"),
        ("", ""),
        ("\n", ""),
    ],
)
@pytest.mark.parametrize("path", ["hosts.sh", "python hosts/it's.sh"])
@pytest.mark.parametrize("form", [[DISCOVERED, "{}"], [DISCOVERED + "={}"]])
def test_elastic_tidies_what_the_discovery_script_prints(
    elastic: Callable[..., list[str]], tmp_path: Path, printed: str, hosts: str, path: str, form: list[str]
) -> None:
    script = tmp_path / path
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"#!/bin/sh\nprintf %s {shlex.quote(printed)}\nexit $CODE\n")
    script.chmod(0o755)
    found = elastic(*(part.format(shlex.quote(str(script)) + " --zone b") for part in form), "python", "x")
    assert "--slots-per-host" in found
    command = found[found.index(DISCOVERED) + 1]
    for code in (0, 3):  # as horovodrun runs it
        done = subprocess.run(
            command, shell=True, env=os.environ | {"CODE": str(code)}, stdout=subprocess.PIPE, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (code, hosts)


def test_elastic_leaves_the_slots_that_are_given(elastic: Callable[..., list[str]]) -> None:
    found = elastic(DISCOVERED, "x", "--slots-per-host", "4", "python")
    assert found.count("--slots-per-host") == 1
    assert found[found.index("--slots-per-host") + 1] == "4"


# Horovod's patches.


def test_every_patch_has_a_number_and_two_lines_of_why() -> None:
    assert [path.name[:5] for path in PATCHES] == [f"{number:04}-" for number in range(1, len(PATCHES) + 1)]
    for path in PATCHES:
        first, second, empty, header, *_ = path.read_text().split("\n")
        assert first.endswith(".")
        assert second.endswith(".")
        assert not empty
        assert header.startswith("--- a/")


def test_every_patch_applies_to_the_pinned_source_as_it_is(tmp_path: Path) -> None:
    script = (LAUNCH / "build_horovod.sh").read_text()
    version, expected = (re.search(rf"^{name}=(\S+)$", script, re.M) for name in ("version", "sdist_sha256"))
    assert version is not None
    assert expected is not None
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "horovod", "--retries", "0", "--timeout", "10"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", tmp_path, f"horovod=={version[1]}"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the package index does not give the source of Horovod")
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert hashlib.sha256(sdist.read_bytes()).hexdigest() == expected[1]
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in PATCHES:
        strict = ["patch", "--strip=1", "--fuzz=0", "--batch", "--forward", f"--input={path}"]
        applied = subprocess.run(
            strict, cwd=tmp_path / f"horovod-{version[1]}", capture_output=True, text=True, check=False
        )
        assert applied.returncode == 0, path.name + applied.stdout
        assert all(line.startswith("patching file ") for line in applied.stdout.splitlines()), "no offset, no fuzz"


def test_a_build_without_patch_says_what_to_install(tmp_path: Path) -> None:
    for program in ("bash", "cat", "cut", "dirname", "env", "g++", "sha256sum"):
        found = subprocess.run(["which", program], capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / program).symlink_to(found)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2.13.0 py3.11 linux-x86_64 cuda-none\n")
    python.chmod(0o755)
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [LAUNCH / "build_horovod.sh", python]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "build_horovod: no patch: install it (Debian, Ubuntu: apt-get install patch)\n"


class Job(NamedTuple):
    """A job of two ranks, each a few lines of Python, and how its launcher has to end."""

    ranks: tuple[str, str]
    code: int
    line: str
    """What the launcher prints, as a regular expression"""
    options: tuple[str, ...] = ()
    stop: bool = False
    """Whether the launcher gets SIGTERM once both ranks run"""


ON_TERM = "signal.signal(signal.SIGTERM, lambda *_: sys.exit({})); print('runs', flush=True); signal.pause()"
ELASTIC = ("--min-np", "1", "--max-np", "2", "--network-interface", "lo", "--host-discovery-script", "./discover.sh")
JOBS = {
    "mistake": Job(
        (ON_TERM.format(1), "time.sleep(0.5); sys.exit(2)"),
        2,
        "rank 1 on localhost failed first, with exit code 2",
    ),
    # Its output ends later than the other rank, which fails because the first has gone.
    "killed": Job(
        ("time.sleep(4); sys.exit(1)", "subprocess.Popen(['sleep', '3']); os.kill(os.getpid(), signal.SIGKILL)"),
        137,
        r"rank 1 on localhost failed first, with exit code 137 \(SIGKILL\)",
    ),
    "stopped": Job(
        ("print('runs', flush=True); signal.pause()", ON_TERM.format(75)),
        75,
        "rank 1 on localhost failed first, with exit code 75",
        stop=True,
    ),
    "elastic": Job(
        ("sys.exit(2)", "time.sleep(1); sys.exit(1)"),
        2,
        r"worker (localhost|127\.0\.0\.1)\[0\] failed first, with exit code 2",
        ELASTIC,
    ),
}
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
API = """
import horovod
def crash():
    raise ValueError
if __name__ == "__main__":
    try:
        horovod.run(crash, np=2)
    except RuntimeError as error:
        print(error)
"""


def stop(job: subprocess.Popen[str]) -> None:
    """SIGTERM to the launcher, once both ranks run."""
    assert job.stdout is not None
    assert [job.stdout.readline().partition(":")[2] for _ in range(2)] == ["runs\n"] * 2
    job.terminate()


@needs_horovod
def test_launchers_that_start_at_once_share_their_cache(tmp_path: Path) -> None:
    """The file in which Horovod keeps what it has found out about hosts is one for all launchers of a user."""
    code = (
        "from horovod.runner.util.cache import Cache\n"
        f"for i in range(300): Cache({str(tmp_path)!r}, 60, 'x').put(i % 7, 'x' * 100_000)\n"
    )
    launchers = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for launcher in launchers:
        _, errors = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, errors
    assert [path.name for path in tmp_path.iterdir()] == ["cache.bin"]


@needs_horovod
def test_horovodrun_ends_with_the_code_of_the_first_worker_that_failed(tmp_path: Path) -> None:
    """Static and elastic jobs, side by side; a call of ``horovod.run`` raises as before."""
    launcher = Path(sys.executable).with_name("horovodrun")
    environment = os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    (tmp_path / "discover.sh").write_text("#!/bin/sh\nprintf 'localhost:1\\n127.0.0.1:1\\n'\n")
    (tmp_path / "discover.sh").chmod(0o755)
    (tmp_path / "api.py").write_text(API)
    commands = {"api": [sys.executable, "api.py"]}
    for name, job in JOBS.items():
        for rank, program in enumerate(job.ranks):
            (tmp_path / f"{name}-{rank}.py").write_text(f"import os, signal, subprocess, sys, time\n{program}\n")
        commands[name] = [str(launcher), "-np", "2", *job.options, "sh", "-c", f"exec python {name}-$HOROVOD_RANK.py"]
    started = {
        name: subprocess.Popen(command, cwd=tmp_path, env=environment, **PIPES) for name, command in commands.items()
    }
    try:
        for name, job in JOBS.items():
            if job.stop:
                stop(started[name])
        output = {name: process.communicate(timeout=120) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    for name, job in JOBS.items():
        errors = output[name][1]
        assert started[name].returncode == job.code, (name, *output[name])
        (line,) = [line for line in errors.splitlines() if line.startswith("horovodrun: ")]
        assert re.fullmatch(f"horovodrun: {job.line}", line)
        assert "Traceback" not in errors, name
    assert started["api"].returncode == 0
    assert "one or more processes exited with non-zero status" in output["api"][0]


@needs_horovod
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_a_stopped_job_on_two_hosts_ends_with_what_the_ranks_beside_the_launcher_report(tmp_path: Path) -> None:
    """Its ssh to the other host ends with 255, whatever the rank there does."""
    (tmp_path / "rank.py").write_text(f"import signal, sys\n{ON_TERM.format(75)}\n")
    with network.hosts(2, tmp_path) as made:
        command = made.horovodrun(sys.executable, str(tmp_path / "rank.py"))
        with subprocess.Popen(command, cwd=tmp_path, **PIPES) as job:
            stop(job)
            _, errors = job.communicate(timeout=120)
    assert job.returncode == 75, errors
    assert errors.endswith("\nhorovodrun: rank 0 on node1 failed first, with exit code 75\n")
