"""What the pages of a run share: light and dark colours, a shell that needs no network, and charts drawn by Plotly.

Plotly's JavaScript is taken out of its Python package and put into the page, which so is one file that can be copied
anywhere. Nothing of plotly's Python is imported: it takes a second, and the browser does the drawing.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_ASSETS = Path(__file__).parent.parent / "assets" / "page"


@dataclass(frozen=True)
class Line:
    """One line of a chart. `y`, `low` and `high` have the length of `x`; None is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    """With `low`: a shaded band around the line."""
    dash: str = "solid"
    """solid, dot, dash or dashdot."""


@dataclass(frozen=True)
class Chart:
    """A chart over the steps; charts.js has the kinds that only JavaScript makes."""

    title: str
    y: str
    """The vertical axis' name, with its unit."""
    lines: Sequence[Line]
    x: str = "step"
    percent: bool = False
    """Show shares as per cent."""


def page(title: str, body: str, scripts: Sequence[str] = ()) -> str:
    """A whole HTML page. `title` is text, `body` HTML; `scripts` are run one after the other, after the body."""
    shown = html.escape(title)
    run = "\n".join(f"<script>\n{script}</script>" for script in scripts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{shown}</title>
<style>
{asset("theme.css")}</style>
</head>
<body>
<h1>{shown}</h1>
{body}
{run}
</body>
</html>
"""


def chart_scripts() -> list[str]:
    """The scripts that draw charts, 5 MB; after them `charts.drawAll(element, charts)` is there."""
    return [_plotly(), asset("charts.js")]


def draw_charts(element_id: str, charts: Sequence[Chart]) -> str:
    """A script, for after `chart_scripts`, that draws charts into the element of this id (of class `charts`)."""
    values = in_script([asdict(chart) for chart in charts])
    return f"charts.drawAll(document.getElementById({in_script(element_id)}), {values});\n"


def in_script(value: Any) -> str:
    """A value as JSON that cannot end the <script> around it. Raises ValueError for NaN and infinities."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def asset(name: str) -> str:
    """A file of assets/page."""
    return (_ASSETS / name).read_text()


def _plotly() -> str:
    path = Path(str(metadata.distribution("plotly").locate_file("plotly/package_data/plotly.min.js")))
    # A page in memory has one script after the other: what would end this one early must not be in it.
    return path.read_text().replace("</script", "<\\/script")
