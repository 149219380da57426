"""Shards in, batches out: a data set of tar shards, the exact order of its samples, and loaders that decode them.

dataset = open_dataset("data/cifar10")
split = dataset.splits["train"]
sampler = Sampler(len(split), global_batch=128, seed=0)
config = LoaderConfig(size=32, mean=dataset.mean, std=dataset.std, batch_size=128, device=torch.device("cpu"))
loader = open_loader(split, config)
for local_batch, images, labels in loader.batches(sampler.local_batches(epoch=0, rank=0, world_size=1)):
    ...
"""

from .format import Dataset, Split, open_dataset
from .loaders import Backend, Batch, Loader, LoaderConfig, OnError, open_loader
from .sampler import LocalBatch, Sampler, Shuffle, evaluation_batches

__all__ = [
    "Backend",
    "Batch",
    "Dataset",
    "Loader",
    "LoaderConfig",
    "LocalBatch",
    "OnError",
    "Sampler",
    "Shuffle",
    "Split",
    "evaluation_batches",
    "open_dataset",
    "open_loader",
]
