"""Small photos, folders, tars and shards, the commands they are given to, and the verdict on what these do."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SECONDS, SIDE = 120, 64  # of a command; of an image
FOLDER = Path(__file__).parent  # commands start where Python can import nothing of ours
ENV = {name: value for name, value in os.environ.items() if name not in ("PYTHONIOENCODING", "PYTHONUTF8")}
ENV["PYTHONPATH"] = str(FOLDER.parents[1])
SETTINGS = [
    "model=cnn", "epochs=1", "threads=1", "data.augmentation=none", "data.batch_size=4", "regularizer.when=never",
    "telemetry.port=null", "schedule.kind=constant", "schedule.milestones=[]", "schedule.warmup_epochs=0",
]  # fmt: skip
PROBE = """
import sys, numpy as np
from pipelines import LoaderConfig, LocalBatch, open_dataset, open_loader
path, backend, size, out, *augmentations = sys.argv[1:]
try:
    split = open_dataset(path).splits["train"]
    seen = {"labels": split.labels, "sides": np.stack([split.index["height"], split.index["width"]], 1)}
    for augmentation in augmentations if backend != "index" else []:
        import torch
        ids = np.arange(12 if backend == "webdataset" else len(split))
        config = LoaderConfig(backend=backend, augmentation=augmentation, size=int(size), mean=(0, 0, 0), std=(1, 1, 1),
                              batch_size=len(ids), device=torch.device("cpu"))
        loader = open_loader(split, config)
        ((_, images, _),) = loader.batches([LocalBatch(0, 0, ids, ids + 1, len(ids))])
        seen["images" if augmentation == "none" else augmentation] = (images.numpy() * 255).round()
    np.savez(out, **seen)
except ValueError as error:
    print("refused:", error, file=sys.stderr)
    sys.exit(2)
"""

Verdict = tuple[bool, str]


class Done(NamedTuple):
    """A command that has ended.

    seen, of the probe: images 0..255 (N, 3, SIDE, SIDE), labels, sides (height, width); augmented images by the name of
    the augmentation.
    """

    code: int
    out: str
    err: str
    seen: Mapping[str, Any] = MappingProxyType({})

    @property
    def line(self) -> str:
        return re.split(r"[\r\n]+", self.err.strip())[-1]

    def refuses(self, *words: str) -> bool:
        """As for a user's mistake, in a line with one of the words."""
        return self.code == 2 and "Traceback" not in self.err and any(word in self.line for word in words)


def run(*command: Any, memory: int | None = None, seconds: int = SECONDS, **env: str) -> Done:
    """python -m COMMAND…, or python -c TEXT…"""
    command = (sys.executable, *(command if command[0] == "-c" else ("-m", *command)))
    process = subprocess.Popen(
        [str(word) for word in command],
        env={**ENV, **env},
        cwd=FOLDER,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory))) if memory else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        streams = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return Done(process.returncode, *(stream.decode("utf-8", "replace") for stream in streams))


def decode(path: Path, backend: str, *augmentations: str, **more: Any) -> Done:
    """index: what it holds alone; dali, torch; webdataset: twelve of the stream."""
    out = path.with_name("seen.npz")
    done = run("-c", PROBE, path, backend, SIDE, out, "none", *augmentations, **more)
    return done if done.code else done._replace(seen=dict(np.load(out, allow_pickle=False)))


def train(data: Path, *settings: str, **env: str) -> Done:
    return run(
        "infomcr_dist.train", *SETTINGS, f"data.path={data}", f"run_dir={data.with_name('run')}", *settings, **env
    )


class Prepared:
    """places, images: split/class and encoded image by the name in the source; messages: what else prepare prints and
    writes."""

    def __init__(self, source: Path, dest: Path, *options: str, **more: Any) -> None:
        self.done = run("pipelines.prepare", source, dest, *options, **more)
        self.classes: list[str] = []
        self.places: dict[str, str] = {}
        self.images: dict[str, bytes] = {}
        samples: dict[tuple[str, str], dict[str, bytes]] = {}
        if self.done.code:
            return
        manifest = json.loads((dest / "manifest.json").read_text(encoding="utf-8"))
        self.classes = manifest["classes"]
        rest = {key: manifest[key] for key in manifest.keys() - {"classes", "source", "options", "splits"}}
        messages = json.dumps(rest, ensure_ascii=False) + self.done.out + self.done.err
        messages = messages.replace(str(dest), "").replace(str(source), "")
        self.messages = re.sub(r'"split": "\w+"|(train|test) \d+ samples', "", messages)
        for path in sorted(dest.glob("*/*.tar")):
            with tarfile.open(path) as tar:
                for entry in tar:
                    key, _, kind = entry.name.partition(".")
                    samples.setdefault((path.parent.name, key), {})[kind] = tar.extractfile(entry).read()
        for (split, _), sample in samples.items():
            facts = json.loads(sample["json"])
            name = facts["name"].removeprefix("./")
            self.places[name], self.images[name] = f"{split}/{facts['class']}", sample.get("jpg") or sample["png"]

    def mentions(self, name: str) -> bool:
        """The file, or a folder above it as a whole."""
        folders = [re.escape(str(folder)) for folder in PurePosixPath(name).parents if str(folder) != "."]
        return name in self.messages or any(
            re.search(rf"(?<![\w/]){folder}/?(?![\w/])", self.messages) for folder in folders
        )


