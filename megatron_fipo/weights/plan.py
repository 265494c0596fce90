"""Which parameter lies where under a layout, worked out without building a model or starting a process."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import Parameter, check_expert_parallel, check_tensor_parallel, parameters
from megatron_fipo.models.rules import LAYER_PREFIX


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter on each tensor-parallel rank of one pipeline stage."""

    stage: int
    chunk: int
    """Model chunk of the stage: 0 without virtual pipeline."""
    parameter: Parameter
    local_shape: tuple[int, ...]
    expert_rank: int | None = None
    """The expert-parallel rank that holds it; None: every one does."""

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{name} {shape}" for name, shape in zip(self.parameter.names, self.parameter.shapes, strict=True)
        )
        rank = "" if self.expert_rank is None else f" expert rank {self.expert_rank}"
        return (
            f"stage {self.stage} chunk {self.chunk}{rank}  {self.parameter.megatron} {self.local_shape}  <-  {shapes}"
        )


def plan(
    model_config: ModelConfig,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    virtual_pipeline_parallel_size: int | None = None,
    *,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
) -> list[PlannedParameter]:
    """Every parameter of every pipeline stage, stage after stage, each in export order. Print the items to read it.

    Raises ConfigError for a layout that does not divide the model.
    """
    check_tensor_parallel(model_config, tensor_parallel_size)
    check_expert_parallel(model_config, expert_parallel_size, expert_tensor_parallel_size)
    chunks = virtual_pipeline_parallel_size or 1
    if model_config.num_layers % (pipeline_parallel_size * chunks):
        raise ConfigError(
            "parallel.pipeline",
            f"{pipeline_parallel_size} stages of {chunks} chunks do not divide the {model_config.num_layers} layers",
            "the number of layers is a multiple of stages times chunks",
        )
    layers_per_chunk = model_config.num_layers // (pipeline_parallel_size * chunks)
    last = (pipeline_parallel_size - 1, chunks - 1)
    planned = []
    for parameter in parameters(model_config).values():
        if parameter.megatron.startswith(LAYER_PREFIX):
            layer = int(parameter.megatron.removeprefix(LAYER_PREFIX).split(".", 1)[0])
            chunk, stage = divmod(layer // layers_per_chunk, pipeline_parallel_size)
        elif parameter.megatron.startswith("embedding."):
            stage, chunk = 0, 0
        elif parameter.exported or pipeline_parallel_size > 1:
            stage, chunk = last
        else:
            continue  # on one stage the output layer uses the embedding itself
        size, expert_rank = tensor_parallel_size, None
        if parameter.expert is not None:
            size = expert_tensor_parallel_size
            expert_rank = parameter.expert * expert_parallel_size // model_config.dimension("experts")
        planned.append(PlannedParameter(stage, chunk, parameter, parameter.local_shape(size), expert_rank))
    return sorted(planned, key=lambda item: item.stage)


def parameters_per_rank(planned: Iterable[PlannedParameter]) -> dict[int, int]:
    """Number of values that each rank holds, by pipeline stage. Expert-parallel ranks hold as many as each other."""
    count: dict[int, int] = {}
    for item in planned:
        if item.expert_rank:
            continue
        count[item.stage] = count.get(item.stage, 0) + math.prod(item.local_shape)
    return count
