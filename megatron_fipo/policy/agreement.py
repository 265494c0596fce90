"""Whether trainer and engine agree on the log-probs of the sampled tokens, and what follows when they do not.

Both compute the same function of the same weights, in other orders of addition. So the mean difference is what their
precision rounds, or something is wrong: weights that did not arrive, a stale cache, another architecture.
"""

from torch import Tensor

from megatron_fipo.algorithm.credit import LOG_RATIO_CLAMP
from megatron_fipo.algorithm.losses import k3
from megatron_fipo.algorithm.statistics import part_means, token_statistics
from megatron_fipo.config.agreement import Limits
from megatron_fipo.errors import FipoError
from megatron_fipo.policy.micro_batch import MicroBatch
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS


def log_prob_differences(micro_batch: MicroBatch, log_probs: Tensor) -> dict[str, Tensor]:
    """Statistics of |log π_trainer − log π_engine| over a micro-batch's response tokens.

    `log_prob_diff`, mean and maximum, is over tokens of the very weights that the trainer has: of lag 0. Those have
    means by quarter of their response too: a broken rotary embedding grows from quarter to quarter. Tokens of older
    weights differ because the policy has moved; they are kept apart by their response's lag. `behaviour_kl` is the k3
    estimate of KL(π_engine ‖ π_trainer), by lag.

    Args:
        log_probs: [rows, local tokens] fp32, by the trainer.
    """
    change = log_probs - micro_batch.streams[ROLLOUT_LOG_PROBS]
    gap = change.abs()
    mask, lag = micro_batch.response_mask, micro_batch.weight_lag
    present = mask & (lag == 0)
    parts = {f"log_prob_diff_quarter_{q + 1}": present & (micro_batch.response_quarter == q) for q in range(4)}
    ages = {"lag_0": present, "lag_1": mask & (lag == 1), "lag_2_or_more": mask & (lag > 1)}
    parts |= {f"log_prob_diff_{age}": tokens for age, tokens in ages.items() if age != "lag_0"}
    # Of lag 0 it is arithmetic alone; the rest is how far the policy has moved.
    divergence = k3(change.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))
    divergences = part_means(divergence, {f"behaviour_kl_{age}": tokens for age, tokens in ages.items()})
    means = token_statistics(present, {"log_prob_diff": gap}, {"log_prob_diff": gap}) | part_means(gap, parts)
    return means | divergences


class AgreementCheck:
    """Judges each step's differences; warns once a run."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._first = True
        self._warned = False

    @property
    def may_stop(self) -> bool:
        """Whether the next step's differences may end the run: they have to be known before its first update then."""
        return self._first

    def judge(self, metrics: dict[str, float]) -> str | None:
        """The warning to show, or None. `metrics` are `Policy.agreement`'s of a step, alike on every rank.

        Raises:
            FipoError: the difference is above the second limit in this process's first step, of a run or of a resume.
        """
        mean = metrics.get("log_prob_diff_mean")
        if mean is None:  # nothing was sampled with the present weights
            return None
        first, self._first = self._first, False
        # Written so that NaN, which no comparison holds for, is no agreement.
        if first and not mean <= self._limits.stop:
            raise FipoError(
                f"{_describe(metrics)}, above rollout.log_prob_diff_stop={self._limits.stop:g}: a weight, the "
                f"architecture or the tokens are not the same on both sides{_shape_of(metrics)}"
            )
        if self._warned or mean <= self._limits.warn:
            return None
        self._warned = True
        return (
            f"{_describe(metrics)}, above rollout.log_prob_diff_warn={self._limits.warn:g}. Usual causes: a stale "
            "prefix cache, a rotary embedding or context length that only one side has, another precision "
            f"(rollout.dtype, quantization), top-p or top-k sampling{_shape_of(metrics)}. Said once; "
            "metrics.jsonl has every step"
        )


def _describe(metrics: dict[str, float]) -> str:
    return f"the log-probs of trainer and engine differ by {metrics['log_prob_diff_mean']:.2g} nats a token"


def _shape_of(metrics: dict[str, float]) -> str:
    """What the quarters of the responses say, where all four have tokens."""
    quarters = [metrics.get(f"log_prob_diff_quarter_{q}") for q in range(1, 5)]
    known = [value for value in quarters if value is not None]
    if len(known) < 4:
        return ""
    grows = ", growing with position as with a wrong rotary embedding" if known[-1] > 3 * known[0] else ""
    return f". By quarter of the response: {', '.join(f'{value:.2g}' for value in known)}{grows}"
