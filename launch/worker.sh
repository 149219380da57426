#!/usr/bin/env bash
# A worker of a Kubeflow MPIJob: an sshd of its own, as any user, through which the launcher starts this host's ranks.
#
#   usage: launch/worker.sh PID_DIR          (the trainer's pid_dir, for launch/prestop.sh)
#
# It needs a writable /tmp and the keys that the operator mounts at ~/.ssh; these belong to root, hence StrictModes=no.
# The container's environment does not reach the ranks: sshd passes none of it on, horovodrun sends its own.
set -euo pipefail
pid_dir=${1:?usage: launch/worker.sh PID_DIR}

# A restarted container finds /tmp unchanged: its ranks are gone, and their process ids may belong to others.
rm -rf "$pid_dir" /tmp/ssh_host_key /tmp/ssh_host_key.pub
ssh-keygen -q -t ed25519 -N '' -f /tmp/ssh_host_key

options=(
    Port=2222
    HostKey=/tmp/ssh_host_key
    AuthorizedKeysFile=%h/.ssh/authorized_keys
    UsePAM=no
    StrictModes=no
    PidFile=none
    PasswordAuthentication=no
    KbdInteractiveAuthentication=no
    DisableForwarding=yes
    ClientAliveInterval=5    # a launcher whose host is lost closes no connection: end its sessions
    ClientAliveCountMax=3
    MaxStartups=100    # all ranks of a host connect at once; sshd's own limit is 10
)
exec /usr/sbin/sshd -D -e -f /dev/null "${options[@]/#/-o}"
