"""The page docs/environments.md, followed from an empty directory: an environment of one's own, a run, and a resume.

Why: each part is tested by itself; here the embedded model and a real server train on samples of two turns whose
tokens, rewards and masks are known. Trainer and engine agree on the actions' log-probs. Not covered: that anything is
learnt from it.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.engines.pool import EnginePool
from tests.end_to_end import pages, runs
from tests.engines.tokens import token_of

pytestmark = pytest.mark.slow

PAGE = (runs.ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
SMALL = ("algorithm.samples_per_prompt=4", "algorithm.filter_groups.enable=false", "validation.every=2")
SMALL += ("checkpoint.every=1", "tracking.samples_per_step=64", "run.directory=run", "optimizer.schedule=constant")
SMALL += ("parallel=single", "environment.workers=1", "tracking.samples_per_validation=8", "validation.samples=1")


def block(language: str) -> str:
    return pages.block(PAGE, language)


def run(server: EnginePool, directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return pages.run(PAGE, directory, [*SMALL, *runs.on(server), *overrides], token_of(server))


def kept(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "run/samples" / f"{name}.jsonl").read_text().splitlines()]


def check(sample: dict[str, Any]) -> int:
    """Hold one sample against what the page's environment does; how often the policy spoke."""
    turns = sample.get("turns", [{"by": "policy", "text": sample["response"]}])
    assert [turn["by"] for turn in turns] in (["policy"], ["policy", "environment", "policy"])
    if len(turns) == 3:
        assert turns[1]["text"] == f"CheckAnswer\n{sample['prompt']}", "word by word as it was told"
        assert turns[0]["text"] + turns[1]["text"] + turns[2]["text"] == sample["response"]
    answers = [re.findall(r"Answer: (\d)", turn["text"]) for turn in turns[::2]]
    right = [bool(found) and found[-1] == sample["ground_truth"] for found in answers]
    assert not any(right[:-1]), "who is right is not asked again"
    assert sample["accuracy"] == right[-1] and sample["reward"] == (1 / len(right) if right[-1] else -1)
    assert sample["extra"] == {"tries": len(right)}
    return len(right)


def test_the_page_from_an_empty_directory(server: EnginePool, tmp_path: Path) -> None:
    (tmp_path / "try_again.py").write_text(block("python"))
    done = run(server, tmp_path, "environment.name=try_again.py:TryOnce")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "has no function TryOnce" in done.stderr
    done = run(server, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    rows = runs.rows(tmp_path / "run")
    for step in (1, 2):
        samples = kept(tmp_path, f"step-{step:06d}")
        assert len(samples) == 8 * 4
        turns = [check(sample) for sample in samples]
        assert {1, 2} <= set(turns), "some were right at once, and some were asked again"
        row = rows[step - 1]
        assert row["turns_mean"] == sum(turns) / len(turns) and row["environment_failures"] == 0
        told = sum(sample.get("context_length", 0) for sample in samples)
        said = sum(sample["length"] for sample in samples)
        assert row["response_tokens"] == said == row["tokens_trained"] or row["tokens_trained"] < said
        assert row["context_share"] == pytest.approx(told / (told + said))
        assert row["ppo_kl_first"] == 0 and row["log_prob_diff_mean"] < 1e-4
    assert {check(sample) for sample in kept(tmp_path, "validation-000002")} <= {1, 2}
    shown = (tmp_path / "run/samples/step-000001.txt").read_text()
    assert "-- told:\nCheckAnswer\n" in shown and "tokens in 2 turns" in shown

    done = run(server, tmp_path, "run.steps=3", "environment.max_turns=1")
    assert done.returncode == 2 and "environment.max_turns: 2 → 1" in done.stderr
    done = run(server, tmp_path, "run.steps=3", "environment.attempts=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [1, 2, 3]
