"""Why: dynamic sampling decides what is trained on; a lost or doubled group is invisible in a run's curves.

Does not cover sampling itself, nor who asks for batches: that is the loop's.
"""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.algorithm.groups import DynamicSampling
from megatron_fipo.config import FilterGroupsConfig
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, RewardResult, sample_from_lists


def make_group(name: str, *accuracies: float, failed: int = 0) -> Group:
    """A group with a judged response for each accuracy and `failed` ones whose check timed out."""
    results = [RewardResult(accuracy, 2 * accuracy - 1, "7", "judged") for accuracy in accuracies]
    results += [RewardResult(0.0, -1.0, "", "timeout")] * failed
    return judged(name, results)


def judged(name: str, results: list[RewardResult]) -> Group:
    samples = tuple(sample_from_lists([5, 1], [-0.1, -0.2], "stop", 3) for _ in results)
    return Group(Problem(name, "2+5=?", prompt_ids([2]), "7", "sums"), samples).with_results(results)


def mixed(name: str) -> Group:
    return make_group(name, 1.0, 0.0)


def names(groups: list[Group]) -> list[str]:
    return [group.problem.id for group in groups]


def test_only_groups_whose_accuracy_varies_are_kept_and_each_drop_has_its_count():
    sampling = DynamicSampling(FilterGroupsConfig(), prompts_per_step=2)
    sampling.add([make_group("right", 1, 1), make_group("wrong", 0, 0), mixed("a"), make_group("half", 0.5, 0.5)])
    assert sampling.needs_more()
    sampling.add([make_group("b", 0.2, 0.4)])
    assert not sampling.needs_more()
    selection = sampling.take()
    assert names(selection.groups) == ["a", "b"]
    assert not selection.gave_up
    assert (selection.counts.dropped_all_right, selection.counts.dropped_all_wrong) == (1, 1)
    assert (selection.counts.dropped_no_contrast, selection.counts.num_gen_batches) == (1, 2)


def test_a_failed_check_is_no_contrast_to_right_answers():
    sampling = DynamicSampling(FilterGroupsConfig(), prompts_per_step=1)
    sampling.add(
        [make_group("solved", 1, 1, failed=1), make_group("unjudged", failed=2), make_group("one", 1, failed=1)]
    )
    counts = sampling.take().counts
    assert (counts.trained, counts.dropped_all_right, counts.dropped_no_contrast) == (0, 1, 2)


def test_an_answer_above_the_limit_is_a_wrong_answer():
    right, failed = make_group("contrast", 1, failed=1).results
    group = judged("contrast", [right, replace(failed, outcome="too_long")])
    sampling = DynamicSampling(FilterGroupsConfig(), prompts_per_step=1)
    sampling.add([group])
    assert sampling.take().counts.trained == 1


def test_overlong_penalties_do_not_make_a_group_vary():
    first, second = make_group("right", 1, 1).results
    group = judged("right", [replace(first, reward=0.3), second])
    sampling = DynamicSampling(FilterGroupsConfig(), prompts_per_step=1)
    sampling.add([group])
    assert sampling.take().counts.dropped_all_right == 1


def test_switched_off_every_group_is_kept():
    sampling = DynamicSampling(FilterGroupsConfig(enable=False), prompts_per_step=2)
    sampling.add([make_group("right", 1, 1), make_group("wrong", 0, 0)])
    assert names(sampling.take().groups) == ["right", "wrong"]


def test_gives_up_after_the_last_batch_with_what_there_is():
    sampling = DynamicSampling(FilterGroupsConfig(max_num_gen_batches=3), prompts_per_step=5)
    batches = 0
    while sampling.needs_more():
        sampling.add([mixed("only")] if batches == 1 else [make_group("wrong", 0, 0)])
        batches += 1
    selection = sampling.take()
    assert batches == 3
    assert selection.gave_up
    assert names(selection.groups) == ["only"]
    assert sampling.needs_more()  # the next step begins with all its batches


def test_surplus_is_carried_in_order_or_dropped():
    for surplus, carried in (("carry", ["c", "d"]), ("drop", [])):
        sampling = DynamicSampling(FilterGroupsConfig(surplus=surplus), prompts_per_step=2)
        sampling.add([mixed(name) for name in "abcd"])
        first = sampling.take()
        assert names(first.groups) == ["a", "b"]
        assert (first.counts.carried_out, first.counts.dropped_surplus) == (len(carried), 2 - len(carried))
        assert sampling.needs_more() == (not carried)
        second = sampling.take()
        assert names(second.groups) == carried
        assert second.counts.carried_in == len(carried)


def test_a_resumed_run_trains_on_the_carried_groups():
    sampling = DynamicSampling(FilterGroupsConfig(), prompts_per_step=1)
    sampling.add([mixed("a"), mixed("b")])
    sampling.take()
    resumed = DynamicSampling(FilterGroupsConfig(), prompts_per_step=1)
    resumed.carry(sampling.carried())
    assert resumed.take() == sampling.take()


@given(
    steps=st.lists(
        st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=0, max_size=3), max_size=6), max_size=6
    ),
    surplus=st.sampled_from(["carry", "drop"]),
)
def test_no_group_is_lost_or_doubled(steps, surplus):
    sampling = DynamicSampling(FilterGroupsConfig(surplus=surplus), prompts_per_step=2)
    trained: list[str] = []
    for step, accuracies in enumerate(steps):
        sampling.add([make_group(f"{step}.{index}", *values) for index, values in enumerate(accuracies)])
        selection = sampling.take()
        counts = selection.counts
        trained += names(selection.groups)
        dropped = counts.dropped_all_right + counts.dropped_all_wrong + counts.dropped_no_contrast
        assert counts.carried_in + counts.generated == (
            counts.trained + dropped + counts.dropped_surplus + counts.carried_out
        )
    assert len(trained) == len(set(trained))
