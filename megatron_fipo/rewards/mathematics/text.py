r"""Finds the answer in a response and takes its dress off: markdown, LaTeX delimiters, lead-ins, final punctuation.

Only dress goes: no word, letter, digit or separator of the answer itself. Everything here takes time linear in the
response, and at most quadratic in LONGEST_ANSWER.
"""

import html
import re
import unicodedata

from megatron_fipo.rewards.extraction import last_answer_tag, last_boxed
from megatron_fipo.rewards.mathematics.vocabulary import IGNORED, SPELLINGS, is_word

LONGEST_ANSWER = 1000
"""Characters. The longest answer of the MATH data set has 159; a longer one than this is wrong without being read."""

# What opens just before it closes behind the answer. Between the word and its colon, and just behind that, there may be
# the end of bold text or of \text{…}; a code fence may have a language.
_ANSWER = re.compile(
    r"""(?:(?<!\\)(?P<opening>[*_"'“(\[]{1,3}))?(?:(?:the|final|correct)[ ]){0,2}answer[\s*_`}]*[:：]
    (?:</[a-z]{1,9}>|[*_`]{0,3}(?:[ ]?\})?)(?:\s*```\w{0,20}\n)?""",
    re.IGNORECASE | re.VERBOSE,
)
_MOST_TRIED = 100
_OPENING_TAG = re.compile("<answer>", re.IGNORECASE)
_DRESS = " \t\r\n*_`}"
_CLOSING_OF = str.maketrans("“([", "”)]")
_LEAD_IN = re.compile(
    r"""(?:so|thus|therefore|hence)\b,?
    |the\ (?:final\ |correct\ |total\ |minimum\ |maximum\ |smallest\ |largest\ )?
        (?:answer|result|value|option|choice|solution|sum|product|number|probability|area|volume|remainder|minimum
        |maximum)s?(?:\ of\ [^,.]{1,60}?)?\ (?:is|are|equals)\b:?
    |(?:final\ |correct\ )?(?:answer|result|value)\ (?:is|equals)\b:?
    |(?:option|choice)\ (?=\(?[A-Z]\b)
    |it\ is\b|approximately\b|=""",
    re.IGNORECASE | re.VERBOSE,
)
_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_CLOSING_WORDS = re.compile(r"\.? I hope (?:it|this) is correct$")
_OUTER_TAG = re.compile(r"^<(?:[a-z]{1,9}|\|\w{1,30}\|)>|(?:</[a-z]{1,9}>|<br ?/?>|<\|\w{1,30}\|>)$")
_END_OF_PROOF = re.compile(r"(?:\\(?:blacksquare|square|Box|qed)\b|[∎■□✓✔✅\ufe0f])$")
_DISPLAY = re.compile(r"\\begin ?\{((?:align|aligned|equation|gather|gathered|split|cases)\*?)\}(.*)\\end ?\{\1\}")
_PAIRS = (
    *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*"), ("__", "__"), ("_", "_")),
    *(('"', '"'), ("“", "”"), ("'", "'")),
)
# What stays at the end when the opening half stood before "Answer:".
_CLOSING = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"))
_WRAPPERS = re.compile(r"\\(?:boxed|fbox|underline|emph|mathbf|boldsymbol|bm|displaystyle)\s*\{")
# 1{,}000, 1\,000, 1,\!000, 1 000
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|,?\\[!,;: ] ?|[~ ])\d{3})+(?![\d/]| *\\frac)")
_GROUP_MARK = re.compile(r"[^\d]+")
_BOLD = re.compile(r"(?:(?<=[ =(:,])|^)\*\*([^* ][^*]*)\*\*(?=[ ,.;:)]|$)")
_CHOICE = re.compile(r"\(?([A-Z])\)")
_SPACES = re.compile(r"\s+")
_ENTITY = re.compile(r"&#?[A-Za-z0-9]{1,12};")
_DIGIT = re.compile(r"\d")
_ROOT = re.compile(r"([√∛∜]) ?(\d+|[A-Za-z])(?![\dA-Za-z.(])")
_INDEX_OF_ROOT = {"√": "", "∛": "[3]", "∜": "[4]"}
_REWRITTEN = (
    (re.compile(r"\\(?:text)?color ?\{\w{1,20}\}"), " "),
    (re.compile(r"\\(?:[hv]space\*?|[hv]?phantom) ?\{[^{}]*\}"), " "),
    # The space between two rows of a matrix.
    (re.compile(r"\\\\ ?\[[\d.]+ ?[a-z]{2}\]"), r"\\\\ "),
    (re.compile(r"\\not ?(?:=|\\eq\b)"), r"\\ne "),
    (re.compile(r"\{([^{}]*)\\over\b([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{([^{}]*)\\choose\b([^{}]*)\}"), r"\\binom{\1}{\2}"),
    # 1.2 x 10^5
    (re.compile(r"(?<=\d) ?[xX] ?(?=10 ?\^)"), r"\\times "),
    (re.compile(r"\bm ?\\angle\b"), r"\\angle "),
    (re.compile(r"\( ?(?:\\(?:text|mathrm) ?\{mod\}|\\?b?mod\b) ?([^()]*)\)"), r"\\pmod{\1}"),
)
_SIGNS = {
    **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000`", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **dict(zip("（）［］｛｝", "()[]{}", strict=True)),
    **dict(zip("，．：；＝＋－！／％＜＞。｡、।۔٫٬،؛", ",.:;=+-!/%<>..,...,,;", strict=True)),
    **dict(zip("−﹣‐‑–÷∕⁄‘’′", "-----///'''", strict=True)),
    **{"ℝ": r"\mathbb{R}", "°": r"^\circ ", "º": r"^\circ ", "√": " sqrt ", "…": r"\ldots "},
}
_NAMES = (
    "times cdot cdot cdot pm mp infty approx le ge ne cup cap setminus in emptyset langle rangle pi alpha beta gamma"
    " delta theta lambda mu sigma phi omega Delta angle triangle euro pounds yen rupee lfloor rfloor lceil rceil equiv"
)
_COMMANDS = dict(zip("×·⋅∙±∓∞≈≤≥≠∪∩∖∈∅⟨⟩παβγδθλμσφωΔ∠△€£¥₹⌊⌋⌈⌉≡", _NAMES.split(), strict=True))
_FRACTIONS = {
    sign: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("⁄")) for sign in "½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒"
}
_CHARACTERS = str.maketrans(_SIGNS | _FRACTIONS | {sign: f"\\{command} " for sign, command in _COMMANDS.items()})
_SMALL = re.compile("(?P<raised>[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+)|[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+")
# In what has no reading: commands that look alike, and braces around one sign.
_COMMAND = re.compile(r"\\([A-Za-z]+|[\\,;:! ])")
_ALIKE = SPELLINGS | {
    **dict.fromkeys(("dots", "cdots", "dotsc"), "ldots"),
    **{"neq": "ne", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge"},
}
_SHORT_FRACTION = re.compile(r"\\frac (\w)(\w)(?!\w)")
_ABBREVIATED = re.compile(r"(?<=[a-z])\.$")
_APART = re.compile(r"[^\W_] [^\W_]|, \d{3}(?!\d)|\. \d|\d [.,]\d")
_IN_BRACES = re.compile(r"(\\[A-Za-z]+|[\^_]) ?\{ ?(\w) ?\}")


def find_answer(text: str) -> str | None:
    r"""What follows the last "Answer:", or an <answer>…</answer> after it; without both the last \boxed{…}; else None.

    An "Answer:" that nothing follows does not count, nor what stands before </think> if something stands behind it.
    "Answer:" may be in bold or in \text{…}. The answer ends with its line, or with the $…$, \[…\] or environment that
    the line opens.
    """
    # What is thought aloud before the response proper is no answer, where one follows.
    proper = text.rpartition("</think>")[2]
    text = proper if proper.strip() else text
    tagged = last_answer_tag(text)
    tag = -1 if tagged is None else [*_OPENING_TAG.finditer(text)][-1].start()
    # Each that nothing follows costs a look at the rest of the text.
    for match in reversed([*_ANSWER.finditer(text)][-_MOST_TRIED:]):
        rest = text[match.end() :].lstrip()
        answer = _to_its_end(rest)
        if len(text) - len(rest) + len(answer) < tag:
            break
        if answer.strip(_DRESS):
            closing = (match["opening"] or "")[::-1].translate(_CLOSING_OF)
            return answer.rstrip(" .\r").removesuffix(closing) if closing else answer
    return last_boxed(text) if tagged is None else last_boxed(tagged) or tagged


def undress(text: str) -> str:
    """The answer itself, in ASCII signs and LaTeX commands where there is one, each run of spaces a single one."""
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    text = _DIGIT.sub(lambda match: str(int(match[0])), _SMALL.sub(_level, text))
    text = _ROOT.sub(lambda match: rf"\sqrt{_INDEX_OF_ROOT[match[1]]}{{{match[2]}}}", text)
    text = _BOLD.sub(r" \1 ", _SPACES.sub(" ", text.translate(_CHARACTERS)))
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    before = None
    while text != before:
        before = text
        text = _without_outer(text.strip(" "))
    return _GROUPED.sub(lambda match: _GROUP_MARK.sub("", match[0]), text)


def plain_text(text: str) -> str:
    r"""An undressed answer as a string to compare: without $ and \text{…}, without spaces but between two words.

    In lower case if it is words alone. Otherwise nothing is dropped: texts that agree in it are the same answer.
    """
    for command in (r"\textbf{", r"\textit{", r"\text{", r"\mathrm{", r"\mbox{"):
        while (start := text.find(command)) >= 0 and (end := text.find("}", start)) >= 0:
            text = f"{text[:start]} {text[start + len(command) : end]} {text[end + 1 :]}"
    text = _COMMAND.sub(_plain_command, text.replace(r"\$", "\\dollar ").replace("$", " "))
    text = _IN_BRACES.sub(r"\1 \2", _SHORT_FRACTION.sub(r"\\frac {\1}{\2}", text))
    words = text.split()
    joined = words[0] if words else ""
    for word in words[1:]:
        # "1, 234" is a list and "1,234" a number; "5. 3" is not 5.3.
        keeps_apart = _APART.search(f"{joined[-1]} {word[:4]}")
        joined += f" {word}" if keeps_apart else word
    joined = _ABBREVIATED.sub("", joined)
    if choice := _CHOICE.fullmatch(joined):
        return choice[1]
    letters = joined.replace(" ", "").replace("-", "").replace("'", "")
    is_words = letters.isalpha() and any(is_word(word) for word in words)
    return joined.casefold() if is_words else joined


def _plain_command(match: re.Match[str]) -> str:
    name = _ALIKE.get(match[1], match[1])
    if name == "\\":
        return match[0]
    return " " if name in IGNORED else ": " if name == "colon" else f"\\{name} "


def _level(match: re.Match[str]) -> str:
    """x² as x^{2}, x₁ as x_{1}."""
    signs = unicodedata.normalize("NFKC", match[0])
    return f"{'^' if match['raised'] else '_'}{{{signs}}}"


def _to_its_end(text: str) -> str:
    end = first = text.find("\n")
    while 0 <= end <= LONGEST_ANSWER and _is_open(text[:end]):
        end = text.find("\n", end + 1)
    if end > LONGEST_ANSWER or (end < 0 and first >= 0 and _is_open(text[: LONGEST_ANSWER + 1])):
        end = first
    return text if end < 0 else text[:end]


def _is_open(text: str) -> bool:
    """Whether a delimiter or an environment that begins here does not end here."""
    dollars = text.count("$") - text.count(r"\$")
    return (
        dollars % 2 == 1
        or text.count("$$") % 2 == 1
        or any(text.count(a) > text.count(b) for a, b in ((r"\[", r"\]"), (r"\(", r"\)"), (r"\begin{", r"\end{")))
    )


def _closing_brace(text: str, opening: int) -> int:
    r"""The place of the brace that closes the one at `opening`, \{ and \} aside; -1 if there is none."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[opening:], re.DOTALL):
        if brace[0] in "{}":
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return opening + brace.start()
    return -1


def _without_outer(text: str) -> str:
    """Without one layer of dress; the same text if there is none."""
    if text.endswith(r"\\"):
        return text[:-2]
    if text[-1:] in (".", ",", ";") and not text.endswith(("..", "\\,", "\\;")):
        return text[:-1]
    for opening, closing in _PAIRS:
        inside = text[len(opening) : -len(closing)]
        if text == opening + inside + closing and opening not in inside and closing not in inside and inside:
            # The last sign of \$ is no delimiter.
            return text if inside.endswith("\\") and closing == "$" else inside
    for opening, closing in _CLOSING:
        if text.endswith(closing) and not text.endswith(f"\\{closing}") and _is_unmatched(text, opening, closing):
            return text[: -len(closing)]
    wrapper = _WRAPPERS.match(text)
    if wrapper:
        end = _closing_brace(text, wrapper.end() - 1)
        if end in (-1, len(text) - 1):
            return text[wrapper.end() : end] if end > 0 else text[wrapper.end() :]
    display = _DISPLAY.fullmatch(text)
    if display and r"\begin" not in display[2] and not ("&" in display[2] and display[1] == "cases"):
        return display[2].replace("&", " ").strip(" ").removesuffix(r"\\").replace(r"\\", ", ")
    for pattern in (_OUTER_TAG, _END_OF_PROOF, _CLOSING_WORDS):
        if (without := pattern.sub("", text)) != text and without:
            return without
    lead_in = _LEAD_IN.match(text)
    if lead_in and lead_in.end() < len(text):
        return text[lead_in.end() :]
    words = _TEXT.match(text)
    if words and words.end() < len(text) and _LEAD_IN.fullmatch(words[1].strip(" ")):
        return text[words.end() :]
    stripped = text.removesuffix("**").removesuffix("_").removeprefix("**").removeprefix("# ")
    return stripped or text


def _is_unmatched(text: str, opening: str, closing: str) -> bool:
    if opening == closing:
        return (text.count(closing) - text.count(f"\\{closing}")) % 2 == 1
    escaped = f"\\{opening}", f"\\{closing}"
    return text.count(opening) - text.count(escaped[0]) < text.count(closing) - text.count(escaped[1])
