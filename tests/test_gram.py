from typing import Any

import pytest
import torch
from host_reads import HostReads
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from infomcr_dist import gram
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.models import MODELS, build


def batch_of(size: int = 5, pixels: int = 8, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, pixels, pixels, dtype=torch.float64, generator=generator)
    return images, torch.randint(classes, (size,), generator=generator)


def one_backward_per_sample(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """xi by holding J, from the module itself."""
    rows = []
    params = list(trainable_parameters(model).values())
    for image, label in zip(*batch, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, params, allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in gradients if g is not None]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def check(model: nn.Module, batch: tuple[Tensor, Tensor], chunk: int | None = None) -> None:
    got = gradient_gram(functional_loss(model), trainable_parameters(model), batch, chunk)
    expected = one_backward_per_sample(model.eval(), batch)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


class Twice(nn.Module):
    """One layer called twice, one weight shared by two layers, one weight used outside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.outside = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x.mean(3).flatten(1)[:, :6]))))
        x = torch.tanh(self.other(torch.tanh(self.one(x))))
        return self.outside(x) + self.outside.weight.square().sum(1)


class Tokens(nn.Module):
    """A linear layer over positions, embeddings of it, LayerNorm and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.position = nn.Linear(24, 12), nn.LayerNorm(12), nn.Parameter(torch.randn(8, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.embed(x.transpose(1, 2).flatten(2)) + self.position))
        return self.head(x.mean(1))


NETS: dict[str, Any] = {
    "bias, stride, few positions": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.SiLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 4)
    ),
    "padding, dilation, groups": lambda: nn.Sequential(
        nn.Conv2d(3, 6, (3, 1), padding=(1, 0), dilation=(2, 1), bias=False),
        nn.SiLU(),
        nn.Conv2d(6, 4, 3, groups=2, padding=1, stride=(1, 2)),
        nn.SiLU(),
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ),
    "padding by name and by mode": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ),
    "in-place activations": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(144, 4),
    ),
    "BatchNorm of features": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 7), nn.BatchNorm1d(7), nn.SiLU(), nn.Linear(7, 4), nn.BatchNorm1d(4, affine=False)
    ),
    "other layers": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        weight_norm(nn.Conv2d(4, 4, 3)),
        nn.Flatten(),
        nn.Linear(64, 4),
    ),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4)),
    "shared": Twice,
    "tokens": Tokens,
}


@pytest.mark.parametrize("name", NETS)
def test_every_layer(name: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]().double()
    model(batch_of(16)[0])  # running statistics that are not 0 and 1
    check(model, batch_of())


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_of_the_general_way(chunk: int) -> None:
    torch.manual_seed(0)
    check(NETS["other layers"]().double(), batch_of(), chunk)


def test_blocks_smaller_than_a_layer(monkeypatch: Any) -> None:
    monkeypatch.setattr(gram, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(gram, "CACHE_BYTES", 3 * 9 * 36 * 8 * 2)  # two images
    torch.manual_seed(0)
    check(NETS["other layers"]().double(), batch_of())
    check(NETS["padding, dilation, groups"]().double(), batch_of())


def test_a_single_sample() -> None:
    torch.manual_seed(0)
    check(NETS["in-place activations"]().double(), batch_of(1))


@pytest.mark.parametrize("name", MODELS)
def test_layers_account_for_every_parameter_of_our_models(name: str, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    left: list[str] = []
    monkeypatch.setattr(gram, "_add_general", lambda total, loss_fn, params, names, batch, chunk: left.extend(names))
    model = build(name, 4, 32)
    images = torch.randn(5, 3, 32, 32)
    model(images)
    model.double()
    check(model, (images.double(), torch.arange(5) % 4))
    assert left == []


def test_the_mode_the_buffers_and_the_parameters_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.Flatten(), nn.Linear(144, 4)).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradient_gram(functional_loss(model), trainable_parameters(model), batch_of())
    assert model.training
    assert not model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_any_other_loss_function() -> None:
    # l_n = (wᵀx_n − y_n)² / 2 has the gradient (wᵀx_n − y_n) x_n.
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    w = torch.randn(4, dtype=torch.float64)
    got = gradient_gram(lambda params, batch: ((batch[0] @ params["w"] - batch[1]) ** 2).mean() / 2, {"w": w}, (x, y))
    residual = x @ w - y
    torch.testing.assert_close(got, torch.outer(residual, residual) * (x @ x.T), rtol=1e-12, atol=1e-14)


def test_frozen_parameters_do_not_enter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.SiLU(), nn.Linear(8, 4)).double()
    model[1].requires_grad_(False)
    batch = batch_of()
    hidden = F.silu(model[1](batch[0].flatten(1)))
    error = F.softmax(model(batch[0]), 1) - F.one_hot(batch[1], 4)
    got = gradient_gram(functional_loss(model), trainable_parameters(model), batch)
    torch.testing.assert_close(got, (error @ error.T) * (hidden @ hidden.T + 1))


