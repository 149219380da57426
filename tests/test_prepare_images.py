import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import jpeg, make_folder, picture, run_prepare, stored
from jpegs import segment
from PIL import Image, ImageOps, PngImagePlugin

from pipelines.format.writer import StoredImage
from pipelines.prepare import Options, convert, images, prepare
from pipelines.prepare.archives import Item


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
        "owl/notes.jpeg": (b"to do", "not an image"),
        "owl/cut.png": (encoded(Image.fromarray(picture(1)), "PNG")[:-900], "cannot be decoded"),
    }
    for name, (data, _) in bad.items():
        (source / name).write_bytes(data)
    (source / "owl" / "notes.txt").write_text("to do")
    (source / "owl" / "link.jpg").symlink_to("nowhere")
    os.mkfifo(source / "owl" / "pipe.jpg")
    result = run_prepare(source, tmp_path / "data", "size=0", "shard_size=10")
    assert result.returncode == 0, result.stderr
    assert "10 files skipped" in result.stdout
    assert len(stored(tmp_path / "data")) == 36
    rejected = json.loads((tmp_path / "data" / "manifest.json").read_text())["rejected"]
    reasons = {entry["name"]: entry["reason"] for entry in rejected}
    assert set(reasons) == {*bad, "owl/link.jpg", "owl/pipe.jpg"}
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


# Orientation ----------------------------------------------------------------------------------------------------------


def exif(orientation: bytes, *entries: bytes, after: bytes = b"") -> bytes:
    """EXIF with an entry Orientation and others, little-endian."""
    table = [orientation, *entries]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(table)) + b"".join(table) + bytes(4) + after


def entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


ODD_ENTRIES = {
    "plain": [],
    "resolution unit too large": [entry(0x0128, 4, 1, 70000)],
    "long for a short": [entry(0x0103, 4, 1, 1 << 31)],
    "unknown type": [entry(0x010E, 99, 4, 0)],
    "text beyond the end": [entry(0x010E, 2, 5000, 100000)],
    "as many as there can be": [entry(0x0110, 5, 0xFFFFFFFF, 26)],
    "rational by zero": [entry(0x011A, 5, 1, 8)],
    "negative": [entry(0x0103, 9, 1, 0xFFFFFFFF)],
    "a table that is itself": [entry(0x8769, 4, 1, 8), entry(0x8825, 4, 1, 8)],
    "a table beyond the end": [entry(0x8769, 4, 1, 90000)],
    "tag 0": [entry(0, 0, 0, 0)],
    "floating point": [entry(0x9201, 12, 3, 60)],
    "text for a number": [entry(0x0100, 2, 4, 0x41424344)],
}


def test_an_image_is_turned_by_its_orientation_alone(tmp_path: Path) -> None:
    """Whatever else its EXIF holds."""
    (tmp_path / "source" / "all").mkdir(parents=True)
    wide = Image.fromarray(picture(30, 24, 40))
    expected = {}
    for orientation in range(10):
        plain = Image.Exif()
        plain[0x0112] = orientation
        reference = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(wide, "JPEG", quality=95, exif=plain))))
        for name, entries in ODD_ENTRIES.items():
            data = exif(entry(0x0112, 3, 1, orientation), *entries)
            file = tmp_path / "source" / "all" / f"{orientation} {name}.jpg"
            file.write_bytes(encoded(wide, "JPEG", quality=95, exif=data))
            expected[f"all/{file.name}"] = reference
    prepare(str(tmp_path / "source"), tmp_path / "data", Options(size=0, quality=95, processes=1))
    samples = stored(tmp_path / "data")
    assert samples.keys() == expected.keys()
    for name, (data, _) in samples.items():
        image = Image.open(io.BytesIO(data))
        assert image.size == expected[name].size, name
        assert np.abs(np.asarray(image, float) - np.asarray(expected[name], float)).mean() < 3, name


