#!/usr/bin/env bash
# Convert a model between Hugging Face and a distributed checkpoint, on a node's CPU: arguments of tools/convert_hf.py.
#
#   sbatch --account=… --partition=… slurm/convert.sh to-hf runs/R/checkpoints/step-000100 TARGET --model MODEL
#   slurm/convert.sh to-megatron MODEL TARGET                            requests a node by itself
#
# Paths are absolute or relative to the checkout. Site values and everything else: docs/cluster.md and docs/weights.md.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --mem=0
#SBATCH --output=%x-%j.out

FIPO_ROOT=${FIPO_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
# shellcheck source=slurm/lib/launch.sh
. "$FIPO_ROOT/slurm/lib/launch.sh" || exit 1
usage_if_asked "$@"
site_values
cd "$FIPO_ROOT" || exit 1
if [ -z "${SLURM_JOB_ID:-}" ]; then check_site && submit 1 "$@"; fi
# shellcheck disable=SC2154 # set by site_values
step --ntasks=1 "$python" tools/convert_hf.py "$@"
