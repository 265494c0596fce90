"""Why: "right" has to mean mathematically equal, and "wrong" must not be due to dress; either error teaches itself.

The table is pairs.py. Whole responses, limits, tolerance: test_math_verify.py. Deadlines: tests/rewards/test_pool.py.
"""

import pytest

from megatron_fipo.rewards.rules import math_verify
from tests.rewards.mathematics.pairs import DIFFERENT, SAME


def cases(table: dict[str, list[tuple[str, str]]]) -> list:
    pairs = [(kind, pair) for kind, pairs in table.items() for pair in pairs]
    both = [(kind, pair) for kind, (a, b) in pairs for pair in dict.fromkeys([(a, b), (b, a)])]
    return [pytest.param(*pair, id=f"{kind}: {pair[0]} | {pair[1]}") for kind, pair in both]


def judge(answer: str, truth: str) -> float:
    verdict = math_verify(f"It follows from the above.\nAnswer: {answer}", truth, {})
    assert verdict.outcome == "judged"
    return verdict.accuracy


@pytest.mark.parametrize(("answer", "truth"), cases(SAME))
def test_the_same_answer_in_another_form_is_right(answer, truth):
    assert judge(answer, truth) == 1.0


@pytest.mark.parametrize(("answer", "truth"), cases(DIFFERENT))
def test_another_answer_is_wrong(answer, truth):
    assert judge(answer, truth) == 0.0


@pytest.mark.parametrize(("kind", "pairs"), SAME.items(), ids=str)
def test_every_form_is_right_against_itself(kind, pairs):
    assert all(judge(answer, answer) == 1.0 for pair in pairs for answer in pair)


def test_the_table_is_large_enough_to_mean_something():
    same, different = (sum(map(len, table.values())) for table in (SAME, DIFFERENT))
    assert same >= 150 and different >= 120
