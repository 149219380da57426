"""The backend "dali", the default: NVIDIA DALI decodes and augments what our reader reads.

Encoded images, crop boxes, shifts and mirrors are fed to one DALI pipeline that lives as long as the loader. DALI
draws no random number and has no order, so nothing in it depends on the world size or on where a run started, and
nothing is built again for an epoch. On a GPU, decoding is "mixed" and the rest runs on the GPU.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

from .. import augment
from ..format import Split
from ..sampler import Ids, LocalBatch
from .base import IndexedLoader, check_size, to_device
from .config import Batch, LoaderConfig
from .reader import Files, SampleError, Workers, chunks, reading_threads

types: Any = nvidia.dali.types  # its members are made at import, unseen by type checkers

# Batches inside DALI at a time: one being decoded, one finished, so that its threads never idle between steps.
_DEPTH = 2


@dataclass
class _Read:
    """A local batch whose encoded images are being read, and its samples after substitution."""

    local_batch: LocalBatch
    samples: Ids
    tasks: list[Future[list[bytes]]]


@dataclass
class _Run:
    """A local batch inside DALI, which reads `encoded` without a copy: the bytes must stay."""

    local_batch: LocalBatch
    samples: Ids
    encoded: list[bytes]


class DaliLoader(IndexedLoader):
    """Batches of one split through DALI; see `LoaderConfig`."""

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        super().__init__(split, config)
        self._readers = reading_threads(split, config.threads)
        self._files, self._workers = Files(split, self._readers, config.cache_bytes), Workers(self._readers)
        size = config.size
        self._boxes = bool(self._augmentation.area or self._augmentation.center)
        self._resizes = self._boxes or split.sides != (size, size)
        # Feeding DALI takes a millisecond or two of Python a batch, so a thread of its own does it during the step.
        self._driver = Workers(1)
        self._pipeline: Pipeline | None = None
        self._inputs: list[str] = []
        self._running: deque[_Run] = deque()
        self._taken: deque[tuple[_Run, torch.cuda.Event]] = deque()

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        """(local_batch, images, labels) of each local batch; this call ends an earlier, unfinished iteration."""
        check = self._iterations.begin()
        gpu = self._config.device.type == "cuda"
        # DALI orders its use of the memory of its outputs with the work on this stream.
        stream = torch.cuda.current_stream(self._config.device) if gpu else None
        return self._ahead(self._batches(iter(local_batches), stream), check)

    def close(self) -> None:
        """Ends the threads and frees the pipeline."""
        self._iterations.end()
        self._driver.submit(self._free)
        self._driver.close()
        self._workers.close()

    def _free(self) -> None:
        self._pipeline = None  # first: it may be reading what was fed
        self._running.clear()
        self._taken.clear()

    def _ahead(self, batches: Iterator[Batch], check: Callable[[], None]) -> Iterator[Batch]:
        """The same batches, each one prepared by the driving thread while the caller uses the one before."""
        upcoming = self._driver.submit(partial(next, batches, None))
        while True:
            check()
            batch = upcoming.result()
            if batch is None:
                return
            upcoming = self._driver.submit(partial(next, batches, None))
            yield batch
            del batch

    def _batches(self, local_batches: Iterator[LocalBatch], stream: Any) -> Iterator[Batch]:
        self._drain()
        reads: deque[_Read] = deque()
        try:
            while True:
                while len(reads) < self._config.prefetch and (following := next(local_batches, None)) is not None:
                    reads.append(self._read(following))
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

    def _read(self, local_batch: LocalBatch) -> _Read:
        check_size(local_batch, self._config)
        samples = local_batch.samples.copy()

        def read(piece: slice) -> list[bytes]:
            encoded = []
            for row in range(piece.start, piece.stop):
                samples[row], image = self._read_one(int(samples[row]))
                encoded.append(image)
            return encoded

        tasks = [self._workers.submit(partial(read, piece)) for piece in chunks(samples, self._readers)]
        return _Read(local_batch, samples, tasks)

    def _read_one(self, sample: int) -> tuple[int, bytes]:
        """The encoded image of `sample`, or of its substitute, and which it is."""
        while True:
            try:
                return sample, self._files.read_plain(sample)
            except SampleError as error:
                sample = self._faults.substitute(sample, error)

    def _run(self, read: _Read) -> None:
        encoded = [image for task in read.tasks for image in self._files.gather(task)]
        self._running.append(_Run(read.local_batch, read.samples, encoded))
        try:
            self._schedule(self._running[-1])
        except RuntimeError as error:
            self._repair(error)

    def _schedule(self, run: _Run) -> None:
        if run.encoded:
            self._pipeline = self._pipeline or self._build()
            self._feed(self._pipeline, run.encoded, self._geometry(run))
            self._pipeline.schedule_run()

    def _geometry(self, run: _Run) -> augment.Geometry:
        return self._draw(run.local_batch.epoch, run.local_batch.positions, run.samples)

    def _take(self, stream: Any) -> Batch:
        run = self._running[0]
        if run.encoded:
            while True:
                try:
                    images = self._outputs(stream)
                    break
                except RuntimeError as error:
                    self._repair(error)
            if stream is not None:
                self._keep(self._running[0], stream)
        else:
            images = torch.empty((0, self._config.size, self._config.size, 3), device=self._config.device)
        self._running.popleft()
        labels = to_device(self._config.device, self._labels[run.samples].astype(np.int64))
        return run.local_batch, images.permute(0, 3, 1, 2), labels

    def _outputs(self, stream: Any) -> torch.Tensor:
        assert self._pipeline is not None
        # DALI's default executor passes the memory on: it is not written to again while a tensor refers to it.
        return from_dlpack(self._pipeline.outputs(stream)[0].as_tensor())

    def _keep(self, run: _Run, stream: Any) -> None:
        """Keeps the encoded images until the GPU has made its own of them: it hands its out before that."""
        while self._taken and self._taken[0][1].query():
            self._taken.popleft()
        event = torch.cuda.Event()
        event.record(stream)
        self._taken.append((run, event))

    def _repair(self, error: RuntimeError) -> None:
        """Puts substitutes for what cannot be decoded into the batches inside DALI, and starts them again.

        After an error a DALI pipeline is of no more use, and it does not report which sample was at fault.
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
        while not self._decodes(run.encoded[row], self._geometry(run)[one]):
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
        """Drops what an unfinished iteration left in the pipeline."""
        if self._running and self._pipeline is not None:
            try:
                for run in self._running:
                    if run.encoded:
                        self._pipeline.outputs()
            except RuntimeError:
                self._pipeline = None
        self._running.clear()

    def _build(self) -> Pipeline:
        config = self._config
        gpu = config.device.type == "cuda"
        index = config.device.index if config.device.index is not None or not gpu else torch.cuda.current_device()
        pipeline = Pipeline(
            batch_size=config.batch_size,
            num_threads=config.threads,
            device_id=index if gpu else None,
            prefetch_queue_depth=_DEPTH,
            exec_dynamic=True,
        )
        side = [config.size, config.size]
        # The pixels as stored: an EXIF orientation is applied when data is prepared.
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
            if config.color_jitter:
                changes = {name: source(name, types.FLOAT, 0) for name in ("brightness", "contrast", "saturation")}
                images = fn.color_twist(images, **changes)
            padding: dict[str, Any] = {}
            if self._augmentation.pad:
                # Padding in a slice takes 30 microseconds an image. Here the slice only cuts; the last step pads.
                kept = {"start": source("kept_start", types.INT32, 1), "shape": source("kept_shape", types.INT32, 1)}
                images = fn.slice(images, **kept, axes=[0, 1])
                padding = {
                    "crop": side,
                    "crop_pos_y": source("pad_above", types.FLOAT, 0),
                    "crop_pos_x": source("pad_left", types.FLOAT, 0),
                    "out_of_bounds_policy": "pad",
                    "fill_values": [-mean / std for mean, std in zip(config.mean, config.std, strict=True)],
                }
            images = fn.crop_mirror_normalize(
                images,
                mirror=source("mirror", types.INT32, 0) if self._augmentation.flip else 0,
                dtype=types.FLOAT,
                output_layout="HWC",
                mean=[255 * value for value in config.mean],
                std=[255 * value for value in config.std],
                **padding,
            )
            pipeline.set_outputs(images)
        pipeline.build()
        # The first schedule_run runs the pipeline _DEPTH times at once, and needs as many inputs.
        sides = np.full(1, config.size, np.int32)
        geometry = augment.draw(self._augmentation, 0, 0, np.zeros(1, np.int64), sides, sides)
        encoded = [_black_jpeg(config.size)]  # until the outputs are there
        for _ in range(_DEPTH):
            self._feed(pipeline, encoded, geometry)
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
            "kept_shape": self._config.size - np.abs(geometry.shift),
            # The window of the last step is larger than what was kept: aligned with its start (0) or end (1).
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
