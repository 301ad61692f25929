#!/usr/bin/env bash
# Start a small real SLURM cluster on one machine (Debian or Ubuntu, as root), for the tests marked
# slurm and for trying things out. It has virtual nodes with fake GPUs and more CPUs than the machine
# has, no accounting, and four partitions: jobs in low are preempted by those of all the others, high
# is served before main, which is the default, and short has a time limit of two minutes.
#
#   cluster.sh start          install what is missing, and start the cluster if it is not up
#   eval "$(cluster.sh env)"  let sbatch and SLURM's other commands use this cluster
#   cluster.sh status         show its nodes; exits 3 if it is down
#   cluster.sh stop           cancel its jobs and end its daemons, and nothing that `start` did not start
#
# CLUSTER=DIR is the folder of its configuration, state and logs ($TMPDIR/cm3leon-slurm by default).
# NODES=2 CPUS=8 GPUS=2 set the number of nodes, and the CPUs and GPUs of each; `start` reads them.
set -euo pipefail

readonly folder=${CLUSTER:-${TMPDIR:-/tmp}/cm3leon-slurm} nodes=${NODES:-2} cpus=${CPUS:-8} gpus=${GPUS:-2}
readonly host=$(hostname -s) mark="# $folder: cm3leon-slurm"
readonly munge=$folder/run/munge.sock
export SLURM_CONF=$folder/slurm.conf

fail() { echo "cluster.sh: $*" >&2; exit 1; }

within() { # within SECONDS COMMAND...: waits until the command succeeds
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.2; done
}

process() { # process NAME PIDFILE: the id in the file, if that process is alive and has that name
  local id; id=$(cat "$2" 2>/dev/null) && [[ -n $id && $(cat "/proc/$id/comm" 2>/dev/null) == "$1" ]] && echo "$id"
}

is_up() { [[ -f $SLURM_CONF ]] && timeout 10 scontrol ping 2>/dev/null | grep -q 'is UP'; }

is_ready() { ! sinfo -h -N -o %T | grep -qvE '^(idle|mixed|allocated|completing)$' && sinfo -h -N | grep -q .; }

install_packages() {
  local packages=(munge slurmctld slurmd slurm-client) denied=/usr/sbin/policy-rc.d
  dpkg -s "${packages[@]}" >/dev/null 2>&1 && return
  # The packages would start daemons of their own.
  if [[ ! -e $denied ]]; then
    trap "rm -f $denied" EXIT
    printf '#!/bin/sh\nexit 101\n' >$denied
    chmod +x $denied
  fi
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"; } \
    >"$folder/log/apt.log" 2>&1 || { tail -n 5 "$folder/log/apt.log" >&2; fail "apt-get could not install SLURM"; }
}

find_ports() { # sets port: the controller listens on it, and the nodes on the ones behind it
  local end
  for ((port = end = 20000; port < 32000; port = end = port + 50)); do
    while ! (: <>"/dev/tcp/127.0.0.1/$end") 2>/dev/null; do ((end++ < port + nodes)) || return 0; done
  done
  fail "no $((nodes + 1)) ports in a row are free between 20000 and 32000"
}

name_nodes() { # a node's name is the address that torch.distributed is given
  local number
  forget_nodes
  for ((number = 1; number <= nodes; number++)); do echo "127.0.0.1 node$number $mark"; done >>/etc/hosts
  getent hosts "$host" >/dev/null || echo "127.0.0.1 $host $mark" >>/etc/hosts
}

forget_nodes() { # in place: in a container the file is often a mount, which nothing can replace
  local kept; kept=$(grep -vF "$mark" /etc/hosts) && [[ $kept != "$(</etc/hosts)" ]] && echo "$kept" >/etc/hosts
  true
}

