"""Images of a source become images as they are stored, in processes."""

import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import numpy as np
from PIL import Image

from ..format.writer import StoredImage
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
    # Spawned, not forked: the caller may have threads.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
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
        pool.shutdown(wait=True, cancel_futures=True)


def _convert_piece(items: list[Item], options: Options) -> list[StoredImage | str]:
    results: list[StoredImage | str] = []
    for item in items:
        try:
            results.append(_store(item, options))
        except ValueError as error:
            results.append(str(error))
    return results


def _store(item: Item, options: Options) -> StoredImage:
    data = item.read()
    if item.pixels:
        # Pixels that are published as such are few and small: a lossless PNG keeps them.
        planes = np.frombuffer(data, np.uint8).reshape(item.pixels)
        image = Image.fromarray(planes if planes.ndim == 2 else np.ascontiguousarray(planes.transpose(1, 2, 0)))
    else:
        image = images.open_image(data)
        if options.size == 0 and images.storable(image):
            return StoredImage(data, "jpg", image.height, image.width, images.moments(image))
        image = images.plain(image)
    if options.size:
        image = images.square(image, options.size, options.mode, options.filter)
    encoded, extension = (images.png(image), "png") if item.pixels else (images.jpeg(image, options.quality), "jpg")
    return StoredImage(encoded, extension, image.height, image.width, images.moments(image))
