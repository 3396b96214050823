"""The rows that the page lets people look at: pairs, judged comparisons, test completions, what was left out.

Texts are read only for the rows that go into the page. Columns that a table does not have (an older run, another judge)
are left out, not guessed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from croco.pipeline.arms import samples_of
from croco.pipeline.inputs import eval_prompts_of, prompts_of
from croco.report.load_run import Run
from croco.report.table import MINUS, temperature_name
from croco.stages.evaluate.results import BASE
from croco.stages.score.policy_logprobs import messages_of
from croco.storage import shards
from croco.storage.lookup import gather, locate
from croco.storage.seeds import digest

MAX_ROWS = 10_000  # of one kind
_CHUNK = 500
_PAIR = ("prompt_id", "language", "pair_id")
_PROMPT = ("prompt_id", "language")
_ANSWER = (*_PROMPT, "temperature", "sample_id", "benchmark")
NOTHING = pl.DataFrame(schema={"arm": pl.String})


@dataclass(frozen=True)
class Row:
    """One entry of the list: what it is of, and one or two captioned texts."""

    arm: str
    prompt_id: str
    language: str
    messages: Sequence[Mapping[str, str]] | None
    tags: list[str]  # what the third filter finds: flags, verdicts, reasons
    languages: list[str]  # of its texts, where they differ from the prompt's
    note: str
    sides: list[tuple[str, str]]  # caption, text
    order: float | None  # the number that the list can be sorted by


def kinds_of(run: Run) -> dict[str, tuple[dict[str, str], int, Iterable[Row]]]:
    """Of every kind: its title and what its third filter and its order are called, how many rows it has, and they."""
    pairs, comparisons = _located(run, "pair", _PAIR), _located(run, "arena", _PROMPT)
    evaluations, left_out = _evaluated(run), _left_out(run)
    return {
        "pairs": (_about("Pairs", "Flag", "Score gap"), pairs.height, _pairs(run, pairs)),
        "comparisons": (
            _about("Judged comparisons", "Verdict"), comparisons.height, _comparisons(run, comparisons),
        ),
        "evaluations": (_about("Test completions", "Outcome"), evaluations.height, _evaluations(run, evaluations)),
        "left out": (_about("Left out", "Reason"), left_out.height, _losses(run, left_out)),
    }  # fmt: skip


def _about(title: str, tag: str, order: str = "") -> dict[str, str]:
    return {"title": title, "tag": tag, "order": order}


def _located(run: Run, stage: str, key: Sequence[str]) -> pl.DataFrame:
    """Where an arm's rows lie, for all arms that have them."""
    parts = [
        locate(folder, key).with_columns(arm=pl.lit(arm))
        for arm in run.recipe.arms
        if _has_rows(folder := run.folder / stage / arm)
    ]
    return pl.concat(parts) if parts else NOTHING


def _has_rows(folder: Path) -> bool:
    return (folder / "stage.json").is_file() and bool(shards.shards(folder))


