"""Why: which groups are trained on is invisible in a run's curves. What makes a batch is test_collector.py's."""

from dataclasses import replace

from megatron_fipo.config import FilterGroupsConfig
from megatron_fipo.rollout.filters import ALL_RIGHT, ALL_WRONG, NO_CONTRAST, differing_accuracies, group_filter
from tests.rollout.groups import judged, make_group


def test_only_groups_whose_accuracy_varies_teach_and_each_other_has_its_reason() -> None:
    reasons = [
        differing_accuracies(group)
        for group in (
            make_group("right", 1, 1),
            make_group("wrong", 0, 0),
            make_group("mixed", 1, 0),
            make_group("half", 0.5, 0.5),
            make_group("fractions", 0.2, 0.4),
        )
    ]
    assert reasons == [ALL_RIGHT, ALL_WRONG, None, NO_CONTRAST, None]


def test_a_failed_check_is_no_contrast_to_right_answers() -> None:
    assert differing_accuracies(make_group("solved", 1, 1, failed=1)) == ALL_RIGHT
    assert differing_accuracies(make_group("unjudged", failed=2)) == NO_CONTRAST
    assert differing_accuracies(make_group("one", 1, failed=1)) == NO_CONTRAST


def test_an_answer_above_the_limit_is_a_wrong_answer() -> None:
    right, failed = make_group("contrast", 1, failed=1).results
    assert differing_accuracies(judged("contrast", [right, replace(failed, outcome="too_long")])) is None


def test_overlong_penalties_do_not_make_a_group_vary() -> None:
    first, second = make_group("right", 1, 1).results
    assert differing_accuracies(judged("right", [replace(first, reward=0.3), second])) == ALL_RIGHT


def test_switched_off_every_group_is_kept() -> None:
    reject = group_filter(FilterGroupsConfig(enable=False))
    assert [reject(make_group(name, accuracy, accuracy)) for name, accuracy in (("right", 1), ("wrong", 0))] == [
        None
    ] * 2
