"""Any image file to RGB pixels, and pixels to what is stored."""

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from ..format.image_header import MAX_PIXELS
from ..format.jpeg import without_metadata

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_GREY = ("PNG", "TIFF", "PPM", "JPEG2000")  # formats of which Pillow gives grey of 16 bits without a sign
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of a TIFF
_POWERS = np.arange(256)[:, None] ** np.array([1, 2])


def open_image(data: bytes) -> Image.Image:
    """The image, which is decoded when its pixels are used; ValueError with a short reason if there is none."""
    if not data:
        raise ValueError("zero bytes")
    try:
        image = Image.open(io.BytesIO(_pixels_and_orientation(data)))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        if image.format == "EPS":  # Pillow would have Ghostscript run it
            raise ValueError("EPS is a program, not an image")
    except UnidentifiedImageError:
        raise ValueError("not an image that can be decoded") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MAX_PIXELS} pixels") from None
    return image


def _pixels_and_orientation(data: bytes) -> bytes:
    """A JPEG or PNG without other metadata, of which Pillow refuses what is large or odd."""
    if data[:2] == _JPEG:
        return without_metadata(data, exif=True) or data
    if data[:8] != _PNG:
        return data
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def plain(image: Image.Image) -> Image.Image:
    """Upright, 8-bit RGB or grey, from any mode, without metadata.

    Grey of 16 bits is scaled by its type, transparency becomes white. ValueError for pixels whose type has no scale.
    """
    image.load()
    orientation = _orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    image.info = {}  # of which Pillow would store comments
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.format not in _DEEP_GREY or (image.mode == "I" and image.format != "PPM") or image.mode == "F":
        kind = "floating-point" if image.mode == "F" else "integer"
        raise ValueError(f"{kind} pixels without a scale (mode {image.mode} of {image.format}); store 8 or 16 bits")
    values, most, inverted = np.asarray(image, np.float64), 65535, False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        most, inverted = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    values = np.rint(values / (most / 255)).astype(np.uint8)
    return Image.fromarray(255 - values if inverted else values)


def kept(data: bytes, image: Image.Image) -> tuple[bytes, Image.Image] | None:
    """What is stored of a file that keeps its coded pixels, and these: of an upright plain JPEG; else None.

    It is decoded by simplejpeg, which alone of the decoders takes a warning for an error.
    """
    jpeg = without_metadata(data) if data[:2] == _JPEG and _orientation(image) not in _TRANSPOSE else None
    if jpeg is None:
        return None
    try:
        return jpeg, Image.fromarray(simplejpeg.decode_jpeg(jpeg))
    except Exception:  # whatever it finds wrong, Pillow may forgive
        return None


def jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes, grey ones for a grey image."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=quality)
    except OSError as error:  # a side above 65500 pixels
        raise ValueError(f"cannot be stored as JPEG: {error}") from None
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """PNG bytes, grey ones for a grey image: lossless."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata is no reason to skip an image
        return 1


def square(image: Image.Image, side: int, mode: str, resampling: str) -> Image.Image:
    """side x side pixels; mode "squash" resizes both sides, "crop" the shorter one and keeps the centre."""
    resample = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}[resampling]
    if image.size == (side, side):
        return image
    if mode == "crop":
        return ImageOps.fit(image, (side, side), resample)
    return image.resize((side, side), resample)


def moments(image: Image.Image) -> list[list[int]]:
    """For each RGB channel the sum and the sum of squares over the pixels, exact."""
    counts = np.array(image.convert("RGB").histogram(), np.int64).reshape(3, 256)
    sums: list[list[int]] = (counts @ _POWERS).tolist()
    return sums
