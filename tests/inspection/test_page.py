"""The page of attention maps in a browser, offline: the data's numbers, by pointer and by keyboard."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastgpt.inspection import page as pages
from tests.helpers.attention_pages import Made, made

playwright = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra `test`, drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")

TEXTS = [*"The cat\nsat on", " the", "<script>alert(1)</script>", "</script>", "\u202e", "<!--"]
T = len(TEXTS)
QUERY, PICKED = 9, (1, 2)  # a token of the text, and the head that is enlarged at first
STEP = 1 / 255  # a weight of the maps


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def three() -> Made:
    """Three checkpoints of a text that tries to leave its place."""
    return made(TEXTS, checkpoints=3)


@pytest.fixture(scope="module")
def files(three: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "three.html").write_text(pages.build(three.data), encoding="utf-8")
    return folder


def opened(browser: playwright.Browser, file: Path, **options) -> tuple[playwright.Page, list[str]]:
    """A page in a window of its own, and what went wrong in it: errors, refusals, requests of other files."""
    page = browser.new_page(**options)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    page.wait_for_selector("body.ready")
    settle(page)
    return page, wrong


def settle(page: playwright.Page) -> None:
    """Wait until a change is drawn: in the next frame, after a checkpoint was decoded."""
    page.evaluate("async (n) => { for (; n; n--) await new Promise((drawn) => requestAnimationFrame(drawn)) }", 3)


@pytest.fixture
def page(browser: playwright.Browser, files: Path) -> Iterator[playwright.Page]:
    page, wrong = opened(browser, files / "three.html")
    yield page
    page.close()
    assert wrong == []


def bars(page: playwright.Page) -> np.ndarray:
    """The weights that are drawn under the tokens."""
    settle(page)
    return np.array(
        [float(w) for w in page.eval_on_selector_all(".heat-bar", "all => all.map((b) => b.dataset.weight)")]
    )


def expected(three: Made, checkpoint: int, token: int, direction: str = "to", head: tuple[int, int] = PICKED):
    weights = three.maps[checkpoint][head] / 255
    return weights[token] if direction == "to" else weights[:, token]


def shown(page: playwright.Page, selector: str) -> list[tuple[str, str]]:
    """Texts and figures of a list with bars."""
    settle(page)
    script = "all => all.map((li) => [li.querySelector('.piece').textContent, li.querySelector('.figure').textContent])"
    return [tuple(pair) for pair in page.eval_on_selector_all(f"{selector} li", script)]


def predicted(three: Made, checkpoint: int, row: int, position: int) -> list[tuple[str, str]]:
    ids, probs = three.ids[checkpoint][row, position], three.probs[checkpoint][row, position]
    return [(seen(three.data["vocabulary"][str(id)]), percent(p)) for id, p in zip(ids, probs, strict=True)]


def seen(text: str) -> str:
    return text.replace(" ", "·").replace("\n", "↵").replace("\u202e", r"\u202e")


def percent(p: float) -> str:
    return "<0.1%" if p < 0.001 else f"{100 * p:.1f}%"


def test_a_head_is_chosen_by_click_and_by_the_arrow_keys(page: playwright.Page, three: Made):
    heads, about = page.locator(".thumbnail"), three.data["checkpoints"][2]["heads"]
    assert heads.count() == 6
    heads.nth(1).click()
    for key, layer, head in ((None, 0, 1), ("ArrowRight", 0, 2), ("ArrowDown", 1, 2), ("Home", 1, 0)):
        if key:
            page.keyboard.press(key)
        settle(page)
        place, one = 3 * layer + head, about[layer][head]
        assert heads.nth(place).get_attribute("aria-pressed") == "true"
        label = f"previous token {one['labels'][0]['score']:.2f}, entropy {one['entropy']:.1f} nats"
        assert heads.nth(place).get_attribute("aria-label") == f"layer {layer}, head {head}: {label}"
        assert page.text_content("#head-numbers").startswith(f"entropy{one['entropy']:.2f} natsmean distance")
        assert heads.nth(place).evaluate("head => head === document.activeElement")
    assert page.locator(".thumbnail[tabindex='0']").count() == 1


@pytest.mark.parametrize("direction", ["to", "by"])
def test_a_token_under_the_pointer_shows_its_attention(page: playwright.Page, three: Made, direction: str):
    page.locator(f"#direction input[value={direction}]").check()
    page.locator(".token").nth(QUERY).hover()
    np.testing.assert_allclose(bars(page), expected(three, 2, QUERY, direction), atol=STEP / 2)
    assert f"position {QUERY} of 0–{T - 1}" in page.text_content("#details-body")
    page.locator("h1").hover()  # the pointer leaves, and the chosen token is back
    np.testing.assert_allclose(bars(page), expected(three, 2, (T - 1) // 2, direction), atol=STEP / 2)


def test_a_token_is_reached_by_tab_and_by_the_arrow_keys(page: playwright.Page, three: Made):
    page.focus("#direction input[value=to]")
    page.keyboard.press("Tab")
    np.testing.assert_allclose(bars(page), expected(three, 2, (T - 1) // 2), atol=STEP / 2)
    for key, token in (("ArrowRight", (T + 1) // 2), ("End", T - 1), ("Home", 0)):
        page.keyboard.press(key)
        np.testing.assert_allclose(bars(page), expected(three, 2, token), atol=STEP / 2)
        assert page.evaluate("Number(document.activeElement.dataset.token)") == token
    page.keyboard.press("ArrowDown")  # to the second line, which begins after "\n"
    assert page.evaluate("Number(document.activeElement.dataset.token)") == TEXTS.index("\n") + 1


def test_the_next_tokens_are_the_predictions_of_the_model(page: playwright.Page, three: Made):
    page.locator(".token").nth(QUERY).click()
    assert shown(page, "#next-tokens") == predicted(three, 2, -1, QUERY)
    one = three.data["checkpoints"][2]
    rank, loss = one["ranks"][QUERY + 1], one["losses"][QUERY + 1]
    assert f"rank {rank}, {percent(np.exp(-loss))}, loss {loss:.2f}" in page.text_content(".truth")
    label = page.locator(".token").nth(QUERY).get_attribute("aria-label")
    assert label.endswith(f"loss {one['losses'][QUERY]:.2f}, rank {one['ranks'][QUERY]}")
    assert f"Token {QUERY}" in page.text_content("[role=status]")


def test_the_slider_changes_all_and_keeps_the_choice(page: playwright.Page, three: Made):
    page.locator(".thumbnail").nth(4).click()
    page.locator(".token").nth(QUERY).click()
    page.focus("#checkpoint")
    for checkpoint in (1, 0):
        page.keyboard.press("ArrowLeft")
        settle(page)
        np.testing.assert_allclose(bars(page), expected(three, checkpoint, QUERY, head=(1, 1)), atol=STEP / 2)
        assert shown(page, "#next-tokens") == predicted(three, checkpoint, -1, QUERY)
        assert page.locator(".thumbnail").nth(4).get_attribute("aria-pressed") == "true"
    assert page.text_content("#checkpoint-name") == "step 500, val loss 3.000"
    first = page.locator("#lens tbody button").first
    assert first.text_content() == predicted(three, 0, 0, 0)[0][0]


def test_play_begins_again_after_the_last_checkpoint(page: playwright.Page, three: Made):
    names = []
    for _ in range(2):  # the first click shows the first checkpoint, the second one stops
        page.click("#play")
        names.append((page.text_content("#play"), page.text_content("#checkpoint-name")))
    assert names == [("Stop", "step 500, val loss 3.000"), ("Play", "step 500, val loss 3.000")]
    np.testing.assert_allclose(bars(page), expected(three, 0, (T - 1) // 2), atol=STEP / 2)


def test_lines_and_heat_and_both_directions(page: playwright.Page, three: Made):
    assert page.is_visible("#lines-canvas")
    assert not page.is_visible("#heat-canvas")
    page.locator("#keys button").nth(QUERY).hover()  # on the right: those that look at it
    np.testing.assert_allclose(bars(page), expected(three, 2, QUERY, "by"), atol=STEP / 2)
    assert page.is_checked("#direction input[value=by]")
    page.locator("#queries button").nth(QUERY).focus()
    np.testing.assert_allclose(bars(page), expected(three, 2, QUERY), atol=STEP / 2)
    page.locator("#view input[value=heat]").check()
    settle(page)
    assert page.is_visible("#heat-canvas")
    assert not page.is_visible("#lines-canvas")
    best = expected(three, 2, QUERY).max()
    assert page.get_attribute("#heat-canvas", "aria-label").endswith(f": {best:.2f}")


def test_a_map_is_drawn_in_the_colours_of_its_weights(page: playwright.Page, three: Made):
    script = """() => { const canvas = document.querySelectorAll(".thumbnail canvas")[5];
        const seen = Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
        return [seen, Array.from({ length: 256 }, (_, w) => heatColour(w / 255))]; }"""
    pixels, colours = (np.array(part) for part in page.evaluate(script))
    pixels, below = pixels.reshape(T, T, 4), np.tri(T, dtype=bool)
    assert (pixels[..., 3] == 255 * below).all()
    assert (pixels[below][:, :3] == colours[three.maps[2][PICKED][below]]).all()


def test_a_cell_of_the_lens_shows_its_ten_likeliest(page: playwright.Page, three: Made):
    cells = page.locator("#lens tbody button")
    assert cells.count() == 4 * T
    cells.nth(T + QUERY).click()
    assert shown(page, "#lens-panel") == predicted(three, 2, 1, QUERY)
    page.keyboard.press("ArrowDown")
    assert shown(page, "#lens-panel") == predicted(three, 2, 2, QUERY)
    assert len(shown(page, "#lens-panel")) == 10
    assert page.text_content("#lens-panel h3") == "Layer 1"


def test_text_is_shown_as_text(page: playwright.Page):
    assert page.locator(".token .glyph").all_text_contents() == [seen(text) for text in TEXTS]
    assert page.locator("#tokens script, #lens script, #details script").count() == 0
    assert page.text_content("h1") == "Attention in out, step 1500"


def contrasts(page: playwright.Page, selector: str) -> list[float]:
    """Of the elements of a selector, the contrast (WCAG 2) of the text against the nearest background."""
    script = """all => all.map((node) => {
        const numbers = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
        let behind = node;
        while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
        const light = (colour) => numbers(colour).slice(0, 3).map((value) => value / 255)
            .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
            .reduce((sum, value, channel) => sum + value * [0.2126, 0.7152, 0.0722][channel], 0.05);
        const pair = [light(getComputedStyle(node).color), light(getComputedStyle(behind).backgroundColor)];
        return Math.max(...pair) / Math.min(...pair);
    })"""
    return page.eval_on_selector_all(selector, script)


READ = (".hint", ".muted", ".token .glyph", ".badge", "dt", "#lens .cell", "#lens th", ".numbers", "label span")


def test_both_themes_can_be_read(browser: playwright.Browser, files: Path):
    backgrounds = {}
    for theme in ("light", "dark"):
        page, wrong = opened(browser, files / "three.html", color_scheme=theme)
        backgrounds[theme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        found = {selector: contrasts(page, selector) for selector in READ}
        assert all(found.values())
        assert {selector: min(values) for selector, values in found.items() if min(values) < 4.5} == {}
        if theme == "dark":
            page.click("#theme")  # from the system's to light
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == backgrounds["light"]
            assert min(contrasts(page, ".token .glyph")) >= 4.5
        page.close()
        assert wrong == []
    assert backgrounds["light"] != backgrounds["dark"]


def test_a_narrow_window_needs_no_scrolling_aside(browser: playwright.Browser, tmp_path: Path):
    texts = ["pneumonoultramicroscopicsilicovolcanoconiosis" * 2, *TEXTS]
    (tmp_path / "wide.html").write_text(pages.build(made(texts, heads=16, checkpoints=2).data), encoding="utf-8")
    page, wrong = opened(browser, tmp_path / "wide.html", viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.close()
    assert wrong == []


def test_bytes_stand_under_their_character(browser: playwright.Browser, tmp_path: Path):
    found = made(["a", *[rf"\x{byte:02x}" for byte in "한🙂".encode()], r"\xed", "한"])
    for token in found.data["tokens"]:
        token["bytes"] = token["text"].removeprefix(r"\x") if token["text"].startswith("\\") else None
    (tmp_path / "bytes.html").write_text(pages.build(found.data), encoding="utf-8")
    page, wrong = opened(browser, tmp_path / "bytes.html")
    assert page.locator(".whole").all_text_contents() == ["한", "🙂"]
    assert [run.count() for run in (page.locator(".run").nth(n).locator("button") for n in range(2))] == [3, 4]
    assert page.locator(".glyph").nth(9).text_content() == "한"
    page.close()
    assert wrong == []


def test_a_text_of_one_token_and_numbers_that_are_none(browser: playwright.Browser, tmp_path: Path):
    found = made(["a"])
    found.data["checkpoints"][0]["heads"][1][2] |= {"entropy": float("nan"), "distance": float("inf")}
    (tmp_path / "one.html").write_text(pages.build(found.data | {"title": "out-\udcff"}), encoding="utf-8")
    page, wrong = opened(browser, tmp_path / "one.html")
    assert page.text_content("#head-numbers").startswith("entropy–mean distance–")
    assert page.title() == "out-?"
    page.close()
    assert wrong == []


def test_the_policy_names_the_code_and_nothing_else(three: Made):
    html = pages.build(three.data)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert html.count("</script>") == len(pages.SCRIPTS) + 1  # those of the data are escaped
    own = len(html) - len(re.search(r'type="application/json">(.*)</script>', html)[1])
    assert own < 68_000
