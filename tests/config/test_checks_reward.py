"""The section `reward` of a configuration: names of rules, files of the user's own, variables.

Why: a wrong name has to be reported before processes start. tests/rewards/test_own.py tests the import of functions.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.errors import ConfigError
from tests.config.judging import judge


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("exactmatch", "'exactmatch' is not a rule .*did you mean exact_match"),
        ("mine.py", r"mine\.py does not name a function of that file \(mine\.py:score or mine\.py:other\)"),
        ("missing.py", r"missing\.py does not name a function of that file \(missing\.py:FUNCTION\)"),
        ("missing.py:score", r"missing\.py is not found from .*package\.module:function"),
        ("mine.py:scor", r"mine\.py has no function scor \(its functions: score, other\)"),
        ("broken.py:f", r"broken\.py, line 2: "),
        ("'a b:c'", "a b is neither a module nor a file"),
        ("'mine.py:'", "is not a rule"),
        ("':score'", "is not a rule"),
    ],
)
def test_a_wrong_rule_is_refused(
    rule: str,
    message: str,
    model_directory: Any,
    tiny_files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("import json as j\ndef score(response): return 0\ndef other(response): return 0\n")
    Path("broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(ConfigError, match=rf"^reward\.rule: .*{message}"):
        judge(*tiny_files, f"reward.rule={rule}", local=True)
    # The controls, in the same directory: one that is there, and one that only importing the module would find.
    right = "mine.py:score" if rule == "mine.py:scor" else "package.module:score"
    if rule in ("mine.py:scor", "exactmatch"):
        assert judge(*tiny_files, f"reward.rule={right}", local=True) == []


def test_variables_are_names_that_are_set(tiny_files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    own = ("reward.rule=package.module:score", *tiny_files)
    with pytest.raises(ConfigError, match=r"^reward\.environment: 'A=b' is not the name"):
        judge(*own, "reward.environment=['A=b']")
    with pytest.raises(ConfigError, match=r"^reward\.environment: JUDGE_KEY is not set .export JUDGE_KEY=…"):
        judge(*own, "reward.environment=[JUDGE_KEY]", local=True)
    monkeypatch.setenv("JUDGE_KEY", "x")
    assert judge(*own, "reward.environment=[JUDGE_KEY]", local=True) == []
    assert "reward.environment is not read" in judge("reward.environment=[JUDGE_KEY]")[0]


def test_what_a_rule_of_ones_own_does_not_read_is_warned_about() -> None:
    own = "reward.rule=package.module:score"
    assert judge(own) == []
    assert "these are not read" in judge(own, "reward.correct=2")[0]
    assert judge(own, "data=chain_sum") == [], "it may score what reasoning-gym generates"


def test_no_answers_take_a_rule_of_ones_own() -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.columns\.answer: is null, but reward\.rule=math_verify needs a right answer"
    ):
        judge("data.columns.answer=null")
    assert judge("data.columns.answer=null", "reward.rule=package.module:score") == []


def test_a_program_has_a_place_and_its_tests_have_time() -> None:
    code = ("reward=code", "data.columns.answer=null")
    assert judge(*code) == [], "the control: tests say what is right"
    for setting, message in (
        ("reward.code.template='print(1)'", r"^reward\.code\.template: has 0 places"),
        ("reward.code.pattern='a'", r"^reward\.code\.pattern: 'a' has 0 groups"),
        ("reward.timeout_s=29", r"^reward\.timeout_s: 29 leaves no time for .*total_s=20 .*at least 30"),
    ):
        with pytest.raises(ConfigError, match=message):
            judge(*code, setting)
    assert judge(*code, "reward.timeout_s=30") == []


def test_a_judge_that_cannot_work_is_refused(tiny_files: list[str]) -> None:
    asked = ("reward=judge", "reward.judge.url=http://judge/v1", "reward.judge.model=m", *tiny_files)
    assert judge(*asked, local=True) == [], "the control"
    for setting, message in (
        ("reward.judge.url=judge", r"^reward\.judge\.url: 'judge' is no URL"),
        ("reward.judge.url=http://me:word@judge/v1", r"^reward\.judge\.url: has a user or a password, .*key_variable"),
        ("reward.judge.url=http://me@judge/v1", r"^reward\.judge\.url: has a user"),
        ("reward.judge.url=me:word@judge/v1", r"^reward\.judge\.url: has a user"),
        ("reward.judge.model=''", r"^reward\.judge\.model: is empty"),
        ("reward.judge.prompt=x", r"^reward\.judge\.prompt: has no place for the response"),
        ("reward.judge.score_pattern=x", r"^reward\.judge\.score_pattern: 'x' has 0 groups"),
        ("reward.judge.score_wrong=10", r"^reward\.judge\.score_right: 10 is reward\.judge\.score_wrong too"),
        ("reward.timeout_s=20", r"^reward\.timeout_s: 20 leaves no time for .*=60 .at least 62"),
        ("reward.judge.key_variable=JUDGE_KEY", r"^reward\.judge\.key_variable: JUDGE_KEY is not set"),
        ("data.columns.answer=null", r"^data\.columns\.answer: is null, but reward\.rule=judge needs"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            judge(*asked, setting, local=True)
        assert "word@" not in str(caught.value)
    assert judge(*asked, "reward.judge.url=http://judge/v1/@me", local=True) == [], "the control: an @ in the path"
    without = ("data.columns.answer=null", 'reward.judge.prompt="{response}"')
    assert judge(*asked, *without, local=True) == []
    assert "reward.rule=judge does" in judge("reward.judge.model=m")[0]
    assert judge(*asked, "reward.environment=[HTTPS_PROXY]") == [], "a judge's processes read it"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("null", "is not set"),
        ("'a(b'", "is not a regular expression"),
        ("'a'", "has 0 groups"),
        ("'(a)(b)'", "has 2 groups"),
    ],
)
def test_an_answer_pattern_has_one_group(pattern: str, message: str) -> None:
    for section in ("data.answer", "data.validation_columns.answer"):
        with pytest.raises(ConfigError, match=rf"^{section}_pattern: .*{message}"):
            judge(f"{section}_format=pattern", f"{section}_pattern={pattern}")
    assert judge("data.answer_format=pattern", "data.answer_pattern='(?:a|b)(c)'") == []


def test_an_answer_pattern_that_nothing_reads_is_refused() -> None:
    """Without its format the whole text would be the right answer, and every response would be wrong."""
    with pytest.raises(ConfigError, match=r"data.answer_pattern: is not read with data.answer_format=plain"):
        judge("data.answer_pattern='(c)'")
    own = ["data.validation_columns.answer_format=pattern", "data.answer_pattern='(c)'"]
    assert judge(*own) == [], "the pattern of the validation files alone"
