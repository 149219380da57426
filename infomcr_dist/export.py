"""Export the network of a run as safetensors and ONNX, for programs without this project.

    infomcr export RUN [key=value …]

RUN is a checkpoint or a run directory (its newest). Both files name classes, image size and normalization. That of ONNX
takes images uint8 (B, 3, size, size), RGB, normalizes them itself and returns logits float32 (B, classes); its logits
are compared with the network's before anything is written.

Exit code 0: written; 75: stopped, repeat the command; 2: a mistake in the settings, a checkpoint that cannot be read,
or a network that ONNX cannot express, reported in one line; 1: anything else.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from infomcr_dist import checkpoint
from infomcr_dist.cli import EXPORT
from infomcr_dist.config import ExportSettings
from infomcr_dist.precision import set_float32_precision
from infomcr_dist.trained import Trained, load_trained
from pipelines.options import load

TOLERANCE = 1e-5
"""Of the difference of logits, relative to the largest of them where that is above 1"""


class Normalized(nn.Module):
    """The network of images as they are: uint8 (B, 3, size, size), RGB, to logits float32 (B, classes)."""

    mean: Tensor
    std: Tensor

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.network = trained.model
        mean, std = (torch.tensor(t, dtype=torch.float64).mul(255).float() for t in (trained.mean, trained.std))
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.float() - self.mean) / self.std)
        return logits


def about(trained: Trained) -> dict[str, str]:
    """What both files say of the network, as JSON where it is no text."""
    return {
        "model": trained.config.model,
        "classes": json.dumps(trained.classes, ensure_ascii=False),
        "image_size": str(trained.image_size),
        "mean": json.dumps(trained.mean),
        "std": json.dumps(trained.std),
        "transform": trained.config.evaluation.transform,
        "epochs": f"{trained.epochs:g}",
    }


def to_safetensors(trained: Trained) -> bytes:
    """Weights and buffers by their names, of a network that is given (pixel/255 - mean)/std, float32."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous().clone() for name, tensor in trained.model.state_dict().items()}
    return save(tensors, {"format": "pt"} | about(trained))


def to_onnx(trained: Trained) -> bytes:
    """`Normalized` as ONNX, with any number of images a batch.

    Raises:
        ValueError: ONNX cannot express the network, or the logits that onnxruntime computes are not the network's.
    """
    import onnx
    import onnxruntime

    size, model = trained.image_size, Normalized(trained).eval()
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            # Of this exporter's age, and of Python numbers in the graph, which the comparison below would find. The
            # newer one takes the package onnxscript, and fixes the size of a batch for some networks.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (images[:2],),
                f"{folder}/model.onnx",
                dynamo=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            )
            exported = onnx.load(f"{folder}/model.onnx")
        for key, value in about(trained).items():
            exported.metadata_props.add(key=key, value=value)
        content: bytes = exported.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = [session.run(["logits"], {"images": images[:count].numpy()})[0] for count in (3, 1)]
    except Exception as error:  # exporter and runtime raise what they like
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{trained.path}: ONNX cannot express {trained.config.model}: {reason}") from error
    for logits in found:
        check_logits(trained, images[: len(logits)], logits)
    return content


@torch.no_grad()
def check_logits(trained: Trained, images: Tensor, logits: np.ndarray) -> None:
    """ValueError unless these are the network's logits of the images, uint8 (B, 3, size, size)."""
    mean, std = (torch.tensor(t, dtype=torch.float64).view(3, 1, 1) for t in (trained.mean, trained.std))
    expected = trained.model(((images.double() / 255 - mean) / std).float()).numpy()
    error = float(np.abs(logits - expected).max()) if logits.shape == expected.shape else float("nan")
    if not error <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ValueError(
            f"{trained.path}: the logits of ONNX differ from those of {trained.config.model} by {error:.2g}, at most "
            f"{TOLERANCE:g} is rounding: nothing is written"
        )


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    return EXPORT.run(arguments, _main)


def _main(paths: list[str], overrides: list[str]) -> int:
    settings = load(ExportSettings, None, overrides)
    set_float32_precision()
    trained = load_trained(Path(paths[0]), settings.model, torch.device("cpu"), settings.weights)
    try:
        contents = {"safetensors": to_safetensors(trained), "onnx": to_onnx(trained)}
    except ModuleNotFoundError as error:
        raise ValueError(f"export needs the module {error.name}: pip install 'infomcr_dist[export]'") from None
    for kind, content in contents.items():
        checkpoint.write_atomically(
            Path(f"{settings.output}.{kind}"), lambda file, content=content: file.write(content)
        )
    print(f"written: {', '.join(f'{settings.output}.{kind}' for kind in contents)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
