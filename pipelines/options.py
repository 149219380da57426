"""Settings: a tree of frozen dataclasses from a YAML file, then ``key=value``; back to YAML; and its description.

The type of a setting is that of its field alone. A text stays as it was typed: ``run_dir=4711_1`` and ``run_dir=on``
are texts, whatever YAML would make of them. So values are read as text and converted when their field is known.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import textwrap
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Settings = TypeVar("Settings")

_NULL = ("null", "Null", "NULL", "~", "")
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_MAX_VALUES = 100_000  # of a file; ten aliases of aliases could stand for billions


class Typed(str):
    """A value as it was typed, whose type is still open: YAML without quotes, or what follows ``key=``."""

    __slots__ = ()


@dataclass(frozen=True)
class Setting:
    """What there is to know of one setting."""

    name: str
    """dotted: ``optimizer.momentum``"""
    type: str
    default: str | None
    """as it would be typed; None where a value must be given"""
    sentence: str
    choices: tuple[str, ...]
    """all that may be typed, of a setting with a short list of values"""


def load(settings_type: type[Settings], path: Path | None, overrides: list[str]) -> Settings:
    """Read settings from a YAML file, if any, then apply ``key=value`` overrides.

    Raises:
        ValueError: the file does not exist or is no YAML mapping, a name is unknown (the nearest known one is
            given), or a value has the wrong type or is out of range.
    """
    return from_dict(settings_type, layered([] if path is None else [read_yaml(path)], overrides))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file as nested dictionaries; ValueError if it does not exist or is no YAML mapping."""
    if not path.is_file():
        raise ValueError(f"recipe {path} does not exist: give a YAML file, or none for the demo")
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"recipe {path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        if content is None or content in _NULL:
            return {}
        raise ValueError(f"recipe {path} must be a mapping of settings")
    return content


def layered(layers: list[dict[str, Any]], overrides: list[str]) -> dict[str, Any]:
    """Merge nested dictionaries, each over the ones before it, and ``key=value`` over them all."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"argument {override!r} is not of the form key=value")
        given: Any = Typed(value)
        for name in reversed(key.split(".")):
            given = {name: given}
        merged = _merge(merged, given)
    return merged


def from_dict(settings_type: type[Settings], given: Mapping[str, Any]) -> Settings:
    """Build settings from nested dictionaries, as `to_dict` and `layered` give them; ValueError as of `load`."""
    return _build(settings_type, given, "", renamed(settings_type))


def convert(hint: Any, value: Any, setting: str) -> Any:
    """Convert one value to the type of its field.

    Args:
        hint: the field's annotation
        value: as typed (`Typed`), or a Python value
        setting: its name, for messages

    Raises:
        ValueError: the value is not of this type.
    """
    if "${" in str(value):  # ${oc.env:…} would carry secrets of the environment into files that are shown around
        raise ValueError(f"{setting} must be written out, got {value!r}: nothing is put in place of ${{…}}")
    if isinstance(value, str) and value.startswith("!!"):
        raise ValueError(f"{setting} must be valid YAML without tags, got {value!r}")
    try:
        return _convert(hint, value)
    except (ValueError, KeyError, OverflowError) as error:
        text = f"{setting} must be {_in_words(hint)}, got {_shown(value)}"
        if isinstance(value, Typed) and value.startswith(("[", "{")) and _collection(value) is value:
            text += ": its brackets are not valid YAML"
        raise ValueError(text) from error


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the settings as plain, nested dictionaries and lists."""
    plain: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        plain[field.name] = to_dict(value) if is_dataclass(value) else list(value) if type(value) is tuple else value
    return plain


def to_yaml(settings: Any) -> str:
    """Return the settings as YAML that `load` reads back."""
    return str(yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True, width=math.inf))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries: ``{"optimizer.momentum": 0.9}``."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return result


def describe(settings_type: Any) -> list[Setting]:
    """List every setting with its type, default and sentence (the docstring under its field), sections last."""
    return list(_describe(settings_type, None, ""))


