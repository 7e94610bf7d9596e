"""The page in headless Chromium, as a visitor sees it, on a phone and on a desktop."""

import io
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = os.environ.get("PGSEG_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
try:
    from playwright import sync_api
except ImportError:
    MISSING = "playwright (pip install pgseg-hf[browser])"
else:
    MISSING = "" if CHROMIUM else "Chromium (apt-get install chromium, or its path in PGSEG_CHROMIUM)"
if MISSING and os.environ.get("PGSEG_REQUIRE_BROWSER", "0") == "1":
    raise RuntimeError(f"PGSEG_REQUIRE_BROWSER=1, but there is no {MISSING}")
if MISSING:
    pytest.skip(f"needs {MISSING}", allow_module_level=True)

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
PATIENCE_MS = 60_000
# No updates and no telemetry: without a network they wait for it, and on some machines they block the browser's other
# connections.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory) -> Path:
    folder = os.environ.get("PGSEG_SCREENSHOTS")
    path = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    path.mkdir(parents=True, exist_ok=True)
    return path


class Visit:
    """A page, with the errors of its console and its requests to other servers."""

    def __init__(self, browser, server, size: str, theme: str):
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, has_touch=size == "phone"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.problems: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self._count(request.url, server.url))
        self.page.goto(f"{server.url}?__theme={theme}")
        self.page.get_by_role("button", name="Segment", exact=True).wait_for()

    def _note(self, message) -> None:
        if message.type == "error":
            self.problems.append(f"{message.text} ({message.location.get('url')})")

    def _count(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:")):
            self.elsewhere.append(url)

    def segment(self, words: str) -> None:
        self.page.get_by_label("Labels, separated by commas or lines").fill(words)
        self.page.get_by_role("button", name="Segment", exact=True).click()

    def upload(self, path: str) -> None:
        image = self.page.locator("#image")
        image.locator("img").first.wait_for()
        image.get_by_role("button", name=re.compile("clear|remove", re.IGNORECASE)).click()
        image.locator("input[type=file]").set_input_files(path)
        image.locator("img").first.wait_for()

    def wait_until_results_are_in_view(self) -> None:
        """Waits until the top of the results is on the screen and not covered."""
        self.page.wait_for_function(
            """() => {
                const { top } = document.getElementById("results").getBoundingClientRect();
                return top > -2 && top < innerHeight / 2 && !document.querySelector(".toast-body");
            }"""
        )

    def choose_model(self, name: str, label: str = "Model") -> None:
        field = self.page.get_by_label(label, exact=True)
        field.click()
        field.fill(name)
        field.press("Enter")
        field.press("Tab")
        sync_api.expect(field).to_have_value(name)

    def rows(self) -> list[list[str]]:
        """The rows of the table."""
        return self.page.locator("#rows [role=row]:has([role=gridcell])").evaluate_all(
            "rows => rows.map(r => [...r.querySelectorAll('[role=gridcell]')].map(cell => cell.innerText.trim()))"
        )

    def open_tab(self, name: str) -> None:
        """Opens a tab, which can be in a menu on a narrow screen."""
        tab = self.page.get_by_role("tab", name=name)
        if not tab.is_visible():
            self.page.locator(".overflow-menu > button").click()
            tab = self.page.locator(".overflow-dropdown button", has_text=name)
        tab.click()

    def wait_for_rows(self, is_wanted) -> list[list[str]]:
        until = time.monotonic() + PATIENCE_MS / 1000
        while not is_wanted(rows := self.rows()):
            assert time.monotonic() < until, rows
            self.page.wait_for_timeout(100)
        return rows


@pytest.mark.parametrize("size", SIZES)
def test_a_visitor_looks_round(browser, server, screenshots, size):
    visit = Visit(browser, server, size, "light")
    page = visit.page
    rows = visit.wait_for_rows(lambda rows: len(rows) == 5)  # a finished example
    assert rows[0][1] != "0.0%"
    page.locator("#masks img.mask").first.wait_for()
    examples = page.locator("#examples")
    box = examples.bounding_box()
    assert box["y"] + box["height"] <= SIZES["desktop"][1]
    page.screenshot(path=screenshots / f"{size}-light-0-start.png")

    examples.locator("button").nth(3).click()
    visit.wait_for_rows(lambda rows: "pizza" in {row[0] for row in rows})
    visit.wait_until_results_are_in_view()
    regions = page.locator("#masks .legend-item").all_inner_texts()
    assert all(re.fullmatch(r"[a-z]+ [01]\.\d\d", region) for region in regions)
    (
        page.locator("#masks .image-container").tap
        if size == "phone"
        else page.locator("#masks .image-container").hover
    )()
    sync_api.expect(page.locator("#tip")).to_have_text(re.compile("|".join(regions)))
    page.screenshot(path=screenshots / f"{size}-light-7-region.png")
    page.get_by_label("Image", exact=True).check()
    sync_api.expect(page.locator("#masks img.mask").first).to_have_css("opacity", "0")
    page.get_by_label("Masks", exact=True).check()
    sync_api.expect(page.locator("#masks img.mask").first).to_have_css("opacity", "0.6")

    page.get_by_role("button", name="What is in it?").click()
    visit.wait_for_rows(lambda rows: "food" in {row[0] for row in rows})
    labels = page.get_by_label("Labels, separated by commas or lines").input_value().split(", ")
    assert set(labels) == {row[0] for row in visit.rows()}
    page.screenshot(path=screenshots / f"{size}-light-8-found.png", full_page=True)
    assert visit.problems == [] and visit.elsewhere == []
    visit.context.close()


@pytest.mark.parametrize(("size", "theme"), [("phone", "dark"), ("desktop", "light")])
def test_a_visitor_uploads_looks_downloads_and_compares(
    browser, server, screenshots, street_file, size, theme
):
    visit = Visit(browser, server, size, theme)
    page = visit.page
    visit.upload(street_file)
    words = ["building", "road", "tree", "<img src=x onerror=window.hacked=1>"]
    visit.segment(", ".join(words))
    page.locator("#masks .legend").get_by_text("building").wait_for()
    visit.wait_until_results_are_in_view()
    page.screenshot(path=screenshots / f"{size}-{theme}-1-pressed.png")
    rows = visit.wait_for_rows(lambda rows: len(rows) == 4)
    assert {row[0] for row in rows} == set(words)
    assert page.evaluate("window.hacked") is None
    page.screenshot(path=screenshots / f"{size}-{theme}-1-masks.png", full_page=True)

    threshold = page.locator("#threshold input[type=number]")
    sync_api.expect(threshold).to_be_disabled()
    page.get_by_label("Background where no label fits").check()
    sync_api.expect(threshold).to_be_enabled()
    visit.wait_for_rows(lambda rows: "background" in {row[0] for row in rows})
    threshold.fill("1")
    threshold.press("Tab")
    visit.wait_for_rows(lambda rows: rows and rows[0][0] == "background" and rows[0][1] != "0.0%")

    with page.expect_download() as download:
        page.get_by_role("button", name="Mask (PNG)").click()
    assert download.value.suggested_filename == "green-jacket-mask.png"
    mask = Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
    assert mask.mode == "P" and mask.size == Image.open(street_file).size
    assert np.asarray(mask).max() <= len(words)

    visit.open_tab("Groups")
    page.locator("#heat img").wait_for()
    page.screenshot(path=screenshots / f"{size}-{theme}-2-groups.png", full_page=True)
    visit.open_tab("Prototypes")
    page.get_by_text("stage 2: ").first.wait_for()
    page.screenshot(path=screenshots / f"{size}-{theme}-3-prototypes.png", full_page=True)
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0, f"the page is {overflow} pixels wider than the screen"

    visit.open_tab("Comparison")
    visit.choose_model("tiny", "Compare with")
    visit.segment("building, road, tree")
    compared = page.locator("#comparison")
    compared.get_by_text("pgseg-small-everyday").wait_for()
    compared.get_by_text("tiny").wait_for()
    legends = compared.locator(".legend")
    sync_api.expect(legends).to_have_count(2)
    boxes = [legends.nth(number).bounding_box() for number in range(2)]
    assert (abs(boxes[1]["y"] - boxes[0]["y"]) < 50) == (size == "desktop")  # stacked on a phone
    page.screenshot(path=screenshots / f"{size}-{theme}-6-comparison.png", full_page=True)
    visit.choose_model("none", "Compare with")
    visit.segment("building, road, tree")
    legends.first.wait_for(state="hidden")
    assert visit.problems == [] and visit.elsewhere == []
    visit.context.close()


@pytest.mark.parametrize("size", SIZES)
def test_a_visitor_is_told_what_is_wrong_and_goes_on(browser, server, screenshots, street_file, size):
    visit = Visit(browser, server, size, "light")
    page = visit.page
    page.locator("#image").get_by_role("button", name=re.compile("clear|remove", re.IGNORECASE)).click()
    visit.segment("tree")
    page.get_by_text("Choose an image first").wait_for()
    sync_api.expect(page.get_by_label("Labels, separated by commas or lines")).to_be_visible()
    sync_api.expect(page.locator(".block:has(textarea) .error")).to_have_count(0)
    page.locator("#image input[type=file]").set_input_files(street_file)
    page.locator("#image img").first.wait_for()
    word = "<b onclick=window.hacked=1>tree</b>"
    visit.segment(f"{word}, {word}")
    page.get_by_text(f"labels[1] '{word}' repeats labels[0]").wait_for()
    page.screenshot(path=screenshots / f"{size}-light-4-refused.png")
    page.get_by_role("button", name="Model, resolution").click()
    visit.choose_model("/etc")
    visit.segment("tree, road")
    page.get_by_text("'/etc' is not a model").wait_for()
    page.screenshot(path=screenshots / f"{size}-light-5-options.png", full_page=True)
    synonyms, templates = page.locator("#synonyms"), page.get_by_label("Prompt templates, one per line")
    sync_api.expect(synonyms.locator("input").first).to_be_disabled()
    templates.fill("a photo")
    visit.choose_model("pgseg-small-everyday")
    visit.segment("tree|plant, road")
    page.get_by_text("'a photo'").wait_for()
    sync_api.expect(synonyms.locator("input").first).to_be_enabled()
    synonyms.get_by_text("best at each place").click()
    templates.fill("a photo of the {}.")
    page.get_by_label("whole image").check()
    visit.segment("tree, road")
    visit.wait_for_rows(lambda rows: len(rows) == 2)
    visit.wait_until_results_are_in_view()
    assert visit.problems == [] and visit.elsewhere == []
    visit.context.close()
