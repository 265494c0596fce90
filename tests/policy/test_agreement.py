"""The comparison of trainer and engine: what is measured, where, and what follows from it.

Why: it is the only thing that sees a weight that did not arrive or a rotary embedding that one side has otherwise. A
run against an engine of another rotary base is in tests/end_to_end/test_stops.py. Not covered: the limits themselves
on a GPU, where bf16 and FP8 round in other ways.
"""

import pytest
import torch

from megatron_fipo.algorithm.statistics import metrics
from megatron_fipo.config import Config, PolicySection, RolloutConfig
from megatron_fipo.config.agreement import Limits, agreement_limits
from megatron_fipo.errors import ConfigError, FipoError
from megatron_fipo.policy.agreement import AgreementCheck, log_prob_differences
from megatron_fipo.policy.feed import Feed
from megatron_fipo.policy.micro_batch import BatchLayout
from megatron_fipo.rollout.plain_batch import plain_batch


def measured(gaps: list[list[float]], lags: list[int]) -> dict[str, float]:
    """The metrics of responses whose tokens differ by the given gaps, each with its lag."""
    batch, store = plain_batch(
        streams={
            "token_ids": [torch.arange(2 + len(gap)) for gap in gaps],
            "rollout_log_probs": [torch.tensor([0.0, 0.0, *gap]) for gap in gaps],
        },
        prompt_lengths=[2] * len(gaps),
        advantages=[1.0] * len(gaps),
        weight_lag=lags,
    )
    feed = Feed(BatchLayout(packed=True, pad_multiple=1), 100, torch.device("cpu"))
    found = feed.fetch(batch, [[list(range(len(gaps)))]], store)
    assert isinstance(found, list), found
    ((micro_batch,),) = found
    statistics = log_prob_differences(micro_batch, torch.zeros_like(micro_batch.streams["rollout_log_probs"]))
    return {name: value for name, value in metrics(statistics).items() if name.startswith("log_prob_diff")}


def test_quarters_and_lags_are_told_apart() -> None:
    found = measured([[0.1, 0.2, 0.3, 0.4], [0.5] * 8, [9.0] * 3, [7.0, 5.0]], [0, 0, 1, 3])
    assert found["log_prob_diff_mean"] == pytest.approx((1.0 + 4.0) / 12)
    assert found["log_prob_diff_max"] == pytest.approx(0.5)
    for quarter, value in enumerate((0.1, 0.2, 0.3, 0.4), start=1):
        assert found[f"log_prob_diff_quarter_{quarter}"] == pytest.approx((value + 2 * 0.5) / 3)
    assert found["log_prob_diff_lag_1"] == pytest.approx(9.0)
    assert found["log_prob_diff_lag_2_or_more"] == pytest.approx(6.0)


def test_without_older_tokens_there_is_no_metric_of_them() -> None:
    assert not [name for name in measured([[0.1]], [0]) if "lag" in name]
    assert "log_prob_diff_mean" not in measured([[0.1]], [1])


def grown(mean: float, last_quarter: float) -> dict[str, float]:
    quarters = {f"log_prob_diff_quarter_{q}": mean for q in (1, 2, 3)}
    return {"log_prob_diff_mean": mean, **quarters, "log_prob_diff_quarter_4": last_quarter}


def test_a_difference_within_the_limits_says_nothing() -> None:
    check = AgreementCheck(Limits(warn=0.1, stop=1.0))
    assert check.judge(grown(0.1, 0.1)) is None
    assert check.judge({}) is None


def test_above_the_first_limit_it_warns_once() -> None:
    check = AgreementCheck(Limits(warn=0.1, stop=1.0))
    warning = check.judge(grown(0.2, 0.9))
    assert warning is not None
    assert "differ by 0.2 nats a token, above rollout.log_prob_diff_warn=0.1" in warning
    assert "stale prefix cache" in warning and "growing with position" in warning
    assert check.judge(grown(0.2, 0.9)) is None


@pytest.mark.parametrize("mean", [1.1, float("nan"), float("inf")])
def test_above_the_second_limit_the_first_step_ends_the_run(mean: float) -> None:
    with pytest.raises(FipoError, match=r"rollout\.log_prob_diff_stop=1: .*By quarter") as error:
        AgreementCheck(Limits(warn=0.1, stop=1.0)).judge(grown(mean, mean))
    assert "growing" not in str(error.value)


def test_a_later_step_only_warns() -> None:
    """Training moves a policy, and a batch can be odd: only at the start is the cause certain to be a mistake."""
    check = AgreementCheck(Limits(warn=0.1, stop=1.0))
    assert check.judge(grown(0.01, 0.01)) is None
    assert check.judge(grown(5.0, 5.0))


def test_a_step_without_fresh_samples_is_not_the_first() -> None:
    check = AgreementCheck(Limits(warn=0.1, stop=1.0))
    check.judge({"log_prob_diff_lag_1": 3.0})
    with pytest.raises(FipoError):
        check.judge(grown(5.0, 5.0))


def test_limits_follow_the_coarser_precision() -> None:
    def limits(dtype: str, engine: str, **more: str) -> Limits:
        return agreement_limits(
            Config(
                model=PolicySection(dtype=dtype, fp8=more.get("fp8", "off")),
                rollout=RolloutConfig(dtype=engine, quantization=more.get("quantization")),
            )
        )

    exact, rounded = limits("float32", "float32"), limits("bfloat16", "bfloat16")
    coarse = limits("bfloat16", "bfloat16", fp8="tensorwise")
    assert exact.warn < rounded.warn < coarse.warn and exact.stop < rounded.stop < coarse.stop
    assert limits("float32", "bfloat16") == limits("bfloat16", "float32") == rounded
    assert limits("bfloat16", "bfloat16", quantization="fp8_per_channel") == coarse
    given = agreement_limits(Config(rollout=RolloutConfig(log_prob_diff_warn=2.0, log_prob_diff_stop=3.0)))
    assert given == Limits(2.0, 3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_prob_diff_warn": 0.9}, r"log_prob_diff_warn: 0\.9 is .* log_prob_diff_stop, 0\.3 with bfloat16"),
        ({"log_prob_diff_stop": 0.01}, r"log_prob_diff_stop: 0\.01 is .* log_prob_diff_warn, 0\.06 with bfloat16"),
    ],
)
def test_one_limit_that_passes_the_usual_other_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agreement_limits(Config(rollout=RolloutConfig(**settings)))
    assert agreement_limits(Config(rollout=RolloutConfig(log_prob_diff_warn=0.2))) == Limits(0.2, 0.3)
