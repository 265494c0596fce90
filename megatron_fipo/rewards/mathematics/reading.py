r"""Reads an answer into its structure: a value, a text, a list, tuple, set or matrix of answers, an equation.

The pieces are found by commas, connectives and relations outside of brackets; the parser reads what is left. What has
no reading is a text. The readings are records, and comparison.py says what equals what.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy
from sympy.core.expr import Expr
from sympy.core.function import AppliedUndef

from megatron_fipo.rewards.mathematics.equality import equal
from megatron_fipo.rewards.mathematics.parser import SYMPY_REFUSES, parse_expression, parse_name
from megatron_fipo.rewards.mathematics.tokens import Token, Unreadable, tokenise
from megatron_fipo.rewards.mathematics.vocabulary import is_word

_OPENING = frozenset(("(", "[", r"\{", "<|", "{"))
_CLOSING = frozenset((")", "]", r"\}", "|>", "}"))
_RELATIONS = frozenset(("=", "<", ">", "<=", ">=", "!=", "in", "approx"))
_SET_OPERATIONS = frozenset(("cup", "cap", "setminus"))
_CHOICE = re.compile(r"\(([A-Z])\)")
_MOST_ITEMS = 100
_MATRICES = ("pmatrix", "bmatrix", "matrix", "array")


@dataclass(frozen=True)
class Value:
    """A number or a function of variables, exact."""

    expression: Expr
    is_decimal: bool = False
    """Whether it was written as a decimal number, which may be a rounded one."""
    unit: str = ""


@dataclass(frozen=True)
class Text:
    """Words, or what has no mathematical reading here."""

    text: str


@dataclass(frozen=True)
class Several:
    """A list without brackets, or what stands in brackets."""

    brackets: str
    """list, matrix, row, interval, or the opening and the closing bracket."""
    items: tuple["Reading", ...]


@dataclass(frozen=True)
class RealSet:
    """Intervals, points and their unions."""

    set: sympy.Set


@dataclass(frozen=True)
class Named:
    """x = 5, f(x) = 2x, x ∈ [1, 2]: something and what it is called."""

    name: str
    of: "Reading"


@dataclass(frozen=True)
class Relation:
    """An equation, inequation or inequality that is more than a name."""

    sign: str
    """=, !=, > or >=."""
    difference: Expr
    """Left side minus right side."""


Reading = Value | Text | Several | RealSet | Named | Relation


def read(text: str) -> Reading:
    """The structure of an undressed answer."""
    try:
        return _read_list(tokenise(text))
    except Unreadable:
        return Text(plain_text(text))


def plain_text(text: str) -> str:
    r"""An undressed answer as a string to compare: without $ and \text{…}, without spaces but between two words.

    In lower case if it is words alone. Otherwise nothing is dropped: texts that agree in it are the same answer.
    """
    for command in (r"\textbf{", r"\textit{", r"\text{", r"\mathrm{", r"\mbox{"):
        while (start := text.find(command)) >= 0 and (end := text.find("}", start)) >= 0:
            text = f"{text[:start]} {text[start + len(command) : end]} {text[end + 1 :]}"
    text = text.replace(r"\$", "\\dollar ").replace("$", "")
    words = text.split()
    joined = words[0] if words else ""
    for word in words[1:]:
        # "1, 234" is a list and "1,234" a number.
        joined += f" {word}" if (joined[-1].isalnum() or joined[-1] == ",") and word[0].isalnum() else word
    if choice := _CHOICE.fullmatch(joined):
        return choice[1]
    letters = joined.replace(" ", "").replace("-", "").replace("'", "")
    is_words = letters.isalpha() and any(is_word(word) for word in words)
    return joined.casefold() if is_words else joined


def to_real_set(reading: Reading) -> sympy.Set | None:
    """The set of real numbers that is meant where a set is expected; None if it is none."""
    if isinstance(reading, RealSet):
        return reading.set
    if not isinstance(reading, Several) or not all(isinstance(item, Value) for item in reading.items):
        return None
    values = [item.expression for item in reading.items if isinstance(item, Value)]
    if reading.brackets == r"\{\}":
        return sympy.FiniteSet(*values)
    is_interval = reading.brackets in ("()", "[]", "(]", "[)") and len(values) == 2
    if is_interval and all(value.is_extended_real for value in values):
        return sympy.Interval(*values, reading.brackets[0] == "(", reading.brackets[1] == ")")
    return None


def _read_list(tokens: Sequence[Token]) -> Reading:
    if sum(token.text in (",", ";", "or", "and", "cup") for token in tokens) >= _MOST_ITEMS:
        raise Unreadable("too many parts")
    pieces = _split(tokens, lambda token: token.kind == "connective" or token.text in (",", ";"))
    pieces = [piece for piece in pieces if piece] if any(t.kind == "connective" for t in tokens) else pieces
    items = [reading for piece in pieces for reading in _read_with_sign(piece)]
    if len(items) == 1:
        return items[0]
    names = {item.name for item in items if isinstance(item, Named)}
    if len(names) == 1 and isinstance(items[0], Named):
        # x = 1 or x = 2; x = 1, 2
        values = tuple(item.of if isinstance(item, Named) else item for item in items)
        if all(isinstance(value, RealSet) for value in values):
            connectives = {token.text for token in tokens if token.kind == "connective"}
            return Named(items[0].name, _combine(values, connectives))
        return Named(items[0].name, Several("list", values))
    return Several("list", tuple(items))


def _combine(sets: Sequence[Reading], connectives: set[str]) -> Reading:
    """x < 1 or x > 2; x > 1 and x < 2."""
    parts = [part.set for part in sets if isinstance(part, RealSet)]
    if connectives == {"or"}:
        return RealSet(sympy.Union(*parts))
    if connectives == {"and"}:
        return RealSet(sympy.Intersection(*parts))
    raise Unreadable("inequalities without 'or' or 'and'")


def _read_with_sign(tokens: Sequence[Token]) -> list[Reading]:
    """One piece; two where it has a ±, with the upper signs and with the lower."""
    signs = [token for token in tokens if token.text in ("pm", "mp")]
    if not signs:
        return [_read_relation(tokens)]
    if sum(token.text == "pm" for token in signs) != 1:
        raise Unreadable("which signs go together")

    def choose(plus: str) -> list[Token]:
        sign = {"pm": "-", "mp": "-", plus: "+"}
        return [replace(token, kind="operator", text=sign[token.text]) if token in signs else token for token in tokens]

    both: list[Reading] = [_read_relation(choose("pm")), _read_relation(choose("mp"))]
    if all(isinstance(item, Named) for item in both):
        return both
    return [Named(both[0].name, item) if isinstance(both[0], Named) else item for item in both]


def _read_relation(tokens: Sequence[Token]) -> Reading:
    sides = _split(tokens, lambda token: token.text in _RELATIONS)
    signs = [token.text for token in _outer(tokens) if token.text in _RELATIONS]
    if not signs:
        return _read_side(tokens)
    if not sides[0] and signs == ["approx"]:
        return _read_side(sides[1])
    if any(not side for side in sides):
        raise Unreadable("a relation without a side")
    if set(signs) <= {"=", "approx"}:
        return _read_equation(sides, "approx" in signs)
    if signs == ["in"]:
        return Named(_name_of(sides[0]), _as_set(_read_side(sides[1])))
    return _read_inequality(sides, signs)


def _read_equation(sides: Sequence[Sequence[Token]], is_approximate: bool) -> Reading:
    """x = 5, 5 = x and x = 10/2 = 5 name a value; 10/2 = 5 is one; anything else with two sides is an equation."""
    name = parse_name(sides[0]) or _tuple_name(sides[0])
    if name is not None:
        values = [_read_side(side) for side in sides[1:]]
        if len(values) > 1:
            _check_all_equal(values)
        return Named(name, values[-1])
    if len(sides) == 2 and (name := parse_name(sides[1])) is not None:
        return Named(name, _read_side(sides[0]))
    if is_approximate:
        raise Unreadable("what is approximated")
    values = [_read_side(side) for side in sides]
    is_computation = any(len(side) > 1 for side in sides[:-1])
    if is_computation and all(isinstance(value, Value) and value.expression.is_number for value in values):
        _check_all_equal(values)
        return values[-1]
    if len(values) == 2 and isinstance(values[0], Value) and isinstance(values[1], Value):
        return Relation("=", values[0].expression - values[1].expression)
    raise Unreadable("an equation of something else than two values")


def _check_all_equal(values: Sequence[Reading]) -> None:
    numbers = [value.expression for value in values if isinstance(value, Value)]
    if len(numbers) < len(values) or not all(equal(numbers[-1], number) for number in numbers[:-1]):
        raise Unreadable("a chain of equations that does not hold")


def _read_inequality(sides: Sequence[Sequence[Token]], signs: Sequence[str]) -> Reading:
    values = [parse_expression(side) for side in sides]
    if signs[0] in ("<", "<="):
        # From the larger side to the smaller.
        if not set(signs) <= {"<", "<="}:
            raise Unreadable("a chain of relations")
        values = values[::-1]
        signs = [sign.replace("<", ">") for sign in signs[::-1]]
    if len(values) == 2:
        return _read_single_inequality(values[0], values[1], signs[0])
    upper, middle, lower = values[0], values[1], values[-1]
    if (
        len(values) == 3
        and set(signs) <= {">", ">="}
        and middle.is_Symbol
        and upper.is_extended_real
        and lower.is_extended_real
        and not (upper.free_symbols | lower.free_symbols)
    ):
        return Named(str(middle), RealSet(sympy.Interval(lower, upper, signs[1] == ">", signs[0] == ">")))
    raise Unreadable("a chain of relations")


def _read_single_inequality(left: Expr, right: Expr, sign: str) -> Reading:
    if left.is_Symbol and right.is_number and right.is_extended_real:
        sets = {
            "!=": sympy.Complement(sympy.S.Reals, sympy.FiniteSet(right)),
            ">": sympy.Interval.open(right, sympy.oo),
            ">=": sympy.Interval(right, sympy.oo),
        }
        return Named(str(left), RealSet(sets[sign]))
    if right.is_Symbol and left.is_number and left.is_extended_real and sign != "!=":
        return Named(str(right), RealSet(sympy.Interval(-sympy.oo, left, True, sign == ">")))
    return Relation(sign, left - right)


def _name_of(tokens: Sequence[Token]) -> str:
    name = parse_name(tokens)
    if name is None:
        raise Unreadable("what is in the set")
    return name


def _tuple_name(tokens: Sequence[Token]) -> str | None:
    """Of (x, y): its spelling."""
    if len(tokens) < 5 or tokens[0].text != "(" or tokens[-1].text != ")":
        return None
    names = [parse_name(part) for part in _split(tokens[1:-1], lambda token: token.text == ",")]
    return f"({', '.join(name or '' for name in names)})" if all(names) else None


def _as_set(reading: Reading) -> Reading:
    found = to_real_set(reading)
    is_finite = isinstance(reading, Several) and reading.brackets == r"\{\}"
    return reading if found is None or is_finite else RealSet(found)


def _read_side(tokens: Sequence[Token]) -> Reading:
    if not tokens:
        raise Unreadable("nothing")
    if any(token.text in _SET_OPERATIONS for token in tokens):
        return _read_set_operation(tokens)
    if tokens[0].text.startswith("begin "):
        return _read_matrix(tokens)
    if all(token.kind == "word" for token in tokens):
        return Text(plain_text(" ".join(token.text for token in tokens)))
    special = _special_set([token.text for token in tokens])
    if special is not None:
        return special
    if tokens[0].text in _OPENING and _closing_place(tokens) == len(tokens) - 1:
        inside = _split(tokens[1:-1], lambda token: token.text in (",", ";"))
        brackets = tokens[0].text + tokens[-1].text
        if brackets in ("()", "[]") and tokens[1].text.startswith("begin "):
            return _read_matrix(tokens[1:-1])
        if brackets == r"\{\}" and any(token.text == "|" for token in tokens):
            return _read_set_of_all(tokens[1:-1])
        if len(inside) > 1 or brackets in (r"\{\}", "[]"):
            items = tuple(_read_relation(part) for part in inside)
            return Several({"<||>": "()", "{}": r"\{\}"}.get(brackets, brackets), items)
    return _read_value(tokens)


def _read_set_of_all(tokens: Sequence[Token]) -> Reading:
    r"""Inside \{x | x > 2\}; with elements that hold a modulus, a set like any other."""
    parts = _split(tokens, lambda token: token.text == "|")
    if len(parts) == 2:
        condition = _read_list(parts[1])
        if (
            isinstance(condition, Named)
            and isinstance(condition.of, RealSet)
            and parse_name(parts[0]) == condition.name
        ):
            return condition.of
        raise Unreadable("the condition of a set")
    inside = _split(tokens, lambda token: token.text in (",", ";"))
    return Several(r"\{\}", tuple(_read_relation(part) for part in inside))


def _read_value(tokens: Sequence[Token]) -> Value:
    unit = ""
    if tokens[0].text == "dollar" and tokens[0].kind == "unit":
        unit, tokens = "dollar", tokens[1:]
    elif tokens[-1].kind == "unit" and len(tokens) > 1 and not _is_angle_in_function(tokens):
        unit, tokens = tokens[-1].text, tokens[:-1]
    number = [token for token in tokens if token.text not in ("-", "+", "%", "{", "}")]
    is_decimal = len(number) == 1 and number[0].kind == "number" and "." in number[0].text
    return Value(parse_expression(tokens), is_decimal and "\\" not in number[0].text, unit)


def _is_angle_in_function(tokens: Sequence[Token]) -> bool:
    return tokens[-1].text == "degree" and any(token.kind == "function" for token in tokens)


def _special_set(texts: Sequence[str]) -> Reading | None:
    if list(texts) in (["emptyset"], [r"\{", r"\}"]):
        return RealSet(sympy.S.EmptySet)
    if list(texts) == ["mathbb", "{", "R", "}"]:
        return RealSet(sympy.S.Reals)
    return None


def _read_set_operation(tokens: Sequence[Token]) -> Reading:
    """From left to right; mixed operations have no order of their own."""
    signs = [token.text for token in _outer(tokens) if token.text in _SET_OPERATIONS]
    if len(set(signs)) != 1 or (signs[0] == "setminus" and len(signs) > 1):
        raise Unreadable("which set operation comes first")
    sets = [to_real_set(_read_side(side)) for side in _split(tokens, lambda token: token.text in _SET_OPERATIONS)]
    if any(part is None or part.free_symbols or part.has(AppliedUndef) for part in sets):
        raise Unreadable("an operation on something else than sets of numbers")
    operation = {"cup": sympy.Union, "cap": sympy.Intersection, "setminus": sympy.Complement}[signs[0]]
    try:
        return RealSet(operation(*sets))
    except SYMPY_REFUSES:
        raise Unreadable("sets that sympy cannot compute") from None


def _read_matrix(tokens: Sequence[Token]) -> Reading:
    kind = tokens[0].text.removeprefix("begin ")
    if kind not in _MATRICES or _closing_place(tokens) != len(tokens) - 1 or tokens[-1].text != f"end {kind}":
        raise Unreadable(f"the environment {kind}")
    rows = [row for row in _split(tokens[1:-1], lambda token: token.text == r"\\") if row]
    cells = [[_read_side(cell) for cell in _split(row, lambda token: token.text == "&")] for row in rows]
    return Several("matrix", tuple(Several("row", tuple(row)) for row in cells))


def _opens(token: Token) -> bool:
    return token.text in _OPENING or token.text.startswith("begin ")


def _closes(token: Token) -> bool:
    return token.text in _CLOSING or token.text.startswith("end ")


def _outer(tokens: Sequence[Token]) -> list[Token]:
    """The tokens outside of all brackets and environments."""
    found, depth = [], 0
    for token in tokens:
        depth -= _closes(token)
        if depth == 0:
            found.append(token)
        depth += _opens(token)
    return found


def _split(tokens: Sequence[Token], separates: Callable[[Token], bool]) -> list[list[Token]]:
    """The parts between the separators that stand outside of all brackets."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += _opens(token) - _closes(token)
        if depth == 0 and separates(token):
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _closing_place(tokens: Sequence[Token]) -> int:
    """Where the bracket that opens first is closed, by whatever bracket; -1 if it is not."""
    depth = 0
    for place, token in enumerate(tokens):
        depth += _opens(token) - _closes(token)
        if depth == 0:
            return place
    return -1