def test_an_orientation_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "source" / "all").mkdir(parents=True)
    wide = Image.fromarray(picture(30, 24, 40))
    blocks = {
        "cut": exif(entry(0x0112, 3, 1, 6))[:-9],
        "no table": b"Exif\0\0II*\0\xff\xff\0\0",
        "empty": b"Exif\0\0",
        "no order": b"Exif\0\0XX*\0\x08\0\0\0" + bytes(20),
        "text": exif(entry(0x0112, 2, 4, 0x41424344)),
        "several": exif(entry(0x0112, 3, 2, 0x00060006)),
        "huge": exif(entry(0x0112, 4, 1, 0xFFFFFFFF)),
        "rational": exif(entry(0x0112, 5, 1, 26), after=bytes(8)),
    }
    for name, block in blocks.items():
        (tmp_path / "source" / "all" / f"{name}.jpg").write_bytes(encoded(wide, "JPEG", exif=block))
    prepare(str(tmp_path / "source"), tmp_path / "data", Options(size=0, processes=1))
    samples = stored(tmp_path / "data")
    assert len(samples) == len(blocks)
    assert {Image.open(io.BytesIO(data)).size for data, _ in samples.values()} <= {(40, 24), (24, 40)}


def test_odd_segments_do_not_matter(tmp_path: Path) -> None:
    """What starts as metadata of some kind and is noise behind keeps no JPEG out, and is not stored."""
    plain = encoded(Image.fromarray(picture(12)), "JPEG", quality=95)
    beginnings = [
        *((0xE0, text) for text in (b"JFIF\0", b"JFXX\0", b"AVI1")),
        *((0xE1, text) for text in (b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08", b"http://ns.adobe.com/xap/1.0/\0")),
        *((0xE2, text) for text in (b"ICC_PROFILE\0", b"MPF\0II*\0\x08\0\0\0", b"MPF\0MM\0*\0\0\0\x08\0\4", b"FPXR\0")),
        *((0xED, text) for text in (b"Photoshop 3.0\0", b"Photoshop 3.0\08BIM\4\4")),
        *((0xEE, b"Adob"), (0xFE, b""), (0xEC, b"Ducky"), (0xE3, b"Meta")),
    ]  # fmt: skip
    random, files = np.random.default_rng(0), {}
    for marker, text in beginnings:
        for number in range(12):
            length, levels = int(random.integers((4, 20, 100, 2000)[number % 4])), (256, 8)[number % 2]
            noise = random.integers(0, levels, length).astype(np.uint8).tobytes()
            files[f"{marker}-{len(files)}"] = plain[:20] + segment(marker, text + noise) + plain[20:]
    results = list(convert.convert(items(tmp_path, files), Options(size=0, processes=1), NoBar()))
    stored_as_is = [isinstance(result, StoredImage) and result.image == plain for result in results]
    assert [name for name, good in zip(files, stored_as_is, strict=True) if not good] == []


# Faults of one file ---------------------------------------------------------------------------------------------------


class NoBar:
    def update(self) -> None:
        pass


def items(folder: Path, files: dict[str, bytes]) -> list[Item]:
    found = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        found.append(Item(name, str(folder / name), 0, len(data), "train", 0))
    return found


ERRORS = [
    *(struct.error("unpack requires 4 bytes"), OSError(5, "broken"), MemoryError(), RecursionError("too deep\nby far")),
    *(TypeError("NoneType"), SyntaxError("not a TIFF"), OverflowError("too large"), KeyError(7), AssertionError()),
]


@pytest.mark.parametrize("step", ["open_image", "kept", "plain", "square", "jpeg", "moments"])
def test_whatever_is_raised_of_a_file_is_its_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    work, calls = getattr(images, step), []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) <= len(ERRORS):
            raise ERRORS[len(calls) - 1]
        return work(*arguments)

    monkeypatch.setattr(images, step, failing)
    files = {f"{number}.png": encoded(Image.fromarray(picture(number)), "PNG") for number in range(len(ERRORS) + 1)}
    options = Options(size=0 if step == "kept" else 16, processes=1)
    *faults, last = convert.convert(items(tmp_path, files), options, NoBar())
    assert isinstance(last, StoredImage)
    for fault, error in zip(faults, ERRORS, strict=True):
        assert isinstance(fault, str)
        assert fault.startswith("cannot be decoded: " + (" ".join(str(error).split()) or type(error).__name__))


def test_damaged_bytes_are_an_image_or_a_reason(tmp_path: Path) -> None:
    """Some hundred files of ten formats with bytes overwritten, cut or repeated."""
    image = Image.fromarray(picture(7, 24, 24))
    everything = Image.Exif()
    everything[0x0112], everything[0x010E] = 6, "text"
    whole = {
        "JPEG": encoded(image, "JPEG", exif=everything, comment=b"comment", progressive=True),
        "PNG": encoded(image, "PNG", exif=everything),
        "GIF": encoded(image.quantize(32), "GIF", comment=b"comment"),
        "TIFF": encoded(image, "TIFF", exif=everything, compression="tiff_lzw"),
        "WEBP": encoded(image, "WEBP", exif=everything),
        "BMP": encoded(image, "BMP"),
        "PPM": encoded(image, "PPM"),
        "TGA": encoded(image, "TGA"),
        "ICO": encoded(image, "ICO"),
        "JPEG2000": encoded(image, "JPEG2000"),
    }
    random, files = np.random.default_rng(0), {}
    for kind, data in whole.items():
        for number in range(40):
            changed = bytearray(data)
            for _ in range(1 + number % 4):
                at = int(random.integers(len(data) if number % 2 else min(len(data), 120)))
                changed[at] = int(random.integers(256))
            files[f"{kind}-{number}"] = bytes(changed[: len(data) if number % 5 else int(random.integers(len(data)))])
    results = list(convert.convert(items(tmp_path, files), Options(size=0, processes=1), NoBar()))
    assert len(results) == len(files)
    reasons = [result for result in results if isinstance(result, str)]
    assert 50 < len(reasons) < 350
    assert all(reason and "\n" not in reason for reason in reasons)


# Bits -----------------------------------------------------------------------------------------------------------------


def tiff(values: np.ndarray, bits: int, photometric: int = 1) -> bytes:
    """Uncompressed grey, of samples of 12 (packed) or 16 bits."""
    if bits == 12:
        spread = (values.astype(np.uint16)[..., None] >> np.arange(11, -1, -1, dtype=np.uint16)) & 1
        pixels = np.packbits(spread.reshape(len(values), -1), axis=1).tobytes()
    else:
        pixels = values.astype("<u2").tobytes()
    height, width = values.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 3, height), (279, 4, len(pixels))]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    start = 8 + len(pixels)
    return b"II*\0" + struct.pack("<I", start) + pixels + struct.pack("<H", len(tags)) + table + bytes(4)


