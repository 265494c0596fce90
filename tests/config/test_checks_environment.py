"""Why: an environment whose name or options nothing reads would leave a run with samples of one turn, in silence.

Importing it is tests/launch/test_first_look.py.
"""

from pathlib import Path

import pytest

from megatron_fipo.config.checks_environment import check_environment_here, environment
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["environment.name=two_turns"],
            "environment.name: 'two_turns' is not an environment (single_turn, package.mod",
        ),
        (["environment.name='a b:c'"], "environment.name: 'a b:c' does not name a function"),
        (["+environment.options.told=x"], "environment.options: is not read by single_turn"),
        (["environment.variables=[a-b]"], "environment.variables: 'a-b' is not the name of a variable"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        list(environment(load_config(overrides)))
    assert str(refused.value).startswith(said)


def test_what_nothing_reads_is_warned_about() -> None:
    assert "is not read" in next(environment(load_config(["environment.variables=[KEY]"])))
    own = ["environment.name=mine.py:make", "environment.variables=[KEY]", "+environment.options.told=x"]
    assert not list(environment(load_config(own)))
    assert not list(environment(load_config([])))


def test_a_file_without_the_function_and_a_variable_without_a_value_are_refused_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEY", "secret")
    Path("mine.py").write_text("class Mine:\n    pass\n")
    for overrides, said in (
        (["environment.name=mine.py:Other"], "environment.name: mine.py has no function Other"),
        (["environment.name=other.py:Mine"], "environment.name: other.py is not found from"),
        (["environment.name=mine.py:Mine", "environment.variables=[LACKING]"], "environment.variables: LACKING is not"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_environment_here(load_config(overrides).environment)
        assert str(refused.value).startswith(said)
    check_environment_here(load_config(["environment.name=mine.py:Mine", "environment.variables=[KEY]"]).environment)
