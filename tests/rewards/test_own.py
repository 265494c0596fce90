"""Rewards of the user's own: how a function is found, what it is told, what its value becomes, what its failure costs.

Why: a value that is changed on its way trains on another reward than the user wrote, and an exception that is seen
nowhere costs a night. The functions here run in the real verifier processes. Not covered: a whole run
(tests/end_to_end/test_own_reward.py), deadlines and deaths of processes in general (test_pool.py).
"""

import dataclasses
import json
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy
import psutil
import pytest

from megatron_fipo.config import OverlongBufferConfig, RewardConfig
from megatron_fipo.errors import ConfigError
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, sample_from_lists
from megatron_fipo.rewards.failures import FAILURES_FILE, Failure, FailureLog
from megatron_fipo.rewards.own import BadReward, load, verdict_of
from megatron_fipo.rewards.pool import RewardPool

FUNCTIONS = '''
"""Functions for tests."""
import json
import os
import subprocess
import sys
import time

import helper_beside_it

started = 0


def value(response):
    return json.loads(response)


def everything(**told):
    return {"score": 1.0, "answer": json.dumps(told)}


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and solution_str == ground_truth
    return {"score": extra_info["weight"], "acc": True, "pred": solution_str}


def own_default(response, temperature=0.5):
    return temperature


def environment(response):
    return {"score": 0, "answer": os.environ.get(response, "none")}


def fails(response, columns):
    if response == "exit":
        sys.exit(3)
    if response == "hang":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "started-by-a-reward"])
        time.sleep(600)
    return columns[response]


def wants_more(response, weather):
    return 0


async def later(response):
    return 0


class Scorer:
    def __call__(self, response):
        return len(response)


scorer = Scorer()
'''


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "helper_beside_it.py").touch()
    monkeypatch.chdir(tmp_path)


def group(*texts: str, columns: dict[str, Any] | None = None) -> Group:
    problem = Problem("p", "1+2=?", prompt_ids([5]), "3", "sums", columns=json.dumps(columns or {}))
    return Group(problem, tuple(sample_from_lists([7, 8], [0.0, 0.0], "stop", 0) for _ in texts)).with_texts(texts)


def judged(function: str, *texts: str, columns: dict[str, Any] | None = None, **settings: Any) -> Group:
    found = group(*texts, columns=columns)
    with RewardPool(RewardConfig(rule=function, workers=1, **settings), 100, FailureLog(Path())) as pool:
        return pool.submit(found).result()


def test_a_value_is_the_reward_as_it_is_and_the_accuracy_unless_another_is_given() -> None:
    texts = [
        "2.0",
        "-0.5",
        "true",
        "3",
        '{"score": 0.25, "accuracy": true, "answer": 7, "format": 1, "why": "x", "n": null}',
    ]
    found = judged("mine.py:value", *texts).results
    assert [result.reward for result in found] == [2.0, -0.5, 1.0, 3.0, 0.25]
    assert [result.accuracy for result in found] == [2.0, -0.5, 1.0, 3.0, 1.0]
    assert found[-1].answer == "7" and found[-1].extra == {"format": 1.0, "why": "x"}
    overlong = OverlongBufferConfig(enable=True, len=99, penalty_factor=1.0)
    assert judged("mine.py:value", "2.0", overlong_buffer=overlong).results[0].reward == pytest.approx(2 - 1 / 99)


def test_half_of_a_surrogate_pair_is_an_escape() -> None:
    """Why: no file and no message can hold one, so an answer read from JSON ended the run where it was written."""
    text = '{"score": 0, "answer": "\\ud800é", "why\\ud801": "\\udfff", "whole": "\\ud83d\\ude00"}'
    (found,) = judged("mine.py:value", text).results
    assert (found.answer, found.extra) == (r"\ud800é", {r"why\ud801": r"\udfff", "whole": "\U0001f600"})
    with pytest.raises(UnicodeEncodeError):
        msgspec.json.encode(json.loads(text))  # the control


def test_a_function_gets_what_it_names() -> None:
    columns = {"question": "1+2=?", "level": 3, "extra_info": {"weight": 0.5}}
    told = json.loads(judged("mine.py:everything", "3", columns=columns).results[0].answer)
    expected = {"response": "3", "token_ids": [7, 8], "ground_truth": "3", "columns": columns, "data_source": "sums"}
    assert told == expected | {"prompt": "1+2=?", "finish_reason": "stop"}
    assert judged("mine:own_default", "x").results[0].reward == 0.5
    assert judged("mine:scorer", "four").results[0].reward == 4.0


