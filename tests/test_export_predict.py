"""`infomcr export` and `infomcr predict`: what leaves a run computes what evaluation computed."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from data_sets import jpeg
from PIL import Image
from safetensors import safe_open

from infomcr_dist import checkpoint, export, models
from infomcr_dist.cli import main
from infomcr_dist.experiment import eval_loader_config
from infomcr_dist.initial_weights import read_weights
from infomcr_dist.predict import logits
from infomcr_dist.trained import Trained, load_trained
from infomcr_dist.world import SingleProcess
from pipelines import evaluation_batches, open_dataset, open_loader
from pipelines.format.loose import open_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Iterator[Path]:
    """A run, `run`, and its test images as files, `images/N.EXTENSION`."""
    root = tmp_path_factory.mktemp("export")
    (root / "recipe.yaml").write_text(
        f"data: {{path: {small_data}, backend: torch, global_batch_size: 32, train_images: 128}}\nepochs: 2\n"
        "evaluation: {batch_size: 32, transform: center_crop}\nschedule: {kind: constant}\nthreads: 1\n"
        "regularizer: {when: never}\nmetric: {trials: 0}\ntelemetry: {port: null}\n"
    )
    (root / "images").mkdir()
    split = open_dataset(small_data).splits["test"]
    for number, row in enumerate(split.index):
        content = split.shards[row["shard"]].path.read_bytes()[row["offset"] : row["offset"] + row["size"]]
        extension = "jpg" if content[:2] == b"\xff\xd8" else "png"
        (root / "images" / f"{number:03d}.{extension}").write_bytes(content)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["train", "recipe.yaml", "run_dir=run"]) == 0
        yield root
    torch.set_num_threads(threads)


def no_data(path: str) -> None:
    pytest.fail(f"{path} was opened")


@pytest.fixture
def trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The run's network, for which the data set is not needed."""
    with monkeypatch.context() as patch:
        patch.setattr("infomcr_dist.trained.open_data", no_data)
        return load_trained(folder / "run", None, torch.device("cpu"))


def test_a_checkpoint_of_before_it_kept_the_normalization(folder: Path, trained: Trained, tmp_path: Path) -> None:
    state = checkpoint.load(trained.path)
    del state["mean"], state["std"]
    torch.save(state, tmp_path / "old.pt")
    found = load_trained(tmp_path / "old.pt", None, torch.device("cpu"))
    assert (found.mean, found.std) == (trained.mean, trained.std)


def evaluated(trained: Trained, data: Path) -> torch.Tensor:
    """The logits of the test images as the run evaluates them."""
    dataset, world = open_dataset(data), SingleProcess()
    loader = open_loader(dataset.splits["test"], eval_loader_config(trained.config, dataset, 16, 32, world))
    with torch.no_grad():
        batches = [trained.model(images) for _, images, _ in loader.batches(evaluation_batches(70, 32, 0, 1))]
    loader.close()
    return torch.cat(batches)


@pytest.mark.parametrize("form", ["files", "shards"])
def test_predict_computes_the_logits_of_evaluation_bitwise(
    form: str, folder: Path, trained: Trained, small_data: Path, tmp_path: Path
) -> None:
    paths = [folder / "images"] if form == "files" else [small_data / "test"]
    found = torch.cat(list(logits(trained, open_images(paths, tmp_path), SingleProcess())))
    assert torch.equal(found, evaluated(trained, small_data))


