"""k8s/monitoring with the real Prometheus, Alertmanager and Pushgateway, which monitor a real two-rank run."""

import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import yaml
from conftest import ROOT, WORKERS, start
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard, timeseries
from PIL import Image

from benchmarks.chaos import free_ports
from infomcr_dist.config import Config

MONITORING = ROOT / "k8s" / "monitoring"
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
RUNBOOK = (MONITORING / "RUNBOOK.md").read_text()
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]

RECIPE = """
model: slow_on_demand:build
epochs: 10000
data: {path: DATA, augmentation: crop1_flip, global_batch_size: 64}
schedule: {milestones: [10]}
optimizer: {learning_rate: 0.05}
regularizer: {estimator: sampled, overhead_budget: 1.5, sub_batch_size: 8, beta: 5}
metric: {trials: 4, samples: 8, every_epochs: 10}
evaluation: {every_epochs: 10, train_every_epochs: 10}
checkpoint: {every_epochs: 10}
threads: 1
"""
SHORTER = {
    "[5m]": "[10s]",
    "> 600": "> 6",
    "for: 10m": "for: 2s",
    "for: 1m": "for: 1s",
}
"""The rules' windows and delays, and what replaces them so that the tests take seconds."""
NO_DATA = {
    "Memory: rank {{rank}}, GPU": "no GPU here",
    "annotation Elastic restart": "the number of workers does not change",
}
"""Queries of the dashboard that return nothing for the run below, and why."""


def wait(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's first true value; the test fails after the timeout."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    pytest.fail(f"timeout after {seconds} s: {what}")


def fetch(url: str) -> str | None:
    """The response's body; None without a response."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            text: str = response.read().decode()
            return text
    except (OSError, http.client.HTTPException):
        return None


# Without a running job.


def dashboard_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", MONITORING / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dashboard_is_up_to_date() -> None:
    assert (MONITORING / "dashboard.json").read_text() == dashboard_module().to_json(), "run dashboard.py"


def lost(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Paths of a document that are missing or different in another."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            if not isinstance(theirs, dict) or key not in theirs:
                yield f"{path}/{key}"
            else:
                yield from lost(value, theirs[key], f"{path}/{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(a, b, f"{path}/{i}")
    elif ours != theirs:
        yield path


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Read and written by Grafana's own models of its version 11.6, it is unchanged: they drop unknown fields."""
    plugins.register_default_plugins()
    back = json.loads(JSONEncoder().encode(dashboard.Dashboard.from_json(DASHBOARD)))
    # A field of the Prometheus data source alone (processEvents in its annotations.ts).
    assert {re.sub(r"\d+", "*", path) for path in lost(DASHBOARD, back)} == {"/annotations/list/*/titleFormat"}


def test_grafana_knows_every_override_of_the_dashboard() -> None:
    """To the model of a dashboard an override is any name and value: the models of the fields check them."""
    for panel in DASHBOARD["panels"]:
        for override in panel.get("fieldConfig", {}).get("overrides", []):
            fields = {p["id"]: p["value"] for p in override["properties"]}
            custom = {name.removeprefix("custom."): fields.pop(name) for name in list(fields) if "custom." in name}
            for given, model in ((fields, dashboard.FieldConfig), (custom, timeseries.FieldConfig)):
                back = json.loads(JSONEncoder().encode(model.from_json(given)))
                assert list(lost(given, back)) == [], panel["title"]


def test_panels_have_unique_ids_and_fill_the_grid() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24))
    assert len(cells) == 24 * (1 + max(y for _, y in cells))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_links_to_its_runbook_entry(alert: dict[str, Any]) -> None:
    assert alert["labels"].keys() == {"severity"}
    assert alert["annotations"].keys() == {"summary", "description", "runbook"}
    file, anchor = alert["annotations"]["runbook"].split("#")
    assert (ROOT / file).read_text() == RUNBOOK
    headings = re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE)
    assert anchor in [heading.lower().replace(" ", "-") for heading in headings]
    assert headings == [a["alert"] for a in ALERTS]


def test_the_runbook_refers_to_existing_panels_and_settings() -> None:
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    annotations = [annotation["name"].lower() for annotation in DASHBOARD["annotations"]["list"]]
    settings = asdict(Config())
    for text in re.sub(r"\s+", " ", RUNBOOK).split('"')[1::2]:
        known = [*titles, *annotations, DASHBOARD["title"], *dashboard_module().PARTS]
        assert any(one.startswith(text) for one in known), text
    for name in re.findall(r"`([a-z]+(?:_[a-z]+)*(?:\.[a-z_]+)?)`", RUNBOOK):
        at: Any = settings
        for part in name.split("."):
            if not name.startswith("infomcr_"):
                assert part in at, name
                at = at[part]


