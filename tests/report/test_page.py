import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest

from croco import store
from croco.errors import UserError
from croco.records import DROPPED, PAIRS, ledger
from croco.report.gather import browser_pairs, read_run, scores_of
from croco.report.page import build_page, json_for_html
from croco.report.tables import count_of, duration, results_markdown
from report.made_run import NASTY, make_run


class Parsed(HTMLParser):
    """What a browser would see: the elements, the text of each script, the links and ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.ids += [named["id"]] if named.get("id") else []
        self.links += [str(value) for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), num_prompts=6, num_samples=4, num_tests=16)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return build_page(run)


def test_what_an_edited_recipe_left_behind_is_not_in_the_report(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    stale = read_run(copy).stages["score"] | {"seconds": 1e6}
    for title in (
        "score/monolingual",
        "pair/removed",
    ):  # scored otherwise before; an arm taken out of the recipe
        shutil.copytree(copy / "score", copy / title)
        store.write_json(copy / title / "stage.json", stale)
    found = read_run(copy)
    assert found.stages.keys() == read_run(run).stages.keys()
    store.shards(copy / "score" / "monolingual")[0].path.unlink()  # would be missed if it were read
    assert scores_of(found, "monolingual").equals(scores_of(read_run(run), "monolingual"))


def test_the_page_is_whole_and_fetches_nothing(page):
    parsed = Parsed(page)
    for section in ("verdict", "results", "gains", "modes", "scores", "training", "pairs", "run"):
        assert section in parsed.ids
    assert len(parsed.ids) == len(set(parsed.ids))  # the ids of the figures, too
    assert all(link.startswith("#") for link in parsed.links)
    assert not {"link", "img", "iframe", "object"} & set(parsed.tags)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert parsed.tags.count("svg") == 2 * 2 + 2 * 3 + 2 + 7  # gains, modes, scores, curves
    assert len(page.encode()) < 3_000_000


def test_a_script_in_a_completion_stays_text(page):
    parsed = Parsed(page)
    assert parsed.tags.count("script") == 2  # the data and the browser of pairs
    data = json.loads(parsed.scripts[0])
    assert any(NASTY in pair for pair in data["pairs"])
    assert "<script>document" not in page
    assert "</script></script>" not in page


def test_names_from_a_recipe_are_escaped(tmp_path):
    run = make_run(tmp_path, num_prompts=2, num_samples=3, num_tests=8)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["policy"] = {"model": "</title><script>alert(1)</script>"}
    store.write_json(run / "recipe.json", recipe)
    rows = [("completion", "p", "da", 0, "<img src=x onerror=alert(1)>")]
    store.write_parquet(run / "pair" / "monolingual" / "dropped.parquet", ledger(rows), DROPPED.schema)
    parsed = Parsed(build_page(run))
    assert parsed.tags.count("script") == 2
    assert "img" not in parsed.tags


def test_json_in_html_round_trips():
    value = {"a": [NASTY, "\u2029 &amp; ]]>", 1.5, None]}
    text = json_for_html(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_the_verdict_is_one_sentence_per_arm(page):
    text = " ".join(page.split())
    assert text.count("Better on") + text.count("Mixed on") + text.count("Not resolved on") >= 2


def test_the_same_run_gives_the_same_page(run, page):
    assert build_page(run) == page


def test_many_pairs_become_a_spread_that_fits(tmp_path):
    run = make_run(tmp_path, num_prompts=2, num_samples=3, num_tests=8)
    folder = run / "pair" / "monolingual"
    rows = store.read_table(folder).to_dicts()
    many = [{**rows[0], "prompt_id": f"p{i}", "chosen": "x" * 300} for i in range(4000)]
    table = pa.Table.from_pylist(many, schema=PAIRS.schema)
    store.write_shard(
        folder, 0, table, PAIRS.schema, read={"pair": 4000}, written={"pair": 4000}, dropped=None
    )
    found = browser_pairs(read_run(run), max_bytes=200_000)
    assert found["total"] == 4002
    assert 300 < len(found["pairs"]) < 700
    numbers = [int(found["prompts"][pair[1]][0][1:]) for pair in found["pairs"] if pair[0] == "monolingual"]
    assert min(numbers) < 200
    assert max(numbers) > 3800
    assert len(json_for_html(found)) < 300_000


def test_a_run_that_is_not_finished_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no recipe\.json"):
        build_page(tmp_path)
    run = make_run(tmp_path / "run", num_prompts=2, num_samples=3, num_tests=8)
    (run / "train" / "multilingual" / "stage.json").unlink()
    with pytest.raises(UserError, match="no complete stage train/multilingual"):
        build_page(run)


def test_markdown_has_every_arm_and_language(run):
    text = results_markdown(run)
    for expected in ("### Tasks seen in tuning", "**monolingual**", "| base | greedy |", "| cy |", "T = 0.4"):
        assert expected in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| arm | decoding | tuned")}
    assert widths == {7}


def test_words_for_counts_and_times():
    assert [count_of(n, "pair") for n in (0, 1, 1024)] == ["0 pairs", "1 pair", "1,024 pairs"]
    assert [duration(s) for s in (0.25, 48.4, 200, 18720)] == ["0.2 s", "48 s", "3 min 20 s", "5 h 12 min"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--virtual-time-budget=3000",
]
PROBE = """<script>
const errors = []; addEventListener("error", (event) => errors.push(event.message));
const seen = () => [...document.querySelectorAll(".pair")];
function pick(id, value, kind) {
  const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event(kind));
}
setTimeout(() => {
  const found = {title: document.title, all: document.getElementById("pair-count").textContent, shown: seen().length,
    scripts: document.querySelectorAll(".pair script").length,
    nasty: document.body.innerText.includes("<script>document.title")};
  pick("filter-arm", "multilingual", "change");
  found.multilingual = document.getElementById("pair-count").textContent;
  pick("filter-arm", "", "change"); pick("filter-text", "OWNED", "input");
  setTimeout(() => {
    found.searched = document.getElementById("pair-count").textContent; found.errors = errors;
    found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
    document.documentElement.setAttribute("data-found", JSON.stringify(found));
  }, 500);
}, 100);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_it_filters_and_keeps_completions_as_text(page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", PROBE), encoding="utf-8")
    command = [
        str(CHROMIUM),
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=500,900",
        "--dump-dom",
        file.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    class Root(HTMLParser):
        found: dict = {}  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            if tag == "html":
                self.found = json.loads(dict(attrs)["data-found"])

    root = Root()
    root.feed(dom)
    found = root.found
    assert found["errors"] == []
    assert found["title"] == "made · CroCo"
    assert (found["scripts"], found["nasty"], found["shown"], found["wide"]) == (0, True, 20, False)
    assert found["all"] == "48 of 48 pairs"
    assert found["multilingual"] == "6 of 48 pairs"
    assert found["searched"] == "2 of 48 pairs"
