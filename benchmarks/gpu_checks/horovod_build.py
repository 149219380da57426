"""Horovod built on this machine from the kit's patched sources: with NCCL on one rank, without it on two ranks."""

import os
import signal
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from gpu_checks import ROOT, Context, Row, interpreter
from gpu_checks.runs import HANG_SECONDS, Job, reported, small
from infomcr_dist.records import FILE, StepRecord, of_kind, read_records

_KIT = ROOT / ".gpu-kit" / "horovod"
_COMMON = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_CPU_OPERATIONS": "GLOO",
    "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
}


def horovod(context: Context) -> Iterator[Row]:
    """Build both wheels side by side, then train with each."""
    if not _KIT.exists():
        yield Row("Horovod", "no sources: make gpu-kit")
        return
    folder = context.work / "horovod"
    folder.mkdir()
    tools = folder / "tools"
    pip = interpreter("pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(tools))
    subprocess.run([*pip, *map(str, _KIT.glob("*.whl"))], check=True)
    builds = {
        "NCCL": _build(folder / "nccl", tools, _nccl(folder)),
        "no GPU operations": _build(folder / "cpu", tools, {}),
    }
    for name, build in builds.items():
        try:
            yield Row(f"Horovod's wheel, {name}", f"built in {build.finish():.0f} s, both side by side", "builds", True)
        except RuntimeError as error:
            yield Row(f"Horovod's wheel, {name}", str(error), "builds", False)
            continue
        site = build.directory / "site"
        unpack = interpreter("pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site))
        subprocess.run([*unpack, *map(str, (build.directory / "wheel").glob("*.whl"))], check=True)
        ranks = 1 if name == "NCCL" else 2
        yield _trained(context, name, site, ranks)
        if ranks == 2:
            yield _stopped(context, site)


def _nccl(folder: Path) -> dict[str, str]:
    """Options for CUDA operations, with the NCCL that torch has."""
    package = find_spec("nvidia") and find_spec("nvidia.nccl")
    places = list(package.submodule_search_locations or ()) if package is not None else []
    options = {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "SHARED"}
    if torch.cuda.is_available():
        options["HOROVOD_BUILD_CUDA_CC_LIST"] = "{}{}".format(*torch.cuda.get_device_capability())
    if places:  # it has libnccl.so.2, and the linker looks for libnccl.so
        linked = folder / "libnccl"
        linked.mkdir()
        (linked / "libnccl.so").symlink_to(Path(places[0]) / "lib" / "libnccl.so.2")
        options |= {"HOROVOD_NCCL_INCLUDE": str(Path(places[0]) / "include"), "HOROVOD_NCCL_LIB": str(linked)}
    return options


def _build(folder: Path, tools: Path, options: dict[str, str]) -> Job:
    """The start of a wheel's build."""
    folder.mkdir()
    subprocess.run(["tar", "-xzf", _KIT / "horovod.tar.gz", "-C", folder], check=True)
    jobs = max(1, (os.cpu_count() or 2) // 2)
    path = os.pathsep.join([str(tools), os.environ.get("PYTHONPATH", "")])
    environment = _COMMON | options | {"MAKEFLAGS": f"-j{jobs}", "PYTHONPATH": path}
    wheel = interpreter("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "wheel"))
    return Job([*wheel, str(folder / "horovod")], folder, environment)


def _horovodrun(ranks: int) -> list[str]:
    """What the console script `horovodrun` does."""
    run = "from horovod.runner.launch import run_commandline; run_commandline()"
    return [sys.executable, "-W", "ignore", "-c", run, "-np", str(ranks)]


def _environment(site: Path) -> dict[str, str]:
    scripts = sysconfig.get_path("scripts")
    return {
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), scripts, os.environ["PATH"]]),
    }


def _trained(context: Context, name: str, site: Path, ranks: int) -> Row:
    """A short run."""
    arguments = [*small(context), "regularizer.when=always", "epochs=2", "data.batch_size=64"]
    command = [*_horovodrun(ranks), *interpreter("infomcr_dist", "train"), *arguments]
    job = Job(command, context.work / f"horovod-{ranks}", _environment(site))
    what = f"Horovod, {name}, ranks on this GPU: {ranks}"
    try:
        took = job.finish()
    except RuntimeError as error:
        return Row(what, str(error), "trains", False)
    steps = of_kind(list(read_records(job.directory / "run" / FILE)), StepRecord)
    median = statistics.median(1000 * step.step_duration_seconds for step in steps if step.epoch == 2)
    return Row(what, f"trained in {took:.1f} s, {median:.1f} ms a regularized step", "trains", True)


def _stopped(context: Context, site: Path) -> Row:
    """One of two ranks gets SIGSTOP."""
    pids = context.work / "pids"
    arguments = [*small(context), "epochs=100000", f"hang_timeout_seconds={HANG_SECONDS}", f"pid_dir={pids}"]
    command = [*_horovodrun(2), *interpreter("infomcr_dist", "train"), *arguments]
    job = Job(command, context.work / "horovod-stopped", _environment(site))
    job.wait_for_steps()
    os.kill(int((pids / "rank-1.pid").read_text()), signal.SIGSTOP)
    return reported("Horovod, one of two ranks stopped by SIGSTOP", job)
