"""Why: after an update the engines must sample from exactly the trainer's weights, and an update that fails must end on
every rank, in bounded time, with the engine's own reason.

Real vLLM engines on the CPU: one behind shared memory, two tensor-parallel workers behind gloo. Ranks of the trainer
are threads that share a TCPStore, which is all that they share in a run. Does not cover NCCL (tests/gpu), nor the
gathers that make full tensors of shards (test_reshard.py).
"""

import copy
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed import Store, TCPStore
from transformers import Qwen2ForCausalLM

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.server_process import shared_files
from megatron_fipo.errors import RolloutError
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.weights.buckets import Bucket
from megatron_fipo.weights.planes import SharedMemoryPlane, make_plane
from megatron_fipo.weights.transfer import TransferStats, WeightTransfer
from tests.rollout.engines import (
    CACHED_PROMPT,
    generate,
    log_prob_error,
    problems,
    rollout_config,
    sampling,
    save_tiny_model,
)

BUCKET_BYTES = 6 << 10
"""Smaller than one layer, so that its tensors come in several buckets."""
UPDATE_TIMEOUT_S = 20.0
CHECKSUM_EVERY = 10

NamedTensors = list[tuple[str, Tensor]]


# --- with engines -----------------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """A trainer of two pipeline stages over one server: ranks 0 and 2 lead them, ranks 1 and 3 only gather."""

    pool: EnginePool
    client: EngineGenerator
    models: list[Qwen2ForCausalLM]
    run_dir: Path
    ranks: list[WeightTransfer] = field(default_factory=list)
    consumed: dict[int, int] = field(default_factory=dict)

    def open(self) -> None:
        """Makes every rank's part."""
        config = self.pool.config
        # As the first process of a run hosts the store and the others visit it.
        host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stores: list[Store] = [host]
        stores += [TCPStore("127.0.0.1", host.port, timeout=timedelta(seconds=30)) for _ in range(3)]
        self.ranks = [
            WeightTransfer(
                make_plane(config, rank // 2, self.run_dir) if rank % 2 == 0 else None,
                self.client.control if rank == 0 else None,
                store,
                stage=rank // 2,
                num_stages=2,
                bucket_bytes=BUCKET_BYTES,
                timeout_s=config.update_timeout_s,
                begin_timeout_s=30.0,
                checksum_every=CHECKSUM_EVERY,
            )
            for rank, store in enumerate(stores)
        ]

    def everywhere(self, work: Callable[[WeightTransfer], object]) -> list[object]:
        """What `work` returned, or raised, on each rank; raises rank 0's error if all ranks raised the same."""
        outcomes: list[object] = [None] * len(self.ranks)

        def run(index: int) -> None:
            try:
                outcomes[index] = work(self.ranks[index])
            except Exception as error:
                outcomes[index] = error

        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(self.ranks))]
        for thread in threads:
            thread.start()
        end = time.monotonic() + self.pool.config.update_timeout_s + 15
        for thread in threads:
            thread.join(timeout=max(0.0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads), "a rank is still waiting after the deadline"
        if isinstance(outcomes[0], Exception):
            assert {str(outcome) for outcome in outcomes} == {str(outcomes[0])}, outcomes
            raise outcomes[0]
        return outcomes

    def push(
        self, model: Qwen2ForCausalLM, version: int, change: Callable[[NamedTensors], Iterable] = lambda named: named
    ) -> TransferStats:
        """Sends `model`'s tensors, the first half from stage 0; `change` may spoil what stage 1's leader sends."""
        named = exported(model)
        middle = len(named) // 2
        parts = [named[:middle], named[:middle], change(named[middle:]), named[middle:]]
        self.consumed = {}

        def stream(index: int) -> Iterator[tuple[str, Tensor]]:
            for pair in parts[index]:
                self.consumed[index] = self.consumed.get(index, 0) + 1
                yield pair

        stats = self.everywhere(lambda rank: rank.push(stream(self.ranks.index(rank)), version))
        assert all(stat == stats[0] for stat in stats)
        assert isinstance(stats[0], TransferStats)
        return stats[0]

    def recover(self, lost: str) -> None:
        """What the training loop does after an update that failed, but for the next push; `lost` is the reason."""
        assert re.search(lost, self.pool.servers[0].reason)
        assert not self.pool.in_service
        assert self.pool.repair()
        self.pool.admit()
        assert self.pool.end_step() == {"rollout_restarts": 1.0, "rollout_servers": 1.0}

    def error_against(self, model: Qwen2ForCausalLM, version: int) -> float:
        """Largest log-prob difference between what the engine now samples and `model`; checks the version."""
        groups = generate(self.client, problems(4, length=CACHED_PROMPT), 2, sampling(), range(4))
        assert {r.weight_version for group in groups for r in group.samples} == {version}
        return max(log_prob_error(model, group.problem.token_ids, r) for group in groups for r in group.samples)

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The server's engine processes whose title contains `name`."""
        server = self.pool.servers[0].process
        assert server is not None
        return [p for p in psutil.Process(server.pid).children(recursive=True) if name in " ".join(p.cmdline())]

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.client.close()
        self.pool.close()


def exported(model: Qwen2ForCausalLM) -> NamedTensors:
    """What the trainer sends of a model: without the output layer if that is the embedding."""
    tied = model.config.tie_word_embeddings
    return [(name, tensor) for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")]


def _config(plane: str, workers: int) -> RolloutConfig:
    return rollout_config(weight_transfer=plane, tensor_parallel=workers, update_timeout_s=UPDATE_TIMEOUT_S)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Trainer]]:
    directory = tmp_path_factory.mktemp("transfer")
    pools, models = {}, {}
    # The output layer of a tied model is the embedding, and yet a layer that has to be told of an update by itself.
    for plane, workers, tied in (("shared_memory", 1, True), ("process_group", 2, False)):
        models[plane] = [save_tiny_model(directory / f"{plane}{seed}", seed, tied=tied) for seed in range(2)]
        pools[plane] = EnginePool(_config(plane, workers), directory / f"{plane}0", directory / plane, seed=0)
        pools[plane].start()
    made: dict[str, Trainer] = {}
    try:
        for plane, pool in pools.items():
            pool.wait_ready()
            made[plane] = Trainer(pool, EngineGenerator(pool), models[plane], directory / plane)
            made[plane].open()
        yield made
    finally:
        for trainer in made.values():
            trainer.close()
        for pool in pools.values():
            pool.close()


