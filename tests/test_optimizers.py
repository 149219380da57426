"""Optimizers by name: torch's own steps, mistakes in one line, steps that are skipped, runs that are resumed."""

import copy
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist import checkpoint
from infomcr_dist.config import Config, OptimizerSettings
from infomcr_dist.graphs import update
from infomcr_dist.optimizers import build_optimizer
from infomcr_dist.step import PenaltySettings, train_step
from infomcr_dist.train import main
from infomcr_dist.world import SingleProcess
from pipelines.options import load, to_yaml

ARGUMENTS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": [0.8, 0.95], "amsgrad": True},
    "rmsprop": {"momentum": 0.5, "centered": True},
    "adafactor": {"eps": [None, 1e-2]},
}
KINDS = [
    name.lower()
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
    and issubclass(kind, torch.optim.Optimizer)
]  # fmt: skip
NEEDS_IT = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None, reason="a test dependency: pip install '.[dev]'"
)
BY_PATH = [
    "test_optimizers:Lion",
    *(pytest.param(f"pytorch_optimizer:{name}", marks=NEEDS_IT) for name in ("LARS", "Lamb")),
]
PENALTY = PenaltySettings(alpha=1e-4, beta=1.0, sub_batch_size=4)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, as an optimizer of a user's own."""

    def __init__(self, params: Any, lr: float = 1e-4, beta: float = 0.9, weight_decay: float = 0.0, note: str = ""):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * average.sign())


def tiny(classes: int, image_size: int) -> nn.Module:
    features = 4 * (image_size - 2) ** 2
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(features, classes)
    return nn.Sequential(*layers)


def net() -> nn.Module:
    torch.manual_seed(0)
    return tiny(3, 6)


def settings(kind: str, **others: Any) -> OptimizerSettings:
    decay = 0.0 if kind == "rprop" else 0.01
    arguments = ARGUMENTS.get(kind, {})
    return OptimizerSettings(kind=kind, learning_rate=0.01, weight_decay=decay, arguments=arguments, **others)


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 3, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> bool:
    world, criterion = SingleProcess(), nn.CrossEntropyLoss()
    return train_step(model, criterion, optimizer, world, batch, loss_scale=1.0, penalty=PENALTY).finite


def tensors(value: Any, path: str = "") -> dict[str, Any]:
    """All that a state holds, flat."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {name: leaf for key, item in items for name, leaf in tensors(item, f"{path}.{key}").items()}


def assert_same(a: Any, b: Any) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_torch_on_its_own(kind: str) -> None:
    """Decayed and undecayed parameters apart, with the arguments of the class; one tensor at a time there."""
    model = net()
    alone = copy.deepcopy(model)
    optimizer = build_optimizer(settings(kind, decay_norm_and_bias=False), model)
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in ARGUMENTS.get(kind, {}).items()}
    if kind == "sgd":
        arguments = {"momentum": 0.9, "nesterov": True}
    of_torch = next(found for name, found in vars(torch.optim).items() if name.lower() == kind)
    others = []
    for parameter in alone.parameters():
        decay = {} if kind == "rprop" else {"weight_decay": 0.01 if parameter.ndim > 1 else 0.0}
        others.append(of_torch([parameter], lr=0.01, foreach=False, **decay, **arguments))
    for images, labels in batches(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        update(list(model.parameters()), optimizer, SingleProcess(), torch.zeros(2), None)
        alone.zero_grad()
        F.cross_entropy(alone(images), labels).backward()
        for other in others:
            other.step()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
        if kind == "sgd":
            assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", [*KINDS, *BY_PATH, "fused sgd", "fused adamw"])
def test_a_skipped_step_leaves_no_trace(kind: str) -> None:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = build_optimizer(settings(kind.split()[-1]), model)
        if kind.startswith("fused"):  # as on a GPU, where the kernel itself skips
            for group in optimizer.param_groups:
                group |= {"fused": True, "foreach": None}
        return optimizer

    model, other = net(), net()
    optimizer, without = build(model), build(other)
    for images, labels in batches(3):
        bad = images.clone()
        bad[0, 0, 0, 0] = math.inf
        before = checkpoint.copied(model.state_dict())
        assert not step(model, optimizer, (bad, labels)), "the very first step too"
        assert_same(model.state_dict(), before)
        assert step(model, optimizer, (images, labels))
        assert step(other, without, (images, labels))
    assert_same(model.state_dict(), other.state_dict())
    assert_same(optimizer.state_dict(), without.state_dict())


@pytest.mark.parametrize("kind", [*KINDS, *BY_PATH])
def test_the_state_comes_back_from_a_checkpoint_to_the_bit(kind: str, tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, build_optimizer(settings(kind, decay_norm_and_bias=False), model)

    model, optimizer = begin()
    for batch in batches(2):
        assert step(model, optimizer, batch)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = checkpoint.load(checkpoint.save(tmp_path, 2, checkpoint.copied(state), keep=1))
    resumed, other = begin()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for batch in list(batches(4))[2:]:
        assert step(model, optimizer, batch)
        assert step(resumed, other, batch)
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(other.state_dict(), optimizer.state_dict())


RECIPE = """
model: test_optimizers:tiny
threads: 1
data: {path: DATA, backend: synthetic, global_batch_size: 64}
schedule: {kind: constant}
optimizer: {kind: adamw, learning_rate: 0.002, weight_decay: 0.05, arguments: {betas: [0.9, 0.95], eps: 1e-7}}
regularizer: {when: always, sub_batch_size: 8}
metric: {trials: 0}
telemetry: {port: null}
"""


@pytest.fixture
def run(tmp_path: Path, small_data: Path) -> Callable[..., dict[str, Any]]:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))

    def train(name: str, *overrides: str) -> dict[str, Any]:
        assert main([str(tmp_path / "recipe.yaml"), f"run_dir={tmp_path / name}", *overrides]) == 0
        return checkpoint.load_newest(tmp_path / name, print)[1]

    return train


def test_a_run_is_resumed_to_the_bit(run: Callable[..., dict[str, Any]]) -> None:
    whole = run("whole", "epochs=2")
    run("halves", "epochs=1")
    halves = run("halves", "epochs=2", "resume=auto")
    assert_same(halves["model"], whole["model"])
    assert_same(halves["optimizer"], whole["optimizer"])
    assert list(whole["optimizer"]["param_groups"][0]["betas"]) == [0.9, 0.95]
    assert whole["optimizer"]["param_groups"][0]["eps"] == 1e-7


def test_a_changed_setting_counts_when_a_run_is_resumed(
    run: Callable[..., dict[str, Any]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With allow_config_change: the state stays where it means the same, and begins anew where it does not."""
    steps = run("begun", "epochs=1")["optimizer"]["state"][0]["step"]

    def resumed(name: str, *overrides: str) -> tuple[dict[str, Any], bool]:
        others = f"resume={tmp_path / 'begun'}", "allow_config_change=true", *overrides
        state = run(name, "epochs=2", *others)["optimizer"]
        anew = "the state of the optimizer begins anew" in capfd.readouterr().err
        last = next(iter(state["state"].values()))
        assert "step" not in last or last["step"] == (steps if anew else 2 * steps)
        return state, anew

    state, anew = resumed("decayed", "optimizer.weight_decay=0.3")
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.3]
    assert not anew
    state, anew = resumed("apart", "optimizer.decay_norm_and_bias=false")
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.05, 0.0]
    assert anew
    state, anew = resumed("argument", "optimizer.arguments.amsgrad=true", "optimizer.arguments.betas=[0.8,0.9]")
    assert list(state["param_groups"][0]["betas"]) == [0.8, 0.9]
    assert anew
    state, anew = resumed("frozen", "frozen=[0]")
    assert len(state["state"]) == 4
    assert anew
    state, anew = resumed("kind", "optimizer.kind=nadam")
    assert "mu_product" in state["state"][0]
    assert anew


