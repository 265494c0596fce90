"""A model's sliding window: whether it has an effect in a run, and layouts in which it cannot be computed."""

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig


def window_in_use(config: Config, model_config: ModelConfig) -> int | None:
    """Return the window in tokens; None if no sequence of the run is longer, so that the window has no effect."""
    longest = config.rollout.max_prompt_length + config.rollout.max_response_length
    return model_config.window if model_config.window is not None and model_config.window < longest else None


def check_window(config: Config, model_config: ModelConfig) -> None:
    """Raise ConfigError if Transformer Engine's attention cannot compute the window. Call it only for these layers."""
    window = window_in_use(config, model_config)
    if window is not None and config.parallel.context > 1:
        raise ConfigError(
            "parallel.context",
            f"Transformer Engine's attention has no window ({window} tokens here) over context-parallel ranks",
            f"parallel.context=1, model.layers=local or sequences of {window} tokens at most",
        )
