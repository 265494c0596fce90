"""report.html: a run's curves, result, settings and versions, to look at during training and afterwards.

The page is one file that contains everything, including Plotly. It is written when a run starts and when it ends in any
way. In between, report-data.js beside it has the numbers. An open page reloads it every few seconds by a <script>
element, which also works for local files, from which browsers do not allow fetch. Writing takes at most 1 % of the
run's time.
"""

import html
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from megatron_fipo.config import Config
from megatron_fipo.errors import FipoError
from megatron_fipo.files import write_atomically
from megatron_fipo.tracking.console import Span
from megatron_fipo.tracking.console_table import duration
from megatron_fipo.tracking.excerpts import excerpts
from megatron_fipo.tracking.metrics import METRICS_FILE, VALIDATION_FILE, read_rows
from megatron_fipo.tracking.page import CREDIT_PAGE, asset, chart_scripts, in_script, page
from megatron_fipo.tracking.panels import ENGINES, PANELS, PHASES, columns

PAGE_FILE = "report.html"
DATA_FILE = "report-data.js"

_SHORTEST_INTERVAL_S = 2.0
_SHARE_OF_TIME = 0.01
_SPANS = 400
"""Number of phases in the timeline: the latest ones."""
_POINTS = 1000
"""Largest number of points in a curve."""
_SAMPLES = 12
"""Number of links to rollouts of steps: the latest ones."""
_FILES = {
    "config.yaml": "every setting",
    "environment.json": "versions, commit, command",
    "metrics.jsonl": "one row per step",
    "validation.jsonl": "held-out scores",
    CREDIT_PAGE: "a step's responses token by token, with influence weights",
    "summary.json": "the result",
    "logs/": "output of the other processes",
}
_BODY = """<p class="quiet">{subtitle}</p>
<p id="state" role="status"></p>
<p id="note" class="note" hidden></p>
<div id="tiles" class="tiles"></div>
<div id="charts" class="charts"></div>
<section>
<h2>Held-out problems</h2>
<div class="scroll"><table id="held-out"></table></div>
</section>
<section>
<h2>Rollouts to read</h2>
<div id="samples"></div>
<div id="excerpts"></div>
</section>
<h2>Settings and files</h2>
{details}
<ul>{files}</ul>
<p class="quiet">Links work where this page is inside its run's directory.</p>
<noscript><p class="note">Curves need JavaScript.</p></noscript>"""


