"""Rows of problem files as problems: which columns are read, what a prompt and an answer may be, what is refused."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import DataConfig
from megatron_fipo.config.data import QUESTION, RECIPE_PROMPT, ColumnsConfig
from megatron_fipo.data.answers import answer_text
from megatron_fipo.data.chat_templates import Message
from megatron_fipo.data.readers import Row, nested, read_rows, shown_names
from megatron_fipo.errors import DataError

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGES_AS_TEXT = re.compile(r"""\s*(\[\s*)?\{.*["'](role|content)["']\s*:""", re.DOTALL)
_DEFAULT_SOURCE_COLUMN = ColumnsConfig().source


@dataclass(frozen=True)
class RawProblem:
    """A problem before its chat template and tokens."""

    messages: list[Message]
    question: str
    """What is asked, without roles and system messages; empty where the row asks nothing."""
    ground_truth: str
    data_source: str
    where: str
    """File and row, for messages."""
    extra: dict[str, Any] = field(default_factory=dict)

    def same_question(self, prompt_template: str) -> str:
        """Equal for problems that ask the same, in whatever spaces, and in this template, the recipe's or none."""
        text = _one_spelling(self.question)
        # Twice, since the recipe's may stand around this one.
        for known in (prompt_template, RECIPE_PROMPT, prompt_template):
            before, after = (_one_spelling(part) for part in known.split(QUESTION, 1))
            if text.startswith(before) and text.endswith(after):
                text = text.removeprefix(before).removesuffix(after).strip()
        return text


@dataclass(frozen=True)
class Layout:
    """Which columns of a split's files are read, and how."""

    prompt: str
    answer: str
    source: str
    answer_format: str
    prompt_template: str

    @classmethod
    def of(cls, config: DataConfig, split: str) -> "Layout":
        """The layout of train or validation, whose own columns stand in for the general ones."""
        columns, own = config.columns, config.validation_columns
        general = cls(columns.prompt, columns.answer, columns.source, config.answer_format, config.prompt_template)
        if split == "train":
            return general
        return cls(
            own.prompt or general.prompt,
            own.answer or general.answer,
            own.source or general.source,
            own.answer_format or general.answer_format,
            general.prompt_template,
        )


def _one_spelling(text: str) -> str:
    """`text` with single spaces, and with each accented letter as one character."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_files(names: list[str], layout: Layout, data_source: str | None = None) -> Iterator[RawProblem]:
    """The problems of files, in order. `data_source` names rows without a name of their own; None: the file's stem.

    Raises:
        DataError: a file or a row cannot be used. Names file, row (from 1) and column.
    """
    for name in names:
        path = resolve_embedded(name)
        name_of_all = data_source or path.stem
        for number, row in read_rows(path, (layout.prompt, layout.answer), layout.source):
            yield _raw_problem(row, layout, name_of_all, f"{path}, row {number}")


def _raw_problem(row: Row, layout: Layout, data_source: str, where: str) -> RawProblem:
    messages, question = _prompt(_value(row, layout.prompt, where), layout, f"{where}, column {layout.prompt}")
    value = _value(row, layout.answer, where)
    try:
        answer = answer_text(value, layout.answer_format)
    except ValueError as error:
        raise DataError(f"{where}, column {layout.answer}: {error}") from error
    return RawProblem(messages, question, answer, _source(row, layout, where) or data_source, where)


def _value(row: Row, column: str, where: str) -> Any:
    try:
        return nested(row, column)
    except LookupError as error:
        raise DataError(f"{where}, column {column}: {error}") from error


def _source(row: Row, layout: Layout, where: str) -> str | None:
    """The row's own name of its data set, if the column is there; only the usual column may be missing."""
    if layout.source == _DEFAULT_SOURCE_COLUMN and layout.source not in row:
        return None
    value = _value(row, layout.source, where)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}, column {layout.source}: should be a text, not a {type(value).__name__}")
    if value:
        _check_text(value, f"{where}, column {layout.source}")
    return value


def _prompt(value: Any, layout: Layout, where: str) -> tuple[list[Message], str]:
    """The chat messages of a prompt, and what it asks."""
    if isinstance(value, str):
        _check_text(value, where)
        if _MESSAGES_AS_TEXT.match(value):
            raise DataError(f"{where}: is the text of a list of chat messages; it should be the list itself")
        text = layout.prompt_template.replace(QUESTION, value)
        return [{"role": "user", "content": text}], value.strip()
    if not isinstance(value, list):
        raise DataError(
            f"{where}: should be a question or a list of chat messages with role and content, "
            f"not {'missing' if value is None else f'a {type(value).__name__}'}"
        )
    messages = [_message(message, where) for message in value]
    if messages and messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: ends with the assistant's message, which the policy is to write")
    asked = [message["content"] for message in messages if message["role"] not in ("system", "developer")]
    return messages, "\n".join(asked).strip()


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{where}: should be a list of chat messages with role and content")
    role, content = value.get("role"), value.get("content")
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
        raise DataError(f"{where}: is no valid Unicode text ({error.reason})") from error
