"""Compare a whole update with FIPO's loss and one with DAPO's on the embedded model. They may differ by at most 2 %.

    python -m benchmarks.update

Both policies are in one process and alternate (A B B A …), so that a change of the machine's speed affects both. A
small model is the hard case: the larger the model, the smaller the loss's share.
"""

import functools
import os
import statistics

import torch

from benchmarks.measure import machine, once, seconds
from megatron_fipo.algorithm.losses import LossInputs, policy_loss
from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config, FutureKLConfig
from megatron_fipo.config.configure import load_config
from megatron_fipo.policy import platform
from megatron_fipo.rollout.plain_batch import Made, plain_batch

SEQUENCES, PROMPT, RESPONSE = 16, 16, 496
PAIRS = 20


def make_batch(vocabulary: int) -> Made:
    """Make random tokens. The time does not depend on their values."""
    return plain_batch(
        streams={
            "token_ids": [torch.randint(3, vocabulary, (PROMPT + RESPONSE,)) for _ in range(SEQUENCES)],
            "rollout_log_probs": [-torch.rand(PROMPT + RESPONSE) for _ in range(SEQUENCES)],
        },
        prompt_lengths=[PROMPT] * SEQUENCES,
        advantages=torch.randn(SEQUENCES).tolist(),
    )


def configuration(algorithm: str) -> Config:
    """Return the embedded run's configuration on one process."""
    return load_config([f"algorithm={algorithm}", "parallel=single", "parallel.micro_batch_tokens=2048"])


def loss_seconds(config: Config) -> float:
    """Return the seconds of the loss alone, forward and backward, for the same number of tokens in one micro-batch."""
    old = -torch.rand(SEQUENCES, RESPONSE)
    log_probs = (old + 0.05 * torch.randn_like(old)).requires_grad_()
    mask, advantages = torch.ones_like(old, dtype=torch.bool), torch.randn(SEQUENCES, 1)
    streams = {"old_log_probs": old, "rollout_log_probs": old}
    inputs = LossInputs(log_probs, streams, advantages, mask, mask.sum(1))
    return seconds(lambda: policy_loss(inputs, config.algorithm)[0].backward())


def main() -> None:
    """Print the comparison."""
    platform.install()
    # Imported here, since the platform has to be set up before Megatron-Core is imported.
    from megatron_fipo.models.model_config import read_architecture
    from megatron_fipo.policy.feed import made_alike
    from megatron_fipo.policy.model import start_model_parallel
    from megatron_fipo.policy.update import Policy

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    platform.start_process_group(60)
    configs = {name: configuration(name) for name in ("fipo", "dapo")}
    assert isinstance(configs["fipo"].algorithm.future_kl, FutureKLConfig)
    start_model_parallel(configs["fipo"].parallel, 0)
    model_dir = resolve_embedded(configs["fipo"].model.path)
    model_config = read_architecture(model_dir)
    batch = make_batch(model_config.vocab_size)
    policies = {name: Policy(config, model_config, str(model_dir), 1000) for name, config in configs.items()}
    mini_batches = {name: made_alike(policy, *batch)[0] for name, policy in policies.items()}
    old = {name: policy.log_probs([mini_batches[name]]).streams[0] for name, policy in policies.items()}
    for name, policy in policies.items():
        policy.update(mini_batches[name], old[name])
    times: dict[str, list[float]] = {"fipo": [], "dapo": []}
    for pair in range(PAIRS):
        for name in ("fipo", "dapo") if pair % 2 else ("dapo", "fipo"):
            times[name].append(once(functools.partial(policies[name].update, mini_batches[name], old[name])))
    ratios = [fipo / dapo for fipo, dapo in zip(times["fipo"], times["dapo"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    dapo = statistics.median(times["dapo"])
    alone = {name: loss_seconds(config) for name, config in configs.items()}
    print(f"{machine()}; {SEQUENCES} sequences of {PROMPT + RESPONSE} tokens, {PAIRS} pairs\n")
    print("| | FIPO | DAPO | FIPO / DAPO (quartiles) |")
    print("|---|---|---|---|")
    print(
        f"| whole update, s | {statistics.median(times['fipo']):.3f} | {dapo:.3f} "
        f"| {middle:.4f} ({low:.4f} … {high:.4f}) |"
    )
    extra = 100 * (alone["fipo"] - alone["dapo"]) / dapo
    print(
        f"| loss alone, ms | {1e3 * alone['fipo']:.2f} | {1e3 * alone['dapo']:.2f} "
        f"| the difference is {extra:.2f} % of an update |"
    )
    platform.stop_process_group()


if __name__ == "__main__":
    main()
