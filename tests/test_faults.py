"""What clusters do to a run, on real jobs: faults × moments × numbers of workers. Nothing is lost, nothing is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ENGINES, WORKERS, exit_code, launch, of_engine, start

from benchmarks import hosts as network
from infomcr_dist import checkpoint
from infomcr_dist.train import main

RECIPE = """
model: plain_net:build_with_norm
epochs: 4
data: {path: DATA, augmentation: crop1_flip, global_batch_size: 60, drop_last: false}
schedule: {milestones: [2]}
optimizer: {learning_rate: 0.05}
regularizer: {sub_batch_size: 10, beta: 5}
metric: {trials: 2, samples: 8, every_epochs: 2}
evaluation: {batch_size: 16}
averaging: {kind: ema, decay: 0.9, statistics_images: 60}
checkpoint: {every_steps: 2}
telemetry: {port: null}
threads: 1
"""
STEPS = 5  # an epoch: 260 images in global batches of 60, the last one of 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    root = tmp_path_factory.mktemp("faults")
    (root / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    return root


def run(
    folder: Path, workers: int, fault: str, moment: str, rank: int, *settings: str, engine: str = ENGINES[0]
) -> tuple[int, str]:
    """Train with a fault in one worker; returns the exit code and all output."""
    command = [sys.executable, str(WORKERS / "faulty.py"), fault, moment, str(rank), "recipe.yaml", *settings]
    if workers == 1:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    else:
        # Horovod fuses what is ready into one allreduce; three addends or more may then add up in another order.
        result = launch(workers, "env", "HOROVOD_FUSION_THRESHOLD=0", *command, cwd=folder, engine=engine)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def in_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """`run` without a fault in this process, which saves the start of another."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(WORKERS)
    threads = torch.get_num_threads()

    def run_here(*settings: str) -> tuple[int, str]:
        capfd.readouterr()
        return main(["recipe.yaml", *settings]), "".join(capfd.readouterr())

    yield run_here
    torch.set_num_threads(threads)


