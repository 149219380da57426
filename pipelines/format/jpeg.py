"""JPEGs that every decoder decodes alike, and what of them decoding needs.

Decoders forgive different faults and find out colours by different rules. Where they agree is the common kind, here
called plain: 8 bits, sequential or progressive, Huffman coded, grey or YCbCr of a usual subsampling, with nothing
between its segments (ITU-T T.81, annex B).
"""

import re
from collections.abc import Iterator
from contextlib import suppress

_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
_HUFFMAN, _QUANTIZATION, _RESTART, _SCAN, _END = 0xC4, 0xDB, 0xDD, 0xDA, 0xD9
_TABLES = frozenset((_HUFFMAN, _QUANTIZATION, _RESTART))
_APP0, _APP1, _APP14, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_CODED = 0  # what follows the header of a scan has no marker
_NEEDED = frozenset((*_FRAMES, *_TABLES, _SCAN, _CODED, _END))
_KNOWN = frozenset((*_FRAMES, *_TABLES, _SCAN, *range(_APP0, 0xF0), _COMMENT))
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # a zero is stuffed, D0 to D7 restart
_YCBCR = b"\x01\x02\x03"
_SAMPLINGS = frozenset(bytes((luma, 0x11, 0x11)) for luma in (0x11, 0x12, 0x21, 0x22, 0x41))


def is_plain(jpeg: bytes) -> bool:
    """Whether the JPEG is plain, by what comes before its first scan; takes 3 microseconds."""
    frame, transform, quantized, coded = b"", 1, False, False
    for marker, start, end in _segments(jpeg):
        if marker == _HUFFMAN:
            coded = True
        elif marker == _QUANTIZATION:
            quantized = True
        elif marker in _FRAMES:
            frame = jpeg[start + 4 : end]
        elif marker == _SCAN:
            return quantized and coded and _is_plain_frame(frame, transform)
        elif marker == _APP14 and jpeg[start + 4 : start + 9] == b"Adobe":
            transform = jpeg[start + 15] if end - start >= 16 else -1
    return False


def without_metadata(jpeg: bytes, exif: bool = False) -> bytes | None:
    """The same picture from the segments that decoding needs, up to its end; None if it is not plain.

    Comments, colour profiles, thumbnails and whatever follows the image are gone, and unless `exif`, EXIF and XMP with
    the orientation. Coded data is the same.
    """
    if not is_plain(jpeg):
        return None
    kept = [jpeg[:2]]
    for marker, start, end in _segments(jpeg):
        if marker in _NEEDED or (exif and marker == _APP1):
            kept.append(jpeg[start:end])
        elif marker == _APP0 and jpeg[start + 4 : start + 9] == b"JFIF\0" and end - start >= 18 and len(kept) == 1:
            kept.append(b"\xff\xe0\x00\x10" + jpeg[start + 4 : start + 16] + b"\x00\x00")  # of a thumbnail of 0 x 0
        if marker == _END:
            return b"".join(kept)
    return None


def _is_plain_frame(frame: bytes, transform: int) -> bool:
    """Precision, height, width and components: identifier, sampling factors, table of each."""
    if len(frame) < 6 or len(frame) != 6 + 3 * frame[5] or frame[0] != 8:
        return False
    identifiers, samplings = frame[6::3], frame[7::3]
    return frame[5] == 1 or (identifiers == _YCBCR and samplings in _SAMPLINGS and transform == 1)


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment, a scan's coded data as one of its own; stops at what is no segment."""
    at = 2
    with suppress(IndexError):  # at the end of a truncated one
        while jpeg[at] == 0xFF:
            marker = jpeg[at + 1]
            if marker == 0xFF:  # padding
                at += 1
                continue
            if marker == _END:
                yield marker, at, at + 2
                return
            end = at + 2 + (jpeg[at + 2] << 8 | jpeg[at + 3])
            if marker not in _KNOWN or not at + 4 <= end <= len(jpeg):
                return
            yield marker, at, end
            if marker == _SCAN:
                following = _AFTER_SCAN.search(jpeg, end)
                if following is None:
                    return
                yield _CODED, end, following.start()
                end = following.start()
            at = end
