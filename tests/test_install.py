"""The wheel, installed without the source tree: the console script, the shipped recipes, a run from any directory."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from data_sets import make_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("infomcr_dist", "pipelines"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"], check=True
    )
    shutil.rmtree(folder / "source")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(site: Path, cwd: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command in another directory, with nothing of the source tree on Python's path."""
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def infomcr(site: Path, cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed console script."""
    return run(site, cwd, site / "bin" / "infomcr", *arguments)


def test_the_wheel_is_what_is_imported(site: Path, tmp_path: Path) -> None:
    script = (
        "import infomcr_dist, pipelines; print(infomcr_dist.__file__, pipelines.__file__, infomcr_dist.__version__)"
    )
    output = run(site, tmp_path, sys.executable, "-c", script).stdout
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert output.split() == [f"{site}/infomcr_dist/__init__.py", f"{site}/pipelines/__init__.py", version]
    assert infomcr(site, tmp_path, "--version").stdout == f"infomcr {version}\n"


def test_it_holds_what_git_holds(site: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "infomcr_dist", "pipelines"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {name for name in tracked if Path(name).suffix in (".py", ".yaml", ".typed") and (ROOT / name).exists()}
    assert expected
    assert {name for name in expected if not (site / name).exists()} == set()


def test_help(site: Path, tmp_path: Path) -> None:
    result = infomcr(site, tmp_path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "prepare" in result.stdout
    result = infomcr(site, tmp_path, "train", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "regularizer.sub_batch_size=int|null" in result.stdout


def test_a_shipped_study_is_planned_from_any_directory(site: Path, tmp_path: Path) -> None:
    result = infomcr(site, tmp_path, "study", "table_1", "scaled=true", "plan=true")
    assert result.returncode == 0, result.stderr
    assert "32 runs" in result.stdout


def test_images_become_a_model_from_any_directory(site: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "images", per_class=8, height=16, width=16)
    result = infomcr(site, tmp_path, "prepare", "images", "data", "size=16", "test_fraction=0.25", "processes=2")
    assert result.returncode == 0, result.stderr
    assert infomcr(site, tmp_path, "verify", "data").returncode == 0
    # The demo's recipe, but for its length and its data set.
    result = infomcr(
        site, tmp_path, "train", "data.path=data", "epochs=1", "schedule.milestones=[0.5]", "--data.batch_size=9",
        "--regularizer.sub_batch_size", "3", "metric.trials=1", "metric.samples=4", "metric.images=16",
        "telemetry.port=null", "run_dir=run",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in records if record["kind"] == "step"] == ["plain", "regularized"]
    result = infomcr(site, tmp_path, "report", "run")
    assert result.returncode == 0, result.stderr
    assert "<table>" in (tmp_path / "report.html").read_text()
