"""Folders as others keep them: every file once, the names of splits, what systems leave beside files."""

import os
from collections import deque
from pathlib import Path

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"), "test"),
}
"""The split of a word in the name of a folder or shard, in small letters."""

_SYSTEM = frozenset(
    ("__macosx", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini", ".ds_store",
     "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot")
)  # fmt: skip


def is_system(name: str) -> bool:
    """Whether an operating system or a NAS device puts a file or folder of this name beside those of users."""
    return name.lower() in _SYSTEM or name.startswith("._")


def walk(root: Path) -> tuple[list[str], list[str]]:
    """The files below a folder, by their paths from there, sorted; and the links that were not followed.

    Links are followed, but every folder is read once: a link to one that is read already, as in a loop, is not.

    Raises:
        ValueError: a folder cannot be listed.
    """
    files: list[str] = []
    repeated: list[str] = []
    waiting = deque([""])
    links: deque[str] = deque()
    seen: set[tuple[int, int]] = set()
    while waiting or links:
        # Links come last, so that a folder has its own name rather than that of a link to it.
        folder = waiting.popleft() if waiting else links.popleft()
        path = os.path.join(root, folder)
        try:
            stat = os.stat(path)
            if (stat.st_dev, stat.st_ino) in seen:
                repeated.append(folder)
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    name = os.path.join(folder, entry.name)
                    if os.path.isdir(os.path.join(root, name)) if entry.is_symlink() else entry.is_dir():
                        (links if entry.is_symlink() else waiting).append(name)
                    else:
                        files.append(name)
        except OSError as error:
            raise ValueError(f"cannot list {error.filename or path}: {error.strerror}; make it readable") from None
    return sorted(files), sorted(repeated)
