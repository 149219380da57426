"""The step in DistributedDataParallel on two processes (gloo), and wrappers that are refused."""

import gc
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.library import net
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from infomcr_dist import functional_loss, regularized_backward
from infomcr_dist.regularizer import plain_backward

COMMON: dict[str, Any] = {"alpha": 1e-3, "beta": 10.0, "sub_batches": 4}
HOW: list[dict[str, Any]] = [
    {},
    {"derivative": "exact"},
    {"estimator": "sampled", "num_sampled": 1},
    {"estimator": "reference"},
    {"estimator": "reference", "max_batch_size": 3},
    {"method": "asam", "rho": 0.5},
]


class Skipping(nn.Module):
    """The second block is for batches that are bright."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(6, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.flatten(1)
        hidden = self.first(x).tanh()
        if float(x.mean()) > 0:
            hidden = hidden + self.second(x).tanh()
        return {"logits": self.head(hidden), "norm": hidden.square().sum(1)}


def criterion(output: dict[str, Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"], labels)


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    """On rank 0 the last sub-batch, and on rank 1 all but the last, skip the second block."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.rand(16, 3, 2, 2, generator=generator, dtype=torch.float64)
    dark = torch.arange(16) // 4 == 3 if rank == 0 else torch.arange(16) // 4 < 3
    return torch.where(dark[:, None, None, None], -x, x), torch.randint(4, (16,), generator=generator)


def step(model: nn.Module, batch: tuple[Tensor, Tensor], how: dict[str, Any]) -> None:
    torch.manual_seed(5)
    regularized_backward(model, criterion, *batch, **COMMON, **how)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def on_two_processes(check: Any, path: Path) -> None:
    torch.multiprocessing.spawn(process, (check, path), nprocs=2)


def process(rank: int, check: Any, path: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    check(rank)
    gc.collect()  # a wrapper refers to itself, and to the process group, whose threads must end before the process
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_blocks_that_some_sub_batches_skip(tmp_path: Path) -> None:
    on_two_processes(skipped_blocks, tmp_path)


def skipped_blocks(rank: int) -> None:
    for how in HOW:
        for more in ({}, {"gradient_as_bucket_view": True}):
            serial = []
            for r in range(2):
                alone = Skipping().double()
                step(alone, batch_of(r), how)
                serial.append(grads(alone))
            model = DistributedDataParallel(Skipping().double(), find_unused_parameters=True, **more)
            fired: Counter[str] = Counter()
            for name, parameter in model.module.named_parameters():
                parameter.register_post_accumulate_grad_hook(lambda _, name=name, fired=fired: fired.update([name]))
            for _ in range(2):
                model.zero_grad()
                fired.clear()
                step(model, batch_of(rank), how)
                found = grads(model.module)
                for name in serial[0].keys() | serial[1].keys():
                    mean = sum(one.get(name, torch.zeros(())) for one in serial) / 2
                    torch.testing.assert_close(found[name], mean, rtol=1e-11, atol=1e-14, msg=f"{name} {how}")
                assert not any(name.startswith("unused") for name in found)
                assert fired == dict.fromkeys(serial[rank], 1), how


def test_uneven_numbers_of_steps_and_the_buffers(tmp_path: Path) -> None:
    on_two_processes(joined, tmp_path)


def joined(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=generator), torch.arange(16) % 5
    for how in (*HOW, {"plain": True}):
        model = DistributedDataParallel(net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with model.join():
            for _ in range(3 if rank == 0 else 1):
                optimizer.zero_grad()
                if "plain" in how:
                    plain_backward(model, F.cross_entropy, images, labels, max_batch_size=6)
                else:
                    regularized_backward(model, F.cross_entropy, images, labels, **COMMON, **how)
                optimizer.step()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        others = [torch.empty_like(weights) for _ in range(2)]
        torch.distributed.all_gather(others, weights)
        assert torch.equal(others[0], others[1]), how

    # Ranks begin a step with the buffers of rank 0, as in a plain step.
    model = DistributedDataParallel(net())
    regularized_backward(model, F.cross_entropy, images + rank, labels, **COMMON)
    mean = model.module[1].running_mean.clone()
    before = [torch.empty_like(mean) for _ in range(2)]
    torch.distributed.all_gather(before, mean)
    assert not torch.equal(before[0], before[1])
    one = net()
    one.load_state_dict(model.module.state_dict())
    one[1].running_mean.copy_(before[0])
    regularized_backward(one, F.cross_entropy, images + rank, labels, **COMMON)
    regularized_backward(model, F.cross_entropy, images + rank, labels, **COMMON)
    torch.testing.assert_close(model.module[1].running_mean, one[1].running_mean, rtol=1e-12, atol=0)


def test_accumulation_over_steps(tmp_path: Path) -> None:
    on_two_processes(accumulated, tmp_path)


def accumulated(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 16, 3, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.arange(16) % 5
    expected = []
    for r in range(2):
        alone = net()
        for i in range(2):
            regularized_backward(alone, F.cross_entropy, images[i] + r, labels, **COMMON)
        expected.append(torch.cat([p.grad.flatten() for p in alone.parameters()]))
    model = DistributedDataParallel(net(), forward_sync_buffers=False)
    with model.no_sync():
        regularized_backward(model, F.cross_entropy, images[0] + rank, labels, **COMMON)
    regularized_backward(model, F.cross_entropy, images[1] + rank, labels, **COMMON)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-10, atol=1e-13)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_and_other_wrappers_are_refused() -> None:
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = fully_shard(net().float(), mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        scripted = torch.jit.script(net().float())
    for model, message in (
        (sharded, r"must not be sharded \(fully_shard\)"),
        (nn.DataParallel(net().float()), "must not be in DataParallel"),
        (scripted, "must not hold a ScriptModule"),
        (nn.Sequential(scripted), "must not hold a ScriptModule"),
        (nn.LazyLinear(3), "model must be initialized, 'weight' is lazy"),
    ):
        for call in (
            lambda model=model: regularized_backward(model, F.cross_entropy, x, y, **COMMON),
            lambda model=model: plain_backward(model, F.cross_entropy, x, y),
            lambda model=model: functional_loss(model),
        ):
            with pytest.raises(ValueError, match=message) as refused:
                call()
            assert "\n" not in str(refused.value)
