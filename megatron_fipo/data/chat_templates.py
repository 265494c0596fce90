"""Render a model's chat template, from messages to the prompt's text, by transformers' own renderer.

A template may read variables (enable_thinking) and today's date. With the date, the prompts change from day to day.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_fipo.errors import ConfigError, DataError, one_line

Message = dict[str, str]
"""One chat message: {"role": …, "content": …}."""

TEMPLATE_FILE = "chat_template.jinja"
_VARIABLES_KEY = "data.chat_template_variables"
_OWN_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}
)
_RENDER_SECONDS = 20.0
"""A thousand times the time for a long conversation. A template with nested loops could take days."""
_LONGEST_ADDED = 1 << 20
"""Characters that a template may add to the messages. Tokenising many more would take very long."""
# These two dates differ in every field of a date.
_ONE_DAY, _ANOTHER_DAY = datetime(2001, 2, 3, 4, 5, 6), datetime(2022, 10, 21, 16, 47, 38)


class ChatTemplate:
    """One template with its variables. `depends_on_date` becomes true if a prompt contains today's date."""

    def __init__(
        self, source: str, place: Path, special_tokens: dict[str, Any], variables: dict[str, Any], date: str | None
    ):
        """`place` is the model directory, `variables` are data.chat_template_variables, `date` chat_template_date.

        Raises:
            ConfigError: it is not a Jinja template, uses random numbers, or does not read one of the variables.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _get_template_variables

        self._name = f"the chat template of {place}"
        try:
            known = _get_template_variables(source)
        except TemplateError as error:
            raise ConfigError(
                "model.path", f"{self._name} cannot be compiled: {one_line(error)}", "a Jinja template"
            ) from error
        if drawing := _random_part(source):
            problem = f"{self._name} uses Jinja's {drawing}: prompts would differ from run to run"
            raise ConfigError("model.path", problem, "a template whose text follows from the messages")
        for name in variables:
            if name in _OWN_VARIABLES:
                raise ConfigError(f"{_VARIABLES_KEY}.{name}", "is given by the run", "another variable")
            if name not in known:
                rest = sorted(known - _OWN_VARIABLES - special_tokens.keys())
                remedy = f"it reads {', '.join(rest)}" if rest else "it reads none"
                raise ConfigError(f"{_VARIABLES_KEY}.{name}", "is not read by the model's chat template", remedy)
        self.depends_on_date = False
        self._source = source
        self._context = special_tokens | variables
        self._is_pinned = date is not None
        self._today = datetime.fromisoformat(date) if date else datetime.now()

    def render(self, messages: list[Message]) -> str:
        """Return the prompt, up to the beginning of the reply. DataError if the template refuses the messages."""
        clock = _Clock(self._today)
        text = self._render(messages, clock)
        if clock.was_read and not self._is_pinned and not self.depends_on_date:
            one, another = (self._render(messages, _Clock(day)) for day in (_ONE_DAY, _ANOTHER_DAY))
            self.depends_on_date = one != another
        return text

    def _render(self, messages: list[Message], clock: "_Clock") -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _time_limit(_RENDER_SECONDS):
                rendered: Any = render_jinja_template(
                    [messages],
                    chat_template=self._source,
                    add_generation_prompt=True,
                    strftime_now=clock.strftime,
                    **self._context,
                )
            text = "".join(rendered[0])
            text.encode()  # tokenizers do not accept lone surrogates
        except Exception as error:  # a template is a program: it can raise anything
            raise DataError(f"{self._name} fails: {one_line(error)}") from error
        if not text:
            raise DataError(f"{self._name} writes nothing")
        given = sum(len(message["content"]) for message in messages)
        if len(text) > 2 * given + _LONGEST_ADDED:
            raise DataError(f"{self._name} makes {len(text)} characters of {given}")
        return text


class _Clock:
    """Today's date for templates."""

    def __init__(self, now: datetime):
        self.was_read = False
        self._now = now

    def strftime(self, form: str) -> str:
        self.was_read = True
        return self._now.strftime(form)


def _random_part(source: str) -> str:
    """Return the name of a random function in a template, or an empty text."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(source).environment.parse(source)
    filters = any(entry.name == "random" for entry in tree.find_all(nodes.Filter))
    return "random" if filters else "lipsum" if any(n.name == "lipsum" for n in tree.find_all(nodes.Name)) else ""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer. Only the main thread receives signals; others have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    earlier = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *earlier)
        signal.signal(signal.SIGALRM, handler)


def find_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """Return the chat template of a model directory: chat_template.jinja, or else the one in tokenizer_config.json.

    Raises:
        DataError: the file is not UTF-8 text, or there are several templates and none is named default.
    """
    path = directory / TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise DataError(f"{directory}/tokenizer_config.json: none of its chat templates is named default")
    if template is not None and not isinstance(template, str):
        raise DataError(f"{directory}/tokenizer_config.json: chat_template should be a text")
    return template
