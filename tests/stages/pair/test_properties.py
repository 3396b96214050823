"""Tables at random: `croco.pairs` and the stage agree, accounts balance, and bad values are named."""

from __future__ import annotations

from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import croco
from croco.config import rules
from croco.config.load import NO_PROMPTS, from_dict
from croco.pipeline.fingerprint import pair_settings
from croco.pipeline.stage import Work
from croco.stages.pair import pair as stage
from croco.storage import shards
from croco.storage.schemas import COMPLETIONS, PROMPTS, SCORES, TABLES
from stages.pair.test_pair import completion, score, write

LANGUAGES = ["da", "nl", "sv"]
TEXTS = ["", " \n", "\u200b", "Ja.", "ja.", "J\u00adA.", "Det er en kold dag i dag, og vi bliver inde.", "冷たい日です",
         "It is a cold day today, and we are staying in.", "x" * 300, "x" * 299 + "X", "\u200f42"]  # fmt: skip
ACTIONS = ("drop", "flag", "off")
arms = st.fixed_dictionaries(
    {
        "pool": st.sampled_from(["language", "all", {"nordic": ["da", "sv"]}]),
        "chosen": st.sampled_from(["max", "mean+1std", "quantile:0.8"]),
        "rejected": st.sampled_from(["mean-2std", "min", "q1", "gap:0.5", "mean"]),
        "prompt": st.sampled_from(["chosen", "rejected", "random", "each"]),
        "calibration": st.sampled_from(["none", "zscore", "quantile", "centred"]),
        "pairs_per_pool": st.integers(1, 3),
        "guards": st.fixed_dictionaries(
            {name: st.sampled_from(ACTIONS) for name in ("cut", "empty", "duplicate", "near_duplicate")}
            | {"wrong_language": st.sampled_from(ACTIONS), "score_gap": st.sampled_from(ACTIONS)}
            | {"length_ratio": st.sampled_from(ACTIONS), "min_score_gap": st.just(0.5)}
        ),
    }
)
values = st.one_of(
    st.integers(-2, 2).map(float), st.floats(-9, 9, width=32), st.sampled_from([float("nan"), float("inf")])
)


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[dict, float]]:
    made = []
    for prompt in draw(
        st.lists(st.sampled_from(["a", "b", "ø", "p 10", "p 9"]), min_size=1, max_size=4, unique=True)
    ):
        for language in draw(st.lists(st.sampled_from(LANGUAGES), min_size=1, max_size=3, unique=True)):
            for sample in draw(st.lists(st.integers(0, 30), min_size=1, max_size=9, unique=True)):
                text = draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=40)))
                finish = draw(st.sampled_from(["stop", "stop", "length"]))
                made.append((completion(prompt, language, sample, text, finish), draw(values)))
    return made


