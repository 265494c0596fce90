"""Whether every engine has the trainer's weights after an update: a fixed text, scored by both.

The comparison on sampled tokens (agreement.py) is over all engines together, and comes when a step's samples are there.
This one tells the engines apart, and comes before they sample.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed
from megatron.core import parallel_state
from torch import Tensor

from megatron_fipo.policy.feed import made_alike
from megatron_fipo.policy.logprobs import log_probs_and_entropy
from megatron_fipo.policy.micro_batch import MicroBatch
from megatron_fipo.policy.update import Policy
from megatron_fipo.records.sample import sample_from_lists
from megatron_fipo.records.streams import LABELS
from megatron_fipo.rollout.plain_batch import plain_batch
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.ranks import answer_of_rank_0

TOKENS = 64


class Scorer(Protocol):
    """The engines, as far as the probe asks them."""

    async def score(self, token_ids: list[int], deadline: Deadline) -> dict[str, list[float | None]]:
        """Log-probs of the tokens but the first, by the address of each engine that answers; None: not a number."""
        ...


def probe_tokens(vocab_size: int, longest: int) -> list[int]:
    """The text: random ids, the same for every model of a vocabulary. At most `longest`."""
    generator = torch.Generator().manual_seed(TOKENS)
    return torch.randint(vocab_size, (TOKENS,), generator=generator).tolist()[:longest]


def probe_differences(
    own: Tensor, engines: Scorer | None, token_ids: Sequence[int], deadline: Deadline
) -> dict[str, float]:
    """Mean |log π_trainer − log π_engine| over the text, in nats per token, by the address of each engine.

    Every rank calls this together, `engines` given on rank 0; the same on every rank. NaN where either side has one.
    Engines that do not answer are left out.

    Args:
        own: what `trainer_scores` found.
    """
    answers = answer_of_rank_0(lambda: asyncio.run(engines.score(list(token_ids), deadline)) if engines else {})
    return {url: mean_difference(own, values) for url, values in answers.items()}


def beyond(differences: Mapping[str, float], limit: float) -> list[str]:
    """Addresses of the engines that differ by more than `limit`, or by what is not a number."""
    return [url for url, difference in differences.items() if not difference <= limit]


@torch.no_grad()
def trainer_scores(policy: Policy, token_ids: Sequence[int]) -> Tensor:
    """The policy's log-probs of the tokens but the first, [tokens - 1] fp32 on the CPU. Collective over all ranks."""
    text = sample_from_lists(token_ids, [0.0] * len(token_ids), "length", 0)
    batch, store = plain_batch({name: [values] for name, values in text.streams.items()}, [1], [0.0])
    parallel = policy.config.parallel
    # Every replica scores the text; an interleaved schedule takes micro-batches by the number of stages.
    plan = [[0]] * (parallel.pipeline if parallel.virtual_pipeline else 1)

    def measure(micro_batch: MicroBatch, logits: Tensor, non_loss_data: bool) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        labels = micro_batch.streams[LABELS]
        found, _ = log_probs_and_entropy(logits, labels, policy.model_config.vocab_size, 1.0, group)
        values = torch.zeros(len(token_ids) - 1, device=found.device)
        values[micro_batch.position_ids[micro_batch.response_mask]] = found[micro_batch.response_mask]
        return values

    passed = policy.forward(made_alike(policy, batch, store, [plan])[0], measure)
    scores = torch.zeros(len(token_ids) - 1)
    first_replica = parallel_state.get_data_parallel_rank() == parallel_state.get_tensor_model_parallel_rank() == 0
    if passed and first_replica:
        scores += passed[0].cpu()
    # One pipeline's last stage has values, each context-parallel rank those of its own positions.
    torch.distributed.all_reduce(scores)
    return scores


def mean_difference(own: Tensor, engine: Sequence[float | None]) -> float:
    """Mean |own − engine|; NaN where either has one."""
    values = torch.tensor([math.nan if value is None else value for value in engine])
    return float((own - values).abs().mean())