def test_grey_of_many_bits_is_scaled_by_its_type(tmp_path: Path) -> None:
    scene = np.asarray(Image.fromarray(picture(9, 24, 24)).convert("L")).astype(np.uint16)
    files, expected = {}, {}
    for exposure in (1, 5, 100, 257):
        values = scene * np.uint16(exposure)
        deep = Image.fromarray(values)
        files |= {
            f"{exposure}.png": encoded(deep, "PNG"),
            f"{exposure}.tif": tiff(values, 16),
            f"{exposure}-big.tif": encoded(Image.fromarray(values.astype(">u2")), "TIFF"),
            f"{exposure}-white.tif": tiff(65535 - values, 16, photometric=0),
            f"{exposure}.pgm": b"P5 24 24 65535\n" + values.astype(">u2").tobytes(),
            f"{exposure}.jp2": encoded(deep, "JPEG2000"),
        }
        expected |= dict.fromkeys(files.keys() - expected.keys(), values / 257)
    files |= {
        "1000.pgm": b"P5 24 24 1000\n" + (scene * np.uint16(3)).astype(">u2").tobytes(),
        "15.pgm": b"P5 24 24 15\n" + (scene >> 4).astype(np.uint8).tobytes(),
        "12.tif": tiff(scene * np.uint16(16), 12),
        "12-dark.tif": tiff(scene, 12),
    }
    expected |= {
        "1000.pgm": scene * 3 / 1000 * 255,
        "15.pgm": (scene >> 4) * 17.0,
        "12.tif": scene * 16 / 4095 * 255,
        "12-dark.tif": scene / 4095 * 255,
    }
    results = convert.convert(items(tmp_path, files), Options(size=0, quality=100, processes=1), NoBar())
    for name, result in zip(files, results, strict=True):
        assert isinstance(result, StoredImage), f"{name}: {result}"
        image = Image.open(io.BytesIO(result.image))
        assert image.mode == "L"
        np.testing.assert_allclose(np.asarray(image), expected[name], atol=4, err_msg=name)  # of JPEG
        assert abs(np.asarray(image).mean() - expected[name].mean()) < 0.7, name


