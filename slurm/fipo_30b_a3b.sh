#!/usr/bin/env bash
# FIPO on Qwen3-30B-A3B-Base, a mixture of experts.
#
#   slurm/fipo_30b_a3b.sh [OVERRIDE...]           checks site and overrides, and asks for the nodes and GPUs that they want
#   sbatch --account=… --partition=… --gpus-per-node=8 slurm/fipo_30b_a3b.sh [OVERRIDE...]     from the checkout
#
# Nodes: cluster.trainer_nodes + cluster.rollout_nodes. Site values: slurm/site.example.sh. Everything else: docs/cluster.md.
#SBATCH --job-name=fipo_30b_a3b
#SBATCH --nodes=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@9000
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file: the checkout is where sbatch was called, or FIPO_ROOT.
FIPO_ROOT=${FIPO_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
# shellcheck source=slurm/lib/launch.sh
. "$FIPO_ROOT/slurm/lib/launch.sh" || exit 1
launch_run fipo_30b_a3b "$@"
