"""Why: every rank works the plan of a weight update out for itself, and ranks whose plans differ wait for each other in
gathers that never match. What it leaves out no engine gets.

The plan alone, of published models; that Megatron-Core lies as it says is test_reshard.py.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.models.parameters import parameters
from megatron_fipo.weights.transfer_plan import TransferPlan, cut_by_size, expert_owner, plan_transfers, transfer_plan
from tests.config.published import GEMMA_7B, LLAMA_31_8B, QWEN3_30B_A3B, QWEN25_32B

BUCKET_BYTES = 512 << 20


def read(directory: Path, config: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return read_architecture(directory)


def bucket_sizes(plan: TransferPlan) -> list[tuple[int, int]]:
    """Bytes in bfloat16 and parameters of each bucket."""
    buckets = [bucket for group in plan.groups for bucket in group.buckets]
    return [(sum(2 * math.prod(shape) for _, shape in bucket.tensors), len(bucket.parameters)) for bucket in buckets]


@pytest.mark.parametrize("config", [QWEN25_32B, LLAMA_31_8B, GEMMA_7B], ids=["qwen2.5", "llama", "gemma"])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, None), (2, None), (2, 2)])
def test_every_tensor_is_sent_once_in_buckets_of_bounded_size(
    tmp_path: Path, config: dict[str, Any], pipeline: int, virtual: int | None
) -> None:
    model_config = read(tmp_path, config | {"num_hidden_layers": 8})
    layout: dict[str, Any] = {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": pipeline,
        "virtual_pipeline_parallel_size": virtual,
        "replicas": 3,
    }
    plan = transfer_plan(model_config, **layout, bucket_bytes=BUCKET_BYTES)
    sent = [pair for group in plan.groups for bucket in group.buckets for pair in bucket.tensors]
    table = [entry for entry in parameters(model_config).values() if entry.exported]
    expected = {name: shape for entry in table for name, shape in zip(entry.names, entry.shapes, strict=True)}
    assert len(sent) == len(expected) and dict(sent) == expected
    assert all(size <= BUCKET_BYTES or count == 1 for size, count in bucket_sizes(plan))
    # As full as they can be: no bucket has room for its neighbour's first parameter, within a group.
    for group in plan.groups:
        for one, other in zip(group.buckets, group.buckets[1:], strict=False):
            first = dataclasses.replace(other, parameters=other.parameters[:1])
            both = [*one.tensors, *first.tensors]
            assert sum(2 * math.prod(shape) for _, shape in both) > BUCKET_BYTES
    # Groups are the first replica of each stage: 4 ranks out of 12.
    assert [group.ranks for group in plan.groups] == [
        tuple(range(12 * stage, 12 * stage + 4)) for stage in range(pipeline)
    ]
    assert plan == transfer_plan(read(tmp_path, config | {"num_hidden_layers": 8}), **layout, bucket_bytes=BUCKET_BYTES)


def test_each_expert_leaves_its_owner_and_stays_with_one_worker_of_a_server(tmp_path: Path) -> None:
    """EP 4 on the trainer's side. On the engines' side whole experts or parts of each: as many bytes either way."""
    model_config = read(tmp_path, QWEN3_30B_A3B | {"num_hidden_layers": 2})
    plan = transfer_plan(model_config, tensor_parallel_size=2, replicas=2, expert_parallel_size=4)
    cut = plan_transfers(plan, servers=2, server_tensor_parallel_size=2)
    dealt = plan_transfers(plan, servers=2, server_tensor_parallel_size=2, server_experts=128)
    expert = "model.layers.1.mlp.experts.{}.up_proj.weight"
    by_name = {transfer.name: transfer for transfer in dealt}
    assert [by_name[expert.format(number)].sources for number in (0, 31, 32, 127)] == [(0,), (0,), (1,), (3,)]
    assert by_name[expert.format(63)].keepers == ("0.0", "1.0") and by_name[expert.format(64)].keepers == ("0.1", "1.1")
    assert by_name["model.layers.1.mlp.gate.weight"].keepers == ("0.0", "0.1", "1.0", "1.1")
    for worker in ("0.0", "1.1"):
        needed = [sum(transfer.needed for transfer in sent if worker in transfer.keepers) for sent in (cut, dealt)]
        assert needed[0] == needed[1] < sum(transfer.nbytes for transfer in dealt) * 0.51
    assert [expert_owner(number, 5, 2) for number in range(5)] == [0, 0, 0, 1, 1], "as vLLM deals them"


def test_what_is_printed_is_the_plan(tmp_path: Path) -> None:
    plan = transfer_plan(read(tmp_path, LLAMA_31_8B), tensor_parallel_size=2, pipeline_parallel_size=2)
    printed = plan_transfers(plan, servers=2, server_tensor_parallel_size=2)
    sent = [name for group in plan.groups for bucket in group.buckets for name, _ in bucket.tensors]
    assert [transfer.name for transfer in printed] == sent
    assert printed[0].sources == (0, 1) and printed[-1].sources == (2, 3)
    assert printed[0].destinations == ("0.0", "0.1", "1.0", "1.1")
    norm = next(transfer for transfer in printed if transfer.name == "model.norm.weight")
    assert norm.sources == (2,) and norm.needed == norm.nbytes, "it is not cut"


def test_nothing_is_cut_into_no_bucket() -> None:
    assert cut_by_size([], 10) == []
    assert cut_by_size([0, 0], 0) == [(0, 2)]
