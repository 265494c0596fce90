"""Environments in processes that can be killed: what a call gives, and what one that hangs or crashes costs.

Why: code of the user's own, told what a model wrote, hangs and crashes; that must cost its sample and nothing else.
What a sample makes of it is in tests/rollout/test_episode.py. Not covered: processes of an environment's own that leave
its process group.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import EnvironmentConfig
from megatron_fipo.environments.pool import EnvironmentFailed, EnvironmentLost, EnvironmentPool, PooledEnvironment
from megatron_fipo.environments.protocol import Task
from megatron_fipo.errors import ConfigError, RolloutError

MODULE = "tests.environments.examples"
VOCABULARY = 38


def pool(name: str, workers: int = 1, timeout_s: float = 20.0, **options: Any) -> EnvironmentPool:
    config = EnvironmentConfig(name=f"{MODULE}:{name}", options=options, workers=workers, step_timeout_s=timeout_s)
    return EnvironmentPool(config, resolve_embedded("embedded:tiny"), VOCABULARY)


def task(name: str = "p0") -> Task:
    return Task(name, "4+5=?\n", "9", "sums", {"steps": 1})


def action(*token_ids: int) -> dict[str, Any]:
    return {"token_ids": list(token_ids), "finish_reason": "stop", "turns_left": 3, "tokens_left": 50}


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "megatron_fipo.environments.worker" in " ".join(p.cmdline())]


def test_an_environment_answers_turn_by_turn_and_has_a_state() -> None:
    with pool("Told", told=[[7, 8], [9]], opening=[4]) as environments:
        environments.wait_started()
        first, second = environments.open(), environments.open()
        assert first.reset(task("a")).result() == {"context": [4], "state": {"lengths": []}}
        assert second.reset(task("b")).result()["context"] == [4]
        assert first.step(action(1, 2, 3)).result() == {"context": [7, 8], "state": {"lengths": [3]}}
        assert second.step(action(1)).result() == {"context": [7, 8], "state": {"lengths": [1]}}
        assert first.step(action(1, 2)).result()["context"] == [9]
        found = first.step(action(1)).result()["verdict"]
        assert (found["reward"], found["accuracy"], found["extra"]) == (6.0, 0.25, {"turns": 3.0, "id": "a"})
        first.close()
        assert second.step(action(1)).result()["context"] == [9], "another sample's end changes nothing"
    assert not children()


@pytest.mark.parametrize(
    ("way", "outcome", "said"),
    [
        ("hang", "timeout", "no answer to step within environment.step_timeout_s=1"),
        ("exit", "crash", "the environment's process ended in step"),
        ("raise", "crash", "step: ValueError: no such tool"),
        ("no answer", "crash", "step: step returned NoneType; More or Done is right"),
        ("no token", "crash", "step: More has no token; Done ends a sample"),
        ("unknown token", "crash", "step: More has the token id 99; those of the model are 0 to 37"),
        ("no reward", "crash", "step: returned 'good' (str); a number is right, alone or as score of a dict"),
    ],
)
def test_what_fails_costs_its_sample_and_no_other(way: str, outcome: str, said: str) -> None:
    """The others of its process go on from their states; the control: without one, an environment is lost."""
    kills = way in ("hang", "exit")
    for keeps_state in (True, False):
        with pool("Broken", timeout_s=1.0, way=way, of="bad", keeps_state=keeps_state) as environments:
            good, bad = environments.open(), environments.open()
            good.reset(task("good")).result()
            assert good.step(action(1, 2)).result()["context"] == [5]
            bad.reset(task("bad")).result()
            with pytest.raises(EnvironmentFailed) as failed:
                bad.step(action(1)).result()
            assert (failed.value.outcome, failed.value.error) == (outcome, said)
            assert ("in step" in failed.value.traceback) == (way == "raise")
            if kills and not keeps_state:
                with pytest.raises(EnvironmentLost):
                    good.step(action(1)).result()
            else:
                assert good.step(action(1)).result()["verdict"]["reward"] == 3.0


def test_a_reset_that_fails_can_be_repeated(tmp_path: Path) -> None:
    with pool("Broken", way="raise", in_reset=True, until=str(tmp_path / "failed")) as environments:
        with pytest.raises(EnvironmentFailed, match="reset: ValueError: no such tool"):
            environments.open().reset(task()).result()
        assert environments.open().reset(task()).result()["context"] == []


def test_calls_of_several_processes_run_beside_each_other() -> None:
    with pool("Broken", workers=2, timeout_s=4.0, way="hang", of="bad") as environments:
        bad, good = environments.open(), environments.open()
        for each, name in ((bad, "bad"), (good, "good")):
            each.reset(task(name)).result()
        hanging = bad.step(action(1))
        assert good.step(action(1)).result()["context"] == [5]
        assert not hanging.done()
        with pytest.raises(EnvironmentFailed):
            hanging.result()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nothing", {}, "has no function nothing"),
        ("Told", {"toldd": []}, "cannot be called"),
        ("Told", {}, "missing a required argument: 'told'"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    environments = pool(name, **options)
    with pytest.raises(ConfigError, match=said):
        environments.wait_started()
    assert not children()


def test_what_is_no_environment_says_what_it_lacks() -> None:
    right = pytest.raises(EnvironmentFailed, match="object has no reset, step, state, restore, close")
    with pool("no_environment") as environments, right:
        environments.open().reset(task()).result()


def test_only_named_variables_reach_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_KEY", "secret")
    assert reset_with(["SERVICE_KEY"]).result(20)["context"] == []
    with pytest.raises(EnvironmentFailed, match="KeyError: 'SERVICE_KEY'"):
        reset_with([]).result(20)


def reset_with(variables: list[str]) -> Any:
    config = EnvironmentConfig(name=f"{MODULE}:knows_variable", workers=1, variables=variables)
    with EnvironmentPool(config, resolve_embedded("embedded:tiny"), VOCABULARY) as environments:
        future = environments.open().reset(task())
        future.exception(20)
        return future


def test_closing_ends_a_call_that_hangs() -> None:
    environments = pool("Broken", timeout_s=600.0, way="hang")
    environment = environments.open()
    environment.reset(task()).result()
    waiting = environment.step(action(1))
    later: Callable[[], Any] = waiting.result
    until_running(environment)
    environments.close()
    with pytest.raises(RolloutError, match="the environments were closed"):
        later()
    assert not children()
    environments.close()


def until_running(environment: PooledEnvironment) -> None:
    """Until the call before has reached the process: it sleeps there."""
    deadline = time.monotonic() + 20
    while not environment._worker._calls.empty():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
