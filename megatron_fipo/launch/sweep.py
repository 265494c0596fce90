"""Train several runs, one after the other: `megatron-fipo train -m algorithm=fipo,dapo run.seed=1,2,3`.

Each run has its own processes, and its own directory under run.directory. All configurations are checked before the
first run starts. If a run fails, the others still run. The same command, called again, completes the sweep.
"""

import datetime
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table

from megatron_fipo.command_line.commands import going_on, override, program
from megatron_fipo.config import Config, DataConfig, RewardConfig
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config
from megatron_fipo.config.resolved import read_tree
from megatron_fipo.config.resume import changes, refused
from megatron_fipo.errors import ConfigError, DataError, FipoError, RunFailed
from megatron_fipo.launch.first_look import look_first, splits_read
from megatron_fipo.launch.local import STOPPED, already_launched
from megatron_fipo.library import run_in_process
from megatron_fipo.runs.directory import look
from megatron_fipo.runs.result import RunResult, read_run
from megatron_fipo.tracking.console_table import duration
from megatron_fipo.tracking.run_files import kept_config

FLAGS = ("-m", "--multirun")
_DIRECTORY = "run.directory"
_LONGEST_NAME = 120
_WIDTH_OF_FILES = 250
"""Width of a table that is not written to a terminal, so that no cell is wrapped."""
_UNUSUAL = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    """The name of its directory: the settings that differ from the other runs."""
    overrides: tuple[str, ...]
    config: Config

    @property
    def directory(self) -> Path:
        """The directory of its files."""
        return Path(self.config.run.directory)

    def result(self) -> RunResult | None:
        """The result so far, or None if it has not started."""
        try:
            return read_run(self.directory)
        except DataError:
            return None

    def is_done(self) -> bool:
        """Whether all of its steps are done."""
        result = self.result()
        return result is not None and result.summary.get("steps", -1) >= self.config.run.steps


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep has ended."""

    member: Member
    status: str
    failed: bool


def sweep(arguments: Sequence[str]) -> NoReturn:
    """Train all combinations of a command line, given without -m. Then print a table and exit, with 1 if a run failed.

    Raises:
        ConfigError: a combination cannot run. No run has been started then.
    """
    members = plan(arguments)
    directory = members[0].directory.parent
    judge(members)
    counted = "1 run" if len(members) == 1 else f"{len(members)} runs, one after the other,"
    print(f"{counted} in {directory}; the output of each: {directory}/…/output.txt")
    outcomes: list[Outcome] = []
    try:
        for number, member in enumerate(members, start=1):
            print(f"[{number}/{len(members)}] {member.name}: ", end="", flush=True)
            outcomes.append(_run(member))
            print(outcomes[-1].status, flush=True)
    except KeyboardInterrupt:
        print(f"interrupted; to resume the sweep:\n  {going_on(directory)}", flush=True)
        sys.exit(130)
    width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
    Console(highlight=False, markup=False, width=width).print(_table(outcomes))
    sys.exit(1 if any(outcome.failed for outcome in outcomes) else 0)


def plan(arguments: Sequence[str]) -> list[Member]:
    """Return the runs that a command line with several values per key describes, in Hydra's order, or ConfigError."""
    if already_launched():
        raise ConfigError("--multirun", "is for one machine, without torchrun or srun", "a job for each run")
    if flags := [text for text in arguments if text.startswith("-")]:
        raise ConfigError(flags[0], "cannot be given together with -m", "only overrides: KEY=VALUE,VALUE")
    parsed, combinations = _expand(arguments)
    swept = [entry.get_key_element() for entry in parsed if entry.is_sweep_override()]
    directory = next((text.partition("=")[2] for text in arguments if text.startswith(f"{_DIRECTORY}=")), "")
    if _DIRECTORY in swept:
        raise ConfigError(_DIRECTORY, "is the one directory of all runs of a sweep", "one value")
    members: list[Member] = []
    for overrides in combinations:
        name = _name([text for text in overrides if text.partition("=")[0] in swept])
        config = load_config(overrides)
        if not members:
            directory = config.run.directory if directory else f"runs/{config.run.name}-sweep/{_now()}"
        if any(member.name == name for member in members):
            raise ConfigError(
                "--multirun", f"two runs would be called {name}", "values that differ within 120 characters"
            )
        own = [text for text in overrides if not text.startswith(f"{_DIRECTORY}=")]
        own.append(override(_DIRECTORY, str(Path(directory).resolve() / name)))
        members.append(Member(name, tuple(own), load_config(own)))
    return members


