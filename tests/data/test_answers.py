"""Why: if a value that is not an answer is silently turned into text, every response to its problem is wrong."""

import datetime
from decimal import Decimal
from typing import Any

import numpy
import pytest

from megatron_fipo.data.answers import answer_text

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("34", "34"),
        ("  x + 1 \n", "x + 1"),
        (34, "34"),
        (-7, "-7"),
        (0, "0"),
        (10**30, "1" + "0" * 30),
        (33.0, "33"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (100.0, "100"),
        (1e20, "100000000000000000000"),
        (1.5e-7, "0.00000015"),
        (1e16, "10000000000000000"),
        (Decimal("33.10"), "33.1"),
        (Decimal("1E+3"), "1000"),
        (Decimal("0.12345678901234567890123"), "0.12345678901234567890123"),
        (numpy.float32(0.1), "0.1"),
        (numpy.float16(0.1), "0.1"),
        (numpy.float64(2.5), "2.5"),
        (numpy.uint8(200), "200"),
        (numpy.int64(-3), "-3"),
        # Mathematics that is also JSON or Python.
        ("[0, 1]", "[0, 1]"),
        ("[0, 1)", "[0, 1)"),
        ("(2, -3.5)", "(2, -3.5)"),
        (r"\{1, 2\}", r"\{1, 2\}"),
        ("{1, 2}", "{1, 2}"),
        ("[[1, 2], [3, 4]]", "[[1, 2], [3, 4]]"),
        (r"[\frac{1}{2}, 1]", r"[\frac{1}{2}, 1]"),
        ("(34)", "(34)"),
        (r"\text{None}", r"\text{None}"),
        ("33.0", "33.0"),
    ],
)
def test_texts_are_kept_and_numbers_become_plain_digits(value: Any, text: str) -> None:
    assert answer_text(value, "plain") == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the answer is missing"),
        ("", "the answer is missing"),
        (" \n", "the answer is missing"),
        (True, "is a truth value True"),
        (numpy.bool_(False), "is a value of type bool"),
        (NAN, "is nan, no finite number"),
        (-INFINITY, "no finite number"),
        (numpy.float32(NAN), "no finite number"),
        (Decimal("NaN"), "no finite number"),
        (Decimal("1e999999"), "too many digits"),
        (["34"], "is a list"),
        ([], "is a list"),
        ({"a": 1}, "is an object"),
        ((1, 2), "is a list"),
        (b"34", "is bytes"),
        (datetime.date(2026, 1, 31), "is a value of type date"),
        (1 + 2j, "is a value of type complex"),
        ('["34"]', "the text of a list of 1"),
        ("[34]", "the text of a list of 1"),
        ("[]", "the text of a list of 0"),
        ('["a", "b"]', "the text of a list of other things"),
        ("['a', 'b']", "the text of a list of other things"),
        ("[true, false]", "the text of a list of other things"),
        ("[null, 1]", "the text of a list of other things"),
        ('[1, ["a"]]', "the text of a list of other things"),
        ("{'a'}", "the text of a list of other things"),
        ('{"answer": 42}', "the text of a JSON object"),
        ("{'answer': 42}", "the text of a JSON object"),
        ("{}", "the text of a JSON object"),
        *((text, "text of a missing value") for text in ("None", "nan", "NaN", "null", "<NA>")),
        ("\ud800", "not valid Unicode"),
        ("6 * 7 = 42\n#### 42", "data.answer_format=gsm8k reads it"),
        ("#### 42", "data.answer_format=gsm8k reads it"),
    ],
)
def test_what_is_no_answer_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer_text(value, "plain")


def test_a_whole_number_that_python_does_not_write_out_is_refused() -> None:
    with pytest.raises(ValueError, match="too many digits"):
        answer_text(10**5000, "plain")


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### 1,000", "1000"),
        ("#### -1,234,567.5", "-1234567.5"),
        ("####5 ", "5"),
        ("#### 3\nno\n#### 4", "4"),
        ("#### 1,2", "1,2"),
    ],
)
def test_gsm8k_answers_follow_the_mark(solution: str, text: str) -> None:
    assert answer_text(solution, "gsm8k") == text


@pytest.mark.parametrize("solution", ["42", "####", "#### ", "#### 4\nand more", 42, ["#### 4"], True])
def test_what_is_not_gsm8ks_form_is_refused(solution: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.answer_format=gsm8k"):
        answer_text(solution, "gsm8k")


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        (r"so \boxed{34}.", "34"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\fbox{5}", "5"),
        (r"\boxed 7.", "7"),
        (r"\boxed {x}", "x"),
    ],
)
def test_boxed_answers(solution: str, text: str) -> None:
    assert answer_text(solution, "boxed") == text


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        ("34", r"has no \\boxed"),
        (r"\boxed{3", "never closed"),
        (r"\boxed{}", "missing"),
        (r"\boxed", "missing"),
        (3, "data.answer_format=boxed"),
    ],
)
def test_what_has_no_box_is_refused(solution: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer_text(solution, "boxed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"34"', "a text in quotation marks"),
        ("'34'", "a text in quotation marks"),
        ("b'34'", "a text in quotation marks"),
        ('"a", "b"', "list of other things than numbers"),
        ("[np.float64(34.0)]", r"how a program writes a value, np\.float64"),
        ("array([34, 35])", "how a program writes a value, array"),
        ("Decimal('3')", "how a program writes a value, Decimal"),
        ("NULL", "text of a missing value"),
        ("N/A", "text of a missing value"),
        ("NaT", "text of a missing value"),
        ("\u200b", r"'\\u200b' has no visible character"),
        ("\x00", r"'\\x00' has no visible character"),
    ],
)
def test_what_another_program_wrote_of_a_value_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer_text(text, "plain")


@pytest.mark.parametrize("text", ["f''(x)", "5'", r"\begin{array}{c}1\end{array}", "A'B'", "\u221e", "025"])
def test_mathematics_with_marks_is_no_programs_value(text: str) -> None:
    assert answer_text(text, "plain") == text


@pytest.mark.parametrize("solution", [r"so \boxed 12", r"so \boxed\frac12", r"so \boxed(3)"])
def test_a_box_without_braces_holds_one_character_or_is_refused(solution: str) -> None:
    with pytest.raises(ValueError, match="without braces"):
        answer_text(solution, "boxed")
    assert answer_text(r"so $\boxed 5$.", "boxed") == "5"
