"""Containers of a manifest, run without Kubernetes: what a kubelet makes of them, out of the kernel's own parts.

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
_HIDDEN = ("/home", "/opt", "/root", "/tmp")
"""What of this machine a container does not see."""


class Container:
    """The first container of a pod template, running on a host.

    ``volumes``: the directory that stands for each volume but emptyDirs; ``ssh``: what the operator mounts as keys;
    ``names``: /etc/hosts; ``environment``: what the operator adds.
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
        script = _root(root, folder, names, container["workingDir"])
        for mount in container["volumeMounts"]:
            volume = next(v for v in pod["volumes"] if v["name"] == mount["name"])
            where = shlex.quote(f"{root}{mount['mountPath']}")
            script.append(f"mkdir -p {where}")
            if "emptyDir" in volume:
                size = volume["emptyDir"]["sizeLimit"].removesuffix("i")
                script.append(f"mount -t tmpfs -o mode=1777,size={size} tmpfs {where}")
            else:
                script.append(f"mount --bind {shlex.quote(str(volumes[volume['name']]))} {where}")
                if mount.get("readOnly"):
                    script.append(f"mount -o remount,bind,ro {where}")
        for path in ("/etc/mpi", f"{HOME}/.ssh"):  # the operator adds these two
            where = shlex.quote(f"{root}{path}")
            source = shlex.quote(str(volumes[path]))
            script += [f"mkdir -p {where}", f"mount --bind {source} {where}", f"mount -o remount,bind,ro {where}"]
        if container["securityContext"]["readOnlyRootFilesystem"]:
            script.append(f"for d in {root} {root}/home {root}/opt {root}/root; do mount -o remount,bind,ro $d; done")
        command = [*container["command"], *container.get("args", [])]
        script.append(f"exec chroot {root} {shlex.join(self._confined(command))}")
        self.log = folder / "log"
        inside = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        start = ["ip", "netns", "exec", host.name, *inside, "bash", "-euc", f"hostname {name}\n" + "\n".join(script)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(start, stdout=log, stderr=log, start_new_session=True)

    def _confined(self, command: list[str]) -> list[str]:
        """The command line of a command as the container's user, in its directory, with nothing but its environment."""
        user = str(self._user)
        confine = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--no-new-privs"]
        confine += ["--bounding-set=-all", "--inh-caps=-all"]
        values = [f"{name}={value}" for name, value in self._environment.items()]
        return [*confine, "env", "--ignore-environment", f"--chdir={self._directory}", *values, *command]

    def first_process(self) -> int:
        """Process 1 of the container, by its id out here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def exec(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in the running container, as `kubectl exec` and hooks do."""
        inside = ["nsenter", "--target", str(self.first_process()), "--all", "--root"]
        return subprocess.run([*inside, *self._confined(command)], capture_output=True, text=True, check=False)

    def stop(self) -> subprocess.CompletedProcess[str]:
        """What the deletion of a pod does: preStop to its end, then SIGTERM for process 1. Returns preStop's end."""
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


def _root(root: Path, folder: Path, names: str, project: str) -> list[str]:
    """Shell commands that make the root: this machine's, with the image's paths and user."""
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    for file in ("passwd", "group"):
        kept = [x for x in Path("/etc", file).read_text().splitlines() if x.split(":")[2] != "1000"]
        entry = f"trainer:x:1000:1000::{HOME}:/bin/sh" if file == "passwd" else "trainer:x:1000:"
        (folder / file).write_text("\n".join([*kept, entry, ""]))
    script = ["mount --make-rprivate /", f"mount --rbind / {root}"]
    script += [f"mount -t tmpfs -o mode=755 tmpfs {root}{hidden}" for hidden in _HIDDEN]
    visible = {project: str(ROOT), "/opt/venv": sys.prefix}
    # A virtual environment's scripts name its own path, and its interpreter's.
    visible |= {path: path for path in (sys.prefix, sys.base_prefix) if not path.startswith("/usr")}
    for path, source in visible.items():
        script += [f"mkdir -p {shlex.quote(f'{root}{path}')}"]
        script += [f"mount --rbind {shlex.quote(source)} {shlex.quote(f'{root}{path}')}"]
    script += [f"mount --bind {folder}/{file} {root}/etc/{file}" for file in ("hosts", "passwd", "group")]
    return [*script, f"mount -t proc proc {root}/proc"]
