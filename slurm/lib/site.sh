# The site's settings as sbatch's options, and the interpreter, container and environment of a job.
# Sourced by launch.sh. slurm/site.example.sh explains every FIPO_… variable; megatron_fipo/launch/site.py checks them.
# shellcheck shell=bash disable=SC2034 # launch.sh reads what is set here

# Sets site, python, host_python, container (options of srun), inside (what goes before a command), site_options (of sbatch) and runs.
site_values() {
  site=${FIPO_SITE:-$FIPO_ROOT/slurm/site.sh}
  # shellcheck source=/dev/null
  if [ -e "$site" ]; then . "$site"; elif [ -n "${FIPO_SITE:-}" ]; then die 2 "FIPO_SITE=$site does not exist"; fi
  load_software
  paths
  container_values
  if [ -n "${FIPO_NETWORK_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$FIPO_NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$FIPO_NETWORK_INTERFACE
  fi
  export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  export HF_HUB_OFFLINE=${FIPO_OFFLINE:-1}
  site_options=()
  [ -z "${FIPO_PARTITION:-}" ] || site_options+=("--partition=$FIPO_PARTITION")
  [ -z "${FIPO_ACCOUNT:-}" ] || site_options+=("--account=$FIPO_ACCOUNT")
  [ -z "${FIPO_QOS:-}" ] || site_options+=("--qos=$FIPO_QOS")
}

# Modules and environments of the host; in a container the image has them. Sets python, and host_python for what runs
# outside the container.
load_software() {
  python=${FIPO_PYTHON:-$FIPO_ROOT/.venv/bin/python}
  set +u # the scripts of modules and conda read variables that are not set
  if [ -n "${FIPO_MODULES:-}" ]; then
    # The shell of a batch script may not have read the file that defines the command.
    # shellcheck source=/dev/null
    type module >/dev/null 2>&1 || . /etc/profile.d/modules.sh 2>/dev/null || . /etc/profile.d/lmod.sh 2>/dev/null
    # shellcheck disable=SC2086 # several modules
    module load $FIPO_MODULES || die 2 "$site: FIPO_MODULES=$FIPO_MODULES cannot be loaded"
  fi
  if [ -n "${FIPO_ACTIVATE:-}" ]; then
    # shellcheck source=/dev/null disable=SC2086 # conda's takes the environment's name
    . $FIPO_ACTIVATE || die 2 "$site: FIPO_ACTIVATE=$FIPO_ACTIVATE failed"
    python=${FIPO_PYTHON:-python}
  fi
  set -u
  host_python=$python
  command -v "$python" >/dev/null || host_python=$FIPO_ROOT/.venv/bin/python
}

# Where models, problems, runs and caches are. conf/ reads FIPO_MODELS and FIPO_DATA.
paths() {
  runs=${FIPO_RUNS:-runs}
  if [ -n "${FIPO_MODELS:-}" ]; then export FIPO_MODELS; fi
  if [ -n "${FIPO_DATA:-}" ]; then export FIPO_DATA; fi
  if [ -n "${FIPO_CACHE:-}" ]; then
    export HF_HOME=${HF_HOME:-$FIPO_CACHE/huggingface} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$FIPO_CACHE/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$FIPO_CACHE/torchinductor}
    export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$FIPO_CACHE/vllm}
  fi
}

container_values() {
  container=() inside=()
  if [ -z "${FIPO_CONTAINER_IMAGE:-}" ]; then return; fi
  local mounts=$FIPO_ROOT:$FIPO_ROOT path
  for path in "${FIPO_MODELS:-}" "${FIPO_DATA:-}" "${FIPO_RUNS:-}" "${FIPO_CACHE:-}"; do
    [ -z "$path" ] || mounts+=,$path:$path
  done
  mounts+=${FIPO_CONTAINER_MOUNTS:+,$FIPO_CONTAINER_MOUNTS}
  case ${FIPO_CONTAINER_RUNTIME:-pyxis} in
    pyxis)
      container=("--container-image=$FIPO_CONTAINER_IMAGE" "--container-mounts=$mounts" "--container-workdir=$FIPO_ROOT")
      ;;
    apptainer | singularity)
      # Environment variables are passed in unchanged, so that no value, such as a token, is on a command line.
      inside=("$FIPO_CONTAINER_RUNTIME" exec --nv --bind "$mounts" --pwd "$FIPO_ROOT" "$FIPO_CONTAINER_IMAGE")
      ;;
    *) die 2 "$site: FIPO_CONTAINER_RUNTIME=$FIPO_CONTAINER_RUNTIME is none of pyxis, apptainer, singularity" ;;
  esac
}

# gpu_options COUNT: the options that request GPUs at this site.
gpu_options() {
  if [ -n "${FIPO_GRES:-}" ]; then printf '%s' "--gres=$FIPO_GRES:$1"; else printf '%s' "--gpus-per-node=$1"; fi
}

# On a login node: print each problem of the site's file in one line, before a job waits in the queue.
check_site() {
  if [ -s "$site" ] && "$host_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    "$host_python" -m megatron_fipo.launch.site "$site" || exit $?
  fi
}
