"""g, h, αHg and every estimator against float64 on a CPU, in every precision; and the length of the step."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from gpu_checks import Context, Row
from gpu_checks.cases import ALPHA, BETA, RHO, Case, graphs_of
from infomcr_dist.checks import Derivative, Step
from infomcr_dist.estimators import Estimator
from infomcr_dist.first_order import Penalty
from infomcr_dist.functional import Params, functional_loss, gradient, moved, trainable_parameters
from infomcr_dist.regularizer import regularized_backward, sub_batch_penalty
from infomcr_dist.step import first_order_only

PRECISIONS = ("fp32", "TF32", "bf16", "fp16")
ESTIMATORS: tuple[Estimator, ...] = ("fused", "sampled", "reference")
SCHEMES: dict[str, tuple[Derivative, Step]] = {
    "g − h": ("finite_difference", "alpha"),
    "ρ": ("finite_difference", RHO),
    "exact": ("exact", "alpha"),
}
"""Derivative and step, by the name in the table"""
_BETA = 1000 * BETA
_LOSS_SCALE = 1024.0
"""For fp16, whose gradients would underflow."""


@dataclass(frozen=True)
class Point:
    """A network after a few plain steps, and a batch."""

    case: Case
    state: dict[str, Tensor]

    def on(self, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
        """The network, images and labels."""
        model = self.case.network(device).to(dtype)
        model.load_state_dict(self.state)
        images, labels = self.case.batch(device)
        return model, images.to(dtype), labels


def trained(context: Context) -> Point:
    """ResNet-20 after plain steps in float32 on a CPU."""
    case = Case("resnet20", 8 if context.tiny else 32, 10, 8 if context.tiny else 64, 4 if context.tiny else 16)
    model, (images, labels) = case.network("cpu"), case.batch("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(3 if context.tiny else 20):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return Point(case, model.state_dict())


@contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Passes in this precision, as a user would set it."""
    with ExitStack() as stack:
        if name in ("bf16", "fp16"):
            stack.enter_context(torch.autocast(device, {"bf16": torch.bfloat16, "fp16": torch.float16}[name]))
        if device == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "TF32" else "ieee"
            torch.backends.cudnn.conv.fp32_precision = "tf32" if name == "TF32" else "ieee"  # type: ignore[attr-defined]
        yield


class Parts(NamedTuple):
    """Of the first sub-batch, all parameters in a row."""

    g: Tensor
    h: Tensor
    penalties: list[Tensor]
    """In the order of `SCHEMES`; the library refuses them in fp16"""


def parts(point: Point, device: str, dtype: torch.dtype, at: Params, name: str) -> Parts:
    """g at w, h at w - `at`, and both derivatives of the penalty."""
    model, images, labels = point.on(device, dtype)
    size = point.case.sub_batch_size
    batch = images[:size], labels[:size]
    loss_fn = functional_loss(model)
    params = {n: p.detach().requires_grad_() for n, p in trainable_parameters(model).items()}
    scale = _LOSS_SCALE if name == "fp16" else 1.0
    with precision(name, device):
        g = gradient(scale * loss_fn(params, batch), params)
        there = moved(params, {n: tensor.to(device, dtype) for n, tensor in at.items()}, 1.0)
        h = gradient(scale * loss_fn(there, batch), params)
        penalties = [
            sub_batch_penalty(loss_fn, params, [batch], ALPHA, *scheme).penalty_gradient
            for scheme in SCHEMES.values()
            if name != "fp16"
        ]
    return Parts(flat(g, params) / scale, flat(h, params) / scale, [flat(tensors, params) for tensors in penalties])


def whole(point: Point, device: str, dtype: torch.dtype, estimator: Estimator, scheme: str, name: str) -> Tensor:
    """The gradient of a regularized step, with a β that makes the penalty's part as large as the loss's."""
    model, images, labels = point.on(device, dtype)
    derivative, step = SCHEMES[scheme]
    torch.manual_seed(7)
    with precision(name, device):
        regularized_backward(
            model, cross_entropy, images, labels, alpha=ALPHA, beta=_BETA, sub_batch_size=point.case.sub_batch_size,
            estimator=estimator, num_sampled=1 if estimator == "sampled" else None, derivative=derivative, step=step,
        )  # fmt: skip
    return gradient_of(model)


