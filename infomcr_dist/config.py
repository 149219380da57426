"""The configuration of a run: one tree of frozen dataclasses (options.py fills it).

Every field is documented where it is declared; what can be checked without data is checked on construction, and raises
ValueError naming the setting, its value and what would be right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _require(condition: bool, setting: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{setting} must be {rule}, got {value}")


@dataclass(frozen=True)
class DataSettings:
    """What is read, and how a global batch is made of it."""

    path: str = "fashion-mnist"
    """Directory that ``pipelines.prepare`` made; ``fashion-mnist`` is ./data/fashion-mnist, prepared on first use."""
    backend: Literal["dali", "torch", "webdataset", "synthetic"] = "dali"
    """What decodes and augments the training batches; webdataset streams, so evaluation reads with torch there."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a sample that cannot be read or decoded: end the run, or take the next one and count it."""
    mixing: Literal["full", "window"] = "full"
    """An epoch's order: a permutation of all samples, or of shards, a window of them at a time, for slow disks."""
    augmentation: str = "crop4_flip"
    """none, flip, crop1_flip, crop4_flip or random_resized_crop, of the training batches."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    image_size: int | None = None
    """Side of the square images the model gets, pixels; null: the side they are stored at."""
    batch_size: int | None = None
    """Images a worker a step; null where global_batch_size is given."""
    global_batch_size: int | None = None
    """Images a step over all workers, split evenly; null where batch_size is given."""
    remainder: Literal["keep", "drop"] = "keep"
    """An epoch's last, smaller global batch: keep it, or drop it."""
    train_images: int | None = None
    """Train on so many of the training images, drawn by the seed; null: on all."""
    confusion_images: int = 0
    """Train on so many more of the training images with labels drawn at random, both by the seed (Scenario I): errors
    count them, metrics do not."""
    holdout_images: int = 0
    """Keep so many training images out, drawn by the seed, and evaluate on them in place of the test images."""
    max_batch_size: int | None = None
    """Images a worker takes through the network at once, if its share of a step is larger and would not fit: the
    gradients of the pieces are accumulated. null: all of its share."""
    threads: int = 1
    """Decoding threads a worker."""
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
        parts = ("train_images", "confusion_images", "holdout_images")
        if self.backend == "webdataset" and any(getattr(self, name) for name in parts):
            got = ", ".join(f"{name}={getattr(self, name)}" for name in parts)
            raise ValueError(
                "data.backend=webdataset streams whole shards, it cannot leave images out or label them anew, "
                f"got {got}: use dali or torch"
            )
        for name in ("confusion_images", "holdout_images"):
            _require(getattr(self, name) >= 0, f"data.{name}", "at least 0", getattr(self, name))
        if self.confusion_images and self.train_images is None:
            raise ValueError(
                "data.confusion_images are beside data.train_images, "
                f"got {self.confusion_images} and null: give a number of both"
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """Stochastic gradient descent with momentum."""

    learning_rate: float = 0.1
    """Peak rate at a global batch of reference_batch_size images."""
    reference_batch_size: int | None = None
    """Scale the rate linearly with the global batch from here (Goyal et al. 2017); null: take it as it is."""
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    """Of the outer loss only: it never enters a sub-batch gradient."""
    decay_norm_and_bias: bool = True
    """Whether weight decay applies to normalization layers and biases as well."""
    clip_gradient_norm: float | None = None
    """Largest 2-norm of the averaged, regularized gradient; null: no clipping."""
    label_smoothing: float = 0.0

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
    warmup_epochs: float = 0.0
    """Epochs over which the rate first rises linearly to its peak."""
    milestones: tuple[float, ...] = ()
    """For milestones: epochs at which the rate is multiplied by factor."""
    factor: float = 0.1
    """For milestones and plateau: what a drop multiplies the rate by."""
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
    """after_drop: from the first drop of the learning rate on (Sec. 7.2.1); from_epoch: from the epoch ``epoch`` on."""
    epoch: float | None = None
    ramp: Literal["linear", "cosine", "steps"] = "linear"
    """How β rises after the switch-on: along a line, half a cosine, or in ramp_steps equal steps."""
    ramp_epochs: float = 0.0
    """Epochs the rise takes; 0: β is constant."""
    ramp_steps: int = 4
    alpha: float = 1e-4
    """Length of the probing step w − αg; part of the strength (the gradient is βαHg)."""
    beta: float = 10.0
    """Weight of the penalty."""
    sub_batches: int | None = None
    """Sub-batches a worker's batch is split into (M); null where sub_batch_size is given."""
    sub_batch_size: int | None = None
    """Images a sub-batch: sets the strength whatever the number of workers (16 in the paper)."""
    way: Literal["fused", "sampled", "reference"] = "fused"
    sampled: int | None = None
    """For the sampled way: how many sub-batches a step are penalised (k); null where budget is given."""
    budget: float | None = None
    """For the sampled way: penalise as many sub-batches as make a step take so many times a plain one."""
    derivative: Literal["auto", "finite_difference", "exact"] = "auto"
    """The paper's g − h, or its limit αHg; auto: exact in mixed precision, where the difference would be noise."""
    health_every_steps: int = 0
    """Steps between comparisons of the two derivatives on one sub-batch (penalty_health); 0: none."""

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
        if (self.sampled is not None) + (self.budget is not None) != (self.way == "sampled"):
            raise ValueError(
                "regularizer: one of sampled and budget goes with way=sampled, and only with it, "
                f"got way={self.way}, sampled={self.sampled} and budget={self.budget}"
            )
        _require(self.budget is None or self.budget > 1, "regularizer.budget", "above 1", self.budget)
        _require(self.ramp_steps >= 1, "regularizer.ramp_steps", "at least 1", self.ramp_steps)
        _require(self.health_every_steps >= 0, "regularizer.health_every_steps", "at least 0", self.health_every_steps)
        for name in ("sub_batches", "sub_batch_size", "sampled"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"regularizer.{name}", "at least 1", value)
        _require(self.alpha > 0, "regularizer.alpha", "positive", self.alpha)
        _require(self.beta >= 0, "regularizer.beta", "at least 0", self.beta)
        _require(self.ramp_epochs >= 0, "regularizer.ramp_epochs", "at least 0", self.ramp_epochs)
        _require(self.epoch is None or self.epoch >= 0, "regularizer.epoch", "at least 0", self.epoch)


@dataclass(frozen=True)
class EvaluationSettings:
    """Top-1 and top-5 error on the test images and on the un-augmented training images."""

    every_epochs: int = 1
    """Epochs between evaluations on the test images; 0: at the end only."""
    train_every_epochs: int = 0
    """Epochs between evaluations on the training images; 0: at the end only."""
    transform: Literal["none", "center_crop"] = "none"
    """What evaluation and the metric see: the whole image, or its central 7/8, resized to data.image_size."""
    batch_size: int = 250
    """Images a worker evaluates at once."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "train_every_epochs"):
            _require(getattr(self, name) >= 0, f"evaluation.{name}", "at least 0", getattr(self, name))
        _require(self.batch_size >= 1, "evaluation.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class MetricSettings:
    """The metric γ̂ (Jia & Su 2020, Eq. 6), on un-augmented training images."""

    every_epochs: int | None = None
    """Epochs between estimates; 0: at the end only; null: as often as ``share`` allows."""
    share: float = 0.02
    """Largest share of the run's time that goes to estimates before the end, where every_epochs is null."""
    trials: int = 100
    """Trials averaged (T); 0: no metric."""
    samples: int = 100
    """Training images a trial (N')."""
    images: int = 10_000
    """The trials' images are drawn from the first so many training images of a fixed shuffle."""

    def __post_init__(self) -> None:
        every = self.every_epochs
        _require(every is None or every >= 0, "metric.every_epochs", "at least 0, or null", every)
        _require(0 < self.share < 1, "metric.share", "between 0 and 1", self.share)
        _require(self.trials >= 0, "metric.trials", "at least 0", self.trials)
        _require(self.samples >= 2, "metric.samples", "at least 2", self.samples)
        _require(self.images >= self.samples, "metric.images", "at least metric.samples", self.images)


@dataclass(frozen=True)
class CheckpointSettings:
    """What is saved, beside the step at which a run is stopped."""

    every_epochs: int = 1
    """Epochs between checkpoints; the last epoch's is always written."""
    every_steps: int | None = None
    """Steps between checkpoints within an epoch; null: none."""
    keep: int = 2
    """Checkpoints kept, newest first; the one with the lowest error on the evaluated images is kept as well."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "checkpoint.every_epochs", "at least 1", self.every_epochs)
        steps = self.every_steps
        _require(steps is None or steps >= 1, "checkpoint.every_steps", "at least 1, or null", steps)
        _require(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)


@dataclass(frozen=True)
class TelemetrySettings:
    port: int | None = 9500
    """Prometheus endpoint of local rank 0; every further local rank takes the next port. null: no endpoint."""
    address: str = "127.0.0.1"
    """Address the endpoint binds to; 0.0.0.0 lets other machines scrape it."""
    pushgateway: str | None = None
    """HOST:PORT of a Pushgateway that gets rank 0's metrics when the run ends; null: none."""

    def __post_init__(self) -> None:
        valid = self.port is None or 1 <= self.port <= 65535
        _require(valid, "telemetry.port", "between 1 and 65535, or null", self.port)
        if self.pushgateway is not None and ("@" in self.pushgateway or "://" in self.pushgateway):
            raise ValueError("telemetry.pushgateway must be HOST:PORT, without a scheme, a user or a password")


@dataclass(frozen=True)
class Config:
    """A run."""

    model: str = "resnet20"
    """A network of infomcr_dist.models, or an import path package.module:function."""
    epochs: int = 10
    seed: int = 0
    """Of the weights, the order of the samples, the augmentation and the metric's trials."""
    run_dir: str | None = None
    """Where the run's files go; null: runs/RECIPE-TIME."""
    resume: str | None = None
    """A run directory or a checkpoint to go on from; auto: go on from run_dir if it holds a checkpoint."""
    resume_changed: bool = False
    """Go on even where settings or data are not those of the checkpoint; the differences are named."""
    nonfinite_steps: int = 10
    """Steps in a row with a non-finite loss or gradient, each left out on every worker, after which the run ends."""
    compare_weights_steps: int = 1000
    """Steps between comparisons of the workers' weights, which must be equal to the bit; 0: at epochs' ends only."""
    stop_seconds: float = 25.0
    """Seconds from the signal to stop to the end of a worker, saved or not; below the grace period of who sends it."""
    hang_seconds: float | None = 120.0
    """Seconds after which a worker that stands still, or a silent network, ends the job; null: never."""
    pid_dir: str | None = None
    """Directory for a file rank-LOCAL_RANK.pid of each worker of a host, for who has to signal them; null: none."""
    threads: int | None = None
    """Threads a worker computes with on the CPU; null: the machine's cores, shared by the workers on it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the training passes; bf16: autocast, with weights and their update in fp32."""
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
        _require(self.nonfinite_steps >= 1, "nonfinite_steps", "at least 1", self.nonfinite_steps)
        _require(self.compare_weights_steps >= 0, "compare_weights_steps", "at least 0", self.compare_weights_steps)
        _require(self.stop_seconds > 0, "stop_seconds", "positive", self.stop_seconds)
        hang = self.hang_seconds
        _require(hang is None or hang >= 2, "hang_seconds", "at least 2, or null", hang)
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
                f"resume={self.resume} cannot go on exactly with data.backend=webdataset, whose order is not kept: "
                "use dali or torch"
            )
        if self.resume == "auto" and self.run_dir is None:
            raise ValueError("resume=auto looks for checkpoints in run_dir, got run_dir=null: give run_dir=DIRECTORY")


