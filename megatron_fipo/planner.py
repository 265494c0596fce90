"""The best ways to spread a run over its nodes: `python -m megatron_fipo.planner experiment=fipo_32b hardware=h200`.

The planner compares trainer and engines on nodes of their own, one after the other or at the same time, and both on all
nodes in turns. It tries every split of the nodes, layout of the trainer and size of an engine, and simulates the best.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from megatron_fipo.command_line.arguments import Parser, exit_code_of
from megatron_fipo.simulation.options import add_lengths, parse

DESCRIPTION = """The best ways to spread a run over cluster.trainer_nodes + cluster.rollout_nodes nodes, simulated:
sampling and training in turns on nodes of their own, at the same time, and in turns on all GPUs. The fastest one's
overrides are printed, to add to the command line. Keys are the run's; docs/cluster.md says what is estimated."""
EPILOG = """examples:
  megatron-fipo planner experiment=fipo_32b hardware=h200
  megatron-fipo planner experiment=fipo_32b --mean 3700
  megatron-fipo planner experiment=fipo_32b cluster.trainer_nodes=1000 cluster.rollout_nodes=1000
  megatron-fipo planner --help cluster            what the keys of a section mean
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan and print; 0, or the exit code of the error."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(typed) and (named := [text for text in typed if not text.startswith("-")]):
        from megatron_fipo.config.explain import explain  # Hydra takes a second, which help does not need

        if all("=" not in text for text in named):
            print(explain(named))
            return 0
    made = Parser("planner", DESCRIPTION, EPILOG)
    made.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="GROUP=CHOICE and SECTION.KEY=VALUE, as for train"
    )
    add_lengths(made)
    options = made.parse_intermixed_args(typed)
    # What the planner does not ask for is as simulate has it, so that both say the same of a run.
    return exit_code_of(plan_run, argparse.Namespace(**vars(parse([])) | vars(options)))


def plan_run(options: argparse.Namespace) -> None:
    """What the command line asks for."""
    begun = time.monotonic()
    from megatron_fipo.planning.command import show  # as above

    show(options, begun)


if __name__ == "__main__":
    sys.exit(main())
