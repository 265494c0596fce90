"""Compute torch.distributed's variables from Slurm's, so that `srun python -m megatron_fipo.train` is enough."""

import re
from collections.abc import Mapping

# Below Linux's usual ephemeral range (32768 and above), so that no outgoing connection uses the port by chance.
_FIRST_PORT, _PORTS = 12000, 20000


def under_srun(environment: Mapping[str, str]) -> bool:
    """Return whether this process is one of several tasks of a job step.

    A batch script or a login in an allocation has SLURM_PROCID and SLURM_NTASKS too, but only a step's tasks have
    SLURM_STEP_NUM_TASKS.
    """
    return "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def distributed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of a job step.

    The rendezvous is the same on all tasks. It is on the step's first node, where Slurm puts task 0. Its port is
    derived from job and step, so that two steps on one node rarely use the same port. If MASTER_ADDR and MASTER_PORT
    are already set in `environment`, they are used.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_of_this_node(environment)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_FIRST_PORT + (job * 31 + step) % _PORTS),
    }


def _tasks_of_this_node(environment: Mapping[str, str]) -> int:
    """Return the number of the step's tasks on this node: `8(x2),4` means 8 on nodes 0 and 1, and 4 on node 2."""
    if "SLURM_STEP_TASKS_PER_NODE" not in environment:
        return int(environment.get("SLURM_NTASKS_PER_NODE", "1"))
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"not Slurm's tasks per node: {environment['SLURM_STEP_TASKS_PER_NODE']!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[int(environment.get("SLURM_NODEID", "0"))]


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's node list: gpu003 for `gpu[003-007,012],login`.

    This does not call `scontrol show hostnames`, since containers often lack it.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"not a Slurm node list: {nodes!r}")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())
