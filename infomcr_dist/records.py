"""The records of a run: one typed schema, one writer, one reader.

``records.jsonl`` in a run's directory begins with the schema's version; each further line is one record as JSON, with
the record's ``kind``. A process that is killed loses no line. Nothing about the file ends a run: what the disk does not
take is dropped and counted, and lines that are no records are skipped when read, each named once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, TypeVar, get_type_hints

from infomcr_dist.checkpoint import write_atomically

VERSION = 1
FILE = "records.jsonl"
Phase = Literal["plain", "regularized"]
Weights = Literal["current", "averaged"]


@dataclass(frozen=True)
class Record:
    """What every record has."""

    kind: ClassVar[str]
    step: int
    """Updates done so far, of all epochs"""


@dataclass(frozen=True)
class StepRecord(Record):
    """One update, as rank 0 saw it; waits are part of ``step_duration_seconds``."""

    kind = "step"
    epoch: int
    phase: Phase
    loss: float
    """L(B, w) of the global batch"""
    penalty: float | None
    """R of the global batch (Jia & Su 2020, Eq. 7, or of another regularizer.method), before β"""
    beta: float | None
    """β of the schedule"""
    num_penalized: int | None
    """Sub-batches of this rank whose penalty was taken; None before the regularizer is on"""
    gradient_norm: float
    """2-norm of the averaged, regularized gradient, before clipping"""
    finite: bool
    """Whether loss, penalty and gradient were; if not, every rank skipped the update"""
    learning_rate: float
    samples: int
    """Images of this rank"""
    global_samples: int
    """Images of all ranks"""
    world_size: int
    data_errors: int
    """Samples replaced by others because they could not be read (data.on_error=skip)"""
    step_duration_seconds: float
    data_wait_seconds: float
    gradient_seconds: float
    """The forward and backward passes of this rank"""
    allreduce_wait_seconds: float
    """From its last backward pass to the averaged gradient"""
    update_seconds: float
    """Of the weights, the check for finite numbers included"""
    penalty_duration_seconds: float | None
    """Of a regularized step: its gradient_seconds beyond the median of the plain steps; None before there was one"""
    allreduce_bytes: int


@dataclass(frozen=True)
class RegularizerOnRecord(Record):
    """The regularizer was switched on."""

    kind = "regularizer_on"
    epoch: int
    learning_rate: float


@dataclass(frozen=True)
class OverheadRecord(Record):
    """Median regularized step over median plain step, once there are enough of both."""

    kind = "overhead"
    overhead_ratio: float


@dataclass(frozen=True)
class OverheadBudgetRecord(Record):
    """What regularizer.overhead_budget asks for, and what is measured."""

    kind = "overhead_budget"
    overhead_budget_ratio: float
    overhead_ratio: float | None = None
    mean_penalized: float | None = None
    """κ, the mean number of penalized sub-batches"""


@dataclass(frozen=True)
class FiniteDifferenceRecord(Record):
    """Relative difference of the two derivatives of the penalty on one sub-batch."""

    kind = "finite_difference"
    finite_difference_error: float


@dataclass(frozen=True)
class NonfiniteRecord(Record):
    """A step that was skipped on every worker."""

    kind = "nonfinite"
    what: list[str]
    """Which loss, penalty or gradient, of which rank or parameter"""
    in_a_row: int


@dataclass(frozen=True)
class EvaluationRecord(Record):
    """Errors over a split."""

    kind = "evaluation"
    epoch: int
    split: Literal["train", "test"]
    loss: float
    """Mean cross entropy, nats"""
    top1_error_ratio: float
    top5_error_ratio: float
    samples: int
    weights: Weights = "current"
    """averaged: by the section averaging"""


@dataclass(frozen=True)
class MetricRecord(Record):
    """An estimate of γ̂ (Eq. 6)."""

    kind = "metric"
    epoch: int
    gamma_hat: float
    gamma_hat_standard_error: float
    gamma_hat_cost_seconds: float
    fisher_trace: float
    fisher_spectral_radius: float
    trials: int
    samples: int
    """Training images a trial (N')"""
    gamma_hat_singular_trials: int
    weights: Weights = "current"


@dataclass(frozen=True)
class EpochRecord(Record):
    """The end of an epoch."""

    kind = "epoch"
    epoch: int
    epochs_completed: int
    training_loss: float


@dataclass(frozen=True)
class CheckpointRecord(Record):
    """A checkpoint that was written, or failed."""

    kind = "checkpoint"
    saved_step: int
    outcome: Literal["written", "failed"]
    checkpoint_duration_seconds: float
    error: str | None


@dataclass(frozen=True)
class RestartRecord(Record):
    """An elastic world was restarted at another size."""

    kind = "restart"
    elastic_restarts: dict[str, int]
    """Restarts so far, by reason"""
    world_size: int


@dataclass(frozen=True)
class EndRecord(Record):
    """The end of the run."""

    kind = "end"
    plain_step_seconds: float | None
    """Median"""
    regularized_step_seconds: float | None
    """Median"""


KINDS: dict[str, type[Record]] = {
    record.kind: record
    for record in (
        *(StepRecord, RegularizerOnRecord, OverheadRecord, OverheadBudgetRecord, FiniteDifferenceRecord),
        *(NonfiniteRecord, EvaluationRecord, MetricRecord, EpochRecord, CheckpointRecord, RestartRecord, EndRecord),
    )
}
_AFTER_THE_LAST_STEP = (EvaluationRecord, MetricRecord, EpochRecord)
"""Records that follow an epoch's last step."""
R = TypeVar("R", bound=Record)
_LAST_BYTES = 65_536
"""More than any record has."""
_HEADER = json.dumps({"kind": "schema", "version": VERSION}) + "\n"
_BEGINNING = '{"kind": "'
_NO_RECORD = (ValueError, TypeError, AttributeError, KeyError)
"""What reading a line that is no record raises"""


class RecordWriter:
    """Appends records to a file, each in one write: a killed process loses none.

    Args:
        path: the file, a new one or one of this version.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
        self._before = b"\n" * _is_cut(path) if path.stat().st_size else _HEADER.encode()
        """What the next line needs before it"""
        self.dropped = 0
        """Records that could not be written"""
        self.error: OSError | None = None
        """Why, of the last of them"""
        self._write("")

    def log(self, record: Record) -> None:
        """Append one record; it is dropped where the disk is full or the file cannot be written."""
        self.dropped += not self._write(_line(record))

    def _write(self, line: str) -> bool:
        """Whether all was written; what the disk does not take whole is left as a line that is no record."""
        data = self._before + line.encode()
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            return False
        if written:
            self._before = b"" if written == len(data) else b"\n"
        return written == len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _is_cut(path: Path) -> bool:
    """Whether the last line of a file that is not empty has no end."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_records(
    path: Path, kinds: tuple[type[Record], ...] = (), report: Callable[[str], None] = _to_stderr
) -> Iterator[Record]:
    """The records of a file, in order; a last line that was cut short is ignored.

    Args:
        path: the file.
        kinds: yield these alone, which is many times faster where they exclude the steps; empty: all.
        report: called with a line that names the file and the first of its lines that are no records, if any are.

    Raises:
        ValueError: the file is missing or has another version; the message names it.
    """
    beginnings = tuple(json.dumps({"kind": kind.kind})[:-1] for kind in kinds)
    skipped: list[tuple[int, str]] = []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    break
                if beginnings and number > 1 and line.startswith(_BEGINNING) and not line.startswith(beginnings):
                    continue
                try:
                    content = json.loads(line)
                    kind = content.pop("kind")
                    record = _record(KINDS[kind], content) if number > 1 else None
                except _NO_RECORD as error:
                    skipped.append((number, " ".join(repr(error).split())))
                    continue
                if record is None and (kind != "schema" or content.get("version") != VERSION):
                    raise ValueError(
                        f"{path} has records of another version than {VERSION}: use the release that wrote them"
                    )
                if record is not None and (not kinds or isinstance(record, kinds)):
                    yield record
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if skipped:
        more = f", and {len(skipped) - 1} more," if len(skipped) > 1 else ""
        report(f"{path}: line {skipped[0][0]} is not a record ({skipped[0][1][:100]}){more}: skipped")


