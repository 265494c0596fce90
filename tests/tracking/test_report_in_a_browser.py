"""Why: a page can be right in every byte and show nothing. Here a real Chromium opens report.html as a file, as people
do, in light and dark, on a telephone and on a desk.

Not covered: other browsers; whether a picture is beautiful (tools/report_picture.py takes one to look at).
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from megatron_fipo.config.configure import load_config
from megatron_fipo.tracking.console import Span
from megatron_fipo.tracking.panels import ENGINES, PHASES
from megatron_fipo.tracking.report import Report
from megatron_fipo.tracking.rollout_log import log_rollouts
from tests.distributed import ROOT
from tests.tracking.groups import make_group
from tools.report_picture import browser, browser_files, show

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser_files() is None, reason="chromium and chromedriver were not found"),
]

STEPS = 12
# Charts in which two labels of a kind lie on each other.
OVERLAPS = """
const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
const boxes = (plot, kind) => [...plot.querySelectorAll(kind)].map((text) => text.getBoundingClientRect());
const met = (all) => all.some((a, index) => all.slice(index + 1).some((b) => meet(a, b)));
return [...document.querySelectorAll('.plot')]
  .filter((plot) => ['.xtick text', '.ytick text', '.legendtext'].some((kind) => met(boxes(plot, kind))))
  .map((plot) => plot.parentElement.dataset.title);"""
# Charts that cut some text off.
CUT_OFF = """
const out = (box, frame) =>
  box.width && (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1);
return [...document.querySelectorAll('.plot')].filter((plot) => [...plot.querySelectorAll('text')]
  .some((text) => out(text.getBoundingClientRect(), plot.getBoundingClientRect())))
  .map((plot) => plot.parentElement.dataset.title);"""
# The legend's colour of each name in a chart with bars, and the bars' own.
COLOURS = """
const plot = document.querySelector(`figure[data-title='${arguments[0]}'] .plot`);
const fill = (element) => element && getComputedStyle(element).fill;
const legend = [...plot.querySelectorAll('.legend .traces')]
  .map((entry) => [entry.querySelector('.legendtext').textContent, fill(entry.querySelector('.legendpoints path'))]);
const bars = [...plot.querySelectorAll('.barlayer .trace')]
  .map((trace) => [trace.__data__[0].trace.name, fill(trace.querySelector('.point path'))]);