class Report:
    """Keeps a run's report up to date, on rank 0. It is a context manager, which records how the run ended."""

    def __init__(self, directory: Path, config: Config, warn: Callable[[str], None]) -> None:
        """Begin with the rows that are already in the run's files, which matters after a resume.

        `warn` is called with a line if the report cannot be written; the run continues. DataError if a file is broken.
        """
        self._directory, self._config, self._warn = directory, config, warn
        self._training = [_needed(row) for row in read_rows(directory / METRICS_FILE)]
        self._held_out = read_rows(directory / VALIDATION_FILE)
        self._spans: deque[Span] = deque(maxlen=_SPANS)
        self._finished = False
        self._next_at = 0.0

    def __enter__(self) -> Self:
        self._write("running", whole=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            named = "" if isinstance(error, FipoError) else f"{type(error).__name__}: "
            self._write("failed", f"{named}{error}"[:2000], whole=True)
        elif not self._finished:  # the run was asked to stop, or a signal ended it
            self._write("stopped", whole=True)

    def add_step(self, row: Mapping[str, Any], spans: Iterable[Span]) -> None:
        """Add a step's row of metrics.jsonl, and the phases that have ended since the last call."""
        self._training.append(_needed(row))
        self._update(spans)

    def add_validation(self, row: dict[str, Any], spans: Iterable[Span]) -> None:
        """Add a row of validation.jsonl."""
        self._held_out.append(row)
        self._update(spans)

    def finish(self, seconds: float, spans: Iterable[Span]) -> None:
        """Record that the run has done all its steps in `seconds`, and write the whole page."""
        self._finished = True
        self._spans.extend(spans)
        self._write("finished", duration(seconds), whole=True)

    def _update(self, spans: Iterable[Span]) -> None:
        """Write the numbers, unless they were written a moment ago."""
        self._spans.extend(spans)
        started = time.monotonic()
        if started >= self._next_at:
            self._write("running", whole=False)
            ended = time.monotonic()
            self._next_at = ended + max(_SHORTEST_INTERVAL_S, (ended - started) / _SHARE_OF_TIME)

    def _write(self, state: str, words: str = "", *, whole: bool) -> None:
        try:
            data = in_script(self._data(state, words))
            write_atomically(self._directory / DATA_FILE, f"report.show({data});\n")
            if whole:
                write_atomically(self._directory / PAGE_FILE, _page(self._directory, self._config, data))
        except OSError as error:
            self._warn(f"{self._directory / PAGE_FILE} is not up to date: {error}")

    def _data(self, state: str, words: str) -> dict[str, Any]:
        """Return the data that report.js shows."""
        rows_per_point = -(-len(self._training) // _POINTS) or 1
        return {
            "written": time.time(),
            "state": {"kind": state, "words": words},
            "total_steps": self._config.run.steps,
            "k": self._config.validation.samples,
            "steps_per_point": rows_per_point,
            "training": _columns(_means(self._training, rows_per_point), _TRAINING_KEYS),
            "held_out": _columns(self._held_out, columns(held_out=True)),
            "sources": _by_source(self._held_out),
            "spans": [[span.phase, round(span.start, 3), round(span.seconds, 3)] for span in self._spans],
            "samples": {
                "step": _kept(self._directory, "step")[-_SAMPLES:],
                "validation": _kept(self._directory, "validation"),
            },
            "excerpts": excerpts(self._directory),
        }


_TRAINING_KEYS = frozenset({*columns(held_out=False), "seconds_step"})


def _needed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": row["step"]} | {key: row[key] for key in _TRAINING_KEYS if row.get(key) is not None}


def _means(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Replace each `count` rows by their mean, at the step of the last one. More points would not be visible."""
    if count == 1:
        return rows
    parts = (rows[start : start + count] for start in range(0, len(rows), count))
    return [_mean(part) | {"step": part[-1]["step"]} for part in parts]


def _mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    keys = {key for row in rows for key in row}
    return {key: fmean(row[key] for row in rows if key in row) for key in keys}


def _columns(rows: list[dict[str, Any]], keys: Iterable[str]) -> dict[str, list[float | None]]:
    """Return, for `step` and each metric that some row has, the values over the rows, rounded to six digits."""
    found = {key: [_short(row.get(key)) for row in rows] for key in sorted(set(keys))}
    shown = {key: values for key, values in found.items() if any(value is not None for value in values)}
    return {"step": [row["step"] for row in rows], **shown}


def _short(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, int | float) and math.isfinite(value) else None


def _by_source(held_out: list[dict[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """Return the scores of each data source, if there are several."""
    names = sorted({key.partition("/")[2] for row in held_out for key in row if key.startswith("accuracy/")})
    wanted = ("accuracy", "cons_at_k", "pass_at_k", "response_length_mean")
    return {name: {key: [_short(row.get(f"{key}/{name}")) for row in held_out] for key in wanted} for name in names}


def _kept(directory: Path, name: str) -> list[str]:
    """Return the files of rollouts, oldest first."""
    return sorted(path.name for path in (directory / "samples").glob(f"{name}-*.txt"))


def _page(directory: Path, config: Config, data: str) -> str:
    details = "\n".join(_detail(directory / name) for name in ("config.yaml", "environment.json"))
    links = (
        f'<li><a href="{name}">{name}</a> <span class="quiet">{what}</span></li>'
        for name, what in _FILES.items()
        if name not in (CREDIT_PAGE, "summary.json", "logs/") or (directory / name).exists()
    )
    problems = ", ".join(config.data.train) or config.data.task
    subtitle = f"{config.algorithm.name} · {config.model.path} · {problems} · seed {config.run.seed}"
    body = _BODY.format(subtitle=html.escape(subtitle), details=details, files="".join(links))
    spec = in_script(
        {"panels": [asdict(panel) for panel in PANELS], "phases": [*PHASES, ENGINES], "data_file": DATA_FILE}
    )
    scripts = [
        *chart_scripts(),
        f"const page = {spec};\n",
        asset("report.js"),
        f"report.show({data});\nreport.follow();\n",
    ]
    return page(f"{config.run.name} · {directory.resolve().name}", body, scripts)


def _detail(path: Path) -> str:
    if not path.exists():
        return ""
    return f"<details><summary>{path.name}</summary><pre>{html.escape(path.read_text())}</pre></details>"
