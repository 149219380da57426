"""What DALI reads without a copy stays until it has been read, on a GPU that takes its time."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from data_sets import make_data_set

from pipelines import LoaderConfig, evaluation_batches, open_loader
from pipelines.loaders.dali import DaliLoader, _Run


class Stream:
    """A GPU's stream: work that is recorded on it is done when `reached` counts it."""

    reached = 0
    recorded = 0


class Event:
    def record(self, stream: Stream) -> None:
        self.stream = stream
        stream.recorded += 1
        self.place = stream.recorded

    def query(self) -> bool:
        return self.stream.reached >= self.place


def test_encoded_images_stay_until_the_gpu_has_decoded_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_data_set(tmp_path)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    outputs, schedule = DaliLoader._outputs, DaliLoader._schedule
    runs: list[weakref.ref[_Run]] = []

    def scheduled(self: DaliLoader, run: _Run) -> None:
        runs.append(weakref.ref(run))
        schedule(self, run)

    monkeypatch.setattr(DaliLoader, "_outputs", lambda self, stream: outputs(self, None))
    monkeypatch.setattr(DaliLoader, "_schedule", scheduled)
    config: Any = {"size": 32, "mean": dataset.mean, "std": dataset.std, "batch_size": 3, "prefetch": 1}
    loader = open_loader(dataset.splits["train"], LoaderConfig(backend="dali", device=torch.device("cpu"), **config))
    assert isinstance(loader, DaliLoader)
    stream = Stream()
    batches = loader._batches(iter(evaluation_batches(27, 3, 0, 1)), stream)  # 9 of them

    def alive() -> list[bool]:
        gc.collect()
        return [run() is not None for run in runs]

    for _ in range(5):
        next(batches)
    assert all(alive()[:5]), "none of them is decoded so far"
    stream.reached = 3
    next(batches)
    assert alive()[:6] == [False] * 3 + [True] * 3
    stream.reached = 6
    assert len(list(batches)) == 3
    assert alive() == [False] * 6 + [True] * 3
    loader.close()
    assert not any(alive())
