"""A batch of sequences that come from no engine: what a tool trains on, or a measurement is of."""

from collections.abc import Iterable, Mapping, Sequence

import numpy
from numpy.typing import ArrayLike

from megatron_fipo.records.rows import TrainBatch, rows_of, told_stretches
from megatron_fipo.records.streams import TOKEN_IDS, carried_streams, sampled_streams
from megatron_fipo.rollout.store import SampleStore

Made = tuple[TrainBatch, SampleStore]
"""Rows of the sequences, and a store that has their tokens."""


def plain_batch(
    streams: Mapping[str, Sequence[ArrayLike]],
    prompt_lengths: Sequence[int],
    advantages: Sequence[float],
    weight_lag: Sequence[int] | None = None,
    mini_batch_sizes: Sequence[int] | None = None,
    told: Iterable[Sequence[int]] = (),
) -> Made:
    """A batch of step 0.

    Args:
        streams: by the table of records/streams.py, those that samples come with: n × [prompt + response, …] each;
            whole ones may be left out.
        weight_lag: 0 if none is given.
        mini_batch_sizes: sequences of each update; all in one if none are given.
        told: row, start and end of each stretch that the policy did not produce.
    """
    count, store = len(prompt_lengths), SampleStore()
    whole = {
        name: [numpy.asarray(values, stream.dtype) for values in streams[name]]
        for name, stream in carried_streams().items()
        if not stream.whole or name in streams
    }
    table = sampled_streams()
    samples = [
        store.put(
            whole[TOKEN_IDS][place][:prompt],
            {name: values[place][prompt if name in table else 0 :] for name, values in whole.items()},
        )
        for place, prompt in enumerate(prompt_lengths)
    ]
    tokens = [len(values) for values in whole[TOKEN_IDS]]
    rows = rows_of(samples, tokens, prompt_lengths, advantages, weight_lag or [0] * count, mini_batch_sizes or [count])
    return TrainBatch(0, rows, told_stretches(told, rows)), store
