"""The check of one setting."""


def require(condition: bool, setting: str, rule: str, value: object) -> None:
    """Raise a ValueError that names the setting, its rule and its value, unless the condition holds."""
    if not condition:
        raise ValueError(f"{setting} must be {rule}, got {value}")
