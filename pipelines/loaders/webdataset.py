"""The backend "webdataset": shards read from their start to their end by the webdataset library.

For disks on which only reading in order is fast. It promises less than the others, and refuses what it cannot do:
- the order is near to random, not the prescribed one: whole shards go to ranks, and samples are shuffled in a buffer;
- shards are dealt out anew every epoch; a rank whose shards hold fewer samples than its share reads some twice, one
  whose shards hold more drops some. Every rank has the steps, and batches of the size, of its local batches;
- a run cannot be resumed inside an epoch, only from its end;
- evaluation, which must see every sample once, and on_error="skip", whose substitutes must agree, need an index.
Augmentation is the same as everywhere, a function of (seed, epoch, position).
"""

import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import webdataset
from numpy.typing import NDArray

from .. import augment
from ..format import Split
from ..format.external import IMAGES, label_of
from ..random_streams import Stream, permutation, philox
from ..sampler import LocalBatch
from .base import Iterations
from .config import Batch, LoaderConfig
from .decode import decode
from .reader import SampleError, Workers, chunks, refuse_bomb
from .threaded import Buffers, Pending, Renderer, batches_in_order

_SHUFFLE_SAMPLES = 2000  # in the shuffle buffer


@dataclass(frozen=True)
class _Sample:
    where: str
    image: bytes
    label: int


class WebDatasetLoader:
    """Batches from the shards of one split; see `LoaderConfig`."""

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        # Whole paths, taken as they are: the library would run a shard of the relative name "pipe:COMMAND.tar".
        self._paths = [os.path.abspath(shard.path) for shard in split.shards]
        if len(self._paths) < config.world_size:
            raise ValueError(
                f"backend webdataset needs a shard for every rank, got {len(self._paths)} and {config.world_size} ranks"
            )
        self._config, self._augmentation = config, augment.augmentation(config.augmentation)
        self._render = Renderer(config.size, config.mean, config.std, bool(config.color_jitter))
        self._streamer, self._workers = Workers(1), Workers(config.threads)
        self._buffers = Buffers((config.batch_size, 3, config.size, config.size))
        self._iterations = Iterations()
        self._epoch: int | None = None
        self._stream: Iterator[_Sample] = iter(())
        self.skipped: dict[int, str] = {}

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        """(local_batch, images, labels), as many as the local batch has; which samples these are is up to the stream.

        ValueError for local batches of an epoch that do not begin at step 0, and for those of an evaluation.
        """
        self._epoch = None
        return batches_in_order(iter(local_batches), self._config, self._start, self._iterations.begin())

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

    def _samples(self, epoch: int) -> Iterator[_Sample]:
        """This rank's samples of an epoch, over and over."""
        seed, rank = self._config.seed, self._config.rank
        order = permutation(Stream.STREAM_SHARD, len(self._paths), seed, epoch)[rank :: self._config.world_size]
        paths = [self._paths[number] for number in order]
        shuffle = random.Random(int(philox(Stream.STREAM_SHUFFLE, seed, epoch, block=rank).random_raw()))
        while True:
            # The library would ask torch.distributed or RANK for the ranks, which Horovod does not set: the shards
            # are split already.
            shards = webdataset.WebDataset(
                paths, shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
            )
            count = 0
            try:
                for members in shards.shuffle(_SHUFFLE_SAMPLES, initial=_SHUFFLE_SAMPLES, rng=shuffle):
                    where = f"{members['__url__']}: {members['__key__']}"
                    found = {name.rpartition(".")[2].lower(): data for name, data in members.items()}
                    images = IMAGES & found.keys()
                    if images:
                        count += 1
                        yield _Sample(where, found[min(images)], label_of(where, found))
            except ValueError:
                raise
            except Exception as error:  # whatever a damaged tar makes the library raise
                raise ValueError(f"cannot stream {', '.join(paths[:3])}: {error}") from error
            if not count:
                raise ValueError(f"{', '.join(paths[:3])} hold no .jpg, .jpeg or .png image")

    def _start(self, local_batch: LocalBatch) -> Pending:
        self._check(local_batch)
        if local_batch.epoch != self._epoch:
            self._epoch, self._stream = local_batch.epoch, self._samples(local_batch.epoch)
        stream = self._stream
        count = len(local_batch.samples)
        images, labels = self._buffers.take(count), np.empty(count, np.int64)

        def take() -> list[Future[None]]:
            tasks = []
            for piece in chunks(local_batch.samples, self._config.threads):
                samples = [next(stream) for _ in range(piece.start, piece.stop)]
                labels[piece] = [sample.label for sample in samples]
                fill = partial(self._fill, samples, local_batch.epoch, local_batch.positions[piece], images[piece])
                tasks.append(self._workers.submit(fill))
            return tasks

        taken = self._streamer.submit(take)

        def wait() -> None:
            for task in taken.result():
                task.result()

        return Pending(local_batch, images, labels, wait, taken.cancel)

    def _fill(
        self, samples: list[_Sample], epoch: int, positions: NDArray[np.int64], images: NDArray[np.float32]
    ) -> None:
        seed, color_jitter = self._config.seed, self._config.color_jitter

        def paint(row: int, pixels: NDArray[np.uint8]) -> None:
            sample = samples[row]
            try:
                refuse_bomb(sample.image)
                image = decode(sample.image)
            except SampleError as error:
                raise ValueError(f"cannot decode {sample.where}: {error}") from None
            height, width = np.array([image.shape[0]], np.int32), np.array([image.shape[1]], np.int32)
            position = positions[row : row + 1]
            (drawn,) = augment.draw(self._augmentation, seed, epoch, position, height, width, color_jitter).rows()
            self._render.place(image, drawn, pixels)

        self._render.batch(images, paint)
