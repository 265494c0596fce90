"""Small judged groups for the tests of this folder."""

from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, RewardResult, sample_from_lists


def make_group(
    answers: str, right: str, name: str = "p", source: str = "toy", lengths: list[int] | None = None
) -> Group:
    """Make a group with one response per character, which is its answer. A space means no answer, T a check that timed
    out, C a check that crashed, and L an answer that is too long and therefore wrong.
    """
    lengths = lengths or [3] * len(answers)
    results = []
    for answer in answers:
        hit = float(answer == right)
        outcome = {"T": "timeout", "C": "crash", "L": "too_long"}.get(answer, "judged")
        results.append(RewardResult(accuracy=hit, reward=2 * hit - 1, answer=answer.strip(), outcome=outcome))
    problem = Problem(id=name, text="4+5=?", token_ids=prompt_ids([1, 2]), ground_truth=right, data_source=source)
    samples = tuple(sample_from_lists([7] * length, [-0.5] * length, "stop", 4) for length in lengths)
    return Group(problem, samples).with_texts([f"I say {answer}" for answer in answers]).with_results(results)