def test_samples_fitted_to_the_last_bit_keep_their_gradient() -> None:
    # p − y of the label's class is −1e-9 here, which float32 would round to 0: the loss is taken in float64.
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[10.0, 0.0], [-10.72, 0.0]]))
    got = gradient_gram(
        functional_loss(model), trainable_parameters(model), (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    )
    error = torch.sigmoid(torch.tensor(-20.72, dtype=torch.float64))
    assert float(got) == pytest.approx(float(2 * error**2), rel=1e-5)


def test_single_precision_is_as_good_as_its_gradients() -> None:
    torch.manual_seed(0)
    model = build("resnet20", 10, 32)
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    model(images)
    got = gradient_gram(functional_loss(model), trainable_parameters(model), (images, labels))
    model.double()
    expected = gradient_gram(functional_loss(model), trainable_parameters(model), (images.double(), labels))
    scale = expected.diagonal().sqrt()
    assert float(((got - expected) / torch.outer(scale, scale)).abs().max()) < 1e-5
    assert torch.logdet(got) == pytest.approx(float(torch.logdet(expected)), abs=1e-3)


@pytest.mark.parametrize(
    ("images", "labels", "chunk", "message"),
    [
        (0, 0, None, "at least one, got 0 and 0"),
        (3, 2, None, "as many labels as images, at least one, got 2 and 3"),
        (3, 3, 0, "chunk must be at least 1, got 0"),
    ],
)
def test_bad_input(images: int, labels: int, chunk: int | None, message: str) -> None:
    model = NETS["dropout"]().double()
    batch = (batch_of()[0][:images], batch_of()[1][:labels])
    with pytest.raises(ValueError, match=message):
        gradient_gram(functional_loss(model), trainable_parameters(model), batch, chunk)


def test_the_host_waits_for_nothing_once_the_routes_are_known() -> None:
    """A copy of a value to the host would end the overlap of the host with a GPU, at every block."""
    torch.manual_seed(0)
    loss_fn, batch = functional_loss(NETS["bias, stride, few positions"]().double()), batch_of()
    params = trainable_parameters(loss_fn.model)
    with HostReads() as first:
        gradient_gram(loss_fn, params, batch)
    with HostReads() as second:
        gradient_gram(loss_fn, params, batch)
    assert first.reads > 0, "the rows are checked, the first time"
    assert second.reads == 0


def test_a_gpu_takes_a_block_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batch = batch_of(6)
    results, launches = [], []
    for patch_bytes in (None, gram.BLOCK_BYTES):
        monkeypatch.setattr(gram, "CACHE_BYTES", patch_bytes or 3 * 9 * 36 * 8 * 2)  # two images
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 4)).double()
        torch.manual_seed(0)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.1)
        with HostReads() as found:
            results.append(gradient_gram(functional_loss(net), trainable_parameters(net), batch))
        launches.append(found.operators["bmm"])
    assert launches[0] == launches[1] + 2, "three blocks of patches, or one"
    torch.testing.assert_close(*results, rtol=0, atol=1e-12 * float(results[0].abs().max()))
    of_device = {device: gram._Sum(torch.empty(2, device=device)).patch_bytes for device in ("cpu", "meta")}
    assert of_device == {"cpu": gram.CACHE_BYTES, "meta": gram.BLOCK_BYTES}
