"""The limits of a run for the difference between the log-probs of trainer and engine. Imports no torch."""

from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits for the mean of |log π_trainer − log π_engine| over sampled tokens, in nats."""

    warn: float
    stop: float


# Above the differences that rounding causes in practice: fp32 1e-7 … 1e-4, bf16 0.005 … 0.04, FP8 0.02 … 0.1. A wrong
# rotary embedding, a stale prefix cache or lost weights cause 0.5 to 10.
_BY_PRECISION = {"float32": Limits(1e-3, 0.05), "bfloat16": Limits(0.06, 0.3), "fp8": Limits(0.15, 0.6)}


def agreement_limits(config: Config) -> Limits:
    """Return the limits of a run. A limit that is null depends on the coarser precision of trainer and engine.

    Raises ConfigError if the limit that stops a run is below the limit that warns.
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
