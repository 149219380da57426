"""The check of one setting, and the value of one whose type is not declared."""

import math
from contextlib import suppress
from typing import Any

_WORDS = {"true": True, "false": False, "null": None}


def require(condition: bool, setting: str, rule: str, value: object) -> None:
    """Raise a ValueError that names the setting, its rule and its value, unless the condition holds."""
    if not condition:
        raise ValueError(f"{setting} must be {rule}, got {value}")


def plain(value: Any) -> Any:
    """What was typed as a number, true, false or null as such, in lists too; any other text stays one."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, str):
        return value
    for number in (int, float):
        with suppress(ValueError):
            if math.isfinite(number(value)):
                return number(value)
    return _WORDS.get(value.lower(), str(value))
