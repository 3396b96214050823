"""The page as a person has it: opened, filtered, read with the keyboard, in Chromium."""

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from croco.report import two_runs
from croco.report.page import build_page
from croco.storage import files, shards
from croco.storage.schemas import PAIRS
from report.browsers import DESKTOP, PHONE, Opened, browser
from report.made_run import add_arena, add_sentinel, make_run, said

TITLE = "made · CroCo"
# every text whose contrast with what is behind it is under 4.5
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const part = c[i] / 255;
    return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgba("white");
  };
  const read = "p, td, th, h1, h2, h3, dd, dt, li, a, label, .scale i, .stack > span, .option span, button";
  return [...document.querySelectorAll(read)].filter((e) => e.innerText && !e.closest(".skip")).map((e) => {
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.className, e.tagName, e.innerText.slice(0, 20)];
  }).filter(([ratio]) => ratio < 4.5);
}"""
NAMELESS = """() => [...document.querySelectorAll(
  "input, select, button, nav, section, [role=region], [role=img]"
)].filter(
  (e) => !(e.labels && e.labels.length) && !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby")
).map((e) => e.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    run = make_run(folder / "run", num_prompts=6, num_samples=4, num_tests=16)
    add_arena(run, num_prompts=3)
    add_sentinel(run)
    files.write_text(folder / "page.html", build_page(run))
    return folder / "page.html"


@pytest.fixture
def page(chromium: Any, file: Path) -> Iterator[Opened]:
    opened = Opened(chromium, file)
    opened.page.wait_for_selector("#browser:not([hidden])")
    yield opened
    assert opened.errors == []
    opened.close()


def count(page: Opened) -> str:
    return page.text("#count")


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_word_and_fits_the_screen(chromium, file, size, scheme):
    opened = Opened(chromium, file, size, scheme)
    opened.page.wait_for_selector(".option")
    assert opened.page.title() == TITLE
    assert opened.page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert opened.errors == []
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(chromium, file, scheme):
    """WCAG's contrast of 4.5, for the text of the page, of every step of the heat map and of every bar."""
    opened = Opened(chromium, file, scheme=scheme)
    poor = opened.page.evaluate(CONTRASTS)
    assert poor == []
    opened.close()


def test_filters_and_search_leave_what_they_say(page):
    assert count(page) == "48 of 48 rows"
    page.page.select_option("#filter-arm", "multilingual")
    assert count(page) == "6 of 48 rows"
    page.page.select_option("#filter-arm", "")
    page.page.select_option("#filter-language", "da")
    assert set(page.page.locator(".option .top b").all_inner_texts()) >= {"da"}
    page.page.select_option("#filter-language", "")
    page.page.fill("#filter-text", "OWNED")
    page.wait_for_count("2")
    page.page.fill("#filter-text", "no such words")
    page.wait_for_count("0")
    assert "Nothing matches" in page.text("#detail")


def test_pairs_are_sorted_by_their_gap(page):
    page.page.select_option("#sort", "down")
    gaps = [float(text.removeprefix("gap ")) for text in page.page.locator(".option .gap").all_inner_texts()]
    assert len(gaps) > 5
    assert gaps == sorted(gaps, reverse=True)


def test_comparisons_test_completions_and_what_was_left_out_are_listed(page):
    page.page.get_by_label("Judged comparisons").check()
    assert count(page) == "42 of 42 rows"
    assert "multilingual shown first" in page.text("#detail") or "monolingual shown first" in page.text(
        "#detail"
    )
    page.page.select_option("#filter-tag", "tie: the two orders disagree")
    assert "tie: the two orders disagree" in page.text("#detail .tags")
    page.page.get_by_label("Test completions").check()
    assert page.text("#tag-name") == "Outcome"
    page.page.select_option("#filter-tag", "better than the base")
    assert "monolingual: good" in page.text("#detail").replace("monolingual good", "monolingual: good")
    page.page.get_by_label("Left out").check()
    assert count(page) == "6 of 6 rows"
    page.page.select_option("#filter-tag", "cut at the token limit")
    assert count(page) == "4 of 6 rows"
    detail = " ".join(page.text("#detail").split())
    assert any(" ".join(said("sum.1", code, 2).split()) in detail for code in ("da", "nl"))


def test_a_script_in_a_completion_stays_text(page):
    page.page.fill("#filter-text", "owned")
    page.wait_for_count("2")
    assert "<script>document.title='owned'</script>" in page.text("#detail")
    assert page.page.locator("#browser script").count() == 0
    page.page.get_by_label("Judged comparisons").check()
    assert "<script>document.title='owned'</script>" in page.text("#detail")
    assert page.page.title() == TITLE


def test_the_keyboard_reaches_everything(page):
    keys = page.page.keyboard
    keys.press("Tab")
    assert page.page.evaluate("document.activeElement.className") == "skip"
    keys.press("Enter")
    assert page.page.evaluate("document.activeElement.id") == "main"
    keys.press("/")
    assert page.page.evaluate("document.activeElement.id") == "filter-text"
    keys.press("Tab")
    assert page.page.evaluate("document.activeElement.id") == "rows"
    first = page.text("#detail")
    for key, place in {
        "ArrowDown": 1,
        "End": 47,
        "PageUp": 39,
        "Home": 0,
        "ArrowUp": 0,
        "PageDown": 8,
    }.items():
        keys.press(key)
        selected = page.page.get_attribute("#rows", "aria-activedescendant")
        assert selected == f"row-{place}"
        assert page.page.get_attribute(f"#{selected}", "aria-selected") == "true"
        assert page.page.get_attribute(f"#{selected}", "aria-setsize") == "48"
        assert page.page.locator(f"#{selected}").is_visible()
    assert page.text("#detail") != first
    keys.press("Enter")
    assert page.page.evaluate("document.activeElement.id") == "detail"
    keys.press("Escape")
    assert page.page.evaluate("document.activeElement.id") == "rows"


def test_every_control_table_and_chart_has_words(page):
    nameless = page.page.evaluate(NAMELESS)
    assert nameless == []
    headless = page.page.evaluate(
        """() => [...document.querySelectorAll("table")].filter(
          (t) => t.querySelectorAll("th[scope]").length !== t.querySelectorAll("th").length || !t.querySelector("th")
        ).map((t) => t.outerHTML.slice(0, 90))"""
    )
    assert headless == []
    levels = page.page.evaluate(
        "() => [...document.querySelectorAll('h1, h2, h3')].map((heading) => Number(heading.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_light_and_dark_by_hand_and_kept(page):
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.page.evaluate(background)
    page.page.get_by_role("button", name="Switch to dark colours").click()
    dark = page.page.evaluate(background)
    assert dark != light
    page.page.reload()
    assert page.page.evaluate(background) == dark
    page.page.get_by_role("button", name="Switch to light colours").click()
    assert page.page.evaluate(background) == light


def test_a_heat_map_shows_changes_or_levels(page):
    views = page.page.locator(".views").first
    assert views.locator(".view:visible").count() == 1
    arms = views.locator(".view:visible tbody th[scope=rowgroup]")
    assert arms.all_inner_texts() == ["monolingual", "multilingual"]
    views.get_by_label("Level", exact=True).check()
    assert views.locator(".view:visible").count() == 1
    assert arms.all_inner_texts() == ["base", "monolingual", "multilingual"]


def test_ten_thousand_pairs_are_as_quick_as_ten(chromium, tmp_path):
    run = make_run(tmp_path / "run", num_prompts=2, num_samples=3, num_tests=8)
    folder = run / "pair" / "monolingual"
    row = shards.read_table(folder).to_dicts()[0]
    many = [
        {**row, "prompt_id": f"p{i:05d}", "chosen": f"Chosen completion number {i}."} for i in range(10_000)
    ]
    shards.write_shard(
        folder,
        0,
        pa.Table.from_pylist(many, schema=PAIRS.schema),
        PAIRS.schema,
        read={"pair": 10_000},
        written={"pair": 10_000},
        dropped=None,
    )
    files.write_text(tmp_path / "page.html", build_page(run))
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    opened = Opened(chromium, tmp_path / "page.html")
    opened.page.wait_for_selector(".option")
    assert count(opened) == "10,000 of 10,000 rows; the page holds a spread of the run's 10,002"
    assert opened.page.locator(".option").count() < 40
    opened.page.focus("#rows")
    opened.page.keyboard.press("End")
    assert opened.page.get_attribute("#rows", "aria-activedescendant") == "row-9999"
    start = time.monotonic()
    opened.page.fill("#filter-text", "number 9876.")
    opened.wait_for_count("1")
    assert time.monotonic() - start < 3
    assert "Chosen completion number 9876." in opened.text("#detail")
    assert opened.errors == []
    opened.close()


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_two_runs_beside_each_other_open_without_a_word(chromium, tmp_path, size):
    first = make_run(tmp_path / "first", num_prompts=2, num_samples=3, num_tests=16)
    second = make_run(tmp_path / "second", num_prompts=2, num_samples=3, num_tests=16, seed=3)
    files.write_text(tmp_path / "page.html", two_runs.build_page(first, second))
    opened = Opened(chromium, tmp_path / "page.html", size)
    assert "second against first" in opened.text("main")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == size[0]
    views = opened.page.locator(".views").first
    for name in ("second", "first", "second minus first"):
        views.get_by_label(name, exact=True).check()
        assert views.locator(".view:visible").count() == 1
    opened.page.wait_for_selector(".option")
    assert count(opened) == "32 of 32 rows"  # the pairs of both runs
    opened.page.select_option("#filter-arm", "second: multilingual")
    assert count(opened) == "2 of 32 rows"
    assert opened.errors == []
    opened.close()


def test_the_funnel_says_why_on_a_phone(chromium, file):
    opened = Opened(chromium, file, PHONE)
    reason = opened.page.locator("#funnel li", has_text="cut at the token limit").first
    box = reason.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE[0]
    opened.close()


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_no_table_is_cut_off_without_a_way_to_scroll(chromium, file, size):
    """Whatever is wider than the screen lies in a box that scrolls (the judge's table did not)."""
    opened = Opened(chromium, file, size)
    cut = opened.page.evaluate(
        """() => [...document.querySelectorAll("table")].filter((table) => {
          const box = table.closest(".scroll") || table.parentElement;
          return table.scrollWidth > box.clientWidth + 4 && getComputedStyle(box).overflowX !== "auto";
        }).map((table) => table.outerHTML.slice(0, 90))"""
    )
    assert cut == []
    opened.close()
