# Settings of your site. Copy this to slurm/site.sh, or to a file that FIPO_SITE names, and keep the lines you need:
#
#   cp slurm/site.example.sh slurm/site.sh && . slurm/site.sh && megatron-fipo doctor
# Every script in slurm/ sources it, on the login node and in the job. doctor and preflight check it. If you source it
# yourself, as above, the commands that you type find models and problems in the same places as the jobs. The value in
# brackets is used if a variable is not set. Put no secrets here: a token belongs in a file of yours (HF_TOKEN_PATH).
# shellcheck shell=bash

# ---- The scheduler. Options on sbatch's command line take precedence.

# export FIPO_PARTITION=gpu              # (the cluster's default)
# export FIPO_ACCOUNT=project123         # (yours)
# export FIPO_QOS=normal                 # (the account's)
# export FIPO_GPUS_PER_NODE=4            # GPUs per node, and trainer processes per node (the recipes': 8)
# export FIPO_GRES=gpu:a100              # if GPUs are requested by --gres=gpu:a100:N (--gpus-per-node=N)
# export FIPO_SBATCH_OPTIONS='--time=24:00:00 --constraint=h100'     # other options, as on the command line ()

# ---- The software: modules, an environment, or a container. With a container, leave the first two unset.

# export FIPO_MODULES='gcc/13 cuda/13.0' # loaded in this order ()
# export FIPO_ACTIVATE=/shared/fipo/bin/activate                     # a virtual environment ()
# export FIPO_ACTIVATE='/opt/conda/bin/activate fipo'                # or a conda environment, by name or path
# export FIPO_PYTHON=/shared/fipo/bin/python                         # the interpreter (.venv/bin/python of the checkout)

# export FIPO_CONTAINER_IMAGE=/shared/images/megatron-fipo.sqsh      # pyxis and enroot: a file, or nvcr.io#… export
# FIPO_CONTAINER_IMAGE=/shared/images/megatron-fipo.sif       # Apptainer; containers/ says how to make both export
# FIPO_CONTAINER_RUNTIME=apptainer                            # pyxis, apptainer or singularity (pyxis) export
# FIPO_CONTAINER_MOUNTS=/scratch:/scratch,/etc/ssl:/etc/ssl   # in addition to the checkout and the paths below ()
# export FIPO_PYTHON=/opt/fipo/bin/python                            # the image's

# ---- Paths that all nodes share.

# export FIPO_MODELS=/shared/models      # has Qwen2.5-32B and Qwen2.5-Math-7B (models/ of the checkout)
# export FIPO_DATA=/shared/data          # has dapo-math-17k.parquet and the AIME files (data/ of the checkout)
# export FIPO_RUNS=/scratch/$USER/runs   # each run makes its own directory in it (runs/ of the checkout)
# export FIPO_CACHE=/scratch/$USER/cache # Hugging Face, Triton, torch's inductor and vLLM (the home directory)
# export TRITON_CACHE_DIR=/tmp/$USER/triton    # a cache in another place, such as the nodes' own disks

# ---- The network. NCCL's variables are passed on unchanged; these are examples.

# export FIPO_NETWORK_INTERFACE=ib0      # NCCL's and gloo's sockets and the servers; several: ib0,ib1 (their own choice)
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3                     # the adapters that carry the traffic
# export NCCL_CROSS_NIC=0 NCCL_DEBUG=WARN
# export FI_PROVIDER=cxi NCCL_NET='AWS Libfabric'                    # Slingshot, with its plugin

# export FIPO_OFFLINE=0                  # 0: nodes reach the model hub, so that models and data can be hub ids (1)
# export HF_TOKEN_PATH=$HOME/.huggingface-token                      # chmod 600 export https_proxy=http://proxy:3128
# no_proxy=localhost,127.0.0.1  # a run's servers are never called through the proxy
