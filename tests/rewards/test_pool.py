"""Why: a check that hangs, crashes or outlives the run must cost one response its verdict, never the run its result.

The hanging check is real: a reasoning-gym scorer that asks sympy for 9^9^9^9. Which answers are right is
tests/rewards/test_rules.py and test_mathematics.py.
"""

import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megatron_fipo.config import OverlongBufferConfig, RewardConfig
from megatron_fipo.errors import ConfigError, RewardError
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, sample_from_lists
from megatron_fipo.rewards.pool import RewardPool

HANGING = "Answer: 9**9**9**9"
COUNTDOWN = {"task": "countdown", "options": {}, "entry": "{'metadata': {'numbers': [3, 4], 'target': 7}}"}
# Read as one endless answer, this took more than the default deadline; 5,000 lines of it, longer still.
DEGENERATE = "Answer: so x is 3 and " * 5000


def make_group(texts: list[str], truth: str = "7", extra: dict | None = None, length: int = 2) -> Group:
    samples = tuple(sample_from_lists([1] * length, [0.0] * length, "stop", 0) for _ in texts)
    return Group(Problem("p", "3+4=?", prompt_ids([2]), truth, "sums", extra or COUNTDOWN), samples).with_texts(texts)


def judge(pool: RewardPool, *groups: Group) -> list[Group]:
    """The groups, judged; waits for all."""
    return [future.result() for future in [pool.submit(group) for group in groups]]


def hanging_pool(workers: int, timeout_s: float) -> RewardPool:
    """A pool whose rule hangs on HANGING."""
    return RewardPool(RewardConfig(rule="reasoning_gym", workers=workers, timeout_s=timeout_s), 100)


def wait_until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def children() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children() if "megatron_fipo.rewards.worker" in " ".join(child.cmdline())
    ]


def wait_until_busy(workers: list[psutil.Process]) -> None:
    """Until one of them has computed for 0.2 s from now on: it is in the middle of a check."""
    before = [worker.cpu_times().user for worker in workers]
    wait_until(lambda: any(worker.cpu_times().user > t + 0.2 for worker, t in zip(workers, before, strict=True)))


def test_texts_are_decoded_in_the_verifiers_threads():
    """On rank 0's event loop they would hold up the tokens of every server."""
    threads: set[str] = set()

    def decode(ids: list[int]) -> str:
        threads.add(threading.current_thread().name)
        return f"Answer: {ids[0]}"

    def broken(ids: list[int]) -> str:
        raise ValueError(f"{ids} are no text")

    samples = tuple(sample_from_lists([number, 2], [0.0, 0.0], "stop", 0) for number in range(20))
    undecoded = Group(Problem("p", "3+4=?", prompt_ids([2]), "7", "sums"), samples)
    with RewardPool(RewardConfig(rule="exact_match", workers=2), 100) as pool:
        group = pool.submit(undecoded, decode).result()
        with pytest.raises(ValueError, match="are no text"):
            pool.submit(undecoded, broken).result()
    assert [sample.text for sample in group.samples] == [f"Answer: {number}" for number in range(20)]
    assert [result.accuracy for result in group.results] == [number == 7 for number in range(20)]
    assert threads and all(name.startswith("verifier-") for name in threads)


@pytest.mark.slow
def test_a_hanging_check_is_a_timeout_and_its_neighbours_are_judged():
    group = make_group(["Answer: 3+4", HANGING, "Answer: 4+3", "Answer: 8"])
    with hanging_pool(workers=1, timeout_s=3.0) as pool:
        (judged,) = judge(pool, group)
    assert [result.outcome for result in judged.results] == ["judged", "timeout", "judged", "judged"]
    assert [result.was_judged for result in judged.results] == [True, False, True, True]
    assert [result.accuracy for result in judged.results] == [1.0, 0.0, 1.0, 0.05]
    assert [result.reward for result in judged.results] == [1.0, -1.0, 1.0, -0.9]
    assert all(sample.result is None for sample in group.samples), "what was submitted does not change"


@pytest.mark.slow
def test_a_killed_process_is_a_crash_and_the_next_response_gets_a_new_one():
    group = make_group([HANGING, "Answer: 3+4"])
    with hanging_pool(workers=1, timeout_s=60) as pool:
        judge(pool, make_group(["Answer: 3+4"]))
        (child,) = children()
        future = pool.submit(group)
        wait_until_busy([child])
        child.kill()
        judged = future.result(timeout=30)
    assert [result.outcome for result in judged.results] == ["crash", "judged"]


@pytest.mark.slow
def test_a_rule_that_raises_is_a_crash_and_not_a_wrong_answer():
    group = make_group(["Answer: 7"], extra={"task": "chain_sum", "options": {}, "entry": "{not a literal"})
    with RewardPool(RewardConfig(rule="reasoning_gym", workers=1), 100) as pool:
        (judged,) = judge(pool, group)
    assert judged.results[0].outcome == "crash"


