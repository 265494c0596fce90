"""Runs that end by themselves, in one line, because what they would train on is wrong.

Why: each of these looks healthy from outside: samples come, rewards come, losses fall. Not covered: the limits in
between, which tests/policy/test_agreement.py and tests/rewards/test_failed_checks.py have.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.engines.pool import EnginePool
from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL
from tests.engines.tokens import token_of

pytestmark = pytest.mark.slow


@pytest.fixture
def another_rope(tmp_path: Path) -> str:
    """The override for the embedded model, but for the base of its rotary embedding, which no weight update carries."""
    model = tmp_path / "another-rope"
    shutil.copytree(resolve_embedded("embedded:tiny"), model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    config.pop("rope_theta", None)
    (model / "config.json").write_text(json.dumps(config))
    return f"model.path={model}"


def stopped(server: EnginePool, directory: Path, *overrides: str) -> str:
    """The output of a run on that server, which has to end with an error and without a traceback."""
    settings = [*SMALL, *runs.on(server), *overrides]
    output = runs.finish(runs.start(directory, *settings, token=token_of(server)), directory, exit_code=1)
    assert "Traceback" not in output, output
    assert output.count("error: ") == 1 and "failed first" not in output, output
    assert not runs.rows(directory), "it trained on what is wrong"
    return output


def test_an_engine_of_another_rotary_embedding(server: EnginePool, another_rope: str, tmp_path: Path) -> None:
    output = stopped(server, tmp_path / "run", another_rope)
    assert "the log-probs of trainer and engine differ by" in output
    assert "rollout.log_prob_diff_stop=0.05" in output


@pytest.mark.matrix  # tests/rewards/test_pool.py has it
def test_a_verifier_that_never_answers_in_time(server: EnginePool, tmp_path: Path) -> None:
    """The deadline is the millisecond that each check has at least; reading this answer takes longer."""
    answer = " + ".join(f"\\frac{{1}}{{{n}}}" for n in range(101, 151))
    row = {"prompt": [{"role": "user", "content": "4+5=?"}], "reward_model": {"ground_truth": answer}}
    (tmp_path / "slow.jsonl").write_text(json.dumps(row) + "\n")
    batch = [f"algorithm.{name}=2" for name in ("prompts_per_step", "samples_per_prompt", "mini_batch_prompts")]
    data = [f"data.train=[{tmp_path / 'slow.jsonl'}]", "reward.timeout_s=0.000001"]
    output = stopped(server, tmp_path / "run", *batch, *data)
    assert re.search(r"\d of 4 checks in this step failed \(\d timeout; reward\.rule=math_verify\)", output)


@pytest.mark.matrix  # tests/data has its message
def test_a_problem_that_cannot_be_read(tmp_path: Path) -> None:
    """Only rank 0 reads problems; the other ranks must not tell of a lost connection instead."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1+1=?", "answer": 2}\n{"question": "1+2=?", "answer": ["3"]}\n')
    settings = [*SMALL, "data=questions", f"data.train=[{bad}]"]
    output = runs.finish(runs.start(tmp_path / "run", *settings), tmp_path / "run", exit_code=2)
    assert f"error: {bad}, row 2, column answer: is a list; data.columns.answer=answer.0 is" in output
    assert "Traceback" not in output, output
    assert output.count("error: ") == 1 and "failed first" not in output, output
