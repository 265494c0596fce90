"""From a command line to the planner's tables."""

import argparse
import sys
import time

from rich.console import Console
from rich.table import Table

from megatron_fipo.config import Config
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.planning.search import Plan, as_configured, plan_ways
from megatron_fipo.planning.shown import assumptions, busy_warning, table
from megatron_fipo.planning.ways import overrides
from megatron_fipo.simulation.command import settings_of
from megatron_fipo.simulation.outcome import Outcome
from megatron_fipo.simulation.settings import Settings
from megatron_fipo.sizing.estimate import model_directory
from megatron_fipo.sizing.layouts import Layout, layouts
from megatron_fipo.sizing.memory import GIB

_SIZES = ("tensor", "pipeline", "chunks", "context", "expert", "data")
"""Columns, named as the keys of the section parallel. "chunks" is virtual_pipeline: the chunks per stage; "expert" has
expert_tensor after a ×."""
_SHOWN = 5
_SHOWN_TOO_LARGE = 3


def show(options: argparse.Namespace, begun: float) -> None:
    """Plan and print. `begun` is the clock's time at the command's start. ConfigError if nothing fits."""
    config = load_config(options.overrides)
    check(config, local=False)
    settings = settings_of(options, config)
    model_config = read_architecture(model_directory(config.model.path)[0])
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    cluster = config.cluster
    nodes = cluster.trainer_nodes + cluster.rollout_nodes
    console.print(
        f"{config.run.name} on {nodes:,} node{'' if nodes == 1 else 's'} of {cluster.gpus_per_node} × "
        f"{config.hardware.name}: {assumptions(settings)}",
        soft_wrap=True,
    )
    found = plan_ways(config, model_config, settings)
    own = _own(console, config, model_config, settings)
    _print_ways(console, config, found, own)
    if not found.proposals:
        _print_layouts(console, layouts(config, model_config))
        raise ConfigError("cluster", "no layout of these nodes fits", "more nodes, or GPUs with more memory")
    _print_layouts(console, layouts(found.proposals[0].config, model_config))
    console.print(f"planned in {time.monotonic() - begun:.1f} s")


def _own(console: Console, config: Config, model_config: ModelConfig, settings: Settings) -> Outcome | None:
    """The run as it is configured; None if that cannot be, which is said."""
    try:
        return as_configured(config, model_config, settings)
    except ConfigError as error:
        console.print(f"as configured: not possible: {error}", soft_wrap=True)
        return None


def _print_ways(console: Console, config: Config, found: Plan, own: Outcome | None) -> None:
    if found.proposals or own is not None:
        console.print(table(found, own))
    for way, reason in found.refused.items():
        console.print(f"{way}: not possible: {reason}", soft_wrap=True)
    if not found.proposals:
        return
    best = found.proposals[0]
    if warning := busy_warning(best.outcome):
        console.print(f"warning: {warning}", soft_wrap=True)
    changes = overrides(config, best.config) or "nothing: the run is configured so"
    console.print(f"the fastest, {best.way}, is had by adding to the command line:\n  {changes}", soft_wrap=True)


def _print_layouts(console: Console, ranked: list[Layout]) -> None:
    fitting = [layout for layout in ranked if layout.estimate.fits]
    too_large = [layout for layout in ranked if not layout.estimate.fits]
    if fitting:
        title = f"Layouts of its trainer at half the maximum length, fastest first: {len(fitting)} of {len(ranked)} fit"
        console.print(_layout_table(title, "what takes longest", fitting[:_SHOWN]))
    if too_large:
        title = "The fastest layouts that do not fit"
        console.print(_layout_table(title, "why not", too_large[:_SHOWN_TOO_LARGE]))


def _layout_table(title: str, why: str, chosen: list[Layout]) -> Table:
    made = Table(title=title, title_justify="left")
    for name in ("trainer s per step", "peak GiB", *_SIZES, "recompute"):
        made.add_column(name, justify="right")
    made.add_column(why)
    for layout in chosen:
        parallel = layout.config.parallel
        made.add_row(
            f"{layout.estimate.time.trainer:,.0f}",
            f"{layout.estimate.fullest.total / GIB:.1f}",
            *(str(n) for n in (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline or "-", parallel.context)),
            f"{parallel.expert}" + (f" × {parallel.expert_tensor}" if parallel.expert_tensor > 1 else ""),
            str(layout.estimate.data_parallel_size),
            layout.config.model.recompute,
            layout.reason(),
        )
    return made
