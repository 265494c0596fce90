"""Why: a server that shares the trainer's GPU has to be asleep while the policy is updated, have its weights back
before an update of them and its caches only after it; the wrong order runs out of memory, or samples stale weights.

The calls go to a real vLLM server on the CPU, where sleeping keeps its states and routes and frees nothing. Not
covered: the memory itself (tests/gpu).
"""

import asyncio
import dataclasses

import httpx
import pytest

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.control import EngineControl
from megatron_fipo.engines.server_options import assign_devices, server_environment
from megatron_fipo.errors import ConfigError
from megatron_fipo.weights.deadline import Deadline
from tests.rollout.conftest import Rollout
from tests.rollout.engines import generate, problems, sampling


@pytest.mark.slow
def test_a_server_sleeps_and_wakes_around_a_weight_update(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.pool, "config", dataclasses.replace(rollout.pool.config, shared_gpu=True))
    control, (server,) = EngineControl(rollout.pool), rollout.pool.servers
    calls: list[str] = []
    call_all = control._call_all

    async def recorded(path: str, deadline: Deadline, *rest: object, **more: object) -> list[object]:
        calls.append(path)
        answers = await call_all(path, deadline, *rest, **more)  # type: ignore[arg-type]
        asleep = httpx.get(f"{server.url}/is_sleeping", headers=rollout.pool.headers, trust_env=False).json()
        calls.append("asleep" if asleep["is_sleeping"] else "awake")
        return answers

    monkeypatch.setattr(control, "_call_all", recorded)

    async def step() -> None:
        deadline = Deadline(60)
        await control.sleep(deadline)
        await control.pause(deadline)
        await control.resume(deadline)

    before = generate(rollout.client, problems(2), 1, sampling(), [1, 2])
    asyncio.run(step())
    assert calls == [
        *("/sleep?level=1&mode=abort", "asleep"),
        *("/wake_up?tags=weights", "asleep"),
        *("/pause?mode=keep&clear_cache=true", "asleep"),
        *("/wake_up?tags=kv_cache", "awake"),
        *("/resume", "awake"),
    ]
    after = generate(rollout.client, problems(2), 1, sampling(), [1, 2])
    assert [group.samples[0].token_ids.tolist() for group in after] == [
        group.samples[0].token_ids.tolist() for group in before
    ]


@pytest.mark.slow
def test_a_server_that_never_slept_is_updated_all_the_same(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has started again since the last update, and has to sleep first: its caches are where weights have to be."""
    monkeypatch.setattr(rollout.pool, "config", dataclasses.replace(rollout.pool.config, shared_gpu=True))
    control, (server,) = EngineControl(rollout.pool), rollout.pool.servers

    def asleep() -> bool:
        answer = httpx.get(f"{server.url}/is_sleeping", headers=rollout.pool.headers, trust_env=False)
        return answer.json()["is_sleeping"]

    async def step() -> None:
        deadline = Deadline(60)
        assert not asleep()
        await control.pause(deadline)
        assert asleep(), "its caches"
        await control.resume(deadline)

    asyncio.run(step())
    assert generate(rollout.client, problems(1), 1, sampling(), [3])[0].samples[0].token_ids.size


def test_servers_get_the_trainers_gpus_only_when_they_share_them() -> None:
    two = RolloutConfig(servers=2)
    assert assign_devices(two, ["4", "5", "6", "7"], trainer=2) == [["6"], ["7"]]
    assert assign_devices(two, ["4", "5"], trainer=0) == [["4"], ["5"]], "an evaluation has no trainer beside it"
    shared = dataclasses.replace(two, shared_gpu=True)
    assert assign_devices(shared, ["4", "5", "6", "7"], trainer=2) == [["4"], ["5"]]
    wide = dataclasses.replace(shared, servers=1, tensor_parallel=2)
    assert assign_devices(wide, ["0", "1"], trainer=2) == [["0", "1"]]


def test_too_few_gpus_are_refused_with_what_would_help() -> None:
    with pytest.raises(ConfigError, match=r"needed, but 0 of 1 are there beside the trainer's 1 .*shared_gpu"):
        assign_devices(RolloutConfig(), ["0"], trainer=1)
    with pytest.raises(ConfigError, match="2 GPUs are needed, but 1 of 4 are there among the trainer's 1"):
        assign_devices(RolloutConfig(servers=2, shared_gpu=True), ["0", "1", "2", "3"], trainer=1)
    with pytest.raises(ConfigError, match=r"2 GPUs are needed, and 1 are here \(fewer servers"):
        assign_devices(RolloutConfig(servers=2), ["0"], trainer=0)


def test_a_sleeping_server_is_spared_the_trainers_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "PYTORCH_CUDA_ALLOC_CONF" in server_environment(RolloutConfig(), ["0"])
    assert "PYTORCH_CUDA_ALLOC_CONF" not in server_environment(RolloutConfig(shared_gpu=True), ["0"])
