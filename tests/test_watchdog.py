"""Workers that hang are killed and reported; what is merely slow is left alone."""

import json
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
from conftest import WORKERS

STUCK = r"\nerror: rank 0 has made no progress for \d+ s in step 3: killed\n"
HUNG = r"\nerror: rank 0 has hung for 2 s: killed\n"
EXPECTED = {
    "wait_for_a_lock": STUCK,
    "read_an_empty_pipe": STUCK,
    "keep_the_interpreters_lock": HUNG,
    "stop_among_others": HUNG,
    "stop_alone": None,
    "take_slow_steps": None,
    "take_a_step_that_was_slow_before": None,
    "take_a_first_step": None,
    "prepare": None,
    "wait_for_others": None,
}


@pytest.fixture(scope="module")
def ended() -> Any:
    """Exit code and stderr of each case; all of them wait at the same time."""
    done = subprocess.run([sys.executable, WORKERS / "waiting.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", EXPECTED)
def test_what_hangs_is_killed_and_what_is_slow_is_not(ended: Any, case: str) -> None:
    expected = EXPECTED[case]
    code, errors = ended[case]
    if expected is None:
        assert (code, errors) == (0, "")
    else:
        assert code == -signal.SIGKILL
        assert re.fullmatch(expected, errors), errors


def test_every_case_is_expected(ended: Any) -> None:
    assert ended.keys() == EXPECTED.keys()
