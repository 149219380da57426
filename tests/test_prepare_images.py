import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from data_sets import jpeg, make_folder, picture, run_prepare, stored
from PIL import Image

from pipelines.prepare import Options, prepare


def encoded(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000)))
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_bad_files_are_skipped_and_listed(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    bad = {
        "cat/zero.jpg": (b"", "zero bytes"),
        "cat/cut.jpg": (jpeg(1)[:-300], "truncated"),
        "dog/page.jpg": (b"<html>502 Bad Gateway</html>", "not an image"),
        "dog/bomb.png": (bomb(60_000), "more than 100000000 pixels"),
        "dog/small-bomb.png": (bomb(11_000), "11000 x 11000 pixels, more than 100000000"),
        "owl/notes.txt": (b"to do", "not an image"),
        "owl/cut.png": (encoded(Image.fromarray(picture(1)), "PNG")[:-900], "cannot be decoded"),
    }
    for name, (data, _) in bad.items():
        (source / name).write_bytes(data)
    (source / "owl" / "link.jpg").symlink_to("nowhere")
    os.mkfifo(source / "owl" / "pipe.jpg")
    result = run_prepare(source, tmp_path / "data", "size=0", "shard_size=10")
    assert result.returncode == 0, result.stderr
    assert "8 files skipped" in result.stdout
    assert len(stored(tmp_path / "data")) == 36
    rejected = json.loads((tmp_path / "data" / "manifest.json").read_text())["rejected"]
    reasons = {entry["name"]: entry["reason"] for entry in rejected}
    assert set(reasons) == {*bad, "owl/link.jpg"}
    assert all(reason in reasons[name] for name, (_, reason) in bad.items()), reasons
    assert reasons["owl/link.jpg"] == "No such file or directory"
    strict = run_prepare(source, tmp_path / "strict", "size=0", "strict=true")
    assert strict.returncode == 2
    assert any(f"{name}: " in strict.stderr for name in reasons)
    assert not (tmp_path / "strict").exists()


def test_only_bad_files_make_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "source" / "cat").mkdir(parents=True)
    (tmp_path / "source" / "cat" / "a.jpg").write_bytes(b"text")
    result = run_prepare(tmp_path / "source", tmp_path / "data")
    assert result.returncode == 2
    assert "no training image; 1 files were skipped, the first because: not an image" in result.stderr
    assert not list(tmp_path.glob("data*"))


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    rgb = Image.fromarray(picture(3, 40, 40))
    grey = rgb.convert("L")
    alpha = rgb.copy()
    alpha.putalpha(Image.new("L", rgb.size, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    files = {
        "grey.png": (encoded(grey, "PNG"), grey),
        "grey.jpg": (encoded(grey, "JPEG", quality=95), grey),
        "cmyk.jpg": (encoded(rgb.convert("CMYK"), "JPEG", quality=95), rgb),
        "palette.png": (encoded(rgb.quantize(256), "PNG"), rgb.quantize(256)),
        "bits.png": (encoded(grey.convert("1"), "PNG"), grey.convert("1")),
        "deep.png": (encoded(Image.fromarray(np.asarray(grey, np.uint16) * 257), "PNG"), grey),
        "clear.png": (encoded(alpha, "PNG"), Image.new("RGB", rgb.size, "white")),
        "grey-clear.png": (encoded(alpha.convert("LA"), "PNG"), Image.new("L", rgb.size, "white")),
        "turned.jpg": (encoded(rgb.rotate(90), "JPEG", quality=95, exif=exif), rgb),
        "plain.webp": (encoded(rgb, "WEBP", lossless=True), rgb),
        "first.gif": (encoded(rgb.quantize(256), "GIF"), rgb.quantize(256)),
    }
    (tmp_path / "source" / "all").mkdir(parents=True)
    for name, (data, _) in files.items():
        (tmp_path / "source" / "all" / name).write_bytes(data)
    prepare(str(tmp_path / "source"), tmp_path / "data", Options(size=0, quality=95, processes=1))
    samples = stored(tmp_path / "data")
    assert len(samples) == len(files)
    for name, (_, expected) in files.items():
        image = Image.open(io.BytesIO(samples[f"all/{name}"][0]))
        assert image.mode in ("RGB", "L")
        difference = np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(expected.convert("RGB"), float))
        # Dots of a palette or of black and white are what JPEG keeps worst.
        assert difference.mean() < (8 if name in ("bits.png", "palette.png", "first.gif") else 3), name


def test_crop_keeps_the_shape_of_things(tmp_path: Path) -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = picture(5, 40, 40)
    (tmp_path / "source" / "all").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "source" / "all" / "wide.png")
    for resampling in ("lanczos", "area"):
        options = Options(size=20, mode="crop", filter=resampling, quality=95, processes=1)  # type: ignore[arg-type]
        prepare(str(tmp_path / "source"), tmp_path / resampling, options)
        image = Image.open(io.BytesIO(stored(tmp_path / resampling)["all/wide.png"][0]))
        assert image.size == (20, 20)
        expected = picture(5, 40, 40).reshape(20, 2, 20, 2, 3).mean(axis=(1, 3))
        assert np.abs(np.asarray(image, float) - expected).mean() < 5
