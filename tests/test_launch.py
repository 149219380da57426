"""The scripts of launch/."""

import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


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
