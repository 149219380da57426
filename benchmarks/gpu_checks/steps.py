"""The time of a step by every way of taking it, and of a Gram matrix.

A new way of stepping is one more entry in `ways`.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from gpu_checks import Context, Row, host_synchronizations, spread
from gpu_checks.card import copy_bytes_per_second, matmul_flop_per_second
from gpu_checks.prototype import ALPHA, BETA, Case, Prototype, captured
from gpu_checks.timing import interleaved, kernels
from infomcr_dist.checks import Derivative
from infomcr_dist.config import OptimizerSettings
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.regularizer import Estimator
from infomcr_dist.step import PenaltySettings, build_optimizer, train_step
from infomcr_dist.world import SingleProcess

Call = Callable[[], object]
_ROUNDS = 9
_EAGER = "plain, eager, bf16"
_TRAFFIC = 5
"""How often a byte that the forward pass saves is moved at least: written, read by the next layer and by the backward
pass, and its gradient written and read."""


@dataclass(frozen=True)
class Way:
    """A way of taking a step: `build` makes the call that is timed."""

    build: Callable[[], Call]
    alike: str = ""
    """The plain step that is optimised as much; empty: this is one"""
    passes: float = 1.0
    """Forward-backward passes over the batch that it needs at least"""
    optimised: bool = False
    """Whether the goals are meant for it"""


def today(
    case: Case,
    device: str,
    bf16: bool,
    estimator: Estimator | None = None,
    derivative: Derivative = "exact",
    fraction: float = 1.0,
) -> Call:
    """The trainer's step as it is by default."""
    world = SingleProcess()
    model = case.network(device)
    optimizer = build_optimizer(OptimizerSettings(learning_rate=1e-4), model)
    penalty = None
    if estimator is not None:
        sub_batches = case.batch_size // case.sub_batch_size
        penalty = PenaltySettings(
            alpha=ALPHA,
            beta=BETA,
            sub_batch_size=case.sub_batch_size,
            estimator=estimator,
            num_sampled=max(1, round(fraction * sub_batches)) if estimator == "sampled" else None,
            derivative=derivative,
        )
    batch = case.batch(device)
    criterion = nn.CrossEntropyLoss()
    return lambda: train_step(model, criterion, optimizer, world, batch, loss_scale=1.0, penalty=penalty, bf16=bf16)


def prototype(step: Prototype, fraction: float | None = None, streams: int | None = None) -> Call:
    """A step of the prototype: plain, or regularized over a fraction of the sub-batches; a graph on so many streams."""
    case = step.case
    if fraction is None:
        call: Call = step.plain
    else:
        count = max(1, round(fraction * case.batch_size / case.sub_batch_size))
        parallel = [torch.cuda.Stream() for _ in range(streams)] if streams is not None and streams > 1 else []
        call = partial(step.regularized, parallel, count)
    return call if streams is None else captured(call)


def ways(case: Case, device: str) -> dict[str, Way]:
    """Every way of taking a step, by its name in the table."""
    found = {
        _EAGER: Way(lambda: today(case, device, True)),
        "plain, eager, fp32": Way(lambda: today(case, device, False)),
        "fused, eager, fp32": Way(
            lambda: today(case, device, False, "fused", "finite_difference"), "plain, eager, fp32", 2
        ),
        "fused, eager, bf16, exact": Way(lambda: today(case, device, True, "fused"), _EAGER, 2),
        "sampled ¼, eager, bf16, exact": Way(lambda: today(case, device, True, "sampled", fraction=0.25), _EAGER, 1.25),
    }
    return found | prototype_ways(cache(lambda: Prototype(case, device)), "prototype", device)


def compiled_ways(case: Case, device: str) -> dict[str, Way]:
    """With compiled passes."""
    found = {_EAGER: Way(lambda: today(case, device, True))}
    return found | prototype_ways(cache(lambda: Prototype(case, device, compiled=True)), "prototype, compiled", device)


