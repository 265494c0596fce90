r"""Why: a parser that reads one expression as another makes wrong answers right without anybody noticing.

Trees of exact arithmetic are written in LaTeX in many ways, and Python's Fraction says what they are worth. Whole
answers: test_pairs.py.
"""

from collections.abc import Callable
from fractions import Fraction

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.rewards.mathematics.equality import equal, is_zero
from megatron_fipo.rewards.mathematics.parser import parse_expression
from megatron_fipo.rewards.mathematics.text import undress
from megatron_fipo.rewards.mathematics.tokens import Unreadable, tokenise

Node = tuple[str, Fraction, int]
"""LaTeX, value, and how tightly its outermost operation binds: 0 sum, 1 product, 2 atom."""
ZERO = Fraction(0)


def parse(text: str) -> sympy.Expr:
    return parse_expression(tokenise(undress(text)))


def in_brackets(node: Node, binding: int, brackets: str = "()") -> str:
    left, right = (r"\left(", r"\right)") if brackets == "left" else brackets
    return node[0] if node[2] >= binding else f"{left}{node[0]}{right}"


def numbers() -> st.SearchStrategy[Node]:
    whole = st.integers(0, 99).map(lambda n: (str(n), Fraction(n), 2))
    decimal = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(
        lambda n: (f"{n[0]}.{n[1]:02}", Fraction(n[0] * 100 + n[1], 100), 2)
    )
    percent = st.integers(0, 99).map(lambda n: (rf"{n}\%", Fraction(n, 100), 2))
    mixed = st.tuples(st.integers(1, 9), st.integers(1, 4)).map(
        lambda n: (rf"{n[0]}\frac{{{n[1]}}}{{5}}", n[0] + Fraction(n[1], 5), 1)
    )
    return st.one_of(whole, whole, decimal, percent, mixed)


