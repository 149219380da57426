"""Processes of loaders and of pools: what they give, and that none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_data_set, make_folder

from pipelines import Dataset, Loader, LoaderConfig, Sampler, evaluation_batches, open_loader

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_data_set(tmp_path_factory.mktemp("processes"))


def open_train(dataset: Dataset, backend: str = "torch", **settings: object) -> Loader:
    given = {"size": 32, "seed": 5, "batch_size": 16, "device": torch.device("cpu"), "backend": backend, **settings}
    config = LoaderConfig(mean=dataset.mean, std=dataset.std, **given)  # type: ignore[arg-type]
    return open_loader(dataset.splits["train"], config)


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    children = [text for path in Path(f"/proc/{process}/task").glob("*/children") for text in path.read_text().split()]
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def started_since(before: set[int], count: int) -> set[int]:
    """The processes that this one has started since, so many."""
    wait_until(lambda: len(set(descendants(os.getpid())) - before) == count)
    return set(descendants(os.getpid())) - before


def kill_and_see_all_end(parent: "subprocess.Popen[str]", least: int) -> None:
    """The parent's processes, at least so many, end after it."""
    wait_until(lambda: len(descendants(parent.pid)) >= least)
    processes = descendants(parent.pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: all(map(has_ended, processes)))


@pytest.mark.parametrize("backend", ["torch", "webdataset"])
@pytest.mark.parametrize("augmentation", ["flip", "crop4_flip", "random_resized_crop"])
def test_bytes_normalized_by_the_device_are_the_same_images(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, backend: str, augmentation: str
) -> None:
    results = []
    for normalized, dtype in ((True, np.float32), (False, np.uint8)):
        monkeypatch.setattr("pipelines.loaders.memory.is_normalized", lambda _, value=normalized: value)
        loader = open_train(dataset, backend, augmentation=augmentation, color_jitter=0.2)
        assert loader._buffers.memory.batch(0).images.dtype == dtype  # type: ignore[attr-defined]
        results.append(list(loader.batches(Sampler(27, 10, seed=0).local_batches(0, 0, 1))))
        loader.close()
    for (_, images, labels), (_, others, other_labels) in zip(*results, strict=True):
        assert others.dtype == torch.float32
        assert others.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_batches_reach_another_device(dataset: Dataset) -> None:
    loader = open_train(dataset, device=torch.device("meta"))
    for local_batch, images, labels in loader.batches(evaluation_batches(27, 10, 0, 1)):
        assert images.device.type == labels.device.type == "meta"
        assert images.shape == (len(local_batch.samples), 3, 32, 32)
    loader.close()


def test_any_number_of_processes_gives_the_same_images(dataset: Dataset) -> None:
    batches = []
    for threads in (1, 3, 20):
        loader = open_train(dataset, threads=threads, augmentation="random_resized_crop")
        batches.append([images for _, images, _ in loader.batches(evaluation_batches(27, 10, 0, 1))])
        loader.close()
    for one, *others in zip(*batches, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_processes_start_with_the_first_batch_and_end_with_the_loader(dataset: Dataset) -> None:
    before = set(descendants(os.getpid()))
    loader = open_train(dataset, threads=2)
    assert set(descendants(os.getpid())) == before
    next(batches := loader.batches(evaluation_batches(27, 4, 0, 1)))  # the others are under way
    processes = started_since(before, 3)
    loader.close()
    wait_until(lambda: all(map(has_ended, processes)))
    with pytest.raises(RuntimeError, match="or it was closed"):
        next(batches)


def test_a_killed_process_is_reported(dataset: Dataset) -> None:
    before = set(descendants(os.getpid()))
    loader = open_train(dataset, threads=2)
    batches = loader.batches(evaluation_batches(27, 1, 0, 1))
    next(batches)
    processes = sorted(set(descendants(os.getpid())) - before)
    for process in processes[1:]:
        os.kill(process, signal.SIGKILL)
    with pytest.raises(
        ValueError, match="a process that decodes images was killed by signal 9, perhaps because memory"
    ):
        list(batches)
    loader.close()


def test_signals_for_the_trainer_leave_the_processes_alone(dataset: Dataset) -> None:
    before = set(descendants(os.getpid()))
    loader = open_train(dataset, threads=2)
    batches = loader.batches(evaluation_batches(27, 4, 0, 1))
    next(batches)
    for process in started_since(before, 3):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(process, number)
    assert sum(len(labels) for _, _, labels in batches) == 23
    loader.close()


@pytest.mark.parametrize("stalled", [False, True])
def test_a_loaders_processes_end_with_a_killed_trainer(tmp_path: Path, stalled: bool) -> None:
    dataset = make_data_set(tmp_path)
    script = f"""
import os, torch, pipelines
data = pipelines.open_dataset({str(dataset.path)!r})
split = data.splits["train"]
if {stalled}:
    for shard in split.shards:
        shard.path.unlink()
        os.mkfifo(shard.path)  # opening it waits for a writer that never comes
more = dict(size=32, mean=data.mean, std=data.std, batch_size=8, device=torch.device("cpu"), threads=3)
loader = pipelines.open_loader(split, pipelines.LoaderConfig(backend="torch", **more))
while True:
    list(loader.batches(pipelines.evaluation_batches(len(split), 8, 0, 1)))
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True) as trainer:
        kill_and_see_all_end(trainer, 4)


@pytest.mark.parametrize(
    "pool",
    ["concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context('spawn'), begin_worker, (os.getpid(),))",
     "loky.ProcessPoolExecutor(2, initializer=begin_worker, initargs=(os.getpid(),))"],
)  # fmt: skip
def test_a_pools_processes_end_with_a_killed_parent(pool: str) -> None:
    script = f"""
import concurrent.futures, loky, multiprocessing, os, time
from pipelines.pools import begin_worker
pool = {pool}
print(list(pool.map(abs, [1, 2])), flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "[1, 2]\n"  # both have begun, and wait for work
        kill_and_see_all_end(parent, 2)


def test_a_process_of_a_killed_doctor_ends() -> None:
    script = "import time; from infomcr_dist.doctor import memory; memory.in_own_process('', '', time.sleep, 600)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True) as parent:
        kill_and_see_all_end(parent, 2)


def test_the_processes_of_a_killed_preparation_end(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=100, height=256, width=256)
    for number in range(20):  # each link is a class of its own
        (source / f"more{number}").mkdir()
        for path in (source / "cat").iterdir():
            os.link(path, source / f"more{number}" / path.name)
    command = [sys.executable, "-m", "pipelines.prepare", str(source), str(tmp_path / "data"), "processes=2"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        kill_and_see_all_end(parent, 2)
