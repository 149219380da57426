"""The process that keeps a run's log with TensorBoard, MLflow or Weights & Biases; `infomcr_dist.logger` starts it.

Whatever these libraries do (wait for a network, start threads, crash), they do it here, apart from the training. This
file is run by its path and imports nothing of the project, whose package would load torch.

It reads lines of JSON: the first has the logger's name, the run's directory and its settings; each further one is a
point, ``[Unix time, step, {name: number}]``. It writes a line wherever points are dropped: their number, and why.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

RETRY_SECONDS = 30.0
"""From a failure to the next try; what comes between is dropped"""
CLOSE_SECONDS = 60
"""For what remains, once the training has ended"""
_READ_BYTES = 1 << 16
Point = tuple[float, int, dict[str, float]]


class TensorBoard:
    """Event files in DIRECTORY/tensorboard."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        proto = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summary = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        writer = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._event, self._summary = proto.Event, summary.Summary
        folder = directory / "tensorboard"
        folder.mkdir(exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{uuid4().hex[:8]}"
        self._file = open(folder / name, "wb")  # noqa: SIM115
        self._writer = writer.RecordWriter(self._file)
        self._write(wall_time=now, file_version="brain.Event:2")
        self._file.flush()

    def log(self, points: list[Point]) -> None:
        """Write points to the file."""
        for seconds, step, numbers in points:
            values = [self._summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
            self._write(wall_time=seconds, step=step, summary=self._summary(value=values))
        self._file.flush()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(**fields).SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MLflow:
    """A run where MLflow's own variables say, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME; its id is kept."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self._mlflow, self._entities = importlib.import_module("mlflow"), importlib.import_module("mlflow.entities")
        kept = directory / "mlflow.id"
        known = kept.read_text().strip() if kept.exists() else None
        self._id = self._mlflow.start_run(run_id=known, run_name=None if known else directory.name).info.run_id
        kept.write_text(self._id)
        if known is None:  # they cannot be changed
            self._log("params", [self._entities.Param(name, str(value)) for name, value in settings.items()])

    def log(self, points: list[Point]) -> None:
        """Send points."""
        metric = self._entities.Metric
        values = [
            (name, value, int(seconds * 1000), step) for seconds, step, of in points for name, value in of.items()
        ]
        self._log("metrics", [metric(*value) for value in values])

    def _log(self, kind: str, values: list[Any]) -> None:
        most = {"metrics": 1000, "params": 100}[kind]  # of a request
        for start in range(0, len(values), most):
            part = {kind: values[start : start + most]}
            self._mlflow.MlflowClient().log_batch(self._id, **part)

    def close(self) -> None:
        """End MLflow's run."""
        self._mlflow.end_run()


class WandB:
    """A run where wandb's own variables say, WANDB_PROJECT and WANDB_MODE; its id and its files are kept."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        kept = directory / "wandb.id"
        if not kept.exists():
            kept.write_text(uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "infomcr_dist"),
            dir=os.environ.get("WANDB_DIR", str(directory)),
            id=kept.read_text().strip(),
            name=directory.name,
            resume="allow",
            config=settings,
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, points: list[Point]) -> None:
        """Send points."""
        for _, step, numbers in points:  # of a resumed run wandb would refuse a step that it has
            self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """Send what remains."""
        self._run.finish()


LOGGERS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class _Log:
    """A logger that is opened again some time after it failed."""

    def __init__(self, logger: str, directory: str, settings: dict[str, Any]) -> None:
        self._open = lambda: LOGGERS[logger](Path(directory), settings)
        self._sink: Any = None
        self._failed: float | None = None
        self.log([])

    def log(self, points: list[Point]) -> None:
        if self._failed is not None and time.monotonic() - self._failed < RETRY_SECONDS:
            return _report(len(points), "")
        try:
            self._sink = self._sink or self._open()
            if points:
                self._sink.log(points)
            self._failed = None
        except Exception as error:  # whatever a library, a disk or a network raises
            _report(len(points), f"{type(error).__name__}: {error}")
            self._failed = time.monotonic()
            self.close()

    def close(self) -> None:
        sink, self._sink = self._sink, None
        if sink is None:
            return
        try:
            sink.close()
        except Exception as error:
            _report(0, f"{type(error).__name__}: {error}")


def _lines(parent: int) -> Iterator[list[bytes]]:
    """Lines from standard input, as many as there are, to its end or the parent's."""
    received = b""
    while True:
        ready, _, _ = select.select([0], [], [], 1.0)
        if not ready:
            if os.getppid() != parent:
                return
            continue
        more = os.read(0, _READ_BYTES)
        if not more:
            return
        *lines, received = (received + more).split(b"\n")
        yield lines


def _report(dropped: int, reason: str) -> None:
    line = f"{dropped}\t{' '.join(reason.split())[:300]}\n"
    with contextlib.suppress(OSError):  # nobody reads
        os.write(_REPORTS, line.encode())


def main() -> None:
    """Log until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the training, whose end is this one's
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    log: _Log | None = None
    for lines in _lines(int(sys.argv[1])):
        contents = [json.loads(line) for line in lines]
        if log is None and contents:
            log = _Log(**contents.pop(0))
        if log is not None and contents:
            log.log(contents)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(CLOSE_SECONDS)
    if log is not None:
        log.close()


if __name__ == "__main__":
    _REPORTS = os.dup(1)
    os.set_blocking(_REPORTS, False)
    os.dup2(2, 1)  # what libraries print
    main()
