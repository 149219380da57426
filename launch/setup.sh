#!/usr/bin/env bash
# Makes .venv beside the README: pinned dependencies, Horovod built against the pinned torch, this project (editable).
#
#   usage: launch/setup.sh          (make setup; PYTHON=python3.12 make setup uses another interpreter)
#
# ENGINE=torch does without Horovod, and so without a compiler: several workers are then started by torchrun.
# Safe to repeat: what exists is kept, a Horovod included, and a second run takes a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3} engine=${ENGINE:-horovod}
say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 1; }
step() { say "setup: $*"; }

# What .venv was made from: if nothing of it has changed, there is nothing to do.
[[ $engine == horovod || $engine == torch ]] || fail "ENGINE must be horovod or torch, got $engine"
hash_of() { { "$python" -c 'import sys; print(sys.version)' 2>/dev/null || true; pwd; cat constraints.txt pyproject.toml launch/setup.sh "$@"; } | sha256sum | cut -d' ' -f1; }
stamp=.venv/made-from
wanted=$(hash_of launch/build_horovod.sh launch/horovod/*.patch)
[[ -f $stamp && $(<"$stamp") == "$wanted" ]] && exit 0    # with Horovod, which torchrun does not disturb
if [[ $engine == torch ]]; then
    wanted=$(hash_of)
    [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && exit 0
fi

command -v "$python" >/dev/null || fail "no $python: install Python 3.11 or later (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev), or name one: PYTHON=… make setup"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is $("$python" -V): Python 3.11 or later is needed; name one: PYTHON=… make setup"
if [[ $engine == horovod ]]; then
    command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: install one (Debian, Ubuntu: apt-get install g++), or do without Horovod: make setup ENGINE=torch"
    command -v patch >/dev/null || fail "no patch: install it (Debian, Ubuntu: apt-get install patch), or do without Horovod: make setup ENGINE=torch"
fi

rm -f "$stamp"
if [[ ! -x .venv/bin/python || $(.venv/bin/python -V 2>&1) != "$("$python" -V)" ]]; then
    step "making .venv with $("$python" -V)"
    rm -rf .venv
    "$python" -m venv .venv || fail "the virtual environment could not be made (Debian, Ubuntu: apt-get install python3-venv)"
fi
# pip would compile everything, most of which is never imported.
install() { .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile --constraint constraints.txt "$@"; }

if [[ $engine == horovod ]]; then tools=(cmake numpy torch); else tools=(); fi
step "installing the build tools"
{ install pip && install setuptools wheel "${tools[@]}"; } || fail "torch or the build tools could not be installed (pip's reason is above): is the package index reachable, is there room on the disk (df -h .)?"
if [[ $engine == horovod ]]; then
    wheel=$(launch/build_horovod.sh "$PWD/.venv/bin/python") || fail "Horovod could not be built (the reason is above); make setup ENGINE=torch does without"
    step "installing Horovod"
    { install "$wheel" && install --force-reinstall --no-deps "$wheel"; } || fail "the Horovod wheel $wheel could not be installed: remove it and repeat"
fi
step "installing the project and its dependencies"
install --no-build-isolation --editable '.[dev]' || fail "the dependencies could not be installed (pip's reason is above): is the package index reachable, is there room on the disk (df -h .)?"
# Compiles what they import, also where PYTHONDONTWRITEBYTECODE is set, by which every start would compile it again.
imports="nvidia.dali, torch.distributed.run, infomcr_dist.train, infomcr_dist.measure, infomcr_dist.doctor.__main__, infomcr_dist.study.__main__"
[[ $engine == torch ]] || imports="horovod.torch, horovod.runner.launch, $imports"
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -W ignore -c "import $imports" || fail "the installed packages do not import (the reason is above): remove .venv and repeat"
printf '%s' "$wanted" >"$stamp"
step "done: . .venv/bin/activate"
