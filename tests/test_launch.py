"""The scripts of launch/, and what every shell script has to pass."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LAUNCH = ROOT / "launch"


def is_shell_script(path: Path) -> bool:
    if not path.is_file() or "node_modules" in path.parts:
        return False
    with path.open("rb") as file:
        return path.suffix == ".sh" or (file.read(2) == b"#!" and b"sh" in file.readline())


FOLDERS = (".ci", "benchmarks", "k8s", "launch")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if is_shell_script(path))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    checked = subprocess.run(["shellcheck", script], env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(("on_term", "code"), [("lambda *_: sys.exit(75)", 0), ("signal.SIG_IGN", 1)])
def test_prestop_signals_and_waits_for_the_workers(tmp_path: Path, on_term: str, code: int) -> None:
    program = f"import signal, sys; signal.signal(15, {on_term}); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        (tmp_path / "rank-0.pid").write_text(f"{worker.pid}\n")
        ended = subprocess.run([str(LAUNCH / "prestop.sh"), str(tmp_path), "2"], check=False)
        assert ended.returncode == code
        worker.kill()
