"""The placement of servers and trainer in preflight, on nodes with four and eight GPUs.

Why: a server on a shared GPU, tensor parallelism over two nodes, and servers without GPUs cost a night if they are only
found on the cluster. The expected bytes and seconds are computed from the configuration, not taken from a run. Not
covered: a shared GPU itself (docs/gpu.md).
"""

import re
from pathlib import Path

import pytest

from megatron_fipo.config import Config
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.costs import parameter_counts
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.sizing.estimate import Estimate, estimate, model_directory, one_node, remedies
from megatron_fipo.sizing.memory import GIB
from megatron_fipo.sizing.placement import notes, servers_text

ONE_NODE = ["cluster.trainer_nodes=1", "cluster.rollout_nodes=0"]
SHARED = [*ONE_NODE, "rollout=shared_gpu", "rollout.servers=8"]


def told(*overrides: str) -> tuple[Config, ModelConfig, Estimate]:
    config = load_config(overrides)
    check(config, local=False)
    model_config = read_architecture(model_directory(config.model.path)[0])
    return config, model_config, estimate(config, model_config)


def notes_of(*overrides: str) -> list[str]:
    config, model_config, found = told(*overrides)
    return list(notes(config, model_config, found.world_size, found.data_parallel_size))


def test_servers_that_do_not_hold_the_weights_are_refused() -> None:
    """61 GiB of weights on a GPU of 40; before, the seconds of a step were those of a cache of one token."""
    with pytest.raises(ConfigError, match=r"rollout.tensor_parallel: 1 leaves 61.0 GiB .* \(rollout.tensor_parallel=2"):
        told("experiment=fipo_32b", "rollout.tensor_parallel=1", "hardware.memory_gib=40")
    told("experiment=fipo_32b", "rollout.tensor_parallel=2", "hardware.memory_gib=40")


def test_a_server_on_the_trainers_gpu_is_counted() -> None:
    """While it samples nothing of the trainer is on the GPU: 0.95 of 79.6 GiB do not fit into 74.6, and 0.9 do."""
    _, _, apart = told("experiment=fipo_7b", *ONE_NODE, "rollout.servers=1")
    assert apart.fits and apart.fullest.server == 0, "the control: the same trainer alone"
    config, model_config, found = told("experiment=fipo_7b", *SHARED, "rollout.gpu_memory_utilization=0.95")
    assert found.fullest.total == pytest.approx(0.95 * 79.6 * GIB, abs=2) and not found.fits
    assert told("experiment=fipo_7b", *SHARED, "rollout.gpu_memory_utilization=0.9")[2].fits
    (remedy,) = [text for text in remedies(config, model_config) if text.startswith("rollout.gpu_memory_utilization=")]
    share = remedy.split(":")[0]
    assert told("experiment=fipo_7b", *SHARED, share)[2].fits


def test_what_leaves_the_gpus_has_to_fit_into_the_hosts_memory() -> None:
    """By hand: 32B with TP 8 × PP 4 over 16 nodes of 8 has 4 replicas, so a rank has 2 + 12 / 4 bytes per parameter."""
    start = ["experiment=fipo_32b", "rollout=colocated", "cluster.trainer_nodes=16", "cluster.rollout_nodes=0"]
    _, model_config, found = told(*start)
    assert found.fits and found.world_size == 128
    ranks = 8 * max(stage.parameters for stage in found.stages) * (2 + 12 / 4)
    servers = 8 * parameter_counts(model_config)[0] * 2 / 4
    assert found.host_bytes == pytest.approx(ranks + servers, rel=1e-6)
    assert 160 * GIB < found.host_bytes < 170 * GIB
    # A server has the GPU to itself: beside the trainer's state it would not fit.
    _, _, most = told(*start, "rollout.gpu_memory_utilization=0.9")
    assert most.fullest.server + most.fullest.always > most.usable_bytes > most.fullest.total
    assert told(*start, "hardware.host_memory_gib=170")[2].fits
    assert told(*start, "hardware.host_memory_gib=null")[2].fits
    with pytest.raises(ConfigError, match=r"rollout.shared_gpu: a node's host has to hold 16\d GiB .* and has 160"):
        told(*start, "hardware.host_memory_gib=160")
    assert told("experiment=fipo_32b")[2].host_bytes == 0, "the control: nothing leaves GPUs that are not shared"


