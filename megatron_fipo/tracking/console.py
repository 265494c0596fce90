"""A run's output on the terminal: a progress bar with the phase, one line per step, held-out accuracy before and after.

On a terminal the bar stays at the bottom, and lines scroll above it. Elsewhere (a file, a Slurm log, CI) the output is
plain lines without control characters, and in a long phase a line from time to time. Every rank has a console. Only
rank 0's console prints; the others only measure the seconds of the phases.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megatron_fipo.tracking.console_table import LEGEND, StepTable, duration, tenths
from megatron_fipo.tracking.validation import ValidationResult, ValidationScores

_HEADER_EVERY = 20
_PLAIN_WIDTH = 120
_SIGN_OF_LIFE_S = 60.0

_FILES = {
    "summary.json": "the result",
    "report.html": "curves; open it in a browser",
    "metrics.jsonl": "one line per step",
    "validation.jsonl": "scores on held-out problems",
    "validation": "scores of each held-out problem, for compare",
    "samples": "rollouts to read, with rewards",
    "tensorboard": "tensorboard --logdir here",
    "wandb": "files of Weights & Biases; wandb sync uploads an offline run",
    "mlflow": "mlflow ui --backend-store-uri here",
    "checkpoints": "to resume from",
    "config.yaml": "every setting",
    "environment.json": "versions and commit",
    "logs": "output of the other processes",
}


@dataclass(frozen=True)
class Span:
    """A phase that has ended. Nested phases have their own spans, inside this span."""

    phase: str
    start: float
    """Seconds since 1970."""
    seconds: float


class Phase:
    """A part of a step that is in progress."""

    def __init__(self, console: "Console", name: str) -> None:
        self.name = name
        self.started = time.monotonic()
        self.nested_s = 0.0
        """Seconds spent in nested phases, which do not count in this phase."""
        self._console = console

    def progress(self, done: int, total: int, unit: str = "") -> None:
        """Show how far the phase is, such as `progress(12, 32, "groups")`."""
        self._console._show_progress(self, f"{done}/{total} {unit}".rstrip())


class Console:
    """Rank 0's terminal. It is a context manager, which removes the progress bar at the end, also after an error."""

    def __init__(
        self,
        total_steps: int,
        resumed_step: int = 0,
        enabled: bool = True,
        file: TextIO | None = None,
        width: int | None = None,
        overlaps: bool = False,
    ) -> None:
        """Print to standard output, or to `file` with `width` columns. `overlaps`: see StepTable."""
        self._enabled = enabled
        self._step, self._total_steps = resumed_step, total_steps
        self._phases: list[Phase] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._spans: list[Span] = []
        self._first_validation: ValidationScores | None = None
        self._rich = RichConsole(file=file or sys.stdout, width=width, highlight=False, markup=False, emoji=False)
        self._live = enabled and self._rich.is_terminal and not self._rich.is_dumb_terminal
        if not self._live and width is None:
            self._rich.width = _PLAIN_WIDTH
        self._table = StepTable(self._rich.width, overlaps=overlaps)
        self._lines_since_header: int | None = None
        self._last_sign_of_life = time.monotonic()
        self._progress = self._bar()
        self._task = self._progress.add_task("", total=total_steps, phase="starting")
        self._move_bar(resumed_step)

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("step {task.fields[under_way]}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            _PhaseColumn("{task.fields[phase]}", markup=False),
            TextColumn("[dim]left[/dim]"),
            TimeRemainingColumn(compact=True),
            console=self._rich,
            refresh_per_second=4,
            transient=True,
            disable=not self._live,
        )

    def __enter__(self) -> "Console":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Show and time a phase: sample, verify, log-probs, update, weights, validate, checkpoint.

        A phase does not include the seconds of its nested phases, so that all phases add up to the time that has
        passed.
        """
        phase = Phase(self, name)
        self._phases.append(phase)
        self._show_progress(phase, "")
        try:
            yield phase
        finally:
            self._phases.pop()
            elapsed_s = time.monotonic() - phase.started
            self._seconds[name] += elapsed_s - phase.nested_s
            if self._enabled:
                self._spans.append(Span(name, time.time() - elapsed_s, elapsed_s))
            if self._phases:
                self._phases[-1].nested_s += elapsed_s
            self._progress.update(self._task, phase=self._phases[-1].name if self._phases else "", since=None)

    def progress(self, done: int, total: int, unit: str = "") -> None:
        """Show how far the innermost phase is, if there is one."""
        if self._phases:
            self._phases[-1].progress(done, total, unit)

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each phase since the last call, as metrics: `seconds_log_probs` …"""
        taken = {f"seconds_{name.replace('-', '_').replace(' ', '_')}": value for name, value in self._seconds.items()}
        self._seconds.clear()
        return taken

    def take_spans(self) -> list[Span]:
        """Return rank 0's phases that have ended since the last call, in the order in which they ended."""
        taken, self._spans = self._spans, []
        return taken

    def step_line(self, metrics: Mapping[str, Any]) -> None:
        """Print one step's line and advance the bar. `metrics` is the step's row. A missing metric is shown as `-`."""
        self._step = int(metrics.get("step", self._step + 1))
        self._move_bar(self._step)
        if not self._enabled:
            return
        if self._lines_since_header is None:
            self._print(Text(LEGEND, style="dim"))
        if self._table.fit(self._rich.width) or self._lines_since_header in (None, _HEADER_EVERY):
            self._print(Text(self._table.header(), style="bold"))
            self._lines_since_header = 0
        assert self._lines_since_header is not None
        self._lines_since_header += 1
        self._print(Text(self._table.line({**metrics, "step": self._step})))

    def note(self, text: str) -> None:
        """Print a line of information."""
        self._print(Text(text))

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._print(Text("warning: ", style="bold yellow").append(text, style="not bold default"))

    def validation(self, step: int, result: ValidationResult) -> None:
        """Print the scores on held-out problems after `step` steps, and their change since this run's first scores."""
        now, first = result.overall, self._first_validation
        self._first_validation = first or now
        change = f" ({now.avg - first.avg:+.3f})" if first else ""
        line = Text(f"held-out, step {step}: ", style="bold cyan")
        self._print(line.append(_scores_text(now, change), style="not bold"))
        if len(result.by_source) > 1:
            for source, scores in result.by_source.items():
                self._print(Text(f"  {source}: {_scores_text(scores)}", style="cyan"))
        if now.not_judged:
            without = f", {now.problems_not_judged} problems with them" if now.problems_not_judged else ""
            self.warn(f"{now.not_judged} held-out responses could not be judged and are left out{without}")

    def finish(self, summary: Mapping[str, Any], run_directory: Path) -> None:
        """Print the run's result, held-out scores before and after, and the list of its files."""
        self._progress.stop()
        if not self._enabled:
            return
        self._print(Text(""))
        if summary.get("accuracy_before") is not None and summary.get("accuracy_after") is not None:
            self._print(_before_and_after(summary))
        self._print(Text(f"{summary.get('steps', self._step)} steps in {duration(float(summary.get('seconds', 0.0)))}"))
        self._print(Text(f"files of the run in {run_directory}", style="bold"))
        for name, what in _FILES.items():
            if (run_directory / name).exists():
                self._print(Text(f"  {name:<17} {what}"))

    def _move_bar(self, done: int) -> None:
        self._progress.update(self._task, completed=done, under_way=min(done + 1, self._total_steps))

    def _print(self, content: Text | Table) -> None:
        if self._enabled:
            # The terminal wraps long lines: a path that is broken into two lines cannot be copied.
            self._rich.print(content, soft_wrap=isinstance(content, Text))

    def _show_progress(self, phase: Phase, detail: str) -> None:
        text = f"{phase.name} {detail}".rstrip()
        self._progress.update(self._task, phase=text, since=phase.started)
        silent_s = time.monotonic() - max(self._last_sign_of_life, phase.started)
        if self._enabled and not self._live and silent_s > _SIGN_OF_LIFE_S:
            self._last_sign_of_life = time.monotonic()
            self._print(Text(f"step {self._step + 1}: {text}, {duration(time.monotonic() - phase.started)}"))


class _PhaseColumn(TextColumn):
    """The phase, its progress, and how long it has taken so far."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        since = task.fields.get("since")
        return text if since is None else text.append(f" {duration(time.monotonic() - since)}", style="dim")


def _scores_text(scores: ValidationScores, change: str = "") -> str:
    length = tenths(scores.response_length_mean)
    avg = f"avg@{scores.k} {scores.avg:.3f}{change}"
    cons = "" if math.isnan(scores.cons) else f"  cons@{scores.k} {scores.cons:.3f}"  # a rule may give no answers
    return f"{avg}{cons}  pass@{scores.k} {scores.pass_at_k:.3f}  length {length}"


def _before_and_after(summary: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("held-out problems", "before", "after", "change"):
        table.add_column(title, justify="left" if title == "held-out problems" else "right")
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    table.add_row("accuracy", f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    before, after = summary.get("response_length_before"), summary.get("response_length_after")
    if before and after is not None:
        table.add_row("response length (tokens)", f"{before:.1f}", f"{after:.1f}", f"× {after / before:.2f}")
    return table
