"""Whether two sympy expressions are equal: refuted by numbers, or proved. What is neither counts as different.

Numbers refute fast, so that only expressions which agree to fifty digits cost an attempt at a proof.
"""

import math

import mpmath
import sympy
from sympy.core.expr import Expr
from sympy.core.function import AppliedUndef

from megatron_fipo.rewards.mathematics.parser import SYMPY_REFUSES

_DIGITS = 50
# Where variables are tried: far from where different functions agree by chance; both signs, for roots and moduli.
_PLACES = [sympy.Rational(*place) for place in ((7919, 5471), (-6971, 9181), (3571, 8819), (-8837, 5743), (4877, 3331))]
_TRIES = 4
_MOST_TERMS = 2000
_MOST_OPERATIONS = 80
_MOST_PROOF_BITS = 60_000


def equal(left: Expr, right: Expr) -> bool:
    """Whether the two are the same number, or the same function of their variables."""
    if left == right:
        return True
    if left.is_Rational and right.is_Rational:
        return False
    # An unknown function may have any value: each of its terms is a variable.
    unknown = left.atoms(AppliedUndef) | right.atoms(AppliedUndef)
    terms = {term: sympy.Dummy(str(term), real=True) for term in unknown}
    left, right = left.xreplace(terms), right.xreplace(terms)
    try:
        return agree_numerically(left, right) and is_zero(left - right)
    except SYMPY_REFUSES:
        return False


def agree_numerically(left: Expr, right: Expr) -> bool:
    """Whether the two agree to many digits at a few places, wherever both have values, and both have one somewhere."""
    variables = sorted(left.free_symbols | right.free_symbols, key=str)
    agreed = False
    for turn in range(_TRIES if variables else 1):
        places = {name: _PLACES[(turn + index) % len(_PLACES)] for index, name in enumerate(variables)}
        a, b = _number(left, places), _number(right, places)
        if a is None or b is None:
            continue
        if abs(a - b) > mpmath.mpf(10) ** (10 - _DIGITS) * max(abs(a), abs(b), 1):
            return False
        agreed = True
    return agreed


def is_zero(difference: Expr) -> bool:
    """Whether it can be proved to be 0. Bounded: an expression that would grow too large is not proved."""
    if difference == 0:
        return True
    if _terms(difference) > _MOST_TERMS:
        return False
    difference = sympy.expand(difference)
    if difference == 0 or _is_zero_radical(difference):
        return True
    numerator, _ = sympy.fraction(sympy.together(difference))
    if _terms(numerator) <= _MOST_TERMS and sympy.expand(numerator) == 0:
        return True
    return bool(difference.count_ops() <= _MOST_OPERATIONS and sympy.simplify(difference) == 0)


def _number(value: Expr, places: dict[sympy.Symbol, sympy.Rational]) -> mpmath.mpc | None:
    """Its value to fifty digits where variables have these values; None where it has none."""
    # Not by substitution, after which sympy would look for exact roots of large fractions.
    number = value.evalf(_DIGITS, subs=places, maxn=4 * _DIGITS)
    real, imaginary = number.as_real_imag()
    if not (real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite):
        return None
    with mpmath.workdps(_DIGITS):
        return mpmath.mpc(mpmath.mpmathify(real), mpmath.mpmathify(imaginary))


def _terms(value: Expr) -> float:
    """A bound on the number of terms after multiplying out."""
    if value.is_Add:
        return sum(_terms(part) for part in value.args)
    if value.is_Mul:
        return math.prod(_terms(part) for part in value.args)
    if value.is_Pow:
        terms = _terms(value.base)
        if terms == 1:
            return 1.0
        return min(terms, 1e9) ** min(abs(int(value.exp)), 30) if value.exp.is_Integer else terms
    return 1.0


