"""The settings of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infomcr_dist.config.checks import require


@dataclass(frozen=True)
class DataSettings:
    """The data set, and how a global batch is made of it."""

    path: str = "fashion-mnist"
    """Directory of a prepared data set or of shards, or their URLs with braces, https://host/train-{0000..0146}.tar
    (http, https, s3, gs or file); ``fashion-mnist`` is ./data/fashion-mnist, prepared on first use."""
    backend: Literal["dali", "torch", "resident", "webdataset", "synthetic"] = "dali"
    """Loader that decodes and augments the batches. resident: all images on the device, decoded once, where they fit
    there and the augmentation only flips and shifts. webdataset streams, so evaluation uses torch there."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a sample that cannot be read or decoded: stop the run, or take the next sample and count it."""
    shuffle: Literal["full", "window"] = "full"
    """full: an epoch is a permutation of all samples; window: of the shards, and of the samples of a few shards at a
    time, for slow disks."""
    augmentation: str = "crop4_flip"
    """Of the training batches: none, flip, crop1_flip, crop4_flip or random_resized_crop."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    mixup: float = 0.0
    """α of the Beta(α, α) that gives the shares in which the images of a pair are blended; 0: no mixup."""
    cutmix: float = 0.0
    """The same for the box that the images of a pair exchange; where both are given, either takes half of the pairs."""
    random_erasing: float = 0.0
    """Share of the training images in which a random box takes the mean colour."""
    image_size: int | None = None
    """Side of the model's square input images, in pixels; null: the side they are stored at."""
    batch_size: int | None = None
    """Images per worker and step; null where global_batch_size is given."""
    global_batch_size: int | None = None
    """Images per step over all workers, split evenly; null where batch_size is given."""
    drop_last: bool = False
    """Whether an epoch's last global batch is dropped if it is smaller than the others."""
    train_images: int | None = None
    """Number of training images, drawn with the seed; null: all."""
    confusion_images: int = 0
    """Number of additional training images with random labels, both drawn with the seed (Scenario I); errors count
    them, metrics do not."""
    holdout_images: int = 0
    """Number of training images held out, drawn with the seed, and evaluated on in place of the test images."""
    max_batch_size: int | None = None
    """Largest number of images that a worker takes through the network at once; gradients are accumulated over the
    pieces of a larger local batch. null: the whole local batch."""
    threads: int = 1
    """Decoding threads per worker; processes where the backend is torch."""
    cache_bytes: int = 10_000_000_000
    """Largest size of the local copies of what is read from URLs, on each machine, below XDG_CACHE_HOME; 0: none."""
    prefetch: int = 2
    """Batches decoded ahead."""

    @property
    def mixes(self) -> bool:
        """Whether images of a pair are mixed, and labels are probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    def __post_init__(self) -> None:
        given = (self.batch_size is not None) + (self.global_batch_size is not None)
        if given != 1:
            raise ValueError(
                "data: give one of batch_size (images a worker) and global_batch_size (images over all workers), "
                f"got batch_size={self.batch_size} and global_batch_size={self.global_batch_size}"
            )
        names = (
            "batch_size",
            "global_batch_size",
            "max_batch_size",
            "image_size",
            "train_images",
            "threads",
            "prefetch",
        )
        for name in names:
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}", "at least 1", value)
        require(0 <= self.color_jitter < 1, "data.color_jitter", "in [0, 1)", self.color_jitter)
        require(0 <= self.random_erasing <= 1, "data.random_erasing", "in [0, 1]", self.random_erasing)
        for name in ("confusion_images", "holdout_images", "cache_bytes", "mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"data.{name}", "at least 0", getattr(self, name))
        if self.confusion_images and self.train_images is None:
            raise ValueError(
                "data.confusion_images needs data.train_images, "
                f"got {self.confusion_images} and null: give a number for both"
            )
