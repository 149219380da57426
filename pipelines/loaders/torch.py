"""The backend "torch": our index, positioned reads, simplejpeg and OpenCV in threads, PyTorch only to hold the result.

For machines without DALI, and as an independent check of it.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .. import augment
from ..format import Split
from ..sampler import LocalBatch
from .base import IndexedLoader
from .config import Batch, LoaderConfig
from .reader import SampleError, chunks
from .threaded import Buffers, Pending, Renderer, batches_in_order


class TorchLoader(IndexedLoader):
    """Batches of one split, decoded by threads; see `LoaderConfig`."""

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        super().__init__(split, config)
        self._render = Renderer(config.size, config.mean, config.std, bool(config.color_jitter))
        self._buffers = Buffers((config.batch_size, 3, config.size, config.size))

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        """(local_batch, images, labels) of each local batch; this call ends an earlier, unfinished iteration."""
        return batches_in_order(iter(local_batches), self._config, self._start, self._iterations.begin())

    def close(self) -> None:
        """Ends the threads."""
        self._iterations.end()
        self._workers.close()

    def _start(self, local_batch: LocalBatch) -> Pending:
        samples = local_batch.samples
        images, labels = self._buffers.take(len(samples)), self._labels[samples]
        # For the whole batch, in the first free thread: a draw costs as much for a few samples as for many.
        geometry = self._workers.submit(partial(self._rows, local_batch.epoch, local_batch.positions, samples))
        tasks = [
            self._workers.submit(partial(self._fill, local_batch, piece, geometry, images[piece], labels[piece]))
            for piece in chunks(samples, self._config.threads)
        ]

        def wait() -> None:
            for task in tasks:
                self._files.gather(task)

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        return Pending(local_batch, images, labels, wait, cancel)

    def _fill(
        self,
        local_batch: LocalBatch,
        piece: slice,
        geometry: Future[list[augment.Row]],
        images: NDArray[np.float32],
        labels: NDArray[np.int64],
    ) -> None:
        samples, positions = local_batch.samples[piece].tolist(), local_batch.positions[piece]
        rows = geometry.result()[piece]

        def paint(row: int, pixels: NDArray[np.uint8]) -> None:
            sample, drawn = samples[row], rows[row]
            while True:
                try:
                    return self._paint(sample, drawn, pixels)
                except SampleError as error:
                    sample = self._faults.substitute(sample, error)
                    labels[row] = self._labels[sample]
                    (drawn,) = self._rows(local_batch.epoch, positions[row : row + 1], np.array([sample]))

        self._render.batch(images, paint)

    def _paint(self, sample: int, drawn: augment.Row, pixels: NDArray[np.uint8]) -> None:
        encoded = self._files.read(sample)
        try:
            self._render.decode(encoded, drawn, pixels)
        except SampleError as error:
            raise SampleError(f"cannot decode {self._split.where(sample)}: {error}") from None

    def _rows(self, epoch: int, positions: NDArray[np.int64], samples: NDArray[np.int64]) -> list[augment.Row]:
        return self._draw(epoch, positions, samples).rows()
