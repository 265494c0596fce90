"""What an answer is once it has been read: immutable, exact, and not yet compared with anything."""

from dataclasses import dataclass

import sympy
from sympy.core.expr import Expr


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
    if reading.brackets == r"\{\}":
        return sympy.FiniteSet(*values)
    is_interval = reading.brackets in ("()", "[]", "(]", "[)") and len(values) == 2
    if is_interval and all(value.is_extended_real for value in values):
        return sympy.Interval(*values, reading.brackets[0] == "(", reading.brackets[1] == ")")
    return None
