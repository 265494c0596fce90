"""Finding the final answer in a response, and the normal form in which two answers are compared as strings.

The normal form follows appendix D.1 of the Minerva paper (Lewkowycz et al., 2022), which the recipe uses.
"""

import re

_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)

# Applied in this order to the whole answer, as the paper does: the later ones rely on the earlier.
_SUBSTITUTIONS = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3"),
    *("\\text{\n}", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
_WRAPPERS = tuple(re.compile(rf"\\{name}\{{(.*?)\}}") for name in ("text", "textbf", "overline"))


def last_answer_line(text: str) -> str | None:
    """What follows the last "Answer:" (any case), up to the end of its line; None if there is no such line."""
    matches = _ANSWER_LINE.findall(text)
    return matches[-1].strip() if matches else None


def last_answer_tag(text: str) -> str | None:
    """The content of the last <answer>…</answer>, which may span lines; None if there is none."""
    matches = _ANSWER_TAG.findall(text)
    return matches[-1].strip() if matches else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…} with balanced braces; None if there is none."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    opening = text.index("{", start)
    depth = 0
    for position in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[opening + 1 : position].strip()
    return None


def normalise_answer(answer: str) -> str:
    r"""Minerva's normal form: right-hand side only, no units, articles, spaces or LaTeX dress, \frac12 → \frac{1}{2}.

    Two answers count as the same where their normal forms are equal strings. Idempotent on plain numbers.
    """
    answer = answer.split("=")[-1]
    for before, after in _SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for expression in _REMOVED:
        answer = answer.replace(expression, "")
    answer = re.sub(r".*?(\$.*?\$).*", r"\1", answer)
    for wrapper in _WRAPPERS:
        answer = wrapper.sub(r"\1", answer)
    boxed = last_boxed(answer)
    answer = answer if boxed is None else boxed
    answer = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", answer)
    answer = re.sub(r"sqrt([^{])", r"sqrt{\1}", answer)
    answer = answer.replace("$", "")
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return answer.strip()
