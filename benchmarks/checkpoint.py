"""What saving costs a training step: steps with a save begun before them, next to steps without one.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py model=resnet50 image_size=64 batch_size=16

A save is what a run does: a copy of weights, momentum and buffers in the step's own thread, then the writing (with
checksum and fsync) beside the two steps that follow, which should outlast it. A round is two steps of each kind, in
random order; "copy" is the part that always falls on the step. Medians of ratios, in brackets quartiles.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from interleaved import measure
from torch.nn.functional import cross_entropy

from infomcr_dist import checkpoint
from infomcr_dist.models import build
from pipelines.options import load


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    model: str = "resnet20"
    image_size: int = 32
    classes: int = 10
    batch_size: int = 128
    threads: int = 1
    rounds: int = 15


def main(settings: Settings) -> None:
    """Print the table."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model = build(settings.model, settings.classes, settings.image_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size)
    labels = torch.randint(settings.classes, (settings.batch_size,))
    copies: list[float] = []

    with tempfile.TemporaryDirectory() as folder:
        writer = checkpoint.Writer(Path(folder), keep=2)

        def steps() -> None:
            for _ in range(2):
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()

        def steps_beside_a_save() -> None:
            began = time.perf_counter()
            state = checkpoint.copied({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            copies.append(time.perf_counter() - began)
            writer.begin(len(copies), state)
            steps()

        timings = measure({"two steps": steps, "two steps, a save begun": steps_beside_a_save}, settings.rounds)
        writer.wait()
        writes = [saved.seconds for saved in writer.finished()]

    size = sum(t.nbytes for t in model.state_dict().values()) + sum(p.nbytes for p in model.parameters())
    print(f"{settings.model}, {settings.batch_size} images, {size / 1e6:.1f} MB saved, threads: {settings.threads}\n")
    print("| | ms | x two steps |\n|---|---|---|")
    for name, timing in timings.items():
        print(f"| {name} | {1000 * timing.seconds:.0f} | {timing.ratio} |")
    print(f"| copy | {1000 * sorted(copies)[len(copies) // 2]:.1f} | |")
    print(f"| writing, beside | {1000 * sorted(writes)[len(writes) // 2]:.0f} | |")


if __name__ == "__main__":
    try:
        main(load(Settings, None, sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"checkpoint: {error}")
