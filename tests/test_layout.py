"""The direction of imports: those of the syntax trees against the table in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("pipelines", "infomcr_dist") for path in (ROOT / package).rglob("*.py"))
COMMANDS = {"train", "measure", "study", "report", "doctor", "plan"}


def table() -> dict[str, set[str]]:
    """What each module of the table may import: names, of the rows above it, or "all above"."""
    allowed: dict[str, set[str]] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if not re.match(r"\| `(pipelines|infomcr_dist)[\w.]*` \|", line):
            continue
        name, _, may_import = (cell.strip() for cell in line.strip("|").split("|"))
        name, names = name.strip("`"), set(re.findall(r"`([\w.]+)`", may_import))
        assert name not in allowed, f"{name} stands twice"
        if may_import.startswith("all above"):
            names = set(allowed) - names
        assert names <= set(allowed), f"{name} may import {names - set(allowed)}, not above it: a circle"
        allowed[name] = names
    return allowed


TABLE = table()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def row_of(module: str) -> str | None:
    """The row a module belongs to: its own, or that of a package above it."""
    while module and module not in TABLE:
        module = module.rpartition(".")[0]
    return module or None


def imported(path: Path) -> set[str]:
    """Full names of the modules and names a file imports."""
    names = set()
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rows_imported(path: Path) -> set[str]:
    rows = {row_of(name) for name in imported(path) if name.split(".")[0] in ("pipelines", "infomcr_dist")}
    return {row for row in rows if row is not None}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_those_of_the_table(path: Path) -> None:
    row = row_of(module_of(path))
    assert row is not None, f"{path} has no row in CONTRIBUTING.md"
    assert rows_imported(path) - {row} <= TABLE[row]


def test_every_row_is_a_module() -> None:
    modules = {module_of(path) for path in FILES}
    assert set(TABLE) <= modules


def test_nothing_imports_a_command() -> None:
    for path in FILES:
        parts = module_of(path).split(".")
        if len(parts) > 1 and parts[1] in COMMANDS | {"__main__"}:
            continue
        for name in imported(path):
            words = name.split(".")
            assert words[0] != "infomcr_dist" or len(words) < 2 or words[1] not in COMMANDS, f"{path} imports {name}"


@pytest.mark.parametrize(
    ("library", "module"),
    [
        ("horovod", "infomcr_dist/engines/horovod.py"),
        ("torch.distributed", "infomcr_dist/engines/torch_distributed.py"),
    ],
)
def test_an_engine_s_library_is_imported_in_one_file(library: str, module: str) -> None:
    users = [path for path in FILES if any(f"{name}.".startswith(f"{library}.") for name in imported(path))]
    assert users == [ROOT / module]


def test_pipelines_import_nothing_of_the_trainer() -> None:
    for path in (ROOT / "pipelines").rglob("*.py"):
        assert not any(name.split(".")[0] == "infomcr_dist" for name in imported(path)), path


def test_no_file_is_longer_than_450_lines_without_a_reason() -> None:
    reasons = set(
        re.findall(r"^- `([\w/.]+\.py)` has more than 450 lines", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    )
    long = {str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > 450}
    assert long == reasons