def judge(members: Sequence[Member]) -> None:
    """Check all runs, and print each warning once. Raises FipoError, naming the run, if one cannot run."""
    said: set[str] = set()
    looked: list[tuple[DataConfig, RewardConfig]] = []
    for member in members:
        inputs = (member.config.data, member.config.reward)
        try:
            warnings = check(member.config)
            look(member.config)
            _check_done(member)
            if inputs not in looked:
                look_first(member.config, splits_read(member.config))
        except ConfigError as error:
            raise ConfigError(f"{member.name}: {error.key}", error.problem, error.remedy) from None
        except FipoError as error:
            raise RunFailed(f"{member.name}: {error}", error.exit_code) from None
        for warning in warnings:
            if warning not in said:
                print(f"warning: {warning}", file=sys.stderr)
        said.update(warnings)
        looked.append(inputs)


def _check_done(member: Member) -> None:
    """Check that a finished run had the same settings."""
    if member.is_done():
        old = read_tree(kept_config(member.directory, member.config.run.steps))
        if differences := refused(changes(old, member.config), member.config):
            problem = f"the run there is done, with other settings: {'; '.join(differences[:6])}"
            raise ConfigError(_DIRECTORY, problem, "another run.directory for the sweep, or the same settings")


def _expand(arguments: Sequence[str]) -> tuple[list[Override], list[list[str]]]:
    """Parse `key=a,b`, choice() and range() by Hydra's own parser. Return the overrides and all combinations."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(arguments))
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except (HydraException, ValueError, AssertionError, RecursionError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError("--multirun", problem, "KEY=VALUE,VALUE; a list as a value is in brackets") from None
    return parsed, [list(combination) for batch in batches for combination in batch]


def _name(differing: Sequence[str]) -> str:
    """Return a name such as algorithm-dapo_seed-2: the last part of each key, with its value."""
    parts = []
    for text in differing:
        key, _, value = text.lstrip("+~").partition("=")
        parts.append(f"{key.rpartition('.')[2]}-{_UNUSUAL.sub('-', value).strip('-')}")
    return "_".join(parts)[:_LONGEST_NAME] or "run"


def _now() -> str:
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def _run(member: Member) -> Outcome:
    if member.is_done():
        return Outcome(member, "done before", failed=False)
    started = time.monotonic()
    member.directory.mkdir(parents=True, exist_ok=True)
    command = [program(), "train", *member.overrides]
    with (member.directory / "output.txt").open("a", encoding="utf-8") as output:
        status, reason = run_in_process(member.config, lambda line: print(line, file=output, flush=True), command)
    took = duration(time.monotonic() - started)
    if status == 0:
        return Outcome(member, f"done in {took}{_accuracy(member.result())}", failed=False)
    if status == STOPPED:
        return Outcome(member, f"stopped after {took}, as its stop file asked for", failed=True)
    return Outcome(member, f"failed after {took}: {reason or f'status {status}, see output.txt'}", failed=True)


def _accuracy(result: RunResult | None) -> str:
    if result is None or result.summary.get("accuracy_after") is None:
        return ""
    return f", accuracy {result.summary['accuracy_before']:.3f} → {result.summary['accuracy_after']:.3f}"


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "steps", "reward", "accuracy before", "after", "status"):
        table.add_column(title, justify="left" if title in ("run", "status") else "right")
    for outcome in outcomes:
        table.add_row(outcome.member.name, *_numbers(outcome.member.result()), outcome.status)
    return table


def _numbers(result: RunResult | None) -> Iterator[str]:
    """Yield the number of steps done, the last step's reward, and held-out accuracy before and after."""
    last = result.metrics[-1] if result is not None and result.metrics else {}
    summary = result.summary if result is not None else {}
    yield str(last.get("step", 0))
    for value in (last.get("reward_mean"), summary.get("accuracy_before"), summary.get("accuracy_after")):
        yield "-" if value is None else f"{value:.3f}"
