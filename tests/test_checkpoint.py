"""Checkpoints: whole or absent at every instant, verified, and never code."""

import errno
import hashlib
import operator
import os
import pathlib
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from infomcr_dist import checkpoint


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints there, newest first; everything else in it is hidden or the link to the best."""
    names = {p.name for p in directory.iterdir() if not p.name.startswith(".") and p.name != "best.pt"}
    found = checkpoint.newest_first(directory)
    assert names == {p.name for p in found}
    return [int(p.name[5:13]) for p in found]


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((1000,), float(step))}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_round_trip_and_retention(run: Path) -> None:
    directory = run / "checkpoints"
    for step in range(1, 6):
        checkpoint.save(directory, step, state(step), keep=2, best=step in (1, 2))
    assert steps(directory) == [5, 4, 2], "the newest two, and the best"
    path, loaded = checkpoint.load_newest(run, print)
    assert loaded["step"] == 5
    assert torch.equal(loaded["weights"], torch.full((1000,), 5.0))
    assert checkpoint.load(directory / "best.pt")["step"] == 2
    assert checkpoint.load_newest(path, print)[0] == path


def test_the_name_holds_the_checksum_that_sha256sum_prints(run: Path) -> None:
    path = checkpoint.save(run / "checkpoints", 7, state(7), keep=1)
    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert path.name == f"step-00000007-{printed[:16]}.pt"


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    run: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    directory = run / "checkpoints"
    path = checkpoint.save(directory, 1, state(1), keep=1)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match=r"checkpoints: step 2 could not be written: .*No space left"):
        checkpoint.save(directory, 2, state(2), keep=1)
    assert list(directory.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_full_device_is_an_error_that_names_the_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of /dev/full fails as on a full disk, in the midst of torch.save too."""

    def onto_a_full_device(path: Path, mode: str) -> Any:
        path.touch()
        return open("/dev/full", mode, buffering=0)

    monkeypatch.setattr(checkpoint, "open", onto_a_full_device, raising=False)
    with pytest.raises(OSError, match=r"checkpoints: step 1 could not be written: .*No space left on device"):
        checkpoint.save(run / "checkpoints", 1, state(1), keep=1)
    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("reason", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EROFS])
def test_a_file_system_without_links_has_a_copy_of_the_best(
    reason: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    directory = run / "checkpoints"
    for step in range(1, 6):
        checkpoint.save(directory, step, state(step), keep=2, best=step in (1, 2))
    assert steps(directory) == [5, 4]
    assert checkpoint.load(directory / "best.pt")["step"] == 2
    monkeypatch.undo()
    checkpoint.save(directory, 6, state(6), keep=1, best=True)
    assert (directory / "best.pt").is_symlink()
    assert steps(directory) == [6]


def test_killed_at_any_instant_of_a_save(run: Path) -> None:
    """Before every line that a save executes, in a process of its own: the old or the new one is there, whole."""
    directory = run / "checkpoints"
    checkpoint.save(directory, 1, state(1), keep=1, best=True)
    seen = []
    for instant in range(1, 1000):
        if not killed_before_line(instant, directory):
            break
        newest = checkpoint.load_newest(run, pytest.fail)[1]
        assert torch.equal(newest["weights"], torch.full((1000,), float(newest["step"])))
        assert checkpoint.load(directory / "best.pt")["step"] in (1, newest["step"])
        seen.append(newest["step"])
        checkpoint.remove_unfinished(directory)
        assert not [p for p in directory.iterdir() if p.name.startswith(".")]
        for path in checkpoint.newest_first(directory)[:-1]:  # back to the beginning
            path.unlink()
        checkpoint.save(directory, 1, state(1), keep=1, best=True)
        for path in checkpoint.newest_first(directory):
            if "-00000001-" not in path.name:
                path.unlink()
    else:
        pytest.fail("the save never ended")
    assert len(seen) > 40
    assert set(seen) == {1, 2}
    assert seen == sorted(seen), "from the instant it is in place, the new one is what is found"
    assert checkpoint.load_newest(run, pytest.fail)[1]["step"] == 2


def killed_before_line(number: int, directory: Path) -> bool:
    """Save in a process that ends, as by SIGKILL, before the n-th line of checkpoint.py; False: it came through."""
    child = os.fork()
    if child == 0:
        count = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename != checkpoint.__file__:
                return None
            if event == "line":
                count += 1
                if count == number:
                    os._exit(9)
            return trace

        sys.settrace(trace)
        checkpoint.save(directory, 2, state(2), keep=1, best=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "longer"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run: Path, damage: str) -> None:
    directory = run / "checkpoints"
    good = checkpoint.save(directory, 1, state(1), keep=9)
    bad = checkpoint.save(directory, 2, state(2), keep=9)
    content = bytearray(bad.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    bad.write_bytes({"cut": content[:-100], "empty": b"", "longer": content + b"x"}.get(damage, content))
    reported: list[str] = []
    assert checkpoint.load_newest(run, reported.append)[0] == good
    assert len(reported) == 1
    assert re.search(rf"{bad.name} is damaged: .*checksum.*; it is skipped, the one before it is taken", reported[0])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_newest(bad, print)
    good.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        checkpoint.load_newest(run, print)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    for content in (b"", b"not a checkpoint", pickle.dumps(Path)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other.pt is not a (readable )?checkpoint"):
            checkpoint.load(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of this project"):
        checkpoint.load(path)


@pytest.mark.parametrize("other", [checkpoint.FORMAT - 1, 99])
def test_a_checkpoint_of_another_release_is_refused_in_one_line(run: Path, other: int) -> None:
    """And no older one is taken in its place: it is not damaged."""
    directory = run / "checkpoints"
    checkpoint.save(directory, 1, state(1), keep=9)
    old = directory / "step-00000002.pt"
    torch.save({**state(2), "format": other}, old)
    old = old.rename(directory / f"step-00000002-{hashlib.sha256(old.read_bytes()).hexdigest()[:16]}.pt")
    for source in (old, run):
        with pytest.raises(
            ValueError, match=rf"{old.name} has format {other}, known is {checkpoint.FORMAT}: resume"
        ) as e:
            checkpoint.load_newest(source, pytest.fail)
        assert "\n" not in str(e.value)


class Payload:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (Payload(os.mkdir, "executed"), "it holds "),
        (Payload(exec, "open('executed', 'w')"), "it holds "),
        (Payload(operator.methodcaller, "touch"), "it holds operator.methodcaller, which is neither a tensor nor"),
        (Payload(torch.hub.load, "executed"), "it holds torch.hub.load, which"),
        (Payload(getattr, "x", "upper"), "it holds "),
        (pathlib.PurePosixPath("x"), "it holds pathlib.PurePosixPath, which"),
    ],
)
def test_a_checkpoint_cannot_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: object, named: str
) -> None:
    """Nor does a message advise to load it all the same, as torch's does."""
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "model": payload}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=rf"evil.pt is not a readable checkpoint: {named}") as caught:
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
    for advice in ("weights_only", "trust", "allow", "Re-running", "\033", "\n"):
        assert advice not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps(Path), pickle.dumps({"a": 1}), b"PK\3\4xxxx"])
