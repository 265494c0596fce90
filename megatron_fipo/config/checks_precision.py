"""Check a configuration's precision: FP8 and the settings that it depends on. Part of `checks.py`."""

from collections.abc import Iterator

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError


def precision(config: Config) -> Iterator[str]:
    """Raise ConfigError if the precision cannot run. Yield a warning for what is probably a mistake."""
    model = config.model
    if model.fp8 != "off" and model.layers == "local":
        raise ConfigError(
            "model.fp8", f"{model.fp8} needs Transformer Engine layers", "model.layers=auto, or model.fp8=off"
        )
    if model.fp8 != "off" and model.dtype != "bfloat16":
        raise ConfigError("model.fp8", f"{model.fp8} needs bfloat16 weights", "model.dtype=bfloat16, or model.fp8=off")
    if model.fp8 != "off" and config.hardware.fp8_tflops is None:
        raise ConfigError(
            "model.fp8", f"{config.hardware.name} has no FP8", "model.fp8=off, or hardware=h100 or another GPU with FP8"
        )
    if model.fp8_parameter_gather:
        _check_parameter_gather(config)
    if model.fp8 == "delayed":
        yield (
            "model.fp8: delayed scaling takes its scales from earlier batches. The first step has no earlier batch, "
            "and the first ratio of a step is not exactly 1; tensorwise takes the scales from the current batch"
        )
    if config.rollout.dtype != model.dtype:
        yield (
            f"rollout.dtype: {config.rollout.dtype} differs from model.dtype {model.dtype}: "
            "the engine's log-probs will differ from the trainer's by rounding"
        )


def _check_parameter_gather(config: Config) -> None:
    key, model = "model.fp8_parameter_gather", config.model
    if model.fp8 == "off":
        raise ConfigError(key, "there are no FP8 weights with model.fp8=off", "an FP8 recipe, or false")
    if model.fp8 == "mxfp8":
        raise ConfigError(
            key,
            "mxfp8 weights are stored by rows and by columns, and cannot be gathered in FP8",
            f"{key}=false, or model.fp8=tensorwise",
        )
    if config.parallel.overlap_param_gather:
        raise ConfigError(
            key,
            "Megatron-Core does not update the transposed FP8 weights if the last gather of a step is not overlapped",
            f"{key}=false, or parallel.overlap_param_gather=false",
        )
    if not config.parallel.distributed_optimizer:
        raise ConfigError(
            key, "needs the distributed optimizer", f"parallel.distributed_optimizer=true, or {key}=false"
        )
    if config.algorithm.reference_kl_coef > 0:
        raise ConfigError(
            key,
            "FP8 weights are not restored exactly after the swap with the reference policy's weights",
            f"{key}=false, or algorithm.reference_kl_coef=0",
        )
