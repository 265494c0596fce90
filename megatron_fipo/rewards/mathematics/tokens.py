"""Cuts an undressed answer into tokens. What it does not know is Unreadable, never guessed at."""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_fipo.rewards.mathematics.vocabulary import (
    COMMANDS,
    CURRENCIES,
    FUNCTIONS,
    GREEK,
    IGNORED,
    OPERATORS,
    SPELLINGS,
    TEXT_COMMANDS,
    TEXT_UNITS,
    UNITS,
    is_word,
)


class Unreadable(Exception):
    """The text has no single mathematical meaning that is known here."""


@dataclass(frozen=True)
class Token:
    """A word of mathematics."""

    kind: str
    """number, symbol, function, word, connective, unit, command, or operator."""
    text: str
    """How it is written, shortened to one of its spellings where there are several."""
    value: Fraction | None = None
    """Of a number."""
    spaced: bool = False
    """Whether white space stands before it."""


_NUMBER = re.compile(
    r"""(?P<repeating>(?P<lead>\d*\.\d*)\\(?:overline|bar|dot)\{(?P<period>\d{1,50})\})
    |(?P<based>\d+)_(?:\{(?P<base>\d{1,2})\}|(?P<digit>\d)(?!\d))
    |(?P<scientific>(?:\d*\.\d+|1)[eE][+-]?\d{1,4}|\d+e\d{1,4}|\d+E[+-]?\d{1,4})(?![\w.])
    |(?P<grouped>[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?)(?!\d|,\d)
    |(?P<plain>\d+(?:\.\d+)?|\.\d+)""",
    re.VERBOSE | re.ASCII,
)
_DIGITS = re.compile("[0-9]+")
_WORDS = re.compile(r" ?\{([^{}]*)\}")
_EXPONENT_OF_UNIT = re.compile(r" ?\^ ?(?:\{ ?([23]) ?\}|([23]))")
_LETTERS = re.compile("[A-Za-z]+")
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)
_ENVIRONMENT = re.compile(r"\\(begin|end) ?\{([a-z]+)\}(?:(?<=array\})\{[lcr| ]*\})?")
_DEGREE = re.compile(
    r"""(?:\^\ ?(?:\\circ(?![A-Za-z])|\{\ ?\\circ\ ?\}|\{\ ?\\(?:text|mathrm)\ ?\{o\}\ ?\})|\\degree(?![A-Za-z]))
    (?:\ ?(?:\\(?:text|mathrm)\ ?\{\ ?(?P<text>[CF])\ ?\}|(?P<letter>[CF])(?!\w)))?""",
    re.VERBOSE,
)
_OPERATOR = re.compile(r"!=|<=|>=|\*\*|[-+*/^_(){}\[\]|,;=<>!&%']")

_WITHOUT_SET = re.compile(r"- ?\\\{")
_UNIT = "|".join(sorted(TEXT_UNITS, key=len, reverse=True))
_POWER_OF_UNIT = re.compile(rf"(square|sq\.?|cubic|cu\.?) ({_UNIT})(?![A-Za-z])")
_PER_UNIT = re.compile(rf"(?:/| per )({_UNIT})(?![A-Za-z])")
_UNIT_PER_UNIT = re.compile(rf"({_UNIT}){_PER_UNIT.pattern}")
_DIGIT_OR_SIGN = re.compile(r"[0-9=<>+\\^]")


def tokenise(text: str) -> list[Token]:
    """The tokens of an undressed answer. Linear; Unreadable for a sign, command or number that is not known."""
    return _Lexer(text).run()


