"""Containers of a manifest, run without Kubernetes: made as a kubelet makes them, from the kernel's own parts.

Each container has namespaces of its own (mounts, processes, host name, network), the volumes where its manifest mounts
them, the paths and the user of the image, a read-only root, no capability, and no way to get one.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT

from benchmarks.hosts import Host

HOME = "/home/trainer"
_IMAGE = {"PATH": "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin"}
"""What the image sets."""
_OURS = [Path(path) for path in (sys.prefix, sys.base_prefix) if not path.startswith("/usr")]
"""Where this machine's virtual environment and its interpreter are."""
_HIDDEN = ("/home/", "/opt/", "/root/", "/tmp/")
"""What else of this machine is hidden from a container."""


class Container:
    """The first container of a pod template, running on a host.

    Args:
        template: the pod template.
        host: where it runs.
        name: the container's host name.
        folder: made for the container's root and log.
        volumes: the directory that stands for each volume but emptyDirs, by the volume's name, and for what the
            operator adds or the image has, by its path.
        names: /etc/hosts.
        environment: what the operator adds.
    """

    def __init__(
        self,
        template: dict[str, Any],
        host: Host,
        name: str,
        *,
        folder: Path,
        volumes: dict[str, Path],
        names: str,
        environment: dict[str, str],
    ) -> None:
        pod, container = template["spec"], template["spec"]["containers"][0]
        self._user, self._directory = pod["securityContext"]["runAsUser"], container["workingDir"]
        self._environment = _IMAGE | environment | {e["name"]: e["value"] for e in container.get("env", [])}
        self._pre_stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        folder.mkdir()
        root = folder / "root"
        root.mkdir()
        mounts = []
        for mount in container["volumeMounts"]:
            volume = next(v for v in pod["volumes"] if v["name"] == mount["name"])
            if "emptyDir" in volume:
                size = volume["emptyDir"]["sizeLimit"].removesuffix("i")
                mounts += _mount(root, mount["mountPath"], "-t", "tmpfs", "-o", f"mode=1777,size={size}", "tmpfs")
            else:
                mounts += _bind(root, mount["mountPath"], volumes[volume["name"]], mount.get("readOnly", False))
        for path in (path for path in volumes if path.startswith("/")):
            mounts += _bind(root, path, volumes[path], read_only=True)
        script = [*_root(root, names), *mounts, *_software(root, container["workingDir"])]
        if container["securityContext"]["readOnlyRootFilesystem"]:
            script.append(f"mount -o remount,ro {root}")
        command = [*container["command"], *container.get("args", [])]
        script.append(f"exec chroot {root} {shlex.join(self._confined(command))}")
        self.log = folder / "log"
        inside = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        start = ["ip", "netns", "exec", host.name, *inside, "bash", "-euc", f"hostname {name}\n" + "\n".join(script)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(start, stdout=log, stderr=log, start_new_session=True)

    def _confined(self, command: list[str]) -> list[str]:
        """The command line that runs a command as the container's user, in its directory and its environment alone."""
        user = str(self._user)
        confine = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--no-new-privs"]
        confine += ["--bounding-set=-all", "--inh-caps=-all"]
        values = [f"{name}={value}" for name, value in self._environment.items()]
        return [*confine, "env", "--ignore-environment", f"--chdir={self._directory}", *values, *command]

    def first_process(self) -> int:
        """Process 1 of the container, by its id on this machine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def exec(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in the running container, as `kubectl exec` and hooks do."""
        inside = ["nsenter", "--target", str(self.first_process()), "--all", "--root"]
        return subprocess.run([*inside, *self._confined(command)], capture_output=True, text=True, check=False)

    def stop(self) -> subprocess.CompletedProcess[str]:
        """What the deletion of a pod does: preStop to its end, then SIGTERM to process 1; returns preStop's result."""
        hook = self.exec(self._pre_stop)
        os.kill(self.first_process(), signal.SIGTERM)
        self.process.wait(30)
        return hook

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def _root(root: Path, names: str) -> list[str]:
    """Shell commands that make a root of what this machine has, without what is hidden, with the image's user."""
    script = ["mount --make-rprivate /", f"mount -t tmpfs -o mode=755 tmpfs {root}"]
    for entry in Path("/").iterdir():
        inside = root / entry.name
        if entry.is_symlink() or entry.name == "etc":
            script.append(f"cp -a {entry} {inside}")
        elif entry.is_dir() and not any(str(path).startswith(f"{entry}/") for path in (*_HIDDEN, *_OURS)):
            script.append(f"mkdir {inside}")
            if entry.name == "proc":
                script.append(f"mount -t proc proc {inside}")
            elif entry.name == "dev":
                script.append(f"mount --rbind /dev {inside}")
            else:
                script += [f"mount --rbind {entry} {inside}", f"mount -o remount,bind,ro {inside}"]
    for file, entry in (("passwd", f"trainer:x:1000:1000::{HOME}:/bin/sh"), ("group", "trainer:x:1000:")):
        script.append(f"sed -i -e '/^[^:]*:[^:]*:1000:/d' -e '$a{entry}' {root}/etc/{file}")
    hosts = shlex.quote(f"127.0.0.1 localhost\n{names}")
    return [*script, f"rm {root}/etc/hosts", f"printf %s {hosts} > {root}/etc/hosts", f"mkdir -p {root}{HOME}"]


def _software(root: Path, project: str) -> list[str]:
    """Shell commands that put launch/ and the packages where the image has them, and the project beside launch/."""
    # The environment's scripts name its own path, and its interpreter's.
    sources = {"/opt/venv": Path(sys.prefix)} | {str(path): path for path in _OURS}
    sources |= {f"{project}/{name}": ROOT / name for name in ("infomcr_dist", "launch", "pipelines", "tests/workers")}
    return [line for path, source in sources.items() for line in _bind(root, path, source, read_only=True)]


def _bind(root: Path, path: str, source: Path, read_only: bool) -> list[str]:
    lines = _mount(root, path, "--rbind", str(source))
    return [*lines, shlex.join(["mount", "-o", "remount,bind,ro", f"{root}{path}"])] if read_only else lines


def _mount(root: Path, path: str, *options: str) -> list[str]:
    return [shlex.join(["mkdir", "-p", f"{root}{path}"]), shlex.join(["mount", *options, f"{root}{path}"])]
