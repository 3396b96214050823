"""The script beside the recipes of SmolLM2: labels, pairs and tables, on completions written by hand."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

import real
from croco.config.load import load
from croco.stages.evaluate.results import language_groups, summarise

RECIPES = Path(__file__).parents[1] / "recipes"
pytest.importorskip("wordfreq")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return imported("smollm2")


@pytest.fixture(scope="module")
def page_script() -> ModuleType:
    return imported("smollm2_page")


def imported(name: str) -> ModuleType:
    sys.path.insert(0, str(RECIPES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPES))


def rows_of(script: ModuleType, texts: dict[str, list[tuple[str, str]]]) -> pl.DataFrame:
    """Completions to one short prompt in some languages, each with how it ended."""
    item = next(item for item in script.everyday.splits()["train"] if item.kind == "short")
    asked = {code: [{"role": "user", "content": script.everyday.instruction(item, code)}] for code in texts}
    return pl.DataFrame([
        {"prompt_id": item.prompt_id, "language": code, "sample_id": i, "messages": asked[code],
         "completion": text, "finish_reason": reason}
        for code, drawn in texts.items() for i, (text, reason) in enumerate(drawn)
    ])  # fmt: skip


GOOD = "Many people like this place in the summer."
GERMAN = "Viele Menschen mögen diesen Ort im Sommer sehr."
LOOP = "the sea the sea the sea the sea"


def test_labels_and_pairs(script: ModuleType) -> None:
    rows = script.labelled(rows_of(script, {
        "en": [(GOOD, "stop"), (GOOD, "length"), (LOOP, "stop"), (GERMAN, "stop")],
        "de": [(GERMAN, "stop"), (GOOD, "stop")],
    }))  # fmt: skip
    assert rows["good"].to_list() == [True, False, False, False, True, False]
    assert rows["usable"].to_list() == rows["good"].to_list()
    said = lambda pairs: sorted((p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs)  # noqa: E731
    pairs = script.english_pairs(rows)
    assert said(pairs) == sorted([(GOOD, LOOP), (GOOD, GERMAN)])
    assert {p["prompt"][0]["content"] for p in pairs} == {rows["messages"][0][0]["content"]}
    own = script.own_language_pairs(rows, 10)
    assert said(own) == sorted([(GERMAN, GOOD), (GOOD, GERMAN), (GOOD, LOOP)])
    assert len(script.own_language_pairs(rows, 2)) == 2


def test_a_reward_is_right_when_good_completions_have_the_higher_scores(script: ModuleType) -> None:
    pool = [{"good": good, "ended": ended} for good, ended in ((True, True), (False, True), (False, False))]
    assert script.wins(pool, [1.0, 2.0, 0.0], ended=False) == [0.0, 1.0]
    assert script.wins(pool, [1.0, 2.0, 0.0], ended=True) == [0.0]
    assert script.wins(pool, [1.0, 1.0, 0.0], ended=True) == [0.5]
    assert script.wins(pool[1:], [1.0, 2.0], ended=False) == []


def test_the_page_shows_what_was_said(script: ModuleType, page_script: ModuleType) -> None:
    """Real completions as those of two arms: the shares in the tables are those counted here."""
    said = real.completions().with_columns(found_language=pl.col("language"), temperature=pl.lit(1.0))
    tuned = said.with_columns(completion=pl.lit("Yes."))
    rows = pl.concat([said.with_columns(arm=pl.lit("base")), tuned.with_columns(arm=pl.lit("monolingual"))])
    recipe = load(RECIPES / "smollm2.toml")
    groups = language_groups(recipe.run.languages, (), recipe.run.held_out_languages)
    results = summarise(page_script.by_part(rows), groups, 0, 200)
    cell = {"value": 0.75, "ci_low": None, "ci_high": None, "prompts": 3}
    accuracy = pl.DataFrame([{"reward": "English pairs", "en": cell}, {"reward": "likelihood", "en": None}])
    page = "\n".join(page_script.tables(recipe, results, accuracy))
    judged = script.labelled(said.filter(pl.col("language").is_in(recipe.run.languages)))
    share = 100 * judged["usable"].mean()
    assert f"| base | 1 | {share:.0f} [" in page
    assert f"| monolingual | 1 | 0 [0, 0] | {-share:+.0f} [" in page
    assert f"| base | 1 | {100 * judged['constraint'].mean():.0f} [" in page
    assert "| English pairs | 75 |" in page
    assert "| likelihood |  |" in page
    assert "| ranked by | en (3 prompts) |" in page


def test_what_the_pairs_hold(script: ModuleType, page_script: ModuleType) -> None:
    rows = rows_of(script, {"en": [(GOOD, "stop"), (LOOP, "stop")], "de": [(GERMAN, "stop"), (GOOD, "stop")]})
    pairs = pl.DataFrame({
        "prompt_id": rows["prompt_id"][:2],
        "chosen": [GOOD, GERMAN], "chosen_language": ["en", "de"], "chosen_finish_reason": ["stop", "stop"],
        "rejected": [LOOP, GOOD], "rejected_language": ["en", "de"], "rejected_finish_reason": ["stop", "stop"],
    })  # fmt: skip
    assert list(page_script.side_cells(pairs, "chosen", ["en", "fr", "de"])) == ["100", "", "100", "100", "8"]
    assert list(page_script.side_cells(pairs, "rejected", ["en", "fr", "de"])) == ["0", "", "0", "50", "8"]


@pytest.mark.parametrize("name", ["smollm2", "smollm2-cpu"])
def test_the_recipes_are_two_sizes_of_one(name: str) -> None:
    recipe = load(RECIPES / f"{name}.toml")
    tried = ["monolingual", "multilingual", "max-r", "minimum", "random", "labels-everywhere", "program"]
    assert list(recipe.arms) == tried
    assert (recipe.guards.cut, recipe.guards.min_letters) == ("drop", 8)
    assert len({*recipe.evaluation.temperatures, *recipe.evaluation.base_temperatures}) == 5
    assert recipe.evaluation.reward is not None
    assert recipe.evaluation.reward.model != recipe.reward.model


@pytest.mark.parametrize("command", [["smollm2.py", "reward"], ["smollm2_page.py"]])
def test_what_is_wrong_is_one_sentence(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "no.toml")],
        cwd=RECIPES,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no.toml" in done.stderr
    assert "Traceback" not in done.stderr