def test_a_file_that_is_no_checkpoint_is_refused_without_advice(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"other.pt is not a readable checkpoint: \w") as caught:
        checkpoint.load(tmp_path / "other.pt")
    for advice in ("weights_only", "trust", "allow", "\033", "\n"):
        assert advice not in str(caught.value)


@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
@pytest.mark.parametrize("what", ["a link to missing, which is missing", "a file"])
def test_a_directory_that_is_something_else(tmp_path: Path, place: str, what: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    if what == "a file":
        (tmp_path / place).touch()
    else:
        (tmp_path / place).symlink_to("missing")
    message = f"run_dir: {tmp_path / place} must be a directory, is {what}: remove it, or give another"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checkpoint.make_directory(tmp_path / "run" / "checkpoints", "run_dir")


def test_a_checkpoint_takes_the_place_of_another_of_its_step(run: Path) -> None:
    """As that after an evaluation takes the place of the one before it."""
    directory = run / "checkpoints"
    for step in (1, 2, 3):
        checkpoint.save(directory, step, state(step), keep=2)
        checkpoint.save(directory, step, state(10 * step), keep=2, best=step == 1)
    assert [p.name[:13] for p in checkpoint.newest_first(directory)] == [f"step-0000000{step}" for step in (3, 2, 1)]
    assert checkpoint.load_newest(run, pytest.fail)[1]["step"] == 30
    assert checkpoint.load(directory / "best.pt")["step"] == 10


def test_resume_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RUN: there is no checkpoint at"):
        checkpoint.load_newest(tmp_path, print)


def test_the_writer_works_beside_its_caller_and_reports_each_outcome(run: Path) -> None:
    directory = run / "checkpoints"
    writer = checkpoint.Writer(directory, keep=3)
    writer.begin(1, state(1))
    writer.begin(2, state(2))  # waits for the first
    writer.wait()
    assert [(s.step, s.error) for s in writer.finished()] == [(1, None), (2, None)]
    assert writer.finished() == []
    missing = checkpoint.Writer(run / "nowhere", keep=3)
    missing.begin(3, state(3))
    missing.wait()
    (saved,) = missing.finished()
    assert saved.error is not None
    assert "nowhere: step 3 could not be written" in saved.error


def test_a_copy_shares_no_memory() -> None:
    original = {"a": [torch.zeros(3), {"b": torch.ones(2)}], "c": 5}
    copy = checkpoint.copied(original)
    original["a"][0].fill_(7)  # type: ignore[index, union-attr]
    assert torch.equal(copy["a"][0], torch.zeros(3))
    assert copy["c"] == 5
