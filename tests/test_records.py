"""Records: what is written is read back, whatever cuts the file short, and a resumed run's file is that of one run."""

import errno
import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from infomcr_dist.records import (
    KINDS,
    CheckpointRecord,
    EpochRecord,
    EvaluationRecord,
    MetricRecord,
    NonfiniteRecord,
    Record,
    RecordWriter,
    RestartRecord,
    StepRecord,
    drop_after,
    last_step,
    of_kind,
    read_records,
)

STEP = StepRecord(
    step=1, epoch=1, phase="plain", loss=2.5, penalty=None, beta=None, num_penalized=None, gradient_norm=1.0,
    finite=True, learning_rate=0.1, samples=8, global_samples=16, world_size=2, data_errors=0,
    step_duration_seconds=0.5, data_wait_seconds=0.1, gradient_seconds=0.2, allreduce_wait_seconds=0.1,
    update_seconds=0.1, penalty_duration_seconds=None, allreduce_bytes=100,
)  # fmt: skip
SOME: list[Record] = [
    STEP,
    replace(STEP, step=2, phase="regularized", penalty=1e-4, beta=5.0, num_penalized=3, penalty_duration_seconds=0.1),
    NonfiniteRecord(2, ["loss of rank 0", "gradient of conv.weight"], 1),
    EvaluationRecord(2, 1, "test", 0.7, 0.25, 0.01, 70),
    MetricRecord(2, 1, -237.5, 16.0, 1.8, 0.3, 0.1, 10, 100, 0),
    EpochRecord(2, 1, 1, 2.25),
    CheckpointRecord(2, 2, "failed", 0.1, "no room: “disk”\nline"),
    RestartRecord(2, {"worker_lost": 2}, 3),
]


def write(path: Path, records: list[Record]) -> Path:
    writer = RecordWriter(path)
    for record in records:
        writer.log(record)
    writer.close()
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path / "records.jsonl", SOME)
    assert list(read_records(path)) == SOME
    assert of_kind(SOME, StepRecord) == SOME[:2]


def test_the_file_is_json_lines_of_one_version_that_anything_reads(tmp_path: Path) -> None:
    header, *lines = [json.loads(line) for line in write(tmp_path / "r", SOME).read_text().splitlines()]
    assert header == {"kind": "schema", "version": 1}
    for line, record in zip(lines, SOME, strict=True):
        assert KINDS[line.pop("kind")] is type(record)
        assert line == {field.name: getattr(record, field.name) for field in fields(record)}


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    record = replace(STEP, loss=math.nan, gradient_norm=math.inf, finite=False)
    path = write(tmp_path / "r", [record])
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    (read,) = read_records(path)
    assert isinstance(read, StepRecord)
    assert math.isnan(read.loss)
    assert math.isnan(read.gradient_norm)
    assert read.penalty is None, "absent, not a number that is missing"


def test_a_file_cut_short_at_any_byte_holds_the_whole_lines_before(tmp_path: Path) -> None:
    path = write(tmp_path / "r", SOME)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = max(0, sum(end <= size for end in ends) - 1)  # less the header
        assert list(read_records(path)) == SOME[:whole], size


BROKEN = ["", "{}", "[1]", "nothing", '{"kind": "step"}', '{"kind": "step", "step": 1, "x": 2}', "\0\0\0", "12",
          '{"kind": "unknown", "step": 1}', '{"kind": "schema", "version": 1}', '{"kind": "step", "st']  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
