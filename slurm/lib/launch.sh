# The launch library of slurm/*.sh, sourced by bash. site.sh beside it handles the differences between sites.
# shellcheck shell=bash

set -uo pipefail

say() { printf '%s slurm: %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() {
  say "$2"
  exit "$1"
}

# Print the comment at the top of the calling script, if --help was given.
usage_if_asked() {
  case ${1:-} in
    -h | --help)
      sed -n '2,/^#SBATCH/s/^# \{0,1\}//p' "$0" | grep -v '^SBATCH\|^#SBATCH'
      exit 0
      ;;
  esac
}

# shellcheck source=slurm/lib/site.sh
. "${BASH_SOURCE[0]%/*}/site.sh" || exit 1

# If a task of a step fails, all tasks end, but not if one is only done early. A step of this job never waits for another
# step's resources. Its tasks use all cores: with the CPU binding of some sites, each task would have only one core.
step() {
  local options=()
  while [ "${1#--}" != "$1" ]; do
    options+=("$1")
    shift
  done
  srun --overlap --kill-on-bad-exit=1 --wait=0 --cpu-bind=none "${container[@]}" "${options[@]}" "${inside[@]}" "$@"
}

# Run one Python process: in the container, if there is one, since only the container may have the packages. pyxis works
# only in srun, not on a login node, so the host's interpreter is used there.
alone() {
  if [ "${#container[@]}" -gt 0 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    step --nodes=1 --ntasks=1 "$@"
  elif [ "${#inside[@]}" -gt 0 ] && command -v "${inside[0]}" >/dev/null; then
    "${inside[@]}" "$@"
  elif [ "$1" = "$python" ]; then
    "$host_python" "${@:2}"
  else
    "$@"
  fi
}

# The values that launch/job.py prints.
trainer_nodes=0 rollout_nodes=0 gpus_per_node=0 max_retries=0 start_timeout_s=0 run_directory=

# Check the overrides, and find out how many nodes of each kind they need.
read_job() {
  local facts name value
  facts=$(alone "$python" -m megatron_fipo.launch.job "$@") || exit $?
  while IFS='=' read -r name value; do
    case $name in
      trainer_nodes | rollout_nodes | gpus_per_node | max_retries | start_timeout_s | run_directory)
        printf -v "$name" '%s' "$value"
        ;;
      *) die 2 "only overrides (section.name=value) can be given to this script, not: $*" ;;
    esac
  done <<<"$facts"
}

# Wait until a background process ends, even if traps handle signals meanwhile. Returns its status.
wait_for() {
  local status
  while :; do
    wait "$1"
    status=$?
    if [ "$status" -le 128 ]; then return "$status"; fi
    if ! kill -0 "$1" 2>/dev/null; then
      # A trap may have ended the wait above with the signal's status. bash still has the status of the process.
      wait "$1"
      return
    fi
  done
}

join() {
  local IFS=,
  printf '%s' "$*"
}

newest_checkpoint() {
  find "$run_directory/checkpoints" -maxdepth 1 -name 'step-*' -printf '%f\n' 2>/dev/null | sort | tail -n 1
}

# Count consecutive starts without a new checkpoint, and give up above cluster.max_retries.
count_attempt() {
  local last='' count=0
  began_from=$(newest_checkpoint)
  if [ -e "$run_directory/attempts" ]; then read -r count last <"$run_directory/attempts"; fi
  if [ -e "$run_directory/attempts" ] && [ "$last" = "$began_from" ]; then count=$((count + 1)); else count=0; fi
  printf '%s %s\n' "$count" "$began_from" >"$run_directory/attempts.new"
  mv "$run_directory/attempts.new" "$run_directory/attempts"
  if [ "$count" -gt "$max_retries" ]; then
    say "giving up: $max_retries restarts in a row brought no new checkpoint (newest: ${began_from:-none};" \
      "cluster.max_retries=$max_retries); submitted again with run.directory=$run_directory it starts from there"
    exit 1
  fi
}

# Nodes whose servers have failed in this job.
failed_nodes=()

remember_failed() {
  failed_nodes+=("$@")
  say "used from now on only where no other is left: $*"
}

# Put good nodes that failed before at the end of the list, after the spares.
failed_last() {
  local node sound=() failed=()
  for node in "${good_nodes[@]}"; do
    case " ${failed_nodes[*]} " in *" $node "*) failed+=("$node") ;; *) sound+=("$node") ;; esac
  done
  good_nodes=("${sound[@]}" "${failed[@]}")
}