def final(run: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers, momentum and averages at the end of a run."""
    _, state = checkpoint.load_newest(run, pytest.fail)
    assert state["step"] == 4 * STEPS
    momentum = {f"momentum {k}": v["momentum_buffer"] for k, v in state["optimizer"]["state"].items()}
    return state["model"] | momentum | {f"average {name}": value for name, value in state["average"].items()}


def history(run: Path) -> list[tuple[Any, ...]]:
    """The records, without times and without what is about checkpoints."""
    fields = {
        "step": ("epoch", "loss", "penalty", "gradient_norm", "global_samples"),
        "evaluation": ("split", "loss"),
        "metric": ("gamma_hat",),
        "epoch": ("training_loss",),
    }
    records = map(json.loads, (run / "records.jsonl").read_text().splitlines())
    return [(r["kind"], r["step"], *(r[f] for f in fields[r["kind"]])) for r in records if r["kind"] in fields]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Any:
    """The run without a fault, by number of workers and engine; up to two workers, either engine's is the other's."""

    def of(workers: int, engine: str = ENGINES[0]) -> Path:
        engine = engine if workers > 2 else ENGINES[0]
        path = folder / f"undisturbed-{workers}-{engine}"
        if not path.exists():
            code, output = run(folder, workers, "none", "", 0, f"run_dir={path}", engine=engine)
            assert code == 0, output
        return path

    return of


class Fault(NamedTuple):
    engine: str
    kind: str
    """A signal, to a worker or to the launcher, or a function of workers/faulty.py"""
    moment: str
    rank: int


# A run meets one fault after the other. With two workers, either engine meets SIGTERM, SIGKILL, SIGSTOP and the loss of
# its launcher. A worker that is asked to stop may take one more step, so the next fault is not in that one.
RUNS: dict[str, tuple[int, list[Fault]]] = {
    "one worker, first asked to stop": (1, [
        Fault("horovod", "SIGTERM", "plain step", 0),
        Fault("horovod", "SIGTERM", "save", 0),
        Fault("horovod", "SIGINT", "metric", 0),
        Fault("horovod", "SIGTERM", "last step of an epoch", 0),
        Fault("horovod", "SIGKILL", "within an evaluation", 0),
        Fault("horovod", "SIGTERM", "last metric", 0),
    ]),
    "one worker, first hangs": (1, [
        Fault("horovod", "waits_for_ever", "plain step", 0),
        Fault("horovod", "SIGKILL", "regularized step", 0),
        Fault("horovod", "SIGHUP", "regularized step", 0),
    ]),
    "two workers, first asked to stop": (2, [
        Fault("horovod", "SIGTERM", "plain step", 1),
        Fault("torch", "SIGKILL", "save", 0),
        Fault("horovod", "SIGKILL", "regularized step", 1),
        Fault("torch", "SIGKILL", "last step of an epoch", 1),
        Fault("horovod", "SIGTERM", "within the last evaluation", 1),
    ]),
    "two workers, first killed": (2, [
        Fault("torch", "SIGKILL", "plain step", 1),
        Fault("horovod", "SIGTERM", "save", 0),
        Fault("torch", "SIGTERM", "metric", 1),
        Fault("horovod", "SIGTERM", "last step of an epoch", 1),
        Fault("torch", "SIGTERM", "within an evaluation", 1),
    ]),
    "two workers, first without Horovod's launcher": (2, [
        Fault("horovod", "launcher SIGKILL", "plain step", 1),
        Fault("horovod", "launcher SIGTERM", "metric", 1),
        Fault("torch", "SIGSTOP", "regularized step", 1),
        Fault("horovod", "SIGSTOP", "evaluation", 1),
    ]),
    "two workers, first without torch's launcher": (2, [
        Fault("torch", "launcher SIGKILL", "plain step", 1),
        Fault("torch", "launcher SIGTERM", "metric", 1),
        Fault("torch", "SIGTERM", "regularized step", 1),
        Fault("horovod", "SIGKILL", "within an evaluation", 1),
    ]),
    "three workers of Horovod": (3, [
        Fault("horovod", "SIGSTOP", "regularized step", 2),
        Fault("horovod", "SIGTERM", "regularized step", 2),
    ]),
    "three workers of torch": (3, [
        Fault("torch", "SIGKILL", "regularized step", 2),
    ]),
}  # fmt: skip
SAVED = {
    "evaluation": 15, "within an evaluation": 15, "within the last evaluation": 20, "metric": 10, "last metric": 20
}  # fmt: skip
"""Steps that are saved by then: all of an epoch, of which an evaluation is under way"""


@pytest.mark.parametrize(("workers", "faults"), RUNS.values(), ids=RUNS)
def test_faults_at_any_moment(
    folder: Path, undisturbed: Any, in_process: Any, tmp_path: Path, workers: int, faults: list[Fault]
) -> None:
    """The run ends as it should each time, leaves a whole checkpoint, and at last has the bits of an undisturbed one.

    At last, two workers resume on the other engine.
    """
    path = tmp_path / "run"
    settings = (f"run_dir={path}", "resume=auto")
    for fault in faults:
        fault = fault._replace(engine=of_engine(fault.engine))
        code, output = struck(folder, workers, fault, path, *settings, "hang_timeout_seconds=6")
        check_end(fault, workers, path, code, output)
    if workers == 1:
        code, output = in_process(*settings)
    else:
        other = ENGINES[-1] if fault.engine == ENGINES[0] else ENGINES[0]
        code, output = run(folder, workers, "none", "", 0, *settings, engine=other if workers == 2 else fault.engine)
    assert code == 0, output
    whole, resumed = final(undisturbed(workers, fault.engine)), final(path)
    for key, tensor in whole.items():
        assert torch.equal(tensor, resumed[key]), key
    assert history(path) == history(undisturbed(workers, fault.engine)), "each step and event once"
    assert not [p for p in (path / "checkpoints").iterdir() if p.name.startswith(".")], "nothing half-written stays"


def struck(folder: Path, workers: int, fault: Fault, path: Path, *settings: str) -> tuple[int, str]:
    """Train until the fault ends it; returns the exit code and all output."""
    if not fault.kind.startswith("launcher"):
        return run(folder, workers, fault.kind, fault.moment, fault.rank, *settings, engine=fault.engine)
    command = [sys.executable, str(WORKERS / "faulty.py"), "held", fault.moment, str(fault.rank), "recipe.yaml"]
    with start(workers, *command, *settings, cwd=folder, engine=fault.engine) as job:
        wait_until(lambda: (path / "held").exists() or job.poll() is not None)
        (path / "held").unlink(missing_ok=True)
        job.send_signal(signal.Signals[fault.kind.removeprefix("launcher ")])
        output = "".join(job.communicate(timeout=60))
    wait_until(lambda: not workers_of(path))
    return job.returncode, output


def check_end(fault: Fault, workers: int, path: Path, code: int, output: str) -> None:
    """The exit code, what was reported, and the checkpoint."""
    assert ">:Traceback" not in output, output
    state = checkpoint.load_newest(path, pytest.fail)[1]
    if fault.moment in SAVED:
        assert (state["step"], state["epoch"]) == (SAVED[fault.moment], SAVED[fault.moment] // STEPS - 1)
        assert f"epoch {SAVED[fault.moment] // STEPS}/4: " not in output, "it waited for no evaluation to end"
    if fault.kind in ("SIGTERM", "SIGHUP", "SIGINT", "launcher SIGTERM"):
        saved = re.search(r"stopped: saved after step (\d+); resume with run_dir=\S+ resume=auto", output)
        assert saved, output
        assert state["step"] == int(saved[1])
        assert code == exit_code(fault.engine if workers > 1 else "horovod", 75)
    elif fault.kind == "launcher SIGKILL":
        assert state["step"] == steps_of(path), "the workers saved and ended"
    elif fault.kind == "waits_for_ever":
        found = re.search(r"error: rank 0 has made no progress for (\d+) s in step 4: killed", output)
        assert found, output
        assert int(found[1]) < 60, "as long as a step may take, not ten times that"
        assert code == -signal.SIGKILL
    elif workers > 1:
        assert "another worker is gone, or waits" in output
        if fault.kind == "SIGSTOP":
            assert f"error: rank {fault.rank} has hung for 6 s: killed" in output


@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_workers_that_torchrun_restarts_on_two_hosts_lose_no_step(
    folder: Path, undisturbed: Any, tmp_path: Path
) -> None:
    """One is killed in the workers' first life; the launchers meet and start all of them again, and the run ends."""
    path = folder / "restarted"
    command = [sys.executable, str(WORKERS / "faulty.py"), "SIGKILL", "regularized step", "1", "recipe.yaml"]
    with network.hosts(2, tmp_path) as made:
        lines = made.torchrun(*command, f"run_dir={path}", "resume=auto", options=("--max-restarts", "1"))
        with open(tmp_path / "log", "w+") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            jobs = [subprocess.Popen(line, cwd=folder, env=environment, stdout=log, stderr=log) for line in lines]
            codes = [job.wait(240) for job in jobs]
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert "epoch 4/4" in (tmp_path / "log").read_text()
    assert all(torch.equal(tensor, final(path)[name]) for name, tensor in final(undisturbed(2)).items())
    assert history(path) == history(undisturbed(2)), "each step and event once"


@pytest.mark.parametrize(("engine", "workers"), [("horovod", 1), ("torch", 2), ("horovod", 3)])
def test_a_gradient_that_is_not_finite_is_skipped_everywhere(folder: Path, engine: str, workers: int) -> None:
    path = folder / f"not-finite-{workers}"
    settings = (f"run_dir={path}", "max_nonfinite_steps=2")
    code, output = run(folder, workers, "not_finite", "start", workers - 1, *settings, engine=of_engine(engine))
    assert code == 0, output
    assert re.search(r"step 11 was skipped: not finite: gradient of \S*weight", output)
    records = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    skipped = [r["step"] for r in records if r["kind"] == "step" and not r["finite"]]
    assert skipped == [11], "one step: the next one is finite, so the weights were not touched"
    assert all(torch.isfinite(t).all() for t in final(path).values())


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_diverge_end_the_run_and_report_the_rank(folder: Path, engine: str) -> None:
    path = folder / f"diverged-{engine}"
    settings = (f"run_dir={path}", "compare_weights_steps=4", "checkpoint.every_steps=null")
    code, output = run(folder, 3, "flipped_bit", "start", 2, *settings, engine=engine)
    assert code == 1
    assert output.count("error: rank 2 and the rest have different weights after step 4") == 1, output


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_with_one_batch_fewer_is_reported_and_ends_the_run(folder: Path, engine: str) -> None:
    settings = (f"run_dir={folder / f'fewer-{engine}'}", "hang_timeout_seconds=10")
    code, output = run(folder, 2, "one_batch_fewer", "start", 1, *settings, engine=engine)
    assert code != 0
    if engine == "horovod":
        assert re.search(r"Missing ranks:\n\[0\]<stderr>:[01]!?: \[\w*(allreduce|broadcast)", output), output
    assert re.search(r"error: rank 0: another worker is gone, or waits .* in step 5: resume", output)
    assert re.search(r"error: rank 1: another worker is gone, or waits .* in the end of epoch 1: resume", output)


def test_a_full_disk_costs_the_checkpoint_not_the_run(folder: Path, tmp_path: Path) -> None:
    """Room for two of the checkpoints of 0.6 MB, of which nine are to be kept."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a file system of a given size needs root")
    try:
        settings = (f"run_dir={disk / 'run'}", "checkpoint.keep=9", "checkpoint.every_steps=1")
        code, output = run(folder, 2, "none", "", 0, *settings, "model=plain_net:build_large")
        assert code == 1
        assert "No space left on device; training continues, the checkpoint before it is kept" in output
        assert "epoch 4/4" in output, "it trained to its end"
        assert "error: trained, but the last checkpoint is missing" in output
        records = [json.loads(line) for line in (disk / "run" / "records.jsonl").read_text().splitlines()]
        outcomes = [r["outcome"] for r in records if r["kind"] == "checkpoint"]
        assert outcomes[0] == "written"
        assert outcomes[-1] == "failed"
        for path in checkpoint.newest_first(disk / "run" / "checkpoints"):
            checkpoint.load(path)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_directory_that_cannot_be_written_is_refused_at_the_start(in_process: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a read-only file system needs root")
    try:
        code, output = in_process(f"run_dir={disk / 'run'}")
        assert code == 2
        assert re.search(rf"error: .*{disk}.*", output)
        assert "epoch 1" not in output
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_damaged_checkpoint_is_skipped_and_reported(folder: Path, undisturbed: Any, in_process: Any) -> None:
    path = folder / "damaged"
    code, output = run(folder, 1, "SIGTERM", "evaluation", 0, f"run_dir={path}", "resume=auto")
    assert code == 75, output
    newest = checkpoint.newest_first(path / "checkpoints")[0]
    os.truncate(newest, newest.stat().st_size // 2)
    code, output = in_process(f"run_dir={path}", "resume=auto")
    assert code == 0, output
    assert f"{newest.name} is damaged" in output
    assert "it is skipped, the one before it is taken" in output
    assert all(torch.equal(t, final(path)[name]) for name, t in final(undisturbed(1)).items())


def test_changed_settings_are_taken_only_when_asked_for(folder: Path, in_process: Any) -> None:
    path = folder / "changed"
    code, output = run(folder, 1, "SIGTERM", "regularized step", 0, f"run_dir={path}", "resume=auto")
    assert code == 75, output
    other = (f"run_dir={path}", "resume=auto", "regularizer.beta=7", "optimizer.momentum=0.8")
    code, output = in_process(*other)
    assert code == 2
    assert "optimizer.momentum=0.8 (checkpoint: 0.9), regularizer.beta=7.0 (checkpoint: 5.0)" in output
    assert "allow_config_change=true" in output
    code, output = in_process(*other, "allow_config_change=true")
    assert code == 0, output
    assert "continues with changed settings: optimizer.momentum=0.8 (checkpoint: 0.9)" in output
    betas = [r[1] for r in history(path) if r[0] == "step"]
    assert betas == list(range(1, 4 * STEPS + 1))


def steps_of(run: Path) -> int:
    try:
        return (run / "records.jsonl").read_text().count('"kind": "step"')
    except OSError:
        return 0


def workers_of(run: Path) -> list[int]:
    """Process ids of a run's workers."""
    found = []
    for process in (p for p in os.listdir("/proc") if p.isdigit()):
        try:
            words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if words[0] == sys.executable and str(WORKERS / "faulty.py") == words[1] and f"run_dir={run}" in words:
            found.append(int(process))
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def test_a_slow_disk_is_taken_for_no_hanging_worker(folder: Path) -> None:
    """A checkpoint takes longer than hang_timeout_seconds, and the next one waits for it."""
    settings = ("epochs=1", "schedule.milestones=[]", "regularizer.when=never", "hang_timeout_seconds=4")
    code, output = run(folder, 2, "slow_disk", "start", 0, f"run_dir={folder / 'slow'}", *settings)
    assert code == 0, output
    assert re.search(r"checkpoint: still being written after \d+ s: is the disk slow\?", output), output


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_that_waits_for_one_that_hangs_ends_within_the_deadline(folder: Path, engine: str) -> None:
    """Asked to stop while another hangs, for longer than shutdown_timeout_seconds: it exits unsaved and reports it."""
    path = folder / f"deadline-{engine}"
    command = [sys.executable, str(WORKERS / "faulty.py"), "none", "", "0", "recipe.yaml", f"run_dir={path}"]
    settings = ["epochs=4000", "shutdown_timeout_seconds=2", "hang_timeout_seconds=60", "checkpoint.every_steps=null"]
    with start(2, *command, *settings, cwd=folder, engine=engine) as job:
        wait_until(lambda: steps_of(path) > 3)
        one, other = workers_of(path)
        os.kill(one, signal.SIGSTOP)
        time.sleep(1)  # the other has begun to wait for it
        os.kill(other, signal.SIGTERM)
        wait_until(lambda: other not in workers_of(path) or Path(f"/proc/{other}/stat").read_text().split()[2] == "Z")
        os.kill(one, signal.SIGKILL)
        output = "".join(job.communicate(timeout=60))
    where = r"error: rank \d: (step|the end of epoch) \d+"
    assert re.search(where + " did not end within shutdown_timeout_seconds=2: exiting without", output)


def test_a_second_sigint_ends_at_once(folder: Path) -> None:
    path = folder / "impatient"
    command = [sys.executable, str(WORKERS / "faulty.py"), "held", "regularized step", "0", "recipe.yaml"]
    with subprocess.Popen([*command, f"run_dir={path}"], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: (path / "held").exists() or process.poll() is not None)
        for _ in range(2):
            process.send_signal(signal.SIGINT)  # in a step that SIGINT does not end
            time.sleep(0.3)
        assert process.wait(30) == 130
