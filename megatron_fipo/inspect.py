"""Show what is in a run's directory: `megatron-fipo inspect RUN`. With --step, show what the model wrote in a step.

With --credit, write credit.html: each token of a step's recorded responses with its influence weight, F, and the later
tokens that F comes from. Open it in a browser.

It shows the state of the run, the settings that differ from the schema's defaults, the last steps, validations and
checkpoints.
"""

import argparse
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_fipo.command_line.arguments import Parser, exit_code_of
from megatron_fipo.comparison.runs import Run, default_settings, read_run
from megatron_fipo.errors import ConfigError, DataError, FipoError
from megatron_fipo.policy.checkpoint_places import complete, files_of
from megatron_fipo.tracking.console_table import StepTable
from megatron_fipo.tracking.page import CREDIT_PAGE
from megatron_fipo.tracking.run_files import CREDIT_DIRECTORY

EPILOG = """examples:
  megatron-fipo inspect runs/mine                      its state
  megatron-fipo inspect runs/mine --step 20            the responses kept in step 20, with their rewards
  megatron-fipo inspect runs/mine --step 20 --held-out the same for the validation after step 20
  megatron-fipo inspect runs/mine --credit             a page of the newest step that is recorded, token by token
  megatron-fipo inspect runs/mine --verify             check the files of each checkpoint
"""
SCORES = {"avg": "accuracy", "cons": "cons_at_k", "pass": "pass_at_k"}
PAGES = (
    *("report.html", CREDIT_PAGE, "summary.json", "config.yaml", "tensorboard", "huggingface"),
    "reward_failures.jsonl",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the requested information. Return 0, or the exit code of the error."""
    warnings.simplefilter("ignore")  # from libraries that --verify imports, about packages that could be installed
    return exit_code_of(show, parse(arguments))


def show(options: argparse.Namespace) -> None:
    """Print the responses of a step, or the state of the run."""
    if options.credit:
        print(credit_text(options.run, options.step))
        return
    for line in rollouts(options) if options.step is not None else overview(options):
        print(line)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("inspect", __doc__, EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--step", type=int, metavar="N", help="show the responses that were kept in this step")
    parser.add_argument("--held-out", action="store_true", help="with --step: the responses of the validation after it")
    parser.add_argument("--credit", action="store_true", help="write credit.html, of --step or of the newest step")
    parser.add_argument("--rows", type=int, default=10, metavar="K", help="newest steps to show (default 10)")
    parser.add_argument("--verify", action="store_true", help="compare each checkpoint's files with their checksums")
    return parser.parse_args(arguments)


def rollouts(options: argparse.Namespace) -> Iterator[str]:
    """Yield the text of the responses kept in a step. ConfigError names the steps that have some."""
    kind = "validation" if options.held_out else "step"
    directory = options.run / "samples"
    path = directory / f"{kind}-{options.step:06d}.txt"
    if not path.is_file():
        kept = sorted(int(found.stem.removeprefix(f"{kind}-")) for found in directory.glob(f"{kind}-*.txt"))
        shown = f"there are those of {_ranges(kept)}" if kept else f"tracking.samples_per_{kind} keeps some in a run"
        raise ConfigError("--step", f"{path} not found", shown)
    yield path.read_text(encoding="utf-8")


def credit_text(run_directory: Path, step: int | None) -> str:
    """Write RUN/credit.html of a step, by default the newest one that is recorded. Return what to print.

    Raises:
        ConfigError: nothing is recorded of this step, or of any.
        DataError: the step's file, or the page's place, cannot be used.
    """
    from megatron_fipo.credit_page.page import write_credit_page  # imports pyarrow, and is needed only here
    from megatron_fipo.tracking.credit_file import credit_path, recorded_steps

    steps = recorded_steps(run_directory)
    if not steps or (step is not None and step not in steps):
        path = credit_path(run_directory, step) if step is not None else run_directory / CREDIT_DIRECTORY
        there = f"there are steps {_ranges(steps)}" if steps else "tracking.credit.responses records some in a run"
        raise ConfigError("--credit", f"{path} not found", there)
    step = steps[-1] if step is None else step
    page = run_directory / CREDIT_PAGE
    try:
        count = write_credit_page(run_directory, step)
    except OSError as error:
        raise DataError(f"{page} cannot be written: {error}") from error
    return f"{page}: step {step}, {count} responses; open it in a browser"


def overview(options: argparse.Namespace) -> Iterator[str]:
    """Yield the state of the run, line by line."""
    if not options.run.is_dir():
        raise DataError(f"{options.run}: no such directory")
    if not (options.run / "config.yaml").is_file():
        raise DataError(f"{options.run}: this is not the directory of a run: it has no config.yaml")
    run = read_run(options.run)
    steps = int(run.settings["run.steps"])
    state = "finished" if run.is_finished else "not finished"
    yield f"{options.run}: {state}, step {run.last_step} of {steps}" + (f", commit {run.commit}" if run.commit else "")
    yield from _settings(run)
    yield from _steps(run, options.rows)
    yield from _validations(run)
    yield from _checkpoints(options.run / "checkpoints", options.verify)
    found = [name for name in PAGES if (options.run / name).exists()]
    yield f"\nfiles: {', '.join(found)}"
    if kept := sorted({int(path.stem.rpartition("-")[2]) for path in (options.run / "samples").glob("step-*.txt")}):
        yield f"kept responses: steps {_ranges(kept)} (--step N shows them)"


def _settings(run: Run) -> Iterator[str]:
    defaults = default_settings()
    changed = {key: value for key, value in run.settings.items() if value != defaults.get(key, value)}
    if changed:
        yield "\nsettings that are not the schema's defaults:"
        width = max(map(len, changed))
        for key in sorted(changed):
            yield f"  {key:<{width}}  {changed[key]}"


def _steps(run: Run, rows: int) -> Iterator[str]:
    if not run.steps:
        yield "\nno step has ended"
        return
    table = StepTable(shutil.get_terminal_size((120, 24)).columns)
    yield f"\n{table.header()}"
    for step in sorted(run.steps)[-rows:]:
        yield table.line(run.steps[step])


def _validations(run: Run) -> Iterator[str]:
    if run.validations:
        yield "\nheld-out problems:"
    for step in sorted(run.validations):
        row = run.validations[step]
        scores = {name: row.get(key) for name, key in SCORES.items()}
        shown = "  ".join(f"{name}@k {value:.3f}" for name, value in scores.items() if value is not None)
        yield f"  step {step:>5}  {shown or 'no verdict'}"


def _checkpoints(directory: Path, verify: bool) -> Iterator[str]:
    found = complete(directory)
    yield f"\ncheckpoints: {len(found) or 'none'}"
    for checkpoint in found:
        try:
            size = sum(files_of(checkpoint).values())
        except (OSError, FipoError) as error:
            yield f"  {checkpoint.name}  cannot be read: {error}"
            continue
        yield f"  {checkpoint.name}  {size / 1e6:,.1f} MB{_verdict(checkpoint) if verify else ''}"


def _verdict(checkpoint: Path) -> str:
    from megatron_fipo.policy import checkpoint_manifest  # imports torch, and is needed only here

    try:
        warning = checkpoint_manifest.verify_alone(checkpoint)
    except FipoError as error:
        return f"  DAMAGED: {error}"
    return f"  {warning}" if warning else "  every file has its checksum"


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ranges, such as 1–5, 10."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


if __name__ == "__main__":
    sys.exit(main())
