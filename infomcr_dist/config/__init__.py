"""The configuration of a run: one tree of frozen dataclasses (`pipelines.options` fills it).

Every field is documented where it is declared, and ``--help`` shows that text. What can be checked without data is
checked on construction: a ValueError names the setting, its value and what would be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal

from infomcr_dist.config.checks import require
from infomcr_dist.config.commands import ExportSettings, MeasureSettings, PredictSettings, ReportSettings
from infomcr_dist.config.data import DataSettings
from infomcr_dist.config.running import (
    CheckpointSettings,
    EvaluationSettings,
    MetricSettings,
    ProfileSettings,
    TelemetrySettings,
)
from infomcr_dist.config.training import AveragingSettings, OptimizerSettings, RegularizerSettings, ScheduleSettings

__all__ = [
    "AveragingSettings",
    "CheckpointSettings",
    "Config",
    "DataSettings",
    "EvaluationSettings",
    "ExportSettings",
    "MeasureSettings",
    "MetricSettings",
    "OptimizerSettings",
    "PredictSettings",
    "ProfileSettings",
    "RegularizerSettings",
    "ReportSettings",
    "ScheduleSettings",
    "TelemetrySettings",
]


@dataclass(frozen=True)
class Config:
    """A run."""

    RENAMED: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "data.mixing": "data.shuffle",
            "data.remainder": "data.drop_last: true for drop, false for keep",
            "regularizer.way": "regularizer.estimator",
            "regularizer.sampled": "regularizer.num_sampled",
            "regularizer.budget": "regularizer.overhead_budget",
            "regularizer.health_every_steps": "regularizer.finite_difference_error_every_steps",
            "metric.share": "metric.max_time_fraction",
            "resume_changed": "allow_config_change",
            "nonfinite_steps": "max_nonfinite_steps",
            "stop_seconds": "shutdown_timeout_seconds",
            "hang_seconds": "hang_timeout_seconds",
        }
    )

    model: str = "resnet20"
    """A network of infomcr_dist.models, timm:NAME, torchvision:NAME, or an import path package.module:function."""
    init_from: str | None = None
    """Weights that training begins with: a run directory, a checkpoint, or a file of weights (.safetensors, or .pt with
    tensors alone). A head of other classes is new. A resumed run has its checkpoint's instead. null: random weights."""
    frozen: tuple[str, ...] = ()
    """Parts that are not trained, by the names of modules or parameters; their BatchNorm and dropout are as in
    evaluation."""
    epochs: int = 10
    """Passes over the training images."""
    seed: int = 0
    """Seed of the weights, the order of the samples, the augmentation and the metric's trials."""
    run_dir: str | None = None
    """Directory of the run's files; null: runs/RECIPE-TIME."""
    resume: str | None = None
    """A run directory or a checkpoint to resume from; auto: from run_dir if it holds a checkpoint."""
    allow_config_change: bool = False
    """Whether to resume even where settings or data differ from those of the checkpoint; the differences are logged."""
    max_nonfinite_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient, each skipped on every worker, after which the run ends."""
    compare_weights_steps: int = 1000
    """Steps between comparisons of the workers' weights, which must be bitwise equal; 0: only at the ends of epochs."""
    shutdown_timeout_seconds: float = 25.0
    """Seconds from the signal to stop to a worker's exit, saved or not; less than the sender's grace period."""
    hang_timeout_seconds: float | None = 120.0
    """Seconds after which a hanging worker or a silent network ends the job; null: never."""
    engine: Literal["auto", "horovod", "torch"] = "auto"
    """Whose workers these are: Horovod's (horovodrun) or torch.distributed's (torchrun); auto: by the environment."""
    pid_dir: str | None = None
    """Directory of each host's own for a file rank-LOCAL_RANK.pid per worker, for who must signal it; null: none."""
    threads: int | None = None
    """CPU threads a worker computes with; null: OMP_NUM_THREADS, else its share of the cores that may be used."""
    compile: bool = False
    """Compile the passes with torch.compile: a minute at the start, and a C compiler, for faster steps on a GPU."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of the passes in training and evaluation; fp32: IEEE float32, not TF32, in plain and regularized steps; tf32:
    TF32 in matrix products and convolutions of a GPU; bf16: autocast, with weights and their update in fp32. The metric
    is always taken in fp32."""
    deterministic: bool = True
    """Whether a GPU gives the same bits every time, so that a resumed run is the same bit for bit; false: it takes the
    fastest algorithm of each operation, and a resumed run is the same to rounding. A CPU is deterministic anyway."""
    data: DataSettings = field(default_factory=lambda: DataSettings(global_batch_size=128))
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    averaging: AveragingSettings = field(default_factory=AveragingSettings)
    regularizer: RegularizerSettings = field(default_factory=lambda: RegularizerSettings(sub_batch_size=16))
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    metric: MetricSettings = field(default_factory=MetricSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        require(self.max_nonfinite_steps >= 1, "max_nonfinite_steps", "at least 1", self.max_nonfinite_steps)
        require(self.compare_weights_steps >= 0, "compare_weights_steps", "at least 0", self.compare_weights_steps)
        shutdown, hang = self.shutdown_timeout_seconds, self.hang_timeout_seconds
        require(shutdown > 0, "shutdown_timeout_seconds", "positive", shutdown)
        require(hang is None or hang >= 2, "hang_timeout_seconds", "at least 2, or null", hang)
        require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
        late = [m for m in self.schedule.milestones if m >= self.epochs]
        if late:
            raise ValueError(f"schedule.milestones must come before the end, got {late} and epochs={self.epochs}")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                "schedule.warmup_epochs must be less than epochs, "
                f"got {self.schedule.warmup_epochs} and epochs={self.epochs}"
            )
        if self.averaging.kind != "none" and self.averaging.start_epoch >= self.epochs:
            raise ValueError(
                "averaging.start_epoch must be less than epochs, "
                f"got {self.averaging.start_epoch} and epochs={self.epochs}"
            )
        if self.resume is not None and self.data.backend == "webdataset":
            raise ValueError(
                f"resume={self.resume} cannot resume exactly with data.backend=webdataset, which does not restore the "
                "order of its samples: use dali or torch"
            )
        if self.resume == "auto" and self.run_dir is None:
            raise ValueError("resume=auto looks for checkpoints in run_dir, got run_dir=null: give run_dir=DIRECTORY")
