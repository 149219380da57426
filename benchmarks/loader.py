"""Images per second of every loader, next to the usual alternatives and to the bound of decoding alone.

    python benchmarks/loader.py
    python benchmarks/loader.py stored=32 "loaders=[torch,resident]" "augmentations=[none,crop4_flip]"
    python benchmarks/loader.py stored=128 cores=[1] augmentations=[random_resized_crop] rounds=9

Shards are made of imagenet-sample-250.tar, resized to 32 x 32 as CIFAR's are (random_resized_crop trains at 28 x 28)
and to 128 x 128 (at 112 x 112), 3 000 images each, and as they are (1 000 images; trained on at 224 x 224).
Every loader is a process of its own, bound to the given cores; in each round all of them, on one core and on more, take
a turn, in random order, alone on those cores. The tables have medians over rounds and, in brackets, quartiles, those of
ratios within a round; CPU time counts all processes and threads of a loader, and is the one to trust on a machine with
other work; memory is the proportional share (PSS) of its processes; first batch is the time to it in the first turn,
the making of the pipeline or processes included.

- decode only: simplejpeg on bytes in memory, nothing else, in a process a core that shares nothing with the others. The
  bound of everything on a CPU; what the machine makes of a second core.
- decode + augment: the same with our crop, resize, flip and normalization into one batch. The bound of "torch".
- resident: images in memory, decoded before the first turn; where it offers the augmentation.
- DALI's reader: DALI's own order, reading and random numbers (`readers.webdataset`), which "dali" replaces.
- PIL DataLoader: image files, PIL, torch's DataLoader with a process a core; webdataset recipe: the library's usual
  pipeline (shards, shuffle, decode("pil"), WebLoader) with the same transforms.
"""

import gc
import itertools
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps

from pipelines import Backend, LoaderConfig, Sampler, augment, open_dataset, open_loader
from pipelines.loaders.reader import Files
from pipelines.loaders.render import Renderer
from pipelines.options import load
from pipelines.prepare import Options, prepare

_BATCH = 128
_Epoch = Callable[[], Iterable[Any]]  # yields the images of a batch, or a list as long


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    source: str = "../shared/data/imagenet-sample-250.tar"
    stored: int = -1
    """Only shards of this size, 32, 128 or 0 (originals); -1: all."""
    augmentations: tuple[str, ...] = ("none", "flip", "crop1_flip", "crop4_flip", "random_resized_crop")
    cores: tuple[int, ...] = (1, 2)
    rounds: int = 5
    loaders: tuple[str, ...] = ()
    """Only these; all if empty."""


@dataclass(frozen=True)
class Task:
    """What one loader process measures."""

    loader: str
    data: Path
    files: Path
    augmentation: str
    size: int
    cores: tuple[int, ...]


def ours(backend: Backend, task: Task) -> _Epoch:
    """A backend of `pipelines`."""
    dataset = open_dataset(task.data)
    config = LoaderConfig(
        backend=backend,
        augmentation=task.augmentation,
        size=task.size,
        mean=dataset.mean,
        std=dataset.std,
        batch_size=_BATCH,
        device=torch.device("cpu"),
        threads=len(task.cores),
    )
    loader = open_loader(dataset.splits["train"], config)
    sampler = Sampler(len(dataset.splits["train"]), _BATCH, seed=0)
    epochs = itertools.count()

    return lambda: (images for _, images, _ in loader.batches(sampler.local_batches(next(epochs), 0, 1)))


def decode_only(task: Task) -> _Epoch:
    """simplejpeg on bytes in memory, in a process a core."""
    encoded = in_memory(task)

    def work(numbers: list[int], batch: np.ndarray) -> None:
        for number in numbers:
            simplejpeg.decode_jpeg(encoded[number])

    return in_processes(len(encoded), task, work)


