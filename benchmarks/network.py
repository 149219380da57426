"""What a regularized step costs where the network matters: two hosts behind a shaped link.

    python benchmarks/network.py [steps]          (root; iproute2 and openssh-server)

WRN-28-2 at 32×32, 32 images a worker in sub-batches of 16, one thread a worker; each step sends 5.9 MB a worker. Plain
and fused steps alternate in one job, each with its last backward overlapped with the allreduce, as the library does it,
and without: the gradient is completed first, then sent. Prints a Markdown table: medians in ms, the tenth to the
ninetieth percentile, and the median of the ratios to the plain step measured next to it.
"""

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from infomcr_dist import models, regularized_backward
from infomcr_dist.engines import connect

RATES = ("100mbit", "1gbit", None)
IMAGES, SUB_BATCH = 32, 16


def worker(steps: int) -> None:
    world = connect()
    torch.set_num_threads(1)
    torch.manual_seed(world.rank)
    model = models.build("wrn_28_2", classes=10, image_size=32)
    local = copy.deepcopy(model)  # no hook sends its gradients
    model, optimizer = world.distribute(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.randint(10, (IMAGES,))
    criterion = nn.CrossEntropyLoss()

    def backward(module: nn.Module, kind: str) -> None:
        if kind == "plain":
            criterion(module(images), labels).backward()
        else:
            regularized_backward(module, criterion, images, labels, alpha=1e-4, beta=10.0, sub_batch_size=SUB_BATCH)

    seconds: dict[tuple[str, bool], list[float]] = {}
    for step in range(steps + 1):
        for kind in ("plain", "fused"):
            for overlapped in (True, False):
                world.barrier()
                began = time.perf_counter()
                optimizer.zero_grad()
                if overlapped:
                    backward(model, kind)
                else:
                    local.zero_grad()
                    backward(local, kind)
                    for p, q in zip(model.parameters(), local.parameters(), strict=True):
                        p.grad = q.grad
                world.average_gradients(optimizer, torch.zeros(1))
                world.update(optimizer)
                if step:  # the first is a warm-up
                    seconds.setdefault((kind, overlapped), []).append(time.perf_counter() - began)
    if world.rank == 0:
        plain = seconds["plain", True]
        for (kind, overlapped), times in seconds.items():
            low, *_, high = (1e3 * t for t in statistics.quantiles(times, n=10))
            ratio = statistics.median(a / b for a, b in zip(times, plain, strict=True))
            name = f"{kind}, {'overlapped' if overlapped else 'sent after'}"
            print(f"ROW | {name} | {1e3 * statistics.median(times):.0f} | {low:.0f} to {high:.0f} | {ratio:.2f} |")
    world.close()


def main(steps: int) -> None:
    from hosts import hosts, missing

    if reason := missing():
        sys.exit(reason)
    print("| link | step | median, ms | 10 to 90 % | × plain, overlapped |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, hosts(2, Path(folder)) as made:
        for rate in RATES:
            made.set_rate(rate)
            command = made.horovodrun(sys.executable, str(Path(__file__).resolve()), "worker", str(steps))
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                sys.exit(result.stdout + result.stderr)
            for line in result.stdout.splitlines():
                if "ROW" in line:
                    print(f"| {rate or 'not shaped'} {line.split('ROW ')[1]}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
