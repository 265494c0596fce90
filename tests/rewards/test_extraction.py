"""Why: the reward is only as right as the answer that is found, and models are trained to whatever is found.

Does not cover sympy: tests/rewards/test_rules.py does.
"""

import pytest

from megatron_fipo.rewards.extraction import last_answer_line, last_answer_tag, last_boxed, normalise_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 7", "7"),
        ("answer :  7 \nthanks", "7"),
        ("Answer: 3\nno, wait.\nANSWER: 4", "4"),
        ("Answer:\n12", "12"),
        ("the answer is 7", None),
        ("", None),
    ],
)
def test_last_answer_line(text, answer):
    assert last_answer_line(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} holds", r"\frac{1}{2}"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed{1", None),
        ("none", None),
    ],
)
def test_last_boxed_balances_braces(text, answer):
    assert last_boxed(text) == answer


def test_last_answer_tag_spans_lines():
    assert last_answer_tag("<answer>1</answer> <answer>\n1 2\n3 4\n</answer>") == "1 2\n3 4"
    assert last_answer_tag("<answer>1") is None


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("7", "7"),
        ("1,234", "1234"),
        ("(1,2)", "(1,2)"),
        ("x = 5", "5"),
        ("$-3$.", "-3"),
        (r"\$42 dollars", "42"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac{3}{4}", r"\frac{3}{4}"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\text{east}", "east"),
        (r"\boxed{12}", "12"),
        (r"90^\circ", "90"),
        ("10 \\text{ cm}", "10"),
        ("the value is $15$ units", "15"),
    ],
)
def test_normal_form_follows_minerva(answer, normal):
    assert normalise_answer(answer) == normal


def test_different_answers_keep_different_normal_forms():
    forms = [normalise_answer(answer) for answer in ("1", "-1", "12", r"\frac12", r"\frac13", "0.5", r"\sqrt2")]
    assert len(set(forms)) == len(forms)
