"""g, h, αHg and every estimator against float64 on a CPU, in every precision; and the length of the step."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from gpu_checks import Context, Row
from gpu_checks.prototype import ALPHA, BETA, Case, Prototype
from infomcr_dist.checks import Derivative
from infomcr_dist.functional import Params, functional_loss, gradient, moved, trainable_parameters
from infomcr_dist.regularizer import Estimator, regularized_backward, sub_batch_penalty

PRECISIONS = ("fp32", "TF32", "bf16", "fp16")
ESTIMATORS: tuple[Estimator, ...] = ("fused", "sampled", "reference")
DERIVATIVES: tuple[Derivative, ...] = ("finite_difference", "exact")
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
    """By finite difference and exactly; the library refuses both in fp16"""


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
            sub_batch_penalty(loss_fn, params, [batch], ALPHA, way).penalty_gradient
            for way in DERIVATIVES
            if name != "fp16"
        ]
    return Parts(flat(g, params) / scale, flat(h, params) / scale, [flat(tensors, params) for tensors in penalties])


def whole(point: Point, device: str, dtype: torch.dtype, estimator: Estimator, way: Derivative, name: str) -> Tensor:
    """The gradient of a regularized step, with a β that makes the penalty's part as large as the loss's."""
    model, images, labels = point.on(device, dtype)
    torch.manual_seed(7)
    sampled = 1 if estimator == "sampled" else None
    with precision(name, device):
        regularized_backward(
            model, cross_entropy, images, labels, alpha=ALPHA, beta=1000 * BETA,
            sub_batch_size=point.case.sub_batch_size, estimator=estimator, num_sampled=sampled, derivative=way,
        )  # fmt: skip
    return flat({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, dict(model.named_parameters()))


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
        (estimator, way): whole(point, "cpu", torch.float64, estimator, way, "fp32")
        for estimator in ESTIMATORS
        for way in DERIVATIVES
    }
    for name in PRECISIONS:
        found = parts(point, context.device, torch.float32, at, name)
        figures = {"g": error(found.g, oracle.g), "h": error(found.h, oracle.h)}
        for label, one, exact in zip(("g − h", "αHg"), found.penalties, oracle.penalties, strict=False):
            figures[label] = error(one, exact)
        text = ", ".join(f"{key} {value:.1e}" for key, value in figures.items())
        if found.penalties:
            figures["cosine"] = float(cosine_similarity(found.penalties[0], oracle.penalties[1], dim=0))
            text += f"; cosine of g − h to αHg {figures['cosine']:.3f}"
        fine = max(value for key, value in figures.items() if key in ("g", "h", "αHg")) <= 1e-3
        goal, met = ("≤ 1e-3 but for g − h", fine) if name == "fp32" else ("", None)
        yield Row(f"{name}: error to float64", text, goal, met, figures)
        if name == "fp16":
            continue
        texts, errors = [], {}
        for (estimator, way), exact in wholes.items():
            value = error(whole(point, context.device, torch.float32, estimator, way, name), exact)
            errors[f"{estimator}, {way}"] = value
            texts.append(f"{estimator}, {way.replace('_', ' ')} {value:.1e}")
        yield Row(f"{name}: gradient of L + βR, error", "; ".join(texts), figures=errors)


def length(context: Context) -> Iterator[Row]:
    """The penalty by a finite difference of relative length ρ, against αHg in float64: cosine and length."""
    point = trained(context)
    model, images, labels = point.on("cpu", torch.float64)
    oracle = flat(penalty(model, images, labels, point.case.sub_batch_size), dict(model.named_parameters()))
    lows = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, low in lows.items():
        step = Prototype(point.case, context.device, low=low)
        with torch.no_grad():
            for weight, value in zip(step.weights, (point.state[n] for n, _ in model.named_parameters()), strict=True):
                weight.copy_(value)
        texts, figures = [], {}
        for rho in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
            with precision("fp32", context.device):
                total = step.regularized_gradient(rho=rho)
                plain = step.regularized_gradient(rho=rho, beta=0.0)
            found = torch.cat([(a - b).double().cpu().flatten() for a, b in zip(total, plain, strict=True)]) / BETA
            cosine = float(cosine_similarity(found, oracle, dim=0))
            ratio = float(found.norm() / oracle.norm())
            texts.append(f"{rho:g}: {cosine:.3f}, {ratio:.2f}")
            figures[str(rho)] = {"cosine": cosine, "length": ratio}
        yield Row(f"{name}: cosine to αHg and relative length, by ρ", "; ".join(texts), figures=figures)


def penalty(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> Params:
    """αHg, the mean over the sub-batches."""
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    return sub_batch_penalty(
        functional_loss(model), trainable_parameters(model), batches, ALPHA, "exact"
    ).penalty_gradient