write_configuration() {
  local number
  # cred_expire: a requeued job waits until its credential has expired. KillWait: submitit ignores SIGTERM, and would
  # keep a cancelled job for 30 s. MinJobAge: squeue knows ended jobs for a day, as there is no accounting to ask.
  # FirstJobId: no job gets the number of one of an earlier cluster, whose results a folder may still hold.
  cat >"$SLURM_CONF" <<CONF
ClusterName=cm3leon
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket=$munge
CredType=cred/munge
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=86400
EnforcePartLimits=ALL
FirstJobId=$(($(date +%s) % 6000000 * 10 + 1))
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$folder/state/slurmctld
SlurmdSpoolDir=$folder/state/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
CONF
  for ((number = 1; number <= nodes; number++)); do
    echo "NodeName=node$number NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + number))" \
      "CPUs=$cpus RealMemory=64000 Gres=gpu:$gpus State=UNKNOWN"
  done >>"$SLURM_CONF"
  cat >>"$SLURM_CONF" <<CONF
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=main Nodes=ALL MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF Default=YES
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=2 PriorityTier=5 PreemptMode=OFF
CONF
  for ((number = 0; number < gpus; number++)); do # SLURM insists on character devices; these are /dev/null
    [[ -c $folder/state/gpu$number ]] || mknod "$folder/state/gpu$number" c 1 3
    echo "Name=gpu File=$folder/state/gpu$number"
  done >"$folder/gres.conf"
}

start() {
  [[ $(id -u) == 0 ]] || fail "SLURM's daemons are started as root, and this is $(id -un)"
  ((${#munge} < 100)) || fail "CLUSTER is $folder, too long a path for a socket; it must be shorter than 80 letters"
  mkdir -p "$folder"/{run,log,state}
  # One start at a time on a machine, as ports and /etc/hosts belong to all; the daemons must not inherit the lock.
  exec 9>>/etc/hosts
  flock 9
  if is_up; then return; fi
  local number
  command -v apt-get >/dev/null || command -v slurmctld >/dev/null || fail "SLURM is installed by apt-get, which is missing"
  install_packages
  mkdir -p "$folder/state/slurmctld" $(seq -f "$folder/state/node%g" "$nodes")
  name_nodes
  find_ports
  write_configuration
  # A munge of its own, with its own key: the machine's, if there is one, stays as it is.
  [[ -f $folder/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  process munged "$folder/run/munged.pid" >/dev/null ||
    munged --force --socket="$munge" --key-file="$folder/munge.key" --pid-file="$folder/run/munged.pid" \
      --log-file="$folder/log/munged.log" --seed-file="$folder/state/munged.seed" 9>&- 2>"$folder/log/munged.err" ||
    fail "munged did not start: $(tail -n 1 "$folder/log/munged.err")"
  within 10 munge -n --socket="$munge" || fail "munged does not answer; see $folder/log"
  slurmctld 9>&-
  within 30 is_up || fail "slurmctld does not answer; see $folder/log/slurmctld.log"
  for number in $(seq "$nodes"); do slurmd -N "node$number" 9>&-; done
  within 30 is_ready || fail "not all nodes are ready; see $folder/log and \`cluster.sh status\`"
}

stop() {
  [[ -d $folder/run ]] || return 0
  if is_up; then
    squeue -h -o %A | sort -u | xargs -r scancel
    within 30 bash -c '[[ -z $(squeue -h) ]]' || true
  fi
  local file id ids=()
  for file in "$folder"/run/*.pid; do
    id=$(basename "$file" .pid) && id=$(process "${id%%-*}" "$file") && ids+=("$id")
  done
  kill "${ids[@]}" 2>/dev/null || true
  for id in "${ids[@]}"; do within 20 test ! -d "/proc/$id" || kill -9 "$id"; done
  (flock 9 && forget_nodes) 9>>/etc/hosts
  rm -rf "$folder/run" "$folder/state" "$SLURM_CONF" "$folder/gres.conf" "$folder/munge.key"
}

status() {
  is_up || { echo "down: $folder"; exit 3; }
  sinfo -o '%12P %6a %10l %6D %6t %8c %8G %N'
}

case ${1:-} in
  start) start && status ;;
  stop) stop ;;
  status) status ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac
