"""Measure what the records of the credit viewer cost a step, by pairs of whole steps with and without them.

python -m benchmarks.credit_records
"""

import contextlib
import os
import statistics
from dataclasses import replace
from functools import partial

from benchmarks.first_update import SEQUENCES, make_batch
from benchmarks.measure import machine, once
from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.agreement import Limits
from megatron_fipo.config.configure import load_config
from megatron_fipo.policy import platform
from megatron_fipo.rollout.plain_batch import Made

PAIRS, UPDATES = 13, 4


def marked(made: Made, responses: int) -> Made:
    """Return the batch with so many of its sequences recorded, spread evenly."""
    batch, store = made
    rows = batch.rows.copy()
    rows["recorded"][:: len(rows) // responses] = 1
    return replace(batch, rows=rows), store


def main() -> None:
    """Print the table."""
    platform.install()
    # Imported here, since the platform has to be set up before Megatron-Core is imported.
    from megatron_fipo.models.model_config import read_architecture
    from megatron_fipo.policy.agreement import AgreementCheck
    from megatron_fipo.policy.feed import made_alike
    from megatron_fipo.policy.model import start_model_parallel
    from megatron_fipo.policy.step import StepData, train_step
    from megatron_fipo.policy.update import Policy

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    platform.start_process_group(60)
    config, model = load_config(["parallel=single"]), resolve_embedded("embedded:tiny")
    start_model_parallel(config.parallel, 0)
    policy = Policy(config, read_architecture(model), str(model), updates=1000)
    recorder = policy.credit
    assert recorder is not None, "tracking.credit is on by default"

    def step(made: Made, recorded: bool) -> None:
        policy.credit = recorder if recorded else None
        data = StepData([], made_alike(policy, *made))
        check = AgreementCheck(Limits(warn=1e9, stop=1e9))
        train_step(policy, data, check, lambda _: contextlib.nullcontext(), lambda _: None)
        if recorded:
            recorder.collect()

    print(f"{machine()}; {SEQUENCES} sequences, {UPDATES} updates per step, {PAIRS - 1} pairs\n")
    print("| recorded responses | step without, s | step with, s | ratio (quartiles) |\n|---|---|---|---|")
    plain = make_batch(UPDATES)
    for responses in (config.tracking.credit.responses, SEQUENCES):
        batch = marked(plain, responses)
        times: dict[bool, list[float]] = {True: [], False: []}
        for pair in range(PAIRS):
            for recorded in (True, False) if pair % 2 else (False, True):
                times[recorded].append(once(partial(step, batch if recorded else plain, recorded)))
        ratios = [one / other for one, other in zip(times[True][1:], times[False][1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        without, with_records = (statistics.median(times[kind][1:]) for kind in (False, True))
        print(
            f"| {responses} | {without:.3f} | {with_records:.3f} | {middle:.3f} ({low:.3f} … {high:.3f}) |", flush=True
        )
    platform.stop_process_group()


if __name__ == "__main__":
    main()
