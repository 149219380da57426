import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import imagenet, make_data_set
from PIL import Image

from pipelines import (
    Dataset,
    Loader,
    LoaderConfig,
    LocalBatch,
    Sampler,
    augment,
    evaluation_batches,
    open_dataset,
    open_loader,
)
from pipelines.loaders.reader import Files

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
    return open_loader(dataset.splits["train"], LoaderConfig(**given))  # type: ignore[arg-type]


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
    given = list(evaluation_batches(len(split), 16, 0, 1))
    for expected, (local_batch, images, labels) in zip(given, loader.batches(iter(given)), strict=True):
        assert local_batch is expected
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_allclose(pixels(dataset, images), decoded(dataset, local_batch.samples), atol=1.01)
        np.testing.assert_array_equal(labels.numpy(), split.labels[local_batch.samples])
        seen.append(len(labels))
    assert sum(seen) == len(split) == 27
    loader.close()


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_pixels_do_not_depend_on_world_size_or_start(dataset: Dataset, backend: str, augmentation: str) -> None:
    sampler = Sampler(len(dataset.splits["train"]), 8, seed=2)
    loader = open_train(dataset, backend, augmentation)
    whole = [images for _, images, _ in loader.batches(sampler.local_batches(1, 0, 1))]
    for size in (2, 3, 8):
        ranks = [
            [images for _, images, _ in loader.batches(sampler.local_batches(1, rank, size))] for rank in range(size)
        ]
        for step, images in enumerate(whole):
            assert torch.equal(torch.cat([batches[step] for batches in ranks]), images)
    for start in range(sampler.steps):
        rest = [images for _, images, _ in loader.batches(sampler.local_batches(1, 0, 1, start))]
        assert all(torch.equal(images, expected) for images, expected in zip(rest, whole[start:], strict=True))
    loader.close()


def test_flip_mirrors_about_half(dataset: Dataset, backend: str) -> None:
    loader = open_train(dataset, backend, "flip")
    local_batch = next(evaluation_batches(27, 27, 0, 1))
    images = pixels(dataset, next(loader.batches([local_batch]))[1])
    plain = decoded(dataset, local_batch.samples).astype(float)
    mirrored = [bool(np.abs(image - stored[:, ::-1]).max() < 2) for image, stored in zip(images, plain, strict=True)]
    upright = [bool(np.abs(image - stored).max() < 2) for image, stored in zip(images, plain, strict=True)]
    assert all(a != b for a, b in zip(mirrored, upright, strict=True))
    assert 5 <= sum(mirrored) <= 22
    loader.close()


@pytest.mark.parametrize("pad", [1, 4])
def test_crop_is_a_shift_with_zeros_entering(dataset: Dataset, backend: str, pad: int) -> None:
    loader = open_train(dataset, backend, f"crop{pad}_flip")
    local_batch = next(evaluation_batches(27, 27, 0, 1))
    images = pixels(dataset, next(loader.batches([local_batch]))[1])
    shifts = set()
    for image, stored in zip(images, decoded(dataset, local_batch.samples), strict=True):
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


def test_empty_local_batches_kept_tensors_and_abandoned_iterations(dataset: Dataset, backend: str) -> None:
    split = dataset.splits["train"]
    loader = open_train(dataset, backend, "crop4_flip")
    nothing = LocalBatch(0, 0, np.arange(0), np.arange(0), 3)
    local_batches = [nothing, *evaluation_batches(len(split), 4, 0, 1), nothing]
    batches = list(loader.batches(local_batches))
    copies = [images.clone() for _, images, _ in batches]
    assert batches[0][1].shape == (0, 3, 32, 32)
    assert batches[-1][2].shape == (0,)
    abandoned = loader.batches(local_batches)
    for _ in range(3):
        next(abandoned)
    again = list(loader.batches(local_batches))
    for (_, images, _), copy, (_, other, _) in zip(batches, copies, again, strict=True):
        assert torch.equal(images, copy)
        assert torch.equal(other, copy)
    with pytest.raises(RuntimeError, match="ended when another one"):
        next(abandoned)
    loader.close()