def describe_sections(settings_type: Any) -> dict[str, str]:
    """The first sentences of the sections' docstrings, by dotted name: ``{"data": "The data set, …"}``."""
    found: dict[str, str] = {}
    for name, hint in _hints(settings_type).items():
        if is_dataclass(hint):
            found[name] = (inspect.getdoc(hint) or "").partition("\n\n")[0]
            found.update({f"{name}.{inner}": text for inner, text in describe_sections(hint).items()})
    return found


def renamed(settings_type: Any) -> Mapping[str, str]:
    """The old names of settings and what each is now: the class's ``RENAMED``."""
    found: Mapping[str, str] = getattr(settings_type, "RENAMED", {})
    return found


def check_name(settings_type: Any, name: str) -> None:
    """ValueError if there is no setting of this dotted name; it names the new or the nearest one."""
    section, prefix = settings_type, ""
    *sections, last = name.split(".")
    for key in sections:
        _check_key(section, key, prefix, renamed(settings_type), name)
        section = _hints(section)[key]
        prefix += f"{key}."
        if _is_free(section):
            return
        if not is_dataclass(section):
            raise ValueError(f"unknown setting {name}: the nearest known one is {prefix.rstrip('.')}")
    _check_key(section, last, prefix, renamed(settings_type), name)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a value without quotes stays as it was typed, and a repeated key is an error."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {_MAX_VALUES} values, with what its aliases (*name) repeat")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, "a key that is no text or repeated", key.start_mark)
            seen.add(key.value)
        mapping = super().construct_mapping(node, deep=deep)
        return {yaml.safe_load(key) if isinstance(key, Typed) else key: value for key, value in mapping.items()}


