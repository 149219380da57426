"""The frame of a command line: positional arguments, settings as ``key=value``, ``--help``, errors in one line.

A command's settings are documented under the fields of their dataclass, the command itself in its module's docstring;
``--help`` shows both. Neither is imported before it is needed: help and completion of a shell must not wait for torch.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .console import exit_now, lenient
from .options import Setting, check_name, describe, describe_sections


@dataclass(frozen=True)
class Argument:
    """A positional argument."""

    name: str
    """as the usage shows it: ``CHECKPOINT``"""
    help: str
    nargs: str | None = None
    """as argparse has it: None for one, ``?`` for none or one, ``+`` for one or more"""
    shipped: str | None = None
    """package whose YAML files may be given by their bare names: ``infomcr_dist.recipes``"""
    default: str | None = None


@dataclass(frozen=True)
class Command:
    """One command: ``infomcr NAME`` and ``python -m MODULE``, which run the module's ``main(arguments) -> int``."""

    name: str
    module: str
    settings: str
    """import path of the settings' dataclass, ``package.module:Class``"""
    arguments: tuple[Argument, ...] = ()

    def parse(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """Split a command line into positional arguments and ``key=value`` overrides.

        ``--key=value`` and ``--key value`` become ``key=value``. What exists as a path is a path, whatever is in its
        name. ``--help`` and ``--version`` print and exit.

        Args:
            arguments: without the command's own name

        Returns:
            positional arguments, with paths for the bare names of shipped files and defaults where none is given;
            overrides, for `pipelines.options.load`

        Raises:
            ValueError: an unknown option, a missing value, or too few or too many positional arguments.
        """
        given: list[str] = []
        overrides: list[str] = []
        words = iter(arguments)
        for word in words:
            key, equals, value = word.partition("=")
            if word in _HELP:
                self.parser().parse_args([word])
            elif word == "--":
                given += words
            elif os.path.exists(word) or "/" in key:
                given.append(word)
            elif key.startswith("-"):
                if not key.startswith("--"):
                    raise ValueError(f"unknown option {word}: a setting is given as key=value or --key=value")
                key = key[2:]
                check_name(self.settings_type(), key)
                following = value if equals else next(words, None)
                if following is None or (not equals and following.startswith("--")):
                    raise ValueError(f"--{key} needs a value: --{key}=VALUE, or {key}=VALUE")
                overrides.append(f"{key}={following}")
            elif equals:
                overrides.append(word)
            else:
                given.append(word)
        return self._positionals(given, overrides), overrides

    def run(self, arguments: Sequence[str], body: Callable[[list[str], list[str]], int]) -> int:
        """Call ``body(positional arguments, overrides)``; a user's mistake becomes one line on stderr and exit code 2.

        Args:
            arguments: without the command's own name
            body: the command; it returns the exit code
        """
        lenient()

        def run() -> int:
            try:
                return body(*self.parse(arguments))
            except BrokenPipeError:  # of `... | head`
                sys.stderr.close()
                return 1
            except (ValueError, OSError) as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                return 2

        return _ended_by_signals(run)

    def main(self, arguments: Sequence[str]) -> int:
        """Import the command's module and run its ``main``; not for help, which must not wait for torch."""
        lenient()
        for word in arguments:
            if word in _HELP:
                self.parser().parse_args([word])

        def run() -> int:  # the import may take seconds
            file = _file(self.module)
            module = f"{self.module}.__main__" if file.name == "__main__.py" else self.module
            code: int = importlib.import_module(module).main(list(arguments))
            return code

        return _ended_by_signals(run)

    def description(self) -> str:
        """The docstring of the module that has ``main``, which is read and not run."""
        return docstring(self.module)

    def summary(self) -> str:
        """The first sentence of the description."""
        return " ".join(self.description().partition("\n\n")[0].split())

    def settings_type(self) -> Any:
        """The dataclass of the settings."""
        module, _, name = self.settings.partition(":")
        return getattr(importlib.import_module(module), name)

    def parser(self, parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
        """The argparse parser that shows the help, has the positional arguments and completes words.

        Args:
            parser: to fill, as that of a subcommand; None: a new one
        """
        if parser is None:
            parser = Parser(prog=f"infomcr {self.name}")
        parser.usage = self._usage()
        parser.description = self.description().replace("``", "")
        parser.formatter_class = _Help
        add_version(parser)
        settings, sections = describe(self.settings_type()), describe_sections(self.settings_type())
        for argument in self.arguments:
            shipped = f" or one of {', '.join(shipped_names(argument.shipped))}" if argument.shipped else ""
            default = f" (default: {argument.default})" if argument.default else ""
            action = parser.add_argument(argument.name, nargs=argument.nargs, help=argument.help + shipped + default)
            action.completer = _Completer(settings, argument)  # type: ignore[attr-defined]
        more = parser.add_argument("key=value", nargs="*", help="a setting, see below; also --key=value, --key value")
        more.completer = _Completer(settings, None)  # type: ignore[attr-defined]
        for section, members in groupby(settings, key=lambda setting: setting.name.rpartition(".")[0]):
            group = parser.add_argument_group(f"settings: {section}" if section else "settings", sections.get(section))
            for setting in members:
                default = "required" if setting.default is None else f"default: {setting.default or 'empty'}"
                text = f"{setting.sentence} ({default})".replace("%", "%%")
                option = group.add_argument(f"--{setting.name}", metavar=setting.type, help=text)
                option.choices = setting.choices or None
        return parser

    def _usage(self) -> str:
        names = " ".join(_USAGE[argument.nargs].format(argument.name) for argument in self.arguments)
        return f"infomcr {self.name} {names} [key=value ...]"

    def _positionals(self, given: list[str], overrides: list[str]) -> list[str]:
        least = sum(argument.nargs != "?" for argument in self.arguments)
        last = self.arguments[-1]
        if len(given) < least or (last.nargs != "+" and len(given) > len(self.arguments)):
            wanted = " and ".join(argument.help for argument in self.arguments)
            got = " ".join(given) or "none"
            hint = "; a new path with = in its name is given as ./PATH" if len(given) < least and overrides else ""
            raise ValueError(f"give {wanted}, then key=value settings, got {got}{hint}; usage: {self._usage()}")
        if not given and last.default:
            given = [last.default]
        return [_path(text, self.arguments[min(i, len(self.arguments) - 1)]) for i, text in enumerate(given)]


def termination_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
    return [n for n in (signal.SIGTERM, signal.SIGHUP) if n == signal.SIGTERM or signal.getsignal(n) != signal.SIG_IGN]


def _ended_by_signals(body: Callable[[], int]) -> int:
    """Call a command's body, which returns its exit code; SIGINT ends it, SIGTERM and SIGHUP the process, in one line.

    Process 1 of a container gets no signal that it does not handle.
    """
    stop = "stopped: repeat the command"
    before = {n: signal.signal(n, lambda *_: exit_now(stop, 75)) for n in termination_signals()}
    try:
        return body()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Parser(argparse.ArgumentParser):
    """Raises ValueError for a mistake."""

    def error(self, message: str) -> Any:
        raise ValueError(f"{message}: {self.prog} --help")


def add_version(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option ``--version``."""
    version = importlib.metadata.version("infomcr_dist")
    parser.add_argument("--version", action="version", version=f"infomcr {version}", help="print the version and exit")


def docstring(module: str) -> str:
    """The docstring of a module, or of a package's ``__main__``; the file is read and not run."""
    return ast.get_docstring(ast.parse(_file(module).read_text(encoding="utf-8"))) or ""


def shipped_names(package: str) -> list[str]:
    """Bare names of the YAML files in a folder of an installed package."""
    return sorted(path.stem for path in _folder(package).glob("*.yaml"))


def shipped_path(package: str, name: str) -> Path:
    """The YAML file of this bare name in a folder of an installed package."""
    return _folder(package) / f"{name}.yaml"


def _folder(package: str) -> Path:
    top, _, folder = package.partition(".")
    return _origin(top).parent / folder


def _file(module: str) -> Path:
    """The file that ``python -m module`` runs."""
    file = _origin(module)
    main = file.with_name("__main__.py")
    return main if file.name == "__init__.py" and main.exists() else file


def _origin(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _path(text: str, argument: Argument) -> str:
    """The path of what was given: of a file as it is, of a bare name that of the shipped file."""
    if argument.shipped is None or Path(text).is_file():
        return text
    names = shipped_names(argument.shipped)
    if text not in names:
        raise ValueError(
            f"{argument.name.lower()} {text} does not exist: give a YAML file, or one of {', '.join(names)}"
        )
    return str(shipped_path(argument.shipped, text))


_HELP = ("-h", "--help", "--version")
_USAGE = {None: "{0}", "?": "[{0}]", "+": "{0} [{0} ...]"}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows ``--key TYPE`` as ``key=TYPE``."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.metavar is None or not action.option_strings:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0][2:]}={action.metavar}"


@dataclass(frozen=True)
class _Completer:
    """What may follow what is typed, for argcomplete."""

    settings: list[Setting]
    argument: Argument | None

    def __call__(self, prefix: str, **_: Any) -> list[str]:
        found = [f"{setting.name}=" for setting in self.settings if "=" not in prefix]
        for setting in self.settings:
            if prefix.startswith(f"{setting.name}="):
                found += [f"{setting.name}={choice}" for choice in setting.choices]
        if self.argument is not None and "=" not in prefix:
            if self.argument.shipped:
                found += shipped_names(self.argument.shipped)
            found += _paths(prefix)
        return [word for word in found if word.startswith(prefix)]


def _paths(prefix: str) -> list[str]:
    folder = os.path.dirname(prefix)
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return []
    return [path + "/" * os.path.isdir(path) for path in (os.path.join(folder, name) for name in names)]


PREPARE = Command(
    "prepare",
    "pipelines.prepare",
    "pipelines.prepare.options:Options",
    (Argument("SOURCE", "a folder or archive of images"), Argument("DEST", "a directory for the data set")),
)
VERIFY = Command("verify", "pipelines.verify", "pipelines.verify:Options", (Argument("PATH", "a data set"),))
INSPECT = Command("inspect", "pipelines.inspect", "pipelines.inspect:Options", (Argument("PATH", "a data set"),))
