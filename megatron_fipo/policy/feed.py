"""From a batch's rows to this rank's mini-batches: what each rank reads, fetched from the store that has it.

In each data-parallel replica the first tensor-parallel rank of the first and of the last pipeline stage read tokens, by
the table of records/streams.py; each context-parallel rank its own chunks of each sequence, so that a token crosses the
network once for each stage that reads it, however many ranks share it. Their tensor-parallel peers get each micro-batch
by a broadcast when the schedule asks for it (tokens.py). The other stages fetch nothing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy
import torch
import torch.distributed
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megatron_fipo.errors import FipoError, RolloutError, one_line
from megatron_fipo.policy import platform
from megatron_fipo.policy.micro_batch import BatchLayout, MiniBatch
from megatron_fipo.policy.store_reader import StoreReader
from megatron_fipo.policy.tokens import StepTokens, streams_read
from megatron_fipo.policy.train_batch import share
from megatron_fipo.policy.update import Policy
from megatron_fipo.records.rows import PIECE, TrainBatch
from megatron_fipo.records.streams import ROUTED_EXPERTS, TOKEN_IDS
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.ranks import only_rank_0
from megatron_fipo.weights.reshard import gather_texts

FETCH_TIMEOUT_S = 600.0
"""Longest time to fetch a step's tokens; less where other ranks would not wait so long."""
ATTEMPTS = 3
"""How often a batch is asked for before the run gives up."""

Plan = Sequence[Sequence[Sequence[int]]]
"""For each update, this replica's micro-batches: places of their sequences in the batch; none is a filler."""


class Source(Protocol):
    """Where tokens come from: a store, here or over the network."""

    def read(self, pieces: numpy.ndarray, names: Sequence[str], columns: tuple[int, int]) -> dict[str, numpy.ndarray]:
        """These streams of pieces of samples, one piece after the other; see `SampleStore.read`."""
        ...


class BatchOffers(Protocol):
    """Who offers batches, on rank 0."""

    def give_back(self, reason: str) -> bytes:
        """The batch anew, whose tokens could not be fetched: its frame."""
        ...

    def fetched(self) -> None:
        """Every rank has what it reads of the batch."""
        ...


@dataclass(frozen=True)
class FetchFailed:
    """Why some rank did not get its tokens; the same on every rank."""

    reason: str


