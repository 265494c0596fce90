"""Why: with several engines one may fail an update, or hold other weights than it says, and the others must neither
sample from half-loaded weights nor be blamed.

Two real vLLM servers on the CPU, which get a transformers model. Not covered: the trainer's own log-probs of the probe
(test_live_update.py), and a trainer of several ranks (test_transfer.py).
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch.distributed import HashStore
from transformers import Qwen2ForCausalLM

from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.control import EngineControl
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.scoring import score
from megatron_fipo.engines.states import Server, State
from megatron_fipo.errors import RolloutError
from megatron_fipo.policy.weight_probe import beyond, mean_difference, probe_tokens
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.local_senders import Senders
from megatron_fipo.weights.publisher import SharedGpu, WeightPublisher
from megatron_fipo.weights.transport_records import WorkerPlace
from megatron_fipo.weights.transports import make_transport
from tests.engines.tokens import token_of
from tests.rollout.engines import VOCABULARY, rollout_config, save_tiny_model
from tests.weights.whole import WholeWeights

pytestmark = pytest.mark.slow

TOKENS = probe_tokens(VOCABULARY, longest=1000)
CHANGED = "model.layers.1.mlp.down_proj.weight"
LIMIT = 0.05
"""rollout.log_prob_diff_stop in fp32."""


def _publisher(
    pool: EnginePool, run_dir: Path, places: tuple[WorkerPlace, ...] | None = None, shared_gpu: SharedGpu | None = None
) -> WeightPublisher:
    return WeightPublisher(
        {0: make_transport(pool.config, 0, run_dir)},
        EngineControl(pool),
        HashStore(),
        senders=Senders(1 if places is None else len(places), places),
        timeout_s=60.0,
        begin_timeout_s=60.0,
        shared_gpu=shared_gpu,
    )


@dataclass
class Engines:
    """Both servers, the model that they are to hold, and who hands it to them."""

    pool: EnginePool
    model: Qwen2ForCausalLM
    publisher: WeightPublisher

    def publish(self, version: int, **changes: Any) -> None:
        self.publisher.publish({0: WholeWeights(list(self.model.state_dict().items()), **changes)}, version)

    def differences(self) -> dict[str, float]:
        """The probe's, by the server's address; the model is transformers' own."""
        with torch.no_grad():
            logits = self.model(torch.tensor([TOKENS])).logits[0, :-1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
        answers = asyncio.run(score(self.pool, TOKENS, Deadline(60)))
        return {url: mean_difference(own, values) for url, values in answers.items()}

    def is_paused(self, server: Server) -> bool:
        return httpx.get(f"{server.url}/is_paused", headers=self.pool.headers, trust_env=False).json()["is_paused"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    directory: Path = tmp_path_factory.mktemp("two")
    models = [save_tiny_model(directory / f"{seed}", seed) for seed in range(2)]
    config = rollout_config(weight_transfer="shared_memory", servers=2)
    with EnginePool(config, directory / "0", directory / "run", seed=0) as pool:
        pool.start()
        pool.wait_ready()
        publisher = _publisher(pool, directory / "run")
        yield Engines(pool, models[1], publisher)
        publisher.close()


def test_the_engine_with_a_changed_tensor_is_named(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.publish(1)
    found = engines.differences()
    assert len(found) == 2 and max(found.values()) < 1e-4
    wrong, right = engines.pool.servers
    # Somebody else hands one of them another tensor, under the same version.
    monkeypatch.setenv(TOKEN_VARIABLE, token_of(engines.pool))
    config = rollout_config(weight_transfer="shared_memory", servers=0, addresses=[wrong.url])
    other = EnginePool(config, Path(), tmp_path, seed=0)
    other.wait_ready()
    publisher = _publisher(other, tmp_path)
    state = {name: tensor * 1.2 if name == CHANGED else tensor for name, tensor in engines.model.state_dict().items()}
    publisher.publish({0: WholeWeights(list(state.items()))}, version=1)
    found = engines.differences()
    assert beyond(found, LIMIT) == [wrong.url]
    assert found[right.url] < 1e-4
    publisher.close()
    # The right weights repair it.
    engines.publish(2)
    assert beyond(engines.differences(), LIMIT) == []


def test_who_is_left_stays_paused_until_an_update_is_complete(engines: Engines) -> None:
    dying, living = engines.pool.servers
    assert dying.process is not None
    pid = dying.process.pid

    def kill_one(index: int) -> None:
        if index == 3:
            assert not engines.pool.serving, "nobody samples during an update"
            os.kill(pid, 9)

    with pytest.raises(RolloutError, match=r"(?s)weight update 3: .*was ended by signal 9"):
        engines.publish(3, bucket_bytes=20_000, before=kill_one)
    assert dying.state is State.LOST
    if living.state is State.AWAITING_WEIGHTS:  # and was not busy with the call that failed
        assert engines.is_paused(living)
    assert not engines.pool.serving
    # What the training loop does after it, which waits for the one that starts again.
    assert engines.pool.repair()
    engines.publish(3)
    assert [server.state for server in engines.pool.servers] == [State.SERVING] * 2
    assert not engines.is_paused(living)
    found = engines.differences()
    assert len(found) == 2 and max(found.values()) < 1e-4


def test_an_engine_with_another_version_is_lost(engines: Engines) -> None:
    """Or its samples would be taken for those of weights that it has not."""
    wrong, right = engines.pool.servers
    body = {"new_version": "99"}
    httpx.post(f"{wrong.url}/update_weight_version", json=body, headers=engines.pool.headers, trust_env=False)
    assert list(engines.differences()) == [right.url]
    assert wrong.state is State.LOST and "its weights are of version 99, not 3" in wrong.reason


@dataclass
class Turns:
    """A rank that shares its GPU, as an update sees it: what it finds when it comes and when it leaves."""

    engines: Engines
    fails: bool = False
    seen: list[tuple[str, int, int]] = field(default_factory=list)
    rank: int = 0
    ranks: int = 1

    def come(self) -> None:
        self._see("come")

    def leave(self) -> None:
        self._see("leave")
        if self.fails:
            raise RuntimeError("no memory")

    def _see(self, what: str) -> None:
        """How many engines wait for weights then, and how many have all of them, under their version."""
        pool = self.engines.pool
        waiting = sum(server.state is State.AWAITING_WEIGHTS for server in pool.servers)
        self.seen.append((what, waiting, pool.weight_version or 0))


@pytest.mark.matrix  # test_colocated.py does it on two nodes
def test_a_trainer_that_shares_its_gpus_comes_and_leaves_while_engines_wait(engines: Engines, tmp_path: Path) -> None:
    """It leaves before their caches wake. Each engine has a sender beside it, or nothing is sent."""
    pool = engines.pool
    pool.repair()
    pool.admit()
    turns, here = Turns(engines), WorkerPlace(socket.gethostname())
    publisher = _publisher(pool, tmp_path, (here, WorkerPlace("elsewhere")), turns)
    weights = {0: WholeWeights(list(engines.model.state_dict().items()))}
    publisher.publish(weights, version=7)
    assert turns.seen == [("come", 2, 3), ("leave", 2, 7)]
    found = engines.differences()
    assert len(found) == 2 and max(found.values()) < 1e-4

    publisher = _publisher(pool, tmp_path, (here,), Turns(engines, fails=True))
    with pytest.raises(RolloutError, match="weight update 8: rank 0: RuntimeError: no memory"):
        publisher.publish(weights, version=8)
    assert not pool.serving, "half of the turn: nobody samples"

    publisher = _publisher(pool, tmp_path, (WorkerPlace("elsewhere"),))
    with pytest.raises(RolloutError, match="no process of the trainer is where an engine worker is"):
        publisher.publish(weights, version=9)
