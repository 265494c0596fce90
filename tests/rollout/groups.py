"""Small judged groups for tests of what becomes of them."""

from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, RewardResult, sample_from_lists


def make_group(name: str, *accuracies: float, failed: int = 0) -> Group:
    """A group with a judged sample for each accuracy and `failed` ones whose check timed out."""
    results = [RewardResult(accuracy, 2 * accuracy - 1, "7", "judged") for accuracy in accuracies]
    results += [RewardResult(0.0, -1.0, "", "timeout")] * failed
    return judged(name, results)


def judged(name: str, results: list[RewardResult]) -> Group:
    """A group of the problem of this name with these verdicts."""
    samples = tuple(sample_from_lists([5, 1], [-0.1, -0.2], "stop", 0) for _ in results)
    return Group(make_problem(name), samples).with_results(results)


def make_problem(name: str) -> Problem:
    """A problem whose id is `name`."""
    return Problem(name, "2+5=?", prompt_ids([2]), "7", "sums")