def combine(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    brackets = st.sampled_from(["()", "[]", "{}", "left"])

    def sum_of(a: Node, b: Node, sign: str, style: str) -> Node:
        value = a[1] + b[1] if sign == "+" else a[1] - b[1]
        return f"{a[0]} {sign} {in_brackets(b, 1, style)}", value, 0

    def product_of(a: Node, b: Node, sign: str, style: str) -> Node:
        return f"{in_brackets(a, 1, style)}{sign} {in_brackets(b, 1, style)}", a[1] * b[1], 1

    def implicit_product_of(a: Node, b: Node) -> Node:
        return f"({a[0]})({b[0]})", a[1] * b[1], 1

    def quotient_of(a: Node, b: Node, command: str) -> Node:
        if b[1] == 0:
            return a
        if command == "/":
            return f"({a[0]})/({b[0]})", a[1] / b[1], 1
        return rf"{command}{{{a[0]}}}{{{b[0]}}}", a[1] / b[1], 2

    def power_of(a: Node, exponent: int) -> Node:
        if exponent < 0 and a[1] == 0:
            return a
        return (
            f"({a[0]})^{{{exponent}}}" if a[1] or exponent else "1",
            a[1] ** exponent if a[1] or exponent else ZERO + 1,
            2,
        )

    def negative_of(a: Node) -> Node:
        return f"-{in_brackets(a, 1)}", -a[1], 0

    def modulus_of(a: Node) -> Node:
        return rf"\left|{a[0]}\right|", abs(a[1]), 2

    return st.one_of(
        st.builds(sum_of, children, children, st.sampled_from("+-"), brackets),
        st.builds(product_of, children, children, st.sampled_from([r"\cdot", r"\times", "*"]), brackets),
        st.builds(implicit_product_of, children, children),
        st.builds(quotient_of, children, children, st.sampled_from([r"\frac", r"\dfrac", "/"])),
        st.builds(power_of, children, st.integers(-2, 3)),
        st.builds(negative_of, children),
        st.builds(modulus_of, children),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(numbers(), combine, max_leaves=10))
def test_arithmetic_has_the_value_that_python_gives_it(node):
    value = parse(node[0])
    assert (value.p, value.q) == (node[1].numerator, node[1].denominator)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", -4),
        ("2x^2", 2 * sympy.Symbol("x", real=True) ** 2),
        (r"\sin 2x", sympy.sin(2 * sympy.Symbol("x", real=True))),
        (r"\sin^2 x", sympy.sin(sympy.Symbol("x", real=True)) ** 2),
        (r"\sin^{-1} \frac12", sympy.pi / 6),
        (r"\sin 30^\circ + 1", sympy.Rational(3, 2)),
        (r"\log_{2} 8 + 1", sympy.log(8) / sympy.log(2) + 1),
        (r"2\ln 3 \cdot 4", 8 * sympy.log(3)),
        (r"\sqrt[3]{-8}", -2),
        (r"\frac12", sympy.Rational(1, 2)),
        (r"\frac\pi2", sympy.pi / 2),
        ("10^-2", sympy.Rational(1, 100)),
        ("1e-5", sympy.Rational(1, 100000)),
        ("2e-5", 2 * sympy.E - 5),
        ("3!/3", 2),
        ("-2 3/4", sympy.Rational(-11, 4)),
        ("xy", sympy.Symbol("x", real=True) * sympy.Symbol("y", real=True)),
        ("+\\infty", sympy.oo),
    ],
)
def test_what_is_written_is_read(text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *[
            "1/2x",
            "1/2(x+1)",
            "2^3^2",
            "3 4",
            "x 2",
            "3!!",
            "x^2!",
            r"\sin x/2",
            r"2\frac{3}{2}",
            r"\frac123",
            r"\sqrt12",
        ],
        *[
            "1/0",
            "0/0",
            "0^0",
            r"\log 0",
            r"\tan 90^\circ",
            r"\infty - \infty",
            r"2\infty",
            "9^{9^9}",
            "3001!",
            "12:00",
        ],
        *["", "(", ")", "1)", "(1", r"\frac{1}", r"\frac", "1+", "*2", "2..3", "1.2.3", "=", "|x", r"\foo", "é", "\\"],
        *[
            "102_2",
            "5_1",
            "x_{",
            r"\int x",
            r"\begin{pmatrix}1\end{pmatrix}",
            "Tuesday + 1",
            "f(x,y)",
            "5 cm + 3",
            "1,2",
        ],
    ],
)
def test_what_has_two_meanings_or_none_is_not_read(text):
    with pytest.raises(Unreadable):
        parse(text)


@pytest.mark.parametrize(
    ("left", "right", "are_equal"),
    [
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", True),
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}+10^{-100}}", False),
        (r"\cos\frac{2\pi}{7}+\cos\frac{4\pi}{7}+\cos\frac{6\pi}{7}", r"-\frac12", True),
        (r"\sqrt{10^{90}+1}-10^{45}", r"\frac{1}{2\cdot10^{45}}", False),
        (r"\frac{1}{\sqrt{10^{90}+1}+10^{45}}", r"\sqrt{10^{90}+1}-10^{45}", True),
        (r"\sqrt{i}", r"\frac{1+i}{\sqrt2}", True),
        (r"\sqrt[5]{2}", r"\sqrt[5]{2+10^{-80}}", False),
        ("x^2", r"x^2+10^{-70}", False),
        (r"\sqrt{(x-1)^2}", "x-1", False),
        ("f(x)+f(y)", "f(y)+f(x)", True),
        ("f(x)", "f(y)", False),
    ],
)
def test_agreement_of_digits_is_no_equality(left, right, are_equal):
    assert equal(parse(left), parse(right)) == are_equal
    assert is_zero(parse(left) - parse(right)) == are_equal


def test_an_expression_too_large_to_prove_is_not_equal():
    product: Callable[[str], str] = lambda sign: "".join(f"(x{sign}{n})(y{sign}{n})(z+{n})" for n in range(1, 20))  # noqa: E731
    assert not is_zero(parse(product("+")) - parse(product("-")))
