#!/bin/bash
# A real Slurm on this machine alone, for tests: tests/slurm.sh start FOLDER | stop FOLDER
# It needs root and `apt-get install slurm-wlm munge`. `start` prints what to export: the address of its configuration.
set -euo pipefail
folder=$(realpath -m "$2")
export SLURM_CONF="$folder/slurm.conf"

stop() {
    scancel --user="$(id -un)" 2>/dev/null && sleep 2 || true # jobs outlive the daemons
    for name in slurmctld slurmd munged; do
        [ -f "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
    done
}

start() {
    local host memory
    mkdir -p "$folder/state" "$folder/spool"
    host=$(hostname -s)
    memory=$(slurmd -C | sed -n 's/.*RealMemory=\([0-9]*\).*/\1/p')
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket=$folder/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=20
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(env -u OMP_NUM_THREADS nproc) RealMemory=$((memory * 9 / 10)) State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    head -c 128 /dev/urandom >"$folder/munge.key"
    chmod 700 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
    slurmctld -c
    slurmd
    for _ in $(seq 100); do
        sinfo --noheader --format=%T 2>/dev/null | grep -q idle && break
        sleep 0.1
    done
    sinfo --noheader --format=%T | grep -q idle || { echo "error: the node is not idle: $folder/*.log" >&2; exit 1; }
    echo "export SLURM_CONF=$SLURM_CONF"
}

"$1"
