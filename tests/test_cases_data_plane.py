"""The cases of cases/data_plane.py, one test each."""

from pathlib import Path

import pytest
from cases import harness
from cases.data_plane import CASES


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(harness.ENV, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    good, text = CASES[name](tmp_path)
    assert good, text
