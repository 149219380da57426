"""Classify images: the five likeliest classes of each, by the network of a run.

    infomcr predict RUN IMAGES [IMAGES …] [key=value …]

RUN is a checkpoint or a run directory (its newest). IMAGES are .jpg and .png files, folders of them, and .tar shards.
They take the way of the run's evaluation: its decoder, `evaluation.transform`, and the normalization of its data set.

Exit code 0: classified; 75: stopped, repeat the command; 2: a mistake in the settings, or a checkpoint or an image that
cannot be read, reported in one line; 1: anything else.
"""

from __future__ import annotations

import csv
import io
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from infomcr_dist import checkpoint
from infomcr_dist.cli import PREDICT
from infomcr_dist.config import PredictSettings
from infomcr_dist.evaluate import evaluating
from infomcr_dist.experiment import compute_threads, eval_loader_config
from infomcr_dist.precision import set_float32_precision
from infomcr_dist.trained import Trained, load_trained
from infomcr_dist.world import SingleProcess
from pipelines import Dataset, evaluation_batches, open_loader
from pipelines.format.loose import LooseImages, open_images
from pipelines.options import load

TOP = 5
Row = tuple[str, list[tuple[str, float]]]
"""An image's name; its likeliest classes with their probabilities"""


def logits(trained: Trained, images: LooseImages, world: SingleProcess) -> Iterator[Tensor]:
    """The logits (B, classes) of each batch of the images, in their order, as evaluation computes them.

    Raises:
        ValueError: an image cannot be decoded.
    """
    config, split = trained.config, images.split
    dataset = Dataset(Path(), trained.classes, trained.mean, trained.std, "", {split.name: split})
    size = min(config.evaluation.batch_size, len(split))
    settings = eval_loader_config(config, dataset, trained.image_size, size, world)
    if settings.backend == "synthetic":  # which reads no image
        settings = replace(settings, backend="torch")
    loader = open_loader(split, replace(settings, on_error="stop"))
    bf16 = config.precision == "bf16"
    set_float32_precision(config.precision == "tf32")
    try:
        with evaluating(trained.model), torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            for _, batch, _ in loader.batches(evaluation_batches(len(split), size, 0, 1)):
                yield trained.model(batch)
    except ValueError as error:  # which has the place in the copy of an image file
        text = str(error)
        for sample, name in enumerate(images.names):
            text = text.replace(split.where(sample), name)
        raise ValueError(text) from None
    finally:
        loader.close()


def predict(trained: Trained, paths: list[Path], world: SingleProcess) -> Iterator[Row]:
    """The likeliest classes of the images at ``paths``, in their order."""
    with tempfile.TemporaryDirectory() as scratch:
        images = open_images(paths, Path(scratch))
        names = iter(images.names)
        for batch in logits(trained, images, world):
            best = batch.double().softmax(1).topk(min(TOP, batch.shape[1]))
            for values, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                classes = [trained.classes[label] for label in labels]
                yield next(names), list(zip(classes, values, strict=True))


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    return PREDICT.run(arguments, _main)


def _main(paths: list[str], overrides: list[str]) -> int:
    settings = load(PredictSettings, None, overrides)
    torch.set_num_threads(compute_threads(settings.threads, 1))
    world = SingleProcess()
    trained = load_trained(Path(paths[0]), settings.model, world.device, settings.weights)
    rows = predict(trained, [Path(p) for p in paths[1:]], world)
    if settings.csv is None:
        for name, best in rows:
            print(f"{name}: {', '.join(f'{label} {probability:.1%}' for label, probability in best)}", flush=True)
        return 0
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", *(f"{kind}_{place}" for place in range(1, TOP + 1) for kind in ("class", "probability"))])
    found = list(rows)
    for name, best in found:
        table.writerow([name, *(item for label, probability in best for item in (label, f"{probability:.6f}"))])
    checkpoint.write_atomically(Path(settings.csv), lambda file: file.write(text.getvalue().encode()))
    print(f"written: {settings.csv}, {len(found)} images", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
