#!/usr/bin/env bash
# Runs a private one-machine Slurm cluster (munged, slurmctld, slurmd) out of one folder, without systemd.
#
#   start_slurm.sh start FOLDER   starts it; the last line of stdout is the path to export as SLURM_CONF
#   start_slurm.sh stop FOLDER    cancels its jobs and ends its daemons; safe to repeat
#
# Exit status 77: this machine cannot run it (the reason is on stderr). Exit status 1: it should run and did not.
# Debian packages: slurmctld slurmd slurm-client munge. Works as root, or as an ordinary user for that user's jobs.
# SLURM_TEST_NODES (default 1): number of nodes, each a slurmd of its own on this machine, named node1, node2, …
# SLURM_TEST_CPUS (default 2): CPUs that each node offers; may exceed the real number.
# SLURM_TEST_GPUS (default 0): GPUs that each node claims to have; /dev/tty1… stand in for their device files.
# Node death: SIGKILL to slurmd (FOLDER/slurmd.node2.pid) and its slurmstepd processes; jobs requeue about 30 s later.
set -euo pipefail
nodes=${SLURM_TEST_NODES:-1} cpus=${SLURM_TEST_CPUS:-2} gpus=${SLURM_TEST_GPUS:-0}
export PATH="$PATH:/usr/sbin:/sbin"

fail() { echo "start_slurm: $2" >&2; exit "$1"; }

require_programs() {
    local program
    for program in munged slurmctld slurmd scontrol sbatch srun squeue scancel python3; do
        command -v "$program" >/dev/null ||
            fail 77 "$program is missing; install the packages slurmctld, slurmd, slurm-client and munge."
    done
    getent hosts "$(hostname)" >/dev/null || fail 77 "the host name $(hostname) does not resolve."
}

# Binds all sockets before closing any, so that the numbers differ.
free_ports() {
    python3 -c 'import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))' "$1"
}

write_config() {
    local folder=$1 ports host user node
    read -r -a ports < <(free_ports $((nodes + 1)))
    host=$(hostname -s)
    user=$(id -un)
    cat > "$folder/slurm.conf" <<CONF
ClusterName=blipfit-test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
# A requeued job waits cred_expire seconds (default 120) before it can start again.
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,preempt_youngest_first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=3
InactiveLimit=0
OverTimeLimit=0
MinJobAge=600
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/completed_jobs.txt
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=1:00:00 PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=urgent Nodes=ALL MaxTime=1:00:00 PriorityTier=10 PreemptMode=OFF State=UP
CONF
    : > "$folder/gres.conf"
    for ((node = 1; node <= nodes; node++)); do
        echo "NodeName=node$node NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[node]} CPUs=$cpus" \
            "RealMemory=1000 Gres=gpu:$gpus State=UNKNOWN" >> "$folder/slurm.conf"
        ((gpus == 0)) || echo "NodeName=node$node Name=gpu File=/dev/tty[1-$gpus]" >> "$folder/gres.conf"
        mkdir -p "$folder/spool/node$node"
    done
}

start_munge() {
    local munge=$1/munge
    mkdir -p "$munge"
    chmod 700 "$munge"
    head -c 128 /dev/urandom > "$munge/key"
    chmod 600 "$munge/key"
    # --force: the socket's folder need not be open to other users.
    munged --force --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" \
        --log-file="$munge/log" --seed-file="$munge/seed" --num-threads=2 2>"$munge/stderr" ||
        fail 1 "munged did not start: $(tail -n 3 "$munge/stderr")"
}

wait_until_idle() {
    local folder=$1 deadline=$((SECONDS + 30))
    until [[ $(sinfo --noheader --partition=main --format=%T:%D 2>/dev/null) == "idle:$nodes" ]]; do
        if ((SECONDS > deadline)); then
            tail -n 5 "$folder"/*.log >&2
            stop "$folder"
            fail 1 "the nodes were not idle within 30 s; see the log lines above."
        fi
        sleep 0.2
    done
}

start() {
    local folder node
    require_programs
    mkdir -p "$1"
    folder=$(realpath "$1")
    # A Unix socket path holds at most 107 bytes.
    ((${#folder} <= 90)) || fail 77 "the folder's path is longer than 90 characters: $folder"
    [[ ! -e $folder/slurm.conf ]] || fail 1 "$folder holds a cluster already; stop it or name an empty folder."
    mkdir -p "$folder/state"
    write_config "$folder"
    export SLURM_CONF=$folder/slurm.conf
    start_munge "$folder"
    # The daemons must not hold the caller's pipes open.
    slurmctld -c </dev/null >>"$folder/start.log" 2>&1 ||
        { stop "$folder"; fail 1 "slurmctld did not start: $(tail -n 3 "$folder/start.log")"; }
    for ((node = 1; node <= nodes; node++)); do
        slurmd -N "node$node" </dev/null >>"$folder/start.log" 2>&1 ||
            { stop "$folder"; fail 1 "slurmd did not start: $(tail -n 3 "$folder/start.log")"; }
    done
    wait_until_idle "$folder"
    echo "$SLURM_CONF"
}

end_process() {
    local pid deadline=$((SECONDS + 10))
    pid=$(cat "$1" 2>/dev/null) || return 0
    [[ -n $pid ]] || return 0
    kill "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null; do
        ((SECONDS <= deadline)) || { kill -KILL "$pid" 2>/dev/null || true; return 0; }
        sleep 0.1
    done
}

cancel_jobs() {
    local deadline=$((SECONDS + 15))
    timeout 10 squeue --noheader --format=%A 2>/dev/null | sort -u | xargs --no-run-if-empty timeout 10 scancel || true
    while [[ -n $(timeout 5 squeue --noheader 2>/dev/null) ]] && ((SECONDS <= deadline)); do sleep 0.2; done
}

stop() {
    local folder pid_file
    folder=$(realpath "$1")
    [[ -e $folder/slurm.conf ]] || return 0
    export SLURM_CONF=$folder/slurm.conf
    if [[ -e $folder/slurmctld.pid ]] && kill -0 "$(cat "$folder/slurmctld.pid")" 2>/dev/null; then cancel_jobs; fi
    for pid_file in "$folder"/slurmd.*.pid; do end_process "$pid_file"; done
    end_process "$folder/slurmctld.pid"
    end_process "$folder/munge/pid"
}

case ${1:-} in
    start | stop) [[ $# == 2 ]] || fail 2 "usage: start_slurm.sh start FOLDER | stop FOLDER" ;;
    *) fail 2 "usage: start_slurm.sh start FOLDER | stop FOLDER" ;;
esac
"$1" "$2"
