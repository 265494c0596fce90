"""The page itself: one file without links, whose responses are unpacked in the browser when they are opened."""

import html
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fipo.credit_page.pack import columns_of, packed, scale
from megatron_fipo.files import write_atomically
from megatron_fipo.records import credit
from megatron_fipo.tracking.credit_file import CreditAbout, CreditResponse, credit_path, read_credit
from megatron_fipo.tracking.page import CREDIT_PAGE, asset, in_script, page

TRUNCATED = ("length",)
"""Finish reasons of responses that were cut off."""
_BODY = """<p class="quiet">{subtitle}</p>
<form id="controls" class="controls">
<label>Colour <select id="quantity"></select></label>
<label>Reward <span><input id="reward-low" type="number" step="any" placeholder="from" aria-label="Lowest reward">
<input id="reward-high" type="number" step="any" placeholder="to" aria-label="Highest reward"></span></label>
<label>Tokens <span><input id="length-low" type="number" placeholder="from" aria-label="Fewest tokens">
<input id="length-high" type="number" placeholder="to" aria-label="Most tokens"></span></label>
<label>Ended by <select id="finish"><option value="">any</option></select></label>
<label>Truncated <select id="truncated">{any_yes_no}</select></label>
<label>Dropped <select id="dropped">{any_yes_no}</select></label>
<label class="tick"><input id="siblings" type="checkbox"> siblings side by side</label>
</form>
<p id="found" class="quiet" role="status"></p>
<div id="responses" class="responses" role="group" aria-label="Responses"></div>
<div id="legend" class="legend"></div>
<div id="panes" class="panes"></div>
<div id="token" class="token" role="status" aria-live="polite" hidden></div>
<p class="quiet">Point at a token, or use the arrow keys inside a response, to see its values. Underlined then are the
later tokens that its F comes from. A click in the strip goes to that place. Values are those of the loss, rounded to
0.4 %.</p>
<noscript><p class="note">The page needs JavaScript.</p></noscript>"""


def write_credit_page(run_directory: Path, step: int) -> int:
    """Write RUN/credit.html of a recorded step. Return the number of its responses.

    Raises:
        DataError: the step's file is none of tracking.credit, or cannot be read.
        OSError: the page cannot be written.
    """
    about, responses = read_credit(credit_path(run_directory, step))
    write_atomically(run_directory / CREDIT_PAGE, credit_page(run_directory.resolve().name, about, responses))
    return len(responses)


def credit_page(run_name: str, about: CreditAbout, responses: Sequence[CreditResponse]) -> str:
    """Return the page of one step's recorded responses."""
    columns = columns_of(responses)
    data = {
        "about": asdict(about),
        "scale": scale(),
        "columns": [asdict(column) for column in columns],
        "bits": {
            "produced": credit.PRODUCED,
            "takesPart": credit.TAKES_PART,
            "clipped": credit.CLIPPED,
            "dualClipped": credit.DUAL_CLIPPED,
            "counts": credit.COUNTS,
        },
        "responses": [_facts(each) | {"packed": packed(each, columns)} for each in responses],
    }
    updates = len({each.credit.update for each in responses})
    subtitle = f"loss {about.loss} · {len(responses)} recorded responses, from {updates} updates"
    any_yes_no = "".join(f'<option value="{value}">{value or "any"}</option>' for value in ("", "yes", "no"))
    body = _BODY.format(subtitle=html.escape(subtitle), any_yes_no=any_yes_no)
    scripts = [asset(name) for name in ("credit_data.js", "credit_pane.js", "credit.js")]
    scripts.append(f"credit.start({in_script(data)});\n")
    return page(f"Credit · {run_name} · step {about.step}", body, scripts, asset("credit.css"))


def _facts(response: CreditResponse) -> dict[str, Any]:
    found = {name: _plain(value) for name, value in response.facts.items()}
    truncated = response.facts["finish_reason"] in TRUNCATED
    return found | {"tokens": len(response.token_ids), "truncated": truncated}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