def test_promtool_accepts_rules_and_configuration(promtool: Path) -> None:
    for command in (
        ["check", "rules", "--lint=all", "rules.yaml"],
        ["check", "config", "--lint=all", "prometheus.yaml"],
        ["test", "rules", "rules_test.yaml"],
    ):
        result = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "SUCCESS" in result.stdout
        assert "FAILED" not in result.stdout + result.stderr


def test_every_alert_is_tested_firing_and_silent() -> None:
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    fire, silent = set(), set()
    for test in tests:
        expected = [one for one in test["promql_expr_test"] if "ALERTS" in one["expr"]]
        named = {
            a for one in expected for s in one["exp_samples"] for a in re.findall(r'alertname="(\w+)"', s["labels"])
        }
        fire |= named
        silent |= named if any(not one["exp_samples"] for one in expected) else set()
    assert fire == silent == {alert["alert"] for alert in ALERTS}


# With a running job.


class Webhook(http.server.BaseHTTPRequestHandler):
    """Collects the alerts that Alertmanager sends."""

    received: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.received += json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass

    @classmethod
    def last(cls, name: str, **labels: str) -> dict[str, Any] | None:
        """The newest of what was received of an alert."""
        wanted = (labels | {"alertname": name}).items()
        return next((a for a in reversed(cls.received) if wanted <= a["labels"].items()), None)

    @classmethod
    def wait_for(cls, status: str, name: str, **labels: str) -> dict[str, Any]:
        """The alert, once it has the status."""

        def received() -> dict[str, Any] | None:
            alert = cls.last(name, **labels)
            return alert if alert is not None and alert["status"] == status else None

        alert: dict[str, Any] = wait(received, 60, f"{name} {status}")
        return alert


