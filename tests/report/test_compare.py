import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from croco.errors import UserError
from croco.report.compare import UNTUNED, _judged_alike, compare
from croco.report.exports import comparison_terminal
from croco.storage import files, records, shards
from croco.storage.schemas import PROMPTS, VERDICTS
from report.made_run import TUNED, add_arena, make_run, write


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[Path]:
    """Two runs that are the same but for what came of chance."""
    folder = tmp_path_factory.mktemp("originals")
    return [
        make_run(folder / name, num_prompts=2, num_samples=3, num_tests=24, seed=seed)
        for name, seed in (("first", 0), ("second", 1))
    ]


@pytest.fixture
def runs(originals, tmp_path) -> list[Path]:
    """Copies of them, to be changed."""
    return [shutil.copytree(run, tmp_path / run.name) for run in originals]


def edit(run: Path, change) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    change(recipe)
    files.write_json(run / "recipe.json", recipe)


def verdicts(run: Path, arm: str, benchmark: str = "lab") -> pl.DataFrame:
    return shards.read_table(run / "evaluate" / arm).filter(pl.col("benchmark") == benchmark)


def test_a_run_differs_from_itself_in_nothing(runs):
    found = compare(runs[0], runs[0])
    assert (found.settings, found.notes) == ([], [])
    assert found.arms == ["monolingual", "multilingual", UNTUNED]
    differences = [cell.difference for board in found.boards for cell in board.cells.values()]
    assert len(differences) == 2 * (2 + 2 + 3) * (14 + 4)
    assert set(differences) == {(0.0, 0.0, 0.0)}


def test_differences_are_the_second_minus_the_first_by_hand(runs):
    found = compare(*runs)
    board = found.boards[0]
    for arm, shown in (("monolingual", "monolingual"), ("base", UNTUNED)):
        means = []
        for run in runs:
            rows = verdicts(run, arm).filter((pl.col("temperature") == 0) & pl.col("language").is_in(TUNED))
            means.append(float(np.mean(rows["value"].to_numpy())))
        cell, before = board.cell(shown, 0.0, "tuned"), found.firsts["lab", shown, 0.0, "tuned"]
        assert cell.value.value == pytest.approx(means[1])
        assert before.value.value == pytest.approx(means[0])
        assert cell.difference.value == pytest.approx(means[1] - means[0])
        assert cell.difference.low <= cell.difference.value <= cell.difference.high


def test_scores_of_two_reward_models_are_not_subtracted(runs):
    frames = [pl.DataFrame({"benchmark": ["reward", "lab"]})] * 2
    for dtype, second in (("float32", "sha256:1"), ("auto", "sha256:2")):
        for run, model in zip(runs, ("sha256:1", second), strict=True):
            record = records.read_record(run / "evaluate" / "base")
            record["science"]["settings"]["reward"] = {
                "model": model,
                "dtype": dtype if run == runs[0] else "auto",
            }
            records.write_record(run / "evaluate" / "base", record)
        kept, notes = _judged_alike(runs, [], frames)
        alike = second == "sha256:1"
        assert [frame["benchmark"].to_list() for frame in kept] == [
            ["reward", "lab"] if alike else ["lab"]
        ] * 2
        assert notes == ([] if alike else ["Not judged by the same reward model, so left out: 'reward'."])


def test_an_arm_of_one_run_and_what_arms_inherit_are_no_differences_of_their_own(runs):
    def change(recipe):
        recipe["arms"]["other"] = recipe["arms"].pop("multilingual") | {"evaluated": False}
        recipe["training"] = {"beta": 0.3}
        recipe["arms"]["monolingual"]["training"] = {"epochs": 2}

    edit(runs[1], change)
    keys = [setting.key for setting in compare(*runs).settings]
    assert keys == ["training.beta", "arms.monolingual.training.epochs"]


def test_settings_that_differ_are_listed_with_both_values(runs):
    def change(recipe):
        recipe["sampling"]["completions"] = 64
        recipe["arms"]["multilingual"]["training"]["beta"] = 0.5
        recipe["runtime"] = {"shard_prompts": 9}

    edit(runs[1], change)
    found = {setting.key: setting for setting in compare(*runs).settings}
    assert list(found) == ["sampling.completions", "arms.multilingual.training.beta", "runtime.shard_prompts"]
    assert (found["sampling.completions"].first, found["sampling.completions"].second) == ("3", "64")
    assert [setting.runtime for setting in found.values()] == [False, False, True]


