"""JPEG and PNG bytes to RGB pixels, by simplejpeg and OpenCV."""

from typing import Any

import cv2
import numpy as np
import simplejpeg

from .reader import SampleError

# The threads of a loader do their own work; OpenCV's pool would only compete with them.
cv2.setNumThreads(0)


def decode(encoded: bytes) -> Any:
    """RGB pixels, uint8 (H, W, 3), of a JPEG or PNG as stored, without alpha; SampleError if it cannot be decoded."""
    # Decoders fed with damaged bytes may raise nearly anything.
    try:
        if encoded[:2] == b"\xff\xd8":
            return simplejpeg.decode_jpeg(encoded)
    except Exception:
        pass  # OpenCV decides as DALI does: a truncated image is an error, a damaged segment is not
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except Exception as error:
        raise SampleError(" ".join(str(error).split())) from None
    if image is None:
        raise SampleError("truncated, damaged, or no image")
    return image
