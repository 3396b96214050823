"""Does a reward model that learnt from English preferences rank completions of other languages? Against verified truth.

Three figures per language and scorer, each with an interval over prompts (completions of all seeds pooled): the share
of pairs of one prompt's completions, verified of unequal quality, that the scorer ranks right; the share of prompts
whose best-scored completion is of the highest quality there is; and Kendall's τ-b between scores and verified quality.
And for all languages together the share per pair of forms, of one form too, since a scorer that tells forms apart and
nothing else ranks most unequal pairs right.

"heuristic" is a control that needs no label: letters of the language, a rare text, a usual length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from croco import languages
from croco.pipeline.seeds import SCORERS
from croco.report.table import PERCENT, SCORE, Entry, Number, Part, Table
from croco.stages.evaluate.stats import Interval, bootstrap_mean, kendall
from croco.storage.shards import read_table

KEY = ["prompt_id", "language", "sample_id"]
POOL = ["folder", "prompt_id", "language"]
FORMS = ("form", "form worse")
TRUTH = "verified"
SHOWN = (SCORERS[0], "heuristic", *SCORERS[1:])  # held against each other
# (scorer, ...) -> over prompts, and of how many pairs or pools
Figures = dict[tuple[str, ...], tuple[Interval, int]]


def read_scores(folders: Sequence[Path], scorers: Sequence[str]) -> pl.DataFrame:
    """Every completion of runs that scored the same ones by every scorer: its form, and a column per scorer."""
    from croco.lab import judge

    parts = []
    for number, folder in enumerate(folders):
        made = read_table(folder / "sample", [*KEY, "completion"]).with_columns(folder=pl.lit(number))
        forms, _ = judge.judge(*(made[name].to_list() for name in ("prompt_id", "language", "completion")))
        made = made.with_columns(form=pl.Series(forms, dtype=pl.String))
        for scorer in dict.fromkeys((TRUTH, *scorers)):
            score = scores_of(folder, scorer).select(*KEY, pl.col("score").cast(pl.Float64).alias(scorer))
            made = made.join(score, on=KEY, validate="1:1")
        parts.append(made.drop("completion"))
    return pl.concat(parts)


def accuracy(scored: pl.DataFrame, scorers: Sequence[str], by: Sequence[str]) -> Figures:
    """(scorer, *case) -> the share of pairs of one pool, of unequal quality, that are ranked right; equal scores half.

    A case is a value of every column of `by`: the language, or `FORMS`, of the better and of the worse."""
    pairs = scored.join(scored, on=POOL, suffix=" worse").filter(pl.col(TRUTH) > pl.col(f"{TRUTH} worse"))
    right = [
        ((pl.col(s) > pl.col(f"{s} worse")) + 0.5 * (pl.col(s) == pl.col(f"{s} worse"))).mean().alias(s)
        for s in scorers
    ]
    keys = list(dict.fromkeys((*by, *POOL)))
    return _over_prompts(pairs.group_by(keys).agg(*right, rows=pl.len()), scorers, by)


def best_and_tau(scored: pl.DataFrame, scorers: Sequence[str]) -> tuple[Figures, Figures]:
    """(scorer, language) -> how often the best-scored completion is of the highest quality; and Kendall's τ-b."""
    top, pools = scored[TRUTH].max(), scored.group_by(POOL, maintain_order=True)
    best, tau = list[list[object]](), list[list[object]]()
    for key, pool in pools:
        best.append(
            [*key, *((pool.filter(pl.col(s) == pool[s].max())[TRUTH] == top).mean() for s in scorers)]
        )
        tau.append([*key, *(kendall(pool[s].to_numpy(), pool[TRUTH].to_numpy()) for s in scorers)])
    frames = (
        pl.DataFrame(rows, [*POOL, *scorers], orient="row").fill_nan(None).with_columns(rows=pl.lit(1))
        for rows in (best, tau)
    )
    found = [_over_prompts(frame, scorers, ["language"]) for frame in frames]
    return found[0], found[1]


