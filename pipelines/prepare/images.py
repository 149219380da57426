"""Any image file to RGB pixels, and pixels to what is stored."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..format.image_header import MAX_PIXELS

_ORIENTATION = 0x0112
_POWERS = np.arange(256)[:, None] ** np.array([1, 2])


def open_image(data: bytes) -> Image.Image:
    """The decoded image; ValueError with a short reason if it cannot be decoded."""
    if not data:
        raise ValueError("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL about odd metadata, which does not matter here
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            if image.format == "EPS":  # Pillow would have Ghostscript run it
                raise ValueError("EPS is a program, not an image")
            image.load()
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MAX_PIXELS} pixels") from None
    except ValueError:
        raise
    except Exception as error:  # a decoder fed with damaged bytes may raise nearly anything
        raise ValueError(f"cannot be decoded: {error}") from None
    return image


def plain(image: Image.Image) -> Image.Image:
    """Upright, 8-bit RGB or grey, from any mode: 16-bit grey scaled to 8 bits, transparency on white."""
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGB", "L") and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        values = values / 257 if values.max(initial=0) > 255 else values
        return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def storable(image: Image.Image) -> bool:
    """Whether the file can be kept as it is: an upright JPEG, RGB or grey."""
    return image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) == 1


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
