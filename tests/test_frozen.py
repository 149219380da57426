"""Frozen parts: nothing of them is trained or moved, and the rest is trained as if they were constants."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist import checkpoint, regularized_backward
from infomcr_dist.config import OptimizerSettings
from infomcr_dist.first_order import FirstOrder, Penalty
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.models import build
from infomcr_dist.models.frozen import freeze
from infomcr_dist.optimizers import build_optimizer
from infomcr_dist.train import main as train
from infomcr_dist.trained import load_trained


class Net(nn.Module):
    """Two blocks with BatchNorm and dropout; layer10 has the name of layer1 with a digit more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Dropout(0.5))
        self.layer10 = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Softplus())
        self.scale = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer10(self.layer1(x)).mean((2, 3)) * self.scale)


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(8, 3, 8, 8))  # running statistics of their own
    return model


def test_what_is_frozen() -> None:
    model = freeze(net(), ["layer1", "scale"]).train()
    assert set(trainable_parameters(model)) == {
        *(f"layer10.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")),
        *("head.weight", "head.bias"),
    }
    model.eval()
    model.train()
    assert not any(module.training for module in model.layer1.modules())
    assert all(module.training for module in (model, *model.layer10.modules(), model.head))
    groups = build_optimizer(OptimizerSettings(decay_norm_and_bias=False), model).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trainable_parameters(model).values()}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["layer2"], "frozen must name parts of the network, got 'layer2'; nearest: layer1"),
        ([""], "frozen must name parts of the network, got ''"),
        (["layer1", "layer10", "scale", "head"], "frozen must leave something to train, got .* the whole network"),
    ],
)
def test_what_cannot_be_frozen(parts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freeze(net(), parts)


class Rest(nn.Module):
    """The network from what the frozen part gives on."""

    def __init__(self, model: Net) -> None:
        super().__init__()
        self.layer10, self.head = model.layer10, model.head
        self.register_buffer("scale", model.scale.detach())

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.layer10(features).mean((2, 3)) * self.scale)


def test_a_regularized_step_is_that_of_the_rest_on_the_features_of_the_frozen_part() -> None:
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    whole, rest = freeze(net(), ["layer1", "scale"]).train(), Rest(net()).train()
    features = net().layer1.eval()(images).detach()
    before = {name: tensor.clone() for name, tensor in whole.layer1.state_dict().items()}
    settings = {"alpha": 1e-2, "beta": 5.0, "sub_batches": 4}
    for model, inputs in ((whole, images), (rest, features)):
        regularized_backward(model, F.cross_entropy, inputs, labels, **settings)
    for name, parameter in rest.named_parameters():
        torch.testing.assert_close(dict(whole.named_parameters())[name].grad, parameter.grad, msg=name)
    assert whole.layer1[0].weight.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.layer1.state_dict().items())
    torch.testing.assert_close(whole.layer10[1].running_var, rest.layer10[1].running_var)
    assert whole.layer10[1].num_batches_tracked == rest.layer10[1].num_batches_tracked
    # The passes of a GPU.
    first_order = FirstOrder(whole, nn.CrossEntropyLoss(), images, labels, bf16=False)
    first_order.backward(images, labels, Penalty(1e-2, None, 4, 4), torch.tensor(5.0), 1.0)
    for name, parameter in rest.named_parameters():
        torch.testing.assert_close(dict(whole.named_parameters())[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_gram_matrix_is_that_of_the_rest() -> None:
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    whole, rest = freeze(net(), ["layer1", "scale", "layer10.0.bias"]).eval(), net().eval()
    rows = []
    for i in range(6):
        loss = F.cross_entropy(rest(images[i : i + 1]), labels[i : i + 1])
        kept = [dict(rest.named_parameters())[name] for name in trainable_parameters(whole)]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, kept)]))
    jacobian = torch.stack(rows).double()
    found = gradient_gram(functional_loss(whole), trainable_parameters(whole), (images, labels))
    torch.testing.assert_close(found, jacobian @ jacobian.T, rtol=1e-4, atol=1e-6)


def test_a_run_trains_the_rest(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{path: {small_data}, backend: torch, global_batch_size: 32, train_images: 64}}\nepochs: 1\n"
        "schedule: {kind: constant}\nregularizer: {when: always, sub_batch_size: 16}\n"
        "metric: {trials: 1, samples: 4}\ntelemetry: {port: null}\nthreads: 1\n"
        "averaging: {kind: ema}\nfrozen: [stem, blocks.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert train(["recipe.yaml", "run_dir=run"]) == 0
    state = checkpoint.load_newest(Path("run"), print)[1]
    torch.manual_seed(0)
    initial = build("resnet20", 6, 16).state_dict()
    still = {name for name, tensor in initial.items() if torch.equal(tensor, state["model"][name])}
    assert still == {name for name in initial if name.startswith(("stem.", "blocks.0."))}
    assert all(torch.equal(state["average"][f"module.{name}"], initial[name]) for name in still), "the average as well"
    trained = load_trained(Path("run"), None, torch.device("cpu"))
    assert {name for name, _ in trained.model.named_parameters()} - set(trainable_parameters(trained.model)) == {
        name for name in still if "running_" not in name and "num_batches" not in name
    }
    assert train(["recipe.yaml", "run_dir=run", "resume=auto", "epochs=2", "frozen=[stem]"]) == 2
    assert (
        "was trained with other settings: frozen=['stem'] (checkpoint: ['stem', 'blocks.0'])" in capsys.readouterr().err
    )
    torch.set_num_threads(threads)
