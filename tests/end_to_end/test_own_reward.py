"""The page docs/rewards.md, followed from an empty directory: own problems, own reward, a run, and what stops it.

Why: each step is tested by itself; here is whether a newcomer gets there with the page alone. Columns reach the reward
after a resume too, and in validation. Not covered: that anything is learnt from it.
"""

import json
import subprocess
from pathlib import Path

import pytest

from megatron_fipo.rewards.failures import FAILURES_FILE
from tests.end_to_end import pages, runs

pytestmark = pytest.mark.slow

PAGE = (runs.ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
SMALL = ("algorithm.samples_per_prompt=4", "algorithm.filter_groups.enable=false", "validation.every=1")
SMALL += ("checkpoint.every=1", "tracking.samples_per_step=64", "run.directory=run", "optimizer.schedule=constant")


def block(language: str, number: int = 0) -> str:
    return pages.block(PAGE, language, number)


def run(directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return pages.run(PAGE, directory, [*SMALL, *overrides])


@pytest.mark.matrix  # test_own_environment.py brings a task of its own too
def test_the_page_from_an_empty_directory(tmp_path: Path) -> None:
    for name, text in (
        ("my_reward.py", block("python")),
        ("train.jsonl", block("json", 0)),
        ("held_out.jsonl", block("json", 1)),
    ):
        (tmp_path / name).write_text(text)

    done = run(tmp_path, "reward.rule=my_reward.py:scores")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "has no function scores" in done.stderr
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    steps = {json.loads(line)["question"]: json.loads(line)["steps"] for line in block("json", 0).splitlines()}
    samples = [
        json.loads(line)
        for path in sorted((tmp_path / "run/samples").glob("step-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert {sample["step"] for sample in samples} == {1, 2} and len(samples) == 2 * 8 * 4
    for sample in samples:
        (question,) = (question for question in steps if question in sample["prompt"])
        written = min(sample["response"].count("="), steps[question])
        expected = (2.0 if sample["accuracy"] else -0.5) + 0.05 * written
        assert sample["reward"] == pytest.approx(expected) and sample["extra"]["steps"] == written
    rows = runs.rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and all("reward/steps" in row for row in rows)
    assert all(row["verifier_crashes"] == 0 for row in rows)
    assert len({sample["reward"] for sample in samples}) > 2, "the control: not one value alone"
    assert not (tmp_path / "run" / FAILURES_FILE).exists()

    # The same run goes on with a reward that raises: no step is made of that, and the columns are there after a resume.
    raises = "def score(response, columns):\n    raise ValueError('steps ' + str(columns['steps']))\n"
    (tmp_path / "my_reward.py").write_text(raises)
    done = run(tmp_path, "run.steps=3", "reward.failed_share_stop=1")
    assert done.returncode == 1 and "resumed from" in done.stdout, done.stdout + done.stderr
    message = (
        "error: 32 of 32 checks in this step failed (32 crash; reward.rule=my_reward.py:score), the first: ValueError: "
    )
    assert message in done.stderr and f"run/{FAILURES_FILE} has its traceback" in done.stderr
    assert done.stdout.count("Traceback (most recent call last)") == 1 and 'my_reward.py", line 2' in done.stdout
    kept = [json.loads(line) for line in (tmp_path / "run" / FAILURES_FILE).read_text().splitlines()]
    assert {row["error"] for row in kept} == {f"ValueError: steps {count}" for count in steps.values()}
    assert len(kept) == 32 and all("my_reward.py" in row["traceback"] for row in kept)
    assert len(runs.rows(tmp_path / "run")) == 2
