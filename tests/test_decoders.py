"""Every kind of JPEG against every backend: one picture for all, or none."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from data_sets import stored
from jpegs import PIXELS, SIDE, encode, kinds, segment, segments
from PIL import Image

from pipelines import Dataset, LoaderConfig, evaluation_batches, open_dataset, open_loader
from pipelines.format.image_header import sides
from pipelines.format.jpeg import is_plain, without_metadata
from pipelines.loaders.decode import decode
from pipelines.loaders.reader import Files, SampleError
from pipelines.prepare import Options, prepare
from pipelines.verify import DaliDecoder, _faults, verify

ORDINARY, ODD, BROKEN = kinds()
UNLIKE = {"text mode", "flipped bit", "no picture beside YCCK", "components R G B, but JFIF", "restarts out of order"}
ALL = {**ORDINARY, **ODD, **BROKEN}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def grey_levels(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds, prepared with size=0."""
    root = tmp_path_factory.mktemp("kinds")
    (root / "in" / "all").mkdir(parents=True)
    for name, data in ALL.items():
        (root / "in" / "all" / f"{name}.jpg").write_bytes(data)
    prepare(str(root / "in"), root / "out", Options(size=0, quality=95, processes=1))
    return root / "out"


@pytest.fixture(scope="module")
def kept(prepared: Path) -> dict[str, bytes]:
    return {name[4:-4]: data for name, (data, _) in stored(prepared).items()}


def test_prepare_keeps_every_picture_and_lists_the_rest(prepared: Path, kept: dict[str, bytes]) -> None:
    assert kept.keys() == {**ORDINARY, **ODD}.keys()
    rejected = json.loads((prepared / "manifest.json").read_text())["rejected"]
    assert {entry["name"][4:-4] for entry in rejected} == BROKEN.keys()
    assert all(entry["reason"] and "\n" not in entry["reason"] for entry in rejected)
    for name in kept.keys() - UNLIKE:
        expected = np.asarray(Image.fromarray(PIXELS).convert("L" if "grey" in name else "RGB").convert("RGB"))
        assert grey_levels(decode(kept[name]), expected) < 8, name


def test_ordinary_jpegs_are_kept_to_the_byte(kept: dict[str, bytes]) -> None:
    assert [name for name, data in ORDINARY.items() if kept[name] != data] == []


def test_what_prepare_keeps_every_decoder_decodes_alike(kept: dict[str, bytes]) -> None:
    dali = DaliDecoder()
    for name, data in kept.items():
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        others = {
            "simplejpeg": simplejpeg.decode_jpeg(data),  # an error for any warning
            "OpenCV": cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
            "DALI": dali.decode(data),
            "torch": decode(data),
        }
        for decoder, pixels in others.items():
            np.testing.assert_array_equal(pixels, expected, f"{name}: {decoder}")


def test_a_kind_that_is_not_kept_keeps_its_pixels_nearly(kept: dict[str, bytes]) -> None:
    for name in ODD.keys() - UNLIKE:
        assert grey_levels(decode(kept[name]), np.asarray(Image.open(io.BytesIO(ODD[name])).convert("RGB"))) < 4, name


