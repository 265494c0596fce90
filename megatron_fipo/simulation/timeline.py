"""A page that shows who works when: trainer and engines over the last simulated steps, in each mode."""

import html
from collections.abc import Sequence
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.simulation.events import Span
from megatron_fipo.simulation.outcome import Outcome
from megatron_fipo.simulation.table import HEADINGS, cells
from megatron_fipo.tracking.console_table import duration
from megatron_fipo.tracking.page import chart_scripts, in_script, page

_STEPS = 4
"""Steps that are shown: the last."""
_ENGINES = 8
"""Engines that are shown: the first."""
_KINDS = ("sampling", "log-probs", "updates", "other", "weights")
"""In the order of their colours."""


def timeline_page(config: Config, outcomes: Sequence[Outcome], today: Outcome) -> str:
    """The page, with the table of modes and a picture of each."""
    rows = "".join(f"<tr>{_cells('td', [outcome.mode.title, *cells(outcome, today)])}</tr>\n" for outcome in outcomes)
    head = _cells("th", ["mode", *HEADINGS])
    note = (
        f"The last {_STEPS} steps of each mode, and its first {_ENGINES} engines. A bar of an engine is the time in "
        "which it had a sequence or more. Simulated, not measured."
    )
    body = (
        f'<p class="quiet">{html.escape(note)}</p>\n'
        f'<div class="scroll"><table>\n<tr>{head}</tr>\n{rows}</table></div>\n'
        '<div id="charts" class="charts"></div>\n<noscript><p class="note">Pictures need JavaScript.</p></noscript>'
    )
    charts = in_script([_chart(outcome) for outcome in outcomes])
    draw = f"charts.drawAll(document.getElementById('charts'), {charts});\n"
    return page(f"{config.run.name}, simulated", body, [*chart_scripts(), draw])


def _cells(kind: str, texts: Sequence[str]) -> str:
    return "".join(f"<{kind}>{html.escape(text)}</{kind}>" for text in texts)


def _chart(outcome: Outcome) -> dict[str, Any]:
    """A chart as charts.js takes it: a bar for each span, in the lane of whoever works."""
    ends = [step.end for step in outcome.played.steps]
    start, end = (ends[-_STEPS - 1] if len(ends) > _STEPS else 0.0), ends[-1]
    unit, size = ("hours", 3600) if end - start > 10800 else ("minutes", 60) if end - start > 300 else ("seconds", 1)
    lanes = ("trainer", *(f"engine {index}" for index in range(_ENGINES)))
    shown = [span for span in outcome.played.spans if span.end > start and span.start < end and span.lane in lanes]
    shown.sort(key=lambda span: (lanes.index(span.lane), span.start))
    # Lanes stand in the order in which they are first named: the trainer's kinds come first.
    kinds = [*_KINDS[1:], _KINDS[0]]
    return {
        "title": f"{outcome.mode.title}: {outcome.placement.text}",
        "kind": "timeline",
        "wide": True,
        "x": f"{unit}, the last {min(_STEPS, len(ends))} steps",
        "y": "",
        "lines": [_line(kind, [span for span in shown if span.what == kind], start, end, size) for kind in kinds],
    }


def _line(kind: str, spans: Sequence[Span], start: float, end: float, size: int) -> dict[str, Any]:
    cut = [(max(span.start, start), min(span.end, end)) for span in spans]
    return {
        "name": kind,
        "colour": _KINDS.index(kind),
        "y": [span.lane for span in spans],
        "base": [(first - start) / size for first, _ in cut],
        "x": [(last - first) / size for first, last in cut],
        "text": [f"{span.lane}, {kind}: {duration(span.end - span.start)}" for span in spans],
    }