def decode_and_augment(task: Task) -> _Epoch:
    """The torch backend without reading, sharing and batching."""
    encoded = in_memory(task)
    split = open_dataset(task.data).splits["train"]
    render = Renderer(task.size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), False)
    index = split.index
    chosen, sides = augment.augmentation(task.augmentation), (index["height"], index["width"])
    rows = augment.draw(chosen, 0, 0, np.arange(len(split)), *sides).rows()

    def work(numbers: list[int], batch: np.ndarray) -> None:
        render.batch(batch, lambda row, pixels: render.decode(encoded[numbers[row]], rows[numbers[row]], pixels))

    return in_processes(len(encoded), task, work)


def in_memory(task: Task) -> list[bytes]:
    """The encoded images of the data set."""
    split = open_dataset(task.data).splits["train"]
    return list(map(Files(split, 1).read, range(len(split))))


_Work = Callable[[list[int], np.ndarray], None]
_in_process: dict[str, Any] = {}


def _begin_process(work: _Work, size: int) -> None:
    torch.set_num_threads(1)
    _in_process.update(work=work, batch=np.empty((_BATCH, 3, size, size), np.float32))


def _piece(numbers: list[int]) -> list[int]:
    rows = numbers[0] % _BATCH
    _in_process["work"](numbers, _in_process["batch"][rows : rows + len(numbers)])
    return numbers


def in_processes(count: int, task: Task, work: _Work) -> _Epoch:
    """`count` images in pieces of a batch that is larger than a cache, as a loader's is; nothing comes back."""
    gc.freeze()  # a collection in the processes would copy what they share
    pool = multiprocessing.get_context("fork").Pool(len(task.cores), _begin_process, (work, task.size))
    pieces = [list(range(start, min(start + 16, count))) for start in range(0, count, 16)]
    return lambda: pool.imap_unordered(_piece, pieces)


class PillowTransform:
    """The usual transforms on PIL images, as torchvision has them."""

    def __init__(self, task: Task) -> None:
        self._chosen, self._size = augment.augmentation(task.augmentation), task.size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        chosen, size = self._chosen, self._size
        image = image.convert("RGB")
        if chosen.area:
            for _ in range(10):
                area = image.width * image.height * random.uniform(*chosen.area)
                ratio = np.exp(random.uniform(*np.log(chosen.ratio)))
                width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
                if 0 < width <= image.width and 0 < height <= image.height:
                    break
            else:
                width = height = min(image.size)
            x, y = random.randint(0, image.width - width), random.randint(0, image.height - height)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + width, y + height))
        elif image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        if chosen.pad:
            x, y = random.randint(0, 2 * chosen.pad), random.randint(0, 2 * chosen.pad)
            image = ImageOps.expand(image, chosen.pad).crop((x, y, x + size, y + size))
        if chosen.flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        return tensor.sub_(0.5).div_(0.25)


class _ImageFiles(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, task: Task) -> None:
        self._paths = sorted(task.files.glob("*.jpg"))
        self._transform = PillowTransform(task)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        with Image.open(self._paths[number]) as image:
            return self._transform(image), 0


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def pil_dataloader(task: Task) -> _Epoch:
    """Files, PIL and torch's DataLoader."""
    loader = torch.utils.data.DataLoader(
        _ImageFiles(task),
        batch_size=_BATCH,
        shuffle=True,
        num_workers=len(task.cores),
        persistent_workers=True,
        worker_init_fn=_one_thread,
    )
    return lambda: (images for images, _ in loader)


