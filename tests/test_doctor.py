"""The doctor: every check is ok on what is sound, and fails with the remedy on each thing that is broken."""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENGINES, ROOT, launch, needs_horovod

from benchmarks.chaos import free_ports
from benchmarks.hosts import hosts, missing
from infomcr_dist import models
from infomcr_dist.config import Config, TelemetrySettings
from infomcr_dist.doctor import __main__ as command
from infomcr_dist.doctor import disk, examine, memory, network, software
from infomcr_dist.doctor.results import Result, lines, show
from infomcr_dist.experiment import open_experiment
from infomcr_dist.step import PenaltySettings, StepResult, train_step
from infomcr_dist.world import SingleProcess
from pipelines.options import load

LINE = re.compile(r"^(?:\[\d+\]<stdout>:)?(ok  |FAIL)  (.{15}) (.*)$")
HOROVOD = {"horovod", "nccl"} if "horovod" in ENGINES else set()
ALONE = {"torch", *HOROVOD, "gpus", "recipe", "data", "model", "run directory", "telemetry port", "host name",
         "clock", "allreduce", "memory", "preflight"}  # fmt: skip


def parse(output: str) -> list[Result]:
    found = [LINE.match(line) for line in output.splitlines()]
    return [Result(m[2].strip(), m[1] == "ok  ", m[3]) for m in found if m]


def alone(*arguments: str, cwd: Path) -> tuple[int, list[Result], str]:
    command = [sys.executable, "-m", "infomcr_dist.doctor", *arguments]
    done = subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, parse(done.stdout), done.stdout + done.stderr


@contextmanager
def taken_port(offset: int = 0) -> Iterator[int]:
    """A port P such that P + offset is in use, and those before it are free."""
    port = free_ports(offset + 1)
    with socket.create_server(("127.0.0.1", port + offset)):
        yield port


def small(data: Path) -> list[str]:
    return [f"data.path={data}", "data.batch_size=32", "telemetry.port=null"]