class Watched:
    """A Prometheus and the job that it scrapes."""

    def __init__(self, url: str, run: Path, job: subprocess.Popen[str]) -> None:
        self.url, self.run, self.job, self.began = url, run, job, time.time()
        self.slow = run.parent / "slow"

    def get(self, path: str, **arguments: str | float) -> Any:
        text = fetch(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments, doseq=True)}")
        assert text is not None, path
        return json.loads(text)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Current values."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def history(self, expression: str) -> list[dict[str, Any]]:
        """Values since the start, one per second, the current ones included: at least what `query` returned before."""
        now = time.time()
        span = {"start": now - int(now - self.began), "end": now, "step": 1}
        result: list[dict[str, Any]] = self.get("query_range", query=expression, **span)["result"]
        return result

    def worker(self, rank: int) -> int:
        """Process ID of a rank."""
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                command = Path(f"/proc/{process}/cmdline").read_bytes()
                environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = str(self.run).encode() in command and command.startswith(sys.executable.encode())
            launcher = b"/horovodrun\0" in command or b"/torchrun\0" in command
            rank_is_given = any(f"{name}={rank}".encode() in environment for name in ("HOROVOD_RANK", "RANK"))
            if ours and rank_is_given and not launcher:
                return int(process)
        raise AssertionError(f"no rank {rank}")


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, small_data: Path, debian_program: Callable[[str, str], Path]
) -> Iterator[Watched]:
    """A run that lasts until the end of the tests, scraped every second; `Webhook` receives its alerts."""
    programs = [debian_program(name, name) for name in ("prometheus", "prometheus-alertmanager")]
    folder = tmp_path_factory.mktemp("watched")
    training = free_ports(4)  # of two workers, then of the servers
    prometheus, alertmanager = training + 2, training + 3
    webhook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=webhook.serve_forever, daemon=True).start()

    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{training + i}" for i in range(2)]}]
    config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]}
    receiver = {"name": "test", "webhook_configs": [{"url": f"http://127.0.0.1:{webhook.server_port}"}]}
    route = {"receiver": "test", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (folder / "alertmanager.yaml").write_text(yaml.safe_dump({"route": route, "receivers": [receiver]}))
    (folder / "rules.yaml").write_text(shortened((MONITORING / "rules.yaml").read_text()))
    (folder / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    with ExitStack() as stack:
        stack.callback(webhook.server_close)
        stack.callback(webhook.shutdown)
        for port, command in (
            (prometheus, [programs[0], "--config.file=prometheus.yaml", "--storage.tsdb.path=tsdb"]),
            (alertmanager, [*at_home(programs[1]), "--config.file=alertmanager.yaml", "--storage.path=alerts",
                            "--cluster.listen-address="]),
        ):  # fmt: skip
            stack.enter_context(server([*command, f"--web.listen-address=127.0.0.1:{port}"], port, folder))
        environment = ["env", f"PYTHONPATH={WORKERS}:{ROOT}", f"SLOW={folder / 'slow'}"]
        run = [sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", f"run_dir={folder / 'run'}"]
        job = stack.enter_context(start(2, *environment, *run, f"telemetry.port={training}", cwd=folder))
        try:
            yield Watched(f"http://127.0.0.1:{prometheus}", folder / "run", job)
        finally:
            job.terminate()
            output, errors = job.communicate(timeout=60)
    assert "stopped: saved after step" in output + errors


@contextmanager
def server(command: list[str | Path], port: int, folder: Path) -> Iterator[None]:
    """A server that is ready when the block begins and is stopped at its end."""
    with open(folder / "servers.log", "a+") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            wait(lambda: fetch(f"http://127.0.0.1:{port}/-/ready") or process.poll() is not None, 30, str(command))
            assert process.poll() is None, (folder / "servers.log").read_text()
            yield
        finally:
            process.terminate()
            process.wait(timeout=30)


def at_home(program: Path) -> list[str | Path]:
    """The command of a Debian program that opens files of its package by absolute path, even if it is only unpacked."""
    share = program.parent.parent / "share"
    if share == Path("/usr/share"):
        return [program]
    alone = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    return [*alone, "sh", "-c", 'mount --bind "$0" /usr/share && exec "$@"', share, program]


def shortened(rules: str) -> str:
    """The rules with the windows and delays of `SHORTER`."""
    for long, short in SHORTER.items():
        assert long in rules, long
        rules = rules.replace(long, short)
    return rules


@pytest.fixture(scope="module")
def regularized(watched: Watched) -> Watched:
    """The job, after its regularizer has switched on and its overhead and γ̂ have been measured."""

    def measured() -> bool:
        assert watched.job.poll() is None, watched.job.communicate()
        return bool(
            watched.query("infomcr_overhead_ratio > 0 and infomcr_gamma_hat and infomcr_epochs_completed > 20")
            and watched.query("job:infomcr_regularized_step_overhead:ratio_5m > 0")
        )

    wait(measured, 120, "a regularized run")
    return watched


def filled_in(expression: str) -> str:
    """A query with the values of the dashboard's variables, as Grafana sends it."""
    for name, value in {
        "$__rate_interval": "10s",
        "$__interval": "1s",
        "$job": "training",
        "$rank": ".*",
    }.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def dashboard_queries() -> dict[str, str]:
    queries = {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    }
    return queries | {f"annotation {a['name']}": a["expr"] for a in DASHBOARD["annotations"]["list"]}


def test_every_query_of_the_dashboard_has_data(regularized: Watched) -> None:
    empty = set()
    for name, expression in dashboard_queries().items():
        values = [float(v) for s in regularized.history(filled_in(expression)) for _, v in s["values"]]
        if not any(v == v for v in values):
            empty.add(name)
    assert empty == set(NO_DATA)


def test_the_variables_list_the_job_and_its_ranks(regularized: Watched) -> None:
    offered = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            query = re.fullmatch(r"label_values\((.+), (\w+)\)", filled_in(variable["query"]["query"]))
            assert query is not None
            offered[variable["name"]] = regularized.get(f"label/{query[2]}/values", **{"match[]": query[1]})
    assert offered == {"job": ["training"], "rank": ["0", "1"]}


def test_every_monitored_metric_is_exported(regularized: Watched) -> None:
    files = [MONITORING / name for name in ("rules.yaml", "rules_test.yaml", "dashboard.json", "RUNBOOK.md")]
    named = {name for file in files for name in re.findall(r"(?<![:\w])infomcr_[a-z0-9_]+(?![:\w])", file.read_text())}
    exported = set(regularized.get("label/__name__/values"))
    assert named - exported == {"infomcr_gpu_memory_bytes"}, "there is no GPU here"


def test_the_parts_of_a_step_add_up_to_it(regularized: Watched) -> None:
    """By construction of `rest`, if none of them is negative."""
    parts = {name: q for name, q in dashboard_queries().items() if name.startswith("Mean step, by what it did: ")}
    assert len(parts) == 4
    seconds = {name: float(regularized.query(filled_in(q))[0]["value"][1]) for name, q in parts.items()}
    assert all(value >= 0 for value in seconds.values()), seconds


def test_a_healthy_job_is_silent(regularized: Watched) -> None:
    """Apart from alerts that other load on this machine can cause, with windows this short."""
    names = {alert["labels"]["alertname"] for alert in Webhook.received}
    assert names <= {"Straggler", "DataStarvation"}


def test_the_webhook_receives_the_slow_rank(regularized: Watched) -> None:
    """Other load on this machine may have fired the alert, for either rank, before."""
    straggler = {"name": "Straggler", "rank": "1", "job": "training"}
    if Webhook.last(**straggler) is not None:
        Webhook.wait_for("resolved", **straggler)
    regularized.slow.touch()
    try:
        alert = Webhook.wait_for("firing", **straggler)
    finally:
        regularized.slow.unlink()
    assert alert["annotations"]["summary"] == "Rank 1 of training slows down the others"
    Webhook.wait_for("resolved", **straggler)


def test_the_webhook_receives_a_stalled_job(regularized: Watched) -> None:
    process = regularized.worker(rank=1)
    os.kill(process, signal.SIGSTOP)
    try:
        alert = Webhook.wait_for("firing", "TrainingStalled")
    finally:
        os.kill(process, signal.SIGCONT)
    assert alert["labels"]["severity"] == "critical"
    assert alert["annotations"]["summary"] == "training has stalled"
    Webhook.wait_for("resolved", "TrainingStalled")
    assert regularized.job.poll() is None


def test_a_pushgateway_keeps_the_results_of_a_finished_run(
    tmp_path: Path, small_data: Path, debian_program: Callable[[str, str], Path], promtool: Path
) -> None:
    program = debian_program("prometheus-pushgateway", "prometheus-pushgateway")
    port = free_ports()
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    settings = ["model=resnet20", "epochs=2", "schedule.milestones=[1]", "run_dir=run", "telemetry.port=null"]
    with server([*at_home(program), f"--web.listen-address=127.0.0.1:{port}"], port, tmp_path):
        command = [sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", *settings]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([*command, f"telemetry.pushgateway=127.0.0.1:{port}"], cwd=tmp_path, env=environment, check=True)
        pushed = fetch(f"http://127.0.0.1:{port}/metrics")
    assert pushed is not None
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    errors = {r["split"]: r["top1_error_ratio"] for r in map(json.loads, lines) if r["kind"] == "evaluation"}
    for split, error in errors.items():
        value = re.search(rf'^infomcr_top1_error_ratio{{.*split="{split}".*}} (.+)$', pushed, re.MULTILINE)
        assert value is not None, pushed
        assert float(value[1]) == pytest.approx(error)
    ours = "".join(line + "\n" for line in pushed.splitlines() if re.match(r"(# \w+ )?infomcr_", line))
    result = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.ops
def test_grafanas_components_draw_the_dashboard(regularized: Watched, tmp_path: Path) -> None:
    """Each panel of lines has a line: colored pixels within its place."""
    for tool in ("npm", "node", "chromium"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path / "monitoring" / "render"
    shutil.copytree(MONITORING / "render", folder, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(MONITORING / "dashboard.json", folder.parent)
    install = ["npm", "install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True)
    picture = tmp_path / "picture.png"
    command = ["node", "render.mjs", regularized.url, "training", picture]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with Image.open(picture) as image:
        saturation = image.convert("HSV").getchannel("S")
    row, header = (
        int(re.search(rf"^const {n} = (\d+);", (folder / "render.mjs").read_text(), re.M)[1]) for n in ("ROW", "HEADER")
    )
    for panel in DASHBOARD["panels"]:
        if panel["type"] == "timeseries":
            x, y, w, h = (panel["gridPos"][key] for key in "xywh")
            column = (saturation.width - 8) / 24
            box = (8 + x * column, header + y * row + 40, 8 + (x + w) * column - 8, header + (y + h) * row - 50)
            pixels = saturation.crop(tuple(map(round, box))).tobytes()
            assert sum(s > 100 for s in pixels) > 200, panel["title"]