def _is_zero_radical(value: Expr) -> bool:
    """Whether an expression of numbers, roots, i and sines of rational angles is 0, by a separation bound.

    Such a number is 0 or larger than (u^(D−1) l)^−1 (Burnikel, Fleischer, Mehlhorn, Schirra, 2000), so that it is 0 if
    it is smaller than that. D² stands for D here, which leaves a wide margin.
    """
    bound = _Bound()
    try:
        upper, lower = bound.of(value)
    except _NotAlgebraic:
        return False
    bits = int(upper * bound.degree**2 + lower) + 1
    if bits > _MOST_PROOF_BITS:
        return False
    # Guard digits for what is lost in each operation.
    with mpmath.workprec(bits + 64 + int(upper + lower) + value.count_ops()):
        return bool(abs(_evaluate(value)) < mpmath.mpf(2) ** -bits)


class _NotAlgebraic(Exception):
    """Neither a number nor made of numbers by roots and the four operations."""


class _Bound:
    """log2 of bounds u and l on the conjugates of numerator and denominator, and the degree of the roots met."""

    def __init__(self) -> None:
        self._roots: set[Expr] = set()
        self._degree_of_roots = 1
        self._unity = 1

    @property
    def degree(self) -> int:
        """Of the field that all of them lie in, at most."""
        return self._degree_of_roots * int(sympy.totient(self._unity))

    def of(self, value: Expr) -> tuple[float, float]:
        if value.is_Rational:
            return math.log2(max(abs(value.p), 1)), math.log2(value.q)
        if value is sympy.I:
            return self._root_of_unity(sympy.Rational(1, 2), 0.0)
        if value.func is sympy.exp:
            return self._root_of_unity(value.args[0] / (sympy.I * sympy.pi), 0.0)
        if value.func in (sympy.cos, sympy.sin, sympy.tan):
            return self._root_of_unity(value.args[0] / sympy.pi, 1.0)
        if value.is_Add:
            parts = [self.of(part) for part in value.args]
            lower = sum(part[1] for part in parts)
            return max(part[0] - part[1] + lower for part in parts) + math.log2(len(parts)), lower
        if value.is_Mul:
            parts = [self.of(part) for part in value.args]
            return sum(part[0] for part in parts), sum(part[1] for part in parts)
        if value.is_Pow and value.exp.is_Rational:
            return self._of_power(value)
        raise _NotAlgebraic

    def _of_power(self, value: Expr) -> tuple[float, float]:
        upper, lower = self.of(value.base)
        times, root = abs(value.exp.p), value.exp.q
        if root > 1:
            self._extend(value.base ** sympy.Rational(1, root), root)
            # (U/L)^(1/k) = (U L^(k−1))^(1/k) / L
            upper = (upper + lower * (root - 1)) / root
        return (lower * times, upper * times) if value.exp.is_negative else (upper * times, lower * times)

    def _extend(self, root: Expr, degree: int) -> None:
        if root not in self._roots:
            self._roots.add(root)
            self._degree_of_roots *= degree

    def _root_of_unity(self, half_turns: Expr, bound: float) -> tuple[float, float]:
        """For what is made of e^(iπ·half_turns) and i, with this bound on numerator and denominator."""
        if not half_turns.is_Rational or half_turns.q > 1000:
            raise _NotAlgebraic
        self._unity = math.lcm(self._unity, 4 * half_turns.q)
        return bound, bound


def _evaluate(value: Expr) -> mpmath.mpc:
    if value.is_Rational:
        return mpmath.mpf(int(value.p)) / int(value.q)
    if value is sympy.I:
        return mpmath.mpc(0, 1)
    if value.func is sympy.exp:
        half_turns = value.args[0] / (sympy.I * sympy.pi)
        return mpmath.expjpi(mpmath.mpf(int(half_turns.p)) / int(half_turns.q))
    if value.func in (sympy.cos, sympy.sin, sympy.tan):
        half_turns = value.args[0] / sympy.pi
        return getattr(mpmath, value.func.__name__)(mpmath.pi * int(half_turns.p) / int(half_turns.q))
    if value.is_Add:
        return mpmath.fsum(_evaluate(part) for part in value.args)
    if value.is_Mul:
        return mpmath.fprod(_evaluate(part) for part in value.args)
    return mpmath.power(_evaluate(value.base), mpmath.mpf(int(value.exp.p)) / int(value.exp.q))
