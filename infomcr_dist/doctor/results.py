"""What a check finds: made on each rank, merged over the ranks, shown as lines of a console."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a check found on one rank; where it is not ok, the text ends with the remedy."""

    check: str
    ok: bool
    text: str


def attempt(
    results: list[Result], check: str, function: Callable[..., T], *arguments: Any, text: Callable[[T], str] = str
) -> T | None:
    """Make a check and append its result: ok unless the function raises.

    Args:
        results: of this rank so far.
        check: its name.
        function: called with ``arguments``.
        text: makes the line's text of what the function returns.

    Returns:
        What the function returned; None where it raised.
    """
    try:
        found = function(*arguments)
    except Exception as error:  # a check takes no other one down, whatever the machine makes it raise
        reason = one_line(error) or type(error).__name__
        expected = isinstance(error, ValueError | OSError)
        results.append(Result(check, False, reason if expected else f"{type(error).__name__}: {reason}"))
        return None
    results.append(Result(check, True, text(found)))
    return found


def lines(results: list[list[Result]]) -> list[Result]:
    """Merge the results of all ranks, by rank: equal ones become one, and where they differ their ranks are given."""
    checks = list(dict.fromkeys(result.check for of_rank in results for result in of_rank))
    merged = []
    for check in checks:
        found = [(rank, result) for rank, of_rank in enumerate(results) for result in of_rank if result.check == check]
        for result in dict.fromkeys(result for _, result in found):
            ranks = [rank for rank, other in found if other == result]
            prefix = "" if len(ranks) == len(found) else f"{_ranks(ranks)}: "
            merged.append(Result(check, result.ok, prefix + result.text))
    return merged


def show(result: Result, coloured: bool) -> str:
    """One line of the console."""
    word = "ok  " if result.ok else "FAIL"
    if coloured:
        word = f"\033[{32 if result.ok else 31}m{word}\033[0m"
    return f"{word}  {result.check:<15} {result.text}"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _ranks(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' * (len(ranks) > 1)} {text}"
