"""report.html: a run's curves, result, settings and versions on one page that needs no network and no other file."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from megatron_fipo.files import write_atomically
from megatron_fipo.tracking.console_table import duration
from megatron_fipo.tracking.metrics import METRICS_FILE, VALIDATION_FILE, read_rows
from megatron_fipo.tracking.plots import PANELS, draw

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em; margin-bottom: 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1em; margin: 1.5em 0 }
.plots svg { width: 100%; height: auto }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .15em 1.2em .15em 0; text-align: left; font-variant-numeric: tabular-nums }
details { margin: .5em 0 }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto }
</style>
<h1>$title</h1>
<p>$state</p>
$summary
<div class="plots">
$plots
</div>
$details
</html>
""")


def write_report(run_directory: Path) -> Path:
    """Draw report.html from the run's files, finished or under way; return its path. Takes half a second of a core."""
    steps = read_rows(run_directory / METRICS_FILE)
    validations = read_rows(run_directory / VALIDATION_FILE)
    summary = _summary(run_directory / "summary.json", last_step=steps[-1]["step"] if steps else 0)
    drawings = [draw(panel, steps, validations) for panel in PANELS]
    page = _PAGE.substitute(
        title=html.escape(run_directory.resolve().name),
        state=_state(steps, summary),
        summary=_table(summary),
        plots="\n".join(drawing for drawing in drawings if drawing),
        details="\n".join(_detail(run_directory / name) for name in ("config.yaml", "environment.json")),
    )
    path = run_directory / "report.html"
    write_atomically(path, page)
    return path


def _summary(path: Path, last_step: int) -> dict[str, Any]:
    """The result of a finished run; empty for one under way, also where it goes on after an earlier end."""
    summary = json.loads(path.read_text()) if path.exists() else {}
    return summary if summary.get("steps") == last_step else {}


def _state(steps: list[dict[str, Any]], summary: Mapping[str, Any]) -> str:
    return "The run is finished." if summary else f"The run is under way: {len(steps)} steps so far."


def _table(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    cells = (
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_shown(key, value))}</td></tr>"
        for key, value in summary.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _shown(key: str, value: Any) -> str:
    if key == "seconds" and isinstance(value, int | float):
        return duration(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _detail(path: Path) -> str:
    if not path.exists():
        return ""
    return f"<details><summary>{path.name}</summary><pre>{html.escape(path.read_text())}</pre></details>"
