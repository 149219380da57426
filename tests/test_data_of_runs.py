"""Whole runs in this process: on shards at URLs, and on images on the device, they train what local shards do."""

import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from remote_server import Server, served
from test_train import history, weights

from infomcr_dist import checkpoint
from infomcr_dist.train import main
from pipelines.format import remote

RECIPE = """
model: resnet20
epochs: 2
data: {augmentation: crop1_flip, global_batch_size: 64, backend: torch, path: local}
schedule: {milestones: [1]}
optimizer: {learning_rate: 0.05}
regularizer: {sub_batch_size: 16}
metric: {trials: 1, samples: 8}
checkpoint: {every_steps: 3, keep: 9}
telemetry: {port: null}
threads: 1
"""


@pytest.fixture(scope="module")
def home(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with shards as others have them, `local` and `remote`, a recipe, and its run on the local ones."""
    root = tmp_path_factory.mktemp("runs")
    for folder in ("local", "remote"):
        (root / folder).mkdir()
        for split in ("train", "test"):
            for shard in sorted((small_data / split).glob("*.tar")):
                shutil.copy(shard, root / folder / f"{split}-{shard.name}")
    (root / "recipe.yaml").write_text(RECIPE)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("XDG_CACHE_HOME", os.fspath(root / "cache"))
        patch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.001)
        assert main(["recipe.yaml", "run_dir=expected"]) == 0
        yield root
    torch.set_num_threads(threads)


@pytest.mark.parametrize("where", ["urls", "device"])
def test_a_run_and_a_resumed_one_equal_that_on_local_shards_bitwise(home: Path, where: str) -> None:
    with served(home) if where == "urls" else nullcontext() as server:
        settings = ["data.backend=resident"]
        if server is not None:
            settings = [f"data.path={server.url}/remote/{{train-{{000000..000002}},test-000000}}.tar"]
        assert main(["recipe.yaml", f"run_dir={where}", *settings]) == 0
        shutil.copytree("expected", f"{where}-resumed")
        checkpoints = checkpoint.newest_first(Path(f"{where}-resumed") / "checkpoints")
        for late in checkpoints[:-1]:
            late.unlink()
        assert checkpoints[-1].name.startswith("step-00000003-"), "within the first epoch"
        if server is not None:
            check_reads(server)
        assert main(["recipe.yaml", f"run_dir={where}-resumed", "resume=auto", *settings]) == 0
    for run in (where, f"{where}-resumed"):
        found, expected = weights(Path(run)), weights(Path("expected"))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name
        assert history(Path(run)) == history(Path("expected"))


def check_reads(server: Server) -> None:
    """The run read by byte ranges; the next one meets faults, and reads again what is not in the cache."""
    assert any("train-000001.tar bytes=" in line for line in server.requests)
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]))
    server.faulty, server.faults = "GET .*train", ["503", "cut", "503"]
