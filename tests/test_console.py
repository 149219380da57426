"""No console ends or delays a command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import needs_horovod

from pipelines.console import DetachedStream, detached

TRAIN = [
    *(
        "-m",
        "infomcr_dist.train",
        "model=cnn",
        "epochs=2",
        "threads=1",
        "regularizer.when=never",
        "telemetry.port=null",
    ),
    *("data.backend=torch", "data.augmentation=none", "data.batch_size=64", "evaluation.every_epochs=1"),
    *("metric.trials=2", "metric.samples=4", "metric.every_epochs=1"),
    *("schedule.kind=constant", "schedule.milestones=[]", "schedule.warmup_epochs=0"),
]


def python(code: str, encoding: str = "utf-8", redirected: str = "") -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirected}', sys.executable, code]
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("entered", ["lenient()", "detached().__enter__()"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "ascii:strict"])
def test_what_an_encoding_lacks_is_escaped(encoding: str, entered: str) -> None:
    code = (
        f"import sys; from pipelines.console import *; context = {entered}; print('γ̂ 日'); print('→', file=sys.stderr)"
    )
    done = python(code + "; [s.finish() for s in (sys.stdout, sys.stderr) if hasattr(s, 'finish')]", encoding)
    assert done.returncode == 0
    assert r"\u65e5" in done.stdout
    assert r"\u2192" in done.stderr


@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1"])
def test_a_console_that_takes_nothing_ends_nothing(redirected: str, tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    code = (
        "import pathlib, sys\nfrom pipelines.console import detached\nwith detached():\n"
        f"  print('x' * 10000); print('y', file=sys.stderr, flush=True); pathlib.Path({str(reached)!r}).touch()"
    )
    done = python(code, redirected=redirected)
    assert (done.returncode, reached.exists()) == (0, True)


def test_all_is_written_in_order() -> None:
    reader, writer = os.pipe()
    stream = DetachedStream(writer, "utf-8")
    lines = [f"line {i} γ̂\n" for i in range(5000)]
    found: list[bytes] = []
    slow = threading.Thread(target=lambda: found.extend(iter(lambda: os.read(reader, 4096), b"")))
    slow.start()
    for line in lines:
        stream.write(line)
    stream.finish()
    os.close(writer)
    slow.join()
    assert b"".join(found).decode() == "".join(lines)


def test_what_a_paused_reader_does_not_take_is_dropped_and_counted() -> None:
    reader, writer = os.pipe()
    stream = DetachedStream(writer, "utf-8")
    for _ in range(200):
        stream.write("x" * 16_000)  # more than waits, by far: none of these may block
    found = b""
    while b"last" not in found:
        found += os.read(reader, 1 << 20)
        if len(found) > 500_000:
            stream.write("last")
            time.sleep(0.01)
    dropped = int(found.partition(b"[")[2].split()[0])
    kept = found.count(b"x")
    assert kept + dropped == 200 * 16_000
    stream.finish()
    os.close(reader)
    os.close(writer)


def test_the_reader_s_end_is_noticed() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = DetachedStream(writer, "utf-8")
    stream.write("a")
    stream.finish()
    assert stream.reader_gone
    os.close(writer)


def test_streams_that_are_no_files_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with detached():
        print("seen")
    assert capsys.readouterr().out == "seen\n"


def test_training_ends_well_whatever_its_console_does(small_data: Path, tmp_path: Path) -> None:
    """Closed, full, of another encoding; paused: a pipe that is full before and that nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    runs = {}
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for name, redirected in (("closed", ">&- 2>&-"), ("full", ">/dev/full 2>&1"), ("paused", "")):
        command = ["sh", "-c", f'exec "$0" "$@" {redirected}', sys.executable, *TRAIN]
        command += [f"data.path={small_data}", f"run_dir={tmp_path / name}"]
        runs[name] = subprocess.Popen(command, stdout=writer, stderr=writer, env=environment)
    codes = {name: run.wait(120) for name, run in runs.items()}
    assert codes == dict.fromkeys(runs, 0)
    for name in runs:
        assert '"epoch": 2' in (tmp_path / name / "records.jsonl").read_text()
        assert list((tmp_path / name / "checkpoints").iterdir())
    os.close(reader)
    os.close(writer)


@needs_horovod
@pytest.mark.parametrize("redirected", [">/dev/full 2>&1", ">&- 2>&-"])
def test_a_launcher_whose_console_takes_nothing(redirected: str) -> None:
    """More than a pipe holds, from two workers: the launcher reads on."""
    code = "import sys; print('γ̂' * 100_000, flush=True); print('y' * 100_000, file=sys.stderr, flush=True)"
    horovodrun = Path(sys.executable).with_name("horovodrun")
    command = ["sh", "-c", f'exec "$0" "$@" {redirected}', str(horovodrun), "-np", "2", sys.executable, "-c"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, shlex.quote(code)], env=environment, timeout=60, check=False)
    assert done.returncode == 0
