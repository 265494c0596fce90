"""A site's values reach Slurm's commands, from a file or the environment.

Why: they are all that a site may change. The one stand-in is srun, a shell function that prints what it is called with,
where pyxis is meant: its options are refused by a Slurm without it. Not covered: containers themselves.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT

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
    """And what one process can do alone needs no srun."""
    script = SOURCE + 'srun() { printf "[%s]" "$@"; }; step hostname; alone echo here'
    ended = run(script, FIPO_SITE="/dev/null", SLURM_JOB_ID="1")
    assert ended.stdout == f"{STEP}[hostname]here\n"


def test_a_site_file_that_is_named_has_to_exist(tmp_path: Path) -> None:
    ended = run(SOURCE, FIPO_SITE=str(tmp_path / "none.sh"))
    assert ended.returncode == 2 and "none.sh does not exist" in ended.stderr
