"""Why: a rule that calls a right answer wrong, or the other way round, teaches exactly that.

Runs the real sympy, math-verify and reasoning-gym in this process. Deadlines and crashes: tests/rewards/test_pool.py.
"""

import subprocess
import sys

import pytest

from megatron_fipo.config import DataConfig
from megatron_fipo.data.reasoning_tasks import generate
from megatron_fipo.rewards.rules import exact_match, math_verify, reasoning_gym


@pytest.mark.parametrize(
    ("text", "truth", "accuracy", "answer"),
    [
        ("4+5=9. Answer: 9", "9", 1.0, "9"),
        ("Answer: 1,000", "1000", 1.0, "1000"),
        ("Answer: 8", "9", 0.0, "8"),
        ("Answer: 0.5", r"\frac12", 0.0, "0.5"),
        ("it is 9", "9", 0.0, ""),
        ("Answer: 9" + " " * 300, "9", 0.0, ""),
    ],
)
def test_exact_match_compares_strings_at_the_end_of_the_response(text, truth, accuracy, answer):
    verdict = exact_match(text, truth, {})
    assert (verdict.accuracy, verdict.answer) == (accuracy, answer)


@pytest.mark.parametrize(
    ("answer", "truth", "accuracy"),
    [
        ("7", "7", 1.0),
        ("007", "7", 1.0),
        ("7", "8", 0.0),
        ("0.5", r"\frac12", 1.0),
        ("14/2", "7", 1.0),
        (r"$\frac{\sqrt{8}}{2}$", r"\sqrt{2}", 1.0),
        (r"$2(x+1)$", "2x+2", 1.0),
        ("(1, 2)", "(1,2)", 1.0),
        ("(2, 1)", "(1,2)", 0.0),
        (r"\frac{", "7", 0.0),
        ("0.51", r"\frac12", 0.0),
        ("no idea", "7", 0.0),
    ],
)
def test_math_verify_judges_by_value(answer, truth, accuracy):
    assert math_verify(f"So it follows.\nAnswer: {answer}", truth, {}).accuracy == accuracy


def test_math_verify_takes_the_answer_line_before_a_box_and_a_box_without_a_line():
    assert math_verify(r"\boxed{3} Answer: 4", "4", {}).accuracy == 1.0
    assert math_verify(r"we get \boxed{\frac{1}{2}}", "0.5", {}).accuracy == 1.0
    assert math_verify("it is 4", "4", {}).accuracy == 0.0


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
    code = "import sys, megatron_fipo.rewards.worker; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
