"""The tests of a problem, in the form of TACO, APPS and LiveCodeBench, and what passes one.

{"inputs": ["1 2\n"], "outputs": ["3\n"]}                         standard input and output
{"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}            arguments and result of a function
{"inputs": ["1\n2"], "outputs": ["3"], "fn_name": "add"}          the same, as JSON texts, one argument a line
"""

import json
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any


class BadTests(Exception):
    """A row's tests cannot be used. Names the column and says what would be right."""


@dataclass(frozen=True)
class Tests:
    """What a program is run on, and what it has to give."""

    inputs: tuple[Any, ...]
    """Texts for standard input; with `function`, lists of arguments."""
    outputs: tuple[Any, ...]
    """Texts; with `function`, values."""
    function: str | None


def read_tests(columns: dict[str, Any], column: str) -> Tests:
    """The tests in a row's column, an object or its JSON text; a dot in `column` selects a field. Raises BadTests."""
    value: Any = columns
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            raise BadTests(f"the row has no column {column}; reward.code.tests names the column of the tests")
        value = value[name]
    where = f"column {column}"
    if isinstance(value, str):
        value = _json(value, where)
    if not isinstance(value, dict):
        raise BadTests(f"{where} is no object with inputs and outputs")
    inputs, outputs, function = value.get("inputs"), value.get("outputs"), value.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise BadTests(f"{where} needs the lists inputs and outputs, of the same length and not empty")
    if function is None:
        return Tests(tuple(map(_text, inputs)), tuple(map(_text, outputs)), None)
    if not isinstance(function, str) or not function.isidentifier():
        raise BadTests(f"{where}: fn_name {function!r} is no function's name")
    arguments = tuple(_arguments(each, where) for each in inputs)
    # A result that is a text is JSON only beside arguments that are: with arguments as a list, "123" is a text.
    results = tuple(
        _json(result, where) if isinstance(given, str) and isinstance(result, str) else result
        for given, result in zip(inputs, outputs, strict=True)
    )
    return Tests(arguments, results, function)


def passes(output: str, expected: Any, *, is_call: bool) -> bool:
    """Whether a test's output is right: equal lines but for space at their ends, or numbers of the same value.

    A call's output is the JSON of its result. APPS writes some results as lists of one. A program that ended before its
    call did, or wrote to the result's descriptor itself, can leave anything there.
    """
    if is_call:
        try:
            result = json.loads(output)
            return bool(result == expected or (isinstance(expected, list) and expected == [result]))
        except (ValueError, RecursionError):
            return False
    return _lines(output) == _lines(expected)


def _lines(text: str) -> list[list[str | Decimal]]:
    return [[_value(word) for word in line.split()] for line in text.strip().splitlines()]


def _value(word: str) -> str | Decimal:
    """A number's value, else the word. Decimal also reads 1_0, digits of other scripts, and sNaN1, equal to nothing."""
    if not word.isascii() or "_" in word:
        return word
    try:
        number = Decimal(word)
    except InvalidOperation:
        return word
    return number if number.is_finite() else word


def _text(value: Any) -> str:
    """Lines as a list are one text."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        # Not splitlines: JSON may hold U+2028 and its like as they are.
        return [_json(line, where) for line in value.split("\n") if line.strip()]
    if not isinstance(value, list):
        raise BadTests(f"{where}: the arguments of a call are a list, or JSON texts, one a line")
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadTests(f"{where} holds {text[:40]!r}, which is no JSON: {error}") from None
