"""What `regularized_backward` refuses before anything is computed: a ValueError of one line each."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from infomcr_dist.criteria import check_criterion
from infomcr_dist.functional import Criterion, Params, check_modules
from infomcr_dist.passes import unwrapped

Derivative = Literal["finite_difference", "exact"]
Step = float | Literal["alpha", "auto"]
Method = Literal["infomcr", "sam", "asam", "gradient_norm"]
RELATIVE_STEP = 3e-3
"""rho, where low precision asks for a step longer than alpha: the least error under rounding to bfloat16."""


class Scheme(NamedTuple):
    """How g_i - h_i is obtained."""

    derivative: Derivative
    alpha: float
    rho: float | None = None
    """InfoMCR: relative length of the finite difference's step, |epsilon_i g_i| / |w|; None: the paper's, epsilon_i =
    alpha. Other methods: the radius."""
    method: Method = "infomcr"


def check_step(model: nn.Module, criterion: Criterion, images: Any, labels: Any, params: Params) -> None:
    """Refuse models, losses and batches that a step cannot take."""
    if not torch.is_grad_enabled():
        raise ValueError("the step needs gradients: call it outside torch.no_grad and torch.inference_mode")
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor (B, ...), got {type(value).__name__}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: make what computes them part of model")
    if not images.dim() or not labels.dim() or len(images) != len(labels):
        raise ValueError(f"images and labels must be as many, got {tuple(images.shape)} and {tuple(labels.shape)}")
    if not params:
        raise ValueError("model must have parameters that require a gradient, got none")
    _check_wrapper(model)
    check_modules(unwrapped(model))
    check_criterion(criterion, unwrapped(model))
    if parametrize._cache_enabled:
        raise ValueError("the step computes weights anew in each pass: call it outside parametrize.cached()")


def _check_wrapper(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        if model.static_graph:
            raise ValueError(
                "model must not be DistributedDataParallel(static_graph=True): a step has passes it does not know"
            )
        if model.mixed_precision is not None:
            raise ValueError("model must not be DistributedDataParallel(mixed_precision=...): use autocast")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules() if module is not model):
        raise ValueError("DistributedDataParallel must be the outermost wrapper of model: compile first, then wrap")


def check_numbers(max_batch_size: int | None, **factors: float) -> None:
    """Refuse factors that are not finite and a size below 1."""
    for name, value in factors.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if max_batch_size is not None and (not isinstance(max_batch_size, int) or max_batch_size < 1):
        raise ValueError(f"max_batch_size must be an integer of at least 1, got {max_batch_size}")


def check_derivative(alpha: float, derivative: str, step: Step, params: Params, model: nn.Module | None = None) -> None:
    """Refuse a length, a derivative and a step that do not fit the parameters."""
    if derivative not in get_args(Derivative):
        raise ValueError(f"derivative must be one of {', '.join(get_args(Derivative))}, got {derivative!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if step not in ("alpha", "auto"):
        if not isinstance(step, int | float) or not 0 < abs(step) < 1:
            raise ValueError(f"step must be 'alpha', 'auto' or a number between -1 and 1 that is not 0, got {step!r}")
        if derivative == "exact":
            raise ValueError(f"derivative='exact' takes no step, got step={step}: use derivative='finite_difference'")
        if autocast_type(params) == torch.float16:
            raise ValueError(f"step={step} computes under autocast, which to float16 needs loss scaling: use bfloat16")
        if len(devices(params)) > 1:
            raise ValueError(f"step={step} needs all parameters on one device: use step='alpha'")
    if derivative == "finite_difference" and low_precision(params):
        raise ValueError(
            "derivative='finite_difference' is rounding noise for parameters of less than 32 bits: "
            "use derivative='exact', or keep the parameters in float32"
        )
    if derivative == "exact" and autocast_type(params) == torch.float16:
        raise ValueError("autocast to float16 needs loss scaling, which the penalty does not do: use bfloat16")
    if derivative == "exact" and model is not None and compiled(model):
        raise ValueError(
            "derivative='exact' needs double backward, which torch.compile does not support: "
            "use derivative='finite_difference', or a model that is not compiled"
        )


def check_method(
    method: str, rho: float | None, derivative: str, step: Step, params: Params, estimator: str = "fused"
) -> None:
    """Refuse a method and settings that do not fit it."""
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if method == "infomcr":
        if rho is not None:
            raise ValueError(f"rho is the radius of the other methods, got method='infomcr' and rho={rho}: use step")
        return
    if not isinstance(rho, int | float) or not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive for method={method!r}, got {rho}")
    for name, value, wrong in (
        ("estimator", estimator, estimator == "reference"),
        ("derivative", derivative, derivative == "exact"),
        ("step", step, not isinstance(step, str)),
    ):
        if wrong:
            raise ValueError(f"{name}={value!r} goes with method='infomcr', got method={method!r}")
    if autocast_type(params) == torch.float16:
        raise ValueError(
            f"method={method!r} computes under autocast, which to float16 needs loss scaling: use bfloat16"
        )
    if len(devices(params)) > 1:
        raise ValueError(f"method={method!r} needs all parameters on one device")
    if low_precision(params):
        raise ValueError(
            f"method={method!r} moves parameters of less than 32 bits by less than their rounding: keep them in "
            "float32, and use autocast"
        )


def sub_batch_count(images: int, sub_batches: int | None, sub_batch_size: int | None) -> int:
    """M, from the one of the two that is given; refuses one that does not divide the batch."""
    if (sub_batches is None) == (sub_batch_size is None):
        raise ValueError(f"give either sub_batches or sub_batch_size, got {sub_batches} and {sub_batch_size}")
    name, value = ("sub_batches", sub_batches) if sub_batches is not None else ("sub_batch_size", sub_batch_size)
    if not isinstance(value, int) or value < 1 or images < 1 or images % value:
        raise ValueError(f"{name} must divide the local batch, got {value} and {images}")
    return value if name == "sub_batches" else images // value


def compiled(model: nn.Module) -> bool:
    """Whether any part of `model` is compiled."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())


def low_precision(params: Params) -> bool:
    """Whether any of them has less than 32 bits."""
    return any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in params.values())


def devices(params: Params) -> list[torch.device]:
    """Where they are, each once, the first of them first."""
    return list(dict.fromkeys(tensor.device for tensor in params.values()))


def autocast_type(params: Params) -> torch.dtype | None:
    """The type autocast computes in, None outside autocast."""
    kind = devices(params)[0].type if params else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
