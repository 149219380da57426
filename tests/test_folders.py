import os
from pathlib import Path

from pipelines.format.folders import is_system, walk


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_every_file_once_whatever_links_there_are(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "cat/0", "dog/0", "dog/deep/er/1")
    outside = tree(tmp_path / "outside", "x", "y/z")
    for name, target in {
        "cat/up": "..", "dog/up": "..", "cat/self": ".", "dog/cats": "../cat", "alias": "dog", "out": str(outside),
        "dog/deep/out": str(outside), "knot": "knot", "gone": "nowhere", "file": "cat/0",
    }.items():  # fmt: skip
        (source / name).symlink_to(target)
    (outside / "back").symlink_to(source)
    files, repeated = walk(source)
    assert files == ["cat/0", "dog/0", "dog/deep/er/1", "file", "gone", "knot", "out/x", "out/y/z"]
    assert repeated == ["alias", "cat/self", "cat/up", "dog/cats", "dog/deep/out", "dog/up", "out/back"]


def test_many_folders_that_link_to_one_another_end(tmp_path: Path) -> None:
    names = [f"{number:02d}" for number in range(30)]
    source = tree(tmp_path, *(f"{name}/file" for name in names))
    for one in names:
        for other in names:
            os.symlink(f"../{other}", source / one / f"to{other}")
    files, repeated = walk(source)
    assert files == [f"{name}/file" for name in names]
    assert len(repeated) == 900


def test_what_systems_leave() -> None:
    for name in ("@eaDir", "#recycle", "__MACOSX", "._0.jpg", ".DS_Store", "Thumbs.db", "$RECYCLE.BIN"):
        assert is_system(name)
    for name in ("cat", "@home", "#sunset", "_", ".hidden", "recycle"):
        assert not is_system(name)
