"""Guards, languages and pairs on what a real model said: SmolLM2's completions of everyday prompts."""

from __future__ import annotations

from pathlib import Path

import polars as pl

import croco
import real
from croco.languages import MIN_LETTERS, identify
from croco.stages.pair.guards import CONFIDENCE, REASONS
from stages.pair import twin


def scored() -> pl.DataFrame:
    """Completions with scores that differ and have nothing to do with the text."""
    table = real.completions()
    return table.with_columns(score=(pl.int_range(table.height) * 37 % 101).cast(pl.Float32))


def dropped_of(ledger: pl.DataFrame) -> dict[tuple[str, str, int], str]:
    rows = ledger.filter(unit="completion").select("prompt_id", "language", "sample_id", "reason").rows()
    return {(prompt, language, sample): reason for prompt, language, sample, reason in rows}


def test_guards_and_pairs_are_those_of_the_twin() -> None:
    table = scored()
    columns = ["prompt_id", "language", "sample_id", "score", "completion", "finish_reason"]
    kept, dropped = twin.candidates([twin.Row(*row) for row in table.select(columns).rows()])
    pairs, ledger = croco.pairs(table, rejected="min", guards={"wrong_language": "off"})
    assert dropped_of(ledger) == dropped
    assert {REASONS["cut"]} <= set(dropped.values())
    best = {}
    for row in kept:
        best.setdefault((row.prompt_id, row.language), []).append((row.score, row.completion))
    wanted = {key: (max(pool)[1], min(pool)[1]) for key, pool in best.items() if len(pool) > 1}
    assert {(p, code): (a, b) for p, code, a, b in
            pairs.select("prompt_id", "language", "chosen", "rejected").rows()} == wanted  # fmt: skip


def test_a_completion_in_another_language_is_dropped_where_it_is_told() -> None:
    table = scored()
    codes = sorted(table["language"].unique())
    guards = dict.fromkeys(("cut", "duplicate", "near_duplicate", "empty"), "off")
    _, ledger = croco.pairs(table, rejected="min", guards=guards)
    wrong = {key for key, reason in dropped_of(ledger).items() if reason == REASONS["wrong_language"]}
    rows = table.select("prompt_id", "language", "sample_id", "completion").rows()
    told = {row[:3]: identify(row[3], codes, CONFIDENCE, MIN_LETTERS) for row in rows}
    assert wrong == {key for key, code in told.items() if code not in (None, key[1])}
    assert 0.1 < len(wrong) / table.height < 0.6


def test_exported_pairs_are_what_was_said(tmp_path: Path) -> None:
    pairs, dropped = croco.pairs(scored(), rejected="min", guards={"cut": "flag"})
    assert croco.export(pairs, tmp_path / "out", dropped=dropped, license="apache-2.0") == pairs.height
    rows = pl.read_parquet(tmp_path / "out" / "data" / "*.parquet")
    said = set(real.completions()["completion"])
    assert {row[-1]["content"] for row in rows["chosen"].to_list()} <= said
    assert {row[-1]["content"] for row in rows["rejected"].to_list()} <= said
    assert rows["prompt"].to_list() == pairs["messages"].to_list()
