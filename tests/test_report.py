"""The report of real records: what it shows is what they hold, and it needs nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from infomcr_dist.report import main, read


def make_run(directory: Path, momentum: float, steps: int = 40) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text(
        f"model: resnet20\noptimizer: {{momentum: {momentum}, learning_rate: 0.1}}\n"
    )
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        on = step > steps // 2
        records.append({
            "kind": "step", "step": step, "epoch": 1 + (step - 1) // 10, "phase": "regularized" if on else "plain",
            "loss": 2.0 / step, "penalty": 1e-4 if on else None, "beta": 10.0 if on else None, "learning_rate": 0.1,
            "step_duration_seconds": 0.3 if on else 0.2, "data_wait_seconds": 0.01, "allreduce_wait_seconds": 0.02,
        })  # fmt: skip
        if step % 10 == 0:
            records.append({"kind": "epoch", "epoch": step // 10, "training_loss": 1.0})
    for split, error in (("test", 0.25), ("train", 0.125)):
        records.append(
            {"kind": "evaluation", "epoch": 4, "split": split, "top1_error_ratio": error, "top5_error_ratio": 0.01}
        )
    records.append({"kind": "metric", "epoch": 4, "gamma_hat": -12.34, "gamma_hat_standard_error": None})
    (directory / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"kind": "st')
    return directory


def test_the_page_shows_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "a", 0.9), make_run(tmp_path / "b<", 0.8)]
    assert main([*map(str, runs), f"output={tmp_path / 'out'}"]) == 0
    page = (tmp_path / "out.html").read_text()
    rows = {r[0]: r[1:] for r in (re.findall(r"<td>(.*?)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", page))}
    assert rows["test top-1 error"] == ["25.00%"] * 2
    assert rows["gap, top-1"] == ["+12.50%"] * 2
    assert rows["γ̂"] == ["-12.3"] * 2
    assert rows["plain step, median ms"] == ["200.0"] * 2
    assert rows["regularized / plain"] == ["1.50"] * 2
    assert rows["optimizer.momentum"] == ["0.9", "0.8"]
    assert "optimizer.learning_rate" not in rows, "only what differs"
    assert rows[""] == ["a", "b&lt;"], "names are text, not markup"
    assert page.count("<svg") == 1
    assert not re.search(r'(src|href)="(?!#)', page), "nothing is loaded from elsewhere"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.9, steps=5)
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text("".join(lines[:5]))
    assert main([str(run), f"output={tmp_path / 'out'}"]) == 0
    assert len(read(run).of("step")) == 5


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
