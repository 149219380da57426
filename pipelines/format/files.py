"""Files on disk: whole or not at all, durable, and without secrets in messages."""

import os
import re
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Replaces the file whole: a reader finds the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def without_secrets(text: str) -> str:
    """The text, and "…" in place of what a URL in it may hold of secrets: user and password, and the query."""
    return re.sub(
        r"(\w:/{1,2})([^/@\s'\"]+@)?([^\s?'\",]*)(\?[^\s'\",]*)?",
        lambda m: f"{m[1]}{'…@' if m[2] else ''}{m[3]}{'?…' if m[4] else ''}",
        text,
    )
