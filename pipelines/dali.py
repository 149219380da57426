"""The default backend: NVIDIA DALI decodes and augments what our reader hands it.

Encoded images, crop boxes, shifts and mirrors are fed to one DALI pipeline that lives as long as the loader. DALI
draws no random number and knows no order, so nothing in it depends on the world size or on where a run started, and
nothing is built again for an epoch. On a GPU, decoding is "mixed" and the rest runs on the GPU.
"""

import io
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
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from torch.utils.dlpack import from_dlpack

from . import augment
from .order import Ids, Part
from .reader import Faults, Files, OnError, SampleError, Workers, chunks
from .shards import Split

types: Any = nvidia.dali.types  # its members are made at import, unseen by type checkers

# Batches inside DALI at a time: one being decoded, one finished, so that its threads never idle between steps.
_DEPTH = 2

_Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class _Read:
    """A part whose encoded images are on their way, and the samples that really stand in it."""

    part: Part
    samples: Ids
    tasks: list[Future[list[bytes]]]


@dataclass
class _Run:
    """A part inside DALI, which reads `encoded` without a copy: the bytes must stay."""

    part: Part
    samples: Ids
    encoded: list[bytes]


class DaliLoader:
    """Batches of one split through DALI; see `pipelines.open_loader` for the arguments."""

    def __init__(
        self,
        split: Split,
        *,
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
        on_error: OnError,
    ) -> None:
        self._split, self._seed, self._size, self._device = split, seed, size, device
        self._augmentation, self._color_jitter = augment.augmentation(augmentation), color_jitter
        self._mean, self._std = mean, std
        self._batch_size, self._threads, self._prefetch = batch_size, threads, prefetch
        self._heights, self._widths = split.index["height"], split.index["width"]
        self._labels = split.labels
        self._boxes = bool(self._augmentation.area or self._augmentation.center)
        self._resizes = self._boxes or bool((self._heights != size).any() or (self._widths != size).any())
        self._files, self._faults = Files(split, threads), Faults(split, on_error)
        # Feeding DALI takes a millisecond or two of Python a batch, so a thread of its own does it during the step.
        self._workers, self._driver = Workers(threads), Workers(1)
        self._pipeline: Pipeline | None = None
        self._inputs: list[str] = []
        self._running: deque[_Run] = deque()
        self._iteration = 0

    @property
    def skipped(self) -> dict[int, str]:
        """Why samples were left out, by id (on_error="skip")."""
        return self._faults.skipped

    def batches(self, parts: Iterable[Part]) -> Iterator[_Batch]:
        """(images, labels) of each part; an earlier, unfinished iteration of this loader ends by this call."""
        self._iteration += 1
        gpu = self._device.type == "cuda"
        # DALI orders its use of the memory it hands over with the work on this stream.
        stream = torch.cuda.current_stream(self._device) if gpu else None
        return self._ahead(self._batches(iter(parts), stream), self._iteration)

    def close(self) -> None:
        """Ends the threads and frees the pipeline."""
        self._iteration += 1
        self._driver.submit(self._free)
        self._driver.close()
        self._workers.close()

    def _free(self) -> None:
        self._running.clear()
        self._pipeline = None

    def _ahead(self, batches: Iterator[_Batch], iteration: int) -> Iterator[_Batch]:
        """The same batches, each one taken by the driving thread while the caller works with the last."""
        upcoming = self._driver.submit(partial(next, batches, None))
        while iteration == self._iteration:
            batch = upcoming.result()
            if batch is None:
                return
            upcoming = self._driver.submit(partial(next, batches, None))
            yield batch
            del batch
        raise RuntimeError("this iteration ended when another one of the loader began, or it was closed")

    def _batches(self, parts: Iterator[Part], stream: Any) -> Iterator[_Batch]:
        self._drain()
        reads: deque[_Read] = deque()
        try:
            while True:
                while len(reads) < self._prefetch and (part := next(parts, None)) is not None:
                    reads.append(self._read(part))
                while reads and len(self._running) < _DEPTH:
                    # Never wait for the disk while a finished batch is at hand.
                    if self._running and not all(task.done() for task in reads[0].tasks):
                        break
                    self._run(reads.popleft())
                if not self._running:
                    return
                yield self._take(stream)
        finally:
            for read in reads:
                for task in read.tasks:
                    task.cancel()

    def _read(self, part: Part) -> _Read:
        if len(part.samples) > self._batch_size:
            raise ValueError(f"batch_size must hold the largest part, got {self._batch_size} and {len(part.samples)}")
        samples = part.samples.copy()

        def read(piece: slice) -> list[bytes]:
            encoded = []
            for row in range(piece.start, piece.stop):
                samples[row], image = self._read_one(int(samples[row]))
                encoded.append(image)
            return encoded

        tasks = [self._workers.submit(partial(read, piece)) for piece in chunks(samples, self._threads)]
        return _Read(part, samples, tasks)

    def _read_one(self, sample: int) -> tuple[int, bytes]:
        """The encoded image of `sample`, or of the one that stands in for it, and which it is."""
        while True:
            try:
                return sample, self._files.read(sample)
            except SampleError as error:
                sample = self._faults.substitute(sample, error)

    def _run(self, read: _Read) -> None:
        encoded = [image for task in read.tasks for image in self._files.gather(task)]
        self._running.append(_Run(read.part, read.samples, encoded))
        try:
            self._schedule(self._running[-1])
        except RuntimeError as error:
            self._repair(error)

    def _schedule(self, run: _Run) -> None:
        if run.encoded:
            self._pipeline = self._pipeline or self._build()
            self._feed(self._pipeline, run.encoded, self._draw(run))
            self._pipeline.schedule_run()

    def _draw(self, run: _Run) -> augment.Geometry:
        heights, widths = self._heights[run.samples], self._widths[run.samples]
        part = run.part
        return augment.draw(
            self._augmentation, self._seed, part.epoch, part.positions, heights, widths, self._color_jitter
        )

    def _take(self, stream: Any) -> _Batch:
        run = self._running[0]
        if run.encoded:
            while True:
                try:
                    images = self._outputs(stream)
                    break
                except RuntimeError as error:
                    self._repair(error)
        else:
            images = torch.empty((0, 3, self._size, self._size), device=self._device)
        self._running.popleft()
        return images, torch.from_numpy(self._labels[run.samples]).to(self._device)

    def _outputs(self, stream: Any) -> torch.Tensor:
        assert self._pipeline is not None
        # DALI's default executor hands over the memory: it is not written to again while a tensor refers to it.
        return from_dlpack(self._pipeline.outputs(stream)[0].as_tensor())

    def _repair(self, error: RuntimeError) -> None:
        """Puts substitutes for what cannot be decoded in the batches under way, and starts them again.

        After an error a DALI pipeline is of no more use, and it does not say which sample was at fault.
        """
        self._pipeline = None
        under_way = list(self._running)
        self._running.clear()  # stays empty if there is no substitute
        if not sum(self._substitute(run, row) for run in under_way for row in range(len(run.encoded))):
            raise error
        self._running.extend(under_way)
        for run in under_way:
            self._schedule(run)

    def _substitute(self, run: _Run, row: int) -> bool:
        """Replaces that sample of `run` until it can be decoded; returns whether it had to."""
        one = slice(row, row + 1)
        replaced = False
        while not self._decodes(run.encoded[row], self._draw(run)[one]):
            replaced = True
            sample = int(run.samples[row])
            fault = SampleError(f"cannot decode {self._split.where(sample)}: truncated, damaged, or no image")
            run.samples[row], run.encoded[row] = self._read_one(self._faults.substitute(sample, fault))
        return replaced

    def _decodes(self, encoded: bytes, geometry: augment.Geometry) -> bool:
        self._pipeline = self._pipeline or self._build()
        try:
            self._feed(self._pipeline, [encoded], geometry)
            self._pipeline.schedule_run()
            self._pipeline.outputs()
        except RuntimeError:
            self._pipeline = None
            return False
        return True

    def _drain(self) -> None:
        """Drops what an abandoned iteration left in the pipeline."""
        if self._running and self._pipeline is not None:
            try:
                for run in self._running:
                    if run.encoded:
                        self._pipeline.outputs()
            except RuntimeError:
                self._pipeline = None
        self._running.clear()

    def _build(self) -> Pipeline:
        gpu = self._device.type == "cuda"
        index = self._device.index if self._device.index is not None or not gpu else torch.cuda.current_device()
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=index if gpu else None,
            prefetch_queue_depth=_DEPTH,
            exec_dynamic=True,
        )
        side = [self._size, self._size]
        # The stored pixels count; an EXIF orientation is applied when data is prepared.
        decoding = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB, "adjust_orientation": False}
        if gpu:
            decoding["jpeg_fancy_upsampling"] = True  # as on a CPU
        self._inputs = []

        def source(name: str, dtype: Any, ndim: int, **more: Any) -> Any:
            self._inputs.append(name)
            return fn.external_source(name=name, dtype=dtype, ndim=ndim, batch=True, **more)

        with pipeline:
            images = source("encoded", types.UINT8, 1, no_copy=True)
            if self._boxes:
                box = {"start": source("anchor", types.INT32, 1), "shape": source("shape", types.INT32, 1)}
                images = fn.decoders.image_slice(images, **box, axes=[0, 1], **decoding)
            else:
                images = fn.decoders.image(images, **decoding)
            if self._resizes:
                images = fn.resize(images, size=side, interp_type=types.INTERP_LINEAR, antialias=True)
            if self._color_jitter:
                changes = {name: source(name, types.FLOAT, 0) for name in ("brightness", "contrast", "saturation")}
                images = fn.color_twist(images, **changes)
            padding: dict[str, Any] = {}
            if self._augmentation.pad:
                # Padding in a slice takes 30 microseconds an image. Here what leaves is cut off; the last step pads.
                kept = {"start": source("kept_start", types.INT32, 1), "shape": source("kept_shape", types.INT32, 1)}
                images = fn.slice(images, **kept, axes=[0, 1])
                padding = {
                    "crop": side,
                    "crop_pos_y": source("pad_above", types.FLOAT, 0),
                    "crop_pos_x": source("pad_left", types.FLOAT, 0),
                    "out_of_bounds_policy": "pad",
                    "fill_values": [-mean / std for mean, std in zip(self._mean, self._std, strict=True)],
                }
            images = fn.crop_mirror_normalize(
                images,
                mirror=source("mirror", types.INT32, 0) if self._augmentation.flip else 0,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in self._mean],
                std=[255 * value for value in self._std],
                **padding,
            )
            pipeline.set_outputs(images)
        pipeline.build()
        # The first schedule_run runs the pipeline _DEPTH times at once; give it something to eat.
        sides = np.full(1, self._size, np.int32)
        geometry = augment.draw(self._augmentation, 0, 0, np.zeros(1, np.int64), sides, sides)
        for _ in range(_DEPTH):
            self._feed(pipeline, [_black_jpeg(self._size)], geometry)
        pipeline.schedule_run()
        for _ in range(_DEPTH):
            pipeline.outputs()
        return pipeline

    def _feed(self, pipeline: Pipeline, encoded: list[bytes], geometry: augment.Geometry) -> None:
        inputs: dict[str, Any] = {
            "encoded": [np.frombuffer(image, np.uint8) for image in encoded],
            "anchor": geometry.anchor,
            "shape": geometry.shape,
            "kept_start": np.maximum(geometry.shift, 0),
            "kept_shape": self._size - np.abs(geometry.shift),
            # Where the window of the last step, larger than what was kept, lies: at its start (0) or end (1).
            "pad_above": (geometry.shift[:, 0] < 0).astype(np.float32),
            "pad_left": (geometry.shift[:, 1] < 0).astype(np.float32),
            "mirror": geometry.mirror,
            "brightness": np.ascontiguousarray(geometry.jitter[:, 0]),
            "contrast": np.ascontiguousarray(geometry.jitter[:, 1]),
            "saturation": np.ascontiguousarray(geometry.jitter[:, 2]),
        }
        for name in self._inputs:
            pipeline.feed_input(name, inputs[name])


def _black_jpeg(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG")
    return buffer.getvalue()
