"""What a run changes while it trains: copied in memory, written to a checkpoint, found again and restored."""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infomcr_dist import checkpoint, records
from infomcr_dist.averaging import AveragedWeights
from infomcr_dist.config import Config
from infomcr_dist.experiment import Experiment
from infomcr_dist.overhead_budget import OverheadBudget
from infomcr_dist.schedules import LearningRate, PenaltyWeight
from infomcr_dist.world import World
from pipelines.options import flat, to_dict

_MAY_CHANGE = frozenset(
    (
        *("epochs", "run_dir", "resume", "init_from", "allow_config_change", "threads", "max_nonfinite_steps"),
        *("compare_weights_steps", "shutdown_timeout_seconds", "hang_timeout_seconds", "pid_dir", "engine"),
        *("evaluation", "metric", "checkpoint", "telemetry", "profile"),
    )
)
"""Settings and sections that a resumed run may change: they do not alter the remaining steps, or only add to them."""
_MAY_CHANGE_OF_DATA = frozenset(
    (
        *("path", "backend", "on_error", "batch_size", "global_batch_size", "max_batch_size", "threads", "prefetch"),
        "cache_bytes",
    )
)
"""Of the data section; the shards' fingerprint and the global batch are compared instead."""
_NEW_STATE = {
    "optimizer": ("optimizer.kind", "optimizer.arguments", "optimizer.decay_norm_and_bias", "frozen"),
    "average": ("averaging.kind",),
}
"""Parts of a state, and the settings without which they mean nothing: where one has changed, the part begins anew."""
_HYPERPARAMETERS = ("weight_decay", "momentum", "nesterov", "foreach", "fused")
"""Of the optimizer's parameter groups: as the settings and the device are now."""


