"""The cases of cases/data_plane.py, one test each; those that fail today are expected to."""

from pathlib import Path

import pytest
from cases import harness
from cases.data_plane import CASES

FAILING = {
    "odd exif": "odd metadata in an image: prepare ends with a traceback",
    "truncated test image, dali": "odd content in an image: evaluation ends with a traceback",
    "truncated test image, torch": "odd content in an image: evaluation ends with a traceback",
    "large profile": "a header behind a large profile: the index has no size, and crops are of one pixel",
    "stray byte": "decoders disagree: prepare keeps and torch decodes what DALI refuses",
    "plain cmyk": "decoders disagree: CMYK without Adobe's marker",
    "dotted keys": "index and stream group the members of a shard by different rules",
    "tiny imagenet": "folder layouts: unlabelled images become a class",
    "valid beside train": "folder layouts: valid/ beside train/ is skipped silently",
    "flat val": "folder layouts: images without a class folder are skipped silently",
    "@eaDir": "folder layouts: folders of a NAS become classes",
    "#recycle": "folder layouts: folders of a NAS become classes",
    "dest in source": "folder layouts: DEST inside of SOURCE becomes a part of it",
    "joined tars": "archives: what follows the end of the first of joined tars is lost silently",
    "links in a tar": "archives: links are lost silently",
    "links in a shard": "archives: links are lost silently",
    "joined shards": "archives: what follows the end of the first of joined tars is lost silently",
    "two symlink loops": "unbounded work: loops of symbolic links do not end",
    "huge label": "unbounded work: a label of two billions fills memory",
    "texts in images": "metadata: a large text keeps an image out, comments reach the shards",
    "sixteen bits": "16-bit images are scaled each by its own brightest pixel",
    "swapped labels": "the index of external shards is not built again for the same size and time of change",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=FAILING[name])) if name in FAILING else name
        for name in CASES
    ],
)
def test_case(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(harness.ENV, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    good, text = CASES[name](tmp_path)
    assert good, text
