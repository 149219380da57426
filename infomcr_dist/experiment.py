"""What a run trains on: the data set, its splits, the global batches of an epoch, and how the workers share them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from infomcr_dist import models
from infomcr_dist.config import Config
from infomcr_dist.overhead_budget import OverheadBudget
from infomcr_dist.world import World
from pipelines import Dataset, Loader, LoaderConfig, LocalBatch, Sampler, Split, open_dataset, open_loader
from pipelines.cores import available_cores
from pipelines.mixing import MixedLoader, Mixing
from pipelines.random_streams import Stream, generator, permutation

DEMO_DATA = Path("data") / "fashion-mnist"
"""Where ``data.path=fashion-mnist`` is, below the current directory."""


@dataclass(frozen=True)
class Experiment:
    """A function of the settings, the data set and the number of workers."""

    config: Config
    dataset: Dataset
    splits: dict[str, Split]
    """train and test: what the run trains on and is evaluated on"""
    sampler: Sampler
    image_size: int
    """Side of the square images the model gets, pixels"""
    sub_batch_size: int | None
    """None: never regularized"""
    world_size: int

    @property
    def local_batch_size(self) -> int:
        """Images a worker has in a step, at most."""
        return self.sampler.largest_local_batch(self.world_size)

    @property
    def num_sub_batches(self) -> int:
        """Sub-batches a worker has in a step, at most (M)."""
        return self.local_batch_size // (self.sub_batch_size or self.local_batch_size)

    def build_model(self) -> nn.Module:
        """The network, with the initial weights of the run's seed."""
        torch.manual_seed(self.config.seed)
        config, classes = self.config, len(self.dataset.classes)
        return models.build(config.model, classes=classes, image_size=self.image_size, frozen=config.frozen)

    def num_penalized(self, batch: LocalBatch, step: int, budget: OverheadBudget | None) -> int | None:
        """How many sub-batches of a worker's batch a regularized step penalizes; None: the batch does not split.

        A last, smaller global batch is regularized only if it splits into whole sub-batches: their size is the
        penalty's strength.
        """
        size = self.sub_batch_size
        if size is None or batch.global_size % size:
            return None
        sub_batches = len(batch.samples) // size
        if budget is not None:
            return min(budget.draw(step), sub_batches)
        return min(self.config.regularizer.num_sampled or sub_batches, sub_batches)

    def train_loader_config(self, world: World) -> LoaderConfig:
        """Of the training split, augmented, for the steps."""
        data = self.config.data
        return replace(
            eval_loader_config(self.config, self.dataset, self.image_size, self.local_batch_size, world),
            backend=data.backend,
            augmentation=data.augmentation,
            color_jitter=data.color_jitter,
        )

    def open_train_loader(self, world: World) -> Loader:
        """The training split, augmented and mixed, for the steps; ValueError if it cannot be opened."""
        data, loader = self.config.data, open_loader(self.splits["train"], self.train_loader_config(world))
        if not (data.mixes or data.random_erasing):
            return loader
        mixing = Mixing(
            mixup=data.mixup,
            cutmix=data.cutmix,
            erasing=data.random_erasing,
            seed=self.config.seed,
            classes=len(self.dataset.classes),
            unit=self.sampler.unit,
        )
        return MixedLoader(loader, mixing)

    def eval_loader_config(self, world: World, batch_size: int) -> LoaderConfig:
        """Of a split as it is, for evaluation and metric."""
        config = eval_loader_config(self.config, self.dataset, self.image_size, batch_size, world)
        return replace(config, backend="resident") if self.config.data.backend == "resident" else config


def open_experiment(config: Config, world_size: int) -> Experiment:
    """Open the data set and plan the steps.

    Raises:
        ValueError: the data set is missing or damaged, or the settings do not fit it or the number of workers.
    """
    dataset = open_data(config.data.path)
    splits = select_splits(config, dataset)
    sampler, sub_batch_size = plan_steps(config, splits["train"], world_size)
    image_size = config.data.image_size or stored_size(dataset)
    return Experiment(config, dataset, splits, sampler, image_size, sub_batch_size, world_size)


def open_data(path: str) -> Dataset:
    """The data set of the setting ``data.path``; ValueError if it cannot be opened."""
    if path == "fashion-mnist" and not DEMO_DATA.exists():
        raise ValueError(
            f"{DEMO_DATA} is not there yet: the first run prepares it, or python -m pipelines.prepare "
            f"fashion-mnist {DEMO_DATA}"
        )
    return open_dataset(DEMO_DATA if path == "fashion-mnist" else path)


def prepare_demo_data(path: str) -> None:
    """Make the demo's data set where ``data.path`` asks for it and it is missing, by the command a user would type.

    Raises:
        ValueError: it could not be prepared; the command has printed why.
    """
    if path != "fashion-mnist" or DEMO_DATA.exists():
        return
    print(f"preparing {DEMO_DATA}, once …", flush=True)
    command = [sys.executable, "-m", "pipelines.prepare", "fashion-mnist", str(DEMO_DATA)]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(
            f"data.path: fashion-mnist could not be prepared (the reason is above): repeat with "
            f"python -m pipelines.prepare fashion-mnist {DEMO_DATA}, or give data.path=DIRECTORY of another data set"
        )


