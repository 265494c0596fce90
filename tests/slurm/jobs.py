"""Jobs of the scripts under slurm/, as the tests submit and watch them."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import Cluster, wait_until

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "experiment=tiny",
    "cluster.gpus_per_node=1",
    "cluster.trainer_nodes=2",
    "cluster.rollout_nodes=1",
    "rollout.weight_transfer=process_group",
    "algorithm.prompts_per_step=8",
    "algorithm.samples_per_prompt=4",
    "algorithm.mini_batch_prompts=4",
    "algorithm.filter_groups.enable=false",
    "validation.every=0",
    "checkpoint.every=0",
)
"""A run of the embedded model: a trainer on two nodes, a server on a third. Saves only when it is asked to stop."""


@dataclass
class Job:
    """One submitted script. Its output goes to job.out in `directory`, and further starts add to it."""

    cluster: Cluster
    directory: Path
    number: str

    @property
    def output(self) -> str:
        """Return the output of the job so far."""
        path = self.directory / "job.out"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def state(self) -> str:
        """Return its state, such as PENDING, also after its end."""
        return self.cluster.run("squeue", "-h", "-t", "all", "-j", self.number, "-o", "%T").strip()

    def wait_for(self, *states: str, timeout_s: float) -> None:
        """Wait until the job is in one of these states."""
        wait_until(lambda: self.state in states, timeout_s, self.told)

    def update(self, **settings: object) -> None:
        """Change the job as `scontrol update` does."""
        changes = [f"{name}={value}" for name, value in settings.items()]
        self.cluster.run("scontrol", "update", f"jobid={self.number}", *changes)

    def start_again(self) -> None:
        """Let a requeued job start at once, after the second in which Slurm still refuses its credential."""
        self.update(starttime="now+2")

    def told(self) -> str:
        """Return the text that a failing test shows."""
        return f"{self.state}\n{self.output[-4000:]}\n{self.cluster.log()}"


def submit(cluster: Cluster, directory: Path, script: str, arguments: list[str], *options: str) -> Job:
    """sbatch a script of slurm/ from the checkout."""
    command = ["sbatch", "--parsable", f"--output={directory}/job.out", *options, f"slurm/{script}", *arguments]
    return Job(cluster, directory, cluster.run(*command, cwd=ROOT).strip())


def call(cluster: Cluster, directory: Path, script: str, arguments: list[str], *options: str) -> Job:
    """Call a script of slurm/ directly, from another directory. It calls sbatch."""
    environment = cluster.environment | {
        "FIPO_SBATCH_OPTIONS": " ".join(["--parsable", f"--output={directory}/job.out", *options])
    }
    command = [str(ROOT / "slurm" / script), *arguments]
    ended = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return Job(cluster, directory, ended.stdout.strip())
