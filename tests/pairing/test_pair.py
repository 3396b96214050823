import pathlib

import polars as pl
import pyarrow as pa
import pytest

from croco import store
from croco.errors import UserError
from croco.pairing.gather import locate
from croco.pairing.pair import (
    NO_CANDIDATE,
    NONE_BELOW,
    ONE_CANDIDATE,
    Contrast,
    choose,
    ledger_of,
    pair,
    picks,
    read_scored,
    with_texts,
)
from croco.recipe import from_dict
from croco.records import COMPLETIONS, PAIRS, PROMPTS, SCORES, TABLES, ledger
from croco.stage import Work

RECIPE = {
    "run": {"name": "test", "languages": ["da", "nl"]},
    "arms": {
        "mono": {"pool": "language"},
        "cross": {"pool": "all"},
        "other": {"pool": "all", "prompt": "random"},
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
                    "reference": None,
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
        recipe=recipe,
        arm=arm,
        folder=out,
        settings={},
        runtime=recipe.runtime,
        seed=0,
        inputs=inputs,
        table=TABLES["pairs"],
        title=f"pair/{arm}",
    )
    pair(work)
    store.merge_ledgers(out)
    return store.read_table(out)


def test_monolingual_pairs_by_hand(tmp_path):
    pairs = run(tmp_path, "mono", tables(tmp_path))
    assert pairs.columns == PAIRS.schema.names
    assert pairs.select("prompt_id", "language", "chosen", "rejected").rows() == [
        ("p", "da", "p da 3", "p da 0"),
        ("p", "nl", "p nl 3", "p nl 0"),
        ("s", "da", "s 2", "s 0"),
    ]
    first = pairs.row(0, named=True)
    assert first["messages"] == [*TURNS, {"role": "user", "content": "p da"}]
    assert (first["chosen_ids"], first["rejected_ids"]) == ([3, 4], [0, 1])
    assert (first["pool_size"], first["pool_mean"], first["pool_std"]) == (4, 1.5, pytest.approx(1.25**0.5))
    assert pairs.row(2, named=True)["pool_mean"] == 0.5  # the NaN entered neither mean nor size
    ledger_rows = store.read_dropped(tmp_path / "pair" / "mono")
    assert ledger_rows.filter(pl.col("unit") == "pool").select("prompt_id", "language", "reason").rows() == [
        ("q", "da", ONE_CANDIDATE),
        ("q", "nl", NO_CANDIDATE),
        ("r", "da", NONE_BELOW),
    ]
    assert ledger_rows.filter(pl.col("unit") == "completion").height == 5
    facts = store.read_json(tmp_path / "pair" / "mono" / "part-00000.done")
    assert facts["read"] == {"pool": 6}


def test_pairs_across_languages_by_hand(tmp_path):
    inputs = tables(tmp_path)
    pairs = run(tmp_path, "cross", inputs)
    row = pairs.row(0, named=True)
    assert (row["prompt_id"], row["language"], row["chosen"], row["rejected"]) == (
        "p",
        "nl",
        "p nl 3",
        "p da 0",
    )
    assert (row["chosen_language"], row["rejected_language"], row["pool_size"]) == ("nl", "da", 8)
    assert row["messages"][-1]["content"] == "p nl"
    dropped = store.read_dropped(tmp_path / "pair" / "cross").filter(pl.col("unit") == "pool")
    assert dropped.select("prompt_id", "language").rows() == [("q", "all"), ("r", "da")]
    contrast = Contrast("all", "max", "min", prompt="rejected")
    scored = choose(read_scored(inputs["sample"], inputs["score"], ["da", "nl"]), contrast)
    table = with_texts(
        picks(scored, contrast, 0, 4),
        inputs["sample"],
        inputs["prompts"],
        locate(inputs["prompts"], ("prompt_id", "language")),
    )
    assert table.row(0, named=True)["messages"][-1]["content"] == "p da"


def test_a_random_prompt_language_is_one_of_the_two_and_the_same_every_time(tmp_path):
    inputs = tables(tmp_path)
    once = run(tmp_path / "one", "other", inputs)
    again = run(tmp_path / "two", "other", inputs)
    assert once.equals(again)
    assert (once["language"].is_in(["da", "nl"])).all()


def test_the_order_of_the_input_does_not_matter(tmp_path):
    for arm in ("mono", "cross"):
        forward = run(tmp_path / "forward", arm, tables(tmp_path / "forward"))
        backward = run(tmp_path / "backward", arm, tables(tmp_path / "backward", order=-1))
        assert forward.equals(backward)


def test_a_language_that_is_not_tuned_takes_no_part(tmp_path):
    inputs = tables(tmp_path)
    rows = choose(read_scored(inputs["sample"], inputs["score"], ["da"]), Contrast("all", "max", "min")).rows
    assert rows["language"].unique().to_list() == ["da"]


def test_a_completion_without_score_is_named_unless_the_ledger_explains_it(tmp_path):
    inputs = tables(tmp_path)
    scores = store.read_table(inputs["score"]).filter(
        ~((pl.col("prompt_id") == "p") & (pl.col("sample_id") == 3))
    )
    write(
        tmp_path / "fewer",
        SCORES,
        [scores.to_dicts()],
        [("completion", "p", "da", 3, "longer than the reward model's limit")],
    )
    with pytest.raises(UserError, match="no score for prompt_id 'p', language 'nl', sample_id 3"):
        read_scored(inputs["sample"], tmp_path / "fewer", ["da", "nl"])


def test_a_score_without_completion_and_a_key_twice_are_named(tmp_path):
    inputs = tables(tmp_path)
    rows = store.read_table(inputs["score"]).to_dicts()
    write(tmp_path / "more", SCORES, [[*rows, score("zz", "da", 0, 1.0)]])
    with pytest.raises(UserError, match="scores prompt_id 'zz'"):
        read_scored(inputs["sample"], tmp_path / "more", ["da", "nl"])
    write(tmp_path / "twice", SCORES, [[*rows, rows[2]]])
    with pytest.raises(UserError, match="prompt_id 'p', language 'da', sample_id 2 more than once"):
        read_scored(inputs["sample"], tmp_path / "twice", ["da", "nl"])


def test_a_prompt_that_is_not_there_and_a_broken_shard_are_named(tmp_path):
    inputs = tables(tmp_path)
    prompts = store.read_table(inputs["prompts"]).filter(pl.col("language") == "nl")
    write(tmp_path / "other", PROMPTS, [prompts.to_dicts()])
    with pytest.raises(UserError, match="no prompt 'p' in 'da'"):
        run(tmp_path, "mono", {**inputs, "prompts": tmp_path / "other"})
    shard = inputs["sample"] / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"part-00001.parquet cannot be read"):
        run(tmp_path / "again", "mono", inputs)


def test_the_ledger_and_the_pairs_account_for_every_pool(tmp_path):
    inputs = tables(tmp_path)
    paired = choose(
        read_scored(inputs["sample"], inputs["score"], ["da", "nl"]), Contrast("language", "max", "mean-2std")
    )
    for first, last in ((0, 3), (3, 6), (0, 6)):
        pools = ledger_of(paired, first, last).to_pylist()
        num_dropped = sum(row["unit"] == "pool" for row in pools)
        assert (
            picks(paired, Contrast("language", "max", "min"), first, last).height + num_dropped
            == last - first
        )


def test_small_pools_are_reported(tmp_path, capsys):
    run(tmp_path, "mono", tables(tmp_path))
    assert 'pair/mono: "mean-2std" picked another completion than the minimum in 0%' in " ".join(
        capsys.readouterr().err.split()
    )
