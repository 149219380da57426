"""Checkpoints and recipes of others run no code, nothing that is secret is written, and the endpoint serves metrics
alone. (What others hand us as data: test_hostile_data.py.)"""

import ast
import http.client
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from data_sets import Touch

from benchmarks.chaos import free_ports
from infomcr_dist import checkpoint, measure
from infomcr_dist.config import Config
from pipelines.options import from_dict, load, to_dict

SOURCES = sorted(p for folder in ("infomcr_dist", "pipelines", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
SECRET = "hunter2-5f1c"


# Code ---------------------------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "tempfile.mktemp", "shutil.unpack_archive",
}  # fmt: skip
FORBIDDEN_METHODS = {"extract", "extractall", "decode_pickle"}


def faults(source: str) -> list[str]:
    """What in a source text may run, or let loose, what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        bad = name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS
        bad |= name == "torch.load" and keywords.get("weights_only") != "True"
        bad |= name in ("np.load", "numpy.load", "np.save") and keywords.get("allow_pickle") != "False"
        bad |= keywords.get("shell", "False") != "False"
        found += [ast.unparse(node)] if bad else []
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_sources_runs_what_a_file_holds(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "bad",
    ["import pickle", "from shelve import open", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)",
     "np.load(f, allow_pickle=True)", "yaml.load(f, Loader=yaml.Loader)", "eval(x)", "os.system(x)",
     "subprocess.run(x, shell=True)", "tarfile.open(f).extractall(d)"],
)  # fmt: skip
def test_it_would_be_seen(bad: str) -> None:
    assert faults(bad)


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name, content in (("plain.pt", pickle.dumps(Touch(mark))), ("torch.pt", None)):
        path = tmp_path / name
        if content is None:
            torch.save({"format": checkpoint.FORMAT, "step": Touch(mark)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint"):
            checkpoint.load(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists(), "what was refused would have worked"


def test_a_checkpoint_chooses_no_code_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "brought_along.py").write_text("open('mark', 'w').close()")
    config = to_dict(replace(Config(), model="brought_along:build"))
    state = {"step": 1, "config": config, "classes": ["a", "b"], "image_size": 16, "model": {}}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, state, keep=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert measure.main(["run"]) == 2
    assert "give model=brought_along:build if that code is yours" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
    assert measure.main(["run", "model=brought_along:build"]) == 2
    assert "has no attribute 'build'" in capsys.readouterr().err
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "line",
    ["model: !!python/object/apply:os.system ['touch MARK']", "model: !!python/object/new:os.system ['touch MARK']",
     "model: !!python/name:os.system", "!!python/object/apply:os.system ['touch MARK']"],
)  # fmt: skip
def test_a_recipe_runs_nothing(tmp_path: Path, line: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(line.replace("MARK", str(tmp_path / "mark")))
    with pytest.raises(ValueError, match="is not valid YAML"):
        load(Config, recipe, [])
    with pytest.raises(ValueError, match="valid YAML"):
        load(Config, None, [line.replace(": ", "=").replace("MARK", str(tmp_path / "mark"))]
                    if line.startswith("model") else [f"model={line}"])  # fmt: skip
    assert not (tmp_path / "mark").exists()


def test_a_recipe_takes_nothing_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("run_dir: runs/${oc.env:TOKEN}\n")
    for attempt in (
        lambda: load(Config, recipe, []),
        lambda: load(Config, None, ["run_dir=${oc.env:TOKEN}"]),
        lambda: load(Config, None, ["schedule.milestones=[1,'${oc.env:TOKEN}']"]),
        lambda: from_dict(Config, {"data": {"batch_size": 4, "path": "${oc.env:TOKEN}"}}),
    ):
        with pytest.raises(ValueError, match="must be written out") as caught:
            attempt()
        assert SECRET not in str(caught.value)


# Secrets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [f"https://user:{SECRET}@host/data", f"s3://host/data?{SECRET}"])
def test_a_wrong_path_shows_no_secret(url: str, tmp_path: Path) -> None:
    for command in (
        ["infomcr_dist.train", f"data.path={url}"],
        ["pipelines.inspect", url],
        ["pipelines.verify", url],
        ["pipelines.prepare", url, "data"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert "host/data" in done.stderr
        assert SECRET not in done.stdout + done.stderr


# A run --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A run that was asked on its port, stopped, and what it wrote."""

    answers: dict[tuple[str, str], tuple[int, str]]
    other_address: str
    metrics: str
    output: str
    folder: Path


@pytest.fixture(scope="module")
def watched(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    port = free_ports()
    settings = [f"data.path={small_data}", "data.backend=torch", "data.batch_size=32", "model=cnn", "epochs=100000",
                "schedule.kind=constant", "metric.trials=0", f"telemetry.port={port}", "run_dir=run",
                "regularizer.when=never", "evaluation.every_epochs=0"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "AWS_SECRET_ACCESS_KEY": SECRET, "MY_TOKEN": SECRET}
    process = subprocess.Popen(
        [sys.executable, "-m", "infomcr_dist.train", *settings],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        records = folder / "run" / "records.jsonl"
        checkpoints = folder / "run" / "checkpoints"
        deadline = time.monotonic() + 120
        while not (records.exists() and records.stat().st_size and any(checkpoints.glob("step-*"))):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint in two minutes"
            time.sleep(0.1)
        asked = [("GET", "/metrics"), ("GET", "/"), ("GET", "/etc/passwd"), ("GET", "/../../../../etc/passwd"),
                 ("GET", "/run/"), ("GET", "/config.yaml"), ("PUT", "/metrics"), ("POST", "/metrics"),
                 ("DELETE", "/metrics"), ("HEAD", "/metrics")]  # fmt: skip
        answers = {(method, path): ask(port, method, path) for method, path in asked}
        try:
            socket.create_connection(("127.0.0.2", port), timeout=5).close()
            other = "answered"
        except ConnectionRefusedError:
            other = "refused"
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    return Watched(answers, other, answers["GET", "/metrics"][1], output, folder)


def ask(port: int, method: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body=b"x" if method in ("PUT", "POST") else None)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_endpoint_serves_metrics_alone(watched: Watched) -> None:
    assert watched.answers["GET", "/metrics"][0] == 200
    assert "infomcr_steps_total" in watched.metrics
    for (method, path), (status, body) in watched.answers.items():
        if method != "GET":
            assert status == 405, f"{method} {path}"
        elif status == 200:  # the library gives the metrics for any path
            lines = body.splitlines()
            assert all(re.match(r"# (HELP|TYPE) infomcr_|infomcr_\w+(\{.*\})? \S+$", line) for line in lines), path


def test_the_endpoint_is_this_machines_alone(watched: Watched) -> None:
    assert watched.other_address == "refused", "127.0.0.2 is another address of this machine than the one bound to"


def test_a_run_writes_no_secret_of_its_environment(watched: Watched) -> None:
    assert SECRET not in watched.output
    assert SECRET not in watched.metrics
    files = [path for path in watched.folder.rglob("*") if path.is_file()]
    assert {"records.jsonl", "config.yaml"} <= {path.name for path in files}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