@pytest.mark.parametrize("kinds", [(), (StepRecord,)])
def test_a_line_that_is_no_record_is_skipped_and_named(
    line: str, kinds: tuple[type[Record], ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "r", SOME[:1])
    with path.open("a") as file:
        file.write(line + "\n")
    write(path, SOME[1:])
    reported: list[str] = []
    assert list(read_records(path, kinds, reported.append)) == [s for s in SOME if not kinds or isinstance(s, kinds)]
    if not kinds or "unknown" not in line:
        assert len(reported) <= 1
    if not kinds:
        assert reported[0].startswith(f"{path}: line 3 is not a record (")
        assert "\n" not in reported[0]
        drop_after(path, 2, True)
        assert list(read_records(path, report=reported.append)) == SOME
        assert last_step(path) == 2


@pytest.mark.parametrize("damage", [b"\0" * 30, b"", b"\xff\xfe", b'{"kind": "sch'])
def test_a_header_that_was_lost(damage: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "r", SOME)
    path.write_bytes(damage + path.read_bytes()[path.read_bytes().index(b"\n") :])
    reported: list[str] = []
    assert list(read_records(path, report=reported.append)) == SOME
    assert "line 1 is not a record" in reported[0]


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\0\n", b"{\n\n", b'{"kind": "step"'])
def test_the_last_step_is_that_of_the_last_whole_record(tail: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "r", SOME)
    with path.open("ab") as file:
        file.write(tail)
    assert last_step(path) == 2
    write(path, [replace(STEP, step=3)])
    assert (last_step(path), list(read_records(path, report=lambda line: None))) == (3, [*SOME, replace(STEP, step=3)])


def test_a_full_disk_drops_records_and_counts_them(tmp_path: Path) -> None:
    writer = RecordWriter(Path("/dev/full"))
    for record in SOME:
        writer.log(record)
    writer.close()
    assert (writer.dropped, writer.error and writer.error.errno) == (len(SOME), errno.ENOSPC)


def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """The limit of a file's size stands for it: the write that meets it is cut short, those after it fail."""
    rooms = (0, 20, 40, 700, 1000)
    script = f"""
import pathlib, resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_records import SOME, RecordWriter
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for room in {rooms}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    writer = RecordWriter(pathlib.Path({str(tmp_path)!r}, str(room)))
    for i, record in enumerate(SOME):
        if i == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.log(record)
    writer.close()
    print(writer.dropped)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for room, line in zip(rooms, done.stdout.split(), strict=True):
        read, dropped = list(read_records(tmp_path / str(room), report=lambda line: None)), int(line)
        assert dropped > 0
        assert read == [*SOME[: 5 - dropped], *SOME[5:]], room


def test_another_version_and_no_file(tmp_path: Path) -> None:
    for header in ({"kind": "schema", "version": 2}, {"kind": "step", "step": 1}):
        (tmp_path / "r").write_text(json.dumps(header) + "\n")
        with pytest.raises(ValueError, match="records of another version than 1"):
            list(read_records(tmp_path / "r"))
    with pytest.raises(ValueError, match=r"missing cannot be read: No such file"):
        list(read_records(tmp_path / "missing"))


def test_a_writer_continues_a_file(tmp_path: Path) -> None:
    write(tmp_path / "r", SOME[:2])
    write(tmp_path / "r", SOME[2:])
    assert list(read_records(tmp_path / "r")) == SOME


def after(path: Path, step: int, evaluated: bool) -> list[Any]:
    drop_after(path, step, evaluated)
    return list(read_records(path))


def test_a_resumed_run_drops_what_it_does_again(tmp_path: Path) -> None:
    later = [replace(STEP, step=3), EpochRecord(3, 2, 2, 1.0)]
    path = write(tmp_path / "r", [*SOME, *later])
    assert after(path, 2, True) == SOME
    kinds = (EvaluationRecord, MetricRecord, EpochRecord)
    assert after(path, 2, False) == [record for record in SOME if not isinstance(record, kinds)]
    assert after(path, 1, True) == SOME[:1]
    assert after(path, 0, True) == []
    path.write_bytes(write(tmp_path / "other", SOME).read_bytes()[:-5])
    assert after(path, 2, True) == SOME[:-1], "a line that was cut short goes"
    write(path, [replace(STEP, step=3)])
    assert list(read_records(path)) == [*SOME[:-1], replace(STEP, step=3)]
    drop_after(tmp_path / "missing", 2, True)
    assert not (tmp_path / "missing").exists()
