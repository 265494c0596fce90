"""How long a run's steps will take, and who waits for whom: `python -m megatron_fipo.simulate experiment=fipo_32b`.

Plays the configured run in made-up time, in each mode of sampling and training. No torch, no GPU, no weights.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from megatron_fipo.command_line.arguments import exit_code_of
from megatron_fipo.simulation.options import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print, and write the page; 0, or the exit code of the error."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(typed) and (named := [text for text in typed if not text.startswith("-")]):
        from megatron_fipo.config.explain import explain  # Hydra takes a second, which help does not need

        if all("=" not in text for text in named):
            print(explain(named))
            return 0
    return exit_code_of(simulate_run, parse(typed))


def simulate_run(options: argparse.Namespace) -> None:
    """What the command line asks for."""
    begun = time.monotonic()
    from megatron_fipo.simulation.command import play  # as above

    play(options, begun)


if __name__ == "__main__":
    sys.exit(main())
