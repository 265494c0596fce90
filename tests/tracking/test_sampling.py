"""Metrics of a step's sampling: means over verdicts, and failed checks by their own rates.

Why: a verifier that times out on long answers must not look like a model that gets worse. Not covered: who drops the
groups that are counted here (tests/rollout/test_filters.py).
"""

import dataclasses

import pytest

from megatron_fipo.records.sample import Group
from megatron_fipo.records.segments import segments_around
from megatron_fipo.rollout.collector import Batch
from megatron_fipo.rollout.ledger import StepCounts
from megatron_fipo.tracking.sampling import sampling_metrics
from tests.tracking.groups import make_group


def metrics_of(sampled: list[Group]) -> dict[str, float]:
    """The metrics of a step that sampled these groups and trains on none."""
    counts = StepCounts(rounds=2, opened=9, rejected={"all_right": 1, "all_wrong": 2, "no_contrast": 3, "surplus": 4})
    return sampling_metrics(Batch([], [], sampled, counts, generation_batches=2, left=5, gave_up=True), 0)


def test_groups_are_counted_by_what_became_of_them():
    metrics = metrics_of([])
    found = {name: value for name, value in metrics.items() if name.startswith(("groups_", "num_"))}
    assert found == {
        "num_gen_batches": 2,
        "groups_kept": 0,
        "groups_dropped": 6,
        "groups_dropped_all_right": 1,
        "groups_dropped_all_wrong": 2,
        "groups_dropped_surplus": 4,
        "groups_stopped": 0,
        "groups_carried": 5,
    }


def test_failed_checks_change_no_mean():
    sound = metrics_of([make_group("9978", "9")])
    with_failures = metrics_of([make_group("99T78TC", "9")])
    for name in ("reward_mean", "accuracy"):
        assert with_failures[name] == sound[name]
    assert sound["accuracy"] == 0.5 and sound["reward_mean"] == 0.0
    assert (with_failures["verifier_timeouts"], with_failures["verifier_crashes"]) == (2, 1)
    assert with_failures["verifier_timeout_rate"] == pytest.approx(2 / 7)
    assert with_failures["verifier_crash_rate"] == pytest.approx(1 / 7)
    assert sound["verifier_timeout_rate"] == sound["verifier_crash_rate"] == 0


def test_an_answer_that_is_too_long_is_wrong():
    metrics = metrics_of([make_group("9L", "9")])
    assert (metrics["accuracy"], metrics["answers_too_long"]) == (0.5, 1)
    assert metrics["verifier_timeout_rate"] == metrics["verifier_crash_rate"] == 0


def test_without_a_verdict_there_is_no_mean():
    metrics = metrics_of([make_group("TT", "9")])
    assert "reward_mean" not in metrics and "accuracy" not in metrics
    assert metrics["verifier_timeout_rate"] == 1.0


def test_what_a_policy_was_told_is_in_no_length():
    group = make_group("9999", "9", lengths=[1, 2, 4, 9])
    told = dataclasses.replace(group.samples[3], segments=segments_around([(2, 5)], 9, "made"))
    metrics = metrics_of([dataclasses.replace(group, samples=(*group.samples[:3], told))])
    assert metrics["response_length_max"] == 6 and metrics["response_tokens"] == 13
    assert metrics["turns_mean"] == pytest.approx(5 / 4) and metrics["context_share"] == pytest.approx(3 / 16)


def test_lengths_and_an_empty_step():
    metrics = metrics_of([make_group("9999", "9", lengths=[1, 2, 3, 4])])
    assert metrics["response_length_mean"] == 2.5 and metrics["response_length_max"] == 4
    assert [metrics[f"response_length_q{q}"] for q in (25, 50, 75)] == [1.75, 2.5, 3.25]
    assert metrics["response_tokens"] == 10
    assert "response_tokens" not in metrics_of([])
