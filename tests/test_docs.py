"""The documentation: its commands run, its links resolve, what it names exists, and the site builds without a warning.

Marks follow the language of a block: ``sh`` is run here, ``sh test: FILE`` by that test, ``sh not run: REASON`` not at
all, and the page shows the reason. ``yaml file: NAME`` is saved under that name for the commands after it.
"""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import pytest
import torch
from data_sets import make_folder
from torch.nn.functional import cross_entropy

from infomcr_dist import regularized_backward
from infomcr_dist.cli import COMMANDS
from infomcr_dist.config import Config, TelemetrySettings
from infomcr_dist.models import MODELS
from infomcr_dist.telemetry import _GAUGES, _Prometheus
from pipelines import LoaderConfig, Sampler
from pipelines.command import shipped_names
from pipelines.options import check_name, describe

ROOT = Path(__file__).parent.parent
OURS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INCLUDED = [
    ROOT / name for name in ("CONTRIBUTING.md", "launch/README.md", "k8s/README.md", "k8s/monitoring/RUNBOOK.md")
]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in OURS + INCLUDED}
FIRST = "docs/tutorial.md"
"""Makes the data set and the runs that the commands of the other pages take."""


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    mark: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = re.findall(r"^```([^\s`]*)[ ]?([^\n]*)\n(.*?)^```$", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return [Block(*match) for match in found]


def code(page: str) -> Iterator[str]:
    """What stands in a page as code, but for tables of old names: lines of blocks, and spans within the text."""
    for block in blocks(page):
        if not block.language.startswith("{"):
            yield from block.text.replace("\\\n", " ").splitlines()
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for line in text.splitlines():
        if line.startswith("    "):
            yield line
        yield from re.findall(r"`([^`\n]+)`", line)


def commands(page: str) -> Iterator[str]:
    """The commands of ours within the code of a page, without what starts them."""
    for line in code(page):
        for part in re.split(r"&&|\||#|;|  +", line.strip()):
            match = re.search(r"\binfomcr (\w+\b.*)|python -m (infomcr_dist|pipelines)\.(\w+\b.*)", part)
            if match:
                yield match[1] or match[3]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    folders = "benchmarks|docs|infomcr_dist|k8s|launch|pipelines|tests"
    for line in code(page):
        for name in re.findall(rf"(?<![\w./:-])((?:{folders})/[\w./-]+)", line):
            built = name.startswith("docs/_build/")  # by make docs
            assert built or (ROOT / name).exists(), f"{name} in: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page: str) -> None:
    sections = {
        setting.name.partition(".")[0] for setting in describe(COMMANDS["train"].settings_type()) if "." in setting.name
    }
    for line in code(page):
        if " is now " in line:
            continue
        old = [name for name in Config.RENAMED if re.search(rf"(?<![\w.]){re.escape(name)}\b", line)]
        assert not old, f"{old} in: {line}"
        for name in re.findall(rf"(?<![\w./-])((?:{'|'.join(sorted(sections))})\.[a-z_0-9]+)\b(?!\()", line):
            check_name(COMMANDS["train"].settings_type(), name)
    for command in commands(page):
        name, *words = command.split()
        assert name in COMMANDS, command
        for word in words:
            key, equals, _ = word.lstrip("-").partition("=")
            if equals and not key.isupper():
                check_name(COMMANDS[name].settings_type(), key)


@pytest.mark.parametrize("page", PAGES)
def test_a_key_with_a_value_is_known(page: str) -> None:
    known = {setting.name for command in COMMANDS.values() for setting in describe(command.settings_type())}
    known |= {field.name for kind in (LoaderConfig, Sampler) for field in fields(kind)}
    known |= set(inspect.signature(regularized_backward).parameters)
    known |= set(inspect.signature(MODELS["cnn"]).parameters)
    known |= {"key", "slots", "source"}  # of "key=value", of a file of hosts, of a benchmark
    known |= {"reduction", "static_graph", "find_unused_parameters", "mixed_precision"}  # torch's own
    for line in code(page):
        if script := re.search(r"benchmarks/\w+\.py", line):
            options = set(re.findall(r"^    (\w+):", (ROOT / script[0]).read_text(), flags=re.MULTILINE))
            given = re.findall(r" (\w+)=", line)
            assert set(given) <= options, line
            continue
        python = r"\s*(import|from|print|\w+ = |for )|\S*\w\("  # a statement, or a call
        if re.match(rf"{python}|\s*(kubectl|docker|mpirun|grep)", line) or "{" in line:
            continue
        for key in re.findall(r"(?<![\w.$,-])([a-z_][a-z_0-9.]*)=", line):
            free = ("grid.", "base.", "measure.", "optimizer.arguments.")
            assert key in known or key.startswith(free), f"{key} in: {line}"


def test_messages_in_the_questions_are_the_code_s() -> None:
    files = [path for name in ("infomcr_dist", "pipelines", "launch") for path in (ROOT / name).rglob("*.[ps][yh]")]
    source = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in files)
    for row in PAGES["docs/faq.md"].splitlines():
        message = re.match(r"\| `([^`]+)`", row)
        for part in re.split(r"…|\d+|^srun \(SLURM_NTASKS=2\)", message[1]) if message else ():
            text = part.strip(" :;'")
            assert text in source, f"{text} in: {row}"


