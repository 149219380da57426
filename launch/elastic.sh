#!/usr/bin/env bash
# Starts a training run whose workers may join and leave.
#
#   launch/elastic.sh --min-np 2 --max-np 8 --host-discovery-script ./hosts.sh \
#       infomcr train RECIPE.yaml run_dir=SHARED data.global_batch_size=256 resume=auto
#
# Everything is passed to horovodrun, whose options come before the command. hosts.sh prints a line HOST:SLOTS for each
# available host (on Kubernetes the MPI operator's /etc/mpi/discover_hosts.sh prints only names: add --slots-per-host N,
# else a name is one slot); it is called once a second. This script adds:
# - of what hosts.sh prints, blanks, blank lines and comments (# …) are dropped, at which horovodrun would end;
# - a host on which a worker failed is used again after 10 to 60 s, longer each time (horovodrun's default: never);
# - -np, the number of workers to start with, is --min-np unless given;
# - the network interface (INTERFACE, default: the one of the default route, else lo), without which horovodrun waits for
#   two hosts before it starts.
# The global batch, the learning rate and the penalty's strength are the same at any number of workers.
set -euo pipefail

cooldown=(--blacklist-cooldown-range 10 60) slots=(--slots-per-host 1)
options=() rest=() processes='' discovery=''
while (($#)); do
    case $1 in
        --host-discovery-script) discovery=${2:?elastic.sh: --host-discovery-script needs a script}; shift 2; continue ;;
        --host-discovery-script=*) discovery=${1#*=}; shift; continue ;;
        --min-np | --min-num-proc) processes=${processes:-${2-}} ;;
        -np | --num-proc) processes=given ;;
        --slots*) slots=() ;;
        --blacklist-cooldown-range*) cooldown=() ;;
        --network-interface*) INTERFACE= ;;
        *python* | *infomcr) break ;;
    esac
    rest+=("$1")
    shift
done
options+=("${cooldown[@]}")
if [[ -n $discovery ]]; then    # horovodrun gives it to a shell
    clean="$discovery | sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^\$/d'"
    options+=("${slots[@]}" --host-discovery-script "exec bash -o pipefail -c $(printf %q "$clean")")
fi
[[ -z $processes || $processes == given ]] || options+=(-np "$processes")
interface=${INTERFACE-$(ip -o route show default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)}
[[ ${INTERFACE+set} == set && -z $interface ]] || options+=(--network-interface "${interface:-lo}")
exec horovodrun "${options[@]}" "${rest[@]}" "$@"
