import pathlib

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from croco.config.load import from_dict
from croco.errors import UserError
from croco.pipeline.fingerprint import pair_settings
from croco.pipeline.stage import Work
from croco.stages.pair import pair as stage
from croco.stages.pair import statistics
from croco.stages.pair.contrast import NO_CANDIDATE, NO_REFERENCE, NONE_BELOW, ONE_CANDIDATE
from croco.stages.pair.load_scores import read_scored
from croco.stages.pair.pair import pair
from croco.storage import files
from croco.storage import shards as store
from croco.storage.schemas import COMPLETIONS, PAIRS, PROMPTS, SCORES, TABLES, ledger

RECIPE = {
    "run": {"name": "test", "languages": ["da", "nl"]},
    "arms": {
        "mono": {"pool": "language"},
        "cross": {"pool": "all"},
        "other": {"pool": "all", "prompt": "random"},
        "rejected": {"pool": "all", "prompt": "rejected"},
        "each": {"pool": "all", "prompt": "each"},
        "two": {"pool": "all", "pairs_per_pool": 2},
        "group": {"pool": {"nordic": ["da"]}},
        "calibrated": {"pool": "all", "calibration": "centred"},
        "best": {"pool": "language", "training": {"method": "sft"}},
        "gold": {"chosen": "reference", "rejected": "min"},
        "gold-sft": {"chosen": "reference", "training": {"method": "sft"}},
    },
}
TURNS = [
    {"role": "system", "content": "tools: clock()"},
    {"role": "user", "content": "hvad er klokken?"},
    {"role": "tool", "content": "12:00"},
]


def write(folder: pathlib.Path, table, shards: list[list[dict]], dropped: list[tuple] = ()) -> None:
    for index, rows in enumerate(shards):
        left_out = ledger(list(dropped)) if index == 0 else None
        store.write_shard(
            folder,
            index,
            pa.Table.from_pylist(rows, schema=table.schema),
            table.schema,
            read={table.unit: len(rows)},
            written={table.unit: len(rows)},
            dropped=left_out,
        )
    store.merge_ledgers(folder)


def completion(prompt: str, language: str, sample: int, text: str, finish: str = "stop") -> dict:
    return {
        "prompt_id": prompt,
        "language": language,
        "sample_id": sample,
        "completion": text,
        "completion_ids": [sample, sample + 1],
        "completion_tokens": 3,
        "finish_reason": finish,
        "policy": "made",
        "seed": sample,
    }


def score(prompt: str, language: str, sample: int, value: float) -> dict:
    return {"prompt_id": prompt, "language": language, "sample_id": sample, "score": value, "scorer": "made"}


def tables(folder: pathlib.Path, order: int = 1) -> dict[str, pathlib.Path]:
    """Four prompts: p in both languages, q with cut and repeated completions, r with equal scores, s in
    Danish only.
    """
    rows = [
        *((("p", "da", i, f"p da {i}", "stop"), i) for i in range(4)),
        *((("p", "nl", i, f"p nl {i}", "stop"), 10 + i) for i in range(4)),
        *(
            (("q", "da", i, text, "stop" if i else "length"), v)
            for i, (text, v) in enumerate([("x", 9), ("y", 1), ("y", 5)])
        ),
        *((("q", "nl", i, "", "stop"), 1) for i in range(2)),
        *((("r", "da", i, f"r {i}", "stop"), 2.0) for i in range(3)),
        *((("s", "da", i, f"s {i}", "stop"), v) for i, v in enumerate([0.0, float("nan"), 1.0])),
    ]
    rows = rows[::order]
    found = {name: folder / name for name in ("prompts", "sample", "score")}
    half = len(rows) // 2
    samples = [completion(*row) for row, _ in rows]
    write(found["sample"], COMPLETIONS, [samples[:half], samples[half:]])
    write(found["score"], SCORES, [[score(*row[:3], value) for row, value in rows]])
    prompts = sorted({row[:2] for row, _ in rows})
    write(
        found["prompts"],
        PROMPTS,
        [
            [
                {
                    "prompt_id": p,
                    "language": c,
                    "messages": [*TURNS, {"role": "user", "content": f"{p} {c}"}],
                    "reference": f"gold {p}" if (p, c) in (("p", "da"), ("q", "nl")) else None,
                    "source": "made",
                    "domain": None,
                }
                for p, c in prompts
            ]
        ],
    )
    return found