def metric_names() -> set[str]:
    """What an endpoint serves, from the registry itself."""
    telemetry = _Prometheus(1, torch.device("cpu"), {"rank": "0", "local_rank": "0"}, {"model": "cnn"})
    for name in _GAUGES:
        telemetry._gauge(name)
    names = set()
    for family in telemetry.registry.collect():
        names.add(family.name + ("_total" if family.type == "counter" else ""))
    return names | {"infomcr_gpu_memory_bytes"}


@pytest.mark.parametrize("page", PAGES)
def test_metrics_exist(page: str) -> None:
    names = metric_names()
    for line in code(page):
        for name in re.findall(r"(?<![\w./:-])infomcr_(?!dist\b)[a-z_0-9]+", line):
            assert name in names or re.sub(r"_(bucket|sum|count)$", "", name) in names, name


def test_shipped_recipes_and_studies_are_listed() -> None:
    for package, page in (("recipes", "docs/recipes.md"), ("studies", "docs/studies.md")):
        for name in shipped_names(f"infomcr_dist.{package}"):
            assert f"`{name}`" in PAGES[page], name


def test_horovod_s_patches_are_listed() -> None:
    listed = re.findall(r"^\| `(\d{4}-[\w-]+)` \|", PAGES["docs/horovod.md"], flags=re.MULTILINE)
    assert listed == sorted(path.stem for path in (ROOT / "launch" / "horovod").glob("*.patch"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(("README", "docs/"))])
def test_every_command_is_run_or_marked(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^    +(infomcr|horovodrun|python|make|launch/)", text, flags=re.MULTILINE), "use a fence"
    for block in blocks(page):
        if re.search(r"^ *(infomcr|horovodrun|python|make|launch/)", block.text, flags=re.MULTILINE):
            assert block.language in ("sh", "text", "python"), block.text
        if block.mark and not block.language.startswith("{"):
            kind, _, what = block.mark.partition(": ")
            assert (block.language, kind) in (
                ("sh", "test"),
                ("sh", "not run"),
                ("python", "not run"),
                ("yaml", "file"),
            ), block.mark
            assert what
            if kind == "test":
                assert any(f"{word}" in (ROOT / what).read_text() for word in block.text.split()[:2]), block.mark


def run_page(page: str, folder: Path) -> None:
    """Run the blocks of a page that have no mark, in their order."""
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for block in blocks(page):
        if block.mark.startswith("file: "):
            no_port = "telemetry: {port: null}\n" if "\ngrid:" not in block.text else ""  # others may have the port
            (folder / block.mark.removeprefix("file: ")).write_text(block.text + no_port)
        program = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}.get(block.language)
        if program is None or block.mark or (page == "README.md" and block.language == "python"):
            continue
        core = str(min(os.sched_getaffinity(0)))  # on a busy machine, threads on several would wait for each other
        ended = subprocess.run(
            ["taskset", "--cpu-list", core, *program, block.text],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, f"{page}:\n{block.text}\n{ended.stdout[-1000:]}\n{ended.stderr[-1000:]}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, and with what the tutorial makes of them."""
    folder = tmp_path_factory.mktemp("docs")
    make_folder(folder / "photos", per_class=24, height=40, width=48)
    (folder / "bin").mkdir()
    program = folder / "bin" / "infomcr"
    main = "if __name__ == '__main__':\n    raise SystemExit(main())\n"
    program.write_text(f"#!{sys.executable}\nfrom infomcr_dist.cli import main\n{main}")
    program.chmod(0o755)
    run_page(FIRST, folder)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(("README", "docs/"))])
def test_commands_run(page: str, workspace: Path) -> None:
    if page != FIRST:
        run_page(page, workspace)


def test_the_tutorial_leaves_what_it_promises(workspace: Path) -> None:
    for name in ("photos.png", "report.html", "report.png", "runs/regularized/records.jsonl"):
        assert (workspace / name).exists(), name


def test_the_readme_s_loop_trains() -> None:
    (block,) = [block for block in blocks("README.md") if block.language == "python"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images, labels = torch.randn(32, 3, 2, 2), torch.randint(3, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"model": model, "criterion": cross_entropy, "loader": [(images, labels)] * 20, "optimizer": optimizer}
    before = cross_entropy(model(images), labels).item()
    exec(compile(block.text, "README.md", "exec"), names)
    assert cross_entropy(model(images), labels).item() < before


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.fixture(scope="module")
def configuration() -> ModuleType:
    """docs/conf.py."""
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("documentation_configuration", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_metrics_is_complete(configuration: ModuleType) -> None:
    assert {name for name, _, _, _ in configuration.metrics()} == metric_names()
    assert TelemetrySettings().port == 9500  # as monitoring.md has it


def test_the_site_builds_without_a_warning(tmp_path: Path, configuration: ModuleType) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, ROOT / "docs", tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    page = (tmp_path / "settings.html").read_text(encoding="utf-8")
    for name, command_ in COMMANDS.items():
        for setting in describe(command_.settings_type()):
            of_train = name in ("doctor", "plan") and setting.name not in ("gpus", "output")
            shown = "train" if of_train else name
            assert f'id="{shown}-{setting.name}"' in page
    assert 'src="http' not in page, "nothing is loaded from elsewhere"
    concepts = (tmp_path / "concepts.html").read_text(encoding="utf-8")
    assert "<math" in concepts
    assert "not run by the tests: " in (tmp_path / "launch.html").read_text(encoding="utf-8")
