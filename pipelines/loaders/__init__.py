"""Loaders, one file a backend: local batches of sample ids in, tensors out."""

from ..format import Split
from .config import Backend, Batch, Loader, LoaderConfig, OnError

__all__ = ["Backend", "Batch", "Loader", "LoaderConfig", "OnError", "open_loader"]


def open_loader(split: Split, config: LoaderConfig) -> Loader:
    """A loader of `split`.

    Raises:
        ValueError: the libraries of the backend are not installed, or it cannot serve this split.
    """
    # Imported here, so that a machine needs the libraries of the backend it uses and no other.
    try:
        if config.backend == "dali":
            from .dali import DaliLoader

            return DaliLoader(split, config)
        if config.backend == "torch":
            from .torch import TorchLoader

            return TorchLoader(split, config)
        if config.backend == "resident":
            from .resident import ResidentLoader

            return ResidentLoader(split, config)
        if config.backend == "webdataset":
            from .webdataset import WebDatasetLoader

            return WebDatasetLoader(split, config)
        from .synthetic import SyntheticLoader

        return SyntheticLoader(split, config)
    except ModuleNotFoundError as error:
        others = " or ".join(backend for backend in ("dali", "torch") if backend != config.backend)
        raise ValueError(
            f"backend {config.backend} needs the module {error.name}; install it or use {others}"
        ) from None
