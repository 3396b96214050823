"""docs/guide/python.md is a program, and it runs."""

import re
from pathlib import Path

import polars as pl
import pytest

import croco

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "python.md"


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the page's blocks leave behind, run one after the other in an empty folder."""
    names: dict = {"folder": tmp_path_factory.mktemp("guide")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"])
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
            exec(block, names)
    return names


def test_the_page_runs(namespace):
    completions, scored, pairs, dropped = (
        namespace[name] for name in ("completions", "scored", "pairs", "dropped")
    )
    assert completions.height == 6 * 2 * 8
    assert scored.height == completions.height
    assert scored["score"].null_count() == 0
    assert (pairs["chosen_calibrated"] > pairs["rejected_calibrated"]).all()
    lost = dropped.filter(pl.col("unit") == "pool").height
    assert pairs.height + lost == 6
    assert (namespace["folder"] / namespace["adapter"] / "adapter_config.json").is_file()


def test_pairs_of_a_run_are_those_of_its_tables(namespace, monkeypatch):
    """The stage `pair` and `croco.pairs` on what `croco.score` returns choose the same completions."""
    monkeypatch.chdir(namespace["folder"])
    recipe = croco.load("my-run/recipe.json", ["arms.pairs.pool=all"])
    croco.run(recipe, until="pair")
    columns = [
        "prompt_id",
        "language",
        "chosen",
        "rejected",
        "chosen_score",
        "pool_size",
        "pool_std",
        "flags",
    ]
    own = croco.read_table("my-run/pair/pairs").select(columns)
    assert own.equals(namespace["pairs"].select(columns))


def test_prompts_of_a_file_are_sampled(tiny_models, tmp_path):
    prompts, policy = tiny_models.prompts, tiny_models.policy
    sampling = {"completions": 2, "max_new_tokens": 4}
    drawn = croco.sample(prompts, policy, tmp_path / "run", languages=["en", "da"], sampling=sampling)
    assert drawn.height == 10 * 2 * 2
    assert drawn.filter(language="en")["messages"][0][0]["content"] == "Which month is number 0?"


def test_bad_arguments_are_one_sentence(namespace, monkeypatch):
    monkeypatch.chdir(namespace["folder"])
    with pytest.raises(croco.UserError, match=r"none has no recipe\.json"):
        croco.score("none", "lab:reward")
    with pytest.raises(croco.UserError, match=r"unknown key 'sampling\.completion'; did you mean"):
        croco.sample("lab", "lab:policy", "new", languages=["en"], sampling={"completion": 3})
    with pytest.raises(croco.UserError, match=r"made with other settings"):
        croco.sample({"source": "lab", "limit": 6}, "lab:policy", "my-run", languages=["en", "da"], seed=1)
    with pytest.raises(croco.UserError, match="no such file"):
        croco.train("nothing.jsonl", "lab:policy", "other")
