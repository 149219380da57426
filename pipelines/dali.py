"""The default backend: NVIDIA DALI decodes and augments what our reader hands it.

Encoded images, crop boxes, shifts and mirrors are fed to one DALI pipeline that lives as long as the loader. DALI
draws no random number and knows no order, so nothing in it depends on the world size or on where a run started, and
nothing is built again for an epoch. On a GPU, decoding is "mixed" and the rest runs on the GPU.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline
from torch.utils.dlpack import from_dlpack

from . import augment
from .order import Part
from .reader import Files, Workers, chunks, gather
from .shards import Split

types: Any = nvidia.dali.types  # its members are made at import, unseen by type checkers

# Batches inside DALI at a time: one being decoded, one finished, so that its threads never idle between steps.
_DEPTH = 2


@dataclass
class _Read:
    """A part whose encoded images are on their way."""

    part: Part
    encoded: list[Future[list[bytes]]]


@dataclass
class _Run:
    """A part inside DALI, which reads `encoded` without a copy: the bytes must stay."""

    part: Part
    encoded: list[bytes]


class DaliLoader:
    """Batches of one split through DALI; see `pipelines.open_loader` for the arguments."""

    def __init__(
        self,
        split: Split,
        *,
        augmentation: str,
        size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int,
    ) -> None:
        self._split, self._augmentation, self._seed = split, augment.augmentation(augmentation), seed
        self._size, self._mean, self._std = size, mean, std
        self._batch_size, self._device, self._threads, self._prefetch = batch_size, device, threads, prefetch
        self._heights, self._widths = split.index["height"], split.index["width"]
        self._resizes = bool(self._augmentation.area) or bool(
            (self._heights != size).any() or (self._widths != size).any()
        )
        # DALI takes away inputs that nothing uses, and refuses to be fed them.
        self._inputs = ["encoded", "mirror"]
        self._inputs += ["anchor", "shape"] if self._augmentation.area else []
        self._inputs += ["shift"] if self._augmentation.pad else []
        self._files = Files(split, threads)
        self._workers = Workers(threads)
        self._pipeline: Pipeline | None = None
        self._running: deque[_Run] = deque()
        self._iteration = 0

    def batches(self, parts: Iterable[Part]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels) of each part; an earlier, unfinished iteration of this loader ends by this call."""
        self._iteration += 1
        return self._batches(iter(parts), self._iteration)

    def close(self) -> None:
        """Ends the threads and frees the pipeline."""
        self._iteration += 1
        self._workers.close()
        self._pipeline = None

    def _batches(self, parts: Iterator[Part], iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._drain()
        reads: deque[_Read] = deque()
        while True:
            if iteration != self._iteration:
                raise RuntimeError("this iteration ended when another one of the same loader began, or it was closed")
            while len(reads) < self._prefetch and (part := next(parts, None)) is not None:
                reads.append(self._read(part))
            while reads and len(self._running) < _DEPTH:
                # Never wait for the disk while a finished batch is at hand.
                if self._running and not all(future.done() for future in reads[0].encoded):
                    break
                self._run(reads.popleft())
            if not self._running:
                return
            yield self._take()

    def _read(self, part: Part) -> _Read:
        if len(part.samples) > self._batch_size:
            raise ValueError(f"batch_size must hold the largest part, got {self._batch_size} and {len(part.samples)}")

        def read(samples: list[int]) -> list[bytes]:
            return [self._files.read(sample) for sample in samples]

        pieces = [part.samples[piece].tolist() for piece in chunks(part.samples, self._threads)]
        return _Read(part, [self._workers.submit(partial(read, piece)) for piece in pieces])

    def _run(self, read: _Read) -> None:
        encoded = [image for future in read.encoded for image in gather(future, self._files)]
        if encoded:
            self._feed(encoded, self._draw(read.part))
            assert self._pipeline is not None
            self._pipeline.schedule_run()
        self._running.append(_Run(read.part, encoded))

    def _draw(self, part: Part) -> augment.Geometry:
        heights, widths = self._heights[part.samples], self._widths[part.samples]
        return augment.draw(self._augmentation, self._seed, part.epoch, part.positions, heights, widths)

    def _feed(self, encoded: list[bytes], geometry: augment.Geometry) -> None:
        if self._pipeline is None:
            self._pipeline = self._build()
            self._prime(self._pipeline, encoded[0], geometry)
        _feed(self._pipeline, self._inputs, encoded, geometry)

    def _take(self) -> tuple[torch.Tensor, torch.Tensor]:
        part = self._running[0].part
        labels = torch.from_numpy(self._split.index["label"][part.samples].astype(np.int64)).to(self._device)
        if len(part.samples) == 0:
            images = torch.empty((0, 3, self._size, self._size), device=self._device)
        else:
            assert self._pipeline is not None
            try:
                # DALI's default executor hands over the memory: it is not written to again while a tensor refers to it.
                images = from_dlpack(self._pipeline.outputs()[0].as_tensor())
            except RuntimeError as error:
                self._pipeline = None  # after an error its counts drift
                self._running.clear()
                raise ValueError(f"cannot decode a sample of {self._split.name}: {error}") from error
        self._running.popleft()
        return images, labels

    def _drain(self) -> None:
        """Takes the batches an abandoned iteration left in the pipeline."""
        while self._running:
            self._take()

    def _build(self) -> Pipeline:
        gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if gpu else None,
            prefetch_queue_depth=_DEPTH,
            exec_dynamic=True,
        )
        side = [self._size, self._size]
        # Stored pixels count, as everywhere else in training: an EXIF orientation is applied when data is prepared.
        decoding = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB, "adjust_orientation": False}
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, batch=True, no_copy=True)
            anchor, shape, shift = (
                fn.external_source(name=name, dtype=types.INT32, ndim=1, batch=True)
                for name in ("anchor", "shape", "shift")
            )
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0, batch=True)
            if self._augmentation.area:
                images = fn.decoders.image_slice(encoded, start=anchor, shape=shape, axes=[0, 1], **decoding)
            else:
                images = fn.decoders.image(encoded, **decoding)
            if self._resizes:
                images = fn.resize(images, size=side, interp_type=types.INTERP_LINEAR, antialias=True)
            if self._augmentation.pad:
                images = fn.slice(
                    images, start=shift, shape=side, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
                )
            images = fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in self._mean],
                std=[255 * value for value in self._std],
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _prime(self, pipeline: Pipeline, image: bytes, geometry: augment.Geometry) -> None:
        # The first schedule_run runs the pipeline _DEPTH times at once; give it something to eat.
        one = augment.Geometry(geometry.anchor[:1], geometry.shape[:1], geometry.shift[:1], geometry.mirror[:1])
        for _ in range(_DEPTH):
            _feed(pipeline, self._inputs, [image], one)
        pipeline.schedule_run()
        for _ in range(_DEPTH):
            pipeline.outputs()


def _feed(pipeline: Pipeline, names: list[str], encoded: list[bytes], geometry: augment.Geometry) -> None:
    inputs: dict[str, list[NDArray[np.uint8]] | NDArray[np.int32]] = {
        "encoded": [np.frombuffer(image, np.uint8) for image in encoded],
        "anchor": geometry.anchor,
        "shape": geometry.shape,
        "shift": geometry.shift,
        "mirror": geometry.mirror,
    }
    for name in names:
        pipeline.feed_input(name, inputs[name])
