"""What an answer is once it has been read: immutable, exact, and not yet compared with anything."""

from dataclasses import dataclass

import sympy
from sympy.core.expr import Expr

_LARGEST_END = 10**100


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


def to_real_set(reading: Reading) -> sympy.Set | None:
    """The set of real numbers that is meant where a set is expected; None if it is none."""
    if isinstance(reading, RealSet):
        return reading.set
    if not isinstance(reading, Several) or not all(isinstance(item, Value) for item in reading.items):
        return None
    values = [item.expression for item in reading.items if isinstance(item, Value)]
    if reading.brackets == r"\{\}" and all(map(is_quickly_placed, values)):
        return sympy.FiniteSet(*values)
    if reading.brackets in ("()", "[]", "(]", "[)") and len(values) == 2:
        return interval(*values, left_open=reading.brackets[0] == "(", right_open=reading.brackets[1] == ")")
    return None


def interval(start: Expr, end: Expr, *, left_open: bool, right_open: bool) -> sympy.Set | None:
    """None if it is empty: whoever writes (3, 1) does not mean the empty set."""
    if not start.is_extended_real or not end.is_extended_real:
        return None
    if not is_quickly_placed(start) or not is_quickly_placed(end) or (end - start).is_extended_positive is False:
        return None
    return sympy.Interval(start, end, left_open, right_open)


def is_quickly_placed(value: Expr) -> bool:
    """Whether sympy finds the place of a number among others at once: beside a logarithm, 2006! takes it long."""
    return all(max(abs(number.p), number.q) < _LARGEST_END for number in value.atoms(sympy.Rational))
