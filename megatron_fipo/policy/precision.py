"""FP8 on Transformer Engine: what each recipe needs, whether this machine has it, and Megatron-Core's settings for it.

FP8 is for the matrix products of the transformer layers alone. Megatron-Core enters its FP8 context inside the
transformer block; the embedding, the output layer, and with it log-probs, loss and credit, lie outside of it. Under
every recipe but delayed scaling the first and the last layer stay in bf16 too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import nn

from megatron_fipo.config import Config, PolicySection
from megatron_fipo.errors import ConfigError, WeightError
from megatron_fipo.models.model_config import ModelConfig

OFF = "off"


@dataclass(frozen=True)
class Recipe:
    """What one recipe needs. Versions are tuples of numbers, so that they compare."""

    capability: tuple[int, int]
    """Least compute capability."""
    below: tuple[int, int]
    """First compute capability that it does not run on any more."""
    transformer_engine: tuple[int, ...]
    """Least version in which Megatron-Core finds it."""
    cuda: tuple[int, int]
    """Least CUDA version that torch was built for."""
    formats: str = "hybrid"
    """E4M3 forward and E5M2, of wider range, for gradients. Where each block has its own scale, E4M3 for all:
    Transformer Engine's own default for those, with one bit more for gradients."""
    multiple: int = 16
    """What both dimensions of a matrix product must divide by: the tokens of a rank, and the layer's widths."""
    gathered_multiple: int = 16
    """The same for what sequence parallelism gathers in FP8: the tokens of each of its ranks, and the hidden size."""

    def multiple_of_layer_inputs(self, sequence_parallel: bool) -> int:
        """What a rank's tokens and the hidden size must divide by."""
        return self.gathered_multiple if sequence_parallel else self.multiple


ANY_LATER = (99, 0)

RECIPES = {
    "delayed": Recipe((8, 9), ANY_LATER, (1, 0), (12, 1)),
    "tensorwise": Recipe((8, 9), ANY_LATER, (2, 2), (12, 1)),
    "blockwise": Recipe((9, 0), (10, 0), (2, 3), (12, 9), formats="e4m3", gathered_multiple=128),
    "mxfp8": Recipe((10, 0), (12, 0), (2, 1), (12, 8), formats="e4m3", multiple=32, gathered_multiple=32),
}
"""By the name of `model.fp8`, which is Megatron-Core's too."""


@dataclass(frozen=True)
class Machine:
    """What a recipe is held against."""

    device: str
    """Name of the GPU, for the message."""
    capability: tuple[int, int]
    transformer_engine: tuple[int, ...]
    cuda: tuple[int, int]


def this_machine() -> Machine:
    """The current CUDA device and what is installed. Call it where Transformer Engine is."""
    from megatron.core.utils import get_te_version

    return Machine(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        get_te_version().release,
        _numbers(torch.version.cuda or "0.0"),
    )


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_recipe(fp8: str, machine: Machine) -> None:
    """Raise ConfigError if `fp8` cannot run on `machine`: with what is missing, what is there, and what would run."""
    if fp8 == OFF or not (lacking := _lacking(RECIPES[fp8], machine)):
        return
    runs = [name for name, recipe in RECIPES.items() if not _lacking(recipe, machine)]
    raise ConfigError(
        "model.fp8",
        f"{fp8} needs {' and '.join(lacking)}",
        f"model.fp8={' or '.join(runs)} runs here" if runs else "model.fp8=off",
    )


