"""Suggest configuration keys for a row whose columns the present keys do not name."""

from collections.abc import Iterator
from typing import Any

from megatron_fipo.config.data import ColumnsConfig
from megatron_fipo.data.answers import answer_text, completion_text
from megatron_fipo.data.layout import Layout
from megatron_fipo.data.messages import are_messages, role_and_content
from megatron_fipo.data.readers import Row, nested

_PROMPTS = (
    "prompt",
    "question",
    "problem",
    "messages",
    "conversations",
    "conversation",
    "query",
    "instruction",
    "input",
)
_ANSWERS = (
    *(
        "ground_truth",
        "answer",
        "final_answer",
        "expected_answer",
        "gold_answer",
        "gold",
        "target",
        "label",
        "solution",
    ),
    *("completion", "answers", "output", "response"),
)
"""Usual names of columns, the most likely first."""
_LONGEST_PLAIN = 200
"""A longer text is assumed to be a worked solution, not an answer."""


def likely_keys(row: Row, layout: Layout) -> str:
    """Return "; likely KEY=VALUE …" for the columns of `row`; empty if none looks like a prompt or an answer.

    An answer is suggested only if it can be read from this row with the suggested answer format.
    """
    prompt = layout.prompt if _is_prompt(_value(row, layout.prompt)) else _find_prompt(row)
    answer = next(_answers(row, prompt), None)
    if prompt is None:
        return _wrapped(row)
    keys: dict[str, tuple[str | None, str]] = {"prompt": (layout.prompt, prompt)}
    if answer is not None:
        keys |= {"answer": (layout.answer, answer[0]), "answer_format": (layout.answer_format, answer[1])}
    section = _section(layout)
    texts = [
        f"{'data' if name == 'answer_format' and section == 'data.columns' else section}.{name}={right}"
        for name, (present, right) in keys.items()
        if present != right
    ]
    hint = f"; likely {' '.join(texts)}" if texts else ""
    if answer is None and layout.answer is not None:
        hint += "; none looks like an answer, which a reward of your own does not need: data.columns.answer=null"
    return hint


def _wrapped(row: Row) -> str:
    """Return a hint if `row` is an object that contains a list of the real rows."""
    lists = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1 or are_messages(row[lists[0]]):
        return ""
    return f"; its list {lists[0]} may be the rows: jq .{lists[0]} FILE > rows.json makes a file of them"


def _section(layout: Layout) -> str:
    """Return the section of the keys: validation's own once the general keys fit the training files."""
    default = ColumnsConfig()
    is_general = layout.split == "train" or (layout.prompt, layout.answer) == (default.prompt, default.answer)
    return "data.columns" if is_general else "data.validation_columns"


def _columns(row: Row) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of the row's columns and of the columns nested in them."""
    yield from ((name, name) for name in row)
    for outer, value in row.items():
        if isinstance(value, dict):
            yield from ((inner, f"{outer}.{path}") for inner, path in _columns(value))


def _named(row: Row, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths of the columns with these names, in the order of the names."""
    columns = list(_columns(row))
    for wanted in names:
        yield from (path for name, path in columns if name.lower() == wanted)


def _find_prompt(row: Row) -> str | None:
    return next((path for path in _named(row, _PROMPTS) if _is_prompt(_value(row, path))), None)


def _is_prompt(value: Any) -> bool:
    return are_messages(value) or (isinstance(value, str) and bool(value.strip()))


def _answers(row: Row, prompt: str | None) -> Iterator[tuple[str, str]]:
    """Yield (column, answer format) for each column that can be read as an answer."""
    for path in _named(row, _ANSWERS):
        value = _value(row, path)
        if isinstance(value, list) and value and not isinstance(value[0], dict):
            path, value = f"{path}.0", value[0]
        for answer_format in ("gsm8k", "boxed", "plain"):
            try:
                text = answer_text(completion_text(value), answer_format)
            except ValueError:
                continue
            if answer_format != "plain" or len(text) <= _LONGEST_PLAIN:
                yield path, answer_format
                break
    value = None if prompt is None else _value(row, prompt)
    if prompt is not None and are_messages(value) and role_and_content(value[-1])[0] == "assistant":
        yield prompt, "plain"


def _value(row: Row, column: str) -> Any:
    try:
        return nested(row, column)
    except LookupError:
        return None
