"""Take the README's pictures of a report.html: docs/report-light.png and docs/report-dark.png.

python tools/report_picture.py RUN            pictures of the run in that directory
python tools/report_picture.py RUN --to DIR   writes them to DIR instead

It needs Chromium and chromedriver on the path. On Debian and Ubuntu: apt-get install chromium chromium-driver.
"""

import argparse
import base64
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

_DOCS = Path(__file__).resolve().parent.parent / "docs"
_WIDTH, _HEIGHT = 1280, 850
_DRAWN = "return document.querySelectorAll('.plot .main-svg').length > 0"
_TIMEOUT_S = 60


def browser_files() -> tuple[str, str] | None:
    """Return the paths of Chromium and its driver, or None if one is missing."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


@contextmanager
def browser() -> Iterator[Chrome]:
    """Provide a Chromium without a window. Raises FileNotFoundError if none is installed."""
    found = browser_files()
    if found is None:
        raise FileNotFoundError("chromium and chromedriver were not found: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = found[0]
    # Its sandbox does not work as root and in most containers, and the pages are our own. /dev/shm is small there.
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(found[1]))
    try:
        yield chrome
    finally:
        chrome.quit()


def show(chrome: Chrome, page: Path, width: int, scheme: str, drawn: str = _DRAWN) -> None:
    """Open a page in a window of `width` pixels, with `scheme` light or dark, and wait until its charts are drawn.

    `drawn` is JavaScript that returns whether they are.
    """
    size = {"width": width, "height": _HEIGHT, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    chrome.get(page.resolve().as_uri())
    WebDriverWait(chrome, _TIMEOUT_S).until(lambda open_page: open_page.execute_script(drawn))


def picture(chrome: Chrome, height: int = _HEIGHT) -> bytes:
    """Return the upper part of the page as PNG."""
    width = chrome.execute_script("return innerWidth")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    options: dict[str, Any] = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    return base64.b64decode(chrome.execute_cdp_cmd("Page.captureScreenshot", options)["data"])


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--to", type=Path, default=_DOCS, help="directory for the pictures")
    arguments = parser.parse_args()
    page = arguments.run / "report.html"
    if not page.is_file():
        sys.exit(f"error: {page} was not found: give the directory of a run")
    try:
        with browser() as chrome:
            for scheme in ("light", "dark"):
                show(chrome, page, _WIDTH, scheme)
                path = arguments.to / f"report-{scheme}.png"
                path.write_bytes(picture(chrome))
                print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
