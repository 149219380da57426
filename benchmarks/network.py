"""What a regularized step costs where the network matters: two hosts behind a shaped link.

    python benchmarks/network.py [steps]          (root; iproute2 and openssh-server)

WRN-28-2 at 32×32, 32 images a worker in sub-batches of 16, one thread a worker; each step sends 5.9 MB a worker. A job
of Horovod and one of torchrun for each link. Plain and fused steps alternate in a job, each with its last backward
overlapped with the allreduce, as the library does it, and without: the gradient is completed first, then sent; or the
step sends nothing. Prints a Markdown table: medians in ms, the tenth to the ninetieth percentile, and the median of the
ratios to the plain step measured next to it.
"""

import copy
import signal
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
STEPS = [(kind, sending) for kind in ("plain", "fused") for sending in ("overlapped", "sent after", "alone")]


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

    seconds: dict[tuple[str, str], list[float]] = {}
    for step in range(steps + 1):
        for kind, sending in STEPS:
            world.barrier()
            began = time.perf_counter()
            module = model if sending == "overlapped" else local
            module.zero_grad()
            backward(module, kind)
            if sending != "overlapped":
                for p, q in zip(model.parameters(), local.parameters(), strict=True):
                    p.grad = q.grad
            if sending != "alone":
                world.average_gradients(optimizer, torch.zeros(1))
            world.update(optimizer)
            if step:  # the first is a warm-up
                seconds.setdefault((kind, sending), []).append(time.perf_counter() - began)
    if world.rank == 0:
        plain = seconds["plain", "overlapped"]
        for (kind, sending), times in seconds.items():
            low, *_, high = (1e3 * t for t in statistics.quantiles(times, n=10))
            ratio = statistics.median(a / b for a, b in zip(times, plain, strict=True))
            name = f"{world.engine} | {kind}, {sending}"
            print(f"ROW | {name} | {1e3 * statistics.median(times):.0f} | {low:.0f} to {high:.0f} | {ratio:.2f} |")
    world.close()


def main(steps: int) -> None:
    from hosts import hosts, missing

    if reason := missing():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts are removed
    print("| link | engine | step | median, ms | 10 to 90 % | × plain, overlapped |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, hosts(2, Path(folder)) as made:
        for rate in RATES:
            made.set_rate(rate)
            command = [sys.executable, str(Path(__file__).resolve()), "worker", str(steps)]
            for job in ([made.horovodrun(*command)], made.torchrun(*command)):
                with tempfile.TemporaryFile("w+") as log:
                    codes = [p.wait() for p in [subprocess.Popen(line, stdout=log, stderr=log) for line in job]]
                    log.seek(0)
                    output = log.read()
                if any(codes):
                    sys.exit(output)
                for line in output.splitlines():
                    if "ROW" in line:
                        print(f"| {rate or 'not shaped'} {line.split('ROW ')[1]}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
