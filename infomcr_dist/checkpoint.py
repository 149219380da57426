"""Checkpoints: written whole or not at all, verified by their checksum, read without running code.

A checkpoint is a dictionary of tensors and plain values in one file of a run directory:
``checkpoints/step-00000938-1c9e5f0a2b7d4e68.pt`` is the state after 938 steps, and the second number begins the SHA-256
of the file's content. ``checkpoints/best.pt`` is a link to the one with the lowest error on the evaluated images; a
copy of it where the file system has no links.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = 4
State = dict[str, Any]
_NAME = re.compile(r"step-(?P<step>\d{8,})-(?P<checksum>[0-9a-f]{16})\.pt")
_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global|whose module (\S+) is blocked")
"""How torch reports what it does not load; the rest of its messages advises to load it all the same"""


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, then put it in place, durably.

    Whatever happens on the way, ``path`` holds its old content or the whole new one, and no temporary file stays.
    Raises OSError naming the path (no room, no permission).
    """
    _put_in_place(path.with_name(f".{path.name}.{os.getpid()}"), write, lambda: path, str(path))


def make_directory(path: Path, setting: str) -> None:
    """Make a directory, and those above it, where there is none; ValueError if something else is in its place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        place = next(p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir())
        what = f"a link to {os.readlink(place)}, which is missing" if place.is_symlink() else "a file"
        raise ValueError(f"{setting}: {place} must be a directory, is {what}: remove it, or give another") from None


def save(directory: Path, step: int, state: State, keep: int, best: bool = False) -> Path:
    """Write the state after so many steps, ``best`` of all or not; keep the newest ``keep`` and the best.

    It takes the place of another checkpoint of the same step, which an evaluation may have followed.

    Until the new checkpoint is in place whole, nothing else changes. Raises OSError naming the directory.
    """
    digest = hashlib.sha256()

    def write(file: io.BufferedWriter) -> None:
        hashing = _Hashing(file, digest)
        try:
            torch.save({"format": FORMAT, **state}, hashing)  # type: ignore[arg-type]
        except RuntimeError:  # torch.save ends with one of its own where writing failed
            raise hashing.failure or OSError("the file was not written whole") from None

    def name() -> Path:
        return directory / f"step-{step:08d}-{digest.hexdigest()[:16]}.pt"

    path = _put_in_place(directory / f".step-{step:08d}.{os.getpid()}", write, name, f"{directory}: step {step}")
    if best:
        link = directory / f".best.{os.getpid()}"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(path.name)
        except OSError:  # cloud file stores
            shutil.copyfile(path, link)
        os.replace(link, directory / "best.pt")
    found = [p for p in newest_first(directory) if p == path or not p.name.startswith(f"step-{step:08d}-")]
    kept = {path.name, *(p.name for p in found[:keep])}
    if (directory / "best.pt").is_symlink():
        kept.add(os.readlink(directory / "best.pt"))
    for old in newest_first(directory):
        if old.name not in kept:
            old.unlink()
    return path


def newest_first(directory: Path) -> list[Path]:
    """The checkpoints of a directory by their steps, the largest first."""
    found = [(int(match["step"]), path) for path in directory.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def remove_unfinished(directory: Path) -> None:
    """Remove what a process that was killed while it saved has left behind."""
    for path in (*directory.glob(".step-*"), *directory.glob(".best.*")):
        path.unlink(missing_ok=True)


class OtherFormat(ValueError):
    """A checkpoint of another release, not a damaged one."""


def load_newest(source: Path, report: Callable[[str], None], argument: str = "RUN") -> tuple[Path, State]:
    """The checkpoint at ``source``: the file itself, or the newest of a run directory that is whole.

    Args:
        source: a checkpoint or a run directory.
        report: called with a line for every damaged checkpoint that is skipped.
        argument: of the command, that names the source; for the errors.

    Raises:
        ValueError: there is none, none that is whole, or the newest is of another release.
    """
    if source.is_file():
        return source, load(source)
    found = newest_first(source / "checkpoints")
    if not found:
        raise ValueError(f"{argument}: there is no checkpoint at {source}: give a run directory or a checkpoint file")
    for path in found:
        try:
            return path, load(path)
        except OtherFormat:
            raise
        except ValueError as error:
            report(f"{error}; it is skipped, the one before it is taken")
    raise ValueError(f"{argument}: none of the {len(found)} checkpoints at {source} is whole: train in another run_dir")


def load(path: Path) -> State:
    """Read a checkpoint, tensors on the CPU; no code in it is run. ValueError if it is not one of ours, whole."""
    state = read(path)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} is not a checkpoint of this project")
    if state["format"] != FORMAT:
        raise OtherFormat(
            f"{path} has format {state['format']}, known is {FORMAT}: resume it with the release that wrote it, "
            "or train in another run_dir"
        )
    return state


def read(path: Path) -> Any:
    """What torch.save has written to a file, tensors on the CPU; no code in it is run.

    Raises:
        ValueError: it cannot be read, holds more than tensors and plain values, or does not have the checksum that the
            name of a checkpoint gives.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error.strerror}") from error
    match = _NAME.fullmatch(path.resolve().name)
    if match and hashlib.sha256(content).hexdigest()[:16] != match["checksum"]:
        raise ValueError(f"{path} is damaged: its content does not have the checksum that its name gives")
    try:
        with warnings.catch_warnings():  # the error says what a warning would
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        reason = " ".join(str(error).split()).partition(". ")[0][:200] or type(error).__name__
        if refused := _REFUSED.search(str(error)):
            reason = (
                f"it holds {refused[1] or refused[2]}, which is neither a tensor nor a plain value and may run code"
            )
        elif "weights_only" in str(error):
            reason = "it is damaged, or holds more than tensors and plain values"
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error


