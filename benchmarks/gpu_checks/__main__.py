"""One check, in the process that `benchmarks/gpu.py` starts for it: rows go to a file as they come, a JSON a line."""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from gpu_checks import Context


def main(function: str, device: str, size: str, work: str, seconds: str, output: str) -> None:
    """Run `module:function` and append its rows to a file."""
    module, _, name = function.partition(":")
    context = Context(device, size == "tiny", Path(work), float(seconds))
    with Path(output).open("a") as file:
        for row in getattr(importlib.import_module(f"gpu_checks.{module}"), name)(context):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
