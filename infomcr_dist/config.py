"""The configuration of a run: one tree of frozen dataclasses (`pipelines.options` fills it).

Every field is documented where it is declared, and ``--help`` shows that text. What can be checked without data is
checked on construction: a ValueError names the setting, its value and what would be right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal


def _require(condition: bool, setting: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{setting} must be {rule}, got {value}")


@dataclass(frozen=True)
class DataSettings:
    """The data set, and how a global batch is made of it."""

    path: str = "fashion-mnist"
    """Directory of a prepared data set or of shards, or their URLs with braces, https://host/train-{0000..0146}.tar
    (http, https, s3, gs or file); ``fashion-mnist`` is ./data/fashion-mnist, prepared on first use."""
    backend: Literal["dali", "torch", "resident", "webdataset", "synthetic"] = "dali"
    """Loader that decodes and augments the batches. resident: all images on the device, decoded once, where they fit
    there and the augmentation only flips and shifts. webdataset streams, so evaluation uses torch there."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a sample that cannot be read or decoded: stop the run, or take the next sample and count it."""
    shuffle: Literal["full", "window"] = "full"
    """full: an epoch is a permutation of all samples; window: of the shards, and of the samples of a few shards at a
    time, for slow disks."""
    augmentation: str = "crop4_flip"
    """Of the training batches: none, flip, crop1_flip, crop4_flip or random_resized_crop."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    image_size: int | None = None
    """Side of the model's square input images, in pixels; null: the side they are stored at."""
    batch_size: int | None = None
    """Images per worker and step; null where global_batch_size is given."""
    global_batch_size: int | None = None
    """Images per step over all workers, split evenly; null where batch_size is given."""
    drop_last: bool = False
    """Whether an epoch's last global batch is dropped if it is smaller than the others."""
    train_images: int | None = None
    """Number of training images, drawn with the seed; null: all."""
    confusion_images: int = 0
    """Number of additional training images with random labels, both drawn with the seed (Scenario I); errors count
    them, metrics do not."""
    holdout_images: int = 0
    """Number of training images held out, drawn with the seed, and evaluated on in place of the test images."""
    max_batch_size: int | None = None
    """Largest number of images that a worker takes through the network at once; gradients are accumulated over the
    pieces of a larger local batch. null: the whole local batch."""
    threads: int = 1
    """Decoding threads per worker; processes where the backend is torch."""
    cache_bytes: int = 10_000_000_000
    """Largest size of the local copies of what is read from URLs, on each machine, below XDG_CACHE_HOME; 0: none."""
    prefetch: int = 2
    """Batches decoded ahead."""

    def __post_init__(self) -> None:
        given = (self.batch_size is not None) + (self.global_batch_size is not None)
        if given != 1:
            raise ValueError(
                "data: give one of batch_size (images a worker) and global_batch_size (images over all workers), "
                f"got batch_size={self.batch_size} and global_batch_size={self.global_batch_size}"
            )
        names = (
            "batch_size",
            "global_batch_size",
            "max_batch_size",
            "image_size",
            "train_images",
            "threads",
            "prefetch",
        )
        for name in names:
            value = getattr(self, name)
            _require(value is None or value >= 1, f"data.{name}", "at least 1", value)
        _require(0 <= self.color_jitter < 1, "data.color_jitter", "in [0, 1)", self.color_jitter)
        for name in ("confusion_images", "holdout_images", "cache_bytes"):
            _require(getattr(self, name) >= 0, f"data.{name}", "at least 0", getattr(self, name))
        if self.confusion_images and self.train_images is None:
            raise ValueError(
                "data.confusion_images needs data.train_images, "
                f"got {self.confusion_images} and null: give a number for both"
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """Stochastic gradient descent with momentum."""

    learning_rate: float = 0.1
    """Peak learning rate, at a global batch of reference_batch_size images."""
    reference_batch_size: int | None = None
    """Global batch size from which the rate is scaled linearly (Goyal et al. 2017); null: no scaling."""
    momentum: float = 0.9
    """Momentum coefficient."""
    nesterov: bool = True
    """Whether momentum is Nesterov's."""
    weight_decay: float = 1e-4
    """Coefficient of weight decay, of the outer loss only: it never enters a sub-batch gradient."""
    decay_norm_and_bias: bool = True
    """Whether weight decay applies to normalization layers and biases as well."""
    clip_gradient_norm: float | None = None
    """Largest 2-norm of the averaged, regularized gradient; null: no clipping."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate", "positive", self.learning_rate)
        _require(0 <= self.momentum < 1, "optimizer.momentum", "in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "optimizer.weight_decay", "at least 0", self.weight_decay)
        _require(0 <= self.label_smoothing < 1, "optimizer.label_smoothing", "in [0, 1)", self.label_smoothing)
        for name in ("reference_batch_size", "clip_gradient_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"optimizer.{name}", "positive", value)
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov needs momentum, got optimizer.momentum=0.0: set nesterov=false")


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the run."""

    kind: Literal["constant", "milestones", "cosine", "plateau"] = "milestones"
    """Shape of the schedule after the warm-up; plateau: drops when the training loss no longer falls."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up to the peak rate."""
    milestones: tuple[float, ...] = ()
    """For milestones: epochs at which the rate is multiplied by factor."""
    factor: float = 0.1
    """For milestones and plateau: factor of the rate at a drop."""
    patience: int = 5
    """For plateau: epochs without a lower training loss before a drop."""
    threshold: float = 0.01
    """For plateau: relative decrease of the training loss that counts as lower."""

    def __post_init__(self) -> None:
        _require(self.warmup_epochs >= 0, "schedule.warmup_epochs", "at least 0", self.warmup_epochs)
        _require(0 < self.factor < 1, "schedule.factor", "between 0 and 1", self.factor)
        _require(self.patience >= 1, "schedule.patience", "at least 1", self.patience)
        _require(0 <= self.threshold < 1, "schedule.threshold", "in [0, 1)", self.threshold)
        increasing = list(self.milestones) == sorted(set(self.milestones))
        _require(increasing, "schedule.milestones", "increasing", list(self.milestones))
        if self.milestones and self.milestones[0] <= self.warmup_epochs:
            raise ValueError(
                "schedule.milestones must come after the warm-up, "
                f"got {list(self.milestones)} and warmup_epochs={self.warmup_epochs}"
            )


@dataclass(frozen=True)
class RegularizerSettings:
    """The penalty βR_α on the divergence of sub-batch gradients (Jia & Su 2020, Algorithm 1)."""

    when: Literal["after_drop", "always", "never", "from_epoch"] = "after_drop"
    """after_drop: from the first drop of the learning rate (Sec. 7.2.1); from_epoch: from the epoch ``epoch``."""
    epoch: float | None = None
    """For from_epoch: epoch at which the penalty begins."""
    ramp: Literal["linear", "cosine", "steps"] = "linear"
    """How β rises once the penalty begins: linearly, as half a cosine, or in ramp_steps equal steps."""
    ramp_epochs: float = 0.0
    """Epochs over which β rises; 0: β is constant."""
    ramp_steps: int = 4
    """For ramp=steps: number of steps."""
    alpha: float = 1e-4
    """Length α of the probing step w − αg; part of the strength (the penalty's gradient is βαHg)."""
    beta: float = 10.0
    """Weight β of the penalty."""
    sub_batches: int | None = None
    """Number of sub-batches of a worker's batch (M); null where sub_batch_size is given."""
    sub_batch_size: int | None = None
    """Images per sub-batch (16 in the paper): keeps the strength the same for any number of workers."""
    estimator: Literal["fused", "sampled", "reference"] = "fused"
    """fused: loss and penalty over all sub-batches; sampled: the penalty over a random few of them; reference: the loss
    over the whole batch, as in the authors' release."""
    num_sampled: int | None = None
    """For estimator=sampled: penalized sub-batches per step (k); null where overhead_budget is given."""
    overhead_budget: float | None = None
    """For estimator=sampled: the largest time of a regularized step relative to a plain one; the number of penalized
    sub-batches is chosen to keep within it."""
    derivative: Literal["auto", "finite_difference", "exact"] = "auto"
    """The paper's g − h, or its limit αHg; auto: the difference, unless it would be noise."""
    step: float | Literal["alpha", "auto"] = "auto"
    """Length of the difference's step. alpha: the paper's, in float32; a number: relative to the length of the weights,
    in the run's precision; auto: 0.003 in mixed precision, else alpha."""
    finite_difference_error_every_steps: int = 0
    """Steps between comparisons of the two derivatives on one sub-batch; 0: none."""

    def __post_init__(self) -> None:
        if (self.when == "from_epoch") != (self.epoch is not None):
            raise ValueError(
                f"regularizer.epoch goes with regularizer.when=from_epoch, got when={self.when} and epoch={self.epoch}"
            )
        if self.when != "never" and (self.sub_batches is None) == (self.sub_batch_size is None):
            raise ValueError(
                "regularizer: give one of sub_batches and sub_batch_size, "
                f"got sub_batches={self.sub_batches} and sub_batch_size={self.sub_batch_size}"
            )
        given = (self.num_sampled is not None) + (self.overhead_budget is not None)
        if given != (self.estimator == "sampled"):
            raise ValueError(
                "regularizer: one of num_sampled and overhead_budget goes with estimator=sampled, and only with it, "
                f"got estimator={self.estimator}, num_sampled={self.num_sampled} "
                f"and overhead_budget={self.overhead_budget}"
            )
        budget, every = self.overhead_budget, self.finite_difference_error_every_steps
        _require(budget is None or budget > 1, "regularizer.overhead_budget", "above 1", budget)
        _require(self.ramp_steps >= 1, "regularizer.ramp_steps", "at least 1", self.ramp_steps)
        _require(every >= 0, "regularizer.finite_difference_error_every_steps", "at least 0", every)
        for name in ("sub_batches", "sub_batch_size", "num_sampled"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"regularizer.{name}", "at least 1", value)
        _require(self.alpha > 0, "regularizer.alpha", "positive", self.alpha)
        relative = self.step if not isinstance(self.step, str) else None
        _require(relative is None or 0 < relative < 1, "regularizer.step", "alpha, auto or between 0 and 1", self.step)
        if relative is not None and self.derivative == "exact":
            raise ValueError(f"regularizer.derivative=exact takes no regularizer.step, got step={relative}")
        _require(self.beta >= 0, "regularizer.beta", "at least 0", self.beta)
        _require(self.ramp_epochs >= 0, "regularizer.ramp_epochs", "at least 0", self.ramp_epochs)
        _require(self.epoch is None or self.epoch >= 0, "regularizer.epoch", "at least 0", self.epoch)


@dataclass(frozen=True)
class EvaluationSettings:
    """Top-1 and top-5 error on the test images and on the un-augmented training images."""

    every_epochs: int = 1
    """Epochs between evaluations on the test images; 0: only at the end."""
    train_every_epochs: int = 0
    """Epochs between evaluations on the training images; 0: only at the end."""
    transform: Literal["none", "center_crop"] = "none"
    """Input of evaluation and metric: the whole image, or its central 7/8, resized to data.image_size."""
    batch_size: int = 250
    """Images per batch of a worker."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "train_every_epochs"):
            _require(getattr(self, name) >= 0, f"evaluation.{name}", "at least 0", getattr(self, name))
        _require(self.batch_size >= 1, "evaluation.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class MetricSettings:
    """The metric γ̂ (Jia & Su 2020, Eq. 6), on un-augmented training images."""

    every_epochs: int | None = None
    """Epochs between estimates; 0: only at the end; null: as often as max_time_fraction allows."""
    max_time_fraction: float = 0.02
    """Largest fraction of the run's time spent on estimates before the end, where every_epochs is null."""
    trials: int = 100
    """Trials averaged (T); 0: no metric."""
    samples: int = 100
    """Training images per trial (N')."""
    images: int = 10_000
    """Size of the pool of training images, drawn once, that the trials draw from."""

    def __post_init__(self) -> None:
        every = self.every_epochs
        _require(every is None or every >= 0, "metric.every_epochs", "at least 0, or null", every)
        fraction = self.max_time_fraction
        _require(0 < fraction < 1, "metric.max_time_fraction", "between 0 and 1", fraction)
        _require(self.trials >= 0, "metric.trials", "at least 0", self.trials)
        _require(self.samples >= 2, "metric.samples", "at least 2", self.samples)
        _require(self.images >= self.samples, "metric.images", "at least metric.samples", self.images)


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints of a run, in addition to that of the step at which it is stopped."""

    every_epochs: int = 1
    """Epochs between checkpoints; the last epoch is always saved."""
    every_steps: int | None = None
    """Steps between checkpoints within an epoch; null: none."""
    keep: int = 2
    """Number of newest checkpoints kept; the one with the lowest error on the evaluated images is kept as well."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "checkpoint.every_epochs", "at least 1", self.every_epochs)
        steps = self.every_steps
        _require(steps is None or steps >= 1, "checkpoint.every_steps", "at least 1, or null", steps)
        _require(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)


@dataclass(frozen=True)
class TelemetrySettings:
    """Where metrics go."""

    port: int | None = 9500
    """Port of the Prometheus endpoint of local rank 0; each further one takes the next. null: no endpoint."""
    address: str = "127.0.0.1"
    """Address that the endpoint binds to; 0.0.0.0 lets other machines scrape it."""
    pushgateway: str | None = None
    """HOST:PORT of a Pushgateway to which rank 0 pushes its metrics when the run ends; null: none."""

    def __post_init__(self) -> None:
        valid = self.port is None or 1 <= self.port <= 65535
        _require(valid, "telemetry.port", "between 1 and 65535, or null", self.port)
        if self.pushgateway is not None and not re.fullmatch(r"([\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}", self.pushgateway):
            raise ValueError("telemetry.pushgateway must be HOST:PORT, without a scheme, a user or a password")


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
    """A network of infomcr_dist.models, or an import path package.module:function."""
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
    """Directory for a file rank-LOCAL_RANK.pid per worker of a host, for whoever must signal it; null: none."""
    threads: int | None = None
    """CPU threads a worker computes with; null: OMP_NUM_THREADS, else its share of the cores that may be used."""
    compile: bool = False
    """Compile the passes with torch.compile: a minute at the start, and a C compiler, for faster steps on a GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the passes in training and evaluation; fp32: IEEE float32, not TF32, in plain and regularized steps; bf16:
    autocast, with weights and their update in fp32. The metric is always taken in fp32."""
    deterministic: bool = True
    """Whether a GPU gives the same bits every time, so that a resumed run is the same bit for bit; false: it takes the
    fastest algorithm of each operation, and a resumed run is the same to rounding. A CPU is deterministic anyway."""
    data: DataSettings = field(default_factory=lambda: DataSettings(global_batch_size=128))
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    regularizer: RegularizerSettings = field(default_factory=lambda: RegularizerSettings(sub_batch_size=16))
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    metric: MetricSettings = field(default_factory=MetricSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _require(self.max_nonfinite_steps >= 1, "max_nonfinite_steps", "at least 1", self.max_nonfinite_steps)
        _require(self.compare_weights_steps >= 0, "compare_weights_steps", "at least 0", self.compare_weights_steps)
        shutdown, hang = self.shutdown_timeout_seconds, self.hang_timeout_seconds
        _require(shutdown > 0, "shutdown_timeout_seconds", "positive", shutdown)
        _require(hang is None or hang >= 2, "hang_timeout_seconds", "at least 2, or null", hang)
        _require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
        late = [m for m in self.schedule.milestones if m >= self.epochs]
        if late:
            raise ValueError(f"schedule.milestones must come before the end, got {late} and epochs={self.epochs}")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                "schedule.warmup_epochs must be less than epochs, "
                f"got {self.schedule.warmup_epochs} and epochs={self.epochs}"
            )
        if self.resume is not None and self.data.backend == "webdataset":
            raise ValueError(
                f"resume={self.resume} cannot resume exactly with data.backend=webdataset, which does not restore the "
                "order of its samples: use dali or torch"
            )
        if self.resume == "auto" and self.run_dir is None:
            raise ValueError("resume=auto looks for checkpoints in run_dir, got run_dir=null: give run_dir=DIRECTORY")


@dataclass(frozen=True)
class MeasureSettings:
    """How checkpoints are measured, and on what."""

    data: str | None = None
    """Data set directory; null: that of each model's training."""
    model: str | None = None
    """Import path package.module:function of a network that is not ours; no code is imported on a checkpoint's word."""
    trials: int = 100
    """Trials averaged (T)."""
    samples: int = 100
    """Training images per trial (N')."""
    images: int = 10_000
    """Size of the pool of training images that the trials draw from, and over which robustness is averaged."""
    logit_scale: float | None = None
    """Scale each image's logits to logits / (‖logits‖₂ · logit_scale) first, to compare models of unequal training loss
    (Table 3; 0.04 there); null: no scaling."""
    log_volume: float | None = None
    """ln V of the neighbourhood in Theorem 1; null: that of a ball whose radius is a hundredth of the weights' norm."""
    delta: float = 0.05
    """Theorem 1 holds with probability 1 − delta."""
    seed: int = 0
    """Seed of the trials."""
    batch_size: int = 250
    """Images per batch of a worker."""
    engine: Literal["auto", "horovod", "torch"] = "auto"
    """Whose workers these are: Horovod's (horovodrun) or torch.distributed's (torchrun); auto: by the environment."""
    threads: int | None = None
    """CPU threads a worker computes with; null: OMP_NUM_THREADS, else its share of the cores that may be used."""
    output: str = "measure"
    """Writes OUTPUT.json and OUTPUT.png."""

    def __post_init__(self) -> None:
        for name in ("trials", "samples", "images", "batch_size"):
            if getattr(self, name) < (2 if name == "samples" else 1):
                raise ValueError(f"{name} must be at least {2 if name == 'samples' else 1}, got {getattr(self, name)}")
        _require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
        if self.images < self.samples:
            raise ValueError(f"images must be at least samples, got {self.images} and {self.samples}")


@dataclass(frozen=True)
class ReportSettings:
    """Where a report is written."""

    output: str = "report"
    """Writes OUTPUT.html and OUTPUT.png."""
