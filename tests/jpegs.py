"""One small picture as JPEGs of many kinds: as encoders write them, as programs and transfers damage them."""

import base64
import io
from typing import Any

import cv2
import numpy as np
from data_sets import picture
from PIL import Image

SIDE = 37  # no multiple of a block
PIXELS = picture(5, SIDE, SIDE)
SCAN, ADOBE, FRAME, HUFFMAN = 0xDA, 0xEE, 0xC0, 0xC4

# Written by `cjpeg -arithmetic`, and by libjpeg-turbo 3 with 12 bits a sample.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQ"
    "YEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAlACUD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDSYr+HCSPPw9QqjLLPT6UQJrfzJFWxeuU1wDgF6XUpmzoKVZGsvuMAKjru4NKfsQ3y"
    "AUdYZB6SWRPGVf8A/jjKGxU9J0YRP/E6zvdxTDMAaDzM3ZDHrnP0TtpS5Lowo0ILyft2UJ8WJLuO91tXUfgNxhESNqurFrnjZhFuNFTaxWOEXkyZ"
    "K6Z03oNNxopf2aCtDT00Hu5FR7ChRh7XBuc1w4NVvzv3r0YEtmY8W/tfOKxfM5dI/fryVTmQ7a/16QNOquoZTZmeDELgkvM4qw1RTWXfqIOKgP/Z"
)
TWELVE_BITS = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQ"
    "YEpRUk//wQALDAAlACUBAREA/8QAGwAAAgIDAQAAAAAAAAAAAAAACAoHCQIECwb/xAAxEAAABQIEBAQEBwAAAAAAAAABAgMEBQARBgcIEwkSITEK"
    "QWJxFDJCQxUWIkRRYdH/2gAIAQEAAD8AuDh9ZGBcQSKTVrOtTmUGwACgDevdZwAOOcl5J7HBvpmaHG5QuA/pGueh4iVgeBzykviiiQQdj396NHw4"
    "WOWLFOIA65AsYvc3tThuAM0YwmGW93Cfyh538qQ+0E8UnOXGWcEGxklpAUlHBCiBjm8xroKcM9ylm5oscyOIA5lzxnMO4HopB3xeWF/ytntMGikx"
    "5QdH6lL6qFbgZ6iF8DuWBHbra5DF6GNamdsHa9WSEEkmaXTuAB9wP4qv3Sjw18D4EzDi5EibUoorlNfp5DTaOjvNTDWT2mReAQfIEsy27AYA+kQp"
    "NTxMsXF5u4/mH6Jk1hMqcwCAgPmNLk5c45mclJZQsWKqYJn6clw7VMheIXj1kGwm6dgAeoasEgeM2vHPE105ewlPzX3KnqH4+8wTDxosmIj8piCW"
    "27/VBHqM1oL6iJtQzp4LgVzdbmv3v/tbuROiJDOjbc/Bbm8HNfkv3oomPBZQfIgt+EdwD7dKrjOyg/vFA9hrJviGXbqlUTfr3DyE3Si90yTL2Qlm"
    "YOlBPe3caaV4U0IyeQ8ZuplERTLcRD2q9PCOD4g0MmItyfKH01//2Q=="
)


def encode(image: Image.Image, kind: str = "JPEG", **more: Any) -> bytes:
    """Of the kind JPEG in quality 95 unless another is given."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}), **more)
    return buffer.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


def segments(jpeg: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) up to the header of the first scan, of a JPEG in good order."""
    found, at = [], 2
    while not found or found[-1][0] != SCAN:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        found.append((jpeg[at + 1], at, end))
        at = end
    return found


def replaced(jpeg: bytes, at: int, new: bytes, length: int = 0) -> bytes:
    """With `new` in the place of `length` bytes at `at`."""
    return jpeg[:at] + new + jpeg[at + length :]


def without(jpeg: bytes, marker: int) -> bytes:
    for kind, start, end in reversed(segments(jpeg)):
        if kind == marker:
            jpeg = jpeg[:start] + jpeg[end:]
    return jpeg


def renamed(jpeg: bytes, names: bytes) -> bytes:
    """With these identifiers of the three components, in the frame and in the scan."""
    changed = bytearray(jpeg)
    for kind, start, _ in segments(jpeg):
        for number, name in enumerate(names):
            if kind == FRAME:
                changed[start + 10 + 3 * number] = name
            elif kind == SCAN:
                changed[start + 5 + 2 * number] = name
    return bytes(changed)


def sampled(factor: int) -> bytes:
    parameters = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor, cv2.IMWRITE_JPEG_QUALITY, 95]
    return cv2.imencode(".jpg", np.ascontiguousarray(PIXELS[..., ::-1]), parameters)[1].tobytes()


