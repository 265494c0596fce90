"""Measure what is saved if a step's first update computes its own old log-probs, by pairs of whole steps.

python -m benchmarks.first_update
"""

import contextlib
import os
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import in_pairs, machine
from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config
from megatron_fipo.config.agreement import Limits
from megatron_fipo.config.configure import load_config
from megatron_fipo.policy import platform
from megatron_fipo.rollout.plain_batch import Made, plain_batch

SEQUENCES, PROMPT, VOCABULARY = 128, 6, 38
PAIRS = 13


def make_batch(updates: int) -> Made:
    """Make a step of the quick start's size with this many updates."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPT + 10, PROMPT + 100, (SEQUENCES,), generator=generator).tolist()
    return plain_batch(
        streams={
            "token_ids": [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths],
            "rollout_log_probs": [-torch.rand(length, generator=generator) for length in lengths],
        },
        prompt_lengths=[PROMPT] * SEQUENCES,
        advantages=torch.randn(SEQUENCES, generator=generator).tolist(),
        mini_batch_sizes=[SEQUENCES // updates] * updates,
    )


def start() -> tuple[Config, Path]:
    """Become a process group of one; the quick start's configuration on one rank, and its model's directory."""
    platform.install()
    # Imported here, since the platform has to be set up before Megatron-Core is imported.
    from megatron_fipo.policy.model import start_model_parallel

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    platform.start_process_group(60)
    config = load_config(["parallel=single"])
    start_model_parallel(config.parallel, 0)
    return config, resolve_embedded("embedded:tiny")


def main() -> None:
    """Print the table."""
    config, model = start()
    from megatron_fipo.models.model_config import read_architecture
    from megatron_fipo.policy.agreement import AgreementCheck
    from megatron_fipo.policy.feed import made_alike
    from megatron_fipo.policy.step import StepData, train_step
    from megatron_fipo.policy.update import Policy

    def step(policy: Policy, made: Made, from_update: bool) -> None:
        check = AgreementCheck(Limits(warn=1e9, stop=1e9))
        if from_update:
            check.judge(
                {"log_prob_diff_mean": 0.0}
            )  # in the first step of a process, a separate pass computes all log-probs
        data = StepData([], made_alike(policy, *made))
        train_step(policy, data, check, lambda _: contextlib.nullcontext(), lambda _: None)

    print(f"{machine()}; {SEQUENCES} sequences, {PAIRS - 1} pairs\n")
    print(
        "| updates per step | a pass for all, s | first mini-batch from its update, s | ratio (quartiles) |"
        "\n|---|---|---|---|"
    )
    for updates in (1, 4, 16):
        policy, batch = Policy(config, read_architecture(model), str(model), updates=1000), make_batch(updates)
        print(f"| {updates} | {in_pairs(partial(step, policy, batch), PAIRS)} |")
    platform.stop_process_group()


if __name__ == "__main__":
    main()
