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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed import Store, TCPStore
from transformers import Qwen2ForCausalLM

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.server_process import shared_files
from megatron_fipo.errors import RolloutError, WeightError
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.weights.buckets import Bucket
from megatron_fipo.weights.local_senders import Senders
from megatron_fipo.weights.publisher import WeightPublisher
from megatron_fipo.weights.transport_records import BucketHeader
from megatron_fipo.weights.transports import SharedMemoryTransport, WeightTransport, make_transport
from megatron_fipo.weights.update_records import Published
from tests.rollout.engines import (
    CACHED_PROMPT,
    generate,
    log_prob_error,
    problems,
    rollout_config,
    sampling,
    save_tiny_model,
)
from tests.weights.whole import WholeWeights

BUCKET_BYTES = 6 << 10
"""Smaller than one layer, so that its tensors come in several buckets."""
UPDATE_TIMEOUT_S = 20.0
CHECKSUM_EVERY = 10

NamedTensors = list[tuple[str, Tensor]]


# --- with engines -----------------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """A trainer of two pipeline stages over one server: ranks 0 and 2 send, 1 and 3 gather with them, 4 looks on."""

    pool: EnginePool
    client: EngineGenerator
    models: list[Qwen2ForCausalLM]
    run_dir: Path
    ranks: list[WeightPublisher] = field(default_factory=list)
    gathered: dict[int, int] = field(default_factory=dict)

    def open(self) -> None:
        """Makes every rank's part."""
        config = self.pool.config
        # As the first process of a run hosts the store and the others visit it.
        host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stores: list[Store] = [host]
        stores += [TCPStore("127.0.0.1", host.port, timeout=timedelta(seconds=30)) for _ in range(4)]
        transports: list[dict[int, WeightTransport | None]]
        first, second = make_transport(config, 0, self.run_dir), make_transport(config, 1, self.run_dir)
        transports = [{0: first}, {0: None}, {1: second}, {1: None}, {}]
        self.ranks = [
            WeightPublisher(
                transports[rank],
                self.client.control if rank == 0 else None,
                store,
                senders=Senders(2),
                timeout_s=config.update_timeout_s,
                begin_timeout_s=30.0,
                checksum_every=CHECKSUM_EVERY,
            )
            for rank, store in enumerate(stores)
        ]

    def everywhere(self, work: Callable[[WeightPublisher], object]) -> list[object]:
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

    def publish(
        self,
        model: Qwen2ForCausalLM,
        version: int,
        change: Callable[[NamedTensors], NamedTensors] = lambda named: named,
        before: Callable[[int], None] = lambda index: None,
    ) -> Published:
        """Sends `model`'s tensors, the first half from stage 0.

        `change` may spoil what stage 1's sender sends, and `before` what happens before it gathers a bucket.
        """
        named = exported(model)
        middle = len(named) // 2
        parts = [named[:middle], named[:middle], change(named[middle:]), named[middle:]]
        self.gathered = dict.fromkeys(range(4), 0)

        def weights(rank: int) -> dict[int, WholeWeights]:
            if rank == 4:
                return {}

            def count(index: int) -> None:
                if rank == 2:
                    before(index)
                self.gathered[rank] += 1

            return {rank // 2: WholeWeights(parts[rank], BUCKET_BYTES, count)}

        published = self.everywhere(lambda rank: rank.publish(weights(self.ranks.index(rank)), version))
        assert all(each == published[0] for each in published)
        assert isinstance(published[0], Published)
        return published[0]

    def recover(self, lost: str) -> None:
        """What the training loop does after an update that failed, but for the next one; `lost` is the reason."""
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


def _config(transport: str, workers: int) -> RolloutConfig:
    return rollout_config(weight_transfer=transport, tensor_parallel=workers, update_timeout_s=UPDATE_TIMEOUT_S)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Trainer]]:
    directory = tmp_path_factory.mktemp("transfer")
    pools, models = {}, {}
    # The output layer of a tied model is the embedding, and yet a layer that has to be told of an update by itself.
    for transport, workers, tied in (("shared_memory", 1, True), ("process_group", 2, False)):
        models[transport] = [save_tiny_model(directory / f"{transport}{seed}", seed, tied=tied) for seed in range(2)]
        pools[transport] = EnginePool(
            _config(transport, workers), directory / f"{transport}0", directory / transport, seed=0
        )
        pools[transport].start()
    made: dict[str, Trainer] = {}
    try:
        for transport, pool in pools.items():
            pool.wait_ready()
            made[transport] = Trainer(pool, EngineGenerator(pool), models[transport], directory / transport)
            made[transport].open()
        yield made
    finally:
        for trainer in made.values():
            trainer.close()
        for pool in pools.values():
            pool.close()


