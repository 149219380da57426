"""The settings of what updates the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from infomcr_dist.config.checks import plain, require


@dataclass(frozen=True)
class OptimizerSettings:
    """What updates the weights from the gradient."""

    kind: str = "sgd"
    """An optimizer of torch.optim in lower case (sgd, adamw, rmsprop, …), or an import path package.module:Class."""
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of its class, such as {betas: [0.9, 0.95]} of adamw; null: its default."""
    learning_rate: float = 0.1
    """Peak learning rate, at a global batch of reference_batch_size images."""
    reference_batch_size: int | None = None
    """Global batch size from which the rate is scaled linearly (Goyal et al. 2017); null: no scaling."""
    momentum: float = 0.9
    """For sgd: momentum coefficient."""
    nesterov: bool = True
    """For sgd: whether momentum is Nesterov's."""
    weight_decay: float = 1e-4
    """Coefficient of weight decay, of the outer loss only: it never enters a sub-batch gradient."""
    decay_norm_and_bias: bool = True
    """Whether weight decay applies to normalization layers and biases as well."""
    clip_gradient_norm: float | None = None
    """Largest 2-norm of the averaged, regularized gradient; null: no clipping."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate", "positive", self.learning_rate)
        require(0 <= self.momentum < 1, "optimizer.momentum", "in [0, 1)", self.momentum)
        require(self.weight_decay >= 0, "optimizer.weight_decay", "at least 0", self.weight_decay)
        require(0 <= self.label_smoothing < 1, "optimizer.label_smoothing", "in [0, 1)", self.label_smoothing)
        for name in ("reference_batch_size", "clip_gradient_norm"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optimizer.{name}", "positive", value)
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov needs momentum, got optimizer.momentum=0.0: set nesterov=false")
        if self.kind != "sgd" and (self.momentum, self.nesterov) != (0.9, True):
            raise ValueError(
                f"optimizer.momentum and optimizer.nesterov are for optimizer.kind=sgd, got kind={self.kind}, "
                f"momentum={self.momentum} and nesterov={self.nesterov}: give {self.kind}'s own in optimizer.arguments"
            )
        arguments = {name: plain(value) for name, value in self.arguments.items()}
        object.__setattr__(self, "arguments", {name: v for name, v in arguments.items() if v is not None})


@dataclass(frozen=True)
class AveragingSettings:
    """An average of the weights over the run, evaluated and measured beside the weights themselves."""

    kind: Literal["none", "ema", "swa"] = "none"
    """ema: exponential moving average over the steps; swa: mean over the ends of epochs (Izmailov et al. 2018)."""
    decay: float = 0.999
    """For ema: what a step leaves of the average before it."""
    start_epoch: int = 0
    """Epochs before the first weights that are averaged."""
    statistics_images: int = 10_000
    """Training images as they are, drawn with the seed, from which BatchNorm's statistics of the average are taken."""

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "averaging.decay", "in [0, 1)", self.decay)
        require(self.start_epoch >= 0, "averaging.start_epoch", "at least 0", self.start_epoch)
        require(self.statistics_images >= 2, "averaging.statistics_images", "at least 2", self.statistics_images)


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
        require(self.warmup_epochs >= 0, "schedule.warmup_epochs", "at least 0", self.warmup_epochs)
        require(0 < self.factor < 1, "schedule.factor", "between 0 and 1", self.factor)
        require(self.patience >= 1, "schedule.patience", "at least 1", self.patience)
        require(0 <= self.threshold < 1, "schedule.threshold", "in [0, 1)", self.threshold)
        increasing = list(self.milestones) == sorted(set(self.milestones))
        require(increasing, "schedule.milestones", "increasing", list(self.milestones))
        if self.milestones and self.milestones[0] <= self.warmup_epochs:
            raise ValueError(
                "schedule.milestones must come after the warm-up, "
                f"got {list(self.milestones)} and warmup_epochs={self.warmup_epochs}"
            )


@dataclass(frozen=True)
class RegularizerSettings:
    """The penalty βR on the divergence of sub-batch gradients (Jia & Su 2020, Algorithm 1), or on the loss nearby."""

    method: Literal["infomcr", "sam", "asam", "gradient_norm"] = "infomcr"
    """infomcr: the paper's; sam (Foret et al. 2021), asam (Kwon et al. 2021), gradient_norm (Zhao et al. 2022): the
    loss at a distance rho from the weights, of each sub-batch."""
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
    """For infomcr: length α of the probing step w − αg; part of the strength (the penalty's gradient is βαHg)."""
    beta: float = 10.0
    """For infomcr and gradient_norm: weight β of the penalty; for gradient_norm from 0 to 1, where it is SAM. For sam
    and asam the weight is 1."""
    rho: float = 0.05
    """For sam, asam and gradient_norm: the distance ρ; asam's is about ten times sam's (Kwon et al. 2021)."""
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
    """For infomcr: the paper's g − h, or its limit αHg; auto: the difference, unless it would be noise."""
    step: float | Literal["alpha", "auto"] = "auto"
    """For infomcr: length of the difference's step. alpha: the paper's, in float32; a number: relative to the length of
    the weights, in the run's precision, uphill if negative; auto: 0.003 in tf32 and bf16, else alpha."""
    finite_difference_error_every_steps: int = 0
    """For infomcr: steps between comparisons of the two derivatives on one sub-batch; 0: none."""

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
        require(budget is None or budget > 1, "regularizer.overhead_budget", "above 1", budget)
        require(self.ramp_steps >= 1, "regularizer.ramp_steps", "at least 1", self.ramp_steps)
        require(every >= 0, "regularizer.finite_difference_error_every_steps", "at least 0", every)
        for name in ("sub_batches", "sub_batch_size", "num_sampled"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"regularizer.{name}", "at least 1", value)
        require(self.alpha > 0, "regularizer.alpha", "positive", self.alpha)
        relative = self.step if not isinstance(self.step, str) else None
        require(
            relative is None or 0 < abs(relative) < 1,
            "regularizer.step",
            "alpha, auto or between -1 and 1, and not 0",
            self.step,
        )
        if relative is not None and self.derivative == "exact":
            raise ValueError(f"regularizer.derivative=exact takes no regularizer.step, got step={relative}")
        require(self.beta >= 0, "regularizer.beta", "at least 0", self.beta)
        require(self.ramp_epochs >= 0, "regularizer.ramp_epochs", "at least 0", self.ramp_epochs)
        require(self.epoch is None or self.epoch >= 0, "regularizer.epoch", "at least 0", self.epoch)
        require(self.rho > 0, "regularizer.rho", "positive", self.rho)
        if self.method != "infomcr":
            self._check_other_method()

    def _check_other_method(self) -> None:
        for name, only in (
            ("estimator", ("fused", "sampled")),
            ("derivative", ("auto", "finite_difference")),
            ("step", ("auto",)),
            ("finite_difference_error_every_steps", (0,)),
        ):
            value = getattr(self, name)
            if value not in only:
                raise ValueError(
                    f"regularizer.{name} must be {' or '.join(map(str, only))} for regularizer.method={self.method}, "
                    f"got {value}"
                )
        if self.method == "gradient_norm":
            require(self.beta <= 1, "regularizer.beta", "at most 1 for regularizer.method=gradient_norm", self.beta)

    @property
    def weight(self) -> float:
        """β of the method."""
        return 1.0 if self.method in ("sam", "asam") else self.beta

    @property
    def radius(self) -> float | None:
        """ρ of the method; None for infomcr."""
        return None if self.method == "infomcr" else self.rho
