"""Kinds of networks, losses and loops that people write, each against Algorithm 1 done the slow way, in float64.

    python tests/cases/library.py [PART OF A NAME ...]

The slow way is deep copies and plain backward passes. For each case the script prints the relative error of the
penalty's gradient, or of the Gram matrix. A case is ok if its error is below 1e-8, or if it ends with a ValueError of
one line, which names what is not supported and what to do instead. A wrong number and any other exception are BAD.
"""

import copy
import math
import random
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from infomcr_dist import functional_loss, gradient_gram, regularized_backward

torch.set_num_threads(1)
N, CLASSES = 16, 5
TOLERANCE = 1e-8


def data(size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(N, 3, size, size, generator=generator, dtype=dtype)
    return images, torch.randint(0, CLASSES, (N,), generator=generator)


def algorithm_1(model, criterion, images, labels, alpha, count):
    """Mean over the sub-batches of g_i - h_i, where h_i's pass starts from the state (buffers, random numbers) from
    which g_i's pass started."""
    model, criterion = copied(model, criterion)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for x, y in zip(images.clone().chunk(count), labels.chunk(count), strict=True):
        moved_model, moved_criterion = copied(model, criterion)
        before = random_numbers()
        g = gradients(model, criterion, x.clone(), y, total)
        after = random_numbers()
        with torch.no_grad():
            for name, parameter in moved_model.named_parameters():
                if name in g:
                    parameter.sub_(alpha * g[name])
        restore(before)
        h = gradients(moved_model, moved_criterion, x.clone(), y, total)
        restore(after)
        for name in total:
            total[name] += (g[name] - h[name]) / count
    return total


def copied(model, criterion):
    """Deep copies, without the graph of tensors that a forward pass has left in an attribute."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                vars(module)[name] = value.detach()
    return copy.deepcopy((model, criterion))


def random_numbers():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def restore(states):
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def gradients(model, criterion, x, y, names):
    model.zero_grad()
    criterion(model(x), y).backward()
    parameters = dict(model.named_parameters())
    return {name: filled(parameters[name].grad, parameters[name]).clone() for name in names}


def filled(gradient, parameter):
    return torch.zeros_like(parameter) if gradient is None else gradient


def penalty_error(model, criterion=F.cross_entropy, alpha=1e-4, count=4, limit=None, reference=None, **how):
    """Relative error of the penalty's gradient; 0 if below `limit`."""
    x, y = data()
    before = random_numbers()
    expected = algorithm_1(model if reference is None else reference, criterion, x, y, alpha, count)
    found = {}
    for beta in (0.0, 1e3):
        own_model, own_criterion = copied(model, criterion)
        restore(before)
        regularized_backward(own_model, own_criterion, x.clone(), y, alpha=alpha, beta=beta, sub_batches=count, **how)
        found[beta] = {name: filled(p.grad, p) for name, p in own_model.named_parameters()}
    squares = [((found[1e3][n] - found[0.0][n]) / 1e3 - e).square().sum() for n, e in expected.items()]
    error = math.sqrt(sum(squares) / sum(e.square().sum() for e in expected.values()))
    return error if limit is None or error >= limit else 0.0


def gram_error(model, images=None, labels=None):
    """Relative error of the Gram matrix, against one backward pass a sample."""
    x, y = data() if images is None else (images, labels)
    model = model.eval()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        rows.append(torch.cat([filled(g, p).flatten() for g, p in zip(found, params.values(), strict=True)]).double())
    dense = torch.stack(rows) @ torch.stack(rows).T
    found = gradient_gram(functional_loss(model), {name: p.detach() for name, p in params.items()}, (x, y))
    return float((found - dense).norm() / dense.norm())


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 6, 3, 2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(54, CLASSES),
    ).double()


class Wrapped(nn.Module):
    """A network with a forward pass and more modules of the case's own."""

    def __init__(self, forward, inner=None, **more):
        super().__init__()
        self.net, self._forward = inner if inner is not None else net(), forward
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self._forward(self, x)


class Centred(nn.Module):
    """A buffer that every training pass moves, and that the output depends on (an observer, a moving average)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3, 1, 1, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean((0, 2, 3)).view(3, 1, 1)
        return x - self.centre


class Aliased(nn.Module):
    """One network under two names, as torchvision's feature extractors keep it."""

    def __init__(self):
        super().__init__()
        self.body = net()
        self.features = self.body

    def forward(self, x):
        return self.body(x)


