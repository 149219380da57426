"""Data sets on disk: tar shards with an index, prepared by us or made elsewhere."""

from pathlib import Path

from .dataset import MANIFEST, Dataset, Shard, Split, open_prepared
from .files import without_secrets

__all__ = ["Dataset", "Shard", "Split", "open_dataset"]


def open_dataset(path: str | Path) -> Dataset:
    """The data set at `path`: one that was prepared, or tar shards made elsewhere (see `pipelines.format.external`).

    Raises:
        ValueError: it is missing, empty, or its parts disagree; the message has the remedy.
    """
    root = Path(path)
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
