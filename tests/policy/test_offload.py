"""Why: what is moved to host memory and back between updates must be the same bits, with every view of it intact; a
view that is left behind trains on freed memory, and a moment that is lost shows only as a worse curve.

Real Megatron-Core buffers and optimizers, moved between two places of a CPU's memory by the code that moves them on a
GPU. Not covered: streams, page-locked memory and how much a GPU gets back (tests/gpu).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.errors import ConfigError
from megatron_fipo.policy.host_memory import own_memory, reserve
from tests.distributed import run_ranks
from tests.weights.models import SmallModel, write_model

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fp32, plain optimizer": (1, {"dtype": "float32", "layers": "local"}, {"distributed_optimizer": False}),
    "fp32 without master weights, distributed": (2, {"dtype": "float32", "layers": "local"}, {}),
    "bf16, gathered with overlap": (
        2,
        {"dtype": "bfloat16", "layers": "local"},
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "bf16, plain optimizer, pipeline": (
        2,
        {"dtype": "bfloat16", "layers": "local"},
        {"pipeline": 2, "distributed_optimizer": False},
    ),
    "bf16, experts over ranks, and on the last pipeline stage alone": (
        4,
        {"dtype": "bfloat16", "layers": "local"},
        {"pipeline": 2, "expert": 2},
    ),
}
DENSE_FIRST = SmallModel(
    "dense-first",
    "Qwen3Moe",
    heads=4,
    groups=2,
    vocab=61,
    tied=False,
    extra={
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0, 1],
        "max_position_embeddings": 128,
    },
)
"""The first of two pipeline stages has an optimizer for experts, without any."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "experts" in name else name for name in LAYOUTS]
)
def test_training_is_bitwise_the_same(name: str, tmp_path: Path) -> None:
    ranks, model, parallel = LAYOUTS[name]
    arguments = {"model": model, "parallel": parallel, "directory": str(tmp_path)}
    if "experts" in name:
        arguments["model_dir"] = str(write_model(DENSE_FIRST, tmp_path))
    for found in run_ranks("tests.policy.offload_ranks:train", ranks, arguments):
        freed = found["freed"]
        assert freed["gradients before"] > 0 == freed["gradients"]
        assert freed["weights"] == 0
        if "plain" not in name:
            assert freed["weights before"] > 0, "the control"
        stays, leaves = found["stays"], found["leaves"]
        states = [update["state"] for update in stays["updates"]]
        assert states[0] != states[1] != states[2], "the control: updates change the state"
        assert leaves["updates"] == stays["updates"]
        # Read and saved where it is, in host memory.
        assert leaves["at the end"] == stays["at the end"]
        assert leaves["saved"] == stays["saved"] == stays["at the end"]


def test_more_than_is_free_is_refused_before_it_is_touched() -> None:
    with pytest.raises(ConfigError, match=r"rollout.shared_gpu: 1048576.0 GiB of weights .* have to be in host memory"):
        reserve(1 << 50)


def test_what_a_forked_process_could_not_read_is_copied() -> None:
    """A child that touched it would be killed."""
    reserved = reserve(4096)
    reserved.fill_(7)
    part = reserved[512:1024].view(torch.float32)
    assert own_memory(part).data_ptr() != part.data_ptr() and torch.equal(own_memory(part), part)
    ordinary = torch.zeros(4)
    assert own_memory(ordinary) is ordinary, "the control"