def by_graph(point: Point, device: str, estimator: Estimator, scheme: str, name: str) -> Tensor:
    """The same by a CUDA graph with four streams; on a CPU, by its passes."""
    model, images, labels = point.on(device, torch.float32)
    graphs = graphs_of(point.case, model, torch.optim.SGD(model.parameters(), 0.1), name == "bf16", 4)
    rho = RHO if scheme == "ρ" else None
    penalized = 1 if estimator == "sampled" else point.case.sub_batches
    with precision("fp32" if name == "bf16" else name, device):
        for _ in range(3):  # kernel by kernel, recorded, replayed
            torch.manual_seed(7)
            graphs.backward(images, labels, Penalty(ALPHA, rho, point.case.sub_batches, penalized), _BETA, 1.0)
    return gradient_of(model)


def gradient_of(model: nn.Module) -> Tensor:
    """What is in p.grad."""
    params = trainable_parameters(model)
    return flat({name: p.grad for name, p in params.items() if p.grad is not None}, params)


def flat(tensors: Params, like: Params) -> Tensor:
    """On the CPU, in float64, in the order of `like`."""
    return torch.cat([tensors[name].detach().double().cpu().flatten() for name in like])


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, in the 2-norm."""
    return float((found - exact).norm() / exact.norm())


def exactness(context: Context) -> Iterator[Row]:
    """Relative errors."""
    point = trained(context)
    model, images, labels = point.on("cpu", torch.float64)
    params, size = trainable_parameters(model), point.case.sub_batch_size
    g = gradient(functional_loss(model)(params, (images[:size], labels[:size])), params)
    at = {name: ALPHA * tensor for name, tensor in g.items()}
    oracle = parts(point, "cpu", torch.float64, at, "fp32")
    wholes = {
        (estimator, scheme): whole(point, "cpu", torch.float64, estimator, scheme, "fp32")
        for estimator in ESTIMATORS
        for scheme in SCHEMES
    }
    for name in PRECISIONS:
        found = parts(point, context.device, torch.float32, at, name)
        figures = {"g": error(found.g, oracle.g), "h": error(found.h, oracle.h)}
        for scheme, one, exact in zip(SCHEMES, found.penalties, oracle.penalties, strict=False):
            figures[scheme] = error(one, exact)
        text = ", ".join(f"{key} {value:.1e}" for key, value in figures.items())
        goal = "≤ 1e-3 but for differences" if name == "fp32" else ""
        met = max(figures["g"], figures["h"], figures["exact"]) <= 1e-3 if goal else None
        yield Row(f"{name}: error of g, h and the penalty's gradient", text, goal, met, figures)
        if name == "fp16":
            continue
        errors: dict[str, float] = {}
        for (estimator, scheme), exact in wholes.items():
            one = whole(point, context.device, torch.float32, estimator, scheme, name)
            errors[f"{estimator}, {scheme}"] = error(one, exact)
            derivative, step = (
                ("exact" if scheme == "exact" else "finite_difference"),
                (RHO if scheme == "ρ" else "alpha"),
            )
            if first_order_only(estimator, derivative, step, name != "fp32"):  # type: ignore[arg-type]
                one = by_graph(point, context.device, estimator, scheme, name)
                errors[f"{estimator}, {scheme}, graph"] = error(one, exact)
        text = ", ".join(f"{key}: {value:.1e}" for key, value in errors.items())
        goal = "exact ≤ 1e-3" if name == "fp32" else ""
        met = max(value for key, value in errors.items() if key.endswith("exact")) <= 1e-3 if goal else None
        yield Row(
            f"{name}: error of the gradient of L + βR", text.replace(", graph: ", " (graph): "), goal, met, errors
        )


def length(context: Context) -> Iterator[Row]:
    """The penalty by a finite difference of relative length ρ, against αHg in float64: cosine and length."""
    point = trained(context)
    oracle = penalty(point, "cpu", torch.float64, "exact", "alpha", "fp32")
    for name in ("fp32", "TF32", "bf16"):
        texts, figures = [], {}
        steps: tuple[Step, ...] = ("alpha", 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
        for step in steps:
            found = penalty(point, context.device, torch.float32, "finite_difference", step, name)
            cosine = float(cosine_similarity(found, oracle, dim=0))
            ratio = float(found.norm() / oracle.norm())
            texts.append(f"{step}: {cosine:.3f}, {ratio:.2f}")
            figures[str(step)] = {"cosine": cosine, "length": ratio}
        yield Row(f"{name}: cosine to αHg and relative length, by ρ", "; ".join(texts), figures=figures)


def penalty(point: Point, device: str, dtype: torch.dtype, derivative: Derivative, step: Step, name: str) -> Tensor:
    """The gradient of R, the mean over the sub-batches."""
    model, images, labels = point.on(device, dtype)
    size, params = point.case.sub_batch_size, trainable_parameters(model)
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    with precision(name, device):
        found = sub_batch_penalty(functional_loss(model), params, batches, ALPHA, derivative, step)
    return flat(found.penalty_gradient, params)