def run(folder: pathlib.Path, arm: str, inputs: dict[str, pathlib.Path]) -> pl.DataFrame:
    recipe = from_dict(RECIPE)
    out = folder / "pair" / arm
    work = Work(
        arm=arm,
        folder=out,
        settings=pair_settings(recipe, arm),
        runtime=recipe.runtime,
        inputs=inputs,
        table=TABLES["pairs"],
        title=f"pair/{arm}",
    )
    pair(work)
    store.merge_ledgers(out)
    files.write_json(out / "facts.json", work.record_file["facts"])
    return store.read_table(out)


def facts(folder: pathlib.Path, arm: str) -> dict:
    return files.read_json(folder / "pair" / arm / "facts.json")


def keys_and_texts(pairs: pl.DataFrame) -> list[tuple]:
    return pairs.select("prompt_id", "language", "chosen", "rejected").rows()


def test_monolingual_pairs_by_hand(tmp_path):
    pairs = run(tmp_path, "mono", tables(tmp_path))
    assert pairs.columns == PAIRS.schema.names
    assert keys_and_texts(pairs) == [
        ("p", "da", "p da 3", "p da 0"),
        ("p", "nl", "p nl 3", "p nl 0"),
        ("s", "da", "s 2", "s 0"),
    ]
    first = pairs.row(0, named=True)
    assert first["messages"] == [*TURNS, {"role": "user", "content": "p da"}]
    assert (first["chosen_ids"], first["rejected_ids"]) == ([3, 4], [0, 1])
    assert (first["chosen_finish_reason"], first["rejected_finish_reason"]) == ("stop", "stop")
    assert (first["pool_size"], first["pool_mean"], first["pool_std"]) == (4, 1.5, pytest.approx(1.25**0.5))
    assert (first["pool_min"], first["calibration"], first["chosen_calibrated"]) == (0.0, "none", 3.0)
    assert pairs.row(2, named=True)["pool_mean"] == 0.5  # the NaN entered neither mean nor size
    ledger_rows = store.read_dropped(tmp_path / "pair" / "mono")
    assert ledger_rows.filter(pl.col("unit") == "pool").select("prompt_id", "language", "reason").rows() == [
        ("q", "da", ONE_CANDIDATE),
        ("q", "nl", NO_CANDIDATE),
        ("r", "da", NONE_BELOW),
    ]
    assert ledger_rows.filter(pl.col("unit") == "completion").height == 5
    marker = files.read_json(tmp_path / "pair" / "mono" / "part-00000.done")
    assert marker["read"] == {"completion": 19, "pool": 6}
    assert marker["written"] == {"completion": 14, "pool": 3, "pair": 3}
    found = facts(tmp_path, "mono")
    assert (found["completions"], found["candidates"], found["pools"], found["pairs"]) == (19, 14, 6, 3)
    assert found["languages"]["nl"] == {
        "completions": 6, "candidates": 4, "chosen": 1, "rejected": 1, "uniform": 1.5
    }  # fmt: skip


