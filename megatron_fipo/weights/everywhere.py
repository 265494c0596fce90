"""All buckets of a model whole on every rank, for senders that reach only the engines beside them.

A rank holds its pipeline stage in parts, and a share of the stage's experts. A bucket is gathered by the ranks that
hold parts of it. Experts go from there to the ranks of the stage that hold other experts. Then the bucket goes to the
other stages, down each pipeline.
"""

import socket

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo.config import RolloutConfig
from megatron_fipo.weights.bucket_layout import BucketLayout
from megatron_fipo.weights.buckets import Bucket, unpack
from megatron_fipo.weights.cuda_ipc import device_uuid
from megatron_fipo.weights.dtypes import dtype_name
from megatron_fipo.weights.gather import HeldWeights, expert_ranks
from megatron_fipo.weights.reshard import gather_texts
from megatron_fipo.weights.transfer_plan import SenderGroup
from megatron_fipo.weights.transport_records import WorkerPlace


class WholeModel:
    """The buckets of every sender's group, one group after the other, as weights of a sender."""

    def __init__(self, held: HeldWeights, device: torch.device):
        """`device` is where the ranks gather: this rank's."""
        self._held, self._device = held, device
        self._places = [
            (group, index, planned) for group in held.plan.groups for index, planned in enumerate(group.buckets)
        ]

    @property
    def buckets(self) -> int:
        """How many there are, of all groups."""
        return len(self._places)

    def gather(self, index: int) -> Bucket:
        """One of them, whole. Collective over all ranks, each bucket once and in order."""
        group, place, planned = self._places[index]
        part = next((part for part in self._held.parts if part.group.number == group.number), None)
        bucket = part.gather(place) if part is not None else None
        steps = [step for step in _way(group) if step[0].size() > 1]
        if not steps:
            assert bucket is not None
            return bucket
        names, shapes = zip(*planned.tensors, strict=True)
        layout = BucketLayout(names, shapes, (dtype_name(self._held.dtype),) * len(names))
        if bucket is not None:
            packed = bucket.pack()
        else:
            packed = torch.empty(layout.packed_bytes(), dtype=torch.uint8, device=self._device)
        for ranks, source in steps:
            dist.broadcast(packed, src=dist.get_global_rank(ranks, source), group=ranks)
        return Bucket(list(unpack(packed, layout)))


def _way(group: SenderGroup) -> list[tuple[dist.ProcessGroup, int]]:
    """How a bucket of `group` comes from the ranks that hold it to this one: broadcasts, and which rank's of each."""
    steps = [(parallel_state.get_pipeline_model_parallel_group(), group.stage)]
    if group.expert_rank is not None and parallel_state.get_pipeline_model_parallel_rank() == group.stage:
        steps.insert(0, (expert_ranks()[0], group.expert_rank))
    return steps


def places_of_ranks(rollout: RolloutConfig, device: torch.device) -> tuple[WorkerPlace, ...]:
    """Where every rank runs, as rollout.weight_transfer tells engines apart: by machine, or by GPU. Collective."""
    gpu = device_uuid(device) if rollout.weight_transfer == "cuda_ipc" else None
    mine = msgspec.json.encode(WorkerPlace(socket.gethostname(), gpu)).decode()
    texts = gather_texts(mine, torch.device("cpu"))
    return tuple(msgspec.json.decode(text, type=WorkerPlace) for text in texts)


def sending_ranks(places: tuple[WorkerPlace, ...]) -> dict[int, int]:
    """Numbers of the senders by rank: the first rank at each place sends for it."""
    return {rank: number for number, rank in enumerate(places.index(place) for place in dict.fromkeys(places))}
