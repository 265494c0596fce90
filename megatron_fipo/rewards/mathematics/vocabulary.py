r"""The commands, functions, letters, units and words that an answer may hold. Whatever is missing here is not read."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TEXT_COMMANDS = _words("text textbf textit textrm textnormal mathrm mbox operatorname mathsf")
"""What stands in their braces is words, roman letters or a unit."""
IGNORED = _words(
    "left right big Big bigl bigr Bigl Bigr bigg displaystyle quad qquad limits large Large mathbf boldsymbol bm mathit"
    " boxed fbox underline emph bf rm biggl biggr Bigg Biggl Biggr textstyle , ; : ! ( ) [ ]"
) | {" "}
"""They say how something looks; an argument of theirs stays, in its braces."""
SPELLINGS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **{
        "lbrace": "{",
        "rbrace": "}",
        "varnothing": "emptyset",
        "backslash": "setminus",
        "measuredangle": "angle",
        "bar": "overline",
    },
}
"""Commands that mean the same as another."""
OPERATORS = {
    **dict.fromkeys(("times", "cdot", "ast"), "*"),
    **dict.fromkeys(("le", "leq", "leqslant"), "<="),
    **dict.fromkeys(("ge", "geq", "geqslant"), ">="),
    **dict.fromkeys(("ne", "neq"), "!="),
    **dict.fromkeys(("mid", "vert", "lvert", "rvert"), "|"),
    **{"div": "/", "lt": "<", "gt": ">", "%": "%", "{": r"\{", "}": r"\}", "\\": r"\\"},
    **{"langle": "<|", "rangle": "|>", "lbrack": "[", "rbrack": "]"},
}
"""Commands that are operators or brackets, and how those are written in a token."""
COMMANDS = _words(
    "frac sqrt binom pm mp cup cap setminus in infty emptyset approx lfloor rfloor lceil rceil overline vec hat"
    " overrightarrow angle triangle mathbb"
)
"""Commands that parser.py or reading.py knows by name."""
FUNCTIONS = _words("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt")
GREEK = _words(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi pi rho sigma tau phi"
    " varphi chi psi omega ell Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)


def _units() -> dict[str, str]:
    names = _words(
        "degree dollar cent inch foot yard mile meter liter gram pound ounce gallon second minute hour day week month"
        " year unit radian euro yen rupee"
    )
    units = {name: name for name in _words("mm cm km kg mg ml mL ft Hz")}
    units |= {name: name for name in names} | {f"{name}s": name for name in names}
    units |= {
        "feet": "foot",
        "inches": "inch",
        "metre": "meter",
        "metres": "meter",
        "litre": "liter",
        "litres": "liter",
    }
    for short, long in (("mm", "millimet"), ("cm", "centimet"), ("km", "kilomet"), ("ml", "millilit")):
        units |= dict.fromkeys((f"{long}er", f"{long}ers", f"{long}re", f"{long}res"), short)
    for short, long in (("kg", "kilogram"), ("mg", "milligram")):
        units |= dict.fromkeys((long, f"{long}s"), short)
    units |= {"mph": "mile/hour", "mL": "ml", "min": "minute", "rad": "radian", "USD": "dollar", "EUR": "euro"}
    return units | {"hr": "hour", "hrs": "hour", "sec": "second", "lb": "pound", "lbs": "pound", "deg": "degree"}


UNITS = _units()
"""Words that mean nothing else than a unit, and one name for each. A unit that one side alone gives is dress."""
TEXT_UNITS = UNITS | {
    **{"m": "meter", "s": "second", "g": "gram", "L": "liter", "h": "hour", "in": "inch"},
    **{"mi": "mile", "yd": "yard", "oz": "ounce"},
}
r"""Units in \text{…} after a value, where a single letter is no variable."""
CURRENCIES = {"$": "dollar", "euro": "euro", "pounds": "pound sterling", "yen": "yen", "rupee": "rupee"}
"""Commands that are units and may stand before their number."""
_SHORT_WORDS = _words("yes no odd all one two six ten red none not any is as if")


def is_word(letters: str) -> bool:
    """Whether a run of letters is a word of English rather than a product of variables."""
    return len(letters) > 3 or letters.lower() in _SHORT_WORDS or (len(letters) == 3 and letters.istitle())
