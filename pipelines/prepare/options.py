"""The options of `pipelines.prepare`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..cores import available_cores


@dataclass(frozen=True)
class Options:
    """How images are stored in a data set."""

    size: int | None = None
    """Side of the stored images, in pixels; 0: as they are; null: 128, and for raw pixels (CIFAR, IDX) 0."""
    mode: Literal["squash", "crop"] = "squash"
    """How an image becomes a square: both sides resized, or the shorter side resized and the centre cut out."""
    filter: Literal["lanczos", "area"] = "lanczos"
    """Filter by which an image is resized."""
    quality: int = 92
    """Quality of the JPEGs that are encoded, 1..100."""
    shard_size: int = 1000
    """Samples per shard."""
    shard_bytes: int = 0
    """Most bytes of the file of a shard; 0: no limit."""
    test_fraction: float = 0.0
    """Fraction of every class to hold out as the test split, of a source that has none."""
    seed: int = 0
    """Seed of the order of the samples, and of the held-out test split."""
    strict: bool = False
    """Stop at the first file that cannot be decoded, instead of skipping it."""
    processes: int = 0
    """Number of processes; 0: one per core."""

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("size", self.size or 0, 0, 16384),
            ("quality", self.quality, 1, 100),
            ("shard_size", self.shard_size, 1, None),
            ("shard_bytes", self.shard_bytes, 0, None),
            ("test_fraction", self.test_fraction, 0, 0.99),
            ("seed", self.seed, 0, None),
            ("processes", self.processes, 0, None),
        ):
            if value < low or (high is not None and value > high):
                limit = f"in {low}..{high}" if high is not None else f"{low} or more"
                raise ValueError(f"{name} must be {limit}, got {value}")

    @property
    def workers(self) -> int:
        """Number of processes."""
        return self.processes or available_cores()

    def relevant(self) -> dict[str, Any]:
        """The options on which the result depends."""
        return {name: value for name, value in asdict(self).items() if name not in ("processes", "strict")}
