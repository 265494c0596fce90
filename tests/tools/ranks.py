"""Functions that the tests of the tools run on each rank."""

from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy import checkpoint, platform
from megatron_fipo.policy.model import start_model_parallel
from megatron_fipo.policy.update import Policy


def save_training_checkpoint(model_dir: str, directory: str, tensor: int, pipeline: int) -> str:
    """Build the policy from a Hugging Face directory and save it as a training run does, optimizer state included."""
    platform.start_process_group(60)
    config = Config()
    config.model.dtype = "float32"
    config.optimizer.lr = 0.0
    config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
    start_model_parallel(config.parallel, seed=0)
    policy = Policy(config, read_architecture(model_dir), model_dir, updates=1)
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    policy.optimizer.step()  # at rate zero: the optimizer has state then, and the weights are as they were
    saved = checkpoint.start_saving(
        policy, Path(directory), step=3, trainer_state={}, keep=0, model_dir=Path(model_dir)
    ).finish()
    platform.stop_process_group()
    return str(saved)
