"""How far trainer and engine may differ on log-probs: the limits of a run. Imports no torch."""

from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """On the mean |log π_trainer − log π_engine| a sampled token, in nats."""

    warn: float
    stop: float


# What rounding gives in practice, times ten or so: fp32 1e-7 … 1e-4, bf16 0.005 … 0.04, FP8 0.02 … 0.1. A wrong rotary
# embedding, a stale prefix cache or lost weights give 0.5 to 10.
_BY_PRECISION = {"float32": Limits(1e-3, 0.05), "bfloat16": Limits(0.06, 0.3), "fp8": Limits(0.15, 0.6)}


def agreement_limits(config: Config) -> Limits:
    """The configured limits; where they are null, those of the coarser one of the trainer's and engine's precision.

    ConfigError where the second is below the first, be they configured or usual.
    """
    model, rollout = config.model, config.rollout
    if model.fp8 != "off" or rollout.quantization:
        precision = "fp8"
    elif model.dtype == rollout.dtype == "float32":
        precision = "float32"
    else:
        precision = "bfloat16"
    usual = _BY_PRECISION[precision]
    limits = Limits(
        warn=usual.warn if rollout.log_prob_diff_warn is None else rollout.log_prob_diff_warn,
        stop=usual.stop if rollout.log_prob_diff_stop is None else rollout.log_prob_diff_stop,
    )
    if limits.stop < limits.warn:
        given, other = ("warn", "stop") if rollout.log_prob_diff_stop is None else ("stop", "warn")
        both = rollout.log_prob_diff_warn is not None and rollout.log_prob_diff_stop is not None
        raise ConfigError(
            f"rollout.log_prob_diff_{given}",
            f"{getattr(limits, given):g} is on the wrong side of log_prob_diff_{other}, {getattr(limits, other):g}"
            + ("" if both else f" with {precision}"),
            "a limit at or above the warning's" if both else f"set rollout.log_prob_diff_{other} too",
        )
    return limits
