"""Networks and losses whose forward pass is more than a function of parameters and buffers, against Algorithm 1 done
the slow way (tests/cases/library.py), and what the copies of modules are made of."""

import functools
import random
import threading
import types
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases.library import Aliased, Centred, Wrapped, data, net, penalty_error
from torch import Tensor, nn
from torch.ao.quantization import MovingAverageMinMaxObserver
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from infomcr_dist import functional_loss, gradient_gram, regularized_backward
from infomcr_dist.functional import trainable_parameters
from infomcr_dist.regularizer import sub_batch_penalty
from infomcr_dist.replica import replica

EXACT = 1e-8


class InPlace(nn.Module):
    """A moving average that every training pass changes in place, in a buffer or a plain tensor."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        start = torch.ones(3, 1, 1, dtype=torch.float64)
        if buffer:
            self.register_buffer("scale", start)
        else:
            self.scale = start

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.8).add_(0.2 * x.detach().abs().mean((0, 2, 3)).view(3, 1, 1))
        return x / self.scale


class Counting(nn.Module):
    """State in numbers and containers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.history: list[float] = []
        self.recent: deque[Tensor] = deque(maxlen=2)
        self.named: dict[str, list[float]] = defaultdict(list)
        self.array = np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        mean = float(x.detach().mean())
        self.history.append(mean)
        self.recent.append(x.detach().std())
        self.named["mean"].append(mean)
        self.array += 0.1
        scale = self.steps + sum(self.history) + len(self.named["mean"]) + self.array[0]
        return x / scale + torch.stack(tuple(self.recent)).sum()


class Tracker:
    """State in an object that is no module."""

    def __init__(self) -> None:
        self.mean = torch.zeros((), dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean()
        return x - self.mean


class Tracking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tracker = Tracker()

    def forward(self, x: Tensor) -> Tensor:
        return self.tracker(x)


class Noisy(nn.Module):
    """Noise from generators of the module's own and from those of Python and NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(3)
        self.python_generator = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.torch_generator, dtype=x.dtype)
        shift = self.numpy_generator.random() + self.python_generator.random() + random.random() + np.random.rand()
        return x + noise + shift


class Hooked(nn.Module):
    """Features that a hook, a method of the network, hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.net[3].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features = output

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.features.mean((1, 2, 3))[:, None]


class Outside(nn.Module):
    """A weight that a partial function, a list and a method hold as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.slope = nn.Parameter(torch.full((3,), 0.3, dtype=torch.float64))
        self.activation = functools.partial(F.prelu, weight=self.slope)
        self.slopes = [self.slope]
        self.method = types.MethodType(Outside.scaled, self)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.slope[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.method(self.net(self.activation(x) * self.slopes[0].view(3, 1, 1)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = kind(3, 6, num_layers=2, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(2).transpose(1, 2))[0][:, -1])


class RenormalizedEmbedding(nn.Module):
    """Weights that the forward pass changes in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed((x[:, 0, 0].abs() * 3).long().clamp(max=6)).mean(1).tanh())


def normalized(kind: str, old: bool) -> nn.Module:
    function = getattr(nn.utils if old else nn.utils.parametrizations, kind)
    model = net()
    model[3] = function(model[3])
    return model


class Observed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.observer = net(), MovingAverageMinMaxObserver(averaging_constant=0.3, dtype=torch.quint8)

    def forward(self, x: Tensor) -> Tensor:
        self.observer(x.float())
        return self.net(x / self.observer.max_val.double())


def norms() -> nn.Module:
    model = net()
    model[1] = nn.BatchNorm2d(6, momentum=None)
    model[4] = nn.Sequential(nn.InstanceNorm2d(6, track_running_stats=True), nn.SiLU())
    return model.double()


