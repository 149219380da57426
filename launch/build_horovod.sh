#!/usr/bin/env bash
# Builds the Horovod wheel for the torch of the Python given, once, and prints its path.
#
#   usage: [HOROVOD_WITH_MPI=1] launch/build_horovod.sh PYTHON    (it has torch, numpy, setuptools < 80, wheel and cmake)
#          launch/build_horovod.sh PYTHON FOLDER                  leaves the patched sources in FOLDER, and builds nothing
#
# HOROVOD_WITH_MPI=1: for mpirun too; it needs an MPI with its compiler (Debian: openmpi-bin, libopenmpi-dev).
#
# The sources are those of Horovod's last release with the patches of launch/horovod, each of which begins with its reason.
# The wheel is cached under ${XDG_CACHE_HOME:-~/.cache}/infomcr_dist, by everything that it depends on: the sdist's hash,
# the patches, the versions of torch and Python, the platform and the build options.
set -euo pipefail

version=0.28.1
sdist_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
patches=("$(dirname "${BASH_SOURCE[0]}")"/horovod/*.patch)

python=${1:?usage: launch/build_horovod.sh PYTHON [FOLDER]} folder=${2:-}
say() { printf '%s\n' "$*" >&2; }
fail() { say "build_horovod: $*"; exit 1; }

# Leaves the patched sources in $work/horovod-$version.
fetch_sources() {
    "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary horovod --dest "$work" "horovod==$version" >"$work/log" 2>&1 \
        || { tail -n 20 "$work/log" >&2; fail "the source of horovod $version could not be downloaded: is the package index reachable?"; }
    local sdist=$work/horovod-$version.tar.gz
    echo "$sdist_sha256  $sdist" | sha256sum --check --quiet >&2 || fail "the source of horovod $version is not the one expected (SHA-256 $sdist_sha256)"
    tar -xzf "$sdist" -C "$work"
    for patch in "${patches[@]}"; do
        patch --directory="$work/horovod-$version" --strip=1 --fuzz=0 --batch --forward --no-backup-if-mismatch <"$patch" >"$work/log" 2>&1 \
            || { cat "$work/log" >&2; fail "$patch does not apply to the source of horovod $version"; }
    done
}

need_patch() { command -v patch >/dev/null || fail "no patch: install it (Debian, Ubuntu: apt-get install patch)"; }
if [[ -n $folder ]]; then
    need_patch
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    fetch_sources
    mkdir -p "$folder" && cp -r "$work/horovod-$version/." "$folder/"
    exit 0
fi

facts=$("$python" -c '
import sys, sysconfig, torch
cuda = torch.version.cuda or "none"
print(torch.__version__, "py%d.%d" % sys.version_info[:2], sysconfig.get_platform(), "cuda-" + cuda)
') || fail "torch cannot be imported by $python: install the versions in constraints.txt first"

mpi=HOROVOD_WITHOUT_MPI=1
if [[ ${HOROVOD_WITH_MPI:-} == 1 ]]; then
    command -v mpicxx >/dev/null || fail "HOROVOD_WITH_MPI=1, but mpicxx is not found: install an MPI (Debian, Ubuntu: apt-get install openmpi-bin libopenmpi-dev)"
    mpi=HOROVOD_WITH_MPI=1
fi
options=(HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1 "$mpi" HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1)
if [[ $facts == *cuda-none ]]; then
    options+=(HOROVOD_CPU_OPERATIONS=GLOO)
else
    command -v nvcc >/dev/null || fail "torch is a CUDA build but nvcc is not found: install the CUDA toolkit of that version and NCCL's headers (libnccl-dev), or a CPU build of torch"
    options+=(HOROVOD_CPU_OPERATIONS=GLOO HOROVOD_GPU_OPERATIONS=NCCL)
fi

key=$({ printf '%s\n' "$sdist_sha256" "$facts" "${options[*]}" && cat "${patches[@]}"; } | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/infomcr_dist/horovod-$version-$key
shopt -s nullglob
wheels=("$cache"/horovod-*.whl)
if ((${#wheels[@]})); then
    say "Horovod $version for $facts: the wheel built before is used"
    printf '%s\n' "${wheels[0]}"
    exit 0
fi

command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: install one (Debian, Ubuntu: apt-get install g++)"
need_patch
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say "Horovod $version for $facts: building the wheel, once, 3 to 5 minutes on two cores …"
PATH=$(dirname "$python"):$PATH

fetch_sources
(cd "$work/horovod-$version" && env "${options[@]}" MAKEFLAGS="-j$(nproc)" "$python" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$work/wheel" .) >"$work/log" 2>&1 \
    || { tail -n 40 "$work/log" >&2; fail "the compilation failed (its last lines are above): a C++20 compiler (g++ 10 or later) and the headers of $python (Debian, Ubuntu: apt-get install g++ python3-dev) are needed"; }

# Complete or absent: the wheel's directory gets its final name once it is complete.
mkdir -p "$(dirname "$cache")"
staged=$(mktemp -d "$cache.XXXXXX")
cp "$work"/wheel/horovod-*.whl "$staged/"
mv -T "$staged" "$cache" 2>/dev/null || rm -rf "$staged"    # another build may have finished first
wheels=("$cache"/horovod-*.whl)
printf '%s\n' "${wheels[0]}"