def test_pixels_without_a_scale_are_refused(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 24 * 24).reshape(24, 24)
    one_sample, two_complement = (struct.pack("<HHII", tag, 3, 1, value) for tag, value in ((277, 1), (339, 2)))
    files = {
        "float.tif": encoded(Image.fromarray(values.astype(np.float32)), "TIFF"),
        "float.pfm": b"Pf 24 24 -1.0\n" + values.astype("<f4").tobytes(),
        "int.tif": encoded(Image.fromarray((values * 1e6).astype(np.int32)), "TIFF"),
        "signed.tif": tiff(values * 30000, 16).replace(one_sample, two_complement),
    }
    results = convert.convert(items(tmp_path, files), Options(size=0, processes=1), NoBar())
    for name, result in zip(files, results, strict=True):
        assert isinstance(result, str), name
        assert "pixels without a scale" in result, f"{name}: {result}"
        assert "8 or 16 bits" in result


# Metadata -------------------------------------------------------------------------------------------------------------

NOTE = b"private note"


def test_nothing_but_pixels_is_stored(tmp_path: Path) -> None:
    image = Image.fromarray(picture(11))
    notes = Image.Exif()
    notes[0x010E] = NOTE.decode()
    notes.get_ifd(0x8825)[29] = NOTE.decode()
    xmp, long = b"<x:xmpmeta>" + NOTE + b"</x:xmpmeta>", NOTE.decode() * 300_000
    small = encoded(Image.fromarray(picture(12, 16, 16)), "JPEG", comment=NOTE)
    plain, png = encoded(image, "JPEG", quality=95), encoded(image, "PNG")
    text, many = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    text.add_text("a", long, zip=True)
    text.add_text("b", NOTE.decode())
    text.add_itxt("c", long, zip=True)
    for number in range(100):
        many.add_text(f"{number}", "0" * 900_000, zip=True)
    profile = NOTE + bytes(3_000_000)
    files = {
        "exif.jpg": encoded(image, "JPEG", quality=95, exif=notes),
        "comment.jpg": encoded(image, "JPEG", quality=95, comment=NOTE),
        "xmp.jpg": encoded(image, "JPEG", quality=95, xmp=xmp),
        "profile.jpg": encoded(image, "JPEG", quality=95, icc_profile=NOTE * 10_000),
        "iptc.jpg": plain[:2] + segment(0xED, b"Photoshop 3.0\0" + NOTE) + plain[2:],
        "thumbnail.jpg": plain[:2] + segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0" + small) + plain[2:],
        "trailer.jpg": plain + NOTE,
        "two.jpg": encoded(image, "MPO", quality=95, save_all=True, append_images=[Image.fromarray(picture(12))]),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG", quality=95, comment=NOTE, exif=notes),
        "text.png": encoded(image, "PNG", pnginfo=text),
        "many texts.png": encoded(image, "PNG", pnginfo=many),
        "profile.png": encoded(image, "PNG", icc_profile=profile, exif=notes),
        "checksum.png": png[:33] + struct.pack(">I", len(NOTE)) + b"tEXt" + NOTE + bytes(4) + png[33:],
        "comment.gif": encoded(image.quantize(256), "GIF", comment=NOTE * 100),
        "long comment.gif": encoded(image.quantize(256), "GIF", comment=NOTE * 10_000),
        "notes.webp": encoded(image, "WEBP", quality=95, exif=notes, xmp=xmp),
        "notes.tif": encoded(image, "TIFF", exif=notes, description=NOTE.decode()),
    }
    (tmp_path / "source" / "all").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "source" / "all" / name).write_bytes(data)
    for size in (0, 20):
        prepare(str(tmp_path / "source"), tmp_path / f"{size}", Options(size=size, quality=95, processes=1))
        samples = stored(tmp_path / f"{size}")
        assert {name[4:] for name in samples} == files.keys()
        for name, (data, _) in samples.items():
            assert NOTE not in data, name
            with Image.open(io.BytesIO(data)) as found:
                assert found.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi"}, name
                assert not found.getexif(), name
                expected = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS) if size else image, float)
                assert np.abs(np.asarray(found.convert("RGB"), float) - expected).mean() < 8, name
            if size == 0 and name.endswith(".jpg") and "cmyk" not in name:
                assert data == plain, name
