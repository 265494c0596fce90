"""Ways to deal groups to engines, compared in simulated runs of the 32B recipe: `python -m benchmarks.dispatch`.

First seconds of a step, and tokens prefilled again per sampled one, by how many samples an engine is asked for at a
time. Then seconds of a step by which group is next and who gets it, for shares of the lengths' variance that lie
between problems. The expected length of a group is the mean of as many earlier responses to its problem; with
foresight, of its own.
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
from megatron_fipo.simulation.scenarios import MODES, configured, parts
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


def play(config: Config, model_config: ModelConfig, settings: Settings, name: str, dispatch: Dispatch) -> list[Step]:
    """The steps of the mode `name`."""
    mode = next(mode for mode in MODES if mode.name == name)
    made = parts(mode, configured(config, model_config, mode), model_config, settings)
    return Simulation(replace(made, dispatch=dispatch), settings).play().steps


def alike_cells(
    config: Config, model_config: ModelConfig, settings: Settings, name: str, dispatch: Dispatch
) -> Iterator[str]:
    """Seconds of a step for each of ALIKE."""
    for alike in ALIKE:
        lengths = replace(settings.lengths, alike=alike)
        steps = play(config, model_config, replace(settings, lengths=lengths), name, dispatch)
        yield f"{(steps[-1].end - steps[settings.warm_up - 1].end) / settings.steps:,.0f}"


def memory_rows(config: Config, model_config: ModelConfig, settings: Settings) -> Iterator[str]:
    """Rows of a table: places by max_num_seqs, by the mean length, and by what a sequence holds on average."""
    size, samples = engine_size(config, model_config, settings), config.algorithm.samples_per_prompt
    for way, in_memory in (
        ("rollout.max_num_seqs", math.inf),
        ("the mean length", size.cache_tokens / (settings.prompt + settings.lengths.mean)),
        ("what is held on average", size.cache_tokens / (settings.prompt + settings.lengths.held)),
    ):
        limit = most_samples(size.places, samples, in_memory)
        cells = []
        for name in PLAYED:
            steps = play(config, model_config, settings, name, Dispatch(Place.SAMPLES, limit))
            first, last = steps[settings.warm_up - 1], steps[-1]
            again = (last.engines.again - first.engines.again) / (last.engines.tokens - first.engines.tokens)
            cells.append(f"{(last.end - first.end) / settings.steps:,.0f} ({again:.1%})")
        yield f"| {way} | {limit} | {' | '.join(cells)} |"


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
        print(f"\nMean of {mean:,} tokens; places by\n\n| | samples at a time | {' | '.join(PLAYED)} |", flush=True)
        print("|---" * (2 + len(PLAYED)) + "|", flush=True)
        for row in memory_rows(config, model_config, settings):
            print(row, flush=True)
        for name in PLAYED:
            print(f"\n{name}, mean {mean:,}\n\n| alike | {' | '.join(f'{alike:g}' for alike in ALIKE)} |", flush=True)
            print("|---" * (1 + len(ALIKE)) + "|", flush=True)
            most = asked_for(config, engine_size(config, model_config, settings), settings)
            for way, dispatch in ways(most).items():
                cells = alike_cells(config, model_config, settings, name, dispatch)
                print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
