"""Networks that take the Gram matrix's assumptions apart, each against one backward pass a sample."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_gram import batch_of, one_backward_per_sample
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from infomcr_dist import functional_loss, gradient_gram
from infomcr_dist.functional import trainable_parameters
from infomcr_dist.models import build

SLOW = "the Gram matrix takes one backward pass a sample, which is slow, for"


class Net(nn.Module):
    """A forward pass with modules of its own."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def head(width: int = 6) -> nn.Module:
    return nn.Linear(width, 4)


def pixels(x: Tensor) -> Tensor:
    """(N, 64, 3)."""
    return x.flatten(2).transpose(1, 2)


def sequence_first(model: Any, x: Tensor) -> Tensor:
    tokens = pixels(x).transpose(0, 1)[: len(x)]  # as many tokens as samples
    return model.head(model.block(model.embed(tokens)).mean(0))


def recurrent_first(model: Any, x: Tensor) -> Tensor:
    return model.head(model.embed(model.rnn(pixels(x).transpose(0, 1)[: len(x)])[0]).tanh()[-1])


def sorted_inside(model: Any, x: Tensor) -> Tensor:
    order = x.flatten(1).norm(dim=1).argsort()
    hidden = model.lin(x.flatten(1)[order]).tanh()
    return model.head(hidden[order.argsort()])


def packed(model: Any, x: Tensor) -> Tensor:
    lengths = (x[:, 0, 0, 0].abs() * 20).long().clamp(1, 64).cpu()
    sequence = pack_padded_sequence(pixels(x), lengths, batch_first=True, enforce_sorted=False)
    return model.head(model.rnn(sequence)[1][0][-1])


def reversed_batch(model: Any, x: Tensor) -> Tensor:
    return model.head(model.conv(x.flip(0)).flatten(1).flip(0))


def in_parts(model: Any, x: Tensor) -> Tensor:
    x = x.flatten(1)
    first, second = model.lin.weight.split(3)
    third, *_ = model.lin.weight.unbind()
    hidden = model.lin(x).tanh() + torch.cat([F.linear(x, second), F.linear(x, first)], 1) + F.linear(x, third[None])
    return model.head(hidden)


def written(model: Any, x: Tensor) -> Tensor:
    weight = torch.zeros(8, 192, dtype=x.dtype)
    weight[1:7] = model.lin.weight
    return model.head(F.linear(x.flatten(1), weight)[:, :6] + model.lin(x.flatten(1)))


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


def data_dependent(model: Any, x: Tensor) -> Tensor:
    hidden = model.scale(model.lin(x.flatten(1)))
    return model.head(hidden.tanh() * 2.0 ** int(hidden.detach()[0, 0].mul(0).item()))


def masked(model: Any, x: Tensor) -> Tensor:
    hidden = model.norm(model.lin(x.flatten(1)))
    out = hidden.clone()
    out[hidden > 0] = hidden[hidden > 0] * 2
    return model.head(out)


def embedded(model: Any, x: Tensor) -> Tensor:
    return model.head(model.embed((x[:, 0, 0].abs() * 3).long().clamp(max=6)).mean(1).tanh())


def attended(model: Any, x: Tensor) -> Tensor:
    tokens = model.embed(pixels(x)[:, :7])
    return model.head(model.attention(tokens, tokens, tokens)[0].mean(1))


@dataclass
class Output:
    logits: Tensor


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def linear() -> nn.Module:
    return nn.Linear(192, 6)


