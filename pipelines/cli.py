"""What the command lines of `pipelines` share: `key=value` options, and errors in one line."""

import difflib
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def parse(options: type[T], arguments: list[str]) -> T:
    """An instance of the frozen dataclass `options` from key=value arguments; ValueError names what is wrong."""
    known = [field.name for field in fields(options)]  # type: ignore[arg-type]
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ValueError(f"options are given as key=value, got {argument!r}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"unknown option {key}; {hint}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(options), OmegaConf.from_dotlist(arguments))
        result: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    return result  # type: ignore[no-any-return]


def run(program: str, main: Callable[[list[str]], None]) -> None:
    """Calls main with the arguments; a user's mistake, or a full disk, becomes one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # of `... | head`
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
