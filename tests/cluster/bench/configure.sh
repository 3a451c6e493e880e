# Sourced by start-cluster: writes keys and configuration of ssh, munge and SLURM into DSC_DIR/etc.

nodes() { seq "$DSC_NODES"; }

make_keys() {
  local node key
  mkdir -p "$DSC_DIR"/{etc/slurm,etc/ssh,log,slurm/state,dev}
  chmod 700 "$DSC_DIR/etc/ssh"
  [ -f "$DSC_DIR/etc/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$DSC_DIR/etc/munge.key")
  for key in id $(nodes | sed 's/^/hostkey.n/'); do
    [ -f "$DSC_DIR/etc/ssh/$key" ] || ssh-keygen -q -t ed25519 -N '' -C "bench $key" -f "$DSC_DIR/etc/ssh/$key"
  done
  cp "$DSC_DIR/etc/ssh/id.pub" "$DSC_DIR/etc/ssh/authorized_keys"
  for node in $(nodes); do
    for name in "n$node" "10.77.0.1$node" "[n$node]:2222" "[10.77.0.1$node]:2222"; do
      echo "$name $(cut -d' ' -f1,2 "$DSC_DIR/etc/ssh/hostkey.n$node.pub")"
    done
  done >"$DSC_DIR/etc/ssh/known_hosts"
}

write_ssh() {
  local node
  {
    echo "127.0.0.1 localhost"
    echo "10.77.0.1 head"
    for node in $(nodes); do echo "10.77.0.1$node n$node"; done
  } >"$DSC_DIR/etc/hosts"
  # laid over /etc/ssh/ssh_config inside each host: plain ssh works, and ~/.ssh is not used
  cat >"$DSC_DIR/etc/ssh/ssh_config" <<END
Host *
  User root
  IdentityFile $DSC_DIR/etc/ssh/id
  IdentitiesOnly yes
  UserKnownHostsFile $DSC_DIR/etc/ssh/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 5
  ServerAliveCountMax 3
END
  for node in $(nodes); do
    cat >"$DSC_DIR/etc/ssh/sshd_config.n$node" <<END
Port 22
Port 2222
ListenAddress 10.77.0.1$node
HostKey $DSC_DIR/etc/ssh/hostkey.n$node
PidFile /run/sshd.pid
AuthorizedKeysFile $DSC_DIR/etc/ssh/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
MaxStartups 100
ClientAliveInterval 5
ClientAliveCountMax 3
END
  done
}

write_slurm() {
  local node gpu
  {
    cat <<END
ClusterName=bench
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for cred_expire seconds before it may start; SLURM's default is 120
AuthInfo=cred_expire=${DSC_CRED_EXPIRE:-10}
StateSaveLocation=$DSC_DIR/slurm/state
SlurmdSpoolDir=$DSC_DIR/slurm/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$DSC_DIR/log/slurmctld.log
SlurmdLogFile=$DSC_DIR/log/slurmd.%n.log
# no systemd and no cgroups are needed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DSC_DIR/log/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
KillWait=${DSC_KILLWAIT:-10}
SlurmdTimeout=${DSC_SLURMDTIMEOUT:-30}
SlurmctldTimeout=30
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=5
GresTypes=gpu
END
    for node in $(nodes); do
      echo "NodeName=n$node NodeAddr=10.77.0.1$node NodeHostname=n$node CPUs=8 RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
    done
    echo "PartitionName=all Nodes=n[1-$DSC_NODES] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4"
  } >"$DSC_DIR/etc/slurm/slurm.conf"
  # two GPUs that are none (copies of /dev/null; SLURM wants character devices): --gpus-per-node is taken, and
  # CUDA_VISIBLE_DEVICES set
  for gpu in 0 1; do [ -c "$DSC_DIR/dev/gpu$gpu" ] || mknod "$DSC_DIR/dev/gpu$gpu" c 1 3 || cannot "no device files"; done
  echo "NodeName=n[1-$DSC_NODES] Name=gpu File=$DSC_DIR/dev/gpu[0-1]" >"$DSC_DIR/etc/slurm/gres.conf"
}
