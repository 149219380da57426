#!/usr/bin/env bash
# The launcher of a Kubeflow MPIJob: horovodrun over the hosts of the operator's host file, once all of them answer.
#
#   usage: launch/mpijob.sh COMMAND …
#
# The operator lets the first launcher wait for the workers (WaitForWorkersReady). One that takes its place after a
# preemption may be there before them, and horovodrun gives a host up at once.
set -euo pipefail
hostfile=/etc/mpi/hostfile    # lines "HOST slots=N"
(($#)) || { echo "usage: launch/mpijob.sh COMMAND …" >&2; exit 2; }
[[ -r $hostfile ]] || { echo "mpijob: there is no $hostfile: this is for pods of the MPI operator, elsewhere use horovodrun" >&2; exit 2; }

trap 'exit 143' TERM    # process 1 takes no signal that it does not ask for
processes=0 waited_for=
while read -r host slots; do
    until timeout 5 bash -c "exec 3<>/dev/tcp/$host/2222" 2>/dev/null; do
        [[ $waited_for == "$host" ]] || echo "mpijob: waiting for $host" >&2
        waited_for=$host
        sleep 2
    done
    ((processes += ${slots#slots=}))
done <"$hostfile"
exec horovodrun -np "$processes" --hostfile "$hostfile" --ssh-port 2222 --network-interface eth0 --disable-cache "$@"
