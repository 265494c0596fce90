"""Weights on a GPU: memory shared between processes, FP8 engines, and checkpoints between the two kinds of layers.

Not covered: NCCL between several GPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from megatron_fipo.weights.cuda_ipc import device_uuid, share
from tests.distributed import ROOT, run_ranks
from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL
from tests.weights.models import SMALL_MODELS, write_model

pytestmark = pytest.mark.gpu

ONE_GPU = (
    *SMALL,
    "parallel.pipeline=1",
    "model.layers=local",
    "model.dtype=bfloat16",
    "rollout.dtype=bfloat16",
    "rollout.shared_gpu=true",
    "rollout.gpu_memory_utilization=0.3",
    "rollout.checksum_every=1",
)

OPEN_AND_SUM = """
import json, sys, torch
from megatron_fipo.weights.cuda_ipc import device_uuid, open_shared
from megatron_fipo.weights.transport_records import CudaHandle, from_wire
device = torch.device("cuda", 0)
shared = open_shared(from_wire(CudaHandle, json.loads(sys.stdin.read())), device)
print(json.dumps([device_uuid(device), shared.numel(), int(shared.long().sum())]))
"""


def test_another_process_reads_the_memory_behind_a_handle() -> None:
    """By the GPU's UUID, which is what the other process' number 0 is then."""
    values = torch.randint(256, (100_000,), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    uuid = device_uuid(values.device)
    result = subprocess.run(
        [sys.executable, "-c", OPEN_AND_SUM],
        input=json.dumps(msgspec.to_builtins(share(values.untyped_storage()))),
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": f"GPU-{uuid.removeprefix('GPU-')}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [uuid, 100_000, int(values.long().sum())]


@pytest.mark.usefixtures("vllm_on_gpu")
@pytest.mark.parametrize("transport", ["cuda_ipc", "shared_memory"])
def test_a_run_on_one_gpu(transport: str, tmp_path: Path) -> None:
    """Checksums compare every tensor on both sides; log-probs differ by bfloat16's rounding."""
    runs.run(tmp_path, *ONE_GPU, f"rollout.weight_transfer={transport}")
    assert all(0 < row["log_prob_diff_mean"] < 0.1 for row in runs.rows(tmp_path))


@pytest.mark.usefixtures("vllm_on_gpu")
@pytest.mark.parametrize("dealt", [True, False])
def test_engines_with_experts_on_two_gpus(dealt: bool, tmp_path: Path) -> None:
    """Whole experts on each, or a part of every expert: after updates their log-probs are the trainer's either way."""
    if torch.cuda.device_count() < 3:
        pytest.skip(
            f"needs three GPUs, one for the trainer and two for the server, and {torch.cuda.device_count()} is here"
        )
    layout = ["parallel.expert=1", "parallel.data=1", "model.layers=local", "rollout.tensor_parallel=2"]
    dtypes = ["model.dtype=bfloat16", "rollout.dtype=bfloat16"]
    server = [f"rollout.expert_parallel={str(dealt).lower()}", "rollout.weight_transfer=shared_memory"]
    runs.run(tmp_path, "experiment=tiny_moe", *SMALL, *layout, *dtypes, *server, "rollout.checksum_every=1")
    assert all(0 < row["log_prob_diff_mean"] < 0.1 for row in runs.rows(tmp_path))


@pytest.mark.usefixtures("vllm_on_gpu")
@pytest.mark.parametrize("quantization", ["fp8_per_channel", "fp8_per_tensor", "fp8_per_block"])
def test_a_run_with_an_engine_in_fp8(quantization: str, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"FP8 needs compute capability 8.9, this GPU has {torch.cuda.get_device_capability()}")
    transport = "rollout.weight_transfer=shared_memory"
    runs.run(tmp_path, *ONE_GPU, transport, f"rollout.quantization={quantization}")
    assert all(0 < row["log_prob_diff_mean"] < 0.3 for row in runs.rows(tmp_path))


@pytest.mark.usefixtures("transformer_engine")
def test_checkpoints_go_between_transformer_engine_and_local_layers(tmp_path: Path) -> None:
    model = write_model(next(model for model in SMALL_MODELS if model.name == "qwen3-untied"), tmp_path)
    arguments = {"model_dir": str(model), "directory": str(tmp_path / "checkpoints")}
    (seen,) = run_ranks("tests.policy.checkpoints:exchange_layers", 1, arguments, timeout=300)
    assert len(seen) == 4
    assert all(different == [] for different in seen.values()), seen
