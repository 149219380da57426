import io
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_data_set
from PIL import Image

from pipelines import Dataset, Loader, Order, Part, evaluation_parts, open_loader
from pipelines.reader import Files

AUGMENTATIONS = ("none", "flip", "crop1_flip", "crop4_flip", "random_resized_crop", "center_crop")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_data_set(tmp_path_factory.mktemp("dali"))


@pytest.fixture(params=["dali", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_train(dataset: Dataset, backend: str, augmentation: str = "none", **settings: object) -> Loader:
    defaults = {
        "size": 32,
        "mean": dataset.mean,
        "std": dataset.std,
        "seed": 5,
        "batch_size": 32,
        "device": torch.device("cpu"),
    }
    given = {"backend": backend, "augmentation": augmentation, **defaults, **settings}
    return open_loader(dataset.splits["train"], **given)  # type: ignore[arg-type]


def pixels(dataset: Dataset, images: torch.Tensor) -> np.ndarray:
    """Normalized (B, 3, H, W) back to 0..255, (B, H, W, 3)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    return ((images * std + mean) * 255).permute(0, 2, 3, 1).numpy()


def decoded(dataset: Dataset, samples: np.ndarray) -> np.ndarray:
    files = Files(dataset.splits["train"], threads=1)
    images = [Image.open(io.BytesIO(files.read(sample))).convert("RGB") for sample in samples.tolist()]
    return np.stack([np.asarray(image) for image in images])


def test_images_and_labels_are_those_of_the_shards(dataset: Dataset, backend: str) -> None:
    split = dataset.splits["train"]
    loader = open_train(dataset, backend)
    seen = []
    for part, (images, labels) in zip(
        evaluation_parts(len(split), 16, 0, 1), loader.batches(evaluation_parts(len(split), 16, 0, 1)), strict=True
    ):
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        np.testing.assert_allclose(pixels(dataset, images), decoded(dataset, part.samples), atol=1.01)
        np.testing.assert_array_equal(labels.numpy(), split.labels[part.samples])
        seen.append(len(labels))
    assert sum(seen) == len(split) == 27
    loader.close()


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_pixels_do_not_depend_on_world_size_or_start(dataset: Dataset, backend: str, augmentation: str) -> None:
    order = Order(len(dataset.splits["train"]), 8, seed=2)
    loader = open_train(dataset, backend, augmentation)
    whole = [images for images, _ in loader.batches(order.parts(1, 0, 1))]
    for size in (2, 3, 8):
        ranks = [[images for images, _ in loader.batches(order.parts(1, rank, size))] for rank in range(size)]
        for step, images in enumerate(whole):
            assert torch.equal(torch.cat([batches[step] for batches in ranks]), images)
    for start in range(order.steps):
        rest = [images for images, _ in loader.batches(order.parts(1, 0, 1, start))]
        assert all(torch.equal(images, expected) for images, expected in zip(rest, whole[start:], strict=True))
    loader.close()


def test_flip_mirrors_about_half(dataset: Dataset, backend: str) -> None:
    loader = open_train(dataset, backend, "flip")
    part = next(evaluation_parts(27, 27, 0, 1))
    images = pixels(dataset, next(loader.batches([part]))[0])
    plain = decoded(dataset, part.samples).astype(float)
    mirrored = [bool(np.abs(image - stored[:, ::-1]).max() < 2) for image, stored in zip(images, plain, strict=True)]
    upright = [bool(np.abs(image - stored).max() < 2) for image, stored in zip(images, plain, strict=True)]
    assert all(a != b for a, b in zip(mirrored, upright, strict=True))
    assert 5 <= sum(mirrored) <= 22
    loader.close()


@pytest.mark.parametrize("pad", [1, 4])
def test_crop_is_a_shift_with_zeros_entering(dataset: Dataset, backend: str, pad: int) -> None:
    loader = open_train(dataset, backend, f"crop{pad}_flip")
    part = next(evaluation_parts(27, 27, 0, 1))
    images = pixels(dataset, next(loader.batches([part]))[0])
    shifts = set()
    for image, stored in zip(images, decoded(dataset, part.samples), strict=True):
        padded = np.pad(stored.astype(float), ((pad, pad), (pad, pad), (0, 0)))
        found = [
            (y - pad, x - pad, flip)
            for y in range(2 * pad + 1)
            for x in range(2 * pad + 1)
            for flip in (1, -1)
            if np.abs(padded[y : y + 32, x : x + 32][:, ::flip] - image).max() < 2
        ]
        assert len(found) == 1
        shifts.add(found[0][:2])
    assert len(shifts) > 2 * pad
    loader.close()


def test_empty_parts_tensors_that_stay_and_abandoned_iterations(dataset: Dataset, backend: str) -> None:
    split = dataset.splits["train"]
    loader = open_train(dataset, backend, "crop4_flip")
    nothing = Part(0, 0, np.arange(0), np.arange(0), 3)
    parts = [nothing, *evaluation_parts(len(split), 4, 0, 1), nothing]
    batches = list(loader.batches(parts))
    copies = [images.clone() for images, _ in batches]
    assert batches[0][0].shape == (0, 3, 32, 32)
    assert batches[-1][1].shape == (0,)
    abandoned = loader.batches(parts)
    for _ in range(3):
        next(abandoned)
    again = list(loader.batches(parts))
    for (images, _), copy, (other, _) in zip(batches, copies, again, strict=True):
        assert torch.equal(images, copy)
        assert torch.equal(other, copy)
    with pytest.raises(RuntimeError, match="ended when another one"):
        next(abandoned)
    loader.close()


def test_stored_images_of_another_size_are_resized(tmp_path: Path, backend: str) -> None:
    dataset = make_data_set(tmp_path, per_class=4, height=40, width=56)
    loader = open_train(dataset, backend, "none")
    part = next(evaluation_parts(len(dataset.splits["train"]), 16, 0, 1))
    images = pixels(dataset, next(loader.batches([part]))[0])
    for image, stored in zip(images, decoded(dataset, part.samples), strict=True):
        expected = Image.fromarray(stored).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(image, np.asarray(expected), atol=1.6)
    loader.close()


def test_a_damaged_sample_stops_the_iteration_and_the_loader_lives_on(tmp_path: Path, backend: str) -> None:
    dataset = make_data_set(tmp_path)
    split = dataset.splits["train"]
    entry = split.index[20]
    with split.shards[entry["shard"]].path.open("r+b") as file:
        file.seek(int(entry["offset"]))
        file.write(bytes(int(entry["size"])))
    loader = open_train(dataset, backend)
    parts = list(evaluation_parts(len(split), 4, 0, 1))
    with pytest.raises(ValueError, match="cannot decode"):
        list(loader.batches(parts))
    assert len(list(loader.batches(parts[:3]))) == 3
    loader.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentation": "mixup"}, "augmentation must be one of none, flip, .* got 'mixup'"),
        ({"backend": "ffcv"}, "backend must be dali, torch or synthetic, got 'ffcv'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"color_jitter": 1.0}, r"color_jitter must be in 0\.\.1, 1 excluded, got 1\.0"),
        ({"on_error": "ignore"}, "on_error must be stop or skip, got 'ignore'"),
    ],
)
def test_bad_settings(dataset: Dataset, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_train(dataset, **{"backend": "dali", **settings})  # type: ignore[arg-type]


def test_a_part_larger_than_the_batch_size_is_refused(dataset: Dataset, backend: str) -> None:
    loader = open_train(dataset, backend, batch_size=4)
    with pytest.raises(ValueError, match="batch_size must hold the largest part, got 4 and 5"):
        next(loader.batches(evaluation_parts(27, 5, 0, 1)))
    loader.close()