@pytest.fixture(scope="session")
def own_data(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to break."""
    copy = tmp_path_factory.mktemp("broken") / "data"
    shutil.copytree(small_data, copy)
    return copy


def test_all_is_ok_on_what_is_sound(small_data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(models.build("resnet20", 6, 32).state_dict(), weights)
    settings = [*small(small_data), "model=resnet20", f"init_from={weights}", "telemetry.logger=tensorboard"]
    code, results, output = alone(*settings, cwd=tmp_path)
    assert code == 0, output
    assert {r.check for r in results} == ALONE | {"init_from", "logger"}
    assert all(r.ok for r in results), output
    assert "\x1b" not in output, "colours are for terminals"
    assert list(tmp_path.iterdir()) == [weights], "nothing is left behind"


def test_initial_weights_of_another_network_and_a_logger_that_is_not_installed_fail(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(models.build("resnet20", 6, 32).state_dict(), weights)
    config = load(Config, None, [*small(small_data), "model=cnn", f"init_from={weights}", "telemetry.logger=wandb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {result.check: result for result in examine(config, "default", SingleProcess())}
    assert not found["init_from"].ok
    assert re.match(r"init_from: .*weights\.pt .*: give weights of model=cnn", found["init_from"].text)
    assert not found["logger"].ok
    assert found["logger"].text.endswith("pip install 'infomcr_dist[wandb]'")
    assert found["model"].ok


def test_broken_things_fail_each_by_itself(own_data: Path, tmp_path: Path) -> None:
    shard = sorted((own_data / "train").glob("*.tar"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1024])
    (tmp_path / "file").write_text("")
    try:
        with taken_port() as port:
            arguments = [f"data.path={own_data}", f"run_dir={tmp_path / 'file' / 'run'}", f"telemetry.port={port}"]
            code, results, output = alone(*arguments, cwd=tmp_path)
    finally:
        shard.write_bytes(whole)
    assert code == 1
    red = {r.check: r.text for r in results if not r.ok}
    assert red.keys() == {"data", "run directory", "telemetry port"}, output
    assert f"shard {shard} has {len(whole) - 1024} bytes where its index says {len(whole)}" in red["data"]
    assert "give another run_dir" in red["run directory"]
    assert str(port) in red["telemetry port"]
    assert "give another telemetry.port" in red["telemetry port"]
    assert {r.check for r in results if r.ok} == ALONE - red.keys() - {"model", "memory", "preflight"}, (
        "what needs no data is checked"
    )


def test_a_batch_that_does_not_fit_fails(small_data: Path, tmp_path: Path) -> None:
    code, results, output = alone(*small(small_data), "data.image_size=30000", "model=cnn", cwd=tmp_path)
    assert code == 1
    red, *more = [r for r in results if not r.ok]
    assert not more
    assert red.check == "memory", output
    assert "lower data.batch_size" in red.text


def test_a_step_that_outgrows_its_room_or_is_killed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def try_model(model: str) -> None:
        trial = memory.Trial(replace(Config(), model=model), classes=6, image_size=1000, images=200)  # 2.4 GB of images
        memory.try_step(trial, local_rank=0, threads=1, room=10**9)

    too_large = r"a plain step of 200 images of 1000 × 1000 does not fit .*1\.00 GB free per worker"
    with pytest.raises(ValueError, match=too_large):
        try_model("cnn")
    (tmp_path / "heavy.py").write_text("import os, signal\ndef build(**_): os.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"its process was killed.*lower data\.batch_size"):
        try_model("heavy:build")
    (tmp_path / "wrong.py").write_text("def build(**_): raise TypeError('no such layer')\n")
    with pytest.raises(ValueError, match="cannot be built: TypeError: no such layer"):
        try_model("wrong:build")


ACTIVATIONS = """
import torch
from torch import nn

class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        ctx.save_for_backward(images.new_empty(len(images), 2_500_000))
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient

class Activations(nn.Module):
    def forward(self, images):
        return Keep.apply(images)

def build(classes, image_size):
    pixels = nn.Conv2d(3, classes, 1), Activations()
    return nn.Sequential(*pixels, nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
"""A network that keeps 10 MB per image for the backward pass, as address space, which is what RLIMIT_DATA limits: no
time is spent on it."""
ROOM = 1_500_000_000
"""Less than 256 images need at once (2.56 GB), more than 16 at once (0.16 GB, with the penalty twice that) and a
process that has imported torch (0.23 GB)."""


@pytest.fixture
def activations(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of such a network, on batches of 256 images in sub-batches of 16."""
    (tmp_path / "activations.py").write_text(ACTIVATIONS)
    monkeypatch.syspath_prepend(tmp_path)
    data = [f"data.path={small_data}", "data.batch_size=256", "data.drop_last=true"]
    return [*data, "model=activations:build", "threads=1", "schedule.milestones=[5]", "regularizer.sub_batch_size=16"]


def check_memory(settings: list[str]) -> Result:
    results: list[Result] = []
    memory.check_memory(results, open_experiment(load(Config, None, settings), 1), SingleProcess(), ROOM)
    (result,) = results
    return result


@pytest.mark.parametrize("regularizer", ["when=never", "estimator=reference"])
def test_a_batch_that_fits_in_pieces_is_ok(activations: list[str], regularizer: str) -> None:
    settings = [*activations, f"regularizer.{regularizer}"]
    result = check_memory([*settings, "data.max_batch_size=16"])
    assert result.ok, result.text
    assert "a plain step of 256 images takes" in result.text
    assert ("a regularized step" in result.text) == (regularizer != "when=never")
    whole = check_memory(settings)
    assert not whole.ok, "the room is too large for the test to show anything"
    assert "give data.max_batch_size" in whole.text


def test_plain_steps_before_the_regularizer_is_on_must_fit(activations: list[str]) -> None:
    regularized = check_memory([*activations, "regularizer.when=always"])
    assert regularized.ok, regularized.text
    assert "plain" not in regularized.text
    result = check_memory([*activations, "regularizer.when=after_drop"])
    assert not result.ok, result.text
    assert result.text.startswith("a plain step of 256 images of 16 × 16 does not fit the memory (1.50 GB free")


NEVER, ALWAYS = ["regularizer.when=never"], ["regularizer.when=always"]
BUDGET = ["regularizer.estimator=sampled", "regularizer.overhead_budget=1.2"]


@pytest.mark.parametrize(
    ("settings", "plain", "regularized"),
    [
        (["schedule.milestones=[5]"], 32, 32),
        (["schedule.kind=constant"], 32, None),
        (["schedule.kind=plateau", "schedule.patience=9"], 32, None),
        (["schedule.kind=plateau", "schedule.patience=8"], 32, 32),
        (["schedule.kind=cosine"], 32, 32),
        (["regularizer.when=from_epoch", "regularizer.epoch=0"], 4, 32),
        (["regularizer.when=from_epoch", "regularizer.epoch=2.5"], 32, 32),
        (["regularizer.when=from_epoch", "regularizer.epoch=10"], 32, None),
        (NEVER, 32, None),
        (ALWAYS, 4, 32),
        ([*ALWAYS, "data.drop_last=true"], None, 32),
        ([*ALWAYS, "regularizer.sub_batch_size=4"], None, 32),
        ([*ALWAYS, *BUDGET, "data.drop_last=true"], 32, 32),
        ([*ALWAYS, "data.batch_size=512"], 260, None),
    ],
    ids=str,
)
def test_the_largest_step_of_each_kind_is_tried(
    small_data: Path, settings: list[str], plain: int | None, regularized: int | None
) -> None:
    given = [f"data.path={small_data}", "data.batch_size=32", "regularizer.sub_batch_size=16", *settings]
    trials = memory.trials(open_experiment(load(Config, None, given), 1))
    assert {trial.penalty is not None: trial.images for trial in trials} == {
        kind: images for kind, images in ((False, plain), (True, regularized)) if images is not None
    }
    assert all(trial.penalty is None or trial.penalty.num_sampled == (1 if BUDGET[0] in settings else None)
               for trial in trials)  # fmt: skip


def test_the_largest_share_of_all_ranks_is_tried(small_data: Path) -> None:
    given = [f"data.path={small_data}", "data.global_batch_size=80", "regularizer.sub_batch_size=16"]
    trials = memory.trials(open_experiment(load(Config, None, [*given, *ALWAYS]), 3))
    assert [trial.images for trial in trials] == [7, 32], "20 images of three ranks, and 5 sub-batches"


def test_the_step_is_the_trainers(activations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def spy(*arguments: object, **settings: object) -> StepResult:
        taken.append(settings)
        result = train_step(*arguments, **settings)  # type: ignore[arg-type]
        assert result.finite
        return result

    monkeypatch.setattr(memory, "train_step", spy)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    given = [*activations, "precision=bf16", "optimizer.clip_gradient_norm=2", "data.max_batch_size=4"]
    penalty = PenaltySettings(alpha=1e-3, beta=2.0, sub_batch_size=4)
    trial = memory.Trial(load(Config, None, given), classes=6, image_size=16, images=8, penalty=penalty)
    cost = memory.step_cost(trial, local_rank=0, threads=torch.get_num_threads(), room=10**9)
    expected = {"loss_scale": 1.0, "penalty": penalty, "bf16": True, "clip_gradient_norm": 2.0, "max_batch_size": 4}
    assert taken == [expected] * 2, "the second has the optimizer's state"
    assert cost.seconds > 0
    assert cost.peak_bytes > 10**8


@pytest.mark.parametrize("engine", ENGINES)
def test_every_worker_is_checked(small_data: Path, tmp_path: Path, engine: str) -> None:
    with taken_port(offset=1) as port:
        arguments = [f"data.path={small_data}", "data.batch_size=32", f"telemetry.port={port}"]
        command = [sys.executable, "-m", "infomcr_dist.doctor", *arguments]
        done = launch(2, "env", f"PYTHONPATH={ROOT}", *command, cwd=tmp_path, engine=engine)
    results = parse(done.stdout)
    assert done.returncode == 1, done.stderr
    assert {r.check for r in results} == ALONE - ({"torch"} if engine == "horovod" else HOROVOD)
    red, *more = [r for r in results if not r.ok]
    assert not more
    assert red.check == "telemetry port"
    assert red.text.startswith(f"rank 1: {port + 1} on 127.0.0.1")
    checks = [r.check for r in results]
    assert [c for c in checks if checks.count(c) > 1] == ["telemetry port"] * 2, "what is the same is reported once"
    texts = {r.check: r.text for r in results}
    assert re.match(r"64 MB in \S+ ms, \d+\.\d\d GB/s", texts["allreduce"])
    assert "32 images per worker and step" in texts["data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "recipe missing.yaml does not exist"),
        (["epochs=many"], "epochs must be a whole number"),
        (["a.yaml", "b.yaml"], "give one recipe, then key=value settings, got a.yaml b.yaml"),
    ],
)
def test_bad_arguments_end_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOROVOD_RANK", raising=False)
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_message_has_the_path_of_a_deleted_shard(own_data: Path) -> None:
    config = load(Config, None, small(own_data))
    assert "train 260 in 3 shards" in disk.describe_data(open_experiment(config, 2))
    shard = sorted((own_data / "test").glob("*.tar"))[0]
    content = shard.read_bytes()
    shard.unlink()
    try:
        with pytest.raises(ValueError, match=f"{shard} cannot be opened"):
            open_experiment(config, 2)
    finally:
        shard.write_bytes(content)


def test_a_recipe_that_does_not_fit_the_workers_fails(small_data: Path) -> None:
    config = load(Config, None, [f"data.path={small_data}", "data.global_batch_size=2"])
    with pytest.raises(ValueError, match="at least the number of workers"):
        open_experiment(config, 3)


def test_a_directory_that_is_not_ours_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    config = load(Config, None, [f"run_dir={tmp_path / 'run'}"])
    if os.geteuid() == 0:  # root writes everywhere but into a file system that is read-only
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(tmp_path)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("root may not mount here, and is refused by nothing else")
    try:
        with pytest.raises(ValueError, match="cannot be written"):
            disk.check_directory(config, None)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(tmp_path)], check=True)
        tmp_path.chmod(0o755)


def test_space() -> None:
    needed = 3 * 10**9 + (64 << 20)
    assert "3.07 GB needed for 2 + 1 checkpoints" in disk.judge_space(needed, 10**9, keep=2)
    with pytest.raises(ValueError, match="make room"):
        disk.judge_space(needed - 1, 10**9, keep=2)


def test_names_of_hosts() -> None:
    for address in ("127.0.1.1", "127.0.0.1", "::1"):
        with pytest.raises(ValueError, match=f"node1 calls itself {address}.*/etc/hosts"):
            network.judge_name("node1", address, hosts=2)
        network.judge_name("node1", address, hosts=1)
    for address in ("10.0.0.1", "fe80::1%eth0", "2001:db8::1"):
        network.judge_name("node1", address, hosts=2)


def test_reaching_other_hosts() -> None:
    with taken_port() as port:
        free = free_ports()
        assert network.reach([("a", "127.0.0.1", port)]) == "1 other host reached"
        with pytest.raises(ValueError, match=r"not reached: b at 127\.0\.0\.1 \(Connection refused\)"):
            network.reach([("a", "127.0.0.1", port), ("b", "127.0.0.1", free)])


def test_a_name_that_does_not_resolve_fails_before_horovod_aborts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("HOROVOD_RANK", "3")
    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr(command, "run_in_world", lambda *_, **__: pytest.fail("it must not connect"))
    assert command.main([]) == 1
    assert re.match(r"FAIL  host name +rank 3: .*does not resolve", capsys.readouterr().out)


def test_a_worker_that_cannot_join_or_loses_the_others_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Alone(SingleProcess):
        """Another worker dies after the arguments are checked."""

        exit_errors = (ConnectionError,)
        gathered = 0

        def gather(self, value: object) -> list[object]:
            self.gathered += 1
            if self.gathered > 1:
                raise ConnectionError("reset by peer")
            return [value]

    def broken(*_: object, **__: object) -> int:
        raise ImportError("undefined symbol")

    monkeypatch.delenv("HOROVOD_RANK", raising=False)
    monkeypatch.setattr(command, "run_in_world", broken)
    assert command.main([]) == 1
    assert re.match(r"FAIL  horovod .*cannot join .*\(ImportError: undefined symbol\)", capsys.readouterr().out)
    monkeypatch.setattr(command, "run_in_world", lambda body, **_: body(Alone()))
    monkeypatch.setattr(command, "examine", lambda *_: [])
    assert command.main([]) == 1
    assert re.match(r"FAIL  workers .*rank 0 lost the others .*\(reset by peer\)", capsys.readouterr().out)
    monkeypatch.setattr(command, "examine", broken)
    with pytest.raises(ImportError, match="undefined symbol"):
        command.main([])


def test_processes_of_another_launcher_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HOROVOD_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert command.main([]) == 2
    assert "without MASTER_ADDR and MASTER_PORT (WORLD_SIZE=2)" in capsys.readouterr().err


def test_clocks() -> None:
    assert network.judge_clocks([0.0]) == "one process"
    assert "rank 2's is -0.900 s" in network.judge_clocks([0.0, 0.5, -0.9])
    with pytest.raises(ValueError, match=r"rank 1's is \+1\.100 s .*NTP"):
        network.judge_clocks([0.0, 1.1, -0.2])


def test_gpus_and_nccl() -> None:
    assert "2 of them idle" in software.judge_gpus(["A"] * 4, 2, "13.0")
    assert software.judge_gpus(["A"] * 3 + ["B"], 4, "13.0") == "3 × A, 1 × B"
    with pytest.raises(ValueError, match="fewer than the 3 ranks"):
        software.judge_gpus(["A"] * 2, 3, "13.0")
    assert "sees no GPU" in software.judge_gpus([], 2, "13.0")
    assert software.judge_nccl(True, 2, "13.0") == "built in"
    assert "nor needed" in software.judge_nccl(False, 0, "13.0")
    with pytest.raises(ValueError, match="libnccl-dev"):
        software.judge_nccl(False, 2, "13.0")


def test_the_backends_of_torch() -> None:
    assert software.judge_backends(["gloo", "NCCL"], 2).endswith("torch.distributed with gloo, NCCL")
    assert software.judge_backends(["gloo"], 0).endswith("torch.distributed with gloo")
    for available, gpus, missing_ones in ((["gloo"], 1, "NCCL"), ([], 1, "gloo, NCCL"), (["NCCL"], 0, "gloo")):
        with pytest.raises(ValueError, match=f"built without {missing_ones}: install another build"):
            software.judge_backends(available, gpus)


@needs_horovod
def test_horovod_of_another_torch_and_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"built for torch .*, installed is 9\.9\.9"):
        software.horovod_build("9.9.9")
    package = tmp_path / "horovod"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"undefined symbol: torch.*launch/setup\.sh"):
        software.horovod_build("9.9.9")


def test_an_endpoint_port() -> None:
    with taken_port(offset=2) as port:
        with pytest.raises(ValueError, match="in use"):
            network.check_port(TelemetrySettings(port=port), local_rank=2)
        free = port + 2
    assert "is free" in network.check_port(TelemetrySettings(port=free), local_rank=0)
    with pytest.raises(ValueError, match="65536"):
        network.check_port(TelemetrySettings(port=65535), local_rank=1)


def test_equal_results_are_one_line_and_others_have_their_ranks() -> None:
    same, other = Result("a", True, "x"), Result("a", False, "y")
    found = lines([[same], [other], [same], [same], [same, Result("b", True, "z")]])
    assert found == [
        Result("a", True, "ranks 0, 2-4: x"), Result("a", False, "rank 1: y"), Result("b", True, "z"),
    ]  # fmt: skip
    assert show(other, coloured=True) == "\x1b[31mFAIL\x1b[0m  a               y"
    assert show(other, coloured=False) == "FAIL  a               y"


@needs_horovod
def test_several_hosts_and_one_whose_name_leads_to_itself(small_data: Path, tmp_path: Path) -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "infomcr_dist.doctor", *small(small_data)]
    with hosts(2, tmp_path) as made:
        table = Path("/etc/netns/node2/hosts")
        table.write_text(table.read_text().replace("10.77.0.2 node2", "127.0.1.1 node2"))
        done = subprocess.run(made.horovodrun(*command), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    results = parse(done.stdout)
    red = [r for r in results if not r.ok]
    assert [r.check for r in red] == ["host name"], done.stdout + done.stderr
    assert red[0].text.startswith("rank 1: node2 calls itself 127.0.1.1")
    assert Result("host name", True, "rank 0: node1 is 10.77.0.1") in results
    assert "rank 1: 1 other host reached" in [r.text for r in results]