def test_settings_come_back_from_their_yaml(tmp_path: Path) -> None:
    overrides = ["optimizer.kind=adamw", "optimizer.arguments.eps=1e-6", "optimizer.arguments.amsgrad=true"]
    config = load(Config, None, [*overrides, "optimizer.arguments.betas=[0.9,0.95]"])
    assert config.optimizer.arguments == {"eps": 1e-6, "amsgrad": True, "betas": [0.9, 0.95]}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(Config, tmp_path / "config.yaml", []) == config
    others = [f"optimizer.arguments.{name}=null" for name in ("betas", "amsgrad")]
    assert load(Config, tmp_path / "config.yaml", [*others, "optimizer.kind=adagrad"]).optimizer.arguments == {
        "eps": 1e-6
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=AdamW"], r"optimizer.kind must be .* got 'AdamW'; nearest: 'adamw'"),
        (["kind=lbfgs"], "optimizer.kind=lbfgs takes several passes a step, by a closure"),
        (["kind=sparseadam", "weight_decay=0"], "optimizer.kind=sparseadam takes sparse gradients"),
        (["kind=muon"], "optimizer.kind=muon: Muon only supports 2D parameters"),
        (["kind=rprop"], r"optimizer.weight_decay must be 0 with optimizer.kind=rprop, which has none, got 0\.0001"),
        (["kind=rmsprop", "momentum=0.5"], "optimizer.momentum and .* kind=rmsprop, momentum=0.5 .*arguments"),
        (["kind=adamw", "arguments.beta=0.9"], r"optimizer.arguments.beta is no argument .* got 0.9: it takes betas, "),
        (["kind=adamw", "arguments.lr=0.9"], r"optimizer.arguments.lr is no argument .* to be given here, got 0.9"),
        (["arguments.momentum=0.9"], r"optimizer.arguments.momentum is no argument .* to be given here, got 0.9"),
        (["kind=adamw", "arguments.betas=0.9"], "optimizer.arguments.betas must be a list of 2 numbers, got 0.9"),
        (["kind=adamw", "arguments.betas=[0.9]"], r"arguments.betas must be a list of 2 numbers, got \[0.9\]"),
        (["kind=adamw", "arguments.eps=small"], "optimizer.arguments.eps must be a number, got small"),
        (["kind=adamw", "arguments.amsgrad=1"], "optimizer.arguments.amsgrad must be true or false, got 1"),
        (["kind=adamw", "arguments.eps=-1"], "optimizer.kind=adamw, eps=-1: Invalid epsilon value: -1"),
        (["kind=nowhere:Lion"], "optimizer.kind=nowhere:Lion cannot be imported: ModuleNotFoundError"),
        (["kind=torch.nn:Linear"], "must be a subclass of torch.optim.Optimizer, got <class 'torch.nn"),
        (
            ["kind=test_optimizers:Lion", "arguments.note=x"],
            "arguments.note is not in the parameter groups .* got x: leave it out",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_optimizer(load(Config, None, [f"optimizer.{text}" for text in overrides]).optimizer, net())
    assert "\n" not in str(caught.value)


def test_a_mistake_ends_the_command_with_one_line(
    tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    assert main([str(tmp_path / "recipe.yaml"), f"run_dir={tmp_path}/run", "optimizer.arguments.betas=7"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == ["error: optimizer.arguments.betas must be a list of 2 numbers, got 7"]