TRANSPORTS = pytest.mark.parametrize("transport", ["shared_memory", "process_group"])


@pytest.mark.slow
@TRANSPORTS
def test_after_an_update_the_engine_is_the_new_model(trainers: dict[str, Trainer], transport: str) -> None:
    trainer = trainers[transport]
    old, new = trainer.models
    assert trainer.error_against(old, version=0) < 1e-4
    stats = trainer.publish(new, version=1)
    assert trainer.error_against(new, version=1) < 1e-4
    assert trainer.error_against(old, version=1) > 0.5
    named = dict(exported(new))
    assert (stats.tensors, stats.bytes) == (len(named), sum(tensor.nbytes for tensor in named.values()))
    assert stats.buckets > 10 and stats.checked == 0
    # Every rank of a stage has taken part in every gather.
    assert trainer.gathered[0] == trainer.gathered[1] and trainer.gathered[2] == trainer.gathered[3]
    assert trainer.gathered[0] + trainer.gathered[2] == stats.buckets
    # Back again, in the same session objects, so that the tests below find the model they expect.
    stats = trainer.publish(old, version=0)
    assert stats.checked == stats.tensors, "version 0 is a multiple of CHECKSUM_EVERY"
    assert trainer.error_against(old, version=0) < 1e-4
    for sender in (trainer.ranks[0]._transports[0], trainer.ranks[2]._transports[1]):
        assert not isinstance(sender, SharedMemoryTransport) or not list(sender._directory.iterdir())


@pytest.mark.slow
def test_a_tied_output_layer_is_updated_with_its_embedding(trainers: dict[str, Trainer]) -> None:
    trainer = trainers["shared_memory"]
    old, new = trainer.models
    assert old.config.tie_word_embeddings
    # The negative control: what the engine would be if its output layer stayed the old one.
    stale = copy.deepcopy(new)
    stale.lm_head.weight = old.lm_head.weight
    trainer.publish(new, version=1)
    assert trainer.error_against(new, version=1) < 1e-4
    assert trainer.error_against(stale, version=1) > 0.5
    trainer.publish(old, version=0)


@pytest.mark.slow
def test_a_bit_flipped_on_the_way_is_named_and_the_next_update_repairs_it(
    trainers: dict[str, Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainers["shared_memory"]
    sender = trainer.ranks[2]._transports[1]
    assert sender is not None
    sends: list[str] = []
    send = sender.send

    def flip_a_bit(bucket: Bucket) -> BucketHeader:
        tensors = [(name, tensor.clone()) for name, tensor in bucket.tensors]
        if not sends:
            tensors[-1][1].view(-1)[3:4].view(torch.int32)[0] ^= 1
        sends.append(tensors[-1][0])
        return send(Bucket(tensors))

    monkeypatch.setattr(sender, "send", flip_a_bit)
    with pytest.raises(WeightError, match=r"weight update 20: .*another checksum than they were sent with: ") as raised:
        trainer.publish(trainer.models[0], version=20)
    assert str(raised.value).split("sent with: ")[1].startswith(sends[0])
    # The negative control: without checksums nobody notices.
    sends.clear()
    assert trainer.publish(trainer.models[0], version=21).checked == 0
    monkeypatch.undo()
    assert trainer.publish(trainer.models[0], version=0).checked > 0
    assert trainer.error_against(trainer.models[0], version=0) < 1e-4


def _without_last(named: NamedTensors) -> NamedTensors:
    return named[:-1]


def _misnamed(named: NamedTensors) -> NamedTensors:
    return [("model.layers.0.mlp.typo.weight", named[0][1]), *named[1:]]


def _twice(named: NamedTensors) -> NamedTensors:
    return [named[0], *named]


def _misshapen(named: NamedTensors) -> NamedTensors:
    return [(name, torch.cat([tensor, tensor])) for name, tensor in named]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_last, "lacks 1 tensors of the model: "),
        (_misnamed, "tensors that the model has not: model.layers.0.mlp.typo.weight"),
        (_twice, "tensors twice: "),
        (_misshapen, "update_weights answered 500"),
    ],
)
def test_a_spoilt_update_is_one_error_on_every_rank_and_a_good_one_repairs_it(
    trainers: dict[str, Trainer], spoil: Callable[[NamedTensors], NamedTensors], reason: str
) -> None:
    trainer = trainers["shared_memory"]
    kind = RolloutError if "answered 500" in reason else WeightError
    with pytest.raises(kind, match=r"weight update 6: .*") as raised:
        trainer.publish(trainer.models[0], 6, spoil)
    assert reason in str(raised.value)
    assert trainer.gathered[0] == trainer.gathered[1]
    if "answered 500" in reason:
        trainer.recover(lost=reason)
    assert not trainer.pool.repair(), "a restart would not help"
    trainer.publish(trainer.models[1], version=7)
    assert trainer.error_against(trainer.models[1], version=7) < 1e-4


