r"""Reads an answer into its structure: a value, a text, a list, tuple, set or matrix of answers, an equation.

The pieces are found by commas, connectives and relations outside of brackets; the parser reads what is left. What has
no reading is a text. comparison.py says which of the results are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import sympy
from sympy.core.expr import Expr
from sympy.core.function import AppliedUndef

from megatron_fipo.rewards.mathematics.equality import equal
from megatron_fipo.rewards.mathematics.parser import SYMPY_REFUSES, parse_expression, parse_name
from megatron_fipo.rewards.mathematics.records import (
    Named,
    Reading,
    RealSet,
    Relation,
    Several,
    Text,
    Value,
    interval,
    is_quickly_placed,
    to_real_set,
)
from megatron_fipo.rewards.mathematics.text import plain_text
from megatron_fipo.rewards.mathematics.tokens import Token, Unreadable, tokenise
from megatron_fipo.rewards.mathematics.vocabulary import CURRENCIES

_OPENING = frozenset(("(", "[", r"\{", "<|", "{"))
_CLOSING = frozenset((")", "]", r"\}", "|>", "}"))
_RELATIONS = frozenset(("=", "<", ">", "<=", ">=", "!=", "in", "approx"))
_SET_OPERATIONS = frozenset(("cup", "cap", "setminus"))
_MOST_ITEMS = 100
_MATRICES = ("pmatrix", "bmatrix", "matrix", "array")


def read(text: str) -> Reading:
    """The structure of an undressed answer."""
    try:
        return _read_list(tokenise(text))
    except Unreadable:
        return Text(plain_text(text))


def _read_list(tokens: Sequence[Token]) -> Reading:
    if sum(token.text in (",", ";", "or", "and", "cup") for token in tokens) >= _MOST_ITEMS:
        raise Unreadable("too many parts")
    if not tokens:
        raise Unreadable("nothing")
    # The comma of "1, 2, and 3" separates nothing.
    follows = [token.kind == "connective" for token in tokens[1:]] + [False]
    tokens = [token for token, last in zip(tokens, follows, strict=True) if not (last and token.text == ",")]
    pieces = _split(tokens, lambda token: token.kind == "connective" or token.text in (",", ";"))
    items = [reading for piece in pieces for reading in _read_with_sign(piece)]
    if len(items) == 1:
        return items[0]
    names = {item.name for item in items if isinstance(item, Named)}
    named = sum(isinstance(item, Named) for item in items)
    if 1 < len(names) < named:
        return _read_alternatives(tokens)
    if 1 < len(names) == named and any(token.text == "or" for token in tokens):
        raise Unreadable("values of different variables of which one holds")
    if len(names) == 1 and isinstance(items[0], Named):
        # x = 1 or x = 2; x = 1, 2
        values = tuple(item.of if isinstance(item, Named) else item for item in items)
        if all(isinstance(value, RealSet) for value in values):
            connectives = {token.text for token in tokens if token.kind == "connective"}
            return Named(items[0].name, _combine(values, connectives))
        return Named(items[0].name, Several("list", values))
    return Several("list", tuple(items))


def _read_alternatives(tokens: Sequence[Token]) -> Reading:
    """x = 1, y = 2 or x = 2, y = 1: what belongs together is between the "or"s, or between semicolons."""
    separator = next((mark for mark in ("or", ";") if any(token.text == mark for token in tokens)), None)
    if separator is None:
        raise Unreadable("which of the values belong together")
    return Several("list", tuple(_read_list(part) for part in _split(tokens, lambda token: token.text == separator)))


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
    if not signs or _are_in_sets(tokens):
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


def _are_in_sets(tokens: Sequence[Token]) -> bool:
    """Whether each ± belongs to an element of a set in braces."""
    depth = 0
    for token in tokens:
        depth += (token.text == r"\{") - (token.text == r"\}")
        if depth == 0 and token.text in ("pm", "mp"):
            return False
    return True


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
        return Named(_tuple_name(sides[0]) or _name_of(sides[0]), _as_set(_read_side(sides[1])))
    return _read_inequality(sides, signs)


def _read_equation(sides: Sequence[Sequence[Token]], is_approximate: bool) -> Reading:
    """x = 5, 5 = x and x = 10/2 = 5 name a value; 10/2 = 5 is one; anything else with two sides is an equation."""
    name = parse_name(sides[0]) or _tuple_name(sides[0])
    if name is not None:
        values = [_read_side(side) for side in sides[1:]]
        if len(values) > 1:
            _check_all_equal(values)
        return _named(name, values[-1])
    if len(sides) == 2 and (name := parse_name(sides[1])) is not None:
        return _named(name, _read_side(sides[0]))
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


def _named(name: str, value: Reading) -> Reading:
    """x = 5; but x = 2x − 5 is an equation."""
    if isinstance(value, Value):
        own = next((term for term in value.expression.atoms(sympy.Symbol, AppliedUndef) if str(term) == name), None)
        if own is not None:
            return Relation("=", own - value.expression)
    return Named(name, value)


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
    between = interval(lower, upper, left_open=signs[1] == ">", right_open=signs[0] == ">")
    is_known = len(values) == 3 and set(signs) <= {">", ">="} and not (upper.free_symbols | lower.free_symbols)
    if not is_known or not middle.is_Symbol or between is None:
        raise Unreadable("a chain of relations")
    return Named(str(middle), RealSet(between))


def _read_single_inequality(left: Expr, right: Expr, sign: str) -> Reading:
    if not is_quickly_placed(left) or not is_quickly_placed(right):
        return Relation(sign, left - right)
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
            items = tuple(item for part in inside for item in _read_with_sign(part))
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
            and _name_of_element(parts[0]) == condition.name
        ):
            return condition.of
        raise Unreadable("the condition of a set")
    inside = _split(tokens, lambda token: token.text in (",", ";"))
    return Several(r"\{\}", tuple(_read_relation(part) for part in inside))


def _name_of_element(tokens: Sequence[Token]) -> str | None:
    """Of x, or of x ∈ ℝ."""
    name, *domain = _split(tokens, lambda token: token.text == "in")
    is_real = all(_special_set([token.text for token in part]) == RealSet(sympy.S.Reals) for part in domain)
    return parse_name(name) if is_real else None


def _read_value(tokens: Sequence[Token]) -> Value:
    unit = ""
    sign = [token for token in tokens[:1] if token.text in ("-", "+")]
    rest = tokens[len(sign) :]
    if len(rest) > 1 and rest[0].text in CURRENCIES.values() and rest[0].kind == "unit":
        unit, tokens = rest[0].text, [*sign, *rest[1:]]
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
    if list(texts) == ["mathbb", "{", "R", "}"] or list(texts) == ["mathbb", "R"]:
        return RealSet(sympy.S.Reals)
    return None


def _read_set_operation(tokens: Sequence[Token]) -> Reading:
    """From left to right; mixed operations have no order of their own."""
    signs = [token.text for token in _outer(tokens) if token.text in _SET_OPERATIONS]
    if len(set(signs)) != 1 or (signs[0] == "setminus" and len(signs) > 1):
        raise Unreadable("which set operation comes first")
    sides = _split(tokens, lambda token: token.text in _SET_OPERATIONS)
    sets = [to_real_set(_read_side(_with_set_braces(side))) for side in sides]
    if any(part is None or part.free_symbols or part.has(AppliedUndef) for part in sets):
        raise Unreadable("an operation on something else than sets of numbers")
    operation = {"cup": sympy.Union, "cap": sympy.Intersection, "setminus": sympy.Complement}[signs[0]]
    try:
        return RealSet(operation(*sets))
    except SYMPY_REFUSES:
        raise Unreadable("sets that sympy cannot compute") from None


def _with_set_braces(tokens: Sequence[Token]) -> Sequence[Token]:
    r"""{3} beside a ∪ is \{3\}."""
    if not tokens or tokens[0].text != "{" or _closing_place(tokens) != len(tokens) - 1:
        return tokens
    return [replace(tokens[0], text=r"\{"), *tokens[1:-1], replace(tokens[-1], text=r"\}")]


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
