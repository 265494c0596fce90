"""Metrics of a step's sampling, over all responses sampled in it, trained on or not."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy

from megatron_fipo.records.sample import FAILED_CHECKS, Group
from megatron_fipo.rollout.collector import Batch
from megatron_fipo.rollout.filters import ALL_RIGHT, ALL_WRONG
from megatron_fipo.rollout.ledger import STOPPED, SURPLUS
from megatron_fipo.tracking.lag import lag_metrics


def sampling_metrics(batch: Batch, version: int) -> dict[str, float]:
    """Return one step's metrics of dynamic sampling, verdicts, responses, and of how old the weights were.

    Means of reward and accuracy are over the responses that were judged. Without any, they are left out. The step
    starts from the weights of `version`.
    """
    rejected = batch.counts.rejected
    metrics: dict[str, float] = {
        "num_gen_batches": batch.generation_batches,
        "groups_kept": len(batch.groups),
        "groups_dropped": sum(count for reason, count in rejected.items() if reason not in (SURPLUS, STOPPED)),
        "groups_dropped_all_right": rejected.get(ALL_RIGHT, 0),
        "groups_dropped_all_wrong": rejected.get(ALL_WRONG, 0),
        "groups_dropped_surplus": rejected.get(SURPLUS, 0),
        "groups_stopped": rejected.get(STOPPED, 0),
        "groups_carried": batch.left,
    }
    return metrics | _verdicts(batch.sampled) | _responses(batch.sampled) | lag_metrics(batch.groups, version)


def _verdicts(sampled: Sequence[Group]) -> dict[str, float]:
    results = [result for group in sampled for result in group.results]
    judged = [result for result in results if result.was_judged]
    outcomes = Counter(result.outcome for result in results)
    metrics: dict[str, float] = {f"verifier_{_PLURALS[kind]}": outcomes[kind] for kind in FAILED_CHECKS}
    metrics["answers_too_long"] = outcomes["too_long"]
    if results:
        metrics |= {f"verifier_{kind}_rate": outcomes[kind] / len(results) for kind in FAILED_CHECKS}
    if judged:
        metrics["reward_mean"] = fmean(result.reward for result in judged)
        metrics["accuracy"] = fmean(result.accuracy for result in judged)
    for name in sorted({name for result in judged for name in result.extra}):
        said = [result.extra[name] for result in judged if name in result.extra]
        if numbers := [value for value in said if isinstance(value, float)]:
            metrics[f"reward/{name}"] = fmean(numbers)
    return metrics


_PLURALS = {"timeout": "timeouts", "crash": "crashes"}


def _responses(sampled: Sequence[Group]) -> dict[str, float]:
    samples = [sample for group in sampled for sample in group.samples]
    if not samples:
        return {}
    lengths = numpy.array([sample.actions for sample in samples])
    tokens = sum(len(sample) for sample in samples)
    metrics = {f"response_length_q{q}": float(numpy.percentile(lengths, q)) for q in (25, 50, 75)}
    return metrics | {
        "response_length_mean": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
        "responses_truncated": sum(sample.finish_reason == "length" for sample in samples),
        "response_tokens": float(lengths.sum()),
        "turns_mean": fmean(sample.turns for sample in samples),
        "environment_failures": sum(sample.finish_reason == "environment" for sample in samples),
        "context_share": 1 - float(lengths.sum()) / tokens if tokens else 0.0,
        "weight_version": max(sample.weight_version for sample in samples),
    }
