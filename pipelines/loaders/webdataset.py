"""The backend "webdataset": shards read from their start to their end, and shuffled by the webdataset library.

For disks on which only reading in order is fast. The samples are those of the index, as for every backend: which
members of a shard are one, and with which label, is decided in `pipelines.format.external` alone. It promises less than
the others, and refuses what it cannot do:
- the order is near to random, not the prescribed one: whole shards go to ranks, and samples are shuffled in a buffer;
- shards are dealt out anew every epoch; a rank whose shards hold fewer samples than its share reads some twice, one
  whose shards hold more drops some. Every rank has the steps, and batches of the size, of its local batches;
- a run cannot be resumed inside an epoch, only from its end;
- evaluation, which must see every sample once, and on_error="skip", whose substitutes must agree, need the exact order.
Augmentation is the same as everywhere, a function of (seed, epoch, position).
"""

import random
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray

from .. import augment
from ..format import Split
from ..random_streams import Stream, permutation, philox
from ..sampler import LocalBatch
from .base import Iterations, Pending, batches_in_order
from .config import Batch, LoaderConfig
from .decode import decode
from .memory import Buffers
from .reader import Files, SampleError, Workers, chunks
from .render import Renderer, normalization

_SHUFFLE_SAMPLES = 2000  # in the shuffle buffer


class WebDatasetLoader:
    """Batches from the shards of one split; see `LoaderConfig`."""

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        shard = split.index["shard"]
        in_order = np.lexsort((split.index["offset"], shard))
        self._shards = np.split(in_order, np.flatnonzero(np.diff(shard[in_order])) + 1)
        if len(self._shards) < config.world_size:
            raise ValueError(
                "backend webdataset needs a shard for every rank, "
                f"got {len(self._shards)} and {config.world_size} ranks"
            )
        self._split, self._files, self._labels = split, Files(split, 1, config.cache_bytes), split.labels
        self._config, self._augmentation = config, augment.augmentation(config.augmentation)
        self._render = Renderer(config.size, config.mean, config.std, bool(config.color_jitter))
        self._streamer, self._workers = Workers(1), Workers(config.threads)
        self._buffers = Buffers(config)
        self._iterations = Iterations()
        self._epoch: int | None = None
        self._stream: Iterator[tuple[int, bytes]] = iter(())
        self.skipped: dict[int, str] = {}

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        """(local_batch, images, labels), as many as the local batch has; which samples these are is up to the stream.

        ValueError for local batches of an epoch that do not begin at step 0, and for those of an evaluation.
        """
        self._epoch = None
        tables = normalization(self._config.mean, self._config.std)
        return batches_in_order(iter(local_batches), self._config, self._start, self._iterations.begin(), tables)

    def close(self) -> None:
        """Ends the threads."""
        self._iterations.end()
        self._streamer.close()
        self._workers.close()

    def _check(self, local_batch: LocalBatch) -> None:
        if local_batch.epoch != self._epoch and local_batch.step:
            raise ValueError(
                f"backend webdataset cannot start at step {local_batch.step} of an epoch; resume from the end of one, "
                "or use dali or torch"
            )
        if len(local_batch.samples) > 1 and np.array_equal(local_batch.samples, local_batch.positions):
            raise ValueError(
                "backend webdataset cannot see every sample exactly once, as evaluation must; use dali or torch for it"
            )

    def _samples(self, epoch: int) -> Iterator[tuple[int, bytes]]:
        """Ids and encoded images of this rank's samples of an epoch, over and over."""
        seed, rank = self._config.seed, self._config.rank
        order = permutation(Stream.STREAM_SHARD, len(self._shards), seed, epoch)[rank :: self._config.world_size]
        random_of_rank = random.Random(int(philox(Stream.STREAM_SHUFFLE, seed, epoch, block=rank).random_raw()))
        shuffle = webdataset.shuffle(_SHUFFLE_SAMPLES, initial=_SHUFFLE_SAMPLES, rng=random_of_rank)
        while True:
            ids = (sample for number in order for sample in self._shards[number].tolist())
            yield from shuffle((sample, self._files.read(sample)) for sample in ids)

    def _start(self, local_batch: LocalBatch) -> Pending:
        self._check(local_batch)
        if local_batch.epoch != self._epoch:
            self._epoch, self._stream = local_batch.epoch, self._samples(local_batch.epoch)
        stream = self._stream
        count = len(local_batch.samples)
        (_, images), labels = self._buffers.take(count), np.empty(count, np.int64)

        def take() -> list[Future[None]]:
            tasks = []
            for piece in chunks(local_batch.samples, self._config.threads):
                samples = [next(stream) for _ in range(piece.start, piece.stop)]
                labels[piece] = self._labels[[sample for sample, _ in samples]]
                fill = partial(self._fill, samples, local_batch.epoch, local_batch.positions[piece], images[piece])
                tasks.append(self._workers.submit(fill))
            return tasks

        taken = self._streamer.submit(take)

        def wait() -> None:
            for task in taken.result():
                task.result()

        return Pending(local_batch, images, labels, wait, taken.cancel)

    def _fill(
        self, samples: list[tuple[int, bytes]], epoch: int, positions: NDArray[np.int64], images: NDArray[Any]
    ) -> None:
        seed, color_jitter = self._config.seed, self._config.color_jitter

        def paint(row: int, pixels: NDArray[np.uint8]) -> None:
            sample, encoded = samples[row]
            try:
                image = decode(encoded)
            except SampleError as error:
                raise ValueError(f"cannot decode {self._split.where(sample)}: {error}") from None
            height, width = np.array([image.shape[0]], np.int32), np.array([image.shape[1]], np.int32)
            position = positions[row : row + 1]
            (drawn,) = augment.draw(self._augmentation, seed, epoch, position, height, width, color_jitter).rows()
            self._render.place(image, drawn, pixels)

        self._render.batch(images, paint)
