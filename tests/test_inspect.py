import subprocess
import sys
from pathlib import Path

import numpy as np
from data_sets import make_data_set, picture
from PIL import Image

from pipelines.inspect import contact_sheet


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_counts_sizes_and_sheet(tmp_path: Path) -> None:
    dataset = make_data_set(tmp_path, height=20, width=30)
    result = run(dataset.path, f"sheet={tmp_path / 'sheet.png'}", "images=9", "side=30")
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in ("train: 27 samples in 4 shards", "height 20 pixels", "width 30 pixels", "owl 9 3"):
        assert any(found.startswith(line) for found in lines), result.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (90, 90)


def test_the_sheet_shows_each_image_once(tmp_path: Path) -> None:
    split = make_data_set(tmp_path).splits["train"]
    sheet = np.asarray(contact_sheet(split, images=27, side=32), float)
    assert sheet.shape == (160, 192, 3)
    tiles = [sheet[y : y + 32, x : x + 32] for y in range(0, 160, 32) for x in range(0, 192, 32)]
    originals = [picture(1000 * label + number).astype(float) for label in range(3) for number in range(12)]
    nearest = [int(np.argmin([np.abs(tile - other).mean() for other in originals])) for tile in tiles[:27]]
    assert len(set(nearest)) == 27


def test_mistakes(tmp_path: Path) -> None:
    dataset = make_data_set(tmp_path)
    for arguments, message in (
        ([], "usage"),
        ([tmp_path / "nothing"], "no data set at"),
        ([dataset.path, "sheet=a.png", "split=val"], "split must be one of train, test, got val"),
        ([dataset.path, "images=0", "sheet=a.png"], "images and side must be at least 1, got 0 and 128"),
        ([dataset.path, "sheets=a.png"], "unknown setting sheets: the nearest known one is sheet"),
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