# Set good_nodes to the nodes that can be used. Status 1 if they are too few or cannot reach each other. The time limit is
# 20 minutes, since a container's image may have to be downloaded.
check_nodes() {
  local facts=$run_directory/nodes list
  rm -rf "$facts"
  mkdir -p "$facts"
  step --kill-on-bad-exit=0 --time=20 --ntasks-per-node=1 --ntasks="${#nodes[@]}" --nodes="${#nodes[@]}" \
    "$python" -m megatron_fipo.launch.node_check look "$facts" || say "some nodes failed their check"
  list=$(alone "$python" -m megatron_fipo.launch.node_check judge "$facts" "$gpus_per_node" "${nodes[@]}") || return 1
  mapfile -t good_nodes <<<"$list"
  local needed=$((trainer_nodes + rollout_nodes))
  if [ "${#good_nodes[@]}" -lt "$needed" ] || [ -z "${good_nodes[0]}" ]; then
    say "$needed nodes are needed, and ${#nodes[@]} were given, of which these are good: ${good_nodes[*]}"
    return 1
  fi
  failed_last
  # The warnings that are filtered out are about addresses without a name.
  TORCH_CPP_LOG_LEVEL=ERROR step --time=20 --nodes="$needed" --ntasks="$needed" --ntasks-per-node=1 \
    --nodelist="$(join "${good_nodes[@]:0:$needed}")" "$python" -m megatron_fipo.launch.node_check all-reduce 180 || {
    say "the nodes cannot add numbers up together: a node that failed at once says why above;" \
      "one that failed after 180 s only waited for another, which may have said nothing"
    return 1
  }
}

start_servers() {
  addresses=$run_directory/addresses
  rm -rf "$addresses"
  mkdir -m 700 "$addresses"
  # If one node ends, the others continue: the trainer uses the remaining servers.
  FIPO_ADDRESSES=$addresses step --kill-on-bad-exit=0 --nodes="$rollout_nodes" --ntasks="$rollout_nodes" --ntasks-per-node=1 \
    --nodelist="$(join "${good_nodes[@]:trainer_nodes:rollout_nodes}")" --label \
    --output="$run_directory/logs/rollout-%N.log" \
    "$python" -m megatron_fipo.launch.rollout_node "$@" 2>"$run_directory/logs/rollout.err" &
  servers=$!
  local deadline=$((SECONDS + start_timeout_s + 60)) silent
  until [ "$(find "$addresses" -type f ! -name '.*' | wc -l)" -eq "$rollout_nodes" ]; do
    if [ -n "$stopping" ]; then return 1; fi
    if ! kill -0 "$servers" 2>/dev/null || failed_task rollout >/dev/null; then
      rollout_failure
      return 1
    fi
    if [ "$SECONDS" -gt "$deadline" ]; then
      mapfile -t silent < <(silent_nodes)
      say "rollout nodes whose servers did not answer in time: ${silent[*]}"
      remember_failed "${silent[@]}"
      return 1
    fi
    sleep 0.5
  done
}

# Print the rollout nodes that have not written their servers' addresses.
silent_nodes() {
  local node
  for node in "${good_nodes[@]:trainer_nodes:rollout_nodes}"; do
    [ -e "$addresses/$node" ] || printf '%s\n' "$node"
  done
}

stop_servers() {
  if [ -n "$servers" ]; then
    kill -TERM "$servers" 2>/dev/null
    wait_for "$servers"
    servers=
  fi
}

# Print srun's line about the first task that failed. Status 1 if none has.
failed_task() { grep -m 1 -E 'srun: error: [^:]+: tasks? [0-9]' "$run_directory/logs/$1.err"; }

# first_status WHAT STATUS: print the status of the task that failed first. srun's own status, STATUS, is the highest of
# all tasks, including those that srun killed because of the first.
first_status() {
  local code
  code=$(failed_task "$1" | sed -n -E 's/.*exit code ([0-9]+).*/\1/p')
  printf '%s' "${code:-$2}"
}

# Show the last lines of the task that failed first, as seen by srun.
first_failure() {
  local what=$1 line node task log
  line=$(failed_task "$what")
  node=$(sed -E 's/.*error: ([^:]+): tasks?.*/\1/' <<<"$line")
  task=$(sed -E 's/.*: tasks? ([0-9]+).*/\1/' <<<"$line")
  log=$run_directory/logs/$what-$node.log
  if [ -z "$line" ] || [ ! -e "$log" ]; then
    say "the $what step failed: $(tail -n 3 "$run_directory/logs/$what.err" 2>/dev/null)"
    return
  fi
  say "$what task $task on $node failed first; the end of $log:"
  grep -E "^ *$task: " "$log" | tail -n 30 >&2
}

# Show which rollout node failed first, and remember all that failed.
rollout_failure() {
  local names failed
  first_failure rollout
  names=$(sed -n -E 's/.*srun: error: ([^:]+): tasks? [0-9].*/\1/p' "$run_directory/logs/rollout.err" | paste -s -d ,)
  if [ -n "$names" ]; then
    mapfile -t failed < <(scontrol show hostnames "$names")
    remember_failed "${failed[@]}"
  fi
}

