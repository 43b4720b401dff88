"""The report in headless Chromium: no errors, nothing wider than the screen, light and dark, filters that work.

Run with `-m browser`: needs selenium (`pip install '.[browser]'`), Chromium and chromedriver. With MPD_SCREENSHOTS=DIR
pictures of what was seen are left there.
"""

import os
import shutil
from pathlib import Path

import pytest

from mpd_jax.data.chat import Chat
from mpd_jax.data.contexts import Contexts
from mpd_jax.report import command, examples
from mpd_jax.roles import TINY
from tests.run_files import PROBLEMS, write_run

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver")
    chromedriver = shutil.which("chromedriver")
    if CHROMIUM is None or chromedriver is None:
        pytest.skip("no Chromium, or no chromedriver, on the path")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = selenium.Chrome(options=options, service=selenium.ChromeService(chromedriver))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Of one run and of two, or of those that MPD_REPORT_RUNS names."""
    there = tmp_path_factory.mktemp("reports")
    if named := os.environ.get("MPD_REPORT_RUNS"):
        runs = named.split()
    else:
        encode = Chat(TINY / "student", {0}, True, Contexts()).encode
        runs = [str(write_run(there / name, encode, saved=saved)) for name, saved in (("a", 60), ("b", 30))]
    with pytest.MonkeyPatch.context() as patch:
        if not named:
            patch.setattr(examples.build, "read_problems", lambda config, split: PROBLEMS)
        return {
            "one": command.run(runs[:1], str(there / "one.html")),
            "several": command.run(runs, str(there / "several.html")),
        }


def opened(driver, path: Path, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", OFFLINE)
    driver.get(path.resolve().as_uri())


OFFLINE = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}


def picture(driver, name: str) -> None:
    if directory := os.environ.get("MPD_SCREENSHOTS"):
        Path(directory).mkdir(parents=True, exist_ok=True)
        driver.get_screenshot_as_file(f"{directory}/{name}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["one", "several"])
def test_it_opens_without_errors_and_fits_the_screen(driver, pages, which, size, scheme):
    opened(driver, pages[which], size, scheme)
    assert driver.get_log("browser") == []
    wide, seen = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert seen == SIZES[size][0] and wide <= seen
    light = driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    for number, section in enumerate(("headline", "accuracy", "lengths", "training", "examples", "config", "sources")):
        driver.execute_script("document.getElementById(arguments[0]).scrollIntoView()", section)
        if section == "examples":
            driver.execute_script("document.querySelector('.example').open = true")
        picture(driver, f"{which}_{size}_{scheme}_{number}_{section}")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= seen


# Letters that a chart draws over each other or outside of its picture, as [chart, text].
COLLISIONS = """
const found = [];
for (const svg of document.querySelectorAll("figure > svg")) {
  const frame = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([text, box], i) => {
    const outside = box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
    const covered = boxes.slice(i + 1).some(([, other]) => box.left < other.right && other.left < box.right
      && box.top + 3 < other.bottom && other.top + 3 < box.bottom);
    if (outside || covered) found.push([svg.getAttribute("aria-label"), text]);
  });
}
return found;
"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["one", "several"])
def test_no_letters_of_a_chart_lie_over_others_or_outside(driver, pages, which, size):
    opened(driver, pages[which], size, "light")
    assert driver.execute_script(COLLISIONS) == []


def shown(driver) -> list[dict[str, str]]:
    return driver.execute_script(
        "return [...document.querySelectorAll('.example')].filter(e => e.offsetParent).map(e => ({...e.dataset}))"
    )


def chosen(driver, name: str, value: str) -> None:
    driver.execute_script(
        "const s = document.querySelector(`select[name=${arguments[0]}]`); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change', {bubbles: true}))",
        name,
        value,
    )


def test_filters_show_what_they_say_alone_and_together(driver, pages):
    opened(driver, pages["several"], "desktop", "light")
    everything = shown(driver)
    assert len(everything) > 8
    offered = driver.execute_script(
        "return [...document.querySelectorAll('#filters select')].map(s => [s.name, [...s.options].map(o => o.value)])"
    )
    assert {"run", "source", "verdict", "change"} <= {name for name, _ in offered}
    for name, values in offered:
        for value in filter(None, values):
            chosen(driver, name, value)
            found = shown(driver)
            assert found == [row for row in everything if row[name] == value] != []
            told = driver.execute_script("return document.getElementById('found').textContent")
            assert told == f"{len(found)} of {len(everything)}"
        chosen(driver, name, "")
    row = next(row for row in everything if row["verdict"] and row["change"])
    chosen(driver, "verdict", row["verdict"])
    chosen(driver, "change", row["change"])
    both = [r for r in everything if (r["verdict"], r["change"]) == (row["verdict"], row["change"])]
    assert shown(driver) == both
    assert driver.get_log("browser") == []
