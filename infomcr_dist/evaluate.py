"""What a trained model is worth: errors over a split and the metric γ̂, the same at any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from infomcr_dist.config import MetricSettings
from infomcr_dist.curvature import Estimate, Spectrum, estimate, robustness, spectrum
from infomcr_dist.functional import Criterion, functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.world import UserError, World
from pipelines import Batch, Loader, LocalBatch, Split, evaluation_batches
from pipelines.random_streams import Stream, generator, permutation

_ROBUSTNESS_BATCH = 50
Poll = Callable[[], None]
"""What every worker calls after each of its batches, as often as the others; what it raises ends the evaluation."""


def _no_poll() -> None:
    pass


@dataclass(frozen=True)
class Errors:
    """Mean cross entropy (nats) and top-1, top-5 error (0 to 1) over ``samples`` images."""

    loss: float
    top1_error_ratio: float
    top5_error_ratio: float
    samples: int


def evaluate(
    model: nn.Module,
    loader: Loader,
    split: Split,
    batch_size: int,
    world: World,
    poll: Poll = _no_poll,
    *,
    bf16: bool = False,
) -> Errors:
    """Errors over the whole split, every image counted once; every worker takes its share and gets the result.

    With ``bf16`` the network runs under autocast to bfloat16, as in training; the loss is taken in float64. The sums
    stay on the device until the last batch.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    rounds = -(-len(split) // (batch_size * world.size))
    batches = evaluation_batches(len(split), batch_size, world.rank, world.size)
    with evaluating(model), torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
        for _, images, labels in _in_rounds(_read(loader, batches, world), rounds, poll):
            if len(labels):
                totals += _count(model(images), labels)
    loss, top1, top5, samples = world.sum(totals.tolist())
    return Errors(loss / samples, top1 / samples, top5 / samples, int(samples))


def recompute_statistics(
    model: nn.Module,
    loader: Loader,
    split: Split,
    images: int,
    batch_size: int,
    seed: int,
    world: World,
    poll: Poll = _no_poll,
    *,
    bf16: bool = False,
) -> None:
    """BatchNorm's running statistics anew, as means over whole batches of images of a split, drawn with the seed.

    As `torch.optim.swa_utils.update_bn`, but that other layers are as in evaluation. The workers share the batches out,
    so that the statistics are the same at any number of workers, up to rounding; other buffers are averaged over them.
    Layers that stay in eval mode, as those of frozen parts, keep theirs.
    """
    training = model.training
    modules = list(model.train().modules())
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    model.train(training)
    pool = permutation(Stream.AVERAGE_STATISTICS, len(split), seed)[:images]
    count = max(1, len(pool) // batch_size) if norms else 0

    def batch(number: int) -> LocalBatch:
        samples = pool[number * batch_size : (number + 1) * batch_size]
        return LocalBatch(0, number, samples, np.arange(len(samples)), len(samples))

    own = range(world.rank, count, world.size)
    momenta = [norm.momentum for norm in norms]
    with evaluating(model), torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
        for norm in norms:
            norm.reset_running_stats()
            norm.train().momentum = None  # which is the mean
        for _, pixels, _ in _in_rounds(_read(loader, map(batch, own), world), -(-count // world.size), poll):
            model(pixels)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistics in (norm.running_mean, norm.running_var):
            assert statistics is not None
            statistics.mul_(len(own) * world.size / count)  # so that the mean over the workers is that over the batches
    world.average_buffers(model)


@dataclass(frozen=True)
class Curvature:
    """Means over the trials of what their Gram matrices give (Jia & Su 2020, Sec. 5.3 and 7.1)."""

    gamma_hat: Estimate
    frobenius: Estimate
    spectral_radius: Estimate
    trace: Estimate


def estimate_curvature(
    model: nn.Module,
    loader: Loader,
    split: Split,
    settings: MetricSettings,
    seed: int,
    world: World,
    criterion: Criterion = F.cross_entropy,
    poll: Poll = _no_poll,
) -> Curvature:
    """γ̂ (Eq. 6) and its companions on un-augmented training images, the same at any number of workers.

    Trial t draws its N' = ``settings.samples`` images without replacement by (seed, t) alone, out of the first
    ``settings.images`` of a shuffle by the seed. The workers share the trials out; one number set a trial travels.
    """
    pool = permutation(Stream.METRIC_POOL, len(split), seed)[: settings.images]
    samples = min(settings.samples, len(pool))
    trials = (_trial_batch(trial, pool, samples, seed) for trial in range(world.rank, settings.trials, world.size))
    rounds = -(-settings.trials // world.size)
    with evaluating(model), torch.enable_grad():
        loss_fn = functional_loss(model, criterion)
        params = trainable_parameters(model)
        own = [
            astuple(spectrum(gradient_gram(loss_fn, params, (images, labels))))
            for _, images, labels in _in_rounds(_read(loader, trials, world), rounds, poll)
        ]
    by_rank = world.gather(own)
    spectra = [Spectrum(*by_rank[trial % world.size][trial // world.size]) for trial in range(settings.trials)]
    return Curvature(
        gamma_hat=estimate([s.log_determinant for s in spectra], min(s.smallest_eigenvalue for s in spectra)),
        frobenius=estimate([s.frobenius for s in spectra]),
        spectral_radius=estimate([s.spectral_radius for s in spectra]),
        trace=estimate([s.trace for s in spectra]),
    )


def estimate_robustness(
    model: nn.Module, loader: Loader, split: Split, images: int, seed: int, world: World
) -> Estimate:
    """Mean over so many training images of ‖J_x[f_w(x)]‖₂² (Sec. 7.1), each image taken once over all workers."""
    pool = permutation(Stream.METRIC_POOL, len(split), seed)[:images]
    batches = (
        replace(batch, samples=pool[batch.samples])
        for batch in evaluation_batches(len(pool), _ROBUSTNESS_BATCH, world.rank, world.size)
    )
    own = [value for _, images, _ in _read(loader, batches, world) for value in robustness(model, images).tolist()]
    return estimate([value for values in world.gather(own) for value in values])


def _read(loader: Loader, local_batches: Iterable[LocalBatch], world: World) -> Iterator[Batch]:
    """The loader's batches, each of them progress of this worker; UserError if a sample cannot be read."""
    try:
        for batch in loader.batches(local_batches):
            world.progress += 1
            yield batch
    except ValueError as error:
        raise UserError(f"data: {error}") from error


def _in_rounds(batches: Iterator[Batch], rounds: int, poll: Poll) -> Iterator[Batch]:
    """The batches, with ``poll`` called after each round, also in those for which this worker has no batch."""
    for _ in range(rounds):
        batch = next(batches, None)
        if batch is not None:
            yield batch
        poll()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss, top-1 misses, top-5 misses, images; float64 (4,) on the device."""
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([loss, (~best[:, 0]).sum(), (~best.any(dim=1)).sum(), loss.new_full((), len(labels))])


def _trial_batch(trial: int, pool: np.ndarray, samples: int, seed: int) -> LocalBatch:
    chosen = generator(Stream.METRIC_TRIAL, seed, trial).choice(len(pool), samples, replace=False)
    positions = np.arange(samples, dtype=np.int64)
    return LocalBatch(
        epoch=0, step=trial, samples=pool[chosen].astype(np.int64), positions=positions, global_size=samples
    )
