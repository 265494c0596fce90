r"""Why: which part of a response is its answer, that a degenerate one costs no deadline, and what the tolerance does.

Pairs of answers: test_pairs.py. The same under the deadline of a real verifier: tests/rewards/test_pool.py.
"""

import time

import pytest

from megatron_fipo.rewards.mathematics import LONGEST_ANSWER, judge
from megatron_fipo.rewards.rules import math_verify

# Long enough that anything quadratic would be seen, and a hundred times what a judgement may cost.
MOST_SECONDS = 5.0


@pytest.mark.parametrize(
    "text",
    [
        "Answer: 42",
        "answer :  42 \nThanks.",
        "Answer: 41\nNo, wait.\nANSWER: 42",
        "Answer: 41. No: Answer: 42",
        "**Answer:** 42",
        "**Answer**: 42",
        "**Answer: 42**",
        "### Final Answer: **42**.",
        "Answer：42。",
        "Answer:\n42",
        "Answer:\n\\[\n 42\n\\]\nDone.",
        "Answer:\n$$\n42\n$$",
        r"\[Answer: 241-199\]",
        r"$\text{Answer: } 42$",
        r"\textbf{Answer:} 42",
        r"\boxed{Answer: 42}",
        r"Answer: \boxed{42}.",
        "Answer: `42`\nAnswer:",
        "Answer: The answer is $42$.",
        r"so \boxed{41} or rather \boxed{42} holds",
        r"\fbox{42}",
        r"\boxed{\frac{84}{2}}",
        "Answer: $\n42\n$",
        "*Answer: 42*",
        "***Final Answer: 42***",
        "(Answer: 42)",
        '"Answer: 42"',
        "<b>Answer:</b> 42",
        "Answer:\n```text\n42\n```",
        "<answer>42</answer>",
        "\\boxed{41} <answer>it is \\boxed{42}</answer>",
        "<answer>Answer: 42</answer>",
        "<think>Answer: 41</think><answer>42</answer>",
        "<answer>41</answer> No. Answer: 42",
        "Answer:\n\\begin{align*}\nx &= 42\n\\end{align*}",
    ],
)
def test_the_answer_is_found_in_its_dress(text):
    assert math_verify(text, "42", {}).accuracy == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "it is 42",
        "",
        "Answer:",
        r"\boxed{42",
        "Answer: 42\nAnswer: 41",
        r"Answer: 41 \boxed{42}",
        "The answer is 42",
        "Answer: 42 is one of them",
    ],
)
def test_what_is_not_the_answer_is_wrong(text):
    assert math_verify(text, "42", {}).accuracy == 0.0


def test_an_answer_above_the_limit_is_wrong_and_says_so():
    longest = "7" * LONGEST_ANSWER
    assert math_verify(f"Answer: {longest}", longest, {}).accuracy == 1.0
    verdict = math_verify(f"Answer: {longest}7", f"{longest}7", {})
    assert (verdict.accuracy, verdict.answer, verdict.outcome) == (0.0, "", "too_long")
    assert math_verify(f"Answer: {longest}\n{longest}", longest, {}).outcome == "judged"


DEGENERATE = {
    "one line of answers": "Answer: so x is 3 and " * 5000,
    "many lines of answers": "Answer: so x is 3 and\n" * 5000,
    "only answers": "Answer:" * 50_000,
    "digits": "Answer: " + "7" * 100_000,
    "digits within the limit": "Answer: " + "7" * 950,
    "root of many digits": r"Answer: \sqrt{" + "7" * 900 + "}",
    "nested braces": "Answer: " + "{" * 10_000 + "}" * 10_000,
    "nested braces within the limit": "Answer: " + "{" * 450 + "1" + "}" * 450,
    "open fractions": "Answer: " + r"\frac{" * 150,
    "nested fractions": "Answer: " + r"\frac{1}{1+" * 35 + "x" + "}" * 35,
    "open brackets": "Answer: " + "(" * 900,
    "a tower": "Answer: " + "9^{" * 150 + "9" + "}" * 150,
    "a tower without braces": "Answer: " + "9^" * 400 + "9",
    "a tower of variables": "Answer: " + "x^{" * 30 + "x" + "}" * 30,
    "exponentials": "Answer: " + "e^{" * 20 + "10" + "}" * 20,
    "a huge factorial": "Answer: 99999999!",
    "nested factorials": "Answer: " + "(" * 30 + "4" + "!)" * 30,
    "a huge power": "Answer: (2^{19999})^{19999}",
    "a huge angle": r"Answer: \sin(10^{6000})",
    "a huge hyperbolic cosine": r"Answer: \cosh(2006!)",
    "a huge binomial": r"Answer: \binom{10^{9}}{10^{8}}",
    "a fraction to the power of a variable": r"Answer: (n\%)^{x}",
    "a huge number to the power of a variable": r"Answer: (2008!)^{z}",
    "a function of a huge number": r"Answer: x = f(2006!) or x = f(2005!)",
    "many boxes": r"\boxed{" * 30_000,
    "many closed boxes": r"Answer: " + r"\boxed{1}" * 100,
    "a long sum": "Answer: " + "1+" * 490 + "x",
    "a large product": "Answer: " + "(x+y+1)(x-1)" * 80,
    "a high power of a sum": "Answer: (x+y+z+1)^{999}",
    "many numbers": "Answer: " + "1," * 490 + "1",
    "many roots": "Answer: " + ",".join(rf"\sqrt{{{i}}}" for i in range(2, 95)),
    "a set of many roots": r"Answer: \{" + ",".join(rf"\sqrt{{{i}}}" for i in range(2, 60)) + r"\}",
    "a sum of many roots": "Answer: " + "+".join(rf"\sqrt[{i}]{{{i + 1}}}" for i in range(2, 40)),
    "many intervals": "Answer: " + r"\cup".join(f"({i},{i + 1})" for i in range(80)),
    "functions of functions": "Answer: " + r"\sin" * 240 + "x",
    "minus signs": "Answer: " + "-" * 900 + "1",
    "bars": "Answer: " + "|" * 900,
    "equations": "Answer: " + r"\sqrt{2}=" * 100 + r"\sqrt{2}",
    "plus or minus": "Answer: " + r"\pm " * 200,
    "asterisks": "Answer: " + "*" * 200_000,
    "dollars": "Answer: " + "$" * 900,
    "answers of an asterisk": "Answer: *\n" * 50_000,
    "only tags": "<answer>" * 50_000,
    "many answers in asterisks": "***Answer: 1" * 20_000,
    "an open delimiter": "Answer: $\n" + "x\n" * 100_000,
    "empty lines": "Answer:" + "\n" * 200_000,
    "spaces": "Answer: 1" + " " * 100_000 + "2",
}