@dataclass(frozen=True)
class MeasureSettings:
    """What infomcr_dist.measure measures of checkpoints, and on what."""

    data: str | None = None
    """Data set directory; null: the one each model was trained on."""
    model: str | None = None
    """Import path of a network that is not ours, package.module:function; a checkpoint alone has no code imported."""
    trials: int = 100
    """Trials averaged (T)."""
    samples: int = 100
    """Training images a trial (N')."""
    images: int = 10_000
    """Training images the trials are drawn from, and robustness is averaged over."""
    logit_scale: float | None = None
    """Scale each image's logits to logits / (‖logits‖₂ · logit_scale) first, to compare models of unequal training loss
    (Table 3; 0.04 there); null: leave them."""
    log_volume: float | None = None
    """ln V of the neighbourhood in Theorem 1; null: that of a ball of a hundredth of the weights' norm."""
    delta: float = 0.05
    """Theorem 1 holds with probability 1 − delta."""
    seed: int = 0
    batch_size: int = 250
    """Images a worker evaluates at once."""
    threads: int | None = None
    """Threads a worker computes with on the CPU; null: the machine's cores, shared by the workers on it."""
    output: str = "measure"
    """Writes OUTPUT.json and OUTPUT.png."""

    def __post_init__(self) -> None:
        for name in ("trials", "samples", "images", "batch_size"):
            if getattr(self, name) < (2 if name == "samples" else 1):
                raise ValueError(f"{name} must be at least {2 if name == 'samples' else 1}, got {getattr(self, name)}")
        _require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
        if self.images < self.samples:
            raise ValueError(f"images must be at least samples, got {self.images} and {self.samples}")