def test_pairs_across_languages_by_hand(tmp_path):
    inputs = tables(tmp_path)
    pairs = run(tmp_path, "cross", inputs)
    assert keys_and_texts(pairs) == [("p", "nl", "p nl 3", "p da 0"), ("s", "da", "s 2", "s 0")]
    row = pairs.row(0, named=True)
    assert (row["chosen_language"], row["rejected_language"], row["pool_size"]) == ("nl", "da", 8)
    assert row["messages"][-1]["content"] == "p nl"
    dropped = store.read_dropped(tmp_path / "pair" / "cross").filter(pl.col("unit") == "pool")
    assert dropped.select("prompt_id", "language").rows() == [("q", "all"), ("r", "all")]
    assert run(tmp_path, "rejected", inputs).row(0, named=True)["messages"][-1]["content"] == "p da"
    each = run(tmp_path, "each", inputs)
    assert each.select("prompt_id", "language", "chosen").rows() == [
        ("p", "da", "p nl 3"), ("p", "nl", "p nl 3"), ("s", "da", "s 2"),
    ]  # fmt: skip
    assert [m[-1]["content"] for m in each["messages"]] == ["p da", "p nl", "s da"]


def test_groups_several_pairs_and_calibration(tmp_path):
    inputs = tables(tmp_path)
    assert run(tmp_path, "group", inputs).equals(
        run(tmp_path, "mono", inputs).with_columns(arm=pl.lit("group"))
    )
    two = run(tmp_path, "two", inputs)
    assert two.select("prompt_id", "pair_id", "chosen", "rejected").rows()[:2] == [
        ("p", 0, "p nl 3", "p da 0"), ("p", 1, "p nl 2", "p da 1"),
    ]  # fmt: skip
    # in Dutch all scores are ten higher: raw scores choose Dutch, centred ones see two equal halves
    calibrated = run(tmp_path, "calibrated", inputs).row(0, named=True)
    assert (calibrated["calibration"], calibrated["chosen_language"]) == ("centred", "da")
    assert (calibrated["chosen_score"], calibrated["chosen_calibrated"]) == (3.0, 1.5)


def test_data_for_sft(tmp_path):
    inputs = tables(tmp_path)
    best = run(tmp_path, "best", inputs)
    # with one candidate or equal scores there is nothing to reject, and still something to learn
    assert keys_and_texts(best) == [
        ("p", "da", "p da 3", None), ("p", "nl", "p nl 3", None), ("q", "da", "y", None), ("r", "da", "r 0", None),
        ("s", "da", "s 2", None),
    ]  # fmt: skip
    gold = run(tmp_path, "gold-sft", {"prompts": inputs["prompts"]})
    assert keys_and_texts(gold) == [("p", "da", "gold p", None), ("q", "nl", "gold q", None)]
    assert gold["chosen_sample_id"].to_list() == [-1, -1]
    assert store.read_dropped(tmp_path / "pair" / "gold-sft").height == 4
    assert facts(tmp_path, "gold-sft") == {"pools": 6, "pairs": 2}


def test_gold_completions_as_the_chosen(tmp_path):
    inputs = tables(tmp_path)
    scores = [score("p", "da", -1, 2.5), score("q", "nl", -1, 7.0)]
    write(tmp_path / "gold", SCORES, [scores])
    pairs = run(tmp_path, "gold", {**inputs, "score-references": tmp_path / "gold"})
    # strictly below 2.5, so not the best completion; the gold completion is no member of its pool
    assert keys_and_texts(pairs) == [("p", "da", "gold p", "p da 0")]
    assert pairs.select("chosen_score", "chosen_sample_id", "pool_size", "pool_mean").row(0) == (
        2.5,
        -1,
        4,
        1.5,
    )
    reasons = (
        store.read_dropped(tmp_path / "pair" / "gold").filter(pl.col("unit") == "pool")["reason"].to_list()
    )
    assert reasons == [NO_REFERENCE, NO_REFERENCE, NO_CANDIDATE, NO_REFERENCE, NO_REFERENCE]


def test_a_random_prompt_language_is_one_of_the_two_and_the_same_every_time(tmp_path):
    inputs = tables(tmp_path)
    once = run(tmp_path / "one", "other", inputs)
    again = run(tmp_path / "two", "other", inputs)
    assert once.equals(again)
    assert (once["language"].is_in(["da", "nl"])).all()


