#!/usr/bin/env bash
# Starts a training run whose workers may join and leave.
#
#   launch/elastic.sh --min-np 2 --max-np 8 --host-discovery-script ./hosts.sh \
#       infomcr train RECIPE.yaml run_dir=SHARED data.global_batch_size=256 resume=auto
#
# Everything is passed to horovodrun, whose options come before the command. hosts.sh prints a line HOST:SLOTS for each
# available host (on Kubernetes the MPI operator's /etc/mpi/discover_hosts.sh prints only names: add --slots-per-host N);
# it is called once a second. This script adds:
# - a host on which a worker failed is used again after 10 to 60 s, longer each time (horovodrun's default: never);
# - -np, the number of workers to start with, is --min-np unless given;
# - the network interface (INTERFACE, default: the one of the default route, else lo), without which horovodrun waits for
#   two hosts before it starts.
# The global batch, the learning rate and the penalty's strength are the same at any number of workers.
set -euo pipefail

options=(--blacklist-cooldown-range 10 60)
processes='' previous=''
for argument in "$@"; do
    case $argument in
        --blacklist-cooldown-range) options=() ;;
        --network-interface*) INTERFACE= ;;
        -np | --num-proc) processes=given ;;
        *python* | *infomcr) break ;;
    esac
    [[ $previous == --min-np && -z $processes ]] && processes=$argument
    previous=$argument
done
[[ -z $processes || $processes == given ]] || options+=(-np "$processes")
interface=${INTERFACE-$(ip -o route show default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)}
[[ ${INTERFACE+set} == set && -z $interface ]] || options+=(--network-interface "${interface:-lo}")
exec horovodrun "${options[@]}" "$@"