class Feed:
    """What this rank's pipeline reads. Every rank makes one, and calls of `fetch` and `get` match."""

    def __init__(
        self,
        layout: BatchLayout,
        vocab_size: int,
        device: torch.device,
        *,
        tensor_group: ProcessGroup | None = None,
        timeout_s: float = FETCH_TIMEOUT_S,
    ):
        """Nothing is fetched yet.

        Args:
            layout: this rank's.
            device: where micro-batches go.
            tensor_group: the ranks of this stage that share each micro-batch; None if it is this one alone.
            timeout_s: longest time of one fetch, in seconds.
        """
        self._layout, self._vocab_size, self._device = layout, vocab_size, device
        self._group, self._timeout_s = tensor_group, timeout_s
        self._names = list(dict.fromkeys(stream.host_name for stream in streams_read(layout.stages, layout.columns)))

    def get(
        self, offered: bytes | None, offers: BatchOffers | None, plan: Callable[[TrainBatch], Plan]
    ) -> list[MiniBatch]:
        """This rank's mini-batches of the batch that rank 0 was offered.

        Args:
            offered, offers: the batch's frame and who offers it on rank 0, None elsewhere.
            plan: `Policy.plan`.

        Raises:
            RolloutError: on every rank, when ATTEMPTS fetches have failed.
        """
        attempt = 1
        while isinstance(found := self.fetch(batch := share(offered), plan(batch)), FetchFailed):
            if attempt == ATTEMPTS:
                raise RolloutError(
                    f"step {batch.step}: its tokens could not be fetched in {ATTEMPTS} attempts: {found.reason}"
                )
            attempt += 1
            offered = only_rank_0(partial(offers.give_back, found.reason) if offers is not None else _nothing)
        if offers is not None:
            offers.fetched()
        return found

    def fetch(self, batch: TrainBatch, plan: Plan, source: Source | None = None) -> list[MiniBatch] | FetchFailed:
        """This rank's mini-batches, with all tokens that it reads. The same verdict on every rank.

        Args:
            source: what every rank has made itself; None: the batch's store.
        """
        tokens, reason = None, ""
        try:
            tokens = self._tokens(batch, plan, source)
        except Exception as error:  # whatever it is, the other ranks wait for the verdict
            reason = f"rank {_rank()}: {error if isinstance(error, FipoError) else one_line(error)}"
        if (worst := _first_reason(reason)) or tokens is None:
            return FetchFailed(worst)
        return [MiniBatch(batch, tokens, micro_batches, self._layout, self._device) for micro_batches in plan]

    def _tokens(self, batch: TrainBatch, plan: Plan, source: Source | None) -> StepTokens:
        if not self._names or not plan or (self._group is not None and self._group.rank() > 0):
            return StepTokens({}, {}, self._group)
        stretches = self._stretches(batch, plan)
        numbers = batch.rows["sample"].tolist()
        pieces = numpy.array(
            [(numbers[place], start, end) for place, found in stretches.items() for start, end in found], PIECE
        )
        if source is not None:
            arrays = source.read(pieces, self._names, self._layout.columns)
        elif batch.store is not None:
            with StoreReader(batch.store, Deadline(self._timeout_s)) as reader:
                arrays = reader.read(pieces, self._names, self._layout.columns)
        else:
            raise RolloutError("the batch names no store")
        self._check(arrays)
        return StepTokens.of(arrays, stretches, self._group)

    def _stretches(self, batch: TrainBatch, plan: Plan) -> dict[int, list[tuple[int, int]]]:
        """What this rank reads of each sequence of its replica, by the sequence's place in the batch.

        None of a short one, where context parallelism leaves this rank its padding only.
        """
        lengths, found = batch.lengths, {}
        for indices in (indices for micro_batches in plan for indices in micro_batches if indices):
            slots = self._layout.slots([lengths[index] - 1 for index in indices])
            for index, slot in zip(indices, slots, strict=True):
                found[index] = self._layout.stretches(slot, lengths[index])
        return found

    def _check(self, arrays: dict[str, numpy.ndarray]) -> None:
        """RolloutError for token ids or experts that are none of the model's; types and lengths are as asked for."""
        ids = arrays.get(TOKEN_IDS)
        if ids is not None and ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise RolloutError(
                f"the store gave token ids from {ids.min()} to {ids.max()}; the model has 0 to {self._vocab_size - 1}"
            )
        routes = arrays.get(ROUTED_EXPERTS)
        if routes is not None and self._layout.routes is not None and (wrong := self._layout.routes.problem(routes)):
            raise RolloutError(f"what the store gave of {ROUTED_EXPERTS} {wrong}")


def feed_of(policy: Policy, timeout_s: float = FETCH_TIMEOUT_S) -> Feed:
    """The feed of this rank's part of the policy."""
    group = parallel_state.get_tensor_model_parallel_group()
    return Feed(
        policy.layout,
        policy.model_config.vocab_size,
        platform.device(),
        tensor_group=group if group.size() > 1 else None,
        timeout_s=min(timeout_s, policy.config.run.collective_timeout_s / 2),
    )


def made_alike(policy: Policy, batch: TrainBatch, store: Source, plan: Plan | None = None) -> list[MiniBatch]:
    """This rank's mini-batches of what every rank has made itself, and not sampled. RolloutError if it is no batch.

    Args:
        plan: None: the policy's own.
    """
    found = feed_of(policy).fetch(batch, plan or policy.plan(batch), store)
    if isinstance(found, FetchFailed):
        raise RolloutError(found.reason)
    return found


def _nothing() -> None:
    """What ranks but the first do while that has something to do."""


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _first_reason(reason: str) -> str:
    """The first rank's reason that is not empty, on every rank; empty if there is none."""
    if not torch.distributed.is_initialized():
        return reason
    failed = torch.tensor([bool(reason)], dtype=torch.int64)
    torch.distributed.all_reduce(failed)
    if not failed.item():
        return ""
    reasons = [json.loads(text) for text in gather_texts(json.dumps(reason), torch.device("cpu"))]
    return next(text for text in reasons if text)
