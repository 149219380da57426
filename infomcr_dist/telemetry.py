"""What a run tells: one record goes to the progress bar, to JSON lines and to Prometheus.

The bar and the file are rank 0's; the endpoint is every rank's own. The names of a record's fields are the metrics'
names: a step's ``data_wait_seconds`` is the histogram ``infomcr_data_wait_seconds``.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, push_to_gateway, start_http_server
from tqdm import tqdm

from infomcr_dist.checkpoint import write_atomically
from infomcr_dist.config import TelemetrySettings

# 1.25-fold steps from 1 ms to a minute: a quantile read off the histogram is within 12 % of the true one.
_SECONDS = tuple(round(0.001 * 1.25**k, 6) for k in range(50))


RESET_REASONS = ("worker_lost", "hosts_changed")


@dataclass(frozen=True)
class StepRecord:
    """One update, as rank 0 saw it; what waited is part of ``step_duration_seconds``."""

    step: int
    epoch: int
    phase: str
    """plain or regularized"""
    loss: float
    """L(B, w) of the global batch"""
    penalty: float | None
    """R_α of the global batch (Jia & Su 2020, Eq. 7), before β"""
    beta: float | None
    """β of the schedule"""
    penalised: int | None
    """sub-batches of this rank whose penalty was taken; None before the regularizer is on"""
    gradient_norm: float
    """2-norm of the averaged, regularized gradient, before clipping"""
    finite: bool
    """Whether loss, penalty and gradient were; if not, the update was left out on every rank"""
    learning_rate: float
    samples: int
    """images of this rank"""
    global_samples: int
    """images of all ranks"""
    world_size: int
    data_errors: int
    """samples that others stood in for (data.on_error=skip)"""
    step_duration_seconds: float
    data_wait_seconds: float
    gradient_seconds: float
    """the forward and backward passes of this rank"""
    allreduce_wait_seconds: float
    """from its last backward pass to the averaged gradient"""
    update_seconds: float
    """of the weights, the check for finite numbers included"""
    penalty_duration_seconds: float | None
    """of a regularized step: its gradient_seconds beyond the median of the plain steps; None before there was one"""
    allreduce_bytes: int


class Telemetry:
    """Sinks of a run's records. Raises ValueError if the endpoint's port is taken."""

    def __init__(
        self, settings: TelemetrySettings, *, rank: int, local_rank: int, world_size: int, info: dict[str, str]
    ) -> None:
        self._leads = rank == 0
        self._metrics = _Metrics(world_size, {"rank": str(rank), "local_rank": str(local_rank)}, info)
        self._pushgateway = settings.pushgateway if self._leads else None
        self._server = None
        self._file: IO[str] | None = None
        self._bar: Any = None
        self._step, self._total_steps = 0, 1
        self.launcher_gone = False
        """Whether what rank 0 prints has no reader any more: the launcher was killed"""
        if settings.port is None:
            return
        port = settings.port + local_rank
        try:
            self._server, _ = start_http_server(port, settings.address, self._metrics.registry)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is in use" if taken else f"cannot be used ({error})"
            raise ValueError(
                f"telemetry.port: port {port} on {settings.address} {reason} "
                f"(telemetry.port={settings.port} + local rank {local_rank}): "
                "give another telemetry.port, or telemetry.port=null for no endpoint"
            ) from error

    def begin(self, records: Path, total_steps: int, done_steps: int, epoch_over: bool = False) -> None:
        """Open rank 0's file, without the records of what comes after ``done_steps``, and show the bar.

        ``epoch_over``: whether what follows an epoch's last step (evaluation, metric) is done as well.
        """
        self._step, self._total_steps = done_steps, total_steps
        self._metrics.event({"progress_ratio": done_steps / total_steps})
        if not self._leads:
            return
        _drop_records_after(records, done_steps, epoch_over)
        # Line by line: a killed process loses none, and the next rank 0 goes on with whole lines.
        self._file = open(records, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._bar = tqdm(
            total=total_steps,
            initial=done_steps,
            file=sys.stdout,
            ncols=120,
            mininterval=1.0,
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def step(self, record: StepRecord) -> None:
        """Record one update."""
        self._metrics.step(record)
        self._metrics.event({"progress_ratio": record.step / self._total_steps})
        self._step = record.step
        if self._file is not None:
            self._write("step", asdict(record))
        if self._bar is not None:
            penalty = "" if record.penalty is None else f", penalty {record.penalty:.2e}"
            rate = record.global_samples / record.step_duration_seconds
            self._bar.set_postfix_str(
                f"loss {record.loss:.3f}, rate {record.learning_rate:.3g}{penalty}, {rate:.0f} images/s", refresh=False
            )
            with self._reader_or_none():
                self._bar.update()

    def event(self, kind: str, **values: Any) -> None:
        """Record anything else (``epoch``, ``metric`` …); values that are named like a metric reach Prometheus."""
        self._metrics.event(values)
        if self._file is not None:
            self._write(kind, {"step": self._step, **values})

    def say(self, text: str) -> None:
        """Print lines above the bar."""
        if self._bar is not None:
            with self._reader_or_none():
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def push(self) -> None:
        """Give the metrics to the Pushgateway of the settings, if any; one that does not answer is said, no more."""
        if self._pushgateway is not None:
            try:
                push_to_gateway(self._pushgateway, "infomcr_dist", self._metrics.registry, timeout=10)
            except OSError as error:
                self.say(f"telemetry.pushgateway={self._pushgateway} did not take the metrics: {error}")

    def close(self) -> None:
        """Write out what is buffered and free the port."""
        if self._bar is not None:
            with self._reader_or_none():
                self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    @contextmanager
    def _reader_or_none(self) -> Iterator[None]:
        """The launcher reads what is printed; where it was killed, printing must not end the worker."""
        try:
            yield
        except (BrokenPipeError, ValueError) as error:
            if isinstance(error, ValueError) and "closed file" not in str(error):
                raise
            self.launcher_gone = True
            self._bar.disable = True  # closes without a last word
            self._bar = None
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"kind": kind, **finite(values)}) + "\n")


_EPOCH_END = ("evaluation", "metric", "epoch")
"""Kinds of record that follow an epoch's last step."""


