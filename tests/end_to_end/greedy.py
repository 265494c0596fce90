"""What the rank of test_smollm2.py runs: greedy continuations by the Megatron-Core policy, without a cache."""

from megatron_fipo.config import Config, ParallelConfig, PolicySection, RolloutConfig
from megatron_fipo.policy import platform

platform.install()

from megatron_fipo.models.model_config import read_architecture  # noqa: E402
from megatron_fipo.policy.feed import made_alike  # noqa: E402
from megatron_fipo.policy.model import start_model_parallel  # noqa: E402
from megatron_fipo.policy.update import Policy  # noqa: E402
from megatron_fipo.rollout.plain_batch import plain_batch  # noqa: E402


def continue_greedily(model_dir: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The policy's most likely continuation of each prompt, token by token."""
    import torch

    platform.start_process_group(600)
    config = Config(
        model=PolicySection(path=model_dir, dtype="float32"), parallel=ParallelConfig(), rollout=RolloutConfig()
    )
    start_model_parallel(config.parallel, 0)
    policy = Policy(config, read_architecture(model_dir), model_dir, updates=1)
    continued = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(tokens):
            streams = {"token_ids": [torch.tensor([*ids, 0])], "rollout_log_probs": [torch.zeros(len(ids) + 1)]}
            ((micro_batch,),) = made_alike(policy, *plain_batch(streams, [len(ids)], [0.0]))
            with torch.no_grad():
                logits = policy.chunks[0](micro_batch.streams["token_ids"], micro_batch.position_ids, None)
            ids.append(int(logits[0, -1].argmax()))
        continued.append(ids[len(prompt) :])
    platform.stop_process_group()
    return continued
