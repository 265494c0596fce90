"""Why: only a browser unpacks the page's values. A real Chromium opens credit.html as a file, in light and dark, on a
telephone and on a desk, and what it shows is compared with the values that were written.

Not covered: other browsers; whether a picture is beautiful.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from megatron_fipo.credit_page.page import credit_page
from megatron_fipo.records.credit import TAKES_PART
from megatron_fipo.tracking.credit_file import CreditResponse
from tests.credit_page.made_up import ABOUT, GAMMA, response
from tools.report_picture import browser, browser_files, show

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser_files() is None, reason="chromium and chromedriver were not found"),
]

OPENED = "return document.getElementById('panes').dataset.openedMs !== undefined"
COLOURED = "return [...document.querySelectorAll('.text [data-token]')].filter((each) => each.style.background).length"
RESPONSES = [response(place, 700) for place in range(12)]
OPEN = 8
"""The response that the page opens by itself: the first one of the step's last update."""


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as found:
        yield found


def opened(chrome: Chrome, directory: Path, responses: list[CreditResponse], width: int = 1280) -> None:
    path = directory / "credit.html"
    path.write_text(credit_page("run", ABOUT, responses))
    show(chrome, path, width, "light", OPENED)


def press(chrome: Chrome, place: int) -> None:
    """Open a response by its button, and wait until it is there."""
    chrome.execute_script("delete document.getElementById('panes').dataset.openedMs")
    button = chrome.find_elements(By.CSS_SELECTOR, "#responses button")[place]
    chrome.execute_script("arguments[0].click()", button)
    WebDriverWait(chrome, 20).until(lambda page: page.execute_script(OPENED))


def shown(chrome: Chrome) -> dict[str, str]:
    """The values that the page shows of the present token."""
    texts = "return [...document.querySelectorAll(`#token ${arguments[0]}`)].map((each) => each.textContent)"
    return dict(zip(chrome.execute_script(texts, "dt"), chrome.execute_script(texts, "dd"), strict=True))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_it_opens_without_errors_and_fits(chrome: Chrome, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "credit.html"
    path.write_text(credit_page("run", ABOUT, RESPONSES))
    chrome.get_log("browser")
    show(chrome, path, width, scheme, OPENED)
    assert chrome.get_log("browser") == []
    widest, window = chrome.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widest <= window, f"at {width} pixels the page is wider than the window"
    assert chrome.find_element(By.CLASS_NAME, "text").text.startswith("".join(RESPONSES[OPEN].tokens[:5]).strip()[:8])
    assert chrome.execute_script(COLOURED) > 200
    drawn = "const c = document.querySelector('.strip');"
    drawn += "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((byte) => byte > 0)"
    assert chrome.execute_script(drawn), "the strip is empty"


def test_the_checks_see_damage_and_missing_colour(chrome: Chrome, tmp_path: Path) -> None:
    """Negative controls: data that cannot be unpacked is an error, and weights of 1 have no colour."""
    path = tmp_path / "credit.html"
    path.write_text(re.sub(r'"packed":"....', '"packed":"AAAA', credit_page("run", ABOUT, RESPONSES)))
    chrome.get_log("browser")
    chrome.get(path.as_uri())
    WebDriverWait(chrome, 20).until(lambda page: page.get_log("browser"))
    flat = RESPONSES[OPEN]
    values = dict(flat.credit.values) | {"influence": numpy.ones(len(flat.token_ids), numpy.float32)}
    opened(chrome, tmp_path, [replace(flat, credit=replace(flat.credit, values=values))])
    assert chrome.execute_script(COLOURED) == 0


def test_a_token_has_its_values_and_what_its_f_comes_from(chrome: Chrome, tmp_path: Path) -> None:
    opened(chrome, tmp_path, RESPONSES)
    token = 40
    ActionChains(chrome).move_to_element(chrome.find_element(By.CSS_SELECTOR, f"[data-token='{token}']")).perform()
    found, credit = shown(chrome), RESPONSES[OPEN].credit
    for name, key in {"influence f": "influence", "future-KL F": "future_kl", "entropy": "entropy"}.items():
        assert float(found[name]) == pytest.approx(float(credit.values[key][token]), rel=0.005, abs=2e-6)
    ratio = float(numpy.exp(credit.values["log_ratio"][token]))
    assert float(found["ratio π / π_old"]) == pytest.approx(ratio, rel=1e-3)
    distance = numpy.arange(len(credit.state) - token)
    terms = GAMMA**distance * credit.values["log_ratio"][token:] * ((credit.state[token:] & TAKES_PART) > 0)
    wanted = set((token + numpy.argsort(-abs(terms))[:12]).tolist())
    marked = chrome.execute_script(
        "return [...document.querySelectorAll('.text .source')].map((span) => Number(span.dataset.token))"
    )
    assert len(marked) == 12 and len(wanted & set(marked)) >= 11, "rounding may exchange the last two"


def test_keys_go_from_token_to_token(chrome: Chrome, tmp_path: Path) -> None:
    opened(chrome, tmp_path, RESPONSES)
    text = chrome.find_element(By.CLASS_NAME, "text")
    text.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "token 3" in shown(chrome)
    text.send_keys(Keys.END)
    assert "token 700" in shown(chrome) and chrome.execute_script("return arguments[0].scrollTop", text) > 0


def test_filters_and_siblings(chrome: Chrome, tmp_path: Path) -> None:
    dropped = replace(RESPONSES[3], facts=dict(RESPONSES[3].facts) | {"dropped": True})
    opened(chrome, tmp_path, [*RESPONSES[:3], dropped, *RESPONSES[4:]])

    def listed() -> int:
        buttons = "[...document.querySelectorAll('#responses button')]"
        return int(chrome.execute_script(f"return {buttons}.filter((each) => each.offsetHeight > 0).length"))

    for name, value, count in (("truncated", "yes", 3), ("dropped", "yes", 1), ("finish", "stop", 9)):
        Select(chrome.find_element(By.ID, name)).select_by_value(value)
        assert listed() == count, name
        Select(chrome.find_element(By.ID, name)).select_by_index(0)
    for name, value, count in (("reward-low", "0.5", 6), ("length-high", "699", 0)):
        chrome.find_element(By.ID, name).send_keys(value)
        assert listed() == count, name
        chrome.execute_script("arguments[0].value = ''", chrome.find_element(By.ID, name))
    chrome.find_element(By.ID, "siblings").click()
    press(chrome, 5)
    panes = "[...document.querySelectorAll('.pane')]"
    left = chrome.execute_script(f"return {panes}.map((pane) => pane.getBoundingClientRect().left)")
    assert len(left) == 4 and len(set(left)) > 1, "siblings are beside each other"


def test_20000_tokens_open_within_a_second(chrome: Chrome, tmp_path: Path) -> None:
    """The best of three: the machine may be busy."""
    opened(chrome, tmp_path, [*RESPONSES, *(response(place, 20_000) for place in range(12, 15))])
    times = []
    for place in (12, 13, 14):
        press(chrome, place)
        times.append(int(chrome.execute_script("return document.getElementById('panes').dataset.openedMs")))
        spans = chrome.execute_script("return document.querySelectorAll('[data-token]').length")
        assert 0 < spans < 10_000, "only what is in view is drawn"
    print(f"20,000 tokens opened in {times} ms")
    assert min(times) < 1000, times
