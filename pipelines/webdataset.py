"""The backend "webdataset": shards streamed from local files, HTTP, object stores or a pipe, by the webdataset library.

For data that cannot be had as local files. A stream is read from its start, so this backend promises less than the
others, and refuses what it cannot do:
- the order is near to random, not the prescribed one: whole shards go to ranks, and samples are mixed in a buffer;
- shards are dealt out anew every epoch; a rank whose shards hold fewer samples than its share reads some twice, one
  whose shards hold more leaves some out. Every rank has the steps, and batches of the size, that the parts say;
- a run cannot be resumed inside an epoch, only from its end;
- evaluation, which must see every sample once, and on_error="skip", whose substitutes must agree, need an index.
Augmentation is the same as everywhere, a function of (seed, epoch, position).
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls

from . import augment
from .indexed import Buffers, Renderer, decode
from .order import Part, permutation
from .reader import SampleError, Workers, chunks, refuse_bomb
from .shards import without_secrets
from .wild import IMAGES, label_of


def expand(urls: str | Sequence[str]) -> list[str]:
    """Braces like {0000..0999} written out."""
    return [url for pattern in ([urls] if isinstance(urls, str) else urls) for url in expand_urls(pattern)]


def _shown(url: str) -> str:
    """The URL for messages: a command may hold anything, so none of it."""
    return "pipe:…" if url.startswith("pipe:") else without_secrets(url)


@dataclass(frozen=True)
class _Sample:
    where: str
    image: bytes
    label: int


@dataclass
class _Pending:
    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    tasks: Future[list[Future[None]]]


class StreamLoader:
    """Batches from the shards at `urls`; see `pipelines.open_loader` and `pipelines.open_stream` for the arguments."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        rank: int,
        world_size: int,
        shuffle: int = 2000,
        cache: Path | None = None,
        augmentation: str,
        color_jitter: float,
        size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if len(urls) < world_size:
            raise ValueError(f"backend webdataset needs a shard for every rank, got {len(urls)} and {world_size} ranks")
        if shuffle < 1:
            raise ValueError(f"shuffle must be at least 1 sample, got {shuffle}")
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
        self._urls, self._rank, self._world_size = list(urls), rank, world_size
        self._shuffle, self._cache, self._seed = shuffle, cache, seed
        self._augmentation, self._color_jitter = augment.augmentation(augmentation), color_jitter
        self._batch_size, self._device, self._threads, self._prefetch = batch_size, device, threads, prefetch
        self._render = Renderer(size, mean, std, bool(color_jitter))
        self._streamer, self._workers = Workers(1), Workers(threads)
        self._buffers = Buffers((batch_size, 3, size, size))
        self._iteration = 0
        self.skipped: dict[int, str] = {}

    def batches(self, parts: Iterable[Part]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels), as many each time as the part has; which samples these are is up to the stream.

        ValueError for parts of an epoch that do not begin at step 0, and for parts of an evaluation.
        """
        self._iteration += 1
        return self._batches(iter(parts), self._iteration)

    def close(self) -> None:
        """Ends the threads."""
        self._iteration += 1
        self._streamer.close()
        self._workers.close()

    def _batches(self, parts: Iterator[Part], iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pending: deque[_Pending] = deque()
        stream: Iterator[_Sample] = iter(())
        epoch = None
        while True:
            if iteration != self._iteration:
                raise RuntimeError("this iteration ended when another one of the loader began, or it was closed")
            while len(pending) < self._prefetch and (part := next(parts, None)) is not None:
                self._check(part, part.epoch != epoch)
                if part.epoch != epoch:
                    epoch, stream = part.epoch, self._stream(part.epoch)
                pending.append(self._start(part, stream))
            if not pending:
                return
            batch = pending.popleft()
            for task in batch.tasks.result():
                task.result()
            images, labels = torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
            del batch
            yield images.to(self._device), labels.to(self._device)
            del images, labels

    def _check(self, part: Part, first: bool) -> None:
        if first and part.step:
            raise ValueError(
                f"backend webdataset cannot start at step {part.step} of an epoch; resume from the end of one, "
                "or use dali or torch on local shards"
            )
        if len(part.samples) > 1 and np.array_equal(part.samples, part.positions):
            raise ValueError(
                "backend webdataset cannot see every sample exactly once, as evaluation must; use dali or torch for it"
            )
        if len(part.samples) > self._batch_size:
            raise ValueError(f"batch_size must hold the largest part, got {self._batch_size} and {len(part.samples)}")

    def _stream(self, epoch: int) -> Iterator[_Sample]:
        """This rank's samples of an epoch, over and over."""
        order = permutation(len(self._urls), self._seed, epoch)[self._rank :: self._world_size]
        urls = [self._urls[number] for number in order]
        shown = ", ".join(_shown(url) for url in urls[:3])
        mixer = random.Random(f"{self._seed} {epoch} {self._rank}")
        while True:
            # The library would ask torch.distributed or RANK for the ranks, which Horovod does not set: the shards
            # are split already.
            shards = webdataset.WebDataset(
                urls,
                shardshuffle=False,
                nodesplitter=None,
                workersplitter=None,
                cache_dir=str(self._cache) if self._cache else None,
                empty_check=False,
            )
            count = 0
            try:
                for members in shards.shuffle(self._shuffle, initial=self._shuffle, rng=mixer):
                    where = f"{_shown(members['__url__'])}: {members['__key__']}"
                    found = {name.rpartition(".")[2].lower(): data for name, data in members.items()}
                    images = IMAGES & found.keys()
                    if images:
                        count += 1
                        yield _Sample(where, found[min(images)], label_of(where, found))
            except ValueError:
                raise
            except Exception as error:  # whatever the network or a damaged tar makes the library raise
                commands = any(url.startswith("pipe:") for url in urls)
                reason = "the command failed" if commands else without_secrets(str(error))
                raise ValueError(f"cannot stream {shown}: {reason}") from error
            if not count:
                raise ValueError(f"{shown} hold no .jpg, .jpeg or .png image")

    def _start(self, part: Part, stream: Iterator[_Sample]) -> _Pending:
        images = self._buffers.take(len(part.samples))
        labels = np.empty(len(part.samples), np.int64)

        def take() -> list[Future[None]]:
            tasks = []
            for piece in chunks(part.samples, self._threads):
                samples = [next(stream) for _ in range(piece.start, piece.stop)]
                labels[piece] = [sample.label for sample in samples]
                fill = partial(self._fill, samples, part.epoch, part.positions[piece], images[piece])
                tasks.append(self._workers.submit(fill))
            return tasks

        return _Pending(images, labels, self._streamer.submit(take))

    def _fill(
        self, samples: list[_Sample], epoch: int, positions: NDArray[np.int64], images: NDArray[np.float32]
    ) -> None:
        def paint(row: int, pixels: NDArray[np.uint8]) -> None:
            sample = samples[row]
            try:
                refuse_bomb(sample.image)
                image = decode(sample.image)
            except SampleError as error:
                raise ValueError(f"cannot decode {sample.where}: {error}") from None
            height, width = np.array([image.shape[0]], np.int32), np.array([image.shape[1]], np.int32)
            (drawn,) = augment.draw(
                self._augmentation, self._seed, epoch, positions[row : row + 1], height, width, self._color_jitter
            ).rows()
            self._render.place(image, drawn, pixels)

        self._render.batch(images, paint)
