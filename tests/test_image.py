"""The image, built and run here; of its variant for GPUs, what can be checked without building it."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")


@pytest.mark.ops
@pytest.mark.parametrize("engine", ["horovod", "torch"])
def test_the_image_builds_and_trains(engine: str) -> None:
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian, Ubuntu: apt-get install {program})")
    environment = os.environ | {"ENGINE": engine}
    subprocess.run([ROOT / "launch" / "check_image.sh"], env=environment, check=True, timeout=3600)


def test_every_stage_is_on_a_base_that_can_be_given() -> None:
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", DOCKERFILE, re.M)
    assert stages == [("$BUILD_BASE", "horovod"), ("horovod", "build"), ("$BASE", "")]
    assert {"BASE", "BUILD_BASE", "DEVICE"} == set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))


def test_the_image_takes_only_what_is_sent_to_the_builder() -> None:
    sent = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M))
    copied = {source for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for source in line.split()}
    assert {source.split("/")[0] for source in copied} == sent
