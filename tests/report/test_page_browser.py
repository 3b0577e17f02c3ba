"""The page in Chromium: nothing is fetched, nothing fails, tables sort, small screens and paper have room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="the browser is driven by selenium, of the dev extra")
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver (apt install chromium chromium-driver)"
)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for option in (*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    try:
        show(driver, page, 1400, "light")
        yield driver
    finally:
        driver.quit()


def show(browser: Chrome, page: Path, width: int, scheme: str) -> None:
    """Loads the page in a window of that width."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get((page / "report.html").as_uri())


def messages(browser: Chrome) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        yield message["method"], message["params"]


def column(browser: Chrome, table: str, index: int) -> list[str]:
    """The cells' exact values where they are numbers, else their text; of rows that have the column."""
    script = """
      const rows = [...document.getElementById(arguments[0]).tBodies[0].rows];
      return rows.map((row) => row.cells[arguments[1]]).map((cell) => !cell || cell.colSpan > 1 ? null :
        (cell.querySelector("data")?.value ?? cell.textContent));
    """
    found: list[str] = browser.execute_script(script, table, index)
    return found


def header(browser: Chrome, table: str, title: str) -> tuple[int, WebElement]:
    heads = browser.find_elements(By.CSS_SELECTOR, f"#{table} thead th")
    index = next(i for i, head in enumerate(heads) if head.text.split("\n")[0].strip("↕↑↓") == title)
    return index, heads[index]


def test_it_renders_without_errors_and_without_a_network(browser: Chrome, page: Path) -> None:
    show(browser, page, 1400, "light")
    sent = [params for method, params in messages(browser) if method == "Network.requestWillBeSent"]
    asked = [params["request"]["url"] for params in sent if params["documentURL"].startswith("file:")]
    assert asked and not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert browser.get_log("browser") == []
    assert "SAMPLE" in browser.title
    assert browser.execute_script("return document.images.length + document.styleSheets.length") == 1


def test_a_hostile_script_would_not_run(browser: Chrome, page: Path) -> None:
    show(browser, page, 1400, "light")
    browser.execute_script(
        "const s = document.createElement('script'); s.text = 'window.ran = 1'; document.body.append(s)"
    )
    assert browser.execute_script("return window.ran === undefined")
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


def test_tables_sort_by_click_numbers_by_value_and_what_is_missing_last(browser: Chrome, page: Path) -> None:
    show(browser, page, 1400, "light")
    index, head = header(browser, "summary-table", "size")
    before = column(browser, "summary-table", index)
    head.find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    up = column(browser, "summary-table", index)
    assert up[-1] is None, "the failed point"
    assert [float(x) for x in up[:-1]] == sorted(float(x) for x in before if x is not None)
    head.find_element(By.TAG_NAME, "button").click()
    down = column(browser, "summary-table", index)
    assert head.get_attribute("aria-sort") == "descending"
    assert down == [*up[:-1][::-1], None] or [float(x) for x in down[:-1]] == sorted(
        map(float, up[:-1]), reverse=True
    )


def test_tables_sort_by_keyboard_and_by_one_column_at_a_time(browser: Chrome, page: Path) -> None:
    show(browser, page, 1400, "light")
    _, first = header(browser, "summary-table", "size")
    first.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    index, head = header(browser, "summary-table", "point")
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert first.get_attribute("aria-sort") is None and head.get_attribute("aria-sort") == "ascending"
    names = column(browser, "summary-table", index)
    assert names[0].startswith("f16") and names[-1].startswith("llama.cpp Q8_0") and len(names) == 10


def test_pictures_have_names_and_descriptions(browser: Chrome, page: Path) -> None:
    show(browser, page, 1400, "light")
    pictures = [p for p in browser.find_elements(By.CSS_SELECTOR, "figure svg") if p.is_displayed()]
    figures = browser.find_elements(By.TAG_NAME, "figure")
    assert len(pictures) == len(figures) > 12, "of the two sizes one is shown"
    for picture in pictures:
        assert picture.aria_role in ("img", "image") and len(picture.accessible_name) > 30


@pytest.mark.parametrize("width", [420, 700, 1400])
def test_the_page_is_not_wider_than_the_screen(browser: Chrome, page: Path, width: int) -> None:
    show(browser, page, width, "dark")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    script = """
      const inside = (e) => e.closest(".scroll, nav, svg, details:not([open])");
      return [...document.querySelectorAll("body *")].filter((e) => !inside(e))
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80));
    """
    assert browser.execute_script(script) == []


@pytest.mark.parametrize("width", [420, 1400])
def test_texts_of_pictures_stay_inside_and_are_large_enough(browser: Chrome, page: Path, width: int) -> None:
    show(browser, page, width, "light")
    script = """
      const all = [...document.querySelectorAll("figure svg text")];
      return all.filter((t) => t.getClientRects().length).map((t) => {
        const [box, frame] = [t.getBoundingClientRect(), t.closest("figure").getBoundingClientRect()];
        const scale = t.closest("svg").getScreenCTM().a;
        return [t.textContent, box.left >= frame.left - 1 && box.right <= frame.right + 1,
                parseFloat(getComputedStyle(t).fontSize) * scale];
      });
    """
    texts = browser.execute_script(script)
    assert len(texts) > 200
    assert not [text for text, inside, _ in texts if not inside]
    assert min(size for _, _, size in texts) >= 9.5


def test_light_and_dark_differ_and_pictures_follow(browser: Chrome, page: Path) -> None:
    seen = []
    for scheme in ("light", "dark"):
        show(browser, page, 1400, scheme)
        script = """
          const text = document.querySelector("figure svg text");
          return [getComputedStyle(document.body).backgroundColor, getComputedStyle(text).fill];
        """
        seen.append(browser.execute_script(script))
    (light_back, light_text), (dark_back, dark_text) = seen
    assert light_back != dark_back and light_text != dark_text


def test_paper_is_light_and_shows_what_is_folded(browser: Chrome, page: Path) -> None:
    show(browser, page, 1400, "dark")
    script = "return [...document.querySelectorAll('details.group')].filter((d) => d.open).length"
    before = browser.execute_script(script)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert (
        browser.execute_script(script)
        == len(browser.find_elements(By.CSS_SELECTOR, "details.group"))
        > before
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    body, table = (browser.find_element(By.CSS_SELECTOR, name) for name in ("body", ".scroll"))
    assert body.value_of_css_property("background-color") in ("rgb(255, 255, 255)", "rgba(255, 255, 255, 1)")
    assert table.value_of_css_property("overflow-x") == "visible"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(script) == before
