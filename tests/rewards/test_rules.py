"""Why: a rule that calls a right answer wrong, or the other way round, teaches exactly that.

Runs the real reasoning-gym in this process. exact_match: test_extraction.py. math_verify: tests/rewards/mathematics.
Deadlines and crashes: test_pool.py.
"""

import subprocess
import sys

import pytest

from megatron_fipo.config import DataConfig
from megatron_fipo.data.reasoning_tasks import generate
from megatron_fipo.rewards.rules import reasoning_gym


def test_reasoning_gym_uses_the_tasks_own_scorer():
    problem = next(iter(generate(DataConfig(source="reasoning_gym", task="chain_sum"), "train")))
    truth = problem.ground_truth
    for response in (f"Answer: {truth}", f"<answer>{truth}</answer>", f" {truth}\n"):
        assert reasoning_gym(response, truth, problem.extra).accuracy == 1.0
    assert reasoning_gym("Answer: x", truth, problem.extra).accuracy == 0.0
    assert 0.0 < reasoning_gym(f"a + b = {truth}", truth, problem.extra).accuracy < 1.0


@pytest.mark.parametrize("task", [pytest.param("arc_agi", marks=pytest.mark.slow), "knights_knaves", "graph_color"])
def test_entries_survive_the_way_to_the_verifier(task):
    """These hold tuples, numpy scalars or integer keys, which a JSON entry would change under the scorer."""
    config = DataConfig(source="reasoning_gym", task=task, train_size=1)
    problem = next(iter(generate(config, "train")))
    verdict = reasoning_gym(f"<answer>{problem.ground_truth}</answer>", problem.ground_truth, problem.extra)
    assert verdict.accuracy == (1.0 if problem.ground_truth else 0.0)


def test_rules_import_neither_torch_nor_numpy():
    """Many workers run beside the trainer: each must stay small."""
    code = (
        "import sys; from megatron_fipo.rewards import rules, worker\n"
        "rules.prepare('exact_match', 0.0)\n"
        "assert 'sympy' not in sys.modules\n"
        "rules.prepare('math_verify', 0.0)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