def _spread(rows: pl.DataFrame, key: Sequence[str]) -> Iterator[tuple[str, pl.DataFrame]]:
    """At most MAX_ROWS rows in the order of a digest of arm and key, in blocks of one arm each."""
    if rows.height > 20 * MAX_ROWS:  # digests of millions of rows would take longer than all the rest
        rows = rows.gather_every(rows.height // (10 * MAX_ROWS))
    names = rows.select("arm", *key)
    ranks = pl.Series("rank", [digest("browser", *row) for row in names.iter_rows()], dtype=pl.UInt64)
    ranked = rows.with_columns(ranks).sort("rank").head(MAX_ROWS)
    for start in range(0, ranked.height, _CHUNK):
        for (arm,), block in ranked[start : start + _CHUNK].group_by("arm", maintain_order=True):
            yield str(arm), block


def _pairs(run: Run, rows: pl.DataFrame) -> Iterator[Row]:
    columns = ("messages", "flags", "pool_size", "pool_mean", "pool_std", *(
        f"{side}{part}"
        for side in ("chosen", "rejected")
        for part in ("", "_score", "_calibrated", "_language", "_sample_id", "_finish_reason")
    ))  # fmt: skip
    for arm, block in _spread(rows, _PAIR):
        texts = gather(run.folder / "pair" / arm, block, _PAIR, columns)
        prompts = block.select(*_PROMPT).iter_rows()
        for (prompt_id, language), row in zip(prompts, texts.iter_rows(named=True), strict=True):
            sides = [name for name in ("chosen", "rejected") if row[name] is not None]
            scores = [row[f"{name}_score"] for name in sides]
            gap = scores[0] - scores[1] if len(sides) == 2 and None not in scores else None
            pool = f"pool of {row['pool_size']}"
            if row["pool_mean"] is not None:
                pool += f", mean {_number(row['pool_mean'])}, std {_number(row['pool_std'])}"
            codes = dict.fromkeys(row[f"{name}_language"] for name in sides)
            yield Row(
                arm, prompt_id, language, row["messages"], list(row["flags"]),
                [code for code in codes if code and code != language], pool,
                [(_pair_caption(row, name), row[name]) for name in sides], None if gap is None else round(gap, 3),
            )  # fmt: skip


def _pair_caption(row: Mapping[str, Any], name: str) -> str:
    score, sample, std = row[f"{name}_score"], row[f"{name}_sample_id"], row["pool_std"]
    words = [row[f"{name}_language"], "not scored" if score is None else f"score {_number(score)}"]
    if std and row[f"{name}_calibrated"] is not None:
        away = (row[f"{name}_calibrated"] - row["pool_mean"]) / std
        words.append(f"{_number(away, 1, '+')} std from the pool's mean")
    words.append("gold completion" if sample < 0 else f"sample {sample}")
    if row[f"{name}_finish_reason"] == "length":
        words.append("cut at the token limit")
    return f"{name}: {', '.join(words)}"


def _comparisons(run: Run, rows: pl.DataFrame) -> Iterator[Row]:
    if rows.is_empty():
        return
    orders = {"shown first": "arm_first", "shown second": "base_first"}
    columns = ["completion", "base_completion", "domain", "value"]
    columns += [f"{part}_{order}" for part in ("verdict", "judgement") for order in orders.values()]
    messages = _messages(run.folder / "arena-prompts") or _messages(_eval_prompts(run))
    for arm, block in _spread(rows, _PROMPT):
        texts = gather(run.folder / "arena" / arm, block, _PROMPT, columns)
        prompts = block.select(*_PROMPT).iter_rows()
        for (prompt_id, language), row in zip(prompts, texts.iter_rows(named=True), strict=True):
            verdicts = {s: verdict for s, order in orders.items() if (verdict := row[f"verdict_{order}"])}
            outcome = {1.0: f"{arm} wins", 0.0: "base wins"}.get(row["value"], "tie")
            if len(set(verdicts.values())) > 1:
                outcome = "tie: the two orders disagree"
            elif row["completion"] == row["base_completion"]:
                outcome = "tie: the same text"
            names = {"arm": arm, "base": BASE, "tie": "tie"}
            note = "; ".join(f"{arm} {shown}: {names.get(v, v)}" for shown, v in verdicts.items())
            note += "".join(
                f"\n\nThe judge, {arm} {shown}: {words}"
                for shown, order in orders.items()
                if (words := row[f"judgement_{order}"])
            )
            yield Row(
                arm, prompt_id, language, messages.get((prompt_id, language)),
                [outcome, *([row["domain"]] if row["domain"] else [])], [],
                note, [(BASE, row["base_completion"]), (arm, row["completion"])], None,
            )  # fmt: skip


def _evaluated(run: Run) -> pl.DataFrame:
    """The keys of what an arm and the base both answered, the first sample of each."""
    folder = run.folder / "evaluate" / BASE
    arms = _located(run, "evaluate", _ANSWER)
    if arms.is_empty() or not _has_rows(folder):
        return NOTHING
    base = locate(folder, _ANSWER).select(*_ANSWER, base_shard="shard")
    return arms.filter(pl.col("sample_id") == 0).join(base, on=list(_ANSWER), how="inner")


def _evaluations(run: Run, keys: pl.DataFrame) -> Iterator[Row]:
    if keys.is_empty():
        return
    columns = ("completion", "mode", "value")
    messages = _messages(_eval_prompts(run))
    for arm, block in _spread(keys, _ANSWER):
        tuned = gather(run.folder / "evaluate" / arm, block, _ANSWER, columns)
        base = gather(
            run.folder / "evaluate" / BASE, block.with_columns(shard="base_shard"), _ANSWER, columns
        )
        rows = (block.select(*_ANSWER).iter_rows(), base.iter_rows(named=True), tuned.iter_rows(named=True))
        for name, before, after in zip(*rows, strict=True):
            change = after["value"] - before["value"]
            outcome = "same as" if change == 0 else f"{'better' if change > 0 else 'worse'} than"
            sides = [
                (f"{who}: {row['mode'].replace('-', ' ')}, value {_number(row['value'])}", row["completion"])
                for who, row in ((BASE, before), (arm, after))
            ]
            tags = [f"{outcome} the base", f"{before['mode']} → {after['mode']}".replace("-", " ")]
            decoding = temperature_name(name[2])
            yield Row(arm, name[0], name[1], messages.get(name[:2]), tags, [], decoding, sides, None)


def _left_out(run: Run) -> pl.DataFrame:
    """The ledgers of all stages together, flags not: what they mark was kept."""
    parts = []
    for title in run.stages:
        stage, _, arm = title.partition("/")
        if (run.folder / title / "dropped.parquet").is_file():
            rows = shards.read_dropped(run.folder / title).filter(pl.col("unit") != "flag")
            parts.append(rows.with_columns(stage=pl.lit(stage), arm=pl.lit(arm or "all arms")))
    return pl.concat(parts) if parts else NOTHING


def _losses(run: Run, ledger: pl.DataFrame) -> Iterator[Row]:
    if ledger.is_empty():
        return
    messages = _messages(_eval_prompts(run)) | _messages(run.folder / prompts_of(run.recipe)[0])
    for arm, block in _spread(ledger, ("stage", "unit", "prompt_id", "language", "sample_id", "reason")):
        numbered = block.with_row_index("place")
        of_samples = numbered.filter(
            (pl.col("unit") == "completion") & pl.col("stage").is_in(["score", "pair"])
        )
        texts = _dropped_texts(run, arm, of_samples)
        for place, row in enumerate(numbered.iter_rows(named=True)):
            name = (row["prompt_id"], row["language"])
            sample = "" if row["sample_id"] is None else f", sample {row['sample_id']}"
            side = [(f"{row['unit']}{sample}", texts[place])] if place in texts else []
            tags = [row["reason"].split(": ")[0]]
            yield Row(arm, name[0], name[1], messages.get(name), tags, [],
                      f"{row['stage']}: {row['unit']}{sample} left out, {row['reason']}", side, None)  # fmt: skip


def _dropped_texts(run: Run, arm: str, wanted: pl.DataFrame) -> dict[int, str]:
    """The completions that an arm left out, by place; an arm may have had a policy's of its own."""
    key = ("prompt_id", "language", "sample_id")
    stage, owner = samples_of(run.recipe, arm) if arm in run.recipe.arms else ("sample", None)
    folder = run.folder / stage / (owner or "")
    if wanted.is_empty() or not (folder / "stage.json").is_file():
        return {}
    held = wanted.join(locate(folder, key), on=key, how="inner")
    texts = gather(folder, held, key, ("completion",))["completion"]
    return dict(zip(held["place"].to_list(), texts.to_list(), strict=True))


def _eval_prompts(run: Run) -> Path:
    return run.folder / eval_prompts_of(run.recipe)[0]


def _messages(folder: Path) -> dict[tuple[str, str], Any]:
    """The turns of every prompt of a stage's folder; none where there is no such stage."""
    if not (folder / "stage.json").is_file():
        return {}
    return messages_of(shards.read_table(folder, [*_PROMPT, "messages"]))


def _number(value: float, places: int = 2, sign: str = "-") -> str:
    return f"{value:{sign}.{places}f}".replace("-", MINUS)
