"""Make a data set of shards from labelled images.

    infomcr prepare SOURCE DEST [key=value ...]

SOURCE is
- a folder of class folders (optionally below train/ and test/), or a .tar, .tar.gz or .zip of the same;
- CIFAR-10 or CIFAR-100 as published: cifar-10-binary.tar.gz, cifar-100-python.tar.gz ..., or the unpacked folder;
- the folder of ImageNet's archives: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz,
  or ImageNet as Kaggle has it; Tiny-ImageNet, unpacked or as its zip;
- a folder of IDX files, or fashion-mnist.

Images become JPEGs of 128 x 128. Raw pixels (CIFAR, IDX) keep their size and become PNGs: they lose nothing.
DEST appears when everything is done; until then the work is in DEST.partial, and after an interruption the same
command resumes there. Shards depend on source and options alone, byte for byte.

Exit code 0: DEST is ready, or was already; 2: a mistake, a source that cannot be read or a full disk, in one line.
"""

import sys
from pathlib import Path

from ..command import PREPARE
from ..options import load
from . import Options, prepare


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    return PREPARE.run(arguments, _main)


def _main(paths: list[str], overrides: list[str]) -> int:
    source, dest = paths
    print(prepare(source, Path(dest), load(Options, None, overrides)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