FAST: dict[str, Callable[[], nn.Module]] = {
    "sequence-first transformer": lambda: Net(
        sequence_first,
        embed=nn.Linear(3, 6),
        block=nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0),
        head=head(),
    ),
    "batch-first transformer": lambda: Net(
        lambda model, x: model.head(model.block(model.embed(pixels(x)[:, : len(x)])).mean(1)),
        embed=nn.Linear(3, 6),
        block=nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2),
        head=head(),
    ),
    "sorted inside": lambda: Net(sorted_inside, lin=linear(), head=head()),
    "reversed inside": lambda: Net(reversed_batch, conv=nn.Conv2d(3, 2, 3), head=head(72)),
    "a weight in parts": lambda: Net(in_parts, lin=linear(), head=head()),
    "a weight written elsewhere": lambda: Net(written, lin=linear(), head=head()),
    "attention": lambda: Net(
        attended, embed=nn.Linear(3, 6), attention=nn.MultiheadAttention(6, 2, batch_first=True), head=head()
    ),
    "input changed in place": lambda: Net(
        lambda model, x: model.head(model.lin(x.sub_(0.5).flatten(1)).tanh()), lin=linear(), head=head()
    ),
    "checkpoint": lambda: Net(
        lambda model, x: model.head(checkpoint(model.block, x.flatten(1), use_reentrant=False)),
        block=nn.Sequential(linear(), nn.Tanh(), nn.Linear(6, 6)),
        head=head(),
    ),
}
BY_SAMPLE: dict[str, Callable[[], nn.Module]] = {
    "sequence-first LSTM": lambda: Net(recurrent_first, rnn=nn.LSTM(3, 6), embed=nn.Linear(6, 6), head=head()),
    "GRU": lambda: Net(
        lambda model, x: model.head(model.rnn(pixels(x))[0][:, -1]), rnn=nn.GRU(3, 6, batch_first=True), head=head()
    ),
    "RNN": lambda: Net(
        lambda model, x: model.head(model.rnn(pixels(x))[0].mean(1)),
        rnn=nn.RNN(3, 3, batch_first=True, bidirectional=True),
        head=head(),
    ),
    "packed sequences": lambda: Net(packed, rnn=nn.LSTM(3, 6, batch_first=True), head=head()),
    "old-style function": lambda: Net(
        lambda model, x: model.head(model.scale(OldStyle.apply(model.lin(x.flatten(1))))),
        lin=linear(),
        scale=Scale(),
        head=head(),
    ),
    ".item()": lambda: Net(data_dependent, lin=linear(), scale=Scale(), head=head()),
    "max_norm": lambda: Net(embedded, embed=nn.Embedding(7, 6, max_norm=1.0), head=head()),
    "boolean mask": lambda: Net(masked, lin=linear(), norm=nn.LayerNorm(6), head=head()),
}


def built(build_net: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build_net().double().eval()


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", FAST)
def test_exact_without_a_pass_a_sample(name: str) -> None:
    model, batch = built(FAST[name]), batch_of(12)
    loss_fn, params = functional_loss(model), trainable_parameters(model)
    expected = one_backward_per_sample(model, (batch[0].clone(), batch[1]))
    for _ in range(2):  # the second time without a look at single samples
        assert error_of(gradient_gram(loss_fn, params, batch), expected) < 1e-12


@pytest.mark.filterwarnings("ignore:There is a performance drop because")
@pytest.mark.parametrize("name", BY_SAMPLE)
def test_exact_with_a_pass_a_sample_where_there_is_no_other_way(name: str) -> None:
    model, batch = built(BY_SAMPLE[name]), batch_of(12)
    loss_fn, params = functional_loss(model), trainable_parameters(model)
    expected = one_backward_per_sample(model, batch)
    with pytest.warns(UserWarning, match=SLOW):
        assert error_of(gradient_gram(loss_fn, params, batch), expected) < 1e-12
    assert error_of(gradient_gram(loss_fn, params, batch), expected) < 1e-12  # and no warning again


def test_another_number_of_samples_is_looked_at_anew() -> None:
    model = built(FAST["sequence-first transformer"])
    model._forward = lambda model, x: model.head(model.block(model.embed(pixels(x).transpose(0, 1)[:12])).mean(0))
    loss_fn, params = functional_loss(model), trainable_parameters(model)
    for size in (5, 12, 5):
        batch = batch_of(size)
        assert error_of(gradient_gram(loss_fn, params, batch), one_backward_per_sample(model, batch)) < 1e-12


@pytest.mark.parametrize(
    ("wrap", "criterion"),
    [
        (lambda y: (y, None), lambda out, labels: F.cross_entropy(out[0], labels)),
        (lambda y: {"logits": y, "names": ["a"]}, lambda out, labels: F.cross_entropy(out["logits"], labels)),
        (lambda y: {"logits": y, "aux": y.square().mean()}, lambda out, labels: F.cross_entropy(out["logits"], labels)),
        (lambda y: [y, [y.tanh()]], lambda out, labels: F.cross_entropy(out[0] + out[1][0], labels)),
        (Output, lambda out, labels: F.cross_entropy(out.logits, labels)),
    ],
    ids=["tuple", "dict", "dict with a scalar", "lists", "dataclass"],
)
def test_outputs_that_are_no_tensor(wrap: Any, criterion: Any) -> None:
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), head(144)))
    plain = Net(lambda model, x: wrap(model.net(x)), net=model).eval()
    batch = batch_of()
    found = gradient_gram(functional_loss(plain, criterion), trainable_parameters(plain), batch)
    if wrap(torch.zeros(1, 4)).__class__ is not list:
        assert error_of(found, one_backward_per_sample(model, batch)) < 1e-12
    rows = []
    for image, label in zip(*batch, strict=True):
        loss = criterion(plain(image[None]), label[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert error_of(found, torch.stack(rows) @ torch.stack(rows).T) < 1e-12


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        lambda: Net(lambda model, x: F.batch_norm(x, None, None, training=True)),
    ],
    ids=["module", "function"],
)
def test_batch_statistics_are_refused(norm: Any) -> None:
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm(), nn.SiLU(), nn.Flatten(), head(144)))
    with pytest.raises(ValueError, match="BatchNorm must use running statistics in eval mode") as refused:
        gradient_gram(functional_loss(model), trainable_parameters(model), batch_of())
    assert "\n" not in str(refused.value)


