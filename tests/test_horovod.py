"""Real Horovod workers against one serial process, and what each step sends."""

import json
import sys
from typing import Any

import pytest
from conftest import WORKERS, horovodrun

ESTIMATORS = ("fused", "sampled", "reference")


@pytest.fixture(scope="module", params=[2, 3], ids=lambda n: f"{n} workers")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("collectives")
    result = horovodrun(request.param, sys.executable, str(WORKERS / "collectives.py"), str(output), cwd=output)
    assert result.returncode == 0, result.stdout + result.stderr
    reports = [json.loads((output / f"{rank}.json").read_text()) for rank in range(request.param)]
    assert [r["size"] for r in reports] == [request.param] * request.param
    return reports


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_workers_equal_one_process_on_the_union_of_their_sub_batches(
    reports: list[dict[str, Any]], estimator: str
) -> None:
    for report in reports:
        assert report[f"difference {estimator}"] < 1e-10


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_regularized_step_sends_what_a_plain_step_sends(reports: list[dict[str, Any]], estimator: str) -> None:
    for report in reports:
        plain, regularized = report[f"sent {estimator}"]
        assert len(regularized) == len(set(regularized)), "one allreduce a parameter"
        assert regularized == plain, "the same names and bytes"


def test_an_uneven_global_batch_gives_the_mean_over_its_images(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["difference remainder"] < 1e-12


def test_collectives(reports: list[dict[str, Any]]) -> None:
    size = len(reports)
    for report in reports:
        assert report["running mean"] == pytest.approx([(size - 1) / 2] * 3)
        assert report["batches tracked"] == 0
        assert report["sum"] == [size * (size + 1) / 2, size * 0.5]
        assert report["broadcast"] == {"rank": 0}


def test_a_mistake_on_one_worker_ends_all(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["synchronized"] == [f"trouble on rank {len(reports) - 1}", True]
