r"""The published rule of the recipe once more, for test_extraction.py: slow, literal, one small function a step.

Written from the description of verl's `math_dapo`: the last 300 characters; the last "Answer:" with something after it
on its line; a normal form by substitutions in a fixed order; equality of strings. It looks at characters one by one and
uses no regular expressions, so that it shares no mistake with the package.
"""

_REPLACED = [
    *[("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")],
    *[(",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")],
]
_REMOVED_WORDS = """
    square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents degrees cm gm
    pounds meters meals edges students childrentickets multiples
    \\text{s} \\text{.} \\text{⏎s} \\text{}^2 \\text{}^3 \\text{⏎} \\text{} \\mathrm{th}
    ^\\circ ^{\\circ} \\; ,\\! {,} " \\dots
"""


def is_right(response: str, truth: str) -> bool:
    """What the published rule says of a response."""
    found = _answers(response[-300:])
    return normal_form(found[-1] if found else "[INVALID]") == normal_form(truth)


def normal_form(answer: str) -> str:
    """The string in which the published rule compares an answer."""
    answer = answer.rsplit("=", 1)[-1]
    for old, new in _REPLACED:
        answer = new.join(answer.split(old))
    for word in _REMOVED_WORDS.split():
        answer = "".join(answer.split(word.replace("⏎", "\n")))
    answer = "\n".join(_between_dollars(line) for line in answer.split("\n"))
    for command in ("\\text{", "\\textbf{", "\\overline{"):
        answer = _unwrapped(answer, command)
    answer = "\n".join(_unboxed(line) for line in answer.split("\n"))
    answer = _braced(answer, "frac", 2)
    answer = _braced(answer, "sqrt", 1)
    answer = "".join(sign for sign in answer if sign != "$")
    digits = "".join(sign for sign in answer if sign != ",")
    return (digits if digits.isdigit() else answer).strip()


def _answers(text: str) -> list[str]:
    found, place = [], 0
    while place < len(text):
        content = _answer_at(text, place)
        if content is None:
            place += 1
        else:
            start, place = content
            found.append(text[start:place])
    return found


def _answer_at(text: str, place: int) -> tuple[int, int] | None:
    """Start and end of the content of the "Answer:" that begins here. ſ is an s to a comparison that ignores case."""
    if text[place : place + 6].replace("ſ", "s").lower() != "answer":
        return None
    place = _skip_space(text, place + 6)
    if text[place : place + 1] != ":":
        return None
    first = place + 1
    start = _skip_space(text, first)
    # Where only space follows, the content is as little of it as can be: its last sign that ends no line.
    while start >= first and (start == len(text) or text[start] == "\n"):
        start -= 1
    if start < first:
        return None
    end = start
    while end < len(text) and text[end] != "\n":
        end += 1
    return start, end


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _between_dollars(line: str) -> str:
    places = [place for place, sign in enumerate(line) if sign == "$"]
    return line if len(places) < 2 else line[places[0] : places[1] + 1]


def _unwrapped(text: str, opening: str) -> str:
    """Without the command and the first brace after it, where that is on the same line."""
    result, place = "", 0
    while place < len(text):
        inside = place + len(opening)
        end = inside
        while end < len(text) and text[end] not in "}\n":
            end += 1
        if text[place:inside] == opening and text[end : end + 1] == "}":
            result += text[inside:end]
            place = end + 1
        else:
            result += text[place]
            place += 1
    return result


def _unboxed(line: str) -> str:
    """From the first box that has a brace somewhere after it to the last brace of the line."""
    for place in range(len(line)):
        if line[place : place + 7] == "\\boxed{" and "}" in line[place + 7 :]:
            last = max(other for other, sign in enumerate(line) if sign == "}")
            return line[:place] + line[place + 7 : last] + line[last + 1 :]
    return line


def _braced(text: str, command: str, count: int) -> str:
    """The sign after the command, and for frac the one after that, each in braces, unless a brace is there."""
    result, place = "", 0
    while place < len(text):
        after = place + len(command)
        signs = text[after : after + count]
        is_short = text[place:after] == command and len(signs) == count and signs[0] != "{" and signs[1:] != "\n"
        result += command + "".join(f"{{{sign}}}" for sign in signs) if is_short else text[place]
        place += len(command) + count if is_short else 1
    return result