@pytest.mark.slow
def test_a_gather_that_fails_is_one_error_on_every_rank(trainers: dict[str, Trainer]) -> None:
    """And no further gather is begun on that rank, since nobody knows where in it the others are."""
    trainer = trainers["shared_memory"]

    def break_at_3(index: int) -> None:
        if index == 3:
            raise RuntimeError("the gather broke")

    with pytest.raises(RolloutError, match="weight update 6: sender 1: RuntimeError: the gather broke"):
        trainer.publish(trainer.models[0], 6, before=break_at_3)
    assert trainer.gathered[2] == 3
    trainer.publish(trainer.models[1], version=7)
    assert trainer.error_against(trainer.models[1], version=7) < 1e-4


@pytest.mark.matrix  # test_two_engines.py loses one in mid-update
@pytest.mark.slow
def test_an_engine_that_hangs_in_mid_update_is_named_at_the_deadline(trainers: dict[str, Trainer]) -> None:
    trainer = trainers["process_group"]
    worker = trainer.processes("Worker")[0]

    def stop_the_worker(index: int) -> None:
        # The buckets before are with the engine, or on their way.
        if index == 6:
            worker.send_signal(signal.SIGSTOP)

    started = time.monotonic()
    try:
        with pytest.raises(RolloutError, match=r"no answer to /update_weights from http://127.* within 20 s"):
            trainer.publish(trainer.models[1], 8, before=stop_the_worker)
        assert UPDATE_TIMEOUT_S - 1 < time.monotonic() - started < UPDATE_TIMEOUT_S + 10
        # Senders gather to the end, so that the ranks that gather with them are not left waiting.
        assert trainer.gathered[2] == trainer.gathered[3]
        segments = shared_files(trainer.processes())
        assert segments
        trainer.recover(lost=r"no answer|did not answer in time")
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        assert not [path for path in segments if path.exists()]
        trainer.publish(trainer.models[1], version=8)
        assert trainer.error_against(trainer.models[1], version=8) < 1e-4
    finally:
        if worker.is_running():
            os.kill(worker.pid, signal.SIGCONT)
    segments = shared_files(trainer.processes())
    closing = time.monotonic()
    trainer.close()
    assert time.monotonic() - closing < 25
    assert not [path for path in segments if path.exists()]


@pytest.mark.matrix  # test_two_engines.py loses one in mid-update
@pytest.mark.slow
def test_a_server_that_dies_in_mid_update_is_quoted_at_once(trainers: dict[str, Trainer]) -> None:
    trainer = trainers["shared_memory"]
    server = trainer.pool.servers[0].process
    assert server is not None

    def kill_the_server(index: int) -> None:
        if index == 6:
            server.kill()

    started = time.monotonic()
    with pytest.raises(RolloutError, match=r"(?s)weight update 9: .*was ended by signal 9; .*the end of"):
        trainer.publish(trainer.models[1], 9, before=kill_the_server)
    assert time.monotonic() - started < 10
    # Nobody starts it again behind the trainer's back, and the trainer does once.
    trainer.recover(lost=r"(?s)was ended by signal 9; .*the end of")
    trainer.publish(trainer.models[1], version=9)
    assert trainer.error_against(trainer.models[1], version=9) < 1e-4
