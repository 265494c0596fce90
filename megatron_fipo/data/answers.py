r"""The right answer of a row, as text. Other values are refused: otherwise responses would be compared with them.

"34", "\frac{1}{2}", "[0, 1)"     texts are kept
34, 34.0, 0.5, 1e20               finite numbers become plain digits: 34, 34, 0.5, 100000000000000000000
true, NaN, [34], {"a": 1}, null   refused
'["34"]', "{'a': 1}", 'nan'       refused: a list, an object or a missing value that a program has written as text
'"34"', 'np.float64(34.0)'        refused for the same reason
"""

import ast
import json
import math
import re
import warnings
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from megatron_fipo.data.kinds import kind_of
from megatron_fipo.data.messages import are_messages, role_and_content

_LONGEST_EXPONENT = 400
"""Largest number of decimal places that is written out. Every float64 fits."""

_MISSING_VALUES = frozenset({"None", "null", "NULL", "NaN", "nan", "NaT", "<NA>", "N/A", "#N/A"})
_BRACKETS = ("[]", "{}", "()")
_QUOTES = ('""', "''", "b'", 'b"')
_NUMPY_VALUE = re.compile(r"\b((np|numpy)\.\w+|array|tensor|Decimal|Fraction)\(")
"""How numpy and similar libraries print a value, also inside a list: [np.float64(34.0)]."""

_GSM8K_MARK = "####"
_WITH_COMMAS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_LONGEST_LITERAL = 10_000
_BOX = re.compile(r"\\f?boxed\s*|\\fbox\s*")


def completion_text(value: Any) -> Any:
    """Return the text of a completion that is one chat message of the assistant. Return other values unchanged.

    Raises ValueError for other messages.
    """
    if not are_messages(value):
        return value
    messages = [role_and_content(message) for message in value]
    if len(messages) > 1 or messages[0][0] != "assistant":
        roles = ", ".join(str(role)[:20] for role, _ in messages[:5])
        raise ValueError(f"is {len(messages)} chat messages ({roles}); a completion is one, of the assistant's")
    return messages[0][1]


def answer_text(value: Any, answer_format: str, pattern: str | None = None) -> str:
    """Return the answer in `value` as text, by `data.answer_format`: plain, gsm8k, boxed, or the match of `pattern`.

    Raises ValueError, which says what is wrong with the value and what would be right.
    """
    if value is None:
        raise ValueError("the answer is missing")
    if answer_format == "plain":
        text = _scalar_text(value)
        if _GSM8K_MARK in text:
            raise ValueError(f"{_quoted(text)} is a worked solution of GSM8K's form; data.answer_format=gsm8k reads it")
    elif not isinstance(value, str):
        raise ValueError(f"is {_kind(value)}; data.answer_format={answer_format} reads the answer from a text")
    elif answer_format == "pattern":
        text = _last_match(value, pattern or "")
    else:
        text = _after_mark(value) if answer_format == "gsm8k" else _last_boxed(value)
    text = text.strip()
    _check_text(text)
    return text


def _scalar_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal) or (isinstance(value, Real) and not isinstance(value, bool)):
        return _plain_number(value)
    raise ValueError(f"is {_kind(value)}; an answer is a text or a number")


def _plain_number(value: Any) -> str:
    """Return digits without an exponent. 34.0 becomes 34, since columns with gaps store integers as floats."""
    if isinstance(value, Integral):
        try:
            return str(int(value))
        except ValueError as error:  # Python prints no more than some thousand digits
            raise ValueError(f"is a whole number of too many digits ({error})") from None
    # str is the shortest text that reads as the same number, also for a numpy float32.
    number = value if isinstance(value, Decimal) else Decimal(str(value))
    if not number.is_finite():
        raise ValueError(f"is {value}, no finite number")
    if number and abs(number.adjusted()) > _LONGEST_EXPONENT:
        raise ValueError(f"is {value}, which has too many digits to write out")
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _after_mark(solution: str) -> str:
    """Return GSM8K's answer: the text after the last ####. Thousands separators of a number are removed."""
    _, mark, text = solution.rpartition(_GSM8K_MARK)
    text = text.strip()
    if not mark or not text or "\n" in text:
        raise ValueError(f"has no one-line answer after {_GSM8K_MARK}, which data.answer_format=gsm8k reads")
    return text.replace(",", "") if _WITH_COMMAS.fullmatch(text) else text


def _last_match(solution: str, pattern: str) -> str:
    """Return the group of `pattern` in its last match."""
    found = [match[1] for match in re.finditer(pattern, solution) if match[1] is not None]
    if not found:
        raise ValueError(f"{_quoted(solution)} has nothing that data.answer_pattern={pattern!r} finds")
    return found[-1]


def _last_boxed(solution: str) -> str:
    r"""Return MATH's answer: the content of the last \boxed{…} or \fbox{…}. \boxed 5 contains one character."""
    boxes = list(_BOX.finditer(solution))
    if not boxes:
        raise ValueError(r"has no \boxed{…}, which data.answer_format=boxed reads")
    start = boxes[-1].end()
    if not solution.startswith("{", start):
        # TeX takes only one character here, but an author of \boxed 12 or \boxed\frac12 means more.
        character, after = solution[start : start + 1], solution[start + 1 : start + 2]
        if character and (not character.isalnum() or after.isalnum()):
            raise ValueError(r"has a \boxed without braces around more than one character; \boxed{…} holds an answer")
        return character
    depth, position = 0, start
    while position < len(solution):
        if solution[position] == "\\":
            position += 1  # \{ and \} are braces in the text
        else:
            depth += {"{": 1, "}": -1}.get(solution[position], 0)
            if depth == 0:
                return solution[start + 1 : position]
        position += 1
    raise ValueError(r"has a \boxed{ that is never closed")


def _check_text(text: str) -> None:
    if not text:
        raise ValueError("the answer is missing: it is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is not valid Unicode text ({error.reason})") from None
    if not any(char.isprintable() and not char.isspace() for char in text):
        raise ValueError(f"the answer is missing: {text[:20]!a} has no visible character")
    if text in _MISSING_VALUES:
        raise ValueError(f"is {text!r}, the text of a missing value")
    if problem := _literal_problem(text):
        raise ValueError(
            f"{_quoted(text)} is {problem}; an answer is one text or number, and data.answer_format=pattern can find it"
        )


def _literal_problem(text: str) -> str | None:
    """Describe the list, object or quoted text that a program has written as `text`; None for mathematics.

    Two or more numbers in brackets, such as [0, 1], (2, 3) or [[1, 2], [3, 4]], are an interval, a point or a matrix.
    Numbers in braces are a set. With any other content, it is the text of a program's value.
    """
    if match := _NUMPY_VALUE.search(text):
        return f"how a program writes a value, {match[1]}(…)"
    if len(text) > _LONGEST_LITERAL or text[0] + text[-1] not in (*_BRACKETS, *_QUOTES):
        return None
    value = _parsed(text)
    if isinstance(value, str | bytes):
        return "a text in quotation marks, as a program writes it"
    if isinstance(value, dict):
        return "the text of a JSON object"
    if isinstance(value, list | tuple) and len(value) < 2:
        return f"the text of a list of {len(value)}"
    if isinstance(value, list | tuple | set) and not all(map(_is_numeric, value)):
        return "the text of a list of other things than numbers"
    return None


def _parsed(text: str) -> Any:
    """Return the value of a JSON text or a Python literal; None for all other texts."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about backslashes, which are frequent in LaTeX
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numeric, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return f"{kind_of(value)} {value}" if isinstance(value, bool) else kind_of(value)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}")