# One start of servers and trainer. Returns the trainer's status.
attempt() {
  local given=() trainer status
  check_nodes || return
  printf '%s\n' "${good_nodes[@]}" >"$run_directory/nodes.txt"
  servers=
  if [ "$rollout_nodes" -gt 0 ]; then
    start_servers "$@" || {
      stop_servers
      return 1
    }
    given=(rollout.servers=0 "rollout.addresses=[$(cat "$addresses"/* | sed 's#http#,http#g; s#,,#,#g; s#^,##')]")
  fi
  if [ -n "$stopping" ]; then
    stop_servers
    return 75
  fi
  step --nodes="$trainer_nodes" --ntasks=$((trainer_nodes * gpus_per_node)) --ntasks-per-node="$gpus_per_node" \
    --nodelist="$(join "${good_nodes[@]:0:trainer_nodes}")" --label --output="$run_directory/logs/trainer-%N.log" \
    "$python" -m megatron_fipo.train "$@" "${given[@]}" 2>"$run_directory/logs/trainer.err" &
  trainer=$!
  tail -q -n 0 -F --pid="$trainer" "$run_directory/logs/trainer-${good_nodes[0]}.log" 2>/dev/null |
    sed -u -n 's/^ *0: //p' &
  wait_for "$trainer"
  status=$(first_status trainer $?)
  if [ "$status" -ne 0 ] && [ "$status" -ne 75 ] && [ -z "$stopping" ]; then
    first_failure trainer
    # A rollout node may have been lost hours before.
    if [ -n "$servers" ] && failed_task rollout >/dev/null; then rollout_failure; fi
  fi
  stop_servers
  return "$status"
}

prepare_directory() {
  mkdir -p "$run_directory/logs"
  rm -f "$run_directory/stop"
  # A new submission means that the user has decided to try again.
  if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then rm -f "$run_directory/attempts"; fi
  (
    umask 077
    [ -s "$run_directory/rollout.token" ] ||
      head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$run_directory/rollout.token"
  )
  FIPO_ROLLOUT_TOKEN=$(cat "$run_directory/rollout.token")
  export FIPO_ROLLOUT_TOKEN
  {
    printf 'job %s, start %s, %s\n' "$SLURM_JOB_ID" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$(date -Is)"
    printf 'commit %s\n' "$(git -C "$FIPO_ROOT" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)"
    printf 'nodes %s\noverrides %s\n' "$SLURM_JOB_NODELIST" "$*"
  } >>"$run_directory/job.txt"
}

# submit NODES [ARGUMENT...]: pass the script that the user called to sbatch. Without a job's values, request no GPUs.
submit() {
  local nodes=$1 gpus=() script
  shift
  if [ "$gpus_per_node" -gt 0 ]; then gpus=("$(gpu_options "$gpus_per_node")"); fi
  script=$(readlink -f "$0")
  export FIPO_ROOT
  # shellcheck disable=SC2086 # several options
  exec sbatch --nodes="$nodes" "${site_options[@]}" "${gpus[@]}" ${FIPO_SBATCH_OPTIONS:-} "$script" "$@"
}

# launch_run EXPERIMENT [OVERRIDE...]: the whole job. An experiment among the overrides replaces the script's own.
launch_run() {
  local experiment=$1 status newest
  shift
  usage_if_asked "$@"
  site_values
  cd "$FIPO_ROOT" || exit 1
  case " $*" in *" experiment="*) ;; *) set -- "experiment=$experiment" "$@" ;; esac
  case " $*" in
    *" cluster.gpus_per_node="*) ;;
    *) set -- ${FIPO_GPUS_PER_NODE:+"cluster.gpus_per_node=$FIPO_GPUS_PER_NODE"} "$@" ;;
  esac
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    check_site
    read_job "$@"
    submit $((trainer_nodes + rollout_nodes)) "$@"
  fi
  # A requeued job keeps its number, and so finds its directory.
  set -- "run.directory=$runs/$SLURM_JOB_NAME-$SLURM_JOB_ID" "$@"
  read_job "$@"
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  prepare_directory "$@"
  stopping=
  trap 'stopping=1; say "asked to stop: the run saves and ends after the step in progress"; : >"$run_directory/stop"' USR1
  while :; do
    count_attempt
    attempt "$@"
    status=$?
    if [ -n "$stopping" ] && [ "$status" -ne 0 ]; then
      newest=$(newest_checkpoint)
      if [ "$newest" = "$began_from" ]; then
        say "no step was done before the request to stop; if it came from the time limit, --time has to be longer," \
          "or the seconds of --signal=B:USR1@… fewer"
      fi
      say "job $SLURM_JOB_ID goes back into the queue and resumes from ${newest:-the start}"
      scontrol requeue "$SLURM_JOB_ID" && sleep 300
      exit 75
    fi
    # 0: done; 2: a wrong configuration, which no retry can fix; 75: somebody has created the stop file.
    case $status in 0 | 2 | 75) exit "$status" ;; esac
    say "the run ended with status $status and starts again from its newest checkpoint: $(newest_checkpoint)"
  done
}