def test_recorded_choices_of_routers_have_to_fit_into_the_hosts_memory() -> None:
    """By hand: 512 × 16 sequences of 22,528 tokens, 48 layers, 8 experts of 2 bytes each, over two nodes."""
    start = ["experiment=fipo_30b_a3b", "algorithm.router_replay=trainer"]
    _, _, found = told(*start)
    assert found.routes_bytes == found.host_bytes == 512 * 16 * 22528 * 48 * 8 * 2 // 2
    assert told("experiment=fipo_30b_a3b")[2].host_bytes == 0, "the control"
    assert told(*start, "hardware.host_memory_gib=70")[2].fits
    with pytest.raises(ConfigError, match=r"algorithm.router_replay: a node's host has to hold 66 GiB .* has 60"):
        told(*start, "hardware.host_memory_gib=60")
    whole = 512 * 16 * 22528 * 48 * 8
    engines = told(start[0], "algorithm.router_replay=rollout")[2].routes_bytes
    # One byte for each choice: what the node's ranks read, and what the rollout process has of one step.
    assert engines == found.routes_bytes + whole // 2 + whole
    with pytest.raises(ConfigError, match=r"algorithm.router_replay: is trainer, and the model has no experts"):
        told("experiment=fipo_32b", "algorithm.router_replay=trainer")


def test_only_stages_on_a_servers_gpus_pay_for_it() -> None:
    """Two stages of four GPUs, and servers on the first four."""
    _, _, found = told("experiment=fipo_7b", *SHARED, "rollout.servers=4", "parallel.pipeline=2")
    assert [stage.server > 0 for stage in found.stages] == [True, False]


@pytest.mark.parametrize("gpus", [4, 8])
@pytest.mark.parametrize("hardware", ["h100", "h200", "a100", "gh200", "gb200"])
def test_the_7b_recipe_gets_a_command_for_one_node(gpus: int, hardware: str) -> None:
    """The overrides that preflight proposes pass the checks, fit well, and give the stated seconds."""
    start = ["experiment=fipo_7b", f"hardware={hardware}", f"cluster.gpus_per_node={gpus}"]
    config, model_config, _ = told(*start)
    proposal = one_node(config, model_config)
    assert proposal is not None
    overrides, expected = proposal
    again, _, found = told(*start, *overrides.split())
    assert found.fits and not found.tight
    assert (found.time, found.fullest) == (expected.time, expected.fullest)
    assert again.rollout.servers * again.rollout.tensor_parallel == gpus == found.world_size
    assert "trainer's GPUs, in turns" in servers_text(again)


def test_32b_gets_none_since_its_optimizer_alone_fills_a_node() -> None:
    config, model_config, _ = told("experiment=fipo_32b")
    assert one_node(config, model_config) is None


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["experiment=fipo_7b"], "4 rollout servers on 2 nodes of their own"),
        (["experiment=fipo_7b", *SHARED], "8 rollout servers on 8 of the trainer's GPUs, in turns"),
        (
            ["experiment=fipo_7b", *ONE_NODE, "rollout=colocated"],
            "2 rollout servers on the node of the trainer, in turns",
        ),
        (
            ["experiment=fipo_32b", "rollout=colocated", "cluster.trainer_nodes=16", "cluster.rollout_nodes=0"],
            "32 rollout servers on all nodes of the trainer, in turns",
        ),
        (["experiment=fipo_7b", *ONE_NODE, "rollout.servers=2"], "2 rollout servers beside the trainer"),
        (["experiment=fipo_7b", *ONE_NODE, "rollout.addresses=[http://a:80]"], "1 rollout server that already runs"),
    ],
)
def test_servers_are_said_to_be_where_they_are(overrides: list[str], text: str) -> None:
    """The text never says "on 0 nodes"."""
    assert servers_text(load_config(overrides)) == text


