"""Checkpoints: whole or absent, whatever fails, and never code."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from infomcr_dist import checkpoint


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for epochs in range(1, 5):
        checkpoint.save(tmp_path, epochs, {"epochs": epochs, "weights": torch.full((3,), float(epochs))}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003.pt", "step-00000004.pt"]
    (tmp_path / "checkpoints").mkdir()
    for path in tmp_path.glob("*.pt"):
        path.rename(tmp_path / "checkpoints" / path.name)
    state = checkpoint.load(checkpoint.find(tmp_path))
    assert state["epochs"] == 4
    assert torch.equal(state["weights"], torch.full((3,), 4.0))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = checkpoint.save(tmp_path, 1, {"epochs": 1}, keep=1)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match=r"step-00000001.pt could not be written: .*No space left"):
        checkpoint.save(tmp_path, 1, {"epochs": 1, "more": torch.zeros(100)}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert path.read_bytes() == before


def test_a_full_device_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    def onto_a_full_device(file: object) -> None:
        with open("/dev/full", "wb") as full:
            torch.save({"weights": torch.zeros(100_000)}, full)

    with pytest.raises(OSError, match=r"c\.pt could not be written"):
        checkpoint.write_atomically(tmp_path / "c.pt", onto_a_full_device)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    for content in (b"", b"not a checkpoint", pickle.dumps(Path)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"step-00000001.pt is not a (readable )?checkpoint"):
            checkpoint.load(path)
    whole = checkpoint.save(tmp_path, 2, {"weights": torch.zeros(1000)}, keep=9).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"step-00000001.pt is not a readable checkpoint"):
        checkpoint.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of this project"):
        checkpoint.load(path)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt is not a readable checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_resume_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume: there is no checkpoint at"):
        checkpoint.find(tmp_path)