def checkpointed_blocks(x: Tensor, model: Any) -> Tensor:
    hidden = checkpoint(model.net[:3], x, use_reentrant=False)
    hidden = checkpoint(lambda y: checkpoint(model.net[3:5], y, use_reentrant=False), hidden, use_reentrant=False)
    return model.net[5:](F.dropout(hidden, 0.3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "buffer in place": lambda: nn.Sequential(InPlace(True), net()),
    "plain tensor in place": lambda: nn.Sequential(InPlace(False), net()),
    "buffer bound anew": lambda: nn.Sequential(Centred(), net()),
    "numbers and containers": lambda: nn.Sequential(Counting(), net()),
    "object that is no module": lambda: nn.Sequential(Tracking(), net()),
    "generators of random numbers": lambda: nn.Sequential(Noisy(), net()),
    "observer": Observed,
    "features of a hook": Hooked,
    "parameters outside of the tree": Outside,
    "LSTM": lambda: Recurrent(nn.LSTM).double(),
    "GRU": lambda: Recurrent(nn.GRU).double(),
    "max_norm": lambda: RenormalizedEmbedding().double(),
    "one module, two names": Aliased,
    "statistics of other kinds": norms,
    "spectral_norm, by hooks": lambda: normalized("spectral_norm", old=True),
    "spectral_norm, by parametrization": lambda: normalized("spectral_norm", old=False),
    "weight_norm": lambda: normalized("weight_norm", old=False),
    "checkpoints of blocks": lambda: Wrapped(lambda model, x: checkpointed_blocks(x, model)),
    "checkpoint of a sequence": lambda: Wrapped(
        lambda model, x: checkpoint_sequential(model.net, 3, x, use_reentrant=False)
    ),
    "dropout in place first": lambda: nn.Sequential(nn.Dropout(0.2, inplace=True), net()),
    "activation in place first": lambda: nn.Sequential(nn.ReLU(inplace=True), net()),
    "input normalized in place": lambda: Wrapped(lambda model, x: model.net(x.div_(x.std()).add_(1))),
}


# The slow way moves these in each sub-batch, "reference" in the pass over the whole batch.
MOVED = {
    "buffer in place",
    "plain tensor in place",
    "buffer bound anew",
    "numbers and containers",
    "object that is no module",
    "generators of random numbers",
    "observer",
    "max_norm",
    "spectral_norm, by hooks",
    "spectral_norm, by parametrization",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_penalty_is_algorithm_1(name: str) -> None:
    assert penalty_error(NETWORKS[name]()) < EXACT


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - MOVED))
def test_the_penalty_of_the_reference_is_algorithm_1(name: str) -> None:
    assert penalty_error(NETWORKS[name](), estimator="reference") < EXACT


@pytest.mark.parametrize("name", ["buffer in place", "numbers and containers", "object that is no module", "observer"])
def test_state_moves_once(name: str) -> None:
    """As in one plain pass over each sub-batch."""
    x, y = data()
    plain, model = NETWORKS[name](), NETWORKS[name]()
    for part in x.chunk(4):
        plain(part)
    regularized_backward(model, F.cross_entropy, x, y, alpha=1e-4, beta=1.0, sub_batches=4)
    for one, other in zip(plain.modules(), model.modules(), strict=True):
        for attribute, value in vars(one).items():
            if isinstance(value, Tensor | int | list | np.ndarray) and not isinstance(one, nn.BatchNorm2d):
                assert np.array_equal(value, vars(other)[attribute]), attribute
        for buffer, value in one.named_buffers(recurse=False):
            if not isinstance(one, nn.BatchNorm2d):
                torch.testing.assert_close(value, dict(other.named_buffers(recurse=False))[buffer])


@pytest.mark.parametrize("how", [{}, {"derivative": "exact"}, {"estimator": "reference"}, {"sub_batches": 1}])
def test_running_statistics_inside_a_checkpoint_move_once(how: dict[str, Any]) -> None:
    x, y = data()
    settings: dict[str, Any] = {"alpha": 1e-4, "beta": 1.0, "sub_batches": 4} | how
    plain = net()
    regularized_backward(plain, F.cross_entropy, x, y, **settings)
    model = Wrapped(lambda model, x: checkpoint(model.net, x, use_reentrant=False))
    regularized_backward(model, F.cross_entropy, x, y, **settings)
    assert model.net[1].num_batches_tracked == 1
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model.net[1], name), getattr(plain[1], name), rtol=1e-12, atol=0)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-12)


# Losses.


