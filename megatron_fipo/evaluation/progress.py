"""The progress of an evaluation: a bar on a terminal, and elsewhere a line from time to time."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 120
_SIGN_OF_LIFE_S = 30.0


class EvaluationProgress:
    """The terminal of an evaluation. It is a context manager, which removes the bar at the end."""

    def __init__(self, total: int, done: int):
        """`done` of the `total` problems were finished by an earlier start."""
        self._console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False, markup=False)
        self._total, self._earlier = total, done
        self._last_sign_of_life = time.monotonic()
        columns = (TextColumn("problems"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("after"))
        self._bar = Progress(
            *columns,
            *(TimeElapsedColumn(), TextColumn("[dim]left[/dim]"), TimeRemainingColumn(compact=True)),
            console=self._console,
            refresh_per_second=4,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line of information."""
        self._console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        line = Text("warning: ", style="bold yellow").append(text, style="not bold default")
        self._console.print(line, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table."""
        self._console.print(table)

    def progress(self, done: int, _total: int, unit: str) -> None:
        """Show how many problems have been sampled since this start."""
        finished = self._earlier + done
        self._bar.update(self._task, completed=finished)
        silent_s = time.monotonic() - self._last_sign_of_life
        if not self._console.is_terminal and silent_s > _SIGN_OF_LIFE_S:
            self._last_sign_of_life = time.monotonic()
            self.note(f"{finished} of {self._total} {unit} sampled")