def test_verify_passes_what_prepare_keeps(prepared: Path) -> None:
    assert list(verify(prepared, processes=1)) == []


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Shards that were made elsewhere, with all kinds; the label of each is its number."""
    folder = tmp_path_factory.mktemp("others")
    with tarfile.open(folder / "train.tar", "w") as archive:
        for number, data in enumerate(ALL.values()):
            for extension, content in (("jpg", data), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return open_dataset(folder)


@pytest.mark.parametrize("augmentation", ["none", "random_resized_crop"])
def test_the_backends_agree_on_others_shards(others: Dataset, augmentation: str) -> None:
    seen, skipped = [], []
    for backend in ("dali", "torch"):
        config = LoaderConfig(
            backend=backend,  # type: ignore[arg-type]
            augmentation=augmentation,
            size=SIDE,
            mean=(0, 0, 0),
            std=(1 / 255,) * 3,  # type: ignore[arg-type]
            batch_size=len(ALL),
            device=torch.device("cpu"),
            on_error="skip",
        )
        loader = open_loader(others.splits["train"], config)
        ((_, images, labels),) = loader.batches(evaluation_batches(len(ALL), len(ALL), 0, 1))
        seen.append((images.numpy(), labels.tolist()))
        skipped.append({list(ALL)[sample] for sample in loader.skipped})
        loader.close()
    (dali, dali_labels), (other, other_labels) = seen
    assert skipped == [set(BROKEN), set(BROKEN)]
    assert dali_labels == other_labels
    apart = np.abs(dali - other)
    if augmentation == "none":  # no resizing; Pillow and OpenCV round CMYK differently
        assert {name: float(most) for name, most in zip(ALL, apart.max(axis=(1, 2, 3)), strict=True) if most > 1} == {}
    else:
        assert {name: float(mean) for name, mean in zip(ALL, apart.mean(axis=(1, 2, 3)), strict=True) if mean > 2} == {}


def test_verify_finds_what_no_backend_decodes(others: Dataset) -> None:
    faults = list(verify(others.path, processes=1))
    split = others.splits["train"]
    broken = [split.where(sample) for sample, name in enumerate(ALL) if name in BROKEN]
    assert len(faults) == len(broken)
    assert all(f"cannot decode {where}" in fault for where, fault in zip(broken, faults, strict=True))


def test_verify_compares_the_backends(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_dataset(prepared).splits["train"]
    decoded, calls = DaliDecoder.decode, []

    def changed(self: DaliDecoder, encoded: bytes) -> np.ndarray:
        calls.append(encoded)
        if len(calls) == 4:
            raise SampleError("damaged")
        pixels = decoded(self, encoded)
        return {2: 255 - pixels, 3: pixels[1:]}.get(len(calls), pixels)

    monkeypatch.setattr(DaliDecoder, "decode", changed)
    faults = [fault for fault in _faults((split, "")) if "SHA-256" not in fault]
    assert faults == [
        f"{split.where(1)}: the backends dali and torch decode different pixels",
        f"{split.where(2)}: the backends dali and torch decode different pixels",
        f"cannot decode {split.where(3)} with the backend dali: damaged",
    ]


# Headers --------------------------------------------------------------------------------------------------------------


def long_header(length: int) -> bytes:
    """The picture behind so many bytes of a colour profile or other segments."""
    jpeg, noise = ORDINARY["4:2:0"], np.random.default_rng(0).bytes(length)
    profile = b"".join(segment(0xE2, noise[start : start + 65000]) for start in range(0, length, 65000))
    return jpeg[:2] + profile + jpeg[2:]


@pytest.mark.parametrize("length", [60_000, 65_530, 131_000, 500_000, 3_000_000])
def test_a_header_is_read_on_until_the_size_is_known(tmp_path: Path, length: int) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, data in enumerate((ORDINARY["4:2:0"], long_header(length))):
            for extension, content in (("jpg", data), ("cls", b"0")):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    split = open_dataset(tmp_path).splits["train"]
    assert split.index["height"].tolist() == [SIDE, SIDE]
    assert split.index["width"].tolist() == [SIDE, SIDE]
    assert without_metadata(Files(split, 1).read(1)) == ORDINARY["4:2:0"]


def test_no_size_is_not_a_size(tmp_path: Path) -> None:
    images = [
        b"",
        b"no image",
        b"\xff\xd8",
        BROKEN["no lines"],
        BROKEN["cut"][:40],
        b"\x89PNG\r\n\x1a\n",
        bytes(70_000),
    ]
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, data in enumerate(images):
            for extension, content in (("jpg", data), ("cls", b"0")):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    split = open_dataset(tmp_path).splits["train"]
    assert split.index["height"].min() > 0
    assert split.index["width"].min() > 0
    files = Files(split, 1)
    for sample in range(len(images)):
        with pytest.raises(SampleError, match=r"train\.tar, sample \d at byte"):
            files.read(sample)


def test_plain_is_what_the_headers_say() -> None:
    assert [name for name, data in ORDINARY.items() if not is_plain(data)] == []
    for name in ("RGB", "CMYK", "CMYK, plain", "arithmetic", "zero byte", "length 0", "12 bits", "lossless", "cut in"):
        assert not is_plain(ALL.get(name, BROKEN["cut"][:200])), name


def test_any_beginning_of_a_jpeg_is_taken_without_an_error() -> None:
    for data in (ORDINARY["progressive"], ODD["CMYK"], ODD["YCbCr by both"], ARITHMETIC_AND_TEXT):
        for end in range(len(data)):
            assert without_metadata(data[:end]) is None or end == len(data)
            assert sides(data[:end]) in ((0, 0), (SIDE, SIDE))


ARITHMETIC_AND_TEXT = ODD["arithmetic"][:20] + segment(0xFE, b"text") + ODD["arithmetic"][20:]


# Metadata -------------------------------------------------------------------------------------------------------------


def test_without_metadata_the_coded_data_is_the_same() -> None:
    for name, data in ORDINARY.items():
        app0 = segments(data)[0][2] if name != "no JFIF" else 2
        thumbnail = data[:2] + segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\2\2" + b"secret thumb") + data[app0:]
        for more in (
            segment(0xE1, b"Exif\0\0secret"),
            segment(0xFE, b"secret") * 3,
            segment(0xE2, b"ICC_PROFILE\0\1\1secret"),
            segment(0xED, b"Photoshop 3.0\0secret"),
            segment(0xE0, b"JFXX\0\x10secret"),
        ):
            assert without_metadata(data[:app0] + more + data[app0:]) == data, name
            end = len(data) - 2
            assert without_metadata(data[:end] + more + data[end:] + b"secret") == data, name
        if name != "no JFIF":
            assert without_metadata(thumbnail) == data, name
    assert b"secret" not in (without_metadata(encode(Image.fromarray(PIXELS), comment=b"secret")) or b"secret")