@pytest.mark.parametrize("arm", ["mono", "cross", "two", "each", "calibrated", "group", "best"])
@pytest.mark.parametrize("block_rows", [4, 16384])
def test_neither_order_nor_layout_of_the_input_matters(tmp_path, monkeypatch, arm, block_rows):
    forward = run(tmp_path / "forward", arm, tables(tmp_path / "forward"))
    monkeypatch.setattr(stage, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(stage, "POOLS_PER_SHARD", 2)
    backward = run(tmp_path / "backward", arm, tables(tmp_path / "backward", order=-1))
    assert forward.equals(backward)
    ledgers = [store.read_dropped(tmp_path / side / "pair" / arm) for side in ("forward", "backward")]
    assert ledgers[0].sort(pl.all()).equals(ledgers[1].sort(pl.all()))
    assert facts(tmp_path / "forward", arm) == facts(tmp_path / "backward", arm)


def test_a_language_that_is_not_tuned_takes_no_part(tmp_path):
    inputs = tables(tmp_path)
    scored = read_scored(inputs["sample"], inputs["score"], ["da"], "all")
    assert set(scored["language"]) == {"da"}


def test_a_completion_without_score_is_named_unless_the_ledger_explains_it(tmp_path):
    inputs = tables(tmp_path)
    scores = store.read_table(inputs["score"]).filter(
        ~((pl.col("prompt_id") == "p") & (pl.col("sample_id") == 3))
    )
    reason = "longer than the reward model's limit"
    left_out = [("completion", "p", "da", 3, reason), ("completion", "p", "nl", 3, reason)]
    write(tmp_path / "fewer", SCORES, [scores.to_dicts()], left_out[:1])
    with pytest.raises(UserError, match="no score for prompt_id 'p', language 'nl', sample_id 3"):
        read_scored(inputs["sample"], tmp_path / "fewer", ["da", "nl"], "language")
    write(tmp_path / "explained", SCORES, [scores.to_dicts()], left_out)
    pairs = run(tmp_path, "mono", {**inputs, "score": tmp_path / "explained"})
    assert pairs["chosen"].to_list() == ["p da 2", "p nl 2", "s 2"]


def test_a_score_without_completion_and_a_key_twice_are_named(tmp_path):
    inputs = tables(tmp_path)
    rows = store.read_table(inputs["score"]).to_dicts()
    write(tmp_path / "more", SCORES, [[*rows, score("zz", "da", 0, 1.0)]])
    with pytest.raises(UserError, match="scores prompt_id 'zz'"):
        read_scored(inputs["sample"], tmp_path / "more", ["da", "nl"], "language")
    write(tmp_path / "twice", SCORES, [[*rows, rows[2]]])
    with pytest.raises(UserError, match="prompt_id 'p', language 'da', sample_id 2 occurs more than once"):
        read_scored(inputs["sample"], tmp_path / "twice", ["da", "nl"], "language")


def test_a_prompt_that_is_not_there_and_a_broken_shard_are_named(tmp_path):
    inputs = tables(tmp_path)
    prompts = store.read_table(inputs["prompts"]).filter(pl.col("language") == "nl")
    write(tmp_path / "other", PROMPTS, [prompts.to_dicts()])
    with pytest.raises(UserError, match="no prompt 'p' in 'da'"):
        run(tmp_path, "mono", {**inputs, "prompts": tmp_path / "other"})
    shard = inputs["sample"] / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"part-00001.parquet is damaged"):
        run(tmp_path / "again", "mono", inputs)


def test_small_pools_and_shortcuts_are_said(tmp_path, capsys):
    run(tmp_path, "mono", tables(tmp_path))
    said = " ".join(capsys.readouterr().err.split())
    assert 'with 4 completions a pool "mean-2std" is expected to pick another than the minimum in 0%' in said
    found = facts(tmp_path, "mono")
    assert (found["share_other_than_minimum"], found["shortcuts"]["language"]) == (0.0, 0.5)


