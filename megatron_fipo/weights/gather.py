"""Buckets of whole Hugging Face tensors out of a Megatron-Core model in shards: one collective for each bucket."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_fipo.errors import WeightError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import Parameter, canonical_name, parameters
from megatron_fipo.models.rules import LAYER_PREFIX
from megatron_fipo.weights.away import readable
from megatron_fipo.weights.buckets import Bucket, unpack
from megatron_fipo.weights.huggingface import TensorInfo
from megatron_fipo.weights.layouts import merge
from megatron_fipo.weights.transfer_plan import PlannedBucket, SenderGroup, TransferPlan, transfer_plan


class HeldWeights:
    """This rank's shards of the model, and the plan by which they are gathered."""

    def __init__(self, model_chunks: Sequence[nn.Module], model_config: ModelConfig, bucket_bytes: int):
        """`model_chunks` are this stage's GPTModels, bare or wrapped, all of one type.

        Raises WeightError for a parameter that the plan does not know, or that it looks for here in vain.
        """
        held = dict(held_parameters(model_chunks))
        self.dtype = next(iter(held.values())).dtype
        self.plan = plan_here(model_config, self.dtype.itemsize, bucket_bytes)
        stage, expert_rank = parallel_state.get_pipeline_model_parallel_rank(), expert_ranks()[0].rank()
        self.parts = tuple(
            HeldPart(group, model_chunks)
            for group in self.plan.groups
            if group.stage == stage and group.expert_rank in (None, expert_rank)
        )
        """For each sender's group whose parameters this rank holds, in whichever replica; in the groups' order."""
        _check(held, [part.group for part in self.parts], model_config)

    @property
    def own(self) -> "tuple[HeldPart, ...]":
        """The parts of the groups that this rank is in itself, and not in a replica of."""
        return tuple(part for part in self.parts if part.is_in_group)

    def empty(self, planned: PlannedBucket) -> Bucket:
        """A bucket with no values yet, for one that another rank will send."""
        device = self.parts[0].device
        return Bucket([(name, torch.empty(shape, dtype=self.dtype, device=device)) for name, shape in planned.tensors])


class HeldPart:
    """This rank's shards of what one sender's group sends.

    Replicas of the group gather in the same way, each for itself.
    """

    def __init__(self, group: SenderGroup, model_chunks: Sequence[nn.Module]):
        self.group = group
        self._chunks = model_chunks

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return readable(next(self._chunks[0].parameters())).device

    @property
    def is_in_group(self) -> bool:
        """Whether this rank is one of the group itself, and not of a replica of it."""
        return dist.get_rank() in self.group.ranks

    @property
    def sends(self) -> bool:
        """Whether this rank is the group's sender."""
        return dist.get_rank() == self.group.ranks[0]

    @property
    def buckets(self) -> int:
        """Buckets of the group."""
        return len(self.group.buckets)

    def gather(self, index: int) -> Bucket:
        """The bucket `index`, whole, on the parameters' device and in their type.

        Collective over the ranks that hold parts with this one. The tensors may share memory with the model: use them
        before the next optimizer update.
        """
        planned = self.group.buckets[index]
        held = dict(held_parameters(self._chunks))
        mine = {entry.megatron: _plain(held[entry.megatron]) for entry in planned.parameters}
        shards = [mine]
        if len(self.group.ranks) > 1:
            cut = [(entry.megatron, mine[entry.megatron]) for entry in planned.parameters if entry.cut is not None]
            shards = _gather(cut, cut_over(planned.parameters[0]))
        tensors: list[tuple[str, Tensor]] = []
        for entry in planned.parameters:
            pieces = [mine] if entry.cut is None else shards
            whole = merge(entry, [piece[entry.megatron] for piece in pieces])
            tensors += zip(entry.names, whole, strict=True)
        return Bucket(tensors)


