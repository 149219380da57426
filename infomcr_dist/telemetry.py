"""Where records go: rank 0's console, file and logger, and every rank's Prometheus endpoint.

A record's field with the name of a metric sets that metric: a step's ``data_wait_seconds`` is observed by the
histogram ``infomcr_data_wait_seconds``.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, push_to_gateway

from infomcr_dist.config import TelemetrySettings
from infomcr_dist.endpoint import Endpoint
from infomcr_dist.logger import Logger, check_installed
from infomcr_dist.progress import Progress
from infomcr_dist.records import (
    CheckpointRecord,
    EvaluationRecord,
    MetricRecord,
    Record,
    RecordWriter,
    RestartRecord,
    StepRecord,
    drop_after,
)
from infomcr_dist.world import InUse

# 1.25-fold steps from 1 ms to a minute: a quantile read off the histogram is within 12 % of the true one.
_SECONDS = tuple(round(0.001 * 1.25**k, 6) for k in range(50))


_PUSH_SECONDS = 10


class Telemetry:
    """The sinks of a run's records.

    Args:
        settings: the endpoint, the Pushgateway and the logger.
        rank: rank 0 alone has a console, a file, a Pushgateway and a logger.
        local_rank: its endpoint's port is ``settings.port + local_rank``.
        world_size: workers of the run.
        device: of this rank; a GPU's memory is observed.
        info: what the run is, the labels of ``infomcr_run_info``.

    Raises:
        InUse: the endpoint's port is taken.
        ValueError: it cannot be used, or the logger is not installed.
    """

    def __init__(
        self,
        settings: TelemetrySettings,
        *,
        rank: int,
        local_rank: int,
        world_size: int,
        device: torch.device,
        info: dict[str, str],
    ) -> None:
        self._rank = rank
        self._prometheus = _Prometheus(world_size, device, {"rank": str(rank), "local_rank": str(local_rank)}, info)
        self._pushgateway = settings.pushgateway if rank == 0 else None
        self._progress = Progress()
        self._writer: RecordWriter | None = None
        self._endpoint: Endpoint | None = None
        self._logger_name = settings.logger if rank == 0 else None
        self._logger: Logger | None = None
        check_installed(self._logger_name)
        self._run = ""
        if settings.port is None:
            return
        port = settings.port + local_rank
        try:
            self._endpoint = Endpoint(self._prometheus.registry, settings.address, port)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "is in use" if taken else f"cannot be used ({error})"
            raise (InUse if taken else ValueError)(
                f"telemetry.port: port {port} on {settings.address} {reason} "
                f"(telemetry.port={settings.port} + local rank {local_rank}): "
                "give another telemetry.port, or telemetry.port=null for no endpoint"
            ) from error

    def begin(
        self,
        path: Path,
        total_steps: int,
        done_steps: int,
        epoch_evaluated: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Open rank 0's file and logger, and show the bar.

        Args:
            path: the file; records of what a resumed run does again are dropped from it.
            total_steps: of the whole run.
            done_steps: the step the run resumes after.
            epoch_evaluated: whether what follows an epoch's last step (evaluation, metric) is done as well.
            settings: of the run, flat; the logger shows them.
        """
        self._run = path.parent.name
        self._prometheus.begin(total_steps, done_steps)
        if self._rank == 0:
            logged = drop_after(path, done_steps, epoch_evaluated)
            if self._logger_name is not None:
                self._logger = Logger(self._logger_name, path.parent, settings or {}, logged)
            self._writer = RecordWriter(path)
            self._progress.begin(total_steps, done_steps)

    def log(self, record: Record) -> None:
        """Give a record to every sink."""
        self._prometheus.log(record)
        if self._writer is not None:
            self._write(self._writer, record)
        if self._logger is not None:
            self._log(self._logger, record)
        if isinstance(record, StepRecord):
            self._progress.step(record)

    def _write(self, writer: RecordWriter, record: Record) -> None:
        before = writer.dropped
        writer.log(record)
        if writer.dropped > before:
            self._prometheus.count_dropped("records_dropped", 1)
            if before == 0:
                self.message(f"records.jsonl cannot be written ({writer.error}): records are dropped until it can")

    def _log(self, logger: Logger, record: Record | None) -> None:
        """Log a record, or with None close the logger."""
        dropped, reason = logger.dropped, logger.reason
        if record is None:
            logger.close()
        else:
            logger.log(record)
        self._prometheus.count_dropped("logger_records_dropped", logger.dropped - dropped)
        if logger.reason != reason:
            self.message(
                f"telemetry.logger={self._logger_name}: {logger.reason}: it lacks records until it can log them"
            )

    def message(self, text: str) -> None:
        """Print lines above rank 0's bar."""
        self._progress.message(text)

    def push(self) -> None:
        """Push rank 0's metrics to the Pushgateway of the settings, if any, in a group of the run's name.

        Its failure, or more than ten seconds, is one line.
        """
        if self._pushgateway is None:
            return
        failure: list[str] = [f"no answer in {_PUSH_SECONDS} s"]
        thread = threading.Thread(target=self._push, args=(self._pushgateway, failure), daemon=True)
        thread.start()
        thread.join(_PUSH_SECONDS)
        if failure:
            self.message(f"telemetry.pushgateway={self._pushgateway} did not take the metrics: {failure[0]}")

    def _push(self, gateway: str, failure: list[str]) -> None:
        group = {"run": self._run}
        try:
            push_to_gateway(
                gateway, "infomcr_dist", self._prometheus.registry, grouping_key=group, timeout=_PUSH_SECONDS
            )
        except Exception as error:  # whatever answers there
            failure[0] = " ".join(str(error).split()) or type(error).__name__
        else:
            failure.clear()

    def close(self) -> None:
        """Close the file and the logger, and free the port."""
        if self._logger is not None:
            self._log(self._logger, None)
            if self._logger.dropped:
                lacks = f"{self._logger.dropped} records, which records.jsonl has"
                self.message(f"telemetry.logger={self._logger_name} lacks {lacks}")
        self._progress.close()
        if self._writer is not None:
            self._writer.close()
        if self._endpoint is not None:
            self._endpoint.close()


