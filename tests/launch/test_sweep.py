"""Why: a comparison over algorithms and seeds is one command, and a mistake in it costs nothing.

Not covered: more than one override of Hydra's sweep grammar, which is its own. Runs: tests/end_to_end/test_sweep.py.
"""

import re
from pathlib import Path

import pytest

from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError, FipoError
from megatron_fipo.launch.sweep import judge, plan
from megatron_fipo.runs.directory import Start, keep_settings


def test_all_combinations_in_directories_that_say_what_differs(tmp_path: Path) -> None:
    members = plan(["algorithm=fipo,dapo", "run.seed=range(1,3)", "run.steps=7", f"run.directory={tmp_path}"])
    assert [member.name for member in members] == [
        "algorithm-fipo_seed-1",
        "algorithm-fipo_seed-2",
        "algorithm-dapo_seed-1",
        "algorithm-dapo_seed-2",
    ]
    for member in members:
        assert member.directory == tmp_path / member.name
        assert f"algorithm-{member.config.algorithm.name}_seed-{member.config.run.seed}" == member.name
        assert member.config.run.steps == 7
        assert load_config(member.overrides) == member.config, "its own command line is the same run"


def test_without_a_directory_a_sweep_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = plan(["data.train=[a.jsonl],[b/c.jsonl]", "run.name=mine"])
    assert re.fullmatch(r"\d{8}-\d{6}", one.directory.parent.name)
    assert one.directory.parent == two.directory.parent and one.directory.parents[1] == tmp_path / "runs" / "mine-sweep"
    assert (one.name, two.name) == ("train-a.jsonl", "train-b-c.jsonl")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["algorithm=fipo,dpao"], r"algorithm=dpao: there is no such choice \(did you mean dapo\?"),
        (["run.stepz=1,2"], r"run\.stepz: there is no such key"),
        (["run.seed=1,2", "--cfg", "job"], r"--cfg: cannot be given together with -m"),
        (["run.directory=a,b"], r"run\.directory: is the one directory of all runs"),
        (["run.seed=interval(0,1)"], r"--multirun: .*INTERVAL"),
        (["run.seed=1,2,"], r"--multirun: "),
        (["run.name='a?b','a!b'"], r"--multirun: two runs would be called name-a-b"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        plan(arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_each_run_is_judged_before_the_first_starts(tmp_path: Path) -> None:
    directory = f"run.directory={tmp_path}"
    good = plan(["algorithm.mini_batch_prompts=4,8", directory])
    judge(good)
    with pytest.raises(ConfigError, match=r"^mini_batch_prompts-5: algorithm\.mini_batch_prompts: 5 does not divide"):
        judge(plan(["algorithm.mini_batch_prompts=4,5", directory]))
    checkpoint = good[1].directory / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    keep_settings(load_config([*good[1].overrides, "optimizer.lr=1"]), good[1].directory, 0, Start(None, {}, ()))
    with pytest.raises(FipoError, match=r"^mini_batch_prompts-8: run\.directory: .*optimizer\.lr: 1\.0 → 0\.0001"):
        judge(good)
    checkpoint.rmdir()
    judge(good)
    (good[1].directory / "metrics.jsonl").write_text('{"step": 24}\n')
    (good[1].directory / "summary.json").write_text('{"steps": 24}')
    with pytest.raises(FipoError, match=r"the run there is done, with other settings: optimizer\.lr: 1\.0 → 0\.0001"):
        judge(good)