def _over_prompts(pools: pl.DataFrame, scorers: Sequence[str], by: Sequence[str]) -> Figures:
    """The mean over a prompt's pools, then over prompts; a scorer without any value in a case has none."""
    keys = list(dict.fromkeys((*by, "prompt_id")))
    prompts = pools.group_by(keys).agg(pl.col(*scorers).mean(), pl.col("rows").sum()).sort(keys)
    return {
        (scorer, *map(str, case)): (bootstrap_mean(values.to_numpy(), seed=0), int(part["rows"].sum()))
        for case, part in prompts.group_by(list(by), maintain_order=True)
        for scorer in scorers
        if len(values := part[scorer].drop_nulls())
    }


def scores_of(folder: Path, scorer: str) -> pl.DataFrame:
    """The scores of one scorer: the reward model's lie in no arm's folder, the heuristic's nowhere."""
    if scorer == "heuristic":
        return heuristic(read_table(folder / "sample", [*KEY, "completion"]))
    own = folder / "score" / scorer
    return read_table(own if own.is_dir() else folder / "score", [*KEY, "score"])


def heuristic(completions: pl.DataFrame) -> pl.DataFrame:
    """Scores without any label, the sum of three standardised traits within a language.

    How much likelier its letter trigrams are among the completions of its language than among all; how rare the text is
    among them; how near its length is to their median."""
    texts = [f" {text.lower()} " for text in completions["completion"]]
    codes = completions["language"].to_list()
    trigrams = [[text[i : i + 3] for i in range(len(text) - 2)] for text in texts]
    own: dict[str, Counter[str]] = {code: Counter() for code in codes}
    for code, of in zip(codes, trigrams, strict=True):
        own[code].update(of)
    every = sum(own.values(), Counter[str]())
    size = {code: counts.total() for code, counts in own.items()}

    def likeness(code: str, of: list[str]) -> float:
        ratios = [(own[code][t] / size[code]) / (every[t] / every.total()) for t in of]
        return float(np.mean(np.log(ratios))) if ratios else 0.0

    traits = completions.select(KEY).with_columns(
        likeness=pl.Series(map(likeness, codes, trigrams)),
        text=pl.Series(texts),
        length=pl.Series(map(len, texts)),
    )
    usual = (pl.col("length").log() - pl.col("length").median().over("language").log()).abs()
    rare = -pl.len().over("language", "text").log()
    scored = [
        ((trait - trait.mean().over("language")) / (trait.std().over("language") + 1e-9))
        for trait in (pl.col("likeness"), rare, -usual)
    ]
    return traits.with_columns(score=pl.sum_horizontal(scored)).select(*KEY, "score")


def transfer_part(scored: pl.DataFrame, codes: Sequence[str]) -> Part:
    """Reward model, likelihood and chance against the verified truth, in every language and per pair of forms."""
    own = [scorer for scorer in SHOWN if scorer != TRUTH]  # the truth ranks itself right
    forms, (best, tau) = accuracy(scored, own, FORMS), best_and_tau(scored, SHOWN)
    cases = sorted({case[1:] for case in forms}, key=lambda case: (case[0] != case[1], case))
    by_form: list[list[Entry]] = [
        [*case, *(Number(forms[s, *case][0], PERCENT) for s in own), f"{forms[own[0], *case][1]:,}"]
        for case in cases
    ]
    tables = [Table(["form of the better", "of the worse: percent ranked right", *own, "pairs"], by_form, 2)]
    for title, figures, columns, unit in (
        ("percent of unequal pairs ranked right", accuracy(scored, own, ["language"]), own, PERCENT),
        ("percent of prompts whose best-scored completion is of the highest quality", best, SHOWN, PERCENT),
        ("Kendall's τ-b with verified quality", tau, own, SCORE),
    ):
        rows: list[list[Entry]] = [
            [languages.name(c), *(Number(figures[s, c][0], unit) if (s, c) in figures else None for s in columns)]
            for c in codes if any((s, c) in figures for s in columns)
        ]  # fmt: skip
        tables.append(Table([title, *columns], rows))
    text = [
        "Within one prompt in one language, on dev prompts; the completions of all seeds together.",
        "The first table tells quality from form: pairs of one form first, if there are any of unequal quality. The "
        "heuristic needs no label: letters of the language, a rare text, a usual length.",
    ]
    return Part("transfer", "Does the reward model transfer?", text, tables)
