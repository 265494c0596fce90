"""The command line of simulate: flags for what a configuration does not have, and the configuration's own keys."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_fipo.command_line.arguments import Parser

DESCRIPTION = """How long a run's steps will take, and who waits for whom, simulated. Engines and trainer take the
planner's seconds, or measured ones. The run's own admission and ledger decide what is opened and trained.

One row per mode: rounds as today, a window at k = 0, 1, 2 and 4, and trainer and engines in turns on all GPUs;
with the configured split of nodes, and with the fastest. Keys are the run's; docs/simulate.md says what is counted."""
EPILOG = """examples:
  megatron-fipo simulate experiment=fipo_32b
  megatron-fipo simulate experiment=fipo_32b --mean 3700 --html
  megatron-fipo simulate experiment=fipo_32b cluster.trainer_nodes=1000 cluster.rollout_nodes=1000
  megatron-fipo simulate experiment=fipo_32b --modes rounds,k1 --slow 0.05:2 --hours-between-failures 200
  megatron-fipo simulate --help cluster           what the keys of a section mean
"""
DEFAULT_PAGE = Path("simulation.html")
MODE_NAMES = (
    "rounds",
    "refill",
    "refill-2",
    "k1",
    "k1-2",
    "k2",
    "k2-2",
    "k4",
    "colocated-rounds",
    "colocated-refill-2",
)


def parser() -> Parser:
    """All flags."""
    made = Parser("simulate", DESCRIPTION, EPILOG)
    made.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="GROUP=CHOICE and SECTION.KEY=VALUE, as for train"
    )
    made.add_argument(
        "--modes",
        type=_modes,
        default=MODE_NAMES,
        metavar="NAMES",
        help=f"some of {','.join(MODE_NAMES)} (default all)",
    )
    made.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=DEFAULT_PAGE,
        metavar="FILE",
        help="write a page that shows who works when (default ./simulation.html)",
    )
    add_lengths(made)
    _add_troubles(made)
    _add_measured(made)
    _add_played(made)
    return made


def add_lengths(made: Parser) -> None:
    """What is sampled."""
    lengths = made.add_argument_group("responses and groups")
    lengths.add_argument(
        "--mean",
        type=_number(1),
        metavar="TOKENS",
        help="mean length of a response (default half of rollout.max_response_length)",
    )
    lengths.add_argument(
        "--spread",
        type=_number(0, 5),
        default=0.8,
        metavar="SIGMA",
        help="standard deviation of a length's logarithm; 0: all alike (default %(default)s)",
    )
    lengths.add_argument(
        "--prompt",
        type=_number(0),
        metavar="TOKENS",
        help="length of a prompt (default half of rollout.max_prompt_length)",
    )
    lengths.add_argument(
        "--rejected",
        type=_number(0, 0.95),
        metavar="SHARE",
        help="of groups, by dynamic sampling (default 0.5, or 0 where it is off)",
    )


def _add_troubles(made: Parser) -> None:
    """What goes wrong."""
    troubles = made.add_argument_group("what goes wrong")
    troubles.add_argument(
        "--slow",
        type=_slow,
        default=(0.0, 1.0),
        metavar="SHARE:FACTOR",
        help="share of engines that take FACTOR times longer",
    )
    troubles.add_argument(
        "--hours-between-failures",
        type=_number(0.001),
        metavar="HOURS",
        help="of one engine, on average (default: none fails)",
    )
    troubles.add_argument(
        "--restart-s",
        type=_number(0),
        default=300.0,
        metavar="SECONDS",
        help="until a failed engine is back (default %(default)g)",
    )


def _add_measured(made: Parser) -> None:
    """Seconds that stand in for the planner's."""
    measured = made.add_argument_group("measured seconds, in place of the planner's")
    measured.add_argument(
        "--decode-s", type=_pair, metavar="STEP[:SEQUENCE]", help="of a decoding step, and for each sequence in it"
    )
    measured.add_argument(
        "--log-probs-s", type=_pair, metavar="STEP[:TOKEN]", help="of a step's log-probs, and for each token trained on"
    )
    measured.add_argument(
        "--update-s", type=_pair, metavar="UPDATE[:TOKEN]", help="of an optimizer update, and for each token trained on"
    )
    measured.add_argument("--weights-s", type=_number(0), metavar="SECONDS", help="of a weight update")
    measured.add_argument("--other-s", type=_number(0), default=0.0, metavar="SECONDS", help="of what else a step does")


def _add_played(made: Parser) -> None:
    """How exactly it is played."""
    played = made.add_argument_group("how it is played")
    played.add_argument(
        "--steps", type=_whole(1), default=8, metavar="N", help="steps that are measured (default %(default)s)"
    )
    played.add_argument(
        "--warm-up", type=_whole(1), default=2, metavar="N", help="steps before them (default %(default)s)"
    )
    played.add_argument(
        "--seed", type=_whole(0), default=1, metavar="N", help="of lengths and rejections (default %(default)s)"
    )
    played.add_argument(
        "--samples-at-once",
        type=_whole(16),
        default=2048,
        metavar="N",
        help="samples of a step above which a part of the run is played (default %(default)s)",
    )
    played.add_argument("--whole", action="store_true", help="play all of it, however long that takes")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; flags and keys in any order."""
    return parser().parse_intermixed_args(arguments)


def _number(least: float, most: float = math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not (least <= value <= most and math.isfinite(value)):
            wanted = f"from {least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
            raise argparse.ArgumentTypeError(f"{text} should be {wanted}")
        return value

    read.__name__ = "number"  # as argparse calls it in its refusals
    return read


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} should be {least} or more")
        return value

    read.__name__ = "whole number"
    return read


def _pair(text: str) -> tuple[float, float]:
    first, _, second = text.partition(":")
    try:
        values = float(first), float(second or 0)
    except ValueError:
        values = -1.0, -1.0
    if not all(0 <= value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"{text} should be seconds, such as 0.01 or 0.01:0.0005")
    return values


def _slow(text: str) -> tuple[float, float]:
    try:
        share, factor = (float(part) for part in text.split(":"))
    except ValueError:
        share, factor = -1.0, -1.0
    if not (0 <= share <= 1 and 1 <= factor < math.inf):
        raise argparse.ArgumentTypeError(f"{text} should be a share up to 1 and a factor from 1, such as 0.05:2")
    return share, factor


def _modes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in MODE_NAMES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no mode; there are {', '.join(MODE_NAMES)}")
    return names