class RunningLoss(nn.Module):
    """A loss of logits centred by a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(5, dtype=torch.float64))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.centre = 0.9 * self.centre + 0.1 * logits.detach().mean(0)
        return F.cross_entropy(logits - self.centre * torch.arange(5), labels)


class PlainLoss:
    """The same, no module."""

    def __init__(self) -> None:
        self.centre = torch.zeros(5, dtype=torch.float64)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.centre.mul_(0.9).add_(0.1 * logits.detach().mean(0))
        return F.cross_entropy(logits - self.centre * torch.arange(5), labels)


class OwnLoss(nn.Module):
    """A network with a loss of its own, which uses a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + self.net[0].weight.square().sum()


@pytest.mark.parametrize("criterion", [RunningLoss(), PlainLoss()], ids=["module", "object"])
def test_a_loss_that_keeps_state(criterion: Any) -> None:
    assert penalty_error(net(), criterion) < EXACT


def with_decay(inner: nn.Sequential) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, labels: F.cross_entropy(logits, labels) + inner[0].weight.square().sum()


def test_methods_partials_and_closures_refer_to_the_network_at_the_other_parameters() -> None:
    x, y = data()
    found = []
    for criterion_of in (
        lambda model: model.loss,
        lambda model: functools.partial(OwnLoss.loss, model),
        lambda model: with_decay(model.net),
    ):
        model = OwnLoss()
        regularized_backward(model, criterion_of(model), x, y, alpha=1e-2, beta=10.0, sub_batches=4)
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-13, atol=0)

    x, y = x[:8], y[:8]
    model = OwnLoss()
    before = [p.detach().clone() for p in model.parameters()]
    g = torch.autograd.grad(model.loss(model(x), y), list(model.parameters()))
    for p, direction in zip(model.parameters(), g, strict=True):
        p.data.sub_(1e-2 * direction)
    h = torch.autograd.grad(model.loss(model(x), y), list(model.parameters()))
    for p, value in zip(model.parameters(), before, strict=True):
        p.data.copy_(value)
    regularized_backward(model, model.loss, x, y, alpha=1e-2, beta=10.0, sub_batches=1)
    expected = [one + 10 * (one - other) for one, other in zip(g, h, strict=True)]
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-10, atol=1e-13)


# What cannot be exact.


NET = net()
EXTRA = nn.Parameter(torch.ones(5, dtype=torch.float64))
SEEN: list[float] = []


def decay_of_a_global(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) + NET[0].weight.square().sum()


def learnable_weights(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits * EXTRA, labels)


def remembering(logits: Tensor, labels: Tensor) -> Tensor:
    SEEN.append(float(logits.detach().mean()))
    return F.cross_entropy(logits * (1 + len(SEEN)), labels)


def reentrant(model: Wrapped, x: Tensor) -> Tensor:
    return checkpoint(model.net, x.requires_grad_(), use_reentrant=True)


def hidden_encoder(model: Wrapped, x: Tensor) -> Tensor:
    return model.net(model.encoder[0](x))


def with_hidden_encoder() -> nn.Module:
    model = Wrapped(hidden_encoder)
    model.encoder = [nn.Conv2d(3, 3, 1).double()]  # in a list, where parameters() does not look
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a parameter by a global name": (lambda: NET, decay_of_a_global, "uses the parameter '0.weight' from outside"),
    "a parameter of nobody": (net, learnable_weights, r"depends on a tensor of shape \(5,\) that requires a gradient"),
    "an encoder in a list": (with_hidden_encoder, F.cross_entropy, "that model does not hold"),
    "state in a global": (net, remembering, "two forward passes over the same images at the same weights must agree"),
    "reentrant checkpoints": (lambda: Wrapped(reentrant), F.cross_entropy, "use_reentrant=False"),
    "autocast inside": (
        lambda: Wrapped(lambda model, x: low_precision(model, x), net().float()),
        F.cross_entropy,
        "is rounding noise in a model that computes in torch.bfloat16 by itself",
    ),
}


