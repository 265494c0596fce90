"""Small judged groups for the tests of this folder."""

from megatron_fipo.samples import Group, Judgement, Problem, Response


def make_group(
    answers: str, right: str, name: str = "p", source: str = "toy", lengths: list[int] | None = None
) -> Group:
    """A group with one response a character: its answer; a space is no answer, T a check that timed out, C one that
    crashed, L an answer too long to be judged anything but wrong.
    """
    lengths = lengths or [3] * len(answers)
    judgements = []
    for answer in answers:
        hit = float(answer == right)
        outcome = {"T": "timeout", "C": "crash", "L": "too_long"}.get(answer, "judged")
        judgements.append(Judgement(accuracy=hit, reward=2 * hit - 1, answer=answer.strip(), outcome=outcome))
    return Group(
        problem=Problem(id=name, text="4+5=?", token_ids=[1, 2], ground_truth=right, data_source=source),
        responses=[Response.from_lists([7] * length, [-0.5] * length, "stop", 4) for length in lengths],
        judgements=judgements,
        text=[f"I say {answer}" for answer in answers],
    )
