"""Why: generated problems must repeat from run to run and stay apart from the held-out ones.

tests/rewards/test_rules.py tests scoring.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import DataConfig
from megatron_fipo.data.column_sums import write_tokenizer
from megatron_fipo.data.problems import load_problems
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.errors import ConfigError

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture
def tokenizer(tmp_path: Path):
    write_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def config(**changes) -> DataConfig:
    settings: dict[str, Any] = {"task": "chain_sum", "task_options": SMALL, "train_size": 60, "validation_size": 20}
    return DataConfig(source="reasoning_gym", **(settings | changes))


def test_problems_repeat_and_carry_instruction_and_entry(tokenizer):
    asked = config(instruction="Answer with the number alone.")
    first = load_problems(asked, "train", tokenizer, 1000)
    assert first.problems == load_problems(asked, "train", tokenizer, 1000).problems
    problem = first.problems[0]
    assert problem.text.endswith("=\n\nAnswer with the number alone.")
    assert problem.extra["options"] == SMALL
    assert json.loads(json.dumps(problem.extra)) == problem.extra


def test_training_problems_are_apart_from_validation_even_in_a_small_task(tokenizer):
    train = load_problems(config(), "train", tokenizer, 1000)
    validation = load_problems(config(), "validation", tokenizer, 1000)
    assert not {problem.id for problem in train.problems} & {problem.id for problem in validation.problems}
    assert train.counts.dropped_held_out > 0
    assert train.counts.rows == train.counts.kept + train.counts.duplicates + train.counts.dropped_held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chain_summ"}, "data.task: reasoning-gym has no task 'chain_summ'.*chain_sum"),
        ({"task_options": {"terms": 2}}, "data.task_options.*min_terms"),
        ({"task_options": {"min_terms": 5, "max_terms": 2}}, "data.task_options: chain_sum refuses them"),
        ({"task_options": {"seed": 3}}, "data.task_options.seed: is set by the run"),
    ],
)
def test_a_wrong_task_or_option_is_refused_with_what_would_be_right(tokenizer, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_problems(config(**changes), "train", tokenizer, 1000)
