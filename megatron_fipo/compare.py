"""Which is better, and how sure is that? `megatron-fipo compare RUN RUN ...` (or a sweep's directory).

Groups runs that differ in nothing but their seed, says what differs between groups, and compares their held-out scores
with intervals over problems and seeds: on the terminal, as one page (comparison.html) and as CSV.
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
    """Compare, print and write; 0, or the exit code of the error."""
    return exit_code_of(compare_runs, parse(arguments))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("compare", __doc__, EPILOG)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or one that holds runs")
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
        help="do not tell groups apart by this key, such as run.steps or 'parallel.*'; may be repeated",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison"),
        metavar="DIRECTORY",
        help="where comparison.html, groups.csv and validations.csv go (default ./comparison)",
    )
    return parser.parse_args(arguments)


def compare_runs(options: argparse.Namespace) -> None:
    """Read, compare, print, write. FipoError for what cannot be read or is not there."""
    # Not above: --help needs neither NumPy nor YAML.
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