RESTART_REASONS = ("worker_lost", "hosts_changed")
"""Values of the label ``reason`` of ``infomcr_elastic_restarts_total``."""
_HISTOGRAMS = {
    "data_wait_seconds": "Time an update waited for its batch",
    "allreduce_wait_seconds": "Time an update waited for the allreduce",
    "penalty_duration_seconds": "Time the gradient of a regularized update took beyond a plain one's",
    "checkpoint_duration_seconds": "Time a checkpoint took to write, beside the training",
    "metric_duration_seconds": "Time an estimate of gamma_hat took",
}
_COUNTERS = {
    "samples": "Training images this rank has taken",
    "data_errors": "Samples skipped because they could not be read",
    "nonfinite_steps": "Updates skipped for a loss or gradient that was not finite on some rank",
    "allreduce_bytes": "Bytes of gradients this rank gave to the allreduce",
    "records_dropped": "Records that could not be written to records.jsonl",
    "logger_records_dropped": "Records that telemetry.logger did not take",
}
_LABELLED_COUNTERS = {
    "steps": ("Updates", "phase", ("plain", "regularized")),
    "checkpoints": ("Checkpoints, by their outcome", "outcome", ("written", "failed")),
    "elastic_restarts": ("Restarts of the world at another size", "reason", RESTART_REASONS),
}
_GAUGES = {
    "loss": "Loss of the last global batch, without the penalty",
    "penalty": "Penalty R_alpha of the last regularized batch, before beta",
    "beta": "Weight of the penalty in the last update",
    "gradient_norm": "2-norm of the last averaged, regularized gradient, before clipping",
    "learning_rate": "Learning rate of the last update",
    "regularizer_active": "1 if the last update was regularized",
    "world_size": "Workers of the run",
    "epochs_completed": "Epochs completed",
    "progress_ratio": "Updates done over all updates of the run",
    "last_step_timestamp_seconds": "When the last update ended, or the run began or resumed, Unix time",
    "last_checkpoint_timestamp_seconds": "When the last checkpoint was written, or the run resumed from it, Unix time",
    "memory_bytes": "Memory of this rank's process (resident)",
    "gamma_hat": "Metric gamma-hat, ln det xi (Eq. 6); at equal training loss, lower generalizes better",
    "gamma_hat_standard_error": "Standard error of gamma_hat over its trials",
    "gamma_hat_cost_seconds": "Time the last estimate of gamma_hat took",
    "averaged_gamma_hat": "Metric gamma-hat of the averaged weights",
    "gamma_hat_age_seconds": "Time since the last estimate of gamma_hat",
    "gamma_hat_singular_trials": "Trials of the last estimate whose matrix was not positive definite",
    "fisher_trace": "Trace of the Fisher information, mean over the trials",
    "fisher_spectral_radius": "Spectral radius of the Fisher information, mean over the trials",
    "finite_difference_error": "Relative difference of the finite difference and the exact derivative of the penalty",
    "penalized_sub_batches": "Sub-batches of the last update whose penalty was taken",
    "overhead_ratio": "Time of a step since the regularizer is on over a plain one's, measured by the run",
    "overhead_budget_ratio": "What overhead_ratio is held at (regularizer.overhead_budget)",
}
_ERRORS = {
    "top1_error_ratio": "Top-1 error of the last evaluation, 0 to 1",
    "top5_error_ratio": "Top-5 error of the last evaluation, 0 to 1",
    "averaged_top1_error_ratio": "Top-1 error of the averaged weights in the last evaluation, 0 to 1",
    "averaged_top5_error_ratio": "Top-5 error of the averaged weights in the last evaluation, 0 to 1",
}


