"""Why: if a run resumes with other settings without a message, nobody can explain its result.

Not covered: that a run refuses before it starts a process (end_to_end/test_train.py).
"""

from dataclasses import asdict, replace
from fnmatch import fnmatchcase

import pytest

from megatron_fipo.config import Config, every_setting
from megatron_fipo.config.configure import load_config
from megatron_fipo.config.resume import FREE, changes, is_free, refused, table

DECIDES_WHAT_IS_TRAINED = (
    "run.seed",
    "model.",
    "algorithm.",
    "optimizer.",
    "data.",
    "environment.",
    "reward.",
    "rollout.",
    "validation.",
)
"""Beginnings of the keys that are not free; of the other sections all keys are."""


def test_each_key_is_on_one_side_for_one_reason() -> None:
    listed = [key for _, keys in table() for key in keys]
    assert len(listed) == len(set(listed)), "a key has one reason"
    assert all(keys for _, keys in table()), "a reason holds for some key"
    for key, _ in every_setting():
        assert is_free(key) == (key in listed)
        assert is_free(key) or key.startswith(DECIDES_WHAT_IS_TRAINED), key


@pytest.mark.parametrize("pattern", sorted({pattern for patterns in FREE.values() for pattern in patterns}))
def test_no_pattern_of_the_table_is_out_of_date(pattern: str) -> None:
    assert any(fnmatchcase(key, pattern) for key, _ in every_setting())


def test_an_unknown_key_is_not_free() -> None:
    assert not is_free("algorithm.new") and not is_free("new.key")


def differences(before: list[str], after: list[str]) -> list[str]:
    new = load_config(after)
    return refused(changes(asdict(load_config(before)), new), new)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.lr=1e-5"], ["optimizer.lr: 0.0001 → 1e-05"]),
        (["run.seed=1"], ["run.seed: 0 → 1"]),
        (["model.path=models/other"], ["model.path: embedded:tiny → models/other"]),
        (["algorithm.prompts_per_step=64"], ["algorithm.prompts_per_step: 16 → 64"]),
        (["reward.rule=exact_match"], ["reward.rule: math_verify → exact_match"]),
        (["algorithm.filter_groups.enable=false"], ["algorithm.filter_groups.enable: true → false"]),
        (["+data.task_options.terms=3"], ["data.task_options: {} → {'terms': 3}"]),
        (["data.instruction=x"], ["data.instruction: empty → x"]),
        (["data.instruction=x", "data.allow_change=true"], []),
        (["parallel.tensor=2", "hardware=h200", "cluster.trainer_nodes=3"], []),
        (["run.name=other", "run.directory=/elsewhere", "run.resume_changed=true"], []),
        (["rollout.servers=0", "rollout.addresses=[http://a:1]", "rollout.request_timeout_s=1"], []),
        (["checkpoint.every=1", "tracking.to=[]", "validation.every=1"], []),
    ],
)
def test_what_may_change(overrides: list[str], said: list[str]) -> None:
    assert differences([], overrides) == said


def test_the_length_of_a_decay_may_not_change() -> None:
    decay = ["optimizer.schedule=cosine"]
    assert differences(decay, [*decay, "run.steps=99"]) == [
        "run.steps: 24 → 99, over which optimizer.schedule=cosine changes the learning rate"
    ]
    constant = ["optimizer.schedule=constant"]
    assert differences(constant, [*constant, "run.steps=99"]) == []


def test_another_algorithm_is_named_key_by_key() -> None:
    """A section that is null in one of them counts as one key."""
    said = differences([], ["algorithm=dapo"])
    assert {"algorithm.loss_mode: future_kl → vanilla", "algorithm.future_kl: set → null"} <= {*said}
    assert not any(text.startswith("algorithm.future_kl.") for text in said)
    assert "algorithm.future_kl: null → set" in differences(["algorithm=dapo"], [])
    assert differences([], ["algorithm.future_kl.decay_rate=8"]) == ["algorithm.future_kl.decay_rate: 32.0 → 8.0"]


def test_a_key_that_an_older_version_did_not_have_had_its_default() -> None:
    config = load_config([])
    old = asdict(config)
    del old["run"]["resume_changed"], old["optimizer"]["clip_grad"], old["reward"]["overlong_buffer"]
    old["gone"] = {"key": 1}
    assert changes(old, config) == {}
    other = replace(config, optimizer=replace(config.optimizer, clip_grad=2.0))
    assert refused(changes(old, other), other) == ["optimizer.clip_grad: 1.0 → 2.0"]


def test_a_key_that_had_another_name_is_compared_by_it() -> None:
    old = asdict(load_config([]))
    old["algorithm"]["importance_sampling_cap"] = 2.0
    del old["algorithm"]["tis_cap"]
    assert refused(changes(old, load_config([])), load_config([])) == ["algorithm.tis_cap: 2.0 → null"]
    same = load_config(["algorithm.tis_cap=2"])
    assert not refused(changes(old, same), same)


def test_free_changes_are_told_too_but_for_those_of_every_start() -> None:
    new = Config()
    old = asdict(new)
    old["parallel"]["tensor"], old["rollout"]["addresses"], old["run"]["directory"] = 2, ["http://a:1"], "x"
    assert changes(old, new) == {"parallel.tensor": (2, 1)}
