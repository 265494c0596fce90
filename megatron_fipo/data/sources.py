"""Turn rows of problem files into problems: the columns to read, valid prompts and answers, and refusals."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.data import QUESTION, RECIPE_PROMPT, ColumnsConfig
from megatron_fipo.config.data_files import NotFound, files_of, source_name
from megatron_fipo.data.answers import answer_text, completion_text
from megatron_fipo.data.chat_templates import Message
from megatron_fipo.data.column_hints import likely_keys
from megatron_fipo.data.kinds import kind_of
from megatron_fipo.data.layout import Layout
from megatron_fipo.data.messages import role_and_content
from megatron_fipo.data.readers import Row, nested, read_rows, shown_names
from megatron_fipo.errors import DataError

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGES_AS_TEXT = re.compile(r"""\s*(\[\s*)?\{.*["'](role|content)["']\s*:""", re.DOTALL)
_DROPPING = "; data.bad_answers=drop leaves such rows out"
_DEFAULT_SOURCE_COLUMN = ColumnsConfig().source


@dataclass(frozen=True)
class RawProblem:
    """A problem before the chat template and the tokenizer are applied."""

    messages: list[Message]
    question: str
    """The question, without roles and system messages; empty if the row has none."""
    ground_truth: str
    data_source: str
    where: str
    """File and row, for messages."""
    extra: dict[str, Any] = field(default_factory=dict)
    """As Problem.extra."""
    row: Row = field(default_factory=dict)
    """The columns that were read."""

    def same_question(self, prompt_template: str) -> str:
        """Return a text that is equal for equal questions, whatever their spaces, with or without a template."""
        text = _one_spelling(self.question)
        # Twice, since the recipe's template may be around this one.
        for known in (prompt_template, RECIPE_PROMPT, prompt_template):
            before, after = (_one_spelling(part) for part in known.split(QUESTION, 1))
            if text.startswith(before) and text.endswith(after):
                text = text.removeprefix(before).removesuffix(after).strip()
        return text


def _one_spelling(text: str) -> str:
    """Return `text` with single spaces, and with each accented letter as one character."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def refuse(error: DataError) -> None:
    """Refuse a row whose answer cannot be used. This is the default for `on_bad_answer`."""
    raise error


def read_files(
    names: list[str],
    layout: Layout,
    data_source: str | None = None,
    *,
    every_column: bool = False,
    on_bad_answer: Callable[[DataError], None] = refuse,
) -> Iterator[RawProblem]:
    """Yield the problems of files, in order.

    Args:
        data_source: the data set's name for rows that do not have one; None: the name of the file or directory.
        every_column: whether to read all columns, not only those of `layout`.
        on_bad_answer: called for each row whose answer is missing or cannot be read; the row is then left out.

    Raises:
        DataError: a file or a row cannot be used. Names file, row (from 1) and column.
    """
    for name in names:
        _check_embedded(name, layout)
        base = resolve_embedded(name).absolute()
        try:
            paths = files_of(name)
        except NotFound as error:
            raise DataError(f"{error} ({error.remedy})") from None
        for path in paths:
            name_of_all = data_source or source_name(base if os.path.isdir(base) else path)
            required = [layout.prompt] if layout.answer is None else [layout.prompt, layout.answer]
            fits = False
            for number, row in read_rows(path, required, layout.source, every=every_column):
                told = partial(_told_of_dropping, on_bad_answer) if fits else on_bad_answer
                problem = _raw_problem(row, layout, name_of_all, f"{path}, row {number}", told)
                if problem is not None:
                    fits = True
                    yield problem


def _check_embedded(name: str, layout: Layout) -> None:
    """Refuse the embedded validation file with other columns: the command line gave only training files of its own."""
    default = ColumnsConfig()
    has_columns = layout.prompt == default.prompt and layout.answer in (default.answer, None)
    if name.startswith("embedded:") and not has_columns:
        raise DataError(
            f"{name}: is the embedded task's and has no columns {layout.prompt} and {layout.answer}: "
            f"give data.{layout.split}=[FILE]{'' if layout.split == 'train' else ', or validation.every=0'}"
        )


def _raw_problem(
    row: Row, layout: Layout, data_source: str, where: str, on_bad_answer: Callable[[DataError], None]
) -> RawProblem | None:
    place = f"{where}, column {layout.prompt}"
    messages, question = _prompt(_value(row, layout.prompt, layout, where), layout, place)
    try:
        answer = _answer(row, layout, where)
    except (DataError, ValueError) as error:
        on_bad_answer(error if isinstance(error, DataError) else DataError(_bad_answer(str(error), layout, where)))
        return None
    return RawProblem(messages, question, answer, _source(row, layout, where) or data_source, where, row=row)


def _bad_answer(problem: str, layout: Layout, where: str) -> str:
    remedy = _DROPPING if problem.startswith("the answer is missing") else ""
    return f"{where}, column {layout.answer}: {problem}{remedy}"


def _told_of_dropping(on_bad_answer: Callable[[DataError], None], error: DataError) -> None:
    """Add to an error about an answer that such rows can be left out, since the keys fit other rows of the file."""
    text = str(error)
    on_bad_answer(error if text.endswith(_DROPPING) else DataError(f"{text}{_DROPPING}"))


def _answer(row: Row, layout: Layout, where: str) -> str:
    """Return the right answer; empty for data without answers.

    Raises ValueError, which says what is wrong with the answer, and DataError if its column is missing.
    """
    if layout.answer is None:
        return ""
    value = _value(row, layout.answer, layout, where)
    if layout.answer == layout.prompt and isinstance(value, list):
        value = value[-1:]  # the last message of the prompt's column, which `_prompt` leaves out
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        elements = "the one" if len(value) == 1 else f"the first of {len(value)}"
        raise ValueError(f"is a list; data.columns.answer={layout.answer}.0 is {elements}")
    return answer_text(completion_text(value), layout.answer_format, layout.answer_pattern)


def _value(row: Row, column: str, layout: Layout, where: str) -> Any:
    try:
        return nested(row, column)
    except LookupError as error:
        raise DataError(f"{where}, column {column}: {error}{likely_keys(row, layout)}") from error


def _source(row: Row, layout: Layout, where: str) -> str | None:
    """Return the row's name of its data set, if it has the column. Only the default column may be missing."""
    if layout.source == _DEFAULT_SOURCE_COLUMN and layout.source not in row:
        return None
    value = _value(row, layout.source, layout, where)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}, column {layout.source}: should be a text, not {kind_of(value)}")
    if value:
        _check_text(value, f"{where}, column {layout.source}")
    return value


def _prompt(value: Any, layout: Layout, where: str) -> tuple[list[Message], str]:
    """Return the chat messages of a prompt, and its question."""
    if isinstance(value, str):
        _check_text(value, where)
        if _MESSAGES_AS_TEXT.match(value):
            raise DataError(f"{where}: is the text of a list of chat messages; it should be the list itself")
        text = layout.prompt_template.replace(QUESTION, value)
        return [{"role": "user", "content": text}], value.strip()
    if not isinstance(value, list):
        raise DataError(
            f"{where}: should be a question or a list of chat messages with role and content, "
            f"not {'missing' if value is None else kind_of(value)}"
        )
    messages = [_message(message, where) for message in value]
    if messages and messages[-1]["role"] == "assistant":
        if layout.answer != layout.prompt:
            raise DataError(
                f"{where}: ends with the assistant's message, which the policy is to write; "
                f"data.columns.answer={layout.prompt} reads the answer from it"
            )
        del messages[-1]
    asked = [message["content"] for message in messages if message["role"] not in ("system", "developer")]
    return messages, "\n".join(asked).strip()


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{where}: should be a list of chat messages with role and content")
    role, content = role_and_content(value)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where}: a chat message should have the texts role and content; it has {shown_names(value)}")
    if role not in _ROLES:
        raise DataError(f"{where}: no chat message has the role {role[:40]!r}; it is one of {', '.join(_ROLES)}")
    _check_text(content, where)
    return {"role": role, "content": content}


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: is not valid Unicode text ({error.reason})") from error
