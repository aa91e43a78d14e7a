"""The report in a real browser: offline, without errors, readable in every light and width."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from evaluate_fakes import BAD, GOOD, verdicts, write_run
from saec.evaluate.report import write_report
from saec.types import Verdict, Where

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-quic", "--no-first-run"),
]
EVIL = "<script>document.title='owned'</script>\"'><img src=http://example.invalid/x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright_api.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=executable, args=FLAGS)
        yield running
        running.close()


def flipped(v: Verdict) -> Verdict:
    """A worse run: the parts that the cloud judged are called the other way round."""
    return replace(v, label=GOOD if v.label is BAD else BAD) if v.where is Where.CLOUD else v


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    found = verdicts(folder / "images")
    found += [
        replace(v, product=EVIL, part_id=f"other{i}")
        for i, v in enumerate(verdicts(folder / "more")[8:])
        if v.label is not BAD
    ]
    runs = [
        write_run(folder / "edge only", [flipped(v) for v in found], manifest={"mode": "edge_only"}),
        write_run(folder / "cascade", found, manifest={"mode": "cascade", "name": EVIL, "a_long_key" * 9: "x" * 200}),
    ]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


@dataclass
class Opened:
    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def open_report(browser: Any, report: Path) -> Iterator[Any]:
    contexts = []

    def opener(width: int = 1400, scheme: str = "light", **more: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        contexts.append(context)
        seen = Opened(context.new_page())
        seen.page.on("console", lambda message: seen.errors.append(message.text))
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))

        def refuse(route: Any) -> None:
            seen.requests.append(route.request.url)
            route.abort()

        # Everything but the file itself is refused and remembered.
        context.route(lambda url: url != report.as_uri(), refuse)
        seen.page.goto(report.as_uri())
        return seen

    yield opener
    for context in contexts:
        context.close()


def shown(page: Any) -> list[str]:
    return page.eval_on_selector_all(".part:not([hidden])", "parts => parts.map(p => p.dataset.flags)")


def test_the_report_opens_offline_without_a_request_or_an_error(open_report: Any) -> None:
    seen = open_report()
    seen.page.wait_for_load_state("networkidle")
    broken = seen.page.eval_on_selector_all(
        "img", "all => all.filter(i => i.complete && !i.naturalWidth && i.getClientRects().length).length"
    )
    assert (seen.requests, seen.errors, broken) == ([], [], 0)
    assert seen.page.inner_text("h1").startswith("2 of ")
    assert seen.page.title().startswith("Inspection report · <script>")  # the hostile name is text, and did not run


def test_the_filters_show_what_they_say(open_report: Any) -> None:
    page = open_report().page
    for key in ("escape", "overkill", "escalated", "fallback", "unreadable", "called-defect"):
        button = page.locator(f'[data-filter="{key}"]')
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert page.locator('[data-filter][aria-pressed="true"]').count() == 1
        flags = shown(page)
        assert flags and all(key in f.split() for f in flags)
        promised = int(button.locator("b").inner_text())
        assert len(flags) == min(promised, 24)
        assert page.inner_text(".count") == f"{len(flags)} of {promised} shown"
    page.locator('[data-filter=""]').click()
    page.select_option("#product", EVIL)
    assert set(page.eval_on_selector_all(".part:not([hidden])", "p => p.map(x => x.dataset.product)")) == {EVIL}


def test_more_parts_come_on_request(open_report: Any) -> None:
    page = open_report().page
    assert len(shown(page)) == 24
    page.click("#more")
    total = page.locator(".part").count()
    assert len(shown(page)) == total > 24
    assert not page.locator("#more").is_visible()


def test_heatmaps_and_boxes_are_switched_by_button_key_and_hover(open_report: Any) -> None:
    page = open_report().page
    heat = page.locator(".part:not([hidden]) .heat").first

    def opacity(value: str) -> None:
        page.wait_for_function("([e, v]) => getComputedStyle(e).opacity === v", arg=[heat.element_handle(), value])

    opacity("0")
    heat.locator("xpath=ancestor::div[contains(@class,'view')]").hover()
    opacity("1")
    page.mouse.move(0, 0)
    opacity("0")
    page.keyboard.press("h")
    opacity("1")
    assert page.locator('#parts [data-toggle="show-heat"]').get_attribute("aria-pressed") == "true"
    box = page.locator(".part:not([hidden]) .boxes").first
    assert box.is_visible()
    page.click('#parts [data-toggle="show-boxes"]')
    assert not box.is_visible()


def test_boxes_lie_where_they_belong_on_the_image(open_report: Any) -> None:
    page = open_report().page
    part = page.locator(".part:not([hidden])", has=page.locator(".boxes")).first
    image, rect = part.locator(".stack > img").first.bounding_box(), part.locator(".boxes rect").last.bounding_box()
    assert image["width"] / image["height"] == pytest.approx(60 / 40, rel=0.02)
    # The box is (5, 5)–(20, 20) of 60 × 40 pixels; a non-scaling stroke adds a pixel around it.
    assert rect["x"] - image["x"] == pytest.approx(image["width"] * 5 / 60, abs=2)
    assert rect["width"] == pytest.approx(image["width"] * 15 / 60, abs=4)
    assert rect["height"] == pytest.approx(image["height"] * 15 / 40, abs=4)


def test_a_part_is_enlarged_and_stepped_through_from_the_keyboard(open_report: Any) -> None:
    seen = open_report()
    page = seen.page
    page.locator(".part:not([hidden]) .view[tabindex]").first.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog[open]")
    first = dialog.locator(".id").inner_text()
    page.keyboard.press("ArrowRight")
    assert dialog.locator(".id").inner_text() != first
    page.keyboard.press("ArrowLeft")
    assert dialog.locator(".id").inner_text() == first
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert seen.errors == []


@pytest.mark.parametrize("width", [320, 400, 768, 1400])
def test_no_width_scrolls_sideways(open_report: Any, width: int) -> None:
    page = open_report(width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


CONTRAST = """selectors => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const found = {};
  for (const s of selectors) for (const e of document.querySelectorAll(s)) {
    if (!e.getClientRects().length) continue;
    const style = getComputedStyle(e), front = rgb(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(front), light(behind(e))].sort((x, y) => y - x);
    found[s] = Math.min(found[s] || 99, (a + .05) / (b + .05));
  }
  return found;
}"""
TEXTS = [
    *(
        "h1",
        ".lead",
        ".source",
        "nav a",
        ".cards .name",
        ".cards strong",
        ".cards .detail",
        ".attention h2",
        ".attention li",
    ),
    *("thead th", "td.n", "td small", "td.best", ".note", "[data-filter]", ".tag", ".p", ".said", ".reason", ".id"),
    *(".missing", ".legend li", "svg .num", "svg .mark", "svg .label", ".rows dt", ".rows dd", ".terms dd", "footer"),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark(open_report: Any, scheme: str) -> None:
    page = open_report(scheme=scheme).page
    ratios = page.evaluate(CONTRAST, TEXTS)
    assert set(ratios) == set(TEXTS)
    assert {name: round(r, 2) for name, r in ratios.items() if r < 4.5} == {}  # WCAG 2.2, AA


def test_every_image_chart_and_control_has_a_name(open_report: Any) -> None:
    page = open_report().page
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator('svg[role="img"]:not([aria-label])').count() == 0
    names = page.eval_on_selector_all("button, select", "all => all.map(e => e.innerText || e.labels?.length)")
    assert all(names)
    levels = page.eval_on_selector_all("main h2, main h3, h1", "all => all.map(e => +e.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def test_the_page_reads_without_script(open_report: Any) -> None:
    page = open_report(java_script_enabled=False).page
    assert page.locator(".part").count() == page.locator(".part:visible").count() > 24
    assert page.locator(".boxes").first.is_visible()
    assert not page.locator("[data-filter]").first.is_visible()  # nothing that would not work


def test_print_shows_the_parts_and_hides_the_controls(open_report: Any) -> None:
    page = open_report(scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("[data-filter]").first.is_visible() and not page.locator("nav").is_visible()
    assert page.locator(".part:visible").count() == 24
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