def last_step(path: Path) -> int:
    """The step of a file's last whole record, read from its end alone; 0 where there is none yet."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LAST_BYTES))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except _NO_RECORD:  # the schema, or a line that was cut
            continue
    return 0


def of_kind(records: list[Record], kind: type[R]) -> list[R]:
    """The records of one kind, in order."""
    return [record for record in records if isinstance(record, kind)]


def drop_after(path: Path, step: int, epoch_evaluated: bool) -> list[Record]:
    """Drop the records of what a resumed run does again, if there is a file; returns them.

    Args:
        path: the file.
        step: the step the run resumes after.
        epoch_evaluated: whether what follows an epoch's last step (evaluation, metric) is done as well.
    """
    kept: list[Record] = []
    dropped: list[Record] = []
    if not path.exists():
        return dropped
    for record in read_records(path):
        follows = record.step == step and isinstance(record, _AFTER_THE_LAST_STEP) and not epoch_evaluated
        (dropped if record.step > step or follows else kept).append(record)
    text = _HEADER + "".join(_line(record) for record in kept)
    write_atomically(path, lambda file: file.write(text.encode()))
    return dropped


def finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON lacks; dictionaries and lists all through."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Record) -> str:
    return json.dumps({"kind": record.kind, **finite(asdict(record))}) + "\n"


def _record(kind: type[Record], content: dict[str, Any]) -> Record:
    """The record of its fields; null stands for NaN where a number is needed."""
    for name in _numbers(kind):
        if content[name] is None:
            content[name] = math.nan
    return kind(**content)


def _numbers(kind: type[Record]) -> tuple[str, ...]:
    if kind not in _NUMBERS:
        hints = get_type_hints(kind)
        _NUMBERS[kind] = tuple(field.name for field in fields(kind) if hints[field.name] is float)
    return _NUMBERS[kind]


_NUMBERS: dict[type[Record], tuple[str, ...]] = {}
