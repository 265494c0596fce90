"""Which parameter lies where under a layout, worked out without building a model or starting a process."""

import math
from collections.abc import Iterable, Iterator
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
    layout = Layout(
        tensor_parallel_size,
        pipeline_parallel_size,
        virtual_pipeline_parallel_size or 1,
        expert_parallel_size,
        expert_tensor_parallel_size,
    )
    layout.check(model_config)
    return sorted(layout.place(parameters(model_config).values(), model_config), key=lambda item: item.stage)


@dataclass(frozen=True)
class Layout:
    """Parallel sizes by which a model is cut."""

    tensor: int
    pipeline: int
    chunks: int
    """Model chunks per stage: 1 without virtual pipeline."""
    expert: int
    expert_tensor: int

    def check(self, model_config: ModelConfig) -> None:
        """Raise ConfigError if the layout does not divide the model."""
        check_tensor_parallel(model_config, self.tensor)
        check_expert_parallel(model_config, self.expert, self.expert_tensor)
        if model_config.num_layers % (self.pipeline * self.chunks):
            raise ConfigError(
                "parallel.pipeline",
                f"{self.pipeline} stages of {self.chunks} chunks do not divide the {model_config.num_layers} layers",
                "the number of layers is a multiple of stages times chunks",
            )

    def place(self, chosen: Iterable[Parameter], model_config: ModelConfig) -> Iterator[PlannedParameter]:
        """Yield where each of some parameters is. One that no stage has is left out."""
        layers_per_chunk = model_config.num_layers // (self.pipeline * self.chunks)
        for parameter in chosen:
            if parameter.megatron.startswith(LAYER_PREFIX):
                layer = int(parameter.megatron.removeprefix(LAYER_PREFIX).split(".", 1)[0])
                chunk, stage = divmod(layer // layers_per_chunk, self.pipeline)
            elif parameter.megatron.startswith("embedding."):
                stage, chunk = 0, 0
            elif parameter.exported or self.pipeline > 1:
                stage, chunk = self.pipeline - 1, self.chunks - 1
            else:
                continue  # on one stage the output layer uses the embedding itself
            size, expert_rank = self.tensor, None
            if parameter.expert is not None:
                size = self.expert_tensor
                expert_rank = parameter.expert * self.expert // model_config.dimension("experts")
            yield PlannedParameter(stage, chunk, parameter, parameter.local_shape(size), expert_rank)


def parameters_per_rank(planned: Iterable[PlannedParameter]) -> dict[int, int]:
    """Number of values that each rank holds, by pipeline stage. Expert-parallel ranks hold as many as each other."""
    count: dict[int, int] = {}
    for item in planned:
        if item.expert_rank:
            continue
        count[item.stage] = count.get(item.stage, 0) + math.prod(item.local_shape)
    return count
