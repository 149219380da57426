"""The report of real records: what it shows is what they hold, and it needs nothing else."""

import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Rectangle

from infomcr_dist import records
from infomcr_dist.records import (
    EpochRecord,
    EvaluationRecord,
    MetricRecord,
    Record,
    RecordWriter,
    RegularizerOnRecord,
    StepRecord,
)
from infomcr_dist.report import COLORS, RunRecords, colors_of, draw, main, names_of, read

STEP = StepRecord(
    step=1, epoch=1, phase="plain", loss=2.0, penalty=None, beta=None, num_penalized=None, gradient_norm=1.0,
    finite=True, learning_rate=0.1, samples=32, global_samples=32, world_size=1, data_errors=0,
    step_duration_seconds=0.2, data_wait_seconds=0.01, gradient_seconds=0.15, allreduce_wait_seconds=0.02,
    update_seconds=0.02, penalty_duration_seconds=None, allreduce_bytes=0,
)  # fmt: skip
REGULARIZED = replace(
    STEP, phase="regularized", penalty=1e-4, beta=10.0, num_penalized=2, step_duration_seconds=0.3,
    penalty_duration_seconds=0.1,
)  # fmt: skip


def make_run(directory: Path, momentum: float, steps: int = 40, more: tuple[Record, ...] = ()) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text(
        f"model: resnet20\noptimizer: {{momentum: {momentum}, learning_rate: 0.1}}\n"
    )
    found: list[Record] = []
    for step in range(1, steps + 1):
        kind = REGULARIZED if step > steps // 2 else STEP
        found.append(replace(kind, step=step, epoch=1 + (step - 1) // 10, loss=2.0 / step))
        if step == steps // 2:
            found.append(RegularizerOnRecord(step, 1 + step // 10, 0.1))
        if step % 10 == 0:
            found.append(EpochRecord(step, step // 10, step // 10, 1.0))
    for split, error in (("test", 0.25), ("train", 0.125)):
        found.append(EvaluationRecord(steps, 4, split, 0.5, error, 0.01, 100))
    found.append(MetricRecord(steps, 4, -12.34, float("nan"), 1.0, 2.0, 0.5, 10, 100, 0))
    writer = RecordWriter(directory / records.FILE)
    for record in (*found, *more):
        writer.log(record)
    writer.close()
    with (directory / records.FILE).open("a") as file:
        file.write('{"kind": "st')
    return directory


def test_the_page_shows_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "a", 0.9), make_run(tmp_path / "b<", 0.8)]
    assert main([*map(str, runs), f"output={tmp_path / 'out'}"]) == 0
    page = (tmp_path / "out.html").read_text()
    cells = [re.findall(r"<td>(.*?)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", page)]
    rows = {row[0]: row[1:] for row in cells if row}
    assert rows["test top-1 error"] == ["25.00%"] * 2
    assert rows["gap, top-1"] == ["+12.50%"] * 2
    assert rows["γ̂"] == ["-12.3"] * 2
    assert rows["plain step, median ms"] == ["200.0"] * 2
    assert rows["regularized / plain"] == ["1.50"] * 2
    assert rows["optimizer.momentum"] == ["0.9", "0.8"]
    assert "optimizer.learning_rate" not in rows, "only what differs"
    heads = re.findall(r"<th><i style='background: (.*?)'></i>(.*?)</th>", page)
    assert heads == [(COLORS[0], "a"), (COLORS[1], "b&lt;")] * 2, "names are text, not markup"
    assert page.count("<svg") == 1
    assert not re.search(r'(src|href)="(?!#)', page), "nothing is loaded from elsewhere"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_has_just_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", 0.9, steps=5)
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text("".join(lines[:7]))  # the schema, 5 steps, the switch-on
    assert main([str(run), f"output={tmp_path / 'out'}"]) == 0
    assert len(read(run).of(StepRecord)) == 5
    (run / "records.jsonl").write_text(lines[0])
    assert main([str(run), f"output={tmp_path / 'out'}"]) == 2
    assert "has no step yet" in capsys.readouterr().err


def test_what_is_not_a_number_is_not_drawn(tmp_path: Path) -> None:
    nan = float("nan")
    broken = replace(REGULARIZED, step=41, epoch=5, loss=nan, penalty=nan, gradient_norm=nan, finite=False)
    singular = MetricRecord(41, 5, nan, nan, 1.0, 2.0, 0.5, 10, 100, 10)
    run = read(make_run(tmp_path / "a", 0.9, more=(broken, singular)))
    assert run.series(StepRecord, "loss").values == [2.0 / step for step in range(1, 41)]
    assert run.series(StepRecord, "penalty").epochs == [step / 10 for step in range(21, 41)]
    assert run.series(MetricRecord, "gamma_hat") == ([4], [-12.34], [-12.34], [-12.34])
    assert len(run.series(StepRecord, "learning_rate").values) == 41


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([], "give a run directory"),
        ([str(tmp_path / "empty")], "empty is not a run directory"),
        ([str(tmp_path), "outputs=x"], "unknown setting outputs: the nearest known one is output"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


# What is drawn


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def points(axes: Axes) -> list[list[tuple[float, float]]]:
    """Of each curve, in the order of drawing."""
    return [[(float(x), float(y)) for x, y in np.asarray(line.get_xydata())] for line in axes.lines]


def spans(axes: Axes) -> list[tuple[float, float, str]]:
    """Start, end and colour of what marks the regularized phases."""
    rectangles = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [(r.get_x(), r.get_x() + r.get_width(), to_hex(r.get_facecolor())) for r in rectangles]


def legend_of(axes: Axes) -> Legend:
    legend = axes.get_legend()
    assert legend is not None
    return legend


def legend_names(figure: Figure) -> list[str]:
    texts = figure.legends[0].get_texts()
    assert not any(text.get_parse_math() for text in texts)
    return [text.get_text() for text in texts]


def test_the_curves_of_a_run_are_its_records(tmp_path: Path) -> None:
    later = MetricRecord(40, 8, -20.0, 2.5, 1.0, 2.0, 0.5, 10, 100, 0)
    figure = draw([read(make_run(tmp_path / "a", 0.9, more=(later,)))])
    axes = panels(figure)
    steps, regularized = range(1, 41), range(21, 41)
    expected: dict[str, list[list[tuple[float, float]]]] = {
        "Training loss": [[(step / 10, 2.0 / step) for step in steps]],
        "Top-1 error": [[(4, 25.0)], [(4, 12.5)]],
        "Penalty": [[(step / 10, 1e-4) for step in regularized]],
        "Metric γ̂ ± standard error": [[(4, -12.34), (8, -20.0)]],
        "Learning rate": [[(step / 10, 0.1) for step in steps]],
        "β": [[(step / 10, 10.0) for step in regularized]],
        "Step time": [
            [(step / 10, 200.0 if step <= 20 else 300.0) for step in steps],
            [(step / 10, 20.0) for step in steps],
            [(step / 10, 10.0) for step in steps],
        ],
    }
    assert axes.keys() == expected.keys()
    for title, curves in expected.items():
        assert points(axes[title]) == [[pytest.approx(point) for point in curve] for curve in curves], title
        assert axes[title].get_ylabel()
        assert [span[:2] for span in spans(axes[title])] == [(2.0, 4.0)]
        colors = [line.get_color() for line in axes[title].lines]
        assert len(set(colors)) == len(colors), "one colour a quantity"
    (errors,) = (c for c in axes["Metric γ̂ ± standard error"].collections if isinstance(c, LineCollection))
    assert [segment.tolist() for segment in errors.get_segments()] == [[[4, -12.34]] * 2, [[8, -22.5], [8, -17.5]]]
    assert [text.get_text() for text in legend_of(axes["Step time"]).get_texts()] == ["whole", "allreduce", "data"]
    assert "regularizer on" in legend_names(figure)
    assert figure.get_suptitle() == "a"


def test_of_several_runs_each_has_a_colour_and_each_quantity_a_line(tmp_path: Path) -> None:
    runs = [read(make_run(tmp_path / name, 0.9, steps)) for name, steps in (("a", 40), ("b", 20))]
    plain = [record for record in runs[0].records if not isinstance(record, RegularizerOnRecord)]
    figure = draw([*runs, RunRecords("_plain $x$", plain, {})])
    axes = panels(figure)
    for title in ("Top-1 error", "Step time"):
        lines, quantities = axes[title].lines, len(axes[title].lines) // 3
        assert [line.get_color() for line in lines] == [c for c in COLORS[:3] for _ in range(quantities)]
        styles = [line.get_linestyle() for line in lines]
        assert styles == styles[:quantities] * 3
        assert len(set(styles)) == quantities
        shown = legend_of(axes[title]).get_lines()
        assert [line.get_linestyle() for line in shown] == styles[:quantities]
        assert {line.get_color() for line in shown}.isdisjoint(COLORS)
    assert axes["Step time"].get_xlim()[1] > 4
    for panel in axes.values():
        assert spans(panel) == [(2.0, 4.0, COLORS[0].lower()), (1.0, 2.0, COLORS[1].lower())]
        top = min(patch.get_y() for patch in panel.patches if isinstance(patch, Rectangle))
        for line in panel.lines:
            heights = (panel.transData + panel.transAxes.inverted()).transform(np.asarray(line.get_xydata()))[:, 1]
            assert all(heights < top), "strips are above the curves"
    assert legend_names(figure) == ["a", "b", "_plain $x$", "strip: regularizer on"]
    figure.canvas.draw()


def test_a_panel_without_a_number_has_a_remark(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "a", 0.9))
    figure = draw([RunRecords("_$", [r for r in run.records if r.kind in ("step", "epoch") and r.step <= 20], {})])
    remarks = {title: [text.get_text() for text in axes.texts] for title, axes in panels(figure).items()}
    empty = {"Top-1 error", "Penalty", "Metric γ̂ ± standard error", "β"}
    assert remarks == {title: ["none so far"] if title in empty else [] for title in remarks}
    assert "regularizer on" not in legend_names(figure)
    figure.canvas.draw()


def test_many_steps_become_medians_with_their_spread(tmp_path: Path) -> None:
    losses = [2.0 / step for step in range(1, 601)]
    epochs, values, low, high = read(make_run(tmp_path / "a", 0.9, 600)).series(StepRecord, "loss")
    chunks = [losses[i : i + 10] for i in range(0, 600, 10)]
    assert epochs == pytest.approx([(i + 5.5) / 10 for i in range(0, 600, 10)])
    assert values == pytest.approx([statistics.median(chunk) for chunk in chunks])
    for chunk, bottom, value, top in zip(chunks, low, values, high, strict=True):
        assert min(chunk) < bottom < value < top < max(chunk)
        assert sum(bottom <= loss <= top for loss in chunk) == 8


def test_epochs_that_became_longer(tmp_path: Path) -> None:
    """10 steps each, then 20, as where workers are lost; the last epoch is under way."""
    ends = [EpochRecord(step, epoch, epoch, 1.0) for epoch, step in enumerate((10, 20, 40), 1)]
    steps = [replace(STEP, step=step) for step in range(1, 51)]
    run = RunRecords("a", [*steps, *ends], {})
    assert run.epochs([0, 5, 20, 30, 40, 50]) == [0, 0.5, 2, 2.5, 3, 3.5]
    assert run.end == 3.5


def test_names_distinguish_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_of([Path("x/a/run"), Path("x/b/run"), Path("x/c")]) == ["a/run", "b/run", "c"]
    assert names_of([Path("a/x/run"), Path("b/x/run"), Path("run")])[:2] == ["a/x/run", "b/x/run"]
    assert names_of([Path("a/run"), Path("a/run/"), Path("b/../a/run")]) == ["run"] * 3
    assert names_of([Path("/run"), Path("/a/run"), Path("/")]) == ["/run", "a/run", "/"]
    make_run(tmp_path / "_$1", 0.9)
    monkeypatch.chdir(tmp_path / "_$1")
    assert main([".", f"output={tmp_path / 'out'}"]) == 0
    assert "<h1>_$1</h1>" in (tmp_path / "out.html").read_text()


def test_any_number_of_runs_has_distinct_colours() -> None:
    assert colors_of(1) == [None]
    for count in (2, 7, 8, 30):
        assert len(set(colors_of(count))) == count
