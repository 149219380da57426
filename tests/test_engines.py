"""Real workers of every engine against one serial process and against each other, and what each step sends."""

import json
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ENGINES, WORKERS, launch, needs_horovod

from infomcr_dist.study import jobs

ESTIMATORS = ("fused", "sampled", "reference", "sam")
JOBS = [(engine, workers) for workers in (2, 3) for engine in ENGINES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collectives")


@pytest.fixture(scope="module")
def job(folder: Path) -> Any:
    """What each rank of so many workers on an engine reports; each job is run once."""

    def of(engine: str, workers: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        output = folder / f"{engine}-{workers}"
        if not output.exists():
            output.mkdir()
            command = [sys.executable, str(WORKERS / "collectives.py"), str(output)]
            result = launch(workers, *command, cwd=output, engine=engine)
            assert result.returncode == 0, result.stdout + result.stderr
        reports = [json.loads((output / f"{rank}.json").read_text()) for rank in range(workers)]
        return reports, [torch.load(output / f"{rank}.pt", weights_only=True) for rank in range(workers)]

    return of


@pytest.fixture(scope="module", params=JOBS, ids=lambda job: f"{job[0]}, {job[1]} workers")
def reports(request: pytest.FixtureRequest, job: Any) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = job(*request.param)[0]
    engine, workers = request.param
    for rank, report in enumerate(reports):
        assert (report["engine"], report["size"], report["ranks"]) == (engine, workers, [rank, rank, workers])
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
        assert len(regularized) > 1
        assert regularized == plain, "the same allreduces"
        weights = 3 * 6 * 9 + 6 + (2 * 6 if estimator in ("fused", "sam") else 0) + 24 * 5 + 5
        assert sum(int(sent.split()[-1]) for sent in regularized) == 8 * weights, "every gradient once"


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


def test_a_worker_that_waits_leaves_the_processor_to_others(reports: list[dict[str, Any]]) -> None:
    assert all(report["busy seconds"] < 0.1 for report in reports)


def test_a_mistake_on_one_worker_ends_all(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["synchronized"] == [f"trouble on rank {len(reports) - 1}", True]


def test_no_thread_of_gloo_outlives_its_world(tmp_path: Path) -> None:
    """However a command ends: one that frees a tensor while the interpreter exits would abort the process."""
    command = [sys.executable, str(WORKERS / "leaving.py"), str(tmp_path)]
    result = launch(2, *command, cwd=tmp_path, engine="torch")
    assert result.returncode == 0, result.stdout + result.stderr
    for rank, last in enumerate((1, 2)):
        codes, during, after = zip(*json.loads((tmp_path / f"{rank}.json").read_text()), strict=True)
        assert codes == (0, 75, 2, last)
        assert all(during)
        assert not any(after)


@pytest.mark.parametrize(
    ("installed", "beginning"),
    [
        (("horovodrun", "torchrun"), ["horovodrun", "-np", "3"]),
        (("torchrun",), ["torchrun", "--standalone", "--no-python", "--nproc-per-node", "3"]),
        ((), None),
    ],
)
def test_a_study_starts_workers_with_a_launcher_that_is_installed(
    installed: tuple[str, ...], beginning: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in installed:
        (tmp_path / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jobs.launcher(1) == []
    if beginning is None:
        with pytest.raises(ValueError, match="workers=3 needs horovodrun or torchrun in the PATH"):
            jobs.launcher(3)
    else:
        assert jobs.launcher(3) == [str(tmp_path / beginning[0]), *beginning[1:]]


@needs_horovod
@pytest.mark.parametrize("launcher", ["serving", "frozen"])
def test_a_launcher_is_gone_when_nobody_answers_any_more(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that closes idle connections is there, and one that is stopped; the kernel answers for it."""
    from infomcr_dist.engines import horovod

    sleep = time.sleep
    monkeypatch.setattr(horovod, "time", SimpleNamespace(sleep=lambda _: sleep(0.01)))
    server = socket.create_server(("127.0.0.1", 0))
    connections = 0

    def serve() -> None:
        nonlocal connections
        with suppress(OSError):
            while True:
                server.accept()[0].close()
                connections += 1

    if launcher == "serving":
        threading.Thread(target=serve, daemon=True).start()
    watch = horovod._Launcher("127.0.0.1", server.getsockname()[1])
    end = time.monotonic() + 30
    while launcher == "serving" and connections < 20 and time.monotonic() < end:
        sleep(0.01)
    sleep(0.2)
    assert not watch.gone
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    while not watch.gone and time.monotonic() < end:
        sleep(0.01)
    assert watch.gone


@pytest.mark.skipif(len(ENGINES) < 2, reason="only one engine is installed")
@pytest.mark.parametrize("workers", [2, 3])
def test_a_hundred_steps_are_the_same_on_either_engine(job: Any, workers: int) -> None:
    """Plain and regularized, momentum, clipping and workers without images included: the mean of two is exact."""
    one, *others = [states for engine in ENGINES for states in job(engine, workers)[1]]
    for other in others:
        for estimator, state in one.items():
            for name, tensor in state.items():
                if workers == 2:
                    assert torch.equal(tensor, other[estimator][name]), (estimator, name)
                else:
                    torch.testing.assert_close(tensor, other[estimator][name], rtol=1e-3, atol=1e-4)
