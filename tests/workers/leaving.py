"""Run on two workers by test_engines.py: worlds left in every way, and gloo's threads in each and after it."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from infomcr_dist.engines import launched_rank, run_in_world
from infomcr_dist.world import Stopped, UserError, World


def threads() -> int:
    """Those that run gloo's collectives."""
    names = (comm.read_text() for comm in Path("/proc/self/task").glob("*/comm"))
    return sum("gloo_runloop" in name for name in names)


def main(output: Path) -> None:
    rank, report = launched_rank(os.environ), []
    alone = UserError("of rank 1")
    for way in (None, Stopped("every worker's"), UserError("every worker's", everywhere=True), alone):
        during = 0

        def body(world: World, way: Exception | None = way) -> int:
            nonlocal during
            model = nn.Sequential(nn.Linear(1000, 2000), nn.Linear(2000, 5))
            model, optimizer = world.distribute(model, torch.optim.SGD(model.parameters(), lr=0.1))
            for step in range(4):
                during = threads()
                if way is not None and step == 3 and (way is not alone or rank == 1):
                    raise way
                model(torch.ones(2, 1000)).sum().backward()
                world.average_gradients(optimizer, torch.zeros(1))
            return 0

        code = run_in_world(body, hang_timeout_seconds=60)
        report.append((code, during, threads()))
    (output / f"{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
