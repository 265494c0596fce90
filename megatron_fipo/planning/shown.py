"""What planner and preflight say of ways to spread a run."""

from rich.table import Table

from megatron_fipo.config import Config
from megatron_fipo.planning.search import Plan, Proposal
from megatron_fipo.planning.ways import overrides
from megatron_fipo.simulation.outcome import Outcome
from megatron_fipo.simulation.settings import Settings
from megatron_fipo.sizing.memory import GIB

CLEARLY_FASTER = 1.1
"""How many times as fast another way has to be for preflight to name it: the estimate is no more exact."""
_BUSY = 0.5
"""Share of a step from which the rollout process is said to be busy."""


def table(found: Plan, own: Outcome | None) -> Table:
    """A row for each way, and one for the run as it is configured, where that can be."""
    made = Table(title="The best of each way, simulated, not measured", title_justify="left")
    made.add_column("way", no_wrap=True)
    headings = ("nodes", "TP × PP/chunks × CP × DP, EP", "recompute", "refilled", "engines", "peak GiB", "step s")
    for name in (*headings, "tokens / s / GPU", "idle: trainer, engines", "lag: mean, max"):
        made.add_column(name, justify="right", no_wrap=name in headings[:2])
    for proposal in found.proposals:
        made.add_row(proposal.way, *_cells(proposal.outcome))
    if own is not None:
        made.add_row("as configured", *_cells(own))
    return made


def assumptions(settings: Settings) -> str:
    """What the simulation takes lengths and verdicts to be."""
    lengths = settings.lengths
    return (
        f"responses of {lengths.mean:,.0f} tokens on average and {lengths.longest:,} at most, "
        f"{settings.rejected:.0%} of groups rejected"
    )


def predicted(outcome: Outcome) -> str:
    """The simulated numbers of one configuration, in a line."""
    idle = (
        f"GPUs idle {max(0.0, outcome.trainer_idle):.0%}"
        if outcome.placement.in_turns
        else f"trainer idle {max(0.0, outcome.trainer_idle):.0%}, engines idle {max(0.0, outcome.engines_idle):.0%}"
    )
    return (
        f"step {_seconds(outcome)} s, {outcome.tokens_per_gpu_s:,.0f} tokens/s/GPU, {idle}, "
        f"lag {outcome.lag_mean:.2f} on average and {outcome.lag_max} at most"
    )


def busy_warning(outcome: Outcome) -> str | None:
    """A line if one rollout process may be too slow for all samples."""
    if outcome.rollout_process_busy < _BUSY:
        return None
    return (
        f"the rollout process beside rank 0 receives samples for {outcome.rollout_process_busy:.0%} of a step, on one "
        "core; above 100 % a step takes longer than simulated"
    )


def faster(config: Config, own: Outcome, found: Plan) -> str | None:
    """A line with the fastest way and its overrides, if it is clearly faster than the run as it is configured."""
    best = found.proposals[0] if found.proposals else None
    if best is None or own.step_s < CLEARLY_FASTER * best.outcome.step_s:
        return None
    return (
        f"{_title(best)} would be {own.step_s / best.outcome.step_s:.2f} times as fast, simulated: "
        f"{predicted(best.outcome)}, with {overrides(config, best.config)}"
    )


def _title(proposal: Proposal) -> str:
    over_sampling = proposal.config.algorithm.filter_groups.over_sampling
    return proposal.way + ("" if over_sampling is None else f", refilled × {over_sampling:g}")


def _cells(outcome: Outcome) -> list[str]:
    config, found = outcome.placement.config, outcome.placement.estimate
    parallel, over_sampling = config.parallel, config.algorithm.filter_groups.over_sampling
    chunks = f"/{parallel.virtual_pipeline}" if parallel.virtual_pipeline else ""
    experts = f", {parallel.expert}" if parallel.expert > 1 else ""
    return [
        outcome.placement.text,
        f"{parallel.tensor} × {parallel.pipeline}{chunks} × {parallel.context} × {found.data_parallel_size}{experts}",
        config.model.recompute,
        "-" if over_sampling is None else f"× {over_sampling:g}",
        f"{outcome.placement.engines} × {config.rollout.tensor_parallel}",
        f"{found.fullest.total / GIB:.1f}",
        _seconds(outcome),
        f"{outcome.tokens_per_gpu_s:,.0f}",
        f"{max(0.0, outcome.trainer_idle):.0%}, {max(0.0, outcome.engines_idle):.0%}",
        f"{outcome.lag_mean:.2f}, {outcome.lag_max}",
    ]


def _seconds(outcome: Outcome) -> str:
    return f"{outcome.step_s:,.0f}" if outcome.step_s >= 100 else f"{outcome.step_s:.3g}"
