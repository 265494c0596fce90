"""Finding the final answer in a response, and the normal form in which the recipe compares two answers as strings.

The normal form is that of the published rule (verl's `math_dapo`, after appendix D.1 of the Minerva paper, Lewkowycz et
al., 2022), character by character, its oddities included. Everything here takes time linear in the text.
"""

import re

_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_BRACE = re.compile("[{}]")
_CODE_FENCE = re.compile(r"^[ \t]*```[^\n`]*$", re.MULTILINE)
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)

# Applied in this order to the whole answer, as the published rule does: the later ones rely on the earlier.
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
_WRAPPERS = (r"\text{", r"\textbf{", r"\overline{")
_BOX = r"\boxed{"


def published_answer(text: str) -> str | None:
    """What the published rule finds: what follows the last "Answer:" (any case) up to the end of its line, or None.

    Of several on one line the first counts. Space before the answer is skipped, line ends too; space after it stays.
    """
    matches = _ANSWER_LINE.findall(text)
    return matches[-1] if matches else None


def last_answer_line(text: str) -> str | None:
    """The same without space around it."""
    answer = published_answer(text)
    return None if answer is None else answer.strip()


def last_answer_tag(text: str) -> str | None:
    """The content of the last <answer>…</answer>, which may span lines; None if there is none."""
    start, content = None, None
    for tag in _ANSWER_TAG.finditer(text):
        if tag[0][1] != "/":
            start = tag.end() if start is None else start
        elif start is not None:
            start, content = None, text[start : tag.start()].strip()
    return content


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…} with balanced braces; None if there is none."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    opening = text.index("{", start)
    depth = 0
    for brace in _BRACE.finditer(text, opening):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[opening + 1 : brace.start()].strip()
    return None


def last_code_block(text: str) -> str | None:
    """The lines between the last two ``` fences that belong together; None if there is no closed block.

    A fence with a word after it, as ```python, opens a block even inside of one: a stray fence, or a block that the
    model begins anew, does not make later blocks of the text between them.
    """
    start, content = None, None
    for fence in _CODE_FENCE.finditer(text):
        if start is None or fence[0].strip() != "```":
            start = fence.end()
        else:
            start, content = None, text[start : fence.start()].strip("\n")
    return content


def normalise_answer(answer: str) -> str:
    r"""The published normal form: right-hand side only, no units, articles, spaces, LaTeX dress; \frac12 → \frac{1}{2}.

    Two answers count as the same where their normal forms are equal strings. The form is no equality of values: it
    drops words and everything before a "=", and of `12} or \boxed{34` in a box it makes `12}or\boxed{34`.
    """
    answer = answer.split("=")[-1]
    for before, after in _SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for expression in _REMOVED:
        answer = answer.replace(expression, "")
    # None of these patterns reaches over the end of a line.
    answer = "\n".join(_unwrap_line(line) for line in answer.split("\n"))
    answer = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", answer)
    answer = re.sub(r"sqrt([^{])", r"sqrt{\1}", answer)
    answer = answer.replace("$", "")
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return answer.strip()


def _unwrap_line(line: str) -> str:
    """The first $…$ of the line if there is one, without its wrappers: text, bold, overline, box."""
    dollars = line.split("$", 2)
    line = f"${dollars[1]}$" if len(dollars) == 3 else line
    for opening in _WRAPPERS:
        line = _without_wrapper(line, opening)
    # Greedy: from the first box to the last brace of the line, whatever lies between.
    start, end = line.find(_BOX), line.rfind("}")
    if start >= 0 and start + len(_BOX) <= end:
        line = line[:start] + line[start + len(_BOX) : end] + line[end + 1 :]
    return line


def _without_wrapper(line: str, opening: str) -> str:
    """Replaces each `opening`…} by what is inside, up to the nearest brace; what was inside is not looked at again."""
    parts = []
    position = 0
    while (start := line.find(opening, position)) >= 0 and (end := line.find("}", start + len(opening))) >= 0:
        parts += [line[position:start], line[start + len(opening) : end]]
        position = end + 1
    return "".join([*parts, line[position:]])