def test_stored_images_of_another_size_are_resized(tmp_path: Path, backend: str) -> None:
    dataset = make_data_set(tmp_path, per_class=4, height=40, width=56)
    loader = open_train(dataset, backend, "none")
    local_batch = next(evaluation_batches(len(dataset.splits["train"]), 16, 0, 1))
    images = pixels(dataset, next(loader.batches([local_batch]))[1])
    for image, stored in zip(images, decoded(dataset, local_batch.samples), strict=True):
        expected = Image.fromarray(stored).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(image, np.asarray(expected), atol=1.6)
    loader.close()


def test_a_damaged_sample_stops_the_iteration_but_not_the_loader(tmp_path: Path, backend: str) -> None:
    dataset = make_data_set(tmp_path)
    split = dataset.splits["train"]
    entry = split.index[20]
    with split.shards[entry["shard"]].path.open("r+b") as file:
        file.seek(int(entry["offset"]))
        file.write(bytes(int(entry["size"])))
    loader = open_train(dataset, backend)
    local_batches = list(evaluation_batches(len(split), 4, 0, 1))
    with pytest.raises(ValueError, match="cannot decode"):
        list(loader.batches(local_batches))
    assert len(list(loader.batches(local_batches[:3]))) == 3
    loader.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentation": "mixup"}, "augmentation must be one of none, flip, .* got 'mixup'"),
        ({"backend": "ffcv"}, "backend must be dali, torch, resident, webdataset or synthetic, got 'ffcv'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"color_jitter": 1.0}, r"color_jitter must be in 0\.\.1, 1 excluded, got 1\.0"),
        ({"on_error": "ignore"}, "on_error must be stop or skip, got 'ignore'"),
    ],
)
def test_bad_settings(dataset: Dataset, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_train(dataset, **{"backend": "dali", **settings})  # type: ignore[arg-type]


def test_a_local_batch_larger_than_the_batch_size_is_refused(dataset: Dataset, backend: str) -> None:
    loader = open_train(dataset, backend, batch_size=4)
    with pytest.raises(ValueError, match="batch_size must hold the largest local batch, got 4 and 5"):
        next(loader.batches(evaluation_batches(27, 5, 0, 1)))
    loader.close()


@pytest.mark.parametrize(
    ("augmentation", "size"), [("random_resized_crop", 32), ("random_resized_crop", 20), ("center_crop", 24)]
)
def test_boxes_are_resized_as_pillow_does(tmp_path: Path, backend: str, augmentation: str, size: int) -> None:
    dataset = make_data_set(tmp_path, per_class=8, height=48, width=40)
    local_batch = next(evaluation_batches(len(dataset.splits["train"]), 32, 0, 1))
    loader = open_train(dataset, backend, augmentation, size=size)
    images = pixels(dataset, next(loader.batches([local_batch]))[1])
    sides = np.full(len(local_batch.samples), 48, np.int32), np.full(len(local_batch.samples), 40, np.int32)
    geometry = augment.draw(augment.AUGMENTATIONS[augmentation], 5, local_batch.epoch, local_batch.positions, *sides)
    for row, (image, stored) in enumerate(zip(images, decoded(dataset, local_batch.samples), strict=True)):
        (y, x), (height, width) = geometry.anchor[row].tolist(), geometry.shape[row].tolist()
        box = Image.fromarray(stored[y : y + height, x : x + width])
        expected = np.asarray(box.resize((size, size), Image.Resampling.BILINEAR), float)
        expected = expected[:, ::-1] if geometry.mirror[row] else expected
        # One level for rounding, one for the chroma at the edge of a box decoded on its own. At the border of an image
        # that shrinks, DALI repeats the last pixel where Pillow leaves it off.
        np.testing.assert_allclose(image[2:-2, 2:-2], expected[2:-2, 2:-2], atol=2.01)
        np.testing.assert_allclose(image, expected, atol=12)
    loader.close()


def test_color_jitter_is_an_affine_map_clipped(dataset: Dataset, backend: str) -> None:
    local_batch = next(evaluation_batches(27, 32, 0, 1))
    loader = open_train(dataset, backend, "none", color_jitter=0.5)
    images = pixels(dataset, next(loader.batches([local_batch]))[1])
    jitter = 1 + 0.5 * (2 * augment.uniform(5, 0, local_batch.positions)[:, 24:27] - 1)
    for image, stored, (brightness, contrast, saturation) in zip(
        images, decoded(dataset, local_batch.samples).astype(float), jitter, strict=True
    ):
        luma = (stored @ [0.299, 0.587, 0.114])[..., None]
        expected = (contrast * (saturation * stored + (1 - saturation) * luma - 128) + 128) * brightness
        np.testing.assert_allclose(image, np.clip(np.rint(expected), 0, 255), atol=1.01)
    assert len(np.unique(jitter)) == jitter.size
    loader.close()


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("color_jitter", [0.0, 0.3])
def test_the_two_backends_agree(
    augmentation: str, color_jitter: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dataset = open_dataset(imagenet(tmp_path_factory))
    sampler = Sampler(len(dataset.splits["train"]), 50, seed=1)
    settings = {"size": 112, "batch_size": 50, "color_jitter": color_jitter}
    loaders = [open_train(dataset, backend, augmentation, **settings) for backend in ("dali", "torch")]
    for (_, images, labels), (_, others, other_labels) in zip(
        *(loader.batches(sampler.local_batches(0, 0, 1)) for loader in loaders), strict=True
    ):
        assert torch.equal(labels, other_labels)
        difference = np.abs(pixels(dataset, images) - pixels(dataset, others))
        # Two roundings (resize, colours) of at most one level, the first stretched by contrast and brightness.
        assert difference.max() < (2.01 if color_jitter == 0 else 5.01)
        assert difference.mean() < 0.3
    for loader in loaders:
        loader.close()


def damage(dataset: Dataset, sample: int, data: bytes) -> None:
    """Overwrites the first bytes of a stored image, or cuts it short by filling its end with zeros."""
    entry = dataset.splits["train"].index[sample]
    with dataset.splits["train"].shards[entry["shard"]].path.open("r+b") as file:
        file.seek(int(entry["offset"]))
        file.write(data[: int(entry["size"])])


@pytest.mark.parametrize("augmentation", ["none", "random_resized_crop"])
def test_skip_puts_the_same_substitute_at_any_world_size(tmp_path: Path, backend: str, augmentation: str) -> None:
    dataset = make_data_set(tmp_path)
    split = dataset.splits["train"]
    damage(dataset, 4, bytes(10_000))
    damage(dataset, 5, b"<html>502 Bad Gateway</html>")
    damage(dataset, 26, b"")
    entry = split.index[26]
    with split.shards[entry["shard"]].path.open("r+b") as file:  # the tar header before the image
        file.seek(int(entry["offset"]) - 512)
        file.write(bytes(512))
    sampler = Sampler(len(split), 8, seed=2)
    loader = open_train(dataset, backend, augmentation, on_error="skip")
    whole = list(loader.batches(sampler.local_batches(0, 0, 1)))
    assert sorted(loader.skipped) == [4, 5, 26]
    assert "cannot decode" in loader.skipped[4]
    assert "index and shard disagree" in loader.skipped[26]
    substitute = {4: 6, 5: 6, 26: 0}
    seen = [substitute.get(sample, sample) for sample in sampler.at(0, np.arange(sampler.samples)).tolist()]
    assert torch.equal(torch.cat([labels for _, _, labels in whole]), torch.from_numpy(split.labels[seen]))
    if augmentation == "none":
        expected = decoded(dataset, np.array(seen))
        np.testing.assert_allclose(pixels(dataset, torch.cat([images for _, images, _ in whole])), expected, atol=1.01)
    for size in (2, 3, 8):
        ranks = [list(loader.batches(sampler.local_batches(0, rank, size))) for rank in range(size)]
        for step, (_, images, labels) in enumerate(whole):
            assert torch.equal(torch.cat([batches[step][1] for batches in ranks]), images)
            assert torch.equal(torch.cat([batches[step][2] for batches in ranks]), labels)
    loader.close()


def test_an_image_smaller_than_in_its_index_is_reported(dataset: Dataset) -> None:
    index = dataset.splits["train"].index.copy()
    index["height"][3] += 4
    split = replace(dataset.splits["train"], index=index)
    loader = open_train(replace(dataset, splits={"train": split}), "torch")
    with pytest.raises(ValueError, match=f"cannot decode {split.where(3)}: it is 32 x 32 by its header, 36 x 32 in"):
        list(loader.batches(evaluation_batches(len(split), 16, 0, 1)))


def test_skip_ends_when_too_much_is_damaged(tmp_path: Path, backend: str) -> None:
    dataset = make_data_set(tmp_path)
    for sample in range(12):
        damage(dataset, sample, bytes(10_000))
    loader = open_train(dataset, backend, on_error="skip")
    with pytest.raises(ValueError, match=r"11 of 27 samples cannot be decoded, more than on_error=skip allows"):
        list(loader.batches(evaluation_batches(27, 8, 0, 1)))
    loader.close()


def test_skip_does_not_hide_a_missing_shard(tmp_path: Path, backend: str) -> None:
    dataset = make_data_set(tmp_path)
    dataset.splits["train"].shards[2].path.unlink()
    loader = open_train(dataset, backend, on_error="skip")
    with pytest.raises(ValueError, match=r"cannot read .*000002\.tar, sample .*No such file"):
        list(loader.batches(evaluation_batches(27, 8, 0, 1)))
    loader.close()


def test_a_stalled_mount_is_an_error(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_data_set(tmp_path)
    shard = dataset.splits["train"].shards[1].path
    shard.unlink()
    os.mkfifo(shard)  # opening it waits for a writer that never comes
    monkeypatch.setattr("pipelines.loaders.reader.STALL_SECONDS", 0.2)
    loader = open_train(dataset, backend, on_error="skip")
    with pytest.raises(ValueError, match=r"waiting at .*000001\.tar, sample .*; is a disk or network mount stalled\?"):
        list(loader.batches(evaluation_batches(27, 27, 0, 1)))
    with shard.open("wb"):  # lets the waiting threads go
        loader.close()


def test_synthetic_batches_have_the_shapes_and_labels_of_the_local_batches(dataset: Dataset) -> None:
    loader = open_train(dataset, "synthetic")
    local_batches = [LocalBatch(0, 0, np.arange(0), np.arange(0), 3), *Sampler(27, 10, 0).local_batches(0, 0, 1)]
    for expected, (local_batch, images, labels) in zip(local_batches, loader.batches(local_batches), strict=True):
        assert local_batch is expected
        assert images.shape == (len(local_batch.samples), 3, 32, 32)
        np.testing.assert_array_equal(labels.numpy(), dataset.splits["train"].labels[local_batch.samples])
    loader.close()


def test_memory_is_used_again_only_when_the_tensor_is_gone(dataset: Dataset) -> None:
    loader = open_train(dataset, "torch", "flip", prefetch=1)
    local_batches = list(Sampler(27, 3, 0).local_batches(0, 0, 1))
    addresses = [images.data_ptr() for _, images, _ in loader.batches(local_batches)]
    assert len(set(addresses)) < len(local_batches)
    kept = [images[:1] for _, images, _ in loader.batches(local_batches)]
    assert len({images.data_ptr() for images in kept}) == len(local_batches)
    loader.close()


@pytest.mark.parametrize("missing", ["nvidia.dali", "simplejpeg"])
def test_a_backend_needs_only_its_own_libraries(dataset: Dataset, missing: str) -> None:
    other, own = ("torch", "dali") if missing == "nvidia.dali" else ("dali", "torch")
    script = f"""
import sys; sys.modules["{missing}"] = None; sys.modules["{missing.split(".")[0]}"] = None
import torch, pipelines
data = pipelines.open_dataset({str(dataset.path)!r})
more = dict(size=32, mean=data.mean, std=data.std, batch_size=8, device=torch.device("cpu"))
loader = pipelines.open_loader(data.splits["train"], pipelines.LoaderConfig(backend="{other}", **more))
print(next(loader.batches(pipelines.evaluation_batches(8, 8, 0, 1)))[1].shape)
try: pipelines.open_loader(data.splits["train"], pipelines.LoaderConfig(backend="{own}", **more))
except ValueError as error: print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert "torch.Size([8, 3, 32, 32])" in result.stdout, result.stderr
    assert f"backend {own} needs the module" in result.stdout
