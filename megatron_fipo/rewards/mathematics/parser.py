r"""Reads one expression (no comma, no relation) into sympy, exactly: decimals become fractions, nothing is rounded.

A parser of our own, since the readings of the library for this (latex2sympy2_extended 1.11) are no ground for "right":
there `2 3/4` is 5/4, `3 4` is 7, `101_2` is 101, and a word is the product of its letters, so anagrams are equal. Here
what mathematicians read in two ways (`1/2x`, `2^3^2`, `3 4`) is Unreadable. What sympy would evaluate for long
(9^9^9) or to no number (1/0) is Unreadable too. Variables are real numbers, except z and w.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import sympy
from sympy.core.expr import Expr

from megatron_fipo.rewards.mathematics.tokens import Token, Unreadable

SYMPY_REFUSES = (ValueError, TypeError, ArithmeticError, NotImplementedError)
"""How sympy says that it cannot compute or compare something, such as ⌊1/0⌋ or 0/0 < 1."""
_DEEPEST = 40
_LARGEST_FACTORIAL = 3000
_LARGEST_ARGUMENT = 10**6
_MOST_BITS = 20_000
_MOST_ARGUMENT_BITS = 2_000
_MOST_ROOT_BITS = 400
_APPLIED = frozenset("fghFGHPQ")
_MARKS = ("overline", "vec", "hat", "overrightarrow")
_APPLICATION = re.compile(r"[A-Za-z](?:\^\{-1\})?'*\([A-Za-z]\)")
_CONSTANTS = {r"\pi": sympy.pi, "e": sympy.E, "i": sympy.I}
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
# The base of a logarithm that names none is not known: 10 in school, e elsewhere. Its laws hold for any.
_UNKNOWN_BASE = sympy.Symbol("base", positive=True)
_INVERSES = {"sin": sympy.asin, "cos": sympy.acos, "tan": sympy.atan}
_FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {
    **{
        name: getattr(sympy, name)
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "sqrt")
    },
    **{"arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan},
    "ln": sympy.log,
    "log": lambda x: sympy.log(x) / sympy.log(_UNKNOWN_BASE),
    "lg": lambda x: sympy.log(x) / sympy.log(10),
    "exp": lambda x: power(sympy.E, x),
}


def parse_expression(tokens: Sequence[Token]) -> Expr:
    """The value of the whole token list. Unreadable where it has none, or none that can be computed at once."""
    sign, *rest = [token.text for token in tokens] or [""]
    if (rest or [sign]) == ["infty"] and sign in ("+", "-", "infty"):
        return -sympy.oo if sign == "-" else sympy.oo
    reader = _Reader(tokens)
    try:
        value = reader.sum()
    except SYMPY_REFUSES as error:
        raise Unreadable(str(error)) from None
    if reader.kind != "end":
        raise Unreadable(f"{reader.text!r} has no place here")
    if value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        raise Unreadable("no number")
    return value


def parse_name(tokens: Sequence[Token]) -> str | None:
    """The name that the tokens are, such as `x`, `f(x)`, `\\angle ABC` or `Area`; None if they are anything else."""
    if all(token.kind == "word" for token in tokens):
        return " ".join(token.text for token in tokens)
    if _APPLICATION.fullmatch(spelling := "".join(token.text for token in tokens)):
        return spelling
    try:
        value = parse_expression(tokens)
    except Unreadable:
        return None
    is_applied = isinstance(value, sympy.core.function.AppliedUndef)
    return str(value) if value.is_Symbol or is_applied else None


def symbol(name: str) -> sympy.Symbol:
    """The variable of that name."""
    return sympy.Symbol(name) if name[0] in "zw" else sympy.Symbol(name, real=True)


def power(base: Expr, exponent: Expr) -> Expr:
    """base^exponent, unless its digits or its evaluation would be out of all proportion."""
    if base == 0 and exponent == 0:
        raise Unreadable("0^0")
    if exponent.is_Rational:
        if base.is_Rational and exponent.is_Integer:
            _bound(abs(int(exponent)) * _size(base) <= _MOST_BITS)
        elif exponent.is_Integer:
            _bound(abs(int(exponent)) <= 1000)
        else:
            # Of a number sympy looks for factors.
            _bound(max(abs(exponent.p), exponent.q) <= 60 and (not base.is_Rational or _size(base) <= _MOST_ROOT_BITS))
    elif exponent.is_number:
        _bound(abs(exponent.evalf(15)) <= 1000)
    else:
        _bound(not any(inner.exp.free_symbols for inner in exponent.atoms(sympy.Pow, sympy.exp)))
    return base**exponent


def _size(value: sympy.Rational) -> int:
    """In bits."""
    return int(max(abs(value.p).bit_length(), value.q.bit_length()))


def _bound(holds: bool) -> None:
    if not holds:
        raise Unreadable("too large to evaluate")


def _factorial(value: Expr) -> Expr:
    _bound(_counts(value, _LARGEST_FACTORIAL))
    return sympy.factorial(value)


def _binomial(upper: Expr, lower: Expr) -> Expr:
    largest = _LARGEST_FACTORIAL if upper.is_number and lower.is_number else 20
    _bound(_counts(upper, largest) and _counts(lower, largest))
    return sympy.binomial(upper, lower)


def _counts(value: Expr, largest: int) -> bool:
    """Whether it is an integer from 0 to `largest`, or a sum and product of such numbers and variables."""
    if value.is_number:
        return bool(value.is_Integer) and bool(0 <= value <= largest)
    return not value.has(sympy.Pow, sympy.Function)


class _Reader:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, tokens: Sequence[Token]):
        self._tokens = [*tokens, Token("end", "")]
        self._place = 0
        self._depth = 0
        self._in_function = False

    @property
    def kind(self) -> str:
        return self._tokens[self._place].kind

    @property
    def text(self) -> str:
        return self._tokens[self._place].text

    def sum(self) -> Expr:
        value = self._sign() * self._product()
        while self._is("+", "-"):
            value = value + self._sign() * self._product()
        return value

    def _product(self) -> Expr:
        value = self._power()
        divided = False
        while True:
            if self._is("*", "/"):
                divided = self._take().text == "/"
                factor = self._sign() * self._power()
                value = value / factor if divided else value * factor
            elif self._starts_factor():
                # a/bc is (a/b)c to some and a/(bc) to others.
                follows_factorial = self._tokens[self._place - 1].text == "!"
                if divided or (self.kind == "number" and not follows_factorial):
                    raise Unreadable("a product without its sign")
                value = value * self._power()
            else:
                return value

    def _power(self) -> Expr:
        return self._postfix(self._primary())

    def _postfix(self, value: Expr) -> Expr:
        if self._is("!"):
            self._take()
            if self._is("!"):
                raise Unreadable("a double factorial")
            value = _factorial(value)
        if self._is("^"):
            self._take()
            value = power(value, self._exponent())
            if self._is("^", "!"):
                raise Unreadable("a power of a power without brackets")
        if self._is("%"):
            self._take()
            value = value / 100
        if self._in_function and self.kind == "unit" and self.text == "degree":
            self._take()
            value = value * sympy.pi / 180
        return value

    def _exponent(self) -> Expr:
        if self._is("{"):
            return self._group()
        return self._sign() * self._primary()

    def _primary(self) -> Expr:
        self._depth += 1
        _bound(self._depth <= _DEEPEST)
        value = self._undivided()
        self._depth -= 1
        return value

    def _undivided(self) -> Expr:
        token = self._take()
        if token.kind == "number":
            return self._number(token)
        if token.kind == "symbol":
            return self._symbol(token)
        if token.kind == "function":
            return self._function(token.text)
        if token.kind == "operator" and token.text in _CLOSING:
            self._place -= 1
            return self._group()
        if token.kind == "command":
            return self._command(token.text)
        raise Unreadable(f"{token.text!r} has no place here")

    def _number(self, token: Token) -> Expr:
        assert token.value is not None
        value = sympy.Rational(token.value.numerator, token.value.denominator)
        if token.text.isdigit() and (fraction := self._fraction_after()) is not None:
            # A mixed number. 2\frac{3}{2} and 2\frac{0}{1} could as well be products.
            if not 0 < fraction < 1:
                raise Unreadable("a number beside a fraction")
            return value + fraction
        return value

    def _fraction_after(self) -> Expr | None:
        r"""The \frac{1}{2} or ` 1/2` of integers that stands here; None if there is none. Moves behind it."""
        tokens = self._tokens[self._place : self._place + 3]
        texts = [token.text for token in tokens]
        is_plain = [token.kind for token in tokens] == ["number", "operator", "number"] and tokens[0].spaced
        if texts[:1] == ["frac"]:
            start = self._place
            self._take()
            try:
                upper, lower = self._argument(), self._argument()
            except Unreadable:
                upper = lower = sympy.nan
            if upper.is_Integer and lower.is_Integer and not self._is("^"):
                return upper / lower
            self._place = start
        elif is_plain and texts[0].isdigit() and texts[1] == "/" and texts[2].isdigit() and tokens[2].value:
            self._place += 3
            return sympy.Rational(int(texts[0]), int(texts[2]))
        return None

    def _symbol(self, token: Token) -> Expr:
        if token.text in _CONSTANTS and not self._is("_", "'"):
            return _CONSTANTS[token.text]
        name = token.text
        if self._is("_"):
            self._take()
            name += f"_{self._raw()}"
        while self._is("'"):
            name += self._take().text
        if token.text in _APPLIED and self._is("("):
            argument = self._group()
            _bound(all(_size(number) <= _MOST_ARGUMENT_BITS for number in argument.atoms(sympy.Rational)))
            return sympy.Function(name, real=True)(argument)
        return symbol(name)

    def _raw(self) -> str:
        """The spelling of a subscript, in braces or a single token."""
        if not self._is("{"):
            return self._take().text
        self._take()
        spelling = ""
        while not self._is("}"):
            spelling += self._take().text
        self._take()
        return spelling

    def _group(self) -> Expr:
        opening = self._take().text
        value = self.sum()
        self._expect(_CLOSING[opening])
        return sympy.Abs(value) if opening == "|" else value

    def _function(self, name: str) -> Expr:
        function = _FUNCTIONS[name]
        exponent = None
        if name == "log" and self._is("_"):
            self._take()
            base = self._group() if self._is("{") else self._digit_or_symbol()
            _bound(base.is_Symbol or base is sympy.E or (base.is_Rational and max(base.p, base.q) < 10**9))
            function = lambda x: sympy.log(x) / sympy.log(base)  # noqa: E731
        if self._is("^"):
            self._take()
            exponent = self._exponent()
        if exponent == -1:
            if name not in _INVERSES:
                raise Unreadable(f"{name}^-1")
            function, exponent = _INVERSES[name], None
        outside, self._in_function = self._in_function, True
        argument = self._function_argument(name)
        if argument.is_Rational:
            _bound(_size(argument) <= _MOST_ARGUMENT_BITS)
        if argument.is_number and name not in ("ln", "log", "lg", "sqrt"):
            _bound(abs(argument.evalf(15)) <= _LARGEST_ARGUMENT)
        value = function(argument)
        self._in_function = outside
        return value if exponent is None else power(value, exponent)

    def _function_argument(self, name: str) -> Expr:
        if self._is("(", "{", "["):
            return self._group()
        value = self._power()
        while self._starts_factor() and self.kind not in ("function", "number"):
            if name == "sqrt" or self._is("("):
                raise Unreadable("a function whose argument has no brackets")
            value = value * self._power()
        if self._is("/"):
            raise Unreadable("a function whose argument has no brackets")
        return value

    def _command(self, name: str) -> Expr:
        if name == "frac":
            return self._argument() / self._argument()
        if name == "binom":
            return _binomial(self._argument(), self._argument())
        if name == "sqrt":
            return self._root()
        if name in ("lfloor", "lceil"):
            value = self.sum()
            self._expect(f"r{name[1:]}")
            return sympy.floor(value) if name == "lfloor" else sympy.ceiling(value)
        if name in _MARKS:
            return symbol(f"\\{name}{{{self._raw()}}}")
        if name in ("angle", "triangle"):
            return symbol(f"\\{name} {self._raw()}")
        raise Unreadable(f"\\{name} in an expression")

    def _root(self) -> Expr:
        index: Expr = sympy.Integer(2)
        if self._is("["):
            index = self._group()
            _bound(bool(index.is_Integer) and 2 <= index <= 60)
        value = self._argument()
        if index % 2 == 1 and value.is_number:
            # Of a negative number the real root.
            value, sign = (-value, -1) if value.is_negative else (value, 1)
            return sign * power(value, 1 / index)
        return power(value, 1 / index)

    def _argument(self) -> Expr:
        """Of \\frac and \\sqrt: what is in braces, or one digit, or one letter."""
        return self._group() if self._is("{") else self._digit_or_symbol()

    def _digit_or_symbol(self) -> Expr:
        token = self._tokens[self._place]
        if token.kind == "number" and token.text.isdigit():
            self._tokens[self._place] = replace(token, text=token.text[1:])
            if len(token.text) == 1:
                self._place += 1
            elif self._tokens[self._place - 1].text != "frac" or len(token.text) > 2:
                raise Unreadable("where the argument ends")
            return sympy.Integer(int(token.text[0]))
        if token.kind == "symbol":
            return self._symbol(self._take())
        if token.kind == "command":
            return self._primary()
        raise Unreadable(f"{token.text!r} as an argument")

    def _sign(self) -> int:
        if self._is("+", "-"):
            return -1 if self._take().text == "-" else 1
        return 1

    def _starts_factor(self) -> bool:
        if self.kind == "operator":
            return self.text in ("(", "{", "[")
        return self.kind in ("number", "symbol", "function") or (
            self.kind == "command" and self.text not in ("rfloor", "rceil")
        )

    def _is(self, *texts: str) -> bool:
        return self.kind == "operator" and self.text in texts

    def _take(self) -> Token:
        token = self._tokens[self._place]
        if token.kind == "end":
            raise Unreadable("it breaks off")
        self._place += 1
        return token

    def _expect(self, text: str) -> None:
        if self._take().text != text:
            raise Unreadable(f"{text!r} is missing")
