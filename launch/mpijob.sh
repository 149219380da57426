#!/usr/bin/env bash
# The launcher of a Kubeflow MPIJob: horovodrun over the hosts of the operator's host file, once all of them answer.
#
#   usage: launch/mpijob.sh COMMAND …
#
# The operator has the first launcher wait for the workers (WaitForWorkersReady), but not one that replaces it, and
# horovodrun gives up on a host at once. horovodrun ends with 75 when a worker's pod is deleted (a preemption, a drained
# node) and all ranks have saved, or when ranks of a lost launcher still live: the command is then started again, in this
# pod, once all workers answer. Any other exit code ends the launcher's pod with it.
set -euo pipefail
hostfile=/etc/mpi/hostfile    # lines "HOST slots=N"
(($#)) || { echo "usage: launch/mpijob.sh COMMAND …" >&2; exit 2; }
[[ -r $hostfile ]] || { echo "mpijob: there is no $hostfile: this is for pods of the MPI operator, elsewhere use horovodrun" >&2; exit 2; }

launcher='' terminated=''
terminate() {
    [[ -n $launcher ]] || exit 143
    terminated=yes
    kill -TERM "$launcher" || true
}
trap terminate TERM    # process 1 gets no signal that it does not handle

while true; do
    processes=0 waited_for=''
    while read -r host slots; do
        until timeout 5 bash -c "exec 3<>/dev/tcp/$host/2222" 2>/dev/null; do
            [[ $waited_for == "$host" ]] || echo "mpijob: waiting for $host (the operator replaces deleted pods alone: delete one that is Failed)" >&2
            waited_for=$host
            sleep 2
        done
        ((processes += ${slots#slots=}))
    done <"$hostfile"

    horovodrun -np "$processes" --hostfile "$hostfile" --ssh-port 2222 --network-interface eth0 --disable-cache "$@" &
    launcher=$! code=0
    wait "$launcher" || code=$?
    if [[ -n $terminated ]]; then    # the signal ended wait, not horovodrun
        code=0
        wait "$launcher" || code=$?
    fi
    [[ $code == 75 && -z $terminated ]] || exit "$code"
    launcher=''
    echo "mpijob: ended with 75; the run resumes when all workers answer again" >&2
    sleep 10    # a deleted pod still answers for a moment
done