return [legend, bars];"""
# The least contrast of a text to its card, as WCAG 2 defines it: 4.5 and more is readable.
CONTRAST = """
const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => linear(Number(part) / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const card = light(getComputedStyle(document.querySelector('.chart')).backgroundColor);
return Math.min(...[...document.querySelectorAll('.plot text, figcaption, .tile b, .tile span')].map((text) => {
  const own = light(getComputedStyle(text)[text instanceof SVGElement ? 'fill' : 'color']);
  return (Math.max(own, card) + 0.05) / (Math.min(own, card) + 0.05);
}));"""


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as opened:
        yield opened


def step_row(step: int) -> dict[str, float]:
    done = step / STEPS
    names = [
        "groups_dropped_all_right",
        "groups_dropped_all_wrong",
        "seconds_sample",
        "seconds_verify",
        "seconds_update",
    ]
    return {
        **{
            "step": step,
            "reward_mean": 0.125 * step,
            "accuracy": done,
            "seconds_step": 4.0,
            **dict.fromkeys(names, 1.0),
        },
        **{"response_length_mean": 20e3 * done, "response_length_q25": 18e3 * done, "response_length_q75": 22e3 * done},
        **{f"response_length_{of}_q{q}": 1e3 * done * q for of in ("right", "wrong") for q in (10, 50, 90)},
        **{"marker_share_reflection": done, "repeated_ngrams": 0.1, "latex_padding": 0.01},
        **{"influence_weights_mean": 1.0, "influence_weights_std": 0.05, "influence_clipfrac_low": 0.01},
        **{"influence_clipfrac_high": 0.02 * done, "grad_norm": 0.1, "ppo_kl": 1e-5 * (-1) ** step},
        **{"log_prob_diff_mean": 1e-7, "log_prob_diff_quarter_1": 2e-7, "log_prob_diff_quarter_4": 3e-7 * done},
    }


def new_report(directory: Path) -> Report:
    directory.mkdir(exist_ok=True)
    settings = [f"run.directory={directory}", f"run.steps={STEPS}", "validation.samples=4"]
    return Report(directory, load_config(settings), pytest.fail)


def write_run(directory: Path, steps: int) -> None:
    report = new_report(directory)
    with report:
        log_rollouts(directory, 0, [make_group("98", "9")], 2, str, of="validation")
        accuracies = {"accuracy": 0.25, "cons_at_k": 0.5, "pass_at_k": 0.75, "response_length_mean": 21.0}
        report.add_validation({"step": 0, **accuracies, "seconds_validate": 2.5}, [Span("start", 1e9, 20.0)])
        for step in range(1, steps + 1):
            log_rollouts(directory, step, [make_group("98", "9")], 2, str)
            begin = 1e9 + 20 + 4 * step
            phases = ("sample", "verify", "log-probs", "update", "weights", "validate", "checkpoint")
            spans = [Span(phase, begin + index / 2, 0.5) for index, phase in enumerate(phases)]
            report.add_step(step_row(step), [*spans, Span("engines", begin, 3.0)])
        report.finish(200.0, [])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    write_run(directory, STEPS)
    return directory


def curves(chrome: Chrome) -> int:
    """Points and bars of all charts."""
    return len(chrome.find_elements(By.CSS_SELECTOR, ".plot .point"))


def hover(chrome: Chrome, title: str, what: str) -> str:
    """What the chart of this title says where the mouse is in the middle of `what`, a CSS selector."""
    place = chrome.find_elements(By.CSS_SELECTOR, f"figure[data-title='{title}'] {what}")[0]
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)
    ActionChains(chrome).move_to_element(place).perform()
    selector = f"figure[data-title='{title}'] .hoverlayer text"
    said = WebDriverWait(chrome, 10).until(lambda page: page.find_elements(By.CSS_SELECTOR, selector))
    return " ".join(element.get_attribute("textContent") or "" for element in said)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_and_can_be_read(chrome: Chrome, run: Path, width: int, scheme: str) -> None:
    show(chrome, run / "report.html", width, scheme)
    assert chrome.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert chrome.execute_script(OVERLAPS) == []
    assert chrome.execute_script(CUT_OFF) == []
    assert chrome.execute_script(CONTRAST) >= 4.5
    background = chrome.find_element(By.CSS_SELECTOR, ".plot .bg, .plot .main-svg").get_attribute("style")
    page = chrome.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    is_light = {"light": True, "dark": False}[scheme]
    assert ("255, 255, 255" in (background or "")) == is_light and (page == "rgba(246, 247, 249, 1)") == is_light
    assert chrome.get_log("browser") == []


def test_what_would_not_fit_is_found(chrome: Chrome, run: Path) -> None:
    """The control of the test above."""
    show(chrome, run / "report.html", 390, "light")
    for change in (
        "document.querySelectorAll('.plot text').forEach((text) => { text.style.fontSize = '40px' })",
        "document.querySelector('figcaption').style.color = '#ffff00'",
        "document.getElementById('state').style.width = '500px'",
    ):
        chrome.execute_script(change)
    assert "Reward" in chrome.execute_script(OVERLAPS) and "Reward" in chrome.execute_script(CUT_OFF)
    assert chrome.execute_script(CONTRAST) < 4.5
    assert chrome.execute_script("return document.documentElement.scrollWidth") > 390
    chrome.execute_script("setTimeout(() => { throw new Error('seen') })")
    WebDriverWait(chrome, 10).until(lambda page: "seen" in str(page.get_log("browser")))


def test_values_are_shown_where_the_mouse_is(chrome: Chrome, run: Path) -> None:
    show(chrome, run / "report.html", 1280, "light")
    said = hover(chrome, "Reward", ".nsewdrag")
    assert any(f"{0.125 * step:g}" in said for step in (6, 7)), said  # the middle of 12 steps
    said = hover(chrome, "Accuracy on held-out problems", ".nsewdrag")
    assert all(value in said for value in ("avg@4 : 0.25", "cons@4 : 0.5", "pass@4 : 0.75")), said
    assert "start: 20 s, from 0.0 s on" in hover(chrome, "Timeline of the latest phases", ".point path")
    words = chrome.find_element(By.TAG_NAME, "body").text
    assert (
        f"Finished: {STEPS} steps in 3 min 20 s." in words
        and "avg@4 cons@4 pass@4" in words
        and "0.250 0.500 0.750 21.0 2.5" in words
    )
    link = chrome.find_element(By.CSS_SELECTOR, "#held-out a").get_attribute("href") or ""
    assert link == (run / "samples" / "validation-000000.txt").as_uri()
    assert (run / "samples" / "validation-000000.txt").is_file()


def test_responses_from_early_in_the_middle_and_late_can_be_read(chrome: Chrome, run: Path) -> None:
    show(chrome, run / "report.html", 390, "light")
    found = chrome.find_elements(By.CSS_SELECTOR, "#excerpts details")
    verdicts = [f"step {step}: 3 tokens, {verdict}" for step in (1, 7, 12) for verdict in ("wrong", "right")]
    assert [each.find_element(By.TAG_NAME, "summary").text for each in found] == verdicts
    assert not found[0].find_element(By.TAG_NAME, "pre").is_displayed()
    found[0].find_element(By.TAG_NAME, "summary").click()
    assert found[0].find_element(By.TAG_NAME, "pre").text == "I say 8"
    band = "figure[data-title='Response length by verdict, 10 to 90 % shaded'] .fills path"
    assert len(chrome.find_elements(By.CSS_SELECTOR, band)) >= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_timeline_says_which_colour_is_what(chrome: Chrome, run: Path, scheme: str) -> None:
    """Each row's bars have the colour beside its name, and no other row has it."""
    show(chrome, run / "report.html", 1280, scheme)
    named, drawn = chrome.execute_script(COLOURS, "Timeline of the latest phases")
    assert [name for name, _ in named] == [*PHASES, ENGINES]
    assert len({colour for _, colour in named}) == len(named)
    assert drawn == named
    assert chrome.execute_script(COLOURS, "Reward")[0] != named, "the control: another chart"


def test_the_scheme_can_change_under_an_open_page(chrome: Chrome, run: Path) -> None:
    show(chrome, run / "report.html", 1280, "light")
    fill = "return getComputedStyle(document.querySelector('.xtick text')).fill"
    before = chrome.execute_script(fill)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    WebDriverWait(chrome, 10).until(lambda page: page.execute_script(fill) != before)


def test_curves_are_there_after_one_step_and_grow_without_a_reload(
    chrome: Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_fipo.tracking.report._SHORTEST_INTERVAL_S", 0)
    monkeypatch.setattr("megatron_fipo.tracking.report._SHARE_OF_TIME", 1e9)
    with new_report(tmp_path) as report:
        report.add_step(step_row(1), [Span("sample", 1e9, 1.0)])
        show(chrome, tmp_path / "report.html", 1280, "light")  # written before the first step
        WebDriverWait(chrome, 20).until(lambda page: "1 of 12 steps done" in page.page_source)
        after_one = curves(chrome)
        chrome.execute_script("window.sameDocument = true")
        report.add_step(step_row(2), [])
        WebDriverWait(chrome, 20).until(lambda page: "2 of 12 steps done" in page.page_source)
        assert curves(chrome) > after_one > 10
        assert chrome.execute_script("return window.sameDocument")
        assert not chrome.find_element(By.ID, "note").is_displayed()
        report.finish(200.0, [])
        WebDriverWait(chrome, 20).until(lambda page: "Finished: 2 steps in 3 min 20 s." in page.page_source)
    assert chrome.get_log("browser") == []


def test_a_page_that_is_copied_away_shows_all_or_says_what_it_lacks(chrome: Chrome, run: Path, tmp_path: Path) -> None:
    finished = shutil.copy(run / "report.html", tmp_path / "finished.html")
    show(chrome, Path(finished), 390, "dark")
    assert curves(chrome) > 100 and not chrome.find_element(By.ID, "note").is_displayed()
    report = new_report(tmp_path / "running")
    report.__enter__()
    under_way = shutil.copy(tmp_path / "running" / "report.html", tmp_path)
    chrome.get(Path(under_way).as_uri())
    note = chrome.find_element(By.ID, "note")
    WebDriverWait(chrome, 20).until(lambda page: note.is_displayed())
    assert "report-data.js was not found beside this page" in note.text


def test_a_failed_run_says_why(chrome: Chrome, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="markup"), new_report(tmp_path) as report:
        report.add_step(step_row(1), [])
        raise ValueError("<b>markup</b>")
    show(chrome, tmp_path / "report.html", 390, "light")
    state = chrome.find_element(By.ID, "state")
    assert state.text == "Failed after step 1 of 12: ValueError: <b>markup</b>"
    assert curves(chrome) > 10


def test_pictures_for_the_readme(run: Path, tmp_path: Path) -> None:
    """By the command that docs/report.md names."""
    command = [sys.executable, "tools/report_picture.py", "--to", str(tmp_path)]
    subprocess.run([*command, str(run)], cwd=ROOT, check=True, timeout=120)
    light, dark = ((tmp_path / f"report-{scheme}.png").read_bytes() for scheme in ("light", "dark"))
    assert light != dark and light.startswith(b"\x89PNG") and max(len(light), len(dark)) < 200_000
    refused = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1) and "report.html was not found" in refused.stderr
