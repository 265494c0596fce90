"""From a command line to a table and a page."""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from megatron_fipo.config import Config
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError
from megatron_fipo.files import write_atomically
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.simulation.lengths import Lengths
from megatron_fipo.simulation.outcome import Outcome, best_split, simulate
from megatron_fipo.simulation.scenarios import MODES, Mode, configured
from megatron_fipo.simulation.settings import Measured, Settings, Troubles
from megatron_fipo.simulation.table import table
from megatron_fipo.simulation.timeline import timeline_page
from megatron_fipo.sizing.estimate import model_directory, trainer_world_size
from megatron_fipo.sizing.timing import KEPT_SHARE, MEAN_SHARE


def play(options: argparse.Namespace, begun: float) -> None:
    """Simulate and show. `begun` is the clock's time at the command's start."""
    config = load_config(options.overrides)
    check(config, world_size=trainer_world_size(config), local=False)
    settings = settings_of(options, config)
    model_config = read_architecture(model_directory(config.model.path)[0])
    outcomes = all_outcomes(config, model_config, settings, options.modes)
    today = outcomes[0]
    shown = [outcome for outcome in outcomes if outcome.mode.name in options.modes]
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_heading(config, settings, today), soft_wrap=True, highlight=False)
    console.print(table(shown, today))
    if options.html is not None:
        write_page(options.html, config, shown, today)
        console.print(f"written to {options.html}", soft_wrap=True, highlight=False)
    console.print(f"simulated in {time.monotonic() - begun:.1f} s", highlight=False)


def settings_of(options: argparse.Namespace, config: Config) -> Settings:
    """What is played. ConfigError where options and configuration do not go together."""
    rollout = config.rollout
    mean = MEAN_SHARE * rollout.max_response_length if options.mean is None else options.mean
    if mean > rollout.max_response_length:
        raise ConfigError(
            "--mean",
            f"{mean:g} tokens are more than rollout.max_response_length={rollout.max_response_length}",
            "a smaller mean, or longer responses",
        )
    filters = config.algorithm.filter_groups.enable
    if options.rejected and not filters:
        raise ConfigError(
            "--rejected", "algorithm.filter_groups.enable=false rejects no group", "leave it out, or filter groups"
        )
    rejected = (1 - KEPT_SHARE if filters else 0.0) if options.rejected is None else options.rejected
    slow_share, slow_factor = options.slow
    return Settings(
        lengths=Lengths(mean, options.spread, rollout.max_response_length),
        prompt=MEAN_SHARE * rollout.max_prompt_length if options.prompt is None else options.prompt,
        rejected=rejected,
        steps=options.steps,
        warm_up=options.warm_up,
        seed=options.seed,
        samples_at_once=None if options.whole else options.samples_at_once,
        measured=Measured(options.decode_s, options.log_probs_s, options.update_s, options.weights_s, options.other_s),
        troubles=Troubles(slow_share, slow_factor, options.hours_between_failures, options.restart_s),
    )


def all_outcomes(
    config: Config, model_config: ModelConfig, settings: Settings, names: tuple[str, ...]
) -> list[Outcome]:
    """Today's mode as it is configured first, which others are compared with; then each mode, configured and best."""
    today = MODES[0]
    outcomes = [simulate(today, configured(config, model_config, today), model_config, settings)]
    for mode in MODES:
        if mode.name not in names or not _can_be(mode, config):
            continue
        own = (
            outcomes[0]
            if mode is today
            else simulate(mode, configured(config, model_config, mode), model_config, settings)
        )
        best = None if mode.in_turns else best_split(mode, config, model_config, settings)
        outcomes += [own] * (mode is not today) + ([best] if best and best.placement.text != own.placement.text else [])
    return outcomes


def _can_be(mode: Mode, config: Config) -> bool:
    """Nothing overlaps where trainer and engines share GPUs."""
    return not (config.rollout.shared_gpu and mode.steps_ahead)


def _heading(config: Config, settings: Settings, today: Outcome) -> str:
    lengths, algorithm = settings.lengths, config.algorithm
    seconds = (
        "measured seconds" if settings.measured != Measured() else f"the planner's costs of {config.hardware.name}"
    )
    return (
        f"{config.run.name} on {today.placement.gpus:,} GPUs, {seconds}: {algorithm.prompts_per_step} prompts × "
        f"{algorithm.samples_per_prompt} samples, responses of {lengths.mean:,.0f} tokens on average and "
        f"{lengths.longest:,} at most (spread {lengths.spread:g}), {settings.rejected:.0%} of groups rejected"
    )


def write_page(path: Path, config: Config, outcomes: list[Outcome], today: Outcome) -> None:
    """Write the timelines. ConfigError if that cannot be."""
    text = timeline_page(config, outcomes, today)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError("--html", f"{path} cannot be written: {error.strerror}", "another file") from error