def low_precision(model: Wrapped, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.net(x.float())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_in_one_line_before_anything_changes(name: str) -> None:
    build, criterion, message = REFUSED[name]
    model, (x, y) = build(), data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as refused:
        regularized_backward(
            model, criterion, x, y, alpha=1e-4, beta=1.0, sub_batches=4, derivative="finite_difference"
        )
    assert "\n" not in str(refused.value)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_parameter_by_a_global_name_is_refused_by_the_pure_functions_too() -> None:
    x, y = data()
    loss_fn, params = functional_loss(NET, decay_of_a_global), trainable_parameters(NET)
    for call in (
        lambda: sub_batch_penalty(loss_fn, params, [(x, y)], 1e-4),
        lambda: gradient_gram(loss_fn, params, (x, y)),
    ):
        with pytest.raises(ValueError, match=r"uses the parameter '0\.weight' from outside"):
            call()


def test_images_that_a_network_computes_are_refused() -> None:
    encoder, (x, y) = nn.Conv2d(3, 3, 1).double(), data()
    with pytest.raises(ValueError, match="images must not require a gradient"):
        regularized_backward(net(), F.cross_entropy, encoder(x), y, alpha=1e-4, beta=1.0, sub_batches=4)


def test_frozen_parts_outside_of_the_model_are_no_obstacle() -> None:
    model, (x, y) = with_hidden_encoder(), data()
    model.encoder[0].requires_grad_(False)
    regularized_backward(model, F.cross_entropy, x, y, alpha=1e-4, beta=1.0, sub_batches=4)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_with_autocast_inside_takes_the_exact_derivative() -> None:
    model, (x, y) = Wrapped(low_precision, net().float()), data()
    exact, automatic = (
        regularized_backward(model, F.cross_entropy, x, y, alpha=1e-2, beta=1.0, sub_batches=4, derivative=how)
        for how in ("exact", "auto")
    )
    torch.testing.assert_close(automatic, exact)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_autocast_inside_a_compiled_network_is_refused() -> None:
    model, (x, y) = torch.compile(Wrapped(low_precision, net().float()), backend="aot_eager"), data()
    with pytest.raises(ValueError, match=r"computes in torch\.bfloat16 by itself"):
        regularized_backward(model, F.cross_entropy, x.float(), y, alpha=1e-4, beta=1.0, sub_batches=4)


# The copies.


def test_other_threads_and_the_network_itself_see_its_own_weights() -> None:
    x, y = data()
    model = net().eval()
    expected, weights = model(x).detach(), {name: p.detach().clone() for name, p in model.named_parameters()}
    wrong: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(model(x), expected):
                    wrong.append("output")
            wrong.extend(
                name for name, p in model.state_dict().items() if name in weights and not p.equal(weights[name])
            )

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        regularized_backward(model, F.cross_entropy, x, y, alpha=0.1, beta=1.0, sub_batches=8)
    stop.set()
    watcher.join()
    assert wrong == []


def test_parameters_are_replaced_wherever_they_are_held() -> None:
    model = Outside()
    moved = {name: tensor.detach() + 1 for name, tensor in model.named_parameters()}
    (copy,) = replica((model,), {id(p): moved[name] for name, p in model.named_parameters()})
    assert copy.slope is moved["slope"]
    assert copy.activation.keywords["weight"] is moved["slope"]
    assert copy.slopes[0] is moved["slope"]
    assert copy.method.__self__ is copy
    assert copy.net[0].weight is moved["net.0.weight"]
    assert copy.net[1].running_mean is not model.net[1].running_mean
    assert model.activation.keywords["weight"] is model.slope


def test_the_copy_shares_what_a_pass_does_not_change() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lock, self.function, self.sizes = threading.Lock(), F.relu, (3, 3)
            self.parent: list[nn.Module] = [self]
            self.layer = nn.Linear(2, 2)

    model = Modes()
    (copy,) = replica((model,), {}, evaluate=True)
    assert copy.lock is model.lock
    assert copy.function is F.relu
    assert copy.sizes is model.sizes
    assert copy.parent[0] is copy
    assert copy.layer is not model.layer
    assert copy.layer.weight is model.layer.weight
    assert model.layer.training
    assert not copy.layer.training


def test_a_copy_in_another_precision() -> None:
    model, (x, y) = net().float(), data()
    params = trainable_parameters(model)
    network = functional_loss(model).at({name: p.detach().double() for name, p in params.items()}, torch.float64)
    expected = functional_loss(net())({name: p.detach().double() for name, p in params.items()}, (x, y))
    torch.testing.assert_close(network((x, y)), expected, rtol=1e-12, atol=0)
