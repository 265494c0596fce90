"""Who sends which tensor in a weight update, in which bucket, and in which order. Imports no torch.

The plan is a function of the parameter table and the layout: every rank works it out for itself, and nobody sends it.
The ranks that hold the same parameters in parts are a *sender's group*: they gather each bucket together, and the first
of them sends it. The tensor-parallel ranks of each pipeline stage are one, in the first replica. The experts of each
expert-parallel rank are another, in the first replica of those: they leave from a rank that owns them. A rank may be in
one of both.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import Parameter
from megatron_fipo.weights.plan import plan


@dataclass(frozen=True)
class PlannedBucket:
    """Parameters that are gathered by one collective, and whose Hugging Face tensors are sent together."""

    parameters: tuple[Parameter, ...]

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and full shapes, in the order in which they are sent."""
        for parameter in self.parameters:
            yield from zip(parameter.names, parameter.shapes, strict=True)


@dataclass(frozen=True)
class SenderGroup:
    """The ranks that hold the same parameters in parts, and what is sent of them."""

    number: int
    """Its turn in the update."""
    stage: int
    """The pipeline stage of its ranks."""
    expert_rank: int | None
    """The expert-parallel rank of its ranks, whose experts it sends; None: what all ranks of the stage hold."""
    ranks: tuple[int, ...]
    """By tensor-parallel rank, or the experts' own. The first one sends."""
    buckets: tuple[PlannedBucket, ...]


@dataclass(frozen=True)
class TransferPlan:
    """A whole weight update: groups take their turns in order."""

    groups: tuple[SenderGroup, ...]


def transfer_plan(
    model_config: ModelConfig,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    virtual_pipeline_parallel_size: int | None = None,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
    replicas: int = 1,
    bytes_per_value: int = 2,
    bucket_bytes: int = 512 << 20,
) -> TransferPlan:
    """The plan of a layout. `replicas` is the data-parallel times the context-parallel size.

    Buckets have at most `bucket_bytes`; a larger parameter has one of its own. Raises ConfigError for a layout that
    does not divide the model.
    """
    places = plan(
        model_config,
        tensor_parallel_size,
        pipeline_parallel_size,
        virtual_pipeline_parallel_size,
        expert_parallel_size=expert_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
    )
    # The same ranks hold experts and the rest in parts: they are one group.
    together = expert_parallel_size == 1 and expert_tensor_parallel_size == tensor_parallel_size
    owned: dict[tuple[int, int | None], list[Parameter]] = {
        (stage, None): [] for stage in range(pipeline_parallel_size)
    }
    for place in places:
        if place.parameter.exported:
            key = place.stage, None if together else place.expert_rank
            owned.setdefault(key, []).append(place.parameter)
    groups = []
    for number, ((stage, expert_rank), held) in enumerate(sorted(owned.items(), key=lambda item: _turn(*item[0]))):
        first, size = stage * tensor_parallel_size * replicas, tensor_parallel_size
        if expert_rank is not None:
            size = expert_tensor_parallel_size
            first += expert_rank * size
        sizes = [sum(map(math.prod, parameter.shapes)) * bytes_per_value for parameter in held]
        buckets = tuple(PlannedBucket(tuple(held[start:end])) for start, end in cut_by_size(sizes, bucket_bytes))
        groups.append(SenderGroup(number, stage, expert_rank, tuple(range(first, first + size)), buckets))
    return TransferPlan(tuple(groups))


def _turn(stage: int, expert_rank: int | None) -> tuple[int, int]:
    """By stage, and within one the experts last."""
    return stage, -1 if expert_rank is None else expert_rank


def cut_by_size(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Neighbours together up to `limit`, as (start, end); what is larger is alone."""
    cuts: list[tuple[int, int]] = []
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            cuts.append((start, index))
            start, total = index, 0
        total += size
    return [*cuts, (start, len(sizes))] if sizes else []


@dataclass(frozen=True)
class PlannedTransfer:
    """One tensor of a live weight update."""

    name: str
    """Hugging Face name."""
    nbytes: int
    sources: tuple[int, ...]
    """Trainer ranks that hold a part each; the first one sends the whole."""
    destinations: tuple[str, ...]
    """Engine workers that receive it, as server.worker."""
    keepers: tuple[str, ...]
    """Those of them that put it, or a part, into their layers. An expert has one per server with expert parallelism."""
    needed: int
    """Bytes of it that each keeper puts into its layers; what workers receive beyond that they drop."""


def plan_transfers(
    plan: TransferPlan,
    *,
    servers: int = 1,
    server_tensor_parallel_size: int = 1,
    server_experts: int | None = None,
    bytes_per_value: int = 2,
) -> list[PlannedTransfer]:
    """Every tensor of a plan, in the order in which they are sent, with the workers that it goes to.

    `server_experts` is the number of experts of a layer if servers deal them to their workers, as vLLM does with expert
    parallelism: neighbours together. None: each worker has a part of every expert.
    """
    size = server_tensor_parallel_size
    workers = tuple(f"{server}.{worker}" for server in range(servers) for worker in range(size))
    transfers = []
    for group, parameter in _in_order(plan):
        sources = group.ranks if parameter.cut is not None else group.ranks[:1]
        keepers, parts = workers, size if parameter.cut is not None else 1
        if server_experts is not None and parameter.expert is not None:
            owner = expert_owner(parameter.expert, server_experts, size)
            keepers, parts = tuple(f"{server}.{owner}" for server in range(servers)), 1
        for name, shape in zip(parameter.names, parameter.shapes, strict=True):
            nbytes = math.prod(shape) * bytes_per_value
            transfers.append(PlannedTransfer(name, nbytes, sources, workers, keepers, -(-nbytes // parts)))
    return transfers


def expert_owner(expert: int, experts: int, workers: int) -> int:
    """The worker of a server that has an expert: neighbours are together, and the first workers may have one more."""
    share, more = divmod(experts, workers)
    first = more * (share + 1)
    return expert // (share + 1) if expert < first else more + (expert - first) // share


def format_transfers(transfers: Iterable[PlannedTransfer]) -> Iterator[str]:
    """A line per tensor, and the sums of bytes by rank."""
    sent: dict[int, int] = {}
    gathered: dict[int, int] = {}
    needed: dict[str, int] = {}
    total = 0
    for transfer in transfers:
        sources, destinations = ",".join(map(str, transfer.sources)), ",".join(transfer.destinations)
        kept = "" if transfer.keepers == transfer.destinations else f", kept by {','.join(transfer.keepers)}"
        yield f"{transfer.name}  {transfer.nbytes} bytes  ranks {sources}  ->  workers {destinations}{kept}"
        sent[transfer.sources[0]] = sent.get(transfer.sources[0], 0) + transfer.nbytes
        for rank in transfer.sources:
            part = transfer.nbytes // len(transfer.sources)
            gathered[rank] = gathered.get(rank, 0) + transfer.nbytes - part
        total += transfer.nbytes
        for worker in transfer.keepers:
            needed[worker] = needed.get(worker, 0) + transfer.needed
    for rank, nbytes in gathered.items():
        yield f"rank {rank}: gathers {nbytes} bytes, sends {sent.get(rank, 0)} bytes"
    low, high = min(needed.values(), default=0), max(needed.values(), default=0)
    yield f"each worker: receives {total} bytes, needs {high if low == high else f'{low} to {high}'}"


def _in_order(plan: TransferPlan) -> Iterator[tuple[SenderGroup, Parameter]]:
    for group in plan.groups:
        for bucket in group.buckets:
            for parameter in bucket.parameters:
                yield group, parameter
