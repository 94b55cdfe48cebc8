"""A real browser opens the report: it works, logs no error, asks the network for nothing, and runs no file name."""

import json
import os
import shutil

import pytest
from written_runs import NASTY, write_run

from odcft.progress import Progress
from odcft.reports.run_report import report
from odcft.reports.two_runs import compare_runs

pytestmark = pytest.mark.slow
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1280,1000", "--disable-dev-shm-usage"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium; skipped without it, unless ODCFT_TEST_BROWSER=required."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    why = "" if chromium and driver else "there is no chromium with chromedriver on this machine"
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        why = why or "selenium is not installed"
    if why and os.environ.get("ODCFT_TEST_BROWSER") == "required":
        pytest.fail(f"{why}, and ODCFT_TEST_BROWSER=required forbids to skip this test")
    if why:
        pytest.skip(why)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    running.set_page_load_timeout(120)
    yield running
    running.quit()


@pytest.fixture
def opened(browser):
    """A function that opens a page; at the end of the test, nothing was logged and nothing asked of the network."""

    def open_page(path):
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(path.as_uri())
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url.partition(":")[0] for url in asked if not url.startswith("chrome")} <= {"file", "data"}


def js(browser, code, *args):
    return browser.execute_script(f"return {code}", *args)


def texts(browser, selector):
    return js(browser, "[...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())", selector)


def click(browser, selector):
    js(browser, "document.querySelector(arguments[0]).click()", selector)


def wait_for(browser, code):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda _: js(browser, code))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of 300 images in 50 clusters, some of which have names that want to be code."""
    folder = tmp_path_factory.mktemp("page")
    names = [*NASTY, *(f"more/{i:03d}.png" for i in range(300 - len(NASTY)))]
    run = write_run(folder, names, clusters=50)
    report(run, labels=str(folder / "images"), sample=0, progress=Progress(quiet=True))
    return run / "report.html"


def test_sorting_paging_and_searching(opened, page):
    browser = opened(page)
    title = browser.title
    heads = ".row-head button"
    assert len(texts(browser, heads)) == 20
    assert texts(browser, heads)[0] == "Cluster 0"
    click(browser, "#next")
    assert texts(browser, heads)[0] == "Cluster 20"
    click(browser, "#next")
    assert len(texts(browser, heads)) == 10
    assert js(browser, "document.getElementById('next').disabled")
    click(browser, "#previous")
    assert texts(browser, "#page-count") == ["of 3"]
    option = "[...document.getElementById('sort').options].find(o => o.text === arguments[0])"
    js(browser, f"{option}.selected = true", "tightness, loosest first")
    js(browser, "document.getElementById('sort').dispatchEvent(new Event('change'))")
    tight = [float(t.removeprefix("tightness ")) for t in texts(browser, ".row-head span") if t.startswith("tightness")]
    assert tight == sorted(tight)
    assert len(set(tight)) > 5
    find = "(e => { e.value = arguments[0]; e.dispatchEvent(new Event('input')) })(document.getElementById('search'))"
    js(browser, find, "КОШКА")
    wait_for(browser, "document.getElementById('count').textContent.startsWith('1 of 300')")
    assert js(browser, "document.querySelector('#rows img').alt") == "кошка на окне.png"
    js(browser, find, "more/0")
    wait_for(browser, "document.getElementById('count').textContent.startsWith('100 of 300')")
    js(browser, find, "")
    wait_for(browser, "document.querySelectorAll('.row').length === 20")
    assert browser.title == title  # no name has run


def test_clusters_and_images_open_and_names_stay_text(opened, page):
    browser = opened(page)
    assert texts(browser, "#opened-title") == [""]
    click(browser, "[data-cluster]")
    assert js(browser, "document.getElementById('opened').open")
    assert texts(browser, "#opened-title") == ["Cluster 0"]
    inside = "#opened [data-image]"
    assert len(texts(browser, inside)) == 6
    click(browser, inside)
    assert texts(browser, "#opened-title") == [NASTY[0]]
    assert not js(browser, "document.getElementById('back').hidden")
    click(browser, "#back")
    assert texts(browser, "#opened-title") == ["Cluster 0"]
    click(browser, "#close")
    assert not js(browser, "document.getElementById('opened').open")
    press = "new MouseEvent('click', {bubbles: true, cancelable: true})"
    js(browser, f"document.querySelector('.map a').dispatchEvent({press})")
    assert texts(browser, "#opened-title")[0].startswith("Cluster ")
    shown = js(browser, "[...document.querySelectorAll('.picture img')].every(i => i.alt.length > 0)")
    assert shown
    assert js(browser, "document.title").startswith("Fine-tuning report")


def test_the_keyboard_suffices_and_a_phone_needs_no_sideways_scrolling(opened, page):
    from selenium.webdriver import ActionChains, Keys

    browser = opened(page)
    js(browser, "document.querySelector('.row [data-image]').focus()")
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert js(browser, "document.getElementById('opened').open")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not js(browser, "document.getElementById('opened').open")
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert js(browser, "document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_text_has_contrast_in_light_and_in_dark(opened, page):
    """WCAG AA: 4.5 to 1 for text on the backgrounds it stands on."""
    browser = opened(page)
    code = """(() => {
      const style = getComputedStyle(document.documentElement);
      const light = (name) => {
        const probe = document.createElement('span');
        probe.style.color = style.getPropertyValue(name);
        document.body.append(probe);
        const rgb = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
        probe.remove();
        const [r, g, b] = rgb.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const pairs = [['--ink', '--paper'], ['--ink', '--raised'], ['--ink', '--bad-paper'], ['--link', '--paper'],
        ['--soft', '--paper'], ['--soft', '--raised'], ['--good', '--good-paper'], ['--good', '--raised'],
        ['--bad', '--bad-paper']];
      const ratio = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
      return pairs.map(([a, b]) => [a, b, ratio(light(a), light(b))]);
    })()"""
    for theme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        found = js(browser, code)
        assert all(ratio >= 4.5 for *_, ratio in found), (theme, found)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_comparison_and_pictures_beside_the_page(opened, tmp_path):
    one = write_run(tmp_path / "a", [f"{i:03d}.png" for i in range(60)], clusters=4)
    other = write_run(tmp_path / "b", [f"{i:03d}.png" for i in range(60)], clusters=5)
    quiet = Progress(quiet=True)
    compare_runs(one, other, tmp_path / "both.html", progress=quiet)
    browser = opened(tmp_path / "both.html")
    click(browser, "#rows [data-image]")
    assert [text for text in texts(browser, "#opened h3") if text.startswith("In ")] == [f"In {one}", f"In {other}"]
    report(one, out=tmp_path / "beside.html", megabytes=0.001, all_pictures=True, sample=0, progress=quiet)
    browser = opened(tmp_path / "beside.html")
    wait_for(browser, "[...document.querySelectorAll('#rows img')].every(i => i.complete && i.naturalWidth > 0)")
    assert js(browser, "document.querySelectorAll('#rows img').length") > 0
