"""comparison.html: different settings, scores with intervals, curves with bands. It is one file without links."""

import html
from collections.abc import Sequence

from megatron_fipo.comparison.curves import charts
from megatron_fipo.comparison.groups import Grouping
from megatron_fipo.comparison.scores import GroupScores
from megatron_fipo.comparison.tables import Table, difference_table, run_table, score_table
from megatron_fipo.tracking.page import chart_scripts, draw_charts, page

EXPLANATION = (
    "In brackets: 95 % bootstrap intervals over problems and seeds. A difference is paired by problem, at the last "
    "step that all of its runs have validated. The best of many validations is partly best by luck. Time is training "
    "time without validation; time and tokens are medians over the runs that reached the score."
)


def comparison_page(
    grouping: Grouping,
    by_source: dict[str, list[GroupScores]],
    sources: Sequence[str],
    metric: str,
    target: float | None,
    sentences: Sequence[str],
) -> str:
    """Return the whole page. `by_source` has the scores over all problems first."""
    parts = [f"<p>{html.escape(sentence)}</p>" for sentence in sentences]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in grouping.notes]
    for source, scores in by_source.items():
        title = f"Scores: {metric}" + (f", {source}" if len(by_source) > 1 else "")
        parts.append(f"<h2>{html.escape(title)}</h2>{_table(score_table(scores, target))}")
    parts.append(f'<p class="quiet">{html.escape(EXPLANATION)}</p>')
    drawn = charts(grouping.groups, sources)
    if drawn:
        parts.append(
            '<h2>Curves</h2><p class="quiet">The mean over seeds, with a band from the minimum to the maximum.</p>'
        )
        parts.append('<div id="curves" class="charts"></div>')
    if grouping.differences:
        parts.append(f"<h2>What differs</h2>{_table(difference_table(grouping))}")
    parts.append(f"<h2>Runs</h2>{_table(run_table(grouping.groups, metric))}")
    scripts = [*chart_scripts(), draw_charts("curves", drawn)] if drawn else []
    return page("Comparison of " + ", ".join(group.name for group in grouping.groups), "\n".join(parts), scripts)


def _table(rows: Table) -> str:
    titles, *others = rows
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in others)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
