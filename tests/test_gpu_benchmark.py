"""benchmarks/gpu.py where there is no GPU: its checks at tiny sizes, and what it makes of one that fails."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parent.parent


def rows(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "gpu.json").read_text())["rows"]
    table = (output / "gpu.md").read_text().splitlines()
    assert len(table) == 2 + len(found)
    assert all(line.count("|") == 6 for line in table)
    return found


def test_the_checks_run_without_a_gpu(tmp_path: Path) -> None:
    names = ["card", "exactness", "steps-resnet20"]
    command = [sys.executable, "benchmarks/gpu.py", "device=cpu", f"only={','.join(names)}", f"output={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = rows(tmp_path)
    assert list(dict.fromkeys(row["check"] for row in found)) == names
    (float32,) = (row for row in found if row["name"].startswith("fp32: error of g"))
    assert float32["met"] is True
    steps = {row["name"].partition(": ")[2]: row["figures"] for row in found if row["check"] == "steps-resnet20"}
    assert all("ms" in figures for figures in steps.values()), steps
    assert len(steps["fused, eager, bf16"]["alike plain"]) == 1


def test_a_check_that_fails_costs_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {
        "crashes": gpu.Check("absent:absent", 60),
        "hangs": gpu.Check("steps:resnet20", 0.1, least=0),  # torch alone takes longer to import
        "gpu": gpu.Check("card:card", 60, needs_gpu=True),
        "later": gpu.Check("card:card", 900, least=800),
        "card": gpu.Check("card:card", 60),
    }
    monkeypatch.setattr(gpu, "CHECKS", checks)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert gpu.main(["device=cpu"]) == 1
    found = rows(tmp_path / "out")
    said = {row["check"]: row["found"] for row in found if row["check"] != "card"}
    assert said["crashes"] == "exit code 1: ModuleNotFoundError: No module named 'gpu_checks.absent'"
    assert said["hangs"].startswith("killed after 0 s")
    assert said["gpu"] == "skipped: needs a GPU"
    assert said["later"] == "skipped: of the 8 minutes too little is left"
    assert sum(row["check"] == "card" and row["name"].startswith("matmul") for row in found) == 4


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "device=cpu", "only=cards", f"output={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert re.fullmatch(r"gpu: only must hold names of card, .*, got cards\n", ended.stderr)


def test_the_wheels_that_are_missing_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "KIT", tmp_path)
    for name, version in (("made_up", "1.0"), ("numpy", "0.1")):
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    gpu.install_kit(tmp_path / "site")
    assert sorted(os.listdir(tmp_path / "site")) == ["made_up", "made_up-1.0.dist-info"]


def test_the_kit_is_of_pinned_versions() -> None:
    script = (ROOT / "launch" / "gpu_kit.sh").read_text()
    names = " ".join(re.findall(r"^(?:small|large)=\((.*)\)$", script, re.MULTILINE)).split()
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert len(names) > 20
    assert {name.lower() for name in names} <= pinned