def kinds() -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
    """By name: those that are kept as they are; whose pixels or headers need care; that hold no picture."""
    image = Image.fromarray(PIXELS)
    grey, cmyk = encode(image.convert("L")), encode(image.convert("CMYK"))
    jpeg = encode(image, subsampling="4:4:4")
    app0 = segments(jpeg)[0][2]
    frame, scan = (next(start for kind, start, _ in segments(jpeg) if kind == marker) for marker in (FRAME, SCAN))
    data = segments(jpeg)[-1][2]
    bare = without(jpeg, 0xE0)
    restarting = encode(image, restart_marker_blocks=2, subsampling="4:4:4")
    restart = next(at for at in range(data, len(restarting)) if restarting[at : at + 2] == b"\xff\xd1")
    adobe = [segment(ADOBE, b"Adobe\0\x64\0\0\0\0" + bytes((transform,))) for transform in range(3)]
    ordinary = {
        "grey": grey,
        "grey, progressive": encode(image.convert("L"), progressive=True),
        "4:4:4": jpeg,
        "4:2:2": sampled(cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),
        "4:2:0": encode(image, subsampling="4:2:0"),
        "4:4:0": sampled(cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
        "4:1:1": sampled(cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
        "progressive": encode(image, progressive=True),
        "optimized": encode(image, optimize=True),
        "restarts": restarting,
        "no JFIF": bare,
        "extended": replaced(jpeg, frame + 1, b"\xc1", 1),
        "restarts never": replaced(jpeg, app0, segment(0xDD, b"\0\0")),
    }
    odd = {
        "RGB": encode(image, keep_rgb=True),
        "RGB by Adobe": replaced(renamed(encode(image, keep_rgb=True), b"\1\2\3"), 2, adobe[0]),
        "CMYK": cmyk,
        "CMYK, plain": without(cmyk, ADOBE),
        "YCbCr by Adobe": replaced(bare, 2, adobe[1]),
        "YCbCr by both": replaced(jpeg, app0, adobe[1]),
        "grey by Adobe": replaced(without(grey, 0xE0), 2, adobe[0]),
        "components 0 1 2": renamed(jpeg, b"\0\1\2"),
        "components 7 8 9": renamed(bare, b"\7\x08\x09"),
        "components R G B, but JFIF": renamed(jpeg, b"RGB"),
        "JFIF and Adobe of RGB": replaced(jpeg, app0, adobe[0]),
        "arithmetic": ARITHMETIC,
        "without tables": without(encode(image, subsampling="4:2:0"), HUFFMAN),
        "zero byte": replaced(jpeg, app0, b"\0"),
        "stray bytes": replaced(jpeg, app0, b"\x12\x34\x56"),
        "padding": replaced(jpeg, app0, b"\xff\xff\xff"),
        "padding at the end": replaced(jpeg, len(jpeg) - 2, b"\xff\xff"),
        "zeros at the end": replaced(jpeg, len(jpeg) - 2, b"\0\0\0"),
        "stray restart": replaced(jpeg, app0, b"\xff\xd0"),
        "length 0": replaced(jpeg, app0, b"\xff\xe5\0\0"),
        "length 1": replaced(jpeg, app0, b"\xff\xe5\0\1"),
        "length 2": replaced(jpeg, app0, b"\xff\xe5\0\2"),
        "trailing zeros": jpeg + bytes(1000),
        "trailing image": jpeg + grey,
        "number of lines": replaced(jpeg, len(jpeg) - 2, segment(0xDC, SIDE.to_bytes(2, "big"))),
        "restarts out of order": replaced(restarting, restart + 1, b"\xd3", 1),
        "spectral selection": replaced(jpeg, data - 3, bytes(3), 3),
        "flipped bit": replaced(jpeg, data + 40, bytes((jpeg[data + 40] ^ 16,)), 1),
        "text mode": jpeg.replace(b"\n", b"\r\n"),
        "no picture beside YCCK": replaced(cmyk, cmyk.index(b"Adobe") + 11, b"\2", 1),
    }
    broken = {
        "no end": jpeg[:-2],
        "12 bits": TWELVE_BITS,
        "cut": jpeg[: len(jpeg) // 2],
        "header alone": jpeg[: scan + 4],
        "ends at once": replaced(jpeg, app0, b"\xff\xd9"),
        "second start": replaced(jpeg, 2, b"\xff\xd8"),
        "no lines": replaced(jpeg, frame + 5, b"\0\0", 2),
        "lossless": replaced(jpeg, frame + 1, b"\xc3", 1),
        "two signatures": jpeg[:2] * 20,
    }
    return ordinary, odd, broken
