"""What a launcher refuses before it starts a run's processes: rows, columns, a reward's module, a hub out of reach.

Why: each of these ended a run only after its servers and ranks had started. Not covered: what is wrong in later rows,
and a reward whose module takes longer to import than the launcher waits; both are found when the run has started.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_fipo.config import Config, RewardConfig
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import FipoError, RunFailed
from megatron_fipo.launch import first_look
from megatron_fipo.launch.first_look import look_first, look_here, splits_read
from megatron_fipo.rewards.process import verifier_process

GOOD = ("data.train=[good.jsonl]", "data.validation=[]", "validation.every=0", "reward.rule=mine.py:score")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "good.jsonl": '{"prompt": "1+1=?", "reward_model": {"ground_truth": "2"}}\n',
        "columns.jsonl": '{"task": "1+1=?", "result": "2"}\n',
        "gap.jsonl": '{"prompt": "1+1=?", "reward_model": {"ground_truth": null}}\n',
        "empty.jsonl": "",
        "mine.py": "def score(response):\n    return 1.0\n",
        "imports.py": "import there_is_no_such_module\ndef score(response):\n    return 1.0\n",
        "asks.py": "def score(answer_of_the_model):\n    return 1.0\n",
        "dies.py": "import os\nos._exit(3)\ndef score(response):\n    return 1.0\n",
        "no_parameters.py": "def make():\n    return 1.0\n",
        "slow.py": "import time\ntime.sleep(60)\ndef score(response):\n    return 1.0\n",
    }.items():
        Path(name).write_text(text)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


OWN = ("environment.name=mine.py:score",)


def config_of(*overrides: str) -> Config:
    return load_config([*GOOD, *overrides])


@pytest.mark.parametrize(
    ("override", "exit_code", "said"),
    [
        ("data.train=[good.jsonl,columns.jsonl]", 2, "columns.jsonl, row 1, column prompt: no column prompt; it has"),
        ("data.train=[gap.jsonl]", 2, "gap.jsonl, row 1, column reward_model.ground_truth: the answer is missing"),
        ("data.train=[empty.jsonl]", 2, "empty.jsonl: has no rows"),
        ("reward.rule=imports.py:score", 2, "reward.rule: imports.py:score cannot be imported: ModuleNotFoundError"),
        ("reward.rule=no_such.module:score", 2, "reward.rule: no_such.module:score cannot be imported"),
        (
            "reward.rule=mine:scores",
            2,
            "reward.rule: mine has no function scores (its functions: score)",
        ),
        ("reward.rule=asks.py:score", 2, "reward.rule: asks.py:score asks for answer_of_the_model"),
        ("environment.name=imports.py:score", 2, "environment.name: imports.py:score cannot be imported: ModuleNotF"),
        ("environment.name=no_parameters.py:make", 2, "environment.name: no_parameters.py:make cannot be called"),
        ("environment.name=dies.py:score", 1, "the environment process for environment.name=dies.py:score did not st"),
        ("reward.rule=dies.py:score", 1, "the verifier process for reward.rule=dies.py:score did not start"),
    ],
)
def test_what_a_run_would_end_with_is_said_first(
    override: str, exit_code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_look, "LONGEST_IMPORT_S", 100.0)  # a busy machine may take longer than a launcher waits
    config = config_of(override)
    with pytest.raises(FipoError) as refusal:
        look_here(config, splits_read(config))
    assert str(refusal.value).startswith(said) or f"/{said}" in str(refusal.value)
    assert refusal.value.exit_code == exit_code and str(refusal.value).isprintable()


def test_what_can_run_passes() -> None:
    """The control of the refusals: a check that always fails would not pass it. Bad answers may be left out."""
    for overrides in ((), ("data.train=[gap.jsonl]", "data.bad_answers=drop"), ("data=chain_sum",), OWN):
        config = config_of(*overrides)
        look_here(config, splits_read(config))


def test_only_what_is_read_is_looked_at() -> None:
    assert splits_read(config_of()) == ("train",)
    assert splits_read(config_of("validation.every=1", "data.validation=[good.jsonl]")) == ("train", "validation")


def test_a_module_that_is_long_in_coming_is_left_to_the_verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_look, "LONGEST_IMPORT_S", 1.0)
    started = time.monotonic()
    with first_look._imported(verifier_process(RewardConfig(rule="slow.py:score"))):
        pass
    assert 1.0 <= time.monotonic() - started < 20


def test_bad_data_is_not_kept_waiting_by_a_slow_module() -> None:
    config = config_of("reward.rule=slow.py:score", "data.train=[empty.jsonl]")
    started = time.monotonic()
    with pytest.raises(FipoError, match="has no rows"):
        look_here(config, ("train",))
    assert time.monotonic() - started < first_look.LONGEST_IMPORT_S


@pytest.mark.slow
def test_a_hub_out_of_reach_is_said_by_the_process_that_looks() -> None:
    config = config_of("data.source=hub", "data.train=[owner/name]")
    with pytest.raises(RunFailed, match=r"^owner/name: is neither .* and the hub cannot be reached \(") as refusal:
        look_first(config, ("train",))
    assert refusal.value.exit_code == 2
    look_first(config_of(), ("train",))  # the control


@pytest.mark.slow
def test_the_command_says_it_in_one_line_and_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_fipo.train", *GOOD, "reward.rule=imports.py:score", "run.directory=run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: reward.rule: imports.py:score cannot") and done.stderr.count("\n") == 1
    assert not Path("run").exists(), "the launcher makes it before it starts its ranks"
