"""algorithm.name is a label. Why: a run that is called dapo but trains FIPO would always be compared as DAPO.

Not covered: two algorithms with the same loss_mode, such as dapo and grpo, which the settings cannot distinguish.
"""

import pytest

from megatron_fipo.config.algorithm_names import SHIPPED
from megatron_fipo.config.configure import configuration_directory, load_config
from megatron_fipo.errors import ConfigError
from tests.config.judging import judge


def test_the_names_are_those_of_the_group() -> None:
    choices = {path.stem for path in (configuration_directory() / "algorithm").glob("*.yaml")}
    assert choices == SHIPPED.keys()
    for name in choices:
        algorithm = load_config([f"algorithm={name}"]).algorithm
        assert (algorithm.name, algorithm.loss_mode) == (name, SHIPPED[name])


def test_the_name_of_another_algorithm_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^algorithm\.name: says dapo, .*algorithm=dapo, without \.name, to choose it"
    ):
        judge("algorithm.name=dapo")
    assert judge("algorithm=dapo") == []


def test_a_name_that_is_no_algorithms_is_a_label_and_said_to_be_one() -> None:
    (warning,) = judge("algorithm.name=foo")
    assert warning.startswith(
        "algorithm.name: foo is a label alone, and the loss is loss_mode=future_kl; algorithm=fipo|"
    )
    (warning,) = judge("algorithm.name=gpso")
    assert warning.endswith("did you mean algorithm=gspo?")
    assert judge("algorithm=dapo", "algorithm.name=mine", "algorithm.loss=mine.py:loss") == [], "a loss of one's own"