def test_a_function_for_verl_is_taken_as_it_is() -> None:
    (found,) = judged("mine.py:compute_score", "3", columns={"extra_info": {"weight": 0.5}}).results
    assert (found.reward, found.accuracy, found.answer) == (0.5, 1.0, "3")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"returned nan \(float\); a finite number"),
        (-float("inf"), "returned -inf"),
        (10**400, "a finite number within"),
        (1e7, r"returned 10000000\.0 \(float\); a finite number within ±1e\+06"),
        (None, r"returned None \(NoneType\); a number is right, alone or as score of a dict"),
        ("1.0", r"returned '1\.0' \(str\)"),
        ([1.0], r"returned \[1\.0\] \(list\)"),
        (numpy.ones(1), "ndarray"),
        (1j, "complex"),
        ({"points": 1}, r"an object with \['points'\] and no score"),
        ({"score": None}, "score None"),
        ({"score": 1, "accuracy": "yes"}, "accuracy 'yes'"),
        ({"score": 1, "parts": [1]}, r"returned parts = \[1\] \(list\)"),
    ],
)
def test_what_is_no_reward_is_named(value: Any, message: str) -> None:
    with pytest.raises(BadReward, match=message):
        verdict_of(value)


def test_objects_and_numbers_of_other_libraries_are_rewards() -> None:
    score = namedtuple("score", ["score", "acc"])(0.5, 1)
    record = dataclasses.make_dataclass("record", [("score", float), ("steps", int)], frozen=True, slots=True)(0.5, 2)
    for value in (
        0.5,
        numpy.float32(0.5),
        numpy.array(0.5),
        {"reward": 0.5},
        score,
        SimpleNamespace(score=0.5),
        record,
    ):
        assert verdict_of(value).reward == 0.5
    assert verdict_of(score).accuracy == 1.0 and verdict_of(record).extra == {"steps": 2.0}


def test_failures_are_counted_and_kept_and_the_first_traceback_is_shown_once() -> None:
    config = RewardConfig(rule="mine.py:fails", workers=1, timeout_s=1)
    found = group("right", "missing", "none", "exit", "hang", "right", columns={"right": 1, "none": None})
    with RewardPool(config, 100, FailureLog(Path())) as pool:
        found = pool.submit(found).result()
        assert [result.outcome for result in found.results] == ["judged", *["crash"] * 3, "timeout", "judged"]
        shown = pool.failures.traceback_to_show() or ""
        assert 'mine.py", line' in shown and shown.endswith("KeyError: 'missing'\n") and "megatron_fipo" not in shown
        assert pool.failures.traceback_to_show() is None
        assert pool.failures.summary() == "the first: KeyError: 'missing'; reward_failures.jsonl has its traceback"
    rows = [json.loads(line) for line in Path(FAILURES_FILE).read_text().splitlines()]
    errors = [
        "KeyError: 'missing'",
        "returned None (NoneType)",
        "SystemExit: 3",
        "no verdict within reward.timeout_s=1",
    ]
    assert [row["error"][: len(error)] for row, error in zip(rows, errors, strict=True)] == errors
    assert rows[0]["traceback"] == shown and rows[0]["response"] == "missing" and rows[0]["ground_truth"] == "3"
    deadline = time.monotonic() + 10
    while [p for p in psutil.process_iter(["cmdline"]) if "started-by-a-reward" in (p.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, "what a killed function has started is still there"
        time.sleep(0.1)


def test_the_log_of_failures_is_bounded(tmp_path: Path) -> None:
    failure = Failure("p", "sums", "3", "x" * 2000, "crash", "ValueError", "t" * 8000)
    log = FailureLog(tmp_path)
    for _ in range(300):
        log.add(failure)
    assert len((tmp_path / FAILURES_FILE).read_text().splitlines()) == 100
    FailureLog(tmp_path).add(failure)
    assert (tmp_path / FAILURES_FILE).stat().st_size < 1.1 * 2**20
    FailureLog(tmp_path / "missing").add(failure)


def test_the_environment_has_what_is_named_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    assert judged("mine.py:environment", "JUDGE_KEY").results[0].answer == "none"
    assert judged("mine.py:environment", "JUDGE_KEY", environment=["JUDGE_KEY"]).results[0].answer == "secret"


@pytest.mark.parametrize(
    ("place", "function", "message"),
    [
        ("mine.py", "nothing", r"has no function nothing \(its functions: value, everything, compute_score"),
        ("mine.py", "started", "has no function started"),
        (
            "mine.py",
            "wants_more",
            r"asks for weather \(a parameter is one of response, token_ids, ground_truth, columns",
        ),
        ("mine.py", "later", "is async"),
        ("no_such_module", "f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken.py", "f", r"cannot be imported: ZeroDivisionError: division by zero \(broken\.py, line 2,"),
        ("ends.py", "f", r"cannot be imported: SystemExit: 1 \(ends\.py, line 1,"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(place: str, function: str, message: str) -> None:
    Path("broken.py").write_text("x = 1\nx / 0\n")
    Path("ends.py").write_text("raise SystemExit(1)\n")
    with pytest.raises(ConfigError, match=message) as refusal:
        load(place, function)
    assert "\n" not in str(refusal.value)


def test_a_refusal_in_the_verifier_is_one_of_the_configuration_and_ends_the_pool() -> None:
    pool = RewardPool(RewardConfig(rule="mine.py:wants_more", workers=2), 100)
    with pytest.raises(ConfigError, match=r"reward\.rule: mine\.py:wants_more asks for weather"):
        pool.wait_started()
    assert not [p for p in psutil.Process().children() if "megatron_fipo.rewards.worker" in " ".join(p.cmdline())]
