"""Trainer and engine on GPUs together: one GPU shared in turns, and two joined by NCCL.

The tiny random models and the embedded one; what sleeping frees is measured by the driver, from outside of the engine.
Not covered: several nodes.
"""

import asyncio
from pathlib import Path

import pytest
import torch

from megatron_fipo.engines.control import EngineControl
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.weights.deadline import Deadline
from tests.end_to_end import runs
from tests.rollout.engines import generate, problems, rollout_config, sampling, save_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("vllm_on_gpu")]

SHARE = 0.3
BFLOAT16 = ("parallel=single", "model.layers=local", "model.dtype=bfloat16", "rollout.dtype=bfloat16")


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def test_a_sleeping_server_frees_its_memory_and_samples_alike_when_awake(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", seed=0)
    config = rollout_config(
        dtype="bfloat16", shared_gpu=True, weight_transfer="shared_memory", gpu_memory_utilization=SHARE
    )

    async def wake(control: EngineControl) -> None:
        await control.pause(Deadline(60))
        await control.resume(Deadline(60))

    with EnginePool(config, tmp_path / "model", tmp_path / "run", seed=0) as pool:
        pool.start()
        pool.wait_ready()
        with EngineGenerator(pool) as client:
            before = generate(client, problems(2), 1, sampling(), [1, 2])
            awake = free_bytes()
            asyncio.run(client.control.sleep(Deadline(60)))
            asleep = free_bytes()
            asyncio.run(wake(client.control))
            after = generate(client, problems(2), 1, sampling(), [1, 2])
            woken = free_bytes()
    total = torch.cuda.mem_get_info()[1]
    assert asleep - awake > 0.8 * SHARE * total, "nearly all of its share is KV cache, for so small a model"
    assert abs(woken - awake) < 0.02 * total
    assert [group.samples[0].token_ids.tolist() for group in after] == [
        group.samples[0].token_ids.tolist() for group in before
    ]


@pytest.mark.usefixtures("transformer_engine")
def test_a_run_on_one_gpu_with_transformer_engine(tmp_path: Path) -> None:
    """Packed, as is the default there; the local layers' is in test_weights.py."""
    overrides = (*runs.SMALL, *BFLOAT16, "rollout=shared_gpu", f"rollout.gpu_memory_utilization={SHARE}")
    output = runs.run(tmp_path, *overrides, "model.layers=transformer_engine", timeout_s=600)
    assert "layers: Transformer Engine" in output, "what computes is named at start"
    rows = runs.rows(tmp_path)
    assert [row["ppo_kl_first"] for row in rows] == [0.0, 0.0]
    assert all(row["log_prob_diff_mean"] < 0.1 for row in rows), "bf16 twice, in other orders, and no stale weights"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("layout", "servers"),
    [
        ("parallel.pipeline=2", "rollout.servers=2"),
        ("parallel.tensor=2 parallel.pipeline=1", "rollout.servers=1 rollout.tensor_parallel=2"),
        ("parallel.data=2 parallel.pipeline=1", "rollout.servers=1"),
    ],
    ids=["two stages, two servers", "one server on both", "one GPU without a server"],
)
def test_a_run_in_turns_on_two_gpus_with_weights_over_cuda_ipc(layout: str, servers: str, tmp_path: Path) -> None:
    """Each engine worker gets the whole model from the rank on its GPU; checksums and probe compare it."""
    shared = ("rollout=shared_gpu", "rollout.weight_transfer=cuda_ipc", f"rollout.gpu_memory_utilization={SHARE}")
    precision = ("model.layers=local", "model.dtype=bfloat16", "rollout.dtype=bfloat16", "rollout.checksum_every=1")
    overrides = (*runs.SMALL, *shared, *precision, *layout.split(), *servers.split(), "checkpoint.every=1")
    runs.run(tmp_path, *overrides, timeout_s=600)
    rows = runs.rows(tmp_path)
    assert all(row["weights_checked"] > 20 and row["log_prob_diff_mean"] < 0.1 for row in rows)
    assert all(row["probe_diff_max"] < 0.3 for row in rows)


@pytest.mark.usefixtures("two_gpus")
def test_a_run_on_two_gpus_with_weights_over_nccl(tmp_path: Path) -> None:
    overrides = (*runs.SMALL, *BFLOAT16, "rollout.weight_transfer=process_group", "rollout.checksum_every=1")
    runs.run(tmp_path, *overrides, timeout_s=600)
    assert all(row["log_prob_diff_mean"] < 0.1 for row in runs.rows(tmp_path))
