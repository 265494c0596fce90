"""Why: a page can be right in every byte and show nothing. A real Chromium opens comparison.html as a file, on a
telephone and on a desk, in light and dark.

Not covered: other browsers; the charts' own look, which the report's test has.
"""

from pathlib import Path

import pytest

from megatron_fipo.compare import main
from tests.comparison.fake_runs import make_run
from tools.report_picture import browser, browser_files, show

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser_files() is None, reason="chromium and chromedriver were not found"),
]

BANDS = "return [...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll('.fills path').length)"


def test_the_page_shows_curves_with_bands_and_no_error(tmp_path: Path) -> None:
    for algorithm, last in (("fipo", 4), ("dapo", 3)):
        for seed in (1, 2):
            found = {0: [seed, 0] * 10, 10: [seed, 2] * 10, 20: [last, 1] * 10}
            make_run(tmp_path / "runs" / f"{algorithm}-{seed}", found, f"algorithm={algorithm}", f"run.seed={seed}")
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path)]) == 0
    page = tmp_path / "comparison.html"
    assert page.stat().st_size < 6e6
    with browser() as chrome:
        for width, scheme in ((1280, "light"), (390, "dark")):
            show(chrome, page, width, scheme)
            assert chrome.get_log("browser") == []
            widest, shown = chrome.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert widest <= shown, f"at {width} pixels the page is wider than the window"
            drawn = dict(zip(chrome.execute_script(TITLES), chrome.execute_script(BANDS), strict=True))
            assert drawn["Held-out avg@k"] == 2, "a band for each group"
            assert "fipo is above dapo" in (text := chrome.find_element("tag name", "body").text)
            assert "algorithm.loss_mode" in text and "What differs" in text


TITLES = "return [...document.querySelectorAll('.plot')].map((plot) => plot.parentElement.dataset.title)"
