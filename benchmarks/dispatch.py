"""Ways to deal groups to engines, compared in simulated runs of the 32B recipe: `python -m benchmarks.dispatch`.

First seconds of a step, tokens prefilled again per sampled one, and how many samples an engine is asked for at a time,
by what decides on that. Then seconds of a step by which group is next and who gets it, for shares of the lengths'
variance that lie between problems. The expected length of a group is the mean of as many earlier responses to its
problem; with foresight, of its own.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.rollout.loads import most_samples
from megatron_fipo.simulation.command import settings_of
from megatron_fipo.simulation.costs import asked_for, engine_size
from megatron_fipo.simulation.fleet import Dispatch, Place
from megatron_fipo.simulation.options import parse
from megatron_fipo.simulation.run import Simulation, Step
from megatron_fipo.simulation.scenarios import MODES, Mode, Placement, configured, parts
from megatron_fipo.simulation.settings import Settings
from megatron_fipo.sizing.estimate import model_directory

MEANS = (3_700, 10_000)
ALIKE = (0.0, 0.3, 0.6, 0.9)
PLAYED = ("rounds", "refill-2", "colocated-rounds", "k1", "k1-2")
_UNLIMITED = 10**9


def ways(most: int) -> dict[str, Dispatch]:
    """What is compared, for engines that are asked for so many samples at a time."""
    return {
        "round robin": Dispatch(Place.TURNS, _UNLIMITED),
        "fewest samples": Dispatch(Place.SAMPLES, most),
        "fewest tokens": Dispatch(Place.TOKENS, most),
        "longest first, fewest samples": Dispatch(Place.SAMPLES, most, longest_first=True),
        "longest first, with foresight": Dispatch(Place.SAMPLES, most, longest_first=True, foresight=True),
    }


def placed(config: Config, model_config: ModelConfig, name: str) -> tuple[Mode, Placement]:
    """The mode `name`, and where the configuration has it."""
    mode = next(mode for mode in MODES if mode.name == name)
    return mode, configured(config, model_config, mode)


def play(
    where: tuple[Mode, Placement], model_config: ModelConfig, settings: Settings, dispatch: Dispatch
) -> list[Step]:
    """The steps of a mode."""
    return Simulation(replace(parts(*where, model_config, settings), dispatch=dispatch), settings).play().steps


def alike_rows(config: Config, model_config: ModelConfig, settings: Settings, name: str) -> Iterator[str]:
    """Rows of a table: seconds of a step by who is next and who gets it, for each of ALIKE."""
    where = placed(config, model_config, name)
    size = engine_size(where[1].config, model_config, settings)
    for way, dispatch in ways(asked_for(config, size, settings)).items():
        cells = []
        for alike in ALIKE:
            lengths = replace(settings.lengths, alike=alike)
            steps = play(where, model_config, replace(settings, lengths=lengths), dispatch)
            cells.append(f"{(steps[-1].end - steps[settings.warm_up - 1].end) / settings.steps:,.0f}")
        yield f"| {way} | {' | '.join(cells)} |"


def memory_rows(config: Config, model_config: ModelConfig, settings: Settings) -> Iterator[str]:
    """Rows of a table: places by max_num_seqs, by the mean length, and by what a sequence holds on average."""
    held = {
        "rollout.max_num_seqs": 0.0,
        "the mean length": settings.prompt + settings.lengths.mean,
        "what is held on average": settings.prompt + settings.lengths.held,
    }
    for way, tokens in held.items():
        cells = []
        for name in PLAYED:
            where = placed(config, model_config, name)
            size = engine_size(where[1].config, model_config, settings)
            in_memory = size.cache_tokens / tokens if tokens else math.inf
            most = most_samples(size.places, config.algorithm.samples_per_prompt, in_memory)
            steps = play(where, model_config, settings, Dispatch(Place.SAMPLES, most))
            first, last = steps[settings.warm_up - 1], steps[-1]
            again = (last.engines.again - first.engines.again) / (last.engines.tokens - first.engines.tokens)
            cells.append(f"{(last.end - first.end) / settings.steps:,.0f} ({again:.1%}, {most})")
        yield f"| {way} | {' | '.join(cells)} |"


def main() -> None:
    """Print tables in Markdown."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--steps", type=int, default=8, help="steps that are measured (default %(default)s)")
    made.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of the run (default experiment=fipo_32b)")
    given = made.parse_args()
    for mean in MEANS:
        options = parse([*(given.keys or ["experiment=fipo_32b"]), "--steps", str(given.steps), "--mean", str(mean)])
        config = load_config(options.overrides)
        model_config = read_architecture(model_directory(config.model.path)[0])
        settings = settings_of(options, config)
        print(f"\nMean of {mean:,} tokens; places by\n\n| | {' | '.join(PLAYED)} |", flush=True)
        print("|---" * (1 + len(PLAYED)) + "|", flush=True)
        for row in memory_rows(config, model_config, settings):
            print(row, flush=True)
        for name in PLAYED:
            print(f"\n{name}, mean {mean:,}\n\n| alike | {' | '.join(f'{alike:g}' for alike in ALIKE)} |", flush=True)
            print("|---" * (1 + len(ALIKE)) + "|", flush=True)
            for row in alike_rows(config, model_config, settings, name):
                print(row, flush=True)


if __name__ == "__main__":
    main()