PLANES = pytest.mark.parametrize("plane", ["shared_memory", "process_group"])


@pytest.mark.slow
@PLANES
def test_after_an_update_the_engine_is_the_new_model(trainers: dict[str, Trainer], plane: str) -> None:
    trainer = trainers[plane]
    old, new = trainer.models
    assert trainer.error_against(old, version=0) < 1e-4
    stats = trainer.push(new, version=1)
    assert trainer.error_against(new, version=1) < 1e-4
    assert trainer.error_against(old, version=1) > 0.5
    named = dict(exported(new))
    assert (stats.tensors, stats.bytes) == (len(named), sum(tensor.nbytes for tensor in named.values()))
    assert stats.buckets > 10 and stats.checked == 0
    # Every rank of a stage has consumed its whole stream.
    assert trainer.consumed[0] == trainer.consumed[1] and trainer.consumed[2] == trainer.consumed[3]
    # Back again, in the same session objects, so that the tests below find the model they expect.
    stats = trainer.push(old, version=0)
    assert stats.checked == stats.tensors, "version 0 is a multiple of CHECKSUM_EVERY"
    assert trainer.error_against(old, version=0) < 1e-4
    for leader in (trainer.ranks[0]._plane, trainer.ranks[2]._plane):
        assert not isinstance(leader, SharedMemoryPlane) or not list(leader._directory.iterdir())


@pytest.mark.slow
def test_a_tied_output_layer_is_updated_with_its_embedding(trainers: dict[str, Trainer]) -> None:
    trainer = trainers["shared_memory"]
    old, new = trainer.models
    assert old.config.tie_word_embeddings
    # The negative control: what the engine would be if its output layer stayed the old one.
    stale = copy.deepcopy(new)
    stale.lm_head.weight = old.lm_head.weight
    trainer.push(new, version=1)
    assert trainer.error_against(new, version=1) < 1e-4
    assert trainer.error_against(stale, version=1) > 0.5
    trainer.push(old, version=0)


