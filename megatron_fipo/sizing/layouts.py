"""Every layout of the trainer over the nodes that it has."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.sizing.estimate import Estimate, estimate
from megatron_fipo.sizing.memory import GIB


@dataclass
class Layout:
    """One layout of the run over its nodes."""

    config: Config
    estimate: Estimate

    def reason(self) -> str:
        """What takes most of the trainer's time, or by how much it is too large."""
        time, full = self.estimate.time, self.estimate.fullest
        if not self.estimate.fits:
            over = (full.total - self.estimate.usable_bytes) / GIB
            sizes = {
                name: getattr(full, name) for name in ("activations", "optimizer", "gradients", "weights", "logits")
            }
            most = max(sizes, key=sizes.__getitem__)
            return f"stage {full.stage} is {over:.1f} GiB too large, mostly {most}"
        phases = {"updates": time.update, "log-probs": time.log_probs, "weights": time.weights, "copies": time.turns}
        longest = max(phases, key=phases.__getitem__)
        text = f"{phases[longest] / time.trainer:.0%} {longest}"
        if time.bubble > 0.1:
            text += f", bubble {time.bubble:.0%}"
        if self.config.model.recompute == "full":
            text += ", recomputes every layer"
        return text


def layouts(config: Config, model_config: ModelConfig) -> list[Layout]:
    """Return every layout of the trainer on cluster.trainer_nodes. Those that fit come first, fastest trainer first."""
    found = []
    for candidate in _candidates(config):
        try:
            found.append(Layout(candidate, estimate(candidate, model_config)))
        except ConfigError:
            continue
    return sorted(found, key=lambda layout: (not layout.estimate.fits, layout.estimate.time.trainer))


def _candidates(config: Config) -> Iterator[Config]:
    cluster, algorithm = config.cluster, config.algorithm
    gpus = cluster.trainer_nodes * cluster.gpus_per_node
    sequences = algorithm.mini_batch_prompts * algorithm.samples_per_prompt
    powers = [1, 2, 4, 8, 16]
    for tensor, pipeline, chunks, context, recompute in itertools.product(
        powers, powers, (None, 2, 4), (1, 2, 4), ("selective", "full")
    ):
        # Tensor parallelism across nodes is never worth it, and chunks need pipeline stages.
        if tensor > cluster.gpus_per_node or (chunks and pipeline == 1):
            continue
        replica = tensor * pipeline * context
        if gpus % replica or gpus // replica > sequences:
            continue
        candidate = copy.deepcopy(config)
        candidate.parallel.tensor, candidate.parallel.sequence = tensor, tensor > 1
        candidate.parallel.pipeline, candidate.parallel.virtual_pipeline = pipeline, chunks
        candidate.parallel.context, candidate.parallel.data = context, None
        candidate.model.recompute = recompute
        yield candidate
