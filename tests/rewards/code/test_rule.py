"""Why: a wrong program, a row without tests and a broken sandbox are three things, and only the
first is a wrong answer.

Which programs escape is tests/rewards/code/test_sandbox.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.config.code import CodeConfig
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, sample_from_lists
from megatron_fipo.rewards.code import rule as rules
from megatron_fipo.rewards.code.rule import CodeRule
from megatron_fipo.rewards.code.sandbox import find_sandbox
from megatron_fipo.rewards.code.tests import BadTests, passes, read_tests
from megatron_fipo.rewards.extraction import last_code_block
from megatron_fipo.rewards.failed_checks import judge_failed_checks
from megatron_fipo.rewards.pool import RewardPool

DOUBLE = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}


@pytest.fixture
def unprotected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of this file are our own."""
    monkeypatch.setattr(rules, "find_sandbox", lambda settings: find_sandbox(CodeConfig(sandbox="none")))


def verdict(program: str, tests: Any = DOUBLE, **settings: Any) -> tuple[float, Any]:
    rule = CodeRule(CodeConfig(**settings))
    found = rule({"columns": json.dumps({"input_output": tests}), "response": program})
    assert found.reward is None, "reward.correct and reward.incorrect make the reward"
    return found.accuracy, found.extra["first_failure"]


@pytest.mark.usefixtures("unprotected")
def test_a_program_is_right_if_it_passes_all_tests() -> None:
    right, half = "print(int(input()) * 2)", "print(int(input()) ** 2 + 1)"
    assert verdict(right) == (1.0, "")
    assert verdict(f"I think:\n```python\nprint(1)\n```\nNo:\n```python\n{right}\n```\nDone.") == (1.0, "")
    assert verdict(half) == (0.0, "output")
    assert verdict(half, partial_credit=True) == (0.5, "output")
    assert verdict("print(1 +") == (0.0, "exit 1")
    assert verdict("") == (0.0, "output")
    call = {"fn_name": "double", "inputs": [[1], [2]], "outputs": [2, [4]]}
    assert verdict("def double(x): return x * 2", json.dumps(call)) == (1.0, "")
    assert verdict("def doubled(x): return x * 2", call) == (0.0, "exit 1")


@pytest.mark.usefixtures("unprotected")
def test_a_pattern_and_a_template_make_the_program() -> None:
    settings = {"pattern": "Answer: ([0-9+ ]+)", "template": "print(({program}) % 10)"}
    tests = {"inputs": [""], "outputs": ["7"]}
    assert verdict("4+5=9. 9+8=7. Answer: 7", tests, **settings) == (1.0, "")
    assert verdict("Answer: 1 Answer: 4+5+8+0", tests, **settings) == (1.0, "")
    assert verdict("Answer: 4+", tests, **settings) == (0.0, "exit 1")
    assert verdict("7", tests, **settings) == (0.0, "no program")


def test_outputs_are_equal_by_lines_and_by_the_value_of_numbers() -> None:
    assert passes("1  2 \n3\n\n", "1 2\n3", is_call=False) and passes("1.50", "1.5", is_call=False)
    assert passes("[1, 2]", [1, 2], is_call=True) and passes("3", [3], is_call=True)
    for output, expected in (("1\n2", "1 2"), ("1", "2"), ("", "1"), ("yes", "YES"), ("1.5000001", "1.5")):
        assert not passes(output, expected, is_call=False)
    assert not passes("[2]", 2, is_call=True)


def test_a_word_is_a_number_only_if_it_is_a_plain_one() -> None:
    """Why: Decimal reads more, and comparing a signalling NaN raises, which made a wrong program a failed check."""
    assert passes("nan1", "nan1", is_call=False) and passes("1e2", "100", is_call=False)
    for output, expected in (("sNaN1", "1"), ("1_0", "10"), ("\u0661", "1"), ("nan1", "1")):
        assert not passes(output, expected, is_call=False)


@pytest.mark.usefixtures("unprotected")
@pytest.mark.parametrize(
    "end",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "import os; os.write(3, b'[' * 100_000); os._exit(0)"],
    ids=["exit", "end", "junk"],
)
def test_a_call_without_a_result_is_wrong(end: str) -> None:
    """Why: a program that left no JSON made a failed check of its response, which a model could learn to prefer."""
    call = {"fn_name": "f", "inputs": [[1]], "outputs": [1]}
    assert verdict(f"def f(x):\n    {end}", call) == (0.0, "output")
    assert verdict("def f(x):\n    return x", call) == (1.0, ""), "the control"