class _Metrics:
    """This rank's Prometheus metrics. Names: README."""

    def __init__(self, world_size: int, rank_info: dict[str, str], run_info: dict[str, str]) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "infomcr", "registry": self.registry}
        for name, text, labels in (
            ("run_info", "What the run is, as labels; always 1", run_info),
            ("rank_info", "Which rank this endpoint is, as labels; always 1", rank_info),
        ):
            Gauge(name, text, list(labels), **common).labels(**labels).set(1)
        self._duration = Histogram(
            "step_duration_seconds", "Wall time of one update, waits included", ["phase"], buckets=_SECONDS, **common
        )
        self._histograms = {
            name: Histogram(name, text, buckets=_SECONDS, **common)
            for name, text in {
                "data_wait_seconds": "Time an update waited for its batch",
                "allreduce_wait_seconds": "Time an update waited for the allreduce",
                "penalty_duration_seconds": "Time the gradient of a regularized update took beyond a plain one's",
                "checkpoint_duration_seconds": "Time a checkpoint took to write, beside the training",
                "metric_duration_seconds": "Time an estimate of gamma_hat took",
            }.items()
        }
        self._counters = {
            name: Counter(name, text, **common)
            for name, text in {
                "samples": "Training images this rank has taken",
                "data_errors": "Samples left out because they could not be read",
                "nonfinite_steps": "Updates left out for a loss or gradient that was not finite on some rank",
                "allreduce_bytes": "Bytes of gradients this rank gave to the allreduce",
            }.items()
        }
        self._labelled = {
            "steps": Counter("steps", "Updates", ["phase"], **common),
            "checkpoints": Counter("checkpoints", "Checkpoints, by what became of them", ["outcome"], **common),
            "elastic_resets": Counter("elastic_resets", "Restarts of the world at another size", ["reason"], **common),
        }
        for phase in ("plain", "regularized"):
            self._labelled["steps"].labels(phase)
        for outcome in ("written", "failed"):
            self._labelled["checkpoints"].labels(outcome)
        for reason in RESET_REASONS:
            self._labelled["elastic_resets"].labels(reason)
        self._common = common
        self._gauges: dict[str, Gauge] = {}
        self._gauge_texts = {
            "loss": "Loss of the last global batch, without the penalty",
            "penalty": "Penalty R_alpha of the last regularized batch, before beta",
            "beta": "Weight of the penalty in the last update",
            "gradient_norm": "2-norm of the last averaged, regularized gradient, before clipping",
            "learning_rate": "Learning rate of the last update",
            "regularizer_active": "1 if the last update was regularized",
            "world_size": "Workers of the run",
            "epochs_completed": "Epochs behind the run",
            "progress_ratio": "Updates behind the run over all of its updates",
            "last_step_timestamp_seconds": "When the last update ended, Unix time",
            "last_checkpoint_timestamp_seconds": "When the last checkpoint was written, Unix time",
            "memory_bytes": "Memory of this rank's process (resident)",
            "gamma_hat": "Metric gamma-hat, ln of the determinant of xi (Eq. 6); lower generalizes better",
            "gamma_hat_standard_error": "Standard error of gamma_hat over its trials",
            "gamma_hat_cost_seconds": "Time the last estimate of gamma_hat took",
            "gamma_hat_age_seconds": "Time since the last estimate of gamma_hat",
            "gamma_hat_singular_trials": "Trials of the last estimate whose matrix was not positive definite",
            "fisher_trace": "Trace of the Fisher information, mean over the trials",
            "fisher_spectral_radius": "Spectral radius of the Fisher information, mean over the trials",
            "penalty_health_ratio": "Relative disagreement of finite difference and exact derivative",
            "penalised_sub_batches": "Sub-batches of the last update whose penalty was taken",
            "overhead_ratio": "Time of a step since the regularizer is on over a plain one's, measured by the run",
            "overhead_budget_ratio": "What overhead_ratio is held at (regularizer.budget)",
        }
        self._errors = {
            name: Gauge(name, text, ["split"], **common)
            for name, text in {
                "top1_error_ratio": "Top-1 error of the last evaluation, 0 to 1",
                "top5_error_ratio": "Top-5 error of the last evaluation, 0 to 1",
            }.items()
        }
        self._gauge("world_size").set(world_size)
        self._gauge("memory_bytes").set_function(_resident_bytes)
        if torch.cuda.is_available():
            gpu = Gauge("gpu_memory_bytes", "Memory that torch holds on this rank's GPU", **common)
            gpu.set_function(torch.cuda.memory_reserved)

    def _gauge(self, name: str) -> Gauge:
        """Made with its first value: a gauge that says 0 where nothing was measured would be believed."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, self._gauge_texts[name], **self._common)
        return self._gauges[name]

    def step(self, record: StepRecord) -> None:
        self._duration.labels(record.phase).observe(record.step_duration_seconds)
        for name, counter in self._counters.items():
            if name != "nonfinite_steps":
                counter.inc(getattr(record, name))
        self._counters["nonfinite_steps"].inc(not record.finite)
        self._labelled["steps"].labels(record.phase).inc()
        self._gauge("regularizer_active").set(record.phase == "regularized")
        self._gauge("last_step_timestamp_seconds").set_to_current_time()
        self._gauge("penalised_sub_batches").set(record.penalised or 0)
        self.event(vars(record))

    def event(self, values: dict[str, Any]) -> None:
        if "gamma_hat" in values:
            measured = time.time()
            self._gauge("gamma_hat_age_seconds").set_function(lambda: time.time() - measured)
        if "outcome" in values:
            self._labelled["checkpoints"].labels(values["outcome"]).inc()
            if values["outcome"] == "written":
                self._gauge("last_checkpoint_timestamp_seconds").set_to_current_time()
        for reason, count in values.get("elastic_resets", {}).items():
            self._labelled["elastic_resets"].labels(reason).inc(count)
        for name, value in values.items():
            if value is None:
                continue
            if name in self._gauge_texts:
                self._gauge(name).set(value)
            elif name in self._histograms:
                self._histograms[name].observe(value)
            elif name in self._errors:
                self._errors[name].labels(values["split"]).set(value)


def _resident_bytes() -> float:
    """0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _drop_records_after(records: Path, step: int, epoch_over: bool) -> None:
    """On resume: what comes after the checkpoint is done again, so its first records go."""
    if not records.exists():
        return

    def keep(line: str) -> bool:
        if not line.endswith("\n"):
            return False  # cut off in a power loss
        record = json.loads(line)
        after = record.get("step", 0)
        return after < step or (after == step and (epoch_over or record["kind"] not in _EPOCH_END))

    lines = records.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if keep(line)]
    write_atomically(records, lambda file: file.write("".join(kept).encode()))


def finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON lacks; dictionaries and lists all through."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
