"""What the ranks of test_local_senders.py run."""

from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy import platform
from megatron_fipo.policy.model import start_model_parallel
from megatron_fipo.policy.update import Policy
from megatron_fipo.weights.everywhere import WholeModel
from megatron_fipo.weights.gather import HeldWeights

BUCKET_BYTES = 40_000


def gather(model_dir: str, parallel: dict[str, Any]) -> list[list[tuple[str, int]]]:
    """By bucket, the names of its tensors with their checksums. `parallel`: keys of the configuration's section."""
    platform.start_process_group(60)
    config = Config()
    config.model.dtype, config.model.layers = "float32", "local"
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    start_model_parallel(config.parallel, seed=0)
    model_config = read_architecture(model_dir)
    policy = Policy(config, model_config, model_dir, updates=1)
    weights = WholeModel(HeldWeights(policy.chunks, model_config, BUCKET_BYTES), platform.device())
    buckets = [weights.gather(index) for index in range(weights.buckets)]
    found = [[(name, b.checksums()[place]) for place, (name, _) in enumerate(b.tensors)] for b in buckets]
    platform.stop_process_group()
    return found
