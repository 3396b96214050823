import base64
import json
import shutil
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from croco.config.arms import Arm
from croco.errors import UserError
from croco.pipeline.progress import count_of
from croco.report.browser import browse, packed
from croco.report.charts import axis
from croco.report.exports import results_markdown, results_terminal
from croco.report.load_run import read_run, scores_of
from croco.report.page import build_page
from croco.report.sections import about
from croco.report.table import POINTS, Number, Unit, duration
from croco.stages.evaluate.stats import Interval
from croco.storage import files, records, shards
from croco.storage.schemas import DROPPED, PAIRS, RESULTS, ledger
from report.made_run import NASTY, add_arena, add_sentinel, make_run


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
        files.write_json(copy / title / "stage.json", stale)
    found = read_run(copy)
    assert found.stages.keys() == read_run(run).stages.keys()
    shards.shards(copy / "score" / "monolingual")[0].path.unlink()  # would be missed if it were read
    assert scores_of(found, "monolingual").equals(scores_of(read_run(run), "monolingual"))


def test_the_page_is_whole_and_fetches_nothing(page):
    parsed = Parsed(page)
    for section in ("verdict", "results", "gains", "modes", "scores", "funnel", "training", "browse", "run"):
        assert section in parsed.ids
        assert f"#{section}" in parsed.links
    assert not {"arena", "tasks"} & set(parsed.ids)  # this run has none
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(link.startswith("#") for link in parsed.links)
    assert not {"link", "img", "iframe", "object"} & set(parsed.tags)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert parsed.tags.count("svg") == 1 + 2 * 7 + 7  # the theme, a ridge per arm and language, curves
    assert len(page.encode()) < 3_000_000


def unpacked(page: str) -> dict:
    """The rows as the page's script reads them."""
    return json.loads(zlib.decompress(base64.b64decode(Parsed(page).scripts[0])))


def test_a_script_in_a_completion_is_no_markup(page):
    parsed = Parsed(page)
    assert parsed.tags.count("script") == 3  # the data, the page and the list
    assert NASTY in unpacked(page)["texts"]
    assert "<script>document" not in page
    assert "</script></script>" not in page


def test_names_from_a_recipe_are_escaped(tmp_path):
    run = make_run(tmp_path, num_prompts=2, num_samples=3, num_tests=8)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["policy"] = {"model": "</title><script>alert(1)</script>"}
    recipe |= {"prompts": {"source": "prompts.jsonl"}, "reward": {"model": "a/reward"}}
    recipe["evaluation"]["source"] = "test.jsonl"
    files.write_json(run / "recipe.json", recipe)
    rows = [("completion", "p", "da", 0, "<img src=x onerror=alert(1)>")]
    shards.write_parquet(run / "pair" / "monolingual" / "dropped.parquet", ledger(rows), DROPPED.schema)
    parsed = Parsed(build_page(run))
    assert parsed.tags.count("script") == 3
    assert "img" not in parsed.tags


def test_rows_round_trip():
    value = {"a": [NASTY, "\u2029 &amp; ]]>", 1.5, None]}
    text = packed(value)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(zlib.decompress(base64.b64decode(text))) == value


def test_the_verdict_is_one_sentence_per_arm(page):
    text = " ".join(page.split())
    assert text.count("Better on") + text.count("Mixed on") + text.count("Not resolved on") >= 2


def test_the_same_run_gives_the_same_page(run, page):
    assert build_page(run) == page


def test_many_pairs_become_a_spread_that_fits(tmp_path):
    run = make_run(tmp_path, num_prompts=2, num_samples=3, num_tests=8)
    folder = run / "pair" / "monolingual"
    rows = shards.read_table(folder).to_dicts()
    rng = np.random.default_rng(0)  # texts that do not deflate to nothing
    texts = ["".join(map(chr, letters)) for letters in rng.integers(97, 123, size=(4000, 300))]
    many = [{**rows[0], "prompt_id": f"p{i}", "chosen": text} for i, text in enumerate(texts)]
    table = pa.Table.from_pylist(many, schema=PAIRS.schema)
    shards.write_shard(
        folder, 0, table, PAIRS.schema, read={"pair": 4000}, written={"pair": 4000}, dropped=None
    )
    found = browse(
        {"": read_run(run)}, {"pairs": 200_000, "comparisons": 0, "evaluations": 1000, "left out": 1000}
    )
    pairs = found["kinds"]["pairs"]
    assert pairs["total"] == 4002
    assert 500 < len(pairs["rows"]) < 1500
    numbers = [
        int(found["prompts"][row[1]][0][1:])
        for row in pairs["rows"]
        if found["texts"][row[0]] == "monolingual"
    ]
    assert min(numbers) < 200
    assert max(numbers) > 3800
    assert len(packed(found)) < 300_000