def restore_weights(model: nn.Module, state: State, path: Path, averaged: bool = False) -> None:
    """Load the weights and buffers of a checkpoint, or the averaged ones; ValueError if they are another network's."""
    tensors = state["model"]
    if averaged:
        if state.get("average") is None:
            raise ValueError(
                f"weights: {path} has no averaged weights: give weights=current, or train with averaging.kind"
            )
        found = state["average"].items()
        tensors = {name.removeprefix("module."): tensor for name, tensor in found if name != "n_averaged"}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {path} do not fit the model it names: the model's code has changed since"
        ) from error


def copied(value: Any, device: str | None = None) -> Any:
    """The value with every tensor in it copied, to a device or on its own; dictionaries and lists all through."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device or value.device, copy=True)
    if isinstance(value, dict):
        return {key: copied(item, device) for key, item in value.items()}
    return [copied(item, device) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Saved:
    """The outcome of a save; ``error`` is None where it was written."""

    step: int
    seconds: float
    """time the writing took, in the background"""
    error: str | None


class Writer:
    """Saves checkpoints of one directory in a thread, one at a time, in order."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory, self._keep = directory, keep
        self._thread: threading.Thread | None = None
        self._finished: list[Saved] = []

    def begin(self, step: int, state: State, best: bool = False) -> None:
        """Write a state that nobody changes any more, after the one before."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(step, state, best))
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for what is being written, so long at most; returns whether it is written."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def finished(self) -> list[Saved]:
        """The saves that have ended since the last call."""
        ended, self._finished = self._finished, []
        return ended

    def _write(self, step: int, state: State, best: bool) -> None:
        before, error = time.perf_counter(), None
        try:
            save(self._directory, step, state, self._keep, best)
        except Exception as failure:  # whatever it was: nobody may believe that this step is saved
            error = str(failure) or type(failure).__name__
        self._finished.append(Saved(step, time.perf_counter() - before, error))


class _Hashing:
    """A file to write to that adds what it gets to a digest."""

    def __init__(self, file: io.BufferedWriter, digest: Any) -> None:
        self._file, self._digest = file, digest
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        self._digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _put_in_place(temporary: Path, write: Callable[[Any], Any], name: Callable[[], Path], what: str) -> Path:
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        path = name()
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(f"{what} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