def plan_here(model_config: ModelConfig, bytes_per_value: int, bucket_bytes: int) -> TransferPlan:
    """The plan of the layout that this rank is part of."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    return transfer_plan(
        model_config,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        virtual_pipeline_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        expert_parallel_size=expert_ranks()[0].size(),
        expert_tensor_parallel_size=expert_ranks()[1].size(),
        replicas=dist.get_world_size() // (tensor * pipeline),
        bytes_per_value=bytes_per_value,
        bucket_bytes=bucket_bytes,
    )


def expert_ranks() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks that this one's layers' experts are dealt to, and those that each of its experts is cut over."""
    return parallel_state.get_expert_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group()


def cut_over(entry: Parameter) -> dist.ProcessGroup:
    """The ranks that hold parts of a parameter with this one, if tensor parallelism cuts it."""
    return expert_ranks()[1] if entry.expert is not None else parallel_state.get_tensor_model_parallel_group()


def held_parameters(model_chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters by the names of `models.parameters`."""
    rank = expert_ranks()[0].rank()
    for chunk in unwrap_model(list(model_chunks)):
        config = chunk.config
        first_expert = rank * ((config.num_moe_experts or 0) // config.expert_model_parallel_size)
        for name, parameter in chunk.named_parameters():
            layer = None
            if name.startswith(LAYER_PREFIX):
                index = int(name.removeprefix(LAYER_PREFIX).split(".", 1)[0])
                layer = chunk.decoder.layers[index].layer_number - 1  # Megatron-Core counts the whole model from 1
            yield canonical_name(name, layer, first_expert), parameter


def exported_tensors(model_chunks: Sequence[nn.Module], model_config: ModelConfig) -> list[TensorInfo]:
    """Names, full shapes and types of this stage's tensors as they are built, in the plan's order."""
    table = parameters(model_config)
    held = dict(held_parameters(model_chunks))
    return [
        TensorInfo(name, shape, held[entry.megatron].dtype)
        for entry in table.values()
        if entry.megatron in held and entry.exported
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    ]


def _plain(parameter: Tensor) -> Tensor:
    parameter = readable(parameter)
    return dequantize_fp8_tensor(parameter.detach()) if is_float8tensor(parameter) else parameter.detach()


def _gather(shards: list[tuple[str, Tensor]], group: dist.ProcessGroup) -> list[dict[str, Tensor]]:
    """The shards of every rank of `group` by name, in the order of ranks; all ranks' are of the same shapes."""
    if not shards:
        return []
    bucket = Bucket(shards)
    packed = bucket.pack()
    gathered = packed.new_empty(group.size() * packed.numel())
    dist.all_gather_into_tensor(gathered, packed, group=group)
    return [dict(unpack(part, bucket.layout())) for part in gathered.chunk(group.size())]


def _check(held: dict[str, nn.Parameter], groups: Sequence[SenderGroup], model_config: ModelConfig) -> None:
    """Raise WeightError, naming them, unless the model is what the plan says of this stage, and of one type."""
    table = parameters(model_config)
    if unknown := sorted(held.keys() - table.keys()):
        raise WeightError(f"no rule of {model_config.architecture} exports {', '.join(unknown)}")
    planned = {entry.megatron for group in groups for bucket in group.buckets for entry in bucket.parameters}
    stage = groups[0].stage
    if missing := sorted(planned - held.keys()):
        raise WeightError(f"on pipeline stage {stage} by the plan, but not in its model: {', '.join(missing)}")
    if unplanned := sorted(name for name in held.keys() - planned if table[name].exported):
        raise WeightError(f"in the model of pipeline stage {stage}, but not by the plan: {', '.join(unplanned)}")
    dtypes = {str(held[name].dtype): name for name in planned}
    if len(dtypes) > 1:
        listing = ", ".join(f"{name} is {dtype}" for dtype, name in sorted(dtypes.items()))
        raise WeightError(f"the model's parameters are of several types: {listing}")
