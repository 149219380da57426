"""Checks on a GPU what no CPU can show: exactness, speed, engines and faults, a row each, in one command.

    make gpu-kit            # where there is a network: the wheels that a GPU machine may lack, into .gpu-kit/
    make check-gpu          # on the GPU machine: torch 2.9 or later, neither make setup nor a network
    python3 benchmarks/gpu.py only=card,steps-resnet20 minutes=4
    python3 benchmarks/gpu.py device=cpu

Every check is a process of its own with a time limit: one that crashes or hangs costs its own rows. A check for which
no time is left is skipped. The table is printed row by row, and written with all figures to gpu.md and gpu.json in
`output`, again after each check. On a CPU the checks run at sizes that show that they work, and nothing else.
"""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).parent.parent
KIT = ROOT / ".gpu-kit"
_LEFT_FOR_THE_END = 3.0


@dataclass(frozen=True)
class Settings:
    """What is checked, and where."""

    device: Literal["cuda", "cpu"] = "cuda"
    only: str = ""
    minutes: float = 8.0
    output: str = ""


class Check(NamedTuple):
    """A function of `gpu_checks`, the seconds after which it is killed, those below which it is not worth starting, and
    whether it needs a GPU."""

    function: str
    seconds: float
    least: float = 10
    needs_gpu: bool = False


CHECKS = {
    "card": Check("card:card", 40),
    "exactness": Check("exactness:exactness", 60),
    "length": Check("exactness:length", 40),
    "steps-resnet20": Check("steps:resnet20", 75),
    "steps-128": Check("steps:wrn_128", 75),
    "steps-256": Check("steps:wrn_256", 90),
    "gamma": Check("steps:gamma", 45),
    "bitwise": Check("runs:bitwise", 75),
    "epoch": Check("runs:epoch", 75),
    "torchrun": Check("runs:torchrun", 45),
    "stopped": Check("runs:stopped", 60),
    "hang": Check("runs:hang", 45, needs_gpu=True),
    "loaders": Check("runs:loaders", 60),
    "recipe": Check("runs:recipe", 75),
    "steps-64": Check("steps:wrn_64", 75),
    "deterministic": Check("steps:deterministic", 60),
    "compiled": Check("steps:compiled", 150, least=60),
    "horovod": Check("horovod_build:horovod", 420, least=200, needs_gpu=True),
}
"""In the order of their weight: what no time is left for is skipped."""


def main(arguments: list[str]) -> int:
    """Run the checks; the exit code is 1 if one of them failed, whatever it has found."""
    with tempfile.TemporaryDirectory(prefix="check-gpu-", ignore_cleanup_errors=True) as folder:
        site = Path(folder) / "site"
        install_kit(site)
        sys.path[:0] = [str(ROOT), str(site)]
        from pipelines.options import load

        settings = load(Settings, None, arguments)
        names = [name for name in settings.only.split(",") if name] or list(CHECKS)
        if unknown := [name for name in names if name not in CHECKS]:
            raise ValueError(f"only must hold names of {', '.join(CHECKS)}, got {unknown[0]}")
        output = Path(settings.output or os.environ.get("OUT") or ".")
        output.mkdir(parents=True, exist_ok=True)
        return run(settings, [name for name in CHECKS if name in names], Path(folder), output)


def install_kit(site: Path) -> None:
    """Unpack the wheels of the kit that this Python lacks."""
    lacking = [str(wheel) for wheel in sorted(KIT.glob("*.whl")) if not _installed(wheel.name.partition("-")[0])]
    if lacking:
        options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site))
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *lacking], check=True)


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run(settings: Settings, names: list[str], folder: Path, output: Path) -> int:
    """Run checks one after the other; print and write what they find."""
    began, failed = time.monotonic(), False
    results: list[dict[str, Any]] = []
    print("| check | row | found | goal | met |\n|---|---|---|---|---|", flush=True)
    for name in names:
        left = 60 * settings.minutes - (time.monotonic() - began) - _LEFT_FOR_THE_END
        check, started = CHECKS[name], time.monotonic()
        rows: list[dict[str, Any]] = []
        problem: str | None
        if check.needs_gpu and settings.device == "cpu":
            problem = "skipped: needs a GPU"
        elif left < min(check.least, check.seconds):
            problem = f"skipped: of the {settings.minutes:g} minutes too little is left"
        else:
            rows, problem = run_check(name, min(check.seconds, left), settings, folder)
            failed = failed or problem is not None
        if problem is not None:
            rows.append({"name": "", "found": problem, "goal": "", "met": None, "figures": {}})
        for row in rows:
            results.append({"check": name, "seconds": round(time.monotonic() - started, 1), **row})
            print(line(results[-1]), flush=True)
        write(output, settings, results)
    return int(failed)


def run_check(name: str, seconds: float, settings: Settings, folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a check, and what went wrong."""
    check, rows, log = CHECKS[name], folder / f"{name}.jsonl", folder / f"{name}.log"
    size = "tiny" if settings.device == "cpu" else "full"
    work = folder / "work"
    work.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "gpu_checks", check.function]
    command += [settings.device, size, str(work), str(seconds), str(rows)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(folder / "site")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "KINETO_LOG_LEVEL": "99"}
    if settings.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    found = [json.loads(text) for text in rows.read_text().splitlines()] if rows.exists() else []
    if code == 0:
        return found, None
    newest = max([log, *work.rglob("log")], key=lambda path: path.stat().st_mtime)  # its own, or that of a run it made
    for file_path in {log, newest}:
        print(file_path.read_text(errors="replace")[-3000:], file=sys.stderr, flush=True)
    last = next(
        (text for text in reversed(newest.read_text(errors="replace").splitlines()) if text.strip()), "no output"
    )
    return found, f"killed after {seconds:.0f} s: {last}" if code is None else f"exit code {code}: {last}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a check: its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def line(row: dict[str, Any]) -> str:
    """A row as Markdown."""
    met = {True: "yes", False: "**no**", None: ""}[row["met"]]
    cells = (row["check"], row["name"], row["found"], row["goal"], met)
    return "| " + " | ".join(" ".join(str(cell).replace("|", "/").split()) for cell in cells) + " |"


def write(output: Path, settings: Settings, results: list[dict[str, Any]]) -> None:
    """The table and the figures so far."""
    lines = ["| check | row | found | goal | met |", "|---|---|---|---|---|", *map(line, results)]
    (output / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    software = dict(_versions())
    content = {"arguments": vars(settings), "software": software, "rows": results}
    (output / "gpu.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", sys.version.split()[0]
    for name in ("torch", "triton", "numpy", "opencv-python-headless", "nvidia-dali-cuda130"):
        if _installed(name):
            yield name, importlib.metadata.version(name)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as mistake:
        print(f"gpu: {mistake}", file=sys.stderr)
        sys.exit(2)
