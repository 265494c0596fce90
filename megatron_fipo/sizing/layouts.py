"""Every layout of the trainer over the nodes that it has."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.config import Config, with_values
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
    for dense in _candidates(config):
        for expert, expert_tensor in _expert_sizes(dense, model_config):
            candidate = with_values(dense, {"parallel.expert": expert, "parallel.expert_tensor": expert_tensor})
            try:
                result = estimate(candidate, model_config)
            except ConfigError:
                continue
            found.append(Layout(candidate, result))
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
        values = {
            "parallel.tensor": tensor,
            "parallel.sequence": tensor > 1,
            "parallel.pipeline": pipeline,
            "parallel.virtual_pipeline": chunks,
            "parallel.context": context,
            "parallel.data": None,
            "model.recompute": recompute,
        }
        yield with_values(config, values)


def _expert_sizes(candidate: Config, model_config: ModelConfig) -> Iterator[tuple[int, int]]:
    """Yield expert-parallel sizes that divide the ranks of a stage, each with whole experts, and with cut ones."""
    parallel, experts = candidate.parallel, model_config.experts
    if experts is None:
        yield 1, 1
        return
    stage = candidate.cluster.trainer_nodes * candidate.cluster.gpus_per_node // parallel.pipeline
    for expert in (size for size in range(1, experts.number + 1) if experts.number % size == 0):
        for expert_tensor in sorted({1, parallel.tensor}):
            if stage % (expert * expert_tensor) == 0:
                yield expert, expert_tensor
