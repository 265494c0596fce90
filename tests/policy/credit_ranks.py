"""What the ranks of test_credit.py run: one update whose values per token are recorded."""

import base64
import dataclasses
from typing import Any

import numpy

from megatron_fipo.policy import credit, platform
from tests.policy.layouts import (
    OPTIMIZER,
    Policy,
    made_alike,
    make_config,
    parallel_state,
    read_architecture,
    read_batch,
    start_model_parallel,
)

LEFT_OUT = 2
"""The row that the batch does not mark."""
UPDATE = 3


def recorded(model_dir: str, batch: str, layouts: list[dict[str, Any]]) -> list[list[str]]:
    """Under each layout, what rank 0 has gathered: frames in base64. Other ranks: nothing."""
    platform.start_process_group(60)
    results = []
    for layout in layouts:
        settings = dict(layout)
        sabotage = settings.pop("sabotage", None)
        config = make_config(settings, OPTIMIZER, "fipo")
        start_model_parallel(config.parallel, 0)
        policy = Policy(config, read_architecture(model_dir), model_dir, updates=10)
        data, store = read_batch(batch)
        rows = data.rows.copy()
        rows["recorded"] = numpy.arange(len(rows)) != LEFT_OUT
        (mini_batch,) = made_alike(policy, dataclasses.replace(data, rows=rows), store)
        engine = [micro_batch.streams.get("rollout_log_probs") for micro_batch in mini_batch]
        given = [{"old_log_probs": values} for values in engine if values is not None]
        assert policy.credit is not None, "the default records"
        plain = credit._marked
        if sabotage:
            credit._marked = chunks_swapped
        policy.credit.watch(mini_batch, UPDATE)
        policy.update(mini_batch, given)
        credit._marked = plain
        results.append([base64.b64encode(frame).decode() for frame in policy.credit.collect()])
        assert policy.credit.collect() == [], "nothing is left for the next step"
        parallel_state.destroy_model_parallel()
    platform.stop_process_group()
    return results


def chunks_swapped(layout: Any, rows: Any, marked: Any = credit._marked) -> Any:
    """As if a context-parallel rank's second chunk came first: each position is still there once."""
    for place, positions, where in marked(layout, rows):
        yield place, positions, numpy.roll(where, len(where) // 2)
