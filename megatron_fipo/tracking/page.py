"""The common parts of a run's HTML pages: light and dark colours, a frame that needs no network, charts by Plotly.

Plotly's JavaScript is copied from its Python package into the page. So the page is one file that can be copied
anywhere. Plotly's Python code is not imported: this would take a second, and the browser draws the charts.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

CREDIT_PAGE = "credit.html"
"""The credit viewer, in a run's directory."""
_ASSETS = Path(__file__).parent.parent / "assets" / "page"


@dataclass(frozen=True)
class Line:
    """One line of a chart. `y`, `low` and `high` have the length of `x`; None is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    """The upper edge of a shaded band around the line; `low` is the lower edge."""
    dash: str = "solid"
    """solid, dot, dash or dashdot."""


@dataclass(frozen=True)
class Chart:
    """A chart over the steps. charts.js has further kinds that only JavaScript makes."""

    title: str
    y: str
    """The name of the vertical axis, with its unit."""
    lines: Sequence[Line]
    x: str = "step"
    percent: bool = False
    """Show shares as percentages."""


def page(title: str, body: str, scripts: Sequence[str] = (), style: str = "") -> str:
    """Return a whole HTML page. `title` is text, and `body` HTML. `scripts` run one after the other, after the body.

    `style` is CSS that follows the common theme.
    """
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
{asset("theme.css")}{style}</style>
</head>
<body>
<h1>{shown}</h1>
{body}
{run}
</body>
</html>
"""


def chart_scripts() -> list[str]:
    """Return the scripts that draw charts, of 5 MB. They define `charts.drawAll(element, charts)`."""
    return [_plotly(), asset("charts.js")]


def draw_charts(element_id: str, charts: Sequence[Chart]) -> str:
    """Return the script that draws charts inside the element with this id."""
    values = in_script([asdict(chart) for chart in charts])
    return f"charts.drawAll(document.getElementById({in_script(element_id)}), {values});\n"


def in_script(value: Any) -> str:
    """Return a value as JSON that cannot end the <script> around it. Raises ValueError for NaN and infinities."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def asset(name: str) -> str:
    """Return the text of a file in assets/page."""
    return (_ASSETS / name).read_text()


def _plotly() -> str:
    path = Path(str(metadata.distribution("plotly").locate_file("plotly/package_data/plotly.min.js")))
    # A page in memory has one script after the other: what would end this one early must not be in it.
    return path.read_text().replace("</script", "<\\/script")