def _expanded_size(node: Any, known: dict[int, float]) -> float:
    """Number of values, those that aliases repeat included; infinite where a value holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = () if isinstance(node, yaml.ScalarNode) else node.value
        pairs = [item for entry in inner for item in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_expanded_size(item, known) for item in pairs)
    return known[id(node)]


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _typed(loader: Any, node: Any) -> str:
    return Typed(node.value) if node.style is None else str(node.value)


for _tag in ("null", "bool", "int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _typed)


def _merge(below: Any, above: Any) -> Any:
    if not isinstance(below, dict):
        return above
    above = _collection(above)
    if not isinstance(above, Mapping):
        return above
    return {**below, **{key: _merge(below.get(key), value) for key, value in above.items()}}


def _build(
    settings_type: type[Settings], given: Mapping[str, Any], prefix: str, new_names: Mapping[str, str]
) -> Settings:
    # Alternatives ("give one of") must not be filled from a default where the other was given, so a section is built
    # from what was given alone.
    values: dict[str, Any] = {}
    hints = _hints(settings_type)
    for name in given:
        _check_key(settings_type, name, prefix, new_names, f"{prefix}{name}")
    for name, value in given.items():
        section = hints[name]
        if is_dataclass(section):
            value = _collection(value)
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{name} must be a section of settings, got {_shown(value)}")
            values[name] = _build(section, value, f"{prefix}{name}.", new_names)  # type: ignore[arg-type]
        else:
            values[name] = convert(section, value, f"{prefix}{name}")
    return settings_type(**values)


def _check_key(section: Any, key: Any, prefix: str, new_names: Mapping[str, str], name: str) -> None:
    hints = _hints(section)
    if key in hints:
        return
    if name in new_names:
        raise ValueError(f"{name} is now {new_names[name]}")
    nearest = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown setting {prefix}{key}: the nearest known one is {prefix}{nearest}")


def _convert(hint: Any, value: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if types.NoneType in inner and (value is None or (isinstance(value, Typed) and value in _NULL)):
            return None
        kinds = [kind for kind in inner if kind is not types.NoneType]
        for kind in kinds[:-1]:
            with suppress(ValueError, KeyError, OverflowError):
                return _convert(kind, value)
        return _convert(kinds[-1], value)
    if hint is Any or origin is dict:
        value = _free(value)
        if hint is Any or isinstance(value, dict):
            return value
    elif origin is tuple:
        items = _collection(value)
        if isinstance(items, (list, tuple)):
            return tuple(_convert(inner[0], item) for item in items)
    elif origin is Literal:
        return {str(choice): choice for choice in inner}[str(value)]
    elif hint is str:
        if isinstance(value, str) and not (isinstance(value, Typed) and value in _NULL and value):
            return str(value)
    elif hint is bool:
        word = str(value).lower()
        if isinstance(value, (str, bool)) and word in _TRUE + _FALSE:
            return word in _TRUE
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        number = hint(value)
        if math.isfinite(number) and (isinstance(value, str) or number == value):
            return number
    raise ValueError


def _collection(value: Any) -> Any:
    """What is typed in the form of a YAML list or mapping as such; anything else as it is."""
    if not (isinstance(value, Typed) and value.startswith(("[", "{"))):
        return value
    try:
        return _parse(str(value))
    except (yaml.YAMLError, RecursionError):
        return value


def _free(value: Any) -> Any:
    """A value of no declared type: what is in it stays as typed, until what takes it knows the types."""
    value = _collection(value)
    return {key: _free(item) for key, item in value.items()} if isinstance(value, dict) else value


def _is_free(hint: Any) -> bool:
    return any(get_origin(kind) is dict for kind in (hint, *get_args(hint)))


def _hints(settings_type: Any) -> dict[str, Any]:
    hints = get_type_hints(settings_type)
    return {field.name: hints[field.name] for field in fields(settings_type)}


def _describe(settings_type: Any, values: Any, prefix: str) -> Iterator[Setting]:
    hints, sentences, sections = _hints(settings_type), _sentences(settings_type), []
    for field in fields(settings_type):
        hint, value = hints[field.name], MISSING
        if values is not None:
            value = getattr(values, field.name)
        elif field.default is not MISSING:
            value = field.default
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        if is_dataclass(hint):
            sections.append((hint, None if value is MISSING else value, f"{prefix}{field.name}."))
            continue
        default = None if value is MISSING else _as_typed(value)
        sentence = sentences.get(field.name, "")
        yield Setting(prefix + field.name, _type_text(hint), default, sentence, _choices(hint))
    for section, inner, name in sections:
        yield from _describe(section, inner, name)


def _sentences(settings_type: Any) -> dict[str, str]:
    """The docstrings under the fields, read from the source."""
    found: dict[str, str] = {}
    for owner in reversed(settings_type.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for line, below in pairwise(definition.body):
            match line, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.replace("``", "").split())
    return found


def _as_typed(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_as_typed, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_as_typed(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_text(hint: Any) -> str:
    inner = [kind for kind in get_args(hint) if kind not in (types.NoneType, ...)]
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join([*map(_type_text, inner), *(["null"] if types.NoneType in get_args(hint) else [])])
    if get_origin(hint) is Literal:
        return "|".join(map(str, inner))
    if get_origin(hint) is tuple:
        return f"[{_type_text(inner[0])},...]"
    plain = {int: "int", float: "float", bool: "true|false", str: "text"}
    return plain.get(hint, "{...}")


def _choices(hint: Any) -> tuple[str, ...]:
    inner = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        found = [choice for kind in inner for choice in _choices(kind)]
        return (*found, "null") if found and types.NoneType in inner else tuple(found)
    if get_origin(hint) is Literal:
        return tuple(map(str, inner))
    return ("true", "false") if hint is bool else ()


def _in_words(hint: Any) -> str:
    inner = [kind for kind in get_args(hint) if kind is not types.NoneType]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, inner))
    if get_origin(hint) in (Union, types.UnionType):
        words = [*map(_in_words, inner), *(["null"] if types.NoneType in get_args(hint) else [])]
        return " or ".join(words)
    if get_origin(hint) is tuple:
        return "a list of " + {float: "numbers", int: "whole numbers"}.get(inner[0], "texts")
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain.get(hint, "a section of settings")


def _shown(value: Any) -> str:
    """A value in a message: numbers and null bare, texts in quotes."""
    if isinstance(value, Typed):
        try:
            float(value)
        except ValueError:
            return "null" if value in _NULL else repr(str(value))
        return str(value)
    return repr(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
