"""The command ``infomcr``: trains, measures and compares image classifiers with the regularizer of Jia & Su (2020).

Each command runs as ``infomcr COMMAND`` and as ``python -m MODULE``; under horovodrun on many workers.
Settings are given as key=value; --key=value and --key value are understood as well.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys

from pipelines.command import INSPECT, PREPARE, VERIFY, Argument, Command, Parser, add_version, docstring

_RECIPE = Argument("RECIPE", "one recipe", "?", shipped="infomcr_dist.recipes", default="demo")
TRAIN = Command("train", "infomcr_dist.train", "infomcr_dist.config:Config", (_RECIPE,))
MEASURE = Command(
    "measure",
    "infomcr_dist.measure",
    "infomcr_dist.config:MeasureSettings",
    (Argument("CHECKPOINT", "a checkpoint or a run directory", "+"),),
)
STUDY = Command(
    "study",
    "infomcr_dist.study",
    "infomcr_dist.study.settings:StudySettings",
    (Argument("STUDY", "one study", shipped="infomcr_dist.studies"),),
)
REPORT = Command(
    "report", "infomcr_dist.report", "infomcr_dist.config:ReportSettings", (Argument("RUN", "a run directory", "+"),)
)
DOCTOR = Command("doctor", "infomcr_dist.doctor", "infomcr_dist.config:Config", (_RECIPE,))
_TRAINED = Argument("RUN", "a run directory or a checkpoint")
EXPORT = Command("export", "infomcr_dist.export", "infomcr_dist.config:ExportSettings", (_TRAINED,))
PREDICT = Command(
    "predict",
    "infomcr_dist.predict",
    "infomcr_dist.config:PredictSettings",
    (_TRAINED, Argument("IMAGES", "images, folders of them or .tar shards", "+")),
)
PLAN = Command("plan", "infomcr_dist.plan", "infomcr_dist.config.plan:PlanSettings", (_RECIPE,))
_ALL = (TRAIN, MEASURE, PREDICT, EXPORT, STUDY, REPORT, DOCTOR, PLAN, PREPARE, VERIFY, INSPECT)
COMMANDS = {command.name: command for command in _ALL}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. A command's module is imported only if it is the one to run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        parser = _parser(os.environ["COMP_LINE"].split()[1:2])
        argcomplete.autocomplete(parser, always_complete_options=False)
    name, *rest = arguments or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name].main(rest)
    try:
        if not name.startswith("-"):
            nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown command {name}: the nearest known one is {nearest}")
        _parser([]).parse_args(arguments or ["--help"])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser(completed: list[str]) -> argparse.ArgumentParser:
    """The parser of all commands; with the arguments of those of them that are named."""
    parser = Parser(prog="infomcr", description=docstring("infomcr_dist.cli").replace("``", ""), epilog=_EPILOG,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_version(parser)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=Parser)
    for name, command in COMMANDS.items():
        subcommand = commands.add_parser(name, help=command.summary().replace("%", "%%"))
        if name in completed:
            command.parser(subcommand)
    return parser


_EPILOG = """\
infomcr COMMAND --help shows a command's arguments, settings and exit codes.
Exit code 2, in all commands: a mistake in arguments, settings or data, reported in one line.
Completion: eval "$(register-python-argcomplete infomcr)" in bash or zsh."""
