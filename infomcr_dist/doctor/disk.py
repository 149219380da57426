"""Whether the data set is there, the model and its initial weights are known, and the run's files can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from infomcr_dist.config import Config
from infomcr_dist.doctor.results import Result, attempt, gigabytes
from infomcr_dist.experiment import Experiment, open_experiment
from infomcr_dist.initial_weights import load_initial_weights
from infomcr_dist.state import resumes
from infomcr_dist.world import World

_SPARE_BYTES = 64 << 20
"""Room for records, metrics and what a file system keeps for itself."""


@dataclass(frozen=True)
class ModelSize:
    """checkpoint_bytes: of weights, buffers and momentum, as a checkpoint holds them."""

    name: str
    parameters: int
    checkpoint_bytes: int

    def __str__(self) -> str:
        return f"{self.name}, {self.parameters:,} parameters"


def check_disk(results: list[Result], config: Config, world: World) -> Experiment | None:
    """Data set, model and run directory; returns the experiment, None if it cannot be opened."""
    experiment = attempt(results, "data", open_experiment, config, world.size, text=describe_data)
    size = None if experiment is None else attempt(results, "model", model_size, experiment)
    if world.rank == 0:  # the run directory is rank 0's alone
        attempt(results, "run directory", check_directory, config, size)
        begins = config.init_from is not None and not resumes(config)
        if begins and experiment is not None and size is not None:
            attempt(results, "init_from", initial_weights, experiment)
    return experiment


def describe_data(experiment: Experiment) -> str:
    """The data set, its splits and the largest local batch."""
    dataset, splits = experiment.dataset, experiment.splits
    counts = ", ".join(f"{name} {len(split)} in {len(split.shards)} shards" for name, split in splits.items())
    per_worker = f"{experiment.local_batch_size} images per worker and step"
    return f"{dataset.path}: {len(dataset.classes)} classes, {counts}; {per_worker}"


def model_size(experiment: Experiment) -> ModelSize:
    """Size of the model; ValueError if there is none of that name."""
    model = experiment.build_model()
    weights = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    parameters = sum(p.numel() for p in model.parameters())
    return ModelSize(experiment.config.model, parameters, 2 * weights + buffers)


def initial_weights(experiment: Experiment) -> str:
    """Which weights a new run begins with; ValueError if they cannot be read, or are another network's."""
    source = Path(str(experiment.config.init_from))
    return load_initial_weights(source, experiment.build_model(), experiment).removeprefix("init_from: ")


def check_directory(config: Config, model: ModelSize | None) -> str:
    """Whether the run's files can be written, and its checkpoints kept; OSError or ValueError if not."""
    wanted = Path(config.run_dir) if config.run_dir else Path("runs")
    existing = next(path for path in (wanted.absolute(), *wanted.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{wanted} cannot be written ({error.strerror}): give another run_dir=DIRECTORY") from None
    if model is None:
        return f"{wanted} can be written"
    needed = judge_space(shutil.disk_usage(existing).free, model.checkpoint_bytes, config.checkpoint.keep)
    return f"{wanted} can be written, {needed}"


def judge_space(free: int, checkpoint: int, keep: int) -> str:
    """ValueError unless so many bytes hold ``keep`` checkpoints and the one being written."""
    needed = checkpoint * (keep + 1) + _SPARE_BYTES
    figures = f"{gigabytes(free)} free, {gigabytes(needed)} needed for {keep} + 1 checkpoints"
    if free < needed:
        raise ValueError(f"{figures}: make room, or give another run_dir=DIRECTORY")
    return figures
