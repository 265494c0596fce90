"""avg@k, cons@k and pass@k against values worked out by hand and, for pass@k, against drawing every subset."""

import dataclasses
import io
import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.tracking.console import Console
from megatron_fipo.tracking.validation import consensus, pass_at_k, score
from tests.tracking.groups import make_group


def test_scores_of_two_problems():
    result = score([make_group("9918", "9", lengths=[1, 2, 3, 4]), make_group("1118", "8", lengths=[5] * 4)], k=4)
    scores = result.overall
    assert (scores.problems, scores.k) == (2, 4)
    assert scores.avg == pytest.approx((0.5 + 0.25) / 2)
    assert scores.cons == pytest.approx((1 + 0) / 2)
    assert scores.pass_at_k == 1.0
    assert scores.response_length_mean == pytest.approx(30 / 8)
    assert result.metrics()["accuracy"] == scores.avg


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("997", 1.0),
        ("799", 1.0),
        ("977", 0.0),
        ("97", 0.5),  # a tie is a coin toss
        ("978", 1 / 3),
        ("9   ", 1.0),  # no answer is no vote
        ("    ", math.nan),
        ("TTT9", 1.0),  # nor is an answer that could not be judged
        ("TTTT", math.nan),
    ],
)
def test_consensus(answers, expected):
    assert consensus(make_group(answers, right="9").results) == pytest.approx(expected, nan_ok=True)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_mean_over_all_draws(case):
    samples, right, k = case
    draws = list(combinations([index < right for index in range(samples)], k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_more_samples_than_k():
    scores = score([make_group("7799", "9")], k=2).overall
    assert scores.avg == 0.5
    assert scores.cons == 0.0  # the first two agree on 7
    assert scores.pass_at_k == pytest.approx(5 / 6)


def test_partial_credit_is_not_a_solved_problem():
    group = make_group("77", "9")
    group = group.with_results([dataclasses.replace(result, accuracy=0.9) for result in group.results])
    scores = score([group], k=2).overall
    assert (scores.avg, scores.pass_at_k) == (pytest.approx(0.9), 0.0)


def test_a_rule_without_answers_has_no_consensus() -> None:
    """Why: programs do not vote, and were shown with a cons@k of 0 beside any accuracy."""
    group = make_group("97", "9")
    program = group.with_results([dataclasses.replace(result, answer="") for result in group.results])
    scores = score([program, program], k=2)
    assert scores.overall.avg == 0.5 and math.isnan(scores.overall.cons)
    out = io.StringIO()
    with Console(total_steps=1, file=out) as console:
        console.validation(0, scores)
    assert "avg@2 0.500  pass@2 1.000" in out.getvalue()
    one_answers = score([program, make_group("99", "9")], k=2).overall
    assert one_answers.cons == 0.5, "the control: where answers vote, a problem without a vote counts as 0"


def test_failed_checks_are_no_wrong_answers():
    """Two of four checks failed: the accuracies are those of the other two."""
    group = make_group("9TC ", "9")
    *others, last = group.samples
    group = dataclasses.replace(group, samples=(*others, dataclasses.replace(last, finish_reason="length")))
    scores = score([group], k=4).overall
    assert (scores.avg, scores.cons, scores.pass_at_k) == (0.5, 1.0, 1.0)
    assert (scores.not_judged, scores.truncated) == (2, 0.25)
    metrics = score([group], k=4).metrics()
    assert (metrics["verifier_timeout_rate"], metrics["verifier_crash_rate"]) == (0.25, 0.25)


def test_a_problem_without_a_verdict_is_left_out_and_counted():
    scores = score([make_group("99", "9"), make_group("TC", "9")], k=2).overall
    assert (scores.avg, scores.cons, scores.pass_at_k) == (1.0, 1.0, 1.0)
    assert (scores.problems, scores.problems_not_judged, scores.not_judged) == (2, 1, 2)


def test_without_any_verdict_there_is_no_accuracy():
    scores = score([make_group("TT", "9")], k=2).overall
    assert all(math.isnan(value) for value in (scores.avg, scores.cons, scores.pass_at_k))


def test_each_source_has_its_own_scores():
    result = score([make_group("99", "9", source="aime24"), make_group("77", "9", source="aime25")], k=2)
    metrics = result.metrics()
    assert (metrics["accuracy"], metrics["accuracy/aime24"], metrics["accuracy/aime25"]) == (0.5, 1.0, 0.0)
    assert "accuracy/toy" not in score([make_group("9", "9")], k=1).metrics()


def test_incomplete_groups_are_refused_by_name():
    with pytest.raises(ValueError, match="no problems"):
        score([], k=1)
    with pytest.raises(ValueError, match="problem lost has 2 samples"):
        score([make_group("99", "9", name="lost")], k=3)
    group = make_group("99", "9", name="unjudged")
    first, second = group.samples
    group = dataclasses.replace(group, samples=(first, dataclasses.replace(second, result=None)))
    with pytest.raises(ValueError, match="problem unjudged"):
        score([group], k=2)
