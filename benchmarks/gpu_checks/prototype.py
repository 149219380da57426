"""A step in bfloat16 that one CUDA graph can hold: what the step of the library may come to.

It times and compares, and trains nothing: BatchNorm keeps no running statistics, which parallel sub-batches would race
for. (1/M) Σ (1 + βα/ε_i) g_i − (βα/ε_i) h_i is Eq. 7 with a step of its own length, ε_i = ρ‖w‖/‖g_i‖.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from infomcr_dist.models import build

ALPHA, BETA, RHO = 1e-4, 10.0, 3e-3


@dataclass(frozen=True)
class Case:
    """A network and its batch."""

    model: str
    image_size: int
    classes: int
    batch_size: int
    sub_batch_size: int = 16

    def network(self, device: str) -> nn.Module:
        """With the same weights every time."""
        torch.manual_seed(0)
        return build(self.model, self.classes, self.image_size).to(device)

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """The same every time."""
        random = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=random)
        return images.to(device), torch.randint(self.classes, (self.batch_size,), generator=random).to(device)


class Prototype:
    """A network in channels_last, a batch and a fused SGD update, without one host synchronisation."""

    def __init__(self, case: Case, device: str, compiled: bool = False, low: torch.dtype = torch.bfloat16) -> None:
        self.case, self.device, self.low = case, device, low
        model = case.network(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        images, self.labels = case.batch(device)
        self.images = images.to(low, memory_format=torch.channels_last)
        self.weights = list(model.parameters())
        names = [name for name, _ in model.named_parameters()]
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        fused = {"fused": True} if device == "cuda" else {}
        self.optimizer = torch.optim.SGD(self.weights, 1e-4, momentum=0.9, nesterov=True, **fused)
        self.multiplied = [weight.dim() > 1 for weight in self.weights]

        def loss(weights: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(device, low, enabled=low != torch.float32, cache_enabled=False):
                logits = functional_call(model, dict(zip(names, weights, strict=True)), (images,))
            return cross_entropy(logits.float(), labels)

        # On a CPU inductor's C++ compiler would take minutes.
        backend = "inductor" if device == "cuda" else "aot_eager"
        self.loss = torch.compile(loss, dynamic=False, backend=backend) if compiled else loss

    def converted(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights of products in the lower precision, all others as they are."""
        return [w.to(self.low) if product else w for w, product in zip(weights, self.multiplied, strict=True)]

    def gradient(self, weights: Sequence[Tensor], images: Tensor, labels: Tensor) -> list[Tensor]:
        """In float32, at converted weights."""
        leaves = [weight.detach().requires_grad_() for weight in weights]
        found = torch.autograd.grad(self.loss(leaves, images, labels), leaves)
        return [tensor.float() for tensor in found]

    def update(self, total: Sequence[Tensor]) -> None:
        """Of the weights, by a gradient."""
        torch._foreach_copy_([weight.grad for weight in self.weights if weight.grad is not None], list(total))
        self.optimizer.step()

    def plain(self) -> None:
        """A plain step."""
        self.update(self.gradient(self.converted(self.weights), self.images, self.labels))

    def regularized(
        self, streams: Sequence[torch.cuda.Stream] = (), sampled: int | None = None, rho: float = RHO
    ) -> None:
        """A step with the penalty of all sub-batches (fused), or of the first `sampled`."""
        self.update(self.regularized_gradient(streams, sampled))

    def regularized_gradient(
        self,
        streams: Sequence[torch.cuda.Stream] = (),
        sampled: int | None = None,
        rho: float = RHO,
        beta: float = BETA,
    ) -> list[Tensor]:
        """Of L + βR; the sub-batches are dealt out to the streams."""
        size = self.case.sub_batch_size
        parts = list(zip(self.images.split(size), self.labels.split(size), strict=True))
        penalized = parts[:sampled]
        lower = self.converted(self.weights)
        norm = torch.stack(torch._foreach_norm(self.weights)).norm()
        sums = [[torch.zeros_like(weight) for weight in self.weights] for _ in range(len(streams) or 1)]

        def add(part: tuple[Tensor, Tensor], total: list[Tensor]) -> None:
            g = self.gradient(lower, *part)
            step = rho * norm / torch.stack(torch._foreach_norm(g)).norm()
            moved = torch._foreach_sub(self.weights, torch._foreach_mul(g, step))
            h = self.gradient(self.converted(moved), *part)
            weight = beta * ALPHA / step / len(penalized)
            torch._foreach_add_(total, torch._foreach_mul(torch._foreach_sub(g, h), weight))
            torch._foreach_add_(total, g, alpha=1 / len(parts))

        if streams:
            main = torch.cuda.current_stream()
            for stream in streams:
                stream.wait_stream(main)
            for i, part in enumerate(penalized):
                with torch.cuda.stream(streams[i % len(streams)]):
                    add(part, sums[i % len(streams)])
            for stream in streams:
                main.wait_stream(stream)
        else:
            for part in penalized:
                add(part, sums[0])
        for other in sums[1:]:
            torch._foreach_add_(sums[0], other)
        if len(penalized) < len(parts):
            rest = self.gradient(lower, self.images[len(penalized) * size :], self.labels[len(penalized) * size :])
            torch._foreach_add_(sums[0], rest, alpha=1 - len(penalized) / len(parts))
        return sums[0]


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
