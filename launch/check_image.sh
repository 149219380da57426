#!/usr/bin/env bash
# Builds the image as docker build would, and tries it: read-only, without a network, as its user, /tmp alone writable.
#
#   usage: [ENGINE=torch] launch/check_image.sh       (root, buildah, debootstrap, 20 GB in TMPDIR; ten minutes on two cores)
#
# No Docker: buildah builds, on a base that debootstrap makes of this machine's own release, from its own mirror, with this
# machine's settings of pip. Everything is in a directory that is removed at the end. DEVICE=cuda is not tried.
# shellcheck disable=SC2016  # variables are expanded in the image
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "check_image: $*" >&2; }
fail() { say "$*"; exit 1; }
engine=${ENGINE:-horovod}
case $engine in
    horovod) launcher=horovodrun ;;
    torch) launcher=torchrun ;;
    *) fail "ENGINE must be horovod or torch, got $engine" ;;
esac
((EUID == 0)) || fail "debootstrap and mounts need root"
for program in buildah debootstrap; do
    command -v "$program" >/dev/null || fail "no $program: install it (Debian, Ubuntu: apt-get install $program)"
done
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
(($(df --output=avail -k "$work" | tail -n 1) > 20000000)) || fail "less than 20 GB free in ${TMPDIR:-/tmp}: make room, or set TMPDIR"
export BUILDAH_ISOLATION=chroot TMPDIR=$work
buildah() { command buildah --storage-driver vfs --root "$work/storage" --runroot "$work/run" "$@"; }

# The base: sources and options of apt as they are here.
release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
origin=$(sed -n 's/^ID=\(.\)/\u\1/p' /etc/os-release)
sources=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' "Origin: $origin")
mirror=$(awk -v release="$release" '$3 == release { print $2; exit }' <<<"$sources")
[[ -n $mirror ]] || fail "apt knows no mirror of $origin $release: apt-get update"
say "base: $origin $release"
debootstrap --variant=minbase "$release" "$work/base" "$mirror" >"$work/log" || { tail -n 20 "$work/log" >&2; fail "debootstrap failed"; }
printf '%s\n' "$sources" >"$work/base/etc/apt/sources.list"
apt-config dump Acquire >"$work/base/etc/apt/apt.conf.d/90machine"
container=$(buildah from scratch)
buildah add --quiet "$container" "$work/base" / >/dev/null
buildah commit --quiet --rm "$container" base >/dev/null
rm -r "$work/base"

# This machine's settings of pip; the files and folders they name are mounted below /mnt while the image is built.
mounts=$(python3 - "$work/pip.conf" <<'PYTHON'
import re, subprocess, sys
from pathlib import Path
from shlex import split

text = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
settings, mounts = {}, {}
for section, name, value in re.findall(r"^([\w:]+)\.([\w-]+)=(.+)$", text, re.M):
    if section in ("global", ":env:") and (name not in settings or section == ":env:"):
        settings[name] = " ".join(split(value))
for name, value in settings.items():
    words = []
    for word in value.split():
        path = word.removeprefix("file://")
        if path.startswith("/") and Path(path).exists():
            folder = str(Path(path).parent) if path != word else path  # an index has its files beside it
            word = word.replace(folder, mounts.setdefault(folder, f"/mnt/pip{len(mounts)}"))
        words.append(word)
    settings[name] = " ".join(words)
Path(sys.argv[1]).write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
print("".join(f"--volume={path}:{there}:ro\n" for path, there in mounts.items()), end="")
PYTHON
)
mapfile -t volumes <<<"$mounts"
[[ -n $mounts ]] || volumes=()

began=$SECONDS
say "building, without Docker's cache of layers: six minutes on two cores …"
buildah bud --quiet --layers=false --format docker --tag image --build-arg BASE=localhost/base --build-arg ENGINE="$engine" \
    --secret "id=pip.conf,src=$work/pip.conf" "${volumes[@]}" . >"$work/log" 2>&1 || { tail -n 40 "$work/log" >&2; fail "the build failed"; }
built=$((SECONDS - began))

