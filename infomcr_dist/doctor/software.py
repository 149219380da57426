"""Whether the engines, torch and the GPUs fit each other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass

import torch

from infomcr_dist.doctor.results import Result, attempt
from infomcr_dist.engines.torch_distributed import backends
from infomcr_dist.world import World

# Run in a process of its own: a Horovod that cannot be imported, or crashes, then fails one check.
_HOROVOD_FACTS = """
import json, pathlib, horovod, horovod.torch as hvd
path = pathlib.Path(horovod.__file__).with_name("metadata.json")
print(json.dumps({
    "version": horovod.__version__,
    "torch": json.loads(path.read_text())["pytorch"],
    "gloo": bool(hvd.gloo_built()),
    "mpi": bool(hvd.mpi_built()),
    "nccl": bool(hvd.nccl_built()),
}))
"""


@dataclass(frozen=True)
class HorovodBuild:
    """torch: the version it was built for; gloo, mpi, nccl: whether they are built in."""

    version: str
    torch: str
    gloo: bool
    mpi: bool
    nccl: bool

    def __str__(self) -> str:
        return f"Horovod {self.version}, built for torch {self.torch}, with {'gloo' if self.gloo else 'MPI'}"


def check_software(results: list[Result], world: World) -> None:
    """The engine's build, or of a single process those installed; the GPUs of this host, and NCCL."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if world.engine != "horovod":
        attempt(results, "torch", judge_backends, backends(), len(gpus))
    if world.engine == "horovod" or (world.engine == "none" and importlib.util.find_spec("horovod")):
        build = attempt(results, "horovod", horovod_build, torch.__version__)
        if build is not None:
            attempt(results, "nccl", judge_nccl, build.nccl, len(gpus), torch.version.cuda)
    attempt(results, "gpus", judge_gpus, gpus, world.local_size, torch.version.cuda)


def judge_backends(available: list[str], gpus: int) -> str:
    """ValueError where torch.distributed lacks what the workers would exchange gradients with."""
    missing = [name for name in ("gloo", *(["NCCL"] if gpus else [])) if name not in available]
    if missing:
        what = f"torch {torch.__version__} was built without {', '.join(missing)}"
        raise ValueError(f"{what}: install another build of it")
    return f"torch {torch.__version__}, torch.distributed with {', '.join(available)}"


def horovod_build(torch_version: str) -> HorovodBuild:
    """The installed Horovod. ValueError if it cannot be imported, or was built for another torch."""
    done = subprocess.run([sys.executable, "-c", _HOROVOD_FACTS], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"Horovod cannot be imported ({reason}): build it for torch {torch_version}: launch/setup.sh")
    build = HorovodBuild(**json.loads(done.stdout.splitlines()[-1]))
    if build.torch != torch_version:
        raise ValueError(
            f"Horovod {build.version} was built for torch {build.torch}, installed is {torch_version}: launch/setup.sh"
        )
    if not (build.gloo or build.mpi):
        raise ValueError(f"Horovod {build.version} has neither gloo nor MPI built in: launch/setup.sh")
    return build


def judge_gpus(names: list[str], local_ranks: int, cuda: str | None) -> str:
    """ValueError where several ranks of this host would have to share a GPU."""
    if not names:
        return "none: training runs on the CPU" + (
            f" (torch is built for CUDA {cuda}, but sees no GPU)" if cuda else ""
        )
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    if len(names) < local_ranks:
        raise ValueError(
            f"{kinds}, fewer than the {local_ranks} ranks of this host: start one rank per GPU (-H HOST:GPUS)"
        )
    idle = len(names) - local_ranks
    return kinds + (f"; {idle} of them idle" if idle else "")


def judge_nccl(built: bool, gpus: int, cuda: str | None) -> str:
    """ValueError where Horovod's workers would exchange the gradients of GPUs without NCCL."""
    if gpus and not built:
        raise ValueError(f"not built in, but torch is built for CUDA {cuda}: install libnccl-dev, then launch/setup.sh")
    return "built in" if built else "not built in, nor needed without GPUs"