def test_tensor_parallelism_across_nodes_is_told_with_its_price() -> None:
    """32B with TP 8 on nodes of four, and the layout that is proposed, which has no such note and takes less time."""
    start = ["experiment=fipo_32b", "cluster.gpus_per_node=4", "cluster.trainer_nodes=16", "cluster.rollout_nodes=16"]
    (note,) = notes_of(*start)
    config, model_config, found = told(*start)
    assert "8 ranks are on 2 nodes of 4 GPUs" in note and f"log-probs take {found.time.log_probs:,.0f} s" in note
    mend = next(text for text in remedies(config, model_config) if "parallel.tensor=4" in text)
    mended = [*start, *mend.split(":")[0].split()]
    assert notes_of(*mended) == []
    _, _, better = told(*mended)
    assert better.fits and better.time.log_probs < found.time.log_probs / 2


def test_idle_gpus_and_servers_without_gpus_are_told() -> None:
    (idle,) = notes_of("experiment=fipo_7b", *SHARED, "rollout.servers=1")
    assert "1 of 8 trainer GPUs sample" in idle and "rollout.servers=8 samples on 8" in idle
    (far,) = notes_of("experiment=fipo_7b", *SHARED, "cluster.trainer_nodes=2")
    assert "8 of 16 trainer GPUs sample" in far and "rollout.servers=0 has the job start servers on every node" in far
    six = [
        "hardware.gpus_per_node=null",
        "cluster.gpus_per_node=6",
        "cluster.trainer_nodes=2",
        "cluster.rollout_nodes=0",
    ]
    (odd,) = notes_of("experiment=fipo_7b", *six, "rollout=colocated")
    assert "2 of a node's 6 GPUs do not sample" in odd
    (none,) = notes_of("experiment=fipo_7b", *ONE_NODE, "rollout.servers=2")
    assert "beside the trainer's 8, but a node has 8" in none
    assert notes_of("experiment=fipo_7b", *SHARED) == [], "the control"


def test_a_node_of_four_is_not_taken_for_one_of_eight() -> None:
    (note,) = notes_of("experiment=fipo_7b", "hardware=gh200")
    assert "GH200-96GB have 4 GPUs" in note and "cluster.gpus_per_node=4" in note
    assert notes_of("experiment=fipo_7b", "hardware=gh200", "cluster.gpus_per_node=4") == []


@pytest.mark.parametrize(
    ("overrides", "key", "mend"),
    [
        ([*SHARED, "rollout.servers=9"], "rollout.servers", "rollout.servers=8"),
        ([*SHARED, "rollout.tensor_parallel=16"], "rollout.servers", "rollout.tensor_parallel=8"),
        (["rollout.tensor_parallel=4", "cluster.gpus_per_node=2"], "rollout.tensor_parallel", "=2 or fewer"),
        (ONE_NODE, "rollout.addresses", "rollout.shared_gpu=true"),
        (["hardware=a100", "model.fp8=tensorwise"], "model.fp8", "model.fp8=off"),
    ],
)
def test_what_has_no_gpus_or_no_fp8_is_refused(overrides: list[str], key: str, mend: str) -> None:
    with pytest.raises(ConfigError) as refused:
        told("experiment=fipo_7b", *overrides)
    assert str(refused.value).startswith(f"{key}: ") and mend in str(refused.value)


def test_the_commands_of_the_cluster_page_fit() -> None:
    """Those for nodes of four GPUs, for all GPUs in turns, and for one node, on an H100, as the page says."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    slurm/(\w+)\.sh((?: +\S+=\S+){3,})", page, re.MULTILINE)
    assert [experiment for experiment, _ in commands] == ["fipo_32b", "fipo_32b", "fipo_7b"]
    for (experiment, overrides), gpus in zip(commands, (4, 8, 8), strict=True):
        start = [f"experiment={experiment}", f"cluster.gpus_per_node={gpus}", *overrides.split()]
        assert told(*start)[2].fits and notes_of(*start) == []
    proposed = one_node(*told("experiment=fipo_7b")[:2])
    assert proposed is not None and proposed[0].split() == commands[2][1].split()