container=$(buildah from image)
root=$(buildah mount "$container")
config() { buildah inspect --type image image | python3 -c "import json, sys; config = json.load(sys.stdin)['Docker']['config']; $1"; }
[[ $(config 'print(config["User"])') == trainer ]] || fail "the user is not trainer"
mapfile -t environment < <(config 'print(*config["Env"], sep="\n")')
mapfile -t command < <(config 'print(*config["Cmd"], sep="\n")')
mapfile -t health < <(config 'print(*config["Healthcheck"]["Test"][1:], sep="\n")')
directory=$(config 'print(config["WorkingDir"])')

# What a container runtime provides: host name, processes and network of its own, /proc, /dev; the image as it is.
printf '127.0.0.1 localhost image\n' >"$root/etc/hosts"
inside() {
    unshare --mount --pid --fork --kill-child --net --uts bash -euc '
        root=$1 directory=$2
        shift 2
        hostname image
        ip link set lo up
        mount --bind "$root" "$root"
        mount -o remount,bind,ro "$root"
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs tmpfs "$root/tmp"
        exec chroot --userspec=trainer:trainer "$root" env -i --chdir="$directory" "$@"
    ' bash "$root" "$directory" "${environment[@]}" "$@"
}

say "it has no compiler, build tool, key or settings of pip"
tools=$(find "$root" -xdev ! -type d -regextype posix-extended -regex '.*/bin/([a-z0-9_]+-)*(cc|c\+\+|gcc|g\+\+|cpp|as|ld|make|cmake|nvcc|pip[0-9.]*)(-[0-9.]+)?')
[[ -z $tools ]] || fail "build tools in the image: ${tools//"$root"/}"
secrets=$(find "$root/etc/ssh" "$root/etc/pip.conf" "$root/run/secrets" -name 'ssh_host_*' -o -name 'pip.conf' -size +0 2>/dev/null || true)
[[ -z $secrets ]] || fail "the image holds ${secrets//"$root"/}"

say "doctor"
inside infomcr doctor run_dir=/tmp/run

say "a session of sshd has the image's PATH"
inside bash -euc '
    ssh-keygen -q -t ed25519 -N "" -f /tmp/key
    /usr/sbin/sshd -D -p 2222 -h /tmp/key -o UsePAM=no -o StrictModes=no -o PidFile=none -o AuthorizedKeysFile=/tmp/key.pub &
    for _ in {1..50}; do 2>/dev/null exec 3<>/dev/tcp/127.0.0.1/2222 && break; sleep 0.1; done
    found=$(ssh -q -i /tmp/key -p 2222 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null 127.0.0.1 "id -un; command -v python $1 infomcr; python -c \"import infomcr_dist, pipelines\"")
    [[ $found == $(printf "trainer\n/opt/venv/bin/python\n/opt/venv/bin/$1\n/opt/venv/bin/infomcr") ]] || { echo "$found"; exit 1; }
' bash "$launcher" || fail "sshd's session is not as it should be (above)"

say "its command trains the demo, and the health check passes meanwhile: ${command[*]}"
inside bash -euc '
    health=()
    while [[ $1 != -- ]]; do health+=("$1"); shift; done
    shift
    [[ $(id -u) == 1000 ]] || { echo "user $(id -u)"; exit 1; }
    ! touch /home/trainer/file 2>/dev/null || { echo "the image can be written"; exit 1; }
    ! "${health[@]}" 2>/dev/null || { echo "healthy without a trainer"; exit 1; }
    "$@" &
    until "${health[@]}" 2>/dev/null; do kill -0 $! || exit 1; sleep 0.2; done
    echo "healthy"
    wait $!
    ls /tmp/run/checkpoints/*.pt
' bash "${health[@]}" -- "${command[@]}" epochs=1 "schedule.milestones=[0.5]" data.train_images=3200 metric.trials=2 \
    || fail "the demo does not run in the image (the reason is above)"

printf 'image with %s ok: %s MB, built in %d s\n' "$engine" "$(du -sm --one-file-system "$root" | cut -f 1)" "$built"
