"""The time of a step by every way of taking it, and of a Gram matrix.

A new way of stepping is one more entry in `ways`.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from gpu_checks import Context, Row, host_synchronizations, spread
from gpu_checks.card import copy_bytes_per_second, matmul_flop_per_second
from gpu_checks.cases import ALPHA, BETA, Case, step
from gpu_checks.timing import interleaved, kernels
from infomcr_dist.estimators import Estimator
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.step import PenaltySettings

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


def penalty(case: Case, estimator: Estimator = "fused", fraction: float = 0.25, **how: Any) -> PenaltySettings:
    """How a step is regularized; `fraction` is for the sampled estimator."""
    sampled = max(1, round(fraction * case.sub_batches)) if estimator == "sampled" else None
    return PenaltySettings(ALPHA, BETA, case.sub_batch_size, estimator, sampled, **how)


def ways(case: Case, device: str) -> dict[str, Way]:
    """Every way of taking a step, by its name in the table."""
    eager32, graph = "plain, eager, fp32", "plain, graph, bf16"
    fused, sampled = penalty(case), penalty(case, "sampled")
    exact, paper = penalty(case, derivative="exact"), penalty(case, step="alpha")
    return {
        _EAGER: Way(partial(step, case, device, None)),
        eager32: Way(partial(step, case, device, None, bf16=False)),
        "fused, eager, fp32, step α": Way(partial(step, case, device, paper, bf16=False), eager32, 2),
        "fused, eager, bf16, exact": Way(partial(step, case, device, exact), _EAGER, 2),
        "fused, eager, bf16": Way(partial(step, case, device, fused), _EAGER, 2),
        "sampled ¼, eager, bf16": Way(partial(step, case, device, sampled), _EAGER, 1.25),
        graph: Way(partial(step, case, device, None, streams=1)),
        **{
            f"fused, graph, bf16, streams: {streams}": Way(
                partial(step, case, device, fused, streams=streams), graph, 2, True
            )
            for streams in (1, 4, 8)
        },
        "sampled ¼, graph, bf16, streams: 4": Way(partial(step, case, device, sampled, streams=4), graph, 1.25, True),
    }


def compiled_ways(case: Case, device: str) -> dict[str, Way]:
    """With compiled passes."""
    plain = "plain, compiled, graph, bf16"
    return {
        _EAGER: Way(partial(step, case, device, None)),
        plain: Way(partial(step, case, device, None, streams=1, compiled=True)),
        **{
            f"fused, compiled, graph, bf16, streams: {streams}": Way(
                partial(step, case, device, penalty(case), streams=streams, compiled=True), plain, 2, True
            )
            for streams in (4, 8)
        },
    }


def deterministic_ways(case: Case, device: str) -> dict[str, Way]:
    """Those that a run takes by default on a GPU, deterministically."""
    known = ways(case, device)
    names = (_EAGER, "plain, graph, bf16", "fused, graph, bf16, streams: 8")
    return {name: known[name] for name in names}


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


def deterministic(context: Context) -> Iterator[Row]:
    """WRN-18-1.5, 128 images, with deterministic algorithms alone."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield from wide(context, 128, deterministic_ways)


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
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
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
            "plain": step(case, device, None),
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
