#!/usr/bin/env bash
# Makes .venv beside the README: pinned dependencies, Horovod built against the pinned torch, this project (editable).
#
#   usage: launch/setup.sh          (make setup; PYTHON=python3.12 make setup uses another interpreter)
#
# Safe to repeat: what exists is kept, and a second run takes a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 1; }
step() { say "setup: $*"; }

# What .venv was made from: if nothing of it has changed, there is nothing to do.
inputs=$("$python" -c 'import sys; print(sys.version)' 2>/dev/null; cat constraints.txt pyproject.toml launch/setup.sh launch/build_horovod.sh launch/horovod/*.patch; pwd)
stamp=.venv/made-from
wanted=$(printf '%s' "$inputs" | sha256sum | cut -d' ' -f1)
[[ -f $stamp && $(<"$stamp") == "$wanted" ]] && exit 0

command -v "$python" >/dev/null || fail "no $python: install Python 3.11 or later (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev), or name one: PYTHON=… make setup"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is $("$python" -V): Python 3.11 or later is needed; name one: PYTHON=… make setup"
command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: install one (Debian, Ubuntu: apt-get install g++)"
command -v patch >/dev/null || fail "no patch: install it (Debian, Ubuntu: apt-get install patch)"

rm -f "$stamp"
if [[ ! -x .venv/bin/python || $(.venv/bin/python -V 2>&1) != "$("$python" -V)" ]]; then
    step "making .venv with $("$python" -V)"
    rm -rf .venv
    "$python" -m venv .venv || fail "the virtual environment could not be made (Debian, Ubuntu: apt-get install python3-venv)"
fi
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"; }

step "installing torch and the build tools"
install setuptools wheel cmake numpy torch || fail "torch or the build tools could not be installed (pip's reason is above): is the package index reachable, is there room on the disk (df -h .)?"
wheel=$(launch/build_horovod.sh "$PWD/.venv/bin/python") || fail "Horovod could not be built (the reason is above)"
step "installing Horovod"
{ install "$wheel" && install --force-reinstall --no-deps "$wheel"; } || fail "the Horovod wheel $wheel could not be installed: remove it and repeat"
step "installing the project and its dependencies"
install --no-build-isolation --editable '.[dev]' || fail "the dependencies could not be installed (pip's reason is above): is the package index reachable, is there room on the disk (df -h .)?"
.venv/bin/python -W ignore -c 'import horovod.torch, nvidia.dali, infomcr_dist' || fail "the installed packages do not import (the reason is above): remove .venv and repeat"
printf '%s' "$wanted" >"$stamp"
step "done: . .venv/bin/activate"
