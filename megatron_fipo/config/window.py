"""A model's sliding window: whether a run's sequences are long enough for it, and where it cannot be computed."""

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig


def window_in_use(config: Config, model_config: ModelConfig) -> int | None:
    """Tokens that each layer attends to; None where no sequence of the run is longer, so that it has no effect."""
    longest = config.rollout.max_prompt_length + config.rollout.max_response_length
    return model_config.window if model_config.window is not None and model_config.window < longest else None


def check_window(config: Config, model_config: ModelConfig) -> None:
    """For a run with Transformer Engine's layers: raise ConfigError where their attention cannot have the window."""
    window = window_in_use(config, model_config)
    if window is not None and config.parallel.context > 1:
        raise ConfigError(
            "parallel.context",
            f"Transformer Engine's attention has no window ({window} tokens here) over context-parallel ranks",
            f"parallel.context=1, model.layers=local or sequences of {window} tokens at most",
        )
