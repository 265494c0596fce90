"""A step's training data: groups become sequences of equal form, the same on every rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import torch
import torch.distributed
from torch import Tensor

from megatron_fipo.algorithm.advantages import group_advantages
from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group, Sample
from megatron_fipo.records.streams import TOKEN_IDS, sampled_streams


@dataclass(frozen=True)
class TrainBatch:
    """One step's training data, the same on every rank. All CPU tensors; n sequences, of prompt and response each."""

    streams: Mapping[str, Sequence[Tensor]]
    """By the table of records/streams.py, those that samples come with: n × [prompt + response] each. A prompt's tokens
    have the stream's fill, but for their ids."""
    prompt_lengths: Sequence[int]
    advantages: Tensor
    """[n] fp32"""
    weight_lag: Tensor
    """[n] int64: versions between the weights that sampled it and those that the step starts from; 0 but for sequences
    carried over from an earlier step."""
    mini_batch_sizes: Sequence[int]
    """Sequences of each update, in order; they add up to n."""
    told: Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int64))
    """[m, 3] int64: sequence, start and end, counted from the sequence's begin, of each stretch within a response that
    the policy did not produce. No loss and no credit is theirs."""

    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and response."""
        return [len(tokens) for tokens in self.streams[TOKEN_IDS]]


def train_batch(groups: Sequence[Group], algorithm: AlgorithmConfig, weight_version: int) -> TrainBatch:
    """Judged groups as sequences, cut into mini-batches of whole groups, each sample with its advantage.

    A sample whose check failed is no wrong answer: it is left out, of the group's mean too.
    """
    streams: dict[str, list[Tensor]] = {name: [] for name in sampled_streams()}
    prompts: list[int] = []
    advantages: list[float] = []
    weight_lag: list[int] = []
    sizes: list[int] = []
    told: list[tuple[int, int, int]] = []
    for start in range(0, len(groups), algorithm.mini_batch_prompts):
        before = len(prompts)
        for group in groups[start : start + algorithm.mini_batch_prompts]:
            pairs = zip(group.samples, group.results, strict=True)
            judged = [(sample, result) for sample, result in pairs if result.was_judged]
            for sample, _ in judged:
                for name, values in _over_prompt_too(sample, group.problem).items():
                    streams[name].append(values)
            prompt = len(group.problem.token_ids)
            for sequence, (sample, _) in enumerate(judged, start=len(prompts)):
                told += [(sequence, prompt + segment.start, prompt + segment.end) for segment in sample.told]
            prompts += [prompt] * len(judged)
            weight_lag += [weight_version - sample.weight_version for sample, _ in judged]
            rewards = [result.reward for _, result in judged]
            advantages += group_advantages(rewards, norm_by_std=algorithm.norm_adv_by_std)
        if len(prompts) > before:
            sizes.append(len(prompts) - before)
    stretches = torch.tensor(told, dtype=torch.int64).view(-1, 3)
    return TrainBatch(streams, prompts, torch.tensor(advantages), torch.tensor(weight_lag), sizes, stretches)


def _over_prompt_too(sample: Sample, problem: Problem) -> dict[str, Tensor]:
    """The sample's streams with values for the prompt's tokens in front."""
    joined = {}
    for name, stream in sampled_streams().items():
        prompt = numpy.full(len(problem.token_ids), stream.fill, stream.dtype)
        if name == TOKEN_IDS:
            prompt = problem.token_ids
        joined[name] = torch.from_numpy(numpy.concatenate([prompt, sample.streams[name]]))
    return joined


def share(batch: TrainBatch | None) -> TrainBatch:
    """Hand rank 0's batch to every rank.

    Args:
        batch: the data on rank 0, None elsewhere.
    """
    counts = None
    if batch is not None:
        counts = torch.tensor([len(batch.prompt_lengths), len(batch.mini_batch_sizes), len(batch.told)])
    count, mini_batches, stretches = _broadcast(counts, 3).tolist()
    if count == 0:
        nothing: dict[str, list[Tensor]] = {name: [] for name in sampled_streams()}
        return TrainBatch(nothing, [], torch.empty(0), torch.empty(0, dtype=torch.int64), [])
    shape = (
        torch.tensor([*batch.prompt_lengths, *batch.lengths(), *batch.mini_batch_sizes]) if batch is not None else None
    )
    shape = _broadcast(shape, 2 * count + mini_batches)
    prompts, lengths, sizes = (part.tolist() for part in shape.split([count, count, mini_batches]))
    streams = {}
    for name, stream in sampled_streams().items():
        flat = torch.cat(list(batch.streams[name])) if batch is not None else None
        streams[name] = _broadcast(flat, sum(lengths), getattr(torch, stream.dtype)).split(lengths)
    floats = torch.cat([batch.advantages, batch.weight_lag.float()]) if batch is not None else None
    advantages, weight_lag = _broadcast(floats, 2 * count, torch.float32).split(count)
    told = _broadcast(batch.told.flatten() if batch is not None else None, 3 * stretches).view(-1, 3)
    return TrainBatch(streams, prompts, advantages, weight_lag.long(), sizes, told)


def _broadcast(tensor: Tensor | None, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    held = torch.empty(size, dtype=dtype) if tensor is None else tensor.to(dtype)
    if size:
        torch.distributed.broadcast(held, src=0)
    return held
