"""What benchmarks/chaos.py counts: of logs whose losses are known."""

import json
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.chaos import FAULTS, Step, count, free_ports, network, steps_of
from pipelines import Sampler

SAMPLER = Sampler(24, 12, seed=0, unit=4)
TRUTH = np.random.default_rng(0).integers(10, size=24)


def step(number: int, size: int, before: str, after: str, ranks: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """The lines of a step; of its end only those of some ranks, where the others were killed."""
    lines: list[dict[str, Any]] = []
    for rank in range(size):
        samples = SAMPLER.local_batch((number - 1) // 2, (number - 1) % 2, rank, size).samples
        line = {"step": number, "rank": rank, "size": size, "before": before}
        lines.append(line | {"labels": TRUTH[samples].tolist()})
        if ranks is None or rank in ranks:
            lines.append(line | {"after": after})
    return lines


def tally(folder: Path, *steps: list[dict[str, Any]], final: str) -> tuple[int, int, int, int]:
    """Steps of the final weights, others, samples lost, samples repeated."""
    log = folder / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for lines in steps for line in lines))
    found, others = steps_of(log, final)
    return len(found), others, *count(found, SAMPLER, TRUTH, epochs=2)


WHOLE = [step(1, 3, "a", "b"), step(2, 3, "b", "c"), step(3, 2, "c", "d"), step(4, 3, "d", "e")]


def test_a_run_that_lost_nothing(tmp_path: Path) -> None:
    assert tally(tmp_path, *WHOLE, final="e") == (4, 0, 0, 0)


def test_steps_that_were_taken_again(tmp_path: Path) -> None:
    """With other workers, and so with other weights: what they led to is not in the final ones."""
    abandoned = [step(2, 2, "b", "x"), step(3, 2, "x", "y", ranks=[0])]
    assert tally(tmp_path, WHOLE[0], *abandoned, *WHOLE[1:], final="e") == (4, 2, 0, 0)


@pytest.mark.parametrize("ended", [[0], [2], [0, 1]])
def test_a_worker_killed_after_its_step_and_before_its_line(ended: list[int], tmp_path: Path) -> None:
    assert tally(tmp_path, WHOLE[0], step(2, 3, "b", "c", ended), *WHOLE[2:], final="e") == (4, 0, 0, 0)


@pytest.mark.parametrize("ended", [[0], [0, 1]])
def test_a_step_begun_twice_from_the_same_weights(ended: list[int], tmp_path: Path) -> None:
    """Once by only some of its workers: its samples count once."""
    begun = step(2, 3, "b", "c", ended)[:-1]
    assert tally(tmp_path, WHOLE[0], begun, *WHOLE[1:], final="e") == (4, 1, 0, 0)


def test_a_worker_that_took_no_part(tmp_path: Path) -> None:
    without = [line for line in WHOLE[1] if line["rank"] != 1]
    assert tally(tmp_path, WHOLE[0], without, *WHOLE[2:], final="e") == (4, 0, 4, 0)


def test_a_sample_with_another_s_label(tmp_path: Path) -> None:
    wrong = json.loads(json.dumps(WHOLE[1]))
    wrong[0]["labels"][2] += 1
    assert tally(tmp_path, WHOLE[0], wrong, *WHOLE[2:], final="e") == (4, 0, 1, 0)


def test_weights_that_no_step_has_left(tmp_path: Path) -> None:
    """A step begins with other weights than the one before left, or the checkpoint holds others than the last left."""
    other = step(3, 2, "z", "d")
    assert tally(tmp_path, *WHOLE[:2], other, WHOLE[3], final="e") == (2, 2, 24, 0)
    assert tally(tmp_path, *WHOLE, final="f") == (0, 4, 48, 0)


def test_samples_repeated() -> None:
    labels = {rank: TRUTH[SAMPLER.local_batch(0, 0, rank, 3).samples].tolist() for rank in range(3)}
    one = Step(1, 3, "a", labels)
    assert count([one, one], SAMPLER, TRUTH, epochs=1) == (12, 12)


def test_ports_in_a_row_are_free() -> None:
    first = free_ports(3)
    for port in range(first, first + 3):
        socket.create_server(("127.0.0.1", port)).close()


def test_every_fault_is_drawn_and_the_network_has_buffers() -> None:
    assert all(fault.weight > 0 for fault in FAULTS.values())
    assert any("running_mean" in name for name, _ in network(10, 28).named_buffers())
