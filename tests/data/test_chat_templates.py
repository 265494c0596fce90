"""Why: a template that is ignored, misread or filled with today's date changes every prompt without any error.

test_tokenizers.py tests how rendered text becomes token ids.
"""

import json
import signal
from datetime import datetime
from pathlib import Path

import pytest

from megatron_fipo.config import DataConfig
from megatron_fipo.data import chat_templates
from megatron_fipo.data.chat_templates import ChatTemplate, find_template
from megatron_fipo.data.column_sums import write_tokenizer
from megatron_fipo.data.problems import load_problems
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.errors import ConfigError, DataError
from tests.data.problem_files import row, write

MESSAGES = [{"role": "user", "content": "1+2=?"}]
THINKING = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<eos>{% endif %}"
LLAMA = """{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif -%}Today: {{ date_string }} {{ messages[0].content }}"""
DATED = [
    ("{{ strftime_now('%d') }}", "26"),
    ("{{ strftime_now('%A') }}", "Friday"),
    ("{{ strftime_now('%H') }}", "00"),
    ("{% if messages[0].content == '1+2=?' %}{{ strftime_now('%Y') }}{% else %}none{% endif %}", "2024"),
    (LLAMA, "Today: 26 Jul 2024 1+2=?"),
]


def template(source: str, date: str | None = None, **variables: object) -> ChatTemplate:
    return ChatTemplate(source, Path("model"), {"eos_token": "<eos>"}, dict(variables), date)


def test_variables_reach_the_template() -> None:
    assert template(THINKING).render(MESSAGES) == "1+2=?"
    assert template(THINKING, enable_thinking=False).render(MESSAGES) == "1+2=?<eos>"
    assert template(THINKING, enable_thinking=True).render(MESSAGES) == "1+2=?"
    assert template("{{ eos_token }}{{ messages | tojson }}").render(MESSAGES) == "<eos>" + json.dumps(MESSAGES)
    assert template("a{% if add_generation_prompt %}:{% endif %}").render(MESSAGES) == "a:"


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (THINKING, "enable_thinkin", "is not read by the model's chat template .it reads enable_thinking"),
        ("{{ messages }}", "enable_thinking", "is not read by the model's chat template .it reads none"),
        (THINKING, "messages", "is given by the run"),
        (LLAMA, "strftime_now", "is given by the run"),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_refused(source: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.chat_template_variables\.{name}: {message}"):
        template(source, **{name: 1})


def test_variables_without_a_template_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"^data\.chat_template_variables: .* has no chat template"):
        load_tokenizer(tmp_path, DataConfig(chat_template_variables={"enable_thinking": False}))


@pytest.mark.parametrize(("source", "text"), DATED)
def test_a_date_in_the_prompt_is_noticed_and_can_be_pinned(source: str, text: str) -> None:
    free, pinned = template(source), template(source, "2024-07-26")
    free.render(MESSAGES)
    assert free.depends_on_date
    assert pinned.render(MESSAGES) == text
    assert not pinned.depends_on_date


@pytest.mark.parametrize("source", [THINKING, "{% set unused = strftime_now('%d') %}{{ messages[0].content }}"])
def test_a_template_without_a_date_in_its_text_is_not_warned_about(source: str) -> None:
    used = template(source)
    used.render(MESSAGES)
    assert not used.depends_on_date


def test_a_date_that_only_some_prompts_have_is_noticed_when_it_comes() -> None:
    used = template("{% if messages[0].content == '1+2=?' %}{{ strftime_now('%Y') }}{% else %}none{% endif %}")
    used.render([{"role": "user", "content": "other"}])
    assert not used.depends_on_date
    used.render(MESSAGES)
    assert used.depends_on_date


def test_a_variable_can_take_the_dates_place() -> None:
    used = template(LLAMA, date_string="1 Jan 2026")
    assert used.render(MESSAGES) == "Today: 1 Jan 2026 1+2=?"
    assert not used.depends_on_date


def test_problems_say_that_their_prompts_depend_on_the_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ strftime_now('%d%m') }}")
    file = write(tmp_path / "a.jsonl", [row("1+2=?"), row("3+4=?")])

    def load(day: int, date: str | None = None):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime(2026, 1, day)

        monkeypatch.setattr(chat_templates, "datetime", Clock)
        config = DataConfig(train=[file], chat_template_date=date)
        return load_problems(config, "train", load_tokenizer(tmp_path, config), 20)

    first, second, pinned = load(1), load(2), load(2, "2026-01-01")
    assert [problem.text for problem in first.problems] == ["1+2=?0101", "3+4=?0101"]
    (warning,) = first.warnings
    assert "today's date" in warning and "data.chat_template_date=YYYY-MM-DD" in warning
    assert first.fingerprint.prompts != second.fingerprint.prompts
    assert first.fingerprint.problems == second.fingerprint.problems
    assert pinned.warnings == [] and pinned.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ messages[0].__class__.__mro__ }}", "SecurityError"),
        ("{% for m in messages %}{% endfor %}", "writes nothing"),
    ],
)
def test_whatever_a_template_raises_is_one_line(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        template(source).render(MESSAGES)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'x' * 3000000 }}", "makes 3000000 characters of 5"),
        (r"{{ '\ud800' }}", "UnicodeEncodeError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "TimeoutError: not done"),
    ],
)
def test_a_template_has_an_end(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "_RENDER_SECONDS", 0.3)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(DataError, match=message):
        template(source).render(MESSAGES)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_long_message_is_no_fault_of_the_template() -> None:
    content = "x" * 3_000_000
    assert template("{{ messages[0].content }}").render([{"role": "user", "content": content}]) == content


@pytest.mark.parametrize("source", ["{{ [1, 2, 3] | random }}", "{{ lipsum(n=1) }}"])
def test_a_template_that_draws_at_random_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.path: the chat template of model uses Jinja's (random|lipsum)"):
        template(source)
    template("{{ messages[0].random }} lipsum")


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.path: the chat template of model cannot be compiled: TemplateS"):
        template("{% if %}")


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert find_template(tmp_path, {}) is None
    assert find_template(tmp_path, {"chat_template": "a"}) == "a"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert find_template(tmp_path, {"chat_template": named}) == "d"
    with pytest.raises(DataError, match="none of its chat templates is named default"):
        find_template(tmp_path, {"chat_template": named[:1]})
    with pytest.raises(DataError, match="should be a text"):
        find_template(tmp_path, {"chat_template": 3})
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    assert find_template(tmp_path, {"chat_template": "a"}) == "é"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja: cannot be read"):
        find_template(tmp_path, {})
