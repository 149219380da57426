"""Records as numbers over the steps, for TensorBoard, MLflow or Weights & Biases, by a process of its own.

What watches a run never stops or delays it: a record is given to the process only if its pipe has room, and whatever it
does not take is dropped and counted. ``records.jsonl`` has them all.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from infomcr_dist.records import Record

_PROGRAM = Path(__file__).with_name("logger_process.py")
_PIPE_BYTES = 1 << 20
"""Room for some thousand steps"""
_READ_BYTES = 1 << 16
_CLOSE_SECONDS = 10.0


def check_installed(logger: str | None) -> None:
    """ValueError with the remedy if the setting telemetry.logger asks for a package that is not installed."""
    found = logger and importlib.util.find_spec(logger)
    if logger and (not found or found.origin is None):  # without an origin: some directory of that name
        raise ValueError(
            f"telemetry.logger={logger} needs the package {logger}, which is not installed: "
            f"pip install 'infomcr_dist[{logger}]'"
        )


def numbers(record: Record) -> dict[str, float]:
    """The numbers of a record by name: ``step/loss``, ``evaluation/test/averaged/top1_error_ratio``."""
    prefix = _subject(record)
    values = {field.name: getattr(record, field.name) for field in fields(record) if field.name != "step"}
    return {f"{prefix}/{name}": value + 0 for name, value in values.items() if isinstance(value, int | float)}


class Logger:
    """Gives records to one logger.

    Args:
        name: ``tensorboard``, ``mlflow`` or ``wandb``.
        directory: of the run.
        settings: of the run, flat.
        logged: records that a resumed run makes again: the log has them.
    """

    def __init__(self, name: str, directory: Path, settings: dict[str, Any], logged: list[Record]) -> None:
        self._logged = {(_subject(record), record.step) for record in logged}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._points, self._reports, self._unread = self._process.stdin, self._process.stdout, b""
        self.dropped = 0
        """Records that the log lacks"""
        self.reason = ""
        """Why, of the first of them"""
        header = {"logger": name, "directory": str(directory.absolute()), "settings": settings}
        with contextlib.suppress(OSError):  # it has ended already, or the system keeps this user's pipes small
            self._points.write(json.dumps(header).encode() + b"\n")
            fcntl.fcntl(self._points, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(self._points.fileno(), False)
        os.set_blocking(self._reports.fileno(), False)

    def log(self, record: Record) -> None:
        """Log one record, unless the log has it; it is dropped where the process is behind or has failed."""
        if self._logged and (_subject(record), record.step) in self._logged:
            return
        line = json.dumps([time.time(), record.step, numbers(record)]).encode() + b"\n"
        try:
            # Of so few bytes a pipe takes all or nothing.
            taken = self._points.write(line) is not None
            reason = "it is behind"
        except OSError:
            taken, reason = False, "its process has ended"
        if not taken:
            self._count(1, reason)
        self._read_reports()

    def _read_reports(self) -> None:
        *lines, self._unread = (self._unread + (self._reports.read(_READ_BYTES) or b"")).split(b"\n")
        for line in lines:
            dropped, _, reason = line.decode(errors="replace").partition("\t")
            self._count(int(dropped), reason)

    def _count(self, dropped: int, reason: str) -> None:
        self.dropped += dropped
        self.reason = self.reason or reason

    def close(self) -> None:
        """Let the process finish its log, for ten seconds at most."""
        self._points.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._count(0, f"it did not finish within {_CLOSE_SECONDS:.0f} s")
        self._read_reports()
        self._reports.close()


def _subject(record: Record) -> str:
    """What its numbers are of: ``step``, ``evaluation/test``, ``metric/averaged``."""
    weights = getattr(record, "weights", "current")
    parts = (record.kind, getattr(record, "split", ""), "" if weights == "current" else weights)
    return "/".join(filter(None, parts))
