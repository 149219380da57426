"""Data sets on disk or at URLs: tar shards with an index, prepared by us or made elsewhere."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from .dataset import MANIFEST, Dataset, Shard, Split, open_prepared
from .files import without_secrets
from .remote import Location, Url, expand

__all__ = ["Dataset", "Shard", "Split", "open_dataset"]


def open_dataset(path: str | Path) -> Dataset:
    """The data set at `path`: one that was prepared, or tar shards made elsewhere (see `pipelines.format.external`).

    A text with :// is the URL of a prepared data set, or of shards, with braces: https://host/train-{0000..0146}.tar.

    Raises:
        ValueError: it is missing, empty, or its parts disagree; the message has the remedy.
    """
    if isinstance(path, str) and "://" in path:
        return _open_urls(path)
    root = Path(path)
    if re.match(r"\w+:/[^/]", os.fspath(root)):
        raise ValueError(f"{without_secrets(os.fspath(root))} is a URL, where a path is needed")
    try:
        if not root.is_dir():
            raise FileNotFoundError
    except OSError as error:
        reason = f" ({error.strerror})" if error.strerror else ""
        place = without_secrets(str(root))
        raise ValueError(
            f"no data set at {place}{reason}; make one with: python -m pipelines.prepare SOURCE {place}"
        ) from None
    try:
        return open_prepared(root)
    except FileNotFoundError:
        pass
    from .external import find_shards, open_external  # here, because processes and progress bars take a while to import

    shards = find_shards(root)
    if not shards:
        raise ValueError(
            f"{root} has neither {MANIFEST} nor .tar shards; make a data set with: "
            "python -m pipelines.prepare SOURCE DEST"
        )
    return open_external(root, shards)


def _open_urls(text: str) -> Dataset:
    files = expand(text)
    if not any(_is_shard(file) for file in files):
        if len(files) > 1:
            raise ValueError(f"{without_secrets(text)} must name .tar shards, or one prepared data set; got {files[0]}")
        return open_dataset(files[0]) if isinstance(files[0], Path) else open_prepared(files[0])
    if odd := [file for file in files if not _is_shard(file)]:
        raise ValueError(f"{odd[0]} must end in .tar, as the other shards do")
    from .external import open_external, split_names

    places = [file.text if isinstance(file, Url) else file.as_uri() for file in files]
    protocols = {place.partition("://")[0] for place in places}
    if len(protocols) > 1:
        raise ValueError(f"{without_secrets(text)} names shards of several protocols: {', '.join(sorted(protocols))}")
    paths = ["".join(urlsplit(place)[1:3]) for place in places]
    # What all have in common is no part of a name: it may hold the word test.
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = {os.path.relpath(path, common or "."): file for path, file in zip(paths, files, strict=True)}
    if len(names) < len(files):
        raise ValueError(f"{without_secrets(text)} names a shard twice")
    root: Location = Path(common) if isinstance(files[0], Path) else Url(f"{protocols.pop()}://{common}")
    shards = {split: [names[name] for name in found] for split, found in split_names(root, sorted(names)).items()}
    return open_external(root, shards)


def _is_shard(file: Location) -> bool:
    return file.name.lower().endswith(".tar")