class _Prometheus:
    """This rank's metrics."""

    def __init__(
        self, world_size: int, device: torch.device, rank_info: dict[str, str], run_info: dict[str, str]
    ) -> None:
        self.registry = CollectorRegistry()
        self._common: dict[str, Any] = {"namespace": "infomcr", "registry": self.registry}
        common, self._total_steps = self._common, 1
        for name, text, labels in (
            ("run_info", "What the run is, as labels; always 1", run_info),
            ("rank_info", "Which rank this endpoint is, as labels; always 1", rank_info),
        ):
            Gauge(name, text, list(labels), **common).labels(**labels).set(1)
        self._duration = Histogram(
            "step_duration_seconds", "Wall time of one update, waits included", ["phase"], buckets=_SECONDS, **common
        )
        self._histograms = {
            name: Histogram(name, text, buckets=_SECONDS, **common) for name, text in _HISTOGRAMS.items()
        }
        self._counters = {name: Counter(name, text, **common) for name, text in _COUNTERS.items()}
        self._labelled: dict[str, Counter] = {}
        for name, (text, label, values) in _LABELLED_COUNTERS.items():
            self._labelled[name] = Counter(name, text, [label], **common)
            for value in values:
                self._labelled[name].labels(value)
        self._errors = {name: Gauge(name, text, ["split"], **common) for name, text in _ERRORS.items()}
        self._gauges: dict[str, Gauge] = {}
        self._gauge("world_size").set(world_size)
        self._gauge("memory_bytes").set_function(_resident_bytes)
        if device.type == "cuda":
            gpu = Gauge("gpu_memory_bytes", "Memory that torch holds on this rank's GPU", **common)
            # The thread that answers a scrape has a current device of its own, the first.
            gpu.set_function(lambda: torch.cuda.memory_reserved(device))

    def begin(self, total_steps: int, done_steps: int) -> None:
        self._total_steps = total_steps
        self._gauge("progress_ratio").set(done_steps / total_steps)
        # A run that waited for its machines has not stalled, and the checkpoint that it resumes from is its newest.
        self._gauge("last_step_timestamp_seconds").set_to_current_time()
        if done_steps:
            self._gauge("last_checkpoint_timestamp_seconds").set_to_current_time()

    def log(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            self._step(record)
        elif isinstance(record, MetricRecord):
            self._histograms["metric_duration_seconds"].observe(record.gamma_hat_cost_seconds)
            if record.weights == "averaged":
                self._gauge("averaged_gamma_hat").set(record.gamma_hat)
                return
            measured = time.time()
            self._gauge("gamma_hat_age_seconds").set_function(lambda: time.time() - measured)
        elif isinstance(record, CheckpointRecord):
            self._labelled["checkpoints"].labels(record.outcome).inc()
            if record.outcome == "written":
                self._gauge("last_checkpoint_timestamp_seconds").set_to_current_time()
        elif isinstance(record, RestartRecord):
            for reason, count in record.elastic_restarts.items():
                self._labelled["elastic_restarts"].labels(reason).inc(count)
        elif isinstance(record, EvaluationRecord):
            prefix = "averaged_" if record.weights == "averaged" else ""
            for name in ("top1_error_ratio", "top5_error_ratio"):
                self._errors[prefix + name].labels(record.split).set(getattr(record, name))
            return  # its loss is not that of the last batch
        for name, value in vars(record).items():
            if value is None:
                continue
            if name in _GAUGES:
                self._gauge(name).set(value)
            elif name in self._histograms:
                self._histograms[name].observe(value)

    def count_dropped(self, name: str, count: int) -> None:
        self._counters[name].inc(count)

    def _step(self, record: StepRecord) -> None:
        self._duration.labels(record.phase).observe(record.step_duration_seconds)
        for name in ("samples", "data_errors", "allreduce_bytes"):
            self._counters[name].inc(getattr(record, name))
        self._counters["nonfinite_steps"].inc(not record.finite)
        self._labelled["steps"].labels(record.phase).inc()
        self._gauge("regularizer_active").set(record.phase == "regularized")
        self._gauge("last_step_timestamp_seconds").set_to_current_time()
        self._gauge("penalized_sub_batches").set(record.num_penalized or 0)
        self._gauge("progress_ratio").set(record.step / self._total_steps)

    def _gauge(self, name: str) -> Gauge:
        """Made with its first value: a 0 where nothing was measured would be believed."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, _GAUGES[name], **self._common)
        return self._gauges[name]


def _resident_bytes() -> float:
    """0 where the system does not offer it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
