"""Run on every worker by test_engines.py: what needs real workers, reported as files of each rank."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infomcr_dist import regularized_backward
from infomcr_dist.engines import connect
from infomcr_dist.step import PenaltySettings, train_step
from infomcr_dist.world import UserError, World

SUB_BATCH, IMAGES = 4, 16  # a worker


def net(norm: bool) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1)]
    if norm:
        layers.append(nn.BatchNorm2d(6))
    layers += [nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)]
    return nn.Sequential(*layers).double()


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    images = torch.randn(IMAGES, 3, 6, 6, dtype=torch.float64, generator=generator)
    return images, torch.randint(5, (IMAGES,), generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of an entry, relative to the largest entry (a bias before BatchNorm has gradient 0)."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a) / max(float(g.abs().max()) for g in b.values())


def settings(estimator: str) -> dict[str, Any]:
    if estimator == "sam":
        return {"method": "sam", "rho": 0.1}
    # α and β far from the defaults: the penalty's part of the gradient must not hide in its rounding.
    return {"alpha": 0.05, "beta": 3.0, "estimator": estimator, "num_sampled": 2 if estimator == "sampled" else None}


def serial_gradient(estimator: str, norm: bool, size: int) -> dict[str, Tensor]:
    """One process on the union of the workers' sub-batches; for sampled, the mean over what each worker draws."""
    images, labels = (torch.cat(tensors) for tensors in zip(*map(batch, range(size)), strict=True))
    model = net(norm)
    if estimator != "sampled":
        regularized_backward(
            model, nn.CrossEntropyLoss(), images, labels, sub_batches=size * IMAGES // SUB_BATCH, **settings(estimator)
        )
        return gradients(model)
    for rank in range(size):
        torch.manual_seed(rank)
        regularized_backward(
            model,
            nn.CrossEntropyLoss(),
            *batch(rank),
            sub_batches=IMAGES // SUB_BATCH,
            loss_scale=1 / size,
            **settings(estimator),
        )
    return gradients(model)


def distributed(world: World, norm: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net(norm)
    return world.distribute(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def count_sent(world: World) -> list[str]:
    """A list that grows with what is sent of gradients: name, if any, and bytes."""
    sent: list[str] = []
    if world.engine == "horovod":
        import horovod.torch.optimizer as module

        attribute = "allreduce_async_"
    else:
        import torch.distributed as module

        from infomcr_dist.engines import torch_distributed

        torch_distributed._BUCKET_BYTES, attribute = 512, "all_reduce"  # more than one
    allreduce = getattr(module, attribute)

    def counting(tensor: Tensor, *args: Any, **more: Any) -> Any:
        if "name" in more or more.get("async_op"):
            sent.append(f"{more.get('name')} {tensor.nbytes}")
        return allreduce(tensor, *args, **more)

    setattr(module, attribute, counting)
    return sent


def after_steps(world: World, estimator: str | None) -> dict[str, Tensor]:
    """The network after a hundred steps of a float32 network, plain or regularized, the last batches uneven."""
    model = net(norm=True).float()
    model, optimizer = world.distribute(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    penalty = estimator and PenaltySettings(1e-2, 0.1, SUB_BATCH, estimator)
    for step in range(100):
        images, labels = batch(1000 * step + world.rank)
        whole = IMAGES * world.size
        if step % 10 == 9 and world.rank == 0:
            images, labels, whole = images[:0], labels[:0], whole - IMAGES
        elif step % 10 == 9:
            whole -= IMAGES
        torch.manual_seed(step)
        settings = {"loss_scale": len(labels) * world.size / whole, "penalty": penalty, "clip_gradient_norm": 1.0}
        result = train_step(model, nn.CrossEntropyLoss(), optimizer, world, (images.float(), labels), **settings)
        assert result.finite
    world.average_buffers(model)
    return model.state_dict()


def distributed_gradient(world: World, estimator: str, sent: list[str], norm: bool) -> dict[str, Tensor]:
    model, optimizer = distributed(world, norm)
    optimizer.zero_grad()
    torch.manual_seed(world.rank)
    sent.clear()
    images, labels = batch(world.rank)
    if estimator == "plain":
        nn.CrossEntropyLoss()(model(images), labels).backward()
    else:
        regularized_backward(
            model, nn.CrossEntropyLoss(), images, labels, sub_batches=IMAGES // SUB_BATCH, **settings(estimator)
        )
    overlapped = len(sent)
    assert world.average_gradients(optimizer, torch.tensor([1.0, world.rank])).tolist() == [
        world.size,
        sum(range(world.size)),
    ]
    assert len(sent) == overlapped, "all were sent while the backward pass ran"
    result = gradients(model)
    world.update(optimizer)
    return result


def busy_seconds(world: World) -> float:
    """Of processor time in the main thread, while the last rank is half a second late for an allreduce."""
    norm = nn.BatchNorm1d(3)
    world.barrier()
    if world.rank == world.size - 1:
        time.sleep(0.5)
    before = time.thread_time()
    world.average_buffers(norm)
    return time.thread_time() - before


def main(output: Path) -> None:
    torch.set_num_threads(1)
    world = connect()
    report: dict[str, Any] = {"engine": world.engine, "size": world.size}
    report["ranks"] = [world.rank, world.local_rank, world.local_size]
    sent = count_sent(world)
    for estimator in ("fused", "sampled", "reference", "sam"):
        norm = estimator in (
            "fused",
            "sam",
        )  # the others' loss term sees BatchNorm statistics that differ with the split
        distributed_gradient(world, "plain", sent, norm)
        plain = sorted(sent)
        result = distributed_gradient(world, estimator, sent, norm)
        report[f"sent {estimator}"] = [plain, sorted(sent)]
        report[f"difference {estimator}"] = difference(result, serial_gradient(estimator, norm, world.size))

    # A last, smaller global batch: the first worker has two images, the second one, any other none.
    model, optimizer = distributed(world, norm=False)
    optimizer.zero_grad()
    images, labels = batch(0)
    mine = slice(0, 2) if world.rank == 0 else slice(2, 3) if world.rank == 1 else slice(0, 0)
    if len(labels[mine]):
        weight = len(labels[mine]) * world.size / 3
        (nn.CrossEntropyLoss()(model(images[mine]), labels[mine]) * weight).backward()
    world.average_gradients(optimizer, torch.zeros(1))
    whole = net(norm=False)
    nn.CrossEntropyLoss()(whole(images[:3]), labels[:3]).backward()
    report["difference remainder"] = difference(gradients(model), gradients(whole))

    norm = nn.BatchNorm1d(3)
    norm.running_mean = torch.full((3,), float(world.rank))
    world.average_buffers(norm)
    report["running mean"] = norm.running_mean.tolist()
    report["batches tracked"] = int(norm.num_batches_tracked)  # type: ignore[arg-type]
    report["busy seconds"] = busy_seconds(world)
    report["sum"] = world.sum([world.rank + 1, 0.5])
    report["broadcast"] = world.broadcast({"rank": world.rank})
    try:
        with world.synchronize_errors():
            if world.rank == world.size - 1:
                raise ValueError(f"trouble on rank {world.rank}")
    except UserError as error:
        report["synchronized"] = [str(error), error.everywhere]
    states = {str(estimator): after_steps(world, estimator) for estimator in (None, "fused")}
    torch.save(states, output / f"{world.rank}.pt")
    (output / f"{world.rank}.json").write_text(json.dumps(report))
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