def prepared(tmp: Path, files: dict[str, bytes], *options: str) -> Prepared:
    """These files beside photos of cat and dog, prepared; it must not be refused."""
    made = Prepared(tree(tmp / "in", {**folders(), **files}), tmp / "out", *options)
    assert not made.done.code, f"exit {made.done.code}: {made.done.line}"
    return made


def layout(
    source: Path,
    truth: dict[str, str],
    *words: str,
    dest: Path | None = None,
    silent: Collection[str] = (),
    options: Iterable[str] = (),
    **more: Any,
) -> Verdict:
    """The verdict on prepare of `source`.

    truth: split/class by the file's name, "" where there is no label; words: one of them is in a refusal; silent: parts
    of the names of what may be skipped silently.
    """
    made = Prepared(source, dest or source.with_name("out"), *options, **more)
    if made.done.code:
        return made.done.refuses(*words), made.done.line
    wrong = [f"{name} became {place}" for name, place in made.places.items() if truth.get(name) != place]
    lost = [
        name
        for name in truth
        if not (name in made.places or made.mentions(name) or any(text in name for text in silent))
    ]
    extra = sorted(set(made.classes) ^ {place.partition("/")[2] for place in truth.values() if place})
    faults = {f"{len(wrong)} wrong": wrong, f"{len(lost)} lost silently": lost, "classes too many or missing": extra}
    text = "".join(f"; {fault}: {', '.join(names[:3])}" for fault, names in faults.items() if names)
    return not text, f"{len(made.places)} of {len(truth)} files stored{text}"


def photo(k: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """Smooth patches of colour, unlike those of another k."""
    coarse = np.random.default_rng(k).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def pixels(image: Any) -> np.ndarray:
    """Of an image, encoded image or array (3, H, W): float (3, H, W)."""
    image = Image.open(io.BytesIO(image)).convert("RGB") if isinstance(image, bytes) else image
    return np.asarray(image, float).transpose(2, 0, 1) if isinstance(image, Image.Image) else np.asarray(image, float)


def distance(a: Any, b: Any) -> float:
    """Mean difference in grey levels."""
    return float(np.abs(pixels(a) - pixels(b)).mean())


def which(image: Any, photos: Iterable[int]) -> int | None:
    """The number of the photo that it is; None if of none of these."""
    apart, k = min((distance(image, photo(k)), k) for k in photos)
    return k if apart < 8 else None


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pack(path: Path, files: dict[str, Any]) -> Path:
    """A tar; a file is bytes, or the type of a link and where it leads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                entry.type, entry.linkname, data = *data, b""
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def folders(count: int = 3, start: int = 0, under: str = "") -> dict[str, bytes]:
    """Photos of two classes: UNDERcat/0.jpg … UNDERdog/0.jpg …"""
    return {
        f"{under}{name}/{k}.jpg": encode(photo(start + 10 * c + k))
        for c, name in enumerate(("cat", "dog"))
        for k in range(count)
    }


def truth_of(names: Iterable[str]) -> dict[str, str]:
    """split/class of each file by the folders that it is in; valid/ is of the test split."""
    return {name: f"{'test' if name.startswith('valid/') else 'train'}/{name.split('/')[-2]}" for name in names}


def samples(count: int = 6, start: int = 0, prefix: str = "", **other: bytes) -> dict[str, bytes]:
    """PREFIX0.jpg, PREFIX0.cls …, labels 0 and 1 in turn; other: s3=the image of the third."""
    keys = {
        f"{prefix}{k}": (other.get(f"s{k}", encode(photo(k))), b"%d" % (k % 2)) for k in range(start, start + count)
    }
    return {
        f"{key}.{kind}": data for key, pair in keys.items() for kind, data in zip(("jpg", "cls"), pair, strict=True)
    }