def test_a_mix_of_samples_by_other_means_is_the_gradient_of_the_sample_alone() -> None:
    """The definition of a row: the loss of a batch of one."""

    def centred(model: Any, x: Tensor) -> Tensor:
        return model.head(model.lin(x.flatten(1) - x.mean() / 2).tanh())

    model = built(lambda: Net(centred, lin=linear(), head=head()))
    batch = batch_of()
    found = gradient_gram(functional_loss(model), trainable_parameters(model), batch)
    assert error_of(found, one_backward_per_sample(model, batch)) < 1e-12


def test_names_and_shapes_that_are_not_the_model_s_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), linear(), head()).double()
    loss_fn, params = functional_loss(model), trainable_parameters(model)
    misspelt = {name.replace("weight", "wieght"): tensor for name, tensor in params.items()}
    with pytest.raises(ValueError, match=r"got '1\.wieght'; nearest: \['1\.weight'\]"):
        gradient_gram(loss_fn, misspelt, batch_of())
    with pytest.raises(ValueError, match=r"params\['1\.weight'\] must have the shape of the parameter, \(6, 192\)"):
        loss_fn(params | {"1.weight": torch.zeros(6, 10)}, batch_of())


def test_any_loss_function_without_a_rule_for_vmap() -> None:
    x, y, w = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (6,), (4,)))

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        assert float(batch[0].sum().item()) < 1e9
        return ((batch[0] @ params["w"] - batch[1]) ** 2).mean() / 2

    with pytest.warns(UserWarning, match=SLOW):
        found = gradient_gram(loss_fn, {"w": w}, (x, y))
    residual = x @ w - y
    torch.testing.assert_close(found, torch.outer(residual, residual) * (x @ x.T), rtol=1e-12, atol=1e-14)


def test_layers_of_our_networks_pass_the_look_in_single_precision() -> None:
    torch.manual_seed(0)
    model = build("resnet20", 10, 32)
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    loss_fn = functional_loss(model)
    gradient_gram(loss_fn, trainable_parameters(model), (images, labels))
    (routes,) = loss_fn.routes.values()
    assert (routes.truth, routes.layers, routes.no_layer, routes.by_sample) == (None, "from the first", set(), set())


@pytest.mark.parametrize("seed", range(6, 9))
def test_an_activation_at_the_kink_of_relu_does_not_reject_right_rows(seed: int) -> None:
    """In a batch and alone it may round to either side: with seed 7 it does, and moves rows by a hundredth."""
    torch.manual_seed(seed)
    model = build("wrn_18_1_5", 10, 16)
    loss_fn = functional_loss(model)
    gradient_gram(loss_fn, trainable_parameters(model), (torch.randn(2, 3, 16, 16), torch.randint(10, (2,))))
    (routes,) = loss_fn.routes.values()
    assert (routes.layers, routes.no_layer, routes.by_sample) == ("from the first", set(), set())


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_a_weak_mix_of_samples_is_seen_in_single_precision(share: float) -> None:
    model = built(
        lambda: Net(lambda model, x: model.head(model.lin(x.flatten(1) - share * x.mean())), lin=linear(), head=head())
    )
    images, labels = batch_of()
    expected = one_backward_per_sample(model, (images, labels))
    single = model.float()
    found = gradient_gram(functional_loss(single), trainable_parameters(single), (images.float(), labels))
    assert error_of(found, expected) < 1e-4