def select_splits(config: Config, dataset: Dataset) -> dict[str, Split]:
    """What is trained and evaluated on: whole splits, or parts of the training split."""
    missing = [name for name in ("train", "test") if name not in dataset.splits]
    if missing:
        raise ValueError(
            f"data.path: {dataset.path} has no split {missing[0]!r}: prepare it again from folders train/ and test/, "
            "or with test_fraction=0.1"
        )
    data, whole = config.data, dataset.splits["train"]
    held_out, taken = data.holdout_images, data.train_images
    if held_out + (taken or 1) + data.confusion_images > len(whole):
        raise ValueError(
            "data.train_images, data.confusion_images and data.holdout_images must be at most the "
            f"{len(whole)} training images together, got {taken}, {data.confusion_images} and {held_out}"
        )
    if taken is None and held_out == 0:
        return {"train": whole, "test": dataset.splits["test"]}
    shuffled = permutation(Stream.SPLIT, len(whole), config.seed)
    held = np.sort(shuffled[:held_out])
    if taken is None:
        train = replace(whole, index=np.delete(whole.index, held))
    else:  # in the order of the shards, so that those of a shard are in a row
        confused = shuffled[held_out + taken : held_out + taken + data.confusion_images]
        ids = np.concatenate((np.sort(shuffled[held_out : held_out + taken]), np.sort(confused)))
        train = whole.subset(ids)
        labels = generator(Stream.CONFUSION, config.seed).integers(len(dataset.classes), size=len(confused))
        train.index["label"][taken:] = labels
    return {"train": train, "test": whole.subset(held) if held_out else dataset.splits["test"]}


def measured_images(config: Config, train: Split) -> Split:
    """The training images that metrics are taken on: those with labels of their own. Ids are as in ``train``."""
    return replace(train, index=train.index[: len(train) - config.data.confusion_images])


def stored_size(dataset: Dataset) -> int:
    """Side of the stored images in pixels; ValueError if they are not squares of one size."""
    sides = dataset.splits["train"].sides
    if sides is None or sides[0] != sides[1]:
        raise ValueError(
            f"data.image_size must be given, got null: the images of {dataset.path} are not squares of one size"
        )
    return sides[0]


def plan_steps(config: Config, split: Split, workers: int) -> tuple[Sampler, int | None]:
    """The sampler of the training split, and the images a sub-batch holds (None: never regularized)."""
    data, regularizer, samples = config.data, config.regularizer, len(split)
    if samples < workers:
        raise ValueError(f"data.path has {samples} training images, fewer than the {workers} workers")
    global_batch = data.global_batch_size or (data.batch_size or 0) * workers
    if global_batch < workers:
        raise ValueError(
            f"data.global_batch_size must be at least the number of workers, got {global_batch} and {workers}"
        )

    def sampler(unit: int) -> Sampler:
        batch, sizes = min(global_batch, samples), split.shard_sizes
        return Sampler(
            samples, batch, config.seed, drop_last=data.drop_last, shuffle=data.shuffle, shard_sizes=sizes, unit=unit
        )

    if regularizer.when == "never":
        if data.mixes and global_batch % 2:
            raise ValueError(f"data.mixup and data.cutmix need an even global batch, got {global_batch} images")
        return sampler(2 if data.mixes else 1), None
    size = regularizer.sub_batch_size
    if size is None:
        assert regularizer.sub_batches is not None
        size, uneven = divmod(global_batch, workers * regularizer.sub_batches)
        if uneven:
            raise ValueError(
                f"regularizer.sub_batches must divide every worker's share of the global batch, got "
                f"{regularizer.sub_batches}, {global_batch} images and {workers} workers: give sub_batch_size instead"
            )
    elif global_batch % size:
        raise ValueError(
            f"regularizer.sub_batch_size must divide the global batch, got {size} and {global_batch} images"
        )
    if data.mixes and size % 2:
        raise ValueError(
            f"data.mixup and data.cutmix mix the images of a pair, which is to be within a sub-batch: regularizer."
            f"sub_batch_size must be even, got {size}"
        )
    most = -(-(global_batch // size) // workers)
    if regularizer.num_sampled is not None and regularizer.num_sampled > most:
        raise ValueError(
            f"regularizer.num_sampled must be at most the number of sub-batches of a worker, "
            f"got {regularizer.num_sampled} and {most}"
        )
    return sampler(size), size


def eval_loader_config(
    config: Config, dataset: Dataset, image_size: int, batch_size: int, world: World
) -> LoaderConfig:
    """Of a split as it is, in its exact order.

    A stream of shards has none, so that ``torch`` reads in its place; and in the place of ``resident``, whose images
    are the same, where it is no run, for which they may not fit the memory.
    """
    data = config.data
    return LoaderConfig(
        backend="torch" if data.backend in ("webdataset", "resident") else data.backend,
        augmentation=config.evaluation.transform,
        size=image_size,
        mean=dataset.mean,
        std=dataset.std,
        seed=config.seed,
        batch_size=batch_size,
        device=world.device,
        threads=data.threads,
        prefetch=data.prefetch,
        cache_bytes=data.cache_bytes,
        on_error=data.on_error,
        rank=world.rank,
        world_size=world.size,
        local_size=world.local_size,
    )


def compute_threads(threads: int | None, local_size: int) -> int:
    """Threads a worker computes with: the setting ``threads``, OMP_NUM_THREADS, or its share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return threads or (int(given) if given.isdecimal() else 0) or max(1, available_cores() // local_size)
