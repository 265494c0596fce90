"""A site's values are passed to Slurm's commands, from a file or the environment, and Slurm itself checks them.

Why: they are the only thing that a site may change. Two programs are replaced. For pyxis, srun is a shell function that
prints its arguments, since a Slurm without pyxis refuses these options. A program called apptainer accepts the options
of the real one, records them and runs the command. Not covered: containers themselves; accounts and QoS, which a Slurm
without a database accepts unchecked.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import SMALL, Cluster
from tests.slurm.jobs import ROOT, TINY, Job

pytestmark = pytest.mark.slow
STEP = "[--overlap][--kill-on-bad-exit=1][--wait=0][--cpu-bind=none]"
SOURCE = 'FIPO_ROOT="$1"; . "$1/slurm/lib/launch.sh"; site_values; '
PRINT = SOURCE + 'srun() { printf "[%s]" "$@"; }; alone "$python" -c pass; echo; echo "$NCCL_SOCKET_IFNAME"'


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FIPO_", "SLURM_"))}
    command = ["bash", "-c", script, "bash", str(ROOT)]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=30)


def test_a_container_is_given_to_every_step_of_a_job(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text(
        "FIPO_CONTAINER_IMAGE=/images/x.sqsh\nFIPO_CONTAINER_MOUNTS=/data:/data\nFIPO_NETWORK_INTERFACE=ib0\n"
    )
    ended = run(PRINT, FIPO_SITE=str(site), FIPO_PYTHON="/opt/python", SLURM_JOB_ID="1")
    called, interface = ended.stdout.splitlines()
    assert called == (
        f"{STEP}[--container-image=/images/x.sqsh][--container-mounts={ROOT}:{ROOT},/data:/data]"
        f"[--container-workdir={ROOT}][--nodes=1][--ntasks=1][/opt/python][-c][pass]"
    )
    assert interface == "ib0"


def test_without_a_container_srun_gets_no_option_of_pyxis() -> None:
    """Work of a single process does not need srun."""
    script = SOURCE + 'srun() { printf "[%s]" "$@"; }; step hostname; alone echo here'
    ended = run(script, FIPO_SITE="/dev/null", SLURM_JOB_ID="1")
    assert ended.stdout == f"{STEP}[hostname]here\n"


def test_a_site_file_that_is_named_has_to_exist(tmp_path: Path) -> None:
    ended = run(SOURCE, FIPO_SITE=str(tmp_path / "none.sh"))
    assert ended.returncode == 2 and "none.sh does not exist" in ended.stderr


def test_paths_caches_and_options_are_the_sites(tmp_path: Path) -> None:
    """A cache that the site has set is kept, and the hub is not used unless the site allows it."""
    site = tmp_path / "site.sh"
    site.write_text(
        "FIPO_PARTITION=gpu FIPO_ACCOUNT=project FIPO_QOS=high FIPO_GRES=gpu:a100 FIPO_MODELS=/m FIPO_RUNS=/r\n"
        "FIPO_CACHE=/c TRITON_CACHE_DIR=/tmp/triton\n"
    )
    shown = (
        '"$HF_HOME" "$TRITON_CACHE_DIR" "$VLLM_CACHE_ROOT" "$HF_HUB_OFFLINE" "$runs" "$(bash -c \'echo $FIPO_MODELS\')"'
    )
    script = f'{SOURCE} printf "%s\\n" "${{site_options[@]}}" "$(gpu_options 4)" {shown}'
    ended = run(script, FIPO_SITE=str(site))
    assert ended.stdout.splitlines() == [
        *("--partition=gpu", "--account=project", "--qos=high", "--gres=gpu:a100:4"),
        *("/c/huggingface", "/tmp/triton", "/c/vllm", "1", "/r", "/m"),
    ], ended.stderr
    plain = run(SOURCE + 'gpu_options 8; echo " $runs $HF_HUB_OFFLINE"', FIPO_SITE="/dev/null", FIPO_OFFLINE="0")
    assert plain.stdout == "--gpus-per-node=8 runs 0\n"


def test_modules_and_an_environment_are_loaded(tmp_path: Path) -> None:
    """Their scripts may read variables that are not set, as conda's do; the interpreter is then the environment's."""
    activate = tmp_path / "activate"
    activate.write_text('echo "activate $1$UNSET"\n')
    site = tmp_path / "site.sh"
    site.write_text(f"FIPO_MODULES='gcc/13 cuda/13' FIPO_ACTIVATE='{activate} fipo'\n")
    script = 'module() { echo "module $*"; }; ' + SOURCE + 'echo "$python"; set -o | grep nounset'
    told = run(script, FIPO_SITE=str(site)).stdout.split()
    assert told == ["module", "load", "gcc/13", "cuda/13", "activate", "fipo", "python", "nounset", "on"]
    site.write_text("FIPO_MODULES=cuda/99\n")
    ended = run("module() { return 1; }; " + SOURCE, FIPO_SITE=str(site))
    assert ended.returncode == 2 and "FIPO_MODULES=cuda/99 cannot be loaded" in ended.stderr


def test_an_interpreter_of_the_image_is_not_looked_for_on_the_login_node() -> None:
    values = {"FIPO_SITE": "/dev/null", "FIPO_CONTAINER_IMAGE": "x.sqsh", "FIPO_PYTHON": "/opt/fipo/bin/python"}
    ended = run(SOURCE + 'host_python=echo; alone "$python" -m x; site_values; echo "$host_python"', **values)
    assert ended.stdout == f"-m x\n{ROOT}/.venv/bin/python\n"


APPTAINER = """#!/bin/bash
# apptainer exec [--nv] [--bind MOUNTS] [--pwd DIRECTORY] IMAGE COMMAND...
printf '%s\\n' "$*" >>"{log}"
[ "$1" = exec ] || exit 3
shift
while [ "${{1#--}}" != "$1" ]; do
  case $1 in
    --nv) shift ;;
    --bind) shift 2 ;;
    --pwd) cd "$2" && shift 2 ;;
    *) echo "unknown option $1" >&2; exit 3 ;;
  esac
