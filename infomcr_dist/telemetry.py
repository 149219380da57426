"""What a run tells: one record goes to the progress bar, to JSON lines and to Prometheus.

The bar and the file are rank 0's; the endpoint is every rank's own. The names of a record's fields are the metrics'
names: a step's ``data_wait_seconds`` is the histogram ``infomcr_data_wait_seconds``.
"""

from __future__ import annotations

import errno
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from tqdm import tqdm

from infomcr_dist.checkpoint import write_atomically
from infomcr_dist.config import TelemetrySettings

# 1.25-fold steps from 1 ms to a minute: a quantile read off the histogram is within 12 % of the true one.
_SECONDS = tuple(round(0.001 * 1.25**k, 6) for k in range(50))


@dataclass(frozen=True)
class StepRecord:
    """One update, as rank 0 saw it; what waited is part of ``step_duration_seconds``."""

    step: int
    epoch: int
    phase: str
    """plain or regularized"""
    loss: float
    """L(B, w) of this rank's batch"""
    penalty: float | None
    """R_α of this rank's batch (Jia & Su 2020, Eq. 7), before β"""
    beta: float | None
    """β of the schedule"""
    penalised: int | None
    """sub-batches of this rank whose penalty was taken; None before the regularizer is on"""
    gradient_norm: float
    """2-norm of the averaged, regularized gradient, before clipping; not finite: the update was left out"""
    learning_rate: float
    samples: int
    """images of this rank"""
    data_errors: int
    """samples that others stood in for (data.on_error=skip)"""
    step_duration_seconds: float
    data_wait_seconds: float
    allreduce_wait_seconds: float


