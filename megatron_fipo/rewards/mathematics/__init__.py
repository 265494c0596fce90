"""Mathematical equality of two answers in text: text → tokens → reading (with the parser) → comparison (with equality).

Imported only by the verifier of this rule, since it imports sympy.
"""

from megatron_fipo.rewards.mathematics.comparison import canonical, same
from megatron_fipo.rewards.mathematics.reading import read
from megatron_fipo.rewards.mathematics.text import LONGEST_ANSWER, find_answer, plain_text, undress

__all__ = ["LONGEST_ANSWER", "find_answer", "judge"]


def judge(answer: str, ground_truth: str, tolerance: float = 0.0) -> tuple[bool, str]:
    """Whether an answer of at most LONGEST_ANSWER characters is the ground truth, and the answer's form for voting."""
    answer = undress(answer)
    given = read(answer)
    try:
        form = canonical(given)
    except ValueError:
        form = plain_text(answer)
    if len(ground_truth) > LONGEST_ANSWER:
        return answer == ground_truth.strip(), form
    truth = undress(ground_truth)
    is_same_text = plain_text(answer) == plain_text(truth) != ""
    return is_same_text or same(given, read(truth), tolerance), form