def sequence_first():
    """A transformer over 16 tokens of 12 numbers: as many tokens as images, and tokens come first."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0)

    def forward(model, x):
        tokens = F.unfold(x, 2, stride=2).permute(2, 0, 1)
        return model.head(model.net(tokens).mean(0))

    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return Wrapped(forward, encoder, head=nn.Linear(12, CLASSES)).double()


def aliased_module_is_unchanged():
    """How many of the network's parameters are no Parameters that train, afterwards."""
    model, batch = Aliased().double().eval(), data()
    gradient_gram(functional_loss(model), {name: p.detach() for name, p in model.named_parameters()}, batch)
    parameters = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    return float(sum(not (isinstance(p, nn.Parameter) and p.requires_grad) for p in parameters))


def whole_and_parts():
    def forward(model, x):
        x = x.flatten(1)
        first, second = model.lin.weight.chunk(2)
        mixed = F.linear(x, first)[:, :1] * F.linear(x, second)[:, : CLASSES - 1].sum(1, keepdim=True)
        return model.head(F.silu(model.lin(x))) + mixed * torch.arange(CLASSES)

    torch.manual_seed(0)
    return Wrapped(forward, nn.Identity(), lin=nn.Linear(192, 8), head=nn.Linear(8, CLASSES)).double()


def autocast_inside():
    """In bfloat16 a finite difference has an error above 1; the expectation is that of the float32 network."""

    def autocast(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model.net(x.float()).double()

    def float32(model, x):
        return model.net(x.float()).double()

    model, reference = Wrapped(autocast, net().float()), Wrapped(float32, net().float())
    return penalty_error(model, alpha=1e-2, limit=0.1, reference=reference)


def ignored_sub_batch():
    """One of four sub-batches counts for nothing: the loss is finite, and the mean over the others' images."""
    model, (x, y) = net(), data()
    y[4:8] = -100
    criterion = nn.CrossEntropyLoss(ignore_index=-100)
    losses = regularized_backward(model, criterion, x, y, alpha=1e-4, beta=10.0, sub_batches=4)
    expected = criterion(torch.cat([net()(part) for part in x.chunk(4)]), y).detach()
    return abs(float(losses.loss) - float(expected)) if math.isfinite(float(losses.loss)) else math.inf


def batch_statistics():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(144, CLASSES),
    ).double()


def recurrent():
    torch.manual_seed(0)
    return Wrapped(
        lambda model, x: model.head(model.net(x.flatten(2).transpose(1, 2))[0][:, -1]),
        nn.GRU(3, 6, batch_first=True),
        head=nn.Linear(6, CLASSES),
    ).double()


CASES = {
    "aliased module, gram": lambda: gram_error(Aliased()),
    "aliased module is unchanged": aliased_module_is_unchanged,
    "sequence-first transformer, as many tokens as images": lambda: gram_error(sequence_first()),
    "activation checkpointing around the network": lambda: penalty_error(
        Wrapped(lambda model, x: checkpoint(model.net, x, use_reentrant=False))
    ),
    "buffer that training moves": lambda: penalty_error(
        Wrapped(lambda model, x: model.net(model.centred(x)), centred=Centred())
    ),
    "input changed in place": lambda: penalty_error(Wrapped(lambda model, x: model.net(x.sub_(0.5).div_(0.25)))),
    "batch norm without running statistics, gram": lambda: gram_error(batch_statistics()),
    "a weight used whole and in parts, gram": lambda: gram_error(whole_and_parts()),
    "loss that ignores a whole sub-batch": ignored_sub_batch,
    "autocast inside the network": autocast_inside,
    "recurrent network, gram": lambda: gram_error(recurrent()),
    "output in a tuple, gram": lambda: gram_error(Wrapped(lambda model, x: (model.net(x),)[0])),
}


def result(name):
    """Whether the case is ok, and its error or exception in one line."""
    try:
        error = CASES[name]()
    except ValueError as refused:
        return "\n" not in str(refused), f"refused: {refused}"
    except Exception as crash:
        return False, f"{type(crash).__name__}: {str(crash).splitlines()[0][:110]}"
    return error < TOLERANCE, f"{error:.1e}"


def main(parts):
    failed = False
    for name in CASES:
        if not parts or any(part in name for part in parts):
            good, text = result(name)
            failed |= not good
            print(f"{'ok  ' if good else 'BAD '} {name}: {text}", flush=True)
    return int(failed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
