#!/usr/bin/env bash
# Stops the workers of this host and waits until they have saved: for a container's preStop hook, since sshd as process 1
# forwards no signal to them.
#
#   usage: launch/prestop.sh PID_DIR [SECONDS]     (the trainer's pid_dir; how long to wait, default 50)
#
# SECONDS must be above the trainer's shutdown_timeout_seconds and below the pod's grace period. Exit code 1: a worker did not end.
set -euo pipefail
shopt -s nullglob
folder=${1:?usage: launch/prestop.sh PID_DIR [SECONDS]}
pids=()
for file in "$folder"/rank-*.pid; do
    read -r pid <"$file" || true
    [[ $pid =~ ^[0-9]+$ ]] && kill -TERM "$pid" 2>/dev/null && pids+=("$pid")
done
end=$((SECONDS + ${2:-50}))
for pid in "${pids[@]}"; do
    # A zombie has ended: there may be nobody to reap it.
    while [[ -r /proc/$pid/stat && $(sed 's/.*) \(.\).*/\1/' "/proc/$pid/stat" 2>/dev/null) != [ZX] ]]; do
        ((SECONDS < end)) || { echo "prestop: worker $pid did not end" >&2; exit 1; }
        sleep 0.2
    done
done
[[ -z ${pids[*]} ]] || sleep 1    # sshd reports their exit codes to the launcher before it is stopped itself
