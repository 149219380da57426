"""Data sets of made-up images in the shapes of published ones, prepared on this machine by the usual command."""

import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gpu_checks import Context, interpreter

_CLASSES = 10


def patterns(count: int, side: int, channels: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Noisy stripes, (count, channels, side, side), whose direction and width is that of the class; and labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(_CLASSES, size=count, dtype=np.uint8)
    rows, columns = np.mgrid[0:side, 0:side] * (2 * np.pi / side)
    angles = np.arange(_CLASSES) * np.pi / _CLASSES
    waves = np.sin((np.cos(angles)[:, None, None] * rows + np.sin(angles)[:, None, None] * columns) * 4)
    images = np.empty((count, channels, side, side), np.uint8)
    for start in range(0, count, 1000):
        part = labels[start : start + 1000]
        noise = random.normal(0, 40, (len(part), channels, side, side)).astype(np.float32)
        images[start : start + 1000] = (128 + 50 * waves[part][:, None] + noise).clip(0, 255)
    return images, labels


def _prepared(source: Path, target: Path) -> Path:
    command = interpreter("pipelines.prepare", str(source), str(target))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def cifar(context: Context, train: int, test: int) -> Path:
    """In the shape of CIFAR-10's binary version; prepared once a run."""
    target, source = context.work / f"cifar-{train}", context.work / f"cifar-{train}-source"
    if target.exists():
        return target
    source.mkdir(exist_ok=True)
    for part, names in ((train, [f"data_batch_{i}.bin" for i in range(1, 6)]), (test, ["test_batch.bin"])):
        for seed, name in enumerate(names, part):
            images, labels = patterns(part // len(names), 32, 3, seed)
            records = np.concatenate((labels[:, None], images.reshape(len(images), -1)), axis=1)
            (source / name).write_bytes(records.tobytes())
    (source / "batches.meta.txt").write_text("\n".join(f"class{label}" for label in range(_CLASSES)))
    return _prepared(source, target)


def fashion_mnist(context: Context, train: int, test: int) -> Path:
    """In the shape of Fashion-MNIST, where the demo looks for it; the directory to start the demo in."""
    folder = context.work / f"demo-{train}"
    target, source = folder / "data" / "fashion-mnist", folder / "source"
    if target.exists():
        return folder
    source.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(exist_ok=True)
    for seed, (name, count) in enumerate((("train", train), ("t10k", test))):
        images, labels = patterns(count, 28, 1, seed)
        for what, values in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (source / f"{name}-{what}-ubyte").write_bytes(header + values.tobytes())
    _prepared(source, target)
    return folder


def photographs(context: Context, count: int, side: int) -> Path:
    """JPEGs in class folders, as those of ImageNet at 128 × 128."""
    target, source = context.work / f"photographs-{side}", context.work / f"photographs-{side}-source"
    if target.exists():
        return target
    images, labels = patterns(count, side, 3, 0)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = source / "train" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.jpg", quality=92)
    return _prepared(source, target)
