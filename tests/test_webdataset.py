import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_data_set

from pipelines import Dataset, Loader, Order, evaluation_parts, open_loader, open_stream

# The library leaves its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_data_set(tmp_path_factory.mktemp("webdataset"))  # shards of 7, 7, 7 and 6 samples


def settings(dataset: Dataset, **more: object) -> dict[str, object]:
    defaults = {"size": 32, "mean": dataset.mean, "std": dataset.std, "batch_size": 32, "device": torch.device("cpu")}
    return {**defaults, "rank": 0, "world_size": 1, **more}


def open_train(dataset: Dataset, **more: object) -> Loader:
    return open_loader(dataset.splits["train"], backend="webdataset", **settings(dataset, **more))  # type: ignore[arg-type]


def stored(dataset: Dataset) -> dict[tuple[int, ...], int]:
    """Rounded pixels of every training sample -> its id, by the torch backend."""
    loader = open_loader(dataset.splits["train"], backend="torch", **settings(dataset))  # type: ignore[arg-type]
    images = torch.cat([images for images, _ in loader.batches(evaluation_parts(27, 32, 0, 1))])
    loader.close()
    return {identity(image): sample for sample, image in enumerate(images)}


def identity(image: torch.Tensor) -> tuple[int, ...]:
    return tuple((image[:, ::5, ::5] * 1000).round().int().flatten().tolist())


def epoch(loader: Loader, dataset: Dataset, number: int = 0, rank: int = 0, size: int = 1) -> list[int]:
    """Ids of the samples an epoch brings, checked against their labels."""
    known, labels, seen = stored(dataset), dataset.splits["train"].labels, []
    for images, found in loader.batches(Order(27, 8, seed=0).parts(number, rank, size)):
        ids = [known[identity(image)] for image in images]
        np.testing.assert_array_equal(found.numpy(), labels[ids])
        seen += ids
    return seen


def test_alone_every_sample_once_an_epoch_in_another_order(dataset: Dataset) -> None:
    loader = open_train(dataset)
    epochs = [epoch(loader, dataset, number) for number in (0, 1)]
    loader.close()
    assert all(sorted(seen) == list(range(27)) for seen in epochs)
    assert epochs[0] != epochs[1] != list(range(27))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_shards_of_their_own_and_batches_as_the_parts_say(dataset: Dataset, size: int) -> None:
    shard = dataset.splits["train"].index["shard"]
    dealt = []
    for rank in range(size):
        loader = open_train(dataset, rank=rank, world_size=size)
        order = Order(27, 8, seed=0)
        counts = [len(labels) for _, labels in loader.batches(order.parts(0, rank, size))]
        assert counts == [len(part.samples) for part in order.parts(0, rank, size)]
        dealt.append(set(shard[epoch(loader, dataset, 0, rank, size)].tolist()))
        loader.close()
    assert sum(len(shards) for shards in dealt) == 4
    assert set.union(*dealt) == {0, 1, 2, 3}


def test_the_same_seed_gives_the_same_stream_and_augmentation(dataset: Dataset) -> None:
    runs = []
    for _ in range(2):
        loader = open_train(dataset, augmentation="random_resized_crop", seed=9)
        runs.append(torch.cat([images for images, _ in loader.batches(Order(27, 8, 0).parts(3, 0, 1))]))
        loader.close()
    assert torch.equal(*runs)


def test_urls_pipes_and_the_cache(dataset: Dataset, tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("the webdataset library fetches http through curl, which is not here")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(dataset.path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}/train/{{000000..000003}}.tar"
        loader = open_stream(web, cache=tmp_path / "cache", **settings(dataset))  # type: ignore[arg-type]
        assert sorted(epoch(loader, dataset)) == list(range(27))
        server.shutdown()
    assert sorted(epoch(loader, dataset, 1)) == list(range(27))  # from the cache: the server is gone
    loader.close()
    pipe = f"pipe:cat {dataset.path}/train/{{000000..000003}}.tar"
    loader = open_stream(pipe, **settings(dataset))  # type: ignore[arg-type]
    assert sorted(epoch(loader, dataset)) == list(range(27))
    loader.close()


def test_what_a_stream_cannot_promise_is_refused(dataset: Dataset) -> None:
    loader = open_train(dataset)
    with pytest.raises(ValueError, match="backend webdataset cannot start at step 2 of an epoch"):
        next(loader.batches(Order(27, 8, 0).parts(0, 0, 1, start=2)))
    with pytest.raises(ValueError, match="cannot see every sample exactly once, as evaluation must"):
        next(loader.batches(evaluation_parts(27, 8, 0, 1)))
    loader.close()
    for more, message in (
        ({"on_error": "skip"}, "cannot skip samples alike on every rank"),
        ({"rank": None}, "needs rank and world_size"),
        ({"world_size": 5}, "needs a shard for every rank, got 4 and 5 ranks"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0\.\.1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            open_train(dataset, **more)


def test_faults_of_a_stream(dataset: Dataset, tmp_path: Path) -> None:
    data = (dataset.path / "train" / "000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:9000])
    entry = dataset.splits["train"].index[0]
    (tmp_path / "bad.tar").write_bytes(data[: entry["offset"]] + bytes(300) + data[entry["offset"] + 300 :])
    for url, message in (
        (f"{tmp_path}/cut.tar", r"cannot stream .*cut\.tar"),
        (f"{tmp_path}/nothing.tar", r"cannot stream .*nothing\.tar"),
        (f"pipe:cat {tmp_path}/nothing.tar", "cannot stream pipe:…: the command failed"),
        (f"{tmp_path}/bad.tar", r"cannot decode .*bad\.tar: 000000-000000"),
    ):
        loader = open_stream(url, **settings(dataset))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            list(loader.batches(Order(7, 7, 0).parts(0, 0, 1)))
        loader.close()
