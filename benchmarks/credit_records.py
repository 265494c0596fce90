"""Measure what the records of the credit viewer cost a step, by pairs of whole steps with and without them.

python -m benchmarks.credit_records
"""

import contextlib
from dataclasses import replace
from functools import partial

from benchmarks.first_update import SEQUENCES, make_batch, start
from benchmarks.measure import in_pairs, machine
from megatron_fipo.config.agreement import Limits
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
    config, model = start()
    from megatron_fipo.models.model_config import read_architecture
    from megatron_fipo.policy.agreement import AgreementCheck
    from megatron_fipo.policy.feed import made_alike
    from megatron_fipo.policy.step import StepData, train_step
    from megatron_fipo.policy.update import Policy

    policy = Policy(config, read_architecture(model), str(model), updates=1000)
    recorder = policy.credit
    assert recorder is not None, "tracking.credit is on by default"

    plain = make_batch(UPDATES)

    def step(batch: Made, recorded: bool) -> None:
        policy.credit = recorder if recorded else None
        data = StepData([], made_alike(policy, *(batch if recorded else plain)))
        check = AgreementCheck(Limits(warn=1e9, stop=1e9))
        train_step(policy, data, check, lambda _: contextlib.nullcontext(), lambda _: None)
        if recorded:
            recorder.collect()

    print(f"{machine()}; {SEQUENCES} sequences, {UPDATES} updates per step, {PAIRS - 1} pairs\n")
    print("| recorded responses | step without, s | step with, s | ratio (quartiles) |\n|---|---|---|---|")
    for responses in (config.tracking.credit.responses, SEQUENCES):
        batch = marked(plain, responses)
        print(f"| {responses} | {in_pairs(partial(step, batch), PAIRS)} |", flush=True)
    platform.stop_process_group()


if __name__ == "__main__":
    main()
