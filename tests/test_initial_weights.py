"""Where training begins: from another run, from files of weights, with a new head; and what is refused."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infomcr_dist import checkpoint
from infomcr_dist.initial_weights import load_initial_weights
from infomcr_dist.models import build, parts_by_classes
from infomcr_dist.train import main

NAMES = [f"class {i}" for i in range(5)]


def experiment(classes: list[str] = NAMES, model: str = "resnet20") -> Any:
    return SimpleNamespace(config=SimpleNamespace(model=model), dataset=SimpleNamespace(classes=classes), image_size=16)


def weights(classes: int = 5, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = build("resnet20", classes, 16).state_dict()
    return {name: tensor + torch.ones((), dtype=tensor.dtype) for name, tensor in state.items()}


HEAD = {name for name in weights() if name.startswith("head.")}


@pytest.mark.parametrize("name", ["cnn", "densenet_100_12", "resnet20"])
def test_the_head_is_the_last_layer(name: str) -> None:
    before = torch.get_rng_state()
    found = parts_by_classes(name, 5, 16)
    last = list(build(name, 5, 16).state_dict())[-2:]
    assert found == set(last)
    torch.set_rng_state(before)


def test_a_network_of_a_fixed_number_of_classes_has_no_head() -> None:
    assert parts_by_classes(f"{__name__}:of_ten", 10, 16) == set()


def of_ten() -> torch.nn.Module:
    return build("resnet20", 10, 16)


SAVES: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "plain.pt": torch.save,
    "nested.pt": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "model.pth": lambda state, path: torch.save({"model": state}, path),
    "old.pt": lambda state, path: torch.save({n: t for n, t in state.items() if "num_batches" not in n}, path),
    "tensors.safetensors": save_file,
    "named.safetensors": lambda state, path: save_file(state, path, {"classes": json.dumps(NAMES)}),
    "same classes.pt": lambda state, path: torch.save(
        {"format": checkpoint.FORMAT, "model": state, "classes": NAMES}, path
    ),
}


@pytest.mark.parametrize("name", SAVES)
def test_a_file_of_the_same_classes_gives_all(name: str, tmp_path: Path) -> None:
    given = weights()
    SAVES[name](given, tmp_path / name)
    model = build("resnet20", 5, 16)
    message = load_initial_weights(tmp_path / name, model, experiment())
    assert message == f"init_from: {len(given) - 19 * (name == 'old.pt')} tensors of {tmp_path / name}; new: none"
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, given[key]) or (name == "old.pt" and "num_batches" in key), key


@pytest.mark.parametrize("case", ["more classes", "other classes", "other classes in safetensors", "no head"])
def test_a_head_of_other_classes_is_new(case: str, tmp_path: Path) -> None:
    file = tmp_path / ("file.safetensors" if "safetensors" in case else "file.pt")
    others = [name.upper() for name in NAMES]
    given = weights(7 if case == "more classes" else 5)
    if case == "no head":
        given = {name: tensor for name, tensor in given.items() if name not in HEAD}
    if "safetensors" in case:
        save_file(given, file, {"classes": json.dumps(others)})
    else:
        kept = {"format": checkpoint.FORMAT, "model": given, "classes": others}
        torch.save(kept if case == "other classes" else given, file)
    torch.manual_seed(0)
    model = build("resnet20", 5, 16)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = load_initial_weights(file, model, experiment())
    assert message.endswith("; new: " + ", ".join(name for name, _ in model.named_parameters() if name in HEAD))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, initial[name] if name in HEAD else given[name]), name


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("stem", "first"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            renamed,
            "file.pt lacks stem.0.weight and 4 more: give weights of model=resnet20 for images of 16 x 16 pixels",
        ),
        (lambda state: state | {"aux.weight": torch.ones(2)}, "file.pt has, unlike the network, aux.weight: give"),
        (
            lambda state: state | {"stem.0.weight": torch.ones(16, 3, 7, 7)},
            r"another shape of stem.0.weight, \(16, 3, 7, 7\) where the network has \(16, 3, 3, 3\): give weights",
        ),
        (lambda state: {"epoch": 3}, "file.pt must hold a state dict, tensors by name"),
        (lambda state: [1, 2], "file.pt must hold a state dict, tensors by name"),
        (lambda state: {"format": 0, "model": state}, "file.pt has format 0, known is"),
        (None, "file.pt is not a readable checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    content: Callable[[dict[str, Tensor]], Any] | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "file.pt"
    if content is None:
        file.write_text("no weights")
    else:
        torch.save(content(weights()), file)
    model = build("resnet20", 5, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        load_initial_weights(file, model, experiment())
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_file_of_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      nothing")
    with pytest.raises(ValueError, match=r"init_from: .* is not a readable file of safetensors"):
        load_initial_weights(tmp_path / "file.safetensors", build("resnet20", 5, 16), experiment())


def test_without_safetensors_there_is_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match=r"needs safetensors: pip install 'infomcr_dist\[export\]'"):
        load_initial_weights(tmp_path / "file.safetensors", build("resnet20", 5, 16), experiment())


def test_a_run_from_a_run(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begins with the weights of the other, logs it, and once resumed needs the other no more."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{path: {small_data}, backend: torch, global_batch_size: 32, train_images: 64}}\nepochs: 1\n"
        "schedule: {kind: constant}\nregularizer: {when: never}\nmetric: {trials: 0}\ntelemetry: {port: null}\n"
        "threads: 1\n"
    )
    threads = torch.get_num_threads()
    assert main(["recipe.yaml", "run_dir=first"]) == 0
    still = ["optimizer.learning_rate=1e-30", "optimizer.weight_decay=0", "init_from=first", "seed=7"]
    assert main(["recipe.yaml", "run_dir=second", *still]) == 0
    text = capsys.readouterr().out
    state = checkpoint.load_newest(Path("first"), print)[1]
    assert re.search(r"init_from: \d+ tensors of first; new: none", text)
    second = checkpoint.load_newest(Path("second"), print)[1]["model"]
    for name, tensor in state["model"].items():
        assert "running_" in name or "num_batches" in name or torch.equal(second[name], tensor), name
    (tmp_path / "first").rename(tmp_path / "gone")
    assert main(["recipe.yaml", "run_dir=second", "resume=auto", "epochs=2", *still]) == 0
    assert main(["recipe.yaml", "run_dir=third", *still]) == 2
    assert "init_from: first does not exist: give a run directory" in capsys.readouterr().err
    assert not Path("third").exists()
    torch.set_num_threads(threads)