def test_an_arena_tasks_and_the_sentinel_are_shown_where_there_are_any(tmp_path):
    run = make_run(tmp_path, num_prompts=2, num_samples=3, num_tests=16)
    add_arena(run, num_prompts=4)
    add_sentinel(run)
    page = build_page(run)
    text = " ".join(page.split())
    assert {"arena", "tasks"} <= set(Parsed(page).ids)
    assert "Better on tuned (+14 greedy)." in text
    assert "Not resolved on tuned (+4 greedy)." in text
    assert "test_mcc" in text
    assert "<b>90 %</b> <small>88 to 92, n = 4 of 12</small>" in text  # in the right language
    assert "p = 0.004 (Holm)" in text
    assert "<b>22.5</b> <small>20.0 to 25.0</small>" in text  # the highest of its row
    assert "step 12: the reward of chosen falls below that of the start" in text
    comparisons = unpacked(page)["kinds"]["comparisons"]
    assert (comparisons["total"], len(comparisons["rows"])) == (56, 56)


def test_the_funnel_balances(run):
    steps = {(step.stage, step.arm): step for step in read_run(run).steps}
    pair = steps["pair", "monolingual"]
    read, kept = pair.flows[0].read, pair.flows[0].written
    assert (pair.flows[0].unit, read) == ("completion", 6 * 7 * 4)
    assert pair.flows[0].reasons == [("cut at the token limit", 2), ("duplicate of an earlier completion", 1)]
    assert read == kept + sum(count for _, count in pair.flows[0].reasons)
    assert (pair.made, pair.flags) == (6 * 7, [("rejected: wrong language", 1)])


def test_axes_hold_their_values_and_have_round_ticks():
    found = axis([-3.0, 41.0])
    assert found.ticks == [0, 10, 20, 30, 40]
    assert 0 < found.place(-3.0) < found.place(0) < found.place(41.0) < 100
    assert 0.0 in axis([0.0, 0.0]).ticks
    assert axis([0.213, 0.214], with_zero=False).ticks == [0.213, 0.2132, 0.2134, 0.2136, 0.2138, 0.214]


@pytest.mark.parametrize("silent", ["multilingual", "base"])
def test_an_arm_of_which_nothing_was_judged_is_named_on_the_page(run, tmp_path, silent):
    copy = shutil.copytree(run, tmp_path / "run")
    folder, record = copy / "results", records.read_record(copy / "results")
    kept = shards.read_table(folder).filter(pl.col("arm") != silent).to_arrow()
    counts = {"result": kept.num_rows}
    shards.write_shard(folder, 0, kept, RESULTS.schema, read=counts, written=counts, dropped=None)
    records.write_record(folder, record)
    with pytest.raises(UserError, match=f"lack the arm {silent}"):
        build_page(copy)
    record["facts"]["without_verdict"] = [[silent, 0.0], [silent, 1.0]]
    records.write_record(folder, record)
    words = f"No completion of {silent} greedy and {silent} at T = 1 has a verdict, so it is in no table."
    assert words in build_page(copy)
    assert words in "".join(str(part) for part in results_terminal(copy))
    assert words in results_markdown(copy)


def test_a_run_that_is_not_finished_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no recipe\.json"):
        build_page(tmp_path)
    run = make_run(tmp_path / "run", num_prompts=2, num_samples=3, num_tests=8)
    (run / "train" / "multilingual" / "stage.json").unlink()
    with pytest.raises(UserError, match="no complete stage train/multilingual"):
        build_page(run)
    (run / "pair" / "multilingual" / "stage.json").unlink()
    with pytest.raises(UserError, match="no complete stages pair/multilingual, train/multilingual: run"):
        build_page(run)


def test_markdown_has_every_arm_and_language(run):
    text = results_markdown(run)
    for expected in ("## Tasks seen in tuning", "**monolingual**", "| base | greedy |", "| cy |", "T = 0.4"):
        assert expected in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| arm | decoding | tuned")}
    assert widths == {7}


def written(unit, *ends):
    number = Number(Interval(*ends), unit)
    return number.text, number.ends(" to ")


def test_an_arm_in_words():
    """Named groups and other losses were called one language and DPO."""
    assert about(Arm()) == "pool: one language · reward model · rejected mean-2std · DPO, β 0.1"
    arm = Arm.model_validate(
        {"pool": {"nordic": ["da", "sv"]}, "rejected": "min", "training": {"loss": "simpo", "beta": 2.0}}
    )
    assert about(arm) == "pool: groups of languages · reward model · rejected min · simpo, β 2"


def test_a_zero_has_no_sign():
    assert written(Unit(signed=True), -0.2, -1.4, 0.3) == ("0", "−1 to 0")
    points = Unit(100, signed=True, suffix=" points")
    assert written(points, 0.001, -0.03, 0.05) == ("0 points", "−3 to +5")
    assert written(Unit(digits=1), 0.5, 0.05, 1.0) == ("0.5", "0.1 to 1.0")
    assert written(POINTS, -0.004, -0.1, 0.1) == ("0", "−10 to +10")


def test_words_for_counts_and_times():
    assert [count_of(n, "pair") for n in (0, 1, 1024)] == ["0 pairs", "1 pair", "1,024 pairs"]
    assert [duration(s) for s in (0.25, 48.4, 200, 18720)] == ["0.2 s", "48 s", "3 min 20 s", "5 h 12 min"]