def prototype_ways(step: Callable[[], Prototype], name: str, device: str) -> dict[str, Way]:
    """Those of the prototype, which `step` gives."""
    plain, graph = f"plain, {name}, eager", f"plain, {name}, graph"
    found = {
        plain: Way(lambda: prototype(step())),
        f"fused, {name}, eager": Way(lambda: prototype(step(), 1.0), plain, 2),
    }
    if device == "cuda":
        found |= {
            graph: Way(lambda: prototype(step(), streams=1)),
            f"fused, {name}, graph": Way(lambda: prototype(step(), 1.0, 1), graph, 2, True),
            f"fused, {name}, graph, 4 streams": Way(lambda: prototype(step(), 1.0, 4), graph, 2, True),
            f"fused, {name}, graph, 8 streams": Way(lambda: prototype(step(), 1.0, 8), graph, 2, True),
            f"sampled ¼, {name}, graph, 4 streams": Way(lambda: prototype(step(), 0.25, 4), graph, 1.25, True),
        }
    return found


def resnet20(context: Context) -> Iterator[Row]:
    """ResNet-20 at 32 × 32."""
    size, batch, sub = (8, 8, 4) if context.tiny else (32, 128, 16)
    yield from compare(Case("resnet20", size, 10, batch, sub), context, ways)


def wrn_64(context: Context) -> Iterator[Row]:
    """WRN-18-1.5, 64 images."""
    yield from wide(context, 64, ways)


def wrn_128(context: Context) -> Iterator[Row]:
    """WRN-18-1.5, 128 images."""
    yield from wide(context, 128, ways)


def wrn_256(context: Context) -> Iterator[Row]:
    """WRN-18-1.5, 256 images."""
    yield from wide(context, 256, ways)


def compiled(context: Context) -> Iterator[Row]:
    """WRN-18-1.5, 256 images, with compiled passes."""
    yield from wide(context, 256, compiled_ways)


def wide(context: Context, batch_size: int, ways: Callable[[Case, str], dict[str, Way]]) -> Iterator[Row]:
    """WRN-18-1.5 at 128 × 128; tiny: a small network in its place."""
    case = Case("resnet20", 8, 10, 8, 4) if context.tiny else Case("wrn_18_1_5", 128, 1000, batch_size)
    yield from compare(case, context, ways)


def compare(case: Case, context: Context, ways: Callable[[Case, str], dict[str, Way]]) -> Iterator[Row]:
    """Every way, interleaved; one that cannot be built or run costs its own row."""
    device = context.device
    what = f"{case.model}, {case.batch_size} images at {case.image_size}×{case.image_size}"
    known, calls, failed = ways(case, device), {}, {}
    began = time.monotonic()
    counted: dict[str, tuple[int, int | None]] = {}
    limit_ms, explained = limit(case, context)
    yield Row(f"{what}: limit, plain", explained, figures={"ms": limit_ms})
    for name, way in known.items():
        if time.monotonic() - began > 0.6 * context.seconds:
            failed[name] = "skipped: no time is left"
            continue
        try:
            call = way.build()
            call()
            counted[name] = kernels(call, device), host_synchronizations(device, call)
            calls[name] = call
        except Exception as error:  # no way costs another one its row
            failed[name] = f"{type(error).__name__}: {error}"
    seconds = interleaved(calls, 1 if context.tiny else _ROUNDS, device, began + 0.8 * context.seconds)
    for name, way in known.items():
        if name in failed:
            yield Row(f"{what}: {name}", failed[name])
            continue
        figures: dict[str, object] = {"ms": [1000 * value for value in seconds[name]]}
        texts = [f"{spread([1000 * value for value in seconds[name]])} ms"]
        texts.append(f"{case.batch_size / statistics.median(seconds[name]):,.0f} images/s".replace(",", " "))
        ratios: dict[str, float] = {}
        for label, other in (("eager plain", _EAGER), ("alike plain", way.alike)):
            if other in seconds and other != name:
                values = [one / base for one, base in zip(seconds[name], seconds[other], strict=True)]
                texts.append(f"{spread(values)} × {label}")
                figures[label], ratios[label] = values, statistics.median(values)
        texts.append(f"{statistics.median(seconds[name]) * 1000 / (way.passes * limit_ms):.1f} × its limit")
        launched, waits = counted[name]
        texts.append(f"{launched} {'kernels' if device == 'cuda' else 'operations'}")
        if waits is not None:
            texts.append(f"{waits} host synchronisations")
        figures |= {"kernels": launched, "host_synchronizations": waits}
        yield Row(f"{what}: {name}", ", ".join(texts), *goal(case, name, way, ratios), figures)