def test_prompts_of_one_run_alone_are_left_out_and_counted(runs):
    folder = runs[1] / "evaluate"
    for arm in ("base", "monolingual", "multilingual"):
        rows = shards.read_table(folder / arm).filter(~pl.col("prompt_id").is_in(["t1", "t2"]))
        write(folder / arm, VERDICTS, rows.to_dicts())
    found = compare(*runs)
    assert found.notes == [
        "Not all prompts have a verdict in both runs: 28 of first and 0 of second (prompts by language) are left "
        "out, and the rest is compared."
    ]
    kept = verdicts(runs[0], "monolingual").filter(
        ~pl.col("prompt_id").is_in(["t1", "t2"]) & (pl.col("temperature") == 0) & (pl.col("language") == "da")
    )
    before = found.firsts["lab", "monolingual", 0.0, "da"]
    assert before.value.value == pytest.approx(kept["value"].mean())
    assert before.num_prompts == kept.height == 16


def test_the_same_id_in_other_words_is_another_prompt(runs):
    folder = runs[1] / "eval-prompts"
    rows = shards.read_table(folder).to_dicts()
    for row in rows:
        if row["prompt_id"] == "t1":
            row["messages"][0]["content"] += " Please."
    write(folder, PROMPTS, rows)
    (note,) = compare(*runs).notes
    assert (
        "14 of first and 14 of second (prompts by language, 14 prompts of the same name in other words)"
        in note
    )
    for row in rows:
        row["messages"][0]["content"] += "!"
    write(folder, PROMPTS, rows)
    with pytest.raises(UserError, match=r"first and second share no prompt of 'lab.*' in the same words"):
        compare(*runs)


def test_what_one_run_has_alone_is_named(runs):
    def change(recipe):
        recipe["arms"]["other"] = recipe["arms"].pop("multilingual")
        recipe["run"]["languages"] = TUNED[:-1]
        recipe["run"]["low_resource_languages"] = ["gl", "cy", "mt", "ga", TUNED[-1]]

    edit(runs[1], change)
    found = compare(*runs)
    assert found.arms == ["monolingual", UNTUNED]
    assert found.notes[:2] == [
        "The arm multilingual is only in first and left out.",
        "The arm other is only in second and left out.",
    ]
    assert found.notes[2].endswith("not compared as a group: tuned and low-resource.")
    assert found.boards[0].groups == ["held-out", "all"]


def test_arenas_are_compared_too(runs):
    for run, seed in zip(runs, (1, 2), strict=True):
        add_arena(run, num_prompts=8, seed=seed)
    board = compare(*runs).boards[-1]
    means = [float(shards.read_table(run / "arena" / "monolingual")["value"].mean()) for run in runs]
    assert board.benchmark == "arena"
    assert board.cell("monolingual", 0.0, "tuned").difference.value == pytest.approx(means[1] - means[0])


def test_what_is_missing_is_named(runs, tmp_path):
    with pytest.raises(UserError, match=r"is no run: found no recipe\.json"):
        compare(runs[0], tmp_path)
    (runs[1] / "evaluate" / "monolingual" / "stage.json").unlink()
    with pytest.raises(UserError, match="second has no complete stage evaluate/monolingual: run"):
        compare(*runs)


def test_on_a_terminal(runs):
    edit(runs[1], lambda recipe: recipe["sampling"].update(completions=64))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in comparison_terminal(compare(*runs)):
        console.print(part)
    text = console.export_text()
    for expected in (
        "sampling.completions",
        "64",
        "Tasks seen in tuning: first, second, and the second minus the first",
        UNTUNED,
        "held-out",
        "±",
    ):
        assert expected in text


def test_an_arena_at_another_temperature_is_left_out_and_named(runs):
    for run in runs:
        add_arena(run)
    edit(runs[0], lambda recipe: recipe.update(arena={"judge": "lab"}))
    edit(runs[1], lambda recipe: recipe.update(arena={"judge": "lab", "temperature": 0.1}))
    found = compare(*runs)
    assert "The temperature T = 0.1 is only in second and left out." in found.notes
    assert "The completions of 'arena' were drawn at other temperatures: it is left out." in found.notes
    assert "arena" not in {board.benchmark for board in found.boards}
    for arm in ("base", "monolingual", "multilingual"):
        folder = runs[1] / "evaluate" / arm
        rows = shards.read_table(folder).with_columns(temperature=pl.col("temperature") + 2).to_dicts()
        write(folder, VERDICTS, rows)
    with pytest.raises(UserError, match="first and second share no benchmark at one temperature"):
        compare(*runs)