def by_stage(
    folder: Path, made: list[tuple[dict, float]], arm: dict, order: Random
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tables that the stage writes for these rows, shuffled over shards of any size."""
    shuffled = order.sample(made, len(made))
    cut = order.randint(0, len(made))
    write(
        folder / "sample",
        COMPLETIONS,
        [[row for row, _ in part] for part in (shuffled[:cut], shuffled[cut:])],
    )
    key = ("prompt_id", "language", "sample_id")
    scored = [score(*(row[name] for name in key), value) for row, value in made]
    write(folder / "score", SCORES, [scored])
    keys = sorted({(row["prompt_id"], row["language"]) for row, _ in made})
    write(folder / "prompts", PROMPTS, [[
        {"prompt_id": p, "language": c, "messages": [{"role": "user", "content": f"{p} {c}"}], "reference": None,
         "source": "made", "domain": None} for p, c in keys
    ]])  # fmt: skip
    recipe = from_dict({"run": {"name": "t", "languages": LANGUAGES}, **NO_PROMPTS, "arms": {"arm": arm}})
    work = Work(
        arm="arm", folder=folder / "pair", settings=pair_settings(recipe, "arm"), runtime=recipe.runtime, title="pair",
        inputs={name: folder / name for name in ("prompts", "sample", "score")}, table=TABLES["pairs"],
    )  # fmt: skip
    stage.pair(work)
    shards.merge_ledgers(work.folder)
    return shards.read_table(work.folder), shards.read_dropped(work.folder)


@settings(max_examples=40, deadline=None)
@given(
    rows(),
    arms,
    st.randoms(use_true_random=False),
    st.sampled_from([1, 2, 4096]),
    st.sampled_from([3, 32768]),
)
@example([(completion("a", "da", 0, "\u200b"), 0.0)], {"guards": {"empty": "flag"}}, Random(0), 1, 3)
def test_the_stage_and_the_function_agree_and_their_accounts_balance(
    made, arm, order, pools_per_shard, block_rows
):
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "POOLS_PER_SHARD", pools_per_shard)
        patch.setattr(stage, "BLOCK_ROWS", block_rows)
        pairs, dropped = by_stage(Path(folder), made, arm, order)
    table = pl.DataFrame([row | {"score": value} for row, value in made])
    table = table.drop("completion_ids", "policy", "seed")
    # a text may be in any of the recipe's languages; the function knows those of the table
    if set(table["language"]) == set(LANGUAGES) or arm["guards"].get("wrong_language", "drop") == "off":
        own, own_dropped = croco.pairs(table, **arm)
        assert pairs.select(own.columns).equals(own)
        assert dropped.sort(pl.all()).equals(own_dropped.sort(pl.all()))
    gone = dropped.filter(pl.col("unit") == "completion")
    assert gone.select("prompt_id", "language", "sample_id").is_unique().all()
    pool_of = {code: code for code in LANGUAGES}
    if arm.get("pool", "language") != "language":
        pool_of |= (
            dict.fromkeys(LANGUAGES, "all") if arm["pool"] == "all" else {"da": "nordic", "sv": "nordic"}
        )
    pools = {(row["prompt_id"], pool_of[row["language"]]) for row, _ in made}
    paired = {(prompt, pool_of[code]) for prompt, code in pairs.select("prompt_id", "chosen_language").rows()}
    without = set(dropped.filter(pl.col("unit") == "pool").select("prompt_id", "language").rows())
    assert paired | without == pools
    assert not paired & without
    assert (pairs["chosen_calibrated"] > pairs["rejected_calibrated"]).all()
    lost = {row[:3] for row in gone.select("prompt_id", "language", "sample_id").rows()}
    for side in ("chosen", "rejected"):
        picked = pairs.select("prompt_id", f"{side}_language", f"{side}_sample_id", side).rows()
        texts = {(row["prompt_id"], row["language"], row["sample_id"]): row["completion"] for row, _ in made}
        assert all(texts[row[:3]] == row[3] and row[:3] not in lost for row in picked)


COLUMNS = {"prompt_id": ["p", "p"], "language": ["da", "da"], "sample_id": [0, 1], "score": [1.0, 2.0],
           "completion": ["a", "b"], "finish_reason": ["stop", "stop"]}  # fmt: skip
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.binary(max_size=3),
    st.lists(st.integers(0, 3), max_size=2), st.dates(),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*COLUMNS, None]), st.lists(ODD, min_size=2, max_size=2), st.booleans())
def test_whatever_a_column_holds_is_taken_or_named(column, found, gone):
    """Pairs, or one sentence: never another error, and never a completion that is neither picked nor accounted for."""
    columns = {name: value for name, value in COLUMNS.items() if not (gone and name == column)}
    if column is not None and not gone:
        columns[column] = found
    try:
        table = pl.DataFrame(columns, strict=False)
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        return  # no table at all
    refused = None
    try:
        pairs, dropped = croco.pairs(table, rejected="min")
    except croco.UserError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused.strip()
        return
    pools = dropped.filter(pl.col("unit") == "pool").height
    assert pairs.height + pools == table.select("prompt_id", "language").unique().height


def test_a_new_rule_is_one_entry(monkeypatch):
    median = rules.Form('"median"', "median", target=lambda pools, amount, chosen: pools.quantile(0.5))
    monkeypatch.setitem(rules.FORMS, "median", median)
    table = pl.DataFrame({"prompt_id": ["p"] * 5, "language": ["da"] * 5, "score": [0.0, 1.0, 2.0, 3.0, 9.0]})
    pairs, _ = croco.pairs(table, rejected="median")
    assert pairs["rejected_sample_id"].to_list() == [2]
    with pytest.raises(croco.UserError, match='"median"'):  # and errors name it
        croco.pairs(table, rejected="middle")
