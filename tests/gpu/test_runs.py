"""Trainer and engine on GPUs together: one GPU shared in turns, and two joined by NCCL.

The tiny random models and the embedded one; what sleeping frees is measured by the driver, from outside of the engine.
Not covered: several nodes.
"""

import asyncio
from pathlib import Path

import numpy
import pytest
import torch

from megatron_fipo.engines.control import EngineControl
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.records.routes import route_format
from megatron_fipo.records.streams import ROUTED_EXPERTS
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.weights.deadline import Deadline
from tests.end_to_end import runs
from tests.policy.plain_routers import routed_experts
from tests.rollout.engines import CACHED_PROMPT, generate, problems, rollout_config, sampling, save_tiny_model

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


@pytest.mark.usefixtures("triton")
def test_an_engines_choices_of_experts_are_those_of_transformers(tmp_path: Path) -> None:
    """Of prompts, from the cache the second time, and of responses in parts. The control is the token after each."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    model = save_tiny_model(tmp_path / "model", seed=0, kind="Qwen3Moe", **sizes)
    form = route_format(read_architecture(tmp_path / "model").experts)
    assert form is not None
    config = rollout_config(gpu_memory_utilization=SHARE, stream_tokens=4)
    with EnginePool(config, tmp_path / "model", tmp_path / "run", seed=0, returns_routes=True) as pool:
        pool.start()
        pool.wait_ready()
        with EngineGenerator(pool) as client:
            asked = problems(2, length=CACHED_PROMPT), 3, sampling(routes=form)
            groups = [*generate(client, *asked, [1, 2]), *generate(client, *asked, [3, 4])]
    for group in groups:
        for sample in group.samples:
            ids = torch.from_numpy(numpy.concatenate([group.problem.token_ids, sample.token_ids])).long()
            expected = form.unpacked(routed_experts(model, [ids]).numpy())[:-1]
            found = form.unpacked(sample.streams[ROUTED_EXPERTS])[:-1]
            same = (numpy.sort(found) == numpy.sort(expected)).all(-1)
            assert same.mean() > 0.98, "fp32 twice, in other orders"
            assert (numpy.sort(found[1:]) == numpy.sort(expected[:-1])).all(-1).mean() < 0.5


@pytest.mark.usefixtures("triton")
def test_a_run_replays_its_engines_choices(tmp_path: Path) -> None:
    layout = ("parallel=single", "parallel.expert=1", "model.layers=local", "rollout=shared_gpu")
    settings = ("algorithm.router_replay=rollout", f"rollout.gpu_memory_utilization={SHARE}", "checkpoint.every=1")
    precision = ("model.dtype=bfloat16", "rollout.dtype=bfloat16")
    runs.run(tmp_path, "experiment=tiny_moe", *runs.SMALL, *layout, *settings, *precision, timeout_s=600)
    for row in runs.rows(tmp_path):
        assert row["ppo_kl_first"] == 0 and row["log_prob_diff_mean"] < 0.1
        assert 0 <= row["router_mismatch"] < 0.2, "bf16 twice; other tokens' choices would be most of them"


@pytest.mark.usefixtures("two_gpus")
def test_a_run_on_two_gpus_with_weights_over_nccl(tmp_path: Path) -> None:
    overrides = (*runs.SMALL, *BFLOAT16, "rollout.weight_transfer=process_group", "rollout.checksum_every=1")
    runs.run(tmp_path, *overrides, timeout_s=600)
    assert all(row["log_prob_diff_mean"] < 0.1 for row in runs.rows(tmp_path))