def test_results_are_json_texts_only_beside_arguments_that_are() -> None:
    """Why: results that are texts were refused, or became numbers that no right program gives."""
    texts = {"fn_name": "f", "inputs": [["a"], ["b"]], "outputs": ["abc", "123"]}
    assert read_tests({"t": texts}, "t").outputs == ("abc", "123")
    line = '"a\u2028b"'
    read = read_tests({"t": {"fn_name": "f", "inputs": [f"{line}\n2\n"], "outputs": ["123"]}}, "t")
    assert (read.inputs, read.outputs) == ((["a\u2028b", 2],), (123,))


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "is no object"),
        ("{", "no JSON"),
        ({"inputs": [], "outputs": []}, "of the same length and not empty"),
        ({"inputs": ["1"], "outputs": []}, "of the same length"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "a b"}, "no function's name"),
        ({"inputs": [3], "outputs": ["1"], "fn_name": "f"}, "arguments of a call are a list"),
        ({"inputs": ["x y"], "outputs": ["1"], "fn_name": "f"}, "no JSON"),
    ],
)
def test_tests_that_cannot_be_used_are_named(tests: Any, message: str) -> None:
    with pytest.raises(BadTests, match=rf"column input_output.*{message}"):
        read_tests({"input_output": tests}, "input_output")
    with pytest.raises(BadTests, match=r"no column a\.b; reward.code.tests names the column"):
        read_tests({"a": {"c": 1}}, "a.b")
    lines = {"inputs": [["1", "2"], "3"], "outputs": ["1", "2"]}
    assert read_tests({"a": {"b": lines}}, "a.b").inputs == ("1\n2", "3"), "the control"


def test_a_code_block_is_closed() -> None:
    assert last_code_block("a\n```python\nx = 1\n```\nb\n```\ny\n```\nc") == "y"
    assert last_code_block("```py\nx\n```\nthen\n```py\ny") == "x"
    assert last_code_block("x = 1") is None and last_code_block("```py\nx") is None
    assert last_code_block("```\n  x\n\n\n```") == "  x"


def test_a_stray_fence_does_not_shift_the_blocks() -> None:
    """Why: one fence too many made the program of the text between two blocks, and a right response wrong."""
    assert last_code_block("a\n```\nb\n```python\nx\n```\nc") == "x"
    assert last_code_block("```python\ny\n```python\nx\n```\nc") == "x"
    assert last_code_block("```python\nx\n```\nc\n```\nd") == "x"
    assert last_code_block("```python\r\ny\r\n```\r\nb\n```python\nx\n``` \nc") == "x"


def group(*responses: str, columns: Any) -> Group:
    samples = tuple(sample_from_lists([1], [0.0], "stop", 0) for _ in responses)
    problem = Problem("p", "double", prompt_ids([2]), "", "sums", {}, json.dumps(columns))
    return Group(problem, samples).with_texts(list(responses))


@pytest.mark.slow
def test_failed_checks_are_counted_and_are_no_wrong_answers() -> None:
    """In the real judge processes: wrong programs are wrong, endless ones too, and a row without tests is a crash."""
    code = CodeConfig(sandbox="none", cpu_s=1, total_s=5)
    config = RewardConfig(rule="code", code=code, workers=1, timeout_s=20, failed_share_stop=1.0)
    with RewardPool(config, 100) as pool:
        judged = pool.submit(
            group("print(2 * int(input()))", "print(1)", "while True: pass", columns={"input_output": DOUBLE})
        ).result()
        failed = pool.submit(group("print(1)", columns={"other": 1})).result()
    assert [result.outcome for result in judged.results] == ["judged"] * 3
    assert [result.reward for result in judged.results] == [1.0, -1.0, -1.0]
    assert [result.was_judged for result in failed.results] == [False]
    assert "1 of 4 checks in this step failed (1 crash; reward.rule=code)" in str(
        judge_failed_checks([judged, failed], config, "in this step")
    )


@pytest.mark.slow
def test_a_run_without_its_sandbox_is_refused_in_one_line(tmp_path: Path) -> None:
    """On a machine where no program of the sandbox is found, and before any process of the run starts."""
    (tmp_path / "sitecustomize.py").write_text(
        "from megatron_fipo.rewards.code import sandbox\nsandbox._ENVIRONMENT['PATH'] = '/nowhere'\n"
    )
    command = [sys.executable, "-m", "megatron_fipo.train", "experiment=tiny_code", f"run.directory={tmp_path}/run"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[3]}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: reward.code.sandbox: the sandbox "), "reward.rule=code is as it should be"
    assert "apt-get install bubblewrap" in done.stderr and "reward.code.sandbox=none" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