@pytest.mark.slow
def test_a_bit_flipped_on_the_way_is_named_and_the_next_update_repairs_it(
    trainers: dict[str, Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainers["shared_memory"]
    leader = trainer.ranks[2]._plane
    assert leader is not None
    sends: list[str] = []
    send = leader.send

    def flip_a_bit(bucket: Bucket) -> dict[str, Any]:
        tensors = [(name, tensor.clone()) for name, tensor in bucket.tensors]
        if not sends:
            tensors[-1][1].view(-1)[3:4].view(torch.int32)[0] ^= 1
        sends.append(tensors[-1][0])
        return send(Bucket(tensors))

    monkeypatch.setattr(leader, "send", flip_a_bit)
    with pytest.raises(
        RolloutError, match=r"weight update 20: .*another checksum than they were sent with: "
    ) as raised:
        trainer.push(trainer.models[0], version=20)
    assert str(raised.value).split("sent with: ")[1].startswith(sends[0])
    # The negative control: without checksums nobody notices.
    sends.clear()
    assert trainer.push(trainer.models[0], version=21).checked == 0
    monkeypatch.undo()
    assert trainer.push(trainer.models[0], version=0).checked > 0
    assert trainer.error_against(trainer.models[0], version=0) < 1e-4


def _without_last(named: NamedTensors) -> NamedTensors:
    return named[:-1]


def _misnamed(named: NamedTensors) -> NamedTensors:
    return [("model.layers.0.mlp.typo.weight", named[0][1]), *named[1:]]


def _twice(named: NamedTensors) -> NamedTensors:
    return [named[0], *named]


def _misshapen(named: NamedTensors) -> NamedTensors:
    return [(name, torch.cat([tensor, tensor])) for name, tensor in named]


def _failing_gather(named: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    yield from named[:3]
    raise RuntimeError("the gather broke")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_last, "lacks 1 tensors of the model: "),
        (_misnamed, "tensors that the model has not: model.layers.0.mlp.typo.weight"),
        (_twice, "tensors twice: "),
        (_misshapen, "update_weights answered 500"),
        (_failing_gather, "pipeline stage 1: RuntimeError: the gather broke"),
    ],
)
def test_a_spoilt_update_is_one_error_on_every_rank_and_a_good_one_repairs_it(
    trainers: dict[str, Trainer], spoil: Callable[[NamedTensors], Iterable], reason: str
) -> None:
    trainer = trainers["shared_memory"]
    with pytest.raises(RolloutError, match=r"weight update 6: .*") as raised:
        trainer.push(trainer.models[0], 6, spoil)
    assert reason in str(raised.value)
    assert trainer.consumed[0] == trainer.consumed[1]
    if "answered 500" in reason:
        trainer.recover(lost=reason)
    assert not trainer.pool.repair(), "a restart would not help"
    trainer.push(trainer.models[1], version=7)
    assert trainer.error_against(trainer.models[1], version=7) < 1e-4


@pytest.mark.slow
def test_an_engine_that_hangs_in_mid_update_is_named_at_the_deadline(trainers: dict[str, Trainer]) -> None:
    trainer = trainers["process_group"]
    worker = trainer.processes("Worker")[0]

    def stop_the_worker(named: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(named):
            # Buckets 0 to 5 of this stage are with the engine.
            if index == 6:
                worker.send_signal(signal.SIGSTOP)
            yield pair

    started = time.monotonic()
    try:
        with pytest.raises(RolloutError, match=r"no answer to /update_weights from http://127.* within 20 s"):
            trainer.push(trainer.models[1], 8, stop_the_worker)
        assert UPDATE_TIMEOUT_S - 1 < time.monotonic() - started < UPDATE_TIMEOUT_S + 10
        # Leaders drain their streams, so that the ranks that only gather are not left waiting in a gather.
        assert trainer.consumed[2] == trainer.consumed[3]
        segments = shared_files(trainer.processes())
        assert segments
        trainer.recover(lost=r"no answer|did not answer in time")
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        assert not [path for path in segments if path.exists()]
        trainer.push(trainer.models[1], version=8)
        assert trainer.error_against(trainer.models[1], version=8) < 1e-4
    finally:
        if worker.is_running():
            os.kill(worker.pid, signal.SIGCONT)
    segments = shared_files(trainer.processes())
    closing = time.monotonic()
    trainer.close()
    assert time.monotonic() - closing < 25
    assert not [path for path in segments if path.exists()]


@pytest.mark.slow
def test_a_server_that_dies_in_mid_update_is_quoted_at_once(trainers: dict[str, Trainer]) -> None:
    trainer = trainers["shared_memory"]
    server = trainer.pool.servers[0].process
    assert server is not None

    def kill_the_server(named: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(named):
            if index == 6:
                server.kill()
            yield pair

    started = time.monotonic()
    with pytest.raises(RolloutError, match=r"(?s)weight update 9: .*was ended by signal 9; .*the end of"):
        trainer.push(trainer.models[1], 9, kill_the_server)
    assert time.monotonic() - started < 10
    # Nobody starts it again behind the trainer's back, and the trainer does once.
    trainer.recover(lost=r"(?s)was ended by signal 9; .*the end of")
    trainer.push(trainer.models[1], version=9)
    assert trainer.error_against(trainer.models[1], version=9) < 1e-4