def test_shortcuts_are_the_share_of_right_guesses():
    rng = np.random.default_rng(0)
    num = 400
    table = pl.DataFrame({
        "prompt_id": [f"p{i}" for i in range(num)], "chosen_characters": rng.integers(50, 100, num),
        "rejected_characters": rng.integers(50, 100, num), "chosen_language": ["nl"] * num,
        "rejected_language": ["da"] * (num // 2) + ["nl"] * (num // 2),
        "chosen_finish_reason": ["stop"] * num, "rejected_finish_reason": ["stop", "length"] * (num // 2),
    })  # fmt: skip
    found = statistics.shortcuts(table)
    assert found["language"] == 0.75  # half of the pairs are told by it, the other half a toss
    assert found["finish reason"] == 0.75
    assert found["length"] == pytest.approx(0.5, abs=0.06)
    longer = table.with_columns(chosen_characters=pl.lit(30))
    assert statistics.shortcuts(longer)["length"] == 1.0  # shorter is a shortcut too


CHANCES = [
    (4, 1.0, False),
    (5, 1.0, True),
    (12, 0.75, False),
    (24, 0.75, True),
    (99, 0.59, False),
    (400, 0.61, True),
]


@pytest.mark.parametrize(("pairs", "auc", "warns"), CHANCES)
def test_a_shortcut_is_said_where_it_is_more_than_chance(tmp_path, capsys, pairs, auc, warns):
    found = {"pairs": pairs, "shortcuts": {"length": auc}}
    statistics.warn("pair/a", from_dict(RECIPE).arms["mono"], found, tmp_path)
    assert ("told apart by their length alone" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("arm", ["mono", "cross", "each", "two", "calibrated", "best"])
def test_when_all_completions_were_left_out_there_is_an_empty_table_and_a_ledger(tmp_path, arm):
    inputs = tables(tmp_path)
    reason = "longer than the reward model's limit"
    left_out = [("completion", *row, reason) for row in store.read_table(inputs["sample"])[:, :3].rows()]
    write(tmp_path / "none", SCORES, [[]], left_out)
    pairs = run(tmp_path, arm, {**inputs, "score": tmp_path / "none"})
    assert pairs.height == 0
    assert pairs.columns == PAIRS.schema.names
    found = facts(tmp_path, arm)
    assert (found["completions"], found["candidates"], found["pools"], found["pairs"]) == (0, 0, 0, 0)
    assert store.read_dropped(tmp_path / "pair" / arm).is_empty()  # the scorer's ledger has them


def test_when_guards_drop_everything_the_ledger_says_so(tmp_path, capsys):
    inputs = tables(tmp_path)
    rows = store.read_table(inputs["sample"]).with_columns(finish_reason=pl.lit("length")).to_dicts()
    write(tmp_path / "cut", COMPLETIONS, [rows])
    assert run(tmp_path, "cross", {**inputs, "sample": tmp_path / "cut"}).height == 0
    dropped = store.read_dropped(tmp_path / "pair" / "cross")
    assert dropped.group_by("unit").len().sort("unit").rows() == [("completion", 19), ("pool", 4)]
    shown = " ".join(capsys.readouterr().err.split())
    assert "no pairs of 19 scored completions (" in shown
    assert "16 completions: cut at the token limit" in shown


def test_a_stage_that_was_stopped_goes_on_with_the_next_shard(tmp_path, monkeypatch):
    inputs = tables(tmp_path)
    monkeypatch.setattr(stage, "POOLS_PER_SHARD", 2)
    whole = run(tmp_path / "whole", "mono", inputs)
    write_shard, written = stage._write, []

    def stopped(work, index, *rest):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(index)
        write_shard(work, index, *rest)

    monkeypatch.setattr(stage, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", "mono", inputs)
    first = tmp_path / "parts" / "pair" / "mono" / "part-00000.parquet"
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(stage, "_write", write_shard)
    assert run(tmp_path / "parts", "mono", inputs).equals(whole)
    assert first.stat().st_mtime_ns == before
    assert facts(tmp_path / "parts", "mono") == facts(tmp_path / "whole", "mono")