def webdataset_recipe(task: Task) -> _Epoch:
    """The pipeline of the webdataset library's own documentation."""
    import webdataset

    urls = [str(path) for path in sorted((task.data / "train").glob("*.tar"))]
    shards = (
        webdataset.WebDataset(urls, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(PillowTransform(task), int)
        .batched(_BATCH)
    )
    loader = webdataset.WebLoader(
        shards, batch_size=None, num_workers=len(task.cores), persistent_workers=True, worker_init_fn=_one_thread
    )
    return lambda: (images for images, _ in loader)


def dali_reader(task: Task) -> _Epoch:
    """DALI alone: its reader, its shuffle, its random numbers."""
    import nvidia.dali
    from nvidia.dali.pipeline import Pipeline
    from torch.utils.dlpack import from_dlpack

    fn: Any = nvidia.dali.fn
    types: Any = nvidia.dali.types
    shards = sorted((task.data / "train").glob("*.tar"))
    chosen, side = augment.augmentation(task.augmentation), [task.size, task.size]
    index = open_dataset(task.data).splits["train"].index
    same = bool((index["height"] == task.size).all() and (index["width"] == task.size).all())
    pipeline = Pipeline(batch_size=_BATCH, num_threads=len(task.cores), device_id=None, exec_dynamic=True, seed=1)
    with pipeline:
        images, labels = fn.readers.webdataset(
            paths=[str(path) for path in shards],
            index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=1000,
        )
        if chosen.area:
            images = fn.decoders.image_random_crop(images, random_area=chosen.area, random_aspect_ratio=chosen.ratio)
        else:
            images = fn.decoders.image(images)
        if chosen.area or not same:
            images = fn.resize(images, size=side, interp_type=types.INTERP_LINEAR)
        if chosen.pad:
            shift = fn.cast(fn.random.uniform(range=[-chosen.pad, chosen.pad + 1], shape=[2]), dtype=types.INT32)
            images = fn.slice(images, start=shift, shape=side, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip() if chosen.flip else 0,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[127.5] * 3,
            std=[63.75] * 3,
        )
        pipeline.set_outputs(images, labels)
    pipeline.build()

    def epoch() -> Iterator[torch.Tensor]:
        for _ in range(-(-len(index) // _BATCH)):
            yield from_dlpack(pipeline.run()[0].as_tensor())

    return epoch


LOADERS: dict[str, Callable[[Task], _Epoch]] = {
    "decode only": decode_only,
    "decode + augment": decode_and_augment,
    "dali": partial(ours, "dali"),
    "torch": partial(ours, "torch"),
    "resident": partial(ours, "resident"),
    "webdataset": partial(ours, "webdataset"),
    "DALI's reader": dali_reader,
    "PIL DataLoader": pil_dataloader,
    "webdataset recipe": webdataset_recipe,
}


def family(process: str = "self") -> list[Path]:
    """/proc folders of this process and of those it has started, theirs included."""
    children = [path.read_text().split() for path in Path("/proc", process, "task").glob("*/children")]
    return [Path("/proc", process), *(folder for task in children for child in task for folder in family(child))]


def cpu_seconds() -> float:
    """User and system time of this process and its children."""
    fields = [(folder / "stat").read_text().rpartition(")")[2].split() for folder in family()]
    return sum(int(ticks) for stat in fields for ticks in stat[11:13]) / os.sysconf("SC_CLK_TCK")


def memory_bytes() -> int:
    """Proportional share of this process and its children."""
    texts = [(folder / "smaps_rollup").read_text() for folder in family()]
    return 1024 * sum(int(text.partition("\nPss:")[2].split()[0]) for text in texts)


def serve(task: Task, pipe: Any) -> None:
    """A loader process: an epoch at every request, answered with (images, seconds, CPU seconds, first, memory)."""
    os.sched_setaffinity(0, task.cores)
    torch.set_num_threads(len(task.cores))
    made = time.perf_counter()
    epoch = LOADERS[task.loader](task)
    making = time.perf_counter() - made
    while pipe.recv():
        started, spent, count, first = time.perf_counter(), cpu_seconds(), 0, 0.0
        for images in epoch():
            first = first or making + time.perf_counter() - started
            count += len(images)
        pipe.send((count, time.perf_counter() - started, cpu_seconds() - spent, first, memory_bytes()))
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)  # some loaders' threads and processes take their time to end


def measure(tasks: list[Task], rounds: int) -> list[list[tuple[float, ...]]]:
    """Answers of each loader, the first turn included, all taking turns."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Any] = []
    for task in tasks:
        pipe, other = context.Pipe()
        context.Process(target=serve, args=(task, other)).start()
        other.close()
        pipes.append(pipe)
    answers: list[list[tuple[float, ...]]] = [[] for _ in pipes]
    for _ in range(rounds + 1):
        for number in random.sample(range(len(pipes)), len(pipes)):
            pipes[number].send(True)
            answers[number].append(pipes[number].recv())
    for pipe in pipes:
        pipe.send(False)
    return answers


def spread(values: list[float], digits: int = 0) -> str:
    return "{1:.{n}f} [{0:.{n}f} {2:.{n}f}]".format(*statistics.quantiles(values, n=4), n=digits)


def report(data: Path, files: Path, stored: int, sizes: dict[str, int], settings: Settings) -> None:
    """The tables of one data set; sizes: side trained on by augmentation, of those stored."""
    names, cores = settings.loaders or tuple(LOADERS), settings.cores
    tables: dict[str, dict[tuple[str, str], str]] = {}

    def add(title: str, name: str, cell: str) -> None:
        tables.setdefault(title, {})[name, augmentation] = cell

    for augmentation in settings.augmentations:
        size = sizes.get(augmentation, sizes["none"])
        offered = [name for name in names if name != "resident" or stored == size]
        kinds = [(name, count) for name in offered for count in cores]
        tasks = [Task(name, data, files, augmentation, size, tuple(range(count))) for name, count in kinds]
        answers = dict(zip(kinds, measure(tasks, settings.rounds), strict=True))
        rates = {kind: [images / seconds for images, seconds, *_ in found[1:]] for kind, found in answers.items()}
        for (name, count), found in answers.items():
            add(f"images/s, cores: {count}", name, spread(rates[name, count]))
            costs = [1e6 * spent / images for images, _, spent, *_ in found[1:]]
            add(f"CPU time an image, microseconds, cores: {count}", name, spread(costs))
            add(f"first batch ms, cores: {count}", name, f"{1000 * found[0][3]:.0f}")
            add(f"memory MB, cores: {count}", name, f"{found[-1][4] / 1e6:.0f}")
        for name, count in itertools.product(offered, cores[1:]):
            ratios = [more / one for one, more in zip(rates[name, cores[0]], rates[name, count], strict=True)]
            add(f"images/s, cores: {count} relative to {cores[0]}", name, spread(ratios, 2))
    for title, table in sorted(tables.items()):
        print(f"\n{data.name}, batches of {_BATCH}: {title}")
        print(f"{'':<18}" + "".join(f"{name:>21}" for name in settings.augmentations))
        for name in names:
            cells = (table.get((name, augmentation), "–") for augmentation in settings.augmentations)
            print(f"{name:<18}" + "".join(f"{cell:>21}" for cell in cells), flush=True)


def repeated(source: Path, folder: Path, times: int) -> Path:
    """A folder of class folders with every image of the source `times` times."""
    with tarfile.open(source) as archive:
        for entry in archive:
            if entry.isfile():
                data, name = archive.extractfile(entry), Path(entry.name)
                (folder / name.parent.name).mkdir(parents=True, exist_ok=True)
                encoded = data.read() if data else b""
                for number in range(times):
                    (folder / name.parent.name / f"{number}-{name.name}").write_bytes(encoded)
    return folder


def extracted(data: Path, folder: Path) -> Path:
    """The images of a data set as single files."""
    folder.mkdir()
    split = open_dataset(data).splits["train"]
    for sample, image in enumerate(map(Files(split, 1).read, range(len(split)))):
        (folder / f"{sample:06d}.jpg").write_bytes(image)
    return folder


def main(settings: Settings) -> None:
    if not (source := Path(__file__).parents[1] / settings.source).exists():
        raise ValueError(f"source {source} is not here")
    scratch = Path(tempfile.mkdtemp(prefix="loader-benchmark-"))
    try:
        # Sides trained on, by augmentation where they are others.
        for stored, times, sizes in (
            (32, 12, {"none": 32, "random_resized_crop": 28}),
            (128, 12, {"none": 128, "random_resized_crop": 112}),
            (0, 4, {"none": 224}),
        ):
            if settings.stored not in (-1, stored):
                continue
            name = f"{stored} x {stored}" if stored else "originals"
            images = repeated(source, scratch / f"source-{stored}", times)
            prepare(str(images), scratch / name, Options(size=stored, shard_size=500))
            files = extracted(scratch / name, scratch / f"files-{stored}")
            report(scratch / name, files, stored, sizes, settings)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    try:
        main(load(Settings, None, sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"loader: {error}")
