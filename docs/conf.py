"""How Sphinx builds these pages: ``make docs``. The tables of settings and metrics are made here, from the code."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from infomcr_dist import telemetry  # noqa: E402
from infomcr_dist.cli import COMMANDS  # noqa: E402
from pipelines.options import describe, describe_sections  # noqa: E402

project = "infomcr_dist"
author = "the infomcr_dist authors"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # included pages begin at a lower level
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
default_role = "code"

html_theme = "furo"
html_title = f"infomcr_dist {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def metrics() -> Iterator[tuple[str, str, str, str]]:
    """Name, labels, kind and meaning of every metric that an endpoint serves."""
    info = "always 1, for joins"
    yield "infomcr_run_info", "model, recipe, …", "gauge", f"What the run is, as labels; {info}"
    yield "infomcr_rank_info", "rank, local_rank", "gauge", f"Which rank this endpoint is, as labels; {info}"
    yield (
        "infomcr_step_duration_seconds",
        "phase=plain|regularized",
        "histogram",
        "Wall time of one update, waits included",
    )
    for name, text in telemetry._HISTOGRAMS.items():
        yield f"infomcr_{name}", "", "histogram", text
    for name, text in telemetry._COUNTERS.items():
        yield f"infomcr_{name}_total", "", "counter", text
    for name, (text, label, values) in telemetry._LABELLED_COUNTERS.items():
        yield f"infomcr_{name}_total", f"{label}={'|'.join(values)}", "counter", text
    for name, text in telemetry._ERRORS.items():
        yield f"infomcr_{name}", "split=test|train", "gauge", text
    for name, text in telemetry._GAUGES.items():
        yield f"infomcr_{name}", "", "gauge", text
    yield "infomcr_gpu_memory_bytes", "", "gauge", "Memory that torch holds on this rank's GPU; on GPUs only"


class SettingsTable(SphinxDirective):
    """Every setting of a command, with its type, default and sentence."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = self.arguments[0]
        settings_type = COMMANDS[command].settings_type()
        sentences = describe_sections(settings_type)
        found: list[nodes.Node] = []
        shown = describe(settings_type)
        if command == "plan":  # the rest are those of train
            shown = [setting for setting in shown if setting not in describe(COMMANDS["train"].settings_type())]
        for section, members in groupby(shown, key=lambda setting: setting.name.rpartition(".")[0]):
            rows = nodes.definition_list(classes=["settings"])
            for setting in members:
                default = "required" if setting.default is None else setting.default or '""'
                term = nodes.term("", "", nodes.strong("", "", nodes.literal("", setting.name)), nodes.Text(" = "))
                term += nodes.literal("", default)
                term["ids"].append(f"{command}-{setting.name}")
                term += nodes.inline("", setting.type.replace("|", " | "), classes=["type"])
                definition = nodes.definition("", nodes.paragraph("", setting.sentence))
                rows += nodes.definition_list_item("", term, definition)
            if section:
                title = nodes.title(section, section)
                found.append(
                    nodes.section(
                        "",
                        title,
                        nodes.paragraph("", sentences[section]),
                        rows,
                        ids=[f"{command}-{section}"],
                        names=[f"{command} {section}"],
                    )
                )
            else:
                found.append(rows)
        return found


class MetricsTable(SphinxDirective):
    """Every Prometheus metric."""

    def run(self) -> list[nodes.Node]:
        rows = nodes.definition_list(classes=["settings"])
        for name, labels, kind, text in metrics():
            term = nodes.term("", "", nodes.strong("", "", nodes.literal("", name)), ids=[name])
            if labels:
                term += nodes.literal("", f"{{{labels}}}")
            term += nodes.inline("", kind, classes=["type"])
            rows += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", f"{text}.")))
        return [rows]


def mathml_inline(translator: Any, node: nodes.math) -> None:
    """Formulas as MathML, which browsers draw themselves: no script, no font and no network is needed."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def mathml_block(translator: Any, node: nodes.math_block) -> None:
    """A formula on a line of its own, as MathML."""
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def mark_commands(text: str) -> str:
    """Show the reason under which a block of commands is not run by the tests."""
    text = re.sub(
        r"^```sh not run: (.+)$", r"```{code-block} sh\n:caption: " + r"not run by the tests: \1\n", text, flags=re.M
    )
    return re.sub(r"^```sh test: .+$", "```sh", text, flags=re.M)


PAGES = {
    "../k8s/README.md": "kubernetes.md",
    "../../k8s/README.md": "kubernetes.md",
    "docs/experiments.md": "experiments.md",
    "docs/library.md": "library.md",
    "k8s/monitoring/RUNBOOK.md": "runbook.md",
}


def page_links(text: str) -> str:
    """In a page included from elsewhere in the repository: links to pages here, and plain names for all other files."""

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        return f"[{label}]({PAGES[target]})" if target in PAGES else label

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def on_source_read(app: Sphinx, page: str, content: list[str]) -> None:
    """Sphinx has read a page."""
    content[0] = mark_commands(content[0])


def on_include_read(app: Sphinx, path: Path, page: str, content: list[str]) -> None:
    """Sphinx has read a file that a page includes."""
    content[0] = page_links(mark_commands(content[0]))


def plain_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with names in backticks: |g| is a norm, and x_ a name, not markup."""
    for number, line in enumerate(lines):
        outside = re.split(r"(`+[^`]*`+)", line)
        outside[::2] = [re.sub(r"([|*_])", r"\\\1", part) for part in outside[::2]]
        lines[number] = "".join(outside)


def skip_fields(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a named tuple are in its signature."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("settings", SettingsTable)
    app.add_directive("metrics", MetricsTable)
    app.add_html_math_renderer("mathml", (mathml_inline, None), (mathml_block, None))
    app.connect("source-read", on_source_read)
    app.connect("include-read", on_include_read)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)  # before napoleon adds markup
