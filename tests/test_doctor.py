"""The doctor: all green on what is sound, red and telling the remedy on each thing that is broken."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, horovodrun

from benchmarks.hosts import hosts, missing
from infomcr_dist import doctor
from infomcr_dist.config import Config, TelemetrySettings
from infomcr_dist.doctor import Result
from infomcr_dist.options import load_config

LINE = re.compile(r"^(?:\[\d+\]<stdout>:)?(ok  |FAIL)  (.{15}) (.*)$")
ALONE = {"horovod", "gpus", "nccl", "tf32", "recipe", "data", "model", "run directory", "telemetry port", "host name",
         "clock", "allreduce", "memory"}  # fmt: skip


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
    """A port P such that P + offset is in use."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1] - offset


def small(data: Path) -> list[str]:
    return [f"data.path={data}", "data.batch_size=32", "telemetry.port=null"]


@pytest.fixture(scope="session")
def own_data(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to break."""
    copy = tmp_path_factory.mktemp("broken") / "data"
    shutil.copytree(small_data, copy)
    return copy


def test_all_is_green_on_what_is_sound(small_data: Path, tmp_path: Path) -> None:
    code, results, output = alone(*small(small_data), cwd=tmp_path)
    assert code == 0, output
    assert {r.check for r in results} == ALONE
    assert all(r.ok for r in results), output
    assert "\x1b" not in output, "colours are for terminals"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_broken_things_are_red_each_by_itself(own_data: Path, tmp_path: Path) -> None:
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
    assert {r.check for r in results if r.ok} == ALONE - red.keys() - {"model", "memory"}, "what needs no data is tried"


def test_a_batch_that_does_not_fit_is_red(small_data: Path, tmp_path: Path) -> None:
    code, results, output = alone(*small(small_data), "data.image_size=30000", "model=cnn", cwd=tmp_path)
    assert code == 1
    (red,) = [r for r in results if not r.ok]
    assert red.check == "memory", output
    assert "lower data.batch_size" in red.text


def test_a_step_that_outgrows_its_room_or_is_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = doctor.Plan("", classes=6, image_size=1000, local_batch=200, sub_batch_size=None)  # 2.4 GB of images
    config = replace(Config(), model="cnn")
    with pytest.raises(ValueError, match=r"a step of 200 images of 1000 × 1000 does not fit .*1\.00 GB free a worker"):
        doctor.try_step(config, plan, "cpu", 1, 10**9)
    (tmp_path / "heavy.py").write_text("import os, signal\ndef build(**_): os.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"its process was killed.*lower data\.batch_size"):
        doctor.try_step(replace(config, model="heavy:build"), plan, "cpu", 1, 10**9)
    (tmp_path / "wrong.py").write_text("def build(**_): raise TypeError('no such layer')\n")
    with pytest.raises(TypeError, match="no such layer"):
        doctor.try_step(replace(config, model="wrong:build"), plan, "cpu", 1, 10**9)


def test_every_worker_is_checked(small_data: Path, tmp_path: Path) -> None:
    with taken_port(offset=1) as port:
        arguments = [f"data.path={small_data}", "data.batch_size=32", f"telemetry.port={port}"]
        command = [sys.executable, "-m", "infomcr_dist.doctor", *arguments]
        done = horovodrun(2, "env", f"PYTHONPATH={ROOT}", *command, cwd=tmp_path)
    results = parse(done.stdout)
    assert done.returncode != 0
    assert "Exit code: 1" in done.stderr, "the workers' own"
    assert {r.check for r in results} == ALONE
    (red,) = [r for r in results if not r.ok]
    assert red.check == "telemetry port"
    assert red.text.startswith(f"rank 1: {port + 1} on 127.0.0.1")
    checks = [r.check for r in results]
    assert [c for c in checks if checks.count(c) > 1] == ["telemetry port"] * 2, "what is the same is told once"
    texts = {r.check: r.text for r in results}
    assert re.match(r"64 MB in \S+ ms, \d+\.\d\d GB/s", texts["allreduce"])
    assert "32 images a worker a step" in texts["data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "recipe missing.yaml does not exist"),
        (["epochs=many"], "epochs must be a whole number"),
        (["a.yaml", "b.yaml"], "give one recipe"),
    ],
)
def test_bad_arguments_end_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOROVOD_RANK", raising=False)
    assert doctor.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_deleted_shard_is_named(own_data: Path) -> None:
    config = load_config(Config, None, small(own_data))
    assert "train 260 in 3 shards" in str(doctor.plan_of(config, 2))
    shard = sorted((own_data / "test").glob("*.tar"))[0]
    content = shard.read_bytes()
    shard.unlink()
    try:
        with pytest.raises(ValueError, match=f"{shard} cannot be opened"):
            doctor.plan_of(config, 2)
    finally:
        shard.write_bytes(content)


def test_a_recipe_that_does_not_fit_the_workers_is_told(small_data: Path) -> None:
    config = load_config(Config, None, [f"data.path={small_data}", "data.global_batch_size=2"])
    with pytest.raises(ValueError, match="at least the number of workers"):
        doctor.plan_of(config, 3)


def test_a_directory_that_is_not_ours_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    config = load_config(Config, None, [f"run_dir={tmp_path / 'run'}"])
    if os.geteuid() == 0:  # root writes everywhere but into a file system that is read-only
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(tmp_path)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("root may not mount here, and is refused by nothing else")
    try:
        with pytest.raises(ValueError, match="cannot be written"):
            doctor.check_directory(config, Path("recipe.yaml"), None)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(tmp_path)], check=True)
        tmp_path.chmod(0o755)


def test_space() -> None:
    needed = 3 * 10**9 + (64 << 20)
    assert "3.07 GB needed for 2 + 1 checkpoints" in doctor.judge_space(needed, 10**9, keep=2)
    with pytest.raises(ValueError, match="make room"):
        doctor.judge_space(needed - 1, 10**9, keep=2)


def test_names_of_hosts() -> None:
    for address in ("127.0.1.1", "127.0.0.1", "::1"):
        with pytest.raises(ValueError, match=f"node1 calls itself {address}.*/etc/hosts"):
            doctor.judge_name("node1", address, hosts=2)
        doctor.judge_name("node1", address, hosts=1)
    for address in ("10.0.0.1", "fe80::1%eth0", "2001:db8::1"):
        doctor.judge_name("node1", address, hosts=2)


def test_reaching_other_hosts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        port, free = server.getsockname()[1], closed.getsockname()[1]
        closed.close()
        assert doctor.reach([("a", "127.0.0.1", port)]) == "1 other host reached"
        with pytest.raises(ValueError, match=r"not reached: b at 127\.0\.0\.1 \(Connection refused\)"):
            doctor.reach([("a", "127.0.0.1", port), ("b", "127.0.0.1", free)])


def test_a_name_that_does_not_resolve_is_told_before_horovod_ends_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("HOROVOD_RANK", "3")
    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr(doctor, "connect", lambda: pytest.fail("it must not connect"))
    assert doctor.main([]) == 1
    assert re.match(r"FAIL  host name +rank 3: .*does not resolve", capsys.readouterr().out)


def test_clocks() -> None:
    assert doctor.judge_clocks([0.0]) == "one process"
    assert "rank 2's is -0.900 s" in doctor.judge_clocks([0.0, 0.5, -0.9])
    with pytest.raises(ValueError, match=r"rank 1's is \+1\.100 s .*NTP"):
        doctor.judge_clocks([0.0, 1.1, -0.2])


def test_gpus_and_nccl() -> None:
    assert "2 of them idle" in doctor.judge_gpus(["A"] * 4, 2, "13.0")
    assert doctor.judge_gpus(["A"] * 3 + ["B"], 4, "13.0") == "3 × A, 1 × B"
    with pytest.raises(ValueError, match="fewer than the 3 ranks"):
        doctor.judge_gpus(["A"] * 2, 3, "13.0")
    assert "sees no GPU" in doctor.judge_gpus([], 2, "13.0")
    assert doctor.judge_nccl(True, 2, "13.0") == "built in"
    assert "nor needed" in doctor.judge_nccl(False, 0, "13.0")
    with pytest.raises(ValueError, match="libnccl-dev"):
        doctor.judge_nccl(False, 2, "13.0")


def test_horovod_of_another_torch_and_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"built for torch .*, installed is 9\.9\.9"):
        doctor.horovod_build("9.9.9")
    package = tmp_path / "horovod"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"undefined symbol: torch.*launch/setup\.sh"):
        doctor.horovod_build("9.9.9")


def test_an_endpoint_port() -> None:
    with taken_port(offset=2) as port:
        with pytest.raises(ValueError, match="in use"):
            doctor.check_port(TelemetrySettings(port=port), local_rank=2)
        free = port + 2
    assert "is free" in doctor.check_port(TelemetrySettings(port=free), local_rank=0)
    with pytest.raises(ValueError, match="65536"):
        doctor.check_port(TelemetrySettings(port=65535), local_rank=1)


def test_equal_results_are_one_line_and_others_name_their_ranks() -> None:
    same, other = Result("a", True, "x"), Result("a", False, "y")
    found = doctor.lines([[same], [other], [same], [same], [same, Result("b", True, "z")]])
    assert found == [
        Result("a", True, "ranks 0, 2-4: x"), Result("a", False, "rank 1: y"), Result("b", True, "z"),
    ]  # fmt: skip
    assert doctor.show(other, coloured=True) == "\x1b[31mFAIL\x1b[0m  a               y"
    assert doctor.show(other, coloured=False) == "FAIL  a               y"


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
