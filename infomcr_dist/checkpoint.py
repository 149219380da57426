"""Checkpoints: written whole or not at all, read without running code.

A checkpoint is a dictionary of tensors and plain values in one file of a run directory: ``step-00000938.pt`` below
``checkpoints`` is the state after 938 steps.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = 1
State = dict[str, Any]


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, then put it in place, durably.

    Whatever happens on the way, ``path`` holds its old content or the whole new one, and no temporary file stays.
    Raises OSError naming the path (no room, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        if isinstance(error, RuntimeError) and "write" not in str(error):
            raise
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(directory: Path, step: int, state: State, keep: int) -> Path:
    """Write the state after so many steps and remove all but the newest ``keep`` checkpoints."""
    path = directory / f"step-{step:08d}.pt"
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    for old in _newest_first(directory)[keep:]:
        old.unlink()
    return path


def find(place: Path) -> Path:
    """The checkpoint at ``place``: the file itself, or the newest of a run directory. Raises ValueError if none."""
    if place.is_file():
        return place
    found = _newest_first(place / "checkpoints")
    if not found:
        raise ValueError(f"resume: there is no checkpoint at {place}: give a run directory or an step-NNNNNNNN.pt file")
    return found[0]


def load(path: Path) -> State:
    """Read a checkpoint, tensors on the CPU; no code in it is run. ValueError if it is not one of ours, whole."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project (format {FORMAT})")
    return state


def restore_weights(model: nn.Module, state: State, path: Path) -> None:
    """Load the weights and buffers of a checkpoint; ValueError if they are another network's."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {path} do not fit the model it names: the model's code has changed since"
        ) from error


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*.pt"), reverse=True)
