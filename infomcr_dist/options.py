"""A tree of frozen dataclasses from a YAML recipe, then ``key=value``; and back to YAML."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Settings = TypeVar("Settings")


def load_config(settings_type: type[Settings], recipe: Path | None, overrides: list[str]) -> Settings:
    """A tree of frozen dataclasses from a YAML recipe, if any, then ``key=value`` overrides.

    Raises ValueError for a recipe that does not exist or is no YAML mapping, for an unknown key (with the nearest known
    one), and for a value of the wrong type or out of range.
    """
    return from_dict(settings_type, layered([] if recipe is None else [read_recipe(recipe)], overrides))


def read_recipe(recipe: Path) -> dict[str, Any]:
    """A YAML file as nested dictionaries; ValueError if it does not exist or is no YAML mapping."""
    if not recipe.is_file():
        raise ValueError(f"recipe {recipe} does not exist: give a YAML file, or none for the demo")
    try:
        content = OmegaConf.load(recipe)
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ValueError(f"recipe {recipe} is not valid YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(content):
        raise ValueError(f"recipe {recipe} must be a mapping of settings")
    return cast("dict[str, Any]", OmegaConf.to_container(content))


def layered(layers: list[dict[str, Any]], overrides: list[str]) -> dict[str, Any]:
    """Nested dictionaries, each over the ones before it, and ``key=value`` over them all; ValueError as above."""
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"argument {override!r} is not of the form key=value")
    try:
        given = OmegaConf.from_dotlist(overrides)
    except yaml.YAMLError as error:
        raise ValueError(f"arguments {overrides} are not valid YAML: {_one_line(error)}") from error
    try:
        return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.merge(*layers, given)))
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from error


def from_dict(settings_type: type[Settings], given: dict[str, Any]) -> Settings:
    """A tree of frozen dataclasses from plain, nested dictionaries, as `to_dict` gives them; ValueError as above."""
    _check_keys(settings_type, given, "")
    return _build(settings_type, given, "")


def to_yaml(config: Any) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain, nested dictionaries."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def _build(settings_type: type[Settings], given: dict[str, Any], prefix: str) -> Settings:
    # Alternatives ("give one of") must not be filled from a default where the other was given, so a section is built
    # from what was given alone.
    values: dict[str, Any] = {}
    hints = _hints(settings_type)
    for name, value in given.items():
        section = hints[name]
        if is_dataclass(section):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{name} must be a section of settings, got {value!r}")
            values[name] = _build(section, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            values[name] = _convert(section, value, f"{prefix}{name}")
    return settings_type(**values)


def _convert(hint: Any, value: Any, setting: str) -> Any:
    """The value as the field's type, by OmegaConf's rules ('8' is an int, 0.5 is not)."""
    if "${" in str(value):  # ${oc.env:…} would carry secrets of the environment into files that are shown around
        raise ValueError(f"{setting} must be written out, got {value!r}: nothing is put in place of ${{…}}")
    holder = make_dataclass("Holder", [("value", hint)])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(holder), {"value": value})
        return OmegaConf.to_object(merged).value  # type: ignore[union-attr]
    except OmegaConfBaseException as error:
        raise ValueError(f"{setting} must be {_name(hint)}, got {value!r}") from error


def _check_keys(settings_type: Any, given: dict[str, Any], prefix: str) -> None:
    hints = _hints(settings_type)
    for key, value in given.items():
        if key not in hints:
            nearest = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown setting {prefix}{key}: the nearest known one is {prefix}{nearest}")
        if is_dataclass(hints[key]) and isinstance(value, dict):
            _check_keys(hints[key], value, f"{prefix}{key}.")


def _hints(settings_type: Any) -> dict[str, Any]:
    hints = get_type_hints(settings_type)
    return {f.name: hints[f.name] for f in fields(settings_type)}


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if hint in plain:
        return plain[hint]
    inner = [a for a in get_args(hint) if a is not type(None)]
    if inner and type(None) in get_args(hint):
        return f"{_name(inner[0])} or null"
    return "a list of numbers"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