done
export APPTAINER_CONTAINER=$1
shift
exec "$@"
"""


def write_site(tmp_path: Path, *lines: str) -> dict[str, str]:
    """The environment in which a user of this site calls a script."""
    path = tmp_path / "site.sh"
    path.write_text("".join(f"export {line}\n" for line in lines))
    return {"FIPO_SITE": str(path)}


def call(cluster: Cluster, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in cluster.environment.items() if not name.startswith("FIPO_")}
    return subprocess.run(
        arguments, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("lines", "problem", "right"),
    [
        (["FIPO_PARTITION=smal"], "FIPO_PARTITION: sinfo knows no smal", "(small)"),
        ([f"FIPO_PARTITION={SMALL}", "FIPO_GPUS_PER_NODE=8"], "FIPO_GPUS_PER_NODE: no node has 8 GPUs", "gpu:a100:4"),
        ([f"FIPO_PARTITION={SMALL}", "FIPO_GRES=gpu:h100"], "FIPO_GRES: no node has gpu:h100", "(gpu:a100:4)"),
        (
            [f"FIPO_PARTITION={SMALL}", "FIPO_SBATCH_OPTIONS=--time=soon"],
            "Invalid --time specification",
            "sbatch takes",
        ),
    ],
)
def test_what_slurm_does_not_know_is_one_line_on_the_login_node(
    cluster: Cluster, tmp_path: Path, lines: list[str], problem: str, right: str
) -> None:
    """From preflight, and from the script, which submits nothing."""
    site = write_site(tmp_path, *lines, f"FIPO_PYTHON={sys.executable}")
    preflight = [sys.executable, "-m", "megatron_fipo.preflight", "experiment=fipo_7b", f"run.directory={tmp_path}"]
    for command in (preflight, ["slurm/fipo_7b.sh"]):
        ended = call(cluster, site, *command)
        assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
        assert ended.stderr.count("\n") == 1 and problem in ended.stderr and right in ended.stderr
    assert cluster.run("squeue", "-h", "-p", SMALL) == ""


@pytest.mark.matrix  # the other tests read what it submits
def test_a_run_on_a_node_of_four_gpus_in_a_container(cluster: Cluster, tmp_path: Path) -> None:
    """A whole run: the script is called, finds partition, GPUs, paths and caches in the site's file, and every process
    of ours is in the container. No command line has the servers' token or the user's.
    """
    log, image, token = tmp_path / "calls", tmp_path / "image.sif", "hf_notforothers"
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(APPTAINER.format(log=log))
    program.chmod(0o755)
    for name in ("runs", "cache"):
        (tmp_path / name).mkdir()
    image.touch()
    site = write_site(
        tmp_path,
        f"FIPO_PARTITION={SMALL} FIPO_GRES=gpu:a100 FIPO_GPUS_PER_NODE=4 FIPO_PYTHON={sys.executable}",
        f"FIPO_CONTAINER_RUNTIME=apptainer FIPO_CONTAINER_IMAGE={image} FIPO_CONTAINER_MOUNTS=/etc:/etc",
        f"FIPO_RUNS={tmp_path}/runs FIPO_CACHE={tmp_path}/cache NCCL_IB_HCA=mlx5_0,mlx5_1",
        f"FIPO_SBATCH_OPTIONS='--parsable --output={tmp_path}/job.out' FIPO_NETWORK_INTERFACE=eth0,lo",
        f"PATH={program.parent}:$PATH",
    )
    layout = [TINY[0], *TINY[5:], "run.steps=1"]
    submitted = call(cluster, site | {"HF_TOKEN": token}, "slurm/fipo_32b.sh", *layout)
    assert submitted.returncode == 0, submitted.stderr
    job = Job(cluster, tmp_path, submitted.stdout.strip())
    told = cluster.run("scontrol", "show", "job", job.number)
    assert f"Partition={SMALL}" in told and "gpu:a100:4" in told and "NumNodes=1" in told, told
    job.wait_for("COMPLETED", "FAILED", timeout_s=240)
    assert job.state == "COMPLETED", job.told()

    run = tmp_path / "runs" / f"fipo_32b-{job.number}"
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    calls = log.read_text()
    assert "megatron_fipo.launch.job" in calls and "megatron_fipo.launch.node_check look" in calls
    trainers = [line for line in calls.splitlines() if "-m megatron_fipo.train" in line]
    assert len(trainers) == 4
    mounts = f"{ROOT}:{ROOT},{tmp_path}/runs:{tmp_path}/runs,{tmp_path}/cache:{tmp_path}/cache,/etc:/etc"
    assert all(line.startswith(f"exec --nv --bind {mounts} --pwd {ROOT} {image} ") for line in trainers), calls
    secret = (run / "rollout.token").read_text().strip()
    assert secret and all(text not in calls + job.output for text in (secret, token))
