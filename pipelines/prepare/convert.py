"""Images of a source become images as they are stored, in processes."""

import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from loky import ProcessPoolExecutor
from PIL import Image

from ..format.writer import StoredImage
from ..pools import begin_worker
from . import images
from .archives import Item
from .options import Options

_CHUNK = 64  # items a process takes at a time


def convert(items: list[Item], options: Options, bar: Any) -> Iterator[StoredImage | str]:
    """Each image as it is stored, or the reason why it cannot be, in order; computed in processes."""
    pieces = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    processes = min(options.workers, len(pieces))
    if processes <= 1:
        for piece in pieces:
            for result in _convert_piece(piece, options):
                bar.update()
                yield result
        return
    # Of loky: not forked, as the caller may have threads, nor importing its script, which may have no main guard.
    pool = ProcessPoolExecutor(processes, initializer=begin_worker, initargs=(os.getpid(),))
    running: deque[Future[list[StoredImage | str]]] = deque()
    try:
        waiting = iter(pieces)
        while True:
            while len(running) < 2 * processes and (piece := next(waiting, [])):
                running.append(pool.submit(_convert_piece, piece, options))
            if not running:
                return
            for result in running.popleft().result():
                bar.update()
                yield result
    except BrokenProcessPool:
        raise ValueError(
            "a process died, perhaps because memory ran out; give the same command with fewer processes"
        ) from None
    finally:
        for future in running:
            future.cancel()
        pool.shutdown(wait=True)


def _convert_piece(items: list[Item], options: Options) -> list[StoredImage | str]:
    results: list[StoredImage | str] = []
    for item in items:
        try:
            results.append(_store(item, item.read(), options))
        except ValueError as error:
            results.append(str(error))
    return results


def _store(item: Item, data: bytes, options: Options) -> StoredImage:
    """The image as it is stored; ValueError with the reason if it cannot be."""
    if item.pixels:
        # Pixels that are published as such are few and small: a lossless PNG keeps them.
        planes = np.frombuffer(data, np.uint8).reshape(item.pixels)
        image = Image.fromarray(planes if planes.ndim == 2 else np.ascontiguousarray(planes.transpose(1, 2, 0)))
        image = _square(image, options)
        return StoredImage(images.png(image), "png", image.height, image.width, images.moments(image))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about odd metadata, which does not matter here
            image = images.open_image(data)
            if options.size == 0 and (kept := images.kept(data, image)):
                encoded, image = kept
            else:
                image = _square(images.plain(image), options)
                encoded = images.jpeg(image, options.quality)
            return StoredImage(encoded, "jpg", image.height, image.width, images.moments(image))
    except Exception as error:  # a decoder fed with damaged bytes may raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason if isinstance(error, ValueError) else f"cannot be decoded: {reason}") from None


def _square(image: Image.Image, options: Options) -> Image.Image:
    return images.square(image, options.size, options.mode, options.filter) if options.size else image
