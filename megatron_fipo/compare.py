"""Compare runs: `megatron-fipo compare RUN RUN ...` (or a sweep's directory).

Runs that differ only in their seed form a group. The command shows the settings in which groups differ, and compares
their held-out scores, with intervals over problems and seeds. It prints the result, and writes a page
(comparison.html) and CSV files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.command_line.arguments import Parser, exit_code_of
from megatron_fipo.errors import ConfigError

EPILOG = """examples:
  megatron-fipo compare runs/fipo-1 runs/fipo-2 runs/dapo-1 runs/dapo-2 --baseline dapo
  megatron-fipo compare runs/my-sweep --target 0.9 --output my-comparison
"""
METRICS = ("accuracy", "cons_at_k", "pass_at_k")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and write. Return 0, or the exit code of the error."""
    return exit_code_of(compare_runs, parse(arguments))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("compare", __doc__, EPILOG)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or a directory with runs")
    parser.add_argument(
        "--baseline",
        metavar="GROUP",
        help="what others are compared with: a group's name, its beginning, or one of its runs (default: the first)",
    )
    parser.add_argument(
        "--metric", choices=METRICS, default="accuracy", help="held-out score (default accuracy: avg@k)"
    )
    parser.add_argument(
        "--target",
        type=float,
        metavar="SCORE",
        help="report time and tokens to it (default: one that all groups reach)",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="ignore this key when grouping runs, such as run.steps or 'parallel.*'; may be repeated",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison"),
        metavar="DIRECTORY",
        help="directory for comparison.html, groups.csv and validations.csv (default ./comparison)",
    )
    return parser.parse_args(arguments)


def compare_runs(options: argparse.Namespace) -> None:
    """Read, compare, print and write. FipoError if a file is missing or cannot be read."""
    # Imported here, since --help needs neither NumPy nor YAML.
    from megatron_fipo.comparison import report
    from megatron_fipo.comparison.groups import group_runs
    from megatron_fipo.comparison.runs import find_runs

    if options.target is not None and not 0 <= options.target <= 1:
        raise ConfigError("--target", f"{options.target:g} is not a score", "a share from 0 to 1")
    grouping = group_runs(find_runs(options.runs), options.ignore)
    comparison = report.build(grouping, options.baseline, options.metric, options.target)
    report.show(comparison)
    report.write(comparison, options.output)


if __name__ == "__main__":
    sys.exit(main())
