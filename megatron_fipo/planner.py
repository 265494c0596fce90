"""Rank the fastest layouts that fit: `python -m megatron_fipo.planner experiment=fipo_32b hardware=h200`.

The planner tries every layout of the configured number of nodes (cluster.trainer_nodes + cluster.rollout_nodes). It
estimates memory and time as preflight does. It prints the best layouts with what limits each of them, and the fastest
layouts that do not fit.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_fipo.config import Config
from megatron_fipo.config.configure import run_with_config
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.sizing.estimate import Estimate, estimate, model_directory, trainer_world_size
from megatron_fipo.sizing.memory import GIB

USAGE = """usage: megatron-fipo planner [GROUP=CHOICE ...] [SECTION.KEY=VALUE ...]

The fastest layouts of a run on as many nodes as cluster.trainer_nodes + cluster.rollout_nodes, as overrides to copy.

  hardware=h200                 the GPUs: a100, h100, h200, gh200, b200, gb200
  cluster.gpus_per_node=4       GPUs per node

examples:
  megatron-fipo planner experiment=fipo_32b hardware=h200
  megatron-fipo planner --help cluster            what the keys of a section mean

docs/cluster.md explains the estimate."""
_SIZES = ("tensor", "pipeline", "chunks", "context", "expert", "data")
"""Columns, named as the keys of the section parallel. "chunks" is virtual_pipeline: the chunks per stage; "expert" has
expert_tensor after a ×."""
_SHOWN = 10
_SHOWN_TOO_LARGE = 3


@dataclass
class Layout:
    """One layout of the run over its nodes."""

    config: Config
    estimate: Estimate
    has_experts: bool = False

    def overrides(self) -> str:
        """The overrides that choose it."""
        parallel = self.config.parallel
        chunks = "null" if parallel.virtual_pipeline is None else parallel.virtual_pipeline
        return (
            f"parallel.tensor={parallel.tensor} parallel.sequence={str(parallel.sequence).lower()} "
            f"parallel.pipeline={parallel.pipeline} parallel.virtual_pipeline={chunks} "
            f"parallel.context={parallel.context} "
            f"{self._expert_overrides()}model.recompute={self.config.model.recompute} "
            f"cluster.trainer_nodes={self.config.cluster.trainer_nodes} "
            f"cluster.rollout_nodes={self.config.cluster.rollout_nodes}"
        )

    def _expert_overrides(self) -> str:
        parallel = self.config.parallel
        if not self.has_experts:
            return ""
        return f"parallel.expert={parallel.expert} parallel.expert_tensor={parallel.expert_tensor} "

    def reason(self) -> str:
        """What takes most of its time, or by how much it is too large."""
        time, full = self.estimate.time, self.estimate.fullest
        if not self.estimate.fits:
            over = (full.total - self.estimate.usable_bytes) / GIB
            sizes = {
                name: getattr(full, name) for name in ("activations", "optimizer", "gradients", "weights", "logits")
            }
            most = max(sizes, key=sizes.__getitem__)
            return f"stage {full.stage} is {over:.1f} GiB too large, mostly {most}"
        phases = {"sampling": time.sample, "updates": time.update, "log-probs": time.log_probs, "weights": time.weights}
        longest = max(phases, key=phases.__getitem__)
        text = f"{phases[longest] / time.total:.0%} {longest}"
        if time.bubble > 0.1:
            text += f", bubble {time.bubble:.0%}"
        if self.config.model.recompute == "full":
            text += ", recomputes every layer"
        return text


def layouts(config: Config, model_config: ModelConfig) -> list[Layout]:
    """Return every layout that is possible for the model and the nodes. Layouts that fit come first, fastest first."""
    found = []
    for candidate in _candidates(config):
        for expert, expert_tensor in _expert_sizes(candidate, model_config):
            # estimate() keeps nothing of a configuration, and most of them do not divide the model.
            candidate.parallel.expert, candidate.parallel.expert_tensor = expert, expert_tensor
            try:
                result = estimate(candidate, model_config)
            except ConfigError:
                continue
            found.append(Layout(copy.deepcopy(candidate), result, model_config.experts is not None))
    return sorted(found, key=lambda layout: (not layout.estimate.fits, layout.estimate.time.total))


def _candidates(config: Config) -> Iterator[Config]:
    cluster = config.cluster
    nodes = cluster.trainer_nodes + cluster.rollout_nodes
    splits = [(n, nodes - n) for n in range(1, nodes)] if cluster.rollout_nodes else [(cluster.trainer_nodes, 0)]
    powers = [1, 2, 4, 8, 16]
    for (trainer, rollout), tensor, pipeline, chunks, context, recompute in itertools.product(
        splits, powers, powers, (None, 2, 4), (1, 2, 4), ("selective", "full")
    ):
        # Tensor parallelism across nodes is never worth it, and chunks need pipeline stages.
        if tensor > cluster.gpus_per_node or (chunks and pipeline == 1):
            continue
        candidate = copy.deepcopy(config)
        candidate.cluster.trainer_nodes, candidate.cluster.rollout_nodes = trainer, rollout
        candidate.parallel.tensor, candidate.parallel.sequence = tensor, tensor > 1
        candidate.parallel.pipeline, candidate.parallel.virtual_pipeline = pipeline, chunks
        candidate.parallel.context, candidate.parallel.data = context, None
        candidate.model.recompute = recompute
        yield candidate


def _expert_sizes(candidate: Config, model_config: ModelConfig) -> Iterator[tuple[int, int]]:
    """Yield expert-parallel sizes that divide the ranks of a stage, each with whole experts, and with cut ones."""
    parallel, experts = candidate.parallel, model_config.experts
    if experts is None:
        yield 1, 1
        return
    stage = trainer_world_size(candidate) // parallel.pipeline
    for expert in (size for size in range(1, experts.number + 1) if experts.number % size == 0):
        for expert_tensor in sorted({1, parallel.tensor}):
            if stage % (expert * expert_tensor) == 0:
                yield expert, expert_tensor


def main(config: Config) -> None:
    """Rank the layouts and print them."""
    directory, _ = model_directory(config.model.path)
    ranked = layouts(config, read_architecture(directory))
    fitting = [layout for layout in ranked if layout.estimate.fits]
    too_large = [layout for layout in ranked if not layout.estimate.fits]
    console = Console(width=160)
    nodes = config.cluster.trainer_nodes + config.cluster.rollout_nodes
    console.print(
        f"{config.run.name} on {nodes} node{'' if nodes == 1 else 's'} of {config.cluster.gpus_per_node} × "
        f"{config.hardware.name}: {len(fitting)} of {len(ranked)} layouts fit"
    )
    if fitting:
        console.print(_table("The fastest layouts that fit", "what takes longest", fitting[:_SHOWN]))
        console.print(f"the first one, for a command line:\n  {fitting[0].overrides()}", soft_wrap=True)
    if too_large:
        console.print(_table("The fastest layouts that do not fit", "why not", too_large[:_SHOWN_TOO_LARGE]))
    if not fitting:
        raise ConfigError("cluster", "no layout of these nodes fits", "more nodes, or GPUs with more memory")


def _table(title: str, why: str, chosen: list[Layout]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("s per step", "peak GiB", *_SIZES, "recompute", "trainer + rollout nodes"):
        table.add_column(name, justify="right")
    table.add_column(why)
    for layout in chosen:
        parallel, cluster = layout.config.parallel, layout.config.cluster
        table.add_row(
            f"{layout.estimate.time.total:.0f}",
            f"{layout.estimate.fullest.total / GIB:.1f}",
            *(str(n) for n in (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline or "-", parallel.context)),
            f"{parallel.expert}" + (f" × {parallel.expert_tensor}" if parallel.expert_tensor > 1 else ""),
            str(layout.estimate.data_parallel_size),
            layout.config.model.recompute,
            f"{cluster.trainer_nodes} + {cluster.rollout_nodes}",
            layout.reason(),
        )
    return table


if __name__ == "__main__":
    run_with_config(main, local=False, usage=USAGE)