def _lacking(recipe: Recipe, machine: Machine) -> list[str]:
    """What `machine` has not, each with what it has instead."""
    lacking = []
    if not recipe.capability <= machine.capability < recipe.below:
        range_ = f"compute capability {_dotted(recipe.capability)}"
        range_ += " or higher" if recipe.below == ANY_LATER else f" or higher, below {_dotted(recipe.below)}"
        lacking.append(f"{range_}, and {machine.device} has {_dotted(machine.capability)}")
    if machine.transformer_engine < recipe.transformer_engine:
        has = _dotted(machine.transformer_engine)
        lacking.append(f"Transformer Engine {_dotted(recipe.transformer_engine)}, and {has} is installed")
    if machine.cuda < recipe.cuda:
        lacking.append(f"CUDA {_dotted(recipe.cuda)}, and this torch is built for {_dotted(machine.cuda)}")
    return lacking


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def precision_settings(model: PolicySection) -> dict[str, Any]:
    """Megatron-Core's TransformerConfig arguments for `model.fp8`."""
    if model.fp8 == OFF:
        return {}
    settings: dict[str, Any] = {
        "fp8": RECIPES[model.fp8].formats,
        "fp8_recipe": model.fp8,
        "fp8_param": model.fp8_parameter_gather,
    }
    if model.fp8 != "delayed":
        # The first and last layers are the most sensitive; delayed scaling cannot tell layers apart.
        settings |= {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    return settings


def optimizer_settings(model: PolicySection) -> dict[str, Any]:
    """Megatron-Core's OptimizerConfig arguments for `model.fp8`; by these it knows how FP8 weights are stored."""
    return {} if model.fp8 == OFF else {"fp8_recipe": model.fp8}


def check_exact_values(chunks: Sequence[nn.Module]) -> None:
    """Raise WeightError where an FP8 weight has lost the exact values that its fp32 master copy is to be made of.

    They are an attribute of the parameter, which some conversions of a module drop; the rounded weights would take
    their place unnoticed.
    """
    names = [name for chunk in chunks for name, parameter in chunk.named_parameters() if _has_lost_values(parameter)]
    if names:
        raise WeightError(
            f"{len(names)} FP8 weights, such as {names[0]}, came without their exact values through the wrapping of "
            "the model by this torch and this Transformer Engine: set model.fp8_parameter_gather=false"
        )


def _has_lost_values(parameter: nn.Parameter) -> bool:
    return is_float8tensor(parameter) and getattr(parameter, "get_high_precision_init_val", lambda: None)() is None


def check_widths(config: Config, model_config: ModelConfig) -> None:
    """Raise ConfigError where a layer is of a width that the recipe's matrix products cannot take."""
    if config.model.fp8 == OFF:
        return
    recipe, tensor = RECIPES[config.model.fp8], config.parallel.tensor
    query, key_value = model_config.dimension("query"), model_config.dimension("key_value")
    for what, width, multiple in (
        ("hidden size", model_config.hidden_size, recipe.multiple_of_layer_inputs(config.parallel.sequence)),
        ("query, key and value size of a tensor-parallel rank", (query + 2 * key_value) // tensor, recipe.multiple),
        ("attention size of a tensor-parallel rank", query // tensor, recipe.multiple),
        *_feed_forward_widths(config, model_config, recipe.multiple),
    ):
        if width % multiple:
            where = " with sequence parallelism" if multiple != recipe.multiple else ""
            raise ConfigError(
                "model.fp8",
                f"{config.model.fp8} needs widths that divide by {multiple}{where}, and the model's {what} is {width}",
                "model.fp8=off, or another parallel.tensor" + (" or parallel.sequence=false" if where else ""),
            )


def _feed_forward_widths(config: Config, model_config: ModelConfig, multiple: int) -> Iterator[tuple[str, int, int]]:
    tensor, experts = config.parallel.tensor, model_config.experts
    if model_config.has_dense_layers:
        yield "feed-forward size of a tensor-parallel rank", model_config.ffn_hidden_size // tensor, multiple
    if experts is not None:
        yield "size of an expert on a rank", experts.ffn_hidden_size // config.parallel.expert_tensor, multiple
        yield "size of the shared expert on a rank", experts.shared_ffn_hidden_size // tensor, multiple


def token_multiple(config: Config) -> int:
    """What the tokens of a micro-batch must divide by: all its rows or packed sequences, padding included.

    A context-parallel rank holds two chunks of each sequence, a sequence-parallel one an equal part of those, and each
    of these parts is one dimension of an FP8 matrix product.
    """
    parallel, fp8 = config.parallel, config.model.fp8
    of_a_part = 1 if fp8 == OFF else RECIPES[fp8].multiple_of_layer_inputs(parallel.sequence)
    chunks = 2 * parallel.context if parallel.context > 1 else 1
    return chunks * (parallel.tensor if parallel.sequence else 1) * of_a_part
