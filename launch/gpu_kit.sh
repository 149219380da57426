#!/usr/bin/env bash
# Fills .gpu-kit: what make check-gpu needs on a GPU machine that has torch and no network.
#
#   usage: launch/gpu_kit.sh [dali]          (make gpu-kit; make gpu-kit DALI=1)
#
# The wheels are those of constraints.txt for CPython 3.12 on x86_64 Linux, without their dependencies; of those that the
# machine has, its own are used. Horovod's sources carry the patches of launch/horovod; setuptools < 80 is for its build.
# dali: also .gpu-kit-dali, the wheels of DALI and OpenCV in parts of at most 58 MB, for where files cannot be larger.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3} kit=.gpu-kit
small=(argcomplete braceexpand cloudpickle filelock loky packaging pillow prometheus_client psutil PyYAML simplejpeg tqdm webdataset)
large=(astunparse gast nvidia-dali-cuda130 nvidia-libnvcomp-cu13 nvidia-nvimgcodec-cu13 nvidia-nvjpeg nvidia-nvjpeg2k-cu13 nvidia-nvtiff-cu13 nvtx opencv-python-headless optree six wrapt)
say() { printf '%s\n' "gpu-kit: $*" >&2; }
fail() { say "$*"; exit 1; }
[[ $# -eq 0 || $1 == dali ]] || fail "usage: launch/gpu_kit.sh [dali], got $1"

platforms=(--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64)
for glibc in 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
# usage: download FOLDER NAME…
download() {
    local folder=$1 name pins=()
    shift
    for name in "$@"; do
        pins+=("$(grep -i "^$name==" constraints.txt)") || fail "$name is not in constraints.txt"
    done
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
        "${platforms[@]}" --dest "$folder" "${pins[@]}" || fail "a wheel could not be downloaded (pip's reason is above): is the package index reachable?"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/kit"
download "$work/kit" "${small[@]}"
download "$work/kit/horovod" setuptools wheel
launch/build_horovod.sh "$python" "$work/horovod"
tar -czf "$work/kit/horovod/horovod.tar.gz" -C "$work" horovod
rm -rf "$kit"
mv "$work/kit" "$kit"
say "$kit, $(du -sh "$kit" | cut -f1)"
if [[ ${1:-} == dali ]]; then
    download "$work/large" "${large[@]}"
    rm -rf "$kit-dali"
    mkdir "$kit-dali"
    tar -cf - -C "$work/large" . | split --bytes=58MB - "$kit-dali/part-"
    say "$kit-dali, $(du -sh "$kit-dali" | cut -f1)"
fi
