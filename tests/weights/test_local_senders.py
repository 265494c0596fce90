"""Why: in a job of several nodes a sender reaches only the engines beside it; one that is served by nobody, or told of
another GPU's memory, samples from old weights or crashes.

Who serves whom, with made-up places; what travels is real. Real engines on two nodes are in tests/slurm, memory of GPUs
in tests/gpu.
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from megatron_fipo.errors import RolloutError
from megatron_fipo.weights.bucket_layout import BucketLayout
from megatron_fipo.weights.buckets import Bucket
from megatron_fipo.weights.everywhere import sending_ranks
from megatron_fipo.weights.local_senders import Senders, joined_address, joined_header, memory_of
from megatron_fipo.weights.transport_records import (
    BucketFile,
    BucketHeader,
    BucketMemory,
    CudaHandle,
    CudaIpcAddress,
    SharedMemoryAddress,
    WorkerPlace,
)
from tests.distributed import run_ranks
from tests.rollout.engines import save_tiny_model
from tests.weights.models import by_stored_names

LAYOUT = BucketLayout(("a",), ((2,),), ("float32",))


def gpu(node: int, index: int) -> WorkerPlace:
    return WorkerPlace(f"node{node}", f"GPU-{node}{index}")


RANKS = tuple(gpu(node, index) for node in range(2) for index in range(4))
"""Two nodes of four GPUs."""


def header(number: int) -> BucketHeader:
    handle = CudaHandle(b"m", number, 0, b"f", 0, b"e", True)
    return BucketHeader(LAYOUT, BucketMemory({RANKS[number].gpu or "": handle}))


def test_each_gpu_has_a_sender_that_serves_the_worker_on_it() -> None:
    numbers = sending_ranks(RANKS)
    assert numbers == {rank: rank for rank in range(8)}
    senders = Senders(8, RANKS)
    # Servers of two workers on all of node 0, and on half of node 1.
    servers = [RANKS[0:2], RANKS[2:4], RANKS[4:6]]
    (turn,) = senders.turns
    found = senders.of_servers(turn, servers)
    assert found == [(0, 1), (2, 3), (4, 5)], "6 and 7 serve nobody"
    address = joined_address([CudaIpcAddress((RANKS[number].gpu or "",)) for number in found[1]])
    assert address == CudaIpcAddress(("GPU-02", "GPU-03"))
    joined = joined_header([header(number) for number in range(6)])
    assert isinstance(joined.place, BucketMemory) and len(joined.place.handles) == 6
    for server, numbers_of_server in zip(servers, found, strict=True):
        own = memory_of(joined, joined.place, server).place
        assert isinstance(own, BucketMemory)
        assert {uuid: handle.size for uuid, handle in own.handles.items()} == {
            RANKS[number].gpu: number for number in numbers_of_server
        }


def test_each_machine_has_one_sender_for_files() -> None:
    """GPUs of the engines do not matter then, and ranks of a machine need not be neighbours."""
    places = tuple(WorkerPlace(f"node{node}") for node in (1, 0, 1, 0))
    assert sending_ranks(places) == {0: 0, 1: 1}
    senders = Senders(2, (places[0], places[1]))
    assert senders.of_servers((0, 1), [RANKS[0:2], RANKS[4:8]]) == [(1,), (0,)]
    assert joined_address([SharedMemoryAddress("run:0", "/dev/shm/x")]).directory == "/dev/shm/x"
    one = BucketHeader(LAYOUT, BucketFile("run:0"))
    assert joined_header([one, one]) == one


def test_without_places_each_sender_has_its_turn_with_every_server() -> None:
    senders = Senders(2)
    assert senders.turns == [(0,), (1,)]
    assert senders.of_servers((1,), [RANKS[0:2], RANKS[2:4]]) == [(1,), (1,)]


@pytest.mark.parametrize("places", [RANKS[:7], tuple(WorkerPlace("node0") for _ in range(2))])
def test_an_engine_that_nobody_is_beside_is_refused_by_its_place(places: tuple[WorkerPlace, ...]) -> None:
    with pytest.raises(RolloutError, match=r"no process of the trainer is where .*node1; the trainer has .*node0"):
        Senders(len(places), places).of_servers(range(len(places)), [RANKS[0:2], RANKS[6:8]])


def test_senders_that_differ_in_a_bucket_are_refused() -> None:
    other = msgspec.structs.replace(header(1), checksums=(1,))
    with pytest.raises(RolloutError, match="have different ones"):
        joined_header([header(0), other])


EXPERTS = {"kind": "Qwen3Moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "settings"),
    [
        ({"tensor": 2, "pipeline": 2}, {}),
        ({"tensor": 1, "pipeline": 2}, {}),
        ({"tensor": 2, "pipeline": 1}, {}),
        ({"pipeline": 2, "expert": 2}, EXPERTS),
        ({"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}, EXPERTS),
    ],
    ids=["tp2-pp2", "pp2-dp2", "tp2-dp2", "pp2-ep2", "tp2-ep2-etp2"],
)
def test_every_rank_gathers_the_whole_model(parallel: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    """Of every stage and all experts, in the same buckets on every rank: checksums are those of transformers' own."""
    model = save_tiny_model(tmp_path / "model", seed=3, **settings)
    arguments = {"model_dir": str(tmp_path / "model"), "parallel": parallel}
    by_rank = run_ranks("tests.weights.whole_ranks:gather", 4, arguments)
    named = by_stored_names(settings.get("kind", "Qwen2"), model.state_dict().items())
    expected = dict(zip(named, Bucket(list(named.items())).checksums(), strict=True))
    assert all(dict(pair for bucket in rank for pair in bucket) == expected for rank in by_rank)
    assert all(rank == by_rank[0] for rank in by_rank) and len(by_rank[0]) > 4, "the same buckets, and several"
    assert torch.is_tensor(named["lm_head.weight"]), "the control: the last stage has tensors of its own"
