"""The logs of TensorBoard, MLflow and wandb, read by their own libraries; and loggers that fail, hang or end."""

import importlib
import importlib.util
import json
import os
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infomcr_dist import logger
from infomcr_dist.config import TelemetrySettings
from infomcr_dist.logger import Logger, check_installed, numbers
from infomcr_dist.records import (
    EpochRecord,
    EvaluationRecord,
    NonfiniteRecord,
    Record,
    RestartRecord,
    StepRecord,
    read_records,
)
from infomcr_dist.telemetry import Telemetry
from infomcr_dist.train import main

STEP = StepRecord(
    step=1, epoch=1, phase="plain", loss=2.25, penalty=None, beta=None, num_penalized=None, gradient_norm=1.5,
    finite=True, learning_rate=0.1, samples=4, global_samples=8, world_size=2, data_errors=0,
    step_duration_seconds=0.5, data_wait_seconds=0.1, gradient_seconds=0.3, allreduce_wait_seconds=0.05,
    update_seconds=0.05, penalty_duration_seconds=None, allreduce_bytes=100,
)  # fmt: skip
Points = dict[str, list[tuple[int, float]]]


def step(number: int) -> StepRecord:
    return replace(STEP, step=number, loss=1 / (1 << number))


def points(records: list[Record]) -> Points:
    """Name by name, the steps and numbers of records."""
    found: Points = {}
    for record in records:
        for name, value in numbers(record).items():
            found.setdefault(name, []).append((record.step, float(value)))
    return found


def of_tensorboard(directory: Path) -> Points:
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    log = module.EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def of_mlflow(directory: Path) -> Points:
    client = importlib.import_module("mlflow").MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert run.info.run_name == directory.name
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model": "cnn", "optimizer.momentum": "0.9"}
    names = run.data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names}


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The entries of a file of wandb's: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    position, entry = 7, b""
    while position + 7 < len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        length, kind = struct.unpack_from("<HB", content, position + 4)
        entry += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield entry
            entry = b""