def test_predict_writes_the_likeliest_classes(
    folder: Path, trained: Trained, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probabilities = evaluated(trained, small_data).double().softmax(1)
    assert main(["predict", "run", "images", "--csv", "out.csv"]) == 0
    assert capsys.readouterr().out == "written: out.csv, 70 images\n"
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert [row["image"] for row in rows] == sorted(f"images/{name}" for name in os.listdir("images"))
    for row, expected in zip(rows, probabilities, strict=True):
        order = expected.argsort(descending=True)[:5]
        assert [row[f"class_{n}"] for n in range(1, 6)] == [trained.classes[i] for i in order]
        assert [float(row[f"probability_{n}"]) for n in range(1, 6)] == pytest.approx(
            expected[order].tolist(), abs=1e-6
        )
    assert main(["predict", "run", "images/000." + os.listdir("images")[0][-3:]]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    first = probabilities[0].topk(5)
    assert line == f"{rows[0]['image']}: " + ", ".join(
        f"{trained.classes[i]} {p:.1%}" for p, i in zip(first.values, first.indices, strict=True)
    )


def test_images_of_any_kind_keep_their_order_and_names(folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    (mixed / "deep").mkdir(parents=True)
    (mixed / "b.JPEG").write_bytes(jpeg(1, 40, 30))
    (mixed / "notes.txt").write_text("no image")
    Image.new("L", (20, 10)).save(mixed / "deep" / "a.png")
    with tarfile.open(mixed / "z.tar", "w") as archive:
        for name, content in (("x/1.jpg", jpeg(2)), ("x/1.cls", b"3"), ("x/2.jpg", jpeg(3))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "scratch").mkdir()
    images = open_images([mixed, mixed / "b.JPEG"], tmp_path / "scratch")
    shard = f"{mixed}/z.tar"
    assert images.names == [
        f"{mixed}/b.JPEG", f"{mixed}/deep/a.png", f"{shard}:x/1.jpg", f"{shard}:x/2.jpg", f"{mixed}/b.JPEG"
    ]  # fmt: skip
    assert images.split.index["height"].tolist() == [40, 10, 32, 32, 40]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("gone.jpg", "gone.jpg does not exist: give images, folders or .tar shards"),
        ("recipe.yaml", "recipe.yaml must end in one of .jpeg, .jpg, .png, .tar: convert it"),
        ("run", "no .jpg, .jpeg or .png image in run"),
        ("text.jpg", "text.jpg has no size in its header: truncated, damaged, or no image"),
        ("half.jpg", "cannot decode half.jpg: "),
    ],
)
def test_what_cannot_be_classified_is_named_in_one_line(
    images: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.jpg").write_text("no image")
    Path("half.jpg").write_bytes(jpeg(1, 64, 64)[:900])
    assert main(["predict", "run", images]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_export_writes_files_that_stand_alone(folder: Path, trained: Trained, small_data: Path) -> None:
    assert main(["export", "run", "output=net"]) == 0
    dataset = open_dataset(small_data)
    with safe_open("net.safetensors", framework="pt") as file:
        said = file.metadata()
    for about in (said, {p.key: p.value for p in onnx.load("net.onnx").metadata_props}):
        assert json.loads(about["classes"]) == dataset.classes
        assert tuple(json.loads(about["mean"])) == dataset.mean
        assert tuple(json.loads(about["std"])) == dataset.std
        assert (about["model"], about["image_size"], about["epochs"]) == ("resnet20", "16", "2")
        assert about["transform"] == "center_crop"
    # Weights: into a network that knows nothing of the run.
    network = models.build("resnet20", 6, 16).eval()
    network.load_state_dict(read_weights(Path("net.safetensors"))[0])
    pixels = np.random.default_rng(0).integers(256, size=(4, 3, 16, 16), dtype=np.uint8)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (dataset.mean, dataset.std))
    with torch.no_grad():
        expected = network(torch.from_numpy(((pixels / 255 - mean) / std).astype(np.float32))).numpy()
    # ONNX: pixels as they are.
    session = onnxruntime.InferenceSession("net.onnx")
    for count in (4, 1):
        (found,) = session.run(None, {"images": pixels[:count]})
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


class Odd(torch.nn.Module):
    """Of what ONNX has no operator for, or a graph that is fixed by the traced batch."""

    def __init__(self, num_classes: int, kind: str = "inverse") -> None:
        super().__init__()
        self.linear, self.kind = torch.nn.Linear(3, num_classes), kind

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.linear(images.mean((2, 3)))
        if self.kind == "inverse":
            return x + torch.linalg.matrix_exp(images[:, 0]).mean((1, 2))[:, None]
        return x + float(images.sum())


@pytest.mark.parametrize(
    ("kind", "message"),
    [("inverse", "ONNX cannot express"), ("traced", "the logits of ONNX differ from those of .* nothing is written")],
)
def test_a_network_that_onnx_does_not_compute_is_refused(kind: str, message: str, trained: Trained) -> None:
    odd = Trained(**{**vars(trained), "model": Odd(6, kind).eval()})
    with pytest.raises(ValueError, match=message):
        export.to_onnx(odd)


def test_a_missing_library_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main(["export", "run", "output=missing"]) == 2
    error = capsys.readouterr().err
    assert error == "error: export needs the module onnxruntime: pip install 'infomcr_dist[export]'\n"
    assert not Path("missing.safetensors").exists()


@pytest.mark.parametrize("command", [["export"], ["predict", "images"]])
def test_a_run_that_is_none(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = command
    assert main([name, "nowhere", *rest]) == 2
    assert capsys.readouterr().err.startswith("error: RUN: there is no checkpoint at nowhere")