@pytest.mark.slow
def test_many_short_answers_take_little():
    groups = [make_group([f"1+2=3. Answer: {index % 10}" for index in range(8)]) for _ in range(32)]
    with RewardPool(RewardConfig(rule="math_verify", workers=1), 100) as pool:
        judge(pool, make_group(["Answer: 7"]))
        begin = time.perf_counter()
        judged = judge(pool, *groups)
        assert time.perf_counter() - begin < 5, "0.1 s on an idle machine; 30 s with a process for each"
    assert all([r.accuracy for r in group.results] == [0, 0, 0, 0, 0, 0, 0, 1] for group in judged)


@pytest.mark.slow
def test_degenerate_answers_are_wrong_and_not_timeouts():
    long = "Answer: " + "7" * 32_000
    nested = "Answer: " + r"\sqrt{2+" * 90 + "2" + "}" * 90
    group = make_group([DEGENERATE] * 12 + [DEGENERATE.replace("and ", "and\n"), long, nested, "Answer: $9^{9^{9^9}}$"])
    with RewardPool(RewardConfig(rule="math_verify", workers=1), 100) as pool:
        (judged,) = judge(pool, group)
    outcomes = [result.outcome for result in judged.results]
    assert outcomes == ["judged"] * 13 + ["too_long"] + ["judged"] * 2 and judged.results[13].was_judged
    assert [result.reward for result in judged.results] == [-1.0] * 16


@pytest.mark.slow
@pytest.mark.parametrize(("tolerance", "accuracy"), [(0.0, 0.0), (0.01, 1.0)])
def test_the_tolerance_reaches_the_rule(tolerance, accuracy):
    group = make_group(["Answer: 0.333"], truth=r"\frac{1}{3}")
    with RewardPool(RewardConfig(rule="math_verify", workers=1, math_tolerance=tolerance), 100) as pool:
        (judged,) = judge(pool, group)
    assert judged.results[0].accuracy == accuracy


def test_rewards_are_configured_and_lowered_by_the_overlong_penalty():
    overlong = OverlongBufferConfig(enable=True, len=50, penalty_factor=1.0)
    config = RewardConfig(correct=2.0, incorrect=-0.5, overlong_buffer=overlong, workers=1)
    group, short = make_group(["Answer: 7", "Answer: 8"], length=75), make_group(["Answer: 7"], length=50)
    with RewardPool(config, max_response_length=100) as pool:
        judged, judged_short = judge(pool, group, short)
    assert [result.reward for result in judged.results] == [1.5, -1.0]
    assert judged_short.results[0].reward == 2.0


@pytest.mark.slow
def test_fractional_accuracy_is_paid_in_proportion():
    extra = {"task": "chain_sum", "options": {}, "entry": "{'answer': '214', 'metadata': {}}"}
    group = make_group(["Answer: 214214", "Answer: 214"], truth="214", extra=extra)
    with RewardPool(RewardConfig(rule="reasoning_gym", workers=1), 100) as pool:
        (judged,) = judge(pool, group)
    assert [result.accuracy for result in judged.results] == [0.5, 1.0]
    assert [result.reward for result in judged.results] == [0.0, 1.0]


@pytest.mark.slow
def test_closing_leaves_no_process_and_fails_what_waits():
    pool = hanging_pool(workers=2, timeout_s=60)
    judge(pool, make_group(["Answer: 3+4"]))
    waiting = [pool.submit(make_group([HANGING])) for _ in range(4)]
    wait_until_busy(children())
    pool.close()
    for future in waiting:
        with pytest.raises(RewardError, match="closed"):
            future.result(timeout=5)
    assert children() == []
    pool.close()


@pytest.mark.slow
def test_workers_die_with_a_killed_parent_even_in_the_middle_of_a_check():
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.rewards.test_pool import HANGING, hanging_pool, judge, make_group\n"
        "pool = hanging_pool(workers=1, timeout_s=600)\n"
        "judge(pool, make_group(['Answer: 3+4']))\n"
        "print('ready', flush=True)\n"
        "pool.submit(make_group([HANGING])).result()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        (worker,) = psutil.Process(parent.pid).children()
        wait_until_busy([worker])
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, timeout_s=5)


def test_a_worker_that_cannot_start_is_an_error_with_its_reason():
    with (
        RewardPool(RewardConfig(rule="no_such_module:score", workers=1), 100) as pool,
        pytest.raises(ConfigError, match="no_such_module:score cannot be imported: ModuleNotFoundError"),
    ):
        judge(pool, make_group(["Answer: 7"]))


def test_workers_get_no_secrets(monkeypatch):
    monkeypatch.setenv("FIPO_ROLLOUT_TOKEN", "hidden")
    with RewardPool(RewardConfig(workers=1), 100) as pool:
        judge(pool, make_group(["Answer: 7"]))
        (child,) = children()
        assert "FIPO_ROLLOUT_TOKEN" not in child.environ()
