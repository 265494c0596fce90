"""Why: a window that is lost trains another model, one that is kept without need costs, and one that Transformer Engine
cannot have must not end a cluster job after its start. What is computed with it: test_layouts.py.
"""

import dataclasses

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.policy.model import transformer_config


def configured(layers: str, context: int, window: int | None) -> tuple[Config, ModelConfig]:
    """A run whose longest sequence has 100 tokens, of a model with the window."""
    config = Config()
    config.model.layers, config.parallel.context = layers, context
    config.rollout.max_prompt_length, config.rollout.max_response_length = 40, 60
    model_config = read_architecture(resolve_embedded("embedded:tiny"))
    return config, dataclasses.replace(model_config, architecture="MistralForCausalLM", window=window)


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
@pytest.mark.parametrize(("window", "found"), [(None, None), (1, (0, 0)), (99, (98, 0)), (100, None), (4096, None)])
def test_a_window_counts_the_token_itself_and_goes_where_no_sequence_is_longer(
    layers: str, window: int | None, found: tuple[int, int] | None
) -> None:
    assert transformer_config(*configured(layers, 1, window)).window_size == found


def test_transformer_engine_has_no_window_over_context_parallel_ranks() -> None:
    assert transformer_config(*configured("local", 2, 99)).window_size == (98, 0)
    assert transformer_config(*configured("transformer_engine", 2, 100)).window_size is None
    with pytest.raises(ConfigError, match=r"parallel\.context.*no window \(99 tokens here\)"):
        transformer_config(*configured("transformer_engine", 2, 99))