@pytest.mark.parametrize("text", DEGENERATE.values(), ids=DEGENERATE.keys())
@pytest.mark.parametrize("truth", ["34", r"\sqrt{2}+\sqrt{3}", r"\{1,2\}", "x^2+1"])
def test_a_degenerate_answer_is_wrong_at_once(text, truth):
    begin = time.perf_counter()
    verdict = math_verify(text, truth, {})
    assert verdict.accuracy == 0.0
    assert verdict.outcome in ("judged", "too_long")
    assert time.perf_counter() - begin < MOST_SECONDS


@pytest.mark.parametrize(
    ("answer", "truth", "tolerance", "is_right"),
    [
        ("0.333", r"\frac{1}{3}", 0.0, False),
        ("0.333", r"\frac{1}{3}", 0.01, True),
        (r"\frac{1}{3}", "0.333", 0.01, True),
        ("0.34", r"\frac{1}{3}", 0.01, False),
        ("3.14", r"\pi", 0.001, True),
        ("33.3%", r"\frac13", 0.01, True),
        ("(0.333, 2)", r"(\frac13, 2)", 0.01, True),
        ("333", "334", 0.01, False),
        (r"\frac{333}{1000}", r"\frac{1}{3}", 0.01, False),
        ("0.333x", r"\frac{x}{3}", 0.01, False),
        ("0", "0.001", 0.1, False),
    ],
)
def test_the_tolerance_is_for_numbers_of_which_one_is_a_decimal(answer, truth, tolerance, is_right):
    assert judge(answer, truth, tolerance)[0] == is_right


@pytest.mark.parametrize(
    "truth", ["12:00", "1/0", r"\frac{0}{0}", r"\log 0", r"\tan\frac{\pi}{2}", r"\infty - \infty", "?"]
)
def test_a_truth_without_a_value_is_compared_as_text(truth):
    assert math_verify(f"Answer: ${truth}$.", truth, {}).accuracy == 1.0
    assert [math_verify(f"Answer: {other}", truth, {}).accuracy for other in ("0", "1", "2/0", "nan")] == [0.0] * 4


def test_a_truth_above_the_limit_is_no_crash():
    assert math_verify("Answer: 7", "7" * 5000, {}).accuracy == 0.0


@pytest.mark.parametrize(
    "forms",
    [
        ["0.5", r"\frac12", "$1/2$", "x = 0.5", r"\boxed{\frac{2}{4}}", "50%"],
        [r"\sqrt{8}", r"2\sqrt2", r"$\sqrt8$."],
        ["1, 2", "2 or 1", "x = 2, x = 1", r"\{1,2\}"],
        ["Tuesday", r"\text{tuesday}"],
        ["34", "34.", "**34**"],
    ],
)
def test_equal_answers_vote_together(forms):
    assert len({math_verify(f"Answer: {form}", "7", {}).answer for form in forms}) == 1


def test_different_answers_do_not_vote_together():
    forms = ["1", "-1", "12", "1, 2", "(1,2)", "[1,2]", "(2,1)", r"\frac13", "0.333", "x", "x = y", "yes", "3000!"]
    assert len({math_verify(f"Answer: {form}", "7", {}).answer for form in forms}) == len(forms)
