"""Settings from YAML and the command line: types by field, texts as typed, round trips, descriptions."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from pipelines import options


@dataclass(frozen=True)
class Inner:
    """A section.

    More about it.
    """

    rate: float = 0.1
    """Rate per step; ``0``: none."""
    names: tuple[str, ...] = ("a", "b")
    """Some names."""


@dataclass(frozen=True)
class Base:
    count: int = 3
    """How many,
    over two lines."""


@dataclass(frozen=True)
class Tree(Base):
    RENAMED: ClassVar[dict[str, str]] = {"total": "count", "inner.speed": "inner.rate"}

    text: str = "plain"
    """A text."""
    maybe: str | None = None
    """A text, or none."""
    kind: Literal["on", "off"] = "on"
    """One of two."""
    flag: bool = False
    """A switch."""
    size: int | None = None
    """A size."""
    inner: Inner = field(default_factory=lambda: Inner(rate=0.5))
    free: dict[str, Any] = field(default_factory=dict)
    """Anything."""


TEXTS = [
    "4711_1", "073015", "1.10", "on", "run #2", "null", "~", "", "x=y", "a=b=c", "1e-3", "2024-01-01", "12:30:00",
    "0x1F", "[1", "{a: 1}", "- a", "a: b", " spaced ", "'quoted'", '"double"', "ünï", "true", "yes", "*alias",
    "&anchor", "%", "@x", "!x", "two\nlines", "\t", ".inf",
]  # fmt: skip


def load(*overrides: str, path: Path | None = None) -> Tree:
    return options.load(Tree, path, list(overrides))


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("null", "~")])
def test_a_text_stays_as_it_was_typed(text: str) -> None:
    assert load(f"text={text}").text == text
    assert load(f"maybe={text}").maybe == (text or None)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_survives_yaml(text: str, tmp_path: Path) -> None:
    tree = Tree(text=text, maybe=text)
    written = options.to_yaml(tree)
    assert yaml.safe_load(written) == options.to_dict(tree), "any other reader of YAML sees the same"
    (tmp_path / "t.yaml").write_text(written)
    assert load(path=tmp_path / "t.yaml") == tree


@pytest.mark.parametrize("text", ["4711_1", "073015", "1.10", "on", "2024-01-01", "12:30:00", "0x1F", ".inf"])
def test_a_text_without_quotes_in_a_file_stays_as_well(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(f"text: {text}  # a comment\nfree: {{deep: {{text: {text}}}}}\n")
    tree = load(path=tmp_path / "t.yaml")
    assert tree.text == text
    assert options.from_dict(Tree, tree.free["deep"]).text == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("count=8", 8), ("count=-1", -1), ("count=1_000", 1000), ("count=010", 10),
        ("size=null", None), ("size=", None), ("size=4", 4),
        ("inner.rate=1e-3", 0.001), ("inner.rate=2", 2.0), ("inner.rate=.5", 0.5),
        ("flag=true", True), ("flag=off", False), ("flag=YES", True), ("flag=0", False),
        ("kind=off", "off"), ("kind=on", "on"),
        ("inner.names=[on, 1.10]", ("on", "1.10")), ("inner.names=[]", ()),
    ],
)  # fmt: skip
def test_the_field_decides_the_type(override: str, value: object) -> None:
    tree = options.flat(options.to_dict(load(override)))
    found = tree[override.partition("=")[0]]
    assert found == (list(value) if isinstance(value, tuple) else value)
    assert type(found) is type(list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("count=1.5", "count must be a whole number, got 1.5"),
        ("count=true", "count must be a whole number, got 'true'"),
        ("count=null", "count must be a whole number, got null"),
        ("count=", "count must be a whole number, got null"),
        ("count.x=3", "count must be a whole number, got {'x': '3'}"),
        ("size=many", "size must be a whole number or null, got 'many'"),
        ("inner.rate=fast", "inner.rate must be a number, got 'fast'"),
        ("inner.rate=nan", "inner.rate must be a number, got nan"),
        ("inner.rate=-.inf", "inner.rate must be a number, got '-.inf'"),
        ("inner.rate=[1]", "inner.rate must be a number, got '[1]'"),
        ("inner.names=a", "inner.names must be a list of texts, got 'a'"),
        ("inner.names=[a", "inner.names must be a list of texts, got '[a': its brackets are not valid YAML"),
        ("count=" + 400 * "9", "count must be a whole number, got 999"),
        ("inner.names=" + 9999 * "[", "inner.names must be a list of texts, got '[["),
        ("flag=2", "flag must be true or false, got 2"),
        ("kind=maybe", "kind must be one of on, off, got 'maybe'"),
        ("text=null", "text must be a text, got null"),
        ("inner=3", "inner must be a section of settings, got 3"),
        ("free=3", "free must be a section of settings, got 3"),
        ("total=3", "total is now count"),
        ("inner.speed=3", "inner.speed is now inner.rate"),
        ("counts=3", "unknown setting counts: the nearest known one is count"),
        ("inner.rat=3", "unknown setting inner.rat: the nearest known one is inner.rate"),
        ("text=${oc.env:HOME}", "text must be written out, got '${oc.env:HOME}': nothing is put in place of ${…}"),
        ("free.a=${x}", "free must be written out"),
        ("text=!!python/name:os.system", "text must be valid YAML without tags"),
        ("count", "argument 'count' is not of the form key=value"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_layers_merge_and_the_last_one_wins(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("count: 5\ninner: {rate: 2, names: [x, y]}\nfree: {a: {b: 1, c: 2}}\n")
    tree = load("inner.names=[z]", "count=6", "count=7", "free.a.b=[1, 2]", "free.d={e: 3}", path=tmp_path / "t.yaml")
    assert (tree.count, tree.inner) == (7, Inner(2.0, ("z",)))
    assert tree.free == {"a": {"b": ["1", "2"], "c": "2"}, "d": {"e": "3"}}
    tree = load("inner={names: [q]}", path=tmp_path / "t.yaml")
    assert tree.inner == Inner(2.0, ("q",)), "a section in braces is merged, not put in place of the other"
    assert load("inner={names: [q]}").inner == Inner(0.1, ("q",)), "a section that is given is built from what is given"
    assert load().inner == Inner(0.5)


@pytest.mark.parametrize(
    "content", ["count: 1\ncount: 2\n", "inner: {rate: 1, rate: 1}\n", "a: [1\n", "? [a]\n: 1\n", "\t: x\n"]
)
def test_a_file_that_is_no_yaml_or_repeats_a_key(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"t\.yaml is not valid YAML") as caught:
        load(path=tmp_path / "t.yaml")
    assert "\n" not in str(caught.value)


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("free: {a: &a {x: 1, y: 2}, b: {<<: *a, y: 3}}\ninner: {names: &n [p, q]}\n")
    tree = load(path=tmp_path / "t.yaml")
    assert tree.free["b"] == {"x": "1", "y": "3"}
    assert tree.inner.names == ("p", "q")


@pytest.mark.parametrize("content", [
    "free:\n  a0: &a0 [x, x]\n" + "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
    "free: &a {b: *a}\n",
    "free: " + 9999 * "[",
])  # fmt: skip
def test_a_file_cannot_fill_the_memory(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"t\.yaml is not valid YAML"):
        load(path=tmp_path / "t.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("# nothing yet\n")
    assert load(path=tmp_path / "t.yaml") == Tree()


def test_python_values_are_taken_too() -> None:
    given = {"count": "8", "size": None, "flag": True, "inner": {"rate": 1, "names": ["a"]}}
    tree = options.from_dict(Tree, json.loads(json.dumps(given)))
    assert (tree.count, tree.size, tree.flag, tree.inner) == (8, None, True, Inner(1.0, ("a",)))
    assert type(tree.inner.rate) is float
    for bad in ({"count": True}, {"count": 1.5}, {"flag": 1}, {"text": 3}, {"inner": {"rate": float("nan")}}):
        with pytest.raises(ValueError, match="must be"):
            options.from_dict(Tree, bad)


def test_every_setting_is_described_from_its_own_docstring() -> None:
    found = {setting.name: setting for setting in options.describe(Tree)}
    assert list(found) == [
        "count", "text", "maybe", "kind", "flag", "size", "free", "inner.rate", "inner.names"
    ]  # fmt: skip
    assert found["count"] == options.Setting("count", "int", "3", "How many, over two lines.", ())
    assert found["kind"] == options.Setting("kind", "on|off", "on", "One of two.", ("on", "off"))
    assert found["flag"].choices == ("true", "false")
    assert (found["size"].type, found["size"].default) == ("int|null", "null")
    assert (found["inner.rate"].default, found["inner.rate"].sentence) == ("0.5", "Rate per step; 0: none.")
    assert (found["inner.names"].type, found["inner.names"].default) == ("[text,...]", "[a,b]")
    assert options.describe_sections(Tree) == {"inner": "A section."}


def test_a_described_default_is_the_default_when_it_is_typed() -> None:
    for setting in options.describe(Tree):
        if setting.default is not None and setting.name != "free":
            given = options.flat(options.to_dict(load(f"{setting.name}={setting.default}")))
            assert given[setting.name] == options.flat(options.to_dict(Tree()))[setting.name]


@pytest.mark.parametrize("name", ["count", "inner.rate", "free.any.thing", "inner"])
def test_a_name_that_is_known(name: str) -> None:
    options.check_name(Tree, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coutn", "nearest known one is count"),
        ("inner.rates", "nearest known one is inner.rate"),
        ("count.x", "nearest known one is count"),
        ("innr.rate", "nearest known one is inner"),
        ("total", "total is now count"),
    ],
)
def test_a_name_that_is_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options.check_name(Tree, name)
