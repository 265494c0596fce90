r"""Why: the reward is the algorithm; a rule that differs from the published one on some strings is another experiment.

Compares with published_rule.py, and with values of the published rule that are written down here. Mathematical equality
is tests/rewards/mathematics.
"""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_fipo.rewards.extraction import last_answer_line, last_answer_tag, last_boxed, normalise_answer
from megatron_fipo.rewards.rules import exact_match
from tests.rewards import published_rule

# What the rule looks for, whole and in part, and what it must not take for it.
TRICKY = [
    *[
        "Answer:",
        "answer :",
        "ANSWER\t:\n",
        "Anſwer:",
        "answer",
        ":",
        "an ",
        "a ",
        "n ",
        ".$",
        "$",
        r"\$",
        r"\ ",
        " ",
        "\n",
    ],
    *["\t", "\r", "\x85", "\u2028", "\xa0", "mbox", r"\text{", r"\text{and}", r",\text{and}", r"\text{m}", r"\textbf{"],
    *[
        r"\overline{",
        r"\boxed{",
        r"\fbox{",
        "{",
        "}",
        "}}",
        "frac",
        r"\frac",
        "frac1",
        "sqrt",
        r"\sqrt",
        "sqrt3",
        "12",
        "34",
    ],
    *[
        "1",
        "²",
        "٣",
        "½",
        ",",
        ".",
        "=",
        "-",
        "square",
        "ways",
        r"\ldots",
        r"\dots",
        "sue",
        "cm",
        r"^\circ",
        r"^{\circ}",
    ],
    *[r"\;", r",\!", "{,}", '"', r"\mathrm{th}", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", "\\text{\n}"],
    *[r"\text{}", "childrentickets", "chi", "ldrentickets", "degre", "es", "x", "or", "units", "\\", "[INVALID]", "é"],
]
PIECES = st.one_of(st.sampled_from(TRICKY), st.text(max_size=3))
TEXTS = st.lists(PIECES, max_size=15).map("".join)
RESPONSES = st.builds(lambda before, after, tail: f"{before}Answer:{after}{tail}", TEXTS, TEXTS, TEXTS)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(answer=TEXTS)
@example("\\text{\n}")
@example("\\boxed{1\n}")
def test_the_normal_form_is_the_published_one(answer):
    assert normalise_answer(answer) == published_rule.normal_form(answer)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(response=st.one_of(TEXTS, RESPONSES), truth=TEXTS, data=st.data())
def test_exact_match_is_the_published_rule(response, truth, data):
    # A truth of chance is nearly always wrong: others are made from the answer, in several dresses.
    answer = exact_match(response, truth, {}).answer
    truth = data.draw(
        st.sampled_from([truth, answer, f"x = {answer}", rf"\boxed{{{answer}}}", f"{answer} ", "[INVALID]"])
    )
    assert exact_match(response, truth, {}).accuracy == published_rule.is_right(response, truth)


def test_the_comparison_tells_a_lenient_rule_from_the_published_one():
    """Balanced braces at the end, as once here, and space stripped early: both are seen by the two tests above."""
    assert published_rule.normal_form(r"\boxed{12} or \boxed{34}") == r"12}or\boxed{34"
    assert published_rule.normal_form("\t1,2") == "1,2"
    assert published_rule.normal_form("1,2") == "12"


@pytest.mark.parametrize(
    ("text", "truth", "accuracy", "answer"),
    [
        ("4+5=9. Answer: 9", "9", 1.0, "9"),
        ("Answer: 8", "9", 0.0, "8"),
        (r"Answer: \boxed{34}.", "34", 0.0, "34."),
        (r"Answer: \boxed{12} or \boxed{34}", "34", 0.0, r"12}or\boxed{34"),
        (r"Answer: $\boxed{34}$", "34", 1.0, "34"),
        (r"Answer: $\boxed{34}$.", "34", 1.0, "34"),
        (r"Answer: \fbox{34}", "34", 0.0, r"\fbox{34}"),
        (r"\boxed{34}", "34", 0.0, ""),
        ("Answer: 1,000", "1000", 1.0, "1000"),
        ("Answer:\t1,000", "1000", 1.0, "1000"),
        ("Answer: 1,000\t", "1000", 0.0, "1,000"),
        ("Answer: 34\r", "34", 1.0, "34"),
        ("Answer: 0.5", r"\frac12", 0.0, "0.5"),
        ("Answer: $34$ or $35$", "34", 1.0, "34"),
        ("Answer: x - 2y + 3 = 0", "0", 1.0, "0"),
        ("Answer: 34. Answer: 35", "34", 0.0, "34.Answer:35"),
        ("Answer: 34\nAnswer: 35", "35", 1.0, "35"),
        ("**Answer:** 42", "42", 0.0, "**42"),
        ("it is 9", "9", 0.0, ""),
        ("it is 9", "[INVALID]", 1.0, ""),
        ("Answer: 9" + " " * 291, "9", 1.0, "9"),
        ("Answer: 9" + " " * 292, "9", 0.0, ""),
        ("Answer: 9", "x = 9 dollars", 1.0, "9"),
    ],
)
def test_cases_of_the_published_rule(text, truth, accuracy, answer):
    verdict = exact_match(text, truth, {})
    assert (verdict.accuracy, verdict.answer, verdict.outcome) == (accuracy, answer, "judged")
    assert published_rule.is_right(text, truth) == accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("(1,2)", "(1,2)"),
        ("x = 5", "5"),
        ("$-3$.", "-3"),
        (r"\$42 dollars", "42"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac{3}{4}", r"\frac{3}{4}"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\text{east}", "east"),
        (r"\text{a{b}c}", r"a{bc}"),
        (r"90^\circ", "90"),
        ("10 \\text{ cm}", "10"),
        ("the value is $15$ units", "15"),
        ("1\n$2$", "1\n2"),
    ],
)
def test_normal_forms(answer, normal):
    assert normalise_answer(answer) == published_rule.normal_form(answer) == normal


REPEATED = [
    *[
        "1",
        "$",
        "$1",
        r"\text{",
        r"\text{x}",
        "\\text{\n",
        r"\boxed{",
        r"\boxed{}",
        r"\overline{",
        "}",
        "frac",
        "sqrt",
        "a ",
    ],
    *["=", "\n", " ", "Answer", "Answer:", "Answer:\n", "Answer ", "<answer>", "</answer>"],
]


@pytest.mark.parametrize("piece", REPEATED)
def test_the_work_is_linear_in_the_text(piece):
    """At 200,000 characters anything quadratic takes minutes; this takes some milliseconds each."""
    text = piece * (200_000 // len(piece))
    begin = time.process_time()
    for function in (normalise_answer, last_answer_line, last_answer_tag, last_boxed):
        function(text)
    exact_match(text, text, {})
    assert time.process_time() - begin < 3.0


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
        (r"\boxed{1} then \fbox{ 2 }", "2"),
        (r"\boxed{1", None),
        ("none", None),
    ],
)
def test_last_boxed_balances_braces(text, answer):
    assert last_boxed(text) == answer


def test_last_answer_tag_spans_lines():
    assert last_answer_tag("<answer>1</answer> <answer>\n1 2\n3 4\n</answer>") == "1 2\n3 4"
    assert last_answer_tag("<answer>a<answer>b</answer></answer>") == "a<answer>b"
    assert last_answer_tag("<ANSWER>1</Answer><answer>2") == "1"
    assert last_answer_tag("</answer><answer>1") is None
