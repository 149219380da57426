"""What tests share: a small data set, and real jobs of every engine that is installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
WORKERS = ROOT / "tests" / "workers"


ENGINES = [
    engine
    for engine in ("horovod", "torch")
    if os.environ.get("ENGINE") in (None, "horovod", engine) and importlib.util.find_spec(engine)
]
"""Those installed, and with ENGINE=torch torch alone. The first is that of tests to which they are alike."""
needs_horovod = pytest.mark.skipif("horovod" not in ENGINES, reason="no Horovod: make test, without ENGINE=torch")


def of_engine(engine: str) -> str:
    """The engine, or the one that is installed."""
    return engine if engine in ENGINES else ENGINES[0]


def launcher(engine: str, workers: int) -> list[str]:
    """The beginning of a command on so many workers of this machine."""
    programs = Path(sys.executable).parent
    if engine == "horovod":
        return [str(programs / "horovodrun"), "-np", str(workers)]
    return [str(programs / "torchrun"), "--standalone", "--nproc-per-node", str(workers), "--no-python"]


def exit_code(engine: str, code: int) -> int:
    """What the launcher ends with where a worker ends with this code."""
    return code if engine == "horovod" else min(code, 1)


def start(
    workers: int, *command: str, cwd: Path, engine: str = ENGINES[0], options: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start a command on so many workers of this machine, as a user would; ``options`` are the launcher's."""
    first, *more = launcher(engine, workers)
    environment = os.environ | {"PATH": f"{Path(first).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [first, *options, *more, *command],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def launch(
    workers: int,
    *command: str,
    cwd: Path,
    engine: str = ENGINES[0],
    options: tuple[str, ...] = (),
    timeout: int = 240,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; the test fails if there is none in time."""
    with start(workers, *command, cwd=cwd, engine=engine, options=options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its workers
            output, errors = process.communicate(timeout=30)
            pytest.fail(f"no end after {timeout} s:\n{output}\n{errors}")
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def shared_data(name: str) -> Path:
    """A development data set; its test is skipped where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the project (../shared/data)")
    return path


@pytest.fixture(scope="session")
def debian_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Gives a program: the one of the PATH, or of Debian's package, unpacked without root."""

    def find(program: str, package: str) -> Path:
        if found := shutil.which(program):
            return Path(found)
        folder = tmp_path_factory.getbasetemp() / package
        if not folder.exists():
            folder.mkdir()
            lists = ["-o", f"Dir::State={folder}", "-o", f"Dir::Cache={folder}", "-o", "Debug::NoLocking=1"]
            for command in (["apt-get", "-qq", "download", package], ["apt-get", "-qq", *lists, "update"],
                            ["apt-get", "-qq", *lists, "download", package]):  # fmt: skip
                if not list(folder.glob("*.deb")):
                    subprocess.run(command, cwd=folder, capture_output=True, check=False)
            for archive in folder.glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        if not (folder / "usr" / "bin" / program).exists():
            pytest.skip(f"{program} is neither installed nor to be had from Debian's package {package}")
        return folder / "usr" / "bin" / program

    return find


@pytest.fixture(scope="session")
def promtool(debian_program: Callable[[str, str], Path]) -> Path:
    """Prometheus' checker of metrics, rules and configurations."""
    return debian_program("promtool", "prometheus")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 6 classes: 260 training and 70 test images of 16 × 16, of class-dependent stripes."""
    from PIL import Image

    root = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    for split, count in (("train", 260), ("test", 70)):
        for i in range(count):
            label = i % 6
            folder = root / "source" / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            stripes = 60 * np.sin(np.arange(16) * (label + 1) / 2.5 + random.uniform(0, 6))
            pixels = 128 + stripes[None, :, None] + random.normal(0, 25, (16, 16, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    command = [sys.executable, "-m", "pipelines.prepare", str(root / "source"), str(root / "data")]
    subprocess.run([*command, "size=16", "shard_size=100"], cwd=ROOT, check=True, capture_output=True)
    shutil.rmtree(root / "source")
    return root / "data"
