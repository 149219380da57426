#!/usr/bin/env bash
# Starts a training run whose workers may come and go.
#
#   launch/elastic.sh --min-np 2 --max-np 8 --host-discovery-script ./hosts.sh \
#       python -m infomcr_dist.train RECIPE.yaml run_dir=SHARED data.global_batch_size=256 resume=auto
#
# Everything is handed to horovodrun, whose options come before the command. hosts.sh prints a line HOST:SLOTS for each
# host that is there now (on Kubernetes the MPI operator's /etc/mpi/discover_hosts.sh prints names alone: add
# --slots-per-host N); it is asked once a second. What this adds:
# - a host on which a worker failed is tried again after 10 to 60 s, longer each time (horovodrun's own default: never);
# - -np, how many workers it begins with, is --min-np unless given;
# - the network interface (INTERFACE, default: the one of the default route, else lo), without which horovodrun wants
#   two hosts before it begins.
# The global batch, the learning rate and the penalty's strength stay as they are at any number of workers.
set -euo pipefail

options=(--blacklist-cooldown-range 10 60)
processes='' previous=''
for argument in "$@"; do
    case $argument in
        --blacklist-cooldown-range) options=() ;;
        --network-interface*) INTERFACE= ;;
        -np | --num-proc) processes=given ;;
        *python*) break ;;
    esac
    [[ $previous == --min-np && -z $processes ]] && processes=$argument
    previous=$argument
done
[[ -z $processes || $processes == given ]] || options+=(-np "$processes")
interface=${INTERFACE-$(ip -o route show default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)}
[[ ${INTERFACE+set} == set && -z $interface ]] || options+=(--network-interface "${interface:-lo}")
exec horovodrun "${options[@]}" "$@"
