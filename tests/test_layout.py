"""The direction of imports, read from the syntax trees (CONTRIBUTING.md has the table)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "functional": set(),
    "regularizer": {"functional"},
    "gram": {"functional"},
    "fisher": {"functional", "gram"},
    "models": {"models"},
    "config": set(),
    "options": set(),
    "schedules": {"config"},
    "budget": set(),
    "world": set(),
    "watchdog": set(),
    "checkpoint": set(),
    "results": set(),
    "telemetry": {"checkpoint", "config"},
    "evaluate": {"config", "fisher", "functional", "world"},
    "run": {"budget", "checkpoint", "config", "models", "options", "schedules", "telemetry", "world"},
    "grid": {"checkpoint", "config", "options", "results"},
    "jobs": {"checkpoint", "config", "grid", "models", "options", "run", "world"},
    "__init__": {"regularizer"},
}
COMMANDS = {"train", "measure", "study", "report", "doctor"}


def imported(path: Path) -> set[str]:
    """Full names of the modules and names a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


FILES = sorted((ROOT / "infomcr_dist").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT / "infomcr_dist").with_suffix("").parts
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("infomcr_dist.")}
    modules = {p.stem for p in (ROOT / "infomcr_dist").iterdir()}
    ours &= modules
    assert not ours & COMMANDS, "nothing imports a command"
    if parts[0] not in COMMANDS:
        assert ours <= MAY_IMPORT[parts[0]]


def test_horovod_is_imported_in_one_file() -> None:
    users = [path for path in FILES + sorted((ROOT / "pipelines").rglob("*.py")) if any(
        name.split(".")[0] == "horovod" for name in imported(path))]  # fmt: skip
    assert users == [ROOT / "infomcr_dist" / "world.py"]


def test_pipelines_import_nothing_of_the_trainer() -> None:
    for path in (ROOT / "pipelines").rglob("*.py"):
        assert not any(name.split(".")[0] == "infomcr_dist" for name in imported(path)), path
