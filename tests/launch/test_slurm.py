"""Slurm's variables turned into torch.distributed's. Not covered: a real srun, which the Slurm tests run."""

import pytest

from megatron_fipo.launch.slurm import distributed_environment, first_host

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "a[1-9]",
    "SLURM_STEP_NODELIST": "a[3-4]",
}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login", "login"),
        ("n1,n2", "n1"),
        ("gpu[003-007,012],login", "gpu003"),
        ("gpu[12,15]", "gpu12"),
        ("rack[2-3]-node[07-09].site", "rack2-node07.site"),
        ("node-a-1,node-a-2", "node-a-1"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_every_task_of_a_step_gets_the_same_rendezvous():
    one, other = distributed_environment(TASK), distributed_environment(TASK | {"SLURM_PROCID": "0"})
    assert one["MASTER_ADDR"] == other["MASTER_ADDR"] == "a3"
    assert one["MASTER_PORT"] == other["MASTER_PORT"]
    assert 12000 <= int(one["MASTER_PORT"]) < 32000
    assert (one["RANK"], one["WORLD_SIZE"], one["LOCAL_RANK"]) == ("5", "8", "1")


def test_steps_of_one_job_differ_in_port_and_the_users_choice_wins():
    assert (
        distributed_environment(TASK)["MASTER_PORT"]
        != distributed_environment(TASK | {"SLURM_STEP_ID": "1"})["MASTER_PORT"]
    )
    chosen = distributed_environment(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "4000")


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1"}, "8"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "1"}, "8"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "2"}, "4"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NODEID": "0"}, "3"),
        ({"SLURM_NTASKS_PER_NODE": "8"}, "8"),
        ({}, "1"),
    ],
)
def test_the_ranks_of_this_node_are_counted(variables, tasks):
    """Servers that a run starts itself use the GPUs after these."""
    assert distributed_environment(TASK | variables)["LOCAL_WORLD_SIZE"] == tasks


def test_tasks_per_node_in_another_form_are_refused():
    with pytest.raises(ValueError, match="4x2"):
        distributed_environment(TASK | {"SLURM_STEP_TASKS_PER_NODE": "4x2"})
