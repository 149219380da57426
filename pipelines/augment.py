"""The one definition of every augmentation, as geometry drawn from counter-based random numbers.

An image becomes a sample in these steps, which every backend implements:
1. take the box (`anchor`, `shape`) of the stored image,
2. resize it to size x size: bilinear, with an antialiasing triangular filter along the sides that shrink,
3. change its colours by the affine map `color`, rounded and clipped to 0..255,
4. move it by `shift`, padding with zeros, 5. mirror it left to right, 6. normalize.
The numbers depend on (seed, epoch, position) alone, so pixels are the same at any world size and after any resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .random_streams import Stream, philox

Ints = NDArray[np.int32]

_DRAWS = 32  # uniform numbers per position; a multiple of the 4 words in one Philox block


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image at random.

    Attributes:
        flip: mirror half of the images.
        pad: largest shift in pixels.
        center: side of a central square box, as a fraction of the shorter side; 7/8 is the usual 224 of 256.
        area: of the box of a random resized crop, as a fraction of the image, from and to.
        ratio: width to height of that box, from and to.
    """

    flip: bool = False
    pad: int = 0
    center: float | None = None
    area: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "crop1_flip": Augmentation(flip=True, pad=1),
    "crop4_flip": Augmentation(flip=True, pad=4),
    "random_resized_crop": Augmentation(flip=True, area=(0.08, 1.0)),
    "center_crop": Augmentation(center=7 / 8),
}


class Row(NamedTuple):
    """The geometry of one sample.

    Attributes:
        steps: y, x, height and width of its box, its shift as y, x, and 1 if it is mirrored.
        jitter: brightness, contrast and saturation.
    """

    steps: list[int]
    jitter: list[float]


@dataclass(frozen=True)
class Geometry:
    """The geometry of a batch.

    Attributes:
        anchor: where the box in the stored image begins, in pixels, int32 (B, 2) as y, x.
        shape: sides of the box in pixels, int32 (B, 2) as height, width.
        shift: in pixels of the sample, int32 (B, 2) as y, x.
        mirror: 1 if the sample is mirrored, else 0, int32 (B,).
        jitter: brightness, contrast and saturation, float32 (B, 3), 1 being no change.
    """

    anchor: Ints
    shape: Ints
    shift: Ints
    mirror: Ints
    jitter: NDArray[np.float32]

    def steps(self) -> Ints:
        """All but the jitter, int32 (B, 7), in the order of `Row.steps`."""
        return np.concatenate([self.anchor, self.shape, self.shift, self.mirror[:, None]], axis=1)

    def rows(self) -> list["Row"]:
        """One sample each, as Python numbers."""
        # Few objects: enough of them would start the garbage collector with every batch.
        return list(map(Row, self.steps().tolist(), self.jitter.tolist()))

    def __getitem__(self, item: slice) -> "Geometry":
        return Geometry(self.anchor[item], self.shape[item], self.shift[item], self.mirror[item], self.jitter[item])


def augmentation(name: str) -> Augmentation:
    """The augmentation of that name; ValueError for another name."""
    if name not in AUGMENTATIONS:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {name!r}")
    return AUGMENTATIONS[name]


def uniform(
    seed: int, epoch: int, positions: NDArray[np.int64], stream: Stream = Stream.AUGMENTATION
) -> NDArray[np.float64]:
    """Numbers in [0, 1), float64 (B, 32); each row is a function of (seed, epoch, position)."""
    if len(positions) == 0:
        return np.empty((0, _DRAWS))
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    words = [philox(stream, seed, epoch, block=int(run[0]) * _DRAWS // 4).random_raw(len(run) * _DRAWS) for run in runs]
    high = np.concatenate(words).reshape(-1, _DRAWS) >> np.uint64(11)
    return high.astype(np.float64) * 2.0**-53


def draw(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    positions: NDArray[np.int64],
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    color_jitter: float = 0.0,
) -> Geometry:
    """The geometry of some samples of an epoch.

    Args:
        positions: of the samples in the epoch, int64 (B,).
        heights: of the stored images in pixels, (B,).
        widths: the same.
        color_jitter: brightness, contrast and saturation are uniform in 1 - color_jitter .. 1 + color_jitter.
    """
    drawn = augmentation.flip or augmentation.pad or augmentation.area or color_jitter
    u = uniform(seed, epoch, positions) if drawn else np.zeros((len(positions), _DRAWS))
    sides = np.stack([heights, widths], axis=1).astype(np.int32)
    if augmentation.area:
        shape = box_shapes(augmentation.area, augmentation.ratio, sides, u[:, 4:14], u[:, 14:24])
        anchor = np.floor(u[:, 1:3] * (sides - shape + 1)).astype(np.int32)
    elif augmentation.center:
        side = np.maximum(np.rint(augmentation.center * sides.min(axis=1)), 1).astype(np.int32)
        shape = np.stack([side, side], axis=1)
        anchor = (sides - shape) // 2
    else:
        shape, anchor = sides, np.zeros_like(sides)
    pad = augmentation.pad
    shift = np.floor(u[:, 1:3] * (2 * pad + 1)).astype(np.int32) - pad
    mirror = (u[:, 0] < 0.5).astype(np.int32) if augmentation.flip else np.zeros(len(u), np.int32)
    jitter = (1 + color_jitter * (2 * u[:, 24:27] - 1)).astype(np.float32)
    return Geometry(anchor, shape, shift if pad else np.zeros_like(sides), mirror, jitter)


def color_map(jitter: Sequence[float]) -> NDArray[np.float32]:
    """The affine map of RGB in 0..255 for one (brightness, contrast, saturation), float32 (3, 4).

    Saturation blends with the luma, contrast scales about 128, then brightness scales.
    """
    brightness, contrast, saturation = jitter
    matrix = np.empty((3, 4))
    luma = np.array([0.299, 0.587, 0.114])
    matrix[:, :3] = (saturation * np.eye(3) + (1 - saturation) * luma) * brightness * contrast
    matrix[:, 3] = 128 * (1 - contrast) * brightness
    return matrix.astype(np.float32)


def box_shapes(
    area: tuple[float, float],
    ratio: tuple[float, float],
    sides: Ints,
    area_draws: NDArray[np.float64],
    ratio_draws: NDArray[np.float64],
) -> Ints:
    """The first of ten boxes of random area and log-uniform ratio that fits, else the largest of an allowed ratio."""
    height, width = sides[:, 0].astype(np.float64), sides[:, 1].astype(np.float64)
    target = (height * width)[:, None] * (area[0] + (area[1] - area[0]) * area_draws)
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * ratio_draws)
    heights, widths = np.rint(np.sqrt(target / aspect)), np.rint(np.sqrt(target * aspect))
    fits = (heights > 0) & (widths > 0) & (heights <= height[:, None]) & (widths <= width[:, None])
    rows, first = np.arange(len(sides)), fits.argmax(axis=1)
    found = fits[rows, first]
    fallback_width = np.minimum(width, np.rint(height * ratio[1]))
    fallback_height = np.minimum(height, np.rint(width / ratio[0]))
    shape = np.where(
        found[:, None],
        np.stack([heights[rows, first], widths[rows, first]], axis=1),
        np.stack([fallback_height, fallback_width], axis=1),
    )
    return np.maximum(shape, 1).astype(np.int32)
