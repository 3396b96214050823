"""Does a reward model that learnt from English preferences rank completions of other languages? Against verified truth.

Three figures per language and scorer, each with an interval over prompts (completions of all seeds pooled): the share
of pairs of one prompt's completions, verified of unequal quality, that the scorer ranks right; the share of prompts
whose best-scored completion is of the highest quality there is; and Kendall's τ-b between scores and verified quality.
And for all languages together the share per pair of forms, of one form too, since a scorer that tells forms apart and
nothing else ranks most unequal pairs right.

"heuristic" is a control that needs no label: letters of the language, a rare text, a usual length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.stages.evaluate.stats import Interval, bootstrap_mean
from croco.storage.shards import read_table

KEY = ["prompt_id", "language", "sample_id"]
FIGURES = ("ranking", "best", "tau")
Values = NDArray[np.float64]


def ranking(scores: Values, quality: Values, top: float) -> tuple[float, float, float]:
    """One pool's (share of unequal pairs ranked right, best-scored at the top, Kendall's τ-b), NaN where undefined.

    A pair with equal scores counts half, as do several best-scored completions each by its share.
    """
    above, better = np.sign(scores[:, None] - scores), np.sign(quality[:, None] - quality)
    upper = np.triu_indices(len(scores), 1)
    above, better = above[upper], better[upper]
    unequal, agreement = (better != 0).sum(), (above * better).sum()
    spread = np.sqrt((above != 0).sum() * unequal)
    right = 0.5 + 0.5 * agreement / unequal if unequal else np.nan
    best = (quality[scores == scores.max()] == top).mean()
    return float(right), float(best), float(agreement / spread) if spread else float("nan")


def transfer(folders: Sequence[Path], scorers: Sequence[str], languages: Sequence[str]) -> dict[
    tuple[str, str, str], Interval
]:  # fmt: skip
    """(scorer, language, figure) -> its interval, from runs that scored the same completions by every scorer."""
    rows = []
    for folder in folders:
        verified = scores_of(folder, "verified").rename({"score": "quality"})
        top = float(verified["quality"].to_numpy().max())
        for scorer in scorers:
            joined = scores_of(folder, scorer).join(verified, on=KEY, validate="1:1")
            for (prompt, language), pool in joined.group_by("prompt_id", "language", maintain_order=True):
                scores, quality = (pool[name].to_numpy().astype(float) for name in ("score", "quality"))
                rows.append((scorer, language, prompt, *ranking(scores, quality, top)))
    names = ["scorer", "language", "prompt"]
    figures = pl.DataFrame(rows, schema=[*names, *FIGURES], orient="row").fill_nan(None)
    means = figures.group_by(names, maintain_order=True).agg(pl.col(FIGURES).mean())
    return {
        (scorer, language, figure): bootstrap_mean(values, seed=0)
        for language in languages
        for scorer in sorted(scorers)
        for figure in FIGURES
        if len(values := means.filter(scorer=scorer, language=language)[figure].drop_nulls().to_numpy())
    }


def accuracy_by_form(
    folders: Sequence[Path], scorers: Sequence[str]
) -> dict[tuple[str, str, str], tuple[Interval, int]]:
    """(scorer, form of the better, of the worse) -> share of such pairs ranked right, and how many pairs there are.

    Pairs are of one prompt in one language, of unequal verified quality; equal scores count half; the interval is over
    prompts, each the mean over its pools.
    """
    from croco.lab import judge

    pool, found = ["folder", "prompt_id", "language"], list[pl.DataFrame]()
    for number, folder in enumerate(folders):
        made = read_table(folder / "sample", [*KEY, "completion"]).with_columns(folder=pl.lit(number))
        forms, _ = judge.judge(*(made[name].to_list() for name in ("prompt_id", "language", "completion")))
        made = made.with_columns(form=pl.Series(forms, dtype=pl.String))
        for scorer in ("verified", *scorers):
            score = scores_of(folder, scorer).select(*KEY, pl.col("score").alias(f"by {scorer}"))
            made = made.join(score, on=KEY, validate="1:1") if f"by {scorer}" not in made.columns else made
        found.append(made.drop("completion", "sample_id"))
    every = pl.concat(found)
    pairs = every.join(every, on=pool, suffix=" worse").filter(
        pl.col("by verified") > pl.col("by verified worse")
    )
    if pairs.is_empty():
        return {}
    kinds, results = ["form", "form worse"], dict[tuple[str, str, str], tuple[Interval, int]]()
    for scorer in scorers:
        better, worse = pl.col(f"by {scorer}"), pl.col(f"by {scorer} worse")
        right = (better > worse) + 0.5 * (better == worse)
        pools = pairs.group_by(*kinds, *pool).agg(share=right.mean(), pairs=pl.len())
        prompts = pools.group_by(*kinds, "prompt_id").agg(pl.col("share").mean(), pl.col("pairs").sum())
        for kind, of in prompts.sort(*kinds, "prompt_id").group_by(kinds, maintain_order=True):
            interval = bootstrap_mean(of["share"].to_numpy(), seed=0)
            results[scorer, str(kind[0]), str(kind[1])] = interval, int(of["pairs"].sum())
    return results


def scores_of(folder: Path, scorer: str) -> pl.DataFrame:
    """The scores of one scorer: the reward model's lie in no arm's folder, the heuristic's nowhere."""
    if scorer == "heuristic":
        return heuristic(read_table(folder / "sample", [*KEY, "completion"]))
    own = folder / "score" / scorer
    return read_table(own if own.is_dir() else folder / "score", [*KEY, "score"])


def heuristic(completions: pl.DataFrame) -> pl.DataFrame:
    """Scores without any label, the sum of three standardised traits within a language.

    How much likelier its letter trigrams are among the completions of its language than among all; how rare the text is
    among them; how near its length is to their median.
    """
    texts = [f" {text.lower()} " for text in completions["completion"]]
    codes, trigrams = (
        completions["language"].to_list(),
        [[t[i : i + 3] for i in range(len(t) - 2)] for t in texts],
    )
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