class _Lexer:
    def __init__(self, text: str):
        self._text = text
        self._place = 0
        self._depth = 0
        self._tokens: list[Token] = []
        self._spaced = False

    def run(self) -> list[Token]:
        while self._place < len(self._text):
            sign = self._text[self._place]
            if sign in " $" or (sign == "~" and self._tokens):
                self._spaced = self._spaced or sign != "$"
                self._place += 1
            elif sign.isascii() and (sign.isdigit() or sign == "."):
                self._number()
            elif sign.isascii() and sign.isalpha():
                self._letters()
            elif degree := _DEGREE.match(self._text, self._place):
                scale = degree["text"] or degree["letter"]
                self._add("unit", f"degree {scale}" if scale else "degree", degree.end())
            elif sign == "\\":
                self._command()
            elif sign == ":" and self._is_in_set():
                self._operator("|", self._place + 1)
            elif operator := _OPERATOR.match(self._text, self._place):
                if self._tokens and _WITHOUT_SET.match(self._text, self._place):
                    self._add("command", "setminus", operator.end())
                else:
                    self._operator({"**": "^"}.get(operator[0], operator[0]), operator.end())
            else:
                raise Unreadable(f"the sign {sign!r}")
        return self._tokens

    def _is_in_set(self) -> bool:
        """Whether a colon is that of {x : x > 2}."""
        before = self._text[: self._place]
        return before.count(r"\{") > before.count(r"\}")

    def _add(self, kind: str, text: str, end: int, value: Fraction | None = None) -> None:
        self._tokens.append(Token(kind, text, value, self._spaced))
        self._spaced = False
        self._place = end

    def _operator(self, text: str, end: int) -> None:
        self._depth += (text in ("(", "[", r"\{", "<|")) - (text in (")", "]", r"\}", "|>"))
        self._add("operator", text, end)

    def _number(self) -> None:
        match = _NUMBER.match(self._text, self._place)
        if match and match["grouped"] and self._depth > 0:
            # In a tuple a comma is a comma.
            match = _DIGITS.match(self._text, self._place)
        if match is None:
            raise Unreadable("a full stop without digits")
        found = match.groupdict()
        if found.get("repeating"):
            value = _repeating(found["lead"], found["period"])
        elif found.get("based"):
            value = _based(found["based"], int(found["base"] or found["digit"]))
        else:
            value = Fraction(match[0].replace(",", ""))
        self._add("number", match[0].replace(",", ""), match.end(), value)

    def _letters(self) -> None:
        match = _LETTERS.match(self._text, self._place)
        assert match is not None
        letters, end = match[0], match.end()
        if letters == "percent":
            self._operator("%", end)
        elif letters in ("or", "and"):
            self._add("connective", letters, end)
        elif letters in FUNCTIONS:
            self._add("function", letters, end)
        elif letters == "pi" or (letters in GREEK and len(letters) > 3):
            self._add("symbol", f"\\{letters}", end)
        elif letters in ("infinity", "oo"):
            self._add("command", "infty", end)
        elif letters in UNITS:
            self._unit(UNITS[letters], end)
        elif power := _POWER_OF_UNIT.match(self._text, match.start()):
            self._add("unit", f"{TEXT_UNITS[power[2]]}^{2 if power[1].startswith('sq') else 3}", power.end())
        elif len(letters) == 1 or (letters.isupper() and len(letters) <= 3 and not is_word(letters)):
            self._add("symbol", letters, end)
        elif is_word(letters):
            self._add("word", letters, end)
        else:
            for place, letter in enumerate(letters, start=match.start()):
                self._add("symbol", letter, place + 1)

    def _unit(self, unit: str, end: int) -> None:
        power = _EXPONENT_OF_UNIT.match(self._text, end)
        if power:
            unit, end = f"{unit}^{power[1] or power[2]}", power.end()
        elif per := _PER_UNIT.match(self._text, end):
            unit, end = f"{unit}/{TEXT_UNITS[per[1]]}", per.end()
        self._add("unit", unit, end)

    def _command(self) -> None:
        match = _COMMAND.match(self._text, self._place)
        if match is None:
            raise Unreadable("a lone backslash")
        name = SPELLINGS.get(match[0][1:], match[0][1:])
        if environment := _ENVIRONMENT.match(self._text, self._place):
            self._add("command", f"{environment[1]} {environment[2]}", environment.end())
        elif name in TEXT_COMMANDS:
            self._in_words(match.end())
        elif name in IGNORED:
            self._spaced = True
            self._place = match.end()
        elif name in OPERATORS:
            self._operator(OPERATORS[name], match.end())
        elif name in FUNCTIONS and name != "sqrt":
            self._add("function", name, match.end())
        elif name in GREEK:
            self._add("symbol", f"\\{name}", match.end())
        elif name in CURRENCIES:
            self._add("unit", CURRENCIES[name], match.end())
        elif name in ("lor", "land"):
            self._add("connective", "or" if name == "lor" else "and", match.end())
        elif name in COMMANDS:
            self._add("command", name, match.end())
        else:
            raise Unreadable(f"the command \\{name}")

    def _in_words(self, after: int) -> None:
        r"""\text{…}: a connective, a unit, a function, mathematics in roman letters, or words."""
        opening = _WORDS.match(self._text, after)
        if opening is None:
            raise Unreadable("\\text without its words")
        words, end = opening[1].strip(" "), opening.end()
        if words in ("", ".", ",") or words in ("th", "st", "nd", "rd"):
            self._spaced, self._place = True, end
        elif words.strip(", ") in ("or", "and"):
            self._add("connective", words.strip(", "), end)
        elif words.rstrip(".") in TEXT_UNITS and self._tokens and self._tokens[-1].text not in ("(", ","):
            self._unit(TEXT_UNITS[words.rstrip(".")], end)
        elif (per := _UNIT_PER_UNIT.fullmatch(words)) and self._tokens:
            self._unit(f"{TEXT_UNITS[per[1]]}/{TEXT_UNITS[per[2]]}", end)
        elif words == "percent":
            self._operator("%", end)
        elif words in FUNCTIONS:
            self._add("function", words, end)
        elif words in ("e", "i", "pi", r"\pi"):
            self._add("symbol", r"\pi" if "pi" in words else words, end)
        elif _DIGIT_OR_SIGN.search(words) or _POWER_OF_UNIT.fullmatch(words.rstrip(".")):
            self._tokens += _Lexer(words.rstrip(".")).run()
            self._place = end
        else:
            self._add("word", words, end)


def _repeating(lead: str, period: str) -> Fraction:
    """0.1\\overline{6}: the decimal number whose last digits repeat for ever."""
    places = len(lead) - lead.index(".") - 1
    head = Fraction(lead) if lead.strip(".") else Fraction(0)
    return head + Fraction(int(period), (10 ** len(period) - 1) * 10**places)


def _based(digits: str, base: int) -> Fraction:
    if not 2 <= base <= 10 or any(int(digit) >= base for digit in digits):
        raise Unreadable(f"{digits} in base {base}")
    return Fraction(int(digits, base))