@dataclass
class TrainState:
    """What the steps change; all of it is in a checkpoint."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    penalty_weight: PenaltyWeight
    overhead_budget: OverheadBudget | None
    average: AveragedWeights | None
    epoch: int = 0
    """Epochs completed"""
    step: int = 0
    """Steps done, of all epochs; where they are all of the epoch under way, only what follows its steps remains"""
    epoch_loss: tuple[float, float] = (0.0, 0.0)
    """Summed loss, and images, of all workers in the epoch under way"""
    best_error: float | None = None
    """Lowest top-1 error on the evaluated images so far"""

    def snapshot(self, steps_per_epoch: int) -> checkpoint.State:
        """A copy of the state, for this worker to resume from within or before an epoch."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "epochs": self.step / steps_per_epoch,
            "epoch_loss": self.epoch_loss,
            "best_error": self.best_error,
            "by_rank": [],
            "model": checkpoint.copied(self.model.state_dict()),
            "optimizer": checkpoint.copied(self.optimizer.state_dict()),
            "learning_rate": checkpoint.copied(self.learning_rate.state_dict()),
            "penalty_weight": checkpoint.copied(self.penalty_weight.state_dict()),
            "overhead_budget": self.overhead_budget and checkpoint.copied(self.overhead_budget.state_dict()),
            "average": self.average and checkpoint.copied(self.average.state_dict()),
        }

    def restore(self, saved: checkpoint.State, directory: Path, world: World) -> None:
        """Take over a snapshot; `UserError` on every worker if its weights are another network's."""
        with world.synchronize_errors():
            checkpoint.restore_weights(self.model, saved, directory)
        if saved["optimizer"] is not None:
            self.optimizer.load_state_dict(self._with_own_hyperparameters(saved["optimizer"]))
        self.learning_rate.load_state_dict(saved["learning_rate"])
        self.penalty_weight.load_state_dict(saved["penalty_weight"])
        if self.overhead_budget is not None and saved["overhead_budget"] is not None:
            self.overhead_budget.load_state_dict(saved["overhead_budget"])
        if self.average is not None and saved.get("average") is not None:
            self.average.load_state_dict(saved["average"])
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.epoch_loss, self.best_error = tuple(saved["epoch_loss"]), saved["best_error"]
        _restore_buffers(self.model, saved["by_rank"], world)

    def _with_own_hyperparameters(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's saved state, with what this run's settings give in place of what the checkpoint's gave."""
        groups = [
            group | {name: own[name] for name in _HYPERPARAMETERS if name in own}
            for group, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        return {**saved, "param_groups": groups}


@dataclass
class Committed:
    """The state after a step, in memory: where an elastic run resumes when its world is restarted."""

    directory: Path
    state: checkpoint.State
    restarts: dict[str, int] = field(default_factory=dict)
    """Restarts so far, by their reason"""


def newest_committed(committed: Committed | None, model: nn.Module, world: World) -> Committed | None:
    """The newest state that any worker of a restarted world holds, on all of them; None if none holds any.

    A worker may have received the averaged gradient of a step that another was lost in: its state is the newest.
    """
    steps = world.gather(-1 if committed is None else committed.state["step"])
    if max(steps) < 0:
        return None
    source = steps.index(max(steps))
    newest = None
    if committed is not None and world.rank == source:
        newest = Committed(committed.directory, checkpoint.copied(committed.state, "cpu"), committed.restarts)
    shared: Committed = world.broadcast(newest, root=source)
    own = None if committed is None or committed.state["step"] != max(steps) else committed.state["model"]
    names = {name for name, _ in model.named_buffers()}
    buffers = world.gather(own and {name: tensor.cpu() for name, tensor in own.items() if name in names})
    shared.state = {**shared.state, "by_rank": [b for b in buffers if b is not None]}
    return shared


def save(
    state: checkpoint.State,
    model: nn.Module,
    experiment: Experiment,
    writer: checkpoint.Writer,
    world: World,
    best: bool = False,
) -> None:
    """Begin to write a snapshot that every worker has; rank 0 writes it, beside the training.

    What differs between workers within an epoch, BatchNorm's running statistics, is kept for each.
    """
    if state["epoch"] * experiment.sampler.steps != state["step"]:
        buffers = {name: state["model"][name].cpu() for name, _ in model.named_buffers()}
        state = {**state, "by_rank": world.gather(buffers)}
    if world.rank == 0:
        about = {  # not in a snapshot, which an elastic run takes at every step
            "settings": fixed_settings(experiment),
            "config": to_dict(experiment.config),
            "classes": experiment.dataset.classes,
            "image_size": experiment.image_size,
            "mean": experiment.dataset.mean,
            "std": experiment.dataset.std,
        }
        writer.begin(state["step"], state | about, best)


def fixed_settings(experiment: Experiment) -> dict[str, Any]:
    """What a resumed run must share with the run it continues, flat: ``optimizer.momentum: 0.9``."""
    sections = {name: value for name, value in to_dict(experiment.config).items() if name not in _MAY_CHANGE}
    sections["data"] = {name: value for name, value in sections["data"].items() if name not in _MAY_CHANGE_OF_DATA}
    of_data = {
        "data.global_batch_size": experiment.sampler.global_batch,
        "data.path's shards": experiment.dataset.fingerprint[:16],
    }
    return of_data | flat(sections)


def find_directory_and_state(experiment: Experiment, recipe: Path) -> tuple[Path, checkpoint.State | None]:
    """The run's directory, and the checkpoint it resumes from, if any; with resume=auto that of a finished run as well.

    Raises:
        ValueError: the directory holds another run, or the checkpoint is missing, damaged, or of other settings.
    """
    config = experiment.config
    directory = Path(config.run_dir) if config.run_dir else None
    occupied = directory is not None and (directory / records.FILE).exists()
    if not resumes(config):
        if occupied and config.resume is None:
            raise ValueError(
                f"run_dir {directory} holds a run already: resume it with resume=auto, or give another run_dir"
            )
        return directory or Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}", None
    assert config.resume is not None
    source = directory if directory and config.resume == "auto" else Path(config.resume)
    path, state = checkpoint.load_newest(source, _report, "resume")
    _check_settings(experiment, path, state)
    if is_finished(state, config) and config.resume != "auto":
        raise ValueError(
            f"resume: {path} has completed all of its {state['epoch']} epochs, got epochs={config.epochs}: "
            "give a larger number to train on"
        )
    return directory or path.parent.parent, state


def resumes(config: Config) -> bool:
    """Whether a run resumes from a checkpoint, and does not begin."""
    if config.resume != "auto":
        return config.resume is not None
    return bool(config.run_dir and checkpoint.newest_first(Path(config.run_dir) / "checkpoints"))


def is_finished(state: checkpoint.State, config: Config) -> bool:
    """Whether a checkpoint has completed all epochs, with what follows the last one's steps."""
    return bool(state["epoch"] >= config.epochs)


def _check_settings(experiment: Experiment, path: Path, state: checkpoint.State) -> None:
    """ValueError where settings that must stay have changed; where they may, what follows from it in ``state``."""
    settings, config = fixed_settings(experiment), experiment.config
    # A checkpoint of before there was a setting was trained with its default.
    saved = {name: value for name, value in flat(to_dict(Config())).items() if name in settings} | state["settings"]
    different = [
        f"{name}={settings.get(name)} (checkpoint: {saved.get(name)})"
        for name in sorted(settings.keys() | saved.keys())
        if settings.get(name) != saved.get(name)
    ]
    if different and not config.allow_config_change:
        raise ValueError(
            f"resume: {path} was trained with other settings: {', '.join(different)}: "
            "give those of the checkpoint, or allow_config_change=true to continue with the new ones"
        )
    if different:
        _report(f"resume: {path} continues with changed settings: {', '.join(different)}")
        if any(text.startswith(("data.", "seed=")) for text in different):  # another sequence of global batches
            _report(f"resume: epoch {state['epoch'] + 1} begins again")
            state |= {"step": state["epoch"] * experiment.sampler.steps, "epoch_loss": (0.0, 0.0), "by_rank": []}
        for part, names in _NEW_STATE.items():
            if any(text.startswith(names) for text in different):
                _report(f"resume: the state of the {part} begins anew")
                state[part] = None


def weights_digest(model: nn.Module, buffers: bool) -> str:
    """A hash of all weights, bit by bit, and of the buffers if they are to be the same as well."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (*model.parameters(), *(model.buffers() if buffers else ())):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_elastic(config: Config) -> None:
    """ValueError unless the global batch and the penalty's strength do not follow the number of workers."""
    if config.data.global_batch_size is None:
        raise ValueError(
            "data.global_batch_size must be given where the number of workers may change, "
            f"got data.batch_size={config.data.batch_size} (images a worker)"
        )
    if config.regularizer.sub_batches is not None:
        raise ValueError(
            "regularizer.sub_batch_size must be given where the number of workers may change, "
            f"got regularizer.sub_batches={config.regularizer.sub_batches} (a worker)"
        )
    if config.data.backend == "webdataset":
        raise ValueError(
            "data.backend=webdataset keeps no order that another number of workers could continue: use dali"
        )
    if config.run_dir is None:
        raise ValueError("run_dir must be given where the number of workers may change: any worker may become rank 0")


def _restore_buffers(model: nn.Module, by_rank: list[dict[str, torch.Tensor]], world: World) -> None:
    """Give every worker the buffers that were its own within an epoch; at another number of workers, the mean."""
    if not by_rank:
        return
    if len(by_rank) == world.size:
        buffers = by_rank[world.rank]
    else:
        buffers = {k: torch.stack([b[k].double() for b in by_rank]).mean(0) for k in by_rank[0]}
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
