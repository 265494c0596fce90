"""Build the real Megatron-Core model of each pipeline stage of a run on one CPU, without memory for weights.

A fake process group of the run's full size replaces the other ranks, and tensors are on the meta device. So this builds
the same parameters that `policy/model.py` builds on a rank of the cluster.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_fipo.config import Config, ParallelConfig, with_values
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.policy import platform
from megatron_fipo.policy.model import build_model
from megatron_fipo.weights.gather import exported_tensors
from megatron_fipo.weights.huggingface import TensorInfo

_META = torch.device("meta")


@dataclass
class BuiltStage:
    """The parameters of each rank of one pipeline stage. Its ranks are equal in size, since all cuts are equal."""

    stage: int
    rank: int
    """The first of the global ranks that were built."""
    parameters: int
    weight_bytes: int
    layers: int
    exported: list[TensorInfo]
    """Hugging Face names, full shapes and types of the tensors that the stage sends to the rollout service."""


def build_stages(config: Config, model_config: ModelConfig, world_size: int) -> list[BuiltStage]:
    """Build one rank of each pipeline stage of a run of `world_size` ranks, one after the other.

    Where experts are dealt to ranks, one with each share of them is built.

    The layers are Megatron-Core's local layers, with the same parameters as Transformer Engine's. No process group
    may be joined in this process.
    """
    platform.install()
    # The dispatcher has no parameters, and flex needs a GPU.
    values = {"model.layers": "local", "model.fp8": "off", "parallel.expert_dispatcher": "alltoall"}
    config = with_values(config, values)
    ranks_of_stage = world_size // config.parallel.pipeline
    parallel, stages = config.parallel, []
    for stage in range(parallel.pipeline):
        first = stage * ranks_of_stage
        built, *others = (
            _build(config, model_config, stage, first + share * parallel.expert_tensor, world_size)
            for share in range(parallel.expert)
        )
        for other in others:
            sent = {tensor.name for tensor in built.exported}
            built.exported += [tensor for tensor in other.exported if tensor.name not in sent]
        stages.append(built)
    return stages


def _build(config: Config, model_config: ModelConfig, stage: int, rank: int, world_size: int) -> BuiltStage:
    with fake_rank(config.parallel, rank, world_size), _allocating_nothing():
        chunks = build_model(config, model_config, _META)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        return BuiltStage(
            stage=stage,
            rank=rank,
            parameters=sum(parameter.numel() for parameter in parameters),
            weight_bytes=sum(parameter.nbytes for parameter in parameters),
            layers=sum(len(chunk.decoder.layers) for chunk in chunks),
            exported=exported_tensors(chunks, model_config),
        )


@contextlib.contextmanager
def fake_rank(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[None]:
    """Provide Megatron-Core's parallel state of rank `rank`. Collectives do nothing."""
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,  # those would wait for the other ranks
        )
        model_parallel_cuda_manual_seed(1)  # for the initialisation, which uses no random numbers on the meta device
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _allocating_nothing() -> Iterator[None]:
    """Create tensors on the meta device, including those that Megatron-Core places on the current CUDA device."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: _META  # type: ignore[assignment,return-value]
    try:
        with _META:
            yield
    finally:
        torch.cuda.current_device = current_device
