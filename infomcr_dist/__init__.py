"""Distributed training towards flatter minima: the regularizer and the metric of Jia & Su (ICML 2020)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infomcr_dist.curvature import gamma_hat as gamma_hat
    from infomcr_dist.functional import functional_loss as functional_loss
    from infomcr_dist.gram import gradient_gram as gradient_gram
    from infomcr_dist.regularizer import regularized_backward as regularized_backward

    __version__: str

_MODULES = {
    "functional_loss": "functional",
    "gamma_hat": "curvature",
    "gradient_gram": "gram",
    "regularized_backward": "regularizer",
}
__all__ = ["__version__", "functional_loss", "gamma_hat", "gradient_gram", "regularized_backward"]


def __getattr__(name: str) -> Any:
    # On first use: the command line, which shows help and completes words, must not wait for torch.
    if name == "__version__":
        return version("infomcr_dist")
    if name in _MODULES:
        return getattr(import_module(f"infomcr_dist.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