def of_wandb(directory: Path) -> Points:
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found: Points = {}
    files = sorted(directory.glob("wandb/offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {"run-" + (directory / "wandb.id").read_text()}, "one run, also resumed"
    for file in files:
        for entry in leveldb_log(file.read_bytes()):
            record = proto.Record.FromString(entry)
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name in items.keys() - {"step"}:
                if not name.startswith("_"):
                    found.setdefault(name, []).append((items["step"], items[name]))
    return found


READERS: dict[str, Callable[[Path], Points]] = {
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
    "wandb": of_wandb,
}


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local logs alone."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(logger, "_CLOSE_SECONDS", 60.0)


def telemetry_of(name: str) -> Telemetry:
    settings = TelemetrySettings(port=None, logger=name)  # type: ignore[arg-type]
    return Telemetry(settings, rank=0, local_rank=0, world_size=2, device=torch.device("cpu"), info={"model": "cnn"})


@pytest.mark.parametrize("name", READERS)
@pytest.mark.usefixtures("environment")
def test_a_log_has_the_numbers_of_the_records_also_of_a_resumed_run(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    directory, settings = tmp_path / "run", {"model": "cnn", "optimizer.momentum": 0.9}
    directory.mkdir()
    errors = EvaluationRecord(3, 1, "test", loss=0.5, top1_error_ratio=0.25, top5_error_ratio=0.0, samples=70)
    begun: list[Record] = [*map(step, (1, 2, 3)), errors, EpochRecord(3, 1, 1, 0.75), step(4), step(5)]
    again: list[Record] = [errors, EpochRecord(3, 1, 1, 0.75), *map(step, (4, 5, 6)), replace(errors, step=6, epoch=2)]
    for records, after in ((begun, 0), (again, 3)):
        run = telemetry_of(name)
        run.begin(directory / "records.jsonl", 6, after, settings=settings)
        for record in records:
            run.log(record)
        run.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others' imports
        found = READERS[name](directory)
    expected = points(list(read_records(directory / "records.jsonl")))
    if name == "tensorboard":  # float32
        expected = {tag: [(at, float(np.float32(value))) for at, value in of] for tag, of in expected.items()}
    assert found == expected
    assert found["evaluation/test/top1_error_ratio"] == [(3, 0.25), (6, 0.25)]


def test_what_is_no_number_is_left_out() -> None:
    assert numbers(RestartRecord(3, {"worker_lost": 1}, 2)) == {"restart/world_size": 2}
    assert numbers(NonfiniteRecord(3, ["loss"], 2)) == {"nonfinite/in_a_row": 2}
    errors = EvaluationRecord(3, 1, "test", 0.5, 0.25, 0.125, 8)
    averaged = replace(errors, weights="averaged", top1_error_ratio=0.75)
    assert numbers(errors)["evaluation/test/top1_error_ratio"] == 0.25
    assert numbers(averaged)["evaluation/test/averaged/top1_error_ratio"] == 0.75
    assert not numbers(errors).keys() & numbers(averaged).keys(), "two sets of weights are two curves"
    found = numbers(STEP)
    assert found["step/finite"] == 1
    assert found.keys().isdisjoint({"step/step", "step/phase", "step/penalty"})


def test_a_logger_that_is_not_installed_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"telemetry\.logger=wandb .* pip install 'infomcr_dist\[wandb\]'"):
        telemetry_of("wandb")
    monkeypatch.undo()
    (tmp_path / "aim_logs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="not installed"):
        check_installed("aim_logs")  # a directory is no package
    check_installed(None)


def test_a_run_whose_logger_is_not_installed_ends_before_it_trains(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "mlflow" else find(name, *of))
    monkeypatch.chdir(tmp_path)
    settings = ["model=cnn", "data.backend=synthetic", f"data.path={small_data}", "data.global_batch_size=8"]
    (tmp_path / "recipe.yaml").write_text("telemetry: {port: null, logger: mlflow}\nregularizer: {when: never}\n")
    threads = torch.get_num_threads()
    assert main(["recipe.yaml", *settings]) == 2
    torch.set_num_threads(threads)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: telemetry.logger=mlflow needs the package mlflow")
    assert not (tmp_path / "runs").exists()


WORKS = """
class Run:
    def define_metric(self, *_, **__): pass
    def log(self, numbers):
        LOG
    def finish(self): pass
def init(**_):
    INIT
    return Run()
def Settings(**_): pass
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Logger]]:
    """A logger with a wandb of our own, which does as is said."""
    opened = []

    def make(log: str = "pass", init: str = "pass") -> Logger:
        (tmp_path / "wandb.py").write_text(WORKS.replace("LOG", log).replace("INIT", init))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        opened.append(Logger("wandb", tmp_path, {}, []))
        return opened[-1]

    yield make
    for made in opened:
        if made._process.poll() is None:
            made.close()


def until(condition: Callable[[], Any], run: Logger | Telemetry) -> None:
    """Log a step every hundredth of a second until the condition holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        run.log(step(1))
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"log": "raise OSError(28, 'No space left on device')"}, r"OSError: \[Errno 28\] No space left on device"),
        ({"init": "raise RuntimeError('no key\\nis known')"}, "RuntimeError: no key is known"),
        ({"init": "raise SystemExit(3)"}, "its process has ended"),
        ({"log": "import os; os._exit(1)"}, "its process has ended"),
    ],
)
def test_a_logger_that_fails_costs_records_of_its_own_and_a_line(
    broken: Callable[..., Logger], faults: dict[str, str], reason: str
) -> None:
    run = broken(**faults)
    until(lambda: run.dropped > 3, run)
    assert run.reason == reason.replace("\\", "")
    run.close()


def test_a_logger_that_hangs_delays_nothing_and_is_ended(
    broken: Callable[..., Logger], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = broken(log="import time; time.sleep(1000)")
    monkeypatch.setattr(logger, "_CLOSE_SECONDS", 0.5)
    given = 0
    while not run.dropped:
        run.log(STEP)
        given += 1
        assert given < 10_000, "the pipe takes no more than it has room for"
    assert run.reason == "it is behind"
    run.close()
    assert run._process.returncode == -signal.SIGKILL


def test_signals_to_the_job_do_not_end_the_log(broken: Callable[..., Logger], tmp_path: Path) -> None:
    """It ends with the training, and has all."""
    run = broken(
        log="open('LOGGED', 'a').write(str(numbers['step']) + ' ')".replace("LOGGED", str(tmp_path / "logged"))
    )
    until((tmp_path / "logged").exists, run)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        run._process.send_signal(number)
    run.log(step(7))
    run.close()
    assert (tmp_path / "logged").read_text().split()[-1] == "7"
    assert (run._process.returncode, run.dropped, run.reason) == (0, 0, "")


def test_what_a_log_lacks_is_counted_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Logger]
) -> None:
    broken(log="raise OSError(28, 'No space left on device')").close()
    (tmp_path / "run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    run = telemetry_of("wandb")
    lines: list[str] = []
    monkeypatch.setattr(run, "message", lines.append)
    run.begin(tmp_path / "run" / "records.jsonl", 10, 0)
    counter = run._prometheus._counters["logger_records_dropped"]
    until(lambda: counter._value.get() > 3, run)
    run.close()
    first, last = lines
    assert first.startswith("telemetry.logger=wandb: OSError: [Errno 28] No space left on device: ")
    assert last == f"telemetry.logger=wandb lacks {int(counter._value.get())} records, which records.jsonl has"
    assert len(list(read_records(tmp_path / "run" / "records.jsonl"))) >= counter._value.get()
