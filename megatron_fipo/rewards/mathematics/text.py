r"""Finds the answer in a response and takes its dress off: markdown, LaTeX delimiters, lead-ins, final punctuation.

Only dress goes: no word, letter, digit or separator of the answer itself. Everything here takes time linear in the
response, and at most quadratic in LONGEST_ANSWER.
"""

import re

from megatron_fipo.rewards.extraction import last_boxed
from megatron_fipo.rewards.mathematics.vocabulary import is_word

LONGEST_ANSWER = 1000
"""Characters. The longest answer of the MATH data set has 159; a longer one than this is wrong without being read."""

# Between the word and its colon there may be the end of bold text or of \text{…}.
_ANSWER = re.compile(r"answer[\s*_`}]*[:：]", re.IGNORECASE)
_DRESS_AFTER_COLON = " \t\r\n*_`}"
_LEAD_IN = re.compile(
    r"""(?:(?:so|thus|therefore|hence),?\ )?(?:the\ )?(?:final\ |correct\ )?(?:answer|result|value)\ (?:is|equals)\b:?
    |it\ is\b|=""",
    re.IGNORECASE | re.VERBOSE,
)
_PAIRS = (
    *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*"), ("__", "__"), ("_", "_")),
    *(('"', '"'), ("“", "”"), ("'", "'")),
)
# What stays at the end when the opening half stood before "Answer:".
_CLOSING = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"))
_WRAPPERS = re.compile(r"\\(?:boxed|fbox|underline|emph|mathbf|boldsymbol|bm|displaystyle)\s*\{")
# 1{,}000, 1\,000, 1,\!000, 1 000
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,?\\[!,;:] ?|[~ ])\d{3})+(?![\d/]| *\\frac)")
_GROUP_MARK = re.compile(r"[^\d]+")
_BOLD = re.compile(r"(?:(?<=[ =(:,])|^)\*\*([^* ][^*]*)\*\*(?=[ ,.;:)]|$)")
_CHOICE = re.compile(r"\(([A-Z])\)")
_SPACES = re.compile(r"\s+")
_SIGNS = {
    **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " "),
    **dict.fromkeys("`\u200b\u200c\u200d\u2060\ufeff", ""),
    **dict(zip("０１２３４５６７８９（）［］｛｝", "0123456789()[]{}", strict=True)),
    **dict(zip("，．：；＝＋－！／％＜＞。｡、", ",.:;=+-!/%<>..,", strict=True)),
    **dict(zip("−﹣‐‑–÷∕⁄’", "-----///'", strict=True)),
    **{"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}"},
    **{"ℝ": r"\mathbb{R}", "°": r"^\circ ", "º": r"^\circ ", "√": " sqrt "},
}
_NAMES = (
    "times cdot cdot cdot pm mp infty approx le ge ne cup cap setminus in emptyset langle rangle pi alpha beta gamma"
    " delta theta lambda mu sigma phi omega Delta"
)
_COMMANDS = dict(zip("×·⋅∙±∓∞≈≤≥≠∪∩∖∈∅⟨⟩παβγδθλμσφωΔ", _NAMES.split(), strict=True))
_CHARACTERS = str.maketrans(_SIGNS | {sign: f"\\{command} " for sign, command in _COMMANDS.items()})
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def find_answer(text: str) -> str | None:
    r"""What follows the last "Answer:" that something follows; without one the last \boxed{…}; else None.

    "Answer:" may be in bold or in \text{…}. The answer ends with its line, or with the $…$, \[…\] or environment that
    the line opens.
    """
    for match in reversed([*_ANSWER.finditer(text)]):
        answer = _to_its_end(text[match.end() :].lstrip(_DRESS_AFTER_COLON))
        if answer.strip(_DRESS_AFTER_COLON):
            return answer
    return last_boxed(text)


def undress(text: str) -> str:
    """The answer itself, in ASCII signs and LaTeX commands where there is one, each run of spaces a single one."""
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text)
    text = _BOLD.sub(r" \1 ", _SPACES.sub(" ", text.translate(_CHARACTERS)))
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
    text = text.replace(r"\$", "\\dollar ").replace("$", "")
    words = text.split()
    joined = words[0] if words else ""
    for word in words[1:]:
        # "1, 234" is a list and "1,234" a number.
        joined += f" {word}" if (joined[-1].isalnum() or joined[-1] == ",") and word[0].isalnum() else word
    if choice := _CHOICE.fullmatch(joined):
        return choice[1]
    letters = joined.replace(" ", "").replace("-", "").replace("'", "")
    is_words = letters.isalpha() and any(is_word(word) for word in words)
    return joined.casefold() if is_words else joined


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
    if wrapper and _closing_brace(text, wrapper.end() - 1) == len(text) - 1:
        return text[wrapper.end() : -1]
    lead_in = _LEAD_IN.match(text)
    if lead_in and lead_in.end() < len(text):
        return text[lead_in.end() :]
    stripped = text.removesuffix("**").removesuffix("_").removeprefix("**").removeprefix("# ")
    return stripped or text


def _is_unmatched(text: str, opening: str, closing: str) -> bool:
    if opening == closing:
        return (text.count(closing) - text.count(f"\\{closing}")) % 2 == 1
    escaped = f"\\{opening}", f"\\{closing}"
    return text.count(opening) - text.count(escaped[0]) < text.count(closing) - text.count(escaped[1])
