r"""Says whether two readings are the same answer, and writes a reading down for voting.

"Same" is mathematical equality: of numbers and functions, of sets without order, of tuples, intervals and matrices in
order, of equations up to a constant factor. On top of it, and no more: a name (`x = 5`) or a unit (`5 cm`) that only
one side gives is dress.
"""

from collections.abc import Callable, Sequence

import sympy
from sympy.core.expr import Expr

from megatron_fipo.rewards.mathematics.equality import equal
from megatron_fipo.rewards.mathematics.parser import symbol
from megatron_fipo.rewards.mathematics.records import (
    Named,
    Reading,
    RealSet,
    Relation,
    Several,
    Text,
    Value,
    to_real_set,
)

_UNORDERED = ("list", r"\{\}")


def same(left: Reading, right: Reading, tolerance: float) -> bool:
    """Whether both are the same answer. `tolerance`: relative to the larger of two numbers, one of them a decimal."""
    if isinstance(left, Named) or isinstance(right, Named):
        return _same_named(left, right, tolerance)
    if isinstance(left, Value) and isinstance(right, Value):
        return _same_value(left, right, tolerance)
    if isinstance(left, Relation) and isinstance(right, Relation):
        return _same_relation(left, right)
    if isinstance(left, RealSet) or isinstance(right, RealSet):
        one, other = to_real_set(left), to_real_set(right)
        return one is not None and other is not None and _same_set(one, other, tolerance)
    if isinstance(left, Several) and isinstance(right, Several):
        return _same_several(left, right, tolerance)
    return isinstance(left, Text) and left == right and left.text != ""


def canonical(reading: Reading) -> str:
    """The same string for the same answer as far as cheap signs tell, so that equal answers vote together.

    ValueError if it holds an integer of more digits than Python writes.
    """
    if isinstance(reading, Named):
        return canonical(reading.of)
    if isinstance(reading, Several):
        items = [
            f"{item.name} = {canonical(item)}" if isinstance(item, Named) else canonical(item) for item in reading.items
        ]
        opening, closing = tuple(reading.brackets) if len(reading.brackets) == 2 else ("(", ")")
        if reading.brackets in _UNORDERED:
            items, opening, closing = sorted(items), "{", "}"
        return f"{opening}{', '.join(items)}{closing}"
    if isinstance(reading, Relation):
        return f"{reading.difference} {reading.sign} 0"
    if isinstance(reading, Text):
        return reading.text
    return str(reading.expression if isinstance(reading, Value) else reading.set)


def _same_named(left: Reading, right: Reading, tolerance: float) -> bool:
    if isinstance(left, Named) and isinstance(right, Named) and left.name == right.name:
        return same(left.of, right.of, tolerance)
    equations = _as_equation(left), _as_equation(right)
    if equations[0] and equations[1]:
        return _same_relation(equations[0], equations[1])
    if isinstance(left, Named) and isinstance(right, Named):
        return False
    bare_left = left.of if isinstance(left, Named) else left
    bare_right = right.of if isinstance(right, Named) else right
    return same(bare_left, bare_right, tolerance)


def _as_equation(reading: Reading) -> Relation | None:
    """y = 2x as 2x - y = 0, to compare it with equations; None for what is no equation of variables."""
    if isinstance(reading, Named) and isinstance(reading.of, Value) and reading.name.isidentifier():
        return Relation("=", symbol(reading.name) - reading.of.expression)
    return reading if isinstance(reading, Relation) else None


def _same_value(left: Value, right: Value, tolerance: float) -> bool:
    if left.unit and right.unit and left.unit != right.unit:
        return False
    a, b = left.expression, right.expression
    if tolerance > 0 and (left.is_decimal or right.is_decimal) and _is_real_number(a) and _is_real_number(b):
        return bool(abs(a - b).evalf(30) <= sympy.Rational(tolerance) * max(abs(a).evalf(30), abs(b).evalf(30)))
    return equal(a, b)


def _is_real_number(value: Expr) -> bool:
    """Whether it is a finite real number without variables."""
    return bool(value.is_number and value.is_real)


def _same_relation(left: Relation, right: Relation) -> bool:
    """Whether one is a multiple of the other, for inequalities a positive one."""
    if left.sign != right.sign or left.difference.is_number or right.difference.is_number:
        return False
    factor = _constant_factor(left.difference, right.difference)
    if factor is None or (left.sign in (">", ">=") and not factor.is_positive):
        return False
    return equal(left.difference, factor * right.difference)


def _constant_factor(left: Expr, right: Expr) -> Expr | None:
    """The number that `left` is times `right`, if there is one; found at one place, and not yet proved."""
    if any(power.exp.free_symbols for power in (left * right).atoms(sympy.Pow)):
        return None
    variables = sorted(left.free_symbols | right.free_symbols, key=str)
    places = {name: sympy.Rational(2 * index + 7, index + 3) for index, name in enumerate(variables)}
    above, below = left.xreplace(places), right.xreplace(places)
    zero = sympy.Integer(0)
    if equal(above, zero) or equal(below, zero):
        return None
    factor = above / below
    return factor if factor.is_real else None


def _same_set(left: sympy.Set, right: sympy.Set, tolerance: float) -> bool:
    if left == right:
        return True
    parts = _parts(left), _parts(right)
    if parts[0] is None or parts[1] is None:
        return False
    return _match(parts[0], parts[1], lambda a, b: same(a, b, tolerance))


def _parts(whole: sympy.Set) -> list[Reading] | None:
    """Its disjoint intervals and points, each as a reading; None for any other set."""
    parts: list[Reading] = []
    for part in whole.args if isinstance(whole, sympy.Union) else (whole,):
        if isinstance(part, sympy.Interval):
            brackets = f"interval {part.left_open} {part.right_open}"
            parts.append(Several(brackets, (Value(part.start), Value(part.end))))
        elif isinstance(part, sympy.FiniteSet):
            parts += [Value(point) for point in part.args]
        else:
            return None
    return parts


def _same_several(left: Several, right: Several, tolerance: float) -> bool:
    kinds = {left.brackets, right.brackets}
    if kinds == {r"\{\}"}:
        # In a set an element counts once.
        lone = [_without_repetition(each.items, tolerance) for each in (left, right)]
        return _match(lone[0], lone[1], lambda a, b: same(a, b, tolerance))
    if len(left.items) != len(right.items):
        return False
    # x = 1, y = 2 beside 1, 2: the order says which is which.
    names = [{item.name if isinstance(item, Named) else "" for item in each.items} for each in (left, right)]
    is_in_order = {""} in names and any(len(each) > 1 for each in names)
    if kinds <= set(_UNORDERED) and not is_in_order:
        return _match(left.items, right.items, lambda a, b: same(a, b, tolerance))
    if len(kinds) > 1 and kinds != {"list", "()"}:
        return False
    return all(same(a, b, tolerance) for a, b in zip(left.items, right.items, strict=True))


def _without_repetition(items: Sequence[Reading], tolerance: float) -> list[Reading]:
    kept: list[Reading] = []
    for item in items:
        if not any(same(item, other, tolerance) for other in kept):
            kept.append(item)
    return kept


def _match(left: Sequence[Reading], right: Sequence[Reading], agree: Callable[[Reading, Reading], bool]) -> bool:
    """Whether each of the one has its own partner in the other."""
    free = list(right)
    for item in left:
        partner = next((index for index, other in enumerate(free) if agree(item, other)), None)
        if partner is None:
            return False
        del free[partner]
    return not free