def goal(case: Case, name: str, way: Way, ratios: dict[str, float]) -> tuple[str, bool | None]:
    """What a way should reach, and whether it does."""
    if not way.optimised or case.model != "wrn_18_1_5" or case.batch_size < 128:
        return "", None
    if name.startswith("sampled"):
        return "≤ 1.4 × alike plain", ratios.get("alike plain", 9.0) <= 1.4
    reached = ratios.get("alike plain", 9.0) <= 2.4 and ratios.get("eager plain", 9.0) <= 2.2
    return "≤ 2.4 × alike plain, ≤ 2.2 × eager plain", reached


def limit(case: Case, context: Context) -> tuple[float, str]:
    """Milliseconds that a plain step in bf16 takes at least on this card, and how they are made up."""
    device, saved = context.device, 0
    model, (images, labels) = case.network(device), case.batch(device)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        if tensor.data_ptr() not in pointers | seen:
            seen.add(tensor.data_ptr())
            saved += tensor.nbytes
        return tensor

    with FlopCounterMode(display=False) as counter:
        with (
            torch.autocast(device, torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            loss = cross_entropy(model(images), labels)
        loss.backward()
    products = 1000 * counter.get_total_flops() / matmul_flop_per_second(device, context.tiny)
    memory = 1000 * _TRAFFIC * saved / copy_bytes_per_second(device, context.tiny)
    found = f"{products:.2f} ms of products ({counter.get_total_flops() / 1e9:.0f} GFLOP)"
    return (
        products + memory,
        f"{found} + {memory:.2f} ms of memory ({saved / 1e6:.0f} MB saved, moved {_TRAFFIC} times)",
    )


def gamma(context: Context) -> Iterator[Row]:
    """The time of a Gram matrix of 100 samples beside a plain step of 128 images, and its error."""
    device, samples = context.device, 8 if context.tiny else 100
    cases = (
        [Case("resnet20", 8, 10, 8, 4)]
        if context.tiny
        else [
            Case("resnet20", 32, 10, 128),
            Case("wrn_18_1_5", 128, 1000, 128),
        ]
    )
    for case in cases:
        model = case.network(device).eval()
        loss_fn, params = functional_loss(model), {n: p.detach() for n, p in trainable_parameters(model).items()}
        images, labels = case.batch(device)
        batch = images[:samples], labels[:samples]
        calls: dict[str, Call] = {
            "plain": today(case, device, True),
            "gram": partial(gradient_gram, loss_fn, params, batch),
        }
        seconds = interleaved(calls, 1 if context.tiny else 5, device)
        ratios = [one / base for one, base in zip(seconds["gram"], seconds["plain"], strict=True)]
        waits = host_synchronizations(device, calls["gram"])
        found = f"{spread([1000 * value for value in seconds['gram']])} ms, {spread(ratios)} × plain step"
        found += "" if waits is None else f", {kernels(calls['gram'], device)} kernels, {waits} host synchronisations"
        reached = None if context.tiny else statistics.median(ratios) <= 3
        row = f"{case.model}: Gram matrix of {samples} samples"
        yield Row(row, found, f"≤ 3 × plain step of {case.batch_size} images", reached, {"x plain": ratios})
    case = cases[0]
    model = case.network("cpu").double().eval()
    images, labels = case.batch("cpu")
    exact = gradient_gram(
        functional_loss(model), {n: p.detach() for n, p in trainable_parameters(model).items()},
        (images[:samples].double(), labels[:samples]),
    )  # fmt: skip
    model = case.network(device).eval()
    images, labels = case.batch(device)
    found_gram = gradient_gram(
        functional_loss(model), {n: p.detach() for n, p in trainable_parameters(model).items()},
        (images[:samples], labels[:samples]),
    ).cpu()  # fmt: skip
    error = float((found_gram - exact).norm() / exact.norm())
    log_determinants = [float(torch.linalg.slogdet(gram).logabsdet) for gram in (found_gram, exact)]
    off = abs(log_determinants[0] - log_determinants[1])
    text = f"Gram matrix off by {error:.1e}, ln det ξ {log_determinants[0]:.4f} for {log_determinants[1]:.4f}"
    yield Row(f"{case.model}: γ̂ against float64", text, "ln det ξ within 0.1", off <= 0.1, {"error": error, "off": off})
