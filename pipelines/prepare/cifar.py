"""CIFAR-10 and CIFAR-100 as they are published, in the binary and in the python version; pixels are kept as they are.

The files of the python version are pickles. They are never loaded: their opcodes are listed, and those that build
numbers, texts and containers are followed; one that calls something is recorded. Nothing is imported, called or looked
up, and any other opcode is an error.
"""

import pickletools
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .archives import File, Item, Source

_PIXELS = (3, 32, 32)
_BYTES = 3072  # of the pixels of an image
_MAX_OPCODES = 1_000_000  # CIFAR-100's training file has a quarter of them; every one may take memory


@dataclass(frozen=True)
class _Version:
    """Names of the files; label_bytes: before the pixels of the binary version, the last of them is the class."""

    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int = 0
    labels_key: str = ""
    names_key: str = ""


_VERSIONS = (
    _Version(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", label_bytes=1),
    _Version(("train.bin",), "test.bin", "fine_label_names.txt", label_bytes=2),
    _Version(
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        labels_key="labels",
        names_key="label_names",
    ),
    _Version(("train",), "test", "meta", labels_key="fine_labels", names_key="fine_label_names"),
)


def cifar(source: str, files: list[File]) -> Source | None:
    """The images, if a version of CIFAR is among the files, else None; ValueError for what is missing or damaged.

    Either version, as archive or folder, gives the same items but for their offsets.
    """
    folders: dict[str, dict[str, File]] = {}
    for file in files:
        folder, _, name = file.name.rpartition("/")
        folders.setdefault(folder, {})[name] = file
    for version in _VERSIONS:
        names = {*version.train, version.test, version.names}
        for found in folders.values():
            if len(names & found.keys()) > 1:
                if missing := sorted(names - found.keys()):
                    raise ValueError(f"{source} has no {missing[0]}; unpack the published archive again, or give it")
                if any(found[name].offset < 0 for name in names):
                    raise ValueError(f"{source} is a zip of CIFAR; unpack it and give the folder")
                return _read(source, found, version)
    return None


def _read(source: str, files: dict[str, File], version: _Version) -> Source:
    read = _pickled if version.labels_key else _binary
    classes = _class_names(source, files[version.names], version)
    items: list[Item] = []
    for split, names in (("train", version.train), ("test", (version.test,))):
        number = 0
        for name in names:
            file = files[name]
            try:
                labels, start, stride = read(file, version)
                if not labels:
                    raise ValueError("no images")
                if min(labels) < 0 or max(labels) >= len(classes):
                    raise ValueError(f"labels {min(labels)}..{max(labels)} for {len(classes)} classes")
            except ValueError as error:
                raise ValueError(f"{source}: {name} is damaged ({error}); get the published archive again") from None
            for row, label in enumerate(labels):
                place = file.offset + start + row * stride
                items.append(Item(f"{split}/{number}", file.file, place, _BYTES, split, label, _PIXELS))
                number += 1
    return Source(classes, items)


def _class_names(source: str, file: File, version: _Version) -> list[str]:
    try:
        if not version.names_key:
            return file.read().decode("ascii").split()
        names = _entry(_described(file.read()), version.names_key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{version.names_key} is no list of names")
        return names
    except ValueError as error:
        raise ValueError(f"{source}: {file.name} is damaged ({error}); get the published archive again") from None


def _binary(file: File, version: _Version) -> tuple[list[int], int, int]:
    """Labels, the offset of the pixels of the first image in the file, and the bytes from one image to the next."""
    stride = version.label_bytes + _BYTES
    if file.size % stride:
        raise ValueError(f"{file.size} bytes, not a multiple of {stride}")
    records: NDArray[np.uint8] = np.frombuffer(file.read(), np.uint8).reshape(-1, stride)
    return records[:, version.label_bytes - 1].tolist(), version.label_bytes, stride


def _pickled(file: File, version: _Version) -> tuple[list[int], int, int]:
    """The same of a file of the python version."""
    content = _described(file.read())
    labels = _entry(content, version.labels_key)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{version.labels_key} is no list of numbers")
    match _entry(content, "data"):
        case _Call(
            _Name("numpy.core.multiarray _reconstruct"),
            state=(_, (rows, columns), _Call(_Name("numpy dtype"), ("u1", *_)), False, _Block(start, size)),
        ) if (rows, columns, size) == (len(labels), _BYTES, len(labels) * _BYTES):
            return labels, start, _BYTES
    raise ValueError(f"data is no array of bytes with {_BYTES} for each of {len(labels)} labels")


def _entry(content: object, key: str) -> object:
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"it has no {key}")
    return content[key]


@dataclass(frozen=True)
class _Name:
    """What a pickle would import, as text."""

    name: str


@dataclass(frozen=True)
class _Block:
    """A long text of a pickle, by its offset and size."""

    start: int
    size: int


@dataclass
class _Call:
    """What a pickle would call, its arguments, and the state that it would set on the result."""

    function: Any
    arguments: Any
    state: Any = None


def _described(pickle: bytes) -> Any:
    """What a pickle of protocol 0 to 2 describes, in plain values and the classes above; ValueError otherwise."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    value: Any
    at: Any

    def since_mark() -> list[Any]:
        at = marks.pop()
        values = stack[at:]
        del stack[at:]
        return values

    def entries(values: list[Any]) -> dict[str, Any]:
        if not all(isinstance(key, str) for key in values[::2]):
            raise TypeError("a key is no text")
        return dict(zip(values[::2], values[1::2], strict=True))

    try:
        for opcode, value, at in islice(pickletools.genops(pickle), _MAX_OPCODES):
            match opcode.name:
                case "PROTO":
                    pass
                case "MARK":
                    marks.append(len(stack))
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1":
                    stack.append(value)
                case "STRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE":
                    stack.append(value)
                case "BINSTRING":  # the pixels: no other text is longer than 255 characters
                    stack.append(_Block(at + 5, len(value)))
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
                case "LIST":
                    stack.append(since_mark())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    values = [stack.pop() for _ in range(int(opcode.name[-1]))]
                    stack.append(tuple(reversed(values)))
                case "DICT":
                    stack.append(entries(since_mark()))
                case "APPEND":
                    item = stack.pop()
                    stack[-1].append(item)
                case "APPENDS":
                    values = since_mark()
                    stack[-1].extend(values)
                case "SETITEM":
                    item, key = stack.pop(), stack.pop()
                    stack[-1].update(entries([key, item]))
                case "SETITEMS":
                    values = since_mark()
                    stack[-1].update(entries(values))
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[int(value)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[int(value)])
                case "GLOBAL":
                    stack.append(_Name(value))
                case "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_Call(function, arguments))
                case "BUILD":
                    state = stack.pop()
                    stack[-1].state = state
                case "STOP":
                    return stack.pop()
                case name:
                    raise ValueError(f"{name} is not used by the published files")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its opcodes make no sense: {error!r}") from None
    raise ValueError(f"more than {_MAX_OPCODES} opcodes")
