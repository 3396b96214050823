"""Reward models on preference pairs: files of several forms in, accuracies by hand, real models for the rest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

import tiny
from conftest import TinyModels
from croco.cli.main import app
from croco.errors import UserError
from croco.lab import world
from croco.models.chat_template import conversation_ids
from croco.models.loading import load_reward
from croco.stages.diagnose.diagnose import Pair, diagnose, read_pairs, tabulate
from croco.stages.diagnose.metrics import agreement, language_share, markdown, rank
from croco.storage import shards
from croco.storage.schemas import PAIRS

QUESTION = [{"role": "user", "content": "Which month comes after March?"}]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_every_form_of_a_pair_is_read(tmp_path: Path) -> None:
    question = QUESTION[0]["content"]
    rows = [
        # M-RewardBench
        {
            "id": 7,
            "language": "deu_Latn",
            "prompt": question,
            "chosen": "April.",
            "rejected": "May.",
            "subset": "chat",
        },
        # TRL, prompt apart and prompt within
        {"language": "da", "prompt": QUESTION, "chosen": [said("April.")], "rejected": [said("Maj.")]},
        {"language": "da", "chosen": [*QUESTION, said("April.")], "rejected": [*QUESTION, said("Maj.")]},
        # ours
        {"prompt_id": "p", "language": "nb", "messages": QUESTION, "chosen": "April.", "rejected": "Mai."},
        # data for SFT
        {"prompt_id": "q", "language": "nb", "messages": QUESTION, "chosen": "April.", "rejected": None},
    ]
    file = jsonl(tmp_path / "x.jsonl", rows)
    pairs, drops = read_pairs([file], None)
    assert [pair.language for pair in pairs] == ["de", "da", "da", "nb"]
    assert {(pair.messages[0]["content"], pair.chosen) for pair in pairs} == {(question, "April.")}
    assert [pair.rejected for pair in pairs] == ["May.", "Maj.", "Maj.", "Mai."]
    assert (pairs[0].prompt_id, pairs[0].category, pairs[3].prompt_id) == ("7", "chat", "p")
    assert pairs[1].prompt_id != pairs[2].prompt_id
    assert drops == [("pair", "q", "nb", None, "a side of the pair is missing")]


def made(*rows: tuple[str, str, str | None, int, int, float, float]) -> pl.DataFrame:
    """(prompt_id, language, category, chosen_length, rejected_length, chosen score, rejected score)."""
    pairs = [Pair(p, lang, cat, [], "x" * a, "x" * b) for p, lang, cat, a, b, _, _ in rows]
    scores = np.array([row[5:] for row in rows], dtype=float)
    return tabulate(pairs, {"chosen_0": scores[:, 0], "rejected_0": scores[:, 1]})


def value(
    rows: list[dict[str, Any]], metric: str, language: str = "da", category: str | None = None
) -> float:
    (row,) = [r for r in rows if (r["metric"], r["language"], r["category"]) == (metric, language, category)]
    return float(row["value"])


def test_accuracy_length_and_distribution_by_hand() -> None:
    table = made(
        ("p1", "da", "chat", 10, 5, 2.0, 1.0),  # right, and longer
        ("p2", "da", "chat", 5, 10, 1.0, 3.0),  # wrong, and longer
        ("p3", "da", "code", 5, 10, 4.0, 0.0),  # right, and shorter
        ("p4", "da", "code", 7, 7, 1.0, 1.0),  # the same
    )
    rows = list(rank(table, 0, "m"))
    assert value(rows, "accuracy") == 2.5 / 4
    assert value(rows, "accuracy", category="chat") == 0.5
    assert value(rows, "accuracy", category="code") == 0.75
    assert value(rows, "score-gap") == (1 - 2 + 4 + 0) / 4
    assert value(rows, "prefers-longer") == (1 + 1 + 0 + 0.5) / 4
    assert value(rows, "chosen-longer") == (1 + 0 + 0 + 0.5) / 4
    assert value(rows, "chosen-mean") == 2.0
    assert value(rows, "chosen-q50") == 1.5
    assert value(rows, "rejected-std") == pytest.approx(np.std([1, 3, 0, 1]))
    # scores 2 1 4 1 | 1 3 0 1 against lengths 10 5 5 7 | 5 10 10 7, ranks by hand
    score_ranks = np.array([6, 3.5, 8, 3.5, 3.5, 7, 1, 3.5])
    length_ranks = np.array([7, 2, 2, 4.5, 2, 7, 7, 4.5])
    expected = np.corrcoef(score_ranks, length_ranks)[0, 1]
    assert value(rows, "score-length") == pytest.approx(expected)
    # one language: "all" would say the same again
    assert {row["language"] for row in rows} == {"da"}


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    pairs = [(f"p{p}", "da", None, 1, 1, float(i % 2), 0.5) for p in range(6) for i in range(20)]
    (row,) = [r for r in rank(made(*pairs), 0, "m") if r["metric"] == "accuracy"]
    assert (row["value"], row["ci_low"], row["ci_high"], row["n"]) == (0.5, 0.5, 0.5, 120)
    (row,) = [r for r in rank(made(*pairs[:20]), 0, "m") if r["metric"] == "accuracy"]
    assert (row["value"], row["ci_low"], row["ci_high"], row["n"]) == (0.5, None, None, 20)
    many = made(*[(f"p{i}", "da", None, 1, 1, float(i % 2), 0.5) for i in range(20)])
    (row,) = [r for r in rank(many, 0, "m") if r["metric"] == "accuracy"]
    assert row["ci_low"] < 0.4 < 0.6 < row["ci_high"]


def test_how_much_of_the_scores_is_language() -> None:
    # two languages, all of the variance between them; p3 is in one language only and has no part
    table = made(
        ("p1", "da", None, 1, 1, 1.0, 1.0),
        ("p1", "en", None, 1, 1, 3.0, 3.0),
        ("p3", "en", None, 1, 1, 99.0, 0.0),
    )
    assert language_share(table, "chosen_0", "rejected_0") == (1.0, 2)
    # means 1 and 3 about 2, scores 0 2 2 4: between 4 of 8
    table = made(("p1", "da", None, 1, 1, 0.0, 2.0), ("p1", "en", None, 1, 1, 2.0, 4.0))
    assert language_share(table, "chosen_0", "rejected_0") == (0.5, 2)
    assert language_share(made(("p1", "da", None, 1, 1, 0.0, 2.0)), "chosen_0", "rejected_0") is None


def test_two_models_by_hand() -> None:
    table = made(("p1", "da", None, 1, 2, 2.0, 1.0), ("p2", "da", None, 1, 2, 4.0, 3.0))
    table = table.with_columns(chosen_1=pl.Series([2.0, 3.0]), rejected_1=pl.Series([1.0, 4.0]))
    rows = list(agreement(table, 0, ["a", "b"]))
    assert value(rows, "same-order") == 0.5
    # of the six pairs of completions five are in the same order
    assert value(rows, "tau") == pytest.approx((5 - 1) / 6)
    assert {row["reward"] for row in rows} == {"a and b"}


def test_two_real_reward_models(tmp_path: Path, tiny_models: TinyModels) -> None:
    other = tiny.save(tmp_path / "other", tiny.make_reward("llama", seed=5), tiny.make_tokenizer())
    texts = ["April comes after March.", "Maj.", "Après mars vient avril, dit-on souvent.", "Der April " * 4]
    rows = [
        {
            "id": i,
            "language": language,
            "prompt": "Which month is next?",
            "chosen": texts[i],
            "rejected": texts[i - 1],
        }
        for i in range(4)
        for language in ("en", "da")
    ]
    long = {"id": 9, "language": "en", "prompt": "x " * 600, "chosen": "a", "rejected": "b"}
    file = jsonl(tmp_path / "pairs.jsonl", [*rows, long])
    models = [str(tiny_models.reward), str(other)]
    ranking = diagnose([file], models, tmp_path / "out", overrides=["runtime.device=cpu"])
    scored = shards.read_parquet(tmp_path / "out" / "pairs.parquet")
    dropped = shards.read_parquet(tmp_path / "out" / "dropped.parquet")
    assert scored.height == 8
    assert set(dropped["reason"].str.split(": ").list.first()) == set(models)
    for name in models:
        model, tokenizer = load_reward(name, device="cpu")
        for row in scored.to_dicts()[:3]:
            text = texts[int(row["prompt_id"])]
            ids = conversation_ids(tokenizer, [{"role": "user", "content": "Which month is next?"}], text)
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits.item()
            assert row[f"chosen_score: {name}"] == pytest.approx(expected, abs=1e-4)
    accuracy = ranking.filter((pl.col("metric") == "accuracy") & (pl.col("language") == "all"))
    right = (scored[f"chosen_score: {models[0]}"] > scored[f"rejected_score: {models[0]}"]).mean()
    assert accuracy["value"][0] == pytest.approx(right)
    assert accuracy["n"].to_list() == [8, 8]
    page = (tmp_path / "out" / "ranking.md").read_text()
    assert "1 pairs were left out (`dropped.parquet`): " in page
    assert f"## {models[0]} and {models[1]}" in page
    assert "Kendall's tau" in page
    # made again over what it made itself, and never over other things
    diagnose([file], models[:1], tmp_path / "out", overrides=["runtime.device=cpu"])
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="was not made by croco"):
        diagnose([file], models[:1], tmp_path / "out")


def test_the_same_text_on_both_sides_is_a_tie(tmp_path: Path) -> None:
    texts = [
        "April comes after March.",
        "Maj.",
        "Après mars vient avril, dit-on souvent, et pas autrement.",
        "So.",
    ]
    rows = [
        {"id": i, "language": "en", "prompt": f"Which month? {'Why? ' * i}", "chosen": text, "rejected": text}
        for i, text in enumerate(texts)
    ]  # fmt: skip
    ranking = diagnose([jsonl(tmp_path / "pairs.jsonl", rows)], ["lab:reward"], tmp_path / "out")
    values = dict(ranking.filter(pl.col("category").is_null()).select("metric", "value").rows())
    assert (values["accuracy"], values["score-gap"]) == (0.5, 0.0)


def test_the_labs_reward_model_on_pairs_of_a_run(tmp_path: Path) -> None:
    rows = []
    for row in world.prompts("dev", ["en", "da", "cy"], 10).to_pylist():
        evasive = world.templates(row["language"])["evasive"][0]
        rows.append(dict.fromkeys(PAIRS.schema.names) | {
            "arm": "a", "prompt_id": row["prompt_id"], "language": row["language"], "pair_id": 0,
            "messages": row["messages"], "chosen": row["reference"], "rejected": evasive,
            "chosen_finish_reason": "stop", "calibration": "none", "chosen_language": row["language"],
            "chosen_sample_id": 0, "pool_size": 2, "flags": [],
        })  # fmt: skip
    import pyarrow as pa

    counts = {"pair": len(rows)}
    shards.write_shard(tmp_path / "pair" / "a", 0, pa.Table.from_pylist(rows, schema=PAIRS.schema), PAIRS.schema,
                      read=counts, written=counts, dropped=None)  # fmt: skip
    found = CliRunner().invoke(
        app,
        [
            "score",
            "--diagnose",
            str(tmp_path / "pair" / "a"),
            "--reward",
            "lab:reward",
            "--to",
            str(tmp_path / "o"),
        ],
    )
    assert found.exit_code == 0, found.output
    assert "| da | 10 | " in found.output
    ranking = shards.read_parquet(tmp_path / "o" / "ranking.parquet")
    accuracy = ranking.filter((pl.col("metric") == "accuracy") & (pl.col("language") == "all"))
    assert accuracy["value"][0] > 0.9
    assert accuracy["n"][0] == 30


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"language": "da", "prompt": "x", "chosen": "y"}, "no column 'rejected'"),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            "no language, expected a column 'language' or --language",
        ),
        (
            {"language": "Danish", "prompt": "x", "chosen": "y", "rejected": "z"},
            "x.jsonl, line 1: 'Danish' is no BCP-47",
        ),
        ({"language": "da", "chosen": "y", "rejected": "z"}, "found no prompt"),
        (
            {"language": "da", "prompt": "x", "chosen": None, "rejected": "z"},
            "no pairs, expected rows with chosen",
        ),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_pairs([jsonl(tmp_path / "x.jsonl", [row])], None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a.toml", "b.toml"], "croco score takes one recipe"),
        (["a.toml", "--reward", "lab:reward"], "go with --diagnose"),
        (["--diagnose", "a.jsonl", "--reward", "lab:reward"], "expected --to FOLDER"),
        (["--diagnose", "a.jsonl", "--to", "out"], "expected --reward MODEL"),
        (["--diagnose", "a.jsonl", "--to", "out", "--reward", "m", "--arm", "x"], "go with a recipe"),
        (["--diagnose", "none.jsonl", "--to", "out", "--reward", "lab:reward"], "none.jsonl: no such file"),
    ],
)
def test_bad_words_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["score", *words])
    assert found.exit_code == 2
    assert sentence in found.stderr


def test_only_reward_and_runtime_can_be_set(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", [{"language": "da", "prompt": "x", "chosen": "y", "rejected": "z"}])
    with pytest.raises(UserError, match=r"expected a value of \[reward\] or \[runtime\]"):
        diagnose([file], ["lab:reward"], tmp_path / "out", overrides=["sampling.completions=8"])
    with pytest.raises(UserError, match=r"did you mean 'reward.max_tokens'"):
        diagnose([file], ["lab:reward"], tmp_path / "out", overrides=["reward.max_token=8"])


def test_text_of_a_file_cannot_break_the_page() -> None:
    table = made(("p", "da", "a|b <script>", 1, 2, 1.0, 0.0), ("q", "da", "c\nd", 1, 2, 1.0, 0.0))
    page = markdown(
        pl.DataFrame(list(rank(table, 0, "m")), infer_schema_length=None), ["m"], 2, {"too long": 3, "cut": 1}
    )
    assert "| a\\|b &lt;script> | 1 |" in page
    assert "| c d | 1 |" in page
    assert "2 pairs were left out (`dropped.parquet`): 3 × too long; 1 × cut." in page