class Telemetry:
    """Sinks of a run's records. Raises ValueError if the endpoint's port is taken."""

    def __init__(self, settings: TelemetrySettings, *, rank: int, local_rank: int, world_size: int) -> None:
        self._leads = rank == 0
        self._metrics = _Metrics(world_size)
        self._server = None
        self._file: IO[str] | None = None
        self._bar: Any = None
        self._step = 0
        if settings.port is None:
            return
        port = settings.port + local_rank
        try:
            self._server, _ = start_http_server(port, settings.address, self._metrics.registry)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise ValueError(
                f"telemetry.port: port {port} on {settings.address} {reason} "
                f"(telemetry.port={settings.port} + local rank {local_rank}): "
                "give another telemetry.port, or telemetry.port=null for no endpoint"
            ) from error

    def begin(self, records: Path, total_steps: int, done_steps: int) -> None:
        """Open rank 0's file, without the records of steps after ``done_steps``, and show the bar."""
        if not self._leads:
            return
        _drop_records_after(records, done_steps)
        self._step = done_steps
        self._file = open(records, "a", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115
        self._bar = tqdm(
            total=total_steps,
            initial=done_steps,
            file=sys.stdout,
            ncols=120,
            mininterval=1.0,
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def step(self, record: StepRecord, global_samples: int) -> None:
        """Record one update; ``global_samples`` are the images all ranks together took."""
        self._metrics.step(record)
        if self._file is not None:
            self._step = record.step
            self._write("step", asdict(record))
            penalty = "" if record.penalty is None else f", penalty {record.penalty:.2e}"
            rate = global_samples / record.step_duration_seconds
            self._bar.set_postfix_str(
                f"loss {record.loss:.3f}, rate {record.learning_rate:.3g}{penalty}, {rate:.0f} images/s", refresh=False
            )
            self._bar.update()

    def event(self, kind: str, **values: Any) -> None:
        """Record anything else (``epoch``, ``metric`` …); values that are named like a metric reach Prometheus."""
        self._metrics.event(values)
        if self._file is not None:
            self._write(kind, {"step": self._step, **values})
            self._file.flush()

    def say(self, text: str) -> None:
        """Print lines above the bar."""
        if self._bar is not None:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Write out what is buffered and free the port."""
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"kind": kind, **finite(values)}) + "\n")


class _Metrics:
    """This rank's Prometheus metrics. Names: README."""

    def __init__(self, world_size: int) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "infomcr", "registry": self.registry}
        self._duration = Histogram(
            "step_duration_seconds", "Wall time of one update, waits included", ["phase"], buckets=_SECONDS, **common
        )
        self._histograms = {
            "data_wait_seconds": Histogram(
                "data_wait_seconds", "Time an update waited for its batch", buckets=_SECONDS, **common
            ),
            "allreduce_wait_seconds": Histogram(
                "allreduce_wait_seconds", "Time an update waited for the allreduce", buckets=_SECONDS, **common
            ),
        }
        self._samples = Counter("samples", "Training images this rank has taken", **common)
        self._data_errors = Counter("data_errors", "Samples left out because they could not be read", **common)
        self._nonfinite = Counter(
            "nonfinite_steps", "Updates left out for a gradient that was not finite on some rank", **common
        )
        self._steps = Counter("steps", "Updates", ["phase"], **common)
        self._gauges = {
            name: Gauge(name, text, **common)
            for name, text in {
                "loss": "Loss of the last batch, without the penalty",
                "penalty": "Penalty R_alpha of the last regularized batch, before beta",
                "beta": "Weight of the penalty in the last update",
                "gradient_norm": "2-norm of the last averaged, regularized gradient, before clipping",
                "learning_rate": "Learning rate of the last update",
                "regularizer_active": "1 if the last update was regularized",
                "world_size": "Workers of the run",
                "epochs_completed": "Epochs behind the run",
                "gamma_hat": "Metric gamma-hat, ln of the determinant of xi (Eq. 6); lower generalizes better",
                "gamma_hat_standard_error": "Standard error of gamma_hat over its trials",
                "gamma_hat_cost_seconds": "Time the last estimate of gamma_hat took",
                "gamma_hat_age_seconds": "Time since the last estimate of gamma_hat",
                "fisher_trace": "Trace of the Fisher information, mean over the trials",
                "fisher_spectral_radius": "Spectral radius of the Fisher information, mean over the trials",
                "penalty_health_ratio": "Relative disagreement of finite difference and exact derivative",
                "penalised_sub_batches": "Sub-batches of the last update whose penalty was taken",
                "overhead_ratio": "Time of the steps since the regularizer is on over that of plain steps",
            }.items()
        }
        self._errors = {
            name: Gauge(name, text, ["split"], **common)
            for name, text in {
                "top1_error_ratio": "Top-1 error of the last evaluation, 0 to 1",
                "top5_error_ratio": "Top-5 error of the last evaluation, 0 to 1",
            }.items()
        }
        self._gauges["world_size"].set(world_size)

    def step(self, record: StepRecord) -> None:
        self._duration.labels(record.phase).observe(record.step_duration_seconds)
        self._samples.inc(record.samples)
        self._data_errors.inc(record.data_errors)
        self._nonfinite.inc(not math.isfinite(record.gradient_norm))
        self._steps.labels(record.phase).inc()
        for name, histogram in self._histograms.items():
            histogram.observe(getattr(record, name))
        self._gauges["regularizer_active"].set(record.phase == "regularized")
        self.event(
            {name: getattr(record, name) for name in ("loss", "penalty", "beta", "gradient_norm", "learning_rate")}
        )
        self.event({"penalised_sub_batches": record.penalised})

    def event(self, values: dict[str, Any]) -> None:
        if "gamma_hat" in values:
            measured = time.time()
            self._gauges["gamma_hat_age_seconds"].set_function(lambda: time.time() - measured)
        for name, value in values.items():
            if name in self._gauges and value is not None:
                self._gauges[name].set(value)
            elif name in self._errors:
                self._errors[name].labels(values["split"]).set(value)


def _drop_records_after(records: Path, step: int) -> None:
    """On resume: the steps after the checkpoint are taken again, so their first records go."""
    if not records.exists():
        return
    lines = records.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("step", 0) <= step]
    write_atomically(records, lambda file: file.write("".join(kept).encode()))


def finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON lacks; dictionaries and lists all through."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
