#!/usr/bin/env bash
# Builds the Horovod wheel for the torch of the Python given, once, and prints its path.
#
#   usage: [HOROVOD_WITH_MPI=1] launch/build_horovod.sh PYTHON    (it has torch, numpy, setuptools < 80, wheel and cmake)
#
# HOROVOD_WITH_MPI=1: for mpirun too; it needs an MPI with its compiler (Debian: openmpi-bin, libopenmpi-dev).
#
# Horovod 0.28.1, its last release, compiles its own sources and torch's headers as C++14; torch has needed C++17 since
# 2.1 and C++20 now: the first fix raises the standard in the two places that set it. The others are about trouble:
# - Workers get up to 60 s instead of 5 between SIGTERM and SIGKILL, so that a long step can be finished and saved.
# - ssh notices within 15 s that a host is off the network, which it otherwise never does.
# - A worker of an elastic job that met an error must close its connections, on which others may wait until the network's
#   time is up. Those of the process set stayed open, since their gloo context is never marked as enabled.
# - A worker that starts waited five times the network's time for another that was lost while it started.
# - An elastic job that had lost a worker could be entered by it again, once its host was back on the network, in the place
#   of the one started anew: both then waited for ever. Each start of a worker now has its number, and asks with it.
# - The stall check never found a worker missing under gloo: the list of ranks it goes through had room, but no size.
# The wheel is kept under ${XDG_CACHE_HOME:-~/.cache}/infomcr_dist, by everything that goes into it: the sdist's hash,
# this script's fixes, torch's version, Python's version, the platform and the build options.
set -euo pipefail

version=0.28.1
sdist_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
fixes=(    # FILE|TEXT|NEW TEXT
    'CMakeLists.txt|set(CMAKE_CXX_STANDARD 14)|set(CMAKE_CXX_STANDARD 20)'
    'horovod/torch/CMakeLists.txt|set(CMAKE_CXX_STANDARD 14)|set(CMAKE_CXX_STANDARD 20)'
    'horovod/runner/common/util/safe_shell_exec.py|GRACEFUL_TERMINATION_TIME_S = 5|GRACEFUL_TERMINATION_TIME_S = 60'
    'horovod/runner/util/remote.py|-o StrictHostKeyChecking=no|-o StrictHostKeyChecking=no -o ServerAliveInterval=5 -o ServerAliveCountMax=3'
    'horovod/common/process_set.cc|  gloo_context.Finalize();|  gloo_context.Enable(); gloo_context.Finalize();'
    'third_party/gloo/gloo/transport/tcp/pair.h|timeout_ * 5,|timeout_,'
    'horovod/common/gloo/gloo_controller.cc|global_ranks_.reserve(size_)|global_ranks_.resize(size_)'
    'horovod/runner/elastic/driver.py|self._worker_clients = {}|self._worker_clients, self._starts = {}, {}'
    'horovod/runner/elastic/driver.py|create_worker_fn = self._create_worker_fn|create_worker_fn = self._create_worker_fn
        slot_info.start = self._starts[slot_info.hostname, slot_info.local_rank] = self._worker_registry.last_rendezvous()'
    'horovod/runner/elastic/driver.py|    def _handle_worker_exit(self, slot_info, exit_code, timestamp):|    def runs(self, host, slot, start):
        return str(self._starts.get((host, slot))) == start

    def _handle_worker_exit(self, slot_info, exit_code, timestamp):
        if not self.runs(slot_info.hostname, slot_info.local_rank, str(slot_info.start)):
            return
        del self._starts[slot_info.hostname, slot_info.local_rank]'
    "horovod/runner/gloo_run.py|\"HOROVOD_HOSTNAME\": str(host_name),|\"HOROVOD_HOSTNAME\": str(host_name), \"HOROVOD_START\": str(getattr(slot_info, 'start', 0)),"
    'horovod/common/gloo/gloo_context.cc|hostname_ + ":" + std::to_string(local_rank);|hostname_ + ":" + std::to_string(local_rank) + ":" + (std::getenv("HOROVOD_START") ?: "");'
    "horovod/runner/elastic/rendezvous.py|host, local_rank = key.split(':')|host, local_rank, *start = key.split(':')"
    "horovod/runner/elastic/rendezvous.py|return self._get_rank_and_size(host, int(local_rank))|return self._get_rank_and_size(host, int(local_rank)) if driver.runs(host, int(local_rank), *start) else b'-1,-1,-1,-1,-1,-1'"
)

python=${1:?usage: launch/build_horovod.sh PYTHON}
say() { printf '%s\n' "$*" >&2; }
fail() { say "build_horovod: $*"; exit 1; }

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

key=$(printf '%s\n' "$sdist_sha256" "${fixes[@]}" "$facts" "${options[*]}" | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/infomcr_dist/horovod-$version-$key
shopt -s nullglob
wheels=("$cache"/horovod-*.whl)
if ((${#wheels[@]})); then
    say "Horovod $version for $facts: the wheel built before is used"
    printf '%s\n' "${wheels[0]}"
    exit 0
fi

command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: install one (Debian, Ubuntu: apt-get install g++)"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say "Horovod $version for $facts: building the wheel, once, 3 to 5 minutes on two cores …"
PATH=$(dirname "$python"):$PATH

"$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary horovod --dest "$work" "horovod==$version" >"$work/log" 2>&1 \
    || { tail -n 20 "$work/log" >&2; fail "the source of horovod $version could not be downloaded: is the package index reachable?"; }
sdist=$work/horovod-$version.tar.gz
echo "$sdist_sha256  $sdist" | sha256sum --check --quiet >&2 || fail "the source of horovod $version is not the one expected (SHA-256 $sdist_sha256)"
tar -xzf "$sdist" -C "$work"
source=$work/horovod-$version
for fix in "${fixes[@]}"; do
    IFS='|' read -r -d '' file text new <<<"$fix" || true
    new=${new%$'\n'}    # the here-string's own
    content=$(<"$source/$file")
    [[ $content == *"$text"* ]] || fail "$file of Horovod does not hold the text to be changed: $text"
    printf '%s\n' "${content//"$text"/"$new"}" >"$source/$file"
done

(cd "$source" && env "${options[@]}" MAKEFLAGS="-j$(nproc)" "$python" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$work/wheel" .) >"$work/log" 2>&1 \
    || { tail -n 40 "$work/log" >&2; fail "the compilation failed (its last lines are above): a C++20 compiler (g++ 10 or later) and the headers of $python (Debian, Ubuntu: apt-get install g++ python3-dev) are needed"; }

# Complete or absent: the wheel gets its directory's final name only when it is whole.
mkdir -p "$(dirname "$cache")"
staged=$(mktemp -d "$cache.XXXXXX")
cp "$work"/wheel/horovod-*.whl "$staged/"
mv -T "$staged" "$cache" 2>/dev/null || rm -rf "$staged"    # another build may have finished first
wheels=("$cache"/horovod-*.whl)
printf '%s\n' "${wheels[0]}"
