"""Build a comparison, print it, and write it as a page and as CSV."""

import sys
from dataclasses import dataclass
from pathlib import Path

import rich.table
from rich.console import Console
from rich.text import Text

from megatron_fipo.comparison import tables
from megatron_fipo.comparison.groups import Group, Grouping
from megatron_fipo.comparison.page import EXPLANATION, comparison_page
from megatron_fipo.comparison.scores import GroupScores, compare, default_target, sources_of
from megatron_fipo.errors import ConfigError
from megatron_fipo.evaluation.files import ALL
from megatron_fipo.files import write_atomically

_WIDTH = 160
_SHOWN_DIFFERENCES = 12


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison."""

    grouping: Grouping
    baseline: Group
    metric: str
    target: float | None
    """The score whose cost is shown; None if no run has validated."""
    sources: list[str]
    by_source: dict[str, list[GroupScores]]
    """The groups' scores on all problems under "all", then on each data source if there are several."""

    def sentences(self) -> list[str]:
        """Return the differences to the baseline in sentences."""
        return [said for found in self.by_source[ALL] if (said := tables.verdict(found, self.baseline))]


def build(grouping: Grouping, baseline: str | None, metric: str, target: float | None) -> Comparison:
    """Compare all groups with the one that `baseline` names, or with the first. ConfigError if it names none."""
    chosen = _find(grouping.groups, baseline) if baseline else grouping.groups[0]
    wanted = default_target(grouping.groups, metric) if target is None else target
    sources = sources_of(grouping.groups)
    by_source = {ALL: compare(grouping.groups, chosen, metric, wanted)}
    by_source |= {source: compare(grouping.groups, chosen, metric, wanted, source) for source in sources}
    return Comparison(grouping, chosen, metric, wanted, sources, by_source)


def _find(groups: list[Group], name: str) -> Group:
    exact = [group for group in groups if group.name == name]
    by_run = [g for g in groups if any(Path(name).resolve() == run.directory for run in g.runs)]
    beginning = [group for group in groups if group.name.startswith(name)]
    for found in (exact, by_run, beginning):
        if len(found) == 1:
            return found[0]
    problem = f"{name} names {len(beginning)} groups" if beginning else f"there is no group {name}"
    raise ConfigError("--baseline", problem, "one of " + ", ".join(repr(group.name) for group in groups))


def show(comparison: Comparison) -> None:
    """Print the settings that differ, the scores, and the sentences about them."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)
    grouping = comparison.grouping
    console.print(_opening(comparison))
    for note in (*grouping.notes, *_without_scores(comparison)):
        console.print(Text("note: ", style="bold yellow").append(note, style="not bold default"), soft_wrap=True)
    if grouping.differences:
        titles, *rows = tables.difference_table(grouping)
        hidden = len(rows) - _SHOWN_DIFFERENCES
        console.print(_rich([titles, *rows[:_SHOWN_DIFFERENCES]], "what differs"))
        if hidden > 0:
            console.print(f"  and {hidden} key{'s' if hidden > 1 else ''} more, in comparison.html")
    for source, scores in comparison.by_source.items():
        title = f"held-out {comparison.metric}" + (f", {source}" if comparison.sources else "")
        console.print(_rich(tables.score_table(scores, comparison.target), title))
    console.print(EXPLANATION, style="dim")
    for sentence in comparison.sentences():
        console.print(Text(sentence, style="bold"), soft_wrap=True)


def _opening(comparison: Comparison) -> str:
    """Return the numbers of runs and groups, and the baseline, in a sentence."""
    groups, baseline = comparison.grouping.groups, comparison.baseline.name
    runs = sum(len(group.runs) for group in groups)
    counted = f"{runs} run{'' if runs == 1 else 's'}"
    if len(groups) == 1:
        return f"{counted} of {baseline}"
    return f"{counted} in {len(groups)} groups; the baseline is {baseline}"


def _without_scores(comparison: Comparison) -> list[str]:
    """Return the sentences for the case that no run has a held-out score."""
    if any(found.final is not None for found in comparison.by_source[ALL]):
        return []
    return [f"no run has a held-out {comparison.metric}: validation.every=N in a run measures one every N steps"]


def _rich(rows: tables.Table, title: str) -> rich.table.Table:
    shown = rich.table.Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(rows[0]):
        shown.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows[1:]:
        shown.add_row(*row)
    return shown


def write(comparison: Comparison, directory: Path) -> None:
    """Write comparison.html, groups.csv and validations.csv. ConfigError if the directory cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "--output", f"{directory} cannot be made: {error}", "a directory that can be written"
        ) from error
    grouping, metric, target = comparison.grouping, comparison.metric, comparison.target
    page = comparison_page(grouping, comparison.by_source, comparison.sources, metric, target, comparison.sentences())
    write_atomically(directory / "comparison.html", page)
    write_atomically(directory / "groups.csv", tables.groups_csv(comparison.by_source, metric, target))
    write_atomically(directory / "validations.csv", tables.runs_csv(grouping.groups, metric))
    print(f"written to {directory}: comparison.html, groups.csv, validations.csv")
